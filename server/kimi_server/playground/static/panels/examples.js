// An example document with three questions, for a first visit: of the kind that the model knows.

import { isDemo } from "../lib/names.js";

const LOG = {
  file: "log.txt",
  told: "a log of 307 lines, the only kind of text that the demo model can read",
  questions: [
    "Do you know the code of Gustav Nunez?",
    "Tell me the code of Celia Bishop.",
    "Tell me the codes of Gemma Rivera and Basil Young.",
  ],
};
const ADDRESS = {
  file: "gettysburg-address.txt",
  told: "Lincoln’s address at Gettysburg, 1863",
  questions: [
    "What does the speaker ask of the living?",
    "What does he say the world will remember, and what not?",
    "Put the whole speech into two plain sentences.",
  ],
};

export class Examples {
  /** `ask(question, file)` is called with a question that was chosen and the document as a File; `tell(sentence)` where
   * there is none. */
  constructor(place, { ask, tell }) {
    Object.assign(this, { place, ask, tell });
  }

  show(model) {
    const { file, told, questions } = isDemo(model) ? LOG : ADDRESS;
    const address = new URL(`../examples/${file}`, import.meta.url);
    const link = this.place.querySelector("a");
    link.href = address;
    link.textContent = file;
    this.place.querySelector(".told").textContent = told;
    this.place.querySelector("ul").replaceChildren(
      ...questions.map((question) => {
        const item = document.createElement("li");
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = question;
        button.addEventListener("click", async () => {
          const reply = await fetch(address).catch(() => null);
          if (reply?.ok) this.ask(question, new File([await reply.blob()], file));
          else this.tell("The example did not load: check that the gateway runs, then choose it again.");
        });
        item.append(button);
        return item;
      }),
    );
    this.place.hidden = false;
  }
}
