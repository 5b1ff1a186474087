"""opcheck's four tests (schema, fake kernel, autograd registration, AOT dispatch) on every new compiled operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

OPS = torch.ops.csp_kernels
SMALL = (2, 4, 6)  # N, H, W

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """opcheck compares what two runs left in scratch outputs: no poison here."""


def image(channels: int) -> Tensor:
    n, h, w = SMALL
    return torch.randn(n, channels, h, w).contiguous(memory_format=torch.channels_last).requires_grad_()


def norm(channels: int) -> list[Tensor]:
    return [(torch.rand(channels) + 0.5).requires_grad_(), torch.randn(channels).requires_grad_()]


def conv(out: int, inside: int, size: int = 1) -> Tensor:
    return torch.randn(out, inside, size, size).requires_grad_()


def statistics(*channels: int) -> list[Tensor]:
    return [t for c in channels for t in (torch.randn(c), torch.rand(c) + 0.5)]


def detached(values: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(
        v.detach()
        if isinstance(v, Tensor)
        else [t.detach() for t in v]
        if isinstance(v, list) and v and isinstance(v[0], Tensor)
        else v
        for v in values
    )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("act", [1, 4])  # relu, mish
def test_concat_conv(frozen: bool, act: int) -> None:
    mean, var = statistics(12) if frozen else (None, None)
    inputs = [image(5), image(16)]
    arguments = inputs, conv(12, 21), *norm(12), mean, var, 1e-5, act, 0.1, [4, 8]
    torch.library.opcheck(OPS.concat_conv.default, arguments)
    if frozen:
        torch.library.opcheck(OPS.concat_conv_inference.default, detached(arguments))
    _, raw, stats = OPS.concat_conv.default(*detached(arguments))
    grads = [torch.randn(2, c, 4, 6).contiguous(memory_format=torch.channels_last) for c in (4, 8)]
    given = grads, *detached(arguments)[:6], raw, stats, 1e-5, act, 0.1, [4, 8], [1, 0]
    torch.library.opcheck(OPS.concat_conv_backward.default, given)


def transition(post: bool, fusion: int, part: int, dense: int) -> tuple[list[Tensor], list[int]]:
    """Parameters and the channels of the norms: mid 6, out 10."""
    sizes = {0: [(6, dense), (10, part + 6)], 1: [(10, part + dense)], 2: [(6, dense)]}[fusion]
    params = [t for out, inside in sizes for t in (*norm(out if post else inside), conv(out, inside))]
    return params, [p.shape[0] for p in params[::3]]


@pytest.mark.parametrize("fusion", [0, 1, 2])
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_partial_transition(post: bool, fusion: int, frozen: bool) -> None:
    params, norms = transition(post, fusion, 3, 8)
    running, flags, eps = statistics(*norms) if frozen else [], [int(frozen)] * len(norms), [1e-5] * len(norms)
    arguments = image(3), image(8), params, running, flags, eps, fusion, post, True, True
    torch.library.opcheck(OPS.partial_transition.default, arguments)
    y, raw_t, raw_u, stats = OPS.partial_transition.default(*detached(arguments))
    given = torch.randn_like(y), *detached(arguments)[:4], raw_t, raw_u, stats, flags, eps, fusion, post, True
    torch.library.opcheck(OPS.partial_transition_backward.default, given)


def dense(layer: int, channels: int) -> list[Tensor]:
    """Parameters of two layers of growth 4."""
    found: list[Tensor] = []
    for k in (channels, channels + 4):
        if layer == 0:
            found += [*norm(k), conv(6, k), *norm(6), conv(4, 6, 3)]
        elif layer == 1:
            found += [conv(6, k), *norm(6), conv(4, 6, 3), *norm(4)]
        else:
            branch = [conv(6, k), *norm(6), conv(2, 6, 3), *norm(2)]
            found += [*branch, conv(6, k), *norm(6), conv(2, 6, 3), *norm(2), conv(2, 2, 3), *norm(2)]
    return found


@pytest.mark.parametrize("two_way", [False, True])
def test_post_dense_block(two_way: bool) -> None:
    params = dense(1 + two_way, 5)
    flags, eps = [0] * (len(params) // 3), [1e-5] * (len(params) // 3)
    arguments = image(5), params, [], flags, eps, two_way, 2, True
    torch.library.opcheck(OPS.post_dense_block.default, arguments)
    y, features, z, middle, stats = OPS.post_dense_block.default(*detached(arguments))
    x, tensors, running = detached(arguments)[:3]
    given = torch.randn_like(y), x, features, z, middle, stats, tensors, running, flags, eps, two_way, 2
    torch.library.opcheck(OPS.post_dense_block_backward.default, given)


@pytest.mark.parametrize("fusion", [0, 1, 2])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("keep", [False, True])
def test_csp_stage(layer: int, fusion: int, keep: bool) -> None:
    last, _ = transition(layer > 0, fusion, 3, 5 + 8)
    params = [*dense(layer, 5), *last]
    flags, eps = [0] * (len(params) // 3), [1e-5] * (len(params) // 3)
    arguments = image(8), params, [], flags, eps, 3, layer, fusion, True, 2, True, keep
    torch.library.opcheck(OPS.csp_stage.default, arguments)
    y, *kept = OPS.csp_stage.default(*detached(arguments))
    x, tensors, running = detached(arguments)[:3]
    given = torch.randn_like(y), x, *kept, tensors, running, flags, eps, 3, layer, fusion, True, 2
    torch.library.opcheck(OPS.csp_stage_backward.default, given)
