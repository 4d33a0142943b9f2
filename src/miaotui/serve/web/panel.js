// The side panel: tabs after the ARIA pattern; beside the chat on wide screens, over it on narrow ones.

import { find } from "./dom.js";
import { device } from "./store.js";

const NARROW = window.matchMedia("(max-width: 63.99rem)");

export class Panel {
  constructor() {
    this.tabs = [...document.querySelectorAll("[role=tab]")];
    for (const tab of this.tabs) tab.addEventListener("click", () => this.select(tab));
    find(".tabs").addEventListener("keydown", (event) => this.key(event));
    find("#panel-toggle").addEventListener("click", () => this.toggle(!this.open));
    find("#panel-close").addEventListener("click", () => this.toggle(false));
    find("#panel").addEventListener("keydown", (event) => {
      if (event.key === "Escape" && NARROW.matches) this.toggle(false);
    });
    NARROW.addEventListener("change", () => this.start());
    this.start();
  }

  /** Wide screens start as they were left, narrow ones with the chat alone. */
  start() {
    this.show(!NARROW.matches && device.get("panel", true));
  }

  toggle(open) {
    this.show(open);
    if (NARROW.matches) (open ? this.selected() : find("#panel-toggle")).focus();
    else device.set("panel", open);
  }

  show(open) {
    this.open = open;
    document.body.classList.toggle("with-panel", open);
    find("#panel").hidden = !open;
    find("#panel-toggle").setAttribute("aria-expanded", open);
    find("#chat").inert = open && NARROW.matches;
    document.dispatchEvent(new Event("panelchanged"));
  }

  selected() {
    return this.tabs.find((tab) => tab.getAttribute("aria-selected") === "true");
  }

  select(chosen) {
    for (const tab of this.tabs) {
      const on = tab === chosen;
      tab.setAttribute("aria-selected", on);
      tab.tabIndex = on ? 0 : -1;
      find(`#${tab.getAttribute("aria-controls")}`).hidden = !on;
    }
    document.dispatchEvent(new Event("panelchanged"));
  }

  key(event) {
    const tabs = this.tabs.filter((tab) => !tab.hidden);
    const at = tabs.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const tab = tabs.at(to % tabs.length);
    this.select(tab);
    tab.focus();
  }

  /** Whether the charts are on the screen. */
  showsLive() {
    return this.open && !find("#pane-live").hidden;
  }
}
