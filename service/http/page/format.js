// Numbers and texts as people read them.

const FOUR_DIGITS = { maximumSignificantDigits: 4 };
const plain = new Intl.NumberFormat("en-GB", FOUR_DIGITS);
const whole = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 0 });
const MINUS = "\u2212";

/** A number of four significant digits; "none" for null. */
export function number(value) {
  if (value === null || value === undefined) return "none";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) {
    return value.toExponential(3).replaceAll("-", MINUS);
  }
  const written = size >= 1000 ? whole.format(value) : plain.format(value);
  return written.replace("-", MINUS);
}

/** The same with its sign. */
export function signed(value) {
  return value > 0 ? `+${number(value)}` : number(value);
}

/** A whole number, grouped by thousands. */
export function count(value) {
  return whole.format(value);
}

/** "1 row", "2 rows". */
export function counted(value, noun) {
  return `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
}

/** A share as a percentage, never rounded up to what is not reached. */
export function percent(share) {
  return `${Math.floor(share * 1000 + 1e-9) / 10}%`;
}

/** Seconds, to the hundredth below ten. */
export function duration(seconds) {
  return `${seconds < 10 ? seconds.toFixed(2) : seconds.toFixed(1)} s`;
}

const NAMES = {
  0x00ad: "SHY", 0x061c: "ALM", 0x180e: "MVS", 0x200b: "ZWSP", 0x200e: "LRM", 0x200f: "RLM",
  0x202a: "LRE", 0x202b: "RLE", 0x202c: "PDF", 0x202d: "LRO", 0x202e: "RLO", 0x2060: "WJ",
  0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI", 0xfeff: "BOM",
};

// Controls but tab and line feed, what reorders text, what has no width, and tag characters.
const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\u{e0000}-\u{e007f}]/gu;

/** The text with every character that hides or reorders others shown as a symbol. */
export function visible(text) {
  return text.replaceAll(/\r\n/g, "\n").replace(UNSEEN, symbol);
}

function symbol(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return "\u2421";
  const hex = code.toString(16).toUpperCase().padStart(4, "0");
  return `\u27e8${NAMES[code] ?? `U+${hex}`}\u27e9`;
}

/** The same on one line. */
export function onOneLine(text) {
  return visible(text).replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5");
}

/** A metadata value as text. */
export function valueText(value) {
  return visible(typeof value === "string" ? value : JSON.stringify(value));
}
