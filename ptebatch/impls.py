"""The two implementations of the page-table walks, and what ``impl=`` and ``batching=`` arguments mean."""

from __future__ import annotations

from typing import Any

from ptebatch import batch, reference
from ptebatch.errors import ArgumentError, SemanticsError
from ptebatch.semantics import KernelSemantics

IMPLS: dict[str, Any] = {"core": batch, "reference": reference}
"""By the name ``impl=`` takes: the Cython core, and the plain-Python oracle."""


def resolve_impl(impl: str) -> Any:
    """The module an ``impl=`` argument names."""
    if impl not in IMPLS:
        raise ArgumentError(f"impl={impl!r}: choose one of {', '.join(IMPLS)}")
    return IMPLS[impl]


def resolve_batching(semantics: KernelSemantics, batching: bool | None, switch: str = "fork_batching") -> bool:
    """Whether to batch: None follows the semantics' switch, True on an unbatched kernel is a SemanticsError."""
    if batching is None:
        return bool(getattr(semantics, switch))
    if batching and not getattr(semantics, switch):
        raise SemanticsError(
            f"{semantics.version} works one PTE at a time; use v6.9 or later, or --set {switch}=on, to batch"
        )
    return bool(batching)
