// The gateway's API: JSON, a prompt's tokens, and a chat answer as a stream of chunks.

import { Problem, refusal } from "./problems.js";

const API = new URL("../../v1/", import.meta.url);
const COUNT_SECONDS = 60;

/** GET a route under /v1/ as JSON; throws Problem. */
export async function read(path, key) {
  const reply = await send(path, { headers: authorization(key) });
  return reply.json();
}

/** The tokens of a text as the server counts them; null where it does not say. */
export async function count(text, model, key) {
  const signal = AbortSignal.timeout(COUNT_SECONDS * 1000);
  try {
    const reply = await post("messages/count_tokens", { model, messages: [{ role: "user", content: text }] }, key, {
      signal,
    });
    const { input_tokens: tokens } = await reply.json();
    return Number.isInteger(tokens) && tokens > 0 ? tokens : null;
  } catch {
    return null; // an estimate stands in for it
  }
}

/** POST a streaming chat request; returns the reply once its headers are here; throws Problem. */
export function ask(body, { key, session, signal }) {
  // Usage with every chunk, so that an answer that is stopped has its figures, too.
  const usage = { include_usage: true, continuous_usage_stats: true };
  const streamed = { ...body, stream: true, stream_options: usage };
  return post("chat/completions", streamed, key, { signal, headers: { "X-Session-ID": session } });
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
        if (chunk.error) throw new Problem("The server stopped this answer early: retry to ask again.");
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

function post(path, body, key, { headers, ...options }) {
  return send(path, {
    method: "POST",
    headers: { ...authorization(key), "Content-Type": "application/json", ...headers },
    // As a Blob: a long string would be copied to the network on this thread, which holds up the page.
    body: new Blob([JSON.stringify(body)]),
    ...options,
  });
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
  throw refusal(reply, await reply.json().catch(() => ({})));
}

function authorization(key) {
  if (!key) return {};
  if (!/^[\x21-\x7e]+$/.test(key)) {
    throw new Problem("The API key has a space or another character that keys cannot have: enter it again.", 401);
  }
  return { Authorization: `Bearer ${key}` };
}
