// Documents that wait to be sent, each a chip with its size.

import { Problem } from "../lib/problems.js";
import { chip, describe } from "./chip.js";
import { readDocument } from "./reader.js";

const LONG_PASTE = 4000; // characters; a text field slows down with megabytes in it

export class Attachments {
  /** `list` holds the chips; `changed(sentence)` is called after each change, and says what was not attached.
   * `sent(sha256)`: whether the conversation has this text already. `count(file)` promises {model, tokens, over}: a
   * model and what it makes of the text, as lib/api.js counts it, each null where it is not known. */
  constructor(list, { changed, sent, count }) {
    Object.assign(this, { list, changed, sent, count });
    this.shown = new Map(); // document -> {item, counting}: its chip, and the newest promise of its tokens
    this.reading = 0; // calls of add() that still read; a message waits for its documents
    this.pasted = 0;
  }

  get files() {
    return [...this.shown.keys()];
  }

  async add(files) {
    const problems = [];
    this.reading += 1;
    this.changed("");
    for (const file of files) {
      try {
        const progress = (page, pages) => this.changed(`Reading page ${page} of ${pages} of ${file.name}.`, "note");
        this.attach(await readDocument(file, progress));
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        problems.push(error.message);
      }
    }
    this.reading -= 1;
    this.changed(problems.join(" "));
  }

  /** Attach what is pasted if it is files or long; returns whether it was taken. */
  paste(clipboard) {
    const text = clipboard.getData("text/plain");
    if (text.length > LONG_PASTE) {
      this.pasted += 1;
      this.add([new File([text], `pasted-${this.pasted}.txt`)]);
    } else if (clipboard.files.length && !text) {
      this.add([...clipboard.files]);
    } else {
      return false;
    }
    return true;
  }

  /** All documents; none is attached any more. */
  take() {
    const { files } = this;
    this.shown.clear();
    this.list.replaceChildren();
    this.list.hidden = true;
    return files;
  }

  /** Attach what was read before; throws Problem for what is there already. */
  attach(file) {
    if (this.files.some((other) => other.sha256 === file.sha256) || this.sent(file.sha256)) {
      throw new Problem(`${file.name} is already in this chat: just ask about it.`);
    }
    const item = chip(file, () => {
      this.shown.delete(file);
      item.remove();
      this.list.hidden = !this.shown.size;
      this.changed("");
    });
    this.list.append(item);
    this.list.hidden = false;
    this.shown.set(file, { item, counting: null });
    this.#count(file);
  }

  /** Count all again: for another model, or for a server that did not answer before. */
  recount() {
    for (const file of this.shown.keys()) this.#count(file);
  }

  async #count(file) {
    const shown = this.shown.get(file);
    const counting = (shown.counting = this.count(file));
    const found = await counting;
    if (this.shown.get(file) !== shown || shown.counting !== counting) return; // removed, or asked again meanwhile
    Object.assign(file, found);
    describe(shown.item, file);
    this.changed(null);
  }
}
