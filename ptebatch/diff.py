"""Where two sets of rules part: one address space forked under each of two semantics, and what differs afterwards.

`diff_forks` forks copies; the address space given to it stays as it is. What one of the kernels does not keep (the
large mapcount before v6.10, MM-ID slots before v6.15, page mapcounts without CONFIG_PAGE_MAPCOUNT) is not compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ptebatch import arch
from ptebatch import folio as f
from ptebatch.errors import ArgumentError, ForkError
from ptebatch.fork import fork
from ptebatch.mm import Mm, copy_state
from ptebatch.semantics import KernelSemantics

__all__ = ["ForkDiff", "diff_forks"]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Columns = dict[str, tuple[I64, npt.NDArray[Any]]]

RSS_NAMES = ("MM_FILEPAGES", "MM_ANONPAGES", "MM_SWAPENTS", "MM_SHMEMPAGES")


@dataclass(frozen=True)
class ForkDiff:
    """What `diff_forks` returns; empty lists where nothing differs.

    Attributes
    ----------
    a, b : KernelSemantics
    outcomes : tuple of str
        ``child``, or why the fork failed, under each.
    entries : list of dict
        ``mm`` (parent or child), ``address``, and the entries ``a`` and ``b``; 0 where there is none.
    pages, folios, swap : list of dict
        ``pfn`` (or ``slot``: swap type and offset), ``field``, ``a``, ``b``; None where one has no such page.
    counters, rss : dict of str to list
        Name -> [a, b]: counters of `ptebatch.fork.ForkStats`, and what the child's rss holds.
    not_compared : list of str
        Fields that only one of the kernels keeps.
    """

    a: KernelSemantics
    b: KernelSemantics
    outcomes: tuple[str, str]
    entries: list[dict[str, Any]] = field(default_factory=list)
    pages: list[dict[str, Any]] = field(default_factory=list)
    folios: list[dict[str, Any]] = field(default_factory=list)
    swap: list[dict[str, Any]] = field(default_factory=list)
    counters: dict[str, list[int]] = field(default_factory=dict)
    rss: dict[str, list[int]] = field(default_factory=dict)
    not_compared: list[str] = field(default_factory=list)

    @property
    def same_state(self) -> bool:
        """Nothing but counters of work differs."""
        state = (self.entries, self.pages, self.folios, self.swap, self.rss)
        return self.outcomes[0] == self.outcomes[1] and not any(state)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        names = ("outcomes", "entries", "pages", "folios", "swap", "counters", "rss", "not_compared")
        return {
            "a": self.a.label,
            "b": self.b.label,
            "same_state": self.same_state,
            **{name: getattr(self, name) for name in names},
        }


def diff_forks(
    mm: Mm, a: KernelSemantics, b: KernelSemantics, *, batching: bool | None = None, impl: str = "core"
) -> ForkDiff:
    """Fork copies of an address space under two semantics and compare what is left.

    Parameters
    ----------
    mm : Mm
        Unchanged.
    a, b : KernelSemantics
        Both must read its entries in the same way (`ptebatch.arch.unmet`).
    batching, impl
        As in `ptebatch.fork.fork`; ``batching=None`` follows each semantics.

    Returns
    -------
    ForkDiff

    Raises
    ------
    ArgumentError
        Semantics for entries of another kind than the address space has.
    PfnError, UnsupportedEntryError, StateError
        As `ptebatch.fork.fork`.
    """
    need = sorted({*arch.unmet(mm.layout, a.switches), *arch.unmet(mm.layout, b.switches)})
    if need:
        raise ArgumentError(f"{mm.layout.name} entries need {', '.join(need)} in both kernels")
    outcomes: list[str] = []
    states: list[tuple[Mm, Mm | None, dict[str, Any]]] = []
    for semantics in (a, b):
        parent = copy_state(mm)
        try:
            result = fork(parent, semantics=semantics, batching=batching, impl=impl)
        except ForkError as error:
            outcomes.append(str(error))
            states.append((parent, None, {}))
        else:
            outcomes.append("child")
            states.append((parent, result.child, result.stats.to_dict()))
    (mm_a, child_a, stats_a), (mm_b, child_b, stats_b) = states
    diff = ForkDiff(a, b, (outcomes[0], outcomes[1]))
    for name, one, two in (("parent", mm_a, mm_b), ("child", child_a, child_b)):
        for vpn, x, y in _differing(_entries(one), _entries(two)):
            diff.entries.append({"mm": name, "address": vpn << mm.layout.page_shift, "a": x or 0, "b": y or 0})
    left, right = _memmap(mm_a, a), _memmap(mm_b, b)
    diff.not_compared.extend(sorted(left.keys() ^ right.keys()))
    for name in left.keys() & right.keys():
        kind, _, what = name.partition(".")
        rows = diff.pages if kind == "page" else diff.folios
        rows.extend({"pfn": pfn, "field": what, "a": x, "b": y} for pfn, x, y in _differing(left[name], right[name]))
    for rows in (diff.pages, diff.folios):
        rows.sort(key=lambda row: (row["pfn"], row["field"]))
    slots = _differing(_swap(mm_a), _swap(mm_b))
    diff.swap.extend({"slot": slot, "field": "count", "a": x or 0, "b": y or 0} for slot, x, y in slots)
    for name in stats_a.keys() & stats_b.keys() - {"batch_hist"}:
        if stats_a[name] != stats_b[name]:
            diff.counters[name] = [stats_a[name], stats_b[name]]
    if child_a is not None and child_b is not None:
        for name, x, y in zip(RSS_NAMES, child_a.rss.tolist(), child_b.rss.tolist(), strict=True):
            if x != y:
                diff.rss[name] = [x, y]
    return diff


def _entries(mm: Mm | None) -> tuple[I64, U64]:
    """Non-empty entries of both pools by virtual page number."""
    if mm is None:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64)
    row, idx = np.nonzero(mm.entries != np.uint64(mm.layout.none_value))
    vpns = np.concatenate([mm.vpns[row] + idx, mm.pmd_vpns])
    values = np.concatenate([mm.entries[row, idx], mm.pmd_entries])
    order = np.argsort(vpns, kind="stable")
    return vpns[order], values[order]


def _memmap(mm: Mm, semantics: KernelSemantics) -> Columns:
    """Fields of pages and folios that this kernel keeps, each as (PFNs, values)."""
    table = mm.folios.pages_table()
    pfns, words, aux = table["pfn"], table["word"], table["aux"]
    order = words >> np.uint64(f.ORDER_SHIFT) & np.uint64((1 << f.ORDER_BITS) - 1)
    offset = pfns & (np.int64(1) << order.astype(np.int64)) - 1
    counter = words >> np.uint64(f.COUNTER_SHIFT) & np.uint64(f.MAX_COUNTER)
    counted = np.ones(len(pfns), dtype=bool) if not semantics.config.no_page_mapcount else order == 0
    out: Columns = {
        "page.anon_exclusive": (pfns, words >> np.uint64(f.AE_BIT) & np.uint64(1)),
        "folio.refcount": (pfns[offset == 0], counter[offset == 0]),
        "folio.entire_mapcount": (pfns[offset == 2] - 2, counter[offset == 2]),
        "folio.dirty": (pfns[offset == 0], aux[offset == 0] >> np.uint64(f.AUX_DIRTY_BIT) & np.uint64(1)),
        f"page.mapcount{'' if counted.all() else ' of small folios'}": (
            pfns[counted],
            words[counted] & np.uint64(f.MAX_MAPCOUNT),
        ),
    }
    if semantics.large_mapcount:
        out["folio.large_mapcount"] = pfns[offset == 1] - 1, counter[offset == 1]
    if semantics.mm_id:
        head = (offset == 0) & (order > 0)
        out["folio.maybe_mapped_shared"] = pfns[head], aux[head] >> np.uint64(f.AUX_SHARED_BIT)
    return out


def _swap(mm: Mm) -> tuple[I64, I64]:
    slots, counts = mm.folios.swap.table()
    return slots.astype(np.int64), counts


def _differing(
    a: tuple[I64, npt.NDArray[Any]], b: tuple[I64, npt.NDArray[Any]]
) -> list[tuple[int, int | None, int | None]]:
    """(key, value in a, value in b) where two sorted columns differ; None where one lacks the key."""
    keys = np.union1d(a[0], b[0])
    found = []
    values = []
    for own, column in (a, b):
        at = np.minimum(np.searchsorted(own, keys), max(len(own) - 1, 0))
        there = own[at] == keys if len(own) else np.zeros(len(keys), dtype=bool)
        found.append(there)
        values.append(column[at] if len(own) else np.zeros(len(keys), dtype=np.uint64))
    differ = np.flatnonzero((found[0] != found[1]) | (found[0] & found[1] & (values[0] != values[1])))
    return [
        (int(keys[i]), *(int(values[k][i]) if found[k][i] else None for k in (0, 1)))  # type: ignore[misc]
        for i in differ.tolist()
    ]
