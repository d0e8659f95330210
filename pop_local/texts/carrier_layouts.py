"""Layouts of look-up documents: records as lines, CSV, JSON, log entries and other formats."""

from collections.abc import Callable
from dataclasses import dataclass

from pop_local.texts.carrier_values import Use


@dataclass(frozen=True)
class Record:
    """An entity, with one value for each field of its block."""

    entity: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """Records with the same fields. `kinds` has the kind of each field's values."""

    noun: str
    fields: tuple[str, ...]
    kinds: tuple[str, ...]
    records: tuple[Record, ...]

    def pairs(self, record: Record, form: str, separator: str) -> str:
        """Format a record's fields; `form` may contain {field}, {key} and {value}."""
        return separator.join(
            form.format(field=field, key=_key(field), value=value)
            for field, value in zip(self.fields, record.values, strict=True)
        )


@dataclass(frozen=True)
class Layout:
    """A block's format. `subject(noun, field, entity)` describes one value in words."""

    name: str
    write: Callable[[Block], str]
    subject: Callable[[str, str, str], str]


def _key(field: str) -> str:
    return field.lower().replace(" ", "_").replace("-", "_")


def _constant(entity: str, field: str) -> str:
    return f"{entity}_{_key(field)}".upper()


def _of_entity(noun: str, field: str, entity: str) -> str:
    return f"the {field} of the {noun} {entity}"


def _of_constant(_noun: str, field: str, entity: str) -> str:
    return f"the value of {_constant(entity, field)}"


def _lines(block: Block) -> str:
    return "\n".join(
        f"{block.noun} {record.entity}: {block.pairs(record, '{field} {value}', '; ')}"
        for record in block.records
    )


def _sentences(block: Block) -> str:
    form = "the {field} is {value}"
    return "\n".join(
        f"For the {block.noun} {record.entity}, {block.pairs(record, form, ' and ')}."
        for record in block.records
    )


def _csv(block: Block) -> str:
    head = (block.noun, *map(_key, block.fields))
    rows = ((record.entity, *record.values) for record in block.records)
    return "\n".join(map(",".join, (head, *rows)))


def _json(block: Block) -> str:
    form = '"{key}": "{value}"'
    rows = (
        f'  {{"{block.noun}": "{record.entity}", {block.pairs(record, form, ", ")}}}'
        for record in block.records
    )
    return "[\n" + ",\n".join(rows) + "\n]"


def _code(block: Block) -> str:
    return "\n".join(
        f'{_constant(record.entity, field)} = "{value}"'
        for record in block.records
        for field, value in zip(block.fields, record.values, strict=True)
    )


def _markdown(block: Block) -> str:
    head = (block.noun, *block.fields)
    rows = ((record.entity, *record.values) for record in block.records)
    table = (head, ["---"] * len(head), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def _log(block: Block) -> str:
    return "\n".join(
        f"08:{12 + i:02d}:{(17 * i + 5) % 60:02d} INFO {block.noun} {record.entity}"
        f" {block.pairs(record, '{key}={value}', ' ')}"
        for i, record in enumerate(block.records)
    )


def _yaml(block: Block) -> str:
    form = "    {key}: {value}"
    entries = [f"  {each.entity}:\n" + block.pairs(each, form, "\n") for each in block.records]
    return "\n".join((f"{block.noun}s:", *entries))


def _ini(block: Block) -> str:
    form = "{key} = {value}"
    return "\n\n".join(
        f"[{block.noun} {each.entity}]\n" + block.pairs(each, form, "\n") for each in block.records
    )


_TOLD = (
    "The report on the {noun} {entity} gives {facts}, and nobody objected.",
    "When the {noun} {entity} was visited in spring, {facts} had just been confirmed.",
    "About the {noun} {entity} little else is known than {facts}.",
    "Every letter to the {noun} {entity} has to quote {facts} in the first line.",
)


def _prose(block: Block) -> str:
    return " ".join(
        _TOLD[i % len(_TOLD)].format(
            noun=block.noun,
            entity=record.entity,
            facts=block.pairs(record, "{value} as its {field}", " and "),
        )
        for i, record in enumerate(block.records)
    )


LAYOUTS = {
    Use.FITTING: (
        Layout("lines", _lines, _of_entity),
        Layout("sentences", _sentences, _of_entity),
        Layout("csv", _csv, _of_entity),
        Layout("json", _json, _of_entity),
        Layout("code", _code, _of_constant),
    ),
    Use.HELD_OUT: (
        Layout("markdown", _markdown, _of_entity),
        Layout("log", _log, _of_entity),
        Layout("yaml", _yaml, _of_entity),
        Layout("ini", _ini, _of_entity),
        Layout("prose", _prose, _of_entity),
    ),
}
