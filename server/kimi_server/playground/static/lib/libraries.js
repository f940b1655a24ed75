// The libraries of others that not every visit needs, each loaded when it is first used.

const url = (path) => new URL(`../vendor/${path}`, import.meta.url).href;

/** `load()`, once; again where it failed. */
function once(load) {
  let loaded = null;
  return () =>
    (loaded ??= load().catch((error) => {
      loaded = null;
      throw error;
    }));
}

function element(tag, attributes) {
  return new Promise((resolve, reject) => {
    const made = Object.assign(document.createElement(tag), attributes);
    made.addEventListener("load", resolve);
    made.addEventListener("error", () => reject(new Error(`${attributes.src ?? attributes.href} did not load`)));
    document.head.append(made);
  });
}

export const katex = once(async () => {
  await Promise.all([
    element("link", { rel: "stylesheet", href: url("katex/katex.min.css") }),
    element("script", { src: url("katex/katex.min.js") }),
  ]);
  return globalThis.katex;
});

export const highlighter = once(async () => (await import(url("highlight/highlight.min.js"))).default);

export const pdfjs = once(async () => {
  const library = await import(url("pdfjs/pdf.min.js"));
  library.GlobalWorkerOptions.workerSrc = url("pdfjs/pdf.worker.min.js");
  return library;
});
