"""First step of the GPU schedule: a library for this GPU, build/gpu/_C.so, which the other steps load.

All files of setup.py's plan are compiled side by side, each a line of build.jsonl. The library is linked twice: without
CUDA as soon as that is possible, which is all that the Triton kernels need, and with it when nvcc is done. What does
not compile in CUDA, or in time, costs the CUDA kernels alone. Its CPU kernels are not optimised, which takes a minute
and is of no use on a GPU; so the library in place stays as it is. With --device cpu or --dry-run that one is used, and
nothing is built where it loads.

While nvcc is busy other processes compile the Triton kernels of gpu_small.py into Triton's cache: under the sanitizer
there is no time for that.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as LateError  # TimeoutError itself since Python 3.11
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from gpu_machine import BUILT, ROOT, library
from gpu_steps import Deadline, Results, parse

SMALL = Path(__file__).resolve().parent / "gpu_small.py"
PARTS = 10  # processes that compile its cases
LOAD = 10.0  # seconds of the step that are kept for the library to load and to say what it has
WAIT = 60.0  # seconds after which that is given up


def load_setup(file: Path = ROOT / "setup.py") -> Any:
    """setup.py as a module that sets nothing up. A machine without setuptools, or with an old one, gets along with what
    stands in for it: the library itself does not need it."""
    try:
        import setuptools

        old = int(setuptools.__version__.split(".")[0]) < 77
    except ImportError:
        old = True
    stand_ins = substitutes() if old else {}
    with patch.dict(sys.modules, stand_ins), patch("setuptools.setup", lambda **_: None):
        spec = importlib.util.spec_from_file_location("csp_kernels_setup", file)
        assert spec is not None and spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # its dataclasses look for themselves there
        spec.loader.exec_module(module)
    module.OBJECTS = BUILT.parent
    return module


def substitutes() -> dict[str, ModuleType]:
    """What setup.py imports of setuptools, doing nothing."""
    names = ("setuptools", "setuptools.command", "setuptools.command.build_ext", "setuptools.command.bdist_wheel")
    modules = {name: ModuleType(name) for name in names}
    modules["setuptools"].__dict__.update(
        __version__="77", setup=None, Extension=lambda *_, **__: None, command=modules["setuptools.command"]
    )
    for name in ("build_ext", "bdist_wheel"):
        setattr(modules[f"setuptools.command.{name}"], name, type(name, (), {}))
    return modules


class Build:
    """One build of the library into `target`, which goes first: what is there in the end is of these sources. cuda:
    with CUDA where setup.py finds it of use. linked: called when there is a library."""

    def __init__(
        self,
        setup: Any,
        target: Path,
        cuda: bool,
        results: Results,
        deadline: Deadline,
        linked: Callable[[], None] = lambda: None,
    ) -> None:
        self.linked = linked
        self.setup, self.target, self.results, self.deadline = setup, target, results, deadline
        self.running: set[subprocess.Popen[str]] = set()
        self.lock, self.stopped = threading.Lock(), False
        target.unlink(missing_ok=True)
        setup.run = self.run_command
        self.compiler, (self.version, include, self.libraries) = setup.find_compiler(), setup.torch_paths()
        isas = setup.instruction_sets(self.compiler)
        self.fine, self.cuda = True, self.attempt("CUDA compiler", setup.find_cuda) if cuda else None
        self.plain = setup.plan(self.compiler, isas, include, None)
        self.full = setup.plan(self.compiler, isas, include, self.cuda) if self.cuda else []
        self.banner = self.run_command([*self.compiler, "--version"]).stdout.splitlines()[0]

    def run_command(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """As setup.py's run, of processes that `stop` can end."""
        with self.lock:
            if self.stopped:
                raise SystemExit("there was no time left")
            process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            self.running.add(process)
        said, _ = process.communicate()
        with self.lock:
            self.running.discard(process)
        return subprocess.CompletedProcess(command, process.returncode, said)

    def stop(self) -> None:
        """Ends all compilers."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.kill()

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        """The work's result; None if it fails. A line says how it went."""
        start = time.monotonic()
        try:
            result, message = work(), ""
        except (SystemExit, OSError, subprocess.SubprocessError) as error:
            if self.stopped:  # not its fault
                return None
            result, message, self.fine = None, str(error), False
        line = {"what": what, "seconds": round(time.monotonic() - start, 2), "ok": not message}
        self.results.write({**line, "message": message or (result if isinstance(result, str) else "")})
        if message:
            print(f"{what}: {message}", file=sys.stderr, flush=True)
        return result

    def compile(self, job: Any) -> str | None:
        """A word about a job that was done, None of one that failed."""
        salt = self.cuda.version if self.cuda and job.compiler == (self.cuda.compiler,) else self.banner
        done: str | None = self.attempt(
            f"compile {job.source.name}{' with CUDA' if '.cuda.' in job.object.name else ''}",
            lambda: self.setup.compile_one(job, f"{salt}, torch {self.version}"),
        )
        return done

    def link(self, jobs: Sequence[Any], cuda: Any) -> bool:
        """Puts the library in place."""
        objects = [job.object for job in jobs]

        def work() -> str:
            self.setup.link(objects, self.target, self.compiler, self.libraries, cuda)
            return f"CUDA: {', '.join(f'sm_{a}' for a in cuda.architectures)}" if cuda else "without CUDA"

        if self.attempt("link", work) is None:
            return False
        self.linked()
        return True

    def everything(self) -> bool:
        """Compiles and links. True if all went well; what is not done in time is a line {"left": [...]}."""
        self.setup.OBJECTS.mkdir(parents=True, exist_ok=True)
        jobs = {job.object: job for job in (*self.full, *self.plain)}
        missing = {name: {job.object for job in group} for name, group in (("plain", self.plain), ("full", self.full))}
        linked = ""
        workers = int(os.environ.get("MAX_JOBS") or self.setup.cores())
        with ThreadPoolExecutor(max(1, workers)) as pool:
            order = sorted(jobs.values(), key=self.setup.duration, reverse=True)
            futures = {pool.submit(self.compile, job): job.object for job in order}
            try:
                for future in as_completed(futures, max(0.0, self.deadline.left())):
                    if future.result() is not None:
                        for objects in missing.values():
                            objects.discard(futures[future])
                    if self.full and not missing["full"]:
                        linked = "full" if self.link(self.full, self.cuda) else "failed"
                        self.full = []  # once
                    elif not linked and not missing["plain"]:
                        linked = "plain" if self.link(self.plain, None) else "failed"
            except LateError:
                self.stop()
        left = sorted({path.name for group in missing.values() for path in group}) if self.stopped else []
        self.results.write({"left": left})
        return self.fine and not left and linked in ("plain", "full")


class Ahead:
    """Processes that fill Triton's cache for the GPUs that are here."""

    def __init__(self, setup: Any) -> None:
        found = setup.capabilities()
        self.target = f"sm_{found[0]}" if found else ""
        self.parts: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Once, as soon as there is a library to load."""
        if self.parts or not self.target:
            return
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CSP_KERNELS_LIBRARY": str(BUILT), "OMP_NUM_THREADS": "1"}
        for i in range(PARTS):
            line = [sys.executable, str(SMALL), "--dry-run", "--target", self.target, "--part", f"{i}/{PARTS}"]
            self.parts.append(subprocess.Popen(line, env=environment))

    def finish(self, results: Results, deadline: Deadline) -> None:
        """Waits for them nearly until the step's end, and writes how many are done: others cost the sanitizer time."""
        start, done = time.monotonic(), 0
        for process in self.parts:
            try:
                done += process.wait(max(0.0, deadline.left() - LOAD)) == 0
            except subprocess.TimeoutExpired:
                process.kill()
        line = {"what": "compile Triton kernels ahead", "seconds": round(time.monotonic() - start, 2)}
        results.write({**line, "ok": done == len(self.parts), "message": f"{done} of {len(self.parts)} processes"})


def said_by_the_package(file: Path | None, wait: float = WAIT) -> tuple[bool, str]:
    """Whether the library (None: the one in place) loads, and what the package says is available, in a process of its
    own."""
    code = "import sys, csp_kernels as csp; print(csp.backends()); sys.exit(not csp.backends()['native'].available)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"CSP_KERNELS_LIBRARY": str(file)} if file else {})}
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=wait, env=environment
        )
    except subprocess.TimeoutExpired:
        return False, f"nothing in {wait:.0f} s"
    return done.returncode == 0, (done.stdout + done.stderr).strip()


def main(argv: Sequence[str] | None = None) -> int:
    """1 if something does not compile, or the library does not load."""
    args = parse(__doc__, argv)
    deadline, on_gpu = Deadline(args.limit), args.device == "cuda" and not args.dry_run
    os.environ["CSP_KERNELS_ISAS"] = "baseline"
    os.environ["CXXFLAGS"] = f"{os.environ.get('CXXFLAGS', '')} -O0"
    start, fine = time.monotonic(), True
    with Results(args.out, "build") as results:
        loads, said = (False, "") if on_gpu else said_by_the_package(None)
        if not loads:
            try:
                setup = load_setup()
                ahead = Ahead(setup) if on_gpu else None
                linked = ahead.start if ahead else lambda: None
                fine = Build(setup, BUILT, on_gpu, results, deadline, linked).everything()
                if ahead:
                    ahead.finish(results, deadline)
            except SystemExit as error:  # no compiler, or no torch to build against
                results.write({"what": "set up", "seconds": 0.0, "ok": False, "message": str(error)})
                print(error, file=sys.stderr)
                fine = False
            start = time.monotonic()
            loads, said = said_by_the_package(library(on_gpu), max(LOAD / 2, deadline.left() + 3))
        line = {"what": "load", "seconds": round(time.monotonic() - start, 2), "ok": loads, "message": said}
        results.write(line)
        print(said)
    return 0 if fine and loads else 1


if __name__ == "__main__":
    sys.exit(main())
