"""The command line as people and scripts meet it."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ptebatch
from ptebatch import arch, bench, cli, live, snapshot, verify, workload
from ptebatch.mm import STAT_FIELDS
from ptebatch.semantics import PRESETS, SWITCHES
from ptebatch.verify import QUANTITIES

README = Path(__file__).resolve().parent.parent / "README.md"
COMMANDS = sorted(command.callback.__name__ for command in cli.app.registered_commands)
ON_MEMORY = ("explain", "fork", "wrprotect", "zap")
SMALL = "size=1MiB,folio=16KiB,seed=3"
NOBODY = 1 << 30  # above every pid_max

needs_proc = pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="no /proc/PID/pagemap here")


def run(*args: object, code: int = 0, **kwargs):
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args], prog_name="ptebatch", **kwargs)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run_json(*args: object) -> dict:
    return json.loads(run(*args, "--json").stdout)


def refused(*args: object) -> str:
    """What a command says on stderr when it fails, without `error:`; one line and no traceback."""
    result = run(*args, code=1)
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def wrong(*args: object) -> str:
    """What the last line on stderr says of a wrong command line."""
    result = run(*args, code=2)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "Usage: ptebatch" in result.stderr
    return result.stderr.rstrip().splitlines()[-1]


def python(*args: str, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=60, check=False, **kwargs)


@pytest.fixture
def snapshot_file(tmp_path: Path) -> Path:
    path = tmp_path / "redis.ptes"
    snapshot.save(workload.make(size="1MiB", folio="64KiB"), path, bound=["entries.write: made up"], source="a test")
    return path


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """A process that holds still, and answers a line on its stdin."""
    command = [sys.executable, "-c", "print(flush=True); print(input(), flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


@pytest.fixture
def measured(monkeypatch) -> dict:
    """What the benchmark was asked for; it then measures little memory, once."""
    asked: dict = {}
    run_bench = bench.run_bench

    def on_less(*, progress, **kwargs):
        asked.update(kwargs)
        return run_bench(progress=progress, **{**kwargs, "size": 4 << 20, "rounds": 1, "folios": (4096,)})

    monkeypatch.setattr(bench, "run_bench", on_less)
    for name in ("run_limit", "run_kernel_layout"):
        small = functools.partial(_on_less, getattr(bench, name))
        monkeypatch.setattr(bench, name, small)
    monkeypatch.setattr(bench, "run_live", _live_document)
    return asked


def _live_document(**kwargs) -> dict:
    """What the live kernel takes root and time for."""
    rows = []
    for operation in bench.LIVE_OPERATIONS:
        case = bench.Case({"source": "kernel", "path": "batched", "operation": operation}, 1024, int, int)
        case.times_ns = [50_000, 60_000]
        rows += bench.rows([case], folio_bytes=4096, mapping="pte", change=0.0, ops=None)
    return {"schema": 1, "mode": "live", "env": bench.environment(), "rows": rows, "bound": [], "notes": []}


def _on_less(run, **kwargs):
    return run(**{**kwargs, "size": 4 << 20, "rounds": 1, "folios": (4096,)})


@pytest.fixture
def verified(monkeypatch) -> dict:
    """Nothing is verified: what was asked for."""
    asked: dict = {}

    def run_verify(scenarios, *, progress, **kwargs):
        asked.update(kwargs, scenarios=[scenario.name for scenario in scenarios])
        rows = [verify.Outcome(scenario.name).to_dict() for scenario in scenarios]
        for row, change in zip(rows, asked.get("outcomes", ()), strict=False):
            row.update(change)
        quantities = [dict(zip(("name", "shown", "by"), q, strict=True), checks=1, mismatches=0) for q in QUANTITIES]
        document = {"kernel": "6.18.0", "semantics": "v6.18", "seed": 1, "impl": "core"}
        return {**document, "scenarios": rows, "quantities": quantities}

    monkeypatch.setattr(verify, "run", run_verify)
    monkeypatch.setattr(live, "restore", lambda: asked.get("restored", []))
    return asked


# --- help, version, imports -------------------------------------------------------------------------------------------
def test_help_names_every_command_and_the_exit_codes():
    text = run("--help").stdout
    assert all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in COMMANDS)
    assert "130 interrupted" in " ".join(text.split())
    assert "..." not in text.partition("Commands:")[2].partition("Examples:")[0]  # no description cut short


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples_and_json(command):
    text = run(command, "--help").stdout
    assert len(re.findall(rf"^    ptebatch \w+ .*{command}|^    ptebatch {command}", text, re.MULTILINE)) >= 1
    assert "Examples:" in text
    assert "--json" in text
    assert max(map(len, text.splitlines())) <= 100


def test_without_a_command_there_is_help():
    result = CliRunner().invoke(cli.app, [], prog_name="ptebatch")
    assert result.exit_code == 2
    assert "Commands:" in result.output


def test_version():
    assert run("--version").stdout == f"ptebatch {ptebatch.__version__}\n"


def test_python_dash_m():
    done = python("-m", "ptebatch", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ptebatch {ptebatch.__version__}\n", "")


HEAVY = {"matplotlib", "numba", "numpy", "rich", "safetensors", "scipy"}


@pytest.mark.parametrize(
    ("code", "may"),
    [
        ("import ptebatch; ptebatch.__version__", set()),
        ("from ptebatch import cli; cli.app(['--help'], standalone_mode=False)", set()),
        ("from ptebatch import cli; cli.app(['fork', '--help'], standalone_mode=False)", set()),
        ("from ptebatch import cli; cli.app(['pte', '1', '--json'], standalone_mode=False)", {"numpy"}),
        (f"from ptebatch import cli; cli.app(['fork', '--workload', '{SMALL}', '--json'])", {"numpy"}),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code, may):
    tell = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
    done = python("-c", tell + code)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "ptebatch" in loaded
    assert loaded & HEAVY <= may


def test_importing_the_package_imports_none_of_its_modules():
    done = python("-c", "import ptebatch, sys; print([m for m in sys.modules if m.startswith('ptebatch.')])")
    assert done.stdout == "[]\n"


def test_public_names_are_there():
    assert {name for name in ptebatch.__all__ if getattr(ptebatch, name, None) is None} == set()
    assert set(ptebatch.__all__) <= set(dir(ptebatch))
    with pytest.raises(AttributeError, match="has no attribute 'frok'"):
        ptebatch.frok  # noqa: B018


# --- examples ---------------------------------------------------------------------------------------------------------
def epilogs() -> list[str]:
    texts = [command.epilog or "" for command in cli.app.registered_commands]
    return [line.strip() for text in texts for line in text.splitlines() if line.strip().startswith("ptebatch ")]


def readme_commands() -> list[str]:
    return re.findall(r"^    (ptebatch .*?)(?:\s+#.*)?$", README.read_text(encoding="utf-8"), re.MULTILINE)


@needs_proc
@pytest.mark.parametrize("example", sorted({*epilogs(), *readme_commands()}))
def test_every_example_runs(example, child, measured, verified, snapshot_file, monkeypatch):
    """As it is written, on less memory and on a process that exists."""
    monkeypatch.chdir(snapshot_file.parent)
    text = re.sub(r"\b1234\b", str(child.pid), example.partition(" > ")[0])
    text = re.sub(r"size=\d+[GM]iB", "size=16MiB", text)
    if "--plot" in text:
        pytest.importorskip("matplotlib")
    if "--compare" in text:
        for name in ("before.json", "after.json"):
            Path(name).write_text(run("bench", "--json").stdout)
    assert run(*shlex.split(text)[1:]).stdout


def test_the_readme_s_ten_lines_run(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(compile(code, "README.md", "exec"), {})
    ends, counts = capsys.readouterr().out.splitlines()
    assert "folio end" in ends
    single, batched = map(int, counts.split(" -> "))
    assert single > batched


def test_the_readme_names_every_switch_and_module():
    text = README.read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \| (v6\.\d+|later) \|", text, re.MULTILINE)
    assert dict(table) == {name: switch.since or "later" for name, switch in SWITCHES.items()}
    assert all(name in text for name in arch.ARCHITECTURES)
    modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - {"__init__"}
    listed = set(re.findall(r"`(\w+)`", text[text.index("## Modules") :]))
    assert modules <= listed
    keys = set(re.findall(r"`(\w+)`", text[text.index("## Workloads") : text.index("## Units")]))
    assert set(workload.Workload.__dataclass_fields__) <= keys


# --- architectures ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", arch.ARCHITECTURES)
def test_every_architecture(name, tmp_path):
    space = "size=4MiB,folio=64KiB+256KiB,align=shifted,readonly=0.2,clean=0.3,granularity=page,swap=0.1,guard=0.1"
    core = run_json("fork", "--arch", name, "--workload", space)
    assert core["arch"] == name
    assert core["digest"] == run_json("fork", "--arch", name, "--workload", space, "--impl", "reference")["digest"]
    page = arch.LAYOUTS[name].page_size
    assert core["stats"]["tables_allocated"] >= 4 << 20 >> page.bit_length() - 1 >> 13
    assert core["stats"]["ptes_present"] + core["stats"]["ptes_none"] + core["stats"]["swap_entries"] > 0
    explained = run_json("explain", "--arch", name, "--workload", space)
    assert explained["arch"] == name
    assert sum(int(k) * n for k, n in core["stats"]["batch_hist"].items()) == core["stats"]["ptes_present"]
    old = run_json("fork", "--arch", name, "--workload", space, "--semantics", "v6.8")
    assert old["arch"] == (f"{name}-v6.9" if name.startswith("arm64") else name)
    for command in ("wrprotect", "zap"):
        assert run_json(command, "--arch", name, "--workload", space)["arch"] == name
    same = ("--arch", name, "--workload", space, "--semantics", "v6.18", "--semantics", "v6.19")
    assert run_json("diff", *same)["entries"] == []

    mm = workload.parse(space).build(layout=arch.LAYOUTS[name])
    snapshot.save(mm, tmp_path / "a.ptes")
    assert snapshot.load(tmp_path / "a.ptes").mm.layout == mm.layout
    core = run_json("fork", tmp_path / "a.ptes")
    assert core == {**run_json("fork", tmp_path / "a.ptes", "--impl", "reference"), "impl": "core"}


def test_what_the_hint_saves():
    found = run_json(
        *("diff", "--arch", "arm64-4k", "--workload", "size=4MiB,folio=2MiB,readonly=1"),
        *("--semantics", "v6.18", "--set", "pte_batch_hint=off"),
    )
    assert found["entries"] == []
    assert found["counters"] == {"ptep_get": [2 * 32, 2 * 512], "contpte_reads": [2 * 512, 2 * 512 * 16]}
    rows = run_json("explain", "--arch", "arm64-4k", "--workload", "size=4MiB,folio=64KiB+16KiB")["eligible"]
    assert [(row["hardware"], row["share"]) for row in rows] == [
        *(("arm64 contpte, 4K granule", 0.5), ("riscv Svnapot", 0.5), ("AMD PTE coalescing", 1.0)),
    ]


def test_a_page_is_the_default_folio():
    assert run_json("fork", "--arch", "ppc64-64k", "--workload", "size=1MiB")["stats"]["ptes_present"] == 16


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("fork", "--arch", "vax", "--workload", "size=1MiB"), "no architecture 'vax'; they are x86-64, arm64-4k"),
        (("fork", "--arch", "riscv64", "--pid", "self"), "only makes sense with --workload: a process has this"),
        (("explain", "--arch", "riscv64", "x.ptes"), "only makes sense with --workload: a snapshot has its own"),
    ],
)
def test_arch_is_for_workloads(args, message):
    assert message in " ".join(run(*args, code=2).stderr.split())


@pytest.mark.parametrize(
    ("name", "space", "message"),
    [
        ("arm64-64k", "size=1MiB,folio=4KiB", "folio=4KiB: pages of arm64-64k are 64KiB"),
        ("loongarch64-16k", "size=20KiB", "size=20480: pages of loongarch64-16k are 16KiB, of which it must be a"),
        ("arm64-4k", "size=1MiB,soft_dirty=0.5", "entries of arm64-4k have no soft-dirty bit"),
        ("s390x", "size=1MiB,uffd_wp=0.5", "entries of s390x have no uffd-wp bit"),
        ("riscv64", "size=1MiB,uffd_wp=0.5", "entries of riscv64 have no uffd-wp bit"),
        ("riscv64", "size=4MiB,folio=2MiB,pmd=1", "entries of riscv64 are modelled in page tables only"),
    ],
)
def test_what_an_architecture_does_not_have(name, space, message):
    assert message in refused("fork", "--arch", name, "--workload", space)


def test_a_snapshot_of_another_encoding_says_what_it_needs(tmp_path):
    snapshot.save(workload.parse("size=64KiB").build(layout=arch.ARM64_4K), tmp_path / "a.ptes")
    message = refused("fork", tmp_path / "a.ptes", "--semantics", "v6.9")
    assert "has arm64-4k entries: that needs --set arm64_present_invalid=on" in message


# --- fork -------------------------------------------------------------------------------------------------------------
def test_fork_json_is_this_and_nothing_else():
    document = run_json("fork", "--workload", SMALL)
    assert list(document) == ["digest", "stats", "arch", "semantics", "impl", "batching", "bound"]
    assert re.fullmatch("[0-9a-f]{64}", document["digest"])
    assert list(document["stats"]) == [*STAT_FIELDS, "batch_hist"]
    assert document["stats"]["ptes_present"] == 256
    assert document["stats"]["batch_hist"] == {"4": 64}
    assert document["arch"] == "x86-64"
    assert document["semantics"] == "v6.19"
    assert document["impl"] == "core"
    assert document["batching"] is True
    assert document["bound"] == []


@pytest.mark.parametrize("more", [[], ["--no-batching"], ["--semantics", "v6.8"]])
def test_core_and_reference_give_the_same(more):
    text = SMALL + ",vma=mix,holes=0.1,pinned=0.1,shared=0.2,readonly=0.2,granularity=page"
    core = run_json("fork", "--workload", text, *more)
    reference = run_json("fork", "--workload", text, *more, "--impl", "reference")
    assert reference.pop("impl") == "reference"
    assert core.pop("impl") == "core"
    assert core == reference


def test_batched_and_single_end_the_same():
    batched = run_json("fork", "--workload", SMALL)
    single = run_json("fork", "--workload", SMALL, "--no-batching")
    assert single["digest"] == batched["digest"]
    assert (batched["batching"], single["batching"]) == (True, False)
    assert single["stats"]["batches"] == 4 * batched["stats"]["batches"]


def test_by_vma_adds_up():
    document = run_json("fork", "--workload", SMALL + ",vma=anon+file+shmem", "--by-vma")
    total = document["stats"]
    for name in ("ptes_present", "batches", "set_ptes", "ptep_get"):
        assert sum(vma["stats"][name] for vma in document["vmas"]) == total[name] > 0
    assert len(document["vmas"]) == total["vmas_copied"] == 2
    table = run("fork", "--workload", SMALL + ",vma=anon+file+shmem", "--by-vma").stdout
    assert all(f"{vma['start']:x}" in table for vma in document["vmas"])


def test_fork_table():
    result = run("fork", "--workload", SMALL)
    assert re.search(r"^batches +64 +0\.2500$", result.stdout, re.MULTILINE)
    assert f"memory  {workload.parse(SMALL)}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert result.stderr == ""


@pytest.mark.parametrize("version", PRESETS)
def test_every_preset_forks(version):
    assert run_json("fork", "--workload", SMALL, "--semantics", version)["semantics"] == version


def test_switches_are_set_and_named():
    document = run_json("fork", "--workload", SMALL, "--set", "mm_id=off", "--set", "large_reuse=never")
    assert document["semantics"] == "v6.19 mm_id=off large_reuse=never"
    assert run_json("fork", "--workload", SMALL, "--set", "fork_batching=off")["batching"] is False
    old = run_json("fork", "--workload", SMALL, "--semantics", "v6.8", "--set", "saved_dirty=off")
    assert old["arch"] == "x86-64-v6.5"


# --- explain, wrprotect -----------------------------------------------------------------------------------------------
def test_explain_json():
    document = run_json(
        "explain", "--workload", SMALL, "--by-vma", "--what-if", "folio=64KiB", "--what-if", "folio=4KiB"
    )
    assert document["batches"] == 64
    assert document["mean_nr"] == 4
    assert document["batch_hist"] == {"4": 64}
    assert sum(row["batches"] for row in document["ends"]) == 64
    assert [vma["batches"] for vma in document["vmas"]] == [64]
    assert [row["folio_bytes"] for row in document["what_if"]] == [None, 65536, 4096]
    assert [row["stats"]["batches"] for row in document["what_if"]] == [64, 16, 256]


def test_explain_agrees_with_fork():
    text = SMALL + ",clean=0.3,granularity=page,holes=0.1"
    hist = run_json("fork", "--workload", text)["stats"]["batch_hist"]
    assert run_json("explain", "--workload", text)["batch_hist"] == hist


def test_explain_table():
    text = run("explain", "--workload", SMALL + ",clean=0.3,granularity=page", "--what-if", "folio=64KiB").stdout
    assert "bits: dirty" in text
    assert re.search(r"^counter +as it is +64KiB +change$", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 80


def test_explain_of_a_kernel_that_does_not_batch():
    assert "v6.9" in refused("explain", "--workload", SMALL, "--semantics", "v6.8")


def test_wrprotect():
    document = run_json("wrprotect", "--workload", SMALL, "--by-vma")
    assert document["stats"]["wrprotect_ptes"] == 64
    assert document["stats_unbatched"]["wrprotect_ptes"] == 256
    assert document["stats"]["ptes_wrprotected"] == document["stats_unbatched"]["ptes_wrprotected"] == 256
    assert sum(vma["stats"]["batches"] for vma in document["vmas"]) == 64
    single = run_json("wrprotect", "--workload", SMALL, "--no-batching", "--impl", "reference")
    assert single["digest"] == document["digest"]
    assert single["stats"] == document["stats_unbatched"]
    text = run("wrprotect", "--workload", SMALL, "--by-vma").stdout
    assert re.search(r"^wrprotect_ptes +256 +64 +-75%$", text, re.MULTILINE)


def test_zap():
    document = run_json("zap", "--workload", SMALL, "--by-vma")
    assert (document["stats"]["clear_ptes"], document["stats_unbatched"]["clear_ptes"]) == (64, 256)
    assert document["stats"]["folios_freed"] == document["stats_unbatched"]["folios_freed"] == 64
    assert sum(vma["stats"]["batches"] for vma in document["vmas"]) == 64
    unbatched = run_json("zap", "--workload", SMALL, "--semantics", "v6.8", "--impl", "reference")
    assert unbatched["stats"] == document["stats_unbatched"]
    text = run("zap", "--workload", SMALL).stdout
    assert re.search(r"^folio_put +256 +64 +-75%$", text, re.MULTILINE)


# --- bench ------------------------------------------------------------------------------------------------------------
def test_bench_prints_what_was_measured(measured):
    text = run("bench").stdout
    assert measured == {}
    assert re.search(r"^cpu +\S", text, re.MULTILINE)
    assert re.search(r"^ *4KiB( +[\d.]+){3} +[-+][\d.]+%( +[\d.]+){4} +-2\.0%$", text, re.MULTILINE)
    assert "measured on 4MiB" in text
    assert {row["source"] for row in run_json("bench")["rows"]} == {"naive", "core", "limit", "pool", "published"}


def test_bench_options(measured):
    run("bench", "--size", "64MiB", "--folio", "4KiB+2MiB", "--rounds", 3, "--peers", "--pid", "self")
    assert measured == {"size": 64 << 20, "folios": (4096, 2 << 20), "rounds": 3, "peers": True, "pid": "self"}


def test_bench_against_the_limit(measured):
    assert re.search(r"^ *4MiB +0( +[\d.]+){6} +- +-$", text := run("bench", "--limit").stdout, re.MULTILINE)
    assert text.endswith(" targets are met\n") or "; not met:\n- 4MiB order 0 core batched: x_single is" in text
    assert run_json("bench", "--limit")["mode"] == "limit"
    assert measured == {}


def test_bench_on_the_kernel_s_layout(measured):
    assert re.search(r"^ *4KiB( +[\d.]+){2} +\S+% +-2%", run("bench", "--kernel-layout").stdout, re.MULTILINE)
    assert run_json("bench", "--kernel-layout")["mode"] == "kernel-layout"


def test_bench_of_the_live_kernel(measured):
    assert re.search(r"^ *4KiB +PTE +53\.7 +\+0%", run("bench", "--live").stdout, re.MULTILINE)


def test_bench_compares_two_documents(measured, tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(run("bench", "--json").stdout)
    names = [tmp_path / "a.json", tmp_path / "b.json"]
    assert re.search(r"^core batched +4KiB( +[\d.]+){2} +\S+%", run("bench", "--compare", *names).stdout, re.MULTILINE)
    assert run_json("bench", "--compare", *names)["mode"] == "compare"
    (tmp_path / "b.json").write_text("{")
    assert "b.json is no JSON" in refused("bench", "--compare", *names)
    assert "No such file" in refused("bench", "--compare", tmp_path / "none", names[0])
    assert "'--compare'" in wrong("bench", "--compare", *names, "--rounds", 3)


def test_bench_refuses_a_picture_it_could_not_draw(measured, tmp_path, monkeypatch):
    assert "'--plot'" in wrong("bench", "--plot", "x.jpeg")
    assert "no folder" in wrong("bench", "--plot", tmp_path / "none" / "x.png")
    assert "'--plot'" in wrong("bench", "--limit", "--plot", "x.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'ptebatch[plot]'" in refused("bench", "--plot", tmp_path / "x.png")
    assert measured == {}


def test_bench_refuses_what_it_cannot_read(measured):
    assert "'--size'" in wrong("bench", "--size", "1GB", "--folio", "4KiB")
    assert "'--folio'" in wrong("bench", "--size", "1GiB", "--folio", "5KiB")
    assert "'--pid'" in wrong("bench", "--pid", "redis")
    assert "'--pid'" in wrong("bench", "--limit", "--pid", "self")
    assert "'--peers'" in wrong("bench", "--kernel-layout", "--peers")
    assert "choose one" in wrong("bench", "--kernel-layout", "--limit")
    assert "--rounds" in wrong("bench", "--rounds", 0)


# --- snapshots and processes ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", ON_MEMORY)
def test_commands_read_snapshots(command, snapshot_file):
    assert run_json(command, snapshot_file)["bound"] == ["entries.write: made up"]
    text = run(command, snapshot_file).stdout
    assert "a test" in text
    assert "- entries.write: made up" in text


@needs_proc
@pytest.mark.parametrize("command", ON_MEMORY)
def test_commands_read_this_process(command):
    result = run(command, "--pid", "self", "--swap", "drop", "--json")
    document = json.loads(result.stdout)
    assert document["bound"]
    assert all(line.startswith("note: ") for line in result.stderr.splitlines())
    assert document["semantics"].startswith("v6.")
    text = run(command, "--pid", os.getpid(), "--swap", "drop", "--by-vma").stdout
    assert f"process {os.getpid()} (" in text
    assert "Inferred, not seen" in text


@needs_proc
def test_capture_writes_what_fork_reads(tmp_path):
    path = tmp_path / "self.ptes"
    document = run_json("capture", "self", "-o", path, "--swap", "drop")
    assert document["file"] == str(path)
    assert document["bytes"] == path.stat().st_size
    assert document["pid"] == os.getpid()
    assert document["pfns"] in ("real", "hidden")
    assert sum(row["pages"] for row in document["folios"]) > 0
    stats = run_json("fork", path)["stats"]
    assert 0 < stats["ptes_present"] <= document["ptes_present"]
    text = run("capture", "self", "-o", path, "--swap", "drop").stdout
    assert "self.ptes" in text
    assert list(tmp_path.iterdir()) == [path]


@needs_proc
def test_a_frozen_process_goes_on(child, tmp_path):
    run("capture", child.pid, "--freeze", "-o", tmp_path / "child.ptes")
    child.stdin.write("hello\n")
    child.stdin.flush()
    assert child.stdout.readline() == "hello\n"


def test_what_is_not_on_the_machine(tmp_path):
    assert f"no process {NOBODY}" in refused("fork", "--pid", NOBODY)
    assert f"no process {NOBODY}" in refused("capture", NOBODY, "-o", tmp_path / "x")
    assert "must be positive" in refused("fork", "--pid", 0)
    assert "No such file" in refused("fork", tmp_path / "none")
    assert "cannot be written" in refused("capture", "self", "-o", tmp_path / "no" / "x", "--swap", "drop")
    assert list(tmp_path.iterdir()) == []


def test_a_process_cannot_freeze_itself(tmp_path):
    assert "--freeze" in refused("capture", "self", "--freeze", "-o", tmp_path / "x")


@pytest.mark.parametrize("command", ON_MEMORY)
@pytest.mark.parametrize("keep", [0, 7, 100, 5000])
def test_a_snapshot_cut_short(command, keep, snapshot_file):
    snapshot_file.write_bytes(snapshot_file.read_bytes()[:keep])
    assert str(snapshot_file) in refused(command, snapshot_file)


def test_a_file_that_is_no_snapshot(tmp_path):
    assert "regular file" in refused("fork", tmp_path)
    path = tmp_path / "x"
    path.write_bytes(b"\xff" * 4096)
    assert "not a snapshot" in refused("fork", path)


def test_a_snapshot_of_another_layout(snapshot_file):
    assert "--set saved_dirty=on" in refused("fork", snapshot_file, "--set", "saved_dirty=off")


def test_an_entry_that_cannot_be_copied_says_where_it_is(tmp_path):
    mm = workload.make(size="1MiB")
    mm.entries[0, 7] = arch.swp_entry(mm.layout, 25, 0xABC)  # under migration, but its page is not there
    path = tmp_path / "migration.ptes"
    snapshot.save(mm, path)
    message = refused("fork", path, "--semantics", "v6.18")
    assert hex(mm.vmas[0].start + (7 << 12)) in message
    assert "0xabc" in message
    assert "--swap" not in message


# --- wrong command lines ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", ON_MEMORY)
def test_one_address_space_has_to_be_named(command, snapshot_file):
    assert "--workload" in wrong(command)
    assert "--pid and --workload are given" in wrong(command, "--pid", "self", "--workload", SMALL)
    assert "SNAPSHOT and --pid are given" in wrong(command, snapshot_file, "--pid", "self")
    assert "--swap" in wrong(command, "--workload", SMALL, "--swap", "drop")
    assert "--freeze" in wrong(command, snapshot_file, "--freeze")


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["--workload", "colour=red"], "keys are size, folio"),
        (["--workload", "size=1GB"], "GiB"),
        (["--workload", "size"], "key=value"),
        (["--workload", ""], "key=value"),
        (["--pid", "redis"], "neither a process id"),
        (["--pid", "-1"], "neither a process id"),
        (["--workload", SMALL, "--semantics", "v5.4"], "v6.18"),
        (["--workload", SMALL, "--semantics", "v5.4"], "'running'"),
        (["--workload", SMALL, "--set", "mm_id"], "SWITCH=on|off"),
        (["--workload", SMALL, "--set", "mmid=on"], "mm_id"),
        (["--workload", SMALL, "--set", "mm_id=maybe"], "on or off"),
        (["--workload", SMALL, "--set", "large_mapcount=off"], "mm_id needs large_mapcount"),
        (["--workload", SMALL, "--impl", "gpu"], "reference"),
        (["--workload", SMALL, "--frobnicate"], "--frobnicate"),
    ],
)
def test_a_wrong_value_names_the_right_ones(args, what):
    assert what in wrong("fork", *args)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("64KiB", "folio=SIZE"),
        ("size=64KiB", "folio=SIZE"),
        ("folio=3KiB", "power of two"),
        ("folio=4KiB+8KiB", "repeat"),
    ],
)
def test_a_wrong_what_if(text, what):
    assert what in wrong("explain", "--workload", SMALL, "--what-if", text)


def test_a_folio_larger_than_a_table_is_refused():
    assert "folio=4194304" in refused("explain", "--workload", SMALL, "--what-if", "folio=4MiB")


# --- pte --------------------------------------------------------------------------------------------------------------
def test_pte():
    document = run_json("pte", "0x8000000001234067", "18446744073709549056", "0")
    assert document["arch"] == "x86-64"
    present, guard, none = document["entries"]
    assert (present["pfn"], present["bits"]) == (0x1234, ["P", "RW", "US", "A", "D", "NX"])
    assert guard["markers"] == ["guard"]
    assert none["kind"] == "none"
    text = run("pte", "0x8000000001234067", "0").stdout
    assert "pfn           0x1234" in text
    assert "kind   none" in text


def test_pte_refuses_what_is_no_entry():
    assert "neither a 0x" in wrong("pte", "rw")
    assert "64 bits" in wrong("pte", "0x1ffffffffffffffff")
    assert "x86-64-v6.5" in wrong("pte", "1", "--arch", "vax")
    assert "ENTRY" in wrong("pte")


# --- how it ends ------------------------------------------------------------------------------------------------------
def test_interrupted_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot, "save_file", interrupted)
    result = run("capture", "self", "-o", tmp_path / "x", "--swap", "drop", code=130)
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c():
    code = (
        "import sys, ptebatch.cli, ptebatch.fork, ptebatch.reference, ptebatch.report, ptebatch.workload\n"
        "build = ptebatch.workload.Workload.build\n"
        "ptebatch.workload.Workload.build = lambda *args, **how: print('begins', flush=True) or build(*args, **how)\n"
        "sys.argv = ['ptebatch', 'fork', '--impl', 'reference', '--workload', 'size=2GiB,clean=0.5']\n"
        "ptebatch.cli.main()"
    )
    args = [sys.executable, "-c", code]
    for _ in range(3):
        with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "begins\n"
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=300)
        # Python drops an interrupt that comes while it runs a finalizer (and says so), or under a bare `except:` of its
        # library, as in the copyreg that an import of re runs (and says nothing: the fork goes on to its end)
        if process.returncode and "Exception ignored" not in err:
            break
    assert (process.returncode, out, err) == (130, "", "\ninterrupted\n")


def test_a_reader_that_leaves_is_no_error():
    many = ",".join(["size=64MiB", "vmas=1000"])
    command = [sys.executable, "-m", "ptebatch", "fork", "--by-vma", "--json", "--workload", many]
    env = {**os.environ, "PYTHONUNBUFFERED": ""}  # unbuffered, Python itself loses the error
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_running_out_of_memory_is_one_line(monkeypatch):
    def exhausted(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(workload.Workload, "build", exhausted)
    assert "smaller" in refused("fork", "--workload", SMALL)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_progress_is_for_terminals(monkeypatch):
    """On stderr, only if it takes long, and gone when it is over; stdout stays clean."""
    command = [sys.executable, "-m", "ptebatch", "fork", "--json", "--workload", SMALL]
    code = f"import sys, ptebatch.cli as c; c.PROGRESS_AFTER = 0.0; sys.argv[1:] = {command[3:]!r}; c.main()"
    master, slave = os.openpty()
    try:
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=slave, env=env, timeout=60, check=False
        )
        os.set_blocking(master, False)
        shown = os.read(master, 1 << 20).decode()
    finally:
        os.close(master)
        os.close(slave)
    assert done.returncode == 0
    assert "making the address space" in shown
    assert json.loads(done.stdout)["batching"] is True


# --- verify -----------------------------------------------------------------------------------------------------------
def test_verify_says_what_it_compared(verified):
    said = run("verify", "--scenario", "pinned-*", "--seed", "7").stdout
    assert verified["seed"] == 7
    assert verified["scenarios"] == [name for name in verify.SCENARIOS if name.startswith("pinned-")]
    assert len(verified["scenarios"]) > 2
    assert all(name in said for name in verified["scenarios"])
    assert all(quantity in said for quantity, *_ in QUANTITIES)
    assert {"seen", "inferred", "unseen"} == {shown for _, shown, _ in QUANTITIES}


def test_verify_fails_with_a_mismatch(verified):
    verified["outcomes"] = [
        {"status": "failed", "checks": 3, "mismatches": 1, "reason": "page 0x1000: mapcount"},
        {"status": "skipped", "reason": "no KSM"},
    ]
    said = run("verify", code=1).stdout
    assert "mapcount" in said and "no KSM" in said
    document = json.loads(run("verify", "--json", code=1).stdout)
    assert document["scenarios"][0].items() >= verified["outcomes"][0].items()
    lines = run("verify", "--ktap", code=1).stdout.splitlines()
    assert lines[:2] == ["KTAP version 1", f"1..{len(verify.SCENARIOS)}"]
    first, second, third = list(verify.SCENARIOS)[:3]
    assert lines[2] == f"# {first}: page 0x1000: mapcount"
    assert lines[3:6] == [f"not ok 1 {first}", f"ok 2 {second} # SKIP no KSM", f"ok 3 {third}"]
    verified["outcomes"] = verified["outcomes"][1:]
    run("verify")  # what is skipped does not fail


def test_verify_lists_and_restores(verified):
    listed = run_json("verify", "--list", "--scenario", "zero-page")["scenarios"]
    assert [row["name"] for row in listed] == ["zero-page"]
    assert all(row["doc"] for row in run_json("verify", "--list")["scenarios"])
    assert run("verify", "--restore").stdout == "nothing was left changed\n"
    verified["restored"] = ["/proc/sys/vm/nr_hugepages"]
    assert run_json("verify", "--restore") == {"restored": verified["restored"]}
    assert run("verify", "--restore").stdout == "/proc/sys/vm/nr_hugepages\n"


def test_verify_wrong_command_lines():
    assert "no scenario is called 'anno-*'" in wrong("verify", "--scenario", "anno-*")
    assert "exclude" in wrong("verify", "--json", "--ktap")
