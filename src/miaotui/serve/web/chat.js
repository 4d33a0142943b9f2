// The conversation: what was said, who is speaking, and how to stop, repeat, change and clear it.

import { ApiError, streamChat } from "./api.js";
import { find, worded } from "./dom.js";
import { t } from "./i18n.js";
import { tab } from "./store.js";
import { Answer, Question, sends } from "./turn.js";

export class Chat {
  /** `request()` gives the model, the parameters and the system prompt; `askKey()` resolves to whether a key was given. */
  constructor({ request, askKey }) {
    Object.assign(this, { request, askKey, turns: [], running: null });
    this.bindComposer();
    this.bindScroll();
    for (const turn of restored()) this.add(turn);
    this.refresh();
  }

  bindComposer() {
    const area = find("#question");
    find("#composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask(area.value);
    });
    area.addEventListener("input", () => this.refresh());
    area.addEventListener("keydown", (event) => {
      if (!sends(event)) return;
      event.preventDefault();
      this.ask(area.value);
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.running && !find("dialog[open]")) this.stop();
    });
    find("#stop").addEventListener("click", () => this.stop());
    find("#new-chat").addEventListener("click", () => this.clear());
  }

  /** Follows a growing answer, until the reader scrolls away from its end. */
  bindScroll() {
    const scroll = find("#scroll");
    const near = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 48;
    this.follows = true;
    this.toEnd = () => {
      scroll.scrollTop = scroll.scrollHeight;
      this.follows = true;
      find("#latest").hidden = true;
    };
    scroll.addEventListener("scroll", () => {
      this.follows = near();
      find("#latest").hidden = this.follows;
    });
    document.addEventListener("grown", () => (this.follows ? this.toEnd() : (find("#latest").hidden = near())));
    find("#latest").addEventListener("click", () => {
      this.toEnd();
      find("#question").focus();
    });
  }

  /** Asks a question, or keeps it in the field while an answer is under way. */
  ask(text) {
    if (!text.trim() || this.running || !this.request().model) return;
    find("#question").value = "";
    this.add({ role: "user", content: text });
    this.answer();
  }

  add(turn) {
    const shown = turn.role === "user" ? new Question(turn.content, (text) => this.change(turn, text)) : new Answer(() => this.again());
    if (turn.role === "assistant" && turn.finish) {
      shown.text = turn.content;
      shown.end(turn);
    }
    Object.assign(turn, { shown });
    this.turns.push(turn);
    find("#turns").append(shown.element);
    return turn;
  }

  /** Drops the turns from `index` on. */
  cut(index) {
    for (const { shown } of this.turns.splice(index)) shown.element.remove();
  }

  /** Answers the last question again, in place of what follows it. */
  again() {
    if (this.running) return;
    this.cut(this.turns.findLastIndex(({ role }) => role === "user") + 1);
    this.answer();
  }

  /** Puts another question in place of an earlier one; what followed it goes. */
  change(turn, text) {
    if (this.running) return;
    this.cut(this.turns.indexOf(turn));
    this.add({ role: "user", content: text });
    find("#question").focus();
    this.answer();
  }

  async answer() {
    const { system, ...parameters } = this.request();
    const messages = messagesOf(system, this.turns);
    const turn = this.add({ role: "assistant", content: "" });
    const watch = new Stopwatch();
    const running = new AbortController();
    this.running = running;
    find("#notice").replaceChildren();
    this.toEnd();
    this.refresh();
    announce("answering");
    try {
      const onText = (piece) => {
        watch.piece();
        turn.content += piece;
        turn.shown.write(turn.content);
      };
      const { finish, usage } = await streamChat({ ...parameters, messages }, { signal: running.signal, onText });
      this.finish(turn, { finish: finish ?? "stop", stats: watch.stats(usage) });
      announce("finished", { text: turn.content });
    } catch (error) {
      const stopped = running.signal.aborted;
      this.finish(turn, { finish: stopped ? "stopped" : "error", stats: watch.stats(null) });
      if (stopped) announce("stopped");
      else await this.failed(turn, error);
    }
  }

  finish(turn, { finish, stats }) {
    this.running = null;
    Object.assign(turn, { finish, stats });
    turn.shown.end(turn);
    this.keep();
    this.refresh();
  }

  /** A missing key is asked for and the question repeated; anything else is said below the answer. */
  async failed(turn, error) {
    if (!(error instanceof ApiError)) console.error(error);
    if (error.kind === "key" && (await this.askKey())) {
      this.again();
      return;
    }
    const retry = { words: "tryAgain", act: () => this.again() };
    const enter = { words: "keyEnter", act: async () => (await this.askKey()) && this.again() };
    turn.shown.fail(error, error.kind === "key" ? [enter] : [retry]);
    document.dispatchEvent(new Event("grown"));
  }

  stop() {
    this.running?.abort();
    find("#question").focus();
  }

  /** Clears the conversation, and says how to have it back. */
  clear() {
    this.running?.abort();
    const kept = this.turns.filter(({ finish, role }) => role === "user" || finish);
    this.cut(0);
    this.keep();
    this.refresh();
    find("#question").focus();
    if (kept.length) this.offerUndo(kept);
  }

  offerUndo(kept) {
    const undo = worded("button", { type: "button", class: "plain" }, "undo");
    undo.addEventListener("click", () => {
      find("#notice").replaceChildren();
      for (const { role, content, finish, stats } of kept) this.add({ role, content, finish, stats });
      this.keep();
      this.refresh();
      find("#question").focus();
    });
    find("#notice").replaceChildren(worded("span", {}, "cleared"), undo);
  }

  keep() {
    tab.set("turns", this.turns.map(({ role, content, finish, stats }) => ({ role, content, finish, stats })));
  }

  /** Puts the page into the state that the conversation is in. */
  refresh() {
    const area = find("#question");
    const busy = this.running !== null;
    find("#send").hidden = busy;
    find("#stop").hidden = !busy;
    find("#send").disabled = !area.value.trim() || !this.request().model;
    find("#empty").hidden = this.turns.length > 0;
    find("#turns").setAttribute("aria-busy", busy);
    document.body.classList.toggle("busy", busy);
    for (const button of document.querySelectorAll(".needs-idle")) button.disabled = busy;
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight}px`;
  }
}

/** Seconds to the first piece, and pieces or tokens a second after it. */
class Stopwatch {
  constructor() {
    this.start = performance.now();
    this.pieces = 0;
  }

  piece() {
    this.last = performance.now();
    this.first ??= this.last;
    this.pieces += 1;
  }

  /** `counted` says that the tokens are the server's count; a stopped answer has only its pieces. */
  stats(usage) {
    if (!this.pieces) return {};
    const tokens = usage?.completion_tokens ?? this.pieces;
    const elapsed = (this.last - this.first) / 1000;
    const rate = this.pieces > 1 && tokens > 1 && elapsed > 0 ? (tokens - 1) / elapsed : null;
    return { rate, first: (this.first - this.start) / 1000, tokens, counted: Boolean(usage) };
  }
}

/** What the model reads. Questions that got no answer are joined to the next one: many templates want turns to alternate. */
function messagesOf(system, turns) {
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const { role, content } of turns.filter((turn) => turn.content)) {
    const last = messages.at(-1);
    if (last?.role === role) last.content += `\n\n${content}`;
    else messages.push({ role, content });
  }
  return messages;
}

function restored() {
  const kept = tab.get("turns", []);
  const sound = (turn) => typeof turn?.content === "string" && (turn.role === "user" || (turn.role === "assistant" && turn.finish));
  return Array.isArray(kept) ? kept.filter(sound) : [];
}

/** Tells a screen reader; the growing answer itself is no live region, which would be read piece by piece. */
export function announce(key, values) {
  find("#said").textContent = t(key, values);
}
