"""The sparse engine computes what PyTorch computes."""

import contextlib
import copy
import itertools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import models
import sparse
import sparse.engine
from compact import remove_dead_channels
from sparse.layers import convolutions
from sparse.team import Team


def pruned(arch: str, density: float, classes: int = 10) -> torch.nn.Module:
    """A network with random weights, BatchNorm statistics and zeros; its logits are of the order of 1."""
    torch.manual_seed(1)
    network = models.build(arch, classes)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.mul_(torch.rand_like(module.weight) < density).div_(max(density, 0.1) ** 0.5)
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return network.eval()


@torch.no_grad()
def assert_same(engine: sparse.Engine, network: torch.nn.Module, count: int, size: int | tuple = 32) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(count, 3, height, width)
    expected = copy.deepcopy(network).double()(images.double())
    error = (engine(images) - expected).abs().max() / expected.abs().max()
    assert error < 5e-6, f"{count} images of {size}: {error}"


@pytest.mark.parametrize(
    "arch, lanes, threads",
    [("resnet18", 16, 2), ("resnet20", 16, 1), ("resnet20", 8, 2), ("resnet50", 16, 2)],
)
def test_batches_threads_and_vectors(arch, lanes, threads):
    network = pruned(arch, 0.15)
    engine = sparse.Engine(network, 16, threads, lanes)
    for count in (1, 3, 16, 17, 64):
        assert_same(engine, network, count, 16)


@pytest.mark.parametrize("density", (0, 0.02, 1))
def test_every_density_at_full_size(density):
    network = pruned("resnet18", density)
    engine = sparse.Engine(network)
    for count in (1, 16):
        assert_same(engine, network, count)


def test_resnet34():
    network = pruned("resnet34", 0.1)
    engine = sparse.Engine(network)
    for count in (1, 16):
        assert_same(engine, network, count)


@pytest.mark.parametrize("size", (17, 20, 31, 48, (16, 40), (33, 18)))
def test_any_image_size(size):
    """Heights and widths that no vector and no tile divides."""
    network = pruned("resnet20", 0.3)
    for lanes in (8, 16):
        engine = sparse.Engine(network, 16, lanes=lanes)
        for count in (1, lanes):
            assert_same(engine, network, count, size)


@pytest.fixture
def clock(monkeypatch):
    """Sets how long the engine finds that a layer takes, with the zeros skipped and with all weights."""

    def set_clock(sparse_seconds: int, dense_seconds: int) -> None:
        steps = itertools.cycle((0, sparse_seconds, 0, dense_seconds))  # a step from each reading to the next
        times = itertools.accumulate(steps)
        monkeypatch.setattr(sparse.engine, "time", SimpleNamespace(perf_counter=lambda: next(times)))

    return set_clock


@pytest.mark.parametrize("size", (8, 16, 17, 20, 31, (16, 40), (33, 18)))
@pytest.mark.parametrize("lanes, threads", [(16, 1), (16, 2), (8, 2)])
def test_layers_with_all_weights(clock, size, lanes, threads):
    """Alone and in a team, with tiles that overlap, with one tile, and with layers that are too small for one."""
    clock(2, 1)
    network = pruned("resnet20", 0.6)
    engine = sparse.Engine(network, 16, threads, lanes)
    assert list(engine.dense) == [i for i, layer in enumerate(engine.layers) if layer.stride == 1]
    for count in (1, lanes, 3 * lanes):
        assert_same(engine, network, count, size)


def test_channels_that_do_not_come_out_even(clock):
    """Dead channels go, and leave layers of five and of eleven, with all weights: no block of filters divides them."""
    clock(2, 1)
    torch.manual_seed(0)
    network = models.build("resnet20", 3)
    with torch.no_grad():
        for block in (*network.layer1, *network.layer2):
            block.conv1.weight[5 if block in network.layer1 else 11 :] = 0
            block.bn1.bias.zero_()
    network.eval()
    assert {len(layer.weight) for layer in convolutions(network)} >= {5, 11}
    engine = sparse.Engine(network)
    assert {engine.layers[index].weight.shape[:2] for index in engine.dense} >= {(5, 16), (16, 5), (32, 11)}
    assert_same(engine, network, 16)


@pytest.mark.parametrize("density, dense_seconds, expected", [(0.5, 3, 0), (0.5, 1, 17), (0.1, 1, 0)])
def test_the_faster_way_is_taken(clock, density, dense_seconds, expected):
    clock(2, dense_seconds)
    network = pruned("resnet20", density)
    engine = sparse.Engine(network, 16)
    assert len(engine.dense) == expected
    assert_same(engine, network, 16, 16)


def test_layers_too_small_for_a_tile_are_not_measured(clock):
    """At 8 x 8 the third stage of resnet20 writes 2 x 2 pixels."""
    clock(2, 1)
    assert len(sparse.Engine(pruned("resnet20", 0.5), 8).dense) == 1 + 6 + 5


def test_all_weights_are_faster_when_all_are_there():
    """Measured, not set: by a factor of four on the processors seen so far."""
    assert len(sparse.Engine(pruned("resnet18", 1)).dense) >= 8


def test_large_images_are_computed_one_by_one(monkeypatch):
    monkeypatch.setattr(sparse.engine, "GROUP_FLOATS", 1000)
    network = pruned("resnet20", 0.3)
    engine = sparse.Engine(network, 64)
    assert_same(engine, network, 20, 64)
    assert not engine.prepare(64, 64, grouped=True).arenas


def test_layers_of_one_kind():
    """One filter keeps weights, one weight is left, a layer is empty, a layer is full."""
    network = pruned("resnet18", 0.2)
    with torch.no_grad():
        network.layer1[0].conv1.weight[1:] = 0
        network.layer2[0].conv2.weight.zero_()[5, 7, 2, 0] = 1
        network.layer3[0].shortcut[0].weight.zero_()
        network.layer4[1].conv1.weight.normal_(0, 0.02)
    engine = sparse.Engine(network)
    for count in (1, 16):
        assert_same(engine, network, count)


def test_other_numbers_of_classes_and_of_channels():
    network = remove_dead_channels(pruned("resnet20", 0.02, classes=3))
    assert_same(sparse.Engine(network), network, 17)


def test_nan_stays_nan():
    """An engine that hid it would call a broken network sound."""
    network = pruned("resnet20", 0.3)
    images = torch.randn(17, 3, 32, 32)
    images[3, 1, 10, 10] = images[16, 0, 0, 0] = float("nan")
    broken = sparse.Engine(network)(images).isnan().all(1)
    assert broken.nonzero().flatten().tolist() == [3, 16]


def test_wrong_input_is_refused():
    engine = sparse.Engine(pruned("resnet20", 0.3))
    for shape, dtype in (
        ((3, 32, 32), torch.float32),
        ((1, 1, 32, 32), torch.float32),
        ((16, 3, 16, 0), torch.float32),
        ((1, 3, 32, 32), torch.uint8),
    ):
        images = torch.zeros(shape, dtype=dtype)
        with pytest.raises(ValueError, match=r"\(N, 3, H, W\) float32"):
            engine(images)
    assert engine(torch.zeros(0, 3, 32, 32)).shape == (0, 10)


def test_threads_that_no_processor_is_there_for_are_refused():
    for threads in (0, sparse.usable_processors() + 1):
        with pytest.raises(ValueError, match="processors"):
            sparse.Engine(pruned("resnet20", 0.3), threads=threads)


def test_other_vectors_and_types_are_refused():
    with pytest.raises(ValueError, match="not 8 or 16"):
        sparse.Engine(pruned("resnet20", 0.3), lanes=4)
    with pytest.raises(ValueError, match="not float32"):
        sparse.Engine(pruned("resnet20", 0.3).double())


def test_several_threads_may_call_one_engine():
    engine = sparse.Engine(pruned("resnet20", 0.1), 16)
    batches = [torch.randn(count, 3, 16, 16) for count in (1, 3, 16, 17)]
    expected = [engine(images) for images in batches]
    with ThreadPoolExecutor(4) as pool:
        for number, logits in enumerate(pool.map(engine, batches * 20)):
            assert torch.equal(logits, expected[number % 4])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_threads_work_on_other_processors_than_the_one_that_calls():
    team = Team(2)
    team.start(lambda _thread: None)  # makes the threads, which may run anywhere
    for processor in sorted(os.sched_getaffinity(0)):
        usable = {}
        with run_on(processor):
            for other in team.start(lambda thread, usable=usable: usable.update({thread: os.sched_getaffinity(0)})):
                other.result()
        assert usable[0] == {processor} and processor not in usable[1]


@contextlib.contextmanager
def run_on(processor: int):
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {processor})
    yield
    os.sched_setaffinity(0, usable)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_engine_works_in_a_forked_process():
    """Threads do not come along: without new ones a call would wait for ever."""
    engine = sparse.Engine(pruned("resnet20", 0.1), 16, threads=2)
    images = torch.randn(1, 3, 16, 16)
    expected = engine(images)
    time.sleep(0.2)  # until the other thread waits for work
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(engine(images), expected) else 1)
    for _ in range(100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done and os.waitstatus_to_exitcode(status) == 0


def test_old_sizes_are_forgotten():
    engine = sparse.Engine(pruned("resnet20", 0.1), 16)
    for size in range(16, 30):
        engine(torch.zeros(1, 3, size, size))
    assert len(engine.ready) == sparse.engine.SIZES


def test_other_logits_are_noticed(monkeypatch):
    """The check that each engine makes of itself."""

    def wrong(network):
        layers = convolutions(network)
        layers[3].weight *= 1.1
        return layers

    monkeypatch.setattr(sparse.engine, "convolutions", wrong)
    with pytest.raises(RuntimeError, match="other logits than PyTorch"):
        sparse.Engine(pruned("resnet20", 0.3))


def test_the_network_is_left_alone():
    network = pruned("resnet20", 0.3).train()
    before = copy.deepcopy(network.state_dict())
    sparse.Engine(network)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_filters_are_shared_by_their_nonzeros():
    network = pruned("resnet18", 0.5)
    with torch.no_grad():
        network.layer1[0].conv1.weight[16:] = 0
    engine = sparse.Engine(network, threads=2)
    ready = engine.prepare(32, 32, grouped=False)
    assert 6 <= ready.shares[2][1, 1] <= 12, "half of the work is in the first 8 of 64 filters"
    for share, layer in zip(ready.shares[2], engine.layers):
        assert share[0] == 0 and share[-1] == len(layer.weight) and (share[1:] >= share[:-1]).all()
