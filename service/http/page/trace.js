// Has a question traced through the run, as a job of the service.

import { Problem, reach } from "./stream.js";

/** Title of the problem of a question that a job can trace. */
export const UNTRACED = "The question was not traced";

/** What is said while a job is in a state. */
export const TRACING = {
  queued: "Sent to be traced through the run; it waits for its turn.",
  running: "The question is traced through the run. That goes on, whether you wait or not.",
};

const POLL_MS = 2000;
const JSON_HEADERS = { "Content-Type": "application/json", Accept: "application/json" };

/**
 * Send a query as a job and wait for its end; the job goes on if nobody waits.
 *
 * @param {string} body the request, as JSON.
 * @param {AbortSignal} signal ends the waiting.
 * @param {(state: string) => void} report called with the job's state: "queued", "running".
 * @throws {Problem} the job was refused, or its query has a problem for an answer.
 */
export async function traceAsJob(body, signal, report) {
  const sent = { method: "POST", headers: JSON_HEADERS, body: `{"queries":[${body}]}`, signal };
  let job = await (await reach("v1/jobs", sent)).json();
  while (job.state !== "finished") {
    report(job.state);
    await pause(signal);
    job = await (await reach(`v1/jobs/${job.id}`, { headers: JSON_HEADERS, signal })).json();
  }
  if (job.failed === 0) return;
  const outcome = await reach(`v1/jobs/${job.id}/results`, { headers: JSON_HEADERS, signal });
  const { problem } = (await outcome.json()).results[0];
  throw new Problem(problem.title, problem.detail, problem.status);
}

function pause(signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, POLL_MS);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
