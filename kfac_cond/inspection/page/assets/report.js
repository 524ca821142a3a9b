// The page of one report.

const lambdas = data.lambdas;
const SECTIONS = {
  counts: "What was counted", sampling: "Sampling of the labels", signal: "Signal and noise of the gradient",
  empirical: "Against the empirical Fisher", approximation: "Error of the approximation", kl: "KL of the update",
  update: "Geometry of the update", staleness: "Staleness", health: "Numerical health", cost: "Cost",
};
const WHOLE = {
  calibration: "Dampings for the whole", kl: "KL of the whole update", sampling: "Check of the drawn labels",
  signal: "Signal and noise of the whole gradient", block_diagonality: "Outside the layer blocks",
};
const RANK = { error: 3, warning: 2, info: 1 };
const findingsOf = Map.groupBy ? Map.groupBy(data.findings, (one) => one.layer) : grouped(data.findings);
let at = 0;
let chosen = 0;

const rows = data.layers.map((layer, index) => {
  const found = findingsOf.get(layer.name) ?? [];
  const severity = found.reduce((worst, one) => (RANK[one.severity] > (RANK[worst] ?? 0) ? one.severity : worst), "");
  return { ...layer, index, found, severity, spectrum: layer.spectrum ?? {} };
});

function grouped(findings) {
  const groups = new Map();
  for (const one of findings) groups.set(one.layer, [...(groups.get(one.layer) ?? []), one]);
  return groups;
}

const curveOf = (row) => row.spectrum.effective_dimension;
const dimension = (row) => curveOf(row)?.[at] ?? null;
const below = (row) => row.spectrum.share_below?.[at] ?? null;

/** The condition number of F + λ: what the step meets, where the raw one is infinite. */
const damped = (row) => {
  const { largest, smallest } = row.spectrum;
  return isNumber(largest) ? (largest + lambdas[at]) / (Math.max(smallest ?? 0, 0) + lambdas[at]) : null;
};

const sides = (row) => row.shape.join(" × ");

const COLUMNS = [
  { key: "name", title: "Layer", className: "name", ascendsFirst: true, value: (row) => row.name, help: "Name in the model" },
  { key: "depth", title: "#", ascendsFirst: true, value: (row) => row.depth, help: "Place in the order of the model" },
  { key: "found", title: "Findings", className: "text severities", value: (row) => 100 * (RANK[row.severity] ?? 0) + row.found.length,
    text: (value) => (value ? `${value % 100}${value % 100 > 1 ? ", worst" : ""} ${["info", "warning", "error"][Math.floor(value / 100) - 1]}` : "–"), help: "How many, and the gravest" },
  { key: "dimension", title: "d_eff (λ)", follows: true, value: dimension, help: "tr F (F + λ)⁻¹: directions that the damping leaves alone" },
  { key: "share", title: "Share below λ", follows: true, value: below, text: percent, help: "Share of the eigenvalues below the damping: there K-FAC acts as SGD" },
  { key: "damped", title: "Condition (λ)", follows: true, value: damped, help: "Condition number of F + λ" },
  { key: "trace", title: "Trace", value: (row) => row.spectrum.trace, help: "tr F of the layer, per loss term" },
  { key: "per_parameter", title: "Trace / parameter", value: (row) => row.spectrum.per_parameter, help: "The mean eigenvalue" },
  { key: "condition", title: "Condition", value: (row) => row.spectrum.condition, help: "Condition number without damping" },
  { key: "blame", title: "Blame", className: "text", ascendsFirst: true, value: (row) => row.spectrum.blame, help: "The side with the larger condition number" },
  { key: "stable", title: "Stable rank", value: (row) => row.spectrum.stable_rank, help: "Stable rank of the block" },
  { key: "kl", title: "KL share", needs: "kl", value: (row) => row.kl?.share, text: percent, help: "Share of the update's KL" },
  { key: "ratio", title: "KL ratio", needs: "kl", value: (row) => row.kl?.ratio, help: "Measured over predicted KL of the update's part in the layer; above 1 F is too small along it" },
  { key: "error", title: "K-FAC error", needs: "approximation", value: (row) => row.approximation?.kfac, text: percent, help: "Relative Frobenius distance of K-FAC from the exact block" },
  { key: "kind", title: "Kind", className: "text", ascendsFirst: true, value: (row) => row.kind, help: "Kind of layer" },
  { key: "shape", title: "Shape", value: (row) => row.parameters, text: (_, row) => sides(row), help: "Rows × columns of the layer's matrix, the bias counted as a column; sorted by parameters" },
].filter((column) => !column.needs || rows.some((row) => row[column.needs]))
  .filter((column) => column.key !== "found" || data.findings.length > 0);

for (const column of COLUMNS) column.text ??= written;

// -- the damping --

const totalDimension = lambdas.map((_, index) => rows.reduce((sum, row) => sum + (curveOf(row)?.[index] ?? 0), 0));
const parameters = rows.reduce((sum, row) => sum + (curveOf(row) ? row.parameters : 0), 0);
const FOLLOWING = ["depth-dimension", "depth-condition", "curve", "spectrum-block"];

function nearest(lambda) {
  if (!isNumber(lambda) || lambda <= 0) return Math.floor(lambdas.length / 2);
  const distance = (value) => Math.abs(Math.log(value / lambda));
  return lambdas.reduce((best, value, index) => (distance(value) < distance(lambdas[best]) ? index : best), 0);
}

function sayDamping() {
  const text = written(lambdas[at]);
  const whole = rows.reduce((sum, row) => sum + (below(row) ?? 0) * row.parameters, 0) / parameters;
  byId("lambda-text").textContent = text;
  byId("lambda").setAttribute("aria-valuetext", text);
  byId("lambda-whole").textContent =
    `d_eff ${written(totalDimension[at])} of ${written(parameters)} parameters; ${percent(whole)} of the eigenvalues below λ`;
}

let due = false;
function setDamping(index) {
  at = index;
  sayDamping();
  table.follow();
  // Pictures once a frame, however fast the slider moves.
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    redraw(...FOLLOWING);
  });
}

// -- pictures --

const bySeverity = (row) => colour(row.severity || "accent");
const line = (x) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: colour("second"), width: 2, dash: "dot" } });

function curve() {
  const own = rows[chosen];
  if (!curveOf(own)) return null;
  const others = rows.filter((row) => curveOf(row) && row.index !== chosen).sort((a, b) => b.parameters - a.parameters).slice(0, 8);
  const traces = others.map((row) => ({
    x: lambdas, y: curveOf(row).map((value) => value / row.parameters), mode: "lines", line: { color: colour("line"), width: 1 },
    hoverinfo: "text", hovertext: inert(row.name),
  }));
  traces.push({
    x: lambdas, y: curveOf(own).map((value) => value / own.parameters), mode: "lines", line: { color: colour("accent"), width: 3 },
    hoverinfo: "text", hovertext: lambdas.map((lambda, index) => `λ ${written(lambda)}<br>d_eff ${written(curveOf(own)[index])}`),
  });
  const layout = {
    xaxis: logAxis(lambdas, "damping λ", 4), yaxis: { title: "d_eff / parameters", rangemode: "tozero" }, shapes: [line(lambdas[at])],
  };
  return { traces, layout, said: `Effective dimension of ${own.name}: ${written(dimension(own))} of ${own.parameters} at λ ${written(lambdas[at])}.` };
}

/** Log-binned eigenvalues; the edges are log10 already. */
function histogram(binned, name, withDamping) {
  if (!binned?.counts?.length) return null;
  const { edges, counts } = binned;
  const middle = counts.map((_, index) => (edges[index] + edges[index + 1]) / 2);
  const trace = {
    type: "bar", x: middle, y: counts, width: counts.map((_, index) => 0.95 * (edges[index + 1] - edges[index])),
    marker: { color: colour("accent") }, hoverinfo: "text",
    hovertext: counts.map((count, index) => `${written(count)} eigenvalues<br>10^${edges[index].toFixed(2)} to 10^${edges[index + 1].toFixed(2)}`),
  };
  const layout = { xaxis: { title: "log10 of the eigenvalue" }, yaxis: { title: "eigenvalues" }, bargap: 0 };
  if (withDamping) layout.shapes = [line(Math.log10(lambdas[at]))];
  const total = counts.reduce((sum, count) => sum + count, 0);
  return { traces: [trace], layout, said: `Eigenvalues of ${name}: ${written(total)}, from 10^${edges[0].toFixed(1)} to 10^${edges.at(-1).toFixed(1)}.` };
}

function factorMap(side) {
  const map = data.maps[rows[chosen].name]?.[side];
  if (!map) return null;
  const bytes = Uint8Array.from(atob(map.bytes), (character) => character.charCodeAt(0));
  const value = (byte) => (byte === 0 ? null : map.low + ((byte - 1) * (map.high - map.low)) / 254);
  const z = Array.from({ length: map.bins }, (_, row) => Array.from({ length: map.bins }, (_, column) =>
    map.diagonal ? (row === column ? value(bytes[row]) : null) : value(bytes[row * map.bins + column])));
  const centres = Array.from({ length: map.bins }, (_, index) => ((index + 0.5) * map.size) / map.bins);
  const trace = {
    type: "heatmap", z, x: centres, y: centres, colorscale: "Viridis", zmin: map.low, zmax: map.high,
    colorbar: { thickness: 10, tickfont: { size: 10 } }, hovertemplate: "row %{y:.0f}, column %{x:.0f}: 10^%{z:.2f}<extra></extra>",
  };
  const layout = { xaxis: { constrain: "domain" }, yaxis: { autorange: "reversed", scaleanchor: "x", constrain: "domain" } };
  return { traces: [trace], layout, said: `${side} of ${rows[chosen].name}, ${map.size} by ${map.size}${map.diagonal ? ", known by its diagonal" : ""}.` };
}

function scatter() {
  const points = rows.filter((row) => row.kl?.predicted > 0 && row.kl?.measured > 0);
  if (points.length === 0) return null;
  const values = points.flatMap((row) => [row.kl.predicted, row.kl.measured]);
  const ends = [Math.min(...values) / 1.5, Math.max(...values) * 1.5];
  const identity = { x: ends, y: ends, mode: "lines", line: { color: colour("second"), dash: "dot" }, hoverinfo: "skip" };
  const layers = {
    x: points.map((row) => row.kl.predicted), y: points.map((row) => row.kl.measured), mode: "markers", marker: { color: colour("accent"), size: 7 },
    customdata: points.map((row) => row.index), hoverinfo: "text",
    hovertext: points.map((row) => `${inert(row.name)}<br>measured / predicted ${written(row.kl.measured / row.kl.predicted)}`),
  };
  const other = points.filter((row) => row.kl.held_out > 0);
  const heldOut = {
    x: other.map((row) => row.kl.predicted), y: other.map((row) => row.kl.held_out), mode: "markers",
    marker: { color: colour("second"), size: 7, symbol: "circle-open" }, customdata: other.map((row) => row.index), hoverinfo: "text",
    hovertext: other.map((row) => `${inert(row.name)}<br>held out / predicted ${written(row.kl.held_out / row.kl.predicted)}`),
  };
  const layout = { xaxis: logAxis(ends, "predicted", 5), yaxis: logAxis(ends, "measured") };
  return { traces: [identity, layers, heldOut], layout, said: `Predicted against measured KL of ${points.length} layers, with the line on which they are equal.` };
}

// -- one layer --

function choose(index, goThere = true) {
  chosen = index;
  const row = rows[index];
  byId("chosen").value = String(index);
  table.mark(index);
  byId("layer-facts").textContent =
    `${row.name || "(the model itself)"}: ${row.kind}, ${sides(row)}, ${written(row.parameters)} parameters`;
  byId("layer-findings").replaceChildren(...row.found.map((one) => element("p", {}, [`${one.severity}: ${one.message} → ${one.advice}`])));
  const { A, G, histogram: _, top, effective_dimension, share_below, dead_inputs, dead_outputs, ...numbers } = row.spectrum;
  const dead = [["dead inputs", dead_inputs], ["dead outputs", dead_outputs]].filter(([, list]) => list?.length)
    .map(([label, list]) => [label, `${list.length}: ${list.slice(0, 12).join(", ")}${list.length > 12 ? " …" : ""}`]);
  const panels = [panel("Spectrum", [...rowsOf(numbers), ...dead], data.meanings.spectrum),
    ...Object.entries(SECTIONS).map(([key, title]) => (row[key] ? panel(title, rowsOf(row[key]), data.meanings[key]) : null))];
  byId("layer-numbers").replaceChildren(...panels.filter(Boolean));
  sayMaps(row);
  fillEigenvalues();
  redraw("curve", "spectrum-block", "spectrum-A", "spectrum-G", "map-A", "map-G");
  if (goThere) byId("layer").scrollIntoView();
  if (goThere) byId("chosen").focus({ preventScroll: true });
}

function sayMaps(row) {
  const none = Object.keys(data.maps).length ? "left out of this page, which would be too large with all of them" : "not in this report";
  byId("maps").querySelector(".note").textContent = data.maps[row.name]
    ? `Means over at most 64 × 64 bins, the first group where there are several. What is a million times smaller than the largest is blank.`
    : `The factors of ${row.name} are ${none}; kc.plots.heat_map draws them from the Fisher.`;
}

function fillEigenvalues() {
  if (!byId("eigenvalues").open) return;
  const { spectrum } = rows[chosen];
  const tops = [["block", spectrum.top], ["A", spectrum.A?.top], ["G", spectrum.G?.top]].filter(([, top]) => top?.length);
  const longest = Math.max(0, ...tops.map(([, top]) => top.length));
  const lines = Array.from({ length: longest }, (_, index) => [index + 1, ...tops.map(([, top]) => top[index])]);
  const curves = curveOf(rows[chosen]) ? lambdas.map((lambda, index) => [lambda, curveOf(rows[chosen])[index], percent(spectrum.share_below?.[index])]) : [];
  byId("eigenvalues").querySelector(".grid").replaceChildren(
    ...[["Largest eigenvalues", ["", ...tops.map(([name]) => name)], lines], ["Curve over λ", ["λ", "d_eff", "share below λ"], curves]]
      .filter(([, , body]) => body.length)
      .map(([caption, heads, body]) => element("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: caption }, [plainTable(caption, heads, body)])),
  );
}

// -- all of it --

const table = new LayerTable(byId("layer-table"), COLUMNS, rows, choose);

function wire() {
  wireFilters(table);
  const places = new Map(rows.map((row) => [row.name, row.index]));
  for (const button of document.querySelectorAll("[data-layer]")) {
    if (button.tagName === "BUTTON") button.addEventListener("click", () => places.has(button.dataset.layer) && choose(places.get(button.dataset.layer)));
  }
  byId("chosen").append(...rows.map((row) => element("option", { value: String(row.index), textContent: row.name || "(the model itself)" })));
  byId("chosen").addEventListener("change", (event) => choose(Number(event.target.value), false));
  byId("previous").addEventListener("click", () => choose((chosen + rows.length - 1) % rows.length, false));
  byId("next").addEventListener("click", () => choose((chosen + 1) % rows.length, false));
  byId("lambda").addEventListener("input", (event) => setDamping(Number(event.target.value)));
  byId("eigenvalues").addEventListener("toggle", fillEigenvalues);
  byId("kl-numbers").addEventListener("toggle", fillKL, { once: true });
  for (const needing of document.querySelectorAll("[data-needs]")) {
    needing.hidden = !rows.some((row) => row[needing.dataset.needs]);
  }
  byId("depth-kinds").textContent = symbolsOf(rows).said;
  shorten(document.querySelectorAll(".findings > li"), byId("all-findings"));
}

function fillKL() {
  const lines = rows.filter((row) => row.kl)
    .map((row) => [row.name, percent(row.kl.share), row.kl.predicted, row.kl.measured, row.kl.held_out]);
  byId("kl-numbers").querySelector(".scroll").append(plainTable("KL of each layer", ["layer", "share", "predicted", "measured", "held out"], lines));
}

/** A long list of findings starts with its first. */
function shorten(items, button, most = 12) {
  if (items.length <= most) return;
  const rest = [...items].slice(most);
  for (const item of rest) item.hidden = true;
  button.hidden = false;
  button.textContent = `Show all ${items.length} findings`;
  button.addEventListener("click", () => {
    for (const item of rest) item.hidden = false;
    button.hidden = true;
    rest[0].querySelector("button, p").focus?.();
  });
}

function picture() {
  figure("depth-trace", () => overDepth(rows, (row) => row.spectrum.per_parameter, { title: "Trace per parameter", colours: bySeverity }), choose);
  figure("depth-dimension", () => overDepth(rows, (row) => (dimension(row) === null ? null : dimension(row) / row.parameters), { title: "Share of the parameters", log: false, colours: bySeverity }), choose);
  figure("depth-condition", () => overDepth(rows, damped, { title: "Condition number of the damped block", colours: bySeverity }), choose);
  figure("curve", curve);
  figure("spectrum-block", () => histogram(rows[chosen].spectrum.histogram, "the block", true));
  figure("spectrum-A", () => histogram(rows[chosen].spectrum.A?.histogram, "A", false));
  figure("spectrum-G", () => histogram(rows[chosen].spectrum.G?.histogram, "G", false));
  figure("map-A", () => factorMap("A"));
  figure("map-G", () => factorMap("G"));
  figure("kl-shares", () => overDepth(rows, (row) => row.kl?.share, { title: "KL share", log: false, type: "bar" }), choose);
  figure("kl-scatter", scatter, choose);
}

function begin() {
  // Where none was given, the one that keeps most of the trace.
  at = nearest(data.damping ?? data.whole.calibration?.keeps_trace);
  byId("lambda").value = String(at);
  if (parameters > 0) sayDamping();
  else byId("damping").hidden = true;
  table.follow();
  wire();
  choose(0, false);
  picture();
  const parts = Object.entries(data.whole).filter(([key]) => key in WHOLE);
  const rest = Object.fromEntries(Object.entries(data.whole).filter(([key]) => !(key in WHOLE)));
  const panels = [panel("In all", rowsOf(rest), data.meanings.whole),
    ...parts.map(([key, part]) => panel(WHOLE[key], rowsOf(part), data.meanings[`whole ${key}`]))];
  byId("whole-numbers").replaceChildren(...panels.filter(Boolean));
  const meta = panel("How it was made", rowsOf(data.meta));
  if (meta) byId("whole-numbers").append(meta);
}

begin();
