// Figures as a reader wants them.

const WHOLE = new Intl.NumberFormat("en");

/** Tokens: 131,072. */
export const count = (number) => WHOLE.format(number);

/** Bytes in powers of 1024, as the server counts memory: 512 B, 41.4 MiB. */
export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let step = 0;
  for (; number >= 1000 && step < units.length - 1; step += 1) number /= 1024;
  return `${step && number < 100 ? number.toFixed(1) : Math.round(number)} ${units[step]}`;
}

/** Seconds: 0.08 s, 3.2 s, 84 s. */
export function seconds(number) {
  return `${number.toFixed(number < 1 ? 2 : number < 10 ? 1 : 0)} s`;
}

/** A part of a whole: 0%, <0.1%, 12.3%, 100%. */
export function share(part, whole) {
  const percent = (100 * part) / whole;
  if (percent === 0 || percent === 100) return `${percent}%`;
  return percent < 0.1 ? "<0.1%" : `${Math.min(percent, 99.9).toFixed(1)}%`;
}
