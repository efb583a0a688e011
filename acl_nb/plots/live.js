// The live explorers: what a contrastive loss asks of every point, computed and drawn in the page.
// One file for notebooks (an anywidget), for the site and for reports.

// == 1. Numbers: closed forms of the pair gradients, as in acl_nb.gradients ==
// A batch is {z: [N·D], dim: D, labels: [N], centers: [C·D] or null, counts: [C], temperature}.
// A side is {loss: scl | bcl | acl | paco, aligned, centers, negatives}; the last three are ACL's.

const range = (length, of) => Array.from({length}, (_, n) => of(n));

const logSumExp = (values) => {
  let top = -Infinity, sum = 0;
  for (const v of values) if (v > top) top = v;
  if (top === -Infinity) return top;
  for (const v of values) sum += Math.exp(v - top);
  return top + Math.log(sum);
};

// Every point is a key, and every centre where the loss has them.
function keyLabels(batch, side) {
  const {loss, centers = true} = side, wanted = loss === "acl" ? centers : loss !== "scl";
  const joined = wanted && batch.centers ? batch.centers.length / batch.dim : 0;
  return [...batch.labels, ...range(joined, (c) => c)];
}

function dot(a, i, b, k, D) {
  let sum = 0;
  for (let d = 0; d < D; d++) sum += a[i * D + d] * b[k * D + d];
  return sum;
}

// [N, N + C], shared by both sides and all temperatures.
function cosines(batch) {
  if (batch.cosines) return batch.cosines;
  const {z, dim: D, centers: c} = batch, N = z.length / D, M = N + (c ? c.length / D : 0), made = new Float64Array(N * M);
  for (let i = 0; i < N; i++) {
    for (let k = 0; k <= i; k++) made[i * M + k] = made[k * M + i] = dot(z, i, z, k, D);
    for (let k = N; k < M; k++) made[i * M + k] = dot(z, i, c, k - N, D);
  }
  return batch.cosines = made;
}

// What is added to a key's logit, as a positive and as a negative; how much it is wanted; what an anchor's class adds.
function offsets(batch, labels, side) {
  const N = batch.labels.length, {loss, negatives = "batch", alpha = .05} = side, counts = new Map(), fill = (of) => Float64Array.from(labels, of), zero = fill(() => 0);
  for (const y of labels) counts.set(y, (counts.get(y) || 0) + 1);
  const total = batch.counts.reduce((a, b) => a + b, 0), prior = batch.counts.map((n) => Math.log(n / total)), apart = (more) => fill((y) => -Math.log(counts.get(y) - more));
  const made = {positive: zero, negative: zero, pull: fill(() => 1), row: () => 0};
  if (loss === "bcl") return {...made, positive: apart(1), negative: apart(0)};
  if (loss === "paco") {
    const logits = fill((y, k) => k < N ? 0 : prior[y]);
    return {...made, positive: logits, negative: logits, pull: fill((_, k) => k < N ? alpha : 1)};
  }
  if (loss === "scl" || negatives === "none") return made;
  if (negatives === "batch") return {...made, negative: apart(0)};
  const mean = Math.log(prior.length) - logSumExp(prior.map((p) => -p));
  if (negatives === "prior") return {...made, negative: fill((y) => mean - prior[y])};
  return {...made, negative: apart(0).map((w, k) => w + prior[labels[k]]), row: (y) => -prior[y]};
}

// [N, K] derivatives of the batch loss: below 0 pulls together, above 0 pushes apart.
function coefficients(batch, side) {
  const {labels, temperature} = batch, N = labels.length, keys = keyLabels(batch, side), K = keys.length;
  const {positive, negative, pull, row} = offsets(batch, keys, side), aligned = side.loss === "acl" && side.aligned !== false;
  const coef = new Float64Array(N * K), s = new Float64Array(K), of = Int32Array.from(keys), cos = cosines(batch), M = cos.length / N;
  let anchors = 0;
  for (let i = 0; i < N; i++) {
    const y = labels[i], more = row(y), at = i * K;
    let top = -Infinity, wanted = 0, positives = 0;
    for (let k = 0; k < K; k++) {
      const own = of[k] === y;
      s[k] = cos[i * M + k] / temperature + (own ? aligned ? 0 : positive[k] : negative[k] + more);
      if (k === i) continue;
      if (own) wanted += pull[k], positives++;
      if (!(own && aligned) && s[k] > top) top = s[k];
    }
    if (!positives || top === -Infinity) { if (positives) anchors++; continue; } 
    anchors++;
    let sum = 0, rest = 0;  // of a denominator
    for (let k = 0; k < K; k++) {
      const e = coef[at + k] = k === i ? 0 : Math.exp(s[k] - top);
      if (!(aligned && of[k] === y)) sum += e;
    }
    for (let k = 0; k < K; k++) {
      const e = coef[at + k], target = of[k] !== y || k === i ? 0 : pull[k] / wanted;
      if (!(aligned && of[k] === y)) coef[at + k] = e / sum - target;
      else if (k !== i) rest -= coef[at + k] = -target / (1 + e / sum);
    }
    if (aligned) for (let k = 0; k < K; k++) if (of[k] !== y) coef[at + k] *= rest;
  }
  for (let n = 0; n < coef.length; n++) coef[n] /= Math.max(1, anchors);
  return {coef, keys, N, K};
}

// Sums over the batch by the class of the key, and the share of positive pairs that are pushed apart.
function classBalance(batch, found) {
  const C = batch.counts.length, {coef, keys, N, K} = found;
  const sums = {attraction: new Float64Array(C), wrong_way: new Float64Array(C), repulsion: new Float64Array(C)};
  let pairs = 0, conflicts = 0;
  for (let i = 0; i < N; i++) for (let k = 0; k < K; k++) {
    if (k === i) continue;
    const y = keys[k], c = coef[i * K + k];
    if (y !== batch.labels[i]) { sums.repulsion[y] += c; continue; }
    sums[c < 0 ? "attraction" : "wrong_way"][y] += Math.abs(c);
    pairs++;
    if (c > 1e-14) conflicts++;
  }
  return {...sums, pairs, conflicts, conflict: pairs ? conflicts / pairs : NaN};
}

// −∂L/∂z of every point along the sphere, whole and in its three parts; and of the centres.
const PARTS = ["attraction", "wrong_way", "repulsion"];
function forces(batch, found) {
  const {z, dim: D, temperature: T} = batch, {coef, keys, N, K} = found;
  const parts = PARTS.map(() => new Float64Array(N * D)), centers = new Float64Array((K - N) * D);
  for (let i = 0; i < N; i++) for (let k = 0; k < K; k++) {
    const c = -coef[i * K + k] / T, part = parts[keys[k] !== keys[i] ? 2 : c > 0 ? 0 : 1];
    const [key, moved, at] = k < N ? [z, part, k * D] : [batch.centers, centers, (k - N) * D];
    if (c) for (let d = 0; d < D; d++) {
      part[i * D + d] += c * key[at + d];
      moved[at + d] += c * z[i * D + d];
    }
  }
  for (const part of parts) alongSphere(part, z, D);
  if (K > N) alongSphere(centers, batch.centers, D);
  const whole = parts[0].map((v, n) => v + parts[1][n] + parts[2][n]);
  return {whole, attraction: parts[0], wrong_way: parts[1], repulsion: parts[2], centers};
}

function alongSphere(force, z, D) {  // what moves a point of unit length has no part along it
  for (let i = 0; i < z.length / D; i++) {
    const out = dot(force, i, z, i, D);
    for (let d = 0; d < D; d++) force[i * D + d] -= out * z[i * D + d];
  }
}

const row = (z, i, D) => z.subarray(i * D, (i + 1) * D);
const rotated = (x, y, a) => [x * Math.cos(a) - y * Math.sin(a), x * Math.sin(a) + y * Math.cos(a)];

function unit(list, D) {
  const z = Float64Array.from(list);
  for (let i = 0; i < z.length / D; i++) {
    const length = Math.sqrt(dot(z, i, z, i, D)) || 1;
    for (let d = 0; d < D; d++) z[i * D + d] /= length;
  }
  return z;
}

// A step of gradient descent; a rate suits any number of anchors.
function step(batch, side, rate = 0.02) {
  const force = forces(batch, coefficients(batch, side)), N = batch.labels.length;
  const move = (z, f) => unit(z.map((v, n) => v + rate * batch.temperature * N * f[n]), batch.dim);
  const centers = force.centers.length ? move(batch.centers, force.centers) : batch.centers;
  return {...batch, cosines: null, z: move(batch.z, force.whole), centers};
}

// == 2. Made batches ==
function randomNumbers(seed) {  // congruential; Box and Muller
  let a = Math.imul(seed, 2654435761) >>> 0;
  const uniform = () => (a = (Math.imul(a, 1664525) + 1013904223) >>> 0) / 2 ** 32;
  const normal = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  return {uniform, normal};
}

const GEOMETRY = {random: [0, 1, .5], "half-trained": [1, 1, .5], collapsed: [1, 0, 0]};

function madeBatch({views, images, classes, imbalance, geometry, seed}) {
  const {uniform, normal} = randomNumbers(1 + seed), D = 32, [ofClass, ofImage, ofView] = GEOMETRY[geometry];
  const draw = (n) => Float64Array.from({length: n * D}, () => normal() / Math.sqrt(D));
  const counts = range(classes, (j) => Math.floor(500 * imbalance ** (classes > 1 ? -j / (classes - 1) : 0)));
  const centers = unit(draw(classes), D), total = counts.reduce((a, b) => a + b, 0);
  const chosen = range(images, () => {
    let left = uniform() * total, y = 0;
    while (y < classes - 1 && (left -= counts[y]) >= 0) y++;
    return y;
  }).sort((a, b) => a - b);
  const labels = [], z = [];
  for (const y of chosen) {
    const image = draw(1);
    for (let v = 0; v < views; v++) {
      const view = draw(1);
      labels.push(y);
      for (let d = 0; d < D; d++) z.push(ofClass * centers[y * D + d] + ofImage * image[d] + ofView * view[d]);
    }
  }
  return {z: unit(z, D), dim: D, labels, centers, counts};
}

// == 3. Elements, colours, controls ==
const STYLE = `.acl-live {
--ink: #222; --paper: #fff; --faint: #8884; --pull: #0072B2; --push: #E69F00; --wrong: #D55E00; --c0: #009E73; --c1: #CC79A7; --c2: #56B4E9; --c3: #7F7F7F;
color: var(--ink); font: 14px/1.45 system-ui, sans-serif; max-width: 960px; font-variant-numeric: tabular-nums;
&.dark {--ink: #e6e6e6; --paper: #1b1b1b; --pull: #4FA8DE; --push: #F0B429; --wrong: #F0733A}
.two {display: grid; grid-template-columns: 1fr 1fr; gap: 4px 18px; @media (max-width: 520px) {grid-template-columns: 1fr}}
svg {display: block; width: 100%; touch-action: none; user-select: none; overflow: visible; &.chart {touch-action: pan-y; &:focus {outline: 2px solid var(--faint)}}}
fieldset {font-size: 13px; border: 0; border-top: 1px solid var(--faint); margin: 4px 0 0; padding: 4px 0; min-width: 0; display: flex; flex-wrap: wrap; gap: 2px 10px; align-items: center}
legend {font: 600 13px/1.4 system-ui; padding: 0; float: left; width: 48px; margin: 0}
label {display: inline-flex; gap: 4px; align-items: center; white-space: nowrap}
input {margin: 0} input[type=range] {width: 60px; accent-color: var(--pull)}
select, button {font: inherit; color: inherit; background: transparent; border: 1px solid var(--faint); border-radius: 4px; padding: 2px 4px; min-height: 28px}
option {color: #222; background: #fff}
button {cursor: pointer; padding: 2px 8px; &.on {background: var(--pull); color: var(--paper)}}
output {min-width: 2em}
.said {min-height: 4.4em} b {font-size: 19px; white-space: nowrap}
.key {display: flex; flex-wrap: wrap; gap: 2px 16px} i {display: inline-block; width: 18px; height: 4px; margin: 0 5px 3px 0; vertical-align: middle}
g.point {cursor: grab; outline: none; &:focus-visible .halo {stroke-dasharray: 3 2}}
table {border-collapse: collapse} td, th {padding: 1px 10px 1px 0; text-align: right}
.word {font-size: 11px; fill: var(--ink)} .scroll {max-height: 260px; overflow: auto}}`;

const SVG = new Set("svg g path line circle text rect".split(" "));
function h(tag, attributes = {}, ...children) {
  const drawn = SVG.has(tag), node = drawn ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && !drawn) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((c) => c !== null));
  return node;
}
function set(node, attributes) {  // what has changed
  const old = node.old ||= {};
  for (const name in attributes) if (old[name] !== attributes[name]) node.setAttribute(name, old[name] = attributes[name]);
}
const px = (v) => Math.round(1000 * v) / 10;

function select(label, options, value, told) {
  const box = h("select", {onchange: () => told(box.value)});
  for (const option of options) box.append(h("option", {value: option, selected: option === value}, option));
  box.setAttribute("aria-label", label);
  return h("label", {}, label.includes(" loss") ? "" : label, box);
}

function slider(label, values, value, told) {
  if (!values.includes(value)) values = [...values, value].sort((a, b) => a - b);
  const at = values.indexOf(value), shown = h("output", {}, short(value));
  const bar = h("input", {type: "range", min: 0, max: values.length - 1, step: 1, value: at, oninput: () => {
    shown.textContent = short(values[bar.value]);
    bar.setAttribute("aria-valuetext", values[bar.value]);
    told(values[bar.value]);
  }});
  return h("label", {}, label, bar, shown);
}

function tick(label, on, told) {
  const box = h("input", {type: "checkbox", checked: on, onchange: () => told(box.checked)});
  return h("label", {}, box, label);
}

const button = (label, told, title = "") => h("button", {type: "button", title, onclick: told}, label);
const KEY = {pull: "pulled together", wrong: "pushed apart, though of one class", push: "pushed apart, of two classes"};
const key = (more) => h("div", {class: "key"}, ...Object.entries(KEY).map(([role, said]) => h("span", {}, h("i", {style: `background: var(--${role})`}), said)), more);

const NAMES = {scl: "SCL", bcl: "BCL", paco: "PaCo", acl: "ACL"};
// A loss and, for ACL, its three switches.
function lossControls(title, side, told) {
  const change = (what) => told({...side, ...what});
  const acl = side.loss === "acl" ? [
    tick("aligned", side.aligned !== false, (v) => change({aligned: v})),
    tick("centres", side.centers !== false, (v) => change({centers: v})),
    select("weights", ["batch", "prior", "adjusted", "none"], side.negatives || "batch", (v) => change({negatives: v})),
  ] : [];
  return h("fieldset", {"aria-label": title}, select(title, Object.values(NAMES), NAMES[side.loss], (v) => told({loss: v.toLowerCase()})), ...acl);
}

class Explorer {  // its parts anew, the focus where it was
  fill(...parts) {
    const all = () => [...this.el.querySelectorAll("select, input, button, .point, .chart")], at = all().indexOf(document.activeElement);
    this.el.replaceChildren(...parts);
    for (const node of all()) node.dataset.lmSuppressShortcuts = true;  // no keys of JupyterLab
    if (at >= 0) all()[at]?.focus();
    this.draw();
  }
  report(sums) {  // to Python
    const plain = (n) => ({...Object.fromEntries(PARTS.map((part) => [part, Array.from(n[part])])), conflict: Number.isFinite(n.conflict) ? n.conflict : null});
    this.told.balance(sums.map(plain));
  }
  side(k) {
    const {s} = this, told = (side) => { s.loss = s.loss.map((old, j) => j === k ? side : old); this.build(); this.tell(); };
    return lossControls(k ? "right loss" : "left loss", s.loss[k], told);
  }
}

const percent = (x) => Number.isFinite(x) ? `${Math.round(100 * x)} %` : "–";
const short = (x) => Number.isFinite(x) ? Number(x.toPrecision(3)) : "–";
const bold = (text) => h("b", {}, text);

// == 4. Conflict: points on a circle or a sphere, two losses ==
const COLOUR = ["c0", "c1", "c2", "c3"], LETTER = "ABCD";
const STARTS = {  // per class: angles of its images in degrees
  "one anchor": [[0, 62], [140, -140]],
  "two classes": [[-50, 15, 70], [110, 180, 240]],
  "four classes": [[-30, 25], [60, 115], [150, 205], [240, 295]],
  "long tail": [[-75, -40, 0, 35, 70], [110, 150], [190], [250]],
};
const TEMPERATURES = [.05, .07, .1, .15, .2, .3, .5, 1];
const ROLE = {attraction: "pull", wrong_way: "wrong", repulsion: "push"};

function startOf({start = "one anchor", dim = 2, views = 2}) {
  const labels = [], image = [], z = [];
  let number = 0;
  STARTS[start].forEach((angles, y) => angles.forEach((angle) => {
    const a = angle * Math.PI / 180, at = [...rotated(1, 0, a), .45 * Math.sin(2.4 * number)].slice(0, dim);
    for (let v = 0; v < views; v++) z.push(...nearby(at, v)), labels.push(y), image.push(number);
    number++;
  }));
  return {labels, image, z: unit(z, dim)};
}

function centersOf(z, labels, dim, classes) {  // normalised class means
  const sums = new Float64Array(classes * dim);
  for (let y = 0; y < classes; y++) if (!labels.includes(y)) sums[y * dim] = Math.cos(y * 2), sums[y * dim + 1] = Math.sin(y * 2);
  labels.forEach((y, i) => { for (let d = 0; d < dim; d++) sums[y * dim + d] += z[i * dim + d]; });
  return unit(sums, dim);
}

class Conflict extends Explorer {
  constructor(el, state, told) {
    super();
    this.el = el; this.told = told; this.view = [.6, .35];
    this.s = {start: "one anchor", dim: 2, views: 2, temperature: .3, loss: [{loss: "scl"}, {loss: "acl"}], chosen: 0, steps: 0, ...state};
    this.given = state.z && JSON.stringify(state);
    this.s.z ? this.adopt() : this.restart();
    if (this.images()[0].at.length !== this.s.views) this.setViews(this.s.views); else this.build();
  }
  reset() {
    Object.assign(this.s, {c: null, steps: 0}, this.given && JSON.parse(this.given));
    this.given ? this.adopt() : this.restart();
    this.build(); this.tell();
  }
  restart() {
    this.given = null;
    const {labels, image, z} = startOf(this.s);
    Object.assign(this.s, {labels, image, z: [z, z.slice()], chosen: 0, steps: 0});
    this.center();
  }
  adopt() {
    const {s} = this, many = Array.isArray(s.z[0]) || ArrayBuffer.isView(s.z[0]) ? s.z : [s.z, s.z];
    s.z = [0, 1].map((k) => unit(many[k] || many[0], s.dim));
    s.image = s.image || s.labels.map((_, i) => i);
    if (s.c) s.c = [0, 1].map((k) => unit(s.c[k] || s.c[0], s.dim)); else this.center();
    s.chosen = Math.min(s.chosen, s.labels.length - 1);
  }
  center() {
    const classes = Math.max(...this.s.labels) + 1;
    this.s.c = this.s.z.map((z) => centersOf(z, this.s.labels, this.s.dim, classes));
  }
  batch(k) {
    const {dim, labels, temperature, z, c} = this.s, counts = range(c[k].length / dim, (y) => labels.filter((label) => label === y).length || 1);
    return {z: z[k], dim, labels, centers: c[k], counts, temperature};
  }
  build() {
    const {s} = this;
    this.pause();
    this.panels = [0, 1].map((k) => this.panel(k));
    const redo = (what) => { Object.assign(s, what); this.restart(); this.build(); };
    const now = (what) => { Object.assign(s, what); this.draw(); this.tell(); };
    this.runs = button("run", () => this.run(), "gradient descent of points and centres, under each loss");
    this.fill(
      key("drag a point: images are filled, centres hollow; arrows: where they are moved"),
      h("div", {class: "two"}, ...[0, 1].map((k) => h("div", {}, this.side(k), this.panels[k].svg, this.panels[k].said))),
      h("fieldset", {}, h("legend", {}, "points"),
        select("start", Object.keys(STARTS), s.start, (v) => redo({start: v})),
        select("on a", ["circle", "sphere"], s.dim === 2 ? "circle" : "sphere", (v) => redo({dim: v === "circle" ? 2 : 3})),
        slider("views", [1, 2, 3, 4, 5, 6], s.views, (v) => this.setViews(v)),
        slider("temperature", TEMPERATURES, s.temperature, (v) => now({temperature: v}))),
      h("fieldset", {}, h("legend", {}, "change"),
        button("+ image", () => this.add(s.labels[s.chosen]), "of the chosen point's class"),
        button("+ other", () => this.add((s.labels[s.chosen] + 1) % 4), "an image of another class"),
        button("− image", () => this.remove(), "the chosen point's image"),
        button("step", () => { this.pause(); this.move(5); this.tell(); }), this.runs,
        button("reset", () => this.reset()), this.told.link ? button("link", () => this.told.link(this.plain())) : null, this.clock = h("output", {})));
  }
  tell() { this.told.state(this.plain()); }
  plain() {  // for a link, or for Python
    const {s} = this, round = (z) => Array.from(z, (v) => Math.round(v * 1e4) / 1e4);
    return {...s, z: s.z.map(round), c: s.c.map(round)};
  }
  images() {  // [{y, number, at: [[left, right] per view]}]
    const {s} = this, found = new Map();
    s.labels.forEach((y, i) => {
      const one = found.get(s.image[i]) || {y, number: s.image[i], at: []};
      one.at.push(s.z.map((z) => [...row(z, i, s.dim)]));
      found.set(one.number, one);
    });
    return [...found.values()];
  }
  take(images) {  // the other way, and the page anew
    const {s} = this, of = (what) => images.flatMap((one) => one.at.map(() => one[what]));
    if (!images.length) return;
    Object.assign(s, {labels: of("y"), image: of("number")});
    s.z = [0, 1].map((k) => unit(images.flatMap((one) => one.at.flatMap((view) => view[k])), s.dim));
    s.chosen = Math.min(s.chosen, s.labels.length - 1);
    const classes = Math.max(...s.labels) + 1;
    s.c = s.c.map((c, k) => Float64Array.from([...c, ...centersOf(s.z[k], s.labels, s.dim, classes).slice(c.length)]));
    this.build(); this.tell();
  }
  setViews(views) {
    this.s.views = views;
    this.take(this.images().map((one) => ({...one, at: range(views, (v) => one.at[v] || one.at[0].map((z) => nearby(z, v)))})));
  }
  add(y) {
    const {s} = this, images = this.images(), number = Math.max(...s.image) + 1, {uniform} = randomNumbers(number + 7);
    const z = range(s.dim, () => uniform() - .5), side = (v) => nearby(z, v);
    this.take([...images, {y, number, at: range(s.views, (v) => [side(v), side(v)])}]);
  }
  remove() { this.take(this.images().filter((one) => one.number !== this.s.image[this.s.chosen])); }
  move(times) {
    const {s} = this;
    for (const k of [0, 1]) {
      let b = this.batch(k);
      for (let t = 0; t < times; t++) b = step(b, s.loss[k]);
      s.z[k] = b.z; s.c[k] = b.centers;
    }
    s.steps += times;
    this.draw();
  }
  run() {
    if (this.running) { this.pause(); return this.tell(); }
    this.runs.textContent = "pause"; this.runs.className = "on";
    const until = this.s.steps + 600;
    const frame = () => {
      if (!this.el.isConnected || this.s.steps >= until) { this.pause(); return this.tell(); }
      this.move(2);
      this.running = requestAnimationFrame(frame);
    };
    this.running = requestAnimationFrame(frame);
  }
  pause() {
    cancelAnimationFrame(this.running);
    this.running = null;
    if (this.runs) { this.runs.textContent = "run"; this.runs.className = ""; }
  }
  turned(p) {  // of the sphere, towards the reader; a circle stands still
    if (this.s.dim === 2) return [p[0], p[1], 0];
    const [x, z] = rotated(p[0], p[2], -this.view[0]), [y, depth] = rotated(p[1], z, this.view[1]);
    return [x, y, depth];
  }
  turnedBack([x, y, depth]) {
    const [y0, z] = rotated(y, depth, -this.view[1]), [x0, z0] = rotated(x, z, this.view[0]);
    return [x0, y0, z0];
  }
  panel(k) {
    const {s} = this, N = s.labels.length, M = s.c[k].length / s.dim;
    const svg = h("svg", {viewBox: "-150 -132 300 264", role: "group", "aria-label": `${NAMES[s.loss[k].loss]}: points of ${M} classes`});
    const ground = h("g", {}), lines = h("g", {fill: "none"}), arrows = h("g", {}), points = h("g", {});
    ground.append(h("circle", {r: 100, fill: "transparent", stroke: "var(--faint)"}));
    if (s.dim === 3) ground.append(h("path", {fill: "none", stroke: "var(--faint)"}));
    const all = range(N + M, (i) => {
      const y = i < N ? s.labels[i] : i - N, g = h("g", {class: "point", tabindex: 0, role: "button"});
      g.append(h("circle", {r: 11, fill: "transparent", stroke: "none", class: "halo"}), mark(y, i >= N));
      g.addEventListener("pointerdown", (e) => this.grab(e, k, i));
      g.addEventListener("keydown", (e) => this.key(e, k, i));
      g.addEventListener("focus", () => { if (i < N && s.chosen !== i) { s.chosen = i; this.draw(); } });
      points.append(g);
      return g;
    });
    // Lines of one look are one path, which keeps up with a hand.
    const drawn = Object.fromEntries(Object.values(ROLE).flatMap((role) => range(5, (n) => [role + n, lines.appendChild(
      h("path", {stroke: `var(--${role})`, "stroke-width": .7 + 1.4 * n, opacity: .3 + .12 * n}))])));
    for (const where of ["front", "back"]) drawn[where] = arrows.appendChild(h("path", {fill: "none", stroke: "var(--ink)", "stroke-width": 1.6, opacity: where === "front" ? .7 : .25}));
    const parts = PARTS.map((part) => arrows.appendChild(h("path", {fill: "none", stroke: `var(--${ROLE[part]})`, "stroke-width": 3.2})));
    svg.append(ground, lines, points, arrows);
    svg.addEventListener("pointerdown", (e) => this.spin(e));
    arrows.setAttribute("pointer-events", "none");
    return {svg, ground, all, parts, drawn, said: h("div", {class: "said", "aria-live": "polite"})};
  }
  draw() {
    const {s} = this, D = s.dim;
    const all = this.panels.map((panel, k) => {
      const b = this.batch(k), found = coefficients(b, s.loss[k]), force = forces(b, found), sums = classBalance(b, found);
      const scale = s.temperature * s.labels.length, i = s.chosen, N = s.labels.length;
      const of = (z, c) => (n) => n < N ? row(z, n, D) : row(c, n - N, D), at = of(b.z, b.centers), to = of(force.whole, force.centers);
      const places = panel.all.map((_, n) => this.turned(at(n)));
      const d = Object.fromEntries(Object.keys(panel.drawn).map((name) => [name, ""]));
      panel.all.forEach((g, n) => {
        const hidden = n >= N && found.K === N, [x, y, z] = places[n], back = z < -.02;
        const c = n < found.K ? found.coef[i * found.K + n] * N : 0, own = n < N ? s.labels[n] === s.labels[i] : n - N === s.labels[i];
        const role = !own ? "push" : c < 0 ? "pull" : "wrong", strong = hidden || n === i ? 0 : Math.min(1, Math.abs(c));
        set(g, {transform: `translate(${px(x)} ${px(-y)}) scale(${n === i ? 1.35 : 1})`, opacity: back ? .35 : 1, display: hidden ? "none" : "inline"});
        set(g.firstChild, {stroke: role === "wrong" && strong > 1e-9 ? "var(--wrong)" : n === i ? "var(--ink)" : "none"});
        if (strong > 1e-3) d[role + Math.round(4 * strong)] += curve(places[i], places[n]);
        if (!hidden && n !== i) d[back ? "back" : "front"] += arrow(places[n], this.turned(to(n)), scale);
      });
      for (const name in d) set(panel.drawn[name], {d: d[name]});
      PARTS.forEach((part, p) => set(panel.parts[p], {d: arrow(places[i], this.turned(row(force[part], i, D)), scale)}));
      if (D === 3) set(panel.ground.lastChild, {d: this.equator()});
      const [within, between] = this.angles(b);
      panel.said.replaceChildren(bold(`${sums.conflicts}`), ` of ${sums.pairs} pairs of one class are pushed apart`, h("br"),
        `within a class ${short(within)}°, between classes ${short(between)}°, on average`);
      return sums;
    });
    this.report(all);
    this.clock.textContent = s.steps ? `${s.steps} steps` : "";
  }
  equator() {
    return "M" + range(49, (n) => {
      const [x, z] = rotated(100, 0, n * Math.PI / 24), [u, v] = this.turned([x, 0, z]);
      return `${u} ${-v}`;
    }).join("L");
  }
  angles(b) {
    const sums = [0, 0], pairs = [0, 0], N = b.labels.length, cos = cosines(b), M = cos.length / N;
    for (let i = 0; i < N; i++) for (let k = 0; k < i; k++) {
      const which = b.labels[i] === b.labels[k] ? 0 : 1;
      sums[which] += Math.acos(Math.max(-1, Math.min(1, cos[i * M + k]))) * 180 / Math.PI; pairs[which]++;
    }
    return sums.map((sum, n) => sum / pairs[n]);
  }
  soon() {  // one drawing per frame
    if (this.due) return;
    this.due = requestAnimationFrame(() => { this.due = null; this.draw(); });
  }
  grab(e, k, i) {
    e.stopPropagation(); e.preventDefault();
    const {s} = this, svg = this.panels[k].svg, N = s.labels.length, front = i < N && this.turned(row(s.z[k], i, s.dim))[2] >= -.02 ? 1 : -1;
    this.panels[k].all[i].focus();
    if (i < N) s.chosen = i;
    const to = (m) => {
      const box = svg.getBoundingClientRect(), size = box.width / 300;
      let x = (m.clientX - box.left - box.width / 2) / size / 100, y = -(m.clientY - box.top - box.height / 2) / size / 100;
      const r = Math.hypot(x, y);
      if (s.dim === 2) { if (r > .05) this.put(i, [x / r, y / r]); }
      else { if (r > 1) x /= r, y /= r; this.put(i, this.turnedBack([x, y, front * Math.sqrt(Math.max(0, 1 - x * x - y * y))])); }
    };
    follow(to, () => this.tell());
    this.soon();
  }
  put(i, at) {
    const {s} = this, N = s.labels.length;
    for (const k of [0, 1]) if (i < N) s.z[k].set(at, i * s.dim); else s.c[k].set(at, (i - N) * s.dim);
    this.soon();
  }
  spin(e) {
    if (this.s.dim === 2) return;
    let {clientX: x, clientY: y} = e;
    follow((m) => {
      this.view = [this.view[0] + (m.clientX - x) / 120, Math.max(-1.5, Math.min(1.5, this.view[1] + (m.clientY - y) / 120))];
      x = m.clientX; y = m.clientY;
      this.soon();
    });
  }
  key(e, k, i) {
    const {s} = this, D = s.dim, N = s.labels.length, by = (e.shiftKey ? 15 : 3) * Math.PI / 180;
    const turn = {ArrowLeft: [by, 0], ArrowRight: [-by, 0], ArrowUp: [0, by], ArrowDown: [0, -by]}[e.key];
    if (e.key === "Delete" && i < N) { s.chosen = i; this.remove(); e.preventDefault(); }
    if (!turn) return;
    e.preventDefault();
    const [x, y, depth] = this.turned(i < N ? row(s.z[k], i, D) : row(s.c[k], i - N, D)), [a, b] = turn;
    if (D === 2) this.put(i, rotated(x, y, a + b));
    else {
      const [x1, z] = rotated(x, depth, a), [y1, z1] = rotated(y, z, -b);
      this.put(i, this.turnedBack([x1, y1, z1]));
    }
    this.tell();
  }
}

function nearby(at, v) {  // a view of an image, on one side of it or the other
  const [x, y, ...rest] = at;
  return [...rotated(x, y, .227 * Math.ceil(v / 2) * (v % 2 ? 1 : -1)), ...rest];
}

function follow(to, done) {  // a hand, until it lets go
  const over = new AbortController(), how = {signal: over.signal, passive: false};
  addEventListener("pointermove", (e) => { e.preventDefault(); to(e); }, how);
  for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => { over.abort(); done?.(); }, how);
}

function mark(y, center) {  // a class has a colour and a shape, a centre is hollow
  const d = ["M0 -7A7 7 0 1 1 0 7A7 7 0 1 1 0 -7", "M-6 -6H6V6H-6Z", "M0 -8L7.5 6H-7.5Z", "M0 -8.5L7 0L0 8.5L-7 0Z"][y % 4];
  const look = center ? {fill: "var(--paper)", stroke: `var(--${COLOUR[y % 4]})`, "stroke-width": 3} : {fill: `var(--${COLOUR[y % 4]})`, stroke: "var(--paper)", "stroke-width": 1};
  return h("path", {d, ...look});
}

const curve = (a, b) => `M${px(a[0])} ${px(-a[1])}Q${px(.35 * (a[0] + b[0]))} ${px(-.35 * (a[1] + b[1]))} ${px(b[0])} ${px(-b[1])}`;

function arrow(from, force, scale) {
  const size = Math.hypot(...force) * scale, length = 62 * Math.tanh(size);
  if (length < 1.5) return "";
  const [u, v] = [force[0], -force[1]].map((f) => f * length * scale / size / 100), x = from[0], y = -from[1], r = Math.hypot(u, v) || 1;
  const head = Math.min(.06, .6 * r), [p, q] = [u / r * head, v / r * head], to = (a, b) => `${px(x + u - a)} ${px(y + v - b)}`;
  return `M${px(x)} ${px(y)}L${to(0, 0)}M${to(p + .6 * q, q - .6 * p)}L${to(0, 0)}L${to(p - .6 * q, q + .6 * p)}`;
}

// == 5. Balance: forces on classes from head to tail, under two losses, or over the epochs of runs ==
const GROUP = (count) => count > 100 ? "many" : count >= 20 ? "medium" : "few";
const SHADE = {many: "pull", medium: "c0", few: "c1"};

class Balance extends Explorer {
  constructor(el, state, told) {
    super();
    this.el = el; this.told = told; this.chosen = 0;
    this.s = {loss: [{loss: "scl"}, {loss: "acl"}], temperature: .1, views: 2, images: 64, classes: 50, imbalance: 100,
      geometry: "half-trained", seed: 0, batch: null, film: null, frame: 1e9, ...state};
    this.build();
  }
  build() {
    const {s} = this, film = s.film, now = (what) => { Object.assign(s, what); if (!what.temperature) this.made = null; this.draw(); this.tell(); };
    this.panels = (film || s.loss).map(() => {
      const svg = h("svg", {viewBox: "0 0 400 262", class: "chart", tabindex: 0, role: "img"}), said = h("div", {class: "said", "aria-live": "polite"});
      const pick = (j) => { this.chosen = Math.max(0, Math.min(j, this.order.length - 1)); this.draw(); };
      svg.addEventListener("pointermove", (e) => { const box = svg.getBoundingClientRect(); pick(Math.floor((e.clientX - box.left) / box.width * this.order.length)); });
      svg.addEventListener("keydown", (e) => { const by = {ArrowLeft: -1, ArrowRight: 1}[e.key]; if (by) { e.preventDefault(); pick(this.chosen + by); } });
      return {svg, said};
    });
    const bar = (name, values) => slider(name, values, s[name], (v) => now({[name]: v}));
    const own = s.batch ? [s.batch.name || "a batch"] : [], epochs = film ? film[0].epochs : [];
    this.table = h("div", {class: "scroll"});
    const made = film ? [epochs.length > 1 ? slider("epoch", epochs, epochs[Math.min(s.frame, epochs.length - 1)], (v) => now({frame: epochs.indexOf(v)})) : null] : [
      bar("views", [1, 2, 3, 4, 6, 8]), bar("images", [2, 4, 8, 16, 32, 64, 128, 256]),
      bar("imbalance", [1, 2, 5, 10, 20, 50, 100, 200, 500]), bar("classes", [2, 5, 10, 20, 50, 100]),
      bar("seed", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), bar("temperature", TEMPERATURES),
      select("geometry", [...Object.keys(GEOMETRY), ...own], s.geometry === "own" ? own[0] : s.geometry, (v) => now({geometry: GEOMETRY[v] ? v : "own"}))];
    const [first, last] = film ? [made, []] : [made.slice(0, 4), made.slice(4)];
    this.fill(
      key("a bar: all that acts on a class"),
      h("div", {class: this.panels.length > 1 ? "two" : "one"}, ...this.panels.map((panel, k) => h("div", {}, film ? bold(film[k].name) : this.side(k), panel.svg, panel.said))),
      h("fieldset", {}, h("legend", {}, film ? "run" : "batch"), ...first),
      ...(film ? [] : [h("fieldset", {}, h("legend", {}, "show"), ...last,
        this.told.link ? button("link", () => this.told.link({...s, batch: null})) : null)]),
      h("details", {ontoggle: () => this.draw()}, h("summary", {}, "the numbers as a table"), this.table));
  }
  tell() { this.told.state({...this.s}); }
  sums() {  // per panel: the forces on every class, conflict, counts
    const {s} = this;
    if (s.film) return s.film.map((run) => ({...run.frames[Math.min(s.frame, run.frames.length - 1)], counts: run.counts}));
    const batch = this.made = this.made || (s.geometry === "own" ? {...s.batch} : madeBatch(s));
    batch.temperature = s.temperature;
    return s.loss.map((side) => ({...classBalance(batch, coefficients(batch, side)), counts: batch.counts}));
  }
  draw() {
    const {s} = this, sums = this.sums(), C = sums[0].counts.length;
    const rows = sums.map((n) => n.counts.map((count, j) => {
      const [attraction, wrong_way, repulsion] = PARTS.map((part) => n[part][j]);
      return {j, count, attraction, wrong_way, repulsion, ratio: attraction > 0 && repulsion > 0 ? attraction / repulsion : NaN};
    }));
    this.order = rows[0].map((n) => n.j).sort((a, b) => rows[0][b].count - rows[0][a].count || a - b);
    const all = s.film ? s.film.flatMap((run) => run.frames) : sums;
    const most = (of) => Math.max(1e-12, ...all.flatMap((n) => range(C, (j) => of(n, j))));
    const up = most((n, j) => n.attraction[j]), down = most((n, j) => n.wrong_way[j] + n.repulsion[j]);
    this.panels.forEach((panel, k) => this.chart(panel, rows[k], sums[k], 400 / C, 168 / (up + down), 8 + 168 * up / (up + down)));
    this.report(sums);
    if (this.table.parentNode.open) this.list(rows);
  }
  chart({svg, said}, rows, sums, wide, unit, zero) {
    const bar = (n, from, to) => `M${n * wide + .08 * wide} ${from}H${(n + 1) * wide - .08 * wide}V${to}H${n * wide + .08 * wide}Z`;
    const paths = {pull: "", wrong: "", push: ""}, shades = {};
    let line = "", pen = "M";
    this.order.forEach((j, n) => {
      const {attraction: a, wrong_way: w, repulsion: r, ratio, count} = rows[j];
      paths.pull += bar(n, zero, zero - a * unit);
      paths.wrong += bar(n, zero, zero + w * unit);
      paths.push += bar(n, zero + w * unit, zero + (w + r) * unit);
      shades[GROUP(count)] = (shades[GROUP(count)] || "") + `M${n * wide} 4H${(n + 1) * wide}V258H${n * wide}Z`;
      if (ratio) line += `${pen}${(n + .5) * wide} ${Math.max(190, Math.min(256, 223 - 15 * Math.log10(ratio)))}`, pen = "L"; else pen = "M";
    });
    const at = this.order[this.chosen] ?? this.order[0], x = this.order.indexOf(at) * wide, n = rows[at];
    const groups = Object.keys(shades), word = (x, y, said, anchor) => h("text", {x, y, "text-anchor": anchor, class: "word"}, said);
    svg.replaceChildren(...groups.map((name) => h("path", {d: shades[name], fill: `var(--${SHADE[name]})`, opacity: .09})),
      ...Object.entries(paths).map(([role, d]) => h("path", {d, fill: `var(--${role})`})),
      h("path", {d: `M0 ${zero}H400M0 190H400M0 223H400`, stroke: "var(--faint)"}), h("path", {d: line, fill: "none", stroke: "var(--ink)", "stroke-width": 1.3}),
      h("rect", {x, y: 4, width: wide, height: 254, fill: "var(--ink)", opacity: .12}),
      ...[[16, "↑ pull"], [184, "↓ push"], [203, "pull : push"], [221, "1 : 1"]].map(([y, said]) => word(397, y, said, "end")),
      ...groups.map((name) => word(Number(shades[name].slice(1).split(" ")[0]) + 3, 256, name, "start")));
    const pulled = sums.attraction.reduce((a, b) => a + b, 0), taken = sums.wrong_way.reduce((a, b) => a + b, 0);
    svg.setAttribute("aria-label", `forces on ${rows.length} classes; ${percent(sums.conflict)} of the pairs of one class are pushed apart`);
    said.replaceChildren(bold(percent(sums.conflict)), " of the pairs of one class pushed apart, ", bold(percent(taken / pulled)), " of the pull taken back", h("br"),
      `class ${n.j}, ${n.count} images: pull ${short(n.attraction)}, taken back ${short(n.wrong_way)}, push ${short(n.repulsion)}, pull : push ${short(n.ratio)}`);
  }
  list(rows) {
    const names = ["class", "images", ...rows.flatMap(() => ["pull", "taken back", "push", "pull : push"])], cell = (tag) => (v) => h(tag, {}, String(v));
    this.table.replaceChildren(h("table", {}, h("tr", {}, ...names.map(cell("th"))), ...this.order.map((j) => h("tr", {}, ...[j, rows[0][j].count,
      ...rows.flatMap((r) => [short(r[j].attraction), short(r[j].wrong_way), short(r[j].repulsion), short(r[j].ratio)])].map(cell("td"))))));
  }
}

// == 6. Doors: a page's element, and a notebook's widget ==
function mount(el, kind, state, told = {}) {
  el.classList.add("acl-live");
  if (!el.querySelector("style")) el.prepend(h("style", {}, STYLE));
  const place = el.appendChild(h("div", {})), ink = () => {
    const [r, g, b] = getComputedStyle(el.parentElement || document.body).color.match(/[\d.]+/g);
    el.classList.toggle("dark", r * .3 + g * .6 + b * .1 > 140);
  };
  ink();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", ink);
  const themes = new MutationObserver(ink);
  for (const node of [document.documentElement, document.body]) themes.observe(node, {attributes: true});
  return el.explorer = new {conflict: Conflict, balance: Balance}[kind](place, state, {state() {}, balance() {}, ...told});
}

// In a page, the address holds the state.
function page(el, kind, state) {
  const word = `#${el.id}=`;
  const link = (now) => { location.hash = word + encodeURIComponent(JSON.stringify(now)); navigator.clipboard?.writeText(location.href).catch(() => {}); };
  try { if (location.hash.startsWith(word)) state = {...state, ...JSON.parse(decodeURIComponent(location.hash.slice(word.length)))}; } catch { /* cut off */ }
  return mount(el, kind, state, {link});
}

function render({model, el}) {  // of anywidget: traits go both ways
  let mine = false;
  const save = (name) => (value) => { mine = true; model.set(name, value); model.save_changes(); mine = false; };
  const place = el.appendChild(h("div", {}));
  const open = () => { place.replaceChildren(); mount(place, model.get("kind"), model.get("state"), {state: save("state"), balance: save("balance")}); };
  const changed = () => { if (!mine) open(); };
  model.on("change:state", changed);
  open();
  return () => model.off("change:state", changed);
}

export default {mount, page, render, coefficients, classBalance, forces, step};
