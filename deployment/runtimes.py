"""Ways to compute a network on a CPU, with and without its zeros, and the speed and error of each."""

import copy
import importlib.util
import io
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import engine
import pruning
import utils
from deployment.engine import Engine
from deployment.graph import lower
from deployment.program import Program, ProgramModule
from deployment.simplification import without_dead_channels

Function = Callable[[Tensor], Tensor]  # (N, 3, H, W) float32 images -> (N, classes) float32 logits
Call = tuple["Runtime", int, int, Function]  # with a number of threads and a batch size

ENGINE = "sparse engine"  # the name of ours
BATCH = 64
CALLS = {1: 10, BATCH: 1}  # timed calls of a runtime in one round, by batch size


@dataclass
class Runtime:
    """One way to compute one network, and its measurements."""

    checkpoint: str
    name: str
    sparsity: float  # percent of the prunable weights of the checkpoint
    nonzeros: int  # parameters that are not zero
    macs: int  # with nonzero weights, for one image
    make: Callable[[int], Function | None]  # for a number of threads; None if it cannot be measured with so many
    reference: Function  # the checkpoint in PyTorch fp32
    measure_accuracy: bool  # the others differ from a measured one by rounding only
    made: dict[int, Function] = field(default_factory=dict)  # what `make` returned, by number of threads
    seconds: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # per call, by batch size and threads
    error: float = 0.0  # largest difference of a logit from the reference, over the largest logit
    accuracy: float | None = None  # percent
    dense_layers: int | None = None  # layers that a sparse engine computes with all weights at batch size BATCH

    def spread(self, batch: int, threads: int) -> tuple[float, float, float] | None:
        """Seconds per call: first decile, median, last decile. None if it was not measured."""
        times = sorted(self.seconds.get((batch, threads), []))
        tenth = len(times) // 10
        return (times[tenth], statistics.median(times), times[-1 - tenth]) if times else None


def read(path: Path, network: nn.Module, size: int) -> Program | None:
    """The program of a network for images of `size` x `size` pixels; None, and one line on standard error, if it
    cannot be expressed."""
    try:
        return lower(network, size)
    except ValueError as error:
        print(f"deploy.py: {path} runs in PyTorch only: {error}", file=sys.stderr)
        return None


def make_runtimes(
    path: Path, network: nn.Module, program: Program | None, size: int, threads: int, baselines: bool
) -> list[Runtime]:
    """The runtimes of a network for images of `size` x `size` pixels; only PyTorch's without its program.

    With `baselines`, they include those whose speed does not depend on zeros.
    """
    reference = in_pytorch(network)
    sparsity, runtimes = 100 * pruning.sparsity(network), []
    nonzeros = sum(int(value.count_nonzero()) for value in network.parameters())
    macs = program.macs() if program else sum(nonzero for _, nonzero in pruning.count_macs(network, size).values())

    def add(name: str, make: Callable[[int], Function | None], accuracy: bool = False) -> None:
        runtimes.append(Runtime(str(path), name, sparsity, nonzeros, macs, make, reference, accuracy))

    add("PyTorch fp32", lambda _: reference, accuracy=True)
    if baselines:
        folded = ProgramModule(program) if program else network
        compiled = compile_or_warn(in_channels_last(folded), size)
        if program:
            channels_last = in_channels_last(folded)
            add("PyTorch fp32, folded, channels_last", lambda _: in_pytorch(channels_last))
        if compiled:
            add("PyTorch fp32, compiled", lambda count: compiled if count == threads else None)
        if utils.choose_dtype("auto", torch.device("cpu")) == torch.bfloat16:
            rounded = in_channels_last(folded).bfloat16()
            add("PyTorch bf16", lambda _: in_pytorch(rounded), accuracy=True)
        if program and importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime"):
            content = export_onnx(network, program, {})
            add("onnxruntime fp32", lambda count: onnx_session(content, count))
    if program:
        small = without_dead_channels(program)
        nonzeros, macs = small.nonzeros(), small.macs()
        if small.shapes() != program.shapes():
            without_zeros = ProgramModule(small)
            add("dead channels removed, PyTorch fp32", lambda _: in_pytorch(without_zeros))
        add(ENGINE, lambda count: Engine(network, size, count), accuracy=True)
    return runtimes


def in_channels_last(network: nn.Module) -> nn.Module:
    """A copy whose convolutions have their weights in the layout that is fastest on most CPUs."""
    return copy.deepcopy(network).to(memory_format=torch.channels_last)


def in_pytorch(network: nn.Module) -> Function:
    """The network as a function. It casts images to the type of the network's weights."""
    dtype = next(network.parameters()).dtype

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        return network(images.to(dtype)).float()

    return run


def compile_or_warn(network: nn.Module, size: int) -> Function | None:
    """The network compiled by PyTorch; None, and one line on standard error, if that fails."""
    try:
        compiled = torch.compile(network, dynamic=False)

        @torch.inference_mode()
        def run(images: Tensor) -> Tensor:
            return compiled(images)

        for batch in CALLS:
            run(torch.zeros(batch, 3, size, size))
        return run
    except Exception as error:  # many kinds; usually the machine has no C++ compiler
        reason = str(error).strip().splitlines()[0][:100]
        print(f"deploy.py: torch.compile is not measured because it fails here: {reason}", file=sys.stderr)
        return None


def export_onnx(network: nn.Module, program: Program, metadata: dict) -> bytes:
    """The ONNX model of a network and its program, images (N, 3, height, width) float32 -> logits, without its dead
    channels.

    `metadata` goes into the model's metadata_props, each value as JSON. The model is compared with the network if
    onnxruntime is installed; Failure if its logits differ.
    """
    import onnx

    small = ProgramModule(without_dead_channels(program))
    images = torch.randn(2, 3, *program.image_size, generator=torch.Generator().manual_seed(0))
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            small,
            (images,),
            buffer,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "N"}, "logits": {0: "N"}},
            opset_version=17,  # old enough for runtimes on devices
            dynamo=False,  # the other exporter needs one more package
        )
    model = onnx.load_from_string(buffer.getvalue())
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    content = model.SerializeToString()
    run = onnx_session(content, torch.get_num_threads())
    expected = in_pytorch(network)(images)
    if run and not (run(images) - expected).abs().max() <= 1e-3 * expected.abs().max():
        raise utils.Failure("the logits of the ONNX model differ from PyTorch's", code=1)
    return content


def onnx_session(content: bytes, threads: int) -> Function | None:
    """A function that computes logits with onnxruntime; None if it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def time_runtimes(runtimes: list[Runtime], size: int, thread_counts: list[int], rounds: int) -> None:
    """Fill in `seconds` and `error` of every runtime.

    Each round calls the runtimes in turn, in the opposite order of the round before, so that other load on the machine
    affects all of them alike. Failure if the logits of a runtime are wrong.
    """
    generator = torch.Generator().manual_seed(0)
    batches = {batch: torch.randn(batch, 3, size, size, generator=generator) for batch in CALLS}
    threads_before = torch.get_num_threads()
    calls = [call for runtime in runtimes for call in check_runtime(runtime, batches, thread_counts)]
    for turn in tqdm(range(rounds), "measuring speed", unit="round", leave=False, disable=None):
        for runtime, threads, batch, function in calls[:: -1 if turn % 2 else 1]:
            torch.set_num_threads(threads)
            function(batches[batch])  # the runtime before left its own data in the caches
            for _ in range(CALLS[batch]):
                begin = time.perf_counter()
                function(batches[batch])
                runtime.seconds.setdefault((batch, threads), []).append(time.perf_counter() - begin)
    torch.set_num_threads(threads_before)


def check_runtime(runtime: Runtime, batches: dict[int, Tensor], thread_counts: list[int]) -> list[Call]:
    """Compare a runtime with its reference, fill in `error`, and return the calls to time.

    Failure if a logit differs by a tenth of the largest or is NaN.
    """
    calls = []
    expected = {batch: runtime.reference(images) for batch, images in batches.items()}
    for threads in thread_counts:
        torch.set_num_threads(threads)
        function = runtime.make(threads)
        if function is None:
            continue
        runtime.made[threads] = function
        if isinstance(function, Engine):
            runtime.dense_layers = len(function.all_weights(grouped=True))
        for batch, images in batches.items():
            largest = expected[batch].abs().max().clamp(min=1e-30)
            error = float((function(images) - expected[batch]).abs().max() / largest)
            if not error < 0.1:
                raise utils.Failure(f"{runtime.name} of {runtime.checkpoint}: logits are off by {error:.0%}", code=1)
            runtime.error = max(runtime.error, error)
            calls.append((runtime, threads, batch, function))
    return calls


def measure_accuracy(runtimes: list[Runtime], batches: dict[str, Iterable], threads: int) -> None:
    """Fill in `accuracy` where a runtime asks for it, after `time_runtimes`. `batches` holds the test images of each
    checkpoint."""
    chosen = [runtime for runtime in runtimes if runtime.measure_accuracy and threads in runtime.made]
    for runtime in tqdm(chosen, "measuring accuracy", unit="runtime", leave=False, disable=None):
        network = AsModule(runtime.made[threads])
        runtime.accuracy = engine.evaluate(network, batches[runtime.checkpoint]).accuracy


class AsModule(nn.Module):
    """A function as a network, for `engine.evaluate`."""

    def __init__(self, function: Function):
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)
