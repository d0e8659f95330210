"""Who may ask: whoever has the key, or without one this machine's own programs."""

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from pop_local.server.errors import ApiError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def refusal(scope: Scope, api_key: str, host: str) -> ApiError | None:
    """What is wrong with a request's sender, if anything; `host` is what the server listens on.

    Without a key web pages are kept out: of other origins, and those whose name was made to lead
    here. Names can be made to lead anywhere, addresses cannot: with 0.0.0.0 all may be asked.
    """
    headers = Headers(scope=scope)
    if api_key:
        given = headers.get("authorization", "").encode("latin-1")
        if scope["path"] == "/health" or hmac.compare_digest(given, f"Bearer {api_key}".encode()):
            return None
        return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
    asked, origin = headers.get("host", ""), headers.get("origin")
    name = _host_name(f"//{asked}")
    address, own = _address(name), _address(host)
    is_any_address = address is not None and own is not None and own.is_unspecified
    if name not in (*LOOPBACK, host.lower()) and not is_any_address:
        return _refused(f"requests to the host name {asked!r}", "foreign_host")
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


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
