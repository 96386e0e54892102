// Requests to the server. Those that fail for a passing reason are sent again until they arrive.

const TIMEOUT_MS = 20_000;
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 30_000;

/** An answer of the server that is no success; `status` 0 means that none came. */
export class RequestError extends Error {
  constructor(status, message, reason = "") {
    super(message);
    this.status = status;
    this.reason = reason;
  }

  /** Whether the same request may succeed later. */
  get passing() {
    return this.status === 0 || this.status === 429 || this.status >= 500;
  }
}

/** Sends one request; resolves to the JSON that came back, or throws `RequestError`. */
export async function request(method, path, body = undefined, options = {}) {
  const headers = { "X-RLHF": "1" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "same-origin",
      signal: AbortSignal.timeout(TIMEOUT_MS),
      ...options,
    });
  } catch {
    throw new RequestError(0, "The server cannot be reached.");
  }
  const text = await response.text().catch(() => null);
  if (text === null) throw new RequestError(0, "The connection broke.");
  const content = parsed(text);
  if (response.ok && content !== undefined) return content;
  if (response.ok) throw new RequestError(0, "The server sent half an answer.");
  throw new RequestError(response.status, content?.error ?? text, content?.reason ?? "");
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

let wake = () => {};

/** Ends the current wait between two attempts. */
export function tryNow() {
  wake();
}

window.addEventListener("online", tryNow);

/**
 * Sends a request until it arrives, with waits that double. `waiting(error)` is called before each wait with what
 * went wrong, and `waiting(null)` when the server answers again.
 */
export async function persist(method, path, body, waiting) {
  let wait = FIRST_WAIT_MS;
  let waited = false;
  for (;;) {
    try {
      const result = await request(method, path, body);
      if (waited) waiting(null);
      return result;
    } catch (error) {
      if (!(error instanceof RequestError) || !error.passing) {
        if (waited) waiting(null);
        throw error;
      }
      waiting(error);
    }
    waited = true;
    await pause(wait);
    wait = Math.min(2 * wait, LONGEST_WAIT_MS);
  }
}

function pause(milliseconds) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    wake = () => {
      clearTimeout(timer);
      resolve();
    };
  });
}

/** A name for one submission, the same when it is sent again. */
export function newToken() {
  // `crypto.randomUUID` exists only on secure origins; a page served to a local network is none.
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
