// The viewer of a circuit. Columns are layers, rows are heads (grouped by key/value head) and MLPs.
// Edges stand in the order in which they enter the circuit, so a circuit of n edges is a prefix.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("circuit-data").textContent);
  const root = document.getElementById("viewer");
  const KINDS = ["q", "k", "v", "mlp", "logits"];
  const MOST_SVG = 2000, SVG = "http://www.w3.org/2000/svg";
  const [UP, DOWN, SCORE, ENTRY] = [0, 1, 2, 3];
  const depth = data.layers - data.layer, perGroup = data.heads / data.groups;
  const state = {n: 0, kinds: new Set(KINDS), layer: "", sign: "", find: "", chosen: "", pins: []};

  const make = (name, attributes = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const draw = (name, attributes = {}, text = "") => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    return element;
  };

  // ---- places: units of one head's row and one layer's column --------------------------------
  const rows = data.heads + 2, columns = depth + 2;
  const rowOf = head => head + Math.floor(head / perGroup) * 0.4;
  const mlpRow = rowOf(data.heads - 1) + 1.4, tall = mlpRow + 1.2;
  const middle = mlpRow / 2;
  const owner = name => name.replace(/<.>$/, "");
  const parse = name => {
    if (name === "steer") return {x: 0, y: middle, layer: null};
    if (name === "logits") return {x: columns - 1, y: middle, layer: null};
    const layer = Number(name.match(/\d+/)[0]), x = layer - data.layer + 1;
    if (name[0] === "m") return {x: x + 0.3, y: mlpRow, layer};
    const head = Number(name.match(/h(\d+)/)[1]);
    if (/<[kv]>$/.test(name))
      return {x, y: rowOf(head * perGroup) + (perGroup - 1) / 2, layer};
    return {x, y: rowOf(head), layer};
  };
  const nodePlace = data.nodes.map(parse), inputPlace = data.inputs.map(parse);
  const names = [...data.nodes, "logits"];
  const placeOf = new Map(names.map(name => [name, parse(name)]));
  let width = 900, height = 400;
  const across = x => 40 + x / (columns - 1) * (width - 90);
  const down = y => 24 + y / tall * (height - 40);
  const pathOf = edge => {
    const a = nodePlace[edge[UP]], b = inputPlace[edge[DOWN]];
    const [x0, y0, x1, y1] = [across(a.x) + 6, down(a.y), across(b.x) - 6, down(b.y)];
    const bend = Math.max(14, (x1 - x0) / 2), lift = y0 === y1 && b.x - a.x > 1.4 ? 18 : 0;
    return `M${x0.toFixed(1)} ${y0.toFixed(1)}C${(x0 + bend).toFixed(1)} ${(y0 - lift).toFixed(1)} ` +
      `${(x1 - bend).toFixed(1)} ${(y1 - lift).toFixed(1)} ${x1.toFixed(1)} ${y1.toFixed(1)}`;
  };
  const most = Math.max(...data.edges.map(e => Math.abs(e[SCORE])), 1e-30);
  const widthOf = edge => 0.6 + 4.4 * Math.sqrt(Math.abs(edge[SCORE]) / most);

  // ---- which edges are shown ------------------------------------------------------------------
  const circuit = () => {
    const n = Math.min(state.n, data.edges.length);
    if (n === 0) return [];
    const last = data.edges[n - 1][ENTRY];
    let end = n;
    while (end < data.edges.length && data.edges[end][ENTRY] === last) end++;
    return data.edges.slice(0, end);
  };
  const nameOf = edge => `${data.nodes[edge[UP]]}->${data.inputs[edge[DOWN]]}`;
  const touches = (edge, name) =>
    data.nodes[edge[UP]] === name || belongs(data.inputs[edge[DOWN]], name);
  // a key or value input belongs to every query head of its group
  const belongs = (input, name) => {
    if (!/<[kv]>$/.test(input)) return owner(input) === name;
    const match = name.match(/^a(\d+)\.h(\d+)$/);
    if (!match) return false;
    return input.slice(0, -3) === `a${match[1]}.h${Math.floor(match[2] / perGroup)}`;
  };
  const shown = () => circuit().filter(edge => {
    if (!state.kinds.has(data.kinds[edge[DOWN]])) return false;
    if (state.sign && Math.sign(edge[SCORE]) !== Number(state.sign)) return false;
    if (state.layer !== "") {
      const layer = Number(state.layer);
      if (nodePlace[edge[UP]].layer !== layer && inputPlace[edge[DOWN]].layer !== layer) return false;
    }
    return true;
  });

  // ---- controls -------------------------------------------------------------------------------
  const slider = make("input", {type: "range", min: 0, max: 1000, id: "size", "aria-label": "Edges in the circuit"});
  const sizeText = make("output", {for: "size"});
  const steps = Math.log(data.edges.length + 1);
  const sizeAt = value => Math.max(1, Math.round(Math.exp(value / 1000 * steps) - 1));
  slider.addEventListener("input", () => set({n: sizeAt(Number(slider.value))}));
  const kinds = make("fieldset", {}, make("legend", {}, "inputs"));
  for (const kind of KINDS) {
    const box = make("input", {type: "checkbox", id: `kind-${kind}`, value: kind});
    box.addEventListener("change", () => {
      box.checked ? state.kinds.add(kind) : state.kinds.delete(kind);
      set({});
    });
    kinds.append(make("label", {for: `kind-${kind}`}, box, ` ${kind}`));
  }
  const select = (label, key, options) => {
    const element = make("select", {"aria-label": label});
    for (const [value, text] of options) element.append(make("option", {value}, text));
    element.addEventListener("change", () => set({[key]: element.value}));
    return element;
  };
  const layers = select("Layer", "layer", [["", "all layers"],
    ...Array.from({length: depth}, (_, i) => [String(data.layer + i), `layer ${data.layer + i}`])]);
  const signs = select("Sign", "sign", [["", "both signs"], ["1", "positive"], ["-1", "negative"]]);
  const search = make("input", {type: "search", placeholder: "12.h3, m4, steer", "aria-label": "Find a node"});
  search.addEventListener("input", () => set({find: search.value}));
  search.addEventListener("keydown", event => {
    if (event.key !== "Enter") return;
    const found = matches()[0];
    if (found) { set({chosen: found}); stage.focus(); }
  });
  const button = (text, action) => {
    const element = make("button", {type: "button"}, text);
    element.addEventListener("click", action);
    return element;
  };
  const controls = make("div", {class: "controls"},
    make("label", {for: "size"}, "edges "), slider, sizeText, kinds, layers, signs, search,
    button("Save SVG", () => save("circuit.svg", "image/svg+xml", asSvg())),
    button("Save CSV", () => save("edges.csv", "text/csv", asCsv())));
  const stage = make("div", {class: "stage", tabindex: 0, role: "application",
    "aria-label": "Circuit. Arrow keys choose a node, P pins it, Escape clears, / searches."});
  const panels = make("div", {class: "panels", "aria-live": "polite"});
  const table = make("details", {}, make("summary", {}, "Edges as a table"));
  const note = make("p", {class: "note"});
  root.append(controls, stage, note, panels, table);

  // ---- drawing --------------------------------------------------------------------------------
  const canvas = make("canvas", {"aria-hidden": "true"}), svg = draw("svg", {"aria-hidden": "true"});
  stage.append(canvas, svg);
  const style = getComputedStyle(document.documentElement);
  let hovered = "";
  const dashes = {q: [7, 3], k: [2, 3], v: [], mlp: [], logits: [10, 3, 2, 3]};
  // All edges on the canvas, a few calls for each kind and thickness.
  const paint = edges => {
    const ratio = window.devicePixelRatio || 1, context = canvas.getContext("2d");
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    context.scale(ratio, ratio);
    const groups = new Map();
    for (const edge of edges) {
      const key = `${data.kinds[edge[DOWN]]} ${Math.ceil(widthOf(edge))}`;
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(pathOf(edge));
    }
    for (const [key, paths] of groups) {
      const [kind, thick] = key.split(" ");
      context.strokeStyle = style.getPropertyValue(`--${kind}`);
      context.globalAlpha = 0.55;
      context.lineWidth = Number(thick) - 0.4;
      context.setLineDash(dashes[kind]);
      context.stroke(new Path2D(paths.join("")));
    }
  };
  const line = edge => {
    const path = draw("path", {d: pathOf(edge), "stroke-width": widthOf(edge).toFixed(1),
      class: `edge ${data.kinds[edge[DOWN]]}`});
    path.append(draw("title", {}, `${nameOf(edge)}: ${edge[SCORE]}`));
    return path;
  };
  let lines = [], raised = draw("g");  // [edge, path] of all edges, or those of the focus alone
  // Dims all edges but those of the node that is pointed at or chosen. Nothing else is drawn again.
  const emphasize = () => {
    const focus = hovered || state.chosen;
    if (canvas.hidden) {
      for (const [edge, path] of lines)
        path.classList.toggle("dim", Boolean(focus) && !touches(edge, focus));
      return;
    }
    canvas.style.opacity = focus ? 0.2 : 1;
    raised.replaceChildren(...(focus ? visible.filter(edge => touches(edge, focus)).map(line) : []));
  };
  let visible = [];
  const render = () => {
    visible = shown();
    width = stage.clientWidth;
    height = Math.max(300, Math.min(900, tall * 30));
    stage.style.height = `${height}px`;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren(raised);
    raised.replaceChildren();
    canvas.hidden = visible.length <= MOST_SVG;
    lines = canvas.hidden ? visible.map(edge => [edge, line(edge)]) : [];
    if (canvas.hidden) raised.after(...lines.map(([, path]) => path));
    else paint(visible);
    emphasize();
    drawNodes(visible);
  };
  const matches = () => {
    const text = state.find.trim().toLowerCase();
    if (!text) return [];
    const listed = /^\d/.test(text) ? `a${text}` : text;
    return names.filter(name => name === listed).concat(names.filter(name =>
      name !== listed && name.startsWith(listed)));
  };
  const drawNodes = edges => {
    const used = new Set();
    for (const edge of edges) {
      used.add(data.nodes[edge[UP]]);
      used.add(owner(data.inputs[edge[DOWN]]));
    }
    const found = new Set(matches());
    for (let l = 0; l < depth; l++)
      svg.append(draw("text", {x: across(l + 1), y: 14, "text-anchor": "middle"}, `${data.layer + l}`));
    for (const name of names) {
      const place = placeOf.get(name), x = across(place.x), y = down(place.y);
      const group = draw("g", {class: "node", "data-name": name});
      if (!used.has(name) && !found.has(name)) group.classList.add("off");
      if (name === state.chosen || found.has(name)) group.classList.add("chosen");
      if (state.pins.includes(name)) group.classList.add("pinned");
      const shape = name[0] === "a" ? draw("circle", {cx: x, cy: y, r: 6})
        : draw("rect", {x: x - 7, y: y - 6, width: 14, height: 12});
      group.append(draw("title", {}, name), shape);
      if (name === "steer" || name === "logits")
        group.append(draw("text", {x, y: y + 20, "text-anchor": "middle"}, name));
      svg.append(group);
    }
    for (let h = 0; h < data.heads; h++)
      svg.append(draw("text", {x: 2, y: down(rowOf(h)) + 4, class: "row"}, `h${h}`));
    svg.append(draw("text", {x: 2, y: down(mlpRow) + 4}, "mlp"));
  };

  // ---- tables ---------------------------------------------------------------------------------
  const edgeTable = (edges, title, other) => {
    const total = edges.reduce((sum, edge) => sum + Math.abs(edge[SCORE]), 0) || 1;
    const body = make("tbody");
    for (const edge of edges.slice(0, 200))
      body.append(make("tr", {}, make("th", {scope: "row"}, other(edge)),
        make("td", {}, Math.abs(edge[SCORE]).toPrecision(3)),
        make("td", {}, `${(100 * Math.abs(edge[SCORE]) / total).toFixed(1)} %`),
        make("td", {}, edge[SCORE] < 0 ? "negative" : "positive")));
    const head = make("tr");
    for (const text of [title, "score", "share", "sign"]) head.append(make("th", {scope: "col"}, text));
    return make("table", {}, make("thead", {}, head), body);
  };
  const sorted = edges => [...edges].sort((a, b) => Math.abs(b[SCORE]) - Math.abs(a[SCORE]));
  const panel = name => {
    const edges = shown(), tokens = data.tokens[name];
    const into = sorted(edges.filter(edge => belongs(data.inputs[edge[DOWN]], name)));
    const out = sorted(edges.filter(edge => data.nodes[edge[UP]] === name));
    const box = make("div", {"data-panel": name}, make("h4", {}, name, " ",
      button(state.pins.includes(name) ? "Unpin" : "Pin", () => pin(name))));
    if (tokens) box.append(make("p", {}, `Its value vector promotes: ${tokens.join(" · ")}`));
    box.append(edgeTable(into, `inputs (${into.length})`, edge => nameOf(edge)),
      edgeTable(out, `outputs (${out.length})`, edge => nameOf(edge)));
    return box;
  };
  const pin = name => {
    const pins = state.pins.includes(name) ? state.pins.filter(p => p !== name)
      : [...state.pins.slice(-1), name];
    set({pins});
  };
  const describe = () => {
    const edges = circuit(), seen = shown();
    let text = `${edges.length} of ${data.total}`;
    if (data.curve.length) {
      const near = data.curve.reduce((a, b) =>
        Math.abs(Math.log(b[0] / edges.length)) < Math.abs(Math.log(a[0] / edges.length)) ? b : a);
      text += `; measured faithfulness at ${near[0]} edges: ${near[1].toFixed(2)}`;
    }
    sizeText.textContent = text;
    note.textContent = `${seen.length} edges shown` + (data.left_out
      ? `; the ${data.left_out} weakest edges of the graph are left out of this file.` : ".");
    const listed = [...new Set([...state.pins, state.chosen].filter(Boolean))];
    panels.replaceChildren(...listed.map(panel));
    table.replaceChildren(table.firstChild);
    if (table.open) table.append(edgeTable(sorted(seen), `edges (${seen.length}; the first 200)`, nameOf));
  };
  table.addEventListener("toggle", describe);

  // ---- state ----------------------------------------------------------------------------------
  const hashOf = () => {
    const parts = {n: state.n, kinds: [...state.kinds].join(","), layer: state.layer,
      sign: state.sign, node: state.chosen, pins: state.pins.join(",")};
    return Object.entries(parts).filter(([, value]) => value !== "")
      .map(([key, value]) => `${key}=${encodeURIComponent(value)}`).join("&");
  };
  const set = change => {
    Object.assign(state, change);
    slider.value = Math.log(state.n + 1) / steps * 1000;
    for (const kind of KINDS) document.getElementById(`kind-${kind}`).checked = state.kinds.has(kind);
    layers.value = state.layer;
    signs.value = state.sign;
    try { history.replaceState(null, "", `#circuit:${hashOf()}`); } catch { /* inside a notebook */ }
    render();
    describe();
  };
  const restore = () => {
    const start = {n: Math.max(1, Math.min(data.edges.length, Math.round(data.total / 10)))};
    if (location.hash.startsWith("#circuit:")) {
      const parts = new URLSearchParams(location.hash.slice(9));
      const n = Number(parts.get("n"));
      if (Number.isInteger(n) && n >= 1) start.n = Math.min(n, data.edges.length);
      if (parts.has("kinds")) start.kinds = new Set(parts.get("kinds").split(",").filter(k => KINDS.includes(k)));
      for (const key of ["layer", "sign"]) start[key] = parts.get(key) ?? "";
      if (names.includes(parts.get("node"))) start.chosen = parts.get("node");
      start.pins = (parts.get("pins") ?? "").split(",").filter(p => names.includes(p)).slice(-2);
    }
    return start;
  };

  // ---- pointer and keyboard -------------------------------------------------------------------
  const named = event => event.target.closest?.(".node")?.dataset.name ?? "";
  stage.addEventListener("click", event => {
    const name = named(event);
    if (name && event.shiftKey) pin(name);
    else set({chosen: name});
  });
  stage.addEventListener("pointerover", event => {
    const name = named(event);
    if (name === hovered) return;
    hovered = name;
    emphasize();
  });
  stage.addEventListener("pointerleave", () => { hovered = ""; emphasize(); });
  const step = (dx, dy) => {
    const from = placeOf.get(state.chosen || "steer");
    let best = "", cost = Infinity;
    for (const name of names) {
      const place = placeOf.get(name), x = place.x - from.x, y = place.y - from.y;
      const along = x * dx + y * dy, aside = Math.abs(x * dy) + Math.abs(y * dx);
      if (along > 0.05 && along + 3 * aside < cost) [best, cost] = [name, along + 3 * aside];
    }
    if (best) set({chosen: best});
  };
  const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
  stage.addEventListener("keydown", event => {
    if (ARROWS[event.key]) step(...ARROWS[event.key]);
    else if (event.key === "Escape") set({chosen: "", pins: [], find: ""});
    else if (event.key === "p" && state.chosen) pin(state.chosen);
    else return;
    event.preventDefault();
  });
  root.addEventListener("keydown", event => {
    if (event.key === "/" && event.target !== search) { search.focus(); event.preventDefault(); }
    if (event.key === "Escape" && event.target === search) { search.value = ""; set({find: ""}); stage.focus(); }
  });

  // ---- saving ---------------------------------------------------------------------------------
  const save = (name, type, text) => {
    const link = make("a", {href: URL.createObjectURL(new Blob([text], {type})), download: name});
    link.click();
    URL.revokeObjectURL(link.href);
  };
  const asCsv = () => ["edge,score,entry", ...shown().map(e => `${nameOf(e)},${e[SCORE]},${e[ENTRY]}`)].join("\n") + "\n";
  const asSvg = () => {
    const copy = svg.cloneNode(true);
    copy.setAttribute("xmlns", SVG);
    if (!canvas.hidden) for (const edge of shown())
      copy.prepend(draw("path", {d: pathOf(edge), class: `edge ${data.kinds[edge[DOWN]]}`,
        "stroke-width": widthOf(edge).toFixed(1)}));
    copy.prepend(draw("style", {}, [...document.styleSheets].flatMap(sheet => [...sheet.cssRules])
      .map(rule => rule.cssText).join("\n")));
    return new XMLSerializer().serializeToString(copy);
  };

  new ResizeObserver(() => { if (stage.clientWidth !== width) render(); }).observe(stage);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => render());
  set(restore());
})();
