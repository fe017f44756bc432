"use strict";
// Conveniences only: sorting, filtering and faster tooltips. The page is complete without them.

function sortValue(row, at) {
  const cell = row.cells[at];
  const numeric = cell.classList.contains("number") || cell.dataset.sort !== undefined;
  if (!numeric) return cell.textContent.trim();
  if (cell.dataset.sort === undefined) return null;
  const value = Number(cell.dataset.sort);
  return Number.isNaN(value) ? cell.dataset.sort : value;
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}

// What was not measured comes last either way.
function sortBy(table, at, ascending) {
  const rows = Array.from(table.tBodies[0].rows).map((row) => [sortValue(row, at), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return ascending ? compare(a, b) : compare(b, a);
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

function makeSortable(table) {
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const ascending = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      sortBy(table, at, ascending);
    });
  });
}

function makeFilter(frame) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  label.className = "filter";
  input.type = "search";
  label.append("Show rows with", input);
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const row of frame.querySelector("tbody").rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
  frame.before(label);
}

function showTips() {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("aria-hidden", "true");
  document.body.append(tip);
  let held = null;
  const release = () => {
    if (held) held.mark.prepend(held.title);
    held = null;
    tip.textContent = "";
  };
  document.addEventListener("pointerover", (event) => {
    const mark = event.target.closest("svg .mark");
    if (held && held.mark === mark) return;
    release();
    const title = mark && mark.querySelector(":scope > title");
    if (!title) return;
    // Out of its place, or the browser would show it a second time.
    title.remove();
    held = { mark, title };
    tip.textContent = title.textContent;
  });
  document.addEventListener("pointermove", (event) => {
    if (!held) return;
    const left = Math.min(event.pageX + 14, window.scrollX + document.documentElement.clientWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(left, 4)}px`;
    tip.style.top = `${event.pageY + 16}px`;
  });
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
document.querySelectorAll(".scroll.long").forEach(makeFilter);
showTips();
