// A streamed answer in the page, as Markdown. It grows at its end: only the last block is made anew as text arrives.

import { colourCode, headCode } from "./code.js";
import { setFormulas } from "./formulas.js";
import { blocks } from "./markdown.js";

export class Prose {
  /** `copied()` is called when a block of code was copied. */
  constructor(element, copied = () => {}) {
    this.element = element;
    this.copied = copied;
    this.text = "";
    this.#restart();
  }

  append(text) {
    this.text += text;
    this.#draw(false);
  }

  /** The answer is complete. */
  finish() {
    // A link's address may come after the link.
    if (Object.keys(this.env.references ?? {}).length) this.#restart(this.env.references);
    this.#draw(true);
  }

  #restart(references) {
    this.element.replaceChildren();
    this.env = references ? { references } : {};
    this.settled = 0; // characters whose blocks are in the page for good
    this.last = null; // the nodes of the block that may still change
  }

  #draw(whole) {
    const rest = this.text.slice(this.settled);
    const found = blocks(rest, this.env);
    this.last?.forEach((node) => node.remove());
    this.last = null;
    found.forEach((block, at) => {
      const final = whole || at < found.length - 1;
      const nodes = this.#show(block.fragment(), final);
      if (!final) [this.last, this.settled] = [nodes, this.settled + lineStart(rest, block.line)];
    });
    if (whole) this.settled = this.text.length;
  }

  #show(fragment, final) {
    headCode(fragment, this.copied);
    for (const table of fragment.querySelectorAll("table")) {
      const scroller = document.createElement("div");
      scroller.className = "table";
      scroller.tabIndex = 0; // a wide one scrolls, by keyboard as well
      table.replaceWith(scroller);
      scroller.append(table);
    }
    const place = document.createElement("div");
    place.append(fragment);
    setFormulas(place, final);
    if (final) colourCode(place);
    const shown = [...place.childNodes];
    this.element.append(...shown);
    return shown;
  }
}

/** Where a line begins in a text. */
function lineStart(text, line) {
  let at = 0;
  for (; line > 0; line -= 1) at = text.indexOf("\n", at) + 1;
  return at;
}
