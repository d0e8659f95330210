"""Who may ask: whoever has the key, or without one this machine's own programs."""

import hmac
import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from pop_local.server.errors import ApiError

Refusal = Callable[[Scope], ApiError | None]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PUBLIC = ("/health",)


def entry_rule(api_key: str, host: str) -> Refusal:
    """What is wrong with a request's sender, if anything; `host` is what the server listens on."""
    return _KeyHolders(api_key).refusal if api_key else _Neighbours(host).refusal


class _KeyHolders:
    def __init__(self, api_key: str) -> None:
        self._expected = f"Bearer {api_key}".encode()

    def refusal(self, scope: Scope) -> ApiError | None:
        given = dict(scope["headers"]).get(b"authorization", b"")
        if scope["path"] in _PUBLIC or hmac.compare_digest(given, self._expected):
            return None
        return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")


class _Neighbours:
    """Keeps out web pages: of other origins, and those whose name was made to lead here.

    Names can be made to lead anywhere, addresses cannot: with 0.0.0.0 all addresses may be asked.
    """

    def __init__(self, host: str) -> None:
        self._any_address = _is_address(host) and ipaddress.ip_address(host).is_unspecified
        self._names = (*LOOPBACK, host.lower())

    def refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _host_name(f"//{host}")
        if name not in self._names and not (self._any_address and _is_address(name)):
            return _refused(f"requests to the host name {host!r}", "foreign_host")
        if origin is not None and _host_name(origin) not in (*LOOPBACK, name):
            return _refused(f"requests of web pages of {origin!r}", "foreign_origin")
        return None


def _refused(what: str, code: str) -> ApiError:
    return ApiError(
        403, f"{what} are refused; start the server with --api-key to allow them", code=code
    )


def _host_name(url: str) -> str:
    """Without port and the brackets of IPv6; "" for what is no URL, such as the origin null."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
