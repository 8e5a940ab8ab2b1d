"""Shares of a workload that are no ordinary pages: swapped out, guarded, mapped by PMDs."""

from __future__ import annotations

import numpy as np
import pytest

from ptebatch import arch, workload
from ptebatch.errors import ArgumentError, PfnError
from ptebatch.folio import FolioTable
from ptebatch.fork import fork
from ptebatch.mm import MM_ANONPAGES, MM_SWAPENTS, account, copy_state
from ptebatch.semantics import V6_8, V6_18

L = arch.X86_64


def kinds(mm) -> dict[str, int]:
    types = {0: "swap", 31: "marker"}
    values = [int(v) for v in mm.entries.reshape(-1)]
    names = [types[arch.swp_type(L, v)] for v in values if v and not arch.pte_present(L, v)]
    return {name: names.count(name) for name in set(names)}


@pytest.mark.parametrize("granularity", ["folio", "page"])
def test_swap_and_guard(granularity):
    mm = workload.make(size="8MiB", folio="64KiB", swap=0.25, guard=0.125, granularity=granularity, seed=3)
    pages = 2048
    assert kinds(mm)["marker"] == pages // 8
    swapped = kinds(mm)["swap"]
    assert mm.rss[MM_SWAPENTS] == swapped == len(mm.folios.swap)
    assert 0.15 < swapped / pages < 0.26  # a quarter of the pages drawn, less those that are guarded
    assert mm.rss[MM_ANONPAGES] == pages - swapped - pages // 8
    slots, counts = mm.folios.swap.table()
    assert (slots == np.arange(1, swapped + 1)).all()
    assert (counts == 1).all()
    assert mm.vmas[0].vm_flags & arch.VM_MAYBE_GUARD
    mm.validate(entries=True)
    result = fork(mm, semantics=V6_18)
    assert result.stats.swap_entries == swapped
    assert result.stats.pte_markers == pages // 8
    assert (mm.folios.swap.table()[1] == 2).all()
    assert result.child.rss.tolist() == mm.rss.tolist()


def test_swap_counts_are_those_of_account():
    mm = workload.make(size="4MiB", swap=0.5)
    other = copy_state(mm)
    other.folios.swap = type(other.folios.swap)()
    account(other)
    assert other.folios.swap == mm.folios.swap


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_pmd(share):
    mm = workload.make(size="16MiB", folio="2MiB", pmd=share, readonly=0.5, seed=2)
    nr = round(8 * share)
    assert len(mm.pmd_vpns) == nr
    assert len(mm.vpns) == 8 - nr
    assert not set(mm.pmd_vpns.tolist()) & set(mm.vpns.tolist())
    for value in mm.pmd_entries.tolist():
        folio = mm.folios.folio(arch.pte_pfn(L, value))
        assert (folio.refcount, folio.entire_mapcount, folio.large_mapcount) == (1, 1, 1)
        assert folio.mm_ids == ((mm.mm_id, 1), (0, 0))
        assert mm.folios.page(folio.pfn).anon_exclusive == arch.pte_write(L, value)
        assert value & L.huge
    assert mm.rss[MM_ANONPAGES] == 4096
    result = fork(mm, semantics=V6_18)
    assert (result.stats.pmds_copied, result.stats.tables_deposited) == (nr, nr)
    assert result.child.rss.tolist() == mm.rss.tolist()


def test_pmd_beside_other_folios():
    mm = workload.make(size="24MiB", folio="4KiB+2MiB", pmd=1, vmas=3, holes=0.1, seed=5)
    mm.validate(entries=True)
    whole = [v for v in mm.pmd_entries.tolist() if mm.folios.folio(arch.pte_pfn(L, v)).order == 9]
    assert len(whole) == len(mm.pmd_vpns) > 0
    assert fork(mm, semantics=V6_18).stats.pmds_copied == len(whole)


def test_pmd_needs_alignment():
    with pytest.raises(ArgumentError, match="align=natural"):
        workload.parse("size=4MiB,folio=2MiB,pmd=1,align=shifted")


def test_a_seed_means_what_it_meant_without_the_new_shares():
    """Streams of random numbers do not move."""
    plain = workload.make(size="2MiB", folio="64KiB", clean=0.5, holes=0.25, seed=9)
    more = workload.make(size="2MiB", folio="64KiB", clean=0.5, holes=0.25, swap=0.5, seed=9)
    same = (more.entries & np.uint64(L.present_mask)) != 0
    bits = np.uint64(~L.pfn_mask & arch.U64_MAX)
    assert ((plain.entries & bits)[same] == (more.entries & bits)[same]).all()


# --- plain memory is built folio by folio -----------------------------------------------------------------------------
PLAIN = ("size=4MiB", "size=1MiB,folio=64KiB,seed=3", "size=6MiB,folio=2MiB", "size=256KiB,folio=16KiB",
         "size=32MiB,folio=16MiB,pfns=sequential", "size=5MiB,folio=128KiB,granularity=page")  # fmt: skip
MEMMAP = ("_words", "_aux", "_top", "_sub", "_section_of", "_nr_sections", "_near_limit", "_next_mm_id", "_free_hint")


@pytest.mark.parametrize("text", PLAIN)
def test_plain_memory_is_what_the_general_way_builds(text, monkeypatch):
    steps: list[tuple[int, int]] = []
    mm = workload.parse(text).build(lambda *step: steps.append(step))
    assert steps == [(n, 6) for n in range(1, 7)]
    assert workload._PlainBuilder.knows(workload.parse(text), L)
    monkeypatch.setattr(workload._PlainBuilder, "knows", lambda w, layout: False)
    other = workload.parse(text).build()
    assert (mm.entries == other.entries).all() and (mm.vpns == other.vpns).all() and (mm.rss == other.rss).all()
    assert (mm.vmas, mm.name, mm.mm_id, mm.has_pinned) == (other.vmas, other.name, other.mm_id, other.has_pinned)
    assert all(np.array_equal(getattr(mm.folios, name), getattr(other.folios, name)) for name in MEMMAP)
    assert mm.folios.extent() == other.folios.extent()


@pytest.mark.parametrize("text", PLAIN)
def test_plain_memory_can_be_restored_without_a_copy(text):
    w = workload.parse(text)
    mm, before = w.build(), w.build()
    for kernel in (V6_18, V6_8):
        fork(mm, semantics=kernel)
        assert (mm.entries != before.entries).any() and mm.folios != before.folios
        extent = mm.folios._extent
        assert w.restore(mm)
        assert mm.folios._extent is extent is not None  # finding it takes time, which would be part of the next fork's
        assert (mm.entries == before.entries).all()
        assert mm.folios == before.folios


@pytest.mark.parametrize(
    "text", ["size=4MiB,clean=0.5", "size=4MiB,vmas=2", "size=4KiB", "size=1MiB,folio=4KiB+64KiB", "size=1MiB,vma=file",
             "size=3MiB,folio=2MiB", "size=1MiB,soft_dirty=0"]
)  # fmt: skip
def test_what_is_not_plain_memory_is_not_restored(text):
    w = workload.parse(text)
    mm = w.build()
    fork(mm, semantics=V6_18)
    entries = mm.entries.copy()
    assert not w.restore(mm)
    assert (mm.entries == entries).all()


def test_folios_filled_in_replace_what_was_there_and_fit_whole_sections():
    folios, other = FolioTable(), FolioTable()
    for table in (folios, other):
        table.add(0x1000, 2, refcount=3)
        table.add_folios(np.arange(0x2000, 0x2040, 8), 3)  # a section that lies between others
    folios.fill_mapped(0x1F80, 16, 4, mm_id=5)
    other.add_folios(np.arange(0x1F80, 0x2000, 16), 4)
    other.remove_folios(np.arange(0x2000, 0x2040, 8))
    other.add_folios(np.arange(0x2000, 0x2080, 16), 4)
    other.map_ptes(np.arange(0x1F80, 0x2080), mm_id=5, anon_exclusive=True)
    assert folios == other
    assert folios.extent()[:2] == (0x1F80, 256)
    for first, nr, order in ((0x1F81, 64, 0), (0x2000, 63, 0), (0x2040, 1, 7), (-64, 64, 0), (1 << 40, 64, 0)):
        with pytest.raises(ArgumentError, match="whole sections"):
            folios.fill_mapped(first, nr, order, mm_id=5)
    folios.fill_mapped(0, 0, 0, mm_id=1)
    assert folios == other


def test_many_pages_are_looked_up_piece_by_piece(monkeypatch):
    monkeypatch.setattr("ptebatch.folio.PIECE", 10)
    mm = workload.make(size="256KiB", folio="16KiB", pfns="sequential")
    pfns = np.arange(workload.FIRST_PFN, workload.FIRST_PFN + 64)
    mm.folios.page(int(pfns[37])).mapcount = 5
    assert mm.folios.mapcounts(pfns).tolist() == [1] * 37 + [5] + [1] * 26
    assert mm.folios.refcounts(pfns[::-1]).tolist() == [4] * 64
    assert mm.folios.orders(pfns[:0]).tolist() == []
    with pytest.raises(PfnError, match=hex(workload.FIRST_PFN + 100)):
        mm.folios.orders([*pfns.tolist(), workload.FIRST_PFN + 100, workload.FIRST_PFN + 200])
