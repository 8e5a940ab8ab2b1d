"""What the core's fast lane keeps of one folio to tell others by, swap entries, and what is written past the cache.

Memory that is made of a few kinds of folios, most of them whole, so that what was kept of one is met again; in between
is whatever must not be taken for it. Every SIMD level of this CPU, and the lane off, leave what the reference leaves.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import PRIVATE, SHARED
from test_simd import EXAMPLES, level  # noqa: F401

from ptebatch import arch, batch, memory
from ptebatch.arch import X86_64 as L
from ptebatch.arch import swp_entry
from ptebatch.errors import PtebatchError
from ptebatch.folio import AE_BIT, MAX_PFN, NEAR_LIMIT, FolioTable
from ptebatch.fork import ForkPlan, fork
from ptebatch.mm import Mm, Vma, account, configured, copy_state
from ptebatch.protect import wrprotect_range
from ptebatch.semantics import LATEST, V6_6, V6_9, V6_12, V6_15, KernelSemantics
from ptebatch.swap import MAX_SWAP_COUNT, SWAP_MAP_MAX, swap_key
from ptebatch.workload import Workload

RUNS = [(V6_6, False), (V6_9, True), (V6_12, True), (V6_12, False), (V6_15, True), (LATEST, True), (LATEST, False)]
Run = tuple[KernelSemantics, bool]
NO_MAPCOUNT = replace(LATEST, config=replace(LATEST.config, no_page_mapcount=True))
SHADOW_STACKS = replace(LATEST, config=replace(LATEST.config, x86_shstk=True))
START = 0x40000000
FIRST_PFN = 1 << 18
WRITABLE = L.valid | L.user | L.write | L.young | L.dirty | L.soft_dirty | L.nx
UFFD = arch.VM_UFFD_WP


@dataclass(frozen=True)
class Piece:
    """Entries of one folio, in a row; or one entry of another kind, given by its value."""

    order: int = 0
    flags: int = WRITABLE
    first: int = 0
    nr: int | None = None  # all from the first on
    toggles: tuple[tuple[int, int], ...] = ()  # (page, bits of its entry that are the other way round)
    more: tuple[tuple[int, int], ...] = ()  # (page, mappings of it by others)
    shared: tuple[int, ...] = ()  # pages that are not exclusive
    others: int = 0  # mappings of all pages by another mm
    anon: bool = True
    swapbacked: bool = True
    hugetlb: bool = False
    bits: int = 0  # the folio is dirty (1), locked (2), pinned (8), mapped entirely (16); a page is poisoned (4)
    slots: tuple[int, int] | None = None  # other MM-ID slots than those of its mappings: how many have these two mms
    again: int | None = None  # the folio of an earlier piece, counted back
    value: int | None = None

    @property
    def pages(self) -> range:
        return range(self.first, 1 << self.order if self.nr is None else self.first + self.nr)


HOLE = Piece(value=0)
SPECIAL = Piece(value=L.special | L.valid | L.user | 5 << 12)


def lay(
    pieces: Sequence[Piece],
    *,
    vm_flags: int = PRIVATE,
    at: int = 0,
    protnone: bool = False,
    event_fork: bool = False,
    in_order: bool = False,
    extent: Callable[[int], bool] = lambda order: True,
    vmas: int = 1,
) -> Mm:
    """An address space with these pieces one after the other from slot `at` of its first table on.

    Folios of orders that `extent` refuses lie apart from the others, in front of them or behind.
    """
    rng = random.Random(len(pieces))
    own = [piece for piece in pieces if piece.value is None and piece.again is None]
    heads = np.zeros(len(own), dtype=np.int64)
    pfn = {True: FIRST_PFN, False: FIRST_PFN // 2}
    folios = FolioTable()
    for order in range(18, -1, -1):
        which = [k for k, piece in enumerate(own) if piece.order == order]
        if not in_order:
            rng.shuffle(which)
        where = extent(order)
        heads[which] = pfn[where] + (np.arange(len(which)) << order)
        pfn[where] += len(which) << order
    kinds = {name: [getattr(piece, name) for piece in own] for name in ("anon", "swapbacked", "hugetlb")}
    folios.add_folios(heads, [piece.order for piece in own], **kinds)
    rest = np.arange(pfn[True], -(-pfn[True] // 64) * 64)
    folios.add_folios(rest, 0)
    values: list[int] = []
    of: list[tuple[Piece, int]] = []
    count = 0
    for piece in pieces:
        if piece.value is not None:
            of.append((piece, -1))
            values.append(piece.value)
            continue
        if piece.again is None:
            of.append((piece, int(heads[count])))
            count += 1
        else:
            of.append((piece, of[-piece.again][1]))
        for page in piece.pages:
            bits = piece.flags
            for where, flip in piece.toggles:
                bits ^= flip * (where == page)
            if protnone:
                bits = bits & ~L.valid | L.protnone
            values.append(arch.mk_pte(L, of[-1][1] + page, bits))
    start = START + (at << 12)
    vmas = min(vmas, len(values))
    ends = [start + (len(values) * (k + 1) // vmas << 12) for k in range(vmas)]
    spans = zip([start, *ends[:-1]], ends, strict=True)
    areas = [Vma(a, b, vm_flags, anon_vma=True, uffd_event_fork=event_fork) for a, b in spans]
    mm = Mm.for_vmas(L, folios, areas)
    mm.fill(start, np.array(values, dtype=np.uint64))
    account(mm)
    more, shared, slots = [], [], {}
    for piece, head in of:
        if piece.value is not None or piece.again is not None:
            continue
        more += [head + page for page, nr in piece.more for _ in range(nr)]
        more += [*range(head, head + (1 << piece.order))] * piece.others
        shared += [head + page for page in piece.shared]
        if piece.slots is not None and piece.order:
            slots[head] = [(1000 + k if nr else 0, nr) for k, nr in enumerate(piece.slots)]
        if not piece.bits:
            continue
        folio = folios.folio(head)
        if piece.order:
            folio.dirty, folio.locked = bool(piece.bits & 1), bool(piece.bits & 2)
        if piece.bits & 16 and piece.order > 4:
            folio.entire_mapcount = 3
        if piece.bits & 4:
            folios.page(head + (1 << piece.order) // 2).hwpoison = True
        if piece.bits & 8:
            mm.has_pinned = True
            if piece.order:
                folio.pincount = 1
                folio.refcount += 1
            else:
                folio.refcount += 1024
    folios.map_ptes(more, mm_id=folios.new_mm_id())
    for head, pair in slots.items():
        folios.folio(head).set_mm_ids(pair)
    folios._words[folios.lookup(shared)] &= np.uint64(~(1 << AE_BIT) & (1 << 64) - 1)
    return mm


# --- comparing ------------------------------------------------------------------------------------------------------


@dataclass
class State:
    """All that is left behind, and what was returned."""

    arrays: list[np.ndarray] = field(default_factory=list)
    rest: list = field(default_factory=list)

    def differs(self, other: State) -> str:
        for k, (one, two) in enumerate(zip(self.arrays, other.arrays, strict=True)):
            if not np.array_equal(one, two):
                where = np.argwhere(one != two)[0].tolist()
                return f"array {k} at {where}: {int(one[tuple(where)]):#x}, not {int(two[tuple(where)]):#x}"
        return "" if self.rest == other.rest else f"{self.rest}, not {other.rest}"


def off_by(rows: int, nr: int) -> np.ndarray:
    """Page tables whose rows begin `nr` entries behind a cache line's begin."""
    tables = memory.zeros(rows * L.ptrs_per_pte + 8).reshape(-1)[nr : nr + rows * L.ptrs_per_pte]
    assert tables.ctypes.data % 64 == 8 * nr
    return tables.reshape(rows, L.ptrs_per_pte)


def raw(folios: FolioTable) -> list[np.ndarray]:
    """Words and aux of all pages, in the order of PFNs."""
    index = folios.lookup(folios.pages_table()["pfn"])
    return [folios._words[index], folios._aux[index]]


def forked(mm: Mm, semantics: KernelSemantics, batching: bool, times: int = 1, shift: int = 0, **how) -> State:
    """Fork a copy of mm, the child's tables `shift` entries off; again, to see what the first time left."""
    mm, state = copy_state(mm), State()
    for _ in range(times):
        plan = ForkPlan(mm, semantics=semantics, batching=batching, **how)
        if shift:
            plan.child.entries = off_by(len(plan.child.entries), shift)
        try:
            stats = plan.run().to_dict()
        except PtebatchError as error:
            stats = {"error": f"{type(error).__name__}: {error}"}
        state.arrays += [mm.entries.copy(), plan.child.entries]
        state.rest += [stats, plan.child.rss.tolist(), mm.rss.tolist(), plan.allocations.made]
    state.arrays += [*raw(mm.folios), *mm.folios.swap.table()]
    return state


def check(mm: Mm, run: Run, expected: State | None = None, *, what: str = "", times: int = 1, **how) -> None:
    """The core leaves what the reference leaves, wherever words come from and the child's entries are written."""
    if expected is None:
        expected = forked(mm, *run, times=times, impl="reference")
    wrong = forked(mm, *run, times=times, **how).differs(expected)
    assert not wrong, f"{what}: {wrong}"
    before = batch.FAR_WORDS, batch.BYPASS_SLOTS
    batch.FAR_WORDS = batch.BYPASS_SLOTS = 0
    try:
        for shift in (0, 4, random.Random(len(mm.entries)).choice((1, 2, 3, 5, 6, 7))):
            wrong = forked(mm, *run, times=times, shift=shift, **how).differs(expected)
            assert not wrong, f"{what}, past the cache, tables off by {shift}: {wrong}"
    finally:
        batch.FAR_WORDS, batch.BYPASS_SLOTS = before


def protected(mm: Mm, semantics: KernelSemantics, batching: bool, cut: int, impl: str) -> State:
    mm = copy_state(mm)
    start, end = mm.vmas[0].start + cut * 4096, mm.vmas[-1].end - 3 * cut * 4096
    stats = wrprotect_range(mm, start, end, semantics=semantics, batching=batching, impl=impl).to_dict()
    return State([mm.entries, *raw(mm.folios)], [stats])


# --- kinds of folios that take turns --------------------------------------------------------------------------------


def some(rng: random.Random, order: int) -> int:
    """A page of a folio: the first ones and the last have a place of their own in the lane."""
    nr = 1 << order
    return min(rng.choice((0, 1, 2, 3, 4, 5, nr // 2, nr - 1, nr - 1, rng.randrange(nr))), nr - 1)


READONLY = WRITABLE & ~L.write
Change = Callable[[random.Random, Piece], Piece]
CHANGES: dict[str, Change] = {
    "none": lambda rng, p: p,
    "uffd_wp": lambda rng, p: replace(p, flags=READONLY | L.uffd_wp),
    "soft_dirty": lambda rng, p: replace(p, flags=p.flags ^ L.soft_dirty),
    "clean": lambda rng, p: replace(p, flags=p.flags ^ L.dirty),
    "old": lambda rng, p: replace(p, flags=p.flags ^ L.young),
    "readonly": lambda rng, p: replace(p, flags=READONLY, shared=tuple(p.pages)),
    "readonly, exclusive": lambda rng, p: replace(p, flags=READONLY),
    "shared": lambda rng, p: replace(p, flags=READONLY, shared=tuple(p.pages), others=1),
    "shared, writable": lambda rng, p: replace(p, others=rng.choice((1, 1, 31))),
    "file": lambda rng, p: replace(p, flags=READONLY ^ L.dirty, anon=False, swapbacked=False),
    "shmem": lambda rng, p: replace(p, anon=False),
    "bit of one entry": lambda rng, p: replace(
        p, toggles=((some(rng, p.order), rng.choice((L.young, L.dirty, L.write, L.soft_dirty, L.uffd_wp))),)
    ),
    "old entry": lambda rng, p: replace(p, toggles=((some(rng, p.order), L.young),)),
    "writable entry": lambda rng, p: replace(p, flags=READONLY, toggles=((some(rng, p.order), L.write),)),
    "count of one page": lambda rng, p: replace(p, more=((some(rng, p.order), 1),)),
    "one page not exclusive": lambda rng, p: replace(p, shared=(some(rng, p.order),)),
    "folio flags": lambda rng, p: replace(p, bits=rng.choice((1, 2, 3, 4))),
    "PROT_NONE": lambda rng, p: replace(p, flags=p.flags & ~L.valid | L.protnone),
    "hugetlb": lambda rng, p: replace(p, hugetlb=p.order > 1),
    "mapped entirely": lambda rng, p: replace(p, bits=16),
    "no MM-ID slots": lambda rng, p: replace(p, slots=(0, 0)),
    "other MM-ID slots": lambda rng, p: replace(p, slots=rng.choice(((3, 0), (0, 3), (3, 9), (31, 31), (31, 32)))),
    "in part": lambda rng, p: replace(
        p, **rng.choice(({"first": some(rng, p.order)}, {"nr": some(rng, p.order) + 1}))
    ),
    "pinned": lambda rng, p: replace(p, bits=8, flags=READONLY if rng.random() < 0.5 else p.flags),
}
ORDERS = {
    "0": (0,), "1": (1,), "2": (2,), "3": (3,), "4": (4,), "0/2": (0, 2), "0/2/4": (0, 2, 4), "2/3/4": (2, 3, 4),
    "0/3": (0, 3), "1/2": (1, 2), "5": (5,), "6/7": (6, 7), "8/9": (8, 9), "0..9": tuple(range(10)),
}  # fmt: skip


def mixture(name: str, change: str, nr_slots: int, share: float = 0.5) -> list[Piece]:
    """Folios of these orders, each with as many slots as any other, `share` of them changed."""
    rng = random.Random(f"{name} {change}")
    orders, pieces, used = ORDERS[name], [], 0
    weights = [1 / (1 << min(order, 7)) for order in orders]
    while used < nr_slots:
        piece = Piece(rng.choices(orders, weights)[0])
        if rng.random() < share:
            piece = CHANGES[change](rng, piece)
        pieces.append(piece)
        used += len(piece.pages)
    return pieces


# Of each memory, what it is like besides: where in its table it begins, flags of the VMA, order of PFNs, PROT_NONE.
SHAPES = [
    {},
    {"at": 13},
    {"at": 496, "vm_flags": PRIVATE | UFFD, "event_fork": True},
    {"in_order": True},
    {"at": 4, "vm_flags": PRIVATE | arch.VM_SOFTDIRTY},
    {"protnone": True},
    {"at": 32, "vm_flags": SHARED | UFFD, "event_fork": True},
    {"at": 1, "vmas": 3},
    {"at": 8, "extent": lambda order: order % 2 == 0},
]


BIG = ("8/9", "0..9")
PAIRS = [(name, change) for name in ORDERS for change in CHANGES if (name, change) != ("8/9", "in part")]


@cache
def mixed(name: str, change: str, small: bool) -> tuple[Mm, list[Run]]:
    """Memory, and the two runs it is for."""
    rng = random.Random(f"{name} {change} {small}")
    nr_slots = (600 if name in BIG else 150) if small else (4200 if name in BIG else 1200)
    mm = lay(mixture(name, change, nr_slots), **rng.choice(SHAPES))
    return mm, rng.sample(RUNS, 2)


@cache
def expected(name: str, change: str, at: int, small: bool) -> State:
    """Of little memory as the reference has it, of more as the core has it without the lane."""
    mm, runs = mixed(name, change, small)
    return forked(mm, *runs[at], impl="reference") if small else without_lane(forked, mm, *runs[at])


def without_lane(function: Callable[..., State], *args, **how) -> State:
    before = batch.simd_level
    batch.simd_level = 0
    try:
        return function(*args, **how)
    finally:
        batch.simd_level = before


@cache
def expected_protected(name: str, change: str, at: int, small: bool, cut: int) -> State:
    mm, runs = mixed(name, change, small)
    if small:
        return protected(mm, *runs[at], cut, "reference")
    return without_lane(protected, mm, *runs[at], cut, "core")


def changes(name: str) -> list[str]:
    return [change for pair, change in PAIRS if pair == name]


@pytest.mark.parametrize("small", [True, False], ids=["reference", "without lane"])
@pytest.mark.parametrize("name", ORDERS)
def test_kinds_that_take_turns(level, name, small):  # noqa: F811
    for change in changes(name):
        mm, runs = mixed(name, change, small)
        for at in range(1 if small and name in BIG else 2):
            check(mm, runs[at], expected(name, change, at, small), what=change)


@pytest.mark.parametrize("name", ORDERS)
def test_threads(level, name, monkeypatch):  # noqa: F811
    monkeypatch.setattr(batch, "THREAD_SLOTS", 1)
    monkeypatch.setattr(batch, "cpus", lambda: 64)
    for change in changes(name):
        mm, runs = mixed(name, change, False)
        wrong = forked(mm, *runs[0], threads=2).differs(expected(name, change, 0, False))
        assert not wrong, f"{change}: {wrong}"


@pytest.mark.parametrize("small", [True, False], ids=["reference", "without lane"])
@pytest.mark.parametrize("name", ORDERS)
def test_protection(level, name, small):  # noqa: F811
    for change in changes(name):
        mm, runs = mixed(name, change, small)
        for at, cut in ((0, 0), (1, 13 if small else 16)):
            wrong = protected(mm, *runs[at], cut, "core").differs(expected_protected(name, change, at, small, cut))
            assert not wrong, f"{change}: {wrong}"


@pytest.mark.parametrize("run", RUNS[1:4], ids=["v6.9", "v6.12", "v6.12 single"])
@pytest.mark.parametrize("name", ["0/2", "2/3/4", "5"])
def test_where_tables_end(level, name, run):  # noqa: F811
    """Wherever in a folio a table ends: it is two batches, or the entry behind it is not read."""
    for at in (*range(481, 512, 3), 496, 508, 510, 3, 8, 16):
        mm = lay(mixture(name, "old", 80), at=at)
        check(mm, run, without_lane(forked, mm, *run))


def test_a_folio_at_the_end_of_all(level):  # noqa: F811
    """Behind the last folio there is no entry to read, though its table goes on."""
    turns = [Piece(4), Piece(2), Piece(2), *[Piece()] * 8]
    for last in (4, 3, 2):
        check(lay([*turns * 17, Piece(last)]), (V6_12, True))


def test_no_page_mapcount(level):  # noqa: F811
    """Pages of large folios are not counted: their words stay as they are, but for the first ones."""
    for name in ("0/2", "2/3/4", "1/2", "6/7"):
        for change in ("none", "shared", "one page not exclusive", "count of one page"):
            mm = lay(mixture(name, change, 300))
            check(mm, (NO_MAPCOUNT, True), without_lane(forked, mm, NO_MAPCOUNT, True))


@pytest.mark.parametrize("batching", [True, False], ids=["batched", "single"])
@pytest.mark.parametrize("name", ["0", "0/2", "2/3/4", "5"])
def test_shadow_stacks(level, name, batching):  # noqa: F811
    """On a CPU that has them, a read-only entry that is dirty counts as writable."""
    for change in ("none", "bit of one entry", "readonly", "uffd_wp", "clean", "writable entry", "file"):
        mm = lay(mixture(name, change, 120))
        check(mm, (SHADOW_STACKS, batching), without_lane(forked, mm, SHADOW_STACKS, batching), what=change)
    check(mm, (SHADOW_STACKS, batching))


@st.composite
def turns(draw: st.DrawFn) -> list[Piece]:
    """A few kinds of pieces in any order, and now and then a folio once more."""
    kinds: list[Piece] = []
    for order in draw(st.lists(st.sampled_from((0, 0, 1, 2, 2, 3, 4, 5, 6)), min_size=1, max_size=3)):
        change = draw(st.sampled_from(sorted(CHANGES)))
        kinds += [Piece(order), CHANGES[change](random.Random(draw(st.integers(0, 7))), Piece(order))]
    kinds += [HOLE, SPECIAL, Piece(value=swp_entry(L, 0, 7) | L.swp_exclusive), Piece(again=1)]
    most = len(kinds) - 1
    which = draw(st.lists(st.one_of(st.integers(0, most), st.sampled_from((0, 0, 1, 1))), max_size=60))
    pieces: list[Piece] = [Piece()]
    for at in which:
        again = kinds[at].again is not None
        if again and pieces[-1].value is not None:
            continue
        pieces.append(replace(pieces[-1], again=1, bits=0) if again else kinds[at])
    return pieces


@settings(max_examples=EXAMPLES)
@given(turns(), st.sampled_from(SHAPES), st.sampled_from(RUNS))
def test_any_turns(level, pieces, shape, run):  # noqa: F811
    check(lay(pieces, **shape), run)


# --- the same page, close to itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [(LATEST, True), (V6_12, False)], ids=["batched", "single"])
def test_twins(level, run):  # noqa: F811
    """A small page that is mapped twice within a few entries is counted twice, wherever among small folios that is."""
    for distance in range(1, 6):
        for at in range(40, 50):
            # Folios that take turns first, so that small ones are looked at by fours.
            pieces = [Piece(order) for order in (0, 2) * 8]
            small = [Piece() for _ in range(40)]
            small[at - 40 + distance] = Piece(again=distance)
            pieces += small + [Piece(2), Piece(), Piece(), Piece(2), Piece()] * 4
            mm = lay(pieces)
            check(mm, run, without_lane(forked, mm, *run))
    check(mm, run)
    # Each four hold two of the same, however they lie.
    for pattern in ((0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0), (0, 0, 0, 0), (0, 1, 2, 0), (0, 1, 1, 2)):
        pieces = [Piece(order) for order in (0, 2) * 8]
        for _ in range(12):
            pieces += [Piece() if k == pattern.index(n) else Piece(again=k - pattern.index(n))
                       for k, n in enumerate(pattern)]  # fmt: skip
        mm = lay([*pieces, Piece(3)], in_order=True)
        check(mm, run)

@pytest.mark.parametrize("run", [(LATEST, True), (V6_12, False)], ids=["batched", "single"])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_pages_of_two_folios_in_each_others_places(level, order, run):  # noqa: F811
    """Two folios look as if mapped whole, page by page, but entries do not go on from one to the next."""
    nr = 1 << order
    pieces = []
    for first, many in ((0, 1), (1, 1), (2, 1), (nr - 1, 1), (nr // 2, nr // 2), (3, 2), (4, nr - 4)):
        if not 0 < many <= nr - first:
            continue
        parts = [range(first), range(first, first + many), range(first + many, nr)]
        pieces += [Piece(at) for at in (0, order) * 8]
        for k in range(6):  # of two folios in turns
            part = {"first": parts[k % 3].start, "nr": len(parts[k % 3])}
            pieces.append(Piece(order, **part) if k < 2 else Piece(order, again=2, **part))
    mm = lay(pieces, in_order=True)
    check(mm, run)


@pytest.mark.parametrize("run", [(LATEST, True), (LATEST, False), (V6_12, True)], ids=["batched", "single", "v6.12"])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 9])
def test_folios_mapped_several_times(level, order, run):  # noqa: F811
    """What one more mapping makes of a folio is another thing each time; MM-ID slots leave their pages meanwhile."""
    for times in (2, 3, 5) if order < 9 else (2,):
        pieces = [Piece(order, again=1 if k else None) for k in range(times)] * (6 if order < 9 else 3)
        pieces += [Piece(order), Piece()] * 6 if order < 5 else []
        mm = lay(pieces)
        check(mm, run, without_lane(forked, mm, *run) if order > 5 else None)


@pytest.mark.parametrize("run", [(V6_12, True), (V6_12, False), (V6_9, True), (LATEST, True)])
def test_halves_of_neighbours(level, run):  # noqa: F811
    """The end of a folio of two pages and the beginning of the next, whose words are like those of a whole one."""
    halves = [Piece(1, first=1), Piece(1, nr=1), Piece(1, again=2, nr=1), Piece(1, again=2, first=1)]
    pieces = [Piece(1)] * 8 + halves * 3 + [Piece(1), *halves, Piece(), Piece(1)] * 3
    for at in (0, 1):
        check(lay(pieces, in_order=True, at=at), run)


@pytest.mark.parametrize("batching", [True, False], ids=["batched", "single"])
@pytest.mark.parametrize("order", [0, 1, 2, 3, 4, 5])
def test_what_looks_like_a_folio(level, order, batching):  # noqa: F811
    """Swap entries and special ones that hold, where others have a PFN, those of a folio's pages."""
    pages = range(FIRST_PFN + (1 << order), FIRST_PFN + (2 << order))
    for flags in (0, L.young | L.dirty, WRITABLE | L.special):
        alike = [Piece(value=flags | page << 12) for page in pages]
        for some in ([Piece(order)] * 3, [Piece(order), Piece()] * 8):
            mm = lay([*some, *alike, *some, *alike], in_order=True)
            check(mm, (LATEST, batching), without_lane(forked, mm, LATEST, batching) if order else None)


# --- counts close to their limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_counts_close_to_their_limits(level, order):  # noqa: F811
    """Kinds of folios with counts that are, or become, too large for the lane, or for their field."""
    for count in (1 << 22, (1 << 22) - 1, (1 << 23) - 1, 1 << 23, (1 << 24) - 2):
        mm = lay([Piece(order) for _ in range(64 >> order | 8)])
        for k, head in enumerate(mm.folios.heads().tolist()[: 64 >> order | 8]):
            for page in range(head, head + (1 << order)) if k % 3 else [head]:
                mm.folios.page(page).mapcount = count
        check(mm, (LATEST, True), times=2)
    for count in ((1 << 25) - 40, (1 << 25) - 1, 1 << 25, (1 << 26) - 33):
        mm = lay([Piece(order) for _ in range(64 >> order | 8)])
        for k, head in enumerate(mm.folios.heads().tolist()[: 64 >> order | 8]):
            mm.folios.folio(head).refcount = count
            if order and k % 2:
                mm.folios.folio(head).large_mapcount = count
            if order and k % 3 == 1:
                mm.folios.folio(head).set_mm_ids(((mm.mm_id, count), (0, 0)))
        check(mm, (LATEST, k % 2 == 0), times=2)


@pytest.mark.parametrize("semantics", [V6_9, V6_12, LATEST], ids=lambda semantics: semantics.version)
@pytest.mark.parametrize("name", ["arm64-4k", "loongarch64-4k"])
def test_other_layouts(level, name, semantics):  # noqa: F811
    """Where an entry that was made writable and write-protected again is not what it was before, and where no PFN is
    inverted."""
    semantics = replace(semantics, contpte=False)
    layout = configured(arch.layout_for(name, semantics.switches), semantics)
    for folio in ((4096, 16384), (8192, 32768), (16384, 65536), (1 << 17,), (1 << 18, 4096)):
        for granularity, shares in (
            ("folio", {"readonly": 0.3, "clean": 0.5, "old": 0.2}),
            ("page", {"readonly": 0.02}),
            ("page", {"readonly": 0.1, "clean": 0.5, "swap": 0.1}),
        ):
            mm = Workload(size=4 << 20, folio=folio, granularity=granularity, **shares).build(layout=layout)
            for batching in (True, False):
                expected = without_lane(forked, mm, semantics, batching)
                check(mm, (semantics, batching), expected, what=f"{folio} by {granularity}, {shares}")


# --- folios with gaps -----------------------------------------------------------------------------------------------

GAPS = {
    "holes": lambda rng, page: HOLE,
    "old holes": lambda rng, page: Piece(value=rng.choice((0, L.young, L.dirty))),  # none, by what is ignored
    "swap": lambda rng, page: Piece(value=swp_entry(L, 0, 100 + page) | L.swp_exclusive),
    "all": lambda rng, page: rng.choice((HOLE, HOLE, SPECIAL, Piece(value=swp_entry(L, 0, 100 + page)), Piece())),
}
CHANGED = [WRITABLE ^ bit for bit in (L.young, L.dirty, L.soft_dirty)]
FLAGS = (WRITABLE, WRITABLE, READONLY, READONLY | L.uffd_wp, *CHANGED)


def ragged(rng: random.Random, order: int, gaps: str, flags: Sequence[int] = FLAGS, **like) -> list[Piece]:
    """The slots of one folio: some of its pages, in their places, by entries of a few kinds, and gaps."""
    pieces: list[Piece] = []
    page, since = 0, -1
    while page < 1 << order:
        nr = min(rng.choice((1, 1, 2, 3, 5, 16)), (1 << order) - page)
        if rng.random() < 0.3:
            more = [GAPS[gaps](rng, page + k) for k in range(nr)]
            pieces += more
            since += len(more) if since >= 0 else 0
        else:
            own = like if since < 0 else {}
            again = None if since < 0 else since + 1
            pieces.append(Piece(order, rng.choice(flags), page, nr, again=again, **own))
            since = 0
        page += nr
    return pieces


def gapped(rng: random.Random, orders: Sequence[int], gaps: str, nr_slots: int, **like) -> list[Piece]:
    """Folios one after the other, in the places of their sizes: half of them whole and alike."""
    pieces: list[Piece] = []
    used = 0
    while used < nr_slots:
        order = rng.choice(orders)
        pieces += [HOLE] * (-used % (1 << order))
        used += -used % (1 << order) + (1 << order)
        pieces += [Piece(order)] if rng.random() < 0.5 else ragged(rng, order, gaps, **like)
    return pieces


@pytest.mark.parametrize("run", RUNS[1::2] + RUNS[-1:], ids=lambda run: f"{run[0].version} {run[1]}")
@pytest.mark.parametrize("orders", [(0,), (1, 2), (2,), (3, 4), (4,), (0, 2, 4, 5), (6, 9)], ids=str)
@pytest.mark.parametrize("gaps", GAPS)
def test_folios_with_gaps(level, gaps, orders, run):  # noqa: F811
    rng = random.Random(f"{gaps} {orders}")
    for shape in rng.sample(SHAPES, 3):
        check(lay(gapped(rng, orders, gaps, 700), **shape), run, what=str(shape), times=2)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_one_gap_anywhere(level, order):  # noqa: F811
    """At every page, among folios like it, with and without the clamp; at a table's end too, and at the end of all."""
    nr = 1 << order
    for gap, flags in ((HOLE, WRITABLE), (Piece(value=swp_entry(L, 0, 9)), READONLY)):
        pieces: list[Piece] = []
        for at in range(nr):
            pieces += [Piece(order)] * (at % 3)
            pieces += [Piece(order, flags, 0, at)] * (at > 0) + [gap]
            pieces += [Piece(order, flags, at + 1, nr - at - 1, again=2 if at else None)] * (at + 1 < nr)
        for at in (0, 512 - sum(len(p.pages) if p.value is None else 1 for p in pieces) % 512):
            mm = lay(pieces, at=at)
            for run in ((V6_9, True), (LATEST, True)):
                check(mm, run)


LIKE = {
    "counts": {"others": 3},
    "spilled slots": {"slots": (31, 32)},
    "full slots": {"slots": (3, 9)},
    "pinned": {"bits": 8},
    "poisoned": {"bits": 4},
    "file": {"anon": False, "swapbacked": False},
    "hugetlb": {"hugetlb": True},
    "one page not exclusive": {"shared": (1,)},
}


@pytest.mark.parametrize("like", LIKE)
def test_folios_with_gaps_that_are_like(level, like):  # noqa: F811
    rng = random.Random(like)
    for orders in ((2,), (3, 4)):
        check(lay(gapped(rng, orders, "all", 600, **LIKE[like]), at=4), (LATEST, True), what=f"{orders}", times=2)


@pytest.mark.parametrize("fail_at", [None, 40, 77, 300])
@pytest.mark.parametrize("run", RUNS[1:4] + RUNS[-2:], ids=lambda run: f"{run[0].version} {run[1]}")
def test_pinned_folios_of_which_not_all_is_copied(level, run, fail_at):  # noqa: F811
    """Pages that are not exclusive, poisoned ones, batches that end early and folios that go on, and no more memory."""
    rng = random.Random(f"{run[0].version} {run[1]} {fail_at}")
    pieces: list[Piece] = []
    for _ in range(60):
        order = rng.choice((0, 1, 2, 4, 4, 5))
        nr, pinned = 1 << order, rng.random() < 0.7
        pages = rng.sample(range(nr), rng.choice((0, 0, 1, nr // 2, nr)))
        nr_toggles = rng.choice((0, 0, 2))
        toggles = tuple((some(rng, order), rng.choice((L.young, L.write, L.uffd_wp))) for _ in range(nr_toggles))
        bits = 8 * pinned + 4 * (len(pieces) > 50 and rng.random() < 0.2)
        pieces.append(Piece(order, shared=tuple(pages), toggles=toggles, bits=bits))
        first = some(rng, order)
        pieces += [] if rng.random() < 0.6 else [replace(pieces[-1], first=first, nr=rng.randint(1, nr - first))]
    for at in (0, 300):
        mm = lay(pieces, at=at)
        expected = forked(mm, *run, impl="reference", fail_at=fail_at)
        assert fail_at is None or "error" in expected.rest[0]
        check(mm, run, expected, fail_at=fail_at)


def test_pinned_memory_again_and_again(level):  # noqa: F811
    """A plan that is reset has room for the pages that were copied, and what was in it is gone."""
    mm = Workload(size=8 << 20, folio=(65536,), pinned=0.5).build()
    before = copy_state(mm)
    plan = ForkPlan(mm, keep=True)
    first, room = plan.run().to_dict(), mm.folios._words
    assert first["copied_pages"] > 64
    pages = mm.folios.pages_table()
    for _ in range(2):
        plan.reset()
        assert mm.folios == before.folios
        assert np.array_equal(mm.entries, before.entries)
        assert plan.run().to_dict() == first
        assert mm.folios._words is room
        assert all(np.array_equal(pages[name], now) for name, now in mm.folios.pages_table().items())


@pytest.mark.parametrize("page", [0, 5, 15])
def test_a_count_near_its_limit_beside_a_gap(level, page):  # noqa: F811
    mm = lay([Piece(4), Piece(4, WRITABLE, 0, 8), HOLE, Piece(4, WRITABLE, 9, 7, again=2), Piece(4)])
    pfn = arch.pte_pfn(L, int(mm.entries[0, 16])) + page
    for count in (1 << 22, (1 << 23) - 1, (1 << 24) - 1):
        mm.folios.page(pfn).mapcount = count
        check(mm, (LATEST, True))


MAPPED = {
    "whole": [Piece(4)],
    "a gap": [Piece(4, WRITABLE, 0, 8), HOLE, Piece(4, WRITABLE, 9, 7, again=2)],
    "swap": [Piece(4, WRITABLE, 0, 8), Piece(value=swp_entry(L, 0, 9)), Piece(4, WRITABLE, 9, 7, again=2)],
    "two batches": [Piece(4, WRITABLE, 0, 9), Piece(4, READONLY, 9, 7, again=1)],
    "many pages": [Piece(6)],
    "a part of many": [Piece(6, WRITABLE, 0, 40)],
}


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("page", [0, 5, 15])
@pytest.mark.parametrize("how", MAPPED)
def test_mapcounts_that_come_near_their_limit_are_told(level, how, page, batching):  # noqa: F811
    """They are checked from then on only; an overflow would be one of the word's next field."""
    mm = lay([Piece(4), *MAPPED[how], Piece(4)] * 2)
    mm.folios.page(arch.pte_pfn(L, int(mm.entries[0, 16])) + page).mapcount = NEAR_LIMIT - 1
    for told in (False, True):
        ForkPlan(mm, semantics=LATEST, batching=batching).run()
        assert mm.folios._near_limit is told


@settings(max_examples=EXAMPLES)
@given(st.integers(0, 1 << 30), st.sampled_from(SHAPES), st.sampled_from(RUNS))
def test_any_gaps(level, seed, shape, run):  # noqa: F811
    rng = random.Random(seed)
    orders = rng.choice(((0,), (2,), (4,), (0, 1, 2, 3, 4)))
    pieces = gapped(rng, orders, rng.choice(sorted(GAPS)), rng.choice((40, 200)))
    check(lay(pieces, **shape), run)


# --- swap entries ---------------------------------------------------------------------------------------------------


def swapped(rng: random.Random, nr_slots: int) -> tuple[list[Piece], dict[int, int]]:
    """Entries to slots that follow each other, mostly; pages, holes and others; what slots count besides."""
    pieces: list[Piece] = []
    counts: dict[int, int] = {}
    area, offset = 0, 100
    bits = (0, L.swp_exclusive, L.swp_soft_dirty, L.swp_uffd_wp)
    while len(pieces) < nr_slots:
        if rng.random() < 0.1:
            area, offset = rng.choice((0, 0, 1, 22)), rng.choice((100, offset + 5, offset - 3, 5000))
        for _ in range(rng.choice((1, 2, 5, 9, 30))):
            value = swp_entry(L, area, offset) | rng.choice((L.swp_exclusive, rng.choice(bits) | rng.choice(bits)))
            pieces.append(Piece(value=value))
            if rng.random() < 0.04:
                more = rng.choice((SWAP_MAP_MAX - 2, SWAP_MAP_MAX - 1, SWAP_MAP_MAX, MAX_SWAP_COUNT >> 1))
                counts[swap_key(area, offset)] = more
            offset += 1
        pieces += rng.choice(
            ([], [], [HOLE], [Piece()], [Piece(flags=READONLY & ~L.valid | L.protnone)] * 3, [Piece(2)],
             [Piece(value=swp_entry(L, arch.SWP_PTE_MARKER, rng.choice((1, 2, 4))) | rng.choice((0, L.swp_uffd_wp)))])
        )  # fmt: skip
    return pieces, counts


@pytest.mark.parametrize("vm_flags", [PRIVATE, PRIVATE | UFFD], ids=["plain", "uffd-wp"])
@pytest.mark.parametrize("seed", range(6))
def test_swap_entries(level, seed, vm_flags):  # noqa: F811
    pieces, counts = swapped(random.Random(seed), 200)
    mm = lay(pieces, at=500, vm_flags=vm_flags, event_fork=True)
    mm.folios.swap.add(list(counts))
    for key, nr in counts.items():
        mm.folios.swap.add([key], nr)
    check(mm, RUNS[seed], times=2)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[0].version} {run[1]}")
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_folios_swapped_out_among_others(level, order, run):  # noqa: F811
    """Of all pages of a folio, or of some, or of more than a folio has; the other folios are of two or three kinds."""
    rng = random.Random(order)
    pages, offset = 1 << order, 100
    kinds = [{}, {"flags": READONLY}, {"shared": tuple(range(pages))}]
    pieces: list[Piece] = []
    for k in range(200):
        area, nr = rng.choice((0, 0, 0, 3)), rng.choice((pages, pages, pages, 2 * pages, rng.randrange(1, 3 * pages)))
        pick = rng.random()
        if pick < 0.1:
            pieces += [Piece(value=swp_entry(L, area, offset + j) | L.swp_exclusive) for j in range(nr)]
            pieces += [HOLE] * (-nr % pages * (rng.random() < 0.5))  # or folios are not in the places of their sizes
            offset += nr + rng.choice((0, 0, 1))
        elif pick < 0.95:
            # Both kinds by chance, then long runs of one, then a third too.
            kind = rng.randrange(2) if k < 100 else k // 20 % 2 if k < 160 else rng.randrange(3)
            pieces.append(Piece(order, **kinds[kind]))
        else:
            pieces += ragged(rng, order, "swap")
    check(lay(pieces, at=rng.choice((0, 0, 512 - 4 * pages))), run, times=2)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_folios_out_of_place_behind_swap_entries(level, order):  # noqa: F811
    """A table ends within one, and with it the batch."""
    pages = 1 << order
    for nr in (1, pages - 1, pages + 1):
        out = [Piece(value=swp_entry(L, 0, 100 + k)) for k in range(nr)]
        for run in RUNS:
            check(lay([*[Piece(order)] * 2, *out, *[Piece(order)] * 9], at=512 - 8 * pages), run, times=2)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_a_table_or_vma_that_ends_within_a_folio_whose_first_page_is_swapped_out(level, order):  # noqa: F811
    """Its other pages are the next one's: copied with that, and of another batch."""
    pages = 1 << order
    out = [Piece(value=swp_entry(L, 0, 100 + k)) for k in range(pages + 1)]
    first, second = Piece(order, WRITABLE, 1, pages // 2 - 1), Piece(order, WRITABLE, pages // 2, pages // 2, again=1)
    for run in RUNS:
        for shape in ({"vmas": 2}, {"at": 512 - 7 * pages // 2}):
            check(lay([*[Piece(order)] * 2, *out, first, second, *[Piece(order)] * 3], **shape), run, times=2)


@pytest.mark.parametrize("length", [3, 60, 64, 70])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_kinds_by_chance_and_then_one(level, order, length):  # noqa: F811
    """However long it goes on with two kinds of folios that cannot be told before, and with one after that."""
    rng = random.Random(length)
    last = (1 << order) - 1
    kinds = [{}, {"flags": READONLY}, {"shared": (0,)}, {"shared": (1,)}, {"shared": (last,)}]
    for first, second, third in ((0, 1, 0), (1, 2, 3), (3, 2, 1), (0, 3, 4)):
        pieces = [Piece(order, **kinds[rng.choice((first, second))]) for _ in range(length)]
        pieces += [Piece(order, **kinds[second])] * 70 + [Piece(order, **kinds[first])] * 20
        pieces += [Piece(order, **kinds[rng.choice((first, second, third))]) for _ in range(length)]
        for run in RUNS[1:4] + RUNS[-2:]:
            check(lay(pieces), run)


def test_swap_slots_that_nobody_knew(level):  # noqa: F811
    """Slots that the table has not heard of are asked for, whatever was copied in front of them."""
    pieces = [Piece(value=swp_entry(L, 0, 9 + k) | L.swp_exclusive) for k in range(20)]
    for unknown in (0, 1, 7, 19):
        mm = lay([*pieces[:unknown], *pieces[unknown:], Piece(), Piece(2)] * 2)
        keys, counts = mm.folios.swap.table()
        known = np.flatnonzero(keys < np.uint64(9 + unknown))
        mm.folios.swap._slots, mm.folios.swap._counts = keys[known].copy(), counts[known].copy()
        check(mm, (LATEST, True))


def test_slots_that_only_look_like_it(level):  # noqa: F811
    """Entries of other types, and none, are not of pages that are swapped out, whatever slots are known."""
    migration, none = swp_entry(L, 25, FIRST_PFN), L.young
    mm = lay([*[Piece(value=swp_entry(L, 0, 9)), Piece(value=migration), Piece(value=none)] * 9, Piece()])
    mm.folios.swap.add([swap_key(arch.swp_type(L, v), arch.swp_offset(L, v)) for v in (migration, none)])
    check(mm, (LATEST, True))
    last = (1 << 50) - 1 & arch.swp_offset(L, none)
    for nr in (3, 7):
        mm = lay([*[Piece(value=swp_entry(L, 0, last - nr + k)) for k in range(nr)], Piece(value=none), Piece()])
        mm.folios.swap.add([swap_key(0, last)])
        check(mm, (LATEST, True))


@pytest.mark.parametrize("odd", [1, 3, 5, 7, 8, 15])
def test_slots_of_two_areas(level, odd):  # noqa: F811
    """Offsets go on, but one entry is of another area; or all are, and one is not swapped out."""
    for value in (swp_entry(L, 1, 100 + odd), swp_entry(L, 25, FIRST_PFN), 0, Piece(4).flags | FIRST_PFN << 12):
        pieces = [Piece(value=swp_entry(L, 0, 100 + k)) for k in range(16)]
        pieces[odd] = Piece(value=value)
        mm = lay([Piece(4), *pieces, Piece(4)] if value & 1 == 0 else [*pieces, Piece(4)])
        mm.folios.swap.add([swap_key(area, 100 + k) for area in (0, 1) for k in range(16)])
        check(mm, (LATEST, True), times=2)


def test_swap_full_and_failing(level):  # noqa: F811
    """The entry that cannot be copied is found by who can say why; what was copied in front of it is counted."""
    pieces = [Piece(value=swp_entry(L, 0, 9 + k)) for k in range(20)]
    for at in (0, 3, 19):
        mm = lay([*pieces, Piece()])
        mm.folios.swap.add([swap_key(0, 9 + at)], MAX_SWAP_COUNT - 1)
        check(mm, (LATEST, True))
        mm = lay([*pieces, Piece()])
        mm.folios.swap.add([swap_key(0, 9 + at)], SWAP_MAP_MAX - 1)
        for fail_at in range(3, 6):
            check(mm, (LATEST, True), forked(mm, LATEST, True, impl="reference", fail_at=fail_at), fail_at=fail_at)


# --- the read-only pass ---------------------------------------------------------------------------------------------

NO_PAGE = 1 << 30
REFUSED = {
    "no page": arch.mk_pte(L, NO_PAGE, WRITABLE),
    "PROT_NONE, no page": arch.mk_pte(L, NO_PAGE, READONLY & ~L.valid | L.protnone),
    "page 0": arch.mk_pte(L, 0, WRITABLE),
    "migration": swp_entry(L, 25, NO_PAGE),
    "device": swp_entry(L, 28, NO_PAGE),
    "before the extent": arch.mk_pte(L, FIRST_PFN - 1, WRITABLE),
    "PROT_NONE, before the extent": arch.mk_pte(L, FIRST_PFN - 1, READONLY & ~L.valid | L.protnone),
}
PASSED = {
    "special": SPECIAL.value,
    "special PROT_NONE": arch.mk_pte(L, NO_PAGE, L.special | L.protnone),
    "marker": swp_entry(L, arch.SWP_PTE_MARKER, 4),
    "hwpoison": swp_entry(L, 23, NO_PAGE),
    "none with A and D": L.young | L.dirty,
    "swap": swp_entry(L, 22, 1 << 40),
}


@cache
def mixed_entries(nr: int) -> Mm:
    kinds = [Piece(), Piece(), HOLE, Piece(flags=READONLY & ~L.valid | L.protnone), Piece(value=swp_entry(L, 0, 7))]
    return lay([random.Random(k).choice(kinds) for k in range(nr)], at=490)


def outcome(impl: str, mm: Mm) -> str:
    try:
        plan = ForkPlan(mm, impl=impl)
        plan.impl.check_range(mm, [context.src_vma for context in plan.contexts], semantics=LATEST)
    except PtebatchError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_the_first_entry_that_is_refused(level):  # noqa: F811
    """Among mapped, PROT_NONE, swapped out and none, the first entry that fork could not copy is found."""
    mm = mixed_entries(200)
    flat = mm.entries.reshape(-1)[490 : 490 + 200]
    for where in (*range(0, 40, 3), 97, 191, 198, 199):
        for one in (*REFUSED.values(), *PASSED.values()):
            kept = flat[[where, 199]].tolist()
            flat[199] = np.uint64(REFUSED["no page"])
            flat[where] = np.uint64(one)
            got, address = outcome("core", mm), mm.vmas[0].start + (where << 12)
            refused = one in REFUSED.values()
            assert got.startswith("PfnError") or (where == 199 and not refused)
            assert (f"{address:#x}" in got) == refused, (where, hex(one), got)
            if where in (9, 199):
                assert got == outcome("reference", mm)
            flat[[where, 199]] = np.array(kept, dtype=np.uint64)


def test_the_first_entry_of_much_memory(level):  # noqa: F811
    """The same where several streams are read at once."""
    mm = mixed_entries(200)
    rows = 33
    big = Mm.for_vmas(L, mm.folios, [Vma(START, START + (rows << 21), PRIVATE, anon_vma=True)])
    flat, usual = big.entries.reshape(-1), mm.entries[0, 490:512]
    flat[...] = next(v for v in usual if int(v) & L.valid)
    for one in (*REFUSED.values(), *PASSED.values()):
        for where in (0, 4095, 4224, 8000, len(flat) - 1):
            kept = int(flat[where])
            flat[where] = np.uint64(one)
            got = outcome("core", big)
            assert bool(got) == (one in REFUSED.values())
            assert not got or f"{START + (where << 12):#x}" in got
            flat[where] = np.uint64(kept)


# --- memory safety --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [62, 63])
def test_the_last_pages_of_the_memmap(level, first):  # noqa: F811
    """Of a folio that is mapped from its last pages on, no word behind it is read (the sanitizer sees it)."""
    mm = lay([Piece(6, first=first)])
    words = np.full(len(mm.folios._words), 0, dtype=np.uint64)  # with nothing behind it
    words[...] = mm.folios._words
    mm.folios._words = words
    assert fork(mm).stats.ptes_present == 64 - first


BEYOND = """
import ctypes, mmap
import numpy as np
from ptebatch import arch, batch
from ptebatch.fork import ForkPlan
from ptebatch.mm import new_stats
from ptebatch.workload import Workload
layout = arch.LAYOUTS["s390x"]
mm = Workload(size=2 << 20).build(layout=layout)
area = mmap.mmap(-1, 1 << 16)
room = np.frombuffer(area, dtype=np.int64)
nr = len(new_stats(layout))
assert layout.ptrs_per_pte == 256 and nr < 4096
stats = room[4096 - nr : 4096]
libc = ctypes.CDLL(None, use_errno=True)
assert not libc.mprotect(ctypes.c_void_p(room.ctypes.data + (1 << 15)), ctypes.c_size_t(1 << 15), 0)
plan = ForkPlan(mm)
assert batch.copy_page_range(plan.contexts[0], plan.child, mm, stats) == 0
print(int(stats[-257:].sum()))
"""


def test_nothing_behind_the_histogram():
    """Tables of 256 entries have a short one: nothing of larger folios is counted there, not even none of them."""
    run = subprocess.run([sys.executable, "-P", "-c", BEYOND], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "512\n"), run.stderr


def fork_beside(mm: Mm, write: Callable[[], None], forks: Sequence[dict[str, object]]) -> None:
    """Fork again and again, with counts of its own every time, while a thread writes to the entries."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            write()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        for options in forks:
            other = copy_state(mm)
            plan = ForkPlan(other, **options)
            plan.mm = mm
            mm.folios = other.folios
            with contextlib.suppress(PtebatchError):
                plan.run()
    finally:
        stop.set()
        thread.join()


def test_a_writer_at_the_same_time(level):  # noqa: F811
    """Entries that change while they are copied may spoil what is counted, but nothing outside is read or written."""
    rng = np.random.default_rng(7)
    mm = lay(mixture("0/2/4", "old", 9000) + mixture("5", "old", 9000) + mixture("8/9", "none", 9000))
    flat = mm.entries.reshape(-1)
    good = flat.copy()
    bad = rng.integers(0, 1 << 63, len(flat), dtype=np.uint64)
    bits = np.uint64(1) << rng.integers(0, 64, len(flat), dtype=np.uint64)

    def write() -> None:
        for values in (bad, good ^ bits, good):
            at = int(rng.integers(0, len(flat) - 2000))
            flat[at : at + 2000] = values[at : at + 2000]

    fork_beside(mm, write, [{"batching": True}, {"batching": False}] * 10)


@pytest.mark.parametrize("value", ["far", "none", "swapped"])
@pytest.mark.parametrize("orders", [(0,), (1,), (2, 4), (3,), (0, 2, 4), (5,), (9,)], ids=str)
def test_a_writer_of_few_entries(level, orders, value, monkeypatch):  # noqa: F811
    """Few entries change, again and again: between two looks at the same, sooner or later, and to what maps no page."""
    monkeypatch.setattr(batch, "THREAD_SLOTS", 1)
    rounds = 32768 // sum(1 << order for order in orders)
    mm = lay([Piece(order) for _ in range(rounds) for order in orders])
    # So many that NumPy lets go of the GIL: from 500 on.
    some = mm.entries.reshape(-1)[4 : sum(rounds << order for order in orders) : 32]
    good = some.copy()
    other = {"far": good ^ np.uint64(1 << 45), "none": np.uint64(0), "swapped": np.uint64(swp_entry(L, 0, 5))}[value]

    def write() -> None:
        some[:] = other
        some[:] = good

    fork_beside(mm, write, ([{}] * 3 + [{"batching": False}, {"threads": 2}]) * 30)


@pytest.mark.parametrize("order", range(1, 5))
@pytest.mark.parametrize("protnone_first", [True, False])
def test_an_inverted_pfn_is_no_place_for_entries_of_the_other_kind(level, order, protnone_first):  # noqa: F811
    """x86-64 inverts the PFN of PROT_NONE entries: read the other way, they map another folio, here too."""
    nr, low = 1 << order, 1 << 18
    protnone = WRITABLE & ~(L.write | L.valid | L.user) | L.protnone
    first, then = (protnone, WRITABLE) if protnone_first else (WRITABLE, protnone)
    folios = FolioTable()
    folios.add_folios(np.arange(low, low + 256, nr), order)
    folios.add_folios(np.arange((MAX_PFN - low - 255) & -64, MAX_PFN - low + 1), 0)
    values = [arch.mk_pte(L, low + j, first) for j in range(nr)]
    values += [arch.mk_pte(L, low + nr + j, then) for j in range(nr)]
    values += [arch.mk_pte(L, low + 2 * nr + j, then if j else then & ~L.young) for j in range(nr)]
    values += [arch.mk_pte(L, MAX_PFN - (low + 3 * nr + j), first) for j in range(2 * nr)]
    values += [arch.mk_pte(L, low + 5 * nr + j, then) for j in range(nr)]
    mm = Mm.for_vmas(L, folios, [Vma(START, START + (len(values) << 12), PRIVATE, anon_vma=True)])
    mm.fill(START, np.array(values, dtype=np.uint64))
    account(mm)
    like = folios.lookup(np.arange(low, low + nr))
    for k in (3, 4):
        at = folios.lookup(np.arange(low + k * nr, low + (k + 1) * nr))
        folios._words[at], folios._aux[at] = folios._words[like], folios._aux[like]
    for semantics, batching in ((V6_9, True), (V6_12, True), (V6_12, False), (LATEST, True), (LATEST, False)):
        assert not forked(mm, semantics, batching).differs(without_lane(forked, mm, semantics, batching))
