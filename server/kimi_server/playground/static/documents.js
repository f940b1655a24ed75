// Documents that wait to be sent, each a chip with its size.

import { Problem } from "./api.js";
import { bytes } from "./units.js";

const MOST_BYTES = 64 * 2 ** 20; // what the gateway takes unless it was told otherwise; far over a million tokens
const LONG_PASTE = 4000; // characters; a text field slows down with megabytes in it

/** A chip of a document; `remove` is called by its button, which is absent without it. */
export function chip(file, remove) {
  const item = document.getElementById("chip-template").content.firstElementChild.cloneNode(true);
  item.querySelector(".name").textContent = file.name;
  item.querySelector(".size").textContent = bytes(file.size);
  const button = item.querySelector(".remove");
  if (!remove) button.remove();
  else button.setAttribute("aria-label", `Remove ${file.name}`);
  button.addEventListener("click", () => remove?.(item));
  return item;
}

/** A file's {name, size, text}; throws Problem for what is not UTF-8 text. Read beside the page's own work. */
async function readText(file) {
  if (file.size > MOST_BYTES) {
    throw new Problem(`${file.name} has ${bytes(file.size)} and at most ${bytes(MOST_BYTES)} fit: split the file.`);
  }
  let content;
  try {
    content = await file.arrayBuffer();
  } catch {
    throw new Problem(`${file.name} cannot be read: attach files, not folders, that still exist.`);
  }
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(content);
  } catch {
    text = "\0";
  }
  if (text.includes("\0")) throw new Problem(`${file.name} is not text in UTF-8: save it as a text file first.`);
  if (!text.trim()) throw new Problem(`${file.name} is empty: attach one with text.`);
  return { name: file.name, size: file.size, text };
}

/** The documents attached to the message that is being written. */
export class Documents {
  /** `list` holds the chips; `changed(sentence)` is called after each change, and says what was not attached. */
  constructor(list, changed) {
    this.list = list;
    this.changed = changed;
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
        this.attach(await readText(file));
      } catch (error) {
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

  /** Attach what was read before. */
  attach(file) {
    this.files.push(file);
    this.list.append(
      chip(file, (item) => {
        this.files = this.files.filter((other) => other !== file);
        item.remove();
        this.list.hidden = !this.files.length;
        this.changed("");
      }),
    );
    this.list.hidden = false;
  }
}
