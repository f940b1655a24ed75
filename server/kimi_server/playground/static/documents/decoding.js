// The text in a file's bytes: UTF-8, UTF-16 with its mark, else Latin-1 as browsers read it (Windows-1252).

const MARKS = [
  ["utf-16le", [0xff, 0xfe]],
  ["utf-16be", [0xfe, 0xff]],
];
// Characters that no text has. Tab, line feeds and escape (of a log's colours) are text.
const CONTROL = /[\0-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f]/;

/** {text, encoding} of `bytes`, a Uint8Array; null for what is no text. */
export function decode(bytes) {
  const marked = MARKS.find(([, mark]) => mark.every((byte, at) => bytes[at] === byte))?.[0];
  for (const encoding of marked ? [marked] : ["utf-8", "windows-1252"]) {
    try {
      const text = new TextDecoder(encoding, { fatal: true }).decode(bytes);
      const odd = encoding === "windows-1252" ? CONTROL.test(text) : text.includes("\0");
      return odd ? null : { text, encoding };
    } catch {
      // not in this encoding
    }
  }
  return null;
}
