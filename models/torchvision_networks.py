"""The classifiers of torchvision, by its own names, with the stem that is there: made for images of 224x224 pixels.

Only these functions import torchvision, which takes a second.
"""

from functools import cache

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

PREFIX = "torchvision:"
# These would return auxiliary logits in training, and change the normalization of their images.
PLAIN = {"aux_logits": False, "transform_input": False, "init_weights": True}
OPTIONS: dict[str, dict[str, bool]] = {"googlenet": PLAIN, "inception_v3": PLAIN}


@cache
def names() -> tuple[str, ...]:
    """Every network that torchvision.models can build, with our prefix."""
    from torchvision import models

    return tuple(PREFIX + name for name in models.list_models(module=models))


def build(arch: str, classes: int) -> nn.Module:
    """A network with fresh weights, on the default device; KeyError on an unknown name."""
    from torchvision import models

    if arch not in names():
        raise KeyError(arch)
    if torch.get_default_device().type == "meta":
        with torch.device("cpu"):
            return empty(arch, classes)
    name = arch.removeprefix(PREFIX)
    return models.get_model(name, weights=None, num_classes=classes, **OPTIONS.get(name, {}))


def empty(arch: str, classes: int) -> nn.Module:
    """A network on the meta device: with shapes, without values."""
    with _WithoutMemory():
        network = build(arch, classes)
    return network.to("meta")


class _WithoutMemory(TorchFunctionMode):
    """Parameters are made on the meta device, and filling them is skipped, which would take most of the time.

    Everything else is computed on the CPU, because some constructors compute sizes with small tensors.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        elif name.endswith("_") and not name.startswith(("_", "requires_grad")):  # in place
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)
