"""The machine under our feet: settings to borrow and processes to look at.

`Settings` changes files under /sys and /proc/sys and puts them back: when its block ends, on an exception, SIGINT,
SIGTERM and SIGHUP; after SIGKILL the next run does it, or `restore`. `Subject` is a child process that builds memory as
it is told and goes away with its block.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ptebatch.capture import exit_on_signals
from ptebatch.errors import ArgumentError, PermissionDeniedError, ProcessGoneError, PtebatchError, StateError

__all__ = ["Settings", "Subject", "current", "folio_sizes", "mthp", "restore", "state_dir"]

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
    """Value of a setting; of a choice, the one in brackets.

    >>> current("/proc/sys/kernel/ostype")
    'Linux'
    """
    with _allowed(path):
        text = Path(path).read_text().strip()
    chosen = re.search(r"\[([^\]]*)\]", text)
    return chosen[1] if chosen else text


def _write(path: str, value: str) -> None:
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
            if changes:
                stack.callback(self._state.restore)
                self._state.write({path: old[path] for path in changes})
                for path, value in changes.items():
                    _write(path, value)
                    if current(path) != value:
                        raise StateError(f"{path} did not take {value!r} and is {current(path)!r}")
            self._stack = stack.pop_all()
        return self

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
                    time.sleep(0.05)
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
_SCRIPT = r"""
import ctypes, json, mmap, sys

MADV_DONTFORK, MADV_DOFORK, MADV_HUGEPAGE = 10, 11, 14
PAGE, PMD = 4096, 2 << 20
areas = {}

def do_anon(size, hugepage, pte_mapped):
    # The area starts on a 2 MiB boundary inside a larger mapping, whose rest stays untouched.
    memory = mmap.mmap(-1, size + PMD, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = ctypes.c_char.from_buffer(memory)
    base = ctypes.addressof(view)
    del view
    offset = -base % PMD
    if hugepage:
        memory.madvise(MADV_HUGEPAGE, offset, size)
    for at in range(offset, offset + size, PAGE):
        memory[at] = 1 + at // PAGE % 255
    if pte_mapped:
        # Splitting the area inside a PMD mapping maps its folio by PTEs; the area is whole again afterwards.
        for at in range(offset, offset + size - PMD + 1, PMD):
            memory.madvise(MADV_DONTFORK, at + PAGE, PAGE)
            memory.madvise(MADV_DOFORK, at + PAGE, PAGE)
    areas[base + offset] = memory, offset
    return base + offset

def do_write(address, size, step):
    for base, (memory, offset) in areas.items():
        if base <= address < base + len(memory) - offset:
            start = address - base + offset
            for at in range(start, start + size, step):
                memory[at] = (memory[at] + 1) % 255 + 1
            return None
    raise LookupError(hex(address))

def do_unmap(address):
    areas.pop(address)[0].close()

def do_quit():
    sys.exit(0)

print("{}", flush=True)
for line in sys.stdin:
    call = json.loads(line)
    try:
        answer = {"result": globals()["do_" + call.pop("do")](**call)}
    except Exception as error:
        answer = {"error": repr(error)}
    print(json.dumps(answer), flush=True)
"""


class Subject(contextlib.AbstractContextManager["Subject"]):
    """A small Python process that builds memory as it is told, then holds still.

    It ends with the ``with`` block, or with this process if that is killed.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

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

    def call(self, name: str, **arguments: Any) -> Any:
        """Have it do something, and wait for that."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": name, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what _answer() then says
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ProcessGoneError(f"subject process {self.pid} has ended (status {self._process.wait(5)})")
        answer = json.loads(line)
        if "error" in answer:
            raise StateError(f"subject process {self.pid}: {answer['error']}")
        return answer.get("result")

    def close(self) -> None:
        """End and reap it."""
        process = self._process
        with contextlib.suppress(BrokenPipeError):
            if process.stdin is not None:
                process.stdin.close()
        try:
            process.wait(timeout=2)
        except BaseException:
            process.kill()
            process.wait()
            if not isinstance(sys.exception(), subprocess.TimeoutExpired):
                raise
        finally:
            if process.stdout is not None:
                process.stdout.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
