// Text of a model, with every character that could deceive the eye made visible.
//
// Controls, invisible characters and those that turn the direction of text are shown as a boxed code point and never
// reach the page themselves. Joiners stay where writing needs them: in emoji, and in scripts that join letters.

import { make } from "./dom.js";

const HIDDEN =
  /[\u0000-\u0008\u000B-\u001F\u007F-\u009F\u00AD\u034F\u061C\u115F\u1160\u17B4\u17B5\u180B-\u180F\u200B-\u200F\u2028-\u202E\u2060-\u206F\u3164\uD800-\uDFFF\uFE00-\uFE0F\uFEFF\uFFA0\uFFF0-\uFFFB\u{E0000}-\u{E0FFF}]/gu;
const PICTOGRAPH = /^(?:\p{Extended_Pictographic}|\p{Emoji_Modifier}|\uFE0F)/u;
const JOINING =
  /^[\p{Script=Arabic}\p{Script=Syriac}\p{Script=Devanagari}\p{Script=Bengali}\p{Script=Gurmukhi}\p{Script=Gujarati}\p{Script=Oriya}\p{Script=Tamil}\p{Script=Telugu}\p{Script=Kannada}\p{Script=Malayalam}\p{Script=Sinhala}\p{Script=Khmer}\p{Script=Myanmar}]/u;
const NAMES = {
  0x00: "null byte",
  0x07: "bell",
  0x08: "backspace",
  0x0d: "carriage return",
  0x1b: "escape",
  0x7f: "delete",
  0xad: "soft hyphen",
  0x200b: "zero-width space",
  0x200c: "zero-width non-joiner",
  0x200d: "zero-width joiner",
  0x200e: "left-to-right mark",
  0x200f: "right-to-left mark",
  0x2028: "line separator",
  0x2029: "paragraph separator",
  0x202a: "left-to-right embedding",
  0x202b: "right-to-left embedding",
  0x202c: "end of a change of direction",
  0x202d: "left-to-right override",
  0x202e: "right-to-left override",
  0x2060: "word joiner",
  0x2066: "left-to-right isolate",
  0x2067: "right-to-left isolate",
  0x2068: "first-strong isolate",
  0x2069: "end of an isolate",
  0xfeff: "byte order mark",
};

/** How a hidden character is written: `U+202E`. */
function codePoint(character) {
  return `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}

/** Whether a joiner or variation selector does its honest work at this place. */
function belongs(text, index, character) {
  const before = Array.from(text.slice(Math.max(0, index - 2), index)).at(-1) ?? "";
  const after = text.slice(index + 1, index + 3);
  if (character === "\uFE0F" || character === "\uFE0E") return /^(?:\p{Emoji}|\p{So}|\p{Sm})/u.test(before);
  if (character === "\u200D" && PICTOGRAPH.test(before)) return /^\p{Extended_Pictographic}/u.test(after);
  return (character === "\u200C" || character === "\u200D") && JOINING.test(before) && /^\p{L}/u.test(after);
}

/** Appends text to a node: text nodes, and a mark for each hidden character, or for many of the same in a row. */
export function appendText(parent, text) {
  let start = 0;
  for (const match of text.matchAll(HIDDEN)) {
    const [character] = match;
    const { index } = match;
    if (index < start || belongs(text, index, character)) continue;
    if (index > start) parent.append(text.slice(start, index));
    let end = index + character.length;
    while (text.startsWith(character, end)) end += character.length;
    start = end;
    // The end of a line in Windows' way is the end of a line.
    const isLineEnd = character === "\r" && text[end] === "\n";
    const number = (end - index) / character.length - (isLineEnd ? 1 : 0);
    if (number > 0) parent.append(mark(character, number));
  }
  if (start < text.length) parent.append(text.slice(start));
}

function mark(character, number) {
  const code = codePoint(character);
  const title = `${code}: ${NAMES[character.codePointAt(0)] ?? "hidden character"}`;
  return make("span", { class: "hidden-character", title }, number === 1 ? code : `${code} ×${number}`);
}
