// Small helpers that build DOM nodes. Text always becomes text nodes: nothing here parses HTML.

/** An element with a class, attributes and children; strings among the children become text nodes. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** The element of the page with that id. */
export function byId(id) {
  return document.getElementById(id);
}

/** Shows or hides an element. */
export function show(element, visible) {
  element.hidden = !visible;
}

/** Says something to screen readers; the text is replaced so that the same words twice are heard twice. */
export function announce(text) {
  const region = byId("live");
  region.textContent = "";
  requestAnimationFrame(() => {
    region.textContent = text;
  });
}

/** A number of seconds as people say it: `8 s`, `2 min`. */
export function duration(seconds) {
  if (seconds < 10) return `${Math.round(seconds * 10) / 10} s`;
  return seconds < 100 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`;
}

/** `1 task`, `2 tasks`. */
export function count(number, word) {
  return `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
}
