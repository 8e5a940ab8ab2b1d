"""Counts of swap slots."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptebatch import arch
from ptebatch.arch import X86_64
from ptebatch.errors import ArgumentError, StateError
from ptebatch.mm import swap_keys
from ptebatch.semantics import V6_12, V6_18
from ptebatch.swap import KEY_TYPE_SHIFT, MAX_SWAP_COUNT, SWAP_MAP_MAX, SwapTable, swap_key

KEYS = st.lists(st.integers(0, 9), max_size=12)


@given(st.lists(st.tuples(KEYS, st.sampled_from((1, 1, 2, -1))), max_size=6))
def test_counts_are_those_of_a_dict(changes):
    swap, plain = SwapTable(), dict.fromkeys(range(10), 0)
    for keys, by in changes:
        after = plain | {key: plain[key] + by * keys.count(key) for key in keys}
        if min(after.values()) < 0:
            before = swap.copy()
            with pytest.raises(StateError, match="swap slot 0:"):
                swap.add(np.array(keys, dtype=np.int64), by)
            assert swap == before
            continue
        swap.add(np.array(keys, dtype=np.int64), by)
        plain = after
        assert [swap.count(0, key) for key in range(10)] == list(plain.values())
    used = {key: count for key, count in plain.items() if count}
    slots, counts = swap.table()
    assert dict(zip(slots.tolist(), counts.tolist(), strict=True)) == used
    assert len(swap) == len(used)
    assert SwapTable.from_table(slots, counts) == swap


def test_known_slots_without_references_do_not_matter():
    one, two = SwapTable(), SwapTable()
    one.know([swap_key(3, 7), swap_key(0, 1)])
    assert one == two
    one.add([swap_key(3, 7)])
    assert one != two
    assert one != 3
    assert (one.count(3, 7), one.count(0, 1), one.count(9, 9)) == (1, 0, 0)


def test_continuation_pages_serve_a_page_of_slots():
    swap = SwapTable()
    swap.add([swap_key(1, 4095)], SWAP_MAP_MAX)
    assert not swap.continued(1, 0, 12)
    swap.add([swap_key(1, 4095)])
    assert swap.continued(1, 0, 12)
    assert not swap.continued(1, 4096, 12)
    assert not swap.continued(0, 4095, 12)


def test_limits():
    swap = SwapTable()
    swap.add([5], MAX_SWAP_COUNT)
    with pytest.raises(StateError, match="0x5"):
        swap.add([5])
    assert swap.count(0, 5) == MAX_SWAP_COUNT
    for bad in (swap_key, swap.count):
        for args in ((-1, 0), (0, -1), (256, 0), (0, 1 << KEY_TYPE_SHIFT)):
            with pytest.raises(ArgumentError, match="no swap slot"):
                bad(*args)
    for keys in ([1.5], [[1]], "x"):
        with pytest.raises(ArgumentError, match="keys"):
            swap.add(keys)


@pytest.mark.parametrize(("kernel", "first_special"), [(V6_12, 23), (V6_18, 24)])
def test_keys_are_those_of_real_swap_areas(kernel, first_special):
    entries = [arch.swp_entry(X86_64, number, 77) | X86_64.swp_exclusive for number in range(32)]
    entries += [0, 0x60, 0x8000000000123067, arch.mk_pte(X86_64, 5, X86_64.protnone)]
    keys = swap_keys(X86_64, np.array(entries, dtype=np.uint64), kernel)
    assert keys.tolist() == [swap_key(number, 77) for number in range(first_special)]
