"""The core's fast lane: every SIMD level of this CPU, and the lane off, give what the reference gives."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import PRIVATE, cases, kernels
from test_differential import BATCHING, check_fork, check_wrprotect_range, stored
from test_differential import EXAMPLES as DIFFERENTIAL

from ptebatch import _core, arch, batch
from ptebatch import folio as f
from ptebatch.arch import VM_READ, VM_WRITE, pte_modify, pte_pfn, vm_get_page_prot
from ptebatch.arch import X86_64 as L
from ptebatch.errors import PfnError
from ptebatch.folio import FolioTable
from ptebatch.fork import ForkResult, fork
from ptebatch.mm import Mm, Vma, account, configured, copy_state, digest, new_stats
from ptebatch.protect import wrprotect_range
from ptebatch.semantics import LATEST, V6_6, V6_9, V6_12, KernelSemantics
from ptebatch.workload import Workload
from ptebatch.zap import exit_mmap, munmap

EXAMPLES = max(60, DIFFERENTIAL // 20)


@pytest.fixture(params=_core.SIMD_SUPPORTED)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(batch, "simd_level", _core.SIMD_LEVELS[request.param])
    return request.param


@settings(max_examples=EXAMPLES)
@given(cases(), kernels(), BATCHING)
def test_fork(level, case, semantics, batching):
    check_fork(case, semantics, batching)


@settings(max_examples=EXAMPLES)
@given(cases(), kernels(), BATCHING, st.integers(0, 60), st.integers(0, 60))
def test_wrprotect_range(level, case, semantics, batching, first, nr):
    check_wrprotect_range(case, semantics, batching, first, nr)


WORKLOADS = {
    "small": {"folio": (4096,)},
    "read-only in part": {"folio": (4096, 16384, 65536), "readonly": 0.3, "granularity": "page"},
    "order 1": {"folio": (8192,)},
    "order 3": {"folio": (32768,), "clean": 0.5},
    "large": {"folio": (1 << 21,), "align": "shifted"},
    "cut": {"folio": (65536, 1 << 20), "fragmentation": 0.5, "holes": 0.2},
    "tracked": {"folio": (65536,), "soft_dirty": 0.5, "uffd_wp": 0.5, "granularity": "page"},
    "kinds": {"folio": (4096, 65536), "vma": ("anon", "file", "shmem-guard"), "vmas": 3, "cowed": 0.2},
    "pinned": {"folio": (4096, 65536), "pinned": 0.2},
    "shared": {"folio": (16384,), "shared": 0.5},
}


RUNS = [(V6_6, False), (V6_9, True), (LATEST, True), (LATEST, False)]


@cache
def memory(name: str) -> Mm:
    """Whole tables of every kind of memory, so that every loop of the lane meets full vectors and table ends."""
    mm = Workload(size=6 << 20, **WORKLOADS[name.removesuffix(", PROT_NONE")]).build()
    if name.endswith(", PROT_NONE"):
        for vma in mm.vmas:
            vma.vm_flags &= ~(VM_READ | VM_WRITE)
        flat = mm.entries.reshape(-1)
        for at in np.flatnonzero(flat & np.uint64(L.present_mask)).tolist():
            flat[at] = pte_modify(L, int(flat[at]), vm_get_page_prot(L, mm.vmas[0].vm_flags))
    return mm


@cache
def expected_fork(name: str, semantics: KernelSemantics, batching: bool) -> tuple[Mm, ForkResult]:
    mm = copy_state(memory(name))
    return mm, fork(mm, semantics=semantics, batching=batching, impl="reference")


@cache
def expected_wrprotect(name: str, semantics: KernelSemantics, batching: bool, cut: int) -> tuple[Mm, dict]:
    mm = copy_state(memory(name))
    return mm, wrprotect(mm, semantics, batching, cut, "reference")


def wrprotect(mm: Mm, semantics: KernelSemantics, batching: bool, cut: int, impl: str) -> dict:
    start, end = mm.vmas[0].start + cut * 4096, mm.vmas[-1].end - 3 * cut * 4096
    return wrprotect_range(mm, start, end, semantics=semantics, batching=batching, impl=impl).to_dict()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[0].version} {'batched' if run[1] else 'single'}")
@pytest.mark.parametrize("name", [*WORKLOADS, "order 1, PROT_NONE", "order 3, PROT_NONE", "large, PROT_NONE"])
def test_workload(level, name, run):
    one = copy_state(memory(name))
    two, expected = expected_fork(name, *run)
    got = fork(one, semantics=run[0], batching=run[1])
    assert got.stats.to_dict() == expected.stats.to_dict()
    assert digest([one, got.child], one.folios, run[0]) == digest([two, expected.child], two.folios, run[0])
    assert one.folios == two.folios
    assert stored(one.folios) == stored(two.folios)
    for cut in (0, 13):
        one = copy_state(memory(name))
        two, stats = expected_wrprotect(name, *run, cut)
        assert wrprotect(one, *run, cut, "core") == stats
        assert np.array_equal(one.entries, two.entries)


SMALL_PAGES = sorted({layout.arch for layout in arch.LAYOUTS.values() if layout.page_shift == 12} - {"x86-64"})


@cache
def expected_elsewhere(name: str, memory: str, semantics: KernelSemantics) -> tuple[Mm, Mm, ForkResult]:
    layout = configured(arch.layout_for(name, semantics.switches), semantics)
    mm = Workload(size=4 << 20, **WORKLOADS[memory]).build(layout=layout)
    forked = copy_state(mm)
    return mm, forked, fork(forked, semantics=semantics, impl="reference")


@pytest.mark.parametrize("semantics", [V6_9, LATEST], ids=lambda semantics: semantics.version)
@pytest.mark.parametrize("memory", ["small", "read-only in part", "order 3", "large", "kinds", "shared"])
@pytest.mark.parametrize("name", SMALL_PAGES)
def test_other_architectures(level, name, memory, semantics):
    """The lane is for every layout of 4 KiB pages that is written as it knows; arm64 without contpte is one."""
    semantics = replace(semantics, contpte=False)
    mm, two, expected = expected_elsewhere(name, memory, semantics)
    one = copy_state(mm)
    got = fork(one, semantics=semantics)
    assert got.stats.to_dict() == expected.stats.to_dict()
    assert np.array_equal(one.entries, two.entries)
    assert np.array_equal(got.child.entries, expected.child.entries)
    assert one.folios == two.folios


@pytest.mark.parametrize("where", ["zero", "first", "last", "before the extent", "behind the extent", "far behind"])
def test_hostile_pfn(level, where):
    """A page table may name any PFN: those without a page are refused before anything changes."""
    mm = Workload(size=4 << 20).build()
    first, nr, _ = mm.folios.extent()
    pfn = {"zero": 0, "first": 1, "last": (1 << 40) - 1, "before the extent": first - 1,
           "behind the extent": first + nr, "far behind": first + nr + 4096}[where]  # fmt: skip
    assert pfn not in mm.folios
    for at in (0, 100, 511, 512, 1023):
        other = copy_state(mm)
        other.entries.reshape(-1)[at] = np.uint64(pfn << 12 | 0x67)
        before = copy_state(other)
        with pytest.raises(PfnError, match=f"{pfn:#x}"):
            fork(other)
        assert np.array_equal(other.entries, before.entries)
        assert other.folios == before.folios


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("semantics", [LATEST, V6_12, V6_9], ids=lambda semantics: semantics.version)
def test_neighbours_of_one_size_are_two_folios(level, order, cut, semantics):
    """Behind a whole folio, the end of one folio and the beginning of its neighbour go on in PFN order: two batches."""
    nr, first = 1 << order, 1 << 18
    folios = FolioTable()
    folios.add_folios(first + nr * np.arange(64 // nr + 4), order)
    # Folio 0 whole, folio 3 without its first `cut` pages, as many pages of folio 4, folio 1 whole.
    cut = min(cut, nr - 1)
    pages = np.r_[0:nr, 3 * nr + cut : 4 * nr + cut, nr : 2 * nr]
    start = 0x40000000
    space = Mm.for_vmas(L, folios, [Vma(start, start + len(pages) * 4096, PRIVATE, anon_vma=True)])
    space.fill(start, np.uint64(0x8000000000000067) | (first + pages).astype(np.uint64) << np.uint64(12))
    account(space)
    other = copy_state(space)
    one, two = fork(space, semantics=semantics), fork(other, semantics=semantics, impl="reference")
    lengths = [nr, nr - cut, cut, nr]
    assert one.stats.batch_hist[1:].tolist() == [lengths.count(n + 1) for n in range(L.ptrs_per_pte)]
    assert one.stats == two.stats
    assert np.array_equal(one.child.entries, two.child.entries)
    assert folios == other.folios


@cache
def repeated(order: int) -> Mm:
    """Folios mapped whole and in part, up to eleven times by one mm; their MM-ID slots hold that, or something else."""
    nr, first, start = 1 << order, 1 << 18, 0x40000000
    which, pages = 0, []
    for part in (slice(None), slice(1, None), slice(nr - 1), slice(nr // 2, None)):
        for times in (1, 2, 3, 7, 8, 11):
            for _ in range(4):
                which += 1
                pages += [np.arange(nr)[part] + which * nr] * times
    folios = FolioTable()
    folios.add_folios(first + nr * np.arange(which + 1), order)
    flat = np.concatenate(pages)
    mm = Mm.for_vmas(L, folios, [Vma(start, start + len(flat) * 4096, PRIVATE, anon_vma=True)])
    mm.fill(start, np.uint64(0x8000000000000067) | (first + flat).astype(np.uint64) << np.uint64(12))
    account(mm)
    other = folios.new_mm_id()
    for at in range(1, which + 1):
        folio, taken = folios.folio(first + at * nr), (other, (15, 28, 31, 40)[at // 4 % 4])
        slots = (folio.mm_ids, ((mm.mm_id, 1), (0, 0)), ((0, 0), taken), (taken, (mm.mm_id, 32)))
        folio.set_mm_ids(slots[at % 4])
        folio.locked = at % 3 == 0
    return mm


def forks_and_exits(mm: Mm, semantics: KernelSemantics, batching: bool | None, impl: str) -> list:
    """Two forks, exit of the children and of the parent: what each leaves behind."""
    how = {"semantics": semantics, "batching": batching, "impl": impl}
    states, children = [], []
    for _ in range(2):
        got = fork(mm, **how)
        children.append(got.child)
        states.append((got.stats.to_dict(), mm.entries.tolist(), got.child.entries.tolist(), stored(mm.folios)))
    for space in (*children, mm):
        states.append((exit_mmap(space, **how).to_dict(), stored(mm.folios)))
    return states


@cache
def expected_repeats(order: int, semantics: KernelSemantics, batching: bool | None) -> list:
    return forks_and_exits(copy_state(repeated(order)), semantics, batching, "reference")


@pytest.mark.parametrize("run", [(LATEST, None), (LATEST, False), (V6_12, None)], ids=["batched", "single", "v6.12"])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_counts_that_leave_their_pages(level, order, run):
    """Counts of MM-ID slots pass what fits into a page's word while the child is made, and come back as it exits;
    whoever does the work leaves the same arrays behind."""
    mm = copy_state(repeated(order))
    before = stored(mm.folios)[0]
    states = forks_and_exits(mm, *run, "core")
    expected = expected_repeats(order, *run)
    for got, wanted in zip(states, expected, strict=True):
        for one, two in zip(got, wanted, strict=True):
            assert one == two
    if 2 <= order <= 4 and run[0] is LATEST:
        flag = f.COUNTER_SHIFT + f.COUNTER_BITS - 1
        spilled = [
            sum(word >> flag & 1 for word in words[3 :: 1 << order]) for words in (before, *(s[-1][0] for s in states))
        ]
        assert 0 < spilled[0] < spilled[1] > spilled[3]


def test_extent():
    """The stretch of memory that needs no look at the index."""
    folios = FolioTable()
    assert folios.extent()[1] == 0
    folios.add_folios(np.arange(1 << 18, (1 << 18) + 256), 0)
    assert folios.extent() == (1 << 18, 256, 0)
    folios.add_folios([1 << 20], 9)
    assert folios.extent() == (1 << 20, 512, 256)
    folios.remove(1 << 20)
    assert folios.extent()[:2] == (1 << 18, 256)
    folios.remove((1 << 18) + 70)
    assert folios.extent() == ((1 << 18) + 128, 128, 128)
    assert folios.copy().extent() == folios.extent()


def test_page_removed_after_the_pass(level):
    """A page that goes away between the pass and the walk is an error, not a write to it."""
    mm = Workload(size=2 << 20).build()
    pfn = pte_pfn(L, int(mm.entries[0, 300]))
    stale = mm.folios.extent()
    mm.folios.remove(pfn)
    mm.folios._extent = stale
    with pytest.raises(PfnError, match=f"{pfn:#x}"):
        fork(mm)
    assert pfn not in mm.folios


@pytest.mark.parametrize("asked", [*_core.SIMD_SUPPORTED, "auto"])
def test_environment(asked):
    code = "from ptebatch import batch; print(batch.simd_level)"
    env = os.environ | {"PTEBATCH_SIMD": asked}
    run = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=True)
    name = _core.SIMD_SUPPORTED[-1] if asked == "auto" else asked
    assert int(run.stdout) == _core.SIMD_LEVELS[name]


def test_environment_unknown():
    command = [sys.executable, "-P", "-c", "import ptebatch.batch"]
    env = os.environ | {"PTEBATCH_SIMD": "mmx"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "PTEBATCH_SIMD=mmx: this CPU has off, scalar" in run.stderr


def test_range_is_checked(level):
    """Rows beyond the range are refused before an entry is looked at."""
    mm = Workload(size=4 << 20).build()
    first = int(mm.vpns[0])
    rows = (mm.entries, mm.vpns, 0, 2, first, first + 512)
    layout, memmap, fast = batch._layout_words(mm.layout), batch._memmap(mm.folios), batch._fast(mm.folios)
    with pytest.raises(ValueError, match="rows out of range"):
        _core.py_check_range(*rows, layout, *memmap, False, 0, 0, fast, batch._NO_MARKS)
    with pytest.raises(ValueError, match="rows out of range"):
        _core.py_wrprotect_range(*rows, True, True, layout, *memmap, new_stats(mm.layout), fast)


def test_a_page_freed_by_zap_is_not_in_the_extent(level):
    """An entry that maps a page which unmapping has freed is refused before anything changes."""
    mm = Workload(size=4 << 20).build()
    child = fork(mm).child
    exit_mmap(child)
    stale = int(mm.entries[1, 5])
    munmap(mm, mm.vmas[0].start + (2 << 20), mm.vmas[0].end)
    assert pte_pfn(L, stale) not in mm.folios
    mm.entries[0, 300] = np.uint64(stale)
    before = copy_state(mm)
    with pytest.raises(PfnError):
        fork(mm)
    assert np.array_equal(mm.entries, before.entries)
    assert mm.folios == before.folios


def test_level_is_checked():
    """A level this CPU does not have never reaches an instruction it does not know."""
    mm = Workload(size=2 << 20).build()
    layout, memmap = batch._layout_words(mm.layout), batch._memmap(mm.folios)
    first = int(mm.vpns[0])
    rows = (mm.entries, mm.vpns, 0, 1, first, first + 512)
    for fast in ([9, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0]):
        with pytest.raises(ValueError, match="SIMD level"):
            _core.py_check_range(*rows, layout, *memmap, False, 0, 0, np.array(fast, dtype=np.uint64), batch._NO_MARKS)
    # An extent that is a lie is cut to the storage, and what it says of pages is not believed when they are written.
    lie = np.array([1, 0, 1 << 40, 0, 0, 0], dtype=np.uint64)
    code = _core.py_check_range(*rows, layout, *memmap, False, 0, 0, lie, batch._NO_MARKS)[0]
    assert code in (0, _core.RESULTS["E_NO_PAGE"])


