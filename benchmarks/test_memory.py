"""Whole address spaces: fork, write-protection, unmapping, peers, the streaming limit, why batches end, capture."""

from __future__ import annotations

import numpy as np
import pytest

from ptebatch import bench, peers
from ptebatch.capture import capture
from ptebatch.explain import explain_batches
from ptebatch.fork import ForkPlan
from ptebatch.mm import pte_pfns
from ptebatch.protect import wrprotect_range
from ptebatch.semantics import LATEST
from ptebatch.zap import zap_range


def batching(path: str) -> bool:
    return path == "batched"


def test_fork(run, memory, path):
    run(bench.core_case(ForkPlan(memory, semantics=LATEST, batching=batching(path), keep=True)))


def test_wrprotect_range(run, memory, path):
    saved = memory.entries.copy()
    present, _ = pte_pfns(memory.layout, saved)
    batches = explain_batches(memory, semantics=LATEST).total.batches

    def check(stats) -> None:
        assert stats.ptes_present == np.count_nonzero(present)
        assert stats.batches == (batches if path == "batched" else stats.ptes_present)
        assert not (memory.entries[present] & np.uint64(memory.layout.write)).any()

    run(
        bench.Case(
            {"source": "core", "path": path, "operation": "wrprotect_range"},
            int(np.count_nonzero(present)),
            lambda: memory.entries.__setitem__(..., saved),
            lambda: wrprotect_range(memory, 0, 1 << 47, semantics=LATEST, batching=batching(path)),
            check,
        )
    )


def test_zap_range(run, memory, path):
    entries, folios, rss = memory.entries.copy(), memory.folios.copy(), memory.rss.copy()

    def reset() -> None:
        memory.entries[...], memory.rss[...] = entries, rss
        memory.folios.assign(folios)

    def check(stats) -> None:
        assert not memory.entries.any() and not memory.rss.any()
        assert stats.ptes_present == rss.sum()

    row = {"source": "core", "path": path, "operation": "zap_range"}
    start, end = memory.vmas[0].start, memory.vmas[-1].end
    run(
        bench.Case(
            row,
            int(rss.sum()),
            reset,
            lambda: zap_range(memory, start, end, semantics=LATEST, batching=batching(path)),
            check,
        )
    )


def test_explain(run, memory):
    plan = ForkPlan(memory, semantics=LATEST, keep=True)
    batches = plan.run().batches
    plan.reset()

    def check(explained) -> None:
        assert explained.total.batches == batches

    row = {"source": "core", "path": "batched", "operation": "explain"}
    ptes = int(memory.rss.sum())
    run(bench.Case(row, ptes, lambda: None, lambda: explain_batches(memory, semantics=LATEST), check))


@pytest.mark.parametrize("peer", peers.available(), ids=lambda peer: f"{peer.source}-{peer.path}")
def test_peer(run, memory, peer):
    (case,) = bench.peer_cases([peer], memory, LATEST)
    run(case)


@pytest.mark.parametrize("batched", [False, True], ids=["single", "batched"])
def test_kernel_layout(run, memory, batched):
    (case,) = bench.peer_cases([peers.kernel_layout(LATEST, batched=batched)], memory, LATEST)
    run(case)


@pytest.mark.parametrize("variant", range(3), ids=["plain", "prefetch", "non-temporal"])
def test_limit(run, memory, variant):
    """At the level that PTEBATCH_SIMD asks for, or the best there is."""
    run(bench.limit_cases(memory.entries.reshape(-1), memory.layout)[variant])


def test_pool(run, memory):
    plan = ForkPlan(memory, semantics=LATEST)
    run(bench.pool_case(plan, int(memory.rss.sum())))


def test_capture(run):
    def check(seen) -> None:
        assert seen.mm.rss.sum() > 1000

    ptes = int(capture("self", swap="drop").mm.rss.sum())
    row = {"source": "core", "path": "batched", "operation": "capture"}
    run(bench.Case(row, ptes, lambda: None, lambda: capture("self", swap="drop"), check))
