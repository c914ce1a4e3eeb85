"""The ways to compute a network on a CPU, with and without its zeros, and how fast and exact each is."""

import copy
import importlib.util
import io
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import compact
import data
import engine
import pruning
import sparse
import utils

Function = Callable[[Tensor], Tensor]  # (N, 3, H, W) float32 images -> (N, classes) float32 logits

BATCH = 64
CALLS = {1: 10, BATCH: 1}  # of a form in a round, by batch size


@dataclass
class Form:
    """One way to compute one network."""

    checkpoint: str
    form: str
    sparsity: float  # percent of the prunable weights of the checkpoint
    nonzeros: int
    multiply_adds: int  # with nonzero weights, for one image
    make: Callable[[int], Function]  # for a number of threads
    reference: Function
    measured: bool  # whether accuracy is measured; other forms differ from a measured one by rounding only
    seconds: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # of a call, by batch size and threads
    error: float = 0.0  # largest difference of a logit from the checkpoint in PyTorch fp32, over the largest logit
    accuracy: float | None = None  # percent
    dense_layers: int | None = None  # of a sparse engine, that compute a batch with all their weights

    def spread(self, batch: int, threads: int) -> tuple[float, float, float] | None:
        """Seconds of a call: first decile, median, last decile; None where it was not measured."""
        times = sorted(self.seconds.get((batch, threads), []))
        tenth = len(times) // 10
        return (times[tenth], statistics.median(times), times[-1 - tenth]) if times else None


def make_forms(path: Path, network: nn.Module, size: int, threads: int, baselines: bool) -> list[Form]:
    """The ways to compute a network; with `baselines` also those whose speed does not depend on zeros."""
    small, folded = compact.remove_dead_channels(network), compact.fold(network)
    channels_last = copy.deepcopy(folded).to(memory_format=torch.channels_last)
    sparsity, forms = 100 * pruning.sparsity(network), []

    def add(form: str, network: nn.Module, make: Callable[[int], Function], measured: bool = False) -> None:
        nonzeros = sum(int(value.count_nonzero()) for value in network.parameters())
        adds = sum(nonzero for _, nonzero in pruning.multiply_adds(network, size).values())
        forms.append(Form(str(path), form, sparsity, nonzeros, adds, make, reference, measured))

    reference = in_pytorch(network)
    add("PyTorch fp32", network, lambda _: reference, measured=True)
    if baselines:
        add("PyTorch fp32, folded, channels_last", network, lambda _: in_pytorch(channels_last))
        compiled = compile_or_say_why(channels_last, size)
        if compiled:
            add("PyTorch fp32, compiled", network, lambda n: compiled if n == threads else None)
        if utils.choose_dtype("auto", torch.device("cpu")) == torch.bfloat16:
            rounded = copy.deepcopy(channels_last).bfloat16()
            add("PyTorch bf16", network, lambda _: in_pytorch(rounded), measured=True)
        if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime"):
            content = export_onnx(network, size)
            add("onnxruntime fp32", network, lambda n: onnx_session(content, n))
    if sum(value.numel() for value in small.parameters()) < sum(value.numel() for value in network.parameters()):
        add("dead channels removed, PyTorch fp32", small, lambda _: in_pytorch(small))
    add("sparse engine", small, lambda n: sparse.Engine(small, size, n), measured=True)
    return forms


def in_pytorch(network: nn.Module) -> Function:
    """The network as a function; its images are rounded to the type of its weights."""
    dtype = network.linear.weight.dtype

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        return network(images.to(dtype)).float()

    return run


def compile_or_say_why(network: nn.Module, size: int) -> Function | None:
    """The network compiled by PyTorch, which needs a C++ compiler; without one, None and a line that says so."""
    try:
        compiled = torch.compile(network, dynamic=False)

        @torch.inference_mode()
        def run(images: Tensor) -> Tensor:
            return compiled(images)

        for batch in CALLS:
            run(torch.zeros(batch, 3, size, size))
        return run
    except Exception as error:  # many kinds, of which a compiler that is not there is the most usual
        reason = str(error).strip().splitlines()[0][:100]
        print(f"deploy.py: torch.compile is not measured, it does not work here: {reason}", file=sys.stderr)
        return None


def export_onnx(network: nn.Module, size: int) -> bytes:
    """An ONNX model (images: N x 3 x size x size float -> logits), BatchNorm and dead channels gone, checked against
    onnxruntime where that is installed; Failure when its logits differ."""
    small = compact.fold(compact.remove_dead_channels(network))
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
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
            dynamo=False,  # the other exporter asks for one more package
        )
    content = buffer.getvalue()
    run = onnx_session(content, torch.get_num_threads())
    expected = in_pytorch(network)(images)
    if run and not (run(images) - expected).abs().max() <= 1e-3 * expected.abs().max():
        raise utils.Failure("the ONNX model computes other logits than PyTorch", code=1)
    return content


def onnx_session(content: bytes, threads: int) -> Callable[[Tensor], Tensor] | None:
    """A function that computes logits with onnxruntime; None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def time_forms(forms: list[Form], size: int, teams: list[int], rounds: int) -> None:
    """Call every form in turn, in every round in the other direction, so that whatever else the machine does hits
    all alike; fill in `seconds` and `error`."""
    generator = torch.Generator().manual_seed(0)
    batches = {batch: torch.randn(batch, 3, size, size, generator=generator) for batch in CALLS}
    work, every = [], torch.get_num_threads()
    for form in forms:
        expected = {batch: form.reference(images) for batch, images in batches.items()}
        for threads in teams:
            torch.set_num_threads(threads)
            function = form.make(threads)
            for batch, images in batches.items():
                if function:
                    largest = expected[batch].abs().max().clamp(min=1e-30)
                    error = float((function(images) - expected[batch]).abs().max() / largest)
                    if not error < 0.1:
                        raise utils.Failure(f"{form.form} of {form.checkpoint}: logits are off by {error:.0%}", code=1)
                    form.error = max(form.error, error)
                    if isinstance(function, sparse.Engine):
                        form.dense_layers = len(function.dense)
                    work.append((form, threads, batch, function))
    for turn in tqdm(range(rounds), "measuring speed", unit="round", leave=False, disable=None):
        for form, threads, batch, function in work[:: -1 if turn % 2 else 1]:
            torch.set_num_threads(threads)
            function(batches[batch])  # the form before left its own data in the caches
            for _ in range(CALLS[batch]):
                begin = time.perf_counter()
                function(batches[batch])
                form.seconds.setdefault((batch, threads), []).append(time.perf_counter() - begin)
    torch.set_num_threads(every)


def measure_accuracy(forms: list[Form], batches: data.TestBatches, threads: int) -> None:
    """The accuracy of each form that is worth the time, over the whole test set."""
    for form in tqdm([f for f in forms if f.measured], "measuring accuracy", unit="form", leave=False, disable=None):
        form.accuracy = engine.evaluate(Callee(form.make(threads)), batches).accuracy


class Callee(nn.Module):
    """A function as a network, for `engine.evaluate`."""

    def __init__(self, function: Function):
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)
