"""Swap slots: how many page-table entries refer to each (the swap map of mm/swapfile.c).

A slot is a swap type and an offset, packed into one `key`. Slots that nobody told the table of count 0;
`ptebatch.mm.account` counts the entries of a new address space. The swap cache's own reference (SWAP_HAS_CACHE) is not
part of a count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ptebatch.errors import ArgumentError, StateError

__all__ = ["KEY_TYPE_SHIFT", "MAX_SWAP_COUNT", "SWAP_MAP_MAX", "SwapTable", "swap_key"]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

KEY_TYPE_SHIFT = 56
"""A key is ``type << KEY_TYPE_SHIFT | offset``."""
SWAP_MAP_MAX = 62
"""The largest count of one byte of the swap map; more needs a continuation page, which serves a page of slots."""
MAX_SWAP_COUNT = (1 << 31) - 1


def swap_key(type: int, offset: int) -> int:
    """Pack a swap type and an offset.

    >>> hex(swap_key(1, 0x200))
    '0x100000000000200'
    """
    if not 0 <= type < 1 << (64 - KEY_TYPE_SHIFT) or not 0 <= offset < 1 << KEY_TYPE_SHIFT:
        raise ArgumentError(f"no swap slot has type {type} and offset {offset}")
    return type << KEY_TYPE_SHIFT | offset


def _keys(keys: Any) -> U64:
    array = np.asarray(keys)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ArgumentError(f"keys must be a one-dimensional array of integers, not {array.dtype} {array.shape}")
    return array.astype(np.uint64)


class SwapTable:
    """Counts of swap slots, as two arrays sorted by key; the compiled core raises counts in place.

    Belongs to a `ptebatch.folio.FolioTable` and is shared like it by all address spaces.
    """

    __slots__ = ("_counts", "_slots")

    def __init__(self) -> None:
        self._slots: U64 = np.zeros(0, dtype=np.uint64)
        self._counts: I64 = np.zeros(0, dtype=np.int64)

    def _find(self, key: int) -> int:
        at = int(np.searchsorted(self._slots, np.uint64(key)))
        return at if at < len(self._slots) and int(self._slots[at]) == key else -1

    def count(self, type: int, offset: int) -> int:
        """References to one slot."""
        at = self._find(swap_key(type, offset))
        return int(self._counts[at]) if at >= 0 else 0

    def add(self, keys: Any, by: int = 1) -> None:
        """Change the counts of slots by `by`, once for each time a key occurs.

        Parameters
        ----------
        keys : array of int, shape (n,)
            From `swap_key`.
        by : int
            Negative to give references back (``swap_free``).

        Raises
        ------
        StateError
            A count would leave its range; nothing is changed.
        """
        slots, nr = np.unique(_keys(keys), return_counts=True)
        self.know(slots)
        at = np.searchsorted(self._slots, slots)
        counts = self._counts[at] + nr * by
        if len(counts) and not 0 <= int(counts.min()) <= int(counts.max()) <= MAX_SWAP_COUNT:
            bad = int(np.flatnonzero((counts < 0) | (counts > MAX_SWAP_COUNT))[0])
            raise StateError(
                f"swap slot {int(slots[bad]) >> KEY_TYPE_SHIFT}:{int(slots[bad]) & (1 << KEY_TYPE_SHIFT) - 1:#x}: "
                f"its count would become {int(counts[bad])}; was it counted (ptebatch.mm.account)?"
            )
        self._counts[at] = counts

    def know(self, keys: Any) -> None:
        """Make slots exist in the table, those that are new with a count of 0."""
        new = np.setdiff1d(_keys(keys), self._slots)
        if len(new):
            slots = np.concatenate([self._slots, new])
            counts = np.concatenate([self._counts, np.zeros(len(new), dtype=np.int64)])
            order = np.argsort(slots, kind="stable")
            self._slots, self._counts = slots[order], counts[order]

    def continued(self, type: int, offset: int, page_shift: int) -> bool:
        """Tell whether some slot of the same page of the swap map counts beyond SWAP_MAP_MAX."""
        page = swap_key(type, offset) >> page_shift
        first, last = (int(np.searchsorted(self._slots, np.uint64(end << page_shift))) for end in (page, page + 1))
        return bool((self._counts[first:last] > SWAP_MAP_MAX).any())

    def table(self) -> tuple[U64, I64]:
        """(keys, counts) of the slots in use, ascending."""
        used = self._counts > 0
        return self._slots[used], self._counts[used]

    @classmethod
    def from_table(cls, keys: U64, counts: I64) -> SwapTable:
        """The table whose `table` this is; the caller has validated it."""
        swap = cls()
        swap._slots, swap._counts = keys.copy(), counts.copy()
        return swap

    def copy(self) -> SwapTable:
        """An independent copy."""
        return self.from_table(self._slots, self._counts)

    def __len__(self) -> int:
        return int(np.count_nonzero(self._counts))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SwapTable):
            return NotImplemented
        return all(np.array_equal(a, b) for a, b in zip(self.table(), other.table(), strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<SwapTable of {len(self)} slots in use>"
