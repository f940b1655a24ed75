// The page: its parts and what connects them. Conversations stay in this browser, the API key in this tab.

import { Chat } from "./chat/chat.js";
import { newConversation } from "./chat/conversation.js";
import { Follow } from "./chat/follow.js";
import { TOO_LONG, mayBeTooLong, notSent, tell as tellForecast } from "./chat/forecast.js";
import { Attachments } from "./documents/attachments.js";
import { count, read } from "./lib/api.js";
import { modelNames } from "./lib/names.js";
import { Problem } from "./lib/problems.js";
import { Chats } from "./panels/chats.js";
import { Drop } from "./panels/drop.js";
import { Examples } from "./panels/examples.js";
import { Settings } from "./panels/settings.js";
import { Meter } from "./side/meter.js";
import { Warmth } from "./side/warmth.js";
import { Conversations } from "./store/conversations.js";
import { openDatabase } from "./store/database.js";
import { Library } from "./store/library.js";
import { Measures } from "./store/measures.js";

// In sessionStorage, which ends with the tab.
const KEY = "kimi-linear-key";
const SHOWN = "kimi-linear-conversation";

const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const database = await openDatabase();
const library = new Library(database);
const conversations = new Conversations(database, library);
const measures = new Measures(database);
await measures.load();

const meter = new Meter(page.context);
const warmth = new Warmth(page.warmth);
const follow = new Follow(page.reading, page.latest);

let models = new Map(); // name -> longest context, in tokens
let limits = {}; // as /v1/kimi/context has them; `unread` where it was not answered
let refused = ""; // a forecast that the notice repeats

const key = () => sessionStorage.getItem(KEY) ?? "";
const longest = () => models.get(page.model.value) ?? limits.max_model_len;

const host = {
  key,
  fail,
  tell,
  model: () => page.model.value,
  most: longest,
  edit,
  say(status) {
    page.status.textContent = status;
  },
  began() {
    host.say("Answering.");
    showState();
    follow.toEnd();
  },
  changed: showState,
  progressed(usage, complete) {
    meter.setUsage(usage, complete);
    follow.grown();
  },
};
const chat = new Chat(page.conversation, { library, conversations, measures, host });

const attachments = new Attachments(page.attached, {
  changed(sentence, kind) {
    if (sentence !== null) tell(sentence, kind);
    showState();
  },
  sent: (sha256) => chat.has(sha256),
  async count({ sha256, text, bytes }) {
    const model = page.model.value;
    const found = { model, tokens: null, over: null };
    if (!model || !measures.isLong(model, bytes)) return found;
    try {
      const known = await library.tokens(sha256, model);
      if (known) return { ...found, tokens: known };
      const { tokens = null, over = null, limit = null } = await count(text, model, key(), longest());
      if (limit) models.set(model, limit); // the server knows better than its list
      if (tokens) await library.learn(sha256, model, tokens).catch(() => {}); // it is counted again next time
      return { ...found, tokens, over };
    } catch {
      return found; // the forecast says that it is an estimate
    }
  },
});

const settings = new Settings(page.settings, {
  current: () => chat.conversation.settings,
  changed(given) {
    chat.conversation.settings = given;
    chat.keep();
    showState();
  },
});

new Chats(page.chats, {
  conversations,
  library,
  host: { current: () => chat.conversation, open: show, startNew },
});

const examples = new Examples(page.example, {
  tell,
  async ask(question, file) {
    if (chat.running) return;
    await attachments.add([file]);
    page.question.value = question;
    await send();
  },
});

new Drop(page.drop, attach);

function tell(sentence = "", kind = "problem") {
  refused = "";
  page.notice.textContent = sentence;
  page.notice.className = kind;
  page.notice.hidden = !sentence;
}

/** Whether there is something to send, and all of it is here. */
const ready = () =>
  !chat.running && !attachments.reading && Boolean(page.question.value.trim() || attachments.files.length);

/** What the next message would cost. */
const next = () => chat.forecast(page.question.value.trim(), attachments.files);

function showState() {
  page.welcome.hidden = chat.views.length > 0;
  page.stop.hidden = !chat.running;
  page.send.hidden = Boolean(chat.running);
  page.send.disabled = !ready();
  page.composer.ariaBusy = String(attachments.reading > 0);
  page.edited.hidden = !chat.editing;
  page.question.style.height = "auto";
  page.question.style.height = `${page.question.scrollHeight}px`;
  const expected = ready() ? next() : null;
  const text = expected ? tellForecast(expected) : "";
  page.forecast.textContent = text;
  page.forecast.hidden = !text || text === refused;
  page.forecast.classList.toggle("alarm", Boolean(expected && mayBeTooLong(expected)));
  warmth.draw(chat.warmth);
  const { title, id } = chat.conversation;
  document.title = title ? `${title} · Kimi Linear` : "Kimi Linear";
  sessionStorage.setItem(SHOWN, id);
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
    limits = await read("kimi/context", key()).catch((error) => {
      if (error.status === 404) return {}; // a gateway may know no model's config
      tell(fail(error));
      return { unread: true };
    });
  } catch (error) {
    models = new Map();
    limits = {};
    tell(fail(error));
  }
  const ids = [...models.keys()];
  page.model.replaceChildren(...modelNames(ids).map((name, at) => new Option(name, ids[at])));
  page.model.disabled = models.size < 2;
  chooseModel(chat.conversation.model);
  return models.size > 0;
}

/** Go on with the model of a conversation, where it is still served. */
function chooseModel(model) {
  if (models.has(model)) page.model.value = model;
  showModel();
}

function showModel() {
  attachments.recount();
  meter.setLimits({ ...limits, max_model_len: longest() });
  examples.show(page.model.value);
  showState();
}

async function send() {
  if (!ready()) return;
  tell();
  if (!models.size && !(await connect())) return;
  if (!ready()) return; // sent meanwhile
  const expected = next();
  if (expected.verdict === TOO_LONG) {
    tell(notSent(expected));
    refused = tellForecast(expected);
    return showState();
  }
  const question = page.question.value.trim();
  page.question.value = "";
  await chat.send(question, attachments.take());
}

function show(conversation) {
  attachments.take();
  chat.open(conversation);
  chooseModel(conversation.model);
  tell();
  follow.toEnd();
  page.question.focus();
}

function startNew() {
  show({ ...newConversation(chat.conversation.settings), model: chat.conversation.model });
}

/** Write a turn's question anew, with its documents. */
async function edit(view) {
  const { question, documents } = view.record;
  const texts = await library.read(documents.map(({ sha256 }) => sha256));
  attachments.take();
  chat.edit(view);
  for (const one of documents) attachments.attach({ ...one, text: texts.get(one.sha256) });
  page.question.value = question;
  showState();
  page.question.focus();
}

function cancelEdit() {
  chat.edit(null);
  attachments.take();
  page.question.value = "";
  showState();
  page.question.focus();
}

async function attach(files) {
  await attachments.add(files);
  page.question.focus();
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
page.question.addEventListener("paste", (event) => {
  if (attachments.paste(event.clipboardData)) event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector(":popover-open")) return;
  if (chat.running) chat.stop();
  else if (chat.editing) cancelEdit();
});
page.stop.addEventListener("click", () => chat.stop());
page.new.addEventListener("click", startNew);
page["cancel-edit"].addEventListener("click", cancelEdit);
page.model.addEventListener("change", showModel);
page.access.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, page.key.value.trim());
  page.access.hidePopover();
  page.question.focus();
  connect();
});
page.files.addEventListener("change", () => {
  const files = [...page.files.files];
  page.files.value = ""; // so that the same file can be chosen again
  attach(files);
});
addEventListener("pagehide", () => chat.leave());
addEventListener("pageshow", ({ persisted }) => persisted && location.reload());

page.key.value = key();
page.context.open = matchMedia("(min-width: 62rem)").matches;
page.kept.hidden = database.keeps;
const shown = await conversations.read(sessionStorage.getItem(SHOWN) ?? "");
if (shown) show(shown);
settings.show();
showState();
connect();
