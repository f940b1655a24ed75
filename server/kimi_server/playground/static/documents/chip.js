// A document in a row of documents: its name, its size, and what else is known of it.

import { bytes, count, rough } from "../lib/units.js";

/** `remove(item)` is called by its button, which is absent without it. */
export function chip(file, remove) {
  const item = document.getElementById("chip-template").content.firstElementChild.cloneNode(true);
  item.querySelector(".name").textContent = file.name;
  describe(item, file);
  const button = item.querySelector(".remove");
  if (!remove) button.remove();
  else button.setAttribute("aria-label", `Remove ${file.name}`);
  button.addEventListener("click", () => remove?.(item));
  return item;
}

/** Say how large it is: in bytes, and in tokens where they were counted. */
export function describe(item, { size, tokens, over, encoding }) {
  const known = [bytes(size)];
  if (tokens) known.push(`${count(tokens)} tokens`);
  else if (over) known.push(over.about ? `about ${rough(over.about)} tokens` : `at least ${count(over.least)} tokens`);
  if (encoding === "windows-1252") known.push("read as Latin-1");
  item.querySelector(".size").textContent = known.join(", ");
}
