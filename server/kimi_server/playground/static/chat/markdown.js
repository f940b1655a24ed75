// Markdown as nodes of the page. HTML in it is text; what markdown-it makes is cleaned by DOMPurify.

import DOMPurify from "../vendor/dompurify/purify.js";
import MarkdownIt from "../vendor/markdown-it/markdown-it.min.js";
import { maths } from "./maths_rules.js";

const TAGS =
  "a blockquote br code del div em h1 h2 h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th thead tr ul";
const CLEAN = {
  ALLOWED_TAGS: TAGS.split(" "),
  ALLOWED_ATTR: ["class", "href", "start", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const markdown = new MarkdownIt({ html: false, linkify: true, breaks: true }).use(maths);
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false }); // main.rs is a file, not a page
// A page that anybody's text can make fetch something tells others who reads it: a picture is a link.
markdown.renderer.rules.image = (tokens, index) => {
  const escape = markdown.utils.escapeHtml;
  const address = tokens[index].attrGet("src");
  return `<a href="${escape(address)}">${escape(tokens[index].content || address)}</a>`;
};
// A style attribute would break the page's content security policy.
markdown.core.ruler.push("aligned", ({ tokens }) => {
  for (const token of tokens) {
    const align = /text-align:(\w+)/.exec(token.attrGet?.("style") ?? "")?.[1];
    if (!align) continue;
    token.attrs = token.attrs.filter(([name]) => name !== "style");
    token.attrSet("class", align);
  }
});

/** The blocks of a text, in order: {line, fragment()}. `line` is the first line of a block, `fragment()` makes its
 * nodes. `env` keeps the links' references from call to call. */
export function blocks(text, env) {
  const found = [];
  for (const token of markdown.parse(text, env)) {
    if (token.level === 0 && token.nesting >= 0) found.push({ line: token.map?.[0] ?? 0, tokens: [] });
    found.at(-1)?.tokens.push(token);
  }
  return found.map(({ line, tokens }) => ({ line, fragment: () => clean(tokens, env) }));
}

function clean(tokens, env) {
  const fragment = DOMPurify.sanitize(markdown.renderer.render(tokens, markdown.options, env), CLEAN);
  for (const link of fragment.querySelectorAll("a[href]")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  return fragment;
}
