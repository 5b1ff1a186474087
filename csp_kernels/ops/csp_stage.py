"""The cross stage partial dense stage, split, dense layers and transition in one operator: checks and dispatch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from csp_kernels._tracing import cached_constant
from csp_kernels.ops import _checks as checks
from csp_kernels.ops._program import Names, Part, Source, run
from csp_kernels.ops._repeated import begin
from csp_kernels.ops._transforms import backend_of
from csp_kernels.ops.dense_block import LAYER as PRE
from csp_kernels.ops.dense_block import features_and_bottlenecks
from csp_kernels.ops.partial_transition import check_options, check_values
from csp_kernels.ops.partial_transition import count as transition_count
from csp_kernels.ops.partial_transition import expected_shapes as transition_shapes
from csp_kernels.ops.partial_transition import label as transition_label
from csp_kernels.ops.partial_transition import norm_label as transition_norm_label
from csp_kernels.ops.post_dense_block import LAYER as POST
from csp_kernels.ops.two_way_dense_block import LAYER as TWO_WAY
from csp_kernels.reference import csp_stage as reference_csp_stage
from csp_kernels.stage.csp_stage import csp_stage as csp_stage_stage
from csp_kernels.stage.graph import Graph

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
    call = begin("csp_stage", [x], params, running, frozen, eps, part_channels, layer, fusion, pool, recompute)
    if call is not None and (found := call.again()) is not None:
        return found[0][0], found[1]
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
    backend = backend_of("csp_stage", [x], params, running)
    if backend == "reference":
        channels_last = checks.is_channels_last(x)
        y, stats = reference_csp_stage(
            x, params, running, part_channels=part_channels, layer=layer, fusion=fusion, pool=pool, frozen=frozen,
            eps=eps,
        )  # fmt: skip
        return checks.formatted(y, channels_last), stats
    source = source_of(part_channels, checks.weights(params), layer, fusion, pool)
    full = checks.filled(params, shapes, x)
    (y,), moments = run(
        source, [x], full, running, frozen, eps, _NAMES, recompute=recompute, backend=backend, call=call
    )  # fmt: skip
    return y, moments.of(_parts((len(norms) - last // 3) // 2, len(norms)) if layer == "pre" else None)


_NAMES = Names(["x of csp_stage"], ["the output of csp_stage"])


@cached_constant
def _parts(layers: int, norms: int) -> tuple[Part, ...]:
    """Of layers "pre", as `dense_block` lists them, then of the transition."""
    return *features_and_bottlenecks(layers, 1), *(Part("norm", i) for i in range(2 * layers, norms))


def source_of(part: int, weights: Sequence[checks.Shape], layer: str, fusion: str, pool: str | None) -> Source:
    """Of a stage with these channels bypassing and these shapes of its convolutions' weights, in order."""
    kind, units = LAYERS[layer], transition_count(fusion) // 3
    dense, outs = weights[:-units], [shape[0] for shape in weights[-units:]]
    bottlenecks = tuple(shape[0] for shape in dense[:: len(kind.names) // 3])
    sizes = part + dense[0][1], part, kind.growth(dense), bottlenecks, outs[0], outs[-1]
    return _graph, *sizes, layer, fusion, pool is not None


def _graph(
    in_channels: int, part: int, growth_rate: int, bottlenecks: Sequence[int], mid: int, out: int, layer: str,
    fusion: str, pool: bool,
) -> Graph:  # fmt: skip
    return csp_stage_stage(
        in_channels, part, growth_rate, bottlenecks, mid, out, layer=layer, fusion=fusion, pool=pool
    )  # fmt: skip


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
    width = channels + first // each * kind.growth(checks.weights(params[:first]))
    shapes += transition_shapes(params[first:], part_channels, width, fusion, order)
    checks.check_tensors(
        params, shapes, lambda i: kind.label(i) if i < first else transition_label(i - first, fusion), x
    )
    return shapes, last


def _norm_label(norms: int, layer: str, fusion: str) -> checks.Label:
    first = norms - transition_count(fusion) // 3
    return lambda i: LAYERS[layer].norm_label(i) if i < first else transition_norm_label(i - first, fusion)
