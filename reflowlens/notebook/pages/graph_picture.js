// -- where things stand ------------------------------------------------------------------------------------------------

const LEFT = 66; // for the names of rows
const PITCHES = [18, 16, 14, 12]; // of the places in a cell: the largest that fits
const measure = document.createElement("canvas").getContext("2d");
function widthOf(text, font = "12px") {
  measure.font = `${font} Inter, system-ui, sans-serif`;
  return measure.measureText(text).width;
}

const IN_CELL = { head: 0, group: 1, direction: 1, feature: 1, neuron: 1, embedding: 0, position: 1, signal: 1, readout: 1, error: 3 };
const inCell = (a, b) => (IN_CELL[a.kind] ?? 2) - (IN_CELL[b.kind] ?? 2) || b.influence - a.influence;
const hasHeads = nodes.some((node) => node.kind === "head");
const lastLayer = Math.max(data.blocks - 1, ...nodes.map((node) => node.layer));
const isPill = (item) => item.kind === "logit";

// From the output down: each layer a row, heads a row of their own below the MLP of their layer.
function rowsOf(shown) {
  const rows = [];
  for (let layer = lastLayer; layer >= -1; layer--) {
    const here = shown.filter((item) => item.layer === layer);
    const heads = hasHeads ? here.filter((item) => item.kind === "head") : [];
    const isOutput = layer >= data.blocks;
    const name = isOutput && here.some((item) => item.kind === "readout") ? t("readout") : layerName(layer);
    if (isOutput && !here.length) continue;
    rows.push({ layer, name, items: here.filter((item) => !heads.includes(item)) });
    if (hasHeads && layer >= 0 && !isOutput) rows.push({ layer, name: `${name} ${t("heads")}`, items: heads });
  }
  return rows;
}

function placeAll(shown, available) {
  const n = data.tokens.length;
  const rows = rowsOf(shown);
  for (const row of rows) {
    row.pills = row.items.filter(isPill);
    row.cells = Array.from({ length: n }, () => []);
    for (const item of row.items) if (!isPill(item)) row.cells[Math.min(item.pos, n - 1)].push(item);
    for (const cell of row.cells) cell.sort(inCell);
  }
  const across = available.width - LEFT - 14;
  const { columns, pitch, widthFor } = columnsFor(rows, across, available.height - 70);
  const total = columns.reduce((sum, places) => sum + widthFor(places), 0);
  // Tokens lie flat below their columns where there is room for them, otherwise they lean.
  const inner = columns.map(widthFor);
  const wide = data.tokens.map((token, pos) => Math.max(inner[pos], widthOf(visible(token).trim() || "␣", "13px") + 10));
  const flat = wide.reduce((sum, width) => sum + width, 0) <= Math.max(across, total);
  const least = flat ? wide : inner;
  const spare = Math.max(0, across - least.reduce((sum, width) => sum + width, 0)) / n;
  const left = [];
  let x = LEFT;
  const widths = least.map((width) => width + spare);
  widths.forEach((width) => {
    left.push(x);
    x += width;
  });
  const width = x + 14;
  const footer = flat ? 30 : 18 + 0.72 * Math.min(96, Math.max(...data.tokens.map((token) => widthOf(shorter(bare(token), 13), "13px"))));
  for (const row of rows) {
    const deep = Math.max(0, ...row.cells.map((cell, pos) => Math.ceil(cell.length / columns[pos])));
    row.lines = deep;
    row.pillLines = pillLines(row.pills, across);
    row.height = Math.max(row.items.length ? 34 : 20, deep * pitch + 12 + row.pillLines.length * 32);
  }
  const used = rows.reduce((sum, row) => sum + row.height, 0) + footer + 10;
  const stretch = Math.max(0, Math.min(60, (available.height - used) / rows.length));
  let y = 6;
  for (const row of rows) {
    row.top = y;
    row.height += row.items.length ? stretch : Math.min(stretch, 14);
    y += row.height;
    const middle = row.top + row.height / 2;
    row.cells.forEach((cell, pos) => {
      const inLine = columns[pos];
      const count = Math.ceil(cell.length / inLine);
      cell.forEach((item, i) => {
        const line = Math.floor(i / inLine);
        const here = Math.min(inLine, cell.length - line * inLine);
        item.x = left[pos] + widths[pos] / 2 + ((i % inLine) - (here - 1) / 2) * pitch;
        item.y = middle + ((count - 1) / 2 - line) * pitch + row.pillLines.length * 16;
      });
    });
    row.pillLines.forEach((pills, line) => {
      const wide = pills.reduce((sum, pill) => sum + pill.width + 8, -8);
      let at = Math.max(LEFT + 4, Math.min(left[n - 1] + widths[n - 1] / 2 - wide / 2, width - 16 - wide)); // above the last token
      for (const pill of pills) {
        pill.x = at + pill.width / 2;
        pill.y = row.lines ? row.top + 20 + line * 32 : middle + (line - (row.pillLines.length - 1) / 2) * 32;
        at += pill.width + 8;
      }
    });
  }
  return { rows, left, widths, width, height: y + footer, flat, floor: y, pitch };
}

// How many places each column has side by side: they grow where the most lines are until the rows fit the height, and
// then while there is room. Where not even the smallest pitch fits, the picture scrolls.
function columnsFor(rows, across, height) {
  const n = data.tokens.length;
  const most = Array.from({ length: n }, (_, pos) => Math.max(...rows.map((row) => row.cells[pos].length)));
  for (const pitch of PITCHES) {
    const widthFor = (places) => Math.max(24, places * pitch + 10);
    const columns = new Array(n).fill(1);
    const lines = (pos) => Math.ceil(most[pos] / columns[pos]);
    const isHigh = () => rows.reduce((sum, row) => sum + Math.max(20, 14 + 32 * Math.min(1, row.pills.length) + pitch * Math.max(...row.cells.map((cell, pos) => Math.ceil(cell.length / columns[pos])))), 0) > height;
    let total = n * widthFor(1);
    for (;;) {
      let pos = 0;
      for (let i = 1; i < n; i++) if (lines(i) > lines(pos)) pos = i;
      const wider = widthFor(columns[pos] + 1) - widthFor(columns[pos]);
      const isRoom = total + wider <= across;
      if (lines(pos) <= 1 || !(isHigh() ? isRoom || (pitch === PITCHES.at(-1) && lines(pos) > 4) : isRoom && lines(pos) > 3)) break;
      columns[pos]++;
      total += wider;
    }
    if (pitch === PITCHES.at(-1) || (!isHigh() && total <= across)) return { columns, pitch, widthFor };
  }
}

function pillLines(pills, across) {
  const lines = [];
  let room = 0;
  let told = 0;
  for (const pill of [...pills].sort((a, b) => b.target - a.target)) {
    pill.text = shorter(nameOf(pill).replace(/[“”]/g, ""), 30);
    pill.chance = pill.node?.probability && told < 3 ? percent(pill.node.probability) : ""; // of the likeliest
    pill.width = Math.max(26, widthOf(pill.text) + (pill.chance ? widthOf(pill.chance, "11px") + 6 : 0) + 18);
    told++;
    if (!lines.length || room < pill.width) {
      lines.push([]);
      room = Math.max(across, pill.width);
    }
    lines.at(-1).push(pill);
    room -= pill.width + 8;
  }
  return lines;
}

const BOX = { height: 38, gap: 12 };

// Pinned nodes as boxes that can be read: a row a layer, ordered by token, in several lines where they do not fit.
function placePins(shown, available) {
  const rows = rowsOf(shown).filter((row) => row.items.length);
  const inner = Math.max(available.width - LEFT - 20, 260);
  const n = data.tokens.length;
  let y = 10;
  for (const row of rows) {
    row.cells = [];
    const boxes = [...row.items].sort((a, b) => a.pos - b.pos || b.target - a.target || inCell(a, b));
    for (const item of boxes) {
      item.text = shorter(nameOf(item), 28);
      item.below = shorter(placeOf(item), 34);
      item.width = Math.max(54, 22 + Math.max(widthOf(item.text, "12.5px"), widthOf(item.below, "10.5px")));
    }
    row.boxes = [[]];
    let filledTo = 0;
    for (const box of boxes) {
      if (filledTo + box.width > inner && filledTo) {
        row.boxes.push([]);
        filledTo = 0;
      }
      row.boxes.at(-1).push(box);
      filledTo += box.width + BOX.gap;
    }
  }
  const lines = rows.reduce((sum, row) => sum + row.boxes.length, 0);
  const margin = Math.max(6, Math.min(17, (available.height - 20 - lines * (BOX.height + 14)) / (2 * rows.length)));
  for (const row of rows) {
    row.top = y;
    row.height = row.boxes.length * (BOX.height + 14) + 2 * margin;
    row.boxes.forEach((line, i) => spread(line, row.top + margin + (i + 0.5) * (BOX.height + 14), inner, n));
    y += row.height;
  }
  const stretch = Math.max(0, Math.min(70, (available.height - y - 10) / Math.max(1, rows.length)));
  rows.forEach((row, i) => {
    row.top += i * stretch;
    row.height += stretch;
    for (const item of row.items) item.y += (i + 0.5) * stretch;
  });
  const right = Math.max(available.width - 2, ...shown.map((item) => item.x + item.width / 2 + 14));
  return { rows, left: [], widths: [], width: right, height: y + rows.length * stretch + 8, floor: y };
}

// Boxes of a line as near to their tokens' columns as they come without touching.
function spread(line, y, inner, n) {
  let least = LEFT;
  for (const box of line) {
    box.x = Math.max(least + box.width / 2, LEFT + ((box.pos + 0.5) / n) * inner);
    box.y = y;
    least = box.x + box.width / 2 + BOX.gap;
  }
  let most = LEFT + inner;
  for (const box of [...line].reverse()) {
    box.x = Math.max(LEFT + box.width / 2, Math.min(box.x, most - box.width / 2));
    most = box.x - box.width / 2 - BOX.gap;
  }
}

// -- shapes ------------------------------------------------------------------------------------------------------------

const polygon = (r, corners, turn) =>
  `M${Array.from({ length: corners }, (_, i) => [Math.cos(turn + (2 * Math.PI * i) / corners) * r, Math.sin(turn + (2 * Math.PI * i) / corners) * r].map((x) => x.toFixed(1)).join(" ")).join("L")}Z`;
const rounded = (width, height, r) => {
  const [w, h] = [width / 2 - r, height / 2 - r];
  return `M${-w} ${-h - r}H${w}a${r} ${r} 0 0 1 ${r} ${r}V${h}a${r} ${r} 0 0 1 ${-r} ${r}H${-w}a${r} ${r} 0 0 1 ${-r} ${-r}V${-h}a${r} ${r} 0 0 1 ${r} ${-r}Z`;
};
const SHAPES = {
  feature: (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
  neuron: (r) => polygon(1.2 * r, 4, 0),
  head: (r) => polygon(1.25 * r, 3, -Math.PI / 2),
  error: (r) => `M${-0.75 * r} ${-0.75 * r}L${0.75 * r} ${0.75 * r}M${-0.75 * r} ${0.75 * r}L${0.75 * r} ${-0.75 * r}`,
  embedding: (r) => rounded(1.8 * r, 1.8 * r, 1.5),
  position: (r) => rounded(1.6 * r, 1.6 * r, 1),
  signal: (r) => polygon(1.1 * r, 6, 0),
  readout: (r) => polygon(1.1 * r, 6, Math.PI / 6),
  logit: (r) => rounded(2.6 * r, 1.7 * r, 0.8 * r),
  direction: (r) => polygon(1.25 * r, 5, -Math.PI / 2),
  group: (r) => rounded(2.4 * r, 2 * r, 0.6 * r),
};
const HOLLOW = ["position", "readout"];
const shapeOf = (kind, r) => (SHAPES[kind] ?? SHAPES.feature)(r);
const isHollow = (kind) => HOLLOW.includes(kind) || !(kind in SHAPES);

function classesOf(item) {
  const kept = ["node", item.kind];
  if (item.kind === "embedding" || item.kind === "signal") kept.push("input");
  if (isHollow(item.kind)) kept.push("hollow");
  if (item.label !== undefined) kept.push("grouped");
  if (item.width) kept.push("box");
  if (item.target > 0) kept.push("explained");
  if (state.pinned.includes(item.key)) kept.push("pinned");
  if (state.marked.includes(item.key)) kept.push("marked");
  if (state.selected === item.key) kept.push("selected");
  if (found.has(item.key)) kept.push("found");
  if (!item.isJoined && state.view === "all" && !isKept(item) && !INPUTS.includes(item.kind)) kept.push("alone");
  return kept.join(" ");
}

function drawNode(item, largest, pitch) {
  const isBox = state.view === "pins" || isPill(item);
  if (!isBox) item.width = 0;
  const r = item.label !== undefined || item.target > 0 ? 0.42 * pitch : INPUTS.includes(item.kind) ? pitch / 3 : 0.2 * pitch + 0.3 * pitch * Math.sqrt(Math.min(1, item.influence / largest));
  const height = state.view === "pins" ? BOX.height : 24;
  item.r = isBox ? height / 2 : r;
  const about = [kindOf(item), nameOf(item), placeOf(item), t("influence {share}", { share: percent(item.influence) })].join(", ");
  const group = draw("g", {
    class: classesOf(item), transform: `translate(${item.x.toFixed(1)} ${item.y.toFixed(1)})`, role: "button", tabindex: -1,
    "aria-label": about, "aria-pressed": state.selected === item.key ? "true" : "false", "data-key": item.key,
  });
  if (isBox) {
    const radius = item.kind === "logit" ? 11 : 6;
    group.append(draw("path", { class: "shape", d: rounded(item.width, height, radius) }), draw("path", { class: "halo", d: rounded(item.width + 6, height + 6, radius + 3) }));
  } else {
    group.append(
      draw("circle", { r: Math.max(r + 1, pitch / 2), fill: "transparent" }),
      draw("path", { class: "shape", d: shapeOf(item.kind, r) }),
      draw("circle", { class: "halo", r: r + 3.2 }),
    );
  }
  if (state.view === "pins") {
    group.append(draw("text", { "text-anchor": "middle", y: -2 }, item.text), draw("text", { class: "below", "text-anchor": "middle", y: 12 }, item.below));
  } else if (isPill(item)) {
    const probability = item.chance ? draw("tspan", { class: "probability", dx: 6, "font-size": 11 }, item.chance) : null;
    group.append(draw("text", { "text-anchor": "middle", y: 4 }, item.text, probability));
  }
  return group;
}

// Where an edge meets a box: the side that the other end is on.
function port(item, other) {
  const room = Math.max(0, (item.width ?? 0) / 2 - 12);
  return item.x + Math.max(-room, Math.min(room, 0.16 * (other.x - item.x)));
}

function curve(source, target) {
  const [x1, y1, x2, y2] = [port(source, target), source.y - source.r, port(target, source), target.y + target.r];
  const bend = y1 - y2 > 8 ? 0.5 * (y1 - y2) : -30; // within a row: below
  const y = bend > 0 ? [y1, y2] : [source.y + source.r, target.y + target.r];
  return `M${x1.toFixed(1)} ${y[0].toFixed(1)}C${x1.toFixed(1)} ${(y[0] - bend).toFixed(1)} ${x2.toFixed(1)} ${(y[1] + bend).toFixed(1)} ${x2.toFixed(1)} ${y[1].toFixed(1)}`;
}

// -- the picture -------------------------------------------------------------------------------------------------------

const found = new Set(); // keys that the search leaves
let shownItems = []; // drawn
let drawnLinks = [];
let byKey = new Map(); // key -> its element
let isFirst = true;

// The names of rows stay in sight.
function follow() {
  element("rows")?.setAttribute("transform", `translate(${element("stage").scrollLeft} 0)`);
}

const WIDTHS = [0.7, 1.1, 1.7, 2.6, 4];
const widthClass = (share) => Math.min(WIDTHS.length - 1, Math.floor(share * WIDTHS.length));

function paint() {
  const stage = element("stage");
  const focused = document.activeElement?.closest?.(".node")?.dataset.key;
  const scroll = [stage.scrollLeft, stage.scrollTop];
  shownItems = items.filter(isShown);
  const isPins = state.view === "pins";
  const isThere = new Set(shownItems);
  for (const item of items) item.isJoined = false;
  drawnLinks = links.filter((link) => isThere.has(link.source) && isThere.has(link.target));
  drawnLinks = isPins ? ofMostScore(drawnLinks) : drawnLinks.filter(aboveThreshold());
  for (const { source, target } of drawnLinks) source.isJoined = target.isJoined = true;
  byKey = new Map();
  if (isPins && !shownItems.length) {
    stage.replaceChildren(emptyPins());
    return;
  }
  const available = { width: Math.max(stage.clientWidth, 320), height: isPhone() ? 420 : stage.clientHeight - 4 };
  const plan = (isPins ? placePins : placeAll)(shownItems, available);
  const largest = Math.max(1e-9, ...shownItems.filter((item) => !INPUTS.includes(item.kind)).map((item) => item.influence));
  const svg = draw("svg", { width: plan.width, height: plan.height, viewBox: `0 0 ${plan.width} ${plan.height}`, role: "group", "aria-label": t("Nodes by layer and token; arrow keys move between them"), class: isPins ? "pins" : "all" });
  svg.append(ground(plan));
  const marks = shownItems.map((item) => drawNode(item, largest, plan.pitch ?? 18));
  shownItems.forEach((item, i) => byKey.set(item.key, marks[i]));
  const names = plan.rows.map((row) => draw("text", { class: "row", x: 10, y: row.top + row.height / 2 + 4 }, row.name));
  svg.append(drawEdges(), draw("g", { class: "lit" }), draw("g", { class: "nodes" }, ...marks), draw("g", { class: "labels" }), draw("g", { id: "rows", "aria-hidden": "true" }, ...names));
  const entry = byKey.get(focused) ?? byKey.get(state.selected) ?? marks.at(-1);
  entry?.setAttribute("tabindex", 0);
  stage.replaceChildren(svg);
  [stage.scrollLeft, stage.scrollTop] = isFirst ? [plan.width, 0] : scroll; // the end of the prompt is where it is read
  isFirst = false;
  follow();
  if (focused && byKey.has(focused)) byKey.get(focused).focus({ preventScroll: true });
  light(null);
}

// Of the edges among pinned nodes those of the highest score, as large a share of theirs as of all edges.
function ofMostScore(among) {
  const enough = (state.edges / (fullScore || 1)) * among.reduce((sum, link) => sum + link.score, 0) - 1e-9;
  let sum = 0;
  const reached = new Set(); // every node keeps the best edge into it, and out of it
  return among.filter((link) => {
    const isBest = !reached.has(link.source.out) || !reached.has(link.target.into);
    reached.add(link.source.out).add(link.target.into);
    sum += link.score;
    return isBest || sum - link.score < enough;
  });
}

function ground(plan) {
  const group = draw("g", { "aria-hidden": "true" });
  plan.rows.forEach((row, i) => {
    if (i % 2 === 0) group.append(draw("rect", { class: "band", x: 0, y: row.top, width: plan.width, height: row.height }));
  });
  plan.left.forEach((x, pos) => {
    const middle = x + plan.widths[pos] / 2;
    const text = shorter(visible(data.tokens[pos]).trim() || visible(data.tokens[pos]), 13);
    group.append(draw("line", { class: "guide", x1: x, x2: x, y1: 6, y2: plan.floor }));
    const place = plan.flat ? { x: middle, y: plan.floor + 18, "text-anchor": "middle" } : { transform: `translate(${middle + 4} ${plan.floor + 12}) rotate(-45)`, "text-anchor": "end" };
    group.append(draw("text", { class: "word", "data-pos": pos, ...place }, text));
  });
  return group;
}

// All edges of one sign and width are one path: thousands are drawn at once.
function drawEdges() {
  const parts = new Map();
  const most = Math.max(...drawnLinks.map((link) => link.score));
  for (const link of drawnLinks) {
    const key = `${link.weight < 0 ? "cuts" : "adds"} ${widthClass(state.view === "pins" ? Math.sqrt(link.part) * 1.9 : (link.score / most) ** 0.6)}`;
    if (!parts.has(key)) parts.set(key, []);
    parts.get(key).push(curve(link.source, link.target));
  }
  const paths = [...parts].sort().map(([key, curves]) => {
    const [sign, width] = key.split(" ");
    return draw("path", { class: sign, "stroke-width": WIDTHS[width], d: curves.join("") });
  });
  return draw("g", { class: "edges", "aria-hidden": "true" }, ...paths);
}

// A node under the pointer or the focus, otherwise the selected one: its edges and neighbours stand out.
function light(key) {
  const svg = element("stage").querySelector("svg");
  if (!svg) return;
  const item = itemOf.get(key ?? state.selected);
  const at = item && byKey.has(item.key) ? item : null;
  svg.classList.toggle("focused", Boolean(at));
  svg.classList.toggle("searching", found.size > 0 && !key);
  const near = new Map();
  const lit = [];
  if (at) {
    for (const link of [...at.into, ...at.out]) {
      const other = link.source === at ? link.target : link.source;
      if (!byKey.has(other.key)) continue;
      lit.push(link);
      if (Math.abs(link.weight) > Math.abs(near.get(other.key)?.weight ?? 0)) near.set(other.key, link);
    }
    lit.sort((a, b) => b.part - a.part);
  }
  const strongest = lit.slice(0, 80);
  const isNear = new Set(strongest.flatMap((link) => [link.source.key, link.target.key]));
  const most = { into: Math.max(...strongest.filter((link) => link.target === at).map((link) => link.part)), out: Math.max(...strongest.filter((link) => link.source === at).map((link) => link.part)) };
  const paths = strongest.reverse().map((link) => {
    const part = link.part / (link.target === at ? most.into : most.out);
    return draw("path", { class: link.weight < 0 ? "cuts" : "adds", d: curve(link.source, link.target), "stroke-width": (0.7 + 4.8 * part).toFixed(2), "data-told": toldOf(link) });
  });
  svg.querySelector(".lit").replaceChildren(...paths);
  for (const [name, mark] of byKey) {
    const link = isNear.has(name) && name !== at?.key ? near.get(name) : null;
    mark.classList.toggle("near", Boolean(link));
    mark.classList.toggle("adds", Boolean(link) && link.weight >= 0);
    mark.classList.toggle("cuts", Boolean(link) && link.weight < 0);
    mark.classList.toggle("at", name === at?.key);
  }
  for (const token of svg.querySelectorAll(".word")) token.classList.toggle("here", Boolean(at) && Number(token.dataset.pos) === at.pos);
  if (state.view === "all") writeLabels(svg, at, strongest);
}

// Names beside what is pinned or grouped, the node that stands out and its strongest neighbours, where there is room.
function writeLabels(svg, at, strongest) {
  const wanted = [];
  if (at) wanted.push(at, ...[...strongest].reverse().slice(0, 7).map((link) => (link.source === at ? link.target : link.source)));
  else {
    wanted.push(...shownItems.filter((item) => state.pinned.includes(item.key) || item.label !== undefined));
    wanted.push(...shownItems.filter((item) => item.target > 0));
    if (!state.pinned.length) wanted.push(...[...shownItems].filter((item) => item.node?.up?.length && item.isJoined).sort((a, b) => b.influence - a.influence).slice(0, 10));
  }
  const bodies = shownItems.map((item) => [item.x - (item.width / 2 || item.r), item.y - item.r, item.x + (item.width / 2 || item.r), item.y + item.r]);
  const taken = [];
  const meets = (a, b) => a[0] < b[2] && a[2] > b[0] && a[1] < b[3] && a[3] > b[1];
  const box = svg.viewBox.baseVal;
  const labels = [];
  for (const item of new Set(wanted)) {
    if (isPill(item) || INPUTS.includes(item.kind)) continue;
    const text = shorter(nameOf(item), 30);
    const width = widthOf(text, "11.5px") + 4;
    const [x, y, r] = [item.x, item.y, item.r];
    const places = [[x + r + 4, y + 4, "start"], [x - r - 4, y + 4, "end"], [x, y - r - 5, "middle"], [x, y + r + 13, "middle"], [x - r, y - r - 5, "start"], [x + r, y - r - 5, "end"], [x - r, y + r + 13, "start"], [x + r, y + r + 13, "end"]];
    const areas = places.map(([from, base, anchor]) => {
      const start = anchor === "start" ? from : anchor === "end" ? from - width : from - width / 2;
      return [start, base - 10, start + width, base + 3];
    });
    const isFree = (area) => area[0] > 2 && area[2] < box.width && area[1] > 0 && !taken.some((other) => meets(area, other));
    let chosen = areas.findIndex((area) => isFree(area) && !bodies.some((body) => meets(area, body)));
    if (chosen < 0 && (item === at || isKept(item))) chosen = areas.findIndex(isFree);
    if (chosen < 0) continue;
    taken.push(areas[chosen]);
    const [from, base, anchor] = places[chosen];
    labels.push(draw("text", { class: "label", x: from, y: base, "text-anchor": anchor }, text));
  }
  svg.querySelector(".labels").replaceChildren(...labels);
}

function emptyPins() {
  return make("div", { class: "empty" }, make("p", {}, t("Nothing is pinned yet. Pin nodes to draw a small graph of them alone, with their names.")), button(t("Pin the strongest"), pinStrongest, { class: "main", id: "strongest" }));
}

// The likeliest target, and what most of it goes through: a start.
function pinStrongest() {
  change((next) => {
    const target = [...items].filter((item) => item.target > 0).sort((a, b) => b.target - a.target)[0];
    const strongest = [...items].filter((item) => !INPUTS.includes(item.kind) && item.kind !== "error" && item !== target).sort((a, b) => b.influence - a.influence).slice(0, 14);
    const inputs = items.filter((item) => item.kind === "embedding").sort((a, b) => b.influence - a.influence).slice(0, 6);
    next.pinned = [...new Set([...next.pinned, ...[target, ...strongest, ...inputs].filter(Boolean).map((item) => item.key)])];
  });
}
