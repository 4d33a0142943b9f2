// The page's words in the reader's language. An element remembers its key, so a switch changes every word in place.

import { STRINGS } from "./strings.js";
import { device } from "./store.js";

export const LANGUAGES = Object.keys(STRINGS);
const given = new WeakMap();
let current = device.get("language");
if (!LANGUAGES.includes(current)) current = navigator.languages.some((name) => /^zh\b/i.test(name)) ? "zh" : "en";

export const language = () => current;

/** The words for a key; `{name}` is replaced from `values`. A key without words is a bug and fails loudly. */
export function t(key, values = {}) {
  const words = STRINGS[current][key];
  if (words === undefined) throw new Error(`no ${current} words for "${key}"`);
  return words.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

/** A number as the language writes it, with `digits` decimals. */
export function number(value, digits = 0) {
  return value.toLocaleString(current, { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** Seconds as people read them: "85 ms", "1.24 s". */
export function seconds(value) {
  return value < 1 ? `${number(value * 1000, value < 0.01 ? 1 : 0)} ms` : `${number(value, value < 10 ? 2 : 1)} s`;
}

/** Gives an element its words, and again at each change of language. A function among `values` is called each time. */
export function say(element, key, values = {}) {
  element.dataset.i18n = key;
  given.set(element, values);
  element.textContent = t(key, evaluated(values));
}

/** The same for an attribute: `label` (aria-label), `title` or `placeholder`. */
export function sayAttribute(element, name, key) {
  element.setAttribute(`data-i18n-${name}`, key);
  element.setAttribute(name === "label" ? "aria-label" : name, t(key));
}

/** Changes the language, remembers it, and puts every word on the page into it. */
export function setLanguage(name) {
  current = name;
  device.set("language", name);
  translate();
  document.dispatchEvent(new Event("languagechanged"));
}

export function translate(root = document) {
  document.documentElement.lang = current === "zh" ? "zh-Hans" : "en";
  for (const element of root.querySelectorAll("[data-i18n]")) say(element, element.dataset.i18n, given.get(element));
  for (const name of ["label", "title", "placeholder"]) {
    for (const element of root.querySelectorAll(`[data-i18n-${name}]`)) {
      sayAttribute(element, name, element.getAttribute(`data-i18n-${name}`));
    }
  }
}

function evaluated(values) {
  return Object.fromEntries(Object.entries(values).map(([name, v]) => [name, typeof v === "function" ? v() : v]));
}
