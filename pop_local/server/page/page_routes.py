"""The web page's files, and the endpoint that reads uploaded files.

`/page/file?name=NAME` receives a file's bytes and content type. The response contains either a
document's `text` or an image's `url` (a data URL).
"""

import re
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from anyio import CapacityLimiter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from pop_local.engine.images.pictures import MAX_BYTES as MAX_IMAGE_BYTES
from pop_local.engine.limited.process import BeyondLimitsError, RefusedError
from pop_local.server.api_errors import ApiError, stopping
from pop_local.server.client_limits import ClientLimiter
from pop_local.server.model_pool import ModelPool
from pop_local.server.page.file_reader import reader
from pop_local.texts.document_readers import MAX_BYTES as MAX_DOCUMENT_BYTES

STATIC = Path(__file__).parent / "static"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'; trusted-types dompurify"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
# Browsers only run modules served as text/javascript, which the system's MIME table may lack.
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".svg": "image/svg+xml",
}
_FILES = {path.relative_to(STATIC).as_posix(): path for path in STATIC.rglob("*.*")}
_FILES["example.md"] = STATIC.parents[2] / "data" / "document.md"
_MAX_NAME = 200
# Limits on concurrent uploads, which use disk space: in total and per client.
_MAX_UPLOADS, _MAX_CLIENT_UPLOADS = 8, 2
_MAX_WAITING_UPLOADS = 16  # per client
_HINT = "save the file as plain text first"
_IMAGE = re.compile(r"image/[\w.+-]{1,40}")


def is_public(scope: Scope) -> bool:
    """Return True if the request is for one of the page's files, which require no API key."""
    path: str = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path == "/" or path.startswith("/page/"))


def routes() -> list[Route]:
    limiter = ClientLimiter(_MAX_UPLOADS, _MAX_CLIENT_UPLOADS, _MAX_WAITING_UPLOADS)
    return [
        Route("/", _root),
        Route("/page/file", partial(_file, limiter, CapacityLimiter(1)), methods=["POST"]),
        Route("/page/{name:path}", _static),
    ]


async def _root(request: Request) -> Response:
    if "text/html" in request.headers.get("accept", ""):
        response = _static_file("index.html")
    else:
        response = PlainTextResponse("Ollama is running")  # plug-ins look for this text
    response.headers["Vary"] = "Accept"
    return response


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _FILES:
        raise ApiError(404, f"the page does not use a file named {name!r}")
    return _static_file(name)


def _static_file(name: str) -> Response:
    path = _FILES[name]
    kind = _TYPES.get(path.suffix, "text/plain")
    return FileResponse(path, media_type=kind, headers=HEADERS)


async def _file(limiter: ClientLimiter, turn: CapacityLimiter, request: Request) -> Response:
    models: ModelPool = request.app.state.models
    name = request.query_params.get("name", "")[-_MAX_NAME:] or "the file"
    image = _IMAGE.match(request.headers.get("content-type", ""))
    async with limiter.turn(request.state.client):
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            suffix = re.search(r"\.[a-z0-9]{1,8}$", name.lower())
            path = Path(folder) / f"sent{suffix[0] if suffix else ''}"
            max_bytes = MAX_IMAGE_BYTES if image else MAX_DOCUMENT_BYTES
            await _receive(request, path, max_bytes, name)
            kind = "picture" if image else "text"
            try:
                async with turn:  # a thread that waits for the reader could not be stopped
                    if models.stopping.is_set():
                        raise stopping()
                    content = await run_in_threadpool(reader.call, kind, str(path))
            except RefusedError as error:
                message = f"{error.message.replace(str(path), name)}; {error.hint or _HINT}"
                raise ApiError(400, message, code="unreadable") from error
            except BeyondLimitsError as error:
                if models.stopping.is_set():
                    raise stopping() from error
                message = f"{name} needs too much time or memory ({reader.limits}); {_HINT}"
                raise ApiError(400, message, code="unreadable") from error
    field = {"url": f"data:{image[0]};base64,{content}"} if image else {"text": content}
    return JSONResponse({"name": name, **field})


async def _receive(request: Request, path: Path, max_bytes: int, name: str) -> None:
    """Write a request's body to a file. Raises ApiError if the body exceeds `max_bytes`."""
    message = f"{name} is too large: the limit is {max_bytes:,} bytes"
    too_large = ApiError(413, message, code="request_too_large")
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_large
    n_bytes = 0
    with path.open("wb") as file:
        async for piece in request.stream():
            n_bytes += len(piece)
            if n_bytes > max_bytes:
                raise too_large
            file.write(piece)
