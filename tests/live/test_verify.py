"""The model against the kernel the tests run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptebatch import live, verify

pytestmark = pytest.mark.usefixtures("root")


def machine() -> dict[str, str]:
    """Everything verify may borrow, as it is now."""
    paths = [*live.THP.glob("**/enabled"), *live.THP.glob("khugepaged/*_millisecs"), Path("/proc/swaps")]
    paths += [Path("/proc/sys/vm") / name for name in ("nr_hugepages", "compaction_proactiveness")]
    paths += [*Path("/sys/block").glob("zram*/disksize"), *Path("/sys/kernel/mm/ksm").glob("[prs]*")]
    counts = {"pages_scanned", "pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "pages_skipped"}
    counts |= {"stable_node_chains", "stable_node_dups", "run_time"}
    return {str(path): path.read_text() for path in paths if path.exists() and path.name not in counts}


def processes() -> set[int]:
    """Processes that descend from this one, zombies too, and subjects wherever they are."""
    parents, found = {}, set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if b"subject.py" in command:
            found.add(int(path.name))
    for pid, parent in parents.items():
        while parent > 1 and parent != os.getpid():
            parent = parents.get(parent, 0)
        if parent == os.getpid():
            found.add(pid)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left_changed() -> Iterator[None]:
    with live.Settings({}):  # nobody else has them borrowed
        before = machine()
    running, files = processes(), set(os.listdir("/dev/shm"))
    yield
    with live.Settings({}):
        assert machine() == before
    assert processes() <= running
    assert set(os.listdir("/dev/shm")) <= files
    assert not (live.state_dir() / "settings.json").exists()


RULED_OUT: dict[str, str] = {}
"""What this kernel's configuration rules out: a reason that may be given for skipping, by scenario."""


@pytest.mark.parametrize("name", verify.SCENARIOS)
def test_scenario(name: str) -> None:
    document = verify.run(verify.select([name]))
    (outcome,) = document["scenarios"]
    if outcome["status"] == "skipped":
        if "built without" in outcome["reason"] or "has no" in outcome["reason"]:
            pytest.skip(outcome["reason"])
        pytest.fail(f"skipped: {outcome['reason']}")
    assert outcome["status"] == "passed", outcome["reason"]
    assert outcome["checks"] > 100
    assert outcome["mismatches"] == 0
