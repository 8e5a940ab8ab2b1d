"""Memory for page tables and the memmap: begins at a cache line, and is in huge pages where it is large.

Page tables and the memmap are gone through in no order, so with pages of 4 KiB much of the time goes into translating
addresses. NumPy asks for huge pages itself, but from 4 MiB on and wherever the array happens to begin; the page tables
of 1 GiB take 2 MiB, one huge page if they begin at one.
"""

from __future__ import annotations

import math
import mmap
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

HUGE = 2 << 20
"""Size and alignment of a huge page; what is smaller comes from NumPy, whose allocator uses memory again."""
LINE = 64
"""Alignment of what is smaller: a vector of the core's loops does not straddle two cache lines then."""

Scalar = TypeVar("Scalar", bound=np.generic)


def zeros(*shape: int) -> npt.NDArray[np.uint64]:
    """Return a uint64 array of zeros: fresh memory, touched only when it is written."""
    return _zeros(shape, np.dtype(np.uint64))


def copy(array: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """Return a copy of an array, C-contiguous."""
    new = _zeros(array.shape, array.dtype)
    new[...] = array
    return new


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Scalar]) -> npt.NDArray[Scalar]:
    nr = math.prod(shape)
    area: Any = _huge_pages(nr * dtype.itemsize)
    if area is None:
        room = np.zeros(nr * dtype.itemsize + LINE, dtype=np.uint8)
        area = room[-room.ctypes.data % LINE :]
    return np.frombuffer(area, dtype=dtype, count=nr).reshape(shape)


def _huge_pages(nbytes: int) -> memoryview | None:
    """Map memory that begins at a huge page and is advised to consist of them; None where that cannot be had."""
    advice: Any = getattr(mmap, "MADV_HUGEPAGE", None)
    if nbytes < HUGE or advice is None:
        return None
    room = -(-nbytes // HUGE) * HUGE
    try:
        area = mmap.mmap(-1, room + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        begin = -np.frombuffer(area, dtype=np.uint8).ctypes.data % HUGE
        area.madvise(advice, begin, room)
    except OSError:  # no transparent huge pages, or too little memory: NumPy finds out
        return None
    return memoryview(area)[begin : begin + room]
