"""fork() of a whole address space: the order and the VMA rules of ``dup_mmap`` (kernel/fork.c, mm/mmap.c).

Page tables are copied by ``copy_page_range`` of :mod:`ptebatch.batch` (the Cython core) or :mod:`ptebatch.reference`
(plain Python), leaves above them by :mod:`ptebatch.pmd`; this module decides which VMAs they run on, keeps them in the
order of addresses, and gives the child its page tables.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ptebatch import arch, checks
from ptebatch.errors import ArgumentError, ForkError, SemanticsError
from ptebatch.impls import resolve_batching, resolve_impl
from ptebatch.mm import STAT, STAT_FIELDS, Allocations, ForkContext, Mm, Vma, configured, copy_state, new_stats
from ptebatch.pmd import check_leaves, copy_huge_pmd, copy_hugetlb_page_range, is_hugetlb, leaves
from ptebatch.semantics import LATEST, KernelSemantics
from ptebatch.zap import exit_mmap

VM_UFFD_FLAGS = arch.VM_UFFD_MISSING | arch.VM_UFFD_WP | arch.VM_UFFD_MINOR
VM_LOCKED_FLAGS = arch.VM_LOCKED | arch.VM_LOCKONFAULT


@dataclass(frozen=True)
class ForkStats:
    """What one fork did, in counts; the same for every implementation.

    Attributes
    ----------
    vmas_copied, vmas_skipped : int
        VMAs whose entries were copied; VMAs for which ``vma_needs_copy`` said no, or VM_DONTCOPY or VM_WIPEONFORK.
    tables_allocated : int
        Page tables of the child (each counted once, also where VMAs share it).
    ptes_none, ptes_present : int
        Entries passed over; entries copied.
    ptes_single, ptes_batched : int
        Present entries copied alone; entries copied in batches of two or more.
    batches : int
        Successful calls of ``copy_present_ptes``, those with nr == 1 included.
    folio_ref_add, rmap_dup : int
        Operations on folio reference counts and on the rmap, one per batch of normal pages.
    ptep_get : int
        Entries read: by the walk, and by the scan of ``folio_pte_batch`` including the one that ends it.
    wrprotect_ptes, ptes_wrprotected : int
        Calls, and the entries they covered in the parent.
    set_ptes : int
        Calls, one per batch, in the child.
    eagain_rounds, copied_pages : int
        -EAGAIN rounds for a preallocated page; pages copied early because they may be pinned.
    anon_exclusive_cleared : int
        Pages whose PG_anon_exclusive was cleared.
    special_ptes : int
        Entries without a normal page (zero page, PFN mappings).
    swap_entries, migration_entries, device_private_entries, hwpoison_entries : int
        Entries of these kinds copied; none of them is counted as present.
    device_exclusive_entries : int
        Entries that were made present again in the parent, and then copied as such.
    pte_markers : int
        Markers met, whether or not the child got them.
    pmds_copied, pmds_split : int
        PMD leaves copied; split in the parent because their folio may be pinned, and then copied as page tables.
    tables_deposited : int
        Page tables of the child that lie behind PMD leaves of anonymous memory, in reserve. VmPTE counts these and the
        allocated ones.
    hugetlb_entries, hugetlb_copied : int
        Present entries of hugetlb mappings; those among them whose folio was copied because it may be pinned.
    contpte_reads, contpte_folds, contpte_unfolds : int
        arm64 contpte: entries read beside those of `ptep_get`, to gather the young and dirty bits of a folded block
        (all of it, for each entry asked for); blocks that a single entry completed (others are set folded); blocks
        unfolded.
    batch_hist : numpy.ndarray
        int64[ptrs_per_pte + 1]: batches by nr.
    """

    vmas_copied: int
    vmas_skipped: int
    tables_allocated: int
    ptes_none: int
    ptes_present: int
    ptes_single: int
    ptes_batched: int
    batches: int
    folio_ref_add: int
    rmap_dup: int
    ptep_get: int
    wrprotect_ptes: int
    ptes_wrprotected: int
    set_ptes: int
    eagain_rounds: int
    copied_pages: int
    anon_exclusive_cleared: int
    special_ptes: int
    swap_entries: int
    migration_entries: int
    device_private_entries: int
    device_exclusive_entries: int
    hwpoison_entries: int
    pte_markers: int
    pmds_copied: int
    pmds_split: int
    tables_deposited: int
    hugetlb_entries: int
    hugetlb_copied: int
    contpte_reads: int
    contpte_folds: int
    contpte_unfolds: int
    batch_hist: npt.NDArray[np.int64]

    @classmethod
    def from_array(cls, stats: npt.NDArray[np.int64]) -> ForkStats:
        """Read the counters of a stats array (:func:`ptebatch.mm.new_stats`)."""
        n = len(STAT_FIELDS)
        values: list[Any] = [*stats[:n].tolist(), stats[n:].copy()]
        return cls(*values)

    def to_dict(self) -> dict[str, Any]:
        """All counters as plain ints; ``batch_hist`` as {nr: batches}, zeros left out."""
        counters: dict[str, Any] = {name: getattr(self, name) for name in STAT_FIELDS}
        counters["batch_hist"] = {str(nr): int(self.batch_hist[nr]) for nr in np.flatnonzero(self.batch_hist)}
        return counters

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ForkStats) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


if tuple(field.name for field in fields(ForkStats))[:-1] != STAT_FIELDS:
    raise ImportError("ForkStats and ptebatch.mm.STAT_FIELDS name different counters")


@dataclass(frozen=True)
class ForkResult:
    """The child a fork made, what it did, and what there is to say about it."""

    child: Mm
    stats: ForkStats
    semantics: KernelSemantics
    batching: bool
    allocations: int
    notes: tuple[str, ...] = ()


def vma_needs_copy(dst_vma: Vma, src_vma: Vma, semantics: KernelSemantics) -> bool:
    """Whether fork copies the entries of a VMA (mm/memory.c ``vma_needs_copy``).

    A VMA without anonymous pages is filled by faults in the child instead; 6.19 (``vm_maybe_guard``) adds guard
    regions to the reasons for copying and asks the child's flags for all of them.
    """
    if dst_vma.vm_flags & arch.VM_UFFD_WP:
        return True
    if src_vma.vm_flags & (arch.VM_PFNMAP | arch.VM_MIXEDMAP):
        return True
    if semantics.vm_maybe_guard and dst_vma.vm_flags & arch.VM_MAYBE_GUARD:
        return True
    return src_vma.anon_vma


def dup_vma(vma: Vma) -> Vma:
    """The child's VMA: uffd flags go unless the userfaultfd reports forks, locked flags always do."""
    drop = VM_LOCKED_FLAGS | (0 if vma.uffd_event_fork else VM_UFFD_FLAGS)
    wiped = bool(vma.vm_flags & arch.VM_WIPEONFORK)
    return replace(
        vma,
        vm_flags=vma.vm_flags & ~drop,
        anon_vma=vma.anon_vma and not wiped,
        uffd_event_fork=vma.uffd_event_fork,
    )


class ForkPlan:
    """A fork with its allocations made: the child's VMAs and page tables exist, nothing is copied yet.

    ``run()`` is the part of fork that a benchmark times: the read-only pass over the PFNs and the walk of all tables.

    Parameters
    ----------
    mm : Mm
        The parent. ``run()`` changes its entries and the memmap as fork does.
    semantics, batching, impl, pfn_without_page, fail_at, threads
        See :func:`fork`.
    keep : bool
        Remember the state before the fork, so that ``reset()`` can bring it back.
    """

    def __init__(
        self,
        mm: Mm,
        *,
        semantics: KernelSemantics = LATEST,
        batching: bool | None = None,
        impl: str = "core",
        pfn_without_page: Literal["error", "as_kernel"] = "error",
        keep: bool = False,
        fail_at: int | None = None,
        threads: int = 1,
    ) -> None:
        if pfn_without_page not in ("error", "as_kernel"):
            raise ArgumentError(f"pfn_without_page={pfn_without_page!r}: choose 'error' or 'as_kernel'")
        if fail_at is not None and (type(fail_at) is not int or fail_at < 0):
            raise ArgumentError(f"fail_at={fail_at!r}: the number of an allocation, counted from 0, or None")
        self.threads = checks.check_int("threads", threads, 1, checks.MAX_THREADS)
        mm.validate()
        self.mm = mm
        self.allocations = Allocations(fail_at)
        self.semantics = semantics
        self.batching = resolve_batching(semantics, batching)
        self.impl, self.impl_name = resolve_impl(impl), impl
        self.pfn_without_page: Literal["error", "as_kernel"] = pfn_without_page
        need = arch.unmet(mm.layout, semantics.switches)
        if need:
            raise SemanticsError(f"{mm.layout.name} entries need {', '.join(need)}: other kernels write them otherwise")
        layout = configured(mm.layout, semantics)
        self._vmas: list[tuple[Vma, ForkContext | None]] = []  # the child's, and how to copy those that are copied
        self._skipped = 0
        mm_id = mm.folios.new_mm_id()
        self._saved = copy_state(mm) if keep else None  # of which the child's id is part: it is not given twice
        rows = np.zeros(len(mm.vpns), dtype=bool)
        leaf = np.zeros(len(mm.pmd_vpns), dtype=bool)
        for src_vma in mm.vmas:
            if src_vma.vm_flags & arch.VM_DONTCOPY:
                self._skipped += 1
                continue
            dst_vma = dup_vma(src_vma)
            if src_vma.vm_flags & arch.VM_WIPEONFORK or not vma_needs_copy(dst_vma, src_vma, semantics):
                self._skipped += 1
                self._vmas.append((dst_vma, None))
                continue
            context = ForkContext(
                layout=layout,
                semantics=semantics,
                folios=mm.folios,
                src_vma=src_vma,
                dst_vma=dst_vma,
                batching=self.batching,
                has_pinned=mm.has_pinned,
                dst_mm_id=mm_id,
                pfn_without_page=pfn_without_page,
                src_mm_id=mm.mm_id,
                allocations=self.allocations,
            )
            self._vmas.append((dst_vma, context))
            if not is_hugetlb(src_vma):
                first, last = mm.rows(src_vma.start, src_vma.end)
                rows[first:last] = True
            leaf[leaves(mm, src_vma.start, src_vma.end)] = True
        self._vpns, self._pmd_vpns = mm.vpns[rows].copy(), mm.pmd_vpns[leaf].copy()
        self._pmd_entries = np.full(len(self._pmd_vpns), mm.layout.none_value, dtype=np.uint64)
        self.contexts = [context for _, context in self._vmas if context is not None]
        vmas = [vma for vma, _ in self._vmas]
        self.child = Mm(mm.layout, mm.folios, vmas=vmas, vpns=self._vpns, mm_id=mm_id, name=mm.name)

    def run(self, each: Callable[[Vma, npt.NDArray[np.int64]], object] | None = None) -> ForkStats:
        """Copy. Raises before anything changes if an entry cannot be copied.

        Parameters
        ----------
        each : callable, optional
            Called as ``each(vma, counts)`` for every VMA when it is copied; the counts are those of
            `ForkStats.from_array`.

        Raises
        ------
        PfnError, UnsupportedEntryError
            An entry whose PFN has no page, or of a kind that is not modelled; nothing was changed.
        StateError
            A count that would leave its range, or an entry that contradicts its page; what was copied stays.
        ForkError
            The fork failed as the kernel's does (``errno`` is ENOMEM), and the child has been torn down.
        """
        vmas = [context.src_vma for context in self.contexts]
        self._marks = self.impl.check_range(
            self.mm,
            [vma for vma in vmas if not is_hugetlb(vma)],
            pfn_without_page=self.pfn_without_page,
            semantics=self.semantics,
            threads=self.threads,
        )
        if len(self._pmd_vpns):
            for vma in vmas:
                check_leaves(self.mm, vma, self.semantics)
        self.child.pmd_vpns = self._pmd_vpns.copy()
        self.child.pmd_entries = self._pmd_entries.copy()
        stats, leaf_stats = new_stats(self.mm.layout), new_stats(self.mm.layout)
        self.allocations.made = 0
        self._last_table = -1
        try:
            failed = self._dup_mmap(stats, leaf_stats, each)
        finally:
            if len(self._pmd_vpns):
                used = self.child.pmd_entries != np.uint64(self.mm.layout.none_value)
                self.child.pmd_vpns, self.child.pmd_entries = self.child.pmd_vpns[used], self.child.pmd_entries[used]
        if failed is not None:
            exit_mmap(self.child, semantics=self.semantics, impl=self.impl_name, pfn_without_page=self.pfn_without_page)
            raise ForkError(f"fork failed {failed}: the child is gone, the parent stays write-protected up to there")
        leaf_stats[STAT["vmas_copied"]] = len(self.contexts)
        leaf_stats[STAT["vmas_skipped"]] = self._skipped
        leaf_stats[STAT["tables_allocated"]] = len(self.child.vpns)
        return ForkStats.from_array(stats + leaf_stats)

    def _dup_mmap(
        self,
        stats: npt.NDArray[np.int64],
        leaf_stats: npt.NDArray[np.int64],
        each: Callable[[Vma, npt.NDArray[np.int64]], object] | None,
    ) -> str | None:
        """Copy VMA by VMA; where it failed and why, or None."""
        if not self.allocations.allocate():
            return "before the first VMA (ENOMEM)"
        for vma, context in self._vmas:
            if not self.allocations.allocate():
                return f"before VMA {vma.start:#x}-{vma.end:#x} (ENOMEM)"
            before = 0 if each is None else stats + leaf_stats
            ret = 0 if context is None else self._copy_vma(context, stats, leaf_stats)
            if each is not None and context is not None:
                each(context.src_vma, stats + leaf_stats - before)
            if ret:  # -EHWPOISON and -EBUSY become -ENOMEM on the way up
                return f"copying VMA {vma.start:#x}-{vma.end:#x} (ENOMEM)"
        return None if self.allocations.allocate() else "after the last VMA (ENOMEM)"

    def _copy_vma(self, context: ForkContext, stats: npt.NDArray[np.int64], leaf_stats: npt.NDArray[np.int64]) -> int:
        """Copy one VMA in the order of its addresses (``copy_page_range`` down to ``copy_pmd_range``)."""
        mm, child, vma = self.mm, self.child, context.src_vma
        if is_hugetlb(vma):
            return copy_hugetlb_page_range(context, child, mm, leaf_stats)
        shift, nr = mm.layout.page_shift, mm.layout.ptrs_per_pte
        start = vma.start
        at = leaves(mm, vma.start, vma.end)
        for vpn in mm.pmd_vpns[at.start : at.stop].tolist():
            addr = vpn << shift
            ret = self._copy_tables(context, start, addr, stats)
            if ret:
                return ret
            start = addr
            ret = copy_huge_pmd(context, child, mm, int(np.searchsorted(mm.pmd_vpns, vpn)), leaf_stats)
            if ret == -errno.EAGAIN:
                child.add_tables(addr, addr + (nr << shift))
                continue
            if ret:
                return ret
            start = addr + (nr << shift)
        return self._copy_tables(context, start, vma.end, stats)

    def _copy_tables(self, context: ForkContext, start: int, end: int, stats: npt.NDArray[np.int64]) -> int:
        if start == end:
            return 0
        first, last = self.mm.rows(start, end)
        if first < last:
            if int(self.mm.vpns[first]) == self._last_table:
                context = replace(context, has_first_table=True)
            self._last_table = int(self.mm.vpns[last - 1])
        if self._marks and (start, end) == (context.src_vma.start, context.src_vma.end):
            context = replace(context, marks=self._marks.get(start))
        ret: int = self.impl.copy_page_range(context, self.child, self.mm, stats, start, end)
        return ret

    def reset(self) -> None:
        """Bring parent, memmap and child back to what they were before ``run()`` (needs ``keep=True``)."""
        if self._saved is None:
            raise ArgumentError("reset() needs a ForkPlan made with keep=True")
        mm, child, saved = self.mm, self.child, self._saved
        mm.folios.assign(saved.folios)
        mm.pmd_vpns, mm.pmd_entries = saved.pmd_vpns.copy(), saved.pmd_entries.copy()
        if mm.vpns.shape != saved.vpns.shape:  # a PMD was split
            mm.vpns, mm.entries = saved.vpns.copy(), np.empty_like(saved.entries)
            child.vpns = self._vpns
            child.entries = np.empty((len(self._vpns), mm.layout.ptrs_per_pte), dtype=np.uint64)
        # The page tables last, so that they are as near in the caches as the streaming limit's when a run begins.
        child.entries[...] = mm.layout.none_value
        mm.entries[...] = saved.entries
        child.rss[...] = 0
        child.huge_zero, child.hugetlb_usage = False, 0


def fork(
    mm: Mm,
    *,
    semantics: KernelSemantics = LATEST,
    batching: bool | None = None,
    impl: str = "core",
    pfn_without_page: Literal["error", "as_kernel"] = "error",
    fail_at: int | None = None,
    threads: int = 1,
) -> ForkResult:
    """Fork an address space: ``dup_mmap`` over its VMAs, ``copy_page_range`` over their page tables.

    Parameters
    ----------
    mm : Mm
        The parent; its entries and its FolioTable are changed as the kernel changes them.
    semantics : KernelSemantics
        The kernel version to be exact for.
    batching : bool, optional
        None follows the semantics; False copies one PTE at a time under the same semantics; True on a kernel that
        does not batch is an error.
    impl : {"core", "reference"}
        The Cython core, or the plain-Python oracle.
    pfn_without_page : {"error", "as_kernel"}
        A present, non-special entry whose PFN has no page: an error, or what the kernel does (copied without counts).
    fail_at : int, optional
        Let the allocation of this number fail, counted from 0 in the kernel's order; ``ForkResult.allocations`` says
        how many there are. They are: the mm; each VMA (its descriptor, policy, anon_vma and accounting have the same
        outcome); each page table of the child, together with those above it; each table deposited with a PMD; each
        page for a pinned one, also where it turns out not to be needed; each hugetlb entry's table, and folio if it is
        copied; each continuation page of a swap map; and what comes after the memory, such as the pid.
    threads : int
        How many may copy the page tables of a VMA, 1 to 64; the core takes as many as there are CPUs, and tables enough
        to be worth it. Results are the same, but after a StateError more may have been copied. They share tables up to
        the first entry that the core's fast lane does not know: swap, special and PROT_NONE entries, pages outside the
        longest part of the memmap without gaps. One thread does what could lack memory half-way (``fail_at``, pages
        that may be pinned), VMAs in which tables of several threads map the same page, or that have leaves above page
        tables, and architectures that the lane does not serve.

    Returns
    -------
    ForkResult
        The child (sharing the parent's FolioTable) and what was done.

    Raises
    ------
    PfnError, UnsupportedEntryError
        Before anything is changed.
    SemanticsError
        ``batching=True`` under an unbatched preset; a kernel that writes entries in another way than the parent's are.
    ForkError
        The kernel's fork would have failed too: for want of memory, for a poisoned page that may be pinned, for the
        locked folio of a device-exclusive entry. The child is torn down as the kernel does it: counts are what they
        were, but what had been write-protected, shared or split in the parent stays so.
    """
    plan = ForkPlan(
        mm, semantics=semantics, batching=batching, impl=impl, pfn_without_page=pfn_without_page, fail_at=fail_at,
        threads=threads,
    )  # fmt: skip
    stats = plan.run()
    return ForkResult(plan.child, stats, semantics, plan.batching, plan.allocations.made)
