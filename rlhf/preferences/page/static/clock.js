// Time spent on a task, and the lease that is kept alive while somebody works on it.

import { request, RequestError } from "./api.js";

const ACTIVITY = ["pointerdown", "pointermove", "keydown", "wheel", "touchstart", "scroll"];

/** Counts the seconds in which the page is visible. */
export class Stopwatch {
  #before;
  #since = null;
  #follow = () => this.#update();

  constructor(seconds = 0) {
    this.#before = seconds;
    document.addEventListener("visibilitychange", this.#follow);
    this.#update();
  }

  get seconds() {
    const running = this.#since === null ? 0 : (performance.now() - this.#since) / 1000;
    return Math.round((this.#before + running) * 1000) / 1000;
  }

  stop() {
    document.removeEventListener("visibilitychange", this.#follow);
    this.#before = this.seconds;
    this.#since = null;
  }

  #update() {
    if (document.visibilityState === "visible") this.#since ??= performance.now();
    else {
      this.#before = this.seconds;
      this.#since = null;
    }
  }
}

/** Extends the lease of an assignment while its annotator does something; says when it is lost. */
export class Lease {
  #assignment;
  #seconds;
  #lost;
  #extended = Date.now();
  #asking = false;
  #act = () => this.#active();

  constructor(assignment, seconds, lost) {
    this.#assignment = assignment;
    this.#seconds = seconds;
    this.#lost = lost;
    for (const kind of ACTIVITY) window.addEventListener(kind, this.#act, { passive: true, capture: true });
    document.addEventListener("visibilitychange", this.#act);
  }

  stop() {
    for (const kind of ACTIVITY) window.removeEventListener(kind, this.#act, { capture: true });
    document.removeEventListener("visibilitychange", this.#act);
    this.#lost = () => {};
  }

  async #active() {
    const age = (Date.now() - this.#extended) / 1000;
    if (this.#asking || document.visibilityState !== "visible" || age < this.#seconds / 3) return;
    this.#asking = true;
    try {
      const { lease_seconds: seconds } = await request("POST", "/api/extend", { assignment: this.#assignment });
      this.#seconds = seconds;
      this.#extended = Date.now();
    } catch (error) {
      if (error instanceof RequestError && error.status === 409) this.#lost(error);
      // Any other failure shows when the label is sent, which is tried until it works.
    } finally {
      this.#asking = false;
    }
  }
}
