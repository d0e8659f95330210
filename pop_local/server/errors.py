"""Errors in the shape that OpenAI's clients know."""

import json
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from converter.errors import PopError
from pop_local.engine.decode.grammar import GrammarError

HUNG_UP = 499  # what nginx logs where a client went before the answer was complete
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}


class ApiError(Exception):
    """A request that is not answered; `param` names the field that is to blame, if one is."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, _HEADERS.get(self.status))

    @property
    def event(self) -> bytes:
        """For a stream that has begun already."""
        return f"data: {json.dumps(self.body)}\n\n".encode()


def hung_up() -> ApiError:
    return ApiError(HUNG_UP, "the client hung up")


def as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, GrammarError):
        return ApiError(400, _sentence(error), code="invalid_grammar")
    if isinstance(error, PopError):
        return ApiError(500, _sentence(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail)
    return ApiError(500, f"unexpected {type(error).__name__}: {error}")


def as_request_error(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body, and where it is."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{where}: {message}" if where else message, param=where or None)


def _sentence(error: PopError) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message
