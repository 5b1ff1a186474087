"""The scripts in examples/: they run, train, and give the losses of the networks that are not fused."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# These libraries change settings of the process that imports them: it is another one, and has no network.
SCRIPT = """
import json, runpy, socket, sys
def refuse(*_):
    raise OSError("no network")
socket.socket.connect = socket.socket.connect_ex = refuse
main = runpy.run_path(sys.argv[1])["main"]
print("csp.fuse:", *(json.dumps(main(steps, fuse)) for steps, fuse in json.loads(sys.argv[2])), sep="\\n")
"""


def falls(losses: list[float]) -> bool:
    return sum(losses[-3:]) < 0.9 * sum(losses[:3])


def results(name: str, calls: list[tuple[int, bool]], home: Path) -> tuple[str, list[Any]]:
    """What it printed, and what main returned for each (steps, fuse)."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "YOLO_CONFIG_DIR": str(home), "YOLO_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(ROOT / "examples" / name), json.dumps(calls)]
    done = subprocess.run(command, text=True, capture_output=True, check=False, cwd=home, env=env, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    printed, _, found = done.stdout.partition("csp.fuse:\n")
    return printed, [json.loads(line) for line in found.splitlines()]


def needs(library: str) -> None:
    """Without importing it here."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f'{library} is not installed: pip install "csp_kernels[examples]"')


def test_finetune_timm(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("mlxtend")
    main = runpy.run_path(str(ROOT / "examples" / "finetune_timm.py"))["main"]
    losses = main(20)
    printed = capsys.readouterr().out
    assert len(losses) == 20 and falls(losses), losses
    assert "CspNet: 32 of 32 convolutions in 1 fused modules" in printed and "step   20: loss" in printed
    assert "20 steps in" in printed and "of 256 digits that it has not seen are right" in printed
    assert main(3, fuse=False) == pytest.approx(losses[:3], rel=2e-5)
    assert "fused" not in capsys.readouterr().out


@pytest.mark.verify
def test_densenet_lightning(tmp_path: Path) -> None:
    needs("lightning")
    needs("mlxtend")
    printed, found = results("densenet_lightning.py", [(16, True), (2, False)], tmp_path)
    (losses, differs), (plain, same) = found
    assert len(losses) == 16 and falls(losses), losses
    assert losses[0] == pytest.approx(plain[0], rel=1e-5) and losses[1] == pytest.approx(plain[1], rel=1e-2)
    assert same == 0 and 0 < differs < 1e-4
    assert "DenseNet: 119 of 120 convolutions in 1 fused modules" in printed and "the checkpoint loads" in printed
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.verify
def test_yolo_backbone(tmp_path: Path) -> None:
    needs("ultralytics")
    printed, found = results("yolo_backbone.py", [(12, True), (12, False)], tmp_path)
    (losses, differs), (plain, same) = found
    assert len(losses) == 12 and falls(losses), losses
    assert losses[:5] == pytest.approx(plain[:5], rel=1e-4)  # rounding drifts apart later
    assert same == 0 and 0 < differs < 1e-4
    assert "Backbone: 27 of 27 convolutions in 1 fused modules" in printed and "features [2, 64, 20, 20]" in printed
