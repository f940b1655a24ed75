// The gateway's API: JSON, a prompt's tokens, and a chat answer as a stream of chunks.

import { Problem, refusal } from "./problems.js";

const API = new URL("../../v1/", import.meta.url);
const COUNT_SECONDS = 60;
const FEWEST_CHARACTERS = 256; // of a sample

/** GET a route under /v1/ as JSON; throws Problem. */
export async function read(path, key) {
  return json(await send(path, { headers: authorization(key) }));
}

/** What the server says of a text: {tokens}; or, of one longer than the longest context, {over: {least, about}, limit},
 * all in tokens. vLLM counts no further than its limit: `about` is by a sample, null without one. `most`: the longest
 * context, for a server that does not say its limit. Throws Problem. */
export async function count(text, model, key, most) {
  try {
    return { tokens: await counted(text, model, key) };
  } catch (error) {
    if (!error.tooLong) throw error;
    const { length, atLeast, limit } = error.tooLong;
    const known = limit ?? most ?? 0;
    const least = Math.max(length ?? 0, known + 1);
    const about = length && !atLeast ? length : await sampled(text, known, model, key);
    return { over: { least, about: about && Math.max(least, about) }, limit };
  }
}

async function counted(text, model, key) {
  const signal = AbortSignal.timeout(COUNT_SECONDS * 1000);
  const asked = { model, messages: [{ role: "user", content: text }] };
  const { input_tokens: tokens } = await json(await post("messages/count_tokens", asked, key, { signal }));
  if (Number.isInteger(tokens) && tokens > 0) return tokens;
  throw new Problem("The server did not count this text: retry in a while.");
}

/** About the tokens of a text, by those of its beginning; null where the server counts that no more than the whole. */
async function sampled(text, limit, model, key) {
  for (let size = limit / 2; size >= FEWEST_CHARACTERS; size /= 4) {
    const sample = text.slice(0, size).replace(/[\ud800-\udbff]$/, ""); // no half of a character
    try {
      return Math.round((await counted(sample, model, key)) * (text.length / sample.length));
    } catch (error) {
      if (!error.tooLong) return null;
    }
  }
  return null;
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
        if (chunk.error) throw stopped(chunk);
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

/** The Problem that an error within a stream is. What the request itself is to blame for, a retry will not mend. */
function stopped(chunk) {
  const status = Number(chunk.error.code);
  if (status >= 400 && status < 500) return refusal({ status, headers: new Headers() }, chunk);
  return new Problem("The server stopped this answer early: retry to ask again.");
}

async function json(reply) {
  try {
    return await reply.json();
  } catch {
    throw new Problem("The answer is not the gateway's: check the address of this page, then retry.");
  }
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
