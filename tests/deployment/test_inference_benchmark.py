"""The benchmarks of inference measure what they say, and refuse bad input."""

import csv
import multiprocessing
import threading
from types import SimpleNamespace

import pytest
from conftest import SMALL, call, load_script, succeed
from networks import one_thread  # noqa: F401 (an automatic fixture)
from torch import nn

import checkpoints
from deployment import packing

SCRIPT = "benchmarks/inference.py"


class Process(threading.Thread):
    """A runtime's process that starts at once, because it imports nothing anew."""

    def kill(self) -> None:
        pass


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    directory = tmp_path_factory.mktemp("benchmark")
    succeed("main.py", *SMALL, "--dataset", images, "--checkpoint-dir", directory)
    return directory / "ckpt.pth"


@pytest.fixture(autouse=True)
def in_threads(monkeypatch):
    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Process)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)


def test_every_runtime_is_measured_and_compared(trained, images, tmp_path):
    names = ("sparse engine", "PyTorch fp32", "PyTorch bf16")
    flags = ("--prune", "0.9", "--runtimes", *names, "--rounds", "2", "--threads", "1", "--csv", tmp_path / "out.csv")
    printed = succeed(SCRIPT, trained, "--dataset", images, *flags)
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(row["checkpoint"], row["runtime"]) for row in rows]
    assert found == [(str(trained), name) for name in names] + [(f"{trained}, 90 % pruned", names[0])]
    assert [row["accuracy"] != "" for row in rows] == [True, True, True, False]
    assert [float(row["sparsity"]) for row in rows] == pytest.approx([0, 0, 0, 90], abs=1e-3)
    for row in rows:
        assert 0 < float(row["seconds_batch1_threads1"]) < float(row["seconds_batch64_threads1"])
        assert float(row["largest_difference"]) < (0.1 if "bf16" in row["runtime"] else 1e-5)
        assert row["runtime"] in printed


def test_a_runtime_that_fails_is_named_and_the_others_are_measured(trained, images, monkeypatch):
    script = load_script(SCRIPT)

    def missing(*_arguments):
        raise ImportError("no module named openvino\nmore")

    monkeypatch.setitem(script.RUNTIMES, "OpenVINO fp32", (missing,))
    flags = ("--runtimes", "OpenVINO fp32", "sparse engine", "--rounds", "1", "--threads", "1")
    done = call(SCRIPT, trained, "--dataset", images, *flags)
    assert done.returncode == 0
    assert done.stderr == "inference.py: OpenVINO fp32 is not measured: no module named openvino\n"
    assert "sparse engine" in done.stdout and "OpenVINO" not in done.stdout


def test_accuracy_stands_beside_multiply_adds_and_time(images, tmp_path):
    directories = (tmp_path / "0", tmp_path / "1")
    for seed, folder in enumerate(directories):
        line = (*SMALL, "--dataset", images, "--checkpoint-dir", folder, "--seed", seed)
        for flags in ("--control",), ("--macs", "0.3"), ("--retrain", "plain"):
            succeed("main.py", *line, "-pr", "0.5", "-shot", "single", "--retrain-epochs", "1", *flags)
    done = call("benchmarks/tradeoff.py", *directories, "--out", tmp_path / "out.1")
    assert done.returncode == 2 and "results.csv is missing" in done.stderr
    for name in ".", "..", tmp_path / "missing" / "out":
        done = call("benchmarks/tradeoff.py", *directories, "--out", name)
        assert done.returncode == 2 and "is not the name of a file in a directory" in done.stderr
    packed = packing.pack(checkpoints.load_checkpoint(directories[0] / "50percent_single_ckpt.pth"))
    (directories[0] / "50percent_single_ckpt.packed").write_bytes(packed)
    succeed("test.py", "--checkpoint-dir", *directories, "--dataset", images)
    succeed("benchmarks/tradeoff.py", *directories, "--out", tmp_path / "out.1", "--rounds", "1")
    rows, *results = (
        list(csv.DictReader(path.read_text().splitlines()))
        for path in (tmp_path / "out.1.csv", *(folder / "results.csv" for folder in directories))
    )
    ways = ["dense", "control", "global", "macs", "global, plain"]
    assert sorted((row["way"], row["seeds"]) for row in rows) == sorted((way, "2") for way in ways)
    for row in rows:
        same = [float(found["accuracy"]) for found in results[0] + results[1] if found["file"] == row["file"]]
        assert float(row["accuracy"]) == pytest.approx(sum(same) / 2) and float(row["ms"]) > 0
    left = {row["way"]: float(row["macs_left"]) for row in rows}
    assert left["macs"] <= 30 < left["global"]
    assert (tmp_path / "out.1.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name, more, reason",
    [
        ("instructions", [], "ckpt.pth"),
        ("browser", ["."], "has no ort.wasm.min.mjs"),
        ("browser", ["dist"], "ckpt.pth"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, name, more, reason):
    pytest.importorskip("playwright")
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist/ort.wasm.min.mjs").touch()
    (tmp_path / "ckpt.pth").write_text("no checkpoint")
    arguments = [*(tmp_path / folder for folder in more), tmp_path / "ckpt.pth"]
    done = call(f"benchmarks/{name}.py", *arguments, "--out", tmp_path / "out.csv")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and reason in done.stderr, done.stderr
    assert not (tmp_path / "out.csv").exists()


def test_a_network_that_cannot_be_a_model_file_gets_one_line(trained, monkeypatch):
    monkeypatch.setattr(checkpoints, "build_network", lambda _: nn.Linear(1, 1))
    done = call("benchmarks/instructions.py", trained)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"instructions.py: {trained} cannot be a model file: ")
