"""Children with hooks, parametrizations, wrappers or a forward of their own: what plain modules do, layers do."""

from __future__ import annotations

import copy
import importlib
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode
from twins import LAYERS, NETWORKS, check_same, inputs, make, plain, step, tensors

import csp_kernels as csp

pytestmark = pytest.mark.filterwarnings("ignore:.*runs its plain PyTorch reference", "ignore::FutureWarning")
Module = Any


def leaves(module: nn.Module, *kinds: type) -> list[Module]:
    return [m for m in module.modules() if isinstance(m, kinds or (nn.Conv2d, nn.BatchNorm2d))]


def containers(module: nn.Module) -> list[Module]:
    return [m for m in module.modules() if m is not module and [*m.children()]]


@contextmanager
def expect_warning(*, wanted: bool = True) -> Iterator[None]:
    """Exactly one warning of ours, or none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = [str(w.message) for w in caught if "runs its plain PyTorch reference" in str(w.message)]
    assert bool(ours) == wanted, ours


# --- hooks ---


Hook = Callable[[Module, list[str]], Any]  # registers a hook that writes into the list and changes values
HOOKS: dict[str, Hook] = {
    "forward": lambda m, log: m.register_forward_hook(lambda m, a, y: (log.append("f"), y * 1.5)[1]),
    "forward pre": lambda m, log: m.register_forward_pre_hook(lambda m, a: (log.append("p"), (a[0] * 1.5,))[1]),
    "full backward": lambda m, log: m.register_full_backward_hook(
        lambda m, i, o: (log.append("b"), tuple(None if t is None else t * 1.5 for t in i))[1]
    ),
    "backward pre": lambda m, log: m.register_full_backward_pre_hook(
        lambda m, o: (log.append("q"), tuple(t * 1.5 for t in o))[1]
    ),
    "always called": lambda m, log: m.register_forward_hook(lambda m, a, y: log.append("a"), always_call=True),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", LAYERS)
def test_hooks_on_leaves_run_and_count(name: str, kind: str) -> None:
    """As often as in the plain twin, with their changes of values and gradients; also with the reference chosen."""
    ours = make(name)
    theirs, again = plain(ours), copy.deepcopy(ours)
    logs: list[list[str]] = [[], [], []]
    for module, log in zip((ours, theirs, again), logs, strict=True):
        for leaf in leaves(module, *([nn.Conv2d] if "backward" in kind and "residual" in name else [])):
            HOOKS[kind](leaf, log)  # the plain norms of a residual block are activated in place
    arguments = inputs(name)
    expected = step(theirs, arguments)
    check_same(step(ours, arguments), expected)
    with csp.use_backend("reference"), expect_warning(wanted=False):
        check_same(step(again, arguments), expected)
    assert logs[0] == logs[1] == logs[2] and len(logs[1]) >= len(leaves(theirs, nn.Conv2d))


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in ("transition", "join", "fork")])
def test_hooks_on_containers(name: str) -> None:
    """Dense layers, branches, units, blocks inside a stage."""
    for i in range(len(containers(make(name)))):
        ours = make(name)
        theirs = plain(ours)
        logs: list[list[str]] = [[], []]
        for module, log in zip((ours, theirs), logs, strict=True):
            containers(module)[i].register_forward_pre_hook(lambda m, a, log=log: log.append(type(m).__name__))
        arguments = inputs(name)
        check_same(step(ours, arguments), step(theirs, arguments))
        assert logs[0] == logs[1] and logs[1]


def test_every_module_of_a_network_is_hooked() -> None:
    for name in NETWORKS:
        ours = make(name)
        seen: list[list[str]] = [[], []]
        for module, log in zip((ours, plain(ours)), seen, strict=True):
            for path, m in module.named_modules():
                m.register_forward_hook(lambda m, a, y, path=path, log=log: log.append(path))
            with torch.no_grad():
                module(*inputs(name))
        assert seen[0] == seen[1]
        assert set(seen[0]) == {p for p, m in ours.named_modules() if type(m) is not nn.Identity or p in seen[1]}


@pytest.mark.parametrize("name", LAYERS)
def test_hooks_come_and_go(name: str) -> None:
    """Added after the first call they run; removed, the layer is fused again. One warning in all."""
    csp.use_backend("auto")
    module, arguments, log = make(name), inputs(name), list[str]()
    fused = ran_fused(module, arguments)
    with expect_warning():
        handle = HOOKS["forward"](leaves(module, nn.Conv2d)[-1], log)
        ran_fused(module, arguments)
        ran_fused(module, arguments)
    assert len(log) == 2
    handle.remove()
    with expect_warning(wanted=False):
        assert ran_fused(module, arguments) == fused
    assert len(log) == 2


def ran_fused(module: nn.Module, arguments: list[Any]) -> list[str]:
    """The operators of this package that a call runs; `stage_inference` is `stage` with weights that calls share."""
    with torch.profiler.profile() as profile, torch.no_grad():
        module(*arguments)
    names = {e.name for e in profile.events() if e.name.startswith("csp_kernels::")}
    return sorted({name.replace("stage_inference", "stage") for name in names})


def test_explicit_native_refuses_hooks() -> None:
    block = make("dense")
    block.denselayer2.conv1.register_forward_hook(lambda m, a, y: None)
    with csp.use_backend("native"), pytest.raises(RuntimeError, match=r"denselayer2\.conv1 has a forward hook"):
        block(*inputs("dense"))


@pytest.mark.parametrize("name", LAYERS)
def test_hooks_of_all_modules(name: str) -> None:
    ours, arguments, logs = make(name), inputs(name), ([], [])
    register = torch.nn.modules.module.register_module_forward_hook
    results = []
    for module, log in zip((ours, plain(ours)), logs, strict=True):
        handle = register(lambda m, a, y, log=log: log.append(type(m).__name__))
        try:
            results.append(step(module, arguments))
        finally:
            handle.remove()
    check_same(*results)
    assert logs[0] == logs[1] and len(logs[0]) > len(leaves(ours))


def test_counting_flops_does_not_change_what_runs() -> None:
    """Its hooks of all modules follow names alone."""
    block, (x,) = make("dense"), inputs("dense")
    with csp.use_backend("native"), FlopCounterMode(display=False):
        block(x)


# --- other forwards ---


class Standardized(nn.Conv2d):
    """Weight standardisation the short way."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Called(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


def patch_forward(m: Module) -> None:
    forward = m.forward
    m.forward = lambda x: forward(x) * 2


def patch_conv_forward(m: Module) -> None:
    m._conv_forward = types.MethodType(lambda self, x, w, b: nn.Conv2d._conv_forward(self, x, 2 * w, b), m)


def set_class(cls: type) -> Callable[[Module], None]:
    return lambda m: setattr(m, "__class__", cls)


def compile_alone(m: Module) -> None:
    m.compile(backend="eager")


FORWARDS: dict[str, Callable[[Module], None]] = {
    "instance": patch_forward,
    "instance _conv_forward": patch_conv_forward,
    "_conv_forward": set_class(Standardized),
    "forward": set_class(Doubled),
    "__call__": set_class(Called),
    "compile": compile_alone,
}


@pytest.mark.parametrize("kind", FORWARDS)
@pytest.mark.parametrize("name", ["dense", "post", "two_way", "join", "partial pre", "stage pre", "residual slice"])
def test_convolutions_with_another_forward(name: str, kind: str) -> None:
    ours = make(name)
    theirs = plain(ours)
    for module in (ours, theirs):
        for conv in leaves(module, nn.Conv2d)[1::2] or leaves(module, nn.Conv2d):
            FORWARDS[kind](conv)
    arguments = inputs(name)
    expected = step(theirs, arguments)
    with expect_warning():
        check_same(step(ours, arguments), expected)


def test_norms_and_containers_with_another_forward() -> None:
    for pick in (
        lambda m: m.dense.denselayer1.norm2, lambda m: m.dense.denselayer2, lambda m: m.dense,
        lambda m: m.transition.u, lambda m: m.transition, lambda m: m.transition.u.norm,
    ):  # fmt: skip
        ours = make("stage pre")
        theirs = plain(ours)
        for module in (ours, theirs):
            target = pick(module)
            forward = target.forward
            target.forward = lambda *a, forward=forward: forward(*a) * 1.5
        arguments = inputs("stage pre")
        expected = step(theirs, arguments)
        with expect_warning():
            check_same(step(ours, arguments), expected)


def test_the_transition_pools_first_only_in_front_of_a_plain_1x1() -> None:
    class Curved(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    others = Curved(8, 6, 1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 6, 1, groups=2)
    for conv in (*others, nn.Sequential(nn.Conv2d(8, 6, 1), nn.Tanh())):
        ours = make("transition")
        ours.conv = conv.double()
        theirs, arguments = plain(ours), inputs("transition")
        with expect_warning():
            got = step(ours, arguments)
        check_same(got, step(theirs, arguments))


# --- torch.nn.utils ---


def train(module: nn.Module, name: str, steps: int = 3) -> None:
    """SGD, reproducible."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.05)
    for i in range(steps):
        torch.manual_seed(i)
        optimizer.zero_grad()
        y = tensors(module(*inputs(name)))
        sum(t.square().mean() for t in y).backward()
        optimizer.step()


REWRITES: dict[str, Callable[[Module], Any]] = {
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("kind", REWRITES)
@pytest.mark.parametrize("name", ["dense", "post", "two_way", "transition", "join", "partial post", "stage two_way"])
def test_rewritten_weights_train_as_in_plain_modules(name: str, kind: str) -> None:
    """Three steps, then eval, then a state_dict loaded into another one and eval."""
    ours = make(name)
    theirs = plain(ours)
    for module in (ours, theirs):
        torch.manual_seed(3)  # spectral norm starts from a random vector
        for conv in leaves(module, nn.Conv2d):
            REWRITES[kind](conv)
    with expect_warning(wanted="parametrized" not in kind):
        train(ours, name)
    train(theirs, name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    check_same(dict(ours.state_dict()), dict(theirs.state_dict()))
    arguments = inputs(name)
    with torch.no_grad():
        expected = tensors(theirs.eval()(*arguments))
        for y, other in zip(tensors(ours.eval()(*arguments)), expected, strict=True):
            torch.testing.assert_close(y, other, rtol=1e-9, atol=1e-9)
        fresh = make(name)
        for conv in leaves(fresh, nn.Conv2d):
            REWRITES[kind](conv)
        fresh.load_state_dict(ours.state_dict())
        for y, other in zip(tensors(fresh.eval()(*arguments)), expected, strict=True):
            torch.testing.assert_close(y, other, rtol=1e-9, atol=1e-9)


# --- children replaced ---


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *a: Any) -> Any:
        return self.inner(*a) * 1.5


class Gated(csp.reference.DenseLayer):
    """A dense layer with another forward and the same children."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


def replaced(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Module], None]:
    return lambda block: block.__setattr__("denselayer1", wrap(block.denselayer1))


def grouped(block: Module) -> None:
    torch.manual_seed(5)
    block.denselayer2.conv2 = nn.Conv2d(8, 4, 3, padding=1, groups=4, bias=False).double()


def with_extra(block: Module) -> None:
    torch.manual_seed(5)
    block.add_module("extra", nn.Conv2d(16, 3, 3, padding=1).double())


def gated(block: Module) -> None:
    block.denselayer2.__class__ = Gated


CHANGES: dict[str, Callable[[Module], None]] = {
    "wrapper": replaced(Wrapped),
    "Sequential": replaced(nn.Sequential),
    "checkpoint_wrapper": replaced(
        lambda m: importlib.import_module(
            "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
        ).checkpoint_wrapper(m)
    ),
    "torch.compile": replaced(lambda m: torch.compile(m, backend="eager")),
    "extra layer": with_extra,
    "another forward": gated,
    "grouped": grouped,
    "removed": lambda block: block.__setattr__("denselayer2", None),
    "Identity": lambda block: setattr(block.denselayer1, "norm1", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_replaced_children_of_a_block(change: str) -> None:
    ours = make("dense")
    theirs = plain(ours)
    for block in (ours, theirs):
        CHANGES[change](block)
    arguments = inputs("dense")
    expected = step(theirs, arguments)
    with expect_warning(wanted=change != "removed"):
        check_same(step(ours, arguments), expected)
    if change not in ("removed", "torch.compile"):
        with csp.use_backend("native"), pytest.raises(RuntimeError, match=r"backend 'native': (denselayer|extra)"):
            ours(*arguments)


PARTS = ["dense", "transition", "transition.u", "dense.denselayer1", "dense.denselayer1.norm2"]


@pytest.mark.parametrize("path", PARTS)
@pytest.mark.parametrize("name", ["stage pre", "stage two_way"])
def test_replaced_children_of_a_stage(name: str, path: str) -> None:
    if name == "stage two_way":  # fusion "last" has t alone, branches between layers and norms
        path = path.replace(".u", ".t").replace("norm2", "branch2.norm3")
    ours = make(name)
    theirs = plain(ours)
    for stage in (ours, theirs):
        stage.set_submodule(path, Wrapped(stage.get_submodule(path)))
    arguments = inputs(name)
    expected = step(theirs, arguments)
    with expect_warning():
        check_same(step(ours, arguments), expected)


def test_an_extra_child_inside_a_layer_is_not_called() -> None:
    ours = make("dense")
    expected = step(plain(ours), inputs("dense"), 1)
    torch.manual_seed(0)
    ours = make("dense")
    ours.denselayer1.spare = nn.Conv2d(3, 3, 1)
    with csp.use_backend("native"):
        got = step(ours, inputs("dense"), 1)
    assert got["output 0"].shape == expected["output 0"].shape


def test_an_extra_child_of_a_branch_is_refused_by_the_twin_too() -> None:
    ours = make("two_way")
    ours.denselayer1.branch1.spare = nn.Identity()
    with expect_warning(), pytest.raises(ValueError):
        ours(*inputs("two_way"))


# --- dropout, a layer at a time ---


def one_eval(block: Module) -> None:
    block.denselayer1.eval()


def one_rate(block: Module) -> None:
    block.denselayer1.drop_rate = 0.0


@pytest.mark.parametrize("change", [one_eval, one_rate])
def test_dropout_of_single_layers(change: Callable[[Module], None]) -> None:
    ours = csp.DenseBlock(2, 8, 64, 1, drop_rate=0.5)
    theirs = plain(ours)
    for block in (ours, theirs):
        change(block)
    (x,) = inputs("dense", dtype=torch.float32)
    with expect_warning():
        y = step(ours, [x])["output 0"]
    torch.testing.assert_close(y, step(theirs, [x])["output 0"])
    zeros = (y[:, 8:] == 0).double().mean((0, 2, 3))
    assert zeros[:64].max() == 0 and 0.4 < zeros[64:].mean() < 0.6


def test_dropout_rate_of_the_block_is_that_of_its_layers() -> None:
    for block in (csp.DenseBlock(2, 8, 64, 1, drop_rate=0.5), csp.reference.DenseBlock(2, 8, 64, 1, drop_rate=0.5)):
        assert block.drop_rate == 0.5
        block.drop_rate = 0.0
        assert [block.denselayer1.drop_rate, block.denselayer2.drop_rate, block.drop_rate] == [0.0] * 3
        (x,) = inputs("dense", dtype=torch.float32)
        with expect_warning(wanted=False):
            assert (block(x)[:, 8:] == 0).double().mean() < 0.01
    stage = make("stage pre")
    stage.dense.drop_rate = 0.5
    with expect_warning():
        first, second = (stage(*inputs("stage pre")) for _ in range(2))
    assert not torch.equal(first, second)


# --- norms with an activation, shared modules ---


def test_timm_norm_with_activation() -> None:
    """Fused where its activation changes nothing more; otherwise as the twin."""
    norm_act = pytest.importorskip("timm.layers").BatchNormAct2d

    def with_acts(name: str, **options: Any) -> Module:
        torch.manual_seed(1)
        module = make(name)
        for m in [m for m in module.modules() if "norm" in "".join(m._modules)]:
            for path, child in [*m._modules.items()]:
                if isinstance(child, nn.BatchNorm2d):
                    other = norm_act(child.num_features, **options).double()
                    other.load_state_dict(child.state_dict(), strict=False)
                    setattr(m, path, other)
        return module

    silu = {"act_layer": nn.SiLU}
    for name, options, fused in (
        ("dense", {}, True), ("stage two_way", {}, True), ("partial pre", {"apply_act": False}, True),
        ("post", {"inplace": False}, True), ("join", {"apply_act": False}, True), ("join", silu, False),
        ("join", {}, False), ("dense", silu, False), ("dense", {"drop_layer": nn.Dropout}, False),
    ):  # fmt: skip
        ours = with_acts(name, **options)
        theirs, arguments = plain(ours), inputs(name)
        csp.use_backend("native" if fused else "auto")
        with expect_warning(wanted=not fused):
            got = step(ours, arguments, seed=4)
        check_same(got, step(theirs, arguments, seed=4))
        handle = leaves(ours, nn.BatchNorm2d)[0].act.register_forward_hook(lambda m, a, y: None)
        csp.use_backend("auto")
        with expect_warning(wanted=fused):
            ours(*arguments)
        handle.remove()


def share_norms(module: nn.Module) -> None:
    """One norm object for all of the same width, wherever they are."""
    norms: dict[int, nn.Module] = {}
    for m in [*module.modules()]:
        for path, child in [*m._modules.items()]:
            if isinstance(child, nn.BatchNorm2d):
                setattr(m, path, norms.setdefault(child.num_features, child))


def share_convolutions(module: nn.Module) -> None:
    convolutions: dict[torch.Size, nn.Module] = {}
    for m in [*module.modules()]:
        for path, child in [*m._modules.items()]:
            if isinstance(child, nn.Conv2d):
                setattr(m, path, convolutions.setdefault(child.weight.shape, child))


def share_buffers(module: nn.Module) -> None:
    """Norms of their own, one set of running statistics."""
    first: dict[int, Module] = {}
    for norm in leaves(module, nn.BatchNorm2d):
        other = first.setdefault(norm.num_features, norm)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(norm, name, getattr(other, name))


@pytest.mark.parametrize("share", [share_norms, share_convolutions, share_buffers])
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("name", ["dense", "post", "two_way", "partial pre", "stage pre", "stage two_way"])
def test_shared_children(name: str, momentum: float | None, share: Callable[[nn.Module], None]) -> None:
    """Running statistics advance at each use in the order of use; gradients add up."""
    ours = make(name)
    share(ours)
    for norm in leaves(ours, nn.BatchNorm2d):
        norm.momentum = momentum
    theirs = plain(ours)
    csp.use_backend("native")
    for batch in (2, 3, 4):
        arguments = inputs(name, batch)
        check_same(step(ours, arguments), step(theirs, arguments))


def test_shared_norms_of_several_layers_compiled_and_frozen() -> None:
    model = nn.Sequential(make("dense"), csp.DenseBlock(2, 16, 4, 2).double())
    model[1].denselayer1.norm2 = model[1].denselayer2.norm2 = model[0].denselayer1.norm2
    theirs = nn.Sequential(*(plain(m) for m in model))
    for i in (1, 2):
        theirs[1].get_submodule(f"denselayer{i}").norm2 = theirs[0].denselayer1.norm2
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        model.train(training)
        theirs.train(training)
        arguments = inputs("dense")
        torch.testing.assert_close(compiled(*arguments), theirs(*arguments), rtol=1e-9, atol=1e-9)
        check_same(dict(model.named_buffers()), dict(theirs.named_buffers()))


# --- compilation, copies, what the checks cost ---


def test_compiled_with_hooks_in_one_graph() -> None:
    """The warning comes while it compiles."""
    csp.use_backend("auto")
    block, (x,) = make("dense"), inputs("dense")
    block.denselayer1.conv1.register_forward_hook(lambda m, a, y: y * 1.5)
    expected = plain(block)(x)
    counters.clear()
    with expect_warning():
        y = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_copies_of_a_layer_that_has_warned() -> None:
    block, (x,) = make("dense"), inputs("dense")
    block.denselayer1.conv1 = Doubled(8, 8, 1, bias=False).double()
    with expect_warning():
        y = block(x)
    for other in (copy.deepcopy(block), copy.copy(block)):
        with expect_warning(wanted=False):
            torch.testing.assert_close(other(x), y)


# --- packages ---


def test_accelerate_offload() -> None:
    """Weights on the meta device, brought in by a forward of each child."""
    accelerate = pytest.importorskip("accelerate")
    for name in ("dense", "stage two_way", "csp_peleenet_digits"):
        ours = make(name).eval()
        expected = tensors(ours(*(arguments := inputs(name))))
        accelerate.cpu_offload(ours, execution_device=torch.device("cpu"))
        assert any(p.is_meta for p in ours.parameters())
        with torch.no_grad():
            got = tensors(ours(*arguments))
        for y, other in zip(got, expected, strict=True):
            torch.testing.assert_close(y, other, rtol=1e-9, atol=1e-9)


def test_peft_lora() -> None:
    peft = pytest.importorskip("peft")
    ours = make("csp_peleenet_digits")
    arguments = inputs("csp_peleenet_digits")
    theirs = plain(ours)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(2)
        config = peft.LoraConfig(target_modules=r".*conv[12]", r=2, init_lora_weights=False)
        tuned = peft.get_peft_model(model, config)
        results.append(step(tuned, arguments))
    check_same(*results)
