// Draws figures and token strips, and says what was clicked: by pointer or by keyboard.
// The notebook's widgets and the offline pages run the same code.

const COLOURS = {
  light: {ink: "#1f2933", faint: "#5a6774", line: "#d9dee4", card: "#ffffff", mark: "#b3261e"},
  dark: {ink: "#e6e9ee", faint: "#a3adb8", line: "#333c46", card: "#1b2027", mark: "#ff8a80"},
};
const STYLE = `
.lp-view { color: var(--lp-ink); font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; min-width: 0; }
.lp-view[aria-busy="true"] { cursor: progress; }
.lp-view[aria-busy="true"] .lp-caption::after { content: " …"; }
.lp-view .lp-caption { margin: 0 0 4px; color: var(--lp-ink); font-weight: 600; overflow-wrap: anywhere; }
.lp-view .lp-focus { border-radius: 6px; outline: 2px solid transparent; outline-offset: -2px; }
.lp-view .lp-focus:focus-visible, .lp-view .lp-focus.lp-keys { outline-color: var(--lp-mark); }
.lp-view .lp-plot { width: 100%; overflow: hidden; }
.lp-view .lp-heard { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.lp-view details { font-size: 0.9em; color: var(--lp-faint); }
.lp-view summary { cursor: pointer; width: max-content; }
.lp-view .lp-numbers { max-height: 260px; overflow: auto; }
.lp-view table { border-collapse: collapse; font-variant-numeric: tabular-nums; color: var(--lp-ink); }
.lp-view th, .lp-view td { padding: 2px 10px; text-align: left; border-bottom: 1px solid var(--lp-line); white-space: pre-wrap; }
.lp-strip { line-height: 2.1; overflow-wrap: anywhere; max-height: 260px; overflow-y: auto; padding: 4px; }
.lp-strip span { display: inline-block; line-height: 1.5; margin: 1px; padding: 1px 3px; border: 1px solid var(--lp-line); border-radius: 4px; color: var(--lp-ink);
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; unicode-bidi: isolate; white-space: pre; }
.lp-strip[data-clicks] span { cursor: pointer; }
.lp-strip span[aria-selected="true"] { outline: 2px solid var(--lp-mark); }
.lp-strip span.lp-cursor { outline: 2px dashed var(--lp-mark); }
.lp-strip sup { color: var(--lp-mark); font-weight: 700; font-size: 0.75em; }
`;
const MOST_ROWS = 500;
const ROOM_FOR_Y = 220; // pixels of a heat map's labels on the left and colour bar on the right
const PIXELS_A_LABEL = 14;
const STEPS = [1, 2, 5, 10, 20, 50];

export async function loadPlotly(gzipped) {
  const stream = new Blob([gzipped]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = await new Response(stream).text();
  // In a module of its own, whatever module system the page has.
  const source =
    "const module = {exports: {}}, exports = module.exports, define = undefined;\n" +
    script + "\nexport default module.exports;";
  const url = URL.createObjectURL(new Blob([source], {type: "text/javascript"}));
  try {
    return (await import(url)).default;
  } finally {
    URL.revokeObjectURL(url);
  }
}

// JupyterLab says which theme it has; anywhere else the system does.
export function followTheme(listener) {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => {
    const lab = document.body.dataset.jpThemeLight;
    return lab === undefined ? system.matches : lab === "false";
  };
  let dark = isDark();
  const look = () => {
    if (dark !== isDark()) listener((dark = !dark));
  };
  const observer = new MutationObserver(look);
  observer.observe(document.body, {attributes: true, attributeFilter: ["data-jp-theme-light"]});
  system.addEventListener("change", look);
  listener(dark);
  return () => {
    observer.disconnect();
    system.removeEventListener("change", look);
  };
}

function made(kind, attributes = {}, text = "") {
  const element = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

function addStyle(root) {
  const home = root.getRootNode() === document ? document.head : root.getRootNode();
  if (home.querySelector && !home.querySelector("#lp-style")) {
    home.appendChild(made("style", {id: "lp-style"}, STYLE));
  }
}

// What both kinds of view share: a caption, something that takes the focus, what is read aloud, and
// the numbers as a table.
class Frame {
  constructor(root, {onClick = () => {}, onZoom = null, onSelect = () => {}} = {}) {
    Object.assign(this, {root, onClick, onZoom, onSelect, cursor: null, marks: {}});
    root.classList.add("lp-view");
    this.caption = made("p", {class: "lp-caption"});
    this.focus = made("div", {class: "lp-focus", tabindex: "0"});
    this.heard = made("div", {class: "lp-heard", "aria-live": "polite"});
    this.details = made("details");
    this.numbers = made("div", {class: "lp-numbers", tabindex: "0", "aria-label": "the numbers"});
    this.details.append(made("summary", {}, "The numbers"), this.numbers);
    this.details.addEventListener("toggle", () => this.tabulate());
    root.replaceChildren(this.caption, this.focus, this.heard, this.details);
    // JupyterLab would take arrow keys and Enter for itself.
    this.focus.addEventListener("keydown", (event) => this.pressed(event));
    this.focus.addEventListener("focusout", () => this.moveTo(null));
  }

  entitle(text) {
    this.caption.textContent = text;
    this.focus.setAttribute("aria-label", `${text}. Arrow keys move, Enter selects.`);
  }

  pressed(event) {
    const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    if (event.key in step) this.move(...step[event.key]);
    else if (event.key === "Enter" || event.key === " ") this.choose();
    else if (event.key === "Escape") this.moveTo(null);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  say(text) {
    this.heard.textContent = text;
  }

  tabulate() {
    if (!this.details.open) return;
    const [names, rows] = this.table();
    const table = made("table");
    const cells = (kind, values) => {
      const row = made("tr");
      row.append(...values.map((value) => made(kind, {}, shown(value))));
      return row;
    };
    table.append(cells("th", names), ...rows.slice(0, MOST_ROWS).map((row) => cells("td", row)));
    this.numbers.replaceChildren(table);
    if (rows.length > MOST_ROWS) {
      this.numbers.append(made("p", {}, `The first ${MOST_ROWS} of ${rows.length} rows.`));
    }
  }

  paint(dark) {
    this.dark = dark;
    for (const [name, value] of Object.entries(COLOURS[dark ? "dark" : "light"])) {
      this.root.style.setProperty(`--lp-${name}`, value);
    }
  }

  close() {}
}

function known(value) {
  return value !== null && value !== undefined && !Number.isNaN(value);
}

function shown(value) {
  if (!known(value)) return "";
  if (typeof value !== "number") return String(value);
  return Number.isInteger(value) ? String(value) : value.toPrecision(4);
}

export class FigureView extends Frame {
  constructor(root, {Plotly, templates, ...handlers}) {
    super(root, handlers);
    Object.assign(this, {Plotly, templates, spec: null, drawn: Promise.resolve(), wanted: 0});
    this.plot = made("div", {class: "lp-plot"});
    this.focus.setAttribute("role", "group");
    this.focus.append(this.plot);
    this.stopFollowing = followTheme((dark) => this.repaint(dark));
    addStyle(root);
    // Plotly itself follows the window only, not what else takes room beside it.
    this.room = 0;
    this.resized = new ResizeObserver(([{contentRect}]) => {
      if (!this.plot.on || Math.abs(contentRect.width - this.room) < 2) return;
      this.redraw();
    });
    this.resized.observe(this.plot);
  }

  // The figure {data, layout}, and where the selection is: {x, y}.
  show(spec, marks = {}) {
    Object.assign(this, {spec, marks});
    return this.redraw();
  }

  repaint(dark) {
    this.paint(dark);
    if (this.spec) this.redraw();
  }

  // One drawing at a time; of those that wait only the last is done.
  redraw() {
    const wanted = ++this.wanted;
    this.drawn = this.drawn.then(() => (wanted === this.wanted ? this.draw() : null));
    return this.drawn;
  }

  async draw() {
    const layout = {
      uirevision: "kept",
      ...this.spec.layout,
      template: this.templates[this.dark ? "dark" : "light"],
      shapes: [...(this.spec.layout.shapes ?? []), ...this.outlines()],
    };
    this.room = this.plot.clientWidth;
    Object.assign(layout, this.sparser(layout), this.room && {width: this.room});
    if (layout.height) this.plot.style.minHeight = layout.height + "px";
    const first = !this.plot.on;
    const options = {displaylogo: false, displayModeBar: "hover"};
    this.drawing = true;
    await this.Plotly.react(this.plot, this.spec.data, layout, options);
    this.drawing = false;
    if (first) this.listen();
    this.root.dataset.drawn = String(this.wanted);
    this.tabulate();
  }

  // Fewer labels along x where there is no room for all of them: figures do not know how wide they
  // will be, and plotly lets labels overlap that were asked for.
  sparser({xaxis}) {
    const {x, type} = this.spec.data[0] ?? {};
    if (type !== "heatmap" || !xaxis?.dtick || !x?.length) return {};
    const cell = x.length > 1 ? x[1] - x[0] : 1;
    const room = ((this.room - ROOM_FOR_Y) / x.length) * (xaxis.dtick / cell);
    const tight = STEPS.find((step) => room * step >= PIXELS_A_LABEL) ?? STEPS.at(-1);
    return tight > 1 ? {xaxis: {...xaxis, dtick: xaxis.dtick * tight}} : {};
  }

  listen() {
    this.plot.on("plotly_click", (event) => {
      const point = event.points[0];
      if (point) this.clicked(point, event.event);
    });
    // A lasso or a box around points of the first trace; a click gives them up again. So does
    // drawing anew, which nobody did by hand.
    const select = (event) => {
      const points = (event?.points ?? []).filter((point) => point.curveNumber === 0);
      if (!this.drawing) this.onSelect(points.map((point) => point.pointIndex));
    };
    this.plot.on("plotly_selected", select);
    this.plot.on("plotly_deselect", select);
    this.plot.on("plotly_relayout", (change) => {
      const moved = Object.keys(change).some((key) => /^[xy]axis\.(range|autorange)/.test(key));
      if (!this.onZoom || !moved) return;
      const {xaxis, yaxis} = this.plot._fullLayout;
      const whole = change["xaxis.autorange"] || change["yaxis.autorange"];
      this.onZoom(whole ? null : {x: [...xaxis.range], y: [...yaxis.range]});
    });
  }

  clicked(point, pointer) {
    const trace = this.plot._fullData[point.curveNumber];
    let {x, y} = point;
    if (trace.type === "heatmap" && pointer) {
      // plotly reports the cell that it hovered last, which a fast pointer has left.
      const box = this.plot.getBoundingClientRect();
      const {xaxis, yaxis} = point;
      x = nearest(trace.x, xaxis.p2d(pointer.clientX - box.left - xaxis._offset));
      y = nearest(trace.y, yaxis.p2d(pointer.clientY - box.top - yaxis._offset));
    }
    this.onClick({x, y, trace: point.curveNumber, index: point.pointIndex ?? null});
  }

  // The trace that the keyboard walks through, as a grid of x and y.
  grid() {
    const traces = this.plot._fullData ?? [];
    const map = traces.findIndex((trace) => trace.type === "heatmap");
    if (map >= 0) {
      const {x, y, z} = traces[map];
      return {trace: map, xs: [...x], ys: [...y], at: (i, j) => z[j][i]};
    }
    const chart = traces.findIndex((trace) => trace.x?.length && trace.hoverinfo !== "skip");
    if (chart < 0) return null;
    const {x, y, orientation} = traces[chart];
    return {trace: chart, xs: [...x], ys: null, y: [...y], sideways: orientation === "h"};
  }

  start(grid) {
    const near = (values, mark) => (mark === undefined ? 0 : values.indexOf(nearest(values, mark)));
    if (!grid.ys) return [near(grid.sideways ? grid.y : grid.xs, this.marks.x ?? this.marks.y), 0];
    return [near(grid.xs, this.marks.x), near(grid.ys, this.marks.y)];
  }

  move(right, down) {
    const grid = this.grid();
    if (!grid) return;
    const clamp = (value, values) => Math.min(Math.max(value, 0), values.length - 1);
    const [i, j] = this.cursor ?? this.start(grid);
    const range = this.plot._fullLayout.yaxis.range;
    const upwards = range[0] < range[1];
    if (grid.ys) {
      this.moveTo([clamp(i + right, grid.xs), clamp(j + (upwards ? -down : down), grid.ys)]);
    } else {
      const along = grid.sideways ? (upwards ? -down : down) : right;
      this.moveTo([clamp(i + along, grid.xs), 0]);
    }
  }

  moveTo(cursor) {
    if (this.cursor === null && cursor === null) return;
    this.cursor = cursor;
    if (cursor) this.say(this.describe());
    this.Plotly.relayout(this.plot, {
      shapes: [...(this.spec.layout.shapes ?? []), ...this.outlines()],
    });
  }

  here() {
    const grid = this.grid();
    const within = (index, values) => Math.min(index, values.length - 1);
    const at = this.cursor ?? this.start(grid);
    const [i, j] = [within(at[0], grid.xs), grid.ys ? within(at[1], grid.ys) : 0];
    const y = grid.ys ? grid.ys[j] : grid.y[i];
    return {x: grid.xs[i], y, z: grid.ys ? (grid.at(i, j) ?? null) : undefined, trace: grid.trace, index: i};
  }

  describe() {
    const {x, y, z} = this.here();
    const {xaxis, yaxis} = this.plot._fullLayout;
    const named = (axis, value) => `${axis.title?.text ?? ""} ${label(axis, value)}`;
    const text = `${named(xaxis, x)}, ${named(yaxis, y)}`;
    return z === undefined ? text : `${text}: ${known(z) ? shown(z) : "nothing"}`;
  }

  choose() {
    const grid = this.grid();
    if (!grid) return;
    const {x, y, trace, index} = this.here();
    this.onClick({x, y, trace, index});
  }

  outlines() {
    const ink = COLOURS[this.dark ? "dark" : "light"].mark;
    const shapes = [];
    const cell = (x, y, dash) => {
      const side = (axis, value) => {
        if (value === undefined || value === null) {
          return {[`${axis}ref`]: `${axis} domain`, [`${axis}0`]: 0, [`${axis}1`]: 1};
        }
        const half = this.width(axis) / 2;
        return {[`${axis}ref`]: axis, [`${axis}0`]: value - half, [`${axis}1`]: value + half};
      };
      shapes.push({
        type: "rect", ...side("x", x), ...side("y", y), line: {color: ink, width: 2, dash},
      });
    };
    const {x, y} = this.marks;
    if (x !== undefined || y !== undefined) cell(x, y, "solid");
    if (this.cursor) {
      const {x, y} = this.here();
      const grid = this.grid();
      cell(grid.ys || !grid.sideways ? x : undefined, grid.ys || grid.sideways ? y : undefined, "dot");
    }
    return shapes;
  }

  // How wide a cell is along an axis: pooled maps have cells of several positions.
  width(axis) {
    const values = this.plot._fullData?.[0]?.[axis];
    return values?.length > 1 ? Math.abs(values[1] - values[0]) || 1 : 1;
  }

  table() {
    const {xaxis, yaxis} = this.plot._fullLayout;
    const names = [xaxis.title?.text || "x", yaxis.title?.text || "y"];
    const rows = [];
    for (const trace of this.plot._fullData) {
      if (trace.type === "heatmap") {
        names[2] = trace.colorbar?.title?.text || "value";
        for (let j = 0; j < trace.y.length && rows.length <= MOST_ROWS; j++) {
          for (let i = 0; i < trace.x.length; i++) {
            const z = trace.z[j][i];
            if (known(z)) {
              rows.push([label(xaxis, trace.x[i]), label(yaxis, trace.y[j]), z]);
            }
          }
        }
      } else if (trace.x && trace.y) {
        names[2] = "series";
        for (let i = 0; i < trace.x.length; i++) {
          rows.push([label(xaxis, trace.x[i]), label(yaxis, trace.y[i]), trace.name ?? ""]);
        }
      }
    }
    return [names, rows];
  }

  close() {
    this.stopFollowing();
    this.resized.disconnect();
    this.Plotly.purge(this.plot);
  }
}

const parser = new DOMParser();

// A tick's name as plain text: plotly's own small markup and escapes taken out.
function label(axis, value) {
  const alias = axis.labelalias?.[value] ?? axis.labelalias?.[String(value).replace("-", "−")];
  if (alias === undefined) return typeof value === "number" ? shown(value) : plain(value);
  return plain(alias);
}

function plain(text) {
  return parser.parseFromString(String(text), "text/html").body.textContent;
}

function nearest(values, wanted) {
  let best = values[0];
  for (const value of values) if (Math.abs(value - wanted) < Math.abs(best - wanted)) best = value;
  return best;
}

export class StripView extends Frame {
  constructor(root, handlers) {
    super(root, handlers);
    this.strip = made("div", {class: "lp-strip"});
    this.focus.setAttribute("role", "listbox");
    this.focus.append(this.strip);
    this.strip.addEventListener("click", (event) => {
      const span = event.target.closest("span[data-pos]");
      if (span) this.onClick({x: Number(span.dataset.pos)});
    });
    this.stopFollowing = followTheme((dark) => this.paint(dark));
    addStyle(root);
  }

  // A strip {tokens, values, unit, clicks}, and its marks: {letter: position}.
  show(spec, marks = {}) {
    const {tokens, values, unit} = spec;
    if (this.spec?.tokens.length !== tokens.length) this.cursor = null;
    Object.assign(this, {spec, marks});
    this.strip.toggleAttribute("data-clicks", spec.clicks);
    const most = Math.max(...(values ?? []).filter(known).map(Math.abs), 0);
    this.spans = tokens.map((text, pos) => {
      const letters = Object.keys(marks).filter((letter) => marks[letter] === pos);
      const value = values && known(values[pos]) ? values[pos] : null;
      const number = value === null ? "" : `: ${shown(value)}${unit ? " " + unit : ""}`;
      const span = made("span", {
        role: "option", "data-pos": pos, title: `${pos}${number}`,
        "aria-selected": String(letters.length > 0), "aria-label": `${pos} ${text}${number}`,
      }, text);
      if (letters.length) span.append(made("sup", {}, letters.join("")));
      if (value !== null && most > 0) {
        const rgb = value > 0 ? "213, 94, 0" : "0, 114, 178";
        span.style.background = `rgba(${rgb}, ${(0.55 * Math.abs(value)) / most})`;
        // Not by colour alone: the stronger, the thicker the line below.
        span.style.borderBottomWidth = `${1 + Math.round((3 * Math.abs(value)) / most)}px`;
      }
      return span;
    });
    this.strip.replaceChildren(...this.spans);
    this.root.dataset.drawn = String(Number(this.root.dataset.drawn ?? 0) + 1);
    this.tabulate();
    return Promise.resolve();
  }

  move(right, down) {
    const start = this.cursor ?? Math.max(Object.values(this.marks)[0] ?? -1, -1);
    this.moveTo(Math.min(Math.max(start + right + down, 0), this.spans.length - 1));
  }

  moveTo(cursor) {
    this.spans?.[this.cursor]?.classList.remove("lp-cursor");
    this.cursor = cursor;
    if (cursor === null) return;
    const span = this.spans[cursor];
    span.classList.add("lp-cursor");
    span.scrollIntoView({block: "nearest"});
    this.say(span.getAttribute("aria-label"));
  }

  choose() {
    if (this.cursor !== null) this.onClick({x: this.cursor});
  }

  table() {
    const {tokens, values, unit} = this.spec;
    return [["position", "token", unit || "value"], tokens.map((t, i) => [i, t, values?.[i] ?? null])];
  }

  close() {
    this.stopFollowing();
  }
}

// One view of a page or widget: a figure or a strip, whichever it is asked to show.
export class View {
  constructor(root, tools) {
    Object.assign(this, {root, tools, inner: null, kind: null});
  }

  show({kind, caption, spec, marks}) {
    if (this.kind !== kind) {
      this.inner?.close();
      this.inner = new (kind === "strip" ? StripView : FigureView)(this.root, this.tools);
      this.kind = kind;
    }
    this.inner.entitle(caption);
    return this.inner.show(spec, marks);
  }

  close() {
    this.inner?.close();
  }
}
