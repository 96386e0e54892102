// The answer to "which of two responses is better?": seven levels, and "both bad".

import { make } from "./dom.js";

const WORDS = ["much better", "clearly better", "slightly better"];
const LEVELS = [
  { position: 0, strength: 3 },
  { position: 0, strength: 2 },
  { position: 0, strength: 1 },
  null,
  { position: 1, strength: 1 },
  { position: 1, strength: 2 },
  { position: 1, strength: 3 },
];

/** What a level is called: "A is much better". */
function levelName(level) {
  return level === null ? "Both are equally good" : `${"AB"[level.position]} is ${WORDS[3 - level.strength]}`;
}

/** Asks for a choice between two responses. `changed(by)` is called with `key`, `arrow` or `pointer`. */
export class Pairwise {
  question = "Which is better?";

  constructor(task, cards, changed) {
    this.cards = cards;
    this.changed = changed;
    this.chosen = null;
    this.inputs = LEVELS.map((level, index) => this.#input(levelName(level), index));
    this.inputs.push(this.#input("Both are bad", "bad"));
    const segments = this.inputs.map((input, index) => segment(input, index));
    const ends = make("div", { class: "ends", "aria-hidden": "true" }, end("A", "← "), end("B", "", " →"));
    const scale = make("div", { class: "scale" }, ...segments.slice(0, 7));
    this.element = make("fieldset", { class: "pairwise" }, make("legend", { class: "visually-hidden" }, this.question));
    this.element.append(ends, make("div", { class: "levels" }, scale, segments[7]));
  }

  get answer() {
    if (this.chosen === null) return null;
    if (this.chosen === "bad") return { kind: "both_bad" };
    const level = LEVELS[this.chosen];
    return level === null ? { kind: "tie" } : { kind: "choice", ...level };
  }

  set answer(answer) {
    if (answer?.kind === "both_bad") this.#choose("bad");
    else if (answer?.kind === "tie") this.#choose(3);
    else if (answer?.kind === "choice") {
      this.#choose(LEVELS.findIndex((l) => l?.position === answer.position && l.strength === answer.strength));
    } else this.#choose(null);
  }

  /** Follows a key; returns whether it was one of its own. */
  key(event) {
    const level = "1234567".indexOf(event.key);
    if (event.key.length === 1 && level >= 0) this.#choose(level, "key");
    else if (event.key === "b") this.#choose("bad", "key");
    else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const step = event.key === "ArrowLeft" ? -1 : 1;
      const from = typeof this.chosen === "number" ? this.chosen : 3;
      this.#choose(this.chosen === null ? 3 + step : Math.min(6, Math.max(0, from + step)), "arrow");
    } else return false;
    return true;
  }

  describe(answer) {
    if (answer.kind === "both_bad") return "both are bad";
    if (answer.kind === "tie") return "equally good";
    return levelName(answer);
  }

  #input(name, value) {
    const input = make("input", { type: "radio", name: "level", value, "aria-label": name });
    input.addEventListener("change", () => this.#choose(value, "arrow"));
    // A click on the level that is chosen already counts as well, which `change` does not tell.
    input.addEventListener("click", (event) => event.detail > 0 && this.#choose(value, "pointer"));
    return input;
  }

  #choose(value, by = null) {
    this.chosen = value;
    for (const input of this.inputs) {
      input.checked = input.value === String(value);
      if (input.checked && this.element.contains(document.activeElement)) input.focus({ preventScroll: true });
    }
    const level = typeof value === "number" ? LEVELS[value] : null;
    this.cards.forEach((card, position) => {
      card.classList.toggle("preferred", level?.position === position);
      card.classList.toggle("even", value === 3);
      card.classList.toggle("bad", value === "bad");
    });
    if (by) this.changed(by, value === null ? "" : value === "bad" ? "Both are bad" : levelName(level));
  }
}

function end(name, before, after = "") {
  return make("span", { class: `end ${name}` }, `${before}${name} is better${after}`);
}

/** A radio button as a segment of the scale. */
function segment(input, index) {
  if (index === 7) {
    const key = make("kbd", { "aria-hidden": "true" }, "b");
    return make("label", { class: "segment bad" }, input, make("span", { class: "word" }, "Both bad"), key);
  }
  const level = LEVELS[index];
  const word = level === null ? "tie" : WORDS[3 - level.strength].split(" ")[0];
  const side = level === null ? "tie" : "AB"[level.position];
  const strength = level === null ? 0 : level.strength;
  const shown = [make("span", { class: "number" }, String(index + 1)), make("span", { class: "word" }, word)];
  const label = make("label", { class: `segment ${side} strength-${strength}` }, input, ...shown);
  return label;
}
