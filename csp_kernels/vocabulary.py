"""The words of arguments, graphs and programs, each listed once: another one is an error everywhere."""

from __future__ import annotations

# Kernels know an activation by its position here (`enum Activation`, csrc/cpu/call.h; kernels/activate.py); its formula
# is in reference/activations.py. gelu is exact, x * P(X <= x) of a normal X; gelu_tanh its approximation.
ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu", "mish", "hardswish", "relu6", "gelu", "gelu_tanh")
COSTLY = ("silu", "mish", "gelu", "gelu_tanh")  # whose derivative costs more than a gradient written once and read once

LAYERS = ("pre", "post", "two_way")  # kinds of dense layers in a stage: CSPDenseStage says what each is
BLOCKS = ("bottleneck", "dark", "basic")  # kinds of residual blocks: stage/residual_block.py
FUSIONS = ("csp", "first", "last")  # where a partial transition fuses (arXiv 1911.11929, Fig. 3): PartialTransition
TRANSITION_ORDERS = ("post", "pre")  # the norm behind a transition's convolution, or in front of it
STAGE_ORDERS = ("main_first", "part_first")  # in which a residual stage's last 1x1 reads its two parts
SPLITS = ("conv", "slice")  # how a residual stage makes these parts
RECOMPUTE = ("none", "bottleneck", "all")  # what backward computes again instead of keeping it
DENSE_RECOMPUTE = RECOMPUTE[:2]  # of the layers that dense blocks are in
