"""Derive safe file names from URLs, and explain failed connections."""

import os
import ssl

import pytest

from pop_converter.base.errors import PopError
from pop_local.fetching.http_download import file_name, reason_of


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/b/model-Q4_K_M.gguf?download=true", "model-Q4_K_M.gguf"),
        ("get/model", "model.gguf"),
        ("%2e%2e%2f%2e%2e%2fetc%2fx.gguf", "x.gguf"),
        ("a%00b%0a.gguf", "a_b_.gguf"),
        ("..", ".gguf"),
    ],
)
def test_file_names_from_urls_are_safe(path, name):
    if name == ".gguf":
        with pytest.raises(PopError, match="has no file name"):
            file_name(f"https://example.org/{path}")
        return
    assert file_name(f"https://example.org/{path}") == name
    assert os.sep not in name


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https:///x.gguf?key=s3cret", "https:///x.gguf has no host"),
        ("https://me:s3cret@example.org/?key=s3cret", "https://example.org/ has no file name"),
    ],
)
def test_urls_without_host_or_file_are_refused(url, message):
    with pytest.raises(PopError) as failure:
        file_name(url)
    assert failure.value.message == message


def test_untrusted_certificate_is_reported():
    from requests.exceptions import SSLError

    refused = ssl.SSLCertVerificationError(1, "certificate verify failed")
    refused.verify_message = "certificate has expired"
    try:
        try:
            raise refused
        except ssl.SSLError as inner:
            raise SSLError("/tiny.gguf?key=s3cret") from inner
    except SSLError as error:
        assert reason_of(error) == "certificate has expired"
