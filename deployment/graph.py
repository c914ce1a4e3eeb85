"""Read any convolutional network as a program.

PyTorch runs the network once, on black images, and a TorchFunctionMode sees every function that it calls, whether a
module, `F` or a method calls it. Convolutions and Linear layers are not computed. Tracing by torch.fx would see proxies
without shapes in place of tensors, and would need a rule for each module besides the one for each function. Tensors of
the device meta would cost two seconds of imports.

Functions that only move elements (view, flatten, transpose, chunk, slices, padding with zeros) write no operation.
They are applied to a tensor of element numbers instead. The next operation reads off the numbers which elements it
gets, and in which order: a Linear layer arranges its weights accordingly, and a convolution its channels.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deployment.program import Operation, Program
from deployment.rules import FACTS, RULES, STAND_INS
from deployment.selection import BATCH, Selection, Value, numbers, select, with_four_dimensions
from deployment.simplification import fuse


class Unsupported(ValueError):
    """What a program cannot express."""


def lower(network: nn.Module, image_size: int | tuple[int, int] = 32) -> Program:
    """The program of a network in evaluation, for images of `image_size` (height, width).

    BatchNorm, activations and residual additions are part of the convolutions that can absorb them. The network is
    not changed. Raises ValueError, naming the module, for what a program cannot express, and for weights that are not
    float32.
    """
    network = getattr(network, "_orig_mod", network)  # as it was before torch.compile
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ValueError(f"the weights of the network are not float32: {name} is {str(value.dtype)[6:]}")
    reader = Reader()
    modes = {module: module.training for module in network.modules()}
    hooks: list = []
    images = torch.zeros(BATCH, 3, *size, dtype=torch.float32)
    images.program_value = Value(0, (3, *size))
    try:
        for name, module in network.named_modules():
            hooks += reader.watch(name, module)
        network.eval()
        with torch.no_grad(), reader:
            logits = network(images)
        reader.finish(logits)
    except Unsupported:
        raise
    except Exception as error:
        where, reason = reader.where(), " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where} cannot be read for images of {size[0]}x{size[1]}: {reason}") from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    program = fuse(Program(reader.operations, size))
    own = {value.data_ptr() for value in (*network.parameters(), *network.buffers())}
    for operation in program.operations:  # later changes to the network have no effect
        for key in ("weight", "bias"):
            if (value := getattr(operation, key)) is not None and value.data_ptr() in own:
                setattr(operation, key, value.clone())
    return program


class Reader(TorchFunctionMode):
    """Writes an operation for each function of a traced call."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.modules: list[tuple[str, nn.Module]] = []  # that are being called, the innermost last

    # --- What is called ---------------------------------------------------------------------------------------------

    def watch(self, name: str, module: nn.Module) -> list:
        """Hooks that keep `modules` up to date."""

        def enter(*_: object) -> None:
            self.modules.append((name, module))

        def leave(*_: object) -> None:
            self.modules.pop()

        return [module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)]

    def where(self) -> str:
        """The innermost module that is being called."""
        name, module = self.modules[-1] if self.modules else ("", None)
        return f"{name} ({type(module).__name__})" if name else "the network"

    def unsupported(self, what: str) -> Unsupported:
        return Unsupported(f"{self.where()} {what}")

    def __torch_function__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        kwargs = dict(kwargs or {})
        if "input" in kwargs and not args:
            args = (kwargs.pop("input"),)
        if "other" in kwargs:
            args = (*args, kwargs.pop("other"))
        if not any(hasattr(x, "program_value") for x in flat([args, kwargs])):
            return function(*args, **kwargs)
        name = (function.__self__ if function.__name__ == "__get__" else function).__name__.strip("_")
        # Shapes, the errors of PyTorch, and the tensor that an in-place call changes.
        result = STAND_INS.get(name, function)(*on_cpu(args), **on_cpu(kwargs))
        if name in FACTS:
            return result
        if name not in RULES:
            raise self.unsupported(f"calls {name}, which is not supported")
        values = [getattr(x, "program_value", x) for x in args]
        found = RULES[name](self, result, *values, **{key: getattr(x, "program_value", x) for key, x in kwargs.items()})
        for tensor, value in zip(flat(result), flat(found)):
            tensor.program_value = value
        return result

    def finish(self, logits: object) -> None:
        """Make the logits the last value."""
        value = getattr(logits, "program_value", None)
        if value is None or logits.dim() != 2:
            what = f"a tensor of shape {(*logits.shape,)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise Unsupported(f"the network returns {what}, not logits (N, classes) that depend on the images")
        number, shape = self.image_like(value)
        del self.operations[number:]  # nothing reads them
        if number == 0:
            self.write("activate", [number], shape)

    # --- Values -----------------------------------------------------------------------------------------------------

    def write(self, kind: str, inputs: list[int], shape: tuple[int, ...], **fields) -> Value:
        """Append an operation whose output has this shape (channels, height, width)."""
        name = self.modules[-1][0] if self.modules else ""
        for key in ("weight", "bias"):
            if key in fields:
                fields[key] = fields[key].detach().to("cpu", torch.float32).contiguous()
        self.operations.append(Operation(kind, inputs, len(self.operations) + 1, name=name, **fields))
        return Value(len(self.operations), tuple(shape))

    def image_like(self, value: object) -> tuple[int, tuple[int, int, int]]:
        """A value as (number, shape) of a value of the program; a selection of elements is written as an operation.

        Tensors with fewer than four dimensions get dimensions of size 1 behind.
        """
        selection = self.selection(value)
        if selection is None:
            return value.number, value.shape
        index = with_four_dimensions(value.numbered())
        channels, count = selection.channels, value.shape[0]
        before = next((i for i, channel in enumerate(channels) if channel >= 0), 0)
        ends = (before, len(channels) - before - count)
        whole = channels == [-1] * ends[0] + [*range(count)] + [-1] * ends[1]
        if whole and not any(selection.padding):
            new = self.write("pad_channels", [value.number], index.shape[1:], stride=selection.stride, channels=ends)
        else:
            weight = torch.eye(count + 1)[channels, :count, None, None]  # -1 is the last row, which is zero
            new = self.write(
                "convolve", [value.number], index.shape[1:], weight=weight, bias=torch.zeros(len(weight)),
                stride=selection.stride, padding=selection.padding,
            )  # fmt: skip
        # The same tensor may be read again.
        value.index = None if value.numbered().dim() == 4 else numbers(new.shape).view(value.numbered().shape)
        value.number, value.shape = new.number, new.shape
        return value.number, value.shape

    def selection(self, value: object) -> Selection | None:
        """How to make an image-like tensor from a value; None if it is the value itself."""
        if not isinstance(value, Value):
            raise self.unsupported("combines an image with a constant in an unsupported way")
        if value.index is None:
            return None
        index, size = with_four_dimensions(value.index), math.prod(value.shape)
        if index is not None and index.shape[1:] == value.shape and torch.equal(index, numbers(value.shape)):
            return None
        selection = None if index is None else select(index[0], value.shape)
        if selection is None or not torch.equal(index[1], torch.where(index[0] < 0, -1, index[0] + size)):
            raise self.unsupported("rearranges an image in a way that a program cannot express")
        return selection

    def elementwise(self, kind: str, result: Tensor, values: list[Value], activation: str = "none", **fields) -> Value:
        """An operation whose output has the dimensions of its first input."""
        numbers_and_shapes = [self.image_like(value) for value in values]
        shape = numbers_and_shapes[0][1]
        new = self.write(kind, [number for number, _ in numbers_and_shapes], shape, activation=activation, **fields)
        return self.shaped(new, result)

    def shaped(self, value: Value, result: Tensor) -> Value:
        """The value with the dimensions of the tensor that stands for it."""
        if result.dim() != 4:
            value.index = numbers(value.shape).view(result.shape)
        return value


def flat(value: object) -> list:
    """The leaves of nested lists, tuples and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, (list, tuple)) else [value]


def on_cpu(value):
    """The same arguments with tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: on_cpu(part) for key, part in value.items()}
    return type(value)(map(on_cpu, value)) if type(value) in (list, tuple) else value
