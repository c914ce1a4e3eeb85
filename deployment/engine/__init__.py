"""A CPU engine that skips the zeros of a pruned network.

engine.c     the engine, in C, with one header: it reads a model file and computes logits
build.py     compiles it for this processor by the compiler of the package `ziglang`, once
engine.py    from a network in PyTorch to logits: lowers it to a program, writes the model file, loads it

    from deployment.engine import Engine

    engine = Engine(network)        # image_size=32, threads=as many as PyTorch uses
    logits = engine(images)         # (N, 3, H, W) float32, normalized -> (N, classes) float32
"""

from deployment.engine.build import lanes_of_this_cpu
from deployment.engine.engine import Engine, Model, usable_processors

__all__ = ["Engine", "Model", "lanes_of_this_cpu", "usable_processors"]
