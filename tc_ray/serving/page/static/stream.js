// Requests to the server of this page: JSON answers and server-sent events, with errors that say what to do.
// Invariant: a stream either yields all its chunks up to [DONE] or throws; a cut is never taken for an end.

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

// not relative to the page's own address, in which a user may have written a name and a password
const BASE = location.origin + location.pathname;

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// credentials are left out: a password typed for the page itself is no bearer key
async function send(path, key, options) {
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
  if (response.ok) return response;
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // no envelope: something between this page and the server answered
  }
  if (response.status === 401) {
    message = key ? "The server does not know this API key." : "The server asks for a key: enter it under API key.";
  }
  const seconds = response.headers.get("Retry-After");
  if (seconds && response.status !== 401) message += ` Try again in ${seconds} s.`;
  throw new ServerError(message, response.status);
}

export async function models(key) {
  const response = await send("v1/models", key, { headers: headers(key) });
  return (await response.json()).data;
}

export async function* chunks(path, body, key, signal) {
  const response = await send(path, key, {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  try {
    while (true) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ServerError("The connection broke: this answer is not complete.");
      }
      if (part.done) throw new ServerError("The stream ended early: this answer is not complete.");
      held += decoder.decode(part.value, { stream: true });
      const events = held.split(/\r?\n\r?\n/);
      held = events.pop();
      for (const event of events) {
        const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
        if (!data) continue;
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(chunk.error.message);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
