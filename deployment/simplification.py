"""Smaller programs with the same logits: fuse operations, remove dead channels."""

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from deployment.program import Operation, Program
from models.resnet import BasicBlock, Bottleneck, ResNet

ACTIVATED = ("convolve", "affine", "add", "multiply", "activate")  # kinds that have an activation


# --- Fusing --------------------------------------------------------------------------------------------------------


def fuse(program: Program) -> Program:
    """BatchNorm, activations and residual additions as parts of the operations that can absorb them.

    BatchNorm is folded into the convolution before it if nothing else reads that (Jacob et al. 2018). Values that
    nothing reads are dropped. Logits stay the same up to rounding.
    """
    operations = unread_dropped(program.operations)
    for absorb in absorb_affine, absorb_activation, absorb_addition, absorb_activation:
        operations = absorb(operations)
    return Program(numbered(operations), program.image_size)


def unread_dropped(operations: list[Operation]) -> list[Operation]:
    """The operations that the last one needs."""
    needed, kept = {operations[-1].output}, []
    for operation in reversed(operations):
        if operation.output in needed:
            needed.update(operation.inputs)
            kept.append(operation)
    return kept[::-1]


def numbered(operations: list[Operation]) -> list[Operation]:
    """The same operations with values numbered in their order."""
    new = {0: 0} | {operation.output: number for number, operation in enumerate(operations, 1)}
    return [
        replace(operation, inputs=[new[number] for number in operation.inputs], output=new[operation.output])
        for operation in operations
    ]


def reads(operations: list[Operation]) -> dict[int, int]:
    """How often each value is read; the logits are read once more."""
    counts = {operation.output: 0 for operation in operations} | {0: 0}
    for operation in operations:
        for number in operation.inputs:
            counts[number] += 1
    counts[operations[-1].output] += 1
    return counts


def absorb_affine(operations: list[Operation]) -> list[Operation]:
    counts, kept = reads(operations), {}
    for operation in operations:
        before = kept.get(operation.inputs[0])
        if (
            operation.kind == "affine"
            and before is not None
            and before.kind in ("convolve", "affine")
            and before.activation == "none"
            and counts[before.output] == 1
        ):
            scale, shift = operation.weight.double(), operation.bias.double()
            weight = before.weight.double() * scale.view(-1, *[1] * (before.weight.dim() - 1))
            bias = before.bias.double() * scale + shift
            del kept[before.output]
            operation = replace(
                before, output=operation.output, weight=weight.float(), bias=bias.float(),
                activation=operation.activation,
            )  # fmt: skip
        kept[operation.output] = operation
    return list(kept.values())


def absorb_activation(operations: list[Operation]) -> list[Operation]:
    counts, kept = reads(operations), {}
    for operation in operations:
        before = kept.get(operation.inputs[0])
        if operation.kind == "activate" and before is not None and counts[before.output] == 1:
            takes = before.kind in ACTIVATED and before.activation == "none"
            if takes or operation.activation == "none":
                del kept[before.output]
                activation = operation.activation if takes else before.activation
                operation = replace(before, output=operation.output, activation=activation)
        kept[operation.output] = operation
    return list(kept.values())


def absorb_addition(operations: list[Operation]) -> list[Operation]:
    """Each addition into the later of the convolutions that write its inputs.

    The convolution moves to the place of the addition, because its residual may be computed after it.
    """
    counts, kept = reads(operations), {}
    for operation in operations:
        if operation.kind == "add":
            for number in sorted(operation.inputs, reverse=True):
                before = kept.get(number)
                if (
                    before is not None
                    and before.kind == "convolve"
                    and len(before.inputs) == 1
                    and before.activation == "none"
                    and counts[number] == 1
                ):
                    residual = operation.inputs[1 - operation.inputs.index(number)]
                    del kept[number]
                    operation = replace(
                        before, inputs=[*before.inputs, residual], output=operation.output,
                        activation=operation.activation,
                    )  # fmt: skip
                    break
        kept[operation.output] = operation
    return list(kept.values())


# --- Of ResNets, for the engine that is being replaced ------------------------------------------------------------


def fold(network: ResNet) -> ResNet:
    """A copy for evaluation with each BatchNorm folded into the convolution before it (Jacob et al. 2018).

    Logits stay the same up to rounding. Folding a folded network changes nothing.
    """
    network = copy.deepcopy(network).eval()
    for module in list(network.modules()):
        if isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[1], nn.BatchNorm2d):
            module[0], module[1] = fuse_conv_bn_eval(module[0], module[1]), nn.Identity()
        for name, child in list(module.named_children()):
            if name.startswith("conv") and child.bias is None:  # a bias means that it is folded already
                bn = name.replace("conv", "bn")
                setattr(module, name, fuse_conv_bn_eval(child, getattr(module, bn)))
                setattr(module, bn, nn.Identity())
    return network


@torch.no_grad()
def remove_dead_channels(network: ResNet) -> ResNet:
    """A copy for evaluation without the dead inner channels of residual blocks; same logits up to rounding.

    A filter whose weights are all zero outputs the constant relu(beta - mean * gamma / sqrt(var + eps)) everywhere.
    If the constant is 0, or if the next convolution does not read the channel, the channel is removed. The other
    constant channels of a layer are merged into one channel that is 1 everywhere. The next convolution's weight for it
    is the sum of their weights, each times its constant. That convolution pads the merged channel with zeros as it
    padded the original ones, so the logits are exact at image borders, too.
    """
    network = copy.deepcopy(network).eval()
    for block in network.modules():
        if isinstance(block, BasicBlock):
            pairs = [("1", "2")]
        elif isinstance(block, Bottleneck):
            pairs = [("2", "3"), ("1", "2")]  # backwards, because a removed channel no longer reads the one before it
        else:
            continue
        for first, second in pairs:
            before, bn, after = (getattr(block, name) for name in (f"conv{first}", f"bn{first}", f"conv{second}"))
            before, bn, after = _without_dead_channels(before, bn, after)
            setattr(block, f"conv{first}", before)
            setattr(block, f"bn{first}", bn)
            setattr(block, f"conv{second}", after)
    return network


def _without_dead_channels(
    before: nn.Conv2d, bn: nn.BatchNorm2d, after: nn.Conv2d
) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]:
    """Two convolutions with BatchNorm and ReLU between them -> the same function with fewer channels in between."""
    constant = F.relu(bn.bias - bn.running_mean * bn.weight / (bn.running_var + bn.eps).sqrt())
    is_read = after.weight.flatten(2).ne(0).any(2).any(0)
    # A channel that computes NaN must stay, or a broken network would look sound.
    is_constant = before.weight.flatten(1).eq(0).all(1) & constant.isfinite()
    alive = ~is_constant & is_read
    merged = is_constant & is_read & (constant > 0)
    extra = bool(merged.any()) or not alive.any()  # a convolution needs at least one channel
    kept = torch.cat([alive.nonzero().flatten(), torch.zeros(int(extra), dtype=torch.long)])

    new_before = _conv(before, before.weight[kept])
    new_after = _conv(after, after.weight[:, kept])
    new_bn = nn.BatchNorm2d(len(kept), bn.eps, dtype=bn.weight.dtype).eval()
    for name, value in new_bn.state_dict().items():
        if value.dim():
            value.copy_(bn.state_dict()[name][kept])
    if extra:
        new_before.weight[-1] = 0
        new_after.weight[:, -1] = (after.weight[:, merged] * constant[merged, None, None]).sum(1)
        for name, value in (("weight", 1), ("bias", 1), ("running_mean", 0), ("running_var", 1)):
            new_bn.state_dict()[name][-1] = value
    return new_before, new_bn, new_after


def _conv(like: nn.Conv2d, weight: Tensor) -> nn.Conv2d:
    """A convolution without bias, with the geometry of `like` and the given weight."""
    filters, channels, *_ = weight.shape
    conv = nn.Conv2d(channels, filters, like.kernel_size, like.stride, like.padding, bias=False, dtype=weight.dtype)
    conv.weight.copy_(weight)
    return conv
