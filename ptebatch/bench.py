"""Measuring: how long the copy takes, beside the streaming limit, the naive loop and other peers.

What is timed is the pass over the PFNs and the walk of all page tables, by the core's own clock, into page tables that
exist and have been touched, from a parent that is fresh in every round. Bringing it back to before the fork is not
timed; what Python takes around the core shows in ``call_ns_per_pte``, the whole of `ForkPlan.run`.

The yardstick is the streaming limit of the same round: ``src &= ~RW; dst = src & ~A`` over as many entries, in the
fastest of three variants. All cases take turns within a round, each begins as often as any other, and what runs before
a case changes too, so drift of the machine falls on all of them. A case's time is the median of its rounds. Before they
are timed, the results of every case are checked once (the core's by `ForkCheck`, a peer's against the core's).

Rows are plain dicts, see `run_bench`.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt

from ptebatch import _measure, batch, live, memory
from ptebatch.arch import (
    VM_EXEC,
    VM_READ,
    VM_WRITE,
    X86_64,
    PteLayout,
    is_cow_mapping,
    pte_modify,
    vm_get_page_prot,
)
from ptebatch.capture import Capture, capture
from ptebatch.errors import ArgumentError, PermissionDeniedError, StateError
from ptebatch.folio import tally
from ptebatch.fork import ForkPlan, ForkStats
from ptebatch.mm import MM_SWAPENTS, Mm, none_tables, pte_pfns, swap_keys
from ptebatch.peers import NAIVE, Peer, available, flatten, kernel_layout, part
from ptebatch.protect import wrprotect_range
from ptebatch.semantics import LATEST, KernelSemantics, running
from ptebatch.semantics import get as preset
from ptebatch.workload import PIECE, Workload, format_size, parse

__all__ = [
    "FOLIOS", "SCHEMA", "Case", "ForkCheck", "compare", "environment", "load", "measure", "rows", "run_bench",
    "run_kernel_layout", "run_limit", "run_live",
]  # fmt: skip

Bools = npt.NDArray[np.bool_]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Area = tuple[int, int]
Progress = Callable[[int, int], object]
Row = dict[str, Any]

SCHEMA = 1
PAGE, PMD = 4096, 2 << 20
FOLIOS = tuple(PAGE << order for order in (0, 2, 3, 4, 5, 6, 7, 8, 9))
"""Folio sizes measured unless others are asked for: those of the published table."""
MIXED = (4096, 16384, 65536, 2 << 20)
"""Folio sizes of the mixed workload, in equal shares of the pages."""
ROUNDS = 25
NAIVE_BYTES = 128 << 20
"""Memory the naive loop runs on at most: it is too slow for more, and its time per entry does not get better."""
RESETS, RESETS_PTES = 4, 1 << 19
"""How often a case of at most so many entries is reset before a run: what a slower case drove out of a large last-level
cache comes back to stay only when it is touched again, and which case that hits would differ from run to run."""
REAL_BYTES = 1 << 30
REAL_FOLIO = 64 << 10

# fork() of 1 GiB, PTE-mapped: folio KiB -> seconds before and after the batching series (v3), David Hildenbrand,
# <20240129124649.189745-1-david@redhat.com>, Intel Xeon Silver 4210R.
PUBLISHED_BYTES = 1 << 30
PUBLISHED = {
    4: (0.014328, 0.014035),
    16: (0.014263, 0.01196),
    32: (0.014334, 0.01094),
    64: (0.014046, 0.010444),
    128: (0.014011, 0.010063),
    256: (0.013993, 0.009938),
    512: (0.013983, 0.00985),
    1024: (0.013986, 0.00982),
    2048: (0.014305, 0.010076),
}


# --- measuring --------------------------------------------------------------------------------------------------------
@dataclass
class Case:
    """One thing to time.

    Attributes
    ----------
    row : dict
        What its row says besides the times: at least ``source`` and ``path``.
    ptes : int
        Present entries that one run copies.
    reset : callable
        Make everything as it was before a run; not timed.
    run : callable
        What is timed.
    check : callable
        Given what `run` returned, raises StateError if the result is wrong; called once, before the timed rounds.
    clock : callable
        Nanoseconds; what it goes on by during a run is the run's time. The core and the streaming loops have clocks of
        their own, which leave out what Python does around them.
    """

    row: Row
    ptes: int
    reset: Callable[[], Any]
    run: Callable[[], Any]
    check: Callable[[Any], None] = lambda result: None
    clock: Callable[[], int] = time.perf_counter_ns
    times_ns: list[int] = field(default_factory=list)
    calls_ns: list[int] = field(default_factory=list)

    @property
    def ns_per_pte(self) -> float:
        """Median time for each present entry."""
        return float(np.median(self.times_ns)) / self.ptes


def measure(
    cases: Sequence[Case], rounds: int, tick: Callable[[], object] = lambda: None, *, check: bool = True
) -> None:
    """Time all cases `rounds` times, taking turns; a round before that checks their results and warms up.

    Parameters
    ----------
    cases : sequence of Case
        Their ``times_ns`` are filled.
    rounds : int
    tick : callable
        Called after every round.
    check : bool
        False goes on with cases that a call before has checked.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(-1 if check else 0, rounds):
            first = number % len(cases) if cases else 0
            turn = [*cases[first:], *cases[:first]]
            for case in [*turn[:1], *turn[:0:-1]] if number % 2 else turn:
                for _ in range(RESETS if case.ptes <= RESETS_PTES else 1):
                    case.reset()
                begin, began = time.perf_counter_ns(), case.clock()
                result = case.run()
                took, call = case.clock() - began, time.perf_counter_ns() - begin
                if number < 0:
                    case.check(result)
                else:
                    case.times_ns.append(took)
                    case.calls_ns.append(call)
                del result
            tick()
    finally:
        if collecting:
            gc.enable()


def rows(cases: Iterable[Case], **common: Any) -> list[Row]:
    """Return a row for each case, in ns per PTE and as a multiple of the limit; of the limits, the fastest only."""
    cases = list(cases)
    limits = sorted((case for case in cases if case.row["source"] == "limit"), key=lambda case: case.ns_per_pte)
    limit = limits[0].ns_per_pte if limits else None
    found = []
    for case in cases:
        if case in limits[1:]:
            continue
        low, q1, q3, high = (float(q) / case.ptes for q in np.percentile(case.times_ns, (0, 25, 75, 100)))
        found.append(
            {
                **common,
                **case.row,
                "ptes": case.ptes,
                "ns_per_pte": case.ns_per_pte,
                "x_limit": None if limit is None else case.ns_per_pte / limit,
                "rounds": len(case.times_ns),
                "min_ns_per_pte": low,
                "q1_ns_per_pte": q1,
                "q3_ns_per_pte": q3,
                "max_ns_per_pte": high,
                "call_ns_per_pte": float(np.median(case.calls_ns)) / case.ptes if case.calls_ns else None,
            }
        )
    return found


class _Ticker:
    """Counts steps for a progress callback."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self) -> None:
        self._done += 1
        self._progress(self._done, self._total)


# --- what is measured -------------------------------------------------------------------------------------------------
def _mapped(mm: Mm) -> tuple[Bools, I64]:
    """Which entries map a normal page, and the PFN of each of those."""
    present, pfns = pte_pfns(mm.layout, mm.entries)
    normal = present & ((mm.entries & np.uint64(mm.layout.special)) == 0)
    return normal, pfns[normal].astype(np.int64)


def _present(mm: Mm, start: int, end: int) -> U64:
    entries = mm.entries_of(start, end)
    return entries[pte_pfns(mm.layout, entries)[0]]


class ForkCheck:
    """Checks a fork's result by rules that know nothing of how it was made.

    Every entry of the child maps the page the parent's does and is not young, and in a private mapping neither of the
    two is writable; or it maps a page that was copied early because of a pin, which is young and writable if the parent
    is. Every page has as many more mappings, and its folio as many more references, as entries of the child map it; the
    child's rss and the statistics add up to its entries.

    Parameters
    ----------
    plan : ForkPlan
        Before it is run.
    """

    def __init__(self, plan: ForkPlan) -> None:
        self._plan = plan
        self._pfns, _ = tally(_mapped(plan.mm)[1])
        self._before = self._counts(self._pfns)

    def _counts(self, pfns: I64) -> tuple[I64, I64]:
        folios = self._plan.mm.folios
        return folios.mapcounts(pfns), folios.refcounts(pfns)

    def __call__(self, stats: ForkStats) -> None:
        """Check what ``plan.run()`` did and returned.

        Raises
        ------
        StateError
            Naming the rules that are broken.
        """
        mm, child, layout = self._plan.mm, self._plan.child, self._plan.mm.layout
        parent = mm.entries[np.searchsorted(mm.vpns, child.vpns)]
        normal, pfns = _mapped(child)
        present, _ = pte_pfns(layout, child.entries)
        cow = np.zeros(present.shape, dtype=bool)
        for vma in (context.src_vma for context in self._plan.contexts):
            if is_cow_mapping(vma.vm_flags):
                first, last = child.rows(vma.start, vma.end)
                pages = (child.vpns[first:last, None] + np.arange(layout.ptrs_per_pte)) << layout.page_shift
                cow[first:last] |= (pages >= vma.start) & (pages < vma.end)
        copied = np.zeros(present.shape, dtype=bool)
        copied[normal] = pte_pfns(layout, parent)[1][normal].astype(np.int64) != pfns
        shared = present & ~copied
        nr_copied = np.count_nonzero(copied)
        pages, maps = tally(pfns)
        orders = mm.folios.orders(pages)
        starts = np.flatnonzero(np.diff(pages >> orders << orders, prepend=-1))  # first page of each folio
        per_folio = np.add.reduceat(maps, starts) if len(starts) else maps
        references = np.repeat(per_folio, np.diff(starts, append=len(pages)))
        at = np.minimum(np.searchsorted(self._pfns, pages), len(self._pfns) - 1)
        new = self._pfns[at] != pages
        before = (np.where(new, 0, counts[at]) for counts in self._before)
        mapcounts, refcounts = (after - old for after, old in zip(self._counts(pages), before, strict=True))
        swapped = len(swap_keys(layout, child.entries.reshape(-1), self._plan.semantics))
        writable = (child.entries | parent) & np.uint64(layout.write) != 0
        rules = {
            "nothing was copied": not present.any(),
            "pages differ from the parent's": not nr_copied == np.count_nonzero(new) == stats.copied_pages,
            "the child has young entries": (shared & (child.entries & np.uint64(layout.young) != 0)).any(),
            "private memory is writable": (cow & shared & writable).any(),
            "mapcounts differ from the child's entries": (mapcounts != maps).any(),
            "refcounts differ from the child's entries": (refcounts != references).any(),
            "rss differs from the child's entries": int(child.rss.sum()) != len(pfns) + swapped
            or child.rss[MM_SWAPENTS] != swapped,
            "statistics differ from the child's entries": stats.ptes_present != int(np.count_nonzero(present)),
        }
        broken = [rule for rule, is_broken in rules.items() if is_broken]
        if broken:
            raise StateError(f"the benchmark's fork went wrong: {', '.join(broken)}; please report this")


def _plan(
    mm: Mm, semantics: KernelSemantics, *, batching: bool | None = None, keep: bool = True, threads: int = 1
) -> ForkPlan:
    """Plan a fork on one thread, as everything it is compared with runs on one."""
    return ForkPlan(mm, semantics=semantics, batching=batching, keep=keep, threads=threads)


def core_clock() -> int:
    """Return the time the core took so far, in ns."""
    return batch.core_ns


def core_case(plan: ForkPlan) -> Case:
    """Time `plan`, made with ``keep=True`` and not run yet."""
    ptes = sum(len(_present(plan.mm, context.src_vma.start, context.src_vma.end)) for context in plan.contexts)
    row = {"source": "core", "path": "batched" if plan.batching else "single"}
    return Case(row, ptes, plan.reset, plan.run, ForkCheck(plan), core_clock)


def simd_level() -> str:
    """Return the SIMD level of the core: the best this CPU has, or what PTEBATCH_SIMD asks for."""
    wanted = os.environ.get("PTEBATCH_SIMD") or "auto"
    have = ("off", *_measure.supported())
    if wanted == "auto":
        return have[-1]
    if wanted not in have:
        raise ArgumentError(f"PTEBATCH_SIMD={wanted}: this CPU has {', '.join(have)}; or choose auto")
    return wanted


def limit_level() -> str:
    """Return the SIMD level to measure the limit at: the core's, or the best this CPU has where the lane is off."""
    level = simd_level()
    return _measure.supported()[-1] if level == "off" else level


def limit_cases(entries: U64, layout: PteLayout) -> list[Case]:
    """Return the streaming limit over copies of `entries`, in all variants at `simd_level`."""
    level = limit_level()
    src, dst = memory.copy(entries), memory.zeros(len(entries))
    dst.fill(0)  # touched, as the child's tables are

    def reset() -> None:
        src[...] = entries
        dst[...] = 0

    def check(_: None) -> None:
        if (src != entries & ~np.uint64(layout.write)).any() or (dst != src & ~np.uint64(layout.young)).any():
            raise StateError("the streaming loop went wrong; please report this")

    def case(variant: str) -> Case:
        row = {"source": "limit", "path": "limit", "variant": variant, "simd": level}
        run = functools.partial(_measure.py_stream, src, dst, layout.write, layout.young, level, variant)
        return Case(row, len(entries), reset, run, check, _measure.py_streamed_ns)

    return [case(variant) for variant in _measure.STREAM_VARIANTS]


def pool_case(plan: ForkPlan, ptes: int) -> Case:
    """Allocation and first touch of the child's page tables, which is not part of the other cases' times."""
    layout, nr = plan.mm.layout, len(plan.child.vpns)
    none_value = layout.none_value

    def run() -> U64:
        tables = none_tables(layout, nr)
        tables[:, 0] = none_value  # a table is a page
        return tables

    def check(tables: U64) -> None:
        if (tables != none_value).any():
            raise StateError("the child's page tables are not empty; please report this")

    return Case({"source": "pool", "path": "pool"}, ptes, lambda: None, run, check)


def peer_cases(some: Iterable[Peer], mm: Mm, semantics: KernelSemantics, area: Area | None = None) -> list[Case]:
    """Time peers on the first VMA of `mm` or an area of it; their results must be what the core makes of the same.

    Raises
    ------
    StateError
        The memory is not plain, see `ptebatch.peers.flatten`.
    """
    if area is not None:
        mm = part(mm, *area)
    before = flatten(mm)
    plan = _plan(mm, semantics)
    plan.run()
    after = flatten(mm, plan.child)
    plan.reset()

    def case(peer: Peer) -> Case:
        state = peer.fresh(before)

        def check(_: None) -> None:
            if peer.result(state, before) != after:
                raise StateError(f"{peer.source} ({peer.path}) and the core disagree; please report this")

        def reset() -> None:
            peer.reset(state, before)

        return Case(
            {"source": peer.source, "path": peer.path, "size_bytes": len(before.src) << mm.layout.page_shift},
            len(before.src), reset, lambda: peer.run(state), check,
        )  # fmt: skip

    return [case(peer) for peer in some]


def memory_cases(mm: Mm, semantics: KernelSemantics) -> list[Case]:
    """Return single and batched path, streaming limit and pool, on one address space that they share."""
    single, batched = (_plan(mm, semantics, batching=on) for on in (False, None))
    core = [core_case(single), core_case(batched)]
    entries = [_present(mm, context.src_vma.start, context.src_vma.end) for context in batched.contexts]
    return [*core, *limit_cases(np.concatenate(entries), mm.layout), pool_case(batched, core[0].ptes)]


# --- real memory ------------------------------------------------------------------------------------------------------
@dataclass
class _Real:
    label: str
    seen: Capture
    semantics: KernelSemantics
    notes: list[str]


def _capture(pid: str | None, size: int) -> _Real:
    """Capture the process asked for; else one started for it that has folios of 64 KiB; else this interpreter."""
    semantics, notes = running()
    if pid is not None:
        seen = capture(pid, semantics=semantics, swap="drop")
        return _Real(f"process {seen.env['pid']} ({seen.env['comm']})", seen, semantics, notes)
    try:
        with live.Subject() as subject:
            with live.Settings(live.mthp(REAL_FOLIO)):
                subject.anon(size, REAL_FOLIO)
            seen = capture(subject.pid, semantics=semantics, swap="drop")
        label = f"a process with {format_size(size)} in {format_size(REAL_FOLIO)} folios"
        return _Real(label, seen, semantics, notes)
    except (ArgumentError, PermissionDeniedError, StateError) as error:
        notes = [*notes, f"real memory is this interpreter's, not a process with 64KiB folios: {error}"]
        return _Real("this interpreter", capture("self", semantics=semantics, swap="drop"), semantics, notes)


def _plain_area(mm: Mm, most: int) -> Area | None:
    """Longest run of present entries in private anonymous memory, at most `most` bytes."""
    best = (0, 0)
    for vma in mm.vmas:
        if vma.vm_ops is not None or not is_cow_mapping(vma.vm_flags):
            continue
        for start, end in mm.covered(vma.start, vma.end):
            entries = mm.ptes(start, end)
            present, _ = pte_pfns(mm.layout, entries)
            present &= (entries & np.uint64(mm.layout.special)) == 0
            edges = np.flatnonzero(np.diff(present, prepend=False, append=False)).reshape(-1, 2)
            if len(edges):
                first, last = edges[np.argmax(edges[:, 1] - edges[:, 0])].tolist()
                first, last = (start + (page << mm.layout.page_shift) for page in (first, last))
                best = max(best, (first, last), key=lambda area: area[1] - area[0])
    return (best[0], min(best[1], best[0] + most)) if best[1] else None


def _real_cases(real: _Real) -> list[Case]:
    mm = real.seen.mm
    cases = memory_cases(mm, real.semantics)
    area = _plain_area(mm, NAIVE_BYTES)
    try:
        naive = peer_cases([NAIVE], mm, real.semantics, area) if area else []
    except StateError as error:
        real.notes.append(f"no naive loop on real memory: {error}")
        naive = []
    return [*naive, *cases]


# --- comparing --------------------------------------------------------------------------------------------------------
KEYS = (
    "memory", "operation", "size_bytes", "folio_bytes", "order", "mapping", "arch", "semantics", "source", "path",
    "level", "threads",
)  # fmt: skip
"""What makes two rows of two documents the same measurement."""


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what ``ptebatch bench --json`` has written; its rows as a table: ``pandas.DataFrame(load(path)["rows"])``.

    Raises
    ------
    ArgumentError
        No such document, or one of another schema.
    """
    name = os.fspath(path)
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{name} is no JSON of `ptebatch bench --json`: {error}") from None
    rows_ = document.get("rows") if isinstance(document, dict) else None
    if not isinstance(rows_, list) or not isinstance(document.get("env"), dict) or not all(map(_is_row, rows_)):
        raise ArgumentError(f"{name} is no document of `ptebatch bench --json`")
    if document.get("schema") != SCHEMA:
        raise ArgumentError(f"{name} has schema {document.get('schema')!r}, not {SCHEMA}: measure again")
    return document


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str | int | None) for key in KEYS):
        return False
    times = [row.get(key) for key in ("ns_per_pte", "q1_ns_per_pte", "q3_ns_per_pte") if key in row]
    return "ns_per_pte" in row and all(isinstance(t, int | float) and 0 < t < float("inf") for t in times)


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Compare two documents measurement by measurement.

    The two were not measured in turns: what changed of the machine meanwhile is part of the difference. Multiples of
    the limit are steadier than times.

    Parameters
    ----------
    before, after : dict
        What `load` returned.

    Returns
    -------
    dict
        ``mode`` "compare"; ``env``: what differs, as "this -> that"; ``rows``: `KEYS` with ``before_ns_per_pte``,
        ``after_ns_per_pte``, ``change`` (a ratio), ``change_x_limit`` (None without a limit) and ``apart``: whether
        the two's middle halves do not touch. What only one of them has, and published figures, are left out.

    Raises
    ------
    ArgumentError
        The two have no measurement in common.
    """
    earlier = {tuple(row.get(key) for key in KEYS): row for row in before["rows"]}
    found = []
    for row in after["rows"]:
        key = tuple(row.get(name) for name in KEYS)
        old = earlier.get(key)
        if old is None or row["source"] == "published":
            continue
        limits = old.get("x_limit"), row.get("x_limit")
        found.append(
            {
                **dict(zip(KEYS, key, strict=True)),
                "before_ns_per_pte": old["ns_per_pte"],
                "after_ns_per_pte": row["ns_per_pte"],
                "change": row["ns_per_pte"] / old["ns_per_pte"] - 1,
                "change_x_limit": limits[1] / limits[0] - 1 if all(limits) else None,
                "apart": row.get("q1_ns_per_pte", 0) > old.get("q3_ns_per_pte", 0)
                or row.get("q3_ns_per_pte", 0) < old.get("q1_ns_per_pte", 0),
            }
        )
    if not found:
        raise ArgumentError("the two documents have no measurement in common: use the same mode and options")
    names = dict.fromkeys([*before["env"], *after["env"]])
    env = {name: (before["env"].get(name, "-"), after["env"].get(name, "-")) for name in names}
    differs = {name: f"{old} -> {new}" for name, (old, new) in env.items() if old != new}
    return {"schema": SCHEMA, "mode": "compare", "env": differs, "rows": found, "bound": [], "notes": []}


# --- environment ------------------------------------------------------------------------------------------------------
def environment() -> dict[str, str]:
    """Describe the machine, the kernel and the build that figures come from."""
    cpuinfo = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    found = [re.search(rf"^{key}\s*:\s*(\d+)$", cpuinfo, re.MULTILINE) for key in ("cpu family", "model", "stepping")]
    numbers = f" ({'/'.join(number[1] for number in found if number)})" if all(found) else ""
    caches = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = _read(index / "type")
        kind = {"Data": "d", "Instruction": "i"}.get(kind, "")
        caches.append(f"L{_read(index / 'level')}{kind} {_read(index / 'size')}")
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    try:
        thp = live.current(live.THP / "enabled")
    except (PermissionDeniedError, StateError):
        thp = "none"
    return {
        "cpu": f"{model[1] if model else platform.processor() or platform.machine()}{numbers}, {os.cpu_count()} CPUs",
        "caches": ", ".join(caches) or "unknown",
        "memory": f"{int(memory[1]) / (1 << 20):.1f} GiB" if memory else "unknown",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "thp": thp,
        "compiler": _measure.COMPILER,
        "flags": _measure.CFLAGS,
        "simd": simd_level(),
        "cython": _measure.CYTHON,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "numpy": np.__version__,
        "ptebatch": metadata.version("ptebatch"),
        "commit": _commit(),
    }


def _read(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _commit() -> str:
    """Commit of the source tree this package was installed from, with -dirty if that has been changed."""
    try:
        origin = json.loads(metadata.distribution("ptebatch").read_text("direct_url.json") or "{}").get("url", "")
        tree = unquote(urlsplit(origin).path) if origin.startswith("file:") else ""
        if not tree or not Path(tree, ".git").exists():
            return "unknown"
        command = ["git", "-C", tree, "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, ValueError, subprocess.SubprocessError):
        return "unknown"


# --- against the limit ------------------------------------------------------------------------------------------------
GIB, TIB = 1 << 30, 1 << 40
LIMIT_SIZES = (128 << 20, GIB, 64 * GIB)
LIMIT_ROUNDS = {128 << 20: 75, GIB: 25, 64 * GIB: 7, TIB: 3}
TARGETS: dict[tuple[int, int | str], tuple[float, float | None]] = {
    (128 << 20, 0): (14, 9.5), (128 << 20, 2): (8, 6), (128 << 20, 4): (4.2, 3.2), (128 << 20, 9): (3, 2.3),
    (GIB, 0): (11, 8), (GIB, 2): (6, 4.5), (GIB, 4): (3, 2.2), (GIB, 9): (2.4, 1.8),
    (64 * GIB, 0): (10, 8), (64 * GIB, 2): (3.6, 2.6), (64 * GIB, 4): (2.6, 1.9), (64 * GIB, 9): (2.7, 1.9),
    (64 * GIB, "mixed"): (5, None),
}  # fmt: skip
"""What the batched path must reach, and aims at, as multiples of the streaming limit: by size and order.

The single path of order 0 has the same targets: nothing can be batched there.
"""
TARGET_ORDERS = (0, 2, 4, 9)
PEER_TARGETS: dict[str, dict[int, float]] = {
    "naive": {0: 100, 2: 200, 4: 400, 9: 400},
    "numpy": {0: 6, 2: 10, 4: 20, 9: 18},
    "numba": {0: 2.8, 2: 4.5, 4: 8, 9: 5},
}
"""How many times a peer's time per entry must be that of the batched core at 1 GiB, by order."""
SINGLE_MUST = 1.02
"""What the batched path of order 0 may take, where nothing can be batched, as a multiple of the single path."""
AVX2_MUST, SCALAR_MUST = 1.5, 1.0
"""What the AVX2 level may take as a multiple of AVX-512, and the scalar one of the fastest C peer, both at 1 GiB."""
THREADS = 2
SPEEDUP_MUST = {128 << 20: 0.98, GIB: 0.98, 64 * GIB: 1.7}
"""How many times as fast as one thread two must be; small forks no slower, but for what two equal runs differ by."""
METADATA_MUST = 16
"""Bytes of memmap for each page of the sections in use."""
PLAIN_ORDER = 4
PROT_NONE = "PROT_NONE"
OTHER_MEMORY = (
    "uffd_wp=0.5", "soft_dirty=0.5", "vma=file", "vma=shmem-guard", "shared=0.5", "readonly=0.5", "clean=0.5",
    "pinned=0.01", "align=shifted", "swap=0.1", "swap=0.01,granularity=page", PROT_NONE,
)  # fmt: skip
"""Memory that is not plain, as keys of a workload: it may take `OTHER_MUST` times as long as plain memory."""
OTHER_KERNELS = ("v6.6", "v6.8", "v6.9", "v6.10", "v6.12", "v6.15", "v6.18")
OTHER_MUST = 2.0
WRPROTECT_MUST = 2.0
STREAM_CLEAR_VARIANTS = ("plain", "prefetch")
HUGE_FOLIO = 64 << 10
HUGE_RSS = 24 << 30
HUGE_MUST = 1.3
"""What an entry of more than 64 GiB may take as a multiple of one of 64 GiB, in at most `HUGE_RSS` of memory."""


def run_limit(
    *,
    size: int | None = None,
    folios: Sequence[int] | None = None,
    rounds: int | None = None,
    peers: bool = False,
    semantics: KernelSemantics = LATEST,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Measure the core as a multiple of the streaming limit, and all else that has a target, beside that target.

    Parameters
    ----------
    size : int, optional
        Bytes of memory; all of `LIMIT_SIZES` when left out. With 1 GiB come peers, lower SIMD levels, memory that is
        not plain, other kernels and write-protection. More than 64 GiB is measured in folios of 64 KiB only, beside
        64 GiB, within `HUGE_RSS` bytes of memory.
    folios : sequence of int, optional
        Folio sizes in bytes. When left out: orders 0 to 9 and mixed, at 64 GiB those with a target.
    rounds : int, optional
    peers : bool
        Also measure all peers where nothing is expected of them: at every order, up to 1 GiB.
    semantics, progress
        See `run_bench`.

    Returns
    -------
    dict
        As `run_bench`, with more keys in its rows. ``order`` is 0 to 9 or "mixed". ``must`` and ``aim`` are multiples
        of the limit, None where there is no target. Other figures have keys of their own, and their target one of that
        name after ``must_`` (None where there is none): ``x_core`` (a peer as a multiple of the batched core; and
        ``x_core_call``, whole calls of both, the core's being a fork with what Python checks and prepares for it) and
        ``speedup`` (one thread as a multiple of several) must be that at least; ``x_single``, ``x_avx512``, ``x_c``
        (the fastest C peer), ``x_plain``, ``x_64gib``, ``metadata_bytes_per_page`` and ``peak_rss_bytes`` at most. What
        is not plain memory is named by ``memory``, a lower SIMD level by ``level``, more than one thread by
        ``threads``, and what is no fork by ``operation``.
    """
    if size is not None and size > 64 * GIB:
        if folios not in (None, (HUGE_FOLIO,)):
            raise ArgumentError(f"{format_size(size)}: more than 64GiB is measured in folios of 64KiB only")
        return _document("limit", *_more_than_64_gib(size, rounds or LIMIT_ROUNDS[TIB], semantics, progress))
    todo = []
    for bytes_ in LIMIT_SIZES if size is None else (size,):
        chosen: list[tuple[int, ...]] = [(folio,) for folio in folios or ()]
        if folios is None:
            chosen = [*((PAGE << order,) for order in range(10)), MIXED]
            if bytes_ > GIB:
                chosen = [folio for folio in chosen if (64 * GIB, _order_of(folio)) in TARGETS]
        todo += [(bytes_, folio, rounds or LIMIT_ROUNDS.get(bytes_, ROUNDS)) for folio in chosen]
    plain = [repeats for bytes_, folio, repeats in todo if (bytes_, _order_of(folio)) == (GIB, PLAIN_ORDER)]
    total = sum(repeats + 2 for _, _, repeats in todo) + sum(repeats + 2 for repeats in plain)
    tick = _Ticker(progress, total)
    found: list[Row] = []
    for bytes_, folio, repeats in todo:
        order = _order_of(folio)
        mm = Workload(size=bytes_, folio=folio).build()
        cases = memory_cases(mm, semantics)
        with_target = order in TARGET_ORDERS
        if with_target or order == "mixed":
            cases += _thread_cases(mm, semantics)
        if bytes_ == GIB and with_target:
            cases += _level_cases(mm, semantics)
        if bytes_ <= GIB and (peers or (bytes_ == GIB and with_target)):
            cases += peer_cases(available(), mm, semantics)
        tick()
        measure(cases, repeats, tick)
        named = {"size_bytes": bytes_, "folio_bytes": None if len(folio) > 1 else folio[0], "order": order}
        mine = _with_targets(_rows(cases, mm, semantics, **named))
        if all(row["size_bytes"] != bytes_ for row in found):  # it is the same for folios of any size
            _with_memory(mine, mm)
        found += mine
        del mm, cases
        if (bytes_, order) == (GIB, PLAIN_ORDER):
            found += _not_plain(bytes_, folio, repeats, semantics, tick)
    return _document("limit", found, _missing(found, todo))


def _document(mode: str, found: list[Row], notes: list[str]) -> dict[str, Any]:
    return {"schema": SCHEMA, "mode": mode, "env": environment(), "rows": found, "bound": [], "notes": notes}


def _missing(found: list[Row], todo: Iterable[tuple[int, tuple[int, ...], int]]) -> list[str]:
    """Say what has a target and could not be measured here."""
    notes = []
    gib = any(bytes_ == GIB and _order_of(folio) in TARGET_ORDERS for bytes_, folio, _ in todo)
    if gib and not any(row["source"] == "numba" for row in found):
        notes.append("no figures of Numba, which is not installed: pip install 'ptebatch[numba]'")
    if gib and not any(row.get("level") == "avx2" for row in found):
        notes.append("no figures of AVX2 beside AVX-512: this CPU lacks one, or PTEBATCH_SIMD chose another level")
    if not any("threads" in row for row in found) and batch.cpus() < THREADS:
        notes.append(f"no figures of {THREADS} threads: there is one CPU")
    return notes


def _order_of(folio: Sequence[int]) -> int | str:
    return _order(folio[0]) if len(folio) == 1 else "mixed"


def _thread_cases(mm: Mm, semantics: KernelSemantics) -> list[Case]:
    """Return the batched path that may use two threads, where there are two CPUs; little memory is for one."""
    if batch.cpus() < THREADS:
        return []
    case = core_case(_plan(mm, semantics, threads=THREADS))
    case.row["threads"] = THREADS
    return [case]


def _level_cases(mm: Mm, semantics: KernelSemantics) -> list[Case]:
    """Return the batched path at each SIMD level below the one in use."""
    have = _measure.supported()
    below = have[: have.index(simd_level())] if simd_level() in have else ()
    return [_level_case(mm, semantics, level) for level in below]


def _level_case(mm: Mm, semantics: KernelSemantics, level: str) -> Case:
    number = batch._level(level)

    def at_level(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            before, batch.simd_level = batch.simd_level, number
            try:
                return function(*args)
            finally:
                batch.simd_level = before

        return run

    case = core_case(at_level(lambda: _plan(mm, semantics))())
    case.row["level"] = level
    case.run = at_level(case.run)
    return case


def _with_targets(found: list[Row]) -> list[Row]:
    """Give each row its ratios and what these must be."""
    core = {row["path"]: row for row in found if row["source"] == "core" and not {"level", "threads"} & set(row)}
    batched = core["batched"]["ns_per_pte"]
    c = min((row["ns_per_pte"] for row in found if row["source"] == "c"), default=None)
    for row in found:
        size, order, ns = row["size_bytes"], row["order"], row["ns_per_pte"]
        row["must"] = row["aim"] = None
        if "threads" in row:
            row["speedup"], row["must_speedup"] = batched / ns, SPEEDUP_MUST.get(size) if order != "mixed" else None
        elif "level" in row:
            if row["level"] == "avx2" and simd_level() == "avx512":
                row["x_avx512"], row["must_x_avx512"] = ns / batched, AVX2_MUST
            if row["level"] == "scalar" and c is not None:
                row["x_c"], row["must_x_c"] = ns / c, SCALAR_MUST
        elif row["source"] == "core":
            if row["path"] == "batched" or order == 0:
                row["must"], row["aim"] = TARGETS.get((size, order), (None, None))
        elif row["source"] not in ("limit", "pool"):
            row["x_core"] = ns / batched
            row["x_core_call"] = row["call_ns_per_pte"] / core["batched"]["call_ns_per_pte"]
            of_source: dict[int, float] = PEER_TARGETS.get(row["source"], {})
            row["must_x_core"] = of_source.get(order) if size == GIB else None
    if found[0]["order"] == 0:
        row = core["batched"]
        row["x_single"], row["must_x_single"] = batched / core["single"]["ns_per_pte"], SINGLE_MUST
    return found


def _with_memory(some: list[Row], mm: Mm) -> None:
    """Add to the row of the batched core what the memmap takes."""
    row = next(row for row in some if (row["source"], row["path"]) == ("core", "batched"))
    pages, index = mm.folios.metadata_bytes()
    row["metadata_bytes_per_page"], row["must_metadata_bytes_per_page"] = pages, METADATA_MUST
    row["index_bytes_per_page"] = index


def _prot_none(mm: Mm) -> Mm:
    """Take all rights away, as mprotect(PROT_NONE) does; all entries but for their PFNs are the same."""
    (vma,) = mm.vmas
    vma.vm_flags &= ~(VM_READ | VM_WRITE | VM_EXEC)
    layout, first = mm.layout, int(mm.entries[0, 0])
    changed = pte_modify(layout, first, vm_get_page_prot(layout, vma.vm_flags))
    mm.entries[mm.entries != layout.none_value] ^= np.uint64(first ^ changed)  # if it inverts the PFN, it inverts each
    return mm


def _not_plain(
    size: int, folio: tuple[int, ...], rounds: int, semantics: KernelSemantics, tick: Callable[[], object]
) -> list[Row]:
    """Measure the core on memory that is not plain and for other kernels, and write-protection."""
    text = f"size={size},folio={folio[0]}"
    mm = parse(text).build()
    plans = {"plain": _plan(parse(text).build(), semantics)}  # of its own, as others have: else it is in the cache
    for keys in OTHER_MEMORY:
        other = _prot_none(parse(text).build()) if keys == PROT_NONE else parse(f"{text},{keys}").build()
        plans[keys] = _plan(other, semantics)
    for kernel in OTHER_KERNELS:
        plans[kernel] = _plan(mm, preset(kernel))
    cases = [core_case(plan) for plan in plans.values()]
    for name, plan, case in zip(plans, plans.values(), cases, strict=True):
        case.row |= {"memory": name, "semantics": plan.semantics.label}
    limits = limit_cases(mm.entries.reshape(-1), mm.layout)
    for case in limits:
        case.row |= {"memory": "plain", "semantics": semantics.label}
    writing = _wrprotect_cases(mm, semantics)
    tick()
    measure([*cases, *limits], rounds, tick)
    measure(writing, rounds)  # apart: among all the others its words would be out of the cache, the loop's entries not
    named = {"arch": mm.layout.name, "size_bytes": size, "folio_bytes": folio[0], "order": PLAIN_ORDER}
    forks, writes = rows([*cases, *limits], **named), rows(writing, **named)
    for row in forks[: len(cases)]:
        row["x_plain"] = row["ns_per_pte"] / cases[0].ns_per_pte
        row["must_x_plain"] = OTHER_MUST if row["memory"] != "plain" else None
    writes[0]["must"] = WRPROTECT_MUST
    return forks + writes


def _wrprotect_cases(mm: Mm, semantics: KernelSemantics) -> list[Case]:
    """Return write-protection of all of `mm`, and the streaming loop that does as much, in all variants."""
    saved, src = memory.copy(mm.entries), memory.copy(mm.entries.reshape(-1))
    write, level = mm.layout.write, limit_level()
    start, end = mm.vmas[0].start, mm.vmas[-1].end

    def reset() -> None:
        mm.entries[...] = saved
        src[...] = saved.reshape(-1)

    def check(stats: Any) -> None:
        present, _ = pte_pfns(mm.layout, mm.entries)
        if stats.ptes_present != present.sum() or (present & (mm.entries & np.uint64(mm.layout.write) != 0)).any():
            raise StateError("write-protection went wrong; please report this")

    def run() -> Any:
        return wrprotect_range(mm, start, end, semantics=semantics)

    def check_stream(_: None) -> None:
        if (src != saved.reshape(-1) & ~np.uint64(write)).any():
            raise StateError("the streaming loop went wrong; please report this")

    row = {"path": "batched", "operation": "wrprotect_range", "semantics": semantics.label}
    ptes = int(pte_pfns(mm.layout, saved)[0].sum())
    core = Case({"source": "core", **row}, ptes, reset, run, check, core_clock)
    limits = [
        Case({"source": "limit", **row, "variant": variant, "simd": level}, ptes, reset,
             functools.partial(_measure.py_stream_clear, src, write, level, variant), check_stream,
             _measure.py_streamed_ns)
        for variant in STREAM_CLEAR_VARIANTS
    ]  # fmt: skip
    return [core, *limits]


# --- more memory than there can be copies of --------------------------------------------------------------------------
def _more_than_64_gib(
    size: int, rounds: int, semantics: KernelSemantics, progress: Progress
) -> tuple[list[Row], list[str]]:
    """Measure the batched core on `size` beside 64 GiB, both restored in place; within `HUGE_RSS` bytes of memory."""
    tick = _Ticker(progress, rounds + 4)
    sizes = (64 * GIB, size)
    with _address_space(HUGE_RSS):
        cases: dict[int, list[Case]] = {}
        memmaps = []
        for bytes_ in sizes:
            workload = Workload(size=bytes_, folio=(HUGE_FOLIO,))
            plan = _plan(workload.build(), semantics, keep=False)
            cases[bytes_] = _in_place_cases(workload, plan)
            memmaps.append(plan.mm)
            tick()
        measure([case for some in cases.values() for case in some], rounds, tick)
    found = []
    named = {"folio_bytes": HUGE_FOLIO, "order": PLAIN_ORDER}
    for bytes_, mm in zip(sizes, memmaps, strict=True):
        some = _rows(cases[bytes_], mm, semantics, size_bytes=bytes_, **named)
        for row in some:
            row["must"] = row["aim"] = None
        _with_memory(some, mm)
        found += some
    small, large = (next(row for row in found if (row["source"], row["size_bytes"]) == ("core", b)) for b in sizes)
    small["must"], small["aim"] = TARGETS.get((sizes[0], PLAIN_ORDER), (None, None))
    large["x_64gib"], large["must_x_64gib"] = large["ns_per_pte"] / small["ns_per_pte"], HUGE_MUST
    large["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    large["must_peak_rss_bytes"] = HUGE_RSS
    tick()
    return found, []


@contextmanager
def _address_space(most: int) -> Iterator[None]:
    """Let this process have `most` bytes of address space at most: what needs more fails instead of swapping."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bounds = [bound for bound in (most, soft, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _in_place_cases(workload: Workload, plan: ForkPlan) -> list[Case]:
    """Return the fork of plain memory, the streaming limit over the same tables, and the pool: without any copy."""
    mm, child, level = plan.mm, plan.child, limit_level()
    layout, ptes = mm.layout, workload.size // PAGE

    def reset() -> None:
        workload.restore(mm)
        child.entries.fill(layout.none_value)
        child.rss.fill(0)

    core = Case({"source": "core", "path": "batched"}, ptes, reset, plan.run, InPlaceCheck(plan), core_clock)
    src, dst = mm.entries.reshape(-1), child.entries.reshape(-1)

    def check(_: None) -> None:
        for at in range(0, len(src), PIECE):
            one, other = src[at : at + PIECE], dst[at : at + PIECE]
            if (one & np.uint64(layout.write)).any() or (other != one & ~np.uint64(layout.young)).any():
                raise StateError("the streaming loop went wrong; please report this")

    limits = [
        Case({"source": "limit", "path": "limit", "variant": variant, "simd": level}, ptes, reset,
             functools.partial(_measure.py_stream, src, dst, layout.write, layout.young, level, variant), check,
             _measure.py_streamed_ns)
        for variant in _measure.STREAM_VARIANTS
    ]  # fmt: skip
    return [core, *limits, pool_case(plan, ptes)]


class InPlaceCheck:
    """`ForkCheck` for plain memory, piece by piece and without a look at what was before.

    Every entry of the parent is present and not writable, the child's is the same and old, every page is mapped twice
    and not exclusive, and its folio has a reference for each of its mappings; so have rss and the statistics.
    """

    def __init__(self, plan: ForkPlan) -> None:
        self._plan = plan

    def __call__(self, stats: ForkStats) -> None:
        """Check what ``plan.run()`` did and returned; StateError if that is wrong."""
        mm, child = self._plan.mm, self._plan.child
        layout, folios = mm.layout, mm.folios
        src, dst = mm.entries.reshape(-1), child.entries.reshape(-1)
        nr = int(mm.rss.sum())
        right = stats.ptes_present == nr == int(child.rss.sum()) and (child.vpns == mm.vpns).all()
        for at in range(0, nr, PIECE):
            one, other = src[at : min(nr, at + PIECE)], dst[at : min(nr, at + PIECE)]
            present, pfns = pte_pfns(layout, one)
            right = right and present.all() and not (one & np.uint64(layout.write)).any()
            right = right and (other == one & ~np.uint64(layout.young)).all()
            right = right and (folios.mapcounts(pfns) == 2).all() and not folios.flags(pfns, "anon_exclusive").any()
            right = right and (folios.refcounts(pfns) == 2 << folios.orders(pfns)).all()
        if not right:
            raise StateError("the benchmark's fork went wrong; please report this")


# --- the kernel's memory layout ---------------------------------------------------------------------------------------
LAYOUT_KERNELS = ("v6.9", "v6.10", "v6.18")
"""Each keeps one counter more: with the batching, large mapcount, MM-ID slots."""
OPS = ("ptep_get", "folio_ref_add", "rmap_dup", "wrprotect_ptes", "set_ptes")


def run_kernel_layout(
    *,
    size: int = 1 << 30,
    folios: Sequence[int] = FOLIOS,
    rounds: int = ROUNDS,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Measure single and batched copying on a memory layout like the kernel's, beside the published change.

    64-byte page records, locked counters, compare-and-exchange on entries (`ptebatch.peers.kernel_layout`); folios lie
    in physical memory in the order of their addresses, as a process on a machine with free memory gets them.

    Parameters
    ----------
    size, folios, rounds, progress
        See `run_bench`.

    Returns
    -------
    dict
        As `run_bench`. Rows of source "kernel-layout" have one kernel each (``semantics``), ``ops`` (what the model
        counts for each entry: `OPS`) and ``locked_per_pte`` (locked instructions for each entry, which follow from the
        counts).
    """
    tick = _Ticker(progress, len(folios) * (rounds + 2))
    kernels = [preset(name) for name in LAYOUT_KERNELS]
    found: list[Row] = []
    for folio in folios:
        mm = Workload(size=size, folio=(folio,), pfns="sequential").build()
        cases = []
        for semantics in kernels:
            for batched in (False, True):
                (case,) = peer_cases([kernel_layout(semantics, batched=batched)], mm, semantics)
                case.row |= {"semantics": semantics.label, **_operations(mm, semantics, batched)}
                cases.append(case)
        tick()
        measure(cases, rounds, tick)
        found += rows(cases, arch=mm.layout.name, folio_bytes=folio, order=_order(folio))
    found += _published(folios)
    return {"schema": SCHEMA, "mode": "kernel-layout", "env": environment(), "rows": found, "bound": [], "notes": []}


def _operations(mm: Mm, semantics: KernelSemantics, batched: bool) -> Row:
    """Operations for each entry, as the model counts them, and the locked instructions they are made of."""
    plan = _plan(mm, semantics, batching=batched)
    stats = plan.run()
    plan.reset()
    large = bool(mm.folios.orders(_mapped(mm)[1][:1])[0])
    locked = {
        "refcount": stats.folio_ref_add,
        "anon-exclusive": stats.anon_exclusive_cleared,
        "mapcount": 0 if large and semantics.config.no_page_mapcount else stats.ptes_present - stats.special_ptes,
        "large mapcount": stats.rmap_dup if large and semantics.large_mapcount else 0,
        "wrprotect": stats.ptes_wrprotected,
    }
    ops = {name: getattr(stats, name) / stats.ptes_present for name in OPS}
    return {"ops": ops, "locked_per_pte": sum(locked.values()) / stats.ptes_present}


# --- the live kernel --------------------------------------------------------------------------------------------------
LIVE_ROUNDS = 7
LIVE_OPERATIONS = ("fork", "exit", "munmap")
FOLIO_SHARE = 0.95
"""Share of the memory that must be in folios of the size asked for."""


@dataclass
class _Mapping:
    """Memory of one folio size, mapped by PTEs or by PMDs, and what was measured on it."""

    folio: int
    pmd: bool
    cases: list[Case]
    times_ns: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in LIVE_OPERATIONS})
    ops: dict[str, float] | None = None


def run_live(
    *,
    size: int = 1 << 30,
    folios: Sequence[int] | None = None,
    rounds: int = LIVE_ROUNDS,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Measure this machine's kernel: fork() of real memory, the child's exit and munmap(), by folio size.

    In every round each folio size gets fresh memory in a process of its own, mapped by PTEs, and that of 2 MiB also by
    PMDs. What the model makes of the same memory (captured once) is timed in the same rounds.

    Parameters
    ----------
    size : int
        Bytes of memory that the process forks with; a multiple of 2 MiB. It is there once, not once per folio size.
    folios : sequence of int, optional
        Folio sizes in bytes; all this kernel offers when left out.
    rounds, progress
        See `run_bench`.

    Returns
    -------
    dict
        As `run_bench`. Rows of source "kernel" have ``operation`` (`LIVE_OPERATIONS`), ``mapping`` ("pte" or "pmd"),
        ``change`` against 4 KiB as a ratio, and ``ops``: what the model counts for each entry (None for PMDs). Rows of
        source "core" are the model's single and batched copy of the same memory.

    Raises
    ------
    PermissionDeniedError
        Not root: folio sizes cannot be chosen, nor seen.
    ArgumentError
        A size this kernel has no folios for, or that is no multiple of 2 MiB.
    StateError
        Too little free memory, or the kernel did not give folios of the size asked for.
    """
    if size <= 0 or size % PMD:
        raise ArgumentError(f"size={format_size(size)}: must be a multiple of {format_size(PMD)}")
    available_kb = re.search(r"^MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    if available_kb and int(available_kb[1]) << 10 < size * 5 // 4:
        raise StateError(f"too little free memory for {format_size(size)}: choose a smaller size")
    if os.geteuid() != 0:
        raise PermissionDeniedError("choosing folio sizes and seeing folios needs root: run as root")
    semantics, notes = running()
    sizes = live.folio_sizes() if folios is None else sorted({PAGE, *folios})
    mappings = [_Mapping(folio, False, []) for folio in sizes]
    mappings += [_Mapping(PMD, True, [])] if PMD in sizes else []
    tick = _Ticker(progress, len(mappings) * (rounds + 1))
    for number in range(-1, rounds):
        for mapping in mappings:
            _live_round(mapping, size, semantics, timed=number >= 0)
            tick()
    found: list[Row] = []
    named = {"arch": X86_64.name, "semantics": semantics.label, "size_bytes": size}
    ptes = size // PAGE
    base = {name: float(np.median(mappings[0].times_ns[name])) / ptes for name in LIVE_OPERATIONS}
    for mapping in mappings:
        more = {
            "folio_bytes": mapping.folio, "order": _order(mapping.folio), "mapping": "pmd" if mapping.pmd else "pte",
        }  # fmt: skip
        kernel = []
        for name in LIVE_OPERATIONS:
            path = "batched" if semantics.fork_batching and not mapping.pmd else "single"
            case = Case({"source": "kernel", "path": path, "operation": name}, ptes, _nothing, _nothing)
            case.times_ns = mapping.times_ns[name]
            kernel.append(case)
        for row in rows(kernel, **named, **more):
            found.append(row | {"change": row["ns_per_pte"] / base[row["operation"]] - 1, "ops": mapping.ops})
        found += rows(mapping.cases, **named, **more, operation="fork")
    return {"schema": SCHEMA, "mode": "live", "env": environment(), "rows": found, "bound": [], "notes": notes}


def _nothing() -> None:
    pass


def _live_round(mapping: _Mapping, size: int, semantics: KernelSemantics, *, timed: bool) -> None:
    """Build the memory, fork with it, end the child, unmap; or, the first time, look at it."""
    with live.Subject() as subject:
        with live.Settings(live.mthp(mapping.folio)):
            address = subject.anon(size, mapping.folio, pte_mapped=not mapping.pmd)
        if not timed:
            _look_at(mapping, subject.pid, address, size, semantics)
            return
        forked, exited = subject.call("time_fork")
        unmapped = subject.call("time_unmap", address=address)
    for name, took in zip(LIVE_OPERATIONS, (forked, exited, unmapped), strict=True):
        mapping.times_ns[name].append(took)
    measure(mapping.cases, 1, check=False)


def _look_at(mapping: _Mapping, pid: int, address: int, size: int, semantics: KernelSemantics) -> None:
    """Check that memory has the folios it is to have, and have the model copy it."""
    seen = capture(pid, semantics=semantics, swap="drop")
    mm = seen.mm
    _, pfns = pte_pfns(mm.layout, mm.ptes(address, address + size))
    right = int(np.count_nonzero(mm.folios.orders(pfns) == _order(mapping.folio)))
    if right < FOLIO_SHARE * size // PAGE:
        raise StateError(
            f"only {100 * right * PAGE // size}% of the memory is in folios of {format_size(mapping.folio)}: "
            "memory is short or fragmented; free some, or choose a smaller size"
        )
    if mapping.pmd:
        return
    single, batched = (_plan(mm, semantics, batching=on) for on in (False, None))
    stats = batched.run()
    mapping.ops = {name: getattr(stats, name) / stats.ptes_present for name in OPS}
    batched.reset()
    mapping.cases = [core_case(single), core_case(batched)]
    measure(mapping.cases, 0)


# --- the benchmark ----------------------------------------------------------------------------------------------------
def _published(folios: Iterable[int]) -> list[Row]:
    kernels = {"single": "v6.8-rc1", "batched": "v6.8-rc1 and batching v3"}
    return [
        {
            "source": "published", "arch": "x86-64", "semantics": kernel, "size_bytes": PUBLISHED_BYTES,
            "folio_bytes": folio, "order": _order(folio), "path": path,
            "ns_per_pte": seconds * 1e9 / (PUBLISHED_BYTES / PAGE), "x_limit": None,
        }
        for folio in folios
        if folio >> 10 in PUBLISHED
        for (path, kernel), seconds in zip(kernels.items(), PUBLISHED[folio >> 10], strict=True)
    ]  # fmt: skip


def _order(folio: int) -> int:
    return (folio // PAGE).bit_length() - 1


def run_bench(
    *,
    size: int = 1 << 30,
    folios: Sequence[int] = FOLIOS,
    rounds: int = ROUNDS,
    pid: str | None = None,
    peers: bool = False,
    semantics: KernelSemantics = LATEST,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Measure single, batched and naive copying: synthetic memory folio size by folio size, then a real process.

    Parameters
    ----------
    size : int
        Bytes of memory to copy.
    folios : sequence of int
        Folio sizes in bytes.
    rounds : int
        Times that everything is measured.
    pid : str, optional
        The process to capture, or "self". Without one, a process with 64 KiB folios is started for it; where that is
        not possible, it is this interpreter.
    peers : bool
        Also measure NumPy, Numba (if installed) and plain C.
    semantics : KernelSemantics
        For the synthetic memory; a real process gets the running kernel's.
    progress : callable
        Called as ``progress(done, total)``.

    Returns
    -------
    dict
        ``schema`` (an int), ``mode``, ``env`` (`environment`), ``bound`` (what was inferred of the real process),
        ``notes``, and ``rows``: a dict for each measurement with ``source`` (core, naive, numpy, numba, c, limit,
        pool, published), ``path`` (single, batched), ``arch``, ``semantics``, ``size_bytes``, ``folio_bytes`` and
        ``order`` (None: mixed), ``ptes`` (present entries), ``ns_per_pte`` (median) and ``x_limit``, ``rounds`` and
        the spread ``min_``, ``q1_``, ``q3_`` and ``max_ns_per_pte``; ``memory`` names what was copied if it is not
        synthetic.
    """
    tick = _Ticker(progress, (len(folios) + 1) * (rounds + 2))
    found: list[Row] = []
    for folio in folios:
        mm = Workload(size=size, folio=(folio,)).build()
        small = Workload(size=NAIVE_BYTES, folio=(folio,)).build() if size > NAIVE_BYTES else mm
        cases = [*peer_cases([NAIVE], small, semantics), *memory_cases(mm, semantics)]
        if peers:
            cases += peer_cases([peer for peer in available() if peer is not NAIVE], mm, semantics)
        tick()
        measure(cases, rounds, tick)
        found += _rows(cases, mm, semantics, size_bytes=size, folio_bytes=folio, order=_order(folio))
        del mm, small, cases
    found += _published(folios)

    real = _capture(pid, min(size, REAL_BYTES))
    cases = _real_cases(real)
    tick()
    measure(cases, rounds, tick)
    mm = real.seen.mm
    real_bytes = max(case.ptes for case in cases) << mm.layout.page_shift
    more = {"size_bytes": real_bytes, "folio_bytes": None, "order": None, "memory": real.label}
    found += _rows(cases, mm, real.semantics, **more)
    env = environment()
    if peers:
        env |= {peer.needs: metadata.version(peer.needs) for peer in available()}
    return {
        "schema": SCHEMA, "mode": "bench", "env": env, "rows": found, "bound": list(real.seen.bound),
        "notes": [*real.notes, *real.seen.notes],
    }  # fmt: skip


def _rows(cases: Iterable[Case], mm: Mm, semantics: KernelSemantics, **common: Any) -> list[Row]:
    return rows(cases, arch=mm.layout.name, semantics=semantics.label, **common)
