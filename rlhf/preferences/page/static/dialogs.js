// The guide and the settings.

import { byId, show } from "./dom.js";
import { fillKeys } from "./keys.js";
import { appendMarkdown } from "./markdown.js";
import { applyTheme, changeSetting, settings } from "./stored.js";

/** Opens a dialog unless one is open. */
export function openDialog(id) {
  if (!document.querySelector("dialog[open]")) byId(id).showModal();
}

/** Wires the dialogs; a click beside one closes it. */
export function prepareDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close();
    });
  }
  byId("theme").value = settings.theme;
  byId("theme").addEventListener("change", (event) => {
    changeSetting("theme", event.target.value);
    applyTheme();
  });
  for (const [id, name] of [
    ["auto-submit", "autoSubmit"],
    ["single-keys", "singleKeys"],
  ]) {
    byId(id).checked = settings[name];
    byId(id).addEventListener("change", (event) => changeSetting(name, event.target.checked));
  }
}

/** Fills the guide with the instructions of this labelling; when they are new here, waits until they were read. */
export async function offerInstructions(instructions) {
  const text = instructions ?? "";
  byId("instructions").replaceChildren();
  appendMarkdown(byId("instructions"), text);
  show(byId("instructions"), text !== "");
  const seen = `${text.length}:${checksum(text)}`;
  if (!text || settings.instructionsSeen === seen) return;
  fillKeys(null);
  openDialog("help");
  await new Promise((resolve) => byId("help").addEventListener("close", resolve, { once: true }));
  changeSetting("instructionsSeen", seen);
}

/** Tells texts apart; nothing depends on it but whether the guide opens by itself. */
function checksum(text) {
  let sum = 0;
  for (const character of text) sum = (Math.imul(sum, 31) + character.codePointAt(0)) | 0;
  return sum;
}
