// The texts of documents, each kept once under its SHA-256, with its tokens as the models' servers counted them.

export class Library {
  constructor(database) {
    this.database = database;
    this.texts = new Map(); // sha256 -> text, of what this tab has used
  }

  /** Keep a document's text. */
  async keep({ sha256, text }) {
    this.texts.set(sha256, text);
    const known = await this.database.get("documents", sha256);
    if (known?.text === undefined) await this.database.put("documents", { tokens: {}, ...known, sha256, text });
  }

  /** A Map of the texts of these documents. One that is gone, because another tab deleted it, is missing. */
  async read(names) {
    for (const sha256 of names) {
      if (this.texts.has(sha256)) continue;
      const record = await this.database.get("documents", sha256);
      if (record?.text !== undefined) this.texts.set(sha256, record.text);
    }
    return this.texts;
  }

  /** Tokens of a document for this model; null where they were never counted. */
  async tokens(sha256, model) {
    return (await this.database.get("documents", sha256))?.tokens[model] ?? null;
  }

  async learn(sha256, model, tokens) {
    const record = (await this.database.get("documents", sha256)) ?? { sha256, tokens: {} };
    record.tokens[model] = tokens;
    await this.database.put("documents", record);
  }

  /** Forget the texts that none of `conversations` holds. */
  async collect(conversations) {
    const held = new Set(
      conversations.flatMap(({ turns }) => turns.flatMap((turn) => turn.documents.map((one) => one.sha256))),
    );
    for (const { sha256 } of await this.database.all("documents")) {
      if (held.has(sha256)) continue;
      await this.database.delete("documents", sha256);
      this.texts.delete(sha256);
    }
  }
}
