"""Time the classic training loop and this program's in turn, in one run, on the device at hand.

python tests/benchmark.py --quick           ResNet18, within two minutes on two CPU cores
python tests/benchmark.py                   more rounds and larger growth tables
python tests/benchmark.py --device cuda     on a GPU whole epochs of 50,000 images

The classic loop is what the usual scripts do, at their own best settings: fp32 (on a GPU with PyTorch's default,
TF32 in convolutions), NCHW, a DataLoader with two
workers and memory pinned for a GPU, the transforms of torchvision on PIL images, cudnn.benchmark, the default SGD,
`.item()` in every step; masked, it has the hooks of torch.nn.utils.prune. It runs in a process of its own, in which
nothing of ours is set up; the one of the two that is not timed waits.

The images are random, as many as are needed, unless --dataset names a set. The peak is the fastest of a dozen large
matrix products in the type of the loop, by torch.matmul or as a 1x1 convolution, which may be other libraries. A step
counts two operations for a multiplication with its addition, in the convolutions and the linear layer only, three
times (forward, gradients of weights and of inputs), but twice for the first.
"""

import argparse
import atexit
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision import transforms
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import engine
import models
import pruning
import utils

EPOCH = 50_000  # images
SPARSITY = 0.9


def parse_args() -> argparse.Namespace:
    parser = utils.Parser(description="Time the classic training loop and this program's in turn.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, within two minutes on two CPU cores")
    parser.add_argument("--arch", choices=models.ARCHITECTURES, default="resnet18", help="network")
    parser.add_argument("--batch-size", type=utils.positive_int, default=128, metavar="N", help="images a step")
    parser.add_argument("--rounds", type=utils.positive_int, metavar="N", help="(default: 5, quick: 2)")
    parser.add_argument("--no-growth", action="store_true", help="leave out how cost grows")
    utils.add_data_arguments(parser, None, 32)
    utils.add_device_arguments(parser, "of ours; auto is bf16 where the processor has it")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.device = utils.choose_device(args.device)
    utils.set_up(args.device)
    gpu = args.device.type == "cuda"
    dtype = utils.choose_dtype(args.precision, args.device)
    # Steps that are timed of each loop in a round: half a minute or so on two cores, an epoch of ours on a GPU.
    classic_steps, our_steps = (60, 390) if gpu else (2, 3) if args.quick else (4, 10)
    rounds = args.rounds or (2 if args.quick else 5)
    images = load(args, (max(classic_steps, our_steps) + 6) * args.batch_size)
    print(description(args, dtype))
    loops = {}
    for masked in False, True:
        what = "masked" if masked else "dense"
        loops[f"classic, {what}"] = (Elsewhere(args, images, masked), classic_steps, "tf32" if gpu else "float32")
        loops[f"ours, {what}"] = (OurLoop(args, images, dtype, masked), our_steps, str(dtype).removeprefix("torch."))
    seconds = {name: [] for name in loops}
    for _ in tqdm(range(rounds), "rounds", disable=None, leave=False):
        for name, (loop, steps, _) in loops.items():
            seconds[name].append(loop.time(steps) / steps)
    for loop, _, _ in loops.values():
        if isinstance(loop, Elsewhere):
            loop.close()
    print(speed_table(args, loops, seconds))
    if not args.no_growth:
        print("\nHow the cost of ours grows, dense, " + str(dtype).removeprefix("torch."))
        print(growth_tables(args, dtype))


def description(args: argparse.Namespace, dtype: torch.dtype) -> str:
    if args.device.type == "cuda":
        device = torch.cuda.get_device_name()
    else:
        names = [line.split(":")[1].strip() for line in lines("/proc/cpuinfo") if line.startswith("model name")]
        device = f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
    versions = f"PyTorch {torch.__version__}, torchvision {torchvision.__version__}"
    type_name = str(dtype).removeprefix("torch.")
    return (
        f"{args.arch}, batch {args.batch_size}, {device}, {versions}, Python {platform.python_version()}, {type_name}"
    )


def lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def load(args: argparse.Namespace, images: int) -> data.Dataset:
    """The data set that is asked for, or random images."""
    if args.dataset:
        return data.load(args.dataset, args.data_dir, args.image_size)
    return random_images(images, args.image_size)


def random_images(images: int, size: int) -> data.Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, size, size, 3), dtype=torch.uint8, generator=generator)
    split = data.Split(pixels, torch.randint(10, (images,), generator=generator))
    return data.Dataset("random", "random", [str(label) for label in range(10)], split, split)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def warm_up(device: torch.device) -> int:
    """Steps that are not timed: on a GPU, until algorithms are chosen and a step is recorded."""
    return engine.WARM_UP + 2 if device.type == "cuda" else 1


class Pictures(torch.utils.data.Dataset):
    """A split as torchvision's data sets give it: a PIL image is transformed when it is asked for."""

    def __init__(self, images: data.Dataset):
        self.split = images.train
        mean, std = (tuple(value.tolist()) for value in images.mean_and_std())
        steps = [
            transforms.RandomCrop(images.train.images.shape[1], padding=4),
            *([transforms.RandomHorizontalFlip()] if images.mirror else []),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = transforms.functional.to_pil_image(self.split.images[index].numpy())
        return self.transform(picture), int(self.split.labels[index])


class ClassicLoop:
    """The training loop of the usual script."""

    def __init__(self, args: argparse.Namespace, images: data.Dataset, masked: bool):
        self.device = args.device
        gpu = self.device.type == "cuda"
        torch.manual_seed(0)
        self.network = models.build(args.arch, len(images.classes)).to(self.device)
        if masked:
            layers = [(m, "weight") for m in self.network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
            prune.global_unstructured(layers, prune.L1Unstructured, amount=SPARSITY)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.loader = torch.utils.data.DataLoader(
            Pictures(images), args.batch_size, shuffle=True, drop_last=True, num_workers=2, pin_memory=gpu
        )

    def batches(self) -> Iterator:
        while True:
            yield from self.loader

    def time(self, steps: int) -> float:
        """Seconds of `steps` steps, after a few that are not timed."""
        self.network.train()
        total_loss = correct = total = 0
        batches = self.batches()
        for step in range(steps + warm_up(self.device)):
            if step == warm_up(self.device):
                synchronize(self.device)
                begin = time.perf_counter()
            inputs, targets = next(batches)
            inputs, targets = inputs.to(self.device), targets.to(self.device)
            self.optimizer.zero_grad()
            outputs = self.network(inputs)
            loss = F.cross_entropy(outputs, targets)
            loss.backward()
            self.optimizer.step()
            total_loss += loss.item()
            total += targets.size(0)
            correct += outputs.max(1)[1].eq(targets).sum().item()
        synchronize(self.device)
        return time.perf_counter() - begin


class Elsewhere:
    """A ClassicLoop in a process of its own."""

    def __init__(self, args: argparse.Namespace, images: data.Dataset, masked: bool):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        split = (images.train.images.numpy(), images.train.labels.numpy())
        self.process = context.Process(target=serve, args=(end, args, images.classes, split, images.mirror, masked))
        self.process.start()
        atexit.register(self.process.kill)  # after an error here it would wait for work, and this process for it

    def time(self, steps: int) -> float:
        self.pipe.send(steps)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(0)
        self.process.join()


def serve(pipe: Connection, args: argparse.Namespace, classes: list, split: tuple, mirror: bool, masked: bool) -> None:
    """Time as many steps as the other end asks for, until it asks for none."""
    part = data.Split(*map(torch.from_numpy, split))
    torch.backends.cudnn.benchmark = True
    if args.device.index is not None:
        torch.cuda.set_device(args.device)
    loop = ClassicLoop(args, data.Dataset("", "", classes, part, part, mirror), masked)
    while steps := pipe.recv():
        pipe.send(loop.time(steps))


class OurLoop:
    """The loop of engine.fit without the bookkeeping of epochs."""

    def __init__(self, args: argparse.Namespace, images: data.Dataset, dtype: torch.dtype, masked: bool = False):
        self.device = args.device
        network = build(args.arch, len(images.classes)).to(self.device, memory_format=torch.channels_last)
        after_step = {}
        if masked:
            weights = sum(weight.numel() for weight in pruning.prunable(network).values())
            masks = pruning.choose(network, round(SPARSITY * weights))
            pruning.apply(network, masks)
            after_step = {"after_step": pruning.keeper(network, masks)}
        rate = torch.tensor(0.01, device=self.device)
        optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, fused=True)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.step = engine.Step(network.train(), optimizer, sums, dtype, **after_step)
        self.data = data.TrainBatches(images, args.batch_size, 0, self.device)

    def batches(self) -> Iterator:
        epoch = 0
        while True:
            yield from self.data.epoch("benchmark", epoch)
            epoch += 1

    def time(self, steps: int) -> float:
        """Seconds of `steps` steps, after a few that are not timed."""
        batches = self.batches()
        for step in range(steps + warm_up(self.device)):
            if step == warm_up(self.device):
                synchronize(self.device)
                begin = time.perf_counter()
            self.step(*next(batches), 0.01)
        self.step.sums.tolist()
        return time.perf_counter() - begin


def build(arch: str | tuple, classes: int) -> nn.Module:
    torch.manual_seed(0)
    return models.build(arch, classes) if isinstance(arch, str) else models.ResNet(*arch, classes)


def operations(arch: str | tuple, size: int) -> int:
    """Of the convolutions and the linear layer in a step, for each image."""
    network, counts = build(arch, 10), []

    def note(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        positions = output[0].numel() // output.shape[1]
        passes = 3 if inputs[0].shape[1] != 3 else 2
        counts.append(2 * layer.weight.numel() * positions * passes)

    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(note)
    network(torch.zeros(2, 3, size, size))
    return sum(counts)


def peak(device: torch.device, kind: str) -> float:
    """Operations a second of the fastest of a few large matrix products; tf32: of fp32 that cuDNN may round to it."""
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    torch.backends.cudnn.allow_tf32 = kind == "tf32"
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    picture = torch.randn(16, size, 8, size // 128, device=device).to(dtype)
    picture = picture.contiguous(memory_format=torch.channels_last)
    kernels = b[:, :, None, None].contiguous(memory_format=torch.channels_last)
    best = float("inf")
    for product in (lambda: a @ b, lambda: F.conv2d(picture, kernels)):
        for _ in range(6):
            synchronize(device)
            begin = time.perf_counter()
            product()
            synchronize(device)
            best = min(best, time.perf_counter() - begin)
    torch.backends.cudnn.allow_tf32 = False
    return 2 * size**3 / best


def speed_table(args: argparse.Namespace, loops: dict, seconds: dict[str, list[float]]) -> str:
    work = operations(args.arch, args.image_size) * args.batch_size
    peaks = {kind: peak(args.device, kind) for _, _, kind in loops.values()}
    rows, middle = [], {name: statistics.median(times) for name, times in seconds.items()}
    for name, (_, steps, kind) in loops.items():
        times, typical = seconds[name], middle[name]
        ratio = middle[name.replace("ours", "classic")] / typical
        rows.append(
            [
                name,
                f"{1000 * typical:.1f} ({1000 * min(times):.1f} to {1000 * max(times):.1f})",
                f"{len(times)} x {steps}",
                f"{args.batch_size / typical:.0f}",
                f"{EPOCH / args.batch_size * typical:.2f}",
                f"{ratio:.2f}",
                f"{100 * work / typical / peaks[kind]:.0f} %",
            ]
        )
    heads = ["loop", "ms a step (range)", "steps", "images/s", "s an epoch", "ratio", "of peak"]
    table = tabulate(rows, heads, tablefmt="github", disable_numparse=True)
    cost = [100 * (middle[f"{loop}, masked"] / middle[f"{loop}, dense"] - 1) for loop in ("classic", "ours")]
    known = ", ".join(f"{value / 1e9:.0f} GFLOP/s {key}" for key, value in peaks.items())
    return (
        f"{table}\n\nan epoch: {EPOCH} images; ratio: classic over ours; masks cost {cost[0]:+.1f} % (classic) and "
        f"{cost[1]:+.1f} % (ours) a step; peak: {known}; {work / args.batch_size / 1e9:.2f} GFLOP an image"
    )


def growth_tables(args: argparse.Namespace, dtype: torch.dtype) -> str:
    """Epoch time against batch size, width of the network and number of images, each with the rest as it is."""
    gpu = args.device.type == "cuda"
    steps = 100 if gpu else 2 if args.quick else 5
    images = load(args, (steps + 6) * 2 * args.batch_size)

    def epoch(batch_size: int, arch: str | tuple = args.arch) -> float:
        changed = argparse.Namespace(**vars(args) | {"batch_size": batch_size, "arch": arch})
        return OurLoop(changed, images, dtype).time(steps) / steps * EPOCH / batch_size

    sizes = [args.batch_size // 4, args.batch_size // 2, args.batch_size, args.batch_size * 2][: 3 if args.quick else 4]
    block, depths, widths = models.ARCHITECTURES[args.arch]
    factors = (0.25, 0.5, 1, 2) if gpu or not args.quick else (0.25, 0.5, 1)
    counts = [12_500, 25_000, 50_000] if gpu else [128, 256] if args.quick else [1000, 2000, 4000]
    tables = [
        ("batch size", sizes, [epoch(size) for size in tqdm(sizes, "batch size", disable=None, leave=False)]),
        (
            "width",
            [f"{factor:g} x" for factor in factors],
            [epoch(args.batch_size, (block, depths, tuple(int(w * factor) for w in widths))) for factor in factors],
        ),
        ("images", counts, [whole_epoch(args, dtype, count) for count in counts]),
    ]
    return "\n\n".join(
        tabulate([["s an epoch", *(f"{value:.2f}" for value in values)]], [name, *map(str, heads)], tablefmt="github")
        for name, heads, values in tables
    )


def whole_epoch(args: argparse.Namespace, dtype: torch.dtype, images: int) -> float:
    """Seconds of an epoch of engine.fit with so many images, its bookkeeping and short last batch included."""
    network = build(args.arch, 10).to(args.device, memory_format=torch.channels_last)
    batches = data.TrainBatches(random_images(images, args.image_size), args.batch_size, 0, args.device)
    ends = []
    entry, engine.KEEP_SECONDS = engine.KEEP_SECONDS, 0  # to be told when an epoch ends
    engine.fit(
        network,
        batches,
        stage="benchmark",
        epochs=2,
        lr=0.01,
        dtype=dtype,
        keep=lambda _state: ends.append(time.perf_counter()),
    )
    engine.KEEP_SECONDS = entry
    return ends[1] - ends[0]


if __name__ == "__main__":
    utils.run(main)
