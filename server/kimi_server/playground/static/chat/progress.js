// How far a long prompt is read. vLLM sends nothing, and counts nothing, before it has read all of a prompt: this is an
// estimate, and says so.

import { duration, rough } from "../lib/units.js";

const LONG_SECONDS = 4; // below, a bar would come and go
const LONG_TOKENS = 5000; // below, nobody asks why it takes so long

/** {text, share} after `elapsed` seconds: `share` from 0 to 1, null where it is not known. `expected`: the prompt, as
 * forecast.js has it; `speed`: how fast this model reads, null before it was measured. */
export function progress({ elapsed, expected: { tokens, cached }, speed }) {
  const waited = elapsed < 2 ? "" : `, ${Math.round(elapsed)} s`;
  if (!speed && tokens - cached >= LONG_TOKENS) {
    return {
      text: `Reading about ${rough(tokens)} tokens${waited}; how fast this model reads is not known yet`,
      share: null,
    };
  }
  const all = speed?.seconds(tokens, cached) ?? 0;
  if (all < LONG_SECONDS) return { text: `Waiting for the first token${waited}`, share: null };
  if (elapsed >= all) {
    return { text: `Reading about ${rough(tokens)} tokens takes longer than estimated${waited} so far`, share: 0.99 };
  }
  const read = rough(speed.read(elapsed, tokens, cached));
  const rest = `about ${duration(all - elapsed)} left (estimated from earlier prompts)`;
  return { text: `Reading: about ${read} of ${rough(tokens)} tokens, ${rest}`, share: elapsed / all };
}
