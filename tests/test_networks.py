"""Networks other than ResNets train, are pruned, resume bit for bit, are reported and packed."""

import pytest
from conftest import SMALL, SMALL_PRUNING, call, contents, succeed, write_images

import checkpoints
import engine
import models
import pruning
from deployment import packing

pytestmark = pytest.mark.slow
# The last one has dropout. Attention and integer buffers are in networks that are too large for a test.
FAMILIES = ["wrn-16-4", "torchvision:squeezenet1_1"]  # others take a minute


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_network_goes_through_all_commands(arch, tmp_path, monkeypatch):
    images = write_images(tmp_path / "shades", train=12, test=4)
    settings = (*SMALL, *SMALL_PRUNING, "--arch", arch, "--epochs", "1", "--image-size", "32", "--dataset", images)
    experiment = (*settings, "--retrain-epochs", "1", "-pr", "0.5", "-shot", "single")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    succeed("main.py", *experiment, "--checkpoint-dir", whole)
    for steps, stage in (0, "ckpt.pth"), (3, "50percent_single_ckpt.pth"):
        left = [False] * steps + [True]
        monkeypatch.setattr(engine, "stop_requested", lambda left=left: bool(left) and left.pop(0))
        done = call("main.py", *experiment, "--checkpoint-dir", stopped)
        assert f"stopped in {stage}, epoch 1 of 1; the same command resumes" in done.stderr
    succeed("main.py", *experiment, "--checkpoint-dir", stopped)
    assert contents(stopped) == contents(whole)

    path = whole / "50percent_single_ckpt.pth"
    checkpoint = checkpoints.load_checkpoint(path)
    assert (checkpoint["arch"], checkpoint["settings"]["arch"]) == (arch, arch)
    assert pruning.sparsity(checkpoints.build_network(checkpoint)) == pytest.approx(0.5, abs=1e-6)
    assert models.outputs(arch, checkpoint["net"]) == 2
    succeed("test.py", "--checkpoint-dir", whole, "--dataset", images, "--device", "cpu")
    assert f",{arch}," in (whole / "results.csv").read_text()
    checkpoints.write(packing.name(path), packing.pack(checkpoint))
    again = checkpoints.load_checkpoint(packing.name(path))
    assert checkpoints.digest(again["net"]) == checkpoints.digest(checkpoint["net"])
    path.with_suffix(".packed").unlink()
    printed = succeed("deploy.py", path, "--dataset", images, "--rounds", "1", "--threads", "1", "--onnx")
    assert "sparse engine" in printed and path.with_suffix(".onnx").exists()
