// The little Markdown that models write, as DOM nodes. Text is only ever text: no HTML, no links, no images.

import { copyText, iconButton, make } from "./dom.js";

const FENCE = /^\s*(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const DEEPEST = 8; // quotes in quotes, lists in lists: a model that loops can write thousands

/** Cuts text into blocks: `{ type, source, … }`; `source` tells an unchanged block while an answer grows. */
export function parse(text) {
  const lines = text.split("\n");
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    if (!lines[i].trim()) {
      i += 1;
      continue;
    }
    const [block, next] = take(lines, i);
    blocks.push({ ...block, source: lines.slice(i, next).join("\n") });
    i = next;
  }
  return blocks;
}

function take(lines, i) {
  if (FENCE.test(lines[i])) return takeCode(lines, i);
  const heading = HEADING.exec(lines[i]);
  if (heading) return [{ type: "heading", level: heading[1].length, text: heading[2] }, i + 1];
  if (RULE.test(lines[i])) return [{ type: "rule" }, i + 1];
  if (ITEM.test(lines[i])) return takeList(lines, i);
  if (QUOTE.test(lines[i])) return takeQuote(lines, i);
  let end = i + 1;
  while (end < lines.length && lines[end].trim() && !opens(lines[end])) end += 1;
  return [{ type: "paragraph", text: lines.slice(i, end).join("\n") }, end];
}

const opens = (line) => [FENCE, HEADING, RULE, ITEM, QUOTE].some((pattern) => pattern.test(line));

function takeCode(lines, i) {
  const [, fence, language] = FENCE.exec(lines[i]);
  let end = i + 1;
  while (end < lines.length && !closes(lines[end].trim(), fence)) end += 1;
  return [{ type: "code", language, text: lines.slice(i + 1, end).join("\n") }, Math.min(end + 1, lines.length)];
}

const closes = (line, fence) => line.length >= fence.length && line === fence[0].repeat(line.length);

function takeQuote(lines, i) {
  let end = i;
  const inner = [];
  for (let match; end < lines.length && (match = QUOTE.exec(lines[end])); end += 1) inner.push(match[1]);
  return [{ type: "quote", text: inner.join("\n") }, end];
}

/** A list with its nested ones: an item further in than the one above it belongs to that one. */
function takeList(lines, i) {
  const items = [];
  let end = i;
  for (; end < lines.length; end += 1) {
    const match = ITEM.exec(lines[end]);
    if (match && !RULE.test(lines[end])) {
      items.push({ indent: Math.min(match[1].length, 2 * DEEPEST), mark: match[2], text: match[3] });
    } else if (!lines[end].trim()) {
      if (end + 1 >= lines.length || !ITEM.test(lines[end + 1])) break;
    } else if (/^\s/.test(lines[end]) && !opens(lines[end])) {
      items[items.length - 1].text += `\n${lines[end].trim()}`;
    } else break;
  }
  return [{ type: "list", items }, end];
}

/** Shows text in `host`, keeping the nodes of the blocks that did not change since the last call. */
export function show(host, text) {
  const before = host.blocks ?? [];
  const blocks = parse(text);
  let same = 0;
  while (same < blocks.length && same < before.length && blocks[same].source === before[same].source) same += 1;
  const [grown, was] = [blocks[same], before[same]];
  if (grown?.type === "code" && was?.type === "code" && grown.language === was.language) {
    host.children[same].querySelector("code").textContent = grown.text;
    same += 1;
  }
  while (host.children.length > same) host.lastChild.remove();
  host.append(...blocks.slice(same).map((block) => element(block)));
  host.blocks = blocks;
}

function element(block, depth = 0) {
  switch (block.type) {
    case "code":
      return code(block);
    case "heading":
      return make(`h${Math.min(block.level + 2, 6)}`, {}, ...inline(block.text));
    case "rule":
      return make("hr");
    case "list":
      return list(block.items, 0, block.items.length);
    case "quote":
      if (depth === DEEPEST) return make("p", {}, block.text);
      return make("blockquote", {}, ...parse(block.text).map((inner) => element(inner, depth + 1)));
    default:
      return make("p", {}, ...inline(block.text));
  }
}

function list(items, from, to) {
  const ordered = /\d/.test(items[from].mark);
  const start = ordered ? Number.parseInt(items[from].mark, 10) : 1;
  const host = make(ordered ? "ol" : "ul", start === 1 ? {} : { start });
  for (let i = from; i < to; ) {
    let next = i + 1;
    while (next < to && items[next].indent > items[from].indent + 1) next += 1;
    const item = make("li", {}, ...inline(items[i].text));
    if (next > i + 1) item.append(list(items, i + 1, next));
    host.append(item);
    i = next;
  }
  return host;
}

function code({ language, text }) {
  const body = make("code", {}, text);
  const copy = iconButton("copy", "copyCode", () => copyText(body.textContent).then(() => flash(copy)));
  const head = make("div", { class: "code-head" }, make("span", {}, language || "text"), copy);
  return make("div", { class: "code" }, head, make("pre", { tabindex: "0" }, body));
}

/** Shows for a moment that a copy was made. */
export function flash(button) {
  button.classList.add("done");
  document.dispatchEvent(new CustomEvent("announce", { detail: "copied" }));
  setTimeout(() => button.classList.remove("done"), 1200);
}

/**
 * Nodes for `code`, **bold** and *italic*; a mark without its partner is text. A mark known to have no partner further on
 * is not looked for again, so the time stays linear.
 */
export function inline(text) {
  const nodes = [];
  const lonely = new Set();
  let plain = "";
  const put = (node) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
  };
  for (let i = 0; i < text.length; ) {
    const mark = "`*_".includes(text[i]) ? /^(?:`+|\*\*|__|\*)/.exec(text.slice(i, i + 64))?.[0] : undefined;
    const end = mark && !lonely.has(mark) ? partner(text, i, mark) : -1;
    if (mark && end === -1) lonely.add(mark);
    if (end > 0) {
      put(marked(mark, text.slice(i + mark.length, end)));
      i = end + mark.length;
    } else {
      plain += mark ?? text[i];
      i += mark?.length ?? 1;
    }
  }
  if (plain) nodes.push(plain);
  return nodes;
}

/** Where the closing mark is; -1 when there is none further on, 0 when this one opens nothing. */
function partner(text, i, mark) {
  const from = i + mark.length;
  if (mark[0] !== "`") {
    if (from >= text.length || /\s/.test(text[from])) return 0;
    if (mark === "__" && /\w/.test(text[i - 1] ?? "")) return 0;
  }
  for (let end = text.indexOf(mark, from + 1); end !== -1; end = text.indexOf(mark, end + mark.length)) {
    if (mark[0] === "`" && (text[end - 1] === "`" || text[end + mark.length] === "`")) continue;
    if (mark === "*" && (text[end + 1] === "*" || text[end - 1] === "*")) continue;
    if (mark[0] !== "`" && /\s/.test(text[end - 1])) continue;
    return end;
  }
  return -1;
}

function marked(mark, inner) {
  if (mark[0] === "`") return make("code", {}, inner.length > 2 ? inner.replace(/^ (.*) $/s, "$1") : inner);
  return make(mark === "*" ? "em" : "strong", {}, ...inline(inner));
}
