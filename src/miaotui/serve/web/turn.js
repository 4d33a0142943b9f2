// One turn of the conversation on the screen: a question, or an answer with its figures.

import { copyText, iconButton, make, worded } from "./dom.js";
import { number, say, sayAttribute, seconds } from "./i18n.js";
import { flash, show } from "./markdown.js";

/** A question. `onEdit(text)` is called with the changed text. */
export class Question {
  constructor(text, onEdit) {
    Object.assign(this, { text, onEdit });
    this.body = make("div", { class: "bubble" }, text);
    this.actions = make("div", { class: "actions" }, iconButton("edit", "edit", () => this.edit(), { class: "quiet round small needs-idle" }));
    this.element = make("li", { class: "turn question" }, worded("h2", { class: "unseen" }, "you"), this.body, this.actions);
  }

  edit() {
    const area = make("textarea", { rows: Math.min(12, this.text.split("\n").length + 1) });
    area.value = this.text;
    sayAttribute(area, "label", "editing");
    const send = worded("button", { type: "submit", class: "solid needs-idle" }, "editSend");
    const cancel = worded("button", { type: "button", class: "plain", onclick: () => this.restore() }, "cancel");
    const form = make("form", { class: "edit" }, area, make("div", { class: "row end" }, cancel, send));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (area.value.trim() && !send.disabled) this.onEdit(area.value);
    });
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        this.restore();
      } else if (sends(event) && event.target === area) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    this.body.replaceWith(form);
    this.actions.hidden = true;
    this.form = form;
    area.focus();
  }

  restore() {
    this.form.replaceWith(this.body);
    this.actions.hidden = false;
    this.actions.querySelector("button").focus();
  }
}

/** An answer. `onAgain()` asks for another one. */
export class Answer {
  constructor(onAgain) {
    this.text = "";
    this.body = make("div", { class: "answer" }, worded("p", { class: "waiting" }, "waiting"));
    this.figures = make("p", { class: "figures" });
    this.copy = iconButton("copy", "copy", () => copyText(this.text).then(() => flash(this.copy)));
    this.again = iconButton("again", "regenerate", onAgain, { class: "quiet round small needs-idle again" });
    this.foot = make("div", { class: "actions", hidden: true }, this.copy, this.again, this.figures);
    this.element = make("li", { class: "turn reply" }, worded("h2", { class: "unseen" }, "answer"), this.body, this.foot);
  }

  /** Shows the text so far; drawn once a frame however many pieces come. */
  write(text) {
    this.text = text;
    this.element.classList.add("streaming");
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    if (this.text && this.body.firstChild?.className === "waiting") this.body.replaceChildren();
    if (this.text) show(this.body, this.text);
    document.dispatchEvent(new Event("grown"));
  }

  /** Ends the answer: its figures and why it ended below it. */
  end({ stats, finish }) {
    this.draw();
    this.element.classList.remove("streaming");
    this.body.querySelector(".waiting")?.remove();
    if (!this.text && finish !== "error") this.body.append(worded("p", { class: "hint" }, finish === "stopped" ? "stoppedHere" : "emptyAnswer"));
    this.figures.replaceChildren(...this.facts(stats ?? {}, finish));
    this.foot.hidden = finish === "error" && !this.text;
    this.copy.hidden = !this.text;
    this.again.hidden = finish === "error";
    document.dispatchEvent(new Event("grown"));
  }

  facts({ rate, first, tokens, counted }, finish) {
    const facts = [];
    if (rate) facts.push(worded("span", {}, counted ? "rate" : "rateAbout", { rate: () => number(rate, rate < 100 ? 1 : 0) }));
    if (first !== undefined) facts.push(worded("span", {}, "first", { time: () => seconds(first) }));
    if (tokens && counted) facts.push(worded("span", {}, "tokens", { count: () => number(tokens) }));
    if (finish === "length") facts.push(worded("span", { class: "notable" }, "cutOff"));
    if (finish === "stopped" && this.text) facts.push(worded("span", { class: "notable" }, "stoppedHere"));
    return facts;
  }

  /** Says what went wrong and what to do about it. */
  fail(error, actions) {
    const kind = error.kind ? error.kind[0].toUpperCase() + error.kind.slice(1) : "Page";
    const help = make("p", {});
    if (error.kind === "busy" && error.retryAfter) say(help, "helpBusyFor", { time: Math.ceil(error.retryAfter) });
    else say(help, `help${kind}`);
    const detail = error.detail ? [make("p", { class: "detail" }, error.detail)] : [];
    const buttons = actions.map(({ words, act }) => worded("button", { type: "button", class: "plain needs-idle", onclick: act }, words));
    const head = worded("p", { class: "head" }, `error${kind}`);
    this.body.querySelector(".waiting")?.remove();
    this.element.append(make("div", { class: "failure", role: "alert" }, head, ...detail, help, make("div", { class: "row" }, ...buttons)));
  }
}

/** Enter without Shift; not the Enter that picks a word in an input method (Safari says 229). */
export const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
