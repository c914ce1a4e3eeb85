"""Train for some epochs, evaluate. It knows nothing of pruning."""

import itertools
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from utils import Failure, Interrupted, derive_seed, stop_requested

SAVE_SECONDS = 30  # between saved states: a crash loses at most this plus one epoch
TEMPERATURE, TEACHER_SHARE = 4.0, 0.9  # of distillation, as in Hinton et al. 2015 and most that followed
CONFIDENCE_POWER = 4  # of the teacher's probability of the label; docs/recipes.md compares others
WARM_UP = 3  # eager steps before one is captured: libraries choose their algorithms in them


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with momentum 0.9 and weight decay 5e-4 on cross entropy, and what varies.

    lr        the highest learning rate
    schedule  cosine: from `lr` to 0 (Loshchilov and Hutter 2017); constant; linear: up to `lr` in the first tenth of
              the steps, then straight down to 0
    nesterov  Nesterov momentum in place of the ordinary one
    ema       end on an exponential moving average of the weights over this fraction of the steps (Polyak and Juditsky
              1992), with BatchNorm statistics recomputed for it (Izmailov et al. 2018); 0 ends on the last weights
    teacher   a network in evaluation mode whose logits the trained one also learns, see `distillation`
    """

    lr: float
    schedule: str = "cosine"
    nesterov: bool = False
    ema: float = 0.0
    teacher: nn.Module | None = None

    def settings(self) -> dict[str, float | str | bool]:
        """Every field but the teacher, which is identified by its weights."""
        return {"peak_lr": self.lr, "schedule": self.schedule, "nesterov": self.nesterov, "ema": self.ema}

    def lr_at(self, done: float) -> float:
        """The learning rate when the fraction `done` of all steps is over."""
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "linear":  # it starts at a tenth, not at 0, which would waste the first step
            return self.lr * min(0.1 + 9 * done, (1 - done) / 0.9)
        return self.lr * (1 + math.cos(math.pi * done)) / 2


def to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network, in the memory layout in which convolutions are fastest."""
    return network.to(device).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Score:
    """What `evaluate` measures: correct answers, images, mean cross entropy.

    `close` counts the images whose two largest logits are so near that another device's rounding may swap them.
    """

    correct: int
    images: int
    loss: float
    close: int

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.correct / self.images


def margin(correct: int, images: int) -> float:
    """Half the 95 % interval of an accuracy, a fraction (Wilson 1927): test-set sampling error, not seed variation."""
    z, share = 1.96, correct / images
    return z * math.sqrt(share * (1 - share) / images + (z / images / 2) ** 2) / (1 + z**2 / images)


def doubt(claimed: float | None, score: Score) -> str:
    """A note where the accuracy that a file of another program claims, in percent, is outside the margin of the images.

    Other test images or constants of normalization explain that, or another network with the same tensors.
    """
    points = 100 * margin(score.correct, score.images)
    if claimed is None or abs(claimed - score.accuracy) <= points:
        return ""
    return (
        f"its file says {claimed:.2f} %, and {score.accuracy:.2f} % were measured, more than the margin of "
        f"{points:.2f} points away: its images were normalized by other constants (--mean, --std), or it is another "
        "network with the same tensors (docs/networks.md)"
    )


@torch.no_grad()
def evaluate(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float32) -> Score:
    """Top-1 accuracy and mean cross entropy over all images of `batches`, exact for any batch size."""
    network.eval()
    # Above the largest differences seen between devices, relative to the largest logit.
    near = 1e-3 if dtype == torch.float32 else 5e-2
    images = 0
    sums = None
    for inputs, labels in batches:
        with torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32):
            logits = network(inputs).float()
        first, second = logits.topk(2, dim=1).values.unbind(1)
        correct = (logits.argmax(1) == labels).sum()
        close = (first - second <= near * logits.abs().amax(1)).sum()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        found = torch.stack([correct.double(), close.double(), loss.double()])
        sums = found if sums is None else sums + found
        images += len(labels)
        if stop_requested():
            raise Interrupted("stopped while measuring the accuracy; the same command resumes")
    if sums is None:
        raise ValueError("no images to measure")
    total_correct, total_close, total_loss = sums.tolist()  # the only wait for the device
    return Score(int(total_correct), images, total_loss / images, int(total_close))


class Batches(Protocol):
    """Training images, as data.TrainBatches."""

    seed: int

    def __len__(self) -> int: ...

    def epoch(self, stage: str, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


def fit(
    network: nn.Module,
    batches: Batches,
    recipe: Recipe,
    epochs: int,
    stage: str,
    *,
    dtype: torch.dtype = torch.float32,
    after_step: Callable[[], None] = lambda: None,
    after_epoch: Callable[[list[dict]], object] = id,
    state: dict | None = None,
    save_state: Callable[[dict], object] = id,
) -> list[dict]:
    """Train `network` in place for `epochs` epochs by `recipe`. Random choices depend on seed, `stage`, epoch and step.

    `after_step` is called after each step of the optimizer; see `Step` for what it may do. `after_epoch` gets the
    history so far, before the state is saved. `save_state` gets the state at the end, after any epoch that ends
    SAVE_SECONDS or more after the last save, and on a signal after the current step. Given such a `state`, training
    resumes from it to the same bits.

    Returns one entry per epoch: epoch (from 1), lr at its end, mean loss and accuracy (percent) over the augmented
    training images, seconds. Raises Failure when the loss or a weight is not finite, Interrupted on a signal.
    """
    device = next(network.parameters()).device
    lr = torch.tensor(recipe.lr, device=device)
    # A new optimizer for every stage: momentum of earlier weights would move pruned ones.
    optimizer = torch.optim.SGD(
        network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, fused=True, nesterov=recipe.nesterov
    )
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct answers, images
    steps = epochs * len(batches)
    ema = EMA(network, recipe.ema * steps) if recipe.ema else None
    start, first, history = 0, 0, []
    if state is not None:
        start, first, history = state["epoch"], state["step"], [dict(entry) for entry in state["history"]]
        network.load_state_dict(state["net"])
        for weight, momentum in zip(network.parameters(), state["momentum"]):
            optimizer.state[weight]["momentum_buffer"] = torch.empty_like(weight).copy_(momentum)
        sums.copy_(state["sums"])
        if ema:
            torch._foreach_copy_(ema.values, state["ema"])
    train_step = Step(network, optimizer, sums, dtype, after_step, recipe.teacher)
    saved = begin = time.monotonic()
    spent = state["seconds"] if state else 0.0  # in an epoch that was interrupted

    def save(epoch: int, step: int) -> None:
        if not all(value.isfinite().all() for value in network.state_dict().values()):
            # A state without a future must not replace a good one.
            raise not_finite(stage, epoch + bool(step))
        momentum = [optimizer.state[weight]["momentum_buffer"] for weight in network.parameters()]
        tensors = {"net": network.state_dict(), "momentum": momentum, "sums": sums}
        tensors |= {"ema": ema.values} if ema else {}
        seconds = spent + time.monotonic() - begin if step else 0.0
        save_state({"epoch": epoch, "step": step, "history": history, "seconds": seconds, **tensors})

    network.train()
    done = start * len(batches) + first
    with tqdm(total=steps, initial=done, desc=stage, unit="batch", disable=None, leave=False, mininterval=1) as bar:
        for epoch in range(start, epochs):
            for step, (inputs, labels) in enumerate(batches.epoch(stage, epoch, first), first + 1):
                seed_dropout(device, batches.seed, stage, epoch, step)
                train_step(inputs, labels, recipe.lr_at(done / steps))
                done += 1
                if ema:
                    ema.add(done)
                # The bar redraws once a second: inside an epoch only this waits for the device.
                if bar.update():
                    now = f"{recipe.lr_at(done / steps):.4f}"
                    bar.set_postfix(epoch=f"{epoch + 1}/{epochs}", lr=now, **means(sums), refresh=False)
                if stop_requested():
                    save(epoch, step)
                    raise Interrupted(f"stopped in {stage}, epoch {epoch + 1} of {epochs}; the same command resumes")
            found = means(sums)
            if not math.isfinite(found["loss"]):
                raise not_finite(stage, epoch + 1)
            seconds, begin, spent = spent + time.monotonic() - begin, time.monotonic(), 0.0
            history.append({"epoch": epoch + 1, "lr": recipe.lr_at(done / steps), **found, "seconds": seconds})
            sums.zero_()
            first = 0
            after_epoch(history)
            # On a GPU writing a state takes longer than a tenth of an epoch.
            if epoch + 1 == epochs or time.monotonic() - saved >= SAVE_SECONDS:
                save(epoch + 1, 0)
                saved = time.monotonic()
    if ema:
        ema.copy_to_network()
        seed_dropout(device, batches.seed, stage, epochs, 0)
        recalibrate_batchnorm(network, batches.epoch(stage, epochs), len(batches), stage, dtype)
    return history


def seed_dropout(device: torch.device, *key: object) -> None:
    """Make the next random choices of a network a function of `key`, so that a resumed training repeats them.

    A replayed CUDA graph takes the seed from the same generator. torch.manual_seed would ask for every device there is.
    """
    seed = derive_seed("dropout", *key)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def seconds_per_step(network: nn.Module, batches: Batches, recipe: Recipe, dtype: torch.dtype) -> float:
    """The median over a few steps, after those in which libraries warm up. It changes the network."""
    device = next(network.parameters()).device
    lr = torch.tensor(recipe.lr, device=device)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, fused=True)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    step = Step(network.train(), optimizer, sums, dtype, teacher=recipe.teacher)
    warm_up, times = (WARM_UP + 2 if device.type == "cuda" else 1), []
    for inputs, labels in itertools.islice(batches.epoch("timing", 0), warm_up + 5):
        begin = time.perf_counter()
        step(inputs, labels, 0.0)
        sums.tolist()  # waits for the device
        times.append(time.perf_counter() - begin)
    return statistics.median(times[warm_up:] or times)


class EMA:
    """An exponential moving average of a network's weights over about `steps` steps (Polyak and Juditsky 1992).

    It is less noisy than the weights of the last step. Pruned weights stay zero.
    """

    def __init__(self, network: nn.Module, steps: float):
        self.weights: list[Tensor] = list(network.parameters())
        self.values = [weight.detach().clone() for weight in self.weights]
        self.steps = max(1.0, steps)

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the weights after step number `step`, from 1. Before step `steps` it is their plain mean."""
        torch._foreach_lerp_(self.values, self.weights, 1 / min(step, self.steps))

    @torch.no_grad()
    def copy_to_network(self) -> None:
        torch._foreach_copy_(self.weights, self.values)


def recalibrate_batchnorm(network: nn.Module, batches: Iterable, length: int, stage: str, dtype: torch.dtype) -> None:
    """Recompute the running mean and variance of each BatchNorm over `length` batches of training images."""

    def full_batches() -> Iterator[Tensor]:
        full = 0
        for inputs, _ in tqdm(batches, f"{stage}, BatchNorm", length, unit="batch", disable=None, leave=False):
            if len(inputs) < full:  # a short last batch would count as much as a full one
                return
            full = len(inputs)
            yield inputs
            if stop_requested():
                raise Interrupted(f"stopped at the end of {stage}; the same command resumes")

    device = next(network.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        update_bn(full_batches(), network)


def distillation(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, partly replaced by the divergence from a teacher (Hinton, Vinyals and Dean 2015); a scalar.

    Both logits are (B, classes). The divergence is Kullback-Leibler at a temperature of 4, times its square, which
    keeps the size of the gradients. It replaces 0.9 times the fourth power of the teacher's probability of the label:
    a teacher that has learned its images guides the network, and one that has not hardly counts.
    """
    soft = F.kl_div(
        F.log_softmax(logits / TEMPERATURE, 1),
        F.log_softmax(teacher_logits / TEMPERATURE, 1),
        reduction="none",
        log_target=True,
    )
    confidence = teacher_logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    share = TEACHER_SHARE * confidence**CONFIDENCE_POWER
    hard = F.cross_entropy(logits, labels, reduction="none")
    return (share * TEMPERATURE**2 * soft.sum(1) + (1 - share) * hard).mean()


class Step:
    """One optimizer step on one batch. It changes the network, and adds to `sums`, (3,) float64 on the device: the
    sum of the losses, the number of correct answers and the number of images.

    A GPU takes longer to launch the 300 kernels of a small batch than to run them. There a step is captured as a CUDA
    graph, after `WARM_UP` eager steps, for the first shape of batch that came that often. From then on such batches
    are copied to where the graph reads them, and the graph is replayed. Batches of other shapes stay eager. So
    `after_step` must do all its work on the device, on the same tensors each time, without waiting for it.
    """

    # Until a capture fails once: after a failure PyTorch before 2.12 does not clean up its memory.
    can_capture = True

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        sums: Tensor,
        dtype: torch.dtype = torch.float32,
        after_step: Callable[[], None] = lambda: None,
        teacher: nn.Module | None = None,
    ):
        """`optimizer` has one parameter group, whose learning rate is a tensor on the network's device."""
        self.network, self.optimizer, self.sums = network, optimizer, sums
        self.dtype, self.after_step, self.teacher = dtype, after_step, teacher
        self.lr = optimizer.param_groups[0]["lr"]
        # A step that will be captured must have run on a stream other than the default one.
        self.stream = side_stream(sums.device) if sums.is_cuda else None
        self.capturing = sums.is_cuda and Step.can_capture
        self.eager_steps: Counter = Counter()  # by shape of batch
        self.replay: Callable[[], None] | None = None
        self.inputs, self.labels = torch.empty(0), torch.empty(0)

    def __call__(self, inputs: Tensor, labels: Tensor, lr: float) -> None:
        self.lr.fill_(lr)
        if self.capturing and self.replay is None and self.eager_steps[inputs.shape] >= WARM_UP:
            self.capture(inputs, labels)
        if self.replay is not None and inputs.shape == self.inputs.shape:
            self.inputs.copy_(inputs)
            self.labels.copy_(labels)
            self.replay()
            return
        self.eager_steps[inputs.shape] += 1
        if self.stream is None:
            self.run(inputs, labels)
            return
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.run(inputs, labels)
        current.wait_stream(self.stream)

    def run(self, inputs: Tensor, labels: Tensor) -> None:
        """The step itself. Nothing in it may depend on a value that is on the device."""
        self.optimizer.zero_grad()
        with torch.autocast(inputs.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
            logits = self.network(inputs).float()
            with torch.no_grad():
                teacher_logits = self.teacher(inputs).float() if self.teacher else None
        loss = F.cross_entropy(logits, labels)
        (loss if teacher_logits is None else distillation(logits, teacher_logits, labels)).backward()
        self.optimizer.step()
        correct = (logits.argmax(1) == labels).sum()
        images = torch.full_like(correct, len(labels))
        self.sums += torch.stack([loss.detach() * images, correct, images]).double()
        self.after_step()

    def capture(self, inputs: Tensor, labels: Tensor) -> None:
        """Set `replay`. A failure is reported, and training continues with eager steps."""
        self.inputs, self.labels = torch.empty_like(inputs), torch.empty_like(labels)
        self.optimizer.zero_grad()  # the gradients must lie in the graph's own memory
        try:
            self.replay = capture(lambda: self.run(self.inputs, self.labels))
        except RuntimeError as error:
            self.capturing = Step.can_capture = False
            # Ending a failed capture fails too; the first error is the reason.
            reason = " ".join(str(error.__context__ or error).split())[:200]
            tqdm.write(f"training without a CUDA graph, which is slower: {reason}", file=sys.stderr)


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all training: memory that the allocator keeps for one stream is not used by others."""
    return torch.cuda.Stream(device)


def capture(work: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of `work`, as a function that replays it. `work` is called once, recorded and not executed."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            work()
    finally:
        torch.cuda.set_stream(stream)  # after a failure older versions of PyTorch leave their own stream set
    return graph.replay


def means(sums: Tensor) -> dict[str, float]:
    """Mean loss and accuracy (percent) from the sums of `Step`."""
    loss, correct, images = sums.tolist()
    return {"loss": loss / images, "accuracy": 100 * correct / images}


def not_finite(stage: str, epoch: int) -> Failure:
    return Failure(f"loss or weights are NaN or inf in {stage}, epoch {epoch}: try a smaller --lr", code=1)
