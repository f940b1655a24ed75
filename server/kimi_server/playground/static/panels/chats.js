// The list of conversations: open, rename, export, delete.

import { download } from "../lib/download.js";
import { when } from "../lib/units.js";
import { textsOf } from "../chat/conversation.js";
import { asJson, asMarkdown, fileName } from "../store/export.js";

export class Chats {
  /** `host`: current(), the conversation that is shown; open(conversation); startNew(). */
  constructor(panel, { conversations, library, host }) {
    Object.assign(this, { panel, conversations, library, host });
    this.list = panel.querySelector("ul");
    panel.addEventListener("beforetoggle", (event) => event.newState === "open" && this.show());
  }

  async show() {
    const found = await this.conversations.list();
    this.list.replaceChildren(...found.map((one) => this.#item(one)));
    this.panel.querySelector(".none").hidden = found.length > 0;
  }

  #item(conversation) {
    const item = document.getElementById("chat-template").content.firstElementChild.cloneNode(true);
    const find = (selector) => item.querySelector(selector);
    const name = conversation.title || "Untitled";
    find(".title").textContent = name;
    find(".when").textContent = when(conversation.changed);
    const open = find(".open");
    if (conversation.id === this.host.current().id) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => {
      this.panel.hidePopover();
      this.host.open(conversation);
    });
    for (const [selector, word] of [
      [".rename", "Rename"],
      [".markdown", "Export as Markdown:"],
      [".json", "Export as JSON:"],
      [".delete", "Delete"],
    ]) {
      find(selector).setAttribute("aria-label", `${word} ${name}`);
    }
    find(".rename").addEventListener("click", () => this.#rename(item, conversation));
    find(".markdown").addEventListener("click", () =>
      download(fileName(name, "md"), "text/markdown", asMarkdown(conversation)),
    );
    find(".json").addEventListener("click", async () => {
      const texts = await this.library.read(textsOf(conversation));
      download(fileName(name, "json"), "application/json", asJson(conversation, texts));
    });
    find(".delete").addEventListener("click", ({ currentTarget }) => this.#delete(currentTarget, conversation));
    return item;
  }

  #rename(item, conversation) {
    const field = document.createElement("input");
    field.value = conversation.title;
    field.maxLength = 120;
    field.setAttribute("aria-label", "New name");
    item.querySelector(".open").replaceWith(field);
    field.select();
    let ended = false;
    const end = async (keep) => {
      if (ended) return;
      ended = true;
      const title = field.value.trim();
      if (keep && title) {
        if (conversation.id === this.host.current().id) Object.assign(this.host.current(), { title, named: true });
        await this.conversations.rename(conversation.id, title);
      }
      await this.show();
      this.list.querySelector(`.open`)?.focus();
    };
    field.addEventListener("blur", () => end(true));
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault(); // Escape would close the whole list
      event.stopPropagation();
      end(event.key === "Enter");
    });
  }

  /** The first press asks, the second deletes. */
  async #delete(button, conversation) {
    if (!button.classList.contains("sure")) {
      button.classList.add("sure");
      button.textContent = "Really delete?";
      button.setAttribute("aria-label", `Really delete ${conversation.title}?`);
      button.addEventListener("blur", () => this.show(), { once: true });
      return;
    }
    if (conversation.id === this.host.current().id) this.host.startNew();
    await this.conversations.delete(conversation.id);
    await this.show();
    (this.list.querySelector(".open") ?? this.panel.querySelector(".close")).focus();
  }
}
