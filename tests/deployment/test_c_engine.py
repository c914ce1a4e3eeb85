"""The engine computes what PyTorch computes."""

import copy
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import one_thread, pruned  # noqa: F401 (an automatic fixture)

from deployment import model_file
from deployment.engine import Engine, Model, build, lanes_of_this_cpu, usable_processors
from deployment.program import Operation, Program

LANES = lanes_of_this_cpu()
THREADS = min(2, usable_processors())
ALL_LANES = [pytest.param(lanes, marks=[] if lanes == LANES else pytest.mark.slow) for lanes in (4, 8, 16)]
SIZES = (1, 1), (2, 2), (4, 4), (7, 9), (8, 8), (16, 16), (5, 40), (33, 18)


def convolution(inputs, output, channels, filters, kernel=3, stride=1, padding=1, dilation=1, groups=1, density=0.3):
    kernel, stride = ((x, x) if isinstance(x, int) else x for x in (kernel, stride))
    padding = (padding,) * 4 if isinstance(padding, int) else padding
    weight = torch.randn(filters, channels // groups, *kernel) / (channels * kernel[0] * kernel[1] / groups) ** 0.5
    weight *= torch.rand_like(weight) < density
    return Operation(
        "convolve", inputs, output, "relu", "", weight, torch.randn(filters) * 0.1, kernel, stride, padding,
        (dilation, dilation), groups,
    )  # fmt: skip


def program(operations: list[Operation], size: tuple[int, int]) -> Program:
    """The operations, a mean over each channel, and a classifier."""
    operations, count = list(operations), len(operations)
    channels = Program(operations, size).shapes()[-1][0]
    operations.append(Operation("adaptive_pool", [count], count + 1))
    weight = torch.randn(5, channels, 1, 1)
    operations.append(Operation("convolve", [count + 1], count + 2, weight=weight, bias=torch.randn(5)))
    return Program(operations, size)


def assert_same(made: Program, lanes: int = LANES, threads: int = THREADS, counts: tuple[int, ...] = (1, 33)) -> None:
    model = Model(model_file.write(made), threads, lanes)
    for count in counts:
        images = torch.randn(count, 3, *made.image_size)
        expected = made.run(images.double())
        error = (torch.from_numpy(model.run(images.numpy())) - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, f"{count} images of {made.image_size}: {error}"


@pytest.fixture
def choose(monkeypatch):
    """Every 3x3 convolution of stride 1 is computed one way."""
    return lambda kind: monkeypatch.setattr(
        model_file, "algorithm", lambda operation, *_: kind if operation.kernel == (3, 3) else model_file.SPARSE
    )


@pytest.mark.parametrize("lanes", ALL_LANES)
@pytest.mark.parametrize("kind", ["SPARSE", "DENSE", "WINOGRAD2", "WINOGRAD4"])
def test_each_algorithm_on_maps_that_no_vector_divides(kind, lanes, choose):
    torch.manual_seed(0)
    choose(getattr(model_file, kind))
    for size in SIZES:
        layers = [convolution([0], 1, 3, 8), convolution([1], 2, 8, 13), convolution([2], 3, 13, 40)]
        assert_same(program([*layers, convolution([3, 1], 4, 40, 8)], size), lanes)


@pytest.mark.parametrize("lanes", ALL_LANES)
@pytest.mark.parametrize(
    "kernel, stride, padding, dilation, groups",
    [
        (1, 2, 0, 1, 1), (3, 2, 1, 1, 1), (7, 2, 3, 1, 1), (3, 1, 2, 2, 1), ((1, 7), 1, (0, 3, 0, 3), 1, 1),
        (4, 4, 1, 1, 1), (3, 3, 0, 1, 1), (2, 1, (1, 0, 0, 1), 1, 1), (3, (1, 2), 1, 1, 1), (3, 1, 1, 1, 2),
        (3, 1, 1, 1, 8), (3, 2, 1, 1, 8), (1, 2, (0, 0, 16, 13), 1, 1),
    ],
)  # fmt: skip
def test_every_convolution(kernel, stride, padding, dilation, groups, lanes):
    torch.manual_seed(0)
    for density in (0.3, 1):
        middle = convolution([1], 2, 8, 16, kernel, stride, padding, dilation, groups, density)
        made = program([convolution([0], 1, 3, 8), middle, convolution([2], 3, 16, 8, 1, 1, 0)], (16, 13))
        assert_same(made, lanes)


def test_padding_below_that_only_one_of_two_values_has():
    torch.manual_seed(0)
    affine = Operation("affine", [1], 2, weight=torch.randn(8), bias=torch.randn(8))
    assert_same(program([convolution([0], 1, 3, 8), affine, convolution([2], 3, 8, 8, padding=(0, 0, 5, 0))], (8, 8)))


def test_more_than_a_million_pixels(choose):
    torch.manual_seed(0)
    choose(model_file.DENSE)
    assert_same(program([convolution([0], 1, 3, 1, density=1)], (1200, 1200)), counts=(1,))


@pytest.mark.parametrize("activation", ["relu6", "hardswish", "silu", "sigmoid", "hardsigmoid"])
def test_activations_and_elementwise_operations(activation):
    torch.manual_seed(0)
    first = convolution([0], 1, 3, 8)
    first.activation = activation
    operations = [
        first,
        Operation("activate", [1], 2, activation),
        Operation("affine", [2], 3, activation, weight=torch.randn(8), bias=torch.randn(8)),
        Operation("adaptive_pool", [3], 4),
        Operation("multiply", [3, 4], 5, activation),
        Operation("add", [5, 1], 6, activation),
        Operation("concatenate", [6, 0, 2], 7),
        Operation("pad_channels", [7], 8, stride=(2, 2), channels=(2, 3)),
    ]
    assert_same(program(operations, (9, 11)))


@pytest.mark.parametrize("kind", ["max_pool", "average_pool"])
@pytest.mark.parametrize(
    "kernel, stride, padding", [((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1)), ((3, 2), (2, 3), (1, 0))]
)
@pytest.mark.parametrize("ceil_mode, count_include_pad", [(False, True), (True, False), (True, True)])
def test_pools(kind, kernel, stride, padding, ceil_mode, count_include_pad):
    torch.manual_seed(0)
    pool = Operation(
        kind, [1], 2, kernel=kernel, stride=stride, padding=padding * 2, ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
    )  # fmt: skip
    assert_same(program([convolution([0], 1, 3, 8), pool], (13, 10)))


def test_adaptive_pools():
    for size in ((3, 5), (7, 7)):
        assert_same(program([Operation("adaptive_pool", [0], 1, size=size)], (17, 20)))


@pytest.fixture(scope="module")
def shared():
    network = pruned("padded", 0.3)
    return Engine(network, 16, THREADS), network


def test_batches_of_every_size_and_images_of_other_sizes(shared):
    engine, network = shared
    for count, size in ((0, (16, 16)), (1, (16, 16)), (3, (17, 31)), (LANES, (8, 20)), (4 * LANES + 1, (16, 16))):
        images = torch.randn(count, 3, *size)
        with torch.no_grad():
            assert torch.allclose(engine(images), network(images), atol=1e-4)


def test_images_that_are_not_contiguous(shared):
    engine, _ = shared
    images = torch.randn(2, 16, 16, 3).permute(0, 3, 1, 2)
    assert torch.equal(engine(images), engine(images.contiguous()))


@pytest.mark.parametrize("density", [0, 0.02, 1])
def test_every_density(density):
    network = pruned("basic", density)
    images = torch.randn(LANES + 1, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(Engine(network, 16)(images), network(images), atol=1e-4)


def test_the_same_bits_with_any_number_of_threads(shared):
    engine, network = shared
    images = torch.randn(2 * LANES + 3, 3, 16, 16)
    assert torch.equal(engine(images), Engine(network, 16, 1)(images))


def test_threads_do_not_write_the_same_outputs(choose):
    torch.manual_seed(0)
    choose(model_file.WINOGRAD4)
    layers = [convolution([i], i + 1, 8 if i else 3, 8) for i in range(4)]
    for layer in layers:
        layer.activation = "hardswish"
    content = model_file.write(program(layers, (5, 17)))
    images = torch.randn(LANES, 3, 5, 17).numpy()
    alone, together = Model(content), Model(content, THREADS)
    expected = alone.run(images)
    assert all((together.run(images) == expected).all() for _ in range(200))


def test_nan_stays_nan(shared):
    images = torch.randn(LANES + 1, 3, 16, 16)
    images[3, 1, 10, 10] = images[LANES, 0, 0, 0] = float("nan")
    broken = shared[0](images).isnan()
    assert broken.all(1).nonzero().flatten().tolist() == broken.any(1).nonzero().flatten().tolist() == [3, LANES]


def test_wrong_arguments_are_refused(shared):
    engine, network = shared
    for images in (
        torch.zeros(3, 16, 16),
        torch.zeros(1, 1, 16, 16),
        torch.zeros(1, 3, 16, 0),
        torch.zeros(1, 3, 9, 9).int(),
    ):
        with pytest.raises(ValueError, match=r"\(N, 3, H, W\) float32"):
            engine(images)
    for threads in (0, usable_processors() + 1):
        with pytest.raises(ValueError, match="processors"):
            Engine(network, threads=threads)
    with pytest.raises(ValueError, match="not 4, 8 or 16"):
        Engine(network, lanes=3)
    with pytest.raises(ValueError, match="float32"):
        Engine(copy.deepcopy(network).double())


def test_several_threads_may_call_one_engine(shared):
    engine, _ = shared
    batches = [torch.randn(count, 3, 16, 16) for count in (1, 3, LANES, LANES + 1)]
    expected = [engine(images) for images in batches]
    with ThreadPoolExecutor(4) as executor:
        for number, logits in enumerate(executor.map(engine, batches * 10)):
            assert torch.equal(logits, expected[number % 4])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_engine_works_in_a_forked_process_even_while_it_computes(shared):
    """The child inherits no threads, and nobody is there to release the lock. If it waits, an alarm ends it."""
    engine, _ = shared
    images = torch.randn(1, 3, 16, 16)
    expected = engine(images)
    with engine.model.lock:  # as while a call is computing
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            os._exit(0 if torch.equal(engine(images), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_wrong_logits_are_noticed(monkeypatch):
    """An engine compares itself with PyTorch, once for each model."""
    network = pruned("padded", 0.31)
    write = model_file.write

    def wrong(made: Program) -> bytes:
        made.operations[2].weight = made.operations[2].weight * 1.1
        return write(made)

    monkeypatch.setattr(model_file, "write", wrong)
    with pytest.raises(RuntimeError, match="differ from PyTorch's"):
        Engine(network, 16)


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path, capsys):
    (tmp_path / "pruning-engine").write_text("a file, not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    directory = build.cache_directory.__wrapped__()
    assert directory.is_dir() and not directory.is_relative_to(tmp_path)
    assert capsys.readouterr().err.count("\n") == 1
