"""Programs and pages for other devices: `deploy.py CHECKPOINT --target TARGET --out DIR`.

The compiler is clang, from the package `ziglang`, with libraries of every target. A program of a Linux target is
static. What was compiled is kept in the engine's cache (deployment/engine/build.py).
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
from PIL import Image

import checkpoints
import data
import pruning
from deployment import model_file
from deployment.engine.build import cache_directory
from deployment.graph import lower
from deployment.simplification import without_dead_channels
from images.pixels import Rendering
from utils import Failure, printable

HERE = Path(__file__).parent
ENGINE = HERE.parent / "engine"
SOURCES = {
    "classify": [HERE / "classify.c", HERE / "photo.c", HERE / "pixels.c", ENGINE / "engine.c"],
    "engine.wasm": [HERE / "pixels.c", ENGINE / "engine.c"],
}
PAGE = ("index.html", "style.css", "app.js", "worker.js")
SAMPLES = 8  # pictures, of as many classes
FLAGS = ["-std=c11", "-O3", "-s", "-fno-math-errno", "-ffp-contract=fast", "-fno-sanitize=undefined"]
# Which names of zig and which processors the targets mean: with vectors, and not older than about ten years.
TARGETS = {
    "aarch64-linux": ["-target", "aarch64-linux-musl"],  # all have NEON
    "arm-linux": ["-target", "arm-linux-musleabihf", "-mcpu=cortex_a7"],  # NEON, fused multiply-adds
    "riscv64-linux": ["-target", "riscv64-linux-musl"],  # RV64GC, without vectors
    "x86_64-linux": ["-target", "x86_64-linux-musl", "-mcpu=x86_64_v3"],  # AVX2, which the program looks for
    "x86_64-windows": ["-target", "x86_64-windows-gnu", "-mcpu=x86_64_v3"],
    "aarch64-windows": ["-target", "aarch64-windows-gnu"],
    "x86_64-macos": ["-target", "x86_64-macos.13.0", "-mcpu=x86_64_v3"],
    "aarch64-macos": ["-target", "aarch64-macos.13.0"],
    "web": ["-target", "wasm32-wasi", "-msimd128", "-mexec-model=reactor", "-DENGINE_ONE_THREAD"],
}
FUNCTIONS = ("load", "run", "error", "classes", "height", "width", "class_name", "mean", "std", "background")
EXPORTS = ["malloc", "free", "resize", "normalize", "softmax", *(f"engine_{name}" for name in FUNCTIONS)]


def export(args: Namespace, found: dict[Path, dict]) -> None:
    """Write the program or page of `args.target`, and a model file for each checkpoint, into the folder `args.out`.

    Files of the same names are replaced, each whole or not at all, and only once all could be made. Failure for a
    network that the engine cannot run, and for folders that cannot be written.
    """
    out = args.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and not out.is_dir():
        raise Failure(f"argument --out: {out} is not a folder")
    for folder in (out.parent, out):
        if folder.exists() and not os.access(folder, os.W_OK):
            raise Failure(f"argument --out: nothing can be written to {folder}")
    needs_data = args.target == "web" or not all({"mean", "classes"} <= set(c) for c in found.values())
    dataset = data.of_checkpoints(args, found) if needs_data else None
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary)
        models = [write_model(path, checkpoint, args, dataset, folder) for path, checkpoint in found.items()]
        if len({model["file"] for model in models}) < len(models):
            raise Failure("two checkpoints of the same name would be the same model file")
        if args.target == "web":
            write_page(folder, models, dataset)
        else:
            program = compile_for(args.target)
            shutil.copyfile(program, folder / program.name)
            (folder / program.name).chmod(0o755)
        move(folder, out)
    print(f"{out} holds {', '.join(sorted(path.name for path in out.iterdir()))}")
    names = [model["file"] for model in models]
    if args.target == "web":
        print(f"look at it: python -m http.server --directory {args.out}")
    else:
        print(f"on the device: ./{program.name} {names[0]} IMAGE...")


def write_model(path: Path, checkpoint: dict, args: Namespace, dataset: data.Dataset | None, folder: Path) -> dict:
    """Write the model file of a checkpoint; returns what the page says of it."""
    settings = checkpoint.get("settings", {})
    rendering = Rendering.of(settings)
    if rendering.grey:
        raise Failure(f"{path} was trained on images of more than 8 bits, which programs for devices do not read")
    size = args.image_size or settings.get("image_size", 32)
    names = checkpoint.get("classes") or (dataset.classes if dataset else [])
    mean, std = checkpoint.get("mean"), checkpoint.get("std")
    if dataset:
        data.check(path, checkpoint, dataset)
        size = dataset.test.images.shape[1]
        mean, std = (mean, std) if mean else dataset.mean_and_std()
    network = checkpoints.build_network(checkpoint).eval()
    try:
        program = without_dead_channels(lower(network, size))
        content = model_file.write(program, mean, std, names, rendering.background or "white")
    except ValueError as error:
        raise Failure(f"{path} cannot be a model file: {error}") from None
    name = re.sub(r"_ckpt(?=\.|$)", "", path.stem)
    (folder / f"{name}.model").write_bytes(content)
    accuracy = checkpoint.get("acc")
    return {
        "file": f"{name}.model",
        "name": printable(name),
        "arch": checkpoint["arch"],
        "sparsity": pruning.sparsity(network),
        "accuracy": None if accuracy is None else round(float(accuracy), 4),
        "bytes": len(content),
    }


def write_page(folder: Path, models: list[dict], dataset: data.Dataset) -> None:
    for name in PAGE:
        shutil.copyfile(HERE / "web" / name, folder / name)
    shutil.copyfile(compile_for("web"), folder / "engine.wasm")
    samples = []
    labels = dataset.test.labels.numpy()
    for label in np.unique(labels)[:SAMPLES]:
        file = f"sample{len(samples) + 1}.png"
        pixels = dataset.test.images[int(np.flatnonzero(labels == label)[0])].numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (folder / file).write_bytes(buffer.getvalue())
        samples.append({"file": file, "label": printable(dataset.classes[label])})
    models = sorted(models, key=lambda model: model["sparsity"])
    # The page begins with the most accurate of the networks without most of their weights.
    sparse = [model for model in models if model["sparsity"] > 0.5] or models
    first = models.index(max(sparse, key=lambda model: (model["accuracy"] or 0, model["sparsity"])))
    arch = " and ".join(dict.fromkeys(model["arch"] for model in models))
    index = {"networks": models, "first": first, "samples": samples, "arch": arch, "dataset": printable(dataset.name)}
    (folder / "networks.json").write_text(json.dumps(index, indent=1))


def move(folder: Path, out: Path) -> None:
    """The files of a folder into another, the list of networks last."""
    out.mkdir(exist_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "networks.json"):
        os.replace(path, out / path.name)


def compile_for(target: str) -> Path:
    """The compiled program of a target: `classify`, `classify.exe` or `engine.wasm`, from the cache if it is there.

    Failure if there is no ziglang or if it fails.
    """
    try:
        version = importlib.metadata.version("ziglang")
    except importlib.metadata.PackageNotFoundError:
        raise Failure("programs for devices need a compiler: pip install ziglang") from None
    name = "engine.wasm" if target == "web" else "classify"
    flags = FLAGS + TARGETS[target]
    if target == "web":
        flags += ["-Wl,-z,stack-size=1048576", *(f"-Wl,--export={function}" for function in EXPORTS)]
    else:
        flags += [] if "windows" in target else ["-lpthread", "-lm"]
    sources = SOURCES[name]
    headers = sorted([*HERE.glob("*.h"), *ENGINE.glob("*.h")])
    identity = "\0".join([version, *flags]).encode() + b"".join(path.read_bytes() for path in [*sources, *headers])
    directory = cache_directory() / f"{target}-{hashlib.sha256(identity).hexdigest()[:16]}"
    name += ".exe" if "windows" in target else ""
    if not (directory / name).exists():
        # ziglang keeps parts of libc in a cache of its own.
        zig = {f"ZIG_{kind}_CACHE_DIR": str(cache_directory() / "zig") for kind in ("GLOBAL", "LOCAL")}
        with tempfile.TemporaryDirectory(dir=cache_directory()) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            command = [sys.executable, "-m", "ziglang", "cc", *flags, "-o", str(made / name), *map(str, sources)]
            result = subprocess.run(command, capture_output=True, text=True, env=os.environ | zig, check=False)
            if result.returncode or not (made / name).exists():
                lines = [line for line in result.stderr.splitlines() if "error" in line] or [result.stderr.strip()]
                raise Failure(f"ziglang cannot compile for {target}: {lines[0][:200]}", code=1)
            with contextlib.suppress(OSError):  # another process made the same
                os.replace(made, directory)
    return directory / name
