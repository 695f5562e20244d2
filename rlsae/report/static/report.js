// The banner of a stale report; sorting, filtering and searching of the table of latents. Pages are complete without it.
"use strict";

if (window.rlsaeStale) {
  const banner = document.getElementById("stale");
  banner.textContent = `This report is not current: it was ${window.rlsaeStale}. Run the workflow again.`;
  banner.hidden = false;
}

// Rows that are drawn at once: with thousands, each keystroke would take the browser a second.
const ROWS = 100;

// "1,234", "−0.5", "1.6 %" and "40°" are numbers; "n/a" is none, and anything else is text.
function valueOf(text) {
  const value = Number(text.replaceAll(",", "").replace("−", "-").replace(/ ?[%°]$/, ""));
  return text === "n/a" || text === "" ? null : Number.isNaN(value) ? text : value;
}

const collator = new Intl.Collator("en");

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b);
}

function latentsTable(table, form) {
  const headers = [...table.tHead.rows[0].cells];
  const names = headers.map((header) => header.textContent.trim().replaceAll(" ", "_"));
  const rows = [...table.tBodies[0].rows].map((element) => {
    const texts = [...element.cells].map((cell) => cell.textContent.trim());
    const values = Object.fromEntries(names.map((name, place) => [name, valueOf(texts[place])]));
    return { element, values, texts: Object.fromEntries(names.map((name, place) => [name, texts[place]])), text: texts.slice(-2).join(" ").toLowerCase() };
  });
  const [nothing, more] = [document.querySelector(".nothing"), document.querySelector(".more")];
  let sorted = null;
  let limit = ROWS;

  function sortBy(name, descending) {
    sorted = { name, descending };
    for (const [place, header] of headers.entries()) {
      if (names[place] === name) header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else header.removeAttribute("aria-sort");
    }
    rows.sort((a, b) => {
      const [first, second] = [a.values[name], b.values[name]];
      if (first === null || second === null) return (first === null) - (second === null); // what was not measured stays last
      return descending ? compare(second, first) : compare(first, second);
    });
  }

  function fits(row, wanted) {
    return wanted.every(([key, text]) => {
      if (key === "text") return row.text.includes(text.toLowerCase());
      const [name, bound] = key.split("-");
      if (!bound) return row.texts[name].replace(", replicated", "") === text;
      const value = row.values[name];
      return value !== null && (bound === "least" ? value >= Number(text) : value <= Number(text));
    });
  }

  function filter() {
    const wanted = [...new FormData(form)].filter(([, text]) => text !== "");
    const fitting = rows.filter((row) => fits(row, wanted));
    table.tBodies[0].replaceChildren(...fitting.slice(0, limit).map((row) => row.element));
    form.querySelector("output").textContent = `${fitting.length} of ${rows.length} fit`;
    nothing.hidden = fitting.length > 0;
    more.hidden = fitting.length <= limit;
    more.querySelector("button").textContent = `show the other ${fitting.length - limit}`;
  }

  // The state lies in the address, so that going back from a latent finds the table as it was.
  function remember() {
    const state = new URLSearchParams([...new FormData(form)].filter(([, text]) => text !== ""));
    if (sorted) state.set("sort", (sorted.descending ? "-" : "") + sorted.name);
    history.replaceState(null, "", `#${state}`);
  }

  function recall() {
    const place = rows.findIndex((row) => row.element.id === decodeURIComponent(location.hash.slice(1)));
    form.reset();
    limit = Math.max(ROWS, place + 1);
    if (place < 0) {
      const state = new URLSearchParams(location.hash.slice(1));
      for (const [key, text] of state) if (form.elements[key]) form.elements[key].value = text;
      const sort = state.get("sort");
      if (sort) sortBy(sort.replace(/^-/, ""), sort.startsWith("-"));
    }
    filter();
    if (place >= 0) rows[place].element.scrollIntoView({ block: "center" });
  }

  for (const [place, header] of headers.entries()) {
    if (!("sort" in header.dataset)) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    button.addEventListener("click", () => {
      const again = sorted && sorted.name === names[place];
      sortBy(names[place], again ? !sorted.descending : header.classList.contains("n"));
      filter();
      remember();
    });
    header.replaceChildren(button);
  }
  form.addEventListener("input", () => { limit = ROWS; filter(); remember(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { filter(); remember(); }));
  more.querySelector("button").addEventListener("click", () => { limit = rows.length; filter(); });
  nothing.querySelector("button").addEventListener("click", () => form.reset());
  addEventListener("hashchange", recall);
  form.hidden = false;
  recall();
}

const latents = document.querySelector("table.latents");
if (latents) latentsTable(latents, document.querySelector("form.filters"));

// Numbers show on hover; the keyboard reaches them too.
for (const mark of document.querySelectorAll("mark[data-v]")) mark.tabIndex = 0;

// ← and → walk through the latents.
addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select, textarea")) return;
  const link = { ArrowLeft: "a[rel=prev]", ArrowRight: "a[rel=next]" }[event.key];
  if (link) document.querySelector(link)?.click();
});
