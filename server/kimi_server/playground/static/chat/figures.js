// The line under an answer: queue wait, time to first token, tokens and speed, as far as they are known.

import { count, seconds, share } from "../lib/units.js";
import { isWarm } from "../store/measures.js";

const SHORTEST = 0.05; // seconds: what came in one piece has no speed

/** Of a turn as it is kept; `cold`: seconds to the first token when the same beginning was read without a cache. */
export function figures({ queue, first, streamed, usage }, cold) {
  const known = [];
  if (queue != null) known.push(`Queue ${seconds(queue)}`);
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  const warm = cached != null && isWarm(usage.prompt_tokens, cached) && cold > first;
  if (first != null) known.push(`First token ${seconds(first)}${warm ? `, cold ${seconds(cold)}` : ""}`);
  if (!usage) return known;
  const { prompt_tokens: prompt, completion_tokens: answered } = usage;
  known.push(`Prompt ${count(prompt)}${cached == null ? "" : `, ${share(cached, prompt)} cached`}`);
  known.push(`Answer ${count(answered)}`);
  if (first != null && answered > 1 && streamed > SHORTEST) {
    const speed = (answered - 1) / streamed;
    known.push(`${speed < 10 ? speed.toFixed(1) : count(Math.round(speed))} tokens/s`);
  }
  return known;
}
