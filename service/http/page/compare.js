// Two answers to one question side by side: which examples either has, and at which rank.

import { estimatorText } from "./estimators.js";
import { counted, onOneLine, signed, visible } from "./format.js";

const SHOWN = 160; // characters of each example
const NONE = "\u2013";

/** What the comparison shows: a table, a sentence on how far they agree, and what to know. */
export function comparisonOf(first, second) {
  const names = [first, second].map((one) => estimatorText(one.estimator, {}));
  const figures = [...names.map((name) => `Rank, ${name}`), ...names.map((n) => `Score, ${n}`)];
  const rows = rowsOf(first, second);
  const both = rows.filter((row) => row.found[0] && row.found[1]);
  const alone = (place) => rows.filter((row) => !row.found[1 - place]);
  const groups = [
    { title: `Among the best of both: ${both.length}`, rows: both },
    ...names.map((name, place) => ({
      title: `Only ${name}: ${alone(place).length}`,
      rows: alone(place),
    })),
  ].filter((group) => group.rows.length > 0);
  return {
    kind: "",
    title: `${names[0]} beside ${names[1]}`,
    line: `${both.length} of ${counted(rows.length, "example")} are among the best of both. A dash: `
      + "not among the examples asked for.",
    note: visible([unitOf(second, names[1]), ...second.notes].join(" ")),
    columns: [{ title: "Example", figure: false }, ...figures.map(figure)],
    groups: groups.map(({ title, rows: own }) => ({ title, rows: own.map(textsOf) })),
  };
}

/** What is shown in place of a comparison. */
export function noComparison(title, line = "", kind = "") {
  return { title: visible(title), line: visible(line), kind, note: "", columns: [], groups: [] };
}

function unitOf(answer, name) {
  return answer.sign_and_unit.replace(/^score:/, `Scores of ${name}:`);
}

function figure(title) {
  return { title, figure: true };
}

function rowsOf(...answers) {
  const rows = new Map();
  answers.forEach((answer, place) => {
    for (const result of answer.results) {
      const key = `${result.direction} ${result.row}`;
      if (!rows.has(key)) rows.set(key, { result, found: [null, null] });
      rows.get(key).found[place] = result;
    }
  });
  return [...rows.values()];
}

function textsOf({ result, found }) {
  const text = onOneLine(result.text);
  const shown = text.length > SHOWN ? `${text.slice(0, SHOWN - 1)}\u2026` : text;
  const ranks = found.map((one) => (one ? `${one.rank}` : NONE));
  return [shown, ...ranks, ...found.map((one) => (one ? signed(one.score) : NONE))];
}
