"""Address spaces of many small areas, for comparing implementations on every layout at little cost per case.

Each area is a case: a VMA of its own with folios of its own, a few to some tens of entries. They lie one after another,
across the ends of page tables. All chance comes from a seed.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from ptebatch import arch
from ptebatch.folio import FolioTable
from ptebatch.mm import Mm, Vma, account, configured, swap_types
from ptebatch.semantics import PRESETS, KernelSemantics

# Lengths of areas: most are short, so that a plain-Python implementation gets through many.
LENGTHS = (*range(1, 7), *range(1, 7), *range(1, 4), 10, 30)
PRIVATE = arch.VM_READ | arch.VM_WRITE | arch.VM_MAYREAD | arch.VM_MAYWRITE
# Private and writable, private and read-only, shared, private that can never be written.
VM_FLAGS = (
    *(PRIVATE, PRIVATE, PRIVATE, PRIVATE & ~arch.VM_WRITE),
    *(PRIVATE | arch.VM_SHARED, arch.VM_READ | arch.VM_MAYREAD),
)


def kernel(rng: random.Random) -> KernelSemantics:
    """Draw a kernel and its configuration; half of the time one that batches lately."""
    semantics = PRESETS[rng.choice([*PRESETS, *[f"v6.{n}" for n in range(9, 20)]])]
    semantics = semantics.replace(loongarch_wrprotect_modified=rng.random() < 0.5)
    if semantics.contpte:
        semantics = semantics.replace(contpte=rng.random() < 0.8, pte_batch_hint=rng.random() < 0.8)
    config = replace(
        semantics.config,
        mem_soft_dirty=rng.random() < 0.7,
        x86_shstk=rng.random() < 0.2,
        no_page_mapcount=semantics.mm_id and rng.random() < 0.2,
        riscv_svrsw60t59b=semantics.riscv_software_bits and rng.random() < 0.7,
    )
    return replace(semantics, config=config)


class Maker:
    """Makes one address space."""

    def __init__(self, name: str, seed: int) -> None:
        self.rng = random.Random(f"{name} {seed}")
        self.semantics = kernel(self.rng)
        bare = arch.layout_for(name, self.semantics.switches)
        self.layout = configured(bare, self.semantics)
        self.types = {kind: number for number, kind in swap_types(self.semantics).items()}
        self.folios = FolioTable()
        self.pfn = 1 << 18
        self.slot = 0
        self.heads: list[tuple[int, int, bool, bool, bool]] = []  # PFN, order, anon, swapbacked, device
        field = self.layout.pfn_mask | self.layout.present_mask | self.layout.present_need | self.layout.special
        if self.rng.random() < 0.9:  # a mark of contpte on entries that are no block: unfolding writes over others
            field |= self.layout.cont
        self.spare = [mask for _, mask in self.layout.bits if not mask & field]
        self.mm = Mm(bare, self.folios, mm_id=self.folios.new_mm_id())

    def make(self, nr_areas: int) -> Mm:
        """Fill the address space: areas in groups of eight about the end of a table."""
        rng, layout, ptrs = self.rng, self.layout, self.layout.ptrs_per_pte
        shift = layout.page_shift
        size, at = layout.cont_ptes, 0
        vmas: list[Vma] = []
        values: list[list[int]] = []
        while len(vmas) < nr_areas:
            if len(vmas) % 8 == 0:
                at = max(-(-at // ptrs) + 1, 2) * ptrs - rng.randrange(min(ptrs, 120))
            vm_flags = self.vm_flags()
            if size and len(vmas) + 2 <= nr_areas and rng.random() < 5 / size:
                at = -(-at // size) * size
                entries = self.blocks(vm_flags)
                cut = rng.choice((0, rng.randrange(len(entries))))
                parts = [part for part in (entries[:cut], entries[cut:]) if part]
            else:
                parts = [self.area(vm_flags, rng.choice(LENGTHS))]
            for part in parts:
                vm_ops = rng.choice((None, None, "file", "shmem"))
                vma = Vma(at << shift, (at + len(part)) << shift, vm_flags, vm_ops=vm_ops)
                vma.uffd_event_fork = rng.random() < 0.5
                vmas.append(vma)
                values.append(part)
                at += len(part)
            at += rng.choice((0, 0, 1, 3))
        self.mm.vmas = vmas
        for vma in vmas:
            self.mm.add_tables(vma.start, vma.end)
        for vma, entries in zip(vmas, values, strict=True):
            self.mm.fill(vma.start, np.array(entries, dtype=np.uint64))
        self.mm.has_pinned = rng.random() < 0.3
        self.add_folios()
        account(self.mm, semantics=self.semantics)
        self.unsettle()
        return self.mm

    def vm_flags(self) -> int:
        rng = self.rng
        flags = rng.choice(VM_FLAGS)
        flags |= rng.choice((0, 0, arch.VM_SOFTDIRTY)) | rng.choice((0, 0, arch.VM_UFFD_WP))
        return flags | (arch.VM_SHADOW_STACK if rng.random() < 0.05 else 0)

    def area(self, vm_flags: int, most: int) -> list[int]:
        rng, entries = self.rng, []
        prot = arch.vm_get_page_prot(self.layout, vm_flags)
        while len(entries) < most:
            kind = rng.random()
            if kind < 0.75:
                entries += self.present(prot)
            elif kind < 0.85:
                entries += [self.layout.none_value] * rng.randint(1, 2)
            else:
                entries.append(self.nonpresent())
        return entries[:most]

    def blocks(self, vm_flags: int) -> list[int]:
        """Entries of one folio of one to four blocks of contpte, from its start on; most of the blocks are folded."""
        rng, layout, size = self.rng, self.layout, self.layout.cont_ptes
        order = size.bit_length() - 1 + rng.randrange(3 if size == 16 else 2)
        head = self.folio(order, rng.random() < 0.7, rng.random() < 0.7)
        prot = arch.vm_get_page_prot(layout, vm_flags)
        entries: list[int] = []
        for block in range(1 << order >> size.bit_length() - 1):
            writable, folded, hardware = rng.random() < 0.6, rng.random() < 0.7, rng.choice((0.0, 0.0, 0.1, 1.0))
            for k in range(block * size, (block + 1) * size):
                v = arch.mk_pte(layout, head + k, prot)
                v = arch.pte_mkwrite(layout, v) if writable else arch.pte_wrprotect(layout, v)
                v = arch.pte_mkdirty(layout, v) if rng.random() < hardware else arch.pte_mkclean(layout, v)
                v = arch.pte_mkyoung(layout, v) if rng.random() < hardware else arch.pte_mkold(layout, v)
                entries.append(v | layout.cont if folded else v)
            if rng.random() < 0.1:  # one that differs: in a folded block no kernel leaves that
                entries[rng.randrange(block * size, len(entries))] ^= rng.choice(self.spare)
        return entries

    def folio(self, order: int, anon: bool, swapbacked: bool, device: bool = False) -> int:
        """Choose a place for a folio, sometimes with room before it, so that folios of a size do not always touch."""
        rng = self.rng
        pages = 1 << order
        self.pfn = -(-self.pfn // pages) * pages + rng.choice((0, pages))
        head, self.pfn = self.pfn, self.pfn + pages
        self.heads.append((head, order, anon, swapbacked or anon, device))
        return head

    def present(self, prot: int) -> list[int]:
        """A run of entries of one folio, whole or in part, that differ here and there."""
        rng, layout = self.rng, self.layout
        order = rng.choice((0, 0, 1, 2, 3, 4, 4, 5))
        head = self.folio(order, rng.random() < 0.7, rng.random() < 0.7)
        first = 0 if rng.random() < 0.6 else rng.randrange(1 << order)
        nr = (1 << order) - first if rng.random() < 0.6 else rng.randint(1, (1 << order) - first)
        writable, dirty, young, soft, wp = (rng.random() < share for share in (0.6, 0.6, 0.6, 0.5, 0.15))
        spare = rng.choice(self.spare) if rng.random() < 0.2 else 0
        uneven = rng.choice((0.0, 0.0, 0.1, 0.4))
        if rng.random() < 0.05:
            prot = layout.prots[0]
        entries = []
        for k in range(nr):
            v = arch.mk_pte(layout, head + first + k, prot)
            flip = [rng.random() < uneven for _ in range(6)] if uneven else [False] * 6
            v = arch.pte_mkwrite(layout, v) if writable ^ flip[0] else arch.pte_wrprotect(layout, v)
            v = arch.pte_mkdirty(layout, v) if dirty ^ flip[1] else arch.pte_mkclean(layout, v)
            v = arch.pte_mkyoung(layout, v) if young ^ flip[2] else arch.pte_mkold(layout, v)
            v = arch.pte_mksoft_dirty(layout, v) if soft ^ flip[3] else arch.pte_clear_soft_dirty(layout, v)
            v = arch.pte_mkuffd_wp(layout, v) if wp ^ (flip[4] and flip[5]) else v
            v ^= spare  # also what no kernel would write
            if uneven and rng.random() < 0.05:
                v ^= rng.choice(self.spare)
            if rng.random() < 0.01:
                v = arch.pte_mkspecial(layout, v)
            entries.append(v)
        return entries

    def nonpresent(self) -> int:
        rng, layout = self.rng, self.layout
        kind = rng.choice(("swap", "swap", "swap", *self.types))
        software = 0
        for bit in (layout.swp_exclusive, layout.swp_soft_dirty, layout.swp_uffd_wp):
            software |= bit * (rng.random() < 0.5)
        if kind == "swap":
            self.slot += rng.randint(1, 2)
            return arch.swp_entry(layout, rng.randrange(2), self.slot) | software
        if kind == "marker":
            return arch.swp_entry(layout, self.types[kind], rng.randrange(1, 8))
        offset = self.folio(rng.choice((0, 2)), True, True, kind in ("device write", "device read"))
        return arch.swp_entry(layout, self.types[kind], offset) | software

    def add_folios(self) -> None:
        pfns, orders, anon, swapbacked, device = map(np.array, zip(*self.heads, strict=True))
        self.folios.add_folios(pfns, orders, anon=anon, swapbacked=swapbacked, device=device)

    def unsettle(self) -> None:
        """Let some pages be pinned, shared, or dirty as folios."""
        rng = self.rng
        for pfn, *_ in rng.sample(self.heads, len(self.heads) // 8):
            folio = self.folios.folio(pfn)
            what = rng.randrange(3)
            if what == 0:
                for k in range(folio.nr_pages):
                    self.folios.page(folio.pfn + k).anon_exclusive = False
            elif what == 1:
                folio.dirty = True
            elif folio.order:
                folio.pincount, folio.refcount = 1, folio.refcount + 1
            else:
                folio.refcount += 1024
