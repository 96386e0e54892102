// What the browser keeps: settings (for good), and drafts and unsent labels (while the tab is open).

const SETTINGS = "rlhf-settings";
const DEFAULTS = { theme: "auto", autoSubmit: false, singleKeys: true, rendered: true, instructionsSeen: "" };

function read(storage, key) {
  try {
    return JSON.parse(storage().getItem(key) ?? "null");
  } catch {
    return null;
  }
}

function write(storage, key, value) {
  try {
    if (value === null) storage().removeItem(key);
    else storage().setItem(key, JSON.stringify(value));
  } catch {
    // Storage is full or blocked: the page works without it, until it is reloaded.
  }
}

const lasting = () => window.localStorage;
const passing = () => window.sessionStorage;

export const settings = { ...DEFAULTS, ...read(lasting, SETTINGS) };

/** Changes one setting, for this visit and the next ones. */
export function changeSetting(name, value) {
  settings[name] = value;
  write(lasting, SETTINGS, settings);
}

/** Follows the theme setting. */
export function applyTheme() {
  if (settings.theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = settings.theme;
}

/** The label that was sent and not acknowledged yet; null when there is none. */
export function unsent() {
  return read(passing, "rlhf-unsent");
}

export function keepUnsent(label) {
  write(passing, "rlhf-unsent", label);
}

/** What was entered for an assignment before a reload; null when nothing was. */
export function draftOf({ assignment, given }) {
  const draft = read(passing, "rlhf-draft");
  // The number alone could be that of a task of another store, which was served at this address before.
  return draft?.assignment === assignment && draft.given === given ? draft : null;
}

export function keepDraft(draft) {
  write(passing, "rlhf-draft", draft);
}
