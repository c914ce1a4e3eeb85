"""deploy.py writes files that hold the same network and reports what it measured."""

import csv
import io
import json
import shutil
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from conftest import SMALL, SMALL_PRUNING, call, succeed
from networks import one_thread, pruned  # noqa: F401 (an automatic fixture)

import checkpoints
import deploy
import pruning
import utils
from deployment import packing, runtimes, tables
from deployment.graph import lower

PRUNED = "90percent_single_ckpt.pth"


def no_compiler(*_arguments, **_options):
    raise RuntimeError("no compiler\nwas found")


pytestmark = pytest.mark.slow  # the fixture packs and times two networks


@pytest.fixture(scope="module")
def deployed(images, tmp_path_factory) -> tuple[Path, str]:
    """The directory of a dense and a pruned network after deploy.py, and what it printed."""
    directory = tmp_path_factory.mktemp("deploy")
    experiment = ("--dataset", images, "--checkpoint-dir", directory, "-pr", "0.9", "-shot", "single")
    succeed("main.py", *experiment, *SMALL, *SMALL_PRUNING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", no_compiler)  # compiling takes half a minute and has a test of its own
        flags = ("--dtype", "bf16", "--onnx", "--safetensors", "--rounds", "2", "--threads", "1")
        done = call("deploy.py", directory, "--dataset", images, *flags)
    assert done.returncode == 0, done.stderr
    assert "torch.compile is not measured because it fails here: no compiler\n" in done.stderr
    assert "compiled" not in done.stdout
    return directory, done.stdout


def read_csv(path: Path, column: str) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of a CSV file by checkpoint and by the value of `column`."""
    with open(path, newline="") as file:
        return {(Path(row["checkpoint"]).name, row[column]): row for row in csv.DictReader(file)}


@pytest.mark.parametrize("name", ["ckpt.pth", PRUNED])
def test_files_hold_the_same_network(deployed, name):
    path = deployed[0] / name
    original = checkpoints.load_checkpoint(path)
    again = checkpoints.load_checkpoint(packing.name(path))
    assert checkpoints.digest(again["net"]) == checkpoints.digest(original["net"])
    assert (again["mean"], again["std"]) == (original["mean"], original["std"])
    rounded = checkpoints.load_checkpoint(packing.name(path, "bf16"))["net"]
    assert all(torch.equal(value == 0, original["net"][key] == 0) for key, value in rounded.items())
    exported = checkpoints.load_checkpoint(path.with_suffix(".safetensors"))
    assert checkpoints.digest(exported["net"]) == checkpoints.digest(original["net"])
    assert exported["acc"] == original["acc"] and exported["mean"] == pytest.approx(original["mean"])
    session = onnxruntime.InferenceSession(path.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    network = checkpoints.build_network(original).eval()
    for count in (1, 5):
        pixels = torch.randn(count, 3, 16, 16)
        logits = torch.from_numpy(session.run(None, {"images": pixels.numpy()})[0])
        torch.testing.assert_close(logits, network(pixels).detach(), rtol=1e-4, atol=1e-4)


def test_onnx_models_say_how_to_use_them(deployed):
    path = deployed[0] / PRUNED
    original = checkpoints.load_checkpoint(path)
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(path.with_suffix(".onnx")).metadata_props}
    assert metadata.pop("mean") == pytest.approx(original["mean"]) and metadata.pop("std") == pytest.approx(
        original["std"]
    )
    assert metadata == {"classes": ["dark", "light"], "image_size": 16}


def test_sizes_of_files(deployed):
    directory, printed = deployed
    rows = read_csv(directory / "deploy_files.csv", "file")
    sizes = {key: int(row["bytes"]) for key, row in rows.items()}
    assert sizes[PRUNED, "packed, fp32"] == packing.name(directory / PRUNED).stat().st_size
    assert sizes[PRUNED, "packed, bf16 (lossy)"] < sizes[PRUNED, "packed, fp32"] < sizes[PRUNED, "gzip -9"]
    assert sizes["ckpt.pth", "ONNX"] == (directory / "ckpt.onnx").stat().st_size
    assert sizes["ckpt.pth", "safetensors"] == (directory / "ckpt.safetensors").stat().st_size
    assert 0 <= float(rows[PRUNED, "packed, bf16 (lossy)"]["accuracy"]) <= 100
    buffer = io.BytesIO()
    torch.save(checkpoints.load_checkpoint(directory / PRUNED)["net"], buffer)
    smaller = float(rows[PRUNED, "packed, fp32"]["times_smaller"])
    assert smaller == pytest.approx(len(buffer.getvalue()) / sizes[PRUNED, "packed, fp32"])
    assert "lossy" in printed and f"{sizes[PRUNED, 'packed, fp32']:,}" in printed


def test_measurements_of_runtimes(deployed):
    directory, printed = deployed
    rows = read_csv(directory / "deploy_runtimes.csv", "runtime")
    assert {name for file, name in rows if file == PRUNED} >= {"PyTorch fp32", "sparse engine"}
    assert {name for file, name in rows if file == "ckpt.pth"} >= {"PyTorch fp32", "onnxruntime fp32"}
    checkpoint = checkpoints.load_checkpoint(directory / PRUNED)
    pytorch, sparse = rows[PRUNED, "PyTorch fp32"], rows[PRUNED, "sparse engine"]
    parameters = {key: value for key, value in checkpoint["net"].items() if key.endswith(("weight", "bias"))}
    assert int(pytorch["nonzeros"]) == sum(int(value.count_nonzero()) for value in parameters.values())
    assert float(pytorch["largest_difference"]) == 0 and float(sparse["largest_difference"]) < 1e-5
    assert pytorch["accuracy"] == sparse["accuracy"] and float(pytorch["accuracy"]) == pytest.approx(checkpoint["acc"])
    counts = pruning.count_macs(checkpoints.build_network(checkpoint), 16).values()
    assert int(pytorch["macs"]) == sum(nonzero for _, nonzero in counts) < sum(dense for dense, _ in counts)
    for row in rows.values():
        for batch in (1, 64):
            times = [float(row[f"{name}_batch{batch}_threads1"]) for name in ("first_decile", "seconds", "last_decile")]
            assert 0 < times[0] <= times[1] <= times[2]
    assert "MACs" in printed
    assert (directory / "deploy.png").read_bytes().startswith(b"\x89PNG")


def test_a_packed_file_is_not_packed_again(deployed, tmp_path):
    """It does not hold the weights before rounding, so another file would claim more than it holds."""
    path = tmp_path / "small_ckpt.bf16.packed"
    path.write_bytes((deployed[0] / "90percent_single_ckpt.bf16.packed").read_bytes())
    assert deploy.find([tmp_path]) == [path]
    assert deploy.write_packed(path, checkpoints.load_checkpoint(path), 1, "fp16", []) == []
    assert list(tmp_path.iterdir()) == [path]


def test_an_old_checkpoint_can_be_deployed(deployed, images, tmp_path):
    """Checkpoints of earlier versions and of other programs do not hold mean and standard deviation."""
    path = tmp_path / "ckpt.pth"
    original = checkpoints.load_checkpoint(deployed[0] / PRUNED)
    torch.save({"net": original["net"], "acc": 50.0, "epoch": 1}, path)
    constants = ("--mean", "0.5", "0.25", "0.5", "--std", "0.25", "0.25", "0.5")
    arguments = ("--dataset", images, "--image-size", "16", "--rounds", "1", "--threads", "1", "--onnx", *constants)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", no_compiler)
        done = call("deploy.py", path, *arguments)
    assert done.returncode == 0, done.stderr
    again = checkpoints.load_checkpoint(packing.name(path))
    assert checkpoints.digest(again["net"]) == checkpoints.digest(original["net"])
    assert (again["mean"], again["std"]) == ([0.5, 0.25, 0.5], [0.25, 0.25, 0.5])
    assert "net of resnet20, 50.00 % by its file\n" in done.stdout
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(path.with_suffix(".onnx")).metadata_props}
    assert metadata["mean"] == again["mean"] and metadata["classes"] == ["dark", "light"]


def test_written_files_are_compared_with_the_checkpoint(deployed, tmp_path, monkeypatch):
    path = tmp_path / PRUNED
    path.write_bytes((deployed[0] / PRUNED).read_bytes())
    checkpoint = checkpoints.load_checkpoint(path)
    other = packing.pack(checkpoint | {"net": {**checkpoint["net"], "linear.bias": torch.ones(2)}})
    with monkeypatch.context() as patch, pytest.raises(utils.Failure, match="does not hold the weights"):
        patch.setattr(packing, "pack", lambda *_: other)
        deploy.write_packed(path, checkpoint, 1, "fp32", [])
    with monkeypatch.context() as patch, pytest.raises(utils.Failure, match="logits of the ONNX model differ"):
        patch.setattr(runtimes, "onnx_session", lambda *_: lambda images: torch.full((len(images), 10), float("nan")))
        network = pruned("padded", 0.5)
        runtimes.export_onnx(network, lower(network, 16), {})


def test_a_network_without_a_program_runs_in_pytorch_only(capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", no_compiler)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.LazyLinear(5))
    network(torch.zeros(1, 3, 16, 16))
    program = runtimes.read(Path("x.pth"), network, 16)
    assert program is None
    error = capsys.readouterr().err
    assert error == "deploy.py: x.pth runs in PyTorch only: 1 (GELU) calls gelu, which is not supported\n"
    made = runtimes.make_runtimes(Path("x.pth"), network, program, 16, 1, baselines=True)
    assert {runtime.name for runtime in made} <= {"PyTorch fp32", "PyTorch bf16"}
    assert made[0].macs == 4 * 27 * 14 * 14 + 5 * 4 * 14 * 14


@pytest.mark.parametrize("size, bins", [((7, 10), (3, 4)), ((2, 3), (7, 1)), ((6, 6), (3, 2))])
def test_adaptive_pooling_in_onnx(size, bins):
    """The exporter itself refuses bins of unequal size."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1),
        torch.nn.AdaptiveAvgPool2d(bins),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * bins[0] * bins[1], 5),
    )
    session = onnxruntime.InferenceSession(runtimes.export_onnx(network, lower(network, size), {}))
    images = torch.randn(3, 3, *size)
    logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(logits, network(images).detach(), rtol=1e-4, atol=1e-5)


def test_each_number_of_threads_is_measured_and_reported():
    used: list[tuple[int, int]] = []
    logits = {batch: torch.ones(batch, 10) for batch in runtimes.CALLS}

    def make(threads: int) -> runtimes.Function | None:
        def run(images: torch.Tensor) -> torch.Tensor:
            used.append((threads, torch.get_num_threads()))
            return logits[len(images)]

        return run if threads < 3 else None  # as a network that is compiled for a fixed number of threads

    before = torch.get_num_threads()
    runtime = runtimes.Runtime("x", "PyTorch fp32", 50.0, 1, 1, make, lambda images: logits[len(images)], False)
    runtimes.time_runtimes([runtime], 16, [1, 2, 3], rounds=3)
    assert torch.get_num_threads() == before
    assert set(used) == {(1, 1), (2, 2)}
    assert {key: len(times) for key, times in runtime.seconds.items()} == {
        (1, 1): 30, (1, 2): 30, (runtimes.BATCH, 1): 3, (runtimes.BATCH, 2): 3,
    }  # fmt: skip
    runtime.seconds = {(1, 1): [0.004, 0.002, 0.003], (1, 2): [0.001], (64, 1): [0.5], (64, 2): [0.25]}
    (row,) = csv.DictReader(io.StringIO(tables.runtimes_csv([runtime], [1, 2, 3]).decode()))
    assert (row["seconds_batch1_threads1"], row["seconds_batch1_threads3"]) == ("0.003", "")
    assert float(row["seconds_batch64_threads2"]) == 0.25
    printed = tables.runtimes_table([runtime], [1, 2, 3])
    assert "3.00 (2.00-4.00)" in printed and "1.00 (1.00-1.00)" in printed and "256 (256-256)" in printed


def test_a_wrong_runtime_is_not_measured():
    network = pruned("padded", 0.5)
    for wrong in (lambda x: network(x).detach() * 1.2, lambda x: torch.full((len(x), 10), float("nan"))):
        reference = runtimes.in_pytorch(network)
        runtime = runtimes.Runtime("x", "wrong", 0, 0, 0, lambda _, wrong=wrong: wrong, reference, False)
        with pytest.raises(utils.Failure, match="wrong of x: logits are off"):
            runtimes.time_runtimes([runtime], 16, [1], 1)


def test_a_network_that_computes_nan_is_refused():
    network = pruned("padded", 0.5)
    with torch.no_grad():
        network.layer1[0].bn1.running_var[0] = -1
    with pytest.raises(utils.Failure, match="NaN or inf"):
        deploy.check_logits(Path("x"), network, 16)


def test_a_checkpoint_is_found_once_and_has_its_own_packed_file(tmp_path):
    (tmp_path / "ckpt.pth").touch()
    assert deploy.find([tmp_path, tmp_path / "ckpt.pth", tmp_path / ".." / tmp_path.name / "ckpt.pth"]) == [
        tmp_path / "ckpt.pth"
    ]
    with pytest.raises(utils.Failure, match="and of another checkpoint"):
        deploy.find([tmp_path / "ckpt.pth", tmp_path / "ckpt.pt"])


def test_reports_that_cannot_be_written_are_noticed_before_any_work(tmp_path):
    (tmp_path / "deploy.png").mkdir()
    with pytest.raises(utils.Failure, match=r"deploy\.png cannot be written"):
        deploy.report_directory({tmp_path / "ckpt.pth": {}})


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled(monkeypatch):
    monkeypatch.setattr(runtimes, "CALLS", {2: 1})  # each size of batch is compiled by itself
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(runtimes.compile_or_warn(network, 16)(pixels), network(pixels).detach())


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["nowhere.pth"], "nowhere.pth does not exist"),
        (["."], "holds no checkpoint"),
        (["broken_ckpt.pth"], "broken_ckpt.pth"),
        ([], "CHECKPOINT"),
        (["x", "--dtype", "int8"], "--dtype"),
        (["x", "--rounds", "0"], "--rounds"),
        (["x", "--threads", "0"], "--threads"),
        (["x", "--threads", "100000"], "--threads"),
    ],
)
def test_bad_input(arguments, complaint, tmp_path, monkeypatch):
    if "broken_ckpt.pth" in arguments:
        (tmp_path / "broken_ckpt.pth").write_bytes(b"PK\x03\x04 and so on")
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    done = call("deploy.py", *arguments)
    assert done.returncode == 2 and not done.stdout
    assert complaint in done.stderr and done.stderr.startswith("deploy.py: ") and done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
