// The answer as files.

const COLUMNS = [
  "rank", "direction", "row", "id", "document", "score", "normalised_score", "proxy",
  "gradient_norm", "effect_of_removal", "effect_low", "effect_high", "effect_confidence", "cluster",
  "text", "metadata",
];

// Columns of what leaving a row out would do, in nats; empty without a measured scale.
const EFFECTS = {
  effect_of_removal: "nats", effect_low: "low", effect_high: "high",
  effect_confidence: "confidence",
};

/** Let the browser save a text as a file. */
export function save(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** The results as CSV (RFC 4180), safe to open in a spreadsheet. */
export function toCsv(results) {
  const rows = results.map((result) =>
    COLUMNS.map((column) => {
      if (column === "metadata") return JSON.stringify(result.metadata);
      if (column in EFFECTS) return result.effect_of_removal?.[EFFECTS[column]];
      return result[column];
    }),
  );
  return [COLUMNS, ...rows].map((row) => row.map(cell).join(",") + "\r\n").join("");
}

/** A quoted cell. Spreadsheets run texts that begin like formulas, so those get an apostrophe. */
export function cell(value) {
  const text = String(value ?? "");
  const number = /^[-+]?\d+(\.\d+)?(e[-+]?\d+)?$/i.test(text);
  const formula = /^[\s\u0000-\u001f]*[=+\-@\uff1d\uff0b\uff0d\uff20]/.test(text) && !number;
  return `"${(formula ? "'" : "") + text.replaceAll('"', '""')}"`;
}
