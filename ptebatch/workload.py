"""Seeded synthetic address spaces.

A `Workload` says what the memory looks like; `Workload.build` makes the `Mm`. The same workload gives the same `Mm`,
bit for bit, on every run, machine and version of Python and NumPy: all chance comes from the raw output of PCG64, each
property from a stream of its own, so changing one share leaves the others where they were.

The default is the plain case: private anonymous memory, every page present, writable, dirty, young and exclusive to
the process.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ptebatch import arch
from ptebatch.arch import X86_64, PteLayout
from ptebatch.errors import ArgumentError
from ptebatch.folio import SECTION_PAGES, FolioTable
from ptebatch.mm import MM_ANONPAGES, MM_FILEPAGES, MM_SHMEMPAGES, MM_SWAPENTS, Mm, Vma, fold, none_tables

__all__ = ["ALIGNMENTS", "GRANULARITIES", "PFN_ORDERS", "VMA_KINDS", "Workload", "format_size", "make", "parse"]

Bools = npt.NDArray[np.bool_]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Progress = Callable[[int, int], object]

ALIGNMENTS = ("natural", "shifted")
GRANULARITIES = ("folio", "page")
PFN_ORDERS = ("shuffled", "sequential")
VMA_KINDS = ("anon", "file", "shmem", "shmem-guard")

PAGE = 4096
"""The smallest page there is; a layout's may be larger."""
MAX_SIZE = 1 << 40
MAX_FOLIO = 1 << 30
FIRST_ADDRESS = 0x550000000000
"""Where the first VMA starts (before `align=shifted`): a multiple of every folio size."""
PIECE = 1 << 20
"""Pages that are written at a time."""
FIRST_PFN = 1 << 18
"""Lowest PFN handed out: a multiple of every folio size; lower ones stay free for pages that fork allocates."""

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
# One stream of random numbers each; the position in this tuple is part of what a seed means.
_STREAMS = (
    "interleave", "pfns", "small_pfns", "shift", "holes", "fragmentation", "cut", "cowed", "readonly", "clean", "old",
    "pinned", "shared", "soft_dirty", "uffd_wp", "swap", "guard", "pmd",
)  # fmt: skip
_SHARES = (
    "fragmentation", "readonly", "clean", "old", "pinned", "shared", "holes", "cowed", "soft_dirty", "uffd_wp", "swap",
    "guard", "pmd",
)  # fmt: skip
_MAPPING = arch.VM_READ | arch.VM_WRITE | arch.VM_MAYREAD | arch.VM_MAYWRITE | arch.VM_MAYEXEC
_VM_FLAGS = {
    "anon": _MAPPING | arch.VM_ACCOUNT,
    "file": _MAPPING | arch.VM_ACCOUNT,
    "shmem": _MAPPING | arch.VM_SHARED | arch.VM_MAYSHARE,
    "shmem-guard": _MAPPING | arch.VM_SHARED | arch.VM_MAYSHARE | arch.VM_MAYBE_GUARD,
}


@dataclass(frozen=True, slots=True)
class Workload:
    """What a synthetic address space looks like. All shares are in 0..1 and exact to the nearest whole number.

    Attributes
    ----------
    size : int
        Bytes of address space, holes included, over all VMAs.
    folio : tuple of int
        Folio sizes in bytes, none smaller than a page. Several get equal shares of the pages of each VMA, interleaved
        by the seed as closely as natural alignment allows. What a size does not divide into is filled with single
        pages.
    seed : int
        Everything that is drawn by chance follows from it.
    align : {"natural", "shifted"}
        Where folios lie in the address space: at multiples of their size, or an odd number of pages away from that,
        so that the ends of page tables cut them.
    fragmentation : float
        Share of the large folios that are not mapped in one piece: for every other one a run of up to half its pages
        is replaced by single pages (as after copy-on-write), the rest is mapped rotated (a jump in the middle).
    readonly : float
        Share mapped read-only in the writable VMA and not anon-exclusive: memory that an earlier fork left behind,
        whose child has exited.
    clean : float
        Share not dirty.
    old : float
        Share not young.
    pinned : float
        Share of the anonymous folios that may be pinned for DMA, as FOLL_PIN leaves them; the mm then has pinned pages.
    shared : float
        Share of folios that an earlier process maps too: each page's mapcount 2, anonymous ones read-only and not
        exclusive.
    holes : float
        Share of the address space that is not present.
    cowed : float
        Share of file VMAs that were written to: single anonymous pages instead of page-cache folios.
    soft_dirty : float or None
        Share with the soft-dirty bit, in VMAs that track it. None: no tracking (VM_SOFTDIRTY on the VMA, as on a new
        one), and whatever is dirty is soft-dirty.
    uffd_wp : float
        Share write-protected by userfaultfd, in VMAs with VM_UFFD_WP.
    swap : float
        Share of `anon` VMAs that is swapped out, to slots of swap area 0 in the order of addresses; all exclusive.
    guard : float
        Share of the address space that holds guard markers.
    pmd : float
        Share of the whole anonymous folios of 2 MiB that a PMD maps. Needs ``align=natural``, and x86-64.
    granularity : {"folio", "page"}
        Whether readonly, clean, old, holes, cowed, soft_dirty, uffd_wp, swap and guard fall on whole folios or on
        single pages.
    pfns : {"shuffled", "sequential"}
        Whether folios of a size lie in physical memory in random order or in the order of their addresses.
    vma : tuple of str
        Kinds of VMAs, taken in turn: `anon`; `file`, a private writable mapping of a file whose page-cache folios are
        read-only and clean; `shmem`, MAP_SHARED and written (fork does not copy it); `shmem-guard`, the same after a
        guard region was installed in it (fork copies it). File and shmem folios carry no reference of the page cache.
    vmas : int
        Number of VMAs.
    """

    size: int = 1 << 30
    folio: tuple[int, ...] = (PAGE,)
    seed: int = 1
    align: str = "natural"
    fragmentation: float = 0.0
    readonly: float = 0.0
    clean: float = 0.0
    old: float = 0.0
    pinned: float = 0.0
    shared: float = 0.0
    holes: float = 0.0
    cowed: float = 0.0
    soft_dirty: float | None = None
    uffd_wp: float = 0.0
    swap: float = 0.0
    guard: float = 0.0
    pmd: float = 0.0
    granularity: str = "folio"
    pfns: str = "shuffled"
    vma: tuple[str, ...] = ("anon",)
    vmas: int = 1

    def __post_init__(self) -> None:
        for key, low, high in (("size", PAGE, MAX_SIZE), ("seed", 0, (1 << 63) - 1), ("vmas", 1, 1 << 20)):
            value = getattr(self, key)
            if type(value) is not int or not low <= value <= high:
                raise ArgumentError(f"{key}={_short(value)}: must be a whole number in {low}..{high}")
        if self.size % PAGE:
            raise ArgumentError(f"size={self.size}: must be a multiple of {PAGE} bytes")
        if not isinstance(self.folio, tuple) or not self.folio or len(set(self.folio)) != len(self.folio):
            raise ArgumentError(f"folio={_short(self.folio)}: must name one or more different sizes, as 4KiB+64KiB")
        for size in self.folio:
            if type(size) is not int or not PAGE <= size <= MAX_FOLIO or size & (size - 1):
                raise ArgumentError(f"folio={_short(size)}: must be a power of two in 4KiB..{format_size(MAX_FOLIO)}")
        for key in _SHARES:
            value = getattr(self, key)
            if value is None and key == "soft_dirty":
                continue
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise ArgumentError(f"{key}={_short(value)}: must be a share in 0..1")
            object.__setattr__(self, key, float(value))
        for key, allowed in (("align", ALIGNMENTS), ("granularity", GRANULARITIES), ("pfns", PFN_ORDERS)):
            if getattr(self, key) not in allowed:
                raise ArgumentError(f"{key}={_short(getattr(self, key))}: must be one of {', '.join(allowed)}")
        if not isinstance(self.vma, tuple) or not self.vma or any(kind not in VMA_KINDS for kind in self.vma):
            raise ArgumentError(f"vma={_short(self.vma)}: must be one or more of {', '.join(VMA_KINDS)}, joined by +")
        if self.pmd and self.align != "natural":
            raise ArgumentError(f"pmd={self.pmd}: a PMD maps aligned memory, so it needs align=natural")
        if len(self.vma) > self.vmas:
            object.__setattr__(self, "vmas", len(self.vma))

    def __str__(self) -> str:
        """Return the specification that `parse` reads back."""
        parts = [f"size={format_size(self.size)}", f"folio={'+'.join(map(format_size, self.folio))}"]
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if field.name == "seed" or value != field.default:
                parts.append(f"{field.name}={'+'.join(value) if field.name == 'vma' else value}")
        return ",".join(parts)

    def build(self, progress: Progress | None = None, *, layout: PteLayout = X86_64) -> Mm:
        """Make the address space.

        Parameters
        ----------
        progress : callable, optional
            Called as ``progress(done, total)`` after each step.
        layout : PteLayout

        Returns
        -------
        Mm
            With a FolioTable of its own; every mapping is accounted for.

        Raises
        ------
        ArgumentError
            A folio size that does not fit into a VMA's share of `size`, or that a layout's pages do not make up; what
            entries of the layout cannot show.
        """
        builder = (_PlainBuilder if _PlainBuilder.knows(self, layout) else _Builder)(self, layout, progress)
        return builder.build()

    def restore(self, mm: Mm) -> bool:
        """Bring what `build` made back to what it was before a fork: in place, without a copy of it.

        Parameters
        ----------
        mm : Mm
            Of this workload; nothing but forks of it has changed it or its memmap since.

        Returns
        -------
        bool
            False: this workload is not plain memory, and nothing was done.
        """
        if not _PlainBuilder.knows(self, mm.layout):
            return False
        _PlainBuilder(self, mm.layout, None).restore(mm)
        return True

    def _raw(self, stream: str, n: int, index: int = 0) -> U64:
        """Return `n` raw 64-bit numbers of one stream."""
        sequence = np.random.SeedSequence([self.seed, _STREAMS.index(stream), index])
        return np.asarray(np.random.PCG64(sequence).random_raw(n), dtype=np.uint64)

    def _permutation(self, stream: str, n: int, index: int = 0) -> I64:
        keys = _distinct(self._raw(stream, n, index))
        keys.sort()
        mask = np.uint64((1 << n.bit_length()) - 1)
        return (keys & mask).astype(np.int64)

    def _choose(self, stream: str, n: int, share: float) -> Bools:
        """Choose ``round(share * n)`` of `n`."""
        k = round(share * n)
        if k == 0 or k == n:
            return np.full(n, k == n and n > 0)
        keys = _distinct(self._raw(stream, n))
        return keys < np.partition(keys, k)[k]


def parse(text: str, page_size: int = PAGE) -> Workload:
    """Read a workload from its text form.

    Parameters
    ----------
    text : str
        ``key=value`` pairs joined by commas; the keys are the attributes of `Workload`. Sizes are bytes or carry KiB,
        MiB, GiB or TiB; several folio sizes or VMA kinds are joined by ``+``; ``vma=mix`` is ``anon+file+shmem``.
    page_size : int
        Size of folios where `text` names none.

    Raises
    ------
    ArgumentError
        Names the key and what it may be.

    >>> parse("size=1GiB,folio=4KiB+64KiB,seed=7").folio
    (4096, 65536)
    """
    given: dict[str, Any] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ArgumentError(f"{_short(item)} is not key=value; the keys are {', '.join(_KEYS)}")
        if key not in _KEYS:
            raise ArgumentError(f"no workload key {_short(key)}; the keys are {', '.join(_KEYS)}")
        if key in given:
            raise ArgumentError(f"{key} is given twice")
        given[key] = value
    return _workload({"folio": (page_size,), **given})


def make(progress: Progress | None = None, **keys: Any) -> Mm:
    """Build a workload from keyword arguments: the attributes of `Workload`, as values or as `parse` reads them.

    >>> make(size="1MiB", folio="64KiB").entries.shape
    (1, 512)
    """
    unknown = sorted(set(keys) - set(_KEYS))
    if unknown:
        raise ArgumentError(f"no workload key {_short(unknown[0])}; the keys are {', '.join(_KEYS)}")
    return _workload(keys).build(progress)


def format_size(size: int) -> str:
    """Spell a number of bytes with the largest unit that divides it.

    >>> format_size(65536), format_size(4097)
    ('64KiB', '4097')
    """
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)


_KEYS = tuple(field.name for field in fields(Workload))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text[:40] + "...") if len(text) > 43 else repr(text) if isinstance(value, str) else text


def _workload(given: dict[str, Any]) -> Workload:
    return Workload(**{key: _convert(key, value) for key, value in given.items()})


def _convert(key: str, value: Any) -> Any:
    if key == "folio" and isinstance(value, int):
        return (value,)
    if not isinstance(value, str):
        return tuple(value) if key in ("folio", "vma") and isinstance(value, Iterable) else value
    if key == "size":
        return _size(key, value)
    if key == "folio":
        return tuple(_size(key, part) for part in value.split("+"))
    if key == "vma":
        return ("anon", "file", "shmem") if value == "mix" else tuple(value.split("+"))
    if key in ("seed", "vmas"):
        if not re.fullmatch(r"[0-9]{1,20}", value):
            raise ArgumentError(f"{key}={_short(value)}: must be a whole number")
        return int(value)
    if key in _SHARES:
        try:
            share = float(value)
        except ValueError:
            share = math.nan
        if math.isnan(share):
            raise ArgumentError(f"{key}={_short(value)}: must be a share in 0..1")
        return share
    return value


def _size(key: str, text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,18})\s*(B|KiB|MiB|GiB|TiB|)", text.strip())
    if not match:
        raise ArgumentError(f"{key}={_short(text)}: must be bytes, or a number with KiB, MiB, GiB or TiB")
    return int(match[1]) * _UNITS[match[2]]


def _distinct(raw: U64) -> U64:
    """Make random numbers distinct by putting their index into the low bits (changes `raw`)."""
    mask = np.uint64((1 << len(raw).bit_length()) - 1)
    raw &= ~mask
    raw |= np.arange(len(raw), dtype=np.uint64)
    return raw


class _Builder:
    """The steps of `Workload.build`. Blocks are the folios in order of address; pages are the slots of all VMAs."""

    STEPS = 6

    def __init__(self, workload: Workload, layout: PteLayout, progress: Progress | None) -> None:
        self.w = workload
        self.layout = layout
        self.page = layout.page_size
        whole = f"pages of {layout.name} are {format_size(self.page)}"
        if workload.size % self.page:
            raise ArgumentError(f"size={workload.size}: {whole}, of which it must be a multiple")
        if min(workload.folio) < self.page:
            raise ArgumentError(f"folio={format_size(min(workload.folio))}: {whole}")
        lacking = (
            ("soft_dirty", bool(layout.soft_dirty), "have no soft-dirty bit"),
            ("uffd_wp", bool(layout.uffd_wp), "have no uffd-wp bit"),
            ("pmd", bool(layout.huge), "are modelled in page tables only"),
        )
        for key, has, what in lacking:
            if getattr(workload, key) and not has:
                raise ArgumentError(f"{key}={getattr(workload, key)}: entries of {layout.name} {what}")
        self.progress = progress
        self.done = 0

    def step(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.STEPS)

    def spread(self, blocks: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Repeat one value per block for each of its pages."""
        return blocks if len(self.nr) == self.nr_pages else np.repeat(blocks, self.nr)

    def chosen(self, key: str) -> Bools | bool:
        """Choose pages by folio or singly; False stands for none."""
        share = getattr(self.w, key)
        if not share:
            return False
        if self.w.granularity == "page":
            return self.w._choose(key, self.nr_pages, share)
        return self.spread(self.w._choose(key, len(self.nr), share))

    def build(self) -> Mm:
        w, layout = self.w, self.layout
        vma_pages = self.lay_out()
        kind_of_vma = np.array([VMA_KINDS.index(w.vma[i % len(w.vma)]) for i in range(w.vmas)], dtype=np.uint8)
        kind = np.repeat(kind_of_vma, vma_pages)
        self.step()

        # What is mapped where: by its block's folio, by a single page of its own, or not at all.
        present = ~np.broadcast_to(self.chosen("holes"), self.nr_pages)
        guard = present & self.chosen("guard")
        swapped = present & ~guard & self.chosen("swap") & (kind == VMA_KINDS.index("anon"))
        present &= ~(guard | swapped)
        off, single = self.cut()
        if w.cowed:
            single |= (kind == VMA_KINDS.index("file")) & self.chosen("cowed")
        single &= present
        in_folio = present & ~single
        used = np.add.reduceat(in_folio, self.start, dtype=np.int64) > 0
        pfn, heads = self.place(off, single, used)
        self.step()

        anon = kind == VMA_KINDS.index("anon")
        anon |= single & (kind == VMA_KINDS.index("file"))
        shmem = kind >= VMA_KINDS.index("shmem")
        folios = FolioTable()
        mm_id = folios.new_mm_id()
        first = self.start[used]
        file_backed = kind[first] == VMA_KINDS.index("file")
        block_anon = kind[first] == VMA_KINDS.index("anon")
        folios.add_folios(heads[used], self.orders[used], anon=block_anon, swapbacked=~file_backed)
        if single.any():
            folios.add_folios(pfn[single], 0, anon=anon[single], swapbacked=True)
        self.step()

        readonly = np.broadcast_to(self.chosen("readonly"), self.nr_pages)
        shared = np.zeros(self.nr_pages, dtype=bool)
        if w.shared:
            shared = self.spread(w._choose("shared", len(self.nr), w.shared)) & in_folio
            folios.map_ptes(pfn[shared], mm_id=folios.new_mm_id(), anon_exclusive=None)
        exclusive = anon & present & ~readonly & ~shared
        leaf = self.by_pmd(in_folio & (kind == VMA_KINDS.index("anon")))
        by_pte = present if leaf is None else present & ~self.spread(leaf)
        mapped = pfn if by_pte.all() else pfn[by_pte]
        folios.map_ptes(mapped, mm_id=mm_id, anon_exclusive=exclusive if by_pte.all() else exclusive[by_pte])
        has_pinned = self.pin(folios, heads, used, block_anon)
        self.step()

        written = anon | shmem
        writable = written & ~readonly & ~(shared & anon)
        dirty = written & ~np.broadcast_to(self.chosen("clean"), self.nr_pages)
        young = ~np.broadcast_to(self.chosen("old"), self.nr_pages)
        soft = dirty if w.soft_dirty is None else np.broadcast_to(self.chosen("soft_dirty"), self.nr_pages)
        wp = np.broadcast_to(self.chosen("uffd_wp"), self.nr_pages)
        code = kind
        for bit in (writable, dirty, young, soft, wp):
            code = code << 1 | bit
        vm_flags = [self.vm_flags(name) for name in VMA_KINDS]
        values = np.array([self.entry(c, vm_flags[c >> 5]) for c in range(len(VMA_KINDS) << 5)], dtype=np.uint64)[code]
        values += pfn.view(np.uint64) << np.uint64(layout.pfn_shift)
        values[~present] = layout.none_value
        values[guard] = arch.swp_entry(layout, arch.SWP_PTE_MARKER, arch.PTE_MARKER_GUARD)
        if swapped.any():
            slots = np.arange(1, int(np.count_nonzero(swapped)) + 1, dtype=np.uint64)
            first = arch.pte_swp_mkexclusive(layout, arch.swp_entry(layout, 0, 0))
            step = arch.swp_entry(layout, 0, 1) - arch.swp_entry(layout, 0, 0)
            values[swapped] = np.uint64(first) + slots * np.uint64(step & arch.U64_MAX)
            folios.swap.add(slots)  # of area 0: the key is the offset
        self.step()

        vmas, vpns, entries = self.tables(vma_pages, kind_of_vma, vm_flags, values)
        mm = Mm(layout, folios, vmas=vmas, vpns=vpns, entries=entries, has_pinned=has_pinned, mm_id=mm_id, name=str(w))
        mm.rss[MM_SWAPENTS] = np.count_nonzero(swapped)
        fold(mm)
        if leaf is not None:
            self.map_by_pmd(mm, self.start[leaf], pfn, exclusive)
        mm.rss[MM_ANONPAGES] = np.count_nonzero(anon & present)
        mm.rss[MM_SHMEMPAGES] = np.count_nonzero(shmem & present)
        mm.rss[MM_FILEPAGES] = np.count_nonzero(present) - mm.rss[MM_ANONPAGES] - mm.rss[MM_SHMEMPAGES]
        self.step()
        return mm

    def lay_out(self) -> I64:
        """Set the blocks of all VMAs (`orders`, `nr`, `start`, `nr_pages`); return the pages of each VMA."""
        w = self.w
        self.nr_pages = w.size // self.page
        largest = max(w.folio) // self.page
        pages = self.nr_pages // w.vmas
        if pages > largest:
            pages -= pages % largest
        vma_pages = np.full(w.vmas, pages, dtype=np.int64)
        vma_pages[-1] += self.nr_pages - pages * w.vmas
        cache = {int(n): self.counts(int(n)) for n in np.unique(vma_pages)}
        parts = [self.interleave(cache[int(n)], int(n), i) for i, n in enumerate(vma_pages)]
        self.orders = np.concatenate(parts)
        self.nr = np.int64(1) << self.orders.astype(np.int64)
        self.start = np.cumsum(self.nr) - self.nr
        return vma_pages

    def counts(self, pages: int) -> dict[int, int]:
        """Return order -> number of folios for a VMA of so many pages."""
        counts = {}
        sizes = sorted(self.w.folio, reverse=True)
        left = pages
        for i, size in enumerate(sizes):
            nr = size // self.page
            counts[nr.bit_length() - 1] = n = left // (len(sizes) - i) // nr
            if n == 0:
                raise ArgumentError(
                    f"folio={format_size(size)}: does not fit into its share of a VMA of "
                    f"{format_size(pages * self.page)}; make size larger, or name fewer vmas or folio sizes"
                )
            left -= n * nr
        return counts

    def interleave(self, counts: dict[int, int], pages: int, index: int) -> npt.NDArray[np.uint8]:
        """Return the orders of the folios of VMA `index`, by address.

        Works upward from the smallest folios: as many as make one folio of the next size become a unit, and the units
        are shuffled among the folios of that size. One item of `grains` is one smallest folio's worth of memory.
        """
        low, *others = sorted(counts)
        grains = np.full(counts[low], low, dtype=np.uint8)
        tails: list[npt.NDArray[np.uint8]] = []
        for order in others:
            width = 1 << (order - low)
            whole = len(grains) - len(grains) % width
            tails.insert(0, grains[whole:])
            units = np.concatenate(
                (grains[:whole].reshape(-1, width), np.full((counts[order], width), order, dtype=np.uint8))
            )
            grains = units[self.w._permutation("interleave", len(units), index << 5 | order)].reshape(-1)
        if others:
            grains = np.concatenate((grains, *tails))
            width_mask = (np.int64(1) << (grains.astype(np.int64) - low)) - 1
            grains = grains[np.arange(len(grains)) & width_mask == 0]
        rest = pages - sum(n << order for order, n in counts.items())
        return np.concatenate((grains, np.zeros(rest, dtype=np.uint8))) if rest else grains

    def cut(self) -> tuple[I64, Bools]:
        """Return each page's offset in its folio, and which pages are replaced by single ones (fragmentation)."""
        single = np.zeros(self.nr_pages, dtype=bool)
        if len(self.nr) == self.nr_pages:
            return np.zeros(self.nr_pages, dtype=np.int64), single
        off = np.arange(self.nr_pages) - np.repeat(self.start, self.nr)
        large = np.flatnonzero(self.nr > 1)
        hit = large[self.w._choose("fragmentation", len(large), self.w.fragmentation)]
        if not len(hit):
            return off, single
        nr = self.nr[hit].view(np.uint64)
        chance = self.w._raw("cut", len(hit))
        shift = np.zeros(len(self.nr), dtype=np.int64)
        shift[hit] = 1 + (chance >> np.uint64(32)) % (nr - np.uint64(1))
        length = np.zeros(len(self.nr), dtype=np.int64)
        length[hit] = 1 + (chance & np.uint64(0xFFFFFFFF)) % (nr >> np.uint64(1))
        length[hit[::2]] = 0
        mask = np.repeat(self.nr - 1, self.nr)
        rotated = (off + np.repeat(shift, self.nr)) & mask
        run = np.repeat(length, self.nr)
        single |= rotated < run
        return np.where(run > 0, off, rotated), single

    def place(self, off: I64, single: Bools, used: Bools) -> tuple[I64, I64]:
        """Give every folio in use and every single page a PFN; return PFN per page and head PFN per block."""
        heads = np.full(len(self.nr), FIRST_PFN, dtype=np.int64)
        base = FIRST_PFN
        for order in sorted({int(o) for o in np.unique(self.orders)}, reverse=True):
            blocks = np.flatnonzero(used & (self.orders == order))
            heads[blocks] = base + (self.physical("pfns", len(blocks), order) << order)
            base += len(blocks) << order
        pfn = self.spread(heads) + off
        nr_single = int(np.count_nonzero(single))
        if nr_single:
            pfn[single] = base + self.physical("small_pfns", nr_single, 0)
        return pfn, heads

    def by_pmd(self, mappable: Bools) -> Bools | None:
        """Choose the blocks that a PMD maps, of those of 2 MiB whose pages are all mappable; None stands for none."""
        order = self.layout.ptrs_per_pte.bit_length() - 1
        whole = (self.orders == order) & (np.add.reduceat(mappable, self.start, dtype=np.int64) == 1 << order)
        if not self.w.pmd or not whole.any():
            return None
        whole[whole] = self.w._choose("pmd", int(np.count_nonzero(whole)), self.w.pmd)
        return whole

    def map_by_pmd(self, mm: Mm, first: I64, pfn: I64, exclusive: Bools) -> None:
        """Replace the page tables of blocks, given by their first pages, by leaves; each has a table to itself."""
        start = np.array([vma.start // self.page for vma in mm.vmas], dtype=np.int64)
        pages = np.array([(vma.end - vma.start) // self.page for vma in mm.vmas], dtype=np.int64)
        vma = np.searchsorted(np.cumsum(pages), first, side="right")
        rows = np.searchsorted(mm.vpns, start[vma] + first - (np.cumsum(pages) - pages)[vma])
        keep = np.ones(len(mm.vpns), dtype=bool)
        keep[rows] = False
        mm.pmd_vpns, mm.pmd_entries = mm.vpns[~keep], mm.entries[~keep, 0] | np.uint64(self.layout.huge)
        mm.vpns, mm.entries = mm.vpns[keep], np.ascontiguousarray(mm.entries[keep])
        for page in first.tolist():
            folio = mm.folios.folio(int(pfn[page]))
            folio.refcount += 1
            folio.entire_mapcount = 1
            folio.large_mapcount += 1
            folio.add_mm_mapping(mm.mm_id, 1)
            mm.folios.page(folio.pfn).anon_exclusive = bool(exclusive[page])

    def physical(self, stream: str, n: int, index: int) -> I64:
        return np.arange(n) if self.w.pfns == "sequential" else self.w._permutation(stream, n, index)

    def pin(self, folios: FolioTable, heads: I64, used: Bools, anon: Bools) -> bool:
        blocks = np.flatnonzero(used)[anon]
        for block in blocks[self.w._choose("pinned", len(blocks), self.w.pinned)]:
            folio = folios.folio(int(heads[block]))
            if self.orders[block]:
                folio.refcount += 1
                folio.pincount += 1
            else:
                folio.refcount += 1024
        return self.w.pinned > 0

    def vm_flags(self, kind: str) -> int:
        flags = _VM_FLAGS[kind]
        if self.w.uffd_wp:
            flags |= arch.VM_UFFD_WP
        if self.w.guard:
            flags |= arch.VM_MAYBE_GUARD
        if self.w.soft_dirty is None and self.layout.soft_dirty:
            flags |= arch.VM_SOFTDIRTY
        return flags

    def entry(self, code: int, vm_flags: int) -> int:
        """Return the entry of PFN 0 with the bits of `code`: writable, dirty, young, soft-dirty, uffd-wp (lowest)."""
        layout = self.layout
        v = arch.pfn_pte(layout, 0, arch.vm_get_page_prot(layout, vm_flags))
        v = arch.pte_mkyoung(layout, v) if code & 4 else arch.pte_mkold(layout, v)
        v = arch.pte_mkwrite(layout, v, vm_flags) if code & 16 else arch.pte_wrprotect(layout, v)
        v = arch.pte_mkdirty(layout, v) if code & 8 else arch.pte_mkclean(layout, v)
        v = arch.pte_mksoft_dirty(layout, v) if code & 2 else arch.pte_clear_soft_dirty(layout, v)
        return arch.pte_mkuffd_wp(layout, v) if code & 1 else v

    def tables(
        self, vma_pages: I64, kind_of_vma: npt.NDArray[np.uint8], vm_flags: list[int], values: U64
    ) -> tuple[list[Vma], I64, U64]:
        """Return VMAs and page tables. VMAs leave a gap of at least a page and may share a table."""
        w, ptrs = self.w, self.layout.ptrs_per_pte
        shift = 0
        if w.align == "shifted":
            shift = int(w._raw("shift", 1)[0]) % ptrs | 1
        largest = max(w.folio) // self.page
        stride = -(-(vma_pages + 1) // largest) * largest
        start = FIRST_ADDRESS // self.page + shift + np.cumsum(stride) - stride
        first, last = start // ptrs, (start + vma_pages - 1) // ptrs
        vpns = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)])) * ptrs
        entries = none_tables(self.layout, len(vpns))
        flat = entries.reshape(-1)
        rows = np.searchsorted(vpns, first * ptrs)
        vmas = []
        page = 0
        for i, (vpn, n) in enumerate(zip(start.tolist(), vma_pages.tolist(), strict=True)):
            slot = int(rows[i]) * ptrs + vpn % ptrs
            flat[slot : slot + n] = values[page : page + n]
            page += n
            kind = VMA_KINDS[kind_of_vma[i]]
            vmas.append(
                Vma(
                    start=vpn * self.page,
                    end=(vpn + n) * self.page,
                    vm_flags=vm_flags[kind_of_vma[i]],
                    anon_vma=kind != "shmem",
                    vm_ops=None if kind == "anon" else "file" if kind == "file" else "shmem",
                    name=kind if kind != "anon" else "",
                )
            )
        return vmas, vpns, entries


class _PlainBuilder(_Builder):
    """The same for folios of one size in private anonymous memory that has everything: folio by folio, hence in little
    memory besides that of the result, and fast.
    """

    @staticmethod
    def knows(w: Workload, layout: PteLayout) -> bool:
        changed = {field.name for field in fields(w) if getattr(w, field.name) != field.default}
        whole = len(w.folio) == 1 and w.size % max(w.folio[0], SECTION_PAGES * PAGE) == 0
        return layout == X86_64 and whole and changed <= {"size", "folio", "seed", "pfns", "granularity"}

    def build(self) -> Mm:
        w, layout = self.w, self.layout
        self.order = w.folio[0].bit_length() - PAGE.bit_length()
        self.nr_pages = w.size // PAGE
        nr = self.nr_pages >> self.order
        folios = FolioTable()
        mm_id = folios.new_mm_id()
        folios.fill_mapped(FIRST_PFN, nr, self.order, mm_id=mm_id)
        self.step()
        start, flags = FIRST_ADDRESS, self.vm_flags("anon")
        vma = Vma(start=start, end=start + w.size, vm_flags=flags)
        mm = Mm.for_vmas(layout, folios, [vma], mm_id=mm_id, name=str(w))
        mm.rss[MM_ANONPAGES] = self.nr_pages
        self.step()
        heads = self.physical("pfns", nr, self.order)
        heads <<= self.order
        heads += FIRST_PFN
        self.step()
        within = np.arange(1 << self.order, dtype=np.uint64) << np.uint64(layout.pfn_shift)
        within += np.uint64(self.value())
        pages = mm.entries.reshape(-1)[: self.nr_pages].reshape(nr, -1)
        piece = max(1, PIECE >> self.order)
        for at in range(0, nr, piece):
            np.add(heads[at : at + piece, None].view(np.uint64) << np.uint64(layout.pfn_shift), within,
                   out=pages[at : at + piece])
        for _ in range(self.STEPS - 3):
            self.step()
        return mm

    def value(self) -> int:
        """Return the entry of PFN 0: writable, dirty, young, soft-dirty."""
        return self.entry(0b11110, self.vm_flags("anon"))

    def restore(self, mm: Mm) -> None:
        order, nr_pages = self.w.folio[0].bit_length() - PAGE.bit_length(), self.w.size // PAGE
        mm.folios.fill_mapped(FIRST_PFN, nr_pages >> order, order, mm_id=mm.mm_id)
        pages = mm.entries.reshape(-1)[:nr_pages]
        pages &= np.uint64(self.layout.pfn_mask)
        pages |= np.uint64(self.value())
