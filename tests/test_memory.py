"""Arrays in huge pages are arrays like any other."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from ptebatch import memory
from ptebatch.arch import X86_64
from ptebatch.mm import none_tables

FEW, MANY = 100, memory.HUGE // 8


@pytest.mark.parametrize("nr", [0, 1, FEW, MANY - 1, MANY, MANY + 1, 3 * MANY])
def test_zeros(nr):
    array = memory.zeros(nr)
    assert (array.dtype, array.shape, int(array.sum())) == (np.uint64, (nr,), 0)
    assert array.flags.c_contiguous and array.flags.writeable and array.flags.aligned
    array[...] = 7
    assert (array == 7).all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages are asked for on Linux only")
def test_large_arrays_begin_at_a_huge_page_and_small_ones_at_a_cache_line():
    assert memory.zeros(MANY).ctypes.data % memory.HUGE == 0
    assert memory.zeros(MANY // 512, 512).ctypes.data % memory.HUGE == 0
    assert memory.zeros(MANY).base is not None
    assert memory.zeros(FEW).ctypes.data % memory.LINE == 0


@pytest.mark.parametrize("lacking", ["advice", "memory"])
def test_where_there_are_no_huge_pages(monkeypatch, lacking):
    if lacking == "advice":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(mmap, "mmap", no_memory)
    array = memory.zeros(MANY)
    assert array.ctypes.data % memory.LINE == 0
    assert not array.any()


def no_memory(*args, **kwargs):
    raise OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize("nr", [FEW, MANY + 5])
@pytest.mark.parametrize("dtype", [np.uint64, np.int32, np.uint8])
def test_copies_are_independent(nr, dtype):
    array = np.arange(nr * 8).astype(dtype)[::2]
    new = memory.copy(array)
    assert new.dtype == dtype and new.flags.c_contiguous
    assert (new == array).all()
    new[0] = 99
    assert array[0] == 0


def test_the_memory_lives_as_long_as_what_looks_into_it():
    views = [memory.zeros(MANY // 512, 512).reshape(-1)[5:] for _ in range(20)]
    for number, view in enumerate(views):
        view[...] = number
    assert [int(view[0]) for view in views] == [int(view[-1]) for view in views] == list(range(20))


def test_page_tables_are_none():
    tables = none_tables(X86_64, 3)
    assert (tables.shape, tables.any()) == ((3, 512), False)
