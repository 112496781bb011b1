"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name in node && name !== "list") node[name] = value; else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  };
  const say = (text) => { document.getElementById("said").textContent = text; };

  // ---- frames -------------------------------------------------------------------------------------------------------
  const INFINITE = { "Infinity": Infinity, "-Infinity": -Infinity };
  const frames = {};
  for (const [key, frame] of Object.entries(data.frames)) {
    const columns = new Map();
    for (const column of frame.columns) {
      let values = column.values;
      if (column.levels) values = column.codes.map((code) => (code < 0 ? null : column.levels[code]));
      else if (column.kind === "number") values = values.map((v) => (typeof v === "string" ? INFINITE[v] : v));
      columns.set(column.name, { ...column, values });
    }
    frames[key] = { key, columns, length: frame.rows, total: frame.total };
  }
  const distinct = (frame, name) => [...new Set(frame.columns.get(name).values.filter((v) => v !== null))];
  const titleOf = (column) => column.words + (column.unit && column.unit !== column.words ? ` (${column.unit})` : "");

  const csvCell = (value) => {
    if (value === null || value === undefined) return "";
    if (typeof value === "number") return value === Infinity ? "inf" : value === -Infinity ? "-inf" : String(value);
    // A spreadsheet runs a text that begins like a formula; an apostrophe in front makes it a text. JSON keeps it as it is.
    const safe = /^[=+\-@\uff1d\uff0b\uff0d\uff20\t\r\n]/.test(value) ? `'${value}` : value;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const asCsv = (frame, rows) => {
    const columns = [...frame.columns.values()];
    const lines = [columns.map((c) => csvCell(c.name)).join(",")];
    for (const i of rows) lines.push(columns.map((c) => csvCell(c.values[i])).join(","));
    return lines.join("\n") + "\n";
  };
  const asJson = (frame, rows) => {
    const plain = (v) => (v === Infinity ? "Infinity" : v === -Infinity ? "-Infinity" : v);
    const columns = [...frame.columns.values()];
    return JSON.stringify({
      columns: columns.map(({ name, unit, id }) => ({ name, unit, id })), rows_of: frame.total,
      rows: rows.map((i) => Object.fromEntries(columns.map((c) => [c.name, plain(c.values[i])]))),
    });
  };
  const download = (name, text, type) => {
    const url = URL.createObjectURL(new Blob([text], { type }));
    const link = make("a", { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
    say(`${name} is downloaded.`);
  };
  const all = (frame) => [...Array(frame.length).keys()];

  // ---- theme --------------------------------------------------------------------------------------------------------
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const choice = document.getElementById("theme");
  const remembered = () => { try { return localStorage.getItem("dynprobe-theme"); } catch { return null; } };
  const remember = (value) => { try { localStorage.setItem("dynprobe-theme", value); } catch { /* a file may not */ } };
  const setTheme = () => { root.dataset.theme = choice.value === "auto" ? (system.matches ? "dark" : "light") : choice.value; };
  if (["light", "dark"].includes(remembered())) choice.value = remembered();
  setTheme();
  const colours = () => {
    const style = getComputedStyle(root);
    return Object.fromEntries(["ink", "muted", "paper", "card", "line", "grid"].map((n) => [n, style.getPropertyValue(`--${n}`).trim()]));
  };

  // ---- pictures -----------------------------------------------------------------------------------------------------
  const SIGNS = { " ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍" };
  // Controls, marks that steer the text around them, and other spaces: nobody would see them, and some hide others.
  const UNSEEN = /[\p{Cc}\p{Cf}\p{Z}]/u;
  const escape = (code) => (code < 0x100 ? `\\x${code.toString(16).padStart(2, "0")}` : code < 0x10000 ? `\\u${code.toString(16).padStart(4, "0")}` : `\\U${code.toString(16).padStart(8, "0")}`);
  const label = (text) => {
    const shown = [...text].map((c) => SIGNS[c] ?? (UNSEEN.test(c) ? escape(c.codePointAt(0)) : c)).join("");
    const signs = [...shown];
    return escaped(signs.length > 14 ? signs.slice(0, 13).join("") + "…" : shown);
  };
  // Plotly reads a little markup in texts; none of ours is meant as markup.
  const escaped = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const short = (value) => (Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(2).replace(/\.?0+e/, "e") : String(Number(value.toPrecision(4))));

  // Steps of 1, 2, 5, 10 … for what is counted, as many as have room; Plotly alone would put ticks at halves.
  const whole = (values, room) => {
    const known = values.filter((v) => Number.isFinite(v));
    const span = known.reduce((a, b) => Math.max(a, b), -Infinity) - known.reduce((a, b) => Math.min(a, b), Infinity);
    if (!(span >= 0)) return {};
    let step = 1;
    for (let k = 0; span / step > Math.max(2, room); k++) step = [2, 5, 10][k % 3] * 10 ** Math.floor(k / 3);
    return { tickmode: "linear", tick0: 0, dtick: step };
  };

  class Picture {
    constructor(node, spec) {
      this.node = node;
      this.spec = spec;
      this.frame = frames[spec.frame];
      this.chosen = {};
      this.measure = null;
      this.plots = [];
      this.controls(node.querySelector("[data-choose]"));
      const place = node.querySelector("[data-charts]");
      for (const chart of spec.charts) {
        const plot = make("div", { className: "plot" });
        const heading = chart.title && spec.charts.length > 1 ? [make("h4", {}, chart.title)] : [];
        place.append(make("div", { className: "chart" }, ...heading, plot));
        this.plots.push(plot);
      }
    }
    controls(place) {
      for (const item of this.spec.choose) {
        const select = make("select");
        if (item.measures) {
          for (const m of item.measures) select.append(make("option", { value: m.column }, titleOf(this.frame.columns.get(m.column))));
          this.measure = item.measures[0];
          select.addEventListener("change", () => { this.measure = item.measures.find((m) => m.column === select.value); this.draw(); });
        } else {
          const values = distinct(this.frame, item.column);
          values.forEach((v, i) => select.append(make("option", { value: String(i) }, String(v))));
          const first = Math.max(0, values.indexOf(item.first));
          select.value = String(first);
          this.chosen[item.column] = values[first];
          select.addEventListener("change", () => { this.chosen[item.column] = values[Number(select.value)]; this.draw(); });
          if (values.length < 2) { continue; }
        }
        select.dataset.column = item.column ?? "@measure";
        place.append(make("label", {}, item.label, select));
      }
    }
    rows(frame, where) {
      const tests = Object.entries({ ...this.chosen, ...where }).filter(([name]) => frame.columns.has(name)).map(([name, value]) => [frame.columns.get(name).values, value]);
      const rows = [];
      for (let i = 0; i < frame.length; i++) if (tests.every(([values, value]) => values[i] === value)) rows.push(i);
      return rows;
    }
    fill(value, frame, rows, theme) {
      if (Array.isArray(value)) return value.map((v) => this.fill(v, frame, rows, theme));
      if (typeof value === "string" && value.startsWith("var:")) return theme[value.slice(4)] ?? value;
      if (value === null || typeof value !== "object") return value;
      if ("$" in value) {
        const found = frame.columns.get(value.$).values;
        return rows.map((i) => (i < 0 ? null : typeof found[i] === "string" ? escaped(found[i]) : found[i]));
      }
      if ("$minus" in value) {
        const [a, b] = value.$minus.map((name) => frame.columns.get(name).values);
        return rows.map((i) => (a[i] === null || b[i] === null ? null : Math.max(0, a[i] - b[i])));
      }
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, this.fill(v, frame, rows, theme)]));
    }
    trace(spec, theme) {
      const frame = frames[spec.$frame ?? this.spec.frame];
      let rows = this.rows(frame, spec.$where ?? {});
      const { $where, $frame, $band, $grid, $gaps, $stems, ...rest } = spec;
      if ($gaps) {
        const of = frame.columns.get($gaps).values;
        rows = rows.map((row, at) => [row, at]).sort(([a, p], [b, q]) => (of[a] < of[b] ? -1 : of[a] > of[b] ? 1 : p - q)).map(([row]) => row);
        rows = rows.flatMap((row, at) => (at && of[row] !== of[rows[at - 1]] ? [-1, row] : [row]));
      }
      const trace = this.fill(rest, frame, rows, theme);
      if (typeof trace.name === "string") trace.name = escaped(trace.name);
      // One group for each name: Plotly lays out groups side by side, and lone entries below each other.
      trace.legendgroup = trace.legendgroup ? escaped(trace.legendgroup) : trace.name;
      const get = (name) => frame.columns.get(name).values;
      if ($band) {
        const [x, low, high] = [get($band.x), get($band.low), get($band.high)];
        rows = rows.filter((i) => low[i] !== null && high[i] !== null);
        trace.x = [...rows.map((i) => x[i]), ...rows.map((i) => x[i]).reverse()];
        trace.y = [...rows.map((i) => high[i]), ...rows.map((i) => low[i]).reverse()];
      }
      if ($stems) {
        const [x, low, high] = [get($stems.x), get($stems.low), get($stems.high)];
        rows = rows.filter((i) => low[i] !== null && high[i] !== null);
        trace.x = rows.flatMap((i) => [x[i], x[i], null]);
        trace.y = rows.flatMap((i) => [low[i], high[i], null]);
      }
      if ($grid) this.cells(trace, $grid, frame, rows);
      return trace;
    }
    cells(trace, spec, frame, rows) {
      const z = spec.z === "@measure" ? this.measure.column : spec.z;
      const log = spec.log === "@measure" ? this.measure.log : spec.log;
      const get = (name) => frame.columns.get(name).values;
      const [xs, ys, zs] = [get(spec.x), get(spec.y), get(z)];
      const sorted = (values) => [...new Set(rows.map((i) => values[i]))].sort((a, b) => a - b);
      // A row without any value in the whole frame (the first depth has no step) is no row of this measure.
      const held = new Set();
      if (spec.trim) zs.forEach((v, i) => { if (v !== null && Number.isFinite(v)) held.add(ys[i]); });
      const [x, y] = [sorted(xs), sorted(ys).filter((v) => !spec.trim || held.has(v))];
      const [column, row] = [new Map(x.map((v, i) => [v, i])), new Map(y.map((v, i) => [v, i]))];
      const matrix = y.map(() => x.map(() => null)), text = y.map(() => x.map(() => ""));
      const tokens = frame.columns.get("token")?.values, why = spec.why ? get(spec.why) : [];
      const at = (i) => `${tokens?.[i] ? `“${label(tokens[i])}”<br>` : ""}${escaped(spec.x)} ${short(xs[i])}<br>${escaped(spec.y)} ${short(ys[i])}<br>${escaped(z)} `;
      for (const i of rows) {
        const value = zs[i], [r, c] = [row.get(ys[i]), column.get(xs[i])];
        if (r === undefined) continue;
        const drawn = value !== null && Number.isFinite(value) && !(log && value <= 0);
        if (drawn) matrix[r][c] = log ? Math.log10(value) : value;
        text[r][c] = at(i) + (drawn ? short(value) : value === null ? `has no value${why[i] ? `: ${escaped(why[i])}` : ""}` : `${short(value)}, not on this scale`);
      }
      const category = (values) => values.map((v) => short(v));
      trace.x = spec.x === "alpha" ? category(x) : x;
      trace.y = y;
      trace.z = matrix;
      trace.text = text;
      trace.hoverinfo = "text";
      const named = spec.title || titleOf(frame.columns.get(z));
      const title = log ? (named.endsWith(")") ? `${named.slice(0, -1)}, log scale)` : `${named} (log scale)`) : named;
      trace.colorbar = { title: { text: escaped(title), side: "right" }, thickness: 14, outlinewidth: 0 };
      if (log) {
        const seen = matrix.flat().filter((v) => v !== null);
        if (seen.length) {
          const [low, high] = [seen.reduce((a, b) => Math.min(a, b)), seen.reduce((a, b) => Math.max(a, b))];
          const steps = high - low < 0.9 ? 5 : 0;
          const at = steps ? [...Array(steps).keys()].map((k) => low + (k * (high - low)) / (steps - 1)) : [];
          if (!steps) for (let e = Math.ceil(low); e <= Math.floor(high); e++) at.push(e);
          const every = Math.ceil(at.length / 8);
          const kept = at.filter((_, i) => i % every === 0);
          Object.assign(trace.colorbar, { tickvals: kept, ticktext: kept.map((v) => short(10 ** v)) });
        }
      }
    }
    layout(chart, traces, theme, width) {
      const layout = this.fill(chart.layout, this.frame, [], theme);
      const shown = new Set(traces.filter((t) => t.showlegend !== false && t.type !== "heatmap").map((t) => t.name)).size;
      const base = {
        autosize: true, height: chart.height, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: theme.ink, size: 12, family: getComputedStyle(document.body).fontFamily },
        margin: { l: 10, r: 22, t: 30, b: 10 }, hoverlabel: { font: { size: 12 } },
        showlegend: shown > 1 || traces.some((t) => t.type === "bar"), legend: { entrywidth: 0, orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, bgcolor: "rgba(0,0,0,0)", font: { size: 11 } },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: theme.muted, activecolor: theme.ink },
      };
      const merged = { ...base, ...layout };
      const plotted = Math.max(120, width - 90);
      for (const name of ["xaxis", "yaxis"]) {
        const axis = merged[name] ?? {};
        if (axis.$title) axis.title = { text: axis.$title.texts[this.chosen[axis.$title.column]] ?? "" };
        delete axis.$title;
        for (const list of ["categoryarray", "ticktext"]) if (axis[list]) axis[list] = axis[list].map(escaped);
        if (axis.title?.text) axis.title.text = escaped(axis.title.text);
        // Names of conditions take half of a phone; shares need three ticks there.
        if (width < 480 && name === "xaxis" && axis.tickvals?.length === 5) axis.tickvals = axis.tickvals.filter((_, i) => i % 2 === 0);
        if (axis.$whole && !axis.tickvals) Object.assign(axis, whole(traces.flatMap((t) => t[name[0]] ?? []), name === "xaxis" ? plotted / 44 : chart.height / 40));
        delete axis.$whole;
        merged[name] = { gridcolor: theme.grid, linecolor: theme.line, zerolinecolor: theme.line, zeroline: axis.showgrid !== false, tickfont: { size: 11 }, ...axis };
        if (merged[name].title?.text) merged[name].title = { ...merged[name].title, font: { size: 12 }, standoff: layout.$tokens && name === "xaxis" ? 16 : 8 };
      }
      const map = traces.find((t) => t.type === "heatmap");
      if (map && map.y.length <= 16) Object.assign(merged.yaxis, { tickmode: "array", tickvals: map.y });
      const tokens = layout.$tokens;
      delete merged.$tokens;
      if (tokens) this.tokens(merged, tokens, theme, width);
      if (merged.$plane) this.plane(merged, traces, plotted, chart.height - 110);
      delete merged.$plane;
      return merged;
    }
    // Two axes of one scale take no more height than they need; where one is so much longer that a strip would be left,
    // the short one is stretched and says so.
    plane(layout, traces, width, height) {
      const span = (name) => {
        const known = traces.flatMap((t) => t[name] ?? []).filter((v) => Number.isFinite(v));
        return known.reduce((a, b) => Math.max(a, b), -Infinity) - known.reduce((a, b) => Math.min(a, b), Infinity);
      };
      const [x, y] = [span("x"), span("y")];
      if (!(x > 0 && y > 0)) return;
      const needed = (1.15 * width * y) / x;
      if (needed >= 0.4 * height) {
        layout.height -= Math.max(0, height - needed);
        return;
      }
      delete layout.yaxis.scaleanchor;
      const times = height / y / (width / x);
      layout.yaxis.title = { ...layout.yaxis.title, text: `${layout.yaxis.title.text}, stretched about ${times >= 10 ? Math.round(times) : times.toFixed(1)}×` };
    }
    tokens(layout, spec, theme, width) {
      const rows = this.rows(this.frame, {});
      const at = this.frame.columns.get(spec.at).values, text = this.frame.columns.get(spec.text).values;
      const seen = new Map();
      for (const i of rows) if (!seen.has(at[i])) seen.set(at[i], text[i] ?? "");
      const places = [...seen.keys()].sort((a, b) => a - b);
      const every = Math.max(1, Math.ceil((places.length * 13) / Math.max(120, width - 150)));
      const kept = places.filter((_, i) => i % every === 0);
      Object.assign(layout.xaxis, { tickmode: "array", tickvals: kept, ticktext: kept.map((p) => label(seen.get(p)) || String(p)), tickangle: -90 });
      layout.xaxis.tickfont = { size: 10 };
      if (every > 1) layout.xaxis.title = { ...layout.xaxis.title, text: `${layout.xaxis.title.text}, one in ${every} is labelled` };
      if (!spec.part) return;
      const part = this.frame.columns.get(spec.part).values;
      const first = rows.filter((i) => part[i] === "new").map((i) => at[i]).reduce((a, b) => Math.min(a, b), Infinity);
      if (Number.isFinite(first) && first > places[0]) {
        layout.shapes = [{ type: "line", x0: first - 0.5, x1: first - 0.5, yref: "paper", y0: 0, y1: 1, line: { color: theme.ink, dash: "dash", width: 2 } }];
      }
    }
    draw() {
      // What is folded has no width to draw in; it is drawn when it is unfolded.
      this.stale = this.node.closest("details:not([open])") !== null;
      if (this.stale) return;
      const theme = colours();
      this.spec.charts.forEach((chart, number) => {
        const plot = this.plots[number];
        const width = plot.clientWidth || 400;
        const traces = chart.traces.map((t) => this.trace(t, theme));
        const config = { responsive: true, displaylogo: false, displayModeBar: "hover", scrollZoom: false, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d"]] };
        const filled = traces.some((t) => (t.z ? t.z.flat().some((v) => v !== null) : (t.y ?? []).some((v, i) => v !== null && t.x[i] !== null && t.x[i] !== undefined)));
        plot.parentElement.querySelector(".empty")?.remove();
        plot.hidden = !filled;
        if (!filled) { plot.after(make("p", { className: "empty" }, "No value for this choice.")); return; }
        const layout = this.layout(chart, traces, theme, width);
        Plotly.react(plot, traces, layout, config).then(() => {
          // A legend below a chart takes its room from it; give that room back, now that its height is known.
          const legend = layout.showlegend ? plot._fullLayout.legend?._height ?? 0 : 0;
          if (legend) Plotly.relayout(plot, { height: layout.height + legend + 6, "margin.b": legend + 52 });
        });
      });
    }
  }

  const pictures = [];
  for (const spec of data.figures) {
    const node = document.querySelector(`[data-figure="${CSS.escape(spec.key)}"]`);
    const picture = new Picture(node, spec);
    pictures.push(picture);
    node.querySelectorAll("[data-csv]").forEach((b) => b.addEventListener("click", () => download(`${b.dataset.csv}.csv`, asCsv(frames[b.dataset.csv], all(frames[b.dataset.csv])), "text/csv")));
    node.querySelectorAll("[data-json]").forEach((b) => b.addEventListener("click", () => download(`${b.dataset.json}.json`, asJson(frames[b.dataset.json], all(frames[b.dataset.json])), "application/json")));
    node.querySelector("[data-image]").addEventListener("click", async () => {
      for (const [number, plot] of picture.plots.entries()) {
        if (plot.hidden) continue;
        const url = await Plotly.toImage(plot, { format: "svg", width: plot.clientWidth, height: plot.clientHeight });
        download(`${spec.key}${picture.plots.length > 1 ? `-${number + 1}` : ""}.svg`, decodeURIComponent(url.slice(url.indexOf(",") + 1)), "image/svg+xml");
      }
    });
    node.querySelectorAll("[data-numbers]").forEach((details) => details.addEventListener("toggle", () => {
      const place = details.querySelector(".table");
      if (details.open && !place.childElementCount) new Table(place, frames[details.dataset.numbers], []);
    }));
  }

  // ---- tables -------------------------------------------------------------------------------------------------------
  class Table {
    constructor(node, frame, filters) {
      Object.assign(this, { node, frame, filters: {}, query: "", sort: null, page: 0, size: 25 });
      this.columns = [...frame.columns.values()];
      const controls = make("div", { className: "controls" });
      const search = make("input", { type: "search", placeholder: "any text" });
      search.addEventListener("input", () => { this.query = search.value.toLowerCase(); this.page = 0; this.fill(); });
      controls.append(make("label", {}, "contains", search));
      for (const name of filters) {
        const select = make("select", {}, make("option", { value: "" }, "all"));
        const values = distinct(frame, name);
        values.forEach((v, i) => select.append(make("option", { value: String(i) }, String(v))));
        select.dataset.column = name;
        select.addEventListener("change", () => { this.filters[name] = select.value === "" ? undefined : values[Number(select.value)]; this.page = 0; this.fill(); });
        controls.append(make("label", {}, frame.columns.get(name).words, select));
      }
      if (frame.length > 5) node.append(controls);
      const head = make("tr");
      this.heads = this.columns.map((column, number) => {
        const about = [column.unit, column.id].filter(Boolean).join(" · ");
        const button = make("button", { type: "button" }, column.words, ...(about ? [make("small", {}, about)] : []));
        button.addEventListener("click", () => this.sortBy(number));
        const cell = make("th", { scope: "col" }, button);
        cell.setAttribute("aria-sort", "none");
        head.append(cell);
        return cell;
      });
      this.body = make("tbody");
      const region = make("div", { className: "scroll", tabIndex: 0 }, make("table", {}, make("thead", {}, head), this.body));
      region.setAttribute("role", "region");
      region.setAttribute("aria-label", `Table ${frame.key}, scrolls sideways`);
      node.append(region);
      this.before = make("button", { type: "button" }, "Previous");
      this.after = make("button", { type: "button" }, "Next");
      this.before.addEventListener("click", () => { this.page--; this.fill(); });
      this.after.addEventListener("click", () => { this.page++; this.fill(); });
      this.count = make("span");
      this.count.dataset.count = "";
      const csv = make("button", { type: "button" }, "These rows (CSV)");
      csv.dataset.csv = frame.key;
      csv.addEventListener("click", () => download(`${frame.key}.csv`, asCsv(frame, this.rows()), "text/csv"));
      node.append(make("div", { className: "pages" }, this.before, this.after, this.count, csv));
      this.fill();
    }
    sortBy(number) {
      const down = this.sort?.number === number && this.sort.direction > 0;
      this.sort = { number, direction: down ? -1 : 1 };
      this.heads.forEach((cell, i) => cell.setAttribute("aria-sort", i !== number ? "none" : down ? "descending" : "ascending"));
      this.page = 0;
      this.fill();
    }
    rows() {
      const wanted = Object.entries(this.filters).filter(([, v]) => v !== undefined);
      let rows = all(this.frame).filter((i) => wanted.every(([name, value]) => this.frame.columns.get(name).values[i] === value));
      if (this.query) rows = rows.filter((i) => this.columns.some((c) => c.values[i] !== null && String(c.values[i]).toLowerCase().includes(this.query)));
      if (this.sort) {
        const values = this.columns[this.sort.number].values, way = this.sort.direction;
        // What is missing stands at the end, whichever way is asked for.
        const order = (a, b) => (typeof a === "number" ? a - b : a < b ? -1 : a > b ? 1 : 0);
        rows.sort((i, k) => (values[i] === null ? (values[k] === null ? i - k : 1) : values[k] === null ? -1 : way * order(values[i], values[k]) || i - k));
      }
      return rows;
    }
    fill() {
      const rows = this.rows(), pages = Math.max(1, Math.ceil(rows.length / this.size));
      this.page = Math.min(Math.max(0, this.page), pages - 1);
      const shown = rows.slice(this.page * this.size, (this.page + 1) * this.size);
      this.body.replaceChildren(...shown.map((i) => make("tr", {}, ...this.columns.map((column) => this.cell(column, column.values[i])))));
      this.before.disabled = this.page === 0;
      this.after.disabled = this.page >= pages - 1;
      const from = rows.length ? this.page * this.size + 1 : 0;
      const of = this.frame.total > this.frame.length ? `; ${this.frame.length.toLocaleString("en")} of ${this.frame.total.toLocaleString("en")} are on this page` : "";
      this.count.textContent = `${from}–${from + shown.length - (rows.length ? 1 : 0)} of ${rows.length} rows${of}`;
      say(`${rows.length} rows`);
    }
    cell(column, value) {
      if (value === null) return make("td", { title: "missing" }, "–");
      if (typeof value === "number") {
        const shown = Number.isInteger(value) && Math.abs(value) < 1e9 ? String(value) : !Number.isFinite(value) ? (value > 0 ? "∞" : "−∞") : Math.abs(value) < 1e-4 || Math.abs(value) >= 1e9 ? value.toExponential(3) : String(Number(value.toPrecision(5)));
        const cell = make("td", { className: "number", title: String(value) }, shown);
        cell.dataset.value = String(value);
        return cell;
      }
      return value.length > 40 ? make("td", {}, make("span", { className: "long" }, value)) : make("td", { className: "short" }, value);
    }
  }
  for (const spec of data.tables) {
    new Table(document.querySelector(`[data-table="${CSS.escape(spec.frame)}"]`), frames[spec.frame], spec.filters);
  }

  // ---- folding -------------------------------------------------------------------------------------------------------
  const drawStale = () => pictures.forEach((p) => { if (p.stale) p.draw(); });
  document.addEventListener("toggle", drawStale, true);
  const unfold = (details) => { for (const one of details) one.open = true; drawStale(); };
  const folds = (from) => [...from.querySelectorAll("details:not([open], [data-numbers])")];
  const follow = () => {
    let name = location.hash.slice(1);
    try { name = decodeURIComponent(name); } catch { /* not escaped, so taken as it is */ }
    const target = document.getElementById(name);
    if (!target) return;
    const around = [];
    for (let d = target.closest("details"); d; d = d.parentElement.closest("details")) around.push(d);
    unfold(around);
    target.scrollIntoView();
  };
  window.addEventListener("hashchange", follow);
  // The same link a second time changes nothing in the address, and what it leads to may be folded again.
  document.querySelectorAll("a[href^='#']").forEach((link) => link.addEventListener("click", () => setTimeout(follow, 0)));
  document.getElementById("unfold").addEventListener("click", () => {
    unfold(folds(document.getElementById("main")));
    say("Everything is unfolded.");
  });
  let before = null;
  window.addEventListener("beforeprint", () => {
    const closed = folds(document.getElementById("main"));
    before = { closed, theme: root.dataset.theme };
    root.dataset.theme = "light";
    unfold(closed);
    if (before.theme !== "light") drawAll();
  });
  window.addEventListener("afterprint", () => {
    if (before === null) return;
    for (const one of before.closed) one.open = false;
    root.dataset.theme = before.theme;
    if (before.theme !== "light") drawAll();
    before = null;
  });

  // ---- drawing, nearest first ---------------------------------------------------------------------------------------
  const drawAll = () => pictures.forEach((p) => p.draw());
  choice.addEventListener("change", () => { remember(choice.value); setTheme(); drawAll(); });
  system.addEventListener("change", () => { setTheme(); drawAll(); });
  let width = root.clientWidth, waiting = 0;
  window.addEventListener("resize", () => {
    if (root.clientWidth === width) return;
    width = root.clientWidth;
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 150);
  });
  let next = 0;
  const step = () => {
    if (next >= pictures.length) { follow(); root.dataset.ready = "yes"; return; }
    pictures[next++].draw();
    setTimeout(step, 0);
  };
  step();
})();
