"""csp.fuse on networks in many styles: the same numbers, the same object, and back."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from comparing import calls, compare, image, pair, step
from torch import Tensor, nn

import csp_kernels as csp
from csp_kernels.analysis import saved_bytes
from csp_kernels.stage.graph import MaxPool

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("name", networks.FUSED)
def test_equal(name: str) -> None:
    """In training, with half of the norms frozen and in inference; three steps of SGD."""
    plain, ours, report = pair(networks.FUSED[name])
    assert report.fused and 0 < report.coverage <= 1
    x = image()
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, weight_decay=0.01) for m in (plain, ours)]
    for mode in ("train", "half", "eval"):
        for m in (plain, ours):
            m.train(mode != "eval")
            norms = [n for n in m.modules() if isinstance(n, nn.BatchNorm2d)]
            for norm in norms[::2] if mode == "half" else ():
                norm.eval()
        for _ in range(3):
            expected = step(plain, x, optimizers[0])
            found: dict[str, Tensor] = {}

            def run(found: dict[str, Tensor] = found) -> None:
                found.update(step(ours, x, optimizers[1]))

            assert calls(run) == sum(len(row.regions) for row in report.fused)
            compare(found, expected)


@pytest.mark.parametrize("name", networks.FUSED)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_first_call_without_gradients(mode: Callable[[], Any], name: str) -> None:
    """What is traced then is traced as ever."""
    plain, ours, report = pair(networks.FUSED[name])
    x, found = image(), []
    with mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        count = calls(lambda: found.append(ours.eval()(x)))
        expected = plain.eval()(x)
    assert count == sum(len(row.regions) for row in report.fused)
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", networks.LEFT)
def test_left_alone(name: str) -> None:
    make, reason = networks.LEFT[name]
    plain, ours, report = pair(make)
    assert not report.fused and not report.coverage and type(ours) is make
    import re

    assert any(re.search(reason, left.reason) for left in report.left), str(report)
    for m in (plain, ours) if name != "ChangesItsInput" else ():
        m(image())
    if name != "ChangesItsInput":
        compare(step(ours, image()), step(plain, image()))


def test_a_wide_convolution_with_stride_2_is_a_stage() -> None:
    """In float32; in 16 bits PyTorch's is as fast. What it computes tests/stage says."""
    make = lambda: nn.Sequential(nn.Conv2d(64, 65, 3, 2, 1, bias=False), nn.BatchNorm2d(65), nn.SiLU())  # noqa: E731
    model, x = make(), torch.randn(2, 64, 8, 10)
    assert len(csp.fuse(model).fused) == 1
    assert calls(lambda: model(x)) == 1
    with torch.no_grad():
        assert calls(lambda: model(x)) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(lambda: model(x)) == 0
    assert calls(lambda: model(x)) == 1
    assert not csp.fuse(make().bfloat16()).fused
    alone = nn.Sequential(nn.Conv2d(64, 65, 3, 2, 1))
    assert len(csp.fuse(alone).fused) == 1
    assert calls(lambda: alone(x)) == 1


@pytest.mark.parametrize("name", networks.FUSED)
def test_stays_what_it_was(name: str) -> None:
    """Classes, modules, parameters, keys; twice is once; back: bitwise."""
    torch.manual_seed(0)
    model = networks.FUSED[name]()
    x = image().float()
    before = {n: (id(m), m.__class__) for n, m in model.named_modules()}
    parameters, keys = [id(p) for p in model.parameters()], list(model.state_dict())
    saved = copy.deepcopy(model)
    first = csp.fuse(model)
    again = csp.fuse(model)
    assert [row.path for row in again.fused] == [row.path for row in first.fused]
    assert {n: (id(m), m.__class__) for n, m in model.named_modules()} == before
    assert all(isinstance(m, before[n][1]) for n, m in model.named_modules())
    assert [id(p) for p in model.parameters()] == parameters and list(model.state_dict()) == keys
    model(x)
    assert csp.unfuse(model) is model
    assert all(type(m) is before[n][1] for n, m in model.named_modules())
    saved(x)
    model.load_state_dict(saved.state_dict())
    a, b = step(saved, x), step(model, x)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [p.stride() for p in model.parameters()] == [p.stride() for p in saved.parameters()]


def test_part_by_part() -> None:
    """What its forward calls one after the other is fused as a whole, and where that cannot be in its three parts."""
    plain, ours, report = pair(networks.SizedInEvaluation)
    x = image()
    assert [row.path for row in report.fused] == [""] and report.coverage == 1
    whole = sum(len(row.regions) for row in report.fused)
    assert calls(lambda: compare(step(ours, x), step(plain, x))) == whole == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                a, found = plain.eval()(x), []
                assert calls(lambda found=found: found.append(ours.eval()(x))) == 3
                torch.testing.assert_close(found[0], a, rtol=1e-9, atol=1e-10)
    seen: list[int] = []
    for m in (plain.train(), ours.train()):
        m.layers[2].register_forward_hook(lambda module, args, y: seen.append(y.shape[1]))
    with pytest.warns(RuntimeWarning, match="a SizedInEvaluation runs part by part: layers.2 has a forward hook"):
        assert calls(lambda: compare(step(ours, x), step(plain, x))) == 3
    assert seen == [16, 16]
    assert next(ours.float().parameters()).dtype is torch.float32
    csp.unfuse(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]


def test_report_of_what_is_inside() -> None:
    """Children that a whole calls as they are, with the FLOPs of the images that they are given; twice is once."""
    model = networks.Layers(networks.Sized())
    first, alone = csp.fuse(model), csp.fuse(networks.Lists())
    assert [row.path for row in first.fused] == ["", "layers.7.inner"]
    assert first.fused[1].flops == alone.flops // 4 > 0
    again = csp.fuse(model)
    assert [(row.path, row.flops) for row in again.fused] == [(row.path, row.flops) for row in first.fused]


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_fused_again_after_a_change(change: str) -> None:
    """As what it is now."""
    model = networks.Layers(networks.Sized())
    csp.fuse(model)
    model(image().float())
    if change == "deleted":
        del model.layers[7]
    else:
        model.layers[6] = networks.ConvNorm(10, 8, s=2)
    report, x = csp.fuse(model), image().float()
    assert report.fused[0].path == "" and report.coverage == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calls(lambda: model(x)) == sum(len(row.regions) for row in report.fused)


def test_copies_are_fused_as_a_whole() -> None:
    """Also with tensors among the attributes, which are others in the copy; not where they are gone."""
    model, x = networks.Layers(), image().float()
    model.stride, model.strides = torch.tensor([8.0]), [torch.ones(3)]  # type: ignore[assignment]
    csp.fuse(model)
    for made in (model, copy.deepcopy(model)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert calls(lambda made=made: made(x)) == 1
    made.stride = None  # type: ignore[assignment]
    with pytest.warns(RuntimeWarning, match="part by part: it has another stride"):
        made(x)


def test_layers_that_are_called_again() -> None:
    """They are no part of a whole: layers are fused by themselves."""

    class Again(networks.Layers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    report = csp.fuse(Again())
    assert [row.path for row in report.fused] == ["layers.2", "layers.5", "layers.6"]


def test_a_convolution_without_parameters() -> None:
    conv = nn.Conv2d(64, 64, 3, 2, 1, bias=False)
    weight = conv.weight.detach()
    del conv.weight
    conv.register_buffer("weight", weight)
    model, x = nn.Sequential(conv, nn.ReLU()), torch.randn(1, 64, 8, 10)
    expected = model(x)
    csp.fuse(model)
    torch.testing.assert_close(model(x), expected)


def test_as_a_context() -> None:
    model = networks.Lists()
    with csp.fused(model) as report:
        assert report.fused and type(model) is not networks.Lists
    assert type(model) is networks.Lists
    csp.fuse(model)
    with csp.fused(model):
        pass
    assert type(model) is not networks.Lists  # it was fused before


def test_pickles_need_nothing_of_this_package(tmp_path: Path) -> None:
    model = networks.FUSED["residual blocks in a row"]().eval()
    x = image().float()
    plain = model(x)
    csp.fuse(model)
    model(x)
    torch.save(model, tmp_path / "model.pt")
    assert b"csp" not in (tmp_path / "model.pt").read_bytes() and b"csp" not in pickle.dumps(model)
    torch.save((x, plain), tmp_path / "expected.pt")
    script = (
        "import sys, torch; sys.modules['csp_kernels'] = None; sys.path.insert(0, sys.argv[1])\n"
        "model = torch.load(sys.argv[2] + '/model.pt', weights_only=False)\n"
        "x, y = torch.load(sys.argv[2] + '/expected.pt')\n"
        "torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)\n"
        "print(type(model).__name__, type(model[0]).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(HERE), str(tmp_path)], text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Sequential", "Functional"]


def test_deep_copies_stay_fused() -> None:
    model = networks.Lists()
    csp.fuse(model)
    x = image().float()
    model(x)
    copied = copy.deepcopy(model)
    assert calls(lambda: copied(x)) == 1
    torch.testing.assert_close(copied(x), model(x))
    copied.first.bn.weight.data.fill_(0.5)
    assert not torch.allclose(copied(x), model(x))
    assert csp.unfuse(copied) is copied and type(model) is not networks.Lists


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a hook": (lambda m: m.blocks[0].register_forward_hook(lambda *_: None), r"blocks.0 has a forward hook"),
    "a hook of a norm": (lambda m: m.first.bn.register_forward_hook(lambda *_: None), "first.bn has a forward hook"),
    "another child": (lambda m: setattr(m.last, "conv", nn.Conv2d(32, 10, 1)), "last has other children"),
    "a child more": (lambda m: m.blocks.append(networks.ConvNorm(8, 8)), "blocks has other children"),
    "no child": (lambda m: delattr(m.first, "bn"), "first has other children"),
    "another activation": (lambda m: setattr(m.blocks[1], "act", torch.sigmoid), "blocks.1 has another act"),
    "a stride": (lambda m: setattr(m.blocks[1].conv, "padding", (0, 0)), "blocks.1.conv has another padding"),
    "a forward": (lambda m: setattr(m.blocks[0], "forward", lambda x: x), "blocks.0 has a forward of its own"),
    "a bias": (lambda m: setattr(m.last.conv, "bias", nn.Parameter(torch.ones(10))), "last.conv has a bias now"),
    "a global hook": (
        lambda m: nn.modules.module.register_module_forward_hook(lambda *_: None),
        "a hook of all modules is registered",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_later_runs_as_it_was(name: str) -> None:
    """With the reason, once."""
    change, reason = CHANGES[name]
    model, twin = networks.Lists(), networks.Lists()
    twin.load_state_dict(model.state_dict())
    csp.fuse(model)
    x = image().float()
    model(x)
    twin(x)
    handles = [change(m) for m in (model, twin)]
    try:
        if name in ("no child", "a stride"):
            for m in (twin, model):
                with pytest.raises((AttributeError, RuntimeError)), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    m(x)
            return
        if name in ("another child", "a bias", "a child more"):
            twin.load_state_dict(model.state_dict())
        if name == "a child more":
            return
        with pytest.warns(RuntimeWarning, match=f"csp.fuse: a Lists runs as it was before: {reason}"):
            assert calls(lambda: torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)) == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)
    finally:
        for handle in handles:
            if hasattr(handle, "remove"):
                handle.remove()


def test_attributes_that_forward_reads() -> None:
    model = networks.Depth()
    csp.fuse(model)
    x = image().float()
    assert calls(lambda: model(x)) == 1
    model.drop_rate = 0.5
    with pytest.warns(RuntimeWarning, match="has another drop_rate"):
        assert calls(lambda: model(x)) == 0
    model.drop_rate = 0.0
    assert calls(lambda: model(x)) == 1


CONFIGURED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an object": (lambda m: setattr(m.config, "shortcut", False), "has another config"),
    "a list in it": (lambda m: m.config.order.append("b"), "has another config"),
    "deep in it": (lambda m: m.config.more["x"]["y"].update(z=[False]), "has another config"),
    "1 for True": (lambda m: m.config.more["x"]["y"].update(z=[1]), "has another config"),
    "(1, 2) for (True, 2)": (lambda m: setattr(m.config, "flags", (1, 2)), "has another config"),
    "over the class": (lambda m: setattr(m, "slope", 0.5), "has other attributes"),
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_objects_that_forward_reads(name: str) -> None:
    change, reason = CONFIGURED[name]
    model, twin = networks.Configured().eval(), networks.Configured().eval()
    twin.load_state_dict(model.state_dict())
    csp.fuse(model)
    x = image().float()
    assert calls(lambda: model(x)) == 1
    for m in (model, twin):
        change(m)
    with pytest.warns(RuntimeWarning, match=reason):
        torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)


def test_another_forward_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = networks.Lists()
    csp.fuse(model)
    x = image().float()
    model(x)
    monkeypatch.setattr(networks.ConvNorm, "forward", lambda self, x: self.conv(x))
    with pytest.warns(RuntimeWarning, match="the forward of ConvNorm is another one now"):
        assert calls(lambda: model(x)) == 0


def test_shallow_copies() -> None:
    model = networks.Depth()
    csp.fuse(model)
    x = image().float()
    model(x)
    assert type(copy.copy(model)) is networks.Depth  # as pickles
    copied = model._replicate_for_data_parallel()  # has its own attributes, and the class
    copied.drop_rate = 0.5
    assert calls(lambda: model(x)) == 1
    with pytest.warns(RuntimeWarning, match="has another drop_rate"):
        assert calls(lambda: copied(x)) == 0


def test_dropout() -> None:
    """In training it drops, as often as it says; evaluation is exact."""
    plain = networks.Depth()
    plain.drop_rate = 0.4
    ours = copy.deepcopy(plain)
    csp.fuse(ours)
    x = image().float().repeat(8, 1, 1, 1)
    assert calls(lambda: ours(x)) == 1 and not torch.equal(ours(x), ours(x))
    ours.load_state_dict(plain.eval().state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), plain(x), rtol=1e-4, atol=1e-5)


def test_exporters_and_compilers_see_plain_modules() -> None:
    model = networks.Lists().eval()
    x = image().float()
    expected = model(x)
    csp.fuse(model)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)
    program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    symbolic = torch.fx.symbolic_trace(networks.Functional().eval())
    assert symbolic(x).shape == x.shape
    fused = networks.Functional().eval()
    csp.fuse(fused)
    torch.testing.assert_close(torch.fx.symbolic_trace(fused)(x), fused(x), rtol=1e-4, atol=1e-5)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)


def test_backends_and_other_calls() -> None:
    model = networks.Functional()
    csp.fuse(model)
    x = image().float()
    assert calls(lambda: model(x)) == 1
    with csp.use_backend("reference"):
        assert calls(lambda: model(x)) == 0
    assert calls(lambda: model(x=x)) == 1
    assert calls(lambda: torch.func.vmap(model.eval())(x[None])) == 0
    assert model(x[:0]).shape == (0, 8, 9, 10)


def test_children_that_are_fused_themselves() -> None:
    """What lies between two stages is called, and what is in it is fused where it can be."""
    model = networks.Attention()
    report = csp.fuse(model)
    assert report.fused[0].path == "" and len(report.fused[0].regions) == 2
    assert calls(lambda: model(image().float())) == 2


def test_depthwise_and_attention_to_channels() -> None:
    """The former are in stages; what gives one pixel, and a depthwise one that gives more than it takes, are called."""
    for name, expected in (
        ("Separable", {"expand.conv", "depthwise"}),
        ("depthwise, then with twice the channels", {"0", "3"}),
    ):
        model = networks.FUSED[name]()
        report = csp.fuse(model)
        held = {path for row in report.fused for region in row.regions for path in region.holders}
        assert {path for path in held if isinstance(model.get_submodule(path), nn.Conv2d)} == expected


def test_report() -> None:
    report = csp.fuse(nn.Sequential(networks.Lists(), networks.OnSize()))
    text = str(report)
    assert "4 of 5 convolutions in 1 fused modules" in text.splitlines()[0]
    assert "1  it depends on the width of its input" in text and 0.7 < report.coverage < 0.9
    with pytest.raises(TypeError, match=r"model: got int, expected an nn\.Module"):
        csp.fuse(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", networks.FUSED)
def test_report_says_what_is_kept(name: str) -> None:
    """As a part of what autograd keeps of the plain modules: counted from sizes, and measured."""
    plain, ours, report = pair(networks.FUSED[name])
    for row in report.fused:
        before, after = (kept(model, row.path) for model in (plain, ours))
        assert row.kept == pytest.approx(after / before, rel=0.15), str(report)


def kept(model: nn.Module, path: str) -> int:
    """Bytes of the module of this path, given what the model gives it."""
    model = model.float().to(memory_format=torch.channels_last)
    module, given = model.get_submodule(path), []
    with module.register_forward_pre_hook(lambda _, inputs: given.append(inputs)):
        model(image().float().contiguous(memory_format=torch.channels_last))
    leaves = [t.detach().requires_grad_() for t in given[0]]
    return saved_bytes(lambda: module(*leaves), [*module.parameters(), *module.buffers()])


def test_maxima_behind_a_norm_are_a_stage_without_convolutions() -> None:
    report = csp.fuse(networks.FUSED["maxima between convolutions that stay"]())
    nodes = [[type(node) for node in region.graph.nodes] for row in report.fused for region in row.regions]
    assert [MaxPool] in nodes and len(nodes) == 2


def test_a_stage_keeps_nothing_of_what_is_frozen() -> None:
    """In front of the first weight that is trained, as PyTorch has it."""
    kept = []
    for fuse in (False, True):
        model = nn.Sequential(networks.ConvNorm(8, 64), *(networks.ConvNorm(64, 64) for _ in range(6)))
        model[:5].requires_grad_(False)
        assert not fuse or len(csp.fuse(model).fused[0].regions) == 1
        x = torch.randn(2, 8, 32, 32).contiguous(memory_format=torch.channels_last)
        kept.append(saved_bytes(lambda m=model, x=x: m(x), [*model.parameters(), *model.buffers()]))  # type: ignore[misc]
    assert kept[1] < 0.8 * kept[0]


def test_outputs_of_frozen_layers_want_no_gradient() -> None:
    made = pair(networks.Pools)[:2]
    gradients = []
    for model in made:
        biased = model.get_submodule("biased")
        model.requires_grad_(False)
        biased.requires_grad_(True)
        outputs = model(image())
        assert [y.requires_grad for y in outputs] == [False, True]
        outputs[1].sum().backward()
        gradients.append(biased.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("count", [1, 2])
def test_a_lone_convolution_gives_what_one_with_its_weights_would(count: int) -> None:
    """channels_last for an NCHW image, so that nothing behind it converts; several give what they are given."""
    layers = [
        nn.Sequential(nn.Conv2d(3 if i == 0 else 8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        for i in range(count)
    ]
    model = nn.Sequential(*(layer for block in layers for layer in block))
    assert len(csp.fuse(model).fused) == 1
    y = model(torch.randn(2, 3, 64, 66))
    assert y.is_contiguous(memory_format=torch.channels_last) == (count == 1)
