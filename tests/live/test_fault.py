"""Real processes take the steps of the golden sequences: every access is to do what the model says it does."""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from typing import Any

import pytest
from sequences import PAGE, Vector, pages, run, vectors

from ptebatch import live
from ptebatch.semantics import running

THP = "/sys/kernel/mm/transparent_hugepage"
PROT_RW, MAP_PRIVATE, MADV_DONTNEED, MADV_HUGEPAGE = 3, 2, 4, 14
PRESENT, ZERO_PAGE = 1 << 63, 24
ATTEMPTS = 3
"""The kernel may copy where the model reuses, if somebody refers to the page just then; never the reverse."""


def settings(orders: list[int]) -> dict[str, str]:
    """Folios of these orders, and no others, where MADV_HUGEPAGE asks for them."""
    wanted = {f"{THP}/enabled": "madvise"}
    for size in live.folio_sizes()[1:]:
        choice = "madvise" if size // PAGE in [1 << order for order in orders] else "never"
        wanted[f"{THP}/hugepages-{size >> 10}kB/enabled"] = choice
    return wanted


def read_words(path: str, first: int, nr: int = 1) -> tuple[int, ...]:
    with open(path, "rb", buffering=0) as file:
        return struct.unpack(f"{nr}Q", os.pread(file.fileno(), 8 * nr, 8 * first))


class Processes:
    """The processes of a vector; the same methods as `sequences.Model`."""

    def __init__(self, vector: Vector, stack: ExitStack) -> None:
        self.vector, self.stack = vector, stack
        forks = sum(step[1].startswith("fork") for step in vector["steps"])
        subject = stack.enter_context(live.Subject(forks=forks))
        # A write fault takes pages off the LRU lists of its own CPU only.
        os.sched_setaffinity(subject.pid, {min(os.sched_getaffinity(0))})
        self.processes: dict[str, Any] = {"P": subject}
        self.start = subject.call(
            "map",
            size=vector["pages"] * PAGE,
            prot=PROT_RW,
            flags=MAP_PRIVATE,
            shift=vector["first"] * PAGE,
            advice=MADV_HUGEPAGE if vector["orders"] else None,
        )
        self.base = self.start - vector["first"] * PAGE

    def entries(self, who: str) -> dict[int, int]:
        """PFN of each page that is there, the zero page as 0."""
        first, nr = self.vector["first"], self.vector["pages"]
        words = read_words(f"/proc/{self.processes[who].pid}/pagemap", self.start // PAGE, nr)
        pfns = {first + k: word & (1 << 55) - 1 for k, word in enumerate(words) if word & PRESENT}
        zero = {pfn for pfn in set(pfns.values()) if read_words("/proc/kpageflags", pfn)[0] >> ZERO_PAGE & 1}
        return {page: 0 if pfn in zero else pfn for page, pfn in pfns.items()}

    def access(self, who: str, what: str, page: int) -> tuple[str, int | None]:
        before, where = self.entries(who), [[self.base + page * PAGE, 1]]
        faults = 0
        if what == "write":
            (faults,) = self.processes[who].call("store", runs=where)
        else:
            self.processes[who].call("touch", runs=where, write=False)
        after = self.entries(who)
        new = {at for at in after if at not in before}
        if page in new:
            action = "zero_page" if after[page] == 0 else "anon_page"
        elif before[page] != after[page]:
            action = "copy"
        else:
            action = "reuse" if faults else "hardware"
        changed = {at for at in before if before[at] != after.get(at)}
        assert bool(changed) == (action == "copy")
        assert action == "hardware" or what == "read" or faults == 1
        return action, len(new) or len(changed) or None  # how much became writable does not show

    def fork(self, who: str, child: str) -> None:
        with live.Fork(self.processes[who]) as fork:
            self.processes[child] = self.stack.enter_context(fork.run())

    def _range(self, where: list[int]) -> dict[str, int]:
        return {"address": self.base + where[0] * PAGE, "size": len(where) * PAGE}

    def unmap(self, who: str, where: list[int]) -> None:
        self.processes[who].call("munmap", **self._range(where))

    def dontneed(self, who: str, where: list[int]) -> None:
        self.processes[who].call("madvise", **self._range(where), advice=MADV_DONTNEED)

    def exit(self, who: str) -> None:
        self.processes.pop(who).end()

    def pfns(self, who: str) -> dict[int, int]:
        return {page: pfn for page, pfn in self.entries(who).items() if pfn}

    def mapcounts(self, pfns: dict[int, int]) -> dict[int, int]:
        """Without those none of the processes maps: whose pages they are then cannot be known."""
        ours = {pfn for who in self.processes for pfn in self.pfns(who).values()}
        return {page: read_words("/proc/kpagecount", pfn)[0] for page, pfn in pfns.items() if pfn in ours}


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("vector", [pytest.param(v, id=v["name"]) for v in vectors() if v["semantics"] == "v6.18"])
def test_golden_sequence(vector: Vector) -> None:
    if running()[0].large_reuse != "mm_id":
        pytest.skip("this kernel reuses pages of large folios by another rule")
    for order in vector["orders"]:
        if not os.path.exists(f"{THP}/hugepages-{PAGE << order >> 10}kB"):
            pytest.skip(f"this kernel has no folios of order {order}")
    for left in reversed(range(ATTEMPTS)):
        with live.Settings(settings(vector["orders"])), ExitStack() as stack:
            processes = Processes(vector, stack)
            try:
                steps = [step for step, _ in run(vector, processes)]
            except AssertionError:
                if not left:
                    raise
                continue
        assert steps == vector["steps"]
        assert sum(len(pages(step[2])) for step in steps if step[1] in ("read", "write"))
        return
