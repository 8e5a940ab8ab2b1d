"""Processes that map, touch, fork, unmap and exit in any order: core against reference, and what always holds."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)
from strategies import PRIVATE, TABLE_END, kernels

from ptebatch import arch
from ptebatch.arch import X86_64 as L
from ptebatch.errors import AccessError
from ptebatch.fault import touch
from ptebatch.folio import FolioTable
from ptebatch.fork import fork
from ptebatch.mm import MM_ANONPAGES, Mm, Vma
from ptebatch.zap import exit_mmap, munmap, zap_range

PAGE = L.page_size
ROOM = 64  # pages that are used, around the end of a page table
MOST = 4  # processes
BASE = (TABLE_END - ROOM // 2) * PAGE
EXAMPLES, STEPS = {"small": (10, 20), "ci": (400, 40)}.get(os.environ.get("HYPOTHESIS_PROFILE", "default"), (60, 30))
IMPLS = ("core", "reference")

starts = st.integers(0, ROOM - 1)
sizes = st.sampled_from((1, 3, 16, 16, 32, ROOM))
batchings = st.sampled_from((None, None, False))
folio_orders = st.sampled_from(((), (4,), (2, 4), (2, 3, 5)))


@dataclass
class Twins:
    """One process, once by the core and once by the reference."""

    core: Mm
    reference: Mm

    def __iter__(self):
        return iter((self.core, self.reference))


class Processes(RuleBasedStateMachine):
    processes = Bundle("processes")

    def __init__(self):
        super().__init__()
        self.folios = [FolioTable(), FolioTable()]
        self.alive: list[Twins] = []

    @initialize(semantics=kernels())
    def boot(self, semantics):
        self.semantics = semantics

    def both(self, call, process: Twins, *args, **kwargs):
        """Do it in both worlds; the same results, or the same error in both."""
        results = []
        for mm, impl in zip(process, IMPLS, strict=True):
            try:
                results.append(call(mm, *args, semantics=self.semantics, impl=impl, **kwargs))
            except AccessError as error:
                results.append(str(error))
        return results

    def same(self, one, two) -> None:
        assert one == two

    # --- steps --------------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.alive) < MOST)
    @rule(target=processes, start=starts, nr=sizes)
    def start(self, start, nr):
        process = Twins(*(Mm(L, folios) for folios in self.folios))
        self.alive.append(process)
        self.map(process, start, nr, PRIVATE)
        return process

    @rule(
        process=processes,
        start=starts,
        nr=sizes,
        vm_flags=st.sampled_from(
            (PRIVATE, PRIVATE, PRIVATE & ~arch.VM_WRITE, PRIVATE | arch.VM_WIPEONFORK, PRIVATE | arch.VM_DONTCOPY)
        ),
    )
    def map(self, process, start, nr, vm_flags):
        """Fill the gaps between VMAs."""
        low, high = BASE + start * PAGE, BASE + min(start + nr, ROOM) * PAGE
        for mm in process:
            vmas, at = list(mm.vmas), low
            for vma in [*mm.vmas, Vma(high, high + PAGE, 0)]:
                if vma.start > at and at < high:
                    vmas.append(Vma(at, min(vma.start, high), vm_flags, anon_vma=False))
                at = max(at, vma.end)
            mm.vmas = sorted(vmas, key=lambda vma: vma.start)

    @rule(
        process=processes,
        page=starts,
        nr=st.sampled_from((1, 1, 4, 16)),
        access=st.sampled_from(("read", "write", "write", "write", "unshare")),
        orders=folio_orders,
    )
    def access(self, process, page, nr, access, orders):
        for at in range(page, min(page + nr, ROOM)):
            self.same(*self.both(touch, process, BASE + at * PAGE, access, orders=orders))

    @precondition(lambda self: len(self.alive) < MOST)
    @rule(target=processes, process=processes, batching=batchings)
    def fork(self, process, batching):
        one, two = self.both(fork, process, batching=batching)
        self.same(one.stats.to_dict(), two.stats.to_dict())
        child = Twins(one.child, two.child)
        self.alive.append(child)
        return child

    @rule(process=processes, start=starts, nr=sizes, batching=batchings)
    def unmap(self, process, start, nr, batching):
        low, high = BASE + start * PAGE, BASE + (start + nr) * PAGE
        self.same(*self.both(munmap, process, low, high, batching=batching))

    @rule(process=processes, start=starts, nr=sizes, batching=batchings)
    def dontneed(self, process, start, nr, batching):
        low, high = BASE + start * PAGE, BASE + (start + nr) * PAGE
        self.same(*self.both(zap_range, process, low, high, batching=batching))

    @rule(process=consumes(processes), batching=batchings)
    def exit(self, process, batching):
        self.alive.remove(process)
        self.same(*self.both(exit_mmap, process, batching=batching))
        for mm in process:
            assert mm.rss.tolist() == [0, 0, 0, 0]

    # --- what holds ---------------------------------------------------------------------------------------------------

    @invariant()
    def core_and_reference_agree(self):
        assert self.folios[0] == self.folios[1]
        for core, reference in self.alive:
            assert np.array_equal(core.vpns, reference.vpns)
            assert np.array_equal(core.entries, reference.entries)
            assert core.rss.tolist() == reference.rss.tolist()
            assert core.vmas == reference.vmas

    @invariant()
    def counts_are_the_mappings(self):
        folios, mappings, mappers = self.folios[0], Counter(), {}
        for mm, _ in self.alive:
            mm.validate(entries=True)
            mapped = 0
            for vma in mm.vmas:
                for pte in mm.ptes(vma.start, vma.end).tolist():
                    if arch.pte_none(L, pte) or arch.pte_special(L, pte):
                        continue
                    pfn = arch.pte_pfn(L, pte)
                    mapped += 1
                    mappings[pfn] += 1
                    mappers.setdefault(folios.folio(pfn).pfn, set()).add(mm.mm_id)
                    if arch.pte_write(L, pte):
                        assert folios.page(pfn).anon_exclusive, "a page of this mm alone, or nobody may write"
            assert mm.rss.tolist() == [mapped if kind == MM_ANONPAGES else 0 for kind in range(4)]
        assert set(folios.heads().tolist()) == set(mappers), "a folio is there as long as it is mapped"
        for head, mms in mappers.items():
            folio = folios.folio(head)
            pages = range(head, head + folio.nr_pages)
            total = sum(mappings[pfn] for pfn in pages)
            assert folio.refcount == total
            for pfn in pages:
                if mappings[pfn] and folios.page(pfn).anon_exclusive:
                    assert mappings[pfn] == 1
            if not folio.order or not self.semantics.config.no_page_mapcount:
                assert folios.mapcounts(np.array(pages)).tolist() == [mappings[pfn] for pfn in pages]
            if not folio.order:
                continue
            if self.semantics.large_mapcount:
                assert folio.large_mapcount == total
            if self.semantics.mm_id:
                assert sum(count for _, count in folio.mm_ids) <= total
                assert folio.maybe_mapped_shared or len(mms) == 1


Processes.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=STEPS)
test_processes = Processes.TestCase
