// The conversation that the page shows: asking, stopping, asking again from any turn, and keeping what was written.

import { ask, chunks } from "../lib/api.js";
import { copy } from "../lib/clipboard.js";
import { isDemo } from "../lib/names.js";
import { Problem } from "../lib/problems.js";
import { utf8Bytes } from "../lib/units.js";
import { body, fork, newConversation, newTurn, prefixOf, textsOf, titleOf } from "./conversation.js";
import { TOO_LONG, forecast, notRead, notSent } from "./forecast.js";
import { Turn } from "./turn.js";

const CUT = "The answer has reached the longest it may be: start a new chat, or attach less.";
const CUT_BY_SETTING = "The answer has reached the longest that you allow: raise “Longest answer” in the settings.";
const KEEP_MS = 400; // between two times that an answer is kept while it streams

export class Chat {
  /** `host` has key(), model() and most(), the longest context, of the request; fail(error), which makes a sentence;
   * tell(sentence) and say(status); edit(view); began(), changed() and progressed(usage, complete), to show it. */
  constructor(element, { library, conversations, measures, host }) {
    Object.assign(this, { element, library, conversations, measures, host });
    this.views = [];
    this.running = null; // the AbortController of the answer that streams
    this.editing = null; // the turn whose question is being written anew
    this.kept = 0;
    this.left = false;
    this.conversation = newConversation();
  }

  /** Show a conversation, a kept one or a new one. */
  open(conversation) {
    this.stop();
    this.running = null;
    this.editing = null;
    this.conversation = conversation;
    this.views = [];
    this.element.replaceChildren();
    for (const record of conversation.turns) {
      if (record.state === "running") record.state = "interrupted";
      this.#add(record).show(this.warmth.cold);
    }
    this.host.progressed(this.usage, true);
    this.host.changed();
  }

  has(sha256) {
    const turns = this.conversation.turns.slice(0, this.editing ? this.views.indexOf(this.editing) : undefined);
    return turns.some(({ documents }) => documents.some((one) => one.sha256 === sha256));
  }

  /** The `usage` of the newest answer that has one. */
  get usage() {
    return this.conversation.turns.findLast((turn) => turn.usage)?.usage ?? null;
  }

  /** First tokens of prompts that begin as this one: {cold, warm} in seconds. */
  get warmth() {
    const { conversation } = this;
    return conversation.turns.length ? this.measures.prefix(conversation.model, prefixOf(conversation)) : {};
  }

  /** What a message would cost as turn `at`, the next one unless it is given. */
  forecast(question, documents, at = this.editing ? this.views.indexOf(this.editing) : this.views.length) {
    const { measures, host } = this;
    const conversation = { ...this.conversation, turns: this.conversation.turns.slice(0, at) };
    return forecast({ conversation, documents, question, model: host.model(), measures, most: host.most() });
  }

  /** Ask with these documents, as documents/reader.js makes them. */
  send(question, files) {
    if (this.editing) this.#replaceFrom(this.views.indexOf(this.editing), 0);
    const plain = isDemo(this.host.model()); // it was trained on a text and a question, with nothing around them
    const documents = files.map(({ sha256, name, size, pages, bytes, model, tokens, over }) => ({
      sha256,
      name,
      size,
      pages,
      bytes,
      model,
      tokens,
      over,
      plain,
    }));
    const record = newTurn(question, documents);
    this.conversation.turns.push(record);
    if (!this.conversation.named && this.conversation.turns.length === 1)
      this.conversation.title = titleOf(this.conversation);
    return this.#answer(this.#add(record), files);
  }

  /** Ask the question of a turn again; turns after it stay in the conversation that is left. */
  regenerate(view) {
    const at = this.views.indexOf(view);
    const expected = this.forecast(view.record.question, view.record.documents, at);
    if (expected.verdict === TOO_LONG) return this.host.tell(notSent(expected));
    if (at < this.views.length - 1) this.#replaceFrom(at, 1);
    return this.#answer(this.views.at(-1));
  }

  /** Write the question of a turn anew; nothing changes until it is sent. */
  edit(view) {
    this.editing = view;
    this.views.forEach((one, at) =>
      one.element.classList.toggle("replaced", view !== null && at >= this.views.indexOf(view)),
    );
    this.host.changed();
  }

  stop() {
    this.running?.abort();
  }

  /** The page is left: keep an answer that streams as it is. That its connection then breaks is no news to keep. */
  leave() {
    if (this.running) this.keep();
    this.left = true;
  }

  /** Keep the conversation now. */
  keep() {
    this.kept = performance.now();
    return this.#orTell(this.conversations.keep(this.conversation));
  }

  /** Take away the turns from `at` on, but for `stay` of them. The last turn alone is replaced where it is; where
   * others would be lost, the conversation as it was stays in the list. */
  #replaceFrom(at, stay) {
    const { conversation } = this;
    if (at < conversation.turns.length - 1) {
      this.open(fork(conversation, at + stay));
    } else {
      conversation.turns.splice(at + stay);
      this.open(conversation);
    }
  }

  #add(record) {
    const view = new Turn(record, (copied) => this.#tellCopied(copied));
    const on = (selector, act) => view.element.querySelector(selector).addEventListener("click", act);
    on(".copy", async () => this.#tellCopied(await copy(record.answer)));
    on(".edit", () => this.host.edit(view));
    on(".retry", () => this.regenerate(view));
    this.views.push(view);
    this.element.append(view.element);
    return view;
  }

  #tellCopied(copied) {
    if (copied) this.host.say("Copied.");
    else this.host.tell("The browser did not let the page copy: select the text, and copy it yourself.");
  }

  /** Stream the answer to the newest turn, whose new documents are `files`. */
  async #answer(view, files = []) {
    const { conversation, host, measures } = this;
    const { record } = view;
    const running = (this.running = new AbortController());
    const model = host.model();
    Object.assign(conversation, { model, changed: Date.now() });
    Object.assign(record, { model, system: conversation.settings.system });
    const expected = this.forecast(record.question, record.documents, this.views.length - 1);
    view.begin(expected, measures.speed(model));
    host.began();
    let [state, problem] = ["complete", ""];
    let bytes = 0;
    try {
      await this.#orTell(Promise.all(files.map((file) => this.library.keep(file))));
      await this.keep();
      const request = body(conversation, await this.#texts(conversation));
      bytes = request.messages.reduce((sum, { content }) => sum + utf8Bytes(content), 0);
      const reply = await ask(request, { key: host.key(), session: conversation.session, signal: running.signal });
      view.accept(reply.headers);
      for await (const chunk of chunks(reply)) {
        view.take(chunk, () => this.#shows(view) && host.progressed(this.usage, false));
        if (performance.now() - this.kept > KEEP_MS && this.#shows(view)) this.keep();
      }
      if (record.cut) problem = conversation.settings.max_tokens ? CUT_BY_SETTING : CUT;
      host.say("Answer complete.");
    } catch (error) {
      if (this.left) return;
      if (running.signal.aborted) {
        state = "stopped";
        host.say("Stopped.");
      } else {
        [state, problem] = ["failed", error.tooLong ? notRead(expected, error.tooLong) : host.fail(error)];
        host.say("");
      }
    }
    view.end(state, problem);
    if (this.running === running) this.running = null;
    this.#showEnd(view);
    await this.#orTell(this.#learn(view, conversation, bytes));
    await this.#orTell(this.conversations.keep(conversation));
    this.#showEnd(view);
  }

  #showEnd(view) {
    if (!this.#shows(view)) return;
    view.compare(this.warmth.cold);
    this.host.progressed(this.usage, true);
    this.host.changed();
  }

  async #texts(conversation) {
    const wanted = textsOf(conversation);
    const texts = await this.library.read(wanted);
    if (wanted.every((one) => texts.has(one))) return texts;
    throw new Problem("A document of this chat was deleted: attach it again in a new chat.");
  }

  #shows(view) {
    return this.views.includes(view);
  }

  async #learn(view, conversation, bytes) {
    const { usage, model } = view.record;
    if (view.reading === null || !usage?.prompt_tokens) return;
    const cached = usage.prompt_tokens_details?.cached_tokens ?? null;
    const measured = {
      tokens: usage.prompt_tokens,
      cached,
      bytes,
      seconds: view.reading,
      prefix: prefixOf(conversation),
    };
    await this.measures.learn(model, measured);
  }

  /** A browser may have no room; what is on the page is still there. */
  async #orTell(written) {
    try {
      await written;
    } catch {
      this.host.tell("The browser has no room to keep this chat: delete others, or export it before you leave.");
    }
  }
}
