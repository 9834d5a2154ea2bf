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
  Plotly.newPlot(canvas, figure.data, figure.layout, {
    responsive: true,
    displaylogo: false,
    displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    showSendToCloud: false,
    toImageButtonOptions: { format: "svg", filename: plot.id },
  });
}

function repaint(color) {
  for (const canvas of document.querySelectorAll(".canvas.js-plotly-plot")) Plotly.relayout(canvas, { "font.color": color });
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

// On paper everything is drawn, opened and dark on white.
addEventListener("beforeprint", () => {
  plots.forEach(draw);
  document.querySelectorAll("details").forEach((details) => (details.open = true));
  repaint("#1d2129");
});
addEventListener("afterprint", () => repaint(ink()));

// The contents mark the section being read.
const links = new Map([...document.querySelectorAll("nav .links a")].map((link) => [link.hash.slice(1), link]));
const reading = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) links.get(entry.target.id)?.classList.toggle("here", entry.isIntersecting);
  },
  { rootMargin: "-20% 0px -75% 0px" },
);
document.querySelectorAll("section").forEach((section) => reading.observe(section));
