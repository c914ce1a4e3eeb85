"""main.py from end to end: the files of a whole experiment, and what each command does."""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, SMALL_PRUNING, call, contents, succeed

import checkpoints
import data
import engine
import models
import pruning
import utils

RESULTS = ["50percent_iter", "50percent_single", "87.5percent_iter", "87.5percent_single"]
WEIGHTS = 268_336 + 128 - 640  # that pruning may zero in a resnet20 with two classes
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def experiment(images, tmp_path_factory):
    """The whole experiment in one command, and what it printed."""
    folder = tmp_path_factory.mktemp("experiment") / "checkpoint"
    targets = ("-pr", "0.875", "0.5", "-shot", "single", "iter", "--control")
    printed = succeed("main.py", *SMALL, *SMALL_PRUNING, *targets, "--dataset", images, "--checkpoint-dir", folder)
    return folder, printed


@pytest.fixture
def line(images, tmp_path, experiment):
    """The arguments of a command in a directory of its own that has the dense network."""
    shutil.copy(experiment[0] / "ckpt.pth", tmp_path)
    return (*SMALL, *SMALL_PRUNING, "--dataset", images, "--checkpoint-dir", tmp_path)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_the_whole_experiment_leaves_its_results_and_a_log(experiment):
    folder, printed = experiment
    controls = ["control_single", "50percent_iter_control", "87.5percent_iter_control"]
    names = [".lock", "log.jsonl", "ckpt.pth", *(f"{name}_ckpt.pth" for name in RESULTS + controls)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert f"{folder / 'ckpt.pth'} is missing: training the dense network first" in printed
    assert "shades: 80 training and 22 test images of 2 classes\n" in printed
    assert "ckpt.pth: epoch 2 of 2, lr 0.0000, training loss " in printed
    assert "87.5percent_single_ckpt.pth: test accuracy " in printed


def test_results_hold_plain_weights_with_exactly_the_zeros_asked_for(experiment):
    for name in RESULTS:
        checkpoint = load(experiment[0] / f"{name}_ckpt.pth")
        weights = [value for value in checkpoint["net"].values() if value.dim() in (2, 4)]
        assert sum(weight.numel() for weight in weights) == WEIGHTS
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        assert zeros == checkpoint["zeros"] == round(float(name.split("percent")[0]) / 100 * WEIGHTS)
        assert not any(weight[weight == 0].signbit().any() for weight in weights)
        models.build("resnet20", 2).load_state_dict(checkpoint["net"], strict=True)
        epochs = 2 if "single" in name else {"50percent_iter": 2 + 1, "87.5percent_iter": 5 + 1}[name]
        assert len(checkpoint["history"]) == epochs
        assert set(checkpoint["history"][0]) >= {"stage", "epoch", "lr", "loss", "accuracy"}
        settings = checkpoint["settings"]
        assert (settings["arch"], settings["image_size"], settings["seed"]) == ("resnet20", 16, 0)
        assert checkpoint["classes"] == ["dark", "light"]


def test_files_carry_mean_and_standard_deviation(experiment, images):
    dataset = data.load(str(images), experiment[0], 16)
    for path in experiment[0].glob("*.pth"):
        checkpoint = load(path)
        assert (checkpoint["mean"], checkpoint["std"]) == dataset.mean_and_std()


def test_retraining_moves_the_surviving_weights(experiment):
    dense = load(experiment[0] / "ckpt.pth")["net"]
    for name in RESULTS:
        for key, weight in load(experiment[0] / f"{name}_ckpt.pth")["net"].items():
            if weight.dim() == 4:
                assert (weight != dense[key])[weight != 0].float().mean() > 0.99, (name, key)


def test_one_shot_prunes_the_smallest_weights_of_the_dense_network(experiment):
    network = checkpoints.build_network(checkpoints.load_checkpoint(experiment[0] / "ckpt.pth"))
    masks = pruning.compute_masks(network, round(0.875 * WEIGHTS))
    pruned = load(experiment[0] / "87.5percent_single_ckpt.pth")["net"]
    assert all(torch.equal(pruned[name] != 0, mask) for name, mask in masks.items())


class Reference:
    """The program as a plain loop: SGD, masks put on after each step, no state, no files, no bookkeeping."""

    def __init__(self, images: Path, dtype: torch.dtype):
        self.dataset, self.dtype = data.load(str(images), images, 16), dtype
        self.batches = data.TrainBatches(self.dataset, 16, 0, CPU)

    def train(self, network, stage, epochs, lr, schedule, masks=None, teacher=None, nesterov=False, average=0.0):
        optimizer = torch.optim.SGD(
            network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=nesterov, fused=True
        )
        steps, done = epochs * len(self.batches), 0
        mean = [weight.detach().clone() for weight in network.parameters()]
        network.train()
        for epoch in range(epochs):
            for inputs, labels in self.batches.epoch(stage, epoch):
                # In fp32, as a tensor that holds the learning rate is.
                optimizer.param_groups[0]["lr"] = torch.tensor(schedule(lr, done / steps))
                optimizer.zero_grad()
                with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
                    logits = network(inputs).float()
                    with torch.no_grad():
                        wanted = teacher(inputs).float() if teacher else None
                loss = engine.distillation(logits, wanted, labels) if teacher else F.cross_entropy(logits, labels)
                loss.backward()
                optimizer.step()
                done += 1
                with torch.no_grad():
                    for name, mask in (masks or {}).items():
                        network.get_parameter(name).mul_(mask)
                    for value, weight in zip(mean, network.parameters()):
                        value.lerp_(weight, 1 / min(done, max(1.0, average * steps)))
        if average:
            with torch.no_grad():
                for value, weight in zip(mean, network.parameters()):
                    weight.copy_(value)
            inputs = [inputs for inputs, _ in self.batches.epoch(stage, epochs)]
            full = (batch for batch in inputs if len(batch) == len(inputs[0]))
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                torch.optim.swa_utils.update_bn(full, network)
        return network


def prune(network, zeros: int) -> dict:
    """The smallest magnitudes of all layers, by one sort."""
    weights = pruning.prunable(network)
    threshold = torch.cat([weight.detach().abs().flatten() for weight in weights.values()]).sort().values[zeros - 1]
    masks = {name: weight.detach().abs() > threshold for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight[~masks[name]] = 0.0
    return masks


def cosine(lr: float, done: float) -> float:
    return lr * (1 + math.cos(math.pi * done)) / 2


def linear(lr: float, done: float) -> float:
    return lr * min(0.1 + 9 * done, (1 - done) / 0.9)


def assert_same_bits(network, path: Path) -> None:
    for name, value in load(path)["net"].items():
        assert torch.equal(network.state_dict()[name] + 0, value), name


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_run_equals_a_plain_loop_bit_for_bit(images, tmp_path, dtype):
    """Dense, one-shot, and iterative with two levels and a final training, in this process."""
    line = (*SMALL, *SMALL_PRUNING, "--precision", dtype, "--dataset", images, "--checkpoint-dir", tmp_path)
    succeed("main.py", *line, "-pr", "0.5", "-shot", "single", "iter")
    loop = Reference(images, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    torch.manual_seed(utils.derive_seed(0, "initial weights"))
    network = models.build("resnet20", 2).to(memory_format=torch.channels_last)
    loop.train(network, "ckpt.pth", 2, 0.1, cosine)
    assert_same_bits(network, tmp_path / "ckpt.pth")
    teacher = copy.deepcopy(network).eval()
    retrain = {"teacher": teacher, "nesterov": True}
    pruned = copy.deepcopy(network)
    masks = prune(pruned, WEIGHTS // 2)
    loop.train(pruned, "50percent_single_ckpt.pth", 2, 0.065, linear, masks, average=0.05, **retrain)
    assert_same_bits(pruned, tmp_path / "50percent_single_ckpt.pth")
    for level, zeros in (1, round(0.4 * WEIGHTS)), (2, WEIGHTS // 2):
        masks = prune(network, zeros)
        loop.train(network, f"level {level}, {zeros} zeros", 1, 0.05, lambda lr, _: lr, masks, **retrain)
    loop.train(network, "50percent_iter_ckpt.pth", 1, 0.065, linear, masks, average=0.05, **retrain)
    assert_same_bits(network, tmp_path / "50percent_iter_ckpt.pth")


def test_a_target_does_not_depend_on_the_others(experiment, line, tmp_path):
    for mode in "single", "iter":
        succeed("main.py", *line, "-pr", "0.875", "-shot", mode)
        name = f"87.5percent_{mode}_ckpt.pth"
        assert (tmp_path / name).read_bytes() == (experiment[0] / name).read_bytes()
    succeed("main.py", *line, "-pr", "0.875", "-shot", "single", "--seed", "1", "--force")
    assert (tmp_path / "87.5percent_single_ckpt.pth.bak").read_bytes() == contents(experiment[0])[
        "87.5percent_single_ckpt.pth"
    ]
    other, first = (load(f / "87.5percent_single_ckpt.pth")["net"] for f in (tmp_path, experiment[0]))
    assert not torch.equal(other["linear.weight"], first["linear.weight"])


def test_another_seed_gives_another_dense_network(experiment, images, tmp_path):
    succeed("main.py", *SMALL, "--dataset", images, "--checkpoint-dir", tmp_path, "--seed", "1")
    one, other = (load(folder / "ckpt.pth")["net"]["conv1.weight"] for folder in (tmp_path, experiment[0]))
    assert not torch.equal(one, other)


def test_the_learning_rate_stays_high_between_steps_and_comes_down_once(experiment):
    rates = [entry["lr"] for entry in load(experiment[0] / "87.5percent_iter_ckpt.pth")["history"]]
    assert rates == [0.05] * 5 + [0.0]


def test_controls_follow_the_schedule_of_their_targets(experiment):
    for control, target in ("control_single", "50percent_single"), ("50percent_iter_control", "50percent_iter"):
        pair = [load(experiment[0] / f"{name}_ckpt.pth") for name in (control, target)]
        assert pair[0]["zeros"] == 0
        assert [e["lr"] for e in pair[0]["history"]] == [e["lr"] for e in pair[1]["history"]]
        assert pair[0]["pruned_acc"] == pair[0]["dense_acc"]


def test_plain_retraining_is_that_of_the_dense_network(line, images, tmp_path):
    succeed("main.py", *line, "-pr", "0.5", "-shot", "single", "--retrain", "plain", "--precision", "fp32")
    network = checkpoints.build_network(checkpoints.load_checkpoint(tmp_path / "ckpt.pth"))
    network.to(memory_format=torch.channels_last)
    loop = Reference(images, torch.float32)
    loop.train(network, "50percent_single_plain_ckpt.pth", 2, 0.1, cosine, prune(network, WEIGHTS // 2))
    assert_same_bits(network, tmp_path / "50percent_single_plain_ckpt.pth")


def test_rewinding_starts_every_level_from_the_early_weights(line, images, tmp_path):
    """Against a plain loop; and the dense network is the same with --rewind and without."""
    dense = (tmp_path / "ckpt.pth").read_bytes()
    pruned = (*line, "--rewind", "1", "-pr", "0.5", "-shot", "iter", "--precision", "fp32")
    done = call("main.py", *pruned)
    assert done.returncode == 2 and "ckpt_epoch1.pt, the weights to rewind to, is missing" in done.stderr
    succeed("main.py", *line, "--rewind", "1", "--force")
    assert (tmp_path / "ckpt.pth").read_bytes() == dense
    succeed("main.py", *pruned)
    network = checkpoints.build_network(checkpoints.load_checkpoint(tmp_path / "ckpt.pth"))
    network.to(memory_format=torch.channels_last)
    loop, teacher = Reference(images, torch.float32), copy.deepcopy(network).eval()
    early = load(tmp_path / "ckpt_epoch1.pt")["net"]
    retrain = {"teacher": teacher, "nesterov": True}
    for level, zeros in (1, round(0.4 * WEIGHTS)), (2, WEIGHTS // 2):
        masks = prune(network, zeros)
        network.load_state_dict(early)
        with torch.no_grad():
            for name, mask in masks.items():
                network.get_parameter(name)[~mask] = 0.0
        loop.train(network, f"level {level}, {zeros} zeros", 1, 0.1, linear, masks, **retrain)
    loop.train(network, "50percent_iter_rewind1_ckpt.pth", 1, 0.1, linear, masks, average=0.05, **retrain)
    assert_same_bits(network, tmp_path / "50percent_iter_rewind1_ckpt.pth")


def test_early_weights_of_another_training_are_refused(line, tmp_path):
    succeed("main.py", *line, "--rewind", "1", "--force")
    early = load(tmp_path / "ckpt_epoch1.pt")
    checkpoints.save(tmp_path / "ckpt_epoch1.pt", early | {"settings": early["settings"] | {"seed": 1}})
    done = call("main.py", *line, "--rewind", "1", "-pr", "0.5", "-shot", "iter")
    assert done.returncode == 2 and "ckpt_epoch1.pt is not of the training of ckpt.pth" in done.stderr


def test_accuracy_before_retraining_is_that_of_the_pruned_dense_network(experiment, images):
    checkpoint = checkpoints.load_checkpoint(experiment[0] / "ckpt.pth")
    network = checkpoints.build_network(checkpoint)
    pruning.apply(network, pruning.compute_masks(network, round(0.875 * WEIGHTS)))
    batches = data.test_batches(checkpoint, data.load(str(images), images, 16), CPU)
    found = load(experiment[0] / "87.5percent_single_ckpt.pth")["pruned_acc"]
    assert found == engine.evaluate(network, batches).accuracy


def test_a_dense_network_with_zeros_keeps_them(line, tmp_path):
    """They count, they stay zero, the control keeps them, and a target below them is refused before any work."""
    dense = load(tmp_path / "ckpt.pth")
    network = checkpoints.build_network(checkpoints.load_checkpoint(tmp_path / "ckpt.pth"))
    masks = pruning.compute_masks(network, round(0.7 * WEIGHTS))
    pruning.apply(network, masks)
    torch.save({"net": network.state_dict(), "acc": dense["acc"], "epoch": 1}, tmp_path / "ckpt.pth")
    before = {path.name for path in tmp_path.iterdir()}
    done = call("main.py", *line, "-pr", "0.5", "-shot", "single", "iter")
    assert done.returncode == 2 and "ckpt.pth has 70.00 % zeros already, which is more than 0.5" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == before
    succeed("main.py", *line, "-pr", "0.8", "-shot", "single", "iter", "--control")
    for name, share in ("80percent_single", 0.8), ("80percent_iter", 0.8), ("80percent_iter_control", 0.7):
        checkpoint = load(tmp_path / f"{name}_ckpt.pth")
        assert checkpoint["zeros"] == round(share * WEIGHTS)
        assert all(not checkpoint["net"][key][~mask].any() for key, mask in masks.items())
    # 0.7 to 0.8 is one step of 0.4 of the weights that are left, clipped.
    assert len(load(tmp_path / "80percent_iter_ckpt.pth")["history"]) == 1 + 1
    done = call("main.py", *line, "-pr", "0.8", "-shot", "single", "--allocation", "uniform")
    assert done.returncode == 2 and "would have to revive" in done.stderr and "conv1.weight" in done.stderr


def test_excluded_layers_stay_dense(line, tmp_path):
    printed = succeed("main.py", *line, "-pr", "0.9", "-shot", "single", "--exclude", "conv1", "layer1")
    net = load(tmp_path / "90percent_single_ckpt.pth")["net"]
    dense = [name for name in net if name.startswith(("conv1", "layer1")) and net[name].dim() == 4]
    assert all(net[name].all() for name in dense)
    left = WEIGHTS - sum(net[name].numel() for name in dense)
    assert sum(int((value == 0).sum()) for value in net.values() if value.dim() in (2, 4)) == round(0.9 * left)
    assert "90percent_single_ckpt.pth: test accuracy" in printed
    images = line[line.index("--dataset") + 1]
    assert succeed("test.py", "--checkpoint-dir", tmp_path, "--dataset", images, "--device", "cpu")


@pytest.mark.slow
def test_another_allocation_has_a_file_of_its_own(line, tmp_path):
    succeed("main.py", *line, "-pr", "0.875", "-shot", "iter", "--allocation", "uniform")
    checkpoint = checkpoints.load_checkpoint(tmp_path / "87.5percent_iter_uniform_ckpt.pth")
    zeros = pruning.count_zeros(checkpoints.build_network(checkpoint))
    assert sum(zero for zero, _ in zeros.values()) == round(0.875 * WEIGHTS)
    assert zeros["conv1.weight"][0] == zeros["linear.weight"][0] == 0


def test_held_out_images_are_measured_in_place_of_the_test_images(images, tmp_path):
    line = (*SMALL, "--dataset", images, "--checkpoint-dir", tmp_path)
    printed = succeed("main.py", *line, "--val-fraction", "0.25")
    assert "60 training and 20 held-out training images" in printed
    assert "ckpt.pth: validation accuracy" in printed
    checkpoint = checkpoints.load_checkpoint(tmp_path / "ckpt.pth")
    dataset = data.load(str(images), tmp_path, 16, 0.25)
    score = engine.evaluate(checkpoints.build_network(checkpoint), data.test_batches(checkpoint, dataset, CPU))
    assert (checkpoint["acc"], score.images) == (score.accuracy, 20)
    # A file that does not say otherwise was trained on all images, including those that would be held out.
    torch.save({"net": checkpoint["net"], "acc": 90.0, "epoch": 1}, tmp_path / "ckpt.pth")
    done = call("main.py", *line, "--val-fraction", "0.25", "-pr", "0.5", "-shot", "single")
    assert done.returncode == 2 and "(val_fraction 0.0 there, 0.25 asked)" in done.stderr


def test_pruning_starts_from_a_pytorch_cifar_checkpoint(experiment, line, tmp_path):
    net = load(experiment[0] / "ckpt.pth")["net"]
    torch.save({"net": {f"module.{k}": v for k, v in net.items()}, "acc": 99.0, "epoch": 3}, tmp_path / "ckpt.pth")
    before = (tmp_path / "ckpt.pth").read_bytes()
    printed = succeed("main.py", *line, "-pr", "0.5", "-shot", "single")
    assert "ckpt.pth (net of resnet20, 99.00 % by its file): test accuracy" in printed
    assert (tmp_path / "ckpt.pth").read_bytes() == before
    name = "50percent_single_ckpt.pth"
    assert (tmp_path / name).read_bytes() == (experiment[0] / name).read_bytes()


def test_every_epoch_is_a_line_of_the_log(experiment):
    lines = [json.loads(line) for line in (experiment[0] / "log.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"stage", "identity", "epochs", "epoch", "lr", "loss", "accuracy", "seconds"}
    for name in "87.5percent_single_ckpt.pth", "ckpt.pth":
        history = load(experiment[0] / name)["history"]
        mine = [line for line in lines if line["stage"] == name]
        keys = ("epoch", "lr", "loss", "accuracy")
        assert [[line[key] for key in keys] for line in mine] == [[entry[key] for key in keys] for entry in history]
    levels = {line["identity"] for line in lines if line["stage"].startswith("level ")}
    assert len(levels) == 1 + 1 + 4 + 5  # 1 shared, 2 at 50 %, 2 to 5 at 87.5 %; the controls share theirs


def test_a_dry_run_prints_the_plan_and_writes_nothing(experiment, line, tmp_path):
    shutil.copy(experiment[0] / "50percent_single_ckpt.pth", tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    printed = succeed("main.py", *line, "-pr", "0.5", "0.875", "-shot", "single", "iter", "--dry-run")
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    rows = [row.split("  ") for row in printed.splitlines()]
    plan = {row[0].strip(): [part.strip() for part in row[1:] if part.strip()] for row in rows if len(row) > 2}
    assert plan["ckpt.pth"][0] == plan["50percent_single_ckpt.pth"][0] == "finished"
    assert plan["87.5percent_single_ckpt.pth"][:2] == ["to make", "2"]
    assert sum(name.startswith("level ") for name in plan) == 6
    assert plan["all"][0] == "10"  # 2 epochs one-shot, 6 levels of one, 2 final trainings of one
    assert not (tmp_path / "new").exists()
    forced = succeed("main.py", *line, "-pr", "0.5", "-shot", "single", "--dry-run", "--force")
    assert re.search(r"ckpt\.pth +finished", forced) and re.search(r"50percent_single_ckpt\.pth +to make +2 ", forced)
    other = [tmp_path / "new" if part == tmp_path else part for part in line]
    assert "to make" in succeed("main.py", *other, "--dry-run")
    assert not (tmp_path / "new").exists()


def test_the_experiment_imports_nothing_of_deployment_and_its_packages():
    """And data, engine and pruning do not import each other."""
    program = """
import sys
before = set(sys.modules)
import main, run, stages, report, checkpoints
names = {name.partition(".")[0] for name in set(sys.modules) - before}
unwanted = names & {"deployment", "deploy", "numba", "llvmlite", "onnx", "onnxruntime", "matplotlib", "sklearn",
                    "pytest", "hypothesis"}
assert not unwanted, unwanted
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    for module in "data", "engine", "pruning":
        imported = (ROOT / f"{module}.py").read_text()
        for other in {"data", "engine", "pruning", "main", "stages"} - {module}:
            assert f"\nimport {other}\n" not in imported and f"\nfrom {other} import" not in imported
    for path in [*ROOT.glob("*.py"), *ROOT.glob("models/*.py")]:
        if path.name != "deploy.py":
            text = path.read_text()
            assert "import deployment" not in text and "from deployment" not in text, path


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_too_little_memory_is_one_line_with_the_flags_that_help(line, monkeypatch, error):
    def fail(*_args: object, **_more: object) -> None:
        raise error

    monkeypatch.setattr(engine, "fit", fail)
    done = call("main.py", *line, "-pr", "0.5", "-shot", "single")
    assert done.returncode == 1
    assert done.stderr == "main.py: too little memory: try a smaller --batch-size or --image-size\n"


def test_a_deterministic_run_gives_the_same_bytes(experiment, line, tmp_path, monkeypatch):
    """On a CPU it changes nothing; that no operation of the program refuses it is what matters."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    try:
        succeed("main.py", *line, "-pr", "0.5", "-shot", "single", "--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    name = "50percent_single_ckpt.pth"
    assert (tmp_path / name).read_bytes() == (experiment[0] / name).read_bytes()


@pytest.mark.gpu
def test_a_deterministic_run_on_a_gpu_resumes_to_the_same_bytes(images, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    line = [*SMALL, *SMALL_PRUNING, "-pr", "0.5", "-shot", "single", "iter", "--deterministic", "--dataset", images]
    line[line.index("cpu")] = "cuda"
    try:
        succeed("main.py", *line, "--checkpoint-dir", tmp_path / "whole")
        left = [40]

        def requested() -> bool:
            left[0] -= 1
            return left[0] == 0

        with monkeypatch.context() as patch:
            patch.setattr(engine, "stop_requested", requested)
            done = call("main.py", *line, "--checkpoint-dir", tmp_path / "resumed")
        assert "the same command resumes" in done.stderr
        succeed("main.py", *line, "--checkpoint-dir", tmp_path / "resumed")
    finally:
        torch.use_deterministic_algorithms(False)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def shell(redirection: str, script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script with redirected streams; those that stay are captured."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "2>/dev/full"])
def test_a_run_needs_no_stream_that_is_closed(redirection, line, tmp_path, experiment):
    done = shell(redirection, "main.py", *line, "-pr", "0.5", "-shot", "single")
    assert (done.returncode, done.stderr) == (0, "")
    name = "50percent_single_ckpt.pth"
    assert (tmp_path / name).read_bytes() == (experiment[0] / name).read_bytes()


@pytest.mark.slow
def test_a_run_whose_reader_leaves_saves_its_state(images, tmp_path, experiment, broken_pipe):
    line = (*SMALL, "--dataset", images, "--checkpoint-dir", tmp_path)
    command = [sys.executable, str(ROOT / "main.py"), *map(str, line)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the run that it is compared with
    done = subprocess.run(command, stdout=broken_pipe, stderr=subprocess.PIPE, text=True, env=one_thread)
    message = "main.py: stopped in ckpt.pth, epoch 1 of 2; the same command resumes\n"
    assert (done.returncode, done.stderr) == (141, message)
    done = subprocess.run(command, stdout=broken_pipe, stderr=broken_pipe, env=one_thread)  # as 2>&1 | head
    assert done.returncode == 141
    (state,) = (tmp_path / "resume").iterdir()
    assert checkpoints.load(state)["state"]["step"] == 2, "one step in each of the two runs"
    succeed("main.py", *line)
    assert (tmp_path / "ckpt.pth").read_bytes() == (experiment[0] / "ckpt.pth").read_bytes()


@pytest.mark.slow
def test_a_report_whose_reader_leaves_ends_without_a_word(images, experiment, broken_pipe):
    command = [sys.executable, str(ROOT / "test.py"), "--checkpoint-dir", experiment[0], "--dataset", images]
    done = subprocess.run(command, stdout=broken_pipe, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.fixture
def broken_pipe() -> Iterator[int]:
    """A pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


def test_the_first_lines_say_how_much_there_is_to_do(line):
    printed = succeed("main.py", *line, "-pr", "0.5", "-shot", "single", "iter")
    first, second, *_ = printed.splitlines()
    assert first == "shades: 80 training and 22 test images of 2 classes"
    assert second == "4 stages, 5 epochs to train"
    assert "; 0 epochs left, about 0 minutes\n" in printed


def test_the_example_of_the_documentation_runs():
    text = (ROOT / "docs" / "own-training.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    assert "pruning.compute_masks" in code
    exec(compile(code, "docs/own-training.md", "exec"), {})
