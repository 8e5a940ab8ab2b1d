"""Measuring: right work, right bookkeeping, results checked. No test looks at a time."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from ptebatch import _measure, arch, batch, bench, live
from ptebatch.errors import ArgumentError, PermissionDeniedError, StateError
from ptebatch.fork import ForkPlan
from ptebatch.mm import Mm
from ptebatch.workload import make

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


def test_a_peer_on_part_of_a_folio():
    """What is copied of a folio outside the area is no work of the peer's."""
    mm = make(size="4MiB", folio="2MiB")
    start = mm.vmas[0].start
    for area in ((start, start + (1 << 20)), (start + (1 << 20), start + (3 << 20))):
        (case,) = bench.peer_cases([bench.NAIVE], mm, bench.LATEST, area)
        case.reset()
        case.check(case.run())
        assert case.ptes == (area[1] - area[0]) // 4096


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
    plain = [row for row in done["rows"] if not {"level", "threads"} & set(row)]
    targets = {(row["source"], row["order"], row["path"]): (row["must"], row["aim"]) for row in plain}
    assert targets["core", 0, "single"] == targets["core", 0, "batched"] == (11, 8)
    assert targets["core", 4, "single"] == (None, None)  # what is not batched is not to reach what batching does
    assert targets["core", 4, "batched"] == (3, 2.2)
    by = {(row["source"], row["order"], row["path"]): row for row in plain}
    naive, core = by["naive", 4, "single"], by["core", 4, "batched"]
    assert naive["x_core"] == pytest.approx(naive["ns_per_pte"] / core["ns_per_pte"])
    assert naive["x_core_call"] == pytest.approx(naive["call_ns_per_pte"] / core["call_ns_per_pte"])
    assert naive["must_x_core"] is None  # has one at 1 GiB only
    assert [step for step, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}
    assert json.loads(json.dumps(done)) == done


def test_limit_measures_mixed_folios_and_every_order_by_default():
    done = bench.run_limit(size=16 << 20, rounds=1)
    assert [note for note in done["notes"] if "threads" not in note] == []  # there may be one CPU
    rows = done["rows"]
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
    kernels = core[-len(bench.OTHER_KERNELS) :]
    assert [row["semantics"] for row in kernels] == list(bench.OTHER_KERNELS)
    assert [row["path"] for row in kernels] == ["single"] * 2 + ["batched"] * (len(kernels) - 2)
    write, stream = (row for row in rows if row.get("operation") == "wrprotect_range")
    assert (write["source"], stream["source"], write["ptes"]) == ("core", "limit", 2048)
    assert write["x_limit"] == pytest.approx(write["ns_per_pte"] / stream["ns_per_pte"])


@pytest.fixture
def little(monkeypatch) -> int:
    """Bytes of memory that take the place of 1 GiB."""
    monkeypatch.setattr(bench, "GIB", 16 << 20)
    monkeypatch.setattr(bench, "TARGETS", {(16 << 20, order): (11, 8) for order in bench.TARGET_ORDERS})
    monkeypatch.setattr(bench, "SPEEDUP_MUST", {16 << 20: 0.98})
    monkeypatch.setattr(bench, "NAIVE_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "_not_plain", lambda *args: [])  # has a test of its own
    return 16 << 20


def test_every_figure_that_has_a_target_is_measured(little):
    done = bench.run_limit(size=little, rounds=1)
    found: dict[str, list[dict]] = {}
    for row in done["rows"]:
        kind = "level" if "level" in row else "threads" if "threads" in row else f"{row['source']} {row['path']}"
        found.setdefault(kind, []).append(row)
    orders = {kind: [row["order"] for row in some] for kind, some in found.items()}
    every = [*range(10), "mixed"]
    assert all(orders[kind] == every for kind in ("core single", "core batched", "limit limit", "pool pool"))
    for kind in ("naive single", "numpy single", "numpy batched", "c single", "c batched"):
        assert orders[kind] == list(bench.TARGET_ORDERS)
    assert [row["must_x_core"] for row in found["naive single"]] == [100, 200, 400, 400]
    assert [row["must_x_core"] for row in found["numpy batched"]] == [6, 10, 20, 18]
    assert [row["must_x_core"] for row in found["c single"]] == [None] * 4
    if "numba single" in found:
        assert [row["must_x_core"] for row in found["numba single"]] == [2.8, 4.5, 8, 5]
    else:
        assert any("Numba" in note for note in done["notes"])

    batched = {row["order"]: row for row in found["core batched"]}
    assert [order for order, row in batched.items() if row["must"] == 11] == list(bench.TARGET_ORDERS)
    assert {row["must"] for row in batched.values()} == {11, None}
    assert [order for order, row in batched.items() if "x_single" in row] == [0]
    single, both = found["core single"][0]["ns_per_pte"], batched[0]["ns_per_pte"]
    assert (batched[0]["x_single"], batched[0]["must_x_single"]) == (pytest.approx(both / single), 1.02)
    assert [order for order, row in batched.items() if "metadata_bytes_per_page" in row] == [0]
    assert batched[0]["metadata_bytes_per_page"] == batched[0]["must_metadata_bytes_per_page"] == 16
    assert 0 < batched[0]["index_bytes_per_page"] < 20

    if batch.cpus() > 1:
        assert orders["threads"] == [0, 2, 4, 9, "mixed"]
        for row in found["threads"]:
            assert (row["threads"], row["source"], row["path"], row["must"]) == (2, "core", "batched", None)
            assert row["speedup"] == pytest.approx(batched[row["order"]]["ns_per_pte"] / row["ns_per_pte"])
            assert row["must_speedup"] == (None if row["order"] == "mixed" else 0.98)

    have = _measure.supported()
    levels = have[: have.index(bench.simd_level())] if bench.simd_level() in have else ()
    for level in levels:
        assert [row["order"] for row in found["level"] if row["level"] == level] == list(bench.TARGET_ORDERS)
    for row in found.get("level", ()):
        core = batched[row["order"]]["ns_per_pte"]
        c = min(one["ns_per_pte"] for path in ("single", "batched") for one in found[f"c {path}"]
                if one["order"] == row["order"])  # fmt: skip
        if row["level"] == "scalar":
            assert (row["x_c"], row["must_x_c"]) == (pytest.approx(row["ns_per_pte"] / c), 1)
        elif bench.simd_level() == "avx512":
            assert (row["x_avx512"], row["must_x_avx512"]) == (pytest.approx(row["ns_per_pte"] / core), 1.5)
    assert len({tuple(row.get(key) for key in bench.KEYS) for row in done["rows"]}) == len(done["rows"])


def test_a_lower_level_is_the_one_that_runs(monkeypatch):
    mm = make(size="1MiB")
    case = bench._level_case(mm, bench.LATEST, "scalar")
    seen = []
    monkeypatch.setattr(bench.ForkPlan, "run", lambda plan: seen.append(batch.simd_level))
    case = bench._level_case(mm, bench.LATEST, "scalar")
    before = batch.simd_level
    case.run()
    assert (seen, batch.simd_level) == ([batch._level("scalar")], before)
    monkeypatch.setattr(bench.ForkPlan, "run", lambda plan: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        bench._level_case(mm, bench.LATEST, "scalar").run()
    assert batch.simd_level == before


def test_what_cannot_be_measured_is_said(little, monkeypatch):
    monkeypatch.setattr(batch, "cpus", lambda: 1)
    monkeypatch.setattr(bench, "available", lambda: (bench.NAIVE,))
    monkeypatch.setattr(bench, "simd_level", lambda: "scalar")
    done = bench.run_limit(size=little, folios=(4096,), rounds=1)
    assert [re.findall("Numba|AVX2|threads", note)[:1] for note in done["notes"]] == [["Numba"], ["AVX2"], ["threads"]]


def test_all_rights_are_taken_away_and_the_pages_stay():
    mm = bench._prot_none(make(size="1MiB", folio="64KiB"))
    before = make(size="1MiB", folio="64KiB")
    for old, new in zip(before.entries.reshape(-1)[:256].tolist(), mm.entries.reshape(-1)[:256].tolist(), strict=True):
        assert arch.pte_protnone(mm.layout, new) and arch.pte_pfn(mm.layout, new) == arch.pte_pfn(mm.layout, old)
        assert new == arch.pte_modify(mm.layout, old, arch.vm_get_page_prot(mm.layout, mm.vmas[0].vm_flags))
    bench.measure([bench.core_case(ForkPlan(mm, keep=True))], 1)


def test_more_than_64_gib_is_restored_in_place(monkeypatch):
    monkeypatch.setattr(bench, "GIB", 64 << 10)
    monkeypatch.setattr(bench, "HUGE_RSS", 1 << 60)  # sanitizers reserve address space
    seen: list[tuple[int, int]] = []
    done = bench.run_limit(size=8 << 20, rounds=2, progress=lambda *step: seen.append(step))
    assert seen == [(n, 6) for n in range(1, 7)]
    by = {(row["size_bytes"], row["source"]): row for row in done["rows"]}
    sources = ("core", "limit", "pool")
    assert set(by) == {(size, source) for size in (4 << 20, 8 << 20) for source in sources}
    small, large = by[4 << 20, "core"], by[8 << 20, "core"]
    assert (small["ptes"], large["ptes"], large["rounds"]) == (1024, 2048, 2)
    assert large["x_64gib"] == pytest.approx(large["ns_per_pte"] / small["ns_per_pte"])
    assert (large["must_x_64gib"], large["must_peak_rss_bytes"]) == (1.3, 1 << 60)
    assert large["peak_rss_bytes"] > 10 << 20
    with pytest.raises(ArgumentError, match="64KiB only"):
        bench.run_limit(size=8 << 20, folios=(4096,))


def test_the_bound_on_memory_is_taken_back():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with bench._address_space(1 << 50):
        within = resource.getrlimit(resource.RLIMIT_AS)
    assert 0 < within[0] <= 1 << 50
    with pytest.raises(StateError), bench._address_space(1 << 50):
        raise StateError
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda plan: spoil_child(plan, plan.mm.layout.young),
        lambda plan: plan.child.entries[1].fill(0),
        lambda plan: plan.mm.entries[0].__setitem__(3, plan.mm.entries[0, 3] | np.uint64(plan.mm.layout.write)),
        lambda plan: plan.child.rss.fill(0),
        lambda plan: setattr(plan.mm.folios.page(int(plan.mm.folios.heads()[3]) + 1), "mapcount", 1),
        lambda plan: setattr(plan.mm.folios.page(int(plan.mm.folios.heads()[3])), "anon_exclusive", True),
        lambda plan: setattr(plan.mm.folios.folio(int(plan.mm.folios.heads()[3])), "refcount", 16),
        lambda plan: plan.child.vpns.__setitem__(1, 0),
    ],
)
def test_a_wrong_fork_of_much_memory_is_noticed(spoil):
    plan = ForkPlan(make(size="4MiB", folio="64KiB"))
    check = bench.InPlaceCheck(plan)
    stats = plan.run()
    check(stats)
    spoil(plan)
    with pytest.raises(StateError, match="went wrong"):
        check(stats)


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
def fake(name: str, log: list[tuple[str, str]], ptes: int = 4) -> bench.Case:
    def step(what: str):
        return lambda *result: log.append((name, what))

    return bench.Case({"source": name, "path": "single"}, ptes, step("reset"), step("run"), step("check"))


def test_every_run_is_fresh_results_are_checked_once_and_cases_take_turns():
    log: list[tuple[str, str]] = []
    cases = [fake(name, log, bench.RESETS_PTES + 1) for name in "abc"]
    rounds: list[int] = []
    bench.measure(cases, 3, lambda: rounds.append(len(log)))
    assert [what for _, what in log[:9]] == ["reset", "run", "check"] * 3
    assert [what for _, what in log[9:]] == ["reset", "run"] * 9
    firsts = [log[at][0] for at in (9, 15, 21)]
    assert sorted(firsts) == ["a", "b", "c"]
    assert [name for name, what in log[9:] if what == "run"] == ["a", "b", "c", "b", "a", "c", "c", "a", "b"]
    assert len(rounds) == 4
    assert [len(case.times_ns) for case in cases] == [3, 3, 3]

def test_a_small_case_is_reset_until_the_cache_keeps_it():
    log: list[tuple[str, str]] = []
    bench.measure([fake("small", log, bench.RESETS_PTES)], 2)
    resets = ["reset"] * bench.RESETS
    assert [what for _, what in log] == [*resets, "run", "check", *resets, "run", *resets, "run"]



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


def test_memory_that_is_only_reserved_costs_none():
    mm: Mm = make(size="1MiB")
    (vma,) = mm.vmas
    table, far = 512 << 12, (vma.start & -512 << 12) + (1 << 42)
    vma.end += 1 << 43  # 16 GiB of entries
    mm.add_tables(far, far + 3 * table)
    mm.set_pte(far + table, int(mm.entries.flat[0]))
    first = vma.start & -table
    assert list(mm.covered(vma.start, vma.end)) == [(vma.start, first + table), (far, far + 3 * table)]
    assert len(bench._present(mm, vma.start, vma.end)) == 257
    assert bench._plain_area(mm, 1 << 30) == (vma.start, vma.start + (1 << 20))
    rng = np.random.default_rng(1)
    for base in (vma.start, far):
        for start, end in np.sort(rng.integers(-1100, 2200, (50, 2))).tolist():
            start, end = max(0, base + (start << 12)), base + (end << 12)
            areas = list(mm.covered(start, end))
            expected = [entry for area in areas for entry in mm.ptes(*area).tolist()]
            assert mm.entries_of(start, end).tolist() == expected
            missing = ((end - start) >> 12) - len(expected)
            assert sorted([*expected, *[0] * missing]) == sorted(mm.ptes(start, end).tolist())


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
