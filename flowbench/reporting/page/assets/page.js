// Puts the page together from its data.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const methods = byName(data);
const AXES = { images: "generated images", evaluations: "velocity evaluations", seconds: "seconds of training" };
const put = (id, ...children) => document.getElementById(id)?.append(...children);
const choice = (text, options, changed) => h("label", { class: "choice" }, `${text} `,
  h("select", { onchange: (event) => changed(event.target.value) }, options.map(([value, shown]) => h("option", { value }, shown))));

// ---- a workload

function workload(w) {
  const state = { families: new Set(), text: "", unfinished: false, hidden: new Set(), axis: "images" };
  const drawn = [], refresh = () => drawn.forEach((one) => one.refresh());
  const results = resultsTable(w, methods, state, () => { refresh(); legend.refresh(); });
  const visible = () => w.rows.filter((row) => results.shown(row) && !state.hidden.has(row.label));
  const legend = legendOf(w, results, state, refresh, drawn);
  const group = (title, note, extra, ...specs) => {
    const made = specs.map((spec) => figure(spec));
    drawn.push(...made);
    return h("section", {}, h("h3", {}, title), note ? h("p", { class: "note" }, note) : null, extra, h("div", { class: "figures" }, made));
  };
  const curved = w.rows.some((row) => row.curve.length), several = w.rows.some((row) => row.seeds > 1), r = w.roles;
  put(`${w.id}-table`, results.filters, results.table, h("p", { class: "note" }, tableNote(w)));
  const place = `${w.id}-figures`;
  if (w.rows.some((row) => row.seeds)) put(place, legend.node);
  if (curved) put(place, group("During training", `Scores on dev of the averaged policy.${several ? " Bands: 95 % over seeds, Student's t." : ""}`,
    axisSwitch(w, state, refresh), ...[...new Set([r.reward, r.truth, r.diversity, r.distance])].filter(Boolean).map((metric) => curveOf(w, visible, state, metric))));
  const trades = [];
  if (r.reward && r.truth && r.reward !== r.truth) trades.push(tradeOf(w, visible, r.reward, r.truth, w.front_of_truth, "Reward against truth"));
  if (r.diversity && (r.truth || r.reward)) trades.push(tradeOf(w, visible, r.diversity, r.truth || r.reward, w.front_of_diversity, `Diversity against ${r.truth ? "truth" : "reward"}`));
  if (trades.length) put(place, group("What a gain is worth", `Arrows lead from the base model to the tuned one; ${several ? "bars are 95 % intervals; " : ""}the dashed line is the Pareto front.`, null, ...trades));
  if (curved && r.truth && r.truth !== r.reward) put(place, group("Over-optimisation", "The way of each method during training, on dev. Where the truth turns down while the reward still rises, the reward is being exploited.",
    null, wayOf(w, visible, r.reward, r.truth, "Truth against reward"), ...(r.distance ? [wayOf(w, visible, r.distance, r.truth, "Truth against distance")] : [])));
  if (w.judges.length) put(place, group("Judges", null, null, judgesOf(w)));
  refresh();
}
function tableNote(w) {
  const starred = w.columns.some((c) => c.trained) ? " * the reward trained on." : "";
  const over = w.over === "prompts like these" ? "seeds and prompts, of prompts like these" : "seeds, of these prompts";
  const intervals = w.rows.some((row) => row.seeds > 1) ? `95 % intervals over ${over}` : "no intervals, since each method has one seed";
  const shaded = w.rows.some((row) => row.shares_first) ? ` Shaded rows share the first place by ${w.by}.` : "";
  return `Tuned minus base on the same prompts and noise; ${intervals}.${starred}${shaded}`;
}
function legendOf(w, results, state, changed, drawn) {
  const node = h("div", { class: "chips legend", role: "group", "aria-label": "methods in the figures" });
  const highlight = (name) => () => drawn.forEach((one) => one.highlight(name));
  const refresh = () => node.replaceChildren(...w.rows.filter((row) => row.seeds && results.shown(row)).map((row) => h("button", {
    type: "button", class: "chip", "aria-pressed": String(!state.hidden.has(row.label)), onmouseenter: highlight(row.label), onfocus: highlight(row.label),
    onmouseleave: highlight(null), onblur: highlight(null), onclick: (event) => {
      if (state.hidden.has(row.label)) state.hidden.delete(row.label); else state.hidden.add(row.label);
      event.currentTarget.setAttribute("aria-pressed", String(!state.hidden.has(row.label)));
      changed();
    } }, legendLine(methods[row.method]), shortened(row.label, 40))));
  refresh();
  return { node, refresh };
}
const legendLine = (method) => s("svg", { viewBox: "0 0 30 12", width: 30, height: 12, "aria-hidden": "true" },
  s("line", { x1: 0, x2: 30, y1: 6, y2: 6, stroke: method.color, "stroke-width": 1.8, "stroke-dasharray": dashes(method) }), dot(method, 15, 6, 4));
function axisSwitch(w, state, changed) {
  return h("fieldset", { class: "switch" }, h("legend", { class: "unseen" }, "Horizontal axis"), Object.entries(AXES).map(([key, text]) =>
    h("label", {}, h("input", { type: "radio", name: `${w.id}-axis`, value: key, checked: key === state.axis, onchange: () => { state.axis = key; changed(); } }), ` ${text}`)));
}
const columnOf = (w, metric) => w.columns.find((c) => c.key === metric) ?? { heading: metric, kind: "gain" };
const axisTitle = (w, metric) => columnOf(w, metric).kind === "share" ? `${metric}, share of the base model's` : `${metric}, tuned minus base`;

function curveOf(w, visible, state, metric) {
  return () => {
    const kind = columnOf(w, metric).kind === "share" ? "share" : "gain", base = kind === "share" ? 1 : 0;
    const rows = visible().filter((row) => row.curve.some((p) => p.scores[metric]));
    if (!rows.length) return null;
    const series = rows.map((row) => ({ label: row.label, method: methods[row.method], points: [{ x: 0, y: base, start: true },
      ...row.curve.filter((p) => p.scores[metric]).map((p) => ({ x: p[state.axis], y: p.scores[metric].value, low: p.scores[metric].low, high: p.scores[metric].high }))] }));
    const places = decimals(series.flatMap((one) => one.points.map((p) => p.y)));
    return { title: axisTitle(w, metric), file: `${w.name}-${metric}-${state.axis}`, caption: "",
      alt: `Lines of ${series.length} methods: ${metric} on dev against ${AXES[state.axis]}. The table below has the numbers.`,
      draw: linesPlot(series, { title: AXES[state.axis], kind: "cost", include: [0], pad: 0 }, { title: "", kind }, base),
      head: ["method", AXES[state.axis], metric],
      rows: () => rows.flatMap((row) => row.curve.filter((p) => p.scores[metric]).map((p) => [row.label, grouped(p[state.axis]), withInterval(p.scores[metric], kind, places)])) };
  };
}
function tradeOf(w, visible, x, y, front, title) {
  return () => {
    const rows = visible().filter((row) => row.values[x] && row.values[y]), kind = columnOf(w, x).kind;
    if (!rows.length) return null;
    const points = rows.map((row) => ({ label: row.label, method: methods[row.method], x: row.values[x], y: row.values[y] }));
    const places = [x, y].map((key) => placesOf(w.rows, key));
    return { title, file: `${w.name}-${x}-${y}`, caption: `Pareto front: ${front.join(", ")}.`, alt: `${y} against ${x} of ${rows.length} methods, from the base model to the tuned one.`,
      draw: arrowsPlot(points, { title: axisTitle(w, x), kind }, { title: axisTitle(w, y), kind: "gain" }, [kind === "share" ? 1 : 0, 0], front),
      head: ["method", x, y, "on the front"],
      rows: () => points.map((p) => [p.label, withInterval(p.x, kind, places[0]), withInterval(p.y, "gain", places[1]), front.includes(p.label) ? "yes" : ""]) };
  };
}
function wayOf(w, visible, x, y, title) {
  return () => {
    const rows = visible().filter((row) => row.curve.some((p) => p.scores[x] && p.scores[y]));
    if (!rows.length) return null;
    const steps = (row) => row.curve.filter((p) => p.scores[x] && p.scores[y]);
    const series = rows.map((row) => ({ label: row.label, method: methods[row.method],
      points: [{ x: 0, y: 0, start: true }, ...steps(row).map((p) => ({ x: p.scores[x].value, y: p.scores[y].value }))] }));
    return { title, file: `${w.name}-${x}-${y}-way`, caption: "Means over seeds; each mark is a point of the budget.", alt: `The way of ${rows.length} methods in ${x} and ${y} during training.`,
      draw: linesPlot(series, { title: axisTitle(w, x), kind: "gain", include: [0], pad: 0.04 }, { title: axisTitle(w, y), kind: "gain" }, 0), head: ["method", "images", x, y],
      rows: () => rows.flatMap((row) => steps(row).map((p) => [row.label, grouped(p.images), withInterval(p.scores[x], "gain", 3), withInterval(p.scores[y], "gain", 3)])) };
  };
}
function judgesOf(w) {
  return () => ({ title: "How well a judge orders tuned models as the truth does", file: `${w.name}-judges`,
    caption: `Kendall's tau with ${w.roles.truth} over ${w.judges[0].models} tuned models; 95 % intervals over methods. 1: the same order, 0: no relation.`,
    alt: w.judges.map((j) => `${j.name} ${withInterval(j.tau, "gain", 2)}`).join("; "),
    draw: estimatesPlot(w.judges.map((j) => ({ name: j.name, ...j.tau })), "Kendall's tau"), head: ["judge", "tau", "models"],
    rows: () => w.judges.map((j) => [j.name, withInterval(j.tau, "gain", 2), `${j.models}`]) });
}

// ---- profile, pairs, methods, files

function profileFigure() {
  const p = data.profile, of = Object.fromEntries(data.overview.map((one) => [one.label, methods[one.method]]));
  const series = p.curves.map((c) => ({ label: c.label, method: of[c.label], steps: true, points: c.shares.map((y, k) => ({ x: p.factors[k], y, start: true })) }));
  const node = figure(() => ({ title: "Performance profile", file: "profile", alt: "For each factor the share of workloads on which a method needs at most that many times the images of the cheapest one.",
    caption: `Share of workloads on which a method reaches the target with at most so many times the images of the cheapest one; ${p.workloads.join(", ")}. A workload without runs counts as never reached.`,
    draw: linesPlot(series, { title: "factor of the cheapest method's images", kind: "share", include: [1], pad: 0 }, { title: "share of workloads", kind: "share" }, null),
    head: ["method", "area"], rows: () => p.curves.map((c) => [c.label, c.area.toFixed(3)]) }), "h3");
  node.querySelector(".picture").after(h("div", { class: "chips" }, data.overview.filter((one) => one.area !== null).map((one) => h("span", {
    class: "chip plain", onmouseenter: () => node.highlight(one.label), onmouseleave: () => node.highlight(null) }, legendLine(of[one.label]), one.label))));
  return node;
}
function pairs() {
  const there = data.workloads.filter((w) => w.pairs.length), place = h("div", {});
  if (!there.length) return put("pairs-body", h("p", { class: "note" }, "There are no two methods to compare."));
  const show = (id) => place.replaceChildren(pairsMatrix(there.find((w) => w.id === id), methods));
  put("pairs-body", there.length > 1 ? choice("Workload", there.map((w) => [w.id, w.name]), show) : "", place);
  show(there[0].id);
}
function methodDetails(method) {
  const rows = data.workloads.flatMap((w) => w.rows.filter((row) => row.method === method.name).map((row) => ({ w, row })));
  const details = h("details", { class: "method", ontoggle: () => { if (details.open && details.children.length === 1) details.append(methodBody(method, rows)); } },
    h("summary", {}, named(method, method.name), h("span", { class: "sub" }, method.family)));
  return details;
}
function methodBody(method, rows) {
  const links = [["How it works here", method.page], ["Paper", method.paper]].filter(([, url]) => url && url.startsWith("https://"));
  const scroll = (label, table) => h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": label }, table);
  return h("div", { class: "body" }, method.summary ? h("p", {}, method.summary) : null,
    links.length ? h("p", {}, links.map(([text, url], k) => [k ? " · " : "", h("a", { href: url, rel: "noreferrer" }, text)])) : null,
    h("h3", {}, "Search"), searchOf(method, scroll), rows.map(({ w, row }) => runsOf(w, row, scroll)));
}
function searchOf(method, scroll) {
  const space = Object.entries(method.space), parts = [];
  if (space.length) parts.push(scroll("search space", simpleTable("Search space", ["setting", "searched"], space)));
  if (method.trials.length) parts.push(h("p", { class: "note" }, `${method.trials.length} trials, which no table counts:`), scroll("trials", simpleTable("Trials",
    ["trial", "workload", "seed", "reward gain on dev", "diversity", "state"], method.trials.map((t) => [t.settings || "the defaults", t.workload, `${t.seed}`,
      t.reward === null ? "–" : spelled(t.reward, "gain", 4), t.diversity === null ? "–" : `×${t.diversity.toFixed(2)}`, t.status]))));
  else parts.push(h("p", { class: "note" }, "No trial of a search is among these records."));
  if (method.searches.length) parts.unshift(h("p", { class: "note" }, "What its searches selected on dev; k: the mean gain of the best of k trials."), scroll("searches", simpleTable("Searches",
    ["workload", "search", "trials", "chosen", "gain on dev", "diversity", "at an edge", "best of k"], method.searches.map((s) => [s.workload, `${s.ruleset || "outside of the rules"}${s.study === null ? "" : `, study ${s.study}`}`,
      `${s.trials}${s.failed + s.collapsed ? ` (${s.failed} failed, ${s.collapsed} collapsed)` : ""}`, s.settings || s.reason, s.gain === null ? "–" : spelled(s.gain, "gain", 4),
      s.diversity === null ? "–" : `×${s.diversity.toFixed(2)}`, s.edges.join("; ") || "no", growthOf(s.best_of)]))));
  return parts;
}
function growthOf(best) {
  const steps = [1, 2, 5, 10, 20].filter((k) => k < best.length).concat(best.length ? [best.length] : []);
  return steps.map((k) => `${k}: ${spelled(best[k - 1], "gain", 4)}`).join(", ");
}
function runsOf(w, row, scroll) {
  const metrics = [w.by, w.roles.reward, w.roles.diversity].filter((m, k, all) => m && all.indexOf(m) === k);
  const own = row.runs.some((run) => run.settings);
  const head = ["seed", "state", ...(own ? ["settings"] : []), ...metrics, "seconds", "commit", "command"];
  const lines = row.runs.map((run) => [`${run.seed}`, run.failure ? `failed: ${run.failure}` : run.status, ...(own ? [run.settings] : []),
    ...metrics.map((m) => (m in run.gains ? spelled(run.gains[m], "gain", 3) : "–")), grouped(run.seconds), run.commit ? run.commit.slice(0, 7) : "unknown", h("code", {}, run.command)]);
  return h("section", {}, h("h3", {}, `On ${w.name}${row.label === row.method ? "" : `: ${row.label}`}`),
    h("p", { class: "note" }, "Tuned minus base, by seed."), scroll("runs", simpleTable("Runs: tuned minus base by seed", head, lines)),
    h("details", { class: "numbers" }, h("summary", {}, "Settings"), scroll("settings", simpleTable("Settings", ["setting", "value"], Object.entries(row.settings)))));
}
function files() {
  const text = (id) => document.getElementById(id).textContent;
  put("files", h("button", { type: "button", onclick: () => download("flowbench.json", text("data"), "application/json") }, "Save the data as JSON"),
    h("button", { type: "button", onclick: () => download("flowbench.csv", JSON.parse(text("csv")), "text/csv") }, "Save the tables as CSV"));
}

if (data.overview.length) put("overview-table", overview(data, methods));
if (data.profile) { const node = profileFigure(); put("profile", node); node.refresh(); }
data.workloads.forEach(workload);
pairs();
wall(data, methods);
put("methods-body", ...data.methods.map(methodDetails));
files();
document.documentElement.dataset.ready = "";
