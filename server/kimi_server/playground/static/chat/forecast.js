// What a message will cost, before it is sent: its prompt's tokens, whether they fit, and what should be cached.

import { count, duration, rough, utf8Bytes } from "../lib/units.js";
import { prefixOf } from "./conversation.js";

const SHORT = 1000; // tokens: nobody needs to be told
const FRAME = 8; // tokens that a chat template adds to a message, about

/** {tokens, cached, seconds, most}: of the prompt; `seconds` is null where nothing was measured. */
export function forecast({ conversation, documents, question, model, measures, most }) {
  const ratio = measures.bytesPerToken(model);
  const estimate = (bytes) => Math.ceil(bytes / ratio);
  const size = (one) => one.tokens ?? estimate(one.bytes);
  const { settings, turns } = conversation;
  let [tokens, cached] = [settings.system ? estimate(utf8Bytes(settings.system)) : 0, 0];
  for (const turn of turns) {
    if (turn.usage && turn.model === model && turn.system === settings.system) {
      tokens = cached = turn.usage.prompt_tokens + turn.usage.completion_tokens;
    } else {
      tokens +=
        turn.documents.reduce((sum, one) => sum + size(one), 0) +
        estimate(utf8Bytes(turn.question + turn.answer)) +
        FRAME;
    }
  }
  const attached = documents.reduce((sum, one) => sum + size(one), 0);
  const known = measures.prefix(model, prefixOf(conversation, documents));
  if (!turns.length && (known.cold ?? known.warm) !== undefined) cached = attached;
  tokens += attached + estimate(utf8Bytes(question)) + FRAME;
  return { tokens, cached, most, seconds: measures.speed(model)?.seconds(tokens, cached) ?? null };
}

/** {text, fits}: one line for the reader, empty for a short prompt. */
export function tell({ tokens, cached, most, seconds }) {
  if (most && tokens > most) {
    const limit = `the model reads at most ${count(most)}`;
    return { text: `About ${rough(tokens)} tokens, and ${limit}: remove a document, or split it.`, fits: false };
  }
  if (tokens < SHORT) return { text: "", fits: true };
  const parts = [`About ${rough(tokens)} tokens${most ? ` of ${count(most)}: fits` : ""}`];
  if (cached) parts.push(`about ${rough(cached)} should be cached`);
  if (seconds !== null && seconds >= 1) parts.push(`first token in about ${duration(seconds)}`);
  return { text: `${parts.join(", ")}.`, fits: true };
}
