"""Time a network in a browser: the pruned one in the engine against the dense one in onnxruntime-web, one thread each.

    npm install onnxruntime-web
    python benchmarks/browser.py node_modules/onnxruntime-web/dist --out results/browser_resnet18.csv

Both are WebAssembly with SIMD, in the same page of the same headless Chromium, one image at a time, in turn. The zeros
are the smallest weights of a network with random weights: time does not depend on their values.
"""

import argparse
import csv
import functools
import http.server
import io
import shutil
import statistics
import sys
import tempfile
import threading
from pathlib import Path

import torch
from playwright.sync_api import Page, sync_playwright
from torch import nn
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoints
import models
from deployment import model_file
from deployment.devices import targets
from deployment.graph import lower
from deployment.runtimes import export_onnx
from deployment.simplification import without_dead_channels

ROUND = 200  # milliseconds of calls in a round of one runtime
START = """async ({ networks }) => {
    const ort = await import("/ort/ort.wasm.min.mjs");
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmPaths = "/ort/";
    const bytes = async (file) => new Uint8Array(await (await fetch(file)).arrayBuffer());
    const engine = (await WebAssembly.instantiate(await bytes("engine.wasm"), {})).instance.exports;
    engine._initialize();
    const pixels = await bytes("pixels"), floats = new Float32Array(pixels.buffer), size = Math.sqrt(floats.length / 3);
    const input = engine.malloc(pixels.length), output = engine.malloc(4096);
    window.runtimes = {};
    for (const name of networks) {
        const options = { executionProviders: ["wasm"] };
        const session = await ort.InferenceSession.create(await bytes(`${name}.onnx`), options);
        runtimes[`onnxruntime-web ${name}`] = async () => {
            const images = new ort.Tensor("float32", floats, [1, 3, size, size]);
            return [...(await session.run({ [session.inputNames[0]]: images }))[session.outputNames[0]].data];
        };
        const content = await bytes(`${name}.model`), place = engine.malloc(content.length), out = engine.malloc(4);
        new Uint8Array(engine.memory.buffer).set(content, place);
        const code = engine.engine_load(place, content.length, 1, out);
        if (code) throw new Error(`engine_load: ${code}`);
        const handle = new Uint32Array(engine.memory.buffer, out, 1)[0], classes = engine.engine_classes(handle);
        runtimes[`engine ${name}`] = async () => {
            new Float32Array(engine.memory.buffer).set(floats, input / 4);
            if (engine.engine_run(handle, input, 1, size, size, output)) throw new Error("engine_run");
            return [...new Float32Array(engine.memory.buffer, output, classes)];
        };
    }
    return ort.env.versions.web;
}"""
TIME = """async ([name, milliseconds]) => {
    const begin = performance.now();
    let count = 0, now = begin;
    for (; now < begin + milliseconds; count++, now = performance.now()) await runtimes[name]();
    return (now - begin) / count;
}"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time a network in a browser, against onnxruntime-web.")
    parser.add_argument("ort", type=Path, metavar="DIR", help="dist/ of the package onnxruntime-web")
    parser.add_argument("--arch", default="resnet18", choices=models.ARCHITECTURES)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.75, 0.9, 0.98])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser")
    parser.add_argument("--out", type=Path, help="a CSV file")
    return parser.parse_args()


def write_files(folder: Path, args: argparse.Namespace) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Write both forms of each network, and an image; returns PyTorch's logits by name."""
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, args.image_size, args.image_size)
    logits = {}
    for sparsity in args.sparsity:
        network = models.build(args.arch, 10).eval()
        layers = [(m, "weight") for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        prune.global_unstructured(layers, prune.L1Unstructured, amount=sparsity)
        for layer, name in layers:
            prune.remove(layer, name)
        name = f"{100 * sparsity:g} %"
        program = lower(network, args.image_size)
        (folder / f"{name}.onnx").write_bytes(export_onnx(network, program, {}))
        (folder / f"{name}.model").write_bytes(model_file.write(without_dead_channels(program)))
        with torch.no_grad():
            logits[name] = network(pixels)[0]
    (folder / "pixels").write_bytes(pixels.numpy().tobytes())
    (folder / "index.html").write_text("<!doctype html><title>benchmark</title>")
    shutil.copyfile(targets.compile_for("web"), folder / "engine.wasm")
    (folder / "ort").symlink_to(args.ort.resolve())
    return logits, pixels


def measure(page: Page, logits: dict[str, torch.Tensor], rounds: int) -> dict[str, list[float]]:
    """Milliseconds an image of each runtime, by round, after its logits were compared with PyTorch's."""
    times: dict[str, list[float]] = {}
    for name in page.evaluate("() => Object.keys(runtimes)"):
        found = torch.tensor(page.evaluate("name => runtimes[name]()", name))
        expected = logits[name.split(" ", 1)[1]]
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error < 1e-4, (name, error)
        times[name] = []
        page.evaluate(TIME, [name, 3 * ROUND])  # browsers compile in haste, and then once more
    for _ in range(rounds):
        for name, values in times.items():
            values.append(page.evaluate(TIME, [name, ROUND]))
    return times


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        pass


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as driver:
        logits, _ = write_files(Path(temporary), args)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=temporary))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = driver.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        version = page.evaluate(START, {"networks": list(logits)})
        times = measure(page, logits, args.rounds)
        title = f"Chromium {browser.version}, onnxruntime-web {version}"
        browser.close()
        server.shutdown()
    reference = statistics.median(times[f"onnxruntime-web {next(iter(logits))}"])
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["runtime", "zeros", "ms", "ms_first_decile", "ms_last_decile", "times_faster", "arch", "versions"])
    for name, values in times.items():
        ordered, tenth = sorted(values), len(values) // 10
        median = statistics.median(values)
        runtime, zeros = name.split(" ", 1)
        spread = ordered[tenth], ordered[-1 - tenth]
        print(
            f"{runtime:16} {zeros:>6} {median:8.2f} ms ({spread[0]:.2f} to {spread[1]:.2f}) {reference / median:6.2f}"
        )
        figures = [f"{median:.3f}", *(f"{value:.3f}" for value in spread), f"{reference / median:.2f}"]
        writer.writerow([runtime, zeros, *figures, f"{args.arch} {args.image_size}x{args.image_size}", title])
    print(title)
    if args.out:
        checkpoints.write(args.out, table.getvalue().encode())


if __name__ == "__main__":
    main()
