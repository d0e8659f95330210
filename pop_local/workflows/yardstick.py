"""What quantising a model further loses, to hold what pruning loses against."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from pop_converter.gguf.source import Source
from pop_local.base.output import check_output
from pop_local.engine.llama.backend import default_threads
from pop_local.engine.llama.quantise import TYPES, quantise
from pop_local.measure.forced import FULL, use_rule
from pop_local.measure.heldout import Text, tokenize
from pop_local.measure.quality import Quality, QualitySettings, measure_against, read_reference
from pop_local.measure.recall import Recall, RecallReference, RecallSettings
from pop_local.models.stored import ModelFiles
from pop_local.workflows.events import Watch
from pop_local.workflows.measuring import opened
from pop_local.workflows.options import Hardware


@dataclass(frozen=True)
class Quantised:
    """The model as one of llama.cpp's types, against the model as it is."""

    name: str
    size_bytes: int
    quality: Quality
    recall: tuple[Recall, ...]


def quantised(
    source: Source,
    sidecar: Path | None,
    rows: Mapping[str, int],
    text: Text,
    settings: QualitySettings,
    recall: Sequence[RecallSettings],
    n_ctx: int,
    hardware: Hardware,
    watch: Watch,
) -> Iterator[Quantised]:
    """Quantise a model as each of TYPES, and measure the windows and facts that pruning gets.

    Passages are chosen among what pruning does not keep full: by the rule of `sidecar`, but for the
    fields of RowRule in `rows`. Copies are temporary. Quantised twice, a model loses a little more
    than quantised once from its original weights. Raises PopError, StoppedError.
    """
    model = source.first.path
    with opened(ModelFiles(model, sidecar), hardware, watch, n_ctx=n_ctx) as full:
        rule = replace(full.rule, **rows)
        use_rule(full, rule)
        advance = watch.stage("Reading in full")
        reference = read_reference(full, tokenize(full, text), settings, advance)
        asked = [RecallReference.read(full, each, watch.stage("Asking in full")) for each in recall]
    for name in TYPES:
        with TemporaryDirectory(prefix="pop-local-") as folder:
            target = Path(folder) / f"{name}.gguf"
            check_output(target, (model,), source.size_bytes, force=False)
            watch.on_note(f"Quantising as {name}")
            n_threads = hardware.n_threads or default_threads()
            quantise(model, target, name, n_threads, watch.should_stop)
            with opened(ModelFiles(target), hardware, watch, n_ctx=n_ctx) as other:
                # Figures are of the rows that the rule scores.
                use_rule(other, rule)
                advance = watch.stage(f"Measuring {name}")
                [quality] = measure_against(reference, other, (FULL,), advance)
                found = tuple(
                    each.measure(other, FULL, watch.stage(f"Asking {name}")) for each in asked
                )
            yield Quantised(name, target.stat().st_size, quality, found)
