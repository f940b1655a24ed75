// What went wrong, in one sentence that says what to do. The server's own words are read for figures, and never shown.

import { count } from "./units.js";

const TOO_LONG = /context length|longest context|max_model_len|maximum (?:model )?length/i;
const LIMIT = /(?:context(?: length)?(?: is| of)?|max_model_len=?|at most|limit of|longest)\D{0,24}?(\d[\d,_]*)/i;
const REQUEST = /^[\w-]{1,80}$/;

/** `status` is HTTP's, or 0 where there was no reply. */
export class Problem extends Error {
  constructor(sentence, status = 0) {
    super(sentence);
    this.status = status;
  }
}

/** The Problem that a refused request is; `body` is its JSON. */
export function refusal(reply, body) {
  return new Problem(sentence(reply, words(body)), reply.status);
}

function words(body) {
  const said = body?.error?.message ?? body?.error ?? body?.message ?? body?.detail;
  return typeof said === "string" ? said : "";
}

function sentence(reply, said) {
  const after = Number(reply.headers.get("Retry-After"));
  const when = after > 0 ? `retry in ${Math.ceil(after)} s` : "retry in a while";
  const limit = Number(LIMIT.exec(said)?.[1].replace(/\D/g, ""));
  const most = limit > 0 ? ` (${count(limit)} tokens)` : "";
  if (reply.status === 400 && TOO_LONG.test(said)) {
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
