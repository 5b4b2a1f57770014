// The page: a picture from a file, the camera, the clipboard or a drag becomes pixels, scores and bars.

import { Tensor, loadAndCompile, loadLiteRt } from "./litert/index.js";

const TOP = 5;
const find = (id) => document.getElementById(id);
// The newest of both: labels and model of two deployments must not be mixed.
const newest = (url) => fetch(url, { cache: "no-cache" });
const contract = await (await newest("model.json")).json();
const { labels, size } = contract;

// ---- Pixels: the same arithmetic as Pillow's anti-aliased bilinear filter, with which the model was
// trained and checked. A canvas that shrinks a picture skips pixels, which costs accuracy.

const BITS = 22;

/** Returns for each of `size` output pixels which of `length` pixels it averages, and their weights. */
function filter(length) {
  const scale = length / size;
  const support = Math.max(scale, 1);
  return Array.from({ length: size }, (_, index) => {
    const centre = (index + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support + 0.5), 0);
    const count = Math.min(Math.trunc(centre + support + 0.5), length) - first;
    const triangle = Array.from({ length: count }, (_, i) =>
      Math.max(1 - Math.abs((i + first - centre + 0.5) * (1 / support)), 0),
    );
    const sum = triangle.reduce((total, weight) => total + weight, 0);
    return { first, weights: triangle.map((w) => Math.trunc(0.5 + (w / sum) * 2 ** BITS)) };
  });
}

/** Resizes the rows of `source` (`channels` bytes a pixel) into columns of `target` (RGB) from `start` on. */
function resizeRows(source, channels, length, spans, target, height, start) {
  const rows = source.length / (length * channels);
  for (let row = 0; row < rows; row++) {
    for (const [index, { first, weights }] of spans.entries()) {
      let red = 1 << (BITS - 1), green = red, blue = red;
      let at = (row * length + first) * channels;
      for (let i = 0; i < weights.length; i++, at += channels) {
        red += source[at] * weights[i];
        green += source[at + 1] * weights[i];
        blue += source[at + 2] * weights[i];
      }
      const to = (index * height + start + row) * 3;
      target[to] = red >> BITS;
      target[to + 1] = green >> BITS;
      target[to + 2] = blue >> BITS;
    }
  }
}

/** Returns the centre square of an ImageBitmap as the model reads it: RGB bytes, row by row. */
export function pixelsOf(bitmap) {
  const side = Math.min(bitmap.width, bitmap.height);
  const left = Math.floor((bitmap.width - side) / 2);
  const top = Math.floor((bitmap.height - side) / 2);
  const spans = filter(side);
  const columns = new Uint8Array(size * side * 3);
  // In bands, because a phone's photo is larger than the largest canvas of some phones.
  const band = Math.min(side, 256);
  const context = new OffscreenCanvas(side, band).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white"; // under transparent pictures
  for (let y = 0; y < side; y += band) {
    const rows = Math.min(band, side - y);
    context.fillRect(0, 0, side, rows);
    context.drawImage(bitmap, left, top + y, side, rows, 0, 0, side, rows);
    const { data } = context.getImageData(0, 0, side, rows);
    resizeRows(data, 4, side, spans, columns, side, y);
  }
  const pixels = new Uint8Array(size * size * 3);
  resizeRows(columns, 3, side, spans, pixels, size, 0);
  return pixels;
}

/** Decodes a picture file, turned as its EXIF orientation says; colour profiles are ignored. */
export function decode(file) {
  return createImageBitmap(file, {
    imageOrientation: "from-image",
    colorSpaceConversion: "none",
  });
}

// ---- The model. The build with one thread runs on any static host: threads would need the headers
// Cross-Origin-Opener-Policy and Cross-Origin-Embedder-Policy.

async function load() {
  await loadLiteRt("./litert/litert_wasm_compat_internal.js");
  const file = await (await newest("model_int8.tflite")).arrayBuffer();
  return loadAndCompile(new Uint8Array(file), { accelerator: "wasm" });
}

const model = load(); // a promise, so that a picture may come before it is there

/** Returns the probability of each label, and the milliseconds that the model took. */
export async function classify(pixels) {
  const net = await model;
  const input = new Tensor(pixels, [1, size, size, 3]);
  const start = performance.now();
  const [output] = await net.run(input);
  const milliseconds = performance.now() - start;
  const scores = Array.from(output.toTypedArray(), (v) => (v - contract.zero_point) * contract.scale);
  input.delete();
  output.delete();
  return { scores, milliseconds };
}

/** Returns the indices of the best labels; of equal ones the first comes first. */
export function best(scores) {
  return [...scores.keys()].sort((a, b) => scores[b] - scores[a]).slice(0, TOP);
}

// ---- The page.

const say = (text) => (find("status").textContent = text);
const percent = (score) => `${(100 * score).toFixed(1)}%`;
const time = (milliseconds) => `${milliseconds.toFixed(1)} ms`;

/** Classifies an ImageBitmap and shows the answer; returns the best label and its share. */
async function answer(bitmap, since) {
  const pixels = pixelsOf(bitmap);
  bitmap.close();
  const { scores, milliseconds } = await classify(pixels);
  const order = best(scores);
  for (const [rank, row] of [...find("scores").children].entries()) {
    const [label, value, bar] = row.children;
    label.textContent = labels[order[rank]];
    value.textContent = percent(scores[order[rank]]);
    bar.style.setProperty("--share", scores[order[rank]]);
  }
  find("model-time").textContent = time(milliseconds);
  find("whole-time").textContent = time(performance.now() - since);
  const rgba = new Uint8ClampedArray(size * size * 4).fill(255);
  for (let i = 0; i < size * size; i++) rgba.set(pixels.subarray(3 * i, 3 * i + 3), 4 * i);
  find("seen").getContext("2d").putImageData(new ImageData(rgba, size, size), 0, 0);
  for (const id of ["scores", "facts"]) find(id).hidden = false;
  return { name: labels[order[0]], share: percent(scores[order[0]]) };
}

function show(id) {
  for (const other of ["picture", "video", "hint"]) find(other).hidden = other !== id;
}

let turn = 0; // of the source whose answers are shown; an older one that is still at work gives up
let stream = null;

async function usePicture(file) {
  const mine = ++turn;
  stopCamera();
  const since = performance.now();
  let bitmap;
  try {
    bitmap = await decode(file);
  } catch {
    say("This browser cannot read that file as a picture: try a JPEG, PNG or WebP file.");
    return;
  }
  if (mine !== turn) return;
  const picture = find("picture");
  URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(file);
  picture.alt = file.name;
  show("picture");
  const { name, share } = await answer(bitmap, since);
  say(`${name}, ${share}`);
}

const release = (camera) => camera.getTracks().forEach((track) => track.stop());

function stopCamera() {
  if (!stream) return;
  find("video").pause();
  release(stream);
  stream = null;
  find("camera").setAttribute("aria-pressed", "false");
  find("camera").textContent = "Use camera";
}

async function useCamera() {
  if (!navigator.mediaDevices) {
    // A page that is neither https nor localhost may not see the camera; a phone's own camera app will do.
    find("file").capture = "environment";
    find("file").click();
    find("file").removeAttribute("capture");
    return;
  }
  const mine = ++turn;
  if (stream) {
    stopCamera(); // the last frame and its answer stay
    return;
  }
  let opened;
  try {
    opened = await navigator.mediaDevices.getUserMedia({
      video: { facingMode: "environment", width: { ideal: 640 }, height: { ideal: 480 } },
    });
  } catch {
    say("There is no camera that this page may use: allow it in the browser's settings.");
    return;
  }
  if (mine !== turn) return release(opened);
  stream = opened;
  const video = find("video");
  video.srcObject = stream;
  find("camera").setAttribute("aria-pressed", "true");
  find("camera").textContent = "Stop camera";
  await video.play();
  show("video");
  // A screen reader is told of an answer that has stood for a second, not of each frame's.
  let spoken, label, stands;
  while (mine === turn) {
    const since = performance.now();
    const bitmap = await createImageBitmap(video);
    if (mine !== turn) return;
    const { name } = await answer(bitmap, since);
    if (name !== label) [label, stands] = [name, since];
    if (label !== spoken && since - stands > 1000) say((spoken = label));
    await new Promise(requestAnimationFrame);
  }
}

find("choose").onclick = () => find("file").click();
find("file").onchange = ({ target }) => {
  if (target.files[0]) usePicture(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
};
find("camera").onclick = useCamera;

const pictureIn = (data) => [...data.files].find((file) => file.type.startsWith("image/"));
document.onpaste = ({ clipboardData }) => {
  const file = pictureIn(clipboardData);
  if (file) usePicture(file);
};
document.ondragover = (event) => {
  event.preventDefault();
  find("stage").classList.add("over");
};
document.ondragleave = ({ relatedTarget }) => {
  if (!relatedTarget) find("stage").classList.remove("over");
};
document.ondrop = (event) => {
  event.preventDefault();
  find("stage").classList.remove("over");
  const file = pictureIn(event.dataTransfer);
  if (file) usePicture(file);
};

find("seen").width = find("seen").height = size;
for (let rank = 0; rank < Math.min(TOP, labels.length); rank++) {
  const row = document.createElement("li");
  row.append(...["label", "value", "bar"].map((name) => {
    const part = document.createElement("span");
    part.className = name;
    return part;
  }));
  find("scores").append(row);
}

try {
  await classify(new Uint8Array(size * size * 3)); // the first run is slower than those to come
  if (turn === 0) say("Ready.");
  for (const id of ["choose", "camera"]) find(id).disabled = false;
} catch (error) {
  say(`The model cannot be loaded (${error.message}): reload the page, or try a newer browser.`);
  throw error;
}

if (navigator.serviceWorker) {
  await navigator.serviceWorker.register("sw.js");
  await navigator.serviceWorker.ready;
  find("offline").textContent = "Works offline.";
}
