"""Compare one model's fits on look-ups and held-out text, before and after deep rows. Not a test.

    python tests/bench/compare_fits.py MODEL.gguf --out FOLDER [--sidecar NAME=FILE ...]
        [--boundary 13,14 --text FILE ... --tokens 21504,86016 --deep-weight 1,0 --share 4,0]
        [--distill no-lookups,lookups --distill-windows 128]
        [--rules none,names] [--lookups 200] [--windows 16] [--n-tokens 1024] [--against FOLDER]

`--boundary` computes plain wide fits, one for each combination of boundary, token count, weight and
share. `--deep-weight` multiplies the weight of deep rows in the sums. One in `--share` windows is a
window of look-ups (0: none). `--distill` also trains each plain fit with look-ups: on text alone,
or as `convert --distill` does, on text and look-ups. `--sidecar` adds an existing sidecar. Each fit
is measured with each rule for deep rows. FOLDER keeps the sidecars, the full model's answers and
the figures: a second call computes only the missing ones. Prints one JSON line for each fit and
rule.

`--against` compares the full model's look-ups with those that an earlier call kept in a folder. If
only one of the two calls uses `GGML_POP_KERNELS=0`, the difference is due to rounding.

The figures are those of `pop-local eval`, except that a look-up is right only if each token of the
answer is the model's first choice. Small models answer few look-ups, and most of the time would be
spent on generating their wrong answers.
"""

import argparse
import json
import pickle
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pop_converter.architecture.shape import source_shape
from pop_converter.fit.wide import WideInput, encode_input
from pop_converter.gguf.source import read_source
from pop_converter.popfile.format import Calibration, DeepRows
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.popfile.sidecar import fitted_tensors, read_sidecar, write_sidecar
from pop_converter.projection import Projection
from pop_local.calibration import texts
from pop_local.calibration.activations import WindowReader, loaded
from pop_local.calibration.carrier_windows import SHARE
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.needs import n_choosing
from pop_local.calibration.texts import N_WINDOW
from pop_local.engine.depth.deep_rows import find_deep_rows
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.learning.sums import Summing, Sums
from pop_local.engine.llama.context import Context
from pop_local.engine.llama.taps import TapRequest
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.plan import Reuse
from pop_local.measure.divergence import likelihood, predictions
from pop_local.measure.estimate import Estimate
from pop_local.measure.forced import FULL, Forced, Pruning, forced
from pop_local.measure.heldout import shipped_text, tokenize
from pop_local.measure.lookups import (
    Answers,
    LookupAnswer,
    LookupDocument,
    LookupReference,
    LookupSettings,
    TokenizedQuestion,
    make_documents,
)
from pop_local.measure.quality import QualitySettings, measure_against, read_reference
from pop_local.research.distilled import Distiller
from pop_local.ui.watch import stoppable_watch
from pop_local.workflows.hardware import Hardware

WIDE = Projection.WIDE
# With this share, no window is a window of look-ups.
NEVER = 10**9
T = TypeVar("T")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def silent(done: int, total: int) -> None: ...


def fit_all(options: argparse.Namespace) -> dict[str, Path]:
    """Return each new fit's name and path, and compute the missing fits."""
    found: dict[str, Path] = {}
    for n_tokens, share in product(options.tokens, options.share):
        paths = {
            (boundary, weight): options.out
            / f"{options.model.stem}.{boundary}.{n_tokens}.{weight:g}.{share}.gguf"
            for boundary in options.boundary
            for weight in options.deep_weight
        }
        missing = {each: path for each, path in paths.items() if not path.exists()}
        if missing:
            fit(options, n_tokens, share, missing)
        for (boundary, weight), path in paths.items():
            name = f"boundary {boundary}, {n_tokens} tokens, deep weight {weight:g}, share {share}"
            found[name] = path
            for variant in options.distill if share else ():
                trained = path.with_suffix(f".{variant}.gguf")
                if not trained.exists():
                    distill(options, path, variant, trained)
                found[f"{name}, distilled: {variant}"] = trained
    return found


# The variants of distilling, and the share of look-ups in their text: one in N windows.
VARIANTS = {"no-lookups": NEVER, "lookups": SHARE}


def distill(options: argparse.Namespace, start: Path, variant: str, target: Path) -> None:
    """Train a fit on one variant's text."""
    source = read_source(options.model)
    meta = read_sidecar(start, source)
    how = FitOptions(options.tokens[0], tuple(options.text), projection=WIDE)
    with stoppable_watch() as watch:
        distiller = Distiller(source, how, Hardware(n_threads=1, n_gpu_layers=0), watch)
        plan = make_plan(source_shape(source), boundary=meta.boundary, projection=WIDE)
        matrices = distiller.require(plan)
        texts.SHARE = VARIANTS[variant]
        n_windows, n_embd = options.distill_windows, plan.shape.n_embd
        with loaded(options.model, n_threads=1) as context:
            count = min(n_windows, options.tokens[0] // N_WINDOW)
            text = texts.given_text(context, how.texts, count, n_embd)
            chosen = texts.distill_text(context, text, how.texts, n_windows)
        teacher = distiller.read(plan.boundary, chosen, matrices)
        assert meta.calibration is not None
        fitted = Fitted(meta.calibration, tuple(fitted_tensors(start).values()), WIDE)
        fitted = distiller.trained(plan, fitted, teacher, matrices)
    write_sidecar(plan, options.model, target, fitted=fitted)


def fit(
    options: argparse.Namespace, n_tokens: int, share: int, paths: dict[tuple[int, float], Path]
) -> None:
    """Fit in one pass. `paths`: the file to write for each boundary and weight of deep rows."""
    texts.SHARE = share or NEVER
    source = read_source(options.model)
    shape, how = source_shape(source), FitOptions(n_tokens, tuple(options.text), projection=WIDE)
    boundaries = sorted({boundary for boundary, _ in paths})
    weights = sorted({weight for _, weight in paths})
    summing = Summing(source, shape, dict.fromkeys(boundaries, (WIDE,)))
    with loaded(options.model, n_threads=1) as context:
        text = texts.given_text(context, how.texts, n_tokens // N_WINDOW, shape.n_embd)
        inputs = choose(summing, context, text.windows, boundaries)
        sums = {
            weight: Sums(inputs, {b: summing.empty(b, summing.layers(b)) for b in boundaries})
            for weight in weights
        }
        reader = WindowReader(context, summing.wanted(boundaries))
        for number, window in enumerate(text.windows):
            deep = find_deep_rows(context, window, DeepRows.NAMES)
            tapped = reader.window(window.tolist())
            for weight, each in sums.items():
                summing.add(each, tapped, np.where(deep, weight, 1.0).astype(np.float32))
            if number % 8 == 0:
                say(f"fitting on {n_tokens} tokens: window {number} of {len(text.windows)}")
    for (boundary, weight), path in paths.items():
        plan, gram = make_plan(shape, boundary=boundary, projection=WIDE), sums[weight].grams
        tensors = [*encode_input(boundary, inputs[boundary], how.kv_type)]
        for layer in plan.fitted_layers:
            solved = summing.solve(gram[boundary], boundary, layer, WIDE, how.ridge, how.kv_type)
            tensors += solved
        known = Calibration(text.name, text.sha256, text.n_tokens, how.ridge)
        write_sidecar(plan, options.model, path, fitted=Fitted(known, tuple(tensors), WIDE))


def choose(
    summing: Summing, context: Context, windows: texts.Windows, boundaries: Sequence[int]
) -> dict[int, WideInput]:
    """Return each boundary's wide input, chosen as in `convert`."""
    n_chosen = min(len(windows), n_choosing(summing.shape.n_embd))
    reader = WindowReader(context, TapRequest(tuple(boundaries)))
    seen: dict[int, list[Any]] = {each: [] for each in boundaries}
    for number in np.linspace(0, len(windows) - 1, n_chosen).astype(int):
        tapped = reader.window(windows[number].tolist())
        for boundary in boundaries:
            seen[boundary].append(summing.state(boundary, tapped)[1:])
    return {each: summing.choose_input(each, seen[each]) for each in boundaries}


class Measurer:
    """A measurer of one model's sidecars. The full model's answers are computed only once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.source = options, read_source(options.model)
        self.settings = QualitySettings(options.windows)
        asked = LookupSettings.of_questions(options.lookups)
        self.asked = LookupSettings(asked.n_documents, asked.n_per_document, options.n_tokens)

    def measure(self, sidecar: Path, rule: DeepRows) -> dict[str, Any]:
        """Return a fit's figures with the given rule for deep rows."""
        how = EngineOptions.of(
            self.options.model,
            sidecar=sidecar,
            deep_rows=rule,
            n_threads=1,
            n_ctx=self.asked.n_ctx,
            reuse=Reuse.EXACT,
        )
        pruning = Pruning(read_sidecar(sidecar, self.source).boundary)
        with PopModel(how) as model:
            full = self._kept("text", lambda: self._read(model))
            quality = measure_against(full, model, pruning, silent)
            known: Answers = self._kept("lookups", lambda: self._ask(model))
            reference = LookupReference(self.asked, make_documents(model, self.asked), known)
            answers = answered(model, reference.documents, pruning)
        lookups = reference.compare(answers)
        n_rows = sum(len(window.context) for window in full.windows) - 33 * len(full.windows)
        return {
            "deep": round(1 - quality.n_pruned / n_rows, 3),
            "full": lookups.full,
            "lost": lookups.lost,
            "gained": lookups.gained,
            "p": round(lookups.p, 3),
            "logprob_lost": figures(lookups.logprob_lost),
            "kl": figures(quality.kl_mean),
            "ppl_ratio": figures(quality.ppl_ratio),
            "copy_ppl_ratio": figures(quality.copy_ppl_ratio),
        }

    def compare_full(self, folder: Path) -> dict[str, Any]:
        """Compare the full model's look-ups with those kept in another folder."""
        how = EngineOptions.of(
            self.options.model, full=True, n_threads=1, n_ctx=self.asked.n_ctx, reuse=Reuse.EXACT
        )
        with PopModel(how) as model:
            known: Answers = self._kept("lookups", lambda: self._ask(model))
            documents = make_documents(model, self.asked)
        before = pickle.loads((folder / self._file("lookups").name).read_bytes())
        found = LookupReference(self.asked, documents, before).compare(known)
        return {key: getattr(found, key) for key in ("full", "lost", "gained")} | {
            "p": round(found.p, 3),
            "logprob_lost": figures(found.logprob_lost),
        }

    def _read(self, model: PopModel) -> Any:
        say("reading held-out text in full")
        return read_reference(model, tokenize(model, shipped_text()), self.settings, silent)

    def _ask(self, model: PopModel) -> Answers:
        say("answering look-ups in full")
        return answered(model, make_documents(model, self.asked), FULL)

    def _kept(self, name: str, compute: Callable[[], T]) -> T:
        """Return a pickled result of an earlier call, or compute and pickle the result."""
        path = self._file(name)
        if path.exists():
            kept: T = pickle.loads(path.read_bytes())
            return kept
        found = compute()
        path.write_bytes(pickle.dumps(found))
        return found

    def _file(self, name: str) -> Path:
        options = self.options
        n_each = options.windows if name == "text" else options.lookups
        return options.out / f"{options.model.stem}.{name}.{n_each}.pickle"


def answered(model: PopModel, documents: Sequence[LookupDocument], pruning: Pruning) -> Answers:
    """Answer each document's questions with teacher forcing."""
    found: Answers = []
    with forced(model) as reader:
        for document in documents:
            reader.read(document.tokens, pruning)
            found.append(tuple(asked(reader, each) for each in document.questions))
    return found


def asked(reader: Forced, question: TokenizedQuestion) -> LookupAnswer:
    with reader.branch():
        reader.extend(question.tokens)
        predicted = predictions(reader.predict(question.answer))
    scores = likelihood(predicted, np.asarray(question.answer))
    return LookupAnswer(bool(scores.is_top1.all()), -float(scores.nll.sum()), "")


def figures(estimate: Estimate) -> list[float]:
    return [round(each, 4) for each in (estimate.value, estimate.se) if each is not None]


def listed(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    return lambda text: [kind(each) for each in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--boundary", type=listed(int), default=[])
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--tokens", type=listed(int), default=[])
    parser.add_argument("--deep-weight", type=listed(float), default=[1.0])
    parser.add_argument("--share", type=listed(int), default=[SHARE])
    parser.add_argument("--distill", type=listed(str), default=[])
    parser.add_argument("--distill-windows", type=int, default=128)
    parser.add_argument("--sidecar", action="append", default=[], help="NAME=FILE")
    parser.add_argument("--rules", type=listed(DeepRows), default=[DeepRows.NAMES])
    parser.add_argument("--lookups", type=int, default=200)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--n-tokens", type=int, default=1024)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = fit_all(options)
    found |= {each.partition("=")[0]: Path(each.partition("=")[2]) for each in options.sidecar}
    measurer = Measurer(options)
    if options.against:
        row = {"fit": "full model", **measurer.compare_full(options.against)}
        print(json.dumps(row), flush=True)
    for name, sidecar in found.items():
        for rule in options.rules:
            kept = options.out / f"{sidecar.stem}.{rule}.{options.lookups}.{options.windows}.json"
            if not kept.exists():
                kept.write_text(json.dumps(measurer.measure(sidecar, rule)))
            row = {"fit": name, "rule": str(rule), **json.loads(kept.read_text())}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
