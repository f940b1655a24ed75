// What went wrong, in one sentence that says what to do. The server's own words are read for figures, and never shown.

import { count } from "./units.js";

// What vLLM and the gateway say of a prompt that is too long, for the model or for a key.
const TOO_LONG = /context length|longest context|context of \d|maximum (?:model )?length/i;
const LIMIT =
  /(?:context(?: length)?|max_model_len|maximum model length|at most|limit of|longest)\D{0,24}?(\d[\d,_]*)/i;
const LENGTH =
  /(?:contains (at least )?|input length \(|prompt \(length |you requested |asks for about )(\d+)(?!\d| characters)/i;
const ANSWER_TOO_LONG = /max\w*_tokens=\d+ cannot be greater/i;
const REQUEST = /^[\w-]{1,80}$/;

/** `status` is HTTP's, or 0 where there was no reply. `tooLong`: of a prompt that is longer than the longest context,
 * {length, atLeast, limit} in tokens, each null where the server did not say it; else null. */
export class Problem extends Error {
  constructor(sentence, status = 0, tooLong = null) {
    super(sentence);
    Object.assign(this, { status, tooLong });
  }
}

/** The Problem that a refused request is, {status, headers}; `body` is its JSON. */
export function refusal(reply, body) {
  const said = words(body);
  return new Problem(sentence(reply, said), reply.status, lengths(reply, said));
}

function lengths({ status }, said) {
  if (status !== 400 || !TOO_LONG.test(said)) return null;
  const found = LENGTH.exec(said);
  return { length: found && Number(found[2]), atLeast: Boolean(found?.[1]), limit: limitIn(said) };
}

function limitIn(said) {
  return Number(LIMIT.exec(said)?.[1].replace(/\D/g, "")) || null;
}

function words(body) {
  const said = body?.error?.message ?? body?.error ?? body?.message ?? body?.detail;
  return typeof said === "string" ? said : "";
}

function sentence(reply, said) {
  const after = Number(reply.headers.get("Retry-After"));
  const when = after > 0 ? `retry in ${Math.ceil(after)} s` : "retry in a while";
  const limit = limitIn(said);
  const most = limit ? ` (${count(limit)} tokens)` : "";
  if (reply.status === 400 && ANSWER_TOO_LONG.test(said)) {
    return `The longest answer is more than the longest context${most}: lower “Longest answer” in the settings.`;
  }
  if (lengths(reply, said)) {
    return `This is longer than the longest context${most}: attach less, or start a new chat.`;
  }
  switch (reply.status) {
    case 401:
      return "The gateway asks for a valid API key: enter one under “Settings”, “API key”, then retry.";
    case 403:
      return "This API key is not allowed to do this: enter another under “Settings”, “API key”, then retry.";
    case 404:
      return "The gateway does not serve this model any more: reload the page, and choose another.";
    case 408:
      return "The upload took too long: retry, or attach less.";
    case 413:
      return "This is more than the gateway accepts in one request: attach a shorter document.";
    case 429:
      return `Too many requests: ${when}.`;
    case 503:
      return `The server has no capacity for this request now: ${when}.`;
    case 504:
      return `The server was silent for too long: ${when}.`;
  }
  if (reply.status >= 500) return `The server failed with status ${reply.status}: ${when}.${quoted(reply)}`;
  const remedy = "check the settings, or edit the question";
  return `The server did not accept this request (status ${reply.status}): ${remedy}.${quoted(reply)}`;
}

/** How whoever runs the gateway finds the request in its log. */
function quoted(reply) {
  const request = reply.headers.get("X-Request-Id") ?? "";
  return REQUEST.test(request) ? ` If this continues, report the request id ${request} to the operator.` : "";
}
