"""A real fork compared with the model, page by page: `run`.

Each `Scenario` has a fresh subject process build memory. What it has then is captured, and forked in the model; the
subject forks in reality, held by ptrace before and after, and every observable of both sides is compared with what the
model predicts: which pages are shared and which were copied, mapcounts, anon-exclusive bits, swap entries, markers, PMD
leaves, VMAs, rss, page-table size, referenced and dirty totals. Then both write to their pages, the child exits, and
the parent writes again: the faults that takes and the pages it ends in show the write bits and what a fault reuses.

A scenario knows what it did. What /proc hides of a page (write, young, dirty, and which pages of a large folio are
exclusive) is taken from there and not from what `ptebatch.capture` assumes.

`QUANTITIES` says of everything fork changes whether it is seen, inferred or unseen.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import itertools
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ptebatch import arch, live
from ptebatch import capture as cap
from ptebatch import folio as f
from ptebatch.capture import Seen, capture, look
from ptebatch.errors import ArgumentError, PermissionDeniedError, PtebatchError, StateError
from ptebatch.fault import touch
from ptebatch.fork import fork, vma_needs_copy
from ptebatch.mm import MM_ANONPAGES, MM_FILEPAGES, MM_SHMEMPAGES, MM_SWAPENTS, Mm, configured, pte_pfns, swap_types
from ptebatch.semantics import KernelSemantics, running
from ptebatch.zap import exit_mmap

__all__ = ["MAX_BYTES", "QUANTITIES", "SCENARIOS", "Outcome", "Scenario", "Skip", "run", "select"]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Bool = npt.NDArray[np.bool_]
Progress = Callable[[int, int], None]

PAGE, PMD = 4096, 2 << 20
MAX_BYTES = 512 << 20
"""Most memory a scenario may map."""
PATIENCE = 180.0
"""Seconds to wait for another process to give the machine's settings back."""
_ATTEMPTS = 3
"""Runs of a scenario that fails: whoever else moves, reclaims or watches pages meanwhile does not do so every time, and
a model that is wrong is wrong every time."""
_FEW = 150  # pages of an area; of a larger one, only some are written to
_SHOWN = 20  # mismatches kept as text
_U = np.uint64

QUANTITIES: tuple[tuple[str, str, str], ...] = (
    ("VMAs and their flags", "seen", "smaps"),
    ("present, not present or none", "seen", "pagemap bits 62, 63"),
    ("PFN shared or copied", "seen", "pagemap"),
    ("copied pages", "seen", "a PFN of its own, order 0, mapped once"),
    ("anonymous or not", "seen", "pagemap bit 61"),
    ("mapcount", "seen", "kpagecount"),
    ("mapped once", "seen", "pagemap bit 56"),
    ("anon-exclusive", "seen", "kpageflags bit 34; of a large folio its first page's only"),
    ("uffd-wp", "seen", "pagemap bit 57"),
    ("guard", "seen", "pagemap bit 58"),
    ("swap entry", "seen", "pagemap: type and offset"),
    ("PMD or PTE", "seen", "PAGEMAP_SCAN"),
    ("rss", "seen", "RssAnon, RssFile, RssShmem, VmSwap of /proc/PID/status"),
    ("page tables", "seen", "VmPTE, where the parent has no empty tables"),
    ("smaps totals", "seen", "Rss, Anonymous, AnonHugePages, Swap of every area"),
    ("young", "seen", "as a total: Referenced of every area"),
    ("dirty", "seen", "as a total: Shared_Dirty and Private_Dirty of every area"),
    ("write", "inferred", "whether writing to the page takes a fault"),
    ("reuse or copy", "inferred", "the page a write ends in: refcount, large mapcount, MM-ID slots, anon-exclusive"),
    ("exclusive bit of a swap entry, swap counts", "unseen", ""),
    ("batches, -EAGAIN rounds and other operation counts", "unseen", "they leave no trace"),
    ("soft-dirty, device-private and hwpoison entries, migration entries", "unseen",
     "ruled out by configuration, or gone before they can be looked at"),
)  # fmt: skip
"""What fork changes: name, whether it is seen, inferred or unseen, and by what."""


class Skip(PtebatchError):
    """What a scenario needs is not there; the message says what."""


# --- what a scenario does ---------------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Fact:
    """What is known of pages: None is not known."""

    start: int
    nr: int
    write: bool | None = None
    young: bool | None = None
    dirty: bool | None = None
    exclusive: bool | None = None


PROT_NONE, PROT_READ, PROT_RW = 0, 1, 3
MAP_SHARED, MAP_PRIVATE, MAP_HUGETLB = 1, 2, 0x40000
MADV_DONTNEED, MADV_FREE, MADV_DONTFORK, MADV_MERGEABLE, MADV_HUGEPAGE, MADV_NOHUGEPAGE = 4, 8, 10, 12, 14, 15
MADV_WIPEONFORK, MADV_PAGEOUT, MADV_GUARD_INSTALL = 18, 21, 102
UFFD_FEATURE_EVENT_FORK, UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 1, 1 << 12


class World:
    """A subject's memory: builds it and keeps what is known of it."""

    def __init__(self, subject: live.Subject, settings: live.Settings, scenario: Scenario, seed: int) -> None:
        self.subject = subject
        self.settings = settings
        self.folio_bytes = scenario.folio
        self.needs = scenario.needs
        self.random = random.Random(f"{scenario.name}:{seed}")
        self.areas: list[tuple[int, int]] = []
        self.facts: list[_Fact] = []
        self.pins: list[tuple[int, int]] = []
        self.by_ptes: list[tuple[int, int]] = []
        self.event_fork: list[tuple[int, int, int]] = []
        self._directories = contextlib.ExitStack()
        self._bytes = 0

    def close(self) -> None:
        """Remove its files."""
        self._directories.close()

    def know(self, start: int, nr: int, **facts: bool) -> None:
        """Note what the pages are now."""
        self.facts.append(_Fact(start, nr, **facts))

    def map(
        self,
        nr: int,
        *,
        prot: int = PROT_RW,
        flags: int = MAP_PRIVATE,
        path: str | None = None,
        offset: int = 0,
        shift: int = 0,
        advice: int | None = None,
    ) -> int:
        """Map pages, `shift` pages behind a 2 MiB boundary."""
        self._bytes += nr * PAGE
        if self._bytes > MAX_BYTES:
            raise StateError(f"the scenario maps more than {MAX_BYTES >> 20} MiB")
        at = int(
            self.subject.call(
                "map", size=nr * PAGE, prot=prot, flags=flags, path=path, offset=offset, shift=shift * PAGE,
                advice=advice,
            )
        )  # fmt: skip
        self.areas.append((at, at + nr * PAGE))
        return at

    def anon(self, nr: int, *, small: bool = False, shift: int = 0) -> int:
        """Private anonymous memory, all written; in the scenario's folios unless `small`."""
        at = self.map(nr, shift=shift, advice=None if small or self.folio_bytes == PAGE else MADV_HUGEPAGE)
        self.write(at, nr)
        return at

    def hugetlb(self, nr: int, *, flags: int = MAP_PRIVATE) -> int:
        """Hugetlb pages of 2 MiB, all written."""
        at = self.map(512 * nr, flags=flags | MAP_HUGETLB)
        for start in range(at, at + nr * PMD, PMD):
            self.subject.call("touch", runs=[[start, 1]])
        self.know(at, 512 * nr, write=True, young=True, dirty=True, exclusive=True)
        return at

    def write(self, at: int, nr: int, value: int | None = None, *, step: int = 1) -> None:
        """Write to every `step`-th page of private or shared writable memory."""
        runs = [[at, nr]] if step == 1 else [[at + i * PAGE, 1] for i in range(0, nr, step)]
        self.subject.call("touch", runs=runs, write=True, value=value)
        for start, n, *_ in runs:
            self.know(start, n, write=True, young=True, dirty=True, exclusive=True)

    def read(self, at: int, nr: int, *, writable: bool = False) -> None:
        """Read pages that nobody has written to; shared mappings nobody wants to hear of make them `writable`."""
        self.subject.call("touch", runs=[[at, nr]], write=False)
        self.know(at, nr, write=writable, young=True, dirty=False)

    def split(self, at: int, nr: int) -> None:
        """Have PTEs map what PMDs do, and keep khugepaged from changing that back."""
        self.madvise(at, nr, MADV_NOHUGEPAGE)
        self.subject.call("split", runs=[[at, nr]])
        self.by_ptes.append((at, at + nr * PAGE))

    def madvise(self, at: int, nr: int, advice: int) -> None:
        """madvise(2)."""
        self.subject.call("madvise", address=at, size=nr * PAGE, advice=advice)

    def mprotect(self, at: int, nr: int, prot: int) -> None:
        """mprotect(2); without PROT_WRITE no entry keeps its write bit."""
        self.subject.call("mprotect", address=at, size=nr * PAGE, prot=prot)
        if not prot & 2:
            self.know(at, nr, write=False)

    def munmap(self, at: int, nr: int) -> None:
        """munmap(2)."""
        self.subject.call("munmap", address=at, size=nr * PAGE)

    def mremap(self, at: int, nr: int, shift: int = 0) -> int:
        """Move pages, with all that is known of them, to `shift` pages behind a 2 MiB boundary."""
        to = int(self.subject.call("reserve", size=(nr + shift) * PAGE)) + shift * PAGE
        self.subject.call("mremap", address=at, size=nr * PAGE, to=to)
        self.areas.append((to, to + nr * PAGE))
        end = at + nr * PAGE
        for fact in list(self.facts):
            start, stop = max(fact.start, at), min(fact.start + fact.nr * PAGE, end)
            if start < stop:
                facts = {k: getattr(fact, k) for k in ("write", "young", "dirty", "exclusive")}
                self.facts.append(_Fact(start - at + to, (stop - start) // PAGE, **facts))
        return to

    def guard(self, at: int, nr: int) -> None:
        """Install guard regions."""
        try:
            self.madvise(at, nr, MADV_GUARD_INSTALL)
        except StateError as error:
            raise Skip(f"this kernel has no guard regions ({error})") from None

    def pin(self, at: int, nr: int = 1) -> None:
        """Pin pages for long, through an io_uring."""
        try:
            self.subject.call("pin", address=at, size=nr * PAGE)
        except StateError as error:
            raise Skip(f"no io_uring to pin pages with ({error})") from None
        self.pins.append((at, nr))

    def uffd(self, at: int, nr: int, protect: Iterable[tuple[int, int]], *, features: int = 0) -> None:
        """Register with a userfaultfd and write-protect (page index, number) of it."""
        try:
            fd = int(self.subject.call("uffd", address=at, size=nr * PAGE, features=features))
        except StateError as error:
            raise Skip(f"no userfaultfd that write-protects ({error})") from None
        runs = [[at + i * PAGE, n] for i, n in protect]
        self.subject.call("uffd_wp", fd=fd, runs=runs)
        for start, n, *_ in runs:
            self.know(start, n, write=False)
        if features & UFFD_FEATURE_EVENT_FORK:
            self.event_fork.append((at, at + nr * PAGE, fd))

    def page_out(self, at: int, nr: int) -> None:
        """Have pages written to swap."""
        self.madvise(at, nr, MADV_PAGEOUT)

        def out() -> bool:
            if (self.seen(at, nr) & _U(cap.PM_SWAP) != 0).all():
                return True
            self.madvise(at, nr, MADV_PAGEOUT)
            return False

        self.wait("swapped the pages out", out)

    def fork_and_exit(self, written: Iterable[tuple[int, int]] = ()) -> None:
        """Fork; the child exits; write to some pages, which are exclusive then, and the others are not."""
        with live.Fork(self.subject) as held:
            child = held.run()
        child.end()
        for start, end in self.areas:
            self.know(start, (end - start) // PAGE, write=False, exclusive=False)
        for at, nr in written:
            self.write(at, nr)

    def file(self, nr: int, *, tmpfs: bool = False) -> str:
        """A file of that many pages, on disk or in memory."""
        where = "/dev/shm" if tmpfs else None
        if tmpfs and not os.path.isdir("/dev/shm"):
            raise Skip("there is no tmpfs in /dev/shm")
        path = os.path.join(
            self._directories.enter_context(tempfile.TemporaryDirectory(prefix=f"ptebatch-{os.getpid()}-", dir=where)),
            "file",
        )
        with open(path, "wb") as file:
            file.write(b"".join(bytes([1 + i % 251]) * PAGE for i in range(nr)))
            file.flush()
            os.fsync(file.fileno())
        return path

    def seen(self, at: int, nr: int) -> U64:
        """What pagemap shows of pages now."""
        with open(f"/proc/{self.subject.pid}/pagemap", "rb") as file:
            file.seek(at // PAGE * 8)
            return np.frombuffer(file.read(nr * 8), dtype=np.uint64)

    def wait(self, what: str, until: Callable[[], bool], timeout: float = 10.0) -> None:
        """Wait for the kernel to do something."""
        deadline = time.monotonic() + timeout
        while not until():
            if time.monotonic() > deadline:
                raise StateError(f"the kernel has not {what} within {timeout} s")
            time.sleep(0.01)


@dataclass(frozen=True)
class Scenario:
    """Memory to fork.

    Attributes
    ----------
    name : str
    build : callable
        Called with the `World`.
    folio : int
        Bytes of the folios that MADV_HUGEPAGE memory gets.
    needs : frozenset of {"ksm", "swap", "hugetlb", "shmem"}
    depth : int
        2: the child forks too.
    """

    name: str
    build: Callable[[World], None]
    folio: int = PAGE
    needs: frozenset[str] = frozenset()
    depth: int = 1

    @property
    def doc(self) -> str:
        """One line."""
        return (self.build.__doc__ or "").strip().partition("\n")[0]


SCENARIOS: dict[str, Scenario] = {}
"""Every scenario by name."""


def _scenario(
    name: str, *, folio: int = PAGE, needs: Iterable[str] = (), depth: int = 1
) -> Callable[[Callable[[World], None]], Callable[[World], None]]:
    def register(build: Callable[[World], None]) -> Callable[[World], None]:
        SCENARIOS[name] = Scenario(name, build, folio, frozenset(needs), depth)
        return build

    return register


def select(patterns: Sequence[str] = ()) -> list[Scenario]:
    """Scenarios whose names match any of the patterns, as the shell matches them; all of them without any.

    Raises
    ------
    ArgumentError
        A pattern that matches none.
    """
    chosen = [name for name in SCENARIOS if not patterns]
    for pattern in patterns:
        found = fnmatch.filter(SCENARIOS, pattern)
        if not found:
            raise ArgumentError(f"no scenario is called {pattern!r}: --list shows their names")
        chosen += found
    return [SCENARIOS[name] for name in dict.fromkeys(chosen)]


# --- comparing --------------------------------------------------------------------------------------------------------
@dataclass
class Outcome:
    """What became of a scenario.

    Attributes
    ----------
    status : {"passed", "failed", "skipped"}
    checks, mismatches : int
        Values compared, and those that differ.
    reason : str
        Why it failed or was skipped: the first mismatches, one a line.
    attempts : int
        Runs it took to pass; all of them failed if it did.
    quantities : dict of str to [int, int]
        Checks and mismatches by quantity, see `QUANTITIES`.
    """

    name: str
    status: Literal["passed", "failed", "skipped"] = "passed"
    reason: str = ""
    attempts: int = 1
    seconds: float = 0.0
    quantities: dict[str, list[int]] = field(default_factory=dict)

    @property
    def checks(self) -> int:
        """Values compared."""
        return sum(n for n, _ in self.quantities.values())

    @property
    def mismatches(self) -> int:
        """Values that differ."""
        return sum(n for _, n in self.quantities.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "status": self.status,
            "checks": self.checks,
            "mismatches": self.mismatches,
            "reason": self.reason,
            "attempts": self.attempts,
            "seconds": round(self.seconds, 3),
            "quantities": {name: {"checks": n, "mismatches": bad} for name, (n, bad) in self.quantities.items()},
        }


class _Comparison:
    """Counts checks and keeps the first mismatches."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.lines: list[str] = []
        self.where = ""
        self.pfn = "PFN shared or copied"

    def _count(self, quantity: str, checks: int, mismatches: int) -> None:
        counts = self.outcome.quantities.setdefault(quantity, [0, 0])
        counts[0] += checks
        counts[1] += mismatches

    def equal(self, quantity: str, what: str, seen: Any, predicted: Any) -> None:
        same = seen == predicted
        self._count(quantity, 1, not same)
        if not same and len(self.lines) < _SHOWN:
            self.lines.append(f"{self.where}: {what}: {quantity}: kernel {seen}, model {predicted}")

    def arrays(
        self, quantity: str, addresses: I64, seen: npt.NDArray[Any], predicted: npt.NDArray[Any], spell: str = "{}"
    ) -> None:
        bad = np.flatnonzero(seen != predicted)
        self._count(quantity, len(addresses), len(bad))
        if len(bad) and len(self.lines) < _SHOWN:
            i = int(bad[0])
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            kernel, model = spell.format(seen[i]), spell.format(predicted[i])
            self.lines.append(
                f"{self.where}: page {int(addresses[i]):#x}: {quantity}: kernel {kernel}, model {model}{more}"
            )


@dataclass(slots=True)
class _Pages:
    """The model's view of consecutive pages; one value per page in each array, 0 where it does not apply."""

    start: int
    entry: U64
    present: Bool
    leaf: Bool
    pfn: I64
    normal: Bool
    anon: Bool
    exclusive: Bool
    hugetlb: Bool
    order: I64
    count: I64
    """Mappings of the page, those by PMDs included."""
    head_count: I64
    """The same of its folio's first page."""


def _pages(mm: Mm, start: int, end: int) -> _Pages:
    layout, folios = mm.layout, mm.folios
    entry = mm.ptes(start, end)
    leaf = np.zeros(len(entry), dtype=bool)
    vpns = np.arange(len(entry), dtype=np.int64) + (start >> 12)
    for vpn, value in zip(mm.pmd_vpns.tolist(), mm.pmd_entries.tolist(), strict=True):
        first, last = max(vpn - (start >> 12), 0), min(vpn + 512 - (start >> 12), len(entry))
        if first < last:
            entry[first:last] = value
            leaf[first:last] = True
    present, found = pte_pfns(layout, entry)
    pfn = np.where(present, found, _U(0)).astype(np.int64)
    huge = leaf & present
    pfn[huge] = (pfn[huge] & ~511) + (vpns[huge] & 511)
    normal = present & (entry & _U(layout.special) == 0)
    normal[normal] = folios.lookup(pfn[normal]) >= 0
    of = pfn[normal]
    order = folios.orders(of)
    heads = of >> order << order
    entire = {head: folios.folio(head).entire_mapcount for head in np.unique(heads).tolist()}
    entires = np.array([entire[head] for head in heads.tolist()], dtype=np.int64)

    def spread(values: npt.NDArray[Any], dtype: Any = np.int64) -> npt.NDArray[Any]:
        out = np.zeros(len(entry), dtype=dtype)
        out[normal] = values
        return out

    return _Pages(
        start, entry, present, leaf, pfn, normal,
        anon=spread(folios.flags(of, "anon"), bool),
        # The kernel shows a folio's flags as those of its first page.
        exclusive=spread(folios.flags(heads, "anon_exclusive"), bool),
        hugetlb=spread(folios.flags(of, "hugetlb"), bool),
        order=spread(order),
        count=spread(folios.mapcounts(of) + entires),
        head_count=spread(folios.mapcounts(heads) + entires),
    )  # fmt: skip


_STATUS = re.compile(r"^(RssAnon|RssFile|RssShmem|VmSwap|VmPTE):\s+(\d+) kB$", re.MULTILINE)
_COUNTERS = {"RssFile": MM_FILEPAGES, "RssAnon": MM_ANONPAGES, "VmSwap": MM_SWAPENTS, "RssShmem": MM_SHMEMPAGES}


@dataclass(slots=True)
class _View:
    """What the kernel shows of a process at one moment."""

    seen: Seen
    status: dict[str, int]


def _view(pid: int, world: World) -> _View:
    status = Path(f"/proc/{pid}/status").read_text()
    return _View(look(pid, within=world.areas), {name: int(kb) for name, kb in _STATUS.findall(status)})


class _Model:
    """What the model predicts; `made` says which real page each page it allocated is, `replaced` in whose place."""

    def __init__(self, world: World, semantics: KernelSemantics) -> None:
        found = capture(world.subject.pid, semantics=semantics, pmd="keep")
        if found.pfns != "real" or found.seen is None:
            raise Skip("the kernel hides PFNs: run as root")
        self.semantics = semantics
        self.mm = found.mm
        self.layout = configured(self.mm.layout, semantics)
        self.folios = self.mm.folios
        self.made: dict[int, int | None] = {}
        self.replaced: dict[int, int | None] = {}
        self._learn(world)

    def _learn(self, world: World) -> None:
        """Correct what capture assumes by what the scenario knows."""
        mm, layout, folios = self.mm, self.layout, self.folios
        leaves = {vpn: i for i, vpn in enumerate(mm.pmd_vpns.tolist())}
        for fact in world.facts:
            vma = None
            for addr in range(fact.start, fact.start + fact.nr * PAGE, PAGE):
                leaf = leaves.get(addr >> 12)
                value = mm.pte(addr) if leaf is None else int(mm.pmd_entries[leaf])
                if not arch.pte_present(layout, value) or arch.pte_special(layout, value):
                    continue
                if vma is None or addr >= vma.end:
                    vma = mm.vma_at(addr)
                    assert vma is not None
                dirty = arch.pte_dirty(layout, value) if fact.dirty is None else fact.dirty
                write = arch.pte_write(layout, value) if fact.write is None else fact.write
                young = arch.pte_young(layout, value) if fact.young is None else fact.young
                value = arch.pte_mkold(layout, arch.pte_mkclean(layout, value))
                write = write and not arch.pte_protnone(layout, value)
                value = arch.pte_mkwrite(layout, value, vma.vm_flags) if write else arch.pte_wrprotect(layout, value)
                value = arch.pte_mkdirty(layout, value) if dirty else value
                value = arch.pte_mkyoung(layout, value) if young else value
                if leaf is None:
                    mm.set_pte(addr, value)
                else:
                    mm.pmd_entries[leaf] = value
                page = folios.page(arch.pte_pfn(layout, value) if leaf is None else self._leaf_pfn(value))
                if fact.exclusive is not None and page.folio.anon and not page.folio.ksm:
                    page.anon_exclusive = fact.exclusive
        for start, nr in world.pins:
            mm.has_pinned = True
            for page_pfn in _pages(mm, start, start + nr * PAGE).pfn.tolist():
                folio = folios.folio(page_pfn)
                folio.refcount += 1 if folio.order else f.GUP_PIN_COUNTING_BIAS
                if folio.order:
                    folio.pincount += 1
        for start, end, _ in world.event_fork:
            for vma in mm.vmas:
                if start <= vma.start < end:
                    vma.uffd_event_fork = True

    def _leaf_pfn(self, value: int) -> int:
        return arch.pte_pfn(self.layout, value) & ~511

    def write(self, mm: Mm, addr: int, impl: str) -> bool:
        """Write to a page; whether that takes a fault."""
        before = int(_pages(mm, addr, addr + PAGE).pfn[0])
        result = touch(mm, addr, "write", semantics=self.semantics, impl=impl)
        if result.action == "copy":
            first = result.pfn - (addr // PAGE & result.nr - 1)
            self.made.update(dict.fromkeys(range(first, first + result.nr)))
            self.replaced[result.pfn] = self.made.get(before, before)
        return result.faulted

    def forget(self) -> None:
        """Forget pages that are free again."""
        self.made = {pfn: real for pfn, real in self.made.items() if pfn in self.folios}
        self.replaced = {pfn: real for pfn, real in self.replaced.items() if pfn in self.made}

    def fork(self, mm: Mm, impl: str) -> Mm:
        """The child; pages that did not exist before are new ones."""
        before = set(self.folios.pages_table()["pfn"].tolist())
        child = fork(mm, semantics=self.semantics, impl=impl).child
        self.made.update(dict.fromkeys(set(self.folios.pages_table()["pfn"].tolist()) - before))
        return child


def _compare(check: _Comparison, model: _Model, mm: Mm, view: _View, world: World, family: Iterable[Mm]) -> None:
    """Compare all that shows of a process with the model's; the family is everybody who may map its pages."""
    seen = view.seen
    assert seen.frames is not None
    mapped = [_pages(one, start, end) for one in family for start, end in world.areas]
    pfns = set(itertools.chain.from_iterable(pages.pfn[pages.normal].tolist() for pages in mapped))
    taken = pfns - set(model.made) | {real for pfn in pfns if (real := model.made.get(pfn)) is not None}
    for start, end in world.areas:
        pages = _pages(mm, start, end)
        _compare_pages(check, model, pages, seen, taken)
        _compare_areas(check, model, mm, seen, start, end)


def _dense(values: npt.NDArray[Any], at: I64, nr: int) -> npt.NDArray[Any]:
    out = np.zeros(nr, dtype=values.dtype)
    out[at] = values
    return out


def _compare_pages(check: _Comparison, model: _Model, pages: _Pages, seen: Seen, taken: set[int]) -> None:
    nr, layout = len(pages.entry), model.layout
    addresses = pages.start + np.arange(nr, dtype=np.int64) * PAGE
    first, last = np.searchsorted(seen.entries.vpn, [addresses[0] >> 12, (addresses[-1] >> 12) + 1])
    mine = seen.entries.at(slice(first, last))
    at = mine.vpn - (pages.start >> 12)
    value, huge = _dense(mine.value, at, nr), _dense(mine.huge, at, nr)

    def bit(mask: int) -> Bool:
        return value & _U(mask) != 0

    swap = ~pages.present & (pages.entry & ~_U(layout.none_ignore) != 0)
    state = np.where(bit(cap.PM_PRESENT), 1, np.where(bit(cap.PM_SWAP), 2, 0))
    check.arrays("present, not present or none", addresses, state, np.where(pages.present, 1, np.where(swap, 2, 0)))

    # PFNs: what the model allocated has another number there, and must be a page of its own.
    present = pages.present & bit(cap.PM_PRESENT)
    real = (value & _U(cap.PM_PFN)).astype(np.int64)
    new = np.isin(pages.pfn, np.array(list(model.made), dtype=np.int64)) & present & pages.normal
    old = present & ~new
    check.arrays(check.pfn, addresses[old], real[old], pages.pfn[old], "{:#x}")
    frames = seen.frames
    assert frames is not None
    for i in np.flatnonzero(new).tolist():
        number, known = int(real[i]), model.made[int(pages.pfn[i])]
        if known is None:
            flags = int(frames.flags[frames.where(np.array([number]))[0]])
            own = number not in taken and not flags >> cap.KPF_HEAD & 1 and not flags >> cap.KPF_TAIL & 1
            own = own or (number not in taken and bool(pages.order[i]))
            own = own and number != model.replaced.get(int(pages.pfn[i]))
            check.equal("copied pages", f"page {int(addresses[i]):#x}", "own page" if own else "no copy", "own page")
            model.made[int(pages.pfn[i])] = number
            taken.add(number)
        else:
            check.equal(check.pfn, f"page {int(addresses[i]):#x}", number, known)

    normal = pages.normal & present
    where = frames.where(real[normal])
    for quantity, mask, predicted in (
        ("anonymous or not", cap.PM_FILE, pages.normal & ~pages.anon),
        ("mapped once", cap.PM_EXCLUSIVE, np.where(pages.leaf & ~pages.hugetlb, pages.head_count, pages.count) == 1),
    ):
        check.arrays(quantity, addresses[normal], bit(mask)[normal], predicted[normal])
    check.arrays("mapcount", addresses[normal], frames.count[where], pages.count[normal])
    shown = pages.anon[normal] & (pages.head_count[normal] > 0)
    exclusive = frames.has(cap.KPF_ANON_EXCLUSIVE)[where] & frames.has(cap.KPF_ANON)[where]
    check.arrays("anon-exclusive", addresses[normal][shown], exclusive[shown], pages.exclusive[normal][shown])
    check.arrays("PMD or PTE", addresses[present], huge[present], (pages.leaf | pages.hugetlb)[present])

    kind = pages.entry >> _U(layout.swp_type_shift)
    inverted = _U((1 << layout.swp_offset_bits) - 1) if layout.swp_offset_inverted else _U(0)
    offset = (pages.entry >> _U(layout.swp_offset_shift) & _U((1 << layout.swp_offset_bits) - 1)) ^ inverted
    marker = swap & (kind == _U(arch.SWP_PTE_MARKER))
    uffd_wp = pages.present & (pages.entry & _U(layout.uffd_wp) != 0)
    uffd_wp |= swap & ~marker & (pages.entry & _U(layout.swp_uffd_wp) != 0)
    uffd_wp |= marker & (offset & _U(arch.PTE_MARKER_UFFD_WP) != 0)
    some = pages.present | swap
    check.arrays("uffd-wp", addresses[some], bit(cap.PM_UFFD_WP)[some], uffd_wp[some])
    guard = marker & (offset & _U(arch.PTE_MARKER_GUARD) != 0)
    check.arrays("guard", addresses[swap], bit(cap.PM_GUARD)[swap], guard[swap])
    frame = (kind | offset << _U(5)) & _U(cap.PM_PFN)
    check.arrays("swap entry", addresses[swap], (value & _U(cap.PM_PFN))[swap], frame[swap], "{:#x}")


def _compare_areas(check: _Comparison, model: _Model, mm: Mm, seen: Seen, start: int, end: int) -> None:
    """Totals of smaps, for each area by itself."""
    frames, layout = seen.frames, mm.layout
    assert frames is not None
    for area in seen.areas:
        if area.end <= start or area.start >= end or "ht" in area.codes:
            continue
        pages = _pages(mm, area.start, area.end)
        first, last = np.searchsorted(seen.entries.vpn, [area.start >> 12, area.end >> 12])
        real = seen.entries.value[first:last]
        vpn = seen.entries.vpn[first:last]
        at = vpn - (area.start >> 12)
        there = pages.normal[at] & (real & _U(cap.PM_PRESENT) != 0)
        at = at[there]
        flags = frames.flags[frames.where((real[there] & _U(cap.PM_PFN)).astype(np.int64))]
        young = pages.entry[at] & _U(layout.young) != 0
        dirty = pages.entry[at] & _U(layout.dirty | layout.saved_dirty) != 0
        young |= flags >> _U(cap.KPF_REFERENCED) & _U(1) != 0
        dirty |= flags >> _U(cap.KPF_DIRTY) & _U(1) != 0
        # Whoever watches accesses (DAMON) takes them from the entries and marks the folio idle, and young if it was.
        watched = flags >> _U(cap.KPF_IDLE) & _U(1) != 0
        swap = ~pages.present & (pages.entry & ~_U(layout.none_ignore) != 0)
        swap &= pages.entry >> _U(layout.swp_type_shift) < _U(min(swap_types(model.semantics)))
        where = f"area {area.label()}"
        get = area.fields.get
        kb = PAGE >> 10
        least, most = int((young & ~watched).sum()) * kb, int((young | watched).sum()) * kb
        referenced = get("Referenced", 0)
        check.equal("young", where, referenced, min(max(referenced, least), most))
        check.equal("dirty", where, get("Shared_Dirty", 0) + get("Private_Dirty", 0), int(dirty.sum()) * kb)
        totals = {
            "Rss": int(pages.normal.sum()) * kb,
            "Anonymous": int(pages.anon.sum()) * kb,
            "AnonHugePages": int((pages.anon & pages.leaf).sum()) * kb,
        }
        if "sh" not in area.codes and not area.key[5]:
            totals["Swap"] = int(swap.sum()) * kb
        for name, predicted in totals.items():
            check.equal("smaps totals", f"{where} {name}", get(name, 0), predicted)


def _compare_process(check: _Comparison, mm: Mm, view: _View, tables: int | None) -> None:
    """Areas, counters and page tables of a whole process that has not run since."""
    areas = [(a.start, a.end, a.vm_flags) for a in view.seen.areas]
    vmas = [(v.start, v.end, v.vm_flags) for v in mm.vmas]
    for what, seen, predicted in (("missing in the model", areas, vmas), ("missing in the kernel", vmas, areas)):
        for start, end, flags in sorted(set(seen) - set(predicted)):
            check.equal("VMAs and their flags", f"{start:#x}-{end:#x} {flags:#x}", what, "in both")
    check.equal("VMAs and their flags", "number", len(areas), len(vmas))
    for name, counter in _COUNTERS.items():
        check.equal("rss", name, view.status[name], int(mm.rss[counter]) * (PAGE >> 10))
    if tables is not None:
        check.equal("page tables", "VmPTE", view.status["VmPTE"], tables * (PAGE >> 10))


def _tables(mm: Mm) -> int:
    """Pages of page tables that VmPTE counts: the tables, those deposited for PMD leaves, and both levels above."""
    vpns = np.r_[mm.vpns, mm.pmd_vpns]
    hugetlb = [(v.start >> 12, v.end >> 12) for v in mm.vmas if v.vm_flags & arch.VM_HUGETLB]
    leaves = sum(not any(a <= vpn < b for a, b in hugetlb) for vpn in mm.pmd_vpns.tolist())
    return len(mm.vpns) + leaves + len(np.unique(vpns >> 18)) + len(np.unique(vpns >> 27))


def _tables_of_child(parent: Mm, child: Mm, semantics: KernelSemantics) -> int:
    """The same of a child that has just been forked: the walk makes upper tables also where it then finds nothing."""
    by_start = {vma.start: vma for vma in child.vmas}
    above = np.r_[parent.vpns, parent.pmd_vpns]
    more: dict[int, set[int]] = {18: set(), 27: set()}
    for vma in parent.vmas:
        theirs = by_start.get(vma.start)
        if theirs is None or theirs.vm_flags & (arch.VM_WIPEONFORK | arch.VM_HUGETLB):
            continue
        if vma_needs_copy(theirs, vma, semantics):
            for shift, found in more.items():
                there = np.unique(above >> shift)
                here = (there >= vma.start >> 12 + shift) & (there <= (vma.end - 1) >> 12 + shift)
                found.update(there[here].tolist())
    own = np.r_[child.vpns, child.pmd_vpns]
    upper = sum(len(found | set((own >> shift).tolist())) for shift, found in more.items())
    return _tables(child) - len(np.unique(own >> 18)) - len(np.unique(own >> 27)) + upper


# --- running ----------------------------------------------------------------------------------------------------------
def _wanted(scenario: Scenario) -> dict[str, str]:
    """Settings of this machine that the scenario needs."""
    wanted: dict[str, str] = {}

    def want(path: str, value: str) -> None:
        if os.path.exists(path):
            wanted[path] = value

    want("/proc/sys/vm/compaction_proactiveness", "0")  # nobody is to move pages meanwhile
    want("/proc/sys/kernel/numa_balancing", "0")
    if scenario.folio > PAGE:
        if scenario.folio not in live.folio_sizes():
            raise Skip(f"this kernel has no anonymous folios of {scenario.folio >> 10} KiB")
        want(str(live.THP / "khugepaged" / "scan_sleep_millisecs"), "600000")
        want(str(live.THP / "khugepaged" / "pages_to_scan"), "1")
        wanted |= live.mthp(scenario.folio)
    if "ksm" in scenario.needs:
        if not os.path.exists(_KSM):
            raise Skip("this kernel was built without KSM")
        wanted |= {f"{_KSM}/pages_to_scan": "10000", f"{_KSM}/sleep_millisecs": "1", f"{_KSM}/run": "1"}
    if "shmem" in scenario.needs:
        knob = live.THP / f"hugepages-{scenario.folio >> 10}kB" / "shmem_enabled"
        if not knob.exists():
            raise Skip("this kernel was built without huge pages in shared memory")
        wanted[str(knob)] = "advise"
    if "hugetlb" in scenario.needs:
        if not os.path.exists(_HUGETLB):
            raise Skip("this kernel was built without hugetlb")
        wanted[_HUGETLB] = str(int(live.current(_HUGETLB)) + 12)
    if "swap" in scenario.needs:
        area = live.free_swap_area()
        if area is None:
            raise Skip("this kernel was built without zram, or every zram device is in use")
        wanted[area] = str(64 << 20)
    return wanted


_KSM = "/sys/kernel/mm/ksm"
_HUGETLB = "/proc/sys/vm/nr_hugepages"


def run(
    scenarios: Iterable[Scenario],
    *,
    seed: int = 1,
    impl: str = "core",
    semantics: KernelSemantics | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Verify scenarios on this machine, one after the other.

    Everything that is changed on the machine is put back after each, on an exception or a signal too; after a kill
    :func:`ptebatch.live.restore` does it.

    Parameters
    ----------
    scenarios : iterable of Scenario
        See `select`.
    seed : int
        Of the random mixtures.
    impl : {"core", "reference"}
        Which implementation of the model.
    semantics : KernelSemantics, optional
        Of the running kernel; found out when left out.
    progress : callable, optional
        Called as ``progress(done, total)``.

    Returns
    -------
    dict
        ``kernel``, ``semantics``, ``notes``, ``seed``, ``impl``, ``seconds``; ``scenarios``, a dict for each (see
        `Outcome`); ``quantities``, `QUANTITIES` with the checks made and mismatches found.

    Raises
    ------
    PermissionDeniedError
        Not root.
    StateError
        Another process uses the machine's settings.
    """
    began = time.monotonic()
    notes: list[str] = []
    if semantics is None:
        semantics, notes = running()
    todo = list(scenarios)
    outcomes = []
    for i, scenario in enumerate(todo):
        outcomes.append(_verify(scenario, seed, impl, semantics))
        progress(i + 1, len(todo))
    quantities = []
    for name, how, by in QUANTITIES:
        counts = [outcome.quantities.get(name, [0, 0]) for outcome in outcomes]
        checks, bad = (sum(count[i] for count in counts) for i in (0, 1))
        quantities.append({"name": name, "shown": how, "by": by, "checks": checks, "mismatches": bad})
    return {
        "kernel": os.uname().release,
        "semantics": semantics.label,
        "notes": notes,
        "seed": seed,
        "impl": impl,
        "seconds": round(time.monotonic() - began, 3),
        "scenarios": [outcome.to_dict() for outcome in outcomes],
        "quantities": quantities,
    }


def _verify(scenario: Scenario, seed: int, impl: str, semantics: KernelSemantics) -> Outcome:
    began = time.monotonic()
    for attempt in range(1, _ATTEMPTS + 1):
        outcome = Outcome(scenario.name, attempts=attempt)
        check = _Comparison(outcome)
        try:
            _once(scenario, seed, impl, semantics, check)
            if not outcome.checks:
                raise StateError("nothing was compared")
        except Skip as skip:
            outcome.status, outcome.reason = "skipped", str(skip)
        except PermissionDeniedError:
            raise
        except PtebatchError as error:
            check.lines.append(f"{type(error).__name__}: {error}")
        if check.lines:
            outcome.status, outcome.reason = "failed", "\n".join(check.lines)
        if outcome.status != "failed":
            break
    outcome.seconds = time.monotonic() - began
    return outcome


def _once(scenario: Scenario, seed: int, impl: str, semantics: KernelSemantics, check: _Comparison) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(cap.exit_on_signals())
        settings = stack.enter_context(live.Settings(_wanted(scenario), wait=PATIENCE))
        subject = stack.enter_context(live.Subject(forks=4))
        # One CPU: the LRU batch of another would hold references to new pages.
        os.sched_setaffinity(subject.pid, {min(os.sched_getaffinity(0))})
        world = World(subject, settings, scenario, seed)
        stack.callback(world.close)
        scenario.build(world)
        _Run(world, scenario, impl, semantics, check).all(stack)


class _Run:
    """One scenario, its memory built."""

    def __init__(
        self, world: World, scenario: Scenario, impl: str, semantics: KernelSemantics, check: _Comparison
    ) -> None:
        self.world, self.scenario, self.impl, self.semantics, self.check = world, scenario, impl, semantics, check
        self.model: _Model
        self.family: list[tuple[live.Process, Mm, str]] = []

    def all(self, stack: contextlib.ExitStack) -> None:
        events = self._events(stack)
        process: live.Process = self.world.subject
        children = []
        for generation in ("child", "grandchild")[: self.scenario.depth]:
            child = self._fork(process, generation, events)
            process = stack.enter_context(child)
            children.append(child)
        # The youngest writes to all of its pages, the others leave some: nobody else may map those when they do.
        self._step("writes", lambda number, i: number == len(children) or i % (2 + number) == 1)
        self._exit(children)
        self._step("writes again", lambda number, i: True)

    def _step(self, what: str, which: Callable[[int, int], bool]) -> None:
        """Everybody writes to pages, by number in the family and index; then everybody is compared again."""
        if self.check.lines:
            return  # what the model does not know may make a write wait for ever
        self.check.pfn = "reuse or copy"
        for number, (process, mm, name) in enumerate(self.family):
            self.check.where = f"{name} {what}"
            self._store(process, mm, functools.partial(which, number))
        for process, mm, name in self.family:
            self.check.where = f"{name} when all have written" if len(self.family) > 1 else f"{name} {what}"
            _compare(self.check, self.model, mm, _view(process.pid, self.world), self.world, self._mms())

    def _exit(self, children: list[live.Child]) -> None:
        """The children exit, the youngest first; those that are left are compared again each time."""
        if self.check.lines:
            return
        for child in reversed(children):
            mm = self.family[-1][1]
            exit_mmap(mm, semantics=self.semantics, impl=self.impl)
            child.end()
            self.family.pop()
            self.model.forget()
            for process, mm, name in self.family:
                self.check.where = f"{name} after a child's exit"
                _compare(self.check, self.model, mm, _view(process.pid, self.world), self.world, self._mms())

    def _mms(self) -> list[Mm]:
        return [mm for _, mm, _ in self.family]

    def _events(self, stack: contextlib.ExitStack) -> Callable[[], object]:
        """Read fork events: a fork waits until somebody has."""
        fds = []
        for _, _, theirs in self.world.event_fork:
            fd = live.get_fd(self.world.subject.pid, theirs)
            stack.callback(os.close, fd)
            fds.append(fd)

        def read() -> None:
            for fd in list(fds):
                with contextlib.suppress(BlockingIOError):
                    event = os.read(fd, 32)
                    # The new userfaultfd is this process's: without it the child's memory would not stay registered.
                    new = int.from_bytes(event[8:12], "little")
                    stack.callback(os.close, new)
                    fds.append(new)

        return read

    def _fork(self, process: live.Process, name: str, events: Callable[[], object]) -> live.Child:
        check, world = self.check, self.world
        with live.Fork(process) as held:
            if not self.family:
                self.model = _Model(world, self.semantics)
                self.family.append((process, self.model.mm, "parent"))
                self._expect_folios()
                check.where = "before the fork"
                before = _view(process.pid, self.world)
                _compare(check, self.model, self.model.mm, before, world, self._mms())
                _compare_process(check, self.model.mm, before, None)
            model = self.model
            mm = self.family[-1][1]
            exact = name == "child" and before.status["VmPTE"] == _tables(mm) * (PAGE >> 10)
            predicted = model.fork(mm, self.impl)
            family = [*self._mms(), predicted]
            child = held.run(events)
            check.where = f"{self.family[-1][2]} after the fork"
            view = _view(process.pid, self.world)
            _compare(check, model, mm, view, world, family)
            if name == "child":
                _compare_process(check, mm, view, _tables(mm) if exact else None)
            check.where = f"{name} after the fork"
            view = _view(child.pid, self.world)
            _compare(check, model, predicted, view, world, family)
            if name == "child":
                tables = _tables_of_child(mm, predicted, self.semantics) if exact else None
                _compare_process(check, predicted, view, tables)
        self.family.append((child, predicted, name))
        return child

    def _expect_folios(self) -> None:
        order = (self.scenario.folio // PAGE).bit_length() - 1
        areas = [_pages(self.model.mm, start, end) for start, end in self.world.areas]
        chance = self.scenario.build is _random
        if order and not chance and not any((pages.order == order).any() for pages in areas):
            raise Skip(f"memory is too fragmented for folios of {self.scenario.folio >> 10} KiB")
        if any(_pages(self.model.mm, start, end).leaf.any() for start, end in self.world.by_ptes):
            raise StateError("something maps by PMDs what was to be mapped by PTEs")

    def _storable(self, mm: Mm, pages: _Pages) -> Bool:
        """Pages that are there and may be written to without waiting for anybody."""
        vma = [mm.vma_at(pages.start + i * PAGE) for i in range(len(pages.entry))]
        writable = np.array([v is not None and bool(v.vm_flags & arch.VM_WRITE) for v in vma], dtype=bool)
        registered = np.array([v is not None and bool(v.vm_flags & arch.VM_UFFD_WP) for v in vma], dtype=bool)
        protected = registered & (pages.entry & _U(self.model.layout.uffd_wp) != 0)
        modelled = ~pages.hugetlb & ~(pages.leaf & pages.normal & ~pages.anon)
        return pages.present & writable & ~protected & modelled

    def _store(self, process: live.Process, mm: Mm, which: Callable[[int], bool]) -> None:
        """Write one byte of each page: whether that takes a fault, and the page it ends in."""
        for start, end in self.world.areas:
            pages = _pages(mm, start, end)
            nr = len(pages.entry)
            some = range(nr) if nr <= _FEW else {*range(_FEW // 3), *range(nr - _FEW // 3, nr), *range(0, nr, 11)}
            chosen = np.array([i in some and which(i) for i in range(nr)], dtype=bool)
            addresses = start + np.flatnonzero(self._storable(mm, pages) & chosen) * PAGE
            if not len(addresses):
                continue
            faults = process.call("store", runs=[[at, 1] for at in addresses.tolist()])
            predicted = [self.model.write(mm, at, self.impl) for at in addresses.tolist()]
            self.check.arrays("write", addresses, np.array(faults) > 0, np.array(predicted))
        process.call("drain")  # a page with a stray reference is copied where the model reuses it


# --- the scenarios ----------------------------------------------------------------------------------------------------
def _anon(nr: int) -> Callable[[World], None]:
    def build(world: World) -> None:
        """Private anonymous memory in folios of one size, mapped by PTEs."""
        at = world.anon(nr)
        if world.folio_bytes == PMD:
            world.split(at, nr)

    return build


for _kib, _name in ((4, "4k"), (16, "16k"), (32, "32k"), (64, "64k"), (128, "128k"), (256, "256k"), (512, "512k"),
                    (1024, "1m"), (2048, "2m")):  # fmt: skip
    _scenario(f"anon-{_name}", folio=_kib << 10)(_anon(max(64, _kib // 2)))


@_scenario("partial-64k", folio=64 << 10)
def _partial(world: World) -> None:
    """Holes unmapped out of large folios."""
    at = world.anon(128)
    for i in range(8):
        world.munmap(at + (16 * i + i) * PAGE, 1 + i)


@_scenario("misaligned-64k", folio=64 << 10)
def _misaligned(world: World) -> None:
    """Large folios moved to where they straddle the end of a page table."""
    at = world.anon(64)
    world.mremap(at, 64, shift=512 - 37)


@_scenario("dontneed-64k", folio=64 << 10)
def _dontneed(world: World) -> None:
    """Single pages given back out of large folios, and some written anew."""
    at = world.anon(64)
    for i in range(3, 64, 7):
        world.madvise(at + i * PAGE, 1, MADV_DONTNEED)
    for i in range(3, 64, 14):
        world.write(at + i * PAGE, 1)


@_scenario("mixed-readonly-64k", folio=64 << 10)
def _mixed_readonly(world: World) -> None:
    """An earlier fork has left large folios read-only and some pages were written since: both kinds in one folio."""
    at = world.anon(64)
    world.fork_and_exit([(at + i * PAGE, 2) for i in range(1, 64, 5)])


@_scenario("mixed-readonly-4k")
def _mixed_readonly_small(world: World) -> None:
    """The same with small folios."""
    at = world.anon(64)
    world.fork_and_exit([(at + i * PAGE, 2) for i in range(1, 64, 5)])


@_scenario("mprotect-64k", folio=64 << 10)
def _mprotect(world: World) -> None:
    """Areas that are read-only, unreadable and writable cut through large folios."""
    at = world.anon(64)
    world.mprotect(at + 5 * PAGE, 9, PROT_READ)
    world.mprotect(at + 25 * PAGE, 9, PROT_NONE)


@_scenario("mprotect-back-64k", folio=64 << 10)
def _mprotect_back(world: World) -> None:
    """Read-only and writable again: exclusive pages are writable at once."""
    at = world.anon(64)
    world.subject.call("mprotect", address=at, size=64 * PAGE, prot=PROT_READ)
    world.subject.call("mprotect", address=at, size=64 * PAGE, prot=PROT_RW)


@_scenario("lazyfree-64k", folio=64 << 10)
def _lazyfree(world: World) -> None:
    """MADV_FREE leaves clean, old and writable pages; some are written again."""
    at = world.anon(64)
    world.madvise(at, 64, MADV_FREE)
    world.know(at, 64, write=True, young=False, dirty=False, exclusive=True)
    for i in range(2, 64, 6):
        world.write(at + i * PAGE, 2)


@_scenario("dontfork")
def _dontfork(world: World) -> None:
    """MADV_DONTFORK: no such area in the child."""
    at = world.anon(32)
    world.madvise(at, 32, MADV_DONTFORK)


@_scenario("dontfork-64k", folio=64 << 10)
def _dontfork_inside(world: World) -> None:
    """MADV_DONTFORK in the middle of large folios."""
    at = world.anon(64)
    world.madvise(at + 21 * PAGE, 20, MADV_DONTFORK)


@_scenario("wipeonfork")
def _wipeonfork(world: World) -> None:
    """MADV_WIPEONFORK: the child's area is empty."""
    at = world.anon(32)
    world.madvise(at + 8 * PAGE, 16, MADV_WIPEONFORK)


@_scenario("locked")
def _locked(world: World) -> None:
    """mlock: the child's area is not locked."""
    at = world.anon(32)
    world.subject.call("mlock", address=at, size=16 * PAGE)


@_scenario("shared-anon")
def _shared_anon(world: World) -> None:
    """MAP_SHARED anonymous memory: the child starts empty."""
    world.write(world.map(32, flags=MAP_SHARED), 32)


@_scenario("tmpfs-shared")
def _tmpfs_shared(world: World) -> None:
    """MAP_SHARED tmpfs file."""
    at = world.map(32, flags=MAP_SHARED, path=world.file(32, tmpfs=True))
    world.write(at, 16)
    world.read(at + 16 * PAGE, 16, writable=True)


@_scenario("tmpfs-private")
def _tmpfs_private(world: World) -> None:
    """MAP_PRIVATE tmpfs file, read only: nothing is copied."""
    world.read(world.map(32, path=world.file(32, tmpfs=True)), 32)


@_scenario("tmpfs-cowed")
def _tmpfs_cowed(world: World) -> None:
    """MAP_PRIVATE tmpfs file, partly written: then every page is copied."""
    at = world.map(32, path=world.file(32, tmpfs=True))
    world.read(at, 32)
    world.write(at, 32, step=3)


@_scenario("file-private")
def _file_private(world: World) -> None:
    """MAP_PRIVATE file, read only: nothing is copied."""
    world.read(world.map(64, path=world.file(64)), 64)


@_scenario("file-cowed")
def _file_cowed(world: World) -> None:
    """MAP_PRIVATE file, partly written: then every page is copied."""
    at = world.map(64, path=world.file(64))
    world.read(at, 64)
    world.write(at, 64, step=5)


@_scenario("file-shared")
def _file_shared(world: World) -> None:
    """MAP_SHARED file, read and written."""
    at = world.map(64, flags=MAP_SHARED, path=world.file(64))
    world.read(at, 32)
    world.write(at + 32 * PAGE, 32)


@_scenario("zero-page")
def _zero_page(world: World) -> None:
    """Read and never written: the zero page."""
    at = world.map(64)
    world.subject.call("touch", runs=[[at, 64]], write=False)
    world.write(at, 64, step=9)


@_scenario("ksm", needs=["ksm"])
def _ksm(world: World) -> None:
    """Pages of the same content, merged, among others."""
    nr = 32
    at = world.map(nr, advice=MADV_MERGEABLE)
    world.subject.call("fill", runs=[[at, nr]], value=world.random.randrange(1, 256))
    world.know(at, nr, write=False, young=True, dirty=False)

    def merged() -> bool:
        return len(set((world.seen(at, nr) & _U(cap.PM_PFN)).tolist())) == 1

    world.wait("merged the pages", merged, 20)
    world.settings.change(f"{_KSM}/run", "0")
    world.write(at, nr, step=7)


@_scenario("pinned-4k")
def _pinned_small(world: World) -> None:
    """A pinned small page is copied, its neighbours are shared."""
    at = world.anon(32)
    world.pin(at + 7 * PAGE)


@_scenario("pinned-64k", folio=64 << 10)
def _pinned_large(world: World) -> None:
    """One pinned page of a large folio: all of its pages are copied."""
    at = world.anon(64)
    world.pin(at + 21 * PAGE)


@_scenario("pinned-64k-after-fork", folio=64 << 10)
def _pinned_partly_exclusive(world: World) -> None:
    """A pinned folio only some pages of which are exclusive: those are copied, the others shared."""
    at = world.anon(64)
    world.fork_and_exit([(at + i * PAGE, 1) for i in (17, 18, 21, 25)])
    world.pin(at + 21 * PAGE)


@_scenario("fork-of-fork-4k", depth=2)
def _fork_of_fork_small(world: World) -> None:
    """The child forks."""
    world.anon(64)


@_scenario("fork-of-fork-64k", folio=64 << 10, depth=2)
def _fork_of_fork(world: World) -> None:
    """The child forks: three owners of a large folio."""
    world.anon(64)


@_scenario("guard-anon")
def _guard_anon(world: World) -> None:
    """Guard regions in anonymous memory."""
    at = world.anon(64)
    world.guard(at + 5 * PAGE, 7)
    world.guard(at + 40 * PAGE, 1)


@_scenario("guard-anon-64k", folio=64 << 10)
def _guard_anon_large(world: World) -> None:
    """Guard regions that cut through large folios."""
    at = world.anon(64)
    world.guard(at + 5 * PAGE, 7)
    world.guard(at + 27 * PAGE, 10)


@_scenario("guard-memfd")
def _guard_memfd(world: World) -> None:
    """A guard region in shared memory makes fork copy all of its present entries."""
    at = world.map(64, flags=MAP_SHARED, path="memfd")
    world.write(at, 40)
    world.read(at + 40 * PAGE, 8, writable=True)
    world.guard(at + 8 * PAGE, 4)


@_scenario("uffd-wp")
def _uffd_wp(world: World) -> None:
    """Write-protected through a userfaultfd that does not hear of forks: the child forgets."""
    at = world.anon(64)
    world.uffd(at, 64, [(3, 5), (20, 1), (30, 20)])


@_scenario("uffd-wp-64k", folio=64 << 10)
def _uffd_wp_large(world: World) -> None:
    """The same in large folios."""
    at = world.anon(64)
    world.uffd(at, 64, [(3, 5), (20, 1), (30, 20)])


@_scenario("uffd-wp-event-fork")
def _uffd_wp_event_fork(world: World) -> None:
    """Write-protected through a userfaultfd that hears of forks: the child's memory stays so."""
    at = world.anon(64)
    world.uffd(at, 64, [(3, 5), (20, 1), (30, 20)], features=UFFD_FEATURE_EVENT_FORK)


@_scenario("uffd-wp-event-fork-64k", folio=64 << 10)
def _uffd_wp_event_fork_large(world: World) -> None:
    """The same in large folios."""
    at = world.anon(64)
    world.uffd(at, 64, [(3, 5), (20, 1), (30, 20)], features=UFFD_FEATURE_EVENT_FORK)


@_scenario("uffd-wp-pinned", folio=64 << 10)
def _uffd_wp_pinned(world: World) -> None:
    """Write-protected pages of a pinned folio: their copies are write-protected too."""
    at = world.anon(32)
    world.uffd(at, 32, [(3, 5), (14, 6)], features=UFFD_FEATURE_EVENT_FORK)
    world.pin(at + 8 * PAGE)


@_scenario("uffd-wp-memfd")
def _uffd_wp_memfd(world: World) -> None:
    """Markers of a userfaultfd where shared memory is not mapped, and protected pages where it is; forks unheard."""
    at = world.map(64, flags=MAP_SHARED, path="memfd")
    world.write(at, 16)
    world.uffd(at, 64, [(8, 30)], features=UFFD_FEATURE_WP_HUGETLBFS_SHMEM)


@_scenario("uffd-wp-memfd-event-fork")
def _uffd_wp_memfd_event_fork(world: World) -> None:
    """The same, forks heard: the child gets pages and markers."""
    at = world.map(64, flags=MAP_SHARED, path="memfd")
    world.write(at, 16)
    world.uffd(at, 64, [(8, 30)], features=UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_EVENT_FORK)


@_scenario("guard-uffd-wp-memfd")
def _guard_uffd_wp_memfd(world: World) -> None:
    """Guards make fork copy shared memory that also has uffd-wp markers; forks unheard: those stay behind."""
    at = world.map(64, flags=MAP_SHARED, path="memfd")
    world.write(at, 16)
    world.uffd(at, 64, [(8, 30)], features=UFFD_FEATURE_WP_HUGETLBFS_SHMEM)
    world.guard(at + 50 * PAGE, 3)


@_scenario("swap-4k", needs=["swap"])
def _swap_small(world: World) -> None:
    """Some pages are swapped out."""
    at = world.anon(64)
    world.page_out(at + 10 * PAGE, 30)


@_scenario("swap-64k", folio=64 << 10, needs=["swap"])
def _swap_large(world: World) -> None:
    """Whole large folios are swapped out."""
    at = world.anon(128)
    world.page_out(at + 32 * PAGE, 48)


@_scenario("swap-partly-64k", folio=64 << 10, needs=["swap"])
def _swap_partly(world: World) -> None:
    """Parts of large folios are swapped out: the folios are split first."""
    at = world.anon(64)
    world.page_out(at + 3 * PAGE, 20)


@_scenario("swap-shared-slots", needs=["swap"], depth=2)
def _swap_twice(world: World) -> None:
    """Swapped-out pages, inherited twice."""
    at = world.anon(32)
    world.page_out(at, 32)


@_scenario("swap-uffd-wp", needs=["swap"])
def _swap_uffd_wp(world: World) -> None:
    """Write-protected through a userfaultfd, then swapped out; forks unheard."""
    at = world.anon(32)
    world.uffd(at, 32, [(4, 9)])
    world.page_out(at, 20)


@_scenario("swap-uffd-wp-event-fork", needs=["swap"])
def _swap_uffd_wp_event_fork(world: World) -> None:
    """The same, forks heard."""
    at = world.anon(32)
    world.uffd(at, 32, [(4, 9)], features=UFFD_FEATURE_EVENT_FORK)
    world.page_out(at, 20)


@_scenario("pmd-2m", folio=PMD)
def _pmd(world: World) -> None:
    """Huge pages mapped by PMDs."""
    world.anon(1024)


@_scenario("pmd-and-ptes-2m", folio=PMD)
def _pmd_and_ptes(world: World) -> None:
    """One huge page mapped by a PMD, one by PTEs."""
    at = world.anon(1024)
    world.split(at + PMD, 512)


@_scenario("pmd-moved-2m", folio=PMD)
def _pmd_moved(world: World) -> None:
    """A PMD is moved as it is."""
    world.mremap(world.anon(1024), 1024)


@_scenario("pmd-misaligned-2m", folio=PMD)
def _pmd_misaligned(world: World) -> None:
    """Huge pages moved to where no PMD fits: PTEs that straddle the end of a page table."""
    world.mremap(world.anon(1024), 1024, shift=77)


@_scenario("pmd-holes-2m", folio=PMD)
def _pmd_holes(world: World) -> None:
    """Holes unmapped out of one of two huge pages."""
    at = world.anon(1024)
    world.munmap(at + 600 * PAGE, 100)


@_scenario("pmd-readonly-2m", folio=PMD)
def _pmd_readonly(world: World) -> None:
    """An earlier fork has left PMDs read-only."""
    world.anon(1024)
    world.fork_and_exit()


@_scenario("pmd-wipeonfork-2m", folio=PMD)
def _pmd_wipeonfork(world: World) -> None:
    """MADV_WIPEONFORK on one huge page, MADV_DONTFORK on another, a third as it is."""
    at = world.anon(1536)
    world.madvise(at, 512, MADV_WIPEONFORK)
    world.madvise(at + PMD, 512, MADV_DONTFORK)


@_scenario("pmd-uffd-wp-2m", folio=PMD)
def _pmd_uffd_wp(world: World) -> None:
    """A PMD write-protected through a userfaultfd; forks unheard."""
    at = world.anon(1024)
    world.uffd(at, 1024, [(512, 512)])


@_scenario("pmd-uffd-wp-event-fork-2m", folio=PMD)
def _pmd_uffd_wp_event_fork(world: World) -> None:
    """The same, forks heard."""
    at = world.anon(1024)
    world.uffd(at, 1024, [(512, 512)], features=UFFD_FEATURE_EVENT_FORK)


@_scenario("huge-zero-page", folio=PMD)
def _huge_zero_page(world: World) -> None:
    """Read and never written: the huge zero page."""
    at = world.map(1024, advice=MADV_HUGEPAGE)
    world.read(at, 512)
    world.write(at + PMD, 512)


@_scenario("pinned-2m", folio=PMD)
def _pinned_pmd(world: World) -> None:
    """A pinned huge page: the PMD is split and every page copied; its neighbour is shared."""
    at = world.anon(1024)
    world.pin(at + 100 * PAGE)


@_scenario("pinned-2m-ptes", folio=PMD)
def _pinned_2m_ptes(world: World) -> None:
    """A pinned huge page that PTEs map."""
    at = world.anon(512)
    world.split(at, 512)
    world.pin(at + 100 * PAGE)


@_scenario("fork-of-fork-2m", folio=PMD, depth=2)
def _fork_of_fork_pmd(world: World) -> None:
    """The child forks: three owners of a huge page."""
    world.anon(512)


@_scenario("swap-2m", folio=PMD, needs=["swap"])
def _swap_pmd(world: World) -> None:
    """A huge page is swapped out, its neighbour is not."""
    at = world.anon(1024)
    world.page_out(at, 512)


@_scenario("shmem-2m", folio=PMD, needs=["shmem"])
def _shmem_pmd(world: World) -> None:
    """Shared memory in a huge page that a PMD maps: not copied even where fork copies the area for its guards."""
    at = world.map(1024, flags=MAP_SHARED, path="memfd", advice=MADV_HUGEPAGE)
    world.write(at, 512)
    world.guard(at + 700 * PAGE, 3)
    world.write(at + 800 * PAGE, 10)


@_scenario("hugetlb-private", needs=["hugetlb"])
def _hugetlb(world: World) -> None:
    """Private hugetlb pages."""
    world.hugetlb(3)


@_scenario("hugetlb-shared", needs=["hugetlb"])
def _hugetlb_shared(world: World) -> None:
    """Shared hugetlb pages: the child starts empty."""
    world.hugetlb(2, flags=MAP_SHARED)


@_scenario("hugetlb-read-only", needs=["hugetlb"])
def _hugetlb_read_only(world: World) -> None:
    """Private hugetlb pages, made read-only."""
    at = world.hugetlb(2)
    world.mprotect(at, 1024, PROT_READ)


@_scenario("hugetlb-pinned", needs=["hugetlb"])
def _hugetlb_pinned(world: World) -> None:
    """A pinned hugetlb page is copied whole, its neighbour is shared."""
    at = world.hugetlb(2)
    world.pin(at + 3 * PAGE)


# --- random mixtures --------------------------------------------------------------------------------------------------
def _some_runs(world: World, nr: int, most: int = 5) -> list[tuple[int, int]]:
    """A few runs of pages, (first, number), in order and apart."""
    edges = sorted(world.random.sample(range(nr + 1), 2 * world.random.randint(1, min(most, nr // 2))))
    return [(edges[i], edges[i + 1] - edges[i]) for i in range(0, len(edges), 2)]


def _random_anon(world: World) -> None:
    nr = world.random.randint(16, max(160, 3 * world.folio_bytes // PAGE))
    at = world.anon(nr, small=world.random.random() < 0.3, shift=world.random.randrange(512))
    if world.random.random() < 0.4:
        at = world.mremap(at, nr, shift=world.random.randrange(512))
    kind = world.random.randrange(7)
    for first, n in _some_runs(world, nr):
        start = at + first * PAGE
        if kind == 0:
            world.munmap(start, n)
        elif kind == 1:
            world.madvise(start, n, MADV_DONTNEED)
        elif kind == 2:
            world.mprotect(start, n, world.random.choice([PROT_NONE, PROT_READ]))
        elif kind == 3:
            world.madvise(start, n, world.random.choice([MADV_DONTFORK, MADV_WIPEONFORK]))
        elif kind == 4:
            world.pin(start)
        elif kind == 5 and "swap" in world.needs:
            world.page_out(start, n)
    if world.folio_bytes == PMD and world.random.random() < 0.3:
        world.split(at + -at % PMD, max(0, nr - (-at % PMD) // PAGE))


def _random_private_file(world: World) -> None:
    nr = world.random.randint(8, 96)
    at = world.map(nr, path=world.file(nr, tmpfs=world.random.random() < 0.5), shift=world.random.randrange(512))
    world.read(at, nr)
    for first, n in _some_runs(world, nr) if world.random.random() < 0.7 else ():
        world.write(at + first * PAGE, n)


def _random_shared(world: World) -> None:
    nr = world.random.randint(8, 96)
    path = world.random.choice([None, "memfd"])
    at = world.map(nr, flags=MAP_SHARED, path=path, shift=world.random.randrange(512))
    for first, n in _some_runs(world, nr):
        world.write(at + first * PAGE, n)


def _random_zero_page(world: World) -> None:
    nr = world.random.randint(8, 96)
    at = world.map(nr, shift=world.random.randrange(512))
    world.read(at, nr)
    for first, n in _some_runs(world, nr):
        world.write(at + first * PAGE, n)


def _random_guards(world: World) -> None:
    nr = world.random.randint(8, 96)
    if world.random.random() < 0.5:
        at = world.anon(nr, shift=world.random.randrange(512))
    else:
        at = world.map(nr, flags=MAP_SHARED, path="memfd", shift=world.random.randrange(512))
        world.write(at, nr)
    for first, n in _some_runs(world, nr):
        world.guard(at + first * PAGE, n)


def _random_uffd(world: World) -> None:
    nr = world.random.randint(8, 96)
    features = world.random.choice([0, UFFD_FEATURE_EVENT_FORK])
    if world.random.random() < 0.6:
        at = world.anon(nr, shift=world.random.randrange(512))
    else:
        features |= UFFD_FEATURE_WP_HUGETLBFS_SHMEM
        at = world.map(nr, flags=MAP_SHARED, path="memfd", shift=world.random.randrange(512))
        world.write(at, nr // 2)
    world.uffd(at, nr, _some_runs(world, nr), features=features)


_RANDOM = (
    *(_random_anon, _random_anon, _random_anon, _random_private_file, _random_shared, _random_zero_page),
    *(_random_guards, _random_uffd),
)


def _random(world: World) -> None:
    """A random mixture of anonymous, file, shared and unwritten memory, whole and in parts."""
    if world.random.random() < 0.4:
        areas = [(world.anon(nr), nr) for nr in (world.random.randint(20, 80) for _ in range(2))]
        written = [(at + first * PAGE, n) for at, nr in areas for first, n in _some_runs(world, nr)]
        world.fork_and_exit(written)
    for _ in range(world.random.randint(3, 6)):
        world.random.choice(_RANDOM)(world)


for _number, _kib in enumerate((4, 16, 32, 64, 64, 128, 256, 2048, 1024, 64) * 2, 1):
    _needs = ["swap"] if _number % 3 == 0 else []
    _scenario(f"random-{_number:02}", folio=_kib << 10, needs=_needs, depth=1 + (_number % 5 == 0))(_random)
