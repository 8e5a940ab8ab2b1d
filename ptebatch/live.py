"""The machine under our feet: settings to borrow and processes to look at.

`Settings` changes files under /sys and /proc/sys and puts them back: when its block ends, on an exception, SIGINT,
SIGTERM and SIGHUP; after SIGKILL the next run does it, or `restore`. `Subject` is a child process that builds memory as
it is told and goes away with its block.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import itertools
import json
import os
import re
import select
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ptebatch.capture import exit_on_signals
from ptebatch.errors import ArgumentError, PermissionDeniedError, ProcessGoneError, PtebatchError, StateError

__all__ = [
    "Child", "Fork", "Process", "Settings", "Subject", "current", "folio_sizes", "free_swap_area", "get_fd", "mthp",
    "restore", "state_dir",
]  # fmt: skip

THP = Path("/sys/kernel/mm/transparent_hugepage")
PAGE_SIZE = 4096
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# --- settings ---------------------------------------------------------------------------------------------------------
def state_dir() -> Path:
    """Where the lock and the journal are: /run/ptebatch for root, ``$XDG_STATE_HOME/ptebatch`` for others."""
    if os.geteuid() == 0 and os.access("/run", os.W_OK):
        return Path("/run/ptebatch")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ptebatch"


def current(path: str | os.PathLike[str]) -> str:
    """Value of a setting; of a choice, the one in brackets; of a `free_swap_area`, its size or "0".

    >>> current("/proc/sys/kernel/ostype")
    'Linux'
    """
    device = _swap_device(path)
    if device is not None:
        return Path(device.sysfs, "disksize").read_text().strip()
    with _allowed(path):
        text = Path(path).read_text().strip()
    chosen = re.search(r"\[([^\]]*)\]", text)
    return chosen[1] if chosen else text


def _write(path: str, value: str) -> None:
    device = _swap_device(path)
    if device is not None:
        device.resize(int(value))
        return
    with _allowed(path):
        # One write, as sysfs wants it; not O_CREAT: a file that is not there is not to be made.
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)


@contextlib.contextmanager
def _allowed(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except PermissionError:
        raise PermissionDeniedError(f"not allowed to use {os.fspath(path)}: run as root") from None
    except FileNotFoundError:
        raise StateError(f"there is no {os.fspath(path)}: this kernel was built without it") from None
    except OSError as error:
        raise StateError(f"{os.fspath(path)}: {error.strerror}") from None


_SWAP = "swap:"


def free_swap_area() -> str | None:
    """A setting whose value is the size in bytes of swap space in a zram device nobody uses; None without one.

    Memory is written to it from the moment it has a size, by the whole machine, and read back when it is "0" again.
    """
    for path in sorted(Path("/sys/block").glob("zram*")):
        if (path / "disksize").read_text().strip() == "0":
            return f"{_SWAP}{path.name}"
    return None


def _swap_device(path: str | os.PathLike[str]) -> _Zram | None:
    name = os.fspath(path)
    return _Zram(name.removeprefix(_SWAP)) if name.startswith(_SWAP) else None


class _Zram:
    """A zram device as swap space."""

    def __init__(self, name: str) -> None:
        if not re.fullmatch(r"zram\d+", name):
            raise StateError(f"{name!r} is no zram device")
        self.device = f"/dev/{name}"
        self.sysfs = f"/sys/block/{name}"

    def resize(self, size: int) -> None:
        """Take it out of use, and into use again unless the new size is 0."""
        if any(line.split()[0] == self.device for line in Path("/proc/swaps").read_text().splitlines()):
            self._swap("swapoff")
        _write(f"{self.sysfs}/reset", "1")
        if size:
            _write(f"{self.sysfs}/disksize", str(size))
            header = bytearray(PAGE_SIZE)
            struct.pack_into("=3I", header, 1024, 1, size // PAGE_SIZE - 1, 0)  # version, last page, bad pages
            header[-10:] = b"SWAPSPACE2"
            with _allowed(self.device), open(self.device, "r+b") as file:
                file.write(header)
            self._swap("swapon")

    def _swap(self, call: str) -> None:
        arguments = (self.device.encode(), 0) if call == "swapon" else (self.device.encode(),)
        if getattr(_libc(), call)(*arguments):
            number = ctypes.get_errno()
            if number == errno.EPERM:
                raise PermissionDeniedError(f"not allowed to {call} {self.device}: run as root")
            raise StateError(f"{call} {self.device}: {os.strerror(number)}")


def folio_sizes() -> list[int]:
    """Bytes of the anonymous folio sizes this kernel can be told to use, ascending, the page size first."""
    # 8 KiB is for files and shmem only: it has no `enabled`.
    names = (re.fullmatch(r"hugepages-(\d+)kB", path.parent.name) for path in THP.glob("hugepages-*kB/enabled"))
    return sorted([PAGE_SIZE, *(int(name[1]) << 10 for name in names if name)])


def mthp(folio_bytes: int) -> dict[str, str]:
    """Settings under which MADV_HUGEPAGE memory gets folios of this size, and of no other."""
    if folio_bytes not in folio_sizes():
        raise ArgumentError(f"this kernel has no folios of {folio_bytes} bytes; it has {folio_sizes()}")
    wanted = {str(THP / "enabled"): "madvise"}
    for size in folio_sizes()[1:]:
        wanted[str(THP / f"hugepages-{size >> 10}kB" / "enabled")] = "madvise" if size == folio_bytes else "never"
    return wanted


class Settings(contextlib.AbstractContextManager["Settings"]):
    """Kernel settings for the length of a ``with`` block.

    One process on the machine has them at a time. Values found are written to a journal before any is changed, and the
    journal goes when all are back.

    Parameters
    ----------
    wanted : mapping of path to value
        Files that hold one value, or choices with the current one in brackets. Written in this order, restored in the
        opposite one.
    directory : path, optional
        For the lock and the journal; `state_dir` when left out.
    wait : float
        Seconds to wait for another process to be done.

    Raises
    ------
    PermissionDeniedError
        Not root.
    StateError
        A setting this kernel does not have, a value it does not take, or another process that keeps the lock.
    """

    def __init__(
        self, wanted: Mapping[str, str], *, directory: str | os.PathLike[str] | None = None, wait: float = 60.0
    ) -> None:
        self._wanted = dict(wanted)
        self._state = _State(directory, wait)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Settings:
        with contextlib.ExitStack() as stack:
            stack.enter_context(exit_on_signals())
            stack.enter_context(self._state.locked())
            self._state.restore()
            old = {path: current(path) for path in self._wanted}
            changes = {path: value for path, value in self._wanted.items() if old[path] != value}
            if old:
                stack.callback(self._state.restore)
                self._state.write(old)
                for path, value in changes.items():
                    _write(path, value)
                    if current(path) != value:
                        raise StateError(f"{path} did not take {value!r} and is {current(path)!r}")
            self._stack = stack.pop_all()
        return self

    def change(self, path: str, value: str) -> None:
        """Change one of them again; it is put back like the others."""
        if path not in self._wanted:
            raise ArgumentError(f"{path} is not among these settings")
        _write(path, value)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)


def restore(directory: str | os.PathLike[str] | None = None, *, wait: float = 60.0) -> list[str]:
    """Put back what a killed run left changed; returns the paths (none: nothing was left)."""
    state = _State(directory, wait)
    if not state.journal.exists():
        return []
    with state.locked():
        return state.restore()


class _State:
    """The lock and the journal."""

    def __init__(self, directory: str | os.PathLike[str] | None, wait: float) -> None:
        self.directory = state_dir() if directory is None else Path(directory)
        self.journal = self.directory / "settings.json"
        self._wait = wait

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        with _allowed(self.directory):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.directory.lstat()
        # Whoever may write here chooses what the next run, maybe root's, writes where.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise StateError(f"{self.directory} must be a directory that only this user can write: remove it")
        path = self.directory / "lock"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            deadline = time.monotonic() + self._wait
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise StateError(f"another process keeps {path}: wait for it to end, or end it") from None
                    time.sleep(0.002)  # whoever takes it again and again leaves only short gaps
            yield
        finally:
            os.close(fd)

    def write(self, old: Mapping[str, str]) -> None:
        """Write the journal, whole and on disk before anything else happens."""
        new = self.journal.with_suffix(".new")
        with open(new, "w", encoding="utf-8") as file:
            json.dump({"boot": _BOOT_ID.read_text().strip(), "old": dict(old)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.rename(self.journal)

    def restore(self) -> list[str]:
        """Put back what the journal holds; what cannot be put back stays in it. The lock is held."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            try:
                journal = json.loads(self.journal.read_text(encoding="utf-8"))
                boot, old = journal["boot"], dict(journal["old"])
            except FileNotFoundError:
                return []
            except (ValueError, KeyError, TypeError):
                raise StateError(f"{self.journal} is damaged: check what it names by hand, then remove it") from None
            if boot != _BOOT_ID.read_text().strip():
                old = {}  # a reboot has reset them
            failed: dict[str, str] = {}
            why = ""
            for path, value in reversed(old.items()):
                try:
                    if current(path) != value:
                        _write(path, value)
                except PtebatchError as error:
                    failed[path] = value
                    why = str(error)
            if failed:
                self.write(dict(reversed(failed.items())))
                raise StateError(f"{len(failed)} settings are still changed, see {self.journal}: {why}")
            self.journal.unlink()
            return list(old)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- subjects ---------------------------------------------------------------------------------------------------------
class Process:
    """A process that does as it is told, one call at a time (:mod:`ptebatch.subject`)."""

    pid: int
    """Its process id."""

    patience = 20.0
    """Seconds to wait for an answer: a page that is not what it is thought to be may keep it waiting for ever."""

    pipes: list[tuple[int, int, int, int]]
    """For children to come: where they read calls and write answers (their numbers), and the other ends (ours)."""

    def __init__(self, calls: int, answers: int) -> None:
        self._calls = os.fdopen(calls, "w", encoding="utf-8")
        self._answers = os.fdopen(answers, encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def call(self, name: str, **arguments: Any) -> Any:
        """Have it do something, and wait for that."""
        self.tell(name, **arguments)
        return self.answer()

    def tell(self, name: str, **arguments: Any) -> None:
        """Have it do something."""
        with contextlib.suppress(BrokenPipeError):  # answer() then says it
            self._calls.write(json.dumps({"do": name, **arguments}) + "\n")
            self._calls.flush()

    def answer(self) -> Any:
        """What it says of the oldest call not answered yet."""
        if not select.select([self._answers], [], [], self.patience)[0]:
            raise StateError(f"subject process {self.pid} has not answered within {self.patience:g} s")
        line = self._answers.readline()
        if not line:
            raise ProcessGoneError(f"subject process {self.pid} has ended{self._status()}")
        answer = json.loads(line)
        if "error" in answer:
            raise StateError(f"subject process {self.pid}: {answer['error']}")
        return answer.get("result")

    def _status(self) -> str:
        return ""

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(BrokenPipeError):
            self._calls.close()
        self._answers.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Subject(Process):
    """A small Python process that builds memory as it is told, then holds still.

    It ends with the ``with`` block, or with this process if that is killed.

    Parameters
    ----------
    forks : int
        How often it, or a child of it, can be made to fork (`Fork`).
    """

    def __init__(self, *, forks: int = 0) -> None:
        theirs: list[tuple[int, int]] = []
        ours: list[tuple[int, int]] = []
        for _ in range(forks + 1):
            read, call = os.pipe()
            answer, write = os.pipe()
            theirs.append((read, write))
            ours.append((call, answer))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("subject.py")), *map(str, theirs[0])],
                stdin=subprocess.DEVNULL,
                pass_fds=list(itertools.chain(*theirs)),
                # Allocators and sanitizers that are preloaded have memory, and faults, of their own.
                env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
            )
        except BaseException:
            for fd in itertools.chain(*ours):
                os.close(fd)
            raise
        finally:
            for fd in itertools.chain(*theirs):
                os.close(fd)
        self.pid = self._process.pid
        super().__init__(*ours[0])
        self.pipes = [(*theirs[i], *ours[i]) for i in range(1, forks + 1)]
        try:
            self.answer()
            self.call("touch", runs=[])  # once round its loop: waiting for a call no longer changes its memory
        except BaseException:
            self.close()
            raise

    def anon(self, size: int, folio_bytes: int = PAGE_SIZE, *, pte_mapped: bool = True) -> int:
        """Map and touch private anonymous memory on a 2 MiB boundary; returns its address.

        Folios larger than a page need `Settings` of `mthp`. Those of 2 MiB are mapped by PMDs unless `pte_mapped`.
        """
        pte_mapped = pte_mapped and folio_bytes >= 2 << 20
        return int(self.call("anon", size=size, hugepage=folio_bytes > PAGE_SIZE, pte_mapped=pte_mapped))

    def write(self, address: int, size: int, step: int = PAGE_SIZE) -> None:
        """Write one byte every `step` bytes."""
        self.call("write", address=address, size=size, step=step)

    def unmap(self, address: int) -> None:
        """Give back what `anon` made."""
        self.call("unmap", address=address)

    def _status(self) -> str:
        return f" (status {self._process.wait(5)})"

    def close(self) -> None:
        """End and reap it."""
        process = self._process
        for *_, calls, answers in self.pipes:
            os.close(calls)
            os.close(answers)
        self.pipes.clear()
        try:
            super().close()
            process.wait(timeout=2)
        except BaseException:
            process.kill()
            process.wait()
            if not isinstance(sys.exception(), subprocess.TimeoutExpired):
                raise


class Child(Process):
    """What a `Fork` made; it ends with `end`, with the `with` block, or with the subject."""

    def __init__(self, parent: Process, pid: int, calls: int, answers: int) -> None:
        super().__init__(calls, answers)
        self.pipes = parent.pipes
        self.parent = parent
        self.pid = pid
        self._ended = False

    def end(self) -> None:
        """End it and have its parent reap it."""
        if not self._ended:
            self._ended = True
            super().close()
            self.parent.call("reap", pid=self.pid)

    def close(self) -> None:
        """End it, whatever state it is in."""
        if self._ended:
            return
        self._ended = True
        super().close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(PtebatchError):
            self.parent.call("reap", pid=self.pid)


class Fork(contextlib.AbstractContextManager["Fork"]):
    """A fork of a `Process` that is held (by ptrace) right before and right after: nobody runs in between.

    Inside the ``with`` block the process stands at the entry of its fork system call. `run` lets it fork; parent and
    child then stand still until the block ends. Everything happens in one thread, as ptrace wants it.
    """

    _SYSCALLS = (56, 57, 58, 435)  # clone, fork, vfork, clone3 of x86-64
    _SYSCALL_ENTRY = 1

    def __init__(self, parent: Process, *, timeout: float = 20.0) -> None:
        self.parent = parent
        self.child: Child | None = None
        self._timeout = timeout
        self._held: list[int] = []

    def __enter__(self) -> Fork:
        pid = self.parent.pid
        calls, answers = self.parent.pipes[-1][:2]
        try:
            _ptrace(_PTRACE_SEIZE, pid, 0, _PTRACE_O_TRACESYSGOOD | _PTRACE_O_TRACEFORK | _PTRACE_O_EXITKILL)
            self._held.append(pid)
            _ptrace(_PTRACE_INTERRUPT, pid)
            self._wait(pid)
            self.parent.tell("fork", calls=calls, answers=answers)
            info = ctypes.create_string_buffer(88)
            while True:
                _ptrace(_PTRACE_SYSCALL, pid)
                if self._wait(pid) != signal.SIGTRAP | 0x80:
                    continue
                _ptrace(_PTRACE_GET_SYSCALL_INFO, pid, len(info), ctypes.addressof(info))
                entry, number = info.raw[0], int.from_bytes(info.raw[24:32], "little")
                if entry == self._SYSCALL_ENTRY and number in self._SYSCALLS:
                    return self
        except BaseException:
            self._release()
            raise

    def run(self, while_waiting: Callable[[], object] = lambda: None) -> Child:
        """Fork; returns the child, which stands still.

        `while_waiting` is called again and again meanwhile: somebody may have to answer the kernel.
        """
        pid = self.parent.pid
        _ptrace(_PTRACE_CONT, pid)
        stop = self._wait(pid, while_waiting)
        if stop != signal.SIGTRAP | _PTRACE_EVENT_FORK << 8:
            raise StateError(f"subject process {pid} stopped with {stop:#x} instead of forking: did its fork fail?")
        message = ctypes.c_ulong()
        _ptrace(_PTRACE_GETEVENTMSG, pid, 0, ctypes.addressof(message))
        child = message.value
        self._held.append(child)
        self._wait(child)
        _, _, calls, answers = self.parent.pipes.pop()
        self.child = Child(self.parent, child, calls, answers)
        return self.child

    def _wait(self, pid: int, meanwhile: Callable[[], object] = lambda: None) -> int:
        """Wait until a traced process stops; returns the signal, with the event above it."""
        deadline = time.monotonic() + self._timeout
        while True:
            found, status = os.waitpid(pid, _WALL | os.WNOHANG)
            if found and os.WIFSTOPPED(status):
                return status >> 8
            if found:
                raise ProcessGoneError(f"subject process {pid} has ended (status {status})")
            if time.monotonic() > deadline:
                raise StateError(f"subject process {pid} does not come to its fork within {self._timeout} s")
            meanwhile()
            time.sleep(0.0002)

    def _release(self) -> None:
        while self._held:
            with contextlib.suppress(OSError):
                _ptrace(_PTRACE_DETACH, self._held.pop())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()
        if kind is None and self.child is not None:
            self.parent.answer()
            self.child.answer()


_PTRACE_CONT, _PTRACE_DETACH, _PTRACE_SYSCALL = 7, 17, 24
_PTRACE_GETEVENTMSG, _PTRACE_SEIZE, _PTRACE_INTERRUPT, _PTRACE_GET_SYSCALL_INFO = 0x4201, 0x4206, 0x4207, 0x420E
_PTRACE_O_TRACESYSGOOD, _PTRACE_O_TRACEFORK, _PTRACE_O_EXITKILL = 1, 2, 1 << 20
_PTRACE_EVENT_FORK = 1
_WALL = 0x40000000


def get_fd(pid: int, fd: int) -> int:
    """A file descriptor of this process for what is open in another one (pidfd_getfd)."""
    pidfd = os.pidfd_open(pid)
    try:
        mine = _libc().syscall(438, pidfd, fd, 0)
        if mine < 0:
            raise StateError(f"file descriptor {fd} of process {pid}: {os.strerror(ctypes.get_errno())}")
        return int(mine)
    finally:
        os.close(pidfd)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    return libc


def _ptrace(request: int, pid: int, addr: int = 0, data: int = 0) -> None:
    if _libc().ptrace(request, pid, addr, data) < 0:
        number = ctypes.get_errno()
        if number == errno.EPERM:
            raise PermissionDeniedError(f"not allowed to trace process {pid}: run as root, outside other tracers")
        if number == errno.ESRCH:
            raise ProcessGoneError(f"subject process {pid} has ended or runs")
        raise StateError(f"ptrace request {request:#x} of process {pid}: {os.strerror(number)}")
