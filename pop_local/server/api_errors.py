"""Errors in the shape that clients know."""

from itertools import groupby
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from pop_converter.base.errors import PopError
from pop_local.engine.decode.grammar import GrammarError

HUNG_UP = 499  # what nginx logs where a client went before the answer was complete
_KINDS = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}


class ApiError(HTTPException):
    """A request that is not answered; `param` names the field to blame, if any."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(status, message)
        self.code, self.param = code, param

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        error = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def ollama_body(self) -> dict[str, Any]:
        return {"error": self.detail}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status_code, self.body["error"]["type"])
        kind = "api_error" if kind == "server_error" else kind
        return {"type": "error", "error": {"type": kind, "message": self.detail}}

    def response(self, path: str) -> JSONResponse:
        body = self.ollama_body if path.startswith("/api/") else self.body
        body = self.anthropic_body if path.startswith("/v1/messages") else body
        return JSONResponse(body, self.status_code, _HEADERS.get(self.status_code))


def hung_up() -> ApiError:
    return ApiError(HUNG_UP, "the client hung up")


def as_api_error(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case ClientDisconnect():
            return hung_up()
        case ValidationError():
            return _of_body(error)
        case GrammarError():
            return ApiError(400, _sentence(error), code="invalid_grammar")
        case PopError():
            return ApiError(500, _sentence(error))
        case HTTPException():
            return ApiError(error.status_code, error.detail)
    return ApiError(500, f"unexpected {type(error).__name__}: {error}")


def _of_body(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # A part's kind comes before the field of the same name.
    where = ".".join(str(part) for part, _ in groupby(first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{where}: {message}" if where else message, param=where or None)


def _sentence(error: PopError) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message
