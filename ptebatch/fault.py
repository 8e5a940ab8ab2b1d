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
from ptebatch.checks import as_int, check_int, check_range_bounds
from ptebatch.errors import AccessError, ArgumentError, PfnError, UnsupportedEntryError
from ptebatch.folio import Folio
from ptebatch.impls import resolve_impl
from ptebatch.mm import MM_ANONPAGES, Mm, Vma, ZapContext, configured, new_zap_stats, vm_page_prot
from ptebatch.pmd import check_leaves, is_hugetlb, pmd_pfn, split_huge_pmd
from ptebatch.semantics import LATEST, KernelSemantics

ZERO_PFN = 0
"""PFN of the zero page where ``FolioTable.zero_pfn`` does not say: no page `FolioTable.alloc` hands out."""

Access = Literal["read", "write", "unshare"]
Action = Literal["hardware", "zero_page", "anon_page", "reuse", "copy", "nothing", "userfaultfd"]


@dataclass(frozen=True, slots=True)
class TouchResult:
    """What one access led to.

    Attributes
    ----------
    action : str
        ``hardware``: no fault, at most accessed and dirty bits were set. ``zero_page``: an empty entry maps the zero
        page now, or a PMD the huge one. ``anon_page``: a new folio is mapped. ``reuse``: the entry became writable (to
        unshare: the page exclusive). ``copy``: the page was replaced by a new one. ``nothing``: there was nothing to
        unshare. ``userfaultfd``: somebody else is asked, nothing changed.
    pfn : int
        What the address maps now; -1 where it maps nothing.
    nr : int
        Pages whose entries were set, those of a PMD leaf included.
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
        Orders of anonymous folios that the kernel may use in this VMA, beside 0: 2 and more, up to that of a PMD
        (``/sys/kernel/mm/transparent_hugepage/hugepages-*kB``; before v6.8 there was the last one only). A PMD is
        filled by a read too: with the huge zero page, if ``FolioTable.huge_zero_pfn`` says where it is.
    uffd_wp_async : bool
        The userfaultfd write-protects asynchronously (v6.7+): its bit is cleared and nobody is asked.
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
        Hugetlb, a PMD leaf or an empty entry of a file mapping, a swap-type entry, NUMA hinting.
    PfnError, StateError
        A PFN without a page; counts that are lower than the mappings there are.
    ArgumentError
        A bad argument.

    Notes
    -----
    ``handle_pte_fault()``, ``do_anonymous_page()`` and ``do_wp_page()``, mm/memory.c, ``do_huge_pmd_wp_page()``,
    mm/huge_memory.c, v6.6 to v6.19.
    """
    if mm.layout.arch != arch.X86_64.arch:
        raise ArgumentError(f"{mm.layout.name}: what touching memory does is modelled for x86-64 only")
    layout = configured(mm.layout, semantics)
    if access not in ("read", "write", "unshare"):
        raise ArgumentError(f"access={access!r}: choose 'read', 'write' or 'unshare'")
    addr = as_int("addr", addr) & -layout.page_size
    allowed = _check_orders(layout, orders)
    zap = resolve_impl(impl)
    check_range_bounds(mm, addr, addr)
    mm.validate()
    vma = _accessed_vma(mm, addr, access)
    if is_hugetlb(vma):
        raise UnsupportedEntryError(address=addr, kind="hugetlb mapping")
    fault = _Fault(mm, vma, addr, access, layout, semantics, zap, uffd_wp_async)
    result = _huge_pmd(fault, allowed)
    return _pte(fault, allowed) if result is None else result


def _pte(fault: _Fault, orders: list[int]) -> TouchResult:
    """An access where no leaf lies above the page table (``handle_pte_fault()``)."""
    mm, layout, addr = fault.mm, fault.layout, fault.addr
    pte = mm.pte(addr)
    if arch.pte_none(layout, pte):
        return _do_anonymous_page(fault, orders)
    if not arch.pte_present(layout, pte):
        return _do_nonpresent(fault, pte)
    if arch.pte_protnone(layout, pte):
        raise UnsupportedEntryError(address=addr, kind="NUMA hinting entry")
    if fault.by_hardware(pte):
        mm.set_pte(addr, fault.accessed(pte))
        return TouchResult("hardware", arch.pte_pfn(layout, pte))
    return _do_wp_page(fault, pte)


@dataclass(frozen=True, slots=True)
class _Fault:
    mm: Mm
    vma: Vma
    addr: int
    access: Access
    layout: PteLayout
    semantics: KernelSemantics
    zap: Any
    uffd_wp_async: bool

    @property
    def write(self) -> bool:
        return self.access == "write"

    @property
    def prot(self) -> int:
        return vm_page_prot(self.layout, self.vma)

    def by_hardware(self, entry: int) -> bool:
        """Whether a present entry, of either level, allows the access as it is."""
        return self.access == "read" or (self.write and arch.pte_write(self.layout, entry))

    def accessed(self, entry: int) -> int:
        """The entry as the hardware leaves it, which knows nothing of soft-dirty: a tracked write faults first."""
        entry = arch.pte_mkyoung(self.layout, entry)
        return entry | self.layout.dirty if self.write else entry

    def asks_userfaultfd(self, entry: int) -> bool:
        watched = self.vma.vm_flags & arch.VM_UFFD_WP and arch.pte_uffd_wp(self.layout, entry)
        return bool(self.write and watched)

    def maybe_mkwrite(self, pte: int) -> int:
        return arch.pte_mkwrite(self.layout, pte, self.vma.vm_flags) if self.vma.vm_flags & arch.VM_WRITE else pte


def _check_orders(layout: PteLayout, orders: Iterable[int]) -> list[int]:
    """Highest first."""
    most = _pmd_order(layout)
    return sorted({check_int("orders", order, 2, most) for order in orders}, reverse=True)


def _pmd_order(layout: PteLayout) -> int:
    return layout.ptrs_per_pte.bit_length() - 1


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


def _do_anonymous_page(fault: _Fault, orders: list[int]) -> TouchResult:
    """Fill an empty entry: the zero page for a read, a new folio of the highest order that fits for a write."""
    mm, vma, layout = fault.mm, fault.vma, fault.layout
    if vma.vm_ops is not None or vma.vm_flags & arch.VM_SHARED:
        raise UnsupportedEntryError(address=fault.addr, kind="empty entry of a file or shared mapping")
    if vma.vm_flags & arch.VM_UFFD_MISSING:
        return TouchResult("userfaultfd", -1, 0)
    mm.add_tables(fault.addr, fault.addr + layout.page_size)
    if not fault.write:
        zero_pfn = ZERO_PFN if mm.folios.zero_pfn is None else mm.folios.zero_pfn
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
        if order == _pmd_order(fault.layout):
            continue
        size = fault.layout.page_size << order
        start = fault.addr & -size
        if fault.vma.start <= start and start + size <= fault.vma.end:
            entries = fault.mm.ptes(start, start + size).tolist()
            if all(arch.pte_none(fault.layout, pte) for pte in entries):
                return order, start
    return 0, fault.addr


def _huge_pmd(fault: _Fault, orders: list[int]) -> TouchResult | None:
    """An access that a PMD leaf answers, or that makes one; None where it is for a page table to answer.

    ``create_huge_pmd()`` and ``do_huge_pmd_wp_page()``. What cannot be written in place is split in this mm alone.
    """
    mm, vma, layout = fault.mm, fault.vma, fault.layout
    nr = layout.ptrs_per_pte
    vpn = fault.addr >> layout.page_shift & -nr
    start, end = vpn << layout.page_shift, (vpn + nr) << layout.page_shift
    at = int(np.searchsorted(mm.pmd_vpns, vpn))
    if at == len(mm.pmd_vpns) or int(mm.pmd_vpns[at]) != vpn or arch.pte_none(layout, int(mm.pmd_entries[at])):
        empty = mm.rows(start, end)[0] == mm.rows(start, end)[1]
        unfit = vma.vm_ops is not None or vma.vm_flags & (arch.VM_SHARED | arch.VM_NOHUGEPAGE | arch.VM_UFFD_MISSING)
        unfit = unfit or vma.vm_flags & (arch.VM_UFFD_WP | arch.VM_UFFD_MINOR)
        if not empty or unfit or _pmd_order(layout) not in orders or start < vma.start or vma.end < end:
            return None
        zero_pfn = mm.folios.huge_zero_pfn
        if not fault.write and zero_pfn is not None:
            mm.huge_zero = True
            return _set_pmd(fault, vpn, arch.mk_pte(layout, zero_pfn, fault.prot) | layout.huge, "zero_page")
        return _map_anon_pmd(fault, vpn, "anon_page")
    if vma.vm_ops is not None:
        raise UnsupportedEntryError(address=start, kind="PMD leaf of a file mapping")
    pmd = int(mm.pmd_entries[at])
    if not arch.pte_present(layout, pmd):
        raise UnsupportedEntryError(address=start, kind=f"PMD {arch.decode(layout, pmd)['kind']} entry")
    check_leaves(mm, vma, fault.semantics)
    if fault.by_hardware(pmd):
        return _set_pmd(fault, vpn, fault.accessed(pmd), "hardware")
    if fault.asks_userfaultfd(pmd):
        if not fault.uffd_wp_async:
            return TouchResult("userfaultfd", _page_of(fault, pmd), 0)
        pmd = arch.pte_clear_uffd_wp(layout, pmd)
        mm.pmd_entries[at] = pmd
    if pmd_pfn(layout, pmd) == mm.folios.huge_zero_pfn:
        if fault.write and fault.semantics.huge_zero_wp:
            return _map_anon_pmd(fault, vpn, "copy")
    else:
        head = mm.folios.page(pmd_pfn(layout, pmd))
        if head.anon_exclusive and not fault.write:
            return TouchResult("nothing", _page_of(fault, pmd), 0)
        if head.anon_exclusive or head.folio.refcount == 1:
            head.anon_exclusive = True
            if fault.write:
                pmd = fault.maybe_mkwrite(arch.pte_mkdirty(layout, arch.pte_mkyoung(layout, pmd)))
            return _set_pmd(fault, vpn, pmd, "reuse")
    split_huge_pmd(mm, start, semantics=fault.semantics)
    return None


def _page_of(fault: _Fault, pmd: int) -> int:
    """PFN of the page at the address, of those a PMD leaf maps."""
    inside = fault.addr >> fault.layout.page_shift & fault.layout.ptrs_per_pte - 1
    return pmd_pfn(fault.layout, pmd) + inside


def _set_pmd(fault: _Fault, vpn: int, pmd: int, action: Action) -> TouchResult:
    mm, at = fault.mm, int(np.searchsorted(fault.mm.pmd_vpns, vpn))
    if at == len(mm.pmd_vpns) or int(mm.pmd_vpns[at]) != vpn:
        mm.pmd_vpns, mm.pmd_entries = np.insert(mm.pmd_vpns, at, vpn), np.insert(mm.pmd_entries, at, np.uint64(0))
    mm.pmd_entries[at] = pmd
    return TouchResult(action, _page_of(fault, pmd), fault.layout.ptrs_per_pte)


def _map_anon_pmd(fault: _Fault, vpn: int, action: Action) -> TouchResult:
    """Map a new huge page, exclusive and dirty (``map_anon_folio_pmd()``, mm/huge_memory.c)."""
    mm, layout = fault.mm, fault.layout
    folio = mm.folios.folio(mm.folios.alloc(_pmd_order(layout)))
    folio.refcount = folio.entire_mapcount = folio.large_mapcount = 1
    folio.add_mm_mapping(mm.mm_id, 1)
    mm.folios.page(folio.pfn).anon_exclusive = True
    mm.rss[MM_ANONPAGES] += folio.nr_pages
    fault.vma.anon_vma = True
    pmd = arch.mk_pte(layout, folio.pfn, fault.prot) | layout.huge
    return _set_pmd(fault, vpn, fault.maybe_mkwrite(arch.pte_mkdirty(layout, pmd)), action)


def _do_wp_page(fault: _Fault, pte: int) -> TouchResult:
    """A write to (or the unsharing of) a page that is mapped read-only: ``do_wp_page()``, mm/memory.c."""
    mm, vma, layout = fault.mm, fault.vma, fault.layout
    pfn = arch.pte_pfn(layout, pte)
    if fault.asks_userfaultfd(pte):
        if not fault.uffd_wp_async:
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
