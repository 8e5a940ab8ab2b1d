"""Golden vectors: values worked out by hand from the specification, for every implementation.

A vector is a dict laid over its file's ``defaults``; the files' ``notation`` says how to read one.  Expanding runs
takes integer arithmetic only, so nothing under test helps to build what it is compared with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptebatch import arch, errors, mm, semantics
from ptebatch.folio import FolioTable
from ptebatch.fork import fork
from ptebatch.mm import ForkContext, Vma

GOLDEN = Path(__file__).parent / "golden"
FUNCTIONS = (
    "folio_pte_batch", "set_ptes", "wrprotect_ptes", "copy_present_ptes", "copy_nonpresent_pte", "copy_pte_range",
    "fork", "get_and_clear_full_ptes", "zap_present_ptes", "touch",
)  # fmt: skip
U64 = (1 << 64) - 1
Vector = dict[str, Any]


def load(function: str) -> list[Vector]:
    """All vectors of a function; a missing file is an error, not an empty list."""
    data = json.loads((GOLDEN / f"{function}.json").read_text())
    assert data["schema"] == "ptebatch-golden/1"
    assert data["function"] == function
    return [{**data["defaults"], **vector} for vector in data["vectors"]]


def vectors(function: str) -> Any:
    return pytest.mark.parametrize("vector", [pytest.param(v, id=v["name"]) for v in load(function)])


def number(text: str) -> int:
    return int(text, 16)


def table(runs: list[list[Any]], ptrs: int = 512) -> np.ndarray:
    """Expand runs [slot, value, nr, step] into one page table."""
    row = [0] * ptrs
    for slot, value, nr, *step in runs:
        for k in range(nr):
            row[slot + k] = (number(value) + k * number(step[0] if step else "0x1000")) & U64
    return np.array(row, dtype=np.uint64)


def same_table(actual: np.ndarray, expected: np.ndarray) -> None:
    differing = {
        i: (hex(a), hex(e)) for i, (a, e) in enumerate(zip(actual.tolist(), expected.tolist(), strict=True)) if a != e
    }
    assert not differing, f"slot: (actual, expected): {differing}"


def vm_flags(text: str) -> int:
    return sum(getattr(arch, f"VM_{name}") for name in text.split("|"))


def kernel(vector: Vector) -> semantics.KernelSemantics:
    return semantics.get(vector["semantics"]).replace(**vector["config"])


def layout(vector: Vector) -> arch.PteLayout:
    config = kernel(vector).config
    return arch.LAYOUTS[vector.get("layout", "x86-64")].configured(config.mem_soft_dirty, config.x86_shstk)


def per_page(value: Any) -> Any:
    """A scalar for all pages, or runs [value, nr]."""
    return [v for v, nr in value for _ in range(nr)] if isinstance(value, list) else value


def memmap(vector: Vector) -> FolioTable:
    folios = FolioTable()
    for spec in vector["folios"]:
        spec = dict(spec)
        pfn = number(spec.pop("pfn"))
        mm_ids, shared, poisoned = (spec.pop(name, None) for name in ("mm_ids", "shared", "hwpoison"))
        dirty, locked = (spec.pop(name, False) for name in ("dirty", "locked"))
        spec["mapcount"] = per_page(spec.get("mapcount", 0))
        spec["anon_exclusive"] = per_page(spec.get("anon_exclusive", False))
        folios.add(pfn, spec.pop("order"), **spec)
        folio = folios.folio(pfn)
        folio.dirty, folio.locked = dirty, locked
        if mm_ids is not None:
            folio.set_mm_ids(tuple(tuple(slot) for slot in mm_ids))
        if shared is not None:
            folio.maybe_mapped_shared = shared
        if poisoned:
            folios.page(pfn).hwpoison = True
    for swap_type, offset, count in vector.get("swap", ()):
        folios.swap.add([swap_type << 56 | offset], count)
    return folios


def context(vector: Vector, folios: FolioTable) -> ForkContext:
    prot = number(vector["vm_page_prot"]) if "vm_page_prot" in vector else None

    def vma(flags: str) -> Vma:
        return Vma(0x200000, 0x400000, vm_flags(flags), vm_page_prot=prot)

    return ForkContext(
        layout=layout(vector),
        semantics=kernel(vector),
        folios=folios,
        src_vma=vma(vector["vm_flags"]),
        dst_vma=vma(vector.get("dst_vm_flags", vector["vm_flags"])),
        batching=vector["batching"],
        has_pinned=vector["has_pinned"],
        dst_mm_id=2,
        pfn_without_page=vector["pfn_without_page"],
        src_mm_id=1,
        allocations=mm.Allocations(vector["fail_at"]) if "fail_at" in vector else None,
    )


def check_folios(vector: Vector, folios: FolioTable) -> None:
    """Folios named in the vector are as it says; all others are as before."""
    before = memmap(vector)
    expected = vector["expect"].get("folios", {})
    heads = {int(pfn) for pfn in folios.heads()}
    first, nr = vector["expect"].get("copies", ["0x0", 0])
    copies = set(range(number(first), number(first) + nr))
    for pfn in copies:
        assert snapshot(folios, pfn) == [1, 1, 0, 0, (1, True, False)]
    assert copies <= heads
    heads -= copies
    freed = {number(pfn) for pfn, want in expected.items() if want is None}
    assert heads == ({int(pfn) for pfn in before.heads()} | {number(pfn) for pfn in expected}) - freed
    for pfn in heads - {number(pfn) for pfn in expected}:
        assert snapshot(folios, pfn) == snapshot(before, pfn)
    for name, want in expected.items():
        if want is None:
            continue
        folio = folios.folio(number(name))
        assert folio.refcount == want["refcount"]
        if "large_mapcount" in want:
            assert folio.large_mapcount == want["large_mapcount"]
        if "entire_mapcount" in want:
            assert folio.entire_mapcount == want["entire_mapcount"]
        if "dirty" in want:
            assert folio.dirty == want["dirty"]
        if folio.order and "mm_ids" in want:
            assert [list(slot) for slot in folio.mm_ids] == want["mm_ids"]
            assert folio.maybe_mapped_shared == want["shared"]
        pages = {
            number(first) + k: (mapcount, exclusive)
            for first, nr, mapcount, exclusive in want["pages"]
            for k in range(nr)
        }
        assert len(pages) == folio.nr_pages
        assert pages == {
            pfn: (folios.page(pfn).mapcount, folios.page(pfn).anon_exclusive)
            for pfn in range(folio.pfn, folio.pfn + folio.nr_pages)
        }


def snapshot(folios: FolioTable, head: int) -> list[Any]:
    folio = folios.folio(head)
    pages = [folios.page(pfn) for pfn in range(head, head + folio.nr_pages)]
    return [
        *(folio.refcount, folio.large_mapcount, folio.entire_mapcount, folio.pincount),
        *((folio.mm_ids, folio.maybe_mapped_shared) if folio.order else ()),
        *((page.mapcount, page.anon_exclusive, page.hwpoison) for page in pages),
    ]


def check_stats(vector: Vector, stats: np.ndarray, fields: tuple[str, ...] = mm.STAT_FIELDS) -> None:
    named = dict(zip(fields, stats.tolist(), strict=False))
    expected = vector["expect"].get("stats", {})
    assert {name: named[name] for name in expected} == expected
    if "batch_hist" in vector["expect"]:
        hist = stats[len(mm.STAT_FIELDS) :]
        assert {str(nr): int(hist[nr]) for nr in hist.nonzero()[0]} == vector["expect"]["batch_hist"]


def test_every_vector_has_provenance():
    for path in sorted(GOLDEN.glob("*.json")):
        data = json.loads(path.read_text())
        if data.get("schema") != "ptebatch-golden/1":
            continue
        assert path.stem in FUNCTIONS
        names = [vector["name"] for vector in load(path.stem)]
        assert len(set(names)) == len(names), f"{path.name}: names repeat"
        for vector in load(path.stem):
            assert vector["source"], vector["name"]
            assert vector["date"] and vector["method"], vector["name"]
            assert ("expect" in vector) != ("error" in vector), vector["name"]


def test_missing_file_fails():
    with pytest.raises(FileNotFoundError):
        load("no_such_function")


@vectors("folio_pte_batch")
def test_folio_pte_batch(impl, vector):
    entries = table(vector["entries"])
    before = entries.copy()
    result = impl.folio_pte_batch(
        entries,
        vector["idx"],
        vector["max_nr"],
        folios=memmap(vector),
        layout=layout(vector),
        semantics=kernel(vector),
        flags=vector["flags"],
        vm_flags=vm_flags(vector["vm_flags"]),
        pte=number(vector["pte"]) if "pte" in vector else None,
    )
    expected = {**vector["expect"], "pte": number(vector["expect"]["pte"])}
    assert result._asdict() == expected
    same_table(entries, before)


@vectors("set_ptes")
def test_set_ptes(impl, vector):
    entries = table(vector["entries"])
    args = (entries, vector["idx"], number(vector["pte"]), vector["nr"])
    if "error" in vector:
        with pytest.raises(getattr(errors, vector["error"])):
            impl.set_ptes(*args, layout=layout(vector))
        same_table(entries, table(vector["entries"]))
    else:
        impl.set_ptes(*args, layout=layout(vector))
        same_table(entries, table(vector["expect"]["entries"]))


@vectors("wrprotect_ptes")
def test_wrprotect_ptes(impl, vector):
    entries = table(vector["entries"])
    if "error" in vector:
        with pytest.raises(getattr(errors, vector["error"])):
            impl.wrprotect_ptes(entries, vector["idx"], vector["nr"], layout=layout(vector))
        same_table(entries, table(vector["entries"]))
    else:
        impl.wrprotect_ptes(entries, vector["idx"], vector["nr"], layout=layout(vector))
        same_table(entries, table(vector["expect"]["entries"]))


def check_copy(vector: Vector, ret: int, dst: np.ndarray, src: np.ndarray, folios: FolioTable, rss: np.ndarray) -> None:
    expect = vector["expect"]
    assert ret == expect["return"]
    same_table(src, table(expect.get("src", vector["src"])))
    same_table(dst, table(expect.get("dst", [])))
    check_folios(vector, folios)
    assert rss.tolist() == expect["rss"]


def check_refused(
    vector: Vector, call: Any, dst: np.ndarray, src: np.ndarray, folios: FolioTable, rss: np.ndarray
) -> None:
    with pytest.raises(getattr(errors, vector["error"])):
        call()
    same_table(src, table(vector["src"]))
    same_table(dst, table([]))
    check_folios({**vector, "expect": {}}, folios)
    assert rss.tolist() == [0, 0, 0, 0]


@vectors("copy_present_ptes")
def test_copy_present_ptes(impl, vector):
    folios = memmap(vector)
    ctx = context(vector, folios)
    dst, src, rss = table([]), table(vector["src"]), np.zeros(4, dtype=np.int64)
    stats = mm.new_stats(ctx.layout)
    prealloc = [number(pfn) for pfn in vector["prealloc"]]

    def call() -> int:
        return impl.copy_present_ptes(ctx, dst, src, vector["idx"], vector["max_nr"], rss, prealloc, stats)

    if "error" in vector:
        check_refused(vector, call, dst, src, folios, rss)
        return
    check_copy(vector, call(), dst, src, folios, rss)
    assert prealloc == [number(pfn) for pfn in vector["expect"].get("prealloc", [])]
    check_stats(vector, stats)


@vectors("copy_nonpresent_pte")
def test_copy_nonpresent_pte(impl, vector):
    folios = memmap(vector)
    ctx = context(vector, folios)
    dst, src, rss = table([]), table(vector["src"]), np.zeros(4, dtype=np.int64)
    stats = mm.new_stats(ctx.layout)

    def call() -> int:
        return impl.copy_nonpresent_pte(ctx, dst, src, vector["idx"], rss, stats)

    if "error" in vector:
        check_refused(vector, call, dst, src, folios, rss)
        return
    check_copy(vector, call(), dst, src, folios, rss)
    slots, counts = folios.swap.table()
    want = [[swap_type << 56 | offset, count] for swap_type, offset, count in vector["expect"].get("swap", [])]
    assert [list(pair) for pair in zip(slots.tolist(), counts.tolist(), strict=True)] == want
    check_stats(vector, stats)


@vectors("copy_pte_range")
def test_copy_pte_range(impl, vector):
    folios = memmap(vector)
    ctx = context(vector, folios)
    dst, src, rss = table([]), table(vector["src"]), np.zeros(4, dtype=np.int64)
    stats = mm.new_stats(ctx.layout)

    def call() -> int:
        return impl.copy_pte_range(ctx, dst, src, vector["idx"], vector["end"], rss, stats)

    if "error" in vector:
        check_refused(vector, call, dst, src, folios, rss)
        return
    check_copy(vector, call(), dst, src, folios, rss)
    check_stats(vector, stats)


def address_space(vector: Vector) -> mm.Mm:
    folios = memmap(vector)
    if "huge_zero_pfn" in vector:
        folios.huge_zero_pfn = number(vector["huge_zero_pfn"])
    tables = sorted(vector["tables"].items(), key=lambda item: number(item[0]))
    space = mm.Mm(
        layout(vector),
        folios,
        vmas=[
            Vma(
                number(spec["start"]),
                number(spec["end"]),
                vm_flags(spec["vm_flags"]),
                anon_vma=spec.get("anon_vma", True),
                vm_ops=spec.get("ops"),
                uffd_event_fork=spec.get("uffd_event_fork", False),
            )
            for spec in vector["vmas"]
        ],
        vpns=np.array([number(addr) >> 12 for addr, _ in tables], dtype=np.int64),
        entries=np.array([table(runs) for _, runs in tables], dtype=np.uint64).reshape(-1, 512),
        pmd_vpns=np.array([number(addr) >> 12 for addr, _ in vector["pmds"]], dtype=np.int64),
        pmd_entries=np.array([number(value) for _, value in vector["pmds"]], dtype=np.uint64),
        has_pinned=vector["has_pinned"],
    )
    assert space.mm_id == 1
    return space


def same_pools(space: mm.Mm, tables: dict[str, Any], pmds: list[Any]) -> None:
    assert [hex(vpn << 12) for vpn in space.vpns.tolist()] == sorted(tables, key=number)
    for addr, row in zip(sorted(tables, key=number), space.entries, strict=True):
        same_table(row, table(tables[addr]))
    assert [
        [hex(vpn << 12), f"{value:#018x}"]
        for vpn, value in zip(space.pmd_vpns.tolist(), space.pmd_entries.tolist(), strict=True)
    ] == pmds


@vectors("fork")
def test_fork(impl_name, vector):
    space = address_space(vector)
    if "error" in vector:
        with pytest.raises(getattr(errors, vector["error"])):
            fork(space, semantics=kernel(vector), impl=impl_name)
        same_pools(space, vector["tables"], vector["pmds"])
        check_folios({**vector, "expect": {}}, space.folios)
        return
    expect = vector["expect"]
    result = fork(space, semantics=kernel(vector), impl=impl_name)
    child = result.child
    same_pools(space, expect.get("tables", vector["tables"]), expect.get("pmds", vector["pmds"]))
    same_pools(child, expect.get("child_tables", {}), expect.get("child_pmds", []))
    check_folios(vector, space.folios)
    assert child.rss.tolist() == expect["rss"]
    assert (child.huge_zero, child.hugetlb_usage) == (expect.get("huge_zero", False), expect.get("hugetlb_usage", 0))
    vmas = expect.get("child_vmas", [[spec["start"], spec["end"], spec["vm_flags"]] for spec in vector["vmas"]])
    assert [(vma.start, vma.end, vma.vm_flags) for vma in child.vmas] == [
        (number(start), number(end), vm_flags(flags)) for start, end, flags in vmas
    ]
    slots = expect.get("swap", vector["swap"])
    assert [space.folios.swap.count(swap_type, offset) for swap_type, offset, _ in slots] == [n for *_, n in slots]
    stats = result.stats.to_dict()
    assert {name: stats[name] for name in expect.get("stats", {})} == expect.get("stats", {})


@vectors("get_and_clear_full_ptes")
def test_get_and_clear_full_ptes(impl, vector):
    for function in ("clear_full_ptes", "get_and_clear_full_ptes"):
        entries = table(vector["entries"])

        def call(entries=entries, function=function) -> int | None:
            return getattr(impl, function)(entries, vector["idx"], vector["nr"], layout=layout(vector))

        if "error" in vector:
            with pytest.raises(getattr(errors, vector["error"])):
                call()
            same_table(entries, table(vector["entries"]))
        else:
            assert call() == (number(vector["expect"]["return"]) if function.startswith("get") else None)
            same_table(entries, table(vector["expect"]["entries"]))


@vectors("zap_present_ptes")
def test_zap_present_ptes(impl, vector):
    folios = memmap(vector)
    ctx = mm.ZapContext(
        layout=layout(vector),
        semantics=kernel(vector),
        folios=folios,
        vma=Vma(0x200000, 0x400000, vm_flags(vector["vm_flags"]), vm_ops=vector["vm_ops"]),
        batching=vector["batching"],
        mm_id=1,
        even_cows=vector["even_cows"],
        drop_markers=vector["drop_markers"],
        pfn_without_page=vector["pfn_without_page"],
    )
    entries, rss, stats = table(vector["entries"]), np.zeros(4, dtype=np.int64), mm.new_zap_stats(ctx.layout)

    def call() -> int:
        return impl.zap_present_ptes(ctx, entries, vector["idx"], vector["max_nr"], rss, stats)

    if "error" in vector:
        with pytest.raises(getattr(errors, vector["error"])):
            call()
        same_table(entries, table(vector["entries"]))
        check_folios({**vector, "expect": {}}, folios)
        assert rss.tolist() == [0, 0, 0, 0]
        return
    assert call() == vector["expect"]["return"]
    same_table(entries, table(vector["expect"]["entries"]))
    check_folios(vector, folios)
    dirty = [number(pfn) for pfn in vector["expect"].get("dirty", [])]
    assert [int(pfn) for pfn in folios.heads() if folios.folio(int(pfn)).dirty] == dirty
    assert rss.tolist() == vector["expect"]["rss"]
    check_stats(vector, stats, mm.ZAP_STAT_FIELDS)
