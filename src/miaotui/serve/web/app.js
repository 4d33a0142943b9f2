// The page: makes its parts and ties them together.

import { ApiError, call } from "./api.js";
import { Card } from "./card.js";
import { announce, Chat } from "./chat.js";
import { find, make, worded } from "./dom.js";
import { language, setLanguage, t, translate } from "./i18n.js";
import { KeyDialog } from "./key.js";
import { Live } from "./live.js";
import { Panel } from "./panel.js";
import { Settings } from "./settings.js";
import { device } from "./store.js";

const RETRY = 3000; // ms between attempts to reach the server
const DARK = window.matchMedia("(prefers-color-scheme: dark)");

translate();
const keys = new KeyDialog();
const settings = new Settings();
const panel = new Panel();
const card = new Card();
const model = find("#model");
const chat = new Chat({
  request: () => ({ model: model.value, system: settings.system(), ...settings.sampling() }),
  askKey: () => keys.ask(),
});
const live = new Live(() => panel.showsLive());

document.addEventListener("panelchanged", () => live.wake());
document.addEventListener("keychanged", () => begin());
document.addEventListener("announce", (event) => announce(event.detail));
bindModel();
bindLanguage();
bindTheme();
bindExamples();
begin();

/** Reads what the server has: its models and its card. Without a connection, tries on. */
async function begin() {
  try {
    const { data } = await (await call("v1/models")).json();
    showModels(data.map(({ id }) => id));
    await card.load();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.kind === "key") await wantKey();
    else {
      const kind = error.kind === "starting" ? "Starting" : "Network";
      find("#notice").replaceChildren(worded("span", {}, `error${kind}`), worded("span", {}, `help${kind}`));
      setTimeout(begin, kind === "Starting" ? RETRY / 3 : RETRY);
    }
  }
}

/** Asks for the key; a reader who declines finds a button to think again. */
async function wantKey() {
  if (await keys.ask()) return;
  showModels([]);
  const enter = worded("button", { type: "button", class: "plain", onclick: () => keys.ask() }, "keyEnter");
  find("#notice").replaceChildren(worded("span", {}, "errorKey"), enter);
}

function showModels(names) {
  const wanted = model.value || device.get("model");
  model.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
  if (!names.length) model.append(worded("option", { value: "" }, "modelNone"));
  if (names.includes(wanted)) model.value = wanted;
  model.disabled = names.length === 0;
  find("#notice").replaceChildren();
  chat.refresh();
}

function bindModel() {
  model.addEventListener("change", () => device.set("model", model.value));
}

function bindLanguage() {
  const button = find("#language");
  const show = () => {
    const chinese = language() === "zh";
    button.textContent = chinese ? "English" : "中文";
    button.lang = chinese ? "en" : "zh";
    button.setAttribute("aria-label", chinese ? "Switch to English" : "切换到中文");
  };
  button.addEventListener("click", () => {
    setLanguage(language() === "zh" ? "en" : "zh");
    show();
  });
  show();
}

/** Light or dark: the system's preference until the reader chooses. */
function bindTheme() {
  const root = document.documentElement;
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : DARK.matches);
  const show = () => find("#theme").setAttribute("aria-pressed", dark());
  find("#theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    device.set("theme", root.dataset.theme);
    show();
  });
  DARK.addEventListener("change", show);
  show();
}

function bindExamples() {
  const buttons = ["example1", "example2", "example3"].map((key) =>
    worded("button", { type: "button", onclick: () => chat.ask(t(key)) }, key),
  );
  find("#examples").append(...buttons.map((button) => make("li", {}, button)));
}
