"""What a request gives back."""

from typing import Any

Result = dict[str, Any]


class RequestError(RuntimeError):
    """A request could not be completed, while the engine and all other requests could go on.

    Attributes:
        results: of the call's requests in their order, finished or failed (`finish_reason` is "error" then).
    """

    def __init__(self, message: str, results: list[Result]) -> None:
        super().__init__(message)
        self.results = results
