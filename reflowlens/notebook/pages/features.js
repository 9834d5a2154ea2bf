"use strict";
// Feature pages. Data come as scripts that call reflowlens.index, .text and .shard, for a page that lies on a disk may
// not fetch. Whatever they hold becomes text, never markup.
const root = document.documentElement;
try {
  root.dataset.theme = localStorage.getItem("reflowlens-theme") || "";
} catch (error) {} // a page opened from a file may have no storage

const STEPS = 1000; // of activations
const BEYOND = 60; // rows of the list that are there beyond what is seen of it
const waiting = new Map(); // file -> what the script it holds resolves
let pages, text; // the index and the text, once they are there
let rows = []; // every feature: [layer, index]
let found = []; // those that the search leaves, in order
let sorting = ["place", false];
let drawn = [0, 0]; // which of those found have a row

// -- data --------------------------------------------------------------------------------------------------------------

const files = new Map();
function load(file) {
  if (!files.has(file)) {
    const read = new Promise((resolve, reject) => {
      waiting.set(file, resolve);
      const script = document.createElement("script");
      script.src = file.split("/").map(encodeURIComponent).join("/");
      script.onerror = () => reject(new Error(`${file} could not be read`));
      document.head.append(script);
    });
    read.catch(() => files.delete(file));
    files.set(file, read);
  }
  return files.get(file);
}

window.reflowlens = {
  index: (data) => waiting.get("data/index.js")(data),
  text: (data) => waiting.get("data/text.js")(unpacked(data)),
  shard: (key, number, data) => waiting.get(`data/${key}-${number}.js`)(data),
};

function unpacked(data) {
  const bytes = Uint8Array.from(atob(data.tokens), (letter) => letter.charCodeAt(0));
  return { ...data, tokens: data.width === 2 ? new Uint16Array(bytes.buffer) : new Uint32Array(bytes.buffer) };
}

const layerOf = (key) =>
  pages.layers.find((layer) => layer.key === key) ?? pages.layers.find((layer) => layer.key.split("-")[0] === key);

async function featureOf(layer, index) {
  const shard = Math.floor(index / pages.shard);
  const [records, read] = await Promise.all([load(`data/${layer.key}-${shard}.js`), load("data/text.js")]);
  text = read;
  return records[index % pages.shard];
}

// -- small pieces ------------------------------------------------------------------------------------------------------

// An element; children are elements or text.
function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== false && value !== undefined) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function draw(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const minus = (shown) => shown.replace("-", "−");
const whole = (value) => value.toLocaleString("en");
function number(value, signed = false) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const shown = size && (size < 1e-4 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(3)));
  return (signed && value > 0 ? "+" : "") + minus(shown);
}
function percent(share) {
  if (!share) return "0%";
  return share < 1e-4 ? "<0.01%" : `${(100 * share).toFixed(share < 0.1 ? 2 : 1)}%`;
}
// Of a column: as many decimals as show three digits of its largest value, so that the numbers align.
function column(values, signed = false) {
  const size = Math.max(0, ...values.map(Math.abs));
  if (size && (size < 1e-4 || size >= 1e5)) return (value) => number(value, signed);
  const decimals = Math.max(0, 2 - Math.floor(Math.log10(size || 1)));
  return (value) => {
    const shown = Math.abs(value).toFixed(decimals);
    return (Number(shown) ? (value < 0 ? "−" : signed ? "+" : "") : "") + shown;
  };
}
const nats = (value) => (value === null ? "" : Math.abs(value) < 5e-5 ? "0.0000" : minus(`${value > 0 ? "+" : ""}${value.toFixed(4)}`));

function visible(token) {
  const blank = token.trim() === "" && /^ +$/.test(token);
  return blank ? "␣".repeat(token.length) : token.replace(/\r?\n|\r/g, "⏎").replace(/\t/g, "⇥");
}

const address = (key, index) => `#layer=${encodeURIComponent(key)}&feature=${index}`;
const plural = (n, word) => `${whole(n)} ${word}${n === 1 ? "" : "s"}`;

// -- the list ----------------------------------------------------------------------------------------------------------

const element = (id) => document.getElementById(id);

function filter() {
  const terms = element("query").value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = element("layer").value;
  const silent = element("silent").checked;
  found = rows.filter(([layer, index]) => {
    if (chosen && layer.key !== chosen) return false;
    if (!silent && !layer.fired[index]) return false;
    if (!terms.length) return true;
    layer.searched[index] ??= [`${layer.key}/${index}`, ...layer.words[index], ...layer.says[index]].join(" ").toLowerCase();
    return terms.every((term) =>
      /^\d+$/.test(term) && index === Number(term) ? true : layer.searched[index].includes(term),
    );
  });
  sort();
}

const SORTED = {
  place: ([layer, index]) => layer.number * 1e9 + index,
  words: ([layer, index]) => (layer.words[index][0] ?? layer.says[index][0])?.toLowerCase() ?? null,
  density: ([layer, index]) => layer.fired[index] / layer.positions,
  effect: ([layer, index]) => layer.effect[index],
};

function sort() {
  const [by, down] = sorting;
  const value = SORTED[by];
  const keyed = found.map((row) => [value(row), row]);
  const compare = by === "words" ? new Intl.Collator("en", { numeric: true }).compare : (a, b) => a - b;
  keyed.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : (down ? -1 : 1) * compare(a, b)));
  found = keyed.map(([, row]) => row);
  for (const head of document.querySelectorAll("aside th")) {
    head.removeAttribute("aria-sort");
    if (head.dataset.sort === by) head.setAttribute("aria-sort", down ? "descending" : "ascending");
  }
  const all = rows.length === found.length ? "" : ` of ${whole(rows.length)}`;
  element("count").textContent = `${whole(found.length)}${all} features`;
  document.querySelector("aside table").setAttribute("aria-rowcount", found.length + 1);
  element("list").replaceChildren();
  drawn = [0, 0];
  element("rows").scrollTop = 0;
  drawRows();
}

// Rows are as high as each other, so that those which nobody sees can be empty space.
const rowHeight = () => 2.15 * parseFloat(getComputedStyle(root).fontSize);
const listTop = () => element("above").getBoundingClientRect().top;
const scroller = () => (getComputedStyle(element("rows")).overflowY === "auto" ? element("rows") : root);

function drawRows() {
  const list = element("list");
  const height = rowHeight();
  const above = Math.max(0, Math.floor(-listTop() / height));
  const first = Math.max(0, Math.min(above, found.length) - BEYOND);
  const last = Math.min(found.length, above + Math.ceil(innerHeight / height) + BEYOND);
  if (first >= drawn[1] || last <= drawn[0]) {
    list.replaceChildren();
    drawn = [first, first];
  }
  for (; drawn[0] < first; drawn[0]++) list.firstChild.remove();
  for (; drawn[1] > last; drawn[1]--) list.lastChild.remove();
  if (drawn[0] > first) list.prepend(...found.slice(first, drawn[0]).map((row, i) => listed(row, first + i)));
  if (drawn[1] < last) list.append(...found.slice(drawn[1], last).map((row, i) => listed(row, drawn[1] + i)));
  drawn = [first, last];
  for (const [id, rows] of [["above", first], ["below", found.length - last]]) {
    element(id).querySelector("td").style.height = `${rows * height}px`;
  }
  mark();
}

// Scroll the list so far that a feature's row is seen.
function reveal(layer, index) {
  const at = found.findIndex(([other, i]) => other === layer && i === index);
  if (at < 0) return;
  const top = listTop() + at * rowHeight();
  const box = scroller() === root ? { top: 160, bottom: innerHeight } : element("rows").getBoundingClientRect();
  if (top < box.top + 40 || top + rowHeight() > box.bottom) scroller().scrollTop += top - (box.top + box.bottom) / 2;
  drawRows();
}

function listed([layer, index], at) {
  const [own, says] = [layer.words[index], layer.says[index]].map((list) => list.map(visible).join(" · "));
  const words = make("td", {}, own, says ? make("span", { class: "says" }, says) : null);
  words.title = words.textContent;
  return make(
    "tr",
    { "aria-rowindex": at + 2 },
    make("td", {}, make("a", { href: address(layer.key, index) }, `${layer.key}/${index}`)),
    words,
    make("td", { class: "number" }, percent(layer.fired[index] / layer.positions)),
    make("td", { class: "number" }, nats(layer.effect[index])),
  );
}

function mark() {
  const here = document.querySelector("#list tr.here");
  here?.classList.remove("here");
  here?.querySelector("a").removeAttribute("aria-current");
  const link = [...document.querySelectorAll("#list a")].find((each) => each.getAttribute("href") === location.hash);
  link?.closest("tr").classList.add("here");
  link?.setAttribute("aria-current", "page");
}

// -- a feature ---------------------------------------------------------------------------------------------------------

function wordsOf(layer, index) {
  const chips = (words) => words.map((word) => make("span", {}, visible(word)));
  const says = chips(layer.says[index]);
  return make(
    "p",
    { class: "words", "aria-label": "Label words, automatic" },
    ...chips(layer.words[index]),
    ...(says.length ? [make("small", {}, "→"), ...says] : []),
    make("small", {}, "automatic"),
  );
}

function fact(name, value, note = "", wide = false) {
  return make("div", { class: wide ? "wide" : false }, make("dt", {}, name), make("dd", {}, value, note ? make("small", {}, ` ${note}`) : null));
}

function factsOf(layer, feature) {
  const facts = [
    fact("active", percent(feature.fired / layer.positions), `${whole(feature.fired)} of ${whole(layer.positions)}`),
    fact("largest", number(feature.max)),
  ];
  if (feature.min < 0) facts.push(fact("smallest", number(feature.min)));
  if (feature.q[0] !== null) facts.push(fact("median where not 0", number((feature.q[2] + feature.q[3]) / 2)));
  const effect = feature.effect;
  if (effect) {
    const where = `nats where it is active (${plural(effect.positions, "position")} of ${plural(effect.blocks, "block")})`;
    const shownAs = column([effect.change, effect.controlChange], true);
    const change = `${shownAs(effect.change)}${effect.error === null ? "" : ` ± ${shownAs(effect.error).replace("+", "")}`}`;
    facts.push(fact("loss without it", change, where, true));
    const control = make("span", {}, `${shownAs(effect.controlChange)} `);
    control.append(make("a", { href: address(layer.key, effect.control) }, `${layer.key}/${effect.control}`));
    facts.push(fact("a rate-matched feature", control));
  }
  return make("dl", { class: "card" }, ...facts);
}

// Counts on a logarithm: most activations are small, and what is rare is what a feature is looked at for.
function histogramOf(feature) {
  const [width, height, left] = [560, 120, 44];
  const low = Math.min(0, feature.min);
  const high = feature.max;
  const most = Math.max(1, ...feature.hist);
  const top = Math.log10(1 + most);
  const x = (value) => left + ((width - left) * (value - low)) / (high - low || 1);
  const y = (count) => height - (height * Math.log10(1 + count)) / top;
  const chart = draw("svg", { class: "histogram", viewBox: `0 -8 ${width} ${height + 34}`, role: "img" });
  chart.append(draw("title", {}, `Histogram of activations that are not 0, from ${number(low)} to ${number(high)}`));
  for (let ten = 1; ten <= most; ten *= 10) {
    const label = draw("text", { x: left - 7, y: y(ten) + 4, "text-anchor": "end" }, ten >= 1e4 ? ten.toExponential(0).replace("+", "") : whole(ten));
    chart.append(draw("line", { x1: left, x2: width, y1: y(ten), y2: y(ten) }), label);
  }
  const step = (high - low) / feature.hist.length;
  feature.hist.forEach((count, i) => {
    if (!count) return;
    const bar = draw("rect", { class: "count", x: x(low + i * step) + 0.5, y: y(count), width: Math.max(1, (width - left) / feature.hist.length - 1), height: height - y(count) });
    bar.dataset.told = `${number(low + i * step)} to ${number(low + (i + 1) * step)}\n${plural(count, "position")}`;
    chart.append(bar);
  });
  chart.append(draw("line", { x1: left, x2: width, y1: height, y2: height }));
  feature.q.slice(1, -1).forEach((value, i) => {
    if (value === null) return;
    const tick = draw("line", { class: "quantile", x1: x(value), x2: x(value), y1: height + 1, y2: height + 8 });
    tick.dataset.told = `${20 * (i + 1)}% of what is not 0 is below ${number(value)}`;
    chart.append(tick);
  });
  for (const [value, anchor] of [[low, "start"], [high, "end"]]) {
    chart.append(draw("text", { x: x(value), y: height + 22, "text-anchor": anchor }, number(value)));
  }
  return chart;
}

function tokensTable(name, tokens, largest) {
  const shownAs = column([largest], true);
  const body = tokens.map(([token, value]) => {
    const bar = draw("rect", { width: `${(100 * Math.abs(value)) / largest}%`, height: "100%", rx: 2 });
    if (value < 0) bar.setAttribute("class", "below");
    const shown = make("td", {}, visible(text.vocabulary[token]));
    return make("tr", {}, shown, make("td", { class: "number" }, shownAs(value)), make("td", {}, draw("svg", { class: "bar", "aria-hidden": "true" }, bar)));
  });
  return make("div", {}, make("h3", {}, name), make("table", {}, make("caption", { class: "hidden" }, name), make("tbody", {}, ...body)));
}

function nearTable(name, near) {
  const body = near.map(([key, index, cosine]) => {
    const layer = layerOf(key);
    const link = make("a", { href: address(key, index) }, `${key}/${index}`);
    return make("tr", {}, make("td", {}, link, make("span", {}, `  ${(layer.words[index].length ? layer.words : layer.says)[index].map(visible).join(" · ")}`)), make("td", { class: "number" }, minus(cosine.toFixed(3))));
  });
  return make("div", {}, make("h3", {}, name), make("table", {}, make("caption", { class: "hidden" }, name), make("tbody", {}, ...body)));
}

function tokenOf(token, share, told) {
  const made = make("i", {}, visible(token));
  made.dataset.told = told;
  if (share) {
    made.className = share < 0 ? "below" : "above";
    made.style.setProperty("--share", (0.65 * Math.min(1, Math.abs(share))).toFixed(3));
  }
  return made;
}

function contextOf(feature, [block, start, middle, values]) {
  const peak = Math.max(Math.abs(feature.min), Math.abs(feature.max)) || 1;
  const first = (block ? text.ends[block - 1] : 0) + start;
  const parts = [[], [], []];
  values.forEach((value, i) => {
    const position = start + i;
    const told = `${number((value / STEPS) * peak)}\ndocument ${text.documents[block]}, token ${text.starts[block] + position}`;
    const token = text.vocabulary[text.tokens[first + i]];
    parts[position < middle ? 0 : position === middle ? 1 : 2].push(tokenOf(token, value / STEPS, told));
  });
  const [before, at, after] = parts.map((tokens, i) => make("span", { class: ["before", "middle", "after"][i] }, ...(i ? tokens : [make("span", {}, ...tokens)])));
  const strength = make("span", { class: "number" }, column([peak])((values[middle - start] / STEPS) * peak));
  return make("li", {}, strength, make("div", { class: "line" }, before, at, after));
}

// A sample's group is named by the quantiles that it lies between; what these are stands beside.
function rangeOf(feature, name) {
  const [, from, to] = /^Quantiles (\d+)–(\d+)%$/.exec(name) ?? [];
  if (!to) return null;
  const bounds = [from, to].map((percents) => feature.q[Math.round((percents / 100) * (feature.q.length - 1))]);
  return make("small", {}, bounds.map((bound) => number(bound)).join(" to "));
}

function contextsOf(feature) {
  return feature.groups.flatMap(([name, contexts]) => [
    make("h3", {}, name, rangeOf(feature, name)),
    make("ul", { class: "group" }, ...contexts.map((context) => contextOf(feature, context))),
  ]);
}

function stepsFrom(layer, index) {
  const at = found.findIndex(([other, i]) => other === layer && i === index);
  const step = (row, name, rel) => row && make("a", { href: address(row[0].key, row[1]), rel }, name);
  return make("nav", { class: "steps", "aria-label": "Other features" }, ...[
    make("a", { class: "back", href: "#" }, "All features"),
    step(found[at - 1], "← Previous", "prev"),
    step(found[at < 0 ? -1 : at + 1], "Next →", "next"),
  ].filter(Boolean));
}

async function showFeature(layer, index) {
  const feature = await featureOf(layer, index);
  if (location.hash !== address(layer.key, index)) return; // another was asked for meanwhile
  const title = make("div", {}, make("h1", {}, `Feature ${layer.key}/${index}`), make("p", { class: "lead" }, make("code", {}, layer.name)));
  const parts = [make("div", { class: "top" }, title, stepsFrom(layer, index)), wordsOf(layer, index), factsOf(layer, feature)];
  if (feature.hist.some(Boolean)) {
    parts.push(make("h2", {}, "Contexts"), ...contextsOf(feature));
    parts.push(make("p", { class: "note" }, "Select a line to see all of it. Colour is the share of the largest activation; point at a token for its number."));
    parts.push(make("h2", {}, "Activations that are not 0"), histogramOf(feature));
    parts.push(make("p", { class: "note" }, "Positions, on a logarithm; marks below are the quantiles between which contexts are drawn."));
  } else {
    parts.push(make("p", { class: "lead" }, "It is 0 at every position of this text."));
  }
  if (feature.top.length) {
    const largest = Math.max(...[...feature.top, ...feature.bottom].map(([, value]) => Math.abs(value))) || 1;
    parts.push(make("h2", {}, "What it writes"), make("p", { class: "note" }, "Logits at activation 1 on the direct path alone, before the final norm divides by its scale."));
    parts.push(make("div", { class: "pair" }, tokensTable("Promoted", feature.top, largest), tokensTable("Suppressed", feature.bottom, largest)));
  }
  if (feature.near.length) {
    const within = feature.near.filter(([key]) => key === layer.key);
    const across = feature.near.filter(([key]) => key !== layer.key);
    const tables = [within.length && nearTable("Of its layer", within), across.length && nearTable("Of other layers", across)];
    parts.push(make("h2", {}, "Nearest, by cosine of direction"), make("div", { class: "pair" }, ...tables.filter(Boolean)));
  }
  show(`Feature ${layer.key}/${index} – ${pages.title}`, parts);
}

// -- about -------------------------------------------------------------------------------------------------------------

// How many features there are by how often they are active, in steps of half a power of ten.
function densities(layer) {
  const counts = new Array(12).fill(0);
  layer.fired.forEach((fired) => {
    if (fired) counts[Math.max(0, Math.min(11, Math.floor(2 * (6 + Math.log10(fired / layer.positions)))))]++;
  });
  const most = Math.max(1, ...counts);
  const chart = draw("svg", { viewBox: "0 0 152 30", role: "img", "aria-label": "features by how often they are active" });
  counts.forEach((count, i) => {
    const height = (28 * count) / most;
    const bar = draw("rect", { x: 12.66 * i + 0.5, y: 29 - height, width: 11.6, height });
    const [from, to] = [-6 + i / 2, -6 + (i + 1) / 2].map((power) => percentOfPower(power));
    bar.dataset.told = `active at ${from} to ${to} of positions\n${plural(count, "feature")}`;
    chart.append(bar);
  });
  chart.append(draw("line", { x1: 0, x2: 152, y1: 29.5, y2: 29.5 }));
  return chart;
}
const percentOfPower = (power) => `${Number((100 * 10 ** power).toPrecision(2))}%`;

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : 0;
}

function showAbout() {
  const body = pages.layers.map((layer) => {
    const active = layer.fired.filter(Boolean);
    return make(
      "tr",
      {},
      make("td", {}, layer.key),
      make("td", {}, ...layer.name.split(" → ").map((point, i) => make("code", {}, i ? `→ ${point}` : point))),
      make("td", { class: "number" }, whole(layer.n)),
      make("td", { class: "number" }, whole(layer.n - active.length)),
      make("td", { class: "number" }, percent(median(active) / layer.positions)),
      make("td", {}, densities(layer)),
    );
  });
  const heads = [["layer"], ["read at → writes to"], ["features", 1], ["never active", 1], ["median active", 1], ["by how often"]];
  const head = make("tr", {}, ...heads.map(([name, right]) => make("th", { scope: "col", class: right ? "number" : false }, name)));
  const keys = [["/", "search"], ["↓ ↑", "through the list"], ["← →", "previous, next feature"], ["Esc", "to the list"]];
  show(`${pages.title} – reflowlens`, [
    make("div", { class: "top" }, make("h1", {}, pages.title), make("nav", { class: "steps" }, make("a", { class: "back", href: "#" }, "All features"))),
    make("p", { class: "lead" }, `${plural(rows.length, "feature")} in ${plural(pages.layers.length, "layer")}`),
    make("dl", { class: "card" }, ...Object.entries(pages.facts).map(([name, value]) => fact(name, value, "", value.length > 26))),
    make("h2", {}, "Layers"),
    make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Layers" }, make("table", { class: "overview" }, make("thead", {}, head), make("tbody", {}, ...body))),
    make("h2", {}, "How to read the pages"),
    make("dl", { class: "definitions" }, ...Object.entries(pages.notes).flatMap(([name, meaning]) => [make("dt", {}, name), make("dd", {}, meaning)])),
    make("h2", {}, "Keys"),
    make("p", { class: "keys" }, ...keys.map(([key, does]) => make("span", {}, ...key.split(" ").map((one) => make("kbd", {}, one)), ` ${does}`))),
  ]);
}

// -- which page is shown -----------------------------------------------------------------------------------------------

function show(title, parts) {
  document.title = title;
  const main = element("main");
  main.replaceChildren(...parts);
  main.scrollTop = 0;
  if (document.body.classList.contains("open")) scrollTo(0, 0);
  main.dataset.shown = location.hash;
}

function fail(error) {
  show("reflowlens", [make("p", { class: "failure" }, error.message)]);
}

let last; // the feature that was shown
async function route() {
  const asked = new URLSearchParams(location.hash.slice(1));
  document.body.classList.toggle("open", asked.has("feature") || asked.has("about"));
  mark();
  try {
    if (!asked.has("feature")) {
      if (last) reveal(...last);
      return showAbout();
    }
    const layer = layerOf(asked.get("layer") ?? pages.layers[0].key);
    const index = Number(asked.get("feature"));
    if (!layer) throw new Error(`No layer ${asked.get("layer")}: there are ${pages.layers.map((each) => each.key).join(", ")}.`);
    if (!(Number.isInteger(index) && index >= 0 && index < layer.n)) {
      throw new Error(`No feature ${asked.get("feature")}: layer ${layer.key} has features 0 to ${layer.n - 1}.`);
    }
    if (location.hash !== address(layer.key, index)) return location.replace(address(layer.key, index));
    last = [layer, index];
    reveal(layer, index);
    await showFeature(layer, index);
  } catch (error) {
    fail(error);
  }
}

// -- keys, pointer, theme ----------------------------------------------------------------------------------------------

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input[type=search], select");
  const links = () => [...document.querySelectorAll("#list a")];
  const go = (rel) => document.querySelector(`.steps a[rel=${rel}]`)?.click();
  if (event.key === "/" && !typing) {
    element("query").focus();
    element("query").select();
  } else if (event.key === "Escape") {
    if (document.body.classList.contains("open") && getComputedStyle(document.querySelector("aside")).display === "none") location.hash = "";
    element("query").focus();
  } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && event.target.closest("aside") && !event.target.matches("select")) {
    const at = links().indexOf(event.target);
    const next = links()[event.key === "ArrowDown" ? at + 1 : at - 1];
    if (next) next.focus();
    else if (event.key === "ArrowUp") element("query").focus();
  } else if (event.key === "ArrowLeft" && !typing) go("prev");
  else if (event.key === "ArrowRight" && !typing) go("next");
  else return;
  event.preventDefault();
}

function told(event) {
  const tip = element("tip");
  const target = event.target.closest?.("[data-told]");
  tip.hidden = !target;
  if (!target) return;
  tip.textContent = target.dataset.told;
  const box = target.getBoundingClientRect();
  const below = box.bottom + 6;
  tip.style.left = `${Math.max(6, Math.min(box.left, innerWidth - tip.offsetWidth - 6))}px`;
  tip.style.top = `${below + tip.offsetHeight > innerHeight ? box.top - tip.offsetHeight - 6 : below}px`;
}

async function start() {
  try {
    pages = await load("data/index.js");
  } catch (error) {
    return fail(error);
  }
  pages.layers.forEach((layer, i) => Object.assign(layer, { number: i, searched: [] }));
  rows = pages.layers.flatMap((layer) => layer.fired.map((_, index) => [layer, index]));
  if (pages.layers.some((layer) => layer.key.length > 2)) document.querySelector("aside table").classList.add("keyed");
  element("layer").append(make("option", { value: "" }, "all layers"), ...pages.layers.map((layer) => make("option", { value: layer.key }, layer.key.length > 2 ? layer.key : `layer ${layer.key}`)));
  for (const [id, event] of [["query", "input"], ["layer", "change"], ["silent", "change"]]) element(id).addEventListener(event, filter);
  for (const head of document.querySelectorAll("aside th[data-sort]")) {
    head.querySelector("button").addEventListener("click", () => {
      const { sort: by } = head.dataset;
      const first = by === "density" || by === "effect"; // the most of it first
      sorting = [by, sorting[0] === by ? !sorting[1] : first];
      sort();
    });
  }
  element("theme").addEventListener("click", () => {
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
    try {
      localStorage.setItem("reflowlens-theme", root.dataset.theme);
    } catch (error) {}
  });
  element("skip").addEventListener("click", (event) => {
    event.preventDefault();
    element("main").focus();
  });
  element("main").addEventListener("click", (event) => {
    if (event.target.closest(".line") && getSelection().isCollapsed) event.target.closest("li").classList.toggle("whole");
  });
  for (const moving of [element("rows"), window]) moving.addEventListener("scroll", drawRows, { passive: true });
  addEventListener("resize", drawRows);
  addEventListener("keydown", pressed);
  addEventListener("pointerover", told);
  addEventListener("hashchange", route);
  if (!rows.some(([layer, index]) => layer.fired[index])) element("silent").checked = true;
  filter();
  await route();
}
addEventListener("DOMContentLoaded", start);
