// The attention explorer: one ES module for two hosts. In a notebook a kernel answers `ask`; in a saved page the data lies beside it.
// Tokens are data: they reach the page through textContent and fillText alone.

const STOPS = {
  viridis: ["440154", "482475", "414487", "355f8d", "2a788e", "21918c", "22a884", "44bf70", "7ad151", "bddf26", "fde725"],
  signed: ["053061", "2166ac", "4393c3", "92c5de", "d1e5f0", "ffffff", "fddbc7", "f4a582", "d6604d", "b2182b", "67001f"],
};
const DECADES = 4;
const MODES = { raw: "weights", rollout: "rollout", value: "value-weighted", difference: "difference" };
const TABLES = Object.fromEntries(Object.entries(STOPS).map(([name, stops]) => [name, table(stops)]));

function table(stops) {
  const rgb = stops.map(s => [0, 2, 4].map(i => parseInt(s.slice(i, i + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const x = i / 255 * (rgb.length - 1), k = Math.min(Math.floor(x), rgb.length - 2);
    return rgb[k].map((v, c) => Math.round(v + (rgb[k + 1][c] - v) * (x - k)));
  });
}

// ---- bytes to weights -------------------------------------------------------------------------------------------------------

export function weights(bytes, columns, scales, { signed = false, code = "linear", first = true }) {
  const out = new Float32Array(bytes.length);
  for (let i = 0; i < out.length; i++) {
    const scale = first && i % columns === 0 ? scales[0] : scales[1], q = bytes[i];
    if (signed) out[i] = (q - 128) / 127 * scale;
    else if (code === "log") out[i] = q === 0 ? 0 : scale * 10 ** (DECADES * ((q - 1) / 254 - 1));
    else out[i] = q / 255 * scale;
  }
  return out;
}

function extreme(values, columns, skip) {
  let top = 0;
  for (let i = 0; i < values.length; i++) if (!(skip && i % columns === 0)) top = Math.max(top, Math.abs(values[i]));
  return top || 1;
}

// A weight's place on the color scale, 0 to 1; for signed weights the distance from zero decides what the threshold hides.
function place(value, top, log) {
  const x = Math.abs(value) / top;
  return log ? (x > 0 ? Math.max(0, 1 + Math.log10(x) / DECADES) : 0) : Math.min(x, 1);
}

function color(value, top, { log, signed }) {
  const at = place(value, top, log && !signed);
  return signed ? TABLES.signed[Math.round(127.5 + Math.sign(value) * at * 127.5)] : TABLES.viridis[Math.round(255 * at)];
}

function picture(values, rows, columns, top, options, skip) {
  const image = new ImageData(columns, rows);
  for (let i = 0; i < values.length; i++) {
    if (skip && i % columns === 0 || place(values[i], top, options.log && !options.signed) < options.threshold) continue;
    image.data.set([...color(values[i], top, options), 255], 4 * i);
  }
  const canvas = document.createElement("canvas");
  canvas.width = columns; canvas.height = rows;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// ---- words ------------------------------------------------------------------------------------------------------------------

const visible = t => String(t).replace(/\r?\n/g, "↵").replace(/\t/g, "⇥").replace(/[\u0000-\u001f\u007f]/g, "·").replace(/^ +| +$/g, s => "␣".repeat(s.length)) || "∅";
const short = (t, n = 16) => { const c = Array.from(visible(t)); return c.length > n ? c.slice(0, n - 1).join("") + "…" : c.join(""); };
const number = v => v === 0 ? "0" : Math.abs(v) >= 0.001 && Math.abs(v) < 1e5 ? String(+v.toPrecision(3)) : v.toExponential(1);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key in node && key !== "role") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter(c => c !== null));  // strings become text nodes
  return node;
}

// ---- the explorer -----------------------------------------------------------------------------------------------------------

export function explorer(root, host) {
  const about = host.about, dpr = Math.max(1, window.devicePixelRatio || 1);
  const state = { mode: about.modes[0], by: "tokens", reduce: "max", log: false, hide: false, threshold: 0, lines: false, at: [0, 0], head: null, window: null,
                  cell: null, pinned: null, drag: null, ablated: new Set(), metric: null };
  let grid = null, map = null, row = null, said = null, turn = 0, frame = null, geometry = {}, failure = "", pictures = { key: null, list: [] };

  // -- the frame: controls, canvas, read-out, side
  const choice = (label, options, key, change) => make("label", {}, label, make("select", { "aria-label": label, onchange: e => { state[key] = e.target.value; change(); } },
    ...Object.entries(options).map(([value, text]) => make("option", { value }, text))));
  const tick = (label, key, change) => make("label", {}, make("input", { type: "checkbox", onchange: e => { state[key] = e.target.checked; change(); } }), label);
  const pick = (list, names) => Object.fromEntries(list.map(k => [k, names[k] ?? k]));
  const back = make("button", { onclick: leave, title: "Escape" }, "← Back"), reset = make("button", { onclick: restart }, "Reset");
  const title = make("div", { className: "tfx-title" });
  const limit = make("span", { className: "tfx-weight" }, "0");
  const slider = make("input", { type: "range", min: 0, max: 100, value: 0, "aria-label": "threshold",
    oninput: e => { state.threshold = e.target.value / 100; pictures.key = null; draw(); } });
  const lines = make("label", {}, make("input", { type: "checkbox", onchange: e => { state.lines = e.target.checked; draw(); } }), "lines");
  const pooled = choice("blocks", { max: "largest", mean: "mean" }, "reduce", load);
  const bar = make("div", { className: "tfx-bar" }, title, back, reset,
    about.modes.length > 1 ? choice("show", pick(about.modes, MODES), "mode", restart) : null,
    Object.keys(about.labels).length > 1 ? choice("by", pick(Object.keys(about.labels), {}), "by", restart) : null,
    pooled, tick("log color", "log", load), tick("hide first column", "hide", draw), lines, make("label", {}, "hide below", slider, limit));
  const canvas = make("canvas", { tabIndex: 0, role: "application", "aria-label": "attention: arrow keys move, Enter opens or pins, x ablates the head, + and - zoom, Escape goes back" });
  const read = make("div", { className: "tfx-read", "aria-live": "polite" }), stage = make("div", { className: "tfx-stage" }, canvas, read);
  const side = make("aside", { className: "tfx-side" });
  const panels = { boxes: make("section"), metric: make("section"), lens: make("section"), image: make("section"), words: make("section"), bars: make("section"), help: make("section") };
  side.append(...Object.values(panels));
  const note = make("div", { className: "tfx-note" });
  root.classList.add("tfx");
  root.setAttribute("data-lm-suppress-shortcuts", "true");  // JupyterLab keeps its one-letter shortcuts to itself while the focus is here
  root.replaceChildren(bar, make("div", { className: "tfx-body" }, stage, side), note);
  const c = canvas.getContext("2d");

  // -- what is shown
  const labels = () => about.labels[state.by], size = () => labels().length;
  const heads = l => grid ? grid.heads[l] : about.heads[l];
  const options = signed => ({ log: state.log, signed, threshold: state.threshold });
  const name = (l, h) => state.mode === "rollout" ? `up to layer ${l}` : `layer ${l} · head ${h}`;
  const view = () => state.window ?? { rows: [0, size()], cols: [0, size()] };
  const start = i => labels()[i], cellLabel = (from, to) => from + 1 >= to ? [start(from), `#${from}`] : [start(from), `#${from}–${to - 1}`];
  const drawable = () => state.head !== null && size() <= 64 && !state.window;

  async function load() {
    const mine = ++turn, { mode, by, reduce } = state;
    failure = "";
    const wanted = state.head === null ? { kind: "grid", mode, by } :
      { kind: "window", mode, by, reduce, layer: state.head[0], head: state.head[1], ...view(), limit: 512, code: state.log ? "log" : "linear" };
    try {
      const { meta, bytes } = await host.ask(wanted);
      if (mine !== turn) return;  // the reader has gone on
      if (state.head === null) { grid = { ...meta, mode, by, bytes }; pictures.key = null; }
      else map = { ...meta, values: weights(bytes, meta.shape[1], meta.scales, { ...meta, first: meta.cols[0] === 0 }) };
      if (state.pinned !== null) await pin(state.pinned);
    } catch (error) { if (mine === turn) failure = error.message; }
    draw();
  }

  async function pin(query) {
    state.pinned = query;
    if (query === null) { row = null; return draw(); }
    listen();
    const [layer, head] = state.head, { mode, by } = state, n = size();
    const { meta, bytes } = await host.ask({ kind: "window", mode, by, reduce: state.reduce, layer, head, rows: [query, query + 1], cols: [0, n], limit: n, code: "linear" });
    if (state.pinned !== query || state.head === null) return;
    row = { ...meta, query: [meta.rows[0], meta.rows[1]], values: weights(bytes, meta.shape[1], meta.scales, { ...meta, first: true }) };
    draw();
  }

  // -- the lens: what the model would answer at the pinned query after each layer, with the ablations in force
  async function listen() {
    const query = state.pinned, chosen = [...state.ablated].sort(), same = () => query === state.pinned && chosen.join() === [...state.ablated].sort().join();
    if (!about.lens || state.by !== "tokens" || query === null || said?.wanted === query + ":" + chosen.join(";")) return;
    said = { wanted: query + ":" + chosen.join(";"), query };
    try {
      const { meta } = await host.ask({ kind: "lens", query, heads: chosen.map(k => k.split(",").map(Number)) });
      if (same()) said = { ...said, ...meta };
    } catch (error) { if (same()) said = { ...said, note: error.message }; }
    draw();
  }

  function open(l, h) { Object.assign(state, { head: [l, h], at: [l, h], window: null, cell: null, pinned: null }); map = row = null; load(); }
  function zoom(rows, cols) { Object.assign(state, { window: { rows, cols }, cell: null }); load(); }

  function leave() {
    if (state.head === null) return;
    if (state.drag) state.drag = null;
    else if (state.window) { state.window = null; state.cell = null; return load(); }
    else if (state.pinned !== null) return pin(null);
    else return restart();
    draw();
  }

  function restart() {
    Object.assign(state, { head: null, window: null, cell: null, pinned: null });
    map = row = null;
    load();
  }

  // -- ablation: which heads are silent, and what that does to the metric
  const key = (l, h) => `${l},${h}`;
  async function ablate(l, h, on = !state.ablated.has(key(l, h))) {
    if (!about.metric || state.mode === "rollout") return;
    state.ablated[on ? "add" : "delete"](key(l, h));
    await measure();
  }

  async function measure() {
    const chosen = [...state.ablated].sort(), heads = chosen.map(k => k.split(",").map(Number));
    state.metric = { waiting: true };
    draw();
    try {
      const { meta } = await host.ask({ kind: "ablate", heads });
      if (chosen.join() === [...state.ablated].sort().join()) state.metric = meta;
    } catch (error) { state.metric = { note: error.message }; }
    listen();
    draw();
  }

  // -- drawing
  function draw() { if (!frame) frame = requestAnimationFrame(() => { frame = null; paint(); }); }

  function paint() {
    const css = getComputedStyle(root), ink = { text: css.color, soft: css.getPropertyValue("--tfx-soft").trim(), line: css.getPropertyValue("--tfx-line").trim(),
      ground: css.backgroundColor, panel: css.getPropertyValue("--tfx-panel").trim(), accent: css.getPropertyValue("--tfx-accent").trim(), font: css.fontFamily };
    theme(root, css.backgroundColor);
    root.classList.toggle("tfx-one", state.head !== null);
    const width = Math.max(300, stage.clientWidth - 24);
    if (state.head === null) { if (grid) paintGrid(width, ink); }
    else if (map) (state.lines && drawable() ? paintLines : paintMap)(width, ink);
    words();
    panelsNow(ink);
  }

  function sheet(width, height) {
    canvas.width = Math.round(width * dpr); canvas.height = Math.round(height * dpr);
    canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
    c.setTransform(dpr, 0, 0, dpr, 0, 0);
    c.direction = "ltr"; c.imageSmoothingEnabled = false; c.textBaseline = "middle";
  }

  function text(string, x, y, ink, { size = 11, align = "left", turn = 0, bold = false, fill = ink.soft } = {}) {
    c.save();
    c.translate(x, y); c.rotate(turn);
    c.font = `${bold ? 600 : 400} ${size}px ${ink.font}`; c.textAlign = align; c.fillStyle = fill;
    c.fillText(string, 0, 0);
    c.restore();
  }

  function thumbs() {
    const wanted = [state.reduce, state.log, state.hide, state.threshold, grid.mode, grid.by].join();
    if (pictures.key === wanted) return pictures.list;
    const { n, scales, signed } = grid, one = n * n, which = scales[state.reduce] ? state.reduce : "max", skipped = which === "mean" ? scales.max.length * one : 0;
    pictures = { key: wanted, list: scales[which].map((pair, i) => {
      const values = weights(grid.bytes.subarray(skipped + i * one, skipped + (i + 1) * one), n, pair, { signed });
      return picture(values, n, n, extreme(values, n, state.hide), options(signed), state.hide);
    }) };
    return pictures.list;
  }

  function paintGrid(width, ink) {
    const layers = grid.heads.length, widest = Math.max(...grid.heads), left = 58, top = 34;
    const step = Math.max(20, Math.min(118, Math.floor((width - left - 4) / widest))), gap = step > 40 ? 6 : 3, list = thumbs();
    sheet(Math.max(left + widest * step, 300), top + layers * step + 2);
    geometry = { left, top, step };
    c.fillStyle = ink.ground; c.fillRect(0, 0, canvas.width, canvas.height);
    if (state.mode !== "rollout") {
      text("head", left - 10, 22, ink, { align: "right" });
      for (let h = 0; h < widest; h++) text(String(h), left + h * step + (step - gap) / 2, 22, ink, { align: "center", size: step > 26 ? 11 : 9 });
    }
    let i = 0;
    for (let l = 0; l < layers; l++) {
      text(`layer ${l}`, left - 10, top + l * step + (step - gap) / 2, ink, { align: "right" });
      for (let h = 0; h < grid.heads[l]; h++) {
        const x = left + h * step, y = top + l * step, s = step - gap, here = state.at[0] === l && state.at[1] === h, silent = state.ablated.has(key(l, h)) && state.mode !== "rollout";
        c.fillStyle = ink.panel; c.fillRect(x, y, s, s);
        c.globalAlpha = silent ? 0.25 : 1;
        c.drawImage(list[i++], x, y, s, s);
        c.globalAlpha = 1;
        if (silent) { c.strokeStyle = "#d55e00"; c.lineWidth = 2; c.beginPath(); c.moveTo(x + 4, y + 4); c.lineTo(x + s - 4, y + s - 4); c.moveTo(x + s - 4, y + 4); c.lineTo(x + 4, y + s - 4); c.stroke(); }
        c.strokeStyle = here ? ink.accent : ink.line; c.lineWidth = here ? 3 : 1;
        c.strokeRect(x - 0.5, y - 0.5, s + 1, s + 1);
      }
    }
  }

  function axis(ink) {
    const { rows, cols, block } = map, [nr, nc] = map.shape;
    c.font = `11px ${ink.font}`;
    const wide = Math.min(116, Math.max(30, ...Array.from({ length: Math.min(nr, 400) }, (_, i) => c.measureText(short(start(rows[0] + i * block))).width)) + 10);
    return { wide, rows, cols, block, nr, nc };
  }

  function paintMap(width, ink) {
    const { wide, rows, cols, block, nr, nc } = axis(ink), under = 92, left = wide + 16, top = wide + 18;
    const side = Math.max(220, Math.min(width - left - 74, 720, Math.max(340, window.innerHeight * 0.62))), cw = side / nc, ch = side / nr;
    sheet(left + side + 74, top + side + (row ? under : 10));
    geometry = { left, top, side, cw, ch };
    c.fillStyle = ink.ground; c.fillRect(0, 0, canvas.width, canvas.height);
    const skip = state.hide && cols[0] === 0, peak = extreme(map.values, nc, skip);
    c.fillStyle = ink.panel; c.fillRect(left, top, side, side);
    c.drawImage(picture(map.values, nr, nc, peak, options(map.signed), skip), left, top, side, side);
    c.strokeStyle = ink.line; c.lineWidth = 1; c.strokeRect(left - 0.5, top - 0.5, side + 1, side + 1);
    text("key →", left, 9, ink, { size: 11 }); text("query ↓", left - 8, top - 12, ink, { align: "right" });
    ticks(nr, ch, i => rows[0] + i * block, (i, label, on) => mark(label, left - 7, top + (i + 0.5) * ch, "right", 0, on, ink), state.cell?.[0], pinnedCell());
    ticks(nc, cw, i => cols[0] + i * block, (i, label, on) => mark(label, left + (i + 0.5) * cw, top - 7, "left", -Math.PI / 2, on, ink), state.cell?.[1], null);
    scale(left + side + 16, top, Math.min(side, 180), peak, ink);
    const lit = pinnedCell();
    if (lit !== null) outline(left, top + lit * ch, side, ch, ink.accent);
    if (state.cell) { outline(left + state.cell[1] * cw, top, cw, side, ink.soft); outline(left, top + state.cell[0] * ch, side, ch, ink.soft);
      outline(left + state.cell[1] * cw, top + state.cell[0] * ch, cw, ch, "#d55e00", 2); }
    if (state.drag?.to) { const [x0, y0] = state.drag.from, [x1, y1] = state.drag.to; c.fillStyle = "rgba(90,169,245,.25)"; c.fillRect(x0, y0, x1 - x0, y1 - y0); outline(x0, y0, x1 - x0, y1 - y0, ink.accent, 2); }
    if (row) strip(left, top + side + 14, side, 56, cols, ink);
  }

  function outline(x, y, w, h, style, line = 1) { c.strokeStyle = style; c.lineWidth = line; c.strokeRect(x, y, w, h); }
  function pinnedCell() {
    if (state.pinned === null || !map) return null;
    const at = Math.floor((state.pinned - map.rows[0]) / map.block);
    return at >= 0 && at < map.shape[0] ? at : null;
  }

  function ticks(n, step, position, put, hot, pinned) {
    const every = Math.max(1, Math.ceil(11 / step)), near = i => [hot, pinned].some(p => p !== null && p !== undefined && Math.abs(p - i) * step < 12);
    for (let i = 0; i < n; i += every) if (!near(i)) put(i, start(position(i)), false);
    for (const i of new Set([pinned, hot])) if (i !== null && i !== undefined) put(i, start(position(i)), true);
  }

  function mark(label, x, y, align, turn, on, ink) {
    const string = short(label);
    if (on) {
      c.font = `600 11px ${ink.font}`;
      const w = c.measureText(string).width + 8;
      c.save(); c.translate(x, y); c.rotate(turn); c.fillStyle = ink.accent;
      c.fillRect(align === "right" ? -w + 4 : -4, -8, w, 16);
      c.restore();
    }
    text(string, x, y, ink, { align, turn, bold: on, fill: on ? "#ffffff" : ink.text });
  }

  function scale(x, y, height, peak, ink) {
    const signed = map.signed, log = state.log && !signed;
    for (let i = 0; i < height; i++) {
      const u = 1 - i / (height - 1), value = signed ? (2 * u - 1) * peak : log ? peak * 10 ** (DECADES * (u - 1)) : u * peak;
      c.fillStyle = `rgb(${color(value, peak, { log, signed })})`; c.fillRect(x, y + i, 11, 1.5);
    }
    const ends = signed ? [peak, 0, -peak] : log ? [peak, peak * 10 ** (-DECADES / 2), peak * 10 ** -DECADES] : [peak, peak / 2, 0];
    ends.forEach((v, i) => text(number(v), x + 16, y + i * height / 2 + (i === 0 ? 5 : i === 2 ? -4 : 0), ink, { size: 10 }));
  }

  // The pinned query's weights, key by key, under the map's columns.
  function strip(x, y, width, height, cols, ink) {
    const from = cols[0], to = Math.min(cols[1], row.values.length * row.block), n = Math.ceil((to - from) / row.block), step = width / n, first = Math.floor(from / row.block);
    const shown = row.values.slice(first, first + n).map((v, i) => state.hide && from === 0 && i === 0 ? 0 : v), peak = extreme(shown, n, false), base = row.signed ? y + height / 2 : y + height;
    for (let i = 0; i < n; i++) {
      const h = Math.abs(shown[i]) / peak * (row.signed ? height / 2 : height);
      c.fillStyle = row.signed ? (shown[i] < 0 ? "#2166ac" : "#b2182b") : ink.accent;
      c.fillRect(x + i * step + (step > 3 ? 0.5 : 0), shown[i] < 0 ? base : base - h, Math.max(0.6, step - (step > 3 ? 1 : 0)), h);
    }
    c.strokeStyle = ink.line; c.beginPath(); c.moveTo(x, base + 0.5); c.lineTo(x + width, base + 0.5); c.stroke();
    text(number(peak), x + width + 6, y + 5, ink, { size: 10 });
    text(`weights of “${short(labels()[state.pinned])}” #${state.pinned}`, x, y + height + 13, ink, { fill: ink.text });
  }

  // Queries at the left, keys at the right, a line a weight.
  function paintLines(width, ink) {
    const { wide, nr, nc } = axis(ink), step = Math.max(15, Math.min(24, 560 / Math.max(nr, nc))), left = wide + 14, right = Math.min(width - wide - 14, left + 340), top = 30;
    sheet(right + wide + 14, top + Math.max(nr, nc) * step + 10);
    geometry = { left, right, top, ch: step, lines: true };
    c.fillStyle = ink.ground; c.fillRect(0, 0, canvas.width, canvas.height);
    const focus = state.cell?.[0] ?? pinnedCell(), skip = state.hide, peak = extreme(map.values, nc, skip), y = i => top + (i + 0.5) * step;
    text("query", left - 6, 12, ink, { align: "right" }); text("key", right + 6, 12, ink);
    for (let q = 0; q < nr; q++) for (let k = skip ? 1 : 0; k < nc; k++) {
      const value = map.values[q * nc + k], at = place(value, peak, state.log && !map.signed);
      if (at < Math.max(0.02, state.threshold)) continue;
      c.globalAlpha = focus === null ? at * 0.8 : q === focus ? Math.max(0.12, at) : at * 0.08;
      c.strokeStyle = map.signed ? (value < 0 ? "#4393c3" : "#d6604d") : ink.accent; c.lineWidth = q === focus ? 1 + 3 * at : 1 + at;
      c.beginPath(); c.moveTo(left, y(q)); c.bezierCurveTo((left + right) / 2, y(q), (left + right) / 2, y(k), right, y(k)); c.stroke();
    }
    c.globalAlpha = 1;
    let best = null;
    if (focus !== null) { best = 0; for (let k = 1; k < nc; k++) if (Math.abs(map.values[focus * nc + k]) > Math.abs(map.values[focus * nc + best])) best = k; }
    for (let i = 0; i < nr; i++) mark(start(i), left - 6, y(i), "right", 0, i === focus, ink);
    for (let i = 0; i < nc; i++) mark(start(i), right + 6, y(i), "left", 0, i === (state.cell?.[1] ?? best), ink);
  }

  // -- the words beside the picture
  function words() {
    back.disabled = state.head === null;
    pooled.hidden = state.head === null ? !grid || grid.block === 1 : !map || map.block === 1 || (map.reduce ?? state.reduce) !== state.reduce;
    lines.hidden = !drawable();
    const one = state.head !== null, where = one ? name(...state.head) : `${about.layers.length} layers`;
    const counted = state.by === "tokens" ? `${about.labels.tokens.length.toLocaleString("en")} tokens` : `${size()} ${state.by}`;
    title.replaceChildren(one ? where : about.title, make("small", {}, one ? `${about.title} · ${counted}` : `${where} · ${about.heads.reduce((a, b) => a + b, 0)} heads · ${counted}`));
    const peak = one && map ? extreme(map.values, map.shape[1], state.hide && map.cols[0] === 0) : null, t = state.threshold;
    limit.textContent = peak === null ? `${Math.round(100 * t)} %` : number(state.log && !map.signed ? (t ? peak * 10 ** (DECADES * (t - 1)) : 0) : t * peak);
    note.textContent = [failure, about.note, grid?.note].filter(Boolean).join(" · ");
    note.hidden = !note.textContent;
    if (!one) return readGrid();
    if (!map) return read.replaceChildren("…");
    const block = map.block > 1 ? ` · ${map.block} × ${map.block} positions a cell, ${(map.reduce ?? state.reduce) === "max" ? "largest" : "mean"} weight` : "";
    if (!state.cell) return read.replaceChildren(`Hover: weight of a cell. Click: pin a query. Drag: zoom.${block}`);
    const [r, k] = state.cell, value = map.values[r * map.shape[1] + k], from = (axis, i) => map[axis][0] + i * map.block, to = (axis, i) => Math.min(from(axis, i) + map.block, map[axis][1]);
    const side = (axis, i) => { const [label, at] = cellLabel(from(axis, i), to(axis, i)); return [make("b", {}, make("bdi", {}, visible(label))), ` ${at}${tag(from(axis, i))}`]; };
    read.replaceChildren("query ", ...side("rows", r), " → key ", ...side("cols", k), "  ", make("span", { className: "tfx-weight" }, number(value)), block);
  }

  function tag(i) {
    const parts = state.by === "tokens" ? [about.roles?.[i], about.groups?.[i] === undefined || about.groups?.[i] === null ? null : `group ${about.groups[i]}`].filter(Boolean) : [];
    return parts.length ? ` (${parts.join(", ")})` : "";
  }

  function readGrid() {
    if (!grid) return read.replaceChildren("…");
    const [l, h] = state.at, i = grid.heads.slice(0, l).reduce((a, b) => a + b, 0) + h, [first, rest] = grid.scales.max[i] ?? [0, 0];
    read.replaceChildren(make("b", {}, name(l, h)), ` (${about.layers[l]}): largest `, make("span", { className: "tfx-weight" }, number(rest)), " beside ",
      make("span", { className: "tfx-weight" }, number(first)), ` in the first ${grid.block > 1 ? `${grid.block} columns` : "column"}. Click opens it${about.metric ? ", Shift-click ablates it" : ""}. Every head has a color scale of its own.`);
  }

  // -- the side: check-boxes, metric, the pinned query
  function panelsNow(ink) {
    const one = state.head !== null, metric = about.metric && state.mode !== "rollout";
    panels.boxes.hidden = panels.metric.hidden = !metric;
    if (metric) { boxes(one); figures(); }
    for (const k of ["words", "bars", "image"]) panels[k].hidden = !(one && row) || (k === "image" && (!about.image || state.by !== "tokens"));
    panels.lens.hidden = !(one && row && about.lens && state.by === "tokens");
    if (!panels.lens.hidden) lens();
    if (one && row) { sentence(ink); bars(); if (!panels.image.hidden) overlay(); }
    panels.help.hidden = one && row;
    panels.help.replaceChildren(make("h4", {}, one ? "Keys" : "How to read this"), ...(one ? ["Arrow keys move the cell, Enter pins its query, + and − zoom, Escape goes back" + (about.metric ? ", x ablates the head." : ".")] :
      ["A row of a square is a query, a column a key: what looks, and what is looked at.", "Arrow keys move, Enter opens a head" + (about.metric ? ", x ablates it." : ".")]).map(t => make("p", {}, t)));
  }

  function boxes(one) {
    const focus = document.activeElement?.dataset?.head, box = (l, h) => {
      const node = make("input", { type: "checkbox", checked: state.ablated.has(key(l, h)), "aria-label": `ablate layer ${l} head ${h}`, title: `layer ${l} head ${h}`, onchange: e => ablate(l, h, e.target.checked) });
      node.dataset.head = key(l, h);
      return node;
    };
    const head = make("h4", {}, "Ablate heads" + (about.saved ? " (one at a time)" : ""));
    if (one) panels.boxes.replaceChildren(head, make("label", { className: "tfx-pick" }, box(...state.head), `without ${name(...state.head)}`));
    else {
      const widest = Math.max(...about.heads), top = make("tr", {}, make("th"), ...Array.from({ length: widest }, (_, h) => make("th", {}, String(h))));
      const body = about.heads.map((n, l) => make("tr", {}, make("th", {}, String(l)), ...Array.from({ length: n }, (_, h) => make("td", {}, box(l, h)))));
      const scrolled = panels.boxes.querySelector(".tfx-scroll")?.scrollTop ?? 0, area = make("div", { className: "tfx-scroll" }, make("table", { className: "tfx-boxes" }, top, ...body));
      panels.boxes.replaceChildren(head, area);
      area.scrollTop = scrolled;
    }
    if (focus) panels.boxes.querySelector(`[data-head="${focus}"]`)?.focus({ preventScroll: true });
  }

  function figures() {
    const m = state.metric, n = state.ablated.size;
    if (!m || m.waiting) return panels.metric.replaceChildren(make("p", {}, m ? "running the model …" : "Tick a head to run the model without it."));
    if (!m.names) return panels.metric.replaceChildren(make("p", {}, m.note));
    const cells = (...texts) => make("tr", {}, ...texts.map(t => make("td", {}, t)));
    const rows = m.names.map((name, i) => cells(name, number(m.baseline[i]), m.ablated ? number(m.ablated[i]) : "–", m.ablated ? (m.ablated[i] > m.baseline[i] ? "+" : "") + number(m.ablated[i] - m.baseline[i]) : "–"));
    const headings = ["", "baseline", n === 1 ? `without ${name(...[...state.ablated][0].split(","))}` : `without ${n}`, "change"];
    panels.metric.replaceChildren(make("table", { className: "tfx-metric" }, make("tr", {}, ...headings.map(t => make("th", {}, t))), ...rows), ...(m.note ? [make("p", {}, m.note)] : []),
      make("button", { disabled: n === 0, onclick: () => { state.ablated.clear(); measure(); } }, "Clear"));
  }

  function lens() {
    const list = said?.said ? said.places.map((place, i) => { const [text, share] = said.said[i];
      return make("tr", {}, make("th", { title: place }, i === 0 ? "input" : `layer ${i - 1}`), make("td", {}, make("bdi", {}, visible(text))), make("td", {}, share === null ? "" : number(share))); }) : [];
    panels.lens.replaceChildren(make("h4", {}, "Read out after “", make("bdi", {}, short(labels()[state.pinned])), `” #${state.pinned}`),
      list.length ? make("div", { className: "tfx-scroll" }, make("table", { className: "tfx-lens" }, ...list)) : make("p", {}, said?.note ?? "running the model …"),
      ...(said?.note && list.length ? [make("p", {}, said.note)] : []));
  }

  function shade(value, peak, signed, ink) {
    if (signed) return `rgba(${value < 0 ? "33,102,172" : "178,24,43"},${0.65 * place(value, peak, false)})`;
    return `color-mix(in srgb, ${ink.accent} ${Math.round(60 * place(value, peak, state.log))}%, transparent)`;
  }

  function sentence(ink) {
    const n = size(), many = 400, from = Math.max(0, Math.min(state.pinned - many / 2, n - many)), to = Math.min(n, from + many), peak = extreme(row.values, n, state.hide);
    const list = make("div", { className: "tfx-words" }), kept = panels.words.querySelector(".tfx-words")?.scrollTop ?? 0;
    for (let i = from; i < to; i++) {
      const value = row.values[Math.floor(i / row.block)], node = make("span", { title: `#${i}: ${number(value)}`, onclick: () => pin(i) }, make("bdi", {}, visible(labels()[i])));
      if (!(state.hide && i === 0)) node.style.background = shade(value, peak, row.signed, ink);
      if (i === state.pinned) node.classList.add("tfx-now");
      list.append(node, " ");
    }
    panels.words.replaceChildren(make("h4", {}, "What “", make("bdi", {}, short(labels()[state.pinned])), `” #${state.pinned} looks at`), list);
    list.scrollTop = kept;
  }

  function bars() {
    const order = Array.from(row.values, (v, i) => i).filter(i => !(state.hide && i === 0)).sort((a, b) => Math.abs(row.values[b]) - Math.abs(row.values[a])).slice(0, 10);
    const peak = Math.abs(row.values[order[0]]) || 1, box = make("div", { className: "tfx-bars" });
    for (const i of order) {
      const bar = make("i"), value = row.values[i];
      bar.style.width = `${100 * Math.abs(value) / peak}%`;
      if (row.signed) bar.style.background = value < 0 ? "#4393c3" : "#d6604d";
      box.append(make("bdi", { title: `#${i * row.block}` }, short(labels()[i * row.block], 18)), make("div", {}, bar), make("span", {}, number(value)));
    }
    panels.bars.replaceChildren(make("h4", {}, "Largest weights"), box);
  }

  // An image's patches under the pinned query's weights; a click on a patch pins it.
  function overlay() {
    const { rows, cols, special } = about.image, [height, width] = about.image.shape, zoomed = 260 / Math.max(height, width), sheet = make("canvas", { width: width * zoomed, height: height * zoomed });
    const p = sheet.getContext("2d"), pixels = new ImageData(width, height), small = make("canvas", { width, height });
    for (let i = 0; i < width * height; i++) pixels.data.set([host.image[3 * i], host.image[3 * i + 1], host.image[3 * i + 2], 255], 4 * i);
    small.getContext("2d").putImageData(pixels, 0, 0);
    p.imageSmoothingEnabled = false; p.drawImage(small, 0, 0, sheet.width, sheet.height);
    const values = row.values.slice(special), heat = picture(values, rows, cols, extreme(values, cols, false), options(row.signed), false), w = sheet.width / cols, h = sheet.height / rows;
    p.globalAlpha = 0.6; p.imageSmoothingEnabled = true; p.drawImage(heat, 0, 0, sheet.width, sheet.height); p.globalAlpha = 1;
    const at = state.pinned - special;
    if (at >= 0) { p.strokeStyle = "#d55e00"; p.lineWidth = 2; p.strokeRect((at % cols) * w, Math.floor(at / cols) * h, w, h); }
    sheet.onclick = e => pin(special + Math.min(rows - 1, Math.floor(e.offsetY / h)) * cols + Math.min(cols - 1, Math.floor(e.offsetX / w)));
    panels.image.replaceChildren(make("h4", {}, "Over the image"), sheet);
  }

  // -- mouse and keys
  function spot(e) {
    const box = canvas.getBoundingClientRect(), x = e.clientX - box.left, y = e.clientY - box.top, g = geometry, inside = (i, n) => i >= 0 && i < n;
    if (state.head === null) {
      if (!grid) return { x, y, cell: null };
      const l = Math.floor((y - g.top) / g.step), h = Math.floor((x - g.left) / g.step);
      return { x, y, cell: inside(l, grid.heads.length) && inside(h, grid.heads[l]) ? [l, h] : null };
    }
    if (!map) return { x, y, cell: null };
    const r = Math.floor((y - g.top) / g.ch);
    if (g.lines) return { x, y, cell: inside(r, map.shape[0]) ? (x < (g.left + g.right) / 2 ? [r, null] : null) : null };
    const k = Math.floor((x - g.left) / g.cw);
    return { x, y, cell: inside(r, map.shape[0]) && inside(k, map.shape[1]) ? [r, k] : null };
  }

  const best = r => { let at = 0; for (let k = 1; k < map.shape[1]; k++) if (Math.abs(map.values[r * map.shape[1] + k]) > Math.abs(map.values[r * map.shape[1] + at])) at = k; return at; };
  canvas.addEventListener("pointermove", e => {
    const { x, y, cell } = spot(e);
    if (state.head === null) { if (cell) state.at = cell; canvas.style.cursor = cell ? "pointer" : "default"; return draw(); }
    if (state.drag) { if (Math.hypot(x - state.drag.from[0], y - state.drag.from[1]) > 6 && !geometry.lines) state.drag.to = [x, y]; }
    state.cell = cell && [cell[0], cell[1] ?? best(cell[0])];
    canvas.style.cursor = cell ? "crosshair" : "default";
    draw();
  });
  canvas.addEventListener("pointerleave", () => { if (!state.drag) { state.cell = null; draw(); } });
  canvas.addEventListener("pointerdown", e => {
    const { x, y, cell } = spot(e);
    canvas.focus({ preventScroll: true, focusVisible: false });
    if (state.head !== null && cell) { state.drag = { from: [x, y], cell }; canvas.setPointerCapture(e.pointerId); }
  });
  canvas.addEventListener("pointerup", e => {
    const { cell } = spot(e), drag = state.drag;
    state.drag = null;
    if (state.head === null) return cell && (e.shiftKey ? ablate(...cell) : open(...cell));
    if (!drag) return;
    if (!drag.to) return pin(map.rows[0] + drag.cell[0] * map.block);
    const g = geometry, clamp = (v, n) => Math.max(0, Math.min(n - 1, Math.floor(v))), [nr, nc] = map.shape;
    const span = (a, b, n, axis) => { const lo = clamp(Math.min(a, b), n), hi = clamp(Math.max(a, b), n) + 1; return [map[axis][0] + lo * map.block, Math.min(map[axis][0] + hi * map.block, map[axis][1])]; };
    zoom(span((drag.from[1] - g.top) / g.ch, (drag.to[1] - g.top) / g.ch, nr, "rows"), span((drag.from[0] - g.left) / g.cw, (drag.to[0] - g.left) / g.cw, nc, "cols"));
  });
  canvas.addEventListener("pointercancel", () => { state.drag = null; draw(); });

  const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  canvas.addEventListener("keydown", e => {
    const move = MOVES[e.key], hop = e.shiftKey ? 8 : 1, keep = (v, n) => Math.max(0, Math.min(n - 1, v));
    if (move && state.head === null && grid) { const l = keep(state.at[0] + move[0] * hop, grid.heads.length); state.at = [l, keep(state.at[1] + move[1] * hop, grid.heads[l])]; }
    else if (move && map) { const [r, k] = state.cell ?? [0, 0]; state.cell = state.cell ? [keep(r + move[0] * hop, map.shape[0]), keep(k + move[1] * hop, map.shape[1])] : [0, 0]; }
    else if (e.key === "Enter" || e.key === " ") { if (state.head === null) open(...state.at); else if (state.cell) pin(map.rows[0] + state.cell[0] * map.block); }
    else if (e.key === "Escape") leave();
    else if (e.key === "x") ablate(...(state.head ?? state.at));
    else if ((e.key === "+" || e.key === "-") && map) around(e.key === "+" ? 0.5 : 2);
    else return;
    e.preventDefault(); e.stopPropagation();
    draw();
  });

  // Zoom by a factor about the cell of the keys.
  function around(factor) {
    const n = size(), [r, k] = state.cell ?? [map.shape[0] >> 1, map.shape[1] >> 1];
    const span = (axis, i) => { const now = map[axis][1] - map[axis][0], want = Math.min(n, Math.max(4, Math.round(now * factor))), middle = map[axis][0] + (i + 0.5) * map.block;
      const from = Math.max(0, Math.min(n - want, Math.round(middle - want / 2))); return [from, from + want]; };
    const rows = span("rows", r), cols = span("cols", k);
    if (rows[1] - rows[0] === n && cols[1] - cols[0] === n) { state.window = null; state.cell = null; load(); } else zoom(rows, cols);
  }

  // -- begin
  const watch = new ResizeObserver(() => draw()), dark = window.matchMedia("(prefers-color-scheme: dark)"), themed = new MutationObserver(() => setTimeout(draw, 60));
  watch.observe(stage);
  dark.addEventListener("change", draw);
  themed.observe(document.body, { attributes: true });
  const first = host.first;
  if (first) { grid = { ...first.meta, mode: state.mode, by: "tokens", bytes: first.bytes }; state.at = about.start; draw(); } else load();
  return () => { watch.disconnect(); themed.disconnect(); dark.removeEventListener("change", draw); if (frame) cancelAnimationFrame(frame); };
}

function theme(root, ground) {
  const [r, g, b] = (ground.match(/[\d.]+/g) ?? [255, 255, 255]).map(Number), dark = 0.3 * r + 0.59 * g + 0.11 * b < 128;
  if (!root.classList.contains(dark ? "tfx-dark" : "tfx-light")) { root.classList.toggle("tfx-dark", dark); root.classList.toggle("tfx-light", !dark); }
}

// ---- host 1: a kernel -------------------------------------------------------------------------------------------------------

const bytesOf = v => v ? new Uint8Array(v.buffer ?? v, v.byteOffset ?? 0, v.byteLength) : new Uint8Array();

function kernelHost(model) {
  const waiting = new Map(), about = model.get("about");
  let count = 0;
  const hear = (message, buffers) => {
    const done = waiting.get(message.id);
    if (!done) return;
    waiting.delete(message.id);
    if (message.error) done.reject(new Error(message.error)); else done.resolve({ meta: message.meta, bytes: bytesOf(buffers[0]) });
  };
  model.on("msg:custom", hear);
  const me = Math.random().toString(36).slice(2);  // two views of one widget ask apart
  const ask = request => new Promise((resolve, reject) => { const id = `${me}${count++}`; waiting.set(id, { resolve, reject }); model.send({ id, request }); });
  return { about, ask, first: { meta: about.first, bytes: bytesOf(model.get("thumbs")) }, image: bytesOf(model.get("image")), close: () => model.off("msg:custom", hear) };
}

function render({ model, el }) {
  const host = kernelHost(model), root = document.createElement("div");
  el.append(root);
  const stop = explorer(root, host);
  return () => { stop(); host.close(); };
}

export default { render };

// ---- host 2: a saved page ---------------------------------------------------------------------------------------------------

function pool(bytes, rows, cols, block, reduce, signed) {
  const nr = Math.ceil(rows / block), nc = Math.ceil(cols / block), out = new Uint8Array(nr * nc);
  for (let r = 0; r < nr; r++) for (let k = 0; k < nc; k++) {
    let best = signed ? 128 : 0, sum = 0, n = 0;
    for (let i = r * block; i < Math.min((r + 1) * block, rows); i++) for (let j = k * block; j < Math.min((k + 1) * block, cols); j++) {
      const q = bytes[i * cols + j];
      sum += q; n++;
      if (signed ? Math.abs(q - 128) > Math.abs(best - 128) : q > best) best = q;
    }
    out[r * nc + k] = reduce === "mean" ? Math.round(sum / n) : best;
  }
  return out;
}

function pageHost(data, blob) {
  const part = ([from, to]) => blob.subarray(from, to);
  const answer = {
    grid: ({ mode, by }) => { const found = data.views[`${mode}/${by}`]; return { meta: found.grid, bytes: part(found.thumbs) }; },
    ablate: ({ heads }) => {
      const { names, baseline, table } = data.ablations, lone = heads.length === 1 ? table[heads[0].join()] : null;
      return { meta: { names, baseline, ablated: lone, note: heads.length > 1 ? "The saved page knows single heads only: tick one, or run the notebook." : "Single heads only, computed when the page was saved." } };
    },
    lens: ({ query, heads }) => ({ meta: { query, places: Object.keys(data.lens), said: Object.values(data.lens).map(answers => answers[query]),
      note: heads.length ? "The saved page knows the lens of the whole model only." : undefined } }),
    window: ({ mode, by, layer, head, rows, cols, limit, reduce }) => {
      const found = data.views[`${mode}/${by}`], { block: b, n, signed } = found, i = found.grid.heads.slice(0, layer).reduce((a, c) => a + c, 0) + head, size = data.about.labels[by].length;
      const [r0, r1, c0, c1] = [Math.floor(rows[0] / b), Math.ceil(rows[1] / b), Math.floor(cols[0] / b), Math.ceil(cols[1] / b)], nr = r1 - r0, nc = c1 - c0;
      const all = part(found.heads), cut = new Uint8Array(nr * nc);
      for (let r = 0; r < nr; r++) cut.set(all.subarray(i * n * n + (r0 + r) * n + c0, i * n * n + (r0 + r) * n + c1), r * nc);
      const more = Math.max(1, Math.ceil(Math.max(nr, nc) / limit)), end = v => Math.min(v * b, size);
      return { meta: { rows: [r0 * b, end(r1)], cols: [c0 * b, end(c1)], block: b * more, shape: [Math.ceil(nr / more), Math.ceil(nc / more)], scales: found.scales[i], signed, code: "linear", reduce: b > 1 ? "max" : reduce },
               bytes: more > 1 ? pool(cut, nr, nc, more, b > 1 ? "max" : reduce, signed) : cut };
    },
  };
  const ask = async request => answer[request.kind](request), view = data.views[`${data.about.modes[0]}/tokens`];
  return { about: data.about, ask, first: { meta: view.grid, bytes: part(view.thumbs) }, image: data.image ? part(data.image) : null };
}

export async function page(root, data, packed) {
  const zipped = Uint8Array.from(atob(packed), c => c.charCodeAt(0));
  const blob = new Uint8Array(await new Response(new Blob([zipped]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer());
  explorer(root, pageHost(data, blob));
}
