// Which key does what, and the table of keys in the guide.

import { byId, make } from "./dom.js";
import { settings } from "./stored.js";

const PAIRS = [
  ["1 … 7", "A much better … tie … B much better"],
  ["← →", "move the choice"],
  ["b", "both are bad"],
  ["d", "mark the differences"],
];
const RANKINGS = [
  ["1 … 9", "rank that response next, or select it"],
  ["↑ ↓", "move the selected one"],
  ["t", "tie it with the one above, or end the tie"],
  ["⌫", "take it out of the ranking"],
];
const RATINGS = [
  ["1 … 9, 0", "the rating; 0 is 10"],
  ["← →", "change it"],
];
const ALWAYS = [
  ["Enter", "submit"],
  ["s", "skip"],
  ["u, Ctrl+Z", "undo; again goes further back"],
  ["f", "flag: unsafe, personal data, broken"],
  ["c", "comment; Esc goes back"],
  ["m", "rendered or raw text"],
  ["p", "all of a long prompt"],
  ["i, ?", "this guide"],
];
const OF_KIND = { pairwise: ["Pairs", PAIRS], ranking: ["Rankings", RANKINGS], rating: ["Ratings", RATINGS] };

/** Fills the table of keys for a kind of task; for all kinds when it is null. */
export function fillKeys(kind) {
  const groups = [["Keys", ALWAYS], ...(kind ? [OF_KIND[kind]] : Object.values(OF_KIND))];
  const made = groups.map(([title, keys]) => {
    const rows = keys.map(([key, does]) => [make("dt", {}, make("kbd", {}, key)), make("dd", {}, does)]);
    return make("section", {}, make("h3", {}, title), make("dl", {}, ...rows.flat()));
  });
  byId("keys").replaceChildren(...made);
}

function isTyping(target) {
  const writes = target instanceof HTMLInputElement && !["radio", "checkbox"].includes(target.type);
  return writes || target instanceof HTMLTextAreaElement || target instanceof HTMLSelectElement;
}

/** Calls `page` for the keys that are pressed; `page.actions` maps a key to what it does. */
export function listen(page) {
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
    const command = event.ctrlKey || event.metaKey;
    if (isTyping(event.target)) {
      if (event.key === "Escape" || (command && event.key === "Enter")) take(event, () => page.leaveField(command));
      return;
    }
    if (command && !event.shiftKey && event.key.toLowerCase() === "z") take(event, page.actions.u);
    if (command || event.altKey) return;
    if (event.key === "Enter") {
      // Pressing what is selected already would do nothing.
      const presses = event.target.closest?.("a, button:not(.chip[aria-pressed='true'])");
      if (!presses && !event.repeat) take(event, () => page.submit());
      return;
    }
    const single = event.key.length === 1;
    if (single && !settings.singleKeys) return;
    if (page.widget && !page.busy && page.widget.key(event)) event.preventDefault();
    else if (page.actions[event.key] && !event.repeat) take(event, page.actions[event.key]);
  });
}

function take(event, act) {
  event.preventDefault();
  act();
}
