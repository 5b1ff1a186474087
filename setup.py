"""Builds csp_kernels/_C.abi3.so: C++ operators on libtorch's stable ABI, loaded by torch.ops.load_library.

The library has no Python API and no pybind: one file serves every Python and every torch >= 2.11.
csrc/cpu/*.cpp is compiled once per instruction set; the library picks one when it loads. csrc/cuda/*.cu is compiled
where there are a GPU and nvcc; the library then still loads on machines and with torch builds without CUDA.

Environment: CXX, CXXFLAGS, LDFLAGS, MAX_JOBS; CSP_KERNELS_NATIVE=0 leaves the library out; CSP_KERNELS_ISAS="v3" names
the instruction sets to compile for (default: all that the compiler knows; a name is an error where it does not;
"native" is the best that runs on this machine). CSP_KERNELS_SANITIZE=1 builds build/sanitize/_C.so instead, with
AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.
CUDA: the compiler is NVCC, else nvcc of CUDA_HOME or on PATH (NVCC_CCBIN and NVCC_APPEND_FLAGS are its own);
CSP_KERNELS_CUDA=0 leaves CUDA out, 1 compiles it for every GPU, also where torch finds none (for wheels), and fails
without nvcc; CSP_KERNELS_CUDA_ARCHS="80,90" names compute capabilities and compiles for them, GPU or not (default: that
of the GPU here; with CSP_KERNELS_CUDA=1 those of 80, 90 and 100 that this nvcc knows).
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"csp_kernels: the build needs setuptools >= 77, got {setuptools.__version__}. "
        "Run `pip install -U setuptools`, or build with isolation (without --no-build-isolation)."
    )
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SANITIZE = os.environ.get("CSP_KERNELS_SANITIZE", "0") == "1"
OBJECTS = ROOT / "build" / ("sanitize" if SANITIZE else "native")
LIBRARY = Path("csp_kernels", "_C.abi3.so")
SANITIZED = OBJECTS / "_C.so"  # not where the package looks: CSP_KERNELS_LIBRARY names it
TORCH_TARGET = "0x020b000000000000"  # stable ABI of torch 2.11

# Order matters: the linker keeps the first copy of an inline function, so the weakest instruction set comes first.
X86_ISAS: dict[str, list[str]] = {
    "baseline": [],
    "v3": ["-march=x86-64-v3"],
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "v4bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"],
    "v4amx": ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mprefer-vector-width=512"],
}
NEEDS = {"v4amx": "v4bf16"}  # has kernels for what tiles multiply, and the other's for the rest
# What a machine must have to run one, as csrc/cpu/isa.h asks.
X86_FEATURES: dict[str, str] = {
    "v3": "avx2 fma bmi2 f16c",
    "v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
    "v4bf16": "avx512f avx512bw avx512cd avx512dq avx512vl avx512bf16",
    "v4amx": "avx512f avx512bw avx512cd avx512dq avx512vl avx512bf16",  # and tiles: TILES
}
# C++ that asks whether the processor has AMX tiles of bfloat16; not every compiler's __builtin_cpu_supports knows them.
TILES = """#include <cpuid.h>
static bool tiles() {
  unsigned eax, ebx, ecx, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1) && (edx >> 24 & 1);
}
"""
CXX_FLAGS = [
    "-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden",
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi",
]  # fmt: skip
SANITIZERS = [
    "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow",
    "-fno-sanitize-recover=all",
]
if SANITIZE:  # checks as calls: inlined into unrolled loops they take minutes to compile
    CXX_FLAGS += [*SANITIZERS, "--param=asan-instrumentation-with-call-threshold=0", "-O1", "-g1", "-DCSP_SANITIZE"]

CUDA_ARCHITECTURES = ("80", "90", "100")  # of wheels
OLDEST_CAPABILITY = 80
SLOWEST = ("stage",)  # to compile
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden"]


@dataclass(frozen=True)
class Job:
    """One translation unit: source file -> object file, by a compiler with its flags."""

    source: Path
    object: Path
    compiler: tuple[str, ...]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Cuda:
    """A CUDA compiler, what it says of itself, the architectures to build for, and where its runtime lies."""

    compiler: str
    version: str
    architectures: tuple[str, ...]
    libraries: tuple[str, ...]


def say(text: str) -> None:
    """Prints one line of the build report."""
    print(f"csp_kernels: {text}", file=sys.stderr, flush=True)


def find_compiler() -> list[str]:
    """The C++ compiler as a command: CXX, else c++, g++ or clang++ on PATH."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise SystemExit(
        "csp_kernels: no C++ compiler found (c++, g++, clang++). Install one, name one in CXX, "
        "or set CSP_KERNELS_NATIVE=0 to install without the library (reference backend only, slower)."
    )


def torch_paths() -> tuple[str, Path, Path]:
    """(version, include folder, library folder) of the torch to build against."""
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"csp_kernels: the build needs torch >= 2.11, and importing it failed ({error}). "
            "Install torch first, or build with isolation (pip install . without --no-build-isolation)."
        ) from error
    version = str(torch.__version__)
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < (2, 11):
        raise SystemExit(f"csp_kernels: the build needs torch >= 2.11, got {version}.")
    home = Path(torch.__file__).parent
    return version, home / "include", home / "lib"


def probe(compiler: Sequence[str], flags: Sequence[str]) -> str | None:
    """None if the compiler takes these flags, else the first line of its complaint."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int probe(int x) { return x + 1; }\n")
        done = run([*compiler, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))])
    if done.returncode == 0:
        return None
    return (done.stdout.strip().splitlines() or ["no message"])[0]


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command; stdout and stderr come back together as text."""
    try:
        return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    except OSError as error:
        raise SystemExit(f"csp_kernels: cannot run {command[0]!r}: {error}") from error


def instruction_sets(compiler: Sequence[str]) -> dict[str, list[str]]:
    """Name -> flags of the instruction sets to build: CSP_KERNELS_ISAS, or all that this compiler targets here."""
    usable = usable_instruction_sets(compiler)
    named = os.environ.get("CSP_KERNELS_ISAS", "").replace(",", " ").split()
    if "native" in named:
        named = [native_instruction_set(compiler, usable) if name == "native" else name for name in named]
    if missing := sorted({*named} - {*usable}):
        raise SystemExit(
            f"csp_kernels: CSP_KERNELS_ISAS: got {', '.join(missing)}, expected some of {', '.join(usable)}, "
            "which this compiler can build here, or native. Name these, or leave it empty for all."
        )
    wanted = {*(named or usable), *(NEEDS[name] for name in named if name in NEEDS)}
    return {name: flags for name, flags in usable.items() if name in wanted}


def native_instruction_set(compiler: Sequence[str], usable: Iterable[str]) -> str:
    """The best of these that runs on this machine: a small program asks."""
    x86 = [name for name in usable if name in X86_FEATURES]
    asked = {name: " && ".join(f'__builtin_cpu_supports("{f}")' for f in X86_FEATURES[name].split()) for name in x86}
    if "v4amx" in asked:
        asked["v4amx"] += " && tiles()"
    tests = "".join(f'  if ({condition}) best = "{name}";\n' for name, condition in asked.items())
    start = "  __builtin_cpu_init();\n" if x86 else ""
    body = f'  const char* best = "baseline";\n{start}{tests}  std::puts(best);\n'
    program = f"#include <cstdio>\n{TILES if 'v4amx' in asked else ''}int main() {{\n{body}}}\n"
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "native.cpp"), Path(folder, "native")
        source.write_text(program)
        done = run([*compiler, str(source), "-o", str(binary)])
        if done.returncode:
            raise SystemExit(f"csp_kernels: CSP_KERNELS_ISAS=native: cannot build a small program:\n{done.stdout}")
        return run([str(binary)]).stdout.strip()


def usable_instruction_sets(compiler: Sequence[str]) -> dict[str, list[str]]:
    """Name -> flags of the instruction sets this compiler can target on this machine."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        say(f"skips instruction sets v3, v4, v4bf16, v4amx: x86 only, this machine is {platform.machine()}")
        return {"baseline": []}
    usable = {}
    for name, flags in X86_ISAS.items():
        if name == "v4amx" and not sys.platform.startswith("linux"):
            continue  # a process has to ask the kernel for tiles
        complaint = probe(compiler, flags)
        if complaint is None:
            usable[name] = flags
        else:
            say(f"skips instruction set {name}: {compiler[0]} refuses {' '.join(flags)} ({complaint})")
    return usable


def find_cuda() -> Cuda | None:
    """The CUDA compiler; None, with the reason said, where there is none or it is not wanted."""
    wanted = os.environ.get("CSP_KERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(
            f"csp_kernels: CSP_KERNELS_CUDA: got {wanted!r}, expected 0 (without CUDA), 1 (not without) or nothing"
        )
    if wanted == "0":
        say("skips CUDA: CSP_KERNELS_CUDA=0")
        return None
    if not (wanted or os.environ.get("CSP_KERNELS_CUDA_ARCHS") or has_gpu()):
        say("skips CUDA: torch finds no GPU here; CSP_KERNELS_CUDA=1 compiles for other machines")
        return None
    home = os.environ.get("CUDA_HOME")
    name = os.environ.get("NVCC") or (f"{home}/bin/nvcc" if home else "nvcc")
    compiler = shutil.which(name)
    if compiler is None:
        if wanted == "1":
            raise SystemExit(
                f"csp_kernels: CSP_KERNELS_CUDA=1, but {name} is not found. Put it on PATH or name it in NVCC."
            )
        say(f"skips CUDA: {name} is not found (on a GPU the operators then run in triton)")
        return None
    here = () if wanted == "1" or not has_gpu() else capabilities()
    if here and int(here[0]) < OLDEST_CAPABILITY and not os.environ.get("CSP_KERNELS_CUDA_ARCHS"):
        say(f"skips CUDA: a GPU here is sm_{here[0]}, and the kernels need sm_{OLDEST_CAPABILITY} or later")
        return None
    version = run([compiler, "--version"]).stdout.strip().splitlines()[-1]
    return Cuda(compiler, version, architectures(compiler, here), cuda_libraries(compiler))


def has_gpu() -> bool:
    """Does torch find a GPU? What there is compiled for AMD's does not count."""
    import torch

    return torch.cuda.is_available() and not torch.version.hip


def capabilities() -> tuple[str, ...]:
    """Compute capabilities of the GPUs here, without their points, the oldest first."""
    import torch

    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return tuple(f"{major}{minor}" for major, minor in sorted(found))


def architectures(compiler: str, here: Sequence[str] = ()) -> tuple[str, ...]:
    """Compute capabilities to build for, without their points. here: of the GPUs to build for; none: for all GPUs."""
    known = {word.removeprefix("compute_") for word in run([compiler, "--list-gpu-arch"]).stdout.split()}
    named = re.findall(r"\w+", os.environ.get("CSP_KERNELS_CUDA_ARCHS", "").replace(".", ""))
    if here and not named:
        return tuple(sorted({nearest(capability, known, compiler) for capability in here}, key=int))
    fit = [a for a in named or CUDA_ARCHITECTURES if a in known and int(a) >= OLDEST_CAPABILITY]
    missing = sorted({*(named or CUDA_ARCHITECTURES)} - {*fit})
    if missing and (named or not fit):
        raise SystemExit(
            f"csp_kernels: CSP_KERNELS_CUDA_ARCHS: got {', '.join(missing)}; {compiler} knows "
            f"{', '.join(sorted(known, key=int))}, and the kernels need {OLDEST_CAPABILITY} or later. "
            "Name one of these, install a newer CUDA, or set CSP_KERNELS_CUDA=0."
        )
    for architecture in missing:
        say(f"skips CUDA architecture sm_{architecture}: {compiler} does not know it")
    return tuple(sorted({*fit}, key=int))


def nearest(capability: str, known: Iterable[str], compiler: str) -> str:
    """This capability, or where nvcc is older than the GPU the latest before it, whose PTX the driver then compiles."""
    older = [a for a in known if OLDEST_CAPABILITY <= int(a) <= int(capability)]
    if not older:
        raise SystemExit(
            f"csp_kernels: {compiler} knows {', '.join(sorted(known, key=int)) or 'no architectures'}; the GPU here is "
            f"sm_{capability}, and the kernels need sm_{OLDEST_CAPABILITY} or later. Install a newer CUDA, or set "
            "CSP_KERNELS_CUDA=0."
        )
    best = max(older, key=int)
    if best != capability:
        say(f"builds for sm_{best} instead of sm_{capability}, which {compiler} does not know")
    return best


def cuda_libraries(compiler: str) -> tuple[str, ...]:
    """-L flags of the toolkit, as nvcc itself would pass them to the linker."""
    said = run([compiler, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]).stdout
    lines = [line for line in said.splitlines() if line.startswith("#$ LIBRARIES=")]
    found = shlex.split(lines[0].partition("=")[2]) if lines else []
    return tuple(flag for flag in found if flag.startswith("-L"))


def cuda_flags(cuda: Cuda) -> list[str]:
    """Machine code of each architecture, and PTX of the latest for those to come."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in cuda.architectures]
    latest = cuda.architectures[-1]
    return [*NVCC_FLAGS, *codes, f"-gencode=arch=compute_{latest},code=compute_{latest}"]


def plan(compiler: Sequence[str], isas: dict[str, list[str]], torch_include: Path, cuda: Cuda | None) -> list[Job]:
    """All translation units, in link order. What the library says of itself depends on what it holds."""
    target = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-I{CSRC}", "-isystem", str(torch_include)]
    common = [*CXX_FLAGS, *target, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    # Messages of torch's headers name their file: without the folders of this machine.
    short = [f"-ffile-prefix-map={folder}/=" for folder in (ROOT, torch_include, torch_include.resolve())]
    known = [*short, *(f"-DCSP_HAVE_{name.upper()}" for name in isas)]
    if {*isas} - {"baseline"}:
        known.append("-DCSP_ISAS_X86")
    cxx, jobs, chosen = tuple(compiler), [], "+".join(isas)
    for source in sorted(CSRC.glob("*.cpp")):
        name, flags = f"{source.stem}.of.{chosen}.o", [*common, *known]
        if cuda and source.stem == "library":
            name = f"library.of.{chosen}.cuda.o"
            flags.append(f'-DCSP_CUDA_ARCHITECTURES="{",".join(cuda.architectures)}"')
        jobs.append(Job(source, OBJECTS / name, cxx, tuple(flags)))
    for name, flags in isas.items():
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            object_file = OBJECTS / f"{source.stem}.{name}.o"
            jobs.append(Job(source, object_file, cxx, (*common, *flags, f"-DCSP_ISA={name}")))
    if cuda:
        host = [part for flag in short for part in ("-Xcompiler", flag)]
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            object_file = OBJECTS / f"{source.stem}.cuda.o"
            jobs.append(Job(source, object_file, (cuda.compiler,), (*cuda_flags(cuda), *target, *host)))
    return jobs


def duration(job: Job) -> tuple[bool, int]:
    """Jobs by how long they take: CUDA longest, then what is in SLOWEST, files on tensors least."""
    if job.source.parent == CSRC:
        return False, -1
    slow = job.source.stem in SLOWEST
    return job.source.suffix == ".cu", len(SLOWEST) - SLOWEST.index(job.source.stem) if slow else 0


def stale(job: Job, command: str) -> bool:
    """True if the object is missing, older than a source or header, or was built by another command."""
    stamp, depfile = job.object.with_suffix(".cmd"), job.object.with_suffix(".d")
    if not (job.object.exists() and stamp.exists() and depfile.exists()) or stamp.read_text() != command:
        return True
    built = job.object.stat().st_mtime
    needs = shlex.split(depfile.read_text().replace("\\\n", " ").partition(": ")[2])
    return any(not Path(need).exists() or Path(need).stat().st_mtime >= built for need in needs)


def compile_one(job: Job, salt: str) -> str:
    """Compiles one unit if it is stale; returns a word for the report."""
    depfile = job.object.with_suffix(".d")
    command = [*job.compiler, *job.flags, "-MMD", "-MF", str(depfile), "-c", str(job.source), "-o", str(job.object)]
    line = shlex.join(command) + f"  # {salt}\n"
    if not stale(job, line):
        return "kept"
    stamp = job.object.with_suffix(".cmd")
    stamp.unlink(missing_ok=True)
    done = run(command)
    if done.stdout:
        print(done.stdout, file=sys.stderr)
    if done.returncode:
        raise SystemExit(f"csp_kernels: compiling {job.source.name} failed:\n{shlex.join(command)}")
    stamp.write_text(line)
    return "compiled"


def link(objects: Sequence[Path], target: Path, compiler: Sequence[str], torch_lib: Path, cuda: Cuda | None) -> None:
    """Links the objects; torch's libraries are found in the process that has imported torch, so no rpath."""
    if sys.platform == "darwin":
        extra = ["-undefined", "dynamic_lookup"]
    else:
        extra = ["-Wl,-O1", "-Wl,--as-needed", f"-L{torch_lib}", "-ltorch_cpu", "-lc10"]
    if SANITIZE:
        extra += SANITIZERS
    if cuda:
        extra += [*cuda.libraries, "-lcudart_static", "-ldl", "-lpthread", "-lrt"]
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(".so.new")  # replaced in one step: a process may have the old file mapped
    names = [str(item) for item in objects]
    command = [*compiler, "-shared", *names, "-o", str(fresh), *extra, *shlex.split(os.environ.get("LDFLAGS", ""))]
    done = run(command)
    if done.returncode:
        raise SystemExit(f"csp_kernels: linking failed:\n{shlex.join(command)}\n{done.stdout}")
    fresh.replace(target)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_library(target: Path) -> None:
    """Compiles what is stale, in parallel, and links it into target."""
    compiler, (version, include, lib) = find_compiler(), torch_paths()
    banner = run([*compiler, "--version"]).stdout.splitlines()[0]
    isas, cuda = instruction_sets(compiler), find_cuda()
    built = SANITIZED if SANITIZE else LIBRARY
    say(f"builds {built} with {banner}, torch {version}, instruction sets {', '.join(isas)}")
    if cuda:
        targets = ", ".join(f"sm_{a}" for a in cuda.architectures)
        say(f"builds CUDA kernels for {targets} with {cuda.compiler}, {cuda.version}")
    OBJECTS.mkdir(parents=True, exist_ok=True)
    jobs = plan(compiler, isas, include, cuda)
    workers = int(os.environ.get("MAX_JOBS") or cores())
    salts = {job.object: cuda.version if cuda and job.compiler == (cuda.compiler,) else banner for job in jobs}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        longest = sorted(jobs, key=duration, reverse=True)
        outcomes = list(pool.map(lambda job: compile_one(job, f"{salts[job.object]}, torch {version}"), longest))
    say(f"compiled {outcomes.count('compiled')} of {len(jobs)} objects, kept {outcomes.count('kept')}")
    link([job.object for job in jobs], target, compiler, lib, cuda)
    say(f"linked {target} ({target.stat().st_size // 1024} KiB)")


class BuildNative(build_ext):
    """build_ext that hands the one library to build_library."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library's file name does not depend on the Python version."""
        return str(Path(*fullname.split("."))) + ".abi3.so"

    def build_extension(self, ext: Extension) -> None:
        """Builds the library where setuptools expects it."""
        build_library(SANITIZED if SANITIZE else Path(self.get_ext_fullpath(ext.name)).resolve())


class WheelTag(bdist_wheel):
    """Any Python 3, this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """('py3', 'none', platform), or 'any' without the library."""
        if not self.distribution.has_ext_modules():
            return "py3", "none", "any"
        return "py3", "none", super().get_tag()[2]


def extensions() -> list[Extension]:
    """The library, unless it is switched off or this platform has no build for it."""
    if os.environ.get("CSP_KERNELS_NATIVE", "1") == "0":
        say("skips the compiled library: CSP_KERNELS_NATIVE=0 (reference backend only)")
        return []
    if sysconfig.get_platform().startswith("win"):
        say("skips the compiled library: it needs GCC or Clang on Linux or macOS (reference backend only)")
        return []
    sources, headers = (sorted(str(p.relative_to(ROOT)) for p in CSRC.rglob(kind)) for kind in ("*.c*", "*.h"))
    return [Extension("csp_kernels._C", sources=sources, depends=headers)]  # both lists: what an sdist carries


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": WheelTag})
