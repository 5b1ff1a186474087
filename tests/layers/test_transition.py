"""The transition that pools first against the paper's order and torchvision's."""

from __future__ import annotations

import pytest
import torch

import csp_kernels as csp


def pair(pool: str | None) -> tuple[csp.Transition, csp.reference.Transition]:
    ours = csp.Transition(24, 12, pool=pool).double()
    with torch.no_grad():
        ours.norm.weight.uniform_(0.5, 1.5)
        ours.norm.bias.normal_()
    naive = csp.reference.Transition(24, 12, pool=pool).double()
    naive.load_state_dict(ours.state_dict())
    return ours, naive


@pytest.mark.parametrize("pool", ["avg", None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(3, 8, 6), (2, 7, 5), (1, 2, 3)])
def test_equals_the_paper_order(pool: str | None, training: bool, size: tuple[int, int, int]) -> None:
    ours, naive = (m.train(training) for m in pair(pool))
    n, h, w = size
    x = torch.randn(n, 24, h, w, dtype=torch.float64)
    for _ in range(3):
        a, b = (x.clone().requires_grad_() for _ in range(2))
        y, expected = ours(a), naive(b)
        assert y.shape == ((n, 12, h // 2, w // 2) if pool else (n, 12, h, w))
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        grad = torch.randn_like(y)
        y.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
    for mine, other in zip(ours.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-12)
    for name, value in naive.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_torchvision_state_dict() -> None:
    densenet = pytest.importorskip("torchvision.models.densenet")
    theirs, ours = densenet._Transition(24, 12), csp.Transition(24, 12)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 24, 6, 6)
    torch.testing.assert_close(ours(x), theirs(x))


def test_gradcheck() -> None:
    ours, _ = pair("avg")
    assert torch.autograd.gradcheck(ours.eval(), torch.randn(2, 24, 3, 2, dtype=torch.float64, requires_grad=True))


def test_compiles_whole() -> None:
    ours, x = csp.Transition(8, 4), torch.randn(2, 8, 6, 6)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ours(x))


def test_leaves_its_input_alone_without_a_norm() -> None:
    ours, x = csp.Transition(8, 4), torch.randn(2, 8, 6, 6)
    ours.norm = torch.nn.Identity()
    before = x.clone()
    ours(x)
    assert torch.equal(x, before)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("pool", ["avg", None])
def test_is_one_operator(pool: str | None) -> None:
    """That keeps its input and the statistics for backward, and nothing else."""
    ours, _ = pair(pool)
    x = torch.randn(2, 24, 6, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    own = [x, *ours.parameters(), *ours.buffers()]
    assert csp.explain(ours, x).kept_bytes == 0
    assert csp.analysis.saved_bytes(lambda: ours(x), own) < x.numel() * 8 / 4


def test_another_convolution_runs_as_the_reference() -> None:
    ours, naive = pair("avg")
    for m in (ours, naive):
        m.conv = torch.nn.Conv2d(24, 7, 1, bias=False).double()
    naive.load_state_dict(ours.state_dict())
    x = torch.randn(2, 24, 6, 6, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="conv has other channels than it was made with"):
        torch.testing.assert_close(ours(x), naive(x))
    for pool in (None, False):
        ours, naive = pair("avg")
        ours.pool = naive.pool = pool
        torch.testing.assert_close(ours(x), naive(x))
    ours, naive = pair("avg")
    for m in (ours, naive):  # as tools leave it that take channels away
        m.norm, m.conv = torch.nn.BatchNorm2d(9).double(), torch.nn.Conv2d(9, 7, 1, bias=False).double()
    naive.load_state_dict(ours.state_dict())
    with pytest.warns(RuntimeWarning, match="conv has other channels than it was made with"):
        torch.testing.assert_close(ours(x[:, :9]), naive(x[:, :9]))


def test_empty_batch_and_channels_last() -> None:
    ours = csp.Transition(8, 4)
    assert ours(torch.randn(0, 8, 6, 6)).shape == (0, 4, 3, 3)
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    assert ours(x).is_contiguous(memory_format=torch.channels_last)


def test_bad_arguments() -> None:
    for arguments, message in (((0, 4), "in_channels: got 0"), ((4, -1), "out_channels: got -1")):
        with pytest.raises(ValueError, match=message):
            csp.Transition(*arguments)
    with pytest.raises(ValueError, match="pool: got 'max', expected 'avg' or None"):
        csp.Transition(8, 4, pool="max")


@pytest.mark.parametrize("hooked", [False, True])
def test_bad_input_changes_no_statistics(hooked: bool) -> None:
    """Nor where the reference would run."""
    ours = csp.Transition(8, 4)
    if hooked:
        ours.conv.register_forward_hook(lambda *_: None)
    for x, message in (
        (torch.zeros(8, 6, 6), "x: got shape \\[8, 6, 6\\], expected \\[N, 8, H, W\\]"),
        (torch.zeros(2, 7, 6, 6), "x: got shape"),
        (torch.zeros(2, 8, 1, 6), "x: got size 1x6, expected at least 2x2"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(x)
    with pytest.raises(TypeError, match="x: got list"):
        ours([torch.zeros(2, 8, 6, 6)])
    assert ours.norm.num_batches_tracked == 0 and not ours.norm.running_mean.any()
