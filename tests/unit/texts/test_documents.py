"""Read plain text, PDF and DOCX files, and refuse unreadable files."""

import builtins
import io
import os
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pop_base.errors import PopError
from pop_local.texts import document_readers
from pop_local.texts.document_readers import EXTRA_HINT, MAX_BYTES, read_document

PDF = b"""%%PDF-1.4
1 0 obj <</Type/Catalog/Pages 2 0 R>> endobj
2 0 obj <</Type/Pages/Kids[3 0 R]/Count 1>> endobj
3 0 obj <</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]/Contents 4 0 R
/Resources<</Font<</F1 <</Type/Font/Subtype/Type1/BaseFont/Helvetica>> >> >> >> endobj
4 0 obj <</Length %d>> stream
%s
endstream endobj
xref
0 1
0000000000 65535 f\x20
trailer <</Root 1 0 R/Size 5>>
startxref
0
%%%%EOF
"""


def pdf(drawing: bytes) -> bytes:
    return PDF % (len(drawing), drawing)


def test_reads_text_encodings(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path = tmp_path / f"{encoding}.txt"
        path.write_bytes("Grüße\n".encode(encoding))
        assert read_document(path).text == "Grüße\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_accepts_undecodable_file_name(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")
    Path(path).write_text("Words.")
    assert read_document(path).name == f"{tmp_path}/\ufffd.txt"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "reading {} needs too much memory"),
        (KeyError(), "{} cannot be read as DOCX: KeyError"),
    ],
)
def test_error_without_text_gets_a_reason(tmp_path, monkeypatch, error, words):
    def fail(_file):
        raise error

    monkeypatch.setattr("docx.Document", fail)
    path = tmp_path / "a.docx"
    zipfile.ZipFile(path, "w").close()
    with pytest.raises(PopError) as refused:
        read_document(path)
    assert refused.value.message == words.format(path)


def test_reads_text_of_pdf(tmp_path):
    path = tmp_path / "paper.PDF"
    path.write_bytes(pdf(b"BT /F1 12 Tf 20 100 Td (Hello from page one) Tj ET"))
    document = read_document(path)
    assert document.text.strip() == "Hello from page one"
    assert document.name == str(path)


def test_reads_docx_table_between_paragraphs(tmp_path):
    docx = pytest.importorskip("docx")
    written = docx.Document()
    written.add_paragraph("Before.")
    table = written.add_table(rows=2, cols=2)
    for row, texts in zip(table.rows, (("name", "age"), ("Mara", "70")), strict=True):
        for cell, text in zip(row.cells, texts, strict=True):
            cell.text = text
    written.add_paragraph("After.")
    path = tmp_path / "letter.docx"
    written.save(str(path))
    assert read_document(path).text == "Before.\n\nname | age\nMara | 70\n\nAfter."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("image.png", b"\x89PNG\r\n\x1a\n\xff", "is not UTF-8 text"),
        ("data.bin", b"abc\0def", "is a binary file"),
        ("scan.pdf", pdf(b"0 0 10 10 re f"), "contains no text"),
        ("empty.txt", b" \n", "contains no text"),
        ("broken.pdf", b"%PDF-1.4 nothing of the kind", "cannot be read as PDF"),
        ("broken.docx", b"PK\x03\x04 nothing of the kind", "cannot be read as DOCX"),
    ],
)
def test_non_text_files_are_refused(tmp_path, name, content, message, capfd):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PopError, match=message) as caught:
        read_document(path)
    assert name in caught.value.message and caught.value.hint
    assert capfd.readouterr() == ("", "")


def test_huge_file_is_not_read(tmp_path):
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(PopError, match="is too large"):
        read_document(path)


def docx_with(path: Path, old: bytes, new: bytes) -> Path:
    """Return a DOCX with one table and changed XML."""
    docx = pytest.importorskip("docx")
    written = docx.Document()
    written.add_table(rows=1, cols=2).rows[0].cells[0].text = "text"
    buffer = io.BytesIO()
    written.save(buffer)
    with (
        zipfile.ZipFile(buffer) as archive,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as changed,
    ):
        for name in archive.namelist():
            xml = archive.read(name)
            is_text = name == "word/document.xml"
            changed.writestr(name, xml.replace(old, new) if is_text else xml)
    return path


def test_docx_with_huge_content_is_not_read(tmp_path):
    much = b"<w:p/>" * 6_000_000
    path = docx_with(tmp_path / "bomb.docx", b"<w:sectPr", much + b"<w:sectPr")
    assert path.stat().st_size < 100_000
    with pytest.raises(PopError, match="is too large when decompressed"):
        read_document(path)


@pytest.mark.parametrize(
    "wide", [b'<w:gridSpan w:val="999"/>', b'<w:gridSpan w:val="1000000000"/>']
)
def test_spanning_cell_is_read_once(tmp_path, wide):
    path = docx_with(tmp_path / "wide.docx", b"<w:tcPr>", b"<w:tcPr>" + wide)
    assert read_document(path).text == "text | "


def test_docx_with_entities_is_refused(tmp_path):
    dtd = b'<!DOCTYPE w:document [<!ENTITY e "entity">]><w:document '
    path = docx_with(tmp_path / "entity.docx", b"<w:document ", dtd)
    with pytest.raises(PopError, match="contains a DTD"):
        read_document(path)


def test_shared_page_content_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(document_readers, "MAX_BYTES", 1000)
    path = tmp_path / "paper.pdf"
    text = pdf(b"BT /F1 12 Tf 20 100 Td (Hello from page one) Tj ET")
    path.write_bytes(text.replace(b"[3 0 R]", b"[" + b"3 0 R " * 60 + b"]"))
    with pytest.raises(PopError, match="is too large when decompressed"):
        read_document(path)


@pytest.mark.skipif(os.name == "nt", reason="devices and pipes of POSIX")
def test_device_is_refused():
    with pytest.raises(PopError, match="neither a file nor a pipe"):
        read_document(Path("/dev/zero"))


@pytest.mark.skipif(os.name == "nt", reason="devices and pipes of POSIX")
@pytest.mark.parametrize(("n_bytes", "fits"), [(1000, True), (1001, False)])
def test_pipe_is_read_up_to_the_limit(tmp_path, monkeypatch, n_bytes, fits):
    monkeypatch.setattr(document_readers, "MAX_BYTES", 1000)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(b"x" * n_bytes,))
    writer.start()
    if fits:
        assert read_document(path).text == "x" * n_bytes
    else:
        with pytest.raises(PopError, match="is too large"):
            read_document(path)
    writer.join()


@pytest.mark.parametrize(("name", "library"), [("a.pdf", "pypdf"), ("a.docx", "docx")])
def test_missing_extra_is_named(tmp_path, monkeypatch, name, library):
    real = builtins.__import__

    def without(module: str, *rest: Any) -> object:
        if module == library:
            raise ImportError(module)
        return real(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    path = tmp_path / name
    path.write_bytes(b"x")
    with pytest.raises(PopError) as caught:
        read_document(path)
    assert caught.value.hint == EXTRA_HINT
