// Blocks of code: their language, a button that copies them, and colours by highlight.js, loaded with the first.

import { copy } from "../lib/clipboard.js";
import { highlighter } from "../lib/libraries.js";

const MOST = 50_000; // characters that are coloured: more would hold up the page

/** Give each block of code within `root` a head with its language and a button. `copied(whether)` is called
 * after copying. */
export function headCode(root, copied) {
  for (const code of root.querySelectorAll("pre > code")) {
    const language = /language-(\S+)/.exec(code.className)?.[1] ?? "";
    const head = document.getElementById("code-template").content.firstElementChild.cloneNode(true);
    head.querySelector(".language").textContent = language || "text";
    head.querySelector("button").addEventListener("click", async () => {
      copied(await copy(code.textContent));
    });
    const block = code.parentElement;
    block.tabIndex = 0; // long lines scroll, by keyboard as well
    const whole = document.createElement("div");
    whole.className = "code";
    block.replaceWith(whole);
    whole.append(head, block);
  }
}

/** Colour the blocks within `root` whose language is known. */
export async function colourCode(root) {
  const found = [...root.querySelectorAll('pre > code[class*="language-"]')];
  if (!found.length) return;
  const library = await highlighter().catch(() => null); // without it the code is there, in one colour
  for (const code of found) {
    const language = /language-(\S+)/.exec(code.className)?.[1];
    if (!library?.getLanguage(language) || code.textContent.length > MOST) continue;
    library.highlightElement(code);
  }
}
