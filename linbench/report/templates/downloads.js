// The numbers of a panel as CSV, and the panel itself as a picture on white.

function download(name, url) {
  const link = element("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

const quoted = (value) => {
  const text = value === null || value === undefined ? "" : String(value);
  return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};

function csvText(panel) {
  const rows = shownEntries(panel).map(([series, length, value, across, , status, launched, record]) => {
    const { mechanism, hyperparameters, implementation } = data.series[series];
    const none = [null, null, null];
    return [panel.title, mechanism, hyperparameters, implementation, length, ...(value ?? none), ...(across ?? none), status,
      launched, data.records[record]];
  });
  return [data.csv, ...rows].map((row) => row.map(quoted).join(",")).join("\n") + "\n";
}

async function save(panel, format) {
  const name = `${panel.slug}-${panel.title}`.replace(/[^\w.=+-]+/g, "-").slice(0, 120) + `.${format}`;
  if (format === "csv") {
    const url = URL.createObjectURL(new Blob([csvText(panel)], { type: "text/csv" }));
    download(name, url);
    setTimeout(() => URL.revokeObjectURL(url), 10000);
    return;
  }
  const { traces, layout } = picture(panel, 0, 960);
  const height = (layout.height ?? 400) + 260;
  const file = { ...layout, height, showlegend: panel.kind !== "brackets", paper_bgcolor: "#ffffff",
    title: { text: escaped(`${panel.heading}: ${panel.title}`), font: { size: 15 } }, margin: { l: 20, r: 20, t: 50, b: 40 } };
  download(name, await Plotly.toImage({ data: traces, layout: file }, { format, width: 960, height, scale: 2 }));
}
