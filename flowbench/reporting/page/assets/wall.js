// The wall of samples: chosen methods beside the base model, the same prompt and noise in a row.
"use strict";

const ROWS = 6, MOST = 4;

function wall(data, methods) {
  if (!data.walls.length) return;
  const place = document.getElementById("wall"), name = (w) => data.workloads.find((one) => one.id === w.workload).name;
  const show = (k) => place.replaceChildren(wallOf(data.walls[k], methods, name(data.walls[k])));
  if (data.walls.length > 1) place.before(choice("Workload", data.walls.map((w, k) => [k, name(w)]), show));
  show(0);
}
function wallOf(one, methods, title) {
  const others = one.strips.filter((strip) => strip.method !== null), base = one.strips.filter((strip) => strip.method === null);
  const chosen = new Set(others.slice(0, 3).map((strip) => strip.label));
  const categories = [...new Set(one.tiles.map((tile) => tile.category))].sort();
  let category = null, from = 0;
  const grid = h("div", { class: "scroll" }), where = h("span", { role: "status" });
  const shown = () => one.tiles.map((tile, k) => ({ tile, k })).filter(({ tile }) => category === null || tile.category === category);
  function draw() {
    const all = shown(), part = all.slice(from, from + ROWS), strips = [...base, ...others.filter((strip) => chosen.has(strip.label))];
    where.textContent = `${from + 1} to ${from + part.length} of ${all.length} prompts`;
    grid.replaceChildren(h("table", { class: "wall" }, h("caption", { class: "unseen" }, `Samples on ${title}, seed ${one.seed}`),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "prompt"), strips.map((strip) => h("th", { scope: "col" },
        strip.method === null ? "base model" : named(methods[strip.method], strip.label))))),
      h("tbody", {}, part.map(({ tile, k }) => h("tr", {}, h("th", { scope: "row" }, h("span", { class: "prompt", title: tile.prompt }, tile.prompt)),
        strips.map((strip) => h("td", {}, picture(one, strip, k, tile))))))));
  }
  function step(by) {
    const last = Math.floor((shown().length - 1) / ROWS) * ROWS;
    from = Math.min(Math.max(from + by * ROWS, 0), last);
    draw();
  }
  const boxes = others.map((strip) => h("label", {}, h("input", { type: "checkbox", checked: chosen.has(strip.label), onchange: (event) => {
    if (event.target.checked && chosen.size >= MOST) { event.target.checked = false; return; }
    if (event.target.checked) chosen.add(strip.label); else chosen.delete(strip.label);
    draw();
  } }), " ", named(methods[strip.method], strip.label)));
  const node = h("div", { class: "wallbox", tabindex: "0", role: "region", "aria-label": "samples; arrow keys turn the pages", onkeydown: (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by || event.target.matches("select, input")) return;
    event.preventDefault();
    step(by);
  } }, h("div", { class: "filters" },
    categories.length > 1 ? choice("Category", [["", "all"], ...categories.map((c) => [c, c])], (value) => { category = value || null; from = 0; draw(); }) : null,
    h("button", { type: "button", onclick: () => step(-1) }, "← Previous"), h("button", { type: "button", onclick: () => step(1) }, "Next →"), where),
  h("fieldset", { class: "boxes" }, h("legend", {}, `Up to ${MOST} methods`), boxes), grid);
  draw();
  return node;
}
function picture(one, strip, k, tile) {
  const lines = Math.ceil(one.tiles.length / one.across), x = k % one.across, y = Math.floor(k / one.across);
  const passed = strip.passed[k], said = passed === true ? ", as asked" : passed === false ? ", not as asked" : "";
  const image = h("span", { class: one.size[0] <= 64 ? "tile coarse" : "tile", role: "img", "aria-label": `${strip.method === null ? "base model" : strip.label}: ${tile.prompt}${said}` });
  image.style.backgroundImage = `url("${strip.image}")`;
  image.style.backgroundSize = `${100 * one.across}% ${100 * lines}%`;
  image.style.backgroundPosition = `${one.across > 1 ? (100 * x) / (one.across - 1) : 0}% ${lines > 1 ? (100 * y) / (lines - 1) : 0}%`;
  image.style.aspectRatio = `${one.size[0]} / ${one.size[1]}`;
  const mark = passed === true ? "✓" : passed === false ? "✗" : null;
  return mark ? [image, h("span", { class: "verdict", "aria-hidden": "true" }, mark)] : image;
}
