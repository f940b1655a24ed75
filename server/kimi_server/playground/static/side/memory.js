// What a conversation keeps in the server's memory, as one picture: the KDA state, which stays as it is, and the KV of
// the latent attention, which grows with each token.

import { bytes, count } from "../lib/units.js";

const [WIDTH, HEIGHT] = [300, 120]; // of the picture's own units

export class Memory {
  /** `show`: the elements by their data-show. */
  constructor(show) {
    this.show = show;
  }

  /** `tokens` of the conversation; without the model's figures it is said how to have them, but for those that were
   * `unread` because the gateway failed. */
  draw({ kda_state_bytes: state, mla_bytes_per_token: each, max_model_len: most, unread = false }, tokens) {
    const { show } = this;
    const known = state != null && each != null;
    show.memory.hidden = !known;
    show["no-memory"].hidden = known || unread;
    if (!known) return;
    const kv = tokens * each;
    show.state.textContent = bytes(state);
    show.kv.textContent = bytes(kv);
    show["kv-note"].textContent = `grows by ${bytes(each)} a token`;
    show.picture.toggleAttribute("hidden", !most);
    if (most) this.#plot(state, each, most, tokens);
    show.full.textContent = most ? `With the whole context used: ${bytes(state)} and ${bytes(most * each)}.` : "";
  }

  #plot(state, each, most, tokens) {
    const { show } = this;
    const top = 1.08 * Math.max(state, most * each);
    const x = (token) => (WIDTH * token) / most;
    const y = (amount) => HEIGHT - (HEIGHT * amount) / top;
    const now = Math.min(tokens, most);
    place(show["kv-area"], { d: `M0 ${HEIGHT} L${x(now)} ${y(now * each)} V${HEIGHT} Z` });
    place(show["kv-line"], { d: `M0 ${HEIGHT} L${WIDTH} ${y(most * each)}` });
    // A state that is too small to be seen at this scale is a line all the same.
    const height = Math.max(2, HEIGHT - y(state));
    place(show["state-area"], { x: 0, y: HEIGHT - height, width: WIDTH, height });
    place(show.now, { cx: x(now), cy: y(now * each) });
    // Above the line where it is low, and above the state.
    const free = Math.min(y(0.78 * most * each), HEIGHT - height - 22);
    place(show["kv-label"], { x: 0.62 * WIDTH, y: free, "text-anchor": "end" });
    place(show["state-label"], { y: HEIGHT - height - 5 });
    show["kv-label"].textContent = `latent KV, up to ${bytes(most * each)}`;
    show["state-label"].textContent = `KDA state, always ${bytes(state)}`;
    show["axis-end"].textContent = `${count(most)} tokens`;
    const larger =
      now * each > state ? `the latent KV is ${times(now * each, state)} the state` : "the state is the larger part";
    show.caption.textContent = `Now, at ${count(tokens)} tokens, ${larger}.`;
    const sizes = `the KDA state stays at ${bytes(state)}, the latent KV grows to ${bytes(most * each)}.`;
    const title = `Memory by length of the conversation, up to ${count(most)} tokens: ${sizes}`;
    show.picture.setAttribute("aria-label", title);
  }
}

function times(one, other) {
  const ratio = one / other;
  return ratio < 1.05 ? "as large as" : `${ratio < 10 ? ratio.toFixed(1) : Math.round(ratio)} times`;
}

function place(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
}
