"""What `ptebatch bench --live` measures: the right memory, the right operations."""

from __future__ import annotations

import pytest

from ptebatch import bench, live

pytestmark = pytest.mark.usefixtures("root")
SIZE = 16 << 20
PMD = 2 << 20


def test_fork_exit_and_munmap_of_every_mapping():
    wanted = {4096, 65536, PMD} & set(live.folio_sizes())
    seen: list[tuple[int, int]] = []
    done = bench.run_live(size=SIZE, folios=sorted(wanted), rounds=2, progress=lambda *step: seen.append(step))
    assert done["mode"] == "live"
    assert seen[-1] == (len(seen), len(seen))
    kernel = {(r["folio_bytes"], r["mapping"], r["operation"]): r for r in done["rows"] if r["source"] == "kernel"}
    mappings = {(folio, "pte") for folio in wanted} | ({(PMD, "pmd")} & {(folio, "pmd") for folio in wanted})
    assert {key[:2] for key in kernel} == mappings
    assert {key[2] for key in kernel} == set(bench.LIVE_OPERATIONS)
    for (folio, mapping, operation), row in kernel.items():
        assert (row["rounds"], row["ptes"], row["size_bytes"]) == (2, SIZE // 4096, SIZE)
        base = kernel[4096, "pte", operation]["ns_per_pte"]
        assert row["change"] == pytest.approx(row["ns_per_pte"] / base - 1)
        assert (row["ops"] is None) == (mapping == "pmd")
        if mapping == "pte":
            # The interpreter that holds the memory has small folios and zero pages besides.
            least = 4096 / folio if done["rows"][0]["path"] == "batched" else 1
            assert 0.9 * least <= row["ops"]["folio_ref_add"] <= 1
    core = [r for r in done["rows"] if r["source"] == "core"]
    assert {(r["folio_bytes"], r["path"]) for r in core} == {(f, p) for f in wanted for p in ("single", "batched")}
    assert all(r["rounds"] == 2 and r["ptes"] >= SIZE // 4096 for r in core)


def test_memory_in_other_folios_is_noticed(monkeypatch):
    """Without the settings there are no large folios."""
    monkeypatch.setattr(live, "mthp", lambda folio: {})
    if live.current(live.THP / "enabled") == "always":
        pytest.skip("transparent huge pages are on everywhere")
    sizes = [size for size in live.folio_sizes() if 4096 < size < PMD]
    if not sizes:
        pytest.skip("this kernel has one folio size")
    inherits = live.current(live.THP / f"hugepages-{sizes[0] >> 10}kB" / "enabled")
    if inherits != "never":
        pytest.skip("large folios are on")
    with pytest.raises(bench.StateError, match="memory is in folios of"):
        bench.run_live(size=PMD, folios=sizes[:1], rounds=1)
