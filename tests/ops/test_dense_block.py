"""The operator against the naive reference in float64: values, gradients, modes, layouts, dtypes, errors."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from tolerances import error, high_limit, limit
from torch import Tensor

import csp_kernels as csp
from csp_kernels.ops.dense_block import NAMES

pytestmark = pytest.mark.usefixtures("native")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@dataclass(frozen=True)
class Case:
    layers: int = 3
    channels: int = 24
    growth: int = 12
    width: int = 48
    size: tuple[int, int, int] = (3, 7, 5)  # N, H, W
    dtype: torch.dtype = torch.float32
    frozen: tuple[bool, ...] = ()  # repeated over the norms
    mean: float = 0.0
    std: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.channels + self.layers * self.growth

    @property
    def flags(self) -> list[bool]:
        return [bool(self.frozen) and self.frozen[i % len(self.frozen)] for i in range(2 * self.layers)]

    @property
    def reduction(self) -> int:
        n, h, w = self.size
        return max(9 * self.width, self.total, n * h * w)

    def x(self) -> Tensor:
        n, h, w = self.size
        return (torch.randn(n, self.channels, h, w) * self.std + self.mean).to(self.dtype)

    def params(self) -> list[Tensor]:
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        tensors: list[Tensor] = []
        for layer in range(self.layers):
            k, b, g = self.channels + layer * self.growth, self.width, self.growth
            tensors += [torch.rand(k) + 0.5, torch.randn(k) * 0.3, torch.randn(b, k, 1, 1) / k**0.5]
            tensors += [torch.rand(b) + 0.5, torch.randn(b) * 0.3, torch.randn(g, b, 3, 3) / (9 * b) ** 0.5]
        return [t.to(dtype) for t in tensors]

    def running(self) -> list[Tensor]:
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        tensors: list[Tensor] = []
        for i, flag in enumerate(self.flags):
            c = self.width if i % 2 else self.channels + i // 2 * self.growth
            tensors += [torch.randn(c) * 0.2, torch.rand(c) + 0.5] if flag else []
        return [t.to(dtype) for t in tensors]


def run(
    function: Callable[..., tuple[Tensor, Tensor]], case: Case, inputs: list[Any], grad: Tensor
) -> dict[str, Tensor]:
    """Output, statistics and every gradient by name."""
    x, params, running = inputs
    leaves = [t.detach().requires_grad_() for t in (x, *params)]
    y, stats = function(leaves[0], leaves[1:], running, frozen=case.flags, **case.options)
    gradients = torch.autograd.grad(y, leaves, grad.to(y.dtype))
    names = ["x", *(f"{layer}.{name}" for layer in range(case.layers) for name in NAMES)]
    return {"y": y.detach(), "stats": stats, **{f"grad {n}": g for n, g in zip(names, gradients, strict=True)}}


Errors = dict[str, list[tuple[float, float]]]  # name -> (ours, naive) of each seed


def scales(exact: dict[str, Tensor]) -> dict[str, float]:
    """Size of each tensor. The gradients of a norm's weight and bias are sums over the same pixels, and either can
    vanish by cancellation, that of a single channel nearly: the larger one counts for both."""
    sizes = {name: t.double().norm().item() for name, t in exact.items()}
    found = {}
    for name, size in sizes.items():
        start, _, end = name.rpartition(".")
        other = {"bias": "weight", "weight": "bias"}.get(end)
        found[name] = max(size, sizes.get(f"{start}.{other}", 0.0))
    return found


def measure(case: Case, params: Callable[[Case], list[Tensor]] = Case.params, seeds: int = 3) -> Errors:
    """Errors of the operator and of the naive reference against the naive reference in float64."""
    errors: Errors = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        inputs = [case.x(), params(case), case.running()]
        n, h, w = case.size
        grad = torch.randn(n, case.total, h, w).to(case.dtype)
        wide = [inputs[0].double(), [p.double() for p in inputs[1]], [r.double() for r in inputs[2]]]
        ours, naive = (run(f, case, inputs, grad) for f in (csp.ops.dense_block, csp.reference.dense_block))
        exact = run(csp.reference.dense_block, case, wide, grad)
        assert ours["y"].dtype == case.dtype and ours["stats"].dtype == torch.float64
        naive["stats"] = naive["stats"].to(case.dtype)
        for found in (ours, naive, exact):  # no norm needs those of what the last layer adds
            found["stats"] = torch.cat(
                (found["stats"][:, : case.total - case.growth], found["stats"][:, case.total :]), 1
            )
        for name, scale in scales(exact).items():
            pair = error(ours[name], exact[name], scale), error(naive[name], exact[name], scale)
            errors.setdefault(name, []).append(pair)
    if any(case.flags):  # statistics that no norm needs are unspecified
        del errors["stats"]
    return errors


def check_each(case: Case, errors: Errors) -> None:
    """Every tensor, by its median over the seeds: one ReLU that changes sides by rounding does not count."""
    for name, pairs in errors.items():
        ours, naive = (statistics.median(p[i] for p in pairs) for i in (0, 1))
        bound = limit(naive, case.dtype, case.reduction)
        assert ours <= bound, f"{name}: error {ours:.2e}, allowed {bound:.2e}"


def compare(case: Case) -> None:
    """Each tensor in float32 and float64. In 16 bits many ReLUs change sides: all gradients together, the rest each."""
    errors = measure(case)
    if case.dtype.itemsize == 2:
        pooled = [pair for name in list(errors) if name.startswith("grad") for pair in errors.pop(name)]
        ours, naive = (statistics.fmean(p[i] ** 2 for p in pooled) ** 0.5 for i in (0, 1))
        assert ours <= limit(naive, case.dtype, case.reduction), f"gradients: error {ours:.2e}, naive {naive:.2e}"
    check_each(case, errors)


SHAPES = {
    "basic": Case(),
    "1x1 maps": Case(size=(8, 1, 1)),
    "one image": Case(size=(1, 7, 5)),
    "one row": Case(size=(2, 1, 9)),
    "growth 5": Case(layers=4, channels=3, growth=5, width=20),
    "growth 48": Case(layers=2, channels=64, growth=48, width=192, size=(2, 6, 6)),
    "many images": Case(layers=2, size=(9, 4, 4)),
    "odd widths": Case(channels=19, growth=7, width=11, size=(2, 9, 13)),
    "one layer": Case(layers=1, channels=2, growth=1, width=3),
    "32x32": Case(layers=2, channels=32, growth=32, width=128, size=(2, 32, 32)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training(shape: str, dtype: torch.dtype) -> None:
    compare(replace(SHAPES[shape], dtype=dtype))


FREEZING = {"all": (True,), "norm1": (True, False), "norm2": (False, True), "mixed": (True, True, False, True, False)}


@pytest.mark.parametrize("freezing", FREEZING)
@pytest.mark.parametrize("recompute", ["none", "bottleneck"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_norms(freezing: str, recompute: str, dtype: torch.dtype) -> None:
    compare(Case(frozen=FREEZING[freezing], dtype=dtype, options={"recompute": recompute}))


@pytest.mark.parametrize("shape", ["basic", "odd widths", "32x32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recompute(shape: str, dtype: torch.dtype) -> None:
    compare(replace(SHAPES[shape], dtype=dtype, options={"recompute": "bottleneck"}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_inference(shape: str, dtype: torch.dtype) -> None:
    case = replace(SHAPES[shape], frozen=(True,), dtype=dtype)
    x, params, running = case.x(), case.params(), case.running()
    with torch.no_grad():
        y, naive = (
            f(x, params, running, frozen=case.flags)[0] for f in (csp.ops.dense_block, csp.reference.dense_block)
        )
    wide = [p.double() for p in params], [r.double() for r in running]
    exact, _ = csp.reference.dense_block(x.double(), *wide, frozen=case.flags)
    assert error(y, exact) <= limit(error(naive, exact), dtype, case.reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_channel(dtype: torch.dtype) -> None:
    """norm2 frozen: under batch statistics the gradient of a 1x1 weight with one input vanishes."""
    compare(Case(layers=2, channels=1, growth=4, width=8, frozen=(False, True), dtype=dtype))


def test_large_mean() -> None:
    compare(Case(mean=1000.0, std=0.01))
    compare(Case(mean=1000.0, std=0.01, size=(4, 14, 14), options={"recompute": "bottleneck"}))


def kink_free(case: Case) -> list[Tensor]:
    """Parameters with biases that keep every pre-activation away from zero: no ReLU changes sides by rounding."""
    params = case.params()
    for i in range(0, len(params), 3):
        weight, bias = params[i], params[i + 1]
        weight.mul_(0.2)
        bias.copy_(torch.where(torch.arange(bias.numel()) % 4 == 0, -4.0, 4.0))
    return params


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"recompute": "bottleneck"}], ids=str)
@pytest.mark.parametrize("frozen", [(), (True,), (False, True)], ids=["train", "frozen", "norm2 frozen"])
@pytest.mark.parametrize("size", [(3, 7, 5), (4, 14, 14)])
def test_gradients_without_kinks(
    dtype: torch.dtype, options: dict[str, Any], frozen: tuple[bool, ...], size: tuple[int, int, int]
) -> None:
    case = Case(size=size, dtype=dtype, options=options, frozen=frozen)
    check_each(case, measure(case, kink_free))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("recompute", ["none", "bottleneck"])
def test_long_sums(recompute: str) -> None:
    """12,544 pixels a channel: sums and statistics as good as the naive reference's, at most twice its error."""
    case = Case(channels=64, growth=32, width=128, size=(4, 56, 56), options={"recompute": recompute})
    errors = measure(case, kink_free, seeds=1)
    errors["y, any sign"] = measure(case, seeds=1)["y"]
    errors.pop("stats")  # the naive ones are exact to rounding
    too_large = {name: f"{ours:.1e} > 2 * {naive:.1e}" for name, [(ours, naive)] in errors.items() if ours > 2 * naive}
    assert not too_large


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("size", [(4, 14, 14), (4, 56, 56)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_statistics_describe_the_output(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """Means (in standard deviations) and variances (relative); in 16 bits of the values before they are rounded."""
    case = Case(layers=2, size=size, dtype=dtype)
    y, stats = csp.ops.dense_block(case.x(), case.params())
    normalised = case.total - case.growth  # no norm of the block reads what its last layer adds
    var, mean = torch.var_mean(y[:, :normalised].double(), (0, 2, 3), correction=0)
    bound = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-3}[dtype]
    assert ((stats[0, :normalised] - mean).abs() / var.sqrt()).max() <= bound
    assert ((stats[1, :normalised] - var).abs() / var).max() <= bound
    assert not stats[:, normalised : case.total].any()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_lower_matmul_precision(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    case = Case(size=(2, 14, 14))
    for name, pairs in measure(case, kink_free).items():
        assert max(ours for ours, _ in pairs) <= high_limit(case.reduction), name


# --- memory layouts ---


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values behind different strides."""
    n, c, h, w = x.shape
    wide = torch.full((n, 2 * c, h, w), float("nan"))
    wide[:, c:] = x
    padded = torch.full((n, c, h + 2, w + 3), float("nan"))
    padded[:, :, 1:-1, 1:-2] = x
    return {
        "NCHW": x.contiguous(),
        "NHWC": x.contiguous(memory_format=torch.channels_last),
        "slice of NCHW": wide[:, c:],
        "slice of NHWC": wide.contiguous(memory_format=torch.channels_last)[:, c:],
        "window": padded[:, :, 1:-1, 1:-2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "slice of NCHW", "slice of NHWC", "window", "transposed"])
@pytest.mark.parametrize("freezing", [(), (True,)], ids=["train", "frozen"])
def test_input_layout(layout: str, freezing: tuple[bool, ...]) -> None:
    case = Case(frozen=freezing)
    x, params, running = case.x(), case.params(), case.running()
    grad = torch.randn(3, case.total, 7, 5)
    plain = run(csp.ops.dense_block, case, [x, params, running], grad)
    given = run(csp.ops.dense_block, case, [layouts(x)[layout], params, running], layouts(grad)[layout])
    assert given["y"].is_contiguous(memory_format=torch.channels_last) == (layout in ("NHWC", "slice of NHWC"))
    assert given["y"].is_contiguous() != given["y"].is_contiguous(memory_format=torch.channels_last)
    for name, value in plain.items():
        assert torch.equal(given[name], value), name


def test_expanded_input_and_gradient() -> None:
    case = Case()
    x, params = case.x()[:1].expand(3, -1, -1, -1), case.params()
    grad = torch.ones(1, 1, 1, 1).expand(3, case.total, 7, 5)
    plain = run(csp.ops.dense_block, case, [x.contiguous(), params, []], grad.contiguous())
    given = run(csp.ops.dense_block, case, [x, params, []], grad)
    for name, value in plain.items():
        assert torch.equal(given[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("growth", "width"), [(12, 48), (33, 17), (1, 5), (3, 1), (16, 64)])
def test_channels_last_weights(growth: int, width: int, dtype: torch.dtype) -> None:
    case = Case(growth=growth, width=width, dtype=dtype)
    x, params = case.x(), case.params()
    grad = torch.randn(3, case.total, 7, 5)
    last = [p.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p for p in params]
    plain = run(csp.ops.dense_block, case, [x, params, []], grad)
    given = run(csp.ops.dense_block, case, [x, last, []], grad)
    for name, value in plain.items():
        assert torch.equal(given[name], value), name
    for layer in range(case.layers):  # as the parameter lies, so that accumulation need not copy
        assert given[f"grad {layer}.conv2.weight"].is_contiguous(memory_format=torch.channels_last)


def test_single_channel_keeps_the_memory_format() -> None:
    case = Case(channels=1)
    x, params = case.x(), case.params()
    y, _ = csp.ops.dense_block(x, params)
    assert y.is_contiguous()
    y, _ = csp.ops.dense_block(torch.empty_like(x, memory_format=torch.channels_last).copy_(x), params)
    assert y.shape == (3, case.total, 7, 5)


def test_first_channels_are_the_input() -> None:
    case = Case(dtype=torch.bfloat16)
    x = case.x()
    assert torch.equal(csp.ops.dense_block(x, case.params())[0][:, : case.channels], x)


# --- PyTorch's own checks ---


GRADCHECK = {
    "train": {},
    "recompute": {"recompute": "bottleneck"},
    "frozen": {"frozen": [True] * 4},
    "frozen, recompute": {"frozen": [True] * 4, "recompute": "bottleneck"},
    "mixed": {"frozen": [True, False, False, True]},
}


@pytest.mark.parametrize("mode", GRADCHECK)
@pytest.mark.parametrize("size", [(2, 3, 2), (2, 5, 5)])
def test_gradcheck(mode: str, size: tuple[int, int, int]) -> None:
    options = dict(GRADCHECK[mode])
    flags = tuple(options.pop("frozen", ()))
    case = Case(layers=2, channels=3, growth=2, width=4, size=size, dtype=torch.float64, frozen=flags)
    running = case.running()
    leaves = [t.requires_grad_() for t in (case.x(), *case.params())]

    def function(x: Tensor, *params: Tensor) -> Tensor:
        return csp.ops.dense_block(x, params, running, frozen=case.flags, **options)[0]

    assert torch.autograd.gradcheck(function, leaves)


def test_double_backward_on_the_reference() -> None:
    csp.use_backend("reference")
    case = Case(layers=1, channels=3, growth=2, width=3, size=(2, 3, 3), dtype=torch.float64)
    params = case.params()
    x = case.x().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda t: csp.ops.dense_block(t, params)[0], x)


# --- promises ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"recompute": "bottleneck"}, {"drop_rate": 0.3}], ids=str)
def test_repeats_bitwise(dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = Case(size=(5, 9, 9), dtype=dtype, options=options)
    inputs, grad = [case.x(), case.params(), []], torch.randn(5, case.total, 9, 9)
    runs = []
    for _ in range(3):
        torch.manual_seed(1)
        runs.append(run(csp.ops.dense_block, case, inputs, grad))
    for name, value in runs[0].items():
        assert all(torch.equal(value, other[name]) for other in runs[1:]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 14, 14), (2, 28, 28)], ids=str)
def test_inference_on_several_threads(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Few rows a thread or many, the same result as on one thread but for rounding."""
    case = Case(channels=64, growth=32, width=128, size=size, frozen=(True,), dtype=dtype)
    x, params, running = case.x(), case.params(), case.running()
    alone, _ = csp.ops.dense_block(x, params, running, frozen=case.flags)
    torch.set_num_threads(3)
    runs = [csp.ops.dense_block(x, params, running, frozen=case.flags)[0] for _ in range(3)]
    assert all(torch.equal(runs[0], y) for y in runs[1:])
    assert torch.linalg.vector_norm((runs[0] - alone).double()) < 4 * torch.finfo(dtype).eps * torch.linalg.vector_norm(
        alone.double()
    )


def saved_bytes(case: Case, params: list[Tensor], x: Tensor) -> int:
    """Bytes of the tensors saved for backward, each storage once, without the parameters."""
    own = {p.data_ptr() for p in params}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = csp.ops.dense_block(x, params, case.running(), frozen=case.flags, **case.options)
    y.sum().backward()
    return sum(saved.values())


@pytest.mark.parametrize("recompute", ["none", "bottleneck"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes(recompute: str, dtype: torch.dtype) -> None:
    """Features plus bottlenecks, or features alone."""
    case = Case(size=(4, 28, 28), dtype=dtype, options={"recompute": recompute})
    params = [p.requires_grad_() for p in case.params()]
    x = case.x().contiguous(memory_format=torch.channels_last)
    expected = 4 * 28 * 28 * x.element_size() * (case.total + (case.layers * case.width if recompute == "none" else 0))
    assert expected <= saved_bytes(case, params, x) <= 1.02 * expected


def test_nothing_saved_without_gradients() -> None:
    case = Case()
    with torch.no_grad():
        y, stats = csp.ops.dense_block(case.x(), [p.requires_grad_() for p in case.params()])
    assert not y.requires_grad and not stats.requires_grad
    y, _ = csp.ops.dense_block(case.x(), case.params())
    assert not y.requires_grad


def test_gradient_of_the_input_alone_and_of_one_parameter() -> None:
    case = Case()
    x, params, grad = case.x(), case.params(), torch.randn(3, case.total, 7, 5)
    whole = run(csp.ops.dense_block, case, [x, params, []], grad)
    leaf = x.clone().requires_grad_()
    csp.ops.dense_block(leaf, params)[0].backward(grad)
    assert torch.equal(leaf.grad, whole["grad x"])
    weight = params[5].clone().requires_grad_()
    csp.ops.dense_block(x, [*params[:5], weight, *params[6:]])[0].backward(grad)
    # another sum of rounding errors: whether x wants a gradient chooses the loops of the first 1x1
    torch.testing.assert_close(weight.grad, whole["grad 0.conv2.weight"], rtol=1e-5, atol=1e-5)


# --- dropout ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_its_fraction(dtype: torch.dtype, rate: float) -> None:
    case = Case(layers=2, size=(8, 16, 16), dtype=dtype)
    x, params = case.x(), case.params()
    dropped, plain = (csp.ops.dense_block(x, params, drop_rate=r)[0][:, 24:36].double() for r in (rate, 0.0))
    kept = dropped != 0
    count = kept.numel()
    assert abs(kept.double().mean().item() - (1 - rate)) < 5 * (rate * (1 - rate) / count) ** 0.5
    expected = plain[kept] / (1 - rate)
    bound = 8 * torch.finfo(dtype).eps
    assert ((dropped[kept] - expected).abs() <= bound * expected.abs().clamp_min(1e-3)).all()


def test_dropout_differs_between_calls_channels_layers_and_pixels() -> None:
    case = Case(layers=2, size=(2, 16, 16))
    x, params = case.x(), case.params()
    first, second = (csp.ops.dense_block(x, params, drop_rate=0.5)[0][:, 24:] != 0 for _ in range(2))
    flat = torch.cat([first.transpose(0, 1).flatten(1), second.transpose(0, 1).flatten(1)]).double()  # [48, 512]
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 0.3  # 6.8 standard deviations of independent coins


@pytest.mark.parametrize("recompute", ["none", "bottleneck"])
@pytest.mark.parametrize("frozen", [False, True])
def test_dropout_mask_is_the_same_in_backward(recompute: str, frozen: bool) -> None:
    case = Case(layers=2, dtype=torch.float64, frozen=(frozen,))
    running, direction, step = case.running(), case.x(), 1e-6
    x, params, grad = case.x().requires_grad_(), case.params(), torch.randn(3, case.total, 7, 5).double()

    def function(t: Tensor) -> Tensor:
        torch.manual_seed(3)
        options = {"drop_rate": 0.4, "recompute": recompute}
        return (csp.ops.dense_block(t, params, running, frozen=case.flags, **options)[0] * grad).sum()

    (gradient,) = torch.autograd.grad(function(x), x)
    with torch.no_grad():
        numeric = (function(x + step * direction) - function(x - step * direction)) / (2 * step)
    assert error((gradient * direction).sum(), numeric) < 1e-6


# --- dtypes, autocast, empty batches ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_in_the_storage_dtype(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    x, params, grad = case.x(), [p.to(dtype) for p in case.params()], torch.randn(3, case.total, 7, 5)
    low = run(csp.ops.dense_block, case, [x, params, []], grad)
    full = run(csp.ops.dense_block, case, [x, [p.float() for p in params], []], grad)
    for name, value in full.items():
        assert torch.equal(low[name], value.to(low[name].dtype)), name
    assert low["grad 0.conv1.weight"].dtype == dtype


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_autocast(backend: str) -> None:
    csp.use_backend(backend)
    case = Case()
    x, params = case.x().requires_grad_(), [p.requires_grad_() for p in case.params()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = csp.ops.dense_block(x, params)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32 and params[0].grad.dtype == torch.float32
    if backend == "native":
        assert torch.equal(y, csp.ops.dense_block(x.bfloat16(), params)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert csp.ops.dense_block(x.double(), [p.double() for p in params])[0].dtype == torch.float64


@pytest.mark.parametrize("frozen", [False, True])
def test_empty_batch(frozen: bool) -> None:
    case = Case(frozen=(frozen,), size=(0, 7, 5))
    x, params = case.x().requires_grad_(), [p.requires_grad_() for p in case.params()]
    y, stats = csp.ops.dense_block(x, params, case.running(), frozen=case.flags)
    assert y.shape == (0, case.total, 7, 5) and stats.isfinite().all()
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in params)


def test_norms_without_affine_parameters() -> None:
    case = Case()
    params = case.params()
    bare = [None if i % 3 != 2 else p for i, p in enumerate(params)]
    filled = [
        torch.ones_like(p) if i % 3 == 0 else torch.zeros_like(p) if i % 3 == 1 else p for i, p in enumerate(params)
    ]
    x = case.x()
    assert torch.equal(csp.ops.dense_block(x, bare)[0], csp.ops.dense_block(x, filled)[0])


def test_one_epsilon_a_norm() -> None:
    case = Case(options={"eps": [1e-5, 0.1, 1.0, 1e-3, 1e-9, 0.5]})
    compare(case)


# --- bad input ---

GOOD = Case(layers=2)


def with_param(index: int, change: Callable[[Tensor], Any]) -> dict[str, Any]:
    params: list[Any] = list(GOOD.params())
    params[index] = change(params[index])
    return {"params": params}


BAD: dict[str, tuple[type[Exception], str, Callable[[], dict[str, Any]]]] = {
    "not a tensor": (TypeError, "x: got list", lambda: {"x": [1.0]}),
    "3-D": (ValueError, "x: got 3 dimensions .* with x.unsqueeze", lambda: {"x": torch.zeros(24, 7, 5)}),
    "integers": (TypeError, "x: got torch.int64", lambda: {"x": torch.zeros(3, 24, 7, 5, dtype=torch.int64)}),
    "complex": (TypeError, "x: got torch.complex64", lambda: {"x": torch.zeros(3, 24, 7, 5, dtype=torch.complex64)}),
    "channels": (ValueError, "x: got 23 channels .* expected 24", lambda: {"x": torch.zeros(3, 23, 7, 5)}),
    "no channels": (ValueError, "x: got shape", lambda: {"x": torch.zeros(3, 0, 7, 5)}),
    "no rows": (ValueError, "x: got shape", lambda: {"x": torch.zeros(3, 24, 0, 5)}),
    "one value": (ValueError, "x: got one value per channel", lambda: {"x": torch.zeros(1, 24, 1, 1)}),
    "x float64": (TypeError, "got torch.float32, expected torch.float64", lambda: {"x": GOOD.x().double()}),
    "x meta": (ValueError, "norm1.weight: got a tensor on cpu, expected meta", lambda: {"x": GOOD.x().to("meta")}),
    "no layers": (ValueError, "params: got 0", lambda: {"params": []}),
    "part of a layer": (ValueError, "params: got 11", lambda: {"params": GOOD.params()[:11]}),
    "param dtype": (TypeError, "layer 1 conv1.weight: got torch.bfloat16", lambda: with_param(8, Tensor.bfloat16)),
    "param shape": (ValueError, "layer 1 norm2.bias: got shape", lambda: with_param(10, lambda t: t[:-1])),
    "first weight": (ValueError, "layer 0 conv2.weight: got shape", lambda: with_param(5, lambda t: t[0])),
    "no weight": (TypeError, "layer 0 conv1.weight: got NoneType", lambda: with_param(2, lambda t: None)),
    "param device": (ValueError, "layer 0 norm2.weight: got .* meta", lambda: with_param(3, lambda t: t.to("meta"))),
    "frozen": (ValueError, "frozen: got 3", lambda: {"frozen": [True] * 3}),
    "running count": (ValueError, "running: got 0", lambda: {"frozen": [True] * 4}),
    "running extra": (ValueError, "running: got 1", lambda: {"running": [torch.zeros(24)]}),
    "running shape": (
        ValueError,
        "running: layer 0 norm2 var: got shape",
        lambda: {"frozen": [False, True, False, False], "running": [torch.zeros(48), torch.zeros(47)]},
    ),
    "eps count": (ValueError, "eps: got 3", lambda: {"eps": [1e-5] * 3}),
    "eps": (ValueError, "eps: got -1", lambda: {"eps": -1.0}),
    "drop_rate 1": (ValueError, "drop_rate: got 1", lambda: {"drop_rate": 1.0}),
    "drop_rate": (ValueError, "drop_rate: got -0.1", lambda: {"drop_rate": -0.1}),
    "recompute": (ValueError, "recompute: got 'all'", lambda: {"recompute": "all"}),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_input(name: str, backend: str) -> None:
    kind, message, change = BAD[name]
    csp.use_backend(backend)
    with pytest.raises(kind, match=message):
        csp.ops.dense_block(**{"x": GOOD.x(), "params": GOOD.params(), **change()})


def test_native_refuses_other_devices() -> None:
    with pytest.raises(RuntimeError, match="backend 'native': got tensors on 'meta'"):
        csp.ops.dense_block(GOOD.x().to("meta"), [p.to("meta") for p in GOOD.params()])
