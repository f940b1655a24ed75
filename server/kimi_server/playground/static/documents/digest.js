// What the page asks its worker for.

import { Problem } from "../lib/problems.js";

let worker = null;
let asked = 0;
const waiting = new Map(); // number -> {resolve, reject}

/** {text, encoding, bytes, sha256} of an ArrayBuffer, which is given away, or of a text; null for what is no text.
 * `bytes` and `sha256` are of the text in UTF-8. Throws Problem where the worker does not load. */
export function digest(content) {
  if (!worker) {
    worker = new Worker(new URL("./digest.worker.js", import.meta.url), { type: "module" });
    worker.addEventListener("message", ({ data: { number, found } }) => {
      waiting.get(number).resolve(found);
      waiting.delete(number);
    });
    worker.addEventListener("error", () => {
      worker = null; // the next file asks for it again
      const sentence = "The reader of files did not load: check that the gateway runs, then attach it again.";
      for (const { reject } of waiting.values()) reject(new Problem(sentence));
      waiting.clear();
    });
  }
  asked += 1;
  worker.postMessage({ number: asked, content }, typeof content === "string" ? [] : [content]);
  return new Promise((resolve, reject) => waiting.set(asked, { resolve, reject }));
}
