"""arm64 contpte: folded blocks in reads, batches, write-protection, setting and clearing, with end states by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ptebatch import arch, explain, workload
from ptebatch.arch import ARM64_4K, ARM64_16K, ARM64_64K
from ptebatch.folio import FolioTable
from ptebatch.fork import fork
from ptebatch.mm import Mm, Vma, account, configured, copy_state, fold
from ptebatch.semantics import LATEST, PRESETS, V6_12, V6_18
from ptebatch.zap import zap_range

L = ARM64_4K
CONT = 1 << 52
FLAGS = arch.VM_READ | arch.VM_WRITE | arch.VM_MAYREAD | arch.VM_MAYWRITE
START, HEAD = 1 << 30, 1 << 20


def entry(pfn: int, *, write: bool = False, dirty: bool = False, young: bool = False, cont: bool = False) -> int:
    v = arch.mk_pte(L, pfn, arch.vm_get_page_prot(L, arch.VM_READ))
    v = arch.pte_mkwrite(L, v) if write else v
    v = arch.pte_mkdirty(L, v) if dirty else v
    v = v if young else arch.pte_mkold(L, v)
    return v | CONT if cont else v


def space(order: int = 9, first: int = 0, nr: int | None = None, **bits: bool) -> Mm:
    """One folio at an aligned address, mapped by a VMA that has pages first.. of it; all entries are there."""
    folios = FolioTable()
    folios.add(HEAD, order)
    pages = 1 << order
    last = pages if nr is None else first + nr
    mm = Mm(L, folios, vmas=[Vma(START + (first << 12), START + (last << 12), FLAGS)], mm_id=folios.new_mm_id())
    mm.add_tables(START, START + (pages << 12))
    mm.fill(START, np.array([entry(HEAD + k, **bits) for k in range(pages)], dtype=np.uint64))
    account(mm)
    return mm


def cont_bits(mm: Mm) -> list[int]:
    """The blocks, by number, all of whose entries have CONT; none has it in part."""
    bits = (mm.entries.reshape(-1, 16) & np.uint64(CONT)) != 0
    assert (bits.all(axis=1) == bits.any(axis=1)).all()
    return np.flatnonzero(bits[:, 0]).tolist()


# --- the cause of the published figures -------------------------------------------------------------------------------
@pytest.mark.parametrize(("write", "unfolds"), [(False, 0), (True, 32)])
def test_counts_of_a_2_mib_folio(impl_name, write, unfolds):
    mm = space(write=write, cont=True)
    hint = fork(copy_state(mm), semantics=V6_18, impl=impl_name).stats
    assert (hint.ptep_get, hint.contpte_reads) == (32, 32 * 16)
    assert (hint.contpte_folds, hint.contpte_unfolds, hint.batches) == (0, 0, 1)
    none = fork(copy_state(mm), semantics=V6_18.replace(pte_batch_hint=False), impl=impl_name).stats
    assert (none.ptep_get, none.contpte_reads) == (512, 512 * 16)
    assert (none.contpte_folds, none.contpte_unfolds, none.batches) == (0, 0, 1)
    # One entry at a time: write-protecting the first entry of a block unfolds it, and the last one folds the child's.
    single = fork(mm, semantics=V6_18, batching=False, impl=impl_name).stats
    assert (single.ptep_get, single.contpte_folds, single.contpte_unfolds) == (512, 32, unfolds)
    assert single.contpte_reads == (32 * 16 if write else 512 * 16)
    assert cont_bits(mm) == ([] if write else list(range(32)))


@pytest.mark.parametrize("cont", [False, True])
def test_a_pinned_folio_is_read_again_for_each_of_its_pages(cont):
    """In blocks, where it is folded: by the core as by the reference."""
    outcomes = []
    for impl in ("core", "reference"):
        mm = space(order=6, first=5, nr=50, write=True, cont=cont)
        mm.has_pinned, folio = True, mm.folios.folio(HEAD)
        folio.pincount, folio.refcount = 1, folio.refcount + 1
        for page in range(64):
            mm.folios.page(HEAD + page).anon_exclusive = page != 40
        got = fork(mm, semantics=V6_18, impl=impl)
        assert got.stats.copied_pages == 49
        outcomes.append((got.stats.to_dict(), mm.entries.tolist(), got.child.entries.tolist()))
    assert outcomes[0] == outcomes[1]


def test_without_contpte_the_bit_is_one_like_any_other(impl_name):
    mm = space(cont=True)
    result = fork(mm, semantics=V6_18.replace(contpte=False), impl=impl_name)
    stats = result.stats
    assert (stats.ptep_get, stats.contpte_reads, stats.contpte_folds, stats.contpte_unfolds) == (512, 0, 0, 0)
    assert cont_bits(result.child) == list(range(32))


# --- end states -------------------------------------------------------------------------------------------------------
def test_the_child_of_an_unfolded_folio_is_folded(impl_name):
    mm = space(order=5, write=True, dirty=True, young=True)
    child = fork(mm, semantics=LATEST, impl=impl_name).child
    assert cont_bits(mm) == []
    assert cont_bits(child) == [0, 1]
    want = [entry(HEAD + k, dirty=True, cont=True) for k in range(32)]
    assert child.ptes(child.vmas[0].start, child.vmas[0].end).tolist() == want


def test_a_vma_that_begins_and_ends_inside_blocks(impl_name):
    # Blocks 0 and 2 are unfolded, outside the VMA too, and what one of their entries was all of them become.
    mm = space(order=6, first=3, nr=37, write=True, cont=True)
    mm.entries[0, 1] = np.uint64(entry(HEAD + 1, write=True, dirty=True, cont=True))
    mm.entries[0, 47] = np.uint64(entry(HEAD + 47, write=True, young=True, cont=True))
    result = fork(mm, semantics=LATEST, impl=impl_name)
    assert cont_bits(mm) == [1, 3]
    assert result.stats.contpte_unfolds == 2
    # Block 0 reads as dirty, block 1 does not: two batches.
    assert {nr: n for nr, n in enumerate(result.stats.batch_hist.tolist()) if n} == {13: 1, 24: 1}
    row = mm.entries[0].tolist()
    assert row[:3] == [entry(HEAD + k, write=True, dirty=True) for k in range(3)]
    assert row[3:16] == [entry(HEAD + k, dirty=True) for k in range(3, 16)]
    assert row[16:32] == [entry(HEAD + k, cont=True) for k in range(16, 32)]
    assert row[32:40] == [entry(HEAD + k, young=True) for k in range(32, 40)]
    assert row[40:48] == [entry(HEAD + k, write=True, young=True) for k in range(40, 48)]
    assert row[48:64] == [entry(HEAD + k, write=True, cont=True) for k in range(48, 64)]
    child = result.child.entries[0].tolist()
    assert child[3:16] == row[3:16]
    assert child[16:32] == row[16:32]
    assert child[32:40] == [entry(HEAD + k) for k in range(32, 40)]
    assert child[:3] + child[40:64] == [0] * 27


def test_folded_and_unfolded_blocks_are_batches_of_their_own(impl_name):
    mm = space(order=6)
    mm.entries[0, 16:32] |= np.uint64(CONT)
    hist = fork(copy_state(mm), semantics=LATEST, impl=impl_name).stats.batch_hist
    assert {nr: n for nr, n in enumerate(hist.tolist()) if n} == {16: 2, 32: 1}
    found = explain.explain_batches(mm).total
    assert found.batch_hist.tolist() == hist.tolist()
    assert found.ends["bits: CONT"] == 2


def test_no_entries_of_two_folios_are_folded(impl_name):
    folios = FolioTable()
    folios.add(HEAD, 3)
    folios.add(HEAD + 8, 3)
    mm = Mm(L, folios, vmas=[Vma(START, START + (16 << 12), FLAGS)], mm_id=folios.new_mm_id())
    mm.add_tables(START, START + (16 << 12))
    mm.fill(START, np.array([entry(HEAD + k) for k in range(16)], dtype=np.uint64))
    account(mm)
    for batching in (None, False):
        assert cont_bits(fork(copy_state(mm), semantics=LATEST, batching=batching, impl=impl_name).child) == []
    assert fold(mm) == 0


@pytest.mark.parametrize(("semantics", "valid"), [(V6_12, True), (PRESETS["v6.13"], False)])
def test_prot_none_before_v6_13_became_valid_when_folded(impl_name, semantics, valid):
    layout = configured(L, semantics)
    none = arch.vm_get_page_prot(layout, 0)
    mm = space(order=4)
    mm.fill(START, np.array([arch.mk_pte(L, HEAD + k, none) for k in range(16)], dtype=np.uint64))
    child = fork(mm, semantics=semantics, impl=impl_name).child
    (row,) = child.entries.tolist()
    assert [v & CONT != 0 for v in row[:16]] == [True] * 16
    assert [v & 1 for v in row[:16]] == [int(valid)] * 16
    assert all(arch.pte_protnone(layout, v) is not valid for v in row[:16])


def test_unmapping_a_part_unfolds_the_blocks_at_its_ends(impl_name):
    mm = space(order=6, write=True, cont=True)
    stats = zap_range(mm, START + (5 << 12), START + (53 << 12), semantics=LATEST, impl=impl_name)
    assert stats.contpte_unfolds == 2
    assert cont_bits(mm) == []
    assert mm.entries[0, :5].tolist() == [entry(HEAD + k, write=True) for k in range(5)]
    assert mm.entries[0, 53:64].tolist() == [entry(HEAD + k, write=True) for k in range(53, 64)]
    assert not mm.entries[0, 5:53].any()


# --- the primitives ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", [ARM64_4K, ARM64_16K, ARM64_64K], ids=lambda layout: layout.name)
def test_primitives(impl, layout):
    size, prot = layout.cont_ptes, arch.vm_get_page_prot(layout, arch.VM_READ)
    assert size << layout.page_shift == {12: 64 << 10, 14: 2 << 20, 16: 2 << 20}[layout.page_shift]
    folios = FolioTable()
    folios.add(HEAD, size.bit_length())
    v = arch.mk_pte(layout, HEAD, prot)
    cont = np.uint64(layout.cont)

    def folded(entries: np.ndarray) -> list[int]:
        return np.flatnonzero(entries & cont).tolist()

    entries = np.zeros(layout.ptrs_per_pte, dtype=np.uint64)
    impl.set_ptes(entries, 1, arch.pte_advance_pfn(layout, v, 1), 2 * size - 1, layout=layout)
    assert folded(entries) == list(range(size, 2 * size))  # the block that is covered whole
    impl.set_ptes(entries, 0, v | layout.cont, 1, layout=layout, folios=folios)
    assert folded(entries) == list(range(size, 2 * size))  # the first entry completes nothing
    last = arch.pte_advance_pfn(layout, v, size - 1)
    impl.set_ptes(entries, size - 1, last, 1, layout=layout)
    assert folded(entries) == list(range(size, 2 * size))  # nobody says that it is one folio
    last = arch.pte_mkold(layout, arch.pte_mkdirty(layout, last))
    impl.set_ptes(entries, size - 1, last, 1, layout=layout, folios=folios)
    assert folded(entries) == list(range(2 * size))
    assert all(arch.pte_young(layout, x) and arch.pte_dirty(layout, x) for x in entries[:size].tolist())
    assert arch.pte_batch_hint(layout, 3, int(entries[3])) == size - 3
    batch = impl.folio_pte_batch(entries, 3, size, folios=folios, layout=layout, semantics=LATEST)
    assert batch.nr == size
    impl.wrprotect_ptes(entries, size, size, layout=layout)
    assert folded(entries) == list(range(2 * size))
    impl.wrprotect_ptes(entries, size + 1, size - 1, layout=layout)
    assert folded(entries) == list(range(size))
    old = impl.get_and_clear_full_ptes(entries, 1, 1, layout=layout)
    assert folded(entries) == []
    assert old == int(arch.pte_advance_pfn(layout, int(entries[0]), 1))
    # Another physical alignment: nothing to fold.
    entries[:] = 0
    impl.set_ptes(entries, 1, v, size, layout=layout)
    impl.set_ptes(entries, 2 * size, arch.pte_advance_pfn(layout, v, size - 1), 1, layout=layout, folios=folios)
    assert folded(entries) == []


# --- workloads, and what hardware could do ----------------------------------------------------------------------------
def test_workloads_are_folded_where_a_kernel_would():
    space = workload.parse("size=4MiB,folio=64KiB+32KiB,pfns=sequential")
    folded = space.build(layout=configured(L, V6_18))
    assert len(cont_bits(folded)) == 32
    plain = space.build(layout=configured(L, V6_18.replace(contpte=False)))
    assert (folded.entries & ~np.uint64(CONT) == plain.entries).all()
    assert cont_bits(plain) == []
    before = space.build(layout=configured(arch.layout_for("arm64-4k", PRESETS["v6.8"].switches), PRESETS["v6.8"]))
    assert cont_bits(before) == []


@pytest.mark.parametrize("name", ["x86-64", "arm64-4k", "riscv64", "s390x", "arm64-16k", "ppc64-64k"])
def test_eligibility(name):
    layout = arch.layout_for(name, LATEST.switches)
    rows = {}
    for folio in (16, 32, 64, 256):
        if folio << 10 < layout.page_size:
            continue
        mm = workload.parse(f"size=4MiB,folio={folio}KiB", layout.page_size).build(layout=layout)
        for row in explain.eligibility(mm):
            rows[folio, row["hardware"]] = row["share"]
            assert row["same_bytes"] == row["bytes"]
    if layout.page_size == 4096:
        assert [rows[folio, "AMD PTE coalescing"] for folio in (16, 32, 64, 256)] == [1, 1, 1, 1]
        for hardware in ("arm64 contpte, 4K granule", "riscv Svnapot"):
            assert [rows[folio, hardware] for folio in (16, 32, 64, 256)] == [0, 0, 1, 1]
    elif layout.page_size == 16384:
        assert [rows[folio, "arm64 contpte, 4K granule"] for folio in (16, 32, 64, 256)] == [0, 0, 1, 1]
        assert rows[64, "AMD PTE coalescing"] is None
    else:
        assert set(rows.values()) == {None}


def test_eligibility_counts_what_is_alike():
    mm = workload.parse("size=2MiB,folio=64KiB").build()
    total = 2 << 20
    mm.entries[0, 5] ^= np.uint64(1 << 6)  # one clean entry: alike, but not the same
    mm.entries[0, 20] ^= np.uint64(1 << 1)  # one read-only entry
    mm.entries[0, 37] = 0
    rows = {row["hardware"]: row for row in explain.eligibility(mm)}
    assert rows["riscv Svnapot"]["bytes"] == total - 2 * 65536
    assert rows["riscv Svnapot"]["same_bytes"] == total - 3 * 65536
    assert rows["AMD PTE coalescing"]["bytes"] == total - 2 * 16384
    assert rows["AMD PTE coalescing"]["same_bytes"] == total - 3 * 16384
    assert rows["riscv Svnapot"]["share"] == rows["riscv Svnapot"]["bytes"] / (total - 4096)
    assert explain.eligibility(Mm(L, FolioTable()))[0]["share"] == 0.0
