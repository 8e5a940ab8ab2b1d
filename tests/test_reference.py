"""The primitives: laws of batching, walkers over address spaces, refused calls; on every implementation."""

from __future__ import annotations

import dataclasses
import errno

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptebatch import arch, mm, reference, semantics
from ptebatch.arch import X86_64
from ptebatch.errors import (
    ArgumentError,
    PfnError,
    ReadOnlyError,
    SemanticsError,
    StateError,
    UnsupportedEntryError,
)
from ptebatch.folio import FolioTable
from ptebatch.mm import ForkContext, Mm, Vma
from ptebatch.semantics import V6_8, V6_9, V6_12, V6_18

L = X86_64
PTRS = L.ptrs_per_pte
TABLE = PTRS << L.page_shift
COW = arch.VM_READ | arch.VM_WRITE | arch.VM_MAYREAD | arch.VM_MAYWRITE | arch.VM_SOFTDIRTY
RW = 0x8000000000000067  # P RW US A D NX
HEAD = 0x100
ORDER = 4


def pte(pfn: int, bits: int = RW) -> int:
    return pfn << 12 | bits


def row(*values: int, at: int = 0) -> np.ndarray:
    entries = np.zeros(PTRS, dtype=np.uint64)
    entries[at : at + len(values)] = values
    return entries


def one_folio(order: int = ORDER, **state) -> FolioTable:
    folios = FolioTable()
    state = {"refcount": 1 << order, "mapcount": 1, "anon_exclusive": True, **state}
    folios.add(HEAD, order, **state)
    return folios


def make_ctx(folios: FolioTable, vm_flags: int = COW, **changes) -> ForkContext:
    kernel = changes.pop("semantics", V6_18)
    vma = changes.pop("vma", None) or Vma(TABLE, 4 * TABLE, vm_flags)
    ctx = ForkContext(
        layout=L.configured(kernel.config.mem_soft_dirty, kernel.config.x86_shstk),
        semantics=kernel,
        folios=folios,
        src_vma=vma,
        dst_vma=dataclasses.replace(vma),
        batching=kernel.fork_batching,
        has_pinned=False,
        dst_mm_id=2,
        pfn_without_page="error",
    )
    return dataclasses.replace(ctx, **changes)


def counters(stats: np.ndarray) -> dict[str, int]:
    return dict(zip(mm.STAT_FIELDS, stats.tolist(), strict=False))


# --- laws of folio_pte_batch ------------------------------------------------------------------------------------------

BITS = st.sampled_from([0, 0x2, 0x20, 0x40, 0x400, 0x800, 1 << 58, 1 << 63, 1 << 57])


@st.composite
def tables(draw):
    """A folio mapped in a row from slot 0, with bits flipped here and there, and one slot possibly replaced."""
    first = draw(st.integers(0, 15))
    bits = draw(st.sampled_from([0x25, 0x27, 0x67, 0x05, 0x867, 0x425, RW, 0x120]))
    values = [arch.mk_pte(L, HEAD + first + k, bits) for k in range(draw(st.integers(1, 24)))]
    for _ in range(draw(st.integers(0, 4))):
        values[draw(st.integers(0, len(values) - 1))] ^= draw(BITS)
    if len(values) > 1 and draw(st.booleans()):
        values[draw(st.integers(1, len(values) - 1))] = draw(st.sampled_from([0, 0x60, (1 << 64) - 0xA00, pte(HEAD)]))
    return row(*values), len(values)


def normal(kernel: semantics.KernelSemantics, flags: int, v: int) -> int:
    """Rebuild the comparison rule of the specification, independently of the reference's."""
    clean, clear, protect = (
        (not flags & 1, not flags & 2, not flags & 4) if kernel.fpb_respect else (flags & 1, flags & 2, True)
    )
    v = arch.pte_mkclean(L, v) if clean else v
    v = arch.pte_clear_soft_dirty(L, v) if clear else v
    v = arch.pte_wrprotect(L, v) if protect else v
    return arch.pte_mkold(L, v)


@given(tables(), st.sampled_from([(V6_18, f) for f in range(8)] + [(V6_12, f) for f in range(4)]), st.data())
def test_batch_laws(impl, case, kernel_flags, data):
    entries, length = case
    kernel, flags = kernel_flags
    max_nr = data.draw(st.integers(1, length), label="max_nr")
    folios = one_folio()
    folios.add(HEAD + 16, ORDER)
    first = int(entries[0])
    if not arch.pte_present(L, first) or arch.pte_pfn(L, first) not in folios:
        return
    before = entries.copy()

    def batch(most: int):
        return impl.folio_pte_batch(entries, 0, most, folios=folios, layout=L, semantics=kernel, flags=flags)

    result = batch(max_nr)
    assert (entries == before).all()
    assert batch(max_nr) == result
    pfn = arch.pte_pfn(L, first)
    limit = min(max_nr, 16 - pfn % 16)
    assert 1 <= result.nr <= limit

    def fits(k: int) -> bool:
        return normal(kernel, flags, int(entries[k])) == normal(kernel, flags, arch.pte_advance_pfn(L, first, k))

    assert all(fits(k) for k in range(result.nr))
    assert result.nr == limit or not fits(result.nr)
    rest = [int(v) for v in entries[1 : result.nr]]
    assert result.any_writable == any(arch.pte_write(L, v) for v in rest)
    assert result.any_young == any(arch.pte_young(L, v) for v in rest)
    assert result.any_dirty == any(arch.pte_dirty(L, v) for v in rest)
    assert result.pte == first  # no merge was asked for
    shorter = data.draw(st.integers(1, max_nr), label="shorter")
    assert batch(shorter).nr == min(result.nr, shorter)


@given(tables(), st.sampled_from([V6_18, V6_12, V6_9]))
def test_batched_and_single_copy_agree(impl, case, kernel):
    """In a COW mapping without soft-dirty, of canonical entries, nothing but the counts of operations differs."""
    entries, length = case
    kernel = kernel.replace(mem_soft_dirty=False)
    values = [int(v) for v in entries[:length]]
    for k, v in enumerate(values):
        # Canonical: hardware Dirty only with RW, SavedDirty only without.
        if v & 0x2 and v & 1 << 58:
            values[k] = v & ~(1 << 58)
        if v & 0x1 and not v & 0x2:
            values[k] = v & ~0x40
        if not v & 0x1 or arch.pte_pfn(L, v) not in range(HEAD, HEAD + 32):
            values[k] = 0
    outcomes = []
    for batching in (True, False):
        folios = one_folio(refcount=64, mapcount=2)
        folios.add(HEAD + 16, ORDER, refcount=64, mapcount=2, anon_exclusive=True)
        ctx = make_ctx(folios, semantics=kernel, batching=batching)
        dst, src, rss, stats = row(), row(*values), np.zeros(4, dtype=np.int64), mm.new_stats(L)
        assert impl.copy_pte_range(ctx, dst, src, 0, length, rss, stats) == 0
        pages = [(folios.page(p).mapcount, folios.page(p).anon_exclusive) for p in range(HEAD, HEAD + 32)]
        heads = [folios.folio(p) for p in (HEAD, HEAD + 16)]
        state = [(f.refcount, f.large_mapcount, f.mm_ids, f.maybe_mapped_shared) for f in heads]
        outcomes.append((dst.tolist(), src.tolist(), rss.tolist(), pages, state))
        count = counters(stats)
        assert count["ptes_single"] + count["ptes_batched"] == count["ptes_present"] == rss.sum()
        assert count["ptes_none"] + count["ptes_present"] == length
        hist = stats[len(mm.STAT_FIELDS) :]
        assert int((hist * np.arange(PTRS + 1)).sum()) == count["ptes_present"]
        assert hist.sum() == count["batches"]
    assert outcomes[0] == outcomes[1]


# --- walkers ----------------------------------------------------------------------------------------------------------


def space(*vmas: Vma, folios: FolioTable | None = None) -> Mm:
    return Mm.for_vmas(L, one_folio() if folios is None else folios, list(vmas))


def child_of(parent: Mm) -> Mm:
    return Mm.for_vmas(parent.layout, parent.folios, [dataclasses.replace(vma) for vma in parent.vmas])


def fill(space_: Mm, addr: int, values: list[int]) -> None:
    for k, value in enumerate(values):
        space_.set_pte(addr + (k << 12), value)


def test_copy_page_range_ends_batches_at_tables(impl):
    """A folio that straddles two tables is two batches."""
    start = 2 * TABLE - (6 << 12)
    vma = Vma(start, start + (16 << 12), COW)
    parent = space(vma)
    fill(parent, start, [pte(HEAD + k) for k in range(16)])
    child = child_of(parent)
    stats = mm.new_stats(L)
    assert impl.copy_page_range(make_ctx(parent.folios, vma=vma), child, parent, stats) == 0
    assert {nr: n for nr, n in enumerate(stats[len(mm.STAT_FIELDS) :].tolist()) if n} == {6: 1, 10: 1}
    assert [child.pte(start + (k << 12)) for k in range(16)] == [pte(HEAD + k, 0x8400000000000005) for k in range(16)]
    assert child.rss.tolist() == [0, 16, 0, 0]
    assert parent.folios.folio(HEAD).refcount == 32


def test_copy_page_range_keeps_to_its_vma(impl):
    """A folio that straddles two VMAs of one table is copied up to the VMA's end only."""
    start = 3 * TABLE
    low, high = Vma(start, start + (5 << 12), COW), Vma(start + (5 << 12), start + (16 << 12), COW)
    parent = space(low, high)
    fill(parent, start, [pte(HEAD + k) for k in range(16)])
    child = child_of(parent)
    stats = mm.new_stats(L)
    assert impl.copy_page_range(make_ctx(parent.folios, vma=low), child, parent, stats) == 0
    assert child.pte(start + (4 << 12)) == pte(HEAD + 4, 0x8400000000000005)
    assert child.pte(start + (5 << 12)) == 0
    assert parent.pte(start + (5 << 12)) == pte(HEAD + 5)
    assert counters(stats)["ptep_get"] == 5


def test_copy_page_range_collapses_errors(impl):
    """A poisoned page fails the table with -EHWPOISON, the range with -ENOMEM; what was copied is accounted."""
    start = TABLE
    folios = FolioTable()
    folios.add(HEAD, refcount=1, mapcount=1, anon_exclusive=True)
    folios.add(HEAD + 1, refcount=2000, mapcount=1, anon_exclusive=True)
    folios.page(HEAD + 1).hwpoison = True
    vma = Vma(start, start + (2 << 12), COW)
    parent = space(vma, folios=folios)
    fill(parent, start, [pte(HEAD), pte(HEAD + 1)])
    child = child_of(parent)
    ret = impl.copy_page_range(make_ctx(folios, vma=vma, has_pinned=True), child, parent, mm.new_stats(L))
    assert ret == -errno.ENOMEM
    assert child.rss.tolist() == [0, 1, 0, 0]
    assert child.pte(start) != 0
    assert child.pte(start + (1 << 12)) == 0
    assert len(folios) == 2  # the page in hand went back


def test_copy_page_range_needs_the_childs_rows(impl):
    start = TABLE
    vma = Vma(start, start + (16 << 12), COW)
    parent = space(vma)
    fill(parent, start, [pte(HEAD + k) for k in range(16)])
    before = parent.entries.copy()
    with pytest.raises(StateError, match=hex(start)):
        impl.copy_page_range(make_ctx(parent.folios, vma=vma), Mm(L, parent.folios), parent, mm.new_stats(L))
    assert (parent.entries == before).all()


def test_new_pages_get_the_lowest_free_pfns_once(impl):
    """An allocated page that was not needed is free again and serves the next address."""
    folios = FolioTable()
    folios.add(1, refcount=1)
    folios.add(HEAD, 2, refcount=8, pincount=1, mapcount=[2, 1, 2, 1], anon_exclusive=[False, True, False, True])
    ctx = make_ctx(folios, has_pinned=True)
    dst, src = row(), row(*(pte(HEAD + k) for k in range(4)))
    assert impl.copy_pte_range(ctx, dst, src, 0, 4, np.zeros(4, dtype=np.int64), mm.new_stats(L)) == 0
    assert [arch.pte_pfn(L, int(v)) for v in dst[:4]] == [HEAD, 2, HEAD + 2, 3]
    assert sorted(folios.heads().tolist()) == [1, 2, 3, HEAD]


@pytest.mark.parametrize("kernel", [V6_8, V6_18])
def test_check_range_accepts(impl, kernel):
    start = TABLE
    vma = Vma(start, start + TABLE, COW)
    parent = space(vma)
    fill(parent, start, [pte(HEAD), 0, 0x60, pte(0xABC, 0x225), arch.mk_pte(L, HEAD + 1, 0x120)])
    before = parent.entries.copy()
    impl.check_range(parent, parent.vmas, pfn_without_page="error")
    assert (parent.entries == before).all()


def test_check_range_names_address_and_pfn(impl):
    start = TABLE
    vma = Vma(start, start + (16 << 12), COW)
    parent = space(vma)
    parent.set_pte(start + (3 << 12), pte(0xABC))
    with pytest.raises(PfnError) as caught:
        impl.check_range(parent, [vma], pfn_without_page="error")
    assert (caught.value.pfn, caught.value.address) == (0xABC, start + (3 << 12))
    impl.check_range(parent, [vma], pfn_without_page="as_kernel")
    impl.check_range(parent, [], pfn_without_page="error")


@pytest.mark.parametrize("name", ["migration read", "migration write", "device read", "device exclusive"])
def test_check_range_looks_for_the_pages_of_swap_type_entries(impl, name):
    number = next(n for n, kind in mm.swap_types(V6_18).items() if kind == name)
    vma = Vma(TABLE, TABLE + (16 << 12), COW)
    parent = space(vma)
    fill(parent, TABLE, [arch.swp_entry(L, 31, 4), arch.swp_entry(L, 0, 5), arch.swp_entry(L, number, HEAD)])
    impl.check_range(parent, [vma], semantics=V6_18)
    parent.set_pte(TABLE + (7 << 12), arch.swp_entry(L, number, 0xABC))
    with pytest.raises(PfnError) as caught:
        impl.check_range(parent, [vma], pfn_without_page="as_kernel", semantics=V6_18)
    assert (caught.value.pfn, caught.value.address) == (0xABC, TABLE + (7 << 12))
    bare = V6_18.replace(memory_failure=False, migration=False, device_private=False)
    impl.check_range(parent, [vma], semantics=bare)


def test_types_beyond_five_bits_are_refused(impl):
    """An architecture whose entries have room for more types: the kernel uses 32 all the same."""
    layout = dataclasses.replace(L, swp_type_shift=58, swp_type_bits=6, swp_offset_bits=49)
    vma = Vma(TABLE, TABLE + (16 << 12), COW)
    parent = Mm.for_vmas(layout, FolioTable(), [vma])
    parent.set_pte(TABLE + (7 << 12), arch.swp_entry(layout, 40, 4))
    with pytest.raises(UnsupportedEntryError) as caught:
        impl.check_range(parent, [vma])
    assert (caught.value.address, caught.value.kind) == (TABLE + (7 << 12), "swap type 40")
    ctx = dataclasses.replace(make_ctx(parent.folios, vma=vma), layout=layout)
    with pytest.raises(UnsupportedEntryError, match="swap type 40"):
        impl.copy_page_range(ctx, child_of(parent), parent, mm.new_stats(layout))


def test_copy_page_range_keeps_away_from_leaves(impl):
    vma = Vma(TABLE, 4 * TABLE, COW)
    leaf = {"pmd_vpns": np.array([PTRS * 2], dtype=np.int64), "pmd_entries": np.array([0x2000E7], dtype=np.uint64)}
    parent = Mm(L, FolioTable(), vmas=[vma], **leaf)
    ctx, child, stats = make_ctx(parent.folios, vma=vma), child_of(parent), mm.new_stats(L)
    for start, end in ((None, None), (2 * TABLE, None), (None, 3 * TABLE), (3 * TABLE - 4096, None)):
        with pytest.raises(ArgumentError, match=hex(2 * TABLE)):
            impl.copy_page_range(ctx, child, parent, stats, start, end)
    impl.check_range(parent, [vma])


def test_copy_page_range_copies_a_part(impl):
    vma = Vma(TABLE, 3 * TABLE, COW)
    parent = space(vma)
    fill(parent, TABLE, [pte(HEAD + k) for k in range(4)])
    child = child_of(parent)
    ctx, stats = make_ctx(parent.folios, vma=vma), mm.new_stats(L)
    assert impl.copy_page_range(ctx, child, parent, stats, TABLE + (1 << 12), TABLE + (3 << 12)) == 0
    assert np.flatnonzero(child.entries[0]).tolist() == [1, 2]
    for start, end in ((0, None), (TABLE, 4 * TABLE), (2 * TABLE, TABLE), (TABLE + 1, None), ("x", None)):
        with pytest.raises(ArgumentError):
            impl.copy_page_range(ctx, child, parent, stats, start, end)


# --- write-protection -------------------------------------------------------------------------------------------------


def wrprotect(impl, parent: Mm, start: int, end: int, batching: bool, kernel=V6_18) -> dict[str, int]:
    stats = mm.new_stats(L)
    impl.wrprotect_range(parent, start, end, semantics=kernel, batching=batching, stats=stats)
    return counters(stats)


@pytest.mark.parametrize("kernel", [V6_9, V6_12, V6_18])
def test_wrprotect_range_counts(impl, kernel):
    """Dirty, soft-dirty and write differ within a batch; a read-only batch is left alone; the rest stays."""
    start = TABLE
    vma = Vma(start, start + (40 << 12), COW)
    folios = one_folio()
    folios.add(HEAD + 16, ORDER, refcount=16, mapcount=1)
    values = [pte(HEAD), pte(HEAD + 1, 0x8000000000000025), pte(HEAD + 2, 0x8000000000000827)]
    values += [pte(HEAD + k) for k in range(3, 16)]
    values += [pte(HEAD + 16 + k, 0x8000000000000025) for k in range(4)]
    values += [0, arch.swp_entry(L, 31, 4), pte(0xABC, 0x8000000000000227)]
    batched = {"ptes_none": 1, "ptes_present": 21, "ptes_single": 1, "ptes_batched": 20, "batches": 3}
    batched |= {"wrprotect_ptes": 2, "ptes_wrprotected": 17}
    single = {"ptes_none": 1, "ptes_present": 21, "ptes_single": 21, "ptes_batched": 0, "batches": 21}
    single |= {"wrprotect_ptes": 16, "ptes_wrprotected": 16, "ptep_get": 23}
    finals = []
    for batching, expected in ((True, batched), (False, single)):
        parent = space(vma, folios=folios)
        fill(parent, start, values)
        count = wrprotect(impl, parent, start, start + (23 << 12), batching, kernel)
        assert {name: count[name] for name in expected} == expected
        finals.append([parent.pte(start + (k << 12)) for k in range(23)])
        assert not any(arch.pte_write(L, v) for v in finals[-1] if arch.pte_present(L, v))
        assert finals[-1][20:22] == values[20:22]
    assert finals[0] == finals[1]
    assert finals[0][:3] == [
        pte(HEAD, 0x8400000000000025),
        pte(HEAD + 1, 0x8000000000000025),
        pte(HEAD + 2, 0x8000000000000825),
    ]


@pytest.mark.parametrize("kernel", [V6_9, V6_18])
def test_wrprotect_range_asks_every_entry_of_a_batch(impl, kernel):
    """Entry 0 is read-only, a later one is not."""
    parent = space(Vma(TABLE, TABLE + (3 << 12), COW))
    fill(parent, TABLE, [pte(HEAD, 0x25), pte(HEAD + 1, 0x25), pte(HEAD + 2, 0x27)])
    count = wrprotect(impl, parent, TABLE, TABLE + (3 << 12), True, kernel)
    assert (count["batches"], count["wrprotect_ptes"], count["ptes_wrprotected"]) == (1, 1, 3)
    assert parent.pte(TABLE + (2 << 12)) == pte(HEAD + 2, 0x25)


def test_wrprotect_range_keeps_to_its_range_and_the_vmas(impl):
    start = 2 * TABLE - (8 << 12)
    vmas = [Vma(start, start + (4 << 12), COW), Vma(start + (4 << 12), start + (16 << 12), COW)]
    parent = space(*vmas)
    fill(parent, start, [pte(HEAD + k) for k in range(16)])
    count = wrprotect(impl, parent, start + (2 << 12), start + (14 << 12), True)
    assert count["batches"] == 3  # 2 to the VMA's end, 4 to the table's end, 6 to the end of the range
    assert count["ptes_wrprotected"] == 12
    writable = [arch.pte_write(L, parent.pte(start + (k << 12))) for k in range(16)]
    assert writable == [True] * 2 + [False] * 12 + [True] * 2
    assert parent.folios.folio(HEAD).refcount == 16


def test_wrprotect_range_refuses(impl):
    parent = space(Vma(TABLE, 2 * TABLE, COW))
    with pytest.raises(ArgumentError, match="start"):
        wrprotect(impl, parent, TABLE + 1, 2 * TABLE, True)
    with pytest.raises(ArgumentError, match="end"):
        wrprotect(impl, parent, 2 * TABLE, TABLE, True)
    with pytest.raises(SemanticsError, match=r"v6\.8"):
        wrprotect(impl, parent, TABLE, 2 * TABLE, True, V6_8)
    wrprotect(impl, parent, TABLE, 2 * TABLE, False, V6_8)


# --- refused calls ----------------------------------------------------------------------------------------------------


def batch_of(impl, **changes):
    args = {"entries": row(pte(HEAD)), "idx": 0, "max_nr": 1, "folios": one_folio(), "layout": L, "semantics": V6_18}
    args |= changes
    return impl.folio_pte_batch(args.pop("entries"), args.pop("idx"), args.pop("max_nr"), **args)


@pytest.mark.parametrize(
    ("changes", "error", "names"),
    [
        ({"entries": None}, ArgumentError, "entries"),
        ({"entries": [0] * 512}, ArgumentError, "entries"),
        ({"entries": np.zeros(512, dtype=np.int64)}, ArgumentError, "entries"),
        ({"entries": np.zeros(512, dtype=">u8")}, ArgumentError, "entries"),
        ({"entries": np.zeros(511, dtype=np.uint64)}, ArgumentError, "entries"),
        ({"entries": np.zeros((1, 512), dtype=np.uint64)}, ArgumentError, "entries"),
        ({"entries": np.zeros(1024, dtype=np.uint64)[::2]}, ArgumentError, "entries"),
        ({"entries": np.zeros(512, dtype=np.uint64)[::-1]}, ArgumentError, "entries"),
        ({"idx": -1}, ArgumentError, "idx"),
        ({"idx": 512}, ArgumentError, "idx"),
        ({"idx": 0.0}, ArgumentError, "idx"),
        ({"idx": None}, ArgumentError, "idx"),
        ({"idx": 10**6000}, ArgumentError, "idx"),
        ({"max_nr": 0}, ArgumentError, "max_nr"),
        ({"max_nr": 513}, ArgumentError, "max_nr"),
        ({"max_nr": -1}, ArgumentError, "max_nr"),
        ({"flags": 32}, ArgumentError, "flags"),
        ({"flags": -1}, ArgumentError, "flags"),
        ({"flags": 4, "semantics": V6_12}, ArgumentError, "flags"),
        ({"pte": -1}, ArgumentError, "pte"),
        ({"pte": 1 << 64}, ArgumentError, "pte"),
        ({"pte": 0}, ArgumentError, "present"),
        ({"pte": arch.swp_entry(L, 31, 4)}, ArgumentError, "present"),
        ({"pte": pte(0xABC)}, PfnError, "0xabc"),
        ({"pte": pte((1 << 40) - 1)}, PfnError, "0xffffffffff"),
        ({"layout": "x86-64"}, ArgumentError, "layout"),
    ],
)
def test_folio_pte_batch_refuses(impl, changes, error, names):
    with pytest.raises(error, match=names):
        batch_of(impl, **changes)


def test_read_only_tables_are_read_and_not_written(impl):
    entries = row(pte(HEAD))
    entries.flags.writeable = False
    assert batch_of(impl, entries=entries).nr == 1
    with pytest.raises(ReadOnlyError, match="entries"):
        impl.set_ptes(entries, 0, 0, 1, layout=L)
    with pytest.raises(ReadOnlyError, match="entries"):
        impl.wrprotect_ptes(entries, 0, 1, layout=L)


def copy_args(**changes):
    values = {
        "ctx": make_ctx(one_folio()),
        "dst": row(),
        "src": row(*(pte(HEAD + k) for k in range(16))),
        "idx": 0,
        "max_nr": 16,
        "rss": np.zeros(4, dtype=np.int64),
        "prealloc": [],
        "stats": mm.new_stats(L),
    }
    return values | changes


@pytest.mark.parametrize(
    ("changes", "error", "names"),
    [
        ({"ctx": None}, ArgumentError, "ctx"),
        ({"dst": None}, ArgumentError, "dst"),
        ({"src": np.zeros(513, dtype=np.uint64)}, ArgumentError, "src"),
        ({"idx": 512}, ArgumentError, "idx"),
        ({"idx": -1}, ArgumentError, "idx"),
        ({"idx": 16, "max_nr": 1}, ArgumentError, "empty"),
        ({"idx": 500, "max_nr": 13}, ArgumentError, "max_nr"),
        ({"max_nr": 1 << 70}, ArgumentError, "max_nr"),
        ({"rss": np.zeros(4)}, ArgumentError, "rss"),
        ({"rss": np.zeros(3, dtype=np.int64)}, ArgumentError, "rss"),
        ({"prealloc": None}, ArgumentError, "prealloc"),
        ({"prealloc": [1, 2]}, ArgumentError, "prealloc"),
        ({"prealloc": [-1]}, ArgumentError, "prealloc"),
        ({"prealloc": [1.5]}, ArgumentError, "prealloc"),
        ({"stats": np.zeros(4, dtype=np.int64)}, ArgumentError, "stats"),
        ({"src": row(arch.swp_entry(L, 31, 4))}, ArgumentError, "not present"),
        ({"src": row(pte((1 << 40) - 1))}, PfnError, "0xffffffffff"),
    ],
)
def test_copy_present_ptes_refuses_and_changes_nothing(impl, changes, error, names):
    values = copy_args(**changes)
    arrays = {k: v.copy() for k, v in values.items() if isinstance(v, np.ndarray)}
    with pytest.raises(error, match=names):
        impl.copy_present_ptes(*values.values())
    for name, before in arrays.items():
        assert (values[name] == before).all()
    if values["ctx"] is not None:
        assert values["ctx"].folios.folio(HEAD).refcount == 16


def test_overlapping_tables_are_refused(impl):
    both = np.zeros(2 * PTRS, dtype=np.uint64)
    both[:16] = [pte(HEAD + k) for k in range(16)]
    for dst in (both[:PTRS], both[1 : PTRS + 1], both[PTRS - 1 : 2 * PTRS - 1]):
        values = copy_args(dst=dst, src=both[:PTRS])
        with pytest.raises(ArgumentError, match="overlap"):
            impl.copy_present_ptes(*values.values())
    assert impl.copy_present_ptes(*copy_args(dst=both[PTRS:], src=both[:PTRS]).values()) == 16


@pytest.mark.parametrize("name", ["dst", "src", "rss", "stats"])
def test_read_only_arguments_are_refused(impl, name):
    values = copy_args()
    values[name].flags.writeable = False
    with pytest.raises(ReadOnlyError, match=name):
        impl.copy_present_ptes(*values.values())


def test_batching_needs_a_kernel_that_batches(impl):
    with pytest.raises(SemanticsError, match=r"v6\.8"):
        impl.copy_present_ptes(*copy_args(ctx=make_ctx(one_folio(), semantics=V6_8, batching=True)).values())


@pytest.mark.parametrize(("idx", "end"), [(-1, 4), (0, 513), (5, 4), (513, 513)])
def test_copy_pte_range_refuses_spans(impl, idx, end):
    values = copy_args()
    with pytest.raises(ArgumentError, match=r"idx|end"):
        impl.copy_pte_range(values["ctx"], values["dst"], values["src"], idx, end, values["rss"], values["stats"])


@pytest.mark.parametrize(
    "state",
    [
        {"refcount": (1 << 26) - 16, "mapcount": 1},
        {"refcount": 16, "mapcount": [1] * 15 + [(1 << 24) - 1], "large_mapcount": 16},
    ],
)
def test_counts_do_not_overflow(impl, state):
    folios = one_folio(**state)
    values = copy_args(ctx=make_ctx(folios))
    with pytest.raises(StateError):
        impl.copy_present_ptes(*values.values())
    assert folios.folio(HEAD).refcount == state["refcount"]
    assert folios.page(HEAD).mapcount == 1
    assert folios.page(HEAD).anon_exclusive
    assert not values["dst"].any()
    assert impl.copy_present_ptes(*copy_args(ctx=make_ctx(folios), max_nr=15).values()) == 15


# --- the helpers over arrays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arg", "expected"),
    [
        ("pte_wrprotect", 0, 0x8400000000100025),
        ("pte_mkold", 0, 0x8000000000100047),
        ("pte_pfn", 0, HEAD),
        ("pte_write", 0, 1),
        ("pte_none", 0, 0),
        ("pte_advance_pfn", 3, 0x8000000000103067),
        ("pte_mkwrite", arch.VM_SHADOW_STACK, 0x8000000000100065),
        ("pte_mkwrite", 0, 0x8000000000100067),
    ],
)
def test_apply_helper(impl, name, arg, expected):
    values = np.array([pte(HEAD)], dtype=np.uint64)
    result = impl.apply_helper(L, name, values, arg)
    assert result.dtype == np.uint64
    assert result.tolist() == [expected]
    assert values.tolist() == [pte(HEAD)]


def test_apply_helper_refuses(impl):
    values = np.array([pte(HEAD)], dtype=np.uint64)
    for name in ("os", "PteLayout", "decode", 1, None):
        with pytest.raises(ArgumentError, match="name"):
            impl.apply_helper(L, name, values, 0)
    with pytest.raises(ArgumentError, match="values"):
        impl.apply_helper(L, "pte_mkold", [1], 0)
    with pytest.raises(ArgumentError, match="arg"):
        impl.apply_helper(L, "pte_mkold", values, -1)


def test_reference_knows_every_helper():
    """Helpers with fields of their own as argument: what the compiled core may not offer."""
    offsets = np.array([4], dtype=np.uint64)
    assert reference.apply_helper(L, "swp_entry", offsets, 31).tolist() == [0xFFFFFFFFFFFFF600]
    assert reference.apply_helper(L, "mk_pte", np.array([HEAD], dtype=np.uint64), RW).tolist() == [pte(HEAD)]
    assert reference.apply_helper(L, "pte_modify", np.array([pte(HEAD)], dtype=np.uint64), 0x120).tolist() == [
        arch.pte_modify(L, pte(HEAD), 0x120)
    ]
