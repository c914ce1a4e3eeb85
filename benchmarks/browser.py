"""Time networks in a browser: each in the engine and in onnxruntime-web, one thread each.

    npm install onnxruntime-web
    python benchmarks/browser.py node_modules/onnxruntime-web/dist checkpoint/ckpt.pth checkpoint/90percent_*_ckpt.pth

Both are WebAssembly with SIMD, in the same page of the same headless Chromium, one image at a time, in turn. Times are
compared with those of the first network in onnxruntime-web.
"""

import argparse
import functools
import http.server
import shutil
import statistics
import sys
import tempfile
import threading
from pathlib import Path

import torch
from playwright.sync_api import Page, sync_playwright
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoints
import pruning
import report
import utils
from deployment import model_file
from deployment.devices import targets
from deployment.graph import lower
from deployment.runtimes import export_onnx
from deployment.simplification import without_dead_channels

ROUND = 200  # milliseconds of calls in a round of one runtime
START = """async (count) => {
    const ort = await import("/ort/ort.wasm.min.mjs");
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmPaths = "/ort/";
    const bytes = async (file) => new Uint8Array(await (await fetch(file)).arrayBuffer());
    const engine = (await WebAssembly.instantiate(await bytes("engine.wasm"), {})).instance.exports;
    engine._initialize();
    const pixels = await bytes("pixels"), floats = new Float32Array(pixels.buffer), size = Math.sqrt(floats.length / 3);
    const input = engine.malloc(pixels.length), output = engine.malloc(4096);
    window.runtimes = {};
    for (let name = 0; name < count; name++) {
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.Parser(description="Time networks in a browser, in the engine and in onnxruntime-web.")
    parser.add_argument("ort", type=Path, metavar="DIST", help="dist/ of the package onnxruntime-web")
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="files of main.py, or packed")
    parser.add_argument("--rounds", type=utils.count, default=11, metavar="N", help="how often each is measured")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table to FILE")
    args = parser.parse_args(argv)
    if not (args.ort / "ort.wasm.min.mjs").is_file():
        raise utils.Failure(f"{args.ort} has no ort.wasm.min.mjs: npm install onnxruntime-web, then give its dist/")
    return args


def write_files(folder: Path, ort: Path, networks: list[nn.Module], size: int) -> list[torch.Tensor]:
    """Write both forms of each network, and an image; returns the logits of PyTorch."""
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    for name, network in enumerate(networks):
        program = lower(network, size)
        (folder / f"{name}.onnx").write_bytes(export_onnx(network, program, {}))
        (folder / f"{name}.model").write_bytes(model_file.write(without_dead_channels(program)))
    (folder / "pixels").write_bytes(pixels.numpy().tobytes())
    (folder / "index.html").write_text("<!doctype html><title>benchmark</title>")
    shutil.copyfile(targets.compile_for("web"), folder / "engine.wasm")
    (folder / "ort").symlink_to(ort.resolve())
    with torch.no_grad():
        return [network(pixels)[0] for network in networks]


def measure(page: Page, logits: list[torch.Tensor], rounds: int) -> dict[str, list[float]]:
    """Milliseconds an image of each runtime, by round, after its logits were compared with PyTorch's."""
    times: dict[str, list[float]] = {}
    for name in page.evaluate("() => Object.keys(runtimes)"):
        found = torch.tensor(page.evaluate("name => runtimes[name]()", name))
        expected = logits[int(name.split()[1])]
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error < 1e-4:
            raise utils.Failure(f"the logits of {name} differ from PyTorch's by {error:.1e} of the largest", code=1)
        times[name] = []
        page.evaluate(TIME, [name, 3 * ROUND])  # browsers compile in haste, and then once more
    for _ in range(rounds):
        for name, values in times.items():
            values.append(page.evaluate(TIME, [name, ROUND]))
    return times


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        pass


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    found = {path: checkpoints.load_checkpoint(path) for path in args.checkpoints}
    networks = [checkpoints.build_network(checkpoint).eval() for checkpoint in found.values()]
    size = next(iter(found.values())).get("settings", {}).get("image_size", 32)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        raise utils.Failure("networks are timed in Chromium: apt install chromium")
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as driver:
        try:
            logits = write_files(Path(temporary), args.ort, networks, size)
        except ValueError as error:
            raise utils.Failure(f"a network cannot be a model file: {error}") from None
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=temporary))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        version = page.evaluate(START, len(networks))
        times = measure(page, logits, args.rounds)
        title = f"Chromium {browser.version}, onnxruntime-web {version}"
        browser.close()
        server.shutdown()
    rows = []
    reference = statistics.median(times["onnxruntime-web 0"])
    for name, values in times.items():
        runtime, network = name.split()
        path, ordered, tenth = list(found)[int(network)], sorted(values), len(values) // 10
        first, median, last = ordered[tenth], statistics.median(values), ordered[-1 - tenth]
        zeros, faster = 100 * pruning.sparsity(networks[int(network)]), reference / median
        print(f"{runtime:16} {path}, {zeros:.1f} % zeros: {median:.2f} ms ({first:.2f} to {last:.2f}), {faster:.2f}")
        row = {"runtime": runtime, "checkpoint": path.name, "sparsity": f"{zeros:.2f}", "ms": f"{median:.3f}"}
        row |= {"ms_first_decile": f"{first:.3f}", "ms_last_decile": f"{last:.3f}", "times_faster": f"{faster:.2f}"}
        rows.append(row | {"versions": title})
    print(title)
    if args.out:
        report.write_csv(args.out, rows)


if __name__ == "__main__":
    utils.run(main)
