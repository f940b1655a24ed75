// One question and its answer in the page, as a turn that is kept says.

import { chip } from "../documents/chip.js";
import { figures } from "./figures.js";
import { progress } from "./progress.js";
import { Prose } from "./prose.js";

const STATES = {
  stopped: "Stopped.",
  interrupted: "Cut off: you left the page before this answer was complete. Retry asks again.",
};

export class Turn {
  /** `copied(whether)` is called when code was to be copied. */
  constructor(record, copied) {
    this.record = record;
    this.copied = copied;
    this.element = document.getElementById("turn-template").content.firstElementChild.cloneNode(true);
    this.#find(".question .text").textContent = record.question;
    const chips = this.#find(".chips");
    chips.append(...record.documents.map((one) => chip(one)));
    chips.hidden = !record.documents.length;
    this.#empty();
  }

  /** Forget an answer, if there is one, and wait for the next. `expected`: what forecast.js says of the prompt. */
  begin(expected, speed) {
    Object.assign(this.record, {
      answer: "",
      state: "running",
      problem: "",
      usage: null,
      queue: null,
      first: null,
      streamed: null,
      cut: false,
    });
    Object.assign(this, { expected, speed, sent: performance.now(), firstToken: null });
    this.#empty();
    this.element.classList.add("running");
    this.element.setAttribute("aria-busy", "true");
    this.#tick();
    this.clock = setInterval(() => this.#tick(), 1000);
  }

  /** The server's header is here, which vLLM sends with the first token. */
  accept(headers) {
    const queue = headers.get("X-Kimi-Queue-Seconds");
    this.record.queue = queue === null ? null : Number(queue);
  }

  /** Take one chunk of the stream; `grown` is called when the page shows it. */
  take(chunk, grown) {
    const { record } = this;
    record.usage = chunk.usage ?? record.usage;
    const choice = chunk.choices?.[0];
    record.cut ||= choice?.finish_reason === "length";
    const text = choice?.delta?.content;
    if (!text) return;
    if (this.firstToken === null) {
      this.firstToken = performance.now();
      record.first = (this.firstToken - this.sent) / 1000;
      this.#find(".waiting").hidden = true;
    }
    record.answer += text;
    // At most once a frame, and a long block, which takes long to draw, less often.
    this.frame ||= setTimeout(
      () =>
        requestAnimationFrame(() => {
          if (record.state !== "running") return; // it has ended meanwhile, and all of it is shown
          this.#write();
          grown();
        }),
      4 * this.drawn,
    );
  }

  /** The answer has ended: `state` as it is kept, and one sentence on what went wrong, if something did. */
  end(state, problem = "") {
    const { record } = this;
    if (this.firstToken !== null) record.streamed = (performance.now() - this.firstToken) / 1000;
    Object.assign(record, { state, problem });
    this.show();
  }

  /** Show a turn that has ended, which `cold` helps to compare. */
  show(cold = null) {
    const { record } = this;
    clearInterval(this.clock);
    this.#write();
    this.prose.finish();
    this.#find(".waiting").hidden = true;
    this.#find(".copy").hidden = !record.answer;
    this.#tell(".ended", STATES[record.state] ?? "");
    this.#tell(".problem", record.problem);
    this.compare(cold);
    this.element.classList.remove("running");
    this.element.setAttribute("aria-busy", "false");
  }

  /** The figures, beside the time that the first token took without a cache. */
  compare(cold) {
    // A line breaks between two figures only.
    const known = figures(this.record, cold).map((figure) => figure.replaceAll(" ", "\u00a0"));
    this.#find(".figures").textContent = known.join(" · ");
  }

  /** Seconds from the server's turning to the prompt to its first token; null without one. */
  get reading() {
    return this.record.first === null ? null : Math.max(0, this.record.first - (this.record.queue ?? 0));
  }

  #empty() {
    this.prose = new Prose(this.#find(".answer > .text"), this.copied);
    Object.assign(this, { frame: 0, drawn: 0, firstToken: null });
    this.#tell(".ended", "");
    this.#tell(".problem", "");
    this.#find(".figures").textContent = "";
  }

  #find(selector) {
    return this.element.querySelector(selector);
  }

  #tell(selector, sentence) {
    this.#find(selector).textContent = sentence;
    this.#find(selector).hidden = !sentence;
  }

  #write() {
    const begun = performance.now();
    this.frame = 0;
    const { answer } = this.record;
    if (answer.length > this.prose.text.length) this.prose.append(answer.slice(this.prose.text.length));
    this.drawn = performance.now() - begun;
  }

  #tick() {
    if (this.firstToken !== null) return;
    const elapsed = (performance.now() - this.sent) / 1000;
    const { text, share } = progress({ elapsed, expected: this.expected, speed: this.speed });
    this.#find(".waiting").hidden = false;
    this.#find(".waiting .words").textContent = text;
    const bar = this.#find(".waiting .bar");
    bar.hidden = share === null;
    bar.firstElementChild.style.width = `${100 * (share ?? 0)}%`;
    bar.setAttribute("aria-valuenow", Math.round(100 * (share ?? 0)));
  }
}
