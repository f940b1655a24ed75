// A streamed answer in the page: paragraphs, and code between ``` fences. Always as text, never as HTML.

const FENCE = /^ {0,3}```/;
const PERHAPS_FENCE = /^ {0,3}`{0,3}$/;

export class Prose {
  constructor(element) {
    this.element = element;
    this.text = "";
    this.line = ""; // the last line so far
    this.written = 0; // characters of it that are in the page
    this.block = null; // the text node that grows, null between blocks
    this.inCode = false;
  }

  /** Add what has arrived. The page grows at its end only: nothing written before is touched. */
  append(text) {
    this.text += text;
    for (const piece of text.split(/(?<=\n)/)) {
      this.line += piece;
      const whole = this.line.endsWith("\n");
      if (whole && this.#isFence()) {
        this.inCode = !this.inCode;
        this.block = null;
      } else if (whole && !this.inCode && !this.line.trim()) {
        this.block = null;
      } else if (whole || !(this.#isFence() || PERHAPS_FENCE.test(this.line))) {
        this.#write();
      }
      if (whole) [this.line, this.written] = ["", 0];
    }
  }

  /** The answer is complete: show a last line that was held back because it might have become a fence. */
  finish() {
    if (!this.#isFence() && this.line.trim()) this.#write();
  }

  /** Whether the last line is a fence: it opens with any language's name, and closes with none. */
  #isFence() {
    return FENCE.test(this.line) && (!this.inCode || this.line.trim() === "```");
  }

  #write() {
    this.block ??= this.#newBlock();
    this.block.appendData(this.line.slice(this.written));
    this.written = this.line.length;
  }

  #newBlock() {
    const text = document.createTextNode("");
    const block = document.createElement(this.inCode ? "pre" : "p");
    if (this.inCode) {
      block.tabIndex = 0; // long lines scroll, by keyboard as well
      block.append(document.createElement("code"));
      block.firstChild.append(text);
    } else {
      block.append(text);
    }
    this.element.append(block);
    return text;
  }
}
