// A table of layers: sorted by its heads, filtered by its fields, with cells that follow the damping.

/** Rows beyond these wait for a button: a page of many thousand rows is slow to lay out. */
const MOST_ROWS = 1000;

class LayerTable {
  /**
   * @param columns {key, title, help, value: row => sortable, text: value => string, follows: whether λ changes it}
   * @param rows what the columns read; each has a name and a kind
   * @param choose called with the index of a row whose name is pressed
   */
  constructor(table, columns, rows, choose) {
    Object.assign(this, { table, columns, rows, choose, shownRows: MOST_ROWS, sorted: null, descending: false });
    this.makeHead();
    this.lines = rows.map((row, index) => this.makeLine(row, index));
    this.order = rows.map((_, index) => index);
    this.kept = () => true;
    this.show();
  }

  makeHead() {
    const heads = this.columns.map((column) => {
      const button = element("button", { type: "button", textContent: column.title, title: column.help });
      button.addEventListener("click", () => this.sort(column.key));
      const head = element("th", { scope: "col", className: column.className ?? "" }, [button]);
      head.setAttribute("aria-sort", "none");
      return (column.head = head);
    });
    this.table.tHead.replaceChildren(element("tr", {}, heads));
  }

  makeLine(row, index) {
    const cells = this.columns.map((column, at) => {
      if (at > 0) return element("td", { className: column.className ?? "", textContent: column.text(column.value(row), row) });
      const button = element("button", { type: "button", className: "link" }, [breakable(row.name)]);
      button.addEventListener("click", () => this.choose(index));
      return element("th", { scope: "row" }, [button]);
    });
    return element("tr", { className: row.severity ?? "", dataset: { layer: row.name } }, cells);
  }

  /** Sort by a column; again turns it round. Numbers start with the largest, what has none comes last. */
  sort(key) {
    const column = this.columns.find((one) => one.key === key);
    this.descending = this.sorted === key ? !this.descending : !column.ascendsFirst;
    this.sorted = key;
    for (const one of this.columns) {
      one.head.setAttribute("aria-sort", one.key !== key ? "none" : this.descending ? "descending" : "ascending");
    }
    this.reorder();
  }

  reorder() {
    const column = this.columns.find((one) => one.key === this.sorted);
    if (column) {
      const values = this.rows.map(column.value);
      const sign = this.descending ? -1 : 1;
      this.order.sort((a, b) => compared(values[a], values[b], sign) || a - b);
    }
    this.show();
  }

  filter(kept) {
    this.kept = kept;
    this.show();
  }

  show() {
    const kept = this.order.filter((index) => this.kept(this.rows[index]));
    const shown = kept.slice(0, this.shownRows);
    this.table.tBodies[0].replaceChildren(...shown.map((index) => this.lines[index]));
    const counted = kept.length === this.rows.length ? `${kept.length} layers` : `${kept.length} of ${this.rows.length} layers`;
    byId("count").textContent = kept.length === 0 ? "no layer fits these filters" : counted;
    const more = byId("more");
    more.hidden = shown.length === kept.length;
    more.textContent = `Show all ${kept.length}`;
    more.onclick = () => {
      this.shownRows = Infinity;
      this.show();
    };
  }

  /** Write the columns that follow λ again. */
  follow() {
    this.columns.forEach((column, at) => {
      if (!column.follows) return;
      this.rows.forEach((row, index) => {
        this.lines[index].cells[at].textContent = column.text(column.value(row), row);
      });
    });
    if (this.columns.some((column) => column.follows && column.key === this.sorted)) this.reorder();
  }

  mark(index) {
    this.lines.forEach((line, at) => line.classList.toggle("chosen", at === index));
  }
}

function compared(a, b, sign) {
  const [noA, noB] = [a, b].map((value) => value === null || value === undefined || Number.isNaN(value));
  if (noA || noB) return noA - noB;
  return sign * (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
}

/** The fields above the table. */
function wireFilters(table) {
  const kinds = [...new Set(table.rows.map((row) => row.kind))].sort();
  byId("kind").append(...kinds.map((kind) => element("option", { value: kind, textContent: kind })));
  byId("only-found-label").hidden = !table.rows.some((row) => row.severity);
  const apply = () => {
    const named = nameFilter(byId("filter").value);
    const kind = byId("kind").value;
    const found = byId("only-found").checked;
    table.filter((row) => named(row.name) && (!kind || row.kind === kind) && (!found || row.severity));
  };
  for (const id of ["filter", "kind", "only-found"]) byId(id).addEventListener("input", apply);
}
