"""One call of each primitive on one page table."""

from __future__ import annotations

import numpy as np
import pytest

from ptebatch import arch, batch, bench
from ptebatch.fork import ForkPlan
from ptebatch.mm import STAT_FIELDS, new_stats
from ptebatch.semantics import LATEST
from ptebatch.workload import make

LAYOUT = arch.X86_64
ORDERS = range(10)
CALLS = 200
pytestmark = pytest.mark.parametrize("order", ORDERS, ids=lambda order: f"order-{order}")


@pytest.fixture
def table(order: int):
    """An address space of one table, in folios of one order."""
    return make(size="2MiB", folio=4096 << order)


def case(name: str, ptes: int, reset, run, check) -> bench.Case:
    return bench.Case({"source": "core", "path": "batched", "operation": name}, ptes, reset, run, check)


def test_folio_pte_batch(run, table, order):
    if not order:
        pytest.skip("folio_pte_batch() is for large folios")
    entries = table.entries[0]
    nr = 1 << order

    def call():
        return batch.folio_pte_batch(entries, 0, 512, layout=LAYOUT, folios=table.folios, semantics=LATEST, flags=0)

    def check(result) -> None:
        assert result.nr == nr

    run(case("folio_pte_batch", nr, lambda: None, call, check), CALLS)


def test_wrprotect_ptes(run, table, order):
    entries, saved = table.entries[0], table.entries[0].copy()
    nr = 1 << order

    def check(_) -> None:
        assert entries.tolist() == [arch.pte_wrprotect(LAYOUT, v) for v in saved[:nr].tolist()] + saved[nr:].tolist()

    run(
        case(
            "wrprotect_ptes",
            nr,
            lambda: entries.__setitem__(..., saved),
            lambda: batch.wrprotect_ptes(entries, 0, nr, layout=LAYOUT),
            check,
        ),
        CALLS,
    )


def test_set_ptes(run, table, order):
    entries, pte = np.zeros(512, dtype=np.uint64), int(table.entries[0, 0])
    nr = 1 << order

    def check(_) -> None:
        assert entries[:nr].tolist() == [arch.pte_advance_pfn(LAYOUT, pte, k) for k in range(nr)]
        assert not entries[nr:].any()

    def call():
        batch.set_ptes(entries, 0, pte, nr, layout=LAYOUT)

    run(case("set_ptes", nr, lambda: entries.fill(0), call, check), CALLS)


@pytest.mark.parametrize("whole", [False, True], ids=["copy_present_ptes", "copy_pte_range"])
def test_copy(run, table, order, whole, path):
    """The first batch, or all of the table."""
    plan = ForkPlan(table, semantics=LATEST, batching=path == "batched", keep=True)
    (ctx,) = plan.contexts
    src, dst, rss = table.entries[0], plan.child.entries[0], plan.child.rss
    stats = new_stats(LAYOUT)
    nr = 1 << order if path == "batched" else 1

    def reset() -> None:
        plan.reset()
        stats.fill(0)

    def call():
        if whole:
            return batch.copy_pte_range(ctx, dst, src, 0, 512, rss, stats)
        return batch.copy_present_ptes(ctx, dst, src, 0, 512 if path == "batched" else 1, rss, [], stats)

    def check(result) -> None:
        assert result == (0 if whole else nr)
        copied = 512 if whole else nr
        assert stats[STAT_FIELDS.index("ptes_present")] == np.count_nonzero(dst) == rss.sum() == copied
        assert not (dst & np.uint64(LAYOUT.write | LAYOUT.young)).any()

    run(
        bench.Case(
            {"source": "core", "path": path, "operation": "copy_pte_range" if whole else "copy_present_ptes"},
            512 if whole else nr, reset, call, check,
        ),
        CALLS,
    )  # fmt: skip
