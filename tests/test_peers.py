"""What others would use does the same work: entries, mapcounts, anon-exclusive flags and refcounts as the core's."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest

from ptebatch import peers
from ptebatch.errors import ArgumentError, StateError
from ptebatch.fork import ForkPlan
from ptebatch.semantics import get
from ptebatch.workload import make

MEMORY = {
    "4KiB": {"size": "4MiB"},
    "64KiB": {"size": "4MiB", "folio": "64KiB"},
    "2MiB": {"size": "4MiB", "folio": "2MiB"},
    "mixed": {"size": "8MiB", "folio": "4KiB+16KiB+64KiB+2MiB", "seed": 3},
    "cut by table ends": {"size": "4MiB", "folio": "64KiB", "align": "shifted"},
    "fragmented": {"size": "2MiB", "folio": "32KiB", "fragmentation": 0.5, "seed": 5},
    "one page": {"size": "4KiB"},
}


@pytest.fixture(params=peers.PEERS, ids=lambda peer: f"{peer.source}-{peer.path}")
def peer(request) -> peers.Peer:
    if importlib.util.find_spec(request.param.needs) is None:
        pytest.skip(f"{request.param.needs} is not installed")
    return request.param


def forked(memory: dict, impl: str = "core") -> tuple[peers.Flat, peers.Flat]:
    """The memory as a Flat before and after a fork."""
    mm = make(**memory)
    before = peers.flatten(mm)
    plan = ForkPlan(mm, impl=impl)
    plan.run()
    return before, peers.flatten(mm, plan.child)


@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
def test_a_peer_leaves_what_the_core_leaves(peer, memory):
    before, after = forked(memory)
    state = peer.fresh(before)
    for _ in range(2):  # the second time after a reset
        peer.run(state)
        assert peer.result(state, before) == after
        peer.reset(state, before)
    assert peer.result(state, before) == before
    assert before != after


@pytest.mark.parametrize("memory", [MEMORY["mixed"], MEMORY["fragmented"]])
def test_core_and_reference_look_the_same_to_peers(memory):
    assert forked(memory) == forked(memory, "reference")


def test_batches_are_respected():
    """A gap in the PFNs, a folio's end and a table's end all end a batch, and references go to the right folio."""
    before, after = forked({"size": "4MiB", "folio": "4KiB+64KiB", "align": "shifted", "pfns": "sequential"})
    assert len(np.unique(after.refcount)) == 2  # 2 and 32
    for peer in peers.available():
        state = peer.fresh(before)
        peer.run(state)
        assert peer.result(state, before) == after


@pytest.mark.parametrize("name", ["src", "dst", "refcount", "mapcount", "exclusive", "folio_of", "folio_end", "base"])
def test_a_difference_is_seen(name):
    before, _ = forked(MEMORY["64KiB"])
    other = before.copy()
    assert other == before
    value = getattr(other, name)
    changed = value + 1 if isinstance(value, int) else value.copy()
    if not isinstance(value, int):
        changed[-1] ^= 1
    assert dataclasses.replace(other, **{name: changed}) != before


def test_flatten_counts_from_the_lowest_pfn():
    flat = peers.flatten(make(size="64KiB", folio="64KiB"))
    assert (len(flat.src), len(flat.folio_of), len(flat.refcount)) == (16, 16, 1)
    assert flat.refcount[0] == 16
    assert flat.folio_end[0] == 16
    assert (flat.mapcount == 1).all() and (flat.exclusive == 1).all()
    assert not flat.dst.any()


def test_flatten_of_a_part():
    mm = make(size="4MiB", folio="64KiB")
    start = mm.vmas[0].start
    flat = peers.flatten(peers.part(mm, start + 4096, start + (1 << 20)))
    assert len(flat.src) == 255
    assert flat.src[0] == mm.pte(start + 4096)


@pytest.mark.parametrize(
    "keys",
    [*({name: 0.1} for name in ("holes", "readonly", "clean", "old", "uffd_wp")), {"vma": "file"}, {"vma": "shmem"}],
    ids=str,
)
def test_what_is_not_plain_is_refused(keys):
    with pytest.raises(StateError):
        peers.flatten(make(size="1MiB", **keys))


def test_more_that_is_refused():
    mm = make(size="1MiB")
    start, end = mm.vmas[0].start, mm.vmas[0].end
    for area in ((start, end + 4096), (start, start), (start - 4096, end), (end, end + 4096)):
        with pytest.raises(StateError, match="not within one VMA"):
            peers.part(mm, *area)
    entries = mm.entries.reshape(-1)
    entries[1] = entries[0]
    with pytest.raises(StateError, match="twice"):
        peers.flatten(mm)
    mm.vmas = []
    with pytest.raises(StateError, match="no memory"):
        peers.flatten(mm)


@pytest.mark.parametrize("copy", [peers.copy_c_single, peers.copy_c_batched])
def test_c_does_not_follow_an_entry_out_of_the_memmap(copy):
    flat = peers.flatten(make(size="1MiB", folio="64KiB"))
    flat.src[20] += np.uint64(1 << 40)
    with pytest.raises(ArgumentError, match="entry 20"):
        copy(flat)
    flat.src[20] = 0
    with pytest.raises(ArgumentError, match="entry 20"):
        copy(flat)


@pytest.mark.parametrize("kernel", ["v6.9", "v6.10", "v6.18"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("memory", [name for name in MEMORY if name != "fragmented"])
def test_the_kernel_s_layout_leaves_what_the_core_leaves(kernel, batched, memory):
    """Entries and counts of every page, and the counters a kernel version keeps in a folio's second page."""
    semantics = get(kernel)
    mm = make(**MEMORY[memory])
    before = peers.flatten(mm)
    peer = peers.kernel_layout(semantics, batched=batched)
    state = peer.fresh(before)
    peer.run(state)
    plan = ForkPlan(mm, semantics=semantics, batching=batched)
    plan.run()
    assert peer.result(state, before) == peers.flatten(mm, plan.child)
    for head in mm.folios.heads().tolist():
        folio = mm.folios.folio(head)
        if not folio.order:
            continue
        second = state.pages[head - before.base + 1]
        assert second["large_mapcount"] == (folio.large_mapcount if semantics.large_mapcount else folio.nr_pages)
        if semantics.mm_id:
            ids = int(second["mm_ids"])
            mask = (1 << peers.MM_ID_BITS) - 1
            assert (ids & mask, ids >> peers.MM_ID_BITS & mask) == (peers.PARENT_ID, peers.CHILD_ID)
            assert list(second["mm_id_mapcount"]) == [count for _, count in folio.mm_ids]
            assert bool(ids & peers.MM_ID_SHARED) == folio.maybe_mapped_shared
            assert not ids >> 63
    peer.reset(state, before)
    assert peer.result(state, before) == before


def test_the_kernel_s_layout_needs_whole_folios_and_known_pages():
    mm = make(size="1MiB", folio="64KiB")
    start = mm.vmas[0].start
    with pytest.raises(StateError, match="part of a folio"):
        peers.kernel_pages(peers.flatten(peers.part(mm, start, start + 3 * 4096)))
    peer = peers.kernel_layout(get("v6.9"), batched=True)
    state = peer.fresh(peers.flatten(mm))
    assert state.pages.ctypes.data % 64 == 0 and state.pages.itemsize == 64
    state.src[20] += np.uint64(1 << 40)
    with pytest.raises(ArgumentError, match="entry 20"):
        peer.run(state)


def test_the_naive_loop_is_always_there():
    assert peers.available()[0] is peers.NAIVE
    assert {peer.source for peer in peers.available()} >= {"naive", "numpy", "c"}
