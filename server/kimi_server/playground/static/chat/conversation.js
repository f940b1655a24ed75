// A conversation as it is kept, and as the messages of a request.
//
// A conversation has id, session, title, created, changed, model, turns and settings {system, temperature, top_p,
// max_tokens}. A turn has question, documents [{sha256, name, size, pages, bytes, model, tokens, over, plain}], answer,
// state, and what was measured.

const TITLE = 60; // characters

export const NO_SETTINGS = { system: "", temperature: null, top_p: null, max_tokens: null };

/** randomUUID exists behind https only. */
function name() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(settings = NO_SETTINGS) {
  const now = Date.now();
  const id = name();
  // The session tells the gateway which replica has the prompt's beginning; a fork keeps it.
  return { id, session: id, title: "", created: now, changed: now, model: "", settings: { ...settings }, turns: [] };
}

export function newTurn(question, documents) {
  return { question, documents, answer: "", state: "running", problem: "", usage: null };
}

/** A copy that has the first `turns` turns, so that what followed them stays in the other. */
export function fork(conversation, turns) {
  const { id, ...rest } = structuredClone(conversation);
  const title = conversation.title.replace(/ \(edited\)$/, "");
  return { ...rest, id: name(), title: `${title} (edited)`, created: Date.now(), turns: rest.turns.slice(0, turns) };
}

/** What a list calls a conversation that nobody named. */
export function titleOf({ turns: [first] }) {
  const words = (first?.question || first?.documents[0]?.name || "").trim().replace(/\s+/g, " ");
  return words.length > TITLE ? `${words.slice(0, TITLE)}…` : words;
}

/** The texts that a conversation needs, by SHA-256. */
export const textsOf = (conversation) =>
  conversation.turns.flatMap((turn) => turn.documents.map(({ sha256 }) => sha256));

/** A name for the beginning of a prompt: those of the same name have the same bytes, up to the first question. */
export const prefixOf = ({ settings, turns: [first] }, documents = first?.documents ?? []) =>
  documents.length ? [settings.system, ...documents.map((one) => `${one.name} ${one.sha256}`)].join("\n") : "";

/** The messages of a request. Each turn adds to those of the turn before and changes none of their bytes: so the server
 * finds in its prefix cache what it has read. `texts`: a Map from SHA-256 to text. */
export function messages({ settings, turns }, texts) {
  const said = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const turn of turns) {
    said.push({ role: "user", content: content(turn, texts) });
    if (turn.answer) said.push({ role: "assistant", content: turn.answer });
  }
  return said;
}

/** Documents first, so that later questions share the prefix. */
function content({ question, documents }, texts) {
  if (documents.some(({ plain }) => plain)) return documents.map(({ sha256 }) => texts.get(sha256)).join("") + question;
  const framed = documents.map(
    ({ sha256, name }) => `<document name="${name.replace(/["<>\n]/g, "_")}">\n${texts.get(sha256)}\n</document>`,
  );
  return [...framed, question].filter(Boolean).join("\n\n");
}

/** The body of a request: settings that are not given are left to the server. */
export function body({ settings, ...conversation }, texts) {
  const given = Object.entries(settings).filter(([field, value]) => field !== "system" && value !== null);
  return {
    model: conversation.model,
    ...Object.fromEntries(given),
    messages: messages({ settings, ...conversation }, texts),
  };
}
