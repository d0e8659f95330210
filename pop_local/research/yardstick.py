"""Losses of quantising a model further, to compare with those of pruning."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pop_local.base.output import check_output
from pop_local.engine.llama.quantise import TYPES, quantise
from pop_local.engine.llama.threads import default_threads
from pop_local.measure.forced import FULL, use_rule
from pop_local.measure.quality import Quality, measure_against, read_reference
from pop_local.measure.recall import Recall, RecallReference
from pop_local.models.stored import ModelFiles
from pop_local.workflows.evaluate import EvaluationRun
from pop_local.workflows.measuring import opened


@dataclass(frozen=True)
class Quantised:
    """The model as one of llama.cpp's types, against the model as it is."""

    name: str
    size_bytes: int
    quality: Quality
    recall: tuple[Recall, ...]


def quantised(run: EvaluationRun) -> Iterator[Quantised]:
    """Quantise a model as each of TYPES, and measure the windows and facts that pruning gets.

    Passages are chosen among what pruning does not keep full. Copies are temporary. A model that is
    quantised twice loses a little more than one quantised once, from its original weights. Raises
    PopError, StoppedError.
    """
    source, watch, hardware = run.source, run.watch, run.hardware
    model = source.first.path
    with run.opened(run.files) as (full, tokens):
        rule = full.rule
        advance = watch.stage("Reading in full")
        reference = read_reference(full, tokens, run.options.settings, advance)
        asked = [
            RecallReference.read(full, run.asked(n_tokens), watch.stage("Asking in full"))
            for n_tokens in run.recall
        ]
    for name in TYPES:
        with TemporaryDirectory(prefix="pop-local-") as folder:
            target = Path(folder) / f"{name}.gguf"
            check_output(target, (model,), source.size_bytes, force=False)
            watch.on_note(f"Quantising as {name}")
            n_threads = hardware.n_threads or default_threads()
            quantise(model, target, name, n_threads, watch.should_stop)
            with opened(ModelFiles(target), hardware, watch, n_ctx=run.context()) as other:
                # Figures are of the rows that the rule scores.
                use_rule(other, rule)
                advance = watch.stage(f"Measuring {name}")
                [quality] = measure_against(reference, other, (FULL,), advance)
                found = tuple(
                    each.measure(other, FULL, watch.stage(f"Asking {name}")) for each in asked
                )
            yield Quantised(name, target.stat().st_size, quality, found)
