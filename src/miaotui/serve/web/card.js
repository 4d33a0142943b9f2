// The model's card, where the server has one: whatever card.json holds, as tables that a person can read.

import { ApiError, call, key } from "./api.js";
import { find, make, worded } from "./dom.js";
import { language, number, t } from "./i18n.js";
import { measured as drawn } from "./measured.js";

const BEFORE = ["before", "original"];
const AFTER = ["after", "result"];
const HIDDEN = new Set(["schema", "model", "summary", "title"]);

export class Card {
  constructor() {
    this.card = null;
    this.report = null;
    document.addEventListener("languagechanged", () => this.draw());
  }

  /** Fetches the card; without one (404) or without a connection the tab stays hidden. */
  async load() {
    try {
      const response = await call("card.json");
      const card = await response.json();
      this.card = typeof card === "object" && !Array.isArray(card) ? card : null;
      this.report = key.get() ? null : linked(response.headers.get("Link")); // a link cannot bring a key
      this.draw();
    } catch (error) {
      this.card = null;
      if (!(error instanceof ApiError)) console.error(error);
    }
    find("#tab-card").hidden = this.card === null;
  }

  draw() {
    if (!this.card) return;
    const known = drawn(this.card, this.report);
    if (known) {
      find("#pane-card").replaceChildren(...known);
      return;
    }
    const { model, summary } = this.card;
    const name = typeof model === "string" ? model : model?.name;
    const head = [name ? make("h3", {}, name) : worded("h3", {}, "cardTitle")];
    if (summary) head.push(...(typeof summary === "string" ? [make("p", { class: "summary" }, summary)] : [shape(summary)]));
    if (typeof model === "object" && model) head.push(shape(without(model, "name")));
    const rest = Object.entries(without(this.card, ...HIDDEN));
    find("#pane-card").replaceChildren(...head, ...sections(rest));
  }
}

/** The report's address, where the server names one. */
const linked = (header) => /^<(report\.html)>; rel="alternate"$/.exec(header ?? "")?.[1] ?? null;

/** Top-level facts in one list, then a section for each thing that has parts. */
function sections(entries) {
  const facts = entries.filter(([, value]) => isFact(value));
  const parts = entries.filter(([, value]) => !isFact(value));
  const pair = pairOf(Object.fromEntries(parts));
  const own = pair ? parts.filter(([key]) => !pair.keys.includes(key)) : parts;
  return [
    ...(pair ? [comparison(pair.rows)] : []),
    ...(facts.length ? [shape(Object.fromEntries(facts))] : []),
    ...own.map(([key, value]) => make("section", {}, make("h4", {}, words(key)), shape(value))),
  ];
}

/** An element for any JSON value. */
function shape(value) {
  if (isFact(value)) return make("p", {}, ...cell(value));
  if (Array.isArray(value)) return value.every(isFact) ? bullets(value) : table(value);
  const pair = pairOf(value);
  if (pair) return comparison(pair.rows);
  const entries = Object.entries(value);
  if (entries.length && entries.every(([, v]) => sides(v))) return comparison(entries.map(([key, v]) => [words(key), ...sides(v)]));
  return make("dl", {}, ...entries.flatMap(([key, v]) => [make("dt", {}, words(key)), make("dd", {}, ...cell(v))]));
}

const bullets = (values) => make("ul", {}, ...values.map((v) => make("li", {}, ...cell(v))));

/** Rows of objects: a before/after table where they have both sides, one column per key otherwise. */
function table(rows) {
  const objects = rows.map((row) => (typeof row === "object" && row ? row : { "": row }));
  if (objects.every((row) => sides(row))) {
    return comparison(objects.map((row) => [Object.values(without(row, ...BEFORE, ...AFTER)).filter(isFact).map(fact).join(" · "), ...sides(row)]));
  }
  const keys = [...new Set(objects.flatMap(Object.keys))];
  if (!keys.length) return make("p", {}, fact(null));
  const body = objects.map((row) => keys.map((key) => (key in row ? cell(row[key]) : [])));
  return grid(keys.map(words), body);
}

/** What stands in a cell: a list of facts on one line, an interval below its value. */
function cell(value) {
  if (Array.isArray(value) && value.every(isFact)) return [value.map(fact).join(", ")];
  if (!isFact(value)) return [shape(value)];
  const range = interval(value);
  return range ? [fact(value), make("small", {}, range)] : [fact(value)];
}

function comparison(rows) {
  const heads = ["cardWhat", "cardBefore", "cardAfter", "cardChange"].map((key) => t(key));
  return grid(heads, rows.map(([name, before, after]) => [[name], cell(before), cell(after), [change(before, after)]]));
}

function grid(heads, rows) {
  const head = make("tr", {}, ...heads.map((words) => make("th", { scope: "col" }, words)));
  const body = rows.map(([first, ...others]) =>
    make("tr", {}, make("th", { scope: "row" }, ...first), ...others.map((nodes) => make("td", {}, ...nodes))),
  );
  const inner = make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
  return make("div", { class: "table", tabindex: "0", role: "region", "aria-label": t("cardTitle") }, inner);
}

/** `{ before: {…}, after: {…} }` joined on their keys. */
function pairOf(value) {
  const both = sides(value);
  if (!both || both.some(isFact) || both.some(Array.isArray)) return null;
  const [before, after] = both;
  const names = [...new Set([...Object.keys(before), ...Object.keys(after)])];
  const flat = names.every((name) => [before[name], after[name]].every((v) => v === undefined || isFact(v)));
  const keys = Object.keys(value).filter((key) => [...BEFORE, ...AFTER].includes(key));
  return flat ? { keys, rows: names.map((name) => [words(name), before[name] ?? null, after[name] ?? null]) } : null;
}

function sides(value) {
  if (typeof value !== "object" || value === null) return null;
  const [before, after] = [BEFORE, AFTER].map((names) => names.find((name) => name in value));
  return before && after ? [value[before], value[after]] : null;
}

/** Something that fits one line: a scalar, or a measured value with its interval. */
const isFact = (value) => typeof value !== "object" || value === null || measured(value) !== null;

function measured(value) {
  const middle = ["median", "value", "mean"].find((name) => typeof value?.[name] === "number");
  return middle && Object.values(value).every((v) => typeof v !== "object" || v === null) ? value[middle] : null;
}

function fact(value) {
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value === "boolean") return t(value ? "cardYes" : "cardNo");
  if (typeof value === "number") return figure(value);
  if (typeof value !== "object") return String(value);
  return `${figure(measured(value))}${value.unit ? ` ${value.unit}` : ""}`;
}

function interval(value) {
  const sides = [value?.low, value?.high];
  return sides.every((v) => typeof v === "number") ? sides.map(figure).join("–") : null;
}

/** Whole numbers whole, others with at most four figures that count. */
function figure(value) {
  return Number.isInteger(value) ? number(value) : value.toLocaleString(language(), { maximumSignificantDigits: 4 });
}

function change(before, after) {
  const [was, is] = [before, after].map((v) => (typeof v === "number" ? v : measured(v)));
  if (typeof was !== "number" || typeof is !== "number" || was === 0) return "";
  const ratio = is / was;
  return ratio >= 2 || ratio <= 0.5 ? `× ${figure(Number(ratio.toPrecision(3)))}` : `${ratio < 1 ? "−" : "+"}${number(Math.abs(ratio - 1) * 100, 1)}%`;
}

const words = (key) => key.replaceAll("_", " ");
const without = (object, ...keys) => Object.fromEntries(Object.entries(object).filter(([key]) => !keys.includes(key)));
