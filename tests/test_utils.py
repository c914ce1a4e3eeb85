"""Small helpers: numbers on the command line, seeds, device and precision, memory, signals, exit codes."""

import argparse
import ctypes
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import utils

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


# --- The command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("count", {"1": 1, "200": 200, "1000000": 10**6}, ["0", "-3", "1.5", "many", "", "1000001"]),
        ("positive_float", {"0.1": 0.1, "3": 3.0, "1e-9": 1e-9}, ["0", "-0.1", "nan", "inf", "fast"]),
        ("fraction", {"0.11": 0.11}, ["0", "1", "-0.1", "nan"]),
        ("fraction_or_zero", {"0": 0.0, "0.25": 0.25}, ["1", "-0.1", "nan"]),
        ("seed", {"0": 0, str(2**63 - 1): 2**63 - 1}, ["-1", str(2**63), "0.5"]),
        ("image_size", {"16": 16, "1024": 1024}, ["15", "1025", "10000000", "32.0"]),
        ("sparsity", {"0.9": 0.9, "0.875": 0.875, "0.998046": 0.998046}, ["0", "-0.0", "1", "1.5", "nan", "ninety"]),
    ],
)
def test_numbers_are_read_or_refused(kind, good, bad):
    parse = getattr(utils, kind)
    for text, value in good.items():
        assert parse(text) == value and type(parse(text)) is type(value)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text!r} is not a "):
            parse(text)


@pytest.mark.parametrize("text", ["0.99999999", "1e-8", "0.12345678"])
def test_a_sparsity_has_no_more_digits_than_a_file_name_carries(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^'{text}' in percent has more than the six digits"):
        utils.sparsity(text)


def test_errors_take_one_line_and_abbreviations_are_refused(capsys):
    parser = utils.Parser(prog="main.py")
    parser.add_argument("--epochs", type=utils.count, default=200, help="how many")
    parser.add_argument("--force", action="store_true", help="do it")
    for arguments, message in (
        (["--epoch", "3"], "main.py: unrecognized arguments: --epoch 3\n"),
        (["--epochs", "0"], "main.py: argument --epochs: '0' is not a whole number from 1 to 1,000,000\n"),
    ):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(arguments)
        assert (end.value.code, *capsys.readouterr()) == (2, "", message)
    text = parser.format_help()
    assert "how many (default: 200)" in text and "do it\n" in text


def test_settings_that_differ_are_named():
    saved, asked = {"lr": 0.1, "seed": 0, "old": 1}, {"lr": 0.2, "seed": 0, "new": 2}
    assert utils.difference(saved, asked) == "lr 0.1 there, 0.2 asked, old 1 there, None asked, new None there, 2 asked"
    assert utils.difference(saved, dict(saved)) == ""


def raised(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (utils.Failure("two\nlines  of input"), "two lines of input", 2),
        (utils.Failure("the disk is full", code=1), "the disk is full", 1),
        (FileNotFoundError(2, "No such file or directory", "x"), "x: No such file or directory", 2),
        (OSError("odd"), "a file: odd", 2),
        (
            torch.OutOfMemoryError("CUDA"),
            "the GPU has too little memory: try a smaller --batch-size or --image-size",
            1,
        ),
        (utils.Interrupted("stopped"), "stopped", 128 + signal.SIGTERM),
    ],
)
def test_an_error_becomes_one_line_and_an_exit_code(error, line, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/main.py"])
    monkeypatch.setattr(utils, "_signal", int(signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        utils.run(raised(error))
    assert (end.value.code, *capsys.readouterr()) == (code, "", f"main.py: {line}\n")


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(ValueError, match="a bug"):
        utils.run(raised(ValueError("a bug")))


@pytest.mark.parametrize(("returned", "code"), [(None, None), (0, 0), (1, 1)])
def test_what_main_returns_is_the_exit_code(returned, code):
    with pytest.raises(SystemExit) as end:
        utils.run(lambda: returned)
    assert end.value.code == code


# --- Seeds ---------------------------------------------------------------------------------------------------------


def test_a_derived_seed_depends_on_every_part_and_never_changes():
    """Another number here would change every result."""
    assert utils.derive_seed(0, "ckpt.pth", 0) == 4_582_581_081_860_454_481
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a"), (0, "a", 10), (0, 1, 0)]
    seeds = {utils.derive_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


# --- Device, precision and memory ----------------------------------------------------------------------------------


def test_the_device_is_the_gpu_if_there_is_one(monkeypatch):
    for available, name in (True, "cuda"), (False, "cpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert utils.choose_device("auto") == torch.device(name)
    assert utils.choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert utils.choose_device("cuda") == torch.device("cuda")
    assert utils.choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(utils.Failure, match=r"^argument --device: no cuda:2 here: this machine has 2 CUDA devices$"):
        utils.choose_device("cuda:2")


@pytest.mark.parametrize("name", ["tpu", "cuda:-1", "cuda:", "cuda:0x1", "cpu:0", "CUDA", "", "cuda:" + "1" * 5000])
def test_other_devices_are_refused_in_a_short_line(name):
    with pytest.raises(utils.Failure, match=r"is not auto, cpu, cuda or cuda:N$") as failure:
        utils.choose_device(name)
    assert len(str(failure.value)) < 120


@pytest.mark.parametrize(
    ("precision", "hardware", "dtype"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("fp32", True, torch.float32),
        ("bf16", False, torch.bfloat16),
    ],
)
def test_the_type_is_what_the_processor_has_unless_it_is_given(precision, hardware, dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("flags : fpu amx_bf16" if hardware else "flags : fpu")
    assert utils.choose_dtype(precision, CPU) == dtype
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_more: hardware)
    assert utils.choose_dtype(precision, torch.device("cuda")) == dtype


@pytest.mark.parametrize(
    ("cpuinfo", "dtype"),
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f avx512_bf16\n", torch.bfloat16),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f\n", torch.float32),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16\n", torch.float32),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16\n", torch.bfloat16),
        (None, torch.float32),
    ],
)
def test_auto_is_bf16_only_where_the_processor_is_faster_in_it(cpuinfo, dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert utils.choose_dtype("auto", CPU) == dtype


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is kept on Linux")
def test_large_tensors_lie_in_the_heap_and_are_not_mapped_one_by_one():
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("not glibc")
    program = """
import torch, utils
utils.set_up(torch.device("cpu"))
tensor = torch.empty(2**24)
heap = next(line.split()[0] for line in open("/proc/self/maps") if line.endswith("[heap]\\n"))
start, end = (int(address, 16) for address in heap.split("-"))
assert start <= tensor.data_ptr() < end, (heap, tensor.data_ptr())
"""  # in a process of its own: a long one has more than one heap
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_a_gpu_without_a_number_can_be_set_up(monkeypatch):
    """As far as that goes without one: nothing here touches it."""
    for setting in "benchmark", "allow_tf32":
        monkeypatch.setattr(torch.backends.cudnn, setting, getattr(torch.backends.cudnn, setting))
    utils.set_up(torch.device("cuda"))
    assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_with_a_number_becomes_the_current_one():
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    before = torch.cuda.current_device()
    try:
        utils.set_up(last)
        assert torch.zeros(1, device="cuda").device == last
    finally:
        torch.cuda.set_device(before)


# --- Signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered_and_a_second_one_ends_the_process(number, monkeypatch):
    before = signal.getsignal(number)
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with utils.stopping_on_signals():
        assert not utils.stop_requested()
        signal.raise_signal(number)
        assert utils.stop_requested() and codes == []
        signal.raise_signal(number)
        assert codes == [128 + number]
    assert signal.getsignal(number) is before
    with utils.stopping_on_signals():
        assert not utils.stop_requested(), "a signal of an earlier run"
