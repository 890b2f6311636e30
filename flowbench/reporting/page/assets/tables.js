// The overview, a workload's sortable table, and the matrix of pairs.
"use strict";

const byName = (data) => Object.fromEntries(data.methods.map((method) => [method.name, method]));
const ranks = (row) => (row.rank === null ? "–" : row.rank[0] === row.rank[1] ? `${row.rank[0]}` : `${row.rank[0]}–${row.rank[1]}`);
const named = (method, text) => h("span", { class: "named" }, glyph(method), h("span", { title: text }, text));

// An estimate and its interval as one thing that no line breaks.
function numberCell(number, kind, places) {
  if (!number) return h("span", { class: "none" }, "–");
  const interval = number.low === null ? null
    : h("span", { class: "interval" }, intervalText(number, kind, places));
  return h("span", { class: "number" }, h("b", {}, (kind === "share" ? "×" : "") + spelled(number.value, kind, places)), interval);
}
function placesOf(rows, key) {
  const found = rows.map((row) => row.values[key]).filter(Boolean);
  return decimals(found.map((n) => n.value), found.map(halfOf));
}

// ---- overview

function overview(data, methods) {
  const scales = data.workloads.map((w) => {
    const found = w.rows.map((row) => w.by && row.values[w.by]).filter(Boolean);
    const ends = found.flatMap((n) => [n.value, n.low ?? n.value, n.high ?? n.value, 0]);
    return { domain: ends.length ? extent(ends, 0.04) : [-1, 1], places: decimals(found.map((n) => n.value)) };
  });
  const profiled = data.profile !== null;
  const head = h("tr", {}, h("th", { scope: "col", class: "sticky" }, "Method"), profiled ? h("th", { scope: "col", class: "right" }, "Profile") : null,
    data.workloads.map((w) => h("th", { scope: "col" }, h("a", { href: `#${w.id}` }, w.name),
      h("span", { class: "sub" }, w.by ? `gain in ${w.by}` : "no score"))));
  const lines = data.overview.map((one) => h("tr", {},
    h("th", { scope: "row", class: "sticky" }, named(methods[one.method], one.label)),
    profiled ? h("td", { class: "right" }, one.area === null ? "–" : one.area.toFixed(2)) : null,
    data.workloads.map((w, k) => overviewCell(w, w.rows.find((row) => row.label === one.label), methods[one.method], scales[k]))));
  return h("table", { class: data.workloads.length > 3 ? "overview many" : "overview" },
    h("caption", { class: "unseen" }, "Gain over the base model of every method on every workload, with ranks"),
    h("thead", {}, head), h("tbody", {}, lines));
}
function overviewCell(w, row, method, scale) {
  if (!row) return h("td", { class: "none" }, "not run");
  const number = w.by ? row.values[w.by] : null;
  if (!number) return h("td", { class: "none" }, row.seeds ? "not finite" : `failed (${row.failed} of ${row.failed})`);
  return h("td", { class: row.shares_first ? "first" : "" }, h("span", { class: "cell" }, miniPlot(number, method, scale.domain, row.shares_first),
    h("b", {}, spelled(number.value, "gain", scale.places)),
    h("span", { class: "rank", title: "best and worst rank that all pairs admit" },
      row.rank === null ? "no interval" : w.rows.length > 1 ? `rank ${ranks(row)}` : "")));
}

// ---- a workload's table

// state: {families: Set of hidden families, text}; changed: told after every change of what is shown.
function resultsTable(w, methods, state, changed) {
  const fixed = [
    { key: "rank", heading: "rank", meaning: "best and worst that all pairs admit, after Holm's correction", kind: "rank", lower: true },
    { key: "label", heading: "method", meaning: "its name and what tells it from other rows", kind: "text", lower: true },
    { key: "seeds", heading: "seeds", meaning: "finished runs", kind: "cost" },
  ];
  const some = w.rows.some((row) => row.failed);
  if (some) fixed.push({ key: "failed", heading: "failed", meaning: "share of runs without a result", kind: "failed", lower: true });
  const studies = w.ruleset === "tuned" && w.by;
  if (studies) fixed.push({ key: "studies", heading: "studies", meaning: `${w.by} of each study; the median is the score`, kind: "gain" });
  const columns = [...fixed, ...w.columns], chosen = new Set([...fixed, ...w.columns.filter((c) => c.usual)].map((c) => c.key));
  let order = { key: "rank", down: false };
  const table = h("table", { class: "results" }), places = Object.fromEntries(w.columns.map((c) => [c.key, placesOf(w.rows, c.key)]));
  const shown = (row) => !state.families.has(methods[row.method].family) && (!state.unfinished || row.seeds > 0)
    && row.label.toLowerCase().includes(state.text.toLowerCase());
  const rankOf = new Map(w.rows.map((row, k) => [row, k]));

  function sortable(row, column) {
    if (column.key === "rank") return row.rank ? rankOf.get(row) : null;
    if (column.key === "label") return row.label.toLowerCase();
    if (column.key === "seeds") return row.seeds;
    if (column.key === "studies") return row.values[w.by]?.value ?? null;
    if (column.key === "failed") return row.failed / (row.failed + row.seeds);
    if (column.key.startsWith("to:")) {
      const found = row.reached[column.key.slice(3)];
      return found ? found.median ?? Infinity : null;
    }
    return row.values[column.key]?.value ?? null;
  }
  function cell(row, column) {
    if (column.key === "rank") return ranks(row);
    if (column.key === "seeds") return `${row.seeds}`;
    if (column.key === "studies") return row.runs.map((run) => (w.by in run.gains ? spelled(run.gains[w.by], "gain", 3) : "failed")).join(", ");
    if (column.key === "failed") return row.failed ? `${row.failed} of ${row.failed + row.seeds}` : "0";
    if (column.key.startsWith("to:")) return reachedCell(row.reached[column.key.slice(3)]);
    if (row.broken[column.key]) return h("span", { class: "none" }, `not finite in ${row.broken[column.key]}`);
    return numberCell(row.values[column.key], column.kind, places[column.key]);
  }
  function sort(column) {
    order = order.key === column.key ? { key: column.key, down: !order.down } : { key: column.key, down: !column.lower };
    draw();
    table.querySelector(`th[aria-sort] button`)?.focus();
  }
  function heading(column) {
    const sorted = order.key === column.key ? (order.down ? "descending" : "ascending") : null;
    return h("th", { scope: "col", "aria-sort": sorted, class: column.key === "label" ? "sticky" : "right" },
      h("button", { type: "button", title: column.meaning, onclick: () => sort(column) },
        column.heading, column.trained ? h("abbr", { title: "the reward trained on" }, "*") : null,
        h("span", { class: "arrow", "aria-hidden": "true" }, sorted === null ? "" : order.down ? "▼" : "▲")));
  }
  function draw() {
    const taken = columns.filter((c) => chosen.has(c.key)), by = columns.find((c) => c.key === order.key);
    const lines = w.rows.filter(shown).map((row) => ({ row, value: sortable(row, by) }));
    lines.sort((a, b) => {
      if (a.value === null || b.value === null) return (a.value === null) - (b.value === null);
      const least = a.value < b.value ? -1 : a.value > b.value ? 1 : 0;
      return (order.down ? -least : least) || rankOf.get(a.row) - rankOf.get(b.row);
    });
    table.replaceChildren(
      h("caption", { class: "unseen" }, `${w.title}: ${lines.length} of ${w.rows.length} rows`),
      h("thead", {}, h("tr", {}, taken.map(heading))),
      h("tbody", {}, lines.map(({ row }) => h("tr", { class: row.shares_first ? "first" : "" },
        taken.map((column) => (column.key === "label"
          ? h("th", { scope: "row", class: "sticky" }, named(methods[row.method], row.label))
          : h("td", { class: "right" }, cell(row, column))))))));
  }
  const chooser = h("details", { class: "chooser" }, h("summary", {}, "Columns"), h("div", { class: "menu" },
    columns.filter((c) => c.key !== "label").map((c) => h("label", { title: c.meaning },
      h("input", { type: "checkbox", checked: chosen.has(c.key), onchange: (event) => {
        if (event.target.checked) chosen.add(c.key); else chosen.delete(c.key);
        draw();
      } }), ` ${c.heading}`))));
  const filters = filterBar(w, methods, state, () => { draw(); changed(); }, chooser);
  draw();
  return { filters, table: h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": `results on ${w.name}` }, table), shown };
}
function reachedCell(found) {
  if (!found) return h("span", { class: "none" }, "–");
  const median = found.median === null ? "never" : grouped(found.median);
  return h("span", { class: "number" }, h("b", {}, median), h("span", { class: "interval" }, ` (${found.arrived} of ${found.runs})`));
}
function filterBar(w, methods, state, changed, chooser) {
  const families = [...new Set(w.rows.map((row) => methods[row.method].family))].sort();
  const color = (family) => w.rows.map((row) => methods[row.method]).find((m) => m.family === family).color;
  const toggle = (family) => (event) => {
    if (state.families.has(family)) state.families.delete(family); else state.families.add(family);
    event.currentTarget.setAttribute("aria-pressed", String(!state.families.has(family)));
    changed();
  };
  const swatch = (family) => s("svg", { viewBox: "0 0 10 10", width: 10, height: 10, "aria-hidden": "true" },
    s("rect", { width: 10, height: 10, rx: 2, fill: color(family) }));
  return h("div", { class: "filters" },
    h("label", { class: "search" }, h("span", { class: "unseen" }, `Filter methods of ${w.name}`),
      h("input", { type: "search", placeholder: "Filter methods", oninput: (e) => { state.text = e.target.value; changed(); } })),
    families.length > 1 ? h("div", { class: "chips", role: "group", "aria-label": "families" }, families.map((family) =>
      h("button", { type: "button", class: "chip", "aria-pressed": "true", onclick: toggle(family) }, swatch(family), family))) : null,
    w.rows.some((row) => !row.seeds) ? h("label", {}, h("input", { type: "checkbox", onchange: (e) => {
      state.unfinished = e.target.checked; changed(); } }), " hide what never finished") : null,
    chooser);
}

// ---- pairs

const BETTER = [1, 102, 94], WORSE = [140, 81, 10]; // teal and brown, which are no family's

function pairsMatrix(w, methods) {
  const labels = w.rows.filter((row) => row.seeds > 0).map((row) => row.label), found = new Map();
  for (const pair of w.pairs) {
    found.set(`${labels.indexOf(pair.one)} ${labels.indexOf(pair.other)}`, pair);
    found.set(`${labels.indexOf(pair.other)} ${labels.indexOf(pair.one)}`, turned(pair));
  }
  const places = decimals(w.pairs.filter((p) => p.difference).map((p) => p.difference.value));
  const said = h("p", { class: "said", role: "status" }, "Point at a cell, or move with the arrow keys, for the difference and its interval.");
  const cells = labels.map((_, i) => labels.map((__, j) => pairCell(found.get(`${i} ${j}`), () => tell(i, j))));
  function tell(i, j) {
    const pair = found.get(`${i} ${j}`);
    said.textContent = pair ? sentence(pair, w, places) : labels[i];
    cells.flat().forEach((cell) => cell.setAttribute("tabindex", cell === cells[i][j] ? "0" : "-1"));
  }
  const moves = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
  const body = h("tbody", { onkeydown: (event) => {
    const move = moves[event.key], at = cells.flat().indexOf(document.activeElement), n = labels.length;
    if (!move || at < 0) return;
    event.preventDefault();
    cells[(Math.floor(at / n) + move[0] + n) % n][((at % n) + move[1] + n) % n].focus();
  } }, labels.map((label, i) => h("tr", {}, h("th", { scope: "row", class: "sticky" }, named(methods[rowOf(w, label).method], label)), cells[i])));
  if (cells.length) cells[0][0].setAttribute("tabindex", "0");
  const head = h("thead", {}, h("tr", {}, h("td", { class: "sticky" }), labels.map((text) => h("th", { scope: "col" }, h("span", { class: "upright" }, text)))));
  const table = h("table", { class: "pairs" }, h("caption", { class: "unseen" }, `Probability that the row's method is above the column's, ${w.name}`), head, body);
  return h("div", {}, h("div", { class: "scroll" }, table), said);
}
const rowOf = (w, label) => w.rows.find((row) => row.label === label);
function turned(pair) {
  const flip = (n, at) => (n === null ? null : { value: at - n.value, low: n.low === null ? null : at - n.high, high: n.low === null ? null : at - n.low });
  return { one: pair.other, other: pair.one, difference: flip(pair.difference, 0), improvement: flip(pair.improvement, 1), p: pair.p };
}
function pairCell(pair, told) {
  const p = pair?.improvement, cell = h("td", { tabindex: "-1", onfocus: told, onmouseenter: told }, p ? `${Math.round(100 * p.value)}` : "");
  if (p) {
    const [r, g, b] = p.value >= 0.5 ? BETTER : WORSE, strength = Math.min(1, 4 * Math.abs(p.value - 0.5)) * 0.45;
    cell.style.backgroundColor = `rgb(${r} ${g} ${b} / ${strength.toFixed(2)})`;
    if (pair.p <= 0.05) cell.className = "sure";
    cell.setAttribute("aria-label", `${pair.one} above ${pair.other}: ${Math.round(100 * p.value)} %${pair.p <= 0.05 ? ", separable" : ""}`);
  }
  return cell;
}
function sentence(pair, w, places) {
  if (!pair.difference) return `${pair.one} and ${pair.other} have no finished seed in common.`;
  const percent = (v) => (100 * v).toFixed(0), better = pair.improvement, p = pair.p >= 0.001 ? `= ${pair.p.toFixed(3)}` : "< 0.001";
  const range = better.low === null ? "" : ` [${percent(better.low)}, ${percent(better.high)}]`;
  return `${pair.one} minus ${pair.other} in ${w.by}: ${withInterval(pair.difference, "gain", places)}, p ${p} after Holm's correction. `
    + `${pair.one} is above in ${percent(better.value)} %${range} of prompts and seeds, a tie counting one half.`;
}
