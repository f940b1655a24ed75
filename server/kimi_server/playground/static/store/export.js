// A conversation as a file: all of it as JSON, or what one reads as Markdown.

import { modelName } from "../lib/names.js";

const FORMAT = "kimi-linear-playground-1";

/** `texts`: a Map from SHA-256 to text. */
export function asJson(conversation, texts) {
  const named = conversation.turns.flatMap((turn) => turn.documents);
  const documents = named.map(({ sha256, name }) => ({ sha256, name, text: texts.get(sha256) ?? null }));
  return `${JSON.stringify({ format: FORMAT, ...conversation, documents }, null, 2)}\n`;
}

export function asMarkdown({ title, model, settings, turns }) {
  const parts = [`# ${title}`];
  if (model) parts.push(`Model: ${modelName(model)}`);
  if (settings.system) parts.push(`## System prompt\n\n${settings.system}`);
  for (const turn of turns) {
    const attached = turn.documents.map(
      ({ name, bytes, sha256 }) => `- Document: ${name} (${bytes} bytes, SHA-256 ${sha256})`,
    );
    parts.push(["## Question", attached.join("\n"), turn.question].filter(Boolean).join("\n\n"));
    parts.push(["## Answer", turn.answer, NOT_WHOLE[turn.state]].filter(Boolean).join("\n\n"));
  }
  return `${parts.join("\n\n")}\n`;
}

const NOT_WHOLE = {
  stopped: "*Stopped.*",
  interrupted: "*Cut off.*",
  failed: "*Not answered.*",
  running: "*Not complete.*",
};

/** A file's name made of a title. */
export function fileName(title, ending) {
  const plain = title
    .normalize("NFKD")
    .replace(/[^\w -]/g, "")
    .trim()
    .replace(/\s+/g, "-")
    .slice(0, 60);
  return `${plain || "conversation"}.${ending}`;
}
