"""Errors: one family, usable messages, and attributes that survive pickling."""

from __future__ import annotations

import errno
import pickle

import pytest

from ptebatch import errors
from ptebatch.errors import (
    AccessError,
    ArgumentError,
    ForkError,
    PfnError,
    PtebatchError,
    SemanticsError,
    UnsupportedEntryError,
)


def test_one_family():
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, PtebatchError)
        assert kind.__doc__
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(SemanticsError, ValueError)
    assert issubclass(errors.ReadOnlyError, ArgumentError)
    assert issubclass(errors.ProcessGoneError, errors.CaptureError)
    assert issubclass(errors.PermissionDeniedError, errors.CaptureError)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PfnError(pfn=0x1234, address=0x7F0000), ("0x1234", "0x7f0000", "as_kernel")),
        (PfnError(pfn=0x1234), ("0x1234",)),
        (PfnError("said so"), ("said so",)),
        (UnsupportedEntryError(address=0x7F0000, kind="swap"), ("0x7f0000", "swap")),
        (UnsupportedEntryError("said so", address=1), ("said so",)),
        (AccessError(address=0x7F0000, signal="SIGBUS"), ("0x7f0000", "SIGBUS")),
        (AccessError("said so", address=1), ("said so",)),
        (ForkError(errno=errno.EAGAIN), ("EAGAIN",)),
        (ForkError(), ("ENOMEM",)),
        (ForkError(errno=133), ("EHWPOISON",)),
    ],
)
def test_messages_and_pickling(error, words):
    for word in words:
        assert word in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
