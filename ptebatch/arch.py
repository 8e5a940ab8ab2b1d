"""Page-table entry layouts and the kernel's ``pte_*`` helpers on plain Python ints.

A `PteLayout` is data - masks, shifts and a `kind` - and the helpers compute from it. A mask of 0 means the kernel was
built without that bit: helpers then do nothing, and the bit position is an ordinary bit that batches compare.

Every helper takes ``(layout, v)`` with ``v`` an entry in ``0 .. 2**64 - 1`` and returns an int or a bool; anything else
raises `ArgumentError`. They model arch/x86/include/asm/{pgtable,pgtable_64,pgtable-invert}.h and
arch/x86/mm/pgtable.c, v6.1 to v6.19.

Two things of x86-64 are no mask operation:

- an entry that is non-zero and not P (PROT_NONE) holds its PFN bitwise inverted (the L1TF mitigation);
- since v6.6 hardware Dirty on a read-only entry means "shadow stack", so helpers that make an entry read-only move
  Dirty (bit 6) to SavedDirty (bit 58), and those that make it writable move it back.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

from ptebatch.errors import ArgumentError

U64_MAX = (1 << 64) - 1

# PteLayout.kind: which of the rules that are not masks apply. Other architectures take the next numbers.
KIND_X86 = 1

# --- VMA flags (include/linux/mm.h; values of 64-bit kernels) ---------------------------------------------------------
VM_NONE = 0x0
VM_READ = 0x1
VM_WRITE = 0x2
VM_EXEC = 0x4
VM_SHARED = 0x8
VM_MAYREAD = 0x10
VM_MAYWRITE = 0x20
VM_MAYEXEC = 0x40
VM_MAYSHARE = 0x80
VM_GROWSDOWN = 0x100
VM_UFFD_MISSING = 0x200
VM_PFNMAP = 0x400
VM_MAYBE_GUARD = 0x800  # v6.19+
VM_UFFD_WP = 0x1000
VM_LOCKED = 0x2000
VM_IO = 0x4000
VM_SEQ_READ = 0x8000
VM_RAND_READ = 0x10000
VM_DONTCOPY = 0x20000
VM_DONTEXPAND = 0x40000
VM_LOCKONFAULT = 0x80000
VM_ACCOUNT = 0x100000
VM_NORESERVE = 0x200000
VM_HUGETLB = 0x400000
VM_SYNC = 0x800000
VM_ARCH_1 = 0x1000000
VM_WIPEONFORK = 0x2000000
VM_DONTDUMP = 0x4000000
VM_SOFTDIRTY = 0x8000000  # 0 in kernels without CONFIG_MEM_SOFT_DIRTY
VM_MIXEDMAP = 0x10000000
VM_HUGEPAGE = 0x20000000
VM_NOHUGEPAGE = 0x40000000
VM_MERGEABLE = 0x80000000
VM_PKEY_SHIFT = 32
VM_SHADOW_STACK = 1 << 37  # x86-64 (arm64 GCS uses bit 38)
VM_UFFD_MINOR = 1 << 38  # x86-64 through v6.18
VM_DROPPABLE = 1 << 40  # v6.11+


def is_cow_mapping(vm_flags: int) -> bool:
    """Tell whether pages of the mapping are copied on write (``is_cow_mapping``, include/linux/mm.h).

    VM_WRITE does not matter: a private read-only mapping may be made writable later.

    >>> is_cow_mapping(VM_READ | VM_MAYWRITE), is_cow_mapping(VM_SHARED | VM_MAYWRITE)
    (True, False)
    """
    return (vm_flags & (VM_SHARED | VM_MAYWRITE)) == VM_MAYWRITE


# --- layouts ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class PteLayout:
    """One architecture's page-table entry, as data.

    Masks are of the 64-bit entry; 0 means the kernel modelled has no such bit. `valid` is the hardware's valid bit,
    `present_mask` the bits of which any one makes the entry present to Linux (PROT_NONE entries are present but not
    valid). `none_ignore` are bits ``pte_none()`` does not look at. `chg_mask` is what ``pte_modify()`` keeps.
    `bits` names bits and fields for people. `swp_pfn_bits` is the width of the PFN in the offset of migration and
    device entries (SWP_PFN_BITS); young and dirty of migration entries lie above it, and 0 says that the PFN is all
    there is. `huge` marks a leaf above the page tables.
    """

    name: str
    kind: int
    page_shift: int
    ptrs_per_pte: int
    pfn_shift: int
    pfn_mask: int
    none_value: int
    none_ignore: int
    present_mask: int
    valid: int
    protnone: int
    write: int
    young: int
    dirty: int
    saved_dirty: int
    soft_dirty: int
    uffd_wp: int
    special: int
    devmap: int
    nx: int
    user: int
    pkey: int
    shstk: bool
    chg_mask: int
    swp_type_shift: int
    swp_type_bits: int
    swp_offset_shift: int
    swp_offset_bits: int
    swp_offset_inverted: bool
    swp_exclusive: int
    swp_soft_dirty: int
    swp_uffd_wp: int
    prots: tuple[int, ...]
    bits: tuple[tuple[str, int], ...]
    swp_pfn_bits: int = 0
    huge: int = 0

    @property
    def page_size(self) -> int:
        """Bytes per base page."""
        return 1 << self.page_shift

    def configured(self, mem_soft_dirty: bool, shstk: bool = False) -> PteLayout:
        """Return this layout as a kernel with that configuration, on such a CPU, uses it.

        Parameters
        ----------
        mem_soft_dirty : bool
            CONFIG_MEM_SOFT_DIRTY. False clears the soft-dirty masks; True keeps those the layout has.
        shstk : bool
            The CPU has shadow stacks (X86_FEATURE_SHSTK); only matters with SavedDirty.
        """
        soft = U64_MAX if mem_soft_dirty else 0
        return replace(
            self,
            soft_dirty=self.soft_dirty & soft,
            swp_soft_dirty=self.swp_soft_dirty & soft,
            chg_mask=self.chg_mask & ~self.soft_dirty | self.soft_dirty & soft,
            shstk=bool(shstk) and self.saved_dirty != 0,
        )


_P, _RW, _US, _PWT, _PCD, _A, _D, _PAT, _G = (1 << n for n in range(9))
_SPECIAL, _UFFD_WP, _SOFT_DIRTY = 1 << 9, 1 << 10, 1 << 11
_BIT57, _BIT58 = 1 << 57, 1 << 58
_PKEY = 0xF << 59
_NX = 1 << 63
_PFN = ((1 << 52) - 1) & ~0xFFF

_NONE = _A | _G
_READONLY_EXEC = _P | _US | _A
_READONLY = _READONLY_EXEC | _NX
_SHARED = _READONLY | _RW
_SHARED_EXEC = _READONLY_EXEC | _RW

X86_64 = PteLayout(
    name="x86-64",
    kind=KIND_X86,
    page_shift=12,
    ptrs_per_pte=512,
    pfn_shift=12,
    pfn_mask=_PFN,
    none_value=0,
    none_ignore=_A | _D,
    present_mask=_P | _G,
    valid=_P,
    protnone=_G,
    write=_RW,
    young=_A,
    dirty=_D,
    saved_dirty=_BIT58,
    soft_dirty=_SOFT_DIRTY,
    uffd_wp=_UFFD_WP,
    special=_SPECIAL,
    devmap=0,
    nx=_NX,
    user=_US,
    pkey=_PKEY,
    shstk=False,
    chg_mask=_PFN | _PCD | _PWT | _PAT | _SPECIAL | _A | _D | _BIT58 | _SOFT_DIRTY | _UFFD_WP,
    swp_type_shift=59,
    swp_type_bits=5,
    swp_offset_shift=9,
    swp_offset_bits=50,
    swp_offset_inverted=True,
    swp_exclusive=_PWT,
    swp_soft_dirty=_RW,
    swp_uffd_wp=_US,
    # Indexed by VM_READ | VM_WRITE | VM_EXEC | VM_SHARED: no private mapping has RW.
    prots=(
        *(_NONE, _READONLY, _READONLY, _READONLY),
        *(_READONLY_EXEC,) * 4,
        *(_NONE, _READONLY, _SHARED, _SHARED),
        *(_READONLY_EXEC, _READONLY_EXEC, _SHARED_EXEC, _SHARED_EXEC),
    ),
    bits=(
        ("P", _P),
        ("RW", _RW),
        ("US", _US),
        ("PWT", _PWT),
        ("PCD", _PCD),
        ("A", _A),
        ("D", _D),
        ("PAT", _PAT),
        ("G", _G),
        ("SPECIAL", _SPECIAL),
        ("UFFD_WP", _UFFD_WP),
        ("SOFT_DIRTY", _SOFT_DIRTY),
        *((f"BIT{n}", 1 << n) for n in range(52, 58)),
        ("SAVED_DIRTY", _BIT58),
        *((f"PKEY{n}", 1 << (59 + n)) for n in range(4)),
        ("NX", _NX),
    ),
    swp_pfn_bits=34,  # MAX_PHYSMEM_BITS is 46 with four levels of page tables
    huge=_PAT,  # PSE, in a PMD
)
"""x86-64 since v6.17."""


def _renamed(layout: PteLayout, **names: str) -> tuple[tuple[str, int], ...]:
    return tuple((names.get(name, name), mask) for name, mask in layout.bits)


X86_64_V6_16 = replace(
    X86_64, name="x86-64-v6.16", devmap=_BIT57, chg_mask=X86_64.chg_mask | _BIT57, bits=_renamed(X86_64, BIT57="DEVMAP")
)
"""x86-64, v6.6 to v6.16: bit 57 is devmap, which only `pte_modify` notices."""

X86_64_V6_5 = replace(
    X86_64, name="x86-64-v6.5", saved_dirty=0, devmap=_BIT58, bits=_renamed(X86_64, SAVED_DIRTY="DEVMAP")
)
"""x86-64 through v6.5: no SavedDirty; bit 58 is devmap."""

LAYOUTS: dict[str, PteLayout] = {lo.name: lo for lo in (X86_64, X86_64_V6_16, X86_64_V6_5)}


# --- checks -----------------------------------------------------------------------------------------------------------
def _unsigned(v: Any, bits: int, what: str) -> int:
    try:
        n = operator.index(v)
    except TypeError:
        raise ArgumentError(f"{what} must be an integer, not {type(v).__name__}") from None
    if n >> bits:
        raise ArgumentError(f"{what} must be in 0 .. 2**{bits} - 1, not {n}")
    return n


def _u64(v: Any) -> int:
    return _unsigned(v, 64, "a page-table entry")


# The helpers below test `type(v) is not int or v >> 64` in line: it is true for exactly what _u64 has to look at, and
# half the cost of a call.


# --- tests ------------------------------------------------------------------------------------------------------------
def pte_none(layout: PteLayout, v: int) -> bool:
    """Tell whether the slot is empty; x86 does not look at A and D, which a Xeon Phi erratum may set.

    >>> pte_none(X86_64, 0x60), pte_none(X86_64, 0x100)
    (True, False)
    """
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & ~layout.none_ignore == layout.none_value


def pte_present(layout: PteLayout, v: int) -> bool:
    """Tell whether the entry maps a page to Linux: P, or PROT_NONE."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & layout.present_mask != 0


def pte_protnone(layout: PteLayout, v: int) -> bool:
    """Tell whether the entry is PROT_NONE (mprotect or NUMA hinting): present to Linux, not to the hardware."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & (layout.protnone | layout.valid) == layout.protnone


def pte_pfn(layout: PteLayout, v: int) -> int:
    """Return the page frame number, undoing the inversion of PROT_NONE entries.

    >>> pte_pfn(X86_64, 0x1234067), pte_pfn(X86_64, pfn_pte(X86_64, 0x1234, 0x120))
    (4660, 4660)
    """
    if type(v) is not int or v >> 64:
        v = _u64(v)
    if v and not v & layout.valid:
        v = ~v
    return (v & layout.pfn_mask) >> layout.pfn_shift


def pte_write(layout: PteLayout, v: int) -> bool:
    """Tell whether the entry is writable: RW, or Dirty without RW (shadow stack) on a CPU that has them."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & layout.write != 0 or (layout.shstk and v & layout.dirty != 0)


def pte_young(layout: PteLayout, v: int) -> bool:
    """Tell whether the entry was accessed."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & layout.young != 0


def pte_dirty(layout: PteLayout, v: int) -> bool:
    """Tell whether the entry is dirty: Dirty or SavedDirty."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & (layout.dirty | layout.saved_dirty) != 0


def pte_soft_dirty(layout: PteLayout, v: int) -> bool:
    """Tell whether the entry is soft-dirty; never, where it is not configured."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & layout.soft_dirty != 0


def pte_uffd_wp(layout: PteLayout, v: int) -> bool:
    """Tell whether userfaultfd write-protects the entry."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & layout.uffd_wp != 0


def pte_special(layout: PteLayout, v: int) -> bool:
    """Tell whether the entry maps no counted page (zero page, device memory)."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & layout.special != 0


def _inverted(layout: PteLayout, v: int) -> bool:
    # __pte_needs_invert(): an entry (or protection) that is not empty and that the hardware ignores.
    return v != 0 and not v & layout.valid


# --- changes ----------------------------------------------------------------------------------------------------------
def _mksaveddirty(layout: PteLayout, v: int) -> int:
    # pte_mksaveddirty(): not writable and Dirty -> SavedDirty, whatever the CPU can do. A no-op before v6.6.
    if layout.saved_dirty and v & (layout.write | layout.dirty) == layout.dirty:
        return v & ~layout.dirty | layout.saved_dirty
    return v


def _clear_saveddirty(layout: PteLayout, v: int) -> int:
    # pte_clear_saveddirty(): writable and SavedDirty -> Dirty.
    if v & layout.write and v & layout.saved_dirty:
        return v & ~layout.saved_dirty | layout.dirty
    return v


def pte_wrprotect(layout: PteLayout, v: int) -> int:
    """Make the entry read-only; Dirty becomes SavedDirty since v6.6.

    >>> hex(pte_wrprotect(X86_64, 0x67)), hex(pte_wrprotect(X86_64_V6_5, 0x67))
    ('0x400000000000025', '0x65')
    """
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return _mksaveddirty(layout, v & ~layout.write)


def pte_mkwrite(layout: PteLayout, v: int, vm_flags: int = 0) -> int:
    """Make the entry writable, in the way its VMA asks for.

    A VM_SHADOW_STACK mapping gets RW=0, D=1 and keeps SavedDirty; any other gets RW, and SavedDirty becomes Dirty.
    Through v6.5 the VMA plays no part.
    """
    if type(v) is not int or v >> 64:
        v = _u64(v)
    if vm_flags & VM_SHADOW_STACK and layout.saved_dirty:
        return v & ~layout.write | layout.dirty
    return _clear_saveddirty(layout, v | layout.write)


def pte_mkclean(layout: PteLayout, v: int) -> int:
    """Clear Dirty and SavedDirty."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & ~(layout.dirty | layout.saved_dirty)


def pte_mkdirty(layout: PteLayout, v: int) -> int:
    """Make the entry dirty and soft-dirty; a read-only one gets SavedDirty instead of Dirty since v6.6."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return _mksaveddirty(layout, v | layout.dirty | layout.soft_dirty)


def pte_mkold(layout: PteLayout, v: int) -> int:
    """Clear the accessed bit."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & ~layout.young


def pte_mkyoung(layout: PteLayout, v: int) -> int:
    """Set the accessed bit."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v | layout.young


def pte_mksoft_dirty(layout: PteLayout, v: int) -> int:
    """Set soft-dirty, where configured."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v | layout.soft_dirty


def pte_clear_soft_dirty(layout: PteLayout, v: int) -> int:
    """Clear soft-dirty, where configured."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & ~layout.soft_dirty


def pte_mkuffd_wp(layout: PteLayout, v: int) -> int:
    """Set uffd-wp and write-protect the entry; nothing where uffd-wp is not configured."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    if not layout.uffd_wp:
        return v
    return pte_wrprotect(layout, v | layout.uffd_wp)


def pte_clear_uffd_wp(layout: PteLayout, v: int) -> int:
    """Clear uffd-wp; write permission does not come back."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & ~layout.uffd_wp


def pte_mkspecial(layout: PteLayout, v: int) -> int:
    """Mark the entry special."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v | layout.special


def pte_advance_pfn(layout: PteLayout, v: int, n: int) -> int:
    """Return the entry for the page `n` further on, as a 64-bit sum: PFN overflow is not looked at.

    PROT_NONE entries hold the PFN inverted, so theirs is a difference (arch/x86/include/asm/pgtable.h, v6.9+).

    >>> hex(pte_advance_pfn(X86_64, 0x1000067, 3))
    '0x1003067'
    """
    if type(v) is not int or v >> 64:
        v = _u64(v)
    if v and not v & layout.valid:
        return v - (n << layout.pfn_shift) & U64_MAX
    return v + (n << layout.pfn_shift) & U64_MAX


def pte_next_pfn(layout: PteLayout, v: int) -> int:
    """Return `pte_advance_pfn` by one page."""
    return pte_advance_pfn(layout, v, 1)


def pfn_pte(layout: PteLayout, pfn: int, prot: int) -> int:
    """Build an entry of a PFN and a protection; without P in `prot` the PFN is stored inverted.

    >>> hex(pfn_pte(X86_64, 0x1234, vm_get_page_prot(X86_64, VM_READ)))
    '0x8000000001234025'
    """
    prot = _unsigned(prot, 64, "a protection")
    v = _unsigned(pfn, 64 - layout.pfn_shift, "a PFN") << layout.pfn_shift
    if _inverted(layout, prot):
        v = ~v
    return v & layout.pfn_mask | prot


mk_pte = pfn_pte


def pte_modify(layout: PteLayout, v: int, prot: int) -> int:
    """Change the protection as mprotect and NUMA hinting do, keeping PFN, A, dirtiness, cache and software bits.

    The PFN is re-inverted when P goes or comes. Since v6.6 Dirty becomes SavedDirty when RW goes and Dirty again when
    it comes; an entry that had Dirty without RW (shadow stack) keeps it.
    """
    v = _u64(v)
    prot = _unsigned(prot, 64, "a protection")
    new = v & layout.chg_mask | prot & ~layout.chg_mask
    if _inverted(layout, v) != _inverted(layout, new):
        new ^= layout.pfn_mask
    if v & layout.write:
        return _mksaveddirty(layout, new)
    return _clear_saveddirty(layout, new)


def vm_get_page_prot(layout: PteLayout, vm_flags: int) -> int:
    """Return the protection of a mapping's new entries (arch/x86/mm/pgprot.c); a private mapping's never has RW.

    A VMA's ``vm_page_prot`` may have less: shared mappings that want to hear of the first write drop RW.

    >>> hex(vm_get_page_prot(X86_64, VM_READ | VM_WRITE | VM_SHARED))
    '0x8000000000000027'
    """
    vm_flags = _unsigned(vm_flags, 64, "VMA flags")
    prot = layout.prots[vm_flags & 15]
    if layout.pkey:
        low = layout.pkey & -layout.pkey
        prot |= (vm_flags >> VM_PKEY_SHIFT) * low & layout.pkey
    return prot


# --- swap-type entries ------------------------------------------------------------------------------------------------
def swp_entry(layout: PteLayout, type: int, offset: int) -> int:
    """Build a swap-type entry; x86 stores the offset inverted.

    >>> hex(swp_entry(X86_64, 31, 4))
    '0xfffffffffffff600'
    """
    type_ = _unsigned(type, layout.swp_type_bits, "a swap type")
    offset = _unsigned(offset, layout.swp_offset_bits, "a swap offset")
    if layout.swp_offset_inverted:
        offset ^= (1 << layout.swp_offset_bits) - 1
    return type_ << layout.swp_type_shift | offset << layout.swp_offset_shift


def swp_type(layout: PteLayout, v: int) -> int:
    """Return the type of a swap-type entry."""
    return _u64(v) >> layout.swp_type_shift & ((1 << layout.swp_type_bits) - 1)


def swp_offset(layout: PteLayout, v: int) -> int:
    """Return the offset of a swap-type entry."""
    v = _u64(v)
    if layout.swp_offset_inverted:
        v = ~v
    return v >> layout.swp_offset_shift & ((1 << layout.swp_offset_bits) - 1)


def pte_swp_exclusive(layout: PteLayout, v: int) -> bool:
    """Tell whether the swapped page belonged to this mm alone."""
    return _u64(v) & layout.swp_exclusive != 0


def pte_swp_mkexclusive(layout: PteLayout, v: int) -> int:
    """Set the exclusive bit of a swap entry."""
    return _u64(v) | layout.swp_exclusive


def pte_swp_clear_exclusive(layout: PteLayout, v: int) -> int:
    """Clear the exclusive bit of a swap entry."""
    return _u64(v) & ~layout.swp_exclusive


def pte_swp_soft_dirty(layout: PteLayout, v: int) -> bool:
    """Tell whether a swap-type entry is soft-dirty."""
    return _u64(v) & layout.swp_soft_dirty != 0


def pte_swp_mksoft_dirty(layout: PteLayout, v: int) -> int:
    """Set soft-dirty of a swap-type entry, where configured."""
    return _u64(v) | layout.swp_soft_dirty


def pte_swp_clear_soft_dirty(layout: PteLayout, v: int) -> int:
    """Clear soft-dirty of a swap-type entry, where configured."""
    return _u64(v) & ~layout.swp_soft_dirty


def pte_swp_uffd_wp(layout: PteLayout, v: int) -> bool:
    """Tell whether a swap-type entry is uffd-wp."""
    return _u64(v) & layout.swp_uffd_wp != 0


def pte_swp_mkuffd_wp(layout: PteLayout, v: int) -> int:
    """Set uffd-wp of a swap-type entry."""
    return _u64(v) | layout.swp_uffd_wp


def pte_swp_clear_uffd_wp(layout: PteLayout, v: int) -> int:
    """Clear uffd-wp of a swap-type entry."""
    return _u64(v) & ~layout.swp_uffd_wp


def swp_offset_pfn(layout: PteLayout, v: int) -> int:
    """Return the PFN that a migration, device or hwpoison entry holds in its offset."""
    offset = swp_offset(layout, v)
    return offset & ((1 << layout.swp_pfn_bits) - 1) if layout.swp_pfn_bits else offset


PTE_MARKER_UFFD_WP = 1
PTE_MARKER_POISONED = 2
PTE_MARKER_GUARD = 4  # v6.13+
SWP_PTE_MARKER = 31


def copy_pte_marker(marker: int, guard_markers: bool, uffd_wp: bool) -> int:
    """Return what of a PTE marker fork gives the child; 0: its entry stays none.

    Parameters
    ----------
    marker : int
        PTE_MARKER_* bits of the parent's entry.
    guard_markers : bool
        The kernel has guard markers (v6.13+).
    uffd_wp : bool
        The child's VMA has VM_UFFD_WP.

    Notes
    -----
    ``copy_pte_marker()``, include/linux/mm_inline.h, v6.6 to v6.19.
    """
    keep = PTE_MARKER_POISONED | guard_markers * PTE_MARKER_GUARD | uffd_wp * PTE_MARKER_UFFD_WP
    return marker & keep


_MARKERS = (("uffd-wp", PTE_MARKER_UFFD_WP), ("poisoned", PTE_MARKER_POISONED), ("guard", PTE_MARKER_GUARD))


SWP_KINDS = (
    "swap", "hwpoison", "migration read", "migration read-exclusive", "migration write", "device write", "device read",
    "device exclusive", "device exclusive write", "device exclusive read", "marker",
)  # fmt: skip
"""What a swap-type entry can be; the position is the number the compiled core knows a kind by."""


def swap_types(*, hwpoison: bool, migration: bool, device: int) -> dict[int, str]:
    """Number the special swap types as a kernel configuration does (include/linux/swap.h).

    Types below the lowest one returned are real swap files.

    Parameters
    ----------
    hwpoison, migration : bool
        CONFIG_MEMORY_FAILURE, CONFIG_MIGRATION.
    device : int
        Types taken by CONFIG_DEVICE_PRIVATE: 0 without, 4 through v6.14, 3 since v6.15.

    >>> swap_types(hwpoison=False, migration=True, device=0)
    {28: 'migration read', 29: 'migration read-exclusive', 30: 'migration write', 31: 'marker'}
    """
    devices = {
        0: (),
        3: ("device write", "device read", "device exclusive"),
        4: ("device write", "device read", "device exclusive write", "device exclusive read"),
    }
    if device not in devices:
        raise ArgumentError(f"device must be 0, 3 or 4, not {device!r}")
    names = (
        *(("hwpoison",) if hwpoison else ()),
        *(("migration read", "migration read-exclusive", "migration write") if migration else ()),
        *devices[device],
        "marker",
    )
    return dict(enumerate(names, SWP_PTE_MARKER + 1 - len(names)))


def _swap_type_candidates() -> dict[int, tuple[str, ...]]:
    found: dict[int, dict[str, None]] = {}
    for hwpoison in (False, True):
        for migration in (False, True):
            for device in (0, 3, 4):
                for n, name in swap_types(hwpoison=hwpoison, migration=migration, device=device).items():
                    found.setdefault(n, {})[name] = None
    return {n: tuple(sorted(names)) for n, names in found.items()}


_SWAP_TYPE_CANDIDATES = _swap_type_candidates()


def decode(layout: PteLayout, v: int, types: dict[int, str] | None = None) -> dict[str, Any]:
    """Account for an entry in words.

    Parameters
    ----------
    layout : PteLayout
    v : int
    types : dict of int to str, optional
        Special swap types of the kernel the entry comes from (`swap_types`). Without it a type whose meaning depends
        on the configuration lists every possible meaning.

    Returns
    -------
    dict
        ``value``, ``layout``, ``kind`` (``none``, ``present``, ``PROT_NONE``, ``swap``, ``marker`` or ``swap-type``
        where the type is ambiguous, otherwise its name), ``bits`` (names of set bits outside PFN or swap fields), and
        by kind ``pfn``, ``write``, ``young``, ... or ``type``, ``type_names``, ``offset``, ``exclusive``, ...

    >>> decode(X86_64, 0x8000000001234067)["bits"]
    ['P', 'RW', 'US', 'A', 'D', 'NX']
    >>> decode(X86_64, 0xFFFFFFFFFFFFF600)["markers"]
    ['guard']
    """
    v = _u64(v)
    out: dict[str, Any] = {"value": v, "hex": f"{v:#018x}", "layout": layout.name, "kind": "none", "bits": []}
    if pte_none(layout, v):
        out["bits"] = [name for name, mask in layout.bits if v & mask]
    elif pte_present(layout, v):
        protnone = pte_protnone(layout, v)
        out["kind"] = "PROT_NONE" if protnone else "present"
        names = (("PROTNONE" if protnone and mask == layout.protnone else name, mask) for name, mask in layout.bits)
        out["bits"] = [name for name, mask in names if v & mask]
        out["pfn"] = pte_pfn(layout, v)
        out["write"] = pte_write(layout, v)
        out["young"] = pte_young(layout, v)
        out["dirty"] = pte_dirty(layout, v)
        out["soft_dirty"] = pte_soft_dirty(layout, v) if layout.soft_dirty else None
        out["uffd_wp"] = pte_uffd_wp(layout, v)
        out["special"] = pte_special(layout, v)
        out["user"] = v & layout.user != 0
        out["exec"] = not v & layout.nx
        out["pkey"] = (v & layout.pkey) // (layout.pkey & -layout.pkey) if layout.pkey else 0
        out["shadow_stack"] = bool(layout.saved_dirty) and v & (layout.write | layout.dirty) == layout.dirty
    else:
        n = swp_type(layout, v)
        names_of = _SWAP_TYPE_CANDIDATES.get(n, ()) if types is None else (types[n],) if n in types else ()
        if not names_of:
            kinds = ["swap"]
        elif types is None and names_of != ("marker",):
            kinds = ["swap", *names_of]
        else:
            kinds = list(names_of)
        out["kind"] = kinds[0] if len(kinds) == 1 else "swap-type"
        out["type"] = n
        out["type_names"] = kinds
        out["offset"] = swp_offset(layout, v)
        out["exclusive"] = pte_swp_exclusive(layout, v)
        out["soft_dirty"] = pte_swp_soft_dirty(layout, v) if layout.swp_soft_dirty else None
        out["uffd_wp"] = pte_swp_uffd_wp(layout, v)
        if out["kind"] == "marker":
            out["markers"] = [name for name, bit in _MARKERS if out["offset"] & bit]
    return out
