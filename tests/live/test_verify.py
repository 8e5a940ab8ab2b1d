"""The model against the kernel the tests run on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ptebatch import arch, live, reference, verify
from ptebatch.folio import Folio, Page
from ptebatch.mm import MM_ANONPAGES, MM_FILEPAGES

pytestmark = pytest.mark.usefixtures("root")


def machine() -> dict[str, str]:
    """Everything verify may borrow, as it is now."""
    paths = [*live.THP.glob("**/enabled"), *live.THP.glob("khugepaged/*_[mt]*"), Path("/proc/swaps")]
    paths += [Path("/proc/sys/vm") / name for name in ("nr_hugepages", "compaction_proactiveness")]
    paths += [*Path("/sys/block").glob("zram*/disksize"), *Path("/sys/kernel/mm/ksm").glob("[prs]*")]
    counts = {"pages_scanned", "pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "pages_skipped"}
    counts |= {"stable_node_chains", "stable_node_dups", "run_time"}
    return {str(path): path.read_text() for path in paths if path.exists() and path.name not in counts}


def processes() -> set[int]:
    """Processes that descend from this one, zombies too, and its subjects wherever they are."""
    parents, found = {}, set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(Path(live.__file__).with_name("subject.py")) in command:
            found.add(int(path.name))
    for pid, parent in parents.items():
        while parent > 1 and parent != os.getpid():
            parent = parents.get(parent, 0)
        if parent == os.getpid():
            found.add(pid)
    return found


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left_changed() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    with live.Settings({}, wait=verify.PATIENCE):  # nobody else has them borrowed
        before = machine()
    running = processes()
    yield
    with live.Settings({}, wait=verify.PATIENCE):
        assert machine() == before
        assert not (live.state_dir() / "settings.json").exists()
    assert processes() <= running
    for directory in ("/dev/shm", tempfile.gettempdir()):
        assert not list(Path(directory).glob(f"ptebatch-{os.getpid()}-*"))


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


# --- a wrong model is found out ---------------------------------------------------------------------------------------
def no_anon_exclusive_clear(patch: pytest.MonkeyPatch) -> None:
    """Sharing an anonymous page leaves PG_anon_exclusive set."""
    clear = Page.anon_exclusive.fset
    patch.setattr(Page, "anon_exclusive", Page.anon_exclusive.setter(lambda page, on: clear(page, True)))


def batch_past_folio_end(patch: pytest.MonkeyPatch) -> None:
    """A batch takes in one entry of the next folio."""
    real = reference._copy_present_ptes

    def longer(ctx, dst, src, idx, pte, max_nr, *rest):
        nr = real(ctx, dst, src, idx, pte, max_nr, *rest)
        if 1 < nr < max_nr and arch.pte_present(ctx.layout, int(src[idx + nr])):
            dst[idx + nr] = arch.pte_advance_pfn(ctx.layout, int(dst[idx]), nr)
            nr += 1
        return nr

    patch.setattr(reference, "_copy_present_ptes", longer)


def parent_stays_writable(patch: pytest.MonkeyPatch) -> None:
    """Fork forgets to write-protect the parent."""
    patch.setattr(reference, "_wrprotect_ptes", lambda *_: None)


def only_the_first_entry_write_protected(patch: pytest.MonkeyPatch) -> None:
    """Fork write-protects the first entry of a batch only."""
    real = reference._wrprotect_ptes
    patch.setattr(reference, "_wrprotect_ptes", lambda src, idx, nr, *rest: real(src, idx, 1, *rest))


def child_is_young(patch: pytest.MonkeyPatch) -> None:
    """The child's entries stay young."""
    patch.setattr(reference, "_copy_entries", copied(lambda layout, old, new: arch.pte_mkyoung(layout, new)))


def child_of_shared_memory_is_dirty(patch: pytest.MonkeyPatch) -> None:
    """The child's entries of shared memory stay dirty."""
    patch.setattr(reference, "_copy_entries", copied(lambda layout, old, new: arch.pte_mkdirty(layout, new)))


def child_loses_dirty(patch: pytest.MonkeyPatch) -> None:
    """The child's entries of private memory become clean."""
    patch.setattr(reference, "_copy_entries", copied(lambda layout, old, new: arch.pte_mkclean(layout, new)))


def child_is_writable(patch: pytest.MonkeyPatch) -> None:
    """The child's entries keep the write bit."""
    patch.setattr(reference, "_copy_entries", copied(lambda layout, old, new: arch.pte_mkwrite(layout, new)))


def copied(change):
    """`_copy_entries`, and then a change to each of the child's entries, of (layout, parent's before, child's)."""
    real = reference._copy_entries

    def wrong(ctx, dst, src, idx, pte, nr, stats):
        before = src[idx : idx + nr].tolist()
        real(ctx, dst, src, idx, pte, nr, stats)
        for i, old in enumerate(before, idx):
            dst[i] = change(ctx.layout, old, int(dst[i]))

    return wrong


def uffd_wp_forgotten(patch: pytest.MonkeyPatch) -> None:
    """The child loses the uffd-wp bit although its userfaultfd heard of the fork."""
    patch.setattr(reference, "_copy_entries", copied(lambda layout, old, new: arch.pte_clear_uffd_wp(layout, new)))


def uffd_wp_kept(patch: pytest.MonkeyPatch) -> None:
    """The child keeps the uffd-wp bit although no userfaultfd heard of the fork."""
    keep = copied(lambda layout, old, new: new | old & layout.uffd_wp)
    patch.setattr(reference, "_copy_entries", keep)


def dontfork_copied(patch: pytest.MonkeyPatch) -> None:
    """MADV_DONTFORK does not matter."""
    patch.setattr(arch, "VM_DONTCOPY", 0)


def wipeonfork_copied(patch: pytest.MonkeyPatch) -> None:
    """MADV_WIPEONFORK does not matter."""
    patch.setattr(arch, "VM_WIPEONFORK", 0)


def shared_memory_copied(patch: pytest.MonkeyPatch) -> None:
    """Areas without anonymous memory are copied as well."""
    patch.setattr("ptebatch.fork.vma_needs_copy", lambda *_: True)


def locked_inherited(patch: pytest.MonkeyPatch) -> None:
    """The child's areas stay locked."""
    patch.setattr("ptebatch.fork.VM_LOCKED_FLAGS", 0)


def pinned_page_shared(patch: pytest.MonkeyPatch) -> None:
    """Pins do not matter."""
    patch.setattr(Folio, "maybe_dma_pinned", property(lambda folio: False))


def pinned_folio_copied_only_in_part(patch: pytest.MonkeyPatch) -> None:
    """The first page of a pinned folio is copied and the others are shared."""
    real = reference._try_dup_anon_rmap

    def wrong(ctx, folio, pfn, nr, stats):
        pinned = folio.order and pfn > folio.pfn
        return real(replace(ctx, has_pinned=False) if pinned else ctx, folio, pfn, nr, stats)

    patch.setattr(reference, "_try_dup_anon_rmap", wrong)


def copied_page_read_only(patch: pytest.MonkeyPatch) -> None:
    """The copy of a pinned page is read-only in the child."""
    real = reference._copy_present_page

    def wrong(ctx, dst, idx, *rest):
        result = real(ctx, dst, idx, *rest)
        if result == 1:
            dst[idx] = arch.pte_wrprotect(ctx.layout, int(dst[idx]))
        return result

    patch.setattr(reference, "_copy_present_page", wrong)


def guards_dropped(patch: pytest.MonkeyPatch) -> None:
    """Guard regions are not copied."""
    patch.setattr(arch, "PTE_MARKER_GUARD", 0)


def uffd_markers_always_copied(patch: pytest.MonkeyPatch) -> None:
    """Guard regions stay, and so do uffd-wp markers nobody asked for."""
    patch.setattr(arch, "PTE_MARKER_POISONED", arch.PTE_MARKER_POISONED | arch.PTE_MARKER_UFFD_WP)


def swap_not_copied(patch: pytest.MonkeyPatch) -> None:
    """Swapped-out pages are passed over."""
    real = reference._copy_nonpresent_pte

    def wrong(ctx, dst, src, idx, pte, *rest):
        result = real(ctx, dst, src, idx, pte, *rest)
        if arch.swp_type(ctx.layout, pte) != arch.SWP_PTE_MARKER:
            dst[idx] = 0
        return result

    patch.setattr(reference, "_copy_nonpresent_pte", wrong)


def swap_not_counted(patch: pytest.MonkeyPatch) -> None:
    """Swapped-out pages of the child are not counted."""
    patch.setattr(reference, "MM_SWAPENTS", 0)


def ksm_pages_not_counted(patch: pytest.MonkeyPatch) -> None:
    """Merged pages count as file pages."""
    real = reference._mm_counter
    patch.setattr(reference, "_mm_counter", lambda folio: MM_FILEPAGES if folio.ksm else real(folio))


def zero_page_counted(patch: pytest.MonkeyPatch) -> None:
    """The zero page counts as anonymous memory."""
    real = reference._copy_present_ptes

    def wrong(ctx, dst, src, idx, pte, max_nr, rss, *rest):
        result = real(ctx, dst, src, idx, pte, max_nr, rss, *rest)
        rss[MM_ANONPAGES] += bool(arch.pte_special(ctx.layout, pte) and ctx.src_vma.vm_ops is None)
        return result

    patch.setattr(reference, "_copy_present_ptes", wrong)


def one_mapcount_short(patch: pytest.MonkeyPatch) -> None:
    """A batch counts one page too few."""
    real = reference._dup_rmap

    def wrong(ctx, folio, pfn, nr, *rest):
        real(ctx, folio, pfn, nr, *rest)
        if nr > 1:
            folio._folios.page(pfn + nr - 1).mapcount -= 1

    patch.setattr(reference, "_dup_rmap", wrong)


def tail_stays_exclusive(patch: pytest.MonkeyPatch) -> None:
    """The last page of a batch stays exclusive; the kernel shows the first page's bit only."""
    real = reference._try_dup_anon_rmap

    def wrong(ctx, folio, pfn, nr, stats):
        shared = real(ctx, folio, pfn, nr, stats)
        if shared and nr > 1:
            ctx.folios.page(pfn + nr - 1).anon_exclusive = True
        return shared

    patch.setattr(reference, "_try_dup_anon_rmap", wrong)


def one_reference_too_many(patch: pytest.MonkeyPatch) -> None:
    """Sharing a small page takes two references."""
    real = reference._dup_rmap

    def wrong(ctx, folio, *rest):
        real(ctx, folio, *rest)
        folio.refcount += folio.order == 0

    patch.setattr(reference, "_dup_rmap", wrong)


def child_not_in_mm_id_slots(patch: pytest.MonkeyPatch) -> None:
    """Large folios do not learn that another mm maps them."""
    patch.setattr(reference, "_tracks_mm_ids", lambda *_: False)


FAULTS = {
    no_anon_exclusive_clear: ("anon-4k", "anon-exclusive"),
    batch_past_folio_end: ("anon-64k", "mapcount"),
    parent_stays_writable: ("anon-4k", "write"),
    only_the_first_entry_write_protected: ("anon-64k", "write"),
    child_is_young: ("anon-4k", "young"),
    child_of_shared_memory_is_dirty: ("guard-memfd", "dirty"),
    child_loses_dirty: ("anon-64k", "dirty"),
    child_is_writable: ("anon-16k", "write"),
    uffd_wp_forgotten: ("uffd-wp-event-fork", "uffd-wp"),
    uffd_wp_kept: ("uffd-wp", "uffd-wp"),
    dontfork_copied: ("dontfork", "VMAs and their flags"),
    wipeonfork_copied: ("wipeonfork", "present, not present or none"),
    shared_memory_copied: ("shared-anon", "present, not present or none"),
    locked_inherited: ("locked", "VMAs and their flags"),
    pinned_page_shared: ("pinned-4k", "PFN shared or copied"),
    pinned_folio_copied_only_in_part: ("pinned-64k", "PFN shared or copied"),
    copied_page_read_only: ("pinned-4k", "write"),
    guards_dropped: ("guard-anon", "present, not present or none"),
    uffd_markers_always_copied: ("guard-uffd-wp-memfd", "present, not present or none"),
    swap_not_copied: ("swap-4k", "present, not present or none"),
    swap_not_counted: ("swap-4k", "rss"),
    ksm_pages_not_counted: ("ksm", "rss"),
    zero_page_counted: ("zero-page", "rss"),
    one_mapcount_short: ("anon-64k", "mapcount"),
    tail_stays_exclusive: ("anon-64k", "reuse or copy"),
    one_reference_too_many: ("anon-4k", "copied pages"),
    child_not_in_mm_id_slots: ("anon-64k", "reuse or copy"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_model_is_found_out(fault, monkeypatch: pytest.MonkeyPatch) -> None:
    name, quantity = FAULTS[fault]
    fault(monkeypatch)
    (outcome,) = verify.run(verify.select([name]), impl="reference")["scenarios"]
    assert outcome["status"] == "failed"
    assert outcome["mismatches"] > 0, outcome["reason"]
    assert outcome["quantities"][quantity]["mismatches"] > 0, outcome["quantities"]
    assert quantity in outcome["reason"]


def batching_forgotten(patch: pytest.MonkeyPatch) -> None:
    """One entry at a time: the kernel's own law is that nobody can tell."""
    patch.setattr(reference, "_batching", lambda ctx: False)


def swap_exclusive_kept(patch: pytest.MonkeyPatch) -> None:
    """Swapped-out pages stay exclusive in parent and child."""
    patch.setattr(arch, "pte_swp_exclusive", lambda layout, pte: False)


def one_page_clean_another_dirty(patch: pytest.MonkeyPatch) -> None:
    """The dirty bits of two pages of an area are exchanged: only the area's total shows."""
    real = reference.copy_page_range

    def wrong(ctx, dst_mm, src_mm, *rest):
        result = real(ctx, dst_mm, src_mm, *rest)
        dirty = ctx.layout.dirty | ctx.layout.saved_dirty
        first, last = dst_mm.rows(ctx.src_vma.start, ctx.src_vma.end)
        for row in dst_mm.entries[first:last]:
            row[5:7] = row[5:7] & ~np.uint64(dirty) | row[[6, 5]] & np.uint64(dirty)
        return result

    patch.setattr(reference, "copy_page_range", wrong)


UNSEEN = {
    batching_forgotten: "anon-64k",
    swap_exclusive_kept: "swap-4k",
    one_page_clean_another_dirty: "lazyfree-64k",
}


@pytest.mark.parametrize("fault", UNSEEN, ids=lambda fault: fault.__name__)
def test_what_nobody_can_see_from_outside(fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """These change the model and no observable: once one is found out, the list of what is unseen is out of date."""
    fault(monkeypatch)
    (outcome,) = verify.run(verify.select([UNSEEN[fault]]), impl="reference")["scenarios"]
    assert outcome["status"] == "passed", outcome["reason"]


# --- nothing is left behind -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted(number: int) -> None:
    """In the middle of a scenario with settings, swap space, a subject and its child."""
    if live.free_swap_area() is None:
        pytest.skip("this kernel has no free zram device")
    body = """
import sys, time
from ptebatch import verify
def wait(*_):
    print("here", flush=True)
    time.sleep(100)
verify._Run._store = wait
verify.run(verify.select(["swap-64k"]))
"""
    with subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert "zram" in Path("/proc/swaps").read_text()
        process.send_signal(number)
        process.wait(20)
    assert process.returncode != 0
    if number == signal.SIGKILL:
        live.restore(wait=verify.PATIENCE)  # unless somebody else's next run has done it
    with live.Settings({}, wait=verify.PATIENCE):
        assert "zram" not in Path("/proc/swaps").read_text()
    deadline = time.monotonic() + 5
    while processes() and time.monotonic() < deadline:
        time.sleep(0.01)
