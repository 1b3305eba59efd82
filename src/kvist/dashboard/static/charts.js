// Charts over one time axis, drawn by uPlot. The text beside a chart has the newest values, or those under the
// cursor; the left and right keys move the cursor of a focused chart.

import { h, show } from "./dom.js";
import { count, rate, share, time } from "./format.js";

const uPlot = window.uPlot;
const LATENCY = [["p50", "50%", "--line-1"], ["p90", "90%", "--line-2"], ["p99", "99%", "--line-3"]];
const TIERS = [["device", "device", "--tier-1"], ["host", "host", "--tier-2"], ["storage", "storage", "--tier-3"], ["computed", "computed", "--tier-0"]];
export const CHARTS = [
  { id: "ttft", title: "Time to first token", unit: time, lines: LATENCY.map(([part, label, color]) => [`ttft_${part}_s`, label, color]) },
  { id: "itl", title: "Time between tokens", unit: time, lines: LATENCY.map(([part, label, color]) => [`itl_${part}_s`, label, color]) },
  { id: "output", title: "Output tokens per second", unit: rate, lines: [["output_tokens_per_s", "tokens/s", "--line-1"]], fill: true },
  { id: "tiers", title: "Prompt tokens per second, by source", unit: rate, stacked: true, lines: TIERS.map(([tier, label, color]) => [`${tier}_tokens_per_s`, label, color]) },
  { id: "hits", title: "Cache hits, of all prompt tokens", unit: share, lines: [["hit_rate", "cached", "--line-1"], ["hit_ceiling", "possible", "--line-2"]] },
  { id: "queues", title: "Requests at workers", unit: (value) => (value % 1 ? "" : count(value)), lines: [["num_running", "running", "--line-1"], ["num_waiting", "waiting", "--line-3"]] },
  { id: "handoffs", title: "Handoffs per second", unit: rate, lines: [["handoffs_per_s", "received", "--line-1"]], fill: true },
];
const HEIGHT = 150;

export class Charts {
  constructor(parent, maxPoints) {
    this.maxPoints = maxPoints;
    this.times = [];
    this.lines = {};
    this.rangeS = 300;
    this.charts = CHARTS.map((spec) => new Chart(parent, spec));
    new ResizeObserver(() => this.charts.forEach((chart) => chart.resize())).observe(parent);
  }

  // Adds points; `isFirst`: they are the whole history.
  add(series, isFirst) {
    if (isFirst) {
      this.times = [];
      this.lines = {};
    }
    series.times_unix_s.forEach((at, index) => {
      if (this.times.length && at <= this.times[this.times.length - 1]) return;
      this.times.push(at);
      for (const [name, values] of Object.entries(series.lines)) (this.lines[name] ||= []).push(values[index]);
    });
    const excess = this.times.length - this.maxPoints;
    if (excess > 0) for (const line of [this.times, ...Object.values(this.lines)]) line.splice(0, excess);
    this.draw();
  }

  setRange(rangeS) {
    this.rangeS = rangeS;
    this.draw();
  }

  draw() {
    const last = this.times[this.times.length - 1] ?? Date.now() / 1000;
    const first = this.times.findIndex((at) => at >= last - this.rangeS);
    for (const chart of this.charts) {
      chart.draw(this.times.slice(first), chart.spec.lines.map(([name]) => (this.lines[name] || []).slice(first)), [last - this.rangeS, last]);
    }
  }

  // Takes the colours of the page again, after a change between light and dark.
  restyle() {
    this.charts.forEach((chart) => chart.restyle());
    this.draw();
  }
}

class Chart {
  constructor(parent, spec) {
    this.spec = spec;
    this.values = [];
    this.titleId = `chart-${spec.id}`;
    this.legend = h("ul", { class: "legend" });
    this.place = h("div", { class: "plot", role: "img", tabindex: "0", "aria-label": spec.title });
    parent.append(h("figure", null, h("figcaption", { id: this.titleId }, h("h3", null, spec.title), this.legend), this.place));
    this.place.addEventListener("keydown", (event) => this.onKey(event));
    this.place.addEventListener("blur", () => this.plot?.setCursor({ left: -10, top: -10 }));
  }

  restyle() {
    this.plot?.destroy();
    this.plot = null;
  }

  resize() {
    const width = this.place.clientWidth;
    if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  draw(times, values, range) {
    this.values = values;
    this.times = times;
    const data = [times, ...(this.spec.stacked ? sums(values) : values)];
    this.plot ||= new uPlot(this.options(), data, this.place);
    this.plot.batch(() => {
      this.plot.setData(data, false);
      this.plot.setScale("x", { min: range[0], max: range[1] });
    });
    this.describe();
  }

  options() {
    const color = (name) => colorOf(this.place, name);
    const axis = { stroke: color("--quiet"), grid: { stroke: color("--grid"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const { lines, stacked, fill, unit } = this.spec;
    const series = lines.map(([, label, name]) => ({
      label,
      stroke: color(name),
      width: stacked ? 0 : 1.5,
      fill: stacked ? color(name) : fill ? color("--line-1-soft") : undefined,
      points: { show: false },
      spanGaps: false,
    }));
    return {
      width: this.place.clientWidth || 400,
      height: HEIGHT,
      legend: { show: false },
      cursor: { sync: { key: "kvist" }, y: false, points: { show: !stacked, size: 6 }, drag: { setScale: false, x: false } },
      padding: [8, 16, 0, 0],
      axes: [
        { ...axis, size: 24, space: 70, values: (_, at) => at.map((each) => new Date(each * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" })) },
        { ...axis, size: 56, space: 28, values: (_, at) => at.map((each) => unit(each)) },
      ],
      scales: { y: { range: (_, _least, most) => [0, most > 0 ? most * 1.08 : 1] } },
      series: [{}, ...(stacked ? series.reverse() : series)],
      hooks: { setCursor: [() => this.describe()] },
    };
  }

  onKey(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !this.plot || !this.times.length) return;
    event.preventDefault();
    const from = this.plot.cursor.idx ?? this.times.length;
    const to = Math.min(this.times.length - 1, Math.max(0, from + step * (event.shiftKey ? 10 : 1)));
    this.plot.setCursor({ left: this.plot.valToPos(this.times[to], "x"), top: 10 });
  }

  // Writes the values under the cursor, or else the newest ones.
  describe() {
    const index = this.plot?.cursor.idx ?? this.times.length - 1;
    const { lines, unit, title } = this.spec;
    const now = lines.map(([, label], line) => [label, unit(this.values[line]?.[index] ?? null)]);
    show(this.legend, ...now.map(([label, value], line) =>
      h("li", { "data-key": label }, h("i", { class: "swatch", style: { background: `var(${lines[line][2]})` } }), label, " ", h("b", null, value))));
    const text = `${title}: ${now.map(([label, value]) => `${label} ${value}`).join(", ")}`;
    if (this.place.getAttribute("aria-label") !== text) this.place.setAttribute("aria-label", text);
  }
}

// Returns the lines from the top of the stack to its bottom, each with the sum of the lines below it.
function sums(lines) {
  const found = [];
  let below = null;
  for (const line of lines) {
    below = line.map((value, index) => (value ?? 0) + (below ? below[index] : 0));
    found.unshift(below);
  }
  return found;
}

function colorOf(element, name) {
  const probe = h("span", { style: { color: `var(${name})` } });
  element.append(probe);
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
}
