"use strict";
// Theme, language, hover and copying. Without this script the page shows everything, in English.
const root = document.documentElement;
const byId = (id) => document.getElementById(id);
document.querySelector(".buttons").hidden = false;

// -- language and theme
const language = byId("language");
function speak(chinese) {
  if (chinese) root.dataset.lang = "zh";
  else delete root.dataset.lang;
  root.lang = chinese ? "zh-CN" : "en";
  language.lang = chinese ? "en" : "zh-CN";
  language.textContent = chinese ? "English" : "中文";
  language.setAttribute("aria-label", language.textContent);
}
speak((navigator.language || "").toLowerCase().startsWith("zh"));
language.addEventListener("click", () => speak(root.dataset.lang !== "zh"));
byId("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

// -- what a mark tells
const tip = byId("tip");
function show(mark, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = mark.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = tip;
  const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), root.clientWidth - width - 8);
  const above = box.top - height - 10;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${(above > 8 ? above : box.bottom + 10) + scrollY}px`;
}
for (const mark of document.querySelectorAll(".mark, .columns [title]")) {
  const title = mark.querySelector("title");
  const text = title ? title.textContent : mark.title;
  if (title) title.remove();
  else {
    mark.removeAttribute("title");
    mark.setAttribute("aria-label", text);
    mark.setAttribute("role", "img");
  }
  const at = mark.querySelector(".reach") || mark;
  for (const event of ["pointerenter", "focus"]) mark.addEventListener(event, () => show(at, text));
  for (const event of ["pointerleave", "blur"]) mark.addEventListener(event, () => { tip.hidden = true; });
}
addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

// -- copying, where the browser allows it
const copy = document.querySelector(".copy");
if (copy && navigator.clipboard) {
  copy.hidden = false;
  copy.addEventListener("click", () => navigator.clipboard.writeText(document.querySelector(".code code").textContent).then(() => {
    copy.classList.add("done");
    copy.textContent = "✓";
  }, () => { copy.hidden = true; }));
}

// -- paper shows all
addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });
