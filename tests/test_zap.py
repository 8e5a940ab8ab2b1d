"""Unmapping: core against reference, batched against single, and what fork and exit give back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import PRIVATE, SHARED, Case, FolioSpec, Run, VmaSpec, build, cases, count_rest, kernels
from test_differential import BATCHING, EXAMPLES, assert_same

from ptebatch import arch
from ptebatch.arch import X86_64 as L
from ptebatch.errors import ArgumentError, PfnError, PtebatchError, SemanticsError, StateError
from ptebatch.folio import FolioTable
from ptebatch.fork import fork
from ptebatch.mm import MM_ANONPAGES, MM_FILEPAGES, Mm, Vma, account, copy_state, new_zap_stats
from ptebatch.semantics import LATEST, V6_8, V6_12, V6_14, V6_18
from ptebatch.zap import ZapStats, exit_mmap, munmap, zap_range

PAGE = 4096
BASE = 7 * L.ptrs_per_pte * PAGE


def attempt(call, mm: Mm, *args, **kwargs) -> ZapStats | tuple[type, str]:
    try:
        return call(mm, *args, **kwargs)
    except PtebatchError as error:
        return type(error), str(error)


def run_both(call, case, semantics, batching, counted, *args, **kwargs) -> None:
    core = build(case)
    if counted:
        count_rest(core, semantics)
    ref = copy_state(core)
    one = attempt(call, core, *args, semantics=semantics, batching=batching, impl="core", **kwargs)
    two = attempt(call, ref, *args, semantics=semantics, batching=batching, impl="reference", **kwargs)
    assert_same(core, ref, semantics)
    assert (one if isinstance(one, tuple) else one.to_dict()) == (two if isinstance(two, tuple) else two.to_dict())
    assert core.folios.reserve(5).tolist() == ref.folios.reserve(5).tolist()


@settings(max_examples=EXAMPLES // 8)
@given(
    cases(),
    kernels(),
    BATCHING,
    st.booleans(),
    st.integers(-3, 60),
    st.integers(0, 60),
    st.booleans(),
    st.booleans(),
    st.sampled_from(("error", "as_kernel")),
)
def test_zap_range_core_and_reference(case, semantics, batching, counted, first, nr, even_cows, drop, without_page):
    start = (case.vmas[0].start + first) * PAGE
    run_both(
        zap_range, case, semantics, batching, counted, start, start + nr * PAGE, even_cows=even_cows,
        drop_markers=drop, pfn_without_page=without_page,
    )  # fmt: skip


@settings(max_examples=EXAMPLES // 20)
@given(cases(), kernels(), BATCHING, st.booleans(), st.integers(-3, 60), st.integers(1, 60))
def test_munmap_core_and_reference(case, semantics, batching, counted, first, nr):
    start = (case.vmas[0].start + first) * PAGE
    run_both(munmap, case, semantics, batching, counted, start, start + nr * PAGE)


@settings(max_examples=EXAMPLES // 20)
@given(cases(), kernels(), BATCHING, st.booleans())
def test_exit_core_and_reference(case, semantics, batching, counted):
    run_both(exit_mmap, case, semantics, batching, counted)


@settings(max_examples=max(40, EXAMPLES // 20))
@given(cases(), kernels(), st.integers(0, 30), st.integers(0, 60))
def test_batching_changes_no_result(case, semantics, first, nr):
    one = build(case)
    count_rest(one, semantics)
    two = copy_state(one)
    start = (case.vmas[0].start + first) * PAGE
    results = []
    for mm, batching in ((one, None), (two, False)):
        results.append(attempt(zap_range, mm, start, start + nr * PAGE, semantics=semantics, batching=batching))
    if isinstance(results[0], tuple) or isinstance(results[1], tuple):
        assert results[0] == results[1]
        return
    assert_same(one, two, semantics)
    assert results[0].ptes_present == results[1].ptes_present == results[1].ptes_single
    assert results[0].folios_freed == results[1].folios_freed


def folio_state(folios: FolioTable) -> dict:
    """Everything fork and exit must give back: not PG_anon_exclusive, nor the dirty flag of file and hugetlb pages."""
    state = {}
    for head in folios.heads().tolist():
        folio = folios.folio(head)
        counts = folios.mapcounts(np.arange(head, head + folio.nr_pages)).tolist()
        slots = (sorted(folio.mm_ids), folio.maybe_mapped_shared) if folio.order else ()
        large = folio.large_mapcount, folio.entire_mapcount, folio.pincount
        state[head] = folio.refcount, *large, slots, counts, folio.dirty and folio.anon and not folio.hugetlb
    return state


@settings(max_examples=max(40, EXAMPLES // 20))
@given(cases(), kernels(), BATCHING)
def test_fork_then_exit_of_the_child_gives_everything_back(case, semantics, batching):
    mm = build(case)
    count_rest(mm, semantics)
    before, parent, present = folio_state(mm.folios), copy_state(mm), np.uint64(L.present_mask)
    try:
        child = fork(mm, semantics=semantics, batching=batching).child
    except PtebatchError:
        return
    if not np.array_equal(parent.entries & present == 0, mm.entries & present == 0):
        return  # an entry was made present, or a PMD split, and is counted otherwise since
    exit_mmap(child, semantics=semantics, batching=batching)
    after = folio_state(mm.folios)
    assert after == before
    assert child.rss.tolist() == [0, 0, 0, 0]
    assert mm.rss.tolist() == parent.rss.tolist()
    assert mm.folios.swap == parent.folios.swap
    # AE is only ever lost, and write permission too.
    pages = parent.folios.pages_table()["pfn"]
    assert not (mm.folios.flags(pages, "anon_exclusive") & ~parent.folios.flags(pages, "anon_exclusive")).any()


@settings(max_examples=max(40, EXAMPLES // 20))
@given(cases(), kernels(), BATCHING)
def test_exit_leaves_no_mapping(case, semantics, batching):
    mm = build(replace(case, folios=tuple(replace(spec, others=0) for spec in case.folios)))
    count_rest(mm, semantics)
    extra = {int(head): mm.folios.folio(int(head)).refcount for head in mm.folios.heads()}
    stats = attempt(exit_mmap, mm, semantics=semantics, batching=batching)
    if isinstance(stats, tuple):
        return
    assert stats.ptes_skipped == 0
    assert mm.rss.tolist() == [0, 0, 0, 0]
    assert (mm.vmas, mm.vpns.tolist(), mm.entries.size) == ([], [], 0)
    assert (mm.pmd_vpns.size, mm.pmd_entries.size, mm.huge_zero, mm.hugetlb_usage) == (0, 0, False, 0)
    for head in mm.folios.heads().tolist():
        folio = mm.folios.folio(head)
        assert folio.refcount <= extra[head]
        if semantics.large_mapcount:
            assert folio.large_mapcount == 0
        if not semantics.config.no_page_mapcount:
            assert not mm.folios.mapcounts(np.arange(head, head + folio.nr_pages)).any()
        if semantics.mm_id and folio.order:
            assert folio.mm_ids == ((0, 0), (0, 0))
            assert not folio.maybe_mapped_shared


# --- single behaviours ------------------------------------------------------------------------------------------------


def one_folio(order: int = 4, nr: int | None = None, *, vm_flags: int = PRIVATE, **spec) -> Mm:
    """A folio mapped from BASE on, all of it or its first nr pages, writable, young and dirty."""
    pages = 1 << order
    folio = FolioSpec(order, exclusive=(1 << pages) - 1, **spec)
    run = Run(0, 0, pages if nr is None else nr, L.write | L.young | L.dirty)
    mm = build(Case((folio,), (VmaSpec(BASE // PAGE, 32, vm_flags, True, False, (run,)),), False))
    count_rest(mm, LATEST)
    return mm


def test_part_of_a_shared_folio(impl_name):
    mm = one_folio()
    child = fork(mm, semantics=V6_18).child
    folio = mm.folios.folio(int(mm.folios.heads()[0]))
    stats = zap_range(child, BASE + 2 * PAGE, BASE + 5 * PAGE, semantics=V6_18, impl=impl_name)
    assert (stats.batches, stats.ptes_batched, stats.clear_ptes, stats.rmap_remove, stats.folio_put) == (1, 3, 1, 1, 1)
    assert (folio.refcount, folio.large_mapcount, folio.mm_ids) == (29, 29, ((mm.mm_id, 16), (child.mm_id, 13)))
    assert folio.maybe_mapped_shared
    assert mm.folios.mapcounts(np.arange(16) + folio.pfn).tolist() == [2, 2, 1, 1, 1] + [2] * 11
    assert child.rss[MM_ANONPAGES] == 13
    zap_range(child, BASE, BASE + 32 * PAGE, semantics=V6_18, impl=impl_name)
    assert (folio.refcount, folio.mm_ids, folio.maybe_mapped_shared) == (16, ((mm.mm_id, 16), (0, 0)), False)


def test_the_third_sharer_is_untracked(impl_name):
    mm = one_folio()
    folio = mm.folios.folio(int(mm.folios.heads()[0]))
    first = fork(mm, semantics=V6_18).child
    second = fork(mm, semantics=V6_18).child
    exit_mmap(mm, semantics=V6_18, impl=impl_name)
    assert folio.mm_ids == ((0, 0), (first.mm_id, 16))
    assert folio.maybe_mapped_shared
    exit_mmap(first, semantics=V6_18, impl=impl_name)
    # Nobody the slots know of is left, so nothing says that the last sharer has the folio for itself.
    assert (folio.large_mapcount, folio.mm_ids, folio.maybe_mapped_shared) == (16, ((0, 0), (0, 0)), True)
    exit_mmap(second, semantics=V6_18, impl=impl_name)
    assert len(mm.folios) == 0


def test_freed_pages_are_used_again(impl_name):
    folios = FolioTable()
    pfns = [folios.alloc() for _ in range(5)]
    vma = Vma(BASE, BASE + 8 * PAGE, PRIVATE)
    mm = Mm.for_vmas(L, folios, [vma])
    mm.fill(BASE, np.array([arch.mk_pte(L, pfn, L.valid | L.user | L.nx) for pfn in pfns], dtype=np.uint64))
    account(mm)
    zap_range(mm, BASE + PAGE, BASE + 3 * PAGE, impl=impl_name)
    assert [folios.alloc() for _ in range(3)] == [pfns[1], pfns[2], pfns[4] + 1]


def test_a_poisoned_page_is_not_used_again(impl_name):
    mm = one_folio(order=0, poisoned=1)
    pfn = int(mm.folios.heads()[0])
    assert zap_range(mm, BASE, BASE + PAGE, impl=impl_name).folios_freed == 0
    assert mm.folios.folio(pfn).refcount == 0


def test_file_pages_take_dirty_along(impl_name):
    mm = one_folio(anon=False, swapbacked=False, extra_refs=16, vm_flags=SHARED)
    folio = mm.folios.folio(int(mm.folios.heads()[0]))
    mm.set_pte(BASE, mm.pte(BASE) & ~(L.dirty | L.young))
    stats = zap_range(mm, BASE, BASE + 32 * PAGE, impl=impl_name)
    assert (stats.folio_mark_dirty, stats.folio_mark_accessed, folio.dirty) == (1, 1, True)
    assert mm.rss[MM_FILEPAGES] == 0
    quiet = one_folio(anon=False, swapbacked=False, extra_refs=16, vm_flags=SHARED | arch.VM_SEQ_READ)
    assert zap_range(quiet, BASE, BASE + PAGE, impl=impl_name).folio_mark_accessed == 0


def test_truncation_leaves_anonymous_pages(impl_name):
    mm = one_folio()
    before = mm.entries.copy()
    stats = zap_range(mm, BASE, BASE + 32 * PAGE, even_cows=False, impl=impl_name)
    assert (stats.ptes_skipped, stats.ptes_present) == (16, 0)
    assert np.array_equal(mm.entries, before)


@pytest.mark.parametrize(
    ("vm_ops", "drop", "left"),
    [(None, False, {"guard"}), (None, True, set()), ("shmem", False, {"uffd-wp", "guard"}), ("shmem", True, set())],
)
def test_markers(impl_name, vm_ops, drop, left):
    mm = Mm.for_vmas(L, FolioTable(), [Vma(BASE, BASE + 8 * PAGE, SHARED | arch.VM_UFFD_WP, vm_ops=vm_ops)])
    values = {"uffd-wp": 1, "poisoned": 2, "guard": 4}
    for at, value in enumerate(values.values()):
        mm.set_pte(BASE + at * PAGE, arch.swp_entry(L, arch.SWP_PTE_MARKER, value))
    zap_range(mm, BASE, BASE + 8 * PAGE, drop_markers=drop, semantics=V6_14, impl=impl_name)
    assert {name for at, name in enumerate(values) if mm.pte(BASE + at * PAGE)} == left
    # Before v6.13 nobody knew guards, and what is unknown goes.
    mm.set_pte(BASE, arch.swp_entry(L, arch.SWP_PTE_MARKER, 4))
    zap_range(mm, BASE, BASE + PAGE, drop_markers=drop, semantics=V6_12, impl=impl_name)
    assert mm.pte(BASE) == 0


@pytest.mark.parametrize(("vm_ops", "drop", "left"), [(None, False, 0), ("file", True, 0), ("file", False, 16)])
def test_uffd_wp_leaves_markers_in_file_mappings(impl_name, vm_ops, drop, left):
    mm = one_folio(anon=False, extra_refs=16, vm_flags=SHARED | arch.VM_UFFD_WP)
    mm.vmas[0].vm_ops = vm_ops
    mm.fill(BASE, mm.ptes(BASE, BASE + 16 * PAGE) & ~np.uint64(L.write) | np.uint64(L.uffd_wp))
    stats = zap_range(mm, BASE, BASE + 32 * PAGE, drop_markers=drop, impl=impl_name)
    marker = arch.swp_entry(L, arch.SWP_PTE_MARKER, arch.PTE_MARKER_UFFD_WP)
    assert stats.uffd_wp_markers == left
    assert mm.ptes(BASE, BASE + 32 * PAGE).tolist() == [marker] * left + [0] * (32 - left)


def test_munmap_splits_a_vma_and_frees_tables(impl_name):
    table = L.ptrs_per_pte * PAGE
    file = Vma(BASE, BASE + 3 * table, PRIVATE, vm_ops="file", pgoff=100)
    mm = Mm.for_vmas(L, FolioTable(), [file, Vma(BASE + 3 * table, BASE + 4 * table, PRIVATE)])
    stats = munmap(mm, BASE + table // 2, BASE + 2 * table + PAGE, impl=impl_name)
    assert [(v.start - BASE, v.end - BASE, v.pgoff) for v in mm.vmas] == [
        (0, table // 2, 100),
        (2 * table + PAGE, 3 * table, 100 + 2 * 512 + 1),
        (3 * table, 4 * table, 0),
    ]
    assert stats.tables_freed == 1
    assert (mm.vpns * PAGE - BASE).tolist() == [0, 2 * table, 3 * table]
    # A table goes with the last VMA in it.
    assert munmap(mm, BASE + 2 * table + PAGE, BASE + 3 * table, impl=impl_name).tables_freed == 1
    assert munmap(mm, 0, BASE, impl=impl_name).tables_freed == 0
    assert exit_mmap(mm, impl=impl_name).tables_freed == 2
    mm.validate(entries=True)


TABLE = L.ptrs_per_pte * PAGE


def huge(vm_ops: str | None = None, **flags: bool) -> Mm:
    """A PMD leaf from BASE on, in a VMA that has a page more on either side."""
    mm = Mm(L, FolioTable(), vmas=[Vma(BASE - PAGE, BASE + TABLE + PAGE, PRIVATE, vm_ops=vm_ops)])
    mm.folios.add(512, 9, refcount=1, entire_mapcount=1, anon=vm_ops is None, **flags)
    mm.folios.folio(512).set_mm_ids(((mm.mm_id, 1), (0, 0)))
    mm.pmd_vpns = np.array([BASE // PAGE], dtype=np.int64)
    mm.pmd_entries = np.array([arch.mk_pte(L, 512, L.valid | L.user | L.huge | L.dirty | L.write)], dtype=np.uint64)
    mm.rss[MM_ANONPAGES if vm_ops is None else MM_FILEPAGES] = 512
    return mm


def test_a_whole_pmd_leaf_goes_with_its_deposited_table(impl_name):
    mm = huge()
    stats = zap_range(mm, BASE, BASE + TABLE, impl=impl_name)
    assert (stats.pmds_zapped, stats.pmds_split, stats.tables_freed, stats.ptes_present) == (1, 0, 1, 0)
    assert (mm.rss.tolist(), mm.pmd_vpns.size, mm.vpns.size, len(mm.folios)) == ([0, 0, 0, 0], 0, 0, 0)


def test_a_pmd_leaf_in_part_is_split_first(impl_name):
    mm = huge(anon_exclusive=[True] + [False] * 511)
    stats = zap_range(mm, BASE + 8 * PAGE, BASE + TABLE, impl=impl_name)
    assert (stats.pmds_split, stats.pmds_zapped, stats.ptes_batched, stats.tables_freed) == (1, 0, 504, 0)
    folio = mm.folios.folio(512)
    assert (folio.refcount, folio.entire_mapcount, folio.large_mapcount, folio.mm_ids[0]) == (8, 0, 8, (mm.mm_id, 8))
    assert mm.rss[MM_ANONPAGES] == 8
    assert folio.dirty
    assert mm.ptes(BASE, BASE + TABLE).astype(bool).tolist() == [True] * 8 + [False] * 504
    assert mm.folios.flags(np.arange(512, 520), "anon_exclusive").all()
    # munmap cuts the VMA there; the page table stays with what is left of it.
    mm = huge()
    stats = munmap(mm, BASE + PAGE, BASE + TABLE + PAGE, impl=impl_name)
    assert (stats.pmds_split, stats.tables_freed, mm.rss[MM_ANONPAGES], mm.vpns.size) == (1, 0, 1, 1)
    assert exit_mmap(mm, impl=impl_name).tables_freed == 1
    assert (len(mm.folios), mm.rss.tolist()) == (0, [0, 0, 0, 0])


@pytest.mark.parametrize("pages", [100, 512])
def test_pmd_leaves_of_files_go_whole(impl_name, pages):
    mm = huge("file", swapbacked=False)
    mm.folios.folio(512).refcount += 512  # the page cache
    stats = zap_range(mm, BASE, BASE + pages * PAGE, impl=impl_name)
    assert (stats.pmds_zapped, stats.pmds_split) == ((1, 0) if pages == 512 else (0, 1))
    folio = mm.folios.folio(512)
    assert (folio.refcount, folio.entire_mapcount, folio.large_mapcount) == (512, 0, 0)
    assert (mm.rss.tolist(), mm.pmd_vpns.size, stats.tables_freed) == ([0, 0, 0, 0], 0, 0)
    assert folio.dirty == (pages != 512)  # only a split takes the dirty state of the entry along


def test_hugetlb(impl_name):
    mm = huge(hugetlb=True)
    mm.folios.folio(512).set_mm_ids(((0, 0), (0, 0)))
    mm.vmas = [Vma(BASE, BASE + TABLE, PRIVATE | arch.VM_HUGETLB | arch.VM_UFFD_WP, vm_ops="hugetlb")]
    mm.rss[:], mm.hugetlb_usage = 0, 512
    before = copy_state(mm)
    with pytest.raises(ArgumentError, match="cuts the hugetlb page"):
        zap_range(mm, BASE, BASE + PAGE, impl=impl_name)
    assert (mm.folios == before.folios, mm.hugetlb_usage) == (True, 512)
    mm.pmd_entries[0] = int(mm.pmd_entries[0]) & ~L.write | L.uffd_wp
    stats = zap_range(mm, BASE, BASE + TABLE, impl=impl_name)
    assert (stats.hugetlb_entries, mm.hugetlb_usage, len(mm.folios), mm.rss.tolist()) == (1, 0, 0, [0, 0, 0, 0])
    assert mm.pmd_entries.tolist() == [arch.swp_entry(L, arch.SWP_PTE_MARKER, arch.PTE_MARKER_UFFD_WP)]
    munmap(mm, BASE, BASE + TABLE, impl=impl_name)
    assert mm.pmd_vpns.size == 0


def test_munmap_drops_markers(impl_name):
    vmas = [Vma(BASE, BASE + 4 * PAGE, SHARED, vm_ops="shmem"), Vma(BASE + 4 * PAGE, BASE + 8 * PAGE, PRIVATE)]
    mm = Mm.for_vmas(L, FolioTable(), vmas)
    mm.set_pte(BASE, arch.swp_entry(L, arch.SWP_PTE_MARKER, arch.PTE_MARKER_GUARD))
    assert munmap(mm, BASE, BASE + 4 * PAGE, impl=impl_name).pte_markers == 1
    mm.validate(entries=True)


def test_pmd_leaves_that_are_not_counted(impl_name):
    for name in ("refcount", "entire_mapcount", "large_mapcount"):
        mm = huge()
        setattr(mm.folios.folio(512), name, 0)
        before = copy_state(mm)
        for end in (TABLE, PAGE):
            with pytest.raises(StateError, match="counts do not say so"):
                zap_range(mm, BASE, BASE + end, impl=impl_name)
        assert mm.folios == before.folios
        assert (mm.rss.tolist(), mm.pmd_entries.tolist()) == (before.rss.tolist(), before.pmd_entries.tolist())


def test_unbatched_kernels_go_one_by_one(impl_name):
    stats = zap_range(one_folio(), BASE, BASE + 32 * PAGE, semantics=V6_8, impl=impl_name)
    assert (stats.batches, stats.ptes_single, stats.folio_put) == (16, 16, 16)
    with pytest.raises(SemanticsError, match="zap_batching"):
        zap_range(one_folio(), BASE, BASE + PAGE, semantics=V6_8, batching=True, impl=impl_name)
    # Forking in batches is another switch.
    only_zap = V6_8.replace(zap_batching=True)
    assert zap_range(one_folio(), BASE, BASE + 32 * PAGE, semantics=only_zap, impl=impl_name).batches == 1


def test_counts_that_are_too_low_are_refused(impl_name):
    for name in ("refcount", "large_mapcount", "mapcount"):
        mm = one_folio()
        folio = mm.folios.folio(int(mm.folios.heads()[0]))
        if name == "mapcount":
            mm.folios.page(folio.pfn + 15).mapcount = 0
        else:
            setattr(folio, name, 15)
        before, entries = mm.folios.copy(), mm.entries.copy()
        with pytest.raises(StateError, match=f"PFN {folio.pfn:#x} at address {BASE:#x}: its mapcount"):
            zap_range(mm, BASE, BASE + 32 * PAGE, impl=impl_name)
        assert mm.folios == before
        assert np.array_equal(mm.entries, entries)
    mm = one_folio()
    mm.set_pte(BASE + 20 * PAGE, arch.swp_entry(L, 0, 7))
    with pytest.raises(StateError, match="swap slot 0:0x7"):
        zap_range(mm, BASE + 20 * PAGE, BASE + 21 * PAGE, impl=impl_name)


def test_nothing_changes_if_an_entry_is_refused(impl_name):
    for value, error in ((arch.mk_pte(L, 1 << 30, L.valid), PfnError), (arch.swp_entry(L, 25, 1 << 20), PfnError)):
        mm = one_folio()
        mm.set_pte(BASE + 31 * PAGE, value)
        before = copy_state(mm)
        for call, args in ((munmap, (BASE, BASE + 32 * PAGE)), (exit_mmap, ())):
            with pytest.raises(error):
                call(mm, *args, impl=impl_name)
            assert mm.folios == before.folios
            assert np.array_equal(mm.entries, before.entries)
            assert mm.vmas == before.vmas


def test_bad_arguments(impl, impl_name):
    mm = one_folio()
    for start, end in ((BASE + 1, BASE + PAGE), (BASE + PAGE, BASE), (-PAGE, BASE)):
        with pytest.raises(ArgumentError):
            zap_range(mm, start, end, impl=impl_name)
    with pytest.raises(ArgumentError, match="nothing to unmap"):
        munmap(mm, BASE, BASE, impl=impl_name)
    with pytest.raises(ArgumentError, match="pfn_without_page"):
        zap_range(mm, BASE, BASE + PAGE, pfn_without_page="x", impl=impl_name)
    row = mm.entries[0]
    with pytest.raises(ArgumentError, match="not present; clear_full_ptes"):
        impl.clear_full_ptes(row, 16, 1, layout=L)
    swapped = row.copy()
    swapped[0], swapped[1] = row[1], row[0]
    with pytest.raises(ArgumentError, match="does not map the page after"):
        impl.get_and_clear_full_ptes(swapped, 0, 2, layout=L)
    with pytest.raises(ArgumentError, match="stats"):
        impl.zap_range(mm, BASE, BASE + PAGE, semantics=LATEST, batching=True, stats=np.zeros(3, dtype=np.int64))
    with pytest.raises(ArgumentError, match="rss"):
        impl.zap_range(
            replace_rss(mm), BASE, BASE + PAGE, semantics=LATEST, batching=True, stats=new_zap_stats(L)
        )


def replace_rss(mm: Mm) -> Mm:
    other = copy_state(mm)
    other.rss = np.zeros(3, dtype=np.int64)
    return other


def test_stats_are_plain_numbers():
    stats = zap_range(one_folio(), BASE, BASE + 32 * PAGE)
    data = stats.to_dict()
    assert data["batch_hist"] == {"16": 1}
    assert data["folios_freed"] == 1
    assert stats == replace(stats)
    assert stats != replace(stats, tables_freed=1)
