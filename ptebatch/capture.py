"""A process's page tables from /proc: `capture`.

What is read: ``smaps`` (areas and their flags), ``pagemap`` twice with ``/proc/kpageflags`` and ``/proc/kpagecount`` in
between, ``maps`` once more. An area that is not the same both times is read again. PAGEMAP_SCAN says where there is
anything to read, which entries are PMD leaves and which map the zero page; a kernel without it (before v6.7) costs
time and those two.

/proc shows the PFN of an entry and hardly any of its other bits. What is inferred instead is said in `Capture.bound`,
one line for each.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import platform
import re
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from ptebatch import arch
from ptebatch import folio as f
from ptebatch.errors import ArgumentError, CaptureError, PermissionDeniedError, ProcessGoneError
from ptebatch.folio import FolioTable
from ptebatch.mm import (
    MM_ANONPAGES,
    MM_FILEPAGES,
    MM_SHMEMPAGES,
    MM_SWAPENTS,
    NR_MM_COUNTERS,
    Mm,
    Vma,
    swap_keys,
    swap_types,
)
from ptebatch.semantics import KernelSemantics, running

__all__ = ["Area", "Capture", "Entries", "Frames", "Seen", "capture", "exit_on_signals", "look", "parse_smaps"]

Bool = npt.NDArray[np.bool_]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Progress = Callable[[int, int], None]

PAGE_SHIFT = 12
# /proc/PID/pagemap
PM_PFN = (1 << 55) - 1
PM_SOFT_DIRTY = 1 << 55
PM_EXCLUSIVE = 1 << 56
PM_UFFD_WP = 1 << 57
PM_GUARD = 1 << 58
PM_FILE = 1 << 61
PM_SWAP = 1 << 62
PM_PRESENT = 1 << 63
# Changes of other processes show in these; they do not make an area unstable.
_PM_LOOSE = PM_SOFT_DIRTY | PM_EXCLUSIVE
# /proc/kpageflags, bit numbers
KPF_ANON, KPF_SWAPCACHE, KPF_SWAPBACKED = 12, 13, 14
KPF_HEAD, KPF_TAIL, KPF_HUGE, KPF_HWPOISON, KPF_NOPAGE = 15, 16, 17, 19, 20
KPF_KSM, KPF_ZERO_PAGE, KPF_ANON_EXCLUSIVE, KPF_PRIVATE = 21, 24, 34, 35
KPF_REFERENCED, KPF_DIRTY, KPF_IDLE = 2, 4, 25
# PAGEMAP_SCAN
_PAGEMAP_SCAN = 0xC0606610
_PAGE_IS_PRESENT, _PAGE_IS_SWAPPED, _PAGE_IS_PFNZERO, _PAGE_IS_HUGE = 8, 16, 32, 64

_PSE = 1 << 7
_MERGE_VPNS = 512  # pagemap: reading up to a page table of holes costs less than another call
_MERGE_PFNS = 12  # kpageflags takes 0.1 us per page and 1.2 us per call
_CHUNK = 1 << 20  # entries per read
_VSYSCALL = 1 << 63
_OTHERS = 2  # mm id that stands for every other owner
_STEPS = 5

_VM_CODES = {
    "rd": arch.VM_READ, "wr": arch.VM_WRITE, "ex": arch.VM_EXEC, "sh": arch.VM_SHARED,
    "mr": arch.VM_MAYREAD, "mw": arch.VM_MAYWRITE, "me": arch.VM_MAYEXEC, "ms": arch.VM_MAYSHARE,
    "gd": arch.VM_GROWSDOWN, "pf": arch.VM_PFNMAP, "gu": arch.VM_MAYBE_GUARD, "uw": arch.VM_UFFD_WP,
    "um": arch.VM_UFFD_MISSING, "ui": arch.VM_UFFD_MINOR, "lo": arch.VM_LOCKED, "io": arch.VM_IO,
    "sr": arch.VM_SEQ_READ, "rr": arch.VM_RAND_READ, "dc": arch.VM_DONTCOPY, "de": arch.VM_DONTEXPAND,
    "lf": arch.VM_LOCKONFAULT, "ac": arch.VM_ACCOUNT, "nr": arch.VM_NORESERVE, "ht": arch.VM_HUGETLB,
    "sf": arch.VM_SYNC, "ar": arch.VM_ARCH_1, "wf": arch.VM_WIPEONFORK, "dd": arch.VM_DONTDUMP,
    "sd": arch.VM_SOFTDIRTY, "mm": arch.VM_MIXEDMAP, "hg": arch.VM_HUGEPAGE, "nh": arch.VM_NOHUGEPAGE,
    "mg": arch.VM_MERGEABLE, "ss": arch.VM_SHADOW_STACK, "dp": arch.VM_DROPPABLE,
}  # fmt: skip


@dataclass
class Capture:
    """What `capture` found.

    Attributes
    ----------
    mm : Mm
        With a FolioTable of its own: every folio the process maps, whole, also where it maps only a part of it.
    bound : list of str
        What was inferred, as ``"field: how"``. Counts that depend on it are a bound and no measurement.
    pfns : {"real", "hidden"}
        Hidden: the PFNs are made up (distinct, in address order) and all folios are of one page.
    notes : list of str
        What was left out or looked odd, for people.
    env : dict
        ``pid``, ``comm``, ``kernel``, ``semantics``, ``seconds``, ``rounds`` (reads it took), ``frozen``.
    seen : Seen, optional
        What all this was made from.
    """

    mm: Mm
    bound: list[str]
    pfns: Literal["real", "hidden"]
    notes: list[str] = field(default_factory=list)
    env: dict[str, Any] = field(default_factory=dict)
    seen: Seen | None = None


# --- maps and smaps ---------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Area:
    """One area as ``/proc/PID/smaps`` shows it.

    Attributes
    ----------
    key : tuple
        What ``maps`` shows of it: start, end (bytes), permissions, offset (bytes), device, inode, name.
    fields : dict of str to int
        ``Rss``, ``Anonymous``, ``Swap``, ... in kB (``ProtectionKey`` as it is); empty when read from ``maps``.
    codes : frozenset of str
        The two-letter VmFlags.
    """

    key: tuple[int, int, str, int, str, int, str]
    fields: dict[str, int]
    codes: frozenset[str]

    @property
    def start(self) -> int:
        """First byte."""
        return self.key[0]

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.key[1]

    @property
    def name(self) -> str:
        """Path or ``[name]``; empty for memory without."""
        return self.key[6]

    @property
    def vm_flags(self) -> int:
        """VM_* of the codes, and the protection key."""
        flags = sum(_VM_CODES.get(code, 0) for code in self.codes)
        return flags | self.fields.get("ProtectionKey", 0) << arch.VM_PKEY_SHIFT

    def label(self) -> str:
        """For messages."""
        return f"{self.start:#x}-{self.end:#x} {self.name or '(anonymous)'}"


_HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) (\S+) (\d+)[ \t]*(.*)$", re.MULTILINE)
_FIELD = re.compile(
    r"^(Rss|Shared_Dirty|Private_Dirty|Referenced|Anonymous|KSM|AnonHugePages|Swap|KernelPageSize|ProtectionKey):"
    r" +(\d+)",
    re.MULTILINE,
)
_VMFLAGS = re.compile(r"^VmFlags:(.*)$", re.MULTILINE)


def parse_smaps(text: str) -> list[Area]:
    """Read the text of ``smaps`` or ``maps``.

    >>> [area] = parse_smaps("7f00-8f00 rw-p 00000000 00:00 0          [heap]")
    >>> hex(area.start), area.name
    ('0x7f00', '[heap]')
    """
    headers = list(_HEADER.finditer(text))
    areas = []
    for header, following in itertools.zip_longest(headers, headers[1:]):
        start, end, perms, offset, dev, inode, name = header.groups()
        at = header.end(), following.start() if following else len(text)
        flags = _VMFLAGS.search(text, *at)
        areas.append(
            Area(
                (int(start, 16), int(end, 16), perms, int(offset, 16), dev, int(inode), name),
                {key: int(value) for key, value in _FIELD.findall(text, *at)},
                frozenset(flags[1].split()) if flags else frozenset(),
            )
        )
    return areas


def _tmpfs_devices(mountinfo: str) -> frozenset[str]:
    """Devices, spelled as in ``maps``, of the tmpfs mounts in a ``mountinfo`` text."""
    found = set()
    for line in mountinfo.splitlines():
        mount, _, filesystem = line.partition(" - ")
        if filesystem.split(" ", 1)[0] in ("tmpfs", "devtmpfs"):
            major, _, minor = mount.split()[2].partition(":")
            found.add(f"{int(major):02x}:{int(minor):02x}")
    return frozenset(found)


def _vm_ops(area: Area, tmpfs: frozenset[str]) -> str | None:
    """What backs an area: the `vm_ops` of a `Vma`."""
    name, shared = area.name, "sh" in area.codes or "ms" in area.codes
    if "ht" in area.codes:
        return "hugetlb"
    if name in ("[vdso]", "[sigpage]", "[uprobes]") or name.startswith("[vvar") or area.codes & {"pf"}:
        return "special"
    if name.startswith(("/memfd:", "/SYSV", "/dev/shm/", "[anon_shmem")) or area.key[4] in tmpfs:
        return "shmem"
    if name.startswith("/dev/zero"):
        return "shmem" if shared else None
    if not name or (name.startswith("[") and not area.key[5]):
        return "shmem" if shared else None
    return "file"


# --- the process ------------------------------------------------------------------------------------------------------
def _stat(pid: str) -> tuple[str, int, str]:
    """(state, flags, comm) of /proc/PID/stat."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        text = file.read().decode(errors="backslashreplace")
    comm, _, rest = text.partition(" (")[2].rpartition(")")
    words = rest.split()
    return words[0], int(words[6]), comm


def _no_memory(pid: str) -> NoReturn:
    """Say why a process has no address space to read."""
    try:
        state, flags, comm = _stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessGoneError(f"there is no process {pid} (or no longer): check the pid") from None
    if flags & 0x200000:  # PF_KTHREAD
        raise CaptureError(f"process {pid} ({comm}) is a kernel thread: it has no address space of its own")
    if state in "ZX":
        raise ProcessGoneError(f"process {pid} ({comm}) has exited and waits to be reaped: its memory is gone")
    raise ProcessGoneError(f"process {pid} ({comm}) gave up its address space while it was read: try again")


@contextlib.contextmanager
def _readable(pid: str, what: str) -> Iterator[None]:
    """OSErrors as ours."""
    try:
        yield
    except (FileNotFoundError, ProcessLookupError):
        _no_memory(pid)
    except PermissionError:
        raise PermissionDeniedError(
            f"not allowed to read {what}: run as the process's own user or with CAP_SYS_PTRACE (root)"
        ) from None
    except OSError as error:
        raise CaptureError(f"{what} cannot be read: {error.strerror}") from None


def _text(pid: str, name: str) -> str:
    path = f"/proc/{pid}/{name}"
    with _readable(pid, path), open(path, "rb") as file:
        return file.read().decode(errors="backslashreplace")


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise SystemExit (128 + signal), so that ``finally`` runs.

    Signals that are ignored or handled otherwise are left alone; only the main thread can change any.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    mine = []
    if threading.current_thread() is threading.main_thread():
        mine = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    try:
        for number in mine:
            signal.signal(number, leave)
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _frozen(pid: str, timeout: float = 5.0) -> Iterator[bool]:
    """Keep a process stopped; yields False if it was stopped already, which is then left so."""

    def states() -> set[str]:
        found = set()
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.add(_stat(f"{pid}/task/{task}")[0])
        return found

    if int(pid) == os.getpid():
        raise ArgumentError("a process cannot stop itself and go on reading: leave out freeze (--freeze)")
    with _readable(pid, f"/proc/{pid}/stat"):
        stopped = states() <= {"T", "t"}
        pidfd = -1 if stopped else os.pidfd_open(int(pid))
    if stopped:
        yield False
        return
    try:
        with exit_on_signals():
            try:
                try:
                    signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
                except PermissionError:
                    raise PermissionDeniedError(
                        f"not allowed to stop process {pid}: run as its user or root, or leave out freeze (--freeze)"
                    ) from None
                except ProcessLookupError:
                    _no_memory(pid)
                deadline = time.monotonic() + timeout
                with _readable(pid, f"/proc/{pid}/task"):
                    while not (now := states()) <= {"T", "t"}:
                        if now <= {"Z", "X"}:
                            _no_memory(pid)
                        if time.monotonic() > deadline:
                            raise CaptureError(f"process {pid} does not stop (a thread waits in the kernel): try again")
                        time.sleep(0.0005)
                yield True
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    signal.pidfd_send_signal(pidfd, signal.SIGCONT)
    finally:
        os.close(pidfd)


# --- pagemap ----------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Entries:
    """Populated entries in address order.

    Attributes
    ----------
    vpn : int64 array
        Page numbers.
    value : uint64 array
        What ``/proc/PID/pagemap`` shows.
    huge, zero : bool arrays
        PAGEMAP_SCAN calls it part of a PMD leaf (or hugetlb); a mapping of the zero page.
    """

    vpn: I64
    value: U64
    huge: Bool
    zero: Bool

    def at(self, index: Any) -> Entries:
        """Some of them, as by numpy."""
        return Entries(self.vpn[index], self.value[index], self.huge[index], self.zero[index])

    def same(self, other: Entries) -> bool:
        """Whether they map the same in the same way."""
        loose = np.uint64(_PM_LOOSE)
        return (
            np.array_equal(self.vpn, other.vpn)
            and np.array_equal(self.value | loose, other.value | loose)
            and np.array_equal(self.huge, other.huge)
        )

    def slices(self, areas: Sequence[Area]) -> tuple[I64, I64]:
        """First and one past the last index of each area's entries."""
        starts = np.array([area.start >> PAGE_SHIFT for area in areas], dtype=np.int64)
        ends = np.array([area.end >> PAGE_SHIFT for area in areas], dtype=np.int64)
        return np.searchsorted(self.vpn, starts), np.searchsorted(self.vpn, ends)

    @staticmethod
    def join(parts: Sequence[Entries]) -> Entries:
        """All of them, in address order."""
        if len(parts) == 1:
            return parts[0]
        joined = Entries(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in ("vpn", "value", "huge", "zero"))
        )
        return joined.at(np.argsort(joined.vpn, kind="stable"))


class _Torn(Exception):
    """The address space went away under the reader."""


def _ranges(starts: I64, lengths: I64) -> I64:
    """Concatenate ``starts[i] .. starts[i] + lengths[i]``."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def _coalesce(starts: I64, ends: I64, gap: int) -> tuple[I64, I64]:
    """Merge ranges, in any order, that overlap or are at most `gap` apart."""
    if not len(starts):
        return starts, ends
    by_start = np.argsort(starts, kind="stable")
    starts, ends = starts[by_start], np.maximum.accumulate(ends[by_start])
    first = np.flatnonzero(np.r_[True, starts[1:] > ends[:-1] + gap])
    return starts[first], ends[np.r_[first[1:], len(ends)] - 1]


class _Pagemap:
    """Reads the populated entries of areas."""

    def __init__(self, pid: str) -> None:
        path = f"/proc/{pid}/pagemap"
        with _readable(pid, path):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # Allocated once, so that reading oneself changes little; a scan or a read takes as many calls as it needs.
        self._regions = np.zeros((4096, 3), dtype=np.uint64)
        self._buffer = np.zeros(1 << 12, dtype=np.uint64)
        self.scans = True

    def close(self) -> None:
        os.close(self._fd)

    def read(self, areas: Sequence[Area], whole: bool) -> Entries:
        """Entries of these areas; `whole`: they are all there are, so one scan covers them."""
        found = self._scan(areas, whole) if areas else np.zeros((0, 3), dtype=np.int64)
        if found is None:
            some = [a for a in areas if a.fields.get("Rss", 1) or a.fields.get("Swap", 1) or "pf" in a.codes]
            starts = np.array([area.start for area in some], dtype=np.int64)
            ends = np.array([area.end for area in some], dtype=np.int64)
            found = np.zeros((0, 3), dtype=np.int64)
        else:
            # The scan passes over PFN mappings.
            pfnmaps = [area for area in areas if "pf" in area.codes]
            starts = np.r_[found[:, 0], np.array([area.start for area in pfnmaps], dtype=np.int64)]
            ends = np.r_[found[:, 1], np.array([area.end for area in pfnmaps], dtype=np.int64)]
        starts, ends = _coalesce(starts >> PAGE_SHIFT, ends >> PAGE_SHIFT, _MERGE_VPNS)
        vpns, values = self._populated(starts, ends)
        entries = Entries(vpns, values, *self._marks(vpns, found))
        if not whole:
            first, last = entries.slices(areas)
            entries = entries.at(_ranges(first, last - first))
        return entries

    def _scan(self, areas: Sequence[Area], whole: bool) -> I64 | None:
        """PAGEMAP_SCAN: (start, end, categories) of populated regions; None where the kernel has none."""
        if not self.scans:
            return None
        spans = [(areas[0].start, areas[-1].end)] if whole else [(area.start, area.end) for area in areas]
        parts = []
        address = self._regions.ctypes.data
        for start, end in spans:
            while start < end:
                want = _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED
                show = _PAGE_IS_PFNZERO | _PAGE_IS_HUGE
                arg = bytearray(
                    struct.pack("=12Q", 96, 0, start, end, 0, address, len(self._regions), 0, 0, 0, want, want | show)
                )
                try:
                    n = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, arg)
                except OSError as error:
                    if error.errno in (errno.ENOTTY, errno.EINVAL):
                        self.scans = False
                        return None
                    if error.errno == errno.ESRCH:
                        raise _Torn from None
                    raise
                parts.append(self._regions[:n].astype(np.int64))
                start = struct.unpack_from("=Q", arg, 32)[0]  # walk_end
                if n == 0 and start < end:
                    break
        return np.concatenate(parts) if parts else np.zeros((0, 3), dtype=np.int64)

    def _populated(self, starts: I64, ends: I64) -> tuple[I64, U64]:
        there = np.uint64(PM_PRESENT | PM_SWAP)
        vpns: list[I64] = [np.zeros(0, dtype=np.int64)]
        values: list[U64] = [np.zeros(0, dtype=np.uint64)]
        largest = min(_CHUNK, int((ends - starts).max(initial=1)))
        if largest > len(self._buffer):
            self._buffer = np.zeros(largest, dtype=np.uint64)
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            for vpn in range(start, end, _CHUNK):
                buffer = self._buffer[: min(_CHUNK, end - vpn)]
                _pread(self._fd, buffer, vpn)
                index = np.flatnonzero(buffer & there)
                vpns.append(index + vpn)
                values.append(buffer[index])
        return np.concatenate(vpns), np.concatenate(values)

    @staticmethod
    def _marks(vpns: I64, regions: I64) -> tuple[Bool, Bool]:
        huge, zero = np.zeros(len(vpns), dtype=bool), np.zeros(len(vpns), dtype=bool)
        for mark, bit in ((huge, _PAGE_IS_HUGE), (zero, _PAGE_IS_PFNZERO)):
            some = regions[regions[:, 2] & bit != 0]
            first = np.searchsorted(vpns, some[:, 0] >> PAGE_SHIFT)
            last = np.searchsorted(vpns, some[:, 1] >> PAGE_SHIFT)
            mark[_ranges(first, last - first)] = True
        return huge, zero


def _pread(fd: int, buffer: U64, index: int) -> None:
    """Fill a buffer from entry `index` of a file of uint64 on; `_Torn` where the file ends."""
    view = buffer.data.cast("B")
    done = 0
    while done < len(view):
        n = os.preadv(fd, [view[done:]], index * 8 + done)
        if n == 0:
            raise _Torn
        done += n


# --- kpageflags and kpagecount ----------------------------------------------------------------------------------------
@dataclass(slots=True)
class Frames:
    """Page frames by ascending PFN: ``/proc/kpageflags`` and ``/proc/kpagecount`` of each."""

    pfn: I64
    flags: U64
    count: I64

    def where(self, pfns: I64) -> I64:
        """Position of PFNs, all of which are here."""
        return _where(self.pfn, pfns)

    def has(self, bit: int) -> Bool:
        """One flag of all frames."""
        return _bit(self.flags, bit)

    def updated(self, newer: Frames) -> Frames:
        """These and newer ones, which win."""
        old = ~np.isin(self.pfn, newer.pfn, assume_unique=True)
        pfn = np.r_[self.pfn[old], newer.pfn]
        order = np.argsort(pfn, kind="stable")
        return Frames(
            pfn[order], np.r_[self.flags[old], newer.flags][order], np.r_[self.count[old], newer.count][order]
        )


def _bit(flags: U64, bit: int) -> Bool:
    return (flags >> np.uint64(bit) & np.uint64(1)).astype(bool)


def _distinct(values: I64) -> I64:
    """The distinct values, ascending.

    numpy.unique hashes them first, and its sort does not profit from runs that are in order: together ten times slower.
    """
    values = np.sort(values, kind="stable")
    return values[np.r_[True, values[1:] != values[:-1]][: len(values)]]


def _where(ascending: I64, wanted: I64) -> I64:
    """Position in `ascending` of values that are in it; fast where it has long consecutive stretches."""
    if not len(wanted):
        return wanted
    first = np.flatnonzero(np.r_[True, np.diff(ascending) != 1])
    stretch = np.searchsorted(ascending[first], wanted, side="right") - 1
    return wanted - ascending[first][stretch] + first[stretch]


class _KPages:
    """Reads kpageflags and kpagecount; OSError where that is not allowed."""

    def __init__(self) -> None:
        self._flags = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._count = os.open("/proc/kpagecount", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(self._flags)
            raise

    def close(self) -> None:
        os.close(self._flags)
        os.close(self._count)

    def read(self, pfns: I64) -> Frames:
        """Frames of these PFNs and of the folios they belong to, mapped or not."""
        pfns = _distinct(pfns)
        if not len(pfns):
            return Frames(pfns, np.zeros(0, dtype=np.uint64), pfns)
        # One more at the end of each stretch shows whether a folio goes on there.
        last = pfns[np.r_[np.diff(pfns) != 1, True]]
        frames = _distinct(np.r_[pfns, last + 1])
        frames, flags = self._read(self._flags, frames)
        for order in (4, 9, 18):
            tail = _bit(flags, KPF_TAIL)
            alone = np.diff(frames) != 1
            before = frames[np.r_[True, alone] & tail]
            after = frames[np.r_[alone, True] & tail] + 1
            if not len(before) and not len(after):
                break
            mask = np.int64((1 << order) - 1)
            lengths = np.r_[before & mask, (-after & mask) + 1]
            more, more_flags = self._read(self._flags, _distinct(_ranges(np.r_[before & ~mask, after], lengths)))
            frames, index = np.unique(np.r_[more, frames], return_index=True)
            flags = np.r_[more_flags, flags][index]
        _, start, size = _folios(frames, flags)
        used = np.zeros(len(start), dtype=bool)
        used[np.searchsorted(frames[start], pfns, side="right") - 1] = True
        kept = np.repeat(used, size)
        frames, flags = frames[kept], flags[kept]
        all_frames, count = self._read(self._count, frames)
        return Frames(frames, flags, count[_where(all_frames, frames)].astype(np.int64))

    @staticmethod
    def _read(fd: int, pfns: I64) -> tuple[I64, U64]:
        """Values of ascending PFNs and of those in short gaps between them; 0 beyond the end of memory."""
        if not len(pfns):
            return pfns, np.zeros(0, dtype=np.uint64)
        first = np.flatnonzero(np.r_[True, np.diff(pfns) > _MERGE_PFNS])
        starts, ends = pfns[first], pfns[np.r_[first[1:], len(pfns)] - 1] + 1
        values = np.zeros(int((ends - starts).sum()), dtype=np.uint64)
        at = 0
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            with contextlib.suppress(_Torn):
                _pread(fd, values[at : at + end - start], start)
            at += end - start
        return _ranges(starts, ends - starts), values


def _folios(pfn: I64, flags: U64) -> tuple[Bool, I64, I64]:
    """Folios of ascending frames: which frames start one, their positions, their sizes in pages."""
    starts = ~_bit(flags, KPF_TAIL) | np.r_[True, np.diff(pfn) != 1]
    first = np.flatnonzero(starts)
    return starts, first, np.diff(np.r_[first, len(pfn)])


# --- capture ----------------------------------------------------------------------------------------------------------
def capture(
    pid: int | str,
    *,
    freeze: bool = False,
    semantics: KernelSemantics | None = None,
    pmd: Literal["split", "keep"] = "split",
    swap: Literal["keep", "drop"] = "keep",
    progress: Progress | None = None,
    retries: int = 3,
) -> Capture:
    """Read the page tables of a process on this machine.

    Models nothing and changes nothing, except that `freeze` stops the process for as long as it is read.

    Parameters
    ----------
    pid : int or str
        Process id, or ``"self"``. Areas of the reading process that change while they are read are taken as they are
        and listed in `Capture.bound`.
    freeze : bool
        SIGSTOP before, SIGCONT afterwards whatever happens; a process that is stopped already stays so. Its parent
        may notice.
    semantics : KernelSemantics, optional
        Of the running kernel; found out when left out.
    pmd : {"split", "keep"}
        PMD-mapped THPs as 512 PTEs, as after a split, or as leaves of the Mm's second pool. Hugetlb pages always are
        leaves.
    swap : {"keep", "drop"}
        Swapped-out pages, markers and other entries that are not present: as swap-type PTEs, or left out.
    progress : callable, optional
        Called as ``progress(done, total)`` after each step.
    retries : int
        How often to read areas again that changed between the two reads.

    Returns
    -------
    Capture

    Raises
    ------
    ProcessGoneError
        No such process, or it exited meanwhile.
    PermissionDeniedError
        Not allowed to read it. Hidden PFNs alone are no error, see `Capture.pfns`.
    CaptureError
        A kernel thread; an area that kept changing; a machine that is not x86-64.
    """
    name = _check_arguments(pid, pmd, swap, retries)
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        frozen = stack.enter_context(_frozen(name)) if freeze else False
        reader = _Reader(name, progress or (lambda done, total: None))
        stack.callback(reader.close)
        reader.run(retries)
    kernel, notes = running() if semantics is None else (semantics, [])
    result = _Builder(reader, kernel, pmd, swap).build()
    result.seen = reader.seen
    result.notes[:0] = notes
    result.env.update(
        pid=int(name), comm=reader.comm, kernel=platform.release(), semantics=kernel.label,
        rounds=reader.rounds, frozen=bool(frozen), seconds=time.perf_counter() - began,
    )  # fmt: skip
    reader.step()
    return result


def _check_arguments(pid: int | str, pmd: str, swap: str, retries: int) -> str:
    if pid == "self":
        pid = os.getpid()
    try:
        number = int(pid) if isinstance(pid, str) else pid.__index__()
    except (ValueError, AttributeError):
        raise ArgumentError(f"pid must be a process id or 'self', not {pid!r}") from None
    if number <= 0:
        raise ArgumentError(f"pid must be positive, not {number}")
    if pmd not in ("split", "keep"):
        raise ArgumentError(f"pmd={pmd!r}: choose 'split' or 'keep'")
    if swap not in ("keep", "drop"):
        raise ArgumentError(f"swap={swap!r}: choose 'keep' or 'drop'")
    if retries < 0:
        raise ArgumentError(f"retries must not be negative, not {retries}")
    if platform.machine() not in ("x86_64", "AMD64"):
        raise CaptureError(f"capture reads x86-64 processes only; this machine is {platform.machine()}")
    return str(number)


@dataclass(slots=True)
class Seen:
    """What the kernel shows of a process, nothing added.

    Attributes
    ----------
    areas : list of Area
        In address order.
    entries : Entries
        What is populated of them.
    frames : Frames or None
        Of every folio that they map, whole; None where the kernel hides PFNs.
    """

    areas: list[Area]
    entries: Entries
    frames: Frames | None


def look(pid: int | str, *, within: Sequence[tuple[int, int]] | None = None, retries: int = 3) -> Seen:
    """Read what `capture` reads, and build nothing from it; same errors.

    Parameters
    ----------
    pid, retries
        See `capture`.
    within : sequence of (start, end), optional
        Only entries of the areas that overlap these byte addresses; all areas are listed either way.
    """
    name = _check_arguments(pid, "keep", "keep", retries)
    reader = _Reader(name, lambda done, total: None, within)
    try:
        reader.run(retries)
    finally:
        reader.close()
    return reader.seen


class _Reader:
    """Everything that is read, until it is consistent."""

    def __init__(self, pid: str, progress: Progress, within: Sequence[tuple[int, int]] | None = None) -> None:
        self.pid = pid
        self._within = within
        self.own = int(pid) == os.getpid()
        self.rounds = 0
        self.areas: list[Area] = []
        self.entries = Entries(*(np.zeros(0, dtype=t) for t in (np.int64, np.uint64, bool, bool)))
        self.frames: Frames | None = None
        self.hidden = False
        self.changed: list[Area] = []
        self.scans = True
        self.left_out: list[str] = []
        self._progress, self._done = progress, 0
        with _readable(pid, f"/proc/{pid}/stat"):
            self.comm = _stat(pid)[2]
        self.tmpfs = frozenset[str]()
        with contextlib.suppress(CaptureError):
            self.tmpfs = _tmpfs_devices(_text(pid, "mountinfo"))
        self._pagemap = _Pagemap(pid)
        self._kpages: _KPages | None = None
        with contextlib.suppress(OSError):
            self._kpages = _KPages()

    def close(self) -> None:
        self._pagemap.close()
        if self._kpages is not None:
            self._kpages.close()

    @property
    def seen(self) -> Seen:
        return Seen(self.areas, self.entries, None if self.hidden else self.frames)

    def step(self) -> None:
        self._done = min(self._done + 1, _STEPS)
        self._progress(self._done, _STEPS)

    def run(self, retries: int) -> None:
        settled: dict[tuple[Any, ...], Entries] = {}
        unsettled: dict[tuple[Any, ...], Entries] = {}
        for _ in range(retries + 1):
            self.rounds += 1
            try:
                unsettled = self._round(settled)
            except _Torn:
                # The process exited (an error) or executed another program (which is then read).
                if not _text(self.pid, "maps"):
                    _no_memory(self.pid)
                self._pagemap.close()
                self._pagemap = _Pagemap(self.pid)
                settled.clear()
                self.frames, self.areas, self.changed = None, [], []
                continue
            if not self.changed:
                break
        if not self.areas:
            raise CaptureError(f"process {self.pid} keeps executing other programs: try again")
        if self.changed and not self.own:
            raise CaptureError(
                f"area {self.changed[0].label()} of process {self.pid} kept changing while it was read: try again, "
                "or stop the process meanwhile (freeze=True, --freeze)"
            )
        settled.update(unsettled)
        self.scans = self._pagemap.scans
        self.entries = Entries.join([settled[a.key] for a in self.areas if a.key in settled] or [self.entries])

    def _wanted(self, area: Area) -> bool:
        return self._within is None or any(start < area.end and area.start < end for start, end in self._within)

    def _round(self, settled: dict[tuple[Any, ...], Entries]) -> dict[tuple[Any, ...], Entries]:
        """Read what is not settled twice; returns what was not the same."""
        every = parse_smaps(_text(self.pid, "smaps"))
        self.areas = [area for area in every if area.start < _VSYSCALL]
        self.left_out = [area.label() for area in every if area.start >= _VSYSCALL]
        if not self.areas:
            _no_memory(self.pid)
        self.step()
        pending = [area for area in self.areas if area.key not in settled and self._wanted(area)]
        whole = len(pending) == len(self.areas)
        before = self._pagemap.read(pending, whole)
        self.step()
        self._read_frames(pending, before)
        self.step()
        after = self._pagemap.read(pending, whole)
        now = {area.key for area in parse_smaps(_text(self.pid, "maps")) if area.start < _VSYSCALL}
        if not now:
            _no_memory(self.pid)
        self.step()
        same = before.same(after)
        first, last = before.slices(pending)
        again_first, again_last = after.slices(pending)
        unsettled: dict[tuple[Any, ...], Entries] = {}
        self.changed = []
        for i, area in enumerate(pending):
            mine = before.at(slice(first[i], last[i]))
            if area.key in now and (same or mine.same(after.at(slice(again_first[i], again_last[i])))):
                settled[area.key] = mine
            else:
                unsettled[area.key] = mine
                self.changed.append(area)
        keys = {area.key for area in self.areas}
        if not unsettled and now != keys:
            key = min(now - keys)
            self.changed = [Area(key, {}, frozenset())]
        return unsettled

    def _read_frames(self, areas: Sequence[Area], entries: Entries) -> None:
        present = entries.value & np.uint64(PM_PRESENT) != 0
        pfns = (entries.value & np.uint64(PM_PFN)).astype(np.int64)
        if present.any() and not pfns[present].any():
            self.hidden = True
        if self._kpages is None:
            self.hidden = True
        if self.hidden:
            return
        # Device memory has no page frames; copies of it on write have.
        first, last = entries.slices(areas)
        device = np.array([_is_device(area) for area in areas], dtype=bool)
        present[_ranges(first[device], (last - first)[device])] = False
        assert self._kpages is not None
        frames = self._kpages.read(pfns[present])
        self.frames = frames if self.frames is None else self.frames.updated(frames)


def _is_device(area: Area) -> bool:
    return "pf" in area.codes and not arch.is_cow_mapping(area.vm_flags)


class _Builder:
    """Turns what was read into an Mm."""

    def __init__(self, reader: _Reader, semantics: KernelSemantics, pmd: str, swap: str) -> None:
        self.semantics = semantics
        self.layout = arch.layout_for("x86-64", semantics.switches)
        self.keep_pmds, self.drop_swap = pmd == "keep", swap == "drop"
        self.reader = reader
        self.areas, self.entries = reader.areas, reader.entries
        self.bound: list[str] = []
        self.notes: list[str] = []

        first, last = self.entries.slices(self.areas)
        self._nr = last - first
        value = self.entries.value
        self.present = value & np.uint64(PM_PRESENT) != 0
        self.swapped = ~self.present
        self.soft_dirty = value & np.uint64(PM_SOFT_DIRTY) != 0
        self.uffd_wp = value & np.uint64(PM_UFFD_WP) != 0
        self.pfn = np.where(self.present, value & np.uint64(PM_PFN), np.uint64(0)).astype(np.int64)
        self.hugetlb = self._of_area("ht" in area.codes for area in self.areas)
        self.leaf = self.hugetlb | (self.entries.huge & self.present & self.keep_pmds)

    def _of_area(self, values: Any, dtype: Any = bool) -> npt.NDArray[Any]:
        """One value per area as one per entry."""
        return np.repeat(np.fromiter(values, dtype=dtype, count=len(self.areas)), self._nr)

    def build(self) -> Capture:
        frames = self._hidden_frames() if self.reader.hidden else self._real_frames()
        normal = self.present & ~self.special
        at = frames.where(self.pfn[normal])
        mine = np.bincount(at[~self.leaf[normal]], minlength=len(frames.pfn))
        mine_entire = np.bincount(at[self.leaf[normal]], minlength=len(frames.pfn))
        folios, words = self._folio_table(frames, at, mine, mine_entire)
        word = np.zeros(len(self.pfn), dtype=np.uint64)
        word[normal] = words[at]
        entries = self._ptes(word)
        mm = Mm(
            self.layout, folios, vmas=self._vmas(word), **self._tables(entries), rss=self._rss(normal, word), mm_id=1,
            name=f"{self.reader.comm}[{self.reader.pid}]", hugetlb_usage=int((self.hugetlb & self.present).sum()),
        )  # fmt: skip
        if not self.reader.hidden:
            zero = self.present & self.entries.zero
            heads = zero & self.leaf & (self.entries.vpn % self.layout.ptrs_per_pte == 0)
            mm.huge_zero = bool(heads.any())
            folios.huge_zero_pfn = int(self.pfn[heads][0]) if mm.huge_zero else None
            small = self.pfn[zero & ~self.leaf]
            folios.zero_pfn = int(small[0]) if len(small) else None
        folios.swap.add(swap_keys(self.layout, mm.entries.reshape(-1), self.semantics))
        mm.validate()
        self._say(mm)
        return Capture(mm, self.bound, "hidden" if self.reader.hidden else "real", self.notes)

    # --- frames -------------------------------------------------------------------------------------------------------

    def _hidden_frames(self) -> Frames:
        """One small folio per present entry; the zero page and PFN mappings are known without their PFN."""
        value = self.entries.value
        self.pfn = np.where(self.present, np.cumsum(self.present), 0)
        self.special = self.present & (self.entries.zero | self._of_area("pf" in area.codes for area in self.areas))
        self.leaf &= self.hugetlb
        normal = self.present & ~self.special
        shmem = self._of_area(_vm_ops(area, self.reader.tmpfs) == "shmem" for area in self.areas)[normal]
        anon = value[normal] & np.uint64(PM_FILE) == 0
        exclusive = value[normal] & np.uint64(PM_EXCLUSIVE) != 0
        flags = np.zeros(len(anon), dtype=np.uint64)
        marks = ((KPF_ANON, anon), (KPF_SWAPBACKED, anon | shmem), (KPF_ANON_EXCLUSIVE, anon & exclusive))
        for bit, mark in marks:
            flags |= mark.astype(np.uint64) << np.uint64(bit)
        return Frames(self.pfn[normal], flags, np.where(exclusive, 1, 2))

    def _real_frames(self) -> Frames:
        frames = self.reader.frames
        assert frames is not None
        device = self._of_area(_is_device(area) for area in self.areas)
        looked_up = self.present & ~device
        at = frames.where(self.pfn[looked_up])
        absent = frames.has(KPF_NOPAGE) | ((frames.flags == 0) & (frames.count == 0))
        absent |= frames.has(KPF_ZERO_PAGE)
        unmapped = ~frames.has(KPF_ANON)[at] & self._of_area("pf" in area.codes for area in self.areas)[looked_up]
        unmapped |= (frames.count[at] == 0) & self._of_area("mm" in area.codes for area in self.areas)[looked_up]
        self.special = self.present & device
        self.special[looked_up] = absent[at] | unmapped
        return frames

    # --- the memmap ---------------------------------------------------------------------------------------------------

    def _folio_table(self, frames: Frames, at: I64, mine: I64, mine_entire: I64) -> tuple[FolioTable, U64]:
        """The FolioTable, and the word of each frame (0 of those that no normal entry maps).

        `at` are the frames of normal entries; `mine` and `mine_entire` count this mm's mappings of each frame by PTEs
        and by leaves.
        """
        starts, first, size = _folios(frames.pfn, frames.flags)
        used = np.zeros(len(first), dtype=bool)
        used[(np.cumsum(starts) - 1)[at]] = True
        # A folio that changed while it was read need not look like one.
        head = frames.has(KPF_HEAD)[first] | (size == 1)
        odd = used & ((size & (size - 1) != 0) | (frames.pfn[first] & (size - 1) != 0) | ~head)
        if odd.any():
            self.notes.append(f"{int(odd.sum())} folios of unlikely shape are taken as small ones")
            starts |= np.repeat(odd, size)
            used = np.repeat(used, size)[starts]
            first = np.flatnonzero(starts)
            size = np.diff(np.r_[first, len(starts)])
        if not used.any():
            folios = FolioTable()
            self._skip_mm_ids(folios)
            return folios, np.zeros(len(frames.pfn), dtype=np.uint64)
        kept = np.repeat(used, size)
        first, size = first[used], size[used]

        order = np.frexp(size.astype(float))[1] - 1
        flags = frames.flags[first]
        anon, hugetlb, ksm = (_bit(flags, bit) for bit in (KPF_ANON, KPF_HUGE, KPF_KSM))
        ksm &= anon & (size == 1) & self._in_ksm_areas(first, at, len(frames.pfn)) & ~_bit(flags, KPF_ANON_EXCLUSIVE)

        # Mapcounts. kpagecount adds leaf mappings to each page's own.
        entire = np.where(hugetlb, np.maximum(frames.count[first], mine_entire[first]), mine_entire[first])
        count = frames.count[kept] - np.repeat(entire, size)
        count = np.maximum(count, mine[kept])
        count = np.where(np.repeat(hugetlb, size), 0, np.minimum(count, f.MAX_MAPCOUNT))
        begin = np.cumsum(size) - size
        large = np.minimum(np.add.reduceat(count, begin) + entire, f.MAX_COUNTER)
        own = np.add.reduceat(mine[kept], begin) + mine_entire[first]
        cached = ~anon | _bit(flags, KPF_SWAPCACHE)
        refcount = large + np.where(cached, size, 0) + _bit(flags, KPF_PRIVATE)

        u = np.uint64
        swapbacked = _bit(flags, KPF_SWAPBACKED) | anon
        whole = np.full(len(first), 1 << f.VALID_BIT, dtype=u)
        marks = ((f.ANON_BIT, anon), (f.SWAPBACKED_BIT, swapbacked), (f.KSM_BIT, ksm), (f.HUGETLB_BIT, hugetlb))
        for bit, mark in marks:
            whole |= mark.astype(u) << u(bit)
        whole |= order.astype(u) << u(f.ORDER_SHIFT)
        exclusive = np.repeat(anon, size) & frames.has(KPF_ANON_EXCLUSIVE)[kept]
        exclusive &= count + np.repeat(entire, size) <= 1
        # The kernel shows the first page's for all; under a PMD, there is no other.
        exclusive &= np.repeat(entire == 0, size) | np.isin(np.arange(len(count)), begin)
        word = np.repeat(whole, size) | count.astype(u)
        word |= exclusive.astype(u) << u(f.AE_BIT) | frames.has(KPF_HWPOISON)[kept].astype(u) << u(f.HWPOISON_BIT)
        has_entire = f.has_entire_mapcount(order, hugetlb)
        refcount = np.minimum(refcount, f.MAX_COUNTER)
        for page, counter, some in ((0, refcount, size > 0), (1, large, size > 1), (2, entire, has_entire)):
            word[begin[some] + page] |= counter[some].astype(u) << u(f.COUNTER_SHIFT)

        # MM-ID slots: this mm, and one other that stands for all others.
        aux = np.zeros(len(word), dtype=u)
        tracked = (size > 1) & ~hugetlb
        me, others = tracked & (own > 0), tracked & (large > own)
        aux[begin[me]] |= own[me].astype(u) | u(1 << f.AUX_COUNT_BITS)
        aux[begin[others] + 1] |= (large - own)[others].astype(u) | u(_OTHERS << f.AUX_COUNT_BITS)
        aux[begin[others]] |= u(1 << f.AUX_SHARED_BIT)

        pfns = frames.pfn[kept]
        table = {"pfn": pfns, "word": word, "aux": aux, "pincount": np.zeros(len(pfns), dtype=np.int64)}
        folios = FolioTable.from_pages_table(table)
        self._skip_mm_ids(folios)
        words = np.zeros(len(frames.pfn), dtype=u)
        words[kept] = word
        return folios, words

    @staticmethod
    def _skip_mm_ids(folios: FolioTable) -> None:
        while folios.new_mm_id() < _OTHERS:
            pass

    def _in_ksm_areas(self, first: I64, at: I64, nr: int) -> Bool:
        """Whether folios are mapped in an area that smaps shows merged pages of (some kernels flag all anon pages)."""
        merged = self._of_area(bool(area.fields.get("KSM", "mg" in area.codes)) for area in self.areas)
        mark = np.zeros(nr, dtype=bool)
        mark[at[merged[self.present & ~self.special]]] = True
        return mark[first]

    # --- entries ------------------------------------------------------------------------------------------------------

    def _ptes(self, word: U64) -> U64:
        """Synthesised entries; `word` is the memmap's word of each normal one, 0 elsewhere."""
        layout, u = self.layout, np.uint64

        def flag(bit: int) -> Bool:
            return word >> u(bit) & u(1) != 0

        prot = self._of_area((arch.vm_get_page_prot(layout, area.vm_flags) for area in self.areas), np.uint64)
        vm_flags = [area.vm_flags for area in self.areas]
        writable = self._of_area(bool(flags & arch.VM_WRITE) for flags in vm_flags)
        shared = self._of_area(bool(flags & arch.VM_SHARED) for flags in vm_flags)
        shadow_stack = self._of_area(bool(flags & arch.VM_SHADOW_STACK) for flags in vm_flags)
        # smaps counts a page if its entry or its folio is referenced (dirty): only that no entry is, is certain.
        young = self._of_area(area.fields.get("Referenced", 1) > 0 for area in self.areas)
        dirty = self._of_area(
            area.fields.get("Shared_Dirty", 1) + area.fields.get("Private_Dirty", 1) > 0 for area in self.areas
        )

        normal = word != 0
        exclusive = flag(f.AE_BIT) & ~flag(f.KSM_BIT) & (word & u(f.MAX_MAPCOUNT) <= 1)
        write = writable & normal & ~self.uffd_wp & (shared | exclusive)
        dirty &= normal & np.where(shared, write, flag(f.ANON_BIT))
        inverted = (prot != 0) & (prot & u(layout.valid) == 0)
        pfn = np.where(inverted, ~self.pfn, self.pfn).astype(u) << u(layout.pfn_shift) & u(layout.pfn_mask)
        value = pfn | prot & ~u(layout.write | layout.young)
        # Entries that the hardware ignores have no write bit.
        write &= ~inverted
        stack = shadow_stack & write
        write &= ~shadow_stack
        value[write] |= u(layout.write)
        value[young | inverted] |= u(layout.young)
        dirty_bit = np.where(write | stack | (not layout.saved_dirty), u(layout.dirty), u(layout.saved_dirty))
        value |= np.where(dirty | stack, dirty_bit, u(0))
        value[self.uffd_wp] |= u(layout.uffd_wp)
        value[self.special] |= u(layout.special)
        if self.semantics.config.mem_soft_dirty:
            tracked = self._of_area(not flags & arch.VM_SOFTDIRTY for flags in vm_flags)
            value[np.where(tracked, self.soft_dirty, dirty)] |= u(layout.soft_dirty)
        return np.where(self.present, value, self._swap_ptes())

    def _swap_ptes(self) -> U64:
        layout, u = self.layout, np.uint64
        frame = self.entries.value & u(PM_PFN)
        kind, offset = frame & u(31), frame >> u(5)
        if self.reader.hidden:
            guard = self.entries.value & u(PM_GUARD) != 0
            kind = np.where(guard, u(arch.SWP_PTE_MARKER), u(0))
            offset = np.where(guard, u(arch.PTE_MARKER_GUARD), np.cumsum(self.swapped).astype(u))
        self.real_swap = self.swapped & (kind < u(min(swap_types(self.semantics))))
        offset ^= u((1 << layout.swp_offset_bits) - 1)
        value = kind << u(layout.swp_type_shift) | offset << u(layout.swp_offset_shift)
        private = self._of_area(arch.is_cow_mapping(area.vm_flags) for area in self.areas)
        value[self.real_swap & private] |= u(layout.swp_exclusive)
        marker = kind == u(arch.SWP_PTE_MARKER)
        value[self.uffd_wp & ~marker] |= u(layout.swp_uffd_wp)
        if self.semantics.config.mem_soft_dirty:
            value[self.soft_dirty & ~marker] |= u(layout.swp_soft_dirty)
        return value

    def _tables(self, entries: U64) -> dict[str, Any]:
        """The two pools."""
        vpn, ptrs = self.entries.vpn, self.layout.ptrs_per_pte
        small = ~self.leaf & (self.present if self.drop_swap else True)
        table = vpn[small] // ptrs
        new = np.r_[True, np.diff(table) != 0] if len(table) else np.zeros(0, dtype=bool)
        pool = np.zeros((int(new.sum()), ptrs), dtype=np.uint64)
        pool.reshape(-1)[(np.cumsum(new) - 1) * ptrs + vpn[small] % ptrs] = entries[small]
        leaf = self.leaf & (vpn % ptrs == 0) & (self.present if self.drop_swap else True)
        return {
            "vpns": table[new] * ptrs,
            "entries": pool,
            "pmd_vpns": vpn[leaf],
            "pmd_entries": np.where(self.present[leaf], entries[leaf] | np.uint64(_PSE), entries[leaf]),
        }

    def _rss(self, normal: Bool, word: U64) -> I64:
        counted = normal & ~self.hugetlb
        anon = word >> np.uint64(f.ANON_BIT) & np.uint64(1) != 0
        swapbacked = word >> np.uint64(f.SWAPBACKED_BIT) & np.uint64(1) != 0
        rss = np.zeros(NR_MM_COUNTERS, dtype=np.int64)
        rss[MM_ANONPAGES] = (counted & anon).sum()
        rss[MM_SHMEMPAGES] = (counted & ~anon & swapbacked).sum()
        rss[MM_FILEPAGES] = (counted & ~anon & ~swapbacked).sum()
        rss[MM_SWAPENTS] = 0 if self.drop_swap else self.real_swap.sum()
        return rss

    # --- areas --------------------------------------------------------------------------------------------------------

    def _vmas(self, word: U64) -> list[Vma]:
        number = self._of_area(range(len(self.areas)), np.int64)
        guarded, anon = (
            np.bincount(number[which], minlength=len(self.areas)).tolist()
            for which in (self.entries.value & np.uint64(PM_GUARD) != 0, _bit(word, f.ANON_BIT))
        )
        vmas = []
        for area, guards, anons in zip(self.areas, guarded, anon, strict=True):
            # smaps has neither of the first two for hugetlb.
            has_anon = area.fields.get("Anonymous", 0) > 0 or area.fields.get("Swap", 0) > 0 or anons > 0
            # Before VM_MAYBE_GUARD, installing a guard prepared an anon_vma.
            has_anon |= guards > 0 and not self.semantics.vm_maybe_guard
            vmas.append(
                Vma(
                    area.start,
                    area.end,
                    area.vm_flags,
                    anon_vma=has_anon,
                    vm_ops=_vm_ops(area, self.reader.tmpfs),
                    name=area.name,
                    pgoff=area.key[3] >> PAGE_SHIFT,
                )
            )
        return vmas

    # --- what to say --------------------------------------------------------------------------------------------------

    def _say(self, mm: Mm) -> None:
        reader, say = self.reader, self.bound.append
        if reader.hidden:
            say("pfns: hidden by the kernel (CAP_SYS_ADMIN and /proc/kpage* are needed); made up, in address order")
            say("folios: sizes are hidden, all are taken as one page; mapcount 1 or 2 by pagemap's exclusive bit")
        say("entries.write: assumed where the area is writable and its page shared, or anonymous and exclusive")
        say("entries.young, entries.dirty: assumed for all pages of an area (dirty: anonymous or shared writable), "
            "unless smaps shows none")  # fmt: skip
        say("folios.refcount: mappings, page cache and swap cache; other references are hidden")
        say("folios.pincount, has_pinned: assumed none; pins are hidden")
        if not reader.hidden:
            self._say_of_folios(say)
        say("vmas.anon_vma: inferred from Anonymous or Swap > 0")
        say("tables: page tables without an entry are hidden")
        if any(vma.vm_flags & (arch.VM_UFFD_WP | arch.VM_UFFD_MISSING | arch.VM_UFFD_MINOR) for vma in mm.vmas):
            say("vmas.uffd_event_fork: assumed false")
        if self.semantics.config.mem_soft_dirty:
            say("entries.soft_dirty: assumed like dirty in areas that are soft-dirty as a whole")
        huge = int((self.entries.huge & self.present & ~self.hugetlb & (self.entries.vpn % 512 == 0)).sum())
        if huge and not self.keep_pmds:
            say(f"pmds: {huge} PMD-mapped THPs are shown as 512 PTEs each, as after a split")
        elif huge:
            say("folios.entire_mapcount: PMD mappings of other processes are taken as PTE mappings")
        if not reader.scans:
            say("pmds: this kernel (before v6.7) does not tell PMD-mapped THPs; all are taken as PTE-mapped")
        if any(area.fields.get("KernelPageSize", 0) > 2048 for area in self.areas if "ht" in area.codes):
            say("pmds: hugetlb pages above 2 MiB are shown as 2 MiB leaves")
        real = int(self.real_swap.sum())
        if real and not self.drop_swap:
            say("entries.swp_exclusive: assumed for swapped-out pages of private areas")
            say("swap slots: only this process's references are counted")
        if self.drop_swap and self.swapped.any():
            say(f"entries: {int(self.swapped.sum())} that are not present (swap, markers, migration) are left out")
        if reader.changed:
            names = "; ".join(area.label() for area in reader.changed[:5])
            more = f" and {len(reader.changed) - 5} more" if len(reader.changed) > 5 else ""
            say(f"vmas: {len(reader.changed)} changed while this process read itself: {names}{more}")
        self.notes += [f"left out: {label}" for label in reader.left_out]

    def _say_of_folios(self, say: Callable[[str], None]) -> None:
        if self.semantics.config.no_page_mapcount:
            say("folios.mapcount: large folios show an average (CONFIG_NO_PAGE_MAPCOUNT)")
        if self.semantics.large_mapcount:  # v6.10
            say("folios.anon_exclusive: large folios show their first page's; pages mapped more than once are not")
        if self.semantics.mm_id:
            say("folios.mm_ids: all other owners of a large folio are taken as one")
