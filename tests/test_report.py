"""test.py and the tables, CSV files and figures behind it: what is printed is what was found."""

import argparse
import csv
import gc
import os
import re
import shutil
import statistics
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, SMALL_PRUNING, call, succeed

import checkpoints
import data
import engine
import models
import pruning
import report
from deployment import packing

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def experiment(images, tmp_path_factory) -> Path:
    """A directory with the dense network, two one-shot results, an iterative one and a control."""
    folder = tmp_path_factory.mktemp("report") / "checkpoint"
    line = (*SMALL, *SMALL_PRUNING, "--dataset", images, "--checkpoint-dir", folder)
    succeed("main.py", *line, "-pr", "0.5", "0.875", "-shot", "single", "--control")
    succeed("main.py", *line, "-pr", "0.875", "-shot", "iter")
    return folder


@pytest.fixture
def folder(experiment, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(experiment, tmp_path / "checkpoint")


def read_csv(path: Path, key: str = "file") -> dict[str, dict]:
    with open(path) as file:
        return {row[key]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize(
    ("mode", "sparsity", "options", "control", "name"),
    [
        ("single", 0.9, {}, False, "90percent_single_ckpt.pth"),
        ("iter", 0.875, {"allocation": "erk", "retrain": "plain"}, False, "87.5percent_iter_erk_plain_ckpt.pth"),
        ("iter", 0.9, {"rewind": 5}, True, "90percent_iter_control_rewind5_ckpt.pth"),
        ("iter", 0.9, {"macs": 0.15, "rewind": 5}, False, "90percent_iter_macs0.15_rewind5_ckpt.pth"),
        ("iter", 0.9, {"macs": 0.15}, True, "90percent_iter_control_ckpt.pth"),
        ("single", 0.9, {"ms": 1.2}, False, "90percent_single_ms1.2_ckpt.pth"),
        ("single", None, {"allocation": "lamp", "retrain": "plain"}, False, "control_single_plain_ckpt.pth"),
    ],
)
def test_file_names_are_parsed_as_they_are_written(mode, sparsity, options, control, name):
    args = argparse.Namespace(
        **{"allocation": "global", "macs": None, "ms": None, "retrain": "distilled", "rewind": None} | options
    )
    assert report.file_name(mode, sparsity, args, control) == name
    found = report.RESULT_NAME.fullmatch(name).groupdict()
    assert found["mode"] == mode
    assert found["percent"] == (None if sparsity is None else f"{100 * sparsity:g}")
    assert (found["retrain"] or "distilled") == args.retrain
    assert found["rewind"] == (str(args.rewind) if args.rewind else None)
    assert (found["control"] is not None) == control
    for suffix in ".packed", ".bf16.packed":
        assert report.RESULT_NAME.fullmatch(name.replace(".pth", suffix))


def test_the_report_counts_and_measures(folder, images):
    pruned = folder / "87.5percent_iter_ckpt.pth"
    for dtype in "fp32", "bf16":
        content = packing.pack(checkpoints.load_checkpoint(pruned), dtype)
        checkpoints.write(packing.name(pruned, dtype), content)
    printed = succeed("test.py", "--checkpoint-dir", folder, "--dataset", images, "--device", "cpu", "--layers")
    assert re.search(r"layer3\.2\.conv2\.weight +0\.00 ", printed)
    assert max(map(len, printed.splitlines())) <= 120
    rows = read_csv(folder / "results.csv")
    packed_files = ["87.5percent_iter_ckpt.bf16.packed", "87.5percent_iter_ckpt.packed"]
    names = ["control_single", "50percent_single", "87.5percent_single", "87.5percent_iter"]
    assert list(rows) == ["ckpt.pth", *(f"{name}_ckpt.pth" for name in names), *packed_files]
    assert [rows[name]["dtype"] for name in (pruned.name, *packed_files)] == ["fp32", "bf16", "fp32"]
    sizes = {"file": packed_files[1], "file_bytes": str((folder / packed_files[1]).stat().st_size)}
    assert rows[packed_files[1]] == rows[pruned.name] | sizes
    assert int(sizes["file_bytes"]) < 0.2 * int(rows[pruned.name]["file_bytes"])
    row, network = rows[pruned.name], models.build("resnet20", 2)
    weights = sum(weight.numel() for weight in pruning.prunable(network).values())
    parameters = sum(parameter.numel() for parameter in network.parameters())
    zeros = round(0.875 * weights)
    assert int(row["zeros"]) == zeros and int(row["nonzero_weights"]) == weights - zeros
    assert float(row["sparsity"]) == pytest.approx(100 * zeros / weights)
    assert float(row["sparsity_all_parameters"]) == pytest.approx(100 * zeros / parameters)
    assert float(row["compression"]) == pytest.approx(parameters / (parameters - zeros))
    macs = pruning.count_macs(checkpoints.build_network(checkpoints.load_checkpoint(pruned)), 16).values()
    dense, nonzero = (sum(column) for column in zip(*macs))
    assert (float(row["macs_dense"]), float(row["macs"])) == (dense / 1e6, nonzero / 1e6)
    assert float(row["mac_ratio"]) == dense / nonzero
    stored = torch.load(pruned, weights_only=True)
    assert float(row["accuracy"]) == stored["acc"] and float(row["accuracy_pruned"]) == stored["pruned_acc"]
    assert float(row["accuracy_dense"]) == torch.load(folder / "ckpt.pth", weights_only=True)["acc"]
    assert float(row["drop"]) == pytest.approx(float(row["accuracy_dense"]) - float(row["accuracy"]))
    assert [rows[name]["epochs"] for name in ("ckpt.pth", "87.5percent_single_ckpt.pth", pruned.name)] == [
        "2",
        "2",
        "6",
    ]
    assert rows["control_single_ckpt.pth"]["control"] == "True"
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_needs_no_training_images(folder, images, tmp_path):
    """Mean and standard deviation are in the files; without them they come from the training images."""
    before = succeed("test.py", "--checkpoint-dir", folder, "--dataset", images, "--device", "cpu")
    alone = tmp_path / "alone"
    shutil.copytree(images / "test", alone / "test")
    assert succeed("test.py", "--checkpoint-dir", folder, "--dataset", alone, "--device", "cpu") == before
    shutil.rmtree(alone / "test" / "dark")
    shutil.copytree(images / "test" / "light", alone / "test" / "dark")
    done = call("test.py", "--checkpoint-dir", folder, "--dataset", alone, "--device", "cpu")
    assert done.returncode == 1 and "was made with other images: test_images folder" in done.stderr
    for path in folder.glob("*.pth"):
        if path.name != "ckpt.pth":
            path.unlink()
    old = torch.load(folder / "ckpt.pth", weights_only=True)
    checkpoints.save(folder / "ckpt.pth", {key: old[key] for key in ("net", "acc", "epoch")})
    size = ("--image-size", "16", "--device", "cpu")
    done = call("test.py", "--checkpoint-dir", folder, "--dataset", alone, *size)
    assert done.returncode == 2 and "has no folder train/" in done.stderr
    succeed("test.py", "--checkpoint-dir", folder, "--dataset", images, *size)


def test_networks_chosen_on_held_out_images_are_measured_on_the_test_images_when_asked(images, tmp_path):
    line = (*SMALL, *SMALL_PRUNING, "--dataset", images, "--checkpoint-dir", tmp_path, "--val-fraction", "0.25")
    succeed("main.py", *line, "-pr", "0.5", "-shot", "single")
    test = ("--checkpoint-dir", tmp_path, "--dataset", images, "--device", "cpu")
    succeed("test.py", *test)
    assert read_csv(tmp_path / "results.csv")["ckpt.pth"]["accuracy_margin"]
    succeed("test.py", *test, "--val-fraction", "0")
    rows = read_csv(tmp_path / "results.csv")
    checkpoint = checkpoints.load_checkpoint(tmp_path / "ckpt.pth")
    batches = data.test_batches(checkpoint, data.load(str(images), tmp_path, 16), CPU)
    score = engine.evaluate(checkpoints.build_network(checkpoint), batches)
    assert float(rows["ckpt.pth"]["accuracy"]) == score.accuracy
    assert float(rows["ckpt.pth"]["loss"]) == pytest.approx(score.loss)
    pruned = rows["50percent_single_ckpt.pth"]
    assert pruned["accuracy_pruned"] == ""
    assert float(pruned["drop"]) == pytest.approx(score.accuracy - float(pruned["accuracy"]))


def test_files_of_the_classic_script_and_of_earlier_versions_are_read(experiment, images, tmp_path):
    for theirs, ours in ("ckpt.pth", "ckpt.pth"), ("50.0percent_single_ckpt.pth", "50percent_single_ckpt.pth"):
        checkpoint = torch.load(experiment / ours, weights_only=True)
        torch.save({key: checkpoint[key] for key in ("net", "acc", "epoch")}, tmp_path / theirs)
    # As version 1 wrote them: the identity of all images, the dense network as `parent`, no mean and deviation.
    old = torch.load(experiment / "87.5percent_single_ckpt.pth", weights_only=True)
    settings = {"arch": "resnet20", "dataset": data.load(str(images), tmp_path, 16).identity, "image_size": 16}
    settings |= {"val_fraction": 0.0, "seed": 0, "mode": "single", "sparsity": 0.875, "retrain": "adaptive"}
    settings |= {"parent": old["settings"]["dense"], "allocation": "global", "recipe": 3, "rewind": 0}
    keys = ("net", "acc", "epoch", "loss", "zeros", "classes", "history", "dense_acc", "pruned_acc")
    name = "87.5percent_single_adaptive_ckpt.pth"
    checkpoints.save(tmp_path / name, {key: old[key] for key in keys} | {"settings": settings})
    succeed("test.py", "--checkpoint-dir", tmp_path, "--dataset", images, "--device", "cpu", "--image-size", "16")
    rows = read_csv(tmp_path / "results.csv")
    assert rows["50.0percent_single_ckpt.pth"]["sparsity"] == "50.0"
    assert rows[name]["retrain"] == "adaptive" and float(rows[name]["accuracy"]) == old["acc"]


LIES = [
    (lambda c: c.update(acc=c["acc"] - 30), "says its accuracy is"),
    (lambda c: c.update(acc=float("nan")), "acc is not a finite number"),
    (lambda c: c.update(dense_acc=1.0), "says the dense accuracy is 1.00 %"),
    (lambda c: c["net"]["conv1.weight"].zero_(), "weights are zero"),
    (lambda c: c["net"]["layer3.2.conv2.weight"].fill_(1e-9), "weights are zero"),
    (lambda c: c["settings"].update(sparsity=0.9), "should be 90 % zero, and is 50.00 %"),
    (lambda c: c["settings"].update(dense="x"), "was pruned from another network"),
    (lambda c: c.update(test_images="x"), "was made with other images"),
    (lambda c: c.update(mean=[0.5, 0.5]), "its mean is not three fractions"),
    (lambda c: c.update(std=[0.5, 0.5, 0.0]), "its std is not three fractions"),
    (lambda c: c["settings"].update(val_fraction=float("nan")), "its settings are not in the form"),
    (lambda c: c["settings"].update(lr=torch.ones(2)), "its settings are not in the form"),
]


def test_contradictions_are_named(folder, images):
    """Each lie is told by a copy of its own: 50.0percent, 50.00percent, 50.000percent, ..."""
    liars = {}
    for index, (change, message) in enumerate(LIES, start=1):
        checkpoint = torch.load(folder / "50percent_single_ckpt.pth", weights_only=True)
        change(checkpoint)
        name = f"50.{'0' * index}percent_single_ckpt.pth"
        checkpoints.save(folder / name, checkpoint)
        liars[name] = message
    done = call("test.py", "--checkpoint-dir", folder, "--dataset", images, "--device", "cpu")
    assert done.returncode == 1
    for name, message in liars.items():
        assert any(f"/{name} " in line and message in line for line in done.stderr.splitlines()), (name, message)
    for name in "50percent_single_ckpt.pth", "87.5percent_iter_ckpt.pth":
        assert f"/{name} " not in done.stderr and name in done.stdout


def test_bad_files_are_named_and_the_others_reported(folder, images):
    (folder / "87.5percent_iter_ckpt.pth").write_text("hello")
    checkpoints.save(folder / "75percent_iter_ckpt.pth", {"net": models.build("resnet20", 3).state_dict()})
    (folder / "50percent_single_ckpt.pth").rename(folder / "60percent_single_ckpt.pth")
    done = call("test.py", "--checkpoint-dir", folder, "--dataset", images, "--device", "cpu")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 3, done.stderr
    for message in (
        "iter_ckpt.pth is not a checkpoint",
        "has 3 outputs",
        "was made for 50 %, not for what its name says",
    ):
        assert message in done.stderr
    assert "87.5percent_single_" in done.stdout


def test_files_of_any_name_are_measured_when_they_are_named_and_nothing_is_written(experiment, images, tmp_path):
    names = {"ckpt.pth": "net", "50percent_single_ckpt.pth": "best.pth.tar"}
    for ours, theirs in names.items():
        shutil.copy(experiment / ours, tmp_path / theirs)
    printed = succeed("test.py", *(tmp_path / name for name in names.values()), "--dataset", images, "--device", "cpu")
    assert all(name in printed for name in names.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names.values())


@pytest.mark.slow
def test_several_directories_give_mean_and_standard_deviation(experiment, images, tmp_path):
    folders = [shutil.copytree(experiment, tmp_path / name) for name in "ab"]
    name = "50percent_single_ckpt.pth"
    other = torch.load(folders[1] / name, weights_only=True)
    other["net"]["linear.bias"] += torch.tensor([1e3, 0])  # it always gives the same answer, and says otherwise
    other["settings"] |= {"lr": 1.0, "seed": 1}
    checkpoints.save(folders[1] / name, other)
    done = call("test.py", "--checkpoint-dir", *folders, folders[0], "--dataset", images, "--device", "cpu")
    assert done.returncode == 1 and "over 2 directories" in done.stdout
    assert f"{folders[1] / name} and {folders[0] / name} differ in more than the seed: lr\n" in done.stdout
    assert done.stdout.count("differ in more") == 1
    rows = [read_csv(folder / "results.csv") for folder in folders]
    seeds = read_csv(folders[0] / "seeds.csv", "model")
    assert seeds[name]["seeds"] == "0 1" and seeds["ckpt.pth"]["seeds"] == "0 0"
    for file, row in seeds.items():
        for head, column in ("acc. after %", "accuracy"), ("drop pts", "drop"):
            values = [float(table[file][column]) for table in rows if table[file][column]]
            if values:
                assert float(row[head]) == pytest.approx(statistics.mean(values))
                assert float(row[f"{head} std"]) == pytest.approx(statistics.stdev(values))
    assert (folders[0] / "seeds.png").read_bytes().startswith(b"\x89PNG")


def test_one_network_is_in_memory_at_a_time(experiment, images, tmp_path, monkeypatch):
    """Whatever the number of directories: neither a checkpoint nor a network outlives its turn."""
    alive = weakref.WeakSet()
    load, build = checkpoints.load_checkpoint, checkpoints.build_network

    def load_checkpoint(*arguments):
        assert not alive
        checkpoint = load(*arguments)
        alive.update(checkpoint["net"].values())
        return checkpoint

    def build_network(checkpoint):
        network = build(checkpoint)
        alive.update(network.parameters())
        return network

    folders = [shutil.copytree(experiment, tmp_path / name) for name in "ab"]
    monkeypatch.setattr(checkpoints, "load_checkpoint", load_checkpoint)
    monkeypatch.setattr(checkpoints, "build_network", build_network)
    gc.disable()
    try:
        succeed("test.py", "--checkpoint-dir", *folders, "--dataset", images, "--device", "cpu", "--fresh")
    finally:
        gc.enable()


@pytest.fixture
def measured(monkeypatch, tmp_path) -> list:
    """A user without measurements; the list has an entry for each network that is measured from now on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls, evaluate = [], engine.evaluate
    monkeypatch.setattr(engine, "evaluate", lambda *arguments: calls.append(arguments) or evaluate(*arguments))
    return calls


def test_what_was_measured_is_not_measured_again(folder, images, measured, tmp_path):
    line = ("test.py", "--checkpoint-dir", folder, "--dataset", images, "--device", "cpu", "--layers")
    before, files = succeed(*line), len(list(folder.glob("*.pth")))
    table = (folder / "results.csv").read_bytes()
    assert len(measured) == files
    assert succeed(*line) == before and len(measured) == files
    assert (folder / "results.csv").read_bytes() == table
    moved = shutil.copytree(folder, tmp_path / "moved")  # the bytes of a file count, not where it is
    succeed(*line[:2], moved, *line[3:])
    assert len(measured) == files
    assert succeed(*line, "--fresh") == before and len(measured) == 2 * files
    succeed(*line, "--precision", "bf16")
    assert len(measured) == 3 * files
    checkpoint = torch.load(folder / "50percent_single_ckpt.pth", weights_only=True)
    checkpoint["net"]["linear.bias"] += 1e-3
    checkpoints.save(folder / "50percent_single_ckpt.pth", checkpoint)
    succeed(*line)
    assert len(measured) == 3 * files + 1


def test_a_measurement_depends_on_the_sources_that_test_py_loads():
    script = "import runpy; runpy.run_path('test.py'); import measurements as m; print(*m.sources(), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {Path(line).relative_to(ROOT.resolve()).as_posix() for line in done.stdout.splitlines()}
    assert {"test.py", "engine.py", "data.py", "pruning.py", "checkpoints.py", "models/resnet.py"} < names
    assert {"formats/packed.py", "formats/foreign.py", "images/cifar.py", "images/folders.py"} < names
    assert not names & {"main.py", "deploy.py"}


def test_other_images_are_measured_anew(folder, images, measured, tmp_path):
    line = ("test.py", "--checkpoint-dir", folder, "--device", "cpu", "--val-fraction")
    files = len(list(folder.glob("*.pth")))
    succeed(*line, "0", "--dataset", images)
    other = shutil.copytree(images, tmp_path / "other")
    os.replace(other / "test" / "dark" / "0.png", other / "test" / "light" / "0.png")
    done = call(*line, "0", "--dataset", other)
    assert done.returncode == 1 and done.stderr.count("was made with other images") == files
    assert "accuracy" not in done.stdout and len(measured) == files


def test_no_file_decides_what_was_measured(folder, images, measured, tmp_path):
    """Damaged entries, those of other keys, and what lies beside the checkpoints are not believed."""
    line = ("test.py", "--checkpoint-dir", folder, "--dataset", images, "--device", "cpu")
    before, files = succeed(*line), len(list(folder.glob("*.pth")))
    entries = sorted((tmp_path / "cache" / "pruning-measurements").iterdir())
    assert len(entries) == 2 * files
    contents = [entry.read_bytes() for entry in entries]
    shutil.copytree(entries[0].parent, folder / "pruning-measurements")
    damages = (
        lambda number: contents[number].replace(b'"correct": ', b'"correct": 1').replace(b"resnet20", b"resnet56"),
        lambda number: contents[number - 1],
        lambda number: contents[number][:-9],
        lambda _: b"[" * 100_000,
        lambda _: b"",
    )
    for times, damage in enumerate(damages, start=2):
        for number, entry in enumerate(entries):
            entry.write_bytes(damage(number))
        assert succeed(*line) == before
        assert len(measured) == times * files
        assert [entry.read_bytes() for entry in entries] == contents


def test_a_file_that_changes_meanwhile_is_named_and_not_kept(folder, images, measured, monkeypatch):
    images_of = data.of_checkpoints

    def of_checkpoints(*arguments):
        shutil.copy(folder / "ckpt.pth", folder / "87.5percent_iter_ckpt.pth")
        return images_of(*arguments)

    monkeypatch.setattr(data, "of_checkpoints", of_checkpoints)
    done = call("test.py", "--checkpoint-dir", folder, "--dataset", images, "--device", "cpu")
    assert done.returncode == 1 and "87.5percent_iter_ckpt.pth changed while it was measured" in done.stderr
    assert len(measured) == len(list(folder.glob("*.pth"))) - 1


def test_missing_and_unfinished_results_are_named(experiment, images, tmp_path):
    """One line a directory, and not hundreds."""
    folders = [shutil.copytree(experiment, tmp_path / name) for name in ("whole", "partly", "orphan")]
    for name in "50percent_single_ckpt.pth", "87.5percent_iter_ckpt.pth":
        (folders[1] / name).unlink()
    (folders[1] / "resume").mkdir()
    (folders[1] / "resume" / "87.5percent_iter_ckpt.pt").write_bytes(b"")
    (folders[2] / "ckpt.pth").unlink()
    empty = [tmp_path / f"empty{number}" for number in range(20)]
    for path in empty:
        path.mkdir()
    line = ("--dataset", images, "--device", "cpu")
    printed = succeed("test.py", "--checkpoint-dir", *folders, empty[0], *line)
    assert printed.splitlines()[-3:] == [
        f"{empty[0]} holds no checkpoint (*.pth, *.packed): python main.py makes them",
        f"{folders[1]} lacks 50percent_single_ckpt.pth, 87.5percent_iter_ckpt.pth, "
        "holds the state of an interrupted 87.5percent_iter_ckpt",
        f"{folders[2]} has no ckpt.pth",
    ]
    printed = succeed("test.py", "--checkpoint-dir", *empty, *folders, *line)
    assert printed.count("holds no checkpoint") == 20 and printed.endswith("\nand 2 more lines like these\n")
    assert "lacks" not in succeed("test.py", "--checkpoint-dir", folders[0], *line)
    assert call("test.py", "--checkpoint-dir", *empty, *line).returncode == 2
    done = call("test.py", "--checkpoint-dir", folders[0], tmp_path / "typo", *line)
    assert done.returncode == 2 and "typo is not a directory" in done.stderr and not done.stdout


def row(**changes) -> report.Row:
    score = engine.Score(80, 100, 0.5, 0)
    facts = {"arch": "resnet20", "parameters": 4, "epochs": 1}
    made = report.Row.of(Path(__file__), "made", facts, {"a": (1, 4)}, {"a": (8, 4)}, score, None)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_error_bars_are_the_interval_of_the_table_or_over_seeds_the_standard_deviation():
    one = [row(sparsity=90.0, accuracy=80.0), row(sparsity=50.0, accuracy=85.0)]
    xs, ys, bars = report.curve(one, "sparsity", "accuracy")
    assert (xs, ys) == ([50.0, 90.0], [85.0, 80.0])
    assert bars == [one[1].accuracy_margin, one[0].accuracy_margin]
    assert bars[0] == pytest.approx(100 * report.margin(80, 100)) and 7 < bars[0] < 8
    three = [row(sparsity=90.0, accuracy=value) for value in (79.0, 80.0, 84.0)]
    assert report.curve(three, "sparsity", "accuracy") == ([90.0], [81.0], [pytest.approx(7**0.5)])


def test_the_margin_is_half_the_wilson_interval():
    z, n, p = 1.96, 10_000, 0.9
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    upper = center + report.margin(9_000, 10_000)
    # The bounds p0 of the interval solve (p - p0)^2 = z^2 p0 (1 - p0) / n.
    assert (p - upper) ** 2 == pytest.approx(z**2 * upper * (1 - upper) / n)
