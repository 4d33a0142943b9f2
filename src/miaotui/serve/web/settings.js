// What the reader asks of sampling, remembered on this device.

import { find, make, worded } from "./dom.js";
import { number, say } from "./i18n.js";
import { device } from "./store.js";

/** An optional field may be empty: then it is not sent and the server's own default counts. */
const FIELDS = [
  { name: "temperature", low: 0, high: 2, step: 0.05, otherwise: 0.7, slider: true },
  { name: "top_p", low: 0.01, high: 1, step: 0.01, otherwise: 0.95, slider: true },
  { name: "top_k", low: 0, high: 1000, whole: true, otherwise: 0 },
  { name: "max_tokens", low: 1, high: 1_000_000, whole: true, otherwise: 512, optional: true },
  { name: "seed", low: 0, high: 2_147_483_647, whole: true, otherwise: null, optional: true },
];

export class Settings {
  constructor() {
    this.values = { ...defaults(), ...usable(device.get("settings") ?? {}) };
    this.rows = FIELDS.map((field) => this.row(field));
    find("#fields").append(...this.rows.map((row) => row.element));
    find("#system").addEventListener("input", (event) => this.keep("system", event.target.value));
    find("#reset").addEventListener("click", () => this.reset());
    find("#settings").addEventListener("submit", (event) => event.preventDefault());
    this.show();
  }

  /** The parameters of a request; those left to the server are absent. */
  sampling() {
    const asked = FIELDS.map(({ name }) => [name, this.values[name]]);
    return Object.fromEntries(asked.filter(([, value]) => value !== null));
  }

  system() {
    return this.values.system.trim();
  }

  keep(name, value) {
    this.values[name] = value;
    device.set("settings", this.values);
  }

  reset() {
    this.values = defaults();
    device.set("settings", null);
    this.show();
  }

  show() {
    find("#system").value = this.values.system;
    for (const row of this.rows) row.show(this.values[row.name]);
  }

  row(field) {
    const { name, low, high, step = 1 } = field;
    const bounds = { min: low, max: high, step };
    const input = make("input", {
      id: name, type: "number", inputmode: field.whole ? "numeric" : "decimal", autocomplete: "off", ...bounds, step: "any",
      "aria-describedby": `${name}-hint ${name}-wrong`,
    });
    const wrong = make("p", { class: "wrong", id: `${name}-wrong`, role: "alert" });
    const label = worded("label", { for: name, id: `${name}-label` }, name);
    const slider = field.slider ? make("input", { type: "range", ...bounds, "aria-labelledby": `${name}-label` }) : null;
    const accept = (text) => {
      const value = read(field, text);
      const bad = value === undefined || input.validity.badInput; // a number input hides what it can't read
      input.setAttribute("aria-invalid", bad);
      wrong.textContent = "";
      delete wrong.dataset.i18n;
      if (bad) say(wrong, field.whole ? "notWhole" : "outOfRange", { low: () => number(low, low % 1 ? 2 : 0), high: () => number(high) });
      else this.keep(name, value);
      if (slider && !bad) slider.value = value;
    };
    input.addEventListener("input", () => accept(input.value));
    slider?.addEventListener("input", () => {
      input.value = slider.value;
      accept(slider.value);
    });
    const hint = worded("p", { class: "hint", id: `${name}-hint` }, `${name}Hint`);
    const element = make("div", { class: "field figure" }, label, input, ...(slider ? [slider] : []), hint, wrong);
    const show = (value) => {
      input.value = value ?? "";
      accept(input.value);
    };
    return { name, element, show };
  }
}

function defaults() {
  return { system: "", ...Object.fromEntries(FIELDS.map(({ name, otherwise }) => [name, otherwise])) };
}

/** What of a remembered object still means something. */
function usable(kept) {
  const known = FIELDS.filter(({ name }) => name in kept)
    .map((field) => [field.name, read(field, kept[field.name] ?? "")])
    .filter(([, value]) => value !== undefined);
  return { ...Object.fromEntries(known), ...(typeof kept.system === "string" ? { system: kept.system } : {}) };
}

/** A field's text as a number, null when it is left to the server, undefined when it means nothing. */
function read({ low, high, whole, optional }, text) {
  const trimmed = String(text).trim();
  if (!trimmed) return optional ? null : undefined;
  const value = Number(trimmed);
  return value >= low && value <= high && (!whole || Number.isInteger(value)) ? value : undefined;
}
