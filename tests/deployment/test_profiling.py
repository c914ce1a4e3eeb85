"""deploy.py --profile measures the layers of a network in the engine."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL, call, succeed
from networks import one_thread, pruned  # noqa: F401 (an automatic fixture)

import models
import profiles
import pruning
from deployment import profiling, tables
from deployment.runtimes import ENGINE, Runtime
from utils import Failure


def test_networks_are_pruned_to_a_density_in_every_layer():
    network = pruned("resnet20", 0.3)
    for density in (0.01, 0.5, 1.0):
        for name, weight in pruning.prunable(profiling.pruned_to(network, density)).items():
            assert int(weight.count_nonzero()) == max(1, round(density * weight.numel())), name
    half = profiling.pruned_to(network, 0.2)
    for weight, original in zip(pruning.prunable(half).values(), pruning.prunable(network).values()):
        assert torch.equal(weight[weight != 0], original[weight != 0])


@pytest.mark.slow
def test_a_profile_is_written_and_read(images, tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "DENSITIES", (0.02, 0.2, 1.0))  # each takes a quarter of a second
    line = ("--dataset", images, "--checkpoint-dir", tmp_path, *SMALL)
    succeed("main.py", *line)
    printed = succeed("deploy.py", tmp_path / "ckpt.pth", "--profile", "--rounds", "1", "--threads", "1")
    network = models.build("resnet20", 2)
    profile = profiles.read(tmp_path / profiles.NAME, network, "resnet20", 16)
    assert printed == (
        f"{tmp_path}/profile.json: 20 layers, {profile.dense_ms:.3g} ms for one image with all weights\n"
    )
    assert profile.dense_ms > 0 and all(ms[-1] > 0 for _, ms in profile.layers.values())
    sparse = profiling.pruned_to(network, 0.02)
    assert profile.predict(sparse) < profile.dense_ms
    done = call("deploy.py", tmp_path / "ckpt.pth", "--profile")
    assert done.returncode == 2 and "exists, and results may depend on it" in done.stderr
    assert json.loads((tmp_path / profiles.NAME).read_text())["threads"] == 1


def test_nothing_is_measured_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(Failure, match=r"profile\.json cannot be written"):
        profiling.write(argparse.Namespace(), {tmp_path / "ckpt.pth": {}})


def test_predicted_and_measured_time_stand_in_one_line():
    def runtime(checkpoint: str, name: str) -> Runtime:
        seconds = {(1, 1): [0.0021, 0.002, 0.003], (64, 1): [0.1], (1, 2): [0.0015]}
        return Runtime(checkpoint, name, 90.0, 1, 1, lambda _: None, lambda x: x, False, seconds=seconds)

    found = {
        Path("a/ms_ckpt.pth"): {"predicted_ms": 1.98, "predicted_for": "a board\x1b, 1 thread"},
        Path("a/ckpt.pth"): {},
    }
    runtimes = [runtime(str(path), name) for path in found for name in ("PyTorch fp32", ENGINE)]
    assert tables.predictions(found, runtimes) == [
        "ms_ckpt.pth: 1.98 ms predicted for a board\\x1b, 1 thread; measured 2.1 ms (1 thread), 1.5 ms (2 threads)"
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--profile", "--onnx"), "--profile and --onnx exclude each other"),
        (("--profile", "--dtype", "bf16"), "--profile and --dtype exclude each other"),
        (("--target", "web", "--out", "x", "--profile"), "--target and --profile exclude each other"),
        (("--target", "web", "--out", "x", "--safetensors"), "--target and --safetensors exclude each other"),
        (("--target", "web"), "--target and --out need each other"),
    ],
)
def test_flags_that_exclude_each_other_are_refused(tmp_path, flags, message):
    done = call("deploy.py", tmp_path / "ckpt.pth", *flags)
    assert (done.returncode, done.stderr) == (2, f"deploy.py: {message}\n")
