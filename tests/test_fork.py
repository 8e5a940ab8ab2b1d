"""fork() as a whole: what fails midway, allocation by allocation, and leaves above the page tables."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import build, cases, count_rest, kernels

from ptebatch import arch, workload
from ptebatch.errors import ArgumentError, ForkError, PtebatchError, StateError
from ptebatch.folio import FolioTable
from ptebatch.fork import ForkPlan, ForkStats, fork
from ptebatch.mm import Mm, Vma, account, copy_state, digest
from ptebatch.pmd import split_huge_pmd
from ptebatch.semantics import V6_18, V6_19
from ptebatch.swap import swap_key
from ptebatch.zap import exit_mmap, munmap, zap_range

L = arch.X86_64
NR = L.ptrs_per_pte
PMD = NR << L.page_shift
EXAMPLES = {"small": 40, "ci": 2_000}.get(os.environ.get("HYPOTHESIS_PROFILE", "default"), 200)
PRIVATE = arch.VM_READ | arch.VM_WRITE | arch.VM_MAYREAD | arch.VM_MAYWRITE | arch.VM_SOFTDIRTY
RW = 0x80000000000000E7  # P RW US A D PSE NX


def everything(mm: Mm) -> dict[int, int]:
    """All entries of both pools by virtual page number."""
    row, idx = np.nonzero(mm.entries)
    vpns = [*(mm.vpns[row] + idx).tolist(), *mm.pmd_vpns.tolist()]
    return dict(zip(vpns, [*mm.entries[row, idx].tolist(), *mm.pmd_entries.tolist()], strict=True))


def counts(mm: Mm) -> dict[str, object]:
    """What a fork that failed gives back: every count, of all there is."""
    table = mm.folios.pages_table()
    heads = mm.folios.heads().tolist()
    folios = [mm.folios.folio(head) for head in heads]
    return {
        "pages": table["pfn"].tolist(),
        "mapcounts": mm.folios.mapcounts(table["pfn"]).tolist(),
        "folios": [(f.refcount, f.large_mapcount, f.entire_mapcount, f.pincount) for f in folios],
        "slots": [sorted(f.mm_ids) for f in folios if f.order],
        "swap": [column.tolist() for column in mm.folios.swap.table()],
        "rss": mm.rss.tolist(),
    }


@settings(max_examples=EXAMPLES)
@given(cases(), kernels(), st.sampled_from((None, False)), st.data())
def test_a_failed_fork_is_a_prefix_and_an_exit(case, semantics, batching, data):
    core = build(case)
    count_rest(core, semantics)
    before, whole = copy_state(core), copy_state(core)
    try:
        result = fork(whole, semantics=semantics, batching=batching)
    except PtebatchError:
        assume(False)
    fail_at = data.draw(st.integers(0, result.allocations - 1), label="fail_at")
    ref = copy_state(core)
    messages = []
    for mm, impl in ((core, "core"), (ref, "reference")):
        with pytest.raises(ForkError) as caught:
            fork(mm, semantics=semantics, batching=batching, impl=impl, fail_at=fail_at)
        assert caught.value.errno == errno.ENOMEM
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert digest([core], core.folios, semantics) == digest([ref], ref.folios, semantics)

    # The parent is as after a whole fork up to some address, and untouched from there on.
    old, new, got = everything(before), everything(whole), everything(core)
    changed = [vpn for vpn in sorted(old.keys() | new.keys()) if old.get(vpn) != new.get(vpn)]
    done = [vpn for vpn in changed if got.get(vpn) != old.get(vpn)]
    assert done == changed[: len(done)]
    assert all(got.get(vpn) == new.get(vpn) for vpn in done)
    assert all(got[vpn] == old[vpn] for vpn in old.keys() - set(changed))

    # Counts are what they were; a split PMD and restored device-exclusive entries count differently from now on.
    restored = result.stats.device_exclusive_entries and not semantics.single_device_exclusive
    if not restored and len(core.vpns) == len(before.vpns):
        assert counts(core) == counts(before)


def test_no_allocation_fails_beyond_the_last(impl_name):
    mm = workload.make(size="8MiB", folio="64KiB", swap=0.1, holes=0.1, vmas=3)
    allocations = fork(copy_state(mm), impl=impl_name).allocations
    assert allocations == 1 + 3 + len(mm.vpns) + 1
    again = fork(mm, impl=impl_name, fail_at=allocations)
    assert again.allocations == allocations
    for bad in (-1, 1.0, True, "0"):
        with pytest.raises(ArgumentError, match="fail_at"):
            fork(mm, impl=impl_name, fail_at=bad)


def test_a_table_that_two_vmas_share_is_allocated_once(impl_name):
    vmas = [Vma(PMD + k * 0x1000, PMD + (k + 1) * 0x1000, PRIVATE | (arch.VM_LOCKED * (k & 1))) for k in range(3)]
    mm = Mm.for_vmas(L, FolioTable(), vmas)
    mm.set_pte(PMD, arch.swp_entry(L, 0, 1))
    account(mm)
    assert fork(copy_state(mm), impl=impl_name).allocations == 1 + 3 + 1 + 1
    with pytest.raises(ForkError, match="before VMA 0x201000-0x202000"):
        fork(mm, impl=impl_name, fail_at=3)
    assert mm.folios.swap.count(0, 1) == 1


def test_every_allocation_of_a_pinned_folio(impl_name):
    """A page for every round; the failed one and all after it stay the parent's alone."""
    folios = FolioTable()
    folios.add(0x100, 4, pincount=1)
    mm = Mm.for_vmas(L, folios, [Vma(PMD, 2 * PMD, PRIVATE)])
    mm.has_pinned = True
    mm.fill(PMD, np.array([(0x100 + k) << 12 | 0x8000000000000067 for k in range(16)], dtype=np.uint64))
    account(mm)
    folios.folio(0x100).refcount += 1
    before = copy_state(mm)
    assert fork(copy_state(mm), impl=impl_name).allocations == 1 + 1 + 1 + 16 + 1
    for fail_at in range(20):
        with pytest.raises(ForkError):
            fork(mm, impl=impl_name, fail_at=fail_at)
        assert everything(mm) == everything(before)
        assert mm.folios == before.folios


@pytest.mark.parametrize(("poisoned", "locked"), [(True, False), (False, True)])
def test_failures_that_are_not_of_memory(impl_name, poisoned, locked):
    folios = FolioTable()
    folios.add(0x200, refcount=1, mapcount=1, anon_exclusive=True)
    folios.add(0x201, refcount=2000, mapcount=1, anon_exclusive=True)
    folios.page(0x201).hwpoison = poisoned
    folios.folio(0x201).locked = locked
    mm = Mm.for_vmas(L, folios, [Vma(PMD, 2 * PMD, PRIVATE)])
    mm.has_pinned = True
    entry = arch.swp_entry(L, 30, 0x201) if locked else 0x201067
    mm.fill(PMD, np.array([0x200067, entry, 0x200067], dtype=np.uint64))
    with pytest.raises(ForkError, match=r"copying VMA 0x200000-0x400000 \(ENOMEM\)") as caught:
        fork(mm, semantics=V6_18, impl=impl_name)
    assert caught.value.errno == errno.ENOMEM
    assert (folios.folio(0x200).refcount, folios.page(0x200).mapcount) == (1, 1)
    assert not folios.page(0x200).anon_exclusive
    assert not arch.pte_write(L, mm.pte(PMD))
    assert [mm.pte(PMD + 0x1000), mm.pte(PMD + 0x2000)] == [entry, 0x200067]


def test_a_swap_map_that_cannot_grow(impl_name):
    mm = Mm.for_vmas(L, FolioTable(), [Vma(PMD, 2 * PMD, PRIVATE)])
    mm.fill(PMD, np.array([arch.swp_entry(L, 0, k) | L.swp_exclusive for k in range(3)], dtype=np.uint64))
    mm.folios.swap.add([swap_key(0, k) for k in range(3)])
    mm.folios.swap.add([swap_key(0, 1)], 61)
    with pytest.raises(ForkError):
        fork(mm, impl=impl_name, fail_at=3)
    assert [mm.folios.swap.count(0, k) for k in range(3)] == [1, 62, 1]
    exclusive = [arch.pte_swp_exclusive(L, mm.pte(PMD + k * 0x1000)) for k in range(3)]
    assert exclusive == [False, True, True]


# --- leaves -----------------------------------------------------------------------------------------------------------


def huge(**state: object) -> Mm:
    folios = FolioTable()
    folios.add(0x400, 9, **{"refcount": 1, "entire_mapcount": 1, **state})  # type: ignore[arg-type]
    folios.page(0x400).anon_exclusive = not state
    mm = Mm(
        L,
        folios,
        vmas=[Vma(PMD, 3 * PMD, PRIVATE)],
        pmd_vpns=np.array([NR], dtype=np.int64),
        pmd_entries=np.array([0x400 << 12 | RW], dtype=np.uint64),
    )
    mm.rss[1] = NR
    if not folios.folio(0x400).hugetlb:
        folios.folio(0x400).set_mm_ids(((mm.mm_id, 1), (0, 0)))
    return mm


def test_split_then_unmap_is_unmap():
    one, two = huge(), huge()
    split_huge_pmd(one, PMD + 0x5000, semantics=V6_18)
    assert len(one.pmd_vpns) == 0
    assert len(one.vpns) == 1
    assert one.folios.folio(0x400).mm_ids == ((one.mm_id, NR), (0, 0))
    for mm in (one, two):
        exit_mmap(mm, semantics=V6_18)
        assert len(mm.folios) == 0
        assert not mm.rss.any()


def test_unmapping_a_part_splits():
    mm = huge()
    munmap(mm, PMD + 0x1000, PMD + 0x3000, semantics=V6_18)
    folio = mm.folios.folio(0x400)
    assert (folio.refcount, folio.large_mapcount, folio.entire_mapcount) == (NR - 2, NR - 2, 0)
    assert mm.rss.tolist() == [0, NR - 2, 0, 0]
    assert [len(mm.pmd_vpns), mm.pte(PMD + 0x1000)] == [0, 0]
    assert mm.pte(PMD) & 0xFFF == 0x867


@pytest.mark.parametrize("order", [9, 18])
def test_hugetlb_of_either_size(order):
    nr = 1 << order
    folios = FolioTable()
    folios.add_folios([nr], order, hugetlb=True)
    folio = folios.folio(nr)
    folio.refcount = folio.entire_mapcount = folio.large_mapcount = 1
    folios.page(nr).anon_exclusive = True
    start = nr << L.page_shift
    mm = Mm(
        L,
        folios,
        vmas=[Vma(start, 2 * start, PRIVATE | arch.VM_HUGETLB, vm_ops="hugetlb")],
        pmd_vpns=np.array([nr], dtype=np.int64),
        pmd_entries=np.array([nr << 12 | RW], dtype=np.uint64),
        hugetlb_usage=nr,
    )
    child = fork(mm, semantics=V6_18).child
    assert (child.hugetlb_usage, child.rss.sum()) == (nr, 0)
    assert (folio.refcount, folio.entire_mapcount, folios.page(nr).anon_exclusive) == (2, 2, False)
    with pytest.raises(ArgumentError, match="cuts the hugetlb page"):
        zap_range(child, start, start + 0x1000, semantics=V6_18)
    exit_mmap(child, semantics=V6_18)
    assert (child.hugetlb_usage, folio.refcount, folio.entire_mapcount) == (0, 1, 1)
    mm.has_pinned, folio.pincount = True, 1
    folios.page(nr).anon_exclusive = True
    child = fork(mm, semantics=V6_18).child
    assert folios.folio(arch.pte_pfn(L, int(child.pmd_entries[0]))).order == order
    assert (folio.refcount, folio.entire_mapcount) == (1, 1)
    exit_mmap(child, semantics=V6_18)
    assert len(folios) == nr


def test_split_of_the_huge_zero_page():
    folios = FolioTable()
    folios.huge_zero_pfn = 0x800
    value = 0x800 << 12 | 0x80000000000002A5
    mm = Mm(L, folios, vmas=[Vma(PMD, 2 * PMD, PRIVATE)])
    mm.pmd_vpns, mm.pmd_entries = np.array([NR], dtype=np.int64), np.array([value], dtype=np.uint64)
    with pytest.raises(StateError, match="zero_pfn"):
        split_huge_pmd(mm, PMD)
    folios.zero_pfn = 0x77
    split_huge_pmd(mm, PMD)
    assert set(mm.entries.reshape(-1).tolist()) == {0x77 << 12 | 0x8000000000000225}


def test_split_of_a_migration_entry():
    mm = huge()
    mm.pmd_entries[0] = arch.swp_entry(L, 26, 0x400 | 1 << 34) | L.swp_soft_dirty
    split_huge_pmd(mm, PMD, semantics=V6_18)
    assert mm.pte(PMD + 7 * 0x1000) == arch.swp_entry(L, 26, 0x407 | 1 << 34) | L.swp_soft_dirty
    assert mm.rss.tolist() == [0, NR, 0, 0]


def test_split_of_a_file_page_unmaps_it():
    mm = huge(anon=False, swapbacked=True, refcount=2)
    mm.vmas[0].vm_ops, mm.rss = "shmem", np.array([0, 0, 0, NR], dtype=np.int64)
    split_huge_pmd(mm, PMD, semantics=V6_18)
    assert (mm.rss.tolist(), len(mm.vpns), len(mm.pmd_vpns)) == ([0, 0, 0, 0], 0, 0)
    folio = mm.folios.folio(0x400)
    assert (folio.refcount, folio.entire_mapcount, folio.dirty) == (1, 0, True)


@pytest.mark.parametrize("addr", [0, 2 * PMD, 5 * PMD])
def test_split_needs_a_leaf(addr):
    with pytest.raises(ArgumentError, match="no PMD leaf"):
        split_huge_pmd(huge(), addr)


def test_a_plan_can_be_run_again_after_a_split(impl_name):
    mm = huge(refcount=2, pincount=1)
    mm.folios.page(0x400).anon_exclusive = True
    mm.has_pinned = True
    before = digest([mm], mm.folios, V6_19)
    plan = ForkPlan(mm, semantics=V6_19, impl=impl_name, keep=True)
    after = []
    for _ in range(2):
        assert plan.run().pmds_split == 1
        after.append(digest([mm, plan.child], mm.folios, V6_19))
        plan.reset()
        assert digest([mm], mm.folios, V6_19) == before
    assert after[0] == after[1]


def test_the_id_of_a_child_is_not_given_again_when_its_plan_is_reset(impl_name):
    mm = workload.make(size="1MiB", folio="64KiB")
    first = ForkPlan(mm, semantics=V6_18, impl=impl_name, keep=True)
    first.run()
    first.reset()
    second = ForkPlan(mm, semantics=V6_18, impl=impl_name)
    assert len({mm.mm_id, first.child.mm_id, second.child.mm_id}) == 3


def test_every_vma_is_reported_with_its_own_counts(impl_name):
    mm = workload.make(size="12MiB", folio="4KiB+2MiB", pmd=1, swap=0.1, vmas=2)
    seen = []
    stats = ForkPlan(mm, semantics=V6_18, impl=impl_name).run(lambda vma, counts: seen.append((vma, counts)))
    assert [vma.start for vma, _ in seen] == [vma.start for vma in mm.vmas]
    own = [ForkStats.from_array(counts) for _, counts in seen]
    for name in ("ptes_present", "swap_entries", "pmds_copied", "tables_deposited", "folio_ref_add"):
        assert sum(getattr(one, name) for one in own) == getattr(stats, name) > 0
