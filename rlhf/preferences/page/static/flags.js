// The dialog in which something wrong is reported, about one response or about the task.

import { byId, make } from "./dom.js";
import { nameOf } from "./reading.js";

const KINDS = {
  unsafe: ["Unsafe", "harmful, hateful, sexual, or helps with a crime"],
  personal_data: ["Personal data", "names a private person, an address, a number, a password"],
  broken: ["Broken", "cut off, garbled, in the wrong language, or the task makes no sense"],
};

/** The flags of the task on the screen. */
export class Flags {
  #boxes = [];

  /** `changed()` is called after each change. */
  constructor(task, changed) {
    const places = [...task.responses.keys(), null];
    const head = places.map((place) => make("th", { scope: "col" }, place === null ? "Task" : nameOf(task, place)));
    const rows = Object.entries(KINDS).map(([kind, [title, hint]]) => {
      const cells = places.map((position) => make("td", {}, this.#box(task, kind, title, position, changed)));
      const name = make("th", { scope: "row" }, title, make("span", { class: "note" }, hint));
      return make("tr", {}, name, ...cells);
    });
    const corner = make("th", { scope: "col" }, make("span", { class: "visually-hidden" }, "What is wrong"));
    const table = make("table", {}, make("thead", {}, make("tr", {}, corner, ...head)), make("tbody", {}, ...rows));
    byId("flag-table").replaceChildren(table);
  }

  get value() {
    return this.#boxes.filter(({ box }) => box.checked).map(({ kind, position }) => ({ kind, position }));
  }

  set value(flags) {
    for (const { box, kind, position } of this.#boxes) {
      box.checked = flags.some((flag) => flag.kind === kind && flag.position === position);
    }
  }

  #box(task, kind, title, position, changed) {
    const place = position === null ? "the task as a whole" : `response ${nameOf(task, position)}`;
    const box = make("input", { type: "checkbox", "aria-label": `${title}: ${place}`, onchange: changed });
    this.#boxes.push({ box, kind, position });
    return make("label", { class: "box" }, box);
  }
}
