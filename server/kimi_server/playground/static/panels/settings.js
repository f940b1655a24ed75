// The settings of a conversation: its system prompt, and how answers are drawn.

const NUMBERS = {
  temperature: { name: "Temperature", least: 0, most: 2 },
  top_p: { name: "Top-p", least: 0, most: 1, above: true },
  max_tokens: { name: "Longest answer", least: 1, most: 10_000_000, whole: true },
};

export class Settings {
  /** `changed(settings)` is called with valid settings; `current()` gives those of the conversation. */
  constructor(form, { current, changed }) {
    Object.assign(this, { form, current, changed });
    form.addEventListener("input", () => this.#read());
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      form.hidePopover();
    });
    form.addEventListener("beforetoggle", () => this.show());
    form.querySelector(".reset").addEventListener("click", () => {
      this.changed({ system: "", temperature: null, top_p: null, max_tokens: null });
      this.show();
    });
  }

  show() {
    const settings = this.current();
    for (const [field, value] of Object.entries(settings)) this.form.elements[field].value = value ?? "";
    this.#tell("");
  }

  #read() {
    const { elements } = this.form;
    const settings = { ...this.current(), system: elements.system.value };
    for (const [field, { name, least, most, whole, above }] of Object.entries(NUMBERS)) {
      const { value, validity } = elements[field];
      const number = value === "" ? null : Number(value);
      const fits =
        number === null ||
        (number >= least && number <= most && !(above && number === least) && !(whole && !Number.isInteger(number)));
      const bad = validity.badInput || !fits;
      elements[field].setAttribute("aria-invalid", bad);
      if (bad) {
        const kind = whole ? "a whole number" : "a number";
        const range = above ? `above ${least} and at most ${most}` : `from ${least} to ${most}`;
        return this.#tell(`${name} must be ${kind} ${range}, or empty.`);
      }
      settings[field] = number;
    }
    this.#tell("");
    return this.changed(settings);
  }

  #tell(sentence) {
    const place = this.form.querySelector(".problem");
    place.textContent = sentence;
    place.hidden = !sentence;
  }
}
