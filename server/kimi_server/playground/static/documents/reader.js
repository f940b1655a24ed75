// A file becomes a document: {name, size, pages, text, bytes, sha256, encoding}; only a PDF has pages.

import { Problem } from "../lib/problems.js";
import { bytes } from "../lib/units.js";
import { digest } from "./digest.js";
import { pdfText } from "./pdf_text.js";

const MOST_BYTES = 64 * 2 ** 20; // what the gateway takes unless it was told otherwise; far over a million tokens

/** Read a file of text or a PDF; throws Problem. `progress(page, pages)` is called for each page of a PDF. */
export async function readDocument(file, progress = () => {}) {
  const { name, size } = file;
  if (size > MOST_BYTES) {
    throw new Problem(`${name} has ${bytes(size)}; the limit is ${bytes(MOST_BYTES)}: split the file.`);
  }
  let content;
  try {
    content = await file.arrayBuffer();
  } catch {
    throw new Problem(`${name} cannot be read: attach a file that exists, and no folder.`);
  }
  const isPdf = new TextDecoder("latin1").decode(content.slice(0, 5)) === "%PDF-";
  const { text, pages } = isPdf ? await pdfText(name, content, progress) : { text: null, pages: null };
  const found = await digest(text ?? content);
  if (!found) throw new Problem(`${name} is neither text nor a PDF: save it as a text file first.`);
  if (!found.text.trim()) throw new Problem(`${name} is empty: attach one with text.`);
  return { name, size, pages, ...found };
}
