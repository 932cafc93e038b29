// Draws the report from the document beside it. Nothing is computed here that is a result: fronts, intervals, tests and
// differences come from the program.
"use strict";
const report = JSON.parse(document.getElementById("data").textContent);
const PALETTE = report.palette;
const SYMBOLS = ["circle", "square", "triangle-up", "cross", "star", "hexagon"];
const element = (id) => document.getElementById(id);

function palette(keys) {
  const distinct = [...new Set(keys)].filter((key) => key !== report.others.name);
  const found = Object.fromEntries(distinct.map((key, n) => [key, {
    colour: PALETTE[n % PALETTE.length], symbol: SYMBOLS[Math.floor(n / PALETTE.length) % SYMBOLS.length],
  }]));
  return { [report.others.name]: { colour: report.others.colour, symbol: "circle" }, ...found };
}
const looks = palette(report.rows.map((row) => row.colour));

function draw(id, traces, layout) {
  const style = getComputedStyle(document.documentElement);
  const [text, line] = ["--text", "--line"].map((name) => style.getPropertyValue(name).trim());
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
  const merged = {
    height: 460, margin: { l: 60, r: 16, t: 16, b: 50 }, hovermode: "closest", paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)", font: { color: text, size: 12 }, legend: { orientation: "h", y: -0.2 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: text }, ...layout,
    xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
  };
  return Plotly.react(id, traces, merged, { responsive: true, displaylogo: false });
}

function choices(id, names, titles, redraw) {
  const select = element(id);
  names.forEach((name, n) => select.add(new Option(titles[n], name)));
  select.addEventListener("change", redraw);
}

// An axis that shows points with their intervals, and no difference larger than it is: at least a tenth of the value wide.
function range(values, halves = []) {
  const ends = values.flatMap((value, n) => [value - (halves[n] ?? 0), value + (halves[n] ?? 0)]);
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  const room = Math.max(0.08 * (high - low), 0.05 * Math.abs(low + high) / 2 - (high - low) / 2, 1e-9);
  return [low - room, high + room];
}

function scatter() {
  const [score, cost] = [element("score").value, element("cost").value];
  const has = (one) => Number.isFinite(one.values[score]) && Number.isFinite(one.values[cost]);
  const rows = report.rows.map((row, n) => ({ ...row, n })).filter((row) => row.status === "finished" && has(row));
  const traces = [];
  for (const [key, look] of Object.entries(looks)) {
    const own = rows.filter((row) => row.colour === key);
    if (!own.length) continue;
    const cells = own.flatMap((row) => row.cells.length > 1 ? row.cells.filter(has) : []);
    traces.push({
      x: cells.map((one) => one.values[cost]), y: cells.map((one) => one.values[score]), text: cells.map((one) => one.name),
      mode: "markers", marker: { color: look.colour, opacity: 0.35, size: 6, symbol: look.symbol }, legendgroup: key,
      showlegend: false, hovertemplate: "%{text}<br>%{y:.4~g} at %{x:.4~g}<extra></extra>",
    });
    const isOther = key === report.others.name;
    const error = { type: "data", array: own.map((row) => row.ci95[score] ?? 0), color: look.colour, thickness: 1.5 };
    traces.push({
      x: own.map((row) => row.values[cost]), y: own.map((row) => row.values[score]), name: key, legendgroup: key,
      text: own.map((row) => `${row.name}<br>${row.marks.join(", ")}`), mode: "markers",
      ...(isOther ? { opacity: 0.6 } : { error_y: error }),
      marker: {
        color: look.colour, line: { width: 0 },
        size: own.map((row) => isOther ? 7 : row.marks.includes("baseline") ? 14 : 11),
        symbol: own.map((row) => row.marks.includes("baseline") ? "diamond" : look.symbol + (row.is_trial && !isOther ? "-open" : "")),
      },
      hovertemplate: "%{text}<br>%{y:.4~g} at %{x:.4~g}<extra></extra>",
    });
  }
  const front = report.fronts[score][cost].map((n) => report.rows[n]);
  if (front.length) {
    traces.unshift({
      x: front.map((row) => row.values[cost]), y: front.map((row) => row.values[score]), mode: "lines", name: "front",
      line: { color: "#888", width: 1.5 }, hoverinfo: "skip",
    });
  }
  const shapes = rows.filter((row) => row.marks.includes("baseline")).map((row) => ({
    type: "line", xref: "paper", x0: 0, x1: 1, y0: row.values[score], y1: row.values[score],
    line: { color: "#888", width: 1, dash: "dash" },
  }));
  const better = report.scores[score].lower_is_better ? " (lower is better)" : "";
  draw("scatter", traces, {
    shapes, xaxis: { title: { text: report.costs[cost] }, range: range(rows.map((row) => row.values[cost])) },
    yaxis: {
      title: { text: report.scores[score].title + better },
      range: range(rows.map((row) => row.values[score]), rows.map((row) => row.ci95[score])),
    },
  });
}

function schedules() {
  // What changes at every step lies behind what changes by stages.
  const dense = (one) => one.steps.length > 200;
  draw("schedules", [...report.schedules].sort((a, b) => b.steps.length - a.steps.length).map((one) => ({
    x: one.steps.map((point) => point[0]), y: one.steps.map((point) => point[1]), mode: "lines",
    name: one.rows.slice(0, 3).join(", ") + (one.rows.length > 3 ? ` and ${one.rows.length - 3} more` : ""),
    line: { shape: "hv", color: looks[one.colour].colour, width: dense(one) ? 0.5 : 2.5 }, opacity: dense(one) ? 0.35 : 1,
  })), {
    height: 360, legend: { orientation: "h", y: -0.35 }, xaxis: { title: { text: "optimizer step" } },
    yaxis: { title: { text: "visual tokens a layer" }, rangemode: "tozero" },
  });
}

function curves() {
  const metric = element("curve").value, named = new Set();
  const shown = report.curves[metric] ?? [];
  const width = Math.max(...shown.map((one) => one.steps_a_point), 1);
  element("curve-note").textContent = width > 1 ? `Each point is the mean of up to ${width} steps.` : "";
  draw("curves", shown.map((one) => {
    const first = !named.has(one.row);
    named.add(one.row);
    return {
      x: one.points.map((point) => point[0]), y: one.points.map((point) => point[1]), name: one.row, text: one.cell,
      legendgroup: one.row, showlegend: first, mode: one.points.length > 30 ? "lines" : "lines+markers",
      line: { color: looks[one.colour].colour, width: 1.2 }, opacity: 0.8,
      hovertemplate: `${one.cell}<br>step %{x}: %{y:.4~g}<extra></extra>`,
    };
  }), { xaxis: { title: { text: "optimizer step" } }, yaxis: { title: { text: metric }, type: metric.endsWith("loss") ? "log" : "linear" } });
}

function sweeps() {
  const one = report.table.sweeps[Number(element("sweep").value)];
  const along = one.along ?? "kind", lines = {};
  const full = one.scores.find((score) => !Object.keys(score.values).length);
  for (const score of one.scores.filter((each) => each !== full)) {
    const rest = Object.entries(score.values).filter(([key]) => key !== along && key !== "kind");
    const name = [score.values.kind, ...rest.map(([key, value]) => `${key} ${value}`)].join(", ");
    (lines[name] ??= []).push(score);
  }
  const traces = Object.entries(lines).map(([name, scores], n) => ({
    x: scores.map((score) => String(score.values[along])), y: scores.map((score) => score.mean), name, mode: "lines+markers",
    error_y: { type: "data", array: scores.map((score) => score.ci95 ?? 0), thickness: 1.2 },
    marker: { color: PALETTE[n % PALETTE.length], size: 8 }, line: { width: 1.5 },
    text: scores.map((score) => score.token_share === null ? "" : `${Math.round(100 * score.token_share)}% of the tokens`),
    hovertemplate: `${name}<br>${along} %{x}: %{y:.4~g}<br>%{text}<extra></extra>`,
  }));
  const across = { xref: "paper", x0: 0, x1: 1, layer: "below" };
  const shapes = !full ? [] : [
    { ...across, type: "line", y0: full.mean, y1: full.mean, line: { color: "#888", width: 1, dash: "dash" } },
    { ...across, type: "rect", y0: full.mean - (full.ci95 ?? 0), y1: full.mean + (full.ci95 ?? 0), fillcolor: "#888",
      opacity: 0.15, line: { width: 0 } },
  ];
  draw("sweeps", traces, {
    shapes, height: 400, xaxis: { type: "category", title: { text: `${along.replaceAll("_", " ")} at test time; dashed: full tokens` } },
    yaxis: { title: { text: `${one.evaluation} ${one.metric}` } },
  });
}

function tree() {
  const bars = [], names = {}, firsts = [];
  let lines = 0;
  for (const { plan } of report.experiments) {
    for (const cell of plan.cells) names[cell.id] = cell.name;
    const children = {}, ends = {};
    for (const run of plan.stage_runs) (children[run.parent ?? ""] ??= []).push(run);
    const place = (run, start, line) => {
      ends[run.id] = start + run.last_step - run.first_step;
      bars.push({ run, start, line });
      firsts[line] = (names[run.cells[0]] ?? run.cells[0]).slice(0, 32); // the last of a line: the cell that ends there
      (children[run.id] ?? []).forEach((child, n) => place(child, ends[run.id], n ? lines++ : line));
    };
    for (const run of children[""] ?? []) place(run, 0, lines++);
  }
  const variants = palette(bars.map((bar) => bar.run.variant));
  const about = ({ run }) => {
    const cells = [...new Set(run.cells.map((id) => names[id] ?? id))];
    const shown = cells.slice(0, 8).join("<br>") + (cells.length > 8 ? `<br>and ${cells.length - 8} more` : "");
    return `${run.phase} steps ${run.first_step}–${run.last_step} under ${run.variant}, ${run.state}<br>` +
      `${cells.length > 1 ? `shared by ${cells.length} cells` : "one cell"}:<br>${shown}`;
  };
  const traces = Object.entries(variants).map(([variant, look]) => {
    const own = bars.filter((bar) => bar.run.variant === variant);
    return {
      type: "bar", orientation: "h", width: 0.75, name: variant, base: own.map((bar) => bar.start), y: own.map((bar) => bar.line),
      x: own.map((bar) => bar.run.last_step - bar.run.first_step), hovertext: own.map(about), hoverinfo: "text",
      // Words in hundreds of bars take seconds to be laid out.
      ...(bars.length > 100 ? {} : { text: own.map((bar) => bar.run.cells.length > 1 ? `${bar.run.cells.length} cells` : "") }),
      textposition: "inside",
      marker: { color: look.colour, opacity: own.map((bar) => bar.run.state === "done" ? 0.9 : 0.35), line: { width: 1, color: "rgba(128,128,128,0.6)" } },
    };
  });
  draw("tree", traces, {
    barmode: "overlay", height: 110 + 22 * Math.max(lines, 2), legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
    margin: { l: 16, r: 16, t: 40, b: 50 }, xaxis: { title: { text: "optimizer step, cumulative over phases" } },
    yaxis: {
      range: [lines - 0.5, -0.5], showgrid: false, zeroline: false, tickfont: { size: 10 },
      ...(innerWidth < 700 || lines > 100 ? { visible: false } : { tickvals: firsts.map((_, n) => n), ticktext: firsts }),
    },
  });
}

function table() {
  const { head, body } = report.table, grid = element("table");
  element("explanations").textContent = report.table.explanations ?? "";
  const key = (text) => {
    const number = parseFloat(text.replace(/^[≤≥] /, "").replaceAll(",", ""));
    return Number.isNaN(number) ? text : number;
  };
  const top = grid.createTHead().insertRow(), lines = grid.createTBody();
  for (const texts of body) {
    const line = lines.insertRow();
    for (const text of texts) line.insertCell().textContent = text;
  }
  head.forEach((title, n) => {
    const cell = document.createElement("th"), button = document.createElement("button");
    cell.scope = "col";
    cell.setAttribute("aria-sort", "none");
    button.textContent = title;
    button.addEventListener("click", () => {
      const up = cell.getAttribute("aria-sort") !== "ascending";
      for (const other of top.cells) other.setAttribute("aria-sort", "none");
      cell.setAttribute("aria-sort", up ? "ascending" : "descending");
      const sorted = [...lines.rows].sort((a, b) => {
        const [x, y] = [a, b].map((line) => key(line.cells[n].textContent));
        const order = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? -1 : 1;
        return up ? order : -order;
      });
      lines.append(...sorted);
    });
    cell.append(button);
    top.append(cell);
  });
}

function all() {
  if (Object.keys(report.scores).length && Object.keys(report.costs).length) scatter();
  schedules();
  if (Object.keys(report.curves).length) curves();
  if (report.table.sweeps.length) sweeps();
  tree();
}

const scores = Object.keys(report.scores), costs = Object.keys(report.costs), metrics = Object.keys(report.curves);
choices("score", scores, scores.map((name) => report.scores[name].title), scatter);
choices("cost", costs, costs.map((name) => report.costs[name]), scatter);
choices("curve", metrics, metrics, curves);
const swept = report.table.sweeps.map((one) => `${one.name}: ${one.evaluation} ${one.metric}`);
choices("sweep", swept.map((_, n) => n), swept, sweeps);
element("sweep-section").hidden = !swept.length;
table();
all();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
document.body.dataset.drawn = "yes";
