// The page: one Alpine component, whose state the markup shows.

import { Alpine } from "./vendor/alpine-csp.js";
import {
  boundOf, certificateOf, documentsOf, effortOf, meaningOf, measurementOf, sidesOf, unitOf,
} from "./answer.js";
import { clamped } from "./clamped.js";
import { comparisonOf, noComparison } from "./compare.js";
import { save, toCsv } from "./download.js";
import { choicesOf, comparableOf, offerOf, parametersOf } from "./estimators.js";
import { count, counted, duration, onOneLine, visible } from "./format.js";
import { emptyForm, fromHash, newFilter, takesSpace, toBody, toHash } from "./form.js";
import { fillText } from "./heatmap.js";
import { drawLayers, layerTableOf, sumLayers } from "./layers.js";
import {
  ask, fetchEstimators, fetchIndexes, fetchSuggestions, parse, Problem,
} from "./stream.js";
import { fillTable } from "./tables.js";
import { traceAsJob, TRACING, UNTRACED } from "./trace.js";

const STAGES = ["Gradient", "Candidates", "Rescoring"];
const EXPLANATIONS = [ // and whether gradients are needed
  ["tokens", "tokens, as a heat map", true],
  ["layers", "layers of the model", true],
  ["clusters", "near-duplicates, folded", false],
  ["documents", "whole documents", false],
];
const QUIET_MS = 5000; // between two things that a screen reader is told while rows are rescored
const RETRY_MS = 5000;

/** Nothing to show yet; `influence`: scores will be influences, not, say, similarities of texts. */
function noAnswer(influence = true) {
  return {
    influence,
    stage: 0,
    line: "",
    problem: null,
    measurement: null,
    found: {},
    sides: [],
    bounds: [],
    certificates: [],
    documents: null,
    layers: [],
    note: "",
    meaning: "",
    effort: "",
    partial: false,
    unit: "",
  };
}

/** The answer as it came, kept out of the reactive state: it can be large. */
let answerText = "";
let controller = null;
let spokenAt = 0;

function page() {
  return {
    form: emptyForm(),
    indexes: [],
    estimators: [],
    suggestions: [],
    indexProblem: "",
    notice: "",
    state: "idle", // idle, running, finished, cancelled, failed
    shown: noAnswer(),
    comparison: null,
    untraced: null, // name of the estimator that the question can be traced for
    spoken: "",
    sizes: false,
    dark: false,

    init() {
      this.readLink();
      addEventListener("hashchange", () => this.readLink());
      addEventListener("keydown", (event) => this.onKey(event));
      const scheme = matchMedia("(prefers-color-scheme: dark)");
      this.dark = scheme.matches;
      scheme.addEventListener("change", () => (this.dark = scheme.matches));
      this.loadIndexes();
      this.loadEstimators();
    },

    async loadIndexes() {
      try {
        this.indexes = (await fetchIndexes()).map((index) => ({
          name: index.name,
          label: `${visible(index.name)} (${counted(index.rows, "example")})`,
          chats: index.chat_template,
        }));
        this.indexProblem = "";
        const names = this.indexes.map((index) => index.name);
        if (this.form.index === "default" && !names.includes("default")) this.form.index = names[0];
        this.$watch("form.index", () => this.loadSuggestions());
        await this.loadSuggestions();
      } catch (error) {
        this.indexProblem = `${error.title ?? "The indexes are unknown"}. ${error.message}`;
        if (error.status === 503) setTimeout(() => this.loadIndexes(), RETRY_MS);
      }
    },

    async loadEstimators() {
      try {
        this.estimators = await fetchEstimators();
      } catch (error) {
        // Without the list, the index's own estimator can still be asked.
        if (error.status === 503) setTimeout(() => this.loadEstimators(), RETRY_MS);
      }
    },

    async loadSuggestions() {
      const { index } = this.form;
      const found = await fetchSuggestions(index);
      if (index !== this.form.index) return;
      this.suggestions = found.map(({ prompt }) => ({ prompt, label: onOneLine(prompt) }));
    },

    get suggests() {
      return this.suggestions.length > 0 && this.form.prompt === "" && !this.hasStarted;
    },
    take({ prompt }) {
      Object.assign(this.form, { prompt, completion: "", chat: false, contrast: false });
      this.$refs.ask.focus();
    },
    get canChat() {
      return this.form.chat || this.indexes.some((i) => i.name === this.form.index && i.chats);
    },
    get spaces() {
      return takesSpace(this.form);
    },
    get explanations() {
      return EXPLANATIONS.map(([name, label, split]) => ({
        name, label, disabled: split && !this.byGradients,
      }));
    },

    get indexChoices() {
      const known = this.indexes.some((index) => index.name === this.form.index);
      const own = { name: this.form.index, label: visible(this.form.index) };
      return known ? this.indexes : [own, ...this.indexes];
    },
    get estimatorChoices() {
      return choicesOf(this.estimators, this.form);
    },
    get compareChoices() {
      return comparableOf(this.estimators, this.form);
    },
    get offer() {
      return offerOf(this.estimators, this.form);
    },
    get parameters() {
      return parametersOf(this.offer, this.form.parameters);
    },
    get estimatorNote() {
      const { unavailable, summary } = this.offer;
      return visible(unavailable ? `Not for this index: ${unavailable}` : summary);
    },
    get byGradients() {
      return this.offer.by_gradients;
    },
    openOptions() {
      this.$refs.options.open = true;
    },

    // The link

    readLink() {
      if (location.hash === toHash(this.form)) return;
      const form = fromHash(location.hash);
      if (!form) return;
      this.cancel();
      controller?.abort();
      this.comparison = null;
      this.form = form;
      this.state = "idle";
      this.shown = noAnswer();
      this.notice = "Filled in from a link. Nothing was sent yet: look it over, then ask.";
    },

    async copyLink() {
      history.replaceState(null, "", toHash(this.form));
      try {
        await navigator.clipboard.writeText(location.href);
        this.notice = "Link copied. It holds everything you typed, and no server is sent it.";
      } catch {
        this.notice = "The link is in the address bar now; copy it from there.";
      }
    },

    // Filters

    addFilter() {
      this.form.filters.push(newFilter());
    },
    removeFilter(number) {
      this.form.filters = this.form.filters.filter((filter) => filter.number !== number);
    },

    // Asking

    get running() {
      return this.state === "running";
    },

    onKey(event) {
      if (event.key === "Escape" && this.running) this.cancel();
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.$refs.form.requestSubmit();
    },

    begin(line) {
      controller?.abort(); // of a comparison
      controller = new AbortController();
      this.state = "running";
      this.comparison = null;
      this.untraced = null;
      this.notice = "";
      this.shown = noAnswer(this.byGradients);
      answerText = "";
      history.replaceState(null, "", toHash(this.form));
      this.say(line);
      return controller.signal;
    },

    async submit() {
      if (this.running) return;
      const signal = this.begin("Differentiating what was said.");
      try {
        await ask(this.body(), signal, (name, data, text) => {
          if (!signal.aborted) this.onEvent(name, data, text);
        });
        if (this.form.compare !== "" && !signal.aborted) await this.compare(signal);
      } catch (error) {
        if (!signal.aborted) this.fail(error);
      }
    },

    async compare(signal) {
      const name = this.form.compare;
      this.comparison = noComparison(`Asking ${name} the same`);
      try {
        await ask(this.bodyFor(name), signal, (event, data) => {
          if (event !== "result" || signal.aborted) return;
          this.comparison = comparisonOf(parse(answerText), data);
        });
      } catch (error) {
        if (signal.aborted) return;
        if (!(error instanceof Problem)) console.error(error);
        this.noteUntraced(error, name);
        const title = `No comparison with ${name}: ${error.title ?? "an error of the page"}`;
        this.comparison = noComparison(title, error.message, "box warning");
      }
    },

    bodyFor(estimator) {
      return toBody({ ...this.form, estimator }, { byGradients: false, parameters: [] });
    },

    async trace() {
      if (this.running) return;
      const body = this.bodyFor(this.untraced);
      const signal = this.begin(TRACING.queued);
      try {
        await traceAsJob(body, signal, (state) => this.say(TRACING[state]));
        this.state = "idle";
        await this.submit();
      } catch (error) {
        if (!signal.aborted) this.fail(error);
      }
    },

    noteUntraced(error, estimator) {
      this.untraced = error.title === UNTRACED ? estimator : null;
    },

    body() {
      const parameters = this.parameters.map((parameter) => parameter.name);
      return toBody(this.form, { byGradients: this.byGradients, parameters });
    },

    onEvent(name, data, text) {
      if (name === "gradient") this.onGradient(data);
      else if (name === "candidates") this.onCandidates(data);
      else if (name === "progress") this.onProgress(data);
      else if (name === "result") this.onResult(data, text);
    },

    onGradient({ measurement }) {
      this.shown.measurement = measurementOf(measurement);
      this.shown.stage = 1;
      this.say("Gradient ready. Estimating every training example.");
    },

    onCandidates({ rows, seconds }) {
      this.shown.stage = 2;
      this.say(`${counted(rows, "row")} estimated after ${duration(seconds)}. Rescoring the best.`);
    },

    onProgress(event) {
      const { found } = this.shown;
      this.shown.stage = 2;
      found[event.direction] = event;
      const sides = Object.values(found);
      this.shown.sides = sidesOf(sides.flatMap((side) => side.results));
      this.shown.bounds = sides.map((side) => ({
        direction: sides.length > 1 ? side.direction : "",
        ...boundOf(side.recall_lower_bound, Number(this.form.recall)),
      }));
      this.say(
        `${counted(event.rescored_rows, "row")} rescored and ${count(event.sampled_rows)} ` +
          `sampled so far, after ${duration(event.seconds)}.`,
        performance.now() - spokenAt < QUIET_MS,
      );
    },

    onResult(answer, text) {
      answerText = text;
      const sided = new Set(answer.certificates.map((c) => c.direction)).size > 1;
      this.shown = {
        ...noAnswer(this.shown.influence),
        stage: STAGES.length,
        measurement: measurementOf(answer.measurement),
        sides: sidesOf(answer.results, answer.shares, answer.removals),
        certificates: answer.certificates.map((c, key) => certificateOf(c, key, sided)),
        documents: documentsOf(answer),
        layers: sumLayers(answer.results),
        note: visible(answer.notes.join(" ")),
        meaning: visible(meaningOf(answer)),
        effort: effortOf(answer),
        partial: answer.partial,
        unit: unitOf(answer),
      };
      const found = counted(answer.results.length, "training example");
      this.say(answer.partial ? `Out of time: ${found} found so far.` : `Done: ${found} found.`);
      this.finish("finished");
    },

    fail(error) {
      if (!(error instanceof Problem)) console.error(error);
      const title = error.title ?? "The page met an error of its own";
      this.shown.problem = { title: visible(title), detail: visible(error.message) };
      this.noteUntraced(error, this.form.estimator);
      this.shown.line = "";
      this.finish("failed");
    },

    cancel() {
      if (!this.running) return;
      controller.abort();
      this.say("Cancelled.");
      this.finish("cancelled");
    },

    finish(state) {
      const onCancel = document.activeElement === this.$refs.cancel;
      this.state = state;
      if (onCancel) this.$refs.ask.focus();
    },

    say(line, silently = false) {
      this.shown.line = line;
      if (silently) return;
      this.spoken = line;
      spokenAt = performance.now();
    },

    // Showing

    get steps() {
      return STAGES.map((name, place) => {
        const done = place < this.shown.stage;
        const current = place === this.shown.stage && this.running;
        return { name, state: done ? "done" : current ? "current" : "ahead", current };
      });
    },
    get hasStarted() {
      return this.state !== "idle";
    },
    get isFinished() {
      return this.state === "finished";
    },
    get isProvisional() {
      return this.shown.sides.length > 0 && !this.isFinished;
    },
    get provisional() {
      if (this.running) return "Best so far; ranks may still change.";
      return "Best found until then; the search had not ended.";
    },
    get nothingFound() {
      return this.isFinished && this.shown.sides.length === 0;
    },
    get hasTokens() {
      return this.shown.sides.some((side) => side.groups.some((g) => g.first.result.tokens));
    },
    fill(element, result) {
      fillText(element, Alpine.raw(result));
    },
    tabulate(element, table) {
      fillTable(element, Alpine.raw(table));
    },
    get layerTable() {
      return layerTableOf(Alpine.raw(this.shown.layers));
    },
    draw(canvas) {
      // `dark` is read so that the chart is drawn anew, in the other colours, when it changes.
      if (this.dark !== null) drawLayers(canvas, Alpine.raw(this.shown.layers), this.sizes);
    },

    downloadJson() {
      save("etymon-answer.json", "application/json", answerText);
    },
    downloadCsv() {
      save("etymon-answer.csv", "text/csv", toCsv(parse(answerText).results));
    },
  };
}

Alpine.data("page", page);
Alpine.data("clamped", clamped);
Alpine.start();
