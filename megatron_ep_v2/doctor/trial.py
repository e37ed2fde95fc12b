"""A real dispatch and combine, forward and backward, through Megatron's own flex dispatcher, on processes of this host.

Each rank is `python -m megatron_ep_v2.doctor.trial RANK RANKS FOLDER`. It compares with a dense computation, and writes
its results to FOLDER/RANK.json.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_ep_v2.buffers.carriers import CARRIERS, MEGATRONS_OWN
from megatron_ep_v2.doctor.check import Check
from megatron_ep_v2.doctor.facts import describe_end
from megatron_ep_v2.doctor.packages import Facts

# Limit against hangs only, not for slow or busy machines. A trial takes 6 s on two CPU cores, and about a minute if
# DeepEP's cache is empty and it compiles some 14 kernels.
SECONDS = 600  # for everything
GRACE_SECONDS = 60  # for the other ranks, once one has failed
STACK_SECONDS = 10  # for a rank that is stuck to write its stack

HIDDEN, TOPK, LOCAL_EXPERTS, TOKENS = 1024, 3, 4, 64


def run_trial(ranks: int) -> tuple[Check, Facts]:
    """Start the ranks and check their results.

    Returns:
        The check "trial", and for each rank its results, or "stderr" if it failed or hung.
    """
    with tempfile.TemporaryDirectory(prefix="doctor-") as name:
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                command = [sys.executable, "-m", "megatron_ep_v2.doctor.trial", str(rank), str(ranks), name]
                with open(Path(name, f"{rank}.stderr"), "w") as stderr:
                    processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr))
            stuck = _wait(processes)
            _ask_for_stacks({processes[rank]: Path(name, f"{rank}.stderr") for rank in stuck})
        finally:
            for process in processes:
                process.kill()
                process.wait()
        found, ends = {}, {}
        for rank, process in enumerate(processes):
            text = Path(name, f"{rank}.stderr").read_text(errors="replace")[-8000:]
            if rank in stuck or process.returncode:
                ends[rank] = "stuck, see its stack" if rank in stuck else describe_end(process.returncode, text)
                found[str(rank)] = {"stderr": text}
            else:
                found[str(rank)] = json.loads(Path(name, f"{rank}.json").read_text())
    return _judge(found, ends), found


def _wait(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Wait until all ranks have ended or time is up, which is soon after one has failed. Returns the stuck ranks."""
    deadline, failed = time.monotonic() + SECONDS, False
    while None in (codes := [process.poll() for process in processes]) and time.monotonic() < deadline:
        if any(codes) and not failed:
            deadline, failed = time.monotonic() + GRACE_SECONDS, True
        time.sleep(0.05)
    return [rank for rank, code in enumerate(codes) if code is None]


def _ask_for_stacks(stuck: dict[subprocess.Popen[bytes], Path]) -> None:
    """Make processes write their stacks to their stderr, in these files; one that has not begun to run ends instead."""
    before = {process: stderr.stat().st_size for process, stderr in stuck.items()}
    for process in stuck:
        process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + STACK_SECONDS

    def silent(process: subprocess.Popen[bytes]) -> bool:
        return process.poll() is None and stuck[process].stat().st_size == before[process]

    while any(map(silent, stuck)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5 if stuck else 0)  # lets those that have begun to write finish


def _judge(found: Facts, ends: dict[int, str]) -> Check:
    what = f"dispatch and combine on {len(found)} ranks"
    if ends:
        whys = "; ".join(f"rank {rank}: {end}" for rank, end in ends.items())
        return Check("fail", f"{what}: {whys}", "no error on any rank", "read each rank's stderr, below", "trial")
    errors = [error for each in found.values() for error in each["errors"].values()]
    one, worst = found["0"], max(errors, key=lambda error: math.inf if math.isnan(error) else error)
    carrier = CARRIERS[MEGATRONS_OWN if one["buffer"] == "megatron" else one["buffer"]]
    text = f"{what}, {carrier.label}, {one['layout']}, {one['dtype']}: relative error {worst:.0e}"
    if worst <= one["tolerance"]:
        return Check("ok", text, name="trial")
    needed = f"at most {one['tolerance']:g}, against a dense computation"
    return Check("fail", text, needed, "report it with --json's output", "trial")


def run_rank(rank: int, ranks: int, folder: Path) -> Facts:
    """Run one rank. Raises whatever goes wrong."""
    faulthandler.register(signal.SIGUSR1)
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # ends this rank if the doctor itself is killed

    import torch
    import torch.distributed as dist

    import megatron_ep_v2
    from megatron_ep_v2.gpus import gpu_of

    cuda = torch.cuda.is_available()
    device = gpu_of(rank, ranks) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store, limit = dist.FileStore(str(folder / "store"), ranks), datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
    dtype = torch.bfloat16 if cuda else torch.float32  # on the reference a wrong result shows best in fp32
    installed = megatron_ep_v2.install(reference_strict=dtype == torch.bfloat16)
    with torch.compiler.set_stance("force_eager"):  # Megatron compiles small functions, which is not tested here
        errors = _compare(rank, ranks, device, dtype)
    dist.barrier()
    dist.destroy_process_group()
    found = {"buffer": installed["buffer"], "layout": installed["layout"], "dtype": str(dtype), "errors": errors}
    return {**found, "tolerance": 2e-2 if cuda else 1e-5}


def _compare(rank: int, ranks: int, device: Any, dtype: Any) -> dict[str, float]:
    """Relative L2 errors of a layer in which each expert multiplies its rows by a number of its own."""
    import torch
    import torch.distributed as dist

    from megatron_ep_v2.megatron.standalone import make_dispatchers

    experts, tokens = LOCAL_EXPERTS * ranks, TOKENS + 8 * rank  # uneven on purpose
    generator = torch.Generator().manual_seed(rank)
    hidden, grad = torch.randn(2, tokens, 1, HIDDEN, generator=generator).to(device, dtype)
    probs = torch.randn(tokens, experts, generator=generator).softmax(dim=1)
    chosen = torch.zeros_like(probs).scatter(1, probs.topk(TOPK, dim=1).indices, 1.0).bool().to(device)
    probs = probs.to(device) * chosen
    factors = torch.linspace(0.5, 1.5, experts, device=device)

    x, p = hidden.clone().requires_grad_(), probs.clone().requires_grad_()
    world, alone = dist.group.WORLD, dist.new_group([rank], use_local_synchronization=True)
    assert world is not None and isinstance(alone, dist.ProcessGroup)  # both have this rank
    (dispatcher,) = make_dispatchers(
        *("flex", "deepep", 1, world, alone), hidden=HIDDEN, experts=experts, topk=TOPK, dtype=dtype
    )
    sent = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(x, chosen, p))
    rows, counts, row_probs = dispatcher.dispatch_postprocess(*sent)
    own = factors[rank * LOCAL_EXPERTS : (rank + 1) * LOCAL_EXPERTS]
    weights = row_probs * own.repeat_interleave(torch.as_tensor(counts, device=device))
    rows = dispatcher.combine_preprocess((rows * weights[:, None]).to(dtype))
    y = dispatcher.combine_postprocess(dispatcher.token_combine(rows))
    y.backward(grad)

    # Dense reference in fp64: a token times the sum of its probabilities, each times its expert's factor.
    dense_x, dense_p = hidden.double().requires_grad_(), probs.double().requires_grad_()
    dense_y = dense_x * (dense_p @ factors.double()).view(-1, 1, 1)
    dense_y.backward(grad.double())
    pairs = {"output": (y, dense_y), "gradient of x": (x.grad, dense_x.grad)}
    # The dispatcher gives no gradient to experts that were not selected.
    pairs["gradient of the probabilities"] = (p.grad, dense_p.grad.masked_fill(~chosen, 0.0))  # type: ignore[union-attr]
    return {name: float((mine.double() - wanted).norm() / wanted.norm()) for name, (mine, wanted) in pairs.items()}  # type: ignore[union-attr]


if __name__ == "__main__":
    _rank, _ranks, _folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    _found = run_rank(_rank, _ranks, _folder)
    (_folder / f"{_rank}.json").write_text(json.dumps(_found))
