"""Layers whose weights are made by a scheme: plainly, or in few bits. Knows nothing of what layers compute."""

from typing import TYPE_CHECKING, Protocol

from torch import nn

if TYPE_CHECKING:
    from nanovllm.weights.linear_base import LinearBase


class Weighted(nn.Module):
    """A layer whose weights a scheme makes, once it is known which; see `create_weights`."""

    scheme: "Scheme"

    def create_weights(self) -> None:
        """Adds the scheme's parameters, which the loader fills; they have the names and shapes of a checkpoint's."""
        raise NotImplementedError

    def finish_weights(self) -> None:
        """Brings the filled parameters to the form that the kernels take."""
        raise NotImplementedError


class Scheme(Protocol):
    """How a layer's weight is stored: a checkpoint's tensors, and what kernels make of them.

    Those by which experts can be stored have `create_experts` and `finish_experts` too, see experts/layers.py.
    """

    def create(self, layer: "LinearBase") -> None:
        """Gives the layer parameters, which have the names and shapes of a checkpoint's tensors."""

    def finish(self, layer: "LinearBase") -> None:
        """Makes the layer's `weight` of the filled parameters."""


class Plain:
    """The weight itself, in the model's dtype."""

    def create(self, layer: "LinearBase") -> None:
        layer.add_parameter("weight", layer.tp.dtype)

    def finish(self, layer: "LinearBase") -> None:
        """There is nothing to do."""
