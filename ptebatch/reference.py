"""Fork's PTE copy in plain Python ints and loops: the oracle for the compiled core.

Same functions, same signatures and same errors as `ptebatch.batch`, written from the specification alone.  Nothing
here is fast.  Read it from top to bottom to learn what the kernel does:

1. `folio_pte_batch` counts how many entries in a row map consecutive pages of one folio;
2. `copy_present_ptes` takes references for that many pages, write-protects the parent, sets the child;
3. `copy_nonpresent_pte` copies swap entries, migration entries, markers and the like, one at a time;
4. `copy_pte_range` does this for one page table, `copy_page_range` for all tables of a VMA;
5. `check_range` looks for what cannot be copied before anything is written;
6. `wrprotect_range` uses the same batches for write-protection alone;
7. `zap_present_ptes` and `zap_range` take mappings away again, as munmap and exit do;
8. `_ptep_get`, `_set_ptes` and their like know of arm64's folded blocks (contpte), and are plain elsewhere.

Modelled: mm/internal.h, mm/memory.c, include/linux/rmap.h and include/linux/pgtable.h, v6.6 to v6.19; each
function says which.  What differs between releases is a switch of `ptebatch.semantics.KernelSemantics`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from errno import EAGAIN, EBUSY, EIO, ENOENT, ENOMEM
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ptebatch import arch, checks
from ptebatch.arch import PteLayout
from ptebatch.checks import BatchResult
from ptebatch.errors import EHWPOISON, ArgumentError, PfnError, StateError
from ptebatch.folio import MAX_COUNTER, MAX_MAPCOUNT, Folio, FolioTable
from ptebatch.mm import (
    MM_ANONPAGES,
    MM_FILEPAGES,
    MM_SHMEMPAGES,
    MM_SWAPENTS,
    PFN_WITHOUT_PAGE,
    STAT,
    STAT_FIELDS,
    ZAP_STAT_FIELDS,
    ForkContext,
    Mm,
    Vma,
    ZapContext,
    configured,
    soft_dirty_tracked,
    swap_types,
    vm_page_prot,
)
from ptebatch.semantics import (
    FPB_IGNORE_DIRTY,
    FPB_IGNORE_SOFT_DIRTY,
    FPB_MERGE_WRITE,
    FPB_MERGE_YOUNG_DIRTY,
    FPB_RESPECT_DIRTY,
    FPB_RESPECT_SOFT_DIRTY,
    FPB_RESPECT_WRITE,
    LATEST,
    KernelSemantics,
)
from ptebatch.swap import MAX_SWAP_COUNT, SWAP_MAP_MAX, swap_key

__all__ = [
    "BatchResult",
    "apply_helper",
    "check_range",
    "clear_full_ptes",
    "copy_nonpresent_pte",
    "copy_page_range",
    "copy_present_ptes",
    "copy_pte_range",
    "folio_pte_batch",
    "get_and_clear_full_ptes",
    "set_ptes",
    "wrprotect_ptes",
    "wrprotect_range",
    "zap_present_ptes",
    "zap_range",
]


def _count(stats: np.ndarray, name: str, by: int = 1) -> None:
    stats[STAT[name]] += by


Counter = Callable[..., None]
"""Counts an event of that name, or several."""


def _not_counted(name: str, by: int = 1) -> None:
    pass


def _count_batch(stats: np.ndarray, nr: int) -> None:
    _count(stats, "ptes_present", nr)
    _count(stats, "ptes_single" if nr == 1 else "ptes_batched", nr)
    _count(stats, "batches")
    stats[len(STAT_FIELDS) + nr] += 1


# --- folio_pte_batch --------------------------------------------------------------------------------------------------


def folio_pte_batch(
    entries: np.ndarray,
    idx: int,
    max_nr: int,
    *,
    folios: FolioTable,
    layout: PteLayout,
    semantics: KernelSemantics,
    flags: int = 0,
    vm_flags: int = 0,
    pte: int | None = None,
) -> BatchResult:
    """Count the entries from `idx` on that map consecutive pages of one folio and agree in all bits not ignored.

    Parameters
    ----------
    entries : ndarray of uint64, shape (ptrs_per_pte,)
        One page table; read only.
    idx : int
        Slot of the first entry.
    max_nr : int
        Most entries to look at, at least 1; must not run past the table (nor, the caller's business, the VMA).
    folios : FolioTable
        Says how far the folio reaches.
    layout, semantics
        Architecture and kernel version.
    flags : int
        FPB_IGNORE_* before v6.17 (``semantics.fpb_respect`` off), FPB_RESPECT_* and FPB_MERGE_* since.
    vm_flags : int
        Of the VMA; FPB_MERGE_WRITE makes the entry writable in this VMA's way.
    pte : int, optional
        Value of the first entry as the caller read it; read from the table when left out.

    Returns
    -------
    BatchResult

    Raises
    ------
    ArgumentError
        A bad argument, or a first entry that is not present.
    PfnError
        The first entry's PFN has no page.

    Notes
    -----
    ``folio_pte_batch()`` in mm/memory.c (v6.9) and mm/internal.h (v6.10 to v6.16), ``folio_pte_batch_flags()`` in
    mm/internal.h (v6.17+).
    """
    layout = checks.check_layout(layout)
    entries = checks.check_row("entries", entries, layout, writable=False)
    idx = checks.check_idx(idx, layout)
    max_nr = checks.check_nr("max_nr", max_nr, idx, layout)
    flags = checks.check_flags(flags, semantics)
    vm_flags = checks.check_u64("vm_flags", vm_flags)
    layout = configured(layout, semantics)
    value = _ptep_get(entries, idx, layout, _not_counted) if pte is None else checks.check_u64("pte", pte)
    if not arch.pte_present(layout, value):
        raise ArgumentError(f"pte {value:#x} is not present; a batch starts at a present entry")
    pfn = arch.pte_pfn(layout, value)
    if pfn not in folios:
        raise PfnError(pfn=pfn)
    folio = folios.page(pfn).folio
    return _folio_pte_batch(entries, idx, value, max_nr, folio, layout, semantics, flags, vm_flags, _not_counted)[0]


def _folio_pte_batch(
    entries: np.ndarray,
    idx: int,
    pte: int,
    max_nr: int,
    folio: Folio,
    layout: PteLayout,
    semantics: KernelSemantics,
    flags: int,
    vm_flags: int,
    count: Counter,
) -> tuple[BatchResult, int]:
    """Return the batch and how many entries were read to find it."""
    limit = min(max_nr, folio.pfn + folio.nr_pages - arch.pte_pfn(layout, pte))
    any_writable = any_young = any_dirty = False
    hint = nr = arch.pte_batch_hint(layout, idx, pte)
    expected = arch.pte_advance_pfn(layout, _normalise(layout, semantics, flags, pte), hint)
    reads = 0
    while nr < limit:
        cur = _ptep_get(entries, idx + nr, layout, count)
        reads += 1
        if _normalise(layout, semantics, flags, cur) != expected:
            break
        any_writable |= arch.pte_write(layout, cur)
        any_young |= arch.pte_young(layout, cur)
        any_dirty |= arch.pte_dirty(layout, cur)
        hint = arch.pte_batch_hint(layout, idx + nr, cur)
        expected = arch.pte_advance_pfn(layout, expected, hint)
        nr += hint
    if not semantics.fpb_clamp and limit <= nr < max_nr:
        _ptep_get(entries, idx + nr, layout, count)
        reads += 1  # before the clamp the folio's end was noticed only on the entry behind it
    nr = min(nr, limit)  # a block may reach beyond what is asked for

    merged = pte
    if semantics.fpb_respect:
        if flags & FPB_MERGE_WRITE and any_writable:
            merged = arch.pte_mkwrite(layout, merged, vm_flags)
        if flags & FPB_MERGE_YOUNG_DIRTY and any_young:
            merged = arch.pte_mkyoung(layout, merged)
        if flags & FPB_MERGE_YOUNG_DIRTY and any_dirty:
            merged = arch.pte_mkdirty(layout, merged)
    return BatchResult(nr, any_writable, any_young, any_dirty, merged), reads


def _normalise(layout: PteLayout, semantics: KernelSemantics, flags: int, v: int) -> int:
    """Remove from an entry what the comparison ignores (``__pte_batch_clear_ignored``); young always."""
    if semantics.fpb_respect:
        ignore_dirty = not flags & FPB_RESPECT_DIRTY
        ignore_soft_dirty = not flags & FPB_RESPECT_SOFT_DIRTY
        ignore_write = not flags & FPB_RESPECT_WRITE
    else:
        ignore_dirty = bool(flags & FPB_IGNORE_DIRTY)
        ignore_soft_dirty = bool(flags & FPB_IGNORE_SOFT_DIRTY)
        ignore_write = True
    if ignore_dirty:
        v = arch.pte_mkclean(layout, v)
    if ignore_soft_dirty:
        v = arch.pte_clear_soft_dirty(layout, v)
    if ignore_write:
        v = arch.pte_wrprotect(layout, v)
    return arch.pte_mkold(layout, v)


# --- set_ptes, wrprotect_ptes -----------------------------------------------------------------------------------------


def set_ptes(
    entries: np.ndarray, idx: int, pte: int, nr: int, *, layout: PteLayout, folios: FolioTable | None = None
) -> None:
    """Set `nr` slots to `pte`, the PFN advancing by one from slot to slot.

    With arm64 contpte, blocks that are covered whole are set folded, and a single entry may complete a block.

    Parameters
    ----------
    entries : ndarray of uint64, shape (ptrs_per_pte,)
        One page table; written.
    idx : int
        First slot.
    pte : int
        Value of the first slot.
    nr : int
        Number of slots. With more than one, `pte` must be present and the slots must not be.
    layout : PteLayout
    folios : FolioTable, optional
        Says whether a block that a single entry completes lies in one folio; without it no such block is folded.

    Raises
    ------
    ArgumentError
        A bad argument or a broken contract; nothing is written then.

    Notes
    -----
    ``set_ptes()``, include/linux/pgtable.h, v6.6 to v6.19.
    """
    layout = checks.check_layout(layout)
    entries = checks.check_row("entries", entries, layout, writable=True)
    idx = checks.check_idx(idx, layout)
    nr = checks.check_nr("nr", nr, idx, layout)
    pte = checks.check_u64("pte", pte)
    checks.check_set_ptes(entries, idx, pte, nr, layout)
    _set_ptes(entries, idx, pte, nr, layout, folios, _not_counted)


def _set_ptes(
    entries: np.ndarray, idx: int, pte: int, nr: int, layout: PteLayout, folios: FolioTable | None, count: Counter
) -> None:
    if arch.pte_present(layout, pte):
        pte &= ~layout.set_ptes_clear  # s390
    if layout.cont:
        _contpte_set_ptes(entries, idx, pte & ~layout.cont, nr, layout, folios, count)
        return
    for k in range(nr):
        entries[idx + k] = arch.pte_advance_pfn(layout, pte, k)


def wrprotect_ptes(entries: np.ndarray, idx: int, nr: int, *, layout: PteLayout) -> None:
    """Write-protect `nr` entries, each on its own.

    Parameters
    ----------
    entries : ndarray of uint64, shape (ptrs_per_pte,)
        One page table; written.
    idx : int
        First slot.
    nr : int
        Number of slots. All must be present and map consecutive pages of one folio; other bits may differ.
    layout : PteLayout

    Raises
    ------
    ArgumentError
        A bad argument or a broken contract; nothing is written then.

    Notes
    -----
    ``wrprotect_ptes()``, include/linux/pgtable.h, v6.9+.
    """
    layout = checks.check_layout(layout)
    entries = checks.check_row("entries", entries, layout, writable=True)
    idx = checks.check_idx(idx, layout)
    nr = checks.check_nr("nr", nr, idx, layout)
    checks.check_batch_ptes("wrprotect_ptes", entries, idx, nr, layout)
    _wrprotect_ptes(entries, idx, nr, layout, _not_counted)


def _wrprotect_ptes(entries: np.ndarray, idx: int, nr: int, layout: PteLayout, count: Counter) -> None:
    if nr == 1 and int(entries[idx]) & layout.cont:
        _contpte_unfold(entries, idx, layout, count)  # valid or not: only present entries come here
    elif nr > 1:
        _contpte_try_unfold_partial(entries, idx, nr, layout, count)
    for slot in range(idx, idx + nr):
        entries[slot] = arch.ptep_set_wrprotect(layout, int(entries[slot]))


# --- arm64 contpte ----------------------------------------------------------------------------------------------------
# arch/arm64/mm/contpte.c and the wrappers in arch/arm64/include/asm/pgtable.h, v6.9 to v6.19. A block is `cont_ptes`
# slots, aligned; all of it is in one table. Where a layout has no `cont`, none of this happens.


def _ptep_get(entries: np.ndarray, idx: int, layout: PteLayout, count: Counter) -> int:
    if arch.pte_valid_cont(layout, int(entries[idx])):
        count("contpte_reads", layout.cont_ptes)
    return arch.ptep_get(layout, entries, idx)


def _block(entries: np.ndarray, idx: int, layout: PteLayout) -> np.ndarray:
    start = idx - idx % layout.cont_ptes
    return entries[start : start + layout.cont_ptes]


def _contpte_convert(entries: np.ndarray, idx: int, pte: int, layout: PteLayout) -> None:
    """Write a whole block anew after `pte`, one of its entries, with or without `cont`."""
    pfn = arch.pte_pfn(layout, pte)
    pte = arch.pte_advance_pfn(layout, pte, -(pfn % layout.cont_ptes))
    block = _block(entries, idx, layout)
    if any(arch.pte_dirty(layout, each) for each in block.tolist()):
        pte = arch.pte_mkdirty(layout, pte)
    if any(arch.pte_young(layout, each) for each in block.tolist()):
        pte = arch.pte_mkyoung(layout, pte)
    block[:] = [arch.pte_advance_pfn(layout, pte, k) for k in range(layout.cont_ptes)]


def _contpte_unfold(entries: np.ndarray, idx: int, layout: PteLayout, count: Counter) -> None:
    count("contpte_unfolds")
    _contpte_convert(entries, idx, int(entries[idx]) & ~layout.cont, layout)


def _contpte_try_unfold(entries: np.ndarray, idx: int, layout: PteLayout, count: Counter) -> None:
    if arch.pte_valid_cont(layout, int(entries[idx])):
        _contpte_unfold(entries, idx, layout, count)


def _contpte_try_unfold_partial(entries: np.ndarray, idx: int, nr: int, layout: PteLayout, count: Counter) -> None:
    """Unfold the blocks at both ends of a range that it does not cover whole."""
    if not layout.cont:
        return
    if idx % layout.cont_ptes or nr < layout.cont_ptes:
        _contpte_try_unfold(entries, idx, layout, count)
    if (idx + nr) % layout.cont_ptes:
        _contpte_try_unfold(entries, idx + nr - 1, layout, count)


def _contpte_try_fold(
    entries: np.ndarray, idx: int, pte: int, layout: PteLayout, folios: FolioTable | None, count: Counter
) -> None:
    """Fold the block whose last entry was just set, if all of it is alike but for young and dirty, and in one folio."""
    last = layout.cont_ptes - 1
    pfn = arch.pte_pfn(layout, pte)
    if idx % layout.cont_ptes != last or pfn % layout.cont_ptes != last or not pte & layout.valid:
        return
    if arch.pte_special(layout, pte) or folios is None or pfn not in folios:
        return
    if pfn - folios.page(pfn).folio.pfn < last:
        return
    plain = [arch.pte_mkold(layout, arch.pte_mkclean(layout, v)) for v in (pte, *_block(entries, idx, layout).tolist())]
    if all(v == arch.pte_advance_pfn(layout, plain[0], k - last) for k, v in enumerate(plain[1:])):
        count("contpte_folds")
        _contpte_convert(entries, idx, pte | layout.mkcont, layout)


def _contpte_set_ptes(
    entries: np.ndarray, idx: int, pte: int, nr: int, layout: PteLayout, folios: FolioTable | None, count: Counter
) -> None:
    """``set_ptes()`` of a value without `cont`: single entries may unfold and fold, blocks covered whole are folded."""
    if nr == 1:
        _contpte_try_unfold(entries, idx, layout, count)
        entries[idx] = pte
        _contpte_try_fold(entries, idx, pte, layout, folios, count)
        return
    size, pfn, end = layout.cont_ptes, arch.pte_pfn(layout, pte), idx + nr
    for slot in range(idx, end):
        start = slot - slot % size
        whole = idx <= start and start + size <= end and (pfn + start - idx) % size == 0
        value = pte | layout.mkcont if whole else pte
        entries[slot] = arch.pte_advance_pfn(layout, value, slot - idx)


# --- copy_present_ptes ------------------------------------------------------------------------------------------------


def copy_present_ptes(
    ctx: ForkContext,
    dst: np.ndarray,
    src: np.ndarray,
    idx: int,
    max_nr: int,
    rss: np.ndarray,
    prealloc: list[int],
    stats: np.ndarray,
) -> int:
    """Copy the present entry at `idx` and, where they form a batch with it, the entries behind it.

    Parameters
    ----------
    ctx : ForkContext
        Everything that stays the same over a VMA; its folios are written.
    dst, src : ndarray of uint64, shape (ptrs_per_pte,)
        The child's and the parent's table; both written.
    idx : int
        Slot in both.
    max_nr : int
        Entries left in VMA and table, at least 1.
    rss : ndarray of int64, shape (4,)
        Pages mapped by the child are added here, by kind.
    prealloc : list of int
        ``[]``, or ``[pfn]`` of a free page to copy into; emptied when the page is used.
    stats : ndarray of int64
        From `ptebatch.mm.new_stats`; added to. The read of the first entry is the caller's to count.

    Returns
    -------
    int
        Number of entries copied, at least 1; or -EAGAIN: call again with a page in `prealloc`; or -EHWPOISON: the
        page to copy is poisoned. After an error nothing has changed.

    Raises
    ------
    ArgumentError, PfnError
        A bad argument, an entry that is not present; a PFN without a page.
    StateError
        A count would leave its range; nothing has changed.

    Notes
    -----
    ``copy_present_ptes()``, mm/memory.c, v6.9+; ``copy_present_pte()`` before.
    """
    ctx = checks.check_context(ctx)
    dst = checks.check_row("dst", dst, ctx.layout, writable=True)
    src = checks.check_row("src", src, ctx.layout, writable=True)
    idx = checks.check_idx(idx, ctx.layout)
    max_nr = checks.check_nr("max_nr", max_nr, idx, ctx.layout)
    rss = checks.check_rss(rss)
    prealloc = checks.check_prealloc(prealloc)
    stats = checks.check_stats(stats, ctx.layout)
    checks.check_no_overlap(dst=dst, src=src, rss=rss, stats=stats)
    pte = _ptep_get(src, idx, ctx.layout, _not_counted)
    if arch.pte_none(ctx.layout, pte):
        raise ArgumentError(f"slot {idx} of src is empty; copy_present_ptes needs a present entry")
    if not arch.pte_present(ctx.layout, pte):
        raise ArgumentError(f"slot {idx} of src is not present; copy_nonpresent_pte is for such entries")
    return _copy_present_ptes(ctx, dst, src, idx, pte, max_nr, rss, prealloc, stats, None)


def _copy_present_ptes(
    ctx: ForkContext,
    dst: np.ndarray,
    src: np.ndarray,
    idx: int,
    pte: int,
    max_nr: int,
    rss: np.ndarray,
    prealloc: list[int],
    stats: np.ndarray,
    addr: int | None,
) -> int:
    layout, semantics, folios = ctx.layout, ctx.semantics, ctx.folios
    pfn = arch.pte_pfn(layout, pte)

    if not _vm_normal_page(folios, layout, pte, ctx.pfn_without_page, addr):
        # Zero page, device memory: the entry is copied, but there is nothing to count.
        _count(stats, "special_ptes")
        _copy_entries(ctx, dst, src, idx, pte, 1, stats)
        return 1

    folio = folios.page(pfn).folio
    anon = folio.anon

    if _batching(ctx) and not prealloc and folio.order > 0 and max_nr > 1:
        flags = _fork_batch_flags(ctx)
        vm_flags = ctx.src_vma.vm_flags
        count = partial(_count, stats)
        batch, reads = _folio_pte_batch(src, idx, pte, max_nr, folio, layout, semantics, flags, vm_flags, count)
        _count(stats, "ptep_get", reads)
        nr = batch.nr
        _check_room(ctx, folio, pfn, nr, addr)
        folio.refcount += nr
        if anon and not _try_dup_anon_rmap(ctx, folio, pfn, nr, stats):
            folio.refcount -= nr
            return -EAGAIN
        if not anon:
            _dup_rmap(ctx, folio, pfn, nr)
        # v6.17+ merged the write bit into batch.pte; before, it is done here. The result is the same.
        pte = arch.pte_mkwrite(layout, pte, vm_flags) if batch.any_writable else pte
    else:
        nr = 1
        _check_room(ctx, folio, pfn, 1, addr)
        folio.refcount += 1
        if anon and not _try_dup_anon_rmap(ctx, folio, pfn, 1, stats):
            folio.refcount -= 1
            return _copy_present_page(ctx, dst, idx, pte, rss, prealloc, stats)
        if not anon:
            _dup_rmap(ctx, folio, pfn, 1)

    _count(stats, "folio_ref_add")
    _count(stats, "rmap_dup")
    rss[_mm_counter(folio)] += nr
    _copy_entries(ctx, dst, src, idx, pte, nr, stats)
    return nr


def _batching(ctx: ForkContext) -> bool:
    return ctx.batching and ctx.semantics.fork_batching


def _vm_normal_page(folios: FolioTable, layout: PteLayout, pte: int, pfn_without_page: str, addr: int | None) -> bool:
    """Tell whether a present entry maps a page that is counted (``vm_normal_page()``, mm/memory.c, pte_special)."""
    if arch.pte_special(layout, pte):
        return False
    pfn = arch.pte_pfn(layout, pte)
    if pfn in folios:
        return True
    if pfn_without_page == "error":
        raise PfnError(pfn=pfn, address=addr)
    return False  # the kernel complains and goes on


def _fork_batch_flags(ctx: ForkContext) -> int:
    """Return the flags with which fork asks for a batch.

    Dirty matters in private mappings, soft-dirty where it is tracked, write never.
    """
    vm_flags = ctx.src_vma.vm_flags
    private = not vm_flags & arch.VM_SHARED
    tracked = soft_dirty_tracked(ctx.layout, ctx.src_vma)
    if ctx.semantics.fpb_respect:
        flags = FPB_MERGE_WRITE
        flags |= FPB_RESPECT_DIRTY if private else 0
        flags |= FPB_RESPECT_SOFT_DIRTY if tracked else 0
    else:
        flags = 0 if private else FPB_IGNORE_DIRTY
        flags |= 0 if tracked else FPB_IGNORE_SOFT_DIRTY
    return flags


def _mm_counter(folio: Folio) -> int:
    """Return which rss counter a folio belongs to (``mm_counter()``, include/linux/mm.h)."""
    if folio.anon:
        return MM_ANONPAGES
    return MM_SHMEMPAGES if folio.swapbacked else MM_FILEPAGES


def _copy_entries(
    ctx: ForkContext, dst: np.ndarray, src: np.ndarray, idx: int, pte: int, nr: int, stats: np.ndarray
) -> None:
    """Write-protect the parent's entries and set the child's, all of which derive from `pte`.

    ``__copy_present_ptes()``, mm/memory.c, v6.9+.
    """
    layout = ctx.layout
    if arch.is_cow_mapping(ctx.src_vma.vm_flags) and arch.pte_write(layout, pte):
        _wrprotect_ptes(src, idx, nr, layout, partial(_count, stats))
        _count(stats, "wrprotect_ptes")
        _count(stats, "ptes_wrprotected", nr)
        pte = arch.pte_wrprotect(layout, pte)
    if ctx.src_vma.vm_flags & arch.VM_SHARED:
        pte = arch.pte_mkclean(layout, pte)
    pte = arch.pte_mkold(layout, pte)
    if not ctx.dst_vma.vm_flags & arch.VM_UFFD_WP:
        pte = arch.pte_clear_uffd_wp(layout, pte)
    _set_ptes(dst, idx, pte, nr, layout, ctx.folios, partial(_count, stats))
    _count(stats, "set_ptes")
    _count_batch(stats, nr)


def _copy_present_page(
    ctx: ForkContext, dst: np.ndarray, idx: int, pte: int, rss: np.ndarray, prealloc: list[int], stats: np.ndarray
) -> int:
    """Give the child a page of its own, because the parent's may be pinned (``copy_present_page()``, mm/memory.c).

    The parent keeps page, entry and exclusivity.
    """
    layout = ctx.layout
    if not prealloc:
        return -EAGAIN
    if ctx.semantics.copy_mc and ctx.folios.page(arch.pte_pfn(layout, pte)).hwpoison:
        return -EHWPOISON
    new_pfn = prealloc[0]
    ctx.folios.add(new_pfn, 0, anon=True, refcount=1, mapcount=1, anon_exclusive=True)
    prealloc.clear()
    rss[MM_ANONPAGES] += 1

    new = arch.mk_pte(layout, new_pfn, vm_page_prot(layout, ctx.dst_vma))
    new = arch.pte_mkdirty(layout, new)
    if ctx.dst_vma.vm_flags & arch.VM_WRITE:
        new = arch.pte_mkwrite(layout, new, ctx.dst_vma.vm_flags)
    if ctx.dst_vma.vm_flags & arch.VM_UFFD_WP and arch.pte_uffd_wp(layout, pte):
        new = arch.pte_mkuffd_wp(layout, new)
    _set_ptes(dst, idx, new, 1, layout, ctx.folios, partial(_count, stats))
    _count(stats, "copied_pages")
    _count(stats, "set_ptes")
    _count_batch(stats, 1)
    return 1


# --- copy_nonpresent_pte ----------------------------------------------------------------------------------------------


def copy_nonpresent_pte(
    ctx: ForkContext, dst: np.ndarray, src: np.ndarray, idx: int, rss: np.ndarray, stats: np.ndarray
) -> int:
    """Copy one entry that is neither present nor empty: swap, migration, device, hwpoison, or a marker.

    Parameters
    ----------
    ctx : ForkContext
        Its folios and swap slots are written.
    dst, src : ndarray of uint64, shape (ptrs_per_pte,)
        The child's and the parent's table; both written.
    idx : int
        Slot in both.
    rss : ndarray of int64, shape (4,)
        The child's; added to.
    stats : ndarray of int64
        Added to.

    Returns
    -------
    int
        0: copied, or a marker the child does not get. -ENOENT: a device-exclusive entry was made present again in the
        parent; copy it as such. -EBUSY: that could not be done, somebody holds the folio's lock. -EIO: the count of the
        swap slot needs a continuation page and there is no memory for it; nothing has changed.

    Raises
    ------
    ArgumentError
        A bad argument, or an entry that is present or empty.
    PfnError
        A migration or device entry whose PFN has no page.
    UnsupportedEntryError
        A swap type that no kernel uses.
    StateError
        A count would leave its range, or a device-private entry maps ordinary memory; nothing has changed.

    Notes
    -----
    ``copy_nonpresent_pte()`` and ``restore_exclusive_pte()``, mm/memory.c, v6.6 to v6.19.
    """
    ctx = checks.check_context(ctx)
    dst = checks.check_row("dst", dst, ctx.layout, writable=True)
    src = checks.check_row("src", src, ctx.layout, writable=True)
    idx = checks.check_idx(idx, ctx.layout)
    rss = checks.check_rss(rss)
    stats = checks.check_stats(stats, ctx.layout)
    checks.check_no_overlap(dst=dst, src=src, rss=rss, stats=stats)
    checks.check_nonpresent(ctx.layout, int(src[idx]), idx)
    return _copy_nonpresent_pte(ctx, dst, src, idx, int(src[idx]), rss, stats, None)


def _copy_nonpresent_pte(
    ctx: ForkContext,
    dst: np.ndarray,
    src: np.ndarray,
    idx: int,
    pte: int,
    rss: np.ndarray,
    stats: np.ndarray,
    addr: int | None,
) -> int:
    layout, types = ctx.layout, swap_types(ctx.semantics)
    kind = _swap_kind(layout, types, pte, addr)
    cow = arch.is_cow_mapping(ctx.dst_vma.vm_flags)
    uffd_wp = bool(ctx.dst_vma.vm_flags & arch.VM_UFFD_WP)

    if kind == "marker":
        marker = arch.copy_pte_marker(arch.swp_offset(layout, pte), ctx.semantics.guard_markers, uffd_wp)
        if marker:
            dst[idx] = arch.swp_entry(layout, arch.SWP_PTE_MARKER, marker)
        _count_nonpresent(stats, "pte_markers")
        return 0

    if kind == "swap":
        if not _swap_duplicate(ctx, pte, addr):
            return -EIO
        if arch.pte_swp_exclusive(layout, pte):
            pte = arch.pte_swp_clear_exclusive(layout, pte)
            src[idx] = pte
        rss[MM_SWAPENTS] += 1
        _count_nonpresent(stats, "swap_entries")
    elif kind == "hwpoison":
        _count_nonpresent(stats, "hwpoison_entries")
    else:
        pfn = arch.swp_offset_pfn(layout, pte)
        if pfn not in ctx.folios:
            raise PfnError(pfn=pfn, address=addr)
        folio = ctx.folios.page(pfn).folio
        if kind.startswith("migration"):
            # References and mappings of the page are the migration's own.
            if kind != "migration read" and cow:
                old, pte = pte, arch.swp_entry(layout, _type_of(types, "migration read"), arch.swp_offset(layout, pte))
                if arch.pte_swp_soft_dirty(layout, old):
                    pte = arch.pte_swp_mksoft_dirty(layout, pte)
                if arch.pte_swp_uffd_wp(layout, old):
                    pte = arch.pte_swp_mkuffd_wp(layout, pte)
                src[idx] = pte
            _count_nonpresent(stats, "migration_entries")
        elif kind in ("device write", "device read"):
            if not folio.device:
                raise checks.not_device_memory(pfn, addr)
            _check_room(ctx, folio, pfn, 1, addr)
            folio.refcount += 1
            if folio.anon:
                _try_dup_anon_rmap(ctx, folio, pfn, 1, stats)  # device memory is never pinned
            else:
                _dup_rmap(ctx, folio, pfn, 1)
            _count(stats, "folio_ref_add")
            _count(stats, "rmap_dup")
            if kind == "device write" and cow:
                old, pte = pte, arch.swp_entry(layout, _type_of(types, "device read"), arch.swp_offset(layout, pte))
                if arch.pte_swp_uffd_wp(layout, old):
                    pte = arch.pte_swp_mkuffd_wp(layout, pte)
                src[idx] = pte
            _count_nonpresent(stats, "device_private_entries")
        else:
            if folio.locked:
                return -EBUSY
            new = _restore_exclusive_pte(ctx, folio, pfn, pte, kind, addr)
            _set_ptes(src, idx, new, 1, layout, ctx.folios, partial(_count, stats))
            _count_nonpresent(stats, "device_exclusive_entries")
            return -ENOENT
        rss[_mm_counter(folio)] += 1

    if not uffd_wp:
        pte = arch.pte_swp_clear_uffd_wp(layout, pte)
    dst[idx] = pte
    return 0


def _count_nonpresent(stats: np.ndarray, name: str) -> None:
    _count(stats, name)
    _count(stats, "ptep_get", 1)  # beside the walk's own read


def _swap_kind(layout: PteLayout, types: dict[int, str], pte: int, addr: int | None) -> str:
    """Name the kind of a swap-type entry, one of `ptebatch.arch.SWP_KINDS`."""
    number = arch.swp_type(layout, pte)
    if number > arch.SWP_PTE_MARKER:
        raise checks.unknown_swap_type(number, addr)
    return types.get(number, "swap")


def _type_of(types: dict[int, str], name: str) -> int:
    return next(number for number, kind in types.items() if kind == name)


def _swap_duplicate(ctx: ForkContext, pte: int, addr: int | None) -> bool:
    """Count one more reference to a swap slot (``swap_duplicate()``, mm/swapfile.c); False without memory for it."""
    swap, layout = ctx.folios.swap, ctx.layout
    number, offset = arch.swp_type(layout, pte), arch.swp_offset(layout, pte)
    count = swap.count(number, offset)
    if count == MAX_SWAP_COUNT:
        raise checks.swap_slot_full(number, offset, addr)
    needs_page = count == SWAP_MAP_MAX and not swap.continued(number, offset, layout.page_shift)
    if needs_page and ctx.allocations is not None and not ctx.allocations.allocate():
        return False
    swap.add([swap_key(number, offset)])
    return True


def _restore_exclusive_pte(ctx: ForkContext, folio: Folio, pfn: int, pte: int, kind: str, addr: int | None) -> int:
    """Give the parent back a page that a device had for itself; return its entry.

    ``restore_exclusive_pte()``, mm/memory.c.  Through v6.14 the entry's type said whether it had been writable, and the
    mapping had not been counted meanwhile.
    """
    layout, vma = ctx.layout, ctx.src_vma
    page = ctx.folios.page(pfn)
    new = arch.pte_mkold(layout, arch.mk_pte(layout, pfn, vm_page_prot(layout, vma)))
    if arch.pte_swp_soft_dirty(layout, pte):
        new = arch.pte_mksoft_dirty(layout, new)
    if arch.pte_swp_uffd_wp(layout, pte):
        new = arch.pte_mkuffd_wp(layout, new)
    writable = bool(vma.vm_flags & arch.VM_WRITE)
    if ctx.semantics.single_device_exclusive:
        # can_change_pte_writable(), mm/mprotect.c; in a shared mapping it asks for a dirty entry, which this is not.
        watched = vma.vm_flags & arch.VM_UFFD_WP and arch.pte_uffd_wp(layout, new)
        watched = watched or (soft_dirty_tracked(layout, vma) and not arch.pte_soft_dirty(layout, new))
        shared = vma.vm_flags & arch.VM_SHARED or not (folio.anon and page.anon_exclusive)
        if writable and not watched and not shared and not arch.pte_protnone(layout, new):
            if folio.dirty:
                new = arch.pte_mkdirty(layout, new)
            new = arch.pte_mkwrite(layout, new, vma.vm_flags)
        return new
    if kind == "device exclusive write" and not arch.pte_swp_uffd_wp(layout, pte):
        new = arch.pte_mkdirty(layout, new)
        new = arch.pte_mkwrite(layout, new, vma.vm_flags) if writable else new
    _check_room(ctx, folio, pfn, 1, addr)
    _dup_rmap(ctx, folio, pfn, 1, ctx.src_mm_id)
    return new


# --- rmap -------------------------------------------------------------------------------------------------------------


def _check_room(ctx: ForkContext, folio: Folio, pfn: int, nr: int, addr: int | None) -> None:
    """Refuse counts that would leave their range, before any of them changes."""
    room = folio.refcount + nr <= MAX_COUNTER
    if _page_mapcounts(ctx, folio):
        room &= all(ctx.folios.page(pfn + k).mapcount + 1 <= MAX_MAPCOUNT for k in range(nr))
    if folio.order > 0 and ctx.semantics.large_mapcount:
        room &= folio.large_mapcount + nr <= MAX_COUNTER
    if not room:
        where = "" if addr is None else f" at address {addr:#x}"
        raise StateError(f"PFN {pfn:#x}{where}: its mapcount or its folio's refcount has reached the limit")


def _page_mapcounts(ctx: ForkContext | ZapContext, folio: Folio) -> bool:
    """Tell whether each page of the folio counts its own mappings."""
    return folio.order == 0 or not ctx.semantics.config.no_page_mapcount


def _tracks_mm_ids(ctx: ForkContext | ZapContext, folio: Folio) -> bool:
    return ctx.semantics.mm_id and folio.order > 0 and not folio.hugetlb


def _try_dup_anon_rmap(ctx: ForkContext, folio: Folio, pfn: int, nr: int, stats: np.ndarray) -> bool:
    """Share `nr` pages with the child, unless one of them is exclusive and may be pinned; then change nothing.

    ``folio_try_dup_anon_rmap_ptes()``, include/linux/rmap.h, v6.8+.  The caller has taken its references already, and
    a small folio is judged by its refcount, so they take part.
    """
    pages = [ctx.folios.page(pfn + k) for k in range(nr)]
    maybe_pinned = not folio.device and ctx.has_pinned and folio.maybe_dma_pinned
    if maybe_pinned and any(page.anon_exclusive for page in pages):
        return False
    for page in pages:
        _count(stats, "anon_exclusive_cleared", int(page.anon_exclusive))
        page.anon_exclusive = False
    _dup_rmap(ctx, folio, pfn, nr)
    return True


def _dup_rmap(ctx: ForkContext, folio: Folio, pfn: int, nr: int, mm_id: int | None = None) -> None:
    """Count `nr` more mappings, the child's or those of `mm_id` (``folio_dup_file_rmap_ptes()``, v6.8+)."""
    if _page_mapcounts(ctx, folio):
        for k in range(nr):
            ctx.folios.page(pfn + k).mapcount += 1
    if folio.order > 0 and ctx.semantics.large_mapcount:
        folio.large_mapcount += nr
    if _tracks_mm_ids(ctx, folio):
        folio.add_mm_mapping(ctx.dst_mm_id if mm_id is None else mm_id, nr)


# --- walkers ----------------------------------------------------------------------------------------------------------


def copy_pte_range(
    ctx: ForkContext, dst: np.ndarray, src: np.ndarray, idx: int, end: int, rss: np.ndarray, stats: np.ndarray
) -> int:
    """Copy the slots ``idx..end`` (end exclusive) of one page table.

    Parameters
    ----------
    ctx : ForkContext
        Its folios are written: counted, and new pages come from them.
    dst, src : ndarray of uint64, shape (ptrs_per_pte,)
        The child's and the parent's table; both written.
    idx, end : int
        Slots, all within the VMA.
    rss : ndarray of int64, shape (4,)
        Added to, also when the call fails midway.
    stats : ndarray of int64
        Added to.

    Returns
    -------
    int
        0, -EHWPOISON, -EBUSY or, where ``ctx.allocations`` lets an allocation fail, -ENOMEM; what was copied before the
        failing slot stays copied.

    Raises
    ------
    PfnError, UnsupportedEntryError, StateError
        As `copy_present_ptes`; what was copied before stays copied. `check_range` finds the first two beforehand.

    Notes
    -----
    ``copy_pte_range()``, mm/memory.c, v6.6 to v6.19.
    """
    ctx = checks.check_context(ctx)
    dst = checks.check_row("dst", dst, ctx.layout, writable=True)
    src = checks.check_row("src", src, ctx.layout, writable=True)
    idx, end = checks.check_span(idx, end, ctx.layout)
    rss = checks.check_rss(rss)
    stats = checks.check_stats(stats, ctx.layout)
    checks.check_no_overlap(dst=dst, src=src, rss=rss, stats=stats)
    return _copy_pte_range(ctx, dst, src, idx, end, rss, stats, None)


def _copy_pte_range(
    ctx: ForkContext,
    dst: np.ndarray,
    src: np.ndarray,
    idx: int,
    end: int,
    rss: np.ndarray,
    stats: np.ndarray,
    table_addr: int | None,
) -> int:
    prealloc: list[int] = []
    while idx < end:
        addr = None if table_addr is None else table_addr + (idx << ctx.layout.page_shift)
        pte = _ptep_get(src, idx, ctx.layout, partial(_count, stats))
        _count(stats, "ptep_get")
        if arch.pte_none(ctx.layout, pte):
            _count(stats, "ptes_none")
            idx += 1
            continue
        if not arch.pte_present(ctx.layout, pte):
            ret = _copy_nonpresent_pte(ctx, dst, src, idx, pte, rss, stats, addr)
            if ret == 0:
                idx += 1
                continue
            if ret != -ENOENT:
                # -EIO: the kernel asks for memory once more, now ready to wait for it; here that fails too.
                return -ENOMEM if ret == -EIO else ret
            pte = _ptep_get(src, idx, ctx.layout, partial(_count, stats))
            _count(stats, "ptep_get")
        ret = _copy_present_ptes(ctx, dst, src, idx, pte, end - idx, rss, prealloc, stats, addr)
        if ret == -EAGAIN:
            # Drop the locks, allocate a page, come back to the same entry; it is then copied alone.
            if ctx.allocations is not None and not ctx.allocations.allocate():
                return -ENOMEM
            _count(stats, "eagain_rounds")
            prealloc = ctx.folios.reserve(1).tolist()
            continue
        if ret < 0:
            return ret
        prealloc = []  # for one address only: if unused, it is free again
        idx += ret
    return 0


def copy_page_range(
    ctx: ForkContext, dst_mm: Mm, src_mm: Mm, stats: np.ndarray, start: int | None = None, end: int | None = None
) -> int:
    """Copy all entries of ``ctx.src_vma``, or of a part of it, page table by page table.

    Parameters
    ----------
    ctx : ForkContext
        The VMA and what stays the same over it; whether it needs copying at all was the caller's to decide.
    dst_mm : Mm
        The child; must have a row for every table of `src_mm` that overlaps the VMA. Its entries and rss are written.
    src_mm : Mm
        The parent; its entries are written.
    stats : ndarray of int64
        Added to.
    start, end : int, optional
        Byte addresses within the VMA; its own when left out. No PMD leaf may lie between them.

    Returns
    -------
    int
        0 or -ENOMEM, to which the kernel collapses every failure of a table; the child is then incomplete.

    Raises
    ------
    PfnError, UnsupportedEntryError, StateError
        As `copy_pte_range`; and for a row the child lacks.

    Notes
    -----
    ``copy_page_range()`` down to ``copy_pmd_range()``, mm/memory.c, v6.6 to v6.19.
    """
    ctx = checks.check_context(ctx)
    checks.check_mms(dst_mm=dst_mm, src_mm=src_mm)
    stats = checks.check_stats(stats, ctx.layout)
    checks.check_rss(dst_mm.rss)
    checks.check_no_overlap(dst_entries=dst_mm.entries, src_entries=src_mm.entries, stats=stats, rss=dst_mm.rss)
    start, end = checks.check_segment(ctx, src_mm, start, end)
    tables = list(_tables(src_mm, start, end))
    child_row = {vpn << ctx.layout.page_shift: row for row, vpn in enumerate(dst_mm.vpns.tolist())}
    for _, table_addr, _, _ in tables:
        if table_addr not in child_row:
            raise StateError(f"the child has no page table for address {table_addr:#x}; add it before copying")
    for number, (row, table_addr, idx, stop) in enumerate(tables):
        has_table = number == 0 and ctx.has_first_table
        if not has_table and ctx.allocations is not None and not ctx.allocations.allocate():
            return -ENOMEM
        dst, src = dst_mm.entries[child_row[table_addr]], src_mm.entries[row]
        if _copy_pte_range(ctx, dst, src, idx, stop, dst_mm.rss, stats, table_addr):
            return -ENOMEM
    return 0


def check_range(
    mm: Mm,
    vmas: Iterable[Vma],
    *,
    pfn_without_page: str = "error",
    semantics: KernelSemantics = LATEST,
    threads: int = 1,
) -> dict[int, npt.NDArray[np.uint64]]:
    """Look for entries that cannot be copied; change nothing.

    Parameters
    ----------
    mm : Mm
    vmas : iterable of Vma
        Those that will be copied.
    pfn_without_page : {"error", "as_kernel"}
        Whether a PFN without a page is an error, or passed over as the kernel would.
    semantics : KernelSemantics
        Says what swap types mean.
    threads : int
        The core's; here there is one.

    Returns
    -------
    dict of int to numpy.ndarray
        What the core's threads need; here nothing.

    Raises
    ------
    UnsupportedEntryError
        An unknown swap type; names address and kind.
    PfnError
        A present entry, not special, whose PFN has no page; a migration or device entry without one, whatever
        `pfn_without_page` says. Names PFN and address.
    """
    pfn_without_page = checks.check_pfn_without_page(pfn_without_page)
    types = swap_types(semantics)
    for vma in vmas:
        for row, table_addr, idx, end in _tables(mm, vma.start, vma.end):
            for slot in range(idx, end):
                pte = int(mm.entries[row, slot])
                addr = table_addr + (slot << mm.layout.page_shift)
                if arch.pte_none(mm.layout, pte):
                    continue
                if not arch.pte_present(mm.layout, pte):
                    kind = _swap_kind(mm.layout, types, pte, addr)
                    pfn = arch.swp_offset_pfn(mm.layout, pte)
                    if kind.startswith(("migration", "device")) and pfn not in mm.folios:
                        raise PfnError(pfn=pfn, address=addr)
                    continue
                _vm_normal_page(mm.folios, mm.layout, pte, pfn_without_page, addr)
    return {}


def _tables(mm: Mm, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (row, address of its slot 0, first slot, end slot) for every table with slots in ``start..end``."""
    shift, ptrs = mm.layout.page_shift, mm.layout.ptrs_per_pte
    first_vpn, end_vpn = start >> shift, end >> shift
    for row, vpn in enumerate(mm.vpns.tolist()):
        idx, stop = max(first_vpn - vpn, 0), min(end_vpn - vpn, ptrs)
        if idx < stop:
            yield row, vpn << shift, idx, stop


# --- write-protection on its own --------------------------------------------------------------------------------------


def wrprotect_range(
    mm: Mm, start: int, end: int, *, semantics: KernelSemantics, batching: bool, stats: np.ndarray
) -> None:
    """Write-protect every present entry in ``start..end``, entry by entry or batch by batch.

    Parameters
    ----------
    mm : Mm
        Its entries are written; nothing is counted in its folios.
    start, end : int
        Byte addresses, multiples of the page size.
    semantics : KernelSemantics
        How batches are compared.
    batching : bool
        False: every writable entry alone. True: `folio_pte_batch` ignoring dirty, soft-dirty and write, then one
        `wrprotect_ptes` for the batch if any entry of it is writable.
    stats : ndarray of int64
        Added to: ptes_none, ptes_present, ptes_single, ptes_batched, batches and its histogram, ptep_get,
        wrprotect_ptes, ptes_wrprotected, and when batching special_ptes. Other non-present entries are only read.

    Raises
    ------
    ArgumentError, SemanticsError
        A bad argument; batching asked of a kernel that does not.
    """
    start, end = checks.check_range_bounds(mm, start, end)
    batching = checks.check_batching(batching, semantics)
    stats = checks.check_stats(stats, mm.layout)
    layout = configured(mm.layout, semantics)
    for vma in mm.vmas:
        for row, _, idx, stop in _tables(mm, max(start, vma.start), min(end, vma.end)):
            _wrprotect_pte_range(layout, mm, mm.entries[row], idx, stop, semantics, batching, stats, vma.vm_flags)


def _wrprotect_pte_range(
    layout: PteLayout,
    mm: Mm,
    entries: np.ndarray,
    idx: int,
    end: int,
    semantics: KernelSemantics,
    batching: bool,
    stats: np.ndarray,
    vm_flags: int,
) -> None:
    flags = _ignore_all_flags(semantics)
    while idx < end:
        pte = _ptep_get(entries, idx, layout, partial(_count, stats))
        _count(stats, "ptep_get")
        nr = 1
        if arch.pte_none(layout, pte):
            _count(stats, "ptes_none")
        elif arch.pte_present(layout, pte):
            writable = arch.pte_write(layout, pte)
            if batching and not _vm_normal_page(mm.folios, layout, pte, "as_kernel", None):
                _count(stats, "special_ptes")
            elif batching:
                folio = mm.folios.page(arch.pte_pfn(layout, pte)).folio
                if folio.order > 0 and end - idx > 1:
                    batch, reads = _folio_pte_batch(
                        entries, idx, pte, end - idx, folio, layout, semantics, flags, vm_flags, partial(_count, stats)
                    )
                    _count(stats, "ptep_get", reads)
                    nr = batch.nr
                    writable |= batch.any_writable
            if writable:
                _wrprotect_ptes(entries, idx, nr, layout, partial(_count, stats))
                _count(stats, "wrprotect_ptes")
                _count(stats, "ptes_wrprotected", nr)
            _count_batch(stats, nr)
        idx += nr


def _ignore_all_flags(semantics: KernelSemantics) -> int:
    """Return the flags with which dirty, soft-dirty and write do not end a batch."""
    return 0 if semantics.fpb_respect else FPB_IGNORE_DIRTY | FPB_IGNORE_SOFT_DIRTY


# --- zap --------------------------------------------------------------------------------------------------------------

_ZAP_STAT = {name: position for position, name in enumerate(ZAP_STAT_FIELDS)}


def _count_zap(stats: np.ndarray, name: str, by: int = 1) -> None:
    stats[_ZAP_STAT[name]] += by


def clear_full_ptes(entries: np.ndarray, idx: int, nr: int, *, layout: PteLayout) -> None:
    """Clear `nr` entries; accessed and dirty bits are lost.

    Parameters
    ----------
    entries : ndarray of uint64, shape (ptrs_per_pte,)
        One page table; written.
    idx : int
        First slot.
    nr : int
        Number of slots. All must be present and map consecutive pages of one folio; other bits may differ.
    layout : PteLayout

    Raises
    ------
    ArgumentError
        A bad argument or a broken contract; nothing is written then.

    Notes
    -----
    ``clear_full_ptes()``, include/linux/pgtable.h, v6.9+.
    """
    _check_clear("clear_full_ptes", entries, idx, nr, layout)
    _clear_full_ptes(entries, idx, nr, layout, _not_counted)


def get_and_clear_full_ptes(entries: np.ndarray, idx: int, nr: int, *, layout: PteLayout) -> int:
    """Clear `nr` entries and return the first of them, dirty and young if any of them was.

    Parameters and errors are those of `clear_full_ptes`.

    Returns
    -------
    int
        The entry at `idx`, made dirty and young by those behind it.

    Notes
    -----
    ``get_and_clear_full_ptes()``, include/linux/pgtable.h, v6.9+. Making an entry dirty also makes it soft-dirty.
    """
    _check_clear("get_and_clear_full_ptes", entries, idx, nr, layout)
    return _get_and_clear_full_ptes(entries, idx, nr, layout, _not_counted)


def _check_clear(function: str, entries: np.ndarray, idx: int, nr: int, layout: PteLayout) -> None:
    layout = checks.check_layout(layout)
    entries = checks.check_row("entries", entries, layout, writable=True)
    idx = checks.check_idx(idx, layout)
    nr = checks.check_nr("nr", nr, idx, layout)
    checks.check_batch_ptes(function, entries, idx, nr, layout)


def _clear_full_ptes(entries: np.ndarray, idx: int, nr: int, layout: PteLayout, count: Counter) -> None:
    if nr == 1:
        _contpte_try_unfold(entries, idx, layout, count)
    else:
        _contpte_try_unfold_partial(entries, idx, nr, layout, count)
    for slot in range(idx, idx + nr):
        entries[slot] = layout.none_value


def _get_and_clear_full_ptes(entries: np.ndarray, idx: int, nr: int, layout: PteLayout, count: Counter) -> int:
    if nr == 1:
        _contpte_try_unfold(entries, idx, layout, count)
    else:
        _contpte_try_unfold_partial(entries, idx, nr, layout, count)
    pte = int(entries[idx])
    others = [int(entries[slot]) for slot in range(idx + 1, idx + nr)]
    entries[idx : idx + nr] = layout.none_value
    if any(arch.pte_dirty(layout, other) for other in others):
        pte = arch.pte_mkdirty(layout, pte)
    if any(arch.pte_young(layout, other) for other in others):
        pte = arch.pte_mkyoung(layout, pte)
    return pte


def zap_present_ptes(
    ctx: ZapContext, entries: np.ndarray, idx: int, max_nr: int, rss: np.ndarray, stats: np.ndarray
) -> int:
    """Unmap the present entry at `idx` and, where they form a batch with it, the entries behind it.

    Parameters
    ----------
    ctx : ZapContext
        Everything that stays the same over a VMA; its folios are written, those without references freed.
    entries : ndarray of uint64, shape (ptrs_per_pte,)
        One page table; written.
    idx : int
        Slot of the first entry.
    max_nr : int
        Entries left in the range and the table, at least 1.
    rss : ndarray of int64, shape (4,)
        Pages no longer mapped are subtracted here, by kind.
    stats : ndarray of int64
        From `ptebatch.mm.new_zap_stats`; added to. The read of the first entry is the caller's to count.

    Returns
    -------
    int
        Number of entries visited, at least 1; without ``even_cows`` an anonymous page is visited but left alone.

    Raises
    ------
    ArgumentError, PfnError
        A bad argument, an entry that is not present; a PFN without a page.
    StateError
        Fewer mappings or references are counted than would be taken away; nothing has changed.

    Notes
    -----
    ``zap_present_ptes()`` and ``zap_present_folio_ptes()``, mm/memory.c, v6.9+; the loop of ``zap_pte_range()`` before.
    The kernel drops references when it flushes its gather of pages; here they are dropped at once, which is the state
    after the call.
    """
    ctx = checks.check_zap_context(ctx)
    entries = checks.check_row("entries", entries, ctx.layout, writable=True)
    idx = checks.check_idx(idx, ctx.layout)
    max_nr = checks.check_nr("max_nr", max_nr, idx, ctx.layout)
    rss = checks.check_rss(rss)
    stats = checks.check_zap_stats(stats, ctx.layout)
    checks.check_no_overlap(entries=entries, rss=rss, stats=stats)
    checks.check_present(ctx.layout, int(entries[idx]), idx)
    pte = _ptep_get(entries, idx, ctx.layout, _not_counted)
    return _zap_present_ptes(ctx, entries, idx, pte, max_nr, rss, stats, None)


def _zap_present_ptes(
    ctx: ZapContext,
    entries: np.ndarray,
    idx: int,
    pte: int,
    max_nr: int,
    rss: np.ndarray,
    stats: np.ndarray,
    addr: int | None,
) -> int:
    layout, semantics, count = ctx.layout, ctx.semantics, partial(_count_zap, stats)
    nr = 1
    if not _vm_normal_page(ctx.folios, layout, pte, ctx.pfn_without_page, addr):
        _clear_full_ptes(entries, idx, 1, layout, count)
        _count_zap(stats, "special_ptes")
    else:
        pfn = arch.pte_pfn(layout, pte)
        folio = ctx.folios.page(pfn).folio
        if folio.anon and not ctx.even_cows:
            _count_zap(stats, "ptes_skipped")
            return 1
        if ctx.batching and folio.order > 0 and max_nr > 1:
            flags = _ignore_all_flags(semantics)
            batch, reads = _folio_pte_batch(entries, idx, pte, max_nr, folio, layout, semantics, flags, 0, count)
            _count_zap(stats, "ptep_get", reads)
            nr = batch.nr
        _remove_rmap(ctx, folio, pfn, nr, stats, addr)
        rss[_mm_counter(folio)] -= nr
        if folio.anon:
            _clear_full_ptes(entries, idx, nr, layout, count)  # nobody wants to know whether it was young or dirty
        else:
            old = _get_and_clear_full_ptes(entries, idx, nr, layout, count)
            if arch.pte_dirty(layout, old):
                folio.dirty = True
                _count_zap(stats, "folio_mark_dirty")
            if arch.pte_young(layout, old) and not ctx.vma.vm_flags & (arch.VM_SEQ_READ | arch.VM_RAND_READ):
                _count_zap(stats, "folio_mark_accessed")
        _folio_put(ctx, folio, nr, stats)
    _count_zap(stats, "clear_ptes")
    _count_zap(stats, "ptes_present", nr)
    _count_zap(stats, "ptes_single" if nr == 1 else "ptes_batched", nr)
    _count_zap(stats, "batches")
    stats[len(ZAP_STAT_FIELDS) + nr] += 1
    if arch.pte_uffd_wp(layout, pte):
        _leave_uffd_wp_markers(ctx, entries, idx, nr, stats)
    return nr


def _leave_uffd_wp_markers(ctx: ZapContext, entries: np.ndarray, idx: int, nr: int, stats: np.ndarray) -> None:
    """Remember in a file mapping that entries were write-protected by userfaultfd.

    ``zap_install_uffd_wp_if_needed()``, mm/memory.c.
    """
    if ctx.vma.vm_ops is None or ctx.drop_markers or not ctx.vma.vm_flags & arch.VM_UFFD_WP:
        return
    for slot in range(idx, idx + nr):
        entries[slot] = arch.swp_entry(ctx.layout, arch.SWP_PTE_MARKER, arch.PTE_MARKER_UFFD_WP)
    _count_zap(stats, "uffd_wp_markers", nr)


def _remove_rmap(
    ctx: ZapContext, folio: Folio, pfn: int, nr: int, stats: np.ndarray, addr: int | None, *, counted: bool = True
) -> None:
    """Count `nr` mappings less, unless these were not counted; refuse if there are not that many, or references.

    ``folio_remove_rmap_ptes()``, mm/rmap.c, v6.8+.  PG_anon_exclusive stays as it is.
    """
    pages = [ctx.folios.page(pfn + k) for k in range(nr)] if counted and _page_mapcounts(ctx, folio) else []
    large = counted and folio.order > 0 and ctx.semantics.large_mapcount
    enough = folio.refcount >= nr and all(page.mapcount > 0 for page in pages)
    if not enough or (large and folio.large_mapcount < nr):
        raise checks.unmapped_more_than_mapped(pfn, addr)
    for page in pages:
        page.mapcount -= 1
    if large:
        folio.large_mapcount -= nr
        if _tracks_mm_ids(ctx, folio):
            folio.remove_mm_mapping(ctx.mm_id, nr)
    if counted:
        _count_zap(stats, "rmap_remove")


def _folio_put(ctx: ZapContext, folio: Folio, nr: int, stats: np.ndarray) -> None:
    """Drop `nr` references; a folio without any is freed, except a poisoned page, which is never handed out again.

    ``folio_put_refs()``, include/linux/mm.h; ``free_pages_prepare()``, mm/page_alloc.c.
    """
    folio.refcount -= nr
    _count_zap(stats, "folio_put")
    if folio.refcount == 0 and not (folio.order == 0 and ctx.folios.page(folio.pfn).hwpoison):
        ctx.folios.remove(folio.pfn)
        _count_zap(stats, "folios_freed")


def _zap_nonpresent_pte(
    ctx: ZapContext, entries: np.ndarray, idx: int, pte: int, rss: np.ndarray, stats: np.ndarray, addr: int | None
) -> None:
    """Take away one entry that is neither present nor empty, unless it is one to keep.

    The branches on such entries in ``zap_pte_range()``, mm/memory.c (``zap_nonpresent_ptes()`` in v6.14+).
    """
    layout, types = ctx.layout, swap_types(ctx.semantics)
    kind = _swap_kind(layout, types, pte, addr)
    counter = "pte_markers"
    uffd_wp = arch.pte_swp_uffd_wp(layout, pte)
    if kind == "marker":
        marker = arch.swp_offset(layout, pte)
        uffd_wp = bool(marker & arch.PTE_MARKER_UFFD_WP)
        if uffd_wp:
            keep = ctx.vma.vm_ops is not None and not ctx.drop_markers
        elif marker & arch.PTE_MARKER_GUARD and ctx.semantics.guard_markers:
            keep = not ctx.drop_markers
        else:
            keep = bool(marker & arch.PTE_MARKER_POISONED) and not ctx.even_cows
    elif kind in ("hwpoison", "swap"):
        keep = not ctx.even_cows
        counter = f"{kind}_entries"
        if kind == "swap" and not keep:
            number, offset = arch.swp_type(layout, pte), arch.swp_offset(layout, pte)
            if not ctx.folios.swap.count(number, offset):
                raise checks.swap_slot_unused(number, offset, addr)
            ctx.folios.swap.add([swap_key(number, offset)], -1)
            rss[MM_SWAPENTS] -= 1
    else:
        pfn = arch.swp_offset_pfn(layout, pte)
        if pfn not in ctx.folios:
            raise PfnError(pfn=pfn, address=addr)
        folio = ctx.folios.page(pfn).folio
        private = kind in ("device write", "device read")
        counter = "device_private_entries" if private else "device_exclusive_entries"
        keep = folio.anon and not ctx.even_cows
        if kind.startswith("migration"):
            counter = "migration_entries"  # references and mappings are the migration's own
        elif not keep:
            if private and not folio.device:
                raise checks.not_device_memory(pfn, addr)
            # Through v6.14 the mapping was not counted while a device had the page for itself.
            counted = private or ctx.semantics.single_device_exclusive
            _remove_rmap(ctx, folio, pfn, 1, stats, addr, counted=counted)
        if not keep:
            rss[_mm_counter(folio)] -= 1
            if counter != "migration_entries":
                _folio_put(ctx, folio, 1, stats)
    if keep:
        _count_zap(stats, "ptes_skipped")
        return
    _count_zap(stats, counter)
    entries[idx] = layout.none_value
    if uffd_wp:
        _leave_uffd_wp_markers(ctx, entries, idx, 1, stats)


def zap_range(
    mm: Mm,
    start: int,
    end: int,
    *,
    semantics: KernelSemantics,
    batching: bool,
    stats: np.ndarray,
    even_cows: bool = True,
    drop_markers: bool = False,
    pfn_without_page: PFN_WITHOUT_PAGE = "error",
) -> None:
    """Unmap what page tables map in ``start..end``, entry by entry or batch by batch; tables, VMAs and leaves stay.

    Parameters
    ----------
    mm : Mm
        Its entries, rss and folios are written.
    start, end : int
        Byte addresses, multiples of the page size.
    semantics : KernelSemantics
    batching : bool
        False: every entry alone.
    stats : ndarray of int64
        From `ptebatch.mm.new_zap_stats`; added to.
    even_cows, drop_markers, pfn_without_page
        See `ptebatch.mm.ZapContext`.

    Raises
    ------
    ArgumentError, SemanticsError
        A bad argument; batching asked of a kernel that does not.
    PfnError, UnsupportedEntryError, StateError
        As `zap_present_ptes`; what was unmapped before stays unmapped. `check_range` finds the first two beforehand.

    Notes
    -----
    ``unmap_page_range()`` down to ``zap_pte_range()``, mm/memory.c, v6.6 to v6.19.
    """
    start, end = checks.check_range_bounds(mm, start, end)
    batching = checks.check_batching(batching, semantics, "zap_batching")
    stats = checks.check_zap_stats(stats, mm.layout)
    checks.check_rss(mm.rss)
    checks.check_array("mm.entries", mm.entries, np.uint64, (len(mm.vpns), mm.layout.ptrs_per_pte), True)
    checks.check_no_overlap(entries=mm.entries, rss=mm.rss, stats=stats)
    layout = configured(mm.layout, semantics)
    for vma in mm.vmas:
        if end <= vma.start or vma.end <= start:
            continue
        ctx = ZapContext(
            layout, semantics, mm.folios, vma, batching, mm.mm_id, even_cows, drop_markers, pfn_without_page
        )
        checks.check_zap_context(ctx)
        for row, table_addr, idx, stop in _tables(mm, max(start, vma.start), min(end, vma.end)):
            _zap_pte_range(ctx, mm.entries[row], idx, stop, mm.rss, stats, table_addr)


def _zap_pte_range(
    ctx: ZapContext, entries: np.ndarray, idx: int, end: int, rss: np.ndarray, stats: np.ndarray, table_addr: int
) -> None:
    while idx < end:
        addr = table_addr + (idx << ctx.layout.page_shift)
        pte = _ptep_get(entries, idx, ctx.layout, partial(_count_zap, stats))
        _count_zap(stats, "ptep_get")
        if arch.pte_none(ctx.layout, pte):
            _count_zap(stats, "ptes_none")
            idx += 1
        elif arch.pte_present(ctx.layout, pte):
            idx += _zap_present_ptes(ctx, entries, idx, pte, end - idx, rss, stats, addr)
        else:
            _zap_nonpresent_pte(ctx, entries, idx, pte, rss, stats, addr)
            idx += 1


# --- the helpers, over an array ---------------------------------------------------------------------------------------

_HELPER_PREFIXES = ("pte_", "ptep_", "pfn_pte", "mk_pte", "swp_")
_HELPERS_WITH_ARG = ("pte_mkwrite", "pte_advance_pfn", "pfn_pte", "mk_pte", "pte_modify")


def apply_helper(layout: PteLayout, name: str, values: np.ndarray, arg: int = 0) -> np.ndarray:
    """Apply one of the ``pte_*`` helpers of `ptebatch.arch` to every value.

    Parameters
    ----------
    layout : PteLayout
    name : str
        Name of the helper, such as ``"pte_wrprotect"``.
    values : ndarray of uint64, one dimension
        Entries; for ``pfn_pte`` and ``mk_pte`` PFNs, for ``swp_entry`` offsets.
    arg : int
        vm_flags of ``pte_mkwrite``, n of ``pte_advance_pfn``, protection of ``pfn_pte``, ``mk_pte`` and
        ``pte_modify``, type of ``swp_entry``; otherwise unused.

    Returns
    -------
    ndarray of uint64, same shape
        A bool as 0 or 1.
    """
    layout = checks.check_layout(layout)
    values = checks.check_array("values", values, np.uint64, None, writable=False)
    arg = checks.check_u64("arg", arg)
    helper: Any = getattr(arch, name, None) if isinstance(name, str) and name.startswith(_HELPER_PREFIXES) else None
    if helper is None:
        raise ArgumentError(f"name must be a pte helper such as 'pte_wrprotect', not {name!r}")
    if name == "swp_entry":
        results = [helper(layout, arg, value) for value in values.tolist()]
    elif name in _HELPERS_WITH_ARG:
        results = [helper(layout, value, arg) for value in values.tolist()]
    else:
        results = [helper(layout, value) for value in values.tolist()]
    return np.array([int(result) for result in results], dtype=np.uint64)
