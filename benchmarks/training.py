"""Time a classic CIFAR training loop and this program's loop in turn, in one run, on the device at hand.

    python benchmarks/training.py --quick           ResNet18, within two minutes on two CPU cores
    python benchmarks/training.py                   more rounds, and larger tables of growth
    python benchmarks/training.py --device cuda     on a GPU, whole epochs of 50,000 images

Measured: ResNet18, batches of 128, two cores of an AMD EPYC (Zen 5, AVX-512 with bf16), PyTorch 2.15, one run of five
rounds, median (range): classic 1,965 ms (1,631 to 2,118) per step, ours 652 ms (618 to 673), 3.0 times as fast.

The classic loop is that of the usual scripts at their best settings: fp32 (on a GPU with PyTorch's default, TF32 in
convolutions), NCHW, a DataLoader with two workers and memory pinned for a GPU, torchvision's transforms of PIL images,
cudnn.benchmark, the default SGD, `.item()` in every step. Its masked variant has the hooks of torch.nn.utils.prune. It
runs in a process of its own, which has none of our settings. While one loop is timed, the other one waits.

Images are random, as many as are needed, unless --dataset names a data set. The peak is the fastest of a dozen large
matrix products in the type of the loop, computed by torch.matmul or as a 1x1 convolution, which may use different
libraries. The FLOPs of a step are two for each multiply-add of convolutions and the linear layer, three times (forward,
gradients of weights, gradients of inputs), and only twice for the first layer, which needs no gradient of its inputs.
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
from models import resnet

EPOCH = 50_000  # images
SPARSITY = 0.9
Arch = str | tuple[type, tuple[int, ...], tuple[int, ...]]  # a name, or block, depths and widths


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.Parser(description="Time a classic training loop and this program's loop in turn.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: two minutes on two CPU cores")
    parser.add_argument("--arch", choices=resnet.NETWORKS, default="resnet18", help="network")
    parser.add_argument("--batch-size", type=utils.count, default=128, metavar="N", help="images per step")
    parser.add_argument("--rounds", type=utils.count, metavar="N", help="(default: 5, quick: 2)")
    parser.add_argument("--no-growth", action="store_true", help="do not measure how the cost grows")
    utils.add_data_arguments(parser, None, 32)
    utils.add_device_arguments(parser, "of our loop; auto is bf16 where it is faster, else fp32")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.device = utils.choose_device(args.device)
    utils.set_up(args.device)
    gpu = args.device.type == "cuda"
    dtype = utils.choose_dtype(args.precision, args.device)
    # Timed steps of each loop in a round: about half a minute on two cores, an epoch of our loop on a GPU.
    classic_steps, our_steps = (60, 390) if gpu else (2, 3) if args.quick else (4, 10)
    rounds = args.rounds or (2 if args.quick else 5)
    dataset = load(args, (max(classic_steps, our_steps) + 6) * args.batch_size)
    print(description(args, dtype))
    loops: dict[str, tuple[Subprocess | OurLoop, int, str]] = {}
    for masked in False, True:
        what = "masked" if masked else "dense"
        loops[f"classic, {what}"] = (Subprocess(args, dataset, masked), classic_steps, "tf32" if gpu else "float32")
        loops[f"ours, {what}"] = (OurLoop(args, dataset, dtype, masked), our_steps, name_of(dtype))
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in tqdm(range(rounds), "rounds", disable=None, leave=False):
        for name, (loop, steps, _) in loops.items():
            seconds[name].append(loop.time(steps) / steps)
    for loop, _, _ in loops.values():
        if isinstance(loop, Subprocess):
            loop.close()
    print(speed_table(args, loops, seconds))
    if not args.no_growth:
        print(f"\nHow the cost of our loop grows, dense, {name_of(dtype)}")
        print(growth_tables(args, dtype))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def description(args: argparse.Namespace, dtype: torch.dtype) -> str:
    """One line: network, batch size, hardware and versions."""
    if args.device.type == "cuda":
        device = torch.cuda.get_device_name()
    else:
        names = [line.split(":")[1].strip() for line in lines("/proc/cpuinfo") if line.startswith("model name")]
        device = f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
    versions = f"PyTorch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}"
    return f"{args.arch}, batch {args.batch_size}, {device}, {versions}, {name_of(dtype)}"


def lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


# --- Images --------------------------------------------------------------------------------------------------------


def load(args: argparse.Namespace, images: int) -> data.Dataset:
    """The data set of --dataset, by default random images."""
    if args.dataset:
        return data.load(args.dataset, args.data_dir, args.image_size)
    return random_images(images, args.image_size)


def random_images(images: int, size: int) -> data.Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, size, size, 3), dtype=torch.uint8, generator=generator)
    split = data.Split(pixels, torch.randint(10, (images,), generator=generator))
    return data.Dataset("random", "random", [str(label) for label in range(10)], split, split)


class PILImages(torch.utils.data.Dataset):
    """The training images as torchvision's data sets give them: a PIL image is transformed when it is requested."""

    def __init__(self, dataset: data.Dataset):
        self.split = dataset.training_images()
        mean, std = dataset.mean_and_std()
        steps = [
            transforms.RandomCrop(self.split.images.shape[1], padding=4),
            *([transforms.RandomHorizontalFlip()] if dataset.horizontal_flip else []),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = transforms.functional.to_pil_image(self.split.images[index].numpy())
        return self.transform(image), int(self.split.labels[index])


# --- Loops ---------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def warm_up(device: torch.device) -> int:
    """Steps before the timed ones; on a GPU until algorithms are chosen and a step is captured."""
    return engine.WARM_UP + 2 if device.type == "cuda" else 1


class ClassicLoop:
    """The training loop of the usual scripts."""

    def __init__(self, args: argparse.Namespace, dataset: data.Dataset, masked: bool):
        self.device = args.device
        gpu = self.device.type == "cuda"
        torch.manual_seed(0)
        self.network = models.build(args.arch, len(dataset.classes)).to(self.device)
        if masked:
            layers = [(m, "weight") for m in self.network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
            prune.global_unstructured(layers, prune.L1Unstructured, amount=SPARSITY)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.loader = torch.utils.data.DataLoader(
            PILImages(dataset), args.batch_size, shuffle=True, drop_last=True, num_workers=2, pin_memory=gpu
        )

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self.loader

    def time(self, steps: int) -> float:
        """Seconds of `steps` steps after the warm-up."""
        self.network.train()
        total_loss, correct, total = 0.0, 0, 0
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


class Subprocess:
    """A ClassicLoop in a process of its own."""

    def __init__(self, args: argparse.Namespace, dataset: data.Dataset, masked: bool):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        train = dataset.training_images()
        arrays = train.images.numpy(), train.labels.numpy()
        arguments = (end, args, dataset.classes, arrays, dataset.horizontal_flip, masked)
        self.process = context.Process(target=serve, args=arguments)
        self.process.start()
        atexit.register(self.process.kill)  # after an error here it would wait for requests, and this process for it

    def time(self, steps: int) -> float:
        self.pipe.send(steps)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(0)
        self.process.join()


def serve(
    pipe: Connection, args: argparse.Namespace, classes: list[str], arrays: tuple, horizontal_flip: bool, masked: bool
) -> None:
    """Time as many steps as each request asks for, until one asks for none."""
    train = data.Split(*map(torch.from_numpy, arrays))
    torch.backends.cudnn.benchmark = True
    if args.device.index is not None:
        torch.cuda.set_device(args.device)
    loop = ClassicLoop(args, data.Dataset("", "", classes, train, train, horizontal_flip), masked)
    while steps := pipe.recv():
        pipe.send(loop.time(steps))


class OurLoop:
    """The loop of engine.fit without its bookkeeping between epochs."""

    def __init__(self, args: argparse.Namespace, dataset: data.Dataset, dtype: torch.dtype, masked: bool = False):
        self.device = args.device
        network = engine.to_device(build(args.arch, len(dataset.classes)), self.device)
        weights = sum(weight.numel() for weight in pruning.prunable(network).values())
        masks = pruning.compute_masks(network, round(SPARSITY * weights)) if masked else {}
        pruning.apply(network, masks)
        after_step = pruning.mask_fn(network, masks) if masked else lambda: None
        lr = torch.tensor(0.01, device=self.device)
        optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, fused=True)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.step = engine.Step(network.train(), optimizer, sums, dtype, after_step)
        self.data = data.TrainBatches(dataset, args.batch_size, 0, self.device)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = 0
        while True:
            yield from self.data.epoch("benchmark", epoch)
            epoch += 1

    def time(self, steps: int) -> float:
        """Seconds of `steps` steps after the warm-up."""
        batches = self.batches()
        for step in range(steps + warm_up(self.device)):
            if step == warm_up(self.device):
                synchronize(self.device)
                begin = time.perf_counter()
            self.step(*next(batches), 0.01)
        self.step.sums.tolist()  # waits for the device
        return time.perf_counter() - begin


def build(arch: Arch, classes: int) -> nn.Module:
    torch.manual_seed(0)
    return models.build(arch, classes) if isinstance(arch, str) else models.ResNet(*arch, classes)


# --- Tables --------------------------------------------------------------------------------------------------------


def flops(arch: Arch, size: int) -> int:
    """FLOPs of convolutions and the linear layer in one training step, per image."""
    macs = [dense for dense, _ in pruning.count_macs(build(arch, 10), size).values()]
    return 2 * (3 * sum(macs) - macs[0])


def peak(device: torch.device, kind: str) -> float:
    """FLOPs per second of the fastest of a few large matrix products. tf32: fp32 that cuDNN may round to TF32."""
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    torch.backends.cudnn.allow_tf32 = kind == "tf32"
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    image = torch.randn(16, size, 8, size // 128, device=device).to(dtype)
    image = image.contiguous(memory_format=torch.channels_last)
    kernels = b[:, :, None, None].contiguous(memory_format=torch.channels_last)
    best = float("inf")
    for product in (lambda: a @ b, lambda: F.conv2d(image, kernels)):
        for _ in range(6):
            synchronize(device)
            begin = time.perf_counter()
            product()
            synchronize(device)
            best = min(best, time.perf_counter() - begin)
    torch.backends.cudnn.allow_tf32 = False
    return 2 * size**3 / best


def speed_table(args: argparse.Namespace, loops: dict, seconds: dict[str, list[float]]) -> str:
    work = flops(args.arch, args.image_size) * args.batch_size
    peaks = {kind: peak(args.device, kind) for _, _, kind in loops.values()}
    rows, median = [], {name: statistics.median(times) for name, times in seconds.items()}
    for name, (_, steps, kind) in loops.items():
        times, typical = seconds[name], median[name]
        ratio = median[name.replace("ours", "classic")] / typical
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
    headers = ["loop", "ms per step (range)", "steps", "images/s", "s per epoch", "ratio", "of peak"]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    cost = [100 * (median[f"{loop}, masked"] / median[f"{loop}, dense"] - 1) for loop in ("classic", "ours")]
    known = ", ".join(f"{value / 1e9:.0f} GFLOP/s {key}" for key, value in peaks.items())
    return (
        f"{table}\n\nepoch: {EPOCH} images; ratio: time of the classic loop over ours; masks add {cost[0]:+.1f} % "
        f"(classic) and {cost[1]:+.1f} % (ours) to a step; peak: {known}; {work / args.batch_size / 1e9:.2f} GFLOP "
        "per image"
    )


def growth_tables(args: argparse.Namespace, dtype: torch.dtype) -> str:
    """The time of an epoch against batch size, width of the network and number of images, each alone."""
    gpu = args.device.type == "cuda"
    steps = 100 if gpu else 2 if args.quick else 5
    dataset = load(args, (steps + 6) * 2 * args.batch_size)

    def epoch(batch_size: int, arch: Arch = args.arch) -> float:
        changed = argparse.Namespace(**vars(args) | {"batch_size": batch_size, "arch": arch})
        return OurLoop(changed, dataset, dtype).time(steps) / steps * EPOCH / batch_size

    sizes = [args.batch_size // 4, args.batch_size // 2, args.batch_size, args.batch_size * 2][: 3 if args.quick else 4]
    block, depths, widths = resnet.NETWORKS[args.arch].args
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
        tabulate([["s per epoch", *(f"{value:.2f}" for value in times)]], [name, *map(str, heads)], tablefmt="github")
        for name, heads, times in tables
    )


def whole_epoch(args: argparse.Namespace, dtype: torch.dtype, images: int) -> float:
    """Seconds of an epoch of engine.fit over so many images, with its bookkeeping and its short last batch."""
    network = engine.to_device(build(args.arch, 10), args.device)
    batches = data.TrainBatches(random_images(images, args.image_size), args.batch_size, 0, args.device)
    history = engine.fit(network, batches, engine.Recipe(0.01), 2, "benchmark", dtype=dtype)
    return history[1]["seconds"]


if __name__ == "__main__":
    utils.run(main)
