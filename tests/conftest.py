"""Fixtures and Hypothesis profiles shared by all tests."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import HealthCheck, settings

import ptebatch._core
from ptebatch import batch, reference

if not ptebatch._core.__file__.endswith((".so", ".pyd")):
    raise RuntimeError(f"the Cython core is not compiled: {ptebatch._core.__file__}")

IMPLS = {"core": batch, "reference": reference}

# `full` differential cases are a multiple of these examples: see tests/test_differential.py.
_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
}
settings.register_profile("small", max_examples=20, **_COMMON)
settings.register_profile("default", max_examples=100, **_COMMON)
settings.register_profile("ci", max_examples=500, derandomize=False, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(params=sorted(IMPLS))
def impl(request: pytest.FixtureRequest):
    """Every behaviour test runs on the core and on the reference: the module of that name."""
    return IMPLS[request.param]


@pytest.fixture(params=sorted(IMPLS))
def impl_name(request: pytest.FixtureRequest) -> str:
    """The value for ``impl=`` arguments."""
    return request.param


# Tests that change settings of the machine, which one process can have at a time: those of live/, and the benchmarks of
# real memory.
MACHINE = ("tests/live/", "tests/test_bench.py", "tests/test_cli.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object):
    """With ``-n``, whatever is free takes the next test, but one process takes all of `MACHINE`, first.

    pytest-xdist's own groups are not grouped under pytest 9.2 (its issue 1386).
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "machine" if nodeid.startswith(MACHINE) else nodeid

        def schedule(self) -> None:
            super().schedule()
            if self.collection is not None:
                super().schedule()  # a worker begins a test when it knows the next: also one in the place of another

        def _reschedule(self, node: object) -> None:
            if node in self.registered_collections:  # else it is given tests when it has collected them
                super()._reschedule(node)

        def _assign_work_unit(self, node: object) -> None:
            with contextlib.suppress(OSError):  # it crashed a moment ago: remove_node() is to come, and finds this too
                super()._assign_work_unit(node)

        def remove_node(self, node: object) -> str | None:
            """What a worker that crashed had still to do, but for the test that did it, is for the others.

            Instead of pytest-xdist's, which gives out again what is done too, and then waits for ever for the worker
            that was left with nothing to do.
            """
            todo = {}
            for scope, tests in self.assigned_work.pop(node).items():
                if left := {test: False for test, done in tests.items() if not done}:
                    todo[scope] = left
            if not todo:
                return None
            scope = next(iter(todo))
            crashed = next(iter(todo[scope]))
            del todo[scope][crashed]
            self.workqueue.update({scope: left for scope, left in todo.items() if left})
            for other in self.assigned_work:
                self._reschedule(other)
            return crashed

    return Scheduling(config, log)
