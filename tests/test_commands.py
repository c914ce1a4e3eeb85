"""main.py and test.py from end to end, as processes, as a user types them."""

import csv
import re
import shutil
import statistics
from copy import deepcopy

import pytest
import torch
from conftest import SMALL, SMALL_PRUNING, command, succeed

import data
import engine
import models
import packed
import pruning
import store
import utils

RESULTS = ["50percent_iter", "50percent_single", "87.5percent_iter", "87.5percent_single"]
WEIGHTS = 270_384  # of resnet20 with two classes


@pytest.fixture(scope="session")
def experiment(images, tmp_path_factory):
    """The whole experiment in one command, and what it printed."""
    folder = tmp_path_factory.mktemp("experiment") / "checkpoint"
    targets = ("-pr", "0.875", "0.5", "-shot", "single", "iter")
    printed = succeed("main.py", *SMALL, *SMALL_PRUNING, *targets, "--dataset", images, "--checkpoint-dir", folder)
    return folder, printed


def net(path) -> dict:
    return torch.load(path, weights_only=True)["net"]


def copy(folder, to):
    """A directory of one's own to damage."""
    return shutil.copytree(folder, to)


def test_the_whole_experiment_leaves_its_checkpoints_and_nothing_else(experiment):
    folder, printed = experiment
    assert f"{folder / 'ckpt.pth'} is missing: training the dense network first" in printed
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [".lock", "ckpt.pth", *(f"{r}_ckpt.pth" for r in RESULTS)]
    )
    for line in ("iter_step1: ", "50percent_iter_final: ", "87.5percent_single_ckpt.pth: test accuracy"):
        assert line in printed


def test_checkpoints_hold_plain_weights_with_exactly_the_zeros_asked_for(experiment):
    folder, _ = experiment
    for name in RESULTS:
        checkpoint = torch.load(folder / f"{name}_ckpt.pth", weights_only=True)
        weights = [v for v in checkpoint["net"].values() if v.dim() in (2, 4)]
        assert sum(w.numel() for w in weights) == WEIGHTS
        zeros = sum(int((w == 0).sum()) for w in weights)
        assert zeros == checkpoint["zeros"] == round(float(name.split("percent")[0]) / 100 * WEIGHTS)
        assert not any(w[w == 0].signbit().any() for w in weights)
        network = models.build("resnet20", 2)
        network.load_state_dict(checkpoint["net"], strict=True)
        epochs = 2 if "single" in name else {"50percent_iter": 2 + 1, "87.5percent_iter": 5 + 1}[name]
        assert len(checkpoint["history"]) == epochs
        assert {"stage", "epoch", "lr", "loss", "accuracy", "sparsity"} <= set(checkpoint["history"][0])
        settings = checkpoint["settings"]
        assert (settings["arch"], settings["image_size"], settings["seed"]) == ("resnet20", 16, 0)
        assert checkpoint["classes"] == ["dark", "light"]


def test_retraining_moved_the_weights_that_were_left(experiment):
    folder, _ = experiment
    dense = net(folder / "ckpt.pth")
    for name in RESULTS:
        pruned = net(folder / f"{name}_ckpt.pth")
        for key, weight in pruned.items():
            if weight.dim() == 4:
                left = weight != 0
                assert (weight != dense[key])[left].float().mean() > 0.99, (name, key)


def test_one_shot_prunes_the_smallest_weights_of_the_dense_network(experiment):
    folder, _ = experiment
    network = models.build("resnet20", 2)
    network.load_state_dict(net(folder / "ckpt.pth"))
    masks = pruning.choose(network, round(0.875 * WEIGHTS))
    pruned = net(folder / "87.5percent_single_ckpt.pth")
    assert all(torch.equal(pruned[name] != 0, mask) for name, mask in masks.items())


def test_pruned_weights_are_zero_at_every_step_of_retraining(experiment, images):
    """Against a retraining by hand that zeroes them after each step: doing it only at the end gives other weights."""
    folder, _ = experiment
    network = models.build("resnet20", 2)
    network.load_state_dict(net(folder / "ckpt.pth"))
    network.to(memory_format=torch.channels_last)
    masks = pruning.choose(network, round(0.875 * WEIGHTS))

    @torch.no_grad()
    def zero() -> None:
        for name, weight in pruning.prunable(network).items():
            weight[~masks[name]] = 0

    teacher = deepcopy(network).eval()
    change = pruning.change(network, masks) / 0.875**0.5
    zero()
    cpu = torch.device("cpu")
    batches = data.TrainBatches(data.load(str(images), folder, 16), 16, 0, cpu)
    dtype = utils.choose_dtype("auto", cpu)
    recipe = {"lr": 0.1 * max(change, 0.5), "schedule": engine.linear, "nesterov": True, "teacher": teacher}
    recipe["average"] = 0.05
    engine.fit(network, batches, stage="87.5percent_single", epochs=2, dtype=dtype, after_step=zero, **recipe)
    for name, value in net(folder / "87.5percent_single_ckpt.pth").items():
        torch.testing.assert_close(network.state_dict()[name], value, msg=name)


def test_a_target_asked_for_alone_gives_the_same_file_and_another_seed_does_not(experiment, images, tmp_path):
    folder, _ = experiment
    shutil.copy(folder / "ckpt.pth", tmp_path)
    alone = (*SMALL, *SMALL_PRUNING, "-pr", "0.875", "--dataset", images, "--checkpoint-dir", tmp_path)
    for mode in "single", "iter":
        succeed("main.py", *alone, "-shot", mode)
        name = f"87.5percent_{mode}_ckpt.pth"
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    succeed("main.py", *alone, "-shot", "single", "--seed", "1", "--force")
    other, first = (net(f / "87.5percent_single_ckpt.pth") for f in (tmp_path, folder))
    assert not torch.equal(other["linear.weight"], first["linear.weight"])


def test_another_seed_gives_another_dense_network(experiment, images, tmp_path):
    folder, _ = experiment
    succeed("main.py", *SMALL, "--dataset", images, "--checkpoint-dir", tmp_path / "1", "--seed", "1")
    assert not torch.equal(net(tmp_path / "1" / "ckpt.pth")["conv1.weight"], net(folder / "ckpt.pth")["conv1.weight"])


def test_the_rate_of_retraining_is_by_what_pruning_took_away(experiment, images, tmp_path):
    """Of one of a hundred epochs: at least 0.05 of --lr, and that for the control, from which nothing is taken."""
    shutil.copy(experiment[0] / "ckpt.pth", tmp_path)
    dense = torch.load(tmp_path / "ckpt.pth", weights_only=True)
    dense["settings"]["epochs"] = 100
    store.save(tmp_path / "ckpt.pth", dense)
    line = (*SMALL, "-shot", "single", "--retrain-epochs", "1", "--dataset", images, "--checkpoint-dir", tmp_path)
    succeed("main.py", *line, "-pr", "0", "0.875")
    network = models.build("resnet20", 2)
    network.load_state_dict(dense["net"])
    change = pruning.change(network, pruning.choose(network, round(0.875 * WEIGHTS)))
    assert 0.1 < change / 0.875**0.5 < 1
    for name, share in ("0percent", 0.05), ("87.5percent", change / 0.875**0.5):
        checkpoint = torch.load(tmp_path / f"{name}_single_ckpt.pth", weights_only=True)
        assert checkpoint["history"][-1]["peak_lr"] == pytest.approx(0.1 * share)


def test_between_steps_of_pruning_the_rate_does_not_go_down(experiment):
    history = torch.load(experiment[0] / "87.5percent_iter_ckpt.pth", weights_only=True)["history"]
    *steps, final = [(entry["peak_lr"], entry["lr"]) for entry in history]
    assert len(steps) == 5 and set(steps) == {(0.05, 0.05)}
    assert final == (0.05, 0.0)  # one epoch of the two that the dense network had


def test_the_control_is_trained_for_as_many_epochs_as_the_largest_target(experiment, images, tmp_path):
    shutil.copy(experiment[0] / "ckpt.pth", tmp_path)
    line = (*SMALL, *SMALL_PRUNING, "-shot", "iter", "--dataset", images, "--checkpoint-dir", tmp_path)
    succeed("main.py", *line, "-pr", "0.5", "0")
    names = "0percent_iter_ckpt.pth", "50percent_iter_ckpt.pth"
    assert (tmp_path / names[1]).read_bytes() == (experiment[0] / names[1]).read_bytes()
    control, pruned = (torch.load(tmp_path / name, weights_only=True) for name in names)
    assert control["zeros"] == 0
    rates = [[(entry["peak_lr"], entry["lr"]) for entry in each["history"]] for each in (control, pruned)]
    assert rates[0] == rates[1] == [(0.05, 0.05)] * 2 + [(0.05, 0.0)]
    alone = succeed("main.py", *line, "-pr", "0")  # by itself as for 90 %, which takes 40, 24, 14.4, 8.6 and 3 %
    assert "0percent_iter_ckpt.pth is there already (step_epochs 2 there, 5 asked): skipped" in alone


def test_other_ways_to_retrain_have_files_of_their_own(experiment, images, tmp_path):
    """plain has the rate of dense training; adaptive is another training by hand, without a teacher."""
    shutil.copy(experiment[0] / "ckpt.pth", tmp_path)
    line = (*SMALL, *SMALL_PRUNING, "-pr", "0.5", "-shot", "single", "--dataset", images, "--checkpoint-dir", tmp_path)
    succeed("main.py", *line, "--retrain", "plain")
    plain = torch.load(tmp_path / "50percent_single_plain_ckpt.pth", weights_only=True)
    assert [entry["lr"] for entry in plain["history"]] == pytest.approx([0.05, 0])
    assert plain["settings"]["recipe"] == 1  # as in files of before there was another
    succeed("main.py", *line, "--retrain", "adaptive", "--retrain-epochs", "8")  # 40 steps: two are averaged
    found = net(tmp_path / "50percent_single_adaptive_ckpt.pth")
    network = models.build("resnet20", 2).to(memory_format=torch.channels_last)
    network.load_state_dict(net(tmp_path / "ckpt.pth"))
    masks = pruning.choose(network, round(0.5 * WEIGHTS))
    pruning.apply(network, masks)
    batches = data.TrainBatches(data.load(str(images), tmp_path, 16), 16, 0, torch.device("cpu"))
    more = {"dtype": utils.choose_dtype("auto", torch.device("cpu")), "after_step": pruning.keeper(network, masks)}
    more |= {"lr": 0.05, "schedule": engine.linear, "nesterov": True, "average": 0.05}  # half of --lr
    engine.fit(network, batches, stage="50percent_single", epochs=8, **more)
    for name, value in found.items():
        torch.testing.assert_close(network.state_dict()[name], value, msg=name)


def test_rewinding_puts_back_the_weights_of_an_early_epoch(experiment, images, tmp_path):
    """The last step of a run, by hand: the early weights under the mask, trained. Without them nothing starts.
    And the same command gives the same dense network, to the byte."""
    shutil.copy(experiment[0] / "ckpt.pth", tmp_path)
    line = (*SMALL, *SMALL_PRUNING, "--rewind", "1", "--dataset", images, "--checkpoint-dir", tmp_path)
    prune = (*line, "-pr", "0.3", "-shot", "iter", "--step-epochs", "8")
    done = command("main.py", *prune)
    assert done.returncode == 2 and "ckpt_epoch1.pt is missing: main.py --rewind 1 --force" in done.stderr
    assert not (tmp_path / "resume").exists()
    # It goes on when they are to be made.
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume" / "redo.json").write_text('{"ckpt.pth": true}')
    assert "is to be made again: training the dense network first" in succeed("main.py", *prune, "-r")
    assert (tmp_path / "ckpt.pth").read_bytes() == (experiment[0] / "ckpt.pth").read_bytes()
    # Nor with those of another training, and what waits is not thrown away for it.
    early = (tmp_path / "ckpt_epoch1.pt").read_bytes()
    store.save(tmp_path / "ckpt_epoch1.pt", torch.load(tmp_path / "ckpt_epoch1.pt") | {"settings": {}})
    (tmp_path / "resume").mkdir()
    store.save(tmp_path / "resume" / "dense.pt", {"settings": {"mode": "single"}, "state": {}})
    done = command("main.py", *prune, "--force")
    assert done.returncode == 2 and "ckpt_epoch1.pt is not of the training of ckpt.pth" in done.stderr
    assert [path.name for path in (tmp_path / "resume").iterdir()] == ["dense.pt"]
    settings = store.load(tmp_path / "ckpt.pth")["settings"]
    store.save(tmp_path / "resume" / "dense.pt", {"settings": settings, "state": {"epoch": 2}})
    (tmp_path / "resume" / "redo.json").write_text('{"ckpt.pth": true}')
    done = command("main.py", *prune, "-r")
    assert done.returncode == 2 and "is past epoch 1 and did not keep its weights" in done.stderr
    (tmp_path / "ckpt_epoch1.pt").write_bytes(early)
    found = torch.load(tmp_path / "30percent_iter_rewind1_ckpt.pth", weights_only=True)
    network = models.build("resnet20", 2)
    network.load_state_dict(net(tmp_path / "ckpt.pth"))
    masks = pruning.choose(network, round(0.3 * WEIGHTS))  # one step of at most 0.4
    network.load_state_dict(torch.load(tmp_path / "ckpt_epoch1.pt", weights_only=True)["net"])
    network.to(memory_format=torch.channels_last)
    pruning.apply(network, masks)
    batches = data.TrainBatches(data.load(str(images), tmp_path, 16), 16, 0, torch.device("cpu"))
    more = {"dtype": utils.choose_dtype("auto", torch.device("cpu")), "after_step": pruning.keeper(network, masks)}
    more |= {"lr": 0.1, "schedule": engine.linear, "nesterov": True}
    more["teacher"] = store.network_of(store.load_checkpoint(tmp_path / "ckpt.pth")).eval()
    for stage, epochs, average in ("last_step", 8, 0.0), ("final", 1, 0.05):
        engine.fit(network, batches, stage=f"30percent_iter_{stage}", epochs=epochs, average=average, **more)
    for name, value in found["net"].items():
        torch.testing.assert_close(network.state_dict()[name], value, msg=name)


def test_accuracy_before_retraining_is_that_of_the_pruned_dense_network(experiment, images):
    folder, _ = experiment
    network = models.build("resnet20", 2)
    network.load_state_dict(net(folder / "ckpt.pth"))
    pruning.apply(network, pruning.choose(network, round(0.875 * WEIGHTS)))
    batches = data.TestBatches(data.load(str(images), folder, 16), torch.device("cpu"))
    checkpoint = torch.load(folder / "87.5percent_single_ckpt.pth", weights_only=True)
    assert checkpoint["pruned_acc"] == engine.evaluate(network, batches).accuracy


def test_choices_are_made_on_images_that_are_held_out(images, tmp_path):
    """main.py measures on them, test.py too without being told, and neither mixes them with the test images."""
    line = (*SMALL, "--dataset", images, "--checkpoint-dir", tmp_path)
    printed = succeed("main.py", *line, "--val-fraction", "0.25")
    assert "ckpt.pth: validation accuracy" in printed
    checkpoint = store.load_checkpoint(tmp_path / "ckpt.pth")
    held_out = data.load(str(images), tmp_path, 16, 0.25)
    score = engine.evaluate(store.network_of(checkpoint), data.TestBatches(held_out, torch.device("cpu")))
    assert (checkpoint["acc"], score.images) == (score.accuracy, 20)
    report = ("--checkpoint-dir", tmp_path, "--dataset", images, "--device", "cpu")
    succeed("test.py", *report)
    # Asked for no held-out images it measures the test images at last, normalised as in training.
    succeed("main.py", *line, "--val-fraction", "0.25", "-pr", "0.5", "-shot", "single", "--retrain-epochs", "1")
    succeed("test.py", *report, "--val-fraction", "0")
    with open(tmp_path / "results.csv") as file:
        dense, pruned = csv.DictReader(file)
    batches = data.TestBatches(held_out, torch.device("cpu"))
    batches.images, batches.labels = (
        getattr(data.load(str(images), tmp_path, 16).test, n) for n in ("images", "labels")
    )
    score = engine.evaluate(store.network_of(checkpoint), batches)
    assert (float(dense["accuracy"]), float(dense["loss"])) == (score.accuracy, pytest.approx(score.loss))
    assert dense["dataset"] == "shades" and pruned["accuracy_pruned"] == ""
    assert float(pruned["drop"]) == pytest.approx(score.accuracy - float(pruned["accuracy"]))
    # A file that does not say it was trained with all images, those that would be held out, too.
    torch.save({"net": checkpoint["net"], "acc": 90.0, "epoch": 1}, tmp_path / "ckpt.pth")
    done = command("main.py", *line, "--val-fraction", "0.25", "-pr", "0.5", "-shot", "single")
    assert done.returncode == 2 and "(val_fraction 0.0 there, 0.25 asked)" in done.stderr


def test_over_several_directories_there_are_mean_and_deviation(experiment, images, tmp_path):
    folders = [copy(experiment[0], tmp_path / name) for name in "ab"]
    liar = torch.load(folders[1] / "50percent_iter_ckpt.pth", weights_only=True)
    liar["net"]["linear.bias"] += torch.tensor([1e3, 0])  # answers always the same, and says otherwise
    store.save(folders[1] / "50percent_iter_ckpt.pth", liar)
    del liar["settings"]["retrain"]  # as in a file from before there was a choice
    store.save(folders[1] / "50percent_iter_plain_ckpt.pth", liar)
    other = torch.load(folders[1] / "50percent_single_ckpt.pth", weights_only=True)
    other["settings"] |= {"lr": 1.0, "seed": 1}
    del other["settings"]["recipe"]
    store.save(folders[1] / "50percent_single_ckpt.pth", other)
    done = command("test.py", "--checkpoint-dir", *folders, folders[0], "--dataset", images, "--device", "cpu")
    assert "over 2 directories" in done.stdout, "one given twice counts once"
    name = "50percent_single_ckpt.pth"
    assert f"{folders[1] / name} and {folders[0] / name} differ in more than the seed: recipe, lr\n" in done.stdout
    assert done.stdout.count("differ in more") == 1
    rows = []
    for folder in folders:
        with open(folder / "results.csv") as file:
            rows.append({row["file"]: row for row in csv.DictReader(file)})
    assert (folders[0] / "seeds.png").read_bytes().startswith(b"\x89PNG")
    with open(folders[0] / "seeds.csv") as file:
        seeds = {row["model"]: row for row in csv.DictReader(file)}
    plain = rows[1]["50percent_iter_plain_ckpt.pth"]
    assert (plain["mode"], plain["retrain"], plain["sparsity_asked"]) == ("iter", "plain", "50.0")
    assert seeds.pop("50percent_iter_plain_ckpt.pth")["seeds"] == "0"
    assert {row["seeds"] for row in seeds.values()} == {"0 0", "0 1"}
    for name, row in seeds.items():
        for head, field in ("acc. after %", "accuracy"), ("drop pts", "drop"):
            values = [float(table[name][field]) for table in rows if table[name][field]]
            if values:
                assert float(row[head]) == pytest.approx(statistics.mean(values))
                assert float(row[f"{head} std"]) == pytest.approx(statistics.stdev(values))


def test_what_is_there_is_skipped_and_force_makes_it_again(experiment, images, tmp_path):
    folder = copy(experiment[0], tmp_path / "checkpoint")
    line = (*SMALL, *SMALL_PRUNING, "-pr", "0.5", "-shot", "single", "--dataset", images, "--checkpoint-dir", folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pth")}
    printed = succeed("main.py", *line, "--lr", "0.05")
    assert "50percent_single_ckpt.pth is there already (lr 0.1 there, 0.05 asked): skipped" in printed
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pth")} == before
    succeed("main.py", *line, "--force")
    changed = {path.name for path in folder.glob("*.pth") if path.stat().st_mtime_ns != before[path.name]}
    assert changed == {"50percent_single_ckpt.pth"}


def test_results_of_other_networks_and_images_are_never_overwritten(experiment, tmp_path):
    folder = copy(experiment[0], tmp_path / "checkpoint")
    before = (folder / "ckpt.pth").read_bytes()
    other = ("--arch", "resnet18", "--dataset", "digits", "--image-size", "32", "--val-fraction", "0.25")
    done = command("main.py", *SMALL, *other, "--checkpoint-dir", folder, "--force")
    assert done.returncode == 2
    assert "is of another experiment (arch resnet20 there, resnet18 asked, dataset folder" in done.stderr
    assert "image_size 16 there, 32 asked, val_fraction 0.0 there, 0.25 asked, classes 2 there, 10" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (folder / "ckpt.pth").read_bytes() == before


def test_pruning_starts_from_a_pytorch_cifar_checkpoint(experiment, images, tmp_path):
    folder, _ = experiment
    theirs = {f"module.{name}": value for name, value in net(folder / "ckpt.pth").items()}
    torch.save({"net": theirs, "acc": 99.0, "epoch": 3}, tmp_path / "ckpt.pth")
    before = (tmp_path / "ckpt.pth").read_bytes()
    line = (*SMALL, *SMALL_PRUNING, "-pr", "0.5", "-shot", "single", "--dataset", images, "--checkpoint-dir", tmp_path)
    succeed("main.py", *line)
    assert (tmp_path / "ckpt.pth").read_bytes() == before
    found, ours = (torch.load(f / "50percent_single_ckpt.pth", weights_only=True) for f in (tmp_path, folder))
    assert all(torch.equal(value, ours["net"][name]) for name, value in found["net"].items())
    # How long theirs was trained is a guess, on which the rate of retraining depends: it is a setting.
    assert found["settings"] == ours["settings"] | {"epochs": 2}


def test_the_report_counts_and_measures(experiment, images, tmp_path):
    folder = copy(experiment[0], tmp_path / "checkpoint")
    pruned = folder / "87.5percent_iter_ckpt.pth"
    for values in "fp32", "bf16":
        store.write(packed.name(pruned, values), packed.pack(store.load_checkpoint(pruned), values))
    printed = succeed("test.py", "--checkpoint-dir", folder, "--dataset", images, "--device", "cpu", "--layers")
    assert re.search(r"layer3\.2\.conv2\.weight +0\.00 ", printed)
    assert max(map(len, printed.splitlines())) <= 120
    with open(folder / "results.csv") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    packed_files = ["87.5percent_iter_ckpt.bf16.packed", "87.5percent_iter_ckpt.packed"]
    pruned_files = [f"{p}percent_{m}_ckpt.pth" for m in ("single", "iter") for p in ("50", "87.5")]
    assert list(rows) == ["ckpt.pth", *pruned_files, *packed_files]
    assert [rows[name]["values"] for name in (pruned.name, *packed_files)] == ["fp32", "bf16", "fp32"]
    sizes = {"file": packed_files[1], "file_bytes": str((folder / packed_files[1]).stat().st_size)}
    assert rows[packed_files[1]] == rows[pruned.name] | sizes
    assert int(sizes["file_bytes"]) < 0.2 * int(rows[pruned.name]["file_bytes"])
    row = rows["87.5percent_iter_ckpt.pth"]
    epochs = {"ckpt.pth": "2", "87.5percent_single_ckpt.pth": "2", "87.5percent_iter_ckpt.packed": "6"}
    assert {name: rows[name]["epochs"] for name in epochs} == epochs
    assert int(row["zeros"]) == round(0.875 * WEIGHTS)
    assert float(row["sparsity"]) == pytest.approx(100 * int(row["zeros"]) / WEIGHTS)
    parameters = sum(parameter.numel() for parameter in models.build("resnet20", 2).parameters())
    assert float(row["sparsity_all_parameters"]) == pytest.approx(100 * int(row["zeros"]) / parameters)
    assert float(row["compression"]) == pytest.approx(parameters / (parameters - int(row["zeros"])))
    counts = pruning.multiply_adds(store.network_of(store.load_checkpoint(pruned)), 16).values()
    dense, nonzero = (sum(column) for column in zip(*counts))
    assert float(row["multiply_adds_dense"]) == dense / 1e6
    assert float(row["multiply_adds"]) == nonzero / 1e6
    assert float(row["theoretical_speed_up"]) == dense / nonzero
    stored = torch.load(folder / row["file"], weights_only=True)
    assert float(row["accuracy"]) == stored["acc"]
    assert float(row["accuracy_before"]) == torch.load(folder / "ckpt.pth", weights_only=True)["acc"]
    assert float(row["drop"]) == pytest.approx(float(row["accuracy_before"]) - float(row["accuracy"]))
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_reads_files_of_the_classic_script(experiment, images, tmp_path):
    for theirs, ours in ("ckpt.pth", "ckpt.pth"), ("50.0percent_iter_ckpt.pth", "50percent_iter_ckpt.pth"):
        checkpoint = torch.load(experiment[0] / ours, weights_only=True)
        torch.save({key: checkpoint[key] for key in ("net", "acc", "epoch")}, tmp_path / theirs)
    printed = succeed(
        "test.py", "--checkpoint-dir", tmp_path, "--dataset", images, "--device", "cpu", "--image-size", "16"
    )
    assert re.search(r"50\.0percent_iter_ckpt\.pth +50\.00 +50\.0000", printed)


def test_another_allocation_has_a_file_of_its_own_and_does_not_go_on_with_the_states_of_one(
    experiment, images, tmp_path
):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(experiment[0] / "ckpt.pth", folder)
    line = (*SMALL, *SMALL_PRUNING, "-pr", "0.875", "--dataset", images, "--checkpoint-dir", folder)
    printed = succeed("main.py", *line, "-shot", "iter", "--allocation", "uniform")
    found = re.search(r"87\.5percent_iter_uniform_ckpt\.pth: .*, ([\d.]+) of 10\.2 million multiply-adds", printed)
    assert float(found[1]) < 0.2 * 10.2
    checkpoint = store.load_checkpoint(folder / "87.5percent_iter_uniform_ckpt.pth")
    zeros = pruning.count(store.network_of(checkpoint))
    assert checkpoint["settings"]["allocation"] == "uniform"
    assert sum(zero for zero, _ in zeros.values()) == round(0.875 * WEIGHTS)
    assert zeros["conv1.weight"][0] == zeros["linear.weight"][0] == 0
    # An old state, which does not say its allocation, is one of global.
    settings = {name: value for name, value in checkpoint["settings"].items() if name not in ("allocation", "rewind")}
    (folder / "resume").mkdir()
    store.save(folder / "resume" / "iter_step1.pt", {"settings": settings, "state": {}})
    done = command("main.py", *line, "-shot", "iter", "--allocation", "erk", "-r")
    assert done.returncode == 2
    assert "iter_step1.pt was made with other settings: allocation global there, erk asked" in done.stderr
    assert "rewind" not in done.stderr


LIES = [
    (lambda c: c.update(acc=c["acc"] - 30), "says its accuracy is"),
    (lambda c: c.update(acc=float("nan")), "acc is not a finite number"),
    (lambda c: c.update(dense_acc=1.0), "says the dense accuracy is 1.00 %"),
    (lambda c: c["net"]["conv1.weight"].zero_(), "weights are zero"),
    (lambda c: c["net"]["layer3.2.conv2.weight"].fill_(1e-9), "weights are zero"),
    (lambda c: c["settings"].update(sparsity=0.9), "should be 90 % zero, and is 50.00 %"),
    (lambda c: c["settings"].update(parent="x"), "was pruned from another network"),
    (lambda c: c["settings"].update(dataset="x"), "was made with other images"),
    (lambda c: c["settings"].update(val_fraction=float("nan")), "its settings are not what main.py writes"),
    (lambda c: c["settings"].update(lr=torch.ones(2)), "its settings are not what main.py writes"),
]


def test_the_report_finds_what_a_file_says_wrong(experiment, images, tmp_path):
    """One run for all: each lie is told by a copy of its own, 50.percent, 50.0percent, 50.00percent, ..."""
    folder = copy(experiment[0], tmp_path / "checkpoint")
    liars = {}
    for index, (change, message) in enumerate(LIES, start=1):
        checkpoint = torch.load(folder / "50percent_single_ckpt.pth", weights_only=True)
        change(checkpoint)
        name = f"50.{'0' * index}percent_single_ckpt.pth"
        store.save(folder / name, checkpoint)
        liars[name] = message
    done = command("test.py", "--checkpoint-dir", folder, "--dataset", images, "--device", "cpu")
    assert done.returncode == 1
    for name, message in liars.items():
        assert any(f"/{name} " in line and message in line for line in done.stderr.splitlines()), (name, message)
    honest = {f"{result}_ckpt.pth" for result in RESULTS}
    assert not any(f"/{name} " in done.stderr for name in honest), done.stderr
    assert "Traceback" not in done.stderr
    assert "87.5percent_iter_ckpt.pth" in done.stdout


def test_the_report_names_bad_files_and_goes_on(experiment, images, tmp_path):
    folder = copy(experiment[0], tmp_path / "checkpoint")
    (folder / "50percent_iter_ckpt.pth").write_text("hello")
    store.save(folder / "75percent_iter_ckpt.pth", {"net": models.build("resnet20", 3).state_dict()})
    (folder / "50percent_single_ckpt.pth").rename(folder / "60percent_single_ckpt.pth")
    done = command("test.py", "--checkpoint-dir", folder, "--dataset", images, "--device", "cpu")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 3, done.stderr
    for message in (
        "50percent_iter_ckpt.pth is not a checkpoint",
        "tells 3 classes apart",
        "not for what its name says",
    ):
        assert message in done.stderr
    assert "87.5percent_iter_ckpt.pth" in done.stdout
