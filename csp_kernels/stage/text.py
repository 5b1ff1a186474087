"""A program as text, which is what the operator takes, and back: csrc/program.cpp reads it too.

Words, apart by white space: what a dataclass holds, field after field. "-" stands for None and for no text, a flag is 0
or 1, a tuple begins with its length and an instruction with its name.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, get_args, get_origin, get_type_hints

from csp_kernels.stage.program import Behind, Binding, Program, Segment


@lru_cache(maxsize=1024)
def encode(program: Program) -> str:
    return " ".join(_words(program, Program)).replace(" \n", "\n")


@lru_cache(maxsize=1024)
def decode(text: str) -> Program:
    """The program whose text this is; ValueError if it is none."""
    words = iter(text.split())
    try:
        program: Program = _value(_next(words), words, Program)
        rest = next(words, None)
    except (ValueError, LookupError) as error:
        raise ValueError(f"program: got {text[:60]!r}, expected the text of a program") from error
    if rest is not None:
        raise ValueError(f"program: got {rest!r} behind the last instruction, expected nothing")
    return program


@lru_cache(maxsize=64)
def _fields(kind: Any) -> list[tuple[str, Any]]:
    """Names and types; the reads of a convolution are its instruction's segments."""
    hints = get_type_hints(kind)
    return [(field.name, hints[field.name]) for field in fields(kind) if field.name != "reads"]


def _choices(hint: Any) -> dict[str, Any]:
    """By name: the types that a value may have, but None."""
    kinds = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    return {kind.__name__: kind for kind in kinds if kind is not types.NoneType}


def _words(value: Any, hint: Any) -> Iterator[str]:
    if value is None or value == "":
        yield "-"
    elif isinstance(value, tuple):
        yield str(len(value))
        for item in value:
            words = _words(item, get_args(hint)[0])
            if is_dataclass(item) and not isinstance(item, (Segment, Binding, Behind)):
                yield "\n" + next(words)
            yield from words
    elif is_dataclass(value):
        kind: Any = type(value)
        if len(_choices(hint)) > 1:
            yield kind.__name__
        for name, inner in _fields(kind):
            yield from _words(getattr(value, name), inner)
    else:
        yield repr(value) if isinstance(value, float) else value if isinstance(value, str) else str(int(value))


def _value(word: str, words: Iterator[str], hint: Any) -> Any:
    """The value that begins with this word."""
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return tuple(_value(_next(words), words, item) for _ in range(int(word)))
    if word == "-":
        return "" if hint is str else None
    choices = _choices(hint)
    if len(choices) > 1:
        kind, word = choices[word], _next(words)
    else:
        (kind,) = choices.values()
    if kind in (bool, int, float, str):
        return bool(int(word)) if kind is bool else kind(word)
    found = {}
    for i, (name, inner) in enumerate(_fields(kind)):
        found[name] = _value(word if i == 0 else _next(words), words, inner)
    if "reads" in kind.__dataclass_fields__:
        found["reads"] = ()
    return kind(**found)


def _next(words: Iterator[str]) -> str:
    word = next(words, None)
    if word is None:
        raise ValueError("it ends too early")
    return word
