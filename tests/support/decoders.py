"""Compute logits with the backend and with the decoder in torch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pop_converter.gguf.source import read_source
from pop_local.engine.model import PopModel
from pop_local.measure.divergence import divergence, predictions
from pop_local.measure.forced import FULL, forced

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
from pop_local.research.decoder import Decoder  # noqa: E402


def backend_logits(model: PopModel, tokens: list[int]) -> np.ndarray:
    with forced(model) as reader:
        reader.read(tokens[:1], FULL)
        return reader.predict(tokens[1:])


def torch_logits(path: Path, tokens: list[int], **hyper: object) -> np.ndarray:
    decoder = Decoder(read_source(path))
    decoder.hyper = replace(decoder.hyper, **hyper)  # type: ignore[arg-type]
    states = decoder.embed(np.array([tokens]))
    with torch.no_grad():
        for index in range(decoder.n_layer):
            states = decoder.layer(index)(states)
        logits: np.ndarray = decoder.logits(states)[0, :-1].numpy()
    return logits


def mean_kl(logits: np.ndarray, others: np.ndarray) -> float:
    return float(divergence(predictions(logits), predictions(others)).kl.mean())
