// What two texts have in common, word by word: a longest common subsequence.

// The largest table of the dynamic programme; longer texts are compared by lines first.
const MAX_TABLE = 4_000_000;

/**
 * The parts of two texts, each `{text, same}`, and the share of their words that is common.
 * `coarse` says that some part was too long to compare.
 */
export function difference(left, right) {
  const state = { left: [], right: [], coarse: false };
  compareWords(left, right, state, true);
  joinGaps(state.left);
  joinGaps(state.right);
  const size = (parts, only) =>
    parts.reduce((sum, part) => sum + (part.same || !only ? part.text.trim().length : 0), 0);
  const all = size(state.left, false) + size(state.right, false);
  const common = all ? (size(state.left, true) + size(state.right, true)) / all : 1;
  return { left: state.left, right: state.right, common, coarse: state.coarse };
}

function words(text) {
  return text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? [];
}

function lines(text) {
  return text.match(/[^\n]*\n|[^\n]+/g) ?? [];
}

function compareWords(left, right, state, mayBeLong) {
  const pairs = matching(words(left), words(right));
  if (pairs) {
    for (const [first, second, same] of pairs) add(state, first.join(""), second.join(""), same);
  } else if (mayBeLong) compareLines(left, right, state);
  else {
    state.coarse = true;
    add(state, left, right, false);
  }
}

function compareLines(left, right, state) {
  const pairs = matching(lines(left), lines(right));
  if (!pairs) {
    state.coarse = true;
    add(state, left, right, false);
    return;
  }
  for (const [first, second, same] of pairs) {
    if (same) add(state, first.join(""), second.join(""), true);
    else compareWords(first.join(""), second.join(""), state, false);
  }
}

function add(state, left, right, same) {
  for (const [parts, text] of [
    [state.left, left],
    [state.right, right],
  ]) {
    if (!text) continue;
    if (parts.at(-1)?.same === same) parts.at(-1).text += text;
    else parts.push({ text, same });
  }
}

/** White space between two differences belongs to them: it reads as one. */
function joinGaps(parts) {
  for (let index = parts.length - 2; index > 0; index -= 1) {
    if (!parts[index].same || parts[index].text.trim()) continue;
    parts[index - 1].text += parts[index].text + parts[index + 1].text;
    parts.splice(index, 2);
  }
}

/** Runs `[of left, of right, same]` of two lists of tokens; null when the table would be too large. */
export function matching(left, right) {
  let head = 0;
  while (head < left.length && head < right.length && left[head] === right[head]) head += 1;
  let tail = 0;
  const shorter = Math.min(left.length, right.length) - head;
  while (tail < shorter && left[left.length - 1 - tail] === right[right.length - 1 - tail]) tail += 1;
  const first = left.slice(head, left.length - tail);
  const second = right.slice(head, right.length - tail);
  if ((first.length + 1) * (second.length + 1) > MAX_TABLE) return null;
  return [
    [left.slice(0, head), right.slice(0, head), true],
    ...walk(first, second),
    [left.slice(left.length - tail), right.slice(right.length - tail), true],
  ];
}

/** Follows the table of lengths of common subsequences from its beginning. */
function walk(left, right) {
  const width = right.length + 1;
  const lengths = new Uint16Array((left.length + 1) * width);
  for (let row = left.length - 1; row >= 0; row -= 1) {
    for (let column = right.length - 1; column >= 0; column -= 1) {
      const place = row * width + column;
      lengths[place] =
        left[row] === right[column]
          ? lengths[place + width + 1] + 1
          : Math.max(lengths[place + width], lengths[place + 1]);
    }
  }
  const runs = [];
  let row = 0;
  let column = 0;
  while (row < left.length || column < right.length) {
    if (row < left.length && column < right.length && left[row] === right[column]) {
      runs.push([[left[row]], [right[column]], true]);
      row += 1;
      column += 1;
    } else if (
      column === right.length ||
      (row < left.length && lengths[(row + 1) * width + column] >= lengths[row * width + column + 1])
    ) {
      runs.push([[left[row]], [], false]);
      row += 1;
    } else {
      runs.push([[], [right[column]], false]);
      column += 1;
    }
  }
  return runs;
}
