// Which estimators an index answers for, and the parameters of the one that is chosen.

import { visible } from "./format.js";

const UNKNOWN = { unavailable: null, by_gradients: true, summary: "", parameters: null };

/** What is known of the estimator that a form names; "" is the index's own. */
export function offerOf(estimators, form) {
  const offers = offersOf(estimators, form.index);
  const chosen = (offer) => (form.estimator === "" ? offer.own : offer.name === form.estimator);
  return offers.find(chosen) ?? { ...UNKNOWN, name: form.estimator };
}

function offersOf(estimators, index) {
  return estimators.flatMap(({ name, summary, by_gradients, indexes }) =>
    indexes
      .filter((offer) => offer.index === index)
      .map((offer) => ({ ...offer, name, summary, by_gradients })),
  );
}

/** The options of the form: the index's own estimator, the others, and one that only a link knows. */
export function choicesOf(estimators, form) {
  const offers = offersOf(estimators, form.index);
  const own = offers.find((offer) => offer.own);
  const others = offers.filter((offer) => !offer.own || offer.name === form.estimator);
  const known = form.estimator === "" || others.some((offer) => offer.name === form.estimator);
  return [
    { name: "", label: own ? `the index's own: ${visible(own.name)}` : "the index's own" },
    ...others,
    ...(known ? [] : [{ name: form.estimator }]),
  ].map(({ name, label, unavailable }) => ({
    name,
    label: label ?? visible(name),
    disabled: Boolean(unavailable),
    title: unavailable ? visible(unavailable) : null,
  }));
}

/** The options of what to compare an answer with. */
export function comparableOf(estimators, form) {
  const [, ...named] = choicesOf(estimators, { index: form.index, estimator: form.compare });
  const own = offersOf(estimators, form.index).find((offer) => offer.own);
  const missing = own && !named.some(({ name }) => name === own.name);
  const listed = { disabled: false, title: null };
  const others = missing ? [{ ...listed, name: own.name, label: visible(own.name) }] : [];
  return [{ ...listed, name: "", label: "nothing" }, ...others, ...named];
}

/** The parameters to ask for; of an estimator that is not known, those that were typed. */
export function parametersOf(offer, typed) {
  const parameters = offer.parameters ?? Object.fromEntries(typedNames(typed));
  return Object.entries(parameters).map(([name, parameter]) => ({
    name,
    label: labelOf(name),
    summary: parameter.summary ? visible(parameter.summary) : null,
    placeholder: String(parameter.default ?? ""),
    least: parameter.least ?? null,
    most: parameter.most ?? null,
  }));
}

function typedNames(typed) {
  return Object.keys(typed)
    .filter((name) => typed[name] !== "")
    .map((name) => [name, {}]);
}

function labelOf(name) {
  const words = visible(name).replaceAll("_", " ");
  return words.slice(0, 1).toUpperCase() + words.slice(1);
}

/** An estimator with its parameters, as "ekfac (damping 0.1)". */
export function estimatorText(name, parameters) {
  const values = Object.entries(parameters).map(([key, value]) => `${key} ${value}`);
  return visible(values.length ? `${name} (${values.join(", ")})` : name);
}
