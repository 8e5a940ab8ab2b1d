"""Measuring: right work, right bookkeeping, results checked. No test looks at a time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from ptebatch import _measure, bench, live
from ptebatch.errors import ArgumentError, PermissionDeniedError, StateError
from ptebatch.fork import ForkPlan
from ptebatch.mm import Mm
from ptebatch.workload import make

pytestmark = pytest.mark.xdist_group("machine")  # a benchmark of real memory changes its settings

SPREAD = {"min_ns_per_pte", "q1_ns_per_pte", "q3_ns_per_pte", "max_ns_per_pte"}
MEASURED = {"ptes", "ns_per_pte", "x_limit", "rounds"} | SPREAD
NAMED = {"source", "arch", "semantics", "size_bytes", "folio_bytes", "order", "path"}


@pytest.fixture(scope="module")
def document() -> dict:
    return bench.run_bench(size=4 << 20, folios=(4096, 65536), rounds=2, pid="self", peers=True)


# --- run_bench --------------------------------------------------------------------------------------------------------
def test_schema(document):
    assert list(document) == ["schema", "mode", "env", "rows", "bound", "notes"]
    assert (document["schema"], document["mode"]) == (bench.SCHEMA, "bench")
    for row in document["rows"]:
        assert set(row) >= NAMED
        if row["source"] != "published":
            assert set(row) >= NAMED | MEASURED
            assert row["rounds"] == 2
            assert 0 < row["min_ns_per_pte"] <= row["q1_ns_per_pte"] <= row["ns_per_pte"]
            assert row["ns_per_pte"] <= row["q3_ns_per_pte"] <= row["max_ns_per_pte"]
    assert json.loads(json.dumps(document)) == document


@pytest.mark.parametrize("folio", [4096, 65536])
def test_every_measurement_of_a_folio_size_has_one_row(document, folio):
    mine = [row for row in document["rows"] if row["folio_bytes"] == folio and row["source"] != "published"]
    have = sorted((row["source"], row["path"]) for row in mine if row["source"] != "numba")
    both = [(source, path) for source in ("c", "core", "numpy") for path in ("batched", "single")]
    assert have == sorted([*both, ("limit", "limit"), ("naive", "single"), ("pool", "pool")])
    assert {row["ptes"] for row in mine} == {1024}
    assert {row["size_bytes"] for row in mine} == {4 << 20}
    assert {(row["arch"], row["order"]) for row in mine} == {("x86-64", {4096: 0, 65536: 4}[folio])}
    (limit,) = [row for row in mine if row["source"] == "limit"]
    assert all(row["x_limit"] == pytest.approx(row["ns_per_pte"] / limit["ns_per_pte"]) for row in mine)


def test_published_figures_are_the_published_ones(document):
    found = {(row["folio_bytes"], row["path"]): row for row in document["rows"] if row["source"] == "published"}
    assert set(found) == {(folio, path) for folio in (4096, 65536) for path in ("single", "batched")}
    assert found[65536, "single"]["ns_per_pte"] * 262144 == pytest.approx(0.014046e9)
    assert found[65536, "batched"]["ns_per_pte"] * 262144 == pytest.approx(0.010444e9)
    changes = [round(100 * (after / before - 1)) for before, after in bench.PUBLISHED.values()]
    assert changes == [-2, -16, -24, -26, -28, -29, -30, -30, -30]  # as the series' cover letter rounds them
    assert [kib << 10 for kib in bench.PUBLISHED] == list(bench.FOLIOS)


def test_a_real_process_is_measured(document):
    mine = {(row["source"], row["path"]): row for row in document["rows"] if "memory" in row}
    assert {("core", "single"), ("core", "batched"), ("limit", "limit"), ("pool", "pool")} <= set(mine)
    single, batched = mine["core", "single"], mine["core", "batched"]
    assert single["memory"].startswith(f"process {os.getpid()} ")
    assert single["ptes"] == batched["ptes"] == single["size_bytes"] // 4096 > 1000
    assert document["bound"]
    assert {row["folio_bytes"] for row in mine.values()} == {None}


def test_a_process_is_started_where_that_is_possible():
    seen = bench.run_bench(size=4 << 20, folios=(), rounds=1)
    (row,) = [row for row in seen["rows"] if (row["source"], row["path"]) == ("core", "single")]
    busy = any("another process keeps" in note for note in seen["notes"])  # the lock of the settings
    if os.geteuid() == 0 and bench.REAL_FOLIO in live.folio_sizes() and not busy:
        assert row["memory"] == "a process with 4MiB in 64KiB folios"
    else:
        assert row["memory"] == "this interpreter"
        assert any("this interpreter" in note for note in seen["notes"])
    assert row["ptes"] >= 1024


def test_the_naive_loop_runs_on_less(monkeypatch):
    monkeypatch.setattr(bench, "NAIVE_BYTES", 1 << 20)
    found = bench.run_bench(size=4 << 20, folios=(65536,), rounds=1, pid="self")["rows"]
    sizes = {row["source"]: row["size_bytes"] for row in found if "memory" not in row}
    assert sizes == {"naive": 1 << 20, "core": 4 << 20, "limit": 4 << 20, "pool": 4 << 20, "published": 1 << 30}
    (real,) = [row for row in found if "memory" in row and row["source"] == "naive"]
    assert real["size_bytes"] <= 1 << 20


def test_progress_reaches_its_end():
    seen: list[tuple[int, int]] = []
    bench.run_bench(size=1 << 20, folios=(4096,), rounds=2, pid="self", progress=lambda *step: seen.append(step))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}


def test_environment_says_where_figures_come_from():
    env = bench.environment()
    assert {"cpu", "caches", "kernel", "thp", "compiler", "flags", "simd", "cython", "commit"} <= set(env)
    assert all(isinstance(value, str) and value for value in env.values())
    assert "-O" in env["flags"]
    assert env["compiler"] != "unknown"


# --- run_limit --------------------------------------------------------------------------------------------------------
def test_limit_rows_have_their_targets(monkeypatch):
    """On little memory that takes the place of 1 GiB."""
    monkeypatch.setattr(bench, "TARGETS", {(4 << 20, 0): (11, 8), (4 << 20, 4): (3, 2.2)})
    seen: list[tuple[int, int]] = []
    done = bench.run_limit(
        size=4 << 20, folios=(4096, 65536), rounds=1, peers=True, progress=lambda *step: seen.append(step)
    )
    assert (list(done), done["mode"]) == (["schema", "mode", "env", "rows", "bound", "notes"], "limit")
    targets = {(row["source"], row["order"], row["path"]): (row["must"], row["aim"]) for row in done["rows"]}
    assert targets["core", 0, "single"] == targets["core", 0, "batched"] == (11, 8)
    assert targets["core", 4, "single"] == (None, None)  # what is not batched is not to reach what batching does
    assert targets["core", 4, "batched"] == (3, 2.2)
    by = {(row["source"], row["order"], row["path"]): row for row in done["rows"]}
    naive, core = by["naive", 4, "single"], by["core", 4, "batched"]
    assert naive["x_core"] == pytest.approx(naive["ns_per_pte"] / core["ns_per_pte"])
    assert naive["must_x_core"] is None  # has one at 1 GiB only
    assert [step for step, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}
    assert json.loads(json.dumps(done)) == done


def test_limit_measures_mixed_folios_and_every_order_by_default():
    rows = bench.run_limit(size=16 << 20, rounds=1)["rows"]
    assert {row["order"] for row in rows} == {*range(10), "mixed"}
    assert {row["folio_bytes"] for row in rows if row["order"] == "mixed"} == {None}
    assert {row["must"] for row in rows} == {None}


def test_memory_that_is_not_plain_is_measured_beside_plain_memory():
    ticks: list[None] = []
    rows = bench._not_plain(8 << 20, (65536,), 1, bench.LATEST, lambda: ticks.append(None))
    assert len(ticks) == 3
    core = [row for row in rows if row["source"] == "core" and "operation" not in row]
    assert [row["memory"] for row in core] == ["plain", *bench.OTHER_MEMORY, *bench.OTHER_KERNELS]
    assert all(row["x_plain"] == pytest.approx(row["ns_per_pte"] / core[0]["ns_per_pte"]) for row in core)
    assert [row["must_x_plain"] for row in core] == [None, *[bench.OTHER_MUST] * (len(core) - 1)]
    assert [row["semantics"] for row in core[-3:]] == list(bench.OTHER_KERNELS)
    write, stream = (row for row in rows if row.get("operation") == "wrprotect_range")
    assert (write["source"], stream["source"], write["ptes"]) == ("core", "limit", 2048)
    assert write["x_limit"] == pytest.approx(write["ns_per_pte"] / stream["ns_per_pte"])


# --- run_kernel_layout ------------------------------------------------------------------------------------------------
def test_the_kernel_s_layout_beside_the_published_change():
    seen: list[tuple[int, int]] = []
    done = bench.run_kernel_layout(
        size=4 << 20, folios=(4096, 65536), rounds=1, progress=lambda *step: seen.append(step)
    )
    assert done["mode"] == "kernel-layout"
    assert seen[-1] == (len(seen), len(seen))
    by = {(row["source"], row["semantics"], row["order"], row["path"]): row for row in done["rows"]}
    assert len(by) == len(done["rows"]) == 2 * 2 * len(bench.LAYOUT_KERNELS) + 4
    locked = {key[1:]: row["locked_per_pte"] for key, row in by.items() if key[0] == "kernel-layout"}
    # reference, anon-exclusive, mapcount, entry; and of a large folio, since v6.10, its large mapcount
    assert locked["v6.9", 0, "single"] == locked["v6.9", 0, "batched"] == locked["v6.18", 0, "batched"] == 4
    assert locked["v6.9", 4, "single"] == 4
    assert locked["v6.9", 4, "batched"] == 3 + 1 / 16
    assert locked["v6.18", 4, "single"] == 5
    assert locked["v6.18", 4, "batched"] == 3 + 2 / 16
    assert by["kernel-layout", "v6.9", 4, "batched"]["ops"]["folio_ref_add"] == 1 / 16


# --- run_live (what it measures: live/test_bench.py) ------------------------------------------------------------------
def test_live_says_what_it_needs(monkeypatch):
    with pytest.raises(ArgumentError, match="multiple of 2MiB"):
        bench.run_live(size=1 << 20)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionDeniedError, match="root"):
        bench.run_live(size=2 << 20)
    monkeypatch.setattr(bench, "_read", lambda path: "MemAvailable:       2048 kB")
    with pytest.raises(StateError, match="too little free memory"):
        bench.run_live(size=2 << 20)


# --- load, compare ----------------------------------------------------------------------------------------------------
def test_documents_can_be_compared(document, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    later = json.loads(json.dumps(document))
    for row in later["rows"]:
        if row["source"] == "core":
            for key in ("ns_per_pte", "x_limit", *SPREAD):
                row[key] *= 2.0
            row["q1_ns_per_pte"] = 3 * row["q3_ns_per_pte"]
    later["env"]["commit"], later["env"]["cpu"] = "another", document["env"]["cpu"]
    done = bench.compare(bench.load(path), later)
    assert done["mode"] == "compare"
    assert done["env"] == {"commit": f"{document['env']['commit']} -> another"}
    measured = [row for row in document["rows"] if row["source"] != "published"]
    assert len(done["rows"]) == len(measured)
    for row in done["rows"]:
        slower = row["source"] == "core"
        assert row["change"] == row["change_x_limit"] == pytest.approx(float(slower))
        assert row["apart"] == slower


def test_documents_without_anything_in_common(document):
    with pytest.raises(ArgumentError, match="nothing|no measurement"):
        bench.compare({**document, "rows": []}, document)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "null", "[" * 100_000, "\xff\xfe", '{"schema": 99, "env": {}, "rows": []}'),
        *(
            f'{{"schema": 1, "env": {{}}, "rows": [{row}]}}'
            for row in ("1", '{"ns_per_pte": "fast"}', '{"source": []}', '{"ns_per_pte": NaN}', '{"ns_per_pte": 0}')
        ),
    ],
)
def test_a_document_that_is_none_is_refused(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ArgumentError, match="x.json"):
        bench.load(path)
    with pytest.raises(FileNotFoundError):
        bench.load(tmp_path / "none")


# --- benchmarks/ ------------------------------------------------------------------------------------------------------
def test_every_case_of_the_benchmarks_is_right():
    """Once, on little memory, untimed; results are checked as in a benchmark."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    command = [sys.executable, "-m", "pytest", str(folder), "-q", "--size=16MiB", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=folder.parent)
    assert done.returncode == 0, done.stdout[-2000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > 200


# --- measure ----------------------------------------------------------------------------------------------------------
def fake(name: str, log: list[tuple[str, str]]) -> bench.Case:
    def step(what: str):
        return lambda *result: log.append((name, what))

    return bench.Case({"source": name, "path": "single"}, 4, step("reset"), step("run"), step("check"))


def test_every_run_is_fresh_results_are_checked_once_and_cases_take_turns():
    log: list[tuple[str, str]] = []
    cases = [fake(name, log) for name in "abc"]
    rounds: list[int] = []
    bench.measure(cases, 3, lambda: rounds.append(len(log)))
    assert [what for _, what in log[:9]] == ["reset", "run", "check"] * 3
    assert [what for _, what in log[9:]] == ["reset", "run"] * 9
    firsts = [log[at][0] for at in (9, 15, 21)]
    assert sorted(firsts) == ["a", "b", "c"]
    assert len(rounds) == 4
    assert [len(case.times_ns) for case in cases] == [3, 3, 3]


def test_rows_keep_the_fastest_limit_and_take_medians():
    cases = [bench.Case({"source": s, "path": "p", "variant": v}, 2, int, int) for s, v in ("ca", "lb", "lc")]
    cases[0].row["source"], cases[1].row["source"], cases[2].row["source"] = "core", "limit", "limit"
    cases[0].times_ns, cases[1].times_ns, cases[2].times_ns = [30, 10, 100], [6, 6, 6], [4, 4, 4]
    core, limit = bench.rows(cases, arch="x")
    assert (core["ns_per_pte"], core["x_limit"], core["min_ns_per_pte"], core["max_ns_per_pte"]) == (15, 7.5, 5, 50)
    assert (limit["variant"], limit["x_limit"], limit["arch"]) == ("c", 1, "x")


# --- checks that can fail ---------------------------------------------------------------------------------------------
def spoil_child(plan: ForkPlan, bit: int) -> None:
    plan.child.entries[0, 0] |= np.uint64(bit)


SPOILT = {
    "young entries": lambda plan: spoil_child(plan, plan.mm.layout.young),
    "is writable": lambda plan: spoil_child(plan, plan.mm.layout.write),
    "pages differ": lambda plan: plan.child.entries[0].__setitem__(0, plan.child.entries[0, 1]),
    "mapcounts": lambda plan: setattr(plan.mm.folios.page(int(plan.mm.folios.heads()[0])), "mapcount", 1),
    "refcounts": lambda plan: setattr(plan.mm.folios.folio(int(plan.mm.folios.heads()[0])), "refcount", 1),
    "rss": lambda plan: plan.child.rss.__setitem__(1, 0),
    "statistics": lambda plan: plan.child.entries[0].__setitem__(0, 0),
    "nothing was copied": lambda plan: plan.child.entries.fill(0),
}


@pytest.mark.parametrize("rule", SPOILT)
def test_a_wrong_fork_is_noticed(rule):
    plan = ForkPlan(make(size="1MiB", folio="64KiB"), keep=True)
    check = bench.ForkCheck(plan)
    stats = plan.run()
    check(stats)
    SPOILT[rule](plan)
    with pytest.raises(StateError, match=rule):
        check(stats)


def test_pages_copied_early_are_in_order():
    plan = ForkPlan(make(size="1MiB", folio="16KiB", pinned=0.2))
    check = bench.ForkCheck(plan)
    stats = plan.run()
    assert stats.copied_pages
    check(stats)
    row, slot = np.argwhere((plan.child.entries ^ plan.mm.entries) >> np.uint64(12) << np.uint64(25) != 0)[0]
    plan.mm.folios.page(int(plan.child.entries[row, slot]) >> 12 & (1 << 40) - 1).mapcount = 2
    with pytest.raises(StateError, match="mapcounts"):
        check(stats)


def test_a_wrong_peer_is_noticed():
    lazy = bench.Peer("lazy", "single", lambda state: None)
    mm = make(size="1MiB")
    (case,) = bench.peer_cases([lazy], mm, bench.LATEST)
    with pytest.raises(StateError, match="lazy"):
        bench.measure([case], 1)


def test_a_wrong_limit_is_noticed(monkeypatch):
    monkeypatch.setattr(bench, "_measure", types.SimpleNamespace(**{**vars(_measure), "py_stream": lambda *args: None}))
    mm = make(size="1MiB")
    with pytest.raises(StateError, match="streaming"):
        bench.measure(bench.limit_cases(mm.entries.reshape(-1)[:256], mm.layout), 1)


def test_measuring_leaves_memory_as_it_was():
    mm = make(size="1MiB", folio="64KiB")
    entries, folios = mm.entries.copy(), mm.folios.copy()
    cases = [*bench.peer_cases([bench.NAIVE], mm, bench.LATEST), *bench.memory_cases(mm, bench.LATEST)]
    bench.measure(cases, 1)
    for case in cases:
        case.reset()
    assert (mm.entries == entries).all()
    assert mm.folios == folios


def test_the_longest_present_run_of_private_anonymous_memory():
    mm: Mm = make(size="1MiB")
    start = mm.vmas[0].start
    mm.entries.reshape(-1)[:256][[100, 110, 255]] = 0
    assert bench._plain_area(mm, 1 << 30) == (start + (111 << 12), start + (255 << 12))
    assert bench._plain_area(mm, 8192) == (start + (111 << 12), start + (113 << 12))
    assert bench._plain_area(make(size="1MiB", vma="shmem"), 1 << 30) is None


# --- the streaming limit ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", _measure.STREAM_VARIANTS)
@pytest.mark.parametrize("level", _measure.SIMD_LEVELS)
def test_streaming_is_exact_at_any_length_and_alignment(level, variant):
    if level not in _measure.supported():
        with pytest.raises(ValueError, match=level):
            _measure.py_stream(np.zeros(1, np.uint64), np.zeros(1, np.uint64), 0, 0, level, variant)
        pytest.skip(f"this CPU has no {level}")
    values = np.random.default_rng(1).integers(0, 1 << 64, 200, dtype=np.uint64)
    for n in (0, 1, 7, 8, 9, 33, 150):
        for src_at, dst_at in ((0, 0), (1, 0), (0, 1), (3, 5)):
            src, dst = values.copy(), np.full(200, 99, np.uint64)
            _measure.py_stream(src[src_at : src_at + n], dst[dst_at : dst_at + n], 2, 32, level, variant)
            assert (src[src_at : src_at + n] == values[src_at : src_at + n] & ~np.uint64(2)).all()
            assert (dst[dst_at : dst_at + n] == values[src_at : src_at + n] & ~np.uint64(34)).all()
            assert (np.delete(src, slice(src_at, src_at + n)) == np.delete(values, slice(src_at, src_at + n))).all()
            assert (np.delete(dst, slice(dst_at, dst_at + n)) == 99).all()


@pytest.mark.parametrize("variant", ["plain", "prefetch"])
@pytest.mark.parametrize("level", _measure.supported())
def test_streaming_over_one_table_is_exact_at_any_length_and_alignment(level, variant):
    values = np.random.default_rng(2).integers(0, 1 << 64, 200, dtype=np.uint64)
    for n in (0, 1, 7, 8, 9, 33, 150):
        for at in (0, 1, 3):
            src = values.copy()
            _measure.py_stream_clear(src[at : at + n], 0xFF, level, variant)
            assert (src[at : at + n] == values[at : at + n] & ~np.uint64(0xFF)).all()
            assert (np.delete(src, slice(at, at + n)) == np.delete(values, slice(at, at + n))).all()
    with pytest.raises(ValueError, match="non-temporal"):
        _measure.py_stream_clear(values, 0, level, "non-temporal")


def test_streaming_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="length"):
        _measure.py_stream(np.zeros(2, np.uint64), np.zeros(1, np.uint64), 0, 0, "scalar", "plain")
    with pytest.raises(KeyError):
        _measure.py_stream(np.zeros(1, np.uint64), np.zeros(1, np.uint64), 0, 0, "mmx", "plain")


def test_the_simd_level_can_be_forced(monkeypatch):
    monkeypatch.setenv("PTEBATCH_SIMD", "scalar")
    mm = make(size="1MiB")
    cases = bench.limit_cases(mm.entries.reshape(-1)[:256], mm.layout)
    assert {case.row["simd"] for case in cases} == {"scalar"}
    bench.measure(cases, 1)
    monkeypatch.setenv("PTEBATCH_SIMD", "auto")
    assert bench.simd_level() == _measure.supported()[-1]
    monkeypatch.setenv("PTEBATCH_SIMD", "sse9")
    with pytest.raises(ArgumentError, match="PTEBATCH_SIMD=sse9"):
        bench.simd_level()
