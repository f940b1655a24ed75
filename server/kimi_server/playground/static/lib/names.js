// Models' names as a reader knows them: without the folders of the machine that serves them.

const PATH = /^[\w .~:\\/@+-]+$/;
const HUB = /models--[^/\\]+--([^/\\]+)/; // a folder of the hub's cache, whose last part is a hash

/** Whether this is the small model of `make demo`, which knows one kind of text and plain words only. */
export const isDemo = (id) => /(^|[\\/_.-])demo([\\/_.-]|$)/i.test(id);

/** The last part of a path or of a hub's name. */
export function modelName(id) {
  if (!PATH.test(id)) return id;
  const last = id.split(/[\\/]/).filter(Boolean).at(-1) ?? id;
  if (isDemo(id) && ["model", "checkpoint"].includes(last)) return "Demo model";
  return HUB.exec(id)?.[1] ?? last;
}

/** A name for each of `ids`, which differ from each other. */
export function modelNames(ids) {
  const short = ids.map(modelName);
  return short.map((name, at) => (short.indexOf(name) === short.lastIndexOf(name) ? name : ids[at]));
}
