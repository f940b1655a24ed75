// Keep the end of a growing text in view, unless its reader has scrolled away from it.

export class Follow {
  /** `button` takes the reader back to the end, and shows only where there is a way to go. */
  constructor(scroller, button) {
    this.scroller = scroller;
    this.button = button;
    this.following = true;
    this.top = 0;
    scroller.addEventListener("scroll", () => this.#look(), { passive: true });
    button.addEventListener("click", () => this.toEnd());
    new ResizeObserver(() => this.grown()).observe(scroller);
  }

  toEnd() {
    this.following = true;
    this.grown();
  }

  /** The text has grown, or the window around it has changed. */
  grown() {
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.top = this.scroller.scrollTop;
    this.button.hidden = this.following || this.#rest() < 120;
  }

  #rest() {
    return this.scroller.scrollHeight - this.scroller.clientHeight - this.scroller.scrollTop;
  }

  #look() {
    const top = this.scroller.scrollTop;
    if (this.#rest() < 8) this.following = true;
    else if (top < this.top) this.following = false;
    this.top = top;
    this.button.hidden = this.following || this.#rest() < 120;
  }
}
