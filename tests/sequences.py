"""The steps of golden/touch.json, as the model takes them: `run` on a `Model`, or on whatever else has its methods."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ptebatch import arch
from ptebatch import semantics as kernels
from ptebatch.arch import X86_64 as L
from ptebatch.fault import touch
from ptebatch.folio import FolioTable
from ptebatch.fork import fork
from ptebatch.mm import Mm, Vma
from ptebatch.pmd import pmd_pfn
from ptebatch.zap import exit_mmap, munmap, zap_range

PAGE = L.page_size
BASE = 7 * L.ptrs_per_pte * PAGE
PRIVATE = arch.VM_READ | arch.VM_WRITE | arch.VM_MAYREAD | arch.VM_MAYWRITE
HUGE_ZERO_PFN = 1 << 20
Vector = dict[str, Any]


def vectors() -> list[Vector]:
    """All of them, each laid over the defaults."""
    data = json.loads((Path(__file__).parent / "golden" / "touch.json").read_text())
    return [{**data["defaults"], **vector} for vector in data["vectors"]]


def pages(text: str) -> list[int]:
    """Page numbers of "0-2,5"."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found


class Model:
    """The processes of a vector, modelled."""

    def __init__(self, vector: Vector, impl: str) -> None:
        self.vector, self.impl = vector, impl
        self.semantics = kernels.get(vector["semantics"]).replace(**vector["config"])
        first, nr = vector["first"], vector["pages"]
        vma = Vma(BASE + first * PAGE, BASE + (first + nr) * PAGE, PRIVATE, anon_vma=False)
        self.mms = {"P": Mm(L, FolioTable(), vmas=[vma])}
        self.mms["P"].folios.zero_pfn, self.mms["P"].folios.huge_zero_pfn = 5, HUGE_ZERO_PFN

    def access(self, who: str, what: str, page: int) -> tuple[str, int | None]:
        result = touch(
            self.mms[who],
            BASE + page * PAGE + 123,
            what,  # type: ignore[arg-type]
            semantics=self.semantics,
            orders=self.vector["orders"],
            impl=self.impl,
        )
        return result.action, result.nr

    def fork(self, who: str, child: str) -> dict[str, int]:
        result = fork(self.mms[who], semantics=self.semantics, impl=self.impl)
        self.mms[child] = result.child
        return result.stats.to_dict()["batch_hist"]

    def unmap(self, who: str, where: list[int]) -> None:
        low, high = BASE + where[0] * PAGE, BASE + (where[-1] + 1) * PAGE
        munmap(self.mms[who], low, high, semantics=self.semantics, impl=self.impl)

    def dontneed(self, who: str, where: list[int]) -> None:
        low, high = BASE + where[0] * PAGE, BASE + (where[-1] + 1) * PAGE
        zap_range(self.mms[who], low, high, semantics=self.semantics, impl=self.impl)

    def exit(self, who: str) -> None:
        exit_mmap(self.mms.pop(who), semantics=self.semantics, impl=self.impl)

    def pfns(self, who: str) -> dict[int, int]:
        mm, found = self.mms[who], {}
        for page in range(self.vector["first"], self.vector["first"] + self.vector["pages"]):
            pte = mm.pte(BASE + page * PAGE)
            if not arch.pte_none(L, pte) and not arch.pte_special(L, pte):
                found[page] = arch.pte_pfn(L, pte)
        for vpn, pmd in zip(mm.pmd_vpns.tolist(), mm.pmd_entries.tolist(), strict=True):
            if pmd_pfn(L, pmd) != HUGE_ZERO_PFN:
                found |= {vpn - BASE // PAGE + k: pmd_pfn(L, pmd) + k for k in range(L.ptrs_per_pte)}
        return found

    def mapcounts(self, pfns: dict[int, int]) -> dict[int, int]:
        """Mappings of pages, without those that were freed."""
        folios = self.mms["P"].folios
        return {
            page: int(folios.mapcounts(np.array([pfn]))[0]) + folios.folio(pfn).entire_mapcount
            for page, pfn in pfns.items()
            if pfn in folios
        }


def run(vector: Vector, model: Model) -> Iterator[tuple[list[Any], dict[int, int]]]:
    """Take the steps and check what each says; yields after each the step and the pages of the mark."""
    mark: dict[int, int] = {}
    for step in vector["steps"]:
        who, what, *rest = step
        if what in ("read", "write"):
            where, action, nr = rest[0], rest[1], rest[2] if len(rest) > 2 else 1
            for page in pages(where):
                found, found_nr = model.access(who, what, page)
                assert (found, nr if found_nr is None else found_nr) == (action, nr), (step, page)
        elif what == "mark":
            mark = model.pfns(who)
        elif what == "fork":
            model.fork(who, rest[0])
        elif what == "fork_hist":
            assert model.fork(who, rest[0]) in (rest[1], None)  # real ones do not tell
        elif what in ("unmap", "dontneed"):
            getattr(model, what)(who, pages(rest[0]))
        else:
            assert what == "exit", step
            model.exit(who)
        yield step, mark
    expect = vector["expect"]
    kept = {name: [page for page, pfn in model.pfns(name).items() if mark.get(page) == pfn] for name in expect["kept"]}
    assert kept == {name: pages(where) for name, where in expect["kept"].items()}
    counts = {first + k: count for first, nr, count in expect["mapcount"] for k in range(nr)}
    found = model.mapcounts(mark)
    assert {page: count for page, count in found.items() if count} == {page: n for page, n in counts.items() if n}
    if isinstance(model, Model):  # of real pages nobody maps it cannot be known whose they are
        assert {page for page, count in found.items() if count == 0} == {page for page, n in counts.items() if not n}
