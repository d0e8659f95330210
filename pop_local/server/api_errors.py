"""Errors in the format that each API's clients expect."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from pop_base.errors import PopError
from pop_local.engine.decode.grammar import GrammarError
from pop_local.engine.limited.process import NoChildError

CLIENT_GONE = 499  # nginx's status for a client that disconnected before the answer was complete
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
# llama-server's error types by code, for paths without /v1.
_LLAMA_SERVER_KINDS = {
    "context_length_exceeded": "exceed_context_size_error",
    "invalid_api_key": "authentication_error",
}
_RETRY = {"Retry-After": "5"}
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: _RETRY, 503: _RETRY}


class ApiError(HTTPException):
    """An HTTP error response to a refused or failed request.

    `param` names the invalid field, if any. Replies in OpenAI's format also include `figures`.
    """

    figures: Mapping[str, int] = {}

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        # A message may quote a file name that is not valid Unicode.
        super().__init__(status, message.encode(errors="backslashreplace").decode())
        self.code, self.param = code, param

    @property
    def openai_body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        error = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return {"error": {**error, **self.figures}}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        usual = "invalid_request_error" if self.status_code < 500 else "api_error"
        kind = _ANTHROPIC_KINDS.get(self.status_code, usual)
        return {"type": "error", "error": {"type": kind, "message": self.detail}}

    def response(self, path: str) -> JSONResponse:
        """Return the error response in the format of the API at `path`."""
        body = self.openai_body
        if path.startswith("/api/"):
            body = {"error": self.detail}
        elif path.removeprefix("/v1").startswith("/messages"):
            body = self.anthropic_body
        elif not path.startswith("/v1/") and self.code in _LLAMA_SERVER_KINDS:
            body["error"]["type"] = _LLAMA_SERVER_KINDS[self.code]
        return JSONResponse(body, self.status_code, self.headers or _HEADERS.get(self.status_code))


def client_gone() -> ApiError:
    return ApiError(CLIENT_GONE, "the client disconnected")


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping")


@contextmanager
def bad_request(
    param: str | None = None, code: str | None = None, *, grammar_param: str | None = None
) -> Iterator[None]:
    """Convert a PopError to an ApiError with status 400 and the given `param`.

    For a GrammarError, the code is "invalid_grammar", and `grammar_param`, if set, replaces
    `param`.
    """
    try:
        yield
    except NoChildError:  # the machine caused this error, not the request
        raise
    except GrammarError as error:
        name = grammar_param or param
        raise ApiError(400, error.message, code="invalid_grammar", param=name) from error
    except PopError as error:
        raise ApiError(400, error.message, code=code, param=param) from error


def as_api_error(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case ClientDisconnect():
            return client_gone()
        case ValidationError():
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            # Pydantic inserts a union's tag before a field of the same name.
            where = ".".join(str(part) for part, _ in groupby(first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            return ApiError(400, f"{where}: {message}" if where else message, param=where or None)
        case PopError():
            message = f"{error.message}; {error.hint}" if error.hint else error.message
            if isinstance(error, GrammarError):
                return ApiError(400, message, code="invalid_grammar")
            return ApiError(500, message)
        case HTTPException():
            return ApiError(error.status_code, error.detail)
    return ApiError(500, f"unexpected {type(error).__name__}: {error}")
