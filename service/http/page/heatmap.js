// The text of an example, coloured by what each token adds to its score.

import { onOneLine, signed, visible } from "./format.js";

const drawn = new WeakMap();

/** Fill an element with a result's text; what is there already is left alone. */
export function fillText(element, result) {
  const state = `${result.row} ${result.score} ${result.tokens ? "tokens" : "text"}`;
  if (drawn.get(element) === state) return;
  drawn.set(element, state);
  if (result.tokens) element.replaceChildren(...spans(result.tokens));
  else element.textContent = visible(result.text);
}

function spans(tokens) {
  const largest = Math.max(...strengths(tokens), Number.MIN_VALUE);
  return tokens.map(({ text, score }) => {
    const span = document.createElement("span");
    span.className = score < 0 ? "token lowered" : "token raised";
    span.textContent = visible(text);
    span.title = `${onOneLine(text)}\n${signed(score)}`;
    span.style.setProperty("--strength", `${Math.round((100 * Math.abs(score)) / largest)}%`);
    return span;
  });
}

function* strengths(tokens) {
  for (const { score } of tokens) yield Math.abs(score);
}

/** The tokens with the largest shares of the score, for a table. */
export function strongest(result, most = 8) {
  return (result.tokens ?? [])
    .map(({ text, score }, place) => ({ place, text: onOneLine(text), size: score }))
    .filter(({ size }) => size !== 0)
    .sort((a, b) => Math.abs(b.size) - Math.abs(a.size))
    .slice(0, most)
    .map((token) => ({ ...token, score: signed(token.size) }));
}
