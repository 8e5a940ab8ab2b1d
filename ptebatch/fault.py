"""Touching memory after a fork: fault-in of anonymous memory, and write faults that reuse or copy a page.

`touch` is one access by a process: what the hardware does by itself (accessed and dirty bits), or the page fault it
takes. One entry is handled per fault, as in the kernel: after a fork every page of a large folio faults once. There is
one implementation, in plain Python; mappings that are replaced go through the zap of `impl`.

Not modelled: the swap cache, stray references (a page on a per-CPU list, a reader of /proc), through which the kernel
may copy where `touch` reuses, never the other way round; file-backed fault-in; ``page_mkwrite`` hooks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ptebatch import arch
from ptebatch.arch import PteLayout
from ptebatch.checks import as_int, check_int, check_range_bounds, refuse_large_leaves
from ptebatch.errors import AccessError, ArgumentError, PfnError, UnsupportedEntryError
from ptebatch.folio import MAX_PFN, Folio
from ptebatch.impls import resolve_impl
from ptebatch.mm import MM_ANONPAGES, Mm, Vma, ZapContext, new_zap_stats
from ptebatch.semantics import LATEST, KernelSemantics

ZERO_PFN = 0
"""PFN of the zero page unless said otherwise: no page of a `FolioTable` that `FolioTable.alloc` hands out."""

Access = Literal["read", "write", "unshare"]
Action = Literal["hardware", "zero_page", "anon_page", "reuse", "copy", "nothing", "userfaultfd"]


@dataclass(frozen=True, slots=True)
class TouchResult:
    """What one access led to.

    Attributes
    ----------
    action : str
        ``hardware``: no fault, at most accessed and dirty bits were set. ``zero_page``: an empty entry maps the zero
        page now. ``anon_page``: a new folio is mapped. ``reuse``: the entry became writable (to unshare: the page
        exclusive). ``copy``: the page was replaced by a new one. ``nothing``: there was nothing to unshare.
        ``userfaultfd``: somebody else is asked, nothing changed.
    pfn : int
        What the address maps now; -1 where it maps nothing.
    nr : int
        Entries that were set.
    """

    action: Action
    pfn: int
    nr: int = 1

    @property
    def faulted(self) -> bool:
        """Whether the kernel was entered; a minor fault."""
        return self.action != "hardware"


def touch(
    mm: Mm,
    addr: int,
    access: Access = "read",
    *,
    semantics: KernelSemantics = LATEST,
    orders: Iterable[int] = (),
    uffd_wp_async: bool = False,
    zero_pfn: int = ZERO_PFN,
    impl: str = "core",
) -> TouchResult:
    """Access one address.

    Parameters
    ----------
    mm : Mm
        Its entries, rss, page tables and folios are written.
    addr : int
        Byte address, anywhere in a page.
    access : {"read", "write", "unshare"}
        ``unshare`` is what a read-only long-term pin of a possibly shared page asks for (FAULT_FLAG_UNSHARE).
    semantics : KernelSemantics
        ``large_reuse`` decides whether pages of large folios are reused.
    orders : iterable of int
        Orders of anonymous folios that the kernel may use in this VMA, beside 0: 2 and more, smaller than a page
        table (v6.8+, ``/sys/kernel/mm/transparent_hugepage/hugepages-*kB``; empty before).
    uffd_wp_async : bool
        The userfaultfd write-protects asynchronously (v6.7+): its bit is cleared and nobody is asked.
    zero_pfn : int
        PFN of the zero page.
    impl : {"core", "reference"}
        By whose zap a page is unmapped that is copied.

    Returns
    -------
    TouchResult

    Raises
    ------
    AccessError
        The process would get a signal instead (SIGSEGV, SIGBUS).
    UnsupportedEntryError
        A PMD leaf, hugetlb, an empty entry of a file mapping, a swap-type entry, NUMA hinting.
    PfnError, StateError
        A PFN without a page; counts that are lower than the mappings there are.
    ArgumentError
        A bad argument.

    Notes
    -----
    ``handle_pte_fault()``, ``do_anonymous_page()`` and ``do_wp_page()``, mm/memory.c, v6.6 to v6.19.
    """
    layout = mm.layout.configured(semantics.config.mem_soft_dirty, semantics.config.x86_shstk)
    if access not in ("read", "write", "unshare"):
        raise ArgumentError(f"access={access!r}: choose 'read', 'write' or 'unshare'")
    addr = as_int("addr", addr) & -layout.page_size
    allowed = _check_orders(layout, orders)
    check_int("zero_pfn", zero_pfn, 0, MAX_PFN)
    zap = resolve_impl(impl)
    check_range_bounds(mm, addr, addr)
    mm.validate()
    vma = _accessed_vma(mm, addr, access)
    refuse_large_leaves(mm, Vma(addr, addr + layout.page_size, vma.vm_flags, vm_ops=vma.vm_ops))
    fault = _Fault(mm, vma, addr, access, layout, semantics, zap)
    pte = mm.pte(addr)
    if arch.pte_none(layout, pte):
        return _do_anonymous_page(fault, allowed, zero_pfn)
    if not arch.pte_present(layout, pte):
        return _do_nonpresent(fault, pte)
    if arch.pte_protnone(layout, pte):
        raise UnsupportedEntryError(address=addr, kind="NUMA hinting entry")
    if access == "read" or (access == "write" and arch.pte_write(layout, pte)):
        # The hardware knows nothing of soft-dirty: a write that is tracked faults first.
        new = arch.pte_mkyoung(layout, pte)
        new = new | layout.dirty if access == "write" else new
        mm.set_pte(addr, new)
        return TouchResult("hardware", arch.pte_pfn(layout, pte))
    return _do_wp_page(fault, pte, uffd_wp_async)


@dataclass(frozen=True, slots=True)
class _Fault:
    mm: Mm
    vma: Vma
    addr: int
    access: Access
    layout: PteLayout
    semantics: KernelSemantics
    zap: Any

    @property
    def write(self) -> bool:
        return self.access == "write"

    @property
    def prot(self) -> int:
        """vma->vm_page_prot."""
        prot = self.vma.vm_page_prot
        return arch.vm_get_page_prot(self.layout, self.vma.vm_flags) if prot is None else prot

    def maybe_mkwrite(self, pte: int) -> int:
        return arch.pte_mkwrite(self.layout, pte, self.vma.vm_flags) if self.vma.vm_flags & arch.VM_WRITE else pte


def _check_orders(layout: PteLayout, orders: Iterable[int]) -> list[int]:
    """Highest first."""
    most = layout.ptrs_per_pte.bit_length() - 2
    return sorted({check_int("orders", order, 2, most) for order in orders}, reverse=True)


def _accessed_vma(mm: Mm, addr: int, access: Access) -> Vma:
    vma = mm.vma_at(addr)
    if vma is None:
        raise AccessError(f"no VMA covers {addr:#x}: SIGSEGV", address=addr)
    needed = arch.VM_WRITE if access == "write" else arch.VM_READ | arch.VM_WRITE | arch.VM_EXEC
    if not vma.vm_flags & needed:
        raise AccessError(f"the VMA at {addr:#x} does not allow to {access}: SIGSEGV", address=addr)
    return vma


def _do_nonpresent(fault: _Fault, pte: int) -> TouchResult:
    """Signals of markers; everything else would have to be read from somewhere."""
    kind = str(arch.decode(fault.layout, pte)["kind"])
    if arch.swp_type(fault.layout, pte) == arch.SWP_PTE_MARKER:
        marker = arch.swp_offset(fault.layout, pte)
        if marker & arch.PTE_MARKER_POISONED:
            raise AccessError(f"{fault.addr:#x} is poisoned: SIGBUS", address=fault.addr, signal="SIGBUS")
        if marker & arch.PTE_MARKER_GUARD and fault.semantics.guard_markers:
            raise AccessError(f"{fault.addr:#x} is in a guard region: SIGSEGV", address=fault.addr)
    raise UnsupportedEntryError(address=fault.addr, kind=kind)


def _do_anonymous_page(fault: _Fault, orders: list[int], zero_pfn: int) -> TouchResult:
    """Fill an empty entry: the zero page for a read, a new folio of the highest order that fits for a write."""
    mm, vma, layout = fault.mm, fault.vma, fault.layout
    if vma.vm_ops is not None or vma.vm_flags & arch.VM_SHARED:
        raise UnsupportedEntryError(address=fault.addr, kind="empty entry of a file or shared mapping")
    if vma.vm_flags & arch.VM_UFFD_MISSING:
        return TouchResult("userfaultfd", -1, 0)
    mm.add_tables(fault.addr, fault.addr + layout.page_size)
    if not fault.write:
        mm.set_pte(fault.addr, arch.pte_mkspecial(layout, arch.mk_pte(layout, zero_pfn, fault.prot)))
        return TouchResult("zero_page", zero_pfn)
    vma.anon_vma = True
    if vma.vm_flags & (arch.VM_UFFD_WP | arch.VM_UFFD_MINOR | arch.VM_NOHUGEPAGE):
        orders = []
    order, start = _order_that_fits(fault, orders)
    pfn, nr = mm.folios.alloc(order), 1 << order
    mm.folios.map_ptes(np.arange(pfn, pfn + nr), mm_id=mm.mm_id, anon_exclusive=True)
    pte = arch.mk_pte(layout, pfn, fault.prot)
    if vma.vm_flags & arch.VM_WRITE:
        pte = fault.maybe_mkwrite(arch.pte_mkdirty(layout, pte))
    mm.fill(start, np.array([arch.pte_advance_pfn(layout, pte, k) for k in range(nr)], dtype=np.uint64))
    mm.rss[MM_ANONPAGES] += nr
    return TouchResult("anon_page", pfn + ((fault.addr - start) >> layout.page_shift), nr)


def _order_that_fits(fault: _Fault, orders: list[int]) -> tuple[int, int]:
    """The highest order whose aligned block around the address lies in the VMA and is empty, and its first address.

    ``alloc_anon_folio()``, mm/memory.c, v6.8+.
    """
    for order in orders:
        size = fault.layout.page_size << order
        start = fault.addr & -size
        if fault.vma.start <= start and start + size <= fault.vma.end:
            entries = fault.mm.ptes(start, start + size).tolist()
            if all(arch.pte_none(fault.layout, pte) for pte in entries):
                return order, start
    return 0, fault.addr


def _do_wp_page(fault: _Fault, pte: int, uffd_wp_async: bool) -> TouchResult:
    """A write to (or the unsharing of) a page that is mapped read-only: ``do_wp_page()``, mm/memory.c."""
    mm, vma, layout = fault.mm, fault.vma, fault.layout
    pfn = arch.pte_pfn(layout, pte)
    if fault.write and vma.vm_flags & arch.VM_UFFD_WP and arch.pte_uffd_wp(layout, pte):
        if not uffd_wp_async:
            return TouchResult("userfaultfd", pfn, 0)
        pte = arch.pte_clear_uffd_wp(layout, pte)
        mm.set_pte(fault.addr, pte)
    normal = not arch.pte_special(layout, pte)
    if normal and pfn not in mm.folios:
        raise PfnError(pfn=pfn, address=fault.addr)
    if vma.vm_flags & (arch.VM_SHARED | arch.VM_MAYSHARE):
        if not fault.write:
            return TouchResult("nothing", pfn, 0)
        if normal:
            mm.folios.folio(pfn).dirty = True
        return _reuse(fault, pte)
    if normal:
        page = mm.folios.page(pfn)
        folio = page.folio
        if folio.anon and page.anon_exclusive:
            return _reuse(fault, pte) if fault.write else TouchResult("nothing", pfn, 0)
        if folio.anon and can_reuse(folio, fault.semantics):
            page.anon_exclusive = True
            return _reuse(fault, pte)
    return _copy(fault, pte)


def can_reuse(folio: Folio, semantics: KernelSemantics) -> bool:
    """Whether a page of an anonymous folio that is not exclusive may be written in place by the mm that maps it.

    ``wp_can_reuse_anon_folio()``, mm/memory.c. A small folio must have this one reference. For a large one kernels
    differ: through v6.8 the same; then never; since v6.15, if the MM-ID slots know one owner and nothing else refers
    to it, but not for its last mapping, which is copied to free the rest.
    """
    if folio.ksm:
        return False
    if folio.order == 0 or semantics.large_reuse == "refcount":
        return folio.refcount == 1
    if semantics.large_reuse == "never":
        return False
    return not folio.maybe_mapped_shared and 1 < folio.large_mapcount == folio.refcount


def _reuse(fault: _Fault, pte: int) -> TouchResult:
    pfn = arch.pte_pfn(fault.layout, pte)
    if fault.write:
        pte = arch.pte_mkdirty(fault.layout, arch.pte_mkyoung(fault.layout, pte))
        fault.mm.set_pte(fault.addr, fault.maybe_mkwrite(pte))
    return TouchResult("reuse", pfn)


def _copy(fault: _Fault, pte: int) -> TouchResult:
    """Map a new page instead: of order 0 whatever was mapped before, and exclusive (``wp_page_copy()``)."""
    mm, layout = fault.mm, fault.layout
    pfn = arch.pte_pfn(layout, pte)
    if not arch.pte_special(layout, pte) and mm.folios.page(pfn).hwpoison:
        raise AccessError(f"the page at {fault.addr:#x} is poisoned: SIGBUS", address=fault.addr, signal="SIGBUS")
    new_pfn = mm.folios.alloc()
    new = arch.mk_pte(layout, new_pfn, fault.prot)
    if fault.write:
        new = fault.maybe_mkwrite(arch.pte_mkdirty(layout, new))
    else:
        # The page is read only: what was known of its contents stays known.
        if arch.pte_soft_dirty(layout, pte):
            new = arch.pte_mksoft_dirty(layout, new)
        if arch.pte_uffd_wp(layout, pte):
            new = arch.pte_mkuffd_wp(layout, new)
    try:
        _unmap(fault)
    except Exception:
        mm.folios.remove(new_pfn)
        raise
    mm.folios.map_ptes([new_pfn], mm_id=mm.mm_id, anon_exclusive=True)
    mm.rss[MM_ANONPAGES] += 1
    mm.set_pte(fault.addr, new)
    fault.vma.anon_vma = True
    return TouchResult("copy", new_pfn)


def _unmap(fault: _Fault) -> None:
    """Take the old mapping away, with its reference and its place in rss."""
    mm = fault.mm
    ctx = ZapContext(
        layout=fault.layout,
        semantics=fault.semantics,
        folios=mm.folios,
        vma=fault.vma,
        batching=False,
        mm_id=mm.mm_id,
        drop_markers=True,
    )
    row = mm.rows(fault.addr, fault.addr + fault.layout.page_size)[0]
    idx = (fault.addr >> fault.layout.page_shift) - int(mm.vpns[row])
    fault.zap.zap_present_ptes(ctx, mm.entries[row], idx, 1, mm.rss, new_zap_stats(fault.layout))
