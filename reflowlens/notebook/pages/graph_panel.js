// -- the panel ---------------------------------------------------------------------------------------------------------

const FIRST = 24; // rows of a list before the rest is asked for

function icon(item) {
  const hollow = isHollow(item.kind) || item.kind === "error";
  return draw("svg", { width: 14, height: 14, viewBox: "-8 -8 16 16", "aria-hidden": "true" }, draw("path", { class: hollow ? "hollow" : "shape", d: shapeOf(item.kind, 5.4) }));
}

function meter(share, kind) {
  const bar = draw("rect", { class: kind, width: `${Math.max(0.6, 100 * share)}%`, height: "100%" });
  return draw("svg", { class: "meter", "aria-hidden": "true" }, bar);
}

function row(item, text, sign, share, title = "") {
  const place = placeOf(item);
  const name = make("span", { class: "name" }, make("span", {}, nameOf(item)), place === text ? null : make("small", {}, place));
  const made = make("button", { type: "button", "data-to": item.key, title }, icon(item), name, make("span", { class: `weight ${sign}` }, text), meter(share, sign));
  return make("li", {}, made);
}

// A list of which the first rows are shown.
function list(rows, name) {
  const made = make("ul", { class: "rows", "aria-label": name }, ...rows.slice(0, FIRST));
  if (rows.length <= FIRST) return [made];
  const more = button(t("Show all {count}", { count: whole(rows.length) }), () => {
    made.append(...rows.slice(FIRST));
    more.remove();
  }, { class: "more" });
  return [made, more];
}

function linkRows(links, end) {
  const most = Math.max(...links.map((link) => Math.abs(link.weight)));
  return links.map((link) => row(link[end], weight(link.weight), link.weight < 0 ? "cuts" : "adds", Math.abs(link.weight) / most, t("{share} of what goes into it", { share: percent(link.part) })));
}

const total = (members, name) => members.reduce((sum, node) => sum + (node.left?.[name] ?? 0), 0);

// What the incoming edges add up to, those that are not on the page and constants included, beside the value.
function sumOf(item) {
  const listed = item.into.reduce((sum, link) => sum + link.weight, 0);
  const lines = [[t("inputs above"), listed]];
  if (item.within) lines.push([t("within the group"), item.within]);
  const n = total(item.members, "n");
  if (n) lines.push([t("{count} smaller ones, not on this page", { count: whole(n) }), total(item.members, "unseen")]);
  if (total(item.members, "bias")) lines.push([t("biases"), total(item.members, "bias")]);
  if (total(item.members, "rest")) lines.push([t("edges that were not kept"), total(item.members, "rest")]);
  const sum = lines.reduce((all, [, value]) => all + value, 0);
  const fits = Math.abs(sum - item.value) <= 1e-3 * Math.max(1e-3, item.size);
  lines.push([fits ? t("sum: its value ✓") : t("sum; its value is {value}", { value: number(item.value) }), sum]);
  return make("table", { class: "sum", "data-fits": String(fits) }, make("tbody", {}, ...lines.map(([name, value]) => make("tr", {}, make("td", {}, name), make("td", {}, weight(value))))));
}

function chips(name, words) {
  return words?.length ? make("p", { class: "words" }, make("b", {}, name), ...words.map((word) => make("span", { title: JSON.stringify(word) }, bare(word)))) : null;
}

function factsOf(item) {
  const facts = [];
  if (item.node) {
    const { node } = item;
    facts.push([t("kind"), kindOf(item)], [t("node"), item.key]);
    if (node.pos !== null) facts.push([t("token"), `${tokenAt(node.pos)} (${node.pos})`]);
    if (node.probability !== null) facts.push([t("probability"), percent(node.probability)]);
    if (node.activation !== null && !["error", "embedding", "position", "logit"].includes(node.kind)) facts.push([t("activation"), number(node.activation)]);
    if (node.value !== null) facts.push([t("value"), number(node.value)]);
  } else facts.push([t("kind"), t("group of {count} nodes", { count: item.members.length })]);
  if (!item.target || item.influence) facts.push([t("influence"), percent(item.influence)]);
  return make("dl", {}, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function acts(item) {
  const isPinned = state.pinned.includes(item.key);
  const isMarked = state.marked.includes(item.key);
  const made = [
    button(isPinned ? t("Unpin") : t("Pin"), () => pin(item.key), { id: "pin", "aria-pressed": isPinned, "aria-keyshortcuts": "p" }),
    button(t("Rename"), () => rename(item), { id: "rename" }),
  ];
  if (item.label === undefined) made.push(button(isMarked ? t("Unmark") : t("Mark for a group"), () => mark(item.key), { id: "mark", "aria-pressed": isMarked, "aria-keyshortcuts": "m" }));
  else made.push(button(t("Ungroup"), () => ungroup(item.key), { id: "ungroup" }));
  made.push(button(t("Close"), () => select(null), { id: "close", "aria-keyshortcuts": "Escape" }));
  return make("div", { class: "do" }, ...made);
}

function nodePanel(item) {
  const parts = [make("h2", { id: "node-name" }, nameOf(item)), make("p", { class: "note" }, placeOf(item)), acts(item)];
  if (item.node) {
    parts.push(chips(item.kind === "signal" ? t("in tokens") : t("pushes up"), item.node.up), chips(item.kind === "signal" ? null : t("pushes down"), item.kind === "signal" ? [] : item.node.down), chips(t("active on"), item.node.words));
  }
  parts.push(factsOf(item));
  if (item.node?.link) parts.push(make("p", {}, make("a", { href: item.node.link, target: "_blank", rel: "noopener", id: "page" }, t("Its page: where it is active"))));
  if (item.label !== undefined) {
    parts.push(make("h3", {}, t("Members")), make("ul", { class: "rows", id: "members" }, ...item.members.map(memberRow(item))));
  }
  const hidden = item.members.reduce((sum, node) => sum + node.unseenOut, 0);
  if (item.into.length || item.value !== null) {
    parts.push(make("h3", {}, t("Inputs: what makes it"), make("span", {}, `${whole(item.into.length)}`)), ...list(linkRows(item.into, "source"), t("Inputs")));
    if (item.value !== null) parts.push(sumOf(item));
  }
  if (item.out.length) {
    parts.push(make("h3", {}, t("Outputs: what it makes"), make("span", {}, `${whole(item.out.length)}`)), ...list(linkRows(item.out, "target"), t("Outputs")));
    const sum = item.out.reduce((all, link) => all + link.weight, 0);
    parts.push(make("p", { class: "note" }, `${t("sum of these: {sum}", { sum: weight(sum) })}${hidden ? `; ${t("{count} smaller ones are not on this page", { count: whole(hidden) })}` : ""}`));
  }
  return parts.filter(Boolean);
}

const memberRow = (group) => (node) => {
  const name = make("span", { class: "name" }, make("span", {}, state.names[node.id] ?? wordsFor(node)), make("small", {}, placeOf({ node, members: [node], kind: node.kind })));
  const out = button(icon(node), () => leave(group.key, node.id), { title: t("Take out of the group"), "aria-label": `${t("Take out of the group")}: ${node.id}` });
  out.append(name, make("span", { class: "weight" }, "×"));
  return make("li", {}, out);
};

function overview() {
  const parts = [make("h2", {}, t("What the picture shows"))];
  parts.push(make("p", {}, t("Every node is something active on this prompt, in the row of its layer and the column of its token. An edge is how much one adds to another, exactly, under frozen attention patterns, norms and gates. Select a node to see what makes it, and what it makes.")));
  const by = (test, value) => [...items].filter(test).sort((a, b) => value(b) - value(a));
  const targets = by((item) => item.target > 0, (item) => item.target);
  const rowOf = (item, value, most) => row(item, percent(value), "influence", value / most);
  parts.push(make("h3", {}, t("Explained")), ...list(targets.map((item) => rowOf(item, item.node?.probability ?? item.target, Math.max(...targets.map((each) => each.node?.probability ?? each.target)))), t("Explained")));
  const strongest = by((item) => !INPUTS.includes(item.kind) && item.influence > 0 && item.kind !== "readout", (item) => item.influence).slice(0, 12);
  if (strongest.length) parts.push(make("h3", {}, t("Most influence")), ...list(strongest.map((item) => rowOf(item, item.influence, strongest[0].influence)), t("Most influence")));
  if (state.pinned.length) parts.push(make("h3", {}, t("Pinned")), ...list(state.pinned.filter((key) => itemOf.has(key)).map((key) => rowOf(itemOf.get(key), itemOf.get(key).influence, 1)), t("Pinned")));
  const keys = [["← ↑ → ↓", t("between nodes")], ["Enter", t("select")], ["Esc", t("back")], ["p", t("pin")], ["m", t("mark for a group (or Shift-click)")], ["g", t("group what is marked")], ["/", t("search")], [t("Ctrl Z"), t("undo")]];
  parts.push(make("h3", {}, t("Keys")), make("dl", {}, ...keys.flatMap(([key, does]) => [make("dt", {}, make("kbd", {}, key)), make("dd", {}, does)])));
  return parts;
}

function paintPanel() {
  const panel = element("panel");
  const item = itemOf.get(state.selected);
  const to = document.activeElement?.closest?.("#panel") ? document.activeElement.id : null;
  panel.replaceChildren(...(item ? nodePanel(item) : overview()));
  panel.dataset.shown = state.selected ?? "";
  if (to) (element(to) ?? panel).focus({ preventScroll: true });
}

// -- what a reader does ------------------------------------------------------------------------------------------------

function select(key) {
  change((next) => (next.selected = key));
  if (key) element("panel").scrollTop = 0;
  const below = element("panel").getBoundingClientRect().top - 0.6 * innerHeight;
  if (key && isPhone() && below > 0) scrollBy({ top: below }); // its name comes in sight
  const mark = byKey.get(key);
  if (mark) reveal(mark);
}

function reveal(mark) {
  const stage = element("stage").getBoundingClientRect();
  const box = mark.getBoundingClientRect();
  if (box.left < stage.left + 30 || box.right > stage.right - 10) element("stage").scrollLeft += box.left - (stage.left + stage.right) / 2;
  if (box.top < stage.top || box.bottom > stage.bottom) element("stage").scrollTop += box.top - (stage.top + stage.bottom) / 2;
}

const toggled = (keys, key) => (keys.includes(key) ? keys.filter((each) => each !== key) : [...keys, key]);
const pin = (key) => change((next) => (next.pinned = toggled(next.pinned, key)));
function mark(key) {
  if (itemOf.get(key)?.label !== undefined) return;
  change((next) => (next.marked = toggled(next.marked, key)));
}

function group() {
  const members = state.marked.filter((id) => numberOf.has(id));
  if (members.length < 2) return;
  const made = [commonWord(members) || t("group {n}", { n: state.groups.length + 1 }), ...members];
  change((next) => {
    next.groups.push(made);
    next.pinned = next.pinned.filter((key) => !members.includes(key));
    next.marked = [];
    next.selected = groupKey(made);
  });
  rename(itemOf.get(groupKey(made)));
}

// A word that at least half of the members push up.
function commonWord(members) {
  const counts = new Map();
  for (const id of members) for (const word of new Set((nodes[numberOf.get(id)].up ?? []).map(bare))) counts.set(word, (counts.get(word) ?? 0) + 1);
  const [word, count] = [...counts].sort((a, b) => b[1] - a[1])[0] ?? ["", 0];
  return count > 1 && 2 * count >= members.length ? `→ ${word}` : "";
}

function ungroup(key) {
  change((next) => {
    next.groups = next.groups.filter((each) => groupKey(each) !== key);
    next.pinned = next.pinned.filter((each) => each !== key);
    next.selected = null;
  });
}

function leave(key, id) {
  change((next) => {
    const at = next.groups.findIndex((each) => groupKey(each) === key);
    const left = next.groups[at].filter((each, i) => i === 0 || each !== id);
    if (left.length > 1) next.groups[at] = left;
    else next.groups.splice(at, 1);
    const renamed = left.length > 1 ? groupKey(left) : null;
    next.pinned = next.pinned.map((each) => (each === key ? renamed : each)).filter(Boolean);
    next.selected = renamed;
  });
}

function rename(item) {
  const input = make("input", { type: "text", id: "name", value: nameOf(item), "aria-label": t("Name") });
  const form = make("form", { class: "rename" }, input, make("button", { type: "submit" }, t("Save")));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const name = input.value.trim();
    change((next) => {
      if (item.label !== undefined) {
        const group = next.groups.find((each) => groupKey(each) === item.key);
        group[0] = name || group[0];
      } else if (name && name !== wordsFor(item.node)) next.names[item.key] = name;
      else delete next.names[item.key];
    });
    (byKey.get(item.key) ?? element("panel")).focus();
  });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    paintPanel();
    element("rename")?.focus();
  });
  element("panel").querySelector("h2").replaceWith(form);
  input.focus();
  input.select();
}

function search() {
  const terms = element("query").value.toLowerCase().split(/\s+/).filter(Boolean);
  found.clear();
  if (terms.length) for (const item of items) {
    const text = searched(item);
    if (byKey.has(item.key) && terms.every((term) => text.includes(term))) found.add(item.key);
  }
  element("count").textContent = terms.length ? t(found.size === 1 ? "{count} node" : "{count} nodes", { count: found.size }) : "";
  for (const [key, mark] of byKey) mark.classList.toggle("found", found.has(key));
  light(null);
}

// The next of those found, in the order of the picture.
function nextFound(back) {
  const order = shownItems.filter((item) => found.has(item.key)).sort((a, b) => b.y - a.y || a.x - b.x);
  if (!order.length) return;
  const at = order.findIndex((item) => item.key === state.selected);
  select(order[(at + (back ? -1 + order.length : 1)) % order.length].key);
}

function saveState() {
  const content = { reflowlens: "state of an attribution graph", of: data.of, prompt: data.tokens.join(""), state: { ...told(), groups: state.groups } };
  const link = make("a", { href: URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" })), download: "graph-state.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function openState(file) {
  try {
    const content = JSON.parse(await file.text());
    if (!content || typeof content.state !== "object" || content.state === null) throw new Error("no state");
    undone.push(address());
    adopt(content.state);
    remember(address());
    show();
  } catch (error) {
    say(t("That file holds no state of a graph."));
  }
}

async function copyLink() {
  remember(address());
  try {
    await navigator.clipboard.writeText(location.href);
    say(t("The link is copied: it opens this page as it is now."));
  } catch (error) {
    prompt(t("Copy this link:"), location.href);
  }
}

// -- the head, and the whole -------------------------------------------------------------------------------------------

function paintHead() {
  const tokens = data.tokens.map((token) => make("span", { class: "token" }, visible(token)));
  const targets = nodes.filter(isTarget).sort((a, b) => b.target - a.target);
  const named = targets.slice(0, 3).map((node) => make("span", { class: "target" }, wordsFor(node).replace(/[“”]/g, ""), node.probability === null ? null : make("small", {}, percent(node.probability))));
  const more = targets.length > 3 ? make("small", {}, ` +${targets.length - 3}`) : null;
  if (data.title) element("title").append(make("span", {}, data.title, make("span", { class: "then" }, "·")));
  element("title").append(...tokens, make("span", { class: "then" }, "→"), ...named, ...(more ? [more] : []));
  const { all } = data;
  const left = t("on this page {nodes} of {allNodes} nodes, with {share} of all influence, and {edges} of {allEdges} edges", {
    nodes: whole(nodes.length), allNodes: whole(all.nodes), share: percent(all.kept), edges: whole(edges.weight.length), allEdges: whole(all.edges),
  });
  element("of").append(`${data.of} · ${left}`);
  const scores = [...data.scores];
  const told = data.verdict;
  if (Number.isFinite(told.faithfulness)) {
    const meaning = t("what is left of the prediction with the nodes of the pruned graph alone; with random nodes {share}", { share: told.faithfulness_control === null ? "–" : percent(told.faithfulness_control) });
    scores.unshift(["faithfulness", told.faithfulness, meaning]);
  }
  const facts = scores.map(([name, value, meaning]) => make("div", {}, make("dt", { title: t(meaning), tabindex: 0 }, t(name)), make("dd", {}, percent(value))));
  element("facts").append(make("dl", {}, ...facts));
  element("facts").prepend(verdict());
}

// Whether the graph can be trusted, by what interventions in the model said.
function verdict() {
  const told = data.verdict;
  if ("unmeasured" in told || (told.reason === "correlation" && told.correlation === null)) {
    return make("span", { class: "verdict", id: "verdict", title: told.unmeasured, tabindex: 0 }, t("faithfulness not measured"));
  }
  const two = (value) => (value === null ? "–" : value.toFixed(2).replace("-", "−"));
  const seen = { r: two(told.correlation), low: two(told.low), high: two(told.high), control: two(told.control), share: percent(told.error_influence) };
  const kept = { kept: percent(told.faithfulness).replace("-", "−"), random: percent(told.faithfulness_control).replace("-", "−") };
  const why = {
    "": t("removals as predicted, correlation {r} ({low} to {high}), random nodes {control}", seen),
    errors: t("errors have {share} of the influence", seen),
    "few nodes": t("too few nodes can be removed to test it"),
    correlation: t("removals not as predicted, correlation {r} ({low} to {high})", seen),
    control: t("random nodes do as well, correlation {r} ({low} to {high}) against {control}", seen),
    faithfulness: told.faithfulness === null ? t("without its features the prediction is the same") : t("its nodes alone keep {kept} of the prediction, random ones {random}", kept),
  };
  const name = told.trustworthy ? t("trustworthy") : t("not trustworthy");
  return make("span", { class: `verdict ${told.trustworthy ? "yes" : "no"}`, id: "verdict" }, `${name}: ${why[told.reason] ?? told.verdict}`);
}

function paintLegend() {
  const kinds = [...new Set(nodes.map((node) => node.kind))].filter((kind) => kind !== "logit");
  const edge = (sign) => draw("svg", { width: 26, height: 8, "aria-hidden": "true" }, draw("path", { class: `edge ${sign}`, "stroke-width": 2.2, d: "M1 4H25" }));
  const marks = kinds.map((kind) => {
    const svg = icon({ kind });
    svg.querySelector("path").setAttribute("class", isHollow(kind) || kind === "error" ? "hollow" : "shape");
    return make("span", { class: "rows" }, svg, KINDS[kind] ?? kind);
  });
  element("legend").append(make("span", {}, edge("adds"), t("adds")), make("span", {}, edge("cuts"), t("suppresses")), ...marks, make("span", {}, t("larger: more influence")));
}

const isPhone = () => matchMedia("(max-width: 46rem)").matches;

function show() {
  arrange();
  paint();
  paintPanel();
  paintBar();
  search();
}

function paintBar() {
  for (const view of ["all", "pins"]) element(`view-${view}`).setAttribute("aria-pressed", state.view === view);
  element("pins").textContent = state.pinned.length || "";
  element("nodes").value = Math.round((1000 * Math.min(state.nodes, fullShare)) / fullShare);
  element("edges").value = Math.round((1000 * Math.min(state.edges, fullScore)) / (fullScore || 1));
  element("nodes-shown").textContent = percent(Math.min(state.nodes, fullShare));
  element("edges-shown").textContent = whole(drawnLinks.length);
  element("nodes").disabled = state.view === "pins";
  element("nodes").setAttribute("aria-valuetext", t("nodes that have {share} of the influence", { share: percent(Math.min(state.nodes, fullShare)) }));
  element("edges").setAttribute("aria-valuetext", t("{count} edges", { count: whole(drawnLinks.length) }));
  element("errors").checked = state.errors;
  element("group").hidden = state.marked.length < 2;
  element("group").textContent = t("Group {count}", { count: state.marked.length });
  element("undo").disabled = !undone.length;
}

// The nearest node in the direction of an arrow.
function step(key, name) {
  const from = itemOf.get(key);
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[name];
  let best = null;
  let least = Infinity;
  for (const item of shownItems) {
    const [x, y] = [item.x - from.x, item.y - from.y];
    const [along, aside] = [x * dx + y * dy, Math.abs(x * dy + y * dx)];
    if (along > 2 && along + 2.5 * aside < least) [best, least] = [item, along + 2.5 * aside];
  }
  if (!best) return;
  byKey.get(key)?.setAttribute("tabindex", -1);
  const mark = byKey.get(best.key);
  mark.setAttribute("tabindex", 0);
  mark.focus({ preventScroll: true });
  reveal(mark);
}

function pressed(event) {
  const isTyping = event.target.matches("input[type=search], input[type=text]");
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z" && !isTyping) {
    event.preventDefault();
    return undo();
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const at = event.target.closest(".node")?.dataset.key;
  if (event.key === "Escape") {
    if (element("query").value) {
      element("query").value = "";
      search();
    } else if (state.selected) {
      const before = state.selected;
      select(null);
      byKey.get(before)?.focus();
    } else if (state.marked.length) change((next) => (next.marked = []));
  } else if (event.target.id === "query" && event.key === "Enter") nextFound(event.shiftKey);
  else if (isTyping) return;
  else if (event.key === "/") {
    element("query").focus();
    element("query").select();
  } else if (at && event.key.startsWith("Arrow")) step(at, event.key);
  else if (at && (event.key === "Enter" || event.key === " ")) {
    if (event.shiftKey) mark(at);
    else select(state.selected === at ? null : at);
  } else if (event.key === "p" && (at ?? state.selected)) pin(at ?? state.selected);
  else if (event.key === "m" && (at ?? state.selected)) mark(at ?? state.selected);
  else if (event.key === "g" && state.marked.length > 1) group();
  else return;
  event.preventDefault();
}

const toldOf = (link) => `${nameOf(link.source)} → ${nameOf(link.target)}\n${weight(link.weight)}, ${t("{share} of what goes into it", { share: percent(link.part) })}`;

// What lies under the pointer: a node, or an edge that stands out.
function tell(event) {
  const tip = element("tip");
  const mark = event.target.closest?.(".node, .lit path");
  tip.hidden = !mark;
  if (!mark) return;
  const box = mark.getBoundingClientRect();
  const [left, top, bottom] = mark.dataset.key === undefined ? [event.clientX + 10, event.clientY, event.clientY] : [box.left, box.top, box.bottom];
  tip.textContent = mark.dataset.key === undefined ? mark.dataset.told : about(itemOf.get(mark.dataset.key));
  tip.style.left = `${Math.max(6, Math.min(left, innerWidth - tip.offsetWidth - 6))}px`;
  tip.style.top = `${bottom + 8 + tip.offsetHeight > innerHeight ? top - tip.offsetHeight - 8 : bottom + 8}px`;
}

function about(item) {
  const lines = [nameOf(item), `${kindOf(item)} · ${placeOf(item)}`, t("influence {share}", { share: percent(item.influence) })];
  if (item.node && item.node.activation !== null && ["feature", "neuron", "signal", "readout", "head"].includes(item.kind)) lines.push(`${t("activation")} ${number(item.node.activation)}`);
  const chosen = itemOf.get(state.selected);
  const between = chosen ? [...chosen.into.filter((each) => each.source === item), ...chosen.out.filter((each) => each.target === item)] : [];
  return [...lines, ...between.map(toldOf)].join("\n");
}

function listen() {
  const stage = element("stage");
  const keyOf = (event) => event.target.closest?.(".node")?.dataset.key ?? null;
  stage.addEventListener("click", (event) => {
    const key = keyOf(event);
    if (key && (event.shiftKey || event.ctrlKey || event.metaKey)) mark(key);
    else if (key) select(state.selected === key ? null : key);
    else if (state.selected && event.target.closest("svg")) select(null);
  });
  stage.addEventListener("dblclick", (event) => keyOf(event) && pin(keyOf(event)));
  stage.addEventListener("pointerover", (event) => {
    if (!event.target.closest(".lit")) light(keyOf(event));
    tell(event);
  });
  stage.addEventListener("scroll", follow, { passive: true });
  stage.addEventListener("pointerleave", () => {
    light(null);
    element("tip").hidden = true;
  });
  stage.addEventListener("focusin", (event) => keyOf(event) && event.target.matches(":focus-visible") && light(keyOf(event)));
  const panel = element("panel");
  panel.addEventListener("click", (event) => {
    const to = event.target.closest("[data-to]")?.dataset.to;
    if (to) select(to);
  });
  panel.addEventListener("pointerover", (event) => light(event.target.closest("[data-to]")?.dataset.to ?? null));
  panel.addEventListener("pointerleave", () => light(null));
  const clicks = {
    "view-all": () => change((next) => (next.view = "all")), "view-pins": () => change((next) => (next.view = "pins")), group, undo, copy: copyLink, save: saveState,
    open: () => element("file").click(), theme: switchTheme,
    skip: (event) => {
      event.preventDefault();
      (stage.querySelector('.node[tabindex="0"]') ?? stage).focus();
    },
  };
  for (const [id, act] of Object.entries(clicks)) element(id).addEventListener("click", act);
  element("file").addEventListener("change", () => element("file").files[0] && openState(element("file").files[0]));
  element("query").addEventListener("input", search);
  element("errors").addEventListener("change", () => change((next) => (next.errors = element("errors").checked)));
  for (const [id, full] of [["nodes", fullShare], ["edges", fullScore]]) {
    let before = null; // the state that a drag of the slider began with: all of it is one step
    element(id).addEventListener("input", () => {
      before ??= address();
      state[id] = (element(id).value / 1000) * full;
      paint();
      paintBar();
      search();
    });
    element(id).addEventListener("change", () => {
      if (before !== null && before !== address()) undone.push(before);
      before = null;
      remember(address());
      paintBar();
    });
  }
  addEventListener("keydown", pressed);
  addEventListener("hashchange", () => {
    adopt(fromAddress(location.hash.slice(1)));
    show();
  });
  let [width, height] = [0, 0];
  new ResizeObserver(() => {
    if (stage.clientWidth === width && (isPhone() || stage.clientHeight === height)) return; // a phone's grows with what it holds
    [width, height] = [stage.clientWidth, stage.clientHeight];
    paint();
    search();
  }).observe(stage);
}

function switchTheme() {
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  try {
    localStorage.setItem("reflowlens-theme", root.dataset.theme);
  } catch (error) {}
}

adopt(fromAddress(location.hash.slice(1)));
paintHead();
paintLegend();
listen();
show();
