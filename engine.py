"""Train for some epochs, evaluate. Knows nothing of pruning."""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from utils import Failure, Interrupted, stop_requested

KEEP_SECONDS = 30  # that, and an epoch, is what a crash may cost of training
TEMPERATURE, DISTILLED = 4.0, 0.9  # of distillation: as in Hinton et al. 2015 and most that followed
DOUBT = 4  # the power at which a teacher's probability of the label counts: results/README.md has what others gave
WARM_UP = 3  # ordinary steps before one is recorded: libraries choose their algorithms in them


@dataclass(frozen=True)
class Score:
    """What `evaluate` measures. `close` counts the images whose two best logits are so near that the
    rounding of another device may swap them."""

    correct: int
    images: int
    loss: float
    close: int

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.correct / self.images


@torch.no_grad()
def evaluate(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float32) -> Score:
    """Top-1 accuracy and mean cross entropy over all images of `batches`, exact at any batch size."""
    network.eval()
    # Largest differences seen between devices, relative to the largest logit, with room to spare.
    near = 1e-3 if dtype == torch.float32 else 5e-2
    correct = close = loss = images = 0
    for inputs, labels in batches:
        with torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32):
            logits = network(inputs).float()
        first, second = logits.topk(2, dim=1).values.unbind(1)
        correct += (logits.argmax(1) == labels).sum()
        close += (first - second <= near * logits.abs().amax(1)).sum()
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
        images += len(labels)
        if stop_requested():
            raise Interrupted("stopped while measuring the accuracy; the same command with -r goes on")
    return Score(int(correct), images, float(loss) / images, int(close))


def cosine(lr: float, done: float) -> float:
    """The learning rate when the share `done` of all steps is over: from `lr` to 0 (Loshchilov, Hutter 2017)."""
    return lr * (1 + math.cos(math.pi * done)) / 2


def constant(lr: float, _done: float) -> float:
    """The learning rate, whatever share of all steps is over."""
    return lr


def linear(lr: float, done: float) -> float:
    """The learning rate when the share `done` of all steps is over: from a tenth of `lr` up to it in the first tenth,
    then straight down to 0."""
    return lr * min(0.1 + 9 * done, (1 - done) / 0.9)


def fit(
    network: nn.Module,
    batches,
    *,
    stage: str,
    epochs: int,
    lr: float,
    schedule: Callable[[float, float], float] = cosine,
    nesterov: bool = False,
    teacher: nn.Module | None = None,
    average: float = 0.0,
    dtype: torch.dtype = torch.float32,
    after_step: Callable[[], None] = lambda: None,
    after_epoch: Callable[[int], object] = id,
    state: dict | None = None,
    keep: Callable[[dict], object] = id,
) -> list[dict]:
    """Train `network` in place: SGD with momentum 0.9 and weight decay 5e-4, the learning rate by `schedule` from `lr`
    and the share of the steps that is over. It minimises cross entropy, or with a `teacher` what `distillation` says,
    and reports cross entropy. It ends with the weights of the last step, or with `average` with those of `Average` over
    that share of the steps, and BatchNorm's statistics of one more pass over the training images.

    `batches` has a length and `epoch(stage, epoch, first)`, as data.TrainBatches. `after_step` is called after each
    step of the optimizer; see `Step` for what it may do. `after_epoch` is called with the number of each epoch, from 1,
    when it ends. `keep` is given the state at the end, before that after an epoch that ends `KEEP_SECONDS` or more
    after the last one, and on a signal after the step in hand; with such a `state`, training goes on from there to the
    same bits.

    Returns one entry an epoch: stage, epoch (from 1), lr at its end, mean loss and accuracy (percent) over
    the augmented training images. Raises Failure when the loss is not finite, Interrupted on a signal.
    """
    device = next(network.parameters()).device
    rate = torch.tensor(lr, device=device)
    # A new optimizer for every stage: momentum of earlier weights would move pruned ones.
    optimizer = torch.optim.SGD(
        network.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, fused=True, nesterov=nesterov
    )
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # of loss and correct, and the number of images
    steps = epochs * len(batches)
    averaged = Average(network, average * steps) if average else None
    start, first, history = 0, 0, []
    if state is not None:
        parts = {"epoch", "step", "history", "net", "optimizer", "sums"} | ({"average"} if averaged else set())
        if not parts <= state.keys():
            raise Failure(f"the state of {stage} is damaged: --force starts again")
        start, first, history = state["epoch"], state["step"], list(state["history"])
        network.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0]["lr"] = rate
        sums.copy_(state["sums"])
        if averaged:
            torch._foreach_copy_(averaged.values, state["average"])
    train_step = Step(network, optimizer, sums, dtype, after_step, teacher)

    def keep_state(epoch: int, step: int) -> None:
        if not all(value.isfinite().all() for value in network.state_dict().values()):
            # A state without a future must not replace a good one.
            raise not_finite(stage, epoch + bool(step))
        tensors = {"net": network.state_dict(), "optimizer": optimizer.state_dict(), "sums": sums}
        tensors |= {"average": averaged.values} if averaged else {}
        keep({"epoch": epoch, "step": step, "history": history, **tensors})

    network.train()
    done = start * len(batches) + first
    kept = time.monotonic()
    with tqdm(total=steps, initial=done, desc=stage, unit="batch", disable=None, leave=False, mininterval=1) as bar:
        for epoch in range(start, epochs):
            for step, (inputs, labels) in enumerate(batches.epoch(stage, epoch, first), first + 1):
                train_step(inputs, labels, schedule(lr, done / steps))
                done += 1
                if averaged:
                    averaged.add(done)
                # Drawn once a second: inside an epoch only this waits for the device.
                if bar.update():
                    now = f"{schedule(lr, done / steps):.4f}"
                    bar.set_postfix(epoch=f"{epoch + 1}/{epochs}", lr=now, **means(sums), refresh=False)
                if stop_requested():
                    keep_state(epoch, step)
                    raise Interrupted(
                        f"stopped in {stage}, epoch {epoch + 1} of {epochs}; the same command with -r goes on"
                    )
            found = means(sums)
            if not math.isfinite(found["loss"]):
                raise not_finite(stage, epoch + 1)
            history.append({"stage": stage, "epoch": epoch + 1, "lr": schedule(lr, done / steps), **found})
            sums.zero_()
            first = 0
            after_epoch(epoch + 1)
            # On a GPU a state takes longer to write than a tenth of an epoch to train.
            if epoch + 1 == epochs or time.monotonic() - kept >= KEEP_SECONDS:
                keep_state(epoch + 1, 0)
                kept = time.monotonic()
    if averaged:
        averaged.put_into_network()
        measure_batchnorm(network, batches.epoch(stage, epochs), len(batches), stage, dtype)
    return history


class Average:
    """An exponential moving average of a network's weights over about `steps` steps (Polyak and Juditsky 1992): less
    noisy than those of the last step. What is 0 in all of them is 0 in it."""

    def __init__(self, network: nn.Module, steps: float):
        self.weights = list(network.parameters())
        self.values = [weight.detach().clone() for weight in self.weights]
        self.steps = max(1.0, steps)

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the weights after the step of that number, from 1. It is their mean until there are enough."""
        torch._foreach_lerp_(self.values, self.weights, 1 / min(step, self.steps))

    @torch.no_grad()
    def put_into_network(self) -> None:
        torch._foreach_copy_(self.weights, self.values)


def measure_batchnorm(network: nn.Module, batches: Iterable, length: int, stage: str, dtype: torch.dtype) -> None:
    """Replace the running mean and variance of each BatchNorm by those over `length` batches: those that are there are
    of other weights."""

    def full_ones() -> Iterator[Tensor]:
        full = 0
        for inputs, _ in tqdm(batches, f"{stage}, BatchNorm", length, unit="batch", disable=None, leave=False):
            if len(inputs) < full:  # the last one may have few images, and would count as much as the others
                return
            full = len(inputs)
            yield inputs
            if stop_requested():
                raise Interrupted(f"stopped at the end of {stage}; the same command with -r goes on")

    device = next(network.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        update_bn(full_ones(), network)


def distillation(logits: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
    """A loss that also asks for the teacher's logits `wanted`, (B, classes) like `logits` (Hinton et al. 2015): the
    Kullback-Leibler divergence of both at a temperature of 4, times its square, which keeps the size of the gradients,
    in the place of a share of each image's cross entropy.

    The share is 0.9 for a teacher that is sure of the label, and falls with the fourth power of the probability that
    it gives it. So a teacher that has learnt its images is listened to, and one that has not holds nobody back.
    """
    soft = F.kl_div(
        F.log_softmax(logits / TEMPERATURE, 1),
        F.log_softmax(wanted / TEMPERATURE, 1),
        reduction="none",
        log_target=True,
    )
    share = DISTILLED * wanted.softmax(1).gather(1, labels[:, None]).squeeze(1) ** DOUBT
    hard = F.cross_entropy(logits, labels, reduction="none")
    return (share * TEMPERATURE**2 * soft.sum(1) + (1 - share) * hard).mean()


class Step:
    """One step of the optimizer on one batch. It changes the network and `sums`, (3,) float64 on the device, to
    which it adds the sum of the losses, the number of correct answers and the number of images.

    A GPU needs longer to be told of the 300 kernels of a small batch than to run them. There a step is recorded as a
    CUDA graph, after `WARM_UP` ordinary ones, for the shape of batch that came as often first; from then on such
    batches are copied to where the graph reads them, and it is played. Batches of other shapes stay ordinary steps.
    So `after_step` must do all its work on the device, on the same tensors each time, and not wait for it.
    """

    # Until a recording fails once: after that, PyTorch before 2.12 does not clean up its memory.
    can_record = True

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        sums: Tensor,
        dtype: torch.dtype = torch.float32,
        after_step: Callable[[], None] = lambda: None,
        teacher: nn.Module | None = None,
    ):
        """`optimizer` has one group of parameters, and its learning rate is a tensor on the network's device."""
        self.network, self.optimizer, self.sums = network, optimizer, sums
        self.dtype, self.after_step, self.teacher = dtype, after_step, teacher
        self.rate = optimizer.param_groups[0]["lr"]
        # A step that is to be recorded must have run on another stream than the default one.
        self.stream = side_stream(sums.device) if sums.is_cuda else None
        self.recording = sums.is_cuda and Step.can_record
        self.ordinary = Counter()  # steps by shape of batch
        self.play, self.inputs, self.labels = None, None, None

    def __call__(self, inputs: Tensor, labels: Tensor, lr: float) -> None:
        self.rate.fill_(lr)
        if self.recording and self.play is None and self.ordinary[inputs.shape] >= WARM_UP:
            self.record(inputs, labels)
        if self.play is not None and inputs.shape == self.inputs.shape:
            self.inputs.copy_(inputs)
            self.labels.copy_(labels)
            self.play()
            return
        self.ordinary[inputs.shape] += 1
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
                wanted = self.teacher(inputs).float() if self.teacher else None
        loss = F.cross_entropy(logits, labels)
        (loss if wanted is None else distillation(logits, wanted, labels)).backward()
        self.optimizer.step()
        correct = (logits.argmax(1) == labels).sum()
        images = torch.full_like(correct, len(labels))
        self.sums += torch.stack([loss.detach() * images, correct, images]).double()
        self.after_step()

    def record(self, inputs: Tensor, labels: Tensor) -> None:
        """Make `play`; on a failure say so and go on with ordinary steps."""
        self.inputs, self.labels = torch.empty_like(inputs), torch.empty_like(labels)
        self.optimizer.zero_grad()  # gradients are to lie in the memory of the graph
        try:
            self.play = record(lambda: self.run(self.inputs, self.labels))
        except RuntimeError as error:
            self.recording = Step.can_record = False
            reason = " ".join(str(error.__context__ or error).split())[:200]  # the end of a failed recording fails, too
            tqdm.write(f"training goes on without a CUDA graph, and is slower: {reason}", file=sys.stderr)


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for every training: what the allocator keeps for one stream no other gets."""
    return torch.cuda.Stream(device)


def record(work: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of `work`, as a function that runs it. `work` is called once, and only noted, not done."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            work()
    finally:
        torch.cuda.set_stream(stream)  # on a failure, older versions of PyTorch leave their own one behind
    return graph.replay


def means(sums: Tensor) -> dict[str, float]:
    """Mean loss and accuracy (percent) of what `train_step` returned, summed."""
    loss, correct, images = sums.tolist()
    return {"loss": loss / images, "accuracy": 100 * correct / images}


def not_finite(stage: str, epoch: int) -> Failure:
    return Failure(f"the loss is not finite in {stage}, epoch {epoch}: a smaller --lr may help", code=1)
