"""The harness itself: a test that hangs, dies or fails on one rank must say so, and leave nothing for the next run; and
where the tests on GPUs look for compiled kernels."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers import harness, jit
from tests.helpers.compare import worst
from tests.helpers.harness import HANG, RanksError, run_ranks
from tests.helpers.stacks import on_one_stack


def summed_rank(group: dist.ProcessGroup, offset: int) -> tuple[int, int, float]:
    total = torch.tensor([float(group.rank() + offset)])
    dist.all_reduce(total, group=group)
    return group.rank(), group.size(), total.item()


def raise_on_one(group: dist.ProcessGroup) -> None:
    if group.rank() == 1:
        raise ValueError("rank one is unhappy")
    dist.barrier(group)


def die_on_one(group: dist.ProcessGroup) -> None:
    store = group.get_group_store()
    if group.rank() == 1:
        store.wait(["the other one sleeps"], timedelta(seconds=HANG))
        os._exit(7)
    store.set("the other one sleeps", "")
    time.sleep(3600)


def sleep_for_ever(group: dist.ProcessGroup) -> None:
    if group.rank() == 0:
        a_function_that_does_not_return()


def a_function_that_does_not_return() -> None:
    time.sleep(3600)


def read_environment(group: dist.ProcessGroup, name: str) -> str | None:
    return os.environ.get(name)


def set_environment(group: dist.ProcessGroup, name: str) -> None:
    os.environ[name] = "left"


def hold_the_lock(group: dist.ProcessGroup, folder: str) -> None:
    Path(folder, str(group.rank())).touch()
    ctypes.PyDLL(None).usleep(ctypes.c_uint(3_600_000_000))


def state_of_the_server(group: dist.ProcessGroup) -> dict[str, Any]:
    """Of the process that this rank was forked from, and what this rank has of it."""
    status = Path(f"/proc/{os.getppid()}/status").read_text()
    maps = Path(f"/proc/{os.getppid()}/maps").read_text()
    threads = int(re.search(r"Threads:\s*(\d+)", status).group(1))  # type: ignore[union-attr]
    return {"threads": threads, "torch": "libtorch" in maps, "cuda": torch.cuda.is_initialized()}


def process_id(group: dist.ProcessGroup) -> int:
    return os.getpid()


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "GRACE", 1.0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_results_come_in_rank_order(size: int) -> None:
    total = float(sum(range(size)) + 10 * size)
    assert run_ranks(size, summed_rank, 10) == [(rank, size, total) for rank in range(size)]


def test_processes_are_reused_and_fresh_ones_are_not() -> None:
    first = run_ranks(2, process_id)
    assert run_ranks(2, process_id) == first
    assert not set(run_ranks(2, process_id, fresh=True)) & set(first)


def test_a_rank_that_raises_is_named_and_frees_the_others(short_grace: None) -> None:
    with pytest.raises(RanksError, match="rank one is unhappy") as caught:
        run_ranks(2, raise_on_one)
    assert "ValueError" in caught.value.reports[1]
    assert run_ranks(2, summed_rank, 0) == [(0, 2, 1.0), (1, 2, 1.0)], "the next run must not notice"


def test_a_rank_that_dies_is_named_and_frees_the_others(short_grace: None) -> None:
    with pytest.raises(RanksError) as caught:
        run_ranks(2, die_on_one)
    assert "exit code 7" in caught.value.reports[1]
    assert "die_on_one" in caught.value.reports[0], "the stack of the rank that was stuck"


@pytest.mark.slow
@on_one_stack
def test_a_rank_that_hangs_shows_its_stack() -> None:
    with pytest.raises(RanksError) as caught:
        run_ranks(2, sleep_for_ever, timeout=5.0)
    assert list(caught.value.reports) == [0]
    assert "a_function_that_does_not_return" in caught.value.reports[0]


def test_the_limit_here_passes_before_pytests_own(pytestconfig: pytest.Config) -> None:
    """Also in a test that waits three times."""
    assert float(pytestconfig.getini("timeout")) > 3 * HANG


def test_enough_ends_ranks_that_would_not_come_back(tmp_path: Path) -> None:
    """Even one that waits in C and holds Python's lock."""
    with pytest.raises(RanksError, match="seen enough") as caught:
        run_ranks(2, hold_the_lock, str(tmp_path), enough=lambda: len(list(tmp_path.iterdir())) == 2)
    assert list(caught.value.reports) == [0, 1]
    assert run_ranks(2, summed_rank, 0) == [(0, 2, 1.0), (1, 2, 1.0)], "the next run must not notice"


def test_new_processes_have_the_environment_of_today_and_no_threads_of_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RUN_RANKS_TEST", "today")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert run_ranks(1, read_environment, "RUN_RANKS_TEST", fresh=True) == ["today"]
    assert run_ranks(1, read_environment, "OMP_NUM_THREADS", fresh=True) == ["3"]
    (state,) = run_ranks(1, state_of_the_server)
    assert state == {"threads": 1, "torch": True, "cuda": False}


def test_environment_is_set_for_one_run() -> None:
    name = "RUN_RANKS_TEST"
    assert run_ranks(2, read_environment, name, env={name: "yes"}) == ["yes", "yes"]
    run_ranks(2, set_environment, name)
    assert run_ranks(2, read_environment, name) == [None, None]


def write_source(folder: Path, function: str, capacity: int) -> None:
    folder.mkdir(parents=True)
    (folder / "kernel.cu").write_text(
        "#include <deep_ep/impls/kernel.cuh>\n\nstatic void __instantiate_kernel() {\n"
        f"    auto ptr = reinterpret_cast<void*>(&{function}<1, 0, 24, 4096, 0, {capacity}, 128, 8, 1, 100>);\n}}\n"
    )


@pytest.mark.parametrize(
    ("carrier", "prefix", "folders"),
    [("elastic", "", ["a:b"]), ("ep", "deep_ep::ep::", ["a", "b"])],
)
def test_compiled_kernels_are_found_in_the_cache_of_each_generation(
    carrier: str, prefix: str, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "v2_carrier", lambda: carrier)
    caches = [tmp_path / folder / "cache" for folder in folders]
    write_source(caches[0] / "kernel.dispatch.01", f"{prefix}dispatch_impl", 64)
    write_source(caches[-1] / "kernel.combine_reduce_epilogue.02", f"{prefix}combine_reduce_epilogue_impl", 512)
    monkeypatch.setenv("EP_JIT_CACHE_DIR", ":".join(str(tmp_path / folder) for folder in folders))
    found = {(kernel.kind, kernel.num_max_tokens_per_rank) for kernel in jit.compiled_kernels(2048, 128, 8)}
    assert found == {("dispatch", 64), ("combine_reduce_epilogue", 512)}
    assert not list(jit.compiled_kernels(2048, 64, 8))


def test_the_worst_of_several_errors_is_nan_if_one_is() -> None:
    assert worst([3.0, 1.0]) == 3.0
    assert all(math.isnan(worst(errors)) for errors in itertools.permutations([0.0, math.nan, 1.0]))
