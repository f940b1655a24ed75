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

/** How long something will take, no finer than it is known: 4 s, 40 s, 3 min, 1 h 20 min. */
export function duration(number) {
  if (number < 10) return `${Math.max(1, Math.round(number))} s`;
  if (number < 90) return `${Math.round(number / 5) * 5} s`;
  const minutes = Math.round(number / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** Tokens that are estimated: 420, 3,100, 812,000. */
export function rough(number) {
  const step = 10 ** Math.max(0, Math.floor(Math.log10(Math.max(1, number))) - 1);
  return WHOLE.format(number < 1e5 ? Math.round(number / step) * step : Math.round(number / 1000) * 1000);
}

/** Milliseconds since 1970 as a day and a time. */
export const when = (time) =>
  new Date(time).toLocaleString("en", {
    day: "numeric",
    month: "short",
    hour: "2-digit",
    minute: "2-digit",
    hour12: false,
  });

/** Bytes of a text in UTF-8. */
export const utf8Bytes = (text) => new TextEncoder().encode(text).length;
