"""Finished, interrupted, in the way: a run that is stopped at any point ends with the files of one that never was."""

import contextlib
import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, SMALL_PRUNING, Killed, call, contents, kill_at, succeed, write_images

import checkpoints
import engine
import stages
import utils

TARGETS = ("-pr", "0.5", "0.8", "-shot", "single", "iter")
REWOUND = ("-pr", "0.5", "0.8", "-shot", "iter", "--rewind", "1", "--control")
ALL = ((*TARGETS, "--control"), REWOUND)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """The arguments of a command, and the results that it leaves when nothing stops it."""
    folder = tmp_path_factory.mktemp("stages")
    images = write_images(folder / "images", train=20)
    line = (*SMALL, *SMALL_PRUNING, "--dataset", images)
    succeed("main.py", *line, "--rewind", "1", "--checkpoint-dir", folder / "whole")
    for command in ALL:
        succeed("main.py", *line, *command, "--checkpoint-dir", folder / "whole")
    return line, contents(folder / "whole")


@pytest.fixture(autouse=True)
def save_often(monkeypatch):
    """A state after every epoch, and not just twice a minute."""
    monkeypatch.setattr(engine, "SAVE_SECONDS", 0)


def without(results: dict[str, bytes], *words: str) -> dict[str, bytes]:
    """The results that have none of these words in their names."""
    return {name: content for name, content in results.items() if not any(word in name for word in words)}


def leftovers(folder: Path) -> list[str]:
    """What a finished command must not leave: states, levels, temporary files."""
    files = [path for path in folder.rglob("*") if path.suffix in (".pt", ".tmp") or path.parent != folder]
    return [str(path.relative_to(folder)) for path in files if path.name != "ckpt_epoch1.pt"]


OPERATIONS = [(os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "replace")]


def count_operations(monkeypatch, *arguments: object) -> int:
    """How many operations on files a command makes."""
    calls = []
    with monkeypatch.context() as patch:
        for owner, name in OPERATIONS:
            original = getattr(owner, name)
            patch.setattr(owner, name, lambda *a, original=original, **k: (calls.append(1), original(*a, **k))[1])
        succeed("main.py", *arguments)
    return len(calls)


def kill(monkeypatch, number: int, *arguments: object) -> None:
    """Run a command that is killed right before its `number`-th operation on files."""
    stop = kill_at(number)
    with monkeypatch.context() as patch:
        for owner, name in OPERATIONS:
            original = getattr(owner, name)
            patch.setattr(owner, name, lambda *a, original=original, **k: (stop(), original(*a, **k))[1])
        with contextlib.suppress(Killed):
            call("main.py", *arguments)


@pytest.mark.slow
def test_killed_before_any_operation_on_files_it_ends_with_the_same_files(setting, tmp_path, monkeypatch):
    """Every operation of a whole command, one life for each: the next life is killed one operation later."""
    line, whole = setting
    command = (*line, "-pr", "0.5", "0.8", "-shot", "iter", "--checkpoint-dir", tmp_path)
    (tmp_path / "ckpt.pth").write_bytes(whole["ckpt.pth"])
    total = count_operations(monkeypatch, *command)
    expected = contents(tmp_path)
    assert expected.items() <= whole.items() and len(expected) == 3
    assert total > 60
    for number in range(1, total, 7):  # the random histories below take others
        for path in tmp_path.glob("*percent*"):
            path.unlink()
        kill(monkeypatch, number, *command)
        succeed("main.py", *command)
        assert contents(tmp_path) == expected, number
        assert leftovers(tmp_path) == [], number


class Disk:
    """What would be on the disk after a power loss: only what an fsync made durable.

    A file's content becomes durable when the file is synced, the names in a directory when the directory is.
    """

    def __init__(self, root: Path):
        self.root = root
        self.contents: dict[str, bytes] = {}  # durable, by an identity of the file
        self.names: dict[str, dict[str, str]] = {}  # by directory: what a running program sees
        self.durable: dict[str, dict[str, str]] = {}
        self.states: list[dict[str, bytes]] = []
        for path in root.iterdir():
            self.contents[path.name] = path.read_bytes()
            self.names.setdefault(".", {})[path.name] = path.name
        self.durable["."] = dict(self.names["."])

    def place(self, path: Path) -> tuple[dict[str, str], str]:
        return self.names.setdefault(str(path.parent.relative_to(self.root)), {}), path.name

    def sync(self, path: Path) -> None:
        if path.is_dir():
            folder = str(path.relative_to(self.root))
            self.durable[folder] = dict(self.names.get(folder, {}))
        else:
            names, name = self.place(path)
            names.setdefault(name, f"file {len(self.contents)}")
            self.contents[names[name]] = path.read_bytes()
        self.record()

    def rename(self, path: Path, target: Path) -> None:
        (names, name), (others, other) = self.place(path), self.place(target)
        others[other] = names.pop(name)
        self.record()

    def unlink(self, path: Path) -> None:
        names, name = self.place(path)
        names.pop(name, None)
        self.record()

    def make_directory(self, path: Path) -> None:
        if path == self.root:
            return
        names, name = self.place(path)
        names.setdefault(name, "directory")

    def record(self) -> None:
        state = {}
        for folder, names in self.durable.items():
            if folder == "." or self.durable["."].get(folder) == "directory":
                found = {f"{folder}/{name}": file for name, file in names.items() if file != "directory"}
                state |= {name: self.contents[file] for name, file in found.items()}
        if not self.states or state != self.states[-1]:
            self.states.append(state)


@pytest.mark.slow
def test_after_a_power_loss_the_run_ends_with_the_same_weights(setting, tmp_path, monkeypatch):
    """The writes, syncs and renames of a run are recorded, and cut at every point at which something became durable."""
    line, whole = setting
    folder = tmp_path / "run"
    folder.mkdir()
    for name in "ckpt.pth", "50percent_iter_ckpt.pth":
        (folder / name).write_bytes(whole[name])
    disk = Disk(folder)
    fsync, rename, unlink, mkdir = os.fsync, os.replace, Path.unlink, Path.mkdir
    command = (*line, "-pr", "0.5", "0.8", "-shot", "iter", "--checkpoint-dir")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (fsync(file), disk.sync(Path(os.readlink(f"/proc/self/fd/{file}")))))
        patch.setattr(os, "replace", lambda a, b: (rename(a, b), disk.rename(Path(a), Path(b))))
        patch.setattr(Path, "unlink", lambda path, **more: (unlink(path, **more), disk.unlink(path)))
        patch.setattr(Path, "mkdir", lambda path, **more: (mkdir(path, **more), disk.make_directory(path)))
        succeed("main.py", *command, folder, "--force")
    assert contents(folder) == {name: whole[name] for name in contents(folder)}
    assert len(disk.states) > 2 * 7  # of each of seven stages a state and a file
    for number, state in enumerate(disk.states[::2]):
        place = tmp_path / str(number)
        place.mkdir()
        for name, content in state.items():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(content)
        succeed("main.py", *command, place)
        assert contents(place) == contents(folder), number
        assert leftovers(place) == [], number


def history(moments: random.Random) -> tuple[list[str], bool]:
    """Targets added and left out, --control, --rewind and --force, at random."""
    targets = moments.sample(["0.5", "0.8"], moments.randint(1, 2))
    rewind = moments.random() < 0.3
    modes = ["iter"] if rewind else moments.sample(["single", "iter"], moments.randint(1, 2))
    line = ["-pr", *targets, "-shot", *modes]
    line += ["--rewind", "1"] if rewind else []
    line += ["--control"] if moments.random() < 0.4 else []
    return line, moments.random() < 0.3


@pytest.mark.slow
def test_random_histories_end_with_the_files_of_undisturbed_runs(setting, tmp_path, monkeypatch, pytestconfig):
    line, whole = setting
    for seed in range(pytestconfig.getoption("histories")):
        moments, folder = random.Random(seed), tmp_path / str(seed)
        place = ("--checkpoint-dir", folder)
        for _ in range(moments.randint(1, 3)):
            kill(monkeypatch, int(2 ** moments.uniform(0, 4)), *line, "--rewind", "1", *place)
        succeed("main.py", *line, "--rewind", "1", *place)
        for _ in range(6):
            asked, force = history(moments)
            for _ in range(moments.randint(0, 2)):
                kill(monkeypatch, int(2 ** moments.uniform(0, 7)), *line, *asked, *place, *(["--force"] * force))
                force = False  # a forced command that was interrupted is resumed without the flag
            assert contents(folder).items() <= whole.items(), "a result differs from that of its target alone"
        for last in ALL:
            succeed("main.py", *line, *last, *place)
        assert contents(folder) == whole, seed
        assert leftovers(folder) == [], seed


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_files(setting, tmp_path, pytestconfig):
    """By SIGKILL, as processes. Whatever each life gets done, the end is the same."""
    line, whole = setting
    often = "import sys; sys.argv[0] = 'main.py'; import engine, main, utils; engine.SAVE_SECONDS = 0; "
    program = [sys.executable, "-c", often + "utils.run(main.main)"]
    command = [*program, *map(str, line), *TARGETS, "--control", "--checkpoint-dir", str(tmp_path)]
    moments = random.Random(0)
    for _ in range(pytestconfig.getoption("kills")):
        life = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        time.sleep(moments.uniform(2, 6))  # imports take two seconds
        life.kill()
        life.wait()
    succeed("main.py", *line, *TARGETS, "--control", "--checkpoint-dir", tmp_path)
    assert contents(tmp_path) == without(whole, "rewind")
    assert leftovers(tmp_path) == []


SLOW = pytest.mark.slow


@pytest.mark.parametrize("steps", [1, pytest.param(4, marks=SLOW), pytest.param(9, marks=SLOW), 16])
def test_a_signal_stops_the_run_after_the_current_step(setting, tmp_path, monkeypatch, steps):
    """The signal comes after a given number of steps; the message says where, the exit code says which signal."""
    line, whole = setting
    command = (*line, *TARGETS, "--checkpoint-dir", tmp_path)
    left = [steps]
    run = engine.Step.run

    def step(self, inputs, labels):
        run(self, inputs, labels)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Step, "run", step)
        done = call("main.py", *command)
    assert done.returncode == 143
    assert done.stderr.startswith("main.py: stopped in ") and done.stderr.endswith("; the same command resumes\n")
    assert done.stderr.count("\n") == 1
    (state,) = (tmp_path / "resume").iterdir()
    epochs = checkpoints.load(state)["state"]["epoch"]
    printed = succeed("main.py", *command, "-r")  # accepted, and not needed
    assert printed.count(": resumes after ") == printed.count(f": resumes after {epochs} of ") == 1
    assert contents(tmp_path) == without(whole, "control", "rewind")
    assert leftovers(tmp_path) == []


def interrupt(monkeypatch, point: int, *arguments: object) -> None:
    """Stop a command in order after `point` checks for a signal."""
    stop = kill_at(point)

    def requested() -> bool:
        try:
            stop()
        except Killed:
            return True
        return False

    with monkeypatch.context() as patch:
        patch.setattr(engine, "stop_requested", requested)
        done = call("main.py", *arguments)
    assert "the same command resumes" in done.stderr, done.stderr


def test_a_target_added_while_another_is_interrupted_costs_no_level(setting, tmp_path, monkeypatch):
    line, whole = setting
    (tmp_path / "ckpt.pth").write_bytes(whole["ckpt.pth"])
    command = (*line, "-shot", "iter", "--checkpoint-dir", tmp_path)
    made = []
    save = stages.checkpoints.save
    monkeypatch.setattr(
        checkpoints,
        "save",
        lambda path, content: (made.append(path.parent.name + "/" + path.name), save(path, content)),
    )
    interrupt(monkeypatch, 9, *command, "-pr", "0.8")
    levels = {name for name in made if name.startswith("levels/")}
    assert levels, "it stopped before the first level was finished"
    made.clear()
    succeed("main.py", *command, "-pr", "0.5", "0.8")
    assert not levels & set(made), "a finished level was made again"
    assert contents(tmp_path) == without(whole, "single", "control", "rewind")


def test_a_state_keeps_the_level_it_started_from(setting, tmp_path, monkeypatch):
    """Another command finishes meanwhile, and needs that level no more."""
    line, whole = setting
    (tmp_path / "ckpt.pth").write_bytes(whole["ckpt.pth"])
    command = (*line, "-shot", "iter", "--checkpoint-dir", tmp_path)
    # A level has a measurement of one batch, three steps and another measurement: this is the first step of level 2.
    interrupt(monkeypatch, 5 + 2, *command, "-pr", "0.8")
    [state] = (tmp_path / "resume").iterdir()
    parent = torch.load(state, weights_only=True)["settings"]["parent"]
    assert (tmp_path / "levels" / f"{parent}.pth").exists()
    succeed("main.py", *command, "-pr", "0.5")
    assert (tmp_path / "levels" / f"{parent}.pth").exists()
    succeed("main.py", *command, "-pr", "0.8")
    assert leftovers(tmp_path) == []


def test_results_made_with_other_settings_are_in_the_way(setting, tmp_path):
    line, whole = setting
    for name in "ckpt.pth", "50percent_single_ckpt.pth", "50percent_iter_ckpt.pth":
        (tmp_path / name).write_bytes(whole[name])
    before = contents(tmp_path)
    command = (*line, "--checkpoint-dir", tmp_path)
    for arguments, message in (
        (("-pr", "0.5", "-shot", "single", "--lr", "0.05", "--seed", "1"), "lr 0.1 there, 0.05 asked, seed 0 there"),
        (("-pr", "0.5", "-shot", "single", "--retrain-epochs", "9"), "retrain_epochs 2 there, 9 asked; --force makes"),
        (("-pr", "0.5", "-shot", "iter", "--step-epochs", "9"), "step_epochs 1 there, 9 asked; --force makes it again"),
        (("--epochs", "9"), "ckpt.pth was made with other settings: epochs 2 there, 9 asked"),
        (("--arch", "resnet18", "--force"), "ckpt.pth is of another experiment (arch resnet20 there, resnet18 asked)"),
        (
            ("-pr", "0.5", "-shot", "single", "--val-fraction", "0.5", "--force"),
            "ckpt.pth is of another experiment (val_fraction 0.0 there, 0.5 asked)",
        ),
    ):
        done = call("main.py", *command, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr and done.stderr.count("\n") == 1
    assert contents(tmp_path) == before
    # Epochs, lr and seed of the dense network are reported, not compared, when pruning starts from it.
    printed = succeed("main.py", *command, "--epochs", "9", "-pr", "0.8", "-shot", "single")
    assert "ckpt.pth (epochs 2, lr 0.1, seed 0): test accuracy" in printed
    assert (tmp_path / "80percent_single_ckpt.pth").read_bytes() == whole["80percent_single_ckpt.pth"]
    # What is finished is named, and nothing is made again.
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pth")}
    printed = succeed("main.py", *command, "-pr", "0.8", "0.5", "-shot", "single")
    assert printed.count(" is finished\n") == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pth")} == stamps


def test_results_of_another_dense_network_are_refused(setting, tmp_path):
    line, whole = setting
    (tmp_path / "50percent_single_ckpt.pth").write_bytes(whole["50percent_single_ckpt.pth"])
    (tmp_path / "50percent_iter_ckpt.pth").write_bytes(whole["50percent_iter_ckpt.pth"])
    other = checkpoints.load_checkpoint(tmp_path / "50percent_iter_ckpt.pth")
    torch.save({"net": other["net"] | {"linear.bias": torch.zeros(2)}, "acc": 1.0}, tmp_path / "ckpt.pth")
    command = (*line, "--checkpoint-dir", tmp_path, "-pr", "0.8")
    for mode in "single", "iter":
        done = call("main.py", *line, "--checkpoint-dir", tmp_path, "-pr", "0.5", "-shot", mode)
        assert done.returncode == 2
        assert f"50percent_{mode}_ckpt.pth was pruned from another ckpt.pth; --force makes it again" in done.stderr
    assert call("main.py", *command, "-shot", "single").returncode == 0, "a result without a file is not in the way"
    # Without a dense network it is trained, and then compared.
    (tmp_path / "ckpt.pth").unlink()
    (tmp_path / "80percent_single_ckpt.pth").unlink()
    succeed("main.py", *line, "--checkpoint-dir", tmp_path, "-pr", "0.5", "-shot", "single", "iter")
    assert {n: c for n, c in whole.items() if n in contents(tmp_path)} == contents(tmp_path)


def test_an_interrupted_stage_with_other_settings_is_in_the_way(setting, tmp_path, monkeypatch):
    line, whole = setting
    (tmp_path / "ckpt.pth").write_bytes(whole["ckpt.pth"])
    command = (*line, "--checkpoint-dir", tmp_path, "-pr", "0.5", "-shot", "single")
    interrupt(monkeypatch, 3, *command)
    state = tmp_path / "resume" / "50percent_single_ckpt.pt"
    content = state.read_bytes()
    done = call("main.py", *command, "--retrain-epochs", "5")
    assert done.returncode == 2
    assert f"{state} was made with other settings: retrain_epochs 2 there, 5 asked; delete it" in done.stderr
    # Other targets are none of its business, and leave it alone.
    succeed("main.py", *line, "--checkpoint-dir", tmp_path, "-pr", "0.8", "-shot", "single")
    assert state.read_bytes() == content
    succeed("main.py", *command)
    assert contents(tmp_path).items() <= whole.items()


def test_force_keeps_the_old_file_until_its_successor_is_finished(setting, tmp_path, monkeypatch):
    line, whole = setting
    (tmp_path / "ckpt.pth").write_bytes(whole["ckpt.pth"])
    name = "50percent_iter_ckpt.pth"
    (tmp_path / name).write_bytes(whole[name])
    command = (*line, "--checkpoint-dir", tmp_path, "-pr", "0.5", "-shot", "iter", "--final-epochs", "2")
    interrupt(monkeypatch, 9, *command, "--force")
    bak = tmp_path / f"{name}.bak"
    assert bak.read_bytes() == whole[name] and not (tmp_path / name).exists()
    interrupt(monkeypatch, 5, *command, "--force", "--final-epochs", "3")
    assert bak.read_bytes() == whole[name], "an unfinished successor must not replace it"
    succeed("main.py", *command, "--final-epochs", "3")
    assert bak.read_bytes() == whole[name]
    third = (tmp_path / name).read_bytes()
    assert third != whole[name] and leftovers(tmp_path) == []
    succeed("main.py", *line, "--checkpoint-dir", tmp_path, "-pr", "0.5", "-shot", "iter", "--force")
    assert (tmp_path / name).read_bytes() == whole[name] and bak.read_bytes() == third
    assert (tmp_path / "ckpt.pth").read_bytes() == whole["ckpt.pth"], "never ckpt.pth when -pr is given"


def test_a_file_that_only_looks_like_ours_is_in_the_way(setting, tmp_path):
    line, whole = setting
    (tmp_path / "ckpt.pth").write_bytes(whole["ckpt.pth"])
    net = checkpoints.load_checkpoint(tmp_path / "ckpt.pth")["net"]
    torch.save({"net": net, "acc": 10.0, "epoch": 1, "format": 2}, tmp_path / "50percent_single_ckpt.pth")
    done = call("main.py", *line, "--checkpoint-dir", tmp_path, "-pr", "0.5", "-shot", "single")
    assert done.returncode == 2 and "was written by an earlier version or another program" in done.stderr


def test_force_makes_a_broken_result_again(setting, tmp_path):
    line, whole = setting
    (tmp_path / "ckpt.pth").write_bytes(whole["ckpt.pth"])
    (tmp_path / "50percent_single_ckpt.pth").write_text("hello")
    command = (*line, "--checkpoint-dir", tmp_path, "-pr", "0.5", "-shot", "single")
    done = call("main.py", *command)
    assert done.returncode == 2 and "50percent_single_ckpt.pth is not a checkpoint" in done.stderr
    succeed("main.py", *command, "--force")
    assert (tmp_path / "50percent_single_ckpt.pth.bak").read_text() == "hello"
    assert contents(tmp_path).items() <= whole.items()


def test_results_and_states_of_earlier_versions(setting, tmp_path):
    """Networks are read, their states are named and never deleted."""
    line, whole = setting
    (tmp_path / "ckpt.pth").write_bytes(whole["ckpt.pth"])
    old = checkpoints.load_checkpoint(tmp_path / "ckpt.pth")
    for key in "format", "mean", "std", "test_images", "arch":
        del old[key]
    del old["settings"]["classes"]
    checkpoints.save(tmp_path / "ckpt.pth", old)
    checkpoints.save(tmp_path / "50percent_single_ckpt.pth", old)
    (tmp_path / "resume").mkdir()
    checkpoints.save(tmp_path / "resume" / "iter_trunk.pt", {"settings": {}, "state": {}})
    (tmp_path / "resume" / "redo.json").write_text("{}")
    command = (*line, "--checkpoint-dir", tmp_path, "-shot", "single")
    done = call("main.py", *command, "-pr", "0.5")
    assert done.returncode == 2 and "50percent_single_ckpt.pth was written by an earlier version" in done.stderr
    printed = succeed("main.py", *command, "-pr", "0.8")
    files = ", ".join(str(tmp_path / "resume" / name) for name in ("iter_trunk.pt", "redo.json"))
    assert f"left alone, because an earlier version wrote them: {files}\n" in printed
    assert len(list((tmp_path / "resume").iterdir())) == 2
    assert (tmp_path / "80percent_single_ckpt.pth").read_bytes() == whole["80percent_single_ckpt.pth"]


def state_of(tmp_path: Path, monkeypatch, command: tuple) -> Path:
    """The state of a one-shot retraining that was stopped in its second epoch."""
    interrupt(monkeypatch, 1 + 3 + 2, *command)
    return tmp_path / "resume" / "50percent_single_ckpt.pt"


def change(saved: dict, *keys: object, value: object = None) -> None:
    """Set an entry of nested dictionaries and lists, or delete it."""
    for key in keys[:-1]:
        saved = saved[key]
    if value is None:
        del saved[keys[-1]]
    else:
        saved[keys[-1]] = value


NAN = float("nan")
DAMAGE = {
    "a weight is missing": ("net", "bn1.weight", None),
    "a weight is unknown": ("net", "bn9.weight", torch.zeros(16)),
    "a weight has another shape": ("net", "bn1.weight", torch.zeros(8)),
    "a weight has another type": ("net", "bn1.weight", torch.zeros(16, dtype=torch.float64)),
    "a weight is nan": ("net", "bn1.weight", torch.full((16,), NAN)),
    "a weight is a number": ("net", "bn1.weight", 3),
    "net is a list": ("net", [1]),
    "a weight has no values": ("net", "bn1.weight", torch.zeros(16, device="meta")),
    "a weight is sparse": ("net", "bn1.weight", torch.zeros(16).to_sparse()),
    "a variance is negative": ("net", "bn1.running_var", torch.full((16,), -1.0)),
    "more answers are correct than there are images": ("sums", torch.tensor([0, 5, 3], dtype=torch.float64)),
    "no images were seen": ("sums", torch.zeros(3, dtype=torch.float64)),
    "seconds are negative": ("seconds", -1e9),
    "an epoch is a tensor": ("history", 0, "epoch", torch.ones(2)),
    "an epoch has another entry": ("history", 0, "x", torch.ones(2)),
    "momentum is short": ("momentum", 0, None),
    "momentum has another shape": ("momentum", 0, torch.zeros(3)),
    "momentum is a number": ("momentum", 3),
    "the average is missing": ("ema", None),
    "the average has another shape": ("ema", 1, torch.zeros(3)),
    "sums are short": ("sums", torch.zeros(2, dtype=torch.float64)),
    "sums are infinite": ("sums", torch.full((3,), torch.inf, dtype=torch.float64)),
    "the epoch is negative": ("epoch", -1),
    "the epoch is past the end": ("epoch", 3),
    "the epoch is huge": ("epoch", 10**400),
    "the epoch is a text": ("epoch", "1"),
    "the epoch is a fraction": ("epoch", 1.0),
    "the epoch is another": ("epoch", 2),
    "the step is negative": ("step", -1),
    "the step is past the end": ("step", 4),
    "the history is empty": ("history", []),
    "the history is a text": ("history", "none"),
    "an epoch has another number": ("history", 0, "epoch", 2),
    "an epoch has no loss": ("history", 0, "loss", None),
    "a loss is nan": ("history", 0, "loss", NAN),
    "a loss is huge": ("history", 0, "loss", 10**400),
    "an epoch is a list": ("history", 0, [1]),
    "seconds are missing": ("seconds", None),
    "seconds are nan": ("seconds", NAN),
    "the accuracy is a text": ("pruned_acc", "high"),
    "the accuracy is missing": ("pruned_acc", None),
}


@pytest.fixture(scope="module")
def interrupted(setting, tmp_path_factory):
    """A directory with an interrupted stage."""
    line, whole = setting
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "ckpt.pth").write_bytes(whole["ckpt.pth"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "SAVE_SECONDS", 0)
        state = state_of(folder, patch, (*line, "--checkpoint-dir", folder, "-pr", "0.5", "-shot", "single"))
    return folder, state.name


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_state_that_does_not_fit_is_named_and_left_alone(setting, interrupted, tmp_path, damage):
    folder, name = interrupted
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    state = tmp_path / "resume" / name
    saved = torch.load(state, weights_only=True)
    *keys, value = DAMAGE[damage]
    change(saved["state"], *keys, value=value)
    checkpoints.save(state, saved)
    before = state.read_bytes()
    done = call("main.py", *setting[0], "--checkpoint-dir", tmp_path, "-pr", "0.5", "-shot", "single")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr == f"main.py: {state} is damaged: delete it to start this stage again\n"
    assert state.read_bytes() == before


def test_settings_of_a_state_are_texts_and_numbers(setting, interrupted, tmp_path):
    folder, name = interrupted
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    state = tmp_path / "resume" / name
    saved = torch.load(state, weights_only=True)
    checkpoints.save(state, saved | {"settings": saved["settings"] | {"lr": torch.zeros(2)}})
    done = call("main.py", *setting[0], "--checkpoint-dir", tmp_path, "-pr", "0.5", "-shot", "single")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{state} is damaged: delete it" in done.stderr


@pytest.mark.parametrize("damage", ["settings", "variance", "no values", "a bit"])
def test_early_weights_are_checked_before_any_work(setting, tmp_path, damage):
    line, _ = setting
    command = (*line, "--checkpoint-dir", tmp_path)
    succeed("main.py", *command, "--rewind", "1")
    path = tmp_path / "ckpt_epoch1.pt"
    early = torch.load(path, weights_only=True)
    changes = {
        "settings": {"settings": early["settings"] | {"lr": torch.zeros(2)}},
        "variance": {"net": early["net"] | {"bn1.running_var": torch.full((16,), -1.0)}},
        "no values": {"net": early["net"] | {"bn1.weight": torch.zeros(16, device="meta")}},
    }
    if damage == "a bit":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        torch.save(early | changes[damage], path)
    done = call("main.py", *command, "--rewind", "1", "-pr", "0.5", "-shot", "iter")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert str(path) in done.stderr


def test_force_does_not_set_results_aside_when_the_early_weights_are_missing(setting, tmp_path, monkeypatch):
    """The dense training that is to be resumed is past the epoch and of another seed than the early weights."""
    line, whole = setting
    command = (*line, "--rewind", "1", "--checkpoint-dir", tmp_path)
    succeed("main.py", *command)
    interrupt(monkeypatch, 3 + 2, *command, "--seed", "1", "--force")
    early = torch.load(tmp_path / "ckpt_epoch1.pt", weights_only=True)
    checkpoints.save(tmp_path / "ckpt_epoch1.pt", early | {"settings": early["settings"] | {"seed": 0}})
    name = "50percent_iter_rewind1_ckpt.pth"
    (tmp_path / name).write_bytes(whole[name])
    before = contents(tmp_path)
    done = call("main.py", *command, "--seed", "1", "-pr", "0.5", "-shot", "iter", "--force")
    assert done.returncode == 2 and "ckpt_epoch1.pt is not of the training of ckpt.pth" in done.stderr
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a bit", "no history"])
def test_a_damaged_level_is_named_before_it_is_trained_from(setting, tmp_path, monkeypatch, damage):
    line, whole = setting
    (tmp_path / "ckpt.pth").write_bytes(whole["ckpt.pth"])
    command = (*line, "-pr", "0.8", "-shot", "iter", "--checkpoint-dir", tmp_path)
    interrupt(monkeypatch, 5 + 2, *command)
    [level] = (tmp_path / "levels").iterdir()
    if damage == "a bit":
        content = bytearray(level.read_bytes())
        content[len(content) // 2] ^= 1
        level.write_bytes(content)
    else:
        saved = torch.load(level, weights_only=True)
        del saved["history"]
        checkpoints.save(level, saved)
    done = call("main.py", *command)
    assert done.returncode == 2 and str(level) in done.stderr
    assert done.stderr.endswith(": delete it, and it is made again\n")
    level.unlink()
    succeed("main.py", *command)
    assert contents(tmp_path).items() <= whole.items()


def test_a_control_does_not_depend_on_excluded_layers(setting, tmp_path):
    """It keeps the zeros of all layers, whatever the pruned networks exclude."""
    line, whole = setting
    (tmp_path / "ckpt.pth").write_bytes(whole["ckpt.pth"])
    net = checkpoints.load_checkpoint(tmp_path / "ckpt.pth")["net"]
    net["linear.weight"][0, :20] = 0.0
    torch.save({"net": net, "acc": 90.0, "epoch": 1}, tmp_path / "ckpt.pth")
    command = (*line, "-shot", "single", "--control", "--checkpoint-dir", tmp_path)
    succeed("main.py", *command, "-pr", "0.5")
    succeed("main.py", *command, "-pr", "0.6", "--exclude", "linear")
    assert torch.load(tmp_path / "control_single_ckpt.pth", weights_only=True)["zeros"] == 20


@pytest.mark.slow
def test_a_flipped_bit_in_a_state_is_noticed_or_changes_nothing(setting, interrupted, tmp_path):
    line, whole = setting
    folder, name = interrupted
    content = (folder / "resume" / name).read_bytes()
    moments, noticed = random.Random(0), 0
    for number in range(12):
        place = tmp_path / str(number)
        shutil.copytree(folder, place)
        bit = moments.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (place / "resume" / name).write_bytes(flipped)
        done = call("main.py", *line, "--checkpoint-dir", place, "-pr", "0.5", "-shot", "single")
        if done.returncode:
            assert done.returncode == 2 and "delete it to start this stage again" in done.stderr
            noticed += 1
        else:
            assert contents(place).items() <= whole.items(), bit
    assert noticed >= 10


@pytest.mark.parametrize("kind", ["text", "a pipe", "a directory", "other settings"])
def test_what_is_no_state_is_named(setting, interrupted, tmp_path, kind):
    folder, name = interrupted
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    state = tmp_path / "resume" / name
    saved = torch.load(state, weights_only=True)
    state.unlink()
    if kind == "text":
        state.write_text("hello")
    elif kind == "a pipe":
        os.mkfifo(state)
    elif kind == "a directory":
        state.mkdir()
    else:
        checkpoints.save(state, saved | {"settings": saved["settings"] | {"seed": 3}})
    done = call("main.py", *setting[0], "--checkpoint-dir", tmp_path, "-pr", "0.5", "-shot", "single")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    messages = {
        "text": "is damaged: delete it",
        "other settings": "was made with other settings: seed 3 there, 0 asked",
    }
    assert f"{state} {messages.get(kind, 'is not a regular file')}" in done.stderr


def test_what_a_kill_left_beside_a_finished_dense_network_goes(setting, tmp_path, monkeypatch):
    """Its own state goes; that of another dense training, beside a network from elsewhere, stays."""
    line, whole = setting
    command = (*line, "--checkpoint-dir", tmp_path)
    prune = (*command, "-pr", "0.5", "-shot", "single")
    for seed, left in ("0", 0), ("1", 1):
        shutil.rmtree(tmp_path)
        interrupt(monkeypatch, 3, *command, "--seed", seed)
        (tmp_path / "ckpt.pth").write_bytes(whole["ckpt.pth"])
        succeed("main.py", *prune)
        assert len(list(tmp_path.glob("resume/*"))) == left


def test_two_runs_in_one_directory_are_refused(tmp_path):
    first, second = stages.Directory(tmp_path), stages.Directory(tmp_path)
    first.open(0)
    with pytest.raises(utils.Failure, match="another run is at work"):
        second.open(0)
    first.close()
    second.open(0)
    second.close()


def test_a_directory_that_cannot_be_used_is_refused(tmp_path, monkeypatch):
    with pytest.raises(utils.Failure, match="MB left"):
        stages.Directory(tmp_path / "full").open(10**18)
    assert not (tmp_path / "full").exists()

    def refuse(path: Path, _mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # as when another user owns the file
    with pytest.raises(utils.Failure, match=r"x/\.lock cannot be written: Permission denied"):
        stages.Directory(tmp_path / "x").open(0)


@pytest.mark.parametrize("name", ["ckpt.pth", "50percent_iter_ckpt.pth", "log.jsonl", "resume/50percent_iter_ckpt.pt"])
def test_a_directory_in_the_place_of_a_file_is_refused_before_any_work(setting, tmp_path, name):
    line, _ = setting
    (tmp_path / name).mkdir(parents=True)
    done = call("main.py", *line, "--checkpoint-dir", tmp_path, "-pr", "0.5", "-shot", "iter")
    assert done.returncode == 2 and done.stderr == f"main.py: {tmp_path / name} is not a regular file\n"


def test_a_file_or_a_link_to_nothing_in_the_place_of_a_directory_is_refused(setting, tmp_path):
    line, _ = setting
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "levels").write_text("")
    for name, message in ("file", "is not a directory"), ("link", "is a link to nothing"), ("x", "is not a directory"):
        done = call("main.py", *line, "--checkpoint-dir", tmp_path / name)
        path = tmp_path / name / ("levels" if name == "x" else "")
        assert done.returncode == 2 and done.stderr == f"main.py: {path} {message}\n"


def test_a_full_disk_does_not_matter_when_there_is_nothing_to_do(setting, tmp_path, monkeypatch):
    line, whole = setting
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1, 1, 0))
    succeed("main.py", *line, *TARGETS, "--checkpoint-dir", tmp_path)
    (tmp_path / "50percent_iter_ckpt.pth").unlink()
    done = call("main.py", *line, *TARGETS, "--checkpoint-dir", tmp_path)
    assert done.returncode == 2 and "the disk has 0 MB left, the run needs" in done.stderr


def test_only_files_of_the_program_are_cleaned_up(setting, tmp_path):
    line, whole = setting
    (tmp_path / "ckpt.pth").write_bytes(whole["ckpt.pth"])
    theirs = [".x.tmp", ".ckpt.pth.tmp", ".notes.12345678.tmp", ".results.csv.12345678.tmp", "x.tmp"]
    ours = [".ckpt.pth.0123abcd.tmp", ".90percent_iter_ckpt.pth.0123abcd.tmp", ".log.jsonl.0123abcd.tmp"]
    for name in theirs + ours:
        (tmp_path / name).write_text("")
    succeed("main.py", *line, "--checkpoint-dir", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.tmp")) == sorted(theirs)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_can_be_resumed(setting, tmp_path, monkeypatch):
    line, whole = setting
    command = (*line, *TARGETS, "--control", "--checkpoint-dir", tmp_path)

    def full(_file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = call("main.py", *command)
    assert done.returncode == 1
    assert done.stderr == f"main.py: {tmp_path / 'resume' / 'ckpt.pt'} cannot be written: No space left on device\n"
    succeed("main.py", *command)
    assert contents(tmp_path) == without(whole, "rewind")


def test_the_log_of_a_resumed_stage_is_that_of_its_state(setting, tmp_path, monkeypatch):
    line, _ = setting
    command = (*line, "--checkpoint-dir", tmp_path, "--epochs", "4")
    interrupt(monkeypatch, 8, *command)  # in the third epoch of three batches
    log = tmp_path / "log.jsonl"
    lines = log.read_text()
    log.write_text(lines + '{"stage": "of another"}\n' + lines.splitlines()[0][:30])  # a line that a crash cut
    succeed("main.py", *command)
    assert [line.partition('"epoch": ')[2][:1] for line in log.read_text().splitlines()] == ["", "1", "2", "3", "4"]


HOLD = "import locks, pathlib, sys, time; lock = locks.acquire(pathlib.Path(sys.argv[1])); print(); time.sleep(600)"


@pytest.mark.parametrize("how", ["killed", "deleted", "requeued"])
def test_the_lock_of_a_dead_run_is_no_obstacle(tmp_path, monkeypatch, how):
    """The kernel releases it; where a server keeps it for a dead node, its file can be deleted, and a requeued SLURM
    job takes it from its earlier start."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        directory = stages.Directory(tmp_path)
        with pytest.raises(utils.Failure, match=rf"another run is at work there \(process {holder.pid} on .*\); if"):
            directory.open(0)
        if how == "killed":
            holder.kill()
            holder.wait()
        elif how == "deleted":
            (tmp_path / ".lock").unlink()
        else:
            monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        directory.open(0)
        with pytest.raises(utils.Failure, match=rf"process {os.getpid()} on"):
            stages.Directory(tmp_path).open(0)
        holder.kill()
    directory.close()
    stages.Directory(tmp_path).open(0)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def flock(*_arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    stages.Directory(tmp_path).open(0)
    assert "has no locks" in capsys.readouterr().out


def test_the_file_of_a_lock_may_hold_anything(tmp_path):
    for content in b"", b"[]", b"7", b'{"host": "\x1b[2J", "process": []}', b"\xff" * 9999, b"[" * 9999:
        (tmp_path / ".lock").write_bytes(content)
        with open(tmp_path / ".lock") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(utils.Failure, match="another run is at work there") as caught:
                stages.Directory(tmp_path).open(0)
            assert str(caught.value).isprintable()
