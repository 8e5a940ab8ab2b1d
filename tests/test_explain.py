"""Why batches end: against a plain loop over `folio_pte_batch`, against fork itself, and case by case."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptebatch import arch, explain, mm, reference, workload
from ptebatch.arch import X86_64
from ptebatch.errors import ArgumentError, PfnError, SemanticsError, UnsupportedEntryError
from ptebatch.explain import explain_batches, what_if
from ptebatch.folio import FolioTable
from ptebatch.fork import fork
from ptebatch.mm import Mm, Vma, copy_state
from ptebatch.semantics import (
    FPB_IGNORE_DIRTY,
    FPB_IGNORE_SOFT_DIRTY,
    FPB_RESPECT_DIRTY,
    FPB_RESPECT_SOFT_DIRTY,
    LATEST,
    V6_8,
    V6_9,
    V6_18,
    KernelConfig,
    KernelSemantics,
)

RW = arch.VM_READ | arch.VM_WRITE | arch.VM_MAYREAD | arch.VM_MAYWRITE
SHARED = RW | arch.VM_SHARED | arch.VM_MAYSHARE
NO_SOFT_DIRTY = LATEST.replace(config=KernelConfig(mem_soft_dirty=False))
KERNELS = [LATEST, V6_18, V6_9, NO_SOFT_DIRTY]
TABLE = 512
BASE = 0x40000 * TABLE  # a virtual page number, slot 0 of its table
SIZES = [1 << n for n in range(12, 18)]


def plain_batches(space: Mm, semantics: KernelSemantics) -> list[tuple[int, int]]:
    """(first page, length) of every batch fork makes, found one entry at a time."""
    layout = space.layout.configured(semantics.config.mem_soft_dirty, semantics.config.x86_shstk)
    ptrs = layout.ptrs_per_pte
    batches = []
    for vma in space.vmas:
        if not vma.anon_vma:
            continue
        private = not vma.vm_flags & arch.VM_SHARED
        tracked = semantics.config.mem_soft_dirty and not vma.vm_flags & arch.VM_SOFTDIRTY
        if semantics.fpb_respect:
            flags = private * FPB_RESPECT_DIRTY | tracked * FPB_RESPECT_SOFT_DIRTY
        else:
            flags = (not private) * FPB_IGNORE_DIRTY | (not tracked) * FPB_IGNORE_SOFT_DIRTY
        vpn, end = vma.start >> 12, vma.end >> 12
        while vpn < end:
            row = int(np.searchsorted(space.vpns, vpn - vpn % ptrs))
            if row == len(space.vpns) or space.vpns[row] != vpn - vpn % ptrs:
                vpn += 1
                continue
            table, idx = space.entries[row], vpn % ptrs
            value = int(table[idx])
            if not arch.pte_present(layout, value):
                vpn += 1
                continue
            nr = 1
            if not arch.pte_special(layout, value):
                folio = space.folios.folio(arch.pte_pfn(layout, value))
                max_nr = min(ptrs - idx, end - vpn)
                if folio.order and max_nr > 1:
                    nr = reference.folio_pte_batch(
                        table, idx, max_nr, folios=space.folios, layout=layout, semantics=semantics, flags=flags
                    ).nr
                    pfns = [arch.pte_pfn(layout, value) + k for k in range(nr)]
                    exclusive = any(space.folios.page(pfn).anon_exclusive for pfn in pfns)
                    if folio.anon and space.has_pinned and folio.maybe_dma_pinned and exclusive:
                        nr = 1
            batches.append((vpn, nr))
            vpn += nr
    return batches


def found_batches(space: Mm, semantics: KernelSemantics) -> list[tuple[int, int]]:
    layout = space.layout.configured(semantics.config.mem_soft_dirty, semantics.config.x86_shstk)
    found = []
    for vma in space.vmas:
        if explain._copied_by_fork(vma, semantics):
            for batches in explain._batches(space, vma, layout, semantics):
                found += list(zip(batches.vpns.tolist(), batches.lengths.tolist(), strict=True))
    return found


@st.composite
def workloads(draw: st.DrawFn) -> workload.Workload:
    share = st.sampled_from([0.0, 0.0, 0.1, 0.5])
    keys = ("fragmentation", "readonly", "clean", "old", "pinned", "shared", "holes", "cowed", "uffd_wp")
    return workload.Workload(
        size=draw(st.integers(300, 2600)) * 4096,
        folio=tuple(draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=3, unique=True))),
        seed=draw(st.integers(0, 1000)),
        align=draw(st.sampled_from(workload.ALIGNMENTS)),
        soft_dirty=draw(st.sampled_from([None, 0.5])),
        granularity=draw(st.sampled_from(workload.GRANULARITIES)),
        pfns=draw(st.sampled_from(workload.PFN_ORDERS)),
        vma=draw(st.sampled_from([("anon",), ("file",), ("anon", "shmem-guard"), ("anon", "file", "shmem")])),
        vmas=draw(st.integers(1, 3)),
        **{key: draw(share) for key in keys},
    )


@st.composite
def scrambled(draw: st.DrawFn) -> Mm:
    """A workload with bits flipped that break batches for other reasons, and with entries taken out of VMAs."""
    space = draw(workloads()).build()
    flat = space.entries.reshape(-1)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    present = np.flatnonzero(flat & np.uint64(X86_64.present_mask))
    for mask in (X86_64.nx, 1 << 59, 1 << 53, X86_64.saved_dirty):
        if draw(st.booleans()):
            flat[rng.choice(present, 5)] ^= np.uint64(mask)
    if draw(st.booleans()):
        for at in rng.choice(present, 20).tolist():
            run = slice(at, at + int(rng.integers(1, 6)))
            flat[run] = [
                arch.pte_modify(X86_64, v, X86_64.protnone) if arch.pte_present(X86_64, v) else v
                for v in flat[run].tolist()
            ]
    if draw(st.booleans()):
        vma = space.vmas[0]
        middle = vma.start + (vma.end - vma.start) // 8192 * 4096
        if middle > vma.start:
            first = Vma(vma.start, middle, vma.vm_flags, vma.anon_vma, vma.vm_ops)
            space.vmas[:1] = [first, Vma(middle, vma.end, vma.vm_flags, vma.anon_vma, vma.vm_ops)]
    return space


@given(scrambled(), st.sampled_from(KERNELS))
@settings(max_examples=60, deadline=None)
def test_batches_are_those_of_the_plain_loop(space: Mm, semantics: KernelSemantics) -> None:
    before = mm.digest([space], space.folios, semantics)
    assert found_batches(space, semantics) == plain_batches(space, semantics)
    explanation = explain_batches(space, semantics=semantics, by_vma=True)
    total = explanation.total
    hist = np.bincount([n for _, n in plain_batches(space, semantics)], minlength=TABLE + 1)
    assert (total.batch_hist == hist).all()
    assert sum(total.ends.values()) == total.batches == hist.sum()
    assert sum(total.ptes_ended.values()) == total.ptes == (hist * np.arange(TABLE + 1)).sum()
    assert sum(v.batches for v in explanation.vmas) == total.batches
    assert mm.digest([space], space.folios, semantics) == before


@given(scrambled(), st.sampled_from(KERNELS))
@settings(max_examples=40, deadline=None)
def test_histogram_is_what_fork_does(space: Mm, semantics: KernelSemantics) -> None:
    total = explain_batches(space, semantics=semantics).total
    stats = fork(copy_state(space), semantics=semantics, impl="reference").stats
    assert (stats.batch_hist == total.batch_hist).all()
    assert (stats.batches, stats.ptes_present) == (total.batches, total.ptes)


@given(scrambled())
@settings(max_examples=20, deadline=None)
def test_chunks_make_no_difference(space: Mm) -> None:
    whole = explain_batches(space)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain, "_CHUNK_SLOTS", TABLE)
        parts = explain_batches(space)
    assert parts.total.ends == whole.total.ends
    assert parts.total.ptes_ended == whole.total.ptes_ended


def space_of(
    values: list[int | None],
    folios: FolioTable,
    *,
    at: int = 0,
    vm_flags: int = RW | arch.VM_SOFTDIRTY,
    has_pinned: bool = False,
    pages: int | None = None,
    **vma: object,
) -> Mm:
    """One VMA whose slots from `at` on hold `values` (None: empty); `pages` pages, by default to the table's end."""
    end = BASE + (TABLE if pages is None else at + pages)
    area = Vma((BASE + at) << 12, end << 12, vm_flags, **vma)  # type: ignore[arg-type]
    space = Mm.for_vmas(X86_64, folios, [area], has_pinned=has_pinned)
    for i, value in enumerate(values):
        if value is not None:
            space.set_pte((BASE + at + i) << 12, value)
    return space


def entry(pfn: int, flip: int = 0, prot: int = 0x8000000000000067) -> int:
    return arch.pfn_pte(X86_64, pfn, prot) ^ flip


def ends(space: Mm, **kwargs: object) -> dict[str, int]:
    return explain_batches(space, **kwargs).total.ends  # type: ignore[arg-type]


@pytest.fixture
def folios() -> FolioTable:
    table = FolioTable()
    table.add_folios(np.arange(0x1000, 0x1400, 16), 4)
    table.add_folios(np.arange(0x2000, 0x2010), 0)
    return table


def whole(pfn: int = 0x1000, n: int = 16) -> list[int | None]:
    return [entry(pfn + k) for k in range(n)]


def test_folio_end_and_none(folios: FolioTable) -> None:
    assert ends(space_of(whole(), folios)) == {"folio end": 1}
    assert ends(space_of(whole(n=32), folios)) == {"folio end": 2}
    assert ends(space_of(whole(n=8), folios)) == {"none": 1}
    assert ends(space_of(whole(0x2000, 5), folios)) == {"folio end": 5}


def test_none_as_x86_sees_it(folios: FolioTable) -> None:
    assert ends(space_of([*whole(n=3), 0x60], folios)) == {"none": 1}


def test_swap(folios: FolioTable) -> None:
    assert ends(space_of([*whole(n=8), arch.swp_entry(X86_64, 1, 77)], folios)) == {"swap": 1}


def test_table_and_vma_end(folios: FolioTable) -> None:
    space = space_of(whole(), folios, at=TABLE - 8, pages=20)
    assert ends(space) == {"folio end": 1, "table end": 1}
    assert ends(space_of(whole(n=8), folios, pages=8)) == {"vma end": 1}
    # The VMA's end comes first, then the table's, then the folio's.
    assert ends(space_of(whole(), folios, at=TABLE - 16, pages=16)) == {"vma end": 1}
    assert ends(space_of(whole(), folios, at=TABLE - 16, pages=17)) == {"table end": 1}


def test_pfn_jump(folios: FolioTable) -> None:
    values = whole()
    assert ends(space_of([*values[4:], *values[:4]], folios)) == {"folio end": 1, "none": 1}
    assert ends(space_of([*values[:4], *values[8:]], folios)) == {"PFN jump": 1, "folio end": 1}
    assert ends(space_of([values[0], values[0]], folios)) == {"PFN jump": 1, "none": 1}
    # A jump goes before the bits that differ as well.
    assert ends(space_of([values[0], entry(0x1008, X86_64.nx)], folios)) == {"PFN jump": 1, "none": 1}


def test_special(folios: FolioTable) -> None:
    values = whole(n=4)
    assert ends(space_of([*values, entry(5, X86_64.special)], folios)) == {"special": 2}
    assert ends(space_of([*values, entry(0x99999)], folios)) == {"special": 2}
    assert ends(space_of([entry(5, X86_64.special)] * 3, folios)) == {"special": 3}


@pytest.mark.parametrize(
    ("flip", "name"),
    [
        (X86_64.dirty, "dirty"),
        (X86_64.dirty | X86_64.write, "dirty"),
        (X86_64.uffd_wp, "uffd-wp"),
        (X86_64.nx, "NX"),
        (1 << 60, "pkey"),
        (1 << 4, "PCD"),
        (X86_64.user, "US"),
        (1 << 57, "BIT57"),
        (X86_64.nx | X86_64.dirty, "dirty+NX"),
    ],
)
def test_differing_bits(folios: FolioTable, flip: int, name: str) -> None:
    values = whole()
    values[7] = entry(0x1007, flip)
    assert ends(space_of(values, folios)) == {f"bits: {name}": 2, "folio end": 1}


@pytest.mark.parametrize("flip", [X86_64.young, X86_64.soft_dirty, X86_64.write])
def test_ignored_bits(folios: FolioTable, flip: int) -> None:
    values = whole()
    if flip == X86_64.write:  # read-only and dirty, as a kernel since v6.6 writes it
        values[7] = arch.pte_wrprotect(X86_64, entry(0x1007))
    else:
        values[7] = entry(0x1007, flip)
    assert ends(space_of(values, folios)) == {"folio end": 1}


def test_soft_dirty_by_vma_and_configuration(folios: FolioTable) -> None:
    values = whole()
    values[7] = entry(0x1007, X86_64.soft_dirty)
    assert ends(space_of(values, folios, vm_flags=RW)) == {"bits: soft-dirty": 2, "folio end": 1}
    # Not configured, the bit is like any other.
    assert ends(space_of(values, folios, vm_flags=RW), semantics=NO_SOFT_DIRTY) == {
        "bits: SOFT_DIRTY": 2,
        "folio end": 1,
    }


def test_shared_mappings_ignore_dirty(folios: FolioTable) -> None:
    values = whole()
    values[7] = entry(0x1007, X86_64.dirty)
    assert ends(space_of(values, folios, vm_flags=SHARED | arch.VM_SOFTDIRTY)) == {"folio end": 1}


def test_prot_none(folios: FolioTable) -> None:
    values = whole()
    for k in range(4, 8):
        values[k] = arch.pte_modify(X86_64, entry(0x1000 + k), X86_64.protnone | X86_64.young)
    assert ends(space_of(values, folios)) == {"bits: PROT_NONE+NX": 2, "folio end": 1}


def test_pinned_pages_go_alone() -> None:
    table = FolioTable()
    exclusive = [k in (2, 5) for k in range(16)]
    table.add(0x1000, 4, refcount=17, mapcount=1, anon_exclusive=exclusive, pincount=1)
    space = space_of(whole(), table, has_pinned=True)
    # Up to the last exclusive page (5) one by one, then the rest at once.
    assert ends(space) == {"pinned": 6, "folio end": 1}
    assert explain_batches(space).total.batch_hist[[1, 10]].tolist() == [6, 1]
    space.has_pinned = False
    assert ends(space) == {"folio end": 1}


@pytest.mark.parametrize(
    ("vma", "copied"),
    [
        ({}, True),
        ({"anon_vma": False}, False),
        ({"vm_flags": RW | arch.VM_DONTCOPY}, False),
        ({"vm_flags": RW | arch.VM_WIPEONFORK}, False),
        ({"vm_flags": RW | arch.VM_PFNMAP, "anon_vma": False}, True),
        ({"vm_flags": RW | arch.VM_MIXEDMAP, "anon_vma": False}, True),
        ({"vm_flags": RW | arch.VM_UFFD_WP, "anon_vma": False}, False),
        ({"vm_flags": RW | arch.VM_UFFD_WP, "anon_vma": False, "uffd_event_fork": True}, True),
        ({"vm_flags": SHARED | arch.VM_MAYBE_GUARD, "anon_vma": False}, True),
        ({"vm_flags": RW | arch.VM_HUGETLB, "vm_ops": "hugetlb"}, False),
    ],
)
def test_only_vmas_that_fork_copies(folios: FolioTable, vma: dict[str, object], copied: bool) -> None:
    space = space_of(whole(), folios, **vma)  # type: ignore[arg-type]
    explanation = explain_batches(space)
    assert (explanation.vmas_copied, explanation.vmas_skipped) == (int(copied), int(not copied))
    assert explanation.total.ptes == 16 * copied
    if vma.get("vm_ops") != "hugetlb":
        stats = fork(space, impl="reference").stats
        assert (stats.vmas_copied, stats.ptes_present) == (int(copied), 16 * copied)


def test_guard_vma_before_6_19(folios: FolioTable) -> None:
    space = space_of(whole(), folios, vm_flags=SHARED | arch.VM_MAYBE_GUARD, anon_vma=False)
    assert explain_batches(space, semantics=V6_18).vmas_copied == 0


def test_unbatched_kernel_is_refused(folios: FolioTable) -> None:
    with pytest.raises(SemanticsError, match="v6.8"):
        explain_batches(space_of(whole(), folios), semantics=V6_8)


def test_rows(folios: FolioTable) -> None:
    space = space_of(whole(n=24), folios, name="[heap]")
    explanation = explain_batches(space, by_vma=True)
    assert explanation.to_rows()[:2] == [
        {"vma": "all", "cause": "folio end", "batches": 1, "share": 0.5, "ptes": 16, "mean": 16.0},
        {"vma": "all", "cause": "none", "batches": 1, "share": 0.5, "ptes": 8, "mean": 8.0},
    ]
    assert explanation.to_rows()[2]["vma"] == f"{BASE << 12:x}-{(BASE + TABLE) << 12:x} [heap]"
    assert explanation.total.mean == 12
    assert explain_batches(Mm(X86_64, FolioTable())).total.mean == 0


# --- what_if ----------------------------------------------------------------------------------------------------------
def kept_bits(space: Mm) -> np.ndarray:
    present = space.entries & np.uint64(X86_64.present_mask) != 0
    return np.where(present, space.entries & np.uint64(~X86_64.pfn_mask & arch.U64_MAX), space.entries)


def naive_orders(space: Mm, max_order: int) -> dict[int, int]:
    """Page -> order of the folio that what_if should give it."""
    kind = {}
    for i, vma in enumerate(space.vmas):
        for vpn in range(vma.start >> 12, vma.end >> 12):
            value = space.pte(vpn << 12)
            if arch.pte_present(X86_64, value) and not arch.pte_special(X86_64, value):
                folio = space.folios.folio(arch.pte_pfn(X86_64, value))
                kind[vpn] = (i, folio.anon, folio.swapbacked)
    orders = {}
    for vpn in kind:
        for order in range(max_order, -1, -1):
            low = vpn >> order << order
            if len({kind.get(v) for v in range(low, low + (1 << order))}) == 1:
                orders[vpn] = order
                break
    return orders


@given(scrambled(), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_what_if_keeps_everything_but_folios(space: Mm, order: int) -> None:
    before = mm.digest([space], space.folios, LATEST)
    other = what_if(space, 4096 << order)
    assert mm.digest([space], space.folios, LATEST) == before
    other.validate(entries=True)
    assert (kept_bits(other) == kept_bits(space)).all()
    assert other.vmas == space.vmas
    assert other.vmas is not space.vmas
    assert (other.rss == space.rss).all()
    for vpn, expected in naive_orders(space, order).items():
        old = space.folios.page(arch.pte_pfn(X86_64, space.pte(vpn << 12)))
        new = other.folios.page(arch.pte_pfn(X86_64, other.pte(vpn << 12)))
        assert new.folio.order == expected
        assert new.pfn - new.folio.pfn == vpn % (1 << expected)
        assert new.anon_exclusive == old.anon_exclusive
        assert (new.mapcount > 1) == (old.mapcount > 1)
        assert new.folio.maybe_dma_pinned >= (space.has_pinned and old.folio.maybe_dma_pinned)
    assert len(other.folios) == len(naive_orders(space, order))
    assert explain_batches(other).total.ptes == explain_batches(space).total.ptes
    fork(other, impl="reference")


def test_what_if_makes_plain_memory_batch() -> None:
    space = workload.parse("size=4MiB").build()
    for size in (1 << 12, 1 << 16, 1 << 21):
        total = explain_batches(what_if(space, size)).total
        assert total.batches == (4 << 20) // size
        assert total.mean == size >> 12


def test_what_if_and_back_is_the_same_amount_of_work() -> None:
    space = workload.parse("size=4MiB,folio=64KiB").build()
    assert explain_batches(what_if(what_if(space, 4096), 65536)).total.ends == explain_batches(space).total.ends


@pytest.mark.parametrize("size", [0, 1, 2048, 5000, 12288, 1 << 22, -4096, 4096.0, True, "64KiB"])
def test_what_if_refuses_sizes(folios: FolioTable, size: object) -> None:
    with pytest.raises(ArgumentError, match="power of two"):
        what_if(space_of(whole(), folios), size)  # type: ignore[arg-type]


def test_what_if_refuses_pages_it_does_not_know(folios: FolioTable) -> None:
    with pytest.raises(PfnError, match="0x99999"):
        what_if(space_of([entry(0x99999)], folios), 4096)
    folios.add_folios([0x4000], 9, hugetlb=True)
    with pytest.raises(UnsupportedEntryError, match="hugetlb"):
        what_if(space_of([entry(0x4000)], folios), 4096)


def test_what_if_leaves_swap_and_special_entries(folios: FolioTable) -> None:
    swap, special = arch.swp_entry(X86_64, 1, 77), entry(5, X86_64.special)
    other = what_if(space_of([*whole(n=4), swap, special], folios), 65536)
    assert other.pte((BASE + 4) << 12) == swap
    assert other.pte((BASE + 5) << 12) == special
    assert other.folios.folio(arch.pte_pfn(X86_64, other.pte(BASE << 12))).order == 2
