// League tables and the tables of sections: made when they are opened, sorted by a button in every heading.

const LEAGUE = ["Latency [95 %]", "× exact", "Share of roofline", "Memory", "Skill", "Relative error", "Excess", "Kind"];
const ROOFLINE = 2, KIND = 7;
const FACTORS = {
  ns: 1e-6, "µs": 1e-3, ms: 1, s: 1e3, B: 1, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, k: 2 ** 10, M: 2 ** 20,
};

// What a cell is sorted by: the number that it begins with, in its unit; else its text.
function sortValue(text) {
  const found = /^[≈± ]*([−-]?[\d.,]+(?:e[−+-]?\d+)?)\s*(ns|µs|ms|s\b|KiB|MiB|GiB|B\b|k\b|M\b)?/.exec(text);
  if (!found) return text === "–" || text === "" ? null : text.toLowerCase();
  return Number(found[1].replaceAll(",", "").replaceAll("−", "-")) * (FACTORS[found[2]] ?? 1);
}

function compare(a, b, falling) {
  if (a === null || b === null) return (a === null) - (b === null); // what is missing stays last
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  const order = typeof a === "number" ? a - b : a.localeCompare(b);
  return falling ? -order : order;
}

function sortBy(table, column, falling) {
  const rows = [...table.tBodies[0].rows];
  const key = (row) => (row.dataset.failed ? null : sortValue(row.cells[column]?.textContent.trim() ?? ""));
  const keyed = rows.map((row) => [key(row), row]);
  keyed.sort((one, other) => compare(one[0], other[0], falling));
  table.tBodies[0].append(...keyed.map(([, row]) => row));
  [...table.tHead.rows[0].cells].forEach((head, index) => {
    if (index === column) head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

function sortable(label, columns, rows, texts) {
  const heads = columns.map((name, index) => {
    const button = element("button", { type: "button", onclick: (event) => {
      const head = event.target.closest("th");
      sortBy(head.closest("table"), index, head.getAttribute("aria-sort") === "ascending");
    } }, name);
    return element("th", { scope: "col", class: texts.includes(index) ? "text" : null }, button);
  });
  const head = element("thead", {}, element("tr", {}, ...heads));
  return element("table", { "aria-label": label }, head, element("tbody", {}, ...rows));
}

function leagueRow(row, kept) {
  const [series, variant, cells, status, reason, best, failed, record, count] = row;
  const words = element("span", {}, `${variant} `, element("i", {}, data.series[series].implementation));
  const made = element("tr", { "data-failed": failed ? "yes" : null, title: `record ${recordName(record, count)}` },
    element("td", {}, element("div", { class: "name" }, swatch(series), words)));
  if (failed) made.append(element("td", { class: "reason", colspan: kept.length }, reason));
  else for (const index of kept) {
    const inside = best.includes(index) ? element("b", {}, cells[index]) : cells[index];
    made.append(element("td", { class: index === KIND ? "text" : null }, inside));
  }
  made.append(element("td", { class: "text" }, status));
  return made;
}

function leagueTable(league) {
  const wanted = (table) => (state.length ? table[0] === Number(state.length) : table[2]);
  const table = league.tables.find(wanted);
  if (!table) return element("p", { class: "muted" }, `Nothing was run at ${tokens(Number(state.length))} tokens here.`);
  const [, length, , every] = table;
  const rows = every.filter((row) => seriesShown(row[0]));
  const kept = LEAGUE.map((_, index) => index).filter((index) => index !== ROOFLINE || rows.some((row) => row[2][ROOFLINE] !== "–"));
  const columns = ["Mechanism, implementation", ...kept.map((index) => LEAGUE[index]), "Status"];
  const label = `${league.heading}, ${length} tokens`;
  const made = sortable(label, columns, rows.map((row) => leagueRow(row, kept)), [0, columns.length - 2, columns.length - 1]);
  return element("div", {}, element("p", { class: "muted" }, `At ${length} tokens, ${rows.length} ${rows.length === 1 ? "row" : "rows"}.`),
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, made));
}

function showLeagues() {
  const holder = document.getElementById("leagues");
  if (!holder) return;
  const leagues = data.leagues.filter(panelShown);
  const rows = (league) => Math.max(...league.tables.map((table) => table[3].length));
  leagues.sort((one, other) => rows(other) - rows(one)); // the fullest table stands first, and opened
  holder.replaceChildren(...leagues.map((league, index) =>
    folded(league.heading, () => leagueTable(league), index === 0)));
  if (!leagues.length) holder.append(element("p", { class: "muted" }, "Nothing was run with these filters."));
}

// Content that is made when it is first opened: a page of a hundred thousand rows opens at once.
function folded(heading, make, open) {
  const details = element("details", {}, element("summary", {}, heading));
  details.fill = () => {
    details.fill = () => {};
    details.append(make());
  };
  details.addEventListener("toggle", () => details.open && details.fill());
  if (open) {
    details.open = true;
    details.fill();
  }
  return details;
}

function buildGrids() {
  for (const [slug, grids] of Object.entries(data.grids)) {
    const holder = document.querySelector(`[data-grids="${CSS.escape(slug)}"]`);
    holder.append(...grids.map(([caption, columns, rows], index) => folded(caption, () => {
      const made = rows.map((cells) => element("tr", {},
        ...cells.map((cell, place) => element("td", { class: place ? null : "text" }, cell))));
      const region = { class: "scroll", tabindex: "0", role: "region", "aria-label": caption };
      return element("div", region, sortable(caption, columns, made, [0]));
    }, index === 0)));
  }
}
