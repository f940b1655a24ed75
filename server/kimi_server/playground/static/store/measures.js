// What this browser has measured of each model: how fast it reads, bytes a token, and first tokens cold and warm.

import { Speed } from "./speed.js";

const KEPT = 24; // of the latest
const BYTES_A_TOKEN = 4; // before anything was measured
const LONG = 2000; // tokens of a document that is worth counting

export class Measures {
  constructor(database) {
    this.database = database;
    this.records = new Map(); // model -> {key, prompts, prefixes}
  }

  async load() {
    for (const record of await this.database.all("measures")) this.records.set(record.key, record);
  }

  /** Learn from an answer: `tokens` of its prompt, `cached` of them (null: not told), its `bytes`, and `seconds` from
   * the server's turning to it to the first token. `prefix` names what it began with. */
  async learn(model, { tokens, cached, bytes, seconds, prefix }) {
    const record = this.#of(model);
    record.prompts = [...record.prompts, { tokens, cached: cached ?? 0, bytes, seconds }].slice(-KEPT);
    if (prefix && cached != null)
      record.prefixes[prefix] = { ...record.prefixes[prefix], [isWarm(tokens, cached) ? "warm" : "cold"]: seconds };
    this.records.set(model, record);
    await this.database.put("measures", record);
  }

  /** First tokens of prompts that begin so: {cold, warm} in seconds, as far as they were seen. */
  prefix(model, name) {
    return this.#of(model).prefixes[name] ?? {};
  }

  /** How fast this model reads; null before the first answer. */
  speed(model) {
    return Speed.fit(this.#of(model).prompts);
  }

  bytesPerToken(model) {
    const { prompts } = this.#of(model);
    const sum = (field) => prompts.reduce((total, one) => total + one[field], 0);
    return sum("tokens") ? Math.max(0.5, sum("bytes") / sum("tokens")) : BYTES_A_TOKEN;
  }

  /** Whether the server shall count a document of so many bytes. */
  isLong(model, bytes) {
    return bytes >= LONG * this.bytesPerToken(model);
  }

  #of(model) {
    return this.records.get(model) ?? { key: model, prompts: [], prefixes: {} };
  }
}

/** Whether most of a prompt was found in the server's cache. */
export const isWarm = (tokens, cached) => cached >= tokens / 2;
