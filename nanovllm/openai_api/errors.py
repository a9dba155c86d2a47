"""Errors in the form that OpenAI's API has."""

from collections.abc import Mapping
from typing import Any

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):
    """What a client is told in place of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def from_validation(details: Mapping[str, Any]) -> Refused:
    """What is wrong with a body, by the name of the field: one of the errors that pydantic found."""
    # Of a union's types, a place also names that which the value does not have.
    names = [part for part in details["loc"] if isinstance(part, str) and "[" not in part and part != "str"]
    field, message = ".".join(names), details["msg"].removeprefix("Value error, ")
    if details["type"] == "extra_forbidden":
        message = f"{field} is not supported"
    elif details["type"] == "json_invalid":
        field, message = "", f"the body is not valid JSON: {details.get('ctx', {}).get('error', message)}"
    elif field:
        message = f"{field}: {message}"
    elif details["type"].startswith("model_"):
        message = "the body must be an object"
    return Refused(400, message, field or None)
