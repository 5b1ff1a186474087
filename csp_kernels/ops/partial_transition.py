"""The partial transition without concatenation: checks and dispatch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from csp_kernels._tracing import static
from csp_kernels.ops import _checks as checks
from csp_kernels.ops._program import Names, Source, run
from csp_kernels.ops._repeated import begin
from csp_kernels.ops._transforms import backend_of
from csp_kernels.reference import partial_transition as reference_partial_transition
from csp_kernels.stage.graph import Graph
from csp_kernels.stage.partial_transition import partial_transition as partial_transition_stage
from csp_kernels.vocabulary import FUSIONS, TRANSITION_ORDERS

POOLS = ("avg", None)
NAMES = ("norm.weight", "norm.bias", "conv.weight")  # of one transition


def partial_transition(
    part: Tensor | None,
    dense: Tensor,
    params: Sequence[Tensor | None],
    running: Sequence[Tensor] = (),
    *,
    fusion: str = "csp",
    order: str = "post",
    pool: str | None = "avg",
    frozen: Sequence[bool] | None = None,
    eps: float | Sequence[float] = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Joins the bypass and the dense part of a stage, nothing concatenated (CSPNet, arXiv 1911.11929, Eq. 4, Fig. 3).

    fusion "csp" (Fig. 3b): u([part, t(dense)]); "first" (3c): u([part, dense]); "last" (3d): [part, t(dense)].
    order "post": t and u are convolution, batch norm, ReLU, pooled in front of u. "pre": batch norm, ReLU, convolution,
    pooled at the end (computed in front of the product, which is the same). fusion "last" pools at the end.

    Shapes:
      part     [N, p, H, W] or None (no bypass); dense [N, d, H, W]: any strides, the same dtype: float32, bfloat16,
               float16 or float64. Under autocast cast to its dtype.
      params   norm.weight, norm.bias, conv.weight of t [m, d, 1, 1] (not for "first"), then of u [o, p + m, 1, 1]
               ("first": [o, p + d, 1, 1]; not for "last"). A norm has its convolution's output channels in order
               "post", its input channels in "pre"; None for its weight (ones) or bias (zeros).
               dtype of dense; for 16 bits also float32.
      running  mean and variance of each frozen norm, t before u; dtype as params.
      frozen   a flag for each norm: True normalises with `running`, False with batch statistics (default: all False).
      eps      one number or one a norm.
      pool     "avg": 2x2 average, stride 2, an odd row or column dropped; None: the size stays.
    Returns y [N, o, H // 2, W // 2] (pool None: [N, o, H, W]; "last": p + m channels) in the dtype and memory format
    of part (of dense without one), and stats [2, channels of the norms] float64, no gradient: batch mean and biased
    variance of the input of t's norm, then of u's, which may have been pooled; 0 where frozen.
    Running statistics are the caller's to update: `csp.PartialTransition` does.
    Raises TypeError or ValueError for bad arguments before any work, RuntimeError if the chosen backend cannot run.
    """
    images = [dense] if part is None else [part, dense]
    call = begin("partial_transition", images, params, running, frozen, eps, fusion, order, pool)
    if call is not None and (found := call.again()) is not None:
        return found[0][0], found[1]
    dense = checks.autocast(checks.check_image(dense, "dense"))
    if part is not None:
        part = checks.autocast(checks.check_image(part, "part"))
        checks.check_beside(part, "part", dense, "dense")
    check_options(fusion, order, pool)
    check_count(params, fusion)
    _check_channels(part, dense, params, fusion)
    shapes = expected_shapes(params, 0 if part is None else part.shape[1], dense.shape[1], fusion, order)
    checks.check_tensors(params, shapes, lambda i: label(i, fusion), dense, "dense")
    norms = checks.norm_indices(shapes)
    frozen = checks.flags(frozen, len(norms))
    eps = checks.epsilons(eps, frozen)
    sizes = [shapes[i][0] for i in norms]
    checks.check_running(dense, running, frozen, sizes, lambda i: norm_label(i, fusion), "dense")
    check_values(dense, frozen, fusion, order, pool, "dense")
    given = {"dense": dense} if part is None else {"part": part, "dense": dense}
    backend = backend_of("partial_transition", [*given.values()], params, running)
    if backend == "reference":
        channels_last = checks.is_channels_last(dense if part is None else part)
        y, stats = reference_partial_transition(
            part, dense, params, running, fusion=fusion, order=order, pool=pool, frozen=frozen, eps=eps
        )
        return checks.formatted(y, channels_last), stats
    names = Names([f"{name} of partial_transition" for name in given], ["the output of partial_transition"])
    bypass = 0 if part is None else part.shape[1]
    source = source_of(bypass, dense.shape[1], checks.weights(params), fusion, order, pool)
    full = checks.filled(params, shapes, dense)
    (y,), moments = run(source, [*given.values()], full, running, frozen, eps, names, backend=backend, call=call)
    return y, moments.of(None)


def source_of(
    part: int, dense: int, weights: Sequence[checks.Shape], fusion: str, order: str, pool: str | None
) -> Source:
    """Of the channels of both inputs; weights: shapes of the weights of t and u, of those that there are."""
    return _graph, static(part), static(dense), weights[0][0], weights[-1][0], fusion, order, pool is not None


def _graph(part: int, dense: int, mid: int, out: int, fusion: str, order: str, pool: bool) -> Graph:
    return partial_transition_stage(part, dense, mid, out, fusion=fusion, order=order, pool=pool)


# --- checks ---


def check_options(fusion: str, order: str, pool: str | None) -> None:
    checks.check_choice("fusion", fusion, FUSIONS)
    checks.check_choice("order", order, TRANSITION_ORDERS)
    checks.check_choice("pool", pool, POOLS)


def count(fusion: str) -> int:
    """Parameters of the transitions."""
    return 6 if fusion == "csp" else 3


def check_count(params: Sequence[Tensor | None], fusion: str) -> None:
    if len(params) != count(fusion):
        names = ", ".join(label(i, fusion)[8:] for i in range(count(fusion)))
        raise ValueError(f"params: got {len(params)}, expected {count(fusion)} for fusion {fusion!r}: {names}")


def label(i: int, fusion: str) -> str:
    return f"params: {_unit(i // 3, fusion)}.{NAMES[i % 3]}"


def norm_label(i: int, fusion: str) -> str:
    return f"{_unit(i, fusion)}.norm"


def _unit(i: int, fusion: str) -> str:
    return "u" if i or fusion == "first" else "t"


def expected_shapes(
    params: Sequence[Tensor | None], part: int, dense: int, fusion: str, order: str
) -> list[checks.Shape]:
    """Of each parameter; part and dense are the channels of the inputs, the others come from the weights."""
    shapes: list[checks.Shape] = []
    channels = dense  # of the latest unit's output
    for i in range(count(fusion) // 3):
        total = channels + (part if i or fusion == "first" else 0)
        name = label(3 * i + 2, fusion)
        channels, _ = checks.check_weight(params[3 * i + 2], name, f"[out, {total}, 1, 1]")
        norm = channels if order == "post" else total
        shapes += [(norm,), (norm,), (channels, total, 1, 1)]
    return shapes


def _check_channels(part: Tensor | None, dense: Tensor, params: Sequence[Tensor | None], fusion: str) -> None:
    """The inputs' channels against those that the convolutions take."""
    p, d = 0 if part is None else part.shape[1], dense.shape[1]
    weights = [checks.check_weight(w, label(3 * i + 2, fusion), "[out, in, 1, 1]") for i, w in enumerate(params[2::3])]
    if fusion == "first":
        if part is not None and p + d != weights[0][1]:
            expected = f"{weights[0][1]}, the input channels of {label(2, fusion)}"
            raise ValueError(f"part and dense: got {p} + {d} = {p + d} channels, expected {expected}")
        if part is not None:
            return
    checks.check_entering(dense, d, weights[0][1], f"the input channels of {label(2, fusion)}", "dense")
    if fusion == "csp" and p + weights[0][0] != weights[1][1]:
        mid, total = weights[0][0], weights[1][1]
        got = "no bypass" if part is None else f"{p} channels {list(part.shape)}"
        raise ValueError(
            f"part: got {got}, expected {total - mid} channels: {label(5, fusion)} takes {total}, {mid} of them from t"
        )


def pools_first(fusion: str, order: str, pool: str | None) -> bool:
    """Does u's norm see pooled values?"""
    return pool is not None and order == "post" and fusion != "last"


def check_values(x: Tensor, frozen: Sequence[bool], fusion: str, order: str, pool: str | None, name: str = "x") -> None:
    """Enough of them to pool and for batch statistics; frozen: of the transitions."""
    n, _, h, w = x.shape
    if pool is not None and (h < 2 or w < 2):
        raise ValueError(f"{name}: got size {h}x{w}, expected at least 2x2 to pool; or pass pool=None")
    if not pools_first(fusion, order, pool):
        checks.check_values(x, n * h * w, frozen, name)
        return
    checks.check_values(x, n * h * w, frozen[:-1], name)
    checks.check_values(x, n * (h // 2) * (w // 2), frozen[-1:], name, " after pooling")
