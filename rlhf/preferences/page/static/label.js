// The page on which annotators label: asks for a task, shows it, sends the answer, and again.

import { newToken, persist, request, RequestError } from "./api.js";
import { Lease, Stopwatch } from "./clock.js";
import { offerInstructions, openDialog, prepareDialogs } from "./dialogs.js";
import { announce, byId, count, duration, show } from "./dom.js";
import { Flags } from "./flags.js";
import { fillKeys, listen } from "./keys.js";
import { showFigures, showMessage, showNotice, waiting } from "./messages.js";
import { Pairwise } from "./pairwise.js";
import { Ranking } from "./ranking.js";
import { Rating } from "./rating.js";
import { fillPrompt, fillResponses, responseCards } from "./reading.js";
import { changeSetting, draftOf, keepDraft, keepUnsent, settings, unsent } from "./stored.js";

const WIDGETS = { pairwise: Pairwise, ranking: Ranking, rating: Rating };
const POLL_MS = 5_000;

class Page {
  task = null;
  widget = null;
  busy = false;
  #me = null;
  #cards = [];
  #flags = null;
  #watch = null;
  #lease = null;
  #comparing = false;
  #poll = null;

  actions = {
    s: () => this.#send({ kind: "skip" }),
    u: () => this.#undo(),
    f: () => this.task && openDialog("flags"),
    c: () => this.#toggleComment(),
    d: () => this.#toggleDifference(),
    m: () => this.#toggleRaw(),
    p: () => this.#unfoldPrompt(),
    i: () => this.#openHelp(),
    "?": () => this.#openHelp(),
  };

  async start() {
    prepareDialogs();
    listen(this);
    this.#wire();
    await this.#guard(async () => {
      this.#welcome(await persist("GET", "/api/me", undefined, waiting));
      if (this.#me.annotator === null) this.#askName();
      else await this.#begin();
    });
  }

  /** Sends the answer that is chosen. */
  submit() {
    const answer = this.widget?.answer;
    if (answer) this.#send(answer);
    else if (this.task && !this.busy) announce("Nothing is chosen yet.");
  }

  /** Leaves the field that is typed in, and submits when asked to. */
  leaveField(submits) {
    byId("task-title").focus({ preventScroll: true });
    if (submits) this.submit();
  }

  #wire() {
    const buttons = {
      skip: "s",
      undo: "u",
      "open-flags": "f",
      "toggle-comment": "c",
      "toggle-difference": "d",
      "toggle-raw": "m",
      "unfold-prompt": "p",
      "open-help": "i",
    };
    for (const [id, key] of Object.entries(buttons)) byId(id).addEventListener("click", () => this.actions[key]());
    byId("submit").addEventListener("click", () => this.submit());
    byId("pause").addEventListener("click", () => this.#pause());
    byId("open-settings").addEventListener("click", () => openDialog("settings"));
    byId("rename").addEventListener("click", () => {
      byId("settings").close();
      this.#guard(async () => {
        await this.#release();
        this.#askName();
      });
    });
    byId("send-flags").addEventListener("click", () => {
      byId("flags").close();
      if (this.#flags.value.length) this.#send({ kind: "flag_only" });
    });
    byId("name-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#guard(() => this.#setName(byId("name").value.trim()));
    });
    byId("comment").addEventListener("input", () => this.#keep());
    // A button that was clicked with the mouse gives the focus back, so that Enter submits.
    document.addEventListener("click", (event) => {
      const button = event.pointerType === "mouse" ? event.target.closest("#task button, #answer button") : null;
      if (button && button === document.activeElement) button.blur();
    });
    window.addEventListener("pagehide", () => this.#keep());
    window.addEventListener("beforeunload", (event) => {
      if (unsent()) event.preventDefault();
    });
  }

  /** Runs a step of the page; what fails in a way that the step does not handle becomes a message. */
  async #guard(step) {
    if (this.busy) return;
    this.busy = true;
    document.body.classList.add("busy");
    try {
      await step();
    } catch (error) {
      if (!(error instanceof RequestError)) throw error;
      this.#close();
      if (error.status === 401)
        showMessage("This link is not valid any more", "Ask whoever started the labelling for a new one.");
      else if (error.status === 409 && this.#me?.annotator === null) this.#askName();
      else showMessage("That did not work", error.message, ["Try again", () => this.#guard(() => this.#next())]);
    } finally {
      this.busy = false;
      document.body.classList.remove("busy");
    }
  }

  #welcome(me) {
    this.#me = me;
    byId("store").textContent = me.annotator ?? me.store;
    byId("settings-name").textContent = me.annotator ?? "";
    show(byId("admin-link"), me.admin);
    show(byId("name-row"), me.may_rename && me.annotator !== null);
    showFigures(me.progress);
  }

  #askName() {
    this.#close();
    show(byId("message"), false);
    show(byId("name-form"), true);
    byId("name").value = this.#me.annotator ?? "";
    byId("name").focus();
  }

  async #setName(name) {
    byId("name-error").textContent = name ? "" : "Please enter a name.";
    if (!name) return byId("name").focus();
    try {
      this.#welcome(await persist("POST", "/api/annotator", { name }, waiting));
    } catch (error) {
      if (!(error instanceof RequestError) || ![409, 422].includes(error.status)) throw error;
      byId("name-error").textContent = error.message;
      return byId("name").focus();
    }
    show(byId("name-form"), false);
    return this.#begin();
  }

  async #begin() {
    await offerInstructions(this.#me.instructions);
    const label = unsent();
    if (label) await this.#deliver(label);
    await this.#next();
  }

  async #next() {
    clearTimeout(this.#poll);
    const { task, state, progress } = await persist("POST", "/api/next", {}, waiting);
    showFigures(progress);
    if (task) return this.#open(task);
    this.#close();
    if (state === "others") return this.#waitForOthers();
    const done = progress.labelled
      ? `You labelled ${count(progress.labelled, "task")}. Thank you.`
      : "There is nothing to label: every task has its labels, or there is none.";
    const pace = progress.median_seconds === null ? "" : ` The middle one took ${duration(progress.median_seconds)}.`;
    showMessage("All done", done + pace, ["Look for more", () => this.#guard(() => this.#next())]);
    return announce("All done.");
  }

  #waitForOthers() {
    const look = () => this.#guard(() => this.#next());
    const text = "Other annotators hold the tasks that are left. This page looks again by itself.";
    showMessage("Nothing for you right now", text, ["Look now", look]);
    const again = () => {
      if (document.visibilityState === "visible") look();
      else this.#poll = setTimeout(again, POLL_MS);
    };
    this.#poll = setTimeout(again, POLL_MS);
  }

  #open(task) {
    this.#close();
    show(byId("message"), false);
    this.task = task;
    this.#cards = responseCards(task);
    this.widget = new WIDGETS[task.kind](task, this.#cards, (by, text) => this.#changed(by, text));
    this.#flags = new Flags(task, () => this.#keep());
    byId("task-title").textContent = `${task.number}. ${this.widget.question}`;
    byId("responses").replaceChildren(...this.#cards);
    byId("responses").className = `responses ${task.kind}`;
    byId("question").replaceChildren(this.widget.element);
    show(byId("toggle-difference"), task.kind === "pairwise");
    this.#fill();
    this.#restore(task);
    for (const id of ["task", "answer"]) show(byId(id), true);
    this.#foldPrompt();
    this.#lease = new Lease(task.assignment, task.lease_seconds, () => this.#lapsed());
    window.scrollTo(0, 0);
    if (!document.querySelector("dialog[open]")) byId("task-title").focus({ preventScroll: true });
  }

  /** Fills in what was entered before a reload, or the answer that undo brought back. */
  #restore(task) {
    const { flags = [], comment = "" } = task.previous ?? {};
    const draft = draftOf(task) ?? { answer: task.previous, flags, comment, seconds: 0 };
    this.widget.answer = draft.answer;
    this.#flags.value = draft.flags;
    byId("comment").value = draft.comment;
    show(byId("comment-box"), draft.comment !== "");
    byId("toggle-comment").setAttribute("aria-expanded", String(draft.comment !== ""));
    this.#watch = new Stopwatch(draft.seconds);
    this.#keep();
  }

  /** Takes the task off the screen. */
  #close() {
    this.#lease?.stop();
    this.#watch?.stop();
    clearTimeout(this.#poll);
    this.task = this.widget = this.#lease = this.#watch = null;
    this.#comparing = false;
    for (const id of ["task", "answer", "name-form"]) show(byId(id), false);
  }

  #fill() {
    fillPrompt(byId("prompt"), this.task.prompt, settings.rendered);
    const mode = this.#comparing ? "difference" : settings.rendered ? "rendered" : "raw";
    byId("remark").textContent = fillResponses(this.#cards, this.task, mode);
    byId("toggle-difference").setAttribute("aria-pressed", String(this.#comparing));
    byId("toggle-raw").setAttribute("aria-pressed", String(!settings.rendered));
  }

  /** A long prompt is folded, so that the responses are on the screen. */
  #foldPrompt() {
    const prompt = byId("prompt");
    prompt.classList.remove("folded");
    const isLong = prompt.scrollHeight > 0.45 * window.innerHeight;
    prompt.classList.toggle("folded", isLong);
    byId("unfold-prompt").textContent = "Show the whole prompt";
    show(byId("unfold-prompt"), isLong);
    // The end of a conversation is what the responses answer.
    if (isLong) prompt.scrollTop = prompt.scrollHeight;
  }

  #unfoldPrompt() {
    if (!this.task || byId("unfold-prompt").hidden) return;
    const isFolded = byId("prompt").classList.toggle("folded");
    if (isFolded) byId("prompt").scrollTop = byId("prompt").scrollHeight;
    byId("unfold-prompt").textContent = isFolded ? "Show the whole prompt" : "Fold the prompt";
  }

  #toggleDifference() {
    if (this.task?.kind !== "pairwise") return;
    this.#comparing = !this.#comparing;
    this.#fill();
  }

  #toggleRaw() {
    if (!this.task) return;
    changeSetting("rendered", !settings.rendered);
    this.#fill();
    announce(settings.rendered ? "Rendered text." : "Raw text.");
  }

  #toggleComment() {
    if (!this.task) return;
    const opens = byId("comment-box").hidden;
    show(byId("comment-box"), opens);
    byId("toggle-comment").setAttribute("aria-expanded", String(opens));
    if (opens) byId("comment").focus({ preventScroll: true });
  }

  #openHelp() {
    fillKeys(this.task?.kind ?? null);
    openDialog("help");
  }

  /** The answer was changed by a key, an arrow or a pointer. */
  #changed(by, text) {
    if (!this.task || this.busy) return;
    this.#keep();
    const isFinal = this.task.kind !== "ranking" && by !== "arrow";
    if (settings.autoSubmit && isFinal) this.submit();
    else announce(text);
  }

  /** Keeps what is entered, and shows whether it can be sent. */
  #keep() {
    if (!this.task) return;
    const { answer } = this.widget;
    const flags = this.#flags.value;
    const { seconds } = this.#watch;
    const { assignment, given } = this.task;
    keepDraft({ assignment, given, answer, flags, comment: byId("comment").value, seconds });
    byId("submit").disabled = answer === null;
    byId("send-flags").disabled = flags.length === 0;
    byId("chosen").textContent = answer === null ? "" : this.widget.describe(answer);
    byId("flags-text").textContent = flags.length ? count(flags.length, "flag") : "Flag";
    byId("open-flags").classList.toggle("active", flags.length > 0);
    byId("toggle-comment").classList.toggle("active", byId("comment").value !== "");
  }

  #send(answer) {
    if (!this.task || this.busy) return;
    const body = {
      assignment: this.task.assignment,
      given: this.task.given,
      token: newToken(),
      answer,
      flags: this.#flags.value,
      comment: byId("comment").value.trim(),
      seconds: this.#watch.seconds,
    };
    const words = { skip: "skipped", flag_only: "flags sent" };
    const said = words[answer.kind] ?? this.widget.describe(answer);
    keepUnsent(body);
    this.#guard(async () => {
      if (await this.#deliver(body)) announce(`Saved: ${said}.`);
      await this.#next();
    });
  }

  /** Sends a label until it arrives; false when the server does not want it. */
  async #deliver(label) {
    try {
      const { progress } = await persist("POST", "/api/submit", label, waiting);
      showFigures(progress);
      showNotice("");
    } catch (error) {
      if (!(error instanceof RequestError) || ![409, 422].includes(error.status)) throw error;
      showNotice(error.message, "OK", () => showNotice(""));
      keepUnsent(null);
      return false;
    }
    keepUnsent(null);
    keepDraft(null);
    return true;
  }

  #undo() {
    this.#guard(async () => {
      try {
        const { task, progress } = await persist("POST", "/api/undo", { token: newToken() }, waiting);
        showFigures(progress);
        this.#open(task);
        announce("Taken back. Your answer is filled in; change it or submit it again.");
      } catch (error) {
        if (!(error instanceof RequestError) || error.status !== 409) throw error;
        announce(error.message);
        showNotice(error.message, "OK", () => showNotice(""));
      }
    });
  }

  #lapsed() {
    const next = () => {
      showNotice("");
      this.#guard(() => this.#next());
    };
    showNotice(
      "You were away for long, so this task went to somebody else. Nothing is lost but this one.",
      "Next task",
      next,
    );
  }

  /** Gives the task on the screen back; when that fails, its lease ends some time later. */
  async #release() {
    const assignment = this.task?.assignment;
    if (assignment) await request("POST", "/api/release", { assignment }).catch(() => null);
  }

  #pause() {
    if (!this.task || this.busy) return;
    this.#guard(async () => {
      await this.#release();
      this.#close();
      const go = ["Continue", () => this.#guard(() => this.#next())];
      showMessage("Paused", "Your task went back, so that somebody else can take it. Your labels are safe.", go);
    });
  }
}

new Page().start();
