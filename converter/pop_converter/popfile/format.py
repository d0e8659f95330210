"""Read and write the `pop.*` keys in GGUF files.

Stock llama.cpp ignores these keys, so it can open POP files that have no added tensors.
"""

import hashlib
import re
import struct
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from typing import Any, TypeVar

from gguf import GGUFValueType

from pop_base.errors import FormatError
from pop_converter.gguf.header import Header
from pop_converter.gguf.source import SIDECAR_ARCH, Source
from pop_converter.projection import Projection

PREFIX = "pop."
VERSION = 1
MAX_TOKENS = 2**31 - 1
_MAX_TEXT = 1 << 16
_MAX_FILE_NAME = 255
CONVERT_AGAIN = "update pop-local, or convert the model again"
# Value of a missing limit in a budget.
NO_LIMIT = 1e9


class DeepRows(str, Enum):
    """Rules for selecting context words whose spelling matters.

    All layers process the selected words. `SPELLING` selects words that contain a digit, an
    internal capital, or a symbol between letters. `NAMES` also selects words that are capitalized
    in the middle of a sentence.
    """

    NONE = "none"
    SPELLING = "spelling"
    NAMES = "names"

    def __str__(self) -> str:
        return self.value

    @property
    def fewer(self) -> tuple["DeepRows", ...]:
        """The rules that select fewer rows than this one, largest selection first."""
        rules = list(DeepRows)
        return tuple(reversed(rules[: rules.index(self)]))


@dataclass(frozen=True)
class Calibration:
    """The text used for a fit.

    `sha256` is the hash of the text, or of the tokens if the model generated some of the text.
    `weighting` specifies the token weights ("attention": the attention that a token receives).
    `n_distilled` is the number of tokens used for end-to-end training, or 0 if there was none.
    """

    name: str
    sha256: str
    n_tokens: int
    ridge: float
    weighting: str = "attention"
    n_distilled: int = 0


@dataclass(frozen=True)
class Measured:
    """Quality of pruned prefill compared with full prefill on held-out text. KL is in nats.

    `lookups_n` is the number of look-ups, or 0 if look-ups were not measured. `lookups_full` and
    `lookups_pruned` count the correct answers after full and pruned prefill. `lookups_lost` counts
    answers that are correct only after full prefill. `lookups_gained` counts answers that are
    correct only after pruned prefill. `lookups_logprob_lost` is the decrease in the log-probability
    of the correct string, in nats per string.
    """

    kl_mean: float = 0.0
    kl_se: float = 0.0
    kl_p99: float = 0.0
    kl_first: float = 0.0
    ppl_full: float = 0.0
    ppl_ratio: float = 0.0
    top1_agreement: float = 0.0
    copy_ppl_ratio: float = 0.0
    copy_top1: float = 0.0
    induction_delta_nll: float = 0.0
    ppl_ratio_se: float = 0.0
    lookups_n: int = 0
    lookups_full: int = 0
    lookups_pruned: int = 0
    lookups_lost: int = 0
    lookups_gained: int = 0
    lookups_logprob_lost: float = 0.0
    lookups_logprob_se: float = 0.0


@dataclass(frozen=True)
class Budget:
    """The search's quality limits. `quality` is the name of this set of limits.

    The limits apply to kl_mean, ppl_ratio, and copy_ppl_ratio in Measured, and to the share of
    lost look-ups. `tried` lists the result for each boundary.
    """

    quality: str
    max_kl: float
    max_copy_ratio: float
    tried: str = ""
    max_ppl_ratio: float = NO_LIMIT
    max_lost_lookups: float = NO_LIMIT


@dataclass(frozen=True)
class Binding:
    """The size and the headers' sha256, which identify a sidecar's base model."""

    base_bytes: int
    header_sha256: str


@dataclass(frozen=True)
class PopMeta:
    """POP keys in a converted file or sidecar, with defaults for missing keys.

    `schedule` has one letter per layer: F if the layer is full, S if context tokens skip it. A
    prompt's first `sink_tokens` and last `tail_tokens` tokens run through all layers. Prompts
    shorter than `min_prompt` are not pruned. `deep_rows` is the criterion that selects the context
    words that run through all layers. `source_sha256` is the hash of the original model. The parts
    of a split model are hashed as one file.
    """

    schedule: str
    projection: Projection = Projection.OWN
    sink_tokens: int = 1
    tail_tokens: int = 16
    min_prompt: int = 0
    deep_rows: DeepRows = DeepRows.NONE
    source_name: str = ""
    source_sha256: str = ""
    tool: str = ""
    version: int = VERSION
    calibration: Calibration | None = None
    measured: Measured | None = None
    budget: Budget | None = None

    @property
    def n_layer(self) -> int:
        return len(self.schedule)

    @property
    def boundary(self) -> int:
        """The first layer that context tokens skip."""
        return self.schedule.index("S")

    @property
    def is_fitted(self) -> bool:
        """True if the conversion added tensors."""
        return self.projection != Projection.OWN


# Key, field of PopMeta and type, in the order of the file.
_KEYS: tuple[tuple[str, str, type[Any]], ...] = (
    ("pop.version", "version", int),
    ("pop.schedule", "schedule", str),
    ("pop.projection", "projection", Projection),
    ("pop.sink_tokens", "sink_tokens", int),
    ("pop.tail_tokens", "tail_tokens", int),
    ("pop.min_prompt", "min_prompt", int),
    ("pop.source.name", "source_name", str),
    ("pop.source.sha256", "source_sha256", str),
    ("pop.tool", "tool", str),
    ("pop.deep_rows", "deep_rows", DeepRows),
)
# Older files may also have `pop.source.size_bytes`, `pop.select`, `pop.refilled.*` and
# `pop.image_rows`. If `pop.image_rows` is set, the backend still applies the fit to image rows.
# Groups of keys by field of PopMeta: `budget` holds the keys `pop.budget.*`.
_GROUPS: dict[str, type[Any]] = {"calibration": Calibration, "measured": Measured, "budget": Budget}
# Prefix of a sidecar's keys for its Binding.
_BINDING = "pop.sidecar."
# Keys with this suffix hold 64-bit integers.
_SIZE = "_bytes"


def pop_meta(header: Header) -> PopMeta | None:
    """Return a header's POP keys, or None if the header has no POP keys.

    Raises FormatError if the keys are invalid or inconsistent with the model.
    """
    if not any(name.startswith(PREFIX) for name in header.keys):
        return None
    if (version := header.get("pop.version")) != VERSION:
        raise FormatError(
            f"{header.path} uses POP version {version}, but only version {VERSION} is supported",
            CONVERT_AGAIN,
        )
    values: dict[str, Any] = {}
    for name, field, kind in _KEYS:
        value = header.get(name)
        if value is None:
            continue
        stored = str if issubclass(kind, Enum) else kind
        if type(value) is not stored:
            raise FormatError(f"{header.path}: {name} is not of type {stored.__name__}")
        if issubclass(kind, Enum) and value not in [member.value for member in kind]:
            raise FormatError(
                f"{header.path}: {name} has an unknown value: {value!r}", CONVERT_AGAIN
            )
        values[field] = kind(_in_range(header, name, value))
    for name, group in _GROUPS.items():
        values[name] = _read_group(header, f"{PREFIX}{name}.", group)
    if "schedule" not in values:
        raise FormatError(f"{header.path} has pruning keys but no pop.schedule", CONVERT_AGAIN)
    meta = PopMeta(**values)
    _check_schedule(meta, header)
    return meta


def bind(base: Source) -> Binding:
    """Return a base model's identity. Raises FormatError."""
    digest = hashlib.sha256()
    for part in base.parts:
        try:
            with part.path.open("rb") as file:
                digest.update(file.read(part.tensors_end))
        except OSError as error:
            raise FormatError(f"cannot read {part.path}: {error.strerror}") from error
    return Binding(base.size_bytes, digest.hexdigest())


def read_binding(header: Header) -> Binding:
    """Return the base model's identity, as recorded in a sidecar. Raises FormatError."""
    binding = _read_group(header, _BINDING, Binding)
    if binding is None:
        raise FormatError(f"{header.path} does not identify its base model", CONVERT_AGAIN)
    return binding


Group = TypeVar("Group", Calibration, Measured, Budget, Binding)


def _read_group(header: Header, prefix: str, group: type[Group]) -> Group | None:
    """Return the keys that start with `prefix`, or None if there are none. Raises FormatError."""
    values: dict[str, Any] = {
        field.name: header.get(prefix + field.name) for field in fields(group)
    }
    if all(value is None for value in values.values()):
        return None
    for field in fields(group):
        if values[field.name] is None and field.default is not MISSING:
            del values[field.name]
            continue
        if type(values[field.name]) is not field.type:
            raise FormatError(
                f"{header.path}: {prefix}{field.name} is missing or is not of type "
                f"{field.type.__name__}",  # type: ignore[union-attr]
                CONVERT_AGAIN,
            )
        _in_range(header, prefix + field.name, values[field.name])
    return group(**values)


def _in_range(header: Header, name: str, value: Any) -> Any:
    most = _MAX_FILE_NAME if name == "pop.source.name" else _MAX_TEXT
    if isinstance(value, str) and len(value.encode(errors="replace")) > most:
        raise FormatError(f"{header.path}: {name} is longer than {most:,} bytes", CONVERT_AGAIN)
    largest = 2**63 - 1 if name.endswith(_SIZE) else MAX_TOKENS
    if isinstance(value, int) and not 0 <= value <= largest:
        raise FormatError(f"{header.path}: {name} has an invalid value: {value:,}", CONVERT_AGAIN)
    return value


def _check_schedule(meta: PopMeta, header: Header) -> None:
    if not re.fullmatch("F+S+", meta.schedule):
        raise FormatError(
            f"schedule {meta.schedule!r} must be one or more F's followed by one or more S's",
            CONVERT_AGAIN,
        )
    n_layer, n_nextn = header.of_arch("block_count"), header.of_arch("nextn_predict_layers") or 0
    # The schedule omits MTP layers.
    if isinstance(n_layer, int) and isinstance(n_nextn, int) and n_layer - n_nextn != meta.n_layer:
        raise FormatError(
            f"{header.path} has {n_layer - n_nextn} layers, but its schedule has {meta.n_layer}"
            " letters",
            CONVERT_AGAIN,
        )


def encode_keys(meta: PopMeta) -> tuple[bytes, ...]:
    """Encode a converted file's keys, each as a bytes object."""
    keys = [
        _encode_key(name, value)
        for name, field, _ in _KEYS
        if (value := getattr(meta, field)) is not DeepRows.NONE
    ]
    for name in _GROUPS:
        if (group := getattr(meta, name)) is not None:
            keys += _encode_group(f"{PREFIX}{name}.", group)
    return tuple(keys)


def encode_sidecar_keys(meta: PopMeta, binding: Binding) -> tuple[bytes, ...]:
    """Encode each of a sidecar's keys as a bytes object."""
    return (
        _encode_key("general.architecture", SIDECAR_ARCH),
        *encode_keys(meta),
        *_encode_group(_BINDING, binding),
    )


def _encode_group(prefix: str, group: Group) -> list[bytes]:
    # Missing limits are not written.
    return [
        _encode_key(prefix + field.name, value)
        for field in fields(group)
        if (value := getattr(group, field.name)) != NO_LIMIT or field.default != NO_LIMIT
    ]


def _encode_key(name: str, value: int | float | str) -> bytes:
    if isinstance(value, str):
        return _text(name) + struct.pack("<I", GGUFValueType.STRING) + _text(str(value))
    if isinstance(value, float):
        return _text(name) + struct.pack("<Id", GGUFValueType.FLOAT64, value)
    if name.endswith(_SIZE):
        return _text(name) + struct.pack("<IQ", GGUFValueType.UINT64, value)
    return _text(name) + struct.pack("<II", GGUFValueType.UINT32, value)


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw
