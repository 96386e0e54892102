// Markdown blocks as DOM nodes. HTML in the text is text; links and images are named, never followed or loaded.

import { appendText } from "./characters.js";
import { make } from "./dom.js";
import { appendInline } from "./inline.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]{0,200})$/;
const ITEM = /^( {0,12})([-*+]|\d{1,9}[.)])( {1,4}|$)/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const QUOTE = /^ {0,3}>/;
const MAX_DEPTH = 8;
const MAX_COLUMNS = 40;

/** Appends a text as rendered Markdown. */
export function appendMarkdown(parent, text) {
  appendBlocks(parent, text.replaceAll("\r\n", "\n").replaceAll("\t", "    ").split("\n"), 0);
}

/** Appends a text as it is written. */
export function appendRaw(parent, text) {
  const pre = make("div", { class: "raw", dir: "auto" });
  appendText(pre, text);
  parent.append(pre);
}

function appendBlocks(parent, lines, depth) {
  const readers = depth < MAX_DEPTH ? [fence, heading, rule, quote, table, list] : [fence];
  let index = 0;
  while (index < lines.length) {
    if (!lines[index].trim()) {
      index += 1;
      continue;
    }
    let next = index;
    for (const read of readers) {
      next = read(parent, lines, index, depth);
      if (next > index) break;
    }
    index = next > index ? next : paragraph(parent, lines, index);
  }
}

function paragraph(parent, lines, start) {
  let end = start + 1;
  while (end < lines.length && lines[end].trim() && !startsBlock(lines, end)) end += 1;
  const element = make("p", { dir: "auto" });
  appendInline(element, lines.slice(start, end).join("\n"));
  parent.append(element);
  return end;
}

function startsBlock(lines, index) {
  const line = lines[index];
  return (
    FENCE.test(line) ||
    HEADING.test(line) ||
    QUOTE.test(line) ||
    ITEM.test(line) ||
    isRule(line) ||
    isTable(lines, index)
  );
}

function fence(parent, lines, start) {
  const match = FENCE.exec(lines[start]);
  if (!match) return start;
  const [, marker, language] = match;
  let end = start + 1;
  const closes = (line) => {
    const text = line.trim();
    return text.length >= marker.length && text === marker[0].repeat(text.length);
  };
  while (end < lines.length && !closes(lines[end])) end += 1;
  const code = make("code");
  appendText(code, lines.slice(start + 1, end).join("\n"));
  const block = make("div", { class: "code" });
  if (language.trim()) {
    const name = make("span", { class: "language" });
    appendText(name, language.trim());
    block.append(name);
  }
  // A block that scrolls sideways must be reachable by keyboard.
  block.append(make("pre", { dir: "ltr", tabindex: "0", role: "group", "aria-label": "code" }, code));
  parent.append(block);
  return end + 1;
}

function heading(parent, lines, start) {
  const match = HEADING.exec(lines[start]);
  if (!match) return start;
  let text = lines[start].slice(match[0].length).trim();
  const closing = text.lastIndexOf(" ");
  if (closing >= 0 && /^#+$/.test(text.slice(closing + 1))) text = text.slice(0, closing).trimEnd();
  // The page's own headings end at level 2.
  const element = make(`h${Math.min(6, match[1].length + 2)}`, { class: `level-${match[1].length}`, dir: "auto" });
  appendInline(element, text);
  parent.append(element);
  return start + 1;
}

function isRule(line) {
  return line.length < 1000 && /^([-*_])\1\1+$/.test(line.replaceAll(" ", ""));
}

function rule(parent, lines, start) {
  if (!isRule(lines[start])) return start;
  parent.append(make("hr"));
  return start + 1;
}

function quote(parent, lines, start, depth) {
  let end = start;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  if (end === start) return start;
  const inside = lines.slice(start, end).map((line) => line.replace(/^ {0,3}> ?/, ""));
  const element = make("blockquote");
  appendBlocks(element, inside, depth + 1);
  parent.append(element);
  return end;
}

function cells(line) {
  const text = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  const parts = [];
  let cell = "";
  for (let index = 0; index < text.length; index += 1) {
    if (text[index] === "\\" && text[index + 1] === "|") {
      cell += "|";
      index += 1;
    } else if (text[index] === "|") {
      parts.push(cell.trim());
      cell = "";
    } else cell += text[index];
  }
  return [...parts, cell.trim()];
}

function isTable(lines, index) {
  const delimiter = lines[index + 1];
  if (!lines[index].includes("|") || !delimiter?.includes("|") || delimiter.length > 2000) return false;
  const columns = cells(delimiter);
  const shaped = columns.length <= MAX_COLUMNS && columns.every((column) => /^:?-+:?$/.test(column));
  return shaped && cells(lines[index]).length === columns.length;
}

function table(parent, lines, start) {
  if (!isTable(lines, start)) return start;
  const sides = cells(lines[start + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "end") : "",
  );
  const row = (line, tag) => {
    const parts = cells(line);
    const made = sides.map((side, column) => {
      const cell = make(tag, { class: side || null, dir: "auto" });
      appendInline(cell, parts[column] ?? "");
      return cell;
    });
    // What does not fit the columns is not lost.
    if (parts.length > sides.length) appendText(made.at(-1), ` | ${parts.slice(sides.length).join(" | ")}`);
    return make("tr", {}, ...made);
  };
  let end = start + 2;
  const body = make("tbody");
  while (end < lines.length && lines[end].includes("|") && lines[end].trim()) {
    body.append(row(lines[end], "td"));
    end += 1;
  }
  const whole = make("table", {}, make("thead", {}, row(lines[start], "th")), body);
  parent.append(make("div", { class: "table", tabindex: "0", role: "group", "aria-label": "table" }, whole));
  return end;
}

function indentation(line) {
  return line.length - line.trimStart().length;
}

function list(parent, lines, start, depth) {
  const first = ITEM.exec(lines[start]);
  if (!first) return start;
  const ordered = /\d/.test(first[2]);
  const kind = first[2].at(-1);
  const element = make(ordered ? "ol" : "ul");
  if (ordered) element.start = Number.parseInt(first[2], 10);
  let index = start;
  while (index < lines.length) {
    const match = ITEM.exec(lines[index]);
    if (!match || match[2].at(-1) !== kind || isRule(lines[index])) break;
    const end = endOfItem(lines, index, match[1].length);
    const width = match[0].length;
    const rest = lines.slice(index + 1, end).map((line) => line.slice(Math.min(indentation(line), width)));
    const item = make("li", { dir: "auto" });
    appendBlocks(item, [lines[index].slice(width), ...rest], depth + 1);
    element.append(item);
    index = end;
  }
  parent.append(element);
  return index;
}

/** Where the lines of a list item end: at text that is not indented after an empty line, or at another block. */
function endOfItem(lines, start, indent) {
  let end = start + 1;
  while (end < lines.length) {
    const line = lines[end];
    if (!line.trim()) {
      let after = end;
      while (after < lines.length && !lines[after].trim()) after += 1;
      if (after === lines.length) return after;
      if (indentation(lines[after]) <= indent) return ITEM.test(lines[after]) ? after : end;
      end = after;
    } else if (indentation(line) <= indent && startsBlock(lines, end)) return end;
    else end += 1;
  }
  return end;
}
