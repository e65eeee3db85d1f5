// Line charts of the report, by uPlot: curves that can be hidden, axes that can be exchanged, values read by pointer or keyboard.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);

/** An element with attributes (null and false ones left out), listeners (on...) and children. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** A labelled <select>; `change` gets the index chosen. */
function choice(label, options, change) {
  const select = make("select", { onchange: () => change(select.selectedIndex) }, ...options.map((o) => make("option", {}, o)));
  return make("label", { class: "choice" }, `${label} `, select);
}

const number = (value) =>
  value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(2).replace(/\.?0+e/, "e") : Number(value.toPrecision(4)).toLocaleString("en");

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Places 1, 2, 5 of each decade from `low` to `high`. */
function decades(low, high) {
  const places = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) places.push(...[1, 2, 5].map((digit) => digit * 10 ** power));
  return places.filter((place) => place >= low && place <= high);
}

/** The value of `ys` that is defined nearest to place `at`. */
function nearest(xs, ys, at) {
  let best = null;
  for (let i = 0; i < xs.length; i++) {
    if (ys[i] == null) continue;
    if (best === null || Math.abs(xs[i] - xs[at]) < Math.abs(xs[best] - xs[at])) best = i;
  }
  return best === null ? null : ys[best];
}

/**
 * spec: x [{key, label, log}], y {label, log, choose, top}, series [{group, told, colour, dash, width, faint, points, line, x {key: []}, y []}],
 * bands [[index of upper series, of lower]]. Series of one group are hidden together; the one that is `told` gives the values.
 */
function chart(box, spec) {
  const groups = [...new Set(spec.series.map((series) => series.group))];
  const hidden = new Set();
  let axis = spec.x[0];
  let log = spec.y.log;
  let plot = null;
  let data = [];
  const canvas = make("div", { class: "canvas", "aria-hidden": "true" });
  const values = new Map(groups.map((group) => [group, make("span", { class: "value" })]));
  const where = make("output", { class: "where" });
  const slider = make("input", { type: "range", min: 0, step: 1, "aria-label": `Read values along ${axis.label}` });
  slider.addEventListener("input", () => show(Number(slider.value), true));

  const legend = make("div", { class: "legend", role: "group", "aria-label": "Curves shown" });
  for (const group of groups) {
    const series = spec.series.find((each) => each.group === group && each.told);
    const swatch = make("span", { class: "line", style: `border-top: 3px ${series.dash.length ? "dashed" : "solid"} ${series.colour}` });
    const button = make("button", { type: "button", "aria-pressed": "true" }, swatch, group, " ", values.get(group));
    button.addEventListener("click", () => {
      hidden.has(group) ? hidden.delete(group) : hidden.add(group);
      button.setAttribute("aria-pressed", String(!hidden.has(group)));
      spec.series.forEach((each, i) => each.group === group && plot.setSeries(i + 1, { show: !hidden.has(group) }));
    });
    legend.append(button);
  }

  function show(at, byKey) {
    slider.value = at;
    where.textContent = `${axis.label} ${number(data[0][at])}`;
    const told = [];
    spec.series.forEach((series, i) => {
      if (!series.told || hidden.has(series.group)) return;
      const value = nearest(data[0], data[i + 1], at);
      values.get(series.group).textContent = value === null ? "" : number(value);
      if (value !== null) told.push(`${series.group} ${number(value)}`);
    });
    slider.setAttribute("aria-valuetext", `${where.textContent}: ${told.join(", ")}`);
    if (byKey) plot.setCursor({ left: plot.valToPos(data[0][at], "x"), top: plot.over.clientHeight / 2 });
  }

  function range(u, low, high) {
    if (low === null) return [null, null];
    const top = spec.y.top ? Math.min(high, spec.y.top) : high;
    if (log) return [low / 1.15, top * 1.15];
    const margin = 0.05 * (top - low || Math.abs(top) || 1);
    return [spec.y.zero ? 0 : low - margin, top + margin];
  }

  function build() {
    plot?.destroy();
    data = uPlot.join(spec.series.map((series) => [series.x[axis.key], series.y]));
    const style = { stroke: () => colour("--text"), grid: { stroke: () => colour("--grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui", labelFont: "12px system-ui" };
    plot = new uPlot(
      {
        width: Math.max(240, canvas.clientWidth), height: 300, legend: { show: false },
        cursor: { points: { show: false }, drag: { x: true, y: false } },
        scales: { x: { time: false, distr: axis.log ? 3 : 1, ...(axis.log ? { range: (u, low, high) => [low / 1.1, high * 1.1] } : {}) }, y: { distr: log ? 3 : 1, range } },
        axes: [
          { ...style, label: axis.label, labelSize: 22, size: 34, space: 60, ...(axis.log ? { splits: (u, at, low, high) => decades(low, high), filter: (u, splits) => splits } : {}), values: (u, ticks) => ticks.map((tick) => (tick === null ? "" : number(tick))) },
          { ...style, label: spec.y.label, labelSize: 22, size: 58, values: (u, ticks) => ticks.map((tick) => (tick === null ? "" : number(tick))) },
        ],
        series: [{}].concat(
          spec.series.map((series) => ({
            stroke: series.faint ? `${series.colour}66` : series.colour, width: series.width, dash: series.dash,
            show: !hidden.has(series.group), points: { show: series.points, size: 6, fill: series.colour },
            paths: series.line ? undefined : () => null,
          })),
        ),
        bands: (spec.bands || []).map(([high, low, fill]) => ({ series: [high + 1, low + 1], fill })),
        hooks: { setCursor: [(u) => u.cursor.idx != null && u.cursor.left >= 0 && show(u.cursor.idx, false)] },
      },
      data,
      canvas,
    );
    slider.max = data[0].length - 1;
    slider.setAttribute("aria-label", `Read values along ${axis.label}`);
    show(data[0].length - 1, false);
  }

  const controls = make("div", { class: "controls" });
  if (spec.x.length > 1) controls.append(choice("Against", spec.x.map((each) => each.label), (at) => { axis = spec.x[at]; build(); }));
  if (spec.y.choose) {
    const tick = make("input", { type: "checkbox", onchange: () => { log = tick.checked; build(); } });
    tick.checked = log;
    controls.append(make("label", { class: "choice" }, tick, " logarithmic"));
  }
  if (controls.childNodes.length) box.append(controls);
  box.append(canvas, make("div", { class: "reader" }, slider, where), legend);
  build();
  new ResizeObserver(() => plot.setSize({ width: Math.max(240, canvas.clientWidth), height: 300 })).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plot.redraw(false, true));
}

for (const box of document.querySelectorAll("[data-chart]")) chart(box, DATA.charts[box.dataset.chart]);
