// The circuits: sets of edges of one graph, their sizes, what two of them share, and which edges
// pass the filters. The edges of a circuit stand in the order in which they enter it, so a circuit
// of n edges is a prefix.
const data = JSON.parse(document.getElementById("circuit-data").textContent);
const KINDS = ["q", "k", "v", "mlp", "logits"];
const WHERE = {both: "both", a: "only the first", b: "only the second"};
const perGroup = data.heads / data.groups;
const nodeNames = [...data.nodes, "logits"];

const layerOf = name => name === "steer" || name === "logits" ? null : Number(name.match(/\d+/)[0]);
const nodeLayer = data.nodes.map(layerOf), inputLayer = data.inputs.map(layerOf);
const keyOf = (up, down) => up * data.inputs.length + down;
const circuits = data.circuits.map(circuit => {
  const edges = circuit.edges.map(([up, down, score, entry]) =>
    ({up, down, score, entry, key: keyOf(up, down), kind: data.kinds[down]}));
  return {...circuit, edges, index: new Map(edges.map((edge, i) => [edge.key, i])),
    most: edges.reduce((most, edge) => Math.max(most, Math.abs(edge.score)), 1e-30)};
});

const nameOf = edge => `${data.nodes[edge.up]}->${data.inputs[edge.down]}`;
// A key or value input belongs to every query head of its group.
const owners = new Map(nodeNames.map(name => [name, new Set()]));
data.inputs.forEach((input, number) => {
  const kind = data.kinds[number];
  if (kind !== "k" && kind !== "v") owners.get(input.replace(/<.>$/, "")).add(number);
  else {
    const [, layer, group] = input.match(/^a(\d+)\.h(\d+)/);
    for (let i = 0; i < perGroup; i++) owners.get(`a${layer}.h${group * perGroup + i}`).add(number);
  }
});
const entersInto = (edge, name) => owners.get(name).has(edge.down);
const leavesFrom = (edge, name) => data.nodes[edge.up] === name;
const touches = (edge, name) => leavesFrom(edge, name) || entersInto(edge, name);

// How many edges the circuit of n edges has: all that enter together with the n-th.
const sizeOf = (circuit, n) => {
  const {edges} = circuit;
  let end = Math.min(n, edges.length);
  while (end > 0 && end < edges.length && edges[end].entry === edges[end - 1].entry) end++;
  return end;
};
// The edges of the first circuit, or of both; `where` says in which of the two an edge is.
const members = state => {
  const a = circuits[state.a], end = sizeOf(a, state.n);
  if (state.b < 0) return a.edges.slice(0, end).map(edge => ({edge, where: "a", other: null}));
  const b = circuits[state.b], last = sizeOf(b, state.n), rows = [];
  for (let i = 0; i < end; i++) {
    const at = b.index.get(a.edges[i].key) ?? Infinity;
    rows.push({edge: a.edges[i], where: at < last ? "both" : "a", other: b.edges[at]?.score});
  }
  for (let i = 0; i < last; i++) {
    const at = a.index.get(b.edges[i].key) ?? Infinity;
    if (at >= end) rows.push({edge: b.edges[i], where: "b", other: a.edges[at]?.score});
  }
  return rows;
};
const passes = (state, {edge, where}) => {
  if (!state.kinds.has(edge.kind)) return false;
  if (state.b >= 0 && state.where && where !== state.where) return false;
  if (state.sign && Math.sign(edge.score) !== Number(state.sign)) return false;
  if (state.layer === "") return true;
  const layer = Number(state.layer);
  return nodeLayer[edge.up] === layer || inputLayer[edge.down] === layer;
};
const bySize = rows => [...rows].sort((x, y) => Math.abs(y.edge.score) - Math.abs(x.edge.score));

let logFactorials = null;
const logChoose = (n, k) => {
  if (!logFactorials) {
    logFactorials = new Float64Array(data.total + 1);
    for (let i = 2; i <= data.total; i++) logFactorials[i] = logFactorials[i - 1] + Math.log(i);
  }
  return logFactorials[n] - logFactorials[k] - logFactorials[n - k];
};
// Log P(X >= shared) for two random sets of a and b edges out of all: hypergeometric.
const logTail = (shared, a, b) => {
  const least = Math.max(0, a + b - data.total), terms = [];
  if (shared <= least) return 0;
  for (let i = shared; i <= Math.min(a, b); i++)
    terms.push(logChoose(a, i) + logChoose(data.total - a, b - i) - logChoose(data.total, b));
  const top = terms.reduce((most, term) => Math.max(most, term), -Infinity);
  return Math.min(0, top + Math.log(terms.reduce((sum, term) => sum + Math.exp(term - top), 0)));
};
const probability = log => {
  if (log > Math.log(1e-4)) return Math.exp(log).toPrecision(2);
  const exponent = Math.floor(log / Math.LN10);
  return `${Math.exp(log - exponent * Math.LN10).toFixed(1)}e${exponent}`;
};
const difference = (state, rows) => {
  const count = {both: 0, a: 0, b: 0};
  for (const row of rows) count[row.where]++;
  const {both, a, b} = count;
  return {...count, iou: both / (a + b + both || 1), log: logTail(both, a + both, b + both)};
};

// Faithfulness at the measured sizes around a size.
const measured = (circuit, size) => {
  if (!circuit.curve.length) return "faithfulness was not measured";
  const below = circuit.curve.filter(([n]) => n <= size).at(-1);
  const above = circuit.curve.find(([n]) => n >= size);
  const points = below && above && below[0] === above[0] ? [below] : [below, above].filter(Boolean);
  const said = points.map(([n, value]) => `${value.toFixed(2)} at ${n}`).join(", ");
  return `measured faithfulness ${said} edges` +
    (circuit.halves ? ", of circuits found on half of the samples" : "");
};
