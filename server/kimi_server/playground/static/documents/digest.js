// What the page asks its worker for.

let worker = null;
let asked = 0;
const waiting = new Map(); // number -> resolve

/** {text, encoding, bytes, sha256} of an ArrayBuffer, which is given away, or of a text; null for what is no text.
 * `bytes` and `sha256` are of the text in UTF-8. */
export function digest(content) {
  if (!worker) {
    worker = new Worker(new URL("./digest.worker.js", import.meta.url), { type: "module" });
    worker.addEventListener("message", ({ data: { number, found } }) => {
      waiting.get(number)(found);
      waiting.delete(number);
    });
  }
  asked += 1;
  worker.postMessage({ number: asked, content }, typeof content === "string" ? [] : [content]);
  return new Promise((resolve) => waiting.set(asked, resolve));
}
