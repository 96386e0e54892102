// What is read: the prompt and the responses.

import { appendText } from "./characters.js";
import { difference } from "./difference.js";
import { make } from "./dom.js";
import { appendMarkdown, appendRaw } from "./markdown.js";

// A longer text is shown in part at first.
const FOLD_CHARACTERS = 20_000;
const ROLES = { user: "User", assistant: "Assistant", system: "System", tool: "Tool" };

/** The letter or number by which a response is called. */
export function nameOf(task, position) {
  return task.kind === "pairwise" ? "AB"[position] : String(position + 1);
}

/** Fills an element with a text, rendered or raw; a very long one gets a button for its rest. */
function fillText(element, text, rendered) {
  const append = rendered ? appendMarkdown : appendRaw;
  element.replaceChildren();
  if (!text) {
    element.append(make("p", { class: "note" }, "(empty)"));
    return;
  }
  if (text.length <= FOLD_CHARACTERS) {
    append(element, text);
    return;
  }
  append(element, text.slice(0, FOLD_CHARACTERS));
  const showAll = () => {
    element.replaceChildren();
    append(element, text);
  };
  const rest = (text.length - FOLD_CHARACTERS).toLocaleString("en");
  element.append(make("button", { type: "button", class: "unfold", onclick: showAll }, `Show ${rest} more characters`));
}

/** Fills the section of the prompt; turns of a conversation are shown as such. */
export function fillPrompt(element, prompt, rendered) {
  element.replaceChildren();
  const turns = prompt.messages ?? [{ role: null, content: prompt.text }];
  for (const turn of turns) {
    const body = make("div", { class: "text" });
    fillText(body, turn.content, rendered);
    const role = turn.role === null ? null : make("h2", { class: "role" });
    if (role) appendText(role, ROLES[turn.role] ?? turn.role);
    const kind = ROLES[turn.role] ? turn.role : "other";
    element.append(make("div", { class: turn.role === null ? "turn plain" : `turn ${kind}` }, role, body));
  }
}

/** The cards of the responses, in the order to show. */
export function responseCards(task) {
  return task.responses.map((_, position) => {
    const isAlone = task.responses.length === 1;
    const word = make("span", { class: isAlone ? "name" : "visually-hidden" }, "Response ");
    const name = isAlone ? null : make("span", { class: "name" }, nameOf(task, position));
    const title = make("h2", { id: `response-${position}` }, word, name);
    // The length is not shown: annotators favour long texts enough without being told.
    const head = make("header", {}, title);
    const body = make("div", { class: "text", id: `text-${position}` });
    const attributes = { class: "response", "data-position": position, "aria-labelledby": `response-${position}` };
    return make("article", attributes, head, body);
  });
}

/** Shows the texts of the cards; `mode` is `rendered`, `raw` or `difference`. Returns a remark on them. */
export function fillResponses(cards, task, mode) {
  const bodies = cards.map((card) => card.querySelector(".text"));
  if (mode !== "difference") {
    bodies.forEach((body, position) => fillText(body, task.responses[position].text, mode === "rendered"));
    return "";
  }
  const found = difference(task.responses[0].text, task.responses[1].text);
  fillDifference(bodies[0], found.left, "A");
  fillDifference(bodies[1], found.right, "B");
  if (found.coarse) return "Parts of these texts are too long to compare word by word.";
  if (found.common === 1) return "The words are the same.";
  return `${Math.round(100 * found.common)} % of the text is common; the rest is marked.`;
}

function fillDifference(body, parts, name) {
  const raw = make("div", { class: "raw", dir: "auto" });
  for (const part of parts) {
    if (part.same) appendText(raw, part.text);
    else {
      const mark = make("mark", { title: `only in ${name}` });
      appendText(mark, part.text);
      raw.append(mark);
    }
  }
  body.replaceChildren(raw);
}
