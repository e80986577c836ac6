// Figures: one plot for each panel that the filters leave, drawn when it comes into view.

const HEIGHT = { lines: 330, front: 330, spectrum: 330 };
const TILE = { width: 142, height: 166, words: 46 }; // pixels of a map with its words
const ROW = 34; // pixels of a row of the crossover chart
const STRIP_ROW = 0.055; // of the height, for a series that failed
let watcher;

const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const dark = () => matchMedia("(prefers-color-scheme: dark)").matches && !matchMedia("print").matches;
const colourOf = (name, theme) => data.colours[name][theme];

function colours(theme) {
  const [ink, muted, grid, paper] = ["--c0", "--c1", "--c2", "--c3"].map((name) => colourOf(name, theme));
  return { ink, muted, grid, paper, of: (series) => colourOf(data.series[series].colour, theme) };
}

function hoverText(entry) {
  const [series, length, , , text, , launched, record, count] = entry;
  const lines = [`<b>${escaped(data.series[series].name)}</b>`, `${tokens(length)} tokens: ${escaped(text)}`];
  if (launched) lines.push("launch-bound");
  return [...lines, `record ${escaped(recordName(record, count))}`].join("<br>");
}

function shownEntries(panel) {
  const fixed = !["lines", "brackets"].includes(panel.kind); // stands at one length: the range of lengths does not apply
  return panel.entries.filter((entry) => seriesShown(entry[0]) && (fixed || lengthShown(entry[1])));
}

function bySeries(entries) {
  const grouped = new Map();
  for (const entry of entries) {
    if (!grouped.has(entry[0])) grouped.set(entry[0], []);
    grouped.get(entry[0]).push(entry);
  }
  return grouped;
}

function interval(values, at, colour) {
  const middle = values.map(([value]) => at(value));
  return {
    type: "data", symmetric: false, thickness: 1, width: 0, color: colour,
    array: values.map(([value, , high], i) => Math.max(0, (high ?? value) - middle[i])),
    arrayminus: values.map(([value, low], i) => Math.max(0, middle[i] - at(low ?? value))),
  };
}

function axis(frame, look) {
  const range = frame.log === false ? frame.range : frame.range.map(Math.log10);
  return {
    type: frame.log === false ? "linear" : "log", range, tickvals: frame.ticks[0], ticktext: frame.ticks[1],
    fixedrange: true, gridcolor: look.grid, zeroline: false, showline: false, ticks: "", automargin: true,
  };
}

// The axis of lengths ends with the lengths that the panels beside each other show.
function narrowed(frame, span) {
  const inside = frame.ticks[0].map((_, i) => i).filter((i) => span[0] <= frame.ticks[0][i] && frame.ticks[0][i] <= span[1]);
  const margin = Math.max(1.25, (span[1] / span[0]) ** 0.06);
  return { range: [span[0] / margin, span[1] * margin], ticks: frame.ticks.map((one) => inside.map((i) => one[i])) };
}

function spanOf(panels) {
  const lengths = panels.flatMap((panel) => shownEntries(panel).map((entry) => entry[1]));
  return lengths.reduce(([low, high], length) => [Math.min(low, length), Math.max(high, length)], [Infinity, 1]);
}

function mark(series, colour, size = 8) {
  return { symbol: data.series[series].symbol, size, color: colour, line: { color: colour, width: 1 } };
}

function trace(entries, extra) {
  const name = escaped(data.series[entries[0][0]].name);
  return { type: "scatter", name, text: entries.map(hoverText), hovertemplate: "%{text}<extra></extra>", ...extra };
}

function lines(panel, look) {
  const { x, y, trivial } = panel.frame;
  const at = (value) => Math.max(value, y.edge);
  const entries = shownEntries(panel);
  const failed = bySeries(entries.filter((entry) => !entry[2]));
  const strip = failed.size ? Math.min(failed.size * STRIP_ROW, 0.4) + 0.02 : 0;
  const traces = [];
  const told = trivial.filter(([length]) => lengthShown(length));
  if (told.length) {
    traces.push({
      type: "scatter", mode: "lines", name: "mean of the visible values", x: told.map(([length]) => length),
      y: told.map(([, value]) => at(value)), line: { color: look.muted, width: 4 }, opacity: 0.45,
      text: told.map(([length, , text]) => `mean of the visible values<br>${tokens(length)} tokens: ${text}`),
      hovertemplate: "%{text}<extra></extra>",
    });
  }
  for (const [series, own] of bySeries(entries.filter((entry) => entry[2]))) {
    const colour = look.of(series);
    const values = own.map((entry) => entry[2]);
    traces.push(trace(own, {
      mode: "lines+markers", x: own.map((entry) => entry[1]), y: values.map(([value]) => at(value)),
      error_y: interval(values, at, colour), line: { color: colour, width: 1.8, dash: data.series[series].dash },
      marker: mark(series, colour),
    }));
  }
  const ringed = entries.filter((entry) => entry[2] && entry[6]);
  if (ringed.length) {
    traces.push({
      type: "scatter", mode: "markers", x: ringed.map((e) => e[1]), y: ringed.map((e) => at(e[2][0])), name: "launch-bound",
      hoverinfo: "skip", marker: { symbol: "circle-open", size: 16, color: look.muted },
    });
  }
  [...failed].forEach(([series, own], row) => traces.push(trace(own, {
    mode: "lines+markers", yaxis: "y2", x: own.map((entry) => entry[1]), y: own.map(() => row), showlegend: false,
    line: { color: look.of(series), width: 1, dash: "dot" },
    marker: mark(series, look.of(series), 6),
  })));
  const words = [...failed].map(([, own], row) => ({
    x: Math.log10(own[0][1]), y: row, yref: "y2", text: own[0][5].replace("_error", ""), showarrow: false, font: { size: 11 },
    xanchor: "right", xshift: -6, bgcolor: look.paper, borderpad: 0,
  }));
  const layout = {
    xaxis: { ...axis({ ...narrowed(x, panel.span) }, look), anchor: "y" }, yaxis: { ...axis(y, look), domain: [0, 1 - strip] },
    annotations: failed.size <= 7 ? words : [], // with more rows the words would overlap
  };
  if (strip) {
    layout.yaxis2 = {
      domain: [1 - strip + 0.02, 1], range: [failed.size - 0.5, -0.5], fixedrange: true, showticklabels: false,
      showgrid: false, zeroline: false, anchor: "x",
    };
  }
  return { traces, layout };
}

function front(panel, look) {
  const { x, y, trivial, distances } = panel.frame;
  const across = (value) => Math.max(value, x.edge), at = (value) => Math.max(value, y.edge);
  const traces = [];
  if (trivial) {
    traces.push({
      type: "scatter", mode: "lines", x: x.range, y: [at(trivial[0]), at(trivial[0])], line: { color: look.muted, width: 4 },
      opacity: 0.45, name: "mean of the visible values", hovertemplate: `mean of the visible values: ${trivial[1]}<extra></extra>`,
    });
  }
  const entries = shownEntries(panel);
  const stair = panel.frame.front.map((series) => entries.find((entry) => entry[0] === series)).filter(Boolean);
  traces.push({
    type: "scatter", mode: "lines", name: "Pareto front", x: stair.map((e) => across(e[3][0])), y: stair.map((e) => at(e[2][0])),
    line: { color: look.muted, width: 1.4, shape: "hv" }, hoverinfo: "skip",
  });
  for (const entry of entries) {
    const colour = look.of(entry[0]);
    traces.push(trace([entry], {
      mode: "markers", x: [across(entry[3][0])], y: [at(entry[2][0])], marker: mark(entry[0], colour, 10),
      opacity: distances.includes(entry[0]) ? 0.45 : 1,
      error_y: interval([entry[2]], at, colour), error_x: interval([entry[3]], across, colour),
    }));
  }
  return { traces, layout: { xaxis: axis(x, look), yaxis: axis(y, look) } };
}

function spectrum(panel, look) {
  const { x, y, exact } = panel.frame;
  const at = (value) => Math.max(value, y.edge);
  const traces = [{
    type: "scatter", mode: "lines", x: exact.map((_, i) => i + 1), y: exact.map(at), line: { color: look.muted, width: 5 },
    opacity: 0.45, name: "exact softmax", hovertemplate: "exact softmax<br>number %{x}: %{y:.3g} of the largest<extra></extra>",
  }];
  for (const [series, own] of bySeries(shownEntries(panel))) {
    traces.push(trace(own, {
      mode: "lines+markers", x: own.map((entry) => entry[3][0]), y: own.map((entry) => at(entry[2][0])),
      line: { color: look.of(series), width: 1.8, dash: data.series[series].dash },
      marker: { ...mark(series, look.of(series), 6), maxdisplayed: 9 },
    }));
  }
  return { traces, layout: { xaxis: axis(x, look), yaxis: axis(y, look) } };
}

// Tiles of softmax and of the mechanisms that the filters leave, as many beside each other as fit.
function maps(panel, look, width) {
  const entries = new Map(shownEntries(panel).map((entry) => [entry[0], entry]));
  const tiles = panel.frame.tiles.filter((tile) => tile.series === null || entries.has(tile.series));
  const columns = Math.max(1, Math.floor((width - 20) / TILE.width)), rows = Math.ceil(tiles.length / columns);
  const traces = [], annotations = [];
  const { words } = TILE, high = TILE.height - words - 8, wide = TILE.width - 12;
  tiles.forEach((tile, place) => {
    const left = (place % columns) * TILE.width, top = Math.floor(place / columns) * TILE.height;
    const name = tile.series === null ? "exact softmax" : data.series[tile.series].name, entry = entries.get(tile.series);
    const largest = Math.max(...tile.weights.flat().map(Math.abs)) || 1;
    const upTo = (starts, i) => (i + 1 < starts.length ? `–${starts[i + 1] - 1}` : " on");
    traces.push({
      type: "heatmap", showscale: false, zmin: -1, zmax: 1, xgap: 0, ygap: 0, name: escaped(name),
      colorscale: [[0, colourOf("--c5", dark() ? 1 : 0)], [0.5, look.paper], [1, colourOf("--c4", dark() ? 1 : 0)]],
      x: tile.keys.map((_, i) => left + (i + 0.5) * (wide / tile.keys.length)),
      y: tile.queries.map((_, i) => top + words + (i + 0.5) * (high / tile.queries.length)),
      z: tile.weights.map((row) => row.map((weight) => Math.sign(weight) * Math.sqrt(Math.abs(weight) / largest))),
      hovertext: tile.weights.map((row, i) => row.map((weight, j) =>
        `<b>${escaped(name)}</b><br>queries ${tile.queries[i]}${upTo(tile.queries, i)}, keys ${tile.keys[j]}${upTo(tile.keys, j)}: ${weight}`)),
      hovertemplate: "%{hovertext}<extra></extra>",
    });
    if (entry) {
      traces.push(trace([entry], { mode: "markers", x: [left + wide / 2], y: [top + words / 2], marker: { size: 24, opacity: 0 } }));
    }
    [cut(name, 20), ...tile.lines].forEach((text, line) => annotations.push({
      x: left, y: top + 14 * (line + 1), xref: "x", yref: "y", text: escaped(text), showarrow: false, xanchor: "left", yanchor: "bottom",
      xshift: -2, borderpad: 0, font: { size: line ? 9.5 : 12, color: line ? look.muted : look.ink },
    }));
  });
  const bare = { fixedrange: true, visible: false };
  const layout = {
    xaxis: { ...bare, range: [0, width - 20] }, yaxis: { ...bare, range: [rows * TILE.height, 0] }, annotations,
  };
  return { traces, layout, height: rows * TILE.height + 38 };
}

const cut = (text, most) => (text.length <= most ? text : `${text.slice(0, most - 1)}…`);

function brackets(panel, look, width) {
  const grouped = bySeries(shownEntries(panel));
  const rows = panel.frame.rows.filter((row) => seriesShown(row.series));
  const traces = [], annotations = [];
  rows.forEach((row, place) => {
    const colour = look.of(row.series), [low, high] = row.bracket;
    const bar = (from, to, style) => traces.push({
      type: "scatter", mode: "lines", x: [from, to], y: [place, place], hoverinfo: "skip", showlegend: false, ...style,
    });
    if (row.compared) bar(row.compared[0], row.compared[1], { line: { color: look.muted, width: 1 } });
    if (high !== null) {
      if (low) bar(low, high, { line: { color: colour, width: 7 }, opacity: 0.35 });
      bar(high, row.compared[1], { line: { color: colour, width: 7 } });
    }
    const own = grouped.get(row.series) ?? [];
    if (own.length) traces.push(trace(own, {
      mode: "markers", x: own.map((entry) => entry[1]), y: own.map(() => place), showlegend: false,
      marker: mark(row.series, colour, 7),
    }));
    const words = { y: place, yshift: 13, showarrow: false, xref: "paper" };
    annotations.push({ ...words, x: 0, xanchor: "left", text: escaped(cut(data.series[row.series].name, Math.floor((width - 120) / 7.5))) },
      { ...words, x: 1, xanchor: "right", text: escaped(row.short) });
  });
  const yaxis = { range: [rows.length - 0.5, -0.9], fixedrange: true, showticklabels: false, showgrid: false, zeroline: false };
  return { traces, layout: { xaxis: axis(narrowed(panel.frame.x, panel.span), look), yaxis, annotations }, height: ROW * (rows.length + 1) };
}

const KINDS = { lines, front, brackets, spectrum, maps };

function picture(panel, theme, width) {
  const look = colours(theme);
  const { traces, layout, height } = KINDS[panel.kind](panel, look, width);
  return {
    traces, layout: {
      ...layout, width, height: Math.max(120, height ?? HEIGHT[panel.kind]), margin: { l: 8, r: 12, t: 8, b: 30 }, showlegend: false,
      hovermode: "closest", hoverdistance: 24, dragmode: false, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: look.ink, size: 13, family: getComputedStyle(document.body).fontFamily },
      hoverlabel: { bgcolor: look.paper, bordercolor: look.muted, font: { color: look.ink, size: 13 }, align: "left", namelength: -1 },
    },
  };
}

function draw(figure, width = figure.clientWidth) {
  const { traces, layout } = picture(figure.panel, dark() ? 1 : 0, width);
  const plot = figure.querySelector(".plot");
  figure.drawn = true;
  return Plotly.react(plot, traces, layout, { displayModeBar: false, displaylogo: false, scrollZoom: false, doubleClick: false });
}

function makeFigure(panel) {
  const height = panel.kind === "brackets" ? ROW * (panel.frame.rows.length + 1) : HEIGHT[panel.kind] ?? TILE.height;
  const files = element("span", { class: "files" }, ...["CSV", "PNG", "SVG"].map((format) =>
    element("button", { type: "button", onclick: () => save(panel, format.toLowerCase()), "aria-label": `${format} of ${panel.title}` }, format)));
  const plot = element("div", { class: "plot", style: `min-height:${height}px`, tabindex: "0", role: "application",
    "aria-label": `${panel.heading}: ${panel.title}. Arrow keys go from point to point.` });
  const figure = element("figure", {}, element("figcaption", {}, element("span", {}, panel.title), files), plot,
    element("p", { class: "readout", "aria-live": "polite" }), element("p", { class: "note" }, panel.note));
  figure.panel = panel;
  plot.addEventListener("keydown", (event) => walk(event, figure));
  return figure;
}

// Left and right go along a line, up and down from one to the next; what is hovered is also read out.
function walk(event, figure) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const plot = figure.querySelector(".plot");
  const curves = (plot.data ?? []).map((one, index) => [one, index]).filter(([one]) => Array.isArray(one.text));
  if (!(event.key in steps) || !curves.length) return;
  event.preventDefault();
  const [rows, columns] = steps[event.key], [row, column] = figure.place ?? [0, -columns];
  const nextRow = (row + rows + curves.length) % curves.length, [curve, number] = curves[nextRow];
  const nextColumn = Math.min(Math.max(column + columns, 0), curve.x.length - 1);
  figure.place = [nextRow, nextColumn];
  Plotly.Fx.hover(plot, [{ curveNumber: number, pointNumber: nextColumn }], curve.yaxis === "y2" ? "xy2" : "xy");
  const holder = document.createElement("div");
  holder.innerHTML = curve.text[nextColumn].replaceAll("<br>", "; ");
  figure.querySelector(".readout").textContent = holder.textContent;
}

function showCharts() {
  watcher?.disconnect();
  watcher = new IntersectionObserver((seen) => {
    for (const { target, isIntersecting } of seen) if (isIntersecting && !target.drawn) draw(target);
  }, { rootMargin: "400px" });
  for (const chart of data.charts) {
    const holder = document.querySelector(`[data-chart="${CSS.escape(chart.slug)}"]`);
    for (const old of holder.querySelectorAll(".js-plotly-plot")) Plotly.purge(old);
    const panels = chart.panels.filter(panelShown);
    const common = { slug: chart.slug, heading: chart.heading, span: spanOf(panels) };
    const figures = panels.map((panel) => makeFigure(Object.assign(panel, common)));
    const named = new Set(panels.flatMap((panel) => shownEntries(panel).map((entry) => entry[0])));
    holder.replaceChildren(...figures);
    if (!panels.length) holder.append(element("p", { class: "muted" }, `Nothing with these filters; Reset shows ${chart.panels.length} panels.`));
    for (const figure of figures) watcher.observe(figure);
    for (const item of document.querySelectorAll(`[data-legend="${CSS.escape(chart.slug)}"] li`)) {
      item.hidden = !named.has(Number(item.dataset.series));
    }
  }
}

function redraw(width) {
  for (const figure of document.querySelectorAll("figure")) if (figure.panel && (figure.drawn || width)) draw(figure, width);
}

function followTheme() {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());
  let resized;
  addEventListener("resize", () => {
    clearTimeout(resized);
    resized = setTimeout(() => redraw(), 150);
  });
  // on paper nothing is folded, nothing waits for being scrolled to, and two figures stand side by side
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.fill?.();
    redraw(340);
  });
  addEventListener("afterprint", () => redraw());
}
