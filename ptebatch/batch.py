"""The one door to the Cython core: checks, conversion, and kernel return codes made into values and exceptions.

Same functions and signatures as :mod:`ptebatch.reference`, the plain-Python oracle; see there for the semantics and
the kernel sources of each.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from errno import ENOMEM
from functools import lru_cache
from operator import itemgetter
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ptebatch import _core, arch, checks, folio, swap
from ptebatch.arch import PteLayout
from ptebatch.checks import BatchResult
from ptebatch.errors import ArgumentError, PfnError, StateError
from ptebatch.folio import FolioTable
from ptebatch.mm import (
    NEVER_FAILS,
    PFN_WITHOUT_PAGE,
    STAT_FIELDS,
    ZAP_STAT_FIELDS,
    ForkContext,
    Mm,
    Vma,
    ZapContext,
    configured,
    soft_dirty_tracked,
    swap_keys,
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

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

_disagreements = [name for name, value in _core.MEMMAP_CONSTANTS.items() if getattr(folio, name) != value]
_disagreements += [name for name, value in _core.SWAP_CONSTANTS.items() if getattr(swap, name) != value]
_disagreements += ["MAX_THREADS"] if _core.MAX_THREADS != checks.MAX_THREADS else []
_disagreements += ["ZAP_STAT_FIELDS"] if _core.ZAP_STAT_FIELDS != ZAP_STAT_FIELDS else []
if _disagreements or _core.STAT_FIELDS != STAT_FIELDS or _core.SWP_KINDS != arch.SWP_KINDS:
    raise ImportError(
        f"the compiled core is of another version (STAT_FIELDS, {', '.join(_disagreements)}); rebuild it: make test"
    )

def _level(name: str) -> int:
    """The number of a SIMD level; `auto` is the best this CPU has."""
    if name == "auto":
        name = _core.SIMD_SUPPORTED[-1]
    if name not in _core.SIMD_SUPPORTED:
        raise ArgumentError(f"PTEBATCH_SIMD={name}: this CPU has {', '.join(_core.SIMD_SUPPORTED)} (or auto)")
    return int(_core.SIMD_LEVELS[name])


SIMD_SUPPORTED: tuple[str, ...] = tuple(_core.SIMD_SUPPORTED)
"""The SIMD levels of this CPU."""

simd_level = _level(os.environ.get("PTEBATCH_SIMD", "auto"))
"""The level the core's fast lane works at, a value of ``_core.SIMD_LEVELS``; from PTEBATCH_SIMD, and set by tests."""

core_ns = 0
"""Time the core took for `check_range`, `copy_page_range` and `wrprotect_range` so far, for benchmarks to read."""

NO_PFN = (1 << 64) - 1
_NO_FOLIOS = FolioTable()
MIN_POOL = 64
THREAD_SLOTS = 1 << 19
"""Slots of page tables for each thread: with fewer, it takes longer to start it than it saves."""
FAR_WORDS = 1 << 19
"""Words of the memmap (4 MiB of them) from which on most are not in a cache near the CPU."""
BYPASS_SLOTS = 1 << 22
"""Slots of the child's page tables (32 MiB of them) in one VMA from which on the cache would not hold them anyway."""
_NO_MARKS = np.empty((0, 0), dtype=np.uint64)
HELPERS = {name: number for number, name in enumerate(_core.HELPERS)}


@lru_cache(maxsize=64)
def _layout_words(layout: PteLayout) -> U64:
    words: list[int] = []
    for name in _core.LAYOUT_FIELDS:
        value = getattr(layout, name)
        if isinstance(value, arch.Step):  # the core has the complement of what a step clears
            value = value._replace(clear=value.clear ^ arch.U64_MAX, then_clear=value.then_clear ^ arch.U64_MAX)
        words += value if isinstance(value, arch.Step) else [int(value)]
    return np.array(words, dtype=np.uint64)


@lru_cache(maxsize=64)
def _swap_rules(semantics: KernelSemantics) -> dict[str, int]:
    """What the core has to know of swap types: the kind of each, and the types it writes."""
    types = swap_types(semantics)
    kinds = sum(arch.SWP_KINDS.index(name) << 4 * number for number, name in types.items())
    number_of = {name: number for number, name in types.items()}
    return {
        "swp_kinds": kinds & arch.U64_MAX,
        "swp_kinds_high": kinds >> 64,
        "swp_migration_read": number_of.get("migration read", 0),
        "swp_device_read": number_of.get("device read", 0),
    }


_in_core_order = itemgetter(*_core.RULE_FIELDS)


def _rule_words(ctx: ForkContext) -> U64:
    src, dst, semantics = ctx.src_vma.vm_flags, ctx.dst_vma.vm_flags, ctx.semantics
    src_prot = vm_page_prot(ctx.layout, ctx.src_vma)
    markers = arch.PTE_MARKER_POISONED
    markers |= arch.PTE_MARKER_GUARD if semantics.guard_markers else 0
    markers |= arch.PTE_MARKER_UFFD_WP if dst & arch.VM_UFFD_WP else 0
    rules = {
        "batching": ctx.batching and semantics.fork_batching,
        "cow": arch.is_cow_mapping(src),
        "shared": bool(src & arch.VM_SHARED),
        "src_shadow_stack": bool(src & arch.VM_SHADOW_STACK),
        "respect_dirty": not src & arch.VM_SHARED,
        "respect_soft_dirty": soft_dirty_tracked(ctx.layout, ctx.src_vma),
        "fpb_clamp": semantics.fpb_clamp,
        "dst_uffd_wp": bool(dst & arch.VM_UFFD_WP),
        "dst_write": bool(dst & arch.VM_WRITE),
        "dst_shadow_stack": bool(dst & arch.VM_SHADOW_STACK),
        "dst_prot": vm_page_prot(ctx.layout, ctx.dst_vma),
        "has_pinned": ctx.has_pinned,
        "large_mapcount": semantics.large_mapcount,
        "mm_id": semantics.mm_id,
        "page_mapcount": not semantics.config.no_page_mapcount,
        "copy_mc": semantics.copy_mc,
        "dst_mm_id": ctx.dst_mm_id,
        "as_kernel": ctx.pfn_without_page == "as_kernel",
        "near_limit": ctx.folios._near_limit,
        "dst_cow": arch.is_cow_mapping(dst),
        **_swap_rules(semantics),
        "markers": markers,
        "src_prot": src_prot,
        "src_write": bool(src & arch.VM_WRITE),
        "src_can_write": (src & (arch.VM_WRITE | arch.VM_SHARED)) == arch.VM_WRITE
        and not arch.pte_protnone(ctx.layout, arch.mk_pte(ctx.layout, 0, src_prot)),
        "src_uffd_wp": bool(src & arch.VM_UFFD_WP),
        "src_mm_id": ctx.src_mm_id,
        "single_device_exclusive": semantics.single_device_exclusive,
    }
    return np.array(_in_core_order(rules), dtype=np.uint64)


def _memmap(folios: FolioTable) -> tuple[U64, U64, npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    return folios._words, folios._aux, folios._top, folios._sub


def _fast(folios: FolioTable) -> U64:
    """What the fast lane has to know besides layout and rules, in the order `_core.lane_memmap` reads it."""
    return np.array([simd_level, *folios.extent(), FAR_WORDS, BYPASS_SLOTS], dtype=np.uint64)


def _raise(code: int, layout: PteLayout, entry: int, address: int | None, pfn: int) -> NoReturn:
    where = "" if address is None else f" at address {address:#x}"
    if code == _core.RESULTS["E_NO_PAGE"]:
        raise PfnError(pfn=pfn, address=address)
    if code == _core.RESULTS["E_UNSUPPORTED"]:
        raise checks.unknown_swap_type(arch.swp_type(layout, entry), address)
    if code == _core.RESULTS["E_SWAP_FULL"]:
        raise checks.swap_slot_full(arch.swp_type(layout, entry), arch.swp_offset(layout, entry), address)
    if code == _core.RESULTS["E_NOT_DEVICE"]:
        raise checks.not_device_memory(pfn, address)
    if code == _core.RESULTS["E_OVERFLOW"]:
        raise StateError(f"PFN {pfn:#x}{where}: its mapcount or its folio's refcount has reached the limit")
    if code == _core.RESULTS["E_UNMAPPED"]:
        raise checks.unmapped_more_than_mapped(pfn, address)
    if code == _core.RESULTS["E_SWAP_SLOT"]:
        raise checks.swap_slot_unused(arch.swp_type(layout, entry), arch.swp_offset(layout, entry), address)
    if code == _core.RESULTS["E_GEOMETRY"]:
        raise StateError(f"PFN {pfn:#x}{where}: its folio is not whole in the FolioTable")
    raise StateError(f"the core returned {code}{where}")


def folio_pte_batch(
    entries: U64,
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
    """Count entries that map consecutive pages of one folio; see :func:`ptebatch.reference.folio_pte_batch`."""
    checks.check_layout(layout)
    checks.check_row("entries", entries, layout, writable=False)
    idx = checks.check_idx(idx, layout)
    max_nr = checks.check_nr("max_nr", max_nr, idx, layout)
    flags = checks.check_flags(flags, semantics)
    layout = configured(layout, semantics)
    first = arch.ptep_get(layout, entries, idx) if pte is None else checks.check_u64("pte", pte)
    if not arch.pte_present(layout, first):
        raise ArgumentError(f"entry {first:#x} in slot {idx} is not present")
    pfn = arch.pte_pfn(layout, first)
    if pfn not in folios:
        raise PfnError(pfn=pfn)
    head = folios.page(pfn).folio
    if semantics.fpb_respect:
        respected = FPB_RESPECT_DIRTY, FPB_RESPECT_SOFT_DIRTY, FPB_RESPECT_WRITE
        dirty, soft_dirty, write = (bool(flags & bit) for bit in respected)
    else:
        dirty, soft_dirty, write = not flags & FPB_IGNORE_DIRTY, not flags & FPB_IGNORE_SOFT_DIRTY, False
    nr, any_writable, any_young, any_dirty, _ = _core.py_folio_pte_batch(
        entries.reshape(1, -1), idx, first, max_nr, head.pfn + head.nr_pages - pfn, _layout_words(layout),
        dirty, soft_dirty, write, semantics.fpb_clamp,
    )  # fmt: skip
    if semantics.fpb_respect:
        if flags & FPB_MERGE_WRITE and any_writable:
            first = arch.pte_mkwrite(layout, first, vm_flags)
        if flags & FPB_MERGE_YOUNG_DIRTY:
            first = arch.pte_mkyoung(layout, first) if any_young else first
            first = arch.pte_mkdirty(layout, first) if any_dirty else first
    return BatchResult(nr, any_writable, any_young, any_dirty, first)


def set_ptes(
    entries: U64, idx: int, pte: int, nr: int, *, layout: PteLayout, folios: FolioTable | None = None
) -> None:
    """Set nr entries to consecutive pages; see :func:`ptebatch.reference.set_ptes`."""
    checks.check_layout(layout)
    checks.check_row("entries", entries, layout, writable=True)
    idx = checks.check_idx(idx, layout)
    nr = checks.check_nr("nr", nr, idx, layout)
    pte = checks.check_u64("pte", pte)
    checks.check_set_ptes(entries, idx, pte, nr, layout)
    table = entries.reshape(1, -1)
    _core.py_set_ptes(table, idx, pte, nr, _layout_words(layout), *_memmap(_NO_FOLIOS if folios is None else folios))


def wrprotect_ptes(entries: U64, idx: int, nr: int, *, layout: PteLayout) -> None:
    """Write-protect nr entries; see :func:`ptebatch.reference.wrprotect_ptes`."""
    checks.check_layout(layout)
    checks.check_row("entries", entries, layout, writable=True)
    idx = checks.check_idx(idx, layout)
    nr = checks.check_nr("nr", nr, idx, layout)
    checks.check_batch_ptes("wrprotect_ptes", entries, idx, nr, layout)
    _core.py_wrprotect_ptes(entries.reshape(1, -1), idx, nr, _layout_words(layout))


def _check_rows(ctx: ForkContext, dst: U64, src: U64, rss: I64, stats: I64) -> None:
    checks.check_context(ctx)
    checks.check_row("dst", dst, ctx.layout, writable=True)
    checks.check_row("src", src, ctx.layout, writable=True)
    checks.check_rss(rss)
    checks.check_stats(stats, ctx.layout)
    checks.check_no_overlap(dst=dst, src=src, rss=rss, stats=stats)


def copy_present_ptes(
    ctx: ForkContext, dst: U64, src: U64, idx: int, max_nr: int, rss: I64, prealloc: list[int], stats: I64
) -> int:
    """Copy one present entry or one batch; see :func:`ptebatch.reference.copy_present_ptes`."""
    _check_rows(ctx, dst, src, rss, stats)
    idx = checks.check_idx(idx, ctx.layout)
    max_nr = checks.check_nr("max_nr", max_nr, idx, ctx.layout)
    checks.check_prealloc(prealloc)
    pte = int(src[idx])
    if arch.pte_none(ctx.layout, pte):
        raise ArgumentError(f"slot {idx} of src is empty; copy_present_ptes needs a present entry")
    if not arch.pte_present(ctx.layout, pte):
        raise ArgumentError(f"slot {idx} of src is not present; copy_nonpresent_pte is for such entries")
    ctx.folios._prepare_pages(prealloc)
    ret, used, pfn, near_limit = _core.py_copy_present_ptes(
        dst.reshape(1, -1), src.reshape(1, -1), idx, max_nr, _layout_words(ctx.layout), _rule_words(ctx),
        *_memmap(ctx.folios), rss, stats, prealloc[0] if prealloc else None,
    )  # fmt: skip
    ctx.folios._walked(prealloc if used else [], near_limit)
    if used:
        prealloc.clear()
    if ret in _core.RESULTS.values():
        _raise(ret, ctx.layout, pte, None, pfn)
    return int(ret)


def copy_nonpresent_pte(ctx: ForkContext, dst: U64, src: U64, idx: int, rss: I64, stats: I64) -> int:
    """Copy one entry that is not present; see :func:`ptebatch.reference.copy_nonpresent_pte`."""
    _check_rows(ctx, dst, src, rss, stats)
    idx = checks.check_idx(idx, ctx.layout)
    pte = int(src[idx])
    checks.check_nonpresent(ctx.layout, pte, idx)
    swap = ctx.folios.swap
    swap.know(swap_keys(ctx.layout, src[idx : idx + 1], ctx.semantics))
    before = _allocations_left(ctx)
    ret, left, pfn, near_limit = _core.py_copy_nonpresent_pte(
        dst.reshape(1, -1), src.reshape(1, -1), idx, _layout_words(ctx.layout), _rule_words(ctx),
        *_memmap(ctx.folios), swap._slots, swap._counts, rss, stats, before,
    )  # fmt: skip
    ctx.folios._walked([], near_limit)
    _allocated(ctx, before - left)
    if ret in _core.RESULTS.values():
        _raise(ret, ctx.layout, pte, None, pfn)
    return int(ret)


def _allocations_left(ctx: ForkContext) -> int:
    return NEVER_FAILS if ctx.allocations is None else ctx.allocations.left


def _allocated(ctx: ForkContext, nr: int) -> None:
    if ctx.allocations is not None:
        ctx.allocations.made += nr


def _copy(
    ctx: ForkContext,
    dst: U64,
    src: U64,
    vpns: I64,
    rows: tuple[int, int, int],
    start: int,
    end: int,
    rss: I64,
    stats: I64,
    has_rows: int,
) -> int:
    """Drive the core's walk of pages start..end.

    It comes back for more preallocated pages whenever it runs out of them, and for swap slots that are not known yet.
    """
    layout, rules, fast = _layout_words(ctx.layout), _rule_words(ctx), _fast(ctx.folios)
    dst_row, src_row, nr_rows = rows
    marks = _NO_MARKS if ctx.marks is None else ctx.marks
    before = _allocations_left(ctx)
    state = np.array([0, 0, 0, before, has_rows], dtype=np.int64)
    pool = np.empty(0, dtype=np.uint64)
    swap = ctx.folios.swap
    global core_ns
    while True:
        ret, pfn, near_limit, took = _core.py_copy_page_range(
            dst, src, vpns, dst_row, src_row, nr_rows, start, end, layout, rules, *_memmap(ctx.folios), swap._slots,
            swap._counts, pool, rss, stats, state, fast, marks,
        )  # fmt: skip
        core_ns += took
        ctx.folios._walked(pool[: state[2]], near_limit)
        if ret == _core.RESULTS["E_SWAP_SLOT"]:
            ahead = src[src_row + int(state[0]) : src_row + nr_rows].reshape(-1)
            swap.know(swap_keys(ctx.layout, ahead, ctx.semantics))
            pool = pool[state[2] :]
        elif ret == _core.RESULTS["E_PREALLOC"]:
            pool = ctx.folios.reserve(max(MIN_POOL, 8 * len(pool)))
        else:
            break
        state[2] = 0
    _allocated(ctx, before - int(state[3]))
    if ret in _core.RESULTS.values():
        row, idx = src_row + int(state[0]), int(state[1])
        address = (int(vpns[row]) + idx) << ctx.layout.page_shift
        _raise(ret, ctx.layout, int(src[row, idx]), address, pfn)
    return int(ret)


def copy_pte_range(ctx: ForkContext, dst: U64, src: U64, idx: int, end: int, rss: I64, stats: I64) -> int:
    """Copy slots idx..end of one table; see :func:`ptebatch.reference.copy_pte_range`."""
    _check_rows(ctx, dst, src, rss, stats)
    idx, end = checks.check_span(idx, end, ctx.layout)
    vpns = np.zeros(1, dtype=np.int64)
    return _copy(ctx, dst.reshape(1, -1), src.reshape(1, -1), vpns, (0, 0, 1), idx, end, rss, stats, 1)


def copy_page_range(
    ctx: ForkContext, dst_mm: Mm, src_mm: Mm, stats: I64, start: int | None = None, end: int | None = None
) -> int:
    """Copy the tables of a VMA, or of a part, in one call; see :func:`ptebatch.reference.copy_page_range`."""
    checks.check_context(ctx)
    checks.check_mms(dst_mm=dst_mm, src_mm=src_mm)
    checks.check_stats(stats, ctx.layout)
    start, end = checks.check_segment(ctx, src_mm, start, end)
    checks.check_array("src_mm.entries", src_mm.entries, np.uint64, (len(src_mm.vpns), ctx.layout.ptrs_per_pte), True)
    checks.check_array("dst_mm.entries", dst_mm.entries, np.uint64, (len(dst_mm.vpns), ctx.layout.ptrs_per_pte), True)
    checks.check_rss(dst_mm.rss)
    checks.check_no_overlap(dst_entries=dst_mm.entries, src_entries=src_mm.entries, stats=stats, rss=dst_mm.rss)
    shift = ctx.layout.page_shift
    first, last = src_mm.rows(start, end)
    dst_first, dst_last = dst_mm.rows(start, end)
    # As bytes: numpy.array_equal() takes as long as four of the checks above.
    if src_mm.vpns[first:last].tobytes() != dst_mm.vpns[dst_first:dst_last].tobytes():
        lacking = np.setdiff1d(src_mm.vpns[first:last], dst_mm.vpns)
        raise StateError(
            f"the child has no page table for address {int(lacking[0]) << shift:#x}; add it before copying"
            if len(lacking)
            else f"the child has page tables in {start:#x}-{end:#x} that the parent lacks"
        )
    rows = (dst_first, first, last - first)
    ret = _copy(
        ctx, dst_mm.entries, src_mm.entries, src_mm.vpns, rows, start >> shift, end >> shift, dst_mm.rss, stats,
        int(ctx.has_first_table),
    )  # fmt: skip
    return -ENOMEM if ret else 0


def cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _marks(mm: Mm, nr_slots: int, threads: int) -> U64:
    """Room for the marks of as many threads as are worth it: none for few slots, or where marks take much memory."""
    threads = min(threads, nr_slots // THREAD_SLOTS)
    threads = threads if threads < 2 else min(threads, cpus())
    nr_pages = mm.folios.extent()[1] if threads > 1 else 0
    if not nr_pages or nr_pages > 64 * nr_slots or mm.has_pinned:
        return _NO_MARKS
    return np.empty((threads, _core.mark_words(nr_pages)), dtype=np.uint64)  # the allocator uses memory again


def check_range(
    mm: Mm,
    vmas: Iterable[Vma],
    *,
    pfn_without_page: str = "error",
    semantics: KernelSemantics = LATEST,
    threads: int = 1,
) -> dict[int, U64]:
    """The read-only pass before a fork; see :func:`ptebatch.reference.check_range`.

    With several threads it returns, by the start of VMAs, what `ForkContext.marks` holds; it is of use for as long as
    nothing changes.
    """
    checks.check_pfn_without_page(pfn_without_page)
    checks.check_array("mm.entries", mm.entries, np.uint64, (len(mm.vpns), mm.layout.ptrs_per_pte), False)
    layout, memmap, fast = _layout_words(mm.layout), _memmap(mm.folios), _fast(mm.folios)
    swap_rules = _swap_rules(semantics)
    shift = mm.layout.page_shift
    found: dict[int, U64] = {}
    global core_ns
    for vma in vmas:
        first, last = mm.rows(vma.start, vma.end)
        marks = _marks(mm, (last - first) * mm.layout.ptrs_per_pte, threads)
        ret, vpn, pfn, took = _core.py_check_range(
            mm.entries, mm.vpns, first, last - first, vma.start >> shift, vma.end >> shift, layout, *memmap,
            pfn_without_page == "as_kernel", swap_rules["swp_kinds"], swap_rules["swp_kinds_high"], fast,
            marks,
        )  # fmt: skip
        core_ns += took
        if ret:
            _raise(ret, mm.layout, mm.pte(vpn << shift), vpn << shift, pfn)
        if len(marks):
            found[vma.start] = marks
    return found


def wrprotect_range(
    mm: Mm, start: int, end: int, *, semantics: KernelSemantics, batching: bool, stats: I64
) -> None:
    """Write-protect every present entry of start..end; see :func:`ptebatch.reference.wrprotect_range`."""
    start, end = checks.check_range_bounds(mm, start, end)
    checks.check_batching(batching, semantics)
    checks.check_stats(stats, mm.layout)
    checks.check_array("mm.entries", mm.entries, np.uint64, (len(mm.vpns), mm.layout.ptrs_per_pte), True)
    checks.check_no_overlap(entries=mm.entries, stats=stats)
    layout, fast = configured(mm.layout, semantics), _fast(mm.folios)
    shift = layout.page_shift
    global core_ns
    for vma in mm.vmas:
        low, high = max(start, vma.start), min(end, vma.end)
        if low >= high:
            continue
        first, last = mm.rows(low, high)
        ret, vpn, took = _core.py_wrprotect_range(
            mm.entries, mm.vpns, first, last - first, low >> shift, high >> shift, batching, semantics.fpb_clamp,
            _layout_words(layout), *_memmap(mm.folios), stats, fast,
        )  # fmt: skip
        core_ns += took
        if ret:
            entry = mm.pte(vpn << shift)
            _raise(ret, layout, entry, vpn << shift, arch.pte_pfn(layout, entry))


def _zap_rule_words(ctx: ZapContext) -> U64:
    vm_flags, semantics = ctx.vma.vm_flags, ctx.semantics
    anonymous, swap_rules = ctx.vma.vm_ops is None, _swap_rules(semantics)
    rules = {
        "batching": ctx.batching,
        "fpb_clamp": semantics.fpb_clamp,
        "large_mapcount": semantics.large_mapcount,
        "mm_id": semantics.mm_id,
        "page_mapcount": not semantics.config.no_page_mapcount,
        "zap_mm_id": ctx.mm_id,
        "even_cows": ctx.even_cows,
        "drop_markers": ctx.drop_markers,
        "vma_anonymous": anonymous,
        "uffd_wp": vm_flags & arch.VM_UFFD_WP and not anonymous and not ctx.drop_markers,
        "uffd_wp_marker": arch.swp_entry(ctx.layout, arch.SWP_PTE_MARKER, arch.PTE_MARKER_UFFD_WP),
        "recency": not vm_flags & (arch.VM_SEQ_READ | arch.VM_RAND_READ),
        "as_kernel": ctx.pfn_without_page == "as_kernel",
        "guard_markers": semantics.guard_markers,
        "swp_kinds": swap_rules["swp_kinds"],
        "swp_kinds_high": swap_rules["swp_kinds_high"],
        "single_device_exclusive": semantics.single_device_exclusive,
    }
    return np.array([int(rules[name]) for name in _core.ZAP_RULE_FIELDS], dtype=np.uint64)


def _zap(
    ctx: ZapContext,
    entries: U64,
    vpns: I64,
    rows: tuple[int, int],
    span: tuple[int, int],
    rss: I64,
    stats: I64,
    *,
    once: bool,
) -> int:
    """Drive the core over pages ``span`` of some rows; results as the core's, errors raised."""
    swap = ctx.folios.swap
    ret, vpn, pfn, lowest_freed = _core.py_zap_range(
        entries, vpns, rows[0], rows[1] - rows[0], span[0], span[1], once, _layout_words(ctx.layout),
        _zap_rule_words(ctx), *_memmap(ctx.folios), swap._slots, swap._counts, rss, stats,
    )  # fmt: skip
    ctx.folios._zapped(lowest_freed)
    if ret < 0:
        row = int(np.searchsorted(vpns, vpn, side="right")) - 1
        address = None if once else vpn << ctx.layout.page_shift
        _raise(ret, ctx.layout, int(entries[row, vpn - int(vpns[row])]), address, pfn)
    return int(ret)


def clear_full_ptes(entries: U64, idx: int, nr: int, *, layout: PteLayout) -> None:
    """Clear nr entries; see :func:`ptebatch.reference.clear_full_ptes`."""
    _clear_full_ptes("clear_full_ptes", entries, idx, nr, layout)


def get_and_clear_full_ptes(entries: U64, idx: int, nr: int, *, layout: PteLayout) -> int:
    """Clear nr entries and return them as one; see :func:`ptebatch.reference.get_and_clear_full_ptes`."""
    return _clear_full_ptes("get_and_clear_full_ptes", entries, idx, nr, layout)


def _clear_full_ptes(function: str, entries: U64, idx: int, nr: int, layout: PteLayout) -> int:
    checks.check_layout(layout)
    checks.check_row("entries", entries, layout, writable=True)
    idx = checks.check_idx(idx, layout)
    nr = checks.check_nr("nr", nr, idx, layout)
    checks.check_batch_ptes(function, entries, idx, nr, layout)
    return _core.py_clear_full_ptes(entries.reshape(1, -1), idx, nr, _layout_words(layout))


def zap_present_ptes(ctx: ZapContext, entries: U64, idx: int, max_nr: int, rss: I64, stats: I64) -> int:
    """Unmap one present entry or one batch; see :func:`ptebatch.reference.zap_present_ptes`."""
    checks.check_zap_context(ctx)
    checks.check_row("entries", entries, ctx.layout, writable=True)
    idx = checks.check_idx(idx, ctx.layout)
    max_nr = checks.check_nr("max_nr", max_nr, idx, ctx.layout)
    checks.check_rss(rss)
    checks.check_zap_stats(stats, ctx.layout)
    checks.check_no_overlap(entries=entries, rss=rss, stats=stats)
    checks.check_present(ctx.layout, int(entries[idx]), idx)
    vpns = np.zeros(1, dtype=np.int64)
    return _zap(ctx, entries.reshape(1, -1), vpns, (0, 1), (idx, idx + max_nr), rss, stats, once=True)


def zap_range(
    mm: Mm,
    start: int,
    end: int,
    *,
    semantics: KernelSemantics,
    batching: bool,
    stats: I64,
    even_cows: bool = True,
    drop_markers: bool = False,
    pfn_without_page: PFN_WITHOUT_PAGE = "error",
) -> None:
    """Unmap everything in start..end; see :func:`ptebatch.reference.zap_range`."""
    start, end = checks.check_range_bounds(mm, start, end)
    checks.check_batching(batching, semantics, "zap_batching")
    checks.check_zap_stats(stats, mm.layout)
    checks.check_rss(mm.rss)
    checks.check_array("mm.entries", mm.entries, np.uint64, (len(mm.vpns), mm.layout.ptrs_per_pte), True)
    checks.check_no_overlap(entries=mm.entries, rss=mm.rss, stats=stats)
    shift = mm.layout.page_shift
    for vma in mm.vmas:
        low, high = max(start, vma.start), min(end, vma.end)
        if low >= high:
            continue
        ctx = ZapContext(
            layout=configured(mm.layout, semantics),
            semantics=semantics,
            folios=mm.folios,
            vma=vma,
            batching=bool(batching),
            mm_id=mm.mm_id,
            even_cows=even_cows,
            drop_markers=drop_markers,
            pfn_without_page=pfn_without_page,
        )
        checks.check_zap_context(ctx)
        _zap(ctx, mm.entries, mm.vpns, mm.rows(low, high), (low >> shift, high >> shift), mm.rss, stats, once=False)


def apply_helper(layout: PteLayout, name: str, values: U64, arg: int = 0) -> U64:
    """One of the core's own ``pte_*`` helpers over an array, for comparing it with :mod:`ptebatch.arch`.

    Parameters
    ----------
    layout : PteLayout
    name : str
        One of ``HELPERS``.
    values : numpy.ndarray
        uint64[n]: entries (PFNs for ``mk_pte``, offsets for ``swp_entry``).
    arg : int
        n for ``pte_advance_pfn``, the protection for ``mk_pte``, the VMA's flags for ``pte_mkwrite``, the type for
        ``swp_entry``.

    Returns
    -------
    numpy.ndarray
        uint64[n]; predicates as 0 and 1.
    """
    checks.check_layout(layout)
    if name not in HELPERS:
        raise ArgumentError(f"name must be a pte helper ({', '.join(HELPERS)}), not {name!r}")
    checks.check_array("values", values, np.uint64, None, False)
    if name == "pte_mkwrite" and checks.check_u64("arg", arg) & arch.VM_SHADOW_STACK:
        name = "pte_mkwrite_shstk"
    out = np.empty_like(values)
    _core.py_apply_helper(HELPERS[name], values, checks.check_u64("arg", arg), out, _layout_words(layout))
    return out


__all__: list[Any] = [
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
