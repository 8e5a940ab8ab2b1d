"""Fork by several threads leaves what one thread leaves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import build, cases, kernels
from test_differential import BATCHING, assert_same, attempt
from test_simd import EXAMPLES, RUNS, WORKLOADS, level, memory  # noqa: F401
from typer.testing import CliRunner

from ptebatch import batch, cli
from ptebatch.arch import VM_WRITE, mk_pte, vm_get_page_prot
from ptebatch.arch import X86_64 as L
from ptebatch.errors import ArgumentError, ForkError, PfnError
from ptebatch.folio import FolioTable
from ptebatch.fork import ForkPlan, ForkResult, fork
from ptebatch.mm import Mm, Vma, copy_state, digest
from ptebatch.semantics import LATEST
from ptebatch.workload import Workload

VM_ALL = VM_WRITE | 0x71  # private, readable


@pytest.fixture(autouse=True)
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are used however few slots and CPUs there are."""
    monkeypatch.setattr(batch, "THREAD_SLOTS", 1)
    monkeypatch.setattr(batch, "_cpus", lambda: 64)


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


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases(), kernels(), BATCHING, st.integers(2, 4))
def test_any_memory(case, semantics, batching, threads):
    mm, other = build(case), build(case)
    for _ in range(2):
        expected, got = attempt(other, "core", semantics, batching), attempt(mm, "core", semantics, batching, threads)
        if not isinstance(expected, ForkResult) or not isinstance(got, ForkResult):
            assert got == expected
            return
        assert_equal(mm, got, other, expected, semantics)


def test_threads_share_a_vma(shares):
    fork(Workload(size=12 << 20, folio=(65536,)).build(), threads=3)
    assert shares == [[1024, 2048, 3072]]


def test_what_the_lane_does_not_know_is_left_to_one_thread(shares):
    mm = Workload(size=12 << 20, folio=(65536,)).build()
    mm.entries[3, 100] = np.uint64(L.special | L.present_mask)
    other = copy_state(mm)
    got = fork(mm, threads=3)
    assert shares == [[1024, 1536, 2048]]  # the third has none
    assert_equal(mm, got, other, fork(other), LATEST)


def test_a_page_mapped_by_tables_of_two_threads(shares):
    mm = Workload(size=8 << 20, folio=(4096,)).build()
    mm.entries[3, 7] = mm.entries[0, 5]
    other = copy_state(mm)
    got = fork(mm, threads=2)
    assert shares == [[0, 1024]]  # none of them has any slots
    assert_equal(mm, got, other, fork(other), LATEST)


@pytest.mark.parametrize("nr", [8, 512], ids=["in part", "every folio"])
def test_folios_shared_between_tables(level, shares, nr):  # noqa: F811
    """Each folio's pages are mapped by tables of two threads, half of them by each: what is left for later is long."""
    folios, start, head = FolioTable(), 1 << 30, 4096
    vpns = np.arange(8) * 512 + (start >> 12)
    mm = Mm(L, folios, vmas=[Vma(start, start + (8 << 21), VM_ALL, anon_vma=True)], vpns=vpns)
    prot = vm_get_page_prot(L, VM_ALL) | L.write
    for number in range(1024):
        for half in (0, 1):
            shared = number % 512 < nr
            if not (shared and half):
                mapped = [1] * 4 if shared else [1, 1, 0, 0]
                folios.add(head, 2, refcount=sum(mapped), mapcount=mapped, anon_exclusive=[n > 0 for n in mapped])
                head += 4
            first = head - 4 + 2 * (shared and half)
            for slot, pfn in enumerate((first, first + 1), 2 * number):
                mm.entries[4 * half + slot // 512, slot % 512] = np.uint64(mk_pte(L, pfn, prot))
    other = copy_state(mm)
    got = fork(mm, threads=2)
    assert shares == [[2048, 4096]] or level == "off"
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


def test_every_allocation_that_fails(shares):
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
    monkeypatch.setattr(batch, "_cpus", lambda: 1)
    fork(copy_state(mm), threads=64)
    monkeypatch.setattr(batch, "THREAD_SLOTS", 2049)
    fork(copy_state(mm), threads=64)
    assert len(shares) == 1


@pytest.mark.parametrize("threads", [0, 65, -1, "2", 1.5, None])
def test_number_of_threads(threads):
    with pytest.raises(ArgumentError, match="threads"):
        ForkPlan(Workload(size=2 << 20).build(), threads=threads)


def test_marks_are_checked(monkeypatch):
    mm = Workload(size=4 << 20).build()
    words = 1 + (mm.folios.extent()[1] + 63) // 64
    for shape in ((2, words + 1), (2, words - 1), (65, words)):
        monkeypatch.setattr(batch, "_marks", lambda *_, shape=shape: np.zeros(shape, dtype=np.uint64))
        with pytest.raises(ValueError, match="marks"):
            fork(copy_state(mm), threads=2)
    # What they say of slots is not believed beyond what a thread has.
    plan = ForkPlan(mm, threads=2)
    check = batch.check_range

    def lie(*args, **kwargs):
        found = check(*args, **kwargs)
        for marks in found.values():
            marks[:, 0] = (1 << 64) - 1
        return found

    monkeypatch.setattr(batch, "_marks", lambda *_: np.zeros((2, words), dtype=np.uint64))
    monkeypatch.setattr(batch, "check_range", lie)
    assert plan.run().ptes_present == 1024


def test_on_the_command_line():
    texts = [
        CliRunner().invoke(cli.app, ["fork", "--workload", "size=8MiB", "--threads", str(threads), "--json"])
        for threads in (1, 3)
    ]
    assert texts[0].exit_code == 0
    assert texts[0].stdout == texts[1].stdout
    assert CliRunner().invoke(cli.app, ["fork", "--workload", "size=8MiB", "--threads", "65"]).exit_code == 2
