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
from ptebatch.errors import ArgumentError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "x86_64_pte.json").read_text())

CONFIGURED = [
    lo.configured(soft, shstk) for lo in LAYOUTS.values() for soft in (True, False) for shstk in (True, False)
]

layouts = st.sampled_from(CONFIGURED)
bits = st.sampled_from([0, *(1 << n for n in (*range(12), *range(52, 64)))])
# Any value at all, and values with few flags set around a PFN: the ones tables hold.
entries = st.one_of(
    st.integers(0, arch.U64_MAX),
    st.builds(lambda pfn, flags: pfn << 12 | sum(set(flags)), st.integers(0, 2**40 - 1), st.lists(bits, max_size=8)),
)
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
# What a change of an entry may touch, as names of PteLayout's masks.
TOUCHES = {
    "pte_wrprotect": ("write", "dirty", "saved_dirty"),
    "pte_mkwrite": ("write", "dirty", "saved_dirty"),
    "pte_mkclean": ("dirty", "saved_dirty"),
    "pte_mkdirty": ("dirty", "saved_dirty", "soft_dirty"),
    "pte_mkold": ("young",),
    "pte_mkyoung": ("young",),
    "pte_mksoft_dirty": ("soft_dirty",),
    "pte_clear_soft_dirty": ("soft_dirty",),
    "pte_mkuffd_wp": ("uffd_wp", "write", "dirty", "saved_dirty"),
    "pte_clear_uffd_wp": ("uffd_wp",),
    "pte_mkspecial": ("special",),
}


def _value(x: str | bool) -> int | bool:
    return int(x, 16) if isinstance(x, str) else x


@pytest.mark.parametrize("group", GOLDEN["vectors"], ids=lambda g: f"{g['fn']}: {g['source'][:40]}")
def test_golden(group):
    assert GOLDEN["provenance"]["kernel"]
    for layout, args, want in group["cases"]:
        got = getattr(arch, group["fn"])(LAYOUTS[layout], *map(_value, args))
        assert got == _value(want), f"{layout} {group['fn']}({args}) = {got:#x}, want {want}"


def test_layouts_fit_together():
    for layout in CONFIGURED:
        masks = [m for _, m in layout.bits]
        assert sum(masks) | layout.pfn_mask == arch.U64_MAX
        assert sum(masks) & layout.pfn_mask == 0
        assert len({name for name, _ in layout.bits}) == len(masks)
        assert layout.ptrs_per_pte * 8 == layout.page_size
        swap = ((1 << layout.swp_type_bits) - 1) << layout.swp_type_shift
        swap |= ((1 << layout.swp_offset_bits) - 1) << layout.swp_offset_shift
        assert swap & (layout.present_mask | layout.swp_exclusive | layout.swp_soft_dirty | layout.swp_uffd_wp) == 0


def test_private_mappings_are_never_writable():
    for flags in range(8):
        prot = arch.vm_get_page_prot(X86_64, flags)
        assert not arch.pte_write(X86_64, prot)
        assert arch.pte_young(X86_64, prot)
        assert not arch.pte_dirty(X86_64, prot)
        assert bool(prot & X86_64.nx) == (flags != 0 and not flags & arch.VM_EXEC)


# --- laws -------------------------------------------------------------------------------------------------------------
@given(layouts, entries, st.integers(0, 1 << 20), st.integers(0, 1 << 20))
def test_advance_adds_up(layout, v, a, b):
    once = arch.pte_advance_pfn(layout, v, a + b)
    # An entry whose arithmetic carries into or out of P or to 0 changes kind: only fields that stay in range add up.
    mid = arch.pte_advance_pfn(layout, v, a)
    assume(bool(mid) == bool(v))
    assert arch.pte_advance_pfn(layout, mid, b) == once


@given(layouts, st.integers(0, 2**40 - 1), st.integers(0, 2**20), st.integers(0, 15), st.integers(0, arch.U64_MAX))
def test_advance_moves_the_pfn_and_nothing_else(layout, pfn, n, flags, other):
    assume(pfn + n < 2**40)
    prot = arch.vm_get_page_prot(layout, flags) | other & ~(layout.pfn_mask | layout.valid)
    v = arch.pfn_pte(layout, pfn, prot)
    w = arch.pte_advance_pfn(layout, v, n)
    assert arch.pte_pfn(layout, v) == pfn
    assert arch.pte_pfn(layout, w) == pfn + n
    assert v & ~layout.pfn_mask == w & ~layout.pfn_mask == prot
    assert arch.pte_next_pfn(layout, v) == arch.pte_advance_pfn(layout, v, 1)
    assert w == arch.mk_pte(layout, pfn + n, prot)


@given(layouts, entries)
def test_read_only_old_clean(layout, v):
    for name in ("pte_wrprotect", "pte_mkold", "pte_mkclean"):
        fn = getattr(arch, name)
        assert fn(layout, fn(layout, v)) == fn(layout, v)
    wp = arch.pte_wrprotect(layout, v)
    assert not arch.pte_write(layout, wp)
    assert arch.pte_dirty(layout, wp) == arch.pte_dirty(layout, v)
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
        assert arch.pte_dirty(layout, w) == arch.pte_dirty(layout, v)
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
    assert a.pte_special(layout, a.pte_mkspecial(layout, v))
    assert a.pte_soft_dirty(layout, a.pte_mksoft_dirty(layout, v)) == bool(layout.soft_dirty)
    assert not a.pte_soft_dirty(layout, a.pte_clear_soft_dirty(layout, v))
    uffd = a.pte_mkuffd_wp(layout, v)
    assert a.pte_uffd_wp(layout, uffd)
    assert not a.pte_write(layout, uffd)
    assert not a.pte_uffd_wp(layout, a.pte_clear_uffd_wp(layout, uffd))
    assert not a.pte_write(layout, a.pte_clear_uffd_wp(layout, uffd))


@given(layouts, entries, vm_flags, st.sampled_from(sorted(TOUCHES)))
def test_changes_touch_only_their_bits(layout, v, flags, name):
    args = (flags,) if name == "pte_mkwrite" else ()
    changed = getattr(arch, name)(layout, v, *args) ^ v
    assert changed & ~sum(getattr(layout, mask) for mask in TOUCHES[name]) == 0


@given(entries)
def test_soft_dirty_not_configured(v):
    for layout in (X86_64.configured(False), X86_64_V6_5.configured(False)):
        assert not arch.pte_soft_dirty(layout, v)
        assert arch.pte_mksoft_dirty(layout, v) == arch.pte_clear_soft_dirty(layout, v) == v
        assert arch.pte_swp_mksoft_dirty(layout, v) == arch.pte_swp_clear_soft_dirty(layout, v) == v
        assert not arch.pte_mkdirty(layout, v & ~0x800) & 0x800
        assert not arch.pte_modify(layout, v, 0x25) & 0x800


@given(layouts, st.integers(0, 2**40 - 1), st.integers(0, 15), st.integers(0, 15), st.lists(bits, max_size=6))
def test_pte_modify(layout, pfn, before, after, flags):
    kept = sum(set(flags)) & layout.chg_mask & ~(layout.dirty | layout.saved_dirty)
    v = arch.pfn_pte(layout, pfn, arch.vm_get_page_prot(layout, before) | kept)
    v = arch.pte_mkdirty(layout, v)
    prot = arch.vm_get_page_prot(layout, after)
    w = arch.pte_modify(layout, v, prot)
    assert arch.pte_pfn(layout, w) == pfn
    assert arch.pte_dirty(layout, w)
    keep = layout.chg_mask & ~(layout.pfn_mask | layout.dirty | layout.saved_dirty)
    assert w & keep == v & keep
    assert w & (layout.valid | layout.write | layout.nx | layout.user) == prot & (
        layout.valid | layout.write | layout.nx | layout.user
    )
    if layout.saved_dirty:  # canonical stays canonical
        assert bool(w & layout.dirty) == bool(w & layout.write)


@given(layouts, st.integers(0, 31), st.integers(0, 2**50 - 1))
def test_swap_round_trip(layout, type_, offset):
    v = arch.swp_entry(layout, type_, offset)
    for mk in (arch.pte_swp_mkexclusive, arch.pte_swp_mksoft_dirty, arch.pte_swp_mkuffd_wp):
        v = mk(layout, v)
        assert (arch.swp_type(layout, v), arch.swp_offset(layout, v)) == (type_, offset)
        assert not arch.pte_present(layout, v)
        assert not arch.pte_none(layout, v)
    assert arch.pte_swp_exclusive(layout, v)
    assert arch.pte_swp_uffd_wp(layout, v)
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
        assert arch.swp_entry(layout, out["type"], out["offset"]) == v & ~(0xF | 0xF0)


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
