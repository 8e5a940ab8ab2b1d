"""The regression gate: did the engine change, in counts, instructions or time?

Levels, from the one without any noise to the noisiest:

1. ``counts``: operation counts of fixed workloads equal a committed file exactly.
2. ``instructions``: instructions of the core under callgrind, within `INSTRUCTIONS_SLACK` of a committed file. What
   valgrind cannot run (AVX-512) is not covered.

Each passes, fails or is inconclusive: what cannot be known is not a pass. A committed baseline of instructions is good
for one compiler, its flags, Cython and SIMD level only; anything else has no baseline there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ptebatch import bench, gate_worker
from ptebatch.errors import ArgumentError, StateError
from ptebatch.gate_worker import Case

__all__ = [
    "BASELINES",
    "CASES",
    "LEVELS",
    "Level",
    "check_counts",
    "check_instructions",
    "exit_code",
    "github_annotations",
    "junit",
    "run_gate",
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
        f"{operation} {path} {kernel} size=16MiB,{workload}"
        for operation in gate_worker.OPERATIONS
        for kernel, path in (
            ("v6.8", "single"), ("v6.9", "batched"), ("v6.12", "batched"), ("v6.18", "single"), ("v6.18", "batched"),
        )
        for workload in (_PLAIN + _MIXED if kernel == "v6.18" else _MIXED)
    ),
    "instructions": tuple(
        f"{operation} v6.18 size=256MiB,{workload}"
        for operation, workloads in (
            ("fork batched", (_PLAIN[0], _PLAIN[2], _PLAIN[3], _MIXED[0])),
            ("fork single", (_PLAIN[2],)),
            *((f"{operation} batched", (_PLAIN[2],)) for operation in gate_worker.OPERATIONS if operation != "fork"),
        )
        for workload in workloads
    ),
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


def _ask(request: Mapping[str, Any], *, prefix: Sequence[str] = (), path: Path | None = None, **more: str) -> list[Any]:
    """Run the worker as a program, with the package at `path` (by default this one); return its answers.

    Raises
    ------
    StateError
        It failed.
    """
    drop = ("PYTHONPATH", "PYTHONHOME")
    env = {name: value for name, value in os.environ.items() if name not in drop}
    env |= {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | more
    env["PYTHONPATH"] = str(path or Path(gate_worker.__file__).parent.parent)
    command = [*prefix, sys.executable, "-P", gate_worker.__file__, json.dumps(request)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise StateError(f"the gate's worker failed: {last[0]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def count_instructions(cases: Iterable[str], simd: str) -> dict[str, int]:
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
        head, *answers = _ask({"mode": "run", "cases": list(cases)}, prefix=prefix, PTEBATCH_SIMD=simd)
        for name, why in head["missing"].items():
            raise StateError(f"{name}: {why}")
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
    return CALLGRIND_LEVELS[:1]  # the core has no other code yet


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


def _unfit(*, valgrind: bool = False) -> str | None:
    """Why this build or machine is not one to measure on."""
    version = metadata.version("ptebatch")
    if "+" in version:
        return f"this is a build for debugging ({version}): measure a release build"
    if valgrind and shutil.which("valgrind") is None:
        return "valgrind is not installed (apt-get install valgrind)"
    return None


# --- the gate ---------------------------------------------------------------------------------------------------------
LEVELS: dict[str, Callable[..., Level]] = {"counts": check_counts, "instructions": check_instructions}
"""The levels by name, in the order they run."""


def run_gate(
    levels: Sequence[str] = (),
    *,
    baselines: Path = BASELINES,
    progress: Callable[[str], Progress] = lambda name: lambda done, total: None,
) -> dict[str, Any]:
    """Run the gate.

    Parameters
    ----------
    levels : sequence of str
        Names in `LEVELS`; all of them if none is given.
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
    found = [LEVELS[name](baselines=baselines, progress=progress(name)) for name in levels or LEVELS]
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


WRITERS: dict[str, Callable[[Path, str, Sequence[str], Progress], list[str]]] = {
    "counts": _write_counts,
    "instructions": _write_instructions,
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
