"""An mmproj, the eye of a vision-language model: pictures to ids, ids to rows of embeddings.

Bindings are llama_cpp's own of libmtmd. An image's rows are numbers below zero among the tokens of
a prompt, made from a hash of the mmproj, the picture and the row; so equal prompts have equal
tokens, and whatever finds cached K/V by them needs to know nothing of images.
"""

import ctypes
import functools
import hashlib
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from converter.errors import PopError
from converter.source import read_source
from pop_local.engine.images.pictures import Picture
from pop_local.engine.llama import logs
from pop_local.engine.llama.backend import INSTALL_HINT, bindings
from pop_local.models.mmproj import ARCHITECTURE

# Of pictures that are kept cut up, so that a conversation's are not anew for each question. A chunk
# has the scaled pixels in it, some 10 to 50 KiB a row.
_KEPT_ROWS = 8192
# Of each tensor, for the fingerprint.
_SAMPLED_BYTES = 4096
# Of the encoder's graph: asked in between whether to stop.
_NODES_AT_ONCE = 32


@dataclass(frozen=True)
class Image:
    """A piece of a picture as the model sees it; some models cut one into several.

    `ids` stand for its rows among the tokens. `n_pos`: by how many positions what follows is
    further on. `is_mutual`: its rows see each other, so they are decoded at once. libmtmd's chunk
    is freed with it.
    """

    chunk: Any
    ids: tuple[int, ...]
    n_pos: int
    is_mutual: bool

    @property
    def n_rows(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Seen:
    """A picture as the model sees it: ids of rows, and the tokens that the model wants around."""

    tokens: tuple[int, ...]
    images: tuple[Image, ...]


class Mmproj:
    """An mmproj file opened beside its model.

    `see` may be called from several threads, while another one decodes.
    """

    def __init__(
        self,
        path: Path,
        model: Any,
        *,
        n_threads: int,
        use_gpu: bool,
        max_tokens: int | None,
        should_stop: Callable[[], bool],
    ) -> None:
        """`model`: a llama_model pointer. `max_tokens`: of one image, where its size may vary.

        `should_stop` is asked while an image is encoded. Raises PopError for what is no mmproj, or
        belongs to another model.
        """
        self.path = path
        self.max_tokens = max_tokens
        self._encode_s = 0.0
        self.fingerprint = fingerprint(path)
        self._mtmd = mtmd = _bindings()
        self._should_stop = should_stop
        self._n_embd = int(bindings().llama_model_n_embd_inp(model))
        self._n_nodes = 0
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.n_threads, params.warmup = use_gpu, n_threads, False
        params.print_timings = False
        params.image_max_tokens = max_tokens or params.image_max_tokens
        # The structure does not keep it alive.
        self._callback = bindings().ggml_backend_sched_eval_callback(self._goes_on)
        params.cb_eval = self._callback
        logs.forget_errors()
        self._ctx = mtmd.mtmd_init_from_file(str(path).encode(), model, params)
        if not self._ctx or not mtmd.mtmd_support_vision(self._ctx):
            reason = f": {logs.first_error()}" if logs.first_error() else ""
            self.close()
            if max_tokens and "image_max_pixels" in reason:
                raise PopError(
                    f"no picture fits {max_tokens} tokens with {path}",
                    "allow a picture more tokens",
                )
            raise PopError(
                f"{path} does not fit this model{reason}",
                "give the mmproj that was published with it",
            )
        self._lock = threading.Lock()
        self._seen: OrderedDict[str, Seen] = OrderedDict()
        self._images: WeakValueDictionary[int, Image] = WeakValueDictionary()

    def see(self, picture: Picture) -> Seen:
        """Cut a picture up as the model wants it; whoever decodes it keeps what is returned.

        Raises PopError for a damaged picture, and for one that the model cannot be shown.
        """
        with self._lock:
            seen = self._seen.pop(picture.sha256, None) or self._cut_up(picture)
            self._seen[picture.sha256] = seen
            while len(self._seen) > 1 and self._n_kept() > _KEPT_ROWS:
                self._seen.popitem(last=False)
        return seen

    def _n_kept(self) -> int:
        return sum(image.n_rows for seen in self._seen.values() for image in seen.images)

    def image_at(self, tokens: Sequence[int]) -> Image:
        """Return the image that `tokens` begin with. Raises PopError for one nobody keeps."""
        image = self._images.get(int(tokens[0]))
        if image is None or tuple(tokens[: image.n_rows]) != image.ids:
            raise PopError("the prompt has an image that this model was not given")
        return image

    def decode(self, ctx: Any, image: Image, pos: int, n_batch: int) -> int:
        """Encode an image and decode its rows from position `pos` on, in sequence 0.

        Returns what llama_decode returns. When `should_stop` ended the encoding, that is -1.
        """
        mtmd = self._mtmd
        started_s = time.perf_counter()
        stopped = self._should_stop() or mtmd.mtmd_encode_chunk(self._ctx, image.chunk) != 0
        self._encode_s += time.perf_counter() - started_s
        if stopped or self._should_stop():
            return -1
        after = ctypes.c_int32()
        nobody = mtmd.mtmd_helper_post_decode_callback(0)
        embeddings = mtmd.mtmd_get_output_embd(self._ctx)
        return int(
            mtmd.mtmd_helper_decode_image_chunk(
                *(self._ctx, ctx, image.chunk, embeddings, pos, 0, n_batch),
                *(ctypes.byref(after), nobody, None),
            )
        )

    def embedded(self, image: Image) -> np.ndarray:
        """Return what the encoder makes of an image, float32 [n_rows, n_embd_inp].

        Raises PopError where it fails.
        """
        logs.forget_errors()
        if self._mtmd.mtmd_encode_chunk(self._ctx, image.chunk) != 0:
            raise PopError(logs.first_error() or "the image cannot be encoded")
        rows = self._mtmd.mtmd_get_output_embd(self._ctx)
        return np.ctypeslib.as_array(rows, (image.n_rows, self._n_embd)).copy()

    def positions(self, image: Image, first: int) -> np.ndarray:
        """Return where an image's rows stand from position `first` on: int32 [n_pos, n_rows].

        That is time, height, width and nothing where rows have several positions.
        """
        if not self._mtmd.mtmd_decode_use_mrope(self._ctx):
            return first + np.arange(image.n_rows, dtype=np.int32)[None]
        shown = self._mtmd.mtmd_input_chunk_get_tokens_image(image.chunk)
        at = self._mtmd.mtmd_image_tokens_get_decoder_pos
        rows = [at(shown, first, row) for row in range(image.n_rows)]
        return np.array([[p.t, p.y, p.x, p.z] for p in rows], np.int32).T

    def take_encode_s(self) -> float:
        """How long encoding took, in seconds, since this was asked before."""
        taken_s, self._encode_s = self._encode_s, 0.0
        return taken_s

    def close(self) -> None:
        if self._ctx:
            self._mtmd.mtmd_free(self._ctx)
        self._ctx = None

    def _goes_on(self, _tensor: int, is_asked: bool, _data: object) -> bool:
        """libmtmd asks before each node whether its result is wanted, and then, whether to go on.

        A False there ends the graph, and the encoder says that all is well.
        """
        if is_asked:
            self._n_nodes += 1
            return self._n_nodes % _NODES_AT_ONCE == 0
        return not self._should_stop()

    def _cut_up(self, picture: Picture) -> Seen:
        mtmd = self._mtmd
        rgb = picture.rgb()
        buffer = (ctypes.c_uint8 * len(rgb)).from_buffer_copy(rgb)
        bitmap = mtmd.mtmd_bitmap_init(picture.width, picture.height, buffer)
        chunks = mtmd.mtmd_input_chunks_init()
        part = mtmd.mtmd_input_part(None, bitmap)
        parts = (ctypes.POINTER(mtmd.mtmd_input_part) * 1)(ctypes.pointer(part))
        logs.forget_errors()
        try:
            if mtmd.mtmd_tokenize_from_parts(self._ctx, chunks, parts, 1, False) != 0:
                raise PopError(
                    f"{picture.name} cannot be shown to this model: {logs.first_error()}"
                )
            found = (
                mtmd.mtmd_input_chunks_get(chunks, number)
                for number in range(mtmd.mtmd_input_chunks_size(chunks))
            )
            return self._joined(found, picture)
        finally:
            mtmd.mtmd_bitmap_free(bitmap)
            mtmd.mtmd_input_chunks_free(chunks)

    def _joined(self, chunks: Iterator[Any], picture: Picture) -> Seen:
        mtmd = self._mtmd
        tokens: list[int] = []
        images: list[Image] = []
        for chunk in chunks:
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                n = ctypes.c_size_t()
                words = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
                found = words[: n.value]
                if min(found, default=0) < 0:
                    raise PopError(
                        f"the model lacks tokens that {self.path} puts around images",
                        "give the mmproj that was published with it",
                    )
                tokens += found
                continue
            n_rows = int(mtmd.mtmd_input_chunk_get_n_tokens(chunk))
            image = Image(
                mtmd.mtmd_input_chunk_copy(chunk),
                self._ids(picture, len(tokens), n_rows),
                int(mtmd.mtmd_input_chunk_get_n_pos(chunk)),
                bool(mtmd.mtmd_decode_use_non_causal(self._ctx, chunk)),
            )
            weakref.finalize(image, mtmd.mtmd_input_chunk_free, image.chunk)
            self._images[image.ids[0]] = image
            images.append(image)
            tokens += image.ids
        return Seen(tuple(tokens), tuple(images))

    def _ids(self, picture: Picture, offset: int, n_rows: int) -> tuple[int, ...]:
        """Numbers from -2**31 to -1; `n_rows` is part of them, since it depends on `max_tokens`."""
        seed = f"{self.fingerprint} {picture.sha256} {offset} {n_rows}".encode()
        raw = np.frombuffer(hashlib.shake_256(seed).digest(4 * n_rows), np.dtype("<u4"))
        return tuple((-1 - (raw >> 1).astype(np.int64)).tolist())


def fingerprint(path: Path) -> str:
    """What tells mmprojs apart: size, and a hash of the header and of all tensors' beginnings.

    Raises PopError for what is none.
    """
    if not path.is_file():
        raise PopError(f"there is no mmproj {path}", "check the path")
    source = read_source(path)
    if source.first.get("general.architecture") != ARCHITECTURE:
        raise PopError(
            f"{path} is no mmproj", "give the file beside the model whose name says mmproj"
        )
    digest = hashlib.sha256()
    for header in source.parts:
        with header.path.open("rb") as file:
            digest.update(file.read(header.data_start))
            for tensor in header.tensors:
                file.seek(header.data_start + tensor.offset)
                digest.update(file.read(min(tensor.size_bytes, _SAMPLED_BYTES)))
    return f"{source.size_bytes} {digest.hexdigest()}"


@functools.cache
def _bindings() -> Any:
    try:
        import llama_cpp.mtmd_cpp as mtmd
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        raise PopError(
            f"llama.cpp's library for images cannot be loaded: {error}", INSTALL_HINT
        ) from error
    logs.take_over_images(mtmd)
    return mtmd
