// Tables: the inputs and outputs of a node, two nodes side by side, and the edges.
const FEW = 50;

const tableOf = (head, rows, label) => {
  const body = make("tbody"), top = make("tr");
  for (const text of head) top.append(make("th", {scope: "col"}, text));
  const add = from => {
    for (const cells of rows.slice(from, from + FEW * (from ? 10 : 1))) {
      const row = make("tr", {}, make("th", {scope: "row"}, cells[0]));
      for (const cell of cells.slice(1)) row.append(make("td", {}, cell));
      body.append(row);
    }
    more.hidden = body.children.length >= rows.length;
    more.textContent = `Show more of ${rows.length} rows`;
  };
  const more = button("", () => add(body.children.length));
  add(0);
  return make("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": label},
    make("table", {}, make("thead", {}, top), body), more);
};
const signOf = score => score < 0 ? "negative" : "positive";
const size = score => score === undefined ? "–" : Math.abs(score).toPrecision(3);

// Columns of one edge beside its name; two circuits add where it is and its other score.
const edgeCells = (rows, compared) => {
  const total = rows.reduce((sum, row) => sum + Math.abs(row.edge.score), 0) || 1;
  return row => [size(row.edge.score), `${(100 * Math.abs(row.edge.score) / total).toFixed(1)} %`,
    signOf(row.edge.score), ...(compared ? [WHERE[row.where], size(row.other)] : [])];
};
const edgeHead = compared => ["score", "share", "sign",
  ...(compared ? ["in", "other score"] : [])];
const edgeTable = (rows, title, label, compared, choose) => {
  const cells = edgeCells(rows, compared);
  return tableOf([title, ...edgeHead(compared)],
    bySize(rows).map(row => [choose(row), ...cells(row)]), label);
};

// One node: what its value vector says, its inputs and its outputs, the strongest first.
const panelOf = (name, rows, state, {pin, choose}) => {
  const compared = state.b >= 0, tokens = data.tokens[name];
  const into = rows.filter(row => entersInto(row.edge, name));
  const out = rows.filter(row => leavesFrom(row.edge, name));
  const box = make("div", {"data-panel": name}, make("h3", {}, name, " ",
    button(state.pins.includes(name) ? "Unpin" : "Pin", () => pin(name), {"aria-label":
      `${state.pins.includes(name) ? "Unpin" : "Pin"} ${name}`})));
  const whose = data.circuits[state.a].other_vector ? "The difference in means' value vector there" :
    "Its value vector";
  if (tokens) box.append(make("p", {}, `${whose} promotes: ${tokens.join(" · ")}`));
  const link = to => row => button(nameOf(row.edge), () => choose(to(row.edge)), {class: "link"});
  const upstream = edge => data.nodes[edge.up];
  const downstream = edge => data.inputs[edge.down].replace(/<.>$/, "");
  box.append(edgeTable(into, `inputs (${into.length})`, `inputs of ${name}`, compared, link(upstream)),
    edgeTable(out, `outputs (${out.length})`, `outputs of ${name}`, compared, link(downstream)));
  return box;
};

// Two nodes: the sums of scores by which their neighbours feed or read each of them.
const pairOf = ([one, two], rows) => {
  const sums = new Map();
  const add = (label, which, score) => {
    const found = sums.get(label) ?? [0, 0];
    found[which] += score;
    sums.set(label, found);
  };
  for (const {edge} of rows)
    [one, two].forEach((name, which) => {
      if (entersInto(edge, name)) add(`from ${data.nodes[edge.up]}`, which, edge.score);
      if (leavesFrom(edge, name)) add(`to ${data.inputs[edge.down]}`, which, edge.score);
    });
  const order = [...sums].sort(([, x], [, y]) =>
    Math.max(...y.map(Math.abs)) - Math.max(...x.map(Math.abs)));
  const text = value => value === 0 ? "–" : value.toPrecision(3);
  const shared = order.filter(([, [x, y]]) => x && y).length;
  return make("div", {"data-pair": `${one} ${two}`}, make("h3", {}, `${one} and ${two}`),
    make("p", {}, `${shared} of ${order.length} neighbours are shared.`),
    tableOf(["neighbour", one, two], order.map(([name, [x, y]]) => [name, text(x), text(y)]),
      `neighbours of ${one} and ${two}`));
};
