// Elements, and files that the reader saves.
const SVG = "http://www.w3.org/2000/svg";

const make = (name, attributes = {}, ...children) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};
const draw = (name, attributes = {}, text = "") => {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text) element.textContent = text;
  return element;
};
const button = (text, action, attributes = {}) => {
  const element = make("button", {type: "button", ...attributes}, text);
  element.addEventListener("click", action);
  return element;
};

const save = (name, content, type) => {
  const link = make("a", {href: URL.createObjectURL(new Blob([content], {type})), download: name});
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
};
// Spreadsheets run a cell that begins like a formula, and cells hold what a model has said: a quote
// before it makes it text. Numbers stay as they are.
const csvOf = rows => rows.map(row => row.map(cell => {
  let text = String(cell);
  if (/^[=+\-@\t\r]/.test(text) && !Number.isFinite(Number(text))) text = `'${text}`;
  return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}).join(",")).join("\n") + "\n";

// A copy of a drawing that can stand alone: with its size, the page's rules and its background.
const standalone = (svg, width, height) => {
  const copy = svg.cloneNode(true);
  copy.setAttribute("xmlns", SVG);
  copy.setAttribute("viewBox", `0 0 ${width} ${height}`);
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  const rules = [...document.styleSheets].flatMap(sheet => [...sheet.cssRules])
    .filter(rule => !rule.cssText.startsWith("@media print")).map(rule => rule.cssText);
  copy.prepend(draw("style", {}, rules.join("\n")),
    draw("rect", {width: "100%", height: "100%", class: "paper"}));
  return copy;
};
const saveSvg = (name, svg) => save(name, new XMLSerializer().serializeToString(svg), "image/svg+xml");
// Twice as many pixels as the page has.
const savePng = (name, svg) => new Promise((done, fail) => {
  const picture = new Image();
  picture.onload = () => {
    const canvas = make("canvas", {width: 2 * picture.width, height: 2 * picture.height});
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    canvas.toBlob(blob => { save(name, blob, "image/png"); done(); }, "image/png");
  };
  picture.onerror = () => fail(new Error("the drawing cannot be turned into pixels"));
  const text = new XMLSerializer().serializeToString(svg);
  picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
});
