// a click on a heading sorts its table by that column: numbers by size, words by letters, empty cells last
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const number = text => parseFloat(text.replace(/^[~\s]+/, "").replace(/(\d),(?=\d)/g, "$1"));
    const key = row => (row.cells[column]?.innerText ?? "").trim();
    const rows = [...table.tBodies[0].rows];
    const numeric = rows.every(row => key(row) === "" || !isNaN(number(key(row))));
    const compare = (a, b) => numeric ? number(a) - number(b) : a.localeCompare(b, undefined, {numeric: true});
    rows.sort((one, other) => {
      const a = key(one), b = key(other);
      if (a === "" || b === "") return (a === "") - (b === "");
      return down ? compare(b, a) : compare(a, b);
    });
    table.tBodies[0].append(...rows);
  }));
}
