"""Layouts for look-up documents: records as lines, CSV, JSON, log entries, and other formats."""

from dataclasses import dataclass

from pop_local.texts.carrier_values import Use


@dataclass(frozen=True)
class Block:
    """Records with the same fields. Each record has an entity and one value for each field."""

    noun: str
    fields: tuple[str, ...]
    records: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Layout:
    """The format strings for a block.

    `records`: the formats that consecutive records use in rotation. `pair`: the format of a field
    and its value. Pairs are joined by `separator`, and records by `between`. `subject`: a phrase
    that identifies one value.
    """

    records: tuple[str, ...]
    pair: str
    separator: str
    head: str = ""
    between: str = "\n"
    tail: str = ""
    subject: str = "the {field} of the {noun} {entity}"

    def write(self, block: Block) -> str:
        """Return the block's text."""
        rows = []
        for i, (entity, values) in enumerate(block.records):
            pairs = self.separator.join(
                self.pair.format(value=value, **_names(field, entity))
                for field, value in zip(block.fields, values, strict=True)
            )
            row = self.records[i % len(self.records)]
            time = f"08:{12 + i:02d}:{(17 * i + 5) % 60:02d}"
            rows.append(row.format(noun=block.noun, entity=entity, pairs=pairs, time=time))
        head = self.head.format(
            noun=block.noun,
            keys=",".join(map(_key, block.fields)),
            fields=" | ".join(block.fields),
            rules=" | ".join(["---"] * len(block.fields)),
        )
        return head + self.between.join(rows) + self.tail

    def describe(self, noun: str, field: str, entity: str) -> str:
        """Return a phrase that identifies one of a document's values."""
        return self.subject.format(noun=noun, **_names(field, entity))


def _key(field: str) -> str:
    return field.lower().replace(" ", "_").replace("-", "_")


def _names(field: str, entity: str) -> dict[str, str]:
    key = _key(field)
    return {"field": field, "key": key, "entity": entity, "constant": f"{entity}_{key}".upper()}


_PROSE = (
    "The report on the {noun} {entity} gives {pairs}, and nobody objected.",
    "When the {noun} {entity} was visited in spring, {pairs} had just been confirmed.",
    "About the {noun} {entity} little else is known than {pairs}.",
    "Every letter to the {noun} {entity} has to quote {pairs} in the first line.",
)
_JSON = '  {{"{noun}": "{entity}", {pairs}}}'
_MARKDOWN_HEAD = "| {noun} | {fields} |\n| --- | {rules} |\n"

LAYOUTS = {
    Use.FITTING: {
        "lines": Layout(("{noun} {entity}: {pairs}",), "{field} {value}", "; "),
        "sentences": Layout(
            ("For the {noun} {entity}, {pairs}.",), "the {field} is {value}", " and "
        ),
        "csv": Layout(("{entity},{pairs}",), "{value}", ",", head="{noun},{keys}\n"),
        "json": Layout((_JSON,), '"{key}": "{value}"', ", ", "[\n", ",\n", "\n]"),
        "code": Layout(
            ("{pairs}",), '{constant} = "{value}"', "\n", subject="the value of {constant}"
        ),
    },
    Use.HELD_OUT: {
        "markdown": Layout(("| {entity} | {pairs} |",), "{value}", " | ", _MARKDOWN_HEAD),
        "log": Layout(("{time} INFO {noun} {entity} {pairs}",), "{key}={value}", " "),
        "yaml": Layout(("  {entity}:\n{pairs}",), "    {key}: {value}", "\n", head="{noun}s:\n"),
        "ini": Layout(("[{noun} {entity}]\n{pairs}",), "{key} = {value}", "\n", between="\n\n"),
        "prose": Layout(_PROSE, "{value} as its {field}", " and ", between=" "),
    },
}
