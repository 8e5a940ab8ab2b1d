"""The core against the reference: everything a fork leaves behind, exceptions included."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import PRIVATE, Case, FolioSpec, Run, VmaSpec, build, cases, kernels

from ptebatch.errors import PtebatchError
from ptebatch.folio import FolioTable
from ptebatch.fork import ForkResult, fork
from ptebatch.mm import Mm, copy_state, digest
from ptebatch.protect import wrprotect_range
from ptebatch.semantics import V6_8

EXAMPLES = {"small": 300, "ci": 20_000}.get(os.environ.get("HYPOTHESIS_PROFILE", "default"), 2_000)
PARTS = max(1, EXAMPLES // 1_000)  # so that processes can share the work
BATCHING = st.sampled_from((None, False))


def state(mm: Mm, semantics) -> tuple:
    """What promise 1 names, as comparable values; the digest last, so that a difference shows where it is."""
    return (
        mm.entries.tolist(),
        mm.vpns.tolist(),
        mm.rss.tolist(),
        mm.pmd_vpns.tolist(),
        mm.pmd_entries.tolist(),
        mm.huge_zero,
        mm.hugetlb_usage,
        [(v.start, v.end, v.vm_flags, v.anon_vma) for v in mm.vmas],
        mm.has_pinned,
    )


def attempt(mm: Mm, impl: str, semantics, batching) -> ForkResult | tuple[type, str]:
    try:
        return fork(mm, semantics=semantics, batching=batching, impl=impl)
    except PtebatchError as error:
        return type(error), str(error)


def stored(folios: FolioTable) -> tuple[list[int], list[int]]:
    """The arrays themselves: where MM-ID slots lie is the same whoever wrote them."""
    index = folios.lookup(folios.pages_table()["pfn"])
    return folios._words[index].tolist(), folios._aux[index].tolist()


def assert_same(a: Mm, b: Mm, semantics) -> None:
    assert state(a, semantics) == state(b, semantics)
    assert a.folios == b.folios
    assert stored(a.folios) == stored(b.folios)
    assert digest([a], a.folios, semantics) == digest([b], b.folios, semantics)


def check_fork(case: Case, semantics, batching) -> None:
    core = build(case)
    ref = copy_state(core)
    for _ in range(2):  # the second fork sees what the first one left
        one, two = attempt(core, "core", semantics, batching), attempt(ref, "reference", semantics, batching)
        assert_same(core, ref, semantics)
        if isinstance(two, tuple):
            assert one == two
            return
        assert isinstance(one, ForkResult), one
        assert one.stats.to_dict() == two.stats.to_dict()
        assert_same(one.child, two.child, semantics)
    grand_one = attempt(one.child, "core", semantics, batching)
    grand_two = attempt(two.child, "reference", semantics, batching)
    assert isinstance(grand_one, tuple) == isinstance(grand_two, tuple)
    if isinstance(grand_two, ForkResult):
        assert grand_one.stats.to_dict() == grand_two.stats.to_dict()
        assert_same(grand_one.child, grand_two.child, semantics)
    else:
        assert grand_one == grand_two
    assert_same(core, ref, semantics)


@pytest.mark.parametrize("part", range(PARTS))
@settings(max_examples=EXAMPLES // PARTS)
@given(cases(), kernels(), BATCHING)
def test_fork(part, case, semantics, batching):
    check_fork(case, semantics, batching)


def canonical(mm: Mm) -> np.ndarray:
    layout, entries = mm.layout, mm.entries
    odd = (entries & np.uint64(layout.write | layout.dirty)) == layout.dirty
    odd &= (entries & np.uint64(layout.present_mask)) != 0
    return np.where(odd, entries & ~np.uint64(layout.dirty) | np.uint64(layout.saved_dirty), entries)


def check_wrprotect_range(case: Case, semantics, batching, first: int, nr: int) -> None:
    core = build(case)
    ref, other = copy_state(core), copy_state(core)
    start = core.vmas[0].start + (first << 12)
    end = start + (nr << 12)
    one = wrprotect_range(core, start, end, semantics=semantics, batching=batching, impl="core")
    two = wrprotect_range(ref, start, end, semantics=semantics, batching=batching, impl="reference")
    wrprotect_range(other, start, end, semantics=semantics, batching=False)
    assert one.to_dict() == two.to_dict()
    assert_same(core, ref, semantics)
    # Read-only entries with D, which are not canonical, are moved to SavedDirty only as part of a batch.
    assert np.array_equal(canonical(core), canonical(other)), "batching changes the result of write-protecting"


@settings(max_examples=max(100, EXAMPLES // 10))
@given(cases(), kernels(), BATCHING, st.integers(0, 60), st.integers(0, 60))
def test_wrprotect_range(case, semantics, batching, first, nr):
    check_wrprotect_range(case, semantics, batching, first, nr)


@pytest.mark.parametrize("batching", [None, False])
def test_unbatched_preset_never_batches(batching, impl_name):
    case = Case(
        (FolioSpec(4, exclusive=(1 << 16) - 1),), (VmaSpec(3584, 16, PRIVATE, True, False, (Run(0, 0, 16, 2),)),), False
    )
    result = fork(build(case), semantics=V6_8, batching=batching, impl=impl_name)
    assert result.stats.batch_hist[1] == result.stats.batches == 16
