"""Plain data, as JSON and TOML files hold it, to and from frozen dataclasses. msgspec says what fits a field.

The declaration of a field is all there is to know of it: its type, its default, and its range where it has one, as in
``Annotated[float, Meta(gt=0, le=1)]``. A field whose type has a ``parse`` method is a text in the file.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

T = TypeVar("T")

# Ranges that many fields have.
Share = Annotated[float, Meta(ge=0, le=1)]
AboveZero = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]
ZeroOrMore = Annotated[int, Meta(ge=0)]


def from_plain(cls: type[T], data: Any, where: str = "") -> T:
    """A dataclass from what a JSON or TOML file holds; defaults fill what it leaves out.

    ``where`` comes before each key in messages. Integers count as floats, lists as tuples; NaN and infinity are
    refused.
    Raises TypeError or ValueError, naming the key, for unknown and missing keys, wrong types and values out of range.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"{where or 'the top level'} must be an object, got {type(data).__name__}")
    hints = get_type_hints(cls, include_extras=True)
    known = {f.name: f for f in _stored(cls)}
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(f"unknown key {where}{unknown[0]!r}; known are {', '.join(sorted(known))}")
    for name, f in known.items():
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}{name} is missing")
    return cls(**{name: _convert(hints[name], value, where + name) for name, value in data.items()})


def to_plain(value: Any, *, defaults: bool = True) -> Any:
    """What ``from_plain`` makes the same value of; ``defaults=False`` leaves out what has its default value."""
    if hasattr(value, "parse"):
        return str(value)
    if dataclasses.is_dataclass(value):
        items = ((f, getattr(value, f.name)) for f in _stored(value))
        return {f.name: to_plain(v, defaults=defaults) for f, v in items if defaults or v != _default(f)}
    if isinstance(value, Mapping):
        return {key: to_plain(v, defaults=defaults) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(v, defaults=defaults) for v in value]
    return value


def _stored(of: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(of) if f.metadata.get("stored", True)]


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hasattr(hint, "parse"):
        try:
            return hint.parse(_convert(str, value, where))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value, where + ".")
    if origin is tuple:
        if not isinstance(value, list | tuple) or (args[-1] is not Ellipsis and len(value) != len(args)):
            count = "" if args[-1] is Ellipsis else f" of {len(args)}"
            raise TypeError(f"{where} must be a list{count}, got {value!r}")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    if isinstance(value, float) and not math.isfinite(value):  # json and tomllib read NaN and Infinity
        raise ValueError(f"{where} must be finite, got {value}")
    if origin is Annotated:
        _convert(args[0], value, where)  # the type is what is said first
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError:
        words = _in_words(hint)
        raise ValueError(f"{where} must be {words}{';' if ', ' in words else ','} got {value!r}") from None


def _in_words(hint: Any) -> str:
    """What fits a field: "int", "one of a, b", "float above 0 and at most 1"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [
            f"{words} {limit:g}"
            for meta in args[1:]
            for words, limit in (
                ("above", meta.gt), ("at least", meta.ge), ("below", meta.lt), ("at most", meta.le),
            )
            if limit is not None
        ]  # fmt: skip
        return f"{_in_words(args[0])} {' and '.join(limits)}"
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (types.UnionType, Union):
        return " or ".join(_in_words(arg) for arg in args)
    if origin is Mapping:
        return "an object"
    return hint.__name__ if isinstance(hint, type) else str(hint)
