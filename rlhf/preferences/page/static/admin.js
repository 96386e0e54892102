// The page of whoever runs the labelling: how far it is, how well annotators agree, and the way out for the labels.

import { request, RequestError } from "./api.js";
import { barChart, intervalChart, stackChart } from "./charts.js";
import { appendText } from "./characters.js";
import { announce, byId, count, duration, make } from "./dom.js";
import { showNotice } from "./messages.js";

const REFRESH_MS = 60_000;
const MOST_PAIRS = 45;

const percent = (value) => (value === null ? "–" : `${Math.round(100 * value)} %`);
const whole = (value) => (value === null ? "–" : Math.round(value).toLocaleString("en"));
const decimals = (value) => (value === null ? "–" : value.toFixed(2));

/** Text that people or models wrote, with hidden characters marked. */
function foreign(tag, text, attributes = {}) {
  const element = make(tag, { dir: "auto", ...attributes });
  appendText(element, text);
  return element;
}

function time(text) {
  if (!text) return make("span", {}, "–");
  const moment = new Date(text);
  const shown = moment.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
  return make("time", { datetime: text }, shown);
}

function table(caption, head, rows) {
  const cell = (tag, content, scope) => make(tag, scope ? { scope } : {}, content);
  const body = rows.map((row) =>
    make("tr", {}, ...row.map((content, index) => (index ? cell("td", content) : cell("th", content, "row")))),
  );
  const titles = make("tr", {}, ...head.map((title) => cell("th", title, "col")));
  const name = make("caption", { class: "visually-hidden" }, caption);
  return make("table", {}, name, make("thead", {}, titles), make("tbody", {}, ...body));
}

/** An estimate as a chart and a number; a dash where there is none. */
function estimate(interval, name, { format = percent, ...options } = {}) {
  if (!interval || interval.value === null) return make("span", { class: "note" }, "–");
  const hasRange = interval.low !== null && interval.high !== null;
  const range = hasRange ? `${format(interval.low)} to ${format(interval.high)}` : "";
  const label = `${name}: ${format(interval.value)}${range && `, ${range}`}`;
  const number = make("span", { class: "number", title: range }, format(interval.value));
  const rest = interval.count === undefined ? range : `n ${interval.count}`;
  const size = make("span", { class: "note" }, rest);
  return make("span", { class: "estimate" }, intervalChart(interval, label, options), number, size);
}

function tile(number, word) {
  return make("div", { class: "tile" }, make("b", {}, number), make("span", {}, word));
}

function showProgress({ progress, queue }) {
  const { wanted, done } = progress;
  const tiles = [
    tile(`${whole(done)} of ${whole(wanted)}`, "labels"),
    tile(percent(wanted ? Math.min(1, done / wanted) : null), "done"),
    tile(whole(queue.open), "tasks open"),
    tile(whole(queue.leased), "held now"),
  ];
  if (queue.declined_by_all) tiles.push(tile(whole(queue.declined_by_all), "declined by all"));
  byId("tiles").replaceChildren(...tiles);
  const rows = queue.rounds.map((round) => {
    const parts = [
      ["done", round.done],
      ["work", round.in_work],
      ["started", round.started],
      ["waiting", round.waiting],
    ];
    const label = `${round.done} done, ${round.in_work} in work, ${round.started} started, ${round.waiting} waiting`;
    const numbers = [round.tasks, ...parts.map(([, number]) => number), round.missing];
    return [`Round ${round.round}`, stackChart(parts, label), ...numbers.map(whole)];
  });
  const head = ["Round", "State", "Tasks", "Done", "In work", "Started", "Waiting", "Labels missing"];
  byId("rounds").replaceChildren(...(rows.length ? [table("Tasks by round", head, rows)] : []));
}

function showPace(pace) {
  // One bar says nothing that the tiles do not.
  byId("pace-section").hidden = !(pace?.length > 1);
  const bars = (pace ?? []).map(({ hour, labels }) => [String(new Date(hour).getHours()).padStart(2, "0"), labels]);
  byId("pace").replaceChildren(
    barChart(bars, `Labels an hour: ${bars.map(([hour, number]) => `${hour} h ${number}`).join(", ")}`),
  );
}

function showAgreement(agreement) {
  byId("agreement-note").textContent = agreement.note ?? "";
  const scale = { format: decimals, least: -1, reference: 0 };
  const rows = [
    ["Percent agreement", estimate(agreement.percent, "Percent agreement")],
    ["Fleiss’ kappa", estimate(agreement.fleiss, "Fleiss’ kappa", scale)],
    ["Krippendorff’s alpha", estimate(agreement.krippendorff, "Krippendorff’s alpha", scale)],
  ];
  byId("agreement").replaceChildren(table("Agreement of all annotators", ["Measure", "Value"], rows));
  const pairs = agreement.cohen.map((pair) => [
    make("span", {}, foreign("span", pair.first), " and ", foreign("span", pair.second)),
    estimate(pair, "Cohen’s kappa", scale),
  ]);
  const shown = pairs.slice(0, MOST_PAIRS);
  const parts = pairs.length ? [table("Cohen’s kappa by pair", ["Pair", "Cohen’s kappa"], shown)] : [];
  if (pairs.length > shown.length)
    parts.push(make("p", { class: "note" }, `and ${pairs.length - shown.length} more pairs`));
  byId("cohen").replaceChildren(...parts);
}

function showAnnotators(annotators) {
  const head = ["Name", "Labels", "An hour", "Median", "Left chosen", "Consistency", "Gold", "Skips", "Flags", "Last"];
  const rows = annotators.map((annotator) => [
    make(
      "span",
      {},
      foreign("span", annotator.name),
      annotator.kind === "human" ? "" : make("span", { class: "note" }, ` ${annotator.kind}`),
    ),
    whole(annotator.labels),
    whole(annotator.per_hour),
    annotator.median_seconds === null ? "–" : duration(annotator.median_seconds),
    estimate(annotator.left_share, "Left chosen", { reference: 0.5 }),
    estimate(annotator.self_consistency, "Consistency"),
    estimate(annotator.gold_accuracy, "Gold questions"),
    whole(annotator.skips),
    whole(annotator.flags),
    time(annotator.last),
  ]);
  const none = make("p", { class: "note" }, "Nobody has labelled yet.");
  byId("annotators").replaceChildren(rows.length ? table("Annotators", head, rows) : none);
}

function entry(item, ...content) {
  const head = make("p", { class: "note" }, foreign("b", item.annotator), " ", time(item.at));
  return make("article", {}, head, ...content, item.prompt ? foreign("p", item.prompt, { class: "about" }) : null);
}

/** The response that a flag is about: its text where it is sent, else its place on the screen. */
function flagged(flag) {
  if (flag.response) return foreign("span", flag.response);
  return make(
    "span",
    {},
    flag.position === null ? "the task as a whole" : `the response shown at place ${flag.position + 1}`,
  );
}

function showEntries(summary) {
  const flags = summary.flags.map((flag) => {
    const kind = make("span", { class: "kind" }, flag.kind.replace("_", " "));
    return entry(flag, make("p", {}, kind, " ", flagged(flag)));
  });
  const comments = summary.comments.map((item) => entry(item, foreign("p", item.text)));
  for (const [id, made] of [
    ["flag-list", flags],
    ["comment-list", comments],
  ]) {
    byId(id).replaceChildren(...(made.length ? made : [make("p", { class: "note" }, "None.")]));
  }
}

async function refresh() {
  byId("refresh").disabled = true;
  try {
    const [me, summary] = await Promise.all([request("GET", "/api/me"), request("GET", "/api/admin/summary")]);
    byId("store").textContent = me.store;
    showProgress(summary);
    showPace(summary.pace);
    showAgreement(summary.agreement);
    showAnnotators(summary.annotators);
    showEntries(summary);
    const people = count(summary.annotators.length, "annotator");
    byId("made").replaceChildren(`${people}, as of ${new Date().toLocaleTimeString("en-GB")}`);
    showNotice("");
  } catch (error) {
    if (!(error instanceof RequestError)) throw error;
    const text = error.status === 401 ? "This link is not valid any more." : error.message;
    showNotice(text, "Try again", refresh);
  } finally {
    byId("refresh").disabled = false;
  }
}

/** Downloads an export; a refusal is shown instead of saved. */
async function download(event) {
  event.preventDefault();
  const query = new URLSearchParams({ format: byId("format").value, rule: byId("rule").value });
  try {
    const response = await fetch(`/api/admin/export?${query}`, { headers: { "X-RLHF": "1" } });
    if (!response.ok) {
      const text = await response.text();
      throw new RequestError(response.status, text.startsWith("{") ? JSON.parse(text).error : text);
    }
    const name = /filename="?([^";]+)"?/.exec(response.headers.get("Content-Disposition") ?? "")?.[1] ?? "labels.zip";
    const address = URL.createObjectURL(await response.blob());
    make("a", { href: address, download: name }).click();
    URL.revokeObjectURL(address);
    announce("Downloaded.");
  } catch (error) {
    showNotice(error instanceof RequestError ? error.message : "The server cannot be reached.", "OK", () =>
      showNotice(""),
    );
  }
}

byId("refresh").addEventListener("click", refresh);
byId("export").addEventListener("submit", download);
setInterval(() => document.visibilityState === "visible" && refresh(), REFRESH_MS);
refresh();
