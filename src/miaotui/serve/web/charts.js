// One small line chart: a minute of one or two series, with axes, ticks, the value of now and of the point under the pointer.

import { draw, make, worded } from "./dom.js";
import { t } from "./i18n.js";

export const SPAN = 60; // seconds shown
const WIDTH = 300;
const HEIGHT = 104;
const LEFT = 44;
const RIGHT = WIDTH - 6;
const TOP = 10;
const BOTTOM = HEIGHT - 20;

/**
 * `series`: `[{ field, words }]`, the fields of a sample that are drawn, the words of each where there are two.
 * `format(value)` writes a value, `tick(value)` one at the axis; `least` is the smallest top of the y axis; `most` fixes it; `dots` marks each
 * point, for figures that come only now and then.
 */
export class Chart {
  constructor({ title, series, format, tick = format, least = 1, most = null, dots = false }) {
    Object.assign(this, { title, series, format, tick, least, most, dots, samples: [], at: null });
    this.value = make("span", { class: "value" });
    this.svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.point(null));
    const caption = make("figcaption", {}, worded("span", { class: "title" }, title), this.value);
    this.element = make("figure", { class: "chart" }, caption, this.svg);
  }

  /** Draws samples, oldest first; `now` is the right edge, in seconds. */
  show(samples, now) {
    Object.assign(this, { samples, now });
    const highest = Math.max(0, ...this.series.flatMap((s) => samples.map((sample) => sample[s.field] ?? 0)));
    this.top = this.most ?? niceTop(Math.max(highest, this.least));
    this.svg.replaceChildren(...this.axes(), ...this.series.flatMap((s, i) => this.line(s.field, i)), ...this.cursor());
    this.svg.setAttribute("aria-label", this.spoken(highest));
    this.value.replaceChildren(...this.reading());
  }

  x(time) {
    return RIGHT - ((this.now - time) / SPAN) * (RIGHT - LEFT);
  }

  y(value) {
    return BOTTOM - (Math.min(value, this.top) / this.top) * (BOTTOM - TOP);
  }

  axes() {
    const ticks = [0, 0.5, 1].map((part) => part * this.top);
    const across = ticks.map((v) => draw("line", { class: v ? "grid" : "axis", x1: LEFT, x2: RIGHT, y1: this.y(v), y2: this.y(v) }));
    const values = ticks.map((v) => draw("text", { x: LEFT - 6, y: this.y(v) + 3.5, "text-anchor": "end" }, this.tick(v)));
    const times = [60, 30, 0].map((ago) => {
      const anchor = ago === SPAN ? "start" : ago ? "middle" : "end";
      const words = ago ? t("chartAgo", { time: ago }) : t("chartNow");
      return draw("text", { x: this.x(this.now - ago), y: HEIGHT - 5, "text-anchor": anchor }, words);
    });
    return [...across, ...values, ...times];
  }

  line(field, index) {
    const runs = this.dots ? [this.samples.filter((s) => s[field] !== null)] : runsOf(this.samples, field);
    const shapes = [];
    for (const run of runs.filter((r) => r.length)) {
      const points = run.map((s) => `${this.x(s.time).toFixed(1)},${this.y(s[field]).toFixed(1)}`);
      if (index === 0 && !this.dots && run.length > 1) {
        const [from, to] = [this.x(run[0].time), this.x(run.at(-1).time)];
        shapes.push(draw("path", { class: "area", d: `M${from},${BOTTOM}L${points.join("L")}L${to},${BOTTOM}Z` }));
      }
      shapes.push(draw("polyline", { class: `line line-${index}`, points: points.join(" ") }));
      const marked = this.dots ? run : run.slice(-1);
      shapes.push(...marked.map((s) => draw("circle", { class: `dot line-${index}`, cx: this.x(s.time), cy: this.y(s[field]), r: 2.25 })));
    }
    return shapes;
  }

  /** The sample whose values stand in the caption: the one under the pointer, or the newest. */
  chosen() {
    if (this.at !== null) return this.at;
    const told = this.samples.filter((s) => this.series.some(({ field }) => s[field] !== null));
    return told.at(-1) ?? null;
  }

  cursor() {
    if (this.at === null || this.at.time < this.now - SPAN) return [];
    return [draw("line", { class: "cursor", x1: this.x(this.at.time), x2: this.x(this.at.time), y1: TOP - 4, y2: BOTTOM })];
  }

  reading() {
    const sample = this.chosen();
    return this.series.flatMap(({ field, words }, i) => {
      const value = sample?.[field] ?? null;
      const text = value === null ? "–" : this.format(value);
      if (!words) return [text];
      return [make("span", { class: `key key-${i}` }, make("b", {}, text), ` ${t(words)}`)];
    });
  }

  spoken(highest) {
    const sample = this.chosen();
    const now = this.series
      .filter(({ field }) => sample && sample[field] !== null)
      .map(({ field, words }) => this.format(sample[field]) + (words ? ` ${t(words)}` : ""));
    return t("chartSaid", { title: t(this.title), now: now.join(", ") || t("none"), highest: this.format(highest) });
  }

  point(event) {
    const told = this.samples.filter((s) => this.series.some(({ field }) => s[field] !== null));
    if (event === null || !told.length) this.at = null;
    else {
      const box = this.svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * WIDTH;
      this.at = told.reduce((best, s) => (Math.abs(this.x(s.time) - x) < Math.abs(this.x(best.time) - x) ? s : best));
    }
    if (this.now !== undefined) this.show(this.samples, this.now);
  }
}

/** The stretches of samples in which a field is known. */
function runsOf(samples, field) {
  const runs = [[]];
  for (const sample of samples) {
    if (sample[field] === null) runs.push([]);
    else runs.at(-1).push(sample);
  }
  return runs;
}

/** The next number of the form 1, 2, 4 or 8 times a power of ten: its half is round too. */
export function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 8, 10].map((n) => n * power).find((n) => n >= value * 0.999);
}
