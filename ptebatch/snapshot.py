"""An address space on disk: `save` and `load`.

A snapshot is one safetensors file. Its header carries a JSON text under the key ``ptebatch-snapshot``: version,
layout, names, and what was inferred. Its tensors are columns: ``tables.*`` and ``pmds.*`` (the two pools), ``vmas.*``,
``folios.*`` by ascending PFN, ``large.*`` of those folios that have more than one page, ``pages.*`` of all folios'
pages in the same order, ``swap.*``, the swap slots in use, and ``rss``.

A file may come from anywhere, so `load` trusts nothing in it: the header is bounded by the size of the file before it
is read, every tensor has to have its dtype and shape before it is read, and every value is checked before anything is
built from it. What is allocated stays in proportion to the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ptebatch import folio as f
from ptebatch.arch import LAYOUTS, PteLayout
from ptebatch.errors import ArgumentError, PtebatchError, SnapshotError
from ptebatch.folio import FolioTable
from ptebatch.mm import NR_MM_COUNTERS, VM_OPS, Mm, Vma
from ptebatch.swap import KEY_TYPE_SHIFT, MAX_SWAP_COUNT, SwapTable

__all__ = ["MAX_BYTES", "VERSION", "Snapshot", "load", "save"]

Array = npt.NDArray[Any]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

VERSION = 2
KEY = "ptebatch-snapshot"
MAX_BYTES = 64 << 30
"""Largest file that `load` reads unless told otherwise."""
MAX_HEADER = 32 << 20
MAX_TEXT = 4096
MAX_VMAS = 1 << 20
MAX_VPN = 1 << 51

# Column -> (safetensors dtype, number of columns or 0 for one dimension); first dimension by the part of the name.
_COLUMNS = {
    "tables.vpn": ("I64", 0),
    "tables.entries": ("U64", -1),
    "pmds.vpn": ("I64", 0),
    "pmds.entry": ("U64", 0),
    "vmas.start": ("U64", 0),
    "vmas.end": ("U64", 0),
    "vmas.vm_flags": ("U64", 0),
    "vmas.pgoff": ("U64", 0),
    "vmas.vm_page_prot": ("U64", 0),
    "vmas.ops": ("U8", 0),
    "vmas.bits": ("U8", 0),
    "folios.pfn": ("I64", 0),
    "folios.order": ("U8", 0),
    "folios.bits": ("U8", 0),
    "folios.flags": ("U8", 0),
    "folios.refcount": ("U32", 0),
    "large.large_mapcount": ("U32", 0),
    "large.entire_mapcount": ("U32", 0),
    "large.pincount": ("U32", 0),
    "large.bits": ("U8", 0),
    "large.mm_id": ("U32", 2),
    "large.mm_id_mapcount": ("U32", 2),
    "pages.mapcount": ("U32", 0),
    "pages.bits": ("U8", 0),
    "swap.slot": ("U64", 0),
    "swap.count": ("I64", 0),
    "rss": ("I64", 0),
}
_VMA_BITS = ("anon_vma", "uffd_event_fork", "has_vm_page_prot")
_FOLIO_BITS = (f.ANON_BIT, f.SWAPBACKED_BIT, f.KSM_BIT, f.HUGETLB_BIT, f.DEVICE_BIT)
_PAGE_BITS = (f.AE_BIT, f.HWPOISON_BIT)
_FOLIO_FLAGS = (f.AUX_DIRTY_BIT, f.AUX_LOCKED_BIT)
_AUX_BITS = (f.AUX_SHARED_BIT,)


@dataclass(frozen=True)
class Snapshot:
    """What `load` returns.

    Attributes
    ----------
    mm : Mm
        With a FolioTable of its own.
    bound : tuple of str
        What was inferred rather than seen when the address space was captured.
    source : str
        Where it came from, for people.
    version : int
        Of the file format.
    """

    mm: Mm
    bound: tuple[str, ...]
    source: str
    version: int


def save(mm: Mm, path: str | os.PathLike[str], *, bound: Iterable[str] = (), source: str = "") -> None:
    """Write an address space, with the whole FolioTable it is in, to a file.

    The file appears complete or not at all; one of that name is replaced. The same state gives the same bytes.

    Parameters
    ----------
    mm : Mm
    path : path
    bound : iterable of str
        What was inferred; kept for `Snapshot.bound`.
    source : str
        Where the address space came from; kept for `Snapshot.source`.

    Raises
    ------
    ArgumentError, StateError
        An address space that is not consistent (see `Mm.validate`), or texts that are too long.
    SnapshotError
        The file cannot be written.
    """
    mm.validate(entries=True)
    document = {
        "version": VERSION,
        "layout": mm.layout.name,
        "mem_soft_dirty": mm.layout.soft_dirty != 0,
        "shstk": mm.layout.shstk,
        "name": mm.name,
        "source": source,
        "bound": list(bound),
        "has_pinned": bool(mm.has_pinned),
        "mm_id": int(mm.mm_id),
        "next_mm_id": int(mm.folios._next_mm_id),
        "huge_zero": bool(mm.huge_zero),
        "hugetlb_usage": int(mm.hugetlb_usage),
        "zero_pfn": mm.folios.zero_pfn,
        "huge_zero_pfn": mm.folios.huge_zero_pfn,
        "vma_names": [vma.name for vma in mm.vmas],
    }
    if mm.layout != _layout(document, ArgumentError, [name for name, _ in mm.layout.variants]):
        raise ArgumentError(f"layout {mm.layout.name} has been changed by hand; snapshots know {', '.join(LAYOUTS)}")
    texts = [mm.name, source, *document["bound"], *document["vma_names"]]  # type: ignore[misc]
    if any(not isinstance(text, str) or len(text) > MAX_TEXT for text in texts):
        raise ArgumentError(f"name, source, bound and VMA names must be strings of up to {MAX_TEXT} characters")
    header = json.dumps(document, ensure_ascii=True, allow_nan=False)
    if len(header) > MAX_HEADER // 4:
        raise ArgumentError(f"name, source, bound and VMA names together must stay below {MAX_HEADER // 4} characters")
    columns = {name: np.ascontiguousarray(column) for name, column in _columns(mm).items()}

    target = Path(path)
    temporary: Path | None = None
    try:
        part = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}")
        with open(part, "xb") as file:
            temporary = part
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        save_file(columns, part, metadata={KEY: header})  # may put a private file of its own in place of this one
        with open(part, "rb") as file:
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(part, target)
        temporary = None
    except (OSError, SafetensorError) as error:
        raise SnapshotError(f"{target}: cannot be written: {error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def load(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Snapshot:
    """Read an address space from a file that `save` wrote.

    Parameters
    ----------
    path : path
    max_bytes : int
        Refuse larger files.

    Returns
    -------
    Snapshot

    Raises
    ------
    SnapshotError
        The file cannot be read, is not a snapshot, or holds a value that cannot be; the message names it.
    """
    try:
        size = _check_file(path, max_bytes)
        with safe_open(os.fspath(path), framework="numpy") as file:
            document = _document((file.metadata() or {}).get(KEY))
            columns = _read(file, _layout(document, SnapshotError))
        return _build(document, columns, size)
    except SnapshotError as error:
        raise SnapshotError(f"{os.fspath(path)}: {error}") from error.__cause__
    except OSError as error:
        raise SnapshotError(f"{os.fspath(path)}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, PtebatchError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise SnapshotError(f"{os.fspath(path)}: not a snapshot, or a damaged one: {error}") from error


# --- writing ----------------------------------------------------------------------------------------------------------
def _columns(mm: Mm) -> dict[str, Array]:
    folios = mm.folios
    heads = np.asarray(folios.heads()).astype(np.int64)
    at = folios.lookup(heads)
    orders = _field(folios._words[at], f.ORDER_SHIFT, f.ORDER_BITS).astype(np.int64)
    pages = folios._words[folios.lookup(_pages_of(heads, orders))]
    words = folios._words[at]
    large, order = at[orders > 0], orders[orders > 0]
    aux = np.stack(folios._mm_slots(large), axis=1)
    entire = np.zeros(len(large), dtype=np.uint64)
    has_entire = f.has_entire_mapcount(order, folios._words[large] >> np.uint64(f.HUGETLB_BIT) & np.uint64(1) != 0)
    entire[has_entire] = folios._words[large[has_entire] + 2]
    return {
        "tables.vpn": mm.vpns,
        "tables.entries": mm.entries,
        "pmds.vpn": mm.pmd_vpns,
        "pmds.entry": mm.pmd_entries,
        "vmas.start": np.array([vma.start for vma in mm.vmas], dtype=np.uint64),
        "vmas.end": np.array([vma.end for vma in mm.vmas], dtype=np.uint64),
        "vmas.vm_flags": np.array([vma.vm_flags for vma in mm.vmas], dtype=np.uint64),
        "vmas.pgoff": np.array([vma.pgoff for vma in mm.vmas], dtype=np.uint64),
        "vmas.vm_page_prot": np.array([vma.vm_page_prot or 0 for vma in mm.vmas], dtype=np.uint64),
        "vmas.ops": np.array([VM_OPS.index(vma.vm_ops) for vma in mm.vmas], dtype=np.uint8),
        "vmas.bits": np.array(
            [vma.anon_vma | vma.uffd_event_fork << 1 | (vma.vm_page_prot is not None) << 2 for vma in mm.vmas],
            dtype=np.uint8,
        ),
        "folios.pfn": heads,
        "folios.order": orders.astype(np.uint8),
        "folios.bits": _gather(words, _FOLIO_BITS),
        "folios.flags": _gather(folios._aux[at], _FOLIO_FLAGS),
        "folios.refcount": _field(words, f.COUNTER_SHIFT, f.COUNTER_BITS),
        "large.large_mapcount": _field(folios._words[large + 1], f.COUNTER_SHIFT, f.COUNTER_BITS),
        "large.entire_mapcount": _field(entire, f.COUNTER_SHIFT, f.COUNTER_BITS),
        "large.pincount": np.array(
            [folios._pincounts.get(head, 0) for head in heads[orders > 0].tolist()], dtype=np.uint32
        ),
        "large.bits": _gather(aux[:, 0], _AUX_BITS),
        "large.mm_id": _field(aux, f.AUX_COUNT_BITS, f.AUX_ID_BITS),
        "large.mm_id_mapcount": _field(aux, 0, f.AUX_COUNT_BITS),
        "pages.mapcount": _field(pages, 0, f.MAPCOUNT_BITS),
        "pages.bits": _gather(pages, _PAGE_BITS),
        "swap.slot": folios.swap.table()[0],
        "swap.count": folios.swap.table()[1],
        "rss": mm.rss,
    }


def _field(words: U64, shift: int, bits: int) -> npt.NDArray[np.uint32]:
    return (words >> np.uint64(shift) & np.uint64((1 << bits) - 1)).astype(np.uint32)


def _gather(words: U64, bits: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Collect scattered bits: the first of `bits` becomes bit 0."""
    out = np.zeros(len(words), dtype=np.uint8)
    for i, bit in enumerate(bits):
        out |= _field(words, bit, 1).astype(np.uint8) << np.uint8(i)
    return out


def _scatter(packed: Array, bits: tuple[int, ...]) -> U64:
    """Undo `_gather`."""
    out = np.zeros(len(packed), dtype=np.uint64)
    for i, bit in enumerate(bits):
        out |= (packed.astype(np.uint64) >> np.uint64(i) & np.uint64(1)) << np.uint64(bit)
    return out


def _pages_of(heads: I64, orders: I64) -> I64:
    """Return the PFNs of all pages of folios."""
    nr = np.int64(1) << orders
    first = np.cumsum(nr) - nr
    return np.arange(int(nr.sum()), dtype=np.int64) + np.repeat(heads - first, nr)


# --- reading ----------------------------------------------------------------------------------------------------------
def _fail(field: str, what: str) -> NoReturn:
    raise SnapshotError(f"{field}: {what}")


def _check_file(path: str | os.PathLike[str], max_bytes: int) -> int:
    """Check that the file is one and that its header fits into it; return its size."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise SnapshotError("not a regular file")
    if about.st_size > max_bytes:
        raise SnapshotError(f"{about.st_size} bytes are more than the {max_bytes} allowed; pass a larger max_bytes")
    with open(path, "rb") as file:
        length = file.read(8)
    header = int.from_bytes(length, "little")
    if len(length) < 8 or header < 2 or header > about.st_size - 8:
        raise SnapshotError("not a snapshot, or cut short: its header does not fit into the file")
    if header > MAX_HEADER:
        raise SnapshotError(f"header: {header} bytes are more than a snapshot has ({MAX_HEADER})")
    return about.st_size


def _no_constant(text: str) -> NoReturn:
    raise SnapshotError(f"metadata: {text} is no number a snapshot has")


_DOCUMENT: dict[str, Any] = {
    "version": int,
    "layout": str,
    "mem_soft_dirty": bool,
    "shstk": bool,
    "name": str,
    "source": str,
    "bound": list,
    "has_pinned": bool,
    "mm_id": int,
    "next_mm_id": int,
    "huge_zero": bool,
    "hugetlb_usage": int,
    "zero_pfn": (int, NoneType),
    "huge_zero_pfn": (int, NoneType),
    "vma_names": list,
}


def _document(text: str | None) -> dict[str, Any]:
    if text is None:
        raise SnapshotError(f"not a snapshot: a safetensors file without {KEY} in its metadata")
    try:
        document = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"metadata: not JSON: {error}") from error
    if not isinstance(document, dict):
        _fail("metadata", "not a JSON object")
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        _fail("metadata.version", f"{_shown(version)} is not {VERSION}, the version this program reads")
    if set(document) != set(_DOCUMENT):
        wrong = sorted(set(document) ^ set(_DOCUMENT))[0]
        _fail(f"metadata.{_shown(wrong)}", "missing" if wrong in _DOCUMENT else "unknown")
    for key, kind in _DOCUMENT.items():
        value: Any = document[key]
        if type(value) not in (kind if isinstance(kind, tuple) else (kind,)):
            name = kind.__name__ if isinstance(kind, type) else "int or null"
            _fail(f"metadata.{key}", f"must be of type {name}, not {type(value).__name__}")
        for item in list(value) if kind is list else [value]:
            if kind in (list, str) and (not isinstance(item, str) or len(item) > MAX_TEXT):
                _fail(f"metadata.{key}", f"must be text of up to {MAX_TEXT} characters")
    for key in ("mm_id", "next_mm_id"):
        if not 1 <= document[key] <= f.MAX_MM_ID + (key == "next_mm_id"):
            _fail(f"metadata.{key}", f"{_shown(document[key])} is out of range")
    for key, most in (("hugetlb_usage", 1 << 52), ("zero_pfn", f.MAX_PFN), ("huge_zero_pfn", f.MAX_PFN)):
        if document[key] is not None and not 0 <= document[key] <= most:
            _fail(f"metadata.{key}", f"{_shown(document[key])} is out of range")
    if document["mm_id"] >= document["next_mm_id"]:
        _fail("metadata.next_mm_id", "must exceed every mm_id in use")
    return document


def _shown(value: object) -> str:
    return repr(value)[:40] if not isinstance(value, int) or value.bit_length() < 70 else "a huge number"


def _layout(document: dict[str, Any], error: type[PtebatchError], features: list[str] | None = None) -> PteLayout:
    """Return the layout a document names; with `features`, as a kernel that has only these of its variants uses it."""
    layout = LAYOUTS.get(document["layout"])
    if layout is None:
        raise error(f"metadata.layout: {_shown(document['layout'])} is not one of {', '.join(LAYOUTS)}")
    without = [] if features is None else [name for name, _ in layout.variants if name not in features]
    return layout.configured(document["mem_soft_dirty"], document["shstk"], without=without)


def _read(file: Any, layout: PteLayout) -> dict[str, Array]:
    """Read all tensors, after their names, dtypes and shapes proved right; sizes only ever come from the file."""
    names = set(file.keys())
    if names != set(_COLUMNS):
        wrong = sorted(names ^ set(_COLUMNS))[0]
        _fail(_shown(wrong), "missing tensor" if wrong in _COLUMNS else "unknown tensor")
    lengths: dict[str, int] = {"rss": NR_MM_COUNTERS}
    for name, (dtype, width) in _COLUMNS.items():
        about = file.get_slice(name)
        shape = list(about.get_shape())
        if about.get_dtype() != dtype:
            _fail(name, f"must be {dtype}, not {about.get_dtype()}")
        part = name.partition(".")[0]
        rows = lengths.setdefault(part, shape[0] if shape else 0)
        expected = [rows, layout.ptrs_per_pte if width < 0 else width] if width else [rows]
        if shape != expected:
            _fail(name, f"must have shape {expected}, not {_shown(shape)}")
    return {name: np.array(file.get_tensor(name)) for name in _COLUMNS}


def _at_most(columns: dict[str, Array], name: str, most: int) -> None:
    column = columns[name]
    if column.size and int(column.max()) > most:
        _fail(name, f"{int(column.max())} is more than {most}")


def _build(document: dict[str, Any], columns: dict[str, Array], size: int) -> Snapshot:
    layout = _layout(document, SnapshotError)
    folios = _build_folios(columns, document, size)
    vmas = _build_vmas(columns, document["vma_names"])
    for name in ("tables.vpn", "pmds.vpn"):
        if columns[name].size and not 0 <= int(columns[name].min()) <= int(columns[name].max()) <= MAX_VPN:
            _fail(name, f"must be in 0..{MAX_VPN}")
    rss = columns["rss"]
    if int(rss.min()) < 0:
        _fail("rss", "must not be negative")
    mm = Mm(
        layout,
        folios,
        vmas=vmas,
        vpns=columns["tables.vpn"],
        entries=columns["tables.entries"],
        pmd_vpns=columns["pmds.vpn"],
        pmd_entries=columns["pmds.entry"],
        rss=rss,
        has_pinned=document["has_pinned"],
        mm_id=document["mm_id"],
        name=document["name"],
        huge_zero=document["huge_zero"],
        hugetlb_usage=document["hugetlb_usage"],
    )
    folios.zero_pfn, folios.huge_zero_pfn = document["zero_pfn"], document["huge_zero_pfn"]
    try:
        mm.validate(entries=True)
    except PtebatchError as error:
        raise SnapshotError(f"tables or vmas: {error}") from error
    return Snapshot(mm, tuple(document["bound"]), document["source"], document["version"])


def _build_vmas(columns: dict[str, Array], names: list[str]) -> list[Vma]:
    n = len(columns["vmas.start"])
    if n > MAX_VMAS:
        _fail("vmas", f"{n} VMAs are more than {MAX_VMAS}")
    if len(names) != n:
        _fail("metadata.vma_names", f"{len(names)} names for {n} VMAs")
    _at_most(columns, "vmas.ops", len(VM_OPS) - 1)
    _at_most(columns, "vmas.bits", (1 << len(_VMA_BITS)) - 1)
    for name in ("vmas.start", "vmas.end"):
        _at_most(columns, name, 1 << 63)
    _at_most(columns, "vmas.pgoff", 1 << 52)
    keys = ("start", "end", "vm_flags", "pgoff", "vm_page_prot", "ops", "bits")
    rows = zip(*(columns[f"vmas.{key}"].tolist() for key in keys), names, strict=True)
    return [
        Vma(
            start=start,
            end=end,
            vm_flags=vm_flags,
            anon_vma=bool(bits & 1),
            vm_ops=VM_OPS[ops],
            name=name,
            pgoff=pgoff,
            vm_page_prot=prot if bits & 4 else None,
            uffd_event_fork=bool(bits & 2),
        )
        for start, end, vm_flags, pgoff, prot, ops, bits, name in rows
    ]


def _build_folios(columns: dict[str, Array], document: dict[str, Any], size: int) -> FolioTable:
    heads = columns["folios.pfn"]
    if heads.size and not 0 <= int(heads.min()) <= int(heads.max()) <= f.MAX_PFN:
        _fail("folios.pfn", f"must be in 0..{f.MAX_PFN:#x}")
    _at_most(columns, "folios.order", f.MAX_ORDER)
    orders = columns["folios.order"].astype(np.int64)
    nr = np.int64(1) << orders
    if (heads & (nr - 1)).any():
        _fail("folios.pfn", "a folio is not aligned to its size")
    if (heads[:-1] + nr[:-1] > heads[1:]).any():
        _fail("folios.pfn", "folios overlap or are out of order")
    if heads.size and int(heads[-1] + nr[-1]) > f.MAX_PFN + 1:
        _fail("folios.pfn", f"a folio reaches beyond {f.MAX_PFN:#x}")
    if int(nr.sum()) != len(columns["pages.mapcount"]):
        _fail("pages", f"{len(columns['pages.mapcount'])} pages for folios of {int(nr.sum())}")
    nr_large = int(np.count_nonzero(orders))
    if nr_large != len(columns["large.pincount"]):
        _fail("large", f"{len(columns['large.pincount'])} rows for {nr_large} large folios")
    _check_spread(heads, nr, size)

    _at_most(columns, "folios.bits", (1 << len(_FOLIO_BITS)) - 1)
    _at_most(columns, "folios.flags", (1 << len(_FOLIO_FLAGS)) - 1)
    _at_most(columns, "large.bits", (1 << len(_AUX_BITS)) - 1)
    _at_most(columns, "pages.bits", (1 << len(_PAGE_BITS)) - 1)
    _at_most(columns, "pages.mapcount", f.MAX_MAPCOUNT)
    for name in ("folios.refcount", "large.large_mapcount", "large.entire_mapcount", "large.pincount"):
        _at_most(columns, name, f.MAX_COUNTER)
    _at_most(columns, "large.mm_id_mapcount", f.MAX_COUNTER)
    _at_most(columns, "large.mm_id", document["next_mm_id"] - 1)

    flags = _scatter(columns["folios.bits"], _FOLIO_BITS)
    anon, swapbacked, ksm, hugetlb, device = (flags >> np.uint64(bit) & np.uint64(1) == 1 for bit in _FOLIO_BITS)
    if (ksm & ~anon).any():
        _fail("folios.bits", "a KSM folio is not anonymous")
    exclusive = columns["pages.bits"] & 1 == 1
    if (exclusive & ~np.repeat(anon, nr)).any():
        _fail("pages.bits", "a page is anon-exclusive but not anonymous")
    large = orders > 0
    ids, counts = columns["large.mm_id"], columns["large.mm_id_mapcount"]
    if ((ids == 0) != (counts == 0)).any() or ((ids[:, 0] == ids[:, 1]) & (ids[:, 0] != 0)).any():
        _fail("large.mm_id", "a slot without mappings, mappings without a slot, or one mm in both slots")
    if (ids[hugetlb[large]] != 0).any() or (columns["large.bits"][hugetlb[large]] & 1).any():
        _fail("large.mm_id", "a hugetlb folio has MM-ID slots")
    has_entire = f.has_entire_mapcount(orders[large], hugetlb[large])
    if columns["large.entire_mapcount"][~has_entire].any():
        _fail("large.entire_mapcount", "a folio has one that is too small for it")

    folios = FolioTable()
    if not len(heads):
        return _finish(folios, document, columns, 0)
    folios.add_folios(heads, orders, anon=anon, swapbacked=swapbacked, ksm=ksm, hugetlb=hugetlb, device=device)
    pages = folios.lookup(_pages_of(heads, orders))
    folios._words[pages] |= columns["pages.mapcount"].astype(np.uint64) | _scatter(columns["pages.bits"], _PAGE_BITS)
    at = folios.lookup(heads)
    folios._aux[at] = _scatter(columns["folios.flags"], _FOLIO_FLAGS)
    folios._words[at] |= columns["folios.refcount"].astype(np.uint64) << np.uint64(f.COUNTER_SHIFT)
    at = at[large]
    folios._words[at + 1] |= columns["large.large_mapcount"].astype(np.uint64) << np.uint64(f.COUNTER_SHIFT)
    entire = columns["large.entire_mapcount"][has_entire].astype(np.uint64)
    folios._words[at[has_entire] + 2] |= entire << np.uint64(f.COUNTER_SHIFT)
    slots = counts.astype(np.uint64) | ids.astype(np.uint64) << np.uint64(f.AUX_COUNT_BITS)
    folios._set_mm_slots(at, slots[:, 0] | _scatter(columns["large.bits"], _AUX_BITS), slots[:, 1])
    pinned = columns["large.pincount"] != 0
    for head, count in zip(heads[large][pinned].tolist(), columns["large.pincount"][pinned].tolist(), strict=True):
        folios.folio(head).pincount = count
    return _finish(folios, document, columns, int(columns["pages.mapcount"].max()))


def _finish(folios: FolioTable, document: dict[str, Any], columns: dict[str, Array], most_mapped: int) -> FolioTable:
    slots, counts = columns["swap.slot"], columns["swap.count"]
    if (slots[1:] <= slots[:-1]).any():
        _fail("swap.slot", "slots repeat or are out of order")
    _at_most(columns, "swap.slot", (32 << KEY_TYPE_SHIFT) - 1)
    _at_most(columns, "swap.count", MAX_SWAP_COUNT)
    if counts.size and int(counts.min()) < 1:
        _fail("swap.count", "must be positive")
    folios.swap = SwapTable.from_table(slots, counts)
    folios._near_limit = most_mapped >= f.NEAR_LIMIT
    folios._next_mm_id = document["next_mm_id"]
    return folios


def _check_spread(heads: I64, nr: I64, size: int) -> None:
    """Refuse PFNs so scattered that their memmap would dwarf the file: no machine's memory looks like that."""
    if not len(heads):
        return
    memmap = 16 * int(nr.sum())
    for shift, memory in ((f.SECTION_SHIFT, 16 * f.SECTION_PAGES), (f.TOP_SHIFT, 4 << (f.TOP_SHIFT - f.SECTION_SHIFT))):
        units = heads >> shift
        memmap += (1 + int(np.count_nonzero(units[1:] != units[:-1]))) * memory
    if memmap > (256 << 20) + 64 * size:
        _fail("folios.pfn", "page frame numbers lie too far apart for the number of folios")
