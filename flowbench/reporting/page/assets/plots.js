// Elements, numbers and the pictures of the page. Foreign text becomes text nodes and nothing else.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const INK = "var(--ink)", MUTED = "var(--muted)", GRID = "var(--grid)", GROUND = "var(--ground)";
// What the page's colours are on paper.
const PAPER = { "--ink": "#1a1a1a", "--muted": "#595959", "--grid": "#dddddd", "--ground": "#ffffff" };
const FULL = 672, TEXT = 12; // 7 inches and 9 points, in pixels of 1/96 inch
const HALO = { stroke: GROUND, "stroke-width": 3, "paint-order": "stroke", "stroke-linejoin": "round" };
const DIRECT = 6; // lines that are named at their end

function build(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}
const h = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

// ---- numbers

const minus = (text) => text.replace("-", "−");
const grouped = (value) => minus((Math.round(value) || 0).toLocaleString("en-US"));

// Decimals for a column: by its size, and so that half an interval is seen; never more than four.
function decimals(values, halves = []) {
  const top = Math.max(...values.map(Math.abs), 0), usual = top >= 100 ? 0 : top >= 10 ? 1 : top >= 1 ? 2 : top >= 0.02 ? 3 : 4;
  const half = halves.filter((h) => h > 0).sort((a, b) => a - b)[Math.floor(halves.length / 2)];
  return half ? Math.min(4, Math.max(usual, Math.ceil(-Math.log10(half)))) : usual;
}
const halfOf = (number) => (number.low === null ? 0 : (number.high - number.low) / 2);
function spelled(value, kind, places) {
  if (kind === "cost") return grouped(value);
  const text = minus(value.toFixed(places)), zero = /^−?0(\.0*)?$/.test(text);
  if (zero) return text.replace("−", "");
  return kind === "gain" && value > 0 ? "+" + text : text;
}
function withInterval(number, kind, places) {
  const text = spelled(number.value, kind, places);
  if (number.low === null) return text;
  return `${text} [${spelled(number.low, kind, places)}, ${spelled(number.high, kind, places)}]`;
}
// "0.081 ± 0.012" where the interval is symmetric, which those of means are; else both ends.
function intervalText(number, kind, places) {
  const [below, above] = [number.value - number.low, number.high - number.value];
  if (Math.abs(below - above) <= 2 * 10 ** -places) return ` ± ${((below + above) / 2).toFixed(places)}`;
  return ` [${spelled(number.low, kind, places)}, ${spelled(number.high, kind, places)}]`;
}
function ticks(low, high, about) {
  const raw = (high - low) / Math.max(about, 1), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((m) => m >= raw * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
  const places = Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (step / power === 2.5 ? 1 : 0));
  return { at: found, places };
}
function extent(values, pad) {
  let low = Math.min(...values), high = Math.max(...values);
  if (!(high > low)) [low, high] = [low - 0.5 * (Math.abs(low) || 1), high + 0.5 * (Math.abs(high) || 1)];
  return [low - pad * (high - low), high + pad * (high - low)];
}

// ---- marks

function polygon(n, r, turn, inner) {
  const points = [], steps = inner ? 2 * n : n;
  for (let k = 0; k < steps; k++) {
    const angle = turn + (2 * Math.PI * k) / steps, radius = inner && k % 2 ? r * inner : r;
    points.push(`${(radius * Math.sin(angle)).toFixed(2)},${(-radius * Math.cos(angle)).toFixed(2)}`);
  }
  return `M${points.join("L")}Z`;
}
function shape(kind, r) {
  const q = r * 0.88, t = r * 0.36;
  const plus = `M${-t},${-r}H${t}V${-t}H${r}V${t}H${t}V${r}H${-t}V${t}H${-r}V${-t}H${-t}Z`;
  return {
    o: `M${-r},0A${r},${r} 0 1 1 ${r},0A${r},${r} 0 1 1 ${-r},0Z`,
    s: `M${-q},${-q}H${q}V${q}H${-q}Z`,
    "^": polygon(3, r * 1.2, 0), v: polygon(3, r * 1.2, Math.PI),
    "<": polygon(3, r * 1.2, -Math.PI / 2), ">": polygon(3, r * 1.2, Math.PI / 2),
    D: polygon(4, r * 1.2, 0), P: plus, X: plus,
    "*": polygon(5, r * 1.4, 0, 0.42), p: polygon(5, r * 1.15, 0), h: polygon(6, r * 1.1, 0),
  }[kind] || polygon(4, r, 0);
}
function dot(method, x, y, r, halo) {
  const turn = method.marker === "X" ? " rotate(45)" : "";
  return s("path", {
    d: shape(method.marker, r), transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})${turn}`, fill: method.color,
    stroke: halo ? GROUND : null, "stroke-width": halo ? 1 : null,
  });
}
function glyph(method) {
  return s("svg", { viewBox: "-8 -8 16 16", width: 14, height: 14, "aria-hidden": "true", class: "glyph" },
    dot(method, 0, 0, 5.5));
}
const dashes = (method) => (method.dashes.length ? method.dashes.map((d) => d * 1.5).join(" ") : null);
const label = (x, y, text, attributes) =>
  s("text", { x: x.toFixed(1), y: y.toFixed(1), fill: INK, ...attributes }, text);

// ---- frames

// A plot's axes. x and y: {domain, title, kind}. right: room for labels at the lines' ends.
function frame(width, height, x, y, right) {
  const ty = ticks(y.domain[0], y.domain[1], height / 48);
  const yText = ty.at.map((v) => spelled(v, y.kind, ty.places));
  const left = 10 + 6.6 * Math.max(...yText.map((t) => t.length), 2);
  const box = { left, right: width - right, top: y.title ? 30 : 12, bottom: height - 42 };
  const tx = ticks(x.domain[0], x.domain[1], (box.right - box.left) / 75);
  const px = (v) => box.left + ((v - x.domain[0]) / (x.domain[1] - x.domain[0])) * (box.right - box.left);
  const py = (v) => box.bottom - ((v - y.domain[0]) / (y.domain[1] - y.domain[0])) * (box.bottom - box.top);
  const root = s("svg", {
    viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "font-size": TEXT,
    "font-family": "system-ui, 'DejaVu Sans', Arial, Helvetica, sans-serif",
  });
  ty.at.forEach((v, k) => root.append(
    s("line", { x1: box.left, x2: box.right, y1: py(v), y2: py(v), stroke: GRID }),
    label(box.left - 6, py(v) + 4, yText[k], { "text-anchor": "end", fill: MUTED })));
  tx.at.forEach((v) => root.append(
    s("line", { x1: px(v), x2: px(v), y1: box.bottom, y2: box.bottom + 4, stroke: MUTED }),
    label(px(v), box.bottom + 17, spelled(v, x.kind, tx.places), { "text-anchor": "middle", fill: MUTED })));
  root.append(
    s("line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, stroke: MUTED }),
    label(2, 14, y.title, { fill: INK }),
    label(box.right, height - 6, x.title, { "text-anchor": "end" }));
  return { root, px, py, box };
}

// The values, moved as little as keeps them a gap apart, within two ends.
function spaced(values, gap, low, high) {
  const order = values.map((_, k) => k).sort((a, b) => values[a] - values[b]);
  const at = values.slice();
  for (let pass = 0; pass < 60; pass++) {
    for (let k = 1; k < order.length; k++) {
      const lack = gap - (at[order[k]] - at[order[k - 1]]);
      if (lack > 0) { at[order[k]] += lack / 2; at[order[k - 1]] -= lack / 2; }
    }
    order.forEach((k) => { at[k] = Math.min(Math.max(at[k], low), high); });
  }
  return at;
}
const shortened = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);

// ---- pictures: functions of a width

// series: [{label, method, points: [{x, y, low, high}]}]
function linesPlot(series, x, y, base) {
  return (width) => {
    const points = series.flatMap((one) => one.points);
    const direct = series.length <= DIRECT && width > 300;
    const longest = Math.max(0, ...series.map((one) => Math.min(one.label.length, 16)));
    const ys = points.flatMap((p) => [p.y, ...(p.low === null || p.low === undefined ? [] : [p.low, p.high])]);
    const f = frame(width, Math.min(Math.max(width * 0.62, 230), 330),
      { ...x, domain: extent([...points.map((p) => p.x), ...x.include], x.pad) },
      { ...y, domain: extent([...ys, ...(base === null ? [] : [base])], 0.06) }, direct ? 14 + 6.6 * longest : 14);
    if (base !== null) f.root.append(s("line", { x1: f.box.left, x2: f.box.right, y1: f.py(base), y2: f.py(base), stroke: MUTED,
      "stroke-dasharray": "2 3" }));
    const ends = spaced(series.map((one) => f.py(one.points.at(-1).y)), 14, f.box.top, f.box.bottom);
    series.forEach((one, k) => f.root.append(line(f, one, direct ? ends[k] : null)));
    if (base !== null) f.root.append(baseLabel(f, series, base));
    return f.root;
  };
}
// The base model's name on its line, at the right where there is room, on the side that lines leave free.
function baseLabel(f, series, base) {
  const y = f.py(base), free = (at) => series.every((one) => one.points.every((p) => f.px(p.x) < f.box.right - 80 || Math.abs(f.py(p.y) - at + 4) > 9));
  const at = [y - 5, y + 13].find((one) => one < f.box.bottom - 1 && free(one)) ?? (y + 13 < f.box.bottom ? y + 13 : y - 5);
  return label(f.box.right - 2, at, "base model", { fill: MUTED, "font-size": 11, "text-anchor": "end", ...HALO });
}
function line(f, one, at) {
  const { method, points } = one, end = points.at(-1), group = s("g", { class: "series", "data-label": one.label });
  group.append(s("title", {}, one.label));
  const banded = points.filter((p) => p.low !== null && p.low !== undefined);
  if (banded.length > 1) {
    const upper = banded.map((p) => `${f.px(p.x).toFixed(1)},${f.py(p.high).toFixed(1)}`);
    const lower = banded.map((p) => `${f.px(p.x).toFixed(1)},${f.py(p.low).toFixed(1)}`).reverse();
    group.append(s("path", { d: `M${[...upper, ...lower].join("L")}Z`, fill: method.color, "fill-opacity": 0.12, class: "band" }));
  }
  const places = points.map((p) => [f.px(p.x).toFixed(1), f.py(p.y).toFixed(1)]);
  const path = places.map(([x, y], k) => (one.steps && k ? `H${x}V${y}` : `${k ? "L" : ""}${x},${y}`)).join("");
  group.append(s("path", { d: `M${path}`, fill: "none", stroke: method.color, "stroke-width": 1.8,
    "stroke-dasharray": dashes(method), "stroke-linejoin": "round" }));
  points.filter((p) => !p.start).forEach((p) => group.append(dot(method, f.px(p.x), f.py(p.y), 3.2, true)));
  if (at !== null) group.append(
    s("line", { x1: f.px(end.x) + 4, y1: f.py(end.y), x2: f.box.right + 7, y2: at, stroke: method.color, "stroke-width": 0.8 }),
    label(f.box.right + 10, at + 4, shortened(one.label, 16)));
  return group;
}

// points: [{label, method, x, y}] with numbers; origin: where arrows begin; front: labels on the Pareto front.
function arrowsPlot(points, x, y, origin, front) {
  return (width) => {
    const spans = (key) => points.flatMap((p) => [p[key].value, p[key].low ?? p[key].value, p[key].high ?? p[key].value]);
    const f = frame(width, Math.min(Math.max(width * 0.7, 250), 360),
      { ...x, domain: extent([...spans("x"), origin[0]], 0.06) }, { ...y, domain: extent([...spans("y"), origin[1]], 0.08) }, 24);
    const [x0, y0] = [f.px(origin[0]), f.py(origin[1])];
    const edge = points.filter((p) => front.includes(p.label)).sort((a, b) => a.x.value - b.x.value);
    if (edge.length > 1) f.root.append(s("path", { fill: "none", stroke: INK, "stroke-dasharray": "4 3", "stroke-opacity": 0.6,
      d: "M" + edge.map((p) => `${f.px(p.x.value).toFixed(1)},${f.py(p.y.value).toFixed(1)}`).join("L") }));
    for (const p of points) f.root.append(arrow(f, p, x0, y0));
    f.root.append(s("circle", { cx: x0, cy: y0, r: 3.5, fill: MUTED }));
    const start = { label: "base model", x: { value: origin[0] }, y: { value: origin[1] }, base: true };
    f.root.append(...placedLabels(f, [start, ...points], (p) => p.base || front.includes(p.label)));
    return f.root;
  };
}
// Names beside their marks where they cover no other; those that must be shown come first.
function placedLabels(f, points, first) {
  const marks = points.map((p) => ({ x: f.px(p.x.value), y: f.py(p.y.value) })), taken = [], made = [];
  const boxes = marks.map((m) => ({ l: m.x - 5, r: m.x + 5, t: m.y - 5, b: m.y + 5 }));
  const meets = (a, b) => a.l < b.r && b.l < a.r && a.t < b.b && b.t < a.b;
  const order = points.map((_, k) => k).sort((a, b) => first(points[b]) - first(points[a]));
  for (const k of order) {
    const text = shortened(points[k].label, 18), w = 6.4 * text.length, { x, y } = marks[k];
    const spots = [[x + 8, y - 5], [x - 8 - w, y - 5], [x + 8, y + 14], [x - 8 - w, y + 14], [x - w / 2, y - 9], [x - w / 2, y + 18]];
    const box = ([l, t]) => ({ l, r: l + w, t: t - 10, b: t + 3 });
    const inside = (b) => b.l > f.box.left && b.r < f.box.right + 20 && b.t > f.box.top - 12 && b.b < f.box.bottom + 2;
    const free = spots.find((at) => inside(box(at)) && [...taken, ...boxes.filter((_, j) => j !== k)].every((one) => !meets(box(at), one)));
    if (!free && !first(points[k])) continue;
    const [l, t] = free ?? spots.find((at) => inside(box(at))) ?? spots[0];
    taken.push(box([l, t]));
    made.push(label(l, t, text, { ...HALO, ...(points[k].base ? { fill: MUTED, "font-size": 11 } : {}) }));
  }
  return made;
}
function arrow(f, p, x0, y0) {
  const [px, py] = [f.px(p.x.value), f.py(p.y.value)], color = p.method.color;
  const group = s("g", { class: "series", "data-label": p.label }, s("title", {}, p.label));
  group.append(s("line", { x1: x0, y1: y0, x2: px, y2: py, stroke: color, "stroke-width": 1.2, "stroke-opacity": 0.45 }));
  const turn = (Math.atan2(py - y0, px - x0) * 180) / Math.PI, length = Math.hypot(px - x0, py - y0);
  if (length > 26) group.append(s("path", { d: "M-4,-3.5L3,0L-4,3.5Z", fill: color, "fill-opacity": 0.6,
    transform: `translate(${(x0 + (px - x0) * 0.6).toFixed(1)} ${(y0 + (py - y0) * 0.6).toFixed(1)}) rotate(${turn.toFixed(1)})` }));
  const bar = (a, b, c, d) => s("line", { x1: a, y1: b, x2: c, y2: d, stroke: color, "stroke-width": 1.2 });
  if (p.x.low !== null) group.append(bar(f.px(p.x.low), py, f.px(p.x.high), py));
  if (p.y.low !== null) group.append(bar(px, f.py(p.y.low), px, f.py(p.y.high)));
  group.append(dot(p.method, px, py, 4.5, true));
  return group;
}

// Named estimates below each other, beside a line at 0.
function estimatesPlot(items, title) {
  return (width) => {
    const left = 12 + 6.7 * Math.max(...items.map((i) => Math.min(i.name.length, 30)));
    const height = 26 * items.length + 48, values = items.flatMap((i) => [i.value, i.low ?? i.value, i.high ?? i.value]);
    const domain = extent([...values, 0], 0.05), px = (v) => left + ((v - domain[0]) / (domain[1] - domain[0])) * (width - left - 16);
    const root = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "font-size": TEXT,
      "font-family": "system-ui, 'DejaVu Sans', Arial, Helvetica, sans-serif" });
    const scale = ticks(domain[0], domain[1], (width - left) / 75), bottom = height - 40;
    scale.at.forEach((v) => root.append(
      s("line", { x1: px(v), x2: px(v), y1: 4, y2: bottom, stroke: Math.abs(v) < 1e-9 ? MUTED : GRID }),
      label(px(v), bottom + 16, minus(v.toFixed(scale.places)), { "text-anchor": "middle", fill: MUTED })));
    root.append(label(width - 16, height - 6, title, { "text-anchor": "end" }));
    items.forEach((item, k) => {
      const y = 18 + 26 * k;
      root.append(label(left - 8, y + 4, shortened(item.name, 30), { "text-anchor": "end" }));
      if (item.low !== null) root.append(s("line", { x1: px(item.low), x2: px(item.high), y1: y, y2: y, stroke: INK, "stroke-width": 2 }));
      root.append(s("circle", { cx: px(item.value), cy: y, r: 4.5, fill: INK }));
    });
    return root;
  };
}

// An interval on a line of its own, in a cell. domain: that of the whole column.
function miniPlot(number, method, domain, shared) {
  const width = 132, height = 22, px = (v) => 6 + ((v - domain[0]) / (domain[1] - domain[0])) * (width - 12);
  const root = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true", class: "mini" });
  root.append(s("line", { x1: px(0), x2: px(0), y1: 1, y2: height - 1, stroke: MUTED, "stroke-dasharray": "2 2" }));
  if (number.low !== null) root.append(s("line", { x1: px(number.low), x2: px(number.high), y1: 11, y2: 11,
    stroke: method.color, "stroke-width": shared ? 3 : 1.6 }));
  root.append(dot(method, px(number.value), 11, 4.6, true));
  return root;
}

// ---- figures: a picture with its caption, the table behind it, and a file for papers

let figures = 0;
// spec(): {title, caption, alt, draw, head, rows, file}, computed anew at every refresh; null hides the figure.
function figure(spec, level = "h4") {
  const id = `figure-${++figures}`, picture = h("div", { class: "picture" }), title = h(level, { id, class: "title" }), caption = h("p", { class: "caption" });
  const numbers = h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "the numbers of this figure" });
  const details = h("details", { class: "numbers", ontoggle: () => fill() }, h("summary", {}, "Numbers"), numbers);
  const save = h("button", { type: "button", class: "quiet", onclick: () => download(`${current.file}.svg`, asFile(), "image/svg+xml") }, "Save as SVG");
  const node = h("figure", { "aria-labelledby": id }, title, picture, caption, h("div", { class: "tools" }, details, save));
  let current = null, drawn = 0;
  function described(picture) {
    const title = `${id}-title`, text = `${id}-text`;
    picture.prepend(s("title", { id: title }, current.title), s("desc", { id: text }, current.alt));
    picture.setAttribute("aria-labelledby", `${title} ${text}`);
    return picture;
  }
  function fill() {
    if (details.open && current) numbers.replaceChildren(simpleTable(current.title, current.head, current.rows()));
  }
  function asFile() {
    const paper = described(current.draw(FULL));
    paper.setAttribute("xmlns", SVG);
    const text = new XMLSerializer().serializeToString(paper);
    return text.replace(/var\((--\w+)\)/g, (_, name) => PAPER[name]);
  }
  function draw() {
    const width = Math.floor(picture.clientWidth);
    if (current && width > 0) { drawn = width; picture.replaceChildren(described(current.draw(width))); }
  }
  node.refresh = () => {
    current = spec();
    node.hidden = current === null;
    if (current === null) return;
    title.textContent = current.title;
    caption.textContent = current.caption;
    draw();
    fill();
  };
  node.highlight = (name) => picture.querySelectorAll(".series").forEach((one) =>
    one.classList.toggle("faint", name !== null && one.dataset.label !== name));
  new ResizeObserver(() => { if (Math.abs(picture.clientWidth - drawn) > 1) draw(); }).observe(picture);
  return node;
}
function simpleTable(caption, head, rows) {
  return h("table", {}, h("caption", { class: "unseen" }, caption),
    h("thead", {}, h("tr", {}, head.map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((text, k) => (k ? h("td", {}, text) : h("th", { scope: "row" }, text)))))));
}
function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
