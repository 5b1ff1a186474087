"""1x1 convolution, batch norm and activation over a concatenation as a module, run as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from csp_kernels import ops, reference
from csp_kernels.layers._children import Fused, hooked_globally, not_plain, recorded, warn_once
from csp_kernels.layers._norms import frozen_norms, update_running
from csp_kernels.ops._program import built
from csp_kernels.ops.concat_conv import source_of
from csp_kernels.stage.graph import Graph


class ConcatConv(Fused, reference.ConcatConv):
    """act(BN(conv1x1(cat(inputs)))), nothing concatenated: [N, in_channels[i], H, W] each -> [N, out_channels, H, W].

    The joins of cross stage partial networks and, with two outputs, their splits (CSPNet, arXiv 1911.11929, Fig. 5).
    Arguments, children (conv, norm) and outputs: `reference.ConcatConv`; the norm is a plain nn.BatchNorm2d and counts
    as such: momentum, eps, affine, track_running_stats, train and eval act as usual. Plain children are not called.
    With another norm (SyncBatchNorm) or a changed convolution, hooks or another forward it runs as the reference does,
    with one warning; RuntimeError if "native" was chosen. dtypes, memory formats and errors: `csp.ops.concat_conv`.
    """

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        if recorded(inputs[0] if isinstance(inputs, (list, tuple)) and inputs else inputs):
            return super().forward(inputs)
        inputs = [inputs] if isinstance(inputs, Tensor) else inputs
        self._check(inputs)
        (conv, norm), reason = self.holders()
        if reason:
            warn_once(self, reason)
            return super().forward(inputs)
        frozen, running = frozen_norms([norm])
        single = isinstance(self.out_channels, int)
        outputs, stats = ops.concat_conv(
            inputs,
            conv.weight,
            norm.weight,
            norm.bias,
            running,
            frozen=frozen[0],
            eps=norm.eps,
            act=self.act,
            negative_slope=self.negative_slope,
            splits=None if single else self.splits,
        )
        if not frozen[0]:
            y = outputs[0]
            update_running([norm], [(0, norm.num_features)], stats, y.shape[0] * y.shape[2] * y.shape[3])
        return outputs[0] if single else tuple(outputs)

    def holders(self) -> tuple[list[Any], str]:
        """What holds the operator's parameters, in order, and why the operator cannot stand for it; "" if it can."""
        modules: dict[str, Any] = self._modules
        conv, norm = modules["conv"], modules["norm"]
        reason = hooked_globally() or not_plain("norm", norm, 0, self.act) or not_plain("conv", conv, 1)
        return [conv, norm], reason

    @property
    def graph(self) -> Graph:
        """What a call computes."""
        return built(source_of(self.in_channels, self.splits, self.act, self.negative_slope))

    def images(self, inputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
        """The inputs of the graph among the arguments of a call. Raises ValueError for others' channels."""
        found = [inputs] if isinstance(inputs, Tensor) else inputs
        self._check(found)
        return found

    def _check(self, inputs: Sequence[Tensor]) -> None:
        """The number and channels of the inputs; the operator sees to everything else."""
        if not isinstance(inputs, Sequence):
            return
        if any(not isinstance(t, Tensor) or t.is_nested or t.dim() != 4 for t in inputs):
            return
        channels = tuple(t.shape[1] for t in inputs)
        if channels != self.in_channels:
            raise ValueError(f"inputs: got tensors of {list(channels)} channels, expected {list(self.in_channels)}")
