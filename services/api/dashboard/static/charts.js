// The charts over steps: held-out metric, coefficients, learning rate and lag, one under the other on one axis.
import { colour } from "./colours.js";
import { drawTimeline } from "./timeline.js";
import { count, duration, metric, number } from "./numbers.js";

const HEIGHTS = { metric: 260, timeline: 150, rate: 100, lag: 128 };
const X_AXIS = 26;

const $ = (id) => document.getElementById(id);
const readData = () => JSON.parse($("chart-data").dataset.charts);

// Ticks with as many decimals as tell one from the next.
function fixed(value, step) {
  let decimals = 0;
  while (decimals < 8 && Math.abs(step * 10 ** decimals - Math.round(step * 10 ** decimals)) > 1e-6) decimals += 1;
  return value !== 0 && decimals > 5 ? number(value, 2) : value.toFixed(decimals).replace("-", "\u2212");
}

export function axes({ isLast = true, format = fixed, space = 36 } = {}) {
  const base = { stroke: () => colour("muted"), font: "12px system-ui, sans-serif", ticks: { show: false } };
  const grid = { stroke: () => colour("grid"), width: 1 };
  return [
    { ...base, grid, size: isLast ? X_AXIS : 6, values: isLast ? (_, all, __, ___, step) => all.map((value) => (step < 1 ? fixed(value, step) : count(value))) : (_, all) => all.map(() => "") },
    { ...base, grid, size: innerWidth < 500 ? 48 : 62, space, values: (_, all, __, ___, step) => all.map((value) => (value === null ? "" : format(value, step))) },
  ];
}

class Charts {
  constructor() {
    this.data = readData();
    this.whatIf = null;
    this.name = null;
    this.plots = {};
    this.readout = $("readout");
    this.offerMetrics();
    this.drawAll();
    this.watch();
  }

  get steps() {
    return this.data.checkpoints.step;
  }

  xRange() {
    const all = [...this.steps, ...this.data.generations.step];
    if (!all.length) return [0, 100];
    const [low, high] = [Math.min(...all), Math.max(...all)];
    const margin = 0.025 * (high - low || 40);
    return [low - margin, high + margin];
  }

  // ---- what is drawn

  drawAll() {
    for (const plot of Object.values(this.plots)) plot.destroy();
    this.plots = {};
    this.plot("metric", [this.line("raw", 1.5), this.line("averaged", 2.5)], this.metricOptions());
    this.plot("timeline", [{ paths: () => null, points: { show: false } }], {
      scales: { y: { range: () => this.timelineRange() } },
      hooks: { draw: [(plot) => drawTimeline(plot, this.data.checkpoints, this.whatIf, colour)] },
      axes: axes({ isLast: false, format: (value, step) => (value < 0 && this.hasOnlyPositive ? "" : fixed(value, step)) }),
    });
    this.plot("rate", [{ ...this.line("rate", 2), paths: uPlot.paths.stepped({ align: 1 }), points: { show: false } }], {
      scales: { y: { range: (_, low, high) => [Math.min(0, low ?? 0), (high || 1) * 1.15] } },
      axes: axes({ isLast: false }),
    });
    this.plot("lag", [{ ...this.line("lag", 1.5), fill: () => colour("lag-fill") }], {
      scales: { y: { range: (_, __, high) => [0, (high || 1) * 1.2] } },
      axes: axes({ format: (value, step) => (step < 1 || value < 60 ? `${fixed(value, step)}\u202fs` : duration(value)) }),
    });
    for (const name of Object.keys(this.plots)) $(`chart-${name}`).classList.toggle("nothing", !this.columns(name)[0].length);
  }

  metricOptions() {
    const isLog = $("log-scale").checked;
    const isPart = (this.name || "").includes("accuracy");
    return {
      scales: { y: isLog ? { distr: 3 } : { range: (_, low, high) => padded(low, high) } },
      axes: axes({ isLast: false, format: (value, step) => (isLog ? metric(value, this.name || "") : isPart ? `${fixed(100 * value, 100 * step)}\u202f%` : fixed(value, step)) }),
    };
  }

  line(name, width) {
    return { stroke: () => colour(name), width, points: { show: true, size: 5, fill: () => colour(name) }, spanGaps: true };
  }

  plot(name, series, options) {
    const box = $(`chart-${name}`);
    this.plots[name] = new uPlot(
      {
        width: box.clientWidth || 300,
        height: HEIGHTS[name],
        legend: { show: false },
        cursor: { drag: { x: false, y: false }, y: false, sync: { key: "steps", scales: ["x", null] } },
        ...options,
        scales: { x: { time: false, range: () => this.xRange() }, ...options.scales },
        series: [{}, ...series],
        hooks: { setCursor: [(plot) => this.tell(plot)], ...options.hooks },
      },
      this.columns(name),
      box,
    );
  }

  columns(name) {
    const { generations, checkpoints, metrics } = this.data;
    const measured = metrics[this.name] || { raw: [], averaged: [] };
    const kept = checkpoints.step.map((_, index) => index).filter((index) => checkpoints.lr[index] !== null);
    return {
      metric: [generations.step, measured.raw, measured.averaged],
      timeline: [checkpoints.step, checkpoints.coefficient],
      rate: [kept.map((index) => checkpoints.step[index]), kept.map((index) => checkpoints.lr[index])],
      lag: [generations.step, generations.lag_s],
    }[name];
  }

  timelineRange() {
    const all = [...this.data.checkpoints.coefficient, ...Object.values(this.whatIf || {})];
    const high = Math.max(...all, 1e-9);
    const low = Math.min(...all, 0);
    return [low - 0.16 * (high - low), high + 0.1 * (high - low)];
  }

  get hasOnlyPositive() {
    return Math.min(...this.data.checkpoints.coefficient, ...Object.values(this.whatIf || {}), 0) === 0;
  }

  // ---- what changes it

  offerMetrics() {
    const names = Object.keys(this.data.metrics);
    if (names.length && !names.includes(this.name)) this.name = names[0];
    const box = $("metric-names");
    if (box.dataset.names === names.join()) return;
    box.dataset.names = names.join();
    box.replaceChildren(
      ...names.map((name) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = name;
        button.addEventListener("click", () => this.showMetric(name));
        return button;
      }),
    );
    this.markMetric();
  }

  showMetric(name) {
    this.name = name;
    this.markMetric();
    this.drawAll();
  }

  markMetric() {
    for (const button of $("metric-names").children) button.setAttribute("aria-pressed", String(button.textContent === this.name));
    $("metric-name").textContent = this.name || "metric";
  }

  showWhatIf(coefficients) {
    this.whatIf = coefficients;
    this.plots.timeline.setData(this.columns("timeline"));
  }

  update() {
    const wasEmpty = !Object.keys(this.data.metrics).length;
    this.data = readData();
    this.offerMetrics();
    if (wasEmpty) return this.drawAll();
    for (const [name, plot] of Object.entries(this.plots)) plot.setData(this.columns(name));
  }

  watch() {
    document.body.addEventListener("htmx:oobAfterSwap", (event) => {
      if (event.detail.target.id === "chart-data") this.update();
    });
    document.addEventListener("wa:theme", () => this.drawAll());
    $("log-scale").addEventListener("change", () => this.drawAll());
    $("stack").addEventListener("keydown", (event) => this.move(event));
    new ResizeObserver(() => {
      for (const [name, plot] of Object.entries(this.plots)) {
        const width = $(`chart-${name}`).clientWidth;
        if (width && width !== plot.width) plot.setSize({ width, height: HEIGHTS[name] });
      }
    }).observe($("stack"));
  }

  // ---- what it tells

  move(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !this.steps.length) return;
    event.preventDefault();
    this.at = Math.min(this.steps.length - 1, Math.max(0, (this.at ?? (by > 0 ? -1 : this.steps.length)) + by));
    for (const plot of Object.values(this.plots)) {
      plot.setCursor({ left: plot.valToPos(this.steps[this.at], "x"), top: 10 }, false);
    }
    this.readout.setAttribute("aria-live", "polite");
    this.readout.textContent = this.describe(this.at);
  }

  tell(plot) {
    if (plot !== this.plots.timeline || plot.cursor.left < 0 || !this.steps.length) return;
    const step = plot.posToVal(plot.cursor.left, "x");
    const distances = this.steps.map((at) => Math.abs(at - step));
    this.readout.setAttribute("aria-live", "off");
    this.readout.textContent = this.describe(distances.indexOf(Math.min(...distances)));
  }

  describe(index) {
    const { generations, checkpoints, metrics } = this.data;
    const step = checkpoints.step[index];
    const parts = [`step ${count(step)}`];
    const here = checkpoints.step.map((_, at) => at).filter((at) => checkpoints.step[at] === step);
    for (const at of here) {
      parts.push(checkpoints.fate[at] === "folded" ? `folded, weight ${number(checkpoints.coefficient[at])}` : checkpoints.fate[at]);
    }
    if (this.whatIf && step in this.whatIf) parts.push(`what if: ${number(this.whatIf[step])}`);
    const found = generations.step.indexOf(step);
    const measured = metrics[this.name];
    if (found >= 0 && measured) {
      for (const side of ["raw", "averaged"]) {
        if (measured[side][found] !== null) parts.push(`${side} ${this.name} ${metric(measured[side][found], this.name)}`);
      }
      if (generations.lag_s[found] !== null) parts.push(`published after ${duration(generations.lag_s[found])}`);
    }
    const rate = here.map((at) => checkpoints.lr[at]).find((lr) => lr !== null);
    if (rate !== undefined) parts.push(`learning rate ${number(rate)}`);
    return parts.join(" · ");
  }
}

function padded(low, high) {
  if (low === null || high === null) return [0, 1];
  const margin = 0.08 * (high - low || Math.abs(high) || 1);
  return [low >= 0 && low < margin * 3 ? 0 : low - margin, high + margin];
}

export const startCharts = () => new Charts();
