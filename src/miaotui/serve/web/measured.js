// The card that `miaotui accelerate` leaves: caveats first, then before and after, then why.

import { make } from "./dom.js";
import { language, number, t } from "./i18n.js";

/** Elements that show the card; null for another kind of card, or one that lacks what is needed here. */
export function measured(card, report) {
  if (card.schema_version !== 1) return null;
  try {
    return [...head(card), ...tables(card), ...techniques(card), ...foot(card, report)];
  } catch (error) {
    if (error instanceof TypeError) return null;
    throw error;
  }
}

function* head({ artefact, verdict, caveats, floor }) {
  yield make("h3", {}, String(artefact.name));
  yield make("p", { class: "summary" }, String(verdict));
  const judged = artefact.recipe === null ? "cardKept" : { holds: "cardHolds", broken: "cardBroken" }[floor.verdict];
  yield make("p", { class: "hint" }, `${t("cardFloor", { floor: number(100 * floor.loss, 1) })}: ${t(judged ?? "cardUndecided")}`);
  if (caveats.length) yield make("div", { class: "caveats" }, make("h4", {}, t("cardFirst")), list(caveats));
}

function* tables(card) {
  yield table("cardSpeed", [...joined(card.speed.before, card.speed.after).map(speed), size(card)]);
  yield table("cardQuality", quality(card.quality));
}

/** Both sides of each regime. */
function joined(before, after) {
  const names = [...new Set([...before, ...after].map(({ regime }) => regime))];
  return names.map((name) => [before, after].map((side) => side.find(({ regime }) => regime === name)));
}

function speed([before, after]) {
  const { regime, unit, better } = after ?? before;
  const gain = before && after ? (better === "lower" ? before.median / after.median : after.median / before.median) : null;
  return [[String(regime), unit], value(before, "median"), value(after, "median"), times(gain)];
}

function size({ model, artefact }) {
  const after = artefact.recipe === null ? null : { value: artefact.bytes / 1e6 };
  return [[t("cardWeights"), "MB"], value({ value: model.bytes / 1e6 }), value(after), times(after && model.bytes / artefact.bytes)];
}

function quality({ before, after }) {
  const ratio = after?.perplexity_ratio;
  const change = ratio ? [signed(ratio.value - 1), ends(ratio, (end) => signed(end - 1))] : [];
  const rows = [[[t("cardPerplexity"), before.data], value(before.perplexity), value(after?.perplexity), change]];
  const flips = after?.top1_flips;
  if (after?.kl_mean) rows.push([["KL", "nats"], [], value(after.kl_mean), []]);
  if (flips) rows.push([[t("cardFlips"), "%"], [], [figure(100 * flips.value), ends(flips, (end) => figure(100 * end))], []]);
  for (const task of after?.tasks ?? []) {
    const was = before.tasks.find(({ name, metric }) => name === task.name && metric === task.metric);
    rows.push([[String(task.name), task.metric], value(was?.score), value(task.score), []]);
  }
  return rows;
}

function* techniques({ artefact }) {
  if (!artefact.techniques.length) return;
  const told = artefact.techniques.map(({ name, kept, why }) =>
    make("li", { class: kept ? "kept" : "dropped" }, make("b", {}, String(name)), ` — ${t(kept ? "cardIsKept" : "cardIsDropped")}. `, String(why)),
  );
  yield make("section", {}, make("h4", {}, t("cardWhy")), make("ul", {}, ...told));
}

function* foot({ created, machine }, report) {
  if (report) yield make("p", {}, make("a", { href: report, target: "_blank", rel: "noopener" }, t("cardReport")));
  yield make("p", { class: "hint" }, t("cardMeasured", { when: String(created).slice(0, 10), where: String(machine.cpu ?? "?") }));
}

// -- parts ---------------------------------------------------------------------------------------------
/** Rows of [name and unit, before, after, change], each a text and one below it. */
function table(title, rows) {
  const heads = [title, "cardBefore", "cardAfter", "cardChange"].map((key) => make("th", { scope: "col" }, t(key)));
  const body = rows.map(([first, ...others]) =>
    make("tr", {}, make("th", { scope: "row" }, ...cell(first)), ...others.map((texts) => make("td", {}, ...cell(texts)))),
  );
  const inner = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...body));
  return make("div", { class: "table measured", tabindex: "0", role: "region", "aria-label": t(title) }, inner);
}

const cell = ([text = "", below = ""]) => (below ? [text, make("small", {}, below)] : [text]);
const list = (texts) => make("ul", {}, ...texts.map((text) => make("li", {}, String(text))));

/** A figure and its interval; nothing where there is none. */
function value(found, name = "value") {
  return found ? [figure(found[name]), ends(found, figure)] : ["–"];
}

const ends = ({ low, high }, format) => (typeof low === "number" && typeof high === "number" ? `${format(low)} – ${format(high)}` : "");
const times = (ratio) => (Number.isFinite(ratio) && ratio ? [`${number(ratio, ratio < 20 ? 2 : 0)}×`] : []);
const signed = (share) => `${share < 0 ? "−" : "+"}${number(Math.abs(share) * 100, 2)}%`;
const figure = (it) => it.toLocaleString(language(), it >= 1000 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 3 });
