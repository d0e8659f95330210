"""A sequence's saved state, stored as members of a zip archive.

    tokens.npy     int32 (n_tokens): each cached row's token, NO_TOKEN for image rows
    full.npy       bool (n_tokens): rows that ran all layers
    positions.npy  int32 (n_tokens + 1): each row's position, and the next row's
    stale.npy      int32 (2): number of exact rows and first stale row, only if a row is stale
    kv.bin         llama.cpp's state: only the used cells

The zip format's CRC-32 checksums detect damaged members. numpy's reader allocates whatever size a
header declares, so `decoded_array` checks the header and the size first.
"""

import io
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from pop_local.engine.images.mmproj import NO_TOKEN

NO_STALE = 2**31 - 1  # beyond all rows
# Key of rows whose K/V are identical to the full model's (see SavedStates.key).
FULL = "mode OFF"
# Errors raised for a damaged or foreign archive. RuntimeError covers encrypted archives and deeply
# nested JSON, and OverflowError an infinite number.
DAMAGES = (zipfile.BadZipFile, EOFError, KeyError, OverflowError, RuntimeError, ValueError)

# The header that numpy writes for a one-dimensional array.
_NPY = re.compile(
    rb"\x93NUMPY\x01\0..\{'descr': '([<|]\w\d)', 'fortran_order': False, 'shape': \((\d{1,9}),\), }"
    rb" *\n",
    re.DOTALL,
)

# Returns the number of rows that a prompt can reuse, given cached tokens and image keys.
CountReusable = Callable[[np.ndarray, Mapping[int, str]], int]


@dataclass(frozen=True)
class SavedState:
    """A sequence's used cells, with each row's token, position, and depth.

    `tokens`: int32 [n]. `is_full`: bool [n]. `positions`: int32 [n + 1] (see KvCache). `images`:
    see Prompt.n_equal. `key`: SavedStates.key. `model`: SavedStates.model_key. KvCache describes
    the other fields.
    """

    key: str
    model: str
    tokens: np.ndarray
    is_full: np.ndarray
    positions: np.ndarray
    cells: bytes
    images: Mapping[int, str] = field(default_factory=dict)
    first_stale: int = NO_STALE
    n_exact: int = 0

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def extends(self, tokens: np.ndarray, images: Mapping[int, str]) -> bool:
        """Return whether the state starts with the given tokens and images."""
        is_start = self.tokens.tobytes().startswith(tokens.tobytes())
        return is_start and images.items() <= self.images.items()


def members(state: SavedState) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each archive member."""
    yield "positions.npy", encoded_array(state.positions)
    yield "tokens.npy", encoded_array(state.tokens)
    yield "full.npy", encoded_array(state.is_full)
    if state.first_stale < state.n_tokens:
        yield "stale.npy", encoded_array(np.array([state.n_exact, state.first_stale], np.int32))
    yield "kv.bin", state.cells


def read_state(
    archive: zipfile.ZipFile, key: str, model: str, images: Mapping[int, str], n_tokens: int
) -> SavedState:
    """Read a state. Raises one of the errors in DAMAGES if members are damaged or inconsistent."""

    def array(name: str, kind: type[np.generic], length: int) -> np.ndarray:
        return decoded_array(read_member(archive, name), kind, length)

    n_exact, first_stale = 0, NO_STALE
    if "stale.npy" in archive.namelist():
        n_exact, first_stale = array("stale.npy", np.int32, 2).tolist()
    state = SavedState(
        key=key,
        model=model,
        tokens=array("tokens.npy", np.int32, n_tokens),
        is_full=array("full.npy", np.bool_, n_tokens),
        positions=array("positions.npy", np.int32, n_tokens + 1),
        cells=read_member(archive, "kv.bin"),
        images=images,
        first_stale=first_stale,
        n_exact=n_exact,
    )
    if not _is_consistent(state):
        raise ValueError("the state's arrays are inconsistent")
    return state


def _is_consistent(state: SavedState) -> bool:
    """Return True if a state's tokens, images, positions, and stale rows are consistent."""
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


def add_member(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Add a member with a fixed date, so that a clock set before 1980 does not cause an error."""
    archive.writestr(zipfile.ZipInfo(name), content)


def read_member(archive: zipfile.ZipFile, name: str, most_bytes: int | None = None) -> bytes:
    """Return a member's content. Raises ValueError if the member is compressed or too long."""
    info = archive.getinfo(name)  # a compressed member could expand to any size
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
    """Parse a .npy file. Raises ValueError for an unexpected type, length, or size."""
    head, dtype = _NPY.match(content), np.dtype(kind)
    if (
        head is None
        or head[1].decode() != dtype.str
        or int(head[2]) != length
        or len(content) != head.end() + length * dtype.itemsize
    ):
        raise ValueError("unexpected array header")
    return np.frombuffer(content, dtype, offset=head.end())
