"""What benchmarks/gpu_report.py makes of speed.jsonl: tables, and the rows of csp_kernels/winners.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from csp_kernels import ops, winners

Line = Mapping[str, Any]
EAGER, COMPILED = "eager channels_last", "compile channels_last"
OURS = ("csp native", "csp triton")
KEYS = ("kind", "operator", "case", "batch", "dtype", "mode", "candidate")


class Group(NamedTuple):
    """One layer or network in a type and mode."""

    kind: str
    operator: str
    case: str
    batch: int
    dtype: str
    mode: str


Groups = dict[Group, dict[str, Line]]  # the line of each candidate that was right and was timed


def latest(lines: Sequence[Line]) -> list[Line]:
    """The last line about each candidate."""
    return list({tuple(line.get(key) for key in KEYS): line for line in lines if "kind" in line}.values())


def groups(lines: Sequence[Line]) -> Groups:
    found: Groups = {}
    for line in latest(lines):
        if line["kind"] in ("layer", "network") and line.get("agrees") and line.get("median_ms"):
            group = Group(*(line[key] for key in Group._fields))
            found.setdefault(group, {})[line["candidate"]] = line
    return found


def best(candidates: Mapping[str, Line]) -> Line | None:
    """The faster of ours."""
    ours = [candidates[name] for name in OURS if name in candidates]
    return min(ours, key=lambda line: float(line["median_ms"])) if ours else None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Of Markdown."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *escaped)]


def number(value: Any, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def share(value: Any) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def ratio(numerator: Line | None, denominator: Line | None, key: str) -> float | None:
    over, under = (None if line is None else line.get(key) for line in (numerator, denominator))
    return over / under if over and under else None


# --- tables ---


def ceilings(lines: Sequence[Line]) -> list[str]:
    found = [line for line in latest(lines) if line["kind"] == "ceiling" and line.get("median_ms")]
    rows = [
        [line["operator"], line["case"], line["dtype"], number(line["gbs"], ".0f"), number(line["tflops"], ".1f")]
        for line in found
    ]
    return table(["", "size", "type", "GB/s", "TFLOP/s"], rows) if rows else ["Not measured."]


def speed(found: Groups, dtype: str, mode: str) -> list[str]:
    """A row a layer or network: times, then how the faster of ours compares."""
    names = [*OURS, EAGER, COMPILED]
    chosen = {group: c for group, c in found.items() if (group.dtype, group.mode) == (dtype, mode)}
    names += sorted({name for candidates in chosen.values() for name in candidates} - {*names})
    rows = [_row(group, candidates, names) for group, candidates in chosen.items()]
    header = ["", *(f"{name}, ms" for name in names), "x eager", "x compile", "of copy", "of matmul", "saved", "peak"]
    return table(header, rows) if rows else []


def _row(group: Group, candidates: Mapping[str, Line], names: Sequence[str]) -> list[str]:
    ours, eager = best(candidates), candidates.get(EAGER)
    name = f"{group.operator}: {group.case}, batch {group.batch}"
    times = [number(candidates[n]["median_ms"]) if n in candidates else "" for n in names]
    faster = [number(ratio(candidates.get(n), ours, "median_ms"), ".2f") for n in (EAGER, COMPILED)]
    shares = [share(None if ours is None else ours.get(key)) for key in ("share_of_copy", "share_of_matmul")]
    memory = [number(ratio(ours, eager, key), ".2f") for key in ("saved_bytes", "peak_bytes")]
    return [name, *times, *faster, *shares, *memory]


def troubles(lines: Sequence[Line]) -> Iterator[list[str]]:
    """Candidates that were wrong or could not run, and what is said of others."""
    for line in latest(lines):
        if line.get("message") and line.get("ok") is not True:
            what = " ".join(str(line.get(key)) for key in KEYS[1:] if line.get(key) is not None)
            yield ["speed", what, str(line["message"])]


# --- winners ---


def clearly_faster(ours: Line, other: Line) -> bool:
    """Three of four calls are faster than three of four of the other."""
    return float(ours["q3_ms"]) < float(other["q1_ms"])


def rows_of(found: Groups, family: str) -> list[dict[str, Any]]:
    """Of the table of winners. A class with several cases has the least ratios of all, and only backends that were
    measured and clearly faster in each."""
    classes: dict[tuple[Any, ...], list[dict[str, float]]] = {}
    for group, candidates in found.items():
        if group.kind != "layer" or group.operator not in ops.__all__:
            continue
        for caller, reference in (("eager", EAGER), ("compiled", COMPILED)):
            other, ours = candidates.get(reference), {b: candidates.get(f"csp {b}") for b in winners.BACKENDS}
            if other is None or not any(ours.values()):
                continue
            shape = winners.shape_class(other["pixels"], other["channels"])
            kind = winners.Kind(family, group.operator, group.dtype, group.mode, caller)
            won = {
                b: round(float(other["median_ms"]) / float(line["median_ms"]), 3)
                for b, line in ours.items()
                if line is not None and clearly_faster(line, other)
            }
            classes.setdefault((*kind, *shape), []).append(won)
    return [_class(key, ratios) for key, ratios in classes.items()]


def _class(key: tuple[Any, ...], ratios: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    names = [*winners.Kind._fields, "pixels", "channels"]
    won = {b: min(r[b] for r in ratios) for b in winners.BACKENDS if all(b in r for r in ratios)}
    return {**dict(zip(names, key, strict=True)), **won}


def merged(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """New rows take the place of old ones about the same calls; a run of half of it leaves the other half."""
    names = (*winners.Kind._fields, "pixels", "channels")
    return list({tuple(row[name] for name in names): row for row in (*old, *new)}.values())
