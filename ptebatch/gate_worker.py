"""What the gate runs in processes of their own; also a program: ``python gate_worker.py REQUEST``, JSON on stdout.

As a program it may find another version of the package than the one it belongs to: the base that a change is compared
with. It uses little of the package, imports it late, and says of a case that this version cannot run why it cannot.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


def _fork(mm: Mm, semantics: KernelSemantics, batching: bool) -> Prepared:
    from ptebatch.fork import ForkPlan

    plan = ForkPlan(mm, semantics=semantics, batching=batching, keep=True)
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


def _wrprotect(mm: Mm, semantics: KernelSemantics, batching: bool) -> Prepared:
    from ptebatch.protect import wrprotect_range

    return _range(wrprotect_range, mm, semantics, batching)


def _zap(mm: Mm, semantics: KernelSemantics, batching: bool) -> Prepared:
    from ptebatch.zap import zap_range

    return _range(zap_range, mm, semantics, batching)


OPERATIONS: dict[str, Callable[[Mm, KernelSemantics, bool], Prepared]] = {
    "fork": _fork,
    "wrprotect": _wrprotect,
    "zap": _zap,
}


def prepare(case: Case, scale: float = 1.0) -> Prepared:
    """Make the memory of a case, `scale` times as much as it says."""
    import dataclasses

    from ptebatch import semantics, workload

    wanted = workload.parse(case.workload)
    wanted = dataclasses.replace(wanted, size=round(wanted.size * scale) // workload.PAGE * workload.PAGE)
    return OPERATIONS[case.operation](wanted.build(), semantics.get(case.semantics), PATHS[case.path])


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


def _times(prepared: dict[str, Prepared], rounds: int) -> dict[str, int]:
    """Return for each case the shortest of `rounds` runs, in ns; cases take turns, a round before that warms up."""
    best = dict.fromkeys(prepared, 1 << 62)
    for number in range(-1, rounds):
        for name, case in prepared.items():
            case.reset()
            begin = time.perf_counter_ns()
            case.run()
            took = time.perf_counter_ns() - begin
            if number >= 0:
                best[name] = min(best[name], took)
    return best


def _answers(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a line for each process, after one that says which of the ``cases`` are ``missing`` here and why.

    In ``mode`` ``run`` each case is run in a process. In ``mode`` ``time`` every line on stdin asks for a process that
    takes the time of all cases, the shortest of ``rounds`` runs. ``scale`` is how much more memory a case has.
    """
    gc.disable()
    prepared: dict[str, Prepared] = {}
    missing: dict[str, str] = {}
    for name in request["cases"]:
        try:
            prepared[name] = prepare(Case.parse(name), request.get("scale", {}).get(name, 1.0))
        except Exception as error:  # whatever another version says of what it does not know
            missing[name] = f"{type(error).__name__}: {error}"
    yield {"missing": missing}
    if request["mode"] == "run":
        for name, case in prepared.items():
            yield {"case": name, "pid": _in_child(functools.partial(_once, case))[0]}
    else:
        for _ in sys.stdin:
            yield {"times_ns": _in_child(functools.partial(_times, prepared, request["rounds"]))[1]}


if __name__ == "__main__":
    for answer in _answers(json.loads(sys.argv[1])):
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
