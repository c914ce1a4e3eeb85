"""A CPU engine that skips the zeros of a pruned network, by direct sparse convolution.

Every nonzero weight is one multiply-add of a broadcast value to a tile of outputs in vector registers, as in Park et
al. (Faster CNNs with direct sparse convolutions and guided pruning, 2017) and Elsen et al. (Fast sparse convnets,
2020). BatchNorm is folded into weights and biases. Bias, residual and ReLU are applied to the tile in registers.

A vector holds either neighboring pixels of one image, for the lowest latency, or the same pixel of as many images as
it has lanes, for the highest throughput. Input channels are processed in blocks that fit the L1 cache, and filters are
divided among threads by their nonzeros. Numba compiles the loops when an engine is made, so no C++ compiler is needed.

    from deployment.engine import Engine

    engine = Engine(network)        # image_size=32, threads=as many as PyTorch uses
    logits = engine(images)         # (N, 3, H, W) float32, normalized -> (N, classes) float32
"""

from deployment.engine.engine import Engine
from deployment.engine.kernels import lanes_of_this_cpu
from deployment.engine.thread_pool import usable_processors

__all__ = ["Engine", "lanes_of_this_cpu", "usable_processors"]
