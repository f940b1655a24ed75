// Decodes a file, or takes a text as it is, and hashes it, away from the page's own thread.

import { sha256 } from "../lib/sha256.js";
import { decode } from "./decoding.js";

addEventListener("message", async ({ data: { number, content } }) => {
  const found = typeof content === "string" ? { text: content, encoding: "utf-8" } : decode(new Uint8Array(content));
  if (!found) return postMessage({ number, found });
  const bytes = new TextEncoder().encode(found.text);
  return postMessage({ number, found: { ...found, bytes: bytes.length, sha256: await hash(bytes) } });
});

async function hash(bytes) {
  if (!crypto.subtle) return sha256(bytes);
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
