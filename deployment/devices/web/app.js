// The page: what can be chosen, and what the worker answered.

"use strict";

// A function that returns a vector: browsers without SIMD refuse it.
const WITH_SIMD = new Uint8Array([
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65, 0, 253, 15, 11,
]);
const SHOWN = 10; // classes

const $ = (id) => document.getElementById(id);
const state = { networks: [], network: null, blob: null, name: "", id: 0, url: "" };
let worker;

function size(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

function percent(share, digits = 1) {
  return `${(100 * share).toFixed(digits)} %`;
}

function complain(sentence) {
  $("alert").textContent = sentence;
  $("alert").hidden = !sentence;
  if (sentence) $("status").textContent = "";
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function missing() {
  if (location.protocol === "file:") {
    return "Browsers run this page from a web server only. In its folder, run: python -m http.server";
  }
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(WITH_SIMD)) {
    return "This browser has no WebAssembly with SIMD, which the engine needs. Browsers since 2023 have it.";
  }
  if (typeof Worker !== "function" || typeof OffscreenCanvas !== "function" || typeof createImageBitmap !== "function") {
    return "This browser is too old: it cannot read pictures in a worker. Browsers since 2023 can.";
  }
  return "";
}

function request() {
  complain("");
  state.id++;
  $("status").textContent = state.blob ? "Computing …" : "Loading the network …";
  worker.postMessage({ id: state.id, file: state.network.file, blob: state.blob });
}

function choose(blob, name) {
  if (!worker || !state.network) return;
  state.blob = blob;
  state.name = name;
  if (state.url) URL.revokeObjectURL(state.url);
  state.url = URL.createObjectURL(blob);
  const picture = $("picture");
  picture.onload = () => picture.classList.toggle("small", picture.naturalWidth < 100);
  picture.src = state.url;
  picture.alt = name;
  request();
}

function facts() {
  const { sparsity, accuracy } = state.network;
  $("sparsity").textContent = percent(sparsity);
  $("accuracy").textContent = accuracy === null ? "unknown" : percent(accuracy / 100, 2);
}

function show(result) {
  $("bytes").textContent = `${size(result.downloaded)}, of which this network ${size(state.network.bytes)}`;
  if (result.id !== state.id) return; // another picture or network was chosen since
  if (result.error) {
    $("result").hidden = true;
    $("time").textContent = "–";
    complain(result.error);
    return;
  }
  if (!result.logits) {
    $("status").textContent = "Ready: choose a picture.";
    return;
  }
  const order = [...result.probabilities.keys()].sort((a, b) => result.logits[b] - result.logits[a]);
  const rows = order.slice(0, SHOWN).map((i) => {
    const bar = element("div", { className: "bar" });
    bar.style.width = `${100 * result.probabilities[i]}%`;
    const cell = element("td", {}, bar);
    cell.setAttribute("aria-hidden", "true");
    return element("tr", {}, element("th", { scope: "row" }, result.names[i]), cell,
      element("td", {}, percent(result.probabilities[i])));
  });
  $("classes").tBodies[0].replaceChildren(...rows);
  const canvas = $("seen"), image = new ImageData(result.width, result.height);
  for (let i = 0; i < result.width * result.height; i++) {
    image.data.set(result.pixels.subarray(3 * i, 3 * i + 3), 4 * i);
    image.data[4 * i + 3] = 255;
  }
  Object.assign(canvas, { width: result.width, height: result.height });
  canvas.getContext("2d").putImageData(image, 0, 0);
  $("size").textContent = `As the network sees it: ${result.width} × ${result.height} pixels`;
  const milliseconds = result.milliseconds < 10 ? result.milliseconds.toFixed(2) : result.milliseconds.toFixed(1);
  $("time").textContent = `${milliseconds} ms (${result.runs} runs)`;
  $("status").textContent = `${state.name}: the network says ${result.names[order[0]]}, ${percent(result.probabilities[order[0]])}`;
  $("result").hidden = false;
  document.body.dataset.logits = JSON.stringify([...result.logits]); // for tests
}

function list(index) {
  state.networks = index.networks;
  state.networks.forEach((network, i) => {
    const radio = element("input", { type: "radio", name: "network", checked: i === index.first });
    radio.addEventListener("change", () => { state.network = network; facts(); request(); });
    const accuracy = network.accuracy === null ? "" : `${percent(network.accuracy / 100, 2)} accurate, `;
    $("networks").append(element("label", { className: "network" }, radio,
      element("span", {}, `${percent(network.sparsity)} zeros `, element("small", {}, `${accuracy}${size(network.bytes)} (${network.name})`))));
  });
  $("networks").hidden = state.networks.length < 2;
  for (const sample of index.samples) {
    const button = element("button", { type: "button" }, element("img", { src: sample.file, alt: `Sample of ${sample.label}` }));
    button.addEventListener("click", async () => {
      try {
        const response = await fetch(sample.file);
        if (!response.ok) throw new Error(String(response.status));
        choose(await response.blob(), `Sample of ${sample.label}`);
      } catch {
        complain(`${sample.file} could not be downloaded.`);
      }
    });
    $("samples").append(button);
  }
  $("about").textContent = `${index.arch} for ${index.dataset}. ${$("about").textContent}`;
  state.network = state.networks[index.first];
}

function listen() {
  for (const id of ["file", "camera"]) {
    $(id).addEventListener("change", () => {
      if ($(id).files.length) choose($(id).files[0], $(id).files[0].name);
      $(id).value = ""; // so that the same file can be chosen again
    });
  }
  const drag = (on) => (event) => { event.preventDefault(); document.body.classList.toggle("dragged", on); };
  addEventListener("dragover", drag(true));
  addEventListener("dragleave", drag(false));
  addEventListener("drop", (event) => {
    drag(false)(event);
    if (event.dataTransfer.files.length) choose(event.dataTransfer.files[0], event.dataTransfer.files[0].name);
    else complain("What was dropped is not a file.");
  });
  addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) choose(event.clipboardData.files[0], "Pasted picture");
  });
  $("choices").addEventListener("submit", (event) => event.preventDefault());
}

async function main() {
  const reason = missing();
  if (reason) return complain(reason);
  let index;
  try {
    const response = await fetch("networks.json");
    if (!response.ok) throw new Error(String(response.status));
    index = await response.json();
  } catch {
    return complain("networks.json, the list of networks, could not be read.");
  }
  worker = new Worker("worker.js");
  worker.onmessage = ({ data }) => show(data);
  worker.onerror = (event) => complain(`The engine's worker cannot run (${event.message || "worker.js could not be read"}).`);
  list(index);
  facts();
  listen();
  $("pictures").disabled = false;
  request();
}

main();
