
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.closest("th");
    const body = button.closest("table").tBodies[0];
    const up = header.getAttribute("aria-sort") !== "ascending";
    for (const other of header.parentElement.cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[header.cellIndex].dataset.value;
    const order = header.className === "number" ? (a, b) => a - b : (a, b) => a.localeCompare(b);
    const compare = (one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === "" || b === "") return (a === "") - (b === ""); // nothing stays last, both ways
      return up ? order(a, b) : order(b, a);
    };
    body.append(...[...body.rows].sort(compare));
  });
}
