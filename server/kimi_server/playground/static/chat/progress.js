// How far a long prompt is read. vLLM counts a prompt when it is through, so this is an estimate, and says so.

import { duration, rough } from "../lib/units.js";

const LONG_SECONDS = 4; // below, a bar would come and go

/** {text, share}: `share` from 0 to 1, null where it is not known. `begun`: the server's header has come. */
export function progress({ elapsed, begun, reading, expected, speed }) {
  const waited = elapsed < 2 ? "" : `, ${Math.round(elapsed)} s`;
  const { tokens, cached } = expected;
  if (!begun)
    return {
      text: tokens < 5000 ? `Waiting for the first token${waited}` : `Sent; waiting for the server to begin${waited}`,
      share: null,
    };
  if (!speed) {
    if (tokens < 5000) return { text: `Waiting for the first token${waited}`, share: null };
    return {
      text: `Reading about ${rough(tokens)} tokens${waited}; how fast this model reads is not known yet`,
      share: null,
    };
  }
  const all = speed.seconds(tokens, cached);
  if (all < LONG_SECONDS) return { text: `Waiting for the first token${waited}`, share: null };
  const read = Math.min(speed.read(reading, tokens, cached), tokens);
  const left = all - reading;
  const rest = left > 0 ? `about ${duration(left)} left` : "longer than estimated";
  const text = `Reading: about ${rough(read)} of ${rough(tokens)} tokens, ${rest} (estimated from earlier prompts)`;
  return { text, share: Math.min(0.99, reading / all) };
}
