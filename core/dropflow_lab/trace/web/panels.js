// One panel for each policy, the sliders, and the legend

const most = (pick) => Math.max(...data.runs.map((run) => Math.max(...pick(run).flat())));
const mostVisual = Math.max(data.images.reduce((sum, image) => sum + image.patches, 0),
  most((run) => run.layers.map((layer) => layer[0])));
const mostCache = most((run) => [...run.layers.map((layer) => layer[1]), ...run.calls.map((call) => call.kv)]);

function heldNow(run, layer, moment) {
  return moment && run.calls.length ? run.calls[Math.min(moment, run.calls.length) - 1].kv[layer] : run.layers[layer][1];
}

function readNow(run, layer, moment) {
  const read = moment > 1 && run.calls.length ? run.calls[Math.min(moment, run.calls.length) - 1].read[layer] : undefined;
  return read === undefined ? "" : `, of which this step read ${read}`;
}

const panels = data.runs.map((run, number) => {
  const panel = { run, canvases: [] };
  panel.counts = make("p", { className: "counts" });
  panel.parts = make("p", { className: "parts soft" });
  panel.detail = make("p", { className: "detail soft" });
  panel.detail.setAttribute("role", "status");
  panel.view = make("select", { id: `view-${number}` }, make("option", { value: "", textContent: "survivors" }));
  run.scores.forEach((score, n) => panel.view.append(
    make("option", { value: n, textContent: `scores of ${score.stage} at ${score.at}` })));
  panel.view.addEventListener("change", update);
  panel.scale = make("div", { className: "scale soft" });
  panel.answer = make("p", { className: "answer" });
  panel.visual = make("figure");
  panel.cache = make("figure");
  panel.table = make("tbody");
  const holder = make("div", { className: "pictures" });
  data.images.forEach((image, n) => {
    const [rows, columns] = image.grid;
    const canvas = make("canvas", { className: "map", tabIndex: 0 });
    const shown = data.images.length - data.videos.reduce((sum, frames) => sum + frames.length - 1, 0);
    canvas.cell = Math.max(6, Math.floor(Math.min(400 / columns, 400 / rows) / Math.min(shown, 2)));
    canvas.style.width = columns * canvas.cell + "px";
    canvas.style.aspectRatio = `${columns} / ${rows}`;
    canvas.setAttribute("role", "img");
    canvas.addEventListener("keydown", (event) => walk(event, n));
    canvas.addEventListener("focus", () => { Object.assign(state, { image: n, patch: Math.min(state.patch, image.patches - 1), pointed: true }); update(); });
    canvas.addEventListener("blur", leave);
    canvas.addEventListener("mouseleave", leave);
    canvas.addEventListener("mousemove", (event) => {
      const box = canvas.getBoundingClientRect();
      const c = Math.floor((event.clientX - box.left) / box.width * columns);
      const r = Math.floor((event.clientY - box.top) / box.height * rows);
      const patch = Math.min(Math.max(r, 0), rows - 1) * columns + Math.min(Math.max(c, 0), columns - 1);
      if (patch < image.patches && (patch !== state.patch || n !== state.image || !state.pointed)) {
        Object.assign(state, { image: n, patch, pointed: true });
        update();
      }
    });
    panel.canvases.push(canvas);
    holder.append(canvas);
  });
  const title = make("h2", { id: `run-${number}`, textContent: run.name });
  const head = make("tr", {}, ...["layer", "visual tokens", "KV entries", "multiply-adds", "what happens before it"]
    .map((text) => make("th", { scope: "col", textContent: text })));
  const section = make("section", { className: "panel" }, title, panel.answer, panel.counts, panel.parts,
    make("div", {}, make("label", { htmlFor: panel.view.id, textContent: "Show " }), panel.view), panel.scale, holder, panel.detail,
    panel.visual, panel.cache,
    make("details", {}, make("summary", { textContent: "All layers as a table" }),
      make("table", {}, make("thead", {}, head), panel.table)));
  section.setAttribute("aria-labelledby", title.id);
  $("panels").append(section);
  return panel;
});

function leave() {
  state.pointed = Boolean(document.activeElement && document.activeElement.classList.contains("map"));
  update();
}

function walk(event, image) {
  const [, columns] = data.images[image].grid, last = data.images[image].patches - 1;
  const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  let patch = state.patch;
  if (event.key in moves) patch += moves[event.key];
  else if (event.key === "Home") patch = 0;
  else if (event.key === "End") patch = last;
  else return;
  event.preventDefault();
  if (patch < 0 || patch > last) return;
  Object.assign(state, { image, patch });
  update();
}

/** Whether a token that stands for no patch, such as CLS, is still live; caches are ignored. */
function alive(run, image, place, layer) {
  return layer >= run.entry && layer < run.exit &&
    run.boundaries.every((boundary) => boundary.at > layer || boundary.kept[image](place));
}

function named(image) {
  const frames = videoOf(image);
  return frames ? `image ${image} (frame ${frames.indexOf(image)} of ${frames.length})` : `image ${image}`;
}

function events(run, layer) {
  const told = [];
  if (layer === run.entry && run.enteredBy.length) told.push(`vision enters (${run.enteredBy.join(", ")})`);
  if (layer === run.exit && run.exitedBy.length) told.push(`vision exits (${run.exitedBy.join(", ")})`);
  for (const boundary of run.boundaries) {
    if (boundary.at !== layer) continue;
    const [dropped, merged, into] = boundary.gone, names = boundary.by.map((one) => one.stage).join(" and ");
    told.push(`${names}: ${dropped} dropped` + (merged ? `, ${merged} merged into ${into}` : ""));
  }
  return told.join("; ");
}

function updatePanel(panel) {
  const { run } = panel, { layer, moment } = state;
  const counts = { kept: 0, merged: 0, absent: 0, dropped: 0, evicted: 0, away: 0, tokens: 0, shield: 0, alone: 0 };
  const stands = data.images.map((_, n) => standing(run, n, layer, moment));
  stands.forEach(({ fates, groups }, n) => {
    for (const fated of fates) counts[fated.kind]++;
    for (const [place, cells] of groups) {
      counts.tokens += cells.length > 1;
      counts.shield += run.shield[n].has(place);
    }
    const alone = run.alone[n].filter((place) => alive(run, n, place, layer)).length;
    counts.alone += alone;
    panel.canvases[n].setAttribute("aria-label",
      `${run.name}, ${named(n)}: patches that are live in layer ${layer}. Arrow keys move from patch to patch.`);
    panel.canvases[n].style.display = isShown(n) ? "" : "none";
    panel.canvases[n].dataset.live = groups.size + alone;
  });
  const visual = run.layers[layer][0], held = heldNow(run, layer, moment);
  panel.counts.replaceChildren(
    `Layer ${layer}: `, make("span", { className: "visual", textContent: visual }), ` of ${mostVisual} visual tokens; `,
    make("span", { className: "kv", textContent: held }), " KV entries" + readNow(run, layer, moment));
  panel.parts.textContent = [
    counts.merged && `${plural(counts.merged, "patch")} merged into ${plural(counts.tokens, "token")}`,
    counts.away && `${counts.away} merged into other frames`,
    counts.dropped && `${counts.dropped} dropped`, counts.absent && `${counts.absent} not yet in`,
    counts.evicted && `${counts.evicted} out of the cache`, counts.shield && `${plural(counts.shield, "token")} protected`,
    counts.alone && `${plural(counts.alone, "token")} shown at no patch`,
  ].filter(Boolean).join(" · ") || "all patches live";
  const patch = state.patch, place = `${named(state.image).replace(/^i/, "I")}, patch ${patch}: `;
  const fated = stands[state.image].fates[patch], others = run.others[state.image][patch];
  const scored = run.scores.map((score) => ({ score, value: score.values[state.image][patch] }))
    .filter(({ value }) => value !== null && value !== undefined)
    .map(({ score, value }) => `${value} by ${score.stage} at ${score.at}`);
  panel.detail.textContent = place + fated.why + "." +
    (others ? ` The encoder gave ${plural(others, "other token")} a share of it, too.` : "") +
    (scored.length ? ` Scores: ${scored.join("; ")}.` : "");
  const score = run.scores[panel.view.value];
  panel.scale.replaceChildren();
  if (score) {
    const ramp = make("i");
    ramp.style.background = `linear-gradient(90deg, ${[0, .2, .4, .6, .8, 1].map(cividis).join(",")})`;
    panel.scale.append(`${score.ranks.low}`, ramp, `${score.ranks.high} (coloured by rank; × gone, ○ merged)`);
  }
  data.images.forEach((_, n) => { if (isShown(n)) drawImage(panel, n, stands[n]); });
  panel.visual.replaceChildren(make("figcaption", { textContent: `Visual tokens in layers 0 to ${data.depth - 1}, of ${mostVisual}` }),
    bars(panel, `Visual tokens by layer: ${run.layers.map((l) => l[0]).join(", ")}`, run.layers.map((l) => l[0]), mostVisual, "visual"));
  const cache = run.layers.map((_, n) => heldNow(run, n, moment));
  panel.cache.replaceChildren(make("figcaption", { textContent: `KV entries in layers 0 to ${data.depth - 1}, of ${mostCache}` }),
    bars(panel, `KV entries by layer: ${cache.join(", ")}`, cache, mostCache, "cache"));
  panel.answer.replaceChildren("Answer: ", ...run.calls.flatMap((call, n) => [
    make("span", { textContent: call.text, className: n + 1 === moment ? "now" : "" }), " "]));
  panel.table.replaceChildren(...run.layers.map((own, n) => make("tr", {},
    ...[n, own[0], cache[n], own[2].toLocaleString("en"), events(run, n)].map((text) => make("td", { textContent: text })))));
}

const longest = Math.max(1, ...data.videos.map((frames) => frames.length));
const calls = Math.max(...data.runs.map((run) => run.calls.length));
function update() {
  state.layer = Number($("layer").value);
  state.moment = Number($("moment").value);
  state.time = Number($("time").value);
  const frames = videoOf(state.image);
  if (frames) state.image = shownFrame(frames);
  const { layer, moment } = state;
  $("layer-now").textContent = `${layer} of 0 to ${data.depth - 1}`;
  $("moment-now").textContent = moment === 0 ? "while the prompt is read"
    : moment === 1 ? "after the prefill, with the first token" : `after decode step ${moment - 1} of ${calls - 1}`;
  $("time-now").textContent = `${state.time} of 0 to ${longest - 1}`;
  $("layer").setAttribute("aria-valuetext", `layer ${layer}`);
  $("moment").setAttribute("aria-valuetext", $("moment-now").textContent);
  panels.forEach(updatePanel);
}

// Legend: drawn by the same code as the pictures

const KINDS = [
  ["live", { kind: "kept" }], ["merged into one token", { kind: "merged", cells: [0, 1], wide: 44 }],
  ["merged into one elsewhere", { kind: "merged", cells: [0, 9], wide: 22 }], ["protected", { kind: "kept", shield: true }],
  ...(data.videos.length ? [["merged into another frame", { kind: "away" }]] : []),
  ["dropped", { kind: "dropped" }], ["not yet in", { kind: "absent" }], ["out of the cache", { kind: "evicted" }],
];
function drawLegend() {
  $("legend").replaceChildren(...KINDS.map(([text, fated]) => {
    const wide = fated.wide || 22, canvas = make("canvas"), ratio = window.devicePixelRatio || 1;
    Object.assign(canvas, { width: wide * ratio, height: 22 * ratio });
    Object.assign(canvas.style, { width: wide + "px", height: "22px" });
    canvas.setAttribute("aria-hidden", "true");
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const sky = pen.createLinearGradient(0, 0, wide, 22);
    sky.addColorStop(0, "#7a8f9f"); sky.addColorStop(1, "#4a5a48");
    pen.fillStyle = sky; pen.fillRect(0, 0, wide, 22);
    if (fated.kind === "merged") drawGroup(pen, fated.cells, fated.cells[1], 4, 22, false);
    else drawCell(pen, 0, 0, 22, fated);
    return make("li", {}, canvas, text);
  }));
}

$("question").textContent = data.question;
$("facts").textContent = `${plural(data.images.length, "image")}, ${mostVisual} visual tokens in a prompt of ` +
  `${data.tokens}; ${plural(data.depth, "layer")} (${data.model}); ${plural(data.runs.length, "policy").replace("policys", "policies")}.`;
$("layer").max = data.depth - 1;
$("moment").max = calls;
$("time").max = longest - 1;
if (longest < 2) for (const part of document.querySelectorAll(".time")) part.hidden = true;
$("layer").addEventListener("input", update);
$("moment").addEventListener("input", update);
$("time").addEventListener("input", update);
const redraw = () => { drawLegend(); update(); };
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
Promise.all(pictures.filter(Boolean).map((picture) => picture.decode().catch(() => null))).then(() => {
  redraw();
  document.body.dataset.ready = "yes";
});
redraw();
