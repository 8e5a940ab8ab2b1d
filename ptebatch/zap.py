"""Unmapping in batches: ``zap_range`` (MADV_DONTNEED), ``munmap`` and ``exit_mmap``.

Entries are cleared one at a time or, since v6.9, by the batches that fork also uses; counts, rss and the pages that
become free do not depend on which. References are dropped when the kernel flushes its gather of pages; the state here
is the one after that. What a model without memory pressure never sees is left out: the queue of partially mapped folios
to be split (it holds no reference and changes no entry), and that a file page was accessed (only counted).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ptebatch.checks import check_range_bounds
from ptebatch.errors import ArgumentError
from ptebatch.impls import resolve_batching, resolve_impl
from ptebatch.mm import PFN_WITHOUT_PAGE, ZAP_STAT_FIELDS, Mm, Vma, WalkStats, new_zap_stats
from ptebatch.pmd import check_leaves, is_hugetlb, leaf_end, leaves, split_huge_pmd, zap_huge_pmd, zap_hugetlb
from ptebatch.semantics import LATEST, KernelSemantics


@dataclass(frozen=True, eq=False)
class ZapStats(WalkStats):
    """What one unmapping did, in counts; the same for every implementation.

    Attributes
    ----------
    ptes_none, ptes_present : int
        Entries passed over; present entries cleared.
    ptes_single, ptes_batched, batches : int
        Present entries cleared alone, in batches of two or more, and the number of calls of ``zap_present_ptes``.
    ptes_skipped : int
        Entries left as they are: anonymous pages without ``even_cows``, markers without ``drop_markers``.
    special_ptes : int
        Present entries without a normal page (zero page, PFN mappings).
    ptep_get : int
        Entries read: by the walk, and by the scan of ``folio_pte_batch`` including the one that ends it.
    clear_ptes : int
        Calls of ``clear_full_ptes`` (anonymous memory) and ``get_and_clear_full_ptes`` (files), one per batch.
    rmap_remove, folio_put : int
        Operations on the rmap and on folio reference counts, one per batch of normal pages.
    folios_freed : int
        Folios that lost their last reference.
    folio_mark_dirty, folio_mark_accessed : int
        Batches of file pages whose entries were dirty; young, in a VMA that cares.
    uffd_wp_markers : int
        Markers left behind.
    swap_entries, migration_entries, device_private_entries, device_exclusive_entries, hwpoison_entries, pte_markers
        Entries of these kinds taken away.
    pmds_zapped, pmds_split : int
        PMD leaves taken away whole; those that the range covers in part, and that were mapped by a page table first
        (of a file: taken away whole, faults bring the rest back).
    hugetlb_entries : int
        Present entries of hugetlb mappings taken away.
    tables_freed : int
        Page tables given back, those deposited with PMD leaves included.
    contpte_reads, contpte_folds, contpte_unfolds : int
        As in `ptebatch.fork.ForkStats`.
    batch_hist : numpy.ndarray
        int64[ptrs_per_pte + 1]: batches of present entries by nr.
    """

    ptes_none: int
    ptes_present: int
    ptes_single: int
    ptes_batched: int
    batches: int
    ptes_skipped: int
    special_ptes: int
    ptep_get: int
    clear_ptes: int
    rmap_remove: int
    folio_put: int
    folios_freed: int
    folio_mark_dirty: int
    folio_mark_accessed: int
    uffd_wp_markers: int
    swap_entries: int
    migration_entries: int
    device_private_entries: int
    device_exclusive_entries: int
    hwpoison_entries: int
    pte_markers: int
    contpte_reads: int
    contpte_folds: int
    contpte_unfolds: int
    pmds_zapped: int
    pmds_split: int
    hugetlb_entries: int
    tables_freed: int
    batch_hist: npt.NDArray[np.int64]


def zap_range(
    mm: Mm,
    start: int,
    end: int,
    *,
    semantics: KernelSemantics = LATEST,
    batching: bool | None = None,
    impl: str = "core",
    even_cows: bool = True,
    drop_markers: bool = False,
    pfn_without_page: PFN_WITHOUT_PAGE = "error",
) -> ZapStats:
    """Unmap what is mapped in ``start..end``; VMAs and page tables stay. The default is what MADV_DONTNEED does.

    Parameters
    ----------
    mm : Mm
        Its entries, rss and folios are written; folios without references are freed, for `FolioTable.alloc` to use.
    start, end : int
        Byte addresses, multiples of the page size; what no VMA covers is passed over.
    semantics : KernelSemantics
        The kernel version to be exact for.
    batching : bool, optional
        None follows the semantics; False goes entry by entry, with the same result.
    impl : {"core", "reference"}
    even_cows : bool
        Anonymous pages too; False is what truncating the file under a private mapping does.
    drop_markers : bool
        PTE markers too, as munmap and exit do. False keeps guard regions, and leaves a marker in a file mapping where
        userfaultfd had write-protected an entry.
    pfn_without_page : {"error", "as_kernel"}
        A present, non-special entry whose PFN has no page: an error, or what the kernel does (cleared without counts).

    Returns
    -------
    ZapStats

    Raises
    ------
    PfnError, UnsupportedEntryError
        Before anything is changed.
    StateError
        Counts are lower than the mappings there are; what lies before the entry is unmapped, and so are PMD leaves.
    ArgumentError, SemanticsError
        A bad address, also one inside a hugetlb page; ``batching=True`` under an unbatched preset.

    Notes
    -----
    ``zap_page_range_single()`` and ``unmap_vmas()``, mm/memory.c, v6.6 to v6.19. File pages make their folio dirty if
    their entry is; PG_anon_exclusive stays as it is.
    """
    chosen, batching = resolve_impl(impl), resolve_batching(semantics, batching, "zap_batching")
    start, end = check_range_bounds(mm, start, end)
    mm.validate()
    touched = [vma for vma in mm.vmas if start < vma.end and vma.start < end]
    vmas = [clipped(vma, start, end, mm.layout.page_size) for vma in touched if not is_hugetlb(vma)]
    chosen.check_range(mm, vmas, pfn_without_page=pfn_without_page, semantics=semantics)
    for vma in touched if len(mm.pmd_vpns) else []:
        check_leaves(mm, vma, semantics)
        _check_hugetlb(mm, vma, start, end, semantics)
    leaf_stats = _zap_leaves(mm, touched, start, end, drop_markers, semantics)
    stats = new_zap_stats(mm.layout)
    stats[ZAP_STAT_FIELDS.index("folios_freed")] = leaf_stats.pop("folios_freed")
    chosen.zap_range(
        mm,
        start,
        end,
        semantics=semantics,
        batching=batching,
        stats=stats,
        even_cows=even_cows,
        drop_markers=drop_markers,
        pfn_without_page=pfn_without_page,
    )
    n = len(ZAP_STAT_FIELDS)
    counters = dict(zip(ZAP_STAT_FIELDS, stats[:n].tolist(), strict=True))
    return ZapStats(**counters, **leaf_stats, batch_hist=stats[n:].copy())


def _check_hugetlb(mm: Mm, vma: Vma, start: int, end: int, semantics: KernelSemantics) -> None:
    """Refuse to cut a hugetlb page (``hugetlb_vm_op_split()``: EINVAL)."""
    shift = mm.layout.page_shift
    for at in leaves(mm, vma.start, vma.end) if is_hugetlb(vma) else []:
        addr, behind = int(mm.pmd_vpns[at]) << shift, leaf_end(mm, vma, at, semantics)
        if any(addr < cut < behind for cut in (start, end)):
            raise ArgumentError(f"{start:#x}-{end:#x} cuts the hugetlb page at {addr:#x}-{behind:#x}")


def _zap_leaves(
    mm: Mm, vmas: list[Vma], start: int, end: int, drop_markers: bool, semantics: KernelSemantics
) -> dict[str, int]:
    """Take away the PMD and hugetlb leaves in a range; those it covers in part become page tables."""
    stats = dict.fromkeys(("pmds_zapped", "pmds_split", "hugetlb_entries", "tables_freed", "folios_freed"), 0)
    shift, size = mm.layout.page_shift, mm.layout.ptrs_per_pte << mm.layout.page_shift
    for vma in vmas if len(mm.pmd_vpns) else []:
        # A leaf may begin before the range.
        for vpn in mm.pmd_vpns[leaves(mm, max(vma.start, start - size + 1), min(vma.end, end))].tolist():
            at, addr = int(np.searchsorted(mm.pmd_vpns, vpn)), vpn << shift
            if is_hugetlb(vma):
                if addr >= start:
                    present, freed = zap_hugetlb(mm, at, drop_markers=drop_markers, semantics=semantics)
                    stats["hugetlb_entries"] += present
                    stats["folios_freed"] += freed
            elif int(mm.pmd_entries[at]) == mm.layout.none_value:
                continue
            elif start <= addr and addr + size <= end:
                deposited, freed = zap_huge_pmd(mm, at, semantics=semantics)
                stats["pmds_zapped"] += 1
                stats["tables_freed"] += deposited
                stats["folios_freed"] += freed
            else:
                split_huge_pmd(mm, addr, semantics=semantics)
                stats["pmds_split"] += 1
    used = mm.pmd_entries != np.uint64(mm.layout.none_value)
    if not used.all():
        mm.pmd_vpns, mm.pmd_entries = mm.pmd_vpns[used], mm.pmd_entries[used]
    return stats


def munmap(
    mm: Mm,
    start: int,
    end: int,
    *,
    semantics: KernelSemantics = LATEST,
    batching: bool | None = None,
    impl: str = "core",
    pfn_without_page: PFN_WITHOUT_PAGE = "error",
) -> ZapStats:
    """Remove ``start..end`` from the address space: VMAs are cut or removed, everything mapped there is unmapped.

    Page tables are freed where no VMA is left; one that a remaining VMA shares stays. Arguments and errors are those of
    `zap_range`; an empty range is an `ArgumentError`, one that no VMA covers is fine.

    Notes
    -----
    ``do_vmi_munmap()``, mm/mmap.c (mm/vma.c in v6.12+); ``free_pgtables()``, mm/memory.c.
    """
    start, end = check_range_bounds(mm, start, end)
    if start == end:
        raise ArgumentError(f"nothing to unmap: start and end are both {start:#x}")
    stats = zap_range(
        mm,
        start,
        end,
        semantics=semantics,
        batching=batching,
        impl=impl,
        drop_markers=True,
        pfn_without_page=pfn_without_page,
    )
    removed = [clipped(vma, start, end, mm.layout.page_size) for vma in mm.vmas if start < vma.end and vma.start < end]
    mm.vmas = [
        clipped(vma, low, high, mm.layout.page_size)
        for vma in mm.vmas
        for low, high in ((vma.start, min(vma.end, start)), (max(vma.start, end), vma.end))
        if low < high
    ]
    return replace(stats, tables_freed=stats.tables_freed + _free_pgtables(mm, removed))


def exit_mmap(
    mm: Mm,
    *,
    semantics: KernelSemantics = LATEST,
    batching: bool | None = None,
    impl: str = "core",
    pfn_without_page: PFN_WITHOUT_PAGE = "error",
) -> ZapStats:
    """Take an address space down as the exit of its process does: no VMA, page table or entry is left.

    Arguments and errors are those of `zap_range`. Its rss is zero afterwards if it was right before (the kernel
    complains otherwise, and so can the caller).

    Notes
    -----
    ``exit_mmap()``, mm/mmap.c. Locked VMAs and pinned pages do not stop it; a pin keeps its page.
    """
    stats = zap_range(
        mm,
        0,
        max((vma.end for vma in mm.vmas), default=0),
        semantics=semantics,
        batching=batching,
        impl=impl,
        drop_markers=True,
        pfn_without_page=pfn_without_page,
    )
    tables = len(mm.vpns)
    mm.vmas = []
    mm.vpns, mm.entries = mm.vpns[:0].copy(), mm.entries[:0].copy()
    mm.huge_zero = False
    return replace(stats, tables_freed=stats.tables_freed + tables)


def clipped(vma: Vma, start: int, end: int, page_size: int) -> Vma:
    """The part of a VMA that lies in ``start..end`` (``__split_vma()``: its offset moves with its start)."""
    low, high = max(vma.start, start), min(vma.end, end)
    if (low, high) == (vma.start, vma.end):
        return vma
    return replace(vma, start=low, end=high, pgoff=vma.pgoff + (low - vma.start) // page_size)


def _free_pgtables(mm: Mm, removed: list[Vma]) -> int:
    """Free the page tables of removed VMAs that no VMA needs any more; return how many."""
    keep = np.ones(len(mm.vpns), dtype=bool)
    for vmas, kept in ((removed, False), (mm.vmas, True)):
        for vma in vmas:
            first, last = mm.rows(vma.start, vma.end)
            keep[first:last] = kept
    freed = int(np.count_nonzero(~keep))
    if freed:
        mm.vpns, mm.entries = mm.vpns[keep], mm.entries[keep]
    return freed
