"""The errors ptebatch raises; every message says what was wrong and what to do about it."""

from __future__ import annotations

import errno as _errno
import os as _os

__all__ = [
    "AccessError",
    "ArgumentError",
    "CaptureError",
    "ForkError",
    "PermissionDeniedError",
    "PfnError",
    "ProcessGoneError",
    "PtebatchError",
    "ReadOnlyError",
    "SemanticsError",
    "SnapshotError",
    "StateError",
    "UnsupportedEntryError",
]


EHWPOISON = 133
"""Linux's number; the errno module lacks it in most versions of Python."""


class PtebatchError(Exception):
    """Base of every error this package raises on purpose."""


class ArgumentError(PtebatchError, ValueError):
    """An argument of the wrong dtype, shape, stride, range or overlap."""


class ReadOnlyError(ArgumentError):
    """A read-only array where the call has to write."""


class PfnError(PtebatchError):
    """A present entry whose PFN has no page in the memmap.

    Parameters
    ----------
    message : str, optional
        Built from `pfn` and `address` when left out.
    pfn : int, optional
        Page frame number without a page.
    address : int, optional
        Virtual address in bytes of the entry.
    """

    def __init__(self, message: str = "", *, pfn: int | None = None, address: int | None = None) -> None:
        if not message:
            where = "" if address is None else f" mapped at address {address:#x}"
            what = "a PFN" if pfn is None else f"PFN {pfn:#x}"
            message = (
                f"{what}{where} has no page in the FolioTable; add its folio, mark the entry special, "
                'or ask for pfn_without_page="as_kernel"'
            )
        super().__init__(message)
        self.pfn = pfn
        self.address = address


class UnsupportedEntryError(PtebatchError):
    """An entry this version does not model and therefore refuses to copy.

    Parameters
    ----------
    message : str, optional
        Built from `kind` and `address` when left out.
    address : int, optional
        Virtual address in bytes of the entry.
    kind : str, optional
        What the entry is, as `ptebatch.arch.decode` names it.
    """

    def __init__(self, message: str = "", *, address: int | None = None, kind: str | None = None) -> None:
        if not message:
            where = "" if address is None else f" at address {address:#x}"
            message = (
                f"entry{where} is of a kind not modelled yet ({kind or 'unknown'}); "
                "leave its VMA out of the fork (VM_DONTCOPY) or clear the entry"
            )
        super().__init__(message)
        self.address = address
        self.kind = kind


class StateError(PtebatchError):
    """An Mm or FolioTable that contradicts itself, or a count that left its range."""


class SnapshotError(PtebatchError):
    """A snapshot file that is truncated, foreign or inconsistent."""


class CaptureError(PtebatchError):
    """A process could not be captured."""


class ProcessGoneError(CaptureError):
    """The process to capture does not exist, or exited meanwhile."""


class PermissionDeniedError(CaptureError):
    """A privilege needed for capturing is missing."""


class AccessError(PtebatchError):
    """A memory access that the kernel answers with a signal.

    Parameters
    ----------
    message : str, optional
        Built from `address` and `signal` when left out.
    address : int, optional
        Virtual address in bytes.
    signal : str
        ``"SIGSEGV"`` or ``"SIGBUS"``.
    """

    def __init__(self, message: str = "", *, address: int | None = None, signal: str = "SIGSEGV") -> None:
        where = "" if address is None else f" at address {address:#x}"
        super().__init__(message or f"this access{where} ends with {signal}")
        self.address = address
        self.signal = signal


class SemanticsError(PtebatchError, ValueError):
    """An unknown kernel version or behaviour switch, or switches that exclude each other."""


class ForkError(PtebatchError):
    """A fork that fails as a whole, as dup_mmap() would.

    Parameters
    ----------
    message : str, optional
        Built from `errno` when left out.
    errno : int
        Positive error number, ENOMEM unless said otherwise.
    """

    def __init__(self, message: str = "", errno: int = _errno.ENOMEM) -> None:
        name = "EHWPOISON" if errno == EHWPOISON else _errno.errorcode.get(errno, str(errno))
        super().__init__(message or f"fork failed with {name}: {_os.strerror(errno)}")
        self.errno = errno
