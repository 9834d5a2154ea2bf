"use strict";
const root = document.documentElement;
const plots = [...document.querySelectorAll("figure")];

// Figures carry a grey that suits any page; here the page's own ink is known.
function ink() {
  return getComputedStyle(document.body).color;
}

function draw(plot) {
  const canvas = plot.querySelector(".canvas");
  if (canvas.childElementCount) return;
  const figure = JSON.parse(plot.querySelector("script").textContent);
  Object.assign(figure.layout, { paper_bgcolor: "rgba(0, 0, 0, 0)", plot_bgcolor: "rgba(0, 0, 0, 0)" });
  figure.layout.font = { ...figure.layout.font, color: ink() };
  for (const table of figure.data.filter((trace) => trace.type === "table")) {
    for (const part of [table.header, table.cells]) part.font = { ...part.font, color: ink() };
  }
  narrow(figure, canvas);
  Plotly.newPlot(canvas, figure.data, figure.layout, {
    responsive: true,
    displaylogo: false,
    displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    showSendToCloud: false,
    toImageButtonOptions: { format: "svg", filename: plot.id },
  });
}

// Where long names beside a plot would push it out of a narrow screen, they take two lines; hovering tells them whole.
const LINE = 20; // letters
function narrow(figure, canvas) {
  if (parseFloat(canvas.style.minWidth) <= canvas.parentElement.clientWidth) return;
  const beside = figure.data.filter((trace) => ["bar", "scatter"].includes(trace.type) && typeof trace.y?.[0] === "string");
  if (!beside.length) return;
  const names = [...new Set(beside.flatMap((trace) => [...trace.y]))];
  Object.assign(figure.layout.yaxis, { tickmode: "array", tickvals: names, ticktext: names.map(twoLines), title: null });
  const entries = figure.data.filter((trace) => trace.showlegend !== false).length; // a line each where it is narrow
  figure.layout.height = Math.max(figure.layout.height ?? 0, 110 + 36 * names.length + 20 * entries);
  Object.assign(canvas.style, { minWidth: 0, height: `${figure.layout.height}px` });
}

function twoLines(name) {
  if (name.length <= LINE) return name;
  const end = Math.max(name.lastIndexOf(" ", LINE), name.lastIndexOf("_", LINE - 1) + 1) || LINE;
  const rest = name.slice(end).trim();
  return `${name.slice(0, end)}<br>${rest.length > LINE ? `${rest.slice(0, LINE - 1)}…` : rest}`;
}

function repaint(color) {
  for (const canvas of document.querySelectorAll(".canvas.js-plotly-plot")) {
    Plotly.relayout(canvas, { "font.color": color });
    const tables = canvas.data.flatMap((trace, i) => (trace.type === "table" ? [i] : []));
    if (tables.length) Plotly.restyle(canvas, { "header.font.color": color, "cells.font.color": color }, tables);
  }
}

const near = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      draw(entry.target);
    }
  },
  { rootMargin: "400px 0px" },
);
plots.forEach((plot) => near.observe(plot));

// Light or dark: the system's choice until the button is used.
const dark = matchMedia("(prefers-color-scheme: dark)");
document.getElementById("theme").addEventListener("click", () => {
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
  root.dataset.theme = isDark ? "light" : "dark";
  try {
    localStorage.setItem("reflowlens-theme", root.dataset.theme);
  } catch (error) {} // a page opened from a file may have no storage
  repaint(ink());
});
dark.addEventListener("change", () => repaint(ink()));

// On paper everything is drawn in the width of a page, opened, and dark on white; afterwards it is as it was.
const PAPER = 680; // px between the margins of A4 or Letter
let opened = [];
function resize(width) {
  for (const canvas of document.querySelectorAll(".canvas.js-plotly-plot")) {
    const drawn = width && Math.max(width, parseFloat(canvas.style.minWidth)); // and made smaller where it is more
    Object.assign(canvas.style, { width: drawn ? `${drawn}px` : "", zoom: drawn ? width / drawn : "" });
    Plotly.relayout(canvas, { width: drawn, autosize: !drawn });
  }
}
addEventListener("beforeprint", () => {
  plots.forEach(draw);
  opened = [...document.querySelectorAll("details:not(.code, [open])")];
  opened.forEach((details) => (details.open = true));
  resize(PAPER);
  repaint("#1d2129");
});
addEventListener("afterprint", () => {
  opened.forEach((details) => (details.open = false));
  resize(null);
  repaint(ink());
});

function button(text, pressed) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", () => pressed(made));
  return made;
}

// The code of a figure is copied, or, where the browser forbids that, selected.
for (const code of document.querySelectorAll("details.code pre")) {
  const copy = button("{{Copy}}", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      copy.textContent = "{{Copied}}";
      setTimeout(() => (copy.textContent = "{{Copy}}"), 2000);
    } catch (error) {
      getSelection().selectAllChildren(code);
    }
  });
  copy.setAttribute("aria-live", "polite");
  code.before(copy);
}

// A table of metrics is sorted by the heads of its columns; without a value comes last. Its rows lose their groups, so
// that each tells its own, until the order of the page is asked for again.
function sortable(table) {
  const heads = [...table.querySelectorAll("thead th[data-sort]")];
  const rows = [...table.querySelectorAll("tbody tr:has(td)")];
  if (!heads.length || rows.length < 2) return;
  const home = new Map(rows.map((row) => [row, row.parentElement]));
  const sorted = table.createTBody();
  for (const row of rows) {
    const group = home.get(row).querySelector("th[scope=rowgroup] a");
    if (!group) continue;
    const from = document.createElement("small");
    from.append(group.cloneNode(true));
    row.cells[0].append(from);
  }
  const back = button("{{Original order}}", () => {
    rows.forEach((row) => home.get(row).append(row));
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    table.classList.remove("sorted");
    heads[0].querySelector("button").focus();
    back.hidden = true;
  });
  back.hidden = true;
  back.className = "back";
  table.closest(".scroll").before(back);
  const order = (row, column, kind) => {
    const cell = row.cells[column];
    if (kind === "text") return cell.firstElementChild.textContent;
    return cell.dataset.order === undefined ? null : Number(cell.dataset.order);
  };
  for (const head of heads) {
    const { sort } = head.dataset;
    const sorter = button(head.textContent, () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = rows.map((row) => [order(row, head.cellIndex, sort), row]);
      const compare = (a, b) => (sort === "text" ? a.localeCompare(b, root.lang, { numeric: true }) : a - b);
      keyed.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : (down ? -1 : 1) * compare(a, b)));
      sorted.append(...keyed.map(([, row]) => row));
      table.classList.add("sorted");
      back.hidden = false;
    });
    head.replaceChildren(sorter);
  }
}
document.querySelectorAll("table.metrics").forEach(sortable);

// The contents mark the section being read.
const links = new Map([...document.querySelectorAll("nav .links a")].map((link) => [link.hash.slice(1), link]));
const reading = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) links.get(entry.target.id)?.classList.toggle("here", entry.isIntersecting);
  },
  { rootMargin: "-20% 0px -75% 0px" },
);
document.querySelectorAll("section").forEach((section) => reading.observe(section));
