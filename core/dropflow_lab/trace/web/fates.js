// What became of each patch, from the trace in `data`

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const make = (name, set = {}, ...children) => {
  const node = Object.assign(document.createElement(name), set);
  node.append(...children);
  return node;
};
const svg = (name, set) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(set)) node.setAttribute(key, value);
  return node;
};
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const bits = (text) => { const raw = atob(text); return (n) => (raw.charCodeAt(n >> 3) >> (n & 7)) & 1; };
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : word.endsWith("ch") ? "es" : "s"}`;
const state = { layer: 0, moment: 0, time: 0, image: 0, patch: 0, pointed: false };
/** The video of an image, and its frame that is shown now; pictures are always shown. */
const videoOf = (image) => data.videos.find((frames) => frames.includes(image));
const shownFrame = (frames) => frames[Math.min(state.time, frames.length - 1)];
const isShown = (image) => { const frames = videoOf(image); return !frames || shownFrame(frames) === image; };

// Data in a form that is fast to query

for (const run of data.runs) {
  for (const boundary of run.boundaries) {
    boundary.kept = boundary.kept.map(bits);
    for (const one of boundary.by) one.dropped = one.dropped.map(bits);
  }
  run.groups = run.places.map((places) => {
    const groups = new Map();
    (places || []).forEach((place, cell) => {
      if (place >= 0) groups.set(place, [...(groups.get(place) || []), cell]);
    });
    return groups;
  });
  run.shield = run.protected.map((own) => new Set(own));
  run.evictions = data.images.map(() => Array.from({ length: data.depth }, () => new Map()));
  run.calls.forEach((call, number) => {
    for (const one of call.evicted) one.patches.forEach((own, image) => {
      for (const layer of one.layers) for (const patch of own) {
        if (!run.evictions[image][layer].has(patch)) run.evictions[image][layer].set(patch, [number + 1, one.stage]);
      }
    });
  });
  for (const score of run.scores) score.ranks = ranks(score.values);
}

function ranks(values) {
  const all = values.flat().filter((value) => value !== null).sort((a, b) => a - b);
  const first = new Map();
  all.forEach((value, n) => { if (!first.has(value)) first.set(value, n); });
  return { low: all[0], high: all[all.length - 1], of: (value) => first.get(value) / Math.max(all.length - 1, 1) };
}

/** What became of one patch: its kind, the place of its token, and a sentence that says so. */
function fate(run, image, cell, layer, moment) {
  let place = run.places[image] ? run.places[image][cell] : cell;
  const away = run.away[image][cell];
  if (place < 0 && away) return { kind: "away", place, why: `merged into ${away}` };
  if (place < 0) return { kind: "dropped", place, why: `dropped at ${run.lost[image][cell]}` };
  if (layer < run.entry) return { kind: "absent", place, why: `not yet in: vision enters at boundary ${run.entry}` };
  const moves = [];
  const since = (what) => [...moves, what].join(", then ");
  for (const boundary of run.boundaries) {
    if (boundary.at > layer) break;
    const into = boundary.into[image][place];
    if (into !== undefined) {
      const by = boundary.mergedBy || boundary.by.map((one) => one.stage).join(" and ");
      const how = boundary.kept[image](place) ? "moved to the place of" : "merged into";
      moves.push(`${how} patch ${patchAt(run, image, into)} at boundary ${boundary.at} by ${by}`);
      place = into;
    }
    const out = boundary.away[image][place];
    if (out) {
      const why = since(`merged into patch ${out[1]} of image ${out[0]} at boundary ${boundary.at} by ${boundary.mergedBy}`);
      return { kind: "away", place, why };
    }
    if (!boundary.kept[image](place)) {
      const by = boundary.by.filter((one) => one.dropped[image](place)).map((one) => one.stage);
      const why = since(`dropped at boundary ${boundary.at} by ${by.join(" and ") || "an edit"}`);
      return { kind: "dropped", place, why };
    }
  }
  if (layer >= run.exit) {
    const why = since(`gone with all vision at boundary ${run.exit} by ${run.exitedBy.join(", ")}`);
    return { kind: "dropped", place, why };
  }
  const gone = run.evictions[image][layer].get(place);
  if (gone && gone[0] <= moment) {
    const when = gone[0] === 1 ? "after the prefill" : `at decode step ${gone[0] - 1}`;
    return { kind: "evicted", place, why: since(`taken out of this layer's cache ${when} by ${gone[1]}`) };
  }
  return { kind: "kept", place, shield: run.shield[image].has(place), moves };
}

/** The patch at which a token is shown: the one that makes up most of it, or one of its members. */
function patchAt(run, image, place) {
  const group = run.groups[image].get(place) || (run.places[image] ? [] : [place]);
  return run.heads[image][place] ?? group[0] ?? place;
}

/** Fates of all patches of an image; those that share a token become `merged` and list its patches. */
function standing(run, image, layer, moment) {
  const fates = [], groups = new Map();
  for (let cell = 0; cell < data.images[image].patches; cell++) {
    const fated = fate(run, image, cell, layer, moment);
    fates.push(fated);
    if (fated.kind === "kept") groups.set(fated.place, [...(groups.get(fated.place) || []), cell]);
  }
  for (const [place, cells] of groups) {
    const base = run.groups[image].get(place) || [place];
    const head = run.heads[image][place] ?? (base.length === 1 && cells.length > 1 ? base[0] : null);
    cells.forEach((cell) => {
      const own = fates[cell];
      own.why = [...own.moves, told(cell, cells, head, own.moves.length > 0)].join("; ") + (own.shield ? ", protected" : "");
      if (cells.length > 1) Object.assign(own, { kind: "merged", cells, head });
    });
  }
  return { fates, groups };
}

/** Describes the live token of a patch; `moved` if the patch it was merged into is already named. */
function told(cell, cells, head, moved) {
  if (cells.length === 1) return "live";
  const others = cells.filter((other) => other !== cell), some = others.slice(0, 8).join(", ");
  const where = head === null ? "merged: " : `merged into ${head === cell ? "this patch" : `patch ${head}`}: `;
  return `${moved ? "" : where}${cells.length} patches are one token (with ${some}${others.length > 8 ? ", …" : ""})`;
}
