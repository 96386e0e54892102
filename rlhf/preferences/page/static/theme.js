// Runs before the page is drawn, so that a chosen theme does not flash.
try {
  const chosen = JSON.parse(localStorage.getItem("rlhf-settings") ?? "{}").theme;
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is blocked or holds something else: the system's theme it is.
}
