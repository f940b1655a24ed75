// How much of the context is used, and what of it was cached.

import { count, share } from "../lib/units.js";
import { Memory } from "./memory.js";

export class Meter {
  constructor(root) {
    this.show = Object.fromEntries([...root.querySelectorAll("[data-show]")].map((one) => [one.dataset.show, one]));
    this.memory = new Memory(this.show);
    this.limits = {};
    this.usage = null;
    this.complete = true;
  }

  /** Limits as /v1/kimi/context has them; those that are null or absent are not shown. */
  setLimits(limits) {
    this.limits = limits;
    this.#draw();
  }

  /** The `usage` of the newest answer, complete or so far; null for a new conversation. */
  setUsage(usage, complete = true) {
    this.usage = usage;
    this.complete = complete;
    this.#draw();
  }

  #draw() {
    const { max_model_len: most } = this.limits;
    const { prompt_tokens: prompt = 0, completion_tokens: answered = 0 } = this.usage ?? {};
    const cached = this.usage?.prompt_tokens_details?.cached_tokens;
    const used = prompt + answered;
    const show = this.show;
    show.used.textContent = most
      ? `${count(used)} of ${count(most)} tokens, ${share(used, most)}`
      : `${count(used)} tokens`;
    const known = !this.usage || cached != null;
    show.cached.textContent = known ? count(cached ?? 0) : this.complete ? "not reported" : "known at the end";
    show["fresh-name"].textContent = known ? "Prompt, computed" : "Prompt";
    show.fresh.textContent = count(prompt - (cached ?? 0));
    show.answered.textContent = count(answered);
    show.free.textContent = most ? count(Math.max(0, most - used)) : "not reported";
    fill(show.bar, [cached ?? 0, prompt - (cached ?? 0), answered], most || used);
    show.bar.setAttribute("aria-valuemax", most || Math.max(1, used));
    show.bar.setAttribute("aria-valuenow", used);
    show.bar.setAttribute("aria-valuetext", show.used.textContent);
    this.memory.draw(this.limits, used);
  }
}

/** Give the parts of a bar their widths; what is there at all is seen. */
export function fill(bar, parts, whole) {
  parts.forEach((part, index) => {
    const style = bar.children[index].style;
    style.width = part ? `${(100 * part) / whole}%` : "0";
    style.minWidth = part ? "2px" : "0";
  });
}
