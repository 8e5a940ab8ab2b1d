"""The command line: the only place that prints or exits.

Exit codes: 0 done; 1 it failed, with one line on stderr that says why and what to do; 2 the command line is wrong;
130 interrupted. Tables and JSON go to stdout, progress and notes to stderr.

Nothing but the standard library and typer is imported before a command runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from ptebatch.errors import PtebatchError, SemanticsError, UnsupportedEntryError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ptebatch.arch import PteLayout
    from ptebatch.mm import Mm, Vma, WalkStats
    from ptebatch.semantics import KernelSemantics

__all__ = ["app", "main"]

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141
PROGRESS_AFTER = 0.8
"""Seconds a step takes before its progress is shown."""

Progress = Callable[[int, int], None]


class _Group(TyperGroup):
    """All commands; what goes wrong in one of them becomes one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PtebatchError as error:
            _fail(str(error))
        except MemoryError:
            _fail("out of memory: choose a smaller size")
        except RecursionError:
            raise
        except KeyboardInterrupt:
            sys.stderr.write("\ninterrupted\n")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever reads has left; what is still buffered must not fail once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_PIPE) from None
        except OSError as error:
            _fail(str(error))


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> None:
    """Run the command line (the entry point of the ``ptebatch`` script)."""
    app(prog_name="ptebatch")


class _Usage(typer.BadParameter):
    """A command line that is wrong as a whole."""

    def format_message(self) -> str:
        return self.message


# --- output -----------------------------------------------------------------------------------------------------------
def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    raise typer.Exit(EXIT_FAILED)


def _usage(message: str, option: str) -> NoReturn:
    raise typer.BadParameter(message, param_hint=f"'{option}'")


def _notes(notes: Any) -> None:
    for note in notes:
        sys.stderr.write(f"note: {' '.join(str(note).split())}\n")


def _json(document: Mapping[str, Any]) -> None:
    import json

    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def _print(*renderables: RenderableType | str) -> None:
    """Write tables with an empty line between them: folded to the terminal, or as plain text into a file or pipe."""
    from ptebatch import report

    for i, renderable in enumerate(renderables):
        if i:
            sys.stdout.write("\n")
        if sys.stdout.isatty():
            from rich.console import Console

            Console(highlight=False, emoji=False).print(renderable, markup=False)
        else:
            sys.stdout.write(report.render(renderable))
    sys.stdout.flush()


@contextmanager
def _progress(what: str, *, still: bool = False) -> Iterator[Progress]:
    """Show how far a step is, on a terminal's stderr and only if it takes long; yields the callback (done, total).

    With `still` nothing happens between two calls of the callback: a thread that draws would disturb a measurement.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True, auto_refresh=not still)
    task = bar.add_task(what, total=None)
    if still:
        with bar:
            yield lambda done, total: bar.update(task, completed=done, total=total, refresh=True)
        return
    timer = threading.Timer(PROGRESS_AFTER, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda done, total: bar.update(task, completed=done, total=total)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


# --- what to work on --------------------------------------------------------------------------------------------------
@dataclass
class _Source:
    """An address space and where it comes from."""

    mm: Mm
    semantics: KernelSemantics
    label: str
    bound: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


Snapshot = Annotated[
    str | None, typer.Argument(metavar="SNAPSHOT", help="A file that `ptebatch capture` wrote.", show_default=False)
]
Pid = Annotated[
    str | None, typer.Option("--pid", metavar="PID|self", help="Capture this process first.", show_default=False)
]
WorkloadText = Annotated[
    str | None,
    typer.Option(
        "--workload",
        metavar="KEY=VALUE,...",
        help="Make a synthetic address space, as size=1GiB,folio=4KiB+64KiB,seed=1.",
        show_default=False,
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        metavar="NAME",
        help="With --workload: the architecture, as x86-64, arm64-4k, arm64-64k, riscv64, s390x, ppc64-64k, "
        "loongarch64-16k. [default: x86-64]",
        show_default=False,
    ),
]
SemanticsName = Annotated[
    str | None,
    typer.Option(
        "--semantics",
        metavar="VERSION",
        help="Kernel to be exact for: v6.6 ... v6.19, or 'running'. "
        "[default: the running kernel with --pid, else the latest]",
        show_default=False,
    ),
]
Switches = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SWITCH=on|off",
        help="Change one behaviour of that kernel; can be repeated.",
        show_default=False,
    ),
]
Impl = Annotated[Literal["core", "reference"], typer.Option("--impl", help="The Cython core, or the plain-Python one.")]
NoBatching = Annotated[bool, typer.Option("--no-batching", help="One PTE at a time.")]
ByVma = Annotated[bool, typer.Option("--by-vma", help="Also report every VMA.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Freeze = Annotated[bool, typer.Option("--freeze", help="Stop the process while it is read.")]
Swap = Annotated[
    Literal["keep", "drop"] | None,
    typer.Option(
        "--swap",
        help="With --pid: keep swapped-out pages, guards and other entries that are not present, or leave them out. "
        "[default: keep]",
        show_default=False,
    ),
]


def _resolve_semantics(name: str | None, switches: list[str] | None, live: bool) -> tuple[KernelSemantics, list[str]]:
    from ptebatch import semantics

    notes: list[str] = []
    if name == "running" or (name is None and live):
        chosen, notes = semantics.running()
    else:
        try:
            chosen = semantics.LATEST if name is None else semantics.get(name)
        except SemanticsError as error:
            _usage(f"{error}, and 'running'", "--semantics")
    changes: dict[str, Any] = {}
    for item in switches or ():
        switch, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            _usage(f"{item!r} is not SWITCH=on|off; the switches are {', '.join(chosen.switches)}", "--set")
        changes[switch] = value
    try:
        return chosen.replace(**changes), notes
    except SemanticsError as error:
        _usage(str(error), "--set")


def _layout_for(arch: str | None, semantics: KernelSemantics) -> PteLayout:
    from ptebatch import arch as archs
    from ptebatch.mm import configured

    try:
        return configured(archs.layout_for(arch or "x86-64", semantics.switches), semantics)
    except PtebatchError as error:
        _usage(str(error), "--arch")


def _load(
    snapshot: str | None,
    pid: str | None,
    workload: str | None,
    semantics_name: str | None,
    switches: list[str] | None,
    freeze: bool,
    swap: Literal["keep", "drop"] | None,
    arch: str | None,
    pmd: Literal["split", "keep"] = "split",
) -> _Source:
    """Make the address space that exactly one of a snapshot, a process and a workload stands for."""
    sources = {"SNAPSHOT": snapshot, "--pid": pid, "--workload": workload}
    given = [option for option, value in sources.items() if value is not None]
    if len(given) != 1:
        raise _Usage(
            f"{' and '.join(given)} are given: name only one of them"
            if given
            else "name what to work on: a SNAPSHOT file, --pid PID or --workload KEY=VALUE,..."
        )
    if pid is None and (freeze or swap):
        _usage("only makes sense with --pid", "--freeze" if freeze else "--swap")
    if arch is not None and workload is None:
        what = "a snapshot has its own" if snapshot is not None else "a process has this machine's"
        _usage(f"only makes sense with --workload: {what}", "--arch")
    semantics, notes = _resolve_semantics(semantics_name, switches, live=pid is not None)

    if workload is not None:
        from ptebatch import workload as workloads

        layout = _layout_for(arch, semantics)
        try:
            parsed = workloads.parse(workload, layout.page_size)
        except PtebatchError as error:
            _usage(str(error), "--workload")
        with _progress("making the address space") as progress:
            mm = parsed.build(progress, layout=layout)
        return _Source(mm, semantics, str(parsed), notes=notes)

    if pid is not None:
        from ptebatch.capture import capture

        if pid != "self" and not pid.isdecimal():
            _usage(f"{pid!r} is neither a process id nor 'self'", "--pid")
        with _progress(f"capturing process {pid}") as progress:
            seen = capture(pid, freeze=freeze, semantics=semantics, pmd=pmd, swap=swap or "keep", progress=progress)
        label = f"process {seen.env['pid']} ({seen.env['comm']})"
        return _Source(seen.mm, semantics, label, list(seen.bound), notes + seen.notes)

    from ptebatch import arch as archs
    from ptebatch import snapshot as snapshots

    assert snapshot is not None
    with _progress(f"reading {snapshot}"):
        loaded = snapshots.load(snapshot)
    need = archs.unmet(loaded.mm.layout, semantics.switches)
    if need:
        hint = " ".join(f"--set {switch}" for switch in need)
        raise SemanticsError(f"{snapshot} has {loaded.mm.layout.name} entries: that needs {hint}")
    return _Source(loaded.mm, semantics, loaded.source or os.path.basename(snapshot), list(loaded.bound), notes)


@contextmanager
def _hints(pid: str | None) -> Iterator[None]:
    """Say what to do on the command line about an entry that cannot be copied."""
    try:
        yield
    except UnsupportedEntryError as error:
        hint = "; --swap drop leaves out what is not present" if pid is not None else ""
        raise UnsupportedEntryError(f"{error}{hint}", address=error.address, kind=error.kind) from error


def _heading(source: _Source, *more: tuple[str, str]) -> RenderableType:
    from ptebatch import report

    kernel = f"{source.semantics.label}, {source.mm.layout.name}"
    return report.pairs_table([("memory", source.label), ("kernel", kernel), *more])


def _inferred(bound: list[str]) -> list[RenderableType | str]:
    from ptebatch import report

    return [report.inferred_text(bound)] if bound else []


def _examples(*lines: str) -> str:
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])  # \b: keep the lines as they are


# --- commands ---------------------------------------------------------------------------------------------------------
def _version(wanted: bool) -> None:
    if wanted:
        import ptebatch

        sys.stdout.write(f"ptebatch {ptebatch.__version__}\n")
        raise typer.Exit


@app.callback(
    epilog=_examples(
        "ptebatch bench                                    single, batched and naive, side by side",
        "ptebatch fork --workload size=1GiB,folio=64KiB    what fork would do, in counts",
        "ptebatch explain --pid 1234                       why its batches end",
        "ptebatch COMMAND --help                           more examples",
    )
)
def ptebatch(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Linux fork()'s batched page-table copy, outside the kernel.

    Exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong command line, 130 interrupted.
    """


@app.command(
    epilog=_examples(
        "ptebatch bench",
        "ptebatch bench --size 256MiB --folio 4KiB+64KiB+2MiB --peers",
        "ptebatch bench --pid 1234",
        "ptebatch bench --rounds 20 --json > bench.json",
        "ptebatch bench --limit --size 1GiB",
        "ptebatch bench --kernel-layout",
        "ptebatch bench --live --size 1GiB",
        "ptebatch bench --plot bench.svg",
        "ptebatch bench --compare before.json after.json",
    )
)
def bench(
    size: Annotated[
        str | None, typer.Option("--size", metavar="SIZE", help="Memory to copy. [default: 1GiB]", show_default=False)
    ] = None,
    folio: Annotated[
        str | None,
        typer.Option(
            "--folio", metavar="SIZE+...", help="Folio sizes. [default: all from 4KiB to 2MiB]", show_default=False
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="Times that everything is measured.", show_default=False)
    ] = None,
    pid: Annotated[
        str | None,
        typer.Option(
            "--pid",
            metavar="PID|self",
            help="The real process to capture and copy. [default: one started for it]",
            show_default=False,
        ),
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also measure NumPy, Numba (if installed) and plain C.")
    ] = False,
    limit: Annotated[
        bool,
        typer.Option(
            "--limit",
            help="Compare with the streaming limit and with what is to be reached, for folio orders 0 to 9 and mixed. "
            "1GiB also with peers, other memory and kernels; 1TiB beside 64GiB, in 12 GiB of memory. [default size: "
            "128MiB, 1GiB and 64GiB]",
        ),
    ] = False,
    kernel_layout: Annotated[
        bool,
        typer.Option("--kernel-layout", help="Copy in a memory layout like the kernel's, beside the published change."),
    ] = False,
    live: Annotated[
        bool,
        typer.Option("--live", help="Measure this machine's kernel: fork, exit and munmap by folio size (needs root)."),
    ] = False,
    plot: Annotated[
        str | None,
        typer.Option(
            "--plot", metavar="FILE.png|svg", help="Also draw it: time and change by folio size.", show_default=False
        ),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--compare",
            metavar="BEFORE.json AFTER.json",
            help="Measure nothing: compare what two runs printed with --json.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure single-PTE, batched and naive copying.

    On synthetic address spaces, folio size by folio size, and on the page tables of a real process; with the streaming
    limit of this machine and the published figures beside it.
    """
    from ptebatch import workload

    given: dict[str, Any] = {}
    try:
        if size is not None:
            given["size"] = workload.parse(f"size={size}").size
        if folio is not None:
            given["folios"] = workload.parse(f"folio={folio}").folio
    except PtebatchError as error:
        _usage(str(error), "--folio" if "size" in given or size is None else "--size")
    if rounds is not None:
        given["rounds"] = rounds
    if pid is not None:
        if pid != "self" and not pid.isdecimal():
            _usage(f"{pid!r} is neither a process id nor 'self'", "--pid")
        given["pid"] = pid
    if peers:
        given["peers"] = True
    modes = {"--limit": limit, "--kernel-layout": kernel_layout, "--live": live, "--compare": compare is not None}
    mode = "".join(name for name, wanted in modes.items() if wanted)
    if mode not in ("", *modes):
        raise _Usage(f"{' and '.join(name for name, wanted in modes.items() if wanted)}: choose one of them")
    for option, name, where in (("--pid", "pid", ("",)), ("--peers", "peers", ("", "--limit"))):
        if name in given and mode not in where:
            _usage(f"does not go with {mode}", option)
    if compare is not None and given:
        _usage("is on its own: it measures nothing", "--compare")
    if plot is not None:
        _check_plot(plot, mode)
    from ptebatch import bench as benchmarks

    runs: dict[str, Callable[..., dict[str, Any]]] = {
        "": benchmarks.run_bench,
        "--limit": benchmarks.run_limit,
        "--kernel-layout": benchmarks.run_kernel_layout,
        "--live": benchmarks.run_live,
    }
    if compare is not None:
        document = benchmarks.compare(*map(benchmarks.load, compare))
    else:
        with _progress("measuring", still=True) as progress:
            document = runs[mode](progress=progress, **given)
    _notes(document["notes"])
    if plot is not None:
        from ptebatch import report

        report.bench_plot(document["rows"], document["env"]).savefig(plot)
    if as_json:
        _json(document)
        return
    from ptebatch import report

    env = {name: value for name, value in document["env"].items() if isinstance(value, str | int | float)}
    blocks: list[RenderableType | str] = [report.pairs_table((name, str(value)) for name, value in env.items())]
    tables, notes = report.BENCH[document["mode"]]
    for heading, table in tables(document["rows"]):
        blocks.append(report.titled(heading, table))
    _print(*blocks, *([notes(document["rows"])] if notes else []))


def _check_plot(path: str, mode: str) -> None:
    """Refuse what could not be drawn before anything is measured."""
    import importlib.util

    if mode:
        _usage(f"does not go with {mode}", "--plot")
    if not path.endswith((".png", ".svg")):
        _usage(f"{path!r} ends neither in .png nor in .svg", "--plot")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        _usage(f"there is no folder {folder!r}", "--plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise PtebatchError("--plot needs matplotlib: pip install 'ptebatch[plot]'")


@app.command(
    epilog=_examples(
        "ptebatch fork --workload size=1GiB,folio=64KiB,seed=1",
        "ptebatch fork --workload size=256MiB,folio=4KiB+64KiB+2MiB --no-batching",
        "ptebatch fork --pid self --by-vma",
        "ptebatch fork --pid 1234 --freeze --semantics v6.8 --json",
        "ptebatch fork redis.ptes --impl reference --set mm_id=off --set large_reuse=never",
        "ptebatch fork --workload size=64GiB,folio=64KiB --threads 2",
    )
)
def fork(
    snapshot: Snapshot = None,
    pid: Pid = None,
    workload: WorkloadText = None,
    arch: Arch = None,
    impl: Impl = "core",
    no_batching: NoBatching = False,
    semantics: SemanticsName = None,
    switches: Switches = None,
    by_vma: ByVma = False,
    freeze: Freeze = False,
    swap: Swap = None,
    threads: Annotated[
        int, typer.Option("--threads", min=1, max=64, help="Copy page tables on so many CPUs; results are the same.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Fork an address space in the model, and count.

    The process itself is not forked and not changed. What a live process does not show (write, accessed and dirty
    bits, for example) is inferred and listed: counts that depend on it are a bound.
    """
    source = _load(snapshot, pid, workload, semantics, switches, freeze, swap, arch, "keep")
    from ptebatch.fork import ForkPlan, ForkStats
    from ptebatch.mm import digest

    with _hints(pid), _progress("forking") as progress:
        batching = False if no_batching else None
        plan = ForkPlan(source.mm, semantics=source.semantics, batching=batching, impl=impl, threads=threads)
        copied: list[tuple[Vma, Any]] = []

        def each(vma: Vma, counts: Any) -> None:
            copied.append((vma, counts))
            progress(len(copied), len(plan.contexts))

        stats = plan.run(each)
    with _progress("computing the digest"):
        state = digest([source.mm, plan.child], source.mm.folios, source.semantics)
    vmas: list[dict[str, Any]] = []
    for vma, counts in copied if by_vma else ():
        own = ForkStats.from_array(counts).to_dict()
        vmas.append({"start": vma.start, "end": vma.end, "name": vma.name, "stats": own})

    _notes(source.notes)
    document = {
        "digest": state,
        "stats": stats.to_dict(),
        "arch": source.mm.layout.name,
        "semantics": source.semantics.label,
        "impl": impl,
        "batching": plan.batching,
        "bound": source.bound,
    }
    if as_json:
        _json(document | {"vmas": vmas} if by_vma else document)
        return
    from ptebatch import report

    counters = stats.to_dict()
    path = f"{impl}, {'batched' if plan.batching else 'one PTE at a time'}"
    blocks: list[RenderableType | str] = [
        _heading(source, ("path", path), ("digest", state)),
        report.counts_table({"count": counters}, per="ptes_present"),
    ]
    if counters["batches"]:
        blocks.append(report.hist_table(counters["batch_hist"]))
    if vmas:
        rows = [{**vma, "ptes": vma["stats"]["ptes_present"], "batches": vma["stats"]["batches"]} for vma in vmas]
        blocks.append(report.vma_table(rows, short=sys.stdout.isatty()))
    _print(*blocks, *_inferred(source.bound))


@app.command(
    epilog=_examples(
        "ptebatch diff --workload size=64MiB,guard=0.1 --semantics v6.12 --semantics v6.18",
        "ptebatch diff --workload size=4MiB,folio=64KiB --semantics v6.8 --semantics v6.9",
        "ptebatch diff --workload size=4MiB,guard=0.1 --semantics v6.18 --set guard_markers=off",
        "ptebatch diff --arch arm64-4k --workload folio=2MiB --semantics v6.18 --set pte_batch_hint=off",
    )
)
def diff(
    snapshot: Snapshot = None,
    pid: Pid = None,
    workload: WorkloadText = None,
    arch: Arch = None,
    impl: Impl = "core",
    no_batching: NoBatching = False,
    semantics: Annotated[
        list[str] | None,
        typer.Option(
            "--semantics",
            metavar="VERSION",
            help="Give it twice: the two kernels to compare. Once: that kernel, and itself with what --set changes.",
            show_default=False,
        ),
    ] = None,
    switches: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SWITCH=on|off",
            help="Change one behaviour of the second kernel; can be repeated.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Rows to print of each kind; JSON has all.")] = 10,
    freeze: Freeze = False,
    swap: Swap = None,
    as_json: Json = False,
) -> None:
    """Fork under the rules of two kernels, and list what differs.

    Entries of parent and child, pages, folios, swap slots, rss, and the counts of what was done.
    """
    names = semantics or []
    if len(names) not in (1, 2):
        _usage("give it twice, or once together with --set", "--semantics")
    if len(names) == 1 and not switches:
        _usage("compare it with what? Give --semantics a second time, or --set SWITCH=on|off", "--semantics")
    source = _load(snapshot, pid, workload, names[0], None, freeze, swap, arch, "keep")
    second, notes = _resolve_semantics(names[-1], switches, live=False)
    from ptebatch.diff import diff_forks

    with _hints(pid), _progress("forking twice"):
        found = diff_forks(
            source.mm, source.semantics, second, batching=False if no_batching else None, impl=impl
        ).to_dict()
    _notes(source.notes + notes)
    if as_json:
        _json(found | {"arch": source.mm.layout.name, "impl": impl, "bound": source.bound})
        return
    from ptebatch import report

    heading = [("memory", source.label), ("a", found["a"]), ("b", found["b"]), *report.diff_summary(found)]
    blocks: list[RenderableType | str] = [report.pairs_table(heading)]
    blocks += [report.titled(title, table) for title, table in report.diff_tables(found, limit)]
    _print(*blocks, *_inferred(source.bound))


@app.command(
    epilog=_examples(
        "ptebatch wrprotect --workload size=1GiB,folio=64KiB,readonly=0.25",
        "ptebatch wrprotect --pid 1234 --by-vma",
        "ptebatch wrprotect redis.ptes --no-batching --json",
    )
)
def wrprotect(
    snapshot: Snapshot = None,
    pid: Pid = None,
    workload: WorkloadText = None,
    arch: Arch = None,
    impl: Impl = "core",
    no_batching: NoBatching = False,
    semantics: SemanticsName = None,
    switches: Switches = None,
    by_vma: ByVma = False,
    freeze: Freeze = False,
    swap: Swap = None,
    as_json: Json = False,
) -> None:
    """Write-protect in the model, entry by entry and batched.

    Entries end up the same both ways; the number of calls does not.
    """
    source = _load(snapshot, pid, workload, semantics, switches, freeze, swap, arch)
    from ptebatch.protect import wrprotect_range

    _both_ways(source, wrprotect_range, "fork_batching", "write-protecting", pid, impl, no_batching, by_vma, as_json)


@app.command(
    epilog=_examples(
        "ptebatch zap --workload size=1GiB,folio=64KiB",
        "ptebatch zap --pid 1234 --by-vma",
        "ptebatch zap redis.ptes --semantics v6.8 --json",
    )
)
def zap(
    snapshot: Snapshot = None,
    pid: Pid = None,
    workload: WorkloadText = None,
    arch: Arch = None,
    impl: Impl = "core",
    no_batching: NoBatching = False,
    semantics: SemanticsName = None,
    switches: Switches = None,
    by_vma: ByVma = False,
    freeze: Freeze = False,
    swap: Swap = None,
    as_json: Json = False,
) -> None:
    """Unmap in the model, entry by entry and batched.

    Everything goes, as when a process exits; a live process itself is not changed. The memory ends up the same both
    ways; the number of calls does not.
    """
    source = _load(snapshot, pid, workload, semantics, switches, freeze, swap, arch)
    from ptebatch.zap import zap_range

    walk = partial(zap_range, drop_markers=True)
    _both_ways(source, walk, "zap_batching", "unmapping", pid, impl, no_batching, by_vma, as_json)


def _both_ways(
    source: _Source,
    walk: Callable[..., WalkStats],
    switch: str,
    doing: str,
    pid: str | None,
    impl: str,
    no_batching: bool,
    by_vma: bool,
    as_json: bool,
) -> None:
    """Walk every VMA entry by entry and, if the kernel does, batched; show the counts side by side."""
    from ptebatch.impls import resolve_batching
    from ptebatch.mm import copy_state, digest

    mm = source.mm
    modes = [False] if not resolve_batching(source.semantics, False if no_batching else None, switch) else [False, True]
    names = {False: "entry by entry", True: "batched"}
    totals: dict[bool, dict[str, Any]] = {}
    digests: dict[bool, str] = {}
    vmas: list[dict[str, Any]] = []
    with _hints(pid), _progress(doing) as progress:
        for batching in modes:
            mine = mm if batching is modes[-1] else copy_state(mm)
            hist: dict[str, int] = {}
            total: dict[str, Any] = {}
            for i, vma in enumerate(mine.vmas):
                stats = walk(
                    mine, vma.start, vma.end, semantics=source.semantics, batching=batching, impl=impl
                ).to_dict()
                for nr, n in stats["batch_hist"].items():
                    hist[nr] = hist.get(nr, 0) + n
                for name, n in stats.items():
                    if name != "batch_hist":
                        total[name] = total.get(name, 0) + n
                if by_vma and batching is modes[-1]:
                    vmas.append({"start": vma.start, "end": vma.end, "name": vma.name, "stats": stats})
                progress(i + 1, len(mine.vmas))
            total["batch_hist"] = dict(sorted(hist.items(), key=lambda item: int(item[0])))
            totals[batching] = total
            digests[batching] = digest([mine], mine.folios, source.semantics)
    if len(set(digests.values())) != 1:
        _fail("entry by entry and batched left different states: please report this with the command line")

    batching = modes[-1]
    _notes(source.notes)
    if as_json:
        document = {
            "digest": digests[batching],
            "stats": totals[batching],
            "stats_unbatched": totals[False],
            "arch": mm.layout.name,
            "semantics": source.semantics.label,
            "impl": impl,
            "batching": batching,
            "bound": source.bound,
        }
        _json(document | {"vmas": vmas} if by_vma else document)
        return
    from ptebatch import report

    blocks: list[RenderableType | str] = [
        _heading(source, ("path", f"{impl}, {names[batching]}"), ("digest", digests[batching])),
        report.counts_table({names[mode]: totals[mode] for mode in modes}, change=True),
    ]
    if totals[batching].get("batches"):
        blocks.append(report.hist_table(totals[batching]["batch_hist"]))
    if vmas:
        rows = [{**vma, "ptes": vma["stats"]["ptes_present"], "batches": vma["stats"]["batches"]} for vma in vmas]
        blocks.append(report.vma_table(rows, short=sys.stdout.isatty()))
    _print(*blocks, *_inferred(source.bound))


def _folio_bytes(text: str) -> int:
    from ptebatch import workload

    key, equals, value = text.partition("=")
    if not equals or key.strip() != "folio":
        _usage(f"{text!r} is not folio=SIZE, as folio=64KiB", "--what-if")
    try:
        (size,) = workload.parse(f"folio={value}").folio
    except PtebatchError as error:
        _usage(str(error), "--what-if")
    except ValueError:
        _usage("names several sizes: repeat --what-if for each", "--what-if")
    return size


@app.command(
    epilog=_examples(
        "ptebatch explain --workload size=1GiB,folio=64KiB,clean=0.1,granularity=page",
        "ptebatch explain --pid 1234 --by-vma",
        "ptebatch explain --pid 1234 --what-if folio=64KiB --what-if folio=2MiB",
        "ptebatch explain redis.ptes --semantics v6.12 --json",
    )
)
def explain(
    snapshot: Snapshot = None,
    pid: Pid = None,
    workload: WorkloadText = None,
    arch: Arch = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            "--what-if",
            metavar="folio=SIZE",
            help="Lay the same memory out in folios of this size and compare; can be repeated.",
            show_default=False,
        ),
    ] = None,
    impl: Impl = "core",
    semantics: SemanticsName = None,
    switches: Switches = None,
    by_vma: ByVma = False,
    freeze: Freeze = False,
    swap: Swap = None,
    as_json: Json = False,
) -> None:
    """Say why fork's batches end; try another folio size.

    Every batch has one cause: the end of a VMA, table or folio, a neighbour that is not present or maps another page,
    or the bits in which the two entries differ.
    """
    sizes = [_folio_bytes(text) for text in what_if or ()]
    source = _load(snapshot, pid, workload, semantics, switches, freeze, swap, arch)
    from ptebatch import explain as explaining
    from ptebatch.fork import fork as fork_mm
    from ptebatch.mm import copy_state
    from ptebatch.workload import format_size

    with _progress("finding batches"):
        found = explaining.explain_batches(source.mm, semantics=source.semantics, by_vma=by_vma)
        eligible = explaining.eligibility(source.mm)
    compared: list[tuple[int | None, dict[str, Any]]] = []
    if sizes:
        with _hints(pid), _progress("laying memory out anew") as progress:
            for i, size in enumerate((None, *sizes)):
                other = copy_state(source.mm) if size is None else explaining.what_if(source.mm, size)
                stats = fork_mm(other, semantics=source.semantics, impl=impl).stats.to_dict()
                compared.append((size, stats))
                progress(i + 1, 1 + len(sizes))

    def ends(part: Any) -> dict[str, Any]:
        hist = {str(nr): int(n) for nr, n in enumerate(part.batch_hist) if n}
        return {
            "ptes": part.ptes,
            "batches": part.batches,
            "mean_nr": part.mean,
            "ends": part.to_rows(),
            "batch_hist": hist,
        }

    vmas = [{"start": vma.start, "end": vma.end, "name": vma.name, **ends(vma)} for vma in found.vmas]
    _notes(source.notes)
    if as_json:
        document = {
            **ends(found.total),
            "vmas_copied": found.vmas_copied,
            "vmas_skipped": found.vmas_skipped,
            "arch": source.mm.layout.name,
            "semantics": source.semantics.label,
            "eligible": eligible,
            "bound": source.bound,
        }
        if by_vma:
            document["vmas"] = vmas
        if sizes:
            document["what_if"] = [{"folio_bytes": size, "stats": stats} for size, stats in compared]
        _json(document)
        return
    from ptebatch import report

    total = found.total
    vmas_text = f"{found.vmas_copied} copied, {found.vmas_skipped} not"
    batches_text = f"{total.batches:,} of {total.ptes:,} PTEs, {total.mean:.2f} each"
    blocks: list[RenderableType | str] = [_heading(source, ("VMAs", vmas_text), ("batches", batches_text))]
    if total.batches:
        blocks += [report.ends_table(total.to_rows()), report.hist_table(ends(total)["batch_hist"])]
    if vmas:
        rows = [{**vma, "end_cause": vma["ends"][0]["cause"] if vma["ends"] else None} for vma in vmas]
        blocks.append(report.vma_table(rows, short=sys.stdout.isatty()))
    if compared:
        columns = {"as it is" if size is None else format_size(size): stats for size, stats in compared}
        blocks.append(report.counts_table(columns, change=True))
    title = "what hardware could hold as one, not what a kernel does"
    blocks.append(report.titled(title, report.eligible_table(eligible)))
    _print(*blocks, *_inferred(source.bound))


@app.command(
    epilog=_examples(
        "ptebatch capture 1234 -o redis.ptes",
        "ptebatch capture 1234 --freeze -o redis.ptes --json",
        "ptebatch fork redis.ptes",
    )
)
def capture(
    pid: Annotated[str, typer.Argument(metavar="PID", help="The process to read, or 'self'.")],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help="Where to write the snapshot.", show_default=False)
    ],
    semantics: SemanticsName = None,
    freeze: Freeze = False,
    swap: Swap = None,
    as_json: Json = False,
) -> None:
    """Read a process's page tables into a snapshot file.

    Needs the right to read /proc/PID (the same user, or root); PFNs and folios need CAP_SYS_ADMIN as well. Without it
    they are made up and labelled so. The file is complete or not there.
    """
    if pid != "self" and not pid.isdecimal():
        _usage(f"{pid!r} is neither a process id nor 'self'", "PID")
    import numpy as np

    from ptebatch import snapshot as snapshots
    from ptebatch.capture import capture as read_process
    from ptebatch.mm import pte_pfns

    kernel, notes = _resolve_semantics(semantics, None, live=True)
    with _progress(f"capturing process {pid}") as progress:
        seen = read_process(pid, freeze=freeze, semantics=kernel, swap=swap or "keep", progress=progress)
    mm, env = seen.mm, seen.env
    label = f"process {env['pid']} ({env['comm']}), Linux {env['kernel']}"
    with _progress(f"writing {output}"):
        snapshots.save(mm, output, bound=seen.bound, source=label)
    present, _ = pte_pfns(mm.layout, mm.entries)
    heads = np.asarray(mm.folios.heads()).astype(np.int64)
    orders = np.asarray(mm.folios.orders(heads))
    anon = np.asarray(mm.folios.flags(heads, "anon"))
    folios = [
        {
            "folio_bytes": mm.layout.page_size << order,
            "folios": int((orders == order).sum()),
            "pages": int((orders == order).sum()) << order,
            "anon_pages": int((anon & (orders == order)).sum()) << order,
        }
        for order in np.unique(orders).tolist()
    ]
    document: dict[str, Any] = {
        "file": output,
        "bytes": os.stat(output).st_size,
        "pid": env["pid"],
        "comm": env["comm"],
        "kernel": env["kernel"],
        "arch": mm.layout.name,
        "semantics": kernel.label,
        "pfns": seen.pfns,
        "seconds": env["seconds"],
        "vmas": len(mm.vmas),
        "tables": len(mm.vpns),
        "pmd_leaves": len(mm.pmd_vpns),
        "ptes_present": int(present.sum()),
        "folios": folios,
        "bound": list(seen.bound),
    }
    _notes([*notes, *seen.notes])
    if as_json:
        _json(document)
        return
    from ptebatch import report

    pfns = "real" if seen.pfns == "real" else "hidden: made up, and every folio taken to be one page"
    tables = f"{len(mm.vpns):,} with {document['ptes_present']:,} present PTEs, and {len(mm.pmd_vpns):,} PMD leaves"
    pairs = [
        ("process", label),
        ("file", f"{output}, {document['bytes']:,} bytes"),
        ("taken", f"in {env['seconds']:.2f} s"),
        ("VMAs", f"{len(mm.vmas):,}"),
        ("tables", tables),
        ("PFNs", pfns),
    ]
    _print(report.pairs_table(pairs), report.capture_table(folios), *_inferred(document["bound"]))


@app.command(
    epilog=_examples(
        "ptebatch verify",
        "ptebatch verify --list",
        "ptebatch verify --scenario 'anon-*' --scenario pinned-64k --json",
        "ptebatch verify --scenario 'random-*' --seed 7 --impl reference",
        "ptebatch verify --ktap > ptebatch.ktap",
        "ptebatch verify --restore",
    )
)
def verify(
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            "--scenario",
            metavar="NAME",
            help="Only these; * and ? match as in the shell; can be repeated.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random mixtures.")] = 1,
    impl: Impl = "core",
    semantics: SemanticsName = None,
    switches: Switches = None,
    names: Annotated[bool, typer.Option("--list", help="Show the scenarios and run none.")] = False,
    restore: Annotated[
        bool, typer.Option("--restore", help="Put back the settings that a killed run left changed; run nothing.")
    ] = False,
    ktap: Annotated[bool, typer.Option("--ktap", help="Print KTAP, as kernel CI reads it.")] = False,
    as_json: Json = False,
) -> None:
    """Compare the model with the running kernel (root).

    Subject processes build memory, the model predicts, they really fork, and everything that can be seen of parent and
    child is compared page by page. Settings of the machine (mTHP, KSM, swap, hugetlb) are borrowed under a lock and put
    back. Exit code 0 means no mismatch and no failure.
    """
    if as_json and ktap:
        raise _Usage("--json and --ktap exclude each other")
    from ptebatch import live, report, verify

    if restore:
        restored = live.restore()
        if as_json:
            _json({"restored": restored})
        else:
            _print("\n".join(restored) or "nothing was left changed")
        return
    try:
        chosen = verify.select(scenario or ())
    except PtebatchError as error:
        _usage(str(error), "--scenario")
    if names:
        listed = [{"name": one.name, "folio_bytes": one.folio, "doc": one.doc} for one in chosen]
        if as_json:
            _json({"scenarios": listed})
        else:
            _print(report.scenarios_table(listed))
        return
    kernel, notes = _resolve_semantics(semantics, switches, live=True)
    with _progress("verifying", still=True) as progress:
        document = verify.run(chosen, seed=seed, impl=impl, semantics=kernel, progress=progress)
    _notes(notes)
    if ktap:
        _print(report.ktap(document["scenarios"]))
    elif as_json:
        _json(document)
    else:
        pairs = [(name, str(document[name])) for name in ("kernel", "semantics", "seed", "impl")]
        pairs.append(("scenarios", report.verify_summary(document["scenarios"])))
        tables = report.verify_table(document["scenarios"]), report.quantities_table(document["quantities"])
        _print(report.pairs_table(pairs), *tables, *report.verify_reasons(document["scenarios"]))
    if any(row["status"] == "failed" for row in document["scenarios"]):
        raise typer.Exit(EXIT_FAILED)


@app.command(
    epilog=_examples(
        "ptebatch pte 0x8000000001234067",
        "ptebatch pte 0xfffffffffffff600 19088743 --json",
        "ptebatch pte --arch x86-64-v6.5 0x0200000001234065",
    )
)
def pte(
    entries: Annotated[list[str], typer.Argument(metavar="ENTRY...", help="Page-table entries, as 0x... or decimal.")],
    arch: Annotated[str, typer.Option("--arch", metavar="LAYOUT", help="x86-64, or an older kernel's.")] = "x86-64",
    as_json: Json = False,
) -> None:
    """Decode page-table entries."""
    from ptebatch import arch as archs

    if arch not in archs.LAYOUTS:
        _usage(f"no layout {arch!r}; the layouts are {', '.join(archs.LAYOUTS)}", "--arch")
    values = []
    for text in entries:
        try:
            value = int(text, 0)
        except ValueError:
            _usage(f"{text!r} is neither a 0x... nor a decimal number", "ENTRY...")
        if not 0 <= value < 1 << 64:
            _usage(f"{text!r} does not fit into 64 bits", "ENTRY...")
        values.append(value)
    decoded = [archs.decode(archs.LAYOUTS[arch], value) for value in values]
    if as_json:
        _json({"arch": arch, "entries": decoded})
        return
    from ptebatch import report

    _print(*map(report.decode_table, decoded))


# --- the gate ---------------------------------------------------------------------------------------------------------
gate_app = typer.Typer(invoke_without_command=True)
app.add_typer(gate_app, name="gate")

Baselines = Annotated[
    Path, typer.Option("--baselines", metavar="DIR", help="Directory of the committed files.", show_default=True)
]
LevelNames = Annotated[
    list[str] | None,
    typer.Option(
        "--level", metavar="NAME", help="Only this level; can be repeated. [default: all]", show_default=False
    ),
]


@contextmanager
def _level_progress() -> Iterator[Callable[[str], Progress]]:
    """Show a bar for one level after the other; yields what makes the next level's callback of its name."""
    with ExitStack() as stack:

        def begin(name: str) -> Progress:
            stack.close()
            return stack.enter_context(_progress(name, still=True))

        yield begin


@gate_app.callback(
    epilog=_examples(
        "ptebatch gate",
        "ptebatch gate --base origin/main --require counts --require time",
        "ptebatch gate --level counts",
        "ptebatch gate --json --junit gate.xml",
        'ptebatch gate baseline --reason "v6.20: fork reads each entry once less"',
    )
)
def gate(
    ctx: typer.Context,
    levels: LevelNames = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            "--require",
            metavar="NAME",
            help="Exit 2 if this level is inconclusive; can be repeated.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="REV", help="Revision to compare the time with; built for it.", show_default=False
        ),
    ] = None,
    baselines: Baselines = Path("benchmarks"),
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Also write JUnit XML.", show_default=False)
    ] = None,
    annotate: Annotated[
        bool, typer.Option("--annotations", help="Write annotations for GitHub to stderr. [default: if run by it]")
    ] = False,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Measure how often time is wrong: false alarms, slow-downs found.")
    ] = False,
    runs: Annotated[int, typer.Option("--runs", min=1, help="With --self-test: runs of each kind.")] = 200,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state", metavar="FILE", help="With --self-test: where to go on when run again.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Did the engine change? Counts, instructions, time, ratios.

    counts, instructions and ratios compare with committed files; time compares with another revision of the source
    tree, built and measured beside this one. Exit codes: 1 a level failed; 2 a level named by --require is
    inconclusive; 0 otherwise. What this machine cannot know is inconclusive, never a pass.
    """
    if ctx.invoked_subcommand is not None:
        return
    from ptebatch import gate as gating

    if self_test:
        with _progress("self-test", still=True) as tick:
            rates = gating.self_test(runs, state=state, progress=tick)
        if as_json:
            _json(rates)
            return
        from ptebatch import report

        _print(report.self_test_table(rates))
        return
    for option, names in (("--level", levels), ("--require", require)):
        for name in names or ():
            if name not in gating.LEVELS:
                _usage(f"{name!r} is no level; the levels are {', '.join(gating.LEVELS)}", option)
    with _level_progress() as progress:
        document = gating.run_gate(levels or (), base=base, baselines=baselines, progress=progress)
    code = gating.exit_code(document, require or ())
    document["exit_code"] = code
    if junit is not None:
        junit.write_text(gating.junit(document), encoding="utf-8")
    if annotate or os.environ.get("GITHUB_ACTIONS"):
        sys.stderr.writelines(f"{line}\n" for line in gating.github_annotations(document))
    if as_json:
        _json(document)
    else:
        from ptebatch import report

        found = report.gate_findings(document["levels"])
        _print(report.gate_table(document["levels"]), *([found] if found else []))
    if code:
        raise typer.Exit(code)


@gate_app.command(
    epilog=_examples(
        'ptebatch gate baseline --reason "batches across VMAs"',
        'ptebatch gate baseline --level counts --case "fork batched v6.18 size=1GiB,folio=64KiB" --reason "ours"',
    )
)
def baseline(
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why it changes.", show_default=False)],
    levels: LevelNames = None,
    cases: Annotated[
        list[str] | None,
        typer.Option(
            "--case",
            metavar="CASE",
            help="Add 'OPERATION PATH KERNEL WORKLOAD' to what is counted; can be repeated.",
            show_default=False,
        ),
    ] = None,
    baselines: Baselines = Path("benchmarks"),
) -> None:
    """Write what this build does as the baseline; the only way to change one."""
    from ptebatch import gate as gating

    for name in levels or ():
        if name not in gating.WRITERS:
            _usage(f"{name!r} has no baseline; these have: {', '.join(gating.WRITERS)}", "--level")
    with _level_progress() as progress:
        notes = gating.write_baselines(reason, levels or (), baselines=baselines, cases=cases or (), progress=progress)
    _print("\n".join(notes))
