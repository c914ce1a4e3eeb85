"""Studies: the scripts in runs/, on one machine and on a SLURM cluster of one node."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, contents, succeed

GRID = """# A comment, and task in its middle.
task a --seed 0
task b --seed 1
task c --seed 2 --lr 0.05
task d --seed 3
run
run -pr 0.5 -shot single --retrain-epochs 2
"""
FLAGS = {"a": ("--seed", "0"), "b": ("--seed", "1"), "c": ("--seed", "2", "--lr", "0.05"), "d": ("--seed", "3")}
# What `python` is for the scripts: main.py, which saves its state after each epoch. In the directories b, c and d its
# first start waits there once for what the test does to it.
PYTHON = """
import os, runpy, sys, time
from pathlib import Path
sys.argv = sys.argv[1:]
sys.path.insert(0, os.getcwd())
import engine, stages, utils
engine.SAVE_SECONDS = 0
save = stages.Directory.save_state

def save_state(directory, stage, state):
    save(directory, stage, state)
    held = Path(os.environ["HELD"]) / directory.path.name
    if directory.path.name in os.environ["HOLD"].split() and not held.exists():
        held.with_suffix(".new").write_text(str(os.getpid()))
        held.with_suffix(".new").rename(held)
        while not utils.stop_requested():
            time.sleep(0.02)

stages.Directory.save_state = save_state
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def setting(images, tmp_path_factory) -> tuple[Path, list[str], dict[str, dict[str, bytes]]]:
    """A grid, the flags of all runs, and the results that each task leaves when nothing stops it."""
    folder = tmp_path_factory.mktemp("cluster")
    grid = folder / "small.grid"
    grid.write_text(GRID)
    line = [*SMALL, "--dataset", str(images)]
    for name, flags in FLAGS.items():
        pruning = ("-pr", "0.5", "-shot", "single", "--retrain-epochs", "2")
        succeed("main.py", *line, *flags, *pruning, "--checkpoint-dir", folder / name)
    return grid, line, {name: contents(folder / name) for name in FLAGS}


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """For the scripts: `python` that saves often, on one thread."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "held").mkdir()
    (tmp_path / "often.py").write_text(PYTHON)
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/often.py "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    changed = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HELD": f"{tmp_path}/held", "HOLD": ""}
    return {**os.environ, **changed, "OMP_NUM_THREADS": "1"}


def run(*arguments: object, environment: dict[str, str]) -> subprocess.CompletedProcess:
    line = [str(argument) for argument in arguments]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def wait_for(condition: Callable[[], object]) -> None:
    """It ends sooner or later: the deadline is for what never ends."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_task_runs_all_lines_of_its_grid(setting, environment, tmp_path):
    grid, line, whole = setting
    done = run("sh", "runs/task.sh", grid, 3, tmp_path / "study", *line, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tmp_path / "study" / "c") == whole["c"]
    assert sorted(path.name for path in (tmp_path / "study").iterdir()) == ["c"]


def test_a_number_that_the_grid_does_not_have_is_refused(environment, tmp_path):
    (tmp_path / "grid").write_text(GRID)
    done = run("sh", "runs/task.sh", tmp_path / "grid", 5, tmp_path / "study", environment=environment)
    assert done.returncode == 2 and done.stderr == f"{tmp_path}/grid has no task 5\n"
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_a_study_on_two_gpus(setting, environment, tmp_path):
    """A task that fails keeps none of the others from running."""
    _, line, whole = setting
    grid = tmp_path / "grid"
    grid.write_text(
        "task a --seed 0\ntask bad --seed -1\ntask b --seed 1\nrun -pr 0.5 -shot single --retrain-epochs 2\n"
    )
    environment["CUDA_VISIBLE_DEVICES"] = "0,1"
    done = run("sh", "runs/study.sh", grid, tmp_path / "study", *line, environment=environment)
    assert done.returncode == 1 and "task 2 ended with exit code 2" in done.stderr
    assert {name: contents(tmp_path / "study" / name) for name in "ab"} == {name: whole[name] for name in "ab"}
    logs = sorted((tmp_path / "study").glob("*/study.log"))
    assert [log.parent.name for log in logs] == ["a", "b", "bad"]
    assert "on GPU 0: " in done.stdout and "on GPU 1: " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("gpus", ["", "0,0"])
def test_a_signal_stops_a_study_and_the_same_line_resumes_it(setting, environment, tmp_path, gpus):
    """It ends after its runs, which save their states."""
    _, line, whole = setting
    grid = tmp_path / "grid"
    grid.write_text("task a --seed 0\ntask b --seed 1\nrun -pr 0.5 -shot single --retrain-epochs 2\n")
    command = ["sh", "runs/study.sh", str(grid), str(tmp_path / "study"), *line]
    running = "ab" if gpus else "a"
    environment |= {"CUDA_VISIBLE_DEVICES": gpus, "HOLD": " ".join(running)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as study:
        wait_for(lambda: all((tmp_path / "held" / name).exists() for name in running))
        os.killpg(study.pid, signal.SIGTERM)
        assert study.wait(240) == 143
    for name in running:
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "held" / name).read_text()), 0)
        assert list((tmp_path / "study" / name / "resume").iterdir())
    assert bool(gpus) == (tmp_path / "study" / "b").exists()
    assert subprocess.run(command, cwd=ROOT, env=environment, timeout=240).returncode == 0
    assert {name: contents(tmp_path / "study" / name) for name in "ab"} == {name: whole[name] for name in "ab"}


def test_the_shipped_grid_fits_its_array():
    grid = (ROOT / "runs" / "study.grid").read_text().splitlines()
    tasks = [line.split() for line in grid if line.startswith("task ")]
    assert len({task[1] for task in tasks}) == len(tasks) == len({tuple(task[2:]) for task in tasks})
    assert f"\n#SBATCH --array=1-{len(tasks)}\n" in (ROOT / "runs" / "study.sbatch").read_text()


@pytest.fixture
def cluster(environment, tmp_path_factory) -> Iterator[dict[str, str]]:
    """SLURM on this machine, for the environment that it yields."""
    folder = tmp_path_factory.mktemp("slurm")
    environment["SLURM_CONF"] = f"{folder}/slurm.conf"
    try:
        done = run("sh", "tests/slurm.sh", folder, environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        yield environment
    finally:
        subprocess.run(["scancel", "--user", str(os.getuid())], env=environment, capture_output=True)
        run("sh", "tests/slurm.sh", folder, "stop", environment=environment)


@pytest.mark.slow
@pytest.mark.slurm
def test_an_array_that_is_killed_and_requeued_ends_with_the_files_of_an_undisturbed_one(setting, cluster, tmp_path):
    """Task a is left alone. Each of the others waits after its first state: b for SIGKILL, c for `scontrol requeue`, d
    for the notice before the time limit."""
    grid, line, whole = setting
    cluster["HOLD"] = "b c d"

    def slurm(*arguments: str) -> str:
        done = run(*arguments, environment=cluster)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def job(number: int) -> dict[str, str]:
        return dict(re.findall(r"(\S+?)=(\S*)", slurm("scontrol", "show", "job", f"{array}_{number}")))

    output = ("--output", str(tmp_path / "%a.out"))
    array = slurm(
        "sbatch",
        "--parsable",
        "--array=1-4",
        *output,
        "runs/study.sbatch",
        *map(str, (grid, tmp_path / "study", *line)),
    )
    array = array.strip()
    held = tmp_path / "held"
    wait_for(lambda: len([path for path in held.iterdir() if not path.suffix]) == 3)
    os.kill(int((held / "b").read_text()), signal.SIGKILL)
    slurm("scontrol", "requeue", f"{array}_3")
    slurm("scancel", "--batch", "--signal=USR1", f"{array}_4")
    wait_for(lambda: job(2)["JobState"] == "FAILED")
    assert list((tmp_path / "study" / "b" / "resume").iterdir())
    slurm("scontrol", "requeue", f"{array}_2")
    wait_for(lambda: [job(number)["JobState"] for number in (1, 2, 3, 4)] == ["COMPLETED"] * 4)
    assert [job(number)["Restarts"] for number in (1, 2, 3, 4)] == ["0", "1", "1", "1"]
    for number, name in enumerate(FLAGS, start=1):
        assert contents(tmp_path / "study" / name) == whole[name], (tmp_path / f"{number}.out").read_text()
    printed = succeed(
        "test.py", "--checkpoint-dir", *sorted((tmp_path / "study").iterdir()), *line[-2:], "--device", "cpu"
    )
    assert "lacks" not in printed and "has no" not in printed and "interrupted" not in printed
