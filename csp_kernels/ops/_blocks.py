"""What `post_dense_block` and `two_way_dense_block` share: their order of checks, and the way to the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from csp_kernels.ops import _checks as checks
from csp_kernels.ops._program import Names, Source, run
from csp_kernels.ops._repeated import begin
from csp_kernels.ops._transforms import backend_of


def dense_layers(
    x: Tensor, params: Sequence[Tensor | None], running: Sequence[Tensor], frozen: Sequence[bool] | None,
    eps: float | Sequence[float], *, name: str, layer: checks.Layer, each: str,
    reference: Callable[..., tuple[Tensor, Tensor]], source: Callable[[Sequence[checks.Shape]], Source],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and the statistics of its norms.

    layer: the parameters of one; each: its norms, in words; source: of the graph, from the shapes of all weights.
    """
    call = begin(name, [x], params, running, frozen, eps)
    if call is not None and (found := call.again()) is not None:
        return found[0][0], found[1]
    x = checks.autocast(checks.check_image(x))
    checks.check_count(params, layer.names)
    layer.check_channels(x, x.shape[1], params)
    shapes = layer.shapes(params, x.shape[1])
    checks.check_tensors(params, shapes, layer.label, x)
    norms = checks.norm_indices(shapes)
    frozen = checks.flags(frozen, len(norms), each)
    eps = checks.epsilons(eps, frozen, each)
    checks.check_running(x, running, frozen, [shapes[i][0] for i in norms], layer.norm_label)
    checks.check_values(x, checks.pixels(x), frozen)
    backend = backend_of(name, [x], params, running)
    if backend == "reference":
        channels_last = checks.is_channels_last(x)
        y, stats = reference(x, params, running, frozen=frozen, eps=eps)
        return checks.formatted(y, channels_last), stats
    names = Names([f"x of {name}"], [f"the output of {name}"])
    full = checks.filled(params, shapes, x)
    graph = source(checks.weights(params))
    (y,), moments = run(graph, [x], full, running, frozen, eps, names, backend=backend, call=call)
    return y, moments.of(None)
