"""Job: MoE layers in the Megatron of PYTHONPATH, on two ranks, without a call of `install()`.

with      megatron_ep_v2 is installed. What is built after the first MoELayer must give what a dense layer gives, also
          after install(), uninstall(); and the first one has the experts of the settings already.
without   It is not. First deep_ep is missing, then it is a legacy one whose ranks keep their tokens.

Prints one JSON document: what there is to compare with another Megatron.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.harness import HANG
from tests.helpers.shapes import Shape, Split

RANKS = 2
SHAPE, SPLIT = Shape(topk=4, hidden=256), Split(1, RANKS)


def make_layer(**more: Any) -> Any:
    """Megatron's MoELayer, the same on every rank."""
    from tests.helpers.megatron_layer import AUX_LOSS, moe_layer_of, transformer_config

    return moe_layer_of(transformer_config(SHAPE, SPLIT, **AUX_LOSS | more))


def with_the_package(report: dict[str, Any]) -> None:
    from megatron.core.transformer.moe import moe_layer, token_dispatcher

    import megatron_ep_v2
    from megatron_ep_v2 import settings
    from megatron_ep_v2.errors import SettingsError
    from tests.megatron.test_flex_dispatcher import weigh

    stock = token_dispatcher._DeepepManager, token_dispatcher.fused_dispatch

    def state() -> list[Any]:
        return [megatron_ep_v2.status().get(name) for name in ("installed", "buffer", "layout")]

    report["file"] = moe_layer.__file__
    with contextlib.suppress(ImportError):  # Megatron's own: HybridEP is not installed
        make_layer(moe_flex_dispatcher_backend="hybridep")
    report["another backend"] = state()
    with settings.environment(MCORE_DEEPEP_V2_LAYOUT="sorted"):
        try:
            make_layer()
        except SettingsError as error:
            report["a wrong setting"] = error.what.splitlines()[0]  # build_module appends what it built
    make_layer()
    weigh(SHAPE, SPLIT)
    report["alone"] = state()
    megatron_ep_v2.install(layout="compact")
    make_layer()
    weigh(SHAPE, SPLIT)
    report["after install()"] = state()
    megatron_ep_v2.uninstall()
    assert stock == (token_dispatcher._DeepepManager, token_dispatcher.fused_dispatch)
    make_layer()
    weigh(SHAPE, SPLIT)
    report["after uninstall()"] = state()
    megatron_ep_v2.uninstall()
    with settings.environment(MCORE_DEEPEP_V2_EXPERTS="grouped"):
        layers = [make_layer() for _ in range(2)]
    report["experts"] = [type(layer.experts).__name__ for layer in layers]
    layers[0](torch.ones(6, 1, SHAPE.hidden))[0].sum().backward()
    megatron_ep_v2.uninstall()
    report["experts"].append(type(make_layer().experts).__name__)
    megatron_ep_v2.uninstall()


def without_the_package(report: dict[str, Any]) -> None:
    from megatron.core.transformer.moe import fused_a2a, moe_layer, token_dispatcher

    from tests.helpers.megatron_layer import hidden_states

    try:
        make_layer()
    except ImportError as error:
        report["no deep_ep"] = str(error)
    deep_ep = sys.modules["deep_ep"] = legacy_deep_ep()
    sys.modules["deep_ep.utils"] = deep_ep.utils
    importlib.reload(fused_a2a)
    moe_layer.MoEFlexTokenDispatcher = importlib.reload(token_dispatcher).MoEFlexTokenDispatcher
    torch.manual_seed(7)
    layer = make_layer()
    hidden = hidden_states(SHAPE, 32, 8).requires_grad_()
    output = layer(hidden)[0]
    output.backward(hidden_states(SHAPE, 32, 8, seed=1))
    manager = layer.token_dispatcher._comm_manager
    report["legacy deep_ep"] = {
        "manager": f"{type(manager).__module__}.{type(manager).__qualname__}",
        "output": digest(output),
        "gradients": [digest(hidden.grad), *(digest(p.grad) for p in layer.parameters() if p.grad is not None)],
        "calls": deep_ep.Buffer.calls,
    }
    report["file"] = moe_layer.__file__
    assert importlib.util.find_spec("megatron_ep_v2") is None and "megatron_ep_v2" not in sys.modules


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def legacy_deep_ep() -> Any:
    """The legacy API as far as Megatron calls it. A token reaches its own rank's experts and no others."""

    class Size:
        def get_nvl_buffer_size_hint(self, hidden_bytes: int, size: int) -> int:
            return hidden_bytes * size

        get_rdma_buffer_size_hint = get_nvl_buffer_size_hint

    class Event:
        def __init__(self, event: Any = None):
            pass

        def current_stream_wait(self) -> None:
            pass

    class Buffer:
        calls: list[Any] = []  # noqa: RUF012

        def __init__(self, group: Any, num_nvl_bytes: int, num_rdma_bytes: int):
            self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes
            self.calls.append(["Buffer", num_nvl_bytes, num_rdma_bytes])

        @classmethod
        def set_num_sms(cls, num_sms: int) -> None:
            cls.calls.append(["set_num_sms", num_sms])

        @staticmethod
        def get_dispatch_config(size: int) -> Size:
            return Size()

        get_combine_config = get_dispatch_config

        def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int, **_: Any) -> tuple[Any, ...]:
            self.local = num_experts // self.group.size()
            return None, None, None, None, Event()

        def dispatch(self, x: torch.Tensor, handle: Any = None, **arguments: Any) -> tuple[Any, ...]:
            self.calls.append(["dispatch", *sorted(name for name in arguments)])
            if handle is not None:
                return x, None, None, None, None, Event()
            local_idx = arguments["topk_idx"] - self.group.rank() * self.local
            here = (local_idx >= 0) & (local_idx < self.local)
            local_idx = torch.where(here, local_idx, -1)
            counts = [int((local_idx == expert).sum()) for expert in range(self.local)]
            weights = torch.where(here, arguments["topk_weights"], 0.0)
            return x, local_idx, weights, counts, (here,), Event()

        def combine(self, x: torch.Tensor, handle: Any, topk_weights: Any = None, **arguments: Any) -> tuple[Any, ...]:
            self.calls.append(["combine", *sorted(name for name in arguments)])
            return x, None if topk_weights is None else torch.where(handle[0], topk_weights, 0.0), Event()

    module, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    vars(utils).update(EventHandle=Event, EventOverlap=Event)
    vars(module).update(Buffer=Buffer, utils=utils, __path__=[])
    return module


def run_rank(rank: int, folder: str, body: Callable[[dict[str, Any]], None]) -> None:
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    with torch.compiler.set_stance("force_eager"):  # Megatron compiles small functions
        parallel_state.initialize_model_parallel(expert_model_parallel_size=RANKS, expert_tensor_parallel_size=1)
        report: dict[str, Any] = {}
        body(report)
    dist.barrier()
    dist.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(report))


def main() -> None:
    body = {"with": with_the_package, "without": without_the_package}[sys.argv[1]]
    if sys.argv[1] == "without":
        sys.path[:] = [folder for folder in sys.path if not Path(folder or ".", "megatron_ep_v2").exists()]
        # An editable installation is found by a finder of its own.
        sys.meta_path[:] = [finder for finder in sys.meta_path if "megatron_ep_v2" not in finder.__module__]
    torch.set_num_threads(1)
    from tests.helpers import megatron_layer  # noqa: F401 - both ranks then have everything imported

    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")
        ranks = [fork.Process(target=run_rank, args=(rank, folder, body)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(HANG / 3)
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
        if codes != [0] * RANKS:
            sys.exit(f"exit codes of the ranks: {codes}")
        print(json.dumps([json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(RANKS)]))


if __name__ == "__main__":
    main()
