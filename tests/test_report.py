"""Tables from plain rows: they fit, lose nothing, and are plain text where nobody looks."""

from __future__ import annotations

import pytest

from ptebatch import report
from ptebatch.arch import X86_64, decode

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
