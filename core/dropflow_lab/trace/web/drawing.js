// Marks on pictures, and bars

const STOPS = [[0, 34, 78], [50, 76, 108], [102, 105, 112], [150, 143, 119], [201, 181, 100], [253, 231, 55]];
function cividis(share) {
  const at = share * (STOPS.length - 1), low = Math.min(Math.floor(at), STOPS.length - 2), part = at - low;
  return `rgb(${STOPS[low].map((v, i) => Math.round(v + (STOPS[low + 1][i] - v) * part)).join(",")})`;
}

function drawCell(pen, x, y, size, fated) {
  const thick = Math.max(1.5, size / 9);
  if (["dropped", "absent", "evicted", "away"].includes(fated.kind)) {
    pen.fillStyle = colour("cover");
    pen.globalAlpha = 0.9;
    pen.fillRect(x, y, size, size);
    pen.globalAlpha = 1;
  }
  if (fated.kind === "dropped") {
    pen.strokeStyle = colour("hatch");
    pen.lineWidth = 1;
    pen.beginPath();
    pen.moveTo(x, y + size); pen.lineTo(x + size, y);
    pen.stroke();
  }
  if (fated.kind === "away") {
    pen.strokeStyle = colour("merged");
    pen.lineWidth = thick;
    pen.beginPath();
    pen.arc(x + size / 2, y + size / 2, size / 5, 0, 7);
    pen.stroke();
  }
  if (fated.kind === "absent") {
    pen.fillStyle = colour("absent");
    pen.beginPath();
    pen.arc(x + size / 2, y + size / 2, size / 7, 0, 7);
    pen.fill();
  }
  if (fated.kind === "evicted") {
    pen.strokeStyle = colour("evicted");
    pen.lineWidth = thick;
    pen.beginPath();
    pen.moveTo(x + size * .25, y + size * .25); pen.lineTo(x + size * .75, y + size * .75);
    pen.moveTo(x + size * .75, y + size * .25); pen.lineTo(x + size * .25, y + size * .75);
    pen.stroke();
  }
  if (fated.shield) {
    pen.strokeStyle = "#000";
    pen.lineWidth = thick + 2;
    pen.strokeRect(x + thick, y + thick, size - 2 * thick, size - 2 * thick);
    pen.strokeStyle = colour("protected");
    pen.lineWidth = thick;
    pen.strokeRect(x + thick, y + thick, size - 2 * thick, size - 2 * thick);
  }
}

/** Connected pieces of a set of patches in a grid. */
function pieces(cells, columns) {
  const left = new Set(cells), found = [];
  for (const first of cells) {
    if (!left.delete(first)) continue;
    const piece = [first];
    for (const cell of piece) {
      const c = cell % columns;
      for (const next of [cell - columns, cell + columns, c ? cell - 1 : -1, c < columns - 1 ? cell + 1 : -1]) {
        if (left.delete(next)) piece.push(next);
      }
    }
    found.push(piece);
  }
  return found;
}

const middle = (cell, columns, size) => [(cell % columns + .5) * size, (Math.floor(cell / columns) + .5) * size];

/** The middle of a set of patches, or that of the nearest patch if a mark there would not be inside the set. */
function centre(cells, columns, size) {
  const points = cells.map((cell) => middle(cell, columns, size));
  const mean = [0, 1].map((axis) => points.reduce((sum, point) => sum + point[axis], 0) / points.length);
  const away = points.map((point) => Math.hypot(point[0] - mean[0], point[1] - mean[1]));
  const nearest = away.indexOf(Math.min(...away));
  const own = new Set(cells), corners = [[-1, -1], [-1, 1], [1, -1], [1, 1]].map(([x, y]) =>
    Math.floor((mean[1] + y * size / 4) / size) * columns + Math.floor((mean[0] + x * size / 4) / size));
  return corners.every((cell) => own.has(cell)) ? mean : points[nearest];
}

/** Outlines of the pieces of a merged token: a disc where the token is, a ring in every other piece. */
function drawGroup(pen, cells, head, columns, size, strong) {
  const own = new Set(cells), edges = new Path2D(), thin = Math.min(Math.max(size / 11, 1.25), 3), inset = thin / 2;
  for (const cell of cells) {
    const c = cell % columns, r = Math.floor(cell / columns), x = c * size, y = r * size;
    if (!own.has(cell - columns)) { edges.moveTo(x, y + inset); edges.lineTo(x + size, y + inset); }
    if (!own.has(cell + columns)) { edges.moveTo(x, y + size - inset); edges.lineTo(x + size, y + size - inset); }
    if (c === 0 || !own.has(cell - 1)) { edges.moveTo(x + inset, y); edges.lineTo(x + inset, y + size); }
    if (c === columns - 1 || !own.has(cell + 1)) {
      edges.moveTo(x + size - inset, y); edges.lineTo(x + size - inset, y + size);
    }
  }
  const all = pieces(cells, columns);
  const disc = head !== null ? middle(head, columns, size) : centre(cells, columns, size);
  const home = all.find((piece) => piece.some((cell) => {
    const [x, y] = middle(cell, columns, size);
    return Math.max(Math.abs(x - disc[0]), Math.abs(y - disc[1])) <= size / 2 + 1e-9;
  }));
  const rings = all.filter((piece) => piece !== home).map((piece) => centre(piece, columns, size));
  const stroke = (path, width, style) => { pen.lineWidth = width; pen.strokeStyle = style; pen.stroke(path); };
  if (strong) {
    const lines = new Path2D();
    for (const ring of rings) { lines.moveTo(...disc); lines.lineTo(...ring); }
    stroke(lines, 4, "#000"); stroke(lines, 2, "#fff");
    stroke(edges, thin + 4, "#000"); stroke(edges, thin + 1, "#fff");
  } else {
    stroke(edges, thin + 2, "#000"); stroke(edges, thin, colour("merged"));
  }
  for (const ring of rings) {
    const path = new Path2D();
    path.arc(...ring, size / 4.5, 0, 7);
    stroke(path, thin + 1.5, "#000"); stroke(path, thin, strong ? "#fff" : colour("merged"));
  }
  const path = new Path2D();
  path.arc(...disc, Math.max(3, size / 4), 0, 7);
  pen.fillStyle = strong ? "#fff" : colour("merged"); pen.fill(path);
  stroke(path, 1, "#000");
}

const pictures = data.images.map((image) => {
  if (!image.picture) return null;
  const picture = new Image();
  picture.src = image.picture;
  return picture;
});

/** A small mark over a heat map: a cross for a patch that is gone, a ring for one merged into another token. */
function drawMark(pen, x, y, size, ring) {
  for (const [width, style] of [[3, "#000"], [1.2, "#fff"]]) {
    pen.lineWidth = width; pen.strokeStyle = style;
    pen.beginPath();
    if (ring) pen.arc(x + size / 2, y + size / 2, size / 5, 0, 7);
    else {
      pen.moveTo(x + size * .3, y + size * .3); pen.lineTo(x + size * .7, y + size * .7);
      pen.moveTo(x + size * .7, y + size * .3); pen.lineTo(x + size * .3, y + size * .7);
    }
    pen.stroke();
  }
}

function drawImage(panel, image, stand) {
  const { run, canvases } = panel, canvas = canvases[image];
  const [rows, columns] = data.images[image].grid, size = canvas.cell, pen = canvas.getContext("2d");
  const ratio = window.devicePixelRatio || 1;
  canvas.width = columns * size * ratio; canvas.height = rows * size * ratio;
  pen.scale(ratio, ratio);
  pen.fillStyle = "#8a929b";
  pen.fillRect(0, 0, columns * size, rows * size);
  const picture = pictures[image];
  if (picture && picture.complete && picture.naturalWidth) {
    pen.imageSmoothingEnabled = picture.naturalWidth > columns * size / 2;
    pen.drawImage(picture, 0, 0, columns * size, rows * size);
  }
  const score = run.scores[panel.view.value], here = state.pointed && state.image === image;
  stand.fates.forEach((fated, cell) => {
    const x = cell % columns * size, y = Math.floor(cell / columns) * size;
    if (!score) { drawCell(pen, x, y, size, fated); return; }
    const value = score.values[image][cell];
    pen.fillStyle = value === null || value === undefined ? colour("cover") : cividis(score.ranks.of(value));
    pen.fillRect(x, y, size, size);
    const away = fated.kind === "away" || fated.kind === "merged" && fated.moves.length > 0;
    if (away || !["kept", "merged"].includes(fated.kind)) drawMark(pen, x, y, size, away);
  });
  if (!score) for (const cells of stand.groups.values()) {
    if (cells.length > 1) drawGroup(pen, cells, stand.fates[cells[0]].head, columns, size, false);
  }
  if (!here) return;
  const current = stand.fates[state.patch];
  if (current.kind === "merged") drawGroup(pen, current.cells, current.head, columns, size, true);
  const x = state.patch % columns * size, y = Math.floor(state.patch / columns) * size;
  pen.lineWidth = 5; pen.strokeStyle = "#000"; pen.strokeRect(x, y, size, size);
  pen.lineWidth = 2.5; pen.strokeStyle = "#fff"; pen.strokeRect(x, y, size, size);
}

function bars(panel, title, values, limit, name) {
  const width = 100 / values.length, high = 70;
  const drawing = svg("svg", { viewBox: "0 0 100 70", preserveAspectRatio: "none", role: "img", "aria-label": title });
  values.forEach((value, layer) => {
    const tall = Math.max(value / Math.max(limit, 1) * high, value ? 1 : 0), now = layer === state.layer;
    const bar = svg("rect", {
      x: layer * width + width * .12, width: width * .76, y: high - tall, height: tall, class: "bar",
      fill: colour(name), "fill-opacity": now ? 1 : .55, "data-layer": layer,
    });
    const catcher = svg("rect", { x: layer * width, width, y: 0, height: high, class: "bar", fill: "transparent" });
    if (now) Object.entries({ stroke: colour("kept"), "stroke-width": 1, "vector-effect": "non-scaling-stroke" })
      .forEach(([key, set]) => catcher.setAttribute(key, set));
    catcher.append(svg("title", {}));
    catcher.firstChild.textContent = `layer ${layer}: ${value}`;
    catcher.addEventListener("click", () => { $("layer").value = layer; update(); });
    drawing.append(bar, catcher);
  });
  drawing.append(Object.assign(svg("line", {
    x1: 0, x2: 100, y1: high, y2: high, stroke: colour("line"), "vector-effect": "non-scaling-stroke",
  })));
  return drawing;
}
