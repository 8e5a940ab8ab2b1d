"""A small process that builds memory as it is told; run as a script by :class:`ptebatch.live.Subject`.

One JSON call per line (``{"do": name, ...arguments}``) on the file descriptor that is its first argument, one answer a
line on the second. It imports nothing that is not needed, so that there is little memory besides what it is told to
build, and exits when there are no more calls. Memory is handled by address, through the C library, because Python's own
mmap keeps neither address nor alignment.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import os
import signal
import struct
import sys
import time
from typing import Any

PAGE, PMD = 4096, 2 << 20
PROT_NONE, PROT_RW = 0, 3
MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 0x2, 0x10, 0x20, 0x4000
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MADV_DONTFORK, MADV_DOFORK, MADV_HUGEPAGE, MADV_COLD = 10, 11, 14, 20
PR_SET_PDEATHSIG = 1
_SYS_USERFAULTFD, _SYS_IO_URING_SETUP, _SYS_IO_URING_REGISTER = 323, 425, 427
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_WRITEPROTECT = 0xC018AA3F, 0xC020AA00, 0xC018AA06
_RUSAGE_LONGS, _MINFLT = 18, 8  # struct rusage

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_memset = _libc.memset
_memset.restype = None
_memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

Runs = list[list[int]]
"""Pages: [address, number of pages, ...]; what follows is the caller's."""

_areas: dict[int, int] = {}  # what do_anon made: address to size


def _call(name: str, *arguments: int | bytes | ctypes.Array[Any]) -> int:
    converted = [ctypes.c_ulong(a & (1 << 64) - 1) if isinstance(a, int) else a for a in arguments]
    result = getattr(_libc, name)(*converted)
    if result in (-1, (1 << 64) - 1, None):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return int(result)


def do_map(
    size: int,
    prot: int,
    flags: int,
    path: str | None = None,
    offset: int = 0,
    shift: int = 0,
    advice: int | None = None,
) -> int:
    """Map memory `shift` bytes behind a 2 MiB boundary, with unreadable address space on both sides."""
    whole = size + shift + 3 * PMD & -PMD
    reserved = _call("mmap", 0, whole + PMD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    at = (reserved + PAGE + PMD - 1 & -PMD) + shift
    fd = -1
    if path == "memfd":
        fd = os.memfd_create("ptebatch")
        os.truncate(fd, offset + size)
    elif path is not None:
        fd = os.open(path, os.O_RDWR)
    _call("mmap", at, size, prot, flags | MAP_FIXED | (MAP_ANONYMOUS if path is None else 0), fd, offset)
    if fd >= 0:
        os.close(fd)
    if advice is not None:
        _call("madvise", at, size, advice)
    return at


def do_reserve(size: int) -> int:
    """Address space to move a mapping to, on a 2 MiB boundary."""
    reserved = _call("mmap", 0, size + 2 * PMD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    return reserved + PAGE + PMD - 1 & -PMD


def do_touch(runs: Runs, write: bool = True, value: int | None = None) -> None:
    """Write (each page its own content, none of it zero, unless `value` says) or read one byte of each page."""
    for address, nr, *_ in runs:
        for at in range(address, address + nr * PAGE, PAGE):
            if write:
                _memset(at, 1 + at // PAGE % 251 if value is None else value, 1)
            else:
                ctypes.string_at(at, 1)


def do_fill(runs: Runs, value: int) -> None:
    """Write whole pages."""
    for address, nr, *_ in runs:
        _memset(address, value, nr * PAGE)


def do_store(runs: Runs) -> list[int]:
    """Write one byte of each page; returns the minor faults of each write."""
    addresses = [at for address, nr, *_ in runs for at in range(address, address + nr * PAGE, PAGE)]
    usage = (ctypes.c_long * (_RUSAGE_LONGS * (len(addresses) + 1)))()
    step = _RUSAGE_LONGS * ctypes.sizeof(ctypes.c_long)
    slots = [ctypes.c_void_p(ctypes.addressof(usage) + i * step) for i in range(len(addresses) + 1)]
    scratch = ctypes.create_string_buffer(1)
    _store([ctypes.addressof(scratch)] * len(addresses), slots)  # whatever Python itself needs has now been touched
    _store([ctypes.addressof(scratch)] * len(addresses), slots)
    _store(addresses, slots)
    counts = [int(usage[i * _RUSAGE_LONGS + _MINFLT]) for i in range(len(slots))]
    return [after - before for before, after in itertools.pairwise(counts)]


def _store(addresses: list[int], slots: list[ctypes.c_void_p]) -> None:
    getrusage, memset = _libc.getrusage, _memset
    getrusage(0, slots[0])
    for i, at in enumerate(addresses):
        memset(at, 7, 1)
        getrusage(0, slots[i + 1])


def do_madvise(address: int, size: int, advice: int) -> None:
    """madvise(2)."""
    _call("madvise", address, size, advice)


def do_mprotect(address: int, size: int, prot: int) -> None:
    """mprotect(2)."""
    _call("mprotect", address, size, prot)


def do_munmap(address: int, size: int) -> None:
    """munmap(2)."""
    _call("munmap", address, size)


def do_mlock(address: int, size: int) -> None:
    """mlock(2)."""
    _call("mlock", address, size)


def do_drain() -> None:
    """Have this CPU's lists of pages on their way to or from the LRU given up: each holds references."""
    at = _call("mmap", 0, PAGE, PROT_RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    _call("madvise", at, PAGE, MADV_COLD)
    _call("munmap", at, PAGE)


def do_mremap(address: int, size: int, to: int) -> None:
    """mremap(2) to an address; what was there is unmapped."""
    _call("mremap", address, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to)


def do_uffd(address: int, size: int, features: int) -> int:
    """Register memory for write-protection with a new userfaultfd; returns its file descriptor."""
    fd = _call("syscall", _SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    _call("ioctl", fd, _UFFDIO_API, ctypes.create_string_buffer(struct.pack("=3Q", 0xAA, features, 0), 24))
    register = struct.pack("=4Q", address, size, 2, 0)  # UFFDIO_REGISTER_MODE_WP
    _call("ioctl", fd, _UFFDIO_REGISTER, ctypes.create_string_buffer(register, 32))
    return fd


def do_uffd_wp(fd: int, runs: Runs) -> None:
    """Write-protect pages through a userfaultfd."""
    for address, nr, *_ in runs:
        protect = struct.pack("=3Q", address, nr * PAGE, 1)  # UFFDIO_WRITEPROTECT_MODE_WP
        _call("ioctl", fd, _UFFDIO_WRITEPROTECT, ctypes.create_string_buffer(protect, 24))


def do_pin(address: int, size: int) -> int:
    """Pin memory as a registered buffer of a new io_uring; returns its file descriptor."""
    ring = _call("syscall", _SYS_IO_URING_SETUP, 1, ctypes.create_string_buffer(120))
    iovec = ctypes.create_string_buffer(struct.pack("=2Q", address, size), 16)
    _call("syscall", _SYS_IO_URING_REGISTER, ring, 0, iovec, 1)
    return ring


def do_fork(calls: int, answers: int) -> int:
    """Fork; the child takes calls from one file descriptor and answers on another. Returns its pid."""
    gc.freeze()
    pid = os.fork()
    if pid:
        os.close(calls)
        os.close(answers)
        return pid
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _serve(calls, answers)
    os._exit(0)


def do_reap(pid: int) -> int:
    """Wait for a child to end."""
    return os.waitpid(pid, 0)[1]


def do_anon(size: int, hugepage: bool, pte_mapped: bool) -> int:
    """Map and write private anonymous memory on a 2 MiB boundary."""
    at = do_map(size, PROT_RW, MAP_PRIVATE, advice=MADV_HUGEPAGE if hugepage else None)
    do_touch([[at, size // PAGE]])
    if pte_mapped:
        do_split([[at, size // PAGE]])
    _areas[at] = size
    return at


def do_write(address: int, size: int, step: int) -> None:
    """Write one byte every `step` bytes of what `do_anon` made."""
    if not any(at <= address and address + size <= at + whole for at, whole in _areas.items()):
        raise LookupError(hex(address))
    for at in range(address, address + size, step):
        _memset(at, 1 + ctypes.string_at(at, 1)[0] % 255, 1)


def do_time_fork() -> list[int]:
    """Fork, and have the child exit; nanoseconds that fork(2) takes, and from telling the child to its being reaped."""
    wait, go = os.pipe()
    begin = time.perf_counter_ns()
    pid = int(_libc.fork())
    if not pid:
        os.close(go)
        os.read(wait, 1)
        _libc._exit(0)
    forked = time.perf_counter_ns() - begin
    os.close(wait)
    time.sleep(0.001)  # until the child waits
    begin = time.perf_counter_ns()
    os.close(go)
    os.waitpid(pid, 0)
    return [forked, time.perf_counter_ns() - begin]


def do_time_unmap(address: int) -> int:
    """Give back what `do_anon` made; nanoseconds that munmap(2) takes."""
    size = _areas.pop(address)
    begin = time.perf_counter_ns()
    _call("munmap", address, size)
    return time.perf_counter_ns() - begin


def do_unmap(address: int) -> None:
    """Give back what `do_anon` made."""
    _call("munmap", address, _areas.pop(address))


def do_split(runs: Runs) -> None:
    """Have whatever a PMD maps mapped by PTEs: splitting an area inside the PMD does that; it is then made whole."""
    for address, nr, *_ in runs:
        for at in range(address, address + nr * PAGE - PMD + 1, PMD):
            _call("madvise", at + PAGE, PAGE, MADV_DONTFORK)
            _call("madvise", at + PAGE, PAGE, MADV_DOFORK)


def _serve(calls: int, answers: int) -> None:
    """Do as told until there is nobody left to tell, or to answer."""
    with contextlib.suppress(BrokenPipeError):
        _answer_all(calls, answers)


def _answer_all(calls: int, answers: int) -> None:
    os.write(answers, b"{}\n")
    with open(calls, encoding="utf-8", closefd=False) as lines:
        for line in lines:
            call = json.loads(line)
            try:
                answer = {"result": globals()["do_" + call.pop("do")](**call)}
            except Exception as error:
                answer = {"error": repr(error)}
            os.write(answers, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    gc.disable()
    _serve(*map(int, sys.argv[1:]))
