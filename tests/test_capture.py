"""What capture makes of texts and numbers that /proc could show; no kernel is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ptebatch import arch
from ptebatch import capture as c
from ptebatch.arch import X86_64, X86_64_V6_5
from ptebatch.fork import fork
from ptebatch.semantics import V6_6, V6_18, V6_19, KernelConfig

# Fabricated, in the form Linux 6.18 prints.
SMAPS = """\
55d0c0000000-55d0c0100000 rw-p 00000000 00:00 0                          [heap]
Size:               1024 kB
KernelPageSize:        4 kB
MMUPageSize:           4 kB
Rss:                 512 kB
Shared_Dirty:          0 kB
Private_Dirty:       512 kB
Referenced:          512 kB
Anonymous:           512 kB
KSM:                   4 kB
AnonHugePages:         0 kB
Swap:                  8 kB
Locked:                0 kB
THPeligible:           0
ProtectionKey:         3
VmFlags: rd wr mr mw me ac mg
7f0000000000-7f0000004000 r--s 00003000 00:1a 77                         /dev/shm/a name\\012Rss: 5
Size:                 16 kB
Rss:                   4 kB
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd sh mr mw me ms sd
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
VmFlags: ex
"""
MAPS = "".join(line + "\n" for line in SMAPS.splitlines() if "-" in line.split(" ")[0])
HOLE = "VmFlags: rd wr mr mw me ac"


def header(name: str = "", perms: str = "rw-p", dev: str = "00:00", inode: int = 0, codes: str = "rd wr mr mw") -> str:
    return f"1000-2000 {perms} 00000000 {dev} {inode}    {name}\nVmFlags: {codes}\n"


def test_smaps() -> None:
    heap, shm, vsyscall = c.parse_smaps(SMAPS)
    assert (heap.start, heap.end, heap.name) == (0x55D0C0000000, 0x55D0C0100000, "[heap]")
    assert heap.fields["Anonymous"] == 512
    assert heap.fields["Swap"] == 8
    assert "Size" not in heap.fields
    flags = arch.VM_READ | arch.VM_WRITE | arch.VM_MAYREAD | arch.VM_MAYWRITE | arch.VM_MAYEXEC | arch.VM_ACCOUNT
    assert heap.vm_flags == flags | arch.VM_MERGEABLE | 3 << arch.VM_PKEY_SHIFT
    assert shm.name == "/dev/shm/a name\\012Rss: 5"
    assert shm.key[3] == 0x3000
    assert shm.fields["Rss"] == 4
    assert shm.vm_flags & (arch.VM_SHARED | arch.VM_MAYSHARE) == arch.VM_SHARED | arch.VM_MAYSHARE
    assert vsyscall.codes == {"ex"}
    assert "[heap]" in heap.label()


def test_maps_has_the_same_keys() -> None:
    assert [area.key for area in c.parse_smaps(MAPS)] == [area.key for area in c.parse_smaps(SMAPS)]
    assert c.parse_smaps("") == []


def test_every_code_is_a_flag_of_its_own() -> None:
    assert len(set(c._VM_CODES.values())) == len(c._VM_CODES)
    assert all(flag.bit_count() == 1 for flag in c._VM_CODES.values())


@pytest.mark.parametrize(
    ("area", "kind"),
    [
        (header(), None),
        (header("[heap]"), None),
        (header("[stack]"), None),
        (header("[anon:glibc: malloc]"), None),
        (header("/dev/zero", inode=5), None),
        (header("/dev/zero (deleted)", inode=5, codes="rd wr sh mr mw ms"), "shmem"),
        (header("[anon_shmem:x]", inode=5, codes="rd wr sh mr mw ms"), "shmem"),
        (header("/memfd:x (deleted)", inode=5), "shmem"),
        (header("/memfd:x (deleted)", inode=5, codes="rd wr ht"), "hugetlb"),
        (header("/SYSV00000001 (deleted)", inode=5, codes="rd wr sh mr mw ms"), "shmem"),
        (header("/tmp/x", inode=5, dev="00:2c"), "shmem"),
        (header("/tmp/x", inode=5, dev="00:2d"), "file"),
        (header("/anon_hugepage (deleted)", inode=5, codes="rd wr ht"), "hugetlb"),
        (header("[vdso]", codes="rd ex"), "special"),
        (header("[vvar]", codes="rd pf"), "special"),
        (header("[vvar_vclock]", codes="rd pf io"), "special"),
        (header("/dev/dri/card0", inode=5, codes="rd wr sh pf io"), "special"),
        (header("anon_inode:[io_uring]", inode=5, codes="rd wr sh mm"), "file"),
    ],
)
def test_what_backs_an_area(area: str, kind: str | None) -> None:
    assert c._vm_ops(c.parse_smaps(area)[0], frozenset({"00:2c"})) == kind


def test_tmpfs_devices() -> None:
    text = (
        "25 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
        "30 25 0:44 / /tmp rw,nosuid shared:5 master:2 - tmpfs tmpfs rw,size=1k\n"
        "31 25 0:5 / /dev rw - devtmpfs devtmpfs rw\n"
    )
    assert c._tmpfs_devices(text) == {"00:2c", "00:05"}
    assert c._tmpfs_devices("") == frozenset()


# --- entries and frames -----------------------------------------------------------------------------------------------
P, SWAP, UFFD, GUARD, FILE, EXCL = (1 << n for n in (63, 62, 57, 58, 61, 56))
ANON, BACKED, HEAD, TAIL, KSM, ZERO, AE = (1 << n for n in (12, 14, 15, 16, 21, 24, 34))
BASE = 0x1000000
FIELDS = "Rss: 4 kB\nReferenced: 4 kB\nPrivate_Dirty: 4 kB\nAnonymous: 4 kB\nSwap: 0 kB\n"


def build(
    entries: dict[int, int],
    frames: dict[int, tuple[int, int]] | None = None,
    *,
    codes: str = "rd wr mr mw me ac",
    fields: str = FIELDS,
    semantics: Any = V6_18,
    huge: tuple[int, ...] = (),
    zero: tuple[int, ...] = (),
    pmd: str = "split",
    swap: str = "keep",
) -> c.Capture:
    """One area of 4 MiB: page index -> pagemap value; PFN -> (kpageflags, kpagecount), or None: PFNs are hidden."""
    text = f"{BASE:x}-{BASE + (4 << 20):x} rw-p 00000000 00:00 0\n{fields}VmFlags: {codes}\n"
    index = np.array(sorted(entries), dtype=np.int64)
    pfns = sorted(frames or {})
    reader = SimpleNamespace(
        areas=c.parse_smaps(text),
        entries=c.Entries(
            index + (BASE >> 12),
            np.array([entries[i] for i in index.tolist()], dtype=np.uint64),
            np.isin(index, huge),
            np.isin(index, zero),
        ),
        frames=c.Frames(
            np.array(pfns, dtype=np.int64),
            np.array([(frames or {})[pfn][0] for pfn in pfns], dtype=np.uint64),
            np.array([(frames or {})[pfn][1] for pfn in pfns], dtype=np.int64),
        ),
        hidden=frames is None, changed=[], scans=True, left_out=[], tmpfs=frozenset(), pid="1", comm="x",
    )  # fmt: skip
    return c._Builder(reader, semantics, pmd, swap).build()  # type: ignore[arg-type]


def folio(head: int, order: int, flags: int = ANON | BACKED | AE, count: int = 1) -> dict[int, tuple[int, int]]:
    pages = {head + i: (flags | TAIL, count) for i in range(1, 1 << order)}
    return {head: (flags | (HEAD if order else 0), count), **pages}


def test_a_large_folio() -> None:
    mm = build({i: P | 64 + i for i in range(16)}, folio(64, 4)).mm
    prot = arch.vm_get_page_prot(X86_64, arch.VM_READ | arch.VM_WRITE)
    value = arch.pte_mkdirty(X86_64, arch.pte_mkwrite(X86_64, arch.pfn_pte(X86_64, 64, prot)))
    value = arch.pte_clear_soft_dirty(X86_64, value)
    assert [mm.pte(BASE + 4096 * i) for i in range(17)] == [value + (i << 12) for i in range(16)] + [0]
    found = mm.folios.folio(64)
    assert (found.order, found.refcount, found.large_mapcount) == (4, 16, 16)
    assert found.mm_ids == ((mm.mm_id, 16), (0, 0))
    assert not found.maybe_mapped_shared
    assert mm.rss.tolist() == [0, 16, 0, 0]
    assert fork(mm).stats.batch_hist[16] == 1
    assert mm.folios.folio(64).mm_ids[1][0] > 2  # the child is nobody known


def test_shared_pages_are_read_only_and_not_exclusive() -> None:
    mm = build({i: P | 64 + i for i in range(4)}, folio(64, 2, count=3)).mm
    assert not any(arch.pte_write(X86_64, mm.pte(BASE + 4096 * i)) for i in range(4))
    assert all(arch.pte_dirty(X86_64, mm.pte(BASE + 4096 * i)) for i in range(4))
    found = mm.folios.folio(64)
    assert found.maybe_mapped_shared
    assert found.mm_ids == ((1, 4), (2, 8))
    assert (found.large_mapcount, found.refcount) == (12, 12)
    assert not mm.folios.flags([64, 65, 66, 67], "anon_exclusive").any()


def test_a_mapcount_is_never_below_what_this_process_maps() -> None:
    mm = build({0: P | 7, 5: P | 7}, {7: (ANON | BACKED, 1)}).mm
    assert mm.folios.page(7).mapcount == 2


def test_page_cache() -> None:
    found = build({0: P | FILE | 8}, folio(8, 2, 0, 1), codes="rd sh mr mw me ms").mm
    assert found.folios.folio(8).refcount == 4 + 4
    assert found.rss.tolist() == [1, 0, 0, 0]
    assert build({0: P | FILE | 8}, folio(8, 2, BACKED, 1)).mm.rss.tolist() == [0, 0, 0, 1]


def test_no_entry_is_young_or_dirty_where_smaps_shows_none() -> None:
    fields = "Rss: 4 kB\nReferenced: 0 kB\nShared_Dirty: 0 kB\nPrivate_Dirty: 0 kB\nAnonymous: 4 kB\n"
    value = build({0: P | 7}, {7: (ANON | BACKED | AE, 1)}, fields=fields).mm.pte(BASE)
    assert not arch.pte_young(X86_64, value)
    assert not arch.pte_dirty(X86_64, value)
    assert arch.pte_write(X86_64, value)


def test_no_access() -> None:
    value = build({0: P | 7}, {7: (ANON | BACKED | AE, 1)}, codes="mr mw me").mm.pte(BASE)
    assert arch.pte_protnone(X86_64, value)
    assert arch.pte_pfn(X86_64, value) == 7
    assert not arch.pte_write(X86_64, value)


def test_the_zero_page_and_device_memory_are_special() -> None:
    mm = build({0: P | 7, 1: P | 9}, {7: (ZERO, 0), 9: (0, 0)}, codes="rd wr mr mw mm").mm
    assert arch.pte_special(X86_64, mm.pte(BASE))
    assert arch.pte_special(X86_64, mm.pte(BASE + 4096))
    assert len(mm.folios) == 0
    assert mm.rss.sum() == 0
    assert arch.pte_special(X86_64, build({0: P | 7}, {}, codes="rd wr sh mr mw ms pf io").mm.pte(BASE))


def test_a_copy_on_write_of_device_memory_is_not() -> None:
    mm = build({0: P | 7, 1: P | 9}, {7: (ANON | BACKED | AE, 1), 9: (1, 1)}, codes="rd wr mr mw pf").mm
    assert not arch.pte_special(X86_64, mm.pte(BASE))
    assert arch.pte_special(X86_64, mm.pte(BASE + 4096))


def test_ksm_needs_more_than_its_flag() -> None:
    frames = {7: (ANON | BACKED | KSM, 3)}
    assert build({0: P | 7}, frames, fields=FIELDS + "KSM: 4 kB\n").mm.folios.folio(7).ksm
    assert not build({0: P | 7}, frames, fields=FIELDS + "KSM: 0 kB\n").mm.folios.folio(7).ksm
    exclusive = {7: (ANON | BACKED | KSM | AE, 1)}
    assert not build({0: P | 7}, exclusive, fields=FIELDS + "KSM: 4 kB\n").mm.folios.folio(7).ksm


def test_uffd_wp() -> None:
    found = build({0: P | UFFD | 7, 1: SWAP | UFFD | 31 | 1 << 5}, {7: (ANON | BACKED | AE, 1)}, codes="rd wr mr mw uw")
    assert arch.pte_uffd_wp(X86_64, found.mm.pte(BASE))
    assert not arch.pte_write(X86_64, found.mm.pte(BASE))
    assert found.mm.pte(BASE + 4096) == arch.swp_entry(X86_64, arch.SWP_PTE_MARKER, arch.PTE_MARKER_UFFD_WP)
    assert any("uffd_event_fork" in line for line in found.bound)


def test_swap() -> None:
    entries = {0: SWAP | 1 | 1234 << 5, 1: SWAP | UFFD | 0 | 5 << 5, 2: SWAP | GUARD | 31 | 4 << 5}
    found = build(entries, {})
    first, second, guard = (found.mm.pte(BASE + 4096 * i) for i in range(3))
    assert first == arch.pte_swp_mkexclusive(X86_64, arch.swp_entry(X86_64, 1, 1234))
    assert second == arch.pte_swp_mkuffd_wp(X86_64, arch.pte_swp_mkexclusive(X86_64, arch.swp_entry(X86_64, 0, 5)))
    assert guard == arch.swp_entry(X86_64, 31, 4)
    assert found.mm.rss.tolist() == [0, 0, 2, 0]
    assert any("swp_exclusive" in line for line in found.bound)
    dropped = build(entries, {}, swap="drop")
    assert len(dropped.mm.vpns) == 0
    assert dropped.mm.rss.sum() == 0
    # Guards make an anon_vma before VM_MAYBE_GUARD.
    none = "Rss: 0 kB\nAnonymous: 0 kB\nSwap: 0 kB\n"
    assert build({2: entries[2]}, {}, fields=none).mm.vmas[0].anon_vma
    assert not build({2: entries[2]}, {}, fields=none, semantics=V6_19).mm.vmas[0].anon_vma
    assert build({}, {}, fields="Anonymous: 0 kB\nSwap: 4 kB\n").mm.vmas[0].anon_vma


def test_soft_dirty() -> None:
    configured = V6_18
    off = V6_18.replace(config=KernelConfig(mem_soft_dirty=False))
    entries, frames = {0: P | 1 << 55 | 7, 1: P | 8}, {7: (ANON | BACKED | AE, 1), 8: (ANON | BACKED | AE, 1)}
    mm = build(entries, frames, semantics=configured).mm
    assert arch.pte_soft_dirty(X86_64, mm.pte(BASE))
    assert not arch.pte_soft_dirty(X86_64, mm.pte(BASE + 4096))
    assert not arch.pte_soft_dirty(X86_64, build(entries, frames, semantics=off).mm.pte(BASE))
    assert arch.pte_soft_dirty(X86_64, build(entries, frames, codes="rd wr mr mw sd").mm.pte(BASE + 4096))


def test_before_saved_dirty() -> None:
    old = V6_6.replace(saved_dirty=False)
    mm = build({0: P | 7}, {7: (ANON | BACKED, 2)}, semantics=old).mm
    assert mm.layout is X86_64_V6_5
    assert mm.pte(BASE) & X86_64_V6_5.dirty


def test_shadow_stack() -> None:
    value = build({0: P | 7}, {7: (ANON | BACKED | AE, 1)}, codes="rd wr mr mw ss").mm.pte(BASE)
    assert value & (X86_64.write | X86_64.dirty | X86_64.saved_dirty) == X86_64.dirty


@pytest.mark.parametrize("pmd", ["split", "keep"])
def test_pmd_leaves(pmd: str) -> None:
    pages = tuple(range(512))
    found = build({i: P | 512 + i for i in pages}, folio(512, 9, count=2), huge=pages, pmd=pmd)
    mm, folio_ = found.mm, found.mm.folios.folio(512)
    assert mm.rss.tolist() == [0, 512, 0, 0]
    if pmd == "split":
        assert (len(mm.vpns), len(mm.pmd_vpns)) == (1, 0)
        assert (folio_.entire_mapcount, folio_.large_mapcount, folio_.mm_ids) == (0, 1024, ((1, 512), (2, 512)))
    else:
        assert (len(mm.vpns), mm.pmd_vpns.tolist()) == (0, [BASE >> 12])
        assert int(mm.pmd_entries[0]) & 0x80
        assert (folio_.entire_mapcount, folio_.large_mapcount, folio_.mm_ids) == (1, 513, ((1, 1), (2, 512)))
        assert mm.folios.page(512).mapcount == 1


def test_torn_folios_become_small_ones() -> None:
    frames = {9: (ANON | BACKED | TAIL, 1), 10: (ANON | BACKED | TAIL, 1)}
    found = build({0: P | 9, 1: P | 10}, frames)
    assert found.mm.folios.orders([9, 10]).tolist() == [0, 0]
    assert any("unlikely shape" in note for note in found.notes)


def test_hidden_pfns() -> None:
    entries = {0: P | EXCL, 1: P, 2: P | FILE | EXCL, 3: P, 4: SWAP, 5: SWAP | GUARD}
    found = build(entries, None, zero=(3,))
    mm = found.mm
    assert found.pfns == "hidden"
    assert [arch.pte_pfn(X86_64, mm.pte(BASE + 4096 * i)) for i in range(3)] == [1, 2, 3]
    assert arch.pte_special(X86_64, mm.pte(BASE + 4096 * 3))
    assert mm.folios.mapcounts([1, 2, 3]).tolist() == [1, 2, 1]
    assert mm.folios.flags([1, 2, 3], "anon").tolist() == [True, True, False]
    assert arch.pte_write(X86_64, mm.pte(BASE))
    assert not arch.pte_write(X86_64, mm.pte(BASE + 4096))
    assert mm.rss.tolist() == [1, 2, 1, 0]
    assert mm.pte(BASE + 4096 * 5) == arch.swp_entry(X86_64, 31, 4)


def test_an_empty_process() -> None:
    for frames in ({}, None):
        mm = build({}, frames).mm
        assert len(mm.vpns) == len(mm.folios) == 0
        assert fork(mm).stats.ptes_present == 0


# --- runs -------------------------------------------------------------------------------------------------------------
def test_ranges_and_coalescing() -> None:
    a = np.array
    assert c._ranges(a([5, 1, 9]), a([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert c._ranges(a([], dtype=np.int64), a([], dtype=np.int64)).tolist() == []
    starts, ends = c._coalesce(a([100, 0, 10, 40]), a([101, 12, 20, 50]), 20)
    assert starts.tolist() == [0, 100]
    assert ends.tolist() == [50, 101]
    assert c._distinct(a([3, 1, 3, 2])).tolist() == [1, 2, 3]
    assert c._distinct(a([], dtype=np.int64)).tolist() == []
    assert c._where(a([3, 4, 5, 9, 20, 21]), a([21, 9, 3])).tolist() == [5, 3, 0]


def test_frames_reach_to_the_ends_of_their_folios(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory of small folios, one of order 4, one of order 9 and one of order 18; single pages of each are mapped."""
    flags = np.zeros(1 << 20, dtype=np.uint64)
    for head, order in ((64, 4), (1024, 9), (1 << 18, 18)):
        flags[head] = HEAD
        flags[head + 1 : head + (1 << order)] = TAIL
    read: list[int] = []

    def pread(fd: int, buffer: np.ndarray, index: int) -> None:
        read.append(len(buffer))
        if index + len(buffer) > len(flags):
            raise c._Torn
        buffer[...] = flags[index : index + len(buffer)] if fd == 1 else index

    monkeypatch.setattr(c, "_pread", pread)
    reader = c._KPages.__new__(c._KPages)
    reader._flags, reader._count = 1, 2
    for mapped, heads, nr in (
        ([7], [7], 1),
        ([63, 64, 65], [63, 64], 17),
        ([79, 80], [64, 80], 17),
        ([1024 + 300], [1024], 512),
        ([1535], [1024], 512),
        ([7, 70, 2000, (1 << 18) + 5], [7, 64, 2000, 1 << 18], 1 + 16 + 1 + (1 << 18)),
        ([(1 << 20) + 5], [(1 << 20) + 5], 1),
    ):
        frames = reader.read(np.array(mapped))
        assert len(frames.pfn) == nr
        assert frames.pfn[~frames.has(16)].tolist() == heads
    assert max(read) >= 1 << 17
    read.clear()
    reader.read(np.array([70]))
    assert sum(read) < 100
