"""Signatures of functions that pass keywords on, for help(), editors and whoever inspects them."""

import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

P = ParamSpec("P")


def takes_options_of(
    config_class: Callable[P, Any],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Decorates an `__init__(self, model, **others)`: it shows the options of `config_class` among its keywords.

    To a type checker, it takes these and nothing else.
    """

    def decorate(init: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        own = inspect.signature(init)
        self, _, others = own.parameters.values()
        shown = inspect.signature(config_class).parameters.values()
        init.__signature__ = own.replace(parameters=[self, *shown, others])
        return init

    return decorate
