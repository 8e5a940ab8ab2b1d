"""Shares of a workload that are no ordinary pages: swapped out, guarded, mapped by PMDs."""

from __future__ import annotations

import numpy as np
import pytest

from ptebatch import arch, workload
from ptebatch.errors import ArgumentError
from ptebatch.fork import fork
from ptebatch.mm import MM_ANONPAGES, MM_SWAPENTS, account, copy_state
from ptebatch.semantics import V6_18

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
