"""The memmap's storage: where MM-ID slots lie. What it means is checked with everything that uses it."""

from __future__ import annotations

import numpy as np
import pytest

from ptebatch import folio as f
from ptebatch.errors import ArgumentError, StateError
from ptebatch.folio import FolioTable

FIRST = 1 << 18
COUNTS = [(n, m) for n in range(41) for m in (0, 1, 31, 32, 40)] + [(n, m) for n in (0, 1, 31, 32) for m in range(41)]
IDS = [(0, 0), (0, f.MAX_MM_ID), (f.MAX_MM_ID, 1), (1, 0)]
CONTENTS = [(n, m, i, j, shared) for n, m in COUNTS for i, j in IDS for shared in (0, 1)]
COUNTER = f.MAX_COUNTER << f.COUNTER_SHIFT
SLOT = 1 << f.AUX_SHARED_BIT | (1 << f.AUX_COUNT_BITS + f.AUX_ID_BITS) - 1
KINDS = [(1, False), (2, False), (3, False), (4, False), (5, False), (2, True), (4, True), (6, True)]


def slots_of(contents: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    slot0 = [n | i << f.AUX_COUNT_BITS | shared << f.AUX_SHARED_BIT for n, _, i, _, shared in contents]
    slot1 = [m | j << f.AUX_COUNT_BITS for _, m, _, j, _ in contents]
    return np.array(slot0, dtype=np.uint64), np.array(slot1, dtype=np.uint64)


def table(order: int, hugetlb: bool) -> tuple[FolioTable, np.ndarray]:
    """A folio for each of CONTENTS, every second dirty and locked, whose words hold something everywhere else."""
    folios, nr = FolioTable(), 1 << order
    heads = FIRST + nr * np.arange(len(CONTENTS))
    folios.add_folios(heads, order, hugetlb=hugetlb)
    at = folios.lookup(heads)
    folios.map_ptes(np.arange(FIRST, FIRST + nr * len(heads)), mm_id=7, anon_exclusive=True)
    folios._set_mm_slots(at, *(np.zeros(len(at), dtype=np.uint64),) * 2)
    folios._aux[at[::2]] |= np.uint64(1 << f.AUX_DIRTY_BIT | 1 << f.AUX_LOCKED_BIT)
    return folios, at


@pytest.mark.parametrize(("order", "hugetlb"), KINDS)
def test_mm_slots(order, hugetlb):
    folios, at = table(order, hugetlb)
    empty_words, empty_aux = folios._words.copy(), folios._aux.copy()
    contents = list(CONTENTS)
    folios._set_mm_slots(at, *slots_of(contents))
    slot0, slot1 = folios._mm_slots(at)
    assert np.array_equal(slot0, slots_of(contents)[0])
    assert np.array_equal(slot1, slots_of(contents)[1])

    # Where they lie. Nothing else has changed.
    inline = 2 <= order <= 4 and not hugetlb
    words, aux, spilled = folios._words.copy(), folios._aux.copy(), [max(n, m) > 31 for n, m, *_ in contents]
    if inline:
        first = [0 if out else n | i << 5 | s << 25 for (n, _, i, _, s), out in zip(contents, spilled, strict=True)]
        second = [1 << 25 if out else m | j << 5 for (_, m, _, j, _), out in zip(contents, spilled, strict=True)]
        for page, expected in (2, first), (3, second):
            assert (words[at + page] >> f.COUNTER_SHIFT & f.MAX_COUNTER).tolist() == expected
            words[at + page] &= ~np.uint64(COUNTER)
    out = np.array(spilled) | (not inline)
    assert np.array_equal(aux[at] & np.uint64(SLOT), np.where(out, slot0, 0))
    assert np.array_equal(aux[at + 1] & np.uint64(SLOT), np.where(out, slot1, 0))
    aux[at] &= ~np.uint64(SLOT)
    aux[at + 1] = 0
    assert np.array_equal(aux, empty_aux)
    assert np.array_equal(words, empty_words)

    # One by one, and in place of others, spilled or not, the same arrays.
    other, _ = table(order, hugetlb)
    other._set_mm_slots(at, *slots_of(contents[::-1]))
    for head, (n, m, i, j, shared) in zip(other.heads().tolist(), contents, strict=True):
        folio = other.folio(head)
        folio.set_mm_ids(((i, n), (j, m)))
        folio.maybe_mapped_shared = bool(shared)
        assert (folio.mm_ids, folio.maybe_mapped_shared) == (((i, n), (j, m)), bool(shared))
    assert np.array_equal(other._words, folios._words)
    assert np.array_equal(other._aux, folios._aux)


@pytest.mark.parametrize(("order", "hugetlb"), KINDS)
def test_pages_table_knows_no_inline_slots(order, hugetlb):
    folios, at = table(order, hugetlb)
    folios._set_mm_slots(at, *slots_of(CONTENTS))
    got = folios.pages_table()
    head = got["pfn"] % (1 << order) == 0
    assert np.array_equal(got["aux"][head] & np.uint64(SLOT), slots_of(CONTENTS)[0])
    assert np.array_equal(got["aux"][np.flatnonzero(head) + 1], slots_of(CONTENTS)[1])
    assert not (got["word"][got["pfn"] % (1 << order) > 1] & np.uint64(COUNTER)).any()
    again = FolioTable.from_pages_table(got)
    n = len(got["pfn"])
    assert np.array_equal(again._words[:n], folios._words[:n])
    assert np.array_equal(again._aux[:n], folios._aux[:n])
    assert again == folios


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_a_folio_and_its_slots(order):
    folios = FolioTable()
    folios.add(FIRST, order, mapcount=1)
    folio = folios.folio(FIRST)
    folio.dirty = True
    for ids in ((1, 31), (0, 0)), ((1, 31), (f.MAX_MM_ID, 32)), ((0, 0), (2, f.MAX_COUNTER)), ((2, 1), (1, 2)):
        for shared in (True, False):
            folio.maybe_mapped_shared = shared
            folio.set_mm_ids(ids)
            assert (folio.mm_ids, folio.maybe_mapped_shared) == (ids, shared)
            assert (folio.dirty, folio.locked, folio.refcount, folio.entire_mapcount) == (True, False, 0, 0)
            assert folio.large_mapcount == 1 << order
            assert folios.mapcounts(np.arange(FIRST, FIRST + (1 << order))).tolist() == [1] * (1 << order)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6])
def test_map_ptes_and_fill_mapped_agree(order):
    one, two = FolioTable(), FolioTable()
    one.fill_mapped(FIRST, 64 >> order or 1, order, mm_id=f.MAX_MM_ID)
    two.add_folios(np.arange(FIRST, FIRST + 64, 1 << order), order)
    two.map_ptes(np.arange(FIRST, FIRST + 64), mm_id=f.MAX_MM_ID, anon_exclusive=True)
    assert one == two
    assert np.array_equal(one._words, two._words)
    assert np.array_equal(one._aux, two._aux)


ENTIRE = [(1, True, False), (2, False, False), (2, True, True), (4, False, False), (5, False, True)]


@pytest.mark.parametrize(("order", "hugetlb", "has"), ENTIRE)
def test_entire_mapcount(order, hugetlb, has):
    """Where MM-ID slots may be, there is none."""
    folios = FolioTable()
    if has:
        folios.add(FIRST, order, hugetlb=hugetlb, entire_mapcount=3)
        assert folios.folio(FIRST).entire_mapcount == 3
        return
    with pytest.raises(ArgumentError, match=f"order {order} has no entire_mapcount"):
        folios.add(FIRST, order, hugetlb=hugetlb, entire_mapcount=1)
    assert FIRST not in folios
    folios.add(FIRST, order, hugetlb=hugetlb)
    folio = folios.folio(FIRST)
    folio.entire_mapcount = 0
    with pytest.raises(ArgumentError, match=f"order {order} has no entire_mapcount"):
        folio.entire_mapcount = 1
    if order >= 2:
        hostile = folios.pages_table()
        hostile["word"][2] |= np.uint64(1 << f.COUNTER_SHIFT)
        with pytest.raises(StateError, match="entire mapcount"):
            FolioTable.from_pages_table(hostile)
