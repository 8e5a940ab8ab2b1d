"""Two kernels on one input: each switch that fork consults has an input on which it matters."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from strategies import build, cases, kernels
from test_cli import run, run_json, wrong

from ptebatch import arch
from ptebatch.diff import diff_forks
from ptebatch.errors import ArgumentError, PtebatchError
from ptebatch.folio import FolioTable
from ptebatch.mm import Mm, Vma, account, copy_state, digest
from ptebatch.semantics import V6_8, V6_9, V6_12, V6_14, V6_17, V6_18, V6_19

L = arch.X86_64
TABLE = L.ptrs_per_pte << L.page_shift
PRIVATE = arch.VM_READ | arch.VM_WRITE | arch.VM_MAYREAD | arch.VM_MAYWRITE | arch.VM_SOFTDIRTY
SHARED = PRIVATE | arch.VM_SHARED | arch.VM_MAYSHARE


def one(*entries: int, vm_flags: int = PRIVATE, folios: FolioTable | None = None, **vma: object) -> Mm:
    mm = Mm.for_vmas(L, folios or FolioTable(), [Vma(TABLE, 2 * TABLE, vm_flags, **vma)])  # type: ignore[arg-type]
    mm.fill(TABLE, np.array(entries, dtype=np.uint64))
    return mm


def small(order: int = 0, nr: int = 1, vm_flags: int = PRIVATE, **folio: object) -> Mm:
    """A folio of that order at PFN 0x100, its first pages mapped writable, young and dirty."""
    folios = FolioTable()
    folios.add(0x100, order, **folio)  # type: ignore[arg-type]
    mm = one(*((0x100 + k) << 12 | 0x8000000000000067 for k in range(nr)), vm_flags=vm_flags, folios=folios)
    account(mm)
    return mm


def test_guard_markers():
    diff = diff_forks(one(arch.swp_entry(L, 31, 4)), V6_12, V6_12.replace(guard_markers=True))
    assert diff.entries == [{"mm": "child", "address": TABLE, "a": 0, "b": 0xFFFFFFFFFFFFF600}]
    assert not diff.same_state
    assert diff.counters == {}


def test_batching_changes_counters_only():
    diff = diff_forks(small(4, 16), V6_8, V6_9)
    assert diff.same_state
    assert diff.counters["batches"] == [16, 1]
    assert diff.not_compared == []


def test_batching_spreads_write_in_shared_mappings():
    mm = small(2, 4, SHARED, anon=False, swapbacked=True)
    mm.entries[0, 0] &= ~np.uint64(0x42)
    diff = diff_forks(mm, V6_8, V6_9)
    assert [(row["mm"], row["address"], row["a"] ^ row["b"]) for row in diff.entries] == [("child", TABLE, 2)]


def test_counters_that_one_kernel_keeps():
    diff = diff_forks(small(4, 16), V6_9, V6_18)
    assert diff.not_compared == ["folio.large_mapcount", "folio.maybe_mapped_shared"]
    diff = diff_forks(small(4, 16), V6_18, V6_18.replace(no_page_mapcount=True))
    assert diff.not_compared == ["page.mapcount", "page.mapcount of small folios"]


def test_copy_mc():
    mm = small()
    mm.folios.page(0x100).hwpoison = True
    mm.folios.folio(0x100).refcount = 2000
    mm.has_pinned = True
    diff = diff_forks(mm, V6_12.replace(copy_mc=False), V6_12)
    assert diff.outcomes[0] == "child"
    assert "fork failed copying VMA" in diff.outcomes[1]
    assert [row["mm"] for row in diff.entries] == ["child"]
    assert {row["pfn"] for row in diff.pages} == {1}


def test_swap_types():
    entry = arch.swp_entry(L, 26, 0x100)  # writable migration through v6.14, read-exclusive since
    mm = small()
    mm.entries[0, 0] = entry
    diff = diff_forks(mm, V6_14, V6_18)
    assert {(row["mm"], arch.swp_type(L, row["a"]), arch.swp_type(L, row["b"])) for row in diff.entries} == {
        ("parent", 24, 25),
        ("child", 24, 25),
    }
    assert diff_forks(mm, V6_17, V6_18).same_state


def test_vm_maybe_guard():
    guarded = {"vm_flags": SHARED | arch.VM_MAYBE_GUARD, "anon_vma": False, "vm_ops": "shmem"}
    diff = diff_forks(one(arch.swp_entry(L, 31, 4), **guarded), V6_18, V6_19)
    assert [row["mm"] for row in diff.entries] == ["child"]
    assert diff.counters["vmas_copied"] == [0, 1]


def test_swap_slots_and_rss():
    mm = small()
    mm.entries[0, 0] = arch.swp_entry(L, 24, 0x100)  # hwpoison in v6.18
    diff = diff_forks(mm, V6_18, V6_18.replace(memory_failure=False, migration=False, device_private=False))
    assert diff.swap == [{"slot": 24 << 56 | 0x100, "field": "count", "a": 0, "b": 1}]
    assert diff.rss == {"MM_SWAPENTS": [0, 1]}


@settings(max_examples=30)
@given(cases(), kernels())
def test_a_kernel_does_not_differ_from_itself(case, semantics):
    mm = build(case)
    before = digest([mm], mm.folios, semantics)
    try:
        diff = diff_forks(mm, semantics, semantics)
    except PtebatchError:
        return
    assert diff.same_state
    assert (diff.counters, diff.not_compared) == ({}, [])
    assert digest([mm], mm.folios, semantics) == before
    assert diff_forks(copy_state(mm), semantics, semantics, impl="reference").same_state


def test_entries_of_another_kind():
    with pytest.raises(ArgumentError, match="saved_dirty=on"):
        diff_forks(small(), V6_18, V6_18.replace(saved_dirty=False))


WORKLOAD = "size=1MiB,folio=16KiB,guard=0.25,seed=3"


def test_command():
    found = run_json("diff", "--workload", WORKLOAD, "--semantics", "v6.12", "--semantics", "v6.18")
    assert (found["a"], found["b"], found["same_state"]) == ("v6.12", "v6.18", False)
    assert len(found["entries"]) == 64
    text = run("diff", "--workload", WORKLOAD, "--semantics", "v6.12", "--semantics", "v6.18", "--limit", 3).stdout
    assert "64 entries differ" in text
    assert "the first 3 of 64" in text
    assert text.count("0xfffffffffffff600") == 3
    assert json.dumps(found)


def test_command_with_a_switch():
    args = ("diff", "--workload", WORKLOAD, "--semantics", "v6.18", "--set", "guard_markers=off")
    assert run_json(*args)["b"] == "v6.18 guard_markers=off"
    assert len(run_json(*args)["entries"]) == 64
    same = run("diff", "--workload", "size=1MiB", "--semantics", "v6.17", "--semantics", "v6.18").stdout
    assert "the same" in same


def test_wrong_command_lines():
    assert "--semantics" in wrong("diff", "--workload", WORKLOAD)
    assert "--set" in wrong("diff", "--workload", WORKLOAD, "--semantics", "v6.18")
    assert "twice" in wrong("diff", "--workload", WORKLOAD, *("--semantics", "v6.18") * 3)
    assert "v6.99" in wrong("diff", "--workload", WORKLOAD, "--semantics", "v6.99", "--semantics", "v6.18")
