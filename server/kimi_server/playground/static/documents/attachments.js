// Documents that wait to be sent, each a chip with its size.

import { Problem } from "../lib/problems.js";
import { chip, describe } from "./chip.js";
import { readDocument } from "./reader.js";

const LONG_PASTE = 4000; // characters; a text field slows down with megabytes in it

export class Attachments {
  /** `list` holds the chips; `changed(sentence)` is called after each change, and says what was not attached.
   * `sent(sha256)`: whether the conversation has this text already. `count(file)` promises its tokens, or null. */
  constructor(list, { changed, sent, count }) {
    Object.assign(this, { list, changed, sent, count });
    this.files = [];
    this.reading = 0; // calls of add() that still read; a message waits for its documents
    this.pasted = 0;
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
    const files = this.files;
    this.files = [];
    this.list.replaceChildren();
    this.list.hidden = true;
    return files;
  }

  /** Attach what was read before; throws Problem for what is there already. */
  attach(file) {
    if (this.files.some((other) => other.sha256 === file.sha256) || this.sent(file.sha256)) {
      throw new Problem(`${file.name} is already in this chat: just ask about it.`);
    }
    this.files.push(file);
    const item = chip(file, () => {
      this.files = this.files.filter((other) => other !== file);
      item.remove();
      this.list.hidden = !this.files.length;
      this.changed("");
    });
    this.list.append(item);
    this.list.hidden = false;
    this.#count(file, item);
  }

  async #count(file, item) {
    file.tokens ??= await this.count(file);
    if (!this.files.includes(file)) return;
    describe(item, file);
    this.changed(null);
  }
}
