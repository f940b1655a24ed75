// What the browser keeps for this page (IndexedDB); where it keeps nothing, memory that ends with the tab.

const NAME = "kimi-linear-playground";
const STORES = { conversations: "id", documents: "sha256", measures: "key" }; // store -> the field that names a record

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

class Database {
  constructor(connection) {
    this.connection = connection;
    this.keeps = true;
  }

  /** The record of this name; undefined if there is none. */
  get(store, name) {
    return done(this.#store(store).get(name));
  }

  all(store) {
    return done(this.#store(store).getAll());
  }

  /** Resolves when the record is written; rejects where there is no room. */
  put(store, record) {
    const opened = this.#store(store, "readwrite");
    opened.put(record);
    opened.transaction.commit?.();
    return new Promise((resolve, reject) => {
      opened.transaction.oncomplete = () => resolve();
      opened.transaction.onabort = () => reject(opened.transaction.error);
    });
  }

  delete(store, name) {
    return done(this.#store(store, "readwrite").delete(name));
  }

  #store(store, mode = "readonly") {
    return this.connection.transaction(store, mode).objectStore(store);
  }
}

class Memory {
  constructor() {
    this.keeps = false;
    this.stores = Object.fromEntries(Object.keys(STORES).map((store) => [store, new Map()]));
  }

  async get(store, name) {
    return this.stores[store].get(name);
  }

  async all(store) {
    return [...this.stores[store].values()];
  }

  async put(store, record) {
    this.stores[store].set(record[STORES[store]], structuredClone(record));
  }

  async delete(store, name) {
    this.stores[store].delete(name);
  }
}

/** The page's records. `keeps`: whether they are there after the tab was closed. */
export async function openDatabase() {
  try {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      for (const [store, keyPath] of Object.entries(STORES)) request.result.createObjectStore(store, { keyPath });
    };
    return new Database(await done(request));
  } catch {
    return new Memory();
  }
}
