"use strict";
// An attribution graph: what is drawn of it, and the state that a reader makes, which is text: in the address, in a
// file, in the steps that can be undone. Whatever the graph holds becomes text, never markup.
const root = document.documentElement;
const element = (id) => document.getElementById(id);
const data = JSON.parse(element("graph").textContent);
try {
  root.dataset.theme = localStorage.getItem("reflowlens-theme") || "";
} catch (error) {} // a page opened from a file or in a frame may have no storage

// -- small pieces ------------------------------------------------------------------------------------------------------

// A text in the page's language; the English one is its key.
const t = (text, fields = {}) => (data.messages[text] ?? text).replace(/\{(\w+)\}/g, (_, name) => fields[name]);

function filled(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== false && value !== undefined && value !== null) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}
const make = (name, attributes = {}, ...children) => filled(document.createElement(name), attributes, children);
const draw = (name, attributes = {}, ...children) => filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

function button(text, act, attributes = {}) {
  const made = make("button", { type: "button", ...attributes }, text);
  made.addEventListener("click", act);
  return made;
}

const whole = (value) => value.toLocaleString("en");
function number(value, signed = false) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const shown = size && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  return (signed && value > 0 ? "+" : "") + shown.replace("-", "−");
}
const percent = (share) => (share < 0 ? `−${percent(-share)}` : share > 0 && share < 0.001 ? "<0.1%" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`);
const weight = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value) >= 9.995 ? Math.abs(value).toFixed(1) : Math.abs(value).toFixed(Math.abs(value) < 0.0995 ? 4 : 3)}`;

function visible(token) {
  return (/^ +$/.test(token) ? "␣".repeat(token.length) : token.replace(/\r?\n|\r/g, "⏎").replace(/\t/g, "⇥"));
}
const bare = (token) => visible(token).trim() || visible(token);
const shorter = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

// -- the graph ---------------------------------------------------------------------------------------------------------

const nodes = data.nodes;
const numberOf = new Map(nodes.map((node, i) => [node.id, i]));
const edges = Object.fromEntries([["source", Uint16Array], ["target", Uint16Array], ["weight", Float32Array], ["score", Float32Array]].map(([name, Kind]) => [
  name, new Kind(Uint8Array.from(atob(data.edges[name]), (letter) => letter.charCodeAt(0)).buffer),
]));
const INPUTS = ["embedding", "position", "bigram", "token_value"]; // always there: the prompt
const isTarget = (node) => node.target > 0;
// What the edges down to each have together of all scores, in their order: the highest first.
const upTo = new Float64Array(edges.score.length);
edges.score.forEach((score, i) => (upTo[i] = score + (i ? upTo[i - 1] : 0)));
const fullShare = Math.max(0.01, ...nodes.filter((node) => !INPUTS.includes(node.kind) && !isTarget(node)).map((node) => Math.min(node.share, 1)));
const fullScore = upTo.at(-1) ?? 0;

// -- the state ---------------------------------------------------------------------------------------------------------

const DRAWN = 350; // edges at first
const fresh = () => ({
  view: "all",
  selected: null,
  marked: [],
  pinned: [],
  groups: data.groups.map((group) => [...group]),
  names: {},
  nodes: fullShare,
  edges: upTo[Math.min(DRAWN, upTo.length) - 1] ?? 0,
  errors: true,
});
let state = fresh();
const undone = []; // earlier states, as text

const groupKey = (group) => `group:${group[1]}`;
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const thousandth = (share) => Number(share.toFixed(4));

// What differs from a fresh page, as a file and Python read it.
function told() {
  const first = fresh();
  const found = {};
  for (const name of Object.keys(first)) {
    const value = typeof state[name] === "number" ? thousandth(state[name]) : state[name];
    if (!same(value, typeof first[name] === "number" ? thousandth(first[name]) : first[name])) found[name] = value;
  }
  return found;
}

function address() {
  const asked = new URLSearchParams();
  for (const [name, value] of Object.entries(told())) asked.set(name, typeof value === "string" ? value : JSON.stringify(value));
  return asked.toString();
}

function fromAddress(text) {
  const found = {};
  for (const [name, value] of new URLSearchParams(text)) {
    try {
      found[name] = name === "view" || name === "selected" ? value : JSON.parse(value);
    } catch (error) {} // a link that was cut short
  }
  return found;
}

// Take over a state from outside: what does not fit this graph is left out, and counted.
function adopt(found) {
  const next = fresh();
  let strange = 0;
  const own = (ids, also) => (Array.isArray(ids) ? ids : []).filter((id) => {
    const known = numberOf.has(id) || also.has(id);
    strange += !known;
    return known;
  });
  const text = (value) => typeof value === "string";
  if (Array.isArray(found.groups)) {
    const taken = new Set();
    next.groups = [];
    for (const group of found.groups.filter((each) => Array.isArray(each) && each.length > 1)) {
      const members = own(group.slice(1), new Set()).filter((id) => !taken.has(id) && taken.add(id));
      if (members.length) next.groups.push([String(group[0]), ...members]);
    }
  }
  const keys = new Set(next.groups.map(groupKey));
  for (const name of ["pinned", "marked"]) next[name] = [...new Set(own(found[name], keys))];
  if (text(found.selected)) next.selected = own([found.selected], keys)[0] ?? null;
  for (const [id, name] of Object.entries(found.names ?? {})) if (text(name) && own([id], new Set()).length) next.names[id] = name;
  for (const name of ["nodes", "edges"]) if (Number.isFinite(found[name])) next[name] = Math.max(0, Math.min(1, found[name]));
  if (found.errors === false) next.errors = false;
  if (found.view === "pins") next.view = "pins";
  state = next;
  if (strange) say(t("Not in this graph: {count} of that state's nodes", { count: strange }));
}

// Change the state: it can be undone, it stands in the address, and the picture follows.
function change(act) {
  const before = address();
  act(state);
  const after = address();
  if (after !== before) {
    undone.push(before);
    remember(after);
  }
  show();
}

function remember(text) {
  try {
    history.replaceState(null, "", `#${text}`);
  } catch (error) {} // a frame has no address of its own
}

function undo() {
  if (!undone.length) return;
  const before = undone.pop();
  adopt(fromAddress(before));
  remember(before);
  show();
}

// -- what is drawn: nodes, and groups of them as one -------------------------------------------------------------------

let items, itemOf; // in the order of nodes; by key
let links; // edges between items, those of the highest score first

function arrange() {
  items = [];
  itemOf = new Map();
  const owner = new Array(nodes.length);
  const add = (key, members, label) => {
    const item = { key, members, label, node: members.length === 1 && label === undefined ? members[0] : null, into: [], out: [] };
    const sum = (name) => members.reduce((total, node) => total + (node[name] ?? 0), 0);
    const places = members.map((node) => node.layer).sort((a, b) => a - b);
    item.layer = places[Math.floor(places.length / 2)];
    const positions = members.map((node) => node.pos ?? data.tokens.length - 1).sort((a, b) => a - b);
    item.pos = positions[Math.floor(positions.length / 2)];
    item.kind = item.node ? item.node.kind : "group";
    item.influence = sum("influence");
    item.size = sum("size");
    item.value = members.some((node) => node.value !== null) ? sum("value") : null;
    item.target = sum("target");
    item.share = Math.min(...members.map((node) => node.share));
    items.push(item);
    itemOf.set(key, item);
    for (const node of members) owner[numberOf.get(node.id)] = item;
  };
  for (const group of state.groups) add(groupKey(group), group.slice(1).map((id) => nodes[numberOf.get(id)]), group[0]);
  nodes.forEach((node, i) => owner[i] ?? add(node.id, [node]));
  const summed = new Map();
  links = [];
  for (let i = 0; i < edges.weight.length; i++) {
    const [source, target] = [owner[edges.source[i]], owner[edges.target[i]]];
    if (source === target) {
      source.within = (source.within ?? 0) + edges.weight[i];
      continue;
    }
    const grouped = source.label !== undefined || target.label !== undefined;
    const key = grouped && `${source.key} ${target.key}`;
    let link = grouped && summed.get(key);
    if (!link) {
      link = { source, target, weight: 0, score: 0, n: 0 };
      links.push(link);
      source.out.push(link);
      target.into.push(link);
      if (grouped) summed.set(key, link);
    }
    link.weight += edges.weight[i];
    link.score += edges.score[i];
    link.n++;
  }
  for (const link of links) link.part = Math.abs(link.weight) / (link.target.size || 1);
  links.sort((a, b) => b.score - a.score);
  for (const item of items) for (const list of [item.into, item.out]) list.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
}

const isKept = (item) =>
  item.key === state.selected || item.label !== undefined || state.pinned.includes(item.key) || state.marked.includes(item.key) || item.target > 0;

function isShown(item) {
  if (state.view === "pins") return state.pinned.includes(item.key) || item.label !== undefined;
  if (isKept(item)) return true;
  if (item.kind === "error" && !state.errors) return false;
  return INPUTS.includes(item.kind) || item.share <= state.nodes + 1e-6;
}

// Whether an edge is drawn: the threshold is a share of all scores, and what it cuts at holds for summed edges too.
function aboveThreshold() {
  const last = upTo.findIndex((sum) => sum >= state.edges - 1e-6);
  const least = state.edges <= 0 ? Infinity : edges.score[last < 0 ? edges.score.length - 1 : last];
  return (link) => link.score >= least;
}

// -- names -------------------------------------------------------------------------------------------------------------

const KINDS = {
  feature: t("feature"), neuron: t("neuron"), head: t("attention head"), error: t("error"), embedding: t("token"), position: t("position"),
  bigram: t("pair of tokens"), token_value: t("value of a token"),
  signal: t("recipe signal"), readout: t("readout signal"), logit: t("target"), direction: t("direction"), group: t("group"),
};
const kindOf = (item) => KINDS[item.kind] ?? item.kind;

// What a node is called where no one has named it.
function wordsFor(node) {
  if (node.kind === "embedding") return `“${bare(node.label || data.tokens[node.pos])}”`;
  if (node.kind === "logit") return node.label.split(" − ").map((token) => `“${bare(token)}”`).join(" − ");
  if (node.kind === "signal" && node.up?.length) return `∋ ${node.up.slice(0, 3).map(bare).join(", ")}`;
  if (node.up?.length) return `→ ${node.up.slice(0, 3).map(bare).join(", ")}`;
  if (node.words?.length) return node.words.slice(0, 3).map(bare).join(", ");
  return node.label ? bare(node.label) : [kindOf(node), node.feature ?? ""].join(" ").trim();
}
const nameOf = (item) => (item.node ? state.names[item.key] ?? wordsFor(item.node) : item.label);

const tokenAt = (pos) => (pos === null || pos === undefined ? "" : `“${bare(data.tokens[pos] ?? "")}”`);
function layerName(layer) {
  if (layer < 0) return t("input");
  return layer >= data.blocks ? t("output") : `${t("L")}${layer}`;
}
function placeOf(item) {
  if (!item.node) return t("{count} nodes", { count: item.members.length });
  const { kind, layer, feature, pos } = item.node;
  if (kind === "logit") return item.node.probability === null ? t("logit difference") : percent(item.node.probability);
  if (kind === "embedding") return `${pos}`;
  const unit = feature !== null && ["feature", "neuron", "signal", "readout", "head"].includes(kind) ? `/${feature}` : "";
  return `${layer < 0 || layer >= data.blocks ? kindOf(item) : layerName(layer)}${unit} ${tokenAt(pos)}`;
}

const searched = (item) =>
  [nameOf(item), item.key, kindOf(item), placeOf(item), ...item.members.flatMap((node) => [node.id, node.label, state.names[node.id] ?? "", ...(node.up ?? []), ...(node.words ?? []), ["logit", "readout"].includes(node.kind) ? "" : data.tokens[node.pos] ?? ""])]
    .join("\n")
    .toLowerCase();

let saying;
function say(text) {
  element("said").textContent = text;
  clearTimeout(saying);
  saying = setTimeout(() => (element("said").textContent = ""), 5000);
}
