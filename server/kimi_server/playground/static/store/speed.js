// How long a prompt takes to be read: a·n + b·n² seconds for n tokens, since attention looks back at all before.

const FEWEST = 256; // tokens: below, a first token waits for other things than reading

/** What reading costs, without what was cached: tokens, and tokens times those before them. */
const linear = ({ tokens, cached }) => tokens - cached;
const square = ({ tokens, cached }) => (tokens ** 2 - cached ** 2) / 1e6;

export class Speed {
  constructor(each, growth) {
    this.each = each; // seconds a token
    this.growth = growth; // seconds a million pairs of tokens
  }

  /** The least squares over measured prompts {tokens, cached, seconds}; null where there is none to learn from. */
  static fit(prompts) {
    const known = prompts.filter((one) => linear(one) >= FEWEST && one.seconds > 0);
    if (!known.length) return null;
    const sum = (of) => known.reduce((total, one) => total + of(one), 0);
    const [xx, xy, yy] = [
      sum((one) => linear(one) ** 2),
      sum((one) => linear(one) * square(one)),
      sum((one) => square(one) ** 2),
    ];
    const [xt, yt] = [sum((one) => linear(one) * one.seconds), sum((one) => square(one) * one.seconds)];
    const determinant = xx * yy - xy * xy;
    const each = (xt * yy - yt * xy) / determinant;
    const growth = (yt * xx - xt * xy) / determinant;
    const both = determinant > 1e-9 * xx * yy && each > 0 && growth >= 0;
    return both ? new Speed(each, growth) : new Speed(xt / xx, 0);
  }

  /** Seconds to read a prompt of `tokens` of which `cached` are in the cache. */
  seconds(tokens, cached = 0) {
    return this.each * linear({ tokens, cached }) + this.growth * square({ tokens, cached });
  }

  /** How many tokens of the prompt are read after so many seconds, those cached included. */
  read(seconds, tokens, cached = 0) {
    let [low, high] = [cached, tokens];
    for (let step = 0; step < 40; step += 1) {
      const middle = (low + high) / 2;
      if (this.seconds(middle, cached) < seconds) low = middle;
      else high = middle;
    }
    return Math.round(low);
  }
}
