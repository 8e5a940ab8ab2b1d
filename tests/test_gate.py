"""The gate: what it compares, and what it makes of the comparison."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from ptebatch import _core, cli, gate, gate_worker
from ptebatch.errors import ArgumentError, PtebatchError, StateError
from ptebatch.gate_worker import Case

COMMITTED = Path(__file__).resolve().parent.parent / gate.BASELINES
CASE = "fork batched v6.18 size=1MiB,folio=64KiB"
OTHER = "wrprotect single v6.18 size=1MiB,folio=4KiB"


@pytest.fixture
def baselines(tmp_path: Path) -> Path:
    gate.write_baselines("a test", ["counts"], baselines=tmp_path, cases=[CASE, OTHER])
    return tmp_path


def edit(baselines: Path, level: str, change) -> None:
    path = baselines / f"gate-{level}.json"
    document = json.loads(path.read_text())
    change(document["baselines"])
    path.write_text(json.dumps(document))


def level(status: str, name: str = "counts", **more) -> dict:
    return gate.Level(1, name, status, f"it is {status}", **more).to_dict()


def run(*args: object, code: int = 0):
    result = CliRunner().invoke(cli.app, ["gate", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


# --- cases ------------------------------------------------------------------------------------------------------------
def test_the_text_of_a_case_is_read_back():
    assert str(Case.parse(CASE)) == CASE


@pytest.mark.parametrize(
    "text",
    ["fork batched v6.18", "knife batched v6.18 size=1MiB", "fork both v6.18 size=1MiB", "fork single v5.0 size=1MiB",
     "fork single v6.18 size=1MB"],
)  # fmt: skip
def test_a_case_that_does_not_exist_is_refused(text):
    with pytest.raises(PtebatchError):
        Case.parse(text)


def test_the_cases_of_every_level_exist_and_differ():
    for cases in (gate.CASES["counts"], gate.CASES["instructions"], gate.FULL.cases, gate.FAST.cases):
        assert [str(Case.parse(case)) for case in cases] == list(dict.fromkeys(cases))


@pytest.mark.parametrize("operation", gate_worker.OPERATIONS)
@pytest.mark.parametrize("path", gate_worker.PATHS)
def test_a_case_does_the_same_again_after_a_reset(operation, path):
    prepared = gate_worker.prepare(Case(operation, path, "v6.18", "size=1MiB,folio=4KiB+64KiB,clean=0.3"))

    def once():
        (stats,) = prepared.run()
        return stats.to_dict(), [mm.entries.tobytes() for mm in prepared.mms], prepared.mms[0].folios.copy()

    first = once()
    prepared.reset()
    assert once() == first


def test_counts_tell_the_paths_apart_and_show_what_is_left_behind():
    single, batched = (
        gate_worker.counts(Case("fork", path, "v6.18", "size=1MiB,folio=64KiB")) for path in gate_worker.PATHS
    )
    assert (single["folio_ref_add"], batched["folio_ref_add"]) == (256, 16)
    assert batched["batch_hist[16]"] == 16
    left = {name: n for name, n in single.items() if name.startswith("left_")}
    assert left == {name: n for name, n in batched.items() if name.startswith("left_")}
    assert left["left_refcounts"] == left["left_mapcounts"] == left["left_rss"] == 512


def test_a_case_may_be_made_slower():
    took = []

    def run():
        begin = time.perf_counter_ns()
        while time.perf_counter_ns() - begin < 100_000:
            pass
        took.append(time.perf_counter_ns() - begin)
        return []

    case = gate_worker.Prepared(run, lambda: None, ())
    found = gate_worker._times({"as it is": (case, 0.0)}, 2)
    assert found["as it is"] >= min(took)
    took.clear()
    assert gate_worker._times({"slower": (case, 0.5)}, 2)["slower"] >= 1.5 * min(took)


# --- level 1 ----------------------------------------------------------------------------------------------------------
def test_the_committed_counts_are_those_of_the_default_cases_and_more():
    committed = json.loads((COMMITTED / "gate-counts.json").read_text())["baselines"][""]
    assert set(gate.CASES["counts"]) <= set(committed["cases"])
    assert committed["reason"]


def test_equal_counts_pass(baselines):
    found = gate.check_counts(baselines)
    assert (found.status, found.findings) == ("pass", [])


def test_a_count_that_moved_fails_and_is_named(baselines):
    edit(baselines, "counts", lambda known: known[""]["cases"][CASE].update(folio_ref_add=15))
    found = gate.check_counts(baselines)
    assert found.status == "fail"
    assert found.findings == [{"case": CASE, "what": "folio_ref_add 15 -> 16 (+1)"}]


def test_a_reference_too_many_is_seen_though_no_counter_counts_it(baselines, monkeypatch):
    fork = gate_worker.OPERATIONS["fork"]

    def careless(*args):
        prepared = fork(*args)

        def run():
            done = prepared.run()
            folios = prepared.mms[0].folios
            for head in folios.heads().tolist():
                folios.folio(head).refcount += 1
            return done

        return gate_worker.Prepared(run, prepared.reset, prepared.mms)

    monkeypatch.setitem(gate_worker.OPERATIONS, "fork", careless)
    (finding,) = gate.check_counts(baselines).findings
    assert finding == {"case": CASE, "what": "left_refcounts 512 -> 528 (+16)"}


def test_without_a_file_the_counts_are_inconclusive(tmp_path):
    found = gate.check_counts(tmp_path)
    assert found.status == "inconclusive"
    assert "gate-counts.json" in found.summary


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 99, "baselines": {}}'])
def test_a_file_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "gate-counts.json").write_text(text)
    with pytest.raises(StateError, match=r"gate-counts\.json"):
        gate.check_counts(tmp_path)


# --- level 2 ----------------------------------------------------------------------------------------------------------
ENV = {"compiler": "gcc 12.2", "flags": "-Wall -Werror -O3", "cython": "3.1.0"}


@pytest.mark.parametrize(
    "change", [{"compiler": "gcc 13"}, {"flags": "-O2"}, {"cython": "3.1.1"}, {"flags": "-Wall -O3 -march=native"}]
)
def test_the_key_of_instructions_changes_with_what_decides_them(change):
    assert gate.instructions_key(ENV | change, "avx2") != gate.instructions_key(ENV, "avx2")
    assert gate.instructions_key(ENV, "scalar") != gate.instructions_key(ENV, "avx2")


def test_warnings_are_no_part_of_the_key():
    assert gate.instructions_key(ENV | {"flags": "-O3"}, "avx2") == gate.instructions_key(ENV, "avx2")


def test_callgrind_output_without_a_total_is_an_error():
    assert gate.parse_callgrind("events: Ir\nsummary: 1234\n\ntotals: 1234\n") == 1234
    with pytest.raises(StateError, match="no total"):
        gate.parse_callgrind("events: Ir\n")


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Instructions are not counted but made up: a dict to change."""
    counted = dict.fromkeys(gate.CASES["instructions"], 1000)
    monkeypatch.setattr(gate, "count_instructions", lambda cases, simd: dict(counted))
    monkeypatch.setattr(gate, "_unfit", lambda **_: None)
    gate.write_baselines("a test", ["instructions"], baselines=tmp_path)
    return counted


@pytest.mark.parametrize(("n", "status"), [(1000, "pass"), (1020, "pass"), (1021, "fail"), (900, "pass")])
def test_instructions_may_grow_by_two_percent(counted, tmp_path, n, status):
    name = next(iter(counted))
    counted[name] = n
    found = gate.check_instructions(tmp_path)
    assert found.status == status
    assert {finding["case"] for finding in found.findings} == ({name} if status == "fail" else set())
    assert any("AVX-512 is not covered" in note for note in found.notes)


def test_another_compiler_has_no_baseline(counted, tmp_path, monkeypatch):
    environment = gate.bench.environment()
    monkeypatch.setattr(gate.bench, "environment", lambda: environment | {"compiler": "another 1.0"})
    found = gate.check_instructions(tmp_path)
    assert found.status == "inconclusive"
    assert "another 1.0" in found.summary
    gate.write_baselines("another compiler", ["instructions"], baselines=tmp_path)
    assert gate.check_instructions(tmp_path).status == "pass"
    known = json.loads((tmp_path / "gate-instructions.json").read_text())["baselines"]
    levels = gate._levels_under_valgrind()
    reasons = [baseline["reason"] for baseline in known.values()]
    assert reasons == ["another compiler"] * len(levels) + ["a test"] * len(levels)  # the first ones stay


def test_without_valgrind_instructions_are_inconclusive(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = gate.check_instructions(tmp_path)
    assert found.status == "inconclusive"
    (note,) = gate.write_baselines("a test", ["instructions"], baselines=tmp_path)
    assert found.summary in note
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(gate._unfit(valgrind=True) is not None, reason=str(gate._unfit(valgrind=True)))
def test_callgrind_sees_the_walk_and_little_else():
    sizes = [CASE, CASE.replace("1MiB", "2MiB"), CASE.replace("1MiB", "3MiB")]
    first, second, third = gate.count_instructions(sizes, "scalar").values()
    assert first > second - first > 256  # at least one instruction for each of 256 entries
    assert third - second == pytest.approx(second - first, rel=0.1)  # in proportion to the entries


# --- baselines --------------------------------------------------------------------------------------------------------
def test_a_baseline_needs_a_reason(tmp_path):
    with pytest.raises(ArgumentError, match="reason"):
        gate.write_baselines(" ", baselines=tmp_path)
    run("baseline", "--baselines", tmp_path, code=2)
    assert not list(tmp_path.iterdir())


def test_a_baseline_that_would_say_the_same_stays(baselines):
    before = (baselines / "gate-counts.json").read_text()
    assert gate.write_baselines("again", ["counts"], baselines=baselines) == ["counts: nothing changed"]
    assert (baselines / "gate-counts.json").read_text() == before


def test_a_case_is_added_to_those_there_are(baselines):
    third = CASE.replace("64KiB", "16KiB")
    gate.write_baselines("one more", ["counts"], baselines=baselines, cases=[third])
    known = json.loads((baselines / "gate-counts.json").read_text())["baselines"][""]
    assert list(known["cases"]) == [CASE, OTHER, third]
    assert known["reason"] == "one more"


# --- results ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("statuses", "require", "code"),
    [
        ([], [], 0),
        (["pass", "inconclusive"], [], 0),
        (["pass", "inconclusive"], ["counts"], 0),
        (["pass", "inconclusive"], ["instructions"], 2),
        (["pass"], ["instructions"], 2),
        (["fail", "inconclusive"], ["instructions"], 1),
    ],
)
def test_exit_codes(statuses, require, code):
    levels = [level(status, name) for status, name in zip(statuses, gate.LEVELS, strict=False)]
    assert gate.exit_code({"levels": levels}, require) == code


def test_junit_says_what_failed_and_what_is_not_known():
    findings = [{"case": "a & b", "what": "1 < 2"}]
    levels = [level("pass"), level("fail", "instructions", findings=findings), level("inconclusive", "time")]
    suite = ElementTree.fromstring(gate.junit({"levels": levels}).partition("\n")[2])
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    assert [[child.tag for child in case] for case in suite] == [
        ["system-out"],
        ["failure", "system-out"],
        ["skipped", "system-out"],
    ]
    assert suite[1][0].text == "a & b: 1 < 2"


def test_annotations_keep_to_one_line_each():
    findings = [{"case": "x", "what": "100 %"}]
    lines = gate.github_annotations(
        {"levels": [level("pass"), level("fail", findings=findings), level("inconclusive")]}
    )
    assert lines == [
        "::error title=ptebatch gate, counts::it is fail%0Ax: 100 %25",
        "::warning title=ptebatch gate, counts::it is inconclusive",
    ]


def test_the_command_reports_and_exits(baselines, monkeypatch):
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    only = ("--level", "counts", "--baselines", baselines)
    assert "pass" in run(*only).stdout
    edit(baselines, "counts", lambda known: known[""]["cases"][CASE].pop("batches"))
    result = run(*only, "--json", "--junit", baselines / "gate.xml", "--annotations", code=1)
    document = json.loads(result.stdout)
    assert document["exit_code"] == 1
    assert document["levels"][0]["findings"] == [{"case": CASE, "what": "batches 0 -> 16 (+16)"}]
    assert result.stderr.startswith("::error ")
    assert ElementTree.parse(baselines / "gate.xml").getroot().get("failures") == "1"
    assert "batches 0 -> 16 (+16)" in run(*only, code=1).stdout


def test_a_level_that_must_be_known_and_is_not(tmp_path):
    only = ("--level", "counts", "--baselines", tmp_path)
    assert "inconclusive" in run(*only).stdout
    run(*only, "--require", "counts", code=2)


def test_the_base_is_passed_on(monkeypatch):
    monkeypatch.setattr(gate, "check_time", lambda base, progress: gate.Level(3, "time", "pass", f"against {base}"))
    assert "against HEAD~2" in run("--level", "time", "--base", "HEAD~2").stdout


@pytest.mark.parametrize("option", ["--level", "--require"])
def test_a_level_that_does_not_exist_is_a_usage_error(option):
    assert "no level" in run(option, "vibes", code=2).stderr


def test_baseline_on_the_command_line(tmp_path):
    result = run("baseline", "--reason", "a test", "--level", "counts", "--case", CASE, "--baselines", tmp_path)
    assert "gate-counts.json" in result.stdout
    run("--level", "counts", "--baselines", tmp_path, "--require", "counts")


# --- level 3 ----------------------------------------------------------------------------------------------------------
def synthetic(seed: int, *, slower: float = 0.0, n: int = 24, noise: float = 0.02, spikes: float = 0.1) -> list[float]:
    """Times as they are measured: a little noise, and some processes that took half as long again."""
    random = np.random.default_rng(seed)
    times = 1e6 * (1 + slower) * (1 + noise * random.standard_normal(n))
    return list(np.where(random.random(n) < spikes, 1.5 * times, times))


def measured(slower: dict[str, float], seeds, **more):
    """A `measure` for `slow_downs`, and what it was asked for."""
    asked: list[list[str]] = []

    def measure(cases):
        asked.append(list(cases))
        return {
            name: (synthetic(next(seeds), **more), synthetic(next(seeds), slower=slower[name], **more))
            for name in cases
        }

    return measure, asked


def test_nothing_changed_is_rarely_called_slower_and_ten_percent_nearly_always():
    seeds = itertools.count()
    alarms = sum(gate.compare_times(synthetic(next(seeds)), synthetic(next(seeds)))["slower"] for _ in range(100))
    found = sum(
        gate.compare_times(synthetic(next(seeds)), synthetic(next(seeds), slower=0.1))["slower"] for _ in range(100)
    )
    assert alarms == 0
    assert found >= 98


@pytest.mark.parametrize(("slower", "called"), [(0.03, False), (0.045, False), (0.06, True), (-0.2, False)])
def test_a_slow_down_must_pass_the_ratio_floor(slower, called):
    base = [1e6 + n for n in range(24)]
    result = gate.compare_times(base, [took * (1 + slower) for took in base])
    assert result["slower"] is called
    assert result["ratio"] == pytest.approx(1 + slower)
    assert (result["p"] < gate.P_VALUE) is (slower > 0)


def test_a_slow_down_must_pass_the_absolute_floor():
    base = [1000.0 + n for n in range(24)]
    assert not gate.compare_times(base, [1.5 * took for took in base])["slower"]
    assert gate.compare_times([10 * took for took in base], [15 * took for took in base])["slower"]


def test_a_slow_down_must_be_ranked_significant():
    base = [1e6, 2e6] * 12
    head = [1.2e6, 2e6] * 12  # half of the processes say nothing
    result = gate.compare_times(base, head)
    assert result["p"] > gate.P_VALUE
    assert not result["slower"]


def test_only_what_looks_slower_is_measured_again():
    measure, asked = measured({"a": 0.0, "b": 0.2}, itertools.count())
    found = gate.slow_downs(measure, ["a", "b"])
    assert asked == [["a", "b"], ["b"]]
    assert (found["a"]["confirmed"], found["b"]["confirmed"]) == (False, True)
    assert found["a"]["visible"]


def test_nothing_is_measured_again_for_nothing():
    measure, asked = measured({"a": 0.0}, itertools.count())
    gate.slow_downs(measure, ["a"])
    assert asked == [["a"]]


def test_what_is_slower_only_once_is_no_slow_down():
    slower = iter([0.2, 0.0])

    def measure(cases):
        more = next(slower)
        return {name: (synthetic(1), synthetic(2, slower=more)) for name in cases}

    found = gate.slow_downs(measure, ["a"])
    assert (found["a"]["slower"], found["a"]["confirmed"]) == (True, False)
    judged = gate.judge_time("main", found, {})
    assert judged.status == "pass"
    assert "the first time, not the second" in judged.notes[0]


def test_noise_that_would_hide_ten_percent_is_inconclusive():
    measure, _ = measured({"a": 0.0}, itertools.count(), noise=0.4)
    judged = gate.judge_time("main", gate.slow_downs(measure, ["a"]), {})
    assert judged.status == "inconclusive"


def test_a_slow_down_fails_and_says_by_how_much():
    measure, _ = measured({"a": 0.2, "b": 0.0}, itertools.count())
    judged = gate.judge_time("main", gate.slow_downs(measure, ["a", "b"]), {"c": "ImportError: zap"})
    assert judged.status == "fail"
    (finding,) = judged.findings
    assert finding["case"] == "a"
    assert finding["ratio"] == pytest.approx(1.2, abs=0.05)
    assert judged.notes == ["the base cannot run c: ImportError: zap"]


TINY = gate.Profile((CASE, OTHER), interpreters=2, processes=2, rounds=2, runs=1)


def test_both_sides_take_the_same_number_of_turns():
    ticks = []
    times, missing = gate.take_turns(gate.Side(), gate.Side(), TINY, TINY.cases, lambda *tick: ticks.append(tick))
    assert missing == {}
    assert {name: [len(side) for side in pair] for name, pair in times.items()} == {name: [4, 4] for name in TINY.cases}
    assert all(took > 0 for pair in times.values() for side in pair for took in side)
    assert ticks[-1] == (6, 6)


def test_a_machine_that_slows_down_meanwhile_is_taken_out():
    random = np.random.default_rng(1)
    machine = np.exp(0.3 * random.standard_normal((3, 40, 1, 1)))  # of each round, up to twice as slow
    times = 1e6 * machine * (1 + 0.02 * random.standard_normal((3, 40, 2, 8)))
    times[:, :, 1] *= 1.1
    times[1, 7, 1, 3] *= 50  # somebody else had the CPU
    base, head = gate._levelled(list(times))
    assert (len(base), len(head)) == (24, 24)
    assert np.std(base) / np.mean(base) < 0.01
    assert np.divide(head, base) == pytest.approx(1.1, abs=0.03)
    assert gate.compare_times(base, head)["slower"]


@pytest.mark.parametrize("operation", gate_worker.OPERATIONS)
def test_where_memory_lies_changes_no_result(operation):
    case = Case(operation, "batched", "v6.18", "size=1MiB,folio=4KiB+64KiB,clean=0.3")
    plain, scattered = gate_worker.prepare(case), [gate_worker.prepare(case, scatter=True) for _ in range(4)]
    expected = plain.run()
    for prepared in scattered:
        assert prepared.run() == expected
        for one, other in zip(plain.mms, prepared.mms, strict=True):
            assert np.array_equal(one.entries, other.entries)
        assert prepared.mms[0].folios == plain.mms[0].folios
    assert len({prepared.mms[0].entries.ctypes.data % 4096 for prepared in scattered}) > 1


def test_what_callgrind_counts_is_every_level_it_can_run():
    have = [name for name in gate.CALLGRIND_LEVELS if name in _core.SIMD_SUPPORTED]
    assert list(gate._levels_under_valgrind()) == have
    assert "scalar" in have


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A copy of the package that cannot write-protect."""
    shutil.copytree(Path(gate.__file__).parent, tmp_path / "ptebatch")
    protect = tmp_path / "ptebatch" / "protect.py"
    protect.write_text(protect.read_text().replace("def wrprotect_range", "def another"))
    return tmp_path


def test_a_base_that_lacks_a_function_is_compared_in_the_rest(older):
    times, missing = gate.take_turns(gate.Side(older), gate.Side(), TINY, TINY.cases)
    assert list(times) == [CASE]
    assert list(missing) == [OTHER]
    assert "wrprotect_range" in missing[OTHER]


def test_a_head_that_lacks_a_function_is_an_error(older):
    with pytest.raises(StateError, match="wrprotect_range"):
        gate.take_turns(gate.Side(), gate.Side(older), TINY, TINY.cases)


def test_a_worker_that_dies_says_why(tmp_path):
    (tmp_path / "ptebatch").mkdir()
    (tmp_path / "ptebatch" / "__init__.py").write_text("raise SystemExit('no such luck')")
    with pytest.raises(StateError, match="no such luck"):
        gate.take_turns(gate.Side(tmp_path), gate.Side(), TINY, TINY.cases)


def test_without_a_base_time_is_inconclusive():
    assert gate.check_time(None).status == "inconclusive"


def test_a_base_that_does_not_exist_is_inconclusive():
    found = gate.check_time("no-such-revision-anywhere")
    assert found.status == "inconclusive"


# --- level 4 ----------------------------------------------------------------------------------------------------------
def test_a_ratio_must_be_high_each_time():
    bounds = {"batched/limit m": 2.0, "batched/single m": 0.5}
    tries = iter([{"batched/limit m": 2.5, "batched/single m": 0.4}, {"batched/limit m": 1.9, "batched/single m": 0.4}])
    assert gate.compare_ratios(bounds, lambda memory: next(tries)) == []
    (finding,) = gate.compare_ratios(bounds, lambda memory: {"batched/limit m": 2.5, "batched/single m": 0.4})
    assert finding == {"case": "batched/limit m", "what": "2.5, bound 2", "ratio": 2.5}


def test_ratios_are_measured_and_agree_with_each_other():
    ratios = gate.measure_ratios("size=4MiB,folio=64KiB", rounds=3)
    batched, single, both = (
        ratios[f"{pair} size=4MiB,folio=64KiB"] for pair in ("batched/limit", "single/limit", "batched/single")
    )
    assert both == pytest.approx(batched / single)
    assert batched > 0


def went_wrong(memory: str) -> dict[str, float]:
    raise StateError("the benchmark's fork went wrong")


def test_bounds_are_those_of_a_cpu_and_simd_level(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "_unfit", lambda **_: None)
    monkeypatch.setattr(gate, "measure_ratios", lambda memory: {f"batched/limit {memory}": 2.0})
    assert gate.check_ratios(tmp_path).status == "inconclusive"
    gate.write_baselines("a test", ["ratios"], baselines=tmp_path)
    assert gate.check_ratios(tmp_path).status == "pass"
    monkeypatch.setattr(
        gate, "measure_ratios", lambda memory: {f"batched/limit {memory}": 2.0 * gate.RATIO_SLACK + 0.01}
    )
    assert gate.check_ratios(tmp_path).status == "fail"
    monkeypatch.setattr(gate, "measure_ratios", went_wrong)
    level = gate.check_ratios(tmp_path)
    assert (level.status, level.summary) == ("fail", "the benchmark's fork went wrong")
    environment = gate.bench.environment()
    monkeypatch.setattr(gate.bench, "environment", lambda: environment | {"cpu": "Another (1/2/3), 8 CPUs"})
    assert gate.check_ratios(tmp_path).status == "inconclusive"


# --- the self-test ----------------------------------------------------------------------------------------------------
@pytest.fixture
def judged(monkeypatch):
    """No measuring: a case is called slower if it is by 10 % or more; and in every 4th run with nothing changed."""
    monkeypatch.setattr(gate, "_unfit", lambda **_: None)
    calls = []

    def run(profile, number, slower):
        calls.append((number, slower))
        injected = profile.cases[number % len(profile.cases)] if slower else None
        confirmed = [injected] if slower >= 10 else [profile.cases[0]] if not slower and number % 4 == 0 else []
        return {"run": number, "slower": slower, "injected": injected, "ratio": 1 + slower / 100 if slower else None,
                "confirmed": confirmed, "first": confirmed, "seconds": 1.0}  # fmt: skip

    monkeypatch.setattr(gate, "_self_test_run", run)
    return calls


def test_the_self_test_counts_false_alarms_and_what_was_found(judged):
    rates = gate.self_test(8, profile=TINY)
    assert (rates["runs"], rates["false_positive_rate"]) == (8, 0.25)
    assert rates["detection"] == {"3": 0.0, "5": 0.0, "10": 1.0, "20": 1.0}
    low, high = rates["interval"]  # Clopper-Pearson for 2 of 8
    assert (low, high) == (pytest.approx(0.0319, abs=1e-4), pytest.approx(0.6509, abs=1e-4))
    assert rates["detection_intervals"]["10"] == [pytest.approx(0.6306, abs=1e-4), 1.0]
    assert rates["elsewhere"] == 0
    assert len(judged) == 8 * 5


def test_the_self_test_goes_on_where_it_stopped(judged, tmp_path):
    state = tmp_path / "state.jsonl"
    gate.self_test(2, state=state, profile=TINY)
    assert len(judged) == 10
    rates = gate.self_test(3, state=state, profile=TINY)
    assert judged[10:] == [(2, slower) for slower in (0, *gate.SLOWER)]
    assert rates["runs"] == 3
    with pytest.raises(StateError, match="profile"):
        gate.self_test(3, state=state, profile=gate.FAST)


def test_the_self_test_does_not_touch_a_file_that_is_another(judged, tmp_path):
    state = tmp_path / "notes.txt"
    state.write_text("dear diary\n")
    with pytest.raises(StateError, match="no state"):
        gate.self_test(1, state=state, profile=TINY)
    assert state.read_text() == "dear diary\n"


@pytest.mark.skipif(gate._unfit() is not None, reason=str(gate._unfit()))
def test_a_self_test_for_real(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "SLOWER", (20,))
    result = gate.self_test(1, profile=TINY, state=tmp_path / "state")
    lines = [json.loads(line) for line in (tmp_path / "state").read_text().splitlines()[1:]]
    assert [line["slower"] for line in lines] == [0, *gate.SLOWER]
    assert all(set(line["confirmed"]) <= set(line["first"]) <= set(TINY.cases) for line in lines)
    assert result["injected_ratio"].keys() == result["detection"].keys() == {"20"}


def test_the_self_test_on_the_command_line(judged, monkeypatch):
    document = json.loads(run("--self-test", "--runs", 1, "--json").stdout)
    assert {"runs", "false_positive_rate", "interval", "detection"} <= document.keys()
    assert "Clopper" not in document
    table = run("--self-test", "--runs", 1).stdout
    assert "called slower" in table and "nothing" in table
