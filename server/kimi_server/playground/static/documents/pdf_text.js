// The text of a PDF, page by page, read by pdf.js in its worker. Nothing is drawn and no script of the file runs.

import { pdfjs } from "../lib/libraries.js";
import { Problem } from "../lib/problems.js";

const OPTIONS = { isEvalSupported: false, useWasm: false, useWorkerFetch: false, enableXfa: false, verbosity: 0 };

/** {text, pages} of `content`, an ArrayBuffer, each page under a line with its number; `progress(page, pages)` is
 * called as it goes. Throws Problem. */
export async function pdfText(name, content, progress) {
  const library = await pdfjs().catch(() => {
    throw new Problem("The reader of PDF files did not load: reload the page, then attach the file again.");
  });
  const task = library.getDocument({ data: content, ...OPTIONS });
  try {
    const document = await task.promise;
    const pages = [];
    let empty = true;
    for (let number = 1; number <= document.numPages; number += 1) {
      progress(number, document.numPages);
      const page = await document.getPage(number);
      const { items } = await page.getTextContent();
      const text = items
        .map((item) => item.str + (item.hasEOL ? "\n" : ""))
        .join("")
        .trim();
      empty &&= !text;
      pages.push(`[Page ${number}]\n${text}\n`);
      page.cleanup();
    }
    if (empty) throw new Problem(`${name} contains only images: run text recognition (OCR) on it first.`);
    return { text: pages.join("\n"), pages: pages.length };
  } catch (error) {
    if (error instanceof Problem) throw error;
    const locked = error.name === "PasswordException";
    const why = locked
      ? "asks for a password: save it without one first"
      : "is no PDF that can be read: save it again, or as text";
    throw new Problem(`${name} ${why}.`);
  } finally {
    task.destroy();
  }
}
