// Influence by layer, over all results.

import { signed, number } from "./format.js";

let chart = null;

/** Each layer's raised, lowered and total share over the results, in the model's order. */
export function sumLayers(results) {
  const layers = new Map();
  for (const result of results) {
    for (const [name, score] of Object.entries(result.layers ?? {})) {
      const sums = layers.get(name) ?? { name, raised: 0, lowered: 0 };
      sums[score < 0 ? "lowered" : "raised"] += score;
      layers.set(name, sums);
    }
  }
  const shared = sharedStart([...layers.keys()]);
  return [...layers.values()].map((sums) => ({
    ...sums,
    short: sums.name.slice(shared.length),
  }));
}

/** The same as a table. */
export function layerTableOf(layers) {
  const rows = layers.map(({ name, raised, lowered }) => [
    name,
    ...[raised, lowered, raised + lowered].map(signed),
    number(raised - lowered),
  ]);
  const titles = ["Layer", "Raised", "Lowered", "Sum", "Sum of sizes"];
  const columns = titles.map((title, place) => ({ title, figure: place > 0 }));
  return { columns, groups: [{ title: "", rows }] };
}

/** What all names have in common up to a dot. */
function sharedStart(names) {
  if (names.length < 2) return "";
  let shared = names[0];
  for (const name of names) while (!name.startsWith(shared)) shared = shared.slice(0, -1);
  return shared.slice(0, shared.lastIndexOf(".") + 1);
}

/** Draw the sums on a canvas; `sizes` adds up magnitudes instead of splitting by sign. */
export function drawLayers(canvas, layers, sizes) {
  chart?.destroy();
  const colours = getComputedStyle(document.documentElement);
  const colour = (name) => colours.getPropertyValue(name).trim();
  const across = layers.length > 32;
  canvas.parentElement.style.height = across ? "320px" : `${layers.length * 22 + 84}px`;
  const bar = (label, data, name) => ({
    label,
    data,
    backgroundColor: colour(name),
    borderRadius: 2,
    maxBarThickness: 14,
  });
  const datasets = sizes
    ? [bar("sum of sizes", layers.map((l) => l.raised - l.lowered), "--accent")]
    : [
        bar("raised", layers.map((l) => l.raised), "--raised"),
        bar("lowered", layers.map((l) => l.lowered), "--lowered"),
      ];
  globalThis.Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
  chart = new globalThis.Chart(canvas, {
    type: "bar",
    data: { labels: layers.map((layer) => layer.short), datasets },
    options: options(across, colour),
  });
}

function options(across, colour) {
  const axis = (values) => ({
    stacked: true,
    ticks: { color: colour("--quiet"), autoSkip: values || across, maxRotation: 90 },
    grid: { color: values ? colour("--line") : "transparent" },
    border: { color: colour("--line") },
    title: { display: values, text: "sum of parts of scores", color: colour("--quiet") },
  });
  return {
    indexAxis: across ? "x" : "y",
    animation: false,
    responsive: true,
    maintainAspectRatio: false,
    scales: { x: axis(!across), y: axis(across) },
    plugins: {
      legend: { align: "start", labels: { color: colour("--ink"), boxWidth: 14 } },
      tooltip: {
        callbacks: {
          label: (item) => `${item.dataset.label}: ${signed(item.parsed[across ? "y" : "x"])}`,
        },
      },
    },
  };
}
