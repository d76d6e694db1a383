"""How much memory loading a model really took: the peak, and not what was free by accident."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

SAMPLE_SECONDS = 0.002
_PAGE = os.sysconf("SC_PAGE_SIZE")


class PeakMeter:
    """`with PeakMeter(device) as meter: ...` and then `peak_bytes` and, at the end, `held_bytes`, over what was held before.

    On a GPU the allocator counts. On a CPU it is the process's own pages, sampled: pages of files that are only mapped do
    not count, and what others of the process allocate meanwhile does.
    """

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device) if device.startswith("cuda") else None
        self._over = threading.Event()
        self.peak_bytes = self.held_bytes = 0

    def __enter__(self) -> PeakMeter:
        release()
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._base = torch.cuda.memory_allocated(self._cuda)
        else:
            self._base = private_bytes()
            self._sampler = threading.Thread(target=self._sample, name="memory", daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._cuda is not None:
            self.peak_bytes = torch.cuda.max_memory_allocated(self._cuda) - self._base
            self.held_bytes = torch.cuda.memory_allocated(self._cuda) - self._base
        else:
            self._over.set()
            self._sampler.join()
            release()
            self.held_bytes = private_bytes() - self._base

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, private_bytes() - self._base)


def private_bytes() -> int:
    """Of this process's memory, what is in no file."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * _PAGE


def release() -> None:
    """Gives back what nobody holds, so that a difference is one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
