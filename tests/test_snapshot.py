"""Snapshots: what is written comes back, and nothing that a file says is believed unchecked."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ptebatch import arch, mm, snapshot, workload
from ptebatch.arch import X86_64, X86_64_V6_5
from ptebatch.errors import ArgumentError, SnapshotError, StateError
from ptebatch.folio import FolioTable
from ptebatch.fork import fork
from ptebatch.mm import Mm, Vma
from ptebatch.semantics import LATEST, V6_8
from ptebatch.swap import swap_key

RICH = "size=3MiB,folio=4KiB+16KiB+64KiB,vma=mix,shared=0.2,pinned=0.3,holes=0.1,cowed=0.3,fragmentation=0.3"
Tensors = dict[str, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.snapshot"


@pytest.fixture
def space() -> Mm:
    return workload.parse(RICH).build()


def state(space: Mm) -> tuple[object, ...]:
    arrays = (space.entries, space.vpns, space.pmd_entries, space.pmd_vpns, space.rss)
    return (
        [mm.digest([space], space.folios, semantics) for semantics in (LATEST, V6_8)],
        [array.tobytes() for array in arrays],
        space.vmas,
        (space.layout, space.has_pinned, space.mm_id, space.name),
    )


@given(
    st.integers(0, 100),
    st.sampled_from([RICH, "size=4KiB", "size=512KiB,folio=64KiB,vma=shmem-guard,align=shifted,uffd_wp=0.5"]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(tmp_path: Path, seed: int, text: str) -> None:
    space = workload.parse(f"{text},seed={seed}").build()
    snapshot.save(space, tmp_path / "a", bound=["young", "écrit"], source="a test")
    loaded = snapshot.load(tmp_path / "a")
    assert (loaded.bound, loaded.source, loaded.version) == (("young", "écrit"), "a test", snapshot.VERSION)
    assert state(loaded.mm) == state(space)
    assert loaded.mm.folios == space.folios
    # Both go on alike: the same mm ids and the same free pages are next.
    ours, theirs = fork(space, impl="reference"), fork(loaded.mm, impl="reference")
    assert mm.digest([space, ours.child], space.folios, LATEST) == mm.digest(
        [loaded.mm, theirs.child], loaded.mm.folios, LATEST
    )
    assert ours.child.mm_id == theirs.child.mm_id


def test_everything_odd_round_trips(path: Path) -> None:
    folios = FolioTable()
    folios.add(0x400, 9, anon=True, refcount=513, mapcount=0, entire_mapcount=1, pincount=3)
    folios.add(0x800, 9, hugetlb=True, refcount=1, entire_mapcount=1)
    folios.add(5, anon=True, ksm=True, refcount=2000, mapcount=2)
    folios.add(1 << 39, device=True, mapcount=1 << 23)
    folios.add(0x1000, 2, anon=False, swapbacked=True, mapcount=[1, 0, 2, 0])
    folios.page(0x1001).hwpoison = True
    folios.folio(0x1000).set_mm_ids(((2, 2), (1, 1)))
    folios.folio(0x1000).maybe_mapped_shared = True
    folios.folio(5).dirty = folios.folio(0x400).dirty = folios.folio(0x1000).locked = True
    folios.zero_pfn, folios.huge_zero_pfn = 0x77, 0x800
    folios.swap.add([swap_key(3, 99), swap_key(0, 1 << 49), swap_key(3, 99)])
    for _ in range(4):
        folios.new_mm_id()
    vmas = [
        Vma(0x1000, 0x3000, arch.VM_READ, anon_vma=False, vm_ops="file", name="/lib/ü", pgoff=7, vm_page_prot=0),
        Vma(0x3000, 0x4000, arch.VM_DROPPABLE, vm_ops="special", uffd_event_fork=True, vm_page_prot=(1 << 64) - 1),
    ]
    layout = X86_64_V6_5.configured(mem_soft_dirty=False)
    space = Mm(
        layout,
        folios,
        vmas=vmas,
        vpns=np.array([0], dtype=np.int64),
        pmd_vpns=np.array([512], dtype=np.int64),
        pmd_entries=np.array([0x80000000004000E7], dtype=np.uint64),
        rss=np.array([1, 2, 3, 4]),
        has_pinned=True,
        mm_id=3,
        name="odd",
        huge_zero=True,
        hugetlb_usage=1024,
    )
    space.set_pte(0x2000, arch.swp_entry(layout, 3, 99))
    snapshot.save(space, path)
    loaded = snapshot.load(path).mm
    assert state(loaded) == state(space)
    assert loaded.folios == folios
    assert loaded.folios.folio(0x400).pincount == 3
    assert loaded.folios.folio(5).dirty
    assert (loaded.folios.folio(0x1000).locked, loaded.folios.folio(0x1000).dirty) == (True, False)
    assert loaded.folios.swap.count(3, 99) == 2
    assert (loaded.folios.zero_pfn, loaded.folios.huge_zero_pfn) == (0x77, 0x800)
    assert (loaded.huge_zero, loaded.hugetlb_usage) == (True, 1024)
    assert loaded.folios.folio(0x1000).mm_ids == ((2, 2), (1, 1))
    assert loaded.folios.new_mm_id() == folios.new_mm_id()


def test_same_state_same_bytes(space: Mm, tmp_path: Path) -> None:
    for name in "ab":
        snapshot.save(space, tmp_path / name, bound=["x"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_loaded_arrays_are_writable_and_own(space: Mm, path: Path) -> None:
    snapshot.save(space, path)
    loaded = snapshot.load(path).mm
    path.unlink()
    loaded.entries[...] = 0
    assert loaded.entries.flags.c_contiguous


def test_file_is_replaced_or_left_alone(space: Mm, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "save_file", full)
        with pytest.raises(SnapshotError, match="No space left"):
            snapshot.save(space, path)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]
    snapshot.save(space, path)
    assert os.listdir(path.parent) == [path.name]
    snapshot.load(path)


def test_file_has_ordinary_permissions(space: Mm, path: Path) -> None:
    snapshot.save(space, path)
    ordinary = path.with_name("ordinary")
    ordinary.touch()
    assert path.stat().st_mode == ordinary.stat().st_mode


def test_save_refuses(space: Mm, path: Path) -> None:
    with pytest.raises(SnapshotError, match="No such file"):
        snapshot.save(space, path / "nowhere" / "file")
    with pytest.raises(ArgumentError, match="strings of up to"):
        snapshot.save(space, path, source="x" * 5000)
    with pytest.raises(ArgumentError, match="strings of up to"):
        snapshot.save(space, path, bound=[3])  # type: ignore[list-item]
    del space.vmas[0]
    with pytest.raises(StateError, match="outside every VMA"):
        snapshot.save(space, path)
    assert os.listdir(path.parent) == []


# --- hostile files ----------------------------------------------------------------------------------------------------
def rewrite(path: Path, change: Callable[[Tensors, dict[str, Any]], object]) -> None:
    """Change tensors and the JSON text of a snapshot, keeping it a good safetensors file."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    document = json.loads(header["__metadata__"][snapshot.KEY])
    tensors = load_file(path)
    change(tensors, document)
    save_file(tensors, path, metadata={snapshot.KEY: json.dumps(document)})


def put(name: str, value: object, at: Any = 0) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, document: dict[str, Any]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][at] = value

    return change


def become(name: str, make: Callable[[Any], Any]) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, document: dict[str, Any]) -> None:
        tensors[name] = make(tensors[name])

    return change


def say(**values: object) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, document: document.update(values)


def both_slots(tensors: Tensors, document: dict[str, Any]) -> None:
    for name, value in (("large.mm_id", 1), ("large.mm_id_mapcount", 2)):
        tensors[name] = np.full_like(tensors[name], value)


def swapped(tensors: Tensors, document: dict[str, Any]) -> None:
    tensors["folios.pfn"] = tensors["folios.pfn"][::-1].copy()


def ksm_file(tensors: Tensors, document: dict[str, Any]) -> None:
    tensors["folios.bits"] = np.full_like(tensors["folios.bits"], 4)


def exclusive_file(tensors: Tensors, document: dict[str, Any]) -> None:
    tensors["folios.bits"] = np.zeros_like(tensors["folios.bits"])
    tensors["pages.bits"] = np.ones_like(tensors["pages.bits"])


def hugetlb_slots(tensors: Tensors, document: dict[str, Any]) -> None:
    tensors["folios.bits"] = np.full_like(tensors["folios.bits"], 9)


def slots(keys: list[int], counts: list[int]) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, document: dict[str, Any]) -> None:
        tensors["swap.slot"] = np.array(keys, dtype=np.uint64)
        tensors["swap.count"] = np.array(counts, dtype=np.int64)

    return change


HOSTILE = [
    ("metadata.version", say(version=1)),
    ("folios.flags", put("folios.flags", 4)),
    ("swap.slot", slots([7, 7], [1, 1])),
    ("swap.slot", slots([7, 5], [1, 1])),
    ("swap.slot", slots([1 << 63], [1])),
    ("swap.count", slots([7, 8], [1])),
    ("swap.count", slots([7], [0])),
    ("swap.count", slots([7], [1 << 31])),
    ("metadata.version", say(version=True)),
    ("metadata.version", say(version=10**300)),
    ("metadata.layout", say(layout="vax")),
    ("metadata.layout", say(layout=7)),
    ("metadata.name", say(name="x" * 5000)),
    ("metadata.name", say(name=None)),
    ("metadata.bound", say(bound=[1])),
    ("metadata.bound", say(bound="young")),
    ("metadata.has_pinned", say(has_pinned=1)),
    ("metadata.mem_soft_dirty", say(mem_soft_dirty="yes")),
    ("metadata.mm_id", say(mm_id=0)),
    ("metadata.mm_id", say(mm_id=1 << 20)),
    ("metadata.mm_id", say(mm_id=1.0)),
    ("metadata.next_mm_id", say(next_mm_id=1)),
    ("metadata.zero_pfn", say(zero_pfn=-1)),
    ("metadata.zero_pfn", say(zero_pfn="0")),
    ("metadata.huge_zero_pfn", say(huge_zero_pfn=1 << 40)),
    ("metadata.huge_zero_pfn", say(huge_zero_pfn=True)),
    ("metadata.huge_zero", say(huge_zero=1)),
    ("metadata.hugetlb_usage", say(hugetlb_usage=-1)),
    ("metadata.hugetlb_usage", say(hugetlb_usage=None)),
    ("metadata: NaN", say(mm_id=float("nan"))),
    ("metadata: Infinity", say(mm_id=float("inf"))),
    ("metadata.vma_names", say(vma_names=[])),
    ("metadata.'extra'", say(extra=1)),
    ("metadata.'source'", lambda tensors, document: document.pop("source")),
    ("tables.vpn", become("tables.vpn", lambda a: a.astype(np.uint64))),
    ("tables.vpn", put("tables.vpn", -512)),
    ("tables.vpn", put("tables.vpn", 1 << 60, -1)),
    ("vpns must be ascending", put("tables.vpn", 1)),
    ("vpns must be ascending", become("tables.vpn", lambda a: np.full_like(a, 512))),
    ("tables.entries", become("tables.entries", lambda a: a[:, :256].copy())),
    ("tables.entries", become("tables.entries", lambda a: a[:1])),
    ("tables.entries", become("tables.entries", lambda a: a.view(np.int64))),
    ("tables.entries", become("tables.entries", lambda a: a.view(np.float64))),
    ("tables.vpn", become("tables.vpn", lambda a: a.reshape(1, -1))),
    ("tables.vpn", become("tables.vpn", lambda a: np.array(a[0]))),
    ("outside every VMA", put("tables.entries", 0x1067, (-1, -1))),
    ("rss", put("rss", -1)),
    ("rss", become("rss", lambda a: a[:3])),
    ("vmas.start", put("vmas.start", (1 << 64) - 1)),
    ("VMA", put("vmas.start", 1)),
    ("VMA", put("vmas.end", 0)),
    ("vmas.ops", put("vmas.ops", 5)),
    ("vmas.bits", put("vmas.bits", 255)),
    ("vmas.pgoff", put("vmas.pgoff", 1 << 60)),
    ("vmas.end", become("vmas.end", lambda a: a[1:])),
    ("folios.pfn", put("folios.pfn", -4)),
    ("folios.pfn", put("folios.pfn", 1 << 40, -1)),
    ("folios.pfn", put("folios.pfn", (1 << 63) - 1, -1)),
    ("folios.pfn", swapped),
    ("not aligned", put("folios.pfn", (1 << 18) + 1)),
    ("overlap", become("folios.pfn", lambda a: np.full_like(a, 1 << 18))),
    ("folios.order", put("folios.order", 19)),
    ("folios.order", put("folios.order", 255)),
    ("pages", put("folios.order", 3)),
    ("folios.bits", put("folios.bits", 32)),
    ("folios.bits", ksm_file),
    ("pages.bits", exclusive_file),
    ("pages.bits", put("pages.bits", 4)),
    ("pages", become("pages.mapcount", lambda a: a[1:])),
    ("pages.mapcount", put("pages.mapcount", 1 << 24)),
    ("folios.refcount", put("folios.refcount", 1 << 26)),
    ("large.pincount", put("large.pincount", 1 << 26)),
    ("large.large_mapcount", put("large.large_mapcount", 1 << 26)),
    ("large.entire_mapcount", put("large.entire_mapcount", (1 << 32) - 1)),
    ("large.entire_mapcount", put("large.entire_mapcount", 1)),
    ("large.mm_id", put("large.mm_id", 77)),
    ("large.mm_id", put("large.mm_id", 0)),
    ("large.mm_id", both_slots),
    ("large.mm_id", hugetlb_slots),
    ("large.mm_id", become("large.mm_id", lambda a: a[:, :1].copy())),
    ("large.mm_id_mapcount", put("large.mm_id_mapcount", 1 << 26)),
    ("large.bits", put("large.bits", 32)),
    ("'unknown'", lambda tensors, document: tensors.update(unknown=np.zeros(1))),
    ("'rss'", lambda tensors, document: tensors.pop("rss")),
]


@pytest.mark.parametrize(("names", "change"), HOSTILE, ids=[f"{i}-{name}" for i, (name, _) in enumerate(HOSTILE)])
def test_bad_values_are_named(space: Mm, path: Path, names: str, change: Callable[[Tensors, Any], object]) -> None:
    snapshot.save(space, path)
    rewrite(path, change)
    with pytest.raises(SnapshotError) as caught:
        snapshot.load(path)
    assert names in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_scattered_pages_get_no_memory(path: Path) -> None:
    folios = FolioTable()
    folios.add_folios(np.arange(1, 1 << 16), 0)
    snapshot.save(Mm(X86_64, folios), path)
    rewrite(path, become("folios.pfn", lambda a: np.arange(1, 1 << 16) << 24))
    tracemalloc.start()
    with pytest.raises(SnapshotError, match=r"folios\.pfn.*too far apart"):
        snapshot.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


def header_only(header: object, length: int | None = None, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def claim(entries: int) -> dict[str, object]:
    huge = {"dtype": "U64", "shape": [entries, 512], "data_offsets": [0, entries * 4096]}
    return {"__metadata__": {snapshot.KEY: "{}"}, "tables.entries": huge}


FOREIGN = {
    "empty": b"",
    "short": b"\x10",
    "zeros": bytes(64),
    "text": b"root:x:0:0:root:/root:/bin/bash\n" * 10,
    "header beyond the file": header_only(b"{}", 1 << 40),
    "negative header": header_only(b"{}", (1 << 64) - 1),
    "header just beyond": header_only(b"{}", 3),
    "not JSON": header_only(b"{" + b"x" * 100),
    "not UTF-8": header_only(b'{"\xff\xfe": 1}'),
    "a list": header_only([1, 2, 3]),
    "nothing": header_only({}),
    "claims 4 EiB": header_only(claim(1 << 50)),
    "claims 1 TiB": header_only(claim(1 << 28)),
    "overflowing shape": header_only(
        {"tables.entries": {"dtype": "U64", "shape": [1 << 62, 8], "data_offsets": [0, 0]}}
    ),
    "negative shape": header_only({"rss": {"dtype": "I64", "shape": [-1], "data_offsets": [0, 8]}}, data=bytes(8)),
    "backward offsets": header_only({"rss": {"dtype": "I64", "shape": [1], "data_offsets": [8, 0]}}, data=bytes(8)),
    "unknown dtype": header_only({"rss": {"dtype": "X9", "shape": [1], "data_offsets": [0, 8]}}, data=bytes(8)),
    "metadata of numbers": header_only({"__metadata__": {snapshot.KEY: 1}}),
    "metadata not JSON": header_only({"__metadata__": {snapshot.KEY: "{"}}),
    "metadata a list": header_only({"__metadata__": {snapshot.KEY: "[]"}}),
    "metadata deep": header_only({"__metadata__": {snapshot.KEY: "[" * 200000}}),
    "metadata a huge number": header_only({"__metadata__": {snapshot.KEY: "9" * 100000}}),
    "other metadata": header_only({"__metadata__": {"format": "pt"}}),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_files(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(SnapshotError) as caught:
        snapshot.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert len(str(caught.value)) < 500


def test_header_is_bounded(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", snapshot.MAX_HEADER + 1))
        file.truncate(1 << 30)
    with pytest.raises(SnapshotError, match="header"):
        snapshot.load(path)


def test_size_is_bounded(space: Mm, path: Path) -> None:
    snapshot.save(space, path)
    with pytest.raises(SnapshotError, match="max_bytes"):
        snapshot.load(path, max_bytes=1000)
    with open(path, "wb") as file:
        file.truncate(snapshot.MAX_BYTES + 1)
    with pytest.raises(SnapshotError, match="max_bytes"):
        snapshot.load(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="No such file"):
        snapshot.load(tmp_path / "nothing")
    with pytest.raises(SnapshotError, match="regular"):
        snapshot.load(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SnapshotError, match="regular"):
        snapshot.load(tmp_path / "fifo")


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_an_error_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    """Cut short, or with bytes overwritten, a file gives SnapshotError or an address space that validates."""
    path = tmp_path / "damaged"
    snapshot.save(workload.parse("size=128KiB,folio=4KiB+16KiB,vma=mix,shared=0.3").build(), path)
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
        whole = False
    else:
        whole = True
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        loaded = snapshot.load(path)
    except SnapshotError:
        return
    assert whole
    loaded.mm.validate(entries=True)
