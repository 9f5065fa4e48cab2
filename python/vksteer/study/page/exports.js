// The view as a table of values and as Python.
const asCsv = (rows, compared) => csvOf([["edge", "score", "entry", ...(compared ? ["in"] : [])],
  ...rows.map(({edge, where}) => [nameOf(edge), edge.score, edge.entry,
    ...(compared ? [WHERE[where]] : [])])]);

const quoted = text => JSON.stringify(text);
const loaded = circuit => circuit.file
  ? `vs.patching.EdgeScores.load(${quoted(circuit.file)})` : `...  # the scores of ${circuit.label}`;

// Python that makes the same circuit and applies the same filters: `edges`, the strongest first.
const asPython = state => {
  const a = circuits[state.a], compared = state.b >= 0;
  const lines = [a.file ? "# Run it in the folder of the report." : "", "import vksteer as vs", "",
    `scores = ${loaded(a)}`, `circuit = scores.circuit(${state.n})`,
    "score = {name: scores[name] for name in circuit.edge_names}"];
  if (compared) {
    lines.push(`other = ${loaded(circuits[state.b])}`, `second = other.circuit(${state.n})`,
      "score = {name: other[name] for name in second.edge_names} | score",
      'print("overlap:", circuit.overlap(second))');
    const chosen = {both: "circuit.edge_names & second.edge_names",
      a: "circuit.edge_names - second.edge_names", b: "second.edge_names - circuit.edge_names",
      "": "circuit.edge_names | second.edge_names"}[state.where];
    lines.push(`edges = ${chosen}`);
  } else lines.push("edges = circuit.edge_names");
  if (state.kinds.size < KINDS.length) {
    const kinds = KINDS.filter(kind => state.kinds.has(kind)).map(quoted);
    lines.push("", "", "def kind(name):", '    end = name.split("->")[1]',
      '    return end[-2] if end.endswith(">") else "mlp" if end[0] == "m" else end', "", "",
      `edges = {name for name in edges if kind(name) in [${kinds.join(", ")}]}`);
  }
  if (state.layer !== "") lines.push("edges = {", "    name", "    for name in edges",
    `    if ${quoted(state.layer)} in [part[1:].split(".")[0].split("<")[0] for part in name.split("->")]`, "}");
  if (state.sign) lines.push(`edges = {name for name in edges if score[name] ${state.sign > 0 ? ">" : "<"} 0}`);
  lines.push("edges = sorted(edges, key=lambda name: -abs(score[name]))");
  if (state.chosen) {
    const inputs = [...owners.get(state.chosen)].map(number => quoted(data.inputs[number]));
    lines.push(`inputs = [name for name in edges if name.split("->")[1] in [${inputs.join(", ")}]]`,
      `outputs = [name for name in edges if name.startswith(${quoted(`${state.chosen}->`)})]`);
  }
  return lines.filter((line, i) => line || i).join("\n") + "\n";
};
