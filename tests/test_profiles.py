"""Profiles of a device: what is read from a file, and what it says about networks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import invented_profile

import budgets
import models
import profiles
import pruning
from utils import Failure


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / profiles.NAME
    path.write_text(json.dumps(invented_profile()))
    return path


def test_the_prediction_is_read_off_the_profile(written):
    torch.manual_seed(0)
    network = models.build("resnet20", 2)
    profile = profiles.read(written, network, "resnet20", 16)
    whole = 0.1 + sum(layer["ms"][-1] for layer in invented_profile()["layers"].values())
    assert profile.dense_ms == profile.predict(network) == pytest.approx(whole)
    weights = pruning.prunable(network)
    zeros = round(0.8 * sum(weight.numel() for weight in weights.values()))
    masks = pruning.compute_masks(network, zeros)
    pruning.apply(network, masks)
    expected = 0.1
    for name, layer in invented_profile()["layers"].items():
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
    written.write_text(json.dumps(invented_profile() | change))
    with pytest.raises(Failure, match=message):
        profiles.read(written, models.build("resnet20", 2), "resnet20", 16)


@pytest.mark.parametrize("content", [b"", b"[]", b"1", b"{", b'{"profile": 1}', b"\xff\xfe", b"[" * 100_000])
def test_any_bytes_are_refused_in_a_line(written, content):
    written.write_bytes(content)
    with pytest.raises(Failure, match="is not a profile"):
        profiles.read(written, models.build("resnet20", 2), "resnet20", 16)
