// The answer to "how good is this response?": a number from 1 to the scale of the task.

import { make } from "./dom.js";

// A longer scale is entered as a number.
const MOST_BUTTONS = 10;
// More buttons than fit one row of a phone at the size of a finger.
const ONE_ROW = 7;

/** Asks for a rating. `changed(by)` is called with `key`, `arrow` or `pointer`. */
export class Rating {
  constructor(task, cards, changed) {
    this.scale = task.scale;
    this.changed = changed;
    this.question = `How good is the response, from 1 to ${this.scale}?`;
    this.value = null;
    this.inputs = [];
    this.element = make("fieldset", { class: "rating" }, make("legend", { class: "visually-hidden" }, this.question));
    this.element.append(this.scale <= MOST_BUTTONS ? this.#buttons() : this.#field());
  }

  get answer() {
    return this.value === null ? null : { kind: "rating", ratings: [this.value] };
  }

  set answer(answer) {
    this.#choose(answer?.kind === "rating" ? answer.ratings[0] : null);
  }

  key(event) {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const from = this.value ?? (event.key === "ArrowLeft" ? this.scale + 1 : 0);
      this.#choose(Math.min(this.scale, Math.max(1, from + (event.key === "ArrowLeft" ? -1 : 1))), "arrow");
      return true;
    }
    const number = event.key === "0" ? 10 : Number.parseInt(event.key, 10);
    if (this.scale > MOST_BUTTONS || !(number >= 1 && number <= this.scale)) return false;
    this.#choose(number, "key");
    return true;
  }

  describe(answer) {
    return `${answer.ratings[0]} of ${this.scale}`;
  }

  #buttons() {
    const ends = make(
      "div",
      { class: "ends", "aria-hidden": "true" },
      make("span", {}, "worst"),
      make("span", {}, "best"),
    );
    const scale = make("div", { class: this.scale > ONE_ROW ? "scale many" : "scale" });
    for (let number = 1; number <= this.scale; number += 1) {
      const input = make("input", {
        type: "radio",
        name: "rating",
        value: number,
        "aria-label": `${number} of ${this.scale}`,
      });
      input.addEventListener("change", () => this.#choose(number, "arrow"));
      input.addEventListener("click", (event) => event.detail > 0 && this.#choose(number, "pointer"));
      this.inputs.push(input);
      scale.append(make("label", { class: "segment" }, input, make("span", { class: "number" }, String(number))));
    }
    return make("div", {}, ends, scale);
  }

  #field() {
    this.field = make("input", { type: "number", min: 1, max: this.scale, step: 1, "aria-label": this.question });
    this.field.addEventListener("input", () => {
      const number = this.field.valueAsNumber;
      this.value = Number.isInteger(number) && number >= 1 && number <= this.scale ? number : null;
      this.changed("arrow", "");
    });
    return make("label", { class: "field" }, `1 (worst) to ${this.scale} (best) `, this.field);
  }

  #choose(value, by = null) {
    this.value = value;
    for (const input of this.inputs) input.checked = input.value === String(value);
    if (this.field) this.field.value = value ?? "";
    if (by) this.changed(by, value === null ? "" : `${value} of ${this.scale}`);
  }
}
