"""Train for some epochs, evaluate. Knows nothing of pruning."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils import Failure, Interrupted, stop_requested


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


def fit(
    network: nn.Module,
    batches,
    *,
    stage: str,
    epochs: int,
    lr: float,
    dtype: torch.dtype = torch.float32,
    after_step: Callable[[], None] = lambda: None,
    state: dict | None = None,
    keep: Callable[[dict], object] = id,
) -> list[dict]:
    """Train `network` in place: cross entropy, SGD with momentum 0.9 and weight decay 5e-4, `lr` down a cosine.

    `batches` has a length and `epoch(stage, epoch, first)`, as data.TrainBatches. `after_step` is called after
    each step of the optimizer. `keep` is given the state after each epoch, and on a signal after the step in
    hand; with such a `state`, training goes on from there to the same bits.

    Returns one entry an epoch: stage, epoch (from 1), lr at its end, mean loss and accuracy (percent) over
    the augmented training images. Raises Failure when the loss is not finite, Interrupted on a signal.
    """
    # A new optimizer for every stage: momentum of earlier weights would move pruned ones.
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, fused=True)
    device = next(network.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # of loss and correct, and the number of images
    start, first, history = 0, 0, []
    if state:
        start, first, history = state["epoch"], state["step"], list(state["history"])
        network.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        sums.copy_(state["sums"])

    def snapshot(epoch: int, step: int) -> dict:
        tensors = {"net": network.state_dict(), "optimizer": optimizer.state_dict(), "sums": sums}
        return {"epoch": epoch, "step": step, "history": history, **tensors}

    network.train()
    done, steps = start * len(batches) + first, epochs * len(batches)
    with tqdm(total=steps, initial=done, desc=stage, unit="batch", disable=None, leave=False, mininterval=1) as bar:
        for epoch in range(start, epochs):
            for step, (inputs, labels) in enumerate(batches.epoch(stage, epoch, first), first + 1):
                optimizer.param_groups[0]["lr"] = cosine(lr, done / steps)
                sums += train_step(network, optimizer, inputs, labels, dtype)
                after_step()
                done += 1
                # Drawn once a second: inside an epoch only this waits for the device.
                if bar.update():
                    rate = f"{cosine(lr, done / steps):.4f}"
                    bar.set_postfix(epoch=f"{epoch + 1}/{epochs}", lr=rate, **means(sums), refresh=False)
                if stop_requested():
                    check(network, sums, stage, epoch)
                    keep(snapshot(epoch, step))
                    raise Interrupted(
                        f"stopped in {stage}, epoch {epoch + 1} of {epochs}; the same command with -r goes on"
                    )
            check(network, sums, stage, epoch)
            history.append({"stage": stage, "epoch": epoch + 1, "lr": cosine(lr, done / steps), **means(sums)})
            sums.zero_()
            first = 0
            keep(snapshot(epoch + 1, 0))
    return history


def train_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor, dtype: torch.dtype
) -> Tensor:
    """One step of the optimizer on one batch. Returns (3,) float64 on the device: the sum of the losses, the
    number of correct answers and the number of images."""
    optimizer.zero_grad()
    with torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32):
        logits = network(inputs).float()
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    correct = (logits.argmax(1) == labels).sum()
    images = torch.full_like(correct, len(labels))
    return torch.stack([loss.detach() * images, correct, images]).double()


def means(sums: Tensor) -> dict[str, float]:
    """Mean loss and accuracy (percent) of what `train_step` returned, summed."""
    loss, correct, images = sums.tolist()
    return {"loss": loss / images, "accuracy": 100 * correct / images}


def check(network: nn.Module, sums: Tensor, stage: str, epoch: int) -> None:
    """Failure when the loss or a weight is not finite, before a state without a future replaces a good one."""
    if not all(value.isfinite().all() for value in (sums, *network.state_dict().values())):
        raise Failure(f"the loss is not finite in {stage}, epoch {epoch + 1}: a smaller --lr may help", code=1)
