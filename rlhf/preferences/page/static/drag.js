// Dragging chips between tiers, with pointer events, so that mouse, pen and touch are one.

const START_PIXELS = 6;

/** Lets the chips of a ranking be dragged; `started(position)` is called when a drag begins. */
export function makeDraggable(ranking, started) {
  for (const chip of ranking.chips) {
    chip.addEventListener("pointerdown", (event) => {
      if (event.button === 0) follow(ranking, chip, event, started);
    });
  }
}

/** Follows one pointer from its press to its release. */
function follow(ranking, chip, press, started) {
  const position = Number(chip.dataset.position);
  let shadow = null;
  let target = null;
  const move = (event) => {
    if (event.pointerId !== press.pointerId) return;
    if (!shadow && Math.hypot(event.clientX - press.clientX, event.clientY - press.clientY) < START_PIXELS) return;
    if (!shadow) {
      started(position);
      shadow = shadowOf(chip);
      chip.classList.add("dragged");
    }
    shadow.style.transform = `translate(${event.clientX - press.clientX}px, ${event.clientY - press.clientY}px)`;
    target = targetAt(ranking, chip, event.clientX, event.clientY);
    showTarget(ranking, target);
  };
  const end = (event) => {
    if (event.pointerId !== press.pointerId) return;
    for (const [kind, listener] of listeners) window.removeEventListener(kind, listener, true);
    if (!shadow) return;
    shadow.remove();
    chip.classList.remove("dragged");
    showTarget(ranking, null);
    // The click that follows a drag is no tap.
    window.addEventListener("click", stop, { capture: true, once: true });
    setTimeout(() => window.removeEventListener("click", stop, { capture: true }), 0);
    if (event.type === "pointerup" && target) ranking.place(position, target.index, target.join);
  };
  const escape = (event) => {
    if (event.key !== "Escape") return;
    target = null;
    end({ pointerId: press.pointerId, type: "pointercancel" });
  };
  const listeners = [
    ["pointermove", move],
    ["pointerup", end],
    ["pointercancel", end],
    ["keydown", escape],
  ];
  for (const [kind, listener] of listeners) window.addEventListener(kind, listener, true);
}

function stop(event) {
  event.stopPropagation();
  event.preventDefault();
}

/** A copy of the chip that goes with the pointer. */
function shadowOf(chip) {
  const box = chip.getBoundingClientRect();
  const shadow = chip.cloneNode(true);
  shadow.classList.add("shadow");
  shadow.setAttribute("aria-hidden", "true");
  shadow.tabIndex = -1;
  Object.assign(shadow.style, { left: `${box.left}px`, top: `${box.top}px`, width: `${box.width}px` });
  document.body.append(shadow);
  return shadow;
}

function inside(box, x, y) {
  return x >= box.left && x <= box.right && y >= box.top && y <= box.bottom;
}

/**
 * Where a chip would go: `{index, join}`; index null is the tray. The middle of a tier joins it, its edges and
 * the gaps beside it make a tier of its own.
 */
function targetAt(ranking, chip, x, y) {
  if (inside(ranking.tray.getBoundingClientRect(), x, y)) return { index: null, join: false };
  const tiers = [...ranking.board.children];
  if (tiers.length === 0) return { index: 0, join: false };
  const boxes = tiers.map((tier) => tier.getBoundingClientRect());
  const away = (box) => Math.hypot(Math.max(box.left - x, 0, x - box.right), Math.max(box.top - y, 0, y - box.bottom));
  const index = boxes.reduce((best, box, other) => (away(box) < away(boxes[best]) ? other : best), 0);
  const box = boxes[index];
  const isRow = getComputedStyle(ranking.board).flexDirection.startsWith("row");
  const share = isRow ? (x - box.left) / box.width : (y - box.top) / box.height;
  const isOwn = tiers[index].contains(chip) && tiers[index].querySelectorAll(".chip").length === 1;
  if (share > 0.25 && share < 0.75 && !isOwn) return { index, join: true };
  return { index: share < 0.5 ? index : index + 1, join: false };
}

function showTarget(ranking, target) {
  ranking.tray.classList.toggle("target", target?.index === null);
  [...ranking.board.children].forEach((tier, index, tiers) => {
    tier.classList.toggle("joined", target?.join === true && target.index === index);
    tier.classList.toggle("before", target?.join === false && target.index === index);
    const isLast = index === tiers.length - 1;
    tier.classList.toggle("after", target?.join === false && isLast && target.index === tiers.length);
  });
}
