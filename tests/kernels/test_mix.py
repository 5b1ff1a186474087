"""The 1x1 over segments, forward and backward, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import zip_longest

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from csp_kernels.kernels import launch, mix
from csp_kernels.kernels.activate import RELU, Activation
from csp_kernels.kernels.elementwise import Term
from csp_kernels.kernels.launch import Correction, Geometry, Norm, Tile, power, sum_dtype

# Of the largest value.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPES = list(TOLERANCE)
PLAIN, POOL = Geometry(2, 7, 5), Geometry(3, 7, 9, pool=True)
LARGE = Geometry(3, 11, 9)  # more than one part of the weight gradient's pixels
# Channels of each segment (negative: normalised), of the output, geometry.
CASES = [
    ([-5], 12, PLAIN),
    ([17], 12, PLAIN),
    ([-48], 128, LARGE),
    ([-320], 128, PLAIN),
    ([-17, 48], 12, PLAIN),
    ([5, -48], 130, PLAIN),
    ([48, -17, 5], 12, PLAIN),
    ([-48], 12, POOL),
    ([-17, 5], 128, POOL),
    ([8, -16, -24, 8], 16, Geometry(1, 8, 8, pool=True)),
    ([-40], 24, Geometry(1, 1, 1)),
]
IDS = [f"{channels}-{outputs}-{g.n}x{g.h}x{g.w}{'-pool' if g.pool else ''}" for channels, outputs, g in CASES]
cases = pytest.mark.parametrize(("channels", "outputs", "geometry"), CASES, ids=IDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ACTIVATIONS = [Activation(0, 0.0), Activation(1, 0.0), Activation(2, 0.1), Activation(3, 0.0), Activation(4, 0.0)]
ALL = [*ACTIVATIONS, *(Activation(code, 0.0) for code in range(5, 9))]
activations = pytest.mark.parametrize("act", ALL, ids=lambda act: f"act{act.code}")


def vector(n: int, dtype: torch.dtype, low: float, high: float) -> Tensor:
    """Between NaN, in the type of sums."""
    buffer = torch.full((n + 2,), float("nan"), dtype=sum_dtype(dtype))
    return buffer[1:-1].uniform_(low, high)


def norm_of(n: int, dtype: torch.dtype) -> Norm:
    scale = vector(n, dtype, 0.5, 1.5)
    scale[::3] *= -1
    return Norm(vector(n, dtype, -1, 1), scale, vector(n, dtype, -0.5, 0.5))


def segments_of(buffers, channels, geometry, dtype) -> list[mix.Segment]:
    return [
        mix.Segment(buffers.put(torch.randn(geometry.pixels, abs(k)).to(dtype)), norm_of(-k, dtype) if k < 0 else None)
        for k in channels
    ]


def read(x: Tensor, norm: Norm | None, geometry: Geometry) -> Tensor:
    """What the product reads of x, in float64: [P', K]."""
    a = x if norm is None else torch.relu((x - norm.mean.double()) * norm.scale.double() + norm.shift.double())
    if geometry.pool:
        images = a.unflatten(0, (geometry.n, geometry.h, geometry.w)).permute(0, 3, 1, 2)
        a = torch.nn.functional.avg_pool2d(images, 2).permute(0, 2, 3, 1).flatten(0, 2)
    if geometry.stride == 2:
        a = a.unflatten(0, (geometry.n, geometry.h, geometry.w))[:, ::2, ::2].flatten(0, 2)
    return a


def activated(z: Tensor, norm: Norm, act: Activation) -> Tensor:
    x = (z - norm.mean.double()) * norm.scale.double() + norm.shift.double()
    functions = [lambda x: x, F.relu, lambda x: F.leaky_relu(x, act.negative_slope), F.silu, F.mish, F.hardswish]
    functions += [F.relu6, F.gelu, lambda x: F.gelu(x, approximate="tanh")]
    return functions[act.code](x)


def close(a: Tensor, b: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> None:
    assert a.shape == b.shape and a.isfinite().all()
    largest = (b if scale is None else scale).abs().max() + 1e-30
    error = (a.double() - b).abs().max() / largest
    assert error <= TOLERANCE[dtype], f"error {error:.2e} of the largest value"


def weight_of(buffers, outputs: int, channels: list[int], dtype: torch.dtype) -> Tensor:
    k = sum(map(abs, channels))
    return buffers.put((torch.randn(outputs, k) / k**0.5).to(dtype), 8, 8)


@cases
@dtypes
def test_forward(buffers, channels, outputs, geometry, dtype):
    segments = segments_of(buffers, channels, geometry, dtype)
    weight = weight_of(buffers, outputs, channels, dtype)
    out = buffers.empty(geometry.outputs, outputs, dtype)
    stats = buffers.empty(2, outputs, torch.float64)
    mix.forward(segments, weight, out, geometry, statistics=stats)
    expected = torch.cat([read(s.x.double(), s.norm, geometry) for s in segments], 1) @ weight.double().t()
    close(out, expected, dtype)
    stored = out.double()
    close(stats[0], stored.mean(0), torch.float32, stored)
    close(stats[1], stored.var(0, correction=0), torch.float32, stored.var(0, correction=0) + 1e-9)
    again = torch.empty_like(out)
    mix.forward(segments, weight, again, geometry)
    assert torch.equal(again, out)


@activations
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_forward_activated(buffers, act, dtype):
    """With more than two segments only the last launch may activate."""
    channels = [17, -5, 8] if act.code == 3 else [-17, 5]
    segments = segments_of(buffers, channels, POOL, dtype)
    weight, norm = weight_of(buffers, 12, channels, dtype), norm_of(12, dtype)
    out = buffers.empty(POOL.outputs, 12, dtype)
    mix.forward(segments, weight, out, POOL, after=mix.After(norm, act))
    product = torch.cat([read(s.x.double(), s.norm, POOL) for s in segments], 1) @ weight.double().t()
    close(out, activated(product, norm, act), dtype)


def test_forward_large_mean(buffers):
    """Statistics of an output of mean 1000 and standard deviation 0.01, from an input of the same kind."""
    x = buffers.put((1000 + 0.01 * torch.randn(300, 16, dtype=torch.float64)).float())
    norm = Norm(x.double().mean(0).float(), torch.ones(16), torch.full((16,), 1000.0))
    weight = buffers.put(torch.eye(16))
    out, stats = buffers.empty(300, 16, torch.float32), buffers.empty(2, 16, torch.float64)
    mix.forward([mix.Segment(x, norm)], weight, out, Geometry(3, 10, 10), statistics=stats)
    expected = read(x.double(), norm, Geometry(3, 10, 10))
    assert (out - expected).abs().max() <= 1e-4  # half a unit in the last place of 1000 is 3e-5
    stored = out.double()
    std = stored.std(0, correction=0)
    assert std.min() > 0.005
    assert ((stats[0] - stored.mean(0)).abs() <= 1e-5 * std).all()
    assert ((stats[1] / std**2 - 1).abs() <= 1e-5).all()


def test_large_mean_is_normalised_precisely(buffers):
    x = buffers.put((1000 + 0.01 * torch.randn(128, 16, dtype=torch.float64)).float())
    norm = Norm(x.double().mean(0).float(), torch.full((16,), 100.0), torch.zeros(16))
    out = buffers.empty(128, 12, torch.float32)
    weight = weight_of(buffers, 12, [16], torch.float32)
    mix.forward([mix.Segment(x, norm)], weight, out, Geometry(2, 8, 8))
    close(out, read(x.double(), norm, Geometry(2, 8, 8)) @ weight.double().t(), torch.float32)


@dataclass
class Expected:
    dweight: Tensor
    sums: Tensor
    gradients: list[Tensor]


def output_gradient(d, z, correction) -> Tensor:
    """dz in float64."""
    d = d.double()
    if z is None:
        return d
    if isinstance(correction, Correction):
        return d + (z.double() - correction.mean.double()) * correction.slope.double() + correction.offset.double()
    norm, x = correction.norm, z.double().clone().requires_grad_()
    (dz,) = torch.autograd.grad(activated(x, norm, correction.act), x, d)
    if correction.slope is not None:
        dz = dz + (z.double() - norm.mean.double()) * correction.slope.double() + correction.offset.double()
    return dz


def expected_backward(segments, d, z, correction, weight, geometry) -> Expected:
    dz = output_gradient(d, z, correction)
    inputs, scaled = [], []
    for s in segments:
        x = s.x.double().clone().requires_grad_()
        inputs.append(x)
        scaled.append(read(x, s.norm, geometry))
    w = weight.double().clone().requires_grad_()
    (torch.cat(scaled, 1) @ w.t()).backward(dz)
    sums = []
    for s, x in zip(segments, inputs, strict=True):
        if s.norm is None:
            sums.append(torch.zeros(2, x.shape[1], dtype=torch.float64))
            continue
        dn = x.grad / s.norm.scale.double()
        sums.append(torch.stack([dn.sum(0), (dn * (x.detach() - s.norm.mean.double())).sum(0)]))
    return Expected(w.grad, torch.cat(sums, 1), [x.grad for x in inputs])


def check_backward(buffers, channels, outputs, geometry, dtype, correction=None, add=()) -> None:
    """add: the segments whose gradient is added to a source."""
    segments, before = [], []
    for i, s in enumerate(segments_of(buffers, channels, geometry, dtype)):
        source = buffers.put(torch.randn(s.x.shape).to(dtype), 8, 8) if i in add else None
        segments.append(mix.Segment(s.x, s.norm, buffers.empty(*s.x.shape, dtype), i in add, source))
        before.append(0 if source is None else source.double())
    weight = weight_of(buffers, outputs, channels, dtype)
    d, z = (buffers.put(torch.randn(geometry.outputs, outputs).to(dtype), 8, 8) for _ in range(2))
    z = z if correction else None
    dweight, sums = mix.backward(segments, d, z, correction, weight, geometry)
    expected = expected_backward(segments, d, z, correction, weight, geometry)
    assert dweight.dtype == sums.dtype == sum_dtype(dtype)
    close(dweight, expected.dweight, dtype)
    assert sums.shape == (2, weight.shape[1] if any(k < 0 for k in channels) else 0)
    if sums.numel():
        close(sums[0], expected.sums[0], dtype)
        close(sums[1], expected.sums[1], dtype)
        assert (sums[:, expected.sums[0] == 0] == 0).all()
    for s, b, g in zip(segments, before, expected.gradients, strict=True):
        close(s.g, b + g, dtype)


@cases
@dtypes
def test_backward(buffers, channels, outputs, geometry, dtype):
    corrected = len(channels) != 2 or channels[0] > 0  # two cases without
    correction = Correction(*(vector(outputs, dtype, -0.5, 0.5) for _ in range(3))) if corrected else None
    check_backward(buffers, channels, outputs, geometry, dtype, correction)


STRIDES = [([-17, 8], 12, Geometry(3, 7, 4, stride=2), (1,)), ([16, -33, 5], 130, Geometry(1, 9, 9, stride=2), (0,))]
STRIDES += [([-40], 16, Geometry(2, 1, 1, stride=2), ()), ([5, 8], 24, Geometry(2, 2, 5, stride=2), (0, 1))]


@pytest.mark.parametrize(("channels", "outputs", "geometry", "add"), STRIDES, ids=str)
@dtypes
def test_stride(buffers, channels, outputs, geometry, add, dtype):
    """Pixels that it leaves out have no gradient, or what was there."""
    test_forward(buffers, channels, outputs, geometry, dtype)
    correction = Correction(*(vector(outputs, dtype, -0.5, 0.5) for _ in range(3)))
    check_backward(buffers, channels, outputs, geometry, dtype, correction, add)


@pytest.mark.parametrize("channels", [[-17, 5], [17, -5, 8]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("through", [True, False])
def test_residual(buffers, channels, dtype, through):
    """Behind norm and activation, itself through a norm and an activation or as it is."""
    segments, act = segments_of(buffers, channels, PLAIN, dtype), Activation(3, 0.0)
    weight, norm = weight_of(buffers, 21, channels, dtype), norm_of(21, dtype)
    x, out = buffers.put(torch.randn(PLAIN.outputs, 21).to(dtype)), buffers.empty(PLAIN.outputs, 21, dtype)
    term = Term(x, norm_of(21, dtype), Activation(2, 0.1)) if through else Term(x)
    mix.forward(segments, weight, out, PLAIN, after=mix.After(norm, act, term))
    product = torch.cat([read(s.x.double(), s.norm, PLAIN) for s in segments], 1) @ weight.double().t()
    added = x.double() if term.norm is None else activated(x.double(), term.norm, term.act)
    close(out, activated(product, norm, act) + added, dtype)


ONE_PASS = [([17], 12, PLAIN, (0,)), ([-40, 33], 20, LARGE, (1,))]


@pytest.mark.parametrize(("channels", "outputs", "geometry", "add"), ONE_PASS, ids=str)
@pytest.mark.parametrize("correct", [0, 1, 2], ids=["plain", "corrected", "activated"])
@pytest.mark.parametrize("passes", [1, 2])
def test_passes(buffers, monkeypatch, channels, outputs, geometry, add, correct, passes):
    """One pass also in float64, over several blocks of channels and splits of pixels; two also in 16 bits."""
    tile = Tile(16, power(outputs, 16, 128), 32, 4, 2) if passes == 1 else None
    monkeypatch.setattr(launch, "one_pass_tiles", lambda *_: [tile])
    dtype = torch.float64 if passes == 1 else torch.float16
    vectors = [vector(outputs, dtype, -0.5, 0.5) for _ in range(3)]
    correction = [None, Correction(*vectors), mix.ActivationGradient(norm_of(outputs, dtype), RELU, *vectors[1:])]
    check_backward(buffers, channels, outputs, geometry, dtype, correction[correct], add)


TARGETS = [0, 80, 90, 100, 120, "gfx942", "unknown"]


@pytest.mark.parametrize("pool", [False, True], ids=["plain", "pool"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_candidates(buffers, monkeypatch, dtype, pool):
    """Every tile of the lists gives the same."""
    channels, outputs, geometry = [-48], 40, POOL if pool else LARGE
    cases = [
        launch.Case(dtype, precision, target, pool, few, activated, unit)
        for target in TARGETS
        for precision in ("ieee", "tf32")
        for few, activated, unit in [(True, False, 8), (False, False, 8), (False, True, 2)]
    ]

    def tiles(name: str, *sizes: int) -> list[Tile | None]:
        every = [getattr(launch, f"{name}_tiles")(case, *sizes) for case in cases]
        return list(dict.fromkeys(tile for tiles in every for tile in tiles))

    x, weight = segments_of(buffers, channels, geometry, dtype), weight_of(buffers, outputs, channels, dtype)
    for tile in tiles("forward", outputs):
        monkeypatch.setattr(launch, "forward_tiles", lambda *_, tile=tile: [tile])
        out = buffers.empty(geometry.outputs, outputs, dtype)
        mix.forward(x, weight, out, geometry)
        close(out, read(x[0].x.double(), x[0].norm, geometry) @ weight.double().t(), dtype)
    both = zip_longest(tiles("dgrad", 48), tiles("wgrad", 48, outputs))
    passes = [(None, dgrad, wgrad) for dgrad, wgrad in both]
    for one, dgrad, wgrad in [*passes, *((tile, None, None) for tile in tiles("one_pass", 48, outputs) if tile)]:
        with monkeypatch.context() as patch:
            patch.setattr(launch, "one_pass_tiles", lambda *_, tile=one: [tile])
            for name, tile in (("dgrad_tiles", dgrad), ("wgrad_tiles", wgrad)):
                if tile:
                    patch.setattr(launch, name, lambda *_, tile=tile: [tile])
            check_backward(buffers, channels, outputs, geometry, dtype, add=(0,))


@activations
@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
def test_backward_activated(buffers, act, frozen):
    """d: the gradient of the activated output."""
    dtype, outputs = torch.float64, 20
    vectors = (None, None) if frozen else (vector(outputs, dtype, -0.5, 0.5), vector(outputs, dtype, -0.5, 0.5))
    correction = mix.ActivationGradient(norm_of(outputs, dtype), act, *vectors)
    check_backward(buffers, [-17, 8], outputs, PLAIN, dtype, correction)


@pytest.mark.parametrize("geometry", [PLAIN, POOL], ids=["plain", "pool"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_adds_to_another(buffers, geometry, dtype):
    """source: what g becomes the sum with; an odd map's border takes it as it is."""
    segments = segments_of(buffers, [-17, 6], geometry, dtype)
    sources = [buffers.put(torch.randn(s.x.shape).to(dtype), 2, 2) for s in segments]
    segments = [
        mix.Segment(s.x, s.norm, buffers.empty(*s.x.shape, dtype), True, source)
        for s, source in zip(segments, sources, strict=True)
    ]
    before = [source.clone() for source in sources]
    weight = weight_of(buffers, 12, [17, 6], dtype)
    d = buffers.put(torch.randn(geometry.outputs, 12).to(dtype))
    mix.backward(segments, d, None, None, weight, geometry)
    expected = expected_backward(segments, d, None, None, weight, geometry)
    for s, b, g in zip(segments, before, expected.gradients, strict=True):
        close(s.g, b.double() + g, dtype)
        assert torch.equal(s.source, b)


@pytest.mark.parametrize("geometry", [PLAIN, POOL], ids=["plain", "pool"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_adds(buffers, geometry, dtype):
    """add: to what is there, elsewhere than an odd map's border; g None: sums and the weight's gradient alone."""
    segments = segments_of(buffers, [-17, 5, -8], geometry, dtype)
    before = [torch.randn(s.x.shape).to(dtype) for s in segments]
    segments = [mix.Segment(s.x, s.norm, buffers.put(b), add=True) for s, b in zip(segments, before, strict=True)]
    segments[2] = mix.Segment(segments[2].x, segments[2].norm)
    weight = weight_of(buffers, 12, [17, 5, 8], dtype)
    d = buffers.put(torch.randn(geometry.outputs, 12).to(dtype))
    dweight, sums = mix.backward(segments, d, None, None, weight, geometry)
    expected = expected_backward(segments, d, None, None, weight, geometry)
    close(dweight, expected.dweight, dtype)
    close(sums[0], expected.sums[0], dtype)
    close(sums[1], expected.sums[1], dtype)
    for s, b, g in zip(segments[:2], before, expected.gradients, strict=False):
        close(s.g, b.double() + g, dtype)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("tile", [None, Tile(16, 16, 32, 4, 2)], ids=["two passes", "one"])
def test_backward_of_what_is_wanted(buffers, monkeypatch, weights, tile):
    """Sums are added to those of others; a segment that nobody wants anything of and one without a norm have none."""
    monkeypatch.setattr(launch, "one_pass_tiles", lambda *_: [tile])
    segments = segments_of(buffers, [-17, -8, 5], PLAIN, torch.float64)
    sums = torch.ones(2, 19, dtype=torch.float64)
    g = buffers.empty(*segments[2].x.shape, torch.float64)
    given = [replace(segments[0], sums=sums[:, 1:-1]), replace(segments[1], wanted=False), replace(segments[2], g=g)]
    weight = weight_of(buffers, 12, [17, 8, 5], torch.float64)
    d = buffers.put(torch.randn(PLAIN.outputs, 12).double())
    dweight, rest = mix.backward(given, d, None, None, weight, PLAIN, weights=weights)
    expected = expected_backward(segments, d, None, None, weight, PLAIN)
    close(sums[0, 1:-1], expected.sums[0, :17] + 1, torch.float64)
    close(sums[1, 1:-1], expected.sums[1, :17] + 1, torch.float64)
    close(g, expected.gradients[2], torch.float64)
    assert (sums[:, [0, -1]] == 1).all() and rest.shape == (2, 0) and dweight.shape == (12 if weights else 0, 30)
    if weights:
        close(dweight, expected.dweight, torch.float64)


def test_gradient_beside_its_input(buffers):
    """The gradient of the prefix of a feature buffer, added to a prefix: other slices hold NaN and keep it."""
    geometry = LARGE
    features, gradients = (torch.randn(geometry.pixels, 96) for _ in range(2))
    features[:, 48:], gradients[:, 48:] = float("nan"), float("nan")
    before = gradients[:, :48].clone()
    segment = mix.Segment(features[:, :48], norm_of(48, torch.float32), gradients[:, :48], add=True)
    weight = weight_of(buffers, 24, [48], torch.float32)
    d = buffers.put(torch.randn(geometry.pixels, 24))
    mix.backward([segment], d, None, None, weight, geometry)
    expected = expected_backward([segment], d, None, None, weight, geometry)
    close(gradients[:, :48], before.double() + expected.gradients[0], torch.float32)
    assert gradients[:, 48:].isnan().all()


def test_float32_weights_of_16_bit_inputs(buffers):
    segment = mix.Segment(buffers.put(torch.randn(70, 17).half()), norm_of(17, torch.float16))
    weight = weight_of(buffers, 12, [17], torch.float32)
    out = buffers.empty(70, 12, torch.float16)
    mix.forward([segment], weight, out, PLAIN)
    close(out, read(segment.x.double(), segment.norm, PLAIN) @ weight.double().t(), torch.float16)


def test_refuses_wrong_shapes():
    x, weight, out = torch.randn(70, 8), torch.randn(12, 8), torch.empty(70, 12)
    with pytest.raises(ValueError, match="a weight of 8"):
        mix.forward([mix.Segment(x), mix.Segment(x)], weight, out, PLAIN)
    with pytest.raises(ValueError, match="expected 297 pixels"):
        mix.forward([mix.Segment(x)], weight, out, LARGE)
    with pytest.raises(ValueError, match="nothing is added"):
        mix.backward([mix.Segment(x, None, x.clone(), False, x)], out, None, None, weight, PLAIN)
    after = mix.After(norm_of(12, torch.float32), ACTIVATIONS[1])
    with pytest.raises(ValueError, match="nothing follows"):
        mix.forward([mix.Segment(x)], weight, out, PLAIN, "ieee", torch.empty(2, 12, dtype=torch.float64), after)
    with pytest.raises(ValueError, match="go together"):
        mix.backward([mix.Segment(x)], out, out, None, weight, PLAIN)
