"""Kernel behaviour as switches: what fork, zap and write faults do differently from one kernel version to another.

A `KernelSemantics` is a set of switches plus a `KernelConfig`. The walk asks for switches and never for a version; a
preset (`V6_18`, spelled ``v6.18`` outside Python) is the set that release x.y.0 had. Each switch names the commit that
introduced it in `SWITCHES`.
"""

from __future__ import annotations

import gzip
import os
import platform
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from ptebatch.errors import SemanticsError

# folio_pte_batch() flags: v6.9 to v6.16 name what to ignore, v6.17 turned that round and names what to respect.
FPB_IGNORE_DIRTY = 1
FPB_IGNORE_SOFT_DIRTY = 2
FPB_RESPECT_DIRTY = 1
FPB_RESPECT_SOFT_DIRTY = 2
FPB_RESPECT_WRITE = 4
FPB_MERGE_WRITE = 8
FPB_MERGE_YOUNG_DIRTY = 16


class Switch(NamedTuple):
    """Where a behaviour comes from.

    `commit` is the mainline hash, or the patch's message-id where the hash is not known; `since` is the first release
    x.y.0 that has it, empty if no preset does.
    """

    commit: str
    since: str
    doc: str


SWITCHES: dict[str, Switch] = {
    "saved_dirty": Switch("bb3aadf7d446", "v6.6", "x86 keeps Dirty of read-only entries in bit 58"),
    "fork_batching": Switch("f8d937761d65", "v6.9", "fork copies batches of PTEs of one large folio"),
    "zap_batching": Switch("10ebac4f95e7", "v6.9", "unmapping clears batches of PTEs of one large folio"),
    "contpte": Switch(
        "20240215103205.2607016-1-ryan.roberts@arm.com", "v6.9", "arm64 folds blocks of entries: CONFIG_ARM64_CONTPTE"
    ),
    "pte_batch_hint": Switch(
        "20240215103205.2607016-1-ryan.roberts@arm.com", "v6.9", "folio_pte_batch() reads a folded block once"
    ),
    "any_young_dirty": Switch("96ebdb032096", "v6.10", "folio_pte_batch() reports any_young and any_dirty"),
    "large_mapcount": Switch("05c5323b2a34", "v6.10", "large folios count all their mappings in _large_mapcount"),
    "copy_mc": Switch("658be46520ce", "v6.12", "copying a pinned page survives a memory error: -EHWPOISON"),
    "special_pmd": Switch("bc02afbd4d73", "v6.12", "fork copies special (PFNMAP) PMDs"),
    "huge_zero_wp": Switch("1ced09e0331f", "v6.13", "a write to the huge zero page maps a new huge page in one fault"),
    "arm64_mkcont_only": Switch(
        "20241104041617.3804617-1-anshuman.khandual@arm.com",
        "v6.13",
        "folding arm64 entries does not make PROT_NONE ones valid",
    ),
    "guard_markers": Switch("7c53dfbdb024", "v6.13", "guard markers exist and are copied to the child"),
    "hugetlb_copy_vm_write": Switch(
        "20241204153100.1967364-1-david@redhat.com",
        "v6.14",
        "a hugetlb folio that fork copies is mapped writable only with VM_WRITE",
    ),
    "arm64_present_invalid": Switch(
        "20240501145419.1390363-1-ryan.roberts@arm.com",
        "v6.10",
        "arm64 marks PROT_NONE in bit 11, which leaves bit 58 to uffd-wp, and swap entries move up",
    ),
    "fpb_clamp": Switch("7b08b74f3d99", "v6.15", "folio_pte_batch() clamps max_nr to the folio before it scans"),
    "single_device_exclusive": Switch(
        "c25465eb7630",
        "v6.15",
        "device-exclusive entries are of one type and keep their rmap",
    ),
    "mm_id": Switch("6af8cb80d3a9", "v6.15", "large folios track two owning mms and whether they are shared"),
    "fpb_respect": Switch("e66d7a4f55f4", "v6.17", "folio_pte_batch() flags say what to respect and what to merge"),
    "arm64_mkwrite_clean": Switch("143937ca51cc", "v6.18", "arm64 keeps a clean entry clean that is made writable"),
    "riscv_software_bits": Switch("2a3ebad4db63", "v6.19", "riscv has soft-dirty and uffd-wp on CPUs with Svrsw60t59b"),
    "vm_maybe_guard": Switch("ab04b530e7e8", "v6.19", "VM_MAYBE_GUARD marks guarded VMAs and makes fork copy them"),
    "pmd_device_private": Switch("368076f52ebe", "v6.19", "PMDs map device-private memory"),
    "loongarch_wrprotect_modified": Switch(
        "CVE-2026-72043",
        "",
        "loongarch64 keeps dirty what is write-protected (v7.2; stable v6.6.145, v6.12.97, v6.18.40, v7.1.5)",
    ),
}
"""Every on/off switch, oldest first."""

LARGE_REUSE: dict[str, Switch] = {
    "refcount": Switch("", "v6.6", "a write fault reuses a page of a large anon folio if the folio's refcount is 1"),
    "never": Switch("20240308085653.124180-1-21cnbao@gmail.com", "v6.9", "a write fault always copies"),
    "mm_id": Switch("1da190f4d0a6", "v6.15", "a write fault reuses a page if the MM-ID slots show no other owner"),
}
"""Values of the `large_reuse` switch, oldest first. The first is older than every preset."""


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """The build-time choices that change results.

    Attributes
    ----------
    mem_soft_dirty : bool
        CONFIG_MEM_SOFT_DIRTY.
    no_page_mapcount : bool
        CONFIG_NO_PAGE_MAPCOUNT (v6.15+): large folios keep no mapcount per page.
    device_private : bool
        CONFIG_DEVICE_PRIVATE: swap types for device memory exist.
    x86_shstk : bool
        The CPU has shadow stacks, so Dirty without RW counts as writable.
    memory_failure, migration : bool
        CONFIG_MEMORY_FAILURE and CONFIG_MIGRATION: swap types for poisoned pages and for pages under migration exist.
    riscv_svrsw60t59b : bool
        The CPU leaves two bits of riscv64 entries to software, which are then soft-dirty and uffd-wp.
    """

    mem_soft_dirty: bool = True
    no_page_mapcount: bool = False
    device_private: bool = True
    x86_shstk: bool = False
    memory_failure: bool = True
    migration: bool = True
    riscv_svrsw60t59b: bool = False


@dataclass(frozen=True, slots=True)
class KernelSemantics:
    """One kernel's behaviour: a switch per change, see `SWITCHES` and `LARGE_REUSE`.

    `inferred` is True where no source tree of that release was read and the switches follow from its neighbours.
    """

    version: str
    inferred: bool
    config: KernelConfig
    saved_dirty: bool
    fork_batching: bool
    zap_batching: bool
    contpte: bool
    pte_batch_hint: bool
    any_young_dirty: bool
    large_mapcount: bool
    copy_mc: bool
    special_pmd: bool
    huge_zero_wp: bool
    arm64_mkcont_only: bool
    guard_markers: bool
    hugetlb_copy_vm_write: bool
    arm64_present_invalid: bool
    fpb_clamp: bool
    single_device_exclusive: bool
    mm_id: bool
    fpb_respect: bool
    arm64_mkwrite_clean: bool
    riscv_software_bits: bool
    vm_maybe_guard: bool
    pmd_device_private: bool
    loongarch_wrprotect_modified: bool
    large_reuse: str

    def __post_init__(self) -> None:
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise SemanticsError(f"switch {name} must be True or False, not {getattr(self, name)!r}")
        if self.large_reuse not in LARGE_REUSE:
            raise SemanticsError(f"large_reuse must be one of {', '.join(LARGE_REUSE)}, not {self.large_reuse!r}")
        needs = (
            (self.mm_id, "mm_id", self.large_mapcount, "large_mapcount"),
            (self.large_reuse == "mm_id", "large_reuse=mm_id", self.mm_id, "mm_id"),
            (self.config.no_page_mapcount, "no_page_mapcount", self.mm_id, "mm_id"),
            (self.config.riscv_svrsw60t59b, "riscv_svrsw60t59b", self.riscv_software_bits, "riscv_software_bits"),
        )
        for has, what, other, needed in needs:
            if has and not other:
                raise SemanticsError(f"{what} needs {needed}=on: set that too, or change {what}")

    @property
    def switches(self) -> dict[str, bool | str]:
        """Every switch and its value, `large_reuse` included."""
        return {name: getattr(self, name) for name in (*SWITCHES, "large_reuse")}

    @property
    def label(self) -> str:
        """The preset's name, and every switch that differs from it.

        >>> V6_18.replace(mm_id=False, large_reuse="never").label
        'v6.18 mm_id=off large_reuse=never'
        """
        preset = PRESETS[self.version].switches
        own = ((k, v) for k, v in self.switches.items() if v != preset[k])
        return " ".join([self.version, *(f"{k}={('off', 'on')[v] if isinstance(v, bool) else v}" for k, v in own)])

    def replace(self, *, config: KernelConfig | None = None, **switches: bool | str) -> KernelSemantics:
        """Return a copy with some switches or configuration options set.

        Parameters
        ----------
        config : KernelConfig, optional
            In place of this one's.
        **switches : bool or str
            Names of `SWITCHES` or of `KernelConfig`'s fields, each True, False, "on" or "off"; and `large_reuse`.

        Raises
        ------
        SemanticsError
            Unknown name or value, or switches that exclude each other.

        >>> V6_18.replace(fork_batching="off").fork_batching
        False
        """
        own: dict[str, Any] = {}
        options: dict[str, bool] = {}
        for name, value in switches.items():
            if name == "large_reuse":
                own[name] = value
            elif name in SWITCHES:
                own[name] = _on_off(name, value)
            elif name in _OPTIONS:
                options[name] = _on_off(name, value)
            else:
                known = ", ".join((*SWITCHES, "large_reuse", *_OPTIONS))
                raise SemanticsError(f"no switch named {name!r}; the switches are {known}")
        return replace(self, config=replace(config or self.config, **options), **own)


_OPTIONS = tuple(f.name for f in fields(KernelConfig))


def _on_off(name: str, value: bool | str) -> bool:
    if isinstance(value, bool):
        return value
    if value in ("on", "off"):
        return value == "on"
    raise SemanticsError(f"switch {name} must be on or off, not {value!r}")


def _minor(version: str) -> int:
    return int(version.removeprefix("v6."))


def _preset(minor: int) -> KernelSemantics:
    on = {name: bool(switch.since) and _minor(switch.since) <= minor for name, switch in SWITCHES.items()}
    reuse = [value for value, switch in LARGE_REUSE.items() if _minor(switch.since) <= minor][-1]
    return KernelSemantics(
        version=f"v6.{minor}", inferred=minor in (11, 15, 16), config=KernelConfig(), large_reuse=reuse, **on
    )


V6_6 = _preset(6)
V6_7 = _preset(7)
V6_8 = _preset(8)
V6_9 = _preset(9)
V6_10 = _preset(10)
V6_11 = _preset(11)
V6_12 = _preset(12)
V6_13 = _preset(13)
V6_14 = _preset(14)
V6_15 = _preset(15)
V6_16 = _preset(16)
V6_17 = _preset(17)
V6_18 = _preset(18)
V6_19 = _preset(19)
LATEST = V6_19

PRESETS: dict[str, KernelSemantics] = {
    s.version: s for s in (V6_6, V6_7, V6_8, V6_9, V6_10, V6_11, V6_12, V6_13, V6_14, V6_15, V6_16, V6_17, V6_18, V6_19)
}


def get(version: str) -> KernelSemantics:
    """Return the preset of that name.

    >>> get("v6.18") is V6_18
    True
    """
    try:
        return PRESETS[version]
    except (KeyError, TypeError):
        raise SemanticsError(f"no preset {version!r}; the presets are {', '.join(PRESETS)}") from None


BACKPORTS: dict[str, dict[str, int]] = {
    "v6.12": {"fpb_clamp": 29},
    "v6.14": {"fpb_clamp": 7},
    "v6.18": {"vm_maybe_guard": 37},
}
"""Switches that stable releases took over later: preset -> switch -> first patch level that has it."""


def running(
    release: str | None = None, *, proc: str | os.PathLike[str] = "/proc", boot: str | os.PathLike[str] = "/boot"
) -> tuple[KernelSemantics, list[str]]:
    """Return the semantics nearest to the running kernel, and notes on what was inferred.

    Parameters
    ----------
    release : str, optional
        As ``uname -r`` prints it; read from the running kernel when left out.
    proc, boot : path, optional
        Where ``config.gz``, ``self/smaps``, ``cpuinfo`` and ``config-RELEASE`` are looked for.

    Returns
    -------
    semantics : KernelSemantics
    notes : list of str
    """
    release = platform.release() if release is None else release
    notes: list[str] = []
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    if not found:
        semantics = LATEST
        notes.append(f"kernel release {release!r} not understood: nearest preset taken to be {semantics.version}")
    else:
        major, minor, patch = (int(n or 0) for n in found.groups())
        if (major, minor) < (6, 6):
            semantics = V6_6.replace(saved_dirty=False)
            notes.append(f"kernel {release}: nearest preset v6.6, without saved_dirty")
        elif (major, minor) > (6, 19):
            semantics = LATEST
            notes.append(f"kernel {release} is newer than every preset: nearest {semantics.version}")
        else:
            semantics = get(f"v6.{minor}")
            late: dict[str, Any] = {
                name: True for name, first in BACKPORTS.get(semantics.version, {}).items() if patch >= first
            }
            if late:
                semantics = replace(semantics, **late)
                notes.append(f"kernel {release}: {semantics.version} with backported {', '.join(late)}")
        if semantics.inferred:
            notes.append(f"{semantics.version} is inferred from the releases around it")
        if not re.fullmatch(r"[\d.]+(-rc\d+)?", release):
            notes.append(f"kernel {release} is a vendor's build: patches of its own are not known")
    config, more = _running_config(release, Path(proc), Path(boot))
    if config.no_page_mapcount and not semantics.mm_id:
        config = replace(config, no_page_mapcount=False)
    return semantics.replace(config=config), notes + more


def _running_config(release: str, proc: Path, boot: Path) -> tuple[KernelConfig, list[str]]:
    notes: list[str] = []
    default = KernelConfig()
    text = None
    for path in (proc / "config.gz", boot / f"config-{release}"):
        try:
            raw = path.read_bytes()
            text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
            break
        except (OSError, EOFError, ValueError):
            continue
    if text is not None:
        on = set(re.findall(r"^CONFIG_(\w+)=y$", text, re.MULTILINE))
        mem_soft_dirty = "MEM_SOFT_DIRTY" in on
        no_page_mapcount = "NO_PAGE_MAPCOUNT" in on
        device_private = "DEVICE_PRIVATE" in on
        memory_failure, migration = "MEMORY_FAILURE" in on, "MIGRATION" in on
    else:
        notes.append("kernel configuration not readable (/proc/config.gz, /boot/config-*)")
        no_page_mapcount, device_private = default.no_page_mapcount, default.device_private
        memory_failure, migration = default.memory_failure, default.migration
        notes.append(f"no_page_mapcount={no_page_mapcount}, device_private, memory_failure and migration are assumed")
        smaps = _read(proc / "self" / "smaps")
        # A new VMA carries VM_SOFTDIRTY ("sd") wherever soft-dirty is configured.
        mem_soft_dirty = bool(re.search(r"^VmFlags:.*\bsd\b", smaps, re.MULTILINE))
        if smaps:
            notes.append(f"mem_soft_dirty={mem_soft_dirty} is inferred from VmFlags in smaps")
        else:
            mem_soft_dirty = default.mem_soft_dirty
            notes.append(f"mem_soft_dirty={mem_soft_dirty} is assumed")
    shstk = bool(re.search(r"^flags\s*:.*\buser_shstk\b", _read(proc / "cpuinfo"), re.MULTILINE))
    if not shstk:
        notes.append("x86_shstk=False: cpuinfo shows no user_shstk")
    return KernelConfig(mem_soft_dirty, no_page_mapcount, device_private, shstk, memory_failure, migration), notes


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
