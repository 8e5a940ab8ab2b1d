"""Why fork's batches end, and what another folio size would change.

`explain_batches` finds the batches that fork would copy - without forking - and gives each one's end exactly one cause.
`what_if` lays the same memory out in folios of another size, for comparing.

A batch ends between two neighbouring slots, so every slot is compared with the next one, whole tables at a time:
``folio_pte_batch`` compares an entry with the first of its batch, advanced, and all between agree, which is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ptebatch import arch
from ptebatch.arch import PteLayout
from ptebatch.errors import ArgumentError, PfnError, SemanticsError, UnsupportedEntryError
from ptebatch.folio import (
    AE_BIT,
    ANON_BIT,
    COUNTER_BITS,
    COUNTER_SHIFT,
    DEVICE_BIT,
    GUP_PIN_COUNTING_BIAS,
    HUGETLB_BIT,
    HWPOISON_BIT,
    KSM_BIT,
    MAX_MAPCOUNT,
    ORDER_BITS,
    ORDER_SHIFT,
    PINNED_BIT,
    SWAPBACKED_BIT,
    FolioTable,
)
from ptebatch.mm import Mm, Vma, configured, fold, gathered, pte_pfns, runs_alike, soft_dirty_tracked
from ptebatch.semantics import LATEST, KernelSemantics

__all__ = ["CAUSES", "BatchEnds", "Explanation", "VmaBatchEnds", "eligibility", "explain_batches", "what_if"]

Bools = npt.NDArray[np.bool_]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

CAUSES = ("vma end", "table end", "special", "folio end", "none", "swap", "PFN jump", "pinned")
"""Causes in order of precedence. Where none of them applies, the entries differ in bits: ``bits: dirty+NX``.

`vma end`, `table end`
    The last slot of its VMA, of its page table.
`special`
    The entry, or the next, maps no normal page (zero page, PFN mapping, a PFN without a page). Such an entry is a batch
    of one.
`folio end`
    The last page of its folio; every page of a small folio.
`none`, `swap`
    The next slot is empty, holds something that is not present.
`PFN jump`
    The next entry maps a page other than the folio's next one.
`pinned`
    The next entry would have belonged to the batch, but the folio may be pinned for DMA and this page or a later one of
    the batch is anon-exclusive: fork copies such pages one by one.
"""

_VMA_END, _TABLE_END, _SPECIAL, _FOLIO_END, _NONE, _SWAP, _PFN_JUMP, _PINNED = range(len(CAUSES))
_CHUNK_SLOTS = 1 << 19
_WHAT_IF_PFN = 1 << 18  # where `what_if` starts to hand out PFNs; lower ones stay free for pages that fork allocates


@dataclass(frozen=True)
class BatchEnds:
    """The batches of an address space or of a VMA, by what ended them.

    Attributes
    ----------
    ptes, batches : int
        Present entries, and the batches they make; small folios and entries without a page are batches of one.
    ends : dict of str to int
        Cause -> number of batches it ended; see `CAUSES`. Largest first.
    ptes_ended : dict of str to int
        Cause -> number of entries in those batches.
    batch_hist : ndarray of int64, shape (ptrs_per_pte + 1,)
        Batches by length.
    """

    ptes: int
    batches: int
    ends: dict[str, int]
    ptes_ended: dict[str, int]
    batch_hist: I64

    @property
    def mean(self) -> float:
        """Mean number of entries per batch; 0 without any."""
        return self.ptes / self.batches if self.batches else 0.0

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one row per cause: ``cause``, ``batches``, ``share`` of all batches, ``ptes``, ``mean`` length."""
        return [
            {
                "cause": cause,
                "batches": n,
                "share": n / self.batches,
                "ptes": self.ptes_ended[cause],
                "mean": self.ptes_ended[cause] / n,
            }
            for cause, n in self.ends.items()
        ]


@dataclass(frozen=True)
class VmaBatchEnds(BatchEnds):
    """The batches of one VMA: `start` and `end` in bytes, `name` as the VMA has it."""

    start: int
    end: int
    name: str


@dataclass(frozen=True)
class Explanation:
    """What `explain_batches` returns.

    Attributes
    ----------
    total : BatchEnds
    vmas : tuple of VmaBatchEnds
        The VMAs that fork copies, by address; empty unless asked for.
    vmas_copied, vmas_skipped : int
        VMAs whose entries fork would copy, and would not.
    semantics : KernelSemantics
    """

    total: BatchEnds
    vmas: tuple[VmaBatchEnds, ...]
    vmas_copied: int
    vmas_skipped: int
    semantics: KernelSemantics

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the rows of `BatchEnds.to_rows`, each with its ``vma``: ``all``, or the address range and name."""
        rows = [{"vma": "all", **row} for row in self.total.to_rows()]
        for vma in self.vmas:
            where = f"{vma.start:x}-{vma.end:x} {vma.name}".rstrip()
            rows += [{"vma": where, **row} for row in vma.to_rows()]
        return rows


def explain_batches(mm: Mm, *, semantics: KernelSemantics = LATEST, by_vma: bool = False) -> Explanation:
    """Find the batches in which fork would copy an address space, and what ends each of them.

    Nothing is changed. VMAs that fork does not copy (VM_DONTCOPY, VM_WIPEONFORK, no anonymous pages) and hugetlb VMAs
    are left out; so are PMD leaves, which are copied whole. Entries are taken as they are: where fork itself changes
    those of a later batch (arm64 contpte: a block that two VMAs share, or that is copied page by page because it may be
    pinned, is unfolded on the way) there can be more batches.

    Parameters
    ----------
    mm : Mm
        The parent.
    semantics : KernelSemantics
        Of a kernel that batches, v6.9 or newer.
    by_vma : bool
        Also report every VMA.

    Returns
    -------
    Explanation
        Its ``total.batch_hist`` is fork's `ForkStats.batch_hist`.

    Raises
    ------
    SemanticsError
        The kernel version does not batch.

    Notes
    -----
    ``copy_present_ptes()``, mm/memory.c, and ``folio_pte_batch()``, v6.9 to v6.19: private mappings respect dirty bits,
    VMAs that track soft-dirty respect that; young and write never matter.
    """
    if not semantics.fork_batching:
        raise SemanticsError(f"fork does not batch in {semantics.version}: explain v6.9 or newer")
    layout = configured(mm.layout, semantics)
    total = _Tally(layout)
    vmas = []
    copied = 0
    for vma in mm.vmas:
        if not _copied_by_fork(vma, semantics):
            continue
        copied += 1
        tally = _Tally(layout)
        for batches in _batches(mm, vma, layout, semantics):
            tally.add(batches)
        total.merge(tally)
        if by_vma:
            vmas.append(VmaBatchEnds(**tally.result(), start=vma.start, end=vma.end, name=vma.name))
    return Explanation(BatchEnds(**total.result()), tuple(vmas), copied, len(mm.vmas) - copied, semantics)


def _copied_by_fork(vma: Vma, semantics: KernelSemantics) -> bool:
    # dup_mmap() and vma_needs_copy(); the child keeps uffd flags only where the userfaultfd reports forks.
    flags = vma.vm_flags
    if flags & (arch.VM_DONTCOPY | arch.VM_WIPEONFORK | arch.VM_HUGETLB) or vma.vm_ops == "hugetlb":
        return False
    always = arch.VM_PFNMAP | arch.VM_MIXEDMAP
    if vma.uffd_event_fork:
        always |= arch.VM_UFFD_WP
    if semantics.vm_maybe_guard:
        always |= arch.VM_MAYBE_GUARD
    return bool(flags & always) or vma.anon_vma


class _Tally:
    """Counts per cause. Causes are numbers: those of `CAUSES`, then `_bits` numbers for differing bits."""

    def __init__(self, layout: PteLayout) -> None:
        self.hist = np.zeros(layout.ptrs_per_pte + 1, dtype=np.int64)
        self.ends: dict[str, int] = {}
        self.ptes: dict[str, int] = {}

    def add(self, batches: _Batches) -> None:
        self.hist += np.bincount(batches.lengths, minlength=len(self.hist))
        ends = np.bincount(batches.causes)
        ptes = np.bincount(batches.causes, weights=batches.lengths)
        for code in np.flatnonzero(ends).tolist():
            self.count(batches.names[code], int(ends[code]), int(ptes[code]))

    def count(self, cause: str, ends: int, ptes: int) -> None:
        self.ends[cause] = self.ends.get(cause, 0) + ends
        self.ptes[cause] = self.ptes.get(cause, 0) + ptes

    def merge(self, other: _Tally) -> None:
        self.hist += other.hist
        for cause, ends in other.ends.items():
            self.count(cause, ends, other.ptes[cause])

    def result(self) -> dict[str, Any]:
        order = sorted(self.ends, key=lambda cause: (-self.ends[cause], cause))
        return {
            "ptes": sum(self.ptes.values()),
            "batches": sum(self.ends.values()),
            "ends": {cause: self.ends[cause] for cause in order},
            "ptes_ended": {cause: self.ptes[cause] for cause in order},
            "batch_hist": self.hist,
        }


@dataclass(frozen=True)
class _Batches:
    """Batches of some tables, in order: first slot (virtual page number), length, cause (index into `names`)."""

    vpns: I64
    lengths: I64
    causes: I64
    names: list[str]


def _batches(mm: Mm, vma: Vma, layout: PteLayout, semantics: KernelSemantics) -> Iterator[_Batches]:
    """Yield the batches of a VMA, some tables at a time: no batch crosses the end of a table."""
    ptrs = layout.ptrs_per_pte
    respect_dirty = not vma.vm_flags & arch.VM_SHARED
    respect_soft_dirty = soft_dirty_tracked(layout, vma)
    start_vpn, end_vpn = vma.start >> layout.page_shift, vma.end >> layout.page_shift
    first, last = mm.rows(vma.start, vma.end)
    step = max(1, _CHUNK_SLOTS // ptrs)
    for low in range(first, last, step):
        high = min(low + step, last)
        skip = max(0, start_vpn - int(mm.vpns[low]))
        drop = max(0, int(mm.vpns[high - 1]) + ptrs - end_vpn)
        entries = gathered(layout, mm.entries[low:high]).reshape(-1)[skip : (high - low) * ptrs - drop]
        present = np.flatnonzero(pte_pfns(layout, entries)[0])
        if not len(present):
            continue
        slots = present + skip
        vpns = mm.vpns[low + slots // ptrs] + slots % ptrs
        yield _scan(mm, layout, entries, present, vpns, end_vpn, respect_dirty, respect_soft_dirty)


def _scan(
    mm: Mm,
    layout: PteLayout,
    entries: U64,
    present: I64,
    vpns: I64,
    end_vpn: int,
    respect_dirty: bool,
    respect_soft_dirty: bool,
) -> _Batches:
    """Find the batches among consecutive slots; `present` are the indices of present entries, `vpns` their pages."""
    values = entries[present]
    pfns = _pfns(layout, values)
    words = _words(layout, mm.folios, values, pfns)
    normal = words != 0
    order = _order(words)

    # Everything but the PFN, without what batches ignore. Runs of equal attributes are normalised once.
    attributes = values & np.uint64(~layout.pfn_mask & arch.U64_MAX)
    starts = np.flatnonzero(np.concatenate(([True], attributes[1:] != attributes[:-1])))
    distinct, inverse = np.unique(attributes[starts], return_inverse=True)
    normalised = [_normalise(layout, v, respect_dirty, respect_soft_dirty) for v in distinct.tolist()]
    kept = np.array(normalised, dtype=np.uint64)[np.repeat(inverse, np.diff(starts, append=len(values)))]

    # Compare each with the next slot; the last one's next is its own, its end is the VMA's or a table's anyway.
    following = np.append(np.arange(1, len(values)), len(values) - 1)
    vma_end = vpns + 1 == end_vpn
    table_end = vpns % layout.ptrs_per_pte == layout.ptrs_per_pte - 1
    folio_end = pfns + 1 & (np.int64(1) << order) - 1 == 0
    missing = present[following] != present + 1
    jump = pfns[following] != pfns + 1
    differ = kept[following] != kept
    linked = normal & ~(vma_end | table_end | folio_end | missing | jump | differ)

    causes = np.full(len(values), len(CAUSES), dtype=np.int64)
    causes[linked] = _PINNED
    causes[jump] = _PFN_JUMP
    causes[~normal[following]] = _SPECIAL
    if missing.any():
        behind = entries[np.minimum(present[missing] + 1, len(entries) - 1)]
        empty = (behind & np.uint64(~layout.none_ignore & arch.U64_MAX)) == np.uint64(layout.none_value)
        causes[missing] = np.where(empty, _NONE, _SWAP)
    causes[folio_end] = _FOLIO_END
    causes[~normal] = _SPECIAL
    causes[table_end] = _TABLE_END
    causes[vma_end] = _VMA_END

    alone = _must_copy(mm, words, pfns) if mm.has_pinned else None
    if alone is not None and alone.any():
        # A batch with a page that must be copied fails as a whole and goes on page by page, until none is left in it.
        runs = np.flatnonzero(np.concatenate(([True], ~linked[:-1])))
        index = np.arange(len(values))
        last_alone = np.maximum.reduceat(np.where(alone, index, -1), runs)
        linked &= index > np.repeat(last_alone, np.diff(runs, append=len(values)))

    ends = np.flatnonzero(~linked)
    lengths = np.diff(ends, prepend=-1)
    codes = causes[ends]
    names = list(CAUSES)
    by_bits = np.flatnonzero(codes == len(CAUSES))
    if len(by_bits):
        changed = kept[ends[by_bits]] ^ kept[ends[by_bits] + 1]
        distinct, inverse = np.unique(changed, return_inverse=True)
        codes[by_bits] = inverse + len(CAUSES)
        names += ["bits: " + _bit_names(layout, v) for v in distinct.tolist()]
    return _Batches(vpns[ends - lengths + 1], lengths, codes, names)


def _pfns(layout: PteLayout, values: U64) -> I64:
    """Return the PFNs of present entries."""
    return pte_pfns(layout, values)[1].view(np.int64)


def _words(layout: PteLayout, folios: FolioTable, values: U64, pfns: I64) -> U64:
    """Return the memmap word of each entry's page; 0 for entries that map no normal page (``vm_normal_page``)."""
    special = values & np.uint64(layout.special) != 0
    if special.any():
        words = np.zeros(len(values), dtype=np.uint64)
        words[~special] = _words(layout, folios, values[~special], pfns[~special])
        return words
    index = folios.lookup(pfns)
    words = folios._words[index] if len(folios) else np.zeros(len(values), dtype=np.uint64)
    words[index < 0] = 0
    return words


def _bit(words: U64, bit: int) -> Bools:
    return words & np.uint64(1 << bit) != 0


def _order(words: U64) -> I64:
    return (words >> np.uint64(ORDER_SHIFT) & np.uint64((1 << ORDER_BITS) - 1)).view(np.int64)


def _pinned(folios: FolioTable, words: U64, pfns: I64) -> Bools:
    """Tell which pages belong to a folio that may be pinned (``folio_maybe_dma_pinned``)."""
    heads = folios._words[folios.lookup(pfns & -(np.int64(1) << _order(words)))]
    refcount = heads >> np.uint64(COUNTER_SHIFT) & np.uint64((1 << COUNTER_BITS) - 1)
    return np.where(_order(words) > 0, _bit(heads, PINNED_BIT), refcount >= GUP_PIN_COUNTING_BIAS)


def _must_copy(mm: Mm, words: U64, pfns: I64) -> Bools:
    """Tell which pages fork copies at once because they may be pinned and are exclusive."""
    alone = _bit(words, ANON_BIT) & _bit(words, AE_BIT) & ~_bit(words, DEVICE_BIT)
    alone[alone] = _pinned(mm.folios, words[alone], pfns[alone])
    return alone


@lru_cache(maxsize=4096)
def _normalise(layout: PteLayout, v: int, respect_dirty: bool, respect_soft_dirty: bool) -> int:
    """Take from an entry what fork's batches ignore (``__pte_batch_clear_ignored``)."""
    if not respect_dirty:
        v = arch.pte_mkclean(layout, v)
    if not respect_soft_dirty:
        v = arch.pte_clear_soft_dirty(layout, v)
    return arch.pte_mkold(layout, arch.pte_wrprotect(layout, v))


@lru_cache(maxsize=4096)
def _bit_names(layout: PteLayout, changed: int) -> str:
    """Name the bits in which two normalised entries differ."""
    groups = [
        ("dirty", layout.dirty | layout.saved_dirty),
        ("soft-dirty", layout.soft_dirty),
        ("uffd-wp", layout.uffd_wp),
        ("NX", layout.nx),
        ("pkey", layout.pkey),
    ]
    if changed & layout.valid:
        groups.insert(0, ("PROT_NONE", layout.valid | layout.protnone | layout.user))
    names = []
    for name, mask in (*groups, *layout.bits):
        if changed & mask:
            names.append(name)
            changed &= ~mask
    return "+".join(names)


def what_if(mm: Mm, folio_bytes: int) -> Mm:
    """Lay the same memory out in folios of another size.

    Addresses, VMAs, and every entry's bits other than the PFN stay. Pages are grouped into folios that are naturally
    aligned by address, as large as possible up to `folio_bytes`: a block becomes one folio if all of it lies in one
    VMA, is present and of one kind (anonymous, shmem, file), and otherwise falls apart into halves, down to single
    pages. Entries without a page (swap, special) stay as they are, KSM pages stay single.

    What folios as a whole carry is passed on by page: anon-exclusive and poison bits as they were; a new folio may be
    pinned if any of its pages' old ones was; a page mapped elsewhere too is mapped by one other process. A page that
    this address space maps several times becomes as many pages.

    Parameters
    ----------
    mm : Mm
        Unchanged.
    folio_bytes : int
        A power of two from the page size to what one page table maps (2 MiB on x86-64).

    Returns
    -------
    Mm
        With a FolioTable of its own.

    Raises
    ------
    ArgumentError
        A size that folios cannot have.
    PfnError
        An entry that is not special maps a PFN without a page.
    UnsupportedEntryError
        A hugetlb or device-private page is mapped.
    """
    layout, folios = mm.layout, mm.folios
    ptrs, page_size = layout.ptrs_per_pte, layout.page_size
    most = ptrs * page_size
    if type(folio_bytes) is not int or folio_bytes & (folio_bytes - 1) or not page_size <= folio_bytes <= most:
        raise ArgumentError(f"folio={folio_bytes!r}: must be a power of two in {page_size}..{most} bytes")
    max_order = (folio_bytes // page_size).bit_length() - 1

    entries = mm.entries.copy()
    flat = entries.reshape(-1)
    slots = np.flatnonzero(pte_pfns(layout, flat)[0])
    slots = slots[flat[slots] & np.uint64(layout.special) == 0]
    values = flat[slots]
    pfns = _pfns(layout, values)
    words = _words(layout, folios, values, pfns)
    for unwanted, error in ((words == 0, PfnError), (_bit(words, HUGETLB_BIT) | _bit(words, DEVICE_BIT), None)):
        if unwanted.any():
            at = int(np.flatnonzero(unwanted)[0])
            address = (int(mm.vpns[slots[at] // ptrs]) + int(slots[at]) % ptrs) << layout.page_shift
            if error is not None:
                raise PfnError(pfn=int(pfns[at]), address=address)
            raise UnsupportedEntryError(address=address, kind="hugetlb or device-private page")

    # Blocks of one group can become one folio: a group is a VMA and a kind of page; 0 cannot be grouped.
    group = np.zeros(len(flat), dtype=np.int64)
    for i, vma in enumerate(mm.vmas, 1):
        first, last = mm.rows(vma.start, vma.end)
        if first < last:
            low = first * ptrs + max(0, (vma.start >> layout.page_shift) - int(mm.vpns[first]))
            high = last * ptrs - max(0, int(mm.vpns[last - 1]) + ptrs - (vma.end >> layout.page_shift))
            group[low:high] = 4 * i
    kind = _bit(words, ANON_BIT) + 2 * _bit(words, SWAPBACKED_BIT)
    groups = np.where((group[slots] == 0) | _bit(words, KSM_BIT), 0, group[slots] + kind)
    group[:] = 0
    group[slots] = groups
    order_of = np.zeros(len(flat), dtype=np.int8)
    for order in range(1, max_order + 1):
        group = np.where(group[0::2] == group[1::2], group[0::2], 0)
        order_of.reshape(-1, 1 << order)[group != 0] = order
    orders = order_of[slots].astype(np.int64)

    # Large folios first, so that all are aligned without a gap; by address within a size.
    offset = slots & (np.int64(1) << orders) - 1
    heads = offset == 0
    head_pfns = np.empty(int(np.count_nonzero(heads)), dtype=np.int64)
    head_orders = orders[heads]
    pfn = _WHAT_IF_PFN
    for order in range(max_order, -1, -1):
        here = np.flatnonzero(head_orders == order)
        head_pfns[here] = pfn + (np.arange(len(here)) << order)
        pfn += len(here) << order
    new_pfns = head_pfns[np.cumsum(heads) - 1] + offset

    moved = values & np.uint64(~(layout.pfn_mask | layout.cont) & arch.U64_MAX)
    field = new_pfns.view(np.uint64) << np.uint64(layout.pfn_shift)
    inverted = values & np.uint64(layout.plain) == 0
    flat[slots] = moved | np.where(inverted, ~field & np.uint64(layout.pfn_mask), field)

    table = FolioTable()
    first_words = words[heads]
    table.add_folios(
        head_pfns,
        head_orders,
        anon=_bit(first_words, ANON_BIT),
        swapbacked=_bit(first_words, SWAPBACKED_BIT),
        ksm=_bit(first_words, KSM_BIT),
    )
    mm_id, other_id = table.new_mm_id(), table.new_mm_id()
    index = folios.lookup(pfns)
    own = np.bincount(index)[index] if len(index) else index
    table.map_ptes(
        new_pfns[(words & np.uint64(MAX_MAPCOUNT)).view(np.int64) > own], mm_id=other_id, anon_exclusive=None
    )
    table.map_ptes(new_pfns, mm_id=mm_id, anon_exclusive=_bit(words, AE_BIT))
    for new_pfn in new_pfns[_bit(words, HWPOISON_BIT)].tolist():
        table.page(new_pfn).hwpoison = True
    if mm.has_pinned:
        pinned = new_pfns[_pinned(folios, words, pfns)] - offset[_pinned(folios, words, pfns)]
        for head in np.unique(pinned).tolist():
            folio = table.folio(head)
            if folio.order:
                folio.pincount = 1
                folio.refcount += 1
            else:
                folio.refcount += GUP_PIN_COUNTING_BIAS
    other = Mm(
        layout,
        table,
        vmas=[replace(vma) for vma in mm.vmas],
        vpns=mm.vpns.copy(),
        entries=entries,
        pmd_vpns=mm.pmd_vpns.copy(),
        pmd_entries=mm.pmd_entries.copy(),
        rss=mm.rss.copy(),
        has_pinned=mm.has_pinned,
        mm_id=mm_id,
        name=mm.name,
    )
    fold(other)
    return other


_COALESCED = (("arm64 contpte, 4K granule", 65536), ("riscv Svnapot", 65536), ("AMD PTE coalescing", 16384))


def eligibility(mm: Mm) -> list[dict[str, Any]]:
    """Find out how much memory lies in runs that some hardware could translate as one.

    That is what hardware could do with page tables like these, whatever their architecture, and not what a kernel does:
    which has to ask for it (arm64, which Linux does for user memory, and riscv, which it does not), or cannot (AMD).

    Parameters
    ----------
    mm : Mm
        Its page tables; leaves above them are larger anyway.

    Returns
    -------
    list of dict
        A row for each kind: ``hardware``, ``run_bytes``; ``bytes`` in runs that are aligned by address and by physical
        address, contiguous, valid and alike but for young and dirty; ``share`` of the present memory; ``same_bytes``
        and ``same_share`` where young and dirty are the same, too. Of a kind no larger than a page these are None.
    """
    layout = mm.layout
    present, _ = pte_pfns(layout, mm.entries)
    special = mm.entries & np.uint64(layout.special) != 0
    memory = int(np.count_nonzero(present & ~special)) * layout.page_size
    rows = []
    for hardware, run_bytes in _COALESCED:
        size = run_bytes // layout.page_size
        row: dict[str, Any] = dict.fromkeys(("bytes", "share", "same_bytes", "same_share"))
        if size > 1:
            counts = [int(np.count_nonzero(runs)) * run_bytes for runs in runs_alike(layout, mm.entries, size)]
            for name, count in zip(("", "same_"), counts, strict=True):
                row |= {f"{name}bytes": count, f"{name}share": count / memory if memory else 0.0}
        rows.append({"hardware": hardware, "run_bytes": run_bytes, **row})
    return rows
