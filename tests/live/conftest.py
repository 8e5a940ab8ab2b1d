"""Tests that need a Linux kernel and privileges.

They skip where those are missing. With PTEBATCH_LIVE=1 a skip is a failure, except for what a kernel was built without
(`kernel_has`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.live)


def _missing(reason: str) -> None:
    if os.environ.get("PTEBATCH_LIVE", "0") not in ("", "0"):
        pytest.fail(f"PTEBATCH_LIVE is set, and {reason}")
    pytest.skip(reason)


def kernel_has(path: str) -> None:
    """Skip, also under PTEBATCH_LIVE=1, where the kernel was built without something."""
    if not os.path.exists(path):
        pytest.skip(f"this kernel has no {path}")


@pytest.fixture(autouse=True)
def linux() -> None:
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        _missing("this is no x86-64 Linux")


@pytest.fixture
def root(linux: None) -> None:
    """Root that sees PFNs and may change settings."""
    if os.geteuid() != 0:
        _missing("this needs root")
    try:
        with open("/proc/kpageflags", "rb") as file:
            file.read(8)
    except OSError as error:
        _missing(f"/proc/kpageflags cannot be read: {error}")


class Script:
    """A child that runs Python code: it calls `say(value)`, and `hold()` to wait for the next `go`."""

    PRELUDE = """
import ctypes, json, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def say(value):
    print(json.dumps(value), flush=True)
def hold():
    if not sys.stdin.readline():
        sys.exit()
def address(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
def anon(size, align=2 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
    memory = mmap.mmap(-1, size + align, flags)
    return memory, -address(memory) % align
def madvise(at, size, advice):
    if libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(size), advice):
        raise OSError(ctypes.get_errno(), f"madvise {advice}")
"""

    def __init__(self, body: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.PRELUDE + body], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid

    def hear(self) -> Any:
        line = self.process.stdout.readline()
        assert line, f"the script ended with status {self.process.wait()}"
        return json.loads(line)

    def go(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def script() -> Iterator[Callable[[str], Script]]:
    """Start scripts that end with the test."""
    with ExitStack() as stack:
        yield lambda body: stack.enter_context(Script(body))
