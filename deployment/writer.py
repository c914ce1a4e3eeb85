"""Write the operations of a program, one after the other."""

import math

import torch
from torch import Tensor, nn

from deployment.program import Operation
from deployment.selection import Selection, Value, numbers, select, with_four_dimensions


class Unsupported(ValueError):
    """What a program cannot express."""


class Writer:
    """A program that is being written. `modules` are being called by the network, the innermost last."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.modules: list[tuple[str, nn.Module]] = []

    def where(self) -> str:
        """The innermost module that is being called."""
        name, module = self.modules[-1] if self.modules else ("", None)
        return f"{name} ({type(module).__name__})" if name else "the network"

    def unsupported(self, what: str) -> Unsupported:
        return Unsupported(f"{self.where()} {what}")

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
