"""Whether a converted file still holds the model that it was made of."""

from dataclasses import dataclass

from converter.content import copy_data, read_content
from converter.format import PREFIX, PopMeta
from converter.progress import counting
from converter.rewrite import original
from converter.source import Source
from pop_local.models.names import load_catalog
from pop_local.workflows.events import Unit, Watch


@dataclass(frozen=True)
class Verification:
    """The hash of the file as it was before its conversion.

    `unchanged`: whether it is what the conversion read, None when the file does not say.
    `catalog_name`: the model of the catalog that it is.
    """

    sha256: str
    unchanged: bool | None
    catalog_name: str | None


def verify(source: Source, meta: PopMeta | None, watch: Watch = Watch()) -> Verification:
    """Hash the model without its POP keys. Raises FormatError, StoppedError."""
    content = original(source, meta) if meta else read_content(source, without=PREFIX)
    ran = counting(content.size_bytes, watch.stage("Reading all of it", Unit.BYTES))
    sha256 = copy_data(content, content.header, lambda chunk: None, ran)
    return Verification(
        sha256=sha256,
        unchanged=sha256 == meta.source_sha256 if meta and meta.source_sha256 else None,
        catalog_name=next((known.name for known in load_catalog() if known.sha256 == sha256), None),
    )
