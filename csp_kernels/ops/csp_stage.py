"""The cross stage partial dense stage, split, dense layers and transition in one operator: checks and dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csp_kernels.ops import _checks as checks
from csp_kernels.ops import _node as node
from csp_kernels.ops._transforms import uses_reference
from csp_kernels.ops.dense_block import LAYER as PRE
from csp_kernels.ops.partial_transition import FUSIONS, check_options, check_values, output_size, raw_sizes
from csp_kernels.ops.partial_transition import count as transition_count
from csp_kernels.ops.partial_transition import expected_shapes as transition_shapes
from csp_kernels.ops.partial_transition import label as transition_label
from csp_kernels.ops.partial_transition import norm_label as transition_norm_label
from csp_kernels.ops.post_dense_block import LAYER as POST
from csp_kernels.ops.two_way_dense_block import LAYER as TWO_WAY
from csp_kernels.reference import csp_stage as reference_csp_stage

LAYERS = {"pre": PRE, "post": POST, "two_way": TWO_WAY}


def csp_stage(
    x: Tensor,
    params: Sequence[Tensor | None],
    running: Sequence[Tensor] = (),
    *,
    part_channels: int,
    layer: str = "pre",
    fusion: str = "csp",
    pool: str | None = "avg",
    frozen: Sequence[bool] | None = None,
    eps: float | Sequence[float] = 1e-5,
    recompute: str = "none",
) -> tuple[Tensor, Tensor]:
    """y = transition(x', dense(x'')) with x = [x', x''] split along the channels, nothing copied or concatenated.

    CSPNet (arXiv 1911.11929, Eq. 4, Fig. 2b): x' bypasses the dense layers; nothing of x' reaches the dense layers.

    layer "pre": the layers of `dense_block`, transition order "pre"; "post": those of `post_dense_block`; "two_way":
    those of `two_way_dense_block`; both with transition order "post". fusion, pool: see `partial_transition`.

    Shapes: p = part_channels, c0 - p channels enter the dense layers, which give d.
      x        [N, c0, H, W], any strides; float32, bfloat16, float16 or float64. Under autocast cast to its dtype.
      params   of the dense layers on c0 - p channels, then of the transition with p and d channels: see there.
               dtype of x; for a 16-bit x also float32.
      running  mean and variance of each frozen norm, in the order of params; dtype as params.
      frozen   a flag for each norm: True normalises with `running`, False with batch statistics (default: all False).
      eps      one number or one a norm.
      part_channels  0 <= p < c0; 0: nothing bypasses.
      recompute  "none" keeps what backward needs, "bottleneck" computes the bottlenecks again there.
    Returns y [N, o, H // 2, W // 2] (pool None: [N, o, H, W]; fusion "last": p + m channels) in the dtype and memory
    format of x, and stats [2, columns] float64, no gradient: those of the dense layers, then of the transition.
    Running statistics are the caller's to update: `csp.CSPDenseStage` does.
    Raises TypeError or ValueError for bad arguments before any work, RuntimeError if the chosen backend cannot run.
    """
    x = checks.autocast(checks.check_image(x))
    order = "pre" if layer == "pre" else "post"
    checks.check_choice("layer", layer, LAYERS)
    check_options(fusion, order, pool)
    checks.check_recompute(recompute)
    _check_part(x, part_channels)
    shapes, last = _check_params(x, params, part_channels, layer, fusion, order)
    norms = checks.norm_indices(shapes)
    frozen = checks.flags(frozen, len(norms))
    eps = checks.epsilons(eps, frozen)
    checks.check_running(x, running, frozen, [shapes[i][0] for i in norms], _norm_label(len(norms), layer, fusion))
    checks.check_values(x, checks.pixels(x), frozen[: len(norms) - last // 3])
    check_values(x, frozen[len(norms) - last // 3 :], fusion, order, pool)
    channels_last = checks.is_channels_last(x)
    if uses_reference(x, *params, *running):
        y, stats = reference_csp_stage(
            x,
            params,
            running,
            part_channels=part_channels,
            layer=layer,
            fusion=fusion,
            pool=pool,
            frozen=frozen,
            eps=eps,
        )
    else:
        full = checks.filled(params, shapes, x)
        y, stats = _native(x, full, running, part_channels, layer, fusion, pool, frozen, eps, recompute)
    return checks.formatted(y, channels_last), stats


# --- checks ---


def _check_part(x: Tensor, part_channels: int) -> None:
    if not isinstance(part_channels, int):
        raise TypeError(f"part_channels: got {type(part_channels).__name__}, expected an int")
    if not 0 <= part_channels < x.shape[1]:
        raise ValueError(f"part_channels: got {part_channels}, expected 0 to {x.shape[1] - 1} of x {list(x.shape)}")


def _check_params(
    x: Tensor, params: Sequence[Tensor | None], part_channels: int, layer: str, fusion: str, order: str
) -> tuple[list[checks.Shape], int]:
    """Shape of each parameter, and how many are the transition's."""
    kind, last = LAYERS[layer], transition_count(fusion)
    first, each = len(params) - last, len(kind.names)
    if first <= 0 or first % each:
        names = [*kind.names, *(transition_label(i, fusion).removeprefix("params: ") for i in range(last))]
        raise ValueError(
            f"params: got {len(params)}, expected {each} a layer, at least one layer, and {last} for the transition: "
            f"{', '.join(names)}"
        )
    channels = x.shape[1] - part_channels
    kind.check_channels(x, channels, params[:first])
    shapes = kind.shapes(params[:first], channels)
    width = channels + first // each * kind.growth(shapes)
    shapes += transition_shapes(params[first:], part_channels, width, fusion, order)
    checks.check_tensors(
        params, shapes, lambda i: kind.label(i) if i < first else transition_label(i - first, fusion), x
    )
    return shapes, last


def _norm_label(norms: int, layer: str, fusion: str) -> checks.Label:
    first = norms - transition_count(fusion) // 3
    return lambda i: LAYERS[layer].norm_label(i) if i < first else transition_norm_label(i - first, fusion)


# --- native ---


def _native(
    x: Tensor,
    params: list[Tensor],
    running: Sequence[Tensor],
    part_channels: int,
    layer: str,
    fusion: str,
    pool: str | None,
    frozen: list[bool],
    eps: list[float],
    recompute: str,
) -> tuple[Tensor, Tensor]:
    """params: contiguous, in the dtype of sums, none missing."""
    op = torch.ops.csp_kernels.csp_stage.default
    given, x = x, node.in_place(x)
    keep = node.wants_gradients(x, *params)
    kind = list(LAYERS).index(layer)
    flags = (
        [int(f) for f in frozen],
        eps,
        part_channels,
        kind,
        FUSIONS.index(fusion),
        pool is not None,
        node.winograd(x.dtype),
    )
    fixed = node.fixed(running, params[0].dtype, keep)
    arguments = x, params, fixed, *flags, keep, keep and recompute == "none"
    y, *_, stats = node.call(op, _FORMULA, arguments) if keep else op(*arguments)
    node.watch(y, "x of csp_stage", given, x)
    return y, stats


class _Sizes(NamedTuple):
    """Of what the dense layers keep: feature channels, columns of a layer's z and middle, columns of statistics."""

    layers: int
    features: int
    z: int
    middle: int
    columns: int


def _sizes(x: Tensor, params: list[Tensor], part_channels: int, layer: str) -> _Sizes:
    layers = len(params) // len(LAYERS[layer].names)
    if layer == "pre":
        g, b = params[5].shape[:2]
        features = x.shape[1] - part_channels + layers * g
        return _Sizes(layers, features, node.padded(b), 0, features + layers * b)
    ways = 2 if layer == "two_way" else 1
    g = params[3].shape[0]
    width = max(p.shape[0] for p in params[:: len(LAYERS[layer].names)])
    middle = node.padded(g) if ways == 2 else 0
    return _Sizes(layers, layers * ways * g, ways * node.padded(width), middle, sum(p.shape[0] for p in params[1::3]))


def _fake(
    x: Tensor,
    params: list[Tensor],
    running: list[Tensor],
    frozen: list[int],
    eps: list[float],
    part_channels: int,
    layer: int,
    fusion: int,
    pool: bool,
    winograd: int,
    keep: bool,
    keep_bottleneck: bool,
) -> tuple[Tensor | list[Tensor], ...]:
    count, kind, pixels = transition_count(FUSIONS[fusion]), list(LAYERS)[layer], checks.pixels(x)
    last = params[-count:]
    sizes = _sizes(x, params[:-count], part_channels, kind)
    h, w = (x.shape[2] // 2, x.shape[3] // 2) if pool else x.shape[2:]
    y = node.fake_image(x, output_size(fusion, part_channels, last), h, w)
    layers = sizes.layers if keep_bottleneck else 0
    raw = raw_sizes(x, last, fusion, kind != "pre", pool) if keep else (0, 0)
    columns = sizes.columns + sum(p.shape[0] for p in last[::3])
    return (
        y,
        x.new_empty((pixels, sizes.features)),
        [x.new_empty((pixels, sizes.z)) for _ in range(layers)],
        [x.new_empty((pixels, sizes.middle)) for _ in range(layers if sizes.middle else 0)],
        *(x.new_empty((n,)) for n in raw),
        node.fake_statistics(x, columns),
    )


def _fake_backward(grad_y: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    params = rest[6]
    return [node.fake_image(x, x.shape[1]), *(torch.empty_like(p) for p in params)]


def _save(arguments: tuple[Any, ...], output: Any) -> node.Saved:
    x, params, running, *rest, _, _ = arguments
    return node.Saved([x], (*output[1:], params, running), rest)


def _gradients(saved: node.Saved, grad_y: Tensor) -> list[Tensor]:
    (x,), kept, rest = saved
    gradients: list[Tensor] = torch.ops.csp_kernels.csp_stage_backward.default(node.in_place(grad_y), x, *kept, *rest)
    return gradients


def _twin(saved: node.Saved) -> node.Twin:
    (x,), (*_, params, running), (frozen, eps, part_channels, layer, fusion, pool, _) = saved

    def reference(x: Tensor, *params: Tensor) -> list[Tensor]:
        options: dict[str, Any] = {"layer": list(LAYERS)[layer], "fusion": FUSIONS[fusion]}
        options |= {"pool": "avg" if pool else None, "part_channels": part_channels}
        return [reference_csp_stage(x, params, running, frozen=frozen, eps=eps, **options)[0]]

    return [x, *params], reference


_FORMULA = node.Formula(_save, _gradients, _twin)
node.register("csp_stage", {"": _fake, "_backward": _fake_backward}, _FORMULA)
