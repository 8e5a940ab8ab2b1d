"""Presets against a table, switches, and what running() makes of a machine."""

from __future__ import annotations

import dataclasses
import gzip
import re

import pytest

from ptebatch import semantics
from ptebatch.errors import PtebatchError, SemanticsError
from ptebatch.semantics import BACKPORTS, LARGE_REUSE, LATEST, PRESETS, SWITCHES, KernelConfig, get, running

# Switches that come on with each release, written out a second time.
NEW = {
    "v6.6": {"saved_dirty"},
    "v6.7": set(),
    "v6.8": set(),
    "v6.9": {"fork_batching", "zap_batching", "contpte", "pte_batch_hint"},
    "v6.10": {"any_young_dirty", "large_mapcount", "arm64_present_invalid"},
    "v6.11": set(),
    "v6.12": {"copy_mc", "special_pmd"},
    "v6.13": {"huge_zero_wp", "guard_markers", "arm64_mkcont_only"},
    "v6.14": {"hugetlb_copy_vm_write"},
    "v6.15": {"fpb_clamp", "mm_id", "single_device_exclusive"},
    "v6.16": set(),
    "v6.17": {"fpb_respect"},
    "v6.18": {"arm64_mkwrite_clean"},
    "v6.19": {"vm_maybe_guard", "pmd_device_private", "riscv_software_bits"},
}
LATER = {"loongarch_wrprotect_modified"}  # than every preset
REUSE = dict.fromkeys(NEW, "never") | dict.fromkeys(("v6.6", "v6.7", "v6.8"), "refcount")
REUSE |= dict.fromkeys(("v6.15", "v6.16", "v6.17", "v6.18", "v6.19"), "mm_id")


def test_presets_against_the_table():
    assert list(PRESETS) == list(NEW)
    on: set[str] = set()
    for version, new in NEW.items():
        on |= new
        preset = PRESETS[version]
        assert {k for k, v in preset.switches.items() if v is True} == on
        assert preset.large_reuse == REUSE[version]
        assert preset.config == KernelConfig()
        assert preset.version == preset.label == version
        assert preset.inferred == (version in ("v6.11", "v6.15", "v6.16"))
        assert getattr(semantics, version.upper().replace(".", "_")) is preset
        assert get(version) is preset
    assert set(SWITCHES) == on | LATER
    assert LATEST is PRESETS["v6.19"]


def test_every_switch_names_its_commit():
    for name, switch in SWITCHES.items():
        assert re.fullmatch("[0-9a-f]{12}|[0-9.-]+[a-z.]+@[a-z.]+|CVE-[0-9]+-[0-9]+", switch.commit), name
        assert switch.since in PRESETS or name in LATER
        assert switch.doc
    assert set(SWITCHES) | {"large_reuse"} == set(LATEST.switches)
    assert all(switch.since in PRESETS for switch in LARGE_REUSE.values())


def test_frozen_and_hashable():
    assert len({*PRESETS.values()}) == len(PRESETS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        LATEST.mm_id = False


@pytest.mark.parametrize("bad", ["v6.99", "6.18", "V6_18", "", None, 6.18, ["v6.18"]])
def test_unknown_version_lists_the_presets(bad):
    with pytest.raises(SemanticsError, match=r"the presets are v6\.6, .* v6\.19"):
        get(bad)


@pytest.mark.parametrize(("value", "want"), [(True, True), (False, False), ("on", True), ("off", False)])
def test_replace(value, want):
    for name in SWITCHES:
        base = PRESETS["v6.12"]
        if name == "large_mapcount" or (name, want) == ("mm_id", False):
            base = PRESETS["v6.9"]
        assert getattr(base.replace(**{name: value}), name) is want


def test_replace_configuration():
    got = LATEST.replace(mem_soft_dirty="off", x86_shstk=True, no_page_mapcount=True)
    assert got.config == KernelConfig(mem_soft_dirty=False, x86_shstk=True, no_page_mapcount=True)
    assert LATEST.config == KernelConfig()
    assert LATEST.replace(config=got.config) == got
    assert LATEST.replace(large_reuse="never").label == "v6.19 large_reuse=never"
    assert LATEST.replace() == LATEST


@pytest.mark.parametrize(
    ("version", "switches", "message"),
    [
        (
            "v6.18",
            {"batching": True},
            r"no switch named 'batching'; the switches are saved_dirty, .*large_reuse, mem_soft",
        ),
        ("v6.18", {"version": "v6.9"}, "no switch named 'version'"),
        ("v6.18", {"mm_id": "yes"}, "mm_id must be on or off, not 'yes'"),
        ("v6.18", {"mm_id": 1}, "mm_id must be on or off, not 1"),
        ("v6.18", {"mem_soft_dirty": None}, "mem_soft_dirty must be on or off"),
        ("v6.18", {"large_reuse": "always"}, "one of refcount, never, mm_id"),
        ("v6.9", {"mm_id": True}, "mm_id needs large_mapcount=on"),
        ("v6.18", {"mm_id": False}, "large_reuse=mm_id needs mm_id=on"),
        ("v6.14", {"no_page_mapcount": True}, "no_page_mapcount needs mm_id=on"),
    ],
)
def test_refused_switches(version, switches, message):
    with pytest.raises(SemanticsError, match=message) as caught:
        get(version).replace(**switches)
    assert isinstance(caught.value, PtebatchError)
    assert isinstance(caught.value, ValueError)


# --- running ----------------------------------------------------------------------------------------------------------
def _machine(tmp_path, release, config=None, boot=None, smaps=None, cpuinfo=""):
    proc, boot_dir = tmp_path / "proc", tmp_path / "boot"
    (proc / "self").mkdir(parents=True)
    boot_dir.mkdir()
    if config is not None:
        (proc / "config.gz").write_bytes(gzip.compress(config.encode()))
    if boot is not None:
        (boot_dir / f"config-{release}").write_text(boot)
    if smaps is not None:
        (proc / "self" / "smaps").write_text(smaps)
    (proc / "cpuinfo").write_text(cpuinfo)
    got, notes = running(release, proc=proc, boot=boot_dir)
    return got, "; ".join(notes)


def test_running_reads_the_configuration(tmp_path):
    config = "CONFIG_MEM_SOFT_DIRTY=y\n# CONFIG_NO_PAGE_MAPCOUNT is not set\nCONFIG_DEVICE_PRIVATE=y\n"
    config += "CONFIG_MEMORY_FAILURE=y\nCONFIG_MIGRATION=y\n"
    cpuinfo = "flags\t\t: fpu user_shstk sse\n"
    got, notes = _machine(tmp_path, "6.17.3", config, cpuinfo=cpuinfo)
    assert got == get("v6.17").replace(x86_shstk=True)
    assert notes == ""


def test_running_falls_back_to_boot(tmp_path):
    got, notes = _machine(tmp_path, "6.17.3-1-generic", boot="CONFIG_NO_PAGE_MAPCOUNT=y\n")
    assert got.config == KernelConfig(
        mem_soft_dirty=False, no_page_mapcount=True, device_private=False, memory_failure=False, migration=False
    )
    assert "vendor" in notes


@pytest.mark.parametrize(
    ("smaps", "soft"),
    [("VmFlags: rd wr mr mw me ac sd \n", True), ("VmFlags: rd wr mr mw me ac \n", False), (None, True)],
)
def test_running_infers_without_a_configuration(tmp_path, smaps, soft):
    got, notes = _machine(tmp_path, "6.16.1", smaps=smaps)
    assert got.config == KernelConfig(mem_soft_dirty=soft)
    assert "not readable" in notes
    assert "assumed" in notes
    assert f"mem_soft_dirty={soft} is {'assumed' if smaps is None else 'inferred'}" in notes
    assert "v6.16 is inferred" in notes
    assert "user_shstk" in notes


OPTIONS = ("MEM_SOFT_DIRTY", "DEVICE_PRIVATE", "MEMORY_FAILURE", "MIGRATION")


@pytest.mark.parametrize(
    ("release", "version", "note"),
    [
        ("6.18.0", "v6.18", ""),
        ("6.18.37-lts", "v6.18", "backported vm_maybe_guard"),
        ("6.18.36", "v6.18", ""),
        ("6.12.29", "v6.12", "backported fpb_clamp"),
        ("6.12.28", "v6.12", ""),
        ("6.14.7-200.fc42.x86_64", "v6.14", "backported fpb_clamp"),
        ("6.19.0-rc4", "v6.19", ""),
        ("7.2.1", "v6.19", "nearest"),
        ("6.20.0", "v6.19", "nearest"),
        ("5.14.0-503.el9", "v6.6", "nearest"),
        ("6.1.0", "v6.6", "nearest"),
        ("custom", "v6.19", "nearest"),
    ],
)
def test_running_picks_the_nearest_preset(tmp_path, release, version, note):
    got, notes = _machine(tmp_path, release, "".join(f"CONFIG_{option}=y\n" for option in OPTIONS))
    assert got.version == version
    assert note in notes
    late = {"v6.18": "vm_maybe_guard", "v6.12": "fpb_clamp", "v6.14": "fpb_clamp"}.get(version)
    if late:
        assert getattr(got, late) == ("backported" in note)
    if version == "v6.6":
        assert not got.saved_dirty
    if not note and "-" not in release:
        assert "nearest" not in notes
        assert got == get(version)


def test_running_drops_an_impossible_option(tmp_path):
    got, _ = _machine(tmp_path, "6.9.1", "CONFIG_NO_PAGE_MAPCOUNT=y\n")
    assert not got.config.no_page_mapcount


def test_backports_are_newer_than_their_preset():
    for version, switches in BACKPORTS.items():
        for name, patch in switches.items():
            assert not getattr(get(version), name)
            assert patch > 0


def test_running_here():
    got, notes = running()
    assert got.version in PRESETS
    assert all(isinstance(note, str) for note in notes)
