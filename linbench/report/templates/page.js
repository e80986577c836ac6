"use strict";
// State of the filters, and everything that follows from it. Words and numbers come ready from the report.

const FACETS = { machine: "Machine", device: "Device", dtype: "Dtype", mask: "Mask", pass: "Pass", shape: "Shape" };
const MOST_AT_FIRST = 4; // settings that a page shows without being asked
const state = { facets: {}, inputs: "", shortest: 0, longest: Infinity, length: "", hidden: new Set() };
let data;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

function tokens(length) {
  for (const [suffix, size] of [["M", 2 ** 20], ["k", 2 ** 10]]) {
    if (length >= size && length % size === 0) return (length / size).toLocaleString("en") + suffix;
  }
  return length.toLocaleString("en");
}

function swatch(series) {
  const holder = document.createElement("template");
  holder.innerHTML = `<svg class="swatch" aria-hidden="true"><use href="#s${Number(series)}"/></svg>`;
  return holder.content.firstChild;
}

const recordName = (index, count) => data.records[index] + (count > 1 ? ` and ${count - 1} more` : "");
const settingShown = (index) =>
  Object.entries(state.facets).every(([facet, wanted]) => !wanted || data.settings[index][facet] === wanted);
const panelShown = (panel) =>
  settingShown(panel.setting) && (panel.inputs === null || state.inputs === "" || panel.inputs === Number(state.inputs));
const seriesShown = (index) => !state.hidden.has(data.series[index].mechanism);
const lengthShown = (length) => state.shortest <= length && length <= state.longest;

function choice(label, options, value, change) {
  const select = element("select", { onchange: (event) => (change(event.target.value), update()) });
  for (const [key, text] of options) select.append(element("option", { value: key }, text));
  select.value = value;
  return element("label", { class: "choice" }, label, select);
}

function allLengths() {
  const found = new Set();
  for (const league of data.leagues) for (const [length] of league.tables) found.add(length);
  return [...found].sort((a, b) => a - b);
}

function buildFilters() {
  const form = document.getElementById("filters");
  form.replaceChildren();
  for (const [facet, label] of Object.entries(FACETS)) {
    const values = [...new Set(data.settings.map((setting) => setting[facet]))];
    if (values.length < 2) continue;
    const options = [["", "all"], ...values.map((value) => [value, value])];
    form.append(choice(label, options, state.facets[facet] ?? "", (value) => (state.facets[facet] = value)));
  }
  if (data.inputs.length > 1) {
    const options = [["", "all"], ...data.inputs.map((name, index) => [String(index), name])];
    form.append(choice("Inputs", options, state.inputs, (value) => (state.inputs = value)));
  }
  const lengths = allLengths();
  const named = lengths.map((length) => [String(length), tokens(length)]);
  if (lengths.length > 1) {
    form.append(
      choice("From", named, String(lengths[0]), (value) => (state.shortest = Number(value))),
      choice("to", named, String(lengths.at(-1)), (value) => (state.longest = Number(value))),
      choice("Table at", [["", "common length"], ...named], state.length, (value) => (state.length = value)),
    );
  }
  form.append(mechanismFilter());
  form.append(element("button", { type: "button", onclick: reset }, "Reset"));
  form.hidden = false;
}

function mechanismFilter() {
  const names = [...new Set(data.series.map((series) => series.mechanism))];
  const boxes = names.map((name) => {
    const box = element("input", { type: "checkbox", value: name });
    box.checked = !state.hidden.has(name);
    const first = data.series.findIndex((series) => series.mechanism === name);
    return element("label", {}, box, swatch(first), name);
  });
  const list = element("div", { class: "boxes" }, ...boxes);
  const read = () => {
    const unchecked = [...list.querySelectorAll("input:not(:checked)")].map((box) => box.value);
    state.hidden = new Set(unchecked);
    update();
  };
  const all = (checked) => () => {
    for (const box of list.querySelectorAll("input")) box.checked = checked;
    read();
  };
  list.addEventListener("change", read);
  const buttons = element("div", {},
    element("button", { type: "button", onclick: all(true) }, "All"),
    element("button", { type: "button", onclick: all(false) }, "None"));
  return element("details", { class: "mechanisms" }, element("summary", {}, `Mechanisms (${names.length})`), buttons, list);
}

function reset() {
  Object.assign(state, { facets: {}, inputs: "", shortest: 0, longest: Infinity, length: "", hidden: new Set() });
  buildFilters();
  update();
}

// Of a report with many settings only those like the one with the most tables are shown until a filter says otherwise.
function narrow() {
  if (data.settings.length <= MOST_AT_FIRST) return;
  const rows = (setting) => data.leagues.filter((league) => league.setting === setting)
    .reduce((sum, league) => sum + league.tables.reduce((inner, table) => inner + table[3].length, 0), 0);
  const sizes = data.settings.map((_, index) => rows(index));
  const largest = data.settings[sizes.indexOf(Math.max(...sizes))];
  for (const facet of ["machine", "device", "dtype", "pass", "shape"]) state.facets[facet] = largest[facet];
}

function update() {
  let shown = 0;
  data.settings.forEach((_, index) => (shown += settingShown(index) ? 1 : 0));
  for (const card of document.querySelectorAll("[data-setting]")) card.hidden = !settingShown(Number(card.dataset.setting));
  showLeagues();
  showCharts();
  const series = data.series.filter((_, index) => seriesShown(index)).length;
  document.getElementById("shown").textContent =
    `Shown: ${shown} of ${data.settings.length} settings, ${series} of ${data.series.length} series.`;
}

// Gzip in base64 keeps the library and large data small; every browser since 2023 can read it.
async function unpack(id) {
  const holder = document.getElementById(id);
  if (holder.type !== "text/plain") return holder.textContent;
  const bytes = Uint8Array.from(atob(holder.textContent.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

async function start() {
  const texts = await Promise.all([unpack("data"), unpack("library")]);
  data = JSON.parse(texts[0]);
  document.head.append(Object.assign(document.createElement("script"), { textContent: texts[1] }));
  narrow();
  buildFilters();
  buildGrids();
  update();
  followTheme();
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  const words = "This browser cannot show the tables and figures of this page; report.md beside it has them.";
  document.getElementById("shown").textContent = `${words} (${error.message})`;
  throw error;
});
