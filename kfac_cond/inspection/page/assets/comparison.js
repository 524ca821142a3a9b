// The page of two Fishers beside each other.

const rows = data.layers.map((layer, index) => ({ ...layer, index, kind: "", severity: "" }));
const sides = (row) => row.shape.join(" × ");
const weights = (key) => (row) => row.weights?.[key];

const COLUMNS = [
  { key: "name", title: "Layer", className: "name", ascendsFirst: true, value: (row) => row.name, help: "Name in the model" },
  { key: "depth", title: "#", ascendsFirst: true, value: (row) => row.depth, help: "Place in the order of the first model" },
  { key: "trace", title: "Trace ratio", value: (row) => row.trace_ratio, help: "tr F of the second over that of the first" },
  { key: "dimension", title: "d_eff", value: (row) => row.dimension_a, help: "Effective dimension of the first, at the damping above" },
  { key: "change", title: "Change of d_eff", value: (row) => row.dimension_change, help: "Effective dimension of the second less that of the first" },
  { key: "overlap", title: "Overlap", value: (row) => row.overlap, help: "Overlap of the top subspaces of the blocks, from chance to 1" },
  { key: "A", title: "Overlap of A", value: (row) => row.overlap_A, help: "The same of the input sides" },
  { key: "G", title: "Overlap of G", value: (row) => row.overlap_G, help: "The same of the output sides" },
  { key: "cosine", title: "Cosine", value: (row) => row.fisher_overlap, help: "tr(Fa Fb) / (|Fa| |Fb|)" },
  { key: "bures", title: "Bures, relative", value: (row) => row.bures_relative, help: "Squared Bures distance over both traces" },
  { key: "moved", title: "Weights moved", needs: "weights", value: weights("relative"), text: percent, help: "|d| / |weights of the first|" },
  { key: "forgetting", title: "Forgetting risk", needs: "weights", value: weights("forgetting"), help: "½ dᵀ Fa d: KL per loss term, to second order" },
  { key: "shape", title: "Shape", value: (row) => row.parameters, text: (_, row) => sides(row), help: "Of the layer's matrix; sorted by parameters" },
].filter((column) => !column.needs || rows.some((row) => row[column.needs]));
for (const column of COLUMNS) column.text ??= written;

const table = new LayerTable(byId("layer-table"), COLUMNS, rows, (index) => choose(index));

function choose(index, goThere = true) {
  const row = rows[index];
  const { name, index: _, kind, severity, remark, shape, depth, weights: moved, ...numbers } = row;
  byId("layer-facts").textContent = `${name || "(the model itself)"}: ${sides(row)}, ${written(row.parameters)} parameters. ${remark}`;
  const panels = [panel("The two blocks", inWords(numbers), data.meanings.layer), moved ? panel("The weights", inWords(moved), data.meanings.weights) : null];
  byId("layer-numbers").replaceChildren(...panels.filter(Boolean));
  table.mark(index);
  if (!goThere) return;
  byId("layer").scrollIntoView();
  byId("layer-facts").focus({ preventScroll: true });
}

const WORDS = {
  start: "length of the weights of the first", norm: "length of the change d", relative: "one over the other",
  forgetting: "½ dᵀ F d, F of the first", back: "½ dᵀ F d, F of the second",
};

/** Rows in words: a and b are the first and the second. */
const inWords = (numbers) => rowsOf(numbers).map(([label, text]) =>
  [WORDS[label] ?? label.replace(/ a$/, " of the first").replace(/ b$/, " of the second"), text]);

const quoted = (row) => `‘${row.name || "the model itself"}’`;

/** The layers that stand out, in sentences. */
function sentences() {
  const largest = (value) => rows.filter((row) => isShown(value(row))).sort((a, b) => value(b) - value(a));
  const said = [];
  const { trace_a, trace_b, dimension_a, dimension_b, weights: moved } = data.whole;
  said.push(`The trace went from ${written(trace_a)} to ${written(trace_b)}, the effective dimension at damping ${written(data.damping)} from ${written(dimension_a)} to ${written(dimension_b)}.`);
  const turned = largest((row) => 1 - row.overlap).slice(0, 3);
  if (turned.length) {
    said.push(`The top subspaces turned most in ${turned.map((row) => `${quoted(row)} (overlap ${written(row.overlap)})`).join(", ")}.`);
  }
  if (moved) {
    const risky = largest((row) => row.weights?.forgetting).slice(0, 3);
    said.push(`The weights moved by ${percent(moved.relative)} of their length. By the Fisher of the first this changes its predictions by a KL of ${written(moved.forgetting)} per loss term`
      + (moved.forgetting > 0 ? `, most of it in ${risky.map((row) => `${quoted(row)} (${percent(row.weights.forgetting / moved.forgetting)})`).join(", ")}.` : "."));
  }
  return said;
}

const DEPTHS = {
  "depth-trace": [(row) => row.trace_ratio, "Trace ratio", true],
  "depth-dimension": [(row) => row.dimension_change / row.parameters, "Change of d_eff / parameters", false],
  "depth-overlap": [(row) => row.overlap, "Overlap of the top subspaces", false],
  "depth-cosine": [(row) => row.fisher_overlap, "Cosine of the blocks", false],
  "depth-bures": [(row) => row.bures_relative, "Relative Bures distance", false],
  "depth-forgetting": [weights("forgetting"), "Forgetting risk", true],
};

function begin() {
  byId("sentences").append(...sentences().map((text) => element("li", { textContent: text })));
  byId("kind").hidden = true;
  document.querySelector("label[for=kind]").hidden = true;
  wireFilters(table);
  choose(0, false);
  const { weights: moved, ...whole } = data.whole;
  byId("whole-numbers").append(...[
    panel("All layers together", inWords(whole), data.meanings.whole), moved ? panel("The weights", inWords(moved)) : null,
    ...["a", "b"].map((which) => panel(which === "a" ? "How the first was made" : "How the second was made", rowsOf(data.meta[which] ?? {}))),
  ].filter(Boolean));
  for (const [id, [value, title, log]] of Object.entries(DEPTHS)) {
    if (rows.some((row) => isShown(value(row)))) figure(id, () => overDepth(rows, value, { title, log }), choose);
    else byId(id).closest("figure").hidden = true;
  }
}

begin();
