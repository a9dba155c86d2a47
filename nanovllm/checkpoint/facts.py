"""Facts of a JSON file, each checked when it is asked for. This file knows nothing of models."""

from dataclasses import dataclass
from typing import Any

LARGEST_SIZE = 2**31 - 1
LARGEST_NUMBER = 1e38  # about what float32 holds


@dataclass(frozen=True)
class JsonFacts:
    """The object of a JSON file, each method giving one checked fact or a ValueError that names it and the file."""

    path: str
    raw: dict[str, Any]

    def error(self, text: str) -> ValueError:
        """What to raise for a fact, with the file."""
        return ValueError(f"{text} ({self.path})")

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; a missing one is refused where there is no default."""
        if key not in self.raw and default is None:
            raise ValueError(f"{self.path} has no {key!r}")
        value = self.raw.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_SIZE:
            raise self.error(f"{key} must be an integer between 1 and {LARGEST_SIZE}, got {value!r}")
        return value

    def choice(self, key: str, options: tuple[Any, ...], default: Any = None) -> Any:
        """One of some values; a missing one, or null, is the default, which must be one of them as well."""
        value = self.raw.get(key)
        value = default if value is None else value
        if not any(type(value) is type(option) and value == option for option in options):
            known = " or ".join(repr(option) for option in options)
            raise self.error(f"{key}={value!r} is not supported, only {known}")
        return value

    def number(self, name: str, value: Any) -> float:
        """A positive number."""
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= LARGEST_NUMBER:
            raise self.error(f"{name} must be a number above 0 and at most {LARGEST_NUMBER}, got {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or False; False where there is no key, and for null, as before transformers 5."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, got {value!r}")
        return bool(value)
