"""Limits on what one image costs, `--macs` and `--ms`, through the commands."""

import json
import re
from pathlib import Path

import pytest
from conftest import SMALL, SMALL_PRUNING, call, invented_profile, succeed

import checkpoints
import profiles
import pruning
from deployment import packing
from formats import packed


@pytest.fixture(scope="module")
def dense(images, tmp_path_factory) -> tuple[Path, tuple]:
    """A directory with a dense network and a profile, and the flags that go with it."""
    directory = tmp_path_factory.mktemp("time")
    line = ("--dataset", images, "--checkpoint-dir", directory, *SMALL, *SMALL_PRUNING)
    succeed("main.py", *line)
    (directory / profiles.NAME).write_text(json.dumps(invented_profile()))
    return directory, line


@pytest.mark.parametrize("shot", ["single", "iter"])
def test_a_budget_of_multiply_adds_is_kept_at_exact_sparsity(dense, shot):
    directory, line = dense
    printed = succeed("main.py", *line, "-pr", "0.5", "-shot", shot, "--macs", "0.3")
    name = f"50percent_{shot}_macs0.3_ckpt.pth"
    network = checkpoints.build_network(checkpoints.load_checkpoint(directory / name))
    zeros, weights = (sum(column) for column in zip(*pruning.count_zeros(network).values()))
    assert zeros == round(0.5 * weights)
    whole, left = (sum(column) for column in zip(*pruning.count_macs(network, 16).values()))
    assert 0.29 < left / whole <= 0.3
    assert f" ({100 * left / whole:.2f} %, at most 30 % asked)" in printed and printed.count("asked") == 1
    succeed("main.py", *line, "-pr", "0.5", "-shot", shot)
    free = checkpoints.build_network(checkpoints.load_checkpoint(directory / f"50percent_{shot}_ckpt.pth"))
    assert sum(nonzero for _, nonzero in pruning.count_macs(free, 16).values()) > 0.4 * whole
    printed = succeed("test.py", "--checkpoint-dir", directory, "--dataset", line[1], "--device", "cpu")
    assert f"{name}: {100 * left / whole:.2f} % of the MACs are left, at most 30 % asked" in printed


def test_a_budget_that_cannot_be_kept_is_refused_before_any_work(dense):
    _, line = dense
    done = call("main.py", *line, "-pr", "0.5", "-shot", "iter", "--macs", "0.05")
    assert done.returncode == 2 and not done.stdout
    assert re.search(r"^main.py: argument --macs: with 50 % zeros it can be from 0\.\d+ to 1, not 0.05$", done.stderr)
    lowest = float(re.search(r"from (0\.\d+) to", done.stderr)[1])
    assert call("main.py", *line, "-pr", "0.5", "-shot", "iter", "--macs", lowest, "--dry-run").returncode == 0
    assert call("main.py", *line, "-pr", "0.5", "-shot", "iter", "--macs", lowest - 1e-3, "--dry-run").returncode == 2


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
    printed = succeed("test.py", "--checkpoint-dir", directory, "--dataset", line[1], "--device", "cpu")
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
    other.write_text(json.dumps(invented_profile() | {"other_ms": 0.11}))
    done = call(*command, "--profile", other)
    assert done.returncode == 2 and "was made with other settings: profile" in done.stderr


@pytest.mark.parametrize(("factor", "digit"), [(1, 1e-4), (1000, 0.01)])
def test_a_time_that_cannot_be_kept_is_refused_before_any_work(dense, tmp_path, factor, digit):
    _, line = dense
    slow = invented_profile()
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
    constant = invented_profile()
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
