"""Training jobs of Megatron's own parts on CPU ranks: GPTModel, DistributedDataParallel, optimizers, distributed
checkpoints. Where Megatron asks for CUDA without asking whether it is there, `on_cpu` gives it the CPU."""

from __future__ import annotations

import contextlib
import inspect
import io
import multiprocessing
import os
import pickle
import queue
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from qwen3_moe.options import Options, parse_options
from torch.overrides import TorchFunctionMode

import megatron_ep_v2
from megatron_ep_v2.megatron.qwen3_moe import model as example

# Two layers, so that one can be taken for the other; a dense feed-forward as wide as an expert's, as SequentialMLP
# needs.
ARGUMENTS = (
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2", "--num-query-groups", "1"),
    *("--kv-channels", "16", "--seq-length", "12", "--num-experts", "8", "--topk", "3", "--moe-ffn-hidden-size", "16"),
    *("--ffn-hidden-size", "16", "--vocab-size", "256"),
)
CPU = torch.device("cpu")
LOCAL_EXPERT = re.compile(r"(.*)\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
STACKED = re.compile(r"(.*)\.experts\.(linear_fc[12])\.weight")


class _Cpu(TorchFunctionMode):
    """What Megatron puts on CUDA devices lands on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if not kwargs:  # first, because nearly all of the calls are such: hundreds of thousands in a test
            if func is torch.Tensor.type and len(args) == 1:  # by which its optimizer sorts gradients
                return func(*args).replace("torch.", "torch.cuda.")
            return func(*args)
        if "cuda" in str(kwargs.get("device", "")):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


class _Stream:
    """The CPU's one stream is in order by itself."""

    def __init__(self, *_: Any, **__: Any):
        self.wait_stream = self.wait_event = self.synchronize = lambda *_: None


class _Results:
    """What a checkpoint's writer answers, also from a fork: instead of a queue in a process of its own, which
    takes two seconds to start and outlives a rank that is killed."""

    def __init__(self) -> None:
        self._file, self._read = tempfile.TemporaryFile(), 0  # noqa: SIM115 - goes with this object

    def put(self, value: Any) -> None:
        os.write(self._file.fileno(), pickle.dumps(value))

    def get_nowait(self) -> Any:
        written = io.BytesIO(os.pread(self._file.fileno(), 1 << 30, self._read))
        if not written.getbuffer():
            raise queue.Empty
        value = pickle.load(written)
        self._read += written.tell()
        return value


class FusedAdam(torch.optim.Optimizer):
    """Keeps its state as TransformerEngine's and Apex' FusedAdam do, with one step count a group, as Megatron's
    distributed checkpoints need it; PyTorch's keeps a count for each parameter."""

    def __init__(self, params: Any, lr: float, weight_decay: float, betas: Any, eps: float, **more: Any):
        assert more["adam_w_mode"]
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), steps = group["betas"], group["step"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(p))
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                scale = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt_().add_(group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(state["exp_avg"] / (1 - beta1**steps), scale, value=-group["lr"])


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Megatron on the CPU. It finds a fused Adam, and the process may start others, as the writer of checkpoints does,
    although the harness' ranks are daemons."""
    from megatron.core import optimizer
    from megatron.core.distributed import distributed_data_parallel
    from megatron.core.optimizer import distrib_optimizer

    process = multiprocessing.current_process()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(process._config, daemon=False))  # type: ignore[attr-defined]
        stack.enter_context(mock.patch.object(filesystem_async, "_process_memory", lambda: 0, create=True))
        stack.enter_context(mock.patch.object(filesystem_async, "_results_queue", _Results()))
        stack.enter_context(
            mock.patch.object(distributed_data_parallel, "is_graph_capturing", lambda: False, create=True)
        )
        for name, value in {
            "current_device": lambda: CPU,
            "synchronize": lambda *_: None,
            "Stream": _Stream,
            "current_stream": lambda *_: _Stream(),
            "stream": lambda *_: contextlib.nullcontext(),
            "FloatTensor": torch.FloatTensor,
            "IntTensor": torch.IntTensor,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for module, name, value in (
            (optimizer, "USING_PYTORCH_OPTIMIZER", False),
            (optimizer, "Adam", FusedAdam),
            (distrib_optimizer, "Adam", FusedAdam),
            (distrib_optimizer, "HAVE_APEX_OR_TE", True),
            (distrib_optimizer, "USING_APEX_OPTIMIZER", True),
        ):
            stack.enter_context(mock.patch.object(module, name, value, create=True))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_Cpu())
        yield


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a job is set up.

    Attributes:
        experts: `install(experts=...)`.
        overlap: Gather parameters and reduce gradients during compute.
        fusion: `gradient_accumulation_fusion`, of the experts alone (Megatron's local linears need Apex for it).
        distributed: Megatron's distributed optimizer; else its fp32 one.
        sharding: Of the distributed optimizer's state in checkpoints.
        single: `singleton_local_shards`: each expert under a key of its own.
        more: Fields of TransformerConfig.
        install: Further settings of `install()`.
    """

    experts: str = "megatron"
    overlap: bool = False
    fusion: bool = False
    distributed: bool = True
    sharding: str = "fully_reshardable"
    single: bool = False
    more: tuple[tuple[str, Any], ...] = ()
    install: tuple[tuple[str, Any], ...] = ()


class Job:
    """A model in training on this rank."""

    def __init__(self, setup: Setup):
        self.setup = setup
        options: Options = parse_options(ARGUMENTS)
        size, rank = (
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_expert_model_parallel_rank(),
        )
        dispatcher = "flex" if size > 1 else "alltoall"  # Megatron's flex dispatcher wants more than one rank
        options = replace(options, dispatcher=dispatcher, dtype="fp32")
        megatron_ep_v2.install(buffer="reference", experts=setup.experts, **dict(setup.install))
        with _config(**dict(setup.more)):
            self.model = example.build_model(options, CPU, rank, size)
        config = self.model.config
        for module in self.model.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = setup.fusion
        self.ddp = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=setup.distributed,
                overlap_grad_reduce=setup.overlap,
                overlap_param_gather=setup.overlap and setup.distributed,
                grad_reduce_in_fp32=True,
            ),
            self.model,
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-3,
                weight_decay=0.01,
                clip_grad=0.5,
                use_distributed_optimizer=setup.distributed,
                overlap_param_gather=setup.overlap and setup.distributed,
                bf16=False,
                fp16=False,
            ),
            [self.ddp],
        )
        self.steps = 0

    def step(self, micro_batches: int = 2) -> tuple[float, float]:
        """Loss and gradient norm of a step, over all ranks."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for i in range(micro_batches):
            last = i == micro_batches - 1
            with contextlib.nullcontext() if last else self.ddp.no_sync():
                generator = torch.Generator().manual_seed(1000 * self.steps + 10 * i + dist.get_rank())
                tokens = torch.randint(256, (2, 13), generator=generator)
                positions = torch.arange(12).expand(2, 12)
                losses = self.ddp(tokens[:, :-1], positions, attention_mask=None, labels=tokens[:, 1:].contiguous())
                micro_loss = losses.mean() / micro_batches
                micro_loss.backward()
                loss += micro_loss.detach()
        finalize_model_grads([self.ddp])
        good, norm, _ = self.optimizer.step()
        assert good
        self.steps += 1
        dist.all_reduce(loss)
        return loss.item() / dist.get_world_size(), float(norm)

    def scheduled_step(
        self, data_iterator: Any, num_microbatches: int, forward_backward: Any = None, forward_step: Any = None
    ) -> tuple[list[float], float]:
        """As megatron.training's train_step does it: this rank's losses, and the gradient norm.

        Args:
            data_iterator: Of dicts with "tokens", [2, 13] int64.
            num_microbatches: Of the step.
            forward_backward: Megatron's wrapper around its schedule; None = the schedule.
            forward_step: See `forward_step`.
        """
        config = self.model.config
        config.finalize_model_grads_func, config.no_sync_func = finalize_model_grads, self.ddp.no_sync
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = (forward_backward or get_forward_backward_func())(
            forward_step_func=forward_step or self.forward_step,
            data_iterator=data_iterator,
            model=[self.ddp],
            num_microbatches=num_microbatches,
            seq_length=12,
            micro_batch_size=2,
            forward_only=False,
        )
        good, norm, _ = self.optimizer.step()
        assert good
        self.steps += 1
        return [float(loss["loss"]) for loss in losses], float(norm)

    @staticmethod
    def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
        """Of Megatron's schedules."""
        tokens = next(data_iterator)["tokens"]
        positions = torch.arange(12).expand(len(tokens), 12)
        losses = model(tokens[:, :-1], positions, attention_mask=None, labels=tokens[:, 1:].contiguous())
        return losses, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})

    def weights(self) -> dict[str, torch.Tensor]:
        """All parameters of this rank, gathered over its replicas; experts by their global number, one by one."""
        if self.setup.overlap and self.setup.distributed:
            self.ddp.disable_forward_pre_hook(param_sync=True)
            self.ddp.enable_forward_pre_hook()
        return one_by_one({name: p.detach() for name, p in self.model.named_parameters()})

    def metadata(self) -> dict[str, Any]:
        """As megatron.training's _build_sharded_state_dict_metadata makes it."""
        metadata: dict[str, Any] = {
            "singleton_local_shards": self.setup.single,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        if self.setup.distributed:
            metadata["distrib_optim_sharding_type"] = self.setup.sharding
            metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
        return metadata

    def state(self, is_loading: bool = False) -> dict[str, Any]:
        """As megatron.training's generate_state_dict makes it."""
        metadata = self.metadata()
        model = self.ddp.module.sharded_state_dict(metadata=metadata)
        optimizer = self.optimizer.sharded_state_dict({"model": model}, is_loading=is_loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer, "steps": self.steps}

    def save(self, folder: Path) -> None:
        """Every rank calls it; the folder is made here."""
        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
        dist.barrier()
        if self.setup.overlap and self.setup.distributed:
            self.ddp.disable_forward_pre_hook(param_sync=True)
        dist_checkpointing.save(self.state(), str(folder))
        if self.setup.overlap and self.setup.distributed:
            self.ddp.enable_forward_pre_hook()
        dist.barrier()

    def save_during_training(self, folder: Path) -> tuple[float, float]:
        """`save` in another process (--async-save), and the next step while it writes."""
        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
        dist.barrier()
        queue = AsyncCallsQueue()
        more = {}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
            more["async_strategy"] = "mcore"  # from 0.18 on the default is NVIDIA's resiliency extension
        request = dist_checkpointing.save(self.state(), str(folder), async_sharded_save=True, **more)
        queue.schedule_async_request(request)
        step = self.step()
        queue.maybe_finalize_async_calls(blocking=True)
        queue.close()
        dist.barrier()
        return step

    def load(self, folder: Path) -> None:
        """As megatron.training does, with its default strictness."""
        loaded = dist_checkpointing.load(self.state(is_loading=True), str(folder), strict="assume_ok_unexpected")
        self.ddp.module.load_state_dict(loaded["model"], strict=True)
        with torch.no_grad():  # dp_reshardable's loader forgets it, which fp32 parameters mind
            self.optimizer.load_state_dict(loaded["optimizer"])
        self.steps = loaded["steps"]

    def load_weights(self, folder: Path, steps: int) -> None:
        """As with --no-load-optim: the optimizer starts from the weights, without state. steps: Those before."""
        state = {"model": self.ddp.module.sharded_state_dict(metadata=self.metadata())}
        loaded = dist_checkpointing.load(state, str(folder), strict="assume_ok_unexpected")
        self.ddp.module.load_state_dict(loaded["model"], strict=True)
        self.optimizer.reload_model_params()
        self.steps = steps


def one_by_one(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts of every kind under one name each, with their global number."""
    found: dict[str, torch.Tensor] = {}
    rank = parallel_state.get_expert_model_parallel_rank()
    for name, tensor in named.items():
        if local := LOCAL_EXPERT.fullmatch(name):
            layer, number, linear = local.groups()
            per_rank = 8 // parallel_state.get_expert_model_parallel_world_size()
            found[f"{layer}.experts.{rank * per_rank + int(number)}.{linear}"] = tensor.clone()
        elif stacked := STACKED.fullmatch(name):
            layer, linear = stacked.groups()
            for i, expert in enumerate(tensor):
                found[f"{layer}.experts.{rank * len(tensor) + i}.{linear}"] = expert.clone()
        else:
            found[name] = tensor.clone()
    return found


@contextlib.contextmanager
def _config(**more: Any) -> Iterator[None]:
    """The example's configuration with other fields."""
    theirs = example.transformer_config

    def changed(*args: Any) -> Any:
        return replace(theirs(*args), **more) if more else theirs(*args)

    with mock.patch.object(example, "transformer_config", changed):
        yield
