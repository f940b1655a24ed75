// Formulas set by KaTeX, which is loaded with the first of them. One that it cannot set stays as it was written.

import { katex } from "../lib/libraries.js";

const LIMITS = { trust: false, maxExpand: 500, maxSize: 20 };
// KaTeX would give these a style attribute, which the page's content security policy refuses.
const MACROS = { "\\pmb": "\\boldsymbol{#1}", "\\fcolorbox": "\\boxed{#3}" };

let library = null;

/** Set the formulas within `root`: at once where KaTeX is here already, else when it is, if they are `final`. */
export function setFormulas(root, final) {
  const found = [...root.querySelectorAll(".formula")];
  if (!found.length) return;
  if (library) found.forEach(set);
  else {
    katex().then(
      (loaded) => {
        library = loaded;
        if (final) found.forEach(set);
      },
      () => {}, // the formulas can be read as they were written
    );
  }
}

function set(element) {
  const source = element.textContent;
  const options = {
    ...LIMITS,
    macros: { ...MACROS },
    strict: "ignore",
    displayMode: element.classList.contains("shown"),
  };
  const place = document.createElement(element.tagName);
  try {
    library.render(source, place, options);
  } catch {
    return;
  }
  if (options.displayMode) place.tabIndex = 0; // a long one scrolls, by keyboard as well
  place.className = options.displayMode ? "formula shown set" : "formula set";
  element.replaceWith(place);
}
