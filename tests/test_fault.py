"""Faults after a fork: the golden sequences, and the values each kind of fault leaves behind."""

from __future__ import annotations

import numpy as np
import pytest
from sequences import BASE, PAGE, PRIVATE, Model, run, vectors

from ptebatch import arch
from ptebatch.arch import X86_64 as L
from ptebatch.errors import AccessError, ArgumentError, PfnError, StateError, UnsupportedEntryError
from ptebatch.fault import ZERO_PFN, touch
from ptebatch.folio import FolioTable
from ptebatch.fork import fork
from ptebatch.mm import MM_ANONPAGES, MM_FILEPAGES, Mm, Vma, account, copy_state
from ptebatch.pmd import pmd_pfn
from ptebatch.semantics import V6_8, V6_12, V6_14, V6_18
from ptebatch.zap import exit_mmap

RO = L.valid | L.user | L.young | L.nx


@pytest.mark.parametrize("vector", [pytest.param(v, id=v["name"]) for v in vectors()])
def test_golden_sequence(impl_name, vector):
    model = Model(vector, impl_name)
    steps = [step for step, _ in run(vector, model)]
    assert steps == vector["steps"]
    for mm in model.mms.values():
        mm.validate(entries=True)


def mapped(*ptes: int, vm_flags: int = PRIVATE, vm_ops: str | None = None, folios: FolioTable | None = None) -> Mm:
    """An Mm with these entries from BASE on; accounts for what they map."""
    vma = Vma(BASE, BASE + 32 * PAGE, vm_flags, vm_ops=vm_ops)
    mm = Mm.for_vmas(L, FolioTable() if folios is None else folios, [vma])
    mm.fill(BASE, np.array(ptes, dtype=np.uint64))
    account(mm)
    return mm


def shared_page(order: int = 0, **folio: bool) -> Mm:
    """A page, read-only and not exclusive, with a second mapping elsewhere."""
    folios = FolioTable()
    folios.add_folios([64], order, **folio)
    mm = mapped(*(arch.mk_pte(L, 64 + k, RO) for k in range(1 << order)), folios=folios)
    folios.map_ptes(np.arange(64, 64 + (1 << order)), mm_id=99)
    for k in range(1 << order):
        folios.page(64 + k).anon_exclusive = False
    return mm


# --- what is written --------------------------------------------------------------------------------------------------


def test_read_maps_the_zero_page():
    mm = Mm(L, FolioTable(), vmas=[Vma(BASE, BASE + 4 * PAGE, PRIVATE, anon_vma=False)])
    result = touch(mm, BASE + 5, "read", orders=[4])
    assert (result.action, result.pfn, result.nr, result.faulted) == ("zero_page", ZERO_PFN, 1, True)
    assert mm.pte(BASE) == RO | L.special
    assert (mm.rss.tolist(), len(mm.folios), mm.vmas[0].anon_vma) == ([0, 0, 0, 0], 0, False)
    mm.folios.zero_pfn = 0x42
    assert touch(mm, BASE + PAGE, "read").pfn == 0x42
    assert touch(mm, BASE, "read").action == "hardware"


@pytest.mark.parametrize("order", [0, 2, 4])
def test_write_maps_a_new_folio(order):
    mm = Mm(L, FolioTable(), vmas=[Vma(BASE, BASE + 32 * PAGE, PRIVATE, anon_vma=False)])
    nr = 1 << order
    result = touch(mm, BASE + (nr + 1) * PAGE, "write", orders=[order] if order else [])
    assert (result.action, result.nr) == ("anon_page", nr)
    assert (mm.rss[MM_ANONPAGES], mm.vmas[0].anon_vma) == (nr, True)
    folio = mm.folios.folio(result.pfn)
    assert (folio.order, folio.refcount, folio.large_mapcount, folio.anon, folio.dirty) == (order, nr, nr, True, False)
    start = BASE + (nr if order else 2) * PAGE
    want = [arch.mk_pte(L, folio.pfn + k, RO | L.write | L.dirty | L.soft_dirty) for k in range(nr)]
    assert mm.ptes(start, start + nr * PAGE).tolist() == want
    for k in range(nr):
        assert (mm.folios.page(folio.pfn + k).mapcount, mm.folios.page(folio.pfn + k).anon_exclusive) == (1, True)
    if order:
        assert folio.mm_ids == ((mm.mm_id, nr), (0, 0))
        assert not folio.maybe_mapped_shared


@pytest.mark.parametrize("flag", [arch.VM_NOHUGEPAGE, arch.VM_UFFD_WP])
def test_vmas_without_large_folios(flag):
    mm = Mm(L, FolioTable(), vmas=[Vma(BASE, BASE + 32 * PAGE, PRIVATE | flag)])
    assert touch(mm, BASE, "write", orders=[2, 4]).nr == 1


def test_reuse_keeps_the_page_and_most_of_the_entry():
    folios = FolioTable()
    folios.add_folios([64], 0)
    mm = mapped(arch.mk_pte(L, 64, (RO & ~L.young) | 1 << 59), folios=folios)
    before = copy_state(mm)
    assert touch(mm, BASE, "write").action == "reuse"
    assert mm.pte(BASE) == arch.mk_pte(L, 64, RO | L.write | L.dirty | L.soft_dirty | 1 << 59)
    assert (mm.folios == before.folios, mm.rss.tolist()) == (True, before.rss.tolist())
    # SavedDirty becomes D again.
    mm.set_pte(BASE, arch.mk_pte(L, 64, RO | L.saved_dirty))
    touch(mm, BASE, "write")
    assert mm.pte(BASE) == arch.mk_pte(L, 64, RO | L.write | L.dirty | L.soft_dirty)


@pytest.mark.parametrize("order", [0, 4])
def test_copy(impl_name, order):
    mm = shared_page(order)
    nr, old = 1 << order, mm.folios.folio(64)
    mm.set_pte(BASE, mm.pte(BASE) | L.uffd_wp | 5 << 59)
    result = touch(mm, BASE, "write", impl=impl_name)
    assert (result.action, result.nr) == ("copy", 1)
    assert mm.pte(BASE) == arch.mk_pte(L, result.pfn, RO | L.write | L.dirty | L.soft_dirty)
    new = mm.folios.folio(result.pfn)
    assert (new.order, new.refcount, mm.folios.page(new.pfn).mapcount, new.anon, new.dirty) == (0, 1, 1, True, False)
    assert mm.folios.page(new.pfn).anon_exclusive
    assert (mm.rss[MM_ANONPAGES], old.refcount, old.large_mapcount) == (nr, 2 * nr - 1, 2 * nr - 1)
    assert (mm.folios.page(64).mapcount, mm.folios.page(64).anon_exclusive) == (1, False)
    if order:
        assert old.mm_ids == ((mm.mm_id, nr - 1), (99, nr))
        assert old.maybe_mapped_shared


def test_the_last_mapping_of_a_copied_folio_frees_it():
    mm = Mm(L, FolioTable(), vmas=[Vma(BASE, BASE + 32 * PAGE, PRIVATE)])
    head = touch(mm, BASE, "write", orders=[2]).pfn
    exit_mmap(fork(mm, semantics=V6_12).child, semantics=V6_12)
    pfns = [touch(mm, BASE + k * PAGE, "write", semantics=V6_12).pfn for k in range(4)]
    assert mm.folios.heads().tolist() == sorted(pfns)
    assert head not in mm.folios
    assert mm.rss[MM_ANONPAGES] == 4


def test_copy_of_file_and_zero_pages():
    folios = FolioTable()
    folios.add(64, 0, anon=False, refcount=1)
    zero = RO | L.special
    mm = mapped(arch.mk_pte(L, 64, RO), zero, vm_ops="file", folios=folios)
    mm.vmas[0].anon_vma = False
    assert mm.rss[MM_FILEPAGES] == 1
    assert touch(mm, BASE, "write").action == touch(mm, BASE + PAGE, "write").action == "copy"
    assert (mm.rss[MM_FILEPAGES], mm.rss[MM_ANONPAGES], mm.vmas[0].anon_vma) == (0, 2, True)
    assert (folios.folio(64).refcount, folios.page(64).mapcount) == (1, 0)


def test_ksm_pages_are_never_reused():
    folios = FolioTable()
    folios.add_folios([64], 0, ksm=True)
    mm = mapped(arch.mk_pte(L, 64, RO), folios=folios)
    folios.page(64).anon_exclusive = False
    assert touch(mm, BASE, "write").action == "copy"
    assert mm.rss[MM_ANONPAGES] == 1


def test_a_stray_reference_copies():
    for order in (0, 4):
        mm = Mm(L, FolioTable(), vmas=[Vma(BASE, BASE + 32 * PAGE, PRIVATE)])
        touch(mm, BASE, "write", orders=[order] if order else [])
        exit_mmap(fork(mm).child)
        mm.folios.folio(arch.pte_pfn(L, mm.pte(BASE))).refcount += 1
        assert touch(mm, BASE, "write", semantics=V6_18).action == "copy"


def test_shared_mappings_are_written_in_place():
    flags = PRIVATE | arch.VM_SHARED | arch.VM_MAYSHARE
    folios = FolioTable()
    folios.add(64, 0, anon=False, refcount=1)
    mm = mapped(arch.mk_pte(L, 64, RO), RO | L.special, vm_flags=flags, vm_ops="file", folios=folios)
    assert touch(mm, BASE, "write").action == touch(mm, BASE + PAGE, "write").action == "reuse"
    assert folios.folio(64).dirty
    assert arch.pte_write(L, mm.pte(BASE))
    assert (folios.folio(64).refcount, mm.rss[MM_FILEPAGES]) == (2, 1)
    with pytest.raises(UnsupportedEntryError, match="file or shared mapping"):
        touch(mm, BASE + 2 * PAGE, "read")


def test_hardware_sets_accessed_and_dirty_alone():
    folios = FolioTable()
    folios.add_folios([64], 0)
    mm = mapped(arch.mk_pte(L, 64, RO & ~L.young | L.write), folios=folios)
    assert (touch(mm, BASE, "read").action, mm.pte(BASE)) == ("hardware", arch.mk_pte(L, 64, RO | L.write))
    result = touch(mm, BASE, "write")
    assert (result.action, result.faulted) == ("hardware", False)
    assert mm.pte(BASE) == arch.mk_pte(L, 64, RO | L.write | L.dirty)


def test_userfaultfd():
    folios = FolioTable()
    folios.add_folios([64], 0)
    mm = mapped(arch.mk_pte(L, 64, RO | L.uffd_wp), vm_flags=PRIVATE | arch.VM_UFFD_WP, folios=folios)
    before = mm.entries.copy()
    assert touch(mm, BASE, "write").action == "userfaultfd"
    assert np.array_equal(mm.entries, before)
    assert touch(mm, BASE, "write", uffd_wp_async=True).action == "reuse"
    assert mm.pte(BASE) == arch.mk_pte(L, 64, RO | L.write | L.dirty | L.soft_dirty)
    mm.vmas[0].vm_flags |= arch.VM_UFFD_MISSING
    assert touch(mm, BASE + PAGE, "write").action == "userfaultfd"
    assert mm.pte(BASE + PAGE) == 0


def test_unshare(impl_name):
    mm = shared_page()
    mm.set_pte(BASE, mm.pte(BASE) | L.uffd_wp)
    result = touch(mm, BASE, "unshare", impl=impl_name)
    assert result.action == "copy"
    assert mm.pte(BASE) == arch.mk_pte(L, result.pfn, RO | L.uffd_wp)
    before = mm.entries.copy()
    assert touch(mm, BASE, "unshare").action == "nothing"
    mm.folios.page(result.pfn).anon_exclusive = False
    assert touch(mm, BASE, "unshare").action == "reuse"
    assert mm.folios.page(result.pfn).anon_exclusive
    assert np.array_equal(mm.entries, before)
    shared = mapped(RO | L.special, vm_flags=PRIVATE | arch.VM_SHARED | arch.VM_MAYSHARE)
    assert touch(shared, BASE, "unshare").action == "nothing"


HUGE = 512 * PAGE


def test_pmd_fault_in():
    mm = Mm(L, FolioTable(), vmas=[Vma(BASE, BASE + 2 * HUGE + PAGE, PRIVATE, anon_vma=False)])
    mm.folios.huge_zero_pfn = 1 << 18
    result = touch(mm, BASE + 3 * PAGE, "read", orders=[9])
    assert (result.action, result.pfn, result.nr) == ("zero_page", (1 << 18) + 3, 512)
    assert (mm.pmd_entries.tolist(), mm.huge_zero) == ([arch.mk_pte(L, 1 << 18, RO | L.huge)], True)
    assert (mm.rss.tolist(), len(mm.folios), mm.vmas[0].anon_vma) == ([0, 0, 0, 0], 0, False)
    result = touch(mm, BASE + HUGE + 7 * PAGE, "write", orders=[4, 9])
    folio = mm.folios.folio(result.pfn)
    assert (result.action, result.pfn - folio.pfn, result.nr) == ("anon_page", 7, 512)
    assert (folio.order, folio.refcount, folio.entire_mapcount, folio.large_mapcount) == (9, 1, 1, 1)
    assert folio.mm_ids == ((mm.mm_id, 1), (0, 0))
    assert mm.folios.flags(np.arange(folio.pfn, folio.pfn + 512), "anon_exclusive").tolist() == [True] + [False] * 511
    assert mm.pmd_entries[1] == arch.mk_pte(L, folio.pfn, RO | L.huge | L.write | L.dirty | L.soft_dirty)
    assert (mm.rss[MM_ANONPAGES], mm.vpns.size) == (512, 0)
    # A block that leaves the VMA, or that has a page table, is for smaller folios.
    assert touch(mm, BASE + 2 * HUGE, "write", orders=[4, 9]).nr == 1
    exit_mmap(mm)
    assert (len(mm.folios), mm.rss.tolist(), mm.huge_zero) == (0, [0, 0, 0, 0], False)


def test_pmd_write_faults():
    mm = Mm(L, FolioTable(), vmas=[Vma(BASE, BASE + HUGE, PRIVATE)])
    touch(mm, BASE, "write", orders=[9])
    folio = mm.folios.folio(pmd_pfn(L, int(mm.pmd_entries[0])))
    child = fork(mm).child
    assert touch(mm, BASE, "read").action == "hardware"
    assert touch(mm, BASE + PAGE, "write").action == "copy"
    assert (folio.refcount, folio.entire_mapcount, folio.large_mapcount) == (512, 1, 512)
    assert (mm.pmd_vpns.size, child.pmd_vpns.size, mm.rss[MM_ANONPAGES]) == (0, 1, 512)
    assert touch(child, BASE, "write").action == "copy"
    assert (folio.refcount, folio.entire_mapcount, folio.large_mapcount) == (1022, 0, 1022)
    exit_mmap(mm)
    exit_mmap(child)
    assert len(mm.folios) == 0


def test_pmd_reuse_and_unshare():
    mm = Mm(L, FolioTable(), vmas=[Vma(BASE, BASE + HUGE, PRIVATE)])
    pfn = touch(mm, BASE, "write", orders=[9]).pfn
    assert touch(mm, BASE, "unshare").action == "nothing"
    exit_mmap(fork(mm).child)
    read_only = int(mm.pmd_entries[0])
    assert not arch.pte_write(L, read_only)
    assert (touch(mm, BASE, "unshare").action, int(mm.pmd_entries[0])) == ("reuse", read_only)
    assert mm.folios.page(pfn).anon_exclusive
    result = touch(mm, BASE + PAGE, "write")
    assert (result.action, result.pfn, result.nr) == ("reuse", pfn + 1, 512)
    assert arch.pte_write(L, int(mm.pmd_entries[0]))
    assert touch(mm, BASE, "write").action == "hardware"


def test_pmd_and_userfaultfd():
    mm = Mm(L, FolioTable(), vmas=[Vma(BASE, BASE + HUGE, PRIVATE)])
    touch(mm, BASE, "write", orders=[9])
    mm.vmas[0].vm_flags |= arch.VM_UFFD_WP
    mm.pmd_entries[0] = arch.pte_mkuffd_wp(L, int(mm.pmd_entries[0]))
    assert touch(mm, BASE, "write").action == "userfaultfd"
    assert touch(mm, BASE, "write", uffd_wp_async=True).action == "reuse"
    assert not arch.pte_uffd_wp(L, int(mm.pmd_entries[0]))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_signals():
    for flags, access in ((PRIVATE & ~arch.VM_WRITE, "write"), (arch.VM_MAYREAD, "read")):
        mm = mapped(vm_flags=flags)
        with pytest.raises(AccessError, match="SIGSEGV") as caught:
            touch(mm, BASE, access)
        assert (caught.value.address, caught.value.signal) == (BASE, "SIGSEGV")
    with pytest.raises(AccessError, match="no VMA"):
        touch(mm, BASE - 1, "read")
    mm = mapped(arch.swp_entry(L, arch.SWP_PTE_MARKER, 4), arch.swp_entry(L, arch.SWP_PTE_MARKER, 2))
    with pytest.raises(AccessError, match="guard region"):
        touch(mm, BASE, "read", semantics=V6_14)
    with pytest.raises(UnsupportedEntryError):
        touch(mm, BASE, "read", semantics=V6_12)
    with pytest.raises(AccessError, match="SIGBUS"):
        touch(mm, BASE + PAGE, "read")
    poisoned = shared_page()
    poisoned.folios.page(64).hwpoison = True
    before = copy_state(poisoned)
    with pytest.raises(AccessError, match="poisoned: SIGBUS"):
        touch(poisoned, BASE, "write")
    assert poisoned.folios == before.folios


def test_entries_that_are_not_modelled():
    numa = arch.mk_pte(L, 64, (RO & ~(L.valid | L.user)) | L.protnone)
    folios = FolioTable()
    folios.add_folios([64], 0)
    mm = mapped(numa, folios=folios)
    with pytest.raises(UnsupportedEntryError, match="NUMA hinting"):
        touch(mm, BASE, "read")
    mm = mapped(arch.swp_entry(L, 0, 5))
    with pytest.raises(UnsupportedEntryError) as caught:
        touch(mm, BASE, "read")
    assert caught.value.address == BASE
    file = Mm(L, FolioTable(), vmas=[Vma(BASE, BASE + HUGE, PRIVATE, vm_ops="file")])
    file.pmd_vpns, file.pmd_entries = np.array([BASE // PAGE]), np.array([RO | L.huge], dtype=np.uint64)
    with pytest.raises(UnsupportedEntryError, match="PMD leaf of a file"):
        touch(file, BASE, "read")
    hugetlb = mapped(vm_flags=PRIVATE | arch.VM_HUGETLB)
    with pytest.raises(UnsupportedEntryError, match="hugetlb"):
        touch(hugetlb, BASE, "write")


def test_nothing_changes_when_a_copy_fails(impl_name):
    mm = shared_page()
    mm.folios.folio(64).refcount = 0
    before = copy_state(mm)
    with pytest.raises(StateError, match="PFN 0x40"):
        touch(mm, BASE, "write", impl=impl_name)
    assert mm.folios == before.folios
    assert np.array_equal(mm.entries, before.entries)
    mm.set_pte(BASE, arch.mk_pte(L, 0x999, RO))
    with pytest.raises(PfnError, match="0x999"):
        touch(mm, BASE, "write", impl=impl_name)


def test_bad_arguments():
    mm = shared_page()
    for arguments in (
        {"access": "execute"},
        {"orders": [1]},
        {"orders": [10]},
        {"orders": [2.5]},
        {"impl": "none"},
    ):
        with pytest.raises(ArgumentError):
            touch(mm, BASE, **{"access": "write", **arguments})
    with pytest.raises(ArgumentError):
        touch(mm, "0", "read")
    assert touch(mm, BASE, "write", semantics=V6_8).action == "copy"
