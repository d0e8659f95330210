"""Texts of files and folders: selection, grouping and skipped files."""

from pathlib import Path

import pytest

from pop_base.errors import PopError
from pop_local.texts.document_readers import read_kinds

MAIL = b"""From: a@example.org
To: b@example.org
Subject: =?utf-8?q?L=C3=A4ufer?=
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: base64

R3LDvMOfZQo=
"""


def write(folder: Path, **contents: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name.replace("_", ".")).write_bytes(content)


def test_folder_is_read_by_kinds(tmp_path: Path):
    write(tmp_path, a_md=b"note", b_bin=b"\0", c_txt=b"first", d_txt=b"second")
    write(tmp_path / "code" / "deep", a_py=b"code", copy_py=b"note")
    write(tmp_path / "code", b_c=b"other", b_py=b"more")
    write(tmp_path / ".git", config_txt=b"hidden")
    [texts] = read_kinds([tmp_path], 100)
    assert [set(text.split("\n\n")) for text in texts] == [
        {"note"},
        {"first", "second"},
        {"other"},
        {"code", "more"},
    ]


def test_reading_of_a_kind_is_limited(tmp_path: Path):
    for i in range(50):
        write(tmp_path, **{f"{i}_txt": b"%09d" % i})
    [[text]] = read_kinds([tmp_path], 30)
    numbers = text.split("\n\n")
    assert len(numbers) == 4 and numbers != sorted(numbers)
    assert read_kinds([tmp_path], 30) == [[text]]


def test_duplicates_and_mail_headers_are_dropped(tmp_path: Path):
    write(tmp_path / "mail", a_eml=MAIL, b_eml=MAIL)
    write(tmp_path / "again", a_eml=MAIL, c_txt=b"text")
    mail, again = read_kinds([tmp_path / "mail", tmp_path / "again"], 100)
    assert len(mail) == 1 and mail[0].count("Subject: Läufer") == 1 and "\n\nGrüße" in mail[0]
    assert again == ["text"]


def test_paths_without_text_are_refused(tmp_path: Path):
    write(tmp_path / "other", a_bin=b"\0")
    write(tmp_path / "more", a_txt=b"text")
    text = tmp_path / "more" / "a.txt"
    for message, *paths in (
        ("other contains no text", tmp_path / "other"),
        ("cannot read", text, tmp_path / "nowhere"),
        ("more contains no text other than copies", text, text.parent),
    ):
        with pytest.raises(PopError, match=message):
            read_kinds(paths, 100)
