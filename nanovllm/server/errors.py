"""Errors as responses."""

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nanovllm.openai_api.errors import Refused, from_validation


def respond(refused: Refused) -> JSONResponse:
    """The response that tells of an error."""
    return JSONResponse(refused.body(), refused.status, headers=refused.headers)


def from_body(error: RequestValidationError) -> Refused:
    """What is wrong with a body: the first thing that was found, whose place begins with "body"."""
    first = error.errors()[0]
    if isinstance(first.get("input"), bytes):  # it was not read, as with what curl -d says of it by itself
        return Refused(400, "the Content-Type of a body must be application/json")
    return from_validation(first | {"loc": first["loc"][1:]})


def from_http(error: HTTPException) -> Refused:
    """An error of the framework, such as an unknown path."""
    return Refused(error.status_code, str(error.detail), headers=error.headers)
