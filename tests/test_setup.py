"""The build under test is the one that was asked for, and a machine that lacks something is told what."""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import ptebatch
import ptebatch._core

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def wanted(flavour: str) -> bool:
    return os.environ.get(f"PTEBATCH_{flavour.upper()}", "") not in ("", "0")


@pytest.fixture
def installed() -> metadata.Distribution:
    try:
        return metadata.distribution("ptebatch")
    except metadata.PackageNotFoundError:
        pytest.skip("ptebatch is imported from a source tree, not installed: run `make test`")


def test_the_build_is_the_one_asked_for(installed):
    marks = ".".join(flavour for flavour in ("debug", "sanitize") if wanted(flavour))
    assert installed.version == PROJECT["version"] + (f"+{marks}" if marks else "")
    assert ptebatch.__version__ == installed.version


def test_core_is_compiled_and_beside_the_modules():
    core = Path(ptebatch._core.__file__)
    assert core.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))
    assert core.parent == Path(ptebatch.__file__).parent
    if sys.flags.safe_path:  # as the Makefile runs pytest: the source tree must not be what is tested
        assert core.is_relative_to(sys.prefix)


def test_all_names_every_extra():
    extras = PROJECT["optional-dependencies"]
    (together,) = extras["all"]
    assert set(re.fullmatch(r"ptebatch\[(.*)\]", together)[1].split(",")) == set(extras) - {"all"}


# ---------------------------------------------------------------------------------------------------------------------
# The Makefile on a machine that lacks something
# ---------------------------------------------------------------------------------------------------------------------

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def make(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in {"CC", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON"}}
    return subprocess.run(
        ["make", *args], cwd=ROOT, env=inherited | env, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def python_with(tmp_path: Path):
    """An interpreter that runs some code first: the way to one that lacks a module or headers."""

    def build(code: str) -> str:
        (tmp_path / "sitecustomize.py").write_text(code)
        script = tmp_path / "python3"
        script.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
        script.chmod(0o755)
        return str(script)

    return build


@needs_make
def test_help_lists_every_target():
    listed = re.findall(r"^  make (\S+)", make("help").stdout, re.MULTILINE)
    (phony,) = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(phony.split())
    assert make().stdout == make("help").stdout


@needs_make
@pytest.mark.parametrize(
    ("lacks", "code", "package"),
    [
        ("venv", "import sys; sys.modules['ensurepip'] = None", "apt-get install python3-venv"),
        ("headers", "import sysconfig; sysconfig.get_path = lambda name: '/none'", "apt-get install python3-dev"),
        ("version", "import sys; sys.version_info = (3, 10, 0)", "older than 3.11"),
        ("everything", "raise SystemExit(1)", "Python 3.11 or newer"),
    ],
)
def test_what_python_lacks_is_named_in_one_line(python_with, lacks, code, package):
    done = make("check", f"PYTHON={python_with(code)}")
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(ours) == 1, done.stderr
    assert package in ours[0]


@needs_make
@pytest.mark.parametrize(
    ("compiler", "package"), [("no-such-compiler -m64", "apt-get install gcc"), ("false", "apt-get install libc6-dev")]
)
def test_a_missing_compiler_is_named_in_one_line(compiler, package):
    done = make("check", f"PYTHON={sys.executable}", CC=compiler)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(ours) == 1, done.stderr
    assert package in ours[0]


@needs_make
def test_check_is_content_with_this_machine():
    done = make("check", f"PYTHON={sys.executable}")
    assert (done.returncode, done.stderr) == (0, "")


CRASHES = """
import os
import pytest

@pytest.mark.parametrize("n", range(60))
def test_one(n):
    if n in (20, 21, 45):
        os._exit(1)
"""


def test_a_worker_that_crashes_fails_one_test(tmp_path):
    """With ``-n`` all the other tests are run, each once: the gate says what failed, and does not wait for ever."""
    pytest.importorskip("xdist")
    path = str(ROOT / "tests" / "conftest.py")
    (tmp_path / "test_crashes.py").write_text(CRASHES)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text(
        f"import runpy\npytest_xdist_make_scheduler = runpy.run_path({path!r})['pytest_xdist_make_scheduler']\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert "3 failed, 57 passed" in run.stdout, run.stdout + run.stderr
