// What an answer says, made ready to show.

import { estimatorText } from "./estimators.js";
import { count, counted, duration, number, percent, signed, valueText, visible } from "./format.js";
import { strongest } from "./heatmap.js";

const SIDES = {
  proponents: ["Proponents", "raised it"],
  opponents: ["Opponents", "lowered it"],
};

/** Results by direction, near-duplicates folded under the best of their cluster; `shares` and `removals` of them. */
export function sidesOf(results, shares = [], removals = []) {
  return Object.entries(SIDES)
    .map(([direction, [title, what]]) => {
      const rows = results.filter((result) => result.direction === direction);
      const told = [...shares, ...removals].filter((one) => one.direction === direction);
      const share = told.map((one) => one.sentence).join(" ");
      return { direction, title, what, share, found: rows.length, groups: groupsOf(rows) };
    })
    .filter((side) => side.groups.length > 0);
}

function groupsOf(results) {
  const clusters = new Map();
  for (const result of results) {
    const own = result.cluster === null || result.cluster === undefined;
    const key = own ? `row ${result.row}` : `cluster ${result.cluster}`;
    if (!clusters.has(key)) clusters.set(key, []);
    clusters.get(key).push(cardOf(result));
  }
  return [...clusters.values()].map(([first, ...more]) => ({
    key: first.key,
    first,
    more,
    folded: counted(more.length, "near-duplicate"),
  }));
}

function cardOf(result) {
  const id = visible(result.id);
  const metadata = Object.entries(result.metadata).map(([name, value]) => ({
    name: visible(name),
    text: valueText(value),
  }));
  return {
    key: `${result.direction} ${result.row}`,
    result,
    rank: `${result.rank}`,
    name: `Rank ${result.rank}`,
    score: signed(result.score),
    raised: result.score >= 0,
    normalised: result.normalised_score === null ? "" : signed(result.normalised_score),
    removal: removalOf(result.effect_of_removal),
    document: visible(result.document),
    facts: [
      ["id", id],
      ["row", count(result.row)],
      ["gradient norm", number(result.gradient_norm)],
      ["estimate of the first stage", signed(result.proxy)],
    ].map(([name, text]) => ({ name, text })),
    metadata,
    described: [{ name: "id", text: id }, ...metadata],
    strongest: strongest(result),
  };
}

/** What leaving a result out would do, where the scale of scores was measured; else "". */
function removalOf(removal) {
  if (!removal) return "";
  const exact = removal.low === removal.high;
  if (exact) return `without it ${signed(removal.nats)} nats, to first order`;
  return (
    `without it ${signed(removal.nats)} nats (${signed(removal.low)} to ${signed(removal.high)} ` +
    `at ${percent(removal.confidence)} confidence), to first order`
  );
}

/** What a score is, and what one unit of it is worth or why that is not known. */
export function unitOf(answer) {
  const { effect } = answer;
  if (!answer.by_gradients) return answer.sign_and_unit;
  if (!effect) return `${answer.sign_and_unit} ${answer.effect_reason ?? ""}`;
  return (
    `${answer.sign_and_unit} One unit of score is worth ${signed(effect.nats_per_unit)} nats (${signed(effect.low)} to ` +
    `${signed(effect.high)} at ${percent(effect.confidence)} confidence). ${effect.measured_by}`
  );
}

/** What the scores mean, in a line. */
export function meaningOf({ sign_and_unit: unit, influences }) {
  if (!unit.includes("no change of log p")) return `${unit.split(". ")[0].replace(/\.$/, "")}.`;
  const normalised = influences ? " Normalised: per norm of the example\u2019s gradient." : "";
  return (
    "A score ranks the examples of this question and is no change of log p: nats of effect come only " +
    `through a measured scale.${normalised}`
  );
}

/** What was explained: each term in words, and the value when there is more than one part to it. */
export function measurementOf(measurement) {
  const terms = measurement.terms.map((term, key) => ({
    key,
    prompt: visible(term.prompt),
    said: visible(term.completion),
    by: term.completed_by_model ? "the model's own completion" : "the completion given",
    how: probability(term.log_probability, term.completion_tokens),
    against: term.against === null ? null : visible(term.against).trimStart(),
    caution: term.caution,
    unsaid: term.against_log_probability === null ? "" : probability(term.against_log_probability),
  }));
  const contrast = terms.some((term) => term.against !== null);
  return { terms, difference: contrast ? `${signed(measurement.value)} nats` : null };
}

function probability(nats, tokens) {
  const over = tokens ? ` over ${counted(tokens, "token")}` : "";
  return `log p = ${signed(nats)} nats${over} (probability ${number(100 * Math.exp(nats))}%)`;
}

const STATUS = {
  certified: { icon: "\u2713", kind: "good" },
  exhaustive: { icon: "\u2713", kind: "good" },
  "not certified": { icon: "\u25cb", kind: "open" },
  refused: { icon: "\u2715", kind: "bad" },
};

/** A certificate; `sided` if the answer has both directions. */
export function certificateOf(certificate, key, sided) {
  const { type, status, direction, observed, recall_target: target } = certificate;
  return {
    key,
    title: `${type[0].toUpperCase()}${type.slice(1)} certificate`,
    side: sided ? SIDES[direction][0].toLowerCase() : "",
    status,
    ...STATUS[status],
    sentence: certificate.sentence,
    ...boundOf(certificate.recall_lower_bound, target, type === "calibration"),
    confidence: percent(certificate.confidence),
    scope: certificate.scope,
    over: certificate.probability_over,
    assumptions: certificate.assumptions.length ? certificate.assumptions : ["nothing"],
    observed: Object.entries(observed).map(([name, value]) => ({
      name: name.replaceAll("_", " "),
      text: typeof value === "number" ? number(value) : String(value),
    })),
  };
}

/**
 * A recall bound as a bar; `bar` and `mark` hold styles that are set one by one, as the page's
 * policy asks. `ofQueries`: it is about most queries of a kind and not about this answer.
 */
export function boundOf(bound, target, ofQueries = false) {
  const known = bound !== null;
  const where = ofQueries ? " in most queries like it" : "";
  const claim = known ? `Recall is at least ${percent(bound)}${where}` : "No bound on recall";
  return {
    bound: claim,
    target: `asked for: ${percent(target)}`,
    spoken: `${claim}; asked for: ${percent(target)}`,
    known,
    bar: { width: known ? percent(bound) : "0%" },
    mark: { left: percent(target) },
  };
}

/** What certifying an answer would take, where that is known; stored answers may not have it. */
function wantingOf(answer) {
  const seconds = answer.seconds_to_certify ?? null;
  if (seconds === null) return "";
  const rows = counted(answer.rows_to_certify, "more row");
  return ` Certifying it takes about ${rows}, ${duration(seconds)}.`;
}

/** How the answer was found, in a sentence, and what certifying it would take. */
export function effortOf(answer) {
  const seconds = Object.values(answer.seconds).reduce((sum, part) => sum + part, 0);
  return (
    `${count(answer.rescored_rows)} of ${counted(answer.rows, "row")} rescored and ` +
    `${count(answer.sampled_rows)} sampled, in ${duration(seconds)}; index ` +
    `\u201c${answer.index}\u201d, estimator ${estimatorText(answer.estimator, answer.parameters)}, ` +
    `ranked by ${answer.ranking === "score" ? "score" : "normalised score"}, seed ${answer.seed}.` +
    wantingOf(answer)
  );
}

/** A table of whole documents, most influential first; null where none was asked for. */
export function documentsOf(answer) {
  if (answer.documents.length === 0) return null;
  const rows = answer.documents.map((document) => [
    visible(document.document),
    document.score === null ? "not scored" : signed(document.score),
    count(document.rows),
    count(document.found),
  ]);
  const titles = ["Document", "Score", "Rows", "Among the results"];
  const columns = titles.map((title, place) => ({ title, figure: place > 0 }));
  return { columns, groups: [{ title: "", rows }] };
}
