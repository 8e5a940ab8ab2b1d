"""Argument checks shared by `batch` (the door to the compiled core) and `reference` (the oracle).

Both offer the same functions, so both must refuse the same arguments with the same errors.  Everything here only
reads.  Each message names the argument and says what was expected.
"""

from __future__ import annotations

import operator
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from ptebatch import arch
from ptebatch.arch import PteLayout
from ptebatch.errors import ArgumentError, ReadOnlyError, SemanticsError, StateError, UnsupportedEntryError
from ptebatch.folio import MAX_MM_ID
from ptebatch.mm import STAT_FIELDS, ZAP_STAT_FIELDS, ForkContext, Mm, ZapContext

U64_MAX = (1 << 64) - 1
MAX_PFN = (1 << 40) - 1
"""Highest page frame number the memmap can hold."""
PFN_WITHOUT_PAGE = ("error", "as_kernel")


class BatchResult(NamedTuple):
    """What `folio_pte_batch` found.

    Attributes
    ----------
    nr : int
        Number of PTEs in the batch, at least 1.
    any_writable, any_young, any_dirty : bool
        Whether any of the entries 1..nr-1 has the property; entry 0 is not included.
    pte : int
        Entry 0, with the merges the flags ask for (v6.17+); unchanged before.
    """

    nr: int
    any_writable: bool
    any_young: bool
    any_dirty: bool
    pte: int


def show_int(value: int) -> str:
    """Spell an int of any size shortly (the decimal form of a huge one is refused by Python itself)."""
    return str(value) if value.bit_length() <= 64 else f"a number of {value.bit_length()} bits"


def as_int(name: str, value: Any) -> int:
    """Convert through ``operator.index``: 1.5 is refused, not rounded."""
    try:
        return operator.index(value)
    except TypeError:
        raise ArgumentError(f"{name} must be an integer, not {type(value).__name__}") from None


MAX_THREADS = 64
"""As many as the core has room for; ptebatch.batch compares them on import."""


def check_int(name: str, value: Any, low: int, high: int) -> int:
    """An integer with ``low <= value <= high``."""
    number = as_int(name, value)
    if not low <= number <= high:
        raise ArgumentError(f"{name} must be in {low}..{high}, not {show_int(number)}")
    return number


def check_u64(name: str, value: Any) -> int:
    """An unsigned 64-bit value, such as a PTE."""
    number = as_int(name, value)
    if not 0 <= number <= U64_MAX:
        raise ArgumentError(f"{name} must be an unsigned 64-bit value, not {show_int(number)}")
    return number


def check_layout(layout: Any) -> PteLayout:
    """A `PteLayout`."""
    if not isinstance(layout, PteLayout):
        raise ArgumentError(f"layout must be a PteLayout, not {type(layout).__name__}")
    return layout


def check_array(name: str, array: Any, dtype: Any, shape: tuple[int, ...] | None, writable: bool) -> np.ndarray:
    """A C-contiguous, aligned array of exactly this dtype (and of this shape; None: any one-dimensional)."""
    if not isinstance(array, np.ndarray):
        raise ArgumentError(f"{name} must be a numpy array, not {type(array).__name__}")
    if array.dtype != np.dtype(dtype):
        raise ArgumentError(f"{name} must have dtype {np.dtype(dtype)} in native byte order, not {array.dtype.str}")
    if shape is None:
        if array.ndim != 1:
            raise ArgumentError(f"{name} must have one dimension, not {array.ndim}")
    elif array.shape != shape:
        raise ArgumentError(f"{name} must have shape {shape}, not {array.shape}")
    if not array.flags.c_contiguous or not array.flags.aligned:
        raise ArgumentError(f"{name} must be C-contiguous and aligned; pass a copy (numpy.ascontiguousarray)")
    if writable and not array.flags.writeable:
        raise ReadOnlyError(f"{name} would be written but the array is read-only; pass a writable copy")
    return array


def check_row(name: str, array: Any, layout: PteLayout, writable: bool) -> np.ndarray:
    """One page table: ``uint64[ptrs_per_pte]``."""
    return check_array(name, array, np.uint64, (layout.ptrs_per_pte,), writable)


def check_rss(rss: Any) -> np.ndarray:
    """The four rss counters that will be added to: ``int64[4]``, writable."""
    return check_array("rss", rss, np.int64, (4,), True)


def check_stats(stats: Any, layout: PteLayout) -> np.ndarray:
    """The counters of `ptebatch.mm.new_stats`: ``int64``, writable."""
    return check_array("stats", stats, np.int64, (len(STAT_FIELDS) + layout.ptrs_per_pte + 1,), True)


def check_zap_stats(stats: Any, layout: PteLayout) -> np.ndarray:
    """The counters of `ptebatch.mm.new_zap_stats`: ``int64``, writable."""
    return check_array("stats", stats, np.int64, (len(ZAP_STAT_FIELDS) + layout.ptrs_per_pte + 1,), True)


def check_idx(idx: Any, layout: PteLayout) -> int:
    """A slot in a table."""
    return check_int("idx", idx, 0, layout.ptrs_per_pte - 1)


def check_nr(name: str, nr: Any, idx: int, layout: PteLayout) -> int:
    """A number of entries from slot `idx` (already checked) on that stays in the table: at least 1."""
    return check_int(name, nr, 1, layout.ptrs_per_pte - idx)


def check_span(idx: Any, end: Any, layout: PteLayout) -> tuple[int, int]:
    """Slots ``idx..end`` (end exclusive) of one table; may be empty."""
    first = check_int("idx", idx, 0, layout.ptrs_per_pte)
    return first, check_int("end", end, first, layout.ptrs_per_pte)


def check_no_overlap(**arrays: np.ndarray) -> None:
    """Refuse arrays that share bytes (each already checked to be contiguous)."""
    for (name, array), (other, other_array) in combinations(arrays.items(), 2):
        if np.may_share_memory(array, other_array):  # compares where they begin and end
            raise ArgumentError(f"{name} and {other} overlap in memory; they must be separate arrays")


def check_prealloc(prealloc: Any) -> list[int]:
    """The preallocated page: ``[]`` or ``[pfn]``; the list itself is used, so that the callee can consume it."""
    if not isinstance(prealloc, list):
        raise ArgumentError(f"prealloc must be a list ([] or [pfn]), not {type(prealloc).__name__}")
    if len(prealloc) > 1:
        raise ArgumentError(f"prealloc must hold at most one PFN, not {len(prealloc)}")
    for pfn in prealloc:
        check_int("prealloc[0]", pfn, 0, MAX_PFN)
    return prealloc


def check_pfn_without_page(value: Any) -> str:
    """``"error"`` or ``"as_kernel"``."""
    if not isinstance(value, str) or value not in PFN_WITHOUT_PAGE:
        raise ArgumentError(f"pfn_without_page must be one of {', '.join(PFN_WITHOUT_PAGE)}, not {value!r}")
    return str(value)


def check_batching(batching: Any, semantics: Any, switch: str = "fork_batching") -> bool:
    """A bool; True needs semantics that batch (v6.9+): the switch of that name."""
    if not isinstance(batching, (bool, np.bool_)):
        raise ArgumentError(f"batching must be a bool, not {type(batching).__name__}")
    if batching and not getattr(semantics, switch):
        raise SemanticsError(f"{semantics.version} does not batch; pass batching=False, or semantics of v6.9 or newer")
    return bool(batching)


def check_context(ctx: Any) -> ForkContext:
    """A consistent `ForkContext`."""
    if not isinstance(ctx, ForkContext):
        raise ArgumentError(f"ctx must be a ForkContext, not {type(ctx).__name__}")
    check_layout(ctx.layout)
    check_pfn_without_page(ctx.pfn_without_page)
    check_batching(ctx.batching, ctx.semantics)
    if ctx.marks is not None:
        shape = getattr(ctx.marks, "shape", ())
        check_array("ctx.marks", ctx.marks, np.uint64, shape if len(shape) == 2 else (0, 0), False)
    return ctx


def check_zap_context(ctx: Any) -> ZapContext:
    """A consistent `ZapContext`."""
    if not isinstance(ctx, ZapContext):
        raise ArgumentError(f"ctx must be a ZapContext, not {type(ctx).__name__}")
    check_layout(ctx.layout)
    check_pfn_without_page(ctx.pfn_without_page)
    check_batching(ctx.batching, ctx.semantics, "zap_batching")
    check_int("ctx.mm_id", ctx.mm_id, 0, MAX_MM_ID)
    return ctx


def check_flags(flags: Any, semantics: Any) -> int:
    """FPB_* flags: two bits before v6.17 (IGNORE), five since (RESPECT and MERGE)."""
    number = as_int("flags", flags)
    known = 0x1F if semantics.fpb_respect else 0x3
    if number < 0 or number & ~known:
        raise ArgumentError(f"flags has bits that {semantics.version} does not know (known: {known:#x})")
    return number


def unknown_swap_type(number: int, addr: int | None) -> UnsupportedEntryError:
    """A swap type that no kernel uses: they have five bits, also where the entry has room for more."""
    return UnsupportedEntryError(address=addr, kind=f"swap type {number}")


def not_device_memory(pfn: int, addr: int | None) -> StateError:
    """A device-private entry and its page contradict each other."""
    where = "" if addr is None else f" at address {addr:#x}"
    return StateError(f"a device-private entry{where} maps PFN {pfn:#x}, which is not device memory (device=True)")


def swap_slot_full(number: int, offset: int, addr: int | None) -> StateError:
    """A swap slot that can count no further reference."""
    where = "" if addr is None else f" at address {addr:#x}"
    return StateError(f"swap slot {number}:{offset:#x}{where}: its count has reached the limit")


def swap_slot_unused(number: int, offset: int, addr: int | None) -> StateError:
    """A swap slot whose last reference is given back once more."""
    where = "" if addr is None else f" at address {addr:#x}"
    return StateError(
        f"swap slot {number}:{offset:#x}{where} has no reference left to give back; "
        "was it counted (ptebatch.mm.account)?"
    )


def unmapped_more_than_mapped(pfn: int, addr: int | None) -> StateError:
    """Counts of a page or its folio that are lower than the mappings there are."""
    where = "" if addr is None else f" at address {addr:#x}"
    return StateError(
        f"PFN {pfn:#x}{where}: its mapcount or its folio's refcount is lower than the number of its mappings; "
        "were they counted (ptebatch.mm.account)?"
    )


def check_mms(**mms: Any) -> None:
    """Each an Mm."""
    for name, mm in mms.items():
        if not isinstance(mm, Mm):
            raise ArgumentError(f"{name} must be an Mm, not {type(mm).__name__}")


def check_segment(ctx: ForkContext, src_mm: Mm, start: Any, end: Any) -> tuple[int, int]:
    """The part of a VMA that one ``copy_page_range`` copies: page tables only, no leaf above them."""
    vma, shift = ctx.src_vma, ctx.layout.page_shift
    first = vma.start if start is None else check_int("start", start, vma.start, vma.end)
    last = vma.end if end is None else check_int("end", end, first, vma.end)
    if (first | last) & ((1 << shift) - 1):
        raise ArgumentError(f"start and end must be multiples of the page size {1 << shift}")
    low = int(src_mm.pmd_vpns.searchsorted((first >> shift) - ctx.layout.ptrs_per_pte, side="right"))
    high = int(src_mm.pmd_vpns.searchsorted(last >> shift))
    for at in range(low, high):
        if not arch.pte_none(ctx.layout, int(src_mm.pmd_entries[at])):
            addr = int(src_mm.pmd_vpns[at]) << shift
            raise ArgumentError(f"a PMD leaf lies at {addr:#x}: copy the page tables on either side of it")
    return first, last


def check_range_bounds(mm: Any, start: Any, end: Any) -> tuple[int, int]:
    """Byte addresses ``start <= end``, both multiples of the page size."""
    if not isinstance(mm, Mm):
        raise ArgumentError(f"mm must be an Mm, not {type(mm).__name__}")
    first = check_u64("start", start)
    last = check_int("end", end, first, U64_MAX + 1)
    page_size = 1 << mm.layout.page_shift
    for name, addr in (("start", first), ("end", last)):
        if addr % page_size:
            raise ArgumentError(f"{name} must be a multiple of the page size {page_size}, not {addr:#x}")
    return first, last


def check_set_ptes(entries: np.ndarray, idx: int, pte: int, nr: int, layout: PteLayout) -> None:
    """The contract of ``set_ptes``: more than one entry only as present values into slots not present before."""
    if nr == 1:
        return
    if not arch.pte_present(layout, pte):
        raise ArgumentError(f"pte {pte:#x} must be present to be set into more than one slot")
    for slot in range(idx, idx + nr):
        if arch.pte_present(layout, int(entries[slot])):
            raise ArgumentError(f"slot {slot} of entries is present; set_ptes needs slots that are not")


def check_present(layout: PteLayout, pte: int, idx: int) -> None:
    """An entry for ``zap_present_ptes``."""
    if not arch.pte_present(layout, pte):
        what = "empty" if arch.pte_none(layout, pte) else "not present"
        raise ArgumentError(f"slot {idx} of entries is {what}; zap_present_ptes needs a present entry")


def check_nonpresent(layout: PteLayout, pte: int, idx: int) -> None:
    """An entry for ``copy_nonpresent_pte``."""
    if arch.pte_none(layout, pte) or arch.pte_present(layout, pte):
        what = "empty" if arch.pte_none(layout, pte) else "present"
        raise ArgumentError(f"slot {idx} of src is {what}; copy_nonpresent_pte needs an entry that is neither")


def check_batch_ptes(function: str, entries: np.ndarray, idx: int, nr: int, layout: PteLayout) -> None:
    """The contract of ``wrprotect_ptes`` and its like: present entries that map consecutive pages."""
    first = int(entries[idx])
    for slot in range(idx, idx + nr):
        value = int(entries[slot])
        if not arch.pte_present(layout, value):
            raise ArgumentError(f"slot {slot} of entries is not present; {function} needs present entries")
        if arch.pte_pfn(layout, value) != arch.pte_pfn(layout, first) + slot - idx:
            raise ArgumentError(f"slot {slot} of entries does not map the page after slot {slot - 1}")
