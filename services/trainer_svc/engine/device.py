"""What the device can do, and how much of its memory a run has taken."""

from __future__ import annotations

import gc
import os
import resource
import time

import torch

# Large enough for the device to reach its peak, small enough to take a moment and little of its memory.
_MATRIX_SIZE = {"cpu": 1024, "cuda": 4096}
# A GPU is done with one product before the host has read its clock.
_PRODUCTS_IN_A_ROW = {"cpu": 1, "cuda": 16}
_TRIES = 4
_MEMORY_IS_FULL = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


def matrix_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of large square matrix products, the best of some."""
    size, num_products = _MATRIX_SIZE[device.type], _PRODUCTS_IN_A_ROW[device.type]
    # Random, since a GPU's clock is higher where all numbers are alike; by a generator of its own.
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(size, size, generator=generator, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(_TRIES):
        _wait(device)
        started_at = time.perf_counter()
        for _ in range(num_products):
            matrix @ matrix
        _wait(device)
        best = min(best, time.perf_counter() - started_at)
    return num_products * 2 * size**3 / best


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def total_memory_bytes(device: torch.device) -> int:
    """The memory that the device has: the GPU's, or the host's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    pages, page_bytes = (os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE"))
    return pages * page_bytes


def free_unused_memory(device: torch.device) -> None:
    """Gives back what nothing refers to any more. Models refer to themselves, so it has to be looked for."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the GPU's or the host's memory is full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # PyTorch's allocator for the CPU, CUDA itself and its libraries raise plain RuntimeErrors.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY_IS_FULL)


def device_name(device: torch.device) -> str:
    """The device's name and, for a CPU, how many threads compute."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"cpu, {torch.get_num_threads()} threads"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_deterministic() -> None:
    """Has torch choose algorithms that give the same bits each time, where it has any."""
    # cuBLAS needs it said before its first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Only for finding reads of memory that was never written; costs a pass over each new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # no stub
