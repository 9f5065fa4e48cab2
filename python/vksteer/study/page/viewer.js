// The viewer: its controls, its state (which stands in the address), pointer and keyboard.
const root = document.getElementById("viewer");
const depth = data.layers - data.layer;
const blank = () => ({a: 0, b: -1, n: Math.max(1, Math.min(circuits[0].edges.length,
  Math.round(data.total / 10))), kinds: new Set(KINDS), layer: "", sign: "", where: "", find: "",
  chosen: "", pins: []});
const state = blank();

// ---- controls ---------------------------------------------------------------------------------
const longest = Math.max(...circuits.map(circuit => circuit.edges.length));
const steps = Math.log(longest + 1);
const sizeAt = value => Math.max(1, Math.round(Math.exp(value / 1000 * steps) - 1));
const slider = make("input", {type: "range", min: 0, max: 1000, id: "size"});
const exactly = make("input", {type: "number", min: 1, max: longest, id: "exactly",
  "aria-label": "Number of edges"});
const sizeText = make("output", {for: "size exactly"});
slider.addEventListener("input", () => soon({n: sizeAt(Number(slider.value))}));
exactly.addEventListener("change", () => {
  const n = Number(exactly.value);
  set({n: Number.isInteger(n) ? Math.min(longest, Math.max(1, n)) : state.n});
});
const swatch = name => {
  const mark = draw("svg", {viewBox: "0 0 26 8", class: "swatch", "aria-hidden": "true"});
  mark.append(draw("path", {class: `edge ${name}`, d: "M0 4H26", "stroke-width": 2}));
  return mark;
};
const kinds = make("fieldset", {}, make("legend", {}, "edges into"));
for (const kind of KINDS) {
  const box = make("input", {type: "checkbox", id: `kind-${kind}`, value: kind});
  box.addEventListener("change", () => {
    box.checked ? state.kinds.add(kind) : state.kinds.delete(kind);
    set({});
  });
  kinds.append(make("label", {for: `kind-${kind}`}, box, ` ${kind} `, swatch(kind)));
}
const select = (label, key, options, change) => {
  const element = make("select", {id: `choose-${key}`});
  for (const [value, text] of options) element.append(make("option", {value}, text));
  element.addEventListener("change", () => set(change ? change(element.value) : {[key]: element.value}));
  return [element, make("label", {}, `${label} `, element)];
};
const listed = circuits.map(({label}, i) => [String(i), label]);
const [first, firstLabel] = select("circuit", "a", listed, value =>
  ({a: Number(value), b: Number(value) === state.b ? -1 : state.b}));
const [second, secondLabel] = select("compare with", "b", [["-1", "none"], ...listed], value =>
  ({b: Number(value) === state.a ? -1 : Number(value), where: ""}));
const [where, whereLabel] = select("show", "where", [["", "all edges"],
  ...Object.entries(WHERE).map(([key, text]) => [key, text])]);
const [layers, layersLabel] = select("layer", "layer", [["", "all"],
  ...Array.from({length: depth}, (_, i) => [String(data.layer + i), String(data.layer + i)])]);
const [signs, signsLabel] = select("sign", "sign", [["", "both"], ["1", "positive"], ["-1", "negative"]]);
const search = make("input", {type: "search", id: "find", placeholder: "12.h3, m4, steer"});
search.addEventListener("input", () => set({find: search.value}));
search.addEventListener("keydown", event => {
  if (event.key !== "Enter") return;
  const found = matches()[0];
  if (found) { set({chosen: found}); stage.focus(); }
});
const code = make("pre", {hidden: "", tabindex: 0, "aria-label": "This view as Python"});
const copyPython = async () => {
  code.textContent = asPython(state);
  code.hidden = false;
  try {
    await navigator.clipboard.writeText(code.textContent);
    status.textContent = "Copied.";
  } catch {  // a page in a frame may not write to the clipboard
    getSelection().selectAllChildren(code);
    status.textContent = "Selected: copy it with the keyboard.";
  }
};
const status = make("span", {role: "status", class: "note"});
const sharing = make("p", {class: "sharing", id: "sharing"});
const controls = make("div", {class: "controls"},
  ...(circuits.length > 1 ? [firstLabel, secondLabel, whereLabel] : []),
  make("span", {class: "size"}, make("label", {for: "size"}, "edges "), slider, exactly, sizeText),
  kinds, layersLabel, signsLabel, make("label", {for: "find"}, "find ", search),
  make("span", {class: "save"},
    button("SVG", () => saveSvg("circuit.svg", drawing.whole()), {"aria-label": "Save the circuit as SVG"}),
    button("PNG", () => savePng("circuit.png", drawing.whole()), {"aria-label": "Save the circuit as PNG"}),
    button("CSV", () => save("edges.csv", asCsv(visible, state.b >= 0), "text/csv"),
      {"aria-label": "Save the edges as CSV"}),
    button("Copy as Python", copyPython)));
const stage = make("div", {class: "stage", tabindex: 0, role: "application", "aria-label":
  "Circuit. Arrow keys choose a node, P pins it, Escape clears, slash searches."});
const scroller = make("div", {class: "scroll stage-scroll"}, stage);
const panels = make("div", {class: "panels"});
const table = make("details", {class: "edges"}, make("summary", {}, "Edges as a table"));
const note = make("p", {class: "note"});
root.append(controls, sharing, scroller, note, status, code, panels, table);
const drawing = drawingOf(stage, scroller);

// ---- what is shown ----------------------------------------------------------------------------
let all = [], visible = [];
const matches = () => {
  const text = state.find.trim().toLowerCase();
  if (!text) return [];
  const sought = /^\d/.test(text) ? `a${text}` : text;
  return nodeNames.filter(name => name === sought).concat(nodeNames.filter(name =>
    name !== sought && name.startsWith(sought)));
};
const chooser = row => button(nameOf(row.edge), () => choose(data.nodes[row.edge.up]), {class: "link"});
const choose = name => set({chosen: name});
const pin = name => set({pins: state.pins.includes(name) ? state.pins.filter(p => p !== name)
  : [...state.pins.slice(-1), name]});

const describe = () => {
  const a = circuits[state.a], compared = state.b >= 0, total = data.total;
  const n = sizeOf(a, state.n);
  sizeText.textContent = `${n} of ${total} (${(100 * n / total).toPrecision(2)} %); ${measured(a, n)}`;
  sharing.hidden = !compared;
  whereLabel.hidden = !compared;
  if (compared) {
    const found = difference(state, all), label = circuits[state.b].label;
    sharing.replaceChildren(swatch("a"), `only ${a.label}: ${found.a}; `, swatch("b"),
      `only ${label}: ${found.b}; `, swatch("both"), `both: ${found.both}; intersection over union ` +
      `${found.iou.toFixed(2)}; p = ${probability(found.log)}, the probability that two random sets ` +
      "of these sizes share at least as many edges.");
  }
  const left = circuits.filter((c, i) => (i === state.a || i === state.b) && c.left_out);
  note.textContent = `${visible.length} edges shown` + (left.length ? "; " + left.map(c =>
    `the ${c.left_out} weakest edges of ${c.label} are left out of this file`).join("; ") : "") + ".";
  const shown = [...new Set([...state.pins, state.chosen].filter(Boolean))];
  const acts = {pin, choose};
  const listed = table.children.length > 1 && table.lastElementChild.contains(document.activeElement);
  const held = listed || panels.contains(document.activeElement);
  panels.replaceChildren(...shown.map(name => panelOf(name, visible, state, acts)));
  if (state.pins.length === 2) panels.append(pairOf(state.pins, visible));
  table.replaceChildren(table.firstChild);
  if (table.open) table.append(edgeTable(visible, `edges (${visible.length})`, "edges", compared, chooser));
  // The button that was pressed is gone: the keyboard goes on at the node that it chose.
  if (held) (panels.querySelector(`[data-panel="${CSS.escape(state.chosen)}"] button`) ?? stage).focus();
};
const addressed = () => {
  const parts = {circuit: circuits[state.a].name, with: circuits[state.b]?.name ?? "", n: state.n,
    kinds: [...state.kinds].join(","), layer: state.layer, sign: state.sign, where: state.where,
    find: state.find, node: state.chosen, pins: state.pins.join(",")};
  const text = Object.entries(parts).filter(([key, value]) => value !== "" || key === "kinds")
    .map(([key, value]) => `${key}=${encodeURIComponent(value)}`).join("&");
  try { history.replaceState(null, "", `#circuit:${text}`); } catch { /* inside a notebook */ }
};
let acted = false; // the address is written once the reader has acted
const set = (change, moving = false) => {
  Object.assign(state, change);
  first.value = state.a;
  second.value = state.b;
  slider.value = Math.log(state.n + 1) / steps * 1000;
  exactly.value = state.n;
  for (const kind of KINDS) document.getElementById(`kind-${kind}`).checked = state.kinds.has(kind);
  layers.value = state.layer;
  signs.value = state.sign;
  where.value = state.where;
  if (search.value !== state.find) search.value = state.find;
  all = members(state);
  visible = all.filter(row => passes(state, row));
  drawing.show(state, visible, new Set(matches()), moving);
  describe();
  if (acted && Object.keys(change).length) addressed();
  const name = state.chosen;
  if (name && "chosen" in change) {
    const ends = visible.filter(row => touches(row.edge, name));
    const into = ends.filter(row => entersInto(row.edge, name)).length;
    status.textContent = `${name}: inputs ${into}, outputs ${ends.length - into}.`;
  }
};
// Drawn once for each frame, however often the slider reports.
let waiting = null;
const soon = change => {
  if (!waiting) requestAnimationFrame(() => { const next = waiting; waiting = null; set(next, true); });
  waiting = {...waiting, ...change};
};
const restore = () => {
  const start = blank();
  if (!location.hash.startsWith("#circuit:")) return start;
  const parts = new URLSearchParams(location.hash.slice(9));
  const numbered = name => circuits.findIndex(circuit => circuit.name === parts.get(name));
  start.a = Math.max(0, numbered("circuit"));
  start.b = numbered("with") === start.a ? -1 : numbered("with");
  const n = Number(parts.get("n"));
  if (Number.isInteger(n) && n >= 1) start.n = Math.min(n, longest);
  if (parts.has("kinds")) start.kinds = new Set(parts.get("kinds").split(",").filter(k => KINDS.includes(k)));
  const known = (key, element) => [...element.options].some(option => option.value === parts.get(key));
  if (known("layer", layers)) start.layer = parts.get("layer");
  if (known("sign", signs)) start.sign = parts.get("sign");
  if (known("where", where)) start.where = parts.get("where");
  start.find = parts.get("find") ?? "";
  if (nodeNames.includes(parts.get("node"))) start.chosen = parts.get("node");
  start.pins = (parts.get("pins") ?? "").split(",").filter(p => nodeNames.includes(p)).slice(-2);
  return start;
};

// ---- pointer and keyboard ---------------------------------------------------------------------
const named = event => event.target.closest?.(".node")?.dataset.name ?? "";
stage.addEventListener("click", event => {
  const name = named(event);
  if (name && event.shiftKey) pin(name);
  else set({chosen: name});
});
stage.addEventListener("pointerover", event => drawing.hover(named(event)));
stage.addEventListener("pointerleave", () => drawing.hover(""));
const step = (dx, dy) => {
  const from = drawing.places.get(state.chosen || "steer");
  let best = "", cost = Infinity;
  for (const [name, place] of drawing.places) {
    const x = place.x - from.x, y = place.y - from.y;
    const along = x * dx + y * dy, aside = Math.abs(x * dy) + Math.abs(y * dx);
    if (along > 0.05 && along + 3 * aside < cost) [best, cost] = [name, along + 3 * aside];
  }
  if (best) set({chosen: best});
};
const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
stage.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (ARROWS[event.key]) step(...ARROWS[event.key]);
  else if (event.key === "Escape") set({chosen: "", pins: [], find: ""});
  else if (event.key.toLowerCase() === "p" && state.chosen) pin(state.chosen);
  else return;
  event.preventDefault();
});
root.addEventListener("keydown", event => {
  const typing = event.target.matches("input[type=search], input[type=number]");
  if (event.key === "/" && !typing) { search.focus(); event.preventDefault(); }
  if (event.key === "Escape" && event.target === search) { set({find: ""}); stage.focus(); }
});
table.addEventListener("toggle", describe);

// ---- sizes and colours ------------------------------------------------------------------------
new ResizeObserver(() => {
  if (!drawing.resized()) return;
  drawing.layOut();
  set({});
}).observe(scroller);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => set({}));
drawing.layOut();
set(restore());
acted = true;
// Other addresses are those of the page's sections.
addEventListener("hashchange", () => { if (location.hash.startsWith("#circuit:")) set(restore()); });
