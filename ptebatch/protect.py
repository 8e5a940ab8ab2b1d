"""Write-protect batching over a range: ``wrprotect_ptes`` entry by entry, or batch by batch.

What fork does to the parent of a COW mapping, on its own: useful for pricing write-tracking schemes (uffd-wp,
dirty logging, copy-on-write snapshots) on a given layout of folios.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ptebatch.impls import resolve_batching, resolve_impl
from ptebatch.mm import STAT_FIELDS, Mm, WalkStats, new_stats
from ptebatch.semantics import LATEST, KernelSemantics


@dataclass(frozen=True, eq=False)
class WrprotectStats(WalkStats):
    """Counts of one :func:`wrprotect_range`.

    Attributes
    ----------
    ptes_none, ptes_present : int
        Entries without a page table entry in them; present entries visited.
    ptes_single, ptes_batched, batches : int
        Present entries visited alone, in batches of two or more, and the number of visits.
    ptep_get : int
        Entries read.
    wrprotect_ptes, ptes_wrprotected : int
        Calls, and entries covered. Entries and batches without a writable entry need none.
    contpte_reads, contpte_folds, contpte_unfolds : int
        As in `ptebatch.fork.ForkStats`.
    batch_hist : numpy.ndarray
        int64[ptrs_per_pte + 1]: visits by nr.
    """

    ptes_none: int
    ptes_present: int
    ptes_single: int
    ptes_batched: int
    batches: int
    ptep_get: int
    wrprotect_ptes: int
    ptes_wrprotected: int
    contpte_reads: int
    contpte_folds: int
    contpte_unfolds: int
    batch_hist: npt.NDArray[np.int64]


def wrprotect_range(
    mm: Mm,
    start: int,
    end: int,
    *,
    semantics: KernelSemantics = LATEST,
    batching: bool | None = None,
    impl: str = "core",
) -> WrprotectStats:
    """Write-protect every present entry of ``start..end``; the final entries do not depend on `batching`.

    Parameters
    ----------
    mm : Mm
        Its entries are written.
    start, end : int
        Byte addresses, multiples of the page size.
    semantics : KernelSemantics
        The kernel version to be exact for.
    batching : bool, optional
        None follows the semantics; False goes entry by entry.
    impl : {"core", "reference"}

    Returns
    -------
    WrprotectStats

    Raises
    ------
    ArgumentError
        An address that is not a multiple of the page size, or start > end.
    SemanticsError
        ``batching=True`` under an unbatched preset.
    """
    stats = new_stats(mm.layout)
    resolve_impl(impl).wrprotect_range(
        mm, start, end, semantics=semantics, batching=resolve_batching(semantics, batching), stats=stats
    )
    n = len(STAT_FIELDS)
    counters = {name: int(stats[i]) for i, name in enumerate(STAT_FIELDS) if name in WrprotectStats.__annotations__}
    return WrprotectStats(**counters, batch_hist=stats[n:].copy())
