"""Leaves above the page tables: PMD-mapped huge pages, and hugetlb.

Fork does too little to one of them to be worth compiling, so this is the one implementation, for every ``impl=``; what
it does is checked by golden vectors.

Leaves live in the second pool of an `ptebatch.mm.Mm` (``pmd_vpns``, ``pmd_entries``), the child's with a place for each
of the parent's. A hugetlb leaf is as large as the folio it maps. Page tables deposited with PMDs of anonymous memory
are counted, not stored; tables shared between processes (hugetlb) are not modelled.
"""

from __future__ import annotations

from errno import EAGAIN, ENOMEM

import numpy as np
import numpy.typing as npt

from ptebatch import arch
from ptebatch.arch import PteLayout
from ptebatch.errors import EHWPOISON, ArgumentError, PfnError, StateError, UnsupportedEntryError
from ptebatch.folio import MAX_COUNTER, MAX_MAPCOUNT, Folio
from ptebatch.mm import (
    MM_ANONPAGES,
    MM_FILEPAGES,
    MM_SHMEMPAGES,
    STAT,
    ForkContext,
    Mm,
    Vma,
    configured,
    swap_types,
    vm_page_prot,
)
from ptebatch.semantics import LATEST, KernelSemantics

__all__ = [
    "check_leaves",
    "copy_huge_pmd",
    "copy_hugetlb_page_range",
    "is_hugetlb",
    "leaf_end",
    "leaves",
    "pmd_pfn",
    "split_huge_pmd",
    "zap_huge_pmd",
    "zap_hugetlb",
]

I64 = npt.NDArray[np.int64]


def pmd_pfn(layout: PteLayout, pmd: int) -> int:
    """Return the PFN of the first page a present PMD maps (below it lie bits of other use, PAT on x86)."""
    return arch.pte_pfn(layout, pmd) & ~(layout.ptrs_per_pte - 1)


def leaves(mm: Mm, start: int, end: int) -> range:
    """Positions in ``pmd_vpns`` of the leaves that begin in bytes ``start..end``."""
    shift = mm.layout.page_shift
    first, last = mm.pmd_vpns.searchsorted([-(-start >> shift), -(-end >> shift)]).tolist()
    return range(first, last)


def is_hugetlb(vma: Vma) -> bool:
    """Tell whether a VMA is a hugetlb mapping."""
    return bool(vma.vm_flags & arch.VM_HUGETLB) or vma.vm_ops == "hugetlb"


def _kind(mm: Mm, types: dict[int, str], pmd: int) -> str:
    """Tell what a leaf is: ``none``, ``present``, ``special``, ``huge zero``, or a kind of swap-type entry."""
    layout = mm.layout
    if arch.pte_none(layout, pmd):
        return "none"
    if not arch.pte_present(layout, pmd):
        return types.get(arch.swp_type(layout, pmd), "swap")
    if pmd_pfn(layout, pmd) == mm.folios.huge_zero_pfn:
        return "huge zero"
    return "special" if arch.pte_special(layout, pmd) else "present"


def _nr_pages(mm: Mm, vma: Vma, types: dict[int, str], pmd: int) -> int:
    """Pages that a leaf maps; a hugetlb entry without a page is taken for the smallest."""
    if is_hugetlb(vma) and _kind(mm, types, pmd) in ("present", "special"):
        pfn = pmd_pfn(mm.layout, pmd)
        return mm.folios.folio(pfn).nr_pages if pfn in mm.folios else mm.layout.ptrs_per_pte
    return mm.layout.ptrs_per_pte


def leaf_end(mm: Mm, vma: Vma, at: int, semantics: KernelSemantics) -> int:
    """Byte address behind what a leaf maps."""
    nr = _nr_pages(mm, vma, swap_types(semantics), int(mm.pmd_entries[at]))
    return (int(mm.pmd_vpns[at]) + nr) << mm.layout.page_shift


def check_leaves(mm: Mm, vma: Vma, semantics: KernelSemantics) -> None:
    """Look for leaves of a VMA that cannot be copied; change nothing.

    Raises
    ------
    PfnError
        A present or migration leaf whose PFN has no page.
    StateError
        A leaf that reaches out of its VMA, has a page table beside it, or maps a folio of another kind or size.
    UnsupportedEntryError
        A PUD leaf, or a kind of entry that is never found at this level.
    """
    layout, types = mm.layout, swap_types(semantics)
    nr_pmd = layout.ptrs_per_pte
    hugetlb = is_hugetlb(vma)
    for at in leaves(mm, vma.start - (nr_pmd << layout.page_shift) + 1, vma.end):
        vpn, pmd = int(mm.pmd_vpns[at]), int(mm.pmd_entries[at])
        kind = _kind(mm, types, pmd)
        if kind == "none":
            continue
        addr = vpn << layout.page_shift
        end = addr + (_nr_pages(mm, vma, types, pmd) << layout.page_shift)
        if addr < vma.start or end > vma.end:
            raise StateError(f"the leaf at {addr:#x}-{end:#x} is not whole inside its VMA {vma.start:#x}-{vma.end:#x}")
        if mm.rows(addr, end)[0] != mm.rows(addr, end)[1]:
            raise StateError(f"at {addr:#x} there are both a leaf and a page table")
        special = kind == "huge zero" or (kind == "special" and (semantics.special_pmd or vma.vm_ops is not None))
        if not hugetlb and (special or (kind == "present" and vma.vm_ops is not None)):
            continue  # without a page of its own, or passed over
        if kind in ("present", "special"):
            _check_folio(mm, vma, pmd_pfn(layout, pmd), addr, hugetlb)
        elif kind.startswith("migration") or (kind in ("device read", "device write") and semantics.pmd_device_private):
            if hugetlb and not kind.startswith("migration"):
                raise UnsupportedEntryError(address=addr, kind=f"hugetlb {kind} entry")
            if not hugetlb:
                _check_folio(mm, vma, arch.swp_offset_pfn(layout, pmd), addr, hugetlb)
        elif not hugetlb or kind not in ("hwpoison", "marker"):
            raise UnsupportedEntryError(address=addr, kind=f"{'hugetlb' if hugetlb else 'PMD'} {kind} entry")


def _check_folio(mm: Mm, vma: Vma, pfn: int, addr: int, hugetlb: bool) -> None:
    if pfn not in mm.folios:
        raise PfnError(pfn=pfn, address=addr)
    folio = mm.folios.folio(pfn)
    if hugetlb:
        aligned = (addr >> mm.layout.page_shift) % folio.nr_pages == 0
        if not folio.hugetlb or folio.pfn != pfn or not aligned or folio.nr_pages < mm.layout.ptrs_per_pte:
            raise StateError(f"the hugetlb leaf at {addr:#x} does not map a whole, aligned hugetlb folio: PFN {pfn:#x}")
        return
    if folio.nr_pages > mm.layout.ptrs_per_pte:
        raise UnsupportedEntryError(address=addr, kind="PUD leaf")
    if folio.pfn != pfn or folio.nr_pages != mm.layout.ptrs_per_pte or not folio.anon:
        raise StateError(f"the PMD leaf at {addr:#x} does not map a whole anonymous folio of its size (PFN {pfn:#x})")


def _allocate(ctx: ForkContext) -> bool:
    return ctx.allocations is None or ctx.allocations.allocate()


def _migration_made_readable(ctx: ForkContext, types: dict[int, str], pmd: int, kind: str) -> int:
    """Return the entry of the readable kind in place of a writable or exclusive one, other bits kept."""
    if kind in ("migration read", "device read"):
        return pmd
    readable = f"{kind.split()[0]} read"
    number = next(number for number, name in types.items() if name == readable)
    new = arch.swp_entry(ctx.layout, number, arch.swp_offset(ctx.layout, pmd))
    if arch.pte_swp_soft_dirty(ctx.layout, pmd):
        new = arch.pte_swp_mksoft_dirty(ctx.layout, new)
    return arch.pte_swp_mkuffd_wp(ctx.layout, new) if arch.pte_swp_uffd_wp(ctx.layout, pmd) else new


def _maybe_pinned(ctx: ForkContext, folio: Folio) -> bool:
    # folio_needs_cow_for_dma(), include/linux/mm.h
    return ctx.has_pinned and not folio.device and folio.maybe_dma_pinned


def _check_room(folio: Folio, addr: int) -> None:
    if folio.refcount >= MAX_COUNTER or folio.entire_mapcount >= MAX_COUNTER or folio.large_mapcount >= MAX_COUNTER:
        raise StateError(f"PFN {folio.pfn:#x} at address {addr:#x}: a count of its folio has reached the limit")


def _dup_entire(ctx: ForkContext, folio: Folio, stats: I64) -> None:
    """Count one more mapping of the whole folio (``folio_try_dup_anon_rmap_pmd()``, ``hugetlb_add_file_rmap()``)."""
    head = ctx.folios.page(folio.pfn)
    if folio.anon:
        stats[STAT["anon_exclusive_cleared"]] += head.anon_exclusive
        head.anon_exclusive = False
    folio.entire_mapcount += 1
    if ctx.semantics.large_mapcount:
        folio.large_mapcount += 1
    if ctx.semantics.mm_id and not folio.hugetlb:
        folio.add_mm_mapping(ctx.dst_mm_id, 1)
    stats[STAT["folio_ref_add"]] += 1
    stats[STAT["rmap_dup"]] += 1


def copy_huge_pmd(ctx: ForkContext, dst_mm: Mm, src_mm: Mm, at: int, stats: I64) -> int:
    """Copy one PMD leaf, or split it in the parent because its folio may be pinned.

    Parameters
    ----------
    ctx : ForkContext
        Of the VMA the leaf is in; its folios are written.
    dst_mm : Mm
        The child; has a place for the leaf in its pool. Written, its rss too.
    src_mm : Mm
        The parent; written.
    at : int
        Position in ``src_mm.pmd_vpns``; `check_leaves` has accepted the leaf.
    stats : int64 array
        From `ptebatch.mm.new_stats`; added to.

    Returns
    -------
    int
        0: copied, or nothing to copy. -EAGAIN: split, a page table has to be copied instead. -ENOMEM.

    Notes
    -----
    ``copy_huge_pmd()``, mm/huge_memory.c, v6.6 to v6.19.
    """
    layout, types = ctx.layout, swap_types(ctx.semantics)
    nr, vpn, pmd = layout.ptrs_per_pte, int(src_mm.pmd_vpns[at]), int(src_mm.pmd_entries[at])
    uffd_wp = bool(ctx.dst_vma.vm_flags & arch.VM_UFFD_WP)
    kind = _kind(src_mm, types, pmd)
    to = int(np.searchsorted(dst_mm.pmd_vpns, vpn))

    if kind == "none":
        return 0
    if kind == "special" and ctx.semantics.special_pmd:
        dst_mm.pmd_entries[to] = arch.pte_mkold(layout, pmd)
        stats[STAT["pmds_copied"]] += 1
        return 0
    if ctx.dst_vma.vm_ops is not None:
        return 0  # the child's faults find it in the page cache
    if not _allocate(ctx):
        return -ENOMEM

    if kind.startswith(("migration", "device")):
        pmd = _migration_made_readable(ctx, types, pmd, kind)
        if kind.startswith("device"):
            folio = ctx.folios.folio(arch.swp_offset_pfn(layout, pmd))
            _check_room(folio, vpn << layout.page_shift)
            folio.refcount += 1
            _dup_entire(ctx, folio, stats)
        src_mm.pmd_entries[at] = pmd
        dst_mm.rss[MM_ANONPAGES] += nr
        child = pmd if uffd_wp else arch.pte_swp_clear_uffd_wp(layout, pmd)
    else:
        if kind == "huge zero":
            dst_mm.huge_zero = True
        else:
            folio = ctx.folios.folio(pmd_pfn(layout, pmd))
            if ctx.folios.page(folio.pfn).anon_exclusive and _maybe_pinned(ctx, folio):
                split_huge_pmd(src_mm, vpn << layout.page_shift, semantics=ctx.semantics)
                stats[STAT["pmds_split"]] += 1
                return -EAGAIN
            _check_room(folio, vpn << layout.page_shift)
            folio.refcount += 1
            _dup_entire(ctx, folio, stats)
            dst_mm.rss[MM_ANONPAGES] += nr
        child = pmd if uffd_wp else arch.pte_clear_uffd_wp(layout, pmd)
        src_mm.pmd_entries[at] = arch.pte_wrprotect(layout, pmd)
        child = arch.pte_mkold(layout, arch.pte_wrprotect(layout, child))
    dst_mm.pmd_entries[to] = child
    stats[STAT["pmds_copied"]] += 1
    stats[STAT["tables_deposited"]] += 1
    return 0


def split_huge_pmd(mm: Mm, addr: int, *, semantics: KernelSemantics = LATEST) -> None:
    """Map by a page table what a PMD leaf maps; the folio stays whole.

    The leaf of a file or shmem mapping is only taken away: faults bring its pages back one by one.

    Parameters
    ----------
    mm : Mm
        Its two pools and its folios are written; the pools' arrays are replaced.
    addr : int
        Byte address the leaf covers.
    semantics : KernelSemantics

    Raises
    ------
    ArgumentError
        No leaf covers the address.
    PfnError, StateError, UnsupportedEntryError
        As `check_leaves`; nothing is changed.

    Notes
    -----
    ``__split_huge_pmd()``, mm/huge_memory.c, v6.6 to v6.19, without ``freeze``.
    """
    layout = configured(mm.layout, semantics)
    nr = layout.ptrs_per_pte
    vpn = addr >> layout.page_shift & -nr
    addr = vpn << layout.page_shift
    at = int(np.searchsorted(mm.pmd_vpns, vpn))
    vma = mm.vma_at(addr)
    if vma is None or at == len(mm.pmd_vpns) or int(mm.pmd_vpns[at]) != vpn:
        raise ArgumentError(f"no PMD leaf covers {addr:#x}")
    types, pmd = swap_types(semantics), int(mm.pmd_entries[at])
    kind = _kind(mm, types, pmd)
    if kind == "none" or is_hugetlb(vma):
        raise ArgumentError(f"the leaf at {addr:#x} is {'empty' if kind == 'none' else 'one of hugetlb'}: not to split")
    check_leaves(mm, vma, semantics)

    if vma.vm_ops is not None:
        _zap_file_pmd(mm, pmd, kind, addr, semantics)
        _drop_leaf(mm, at)
        return
    if kind == "huge zero":
        if mm.folios.zero_pfn is None:
            raise StateError("splitting a huge zero page needs the PFN of the small one: set FolioTable.zero_pfn")
        pte = arch.pte_mkspecial(layout, arch.mk_pte(layout, mm.folios.zero_pfn, vm_page_prot(layout, vma)))
        pte = arch.pte_mkuffd_wp(layout, pte) if arch.pte_uffd_wp(layout, pmd) else pte
        values = np.full(nr, pte, dtype=np.uint64)
    elif kind in ("present", "special"):
        values = _ptes_of(mm, layout, vma, pmd, semantics)
    else:
        number, offset = arch.swp_type(layout, pmd), arch.swp_offset(layout, pmd)
        bits = pmd & (layout.swp_soft_dirty | layout.swp_uffd_wp)
        values = np.array([arch.swp_entry(layout, number, offset + k) | bits for k in range(nr)], dtype=np.uint64)
        if kind.startswith("device"):
            _map_by_ptes(mm, mm.folios.folio(arch.swp_offset_pfn(layout, pmd)), semantics)
    _drop_leaf(mm, at)
    mm.add_tables(addr, addr + (nr << layout.page_shift))
    mm.fill(addr, values)


def _drop_leaf(mm: Mm, at: int) -> None:
    mm.pmd_vpns, mm.pmd_entries = np.delete(mm.pmd_vpns, at), np.delete(mm.pmd_entries, at)


def _ptes_of(mm: Mm, layout: PteLayout, vma: Vma, pmd: int, semantics: KernelSemantics) -> npt.NDArray[np.uint64]:
    folio = mm.folios.folio(pmd_pfn(layout, pmd))
    _map_by_ptes(mm, folio, semantics)
    if arch.pte_dirty(layout, pmd):
        folio.dirty = True
    pte = arch.mk_pte(layout, folio.pfn, vm_page_prot(layout, vma))
    if arch.pte_write(layout, pmd):
        pte = arch.pte_mkwrite(layout, pte, vma.vm_flags)
    if not arch.pte_young(layout, pmd):
        pte = arch.pte_mkold(layout, pte)
    if arch.pte_dirty(layout, pmd):
        pte = arch.pte_mkdirty(layout, pte)
    if arch.pte_soft_dirty(layout, pmd):
        pte = arch.pte_mksoft_dirty(layout, pte)
    if arch.pte_uffd_wp(layout, pmd):
        pte = arch.pte_mkuffd_wp(layout, pte)
    values = [arch.pte_advance_pfn(layout, pte, k) for k in range(layout.ptrs_per_pte)]
    return np.array(values, dtype=np.uint64)


def _map_by_ptes(mm: Mm, folio: Folio, semantics: KernelSemantics) -> None:
    """Turn one mapping of the whole folio into one of each page, all exclusive if the first was."""
    pages = [mm.folios.page(pfn) for pfn in range(folio.pfn, folio.pfn + folio.nr_pages)]
    by_page = not semantics.config.no_page_mapcount
    nr = folio.nr_pages
    if not folio.entire_mapcount or not folio.refcount or (semantics.large_mapcount and not folio.large_mapcount):
        raise StateError(f"the folio at PFN {folio.pfn:#x} is mapped by a leaf, but its counts do not say so")
    room = folio.refcount + nr <= MAX_COUNTER and folio.large_mapcount + nr <= MAX_COUNTER
    if not room or (by_page and any(page.mapcount >= MAX_MAPCOUNT for page in pages)):
        raise StateError(f"a count of the folio at PFN {folio.pfn:#x} has reached the limit")
    exclusive = pages[0].anon_exclusive
    folio.refcount += nr - 1
    for page in pages:
        page.mapcount += by_page
        page.anon_exclusive |= exclusive
    folio.entire_mapcount -= 1
    if semantics.large_mapcount:
        folio.large_mapcount += nr
        if semantics.mm_id:
            folio.add_mm_mapping(mm.mm_id, nr)
        folio.large_mapcount -= 1
        if semantics.mm_id:
            folio.remove_mm_mapping(mm.mm_id, 1)


def _zap_file_pmd(mm: Mm, pmd: int, kind: str, addr: int, semantics: KernelSemantics) -> None:
    """Unmap the PMD leaf of a file or shmem mapping that is to be split."""
    if kind == "present" and arch.pte_dirty(mm.layout, pmd):
        _folio_of(mm, pmd, kind, addr).dirty = True
    _zap_leaf(mm, pmd, kind, addr, semantics)


def _folio_of(mm: Mm, leaf: int, kind: str, addr: int) -> Folio:
    pfn = pmd_pfn(mm.layout, leaf) if kind in ("present", "special") else arch.swp_offset_pfn(mm.layout, leaf)
    if pfn not in mm.folios:
        raise PfnError(pfn=pfn, address=addr)
    return mm.folios.folio(pfn)


def _zap_leaf(mm: Mm, leaf: int, kind: str, addr: int, semantics: KernelSemantics) -> bool:
    """Give back what a PMD leaf that is not empty counts; tell whether its folio was freed.

    PfnError or StateError before anything is changed.
    """
    vma = mm.vma_at(addr)
    special = kind == "special" and (semantics.special_pmd or (vma is not None and vma.vm_ops is not None))
    if kind == "huge zero" or special:
        return False
    folio = _folio_of(mm, leaf, kind, addr)
    counter = MM_ANONPAGES if folio.anon else MM_SHMEMPAGES if folio.swapbacked else MM_FILEPAGES
    # References and mappings of a migrating folio are the migration's own.
    freed = not kind.startswith("migration") and _remove_entire(mm, folio, semantics)
    mm.rss[counter] -= mm.layout.ptrs_per_pte
    return freed


def _remove_entire(mm: Mm, folio: Folio, semantics: KernelSemantics) -> bool:
    """Count one mapping of the whole folio and one reference less (``folio_remove_rmap_pmd()``, mm/rmap.c).

    Tell whether that was the last reference, and the folio is freed.
    """
    if not folio.entire_mapcount or not folio.refcount or (semantics.large_mapcount and not folio.large_mapcount):
        raise StateError(f"the folio at PFN {folio.pfn:#x} is mapped as a whole, but its counts do not say so")
    folio.entire_mapcount -= 1
    if semantics.large_mapcount:
        folio.large_mapcount -= 1
    if semantics.mm_id and not folio.hugetlb:
        folio.remove_mm_mapping(mm.mm_id, 1)
    folio.refcount -= 1
    if folio.refcount:
        return False
    mm.folios.remove(folio.pfn)
    return True


def zap_huge_pmd(mm: Mm, at: int, *, semantics: KernelSemantics = LATEST) -> tuple[bool, bool]:
    """Take a whole PMD leaf away; its place in the pool stays, empty.

    Parameters
    ----------
    mm : Mm
        Its rss and folios are written; a folio without references is freed.
    at : int
        Position in ``mm.pmd_vpns`` of a leaf that is not of hugetlb.
    semantics : KernelSemantics

    Returns
    -------
    deposited, freed : bool
        Whether a deposited page table was freed with it, as there is one in anonymous memory; whether its folio was.

    Raises
    ------
    PfnError, StateError
        A PFN without a page; counts that do not have the mapping. Nothing is changed.

    Notes
    -----
    ``zap_huge_pmd()``, mm/huge_memory.c, v6.6 to v6.19. A dirty entry does not make the folio of a file dirty here.
    """
    layout, pmd = mm.layout, int(mm.pmd_entries[at])
    addr = int(mm.pmd_vpns[at]) << layout.page_shift
    kind = _kind(mm, swap_types(semantics), pmd)
    if kind == "none":
        return False, False
    vma = mm.vma_at(addr)
    freed = _zap_leaf(mm, pmd, kind, addr, semantics)
    mm.pmd_entries[at] = layout.none_value
    anonymous = vma is not None and vma.vm_ops is None
    return anonymous and not (kind == "special" and semantics.special_pmd), freed


def zap_hugetlb(mm: Mm, at: int, *, drop_markers: bool, semantics: KernelSemantics = LATEST) -> tuple[bool, bool]:
    """Take a hugetlb leaf away; where userfaultfd had write-protected it, a marker stays unless markers are dropped.

    Parameters
    ----------
    mm : Mm
        Its ``hugetlb_usage`` and folios are written. A folio without references is free again; the pool it belongs to
        is not modelled.
    at : int
        Position in ``mm.pmd_vpns``.
    drop_markers : bool
        See `ptebatch.mm.ZapContext`.
    semantics : KernelSemantics

    Returns
    -------
    present, freed : bool
        Whether it was present; whether its folio was freed.

    Raises
    ------
    PfnError, StateError
        As `zap_huge_pmd`.

    Notes
    -----
    ``__unmap_hugepage_range()``, mm/hugetlb.c, v6.6 to v6.19.
    """
    layout, leaf = mm.layout, int(mm.pmd_entries[at])
    addr = int(mm.pmd_vpns[at]) << layout.page_shift
    kind = _kind(mm, swap_types(semantics), leaf)
    if kind == "none":
        return False, False
    present, freed = kind in ("present", "special"), False
    folio = _folio_of(mm, leaf, kind, addr) if present else None
    if folio is not None:
        freed = _remove_entire(mm, folio, semantics)
        mm.hugetlb_usage -= folio.nr_pages
        if arch.pte_dirty(layout, leaf) and not freed:
            folio.dirty = True
    marker = kind == "marker" and bool(arch.swp_offset(layout, leaf) & arch.PTE_MARKER_UFFD_WP)
    watched = arch.pte_uffd_wp(layout, leaf) if present else marker or arch.pte_swp_uffd_wp(layout, leaf)
    left = arch.swp_entry(layout, arch.SWP_PTE_MARKER, arch.PTE_MARKER_UFFD_WP)
    mm.pmd_entries[at] = left if watched and not drop_markers else layout.none_value
    return present, freed


def copy_hugetlb_page_range(ctx: ForkContext, dst_mm: Mm, src_mm: Mm, stats: I64) -> int:
    """Copy the leaves of a hugetlb VMA.

    Parameters
    ----------
    ctx : ForkContext
        Of the VMA; its folios are written, and folios to copy into come from them.
    dst_mm, src_mm : Mm
        The child, with a place for each leaf, and the parent; both written, and the child's ``hugetlb_usage``.
    stats : int64 array
        From `ptebatch.mm.new_stats`; added to.

    Returns
    -------
    int
        0, -ENOMEM or -EHWPOISON; leaves before the failing one stay copied.

    Notes
    -----
    ``copy_hugetlb_page_range()``, mm/hugetlb.c, v6.6 to v6.19. Where the child has no uffd-wp, that function clears the
    bit that uffd-wp has in present entries, also of migration and hwpoison entries, where it means something else.
    """
    layout, vma = ctx.layout, ctx.src_vma
    types = swap_types(ctx.semantics)
    cow = arch.is_cow_mapping(vma.vm_flags)
    uffd_wp = bool(ctx.dst_vma.vm_flags & arch.VM_UFFD_WP)
    for at in leaves(src_mm, vma.start, vma.end):
        pmd, addr = int(src_mm.pmd_entries[at]), int(src_mm.pmd_vpns[at]) << layout.page_shift
        kind = _kind(src_mm, types, pmd)
        to = int(np.searchsorted(dst_mm.pmd_vpns, int(src_mm.pmd_vpns[at])))
        if not _allocate(ctx):
            return -ENOMEM
        if kind == "none":
            continue
        if kind == "marker":
            marker = arch.copy_pte_marker(arch.swp_offset(layout, pmd), ctx.semantics.guard_markers, uffd_wp)
            if marker:
                dst_mm.pmd_entries[to] = arch.swp_entry(layout, arch.SWP_PTE_MARKER, marker)
            stats[STAT["pte_markers"]] += 1
            continue
        if kind == "hwpoison":
            stats[STAT["hwpoison_entries"]] += 1
        elif kind.startswith("migration"):
            if kind != "migration read" and cow:
                number = next(number for number, name in types.items() if name == "migration read")
                new = arch.swp_entry(layout, number, arch.swp_offset(layout, pmd))
                if vma.vm_flags & arch.VM_UFFD_WP and arch.pte_swp_uffd_wp(layout, pmd):
                    new = arch.pte_swp_mkuffd_wp(layout, new)
                pmd = src_mm.pmd_entries[at] = new
            stats[STAT["migration_entries"]] += 1
        else:
            folio = ctx.folios.folio(pmd_pfn(layout, pmd))
            _check_room(folio, addr)
            if folio.anon and ctx.folios.page(folio.pfn).anon_exclusive and _maybe_pinned(ctx, folio):
                ret = _copy_hugetlb_folio(ctx, dst_mm, to, folio, pmd, stats)
                if ret:
                    return ret
                continue
            folio.refcount += 1
            _dup_entire(ctx, folio, stats)
            if cow:
                pmd = arch.pte_wrprotect(layout, pmd)
                src_mm.pmd_entries[at] = pmd
            dst_mm.hugetlb_usage += folio.nr_pages
            stats[STAT["hugetlb_entries"]] += 1
        dst_mm.pmd_entries[to] = pmd if uffd_wp else arch.pte_clear_uffd_wp(layout, pmd)
    return 0


def _copy_hugetlb_folio(ctx: ForkContext, dst_mm: Mm, to: int, folio: Folio, pmd: int, stats: I64) -> int:
    """Give the child a hugetlb folio of its own (``hugetlb_install_folio()``, mm/hugetlb.c)."""
    layout, vma = ctx.layout, ctx.dst_vma
    if not _allocate(ctx):
        return -ENOMEM
    if any(ctx.folios.page(pfn).hwpoison for pfn in range(folio.pfn, folio.pfn + folio.nr_pages)):
        return -EHWPOISON
    pfn = ctx.folios.alloc(folio.order, hugetlb=True)
    new = ctx.folios.folio(pfn)
    new.refcount = new.entire_mapcount = new.large_mapcount = 1
    ctx.folios.page(pfn).anon_exclusive = True
    entry = arch.mk_pte(layout, pfn, vm_page_prot(layout, vma))
    if vma.vm_flags & arch.VM_WRITE or not ctx.semantics.hugetlb_copy_vm_write:
        entry = arch.pte_mkwrite(layout, arch.pte_mkdirty(layout, entry))
    else:
        entry = arch.pte_wrprotect(layout, entry)
    entry = arch.pte_mkyoung(layout, entry) | layout.huge
    if vma.vm_flags & arch.VM_UFFD_WP and arch.pte_uffd_wp(layout, pmd):
        entry = arch.pte_mkuffd_wp(layout, entry)
    dst_mm.pmd_entries[to] = entry
    dst_mm.hugetlb_usage += folio.nr_pages
    stats[STAT["hugetlb_entries"]] += 1
    stats[STAT["hugetlb_copied"]] += 1
    return 0
