"""`make benchmarks`: a pytest-benchmark case for every claim; each result is checked.

pytest-benchmark runs one case after the other. For ratios use `ptebatch bench`, where all cases of a memory take turns.

--size   memory of each case, 128MiB (fits the second-level cache) unless said otherwise; 1GiB and 64GiB are the others
PTEBATCH_SIMD=scalar|avx2|avx512   the level to run at
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ptebatch import bench
from ptebatch.mm import Mm
from ptebatch.semantics import LATEST
from ptebatch.workload import Workload, parse

ORDERS = (*range(10), "mixed")
ROUNDS = {128 << 20: 50, 1 << 30: 20}
FEW_ROUNDS = 5


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", default="128MiB", help="memory of each case: 128MiB, 1GiB, 64GiB or any other size")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["ptebatch"] = bench.environment()


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> int:
    return parse(f"size={request.config.getoption('--size')}").size


@pytest.fixture(scope="module", params=ORDERS, ids=lambda order: f"order-{order}")
def memory(request: pytest.FixtureRequest, size: int) -> Mm:
    """Plain memory in folios of one order, or mixed ones; cases leave it as it was."""
    folio = bench.MIXED if request.param == "mixed" else (4096 << request.param,)
    return Workload(size=size, folio=folio).build()


@pytest.fixture(params=["single", "batched"])
def path(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run(benchmark, size: int) -> Callable[[bench.Case], None]:
    """Time a `bench.Case`: fresh input in every round, nothing but ``case.run`` timed, the last result checked."""

    def timed(case: bench.Case, rounds: int = ROUNDS.get(size, FEW_ROUNDS)) -> None:
        result = benchmark.pedantic(case.run, setup=case.reset, rounds=rounds, warmup_rounds=1)
        case.check(result)
        case.reset()
        benchmark.extra_info.update(case.row, ptes=case.ptes, semantics=LATEST.label)
        if benchmark.stats is not None:
            benchmark.extra_info["ns_per_pte"] = benchmark.stats["median"] * 1e9 / case.ptes

    return timed
