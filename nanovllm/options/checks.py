"""Checks of options, and what all kinds of parameters share. Knows of no option by its name."""

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
Limits = Mapping[str, tuple[float, ...]]  # lowest and highest of an option


def check(name: str, value: object, kind: type, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises unless `value` is what `kind` asks, a bool, an int or (float) a finite number, within [low, high]."""
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")
    if not (low <= value <= high and abs(value) < math.inf):
        finite = "" if kind is int else "finite and "
        limit = f"between {low} and {high}" if high < math.inf else f"{finite}at least {low}"
        raise ValueError(f"{name} must be {limit}, got {value}")


@functools.cache
def field_kinds(options_class: type) -> dict[str, tuple[Any, ...]]:
    """The alternatives in the type of each field that a dataclass is made of, such as (int, NoneType)."""
    hints, kinds = get_type_hints(options_class), {}
    for name in [field.name for field in fields(options_class) if field.init]:
        is_union = get_origin(hints[name]) in (Union, UnionType)
        kinds[name] = get_args(hints[name]) if is_union else (hints[name],)
    return kinds


def check_fields(options: object, limits: Limits) -> None:
    """Raises unless the numbers of a dataclass have their fields' types and are within `limits`, and words are known.

    The first alternative of a field's type counts, and None if it is another.
    """
    for name, (kind, *others) in field_kinds(type(options)).items():
        value = getattr(options, name)
        if value is None and NoneType in others:
            continue
        if kind in (bool, int, float):
            check(name, value, kind, *limits.get(name, ()))
        elif get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")


def check_text(name: str, value: object) -> None:
    """Raises unless `value`, an entry of option `name`, is a string that is not empty, and that UTF-8 can spell."""
    if not isinstance(value, str) or not value:
        raise (ValueError if value == "" else TypeError)(f"{name} must hold non-empty strings, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # which no tokenizer takes, though JSON may bring it
        raise ValueError(f"{name} must hold no lone surrogates, got {value!r}") from error


def check_token_id(name: str, value: object) -> None:
    """Raises unless `value`, an entry of option `name`, is an int of at least 0."""
    check(name, value, int, 0)


def checked_tuple(name: str, value: object, check_entry: Callable[[str, object], None]) -> tuple[Any, ...]:
    """The entries of a list or tuple, each of them checked."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list, got {value!r}")
    for entry in value:
        check_entry(name, entry)
    return tuple(value)


Self = TypeVar("Self", bound="Options")  # typing's own needs Python 3.11


class Options:
    """What all kinds of parameters can do: they are checked when made, copied, and print what is not as it comes."""

    __slots__ = ()

    def __post_init__(self) -> None:
        self.check()

    def __repr__(self) -> str:
        values = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        shown = [f"{name}={value!r}" for name, value, default in values if value != default and value != ()]
        return f"{type(self).__name__}({', '.join(shown)})"

    def check(self) -> None:
        """Checks all options and brings them to one form; to be called again when some have been assigned to."""
        raise NotImplementedError

    def clone(self: Self) -> Self:
        """A copy that shares nothing that can change; checked options have tuples only of what cannot."""
        clone = copy.copy(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (type(None), int, float, str, tuple, Enum)):
                setattr(clone, field.name, copy.deepcopy(value))
        return clone
