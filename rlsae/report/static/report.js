// The banner of a stale report, and sorting and filtering of the table of latents; the page is complete without it.
"use strict";

if (window.rlsaeStale) {
  const banner = document.getElementById("stale");
  banner.textContent = `This report is not current: it was ${window.rlsaeStale}. Run the workflow again.`;
  banner.hidden = false;
}

const table = document.querySelector("table.latents");
const form = document.querySelector("form.filters");

function cellValue(row, column) {
  const cell = row.cells[column];
  const text = (cell.querySelector("summary") || cell).textContent.trim();
  const value = Number(text.replaceAll(",", "").replaceAll("−", "-").replace(" %", ""));
  return text === "n/a" ? null : Number.isNaN(value) ? text : value;
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
}

function sortBy(header) {
  const ascending = header.getAttribute("aria-sort") !== "ascending";
  for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const keyed = [...table.tBodies[0].rows].map((row) => [cellValue(row, header.cellIndex), row]);
  keyed.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null); // what was not measured stays last
    return ascending ? compare(a, b) : compare(b, a);
  });
  table.tBodies[0].append(...keyed.map(([, row]) => row));
}

function filter() {
  const wanted = Object.fromEntries(new FormData(form));
  const text = wanted.text.toLowerCase();
  let shown = 0;
  for (const row of table.tBodies[0].rows) {
    const matches = Object.entries(row.dataset).every(([key, value]) => !wanted[key] || wanted[key] === value);
    row.hidden = !(matches && row.cells[row.cells.length - 1].textContent.toLowerCase().includes(text));
    shown += !row.hidden;
  }
  form.querySelector("output").textContent = `${shown} of ${table.tBodies[0].rows.length} shown`;
}

// A link to a latent opens it, even where a filter hides it.
function openTarget() {
  const row = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!row || !row.matches(".latents tr")) return;
  if (row.hidden) {
    form.reset();
    filter();
  }
  row.querySelector("details").open = true;
  row.scrollIntoView();
}

if (table) {
  for (const header of table.querySelectorAll("th[data-sort]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    button.addEventListener("click", () => sortBy(header));
    header.replaceChildren(button);
  }
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
  addEventListener("hashchange", openTarget);
  openTarget();
}
