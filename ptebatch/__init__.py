"""Linux fork()'s batched page-table copy, outside the kernel: an exact model over packed uint64 PTE arrays.

The public names are imported on first use, so that ``import ptebatch`` stays light.
"""

from __future__ import annotations

from typing import Any


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ptebatch")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        globals()[name] = value = _version()
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
