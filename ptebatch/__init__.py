"""Linux fork()'s batched page-table copy, outside the kernel: an exact model over packed uint64 PTE arrays.

Types, presets and errors are public names here; what does something lives in the module of that name:
``ptebatch.fork.fork``, ``ptebatch.explain.explain_batches``, ``ptebatch.capture.capture``, ``ptebatch.workload.make``.

Names are imported on first use, so that ``import ptebatch`` stays light.

>>> import ptebatch
>>> ptebatch.V6_8.fork_batching, ptebatch.LATEST.fork_batching
(False, True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptebatch.arch import LAYOUTS, X86_64, PteLayout
    from ptebatch.errors import (
        AccessError,
        ArgumentError,
        CaptureError,
        ForkError,
        PermissionDeniedError,
        PfnError,
        ProcessGoneError,
        PtebatchError,
        ReadOnlyError,
        SemanticsError,
        SnapshotError,
        StateError,
        UnsupportedEntryError,
    )
    from ptebatch.folio import FolioTable
    from ptebatch.fork import ForkResult, ForkStats
    from ptebatch.mm import Mm, Vma
    from ptebatch.semantics import LATEST, PRESETS, V6_8, V6_9, V6_12, V6_18, V6_19, KernelConfig, KernelSemantics
    from ptebatch.workload import Workload

    __version__: str

__all__ = [
    "LATEST",
    "LAYOUTS",
    "PRESETS",
    "V6_8",
    "V6_9",
    "V6_12",
    "V6_18",
    "V6_19",
    "X86_64",
    "AccessError",
    "ArgumentError",
    "CaptureError",
    "FolioTable",
    "ForkError",
    "ForkResult",
    "ForkStats",
    "KernelConfig",
    "KernelSemantics",
    "Mm",
    "PermissionDeniedError",
    "PfnError",
    "ProcessGoneError",
    "PteLayout",
    "PtebatchError",
    "ReadOnlyError",
    "SemanticsError",
    "SnapshotError",
    "StateError",
    "UnsupportedEntryError",
    "Vma",
    "Workload",
    "__version__",
]

# Where to look for a name: `errors` has those that none of the others has.
_HOMES = {
    "arch": ("LAYOUTS", "PteLayout", "X86_64"),
    "folio": ("FolioTable",),
    "fork": ("ForkResult", "ForkStats"),
    "mm": ("Mm", "Vma"),
    "semantics": ("KernelConfig", "KernelSemantics", "LATEST", "PRESETS", "V6_8", "V6_9", "V6_12", "V6_18", "V6_19"),
    "workload": ("Workload",),
}


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ptebatch")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in __all__:
        from importlib import import_module

        home = next((module for module, names in _HOMES.items() if name in names), "errors")
        value = getattr(import_module(f"ptebatch.{home}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
