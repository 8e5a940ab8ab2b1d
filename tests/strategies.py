"""Generated address spaces, aimed at the edges of batching.

A case is plain data (`Case`), so that it prints, shrinks, and can be built twice: once for the core and once for the
reference. VMAs are short and sit around the end of a page table; folios are mapped whole, in part, misaligned, twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TypeVar

import numpy as np
from hypothesis import strategies as st

from ptebatch import arch
from ptebatch.arch import X86_64, PteLayout
from ptebatch.folio import FolioTable
from ptebatch.mm import MM_ANONPAGES, MM_FILEPAGES, MM_SHMEMPAGES, MM_SWAPENTS, Mm, Vma, swap_types
from ptebatch.semantics import PRESETS, KernelSemantics
from ptebatch.swap import MAX_SWAP_COUNT, swap_key

L = X86_64
TABLE_END = 7 * L.ptrs_per_pte  # virtual page number; VMAs straddle it
FIRST_PFN = 1 << 14
MAX_ORDER = 6
OTHER_MM_ID = (1 << 20) - 1


@dataclass(frozen=True)
class FolioSpec:
    """One folio; masks are over its pages."""

    order: int
    anon: bool = True
    swapbacked: bool = True
    exclusive: int = 0
    poisoned: int = 0
    pinned: bool = False
    extra_refs: int = 0
    device: bool = False
    dirty: bool = False
    locked: bool = False
    others: int = 0  # mappings by another mm, of a large folio


@dataclass(frozen=True)
class Run:
    """Entries that map consecutive pages of a folio, or holes (folio -1), or special entries (folio -2).

    With a swap type they are swap-type entries: their offsets are the PFNs of the folio's pages, or `first` and on
    (folio -1). `bits` are then those of such entries.
    """

    folio: int
    first: int
    nr: int
    bits: int
    toggles: tuple[tuple[int, int], ...] = ()  # (offset in the run, bits flipped there)
    protnone: bool = False
    swap_type: int | None = None


@dataclass(frozen=True)
class Leaf:
    """A PMD leaf in the middle of a VMA of its own, which reaches 8 pages beyond it on either side (not hugetlb)."""

    kind: str
    vm_flags: int
    bits: int
    exclusive: bool
    pinned: bool
    uffd_event_fork: bool = False
    swap_type: int = 0


LEAF_VPN = 32 * L.ptrs_per_pte
LEAF_PFN = 1 << 16
HUGE_ZERO_PFN = 1 << 17


@dataclass(frozen=True)
class VmaSpec:
    start: int  # virtual page number
    nr: int
    vm_flags: int
    anon_vma: bool
    uffd_event_fork: bool
    runs: tuple[Run, ...] = ()
    vm_ops: str | None = None


@dataclass(frozen=True)
class Case:
    folios: tuple[FolioSpec, ...]
    vmas: tuple[VmaSpec, ...]
    has_pinned: bool
    swap: tuple[tuple[int, int], ...] = field(default=())  # (offset in swap area 0, its count)
    leaf: Leaf | None = None


BASE = L.valid | L.user
BITS = (L.write, L.young, L.dirty, L.saved_dirty, L.soft_dirty, L.uffd_wp, L.nx, 1 << 59, 1 << 3, 1 << 57)
COMMON_BITS = (
    L.write | L.young | L.dirty,
    L.write | L.young | L.dirty | L.soft_dirty,
    L.young | L.saved_dirty,
    L.young,
    0,
    L.write,
    L.young | L.uffd_wp,
    L.dirty,  # read-only with D: not canonical, but copied all the same
)
PRIVATE = arch.VM_READ | arch.VM_WRITE | arch.VM_MAYREAD | arch.VM_MAYWRITE
SHARED = PRIVATE | arch.VM_SHARED | arch.VM_MAYSHARE
VM_FLAGS = (
    PRIVATE,
    PRIVATE,
    PRIVATE,
    PRIVATE & ~arch.VM_WRITE,
    arch.VM_READ | arch.VM_MAYREAD,
    arch.VM_READ | arch.VM_WRITE | arch.VM_MAYREAD,
    SHARED,
    SHARED & ~arch.VM_WRITE,
    PRIVATE | arch.VM_SHADOW_STACK,
    PRIVATE | arch.VM_PFNMAP,
    SHARED | arch.VM_MIXEDMAP,
    arch.VM_MAYREAD | arch.VM_MAYWRITE,  # PROT_NONE
)
EXTRA_VM_FLAGS = (
    0, 0, 0, arch.VM_UFFD_WP, arch.VM_SOFTDIRTY, arch.VM_DONTCOPY, arch.VM_WIPEONFORK, arch.VM_LOCKED, 0x800,
)  # fmt: skip

# A case is some 150 choices, and making a strategy for a choice takes ten times as long as drawing from it: choices are
# drawn from strategies made once, by functions that take `draw`.
_integers = cache(st.integers)
Chosen = TypeVar("Chosen")


def pick(draw: st.DrawFn, choices: Sequence[Chosen]) -> Chosen:
    return choices[draw(_integers(0, len(choices) - 1))]


def flag(draw: st.DrawFn, one_in: int = 2) -> bool:
    return draw(_integers(0, one_in - 1)) == one_in - 1


def up_to(draw: st.DrawFn, most: int, least: int = 0) -> int:
    return draw(_integers(least, most))


def draw_mask(draw: st.DrawFn, whole: int) -> int:
    return pick(draw, (whole, whole, 0)) if flag(draw) else up_to(draw, whole)


def draw_folio(draw: st.DrawFn) -> FolioSpec:
    order = up_to(draw, MAX_ORDER)
    whole = (1 << (1 << order)) - 1
    anon = not flag(draw, 4)
    return FolioSpec(
        order=order,
        anon=anon,
        swapbacked=anon or flag(draw),
        exclusive=draw_mask(draw, whole) if anon else 0,
        poisoned=pick(draw, (0, 0, 0, 1, 1, 1, 1, whole)) if flag(draw, 10) else 0,
        pinned=flag(draw, 4),
        extra_refs=pick(draw, (0, 0, 1, 5, 1022, 1023, 1024)),
        device=anon and flag(draw, 6),
        dirty=flag(draw),
        locked=flag(draw, 20),
        others=pick(draw, (0, 0, 0, 1, 31, 32)) if order else 0,
    )


SWP_BITS = (L.swp_exclusive, L.swp_soft_dirty, L.swp_uffd_wp)
FIRST_SPECIAL_TYPE = 23  # with every configuration; what the types from here on mean depends on it


def draw_swap_run(draw: st.DrawFn, folios: tuple[FolioSpec, ...], room: int) -> Run:
    """Swap-type entries of every type: swap slots, markers, or PFNs of some folio's pages."""
    which_bits = up_to(draw, (1 << len(SWP_BITS)) - 1)
    bits = sum(bit for at, bit in enumerate(SWP_BITS) if which_bits >> at & 1)
    kind = pick(draw, ("swap", "swap", "marker", "page", "page", "device"))
    if kind == "swap":
        return Run(-1, up_to(draw, 6), up_to(draw, min(room, 5), 1), bits, swap_type=0)
    if kind == "marker":
        return Run(-1, up_to(draw, 7), 1, bits, swap_type=arch.SWP_PTE_MARKER)
    devices = [at for at, spec in enumerate(folios) if spec.device]
    if kind == "device" and devices:
        which, swap_type = pick(draw, devices), up_to(draw, 29, 27)
    else:
        which = up_to(draw, len(folios) - 1)
        swap_type = pick(draw, (*range(FIRST_SPECIAL_TYPE, 27), 30))
    pages = 1 << folios[which].order
    first = up_to(draw, pages - 1)
    high = pick(draw, (0, 0, 1, 2, 3)) << L.swp_pfn_bits if kind == "page" else 0  # young, dirty
    return Run(which, first, up_to(draw, min(pages - first, room), 1), bits | high << 8, swap_type=swap_type)


def draw_run(draw: st.DrawFn, folios: tuple[FolioSpec, ...], room: int) -> Run:
    kind = up_to(draw, 15)
    if kind >= 13:
        return draw_swap_run(draw, folios, room)
    if kind == 0:
        return Run(-1, 0, up_to(draw, min(room, 8), 1), 0)
    if kind == 1:
        return Run(-2, up_to(draw, 63), up_to(draw, min(room, 3), 1), pick(draw, COMMON_BITS))
    which = up_to(draw, len(folios) - 1)
    pages = 1 << folios[which].order
    first = up_to(draw, pages - 1) if flag(draw) else 0
    most = min(pages - first, room)
    nr = up_to(draw, most, 1) if flag(draw) else most
    toggles = tuple((up_to(draw, nr - 1), pick(draw, BITS)) for _ in range(max(0, up_to(draw, 8) - 4)))
    return Run(which, first, nr, pick(draw, COMMON_BITS), toggles, flag(draw, 8))


def draw_leaf(draw: st.DrawFn) -> Leaf:
    kinds = ("thp", "thp", "thp", "hugetlb", "hugetlb", "swap-type", "huge zero", "special", "file")
    kind = pick(draw, kinds)
    flags = pick(draw, (PRIVATE, PRIVATE, PRIVATE & ~arch.VM_WRITE, SHARED))
    return Leaf(
        kind,
        flags | pick(draw, (0, 0, arch.VM_UFFD_WP, arch.VM_SOFTDIRTY)),
        pick(draw, COMMON_BITS),
        flag(draw),
        flag(draw),
        flag(draw),
        up_to(draw, arch.SWP_PTE_MARKER, FIRST_SPECIAL_TYPE),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    folios = tuple(draw_folio(draw) for _ in range(up_to(draw, 4, 1)))
    vmas: list[VmaSpec] = []
    start = TABLE_END - up_to(draw, 40)
    for _ in range(up_to(draw, 3, 1)):
        start += pick(draw, (0, 0, 1, 5))
        nr = up_to(draw, 48, 1)
        own: list[Run] = []
        used = 0
        while used < nr and up_to(draw, 15):
            own.append(draw_run(draw, folios, nr - used))
            used += own[-1].nr
        vmas.append(
            VmaSpec(
                start,
                nr,
                pick(draw, VM_FLAGS) | pick(draw, EXTRA_VM_FLAGS),
                not flag(draw, 8),
                flag(draw),
                tuple(own),
                pick(draw, (None, None, None, "file", "shmem")),
            )
        )
        start += nr
    swap_counts = (1, 1, 61, 62, 63, MAX_SWAP_COUNT)
    swap = {up_to(draw, 11): pick(draw, swap_counts) for _ in range(max(0, up_to(draw, 8) - 4))}
    leaf = draw_leaf(draw) if flag(draw, 8) else None
    return Case(folios, tuple(vmas), flag(draw), tuple(swap.items()), leaf)


@st.composite
def kernels(draw: st.DrawFn) -> KernelSemantics:
    semantics = PRESETS[pick(draw, sorted(PRESETS))]
    config = replace(
        semantics.config,
        mem_soft_dirty=flag(draw),
        x86_shstk=flag(draw, 4),
        no_page_mapcount=semantics.mm_id and flag(draw, 4),
        device_private=not flag(draw, 4),
        memory_failure=flag(draw),
    )
    return replace(semantics, config=config)


def entry(layout: PteLayout, pfn: int, run: Run, k: int) -> int:
    """The value of entry k of a run that maps `pfn`."""
    bits = BASE | run.bits
    for at, flip in run.toggles:
        if at == k:
            bits ^= flip
    if run.protnone:
        bits = (bits & ~(layout.valid | layout.user)) | layout.protnone
    return arch.mk_pte(layout, pfn, bits)


def build(case: Case, layout: PteLayout = X86_64) -> Mm:
    """Make the address space: counts are those of its own mappings plus what the case adds."""
    folios = FolioTable()
    heads: list[int] = []
    pfn = FIRST_PFN
    for spec in case.folios:
        pages = 1 << spec.order
        pfn = -(-pfn // pages) * pages + pages  # one folio's room between neighbours of the same order
        heads.append(pfn)
        mapcount = [0] * pages
        for vma in case.vmas:
            for run in vma.runs:
                if run.folio == len(heads) - 1 and run.swap_type is None:
                    for k in range(run.nr):
                        mapcount[run.first + k] += 1
        total = sum(mapcount)
        folios.add(
            pfn,
            spec.order,
            anon=spec.anon,
            swapbacked=spec.swapbacked,
            device=spec.device,
            refcount=total + spec.extra_refs + spec.others,
            mapcount=mapcount,
            large_mapcount=total + spec.others if spec.order else None,
            anon_exclusive=[bool(spec.exclusive >> k & 1) for k in range(pages)],
            pincount=int(spec.pinned) if spec.order else 0,
        )
        folios.folio(pfn).dirty, folios.folio(pfn).locked = spec.dirty, spec.locked
        for k in range(pages):
            if spec.poisoned >> k & 1:
                folios.page(pfn + k).hwpoison = True
        pfn += pages
    vmas = [
        Vma(
            start=spec.start << layout.page_shift,
            end=(spec.start + spec.nr) << layout.page_shift,
            vm_flags=spec.vm_flags,
            anon_vma=spec.anon_vma,
            uffd_event_fork=spec.uffd_event_fork,
            vm_ops=spec.vm_ops,
        )
        for spec in case.vmas
    ]
    mm = Mm.for_vmas(layout, folios, vmas)
    mm.has_pinned = case.has_pinned
    for spec in case.vmas:
        vpn = spec.start
        for run in spec.runs:
            for k in range(run.nr):
                if run.swap_type is not None:
                    offset = run.first + k if run.folio < 0 else heads[run.folio] + run.first + k | run.bits >> 8
                    value = arch.swp_entry(layout, run.swap_type, offset) | run.bits & 0xFF
                elif run.folio == -2:
                    value = arch.pte_mkspecial(layout, arch.mk_pte(layout, run.first + k, BASE | run.bits))
                elif run.folio >= 0:
                    value = entry(layout, heads[run.folio] + run.first + k, run, k)
                else:
                    value = layout.none_value
                mm.set_pte((vpn + k) << layout.page_shift, value)
            vpn += run.nr
    for at, spec in enumerate(case.folios):
        if spec.order:
            mapped = sum(
                run.nr for vma in case.vmas for run in vma.runs if run.folio == at and run.swap_type is None
            )
            folio = folios.folio(heads[at])
            folio.set_mm_ids(((mm.mm_id * (mapped > 0), mapped), (OTHER_MM_ID * (spec.others > 0), spec.others)))
            folio.maybe_mapped_shared = mapped > 0 < spec.others
    for offset, count in case.swap:
        folios.swap.add([swap_key(0, offset)], count)
    if case.leaf is not None:
        add_leaf(mm, case.leaf)
    return mm


def add_leaf(mm: Mm, leaf: Leaf) -> None:
    """Add the VMA of a leaf and what it maps; entries beside it are swap entries and holes."""
    layout, folios, nr = mm.layout, mm.folios, mm.layout.ptrs_per_pte
    hugetlb = leaf.kind == "hugetlb"
    beside = 0 if hugetlb else 8
    ops = {"hugetlb": "hugetlb", "file": "file", "special": "special"}.get(leaf.kind)
    first = LEAF_VPN - beside
    mm.vmas.append(
        Vma(
            start=first << layout.page_shift,
            end=(LEAF_VPN + nr + beside) << layout.page_shift,
            vm_flags=leaf.vm_flags | (arch.VM_HUGETLB if hugetlb else arch.VM_PFNMAP if ops == "special" else 0),
            vm_ops=ops,
            uffd_event_fork=leaf.uffd_event_fork,
        )
    )
    if beside:
        mm.add_tables(first << layout.page_shift, LEAF_VPN << layout.page_shift)
        mm.add_tables((LEAF_VPN + nr) << layout.page_shift, (LEAF_VPN + nr + beside) << layout.page_shift)
        for vpn in (first, LEAF_VPN - 1, LEAF_VPN + nr, LEAF_VPN + nr + 5):
            mm.set_pte(vpn << layout.page_shift, arch.swp_entry(layout, 0, vpn & 3) | layout.swp_exclusive)
    mapped = int(leaf.kind in ("thp", "hugetlb", "file"))
    anon = leaf.kind != "file" and not (hugetlb and leaf.vm_flags & arch.VM_SHARED)
    folios.add(
        LEAF_PFN,
        9,
        anon=anon,
        hugetlb=hugetlb,
        device=leaf.swap_type in (28, 29),
        refcount=mapped + leaf.pinned,
        entire_mapcount=mapped,
        large_mapcount=mapped,
        anon_exclusive=[leaf.exclusive and anon] + [False] * (nr - 1),
        pincount=int(leaf.pinned),
    )
    if mapped and not hugetlb:
        folios.folio(LEAF_PFN).set_mm_ids(((mm.mm_id, 1), (0, 0)))
    folios.huge_zero_pfn = HUGE_ZERO_PFN
    pfn = HUGE_ZERO_PFN if leaf.kind == "huge zero" else LEAF_PFN
    value = arch.mk_pte(layout, pfn, BASE | layout.huge | leaf.bits)
    if leaf.kind == "special":
        value = arch.pte_mkspecial(layout, value)
    if leaf.kind == "swap-type":
        value = arch.swp_entry(layout, leaf.swap_type, LEAF_PFN)
    mm.pmd_vpns = np.array([LEAF_VPN], dtype=np.int64)
    mm.pmd_entries = np.array([value], dtype=np.uint64)


def count_rest(mm: Mm, semantics: KernelSemantics) -> None:
    """Count what `build` does not: rss, and the entries that are not present, so that all of it can be unmapped."""
    layout, folios, types = mm.layout, mm.folios, swap_types(semantics)
    for pte in mm.entries.reshape(-1).tolist():
        if arch.pte_none(layout, pte) or (arch.pte_present(layout, pte) and arch.pte_special(layout, pte)):
            continue
        kind = "present" if arch.pte_present(layout, pte) else types.get(arch.swp_type(layout, pte), "swap")
        if kind == "swap":
            if folios.swap.count(arch.swp_type(layout, pte), arch.swp_offset(layout, pte)) < MAX_SWAP_COUNT:
                folios.swap.add([swap_key(arch.swp_type(layout, pte), arch.swp_offset(layout, pte))])
            mm.rss[MM_SWAPENTS] += 1
        if kind in ("swap", "marker", "hwpoison"):
            continue
        page = folios.page(arch.pte_pfn(layout, pte) if kind == "present" else arch.swp_offset_pfn(layout, pte))
        folio = page.folio
        mm.rss[MM_ANONPAGES if folio.anon else MM_SHMEMPAGES if folio.swapbacked else MM_FILEPAGES] += 1
        if kind.startswith("device"):
            folio.refcount += 1
            if kind in ("device write", "device read") or semantics.single_device_exclusive:
                page.mapcount += 1
                if folio.order:
                    folio.large_mapcount += 1
                    folio.add_mm_mapping(mm.mm_id, 1)
    for vpn, pmd in zip(mm.pmd_vpns.tolist(), mm.pmd_entries.tolist(), strict=True):
        vma = mm.vma_at(vpn << layout.page_shift)
        kind = "present" if arch.pte_present(layout, pmd) else types.get(arch.swp_type(layout, pmd), "swap")
        mapped = kind == "present" and arch.pte_pfn(layout, pmd) == LEAF_PFN and not arch.pte_special(layout, pmd)
        if vma.vm_flags & arch.VM_HUGETLB:
            mm.hugetlb_usage += layout.ptrs_per_pte * mapped
        elif mapped or kind.startswith(("migration", "device")):
            folio = folios.folio(LEAF_PFN)
            if kind in ("device write", "device read"):
                folio.refcount += 1
                folio.entire_mapcount += 1
                folio.large_mapcount += 1
                folio.add_mm_mapping(mm.mm_id, 1)
            mm.rss[MM_ANONPAGES if folio.anon else MM_FILEPAGES] += layout.ptrs_per_pte
