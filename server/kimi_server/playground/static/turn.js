// One question and its answer, in the page and as messages of a request.

import { chip } from "./documents.js";
import { Prose } from "./prose.js";
import { count, seconds, share } from "./units.js";

export class Turn {
  constructor(question, documents) {
    this.element = document.getElementById("turn-template").content.firstElementChild.cloneNode(true);
    this.question = question;
    this.documents = documents;
    this.#find(".question .text").textContent = question;
    const chips = this.#find(".chips");
    chips.append(...documents.map((one) => chip(one)));
    chips.hidden = !documents.length;
    this.begin();
  }

  /** Forget an answer, if there is one, and wait for the next. */
  begin() {
    this.#find(".answer .text").replaceChildren();
    this.prose = new Prose(this.#find(".answer .text"));
    this.arrived = "";
    this.frame = 0;
    this.usage = null;
    this.headers = null;
    this.cutShort = false;
    this.firstToken = null;
    this.sent = performance.now();
    this.#find(".problem").hidden = true;
    this.#find(".figures").textContent = "";
    this.element.classList.add("running");
    this.element.setAttribute("aria-busy", "true");
    this.#tick();
    this.clock = setInterval(() => this.#tick(), 1000);
  }

  /** Take one chunk of the stream; `grown` is called when the page shows it. */
  take(chunk, grown) {
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices?.[0];
    this.cutShort ||= choice?.finish_reason === "length";
    const text = choice?.delta?.content;
    if (!text) return;
    if (this.firstToken === null) {
      this.firstToken = performance.now();
      this.#find(".waiting").hidden = true;
    }
    this.arrived += text;
    // At most once a frame, however fast the tokens come.
    this.frame ||= requestAnimationFrame(() => {
      this.#write();
      grown();
    });
  }

  /** The answer has ended, well or with one sentence on what went wrong. */
  end(problem = "") {
    this.ended = performance.now();
    clearInterval(this.clock);
    cancelAnimationFrame(this.frame);
    this.#write();
    this.prose.finish();
    this.#find(".waiting").hidden = true;
    this.#find(".copy").hidden = !this.prose.text;
    this.#find(".problem").textContent = problem;
    this.#find(".problem").hidden = !problem;
    // A line breaks between two figures only.
    const figures = this.#figures().map((figure) => figure.replaceAll(" ", "\u00a0"));
    this.#find(".figures").textContent = figures.join(" · ");
    this.element.classList.remove("running");
    this.element.setAttribute("aria-busy", "false");
  }

  /** What the model is told of this turn: documents first, so that later questions share the prefix. */
  messages() {
    const documents = this.documents.map(({ name, text }) => `<document name="${name}">\n${text}\n</document>`);
    const messages = [{ role: "user", content: [...documents, this.question].filter(Boolean).join("\n\n") }];
    if (this.prose.text) messages.push({ role: "assistant", content: this.prose.text });
    return messages;
  }

  #find(selector) {
    return this.element.querySelector(selector);
  }

  #write() {
    this.prose.append(this.arrived);
    this.arrived = "";
    this.frame = 0;
  }

  #tick() {
    if (this.firstToken !== null) return;
    const waited = Math.round((performance.now() - this.sent) / 1000);
    this.#find(".waiting").hidden = false;
    this.#find(".waiting").textContent = `Waiting for the first token${waited < 2 ? "" : `, ${waited} s`}`;
  }

  /** Queue wait, time to first token, tokens and speed, as far as they are known. */
  #figures() {
    const figures = [];
    const queue = this.headers?.get("X-Kimi-Queue-Seconds");
    if (queue != null) figures.push(`Queue ${seconds(Number(queue))}`);
    if (this.firstToken !== null) figures.push(`First token ${seconds((this.firstToken - this.sent) / 1000)}`);
    if (!this.usage) return figures;
    const { prompt_tokens: prompt, completion_tokens: answered, prompt_tokens_details: details } = this.usage;
    const cached = details?.cached_tokens;
    figures.push(`Prompt ${count(prompt)}${cached == null ? "" : `, ${share(cached, prompt)} cached`}`);
    figures.push(`Answer ${count(answered)}`);
    const streamed = (this.ended - this.firstToken) / 1000;
    if (this.firstToken !== null && answered > 1 && streamed > 0) {
      const speed = (answered - 1) / streamed;
      figures.push(`${speed < 10 ? speed.toFixed(1) : count(Math.round(speed))} tokens/s`);
    }
    return figures;
  }
}
