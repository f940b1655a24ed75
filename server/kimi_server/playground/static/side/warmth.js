// How long the first token took when a document was read for the first time, and when the server had it in its cache.

import { seconds } from "../lib/units.js";
import { fill } from "./meter.js";

export class Warmth {
  constructor(root) {
    this.root = root;
    this.show = Object.fromEntries([...root.querySelectorAll("[data-warmth]")].map((one) => [one.dataset.warmth, one]));
  }

  /** {cold, warm} in seconds, as far as they were measured. */
  draw({ cold, warm }) {
    const { show } = this;
    this.root.hidden = cold == null && warm == null;
    const longest = Math.max(cold ?? 0, warm ?? 0);
    for (const [name, time] of Object.entries({ cold, warm })) {
      show[name].textContent = time == null ? "not yet" : seconds(time);
      fill(show[`${name}-bar`], [time ?? 0], longest || 1);
    }
    const ratio = cold / warm;
    show.ratio.textContent =
      ratio > 1.5
        ? `${ratio < 10 ? ratio.toFixed(1) : Math.round(ratio)} times sooner with the document in the cache.`
        : "";
  }
}
