"""The memmap: PFN -> page and folio state, in memory proportional to the PFN ranges in use.

Storage, read directly by the Cython core (which compares the constants below on import):

* ``_words``: one uint64 per page of the sections in use, see the ``*_BIT`` and ``*_SHIFT`` constants. The counter
  field holds the refcount on a folio's page 0, the large mapcount on page 1, and on page 2 the entire mapcount, unless
  MM-ID slots are there. Counts are plain: 0 is unmapped. An absent page is the word 0.
* ``_aux``: for large folios, ``_aux[head]`` and ``_aux[head + 1]`` are the two MM-ID slots (count, mm id); the top bit
  of ``_aux[head]`` is the maybe-mapped-shared flag. The folio flags AUX_DIRTY and AUX_LOCKED are in ``_aux[head]`` too.
* inline slots: folios of 4, 8 and 16 pages (INLINE_MIN_ORDER to INLINE_MAX_ORDER) but hugetlb have no entire mapcount,
  and what ``_aux`` would cost them is a cache line a folio. Their slots are in the counter fields of pages 2 and 3: a
  count of INLINE_COUNT_BITS, the mm id, and as top bit on page 2 the maybe-mapped-shared flag, on page 3 *spilled*.
  A folio is spilled exactly while a count does not fit; then nothing else is in the two fields, and the slots are in
  ``_aux``, which holds none otherwise. `FolioTable._mm_slots` and `FolioTable._set_mm_slots` know where slots are.
* sections of 64 pages behind a two-level index: ``_top[pfn >> 18]`` is a block number of ``_sub`` (or -1), and
  ``_sub[block * 4096 + (pfn >> 6 & 4095)]`` is ``section << 1 | full`` (or -1). A folio larger than a section has
  consecutive sections.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ptebatch import memory
from ptebatch.errors import ArgumentError, PfnError, StateError
from ptebatch.swap import SwapTable

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

MAPCOUNT_BITS = 24
COUNTER_SHIFT = 24
COUNTER_BITS = 26
ORDER_SHIFT = 50
ORDER_BITS = 5
DEVICE_BIT = 55
AE_BIT = 56
ANON_BIT = 57
SWAPBACKED_BIT = 58
KSM_BIT = 59
HUGETLB_BIT = 60
PINNED_BIT = 61
HWPOISON_BIT = 62
VALID_BIT = 63
AUX_COUNT_BITS = 26
AUX_ID_BITS = 20
AUX_DIRTY_BIT = 46
AUX_LOCKED_BIT = 47
AUX_SHARED_BIT = 63
INLINE_MIN_ORDER = 2
INLINE_MAX_ORDER = 4
INLINE_COUNT_BITS = 5
SECTION_SHIFT = 6
SECTION_PAGES = 1 << SECTION_SHIFT
TOP_SHIFT = 18
BLOCK_SECTIONS = 1 << (TOP_SHIFT - SECTION_SHIFT)
MAX_ORDER = 18
MAX_PFN = (1 << 40) - 1
MAX_MAPCOUNT = (1 << MAPCOUNT_BITS) - 1
MAX_COUNTER = (1 << COUNTER_BITS) - 1
MAX_MM_ID = (1 << AUX_ID_BITS) - 1
MAX_INLINE_COUNT = (1 << INLINE_COUNT_BITS) - 1
NEAR_LIMIT = 1 << (MAPCOUNT_BITS - 2)
GUP_PIN_COUNTING_BIAS = 1024
PIECE = 1 << 16
"""Pages that are looked up at a time, so that what comes of it on the way stays in the cache."""

_MAPCOUNT = np.uint64(MAX_MAPCOUNT)
_NO_COUNTER = ~(MAX_COUNTER << COUNTER_SHIFT) & (1 << 64) - 1
_SLOT = 1 << AUX_SHARED_BIT | MAX_MM_ID << AUX_COUNT_BITS | MAX_COUNTER
"""What of ``_aux`` belongs to an MM-ID slot."""
_NO_SLOT = ~_SLOT & (1 << 64) - 1
_INLINE_FLAG = 1 << COUNTER_SHIFT + COUNTER_BITS - 1
"""Top bit of a counter field: maybe-mapped-shared on page 2 of a folio with inline slots, spilled on page 3."""
_FLAG_SHIFT = AUX_SHARED_BIT - (COUNTER_SHIFT + COUNTER_BITS - 1)
_ID_SHIFT = COUNTER_SHIFT + INLINE_COUNT_BITS - AUX_COUNT_BITS
_NO_ENTIRE_MAPCOUNT = "a folio of order {order} has no entire_mapcount: it takes order 5 or more, for hugetlb 2"
_FLAG_BITS = {
    "anon": ANON_BIT,
    "swapbacked": SWAPBACKED_BIT,
    "ksm": KSM_BIT,
    "hugetlb": HUGETLB_BIT,
    "device": DEVICE_BIT,
}


def _count(name: str, value: Any, most: int) -> int:
    try:
        number = value.__index__()
    except AttributeError:
        raise ArgumentError(f"{name} must be an integer, not {type(value).__name__}") from None
    if not 0 <= number <= most:
        raise StateError(f"{name} must be in 0..{most}, not {number}")
    return int(number)


def _pfn_array(name: str, pfns: Any) -> I64:
    array = np.asarray(pfns)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ArgumentError(f"{name} must be a one-dimensional array of integers, not {array.dtype} {array.shape}")
    if array.size and (int(array.min()) < 0 or int(array.max()) > MAX_PFN):
        raise ArgumentError(f"{name} must hold PFNs in 0..{MAX_PFN:#x}")
    return array.astype(np.int64)


class FolioTable:
    """Pages and folios by page frame number; shared by all address spaces that map them.

    Attributes
    ----------
    swap : SwapTable
        Counts of swap slots, for memory that is swapped out.
    zero_pfn, huge_zero_pfn : int or None
        Where the shared zero page and the first page of the huge one are. Neither needs a folio.
    """

    __slots__ = (
        "_aux", "_extent", "_free_hint", "_near_limit", "_next_mm_id", "_nr_sections", "_pincounts", "_section_of",
        "_sub", "_top", "_words", "huge_zero_pfn", "swap", "zero_pfn", "__weakref__",
    )  # fmt: skip

    def __init__(self) -> None:
        self._words: U64 = np.zeros(0, dtype=np.uint64)
        self._aux: U64 = np.zeros(0, dtype=np.uint64)
        self._top: npt.NDArray[np.int32] = np.full(0, -1, dtype=np.int32)
        self._sub: npt.NDArray[np.int32] = np.full(0, -1, dtype=np.int32)
        self._section_of: I64 = np.zeros(0, dtype=np.int64)  # section number -> pfn >> SECTION_SHIFT
        self._nr_sections = 0
        self._pincounts: dict[int, int] = {}
        self._near_limit = False
        self._extent: tuple[int, int, int] | None = None
        self._next_mm_id = 1
        self._free_hint = 1
        self.swap = SwapTable()
        self.zero_pfn: int | None = None
        self.huge_zero_pfn: int | None = None

    # --- index --------------------------------------------------------------------------------------------------------

    def _sub_slots(self, sections: I64) -> I64:
        """Positions in _sub of PFN sections; -1 where there is no block."""
        blocks = sections >> (TOP_SHIFT - SECTION_SHIFT)
        inside = blocks < len(self._top)
        block = np.full(len(sections), -1, dtype=np.int64)
        block[inside] = self._top[blocks[inside]]
        return np.where(block < 0, -1, block * BLOCK_SECTIONS + (sections & (BLOCK_SECTIONS - 1)))

    def _section_numbers(self, sections: I64) -> I64:
        slots = self._sub_slots(sections)
        numbers = np.full(len(sections), -1, dtype=np.int64)
        there = slots >= 0
        numbers[there] = self._sub[slots[there]] >> 1  # -1 stays -1
        return numbers

    def lookup(self, pfns: Any) -> I64:
        """Index of each PFN's word in the section storage, int64; -1 where no section or no page is."""
        array = _pfn_array("pfns", pfns)
        index = self._index(array)
        there = index >= 0
        index[there] = np.where(self._words[index[there]] >> np.uint64(VALID_BIT) != 0, index[there], -1)
        return index

    def _index(self, pfns: I64) -> I64:
        numbers = self._section_numbers(pfns >> SECTION_SHIFT)
        return np.where(numbers < 0, -1, (numbers << SECTION_SHIFT) + (pfns & (SECTION_PAGES - 1)))

    def _at(self, pfn: int) -> int:
        """Index of a page that exists; PfnError otherwise."""
        index = self._find(pfn)
        if index < 0 or not int(self._words[index]) >> VALID_BIT:
            raise PfnError(pfn=pfn)
        return index

    def _find(self, pfn: int) -> int:
        block = pfn >> TOP_SHIFT
        if pfn < 0 or block >= len(self._top) or self._top[block] < 0:
            return -1
        entry = int(self._sub[int(self._top[block]) * BLOCK_SECTIONS + (pfn >> SECTION_SHIFT) % BLOCK_SECTIONS])
        return -1 if entry < 0 else (entry >> 1) * SECTION_PAGES + pfn % SECTION_PAGES

    def _add_sections(self, sections: I64) -> None:
        """Make sections exist. Those given that are new get consecutive numbers in PFN order."""
        sections = np.unique(sections)
        new = sections[self._section_numbers(sections) < 0]
        if not len(new):
            return
        blocks = np.unique(new >> (TOP_SHIFT - SECTION_SHIFT))
        if blocks[-1] >= len(self._top):
            top = np.full(max(int(blocks[-1]) + 1, 2 * len(self._top)), -1, dtype=np.int32)
            top[: len(self._top)] = self._top
            self._top = top
        fresh = blocks[self._top[blocks] < 0]
        if len(fresh):
            nr_blocks = len(self._sub) // BLOCK_SECTIONS
            self._top[fresh] = np.arange(nr_blocks, nr_blocks + len(fresh), dtype=np.int32)
            self._sub = np.concatenate([self._sub, np.full(len(fresh) * BLOCK_SECTIONS, -1, dtype=np.int32)])
        first, last = self._nr_sections, self._nr_sections + len(new)
        if last >= 1 << 30:
            raise StateError("more than 2^36 pages in one FolioTable")
        self._reserve_sections(last)
        self._sub[self._sub_slots(new)] = (np.arange(first, last) << 1).astype(np.int32)
        self._section_of[first:last] = new
        self._nr_sections = last

    def _reserve_sections(self, nr: int) -> None:
        if nr <= len(self._section_of):
            return
        # The first sections get what they need; later growth is amortised.
        room = nr if not len(self._section_of) else max(nr, len(self._section_of) * 5 // 4)
        words, aux = (memory.zeros(room * SECTION_PAGES) for _ in range(2))
        used = self._nr_sections * SECTION_PAGES
        words[:used], aux[:used] = self._words[:used], self._aux[:used]
        section_of = np.zeros(room, dtype=np.int64)
        section_of[: self._nr_sections] = self._section_of[: self._nr_sections]
        self._words, self._aux, self._section_of = words, aux, section_of

    def _sort_sections(self) -> None:
        """Renumber all sections in PFN order, so that neighbours are consecutive."""
        n = self._nr_sections
        order = np.argsort(self._section_of[:n], kind="stable")
        full = self._sub[self._sub_slots(self._section_of[:n])] & 1
        for name in ("_words", "_aux"):
            array = getattr(self, name)
            array[: n * SECTION_PAGES] = array[: n * SECTION_PAGES].reshape(n, SECTION_PAGES)[order].reshape(-1)
        self._section_of[:n] = self._section_of[:n][order]
        self._sub[self._sub_slots(self._section_of[:n])] = (np.arange(n) << 1 | full[order]).astype(np.int32)
        self._extent = None

    def _update_full(self, sections: I64) -> None:
        """Recompute the `full` bit of existing sections."""
        numbers = self._section_numbers(sections)
        n = self._nr_sections
        valid = self._words[: n * SECTION_PAGES].reshape(n, SECTION_PAGES)[numbers] >> np.uint64(VALID_BIT)
        full = (valid != 0).all(axis=1)
        self._sub[self._sub_slots(sections)] = (numbers << 1 | full).astype(np.int32)
        self._extent = None

    def extent(self) -> tuple[int, int, int]:
        """Longest stretch of memory whose pages all exist and whose words lie in order: (first PFN, pages, index).

        What lies in it needs no look at the index: `index` is that of the first page's word.
        """
        if self._extent is None:
            sections = self._section_of[: self._nr_sections]
            full = self._sub[self._sub_slots(sections)] & 1
            # Runs of consecutive full sections: each begins where the one before is not its neighbour.
            begins = np.flatnonzero(full & np.r_[True, (np.diff(sections) != 1) | (full[:-1] == 0)])
            ends = np.flatnonzero(full & np.r_[(np.diff(sections) != 1) | (full[1:] == 0), True]) + 1
            longest = int(np.argmax(ends - begins)) if len(begins) else 0
            first, last = (int(begins[longest]), int(ends[longest])) if len(begins) else (0, 0)
            pfn = int(sections[first]) << SECTION_SHIFT if last else 0
            self._extent = (pfn, (last - first) << SECTION_SHIFT, first << SECTION_SHIFT)
        return self._extent

    # --- folios -------------------------------------------------------------------------------------------------------

    def add(
        self,
        pfn: int,
        order: int = 0,
        *,
        anon: bool = True,
        swapbacked: bool | None = None,
        ksm: bool = False,
        hugetlb: bool = False,
        device: bool = False,
        refcount: int = 0,
        mapcount: int | Sequence[int] = 0,
        anon_exclusive: bool | Sequence[bool] = False,
        large_mapcount: int | None = None,
        entire_mapcount: int = 0,
        pincount: int = 0,
    ) -> None:
        """Add one folio with its state; see `Folio` and `Page` for the fields.

        `mapcount` and `anon_exclusive` are one value for all pages or a sequence of one per page; `large_mapcount`
        defaults to the sum of the mapcounts plus the entire mapcount.
        """
        order = _count("order", order, MAX_ORDER)
        nr = 1 << order
        refcount = _count("refcount", refcount, MAX_COUNTER)
        counts = [mapcount] * nr if np.isscalar(mapcount) or hasattr(mapcount, "__index__") else list(mapcount)
        exclusive = [anon_exclusive] * nr if isinstance(anon_exclusive, (bool, np.bool_)) else list(anon_exclusive)
        if len(counts) != nr or len(exclusive) != nr:
            raise ArgumentError(f"mapcount and anon_exclusive must have one value for each of the {nr} pages")
        counts = [_count("mapcount", count, MAX_MAPCOUNT) for count in counts]
        entire_mapcount = _count("entire_mapcount", entire_mapcount, MAX_COUNTER)
        if large_mapcount is None:
            large_mapcount = sum(counts) + entire_mapcount
        large_mapcount = _count("large_mapcount", large_mapcount, MAX_COUNTER)
        pincount = _count("pincount", pincount, MAX_COUNTER)
        if order == 0 and pincount:
            raise ArgumentError("a small folio has no pincount; add 1024 to its refcount for each pin")
        if entire_mapcount and not has_entire_mapcount(order, hugetlb):
            raise ArgumentError(_NO_ENTIRE_MAPCOUNT.format(order=order))
        self.add_folios(
            [pfn], order, anon=anon, swapbacked=swapbacked, ksm=ksm, hugetlb=hugetlb, device=device
        )
        at = self._find(int(pfn))
        words = np.array(counts, dtype=np.uint64) | np.array(exclusive, dtype=np.uint64) << np.uint64(AE_BIT)
        self._words[at : at + nr] |= words
        folio = self.folio(int(pfn))
        folio.refcount = refcount
        if order:
            folio.large_mapcount = large_mapcount
            folio.pincount = pincount
        if entire_mapcount:
            folio.entire_mapcount = entire_mapcount
        self._near_limit |= max(counts) >= NEAR_LIMIT

    def add_folios(
        self,
        head_pfns: Any,
        order: Any,
        *,
        anon: Any = True,
        swapbacked: Any = None,
        ksm: Any = False,
        hugetlb: Any = False,
        device: Any = False,
    ) -> None:
        """Add unmapped folios in bulk.

        Parameters
        ----------
        head_pfns : array of int, shape (n,)
            Head PFNs, each a multiple of its folio's number of pages.
        order : int, or array of int of shape (n,)
        anon, swapbacked, ksm, hugetlb, device : bool, or bool array of shape (n,)
            `swapbacked` defaults to `anon`.

        Raises
        ------
        ArgumentError
            Misaligned, overlapping or absurd folios; nothing is added.
        """
        heads = _pfn_array("head_pfns", head_pfns)
        orders = np.asarray(order)
        if orders.dtype.kind not in "iu":
            raise ArgumentError(f"order must be an integer or an array of integers, not {orders.dtype}")
        if not len(heads):
            return
        orders = np.broadcast_to(orders.astype(np.int64), heads.shape)
        if orders.min() < 0 or orders.max() > MAX_ORDER:
            raise ArgumentError(f"order must be in 0..{MAX_ORDER}")
        nr = np.int64(1) << orders
        if (heads & (nr - 1)).any():
            bad = int(np.flatnonzero(heads & (nr - 1))[0])
            raise ArgumentError(f"head PFN {int(heads[bad]):#x} is not a multiple of {int(nr[bad])} pages")
        if int((heads + nr).max()) > MAX_PFN + 1:
            raise ArgumentError(f"a folio reaches beyond PFN {MAX_PFN:#x}")
        by_pfn = np.argsort(heads, kind="stable")
        heads, orders, nr = heads[by_pfn], orders[by_pfn], nr[by_pfn]
        if (heads[:-1] + nr[:-1] > heads[1:]).any():
            bad = int(np.flatnonzero(heads[:-1] + nr[:-1] > heads[1:])[0])
            raise ArgumentError(f"the folios at PFN {int(heads[bad]):#x} and {int(heads[bad + 1]):#x} overlap")
        flags = np.full(len(heads), np.uint64(1) << np.uint64(VALID_BIT), dtype=np.uint64)
        values = {"anon": anon, "swapbacked": anon if swapbacked is None else swapbacked, "ksm": ksm,
                  "hugetlb": hugetlb, "device": device}  # fmt: skip
        for name, value in values.items():
            array = np.broadcast_to(np.asarray(value, dtype=bool), heads.shape)[by_pfn]
            flags |= array.astype(np.uint64) << np.uint64(_FLAG_BITS[name])
        flags |= orders.astype(np.uint64) << np.uint64(ORDER_SHIFT)

        first, last = heads >> SECTION_SHIFT, (heads + nr - 1) >> SECTION_SHIFT
        spans = last - first + 1
        sections = np.unique(_ranges(first, spans))
        pfns = _ranges(heads, nr)
        index = self._index(pfns)
        taken = index >= 0
        if taken.any() and (self._words[index[taken]] >> np.uint64(VALID_BIT)).any():
            pfn = int(pfns[taken][np.flatnonzero(self._words[index[taken]] >> np.uint64(VALID_BIT))[0]])
            raise ArgumentError(f"PFN {pfn:#x} already belongs to a folio")
        self._add_sections(sections)
        large = spans > 1
        if large.any():
            low = self._section_numbers(first[large])
            high = self._section_numbers(last[large])
            inner = self._section_numbers(_ranges(first[large], spans[large]))
            if (inner != _ranges(low, spans[large])).any() or (high - low != spans[large] - 1).any():
                self._sort_sections()
        index = self._index(pfns)
        self._words[index] = np.repeat(flags, nr)
        self._aux[index] = 0
        self._update_full(sections)

    def fill_mapped(self, first_pfn: int, nr: int, order: int, *, mm_id: int) -> None:
        """Write neighbouring anonymous folios in which every page is mapped once, by `mm_id`, and anon-exclusive.

        Like `add_folios` and `map_ptes`, but whatever is in the range is replaced, and no memory is needed besides that
        of the pages.

        Parameters
        ----------
        first_pfn : int
        nr, order : int
            Folios and their order. They begin and end at multiples of 64 pages, and `first_pfn` is one of the folio's.
        """
        nr_pages = 1 << _count("order", order, MAX_ORDER)
        pages = _count("nr", nr, MAX_PFN) << order
        whole = first_pfn % max(nr_pages, SECTION_PAGES) == pages % SECTION_PAGES == 0
        if not whole or not 0 <= first_pfn <= MAX_PFN + 1 - pages:
            raise ArgumentError(f"{nr} folios of order {order} at PFN {first_pfn:#x} do not fill whole sections")
        if not pages:
            return
        sections = np.arange(first_pfn >> SECTION_SHIFT, (first_pfn + pages) >> SECTION_SHIFT)
        self._add_sections(sections)
        numbers = self._section_numbers(sections)
        if (np.diff(numbers) != 1).any():
            self._sort_sections()
            numbers = self._section_numbers(sections)
        slots = self._sub_slots(sections)
        if not (self._sub[slots] & 1).all():
            self._sub[slots] |= 1
            self._extent = None
        at = int(numbers[0]) << SECTION_SHIFT
        words, aux = (array[at : at + pages].reshape(nr, nr_pages) for array in (self._words, self._aux))
        flags = 1 << VALID_BIT | 1 << ANON_BIT | 1 << SWAPBACKED_BIT | 1 << AE_BIT | order << ORDER_SHIFT
        words[...] = flags | 1
        words[:, :2] += np.uint64(nr_pages << COUNTER_SHIFT)  # refcount and large mapcount; of a small folio, the first
        aux[...] = 0
        mm_id = _count("mm_id", mm_id, MAX_MM_ID)
        if INLINE_MIN_ORDER <= order <= INLINE_MAX_ORDER:
            words[:, 2] += np.uint64((mm_id << INLINE_COUNT_BITS | nr_pages) << COUNTER_SHIFT)
        elif order:
            aux[:, 0] = mm_id << AUX_COUNT_BITS | nr_pages

    def remove(self, head_pfn: int) -> None:
        """Take a folio away (its pages are free afterwards)."""
        folio = self.folio(head_pfn)
        self.remove_folios([folio.pfn])

    def remove_folios(self, head_pfns: Any) -> None:
        """Take folios away in bulk; each must exist and be named by its head."""
        heads = np.unique(_pfn_array("head_pfns", head_pfns))
        if not len(heads):
            return
        index = self.lookup(heads)
        if (index < 0).any():
            raise PfnError(pfn=int(heads[np.flatnonzero(index < 0)[0]]))
        orders = (self._words[index] >> np.uint64(ORDER_SHIFT) & np.uint64((1 << ORDER_BITS) - 1)).astype(np.int64)
        nr = np.int64(1) << orders
        if (heads & (nr - 1)).any():
            bad = int(heads[np.flatnonzero(heads & (nr - 1))[0]])
            raise ArgumentError(f"PFN {bad:#x} is not the head of its folio")
        pfns = _ranges(heads, nr)
        index = self._index(pfns)
        self._words[index] = 0
        self._aux[index] = 0
        if self._pincounts:
            for head in heads.tolist():
                self._pincounts.pop(head, None)
        self._update_full(np.unique(pfns >> SECTION_SHIFT))
        self._free_hint = min(self._free_hint, max(1, int(heads[0])))

    def reserve(self, n: int) -> U64:
        """Find the `n` lowest free PFNs from 1 on, in address order, as uint64[n]; they stay free.

        Their sections exist afterwards, so that the core can make them pages.
        """
        n = _count("n", n, 1 << 36)
        found: list[I64] = []
        missing = n
        pfn = self._free_hint
        while missing > 0:
            pfns = np.arange(pfn, pfn + max(SECTION_PAGES, 2 * missing), dtype=np.int64)
            index = self._index(pfns)
            free = index < 0
            there = ~free
            free[there] = self._words[index[there]] == 0
            hits = pfns[free][:missing]
            if not found and len(hits):
                self._free_hint = int(hits[0])
            found.append(hits)
            missing -= len(hits)
            pfn += len(pfns)
        pfns = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
        if len(pfns):
            if int(pfns[-1]) > MAX_PFN:
                raise StateError("no free PFN is left")
            self._add_sections(pfns >> SECTION_SHIFT)
        return pfns.astype(np.uint64)

    def alloc(self, order: int = 0, *, hugetlb: bool = False) -> int:
        """Make a new anonymous folio at the lowest free, aligned PFN; return its head PFN."""
        order = _count("order", order, MAX_ORDER)
        if order == 0:
            pfn = int(self.reserve(1)[0])
        else:
            nr = 1 << order
            pfn = nr
            while (self.lookup(np.arange(pfn, pfn + nr)) >= 0).any():
                pfn += nr
        self.add_folios([pfn], order, hugetlb=hugetlb)
        return pfn

    def _prepare_pages(self, pfns: Iterable[int]) -> None:
        """Make the sections of free PFNs exist before the core turns them into pages."""
        for pfn in pfns:
            if pfn in self:
                raise ArgumentError(f"prealloc: PFN {pfn:#x} already belongs to a folio")
            self._add_sections(np.array([pfn >> SECTION_SHIFT]))

    def _walked(self, new_pages: Any, near_limit: bool) -> None:
        """Take note of what a walk of the core did: pages it made, counts it saw near their limit."""
        self._near_limit |= near_limit
        if len(new_pages):
            pfns = np.asarray(new_pages, dtype=np.int64)
            self._update_full(np.unique(pfns >> SECTION_SHIFT))

    def _zapped(self, lowest_freed: int | None) -> None:
        """Take note of what the core freed."""
        if lowest_freed is None:
            return
        self._extent = None  # what is freed may lie in it
        self._free_hint = min(self._free_hint, max(1, lowest_freed))
        for head in [head for head in self._pincounts if head not in self]:
            del self._pincounts[head]

    def map_ptes(self, pfns: Any, *, mm_id: int, anon_exclusive: Any = None) -> None:
        """Account PTE mappings by `mm_id` in bulk: mapcount, refcount, large mapcount, MM-ID slots.

        Parameters
        ----------
        pfns : array of int, shape (n,)
            One PFN per mapping PTE; a PFN may occur more than once.
        mm_id : int
        anon_exclusive : bool array of shape (n,), optional
            Pages to mark PG_anon_exclusive; others are left as they are.

        Raises
        ------
        PfnError, StateError
            A PFN without a page; a count that would leave its range. Nothing is changed.
        """
        mm_id = _count("mm_id", mm_id, MAX_MM_ID)
        array = _pfn_array("pfns", pfns)
        if not len(array):
            return
        index = self.lookup(array)
        if (index < 0).any():
            raise PfnError(pfn=int(array[np.flatnonzero(index < 0)[0]]))
        words = self._words[index]
        order = (words >> np.uint64(ORDER_SHIFT) & np.uint64((1 << ORDER_BITS) - 1)).astype(np.int64)
        heads = index - (array & ((np.int64(1) << order) - 1))
        pages, nr_page = tally(index)
        folios, nr_folio = tally(heads)
        large = self._words[folios] >> np.uint64(ORDER_SHIFT) & np.uint64((1 << ORDER_BITS) - 1) != 0
        new_map = (self._words[pages] & _MAPCOUNT).astype(np.int64) + nr_page
        new_ref = self._counter(folios) + nr_folio
        big, nr_big = folios[large], nr_folio[large]
        new_large = self._counter(big + 1) + nr_big
        if new_map.max() > MAX_MAPCOUNT or new_ref.max() > MAX_COUNTER or (len(big) and new_large.max() > MAX_COUNTER):
            raise StateError("a mapcount or refcount would leave its range")
        self._words[pages] += nr_page.astype(np.uint64)
        if anon_exclusive is not None:
            marked = index[np.broadcast_to(np.asarray(anon_exclusive, dtype=bool), array.shape)]
            self._words[marked] |= np.uint64(1 << AE_BIT)
        self._words[folios] += nr_folio.astype(np.uint64) << np.uint64(COUNTER_SHIFT)
        self._words[big + 1] += nr_big.astype(np.uint64) << np.uint64(COUNTER_SHIFT)
        self._near_limit |= bool(new_map.max() >= NEAR_LIMIT)
        tracked = self._words[big] >> np.uint64(HUGETLB_BIT) & np.uint64(1) == 0
        self._add_mm_mappings(big[tracked], mm_id, nr_big[tracked].astype(np.uint64))

    def _counter(self, index: I64) -> I64:
        return (self._words[index] >> np.uint64(COUNTER_SHIFT) & np.uint64(MAX_COUNTER)).astype(np.int64)

    def _add_mm_mappings(self, heads: I64, mm_id: int, nr: U64) -> None:
        id_mask, mine = np.uint64(MAX_MM_ID << AUX_COUNT_BITS), np.uint64(mm_id << AUX_COUNT_BITS)
        shared = np.uint64(1 << AUX_SHARED_BIT)
        slot0, slot1 = self._mm_slots(heads)
        in0 = slot0 & id_mask == mine
        in1 = ~in0 & (slot1 & id_mask == mine)
        to0 = ~in0 & ~in1 & (slot0 & id_mask == 0)
        to1 = ~in0 & ~in1 & ~to0 & (slot1 & id_mask == 0)
        slot0 = np.where(in0, slot0 + nr, np.where(to0, slot0 | mine | nr, slot0))
        slot1 = np.where(in1, slot1 + nr, np.where(to1, slot1 | mine | nr, slot1))
        others = to1 | (to0 & (self._counter(heads + 1).astype(np.uint64) != nr))
        self._set_mm_slots(heads, np.where(others, slot0 | shared, slot0), slot1)

    def _mm_slots(self, heads: I64) -> tuple[U64, U64]:
        """MM-ID slots of large folios, given by the indices of their heads: each count, id and flag as in ``_aux``."""
        slot0, slot1 = self._aux[heads] & np.uint64(_SLOT), self._aux[heads + 1] & np.uint64(_SLOT)
        inline = _has_inline_slots(self._words[heads])
        inline[inline] = self._words[heads[inline] + 3] & _INLINE_FLAG == 0  # not spilled
        at = heads[inline]
        slot0[inline], slot1[inline] = (_unpacked(self._words[at + page]) for page in (2, 3))
        return slot0, slot1

    def _set_mm_slots(self, heads: I64, slot0: U64, slot1: U64) -> None:
        """Write what `_mm_slots` reads; no folio may be given twice."""
        inline = _has_inline_slots(self._words[heads])
        fits = inline & _fit(slot0, slot1)
        self._aux[heads] = self._aux[heads] & _NO_SLOT | np.where(fits, 0, slot0)
        self._aux[heads + 1] = np.where(fits, 0, slot1)
        at, fits, slot0, slot1 = heads[inline], fits[inline], slot0[inline], slot1[inline]
        self._words[at + 2] = self._words[at + 2] & _NO_COUNTER | np.where(fits, _packed(slot0), 0)
        self._words[at + 3] = self._words[at + 3] & _NO_COUNTER | np.where(fits, _packed(slot1), _INLINE_FLAG)

    # --- reading ------------------------------------------------------------------------------------------------------

    def __contains__(self, pfn: object) -> bool:
        if not hasattr(pfn, "__index__"):
            return False
        index = self._find(pfn.__index__())
        return index >= 0 and int(self._words[index]) >> VALID_BIT != 0

    def _valid(self) -> I64:
        """Indices of all pages, in PFN order."""
        n = self._nr_sections * SECTION_PAGES
        index = np.flatnonzero(self._words[:n] >> np.uint64(VALID_BIT))
        return index[np.argsort(self._pfns_at(index), kind="stable")]

    def _pfns_at(self, index: I64) -> I64:
        return (self._section_of[index >> SECTION_SHIFT] << SECTION_SHIFT) + (index & (SECTION_PAGES - 1))

    def __len__(self) -> int:
        n = self._nr_sections * SECTION_PAGES
        return int(np.count_nonzero(self._words[:n] >> np.uint64(VALID_BIT)))

    def metadata_bytes(self) -> tuple[float, float]:
        """Bytes for each page of the sections in use: of the pages' own, and of the index to them."""
        pages = self._nr_sections * SECTION_PAGES
        if not pages:
            return 0.0, 0.0
        index = sum(array.nbytes for array in (self._top, self._sub, self._section_of))
        return (self._words.nbytes + self._aux.nbytes) / pages, index / pages

    def heads(self) -> I64:
        """Head PFNs of all folios, ascending, int64."""
        index = self._valid()
        pfns = self._pfns_at(index)
        order = (self._words[index] >> np.uint64(ORDER_SHIFT) & np.uint64((1 << ORDER_BITS) - 1)).astype(np.int64)
        return pfns[pfns & ((np.int64(1) << order) - 1) == 0]

    def page(self, pfn: int) -> Page:
        """The page of a PFN; PfnError if there is none."""
        self._at(pfn)
        return Page(self, int(pfn))

    def folio(self, pfn: int) -> Folio:
        """The folio a PFN belongs to; PfnError if there is none."""
        order = int(self._words[self._at(pfn)]) >> ORDER_SHIFT & ((1 << ORDER_BITS) - 1)
        return Folio(self, int(pfn) >> order << order, order)

    def _field(self, pfns: Any, shift: int, mask: int) -> U64:
        array = _pfn_array("pfns", pfns)
        field = np.empty(len(array), dtype=np.uint64)
        for at in range(0, len(array), PIECE):
            index = self.lookup(array[at : at + PIECE])
            if (index < 0).any():
                raise PfnError(pfn=int(array[at + np.flatnonzero(index < 0)[0]]))
            field[at : at + PIECE] = self._words[index] >> np.uint64(shift) & np.uint64(mask)
        return field

    def mapcounts(self, pfns: Any) -> I64:
        """Mapcount of each page, int64."""
        return self._field(pfns, 0, MAX_MAPCOUNT).astype(np.int64)

    def refcounts(self, pfns: Any) -> I64:
        """Refcount of each page's folio, int64."""
        array = _pfn_array("pfns", pfns)
        orders = self.orders(array)
        return self._field(array >> orders << orders, COUNTER_SHIFT, MAX_COUNTER).astype(np.int64)

    def orders(self, pfns: Any) -> I64:
        """Order of each page's folio, int64."""
        return self._field(pfns, ORDER_SHIFT, (1 << ORDER_BITS) - 1).astype(np.int64)

    def flags(self, pfns: Any, name: str) -> npt.NDArray[np.bool_]:
        """One flag of each page: anon, swapbacked, ksm, hugetlb, device, anon_exclusive, hwpoison; bool."""
        bits = {**_FLAG_BITS, "anon_exclusive": AE_BIT, "hwpoison": HWPOISON_BIT}
        if name not in bits:
            raise ArgumentError(f"no flag {name!r}; there are {', '.join(bits)}")
        return self._field(pfns, bits[name], 1).astype(bool)

    def pages_table(self) -> dict[str, npt.NDArray[Any]]:
        """All pages as columns in PFN order: ``pfn`` int64, ``word`` and ``aux`` uint64, ``pincount`` int64.

        The MM-ID slots of all folios are in ``aux``, and page 2 has no count but the entire mapcount.
        """
        index = self._valid()
        pfns = self._pfns_at(index)
        words, aux = self._words[index], self._aux[index]
        inline = np.flatnonzero(_has_inline_slots(words) & (_offsets(words, pfns) == 0))
        slot0, slot1 = self._mm_slots(index[inline])
        words[inline + 2] &= _NO_COUNTER
        words[inline + 3] &= _NO_COUNTER
        aux[inline] = aux[inline] & _NO_SLOT | slot0
        aux[inline + 1] = slot1
        pincount = np.zeros(len(pfns), dtype=np.int64)
        for head, count in self._pincounts.items():
            pincount[np.searchsorted(pfns, head)] = count
        return {"pfn": pfns, "word": words, "aux": aux, "pincount": pincount}

    @classmethod
    def from_pages_table(cls, table: dict[str, npt.NDArray[Any]]) -> FolioTable:
        """The table `pages_table` wrote; the caller has validated it."""
        folios = cls()
        pfns = np.asarray(table["pfn"], dtype=np.int64)
        if len(pfns):
            folios._add_sections(pfns >> SECTION_SHIFT)
            index = folios._index(pfns)
            folios._words[index] = table["word"]
            folios._aux[index] = table["aux"]
            heads = index[_has_inline_slots(table["word"]) & (_offsets(table["word"], pfns) == 0)]
            if folios._counter(heads + 2).any():
                raise StateError(f"an entire mapcount in a folio of {1 << INLINE_MAX_ORDER} pages or fewer")
            folios._set_mm_slots(heads, *(folios._aux[heads + k] & np.uint64(_SLOT) for k in (0, 1)))
            folios._update_full(np.unique(pfns >> SECTION_SHIFT))
            folios._near_limit = bool((table["word"] & _MAPCOUNT).max() >= NEAR_LIMIT)
        pinned = np.flatnonzero(table["pincount"])
        folios._pincounts = {int(pfns[i]): int(table["pincount"][i]) for i in pinned}
        ids = table["aux"] >> np.uint64(AUX_COUNT_BITS) & np.uint64(MAX_MM_ID)
        folios._next_mm_id = int(ids.max()) + 1 if len(ids) else 1
        return folios

    def copy(self) -> FolioTable:
        """An independent copy."""
        other = FolioTable()
        other.assign(self)
        return other

    def assign(self, other: FolioTable) -> None:
        """Take over the state of another table; storage of the same size, or more for sections, is written in place."""
        for name in ("_words", "_aux", "_section_of", "_top", "_sub"):
            mine, theirs = getattr(self, name), getattr(other, name)
            room = len(mine) - len(theirs)
            if not room or (room > 0 and name not in ("_top", "_sub")):
                mine[: len(theirs)] = theirs
                mine[len(theirs) :] = 0
            else:
                setattr(self, name, memory.copy(theirs))
        for name in ("_nr_sections", "_near_limit", "_next_mm_id", "_free_hint", "zero_pfn", "huge_zero_pfn"):
            setattr(self, name, getattr(other, name))
        self._extent = other.extent()
        self._pincounts = dict(other._pincounts)
        self.swap = other.swap.copy()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FolioTable):
            return NotImplemented
        mine, theirs = self.pages_table(), other.pages_table()
        return all(np.array_equal(mine[name], theirs[name]) for name in mine) and self.swap == other.swap

    __hash__ = None  # type: ignore[assignment]

    @property
    def nbytes(self) -> int:
        """Bytes of metadata: words, slots and index."""
        return sum(getattr(self, n).nbytes for n in ("_words", "_aux", "_top", "_sub", "_section_of"))

    def new_mm_id(self) -> int:
        """A fresh mm id, from 1 on."""
        if self._next_mm_id > MAX_MM_ID:
            raise StateError(f"more than {MAX_MM_ID} address spaces in one FolioTable")
        self._next_mm_id += 1
        return self._next_mm_id - 1

    def __repr__(self) -> str:
        return f"<FolioTable of {len(self)} pages, {self.nbytes} bytes>"


def tally(values: I64) -> tuple[I64, I64]:
    """Return the different values, ascending, and how often each occurs: int64 arrays, of any number of values."""
    if not len(values):
        return values, values
    low = int(values.min())
    if int(values.max()) - low > 16 * len(values):
        return np.unique(values, return_counts=True)
    counts = np.bincount(values - low)  # many in a narrow range: no need to sort them
    found = np.flatnonzero(counts)
    return found + low, counts[found]


# Of one folio, in Python's numbers, as well as of many, in arrays.
def _has_inline_slots(word: Any) -> Any:
    """Tell from a word of any of its pages whether a folio has its MM-ID slots inline, or spilled."""
    order = word >> ORDER_SHIFT & (1 << ORDER_BITS) - 1
    return (order >= INLINE_MIN_ORDER) & (order <= INLINE_MAX_ORDER) & (word >> HUGETLB_BIT & 1 == 0)


def has_entire_mapcount(order: Any, hugetlb: Any) -> Any:
    """Tell whether page 2 counts the entire mappings."""
    return (order > INLINE_MAX_ORDER) | ((order >= 2) & hugetlb)


def _offsets(words: U64, pfns: I64) -> U64:
    """Which page of its folio each one is."""
    order = words >> np.uint64(ORDER_SHIFT) & np.uint64((1 << ORDER_BITS) - 1)
    return pfns.astype(np.uint64) & ((np.uint64(1) << order) - np.uint64(1))


def _fit(slot0: Any, slot1: Any) -> Any:
    """Tell whether both counts fit where inline slots are."""
    return (slot0 | slot1) & MAX_COUNTER <= MAX_INLINE_COUNT


def _unpacked(word: Any) -> Any:
    """Return the MM-ID slot, as in ``_aux``, from the word that has it inline."""
    mm_id = word >> _ID_SHIFT & MAX_MM_ID << AUX_COUNT_BITS
    return word >> COUNTER_SHIFT & MAX_INLINE_COUNT | mm_id | (word & _INLINE_FLAG) << _FLAG_SHIFT


def _packed(slot: Any) -> Any:
    """Return the counter field, in its place in a word, of an MM-ID slot as in ``_aux`` whose count fits."""
    mm_id = (slot & MAX_MM_ID << AUX_COUNT_BITS) << _ID_SHIFT
    return (slot & MAX_INLINE_COUNT) << COUNTER_SHIFT | mm_id | slot >> _FLAG_SHIFT & _INLINE_FLAG


def _ranges(starts: I64, lengths: I64) -> I64:
    """Concatenate ``starts[i] .. starts[i] + lengths[i]``."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)


class Page:
    """One page of a `FolioTable`; reads and writes go to the table."""

    __slots__ = ("_folios", "pfn")

    def __init__(self, folios: FolioTable, pfn: int) -> None:
        self._folios = folios
        self.pfn = pfn

    def _get(self) -> int:
        return int(self._folios._words[self._folios._at(self.pfn)])

    def _set(self, shift: int, mask: int, value: int) -> None:
        at = self._folios._at(self.pfn)
        word = int(self._folios._words[at])
        self._folios._words[at] = word & ~(mask << shift) | value << shift

    @property
    def folio(self) -> Folio:
        """The folio it belongs to."""
        return self._folios.folio(self.pfn)

    @property
    def mapcount(self) -> int:
        """PTE mappings of this page (plain: 0 is unmapped)."""
        return self._get() & MAX_MAPCOUNT

    @mapcount.setter
    def mapcount(self, value: int) -> None:
        self._set(0, MAX_MAPCOUNT, _count("mapcount", value, MAX_MAPCOUNT))
        self._folios._near_limit |= value >= NEAR_LIMIT

    @property
    def anon_exclusive(self) -> bool:
        """PG_anon_exclusive."""
        return bool(self._get() >> AE_BIT & 1)

    @anon_exclusive.setter
    def anon_exclusive(self, value: bool) -> None:
        self._set(AE_BIT, 1, int(bool(value)))

    @property
    def hwpoison(self) -> bool:
        """PG_hwpoison: copying this page fails."""
        return bool(self._get() >> HWPOISON_BIT & 1)

    @hwpoison.setter
    def hwpoison(self, value: bool) -> None:
        self._set(HWPOISON_BIT, 1, int(bool(value)))

    def __repr__(self) -> str:
        return f"<Page {self.pfn:#x} mapcount={self.mapcount} anon_exclusive={self.anon_exclusive}>"


class Folio:
    """One folio of a `FolioTable`; reads and writes go to the table."""

    __slots__ = ("_folios", "order", "pfn")

    def __init__(self, folios: FolioTable, pfn: int, order: int) -> None:
        self._folios = folios
        self.pfn = pfn
        self.order = order

    @property
    def nr_pages(self) -> int:
        """2^order."""
        return 1 << self.order

    def _word(self, page: int) -> int:
        return int(self._folios._words[self._folios._at(self.pfn + page)])

    def _get_counter(self, page: int, name: str) -> int:
        if page >= self.nr_pages:
            raise ArgumentError(f"a folio of order {self.order} has no {name}")
        return self._word(page) >> COUNTER_SHIFT & MAX_COUNTER

    def _set_counter(self, page: int, name: str, value: int) -> None:
        number = _count(name, value, MAX_COUNTER)
        if page >= self.nr_pages:
            raise ArgumentError(f"a folio of order {self.order} has no {name}")
        Page(self._folios, self.pfn + page)._set(COUNTER_SHIFT, MAX_COUNTER, number)

    @property
    def refcount(self) -> int:
        """_refcount."""
        return self._get_counter(0, "refcount")

    @refcount.setter
    def refcount(self, value: int) -> None:
        self._set_counter(0, "refcount", value)

    @property
    def large_mapcount(self) -> int:
        """_large_mapcount: all mappings of a large folio (plain); a small folio's is its mapcount."""
        return self._get_counter(1, "large_mapcount") if self.order else self._folios.page(self.pfn).mapcount

    @large_mapcount.setter
    def large_mapcount(self, value: int) -> None:
        self._set_counter(1, "large_mapcount", value)

    @property
    def entire_mapcount(self) -> int:
        """_entire_mapcount: PMD and hugetlb mappings (plain); 0 for folios too small for one."""
        return self._get_counter(2, "entire_mapcount") if has_entire_mapcount(self.order, self.hugetlb) else 0

    @entire_mapcount.setter
    def entire_mapcount(self, value: int) -> None:
        if has_entire_mapcount(self.order, self.hugetlb):
            self._set_counter(2, "entire_mapcount", value)
        elif _count("entire_mapcount", value, MAX_COUNTER):
            raise ArgumentError(_NO_ENTIRE_MAPCOUNT.format(order=self.order))

    @property
    def pincount(self) -> int:
        """_pincount of a large folio; 0 for a small one, whose pins are in its refcount."""
        return self._folios._pincounts.get(self.pfn, 0)

    @pincount.setter
    def pincount(self, value: int) -> None:
        number = _count("pincount", value, MAX_COUNTER)
        if not self.order:
            raise ArgumentError("a small folio has no pincount; add 1024 to its refcount for each pin")
        if number:
            self._folios._pincounts[self.pfn] = number
        else:
            self._folios._pincounts.pop(self.pfn, None)
        Page(self._folios, self.pfn)._set(PINNED_BIT, 1, int(number > 0))

    def _flag(self, bit: int) -> bool:
        return bool(self._word(0) >> bit & 1)

    anon = property(lambda self: self._flag(ANON_BIT), doc="Anonymous memory.")
    swapbacked = property(lambda self: self._flag(SWAPBACKED_BIT), doc="Anonymous, shmem or tmpfs.")
    ksm = property(lambda self: self._flag(KSM_BIT), doc="Merged by KSM.")
    hugetlb = property(lambda self: self._flag(HUGETLB_BIT), doc="A hugetlb folio.")
    device = property(lambda self: self._flag(DEVICE_BIT), doc="Device-private memory.")

    def _aux_flag(self, bit: int) -> bool:
        return bool(int(self._folios._aux[self._folios._at(self.pfn)]) >> bit & 1)

    def _set_aux_flag(self, bit: int, value: bool) -> None:
        at = self._folios._at(self.pfn)
        self._folios._aux[at] = int(self._folios._aux[at]) & ~(1 << bit) | int(bool(value)) << bit

    @property
    def dirty(self) -> bool:
        """PG_dirty of the folio: what it holds is not on disk or swap."""
        return self._aux_flag(AUX_DIRTY_BIT)

    @dirty.setter
    def dirty(self, value: bool) -> None:
        self._set_aux_flag(AUX_DIRTY_BIT, value)

    @property
    def locked(self) -> bool:
        """PG_locked: somebody else holds the folio lock, so a trylock fails."""
        return self._aux_flag(AUX_LOCKED_BIT)

    @locked.setter
    def locked(self, value: bool) -> None:
        self._set_aux_flag(AUX_LOCKED_BIT, value)

    @property
    def maybe_dma_pinned(self) -> bool:
        """folio_maybe_dma_pinned(): a pincount, or at least 1024 references of a small folio."""
        return self.pincount > 0 if self.order else self.refcount >= GUP_PIN_COUNTING_BIAS

    def _slots(self) -> list[int]:
        """Both MM-ID slots; `FolioTable._mm_slots` of one folio, which is far slower there."""
        if not self.order:
            raise ArgumentError("a small folio has no MM-ID slots")
        if _has_inline_slots(self._word(0)) and not self._word(3) & _INLINE_FLAG:
            return [_unpacked(self._word(page)) for page in (2, 3)]
        at = self._folios._at(self.pfn)
        return [int(slot) & _SLOT for slot in self._folios._aux[at : at + 2]]

    def _set_slots(self, slots: Sequence[int]) -> None:
        """`FolioTable._set_mm_slots` of one folio."""
        at, words, aux = self._folios._at(self.pfn), self._folios._words, self._folios._aux
        inline = _has_inline_slots(self._word(0))
        fit = inline and _fit(*slots)
        aux[at], aux[at + 1] = int(aux[at]) & _NO_SLOT | (0 if fit else slots[0]), 0 if fit else slots[1]
        if inline:
            fields = [_packed(slot) for slot in slots] if fit else [0, _INLINE_FLAG]
            for page, field in zip((2, 3), fields, strict=True):
                words[at + page] = self._word(page) & _NO_COUNTER | field

    @property
    def mm_ids(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The two MM-ID slots as (mm id, its mappings); (0, 0) is an empty slot."""
        first, second = ((slot >> AUX_COUNT_BITS & MAX_MM_ID, slot & MAX_COUNTER) for slot in self._slots())
        return first, second

    def set_mm_ids(self, slots: Sequence[tuple[int, int]]) -> None:
        """Write both slots; the maybe-mapped-shared flag stays."""
        shared = self._slots()[0] & 1 << AUX_SHARED_BIT
        if len(slots) != 2:
            raise ArgumentError("there are two MM-ID slots")
        first, second = (
            _count("mm id", mm_id, MAX_MM_ID) << AUX_COUNT_BITS | _count("MM-ID mapcount", count, MAX_COUNTER)
            for mm_id, count in slots
        )
        self._set_slots((first | shared, second))

    @property
    def maybe_mapped_shared(self) -> bool:
        """The SHARED flag of a large folio (v6.15+); of a small one: mapped more than once."""
        return bool(self._slots()[0] >> AUX_SHARED_BIT) if self.order else self.large_mapcount > 1

    @maybe_mapped_shared.setter
    def maybe_mapped_shared(self, value: bool) -> None:
        first, second = self._slots()
        self._set_slots((first & ~(1 << AUX_SHARED_BIT) | int(bool(value)) << AUX_SHARED_BIT, second))

    def add_mm_mapping(self, mm_id: int, nr: int) -> None:
        """`mm_id` has `nr` more mappings; the large mapcount already includes them.

        Two mms are told apart, any further one is not (``folio_add_return_large_mapcount()``, include/linux/rmap.h,
        v6.15+).
        """
        (id0, n0), (id1, n1) = self.mm_ids
        if id0 == mm_id:
            self.set_mm_ids(((id0, n0 + nr), (id1, n1)))
        elif id1 == mm_id:
            self.set_mm_ids(((id0, n0), (id1, n1 + nr)))
        elif not id0:
            self.set_mm_ids(((mm_id, nr), (id1, n1)))
            if self.large_mapcount != nr:
                self.maybe_mapped_shared = True
        elif not id1:
            self.set_mm_ids(((id0, n0), (mm_id, nr)))
            self.maybe_mapped_shared = True

    def remove_mm_mapping(self, mm_id: int, nr: int) -> None:
        """`mm_id` has `nr` fewer mappings; the large mapcount no longer includes them (v6.15+)."""
        slots = [list(slot) for slot in self.mm_ids]
        for slot in slots:
            if slot[0] == mm_id:
                slot[1] -= nr
                if slot[1] > 0:
                    self.set_mm_ids([(a, b) for a, b in slots])
                    return
                slot[:] = [0, 0]
                break
        self.set_mm_ids([(a, b) for a, b in slots])
        # Shared no longer if one slot accounts for every mapping that is left (an empty one for none).
        if any(count == self.large_mapcount for _, count in slots):
            self.maybe_mapped_shared = False

    def __repr__(self) -> str:
        return f"<Folio {self.pfn:#x} order={self.order} refcount={self.refcount} large_mapcount={self.large_mapcount}>"
