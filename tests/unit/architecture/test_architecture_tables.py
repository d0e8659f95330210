"""Check the tables of docs/internals/architectures-table.md without building the models."""

from support.architecture_table import DOCUMENT, FAMILIES, arch_of, tables, written

TEXT = written(DOCUMENT.read_text(encoding="utf-8"))


def rows() -> set[str]:
    """Return the document's rows of architectures, without the families."""
    existing, others, _ = TEXT.split("\n## ")[1:]
    first = [line.partition(" | ")[2] for line in existing.splitlines() if " | " in line]
    rest = [line.removeprefix("| ") for line in others.splitlines() if " | " in line]
    return {f"| {line}\n" for line in [*first, *rest] if not line.startswith("architecture")}


def test_document_has_the_generated_tables() -> None:
    assert tables(rows()) == TEXT


def test_well_known_families_come_first() -> None:
    assert {arch_of(line) for line in rows()} > FAMILIES.keys()
    assert TEXT.index("**llama**") < TEXT.index("## Other architectures") < TEXT.index("| afmoe")
