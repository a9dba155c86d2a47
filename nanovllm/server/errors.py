"""Errors in the form that OpenAI's API has. What a client is told names no path of this machine."""

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

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

    def response(self) -> JSONResponse:
        """The response of it."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def from_validation(error: RequestValidationError) -> Refused:
    """What is wrong with a body: the first thing that pydantic found, by the name of the field."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, str) and "[" not in part)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"{field} is not supported"
    elif first["type"] == "json_invalid":
        field, message = "", f"the body is not valid JSON: {first.get('ctx', {}).get('error', message)}"
    elif field:
        message = f"{field}: {message}"
    return Refused(400, message, field or None)


def from_http(error: HTTPException) -> Refused:
    """An error of the framework, such as an unknown path."""
    return Refused(error.status_code, str(error.detail), headers=error.headers)
