// The engine, away from the page so that it stays alive: reads a picture, resizes it, runs the network, times it.

"use strict";

const STRIP = 2 ** 22;       // pixels that are drawn at once: some browsers refuse large canvases
const MOST_PIXELS = 2e8;
const TIMED = 300, ROUND = 15; // milliseconds of a timing and of one of its rounds: the clocks of browsers are coarse

let engine;                  // the exports of engine.wasm
const networks = new Map();  // by file: what load() returns
let downloaded = 0;          // bytes
let queue = Promise.resolve();

class Sentence extends Error {} // a message for the person

async function download(file) {
  let response;
  try {
    response = await fetch(file);
  } catch {
    throw new Sentence(`${file} could not be downloaded. Is the server still there?`);
  }
  if (!response.ok) throw new Sentence(`${file} could not be downloaded: the server answers ${response.status}.`);
  const bytes = new Uint8Array(await response.arrayBuffer());
  downloaded += bytes.length;
  return bytes;
}

const bytesAt = (address, count) => new Uint8Array(engine.memory.buffer, address, count);
const floatsAt = (address, count) => new Float32Array(engine.memory.buffer, address, count);

function allocate(bytes) {
  const address = engine.malloc(bytes);
  if (!address) throw new Sentence("This device has too little memory for that.");
  return address >>> 0;
}

function text(address) {
  const all = new Uint8Array(engine.memory.buffer, address);
  return new TextDecoder().decode(all.slice(0, all.indexOf(0)));
}

async function start() {
  const bytes = await download("engine.wasm");
  try {
    engine = (await WebAssembly.instantiate(bytes, {})).instance.exports;
  } catch {
    throw new Sentence("engine.wasm is damaged, or this browser is too old for it.");
  }
  engine._initialize();
}

async function load(file) {
  const bytes = await download(file);
  const place = allocate(bytes.length), out = allocate(4);
  bytesAt(place, bytes.length).set(bytes);
  const code = engine.engine_load(place, bytes.length, 1, out);
  if (code) {
    const reason = text(engine.engine_error(code));
    engine.free(place);
    engine.free(out);
    throw new Sentence(`The network in ${file} cannot be used: ${reason}.`);
  }
  const handle = new Uint32Array(engine.memory.buffer, out, 1)[0];
  engine.free(out);
  const classes = engine.engine_classes(handle), names = [];
  for (let i = 0; i < classes; i++) names.push(text(engine.engine_class_name(handle, i)) || `class ${i}`);
  return { handle, names, width: engine.engine_width(handle), height: engine.engine_height(handle) };
}

// The pixels of a picture in the engine's memory, RGBA in front of what the network wants. By default browsers turn it
// upright; the option that asks for it has another name in older ones.
async function decode(blob, { handle }) {
  let picture;
  try {
    picture = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  } catch {
    throw new Sentence("This file cannot be read as a picture. Browsers read JPEG, PNG, WebP and a few more.");
  }
  const { width, height } = picture;
  if (width * height > MOST_PIXELS || Math.max(width, height) > 65535) {
    throw new Sentence(`This picture is too large: ${width} by ${height} pixels.`);
  }
  const rows = Math.max(1, Math.min(height, Math.floor(STRIP / width)));
  const context = new OffscreenCanvas(width, rows).getContext("2d", { willReadFrequently: true });
  const place = allocate(4 * width * height);
  for (let top = 0; top < height; top += rows) {
    const count = Math.min(rows, height - top);
    context.fillStyle = engine.engine_background(handle) ? "#000" : "#fff";
    context.fillRect(0, 0, width, rows);
    context.drawImage(picture, 0, -top);
    bytesAt(place + 4 * width * top, 4 * width * count).set(context.getImageData(0, 0, width, count).data);
  }
  picture.close();
  return { place, width, height };
}

// The median over rounds: the first ones are slow, because browsers compile in haste and then once more.
function time(run) {
  const rounds = [], begin = performance.now();
  let runs = 0, now = begin;
  while (now < begin + TIMED) {
    const start = now;
    let count = 0;
    for (; now < start + ROUND; count++, now = performance.now()) run();
    rounds.push((now - start) / count);
    runs += count;
  }
  return { runs, milliseconds: rounds.sort((a, b) => a - b)[rounds.length >> 1] };
}

function compute(file, network, picture) {
  const { handle, width, height } = network, pixels = width * height, classes = network.names.length;
  const small = allocate(3 * pixels), input = allocate(12 * pixels), output = allocate(8 * classes);
  try {
    if (!engine.resize(picture.place, 4, picture.width, picture.height, small, width, height)) {
      throw new Sentence("This device has too little memory for that picture.");
    }
    engine.normalize(small, pixels, engine.engine_mean(handle), engine.engine_std(handle), input);
    const code = engine.engine_run(handle, input, 1, height, width, output);
    if (code) throw new Sentence(`The network in ${file} cannot be used: ${text(engine.engine_error(code))}.`);
    const run = () => engine.engine_run(handle, input, 1, height, width, output);
    const { milliseconds, runs } = time(run);
    engine.softmax(output, classes, output + 4 * classes);
    return {
      width, height, runs, milliseconds, names: network.names, pixels: bytesAt(small, 3 * pixels).slice(),
      logits: floatsAt(output, classes).slice(), probabilities: floatsAt(output + 4 * classes, classes).slice(),
    };
  } finally {
    for (const address of [small, input, output]) engine.free(address);
  }
}

async function answer({ id, file, blob }) {
  try {
    if (!engine) await start();
    if (!networks.has(file)) networks.set(file, await load(file));
    const result = { id, file };
    if (blob) {
      const picture = await decode(blob, networks.get(file));
      try {
        Object.assign(result, compute(file, networks.get(file), picture));
      } finally {
        engine.free(picture.place);
      }
    }
    postMessage({ ...result, downloaded });
  } catch (error) {
    const sentence = error instanceof Sentence ? error.message : `Something went wrong in the engine (${error.message}).`;
    postMessage({ id, file, error: sentence, downloaded });
  }
}

onmessage = ({ data }) => { queue = queue.then(() => answer(data)); };
