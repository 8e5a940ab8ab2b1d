"""The regression gate: did the engine change, in counts, instructions or time?

Levels, from the one without any noise to the noisiest:

1. ``counts``: operation counts of fixed workloads equal a committed file exactly.
2. ``instructions``: instructions of the core under callgrind, within `INSTRUCTIONS_SLACK` of a committed file. What
   valgrind cannot run (AVX-512) is not covered.

3. ``time``: base and head beside each other, many processes a side in turns. A slow-down is one that a rank test, a
   ratio and an absolute difference all call one, and that a second measurement of only those cases confirms.
4. ``ratios``: what defines the product, measured within one run: batched/limit, single/limit and batched/single,
   against committed bounds.

Each passes, fails or is inconclusive: what cannot be known is not a pass. Committed instructions are good for one
compiler, its flags, Cython and SIMD level; committed bounds for one CPU and SIMD level; anything else has no baseline.

How often ``time`` is wrong is measured, not argued: `self_test` runs it on two sides that are the same, and on sides of
which one does more.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from ptebatch import batch, bench, gate_worker, semantics, workload
from ptebatch.errors import ArgumentError, StateError
from ptebatch.gate_worker import Case

__all__ = [
    "BASELINES",
    "CASES",
    "FAST",
    "FULL",
    "LEVELS",
    "Level",
    "Profile",
    "Side",
    "built",
    "check_counts",
    "check_instructions",
    "check_ratios",
    "check_time",
    "compare_times",
    "exit_code",
    "github_annotations",
    "junit",
    "run_gate",
    "self_test",
    "write_baselines",
]

SCHEMA = 1
PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
BASELINES = Path("benchmarks")
"""Where baselines are, as seen from the root of a source tree."""
INSTRUCTIONS_SLACK = 0.02
CALLGRIND_LEVELS = ("scalar", "avx2")
"""SIMD levels that valgrind can run."""

Progress = Callable[[int, int], object]
Counts = Mapping[str, int]

_PLAIN = ("folio=4KiB", "folio=16KiB", "folio=64KiB", "folio=2MiB", "folio=4KiB+16KiB+64KiB+2MiB,align=shifted")
_MIXED = (
    "folio=4KiB+64KiB,readonly=0.2,clean=0.2,old=0.2,holes=0.1,granularity=page",
    "folio=4KiB+64KiB,fragmentation=0.3,shared=0.2,vma=anon+file+shmem-guard,vmas=6,cowed=0.2",
    "folio=4KiB+64KiB,pinned=0.1",
    "folio=64KiB,soft_dirty=0.5,uffd_wp=0.2,granularity=page",
)
CASES: dict[str, tuple[str, ...]] = {
    "counts": tuple(
        f"{operation} {path} {kernel} size=16MiB,{memory}"
        for operation in gate_worker.OPERATIONS
        for kernel, path in (
            ("v6.8", "single"), ("v6.9", "batched"), ("v6.12", "batched"), ("v6.18", "single"), ("v6.18", "batched"),
        )
        for memory in (_PLAIN + _MIXED if kernel == "v6.18" else _MIXED)
    ),
    "instructions": tuple(
        f"{operation} v6.18 size=256MiB,{memory}"
        for operation, memories in (
            ("fork batched", (_PLAIN[0], _PLAIN[2], _PLAIN[3], _MIXED[0])),
            ("fork single", (_PLAIN[2],)),
            *((f"{operation} batched", (_PLAIN[2],)) for operation in gate_worker.OPERATIONS if operation != "fork"),
        )
        for memory in memories
    ),
    "time": (
        f"fork batched v6.18 size=1GiB,{_PLAIN[0]}",
        f"fork batched v6.18 size=1GiB,{_PLAIN[2]}",
        f"fork batched v6.18 size=1GiB,{_PLAIN[3]}",
        f"fork single v6.18 size=256MiB,{_PLAIN[2]}",
        f"fork batched v6.18 size=256MiB,{_MIXED[0]}",
        *(f"{one} batched v6.18 size=1GiB,{_PLAIN[2]}" for one in gate_worker.OPERATIONS if one != "fork"),
    ),
    "ratios": (f"size=4GiB,{_PLAIN[0]}", f"size=1GiB,{_PLAIN[1]}", f"size=1GiB,{_PLAIN[2]}", f"size=1GiB,{_PLAIN[3]}"),
}  # fmt: skip
"""What each level runs where its baseline does not name cases of its own."""


@dataclass
class Level:
    """What one level found.

    Attributes
    ----------
    number : int
    name : str
    status : {"pass", "fail", "inconclusive"}
    summary : str
        One line.
    findings : list of dict
        What was compared and differs or could not be compared; rows with ``case``, ``what`` and what was seen.
    notes : list of str
        What a reader should know about the result.
    """

    number: int
    name: str
    status: str
    summary: str
    findings: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "level": self.number, "name": self.name, "status": self.status, "summary": self.summary,
            "findings": self.findings, "notes": self.notes,
        }  # fmt: skip


# --- baselines --------------------------------------------------------------------------------------------------------
def _file(baselines: Path, level: str) -> Path:
    return baselines / f"gate-{level}.json"


def _read(baselines: Path, level: str) -> dict[str, Any]:
    """Return the baselines of a level by key; none if there is no file.

    Raises
    ------
    StateError
        A file of another schema or shape.
    """
    path = _file(baselines, level)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StateError(f"{path} is no JSON ({error}): restore it, or remove it and write a baseline") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA or "baselines" not in document:
        raise StateError(f"{path} is not of schema {SCHEMA}: remove it and write a baseline")
    return dict(document["baselines"])


def _write(baselines: Path, level: str, key: str, cases: Mapping[str, Any], reason: str) -> Path:
    """Put the baseline of one key into the file of a level; a case a line, so that a change is read in a diff."""
    known = _read(baselines, level)
    known[key] = {"reason": reason, "date": f"{datetime.now(UTC):%Y-%m-%d}", "cases": dict(cases)}
    lines = [f'{{"schema": {SCHEMA}, "baselines": {{']
    for last_key, (name, baseline) in enumerate(sorted(known.items()), 1):
        head = {field: value for field, value in baseline.items() if field != "cases"}
        lines.append(f' {json.dumps(name)}: {json.dumps(head)[:-1]}, "cases": {{')
        rows = [f"  {json.dumps(case)}: {json.dumps(value)}" for case, value in baseline["cases"].items()]
        lines.append(",\n".join(rows))
        lines.append(" }}" + ("," if last_key < len(known) else ""))
    lines.append("}}")
    path = _file(baselines, level)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _missing(number: int, level: str, baselines: Path, key: str) -> Level:
    summary = f"no baseline in {_file(baselines, level)} for {key}" if key else f"no {_file(baselines, level)}"
    advice = "ptebatch gate baseline --reason TEXT writes one"
    return Level(number, level, INCONCLUSIVE, summary, notes=[advice])


# --- level 1: counts --------------------------------------------------------------------------------------------------
def compare_counts(expected: Counts, found: Counts) -> list[str]:
    """Say which counts differ, and by how much.

    >>> compare_counts({"batches": 4, "ptep_get": 8}, {"batches": 5, "set_ptes": 1})
    ['batches 4 -> 5 (+1)', 'ptep_get 8 -> 0 (-8)', 'set_ptes 0 -> 1 (+1)']
    """
    names = [*expected, *(name for name in found if name not in expected)]
    changes = ((name, expected.get(name, 0), found.get(name, 0)) for name in names)
    return [f"{name} {before} -> {after} ({after - before:+d})" for name, before, after in changes if before != after]


def check_counts(baselines: Path = BASELINES, progress: Progress = lambda done, total: None) -> Level:
    """Compare the operation counts of all cases that the committed file names."""
    expected = _read(baselines, "counts").get("", {}).get("cases", {})
    if not expected:
        return _missing(1, "counts", baselines, "")
    findings = []
    for done, (name, before) in enumerate(expected.items(), 1):
        changes = compare_counts(before, gate_worker.counts(Case.parse(name)))
        if changes:
            findings.append({"case": name, "what": ", ".join(changes)})
        progress(done, len(expected))
    compared = sum(map(len, expected.values()))
    if findings:
        return Level(1, "counts", FAIL, f"{len(findings)} of {len(expected)} cases differ", findings)
    return Level(1, "counts", PASS, f"{compared} counts of {len(expected)} cases are as committed")


# --- level 2: instructions --------------------------------------------------------------------------------------------
def instructions_key(env: Mapping[str, str], simd: str) -> str:
    """Everything that decides which instructions there are: compiler, flags but warnings, Cython, SIMD level.

    >>> instructions_key({"compiler": "gcc 12", "flags": "-O3 -Wall", "cython": "3.1"}, "avx2")
    'gcc 12, -O3, Cython 3.1, avx2'
    """
    flags = " ".join(flag for flag in env["flags"].split() if not flag.startswith("-W"))
    return f"{env['compiler']}, {flags}, Cython {env['cython']}, {simd}"


def parse_callgrind(text: str) -> int:
    """Return the instructions that a callgrind output file adds up to."""
    total = re.search(r"^(?:summary|totals): (\d+)$", text, re.MULTILINE)
    if total is None:
        raise StateError("callgrind wrote no total")
    return int(total[1])


class _Worker:
    """The worker as a program, with the package at `path` (by default this one).

    Raises
    ------
    StateError
        It failed.
    """

    def __init__(
        self, request: Mapping[str, Any], *, prefix: Sequence[str] = (), path: Path | None = None, **more: str
    ) -> None:
        drop = ("PYTHONPATH", "PYTHONHOME")
        env = {name: value for name, value in os.environ.items() if name not in drop}
        env |= {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | more
        env["PYTHONPATH"] = str(path or Path(gate_worker.__file__).parent.parent)
        command = [*prefix, sys.executable, "-P", gate_worker.__file__, json.dumps(request)]
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        self.missing: dict[str, str] = {}

    def __enter__(self) -> _Worker:
        try:
            self.missing = self.answer()["missing"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with self._process, self._said:
            self._process.kill()

    def answer(self, ask: str = "") -> Any:
        """Send a line if `ask` is one, and return the next answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        try:
            self._process.stdin.write(ask)
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            status = self._process.wait()
            self._said.seek(0)
            last = self._said.read().strip().splitlines()[-1:] or [f"exit status {status}"]
            raise StateError(f"the gate's worker failed: {last[0]}")
        return json.loads(line)

    def finish(self) -> None:
        """Wait for its end."""
        self._process.communicate()
        if self._process.returncode:
            raise StateError(f"the gate's worker failed: exit status {self._process.returncode}")


def count_instructions(cases: Collection[str], simd: str) -> dict[str, int]:
    """Run each case once under callgrind, in a process of its own; only what the core's walks execute is counted.

    Raises
    ------
    StateError
        valgrind failed, or saw nothing of the core.
    """
    with tempfile.TemporaryDirectory() as directory:
        prefix = [
            "valgrind", "--tool=callgrind", f"--callgrind-out-file={directory}/%p", "--collect-atstart=no",
            # The Python entries of the walks: never inlined, and called once for each VMA.
            "--toggle-collect=__pyx_pw_8ptebatch_5_core_*py_*_range",
        ]  # fmt: skip
        with _Worker({"mode": "run", "cases": list(cases)}, prefix=prefix, PTEBATCH_SIMD=simd) as worker:
            for name, why in worker.missing.items():
                raise StateError(f"{name}: {why}")
            answers = [worker.answer() for _ in cases]
            worker.finish()
        files = {answer["case"]: Path(directory, str(answer["pid"])) for answer in answers}
        found = {name: parse_callgrind(path.read_text(encoding="utf-8")) for name, path in files.items()}
    blind = [name for name, n in found.items() if not n]
    if blind:
        raise StateError(f"callgrind saw nothing of the core in {blind[0]!r}: was it stripped of its symbols?")
    return found


def compare_instructions(
    expected: Counts, found: Counts, slack: float = INSTRUCTIONS_SLACK
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what grew by more than `slack`, and notes on what shrank by as much.

    >>> compare_instructions({"a": 100, "b": 100, "c": 100}, {"a": 102, "b": 103, "c": 90})
    ([{'case': 'b', 'what': '100 -> 103 (+3.00 %)'}], ['c: 100 -> 90 (-10.00 %), a new baseline would hold it'])
    """
    findings, notes = [], []
    for name, before in expected.items():
        text = f"{before} -> {found[name]} ({100 * (found[name] / before - 1):+.2f} %)"
        if found[name] > before * (1 + slack):
            findings.append({"case": name, "what": text})
        elif found[name] < before * (1 - slack):
            notes.append(f"{name}: {text}, a new baseline would hold it")
    return findings, notes


def _levels_under_valgrind() -> tuple[str, ...]:
    return tuple(level for level in CALLGRIND_LEVELS if level in batch.SIMD_SUPPORTED)


def check_instructions(baselines: Path = BASELINES, progress: Progress = lambda done, total: None) -> Level:
    """Compare the core's instructions under callgrind, at every SIMD level that valgrind can run."""
    unfit = _unfit(valgrind=True)
    if unfit:
        return Level(2, "instructions", INCONCLUSIVE, unfit)
    known = _read(baselines, "instructions")
    env = bench.environment()
    notes = ["AVX-512 is not covered: valgrind does not run it"]
    findings: list[dict[str, Any]] = []
    compared = 0
    unknown = []
    levels = _levels_under_valgrind()
    for done, simd in enumerate(levels, 1):
        key = instructions_key(env, simd)
        if key not in known:
            unknown.append(key)
            continue
        expected = known[key]["cases"]
        try:
            worse, better = compare_instructions(expected, count_instructions(expected, simd))
        except StateError as error:
            return Level(2, "instructions", INCONCLUSIVE, str(error), findings, notes)
        findings += [{**finding, "simd": simd} for finding in worse]
        notes += [f"{simd}: {note}" for note in better]
        compared += len(expected)
        progress(done, len(levels))
    if findings:
        summary = f"{len(findings)} of {compared} cases take over {100 * INSTRUCTIONS_SLACK:g} % more instructions"
        return Level(2, "instructions", FAIL, summary, findings, notes)
    if unknown:
        return _missing(2, "instructions", baselines, "; ".join(unknown))
    summary = f"{compared} cases within +{100 * INSTRUCTIONS_SLACK:g} % of the committed instructions"
    return Level(2, "instructions", PASS, f"{summary} ({', '.join(levels)})", [], notes)


def _unfit(*, valgrind: bool = False, scipy: bool = False) -> str | None:
    """Why this build or machine is not one to measure on."""
    version = metadata.version("ptebatch")
    if "+" in version:
        return f"this is a build for debugging ({version}): measure a release build"
    if valgrind and shutil.which("valgrind") is None:
        return "valgrind is not installed (apt-get install valgrind)"
    if scipy and find_spec("scipy") is None:
        return "scipy is not installed (pip install 'ptebatch[gate]')"
    return None


# --- level 3: time ----------------------------------------------------------------------------------------------------
P_VALUE = 0.002
RATIO_FLOOR = 1.05
FLOOR_NS = 2_000
"""A slow-down of a whole run that is less than this is none, whatever the ratio says."""
VISIBLE = 1.10
"""Where not even this slow-down would have been seen, the machine was too noisy to say anything."""


@dataclass(frozen=True)
class Profile:
    """How much is measured.

    Attributes
    ----------
    cases : tuple of str
    interpreters : int
        Started on each side, one pair after the other.
    processes : int
        Forked by each of them. All processes of a pair are there at the same time and take turns.
    rounds : int
        Turns of each process.
    runs : int
        Runs of each case in a turn; the shortest counts.
    """

    cases: tuple[str, ...]
    interpreters: int
    processes: int
    rounds: int
    runs: int


FULL = Profile(CASES["time"], interpreters=4, processes=6, rounds=8, runs=3)
FAST = Profile(
    (
        f"fork batched v6.18 size=256MiB,{_PLAIN[0]}",
        f"fork batched v6.18 size=512MiB,{_PLAIN[2]}",
        f"wrprotect batched v6.18 size=256MiB,{_PLAIN[2]}",
    ),
    interpreters=3,
    processes=8,
    rounds=6,
    runs=2,
)
"""For `self_test`."""


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: where its package is (None: this one), and how much slower a case is made."""

    path: Path | None = None
    slower: Mapping[str, float] = field(default_factory=dict)


def compare_times(base: Sequence[float], head: Sequence[float], *, ratio_floor: float = RATIO_FLOOR) -> dict[str, Any]:
    """Say whether `head` is slower than `base`.

    Parameters
    ----------
    base, head : sequence of float
        Times of runs in ns, one for each process.
    ratio_floor : float
        The least ratio that counts.

    Returns
    -------
    dict
        ``p`` of the one-sided Mann-Whitney test; ``ratio``, the median of those of each head to each base, and what it
        makes in ``difference_ns``; ``slower``: all three say so.
    """
    from scipy.stats import mannwhitneyu

    ratio = float(np.median(np.divide.outer(np.asarray(head), np.asarray(base))))
    difference = (ratio - 1) * float(np.median(base))
    p = float(mannwhitneyu(head, base, alternative="greater").pvalue)
    slower = p < P_VALUE and ratio >= ratio_floor and difference >= FLOOR_NS
    return {"p": p, "ratio": ratio, "difference_ns": difference, "slower": slower}


def take_turns(
    base: Side, head: Side, profile: Profile, cases: Sequence[str], progress: Progress = lambda done, total: None
) -> tuple[dict[str, tuple[list[float], list[float]]], dict[str, str]]:
    """Time cases on both sides, their processes in turns: base, head, head, base.

    A machine is faster now and slower then, by more than what is looked for; but all processes of a round meet much
    the same machine. So each time is taken relative to the median of its round, both sides together, and a process's
    time is the median of these over its rounds.

    Returns
    -------
    times : dict of str to (list of float, list of float)
        For each case that both sides can run, a time for each process of base and head, in ns.
    missing : dict of str to str
        Why the base cannot run the others.

    Raises
    ------
    StateError
        The head cannot run a case.
    """
    missing: dict[str, str] = {}
    # Of each pair of interpreters, by [round, side, process].
    blocks: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in cases}
    rounds, total = profile.rounds + 1, profile.interpreters * (profile.rounds + 1)  # the first touches the memory
    for number in range(profile.interpreters):
        request = {
            "mode": "time", "processes": profile.processes, "runs": profile.runs,
            "cases": [name for name in cases if name not in missing],
        }  # fmt: skip
        sides = (base, head)
        order = (0, 1) if number % 2 == 0 else (1, 0)
        with ExitStack() as stack:
            workers = {
                at: stack.enter_context(_Worker({**request, "slower": dict(sides[at].slower)}, path=sides[at].path))
                for at in order
            }
            if workers[1].missing:
                raise StateError("; ".join(f"{name}: {why}" for name, why in workers[1].missing.items()))
            missing |= workers[0].missing
            times = {name: np.zeros((rounds, 2, profile.processes)) for name in cases if name not in missing}
            for turn in range(rounds):
                for process in range(profile.processes):
                    for at in order if (turn + process) % 2 == 0 else order[::-1]:
                        answer = workers[at].answer(f"{process}\n")["times_ns"]
                        for name, took in times.items():
                            took[turn, at, process] = answer[name]
                progress(number * rounds + turn + 1, total)
        for name, took in times.items():
            blocks[name].append(took[1:])
    return {name: _levelled(pairs) for name, pairs in blocks.items() if name not in missing}, missing


def _levelled(blocks: Sequence[npt.NDArray[np.float64]]) -> tuple[list[float], list[float]]:
    """Times of processes, the machine's ups and downs taken out, from those of all rounds.

    >>> slow, fast = np.array([[1.0, 1.0], [1.1, 1.1]]), np.array([[2.0, 2.0], [2.2, 2.2]])
    >>> _levelled([np.stack([slow, fast, slow])])
    ([1.0, 1.0], [1.1, 1.1])
    """
    middle = [np.median(block, axis=(1, 2)) for block in blocks]  # of each round
    level = float(np.median(np.concatenate(middle)))
    sides = [np.median(block / typical[:, None, None], axis=0) for block, typical in zip(blocks, middle, strict=True)]
    base, head = level * np.concatenate(sides, axis=1)
    return base.tolist(), head.tolist()


Measured = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def slow_downs(measure: Callable[[Sequence[str]], Measured], cases: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Compare all cases, and those that look slower once more.

    Parameters
    ----------
    measure : callable
        Given cases, returns the times of base and head for each.
    cases : sequence of str

    Returns
    -------
    dict of str to dict
        For each case `compare_times` of the first measurement, with ``confirmed``, and ``visible``: whether a slow-down
        by `VISIBLE` would have been seen in such times.
    """
    found = {}
    for name, (base, head) in measure(cases).items():
        visible = compare_times(base, [VISIBLE * took for took in base])["slower"]
        found[name] = {**compare_times(base, head), "visible": visible, "confirmed": False}
    again = [name for name, one in found.items() if one["slower"]]
    for name, (base, head) in measure(again).items() if again else ():
        found[name]["confirmed"] = compare_times(base, head)["slower"]
    return found


@contextmanager
def built(revision: str) -> Iterator[Path]:
    """Build a revision of the source tree we are in, in a worktree of its own; yields the directory of its package.

    Raises
    ------
    StateError
        This is no git repository, there is no such revision, or it does not build.
    """
    with tempfile.TemporaryDirectory(prefix="ptebatch-gate-") as directory:
        tree, site = str(Path(directory, "tree")), Path(directory, "site")
        _do("git", "worktree", "add", "--quiet", "--detach", tree, revision)
        try:
            _do(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), tree)
            yield site
        finally:
            _do("git", "worktree", "remove", "--force", tree)


def _do(*command: str) -> None:
    flavours = ("PTEBATCH_DEBUG", "PTEBATCH_SANITIZE", "PTEBATCH_WERROR")
    env = {name: value for name, value in os.environ.items() if name not in flavours}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    except OSError as error:
        raise StateError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        words = " ".join(Path(word).name for word in command[:4])
        raise StateError(f"{words} failed: {' '.join(done.stderr.split())[-300:]}")


def check_time(base: str | None, progress: Progress = lambda done, total: None, profile: Profile = FULL) -> Level:
    """Compare the time that cases take here with what they take at another revision."""
    if base is None:
        return Level(3, "time", INCONCLUSIVE, "no base to compare with: name one with --base REV")
    unfit = _unfit(scipy=True)
    if unfit:
        return Level(3, "time", INCONCLUSIVE, unfit)
    missing: dict[str, str] = {}
    try:
        with built(base) as site:

            def measure(cases: Sequence[str]) -> Measured:
                times, why = take_turns(Side(site), Side(), profile, cases, progress)
                missing.update(why)
                return times

            found = slow_downs(measure, profile.cases)
    except StateError as error:
        return Level(3, "time", INCONCLUSIVE, str(error))
    return judge_time(base, found, missing)


def judge_time(base: str, found: Mapping[str, Mapping[str, Any]], missing: Mapping[str, str]) -> Level:
    """Make a level of what `slow_downs` found."""

    def said(name: str, one: Mapping[str, Any]) -> dict[str, Any]:
        text = f"{100 * (one['ratio'] - 1):+.1f} %, {one['difference_ns'] / 1000:+.1f} us a run, p = {one['p']:.2g}"
        return {"case": name, "what": text, **{key: one[key] for key in ("ratio", "p", "difference_ns")}}

    notes = [f"the base cannot run {name}: {why}" for name, why in missing.items()]
    notes += [
        f"{name}: {said(name, one)['what']} the first time, not the second"
        for name, one in found.items()
        if one["slower"] and not one["confirmed"]
    ]
    slow = [said(name, one) for name, one in found.items() if one["confirmed"]]
    if slow:
        return Level(3, "time", FAIL, f"{len(slow)} of {len(found)} cases are slower than {base}", slow, notes)
    noisy = [name for name, one in found.items() if not one["visible"]]
    if noisy or not found:
        notes += [f"{name}: too much noise to see {100 * (VISIBLE - 1):.0f} %" for name in noisy]
        summary = f"{len(noisy)} of {len(found)} cases cannot be told from {base}" if found else "the base runs no case"
        return Level(3, "time", INCONCLUSIVE, summary, [], notes)
    ratios = [one["ratio"] for one in found.values()]
    summary = f"{len(found)} cases not slower than {base}, {min(ratios):.2f} to {max(ratios):.2f} times its time"
    return Level(3, "time", PASS, summary, [], notes)


# --- level 4: ratios --------------------------------------------------------------------------------------------------
RATIO_SLACK = 1.75
"""A new bound is the ratio measured times this: neighbours of a shared machine slow the limit and the core down
differently, by up to 1.4 as measured. What changes a ratio by less is for `check_time` to find."""
RATIO_PAIRS = (("batched", "limit"), ("single", "limit"), ("batched", "single"))
RATIO_ROUNDS = 15
RATIO_TRIES = 3
"""A ratio above its bound is measured again; it fails if it is above each time."""


def ratios_key(env: Mapping[str, str]) -> str:
    """What ratios depend on most: CPU and SIMD level.

    >>> ratios_key({"cpu": "Some CPU (6/85/7), 8 CPUs", "simd": "avx512"})
    'Some CPU (6/85/7), avx512'
    """
    return re.sub(r", \d+ CPUs$", "", env["cpu"]) + f", {env['simd']}"


def measure_ratios(memory: str, rounds: int = RATIO_ROUNDS) -> dict[str, float]:
    """Return the ratios of the fastest runs of each path on one memory, measured in turns.

    Parameters
    ----------
    memory : str
        A workload.
    rounds : int
    """
    mm = workload.parse(memory).build()
    cases = [case for case in bench.memory_cases(mm, semantics.get("v6.18")) if case.row["source"] != "pool"]
    bench.measure(cases, rounds)
    fastest: dict[str, float] = {}
    for case in cases:
        path = case.row["path"]
        fastest[path] = min(fastest.get(path, math.inf), min(case.times_ns) / case.ptes)
    return {f"{one}/{other} {memory}": fastest[one] / fastest[other] for one, other in RATIO_PAIRS}


def compare_ratios(
    bounds: Mapping[str, float], measure: Callable[[str], Mapping[str, float]], tries: int = RATIO_TRIES
) -> list[dict[str, Any]]:
    """Return what lies above its bound in each of `tries` measurements of its memory."""
    findings = []
    for memory in dict.fromkeys(name.partition(" ")[2] for name in bounds):
        best: dict[str, float] = {}
        for _ in range(tries):
            for name, ratio in measure(memory).items():
                best[name] = min(ratio, best.get(name, math.inf))
            high = [name for name in best if best[name] > bounds.get(name, math.inf)]
            if not high:
                break
        findings += [
            {"case": name, "what": f"{best[name]:.3g}, bound {bounds[name]:.3g}", "ratio": best[name]} for name in high
        ]
    return findings


def check_ratios(baselines: Path = BASELINES, progress: Progress = lambda done, total: None) -> Level:
    """Compare ratios within one run with the committed bounds of this CPU and SIMD level."""
    unfit = _unfit()
    if unfit:
        return Level(4, "ratios", INCONCLUSIVE, unfit)
    key = ratios_key(bench.environment())
    known = _read(baselines, "ratios")
    if key not in known:
        return _missing(4, "ratios", baselines, key)
    bounds = known[key]["cases"]
    done = 0

    def measure(memory: str) -> Mapping[str, float]:
        nonlocal done
        done += 1
        progress(done, max(done, len(bounds) // len(RATIO_PAIRS)))
        return measure_ratios(memory)

    try:
        findings = compare_ratios(bounds, measure)
    except StateError as error:  # what was to be timed did the wrong thing
        return Level(4, "ratios", FAIL, str(error))
    if findings:
        return Level(4, "ratios", FAIL, f"{len(findings)} of {len(bounds)} ratios above their bounds", findings)
    return Level(4, "ratios", PASS, f"{len(bounds)} ratios within their bounds ({key})")


# --- how often level 3 is wrong ---------------------------------------------------------------------------------------
SLOWER = (3, 5, 10, 20)
"""Slow-downs in % that `self_test` injects."""


def self_test(
    runs: int = 200,
    *,
    state: Path | None = None,
    profile: Profile = FAST,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Let level 3 judge what is known: nothing changed, or one case takes 3, 5, 10 or 20 % longer.

    A side is slower because one of its cases, another in every run, is kept waiting that much of its own time before
    its clock is read: the noise is that of real runs, the slow-down is exact. A false alarm is a run with nothing
    changed in which any case is called slower; a slow-down is found if the case that has it is.

    Parameters
    ----------
    runs : int
        Of each kind.
    state : Path, optional
        A file that results are appended to; what is in it already is not run again.
    profile : Profile
    progress : callable

    Returns
    -------
    dict
        ``runs`` (of each kind), ``false_positive_rate`` with its ``interval``, ``detection`` and
        ``detection_intervals`` (by slow-down in %, as text), ``injected_ratio`` (median of what was measured where a
        slow-down was injected), ``elsewhere`` (false alarms in cases that had none, of all comparisons beside an
        injected one), ``seconds_per_run`` and ``profile``. Intervals are Clopper-Pearson's, 95 %.

    Raises
    ------
    StateError
        scipy is missing, the build is one for debugging, or the file is of another machine, build or profile.
    """
    unfit = _unfit(scipy=True)
    if unfit:
        raise StateError(unfit)
    env = bench.environment()
    about = {"schema": SCHEMA, "profile": asdict(profile), **{name: env[name] for name in ("cpu", "simd", "commit")}}
    about = json.loads(json.dumps(about))
    results = _read_state(state, about)
    kinds = [(number, slower) for number in range(runs) for slower in (0, *SLOWER)]
    for done, kind in enumerate(kinds, 1):
        if kind not in results:
            results[kind] = _self_test_run(profile, *kind)
            if state is not None:
                with state.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(results[kind]) + "\n")
        progress(done, len(kinds))
    return {"mode": "self-test", "env": env, **summarise([results[kind] for kind in kinds]), "profile": asdict(profile)}


def _read_state(state: Path | None, about: Mapping[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the results a state file holds; begin one if there is none."""
    if state is None:
        return {}
    if not state.exists():
        state.write_text(json.dumps(about) + "\n", encoding="utf-8")
    try:
        first, *lines = [json.loads(line) for line in state.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise StateError(f"{state} is no state of a self-test ({error}): name another file") from None
    if first != about:
        other = [name for name in about if first.get(name) != about[name]]
        raise StateError(f"{state} is of another {', '.join(other)}: name another file, or remove it")
    return {(line["run"], line["slower"]): line for line in lines}


def _self_test_run(profile: Profile, number: int, slower: int) -> dict[str, Any]:
    begin = time.monotonic()
    injected = profile.cases[number % len(profile.cases)] if slower else None
    head = Side(slower={injected: slower / 100} if injected else {})
    found = slow_downs(lambda cases: take_turns(Side(), head, profile, cases)[0], profile.cases)
    return {
        "run": number, "slower": slower, "injected": injected,
        "ratio": found[injected]["ratio"] if injected else None,
        "confirmed": [name for name, one in found.items() if one["confirmed"]],
        "first": [name for name, one in found.items() if one["slower"]],
        "seconds": round(time.monotonic() - begin, 2),
    }  # fmt: skip


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Turn the results of single runs into the rates that `self_test` returns."""

    def rate(found: Sequence[bool]) -> tuple[float, list[float]]:
        from scipy.stats import binomtest

        interval = binomtest(sum(found), len(found)).proportion_ci(method="exact")
        return sum(found) / len(found), [float(interval.low), float(interval.high)]

    kinds = sorted({one["slower"] for one in results})
    rates = {}
    for slower in kinds:
        mine = [one for one in results if one["slower"] == slower]
        rates[slower] = rate(
            [one["injected"] in one["confirmed"] if slower else bool(one["confirmed"]) for one in mine]
        )
    ratios = {slower: [one["ratio"] for one in results if one["slower"] == slower] for slower in kinds if slower}
    beside = [one for one in results if one["slower"]]
    return {
        "runs": sum(one["slower"] == 0 for one in results),
        "false_positive_rate": rates[0][0],
        "interval": rates[0][1],
        "detection": {str(slower): rates[slower][0] for slower in kinds if slower},
        "detection_intervals": {str(slower): rates[slower][1] for slower in kinds if slower},
        "injected_ratio": {str(slower): float(np.median(found)) for slower, found in ratios.items()},
        "elsewhere": sum(len(set(one["confirmed"]) - {one["injected"]}) for one in beside),
        "seconds_per_run": float(np.mean([one["seconds"] for one in results])),
    }


# --- the gate ---------------------------------------------------------------------------------------------------------
LEVELS = ("counts", "instructions", "time", "ratios")
"""The levels in the order they run."""


def run_gate(
    levels: Sequence[str] = (),
    *,
    base: str | None = None,
    baselines: Path = BASELINES,
    progress: Callable[[str], Progress] = lambda name: lambda done, total: None,
) -> dict[str, Any]:
    """Run the gate.

    Parameters
    ----------
    levels : sequence of str
        Names in `LEVELS`; all of them if none is given.
    base : str, optional
        The revision that level 3 compares with.
    baselines : Path
        Directory of the committed files.
    progress : callable
        Called with a level's name before it runs; returns what is called as ``progress(done, total)`` meanwhile.

    Returns
    -------
    dict
        ``schema``, ``mode``, ``env`` (`ptebatch.bench.environment`) and ``levels``: `Level.to_dict` of each.
    """
    unknown = [name for name in levels if name not in LEVELS]
    if unknown:
        raise ArgumentError(f"no level {unknown[0]!r}: choose from {', '.join(LEVELS)}")
    checks: dict[str, Callable[[Progress], Level]] = {
        "counts": functools.partial(check_counts, baselines),
        "instructions": functools.partial(check_instructions, baselines),
        "time": functools.partial(check_time, base),
        "ratios": functools.partial(check_ratios, baselines),
    }
    found = [check(progress(name)) for name, check in checks.items() if not levels or name in levels]
    return {"schema": SCHEMA, "mode": "gate", "env": bench.environment(), "levels": [one.to_dict() for one in found]}


def exit_code(document: Mapping[str, Any], require: Iterable[str] = ()) -> int:
    """1 for a regression, 2 if a required level is inconclusive or was not run, else 0."""
    status = {level["name"]: level["status"] for level in document["levels"]}
    if FAIL in status.values():
        return 1
    return 2 if any(status.get(name, INCONCLUSIVE) == INCONCLUSIVE for name in require) else 0


def write_baselines(
    reason: str,
    levels: Sequence[str] = (),
    *,
    baselines: Path = BASELINES,
    cases: Sequence[str] = (),
    progress: Callable[[str], Progress] = lambda name: lambda done, total: None,
) -> list[str]:
    """Write what this build does as the baseline to compare with; the only way to change one.

    Parameters
    ----------
    reason : str
        Why; written beside the figures.
    levels : sequence of str
        Levels with a baseline; all of them if none is given.
    baselines : Path
    cases : sequence of str
        Cases to add to those the file of counts names. A file that does not exist begins with these, or with `CASES`.
    progress : callable
        As for `run_gate`.

    Returns
    -------
    list of str
        What was written or left out.
    """
    if not reason.strip():
        raise ArgumentError("a baseline changes for a reason: say which with --reason TEXT")
    notes = []
    for level in levels or WRITERS:
        if level not in WRITERS:
            raise ArgumentError(f"no baseline for {level!r}: choose from {', '.join(WRITERS)}")
        notes += WRITERS[level](baselines, reason, cases, progress(level))
    return notes


def _write_counts(baselines: Path, reason: str, cases: Sequence[str], progress: Progress) -> list[str]:
    known = _read(baselines, "counts").get("", {}).get("cases", {})
    names = list(dict.fromkeys([*(known or (() if cases else CASES["counts"])), *(str(Case.parse(c)) for c in cases)]))
    found = {}
    for done, name in enumerate(names, 1):
        found[name] = gate_worker.counts(Case.parse(name))
        progress(done, len(names))
    if found == known:
        return ["counts: nothing changed"]
    return [f"counts: wrote {_write(baselines, 'counts', '', found, reason)}"]


def _write_instructions(baselines: Path, reason: str, cases: Sequence[str], progress: Progress) -> list[str]:
    unfit = _unfit(valgrind=True)
    if unfit:
        return [f"instructions: left as they are, {unfit}"]
    env = bench.environment()
    levels = _levels_under_valgrind()
    for done, simd in enumerate(levels, 1):
        key = instructions_key(env, simd)
        path = _write(baselines, "instructions", key, count_instructions(CASES["instructions"], simd), reason)
        progress(done, len(levels))
    return [f"instructions: wrote {path} ({', '.join(levels)})"]


def _write_ratios(baselines: Path, reason: str, cases: Sequence[str], progress: Progress) -> list[str]:
    unfit = _unfit()
    if unfit:
        return [f"ratios: left as they are, {unfit}"]
    bounds: dict[str, float] = {}
    for done, memory in enumerate(CASES["ratios"], 1):
        tries = [measure_ratios(memory) for _ in range(RATIO_TRIES)]
        medians = {name: float(np.median([one[name] for one in tries])) for name in tries[0]}
        bounds |= {name: float(f"{RATIO_SLACK * ratio:.3g}") for name, ratio in medians.items()}
        progress(done, len(CASES["ratios"]))
    key = ratios_key(bench.environment())
    return [f"ratios: wrote {_write(baselines, 'ratios', key, bounds, reason)} ({key})"]


WRITERS: dict[str, Callable[[Path, str, Sequence[str], Progress], list[str]]] = {
    "counts": _write_counts,
    "instructions": _write_instructions,
    "ratios": _write_ratios,
}
"""What writes the baseline of a level."""


# --- reports for machines ---------------------------------------------------------------------------------------------
def _lines(level: Mapping[str, Any]) -> list[str]:
    return [f"{finding['case']}: {finding['what']}" for finding in level["findings"]]


def junit(document: Mapping[str, Any]) -> str:
    """Return the result as JUnit XML: a test case for each level; inconclusive is skipped."""
    status = [level["status"] for level in document["levels"]]
    suite = ElementTree.Element(
        "testsuite", name="ptebatch gate", tests=str(len(status)), failures=str(status.count(FAIL)), errors="0",
        skipped=str(status.count(INCONCLUSIVE)),
    )  # fmt: skip
    for level in document["levels"]:
        case = ElementTree.SubElement(suite, "testcase", classname="ptebatch.gate", name=level["name"])
        if level["status"] != PASS:
            kind = "failure" if level["status"] == FAIL else "skipped"
            ElementTree.SubElement(case, kind, message=level["summary"]).text = "\n".join(_lines(level))
        ElementTree.SubElement(case, "system-out").text = "\n".join([level["summary"], *level["notes"]])
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def github_annotations(document: Mapping[str, Any]) -> list[str]:
    """Return the workflow commands that show failures and inconclusive levels beside a change on GitHub."""

    def escaped(text: str) -> str:
        return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    kinds = {FAIL: "error", INCONCLUSIVE: "warning"}
    return [
        f"::{kinds[level['status']]} title=ptebatch gate, {level['name']}::"
        + escaped("\n".join([level["summary"], *_lines(level)]))
        for level in document["levels"]
        if level["status"] in kinds
    ]
