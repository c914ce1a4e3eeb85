"""Smaller networks that compute the same: BatchNorm folded away, channels that pruning left dead removed."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.resnet import BasicBlock, Bottleneck, ResNet


def fold(network: ResNet) -> ResNet:
    """A copy for evaluation in which each BatchNorm is part of the convolution before it (Jacob et al. 2018)."""
    network = copy.deepcopy(network).eval()
    for module in list(network.modules()):
        if isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[1], nn.BatchNorm2d):
            module[0], module[1] = fuse_conv_bn_eval(module[0], module[1]), nn.Identity()
        for name, child in list(module.named_children()):
            if name.startswith("conv") and child.bias is None:  # else it is folded already
                bn = name.replace("conv", "bn")
                setattr(module, name, fuse_conv_bn_eval(child, getattr(module, bn)))
                setattr(module, bn, nn.Identity())
    return network


@torch.no_grad()
def remove_dead_channels(network: ResNet) -> ResNet:
    """A copy for evaluation without the inner channels of residual blocks that nobody needs; same logits but for
    rounding.

    A channel whose weights are all zero is the constant relu(beta - mean * gamma / sqrt(var + eps)). Where that is
    0, or the next convolution does not read the channel, it goes. The other constants of a layer become one channel
    that is 1 everywhere: the next convolution's weight for it is the sum of theirs, each times its constant. The
    next convolution pads that channel with zeros like any other, so borders stay exact too.
    """
    network = copy.deepcopy(network).eval()
    for block in network.modules():
        if isinstance(block, BasicBlock):
            pairs = [("1", "2")]
        elif isinstance(block, Bottleneck):
            pairs = [("2", "3"), ("1", "2")]  # backwards: a channel that goes no longer reads the one before it
        else:
            continue
        for first, second in pairs:
            before, bn, after = (getattr(block, name) for name in (f"conv{first}", f"bn{first}", f"conv{second}"))
            before, bn, after = _without_dead(before, bn, after)
            setattr(block, f"conv{first}", before)
            setattr(block, f"bn{first}", bn)
            setattr(block, f"conv{second}", after)
    return network


def _without_dead(
    before: nn.Conv2d, bn: nn.BatchNorm2d, after: nn.Conv2d
) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]:
    """Two convolutions with BatchNorm and ReLU between them -> the same with fewer channels between them."""
    constant = F.relu(bn.bias - bn.running_mean * bn.weight / (bn.running_var + bn.eps).sqrt())
    read = after.weight.flatten(2).ne(0).any(2).any(0)
    empty = before.weight.flatten(1).eq(0).all(1) & constant.isfinite()  # a channel that is broken stays it
    alive = ~empty & read
    merged = empty & read & (constant > 0)
    extra = bool(merged.any()) or not alive.any()  # a convolution has at least one channel
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
    """A convolution with other weights and channels."""
    filters, channels, *_ = weight.shape
    conv = nn.Conv2d(channels, filters, like.kernel_size, like.stride, like.padding, bias=False, dtype=weight.dtype)
    conv.weight.copy_(weight)
    return conv
