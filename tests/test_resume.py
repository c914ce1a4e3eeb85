"""An experiment that is killed and resumed ends with the files of one that never stopped."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL, SMALL_PRUNING, command, commands, write_images

import store
import utils


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A command of many short epochs, and the files that it leaves when nothing stops it."""
    folder = tmp_path_factory.mktemp("resume")
    images = write_images(folder / "images", train=60)
    line = ["main.py", *SMALL, *SMALL_PRUNING, "--epochs", "6", "--retrain-epochs", "3", "--final-epochs", "3"]
    line += ["-pr", "0.5", "0.8", "-shot", "single", "iter", "--dataset", images]
    done = command(*line, "--checkpoint-dir", folder / "whole")
    assert done.returncode == 0, done.stderr
    return line, results(folder / "whole")


def results(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.pth"))}


def start(line: list, folder) -> subprocess.Popen:
    """The command with -r, which keeps a state after every epoch and not just twice a minute."""
    script, *arguments = (str(part) for part in line)
    often = f"import runpy, engine; engine.KEEP_SECONDS = 0; runpy.run_path({script!r}, run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", often, *arguments, "--checkpoint-dir", str(folder), "-r"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )


def progress(folder) -> int:
    """Changes whenever the run has written something."""
    paths = [*folder.glob("*.pth"), *folder.glob("resume/*")]
    return max((path.stat().st_mtime_ns for path in paths), default=0)


def test_killed_at_random_moments_and_resumed_the_files_are_the_same(setting, tmp_path, pytestconfig):
    line, whole = setting
    folder = tmp_path / "checkpoint"
    moments, kills = random.Random(0), 0

    def live(until_killed: bool) -> subprocess.CompletedProcess:
        before = progress(folder)
        life = commands().start(*line, "--checkpoint-dir", folder, "-r", keep_seconds=0)
        if until_killed:
            while os.path.exists(f"/proc/{life}") and progress(folder) == before:  # every life gets an epoch further
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.4))
            with contextlib.suppress(ProcessLookupError):
                os.kill(life, signal.SIGKILL)
        return commands().wait()

    while kills < pytestconfig.getoption("kills"):
        end = live(until_killed=True)
        if end.returncode == 0:  # finished before it was killed: start over
            assert results(folder) == whole
            for path in folder.glob("*.pth"):
                path.unlink()
        else:
            assert end.returncode == -signal.SIGKILL, end.stderr
            kills += 1
    end = live(until_killed=False)
    assert end.returncode == 0, end.stderr
    assert results(folder) == whole
    assert not (folder / "resume").exists()
    assert not list(folder.glob("*.tmp")) + list(folder.glob(".*.tmp"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_in_order(setting, tmp_path, number, code):
    line, whole = setting
    run = start(line, tmp_path)
    while run.poll() is None and not progress(tmp_path):
        time.sleep(0.01)
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == code
    assert "the same command with -r goes on" in errors
    assert errors.count("\n") == 1
    if number == signal.SIGINT:
        return  # what follows is the same
    refused = command(*line, "--checkpoint-dir", tmp_path)
    assert refused.returncode == 2
    assert "holds an interrupted run (dense): -r goes on with it" in refused.stderr
    other = command(*line, "--checkpoint-dir", tmp_path, "-r", "--lr", "0.05", "--seed", "1")
    assert other.returncode == 2
    assert "lr 0.1 there, 0.05 asked, seed 0 there, 1 asked" in other.stderr
    run = start(line, tmp_path)
    run.communicate()
    assert results(tmp_path) == whole


def test_a_stage_that_the_command_does_not_have_is_not_resumed(setting, tmp_path):
    line, whole = setting
    (tmp_path / "ckpt.pth").write_bytes(whole["ckpt.pth"])
    (tmp_path / "resume").mkdir()
    settings = {"mode": "iter", "retrain": "distilled", "recipe": 3, "sparsity": 0.7, "seed": 0}
    older, steps = ({n: v for n, v in settings.items() if n != name} for name in ("recipe", "sparsity"))
    parent = store.digest(store.load_checkpoint(tmp_path / "ckpt.pth")["net"])
    for saved, change, message in (
        (older, ("-pr", "0.7"), "recipe 1 there, 3 asked"),
        (settings, (), "sparsity 0.7 there, 0.5 0.8 asked"),
        (settings, ("-pr", "0.7", "--seed", "1", "--force"), "seed 0 there, 1 asked"),
        (settings | {"final_epochs": 9}, ("-pr", "0.7"), "final_epochs 9 there, 3 asked"),
        (steps | {"final_epochs": 9}, ("-pr", "0.7"), "final_epochs 9 there, 3 asked"),
        (settings | {"parent": "x"}, ("-pr", "0.7"), f"parent x there, {parent} asked"),
        # The control is trained for as long as the largest target.
        (settings | {"sparsity": 0.0, "step_epochs": 3}, ("-pr", "0"), "step_epochs 3 there, 4 asked"),
    ):
        store.save(tmp_path / "resume" / "70percent_iter_final.pt", {"settings": saved, "state": {}})
        done = command(*line, *change, "--checkpoint-dir", tmp_path, "-r")
        assert not (tmp_path / "resume" / "redo.json").exists()
        assert done.returncode == 2
        assert done.stderr.endswith(f"70percent_iter_final.pt was made with other settings: {message}\n")
    # A loop over commands, started again with -r, comes by those that are done.
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    done = command(*line, "--checkpoint-dir", tmp_path, "-r", "--lr", "0.2", "--final-epochs", "9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is there already (lr 0.1 there, 0.2 asked): skipped") == 2
    assert done.stdout.count("is there already (lr 0.1 there, 0.2 asked, final_epochs 3 there, 9 asked): skipped") == 2
    assert "an interrupted run with other settings waits" in done.stdout
    assert results(tmp_path) == whole
    assert (tmp_path / "resume" / "70percent_iter_final.pt").exists()


def test_a_target_added_on_resuming_does_not_cost_the_steps_that_are_done(setting, tmp_path):
    line, whole = setting
    line = [*line[: line.index("-pr")], "-shot", "iter", *line[line.index("--dataset") :]]
    (tmp_path / "ckpt.pth").write_bytes(whole["ckpt.pth"])
    trunk = tmp_path / "resume" / "iter_trunk.pt"

    def kill_at(step: int, *targets: str) -> None:
        run = start([*line, "-pr", *targets], tmp_path)
        # 0 is before the first step, for as long as that takes.
        while not (trunk.exists() and store.load(trunk)["state"]["step"] == step):
            assert run.poll() is None
            time.sleep(0.002)
        run.kill()
        run.communicate()
        for state in trunk.parent.glob("80percent*"):
            state.unlink()

    for step in 0, 2:
        kill_at(step, "0.8")
        steps = trunk.read_bytes()
        done = command(*line, "-pr", "0.5", "--checkpoint-dir", tmp_path, "-r")
        assert done.returncode == 2
        assert done.stderr == f"main.py: {trunk} was made with other settings: sparsity 0.8 there, 0.5 asked\n"
        assert trunk.read_bytes() == steps
    kill_at(0, "0.5", "0.8")
    assert (tmp_path / "80percent_iter_ckpt.pth").exists()
    (tmp_path / "80percent_iter_ckpt.pth").unlink()
    done = command(*line, "-pr", "0.5", "0.8", "--checkpoint-dir", tmp_path, "-r")
    assert done.returncode == 0, done.stderr
    assert not trunk.exists()
    iterative = {name: content for name, content in whole.items() if "single" not in name}
    assert results(tmp_path) == iterative


def test_two_runs_in_one_directory_do_not_meet(tmp_path):
    first = store.Directory(tmp_path, ["ckpt.pth"], False, False, 0)
    with pytest.raises(utils.Failure, match="another run is at work"):
        store.Directory(tmp_path, ["ckpt.pth"], False, False, 0)
    first.lock.release()
    store.Directory(tmp_path, ["ckpt.pth"], False, False, 0).lock.release()


def test_a_directory_that_cannot_be_used_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(utils.Failure, match="file cannot be written"):
        store.Directory(tmp_path / "file", [], False, False, 0)
    with pytest.raises(utils.Failure, match="MB of disk left"):
        store.Directory(tmp_path / "full", [], False, False, 10**18)
    assert not (tmp_path / "full").exists()


def work(folder, asked: list[str], **flags: bool) -> store.Directory:
    directory = store.Directory(folder, asked, **({"resume": False, "force": False} | flags), bytes_needed=0)
    directory.begin()
    return directory


def test_forced_results_are_remembered_until_they_are_made(tmp_path):
    for name in ("a.pth", "b.pth"):
        store.save(tmp_path / name, {})
    first = work(tmp_path, ["c.pth", "a.pth"], force=True)
    first.finish("c.pth", {"new": 1})
    assert not first.has("a.pth")
    assert first.has("b.pth")
    first.keep("a", {}, {})
    first.lock.release()
    # Interrupted; then another target is made again first.
    other = work(tmp_path, ["b.pth"], resume=True, force=True)
    assert not other.has("b.pth")
    other.finish("b.pth", {"new": 1})
    assert other.has("b.pth")
    other.close()
    other.lock.release()
    again = work(tmp_path, ["c.pth", "a.pth", "b.pth"], resume=True, force=True)
    assert again.has("c.pth")
    assert not again.has("a.pth")
    assert again.has("b.pth")
    again.finish("a.pth", {"new": 1})
    again.forget("a")
    again.close()
    again.lock.release()
    assert not (tmp_path / "resume").exists()


def test_damaged_states_are_named(setting, tmp_path):
    line, whole = setting
    (tmp_path / "ckpt.pth").write_bytes(whole["ckpt.pth"])
    (tmp_path / "found.pth").write_bytes(whole["50percent_single_ckpt.pth"])
    directory = work(tmp_path, [])
    store.save(tmp_path / "resume" / "a.pt", {"settings": 1})
    (tmp_path / "resume" / "b.pt").write_text("hello")
    for stage in "ab":
        with pytest.raises(utils.Failure, match=rf"{stage}\.pt is"):
            directory.kept(stage, {})
    (tmp_path / "resume" / "redo.json").write_text("{")
    directory.lock.release()
    with pytest.raises(utils.Failure, match=r"redo\.json is damaged"):
        work(tmp_path, [], resume=True)
    shutil.rmtree(tmp_path / "resume")
    settings = store.load(tmp_path / "found.pth")["settings"]
    directory.states.mkdir()
    directory.keep("50percent_single", settings, {"epoch": 1, "step": 0, "history": []})
    done = command(*line, "--checkpoint-dir", tmp_path, "-r")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the state of 50percent_single is damaged: --force starts again" in done.stderr


def test_a_state_whose_result_is_there_is_cleared(setting, tmp_path):
    """As a kill between the writing of the one and the deletion of the other leaves it."""
    line, whole = setting
    (tmp_path / "resume").mkdir()
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    for stage, result in (
        ("dense", ""),
        ("50percent_single", "50percent_single_"),
        ("80percent_iter_final", "80percent_iter_"),
    ):
        settings = store.load(tmp_path / f"{result}ckpt.pth")["settings"]
        store.save(tmp_path / "resume" / f"{stage}.pt", {"settings": settings, "state": {"epoch": 6}})
    settings = {name: settings[name] for name in settings if name != "sparsity"}
    # The steps that another command's target needs stay.
    for targets, left in ([0.5, 0.9], 1), ([0.5, 0.8], 0):
        trunk = {"settings": settings, "state": {"step": 1, "targets": targets}}
        store.save(tmp_path / "resume" / "iter_trunk.pt", trunk)
        done = command(*line, "--checkpoint-dir", tmp_path, "-r")
        assert done.returncode == 0, done.stderr
        assert results(tmp_path) == whole
        assert len(list(tmp_path.glob("resume/*"))) == left
    assert not (tmp_path / "resume").exists()
    # But one of a training that goes on beside a dense network from elsewhere is not.
    (tmp_path / "resume").mkdir()
    store.save(tmp_path / "resume" / "dense.pt", {"settings": {"epochs": 6}, "state": {"epoch": 3}})
    done = command(*line, "--checkpoint-dir", tmp_path, "-r")
    assert done.returncode == 2
    assert "dense.pt is an interrupted training, and ckpt.pth is there" in done.stderr
    assert (tmp_path / "resume" / "dense.pt").exists()


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files as POSIX systems can")
def test_a_write_that_fails_in_the_middle_of_a_run_is_one_line_and_can_be_resumed(setting, tmp_path):
    """A limit on the size of files stands for a full disk: a few bytes are written, then no more."""
    import resource

    line, whole = setting
    script, *arguments = map(str, line)

    def limited(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(ROOT / script), *arguments, "--checkpoint-dir", str(tmp_path), *more],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000)),
            capture_output=True,
            text=True,
            timeout=240,
        )

    done = limited()
    assert done.returncode == 1
    assert done.stderr == f"main.py: {tmp_path / 'resume' / 'dense.pt'} cannot be written: File too large\n"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]
    # What --force asked for is known before anything is made.
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    assert limited("--force").returncode == 1
    assert results(tmp_path) == whole
    redo = json.loads((tmp_path / "resume" / "redo.json").read_text())
    assert redo == {name: True for name in whole if name != "ckpt.pth"}
