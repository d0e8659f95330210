"""Images in requests. Only `data:` URLs are accepted, because the server never fetches URLs."""

import base64
import binascii
import re
from collections.abc import Sequence
from itertools import islice

from pop_local.engine.images.pictures import MAX_BYTES, MAX_PIXELS, Picture, picture_of
from pop_local.server.api_errors import ApiError, bad_request

# Limits on all images in a request, which are decoded before the request is queued.
MAX_IMAGES = 64
MAX_REQUEST_PIXELS = 2 * MAX_PIXELS
# In a partially received body, the last image may be incomplete. Ollama's clients send images as
# lists of base64. The pattern allows no escapes, as an escaped quote would hide an image's end.
_URL = re.compile(
    rb'"data:image[^"]*"?|"data"\s*:\s*"[^"\\]*"?|"images"\s*:\s*\[(?:\s*"[^"\\]*"?\s*,?){0,%d}'
    % MAX_IMAGES,
    re.IGNORECASE,
)
_HEAD = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.IGNORECASE)
# The largest image as base64, in lines of 64 characters that end with an escaped CRLF.
MAX_DATA_URL = MAX_BYTES // 3 * 4 * 17 // 16 + 100


def n_image_bytes(body: bytes | bytearray) -> int:
    """Return the total size in bytes of a body's first MAX_IMAGES images."""
    return sum(len(match[0]) for match in islice(_URL.finditer(body), MAX_IMAGES))


def parse_images(urls: Sequence[str]) -> list[Picture]:
    """Decode the images in `data:` URLs and check each image's header.

    Raises ApiError for other URLs, invalid base64, unknown formats, and images over the limits.
    """
    if len(urls) > MAX_IMAGES:
        raise _refused(f"the request contains {len(urls)} images; the limit is {MAX_IMAGES}")
    pictures = [_image(url, f"image {number}") for number, url in enumerate(urls, start=1)]
    if sum(image.width * image.height for image in pictures) > MAX_REQUEST_PIXELS:
        limit = MAX_REQUEST_PIXELS // 10**6
        raise _refused(f"the images in a request are limited to a total of {limit} million pixels")
    return pictures


def _image(url: str, name: str) -> Picture:
    head = _HEAD.match(url)
    if head is None:
        raise _refused(f"{name} is not embedded: send it as a data:image/...;base64 URL")
    try:
        letters = url[head.end() :].encode().translate(None, b"\r\n\t ")
        content = base64.b64decode(letters, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused(f"{name} is not valid base64: {error}") from error
    with bad_request("messages", "invalid_image"):
        return picture_of(content, name)


def _refused(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_image", param="messages")
