// The answer to "rank these responses": tiers from best to worst, by keys, by drag, or by taps.

import { makeDraggable } from "./drag.js";
import { make } from "./dom.js";

const SNIPPET_CHARACTERS = 60;

/** Asks for a ranking. `changed(by, text)` is called after each change. */
export class Ranking {
  question = "Rank the responses, best first.";

  constructor(task, cards, changed) {
    this.cards = cards;
    this.changed = changed;
    this.tiers = [];
    this.selected = null;
    this.numResponses = task.responses.length;
    this.chips = task.responses.map((response, position) => this.#chip(response, position));
    this.board = make("div", { class: "board", role: "group", "aria-label": "Ranking, best first" });
    this.tray = make("div", { class: "tray", role: "group", "aria-label": "Not ranked" });
    this.tools = make("div", { class: "tools" }, ...this.#tools());
    const ends = (text) => make("span", { class: "end" }, text);
    const rank = make("div", { class: "rank" }, ends("best"), this.board, ends("worst"));
    this.element = make("section", { class: "ranking", "aria-label": this.question });
    this.element.append(make("div", { class: "above" }, this.tray, this.tools), rank);
    makeDraggable(this, (position) => {
      this.selected = position;
      // Nothing moves in the document while a finger is on it: the browser would lose the touch.
      this.#mark();
    });
    this.#draw();
  }

  get answer() {
    const placed = this.tiers.flat().length;
    return placed === this.numResponses ? { kind: "ranking", tiers: this.tiers.map((tier) => [...tier]) } : null;
  }

  set answer(answer) {
    this.tiers = answer?.kind === "ranking" ? answer.tiers.map((tier) => [...tier]) : [];
    this.selected = null;
    this.#draw();
  }

  key(event) {
    const number = Number.parseInt(event.key, 10);
    if (event.key.length === 1 && number >= 1 && number <= this.numResponses) this.press(number - 1);
    else if (event.key === "ArrowUp" || event.key === "ArrowLeft") this.#move(-1);
    else if (event.key === "ArrowDown" || event.key === "ArrowRight") this.#move(1);
    else if (event.key === "t" || event.key === "=") this.#tie();
    else if (event.key === "Backspace" || event.key === "Delete") this.#remove();
    else return false;
    return true;
  }

  describe(answer) {
    return answer.tiers.map((tier) => tier.map((position) => position + 1).join(" and ")).join(", then ");
  }

  /** A number key or a tap: an unranked response goes to the end of the ranking, a ranked one is selected. */
  press(position) {
    const isPlaced = this.tiers.some((tier) => tier.includes(position));
    this.selected = position;
    if (!isPlaced) this.tiers.push([position]);
    this.#draw();
    this.#tell(isPlaced ? "selected" : "");
  }

  /** Puts a response into tier `index` (`join`), or into a tier of its own before it; null puts it back unranked. */
  place(position, index, join) {
    const target = index === null ? null : this.tiers[index];
    this.selected = index === null ? null : position;
    for (const tier of this.tiers) if (tier.includes(position)) tier.splice(tier.indexOf(position), 1);
    if (index !== null && join) target.push(position);
    else if (index !== null) this.tiers.splice(index, 0, [position]);
    this.tiers = this.tiers.filter((tier) => tier.length > 0);
    this.#draw();
    this.#tell(index === null ? "not ranked" : "");
  }

  #move(step) {
    const index = this.tiers.findIndex((tier) => tier.includes(this.selected));
    if (index < 0) return;
    const alone = this.tiers[index].length === 1;
    // Out of a tie it gets a tier of its own; alone it changes places with the next tier.
    if (!alone) this.place(this.selected, step < 0 ? index : index + 1, false);
    else if (this.tiers[index + step]) this.place(this.selected, step < 0 ? index - 1 : index + 2, false);
  }

  #tie() {
    const index = this.tiers.findIndex((tier) => tier.includes(this.selected));
    if (index < 0) return;
    if (this.tiers[index].length > 1) this.place(this.selected, index + 1, false);
    else if (this.tiers.length > 1) this.place(this.selected, index === 0 ? 1 : index - 1, true);
  }

  #remove() {
    if (this.selected !== null) this.place(this.selected, null, false);
  }

  #tell(word) {
    this.changed(
      "arrow",
      this.selected === null ? "" : `Response ${this.selected + 1}: ${word || this.#placeOf(this.selected)}`,
    );
  }

  #placeOf(position) {
    const index = this.tiers.findIndex((tier) => tier.includes(position));
    if (index < 0) return "not ranked";
    const others = this.tiers[index].filter((other) => other !== position).map((other) => other + 1);
    const tied = others.length ? `, tied with ${others.join(" and ")}` : "";
    return `place ${index + 1} of ${this.tiers.length}${tied}`;
  }

  #chip(response, position) {
    const text = response.text.slice(0, 4 * SNIPPET_CHARACTERS).replace(/[^\p{L}\p{N}\p{P}\p{S}]+/gu, " ");
    const snippet = make("span", { class: "snippet", dir: "auto" }, text.trim().slice(0, SNIPPET_CHARACTERS));
    const chip = make("button", { type: "button", class: "chip", "data-position": position });
    chip.append(make("span", { class: "number" }, String(position + 1)), snippet);
    chip.addEventListener("click", () => this.press(position));
    return chip;
  }

  #tools() {
    const tool = (text, key, act) =>
      make(
        "button",
        { type: "button", class: "quiet", onclick: act },
        text,
        make("kbd", { "aria-hidden": "true" }, key),
      );
    return [
      tool("Better", "↑", () => this.#move(-1)),
      tool("Worse", "↓", () => this.#move(1)),
      tool("Tie", "t", () => this.#tie()),
      tool("Unrank", "⌫", () => this.#remove()),
    ];
  }

  #draw() {
    const focused = this.chips.find((chip) => chip === document.activeElement);
    const tiers = this.tiers.map((tier, index) => {
      const chips = tier.map((position) => this.chips[position]);
      const place = make("span", { class: "place", "aria-hidden": "true" }, String(index + 1));
      return make("div", { class: "tier", "data-index": index }, place, ...chips);
    });
    this.board.replaceChildren(...tiers);
    const left = this.chips.filter((_, position) => !this.tiers.some((tier) => tier.includes(position)));
    this.tray.replaceChildren(...left);
    this.tray.classList.toggle("empty", left.length === 0);
    this.#mark();
    focused?.focus({ preventScroll: true });
  }

  /** Shows which response is selected, and the place of each. */
  #mark() {
    for (const tool of this.tools.children) tool.disabled = this.selected === null;
    this.chips.forEach((chip, position) => {
      chip.setAttribute("aria-pressed", String(position === this.selected));
      chip.setAttribute("aria-label", `Response ${position + 1}, ${this.#placeOf(position)}`);
      const place = this.tiers.findIndex((tier) => tier.includes(position)) + 1;
      this.cards[position].classList.toggle("preferred", position === this.selected);
      this.cards[position].querySelector(".name").dataset.place = place || "";
    });
  }
}
