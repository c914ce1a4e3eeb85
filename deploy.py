"""Turn pruned checkpoints into files and networks to ship, check them, and measure them on this machine's CPU.

    python deploy.py checkpoint                              every checkpoint of a directory
    python deploy.py checkpoint/90percent_iter_ckpt.pth      one checkpoint
    python deploy.py checkpoint --dtype bf16 --onnx          also files with bf16 weights, and ONNX models
    python deploy.py checkpoint --target web --out page      programs and pages for other devices (docs/devices.md)
    python deploy.py checkpoint/ckpt.pth --profile           the time of each layer, for main.py --ms

Each checkpoint gets a packed file, without its zeros, which test.py and deploy.py read like any checkpoint. Then its
network is timed in PyTorch, without its dead channels, and in the sparse engine, beside other ways to run the dense
network. The results go to deploy_files.csv, deploy_runtimes.csv and deploy.png. GPUs are not measured: unstructured
zeros do not make them faster.

Measured: ResNet18 at 90 % sparsity, 10.6 times smaller and 4.5 times faster than PyTorch fp32 at batch 1, 7 times if
it was pruned for speed (two cores of an AMD EPYC with AVX-512; docs/deployment.md has the command and all figures).
"""

import signal

if __name__ == "__main__":  # imports take seconds, and Ctrl-C during them should not print a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import gzip
import importlib.util
import io
import os
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import checkpoints
import data
import engine
import profiles
import pruning
import utils
from deployment import packing, profiling, tables
from deployment.devices import targets
from deployment.engine import lanes_of_this_cpu, usable_processors
from deployment.program import Program
from deployment.runtimes import export_onnx, in_pytorch, make_runtimes, measure_accuracy, read, time_runtimes
from deployment.tables import File
from formats import foreign

REPORTS = ("deploy_files.csv", "deploy_runtimes.csv", "deploy.png")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.Parser(description="Pack pruned checkpoints, check them and measure them on the CPU.")
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="checkpoint files, or directories of main.py"
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="also write a packed file with weights rounded to this type; fp32 is lossless, the others are not",
    )
    parser.add_argument("--onnx", action="store_true", help="also write an ONNX model with BatchNorm folded")
    parser.add_argument(
        "--safetensors", action="store_true", help="also write a safetensors file, for other programs; zeros stay in it"
    )
    parser.add_argument(
        "--rounds", type=utils.count, default=11, metavar="N", help="how often each runtime is measured"
    )
    parser.add_argument(
        "--threads",
        type=utils.count,
        metavar="N",
        help="measure with N threads, and with one (default: as many as PyTorch uses)",
    )
    parser.add_argument(
        "--target", choices=targets.TARGETS, help="write a program or page for this device, measure nothing"
    )
    parser.add_argument("--out", type=utils.directory, metavar="DIR", help="the folder that --target writes")
    parser.add_argument(
        "--profile",
        action="store_true",
        help=f"only measure how long each layer takes by its number of weights, and write {profiles.NAME} beside the "
        "checkpoint, for main.py --ms",
    )
    utils.add_data_arguments(parser, None, None)
    args = parser.parse_args(argv)
    if bool(args.target) != bool(args.out):
        parser.error("--target and --out need each other")
    mode = "--target" if args.target else "--profile" if args.profile else ""
    flags = ["--onnx", "--safetensors", "--dtype", *(["--profile"] if args.target else [])]
    for flag in flags if mode else ():
        if getattr(args, flag[2:]) not in (False, "fp32"):
            parser.error(f"{mode} and {flag} exclude each other")
    args.threads = args.threads or min(torch.get_num_threads(), usable_processors())
    if args.threads > usable_processors():
        raise utils.Failure(
            f"argument --threads: {args.threads} is more than the {usable_processors()} processors of this machine"
        )
    for path in args.checkpoints if args.safetensors else ():
        if path.suffix == ".safetensors":
            parser.error(f"argument --safetensors: {path} is such a file already")
    if args.onnx and not importlib.util.find_spec("onnx"):
        raise utils.Failure("argument --onnx: the package onnx is not installed")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    found = {path: checkpoints.load_checkpoint(path) for path in find(args.checkpoints)}
    if args.target:
        return targets.export(args, found)
    if args.profile:
        return profiling.write(args, found)
    directory = report_directory(found)
    if not args.mean:
        checkpoints.adopt_constants(found)
    dataset = data.of_checkpoints(args, found)
    for path, checkpoint in found.items():
        data.check(path, checkpoint, dataset)
        if taken := checkpoints.taken(checkpoint):
            print(utils.printable(f"{path}: {taken}"))
        if args.mean and "mean" not in checkpoint:  # what is written says how to prepare images
            checkpoint |= {"mean": args.mean, "std": args.std}
    size, thread_counts = dataset.test.images.shape[1], sorted({1, args.threads})
    batches = {path: data.test_batches(checkpoint, dataset, torch.device("cpu")) for path, checkpoint in found.items()}
    networks = {path: checkpoints.build_network(checkpoint).eval() for path, checkpoint in found.items()}
    for path, network in networks.items():
        check_logits(path, network, size)
    torch.set_num_threads(args.threads)
    print(
        f"{tables.processor()}, vectors of {lanes_of_this_cpu()} floats, {args.threads} threads, "
        f"PyTorch {torch.__version__}, {args.rounds} rounds"
    )
    densest = min(networks, key=lambda path: pruning.sparsity(networks[path]))
    files, runtimes = [], []
    for path, network in tqdm(networks.items(), "preparing", leave=False, disable=None):
        plain = plain_bytes(found[path])
        files += [File(str(path), name, count, plain) for name, count in compressed_sizes(path).items()]
        files += write_packed(path, found[path], plain, args.dtype, batches[path])
        program = read(path, network, size)
        if args.onnx and program:
            model = write_onnx(path, found[path], network, program, dataset, batches[path])
            files.append(File(str(path), "ONNX", model.stat().st_size, plain))
        if args.safetensors:
            size_there = write_safetensors(path, found[path], dataset, batches[path]).stat().st_size
            files.append(File(str(path), "safetensors", size_there, plain))
        runtimes += make_runtimes(path, network, program, size, args.threads, baselines=path == densest)
    print("\n" + tables.files_table(files))
    time_runtimes(runtimes, size, thread_counts, args.rounds)
    measure_accuracy(runtimes, {str(path): batches[path] for path in found}, args.threads)
    print("\n" + tables.runtimes_table(runtimes, thread_counts))
    for line in tables.predictions(found, runtimes):
        print(line)
    contents = tables.files_csv(files), tables.runtimes_csv(runtimes, thread_counts)
    for name, content in zip(REPORTS, (*contents, tables.plot(files, runtimes, args.threads))):
        checkpoints.write(directory / name, content)
    print(f"\n{', '.join(REPORTS)} in {directory} hold all figures")


def find(paths: list[Path]) -> list[Path]:
    """The checkpoints of files and directories. In a directory the dense one comes first; its packed files are only
    used if it has no others."""
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob("*ckpt.pth")) or sorted(path.glob("*.packed"))
            if not inside:
                raise utils.Failure(f"{path} holds no checkpoint")
            found += sorted(inside, key=lambda file: file.name != "ckpt.pth")
        else:
            found.append(path)
    found = list({path.resolve(): path for path in reversed(found)}.values())[::-1]
    targets = [packing.name(path) for path in found]
    for path, target in zip(found, targets):
        if targets.count(target) > 1:
            raise utils.Failure(f"{target} would be the packed file of {path} and of another checkpoint")
    return found


def report_directory(found: dict[Path, dict]) -> Path:
    """The directory of the first checkpoint; Failure if the reports cannot be written there."""
    directory = next(iter(found)).parent
    if any((directory / name).is_dir() for name in REPORTS) or not os.access(directory, os.W_OK):
        raise utils.Failure(f"{', '.join(REPORTS)} cannot be written to {directory}")
    return directory


def check_logits(path: Path, network: nn.Module, size: int) -> None:
    """Failure if a network computes NaN or inf, because nothing can be compared with that."""
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    if not in_pytorch(network)(images).isfinite().all():
        raise utils.Failure(f"{path}: the logits of random images contain NaN or inf")


def plain_bytes(checkpoint: dict) -> int:
    """The size of the weights alone in PyTorch's format."""
    buffer = io.BytesIO()
    torch.save(checkpoint["net"], buffer)
    return buffer.tell()


def compressed_sizes(path: Path) -> dict[str, int]:
    """Bytes of a checkpoint file as it is, and after general compressors."""
    content = path.read_bytes()
    sizes = {"as saved": len(content), "gzip -9": len(gzip.compress(content, 9))}
    if importlib.util.find_spec("zstandard"):  # optional, and only for this comparison
        import zstandard

        sizes["zstd -19"] = len(zstandard.compress(content, 19))
    return sizes


def write_packed(path: Path, checkpoint: dict, plain: int, dtype: str, batches: data.TestBatches) -> list[File]:
    """Write the packed file of a checkpoint, and one with rounded weights; read them again and compare.

    A checkpoint that was read from a packed file is not packed again.
    """
    files = []
    for kind in dict.fromkeys(("fp32", dtype)) if path.suffix != ".packed" else ():
        target = packing.name(path, kind)
        checkpoints.write(target, packing.pack(checkpoint, kind))
        again = checkpoints.load_checkpoint(target)
        if kind == "fp32":
            if checkpoints.digest(again["net"]) != checkpoints.digest(checkpoint["net"]):
                raise utils.Failure(f"{target} does not hold the weights of {path}", code=1)
            files.append(File(str(path), "packed, fp32", target.stat().st_size, plain))
        else:
            accuracy = engine.evaluate(checkpoints.build_network(again), batches).accuracy
            files.append(File(str(path), f"packed, {kind} (lossy)", target.stat().st_size, plain, accuracy))
    return files


def write_safetensors(path: Path, checkpoint: dict, dataset: data.Dataset, batches: data.TestBatches) -> Path:
    """Write a network as a safetensors file with what its user needs, read it again and compare."""
    content = foreign.write_safetensors(
        checkpoint["net"],
        arch=checkpoint["arch"],
        classes=checkpoint.get("classes", dataset.classes),
        mean=batches.mean.tolist(),
        std=batches.std.tolist(),
        **({"accuracy": checkpoint["acc"]} if "acc" in checkpoint else {}),
    )
    target = path.with_suffix(".safetensors")
    if target.exists() and not foreign.is_of_deploy(checkpoints.read(target)):
        raise utils.Failure(f"{target} exists, and deploy.py did not write it: move it away")
    checkpoints.write(target, content)
    if checkpoints.digest(checkpoints.load_checkpoint(target)["net"]) != checkpoints.digest(checkpoint["net"]):
        raise utils.Failure(f"{target} does not hold the weights of {path}", code=1)
    return target


def write_onnx(
    path: Path,
    checkpoint: dict,
    network: nn.Module,
    program: Program,
    dataset: data.Dataset,
    batches: data.TestBatches,
) -> Path:
    """Write the ONNX model of a network, with what its user needs to prepare images and to name the outputs."""
    metadata = {
        "mean": batches.mean.tolist(),
        "std": batches.std.tolist(),
        "classes": checkpoint.get("classes", dataset.classes),
        "image_size": dataset.test.images.shape[1],
    }
    target = path.with_suffix(".onnx")
    checkpoints.write(target, export_onnx(network, program, metadata))
    return target


if __name__ == "__main__":
    utils.run(main)
