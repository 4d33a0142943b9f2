// The API key: asked for when the server wants one, kept in this tab only.

import { call, key } from "./api.js";
import { find } from "./dom.js";
import { say } from "./i18n.js";

export class KeyDialog {
  constructor() {
    this.dialog = find("#key-dialog");
    find("#key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.use(find("#key").value.trim());
    });
    find("#key-cancel").addEventListener("click", () => this.dialog.close());
    find("#key-change").addEventListener("click", () => this.ask());
    find("#key-forget").addEventListener("click", () => {
      key.set(null);
      this.show();
      find("#key-change").focus();
    });
    this.show();
  }

  /** Resolves to whether a key was given that the server accepts. One dialog serves all who ask at once. */
  ask() {
    this.asking ??= new Promise((resolve) => {
      this.given = false;
      find("#key").value = "";
      find("#key-wrong").textContent = "";
      this.dialog.addEventListener("close", () => resolve(this.given), { once: true });
      this.dialog.showModal();
      find("#key").focus();
    }).finally(() => (this.asking = null));
    return this.asking;
  }

  /** Tries a key on the list of models before it is kept. */
  async use(value) {
    const before = key.get();
    key.set(value);
    try {
      await call("v1/models");
    } catch (error) {
      key.set(before);
      say(find("#key-wrong"), error.kind === "key" ? "keyWrong" : "errorNetwork");
      find("#key").select();
      return;
    }
    this.given = true;
    this.show();
    this.dialog.close();
    document.dispatchEvent(new Event("keychanged"));
  }

  show() {
    const held = Boolean(key.get());
    find("#key-forget").hidden = !held;
    say(find("#key-state"), held ? "keyKept" : "keyNone");
    say(find("#key-change"), held ? "keyChange" : "keyEnter");
  }
}
