// What the report's figures offer beside their data: files of them, and other rows of answers.
for (const figure of document.querySelectorAll("figure")) {
  const name = figure.dataset.name, chart = figure.querySelector("svg.chart");
  const table = figure.querySelector("details table"), bar = make("p", {class: "save"});
  const drawing = () => {
    const box = chart.viewBox.baseVal;
    return standalone(chart, box.width, box.height);
  };
  if (chart) bar.append(button("SVG", () => saveSvg(`${name}.svg`, drawing()),
    {"aria-label": `Save ${name} as SVG`}), button("PNG", () => savePng(`${name}.png`, drawing()),
    {"aria-label": `Save ${name} as PNG`}));
  if (table) bar.append(button("CSV", () => save(`${name}.csv`, csvOf([...table.rows].map(row =>
    [...row.cells].map(cell => cell.textContent.trim()))), "text/csv"),
    {"aria-label": `Save the data of ${name} as CSV`}));
  if (bar.children.length) figure.append(bar);
}

// The third column of answers holds the row of Table 1 that is chosen here.
for (const choice of document.querySelectorAll("select[data-rows]"))
  choice.addEventListener("change", () => {
    const table = document.getElementById(choice.dataset.rows);
    for (const part of table.querySelectorAll("[data-row]"))
      part.hidden = part.dataset.row !== choice.value;
  });

// Closed details are opened on paper, and closed again.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const one of opened) one.open = true;
});
addEventListener("afterprint", () => { for (const one of opened) one.open = false; });
