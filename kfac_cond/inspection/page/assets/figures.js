// Pictures that are drawn when they come into view, in the colours of the theme.

const figures = new Map();

const NAMES = ["ink", "line", "grid", "accent", "second", "error", "warning", "info"];
const palette = new Map();

/** A colour of the theme as the drawing library can read it; all of them are read when the theme is set. */
const colour = (name) => palette.get(name);

function readColours() {
  const probe = element("span");
  document.body.append(probe);
  for (const name of NAMES) {
    probe.style.color = `var(--${name})`;
    palette.set(name, getComputedStyle(probe).color);
  }
  probe.remove();
}

/** The drawing library is read when the first picture is due, after the page itself is there. */
function drawing() {
  if (!window.Plotly) {
    const source = byId("drawing");
    source.after(element("script", { textContent: source.textContent }));
    source.remove();
  }
  return window.Plotly;
}

/** When the page is read to its end, where the library lies; its own tables are there before. */
const pageRead = new Promise((done) => document.addEventListener("DOMContentLoaded", () => requestAnimationFrame(() => setTimeout(done))));

const watched = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const one = figures.get(target.id);
    one.near = isIntersecting;
    if (one.near && one.due) draw(target.id);
  }
}, { rootMargin: "200px" });

/**
 * A picture of its own place in the page.
 * @param make () => {traces, layout, said}, or null where there is nothing to draw; `said` is for those who do not see it
 * @param pressed called with the customdata of a point that is clicked
 */
function figure(id, make, pressed) {
  figures.set(id, { make, pressed, drawn: false, near: false, due: true });
  pageRead.then(() => watched.observe(byId(id)));
}

function draw(id) {
  const one = figures.get(id);
  const place = byId(id);
  const made = one.make();
  one.due = false;
  place.closest("figure").hidden = made === null;
  if (made === null) return;
  if (made.said) place.setAttribute("aria-label", made.said);
  drawing().react(place, made.traces, laidOut(made.layout ?? {}), { displaylogo: false, responsive: true, displayModeBar: false });
  if (!one.drawn && one.pressed) {
    place.on("plotly_click", (event) => one.pressed(event.points[0].customdata));
  }
  one.drawn = true;
  if (performance.getEntriesByName("first picture").length === 0) performance.mark("first picture");
}

/** Draw again what is in view; the rest is due when it comes into view. */
function redraw(...ids) {
  for (const id of ids) {
    const one = figures.get(id);
    if (!one) continue;
    const frame = byId(id).closest("figure");
    one.due = true;
    if (one.near) draw(id);
    // What is hidden comes into view only when it is shown again.
    else if (frame.hidden) frame.hidden = one.make() === null;
  }
}

function laidOut({ xaxis = {}, yaxis = {}, ...rest }) {
  const axis = {
    gridcolor: colour("grid"), linecolor: colour("line"), zerolinecolor: colour("line"), automargin: true,
    exponentformat: "power", title: { font: { size: 12 }, standoff: 6 },
  };
  const joined = (own) => ({ ...axis, ...own, title: { ...axis.title, text: own.title ?? "" } });
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("ink"), size: 11, family: "system-ui, sans-serif" },
    margin: { l: 48, r: 12, t: 8, b: 40 }, showlegend: false, hovermode: "closest",
    hoverlabel: { align: "left" },
    ...rest, xaxis: joined(xaxis), yaxis: joined(yaxis),
  };
}

/** A text that the drawing library must not read as markup. */
const inert = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

/** A logarithmic axis with whole powers of ten alone, where there are enough of them. */
function logAxis(values, title = "", ticks = 6) {
  const decades = Math.log10(Math.max(...values) / Math.min(...values));
  return decades < 1.5 ? { type: "log", title } : { type: "log", title, dtick: Math.ceil(decades / ticks) };
}

const SYMBOLS = { circle: "●", square: "■", diamond: "◆", "triangle-up": "▲", cross: "✚", star: "★" };

/** The symbol of each kind of layer, and how the kinds are told apart in words. */
function symbolsOf(rows) {
  const kinds = [...new Set(rows.map((row) => row.kind))];
  const names = Object.keys(SYMBOLS);
  const symbols = new Map(kinds.map((kind, index) => [kind, names[Math.min(index, names.length - 1)]]));
  const said = kinds.length > 1 ? kinds.map((kind) => `${SYMBOLS[symbols.get(kind)]} ${kind || "other"}`).join(", ") : "";
  return { symbols, said };
}

/** Points over depth, one a layer. */
function overDepth(rows, value, { title, log = true, colours = null, type = "scatter" }) {
  const drawn = rows.filter((row) => isShown(value(row)) && (!log || value(row) > 0));
  if (drawn.length === 0) return null;
  const marker = { color: colours ? drawn.map(colours) : colour("accent"), size: 6 };
  const { symbols } = symbolsOf(rows);
  if (symbols.size > 1) marker.symbol = drawn.map((row) => symbols.get(row.kind));
  const trace = {
    type, mode: drawn.length > 60 ? "markers" : "lines+markers", x: drawn.map((row) => row.depth), y: drawn.map(value),
    customdata: drawn.map((row) => row.index), hovertext: drawn.map((row) => `${inert(row.name)}<br>${inert(row.kind)} ${written(value(row))}`),
    hoverinfo: "text", line: { color: colour("line"), width: 1 }, marker,
  };
  const values = drawn.map(value);
  const said = `${title}, by depth: ${drawn.length} layers, from ${written(Math.min(...values))} to ${written(Math.max(...values))}.`;
  const layout = { xaxis: { title: "layer, in the order of the model" }, yaxis: log ? logAxis(values) : {} };
  return { traces: [trace], layout, said };
}

// -- theme --

const THEMES = ["system", "light", "dark"];
const NAMED = { system: "as the system", light: "light", dark: "dark" };
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
let theme = "system";

function setTheme(next) {
  theme = next;
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${NAMED[theme]}`;
  readColours();
  redraw(...figures.keys());
}

byId("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]));
prefersDark.addEventListener("change", () => setTheme(theme));
setTheme("system");
