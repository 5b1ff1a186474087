"""python -m csp_kernels fuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from csp_kernels.__main__ import main
from csp_kernels.fuse_command import build

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def networks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


@pytest.mark.parametrize("train", [True, False])
def test_a_network_of_ones_own(train: bool, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["fuse", "networks:Lists", "--channels", "8", "--size", "16", "--batch", "2", "--bench", "--rounds", "3"]
    assert main([*given, *["--train"] * train]) == 0
    printed = capsys.readouterr().out
    assert "4 of 4 convolutions in 1 fused modules" in printed and "they differ by" in printed
    assert ("keeps" in printed) == train and "times as fast as the better eager" in printed


def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["fuse", "networks:Lists", "--channels", "8", "--size", "16", "--batch", "2", "--dtype", "bfloat16"]
    assert main([*given, "--plot", str(tmp_path / "of" / "lists.png")]) == 1
    said = capsys.readouterr()
    assert "add --bench" in said.err and not said.out  # before any work
    for train in ([], ["--train"]):
        picture = tmp_path / "of" / f"{len(train)}.png"
        assert main([*given, "--bench", "--rounds", "2", "--plot", str(picture), *train]) == 0
        assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 5000
        assert "under bfloat16 autocast, batch 2, 16 x 16" in capsys.readouterr().out


def test_wrong_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuse", "nothing"]) == 1
    assert "expected timm/NAME, torchvision/NAME, ultralytics/NAME or module:function" in capsys.readouterr().err
    assert main(["fuse", "no_such_module:x"]) == 1
    with pytest.raises(ValueError, match="returned a list, expected an nn"):
        build("builtins:list")
