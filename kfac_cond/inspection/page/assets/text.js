"use strict";
// The data of the page, and numbers and elements as text.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

/** What the island writes for an infinity. */
const INFINITE = 1e308;
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const isShown = (value) => isNumber(value) && Math.abs(value) < INFINITE;

function written(value) {
  if (value === null || value === undefined || value === "" || Number.isNaN(value)) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return String(value);
  if (Math.abs(value) >= INFINITE) return value > 0 ? "∞" : "-∞";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e7) {
    return Number(value.toPrecision(4)).toLocaleString("en-US", { maximumSignificantDigits: 4 });
  }
  return value.toExponential(2);
}

const percent = (share) => (isNumber(share) ? `${Number((100 * share).toPrecision(3))} %` : "–");

/** An element with text, never with markup: a name is only ever a text node. */
function element(tag, properties = {}, children = []) {
  const { dataset, role, ...own } = properties;
  const made = Object.assign(document.createElement(tag), own);
  if (dataset) Object.assign(made.dataset, dataset);
  if (role) made.setAttribute("role", role);
  for (const child of [].concat(children)) made.append(child);
  return made;
}

/** A dotted name that may be broken at its dots. */
function breakable(name) {
  const made = document.createDocumentFragment();
  for (const part of (name === "" ? "(the model itself)" : name).split(/(?<=\.)/)) {
    made.append(part, document.createElement("wbr"));
  }
  return made;
}

/** Nested numbers as rows of [label, text]; short lists in one row, and a value with its error. */
function rowsOf(section, label = "") {
  const words = (key) => `${label} ${key}`.trim().replaceAll("_", " ");
  return Object.entries(section).flatMap(([key, value]) => {
    if (value === null || value === undefined || value === "") return [];
    if (Array.isArray(value)) {
      const short = value.length > 0 && value.length <= 12 && value.every((one) => typeof one !== "object");
      return short ? [[words(key), value.map(written).join(", ")]] : [];
    }
    if (isNumber(value.value) && isNumber(value.error)) {
      return [[words(key), `${written(value.value)} ± ${written(value.error)}`]];
    }
    return typeof value === "object" ? rowsOf(value, words(key)) : [[words(key), written(value)]];
  });
}

/** Titles of the panels whose meanings are open, which stay so from layer to layer. */
const opened = new Set();

/** A panel of rows under a heading, with what they mean; none where there is nothing to say. */
function panel(title, rows, meanings = []) {
  if (rows.length === 0) return null;
  const body = element("tbody");
  for (const [label, text] of rows) {
    body.append(element("tr", {}, [element("th", { scope: "row", textContent: label }), element("td", { textContent: text })]));
  }
  const made = element("div", { className: "panel" }, [element("h3", { textContent: title }), element("table", {}, [body])]);
  if (meanings.length) {
    const terms = meanings.flatMap(([term, text]) => [element("dt", { textContent: term }), element("dd", { textContent: text })]);
    const meant = element("details", { open: opened.has(title) }, [element("summary", { textContent: "What these are" }), element("dl", {}, terms)]);
    meant.addEventListener("toggle", () => (meant.open ? opened.add(title) : opened.delete(title)));
    made.append(meant);
  }
  return made;
}

/** A table of numbers beside a picture. */
function plainTable(caption, heads, rows) {
  const head = element("tr", {}, heads.map((text) => element("th", { scope: "col", textContent: text })));
  const body = rows.map((cells) => element("tr", {}, cells.map((cell, index) =>
    index === 0 ? element("th", { scope: "row" }, typeof cell === "string" ? breakable(cell) : written(cell))
                : element("td", { textContent: written(cell) }))));
  return element("table", {}, [
    element("caption", { textContent: caption }), element("thead", {}, [head]), element("tbody", {}, body),
  ]);
}

/** Whether a name holds a text, or matches a pattern where there is a star in it. */
function nameFilter(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted.includes("*")) return (name) => name.toLowerCase().includes(wanted);
  const escaped = wanted.split("*").map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&"));
  const pattern = new RegExp(`^${escaped.join(".*")}$`);
  return (name) => pattern.test(name.toLowerCase());
}
