"""Count the instructions that an ARM or RISC-V processor executes for an image, dense and pruned, under qemu.

    python benchmarks/instructions.py checkpoint/ckpt.pth checkpoint/90percent_single_ckpt.pth

These are instructions, not time: caches, and how many instructions a processor starts at once, do not count. qemu
writes a line for each instruction, about a million lines a second, so that a dense ResNet18 takes half an hour. A
program classifies two images, then one; the difference, halved, because it computes each image twice, is one image with
a little reading and printing.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoints
import pruning
import report
import utils
from deployment import model_file
from deployment.devices import targets
from deployment.graph import lower
from deployment.simplification import without_dead_channels


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.Parser(description="Count the instructions of an image under qemu.")
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="files of main.py, or packed")
    parser.add_argument("--target", default="aarch64-linux", choices=("aarch64-linux", "arm-linux", "riscv64-linux"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table to FILE")
    return parser.parse_args(argv)


def count(target: str, *arguments: object) -> int:
    """The instructions of a run of `classify`, as lines of qemu's log, which goes through a pipe."""
    emulator = shutil.which(f"qemu-{target.split('-')[0]}-static")
    if not emulator:
        raise utils.Failure("instructions are counted by qemu: apt install qemu-user-static")
    with tempfile.TemporaryDirectory() as temporary:
        log = Path(temporary) / "log"
        os.mkfifo(log)
        command = [emulator, "-singlestep", "-d", "exec,nochain", "-D", log, targets.compile_for(target)]
        with subprocess.Popen(["grep", "-c", "^Trace ", log], stdout=subprocess.PIPE, text=True) as counter:
            command += [*map(str, arguments), "--threads", "1"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = counter.communicate()[0]
    if done.returncode:
        raise utils.Failure(f"{emulator} ended with exit code {done.returncode}: {done.stderr}", code=1)
    return int(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    found = {path: checkpoints.load_checkpoint(path) for path in args.checkpoints}
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as temporary:
        model, image = Path(temporary) / "network.model", Path(temporary) / "image.png"
        for path, checkpoint in found.items():
            size = checkpoint.get("settings", {}).get("image_size", 32)
            network = checkpoints.build_network(checkpoint).eval()
            try:
                model.write_bytes(model_file.write(without_dead_channels(lower(network, size))))
            except ValueError as error:
                raise utils.Failure(f"{path} cannot be a model file: {error}") from None
            Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)).save(image)
            each = round((count(args.target, model, image, image) - count(args.target, model, image)) / 2)
            fewer = (rows[0]["instructions_per_image"] if rows else each) / each
            zeros = 100 * pruning.sparsity(network)
            print(f"{args.target}, {path}, {zeros:.1f} % zeros: {each:,} instructions, {fewer:.2f} times fewer")
            row = {"target": args.target, "checkpoint": path.name, "arch": checkpoint["arch"], "image_size": size}
            row |= {"sparsity": f"{zeros:.2f}", "instructions_per_image": each, "times_fewer": f"{fewer:.2f}"}
            rows.append(row)
    if args.out:
        report.write_csv(args.out, rows)


if __name__ == "__main__":
    utils.run(main)
