"""The core against the reference on every layout: helpers, forks, write-protection, unmapping."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from areas import Maker

from ptebatch import arch, batch, reference
from ptebatch.arch import ARCHITECTURES, LAYOUTS
from ptebatch.errors import PtebatchError
from ptebatch.fork import ForkResult, fork
from ptebatch.mm import Mm, configured, copy_state
from ptebatch.protect import wrprotect_range
from ptebatch.semantics import LATEST, PRESETS
from ptebatch.zap import exit_mmap

AREAS = 100
CASES = {"small": 500, "ci": 5_000}.get(os.environ.get("HYPOTHESIS_PROFILE", "default"), 1_000)


def assert_same(a: Mm, b: Mm) -> None:
    differ = np.argwhere(a.entries != b.entries)
    assert not len(differ), f"{len(differ)} entries, first {differ[0]}: {a.entries[tuple(differ[0])]:#x} in the core"
    assert a.rss.tolist() == b.rss.tolist()


def attempt(mm: Mm, impl: str, semantics, batching) -> ForkResult | tuple[type, str]:
    try:
        return fork(mm, semantics=semantics, batching=batching, impl=impl)
    except PtebatchError as error:
        return type(error), str(error)


def compare(mm: Mm, semantics, batching: bool | None, more: int) -> int:
    """Fork; then do one of three more things: fork again, write-protect the child, unmap it. Returns entries copied."""
    core, ref = mm, copy_state(mm)
    one, two = attempt(core, "core", semantics, batching), attempt(ref, "reference", semantics, batching)
    assert_same(core, ref)
    if isinstance(two, tuple):
        assert one == two
        return 0
    assert isinstance(one, ForkResult), one
    assert one.stats.to_dict() == two.stats.to_dict()
    assert_same(one.child, two.child)
    if more == 0:
        again = [attempt(x, impl, semantics, batching) for x, impl in ((core, "core"), (ref, "reference"))]
        plain = [x.stats.to_dict() if isinstance(x, ForkResult) else x for x in again]
        assert plain[0] == plain[1]
    pairs = ((one.child, "core"), (two.child, "reference"))
    if more == 1:
        end = mm.vmas[-1].end
        both = [wrprotect_range(x, 0, end, semantics=semantics, batching=batching, impl=impl) for x, impl in pairs]
        assert both[0].to_dict() == both[1].to_dict()
        assert_same(one.child, two.child)
    if more == 2:
        both = [exit_mmap(x, semantics=semantics, impl=impl) for x, impl in pairs]
        assert both[0].to_dict() == both[1].to_dict()
    assert_same(core, ref)
    assert core.folios == ref.folios
    return two.stats.ptes_present


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_core_is_the_reference(name):
    cases = copied = 0
    for seed in range(CASES // AREAS):
        made = Maker(name, seed)
        mm = made.make(AREAS)
        batching = None if seed % 4 else False
        copied += compare(mm, made.semantics, batching, seed % 3)
        cases += len(mm.vmas)
    assert cases == CASES
    assert copied > 2 * CASES, "the cases copy too little to say much"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_helpers(layout):
    rng = np.random.default_rng(1)
    bits = np.uint64(1) << rng.integers(0, 64, (4, 400), dtype=np.uint64)
    values = np.concatenate([[0, layout.none_value], rng.integers(0, 1 << 63, 200, dtype=np.uint64) * 2 + 1])
    pfn = rng.integers(0, min(layout.max_pfn, 1 << 40), 400, dtype=np.uint64) << np.uint64(layout.pfn_shift)
    base = np.uint64(arch.mk_pte(layout, 0, arch.vm_get_page_prot(layout, 1)))
    values = np.concatenate([values.astype(np.uint64), pfn | np.bitwise_xor.reduce(bits), pfn | base ^ bits[0]])
    every = [kernel for version in ("v6.8", "v6.17", "v6.19") for kernel in (PRESETS[version],)]
    every.append(replace(LATEST, config=replace(LATEST.config, mem_soft_dirty=False, x86_shstk=True)))
    every.append(LATEST.replace(riscv_svrsw60t59b=True, loongarch_wrprotect_modified=True))
    for semantics in every:
        used = configured(layout, semantics)
        for helper in batch.HELPERS:
            name, arg = helper, 3
            if helper == "pte_mkwrite_shstk":
                name, arg = "pte_mkwrite", arch.VM_SHADOW_STACK
            elif helper == "mk_pte":
                arg = arch.vm_get_page_prot(used, int(rng.integers(16)))
            given = values
            if helper == "swp_entry":
                given = values & np.uint64((1 << used.swp_offset_bits) - 1)
            elif helper == "mk_pte":
                given = values & np.uint64(used.max_pfn)
            core = batch.apply_helper(used, name, given, arg)
            assert np.array_equal(core, reference.apply_helper(used, name, given, arg)), f"{used.name} {helper}"
