// Markdown inside a line: emphasis, code spans, links. One pass over the text, linear in its length.

import { appendText } from "./characters.js";
import { make } from "./dom.js";

const PLAIN = /[^\\`*_~[\]!<]+/y;
const ADDRESS =
  /\(\s*<?([^()\s<>]{0,2000}(?:\([^()\s<>]{0,500}\)[^()\s<>]{0,500}){0,5})>?(?:\s{1,9}"[^"]{0,500}")?\s*\)/y;
const AUTOLINK = /<((?:https?|ftp|mailto):[^\s<>]{1,2000})>/y;
// Deeper nesting is shown as it is written.
const MAX_DEPTH = 20;
const TAGS = { "*1": "em", _1: "em", "*2": "strong", _2: "strong", "~2": "s" };

/** Appends the nodes of a text to a parent. */
export function appendInline(parent, text) {
  const frames = [frame("", "")];
  const codeRuns = backtickRuns(text);
  let position = 0;
  while (position < text.length) {
    const plain = sticky(PLAIN, text, position);
    if (plain) {
      push(frames, plain[0]);
      position += plain[0].length;
      continue;
    }
    position = special(text, position, frames, codeRuns);
  }
  while (frames.length > 1) flatten(frames);
  fill(parent, frames[0].nodes);
}

/** Handles the special character at a position; returns where the text goes on. */
function special(text, position, frames, codeRuns) {
  const character = text[position];
  if (character === "\\") return escaped(text, position, frames);
  if (character === "`") return codeSpan(text, position, frames, codeRuns);
  if (character === "[" || (character === "!" && text[position + 1] === "[")) {
    const marker = character === "[" ? "[" : "![";
    open(frames, marker, "bracket");
    return position + marker.length;
  }
  if (character === "]") return closeBracket(text, position, frames);
  if (character === "<") {
    const link = sticky(AUTOLINK, text, position);
    push(frames, link ? address(link[1]) : "<");
    return position + (link ? link[0].length : 1);
  }
  if (character === "!") {
    push(frames, "!");
    return position + 1;
  }
  return emphasis(text, position, frames);
}

function escaped(text, position, frames) {
  const next = text[position + 1] ?? "";
  // Brackets keep their backslash: it is how formulas begin.
  if (/[()[\]]/.test(next)) push(frames, `\\${next}`);
  else if (/[!-/:-@^-`{-~]/.test(next)) push(frames, next);
  else {
    push(frames, "\\");
    return position + 1;
  }
  return position + 2;
}

/** The places of all runs of backticks, by length, so that each search for an end is a step forward in a list. */
function backtickRuns(text) {
  const runs = new Map();
  for (const match of text.matchAll(/`+/g)) {
    const length = match[0].length;
    if (!runs.has(length)) runs.set(length, { places: [], next: 0 });
    runs.get(length).places.push(match.index);
  }
  return runs;
}

function codeSpan(text, position, frames, codeRuns) {
  let length = 1;
  while (text[position + length] === "`") length += 1;
  const runs = codeRuns.get(length);
  while (runs && runs.next < runs.places.length && runs.places[runs.next] <= position) runs.next += 1;
  const end = runs?.places[runs.next];
  if (end === undefined) {
    push(frames, "`".repeat(length));
    return position + length;
  }
  let inside = text.slice(position + length, end);
  if (inside.startsWith(" ") && inside.endsWith(" ") && inside.trim()) inside = inside.slice(1, -1);
  const code = make("code");
  appendText(code, inside);
  push(frames, code);
  return end + length;
}

function closeBracket(text, position, frames) {
  const index = frames.findLastIndex((item) => item.kind === "bracket");
  const found = index > 0 && text[position + 1] === "(" ? sticky(ADDRESS, text, position + 1) : null;
  if (index < 1 || !found) {
    // This bracket cannot become a link any more.
    if (index > 0) frames[index].kind = "literal";
    push(frames, "]");
    return position + 1;
  }
  while (frames.length - 1 > index) flatten(frames);
  const closed = frames.pop();
  const isImage = closed.marker === "![";
  const link = make("span", { class: isImage ? "picture" : "link" });
  if (isImage) link.append(make("span", { class: "note" }, "image not loaded "));
  fill(link, closed.nodes);
  if (link.textContent !== found[1] || isImage) link.append(" ", address(found[1]));
  push(frames, link);
  return position + 1 + found[0].length;
}

/** An address as text: it can be read and copied, not followed. */
function address(text) {
  const element = make("span", { class: "address" });
  appendText(element, text);
  return element;
}

function emphasis(text, position, frames) {
  const character = text[position];
  let run = 1;
  while (text[position + run] === character) run += 1;
  const end = position + run;
  const before = text[position - 1] ?? " ";
  const after = text[end] ?? " ";
  let canOpen = !/\s/.test(after) && (!/[\p{P}\p{S}]/u.test(after) || !/[\p{L}\p{N}]/u.test(before));
  let canClose = !/\s/.test(before) && (!/[\p{P}\p{S}]/u.test(before) || !/[\p{L}\p{N}]/u.test(after));
  if (character === "_") {
    canOpen &&= !/[\p{L}\p{N}]/u.test(before);
    canClose &&= !/[\p{L}\p{N}]/u.test(after);
  }
  if (character === "~" ? run !== 2 : run > 3) canOpen = canClose = false;
  while (canClose && run > 0) {
    const index = frames.findLastIndex((item) => item.kind === character && item.marker.length <= run);
    if (index < 1) break;
    while (frames.length - 1 > index) flatten(frames);
    const closed = frames.pop();
    const element = make(TAGS[character + closed.marker.length]);
    fill(element, closed.nodes);
    push(frames, element);
    run -= closed.marker.length;
  }
  while (canOpen && run > 0) {
    const size = Math.min(run, 2);
    open(frames, character.repeat(size), character);
    run -= size;
  }
  if (run > 0) push(frames, character.repeat(run));
  return end;
}

function sticky(pattern, text, position) {
  pattern.lastIndex = position;
  return pattern.exec(text);
}

function frame(marker, kind) {
  return { marker, kind, nodes: [] };
}

function open(frames, marker, kind) {
  if (frames.length > MAX_DEPTH) push(frames, marker);
  else frames.push(frame(marker, kind));
}

/** Adds a string or an element to the innermost frame; neighbouring strings become one. */
function push(frames, node) {
  const { nodes } = frames.at(-1);
  if (typeof node === "string" && typeof nodes.at(-1) === "string") nodes[nodes.length - 1] += node;
  else nodes.push(node);
}

/** Ends a frame that was never closed: its marker is text after all. */
function flatten(frames) {
  const ended = frames.pop();
  push(frames, ended.marker);
  for (const node of ended.nodes) push(frames, node);
}

function fill(parent, nodes) {
  for (const node of nodes) {
    if (typeof node === "string") appendText(parent, node);
    else parent.append(node);
  }
}
