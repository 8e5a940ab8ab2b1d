"""Fork by several threads leaves what one thread leaves."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from test_differential import assert_same
from test_simd import EXAMPLES, RUNS, WORKLOADS, level, memory  # noqa: F401
from typer.testing import CliRunner

from ptebatch import arch, batch, cli
from ptebatch.arch import VM_WRITE, mk_pte, pte_pfn, vm_get_page_prot
from ptebatch.arch import X86_64 as L
from ptebatch.errors import ArgumentError, ForkError, PfnError, StateError
from ptebatch.folio import FolioTable
from ptebatch.fork import ForkPlan, ForkResult, fork
from ptebatch.mm import Mm, Vma, configured, copy_state, digest, new_stats
from ptebatch.semantics import LATEST, V6_6, V6_9, V6_12
from ptebatch.workload import Workload

VM_ALL = VM_WRITE | 0x71  # private, readable


@pytest.fixture(autouse=True)
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are used however few slots and CPUs there are."""
    monkeypatch.setattr(batch, "THREAD_SLOTS", 1)
    monkeypatch.setattr(batch, "cpus", lambda: 64)


lane = pytest.mark.skipif(not batch.simd_level, reason="PTEBATCH_SIMD=off: no threads")


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How far each thread was allowed to copy, by VMA."""
    seen: list[list[int]] = []
    check = batch.check_range

    def spy(*args, **kwargs):
        found = check(*args, **kwargs)
        seen.extend(marks[:, 0].tolist() for marks in found.values())
        return found

    monkeypatch.setattr(batch, "check_range", spy)
    return seen


def assert_equal(mm: Mm, got: ForkResult, other: Mm, expected: ForkResult, semantics) -> None:
    assert got.stats.to_dict() == expected.stats.to_dict()
    assert got.allocations == expected.allocations
    assert_same(mm, other, semantics)
    assert_same(got.child, expected.child, semantics)
    assert digest([mm, got.child], mm.folios, semantics) == digest([other, expected.child], other.folios, semantics)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[0].version} {'batched' if run[1] else 'single'}")
@pytest.mark.parametrize("name", [*WORKLOADS, "large, PROT_NONE"])
def test_workload(level, name, run):  # noqa: F811
    semantics, batching = run
    other = copy_state(memory(name))
    expected = fork(other, semantics=semantics, batching=batching)
    for threads in (2, 5):
        mm = copy_state(memory(name))
        got = fork(mm, semantics=semantics, batching=batching, threads=threads)
        assert_equal(mm, got, other, expected, semantics)


def busy(shares: list[list[int]]) -> int:
    """How many threads had anything to copy."""
    return sum(until > before for vma in shares for before, until in itertools.pairwise([0, *vma]))


def some_memory(rng: random.Random) -> Workload:
    """Memory of which threads share much: whole tables, few holes in the memmap."""
    folios = rng.sample([4096, 8192, 16384, 65536, 1 << 20, 1 << 21], rng.choice([1, 2, 3]))
    shares = {name: rng.choice([0.0, 0.0, 0.3]) for name in ("readonly", "clean", "old", "shared", "uffd_wp")}
    return Workload(
        size=rng.choice([12, 12, 15, 48]) << 20, folio=tuple(folios), seed=rng.randrange(1 << 30),
        align=rng.choice(["natural", "shifted"]), fragmentation=rng.choice([0.0, 0.3]),
        holes=rng.choice([0.0, 0.05]), vmas=rng.choice([1, 1, 2]), soft_dirty=rng.choice([None, None, 0.5]),
        granularity=rng.choice(["folio", "page"]), **shares,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["x86-64", "arm64-4k", "loongarch64-4k"])
def test_any_memory(name, shares):
    rng, threaded, runs = random.Random(name), 0, max(12, EXAMPLES // 8)
    for _ in range(runs):
        semantics = replace(rng.choice([V6_6, V6_9, V6_12, LATEST]), contpte=False)
        layout = configured(arch.layout_for(name, semantics.switches), semantics)
        made = some_memory(rng)
        if name != "x86-64":
            made = replace(made, soft_dirty=None, uffd_wp=0.0)
        memory, batching = made.build(layout=layout), rng.choice([None, False])
        if rng.random() < 0.3:  # an entry that is not the lane's, anywhere
            table = memory.entries[rng.randrange(len(memory.entries))]
            table[rng.randrange(512)] = np.uint64(layout.special | layout.present_mask)
        mm, other, third = copy_state(memory), copy_state(memory), copy_state(memory)
        expected = fork(other, semantics=semantics, batching=batching)
        for one, threads in ((mm, 2), (third, rng.choice([3, 4, 7]))):
            shares.clear()
            got = fork(one, semantics=semantics, batching=batching, threads=threads)
            assert_equal(one, got, other, expected, semantics)
            threaded += busy(shares) > 1
    assert threaded > runs // 2 or not batch.simd_level


@lane
def test_threads_share_a_vma(shares):
    fork(Workload(size=12 << 20, folio=(65536,)).build(), threads=3)
    assert shares == [[1024, 2048, 3072]]


@lane
def test_what_the_lane_does_not_know_is_left_to_one_thread(shares):
    mm = Workload(size=12 << 20, folio=(65536,)).build()
    mm.entries[3, 100] = np.uint64(L.special | L.present_mask)
    other = copy_state(mm)
    got = fork(mm, threads=3)
    assert shares == [[1024, 1536, 2048]]  # the third has none
    assert_equal(mm, got, other, fork(other), LATEST)


@lane
@pytest.mark.parametrize(
    ("folio", "slot", "nr"),
    [
        pytest.param(4096, 7, 1, id="page, page"),
        pytest.param(8192, 511, 1, id="half a quad, page"),
        pytest.param(16384, 8, 4, id="quad, quad"),
        pytest.param(16384, 508, 4, id="the last quad"),
        pytest.param(65536, 39, 1, id="quad, page"),
        pytest.param(65536, 34, 4, id="quad, four pages"),
        pytest.param(65536, 32, 16, id="large folio"),
        pytest.param(1 << 21, 0, 512, id="table"),
    ],
)
def test_pages_mapped_by_tables_of_two_threads(level, shares, folio, slot, nr):  # noqa: F811
    """However either thread marks them, none of them has any slots."""
    mm = Workload(size=8 << 20, folio=(folio,)).build()
    mm.entries[3, slot : slot + nr] = mm.entries[0, slot : slot + nr]
    other = copy_state(mm)
    got = fork(mm, threads=2)
    assert shares == [[0, 1024]] or level == "off"
    assert_equal(mm, got, other, fork(other), LATEST)


@pytest.mark.parametrize("folio", [4096, 8192, 16384, 65536, 1 << 21])
def test_pages_next_to_those_of_another_thread(level, shares, folio):  # noqa: F811
    """Neighbours in the memmap are nobody else's: every thread has its slots."""
    mm = Workload(size=8 << 20, folio=(folio,)).build()
    flat = mm.entries.reshape(-1)
    flat[:] = np.sort(flat).reshape(-1, 2, folio >> 12).swapaxes(0, 1).reshape(-1)
    other = copy_state(mm)
    got = fork(mm, threads=2)
    assert shares == [[1024, 2048]] or level == "off"
    assert_equal(mm, got, other, fork(other), LATEST)


@pytest.mark.parametrize("nr", [16, 4096], ids=["a few, again and again", "many"])
@pytest.mark.parametrize("order", [2, 4])
def test_folios_shared_between_tables(level, shares, order, nr):  # noqa: F811
    """Folios of which tables of two threads map a half each, in turn with others: more than a thread can leave singly.

    Were they not left, the threads would count a few of them at the same time, again and again.
    """
    folios, start, tables, pages = FolioTable(), 1 << 30, 32, 1 << order
    vpns = np.arange(2 * tables) * 512 + (start >> 12)
    mm = Mm(L, folios, vmas=[Vma(start, start + (2 * tables << 21), VM_ALL, anon_vma=True)], vpns=vpns)
    entries, prot = mm.entries.reshape(2, -1), vm_get_page_prot(L, VM_ALL) | L.write
    places = entries.shape[1] // pages
    nr = min(nr, places // 2)
    times = places // 2 // nr
    for number in range(nr + 2 * (places // 2)):
        maps = times if number < nr else 1
        head = 4096 + number * pages
        folios.add(head, order, refcount=maps * pages, mapcount=maps, anon_exclusive=maps == 1)
    entry = np.array([mk_pte(L, pfn, prot) for pfn in range(4096, 4096 + (nr + places) * pages)], dtype=np.uint64)
    for place in range(places):
        at = place * pages
        for thread in (0, 1):
            if place % 2:
                first, part = nr + place - thread, slice(0, pages)  # a folio of its own
            else:
                first, part = place // 2 % nr, slice(thread * pages // 2, (thread + 1) * pages // 2)
            entries[thread, at : at + pages][part] = entry[first * pages : (first + 1) * pages][part]
    other = copy_state(mm)
    got = fork(mm, threads=2)
    assert shares == [[tables * 512, 2 * tables * 512]] or level == "off"
    assert_equal(mm, got, other, fork(other), LATEST)


@lane
@pytest.mark.parametrize("slot", [(0, 3), (1, 0), (1, 5), (3, 511)])
def test_a_count_at_its_limit(slot):
    """What one thread finds among what was passed over is what it finds alone, and at the same address."""
    mm = Workload(size=8 << 20, folio=(4096,)).build()
    mm.folios.page(pte_pfn(L, int(mm.entries[slot]))).mapcount = (1 << 24) - 1
    outcomes = []
    for threads in (1, 2):
        plan = ForkPlan(copy_state(mm), threads=threads)
        with pytest.raises(StateError) as error:
            plan.run()
        outcomes.append((str(error.value), plan.allocations.made))
    assert outcomes[0] == outcomes[1]


@lane
def test_much_memory(shares):
    """Enough slots and pages for every loop of the read-only pass; the last page is mapped twice."""
    mm = Workload(size=256 << 20, folio=(4096, 65536)).build()
    other = copy_state(mm)
    assert_equal(mm, fork(mm, threads=2), other, fork(other), LATEST)
    assert shares == [[32768, 65536]]
    mm = Workload(size=256 << 20, folio=(4096,)).build()
    first, nr, _ = mm.folios.extent()
    pfns = mm.entries.reshape(-1) >> np.uint64(12) & np.uint64(0xFFFFFFFFFF)
    row, at = divmod(int(np.flatnonzero(pfns == first + nr - 1)[0]), 512)
    mm.entries[127 - row, at] = mm.entries[row, at]
    other = copy_state(mm)
    shares.clear()
    got = fork(mm, threads=2)
    assert shares == [[0, 32768]]
    assert_equal(mm, got, other, fork(other), LATEST)


def test_nothing_is_changed_where_an_entry_cannot_be_copied():
    mm = Workload(size=8 << 20, folio=(4096,)).build()
    mm.entries[3, 7] = np.uint64(mk_pte(L, 1 << 35, vm_get_page_prot(L, VM_ALL)))
    before = copy_state(mm)
    with pytest.raises(PfnError) as one:
        fork(mm)
    with pytest.raises(PfnError) as several:
        fork(mm, threads=4)
    assert str(one.value) == str(several.value)
    assert_same(mm, before, LATEST)


def test_every_allocation_that_fails():
    memory = Workload(size=6 << 20, folio=(65536,)).build()
    for fail_at in range(6):
        mm, other = copy_state(memory), copy_state(memory)
        for one, threads in ((mm, 3), (other, 1)):
            with pytest.raises(ForkError):
                fork(one, fail_at=fail_at, threads=threads)
        assert_same(mm, other, LATEST)


def test_few_slots_or_cpus_take_one_thread(monkeypatch, shares):
    mm = Workload(size=8 << 20).build()
    monkeypatch.setattr(batch, "THREAD_SLOTS", 1024)
    fork(copy_state(mm), threads=64)
    assert [len(one) for one in shares] == [2]
    monkeypatch.setattr(batch, "cpus", lambda: 1)
    fork(copy_state(mm), threads=64)
    monkeypatch.setattr(batch, "THREAD_SLOTS", 2049)
    fork(copy_state(mm), threads=64)
    assert len(shares) == 1


@pytest.mark.parametrize("threads", [0, 65, -1, "2", 1.5, None])
def test_number_of_threads(threads):
    with pytest.raises(ArgumentError, match="threads"):
        ForkPlan(Workload(size=2 << 20).build(), threads=threads)


@lane
def test_marks_are_checked(monkeypatch):
    mm = Workload(size=4 << 20).build()
    expected = fork(copy_state(mm)).stats
    words = batch._marks(mm, 1024, 2).shape[1]
    for shape in ((2, words + 1), (2, words - 1), (65, words), (2, 0)):
        with monkeypatch.context() as patch:
            patch.setattr(batch, "_marks", lambda *_, shape=shape: np.zeros(shape, dtype=np.uint64))
            assert fork(copy_state(mm), threads=2).stats == expected  # without threads
    check = batch.check_range
    for column, value in ((0, (1 << 64) - 1), (0, 0), (0, 700), (1, 5)):  # what they say is not believed blindly

        def lie(*args, column=column, value=value, **kwargs):
            found = check(*args, **kwargs)
            for marks in found.values():
                marks[:, column] = value
            return found

        with monkeypatch.context() as patch:
            patch.setattr(batch, "check_range", lie)
            assert fork(copy_state(mm), threads=2).stats.ptes_present == 1024
    # Of another extent they are not used at all: as far as these go, the batch of a folio would be cut.
    mm = Workload(size=4 << 20, folio=(65536,)).build()

    def elsewhere(*args, **kwargs):
        found = check(*args, **kwargs)
        for marks in found.values():
            marks[:, :2] = 100, int(marks[0, 1]) + 64
        return found

    with monkeypatch.context() as patch:
        patch.setattr(batch, "check_range", elsewhere)
        assert fork(copy_state(mm), threads=2).stats == fork(copy_state(mm)).stats
    plan = ForkPlan(mm)
    good = np.zeros((2, words), dtype=np.uint64)
    for marks in (np.zeros(3), [[1], [2, 3]], good.astype(np.int64), good[:, ::2], good[0], "no", 0):
        with pytest.raises(ArgumentError, match="marks"):
            batch.copy_page_range(replace(plan.contexts[0], marks=marks), plan.child, mm, new_stats(L))


@lane
def test_pages_that_come_in_between():
    """The memmap grows after the read-only pass: marks are of the smaller one, and are not used."""
    mm = Workload(size=8 << 20, vmas=2).build()
    first, nr, _ = mm.folios.extent()
    other = copy_state(mm)

    def grow(*_):
        if first + nr not in mm.folios:
            mm.folios.add_folios(first + nr + np.arange(64), 0)

    assert ForkPlan(mm, threads=2).run(grow) == fork(other).stats


def test_on_the_command_line():
    texts = [
        CliRunner().invoke(cli.app, ["fork", "--workload", "size=8MiB", "--threads", str(threads), "--json"])
        for threads in (1, 3)
    ]
    assert texts[0].exit_code == 0
    assert texts[0].stdout == texts[1].stdout
    assert CliRunner().invoke(cli.app, ["fork", "--workload", "size=8MiB", "--threads", "65"]).exit_code == 2
