"""Arrays and cells of a saved state as members of a zip archive, whose CRC-32 detects damage.

    tokens.npy     int32 (n_tokens): each cached row's token, NO_TOKEN for image rows
    full.npy       bool (n_tokens): rows that ran all layers
    positions.npy  int32 (n_tokens + 1): each row's position, and the next row's
    stale.npy      int32 (2): number of exact rows and first stale row, only if a row is stale
    kv.bin         llama.cpp's state: only the used cells

numpy's reader evaluates headers and allocates any size in them, so `decoded_array` checks both.
"""

import io
import re
import zipfile
from collections.abc import Iterator, Mapping

import numpy as np

from pop_local.engine.cache.cache_keys import FULL
from pop_local.engine.cache.prompt_cache import SavedState
from pop_local.engine.cache.rows import NO_STALE
from pop_local.engine.images.mmproj import NO_TOKEN

# Errors that a damaged or foreign archive raises. RuntimeError: encrypted archives, and deeply
# nested JSON.
DAMAGES = (zipfile.BadZipFile, EOFError, KeyError, RuntimeError, ValueError)

# The header that numpy writes for an array of one dimension.
_NPY = re.compile(
    rb"\x93NUMPY\x01\0..\{'descr': '([<|]\w\d)', 'fortran_order': False, 'shape': \((\d{1,9}),\), }"
    rb" *\n",
    re.DOTALL,
)


def members(state: SavedState) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each member."""
    yield "positions.npy", encoded_array(state.positions)
    yield "tokens.npy", encoded_array(state.tokens)
    yield "full.npy", encoded_array(state.is_full)
    if state.first_stale < state.n_tokens:
        yield "stale.npy", encoded_array(np.array([state.n_exact, state.first_stale], np.int32))
    yield "kv.bin", state.cells


def read_state(
    archive: zipfile.ZipFile, key: str, model: str, images: Mapping[int, str], n_tokens: int
) -> SavedState:
    """Read a state's members. Raises one of DAMAGES, also for inconsistent arrays."""
    n_exact, first_stale = 0, NO_STALE
    if "stale.npy" in archive.namelist():
        stale = decoded_array(read_member(archive, "stale.npy"), np.int32, 2)
        n_exact, first_stale = stale.tolist()
    state = SavedState(
        key=key,
        model=model,
        tokens=read_tokens(archive, n_tokens),
        is_full=decoded_array(read_member(archive, "full.npy"), np.bool_, n_tokens),
        positions=decoded_array(read_member(archive, "positions.npy"), np.int32, n_tokens + 1),
        cells=read_member(archive, "kv.bin"),
        images=images,
        first_stale=first_stale,
        n_exact=n_exact,
    )
    if not _is_consistent(state):
        raise ValueError("its arrays contradict each other")
    return state


def _is_consistent(state: SavedState) -> bool:
    """Return True if images have their rows, positions ascend, and exact rows are not stale."""
    is_text = state.tokens != NO_TOKEN
    image_starts = np.flatnonzero(~is_text & np.r_[True, is_text[:-1]])
    steps = np.diff(state.positions)
    return bool(
        state.n_tokens > 0
        and state.tokens.min() >= NO_TOKEN
        and state.first_stale >= (state.n_tokens if state.key == FULL else state.n_exact)
        and state.n_exact >= 0
        and set(image_starts.tolist()) <= state.images.keys()
        and not is_text[[start for start in state.images if start < len(is_text)]].any()
        and state.positions[0] == 0
        and (steps >= 0).all()
        and (steps[is_text] == 1).all()
    )


def read_tokens(archive: zipfile.ZipFile, n_tokens: int) -> np.ndarray:
    """Read a state's tokens alone. Raises one of DAMAGES."""
    return decoded_array(read_member(archive, "tokens.npy"), np.int32, n_tokens)


def add_member(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Add a member without a timestamp, since zip cannot represent every clock value."""
    archive.writestr(zipfile.ZipInfo(name), content)


def read_member(archive: zipfile.ZipFile, name: str, most_bytes: int | None = None) -> bytes:
    """Return a member. Raises ValueError for a compressed one, which could expand to any size."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is compressed")
    if most_bytes is not None and info.file_size > most_bytes:
        raise ValueError(f"{name} is too long")
    return archive.read(info)


def encoded_array(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def decoded_array(content: bytes, kind: type[np.generic], length: int) -> np.ndarray:
    """Parse a .npy file. Raises ValueError for another type, length or size."""
    head, dtype = _NPY.match(content), np.dtype(kind)
    if (
        head is None
        or head[1].decode() != dtype.str
        or int(head[2]) != length
        or len(content) != head.end() + length * dtype.itemsize
    ):
        raise ValueError("another array")
    return np.frombuffer(content, dtype, offset=head.end())
