// Formulas in Markdown: $…$ and \(…\) in a line, $$…$$ and \[…\] on their own. Here they stay text; see formulas.js.

const ENDS = { $$: "$$", "\\[": "\\]", "\\(": "\\)", $: "$" };
const OPENING = ["$$", "\\[", "\\(", "$"]; // the longer first

const opening = (text, at) => OPENING.find((mark) => text.startsWith(mark, at));

/** A plugin of markdown-it. */
export function maths(markdown) {
  markdown.inline.ruler.before("escape", "formula", inline);
  markdown.block.ruler.before("fence", "formula_block", block, { alt: ["paragraph", "blockquote", "list"] });
  const escape = markdown.utils.escapeHtml;
  markdown.renderer.rules.formula = (tokens, at) => `<span class="formula">${escape(tokens[at].content)}</span>`;
  markdown.renderer.rules.formula_shown = (tokens, at) =>
    `<span class="formula shown">${escape(tokens[at].content)}</span>`;
  markdown.renderer.rules.formula_block = (tokens, at) =>
    `<div class="formula shown">${escape(tokens[at].content)}</div>\n`;
}

function inline(state, silent) {
  const { src, pos } = state;
  const open = opening(src, pos);
  if (!open) return false;
  const from = pos + open.length;
  const to = closing(src, from, ENDS[open], state.posMax);
  if (to < 0 || !src.slice(from, to).trim()) return false;
  // $5 and $6 are prices: a formula has no space inside its dollars, and no digit behind them.
  if (open === "$" && (/\s/.test(src[from]) || /\s/.test(src[to - 1]) || /\d/.test(src[to + 1] ?? ""))) return false;
  if (!silent) {
    const displayed = open === "$$" || open === "\\[";
    state.push(displayed ? "formula_shown" : "formula", "", 0).content = src.slice(from, to).trim();
  }
  state.pos = to + open.length;
  return true;
}

function closing(text, from, end, most) {
  for (let at = text.indexOf(end, from); at >= 0 && at < most; at = text.indexOf(end, at + 1)) {
    if (end[0] === "\\" || text[at - 1] !== "\\") return at;
  }
  return -1;
}

/** A formula that begins its line and ends one; its lines are no lists or headings, whatever signs they begin with. */
function block(state, first, end, silent) {
  const text = (line) => state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]);
  const open = opening(text(first), 0);
  if (open !== "$$" && open !== "\\[") return false;
  const lines = [];
  for (let line = first; line < end; line += 1) {
    const rest = line === first ? text(line).slice(open.length) : text(line);
    const to = rest.indexOf(ENDS[open]);
    lines.push(to < 0 ? rest : rest.slice(0, to));
    if (to < 0) continue;
    if (rest.slice(to + open.length).trim()) return false;
    if (silent) return true;
    const token = state.push("formula_block", "", 0);
    token.content = lines.join("\n").trim();
    token.map = [first, line + 1];
    token.block = true;
    state.line = line + 1;
    return true;
  }
  return false;
}
