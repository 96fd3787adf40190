// Tables of texts, built without markup.

/**
 * Fill a table. The first cell of each row is its heading.
 *
 * @param {HTMLTableElement} table
 * @param {{columns: {title: string, figure: boolean}[],
 *   groups: {title: string, rows: string[][]}[]}} content a group without a title has no heading.
 */
export function fillTable(table, { columns, groups }) {
  const kind = (place) => (columns[place].figure ? "figure" : "");
  const heading = element("tr", columns.map(({ title }, place) => cell("th", title, kind(place))));
  for (const one of heading.children) one.scope = "col";
  const bodies = groups.map(({ title, rows }) => {
    const body = element("tbody", title ? [groupHeading(title, columns.length)] : []);
    for (const row of rows) {
      const cells = row.map((text, place) => cell(place ? "td" : "th", text, kind(place)));
      cells[0].scope = "row";
      body.append(element("tr", cells));
    }
    return body;
  });
  table.replaceChildren(element("thead", [heading]), ...bodies);
}

function groupHeading(title, width) {
  const heading = cell("th", title, "group");
  heading.scope = "rowgroup";
  heading.colSpan = width;
  return element("tr", [heading]);
}

function cell(name, text, kind) {
  const inner = document.createElement("bdi");
  inner.textContent = text;
  const made = element(name, [inner]);
  if (kind) made.className = kind;
  return made;
}

function element(name, children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}
