"""What others would use instead: fork's copy in naive Python, NumPy, Numba and plain C.

All peers do the same work on a `Flat`: private anonymous memory, every page present, writable, of the process alone and
not pinned, on x86-64 with SavedDirty. For each entry they count a reference of its folio and a mapping of its page,
clear the page's anon-exclusive flag, write-protect the parent's entry (Dirty becomes SavedDirty) and write the child's,
which is old. That is less than the core does, which on the way keeps large mapcounts, MM-ID slots, rss and statistics
and handles every other kind of entry and VMA: what the peers leave out is to their advantage. What they leave behind is
compared with the core's (`Flat.__eq__`).

`PEERS` lists them by source and path. A peer has two steps: ``fresh(flat)`` makes its working state and is called once,
``reset(state, flat)`` brings that state back to before the fork, ``run(state)`` copies and is what a benchmark times.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ptebatch import _measure, arch, memory
from ptebatch.arch import PteLayout
from ptebatch.errors import ArgumentError, StateError
from ptebatch.mm import Mm, pte_pfns
from ptebatch.semantics import KernelSemantics

__all__ = ["PEERS", "Flat", "KernelPages", "Peer", "available", "flatten", "kernel_layout", "kernel_pages", "part"]

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]

MAX_PAGES = 1 << 26
"""PFNs from the lowest to the highest one that a `Flat` may span."""
CHUNK = 1 << 14
"""Entries the NumPy peer works on at a time, so that its intermediate arrays stay in the cache."""


@dataclass(frozen=True, eq=False)
class Flat:
    """One area of plain memory as a struct of arrays, with a child to copy it into.

    Attributes
    ----------
    src, dst : numpy.ndarray
        uint64[n]: entries of parent and child, every one present.
    base : int
        PFN of page 0.
    folio_of : numpy.ndarray
        int32[pages], read-only: folio of each page.
    folio_end : numpy.ndarray
        int64[folios], read-only: the page behind each folio's last one.
    refcount : numpy.ndarray
        int32[folios].
    mapcount, exclusive : numpy.ndarray
        int32[pages] and uint8[pages]; pages that the area does not map hold 0.
    layout : PteLayout
    """

    src: U64
    dst: U64
    base: int
    folio_of: I32
    folio_end: I64
    refcount: I32
    mapcount: I32
    exclusive: U8
    layout: PteLayout

    def copy(self) -> Flat:
        """Return a copy with entries and counts of its own."""
        own = {name: memory.copy(getattr(self, name)) for name in _STATE}
        return Flat(**{**{name: getattr(self, name) for name in self.__dataclass_fields__}, **own})

    def assign(self, other: Flat) -> None:
        """Take over the entries and counts of another one of the same area."""
        for name in _STATE:
            getattr(self, name)[...] = getattr(other, name)

    def __eq__(self, other: object) -> bool:
        """Whether entries, mapcounts, anon-exclusive flags and refcounts are the same."""
        if not isinstance(other, Flat):
            return NotImplemented
        return self.base == other.base and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in (*_STATE, "folio_of", "folio_end")
        )

    __hash__ = None  # type: ignore[assignment]


_STATE = ("src", "dst", "refcount", "mapcount", "exclusive")


def part(mm: Mm, start: int, end: int) -> Mm:
    """Return bytes ``start..end`` of one VMA as memory of its own: a fork copies no more of a folio reaching beyond.

    Entries and folios are those of `mm`, not copies.

    Raises
    ------
    StateError
        It is not within one VMA.
    """
    vma = mm.vma_at(start)
    if vma is None or not start < end <= vma.end:
        raise StateError(f"{start:#x}-{end:#x} is not within one VMA")
    return Mm(
        mm.layout, mm.folios, vmas=[replace(vma, start=start, end=end)], vpns=mm.vpns, entries=mm.entries,
        has_pinned=mm.has_pinned, mm_id=mm.mm_id,
    )  # fmt: skip


def flatten(mm: Mm, child: Mm | None = None) -> Flat:
    """Make a `Flat` of the first VMA.

    Parameters
    ----------
    mm : Mm
        Whose entries are `src`. Nothing is changed.
    child : Mm, optional
        Whose entries are `dst`; without one they are all none.

    Raises
    ------
    StateError
        It is not plain memory as the peers model it, or its PFNs are spread too far.
    """
    layout = mm.layout
    if not mm.vmas:
        raise StateError("there is no memory to copy")
    vma = mm.vmas[0]
    start, end = vma.start, vma.end
    if vma.vm_ops is not None or not arch.is_cow_mapping(vma.vm_flags):
        raise StateError(f"{start:#x}-{end:#x} is not private anonymous memory")
    if not layout.saved_dirty:  # which x86-64 alone has
        raise StateError(f"the peers do not model {layout.name}: choose a kernel with saved_dirty")
    src = mm.ptes(start, end)
    present, pfns = pte_pfns(layout, src)
    flags = src & ~np.uint64(layout.pfn_mask)
    # What fork changes may differ: a Flat is also made of the memory that a fork has left.
    unplain = layout.special | layout.uffd_wp
    if not len(src) or not present.all() or (flags & np.uint64(unplain)).any() or (flags != flags[0]).any():
        raise StateError(f"{start:#x}-{end:#x} is not plain memory: its entries differ in more than their PFNs")
    base = int(pfns.min())
    nr_pages = int(pfns.max()) + 1 - base
    if nr_pages > MAX_PAGES:
        raise StateError(f"the PFNs of {start:#x}-{end:#x} are spread over {nr_pages} pages, more than {MAX_PAGES}")
    pages = pfns.astype(np.int64) - base
    if len(np.unique(pages)) != len(pages):
        raise StateError(f"a page is mapped twice in {start:#x}-{end:#x}")
    orders = mm.folios.orders(pfns)
    heads = pfns.astype(np.int64) >> orders << orders
    known, ids = np.unique(heads, return_inverse=True)
    folio_of = np.zeros(nr_pages, dtype=np.int32)
    mapcount = np.zeros(nr_pages, dtype=np.int32)
    exclusive = np.zeros(nr_pages, dtype=np.uint8)
    folio_end = np.zeros(len(known), dtype=np.int64)
    folio_of[pages] = ids
    mapcount[pages] = mm.folios.mapcounts(pfns)
    exclusive[pages] = mm.folios.flags(pfns, "anon_exclusive")
    # A folio may reach beyond the area's pages; its batches end there.
    folio_end[ids] = np.minimum(heads + (np.int64(1) << orders) - base, nr_pages)
    folio_of.setflags(write=False)
    folio_end.setflags(write=False)
    dst = np.full(len(src), layout.none_value, dtype=np.uint64) if child is None else child.ptes(start, end)
    refcount = mm.folios.refcounts(known).astype(np.int32)
    return Flat(src, dst, base, folio_of, folio_end, refcount, mapcount, exclusive, layout)


def _saved_dirty_shift(layout: PteLayout) -> int:
    return layout.saved_dirty.bit_length() - layout.dirty.bit_length()


# --- naive Python -----------------------------------------------------------------------------------------------------
class _Lists(NamedTuple):
    src: list[int]
    dst: list[int]
    folio_of: list[int]
    refcount: list[int]
    mapcount: list[int]
    exclusive: list[int]
    base: int
    layout: PteLayout


def _lists(flat: Flat) -> _Lists:
    state = {name: getattr(flat, name).tolist() for name in (*_STATE, "folio_of")}
    return _Lists(**state, base=flat.base, layout=flat.layout)


def _reset_lists(state: _Lists, flat: Flat) -> None:
    for name in _STATE:
        getattr(state, name)[:] = getattr(flat, name).tolist()


def _lists_to_flat(state: _Lists, flat: Flat) -> Flat:
    result = flat.copy()
    for name in _STATE:
        getattr(result, name)[...] = getattr(state, name)
    return result


def copy_naive(state: _Lists) -> None:
    """Copy as a first script would: a Python loop over lists of ints, one entry at a time.

    This is the baseline others are compared with. It stays as it is: neither tuned nor slowed down.
    """
    src, dst, folio_of, refcount, mapcount, exclusive, base, layout = state
    write, dirty, young = layout.write, layout.dirty, layout.young
    shift, mask, saved = layout.pfn_shift, layout.pfn_mask, layout.saved_dirty
    for i, pte in enumerate(src):
        page = ((pte & mask) >> shift) - base
        refcount[folio_of[page]] += 1
        mapcount[page] += 1
        exclusive[page] = 0
        if pte & write:
            pte &= ~write
            if pte & dirty:
                pte = pte & ~dirty | saved
            src[i] = pte
        dst[i] = pte & ~young


# --- NumPy ------------------------------------------------------------------------------------------------------------
def _copy_numpy(flat: Flat, batched: bool) -> None:
    layout = flat.layout
    shift, mask = np.uint64(layout.pfn_shift), np.uint64(layout.pfn_mask)
    keep, dirty = ~np.uint64(layout.write | layout.dirty), np.uint64(layout.dirty)
    saved_shift, not_young = np.uint64(_saved_dirty_shift(layout)), ~np.uint64(layout.young)
    for at in range(0, len(flat.src), CHUNK):
        src, dst = flat.src[at : at + CHUNK], flat.dst[at : at + CHUNK]
        page = src & mask
        page >>= shift
        page -= np.uint64(flat.base)
        page = page.view(np.int64)
        folio = flat.folio_of[page]
        saved = src & dirty
        saved <<= saved_shift
        src &= keep
        src |= saved
        np.bitwise_and(src, not_young, out=dst)
        if batched:
            # A batch starts where the next entry is not that of the next page of the same folio.
            ends = np.diff(dst) != np.uint64(1) << shift
            ends |= folio[1:] != folio[:-1]
            starts = np.concatenate(([0], np.flatnonzero(ends) + 1))
            np.add.at(flat.refcount, folio[starts], np.diff(starts, append=len(src)).astype(np.int32))
        else:
            np.add.at(flat.refcount, folio, np.int32(1))
        flat.mapcount[page] += 1  # no page occurs twice (flatten)
        flat.exclusive[page] = 0


def copy_numpy_single(flat: Flat) -> None:
    """Copy with whole-array operations, one reference per entry."""
    _copy_numpy(flat, False)


def copy_numpy_batched(flat: Flat) -> None:
    """Copy with whole-array operations, references batch by batch."""
    _copy_numpy(flat, True)


# --- plain C ----------------------------------------------------------------------------------------------------------
def _words(flat: Flat) -> U64:
    layout = flat.layout
    values = (
        flat.base, layout.valid, layout.write, layout.young, layout.dirty, _saved_dirty_shift(layout), layout.pfn_shift,
        layout.pfn_mask, layout.ptrs_per_pte,
    )  # fmt: skip
    return np.array(values, dtype=np.uint64)


def _arrays(flat: Flat) -> tuple[U64, U64, I32, I32, U8, I64, I32, U64]:
    counts = (flat.folio_of, flat.mapcount, flat.exclusive, flat.folio_end, flat.refcount)
    return (flat.src, flat.dst, *counts, _words(flat))


def _copy_c(flat: Flat, batched: bool) -> None:
    done = _measure.py_plain_copy(*_arrays(flat), batched)
    if done != len(flat.src):
        raise ArgumentError(f"entry {done} of src maps no page of the area")


def copy_c_single(flat: Flat) -> None:
    """Copy in plain scalar C over the same arrays, one entry at a time (measure.h ``plain_copy_single``)."""
    _copy_c(flat, False)


def copy_c_batched(flat: Flat) -> None:
    """Copy in plain scalar C, batched as the kernel does it (measure.h ``plain_copy_batched``)."""
    _copy_c(flat, True)


# --- the kernel's memory layout ---------------------------------------------------------------------------------------
KERNEL_PAGE = np.dtype(
    [
        ("flags", "<u8"), ("compound_head", "<u8"), ("mapping", "<u8"), ("mm_ids", "<u8"),
        ("mm_id_mapcount", "<i4", 2), ("large_mapcount", "<i4"), ("order", "<u4"), ("mapcount", "<i4"),
        ("refcount", "<i4"), ("memcg", "<u8"),
    ]
)  # fmt: skip
"""A page's record, 64 bytes: ``struct kernel_page`` of measure.h. A large folio's own fields are in its second page."""
if KERNEL_PAGE.itemsize != _measure.KERNEL_PAGE_BYTES:
    raise ImportError("the compiled extension is of another version; rebuild it: make test")
PG_HEAD, PG_ANON_EXCLUSIVE, MAPPING_ANON = 1 << 6, 1 << 17, 1
MM_ID_BITS = 20
MM_ID_SHARED = 1 << 62
PARENT_ID, CHILD_ID = 1, 2


@dataclass(frozen=True, eq=False)
class KernelPages:
    """Entries and page records of one area, laid out as the kernel has them.

    Attributes
    ----------
    src, dst : numpy.ndarray
        uint64[n].
    pages : numpy.ndarray
        `KERNEL_PAGE` [pages], aligned to 64 bytes: a whole memmap from the first to the last folio of the area.
    flat : Flat
        What they were made of.
    """

    src: U64
    dst: U64
    pages: npt.NDArray[np.void]
    flat: Flat


def kernel_pages(flat: Flat) -> KernelPages:
    """Lay a `Flat` out as the kernel does. All of each folio must be in it: raises StateError otherwise."""
    nr_pages = len(flat.folio_of)
    room = np.zeros((nr_pages + 1) * KERNEL_PAGE.itemsize, dtype=np.uint8)
    at = -room.ctypes.data % KERNEL_PAGE.itemsize
    pages = room[at : at + nr_pages * KERNEL_PAGE.itemsize].view(KERNEL_PAGE)
    nr = np.bincount(flat.folio_of, minlength=len(flat.refcount))
    heads = flat.folio_end - nr
    if (nr & (nr - 1)).any() or (heads < 0).any() or (flat.folio_of[heads] != np.arange(len(nr))).any():
        raise StateError("only part of a folio is in the area: choose a size its folios divide")
    large = nr > 1
    head_of = heads[flat.folio_of]
    tail = head_of != np.arange(nr_pages)
    pages["flags"] = flat.exclusive.astype(np.uint64) * np.uint64(PG_ANON_EXCLUSIVE)
    pages["flags"][heads[large]] |= np.uint64(PG_HEAD)
    pages["compound_head"][tail] = (head_of[tail] << 1 | 1).astype(np.uint64)
    pages["mapping"][heads] = MAPPING_ANON
    pages["mapcount"] = flat.mapcount
    pages["refcount"][heads] = flat.refcount
    second = heads[large] + 1
    mapped = np.bincount(flat.folio_of, weights=flat.mapcount, minlength=len(nr)).astype(np.int32)[large]
    pages["order"][second] = np.log2(nr[large]).astype(np.uint32)
    pages["large_mapcount"][second] = mapped
    pages["mm_ids"][second] = PARENT_ID
    pages["mm_id_mapcount"][second, 0] = mapped
    return KernelPages(flat.src.copy(), flat.dst.copy(), pages, flat)


def kernel_layout(semantics: KernelSemantics, *, batched: bool) -> Peer:
    """Return fork's copy on the kernel's memory layout, with the counters a kernel version keeps.

    Counters and flags are changed by locked instructions, the large mapcount and MM-ID slots as the version does it;
    an entry is write-protected by compare-and-exchange. The function is in measure.h (``kernel_copy``).
    """
    keeps = (semantics.large_mapcount, semantics.mm_id, not semantics.config.no_page_mapcount)

    def run(state: KernelPages) -> None:
        records = state.pages.view(np.uint8)
        done = _measure.py_kernel_copy(state.src, state.dst, records, _words(state.flat), CHILD_ID, *keeps, batched)
        if done != len(state.src):
            raise ArgumentError(f"entry {done} of src maps no page of the area")

    def reset(state: KernelPages, flat: Flat) -> None:
        fresh = kernel_pages(flat)
        state.src[...], state.dst[...], state.pages[...] = fresh.src, fresh.dst, fresh.pages

    def result(state: KernelPages, flat: Flat) -> Flat:
        end = flat.copy()
        head = np.flatnonzero(state.pages["compound_head"] & np.uint64(1) == 0)
        end.src[...], end.dst[...] = state.src, state.dst
        end.refcount[flat.folio_of[head]] = state.pages["refcount"][head]
        end.mapcount[...] = state.pages["mapcount"]
        end.exclusive[...] = state.pages["flags"] & np.uint64(PG_ANON_EXCLUSIVE) != 0
        return end

    return Peer("kernel-layout", "batched" if batched else "single", run, kernel_pages, reset, result)


# --- Numba ------------------------------------------------------------------------------------------------------------
@functools.cache
def _numba() -> tuple[Callable[..., None], Callable[..., None]]:
    import numba

    jit = numba.njit(nogil=True, boundscheck=False, error_model="numpy")

    @jit
    def wrprotect(pte, write, dirty, saved_shift):  # type: ignore[no-untyped-def]
        return (pte & ~(write | dirty)) | (pte & dirty) << saved_shift

    @jit
    def single(src, dst, folio_of, mapcount, exclusive, folio_end, refcount, words):  # type: ignore[no-untyped-def]
        base, write, young, dirty, saved_shift = words[0], words[2], words[3], words[4], words[5]
        shift, mask = words[6], words[7]
        for i in range(src.shape[0]):
            pte = src[i]
            page = np.int64(((pte & mask) >> shift) - base)
            refcount[folio_of[page]] += 1
            mapcount[page] += 1
            exclusive[page] = 0
            if pte & write:
                pte = wrprotect(pte, write, dirty, saved_shift)
                src[i] = pte
            dst[i] = pte & ~young

    @jit
    def batched(src, dst, folio_of, mapcount, exclusive, folio_end, refcount, words):  # type: ignore[no-untyped-def]
        base, write, young, dirty, saved_shift = words[0], words[2], words[3], words[4], words[5]
        shift, mask, ptrs = words[6], words[7], np.int64(words[8])
        step = np.uint64(1) << shift
        i = 0
        while i < src.shape[0]:
            pte = src[i]
            writable = pte
            page = np.int64(((pte & mask) >> shift) - base)
            folio = folio_of[page]
            max_nr = min(folio_end[folio] - page, ptrs - i % ptrs, src.shape[0] - i)
            expected = wrprotect(pte, write, dirty, saved_shift) & ~young
            nr = 1
            while nr < max_nr:
                after = src[i + nr]
                expected += step
                if wrprotect(after, write, dirty, saved_shift) & ~young != expected:
                    break
                writable |= after
                nr += 1
            refcount[folio] += nr
            for k in range(page, page + nr):
                mapcount[k] += 1
                exclusive[k] = 0
            if writable & write:
                for k in range(i, i + nr):
                    src[k] = wrprotect(src[k], write, dirty, saved_shift)
                pte = wrprotect(pte, write, dirty, saved_shift)
            pte &= ~young
            for k in range(i, i + nr):
                dst[k] = pte
                pte += step
            i += nr

    return single, batched


def copy_numba_single(flat: Flat) -> None:
    """Copy in a compiled loop, one entry at a time: the C peer's, written for Numba."""
    _numba()[0](*_arrays(flat))


def copy_numba_batched(flat: Flat) -> None:
    """Copy in a compiled loop, batched: the C peer's, written for Numba."""
    _numba()[1](*_arrays(flat))


# --- all of them ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Peer:
    """One way to do the copy; see the module's description.

    Attributes
    ----------
    source, path : str
        As in the rows of a benchmark: naive, numpy, numba, c; single, batched.
    run, fresh, reset, result : callable
        ``fresh(flat)`` makes a working state, ``reset(state, flat)`` brings it back, ``run(state)`` copies, and
        ``result(state, flat)`` is what it left as a `Flat`.
    needs : str
        A module that must be installed.
    """

    source: str
    path: str
    run: Callable[[Any], None]
    fresh: Callable[[Flat], Any] = Flat.copy
    reset: Callable[[Any, Flat], None] = Flat.assign
    result: Callable[[Any, Flat], Flat] = lambda state, flat: state
    needs: str = "numpy"


NAIVE = Peer("naive", "single", copy_naive, _lists, _reset_lists, _lists_to_flat)
NUMPY = Peer("numpy", "single", copy_numpy_single)
PEERS = (
    NAIVE,
    NUMPY,
    Peer("numpy", "batched", copy_numpy_batched),
    Peer("numba", "single", copy_numba_single, needs="numba"),
    Peer("numba", "batched", copy_numba_batched, needs="numba"),
    Peer("c", "single", copy_c_single),
    Peer("c", "batched", copy_c_batched),
)
"""Every peer, the naive one first."""


def available() -> tuple[Peer, ...]:
    """Return those of `PEERS` that can run here."""
    return tuple(peer for peer in PEERS if importlib.util.find_spec(peer.needs) is not None)
