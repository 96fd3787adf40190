// Asks the service and hands on its events.

import { createParser } from "./vendor/eventsource-parser.js";

/** What went wrong, as a problem document says it. */
export class Problem extends Error {
  constructor(title, detail, status = null) {
    super(detail);
    this.title = title;
    this.status = status;
  }
}

/**
 * Send a query and report each event as it arrives.
 *
 * @param {string} body the request, as JSON.
 * @param {AbortSignal} signal hangs up.
 * @param {(name: string, data: object, text: string) => void} report called with each event but
 *   `error`.
 * @throws {Problem} the query was refused, failed, or its stream broke off.
 */
export async function ask(body, signal, report) {
  const response = await reach("v1/query/stream", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body,
    signal,
  });
  let ended = false;
  const parser = createParser({
    onEvent({ event, data }) {
      const content = parse(data);
      if (event === "error") throw new Problem(content.title, content.detail, content.status);
      ended ||= event === "result";
      report(event, content, data);
    },
  });
  try {
    await feed(response.body, parser);
  } catch (error) {
    if (error instanceof Problem || signal.aborted) throw error;
    throw new Problem("The connection broke off", `The answer had not ended: ${error.message}.`);
  }
  if (!ended) {
    throw new Problem("The connection ended early", "The answer had not come; ask again.");
  }
}

async function feed(stream, parser) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    parser.feed(value);
  }
}

/** Questions to begin with; none where the service has none to offer. */
export async function fetchSuggestions(index) {
  try {
    const headers = { Accept: "application/json" };
    const address = `v1/suggestions?index=${encodeURIComponent(index)}`;
    return (await (await reach(address, { headers })).json()).suggestions;
  } catch {
    return [];
  }
}

/** The indexes that are served. */
export async function fetchIndexes() {
  const response = await reach("v1/index", { headers: { Accept: "application/json" } });
  return (await response.json()).indexes;
}

/** The estimators, and which of them each index answers for. */
export async function fetchEstimators() {
  const response = await reach("v1/estimators", { headers: { Accept: "application/json" } });
  return (await response.json()).estimators;
}

/** A response that is no problem. */
export async function reach(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Problem("The service cannot be reached", "Is it running, and are you online?");
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function problemOf(response) {
  const text = await response.text();
  try {
    const { title, detail } = JSON.parse(text);
    if (title && detail) return new Problem(title, detail, response.status);
  } catch {
    // Not the service's own answer but, say, a proxy's: only its status is known.
  }
  const title = `Status ${response.status} ${response.statusText}`.trim();
  return new Problem(title, "The service, or what stands before it, gave no reason.");
}

/** JSON whose whole numbers beyond 2^53 stay exact, as their digits. */
export function parse(text) {
  return JSON.parse(text, (key, value, context) => {
    const rounded = typeof value === "number" && !Number.isSafeInteger(value);
    return rounded && /^-?\d+$/.test(context?.source ?? "") ? context.source : value;
  });
}
