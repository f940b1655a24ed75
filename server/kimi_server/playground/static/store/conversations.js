// The conversations that the browser keeps, newest first.

export class Conversations {
  constructor(database, library) {
    this.database = database;
    this.library = library;
    this.deleted = new Set(); // an answer that still ends must not bring its conversation back
  }

  async list() {
    return (await this.database.all("conversations")).sort((one, other) => other.changed - one.changed);
  }

  read(id) {
    return this.database.get("conversations", id);
  }

  /** Keep a conversation as it is now; one without turns is not kept. */
  async keep(conversation) {
    if (!conversation.turns.length || this.deleted.has(conversation.id)) return;
    await this.database.put("conversations", conversation);
  }

  async rename(id, title) {
    const conversation = await this.read(id);
    if (conversation && title) await this.keep({ ...conversation, title, named: true });
  }

  /** Delete a conversation, and the documents that no other has. */
  async delete(id) {
    this.deleted.add(id);
    await this.database.delete("conversations", id);
    await this.library.collect(await this.list());
  }
}
