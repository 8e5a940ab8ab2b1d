"""Page-table entry layouts and the kernel's ``pte_*`` helpers on plain Python ints.

A `PteLayout` is data - masks, shifts and `Step`s - and the helpers compute from it: no helper knows an architecture. A
mask of 0 means the kernel was built without that bit: helpers then do nothing, and the bit position is an ordinary bit
that batches compare.

Every helper takes ``(layout, v)`` with ``v`` an entry in ``0 .. 2**64 - 1`` and returns an int or a bool; anything else
raises `ArgumentError`. They model arch/*/include/asm/pgtable*.h, v6.6 to v6.19; each layout says which.

What is more than setting and clearing bits fits into one condition of a `Step`:

- x86-64, v6.6+: hardware Dirty on a read-only entry means "shadow stack", so what makes an entry read-only moves Dirty
  to SavedDirty, and what makes it writable moves it back;
- arm64: a writable entry without RDONLY is dirty; what makes it read-only notes that in a software bit;
- s390: the hardware knows neither young nor dirty: an old entry is invalid to it, a clean one read-only;
- loongarch64: the hardware's dirty bit permits writing; whether something was written is noted in MODIFIED.

And x86-64 alone stores the PFN of an entry that is neither empty nor valid bitwise inverted (the L1TF mitigation).
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ptebatch.errors import ArgumentError

U64_MAX = (1 << 64) - 1

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
class Step(NamedTuple):
    """One change of an entry, as numbers.

    Clears `clear`, sets `set`; and where the entry had ``v & mask == value`` before, also clears `then_clear` and sets
    `then_set`. The default never meets its condition.

    >>> hex(Step(clear=2, mask=0x40, value=0x40, then_clear=0x40, then_set=0x100)(0x43))
    '0x101'
    """

    clear: int = 0
    set: int = 0
    mask: int = 0
    value: int = 1
    then_clear: int = 0
    then_set: int = 0

    def __call__(self, v: int) -> int:
        """Return the entry `v` after the change."""
        clear, bits, mask, value, then_clear, then_set = self
        hit = v & mask == value
        v = v & ~clear | bits
        return v & ~then_clear | then_set if hit else v

    def without(self, bits: int) -> Step:
        """Return the step with those bits taken from what it sets."""
        return self._replace(set=self.set & ~bits)


@dataclass(frozen=True, slots=True)
class PteLayout:
    """One architecture's page-table entry, as data.

    Masks are of the 64-bit entry; 0 means the kernel modelled has no such bit. `arch` names the architecture and its
    page size; layouts of one `arch` are encodings of different kernels, and `needs` says which (`layout_for`).

    An entry is present if it has one of `present_mask` and all of `present_need`, empty if it equals `none_value` but
    for `none_ignore`, PROT_NONE if ``v & protnone_mask == protnone``, dirty if it has one of `dirty` or `saved_dirty`
    or if ``v & dirty_mask == dirty_value``. `valid` is what the hardware follows. `plain` are the bits one of which an
    entry has unless it stores its PFN inverted. `writable` is `write`, and what else counts as it.

    Steps: `wrprotect`, `mkwrite` (and `mkwrite_shstk` in a VM_SHADOW_STACK mapping), `mkclean`, `mkdirty`, `mkold`,
    `mkyoung`, `mkuffd_wp`; `mk_pte` completes PFN and protection to an entry, `ptep_set_wrprotect` is what
    write-protecting does to an entry in its table. ``set_ptes()`` takes `set_ptes_clear` off present entries.
    ``pte_modify()`` applies `modify_before`, keeps `chg_mask`, takes `prot_mask` of the protection, and applies
    `modify_after_writable` to what was writable and `modify_after` to the rest.

    `cont` marks the entries of a block of `cont_ptes` that the hardware may hold as one (arm64 contpte; 0: none, and
    the bit is one like any other); ``pte_mkcont()`` sets `mkcont`, and ``pte_batch_hint()`` knows of blocks if
    `cont_hint`.

    `bits` names bits and fields for people. Swap-type entries have `swp_base` set. `swp_pfn_bits` is the width of the
    PFN in the offset of migration and device entries (SWP_PFN_BITS); young and dirty of migration entries lie above it,
    and 0 says that the PFN is all there is. `huge` marks a leaf above the page tables, 0 says that those are not
    modelled. `variants` are what a kernel or CPU without a named feature has otherwise, and `configured` takes them.
    """

    name: str
    arch: str
    page_shift: int
    ptrs_per_pte: int
    pfn_shift: int
    pfn_mask: int
    plain: int
    none_value: int
    none_ignore: int
    present_mask: int
    present_need: int
    valid: int
    protnone: int
    protnone_mask: int
    write: int
    writable: int
    young: int
    dirty: int
    saved_dirty: int
    dirty_mask: int
    dirty_value: int
    soft_dirty: int
    uffd_wp: int
    special: int
    nx: int
    executable: int
    user: int
    pkey: int
    shstk: bool
    wrprotect: Step
    ptep_set_wrprotect: Step
    mkwrite: Step
    mkwrite_shstk: Step
    mkclean: Step
    mkdirty: Step
    mkold: Step
    mkyoung: Step
    mkuffd_wp: Step
    mk_pte: Step
    set_ptes_clear: int
    chg_mask: int
    prot_mask: int
    modify_before: Step
    modify_after_writable: tuple[Step, ...]
    modify_after: tuple[Step, ...]
    cont: int
    cont_ptes: int
    cont_hint: bool
    mkcont: int
    swp_base: int
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
    needs: tuple[tuple[str, bool], ...] = ()
    variants: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()

    def __hash__(self) -> int:
        """Hash what tells layouts apart; the rest follows from it."""
        return hash((self.name, self.soft_dirty, self.shstk, len(self.variants)))

    @property
    def page_size(self) -> int:
        """Bytes per base page."""
        return 1 << self.page_shift

    @property
    def max_pfn(self) -> int:
        """Highest page frame number an entry can hold."""
        return self.pfn_mask >> self.pfn_shift

    def configured(self, mem_soft_dirty: bool, shstk: bool = False, *, without: Collection[str] = ()) -> PteLayout:
        """Return this layout as a kernel with that configuration, on such a CPU, uses it.

        Parameters
        ----------
        mem_soft_dirty : bool
            CONFIG_MEM_SOFT_DIRTY. False clears the soft-dirty masks; True keeps those the layout has.
        shstk : bool
            The CPU has shadow stacks (X86_FEATURE_SHSTK); only matters with SavedDirty.
        without : collection of str
            Features that kernel or CPU lacks; only matters to a layout that has them among its `variants`.
        """
        layout = self
        for feature, otherwise in self.variants:
            if feature in without:
                left = tuple(variant for variant in layout.variants if variant[0] != feature)
                layout = replace(layout, **dict(otherwise), variants=left)
        shstk = bool(shstk) and layout.saved_dirty != 0
        soft = 0 if mem_soft_dirty else layout.soft_dirty
        return replace(
            layout,
            soft_dirty=layout.soft_dirty & ~soft,
            swp_soft_dirty=layout.swp_soft_dirty if mem_soft_dirty else 0,
            mkdirty=layout.mkdirty.without(soft),
            chg_mask=layout.chg_mask & ~soft,
            prot_mask=layout.prot_mask | soft,
            shstk=shstk,
            writable=layout.write | (layout.dirty if shstk else 0),
        )


def _layout(**given: Any) -> PteLayout:
    """Fill in what follows from the rest, and what most architectures do not have."""
    bits = dict(given["bits"])
    known = {
        "arch": given["name"],
        "plain": U64_MAX,
        "none_value": 0,
        "none_ignore": 0,
        "present_need": 0,
        "protnone_mask": given["protnone"] | given["valid"],
        "writable": given["write"],
        "saved_dirty": 0,
        "dirty_mask": 0,
        "dirty_value": 1,
        "soft_dirty": 0,
        "uffd_wp": 0,
        "nx": 0,
        "executable": 0,
        "user": 0,
        "pkey": 0,
        "shstk": False,
        "ptep_set_wrprotect": given["wrprotect"],
        "mkwrite_shstk": given["mkwrite"],
        "mkold": Step(clear=given["young"]),
        "mkyoung": Step(set=given["young"]),
        "mkuffd_wp": _mkuffd_wp(given["wrprotect"], given.get("uffd_wp", 0)),
        "mk_pte": Step(),
        "set_ptes_clear": 0,
        "prot_mask": U64_MAX & ~given["chg_mask"],
        "modify_before": Step(),
        "modify_after_writable": given.get("modify_after", ()),
        "modify_after": (),
        "cont": 0,
        "cont_ptes": 0,
        "cont_hint": False,
        "mkcont": 0,
        "swp_base": 0,
        "swp_type_bits": 5,
        "swp_offset_inverted": False,
        "swp_soft_dirty": 0,
        "swp_uffd_wp": 0,
    }
    # Every bit outside the PFN has a name.
    named = given["pfn_mask"] | sum(bits.values())
    rest = ((f"BIT{n}", 1 << n) for n in range(64) if not named >> n & 1)
    in_order = sorted([*bits.items(), *rest], key=lambda item: item[1])
    return PteLayout(**{**known, **given, "bits": tuple(in_order)})


def _mkuffd_wp(wrprotect: Step, uffd_wp: int) -> Step:
    # pte_mkuffd_wp() of every architecture: set the bit and write-protect; nothing where the bit does not exist.
    return wrprotect._replace(set=wrprotect.set | uffd_wp) if uffd_wp else Step()


def _numbered(name: str, low: int, n: int) -> tuple[tuple[str, int], ...]:
    return tuple((f"{name}{k}", 1 << (low + k)) for k in range(n))


def _prots(none: int, read: int, write: int, execute: int, read_exec: int, write_exec: int) -> tuple[int, ...]:
    """Return ``protection_map``, by VM_READ | VM_WRITE | VM_EXEC | VM_SHARED; no private mapping is writable."""
    private = (none, read, read, read, execute, read_exec, read_exec, read_exec)
    shared = (none, read, write, write, execute, read_exec, write_exec, write_exec)
    return (*private, *shared)


# x86-64: arch/x86/include/asm/{pgtable,pgtable_64,pgtable_types,pgtable-invert}.h, arch/x86/mm/{pgtable,pgprot}.c
_P, _RW, _US, _PWT, _PCD, _A, _D, _PAT, _G = (1 << n for n in range(9))
_SPECIAL, _UFFD_WP, _SOFT_DIRTY = 1 << 9, 1 << 10, 1 << 11
_BIT57, _BIT58 = 1 << 57, 1 << 58
_NX = 1 << 63
_PFN = ((1 << 52) - 1) & ~0xFFF

_READONLY_EXEC = _P | _US | _A

X86_64 = _layout(
    name="x86-64",
    needs=(("saved_dirty", True),),
    page_shift=12,
    ptrs_per_pte=512,
    pfn_shift=12,
    pfn_mask=_PFN,
    plain=_P,
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
    nx=_NX,
    user=_US,
    pkey=0xF << 59,
    wrprotect=Step(clear=_RW, mask=_D, value=_D, then_clear=_D, then_set=_BIT58),
    mkwrite=Step(set=_RW, mask=_BIT58, value=_BIT58, then_clear=_BIT58, then_set=_D),
    mkwrite_shstk=Step(clear=_RW, set=_D),
    mkclean=Step(clear=_D | _BIT58),
    mkdirty=Step(set=_D | _SOFT_DIRTY, mask=_RW, value=0, then_clear=_D, then_set=_BIT58),
    chg_mask=_PFN | _PCD | _PWT | _PAT | _SPECIAL | _A | _D | _BIT58 | _SOFT_DIRTY | _UFFD_WP,
    modify_after_writable=(Step(mask=_RW | _D, value=_D, then_clear=_D, then_set=_BIT58),),
    modify_after=(Step(mask=_RW | _BIT58, value=_RW | _BIT58, then_clear=_BIT58, then_set=_D),),
    swp_type_shift=59,
    swp_offset_shift=9,
    swp_offset_bits=50,
    swp_offset_inverted=True,
    swp_exclusive=_PWT,
    swp_soft_dirty=_RW,
    swp_uffd_wp=_US,
    swp_pfn_bits=34,  # MAX_PHYSMEM_BITS is 46 with four levels of page tables
    prots=_prots(
        none=_A | _G,
        read=_READONLY_EXEC | _NX,
        write=_READONLY_EXEC | _NX | _RW,
        execute=_READONLY_EXEC,
        read_exec=_READONLY_EXEC,
        write_exec=_READONLY_EXEC | _RW,
    ),
    bits=(
        *(("P", _P), ("RW", _RW), ("US", _US), ("PWT", _PWT), ("PCD", _PCD), ("A", _A), ("D", _D), ("PAT", _PAT)),
        *(("G", _G), ("SPECIAL", _SPECIAL), ("UFFD_WP", _UFFD_WP), ("SOFT_DIRTY", _SOFT_DIRTY)),
        *(("SAVED_DIRTY", _BIT58), *_numbered("PKEY", 59, 4), ("NX", _NX)),
    ),
    huge=_PAT,  # PSE, in a PMD
)
"""x86-64 since v6.17."""


def _renamed(layout: PteLayout, **names: str) -> tuple[tuple[str, int], ...]:
    return tuple((names.get(name, name), mask) for name, mask in layout.bits)


def _with_devmap(layout: PteLayout, bit: int) -> PteLayout:
    """Return the layout of kernels through v6.16, where one more bit says devmap; only `pte_modify` notices."""
    name = next(name for name, mask in layout.bits if mask == bit)
    return replace(
        layout,
        name=f"{layout.name}-v6.16",
        chg_mask=layout.chg_mask | bit,
        prot_mask=layout.prot_mask if layout.prot_mask == U64_MAX else layout.prot_mask & ~bit,
        bits=_renamed(layout, **{name: "DEVMAP"}),
    )


X86_64_V6_16 = _with_devmap(X86_64, _BIT57)
"""x86-64, v6.6 to v6.16."""

X86_64_V6_5 = replace(
    X86_64,
    name="x86-64-v6.5",
    needs=(("saved_dirty", False),),
    saved_dirty=0,
    bits=_renamed(X86_64, SAVED_DIRTY="DEVMAP"),
    wrprotect=Step(clear=_RW),
    ptep_set_wrprotect=Step(clear=_RW),
    mkwrite=Step(set=_RW),
    mkwrite_shstk=Step(set=_RW),
    mkclean=Step(clear=_D),
    mkdirty=Step(set=_D | _SOFT_DIRTY),
    mkuffd_wp=Step(clear=_RW, set=_UFFD_WP),
    modify_after_writable=(),
    modify_after=(),
)
"""x86-64 through v6.5: no SavedDirty; bit 58 is devmap."""


# arm64: arch/arm64/include/asm/{pgtable,pgtable-hwdef,pgtable-prot}.h, arch/arm64/mm/mmap.c. Physical addresses below
# 2^50 (2^48 through v6.8), without LPA2 and 52-bit addresses; a CPU without EPAN, whose execute-only mappings are
# readable; VMAs without MTE, GCS and overlays.
_ARM_VALID, _ARM_PAGE, _ARM_USER, _ARM_RDONLY = 1, 3, 1 << 6, 1 << 7
_ARM_SH, _ARM_AF, _ARM_NG = 3 << 8, 1 << 10, 1 << 11
_ARM_GP, _ARM_WRITE, _ARM_CONT, _ARM_PXN, _ARM_UXN, _ARM_DIRTY = (1 << n for n in (50, 51, 52, 53, 54, 55))
_ARM_SPECIAL, _ARM_BIT58 = 1 << 56, 1 << 58
_ARM_DEFAULT = _ARM_PAGE | _ARM_SH | _ARM_AF
_ARM_READONLY_EXEC = _ARM_DEFAULT | _ARM_USER | _ARM_RDONLY | _ARM_NG | _ARM_PXN
# A dirty entry that hardware may still write has WRITE and not RDONLY.
_ARM_HW_DIRTY = Step(mask=_ARM_WRITE | _ARM_RDONLY, value=_ARM_WRITE, then_set=_ARM_DIRTY)
_ARM_MODIFY = 7 << 2 | _ARM_USER | _ARM_PXN | _ARM_UXN | _ARM_RDONLY | _ARM_VALID | _ARM_WRITE | _ARM_GP


def _arm64(page_shift: int) -> tuple[PteLayout, PteLayout]:
    """Return the layouts since v6.10 and before."""
    granule = f"arm64-{1 << (page_shift - 10)}k"
    pfn = (1 << 50) - (1 << page_shift)
    mkwrite = Step(clear=_ARM_RDONLY, set=_ARM_WRITE)  # through v6.17: dirty, too
    none = (_ARM_DEFAULT & ~_ARM_VALID) | _ARM_RDONLY | _ARM_NG | _ARM_PXN | _ARM_UXN
    high = (
        *(("GP", _ARM_GP), ("DBM", _ARM_WRITE), ("CONT", _ARM_CONT), ("PXN", _ARM_PXN), ("UXN", _ARM_UXN)),
        *(("DIRTY", _ARM_DIRTY), ("SPECIAL", _ARM_SPECIAL), ("UFFD_WP", _ARM_BIT58), *_numbered("PO_IDX", 60, 3)),
    )
    low = (
        *(("VALID", _ARM_VALID), ("PAGE", 2), *_numbered("ATTR", 2, 3), ("USER", _ARM_USER)),
        *(("RDONLY", _ARM_RDONLY), *_numbered("SH", 8, 2), ("AF", _ARM_AF), ("NG", _ARM_NG)),
    )
    layout = _layout(
        name=granule,
        needs=(("arm64_present_invalid", True),),
        page_shift=page_shift,
        ptrs_per_pte=1 << (page_shift - 3),
        pfn_shift=page_shift,
        pfn_mask=pfn,
        present_mask=_ARM_VALID | _ARM_NG,
        valid=_ARM_VALID,
        protnone=_ARM_NG | _ARM_UXN,
        protnone_mask=_ARM_VALID | _ARM_NG | _ARM_USER | _ARM_UXN,
        write=_ARM_WRITE,
        young=_ARM_AF,
        dirty=_ARM_DIRTY,
        dirty_mask=_ARM_WRITE | _ARM_RDONLY,
        dirty_value=_ARM_WRITE,
        uffd_wp=_ARM_BIT58,
        special=_ARM_SPECIAL,
        nx=_ARM_UXN,
        user=_ARM_USER,
        wrprotect=_ARM_HW_DIRTY._replace(clear=_ARM_WRITE, set=_ARM_RDONLY),
        mkwrite=Step(set=_ARM_WRITE, mask=_ARM_DIRTY, value=_ARM_DIRTY, then_clear=_ARM_RDONLY),
        mkclean=Step(clear=_ARM_DIRTY, set=_ARM_RDONLY),
        mkdirty=Step(set=_ARM_DIRTY, mask=_ARM_WRITE, value=_ARM_WRITE, then_clear=_ARM_RDONLY),
        chg_mask=U64_MAX & ~(_ARM_MODIFY | _ARM_NG | 7 << 60),
        modify_before=_ARM_HW_DIRTY,
        modify_after=(
            Step(mask=_ARM_DIRTY | _ARM_WRITE, value=_ARM_DIRTY | _ARM_WRITE, then_clear=_ARM_RDONLY),
        ),
        swp_type_shift=6,
        swp_offset_shift=12,
        swp_offset_bits=50,
        swp_exclusive=1 << 2,
        swp_uffd_wp=1 << 3,
        swp_pfn_bits=48 - page_shift,
        prots=_prots(
            none=none,
            read=_ARM_READONLY_EXEC | _ARM_UXN,
            write=_ARM_READONLY_EXEC | _ARM_UXN | _ARM_WRITE,
            execute=_ARM_READONLY_EXEC,
            read_exec=_ARM_READONLY_EXEC,
            write_exec=_ARM_READONLY_EXEC | _ARM_WRITE,
        ),
        bits=(*low, *high),
        cont=_ARM_CONT,
        cont_ptes={12: 16, 14: 128, 16: 32}[page_shift],
        cont_hint=True,
        mkcont=_ARM_CONT,
        variants=(
            ("arm64_mkwrite_clean", (("mkwrite", mkwrite), ("mkwrite_shstk", mkwrite))),
            ("contpte", (("cont", 0), ("cont_ptes", 0), ("cont_hint", False), ("mkcont", 0))),
            ("pte_batch_hint", (("cont_hint", False),)),
            ("arm64_mkcont_only", (("mkcont", _ARM_CONT | _ARM_PAGE),)),
        ),
    )
    old = replace(
        layout,
        name=f"{granule}-v6.9",
        needs=(("arm64_present_invalid", False),),
        present_mask=_ARM_VALID | _ARM_BIT58,
        protnone=_ARM_BIT58,
        protnone_mask=_ARM_VALID | _ARM_BIT58,
        uffd_wp=0,
        mkuffd_wp=Step(),
        chg_mask=U64_MAX & ~(_ARM_MODIFY | _ARM_BIT58),
        prot_mask=_ARM_MODIFY | _ARM_BIT58,
        swp_type_shift=3,
        swp_offset_shift=8,
        swp_uffd_wp=0,
        prots=tuple(prot | _ARM_BIT58 if prot == none else prot for prot in layout.prots),
        bits=_renamed(layout, UFFD_WP="PROT_NONE", PO_IDX0="BIT60", PO_IDX1="BIT61", PO_IDX2="BIT62"),
    )
    return layout, old


ARM64_4K, ARM64_4K_V6_9 = _arm64(12)
ARM64_16K, ARM64_16K_V6_9 = _arm64(14)
ARM64_64K, ARM64_64K_V6_9 = _arm64(16)


# riscv64: arch/riscv/include/asm/{pgtable,pgtable-bits,pgtable-64}.h, arch/riscv/mm/init.c; Sv39, Sv48 and Sv57 alike.
# Memory types are Svpbmt's. N (Svnapot), which only hugetlb uses, is a bit like any other here.
_RV_V, _RV_R, _RV_W, _RV_X, _RV_U, _RV_G, _RV_A, _RV_D, _RV_SPECIAL = (1 << n for n in range(9))
_RV_SOFT_DIRTY, _RV_UFFD_WP = 1 << 59, 1 << 60
_RV_READ = _RV_V | _RV_A | _RV_U | _RV_R
RISCV64 = _layout(
    name="riscv64",
    page_shift=12,
    ptrs_per_pte=512,
    pfn_shift=10,
    pfn_mask=((1 << 54) - 1) & ~0x3FF,
    present_mask=_RV_V | _RV_G,
    valid=_RV_V,
    protnone=_RV_G,
    write=_RV_W,
    young=_RV_A,
    dirty=_RV_D,
    soft_dirty=_RV_SOFT_DIRTY,
    uffd_wp=_RV_UFFD_WP,
    special=_RV_SPECIAL,
    executable=_RV_X,
    user=_RV_U,
    wrprotect=Step(clear=_RV_W),
    mkwrite=Step(set=_RV_W),
    mkclean=Step(clear=_RV_D),
    mkdirty=Step(set=_RV_D | _RV_SOFT_DIRTY),
    chg_mask=U64_MAX & ~(_RV_V | _RV_R | _RV_W | _RV_X | _RV_U | _RV_G | 3 << 61),
    prot_mask=U64_MAX,
    swp_type_shift=7,
    swp_offset_shift=12,
    swp_offset_bits=52,
    swp_exclusive=_RV_A,
    swp_soft_dirty=_RV_X,
    swp_uffd_wp=_RV_U,
    swp_pfn_bits=44,  # MAX_PHYSMEM_BITS is 56
    prots=_prots(
        none=_RV_G | _RV_R,
        read=_RV_READ,
        write=_RV_READ | _RV_W,
        execute=(_RV_READ & ~_RV_R) | _RV_X,
        read_exec=_RV_READ | _RV_X,
        write_exec=_RV_READ | _RV_W | _RV_X,
    ),
    bits=(
        *(("V", _RV_V), ("R", _RV_R), ("W", _RV_W), ("X", _RV_X), ("U", _RV_U), ("G", _RV_G), ("A", _RV_A)),
        *(("D", _RV_D), ("SPECIAL", _RV_SPECIAL), ("RSW1", 1 << 9), ("SOFT_DIRTY", _RV_SOFT_DIRTY)),
        *(("UFFD_WP", _RV_UFFD_WP), *_numbered("PBMT", 61, 2), ("N", 1 << 63)),
    ),
    variants=(
        (
            "riscv_svrsw60t59b",
            (
                *(("soft_dirty", 0), ("swp_soft_dirty", 0), ("mkdirty", Step(set=_RV_D))),
                *(("uffd_wp", 0), ("swp_uffd_wp", 0), ("mkuffd_wp", Step())),
            ),
        ),
    ),
)


# s390x: arch/s390/include/asm/pgtable.h, without KVM guests (pgste) and on machines that have no-execute. An entry is
# present to Linux by a software bit; INVALID and PROTECT are the hardware's, which has no young and no dirty bit.
_390_PRESENT, _390_SOFT_DIRTY, _390_YOUNG, _390_DIRTY, _390_READ, _390_WRITE = (1 << n for n in range(6))
_390_SPECIAL, _390_UNUSED, _390_NOEXEC, _390_PROTECT, _390_INVALID, _390_LARGE = (1 << n for n in range(6, 12))
_390_READONLY_EXEC = _390_PRESENT | _390_READ | _390_INVALID | _390_PROTECT
_390_PAGE_MASK = U64_MAX & ~0xFFF
_390_MKYOUNG = Step(set=_390_YOUNG, mask=_390_READ, value=_390_READ, then_clear=_390_INVALID)
_390_WRITABLE_DIRTY = _390_WRITE | _390_DIRTY
S390X = _layout(
    name="s390x",
    page_shift=12,
    ptrs_per_pte=256,
    pfn_shift=12,
    pfn_mask=_390_PAGE_MASK,
    none_value=_390_INVALID,
    present_mask=_390_PRESENT,
    valid=_390_PRESENT,
    protnone=_390_PRESENT,
    protnone_mask=_390_PRESENT | _390_READ,
    write=_390_WRITE,
    young=_390_YOUNG,
    dirty=_390_DIRTY,
    soft_dirty=_390_SOFT_DIRTY,
    special=_390_SPECIAL,
    nx=_390_NOEXEC,
    wrprotect=Step(clear=_390_WRITE, set=_390_PROTECT),
    # What is not writable is left alone.
    ptep_set_wrprotect=Step(mask=_390_WRITE, value=_390_WRITE, then_clear=_390_WRITE, then_set=_390_PROTECT),
    mkwrite=Step(set=_390_WRITE, mask=_390_DIRTY, value=_390_DIRTY, then_clear=_390_PROTECT),
    mkclean=Step(clear=_390_DIRTY, set=_390_PROTECT),
    mkdirty=Step(set=_390_DIRTY | _390_SOFT_DIRTY, mask=_390_WRITE, value=_390_WRITE, then_clear=_390_PROTECT),
    mkold=Step(clear=_390_YOUNG, set=_390_INVALID),
    mkyoung=_390_MKYOUNG,
    mk_pte=_390_MKYOUNG,
    set_ptes_clear=_390_UNUSED,
    prot_mask=U64_MAX,
    chg_mask=_390_PAGE_MASK | _390_SPECIAL | _390_DIRTY | _390_YOUNG | _390_SOFT_DIRTY,
    modify_after=(
        Step(mask=_390_YOUNG | _390_READ, value=_390_YOUNG | _390_READ, then_clear=_390_INVALID),
        Step(mask=_390_WRITABLE_DIRTY, value=_390_WRITABLE_DIRTY, then_clear=_390_PROTECT),
    ),
    swp_base=_390_INVALID | _390_PROTECT,
    swp_type_shift=2,
    swp_offset_shift=12,
    swp_offset_bits=52,
    swp_exclusive=_390_LARGE,
    swp_soft_dirty=_390_SOFT_DIRTY,
    swp_pfn_bits=34,  # MAX_PHYSMEM_BITS is 46 by default
    prots=_prots(
        none=_390_PRESENT | _390_INVALID | _390_PROTECT,
        read=_390_READONLY_EXEC | _390_NOEXEC,
        write=_390_READONLY_EXEC | _390_NOEXEC | _390_WRITE,
        execute=_390_READONLY_EXEC,
        read_exec=_390_READONLY_EXEC,
        write_exec=_390_READONLY_EXEC | _390_WRITE,
    ),
    bits=(
        *(("PRESENT", _390_PRESENT), ("SOFT_DIRTY", _390_SOFT_DIRTY), ("YOUNG", _390_YOUNG), ("DIRTY", _390_DIRTY)),
        *(("READ", _390_READ), ("WRITE", _390_WRITE), ("SPECIAL", _390_SPECIAL), ("UNUSED", _390_UNUSED)),
        *(("NOEXEC", _390_NOEXEC), ("PROTECT", _390_PROTECT), ("INVALID", _390_INVALID), ("LARGE", _390_LARGE)),
    ),
)


# ppc64: arch/powerpc/include/asm/book3s/64/{pgtable,radix}.h with the radix MMU; values in the CPU's byte order. Every
# entry that is not empty, swapped ones included, has PTE; one that is changed at the moment has INVALID for PRESENT.
_PPC_EXEC, _PPC_WRITE, _PPC_READ, _PPC_PRIV, _PPC_SAO, _PPC_NON_IDEMPOTENT = (1 << n for n in range(6))
_PPC_DIRTY, _PPC_ACCESSED, _PPC_SOFT_DIRTY, _PPC_SPECIAL, _PPC_SW1 = (1 << n for n in range(7, 12))
_PPC_INVALID, _PPC_PTE, _PPC_PRESENT = (1 << n for n in (61, 62, 63))
_PPC_BASE = _PPC_PRESENT | _PPC_ACCESSED


def _ppc64(page_shift: int, ptrs_per_pte: int) -> PteLayout:
    pfn = (1 << 53) - (1 << page_shift)
    return _layout(
        name=f"ppc64-{1 << (page_shift - 10)}k",
        page_shift=page_shift,
        ptrs_per_pte=ptrs_per_pte,
        pfn_shift=page_shift,
        pfn_mask=pfn,
        none_ignore=_PPC_DIRTY | _PPC_ACCESSED,
        present_mask=_PPC_PRESENT | _PPC_INVALID,
        present_need=_PPC_PTE,
        valid=_PPC_PRESENT,
        protnone=_PPC_PRESENT | _PPC_PTE,
        protnone_mask=_PPC_PRESENT | _PPC_PTE | _PPC_READ | _PPC_WRITE | _PPC_EXEC,
        write=_PPC_WRITE,
        young=_PPC_ACCESSED,
        dirty=_PPC_DIRTY,
        soft_dirty=_PPC_SOFT_DIRTY,
        special=_PPC_SPECIAL,
        executable=_PPC_EXEC,
        wrprotect=Step(clear=_PPC_WRITE),
        mkwrite=Step(set=_PPC_READ | _PPC_WRITE),
        mkclean=Step(clear=_PPC_DIRTY),
        mkdirty=Step(set=_PPC_DIRTY | _PPC_SOFT_DIRTY),
        mk_pte=Step(set=_PPC_PTE),
        prot_mask=U64_MAX,
        chg_mask=pfn | _PPC_DIRTY | _PPC_ACCESSED | _PPC_SPECIAL | _PPC_PTE | _PPC_SOFT_DIRTY,
        swp_base=_PPC_PTE,
        swp_type_shift=0,
        swp_offset_shift=page_shift,
        swp_offset_bits=53 - page_shift,
        swp_exclusive=_PPC_NON_IDEMPOTENT,
        swp_soft_dirty=_PPC_SOFT_DIRTY,
        swp_pfn_bits=51 - page_shift,  # MAX_PHYSMEM_BITS is 51 with SPARSEMEM_VMEMMAP and SPARSEMEM_EXTREME
        prots=_prots(
            none=_PPC_BASE,
            read=_PPC_BASE | _PPC_READ,
            write=_PPC_BASE | _PPC_READ | _PPC_WRITE,
            execute=_PPC_BASE | _PPC_EXEC,
            read_exec=_PPC_BASE | _PPC_READ | _PPC_EXEC,
            write_exec=_PPC_BASE | _PPC_READ | _PPC_WRITE | _PPC_EXEC,
        ),
        bits=(
            *(("EXEC", _PPC_EXEC), ("WRITE", _PPC_WRITE), ("READ", _PPC_READ), ("PRIV", _PPC_PRIV)),
            *(("SAO", _PPC_SAO), ("NON_IDEMPOTENT", _PPC_NON_IDEMPOTENT), ("C", _PPC_DIRTY), ("R", _PPC_ACCESSED)),
            *(("SOFT_DIRTY", _PPC_SOFT_DIRTY), ("SPECIAL", _PPC_SPECIAL), ("SW1", _PPC_SW1)),
            *(*_numbered("PKEY", 56, 5), ("INVALID", _PPC_INVALID), ("PTE", _PPC_PTE), ("PRESENT", _PPC_PRESENT)),
        ),
    )


PPC64_4K, PPC64_64K = _ppc64(12, 512), _ppc64(16, 32)


# loongarch64: arch/loongarch/include/asm/{pgtable,pgtable-bits}.h, arch/loongarch/mm/cache.c. VALID is also the young
# bit: the first access to an old page faults. D permits writing.
_LA_VALID, _LA_D, _LA_PLV_USER, _LA_CC, _LA_G = 1, 1 << 1, 3 << 2, 1 << 4, 1 << 6
_LA_PRESENT, _LA_WRITE, _LA_MODIFIED, _LA_PROTNONE, _LA_SPECIAL = (1 << n for n in range(7, 12))
_LA_NO_READ, _LA_NO_EXEC = 1 << 61, 1 << 62
_LA_READONLY_EXEC = _LA_CC | _LA_VALID | _LA_PLV_USER | _LA_PRESENT
_LA_NOTE_D = Step(mask=_LA_D, value=_LA_D, then_set=_LA_MODIFIED)


def _loongarch64(page_shift: int) -> PteLayout:
    pfn = (1 << 48) - (1 << page_shift)
    wrprotect = Step(clear=_LA_WRITE | _LA_D)
    return _layout(
        name=f"loongarch64-{1 << (page_shift - 10)}k",
        page_shift=page_shift,
        ptrs_per_pte=1 << (page_shift - 3),
        pfn_shift=page_shift,
        pfn_mask=pfn,
        none_ignore=_LA_G,
        present_mask=_LA_PRESENT | _LA_PROTNONE,
        valid=_LA_PRESENT,
        protnone=_LA_PROTNONE,
        protnone_mask=_LA_PROTNONE,
        write=_LA_WRITE,
        young=_LA_VALID,
        dirty=_LA_D | _LA_MODIFIED,
        special=_LA_SPECIAL,
        nx=_LA_NO_EXEC,
        user=_LA_PLV_USER,
        wrprotect=_LA_NOTE_D._replace(clear=_LA_WRITE | _LA_D),
        mkwrite=Step(set=_LA_WRITE, mask=_LA_MODIFIED, value=_LA_MODIFIED, then_set=_LA_D),
        mkclean=Step(clear=_LA_D | _LA_MODIFIED),
        mkdirty=Step(set=_LA_MODIFIED, mask=_LA_WRITE, value=_LA_WRITE, then_set=_LA_D),
        chg_mask=pfn | _LA_MODIFIED | _LA_SPECIAL | 3 << 4 | _LA_PLV_USER,
        modify_before=_LA_NOTE_D,
        swp_type_shift=16,
        swp_type_bits=7,
        swp_offset_shift=24,
        swp_offset_bits=40,
        swp_exclusive=1 << 23,
        swp_pfn_bits=48 - page_shift,
        prots=_prots(
            none=_LA_CC | _LA_PLV_USER | _LA_PROTNONE | _LA_NO_EXEC | _LA_NO_READ,
            read=_LA_READONLY_EXEC | _LA_NO_EXEC,
            write=_LA_READONLY_EXEC | _LA_NO_EXEC | _LA_WRITE,
            execute=_LA_READONLY_EXEC,
            read_exec=_LA_READONLY_EXEC,
            write_exec=_LA_READONLY_EXEC | _LA_WRITE,
        ),
        bits=(
            *(("VALID", _LA_VALID), ("D", _LA_D), *_numbered("PLV", 2, 2), *_numbered("CACHE", 4, 2), ("G", _LA_G)),
            *(("PRESENT", _LA_PRESENT), ("WRITE", _LA_WRITE), ("MODIFIED", _LA_MODIFIED), ("PROTNONE", _LA_PROTNONE)),
            *(("SPECIAL", _LA_SPECIAL), ("PRESENT_INVALID", 1 << 60), ("NO_READ", _LA_NO_READ)),
            *(("NO_EXEC", _LA_NO_EXEC), ("RPLV", 1 << 63)),
        ),
        variants=(
            ("loongarch_wrprotect_modified", (("wrprotect", wrprotect), ("ptep_set_wrprotect", wrprotect))),
        ),
    )


LOONGARCH64_4K, LOONGARCH64_16K, LOONGARCH64_64K = (_loongarch64(shift) for shift in (12, 14, 16))

_CURRENT = (
    *(X86_64, ARM64_4K, ARM64_16K, ARM64_64K, RISCV64, S390X, PPC64_4K, PPC64_64K),
    *(LOONGARCH64_4K, LOONGARCH64_16K, LOONGARCH64_64K),
)
ARCHITECTURES: tuple[str, ...] = tuple(layout.arch for layout in _CURRENT)
"""Every `PteLayout.arch`."""

LAYOUTS: dict[str, PteLayout] = {
    layout.name: layout
    for layout in (
        *_CURRENT,
        *(X86_64_V6_16, X86_64_V6_5, ARM64_4K_V6_9, ARM64_16K_V6_9, ARM64_64K_V6_9),
        *(_with_devmap(layout, _PPC_SW1) for layout in (PPC64_4K, PPC64_64K)),
        *(_with_devmap(layout, 1 << 59) for layout in (LOONGARCH64_4K, LOONGARCH64_16K, LOONGARCH64_64K)),
    )
}
"""Every layout by its name; those named like an architecture are the newest."""


def layout_for(arch: str, switches: Mapping[str, object]) -> PteLayout:
    """Return the layout in which kernels with these switches (`KernelSemantics.switches`) write entries.

    Parameters
    ----------
    arch : str
        One of `ARCHITECTURES`.
    switches : mapping of str to object

    Raises
    ------
    ArgumentError
        No such architecture.

    >>> layout_for("arm64-4k", {"arm64_present_invalid": False}).name
    'arm64-4k-v6.9'
    """
    if arch not in ARCHITECTURES:
        raise ArgumentError(f"no architecture {arch!r}; they are {', '.join(ARCHITECTURES)}")
    same = (layout for layout in LAYOUTS.values() if layout.arch == arch)
    return next(layout for layout in same if not unmet(layout, switches))


def unmet(layout: PteLayout, switches: Mapping[str, object]) -> list[str]:
    """Return what a kernel must be set to for its entries to be of this layout: ``switch=on`` or ``switch=off``.

    >>> unmet(X86_64, {"saved_dirty": False})
    ['saved_dirty=on']
    """
    return [f"{name}={'on' if on else 'off'}" for name, on in layout.needs if bool(switches[name]) != on]


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
    """Tell whether the slot is empty, whatever bits the hardware may leave there.

    >>> pte_none(X86_64, 0x60), pte_none(X86_64, 0x100), pte_none(S390X, 0), pte_none(S390X, 0x400)
    (True, False, False, True)
    """
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & ~layout.none_ignore == layout.none_value


def pte_present(layout: PteLayout, v: int) -> bool:
    """Tell whether the entry maps a page to Linux: valid, or PROT_NONE."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & layout.present_mask != 0 and v & layout.present_need == layout.present_need


def pte_protnone(layout: PteLayout, v: int) -> bool:
    """Tell whether the entry is PROT_NONE (mprotect or NUMA hinting): present to Linux, not to the hardware."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & layout.protnone_mask == layout.protnone


def pte_pfn(layout: PteLayout, v: int) -> int:
    """Return the page frame number, undoing the inversion of x86's PROT_NONE entries.

    >>> pte_pfn(X86_64, 0x1234067), pte_pfn(X86_64, pfn_pte(X86_64, 0x1234, 0x120))
    (4660, 4660)
    """
    if type(v) is not int or v >> 64:
        v = _u64(v)
    if v and not v & layout.plain:
        v = ~v
    return (v & layout.pfn_mask) >> layout.pfn_shift


def pte_write(layout: PteLayout, v: int) -> bool:
    """Tell whether the entry is writable: on an x86 CPU with shadow stacks also by Dirty without RW."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & layout.writable != 0


def pte_young(layout: PteLayout, v: int) -> bool:
    """Tell whether the entry was accessed."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & layout.young != 0


def pte_dirty(layout: PteLayout, v: int) -> bool:
    """Tell whether the entry is dirty, by any of the ways to say so."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & (layout.dirty | layout.saved_dirty) != 0 or v & layout.dirty_mask == layout.dirty_value


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
    # __pte_needs_invert(): an entry (or protection) that is not empty and that the hardware ignores; x86 only.
    return v != 0 and not v & layout.plain


# --- changes ----------------------------------------------------------------------------------------------------------
def pte_wrprotect(layout: PteLayout, v: int) -> int:
    """Make the entry read-only; it stays dirty (except on loongarch64 before the fix that a variant names).

    >>> hex(pte_wrprotect(X86_64, 0x67)), hex(pte_wrprotect(X86_64_V6_5, 0x67))
    ('0x400000000000025', '0x65')
    """
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return layout.wrprotect(v)


def ptep_set_wrprotect(layout: PteLayout, v: int) -> int:
    """Return what write-protecting makes of an entry in its table; s390 leaves one that is not writable alone."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return layout.ptep_set_wrprotect(v)


def pte_mkwrite(layout: PteLayout, v: int, vm_flags: int = 0) -> int:
    """Make the entry writable, in the way its VMA asks for: x86 has a way of its own for VM_SHADOW_STACK (v6.6+)."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return layout.mkwrite_shstk(v) if vm_flags & VM_SHADOW_STACK else layout.mkwrite(v)


def pte_mkclean(layout: PteLayout, v: int) -> int:
    """Make the entry clean."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return layout.mkclean(v)


def pte_mkdirty(layout: PteLayout, v: int) -> int:
    """Make the entry dirty and soft-dirty."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return layout.mkdirty(v)


def pte_mkold(layout: PteLayout, v: int) -> int:
    """Make the entry not accessed."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return layout.mkold(v)


def pte_mkyoung(layout: PteLayout, v: int) -> int:
    """Make the entry accessed."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return layout.mkyoung(v)


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
    return layout.mkuffd_wp(v)


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

    x86's PROT_NONE entries hold the PFN inverted, so theirs is a difference (v6.9+).

    >>> hex(pte_advance_pfn(X86_64, 0x1000067, 3))
    '0x1003067'
    """
    if type(v) is not int or v >> 64:
        v = _u64(v)
    if v and not v & layout.plain:
        return v - (n << layout.pfn_shift) & U64_MAX
    return v + (n << layout.pfn_shift) & U64_MAX


def pte_valid_cont(layout: PteLayout, v: int) -> bool:
    """Tell whether the entry belongs to a block that the hardware may hold as one (arm64 contpte)."""
    if type(v) is not int or v >> 64:
        v = _u64(v)
    return v & layout.cont != 0 and v & layout.valid != 0


def pte_batch_hint(layout: PteLayout, idx: int, v: int) -> int:
    """Return how many entries from slot `idx`, which holds `v`, are certain to form a batch: the rest of its block.

    >>> pte_batch_hint(ARM64_4K, 18, ARM64_4K.cont | ARM64_4K.valid), pte_batch_hint(X86_64, 18, 0x67)
    (14, 1)
    """
    if layout.cont_hint and pte_valid_cont(layout, v):
        return layout.cont_ptes - idx % layout.cont_ptes
    return 1


def ptep_get(layout: PteLayout, entries: Any, idx: int) -> int:
    """Read a slot of a table; one of a folded block (arm64 contpte) with the young and dirty state of all of it."""
    v = int(entries[idx])
    if not pte_valid_cont(layout, v):
        return v
    start = idx - idx % layout.cont_ptes
    block = [int(entry) for entry in entries[start : start + layout.cont_ptes]]
    if any(pte_dirty(layout, entry) for entry in block):
        v = pte_mkdirty(layout, v)
    if any(pte_young(layout, entry) for entry in block):
        v = pte_mkyoung(layout, v)
    return v


def pte_next_pfn(layout: PteLayout, v: int) -> int:
    """Return `pte_advance_pfn` by one page."""
    return pte_advance_pfn(layout, v, 1)


def pfn_pte(layout: PteLayout, pfn: int, prot: int) -> int:
    """Build an entry of a PFN and a protection.

    x86 stores the PFN inverted without P in `prot`; s390 makes the entry young; ppc64 marks it as a leaf.

    >>> hex(pfn_pte(X86_64, 0x1234, vm_get_page_prot(X86_64, VM_READ)))
    '0x8000000001234025'
    """
    prot = _unsigned(prot, 64, "a protection")
    v = _unsigned(pfn, 64 - layout.pfn_shift, "a PFN") << layout.pfn_shift
    if _inverted(layout, prot):
        v = ~v
    return layout.mk_pte(v & layout.pfn_mask | prot)


mk_pte = pfn_pte


def pte_modify(layout: PteLayout, v: int, prot: int) -> int:
    """Change the protection as mprotect and NUMA hinting do, keeping PFN, young, dirty, cache and software bits.

    x86 re-inverts the PFN when P goes or comes. Since v6.6 its Dirty becomes SavedDirty when RW goes and Dirty again
    when it comes; an entry that had Dirty without RW (shadow stack) keeps it.
    """
    v = _u64(v)
    prot = _unsigned(prot, 64, "a protection")
    old = layout.modify_before(v)
    new = old & layout.chg_mask | prot & layout.prot_mask
    if _inverted(layout, v) != _inverted(layout, new):
        new ^= layout.pfn_mask
    for step in layout.modify_after_writable if v & layout.write else layout.modify_after:
        new = step(new)
    return new


def vm_get_page_prot(layout: PteLayout, vm_flags: int) -> int:
    """Return the protection of a mapping's new entries; a private mapping's never permits writing.

    A VMA's ``vm_page_prot`` may have less: shared mappings that want to hear of the first write drop write permission.

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

    >>> hex(swp_entry(X86_64, 31, 4)), hex(swp_entry(S390X, 31, 4))
    ('0xfffffffffffff600', '0x467c')
    """
    type_ = _unsigned(type, layout.swp_type_bits, "a swap type")
    offset = _unsigned(offset, layout.swp_offset_bits, "a swap offset")
    if layout.swp_offset_inverted:
        offset ^= (1 << layout.swp_offset_bits) - 1
    return layout.swp_base | type_ << layout.swp_type_shift | offset << layout.swp_offset_shift


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
        out["uffd_wp"] = pte_uffd_wp(layout, v) if layout.uffd_wp else None
        out["special"] = pte_special(layout, v)
        out["user"] = v & layout.user != 0 if layout.user else None
        out["exec"] = v & layout.executable != 0 if layout.executable else not v & layout.nx
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
        out["uffd_wp"] = pte_swp_uffd_wp(layout, v) if layout.swp_uffd_wp else None
        if out["kind"] == "marker":
            out["markers"] = [name for name, bit in _MARKERS if out["offset"] & bit]
    return out
