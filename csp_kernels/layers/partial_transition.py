"""The partial transition as a module, run as one operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from csp_kernels import ops, reference
from csp_kernels.layers._children import (
    Fused,
    fits,
    hooked_globally,
    not_plain_unit,
    recorded,
    warn_once,
    weight_shape,
)
from csp_kernels.layers._norms import consecutive, frozen_norms, parameters, update_running
from csp_kernels.ops._program import built
from csp_kernels.ops.partial_transition import pools_first, source_of
from csp_kernels.stage.graph import Graph


class PartialTransition(Fused, reference.PartialTransition):
    """Joins the bypass and the dense part of a stage, nothing concatenated (CSPNet, arXiv 1911.11929, Eq. 4, Fig. 3).

    forward(part [N, part_channels, H, W] or None, dense [N, dense_channels, H, W]) -> [N, out_channels, H', W'].
    Arguments, fusions, orders, children (t, u, each with norm and conv) and sizes: `reference.PartialTransition`. The
    norms are plain nn.BatchNorm2d and count as such: momentum, eps, affine, track_running_stats, train and eval (a norm
    in eval mode is frozen) act as usual. Plain children are not called. With other norms (SyncBatchNorm) or changed
    convolutions, hooks or another forward it runs as the reference does, with one warning; RuntimeError if "native" was
    chosen. dtypes, memory formats and errors: `csp.ops.partial_transition`.
    """

    def forward(self, part: Tensor | None, dense: Tensor) -> Tensor:
        if recorded(dense):
            return super().forward(part, dense)
        self._check(part, dense)
        children, reason = self.holders()
        if reason:
            warn_once(self, reason)
            return super().forward(part, dense)
        norms = children[::2]
        frozen, running = frozen_norms(norms)
        y, stats = ops.partial_transition(
            part,
            dense,
            parameters(children),
            running,
            fusion=self.fusion,
            order=self.order,
            pool=self.pool,
            frozen=frozen,
            eps=[norm.eps for norm in norms],
        )
        if not all(frozen):
            update_running(norms, consecutive(norms), stats, self.counts(dense))
        return y

    def holders(self) -> tuple[list[Any], str]:
        """What holds the operator's parameters, in order, and why the operator cannot stand for it; "" if it can."""
        reason = hooked_globally() or self.not_plain()
        return ([] if reason else self.units()), reason

    @property
    def graph(self) -> Graph:
        """What a call computes."""
        weights = self.weight_shapes()
        return built(source_of(self.part_channels, self.dense_channels, weights, self.fusion, self.order, self.pool))

    def weight_shapes(self) -> list[tuple[int, ...]]:
        """Of the convolutions of t and u, of those that there are."""
        return [weight_shape(self, f"{name}.conv") for name in ("t", "u") if name in self._modules]

    def images(self, part: Tensor | None, dense: Tensor) -> list[Tensor]:
        """The inputs of the graph among the arguments of a call. Raises ValueError for others' channels."""
        self._check(part, dense)
        return [dense] if part is None else [part, dense]

    def units(self) -> list[Any]:
        """norm, conv of t, then of u, of those that there are."""
        modules: dict[str, Any] = self._modules
        return [modules[k]._modules[name] for k in ("t", "u") if k in modules for name in ("norm", "conv")]

    def not_plain(self, prefix: str = "") -> str:
        """Which child the operator cannot stand for, and why; "" if there is none."""
        modules = self._modules
        reasons = (not_plain_unit(f"{prefix}{name}", modules[name]) for name in ("t", "u") if name in modules)
        return next(filter(None, reasons), "")

    def counts(self, x: Tensor) -> list[tuple[int, int]]:
        """Over how many values norms take their statistics, and how many norms; x has the unpooled N, H, W."""
        n, _, h, w = x.shape
        pooled = int(pools_first(self.fusion, self.order, self.pool))
        return [(n * h * w, len(self.units()) // 2 - pooled), (n * (h // 2) * (w // 2), pooled)]

    def _check(self, part: Tensor | None, dense: Tensor) -> None:
        """The channels of the inputs; the operator sees to everything else."""
        if part is None and self.part_channels:
            raise ValueError(f"part: got None, expected a Tensor [N, {self.part_channels}, H, W]")
        for name, t, channels in (("part", part, self.part_channels), ("dense", dense, self.dense_channels)):
            if isinstance(t, Tensor) and not fits(t, channels):
                expected = channels if channels else "None: part_channels is 0"
                raise ValueError(f"{name}: got {t.shape[1]} channels {list(t.shape)}, expected {expected}")
