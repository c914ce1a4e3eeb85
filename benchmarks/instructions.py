"""Count the instructions that an ARM or RISC-V processor executes for an image, dense and pruned, under qemu.

    python benchmarks/instructions.py --target aarch64-linux --out results/instructions_resnet20.csv

These are instructions, not time: caches, and how many instructions a processor starts at once, do not count. qemu
writes a line for each instruction, so that a count takes minutes. A program classifies two images, then one; the
difference, halved, because it computes each image twice, is one image with a little reading and printing. The zeros
are the smallest weights of a network with random weights.
"""

import argparse
import csv
import io
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoints
import models
from deployment import model_file
from deployment.devices import targets
from deployment.graph import lower
from deployment.simplification import without_dead_channels


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Count the instructions of an image under qemu.")
    parser.add_argument("--target", default="aarch64-linux", choices=("aarch64-linux", "arm-linux", "riscv64-linux"))
    parser.add_argument("--arch", default="resnet20", choices=models.ARCHITECTURES)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.9])
    parser.add_argument("--out", type=Path, help="a CSV file")
    return parser.parse_args()


def write_model(path: Path, arch: str, size: int, sparsity: float) -> None:
    torch.manual_seed(0)
    network = models.build(arch, 10).eval()
    layers = [(m, "weight") for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=sparsity)
    for layer, name in layers:
        prune.remove(layer, name)
    path.write_bytes(model_file.write(without_dead_channels(lower(network, size))))


def count(target: str, *arguments: object) -> int:
    """The instructions of a run of `classify`, as lines of qemu's log, which goes through a pipe."""
    emulator = shutil.which(f"qemu-{target.split('-')[0]}-static")
    if not emulator:
        raise SystemExit("qemu-user-static is not installed")
    with tempfile.TemporaryDirectory() as temporary:
        log, lines = Path(temporary) / "log", [0]
        os.mkfifo(log)

        def read() -> None:
            with open(log, "rb") as file:
                while chunk := file.read(1 << 20):
                    lines[0] += chunk.count(b"\nTrace ")

        reader = threading.Thread(target=read)
        reader.start()
        command = [emulator, "-singlestep", "-d", "exec,nochain", "-D", log, targets.compile_for(target)]
        subprocess.run([*command, *map(str, arguments), "--threads", "1"], check=True, capture_output=True)
        reader.join()
    return lines[0]


def main() -> None:
    args = parse_args()
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["target", "arch", "image_size", "zeros", "instructions_per_image", "times_fewer"])
    first = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        model, image = Path(temporary) / "network.model", Path(temporary) / "image.png"
        size = args.image_size
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)).save(image)
        for sparsity in args.sparsity:
            write_model(model, args.arch, size, sparsity)
            each = (count(args.target, model, image, image) - count(args.target, model, image)) / 2
            first = first or each
            print(f"{args.target}, {args.arch}, {sparsity:.0%} zeros: {each:,.0f} instructions, {first / each:.2f}")
            writer.writerow([args.target, args.arch, size, sparsity, round(each), f"{first / each:.2f}"])
    if args.out:
        checkpoints.write(args.out, table.getvalue().encode())


if __name__ == "__main__":
    main()
