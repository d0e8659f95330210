"""Run an mmproj, the vision encoder of a vision-language model, with libmtmd.

A prompt's tokens contain NO_TOKEN for each image row. An image's key identifies its cached rows.
"""

import ctypes
import os
import re
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pop_base.errors import PopError, StoppedError
from pop_converter.gguf.source import read_source, sampled_sha256
from pop_local.engine.images.pictures import MAX_SHOWN, Picture, require_pillow
from pop_local.engine.llama import logs
from pop_local.engine.llama.backend import INSTALL_HINT, bindings
from pop_local.engine.llama.batch import decode_rows
from pop_local.engine.llama.slot import Slot
from pop_local.models.mmproj_files import ARCHITECTURE

if TYPE_CHECKING:
    from typing_extensions import Self

# Token id of an image's rows (LLAMA_TOKEN_NULL).
NO_TOKEN = -1
# Maximum total tokens of cached TokenizedPictures. Cached pictures need not be split again.
_KNOWN_ROWS = 1 << 16
# Tensors that every layer must have if any layer has them.
_PART = re.compile(r"v\.blk\.(\d+)\.((?:attn_(?:q|k|v|qkv|out)|ffn_(?:up|down))\.weight)")
# Projector types that scale each picture to one square.
_SQUARE = re.compile("gemma3|gemma3nv|nemotron_v2_vl")
# Maximum bytes of decoded pixels that are kept until their pictures are encoded.
_KEPT_BYTES = 1 << 26
# Number of nodes in the encoder's graph between two calls to `should_stop`.
_NODES_AT_ONCE = 32


@dataclass(frozen=True)
class ImageChunk:
    """A whole picture, or one part of a picture if the model splits pictures.

    `number`: the chunk's index among all chunks of the picture. `key` identifies the chunk's rows.
    `n_pos`: the number of positions that the chunk's rows occupy. `is_mutual`: whether all rows
    attend to each other and must be in one batch.
    """

    picture: Picture
    number: int
    key: str
    n_rows: int
    n_pos: int
    is_mutual: bool


@dataclass(frozen=True)
class TokenizedPicture:
    """A picture's tokens: NO_TOKEN for each row of an image, and text tokens between two images.

    `images`: the image chunks, keyed by the offset of their first row in `tokens`.
    """

    tokens: tuple[int, ...]
    images: Mapping[int, ImageChunk]


# Width, height, and RGB bytes (see Picture.rgb).
_Pixels = tuple[int, int, bytes]


class _Cut:
    """A picture's libmtmd chunks, which hold megabytes of pixels and are freed with this object."""

    def __init__(self, mtmd: Any, picture: Picture) -> None:
        self.sha256 = picture.sha256
        self.chunks = mtmd.mtmd_input_chunks_init()
        self._mtmd = mtmd
        weakref.finalize(self, mtmd.mtmd_input_chunks_free, self.chunks)

    def __len__(self) -> int:
        return int(self._mtmd.mtmd_input_chunks_size(self.chunks))

    def __getitem__(self, number: int) -> Any:
        return self._mtmd.mtmd_input_chunks_get(self.chunks, number)


class Mmproj:
    """A model's mmproj file. Call `open` to load the file.

    `key` identifies the file. Multiple threads may call `see` while another thread is decoding.
    """

    def __init__(
        self, path: Path, *, use_gpu: bool, max_tokens: int | None, should_stop: Callable[[], bool]
    ) -> None:
        """`max_tokens`: the maximum number of tokens per image, or None for the default.

        Some projectors ignore `max_tokens`. `should_stop` is called while an image is being
        encoded. Raises PopError if the mmproj is invalid.
        """
        if not path.is_file():
            raise PopError(f"the mmproj {path} does not exist", "check the path")
        source = read_source(path)
        header = source.first
        if header.get("general.architecture") != ARCHITECTURE:
            raise PopError(f"{path} is not an mmproj", "use the file whose name contains mmproj")
        _require_layers(path, [tensor.name for tensor in source.tensors])
        self.path = path
        self.max_tokens = max_tokens
        # The hash covers the header and the first bytes of each tensor.
        self.key = f"{source.size_bytes} {sampled_sha256(source)}"
        self._use_gpu = use_gpu
        self._should_stop = should_stop
        self._stop_error: BaseException | None = None
        self._n_nodes = 0
        self._ctx: Any = None
        self._lock = threading.RLock()
        self._known: OrderedDict[str, TokenizedPicture] = OrderedDict()
        self._kept: OrderedDict[str, _Pixels] = OrderedDict()
        self._last: _Cut | None = None
        kinds = map(header.get, ("clip.projector_type", "clip.vision.projector_type"))
        kind = next((str(kind) for kind in kinds if kind), "")
        side = header.get("clip.vision.image_size")
        self._side = side if isinstance(side, int) and _SQUARE.fullmatch(kind) else 0

    def open(self, model: Any, n_threads: int) -> "Self":
        """Load the file on first use. `model`: a llama_model pointer.

        Raises PopError if the file does not match the model, or if Pillow is not installed.
        """
        with self._lock:
            if self._ctx is None:
                self._load(model, n_threads)
        return self

    def _load(self, model: Any, n_threads: int) -> None:
        require_pillow()
        try:
            import llama_cpp.mtmd_cpp as mtmd
        except (AttributeError, ImportError, OSError, RuntimeError) as error:
            raise PopError(
                f"the llama.cpp image library cannot be loaded: {error}", INSTALL_HINT
            ) from error
        logs.take_over_images(mtmd)
        self._mtmd: Any = mtmd
        self._n_embd = int(bindings().llama_model_n_embd_inp(model))
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.n_threads, params.warmup = self._use_gpu, n_threads, False
        params.print_timings = False
        params.image_max_tokens = self.max_tokens or params.image_max_tokens
        # The ctypes structure does not keep the callback alive.
        self._callback = bindings().ggml_backend_sched_eval_callback(self._on_node)
        params.cb_eval = self._callback
        logs.forget_errors()
        self._ctx = mtmd.mtmd_init_from_file(os.fsencode(self.path), model, params)
        if self._ctx and mtmd.mtmd_support_vision(self._ctx):
            return
        reason = f": {logs.first_error()}" if logs.first_error() else ""
        self.close()
        if self.max_tokens and "image_max_pixels" in reason:
            raise PopError(
                f"{self.path} cannot fit an image into {self.max_tokens} tokens",
                "allow more tokens per image",
            )
        raise PopError(
            f"{self.path} does not match this model{reason}",
            "use the mmproj that was published with the model",
        )

    def see(self, picture: Picture) -> TokenizedPicture:
        """Return the tokenized picture, which consists of text tokens and image chunks.

        Raises PopError if the image data is corrupt or libmtmd rejects the picture.
        """
        if picture.sha256 not in self._known:
            self._cut_up(picture)
        with self._lock:
            known = self._known.pop(picture.sha256, None) or self._pieces(picture)
            self._known[picture.sha256] = known
            n_rows = sum(len(seen.tokens) for seen in self._known.values())
            while len(self._known) > 1 and n_rows > _KNOWN_ROWS:
                n_rows -= len(self._known.popitem(last=False)[1].tokens)
        return known

    def decode(self, slot: Slot, image: ImageChunk, first: int) -> float:
        """Encode an image and decode its rows starting at position `first`.

        Returns the encoding time in seconds. Raises PopError if encoding or decoding fails. Raises
        StoppedError or the signal handler's exception if interrupted.
        """
        ctx, n_batch = slot.context.ctx, slot.context.n_batch
        started_s = time.perf_counter()
        positions = self.positions(image, first)  # before encoding, which drops the pixels
        try:
            rows = self.embedded(image)
        except StoppedError:
            slot.raise_if_stopped()  # raises Ctrl-C's error instead
            raise
        encode_s = time.perf_counter() - started_s
        logs.forget_errors()
        for at in range(0, image.n_rows, n_batch):
            piece, places = rows[at : at + n_batch], positions[:, at : at + n_batch]
            code = decode_rows(
                ctx, piece, places, sequence=slot.sequence, is_mutual=image.is_mutual
            )
            if code != 0:
                slot.raise_if_stopped()
                raise logs.not_decoded(code)
        return encode_s

    def embedded(self, image: ImageChunk) -> np.ndarray:
        """Return an image's embeddings, float32 [n_rows, n_embd_inp].

        Raises PopError if the encoder fails, or StoppedError if `should_stop` returns True.
        """
        cut = self._cut_up(image.picture)
        with self._lock:
            self._kept.pop(image.picture.sha256, None)
        if self._should_stop():
            raise StoppedError
        logs.forget_errors()
        code = self._mtmd.mtmd_encode_chunk(self._ctx, cut[image.number])
        ended, self._stop_error = self._stop_error, None
        if ended is not None:
            raise ended
        if code != 0:
            raise PopError(logs.first_error() or "the image cannot be encoded")
        rows = self._mtmd.mtmd_get_output_embd(self._ctx)
        return np.ctypeslib.as_array(rows, (image.n_rows, self._n_embd)).copy()

    def positions(self, image: ImageChunk, first: int) -> np.ndarray:
        """Return the positions of an image's rows, int32 [1, n_rows], starting at `first`.

        For M-RoPE, the shape is [4, n_rows]: time, height, width, and an unused position.
        """
        if not self._mtmd.mtmd_decode_use_mrope(self._ctx):
            return first + np.arange(image.n_rows, dtype=np.int32)[None]
        cut = self._cut_up(image.picture)
        shown = self._mtmd.mtmd_input_chunk_get_tokens_image(cut[image.number])
        at = self._mtmd.mtmd_image_tokens_get_decoder_pos
        rows = [at(shown, first, row) for row in range(image.n_rows)]
        return np.array([[p.t, p.y, p.x, p.z] for p in rows], np.int32).T

    def close(self) -> None:
        """Free the encoder and all cached data. `open` reloads the encoder."""
        with self._lock:
            if self._ctx:
                self._mtmd.mtmd_free(self._ctx)
            self._ctx = self._last = None
            self._known.clear()
            self._kept.clear()

    def __del__(self) -> None:
        if getattr(self, "_ctx", None):
            self.close()

    def _on_node(self, _tensor: int, is_query: bool, _data: object) -> bool:
        """Handle a node of the encoder's graph (ggml_backend_sched_eval_callback).

        If `is_query` is True, returning True requests a second call after the node is computed. The
        second call returns False to stop the encoder. A stopped encoder still reports success, so
        `_stop_error` stores the reason.
        """
        if is_query:
            self._n_nodes += 1
            return self._n_nodes % _NODES_AT_ONCE == 0
        try:
            if self._stop_error is None and self._should_stop():
                self._stop_error = StoppedError()
        except BaseException as error:  # exceptions cannot cross ctypes
            self._stop_error = error
        return self._stop_error is None

    def _cut_up(self, picture: Picture) -> _Cut:
        """Return a picture's chunks, which stay cached until the next picture is split.

        Decoding takes seconds and therefore happens outside the lock. The pixels are kept until the
        picture's rows are encoded, so that each request decodes a picture only once.
        """
        if (last := self._last) is not None and last.sha256 == picture.sha256:
            return last
        # Decode enough pixels for the shorter side to be twice the side of the encoder's square.
        shorter, longer = sorted((picture.width, picture.height))
        n_pixels = min(MAX_SHOWN, 4 * self._side**2 * longer // shorter or MAX_SHOWN)
        pixels = self._kept.get(picture.sha256) or picture.rgb(n_pixels)
        with self._lock:
            if self._ctx is None:
                raise PopError(f"{self.path} is closed", "reopen the model with its mmproj")
            self._last = self._newly_cut(picture, *pixels)
            self._kept[picture.sha256] = pixels
            while sum(len(rgb) for *_, rgb in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
            return self._last

    def _newly_cut(self, picture: Picture, width: int, height: int, rgb: bytes) -> _Cut:
        mtmd = self._mtmd
        buffer = (ctypes.c_uint8 * (3 * width * height)).from_buffer_copy(rgb)
        bitmap = mtmd.mtmd_bitmap_init(width, height, buffer)
        part = mtmd.mtmd_input_part(None, bitmap)
        parts = (ctypes.POINTER(mtmd.mtmd_input_part) * 1)(ctypes.pointer(part))
        cut = _Cut(mtmd, picture)
        logs.forget_errors()
        try:
            if mtmd.mtmd_tokenize_from_parts(self._ctx, cut.chunks, parts, 1, False) != 0:
                raise PopError(
                    f"{picture.name} cannot be used with this model: {logs.first_error()}"
                )
        finally:
            mtmd.mtmd_bitmap_free(bitmap)
        return cut

    def _pieces(self, picture: Picture) -> TokenizedPicture:
        mtmd = self._mtmd
        tokens: list[int] = []
        images: dict[int, ImageChunk] = {}
        cut = self._cut_up(picture)
        for number in range(len(cut)):
            chunk = cut[number]
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                n = ctypes.c_size_t()
                words = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
                tokens += words[: n.value]
                if min(words[: n.value], default=0) < 0:
                    raise PopError(
                        f"the model lacks the tokens that {self.path} places around images",
                        "use the mmproj that was published with the model",
                    )
                continue
            n_rows = int(mtmd.mtmd_input_chunk_get_n_tokens(chunk))
            images[len(tokens)] = ImageChunk(
                picture=picture,
                number=number,
                # The key includes the number of rows, which depends on `max_tokens`.
                key=f"{self.key} {picture.sha256} {number} {n_rows}",
                n_rows=n_rows,
                n_pos=int(mtmd.mtmd_input_chunk_get_n_pos(chunk)),
                is_mutual=bool(mtmd.mtmd_decode_use_non_causal(self._ctx, chunk)),
            )
            tokens += [NO_TOKEN] * n_rows
        return TokenizedPicture(tuple(tokens), images)


def _require_layers(path: Path, names: Sequence[str]) -> None:
    """Raise PopError if a tensor is missing, because libmtmd would crash on a null pointer."""
    matches = [match for name in names if (match := _PART.fullmatch(name))]
    parts = {(match[1], match[2]) for match in matches}
    for layer, part in product({match[1] for match in matches}, {match[2] for match in matches}):
        if (layer, part) not in parts:
            raise PopError(f"{path} has no tensor v.blk.{layer}.{part}", "download the file again")
