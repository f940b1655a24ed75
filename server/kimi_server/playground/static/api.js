// The gateway's API: JSON, and a chat answer as a stream of chunks.

const API = new URL("../v1/", import.meta.url);

/** What went wrong, in one sentence that says what to do. `status` is HTTP's, or 0 where there was no reply. */
export class Problem extends Error {
  constructor(sentence, status = 0) {
    super(sentence);
    this.status = status;
  }
}

/** GET a route under /v1/ as JSON; throws Problem. */
export async function read(path, key) {
  const reply = await send(path, { headers: authorization(key) });
  return reply.json();
}

/** POST a streaming chat request; returns the reply once its headers are here; throws Problem. */
export function ask(body, { key, session, signal }) {
  // Usage with every chunk, so that an answer that is stopped has its figures, too.
  const usage = { include_usage: true, continuous_usage_stats: true };
  return send("chat/completions", {
    method: "POST",
    headers: { ...authorization(key), "Content-Type": "application/json", "X-Session-ID": session },
    // As a Blob: a long string would be copied to the network on this thread, which holds up the page.
    body: new Blob([JSON.stringify({ ...body, stream: true, stream_options: usage })]),
    signal,
  });
}

/** The chunks of a streamed reply; throws Problem where the server reports an error or the stream breaks off. */
export async function* chunks(reply) {
  // Not through a TextDecoderStream: it drops what it holds when the connection breaks.
  const reader = reply.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // a comment that keeps the connection alive, or an event's name
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Problem(`The server ended this answer (${reason(chunk)}): retry to ask again.`);
        yield chunk;
      }
    }
  } catch (error) {
    if (error instanceof Problem || error.name === "AbortError") throw error;
    throw new Problem("The connection broke off before the answer was complete: retry to ask again.");
  } finally {
    reader.cancel().catch(() => {}); // a stream that already failed has nothing left to cancel
  }
  throw new Problem("The stream ended before the answer was complete: retry to ask again.");
}

async function send(path, options) {
  let reply;
  try {
    reply = await fetch(new URL(path, API), { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The gateway cannot be reached: check that it runs and that you are online, then retry.");
  }
  if (reply.ok) return reply;
  throw new Problem(sentence(reply, reason(await reply.json().catch(() => ({})))), reply.status);
}

function authorization(key) {
  if (!key) return {};
  if (!/^[\x21-\x7e]+$/.test(key)) {
    throw new Problem("The API key has a space or a letter that keys cannot have: enter it again.", 401);
  }
  return { Authorization: `Bearer ${key}` };
}

/** The server's own words in an error body, without a full stop. */
function reason(body) {
  const words = body.error?.message ?? body.error ?? body.message ?? body.detail;
  return typeof words === "string" ? words.trim().replace(/[.:]$/, "") : "";
}

function sentence(reply, words) {
  const told = words && ` (${words})`;
  const after = Number(reply.headers.get("Retry-After"));
  const when = after > 0 ? `retry in ${Math.ceil(after)} s` : "retry in a while";
  switch (reply.status) {
    case 401:
      return "The gateway asks for a valid API key: enter one under “API key”, then retry.";
    case 413:
      return `This is more than the gateway takes in one request${told}: attach a shorter document.`;
    case 429:
      return `Too many requests for now${told}: ${when}.`;
    case 503:
      return `The server has no room for this request now${told}: ${when}.`;
  }
  if (reply.status >= 500) return `The server failed with status ${reply.status}${told}: ${when}.`;
  return `The server refused this request with status ${reply.status}${told}: edit it, or start a new chat.`;
}
