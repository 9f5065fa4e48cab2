// The drawing: columns are layers, rows are heads (grouped by key/value head) and MLPs. Up to 2,000
// edges are SVG, more are painted on a canvas.
const MOST_SVG = 2000;
// While the slider moves, only the strongest edges are painted, thin and solid; all of them when it
// rests. A browser without a graphics device takes 0.2 ms for a thick, dashed one (1.3 s for 10,000).
const MOST_MOVING = 2000, REST_MS = 150;
const DASHES = {q: [7, 3], k: [2, 3], v: [], mlp: [], logits: [10, 3, 2, 3],
  both: [], a: [7, 3], b: [2, 3]};
const drawingOf = (stage, scroller) => {
  const canvas = make("canvas", {"aria-hidden": "true"});
  const svg = draw("svg", {"aria-hidden": "true"}), raised = draw("g");
  const edgeLayer = draw("g"), nodeLayer = draw("g");
  svg.append(edgeLayer, raised, nodeLayer);
  stage.append(canvas, svg);
  const style = getComputedStyle(document.documentElement);

  // Places, in units of one head's row and one layer's column.
  const depth = data.layers - data.layer, columns = depth + 2;
  const rowOf = head => head + Math.floor(head / perGroup) * 0.4;
  const mlpRow = rowOf(data.heads - 1) + 1.4, tall = mlpRow + 1.2;
  const placed = name => {
    const layer = layerOf(name);
    if (layer === null) return {x: name === "steer" ? 0 : columns - 1, y: mlpRow / 2};
    const x = layer - data.layer + 1;
    if (name[0] === "m") return {x: x + 0.3, y: mlpRow};
    const head = Number(name.match(/h(\d+)/)[1]);
    if (/<[kv]>$/.test(name)) return {x, y: rowOf(head * perGroup) + (perGroup - 1) / 2};
    return {x, y: rowOf(head)};
  };
  const places = new Map(nodeNames.map(name => [name, placed(name)]));
  const fromPlaces = data.nodes.map(placed), toPlaces = data.inputs.map(placed);
  let width = 900, height = 400;
  const across = x => 40 + x / (columns - 1) * (width - 90);
  const down = y => 24 + y / tall * (height - 40);
  // [x0, y0, bend, lift, x1, y1] of an edge; those of equal row and distant columns are lifted.
  const curve = edge => {
    const a = fromPlaces[edge.up], b = toPlaces[edge.down];
    const x0 = across(a.x) + 6, y0 = down(a.y), x1 = across(b.x) - 6, y1 = down(b.y);
    return [x0, y0, Math.max(14, (x1 - x0) / 2), y0 === y1 && b.x - a.x > 1.4 ? 18 : 0, x1, y1];
  };
  const pathOf = edge => {
    const [x0, y0, bend, lift, x1, y1] = curve(edge);
    return `M${x0.toFixed(1)} ${y0.toFixed(1)}C${(x0 + bend).toFixed(1)} ${(y0 - lift).toFixed(1)} ` +
      `${(x1 - bend).toFixed(1)} ${(y1 - lift).toFixed(1)} ${x1.toFixed(1)} ${y1.toFixed(1)}`;
  };
  let most = 1, compared = false;
  const widthOf = edge => 0.6 + 4.4 * Math.sqrt(Math.min(1, Math.abs(edge.score) / most));
  const styleOf = row => compared ? row.where : row.edge.kind;

  const line = row => {
    const path = draw("path", {d: pathOf(row.edge), "stroke-width": widthOf(row.edge).toFixed(1),
      class: `edge ${styleOf(row)}`});
    path.append(draw("title", {}, `${nameOf(row.edge)}: ${row.edge.score}`));
    return path;
  };
  // Edges on the canvas, one stroke for each style and thickness.
  const paint = (rows, plain = false) => {
    const ratio = window.devicePixelRatio || 1, context = canvas.getContext("2d");
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    context.scale(ratio, ratio);
    context.globalAlpha = 0.55;
    const groups = new Map();
    for (const row of rows) {
      const key = `${styleOf(row)} ${plain ? 1.4 : Math.ceil(widthOf(row.edge))}`;
      let path = groups.get(key);
      if (!path) groups.set(key, path = new Path2D());
      const [x0, y0, bend, lift, x1, y1] = curve(row.edge);
      path.moveTo(x0, y0);
      path.bezierCurveTo(x0 + bend, y0 - lift, x1 - bend, y1 - lift, x1, y1);
    }
    for (const [key, path] of groups) {
      const [name, thick] = key.split(" ");
      context.strokeStyle = style.getPropertyValue(`--${name}`);
      context.lineWidth = Number(thick) - 0.4;
      context.setLineDash(plain ? [] : DASHES[name]);
      context.stroke(path);
    }
  };

  const groups = new Map();  // name of a node -> its element
  const layOut = () => {
    width = Math.max(scroller.clientWidth, 90 + columns * 26);
    height = Math.max(300, Math.min(900, tall * 30));
    stage.style.width = `${width}px`;
    stage.style.height = `${height}px`;
    stage.style.setProperty("--width", `${width}px`); // a page of paper may be narrower
    stage.style.setProperty("--aspect", `${width} / ${height}`);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    nodeLayer.replaceChildren();
    for (let l = 0; l < depth; l++)
      nodeLayer.append(draw("text", {x: across(l + 1), y: 14, "text-anchor": "middle"}, `${data.layer + l}`));
    for (let h = 0; h < data.heads; h++)
      nodeLayer.append(draw("text", {x: 2, y: down(rowOf(h)) + 4}, `h${h}`));
    nodeLayer.append(draw("text", {x: 2, y: down(mlpRow) + 4}, "mlp"));
    for (const [name, place] of places) {
      const x = across(place.x), y = down(place.y);
      const group = draw("g", {class: "node", "data-name": name});
      group.append(draw("title", {}, name), name[0] === "a" ? draw("circle", {cx: x, cy: y, r: 6})
        : draw("rect", {x: x - 7, y: y - 6, width: 14, height: 12}));
      if (layerOf(name) === null)
        group.append(draw("text", {x, y: y + 20, "text-anchor": "middle"}, name));
      group.append(draw("path", {class: "pin", d: `M${x - 3} ${y}H${x + 3}M${x} ${y - 3}V${y + 3}`}));
      groups.set(name, group);
      nodeLayer.append(group);
    }
  };

  let rows = [], lines = [], marks = {found: new Set(), chosen: "", pins: []}, hovered = "";
  // Dims all edges but those of the node that is pointed at or chosen. Nothing else is drawn again.
  const emphasize = () => {
    const focus = hovered || marks.chosen;
    const near = focus ? rows.filter(row => touches(row.edge, focus)) : [];
    if (canvas.hidden) {
      const kept = new Set(near);
      for (const [row, path] of lines) path.classList.toggle("dim", Boolean(focus) && !kept.has(row));
      raised.replaceChildren();
    } else {
      canvas.style.opacity = focus ? 0.2 : 1;
      raised.replaceChildren(...near.slice(0, MOST_SVG).map(line));
    }
    const ends = new Set(near.flatMap(row => [data.nodes[row.edge.up], ...ownersOf(row.edge)]));
    for (const [name, group] of groups) group.classList.toggle("near", ends.has(name) && name !== focus);
  };
  const ownersOf = edge => inputOwners[edge.down];
  const inputOwners = data.inputs.map((_, number) => nodeNames.filter(name => owners.get(name).has(number)));

  let resting = 0;
  const paintMoving = () => {
    paint(bySize(rows).slice(0, MOST_MOVING), true);
    clearTimeout(resting);
    resting = setTimeout(() => paint(rows), REST_MS);
  };
  const show = (state, visible, found, moving) => {
    clearTimeout(resting);
    rows = visible;
    compared = state.b >= 0;
    most = Math.max(circuits[state.a].most, compared ? circuits[state.b].most : 0);
    marks = {found, chosen: state.chosen, pins: state.pins};
    canvas.hidden = rows.length <= MOST_SVG;
    lines = canvas.hidden ? rows.map(row => [row, line(row)]) : [];
    edgeLayer.replaceChildren(...lines.map(([, path]) => path));
    if (!canvas.hidden) moving ? paintMoving() : paint(rows);
    const used = new Set();
    for (const {edge} of rows) {
      used.add(edge.up);
      used.add(-1 - edge.down);
    }
    data.nodes.concat("logits").forEach((name, number) => {
      const there = used.has(number) || [...owners.get(name)].some(input => used.has(-1 - input));
      const list = groups.get(name).classList;
      list.toggle("off", !there && !found.has(name));
      list.toggle("chosen", name === state.chosen || found.has(name));
      list.toggle("pinned", state.pins.includes(name));
    });
    emphasize();
  };
  const hover = name => {
    if (name === hovered) return;
    hovered = name;
    emphasize();
  };
  // The drawing with all of its edges, for a file.
  const whole = () => {
    const copy = standalone(svg, width, height);
    if (!canvas.hidden) copy.querySelector("g").append(...rows.map(line));
    return copy;
  };
  const resized = () => Math.max(scroller.clientWidth, 90 + columns * 26) !== width;
  return {layOut, show, hover, whole, places, resized};
};
