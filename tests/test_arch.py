"""The pte_* helpers on ints: golden vectors, the laws every layout must keep, and refused arguments."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ptebatch import arch
from ptebatch.arch import LAYOUTS, X86_64, X86_64_V6_5, PteLayout
from ptebatch.errors import ArgumentError, SemanticsError
from ptebatch.mm import configured
from ptebatch.semantics import LATEST, PRESETS, V6_6

GOLDEN = json.loads((Path(__file__).parent / "golden" / "x86_64_pte.json").read_text())



def _configurations(layout: PteLayout) -> list[PteLayout]:
    features = [name for name, _ in layout.variants]
    return [
        layout.configured(soft, shstk, without=without)
        for soft in (True, False)
        for shstk in {False, layout.saved_dirty != 0}
        for without in ((), features)
    ]


HEADERS = json.loads((Path(__file__).parent / "golden" / "layouts.json").read_text())

CONFIGURED = list(dict.fromkeys(lo for base in LAYOUTS.values() for lo in _configurations(base)))

layouts = st.sampled_from(CONFIGURED)
bits = st.integers(0, 63).map(lambda n: 1 << n)
# Any value at all, and values with few flags set around a PFN: the ones tables hold.
entries = st.one_of(
    st.integers(0, arch.U64_MAX),
    st.builds(lambda pfn, flags: pfn << 12 | sum(set(flags)), st.integers(0, 2**36 - 1), st.lists(bits, max_size=8)),
).map(lambda v: v & arch.U64_MAX)
pfns = st.integers(0, 2**31 - 1)  # what entries of every layout can hold
vm_flags = st.sampled_from([0, arch.VM_READ | arch.VM_WRITE, arch.VM_SHADOW_STACK | arch.VM_READ | arch.VM_WRITE])

TO_BOOL = [
    *("pte_none", "pte_present", "pte_protnone", "pte_write", "pte_young", "pte_dirty", "pte_soft_dirty"),
    *("pte_uffd_wp", "pte_special", "pte_swp_exclusive", "pte_swp_soft_dirty", "pte_swp_uffd_wp"),
]
TO_INT = [
    *("pte_pfn", "pte_wrprotect", "pte_mkwrite", "pte_mkclean", "pte_mkdirty", "pte_mkold", "pte_mkyoung"),
    *("pte_mksoft_dirty", "pte_clear_soft_dirty", "pte_mkuffd_wp", "pte_clear_uffd_wp", "pte_mkspecial"),
    *("pte_next_pfn", "swp_type", "swp_offset", "pte_swp_mkexclusive", "pte_swp_clear_exclusive"),
    *("pte_swp_mksoft_dirty", "pte_swp_clear_soft_dirty", "pte_swp_mkuffd_wp", "pte_swp_clear_uffd_wp"),
]
# What a change of an entry may touch, as bit numbers: those of every architecture, and of x86 through v6.5.
CHANGES = ("wrprotect", "mkwrite", "mkclean", "mkdirty", "mkold", "mksoft_dirty", "mkuffd_wp", "mkspecial")
_TOUCHES = {
    "x86-64": ({1, 6, 58}, {1, 6, 58}, {6, 58}, {6, 11, 58}, {5}, {11}, {1, 6, 10, 58}, {9}),
    "x86-64-v6.5": ({1}, {1}, {6}, {6, 11}, {5}, {11}, {1, 10}, {9}),
    "arm64": ({7, 51, 55}, {7, 51}, {7, 55}, {7, 55}, {10}, (), {7, 51, 55, 58}, {56}),
    "riscv64": ({2}, {2}, {7}, {7, 59}, {6}, {59}, {2, 60}, {8}),
    "s390x": ({5, 9}, {5, 9}, {3, 9}, {1, 3, 9}, {2, 10}, {1}, (), {6}),
    "ppc64": ({1}, {1, 2}, {7}, {7, 9}, {8}, {9}, (), {10}),
    "loongarch64": ({1, 8, 9}, {1, 8}, {1, 9}, {1, 9}, {0}, (), (), {11}),
}
TOUCHES = {name: dict(zip(CHANGES, numbers, strict=True)) for name, numbers in _TOUCHES.items()}
SAME = {"mkyoung": "mkold", "clear_soft_dirty": "mksoft_dirty", "clear_uffd_wp": "mkuffd_wp"}


def _value(x: str | bool) -> int | bool:
    return int(x, 16) if isinstance(x, str) else x


@pytest.mark.parametrize("group", GOLDEN["vectors"], ids=lambda g: f"{g['fn']}: {g['source'][:40]}")
def test_golden(group):
    assert GOLDEN["provenance"]["kernel"]
    for layout, args, want in group["cases"]:
        got = getattr(arch, group["fn"])(LAYOUTS[layout], *map(_value, args))
        assert got == _value(want), f"{layout} {group['fn']}({args}) = {got:#x}, want {want}"


@pytest.mark.parametrize("golden", HEADERS["layouts"], ids=lambda g: f"{g['layout']} {g['kernel']}")
def test_what_the_headers_compute(golden):
    layout = LAYOUTS[golden["layout"]].configured(True, without=golden["without"])
    for name, want in golden["constants"].items():
        assert getattr(layout, name) == int(want, 16), name
    assert len(golden["vectors"]) >= 23
    for fn, cases in golden["vectors"].items():
        for *args, want in cases:
            got = getattr(arch, fn)(layout, *(int(x, 16) for x in args))
            assert got == int(want, 16), f"{fn}({', '.join(args)}) = {got:#x}, want {want}"


def test_the_headers_cover_every_other_architecture():
    covered = {LAYOUTS[golden["layout"]].arch for golden in HEADERS["layouts"]}
    assert covered == set(arch.ARCHITECTURES) - {"x86-64"}


def test_layouts_fit_together():
    for layout in CONFIGURED:
        masks = [m for _, m in layout.bits]
        assert sum(masks) | layout.pfn_mask == arch.U64_MAX
        assert sum(masks) & layout.pfn_mask == 0
        assert len({name for name, _ in layout.bits}) == len(masks)
        assert layout.ptrs_per_pte == {"s390x": 256, "ppc64-64k": 32}.get(layout.arch, layout.page_size // 8)
        assert layout.name.startswith(layout.arch)
        assert layout.pfn_mask == layout.max_pfn << layout.pfn_shift
        assert layout.huge in (0, 1 << 7)
        swap = ((1 << layout.swp_type_bits) - 1) << layout.swp_type_shift
        swap |= ((1 << layout.swp_offset_bits) - 1) << layout.swp_offset_shift
        software = layout.swp_exclusive | layout.swp_soft_dirty | layout.swp_uffd_wp | layout.swp_base
        assert swap & (layout.present_mask | software) == 0


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_protections(layout):
    for flags in range(16):
        v = arch.mk_pte(layout, 5, arch.vm_get_page_prot(layout, flags))
        assert arch.pte_present(layout, v)
        assert arch.pte_pfn(layout, v) == 5
        assert arch.pte_write(layout, v) == (flags & arch.VM_WRITE != 0 and flags & arch.VM_SHARED != 0)
        assert not arch.pte_dirty(layout, v)
        assert arch.pte_protnone(layout, v) == (not flags & ~arch.VM_SHARED)
        if flags & ~arch.VM_SHARED:
            assert arch.pte_young(layout, v)
            assert arch.decode(layout, v)["exec"] == (flags & arch.VM_EXEC != 0)


def test_every_architecture_has_a_layout_for_every_kernel():
    for name in arch.ARCHITECTURES:
        for preset in PRESETS.values():
            layout = arch.layout_for(name, preset.switches)
            assert layout.arch == name
            assert not arch.unmet(layout, preset.switches)
    assert arch.layout_for("arm64-16k", PRESETS["v6.9"].switches).name == "arm64-16k-v6.9"
    assert arch.layout_for("arm64-16k", PRESETS["v6.10"].switches).name == "arm64-16k"
    assert arch.layout_for("x86-64", V6_6.replace(saved_dirty=False).switches) is X86_64_V6_5
    with pytest.raises(ArgumentError, match="no architecture 'vax'; they are x86-64, arm64-4k, .*loongarch64-64k"):
        arch.layout_for("vax", {})


def test_kernels_that_differ_in_a_helper():
    old, new = configured(arch.ARM64_4K, PRESETS["v6.17"]), configured(arch.ARM64_4K, PRESETS["v6.18"])
    clean = arch.vm_get_page_prot(new, arch.VM_READ)
    assert arch.pte_dirty(old, arch.pte_mkwrite(old, clean))
    assert not arch.pte_dirty(new, arch.pte_mkwrite(new, clean))
    before = configured(arch.LOONGARCH64_4K, LATEST)
    after = configured(arch.LOONGARCH64_4K, LATEST.replace(loongarch_wrprotect_modified=True))
    assert not arch.pte_dirty(before, arch.pte_wrprotect(before, 0x193))
    assert arch.pte_dirty(after, arch.pte_wrprotect(after, 0x193))
    plain = configured(arch.RISCV64, LATEST)
    assert (plain.soft_dirty, plain.uffd_wp, arch.pte_mkdirty(plain, 1)) == (0, 0, 0x81)
    more = configured(arch.RISCV64, LATEST.replace(riscv_svrsw60t59b=True))
    assert (more.soft_dirty, more.uffd_wp) == (1 << 59, 1 << 60)
    with pytest.raises(SemanticsError, match="riscv_svrsw60t59b needs riscv_software_bits=on"):
        PRESETS["v6.18"].replace(riscv_svrsw60t59b=True)


# --- laws -------------------------------------------------------------------------------------------------------------
@given(layouts, entries, st.integers(0, 1 << 20), st.integers(0, 1 << 20))
def test_advance_adds_up(layout, v, a, b):
    once = arch.pte_advance_pfn(layout, v, a + b)
    # An entry whose arithmetic carries into or out of P or to 0 changes kind: only fields that stay in range add up.
    mid = arch.pte_advance_pfn(layout, v, a)
    assume(bool(mid) == bool(v))
    assert arch.pte_advance_pfn(layout, mid, b) == once


@given(layouts, pfns, st.integers(0, 2**20), st.integers(0, 15), st.integers(0, arch.U64_MAX))
def test_advance_moves_the_pfn_and_nothing_else(layout, pfn, n, flags, other):
    prot = arch.vm_get_page_prot(layout, flags) | other & ~(layout.pfn_mask | layout.valid)
    v = arch.pfn_pte(layout, pfn, prot)
    w = arch.pte_advance_pfn(layout, v, n)
    assert arch.pte_pfn(layout, v) == pfn
    assert arch.pte_pfn(layout, w) == pfn + n
    assert v & ~layout.pfn_mask == w & ~layout.pfn_mask == layout.mk_pte(prot)
    assert arch.pte_next_pfn(layout, v) == arch.pte_advance_pfn(layout, v, 1)
    assert w == arch.mk_pte(layout, pfn + n, prot)


@given(layouts, entries)
def test_read_only_old_clean(layout, v):
    for name in ("pte_wrprotect", "pte_mkold", "pte_mkclean"):
        fn = getattr(arch, name)
        assert fn(layout, fn(layout, v)) == fn(layout, v)
    wp = arch.pte_wrprotect(layout, v)
    assert not arch.pte_write(layout, wp)
    lost = not layout.wrprotect.then_set and layout.arch.startswith("loongarch64") and v & 0x202 == 2
    assert arch.pte_dirty(layout, wp) == (arch.pte_dirty(layout, v) and not lost)
    in_table = arch.ptep_set_wrprotect(layout, v)
    assert in_table == wp or (layout.arch == "s390x" and not arch.pte_write(layout, v) and in_table == v)
    assert not arch.pte_young(layout, arch.pte_mkold(layout, v))
    assert not arch.pte_dirty(layout, arch.pte_mkclean(layout, v))


@given(layouts, entries, vm_flags)
def test_mkwrite(layout, v, flags):
    w = arch.pte_mkwrite(layout, arch.pte_wrprotect(layout, v), flags)
    if flags & arch.VM_SHADOW_STACK and layout.saved_dirty:
        assert arch.pte_dirty(layout, w)
        assert w & (layout.write | layout.dirty) == layout.dirty
        assert arch.pte_write(layout, w) == layout.shstk
    else:
        assert arch.pte_write(layout, w)
        keeps_clean = not layout.mkwrite.clear  # arm64 since v6.18, and all others
        assert arch.pte_dirty(layout, w) == (arch.pte_dirty(layout, arch.pte_wrprotect(layout, v)) or not keeps_clean)
        if layout.saved_dirty:
            assert not w & layout.saved_dirty


@given(layouts, entries)
def test_the_kernels_own_selftest(layout, v):
    # What mm/debug_vm_pgtable.c expects of pte helpers, in pairs of (make, then undo).
    a = arch
    assert a.pte_young(layout, a.pte_mkyoung(layout, a.pte_mkold(layout, v)))
    assert a.pte_dirty(layout, a.pte_mkdirty(layout, a.pte_mkclean(layout, v)))
    assert a.pte_write(layout, a.pte_mkwrite(layout, a.pte_wrprotect(layout, v)))
    assert not a.pte_young(layout, a.pte_mkold(layout, a.pte_mkyoung(layout, v)))
    assert not a.pte_dirty(layout, a.pte_mkclean(layout, a.pte_mkdirty(layout, v)))
    assert not a.pte_write(layout, a.pte_wrprotect(layout, a.pte_mkwrite(layout, v)))
    assert not a.pte_dirty(layout, a.pte_wrprotect(layout, a.pte_mkclean(layout, v)))
    assert a.pte_dirty(layout, a.pte_wrprotect(layout, a.pte_mkdirty(layout, v)))
    assert a.pte_dirty(layout, a.pte_mkwrite(layout, a.pte_mkdirty(layout, a.pte_wrprotect(layout, v))))
    assert a.pte_special(layout, a.pte_mkspecial(layout, v))
    assert a.pte_soft_dirty(layout, a.pte_mksoft_dirty(layout, v)) == bool(layout.soft_dirty)
    assert not a.pte_soft_dirty(layout, a.pte_clear_soft_dirty(layout, v))
    uffd = a.pte_mkuffd_wp(layout, v)
    if not layout.uffd_wp:
        assert uffd == a.pte_clear_uffd_wp(layout, v) == v
        return
    assert a.pte_uffd_wp(layout, uffd)
    assert not a.pte_write(layout, uffd)
    assert not a.pte_uffd_wp(layout, a.pte_clear_uffd_wp(layout, uffd))
    assert not a.pte_write(layout, a.pte_clear_uffd_wp(layout, uffd))


@given(layouts, entries, vm_flags, st.sampled_from((*CHANGES, *SAME)))
def test_changes_touch_only_their_bits(layout, v, flags, name):
    touches = TOUCHES.get(layout.name) or TOUCHES.get(layout.arch) or TOUCHES[layout.arch.rpartition("-")[0]]
    args = (flags,) if name == "mkwrite" else ()
    changed = getattr(arch, f"pte_{name}")(layout, v, *args) ^ v
    assert changed & ~sum(1 << n for n in touches[SAME.get(name, name)]) == 0


@given(entries)
def test_soft_dirty_not_configured(v):
    for layout in (X86_64.configured(False), X86_64_V6_5.configured(False)):
        assert not arch.pte_soft_dirty(layout, v)
        assert arch.pte_mksoft_dirty(layout, v) == arch.pte_clear_soft_dirty(layout, v) == v
        assert arch.pte_swp_mksoft_dirty(layout, v) == arch.pte_swp_clear_soft_dirty(layout, v) == v
        assert not arch.pte_mkdirty(layout, v & ~0x800) & 0x800
        assert not arch.pte_modify(layout, v, 0x25) & 0x800


@given(layouts, pfns, st.integers(0, 15), st.integers(0, 15), st.lists(bits, max_size=6))
def test_pte_modify(layout, pfn, before, after, flags):
    kept = sum(set(flags)) & layout.chg_mask & ~(layout.dirty | layout.saved_dirty | layout.pfn_mask)
    v = arch.pfn_pte(layout, pfn, arch.vm_get_page_prot(layout, before) | kept)
    v = arch.pte_mkdirty(layout, v)
    prot = arch.vm_get_page_prot(layout, after)
    w = arch.pte_modify(layout, v, prot)
    assert arch.pte_pfn(layout, w) == pfn
    assert arch.pte_dirty(layout, w)
    keep = layout.chg_mask & ~(layout.pfn_mask | layout.dirty | layout.saved_dirty | layout.write)
    # Where the protection is not masked, it makes an old entry young.
    assert w & keep == (v | (prot if layout.prot_mask == arch.U64_MAX else 0)) & keep
    given = (layout.valid | layout.write | layout.nx | layout.executable | layout.user) & ~layout.chg_mask
    assert w & given == prot & given
    if layout.saved_dirty:  # canonical stays canonical
        assert bool(w & layout.dirty) == bool(w & layout.write)


@given(layouts, st.integers(0, 31), st.integers(0, 2**50 - 1))
def test_swap_round_trip(layout, type_, offset):
    offset &= (1 << layout.swp_offset_bits) - 1
    assume(type_ or offset)  # slot 0 is the header of a swap area: most architectures would write it as an empty entry
    v = arch.swp_entry(layout, type_, offset)
    for mk in (arch.pte_swp_mkexclusive, arch.pte_swp_mksoft_dirty, arch.pte_swp_mkuffd_wp):
        v = mk(layout, v)
        assert (arch.swp_type(layout, v), arch.swp_offset(layout, v)) == (type_, offset)
        assert not arch.pte_present(layout, v)
        assert not arch.pte_none(layout, v)
    assert arch.pte_swp_exclusive(layout, v)
    assert arch.pte_swp_uffd_wp(layout, v) == bool(layout.swp_uffd_wp)
    assert arch.pte_swp_soft_dirty(layout, v) == bool(layout.swp_soft_dirty)
    for clear in (arch.pte_swp_clear_exclusive, arch.pte_swp_clear_soft_dirty, arch.pte_swp_clear_uffd_wp):
        v = clear(layout, v)
    assert v == arch.swp_entry(layout, type_, offset)


@given(layouts, entries)
def test_results_are_plain(layout, v):
    for name in TO_BOOL:
        assert type(getattr(arch, name)(layout, v)) is bool
    for name in TO_INT:
        out = getattr(arch, name)(layout, v)
        assert type(out) is int
        assert 0 <= out <= arch.U64_MAX
        assert getattr(arch, name)(layout, np.uint64(v)) == out
    assert arch.pte_none(layout, v) + arch.pte_present(layout, v) <= 1
    assert arch.pte_protnone(layout, v) <= arch.pte_present(layout, v)


# --- configured -------------------------------------------------------------------------------------------------------
def test_shadow_stack_entries_are_writable_only_on_a_cpu_that_has_them():
    assert arch.pte_write(X86_64.configured(True, shstk=True), 0x65)
    assert not arch.pte_write(X86_64.configured(True), 0x65)
    assert not X86_64_V6_5.configured(True, shstk=True).shstk


def test_configured_is_idempotent_and_cannot_add_bits():
    off = X86_64.configured(False)
    assert off.configured(True) == off
    assert X86_64.configured(True) == X86_64


def test_is_cow_mapping():
    for flags in range(256):
        want = bool(flags & arch.VM_MAYWRITE) and not flags & arch.VM_SHARED
        assert arch.is_cow_mapping(flags) == want


# --- decode -----------------------------------------------------------------------------------------------------------
@given(layouts, entries)
def test_decode_agrees_with_the_helpers(layout: PteLayout, v):
    out = arch.decode(layout, v)
    json.dumps(out)
    assert out["value"] == v
    assert (out["kind"] == "none") == arch.pte_none(layout, v)
    if arch.pte_present(layout, v):
        assert out["pfn"] == arch.pte_pfn(layout, v)
        assert out["write"] == arch.pte_write(layout, v)
        assert out["dirty"] == arch.pte_dirty(layout, v)
        assert out["kind"] == ("PROT_NONE" if arch.pte_protnone(layout, v) else "present")
    elif out["kind"] != "none":
        field = ((1 << layout.swp_type_bits) - 1) << layout.swp_type_shift
        field |= ((1 << layout.swp_offset_bits) - 1) << layout.swp_offset_shift
        assert arch.swp_entry(layout, out["type"], out["offset"]) & field == v & field


def test_decode_names_kinds():
    real = arch.swp_entry(X86_64, 3, 77)
    marker = arch.swp_entry(X86_64, 31, arch.PTE_MARKER_GUARD | arch.PTE_MARKER_UFFD_WP)
    migration = arch.swp_entry(X86_64, 28, 77)
    assert arch.decode(X86_64, real)["kind"] == "swap"
    assert arch.decode(X86_64, marker)["markers"] == ["uffd-wp", "guard"]
    assert arch.decode(X86_64, migration)["kind"] == "swap-type"
    assert "migration read" in arch.decode(X86_64, migration)["type_names"]
    types = arch.swap_types(hwpoison=False, migration=True, device=0)
    assert arch.decode(X86_64, migration, types)["kind"] == "migration read"
    assert arch.decode(X86_64, arch.pfn_pte(X86_64, 5, 0x120))["bits"] == ["A", "PROTNONE"]


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({"hwpoison": True, "migration": True, "device": 4}, {23: "hwpoison", 24: "migration read", 31: "marker"}),
        (
            {"hwpoison": True, "migration": True, "device": 3},
            {24: "hwpoison", 25: "migration read", 30: "device exclusive"},
        ),
        ({"hwpoison": False, "migration": True, "device": 0}, {28: "migration read", 30: "migration write"}),
    ],
)
def test_swap_types(config, want):
    types = arch.swap_types(**config)
    assert {n: types[n] for n in want} == want
    assert types[arch.SWP_PTE_MARKER] == "marker"


# --- refused ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [-1, 1 << 64, 1.0, None, "1", np.float64(1), np.int64(-1)])
@pytest.mark.parametrize("name", [*TO_BOOL, *TO_INT, "decode"])
def test_bad_entries_are_refused(name, bad):
    with pytest.raises(ArgumentError, match="page-table entry"):
        getattr(arch, name)(X86_64, bad)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("pfn_pte", (1 << 52, 0x25)),
        ("pfn_pte", (-1, 0x25)),
        ("pfn_pte", (1, 1 << 64)),
        ("pfn_pte", (1.5, 0x25)),
        ("pte_modify", (0x25, -1)),
        ("pte_advance_pfn", (1 << 64, 1)),
        ("vm_get_page_prot", (-1,)),
        ("swp_entry", (32, 0)),
        ("swp_entry", (0, 1 << 50)),
        ("swp_entry", (0, -1)),
    ],
)
def test_bad_arguments_are_refused(name, args):
    with pytest.raises(ArgumentError):
        getattr(arch, name)(X86_64, *args)


def test_swap_types_refuses_other_device_counts():
    with pytest.raises(ArgumentError, match="0, 3 or 4"):
        arch.swap_types(hwpoison=True, migration=True, device=2)
