"""Tables from plain rows: they fit, lose nothing, and are plain text where nobody looks."""

from __future__ import annotations

import pytest

from ptebatch import report
from ptebatch.arch import X86_64, decode
from ptebatch.errors import ArgumentError

HIST = {str(nr): 3 for nr in range(1, 41)}


def lines(renderable, width: int = report.WIDE) -> list[str]:
    return report.render(renderable, width).splitlines()


def test_plain_text_has_no_escapes_and_no_trailing_spaces():
    text = report.render(report.counts_table({"count": {"ptes_present": 3, "batches": 2}}, per="ptes_present"))
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
    assert text.endswith("\n") and not text.endswith("\n\n")


def test_counts_are_all_there_and_what_is_no_number_is_not():
    rows = lines(report.counts_table({"count": {"ptes_none": 0, "ptes_present": 262144, "batch_hist": {"16": 1}}}))
    assert rows[2].split() == ["ptes_none", "0"]
    assert rows[3].split() == ["ptes_present", "262,144"]
    assert len(rows) == 4


def test_a_comparison_shows_changes_and_drops_what_is_zero_everywhere():
    table = report.counts_table({"as it is": {"batches": 400, "x": 0}, "64KiB": {"batches": 100, "x": 0}}, change=True)
    assert [line.split() for line in lines(table)[2:]] == [["batches", "400", "100", "-75%"]]


def test_a_share_of_nothing_is_a_dash():
    table = report.counts_table({"count": {"vmas_copied": 0, "ptes_present": 0}}, per="ptes_present")
    assert [line.split()[-1] for line in lines(table)[2:]] == ["-", "-"]


def test_a_long_histogram_is_summed_up_and_loses_nothing():
    rows = [line.split() for line in lines(report.hist_table(HIST))[2:]]
    assert len(rows) == report.MOST_ROWS
    assert rows[-1][:2] == ["25", "others"]
    assert sum(int(row[-3].replace(",", "")) for row in rows) == 3 * len(HIST)
    assert sum(int(row[-2].replace(",", "")) for row in rows) == 3 * sum(range(1, 41))


def test_a_short_histogram_is_shown_whole():
    rows = [line.split()[0] for line in lines(report.hist_table(dict(list(HIST.items())[: report.MOST_ROWS])))[2:]]
    assert rows == [str(nr) for nr in range(1, report.MOST_ROWS + 1)]


def test_many_causes_are_summed_up():
    causes = [{"cause": f"c{i}", "batches": 2, "share": 0.05, "ptes": 6, "mean": 3.0} for i in range(20)]
    rows = lines(report.ends_table(causes))[2:]
    assert len(rows) == report.MOST_ROWS
    assert rows[-1].split() == ["5", "other", "causes", "10", "25.0%", "30", "3.00"]


VMA = {
    "start": 0x7F00_0000_0000,
    "end": 0x7F00_4000_0000,
    "name": "/usr/lib/python3.11/lib-dynload/_multiarray_umath.cpython-311-x86_64-linux-gnu.so",
    "ptes": 262144,
    "batches": 16384,
    "end_cause": "bits: dirty+NX",
}


def test_long_names_are_folded_and_never_cut():
    rows = lines(report.vma_table([VMA]), width=80)
    assert max(map(len, rows)) <= 80
    column = rows[0].index("name")
    assert "".join(row[column:] for row in rows[2:]) == VMA["name"]


def test_a_file_gets_one_line_per_vma():
    assert len(lines(report.vma_table([VMA]))) == 3
    short = lines(report.vma_table([VMA], short=True))[2]
    assert short.endswith("  _multiarray_umath.cpython-311-x86_64-linux-gnu.so")


def test_names_are_not_markup():
    vma = {**VMA, "name": "[heap]"}
    assert lines(report.vma_table([vma]))[2].endswith("[heap]")
    assert "[heap]" in report.render(report.pairs_table([("memory", "[heap] [bold]x")]))
    assert "[bold]" in report.render("[bold] :smile:")


def test_vmas_without_batches_and_without_causes():
    vma = {**VMA, "name": "", "ptes": 0, "batches": 0}
    del vma["end_cause"]
    rows = lines(report.vma_table([vma]))
    assert "batches end at" not in rows[0]
    assert rows[2].split() == ["7f0000000000", "1GiB", "0", "0", "-", "-"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0x8000000001234067, ["pfn           0x1234", "bits          P RW US A D NX", "write         yes"]),
        (0xFFFFFFFFFFFFF600, ["kind        marker", "markers     guard"]),
        (0, ["kind   none", "bits   -"]),
    ],
)
def test_entries_in_words(value, words):
    rows = lines(report.decode_table(decode(X86_64, value)))
    assert set(words) <= set(rows)


def test_what_was_inferred_is_wrapped():
    rows = report.inferred_text(["entries.write: " + "assumed " * 20, "folios: x"]).splitlines()
    assert max(map(len, rows)) <= 80
    assert [row[:2] for row in rows[1:]] == ["- ", "  ", "  ", "- "]


def measurement(source: str, path: str, ns: float, folio: int | None = 65536, **more) -> dict:
    row = {"source": source, "path": path, "ns_per_pte": ns, "folio_bytes": folio, "size_bytes": 1 << 30}
    return {**row, "arch": "x86-64", "semantics": "v6.19", **more}


BENCH = [
    measurement("core", "batched", 1.0),
    measurement("core", "single", 4.0),
    measurement("core", "single", 4.5, 4096),
    measurement("naive", "single", 1000.0, size_bytes=4 << 20),
    measurement("limit", "limit", 0.5),
    measurement("pool", "pool", 11.0),
    measurement("published", "single", 53.6),
    measurement("published", "batched", 39.8),
    measurement("numpy", "batched", 9.0),
    measurement("numpy", "single", 8.0),
    measurement("core", "single", 5.0, None, memory="process 1234 (redis)"),
]


def test_measurements_side_by_side():
    tables = dict(report.bench_tables(BENCH))
    assert list(tables) == ["synthetic", "process 1234 (redis)", "peers"]
    rows = [line.split() for line in lines(tables["synthetic"])]
    assert rows[0] == [
        "folio",
        "naive",
        "single",
        "batched",
        "change",
        "limit",
        "pool",
        "single*",
        "batched*",
        "change*",
    ]
    assert rows[2] == ["4KiB", "-", "4.50", "-", "-", "-", "-", "-", "-", "-"]
    assert rows[3] == ["64KiB", "1000", "4.00", "1.00", "-75%", "0.500", "11.0", "53.6", "39.8", "-26%"]
    assert lines(tables["process 1234 (redis)"])[2].split() == ["mixed", "-", "5.00", "-", "-", "-", "-"]
    assert [line.split() for line in lines(tables["peers"])[2:]] == [
        ["64KiB", "single", "4.00", "8.00"],
        ["64KiB", "batched", "1.00", "9.00"],
    ]


def test_a_full_table_of_measurements_fits():
    rows = [{**row, "folio_bytes": row["folio_bytes"] and 131072} for row in BENCH]
    text = report.bench_notes(rows)
    texts = [*lines(dict(report.bench_tables(rows))["synthetic"]), *text.splitlines()]
    assert max(map(len, texts)) <= 80
    assert "measured on 4MiB" in text


def limit_row(source: str, path: str, ns: float, **more) -> dict:
    return measurement(source, path, ns, order=4, must=None, aim=None, x_limit=ns / 0.5, **more)


LIMIT = [
    {**limit_row("core", "single", 4.0), "size_bytes": 1 << 30},
    {**limit_row("core", "batched", 2.0), "must": 3, "aim": 2.2},
    limit_row("limit", "limit", 0.5),
    limit_row("numpy", "batched", 30.0, x_core=15.0, must_x_core=20),
    limit_row("c", "single", 30.0, x_core=15.0, must_x_core=None),
    limit_row("core", "batched", 1.0, memory="plain", x_plain=1.0, must_x_plain=None),
    limit_row("core", "batched", 3.0, memory="vma=file", x_plain=3.0, must_x_plain=2.0),
    limit_row("core", "single", 1.5, memory="v6.8", semantics="v6.8", x_plain=1.5, must_x_plain=2.0),
    {**limit_row("core", "batched", 0.75, operation="wrprotect_range"), "must": 2.0},
    limit_row("limit", "batched", 0.5, operation="wrprotect_range"),
]


def test_the_kernel_s_layout():
    rows = [
        measurement("kernel-layout", path, ns, semantics="v6.9", locked_per_pte=locked, ops={"folio_ref_add": refs})
        for path, ns, locked, refs in (("single", 10.0, 4.0, 1.0), ("batched", 8.0, 3.0625, 0.0625))
    ]
    ((heading, table),) = report.kernel_layout_tables([*rows, *(row for row in BENCH if row["source"] == "published")])
    assert heading.endswith("v6.9")
    cells = ["64KiB", "10.0", "8.00", "-20%", "-26%", "+6", "4.00", ">", "3.06", "1.00", ">", "0.06"]
    assert lines(table)[2].split() == cells
    texts = [*lines(table), *report.KERNEL_LAYOUT_NOTES.splitlines()]
    assert max(map(len, texts)) <= 80
    assert lines(report.kernel_layout_tables(rows)[0][1])[2].split()[4:6] == ["-", "-"]


def test_the_live_kernel():
    def row(name: str, ns: float, change: float, mapping: str = "pte", ops=None) -> dict:
        more = {"operation": name, "mapping": mapping, "change": change, "ops": ops}
        return measurement("kernel", "batched", ns, 2 << 20, **more)

    times = (("fork", 50.0, 0.0), ("exit", 40.0, -0.25), ("munmap", 30.0, -0.5))
    rows = [row(*time, ops={"folio_ref_add": 0.002}) for time in times]
    rows.append(measurement("core", "batched", 2.5, 2 << 20, mapping="pte"))
    rows += [row(*time, "pmd") for time in times]
    ((_, table),) = report.live_tables(rows)
    assert [line.split() for line in lines(table)[2:]] == [
        ["2MiB", "PTE", "50.0", "+0%", "40.0", "-25%", "30.0", "-50%", "0.002", "2.50"],
        ["2MiB", "PMD", "50.0", "+0%", "40.0", "-25%", "30.0", "-50%", "-", "-"],
    ]
    assert max(map(len, [*lines(table), *report.LIVE_NOTES.splitlines()])) <= 80


def test_two_documents():
    row = {"memory": None, "operation": None, "mapping": None, "source": "core", "path": "single", "folio_bytes": 65536}
    row |= {"before_ns_per_pte": 4.0, "after_ns_per_pte": 5.0, "change": 0.25, "change_x_limit": None, "apart": False}
    other = {**row, "memory": "a process", "operation": "fork", "mapping": "pmd", "folio_bytes": None, "apart": True}
    tables = dict(report.compare_tables([row, other | {"change_x_limit": 0.5}]))
    assert lines(tables["synthetic"])[2].split() == ["core", "single", "64KiB", "4.00", "5.00", "+25%", "-", "~"]
    assert lines(tables["a process"])[2].split()[2:] == ["fork", "PMD", "mixed", "4.00", "5.00", "+25%", "+50%"]


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    spread = {"q1_ns_per_pte": 1.0, "q3_ns_per_pte": 2.0}
    figure = report.bench_plot([{**row, **spread} for row in BENCH], {"cpu": "a CPU"})
    times, change = figure.axes
    assert [line.get_label() for line in times.lines] == ["naive Python", "single", "batched", "streaming limit"]
    single = times.lines[1]
    assert (list(single.get_xdata()), list(single.get_ydata())) == ([4096, 65536], [4.5, 4.0])
    assert [round(float(y)) for line in change.lines for y in line.get_ydata()] == [-75, -26, 0, 0]
    for name in ("x.png", "x.svg"):
        figure.savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(ArgumentError, match="nothing to plot"):
        report.bench_plot([], {})


def test_targets_and_what_does_not_reach_them():
    tables = [[line.split() for line in lines(table)[2:]] for _, table in report.limit_tables(LIMIT)]
    assert tables == [
        [["1GiB", "4", "4.00", "2.00", "0.500", "-", "8.00", "4.00", "3", "2.2", "over"]],
        [
            ["1GiB", "4", "numpy", "batched", "30.0", "15.00", "20", "below"],
            ["1GiB", "4", "c", "single", "30.0", "15.00", "-"],
        ],
        [
            ["1GiB", "4", "plain", "1.00", "1.00", "-"],
            ["1GiB", "4", "vma=file", "3.00", "3.00", "2", "over"],
            ["1GiB", "4", "v6.8", "(not", "batched)", "1.50", "1.50", "2", "met"],
        ],
        [["wrprotect_range", "0.750", "1.50", "2", "met"]],
    ]
    assert len(report.limit_tables(LIMIT[:3])) == 1
    assert report.limit_notes(LIMIT).splitlines() == [
        "2 of 5 targets are met; not met:",
        "- 1GiB order 4 core batched: x_limit is 4.00, must be at most 3",
        "- 1GiB order 4 numpy batched: x_core is 15.00, must be at least 20",
        "- 1GiB order 4 core batched vma=file: x_plain is 3.00, must be at most 2",
    ]


def test_targets_of_every_kind():
    more = {"x_single": 1.01, "must_x_single": 1.02, "metadata_bytes_per_page": 16, "must_metadata_bytes_per_page": 16}
    rows = [
        {**LIMIT[0], "pool": 1}, {**LIMIT[1], "must": 5, "aim": 4, **more}, limit_row("limit", "limit", 0.5),
        limit_row("pool", "pool", 0.75),
        limit_row("core", "batched", 1.0, level="avx2", x_avx512=1.6, must_x_avx512=1.5),
        limit_row("core", "batched", 4.0, level="scalar", x_c=0.9, must_x_c=1),
        limit_row("core", "batched", 1.25, threads=2, speedup=1.6, must_speedup=1.7),
        limit_row("core", "batched", 1.25, x_64gib=1.2, must_x_64gib=1.3, peak_rss_bytes=10 << 30,
                  must_peak_rss_bytes=24 << 30) | {"size_bytes": 1 << 40},
    ]  # fmt: skip
    tables = {title: [line.split() for line in lines(table)[2:]] for title, table in report.limit_tables(rows)}
    assert list(tables.values()) == [
        [
            ["1GiB", "4", "4.00", "2.00", "0.500", "0.750", "8.00", "4.00", "5", "4", "aim"],
            ["1TiB", "4", "-", "1.25", "-", "-", "-", "2.50", "-", "-"],
        ],
        [["1GiB", "4", "2.00", "1.01", "1.02", "met"]],
        [
            ["1GiB", "4", "avx2", "to", "AVX-512", "1.00", "1.60", "1.5", "over"],
            ["1GiB", "4", "scalar", "to", "C", "4.00", "0.90", "1", "met"],
        ],
        [["1GiB", "4", "1.25", "1.60", "1.7", "below"]],
        [["1TiB", "4", "1.25", "1.20", "1.3", "met"]],
        [
            ["1GiB", "4", "memmap,", "per", "page", "2.00", "16.00", "16", "met"],
            ["1TiB", "4", "peak", "resident", "1.25", "10.00", "GiB", "24", "GiB", "met"],
        ],
    ]
    texts = [line for _, table in report.limit_tables(rows) for line in lines(table)]
    assert max(map(len, texts)) <= 80
    assert report.limit_notes(rows).splitlines() == [
        "6 of 8 targets are met; not met:",
        "- 1GiB order 4 core batched avx2: x_avx512 is 1.60, must be at most 1.5",
        "- 1GiB order 4 core batched 2 threads: speedup is 1.60, must be at least 1.7",
    ]
    assert report.limit_notes(rows[1:4]) == "3 of 3 targets are met"


def test_without_published_figures_there_is_no_star():
    rows = [row for row in BENCH if row["source"] != "published"]
    assert "*" not in report.render(dict(report.bench_tables(rows))["synthetic"]) + report.bench_notes(rows)
