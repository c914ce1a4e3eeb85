"""The sparse engine computes what PyTorch computes."""

import contextlib
import copy
import functools
import itertools
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from networks import one_thread, pruned  # noqa: F401 (an automatic fixture)

import models
from deployment.engine import Engine, engine, lanes_of_this_cpu, usable_processors
from deployment.engine.layers import as_convolution, convolutions
from deployment.engine.plan import make_plan
from deployment.engine.thread_pool import ThreadPool
from deployment.simplification import remove_dead_channels
from models.resnet import PadShortcut

LANES = lanes_of_this_cpu()
# Numba compiles the loops for each width of vectors, which takes seconds.
OTHER_LANES = pytest.param(24 - LANES, marks=pytest.mark.slow)
THREADS = min(2, usable_processors())

pytestmark = pytest.mark.slow  # Numba compiles the loops for ten seconds


@torch.no_grad()
def assert_same(sparse: Engine, network: torch.nn.Module, count: int, size: int | tuple[int, int] = 16) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(count, 3, height, width)
    expected = copy.deepcopy(network).double()(images.double())
    error = (sparse(images) - expected).abs().max() / expected.abs().max()
    assert error < 5e-6, f"{count} images of {size}: {error}"


@functools.cache
def shared(lanes: int = LANES, threads: int = THREADS) -> tuple[Engine, torch.nn.Module]:
    """An engine that several tests use, and its network."""
    network = pruned("resnet20", 0.15)
    return Engine(network, 16, threads, lanes), network


@pytest.mark.parametrize("lanes", [LANES, OTHER_LANES])
@pytest.mark.parametrize("threads", [1, THREADS])
def test_batches_of_every_size(lanes, threads):
    for count in (1, 3, 16, 17, 64):
        assert_same(*shared(lanes, threads), count)


@pytest.mark.parametrize("arch", ["basic", "padded", "bottleneck", "resnet20-projection"])
def test_every_kind_of_block(arch):
    network = pruned(arch, 0.3)
    sparse = Engine(network, 16)
    for count in (1, LANES):
        assert_same(sparse, network, count)


@pytest.mark.slow
@pytest.mark.parametrize("arch, density, size", [("resnet18", 1, 16), ("resnet34", 0.1, 32), ("resnet50", 0.15, 16)])
def test_large_networks(arch, density, size):
    network = pruned(arch, density)
    sparse = Engine(network, size)
    for count in (1, LANES):
        assert_same(sparse, network, count, size)


@pytest.mark.parametrize("density", [0, 0.02, 1])
def test_every_density(density):
    network = pruned("padded", density)
    sparse = Engine(network, 16)
    for count in (1, LANES):
        assert_same(sparse, network, count)


@pytest.mark.parametrize("lanes", [LANES, OTHER_LANES])
@pytest.mark.parametrize("size", [17, 20, 31, 48, (16, 40), (33, 18)])
def test_image_sizes_that_no_vector_and_no_tile_divides(size, lanes):
    for count in (1, lanes):
        assert_same(*shared(lanes), count, size)


@pytest.mark.parametrize("before, after, stride", [(3, 3, 2), (2, 3, 2), (0, 1, 1)])
def test_a_shortcut_without_parameters_as_a_convolution(before, after, stride):
    shortcut = PadShortcut(6, 6 + before + after, stride)
    assert (shortcut.before, shortcut.after) == (before, after)
    images = torch.randn(2, 6, 7, 8)
    assert torch.equal(as_convolution(shortcut, 6)(images), shortcut(images))


@pytest.fixture
def clock(monkeypatch):
    """It sets the seconds that the engine measures for a layer, with zeros skipped and with all weights."""

    def set_clock(sparse_seconds: int, dense_seconds: int) -> None:
        steps = itertools.cycle((0, sparse_seconds, 0, dense_seconds))  # from each reading to the next
        times = itertools.accumulate(steps)
        monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: next(times)))

    return set_clock


@pytest.mark.parametrize("lanes", [LANES, OTHER_LANES])
@pytest.mark.parametrize("threads", [1, THREADS])
def test_layers_with_all_weights(clock, lanes, threads):
    """The image sizes lead to tiles that overlap, to single tiles, and to layers that are too small for a tile."""
    clock(2, 1)
    network = pruned("resnet20", 0.6)
    sparse = Engine(network, 16, threads, lanes)
    assert list(sparse.dense) == [i for i, layer in enumerate(sparse.layers) if layer.stride == 1]
    for size in (8, 16, 17, 20, 31, (16, 40), (33, 18)):
        for count in (1, lanes, 3 * lanes):
            assert_same(sparse, network, count, size)


def test_layers_with_odd_numbers_of_channels(clock):
    """Removing dead channels leaves layers with 5 and 11 channels, which no block of filters divides."""
    clock(2, 1)
    torch.manual_seed(0)
    network = models.build("resnet20", 3)
    with torch.no_grad():
        for block in (*network.layer1, *network.layer2):
            block.conv1.weight[5 if block in network.layer1 else 11 :] = 0
            block.bn1.bias.zero_()
    network.eval()
    assert {len(layer.weight) for layer in convolutions(network)} >= {5, 11}
    sparse = Engine(network, 16)
    assert {sparse.layers[index].weight.shape[:2] for index in sparse.dense} >= {(5, 16), (16, 5), (32, 11)}
    assert_same(sparse, network, 16)


@pytest.mark.parametrize("density, dense_seconds, expected", [(0.5, 3, 0), (0.5, 1, 17), (0.1, 1, 0)])
def test_the_faster_way_is_chosen(clock, density, dense_seconds, expected):
    clock(2, dense_seconds)
    network = pruned("resnet20", density)
    sparse = Engine(network, 16)
    assert len(sparse.dense) == expected
    assert_same(sparse, network, 16)


def test_layers_that_are_too_small_for_a_tile_are_not_measured(clock):
    """With 8 x 8 images the third stage of resnet20 computes 2 x 2 pixels."""
    clock(2, 1)
    assert len(Engine(pruned("resnet20", 0.5), 8).dense) == 1 + 6 + 5


def test_groups_of_large_images_are_computed_one_by_one(monkeypatch):
    monkeypatch.setattr(engine, "GROUP_FLOATS", 1000)
    network = pruned("padded", 0.3)
    sparse = Engine(network, 64)
    assert_same(sparse, network, LANES + 4, 64)
    assert not sparse.prepare(64, 64, grouped=True).arenas


def test_empty_full_and_nearly_empty_layers():
    network = pruned("basic", 0.2)
    with torch.no_grad():
        network.layer1[0].conv1.weight[1:] = 0
        network.layer1[1].conv2.weight.zero_()[5, 7, 2, 0] = 1
        network.layer2[0].shortcut[0].weight.zero_()
        network.layer2[1].conv1.weight.normal_(0, 0.1)
    sparse = Engine(network, 16)
    for count in (1, LANES):
        assert_same(sparse, network, count)


def test_networks_with_other_classes_and_channels():
    network = remove_dead_channels(pruned("resnet20", 0.02, classes=3))
    assert_same(Engine(network, 16), network, 17)


def test_nan_stays_nan():
    """Otherwise a broken network would look sound."""
    images = torch.randn(LANES + 1, 3, 32, 32)
    images[3, 1, 10, 10] = images[LANES, 0, 0, 0] = float("nan")
    broken = shared()[0](images).isnan().all(1)
    assert broken.nonzero().flatten().tolist() == [3, LANES]


def test_wrong_input_is_refused():
    sparse, _ = shared()
    for shape, dtype in (
        ((3, 32, 32), torch.float32),
        ((1, 1, 32, 32), torch.float32),
        ((16, 3, 16, 0), torch.float32),
        ((1, 3, 32, 32), torch.uint8),
    ):
        images = torch.zeros(shape, dtype=dtype)
        with pytest.raises(ValueError, match=r"\(N, 3, H, W\) float32"):
            sparse(images)
    assert sparse(torch.zeros(0, 3, 32, 32)).shape == (0, 10)


def test_more_threads_than_processors_are_refused():
    for threads in (0, usable_processors() + 1):
        with pytest.raises(ValueError, match="processors"):
            Engine(pruned("padded", 0.3), threads=threads)


def test_other_vectors_and_types_are_refused():
    with pytest.raises(ValueError, match="not 8 or 16"):
        Engine(pruned("padded", 0.3), lanes=4)
    with pytest.raises(ValueError, match="not float32"):
        Engine(pruned("padded", 0.3).double())


def test_several_threads_may_call_one_engine():
    sparse, _ = shared()
    batches = [torch.randn(count, 3, 16, 16) for count in (1, 3, 16, 17)]
    expected = [sparse(images) for images in batches]
    with ThreadPoolExecutor(4) as executor:
        for number, logits in enumerate(executor.map(sparse, batches * 20)):
            assert torch.equal(logits, expected[number % 4])


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or usable_processors() < 2, reason="needs Linux, two processors"
)
def test_threads_run_on_other_processors_than_the_caller():
    pool = ThreadPool(2)
    for processor in sorted(os.sched_getaffinity(0)):
        usable = {}
        with run_on(processor):
            for other in pool.start(lambda thread, usable=usable: usable.update({thread: os.sched_getaffinity(0)})):
                other.result()
        assert usable[0] == {processor} and processor not in usable[1]


@contextlib.contextmanager
def run_on(processor: int):
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {processor})
    try:
        yield
    finally:
        os.sched_setaffinity(0, usable)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_engine_works_in_a_forked_process():
    """The child inherits no threads and must start its own. If it waits for the old ones, an alarm ends it."""
    sparse, _ = shared()
    images = torch.randn(1, 3, 16, 16)
    expected = sparse(images)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        os._exit(0 if torch.equal(sparse(images), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("count", [1, 64])
def test_a_call_after_an_interrupted_one_does_not_use_its_memory(monkeypatch, count):
    """The calling thread is interrupted; the others may go on writing to what they were given."""
    engine = Engine(pruned("resnet20", 0.1), 16, threads=THREADS)
    images = torch.randn(count, 3, 16, 16)
    expected = engine(images)
    used = [id(arena) for prepared in engine.prepared.values() for arena in prepared.arenas]
    kept = list(engine.prepared.values())  # so that no new memory has an old address

    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.pool, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine(images)
    assert torch.equal(engine(images), expected)
    assert kept and not set(used) & {id(arena) for ready in engine.prepared.values() for arena in ready.arenas}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_another_thread_computes_works():
    """The child has a lock of its own: nobody is there to release the parent's."""
    engine = Engine(pruned("resnet20", 0.1), 16, threads=1)
    images = torch.randn(1, 3, 16, 16)
    expected = engine(images)
    with engine.lock:  # as while a call is computing
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if torch.equal(engine(images), expected) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_plans_for_old_image_sizes_are_dropped():
    sparse = Engine(pruned("padded", 0.3), 16)
    for size in range(16, 30):
        sparse(torch.zeros(1, 3, size, size))
    assert len(sparse.prepared) == engine.MAX_SIZES


def test_wrong_logits_are_noticed(monkeypatch):
    """An engine compares itself with PyTorch when it is made."""

    def wrong(network):
        layers = convolutions(network)
        layers[3].weight *= 1.1
        return layers

    monkeypatch.setattr(engine, "convolutions", wrong)
    with pytest.raises(RuntimeError, match="differ from PyTorch's"):
        Engine(pruned("padded", 0.3), 16)


def test_the_network_is_not_changed():
    network = pruned("padded", 0.3).train()
    before = copy.deepcopy(network.state_dict())
    Engine(network, 16)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_filters_are_divided_among_threads_by_their_nonzeros():
    network = pruned("resnet18", 0.5)
    with torch.no_grad():
        network.layer1[0].conv1.weight[16:] = 0
    layers = convolutions(network)
    shares = make_plan(layers, 32, 32, LANES, False, {}).shares(2)
    assert 6 <= shares[1, 1] <= 12, "half of the nonzeros are in the first 8 of 64 filters"
    for share, layer in zip(shares, layers):
        assert share[0] == 0 and share[-1] == len(layer.weight) and (share[1:] >= share[:-1]).all()
