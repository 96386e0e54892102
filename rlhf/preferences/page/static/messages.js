// What the page says about itself: figures at the top, a notice below them, a message in place of a task.

import { tryNow } from "./api.js";
import { byId, count, duration, make, show } from "./dom.js";
import { unsent } from "./stored.js";

/** Shows how far the annotator is, and how fast. */
export function showFigures(progress) {
  const { labelled, remaining, per_hour: pace, median_seconds: middle } = progress;
  byId("bar").max = Math.max(1, labelled + remaining);
  byId("bar").value = labelled;
  const parts = [
    [labelled.toLocaleString("en"), "done"],
    [remaining.toLocaleString("en"), "to go"],
  ];
  if (pace !== null) parts.push([Math.round(pace).toLocaleString("en"), "an hour", "pace"]);
  if (middle !== null) parts.push([duration(middle), "each", "pace"]);
  const spans = parts.map(([number, word, kind]) => make("span", { class: kind }, make("b", {}, number), ` ${word}`));
  byId("figures").replaceChildren(...spans.flatMap((span, index) => (index ? [" ", span] : [span])));
  document.title = remaining ? `Label: ${count(remaining, "task")} to go` : "Label";
}

/** A line at the top with a button; an empty text takes it away. */
export function showNotice(text, button = "", press = null) {
  // What says so already is not said again.
  if (byId("notice-text").textContent !== text) byId("notice-text").textContent = text;
  byId("notice-button").textContent = button;
  byId("notice-button").onclick = press;
  show(byId("notice"), text !== "");
}

/** A message in the middle, with an optional button `[text, press]`. */
export function showMessage(title, text, button = null) {
  const heading = make("h1", { tabindex: "-1" }, title);
  const parts = [heading, make("p", {}, text)];
  if (button) parts.push(make("button", { type: "button", class: "primary", onclick: button[1] }, button[0]));
  byId("message").replaceChildren(...parts);
  show(byId("message"), true);
  heading.focus({ preventScroll: true });
}

/** Shows that a request waits for the server, and why; null when it arrived. */
export function waiting(error) {
  const kept = unsent()
    ? " Your answer is kept here and sent as soon as it works."
    : " This page tries again by itself.";
  if (error === null) showNotice("");
  else showNotice((error.status === 0 ? "No connection." : error.message) + kept, "Try now", tryNow);
}
