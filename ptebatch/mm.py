"""Address spaces: VMAs, the pool of page tables, rss, and what one fork needs to know of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from ptebatch import arch, memory
from ptebatch import folio as f
from ptebatch.arch import PteLayout
from ptebatch.errors import ArgumentError, StateError
from ptebatch.folio import FolioTable
from ptebatch.semantics import LATEST, KernelSemantics
from ptebatch.swap import KEY_TYPE_SHIFT

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

MM_FILEPAGES, MM_ANONPAGES, MM_SWAPENTS, MM_SHMEMPAGES = range(4)
NR_MM_COUNTERS = 4
STAT_FIELDS = (
    "vmas_copied", "vmas_skipped", "tables_allocated", "ptes_none", "ptes_present", "ptes_single", "ptes_batched",
    "batches", "folio_ref_add", "rmap_dup", "ptep_get", "wrprotect_ptes", "ptes_wrprotected", "set_ptes",
    "eagain_rounds", "copied_pages", "anon_exclusive_cleared", "special_ptes", "swap_entries", "migration_entries",
    "device_private_entries", "device_exclusive_entries", "hwpoison_entries", "pte_markers",
    "pmds_copied", "pmds_split", "tables_deposited", "hugetlb_entries", "hugetlb_copied",
    "contpte_reads", "contpte_folds", "contpte_unfolds",
)  # fmt: skip
"""Counters of one page-table walk, in the order of the arrays `new_stats` makes; the batch histogram follows."""
STAT = {name: position for position, name in enumerate(STAT_FIELDS)}
"""Where in such an array a counter is."""
ZAP_STAT_FIELDS = (
    "ptes_none", "ptes_present", "ptes_single", "ptes_batched", "batches", "ptes_skipped", "special_ptes", "ptep_get",
    "clear_ptes", "rmap_remove", "folio_put", "folios_freed", "folio_mark_dirty", "folio_mark_accessed",
    "uffd_wp_markers", "swap_entries", "migration_entries", "device_private_entries", "device_exclusive_entries",
    "hwpoison_entries", "pte_markers", "contpte_reads", "contpte_folds", "contpte_unfolds",
)  # fmt: skip
"""Counters of one zap, in the order of the arrays `new_zap_stats` makes; the batch histogram follows."""

PFN_WITHOUT_PAGE = Literal["error", "as_kernel"]
VM_OPS = (None, "file", "shmem", "hugetlb", "special")


@dataclass(slots=True)
class Vma:
    """A virtual memory area.

    Attributes
    ----------
    start, end : int
        Bytes, multiples of the page size, ``start < end``.
    vm_flags : int
        VM_* of :mod:`ptebatch.arch`.
    anon_vma : bool
        ``vma->anon_vma`` is set: the area has had anonymous pages.
    vm_ops : {None, "file", "shmem", "hugetlb", "special"}
        What backs it; None is private anonymous memory.
    name : str
        For people: a path, ``[heap]``.
    pgoff : int
        Offset into the backing object in pages.
    vm_page_prot : int, optional
        None: what ``vm_get_page_prot`` makes of the flags.
    uffd_event_fork : bool
        The userfaultfd on this area asked for fork events, so the child keeps it.
    """

    start: int
    end: int
    vm_flags: int
    anon_vma: bool = True
    vm_ops: str | None = None
    name: str = ""
    pgoff: int = 0
    vm_page_prot: int | None = None
    uffd_event_fork: bool = False


def vm_page_prot(layout: PteLayout, vma: Vma) -> int:
    """``vma->vm_page_prot``: its own, or what its flags make of it."""
    return arch.vm_get_page_prot(layout, vma.vm_flags) if vma.vm_page_prot is None else vma.vm_page_prot


def none_tables(layout: PteLayout, n: int) -> U64:
    """Make `n` page tables, all slots none: uint64[n, ptrs_per_pte], in huge pages if they are many."""
    tables = memory.zeros(n, layout.ptrs_per_pte)
    if layout.none_value:  # elsewhere they stay fresh, touched only when written
        tables.fill(layout.none_value)
    return tables


@lru_cache(maxsize=256)
def configured(layout: PteLayout, semantics: KernelSemantics) -> PteLayout:
    """Return the layout as this kernel, with its configuration and on its CPU, uses it."""
    config = semantics.config
    without = [name for name, on in semantics.switches.items() if not on]
    if not config.riscv_svrsw60t59b:
        without.append("riscv_svrsw60t59b")
    new = layout.configured(config.mem_soft_dirty, config.x86_shstk, without=without)
    return layout if new == layout else new  # one object, so that who looks layouts up need not compare their fields


def soft_dirty_tracked(layout: PteLayout, vma: Vma) -> bool:
    """``vma_soft_dirty_enabled()``: the layout as configured has the bit, and VM_SOFTDIRTY (inverted) is clear."""
    return layout.soft_dirty != 0 and not vma.vm_flags & arch.VM_SOFTDIRTY


class Mm:
    """An address space: VMAs and the pool of page tables that map them.

    Parameters
    ----------
    layout : PteLayout
    folios : FolioTable
        Shared by every Mm that maps the same memory.
    vmas : sequence of Vma
        Sorted, not overlapping.
    vpns : int64 array of shape (n_tables,), optional
        Virtual page number of each table's slot 0: multiples of ptrs_per_pte, ascending. None: no tables.
    entries : uint64 array of shape (n_tables, ptrs_per_pte), optional
        One row per table, C-contiguous; used as it is, not copied. None: all slots none.
    pmd_vpns, pmd_entries : arrays of shape (n_leaves,), optional
        PMD leaves, the second pool; in hugetlb VMAs also larger ones, as large as their folios.
    rss : int64 array of shape (4,), optional
        Pages by MM_FILEPAGES, MM_ANONPAGES, MM_SWAPENTS, MM_SHMEMPAGES.
    has_pinned : bool
        MMF_HAS_PINNED.
    mm_id : int, optional
        What MM-ID slots know it by; None: a fresh one.
    huge_zero : bool
        MMF_HUGE_ZERO_FOLIO: it holds a reference to the huge zero page, from the first mapping to its end.
    hugetlb_usage : int
        Pages mapped from hugetlb, which rss leaves out.
    """

    __slots__ = (
        "entries", "folios", "has_pinned", "huge_zero", "hugetlb_usage", "layout", "mm_id", "name", "pmd_entries",
        "pmd_vpns", "rss", "vmas", "vpns",
    )  # fmt: skip

    def __init__(
        self,
        layout: PteLayout,
        folios: FolioTable,
        *,
        vmas: Iterable[Vma] = (),
        vpns: I64 | None = None,
        entries: U64 | None = None,
        pmd_vpns: I64 | None = None,
        pmd_entries: U64 | None = None,
        rss: I64 | None = None,
        has_pinned: bool = False,
        mm_id: int | None = None,
        name: str = "",
        huge_zero: bool = False,
        hugetlb_usage: int = 0,
    ) -> None:
        self.layout = layout
        self.folios = folios
        self.vmas = list(vmas)
        self.vpns = np.zeros(0, dtype=np.int64) if vpns is None else vpns
        self.entries = none_tables(layout, len(self.vpns)) if entries is None else entries
        self.pmd_vpns = np.zeros(0, dtype=np.int64) if pmd_vpns is None else pmd_vpns
        self.pmd_entries = np.zeros(0, dtype=np.uint64) if pmd_entries is None else pmd_entries
        self.rss = np.zeros(NR_MM_COUNTERS, dtype=np.int64) if rss is None else rss
        self.has_pinned = has_pinned
        self.mm_id = folios.new_mm_id() if mm_id is None else mm_id
        self.name = name
        self.huge_zero = huge_zero
        self.hugetlb_usage = hugetlb_usage

    @classmethod
    def for_vmas(cls, layout: PteLayout, folios: FolioTable, vmas: Sequence[Vma], **kwargs: object) -> Mm:
        """An address space with an empty table for every stretch a VMA touches."""
        ptrs, shift = layout.ptrs_per_pte, layout.page_shift
        rows = [
            np.arange((vma.start >> shift) // ptrs, ((vma.end >> shift) - 1) // ptrs + 1, dtype=np.int64)
            for vma in vmas
        ]
        vpns = np.unique(np.concatenate(rows)) * ptrs if rows else None
        return cls(layout, folios, vmas=vmas, vpns=vpns, **kwargs)  # type: ignore[arg-type]

    # --- reading and writing entries ----------------------------------------------------------------------------------

    def rows(self, start: int, end: int) -> tuple[int, int]:
        """First and one past the last row whose table overlaps bytes ``start..end``."""
        ptrs, shift = self.layout.ptrs_per_pte, self.layout.page_shift
        first = int(self.vpns.searchsorted((start >> shift) - ptrs, side="right"))
        last = int(self.vpns.searchsorted(-(-end >> shift)))
        return first, max(first, last)

    def covered(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Ranges of bytes ``start..end`` that page tables cover, as far as their entries follow each other.

        What a process has only reserved can be much larger than what its tables, and any array, have entries for.
        """
        ptrs, shift = self.layout.ptrs_per_pte, self.layout.page_shift
        vpns = self.vpns[slice(*self.rows(start, end))]
        for run in np.split(vpns, np.flatnonzero(np.diff(vpns) != ptrs) + 1):
            if len(run):
                yield max(start, int(run[0]) << shift), min(end, (int(run[-1]) + ptrs) << shift)

    def entries_of(self, start: int, end: int) -> U64:
        """As `ptes`, uint64, but only what has a page table: its entries one after the other."""
        first, last = self.rows(start, end)
        if first == last:
            return np.empty(0, dtype=np.uint64)
        shift, flat = self.layout.page_shift, self.entries[first:last].reshape(-1)
        before = max(0, (start >> shift) - int(self.vpns[first]))
        behind = max(0, int(self.vpns[last - 1]) + self.layout.ptrs_per_pte - (end >> shift))
        return flat[before : len(flat) - behind].copy()

    def _slot(self, addr: int) -> tuple[int, int] | None:
        vpn = addr >> self.layout.page_shift
        row = int(np.searchsorted(self.vpns, vpn, side="right")) - 1
        if row < 0 or vpn - int(self.vpns[row]) >= self.layout.ptrs_per_pte:
            return None
        return row, vpn - int(self.vpns[row])

    def pte(self, addr: int) -> int:
        """The entry of a byte address; the none value where there is no table."""
        slot = self._slot(addr)
        return self.layout.none_value if slot is None else int(self.entries[slot])

    def set_pte(self, addr: int, value: int) -> None:
        """Write one entry; the table must exist (`add_tables`)."""
        slot = self._slot(addr)
        if slot is None:
            raise ArgumentError(f"no page table covers {addr:#x}; add one with add_tables()")
        self.entries[slot] = value

    def add_tables(self, start: int, end: int) -> None:
        """Make tables exist for bytes ``start..end``."""
        ptrs, shift = self.layout.ptrs_per_pte, self.layout.page_shift
        wanted = np.arange((start >> shift) // ptrs, ((end - 1) >> shift) // ptrs + 1, dtype=np.int64) * ptrs
        new = np.setdiff1d(wanted, self.vpns)
        if len(new):
            vpns = np.concatenate([self.vpns, new])
            entries = np.concatenate([self.entries, none_tables(self.layout, len(new))])
            order = np.argsort(vpns)
            self.vpns, self.entries = vpns[order], np.ascontiguousarray(entries[order])

    def _pages(self, start: int, nr: int) -> tuple[I64, I64]:
        """(rows, slots) of nr pages from a byte address; row -1 where there is no table."""
        vpns = np.arange(nr, dtype=np.int64) + (start >> self.layout.page_shift)
        rows = np.searchsorted(self.vpns, vpns, side="right") - 1
        slots = np.where(rows < 0, -1, vpns - self.vpns[rows] if len(self.vpns) else -1)
        rows = np.where((slots < 0) | (slots >= self.layout.ptrs_per_pte), -1, rows)
        return rows, slots

    def ptes(self, start: int, end: int) -> U64:
        """Copy of the entries of bytes ``start..end``, uint64; none where there is no table."""
        nr = (end - start) >> self.layout.page_shift
        flat = self._flat(start, nr)
        if flat is not None:
            return flat.copy()
        rows, slots = self._pages(start, nr)
        out = np.full(len(rows), self.layout.none_value, dtype=np.uint64)
        there = rows >= 0
        out[there] = self.entries[rows[there], slots[there]]
        return out

    def fill(self, start: int, values: U64) -> None:
        """Write consecutive entries from a byte address on; their tables must exist."""
        flat = self._flat(start, len(values))
        if flat is not None:
            flat[...] = values
            return
        rows, slots = self._pages(start, len(values))
        if (rows < 0).any():
            raise ArgumentError(f"no page table covers part of the range from {start:#x}; use add_tables()")
        self.entries[rows, slots] = values

    def _flat(self, start: int, nr: int) -> U64 | None:
        """View of nr consecutive entries where their tables are neighbours in the pool."""
        slot = self._slot(start)
        if slot is None or nr <= 0:
            return None
        ptrs = self.layout.ptrs_per_pte
        last = slot[0] + (slot[1] + nr - 1) // ptrs
        if last >= len(self.vpns) or int(self.vpns[last] - self.vpns[slot[0]]) != (last - slot[0]) * ptrs:
            return None
        at = slot[0] * ptrs + slot[1]
        return self.entries.reshape(-1)[at : at + nr]

    def vma_at(self, addr: int) -> Vma | None:
        """The VMA that contains a byte address."""
        return next((vma for vma in self.vmas if vma.start <= addr < vma.end), None)

    # --- checks -------------------------------------------------------------------------------------------------------

    def validate(self, *, entries: bool = False) -> None:
        """Check shapes, dtypes and order; with `entries`, also that nothing is mapped outside the VMAs.

        Raises
        ------
        ArgumentError
            An array of the wrong dtype, shape or layout.
        StateError
            VMAs or tables that overlap or are out of order; entries outside VMAs.
        """
        ptrs, shift = self.layout.ptrs_per_pte, self.layout.page_shift
        shapes = {
            "vpns": (np.int64, (len(self.vpns),)),
            "entries": (np.uint64, (len(self.vpns), ptrs)),
            "pmd_vpns": (np.int64, (len(self.pmd_vpns),)),
            "pmd_entries": (np.uint64, (len(self.pmd_vpns),)),
            "rss": (np.int64, (NR_MM_COUNTERS,)),
        }
        for name, (dtype, shape) in shapes.items():
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
                found = f"{array.dtype}{array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
                raise ArgumentError(f"{name} must be {np.dtype(dtype)}{shape}, not {found}")
            if not array.flags.c_contiguous:
                raise ArgumentError(f"{name} must be C-contiguous; pass numpy.ascontiguousarray({name})")
        for name in ("vpns", "pmd_vpns"):
            vpns = getattr(self, name)
            if len(vpns) and (int(vpns[0]) < 0 or (np.diff(vpns) <= 0).any() or (vpns % ptrs).any()):
                raise StateError(f"{name} must be ascending multiples of {ptrs}")
        if len(self.pmd_vpns) and not self.layout.huge:
            raise ArgumentError(f"{self.layout.name}: leaves above the page tables are modelled for x86-64 only")
        end = 0
        for vma in self.vmas:
            if vma.start >> shift << shift != vma.start or vma.end >> shift << shift != vma.end:
                raise StateError(f"VMA {vma.start:#x}-{vma.end:#x} is not a range of whole pages")
            if not end <= vma.start < vma.end <= 1 << 63:
                raise StateError(f"VMA {vma.start:#x}-{vma.end:#x} is empty, overlaps another, or is out of order")
            if vma.vm_ops not in VM_OPS:
                raise StateError(f"VMA {vma.start:#x}-{vma.end:#x}: vm_ops must be one of {VM_OPS}, not {vma.vm_ops!r}")
            end = vma.end
        if entries and len(self.vpns):
            used = np.zeros(self.entries.shape, dtype=bool)
            for vma in self.vmas:
                first, last = self.rows(vma.start, vma.end)
                pages = self.vpns[first:last, None] + np.arange(ptrs)
                used[first:last] |= (pages >= vma.start >> shift) & (pages < vma.end >> shift)
            stray = (self.entries != self.layout.none_value) & ~used
            if stray.any():
                row, idx = np.argwhere(stray)[0]
                raise StateError(f"an entry at {(int(self.vpns[row]) + int(idx)) << shift:#x} lies outside every VMA")

    def __repr__(self) -> str:
        return f"<Mm {self.name or self.mm_id}: {len(self.vmas)} VMAs, {len(self.vpns)} page tables>"


@dataclass(slots=True)
class Allocations:
    """Points of a fork where the kernel allocates memory, counted in its order.

    Attributes
    ----------
    fail_at : int, optional
        Let the allocation of that number fail, counted from 0. None: none fails.
    made : int
        Allocations made so far.
    """

    fail_at: int | None = None
    made: int = 0

    @property
    def left(self) -> int:
        """How many may still be made before one fails; a large number where none will."""
        return NEVER_FAILS if self.fail_at is None else self.fail_at - self.made

    def allocate(self) -> bool:
        """Make one; False if it fails."""
        if self.left == 0:
            return False
        self.made += 1
        return True


NEVER_FAILS = 1 << 62


@lru_cache(maxsize=64)
def swap_types(semantics: KernelSemantics) -> dict[int, str]:
    """Number the special swap types of a kernel; lower numbers are real swap areas (`ptebatch.arch.swap_types`).

    >>> from ptebatch.semantics import V6_12, V6_18
    >>> swap_types(V6_18)[31], swap_types(V6_18)[25], swap_types(V6_12)[25]
    ('marker', 'migration read', 'migration read-exclusive')
    """
    config = semantics.config
    device = (3 if semantics.single_device_exclusive else 4) if config.device_private else 0
    return arch.swap_types(hwpoison=config.memory_failure, migration=config.migration, device=device)


@dataclass(frozen=True)
class ForkContext:
    """What stays the same while fork copies one VMA.

    Attributes
    ----------
    layout : PteLayout
        Configured for the semantics (`PteLayout.configured`).
    semantics : KernelSemantics
    folios : FolioTable
    src_vma, dst_vma : Vma
        The parent's and the child's.
    batching : bool
        False: one entry at a time.
    has_pinned : bool
        MMF_HAS_PINNED of the parent.
    dst_mm_id : int
        The child's, for MM-ID slots.
    pfn_without_page : {"error", "as_kernel"}
    src_mm_id : int
        The parent's; only kernels before v6.15 that restore device-exclusive entries need it.
    allocations : Allocations, optional
        Counts what is allocated, and lets one allocation fail.
    has_first_table : bool
        The child has its page table for the start of the range already, from the VMA before.
    marks : numpy.ndarray, optional
        uint64[threads, n], from `ptebatch.batch.check_range`: how several threads may share the page tables of the VMA.
        The reference has no use for them.
    """

    layout: PteLayout
    semantics: KernelSemantics
    folios: FolioTable
    src_vma: Vma
    dst_vma: Vma
    batching: bool
    has_pinned: bool
    dst_mm_id: int
    pfn_without_page: PFN_WITHOUT_PAGE = "error"
    src_mm_id: int = 0
    allocations: Allocations | None = None
    has_first_table: bool = False
    marks: U64 | None = None


class WalkStats:
    """Base of the dataclasses that hold the counts of one walk: ints, and ``batch_hist``."""

    batch_hist: I64

    def to_dict(self) -> dict[str, Any]:
        """All counters as plain ints; ``batch_hist`` as {nr: batches}, zeros left out."""
        counters = {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}
        counters["batch_hist"] = {str(nr): int(self.batch_hist[nr]) for nr in np.flatnonzero(self.batch_hist)}
        return counters

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def new_stats(layout: PteLayout) -> I64:
    """Zeroed counters: int64[len(STAT_FIELDS) + ptrs_per_pte + 1]; the tail is the batch histogram by nr."""
    return np.zeros(len(STAT_FIELDS) + layout.ptrs_per_pte + 1, dtype=np.int64)


@dataclass(frozen=True)
class ZapContext:
    """What stays the same while one VMA is unmapped from.

    Attributes
    ----------
    layout : PteLayout
        Configured for the semantics (`PteLayout.configured`).
    semantics : KernelSemantics
    folios : FolioTable
    vma : Vma
    batching : bool
        False: one entry at a time.
    mm_id : int
        Of the address space, for MM-ID slots.
    even_cows : bool
        Take anonymous pages too; False is what truncating the file under a private mapping does.
    drop_markers : bool
        Take PTE markers too, as munmap and exit do; False keeps guards and leaves uffd-wp markers in file mappings.
    pfn_without_page : {"error", "as_kernel"}
    """

    layout: PteLayout
    semantics: KernelSemantics
    folios: FolioTable
    vma: Vma
    batching: bool
    mm_id: int
    even_cows: bool = True
    drop_markers: bool = False
    pfn_without_page: PFN_WITHOUT_PAGE = "error"


def new_zap_stats(layout: PteLayout) -> I64:
    """Zeroed counters of a zap: int64[len(ZAP_STAT_FIELDS) + ptrs_per_pte + 1]; the tail is the batch histogram."""
    return np.zeros(len(ZAP_STAT_FIELDS) + layout.ptrs_per_pte + 1, dtype=np.int64)


def pte_pfns(layout: PteLayout, entries: U64) -> tuple[npt.NDArray[np.bool_], U64]:
    """Which entries are present, and the PFN of each (meaningless where not present), vectorised."""
    u = np.uint64
    present = entries & u(layout.present_mask) != 0
    if layout.present_need:
        present &= entries & u(layout.present_need) == u(layout.present_need)
    value = np.where(entries & u(layout.plain) != 0, entries, ~entries)
    return present, (value & u(layout.pfn_mask)) >> u(layout.pfn_shift)


def stepped(step: arch.Step, entries: U64) -> U64:
    """Apply one of a layout's steps to every entry."""
    clear, bits, mask, value, then_clear, then_set = (np.uint64(number) for number in step)
    out = entries & ~clear | bits
    if not then_clear | then_set:
        return out
    return np.where(entries & mask == value, out & ~then_clear | then_set, out)


def without_young_dirty(layout: PteLayout, entries: U64) -> U64:
    """``pte_mkold(pte_mkclean())`` of every entry."""
    return stepped(layout.mkold, stepped(layout.mkclean, entries))


def ptes_dirty(layout: PteLayout, entries: U64) -> npt.NDArray[np.bool_]:
    """``pte_dirty()`` of every entry."""
    u = np.uint64
    return (entries & u(layout.dirty | layout.saved_dirty) != 0) | (
        entries & u(layout.dirty_mask) == u(layout.dirty_value)
    )


def gathered(layout: PteLayout, tables: U64) -> U64:
    """Return whole page tables as ``ptep_get()`` reads them: folded blocks (arm64 contpte) alike in young and dirty."""
    if not layout.cont:
        return tables
    u = np.uint64
    blocks = tables.reshape(-1, layout.cont_ptes)
    folded = (blocks & u(layout.cont) != 0) & (blocks & u(layout.valid) != 0)
    dirty = folded & ptes_dirty(layout, blocks).any(axis=1, keepdims=True)
    young = folded & (blocks & u(layout.young) != 0).any(axis=1, keepdims=True)
    blocks = np.where(dirty, stepped(layout.mkdirty, blocks), blocks)
    return np.where(young, stepped(layout.mkyoung, blocks), blocks).reshape(tables.shape)


def runs_alike(layout: PteLayout, tables: U64, size: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Find aligned runs of `size` valid entries that map consecutive, aligned pages of the same kind.

    Parameters
    ----------
    layout : PteLayout
    tables : ndarray of uint64, shape (n, ptrs_per_pte)
    size : int
        A power of two.

    Returns
    -------
    alike, same : ndarray of bool
        For each run, in order: whether its entries are alike but for young and dirty; whether also in these.
    """
    u = np.uint64
    runs = tables.reshape(-1, size)
    _, pfns = pte_pfns(layout, runs)
    first = pfns[:, :1]
    whole = (runs & u(layout.valid) != 0).all(axis=1) & (first[:, 0] % u(size) == 0)
    whole &= (runs & u(layout.special) == 0).all(axis=1) & pte_pfns(layout, runs)[0].all(axis=1)
    whole &= (pfns == first + np.arange(size, dtype=u)).all(axis=1)
    other = u(~(layout.pfn_mask | layout.cont) & arch.U64_MAX)
    plain = without_young_dirty(layout, runs) & other
    alike = whole & (plain == plain[:, :1]).all(axis=1)
    return alike, alike & (runs & other == (runs & other)[:, :1]).all(axis=1)


def fold(mm: Mm) -> int:
    """Fold blocks as arm64 contpte does where memory is mapped folio by folio; returns how many.

    A block is folded if its entries are alike but for young and dirty, which the hardware sets in any of them, and map
    aligned, consecutive pages of one folio.
    """
    layout = mm.layout
    if not layout.cont or not mm.entries.size:
        return 0
    blocks = mm.entries.reshape(-1, layout.cont_ptes)
    chosen = np.flatnonzero(runs_alike(layout, mm.entries, layout.cont_ptes)[0])
    index = mm.folios.lookup(pte_pfns(layout, blocks[chosen, 0])[1].astype(np.int64))
    orders = mm.folios._words[index] >> np.uint64(f.ORDER_SHIFT) & np.uint64((1 << f.ORDER_BITS) - 1)
    chosen = chosen[(index >= 0) & (np.int64(1) << orders.astype(np.int64) >= layout.cont_ptes)]
    blocks[chosen] |= np.uint64(layout.cont)
    return len(chosen)


def swap_keys(layout: PteLayout, entries: U64, semantics: KernelSemantics) -> U64:
    """Find the swap slots (`ptebatch.swap.swap_key`) that entries refer to, in their order; vectorised."""
    u = np.uint64
    none = (entries & u(~layout.none_ignore & arch.U64_MAX)) == u(layout.none_value)
    swapped = entries[~none & ~pte_pfns(layout, entries)[0]]
    types = swapped >> u(layout.swp_type_shift) & u((1 << layout.swp_type_bits) - 1)
    offsets = (~swapped if layout.swp_offset_inverted else swapped) >> u(layout.swp_offset_shift)
    keys = types << u(KEY_TYPE_SHIFT) | offsets & u((1 << layout.swp_offset_bits) - 1)
    return keys[types < u(min(swap_types(semantics)))]


def account(mm: Mm, *, anon_exclusive: bool | None = None, semantics: KernelSemantics = LATEST) -> None:
    """Count every present entry and every swap entry of a new address space into its FolioTable and its rss.

    Of the page tables, that is: leaves above them and entries of other kinds are the caller's to count.

    Parameters
    ----------
    mm : Mm
        Entries written, nothing counted yet.
    anon_exclusive : bool, optional
        Mark anonymous pages PG_anon_exclusive: all or none; None marks those mapped by a private VMA that may write.
    semantics : KernelSemantics
        Says which swap types are real swap areas.

    Raises
    ------
    PfnError
        A present entry, not special, without a page.
    """
    layout, folios = mm.layout, mm.folios
    for vma in mm.vmas:
        entries = mm.entries_of(vma.start, vma.end)
        slots = swap_keys(layout, entries, semantics)
        folios.swap.add(slots)
        mm.rss[MM_SWAPENTS] += len(slots)
        present, pfns = pte_pfns(layout, entries)
        normal = pfns[present & ((entries & np.uint64(layout.special)) == 0)].astype(np.int64)
        if not len(normal):
            continue
        private = arch.is_cow_mapping(vma.vm_flags)
        exclusive = private if anon_exclusive is None else anon_exclusive
        anon = folios.flags(normal, "anon")
        folios.map_ptes(normal, mm_id=mm.mm_id, anon_exclusive=anon & exclusive)
        swapbacked = folios.flags(normal, "swapbacked")
        mm.rss[MM_ANONPAGES] += int(anon.sum())
        mm.rss[MM_SHMEMPAGES] += int((swapbacked & ~anon).sum())
        mm.rss[MM_FILEPAGES] += int((~swapbacked & ~anon).sum())


def copy_state(mm: Mm) -> Mm:
    """A deep copy with a FolioTable of its own, for comparing before and after."""
    return Mm(
        mm.layout,
        mm.folios.copy(),
        vmas=[Vma(**{name: getattr(vma, name) for name in Vma.__slots__}) for vma in mm.vmas],
        vpns=mm.vpns.copy(),
        entries=memory.copy(mm.entries),
        pmd_vpns=mm.pmd_vpns.copy(),
        pmd_entries=mm.pmd_entries.copy(),
        rss=mm.rss.copy(),
        has_pinned=mm.has_pinned,
        mm_id=mm.mm_id,
        name=mm.name,
        huge_zero=mm.huge_zero,
        hugetlb_usage=mm.hugetlb_usage,
    )


def digest(mms: Sequence[Mm], folios: FolioTable, semantics: KernelSemantics) -> str:
    """BLAKE2b over the logical state of address spaces and their memmap, as 64 hex digits.

    Covers, for each Mm in the order given, its non-none entries as sorted (vpn, entry) pairs of both pools, its rss
    and hugetlb usage; for each page (PFN, mapcount, anon-exclusive); for each folio its counters and whether it is
    dirty; the counts of swap slots. Counters a kernel version does not keep (large mapcount, MM-ID slots) are left out
    under it. Storage (rows, sections, capacity) does not matter.
    """
    hasher = hashlib.blake2b(digest_size=32)

    def update(*arrays: npt.NDArray[np.generic]) -> None:
        for array in arrays:
            hasher.update(len(array).to_bytes(8, "little"))
            hasher.update(np.ascontiguousarray(array).astype("<u8", copy=False).tobytes())

    for mm in mms:
        row, idx = np.nonzero(mm.entries != np.uint64(mm.layout.none_value))
        update(mm.vpns[row] + idx, mm.entries[row, idx], mm.pmd_vpns, mm.pmd_entries, mm.rss)
        update(np.array([mm.hugetlb_usage, mm.huge_zero], dtype=np.int64))
    table = folios.pages_table()
    words, pfns, aux = table["word"], table["pfn"], table["aux"]
    pages = words & np.uint64(f.MAX_MAPCOUNT | 1 << f.AE_BIT | 1 << f.HWPOISON_BIT)
    if semantics.config.no_page_mapcount:
        small = words >> np.uint64(f.ORDER_SHIFT) & np.uint64((1 << f.ORDER_BITS) - 1) == 0
        pages = np.where(small, pages, pages & ~np.uint64(f.MAX_MAPCOUNT))
    update(pfns, pages)
    order = words >> np.uint64(f.ORDER_SHIFT) & np.uint64((1 << f.ORDER_BITS) - 1)
    offset = pfns.astype(np.uint64) & ((np.uint64(1) << order) - np.uint64(1))
    head = offset == 0
    state = words >> np.uint64(f.COUNTER_SHIFT) & ~np.uint64(1 << (f.AE_BIT - f.COUNTER_SHIFT))
    state &= ~np.uint64(1 << (f.HWPOISON_BIT - f.COUNTER_SHIFT))
    update(pfns[head], state[head], table["pincount"][head])
    counter = words >> np.uint64(f.COUNTER_SHIFT) & np.uint64(f.MAX_COUNTER)
    if semantics.large_mapcount:
        update(counter[offset == 1])
    update(counter[offset == 2])
    update(aux[head] & np.uint64(1 << f.AUX_DIRTY_BIT))
    if semantics.mm_id:
        slots = (offset < 2) & (order > 0)
        update(aux[slots] & np.uint64(1 << f.AUX_SHARED_BIT | (1 << f.AUX_COUNT_BITS + f.AUX_ID_BITS) - 1))
    update(*folios.swap.table())
    return hasher.hexdigest()
