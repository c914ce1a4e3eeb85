"""Time every way to compute a network on this CPU, in turn, in one run.

    python benchmarks/inference.py checkpoint/*ckpt.pth                     the networks of main.py
    python benchmarks/inference.py checkpoint/ckpt.pth --prune 0.75 0.9     a dense network, and pruned copies of it
    python benchmarks/inference.py checkpoint/ckpt.pth --every --csv FILE   other runtimes on every network, too

Measured: docs/deployment.md has a table, with the command and the hardware.

Each runtime has a process of its own, so that none runs with another's settings and threads. A round calls all of them
in turn, in the opposite order of the round before; while one computes, the others wait for requests. The figures are
medians, with first and last decile in brackets. The sparse engine computes every network. The speed of the other
runtimes does not depend on zeros, so they get the densest network unless --every is given.

Copies that --prune makes lose their smallest weights, globally, and are not retrained. They are for timing: no accuracy
is measured for them. int8 is onnxruntime's static quantization: per channel, calibrated on 512 training images by
minimum and maximum, the quantized model runs in onnxruntime and in OpenVINO.
"""

import argparse
import atexit
import functools
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoints
import data
import engine
import pruning
import utils
from deployment import runtimes, tables
from deployment.engine import Engine, lanes_of_this_cpu, usable_processors
from deployment.graph import lower
from deployment.program import ProgramModule
from deployment.runtimes import BATCH, ENGINE, AsModule, Function, Runtime, in_channels_last, in_pytorch
from deployment.simplification import without_dead_channels

CALLS = {1: 10, BATCH: 2}  # timed calls in one round, by batch size
CALIBRATION = 512  # training images
PAUSE = 0.02  # seconds before a runtime is timed, in which the threads of the one before stop waiting actively
Source = tuple[Path, float]  # a checkpoint, and the sparsity to which its network is pruned, or 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.Parser(description="Time every way to compute a network on this CPU, in turn.")
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="files of main.py, or packed")
    parser.add_argument(
        "--prune", nargs="+", type=utils.sparsity, default=[], metavar="S", help="copies of the first one to time"
    )
    parser.add_argument("--every", action="store_true", help="all runtimes on every network, not the densest alone")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES), metavar="NAME", help="names")
    parser.add_argument("--rounds", type=utils.count, default=7, metavar="N", help="how often each is measured")
    parser.add_argument("--threads", type=utils.count, metavar="N", help="and one (default: all processors)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write all figures to FILE")
    utils.add_data_arguments(parser, "cifar10", None)
    args = parser.parse_args(argv)
    args.threads = args.threads or usable_processors()
    if args.threads > usable_processors():
        raise utils.Failure(f"argument --threads: {args.threads} on {usable_processors()} processors")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    found = {path: checkpoints.load_checkpoint(path) for path in args.checkpoints}
    size = args.image_size or next(iter(found.values())).get("settings", {}).get("image_size", 32)
    dataset = data.load(args.dataset, args.data_dir, size)
    for path, checkpoint in found.items():
        data.check(path, checkpoint, dataset)
    networks = {str(path): (path, 0.0) for path in found}
    networks |= {f"{args.checkpoints[0]}, {100 * s:g} % pruned": (args.checkpoints[0], s) for s in args.prune}
    calibration = training_images(found[args.checkpoints[0]], dataset)
    torch.set_num_threads(args.threads)
    print(
        f"{tables.processor()}, vectors of {lanes_of_this_cpu()} floats, {args.threads} threads, "
        f"PyTorch {torch.__version__}, {args.rounds} rounds"
    )
    workers = {kind: Worker(kind, list(networks.values()), size, calibration) for kind in args.runtimes}
    rows = [
        row
        for index, (name, source) in enumerate(networks.items())
        for row in make_rows(name, source, size, workers, baselines=index == 0 or args.every)
    ]
    calls = check([(row, list(networks).index(row.checkpoint)) for row in rows], workers, size, args.threads)
    measure(calls, workers, size, args.rounds)
    for row, index, threads, _ in tqdm(calls, "measuring accuracy", leave=False, disable=None):
        path, pruned = networks[row.checkpoint]
        if row.measure_accuracy and row.accuracy is None and threads == args.threads and not pruned:
            function = AsModule(workers[row.name].function(index, threads))
            row.accuracy = engine.evaluate(
                function, data.test_batches(found[path], dataset, torch.device("cpu"))
            ).accuracy
    for worker in workers.values():
        worker.close()
    counts = sorted({1, args.threads})
    measured = [row for row in rows if row.seconds]
    print("\n" + tables.runtimes_table(measured, counts))
    if args.csv:
        checkpoints.write(args.csv, tables.runtimes_csv(measured, counts))


def training_images(checkpoint: dict, dataset: data.Dataset) -> np.ndarray:
    """The first training images, normalized as the network expects them; in folders they are sorted by class, so they
    are taken at equal distances."""
    train = dataset.training_images()
    chosen = torch.linspace(0, len(train.labels) - 1, CALIBRATION).long().unique()
    part = data.Split(train.images[chosen], train.labels[chosen])
    mean, std = (checkpoint["mean"], checkpoint["std"]) if "mean" in checkpoint else dataset.mean_and_std()
    batches = data.TestBatches(part, mean, std, torch.device("cpu"))
    return torch.cat([images for images, _ in batches]).contiguous().numpy()


def make_rows(name: str, source: Source, size: int, workers: dict[str, "Worker"], baselines: bool) -> list[Runtime]:
    """What is to be measured on one network."""
    network = load(*source)
    try:
        program = lower(network, size)
    except ValueError as error:
        raise utils.Failure(f"{name}: {error}") from None
    small, sparsity, reference = without_dead_channels(program), 100 * pruning.sparsity(network), in_pytorch(network)
    return [
        Runtime(
            name, kind, sparsity, part.nonzeros(), part.macs(), lambda _: None, reference, ACCURACY in RUNTIMES[kind]
        )
        for kind in workers
        if baselines or kind == ENGINE
        for part in [small if kind == ENGINE else program]
    ]


@functools.cache
def load(path: Path, pruned: float) -> nn.Module:
    """The network of a checkpoint, with so large a fraction of its weights zero."""
    network = checkpoints.build_network(checkpoints.load_checkpoint(path)).eval()
    if pruned:
        weights = sum(weight.numel() for weight in pruning.prunable(network).values())
        pruning.apply(network, pruning.compute_masks(network, round(pruned * weights)))
    return network


# --- Measuring -----------------------------------------------------------------------------------------------------

Calls = list[tuple[Runtime, int, int, int]]  # with the number of the network, threads and batch size


def check(rows: list[tuple[Runtime, int]], workers: dict[str, "Worker"], size: int, threads: int) -> Calls:
    """Compare all runtimes with PyTorch, and return the calls to time. What cannot run here is named in one line."""
    calls: Calls = []
    for row, index in tqdm(rows, "preparing", leave=False, disable=None):
        for count in sorted({1, threads}):
            if FIXED in RUNTIMES[row.name] and count != threads:
                continue
            try:
                for batch in CALLS:
                    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
                    expected = row.reference(images)
                    error = (workers[row.name].function(index, count)(images) - expected).abs().max()
                    row.error = max(row.error, float(error / expected.abs().max().clamp(min=1e-30)))
                calls += [(row, index, count, batch) for batch in CALLS]
            except utils.Failure as failure:
                print(f"inference.py: {row.name} is not measured: {failure}", file=sys.stderr)
                break
    return calls


def measure(calls: Calls, workers: dict[str, "Worker"], size: int, rounds: int) -> None:
    """Fill in `seconds` of every runtime."""
    for turn in tqdm(range(rounds), "measuring speed", unit="round", leave=False, disable=None):
        for row, index, threads, batch in calls[:: -1 if turn % 2 else 1]:
            time.sleep(PAUSE)
            times = workers[row.name].request(("time", index, threads, (batch, 3, size, size), CALLS[batch]))
            row.seconds.setdefault((batch, threads), []).extend(times)


class Worker:
    """One runtime in a process of its own."""

    def __init__(self, kind: str, networks: list[Source], size: int, calibration: np.ndarray):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=serve, args=(end, kind, networks, size, calibration), daemon=True)
        self.process.start()
        atexit.register(self.process.kill)

    def request(self, what: tuple) -> list[float] | np.ndarray:
        """Failure with what went wrong there."""
        self.pipe.send(what)
        try:
            good, answer = self.pipe.recv()
        except EOFError:
            good, answer = False, "its process has ended"
        if not good:
            raise utils.Failure(answer, code=1)
        return answer

    def function(self, index: int, threads: int) -> Function:
        """The network with this number as a function."""
        return lambda images: torch.from_numpy(
            self.request(("logits", index, threads, np.ascontiguousarray(images.numpy())))
        )

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def serve(pipe: Connection, kind: str, networks: list[Source], size: int, calibration: np.ndarray) -> None:
    """Answer requests until one is None."""
    made: dict[tuple[int, int], Function] = {}
    while request := pipe.recv():
        what, index, threads, argument, *rest = request
        try:
            torch.set_num_threads(threads)
            if (index, threads) not in made:
                made[index, threads] = RUNTIMES[kind][0](networks[index], size, threads, calibration)
            function = made[index, threads]
            if what == "logits":
                pipe.send((True, function(torch.from_numpy(argument)).numpy()))
                continue
            images = torch.randn(argument, generator=torch.Generator().manual_seed(0))
            function(images)  # another runtime left its own data in the caches
            times = []
            for _ in range(*rest):
                begin = time.perf_counter()
                function(images)
                times.append(time.perf_counter() - begin)
            pipe.send((True, times))
        except Exception as error:  # of many kinds: a package or a compiler is missing
            lines = str(error).strip().splitlines() or [type(error).__name__]
            pipe.send((False, lines[0][:200]))


# --- Runtimes ------------------------------------------------------------------------------------------------------


def sparse_engine(source: Source, size: int, threads: int, _calibration: np.ndarray) -> Function:
    return Engine(load(*source), size, threads)


def pytorch(source: Source, _size: int, _threads: int, _calibration: np.ndarray) -> Function:
    return in_pytorch(load(*source))


def folded(source: Source, size: int) -> nn.Module:
    return in_channels_last(ProgramModule(lower(load(*source), size)))


def channels_last(source: Source, size: int, _threads: int, _calibration: np.ndarray) -> Function:
    return in_pytorch(folded(source, size))


def compiled(source: Source, size: int, _threads: int, _calibration: np.ndarray) -> Function:
    return in_pytorch(torch.compile(folded(source, size), dynamic=False))


def bf16(source: Source, size: int, _threads: int, _calibration: np.ndarray) -> Function:
    return in_pytorch(folded(source, size).bfloat16())


def compiled_bf16(source: Source, size: int, _threads: int, _calibration: np.ndarray) -> Function:
    return in_pytorch(torch.compile(folded(source, size).bfloat16(), dynamic=False))


def onnxruntime(source: Source, size: int, threads: int, _calibration: np.ndarray) -> Function:
    return onnx_session(onnx_model(source, size), threads)


def onnxruntime_int8(source: Source, size: int, threads: int, calibration: np.ndarray) -> Function:
    return onnx_session(quantized(source, size, calibration), threads)


def openvino(source: Source, size: int, threads: int, _calibration: np.ndarray) -> Function:
    return openvino_model(onnx_model(source, size), threads, "f32")


def openvino_bf16(source: Source, size: int, threads: int, _calibration: np.ndarray) -> Function:
    return openvino_model(onnx_model(source, size), threads, "bf16")


def openvino_int8(source: Source, size: int, threads: int, calibration: np.ndarray) -> Function:
    return openvino_model(quantized(source, size, calibration), threads, "f32")


@functools.cache
def onnx_model(source: Source, size: int) -> bytes:
    network = load(*source)
    return runtimes.export_onnx(network, lower(network, size), {})


def onnx_session(content: bytes, threads: int) -> Function:
    function = runtimes.onnx_session(content, threads)
    if function is None:
        raise utils.Failure("onnxruntime is not installed")
    return function


def openvino_model(content: bytes, threads: int, precision: str) -> Function:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    model = core.compile_model(core.read_model(content), "CPU", settings)
    return lambda images: torch.from_numpy(model([images.numpy()])[0].copy())


QUANTIZED: dict[Source, bytes] = {}


def quantized(source: Source, size: int, calibration: np.ndarray) -> bytes:
    """The ONNX model with int8 weights, one scale a filter, and uint8 activations: what VNNI computes."""
    if source in QUANTIZED:
        return QUANTIZED[source]
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(np.split(calibration, range(64, len(calibration), 64)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    with tempfile.TemporaryDirectory() as directory:
        plain, prepared, result = (Path(directory) / name for name in ("plain.onnx", "prepared.onnx", "int8.onnx"))
        plain.write_bytes(onnx_model(source, size))
        quant_pre_process(plain, prepared)
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(prepared, result, Reader(), per_channel=True, **types)
        QUANTIZED[source] = result.read_bytes()
    return QUANTIZED[source]


ACCURACY = "accuracy"  # is measured; those of the others differ by rounding only
FIXED = "fixed"  # to the largest number of threads
RUNTIMES: dict[str, tuple] = {
    ENGINE: (sparse_engine, ACCURACY),
    "PyTorch fp32": (pytorch, ACCURACY),
    "PyTorch fp32, folded, channels_last": (channels_last,),
    "PyTorch fp32, compiled": (compiled, FIXED),
    "PyTorch bf16": (bf16, ACCURACY),
    "PyTorch bf16, compiled": (compiled_bf16, FIXED),
    "onnxruntime fp32": (onnxruntime,),
    "onnxruntime int8": (onnxruntime_int8, ACCURACY),
    "OpenVINO fp32": (openvino,),
    "OpenVINO bf16": (openvino_bf16, ACCURACY),
    "OpenVINO int8": (openvino_int8, ACCURACY),
}


if __name__ == "__main__":
    utils.run(main)
