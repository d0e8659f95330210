"""Pictures that clients send: in data: URLs only, since nothing is fetched for anybody."""

import base64
import binascii
import re
from collections.abc import Sequence
from itertools import islice

from pop_converter.base.errors import PopError
from pop_local.engine.images.pictures import MAX_BYTES, MAX_PIXELS, Picture, picture_of
from pop_local.server.api_errors import ApiError

# For one request's pictures together: they are decoded before the queue.
MAX_PICTURES = 64
MAX_REQUEST_PIXELS = 2 * MAX_PIXELS
# The last one of a body that is still coming has no end. Ollama's clients send lists of base64,
# whose end would be unclear with escapes in them.
_URL = re.compile(
    rb'"data:image[^"]*"?|"data"\s*:\s*"[^"\\]*"?|"images"\s*:\s*\[(?:\s*"[^"\\]*"?\s*,?){0,%d}'
    % MAX_PICTURES,
    re.IGNORECASE,
)
_HEAD = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.IGNORECASE)
# Base64 of the largest picture, in lines of 64 letters that end with an escaped CRLF.
MAX_DATA_URL = MAX_BYTES // 3 * 4 * 17 // 16 + 100


def n_in_pictures(body: bytes | bytearray) -> int:
    """Count the bytes of a body that are pictures, as many as a request may have."""
    return sum(len(match[0]) for match in islice(_URL.finditer(body), MAX_PICTURES))


def sent_pictures(urls: Sequence[str]) -> list[Picture]:
    """Take the pictures out of data: URLs, decoded as far as their heads.

    Raises ApiError for other URLs, what is no base64, what is no picture, and too large ones.
    """
    if len(urls) > MAX_PICTURES:
        raise _refused(f"a request may have {MAX_PICTURES} pictures, this one has {len(urls)}")
    found = [_picture(url, f"picture {number}") for number, url in enumerate(urls, start=1)]
    if sum(picture.width * picture.height for picture in found) > MAX_REQUEST_PIXELS:
        raise _refused(
            f"the pictures of a request may have {MAX_REQUEST_PIXELS // 10**6} million pixels"
            " together"
        )
    return found


def _picture(url: str, name: str) -> Picture:
    head = _HEAD.match(url)
    if head is None:
        raise _refused(f"{name}: only data:image/...;base64 URLs are read, nothing is fetched")
    try:
        letters = url[head.end() :].encode().translate(None, b"\r\n\t ")
        content = base64.b64decode(letters, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused(f"{name} is no base64: {error}") from error
    try:
        return picture_of(content, name)
    except PopError as error:
        raise _refused(error.message) from error


def _refused(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_image", param="messages")
