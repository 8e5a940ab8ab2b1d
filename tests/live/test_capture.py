"""Processes and settings of the machine the tests run on."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ptebatch import arch, live
from ptebatch.batch import check_range
from ptebatch.capture import capture
from ptebatch.errors import ArgumentError, CaptureError, ProcessGoneError, StateError
from ptebatch.fork import fork
from ptebatch.mm import Mm, pte_pfns

MIB = 1 << 20
SIZE = 64 * MIB
THP = "/sys/kernel/mm/transparent_hugepage"


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def pages(mm: Mm, address: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Present entries of a range, and their PFNs."""
    entries = mm.ptes(address, address + size)
    present, pfns = pte_pfns(mm.layout, entries)
    return entries[present], pfns[present]


def sizes() -> list[int]:
    return live.folio_sizes() if os.path.exists(THP) else [4096]


# --- capture ----------------------------------------------------------------------------------------------------------
def test_a_subject_has_nothing_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "libc.so.6")
    with live.Subject() as subject:
        names = {item.split(b"=")[0] for item in Path(f"/proc/{subject.pid}/environ").read_bytes().split(b"\0")}
    assert b"PATH" in names
    assert b"LD_PRELOAD" not in names


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("size", sizes())
def test_folio_sizes(size: int) -> None:
    order = (size // 4096).bit_length() - 1
    with live.Settings(live.mthp(size) if order else {}), live.Subject() as subject:
        address = subject.anon(SIZE, size)
        found = capture(subject.pid)
    mm = found.mm
    assert found.pfns == "real"
    assert found.env["rounds"] == 1
    entries, pfns = pages(mm, address, SIZE)
    assert len(entries) == SIZE // 4096
    # The kernel may fall back to smaller folios where memory is fragmented.
    of_order = mm.folios.orders(pfns) == order
    assert of_order.mean() > 0.95
    assert (mm.folios.mapcounts(pfns) == 1).all()
    assert mm.folios.flags(pfns, "anon").all()
    assert mm.folios.flags(pfns, "anon_exclusive").all()
    assert (entries & np.uint64(mm.layout.write) != 0).all()
    folio = mm.folios.folio(int(pfns[of_order][0]))
    assert folio.refcount == folio.large_mapcount == folio.nr_pages
    vma = mm.vma_at(address)
    assert vma is not None
    assert vma.anon_vma
    assert vma.vm_ops is None
    assert arch.is_cow_mapping(vma.vm_flags)
    assert bool(vma.vm_flags & arch.VM_HUGEPAGE) == bool(order)
    stats = fork(mm).stats
    assert stats.batch_hist[1 << order] >= 0.95 * SIZE // size
    assert stats.anon_exclusive_cleared >= SIZE // 4096


@pytest.mark.usefixtures("root")
def test_without_pagemap_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel before v6.7."""
    with live.Subject() as subject:
        address = subject.anon(MIB)
        new = capture(subject.pid)
        monkeypatch.setattr("ptebatch.capture._PAGEMAP_SCAN", 0xC0606611)
        old = capture(subject.pid)
    assert (old.mm.entries == new.mm.entries).all()
    assert (old.mm.vpns == new.mm.vpns).all()
    entries, pfns = pages(old.mm, address, MIB)
    assert len(entries) == 256
    for flag in ("anon", "anon_exclusive", "swapbacked"):
        assert (old.mm.folios.flags(pfns, flag) == new.mm.folios.flags(pfns, flag)).all()
    assert (old.mm.folios.mapcounts(pfns) == new.mm.folios.mapcounts(pfns)).all()
    assert any("v6.7" in line for line in old.bound)


@pytest.mark.usefixtures("root")
def test_pmd_leaves() -> None:
    size = 2 * MIB
    with live.Settings(live.mthp(size)), live.Subject() as subject:
        address = subject.anon(8 * size, size, pte_mapped=False)
        split, kept = capture(subject.pid), capture(subject.pid, pmd="keep")
    mapped = np.flatnonzero(np.isin(kept.mm.pmd_vpns << 12, address + np.arange(8) * size))
    assert len(mapped) >= 7
    for leaf in mapped.tolist():
        entry, vpn = int(kept.mm.pmd_entries[leaf]), int(kept.mm.pmd_vpns[leaf])
        assert entry & 0x80
        assert arch.pte_present(kept.mm.layout, entry)
        folio = kept.mm.folios.folio((entry & arch.X86_64.pfn_mask & ~0x1FFFFF) >> 12)
        assert (folio.order, folio.entire_mapcount, folio.large_mapcount, folio.refcount) == (9, 1, 1, 1)
        assert kept.mm.folios.page(folio.pfn + 1).mapcount == 0
        assert kept.mm.pte(vpn << 12) == 0
        split_folio = split.mm.folios.folio(arch.pte_pfn(split.mm.layout, split.mm.pte(vpn << 12)))
        assert split_folio.pfn == folio.pfn
        assert (split_folio.entire_mapcount, split_folio.large_mapcount) == (0, 512)
    assert len(split.mm.pmd_vpns) == 0
    assert any("split" in line for line in split.bound)
    assert int(split.mm.rss[1]) == int(kept.mm.rss[1])


@pytest.mark.usefixtures("root")
def test_partially_mapped_folios(script) -> None:
    with live.Settings(live.mthp(64 << 10)):
        child = script("""
memory, at = anon(1 << 20)
memory.madvise(14)
for page in range(0, 1 << 20, 4096):
    memory[at + page] = 1
base = address(memory) + at
for folio in range(0, 1 << 20, 65536):
    libc.munmap(ctypes.c_void_p(base + folio), 5 * 4096)
    libc.munmap(ctypes.c_void_p(base + folio + 7 * 4096), 9 * 4096)
say(base)
hold()
""")
        base = child.hear()
        mm = capture(child.pid).mm
    entries, pfns = pages(mm, base, MIB)
    assert len(entries) == 32
    large = mm.folios.orders(pfns) == 4
    assert large.mean() > 0.9
    folio = mm.folios.folio(int(pfns[large][0]))
    assert [mm.folios.page(folio.pfn + i).mapcount for i in range(16)] == [0] * 5 + [1, 1] + [0] * 9
    assert folio.large_mapcount == 2
    assert fork(mm).stats.batch_hist[2] >= large.sum() // 2


@pytest.mark.usefixtures("root")
def test_shared_with_a_child(script) -> None:
    # The child has read and written nothing of it; but DAMON, where it runs, now and then has folios remember what the
    # parent did, and smaps says Referenced then.
    assert not all(young_in_a_child(script) for _ in range(3))


def young_in_a_child(script) -> bool:
    """Compare memory that a parent shares with its child; whether any of it looks young in the child."""
    child = script("""
memory, at = anon(1 << 20)
for page in range(0, 1 << 20, 4096):
    memory[at + page] = 1
pid = os.fork()
if pid == 0:
    hold()
    os._exit(0)
memory[at] = 2
say([address(memory) + at, pid])
hold()
""")
    base, grandchild = child.hear()
    try:
        parent, other = capture(child.pid).mm, capture(grandchild).mm
    finally:
        os.kill(grandchild, signal.SIGKILL)
    entries, pfns = pages(parent, base, MIB)
    _, theirs = pages(other, base, MIB)
    assert pfns[0] != theirs[0]
    assert (pfns[1:] == theirs[1:]).all()
    assert (parent.folios.mapcounts(pfns[1:]) == 2).all()
    assert parent.folios.page(int(pfns[0])).anon_exclusive
    assert not parent.folios.flags(pfns[1:], "anon_exclusive").any()
    writable = entries & np.uint64(parent.layout.write) != 0
    assert writable[0]
    assert not writable[1:].any()
    # Read-only and dirty is SavedDirty, not the shadow stack's Dirty.
    assert not (entries[1:] & np.uint64(parent.layout.dirty)).any()
    return bool((other.ptes(base + 4096, base + MIB) & np.uint64(other.layout.young)).any())


@pytest.mark.usefixtures("root")
def test_kinds_of_memory(script, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 65536)
    child = script(f"""
found = {{}}
memory, at = anon(65536)
found["zero"] = address(memory) + at
for page in range(0, 65536, 4096):
    memory[at + page]
shared = mmap.mmap(-1, 65536)
shared[0] = 1
found["shared"] = address(shared)
fd = os.memfd_create("m")
os.truncate(fd, 65536)
memfd = mmap.mmap(fd, 65536)
memfd[0] = 1
found["memfd"] = address(memfd)
file = mmap.mmap(os.open({str(tmp_path / "file")!r}, os.O_RDWR), 65536, mmap.MAP_PRIVATE)
file[4096] = 1
file[0]
found["file"] = address(file)
wiped, at = anon(65536)
wiped[at] = 1
found["wiped"] = address(wiped) + at
madvise(found["wiped"], 65536, 18)
kept, at = anon(65536)
kept[at] = 1
found["dontfork"] = address(kept) + at
madvise(found["dontfork"], 65536, 10)
none, at = anon(65536)
none[at] = 1
found["none"] = address(none) + at
libc.mprotect(ctypes.c_void_p(found["none"]), 65536, 0)
say(found)
hold()
""")
    at = child.hear()
    found = capture(child.pid)
    mm, layout = found.mm, found.mm.layout
    vmas = {name: mm.vma_at(address) for name, address in at.items()}

    assert all(arch.pte_special(layout, mm.pte(at["zero"] + 4096 * i)) for i in range(16))
    assert not any(arch.pte_write(layout, mm.pte(at["zero"] + 4096 * i)) for i in range(16))
    assert not vmas["zero"].anon_vma
    for name in ("shared", "memfd"):
        assert vmas[name].vm_ops == "shmem"
        assert vmas[name].vm_flags & arch.VM_SHARED
        page = arch.pte_pfn(layout, mm.pte(at[name]))
        assert mm.folios.folio(page).swapbacked
        assert not mm.folios.folio(page).anon
        assert mm.folios.folio(page).refcount == mm.folios.folio(page).nr_pages + 1
    assert vmas["file"].vm_ops == "file"
    assert vmas["file"].anon_vma
    assert mm.folios.folio(arch.pte_pfn(layout, mm.pte(at["file"] + 4096))).anon
    assert not mm.folios.folio(arch.pte_pfn(layout, mm.pte(at["file"]))).anon
    assert arch.pte_write(layout, mm.pte(at["file"] + 4096))
    assert not arch.pte_write(layout, mm.pte(at["file"]))
    assert vmas["wiped"].vm_flags & arch.VM_WIPEONFORK
    assert vmas["dontfork"].vm_flags & arch.VM_DONTCOPY
    assert arch.pte_protnone(layout, mm.pte(at["none"]))
    assert mm.folios.folio(arch.pte_pfn(layout, mm.pte(at["none"]))).anon
    assert mm.vma_at(next(v.start for v in mm.vmas if v.name == "[vvar]")).vm_ops == "special"
    assert not any(v.name == "[vsyscall]" for v in mm.vmas)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{child.pid}/status").read_text().splitlines())
    for index, name in ((0, "RssFile"), (1, "RssAnon"), (3, "RssShmem")):
        # The kernel's counters are per CPU and may lag.
        assert abs(int(mm.rss[index]) * 4 - int(status[name].split()[0])) <= 4 * 64 * os.cpu_count()
    result = fork(mm)
    assert result.child.pte(at["shared"]) == 0
    assert result.child.pte(at["wiped"]) == 0
    assert result.child.vma_at(at["dontfork"]) is None
    assert arch.pte_pfn(layout, result.child.pte(at["none"])) == arch.pte_pfn(layout, mm.pte(at["none"]))


@pytest.mark.usefixtures("root")
def test_guard_regions(script) -> None:
    child = script("""
memory, at = anon(65536)
memory[at] = 1
base = address(memory) + at
try:
    madvise(base + 4096, 8192, 102)
except OSError as error:
    base = None
say(base)
hold()
""")
    base = child.hear()
    if base is None:
        pytest.skip("this kernel has no guard regions")
    found, dropped = capture(child.pid), capture(child.pid, swap="drop")
    guard = arch.swp_entry(found.mm.layout, arch.SWP_PTE_MARKER, arch.PTE_MARKER_GUARD)
    assert [found.mm.pte(base + 4096 * i) for i in (1, 2, 3)] == [guard, guard, 0]
    assert dropped.mm.pte(base + 4096) == 0
    assert any("left out" in line for line in dropped.bound)
    assert int(found.mm.rss[2]) == 0


@pytest.mark.usefixtures("root")
def test_hugetlb(script) -> None:
    pool = "/proc/sys/vm/nr_hugepages"
    if not os.path.exists(pool):
        pytest.skip("this kernel has no hugetlb")
    with live.Settings({pool: str(int(live.current(pool)) + 2)}):
        child = script("""
memory = mmap.mmap(-1, 4 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)
memory[0] = memory[2 << 20] = 1
say(address(memory))
hold()
""")
        base = child.hear()
        mm = capture(child.pid).mm
        child.process.kill()
        child.process.wait()
    assert mm.vma_at(base).vm_ops == "hugetlb"
    assert (np.isin([base >> 12, (base >> 12) + 512], mm.pmd_vpns)).all()
    assert mm.pte(base) == 0
    entry = int(mm.pmd_entries[np.searchsorted(mm.pmd_vpns, base >> 12)])
    folio = mm.folios.folio((entry & arch.X86_64.pfn_mask & ~0x1FFFFF) >> 12)
    assert (folio.hugetlb, folio.order, folio.entire_mapcount, folio.large_mapcount) == (True, 9, 1, 1)


def test_this_process() -> None:
    blocks = [bytearray(MIB) for _ in range(8)]
    for pid in ("self", os.getpid(), str(os.getpid())):
        found = capture(pid)
        assert found.mm.name.endswith(f"[{os.getpid()}]")
        result = fork(found.mm)
        assert result.stats.ptes_present > 100
    assert blocks


def test_own_memory_while_it_changes() -> None:
    """Areas of this process that will not hold still are taken as they are, and named."""
    memory = mmap.mmap(-1, 64 * 4096)
    count = 0

    def disturb(done: int, total: int) -> None:
        nonlocal count
        memory[count % 64 * 4096] = 1
        count += 1

    found = capture("self", progress=disturb, retries=1)
    assert any("changed while" in line for line in found.bound)
    found.mm.validate(entries=True)
    with pytest.raises(ArgumentError, match="cannot stop itself"):
        capture("self", freeze=True)
    memory.close()


def test_progress() -> None:
    calls: list[tuple[int, int]] = []
    with live.Subject() as subject:
        capture(subject.pid, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_killed_meanwhile() -> None:
    for when in range(1, 5):
        with live.Subject() as subject:

            def kill(done: int, total: int, when: int = when, pid: int = subject.pid) -> None:
                if done == when:
                    os.kill(pid, signal.SIGKILL)
                    while state(pid) != "Z":
                        time.sleep(0.001)

            if when < 4:
                with pytest.raises(ProcessGoneError, match="exited"):
                    capture(subject.pid, progress=kill)
            else:  # everything has been read
                capture(subject.pid, progress=kill)


def test_executes_another_program_meanwhile(script) -> None:
    child = script("hold(); os.execv('/bin/sleep', ['sleep', '100'])")
    state_of = Path(f"/proc/{child.pid}/comm")

    def go(done: int, total: int) -> None:
        if done == 2 and state_of.read_text() != "sleep\n":
            child.go()
            while state_of.read_text() != "sleep\n" or state(child.pid) != "S":
                time.sleep(0.001)

    found = capture(child.pid, progress=go)
    assert found.env["rounds"] > 1
    assert any(vma.name.endswith(("/sleep", "/coreutils", "/busybox")) for vma in found.mm.vmas)


def test_an_area_that_keeps_changing(script) -> None:
    child = script("""
memory = mmap.mmap(-1, 8 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, 8 << 20, 4096):
    hold()
    memory[page] = 1
    say(page)
""")

    def change(done: int, total: int) -> None:
        child.go()
        child.hear()

    with pytest.raises(CaptureError, match=r"area 0x.* kept changing .*--freeze"):
        capture(child.pid, retries=2, progress=change)
    changes = iter([change] * 3)
    settles = capture(child.pid, progress=lambda *step: next(changes, lambda *_: None)(*step))
    assert settles.env["rounds"] == 2
    found = capture(child.pid, freeze=True)
    assert found.env["frozen"]
    assert found.env["rounds"] == 1


def test_freeze() -> None:
    with live.Subject() as subject:
        seen = []
        capture(subject.pid, freeze=True, progress=lambda done, total: seen.append(state(subject.pid)))
        assert seen[:3] == ["T"] * 3
        assert state(subject.pid) != "T"

        def fail(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            capture(subject.pid, freeze=True, progress=fail)
        assert state(subject.pid) != "T"

        os.kill(subject.pid, signal.SIGSTOP)
        while state(subject.pid) != "T":
            time.sleep(0.001)
        assert not capture(subject.pid, freeze=True).env["frozen"]
        assert state(subject.pid) == "T"
        os.kill(subject.pid, signal.SIGCONT)


def test_freeze_ends_when_the_reader_is_terminated(script) -> None:
    with live.Subject() as subject:
        reader = script(f"""
import time
from ptebatch.capture import capture
def wait(done, total):
    say(done)
    time.sleep(100)
capture({subject.pid}, freeze=True, progress=wait)
""")
        reader.hear()
        assert state(subject.pid) == "T"
        reader.process.terminate()
        assert reader.process.wait() == 128 + signal.SIGTERM
        assert state(subject.pid) != "T"


def test_no_address_space(script) -> None:
    with pytest.raises(ProcessGoneError, match="no process 4194305"):
        capture((1 << 22) + 1)
    child = script("say(1)")
    child.hear()
    while state(child.pid) != "Z":
        time.sleep(0.001)
    with pytest.raises(ProcessGoneError, match="exited"):
        capture(child.pid)


@pytest.mark.usefixtures("root")
def test_kernel_thread() -> None:
    threads = [path.parent.name for path in Path("/proc").glob("[0-9]*/comm") if path.read_text() == "kthreadd\n"]
    if not threads:
        pytest.skip("no kernel thread is visible here")
    with pytest.raises(CaptureError, match="kernel thread"):
        capture(int(threads[0]))


def unprivileged(body: str) -> str:
    """What a script says as nobody."""
    script = f"""
import ctypes, json, os, tempfile
import numpy.ma  # by np.unique, later: nobody cannot read it where the project lies in a directory of root's
from ptebatch.capture import capture
from ptebatch.errors import *
from ptebatch.fork import fork
from ptebatch.live import Settings, Subject
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, which setuid takes away
{body}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("root")
def test_hidden_pfns() -> None:
    said = unprivileged("""
found = capture("self")
pfns = found.mm.folios.heads()
print(json.dumps([found.pfns, found.bound, len(pfns), int(found.mm.folios.orders(pfns).max()),
                  fork(found.mm).stats.ptes_batched, found.mm.rss.tolist()]))
""")
    pfns, bound, pages, order, batched, rss = json.loads(said)
    assert pfns == "hidden"
    assert bound[0].startswith("pfns: hidden")
    assert pages == sum(rss) > 500
    assert order == batched == 0


@pytest.mark.usefixtures("root")
def test_not_allowed() -> None:
    with live.Subject() as subject:
        said = unprivileged(f"""
try:
    capture({subject.pid})
except PermissionDeniedError as error:
    print(error)
""")
    assert "CAP_SYS_PTRACE" in said


def test_bad_arguments() -> None:
    for bad in (0, -1, "x", None, 1.5):
        with pytest.raises(ArgumentError):
            capture(bad)
    for key in ("pmd", "swap"):
        with pytest.raises(ArgumentError):
            capture("self", **{key: "other"})
    with pytest.raises(ArgumentError):
        capture("self", retries=-1)


@pytest.mark.usefixtures("root")
def test_passes_the_read_only_check() -> None:
    mm = capture("self").mm
    check_range(mm, mm.vmas, pfn_without_page="error")


# --- subjects ---------------------------------------------------------------------------------------------------------
def test_subject_is_reaped() -> None:
    with live.Subject() as subject:
        address = subject.anon(MIB)
        subject.write(address, MIB)
        subject.unmap(address)
        with pytest.raises(StateError, match="LookupError"):
            subject.write(address, MIB)
        pid = subject.pid
    assert not os.path.exists(f"/proc/{pid}")
    with live.Subject() as subject:
        os.kill(subject.pid, signal.SIGKILL)
        with pytest.raises(ProcessGoneError, match="ended"):
            subject.anon(MIB)


def test_subject_ends_with_its_parent(script) -> None:
    parent = script("""
import time
from ptebatch.live import Subject
subject = Subject()
say(subject.pid)
time.sleep(100)
""")
    pid = parent.hear()
    parent.process.kill()
    parent.process.wait()
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and state(pid) != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- settings ---------------------------------------------------------------------------------------------------------
KNOB = f"{THP}/hugepages-64kB/enabled"


@pytest.fixture
def knob(root: None) -> str:
    if not os.path.exists(KNOB):
        pytest.skip(f"this kernel has no {KNOB}")
    return live.current(KNOB)


HOLDING = f"""
import signal, time
from ptebatch import live
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs these tests may ignore them
signal.signal(signal.SIGHUP, signal.SIG_DFL)
with live.Settings(live.mthp(65536)):
    say(live.current({KNOB!r}))
    time.sleep(100)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_settings_come_back_after_a_signal(script, knob: str, number: int) -> None:
    child = script(HOLDING)
    assert child.hear() == "madvise"
    child.process.send_signal(number)
    assert child.process.wait() != 0
    assert live.current(KNOB) == knob
    assert not (live.state_dir() / "settings.json").exists()


def test_settings_come_back_with_the_next_run_after_a_kill(script, knob: str) -> None:
    for use in ("restore", "next"):
        child = script(HOLDING)
        assert child.hear() == "madvise"
        child.process.kill()
        child.process.wait()
        assert live.current(KNOB) == "madvise"
        if use == "restore":
            assert KNOB in live.restore()
            assert live.restore() == []
        else:
            with live.Settings({}):
                assert live.current(KNOB) == knob
        assert live.current(KNOB) == knob


def test_settings_come_back_after_an_exception(knob: str) -> None:

    def fail() -> None:
        with live.Settings(live.mthp(65536)):
            assert live.current(KNOB) == "madvise"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert live.current(KNOB) == knob
    wanted = {KNOB: "always", f"{THP}/enabled": "nonsense"}
    with pytest.raises(StateError, match="transparent_hugepage/enabled"), live.Settings(wanted):
        pass
    assert live.current(KNOB) == knob


def test_settings_are_taken_by_one_at_a_time(script, knob: str) -> None:
    child = script(HOLDING)
    child.hear()
    with pytest.raises(StateError, match="another process"), live.Settings({}, wait=0.1):
        pass
    child.process.terminate()
    with live.Settings({}):
        assert live.current(KNOB) == knob


@pytest.mark.usefixtures("knob")
def test_settings_need_root() -> None:
    said = unprivileged(f"""
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp()
try:
    with Settings({{{KNOB!r}: "always"}}):
        pass
except PermissionDeniedError as error:
    print(error)
""")
    assert "run as root" in said
