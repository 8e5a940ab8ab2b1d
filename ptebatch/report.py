"""Tables from plain rows.

Every function takes the rows that ``--json`` prints, or what they are made of, and returns a table; nothing is printed
here. Tables fit into 80 columns as long as their rows do; what is too long is folded and never cut.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ptebatch.errors import ArgumentError
from ptebatch.workload import format_size

__all__ = [
    "bench_notes",
    "bench_tables",
    "bench_plot",
    "capture_table",
    "compare_tables",
    "counts_table",
    "decode_table",
    "ends_table",
    "format_count",
    "format_percent",
    "format_share",
    "gate_findings",
    "gate_table",
    "hist_table",
    "inferred_text",
    "kernel_layout_tables",
    "live_tables",
    "limit_notes",
    "limit_tables",
    "ktap",
    "pairs_table",
    "quantities_table",
    "render",
    "scenarios_table",
    "self_test_table",
    "titled",
    "verify_reasons",
    "verify_summary",
    "verify_table",
    "vma_table",
]

WIDE = 10_000
"""Width of a table that goes into a file: no row is folded."""
MOST_ROWS = 16
"""Rows of a table whose full length is unbounded; the last row then sums up the others."""


# --- plain text -------------------------------------------------------------------------------------------------------
def render(renderable: RenderableType, width: int = WIDE) -> str:
    """Return a table as plain text: no colour, no escape codes, no spaces at the end of a line."""
    file = io.StringIO()
    Console(file=file, width=width, color_system=None, force_terminal=False, highlight=False, emoji=False).print(
        renderable, markup=False
    )
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip("\n").split("\n")) + "\n"


def format_count(n: float | None) -> str:
    """Spell a count.

    >>> format_count(262144), format_count(15.9688), format_count(None)
    ('262,144', '15.97', '-')
    """
    if n is None:
        return "-"
    return f"{n:,}" if isinstance(n, int) else f"{n:,.2f}"


def format_share(share: float) -> str:
    """Spell a share of a whole.

    >>> format_share(0.5), format_share(0.00001), format_share(0.0)
    ('50.0%', '<0.1%', '0.0%')
    """
    return "<0.1%" if 0 < share < 0.0005 else f"{100 * share:.1f}%"


def format_percent(before: float | None, after: float | None) -> str:
    """Spell a relative change.

    >>> format_percent(4.0, 3.0), format_percent(3.0, 3.1), format_percent(3.0, 3.0), format_percent(0, 3)
    ('-25%', '+3.3%', '0%', '-')
    """
    if not before or after is None:
        return "-"
    change = 100 * (after / before - 1)
    digits = 0 if abs(change) >= 9.95 else 1
    return "0%" if after == before else f"{change:+.{digits}f}%"


def format_ns(ns: float | None) -> str:
    """Spell nanoseconds with three significant digits.

    >>> format_ns(0.4567), format_ns(54.66), format_ns(1234.5), format_ns(None)
    ('0.457', '54.7', '1234', '-')
    """
    if ns is None:
        return "-"
    return f"{ns:.0f}" if ns >= 100 else f"{ns:.1f}" if ns >= 10 else f"{ns:.2f}" if ns >= 1 else f"{ns:.3f}"


def _table(*columns: str, left: Sequence[str] = ()) -> Table:
    """Return an empty table; columns in `left` are text and may fold, the others are numbers and do not."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        text = column in left
        table.add_column(column, justify="left" if text else "right", overflow="fold", no_wrap=not text)
    return table


def titled(title: str, table: Table) -> RenderableType:
    """Put a line above a table."""
    return Group(Text(title, style="bold"), table)


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))  # not markup: a VMA may be called [heap]


# --- fork, wrprotect, explain -----------------------------------------------------------------------------------------
def pairs_table(pairs: Iterable[tuple[str, str]]) -> Table:
    """Names and values without a heading."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in pairs:
        _add(table, name, value)
    return table


def inferred_text(bound: Iterable[str], width: int = 80) -> str:
    """What was inferred and not seen: a capture's `bound`, as a list."""
    lines = ["Inferred, not seen; counts that depend on it are a bound:"]
    for text in bound:
        lines += textwrap.wrap(text, width, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def counts_table(columns: Mapping[str, Mapping[str, Any]], *, per: str | None = None, change: bool = False) -> Table:
    """Counters side by side.

    Parameters
    ----------
    columns : dict of str to dict
        Heading -> counters (`ForkStats.to_dict`). What is no number is left out; in a comparison, so is what is 0
        everywhere.
    per : str, optional
        With one column: also show each counter divided by this one.
    change : bool
        With several columns: after each but the first, its change against the first.
    """
    first = next(iter(columns.values()))
    names = [name for name, value in first.items() if isinstance(value, int | float)]
    headings = []
    for i, heading in enumerate(columns):
        headings += [heading, *(["change"] if change and i else [])]
    table = _table("counter", *headings, *([f"per {per}"] if per else []), left=("counter",))
    for name in names:
        if len(columns) > 1 and not any(counters.get(name) for counters in columns.values()):
            continue
        cells = []
        for i, counters in enumerate(columns.values()):
            cells.append(format_count(counters.get(name)))
            if change and i:
                cells.append(format_percent(first[name], counters.get(name)))
        if per:
            whole = first.get(per) if not name.startswith(("vmas", "tables")) else None
            cells.append(f"{first[name] / whole:.4f}" if whole else "-")
        _add(table, name, *cells)
    return table


def hist_table(batch_hist: Mapping[str, int]) -> Table:
    """Batches by length (`batch_hist` as ``--json`` has it): those lengths that hold the most entries."""
    lengths = sorted((int(nr), n) for nr, n in batch_hist.items())
    total = sum(nr * n for nr, n in lengths)
    table = _table("nr", "batches", "PTEs", "share of PTEs")
    kept = sorted(lengths, key=lambda item: (-item[0] * item[1], item[0]))
    if len(kept) > MOST_ROWS:
        kept = kept[: MOST_ROWS - 1]
    for nr, n in sorted(kept):
        _add(table, str(nr), format_count(n), format_count(nr * n), format_share(nr * n / total))
    others = [item for item in lengths if item not in kept]
    if others:
        ptes = sum(nr * n for nr, n in others)
        what = f"{len(others)} others"
        _add(table, what, format_count(sum(n for _, n in others)), format_count(ptes), format_share(ptes / total))
    return table


def ends_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show why batches end: rows of `BatchEnds.to_rows`."""
    table = _table("batches end at", "batches", "share", "PTEs", "mean nr", left=("batches end at",))
    shown, others = (rows[: MOST_ROWS - 1], rows[MOST_ROWS - 1 :]) if len(rows) > MOST_ROWS else (rows, [])
    for row in shown:
        _add(
            table, row["cause"], format_count(row["batches"]), format_share(row["share"]), format_count(row["ptes"]),
            f"{row['mean']:.2f}",
        )  # fmt: skip
    if others:
        batches = sum(row["batches"] for row in others)
        ptes = sum(row["ptes"] for row in others)
        share = sum(row["share"] for row in others)
        _add(
            table, f"{len(others)} other causes", format_count(batches), format_share(share), format_count(ptes),
            f"{ptes / batches:.2f}",
        )  # fmt: skip
    return table


def eligible_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show what memory some hardware could translate as one: rows of `ptebatch.explain.eligibility`."""
    table = _table("runs of", "for", "memory", "same A and D, too", left=("for",))
    for row in rows:
        shares = (row["share"], row["same_share"])
        size = f"{row['run_bytes'] >> 10}KiB"
        _add(table, size, row["hardware"], *("a page" if share is None else format_share(share) for share in shares))
    return table


def vma_table(rows: Sequence[Mapping[str, Any]], *, short: bool = False) -> Table:
    """One line per VMA.

    Parameters
    ----------
    rows : sequence of dict
        ``start`` and ``end`` in bytes, ``name``, ``ptes``, ``batches``; and ``end_cause``, which may be missing.
    short : bool
        Show only the last part of a path.
    """
    ends = any("end_cause" in row for row in rows)
    more = ("batches end at",) if ends else ()
    table = _table("start", "size", "PTEs", "batches", "mean nr", *more, "name", left=("name", *more))
    table.columns[0].justify = "left"
    for row in rows:
        name = row["name"].rpartition("/")[2] if short and row["name"].startswith("/") else row["name"]
        mean = f"{row['ptes'] / row['batches']:.2f}" if row["batches"] else "-"
        cells = [f"{row['start']:x}", format_size(row["end"] - row["start"])]
        cells += [format_count(row["ptes"]), format_count(row["batches"]), mean]
        _add(table, *cells, *([row["end_cause"] or "-"] if ends else []), name or "-")
    return table


# --- capture, pte -----------------------------------------------------------------------------------------------------
def capture_table(rows: Sequence[Mapping[str, int]]) -> Table:
    """Folios by size: rows with ``folio_bytes``, ``folios``, ``pages`` and ``anon_pages``."""
    table = _table("folio", "folios", "pages", "of them anon")
    for row in rows:
        cells = (row["folios"], row["pages"], row["anon_pages"])
        _add(table, format_size(row["folio_bytes"]), *map(format_count, cells))
    return table


def decode_table(decoded: Mapping[str, Any]) -> Table:
    """One entry in words: what `arch.decode` returns."""
    pairs = []
    for name, value in decoded.items():
        if name in ("value", "layout") or value is None:
            continue
        if isinstance(value, bool):
            text = "yes" if value else "no"
        elif isinstance(value, list):
            text = (" " if name == "bits" else " or " if name == "type_names" else ", ").join(value) or "-"
        elif name == "pfn":
            text = f"{value:#x}"
        else:
            text = str(value)
        pairs.append(("entry" if name == "hex" else name, text))
    return pairs_table(pairs)


# --- bench ------------------------------------------------------------------------------------------------------------
BENCH_COLUMNS = (
    ("naive", "naive", None),
    ("single", "core", "single"),
    ("batched", "core", "batched"),
    ("limit", "limit", None),
    ("pool", "pool", None),
)
"""Columns of the main table: heading, source and path of the rows they come from (None: whichever path there is)."""


def _memory(row: Mapping[str, Any]) -> str:
    return str(row.get("memory") or "synthetic")


def _ns(rows: Iterable[Mapping[str, Any]], source: str, path: str | None = None) -> float | None:
    for row in rows:
        if row["source"] == source and path in (None, row.get("path")):
            return row["ns_per_pte"]
    return None


def _by_folio(rows: Iterable[Mapping[str, Any]]) -> dict[int | None, list[Mapping[str, Any]]]:
    """Group rows by folio size, smallest first; what has no single size comes last."""
    groups: dict[int | None, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row.get("folio_bytes"), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: (item[0] is None, item[0] or 0)))


def _folio(size: int | None) -> str:
    return "mixed" if size is None else format_size(size)


def bench_tables(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Table]]:
    """Measurements side by side, in ns per PTE.

    Parameters
    ----------
    rows : sequence of dict
        One per measurement: ``source`` (core, naive, numpy, numba, c, limit, pool, published), ``path`` (single,
        batched), ``folio_bytes`` (None: mixed), ``ns_per_pte``; ``memory``, what was copied, where it is not synthetic.

    Returns
    -------
    list of (str, Table)
        A heading and a table: for every memory, then for all peers.
    """
    published = _by_folio(row for row in rows if row["source"] == "published")
    measured = [row for row in rows if row["source"] != "published"]
    tables = []
    for memory in dict.fromkeys(map(_memory, measured)):
        mine = _by_folio(row for row in measured if _memory(row) == memory)
        beside = memory == "synthetic" and bool(published)
        headings = [heading for heading, _, _ in BENCH_COLUMNS]
        headings[3:3] = ["change"]
        table = _table("folio", *headings, *(["single*", "batched*", "change*"] if beside else []))
        for size, group in mine.items():
            cells = [format_ns(_ns(group, source, path)) for _, source, path in BENCH_COLUMNS]
            cells[3:3] = [format_percent(_ns(group, "core", "single"), _ns(group, "core", "batched"))]
            if beside:
                before, after = (_ns(published.get(size, ()), "published", path) for path in ("single", "batched"))
                cells += [format_ns(before), format_ns(after), format_percent(before, after)]
            _add(table, _folio(size), *cells)
        tables.append((memory, table))

    known = {source for _, source, _ in BENCH_COLUMNS}
    synthetic = [row for row in measured if _memory(row) == "synthetic"]
    peers = list(dict.fromkeys(str(row["source"]) for row in synthetic if row["source"] not in known))
    if peers:
        table = _table("folio", "path", "core", *peers, left=("path",))
        for size, group in _by_folio(synthetic).items():
            for path in ("single", "batched"):
                times = [_ns(group, source, path) for source in ("core", *peers)]
                if any(ns is not None for ns in times[1:]):
                    _add(table, _folio(size), path, *map(format_ns, times))
        tables.append(("peers", table))
    return tables


def _mark(value: float, must: float | None, aim: float | None = None, *, least: bool = False) -> str:
    """Say whether a figure is what it must be."""
    if must is None:
        return ""
    if least:
        return "met" if value >= must else "below"
    return "over" if value > must else "aim" if aim is not None and value <= aim else "met"


def limit_tables(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Table]]:
    """What `ptebatch.bench.run_limit` measured: headings and tables.

    The core as a multiple of the streaming limit; then ratios of other kinds, topic by topic. Each beside what it must
    be, and whether it is: "met", "aim" where what is aimed at is reached too, "over" or "below" where it is not.
    """
    main = _table("size", "order", "single", "batched", "limit", "pool", "x single", "x batched", "must", "aim", "")
    for (size, order), group in _by_size_and_order(rows).items():
        plain = [row for row in group if not {"level", "threads"} & set(row)]
        columns = (("core", "single"), ("core", "batched"), ("limit", "limit"), ("pool", "pool"))
        found = {key: row for row in plain for key in columns if (row["source"], row["path"]) == key}
        must, aim = found["core", "batched"]["must"], found["core", "batched"]["aim"]
        core = [found[key] for key in columns[:2] if key in found]
        marks = [_mark(row["x_limit"], row["must"], row["aim"]) for row in core]
        _add(
            main, format_size(size), str(order),
            *(format_ns(found[key]["ns_per_pte"] if key in found else None) for key in columns),
            *(f"{found[key]['x_limit']:.2f}" if key in found else "-" for key in columns[:2]),
            _target(must), _target(aim), next((mark for mark in ("over", "met", "aim") if mark in marks), ""),
        )  # fmt: skip
    tables = [("the core as a multiple of the streaming limit; ns per PTE", main)]
    for title, heading, what, keys in LIMIT_RATIOS:
        table = _table("size", "order", *([what] if what else []), "ns", heading, "must", "", left=(what,))
        for row in rows:
            for key in keys:
                if key in row:
                    must, least = row.get(f"must_{key}"), key in LEAST
                    name = [_ratio_of(row, key)] if what else []
                    _add(
                        table, format_size(row["size_bytes"]), str(row["order"]), *name, format_ns(row["ns_per_pte"]),
                        _amount(key, row[key]), "-" if must is None else _amount(key, must, "g"),
                        _mark(row[key], must, least=least),
                    )  # fmt: skip
        if table.row_count:
            tables.append((title, table))
    writes = _table("operation", "ns", "x limit", "must", "", left=("operation",))
    for row in rows:
        if "operation" in row and row["source"] == "core":
            cells = (row["operation"], format_ns(row["ns_per_pte"]), f"{row['x_limit']:.2f}", _target(row["must"]))
            _add(writes, *cells, _mark(row["x_limit"], row["must"]))
    if writes.row_count:
        tables.append(("beside its own streaming loop", writes))
    return tables


LEAST = ("x_core", "x_core_call", "speedup")
"""Ratios that must be that much at least; all others at most."""
LIMIT_RATIOS = (
    ("peers as a multiple of the batched core", "x core", "peer", ("x_core",)),
    ("the same of whole calls, with the Python around both", "x call", "peer", ("x_core_call",)),
    ("order 0, batched as a multiple of single", "x single", "", ("x_single",)),
    ("lower SIMD levels", "ratio", "level", ("x_avx512", "x_c")),
    ("two threads: how many times as fast as one", "times", "", ("speedup",)),
    ("memory that is not plain, and other kernels", "x plain", "copy of", ("x_plain",)),
    ("more than 64 GiB", "x 64GiB", "", ("x_64gib",)),
    ("memory", "bytes", "of what", ("metadata_bytes_per_page", "peak_rss_bytes")),
)
"""Tables of ratios: title, heading of the ratio, of what says whose it is (none where there is one kind), keys."""


def _by_size_and_order(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[int, Any], list[Mapping[str, Any]]]:
    """Group rows of forks of plain memory for the preset asked for."""
    groups: dict[tuple[int, Any], list[Mapping[str, Any]]] = {}
    for row in rows:
        if "memory" not in row and "operation" not in row:
            groups.setdefault((row["size_bytes"], row["order"]), []).append(row)
    return groups


def _amount(key: str, value: float, digits: str = ".2f") -> str:
    """Spell a ratio, or bytes if they are many."""
    return f"{value / (1 << 30):{digits}} GiB" if key == "peak_rss_bytes" else f"{value:{digits}}"


def _ratio_of(row: Mapping[str, Any], key: str) -> str:
    """Whose ratio it is."""
    if key == "x_plain":
        kernel = "" if row["memory"] != row["semantics"] or row["path"] == "batched" else " (not batched)"
        return f"{row['memory']}{kernel}"
    if key in ("x_avx512", "x_c"):
        return f"{row['level']} to {'AVX-512' if key == 'x_avx512' else 'C'}"
    if key in ("metadata_bytes_per_page", "peak_rss_bytes"):
        return "memmap, per page" if key == "metadata_bytes_per_page" else "peak resident"
    return f"{row['source']} {row['path']}"


def limit_notes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say how many targets are met, and which are not."""
    met, missed = 0, []
    for row in rows:
        name = " ".join(
            [format_size(row["size_bytes"]), f"order {row['order']}", row["source"], row["path"]]
            + [str(row[key]) for key in ("level", "memory", "operation") if key in row]
            + [f"{row['threads']} threads" for _ in range("threads" in row)]
        )
        musts = {"x_limit" if key == "must" else key.removeprefix("must_"): must
                 for key, must in row.items() if key.startswith("must") and must is not None}  # fmt: skip
        for key, must in musts.items():
            if _mark(row[key], must, least=key in LEAST) == "met":
                met += 1
                continue
            bound = "at least" if key in LEAST else "at most"
            amounts = _amount(key, row[key]), _amount(key, must, "g")
            missed.append(f"- {name}: {key} is {amounts[0]}, must be {bound} {amounts[1]}")
    head = f"{met} of {met + len(missed)} targets are met{'; not met:' if missed else ''}"
    return "\n".join([head, *missed])


def kernel_layout_tables(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Table]]:
    """What `ptebatch.bench.run_kernel_layout` measured: a table for each kernel.

    Change from single to batched, the published change and the distance between the two in percentage points, and the
    operations for each entry that explain it.
    """
    published = _by_folio(row for row in rows if row["source"] == "published")
    mine = [row for row in rows if row["source"] == "kernel-layout"]
    tables = []
    for kernel in dict.fromkeys(row["semantics"] for row in mine):
        table = _table("folio", "single", "batched", "change", "published", "apart", "locked", "ref_add")
        for size, group in _by_folio(row for row in mine if row["semantics"] == kernel).items():
            pair = [_one(group, "kernel-layout", path) for path in ("single", "batched")]
            change = _change(*(row["ns_per_pte"] for row in pair))
            theirs = _change(*(_ns(published.get(size, ()), "published", path) for path in ("single", "batched")))
            locked = " > ".join(f"{row['locked_per_pte']:.2f}" for row in pair)
            references = " > ".join(f"{row['ops']['folio_ref_add']:.2f}" for row in pair)
            _add(
                table, _folio(size), *(format_ns(row["ns_per_pte"]) for row in pair), *map(_percent, (change, theirs)),
                "-" if change is None or theirs is None else f"{change - theirs:+.0f}", locked, references,
            )  # fmt: skip
        tables.append((f"kernel-like memory layout, {kernel}", table))
    return tables


def live_tables(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Table]]:
    """What `ptebatch.bench.run_live` measured, one line for each folio size and mapping."""
    table = _table(
        "folio", "mapped", "fork", "change", "exit", "change", "munmap", "change", "ref_add", "engine", left=("mapped",)
    )
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["folio_bytes"], row["mapping"]), []).append(row)
    for (size, mapping), group in groups.items():
        cells = []
        kernel = {row["operation"]: row for row in group if row["source"] == "kernel"}
        for row in (kernel[name] for name in ("fork", "exit", "munmap")):
            cells += [format_ns(row["ns_per_pte"]), _percent(100 * row["change"])]
        ops = kernel["fork"]["ops"]
        cells.append(f"{ops['folio_ref_add']:.3f}" if ops else "-")
        _add(table, format_size(size), mapping.upper(), *cells, format_ns(_ns(group, "core", "batched")))
    return [("this machine's kernel", table)]


LIVE_NOTES = """All times in ns per PTE (4 KiB of memory), also where PMDs map it.
- fork: the system call; exit: from telling the child to its being reaped;
  munmap: of the memory, after the child is gone; change: against 4 KiB folios
- ref_add: references on folios for each PTE, as the model counts them
- engine: the model's batched copy of the same page tables, in the same rounds"""


def compare_tables(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Table]]:
    """What `ptebatch.bench.compare` found: a table for each memory."""
    tables: dict[str, Table] = {}
    for row in rows:
        memory = _memory(row)
        if memory not in tables:
            tables[memory] = _table("what", "folio", "before", "after", "change", "x limit", "", left=("what",))
        parts = (row["source"], row["path"], row["operation"], row["mapping"] and row["mapping"].upper())
        _add(
            tables[memory], " ".join(dict.fromkeys(filter(None, parts))), _folio(row["folio_bytes"]),
            format_ns(row["before_ns_per_pte"]), format_ns(row["after_ns_per_pte"]), _percent(100 * row["change"]),
            "-" if row["change_x_limit"] is None else _percent(100 * row["change_x_limit"]),
            "" if row["apart"] else "~",
        )  # fmt: skip
    return list(tables.items())


COMPARE_NOTES = """Times in ns per PTE. x limit: the change as a multiple of each run's streaming limit.
~: the middle halves of the two touch: no difference to speak of"""


KERNEL_LAYOUT_NOTES = """Times in ns per PTE; counts for each PTE, single > batched.
- locked: instructions with a lock prefix, for counters, flags and entries
- ref_add: references taken on folios
- published: the change of the whole fork() system call when v6.8-rc1 got the
  batching series, on another machine; apart: percentage points between the two"""


def _change(before: float | None, after: float | None) -> float | None:
    return None if not before or after is None else 100 * (after / before - 1)


def _percent(change: float | None) -> str:
    return "-" if change is None else f"{change:+.0f}%"


def _one(rows: Iterable[Mapping[str, Any]], source: str, path: str) -> Mapping[str, Any]:
    return next(row for row in rows if (row["source"], row["path"]) == (source, path))


def _target(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def bench_notes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say what the columns of `bench_tables` mean."""
    naive = {row["size_bytes"] for row in rows if row["source"] == "naive" and row.get("size_bytes")}
    size = f", measured on {format_size(max(naive))}" if naive else ""
    texts = [
        f"naive: a plain Python loop over lists{size}",
        "single, batched: one PTE at a time, batches of a folio; change: between these two",
        "the fast lane serves both, so change is less than a kernel's: for that see ptebatch bench --kernel-layout",
        "limit: streaming over the same entries and nothing else",
        "pool: first touch of the child's fresh tables, not part of the other times",
    ]
    if any("memory" in row for row in rows):
        texts.append(
            "a process is read from /proc, which shows neither the write, accessed and dirty bits nor reference "
            "counts: they are assumed, and its batches are a bound"
        )
    if any(row["source"] == "published" for row in rows):
        texts.append(
            "*: published for the whole fork() system call, v6.8-rc1 without and with the batching series (v3), on an "
            "Intel Xeon Silver 4210R: another machine, and more work than the copy"
        )
    lines = ["All times in ns per PTE."]
    for text in texts:
        lines += textwrap.wrap(text, 80, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


# --- verify -----------------------------------------------------------------------------------------------------------
def scenarios_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """What there is to verify: name, folio size, what it is."""
    table = _table("scenario", "folio", "memory", left=("scenario", "memory"))
    for row in rows:
        _add(table, row["name"], format_size(row["folio_bytes"]), row["doc"])
    return table


def verify_summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Scenarios by status, checks and mismatches, in a line."""
    count = {status: sum(row["status"] == status for row in rows) for status in ("passed", "failed", "skipped")}
    checks, bad = (sum(row[name] for row in rows) for name in ("checks", "mismatches"))
    return ", ".join([*(f"{n} {status}" for status, n in count.items()), f"{checks:,} checks", f"{bad:,} mismatches"])


def verify_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Scenarios and what became of them."""
    table = _table("scenario", "status", "checks", "mismatches", "seconds", left=("scenario", "status"))
    for row in rows:
        numbers = format_count(row["checks"]), format_count(row["mismatches"]), f"{row['seconds']:.2f}"
        _add(table, row["name"], row["status"], *numbers)
    return table


def quantities_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Each quantity: whether it is seen, inferred or unseen, and by what."""
    table = _table("quantity", "shown", "checks", "mismatches", "by", left=("quantity", "shown", "by"))
    for row in rows:
        numbers = [format_count(row[name]) if row["checks"] else "-" for name in ("checks", "mismatches")]
        _add(table, row["name"], row["shown"], *numbers, row["by"])
    return table


def verify_reasons(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Why scenarios failed or were skipped, as text."""
    return [f"{row['name']} {row['status']}:\n{textwrap.indent(row['reason'], '  ')}" for row in rows if row["reason"]]


def ktap(rows: Sequence[Mapping[str, Any]]) -> str:
    """Scenarios as KTAP version 1 (Documentation/dev-tools/ktap.rst)."""
    lines = ["KTAP version 1", f"1..{len(rows)}"]
    for number, row in enumerate(rows, 1):
        lines += [f"# {row['name']}: {line}" for line in row["reason"].splitlines() if row["status"] == "failed"]
        directive = f" # SKIP {' '.join(row['reason'].split())}" if row["status"] == "skipped" else ""
        lines.append(f"{'not ok' if row['status'] == 'failed' else 'ok'} {number} {row['name']}{directive}")
    lines.append(f"# {verify_summary(rows)}")
    return "\n".join(lines)


def bench_plot(rows: Sequence[Mapping[str, Any]], env: Mapping[str, Any]) -> Any:
    """Draw what `ptebatch.bench.run_bench` measured: time and change by folio size.

    Parameters
    ----------
    rows : sequence of dict
    env : mapping
        What the caption names: cpu, kernel, compiler, commit.

    Returns
    -------
    matplotlib.figure.Figure
        To be saved with ``savefig``.

    Raises
    ------
    ArgumentError
        No synthetic memory was measured.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    synthetic = [row for row in rows if "memory" not in row and row["folio_bytes"]]
    sizes = sorted({row["folio_bytes"] for row in synthetic})
    if not sizes:
        raise ArgumentError("there is nothing to plot: measure one folio size at least")
    by = {(row["source"], row["path"], row["folio_bytes"]): row for row in synthetic}

    # Told apart by marker and dashes as well as by colour: prints in black and white, and for the colour-blind.
    lines = (
        ("naive", "single", "naive Python", "#999999", "v", ":"),
        ("core", "single", "single", "#0072B2", "o", "-"),
        ("core", "batched", "batched", "#D55E00", "s", "-"),
        ("limit", "limit", "streaming limit", "#000000", "", "--"),
    )
    changes = (
        ("core", "this engine", "#D55E00", "s", "-"),
        ("published", "published, whole fork()", "#009E73", "^", "--"),
    )
    figure = Figure(figsize=(7, 6.4), dpi=150, layout="constrained", facecolor="white")
    times, change = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for source, path, label, colour, marker, dashes in lines:
        points = [(size, by[source, path, size]) for size in sizes if (source, path, size) in by]
        if not points:
            continue
        x, found = zip(*points, strict=True)
        times.plot(
            x, [row["ns_per_pte"] for row in found], label=label, color=colour, marker=marker, linestyle=dashes
        )  # fmt: skip
        if marker:
            times.fill_between(
                x, [row["q1_ns_per_pte"] for row in found], [row["q3_ns_per_pte"] for row in found], color=colour,
                alpha=0.2, linewidth=0,
            )  # fmt: skip
    for source, label, colour, marker, dashes in changes:
        pairs = [(size, *(_ns([by.get((source, path, size), _NO_ROW)], source) for path in ("single", "batched")))
                 for size in sizes]  # fmt: skip
        drawn = [(size, _change(before, after)) for size, before, after in pairs if before and after]
        if drawn:
            change.plot(*zip(*drawn, strict=True), label=label, color=colour, marker=marker, linestyle=dashes)
    times.set_yscale("log")
    times.set_ylabel("ns per PTE")
    change.axhline(0, color="black", linewidth=0.8)
    change.set_ylabel("single to batched, %")
    change.set_xlabel("folio size")
    change.set_xscale("log", base=2)
    change.set_xticks(sizes, [format_size(size) for size in sizes])
    change.xaxis.set_minor_locator(NullLocator())
    times.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axes in (times, change):
        axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    total = max(row["size_bytes"] for row in synthetic if row["source"] != "published")
    figure.suptitle(f"Copying the page tables of {format_size(total)}; bands: middle half of the rounds", fontsize=10)
    named = (str(env[name]) for name in ("cpu", "kernel", "compiler", "commit") if name in env)
    figure.supxlabel("  ".join(named), fontsize=7, color="#555555")
    return figure


_NO_ROW: Mapping[str, Any] = {"source": "", "path": None}

BENCH: dict[str, tuple[Any, Any]] = {
    "bench": (bench_tables, bench_notes),
    "limit": (limit_tables, limit_notes),
    "kernel-layout": (kernel_layout_tables, lambda rows: KERNEL_LAYOUT_NOTES),
    "compare": (compare_tables, lambda rows: COMPARE_NOTES),
    "live": (live_tables, lambda rows: LIVE_NOTES),
}
"""By the ``mode`` of a document: what makes tables of its rows, and what explains those (or None)."""


# --- gate -------------------------------------------------------------------------------------------------------------
def gate_table(levels: Iterable[Mapping[str, Any]]) -> Table:
    """One line per level of the gate: rows of `ptebatch.gate.Level.to_dict`."""
    table = _table("level", "", "result", "", left=("result", ""))
    for level in levels:
        _add(table, str(level["level"]), level["name"], level["status"], level["summary"])
    return table


def gate_findings(levels: Iterable[Mapping[str, Any]]) -> str:
    """What the levels of the gate found, line by line, and their notes; empty if there is nothing to say."""
    lines = []
    for level in levels:
        lines += [f"{level['name']}: {finding['case']}: {finding['what']}" for finding in level["findings"]]
        lines += [f"{level['name']}: note: {note}" for note in level["notes"]]
    return "\n".join(lines)


def diff_summary(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lines above the tables of differences: what is the same, and what cannot be compared."""
    if found["same_state"]:
        state = "the same"
    else:
        kinds = (("entries", "entries"), ("pages", "page fields"), ("folios", "folio fields"), ("swap", "swap slots"))
        state = ", ".join(f"{format_count(len(found[key]))} {name} differ" for key, name in kinds if found[key])
    rows = [("state", state or "differs")]
    if found["outcomes"][0] != found["outcomes"][1]:
        rows += [(f"fork in {name}", outcome) for name, outcome in zip("ab", found["outcomes"], strict=True)]
    if found["not_compared"]:
        rows.append(("not compared", "kept by one kernel only: " + ", ".join(found["not_compared"])))
    return rows


def diff_tables(found: Mapping[str, Any], limit: int) -> list[tuple[str, Table]]:
    """Tables of what differs, at most `limit` rows of each, with their titles."""
    tables = []

    def add(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if rows:
            more = "" if len(rows) <= limit else f" (the first {limit} of {format_count(len(rows))})"
            table = _table(*columns, left=columns[:2])
            for row in rows[:limit]:
                _add(table, *row)
            tables.append((title + more, table))

    entry = "{:#018x}".format
    add(
        "entries",
        ("mm", "address", "a", "b"),
        [(row["mm"], f"{row['address']:#x}", entry(row["a"]), entry(row["b"])) for row in found["entries"]],
    )
    for kind, key in (("pages", "pfn"), ("folios", "pfn"), ("swap", "slot")):
        rows = [(f"{row[key]:#x}", row["field"], _value(row["a"]), _value(row["b"])) for row in found[kind]]
        add(kind, (key, "field", "a", "b"), rows)
    for kind in ("rss", "counters"):
        rows = [(name, "", format_count(a), format_count(b)) for name, (a, b) in found[kind].items()]
        add(kind, (kind, "", "a", "b"), rows)
    return tables


def _value(value: int | None) -> str:
    return "-" if value is None else format_count(value)


def self_test_table(rates: Mapping[str, Any]) -> Table:
    """Rates of `ptebatch.gate.self_test` with their 95 % intervals."""
    table = _table("slower by", "measured", "runs", "called slower", "95 % interval")

    def share(low: float, high: float) -> str:
        return f"{100 * low:.1f} - {100 * high:.1f} %"

    runs, alarms = str(rates["runs"]), format_share(rates["false_positive_rate"])
    _add(table, "nothing", "-", runs, alarms, share(*rates["interval"]))
    for slower, found in rates["detection"].items():
        measured = f"{100 * (rates['injected_ratio'][slower] - 1):+.1f} %"
        _add(table, f"{slower} %", measured, runs, format_share(found), share(*rates["detection_intervals"][slower]))
    return table
