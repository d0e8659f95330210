"""Choose the torch device for computing gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pop_converter.base.errors import PopError
from pop_local.engine.llama.devices import default_threads
from pop_local.workflows.hardware import Hardware

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TorchDevice:
    """A torch device's name and its fastest data type for matrix products."""

    name: str
    matrices: torch.dtype


def torch_device(hardware: Hardware, what: str) -> TorchDevice:
    """Choose the device and set torch's number of threads.

    Raises PopError if torch is missing. `what`: the operation that needs torch, for the message.
    """
    try:
        import torch
    except ImportError:
        raise PopError(
            f"{what}: torch is not installed", "install torch", cause="missing-torch"
        ) from None
    torch.set_num_threads(hardware.n_threads or default_threads())
    if hardware.n_gpu_layers != 0 and torch.cuda.is_available():
        return TorchDevice("cuda", torch.bfloat16)
    # On CPUs without AVX-512 BF16, bfloat16 is slower than float32.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    is_fast = capabilities.get("avx512_bf16") is True
    return TorchDevice("cpu", torch.bfloat16 if is_fast else torch.float32)


@contextmanager
def computing(what: str, hint: str, *, cause: str) -> Iterator[None]:
    """Convert torch's out-of-memory errors in the `with` block to PopError.

    `what`: a name for the computation, for the error message.
    """
    import torch

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = ("not enough memory", "out of memory", "allocate memory")
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in said):
            raise
        raise PopError(f"there is not enough memory for {what}", hint, cause=cause) from error
    finally:
        torch.cuda.empty_cache()
