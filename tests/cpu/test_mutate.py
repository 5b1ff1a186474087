"""The list of planted faults fits the sources; `make mutate` plants them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cpu_mutate", HERE / "mutate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_fault_can_be_planted() -> None:
    mutate = script()
    for fault in mutate.FAULTS:
        text = fault.path(mutate.ROOT).read_text()
        assert fault.applied(text) != text, str(fault)
    with pytest.raises(SystemExit, match="is there 0 times"):
        mutate.Fault("norm.h", "no such text", "", ()).applied(text)
