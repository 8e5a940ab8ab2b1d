#!/usr/bin/env python3
"""What the gate catches: builds copies of this tree with one deliberate regression each, and runs its levels on them.

usage: python3 tools/gate_regressions.py [REGRESSION...]

Prints which levels fail on which, and exits 1 where one of those that should does not. Takes two minutes for each, and
three more where level `time` is to catch it: other regressions run without that one. A regression whose place in the
source is gone is an error.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
LEVELS = ("counts", "instructions", "ratios")
CORE, LANE, SIMD = "ptebatch/_core.pyx", "ptebatch/_lane.h", "ptebatch/_lane_simd.h"
STORE = "LANE(store)(dst + i + k * LANES, LANE(add)(entries[k], LANE(set)(child)));"
Change = tuple[str, str, str]
REGRESSIONS: dict[str, tuple[list[str], list[Change]]] = {
    "nothing": ([], []),
    "an extra refcount add per page": (
        ["counts"],
        [
            (LANE, "#define LANE_ONE_MAPPING (LANE_BIT(", "#define LANE_ONE_MAPPING (2 * LANE_BIT("),
            (LANE, "words[head] += (uint64_t)nr <<", "words[head] += (uint64_t)2 * nr <<"),
        ],
    ),
    "an extra branch per PTE": (
        ["instructions"],
        [(SIMD, STORE, "l->none += src[i + k * LANES] == ~dst[i + k * LANES] ? 1 : 0;\n" + STORE)],
    ),
    "prefetch removed": (
        ["time"],
        [(LANE, "LANE_PREFETCH(p) __builtin_prefetch((p), 1)", "LANE_PREFETCH(p) ((void)(p))")],
    ),
    "batching off above order 4": (
        ["counts", "ratios"],
        [
            (CORE, "if max_nr != 1 and W.prealloc", "if max_nr != 1 and word_order(w) <= 4 and W.prealloc"),
            (SIMD, "    if (!lane_canonical(l, v))\n", "    if (nr_pages > 16 || !lane_canonical(l, v))\n"),
        ],
    ),
}
"""The levels that should fail, and the changes: file, what is there, what comes in its place."""


def run(name: str) -> dict[str, str]:
    """Return the status of each level on a copy of the tree with that regression."""
    wanted, changes = REGRESSIONS[name]
    levels = [*LEVELS, *(["time"] if "time" in wanted else [])]
    with tempfile.TemporaryDirectory() as directory:
        listed = subprocess.run(["git", "-C", TREE, "ls-files"], capture_output=True, text=True, check=True)
        for file in listed.stdout.split():
            target = Path(directory, file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TREE / file, target)
        commit = ["-c", "user.name=a", "-c", "user.email=a@localhost", "commit", "-q", "-m", "the base"]
        for command in (["init", "-q"], ["add", "-A"], commit):
            subprocess.run(["git", *command], cwd=directory, check=True)
        for file, old, new in changes:
            text = Path(directory, file).read_text(encoding="utf-8")
            if text.count(old) != 1:
                sys.exit(f"{name}: {file} has {text.count(old)} times what is to be changed: {old.strip()!r}")
            Path(directory, file).write_text(text.replace(old, new), encoding="utf-8")
        subprocess.run(["make", "-s", "install"], cwd=directory, capture_output=True, check=True)
        command = [".venv/bin/ptebatch", "gate", "--json", "--base", "HEAD"]
        command += [word for level in levels for word in ("--level", level)]
        printed = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False).stdout
    return {level["name"]: level["status"] for level in json.loads(printed)["levels"]}


def main() -> int:
    """Run the regressions asked for; 1 if a level lets one pass, or fails on an unchanged tree."""
    names = sys.argv[1:] or list(REGRESSIONS)
    unknown = [name for name in names if name not in REGRESSIONS]
    if unknown:
        sys.exit(f"no regression {unknown[0]!r}; they are: {', '.join(REGRESSIONS)}")
    missed = False
    for name in names:
        found = run(name)
        wanted = REGRESSIONS[name][0]
        lacking = [level for level in wanted if found[level] != "fail"]
        missed |= bool(lacking) or (not wanted and "fail" in found.values())
        line = [f"{name:32}", *(f"{level} {status:12}" for level, status in found.items())]
        print(*line, *(["MISSED:", *lacking] if lacking else []), flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
