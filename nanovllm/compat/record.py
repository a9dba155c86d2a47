"""Dicts, as nano-vllm's scripts read results, whose keys are attributes, as vLLM's read them."""

from typing import Any


class Record(dict[str, Any]):
    """A dict whose keys are attributes too; it prints, compares, pickles and goes through `json.dumps` as dicts do."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}, only {', '.join(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.items())})"
