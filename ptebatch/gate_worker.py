"""What the gate runs in processes of their own; also a program: ``python gate_worker.py REQUEST``, JSON on stdout.

As a program it may find another version of the package than the one it belongs to: the base that a change is compared
with. It uses little of the package, imports it late, and says of a case that this version cannot run why it cannot.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from ptebatch.mm import Mm
    from ptebatch.semantics import KernelSemantics

__all__ = ["OPERATIONS", "PATHS", "Case", "Prepared", "counts", "prepare"]

PATHS = {"single": False, "batched": True}


@dataclass(frozen=True)
class Case:
    """Something to count or to time; its text form is ``OPERATION PATH KERNEL WORKLOAD``.

    Attributes
    ----------
    operation : str
        One of `OPERATIONS`.
    path : {"single", "batched"}
    semantics : str
        A preset's name, as v6.18.
    workload : str
        As `ptebatch.workload.parse` reads it.
    """

    operation: str
    path: str
    semantics: str
    workload: str

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read the text form.

        Raises
        ------
        ArgumentError, SemanticsError
            Saying which part is wrong.
        """
        from ptebatch import semantics, workload
        from ptebatch.errors import ArgumentError

        parts = text.split()
        if len(parts) != 4 or parts[0] not in OPERATIONS or parts[1] not in PATHS:
            raise ArgumentError(
                f"{text!r} is not OPERATION PATH KERNEL WORKLOAD, as 'fork batched v6.18 size=16MiB,folio=64KiB'; "
                f"operations are {', '.join(OPERATIONS)}, paths {', '.join(PATHS)}"
            )
        semantics.get(parts[2])
        workload.parse(parts[3])
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.operation} {self.path} {self.semantics} {self.workload}"


@dataclass
class Prepared:
    """A case with its memory made: `run` returns what it did, `reset` brings the memory back."""

    run: Callable[[], list[Any]]
    reset: Callable[[], None]
    mms: tuple[Mm, ...]


def _fork(mm: Mm, semantics: KernelSemantics, batching: bool, scatter: bool = False) -> Prepared:
    from ptebatch.fork import ForkPlan

    plan = ForkPlan(mm, semantics=semantics, batching=batching, keep=True)
    if scatter:
        plan.child.entries = _elsewhere(plan.child.entries)
    return Prepared(lambda: [plan.run()], plan.reset, (mm, plan.child))


def _range(function: Callable[..., Any], mm: Mm, semantics: KernelSemantics, batching: bool) -> Prepared:
    entries, folios, rss = mm.entries.copy(), mm.folios.copy(), mm.rss.copy()

    def reset() -> None:
        mm.entries[...] = entries
        mm.folios.assign(folios)
        mm.rss[...] = rss

    def run() -> list[Any]:
        return [function(mm, vma.start, vma.end, semantics=semantics, batching=batching) for vma in mm.vmas]

    return Prepared(run, reset, (mm,))


def _wrprotect(mm: Mm, semantics: KernelSemantics, batching: bool, scatter: bool = False) -> Prepared:
    from ptebatch.protect import wrprotect_range

    return _range(wrprotect_range, mm, semantics, batching)


def _zap(mm: Mm, semantics: KernelSemantics, batching: bool, scatter: bool = False) -> Prepared:
    from ptebatch.zap import zap_range

    return _range(zap_range, mm, semantics, batching)


OPERATIONS: dict[str, Callable[..., Prepared]] = {
    "fork": _fork,
    "wrprotect": _wrprotect,
    "zap": _zap,
}


def _elsewhere(array: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Copy an array to where in a page it would be by chance."""
    import numpy as np

    page = 4096
    room = np.empty(array.nbytes + 2 * page, dtype=np.uint8)
    at = -room.ctypes.data % page + random.randrange(0, page, 16)  # as malloc aligns
    copy = room[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def prepare(case: Case, *, scatter: bool = False) -> Prepared:
    """Make the memory of a case.

    How the tables of parent and child lie to each other, and to the memmap, makes more of a difference than what the
    gate looks for, and is the same in every process of a program, but another in a program that did anything else
    before. With `scatter` it is left to chance.
    """
    from ptebatch import semantics, workload

    mm = workload.parse(case.workload).build()
    if scatter:
        mm.entries = _elsewhere(mm.entries)
    return OPERATIONS[case.operation](mm, semantics.get(case.semantics), PATHS[case.path], scatter)


def counts(case: Case) -> dict[str, int]:
    """Run a case once and return its counts, zeros left out: what it counted itself, and what it left behind.

    The batch histogram is ``batch_hist[nr]``. Behind ``left_`` are sums over the memory afterwards: references and
    mappings of all folios and pages, anon-exclusive pages, rss, and the page-table entries of parent and child, modulo
    2^64.
    """
    prepared = prepare(case)
    total: Counter[str] = Counter()
    for stats in prepared.run():
        for name, value in stats.to_dict().items():
            if isinstance(value, dict):
                total.update({f"{name}[{key}]": n for key, n in value.items()})
            else:
                total[name] += value
    folios = prepared.mms[0].folios
    pages = folios.pages_table()["pfn"]
    total["left_refcounts"] = int(folios.refcounts(folios.heads()).sum())
    total["left_mapcounts"] = int(folios.mapcounts(pages).sum())
    total["left_anon_exclusive"] = int(folios.flags(pages, "anon_exclusive").sum())
    total["left_rss"] = sum(int(mm.rss.sum()) for mm in prepared.mms)
    total["left_entries"] = sum(int(mm.entries.sum(dtype="u8")) for mm in prepared.mms) % (1 << 64)
    return {name: n for name, n in total.items() if n}


# --- the program ------------------------------------------------------------------------------------------------------
def _in_child(function: Callable[[], Any]) -> tuple[int, Any]:
    """Run a function in a forked process; return the process id and the result."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as file:
                json.dump(function(), file)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(1)
    return pid, json.loads(text)


def _once(case: Prepared) -> None:
    case.run()


class _Process:
    """A fork of this one that makes the memory of all cases for itself, and takes their times when it is asked to."""

    def __init__(self, cases: Mapping[str, float], runs: int, others: Sequence[_Process]) -> None:
        asked, self._ask = os.pipe()
        answers, answer = os.pipe()
        if not os.fork():
            try:
                for fd in (self._ask, answers, *(fd for other in others for fd in other.pipes())):
                    os.close(fd)  # whoever keeps the other end of a pipe open keeps its reader waiting
                prepared = {name: (prepare(Case.parse(name), scatter=True), slower) for name, slower in cases.items()}
                while os.read(asked, 1):
                    os.write(answer, json.dumps(_times(prepared, runs)).encode() + b"\n")
            finally:
                os._exit(0)
        os.close(asked)
        os.close(answer)
        self._answers = os.fdopen(answers)

    def pipes(self) -> tuple[int, int]:
        return self._ask, self._answers.fileno()

    def times(self) -> dict[str, int]:
        os.write(self._ask, b"\n")
        line = self._answers.readline()
        if not line:
            raise SystemExit("a process that takes times died")
        return dict(json.loads(line))


def _times(prepared: Mapping[str, tuple[Prepared, float]], runs: int) -> dict[str, int]:
    """Return how long the shortest of `runs` runs of each case took, in ns; one before that finds its memory again.

    Beside each case stands by how much of its time it is to be slower.
    """
    shortest = {}
    for name, (case, slower) in prepared.items():
        found = []
        for _ in range(runs + 1):
            case.reset()
            begin = time.perf_counter_ns()
            case.run()
            end = now = time.perf_counter_ns()
            while slower and now - end < slower * (end - begin):
                now = time.perf_counter_ns()
            found.append(now - begin)
        shortest[name] = min(found[1:])
    return shortest


def _answers(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a line for each process, after one that says which of the ``cases`` are ``missing`` here and why.

    In ``mode`` ``run`` each case is run in a process. In ``mode`` ``time`` there are ``processes``, and every line on
    stdin is the number of one that is to take the time of all cases, the shortest of ``runs`` runs. ``slower`` is by
    how much of its time a case is to be slower.
    """
    gc.disable()
    prepared: dict[str, Prepared] = {}
    missing: dict[str, str] = {}
    for name in request["cases"]:
        try:
            prepared[name] = prepare(Case.parse(name))
        except Exception as error:  # whatever another version says of what it does not know
            missing[name] = f"{type(error).__name__}: {error}"
    yield {"missing": missing}
    if request["mode"] == "run":
        for name, case in prepared.items():
            yield {"case": name, "pid": _in_child(functools.partial(_once, case))[0]}
    else:
        cases = {name: request["slower"].get(name, 0.0) for name in prepared}
        prepared.clear()
        processes: list[_Process] = []
        for _ in range(request["processes"]):
            processes.append(_Process(cases, request["runs"], processes))
        for line in sys.stdin:
            yield {"times_ns": processes[int(line)].times()}


if __name__ == "__main__":
    for answer in _answers(json.loads(sys.argv[1])):
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
