// What a message will cost, before it is sent: its prompt's tokens, whether they fit, and what should be cached.

import { count, duration, rough, utf8Bytes } from "../lib/units.js";
import { prefixOf } from "./conversation.js";

const SHORT = 1000; // tokens: nobody needs to be told
const FRAME = { tokens: 8, least: 0, bound: 64, atLeast: false }; // what a chat template adds to a message
const KEPT = 0.95; // of the room that is left for a document that is cut: an answer needs some, too

export const [FITS, TOO_LONG, UNKNOWN] = ["fits", "too long", "unknown"];

/** {tokens, cached, seconds, most, verdict, least, atLeast, largest, others, later}: of the prompt. `seconds` is null
 * where nothing was measured; `least`: tokens that are certain; `atLeast`: nobody knows how many more than those;
 * `largest` is the longest of `documents`, {name, pages, tokens}, beside `others`; `later`: turns stand before it. The
 * verdict is FITS or TOO_LONG only where the server counted enough to be sure. */
export function forecast({ conversation, documents, question, model, measures, most }) {
  const { settings, turns } = conversation;
  const sized = documents.map((one) => ({ ...one, ...sizeOf(one, model, measures) }));
  const text = (written) => {
    const bytes = utf8Bytes(written);
    return { ...EMPTY, tokens: Math.ceil(bytes / measures.bytesPerToken(model)), bound: bytes };
  };
  let [before, cached] = [settings.system ? text(settings.system) : EMPTY, 0];
  for (const turn of turns) {
    if (turn.usage && turn.model === model && turn.system === settings.system) {
      cached = turn.usage.prompt_tokens + turn.usage.completion_tokens;
      before = { ...EMPTY, tokens: cached, least: cached, bound: cached };
    } else {
      const attached = turn.documents.map((one) => sizeOf(one, model, measures));
      before = [before, ...attached, text(turn.question + turn.answer), FRAME].reduce(add);
    }
  }
  const attached = sized.reduce(add, EMPTY);
  const known = measures.prefix(model, prefixOf(conversation, documents));
  if (!turns.length && (known.cold ?? known.warm) !== undefined) cached = attached.tokens;
  const { tokens, least, bound, atLeast } = [before, attached, text(question), FRAME].reduce(add);
  let verdict = UNKNOWN;
  if (most && least >= most) verdict = TOO_LONG;
  else if (most && bound < most) verdict = FITS;
  const seconds = measures.speed(model)?.seconds(tokens, cached) ?? null;
  const [largest] = sized.toSorted((one, other) => other.tokens - one.tokens);
  const beside = { largest: largest ?? null, others: documents.length - 1, later: turns.length > 0 };
  return { tokens, cached, most, seconds, verdict, least, atLeast, ...beside };
}

const EMPTY = { tokens: 0, least: 0, bound: 0, atLeast: false };

const add = (one, other) => ({
  tokens: one.tokens + other.tokens,
  least: one.least + other.least,
  bound: one.bound + other.bound,
  atLeast: one.atLeast || other.atLeast,
});

/** Tokens of a document: about, at least and at most. A token has a byte or more. A long one, which the server shall
 * count, has no bound before it has. */
function sizeOf({ bytes, model: counted, tokens, over }, model, measures) {
  const estimate = Math.ceil(bytes / measures.bytesPerToken(model));
  if (counted === model && tokens) return { ...EMPTY, tokens, least: tokens, bound: tokens };
  if (counted === model && over) {
    const { least, about } = over;
    const known = about ?? Math.max(estimate, least);
    return { tokens: known, least, bound: Infinity, atLeast: !about && least >= estimate };
  }
  return { ...EMPTY, tokens: estimate, bound: measures.isLong(model, bytes) ? Infinity : bytes };
}

/** One line for the reader, empty for a short prompt. */
export function tell(expected) {
  const { tokens, cached, most, seconds, verdict } = expected;
  if (verdict === TOO_LONG) return capital(tooLong(expected));
  if (tokens < SHORT && (verdict === FITS || !most)) return "";
  if (mayBeTooLong(expected)) {
    return `About ${rough(tokens)} tokens by an estimate, and at most ${count(most)} fit: the server may refuse it.`;
  }
  const parts = [`About ${rough(tokens)} tokens`];
  if (most) parts[0] += verdict === FITS ? ` of ${count(most)}: fits` : ` of ${count(most)} by an estimate`;
  if (cached) parts.push(`about ${rough(cached)} should be cached`);
  if (seconds !== null && seconds >= 1) parts.push(`first token in about ${duration(seconds)}`);
  return parts.join(", ") + (most && verdict === UNKNOWN ? "; whether it fits is not known." : ".");
}

export const mayBeTooLong = ({ tokens, most, verdict }) => Boolean(most) && verdict !== FITS && tokens >= most;

/** Why a message of this forecast is not sent. */
export const notSent = (expected) => `Not sent, as ${tooLong(expected)}`;

/** Why the server refused a prompt. `refused`: {length, atLeast, limit} as it said them, null where it did not. */
export const notRead = (expected, refused) => capital(tooLong(expected, refused));

/** How long the prompt is, what the limit is and what to do: one sentence, without its capital. */
function tooLong(expected, { length, atLeast, limit } = { length: null, atLeast: false, limit: null }) {
  const most = limit ?? expected.most;
  const least = Math.max(length ?? 0, expected.least);
  let [tokens, known] = [null, ""];
  if (length !== null && !atLeast) [tokens, known] = [length, count(length)];
  // An estimate below what the server says is no news.
  else if (expected.tokens > Math.max(least - 1, most ?? 0) && !expected.atLeast) {
    tokens = expected.tokens;
    known = `about ${tokens > 1.05 * most ? rough(tokens) : count(tokens)}`;
  } else if (least > (most ?? 0)) known = `at least ${count(least)}`;
  let sentence = "the prompt is longer than the longest context";
  if (known) sentence = `the prompt has ${known} tokens, and ${most ? `at most ${count(most)}` : "fewer"} fit`;
  else if (most) sentence = `the prompt has more than the ${count(most)} tokens that fit`;
  return `${sentence}: ${remedy(expected, most, tokens)}.`;
}

/** `tokens` of the prompt; null where they are not known. */
function remedy({ largest, others, later, tokens: estimated }, most, tokens) {
  if (!largest) return later ? "start a new chat" : "shorten the question";
  const remove = others ? "remove a document" : "remove the document";
  const size = Math.round(largest.tokens * (tokens / estimated));
  const room = tokens && most ? Math.floor(KEPT * (most - (tokens - size))) : 0;
  if (room > 0 && room < size) {
    const { pages } = largest;
    const first = Math.floor(pages * (room / size));
    const whose = others ? ` of ${largest.name}` : "";
    if (first) return `${remove}, or keep the first ${first} of ${pages} pages${whose}`;
    if (!pages) return `${remove}, or keep the first ${rough(room)} of about ${rough(size)} tokens${whose}`;
  }
  return later ? `${remove}, or start a new chat` : `${remove}, or keep a part of it`;
}

const capital = (sentence) => sentence[0].toUpperCase() + sentence.slice(1);
