"""Profiles of a device: what is read from a file, and pruning to a time by it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, SMALL_PRUNING, call, succeed

import budgets
import checkpoints
import models
import profiles
import pruning
from deployment import packing
from formats import packed
from utils import Failure


def invented(arch: str = "resnet20", size: int = 16) -> dict:
    """A profile in which the layers of a network differ by much in the time of a weight."""
    network = models.build(arch, 2)
    layers = {}
    for place, (name, weight) in enumerate(pruning.prunable(network).items()):
        kept = [max(1, weight.numel() // 100), weight.numel() // 5, weight.numel() // 2, weight.numel()]
        each = 1e-5 * (1 + place % 7)
        ms = [0.01 + each * kept[0], 0.01 + each * kept[1], 0.01 + each * kept[2], 0.01 + each * kept[2]]
        layers[name.removesuffix(".weight")] = {"kept": kept, "ms": ms}
    return {"profile": 1, "device": "a board", "threads": 1, "arch": arch, "image_size": size, "other_ms": 0.1} | {
        "layers": layers
    }


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / profiles.NAME
    path.write_text(json.dumps(invented()))
    return path


def test_the_prediction_is_read_off_the_profile(written):
    torch.manual_seed(0)
    network = models.build("resnet20", 2)
    profile = profiles.read(written, network, "resnet20", 16)
    whole = 0.1 + sum(layer["ms"][-1] for layer in invented()["layers"].values())
    assert profile.dense_ms == profile.predict(network) == pytest.approx(whole)
    weights = pruning.prunable(network)
    zeros = round(0.8 * sum(weight.numel() for weight in weights.values()))
    masks = pruning.compute_masks(network, zeros)
    pruning.apply(network, masks)
    expected = 0.1
    for name, layer in invented()["layers"].items():
        expected += np.interp(int(masks[f"{name}.weight"].sum()), layer["kept"], layer["ms"])
    assert profile.predict(network) == pytest.approx(expected)


def test_what_is_excluded_and_everything_else_is_a_constant(written):
    network = models.build("resnet20", 2)
    profile = profiles.read(written, network, "resnet20", 16)
    for exclude in (), ("conv1", "layer2"):
        shares = profile.shares(network, exclude)
        assert list(shares) == list(pruning.prunable(network, exclude))
        assert sum(share.cost[-1] for share in shares.values()) == pytest.approx(1)


def test_a_time_is_kept_by_weights_that_are_cheaper_than_those_of_one_threshold(written):
    torch.manual_seed(0)
    network = models.build("resnet20", 2)
    profile = profiles.read(written, network, "resnet20", 16)
    zeros = round(0.9 * sum(weight.numel() for weight in pruning.prunable(network).values()))
    costs = profile.shares(network)

    def pruned(masks: pruning.Masks) -> float:
        again = models.build("resnet20", 2)
        again.load_state_dict(network.state_dict())
        pruning.apply(again, masks)
        assert sum(zero for zero, _ in pruning.count_zeros(again).values()) == zeros
        return profile.predict(again)

    free = pruned(pruning.compute_masks(network, zeros))
    lowest = budgets.lowest_share(network, [zeros], costs) * profile.dense_ms
    assert lowest < 0.9 * free
    for ms in (0.99 * free, (lowest + free) / 2, 1.001 * lowest):
        found = pruned(budgets.compute_masks(network, (zeros, ms / profile.dense_ms), costs))
        assert 0.97 * ms < found <= ms * (1 + 1e-6)
    assert pruned(budgets.compute_masks(network, (zeros, 1.0), costs)) == pytest.approx(free, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": 2}, "is a profile of version 2, not 1"),
        ({"profile": "2" * 1000}, f"is a profile of version {'2' * 40}, not 1"),
        ({"arch": "a" * 1000}, f"is a profile of {'a' * 60} for 16 pixels, not of resnet20 for 16"),
        ({"arch": "resnet18"}, "is a profile of resnet18 for 16 pixels, not of resnet20 for 16"),
        ({"image_size": 32}, "is a profile of resnet20 for 32 pixels, not of resnet20 for 16"),
        ({"layers": {}}, "is a profile of other layers than those of resnet20"),
        ({"layers": []}, "is not a profile"),
        ({"layers": {"conv1": {"kept": [432], "ms": [1.0]}}}, "is not a profile"),
        ({"layers": {"conv1": {"kept": [5, 5], "ms": [1.0, 2.0]}}}, "is not a profile"),
        ({"layers": {"conv1": {"kept": [0, 5], "ms": [1.0, 2.0]}}}, "is not a profile"),
        ({"layers": {"conv1": {"kept": [1, 5], "ms": [-1.0, 2.0]}}}, "is not a profile"),
        ({"layers": {"conv1": {"kept": [1, 5], "ms": [2.0, 1.0]}}}, "is not a profile"),
        ({"layers": {"conv1": {"kept": ["a", "b"], "ms": [1.0, 2.0]}}}, "is not a profile"),
        ({"layers": {"conv1": {"kept": [1, 5], "ms": [1, 10**400]}}}, "is not a profile"),
        ({"other_ms": 10**400}, "is not a profile"),
        ({"threads": "2"}, "is not a profile"),
        ({"device": None}, "is not a profile"),
        ({"other_ms": None}, "is not a profile"),
        ({"other_ms": float("nan")}, "is not a profile"),
    ],
)
def test_what_is_no_profile_of_the_network_is_refused_in_a_line(written, change, message):
    written.write_text(json.dumps(invented() | change))
    with pytest.raises(Failure, match=message):
        profiles.read(written, models.build("resnet20", 2), "resnet20", 16)


@pytest.mark.parametrize("content", [b"", b"[]", b"1", b"{", b'{"profile": 1}', b"\xff\xfe", b"[" * 100_000])
def test_any_bytes_are_refused_in_a_line(written, content):
    written.write_bytes(content)
    with pytest.raises(Failure, match="is not a profile"):
        profiles.read(written, models.build("resnet20", 2), "resnet20", 16)


@pytest.fixture(scope="module")
def dense(images, tmp_path_factory) -> tuple[Path, tuple]:
    """A directory with a dense network and a profile, and the flags that go with it."""
    directory = tmp_path_factory.mktemp("time")
    line = ("--dataset", images, "--checkpoint-dir", directory, *SMALL, *SMALL_PRUNING)
    succeed("main.py", *line)
    (directory / profiles.NAME).write_text(json.dumps(invented()))
    return directory, line


@pytest.mark.parametrize("shot", ["single", "iter"])
def test_a_time_is_kept_at_exact_sparsity_and_reported(dense, shot):
    directory, line = dense
    printed = succeed("main.py", *line, "-pr", "0.8", "-shot", shot, "--ms", "2.4")
    name = f"80percent_{shot}_ms2.4_ckpt.pth"
    checkpoint = checkpoints.load_checkpoint(directory / name)
    network = checkpoints.build_network(checkpoint)
    weights = sum(weight.numel() for weight in pruning.prunable(network).values())
    assert sum(zeros for zeros, _ in pruning.count_zeros(network).values()) == round(0.8 * weights)
    profile = profiles.read(directory / profiles.NAME, network, "resnet20", 16)
    assert 2.2 < profile.predict(network) == checkpoint["predicted_ms"] <= 2.4
    assert checkpoint["settings"]["profile"] == profile.identity
    assert checkpoint["predicted_for"] == "a board, 1 thread"
    again = packed.unpack(packing.pack(checkpoint))
    assert all(again[name] == checkpoint[name] for name in ("predicted_ms", "predicted_for"))
    said = f"{checkpoint['predicted_ms']:.3g} ms predicted"
    assert f", {said} (at most 2.4 ms asked)" in printed and printed.count("asked") == 1
    images = line[1]
    printed = succeed("test.py", "--checkpoint-dir", directory, "--dataset", images, "--device", "cpu")
    assert f"{name}: {said}, at most 2.4 ms asked" in printed


def test_steps_end_with_as_many_weights_in_each_layer_as_pruning_at_once(dense):
    directory, line = dense
    succeed("main.py", *line, "-pr", "0.8", "-shot", "single", "iter", "--ms", "2.4")
    single, steps = (
        pruning.count_zeros(
            checkpoints.build_network(checkpoints.load_checkpoint(directory / f"80percent_{mode}_ms2.4_ckpt.pth"))
        )
        for mode in ("single", "iter")
    )
    assert single == steps and len({zeros / weights for zeros, weights in single.values()}) > 5


def test_a_result_belongs_to_its_profile(dense, tmp_path):
    directory, line = dense
    command = ("main.py", *line, "-pr", "0.8", "-shot", "single", "--ms", "2.5")
    succeed(*command)
    assert "is finished" in succeed(*command, "--profile", directory / profiles.NAME)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(invented() | {"other_ms": 0.11}))
    done = call(*command, "--profile", other)
    assert done.returncode == 2 and "was made with other settings: profile" in done.stderr


@pytest.mark.parametrize(("factor", "digit"), [(1, 1e-4), (1000, 0.01)])
def test_a_time_that_cannot_be_kept_is_refused_before_any_work(dense, tmp_path, factor, digit):
    _, line = dense
    slow = invented()
    slow["other_ms"] *= factor
    for layer in slow["layers"].values():
        layer["ms"] = [factor * ms for ms in layer["ms"]]
    (tmp_path / "slow.json").write_text(json.dumps(slow))
    line = (*line, "--profile", tmp_path / "slow.json", "--dry-run")
    command = ("main.py", *line, "-pr", "0.8", "-shot", "iter", "--ms")
    done = call(*command, "0.5")
    assert done.returncode == 2 and not done.stdout
    found = re.search(
        r"^main.py: argument --ms: with 80 % zeros it can be from ([\d.]+) to ([\d.]+), not 0.5$", done.stderr
    )
    for text, step, code in (found[1], 0, 0), (found[1], -digit, 2), (found[2], 0, 0), (found[2], digit, 2):
        assert call(*command, f"{float(text) + step:.6g}").returncode == code, (text, step)


def test_the_time_of_the_dense_network_is_no_limit_that_is_refused(dense, tmp_path):
    """Where layers take the same time with any number of weights, it is the only one that there is."""
    _, line = dense
    constant = invented()
    for place, layer in enumerate(constant["layers"].values()):
        layer["ms"] = [0.1 + 0.0123 * place] * len(layer["ms"])
    (tmp_path / "constant.json").write_text(json.dumps(constant))
    whole = constant["other_ms"] + sum(layer["ms"][0] for layer in constant["layers"].values())
    line = (*line, "--profile", tmp_path / "constant.json", "--dry-run", "-pr", "0.8", "-shot", "single")
    assert call("main.py", *line, "--ms", f"{whole:.6g}").returncode == 0
    assert call("main.py", *line, "--ms", f"{1.001 * whole:.6g}").returncode == 2


def test_a_dense_network_with_zeros_that_the_time_does_not_allow_is_refused_for_it(dense, tmp_path):
    directory, line = dense
    checkpoint = checkpoints.load_checkpoint(directory / "ckpt.pth")
    network = checkpoints.build_network(checkpoint)
    pruning.apply(network, pruning.compute_masks(network, 100_000))
    checkpoints.save(tmp_path / "ckpt.pth", checkpoint | {"net": network.state_dict()})
    profile = ("--checkpoint-dir", tmp_path, "--profile", directory / profiles.NAME)
    done = call("main.py", *line, *profile, "-pr", "0.8", "-shot", "single", "--ms", "0.5")
    assert done.returncode == 2 and "argument --ms: with 80 % zeros it can be from " in done.stderr


def test_a_dense_network_with_a_layer_of_zeros_is_pruned_to_a_time(dense, tmp_path):
    directory, line = dense
    checkpoint = checkpoints.load_checkpoint(directory / "ckpt.pth")
    net = {name: value.clone() for name, value in checkpoint["net"].items()}
    net["layer1.0.conv1.weight"].zero_()
    checkpoints.save(tmp_path / "ckpt.pth", checkpoint | {"net": net, "zeros": 2304})
    profile = ("--checkpoint-dir", tmp_path, "--profile", directory / profiles.NAME)
    printed = succeed("main.py", *line, *profile, "-pr", "0.8", "-shot", "single", "iter", "--ms", "2.4")
    assert printed.count("sparsity 80.00 %") == 3  # the last step's, too
    assert printed.count("at most 2.4 ms asked") == 2


def test_a_missing_profile_is_named(images, tmp_path):
    done = call("main.py", "--dataset", images, "--checkpoint-dir", tmp_path, *SMALL, "-pr", "0.5", "-shot", "single",
                "--ms", "1")  # fmt: skip
    assert done.returncode == 2
    assert (
        done.stderr
        == f"main.py: {tmp_path}/profile.json is missing: deploy.py CHECKPOINT --profile measures this machine\n"
    )
