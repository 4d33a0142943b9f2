// The live panel: one scrape of /metrics a second, only while somebody can see it.

import { call } from "./api.js";
import { Chart, SPAN } from "./charts.js";
import { find } from "./dom.js";
import { number, say, seconds } from "./i18n.js";
import { parse, sample } from "./metrics.js";

const PERIOD = 1000; // ms
const PATIENCE = 4000; // ms between scrapes while the server can't be reached
const STALE = 3; // seconds after which an earlier scrape is too old to make a rate of

const CHARTS = [
  { title: "chartRate", series: [{ field: "rate" }], format: (v) => number(v, v > 0 && v < 10 ? 1 : 0), tick: (v) => number(v), least: 10 },
  {
    title: "chartQueue",
    series: [{ field: "running", words: "running" }, { field: "waiting", words: "queued" }],
    format: (v) => number(v),
    least: 2,
  },
  { title: "chartCache", series: [{ field: "cache" }], format: percent, tick: (v) => `${number(v * 100)}%`, most: 1 },
  { title: "chartFirst", series: [{ field: "first" }], format: seconds, tick: (v) => (v ? seconds(v) : "0"), least: 0.1, dots: true },
];

function percent(share) {
  return `${number(share * 100, share > 0 && share < 0.1 ? 1 : 0)}%`;
}

export class Live {
  /** `visible()` says whether the panel is on the screen. */
  constructor(visible) {
    this.visible = visible;
    this.samples = [];
    this.before = null;
    this.refused = false; // no key, or no /metrics here: asking again would not help
    this.charts = CHARTS.map((options) => new Chart(options));
    find("#charts").append(...this.charts.map((chart) => chart.element));
    document.addEventListener("visibilitychange", () => this.wake());
    document.addEventListener("languagechanged", () => this.draw());
    document.addEventListener("keychanged", () => {
      this.refused = false;
      this.wake();
    });
    this.draw();
    this.wake();
  }

  /** Looks now and once a second from here on, until the panel is out of sight or the server refuses. */
  wake() {
    clearTimeout(this.timer);
    if (document.hidden || !this.visible() || this.looking || this.refused) return;
    this.looking = true;
    const began = performance.now();
    this.look().finally(() => {
      const due = began + (this.told ? PATIENCE : PERIOD);
      this.looking = false;
      this.timer = setTimeout(() => this.wake(), Math.max(0, due - performance.now()));
    });
  }

  async look() {
    try {
      const response = await call("metrics");
      const figures = parse(await response.text());
      const now = performance.now() / 1000;
      const recent = this.before && now - this.before.time < STALE ? this.before : null;
      this.samples.push(sample(now, figures, recent));
      this.samples = this.samples.filter((s) => s.time > now - SPAN - 1);
      this.before = { time: now, figures };
      this.refused = false;
      this.tell(null);
    } catch (error) {
      this.refused = error.kind === "key" || error.kind === "model";
      this.tell({ key: "liveKey", model: "liveNone" }[error.kind] ?? "liveLost");
    }
    this.draw();
  }

  /** Shows a sentence in place of missing figures, once, so that a screen reader is not told it every second. */
  tell(words) {
    if (words === this.told) return;
    this.told = words;
    find("#live-state").hidden = words === null;
    find("#charts").hidden = this.refused;
    if (words) say(find("#live-state"), words);
  }

  draw() {
    const now = performance.now() / 1000;
    for (const chart of this.charts) chart.show(this.samples, now);
  }
}
