// The page: what is asked, with which key and model, and what happens when. No state outlives the tab.

import { ask, chunks, Problem, read } from "./api.js";
import { Documents } from "./documents.js";
import { Follow } from "./follow.js";
import { Meter } from "./meter.js";
import { Turn } from "./turn.js";

const KEY = "kimi-linear-key"; // in sessionStorage, which ends with the tab

const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const meter = new Meter(page.context);
const follow = new Follow(page.reading, page.latest);
const documents = new Documents(page.attached, (sentence) => {
  tell(sentence);
  showState();
});

let turns = [];
let session = newSession();
let models = new Map(); // name -> longest context, in tokens
let limits = {}; // as /v1/kimi/context has them
let running = null; // the AbortController of the answer that streams

/** A conversation's name for the gateway. randomUUID exists behind https only. */
function newSession() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

const key = () => sessionStorage.getItem(KEY) ?? "";

function tell(sentence = "") {
  page.notice.textContent = sentence;
  page.notice.hidden = !sentence;
}

/** Whether there is something to send, and all of it is here. */
const ready = () => !running && !documents.reading && Boolean(page.question.value.trim() || documents.files.length);

function showState() {
  page.welcome.hidden = turns.length > 0;
  page.stop.hidden = !running;
  page.send.hidden = Boolean(running);
  page.send.disabled = !ready();
  page.question.style.height = "auto";
  page.question.style.height = `${page.question.scrollHeight}px`;
}

function askForKey() {
  page.access.showPopover();
  page.key.focus();
}

function fail(error) {
  if (!(error instanceof Problem)) throw error;
  if (error.status === 401) askForKey();
  return error.message;
}

/** Learn which models there are and how long their context is; returns whether there is one to ask. */
async function connect() {
  tell();
  try {
    const { data } = await read("models", key());
    models = new Map(data.map((model) => [model.id, model.max_model_len]));
    if (!models.size) throw new Problem("The gateway serves no model yet: send again in a while.");
    limits = await read("kimi/context", key()).catch(() => ({})); // a gateway may know no model's config
  } catch (error) {
    models = new Map();
    limits = {};
    tell(fail(error));
  }
  page.model.replaceChildren(...[...models.keys()].map((name) => new Option(name)));
  page.model.disabled = models.size < 2;
  showLimits();
  return models.size > 0;
}

function showLimits() {
  meter.setLimits({ ...limits, max_model_len: models.get(page.model.value) ?? limits.max_model_len });
}

async function send() {
  if (!ready()) return;
  tell();
  if (!models.size && !(await connect())) return;
  if (!ready()) return; // sent meanwhile
  const turn = new Turn(page.question.value.trim(), documents.take());
  page.question.value = "";
  turns.push(turn);
  page.conversation.append(turn.element);
  turn.element.querySelector(".copy").addEventListener("click", () => copy(turn));
  turn.element.querySelector(".edit").addEventListener("click", () => edit(turn));
  turn.element.querySelector(".retry").addEventListener("click", () => {
    turn.begin();
    answer(turn);
  });
  await answer(turn);
}

/** Stream the answer to the newest turn. */
async function answer(turn) {
  running = new AbortController();
  const { signal } = running;
  showState();
  follow.toEnd();
  page.status.textContent = "Answering.";
  let problem = "";
  try {
    const messages = turns.flatMap((one) => one.messages());
    const reply = await ask({ model: page.model.value, messages }, { key: key(), session, signal });
    turn.headers = reply.headers;
    for await (const chunk of chunks(reply)) turn.take(chunk, () => showProgress(turn, false));
    if (turn.cutShort) problem = "The answer has reached the longest it may be: start a new chat, or attach less.";
    page.status.textContent = "Answer complete.";
  } catch (error) {
    if (signal.aborted) page.status.textContent = "Stopped.";
    else [problem, page.status.textContent] = [fail(error), ""];
  } finally {
    turn.end(problem);
    if (running?.signal === signal) running = null;
  }
  showState();
  showProgress(turn, true);
}

function showProgress(turn, complete) {
  if (!turns.includes(turn)) return; // of a chat that was left meanwhile
  if (turn.usage) meter.setUsage(turn.usage, complete);
  follow.grown();
}

function stop() {
  running?.abort();
}

function newChat() {
  stop();
  running = null;
  turns = [];
  session = newSession();
  page.conversation.replaceChildren();
  meter.setUsage(null);
  tell();
  showState();
  page.question.focus();
}

/** Take the newest turn back into the message being written. */
function edit(turn) {
  turns = turns.filter((one) => one !== turn);
  turn.element.remove();
  meter.setUsage(turns.at(-1)?.usage ?? null);
  turn.documents.forEach((one) => documents.attach(one));
  page.question.value = [turn.question, page.question.value].filter(Boolean).join("\n\n");
  showState();
  page.question.focus();
}

async function copy(turn) {
  const text = turn.prose.text;
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
  } else {
    // Without https there is no clipboard but the one of a selection.
    const field = document.createElement("textarea");
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  page.status.textContent = "Copied.";
}

page.composer.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
page.question.addEventListener("input", showState);
page.question.addEventListener("keydown", (event) => {
  // Enter while an input method composes chooses a word and sends nothing.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !page.access.matches(":popover-open")) stop();
});
page.stop.addEventListener("click", stop);
page.new.addEventListener("click", newChat);
page.model.addEventListener("change", showLimits);

page.access.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, page.key.value.trim());
  page.access.hidePopover();
  page.question.focus();
  connect();
});

page.files.addEventListener("change", async () => {
  const files = [...page.files.files];
  page.files.value = ""; // so that the same file can be chosen again
  await documents.add(files);
  page.question.focus();
});
page.question.addEventListener("paste", (event) => {
  if (documents.paste(event.clipboardData)) event.preventDefault();
});
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragenter", (event) => {
  if (carriesFiles(event)) page.drop.hidden = false;
});
page.drop.addEventListener("dragleave", () => {
  page.drop.hidden = true;
});
document.addEventListener("dragover", (event) => {
  if (carriesFiles(event)) event.preventDefault();
});
document.addEventListener("drop", async (event) => {
  page.drop.hidden = true;
  if (!carriesFiles(event)) return;
  event.preventDefault();
  await documents.add([...event.dataTransfer.files]);
  page.question.focus();
});

page.key.value = key();
page.context.open = matchMedia("(min-width: 62rem)").matches;
showState();
connect();
