// Elements, made without ever parsing text as HTML.

import { say, sayAttribute } from "./i18n.js";

const SVG = "http://www.w3.org/2000/svg";

export const find = (selector, root = document) => root.querySelector(selector);

/** An element with attributes, listeners (`onclick: fn`) and children; strings become text nodes. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  fill(element, attributes);
  element.append(...children);
  return element;
}

/** The same in the SVG namespace. */
export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  fill(element, attributes);
  element.append(...children);
  return element;
}

function fill(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
}

/** A drawing from the sprite in index.html; always beside words or a label, so hidden from assistive technology. */
export function icon(name) {
  return draw("svg", { class: "icon", "aria-hidden": "true" }, draw("use", { href: `#i-${name}` }));
}

/** An element whose words follow the language. */
export function worded(tag, attributes, key, values) {
  const element = make(tag, attributes);
  say(element, key, values);
  return element;
}

/** A small button that shows an icon and is named by a string that follows the language. */
export function iconButton(name, key, onclick, attributes = {}) {
  const button = make("button", { type: "button", class: "quiet round small", onclick, ...attributes }, icon(name));
  sayAttribute(button, "label", key);
  sayAttribute(button, "title", key);
  return button;
}

/** Puts text on the clipboard, also where the page is served without TLS and the clipboard API is missing. */
export async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const area = make("textarea", { class: "unseen", "aria-hidden": "true", readonly: true });
  const focused = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  if (!copied) throw new Error("the browser refused to copy");
}
