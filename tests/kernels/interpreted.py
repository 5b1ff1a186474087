"""Runs pytest with TRITON_INTERPRET=1, in a process forked from one that has imported torch and triton already."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from multiprocessing import forkserver, get_context

SETTINGS = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def run(arguments: Sequence[str], log: str) -> int:
    """The exit code; what pytest says goes to `log`. The process that is forked starts with the first call."""
    here = {name: os.environ.get(name) for name in SETTINGS}
    os.environ.update(SETTINGS)
    try:
        context = get_context("forkserver")
        context.set_forkserver_preload(["torch", "triton", "pytest"])
        forkserver.ensure_running()
    finally:
        for name, value in here.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    process = context.Process(target=_run, args=(list(arguments), log))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(arguments: list[str], log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import pytest

    status = pytest.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
