// What is asked: the form's fields, the request they make, and the link that holds them.

export const CHOICES = {
  direction: ["proponents", "opponents", "both"],
  ranking: ["normalised", "score"],
  until: ["sketch", "calibration"],
};
export const CONDITIONS = ["any_of", "at_least", "at_most"];
const NUMBERS = ["k", "recall", "confidence", "budget"];
const LISTS = ["filters", "parameters"]; // fields of their own in a link
const OPTIONAL = ["deadline", "length"];
const SWITCHES = ["chat", "contrast", "space", "tokens", "layers", "documents", "clusters"];

/** The fields before anything is typed; numbers are kept as they are typed. */
export function emptyForm() {
  return {
    prompt: "",
    completion: "", // the model's own
    against: "",
    chat: false,
    contrast: false,
    space: true,
    index: "default",
    estimator: "", // the index's own
    compare: "", // nothing
    parameters: {}, // of any estimator, by name
    direction: "proponents",
    ranking: "normalised",
    until: "sketch",
    k: "10",
    recall: "0.9",
    confidence: "0.95",
    budget: "1000",
    deadline: "",
    length: "",
    seed: "",
    tokens: true,
    layers: true,
    documents: false,
    clusters: true,
    filters: [],
  };
}

let filterNumber = 0;

/** A row of the filters. */
export function newFilter(column = "", kind = "any_of", value = "") {
  return { number: filterNumber++, column, kind, value };
}

/**
 * The request's body, as JSON; `byGradients` and `parameters` (names) are what the estimator takes.
 */
export function toBody(form, { byGradients, parameters }) {
  const { prompt } = form;
  const request = form.chat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  if (form.completion !== "") request.completion = spaced(form, form.completion);
  if (form.contrast) request.against = spaced(form, form.against);
  request.index = form.index;
  if (form.estimator !== "") request.estimator = form.estimator;
  const typed = parameters.filter((name) => (form.parameters[name] ?? "") !== "");
  const numbers = typed.map((name) => [name, Number(form.parameters[name])]);
  if (numbers.length > 0) request.parameters = Object.fromEntries(numbers);
  for (const name of Object.keys(CHOICES)) request[name] = form[name];
  for (const name of NUMBERS) request[name] = Number(form[name]);
  if (form.deadline !== "") request.deadline = Number(form.deadline);
  if (form.length !== "") request.max_new_tokens = Number(form.length);
  const parts = byGradients ? ["tokens", "layers"] : [];
  for (const name of [...parts, "documents", "clusters"]) request[name] = form[name];
  request.filters = conditions(form.filters);
  const body = JSON.stringify(request);
  // A seed can exceed what a JavaScript number holds exactly, so its digits go in as they are.
  return /^\d+$/.test(form.seed) ? `${body.slice(0, -1)},"seed":${BigInt(form.seed)}}` : body;
}

/** Whether what was said is a text of its own words, which begin with a space. */
export function takesSpace(form) {
  return !form.chat && (form.completion !== "" || form.contrast);
}

function spaced(form, text) {
  return form.space && takesSpace(form) && !/^\s/.test(text) ? ` ${text}` : text;
}

function conditions(filters) {
  const columns = new Map();
  for (const { column, kind, value } of filters) {
    if (column === "") continue;
    const asked = columns.get(column) ?? {};
    if (kind === "any_of") {
      const values = value.split("\n").filter((line) => line !== "");
      asked.any_of = [...(asked.any_of ?? []), ...values.map(scalar)];
    } else {
      const bound = scalar(value);
      asked[kind] = typeof bound === "boolean" ? value : bound;
    }
    columns.set(column, asked);
  }
  return Object.fromEntries(columns);
}

/** `2019` is a number, `true` a truth value, `"2019"` and all else a text. */
function scalar(written) {
  try {
    const value = JSON.parse(written);
    return ["number", "boolean", "string"].includes(typeof value) ? value : written;
  } catch {
    return written;
  }
}

/** The fields as a link's fragment, which browsers keep to themselves. */
export function toHash(form) {
  const fields = new URLSearchParams();
  for (const [name, value] of Object.entries(form)) {
    if (LISTS.includes(name) || value === "") continue;
    fields.set(name, SWITCHES.includes(name) ? Number(value) : value);
  }
  for (const [name, value] of Object.entries(form.parameters)) {
    if (value !== "") fields.append("parameter", `${name}=${value}`);
  }
  for (const { column, kind, value } of form.filters) {
    fields.append("filter", JSON.stringify([column, kind, value]));
  }
  return `#${fields}`;
}

/** The form that a fragment describes; null if it describes none. What it gets wrong is left out. */
export function fromHash(hash) {
  const fields = new URLSearchParams(hash.replace(/^#/, ""));
  if (!fields.has("prompt")) return null;
  const form = emptyForm();
  for (const [name, value] of fields) {
    if (!Object.hasOwn(form, name) || LISTS.includes(name)) continue;
    if (SWITCHES.includes(name)) form[name] = value === "1";
    else if (fits(name, value)) form[name] = value;
  }
  if (fields.get("complete") === "1") form.completion = ""; // of earlier versions
  const parameters = fields.getAll("parameter").map(readParameter);
  form.parameters = Object.fromEntries(parameters.filter((pair) => pair !== null));
  form.filters = fields.getAll("filter").map(readFilter).filter((row) => row !== null);
  return form;
}

function fits(name, value) {
  if (CHOICES[name]) return CHOICES[name].includes(value);
  if (name === "seed") return /^\d+$/.test(value);
  return ![...NUMBERS, ...OPTIONAL].includes(name) || Number.isFinite(Number(value));
}

function readParameter(text) {
  const [, name, value] = /^([a-z][a-z0-9_]*)=(.+)$/.exec(text) ?? [];
  return name && Number.isFinite(Number(value)) ? [name, value.trim()] : null;
}

function readFilter(text) {
  try {
    const parts = JSON.parse(text);
    const wellFormed = Array.isArray(parts) && parts.every((part) => typeof part === "string");
    return wellFormed && CONDITIONS.includes(parts[1]) ? newFilter(...parts) : null;
  } catch {
    return null;
  }
}
