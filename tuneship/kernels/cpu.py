"""What a run on a CPU needs to know of it: its C library's allocator, its arithmetic."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_memory() -> None:
    """Lets glibc keep freed memory instead of giving it back and asking again at each step.

    A step allocates and frees the same hundreds of megabytes; page faults then cost more than the
    arithmetic. Does nothing where the C library is another.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 64 * 2**20)


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware: twice float32's speed there, an eighth elsewhere."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return False
    flags = next((line.split() for line in info.read_text().splitlines() if line.startswith("flags")), [])
    return "avx512_bf16" in flags or "amx_bf16" in flags
