"""The symbols of Megatron-Core that `install()` binds. Each name and signature is checked before anything is
changed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from megatron_ep_v2 import versions
from megatron_ep_v2.errors import SeamError

if TYPE_CHECKING:
    from torch.autograd import Function

Owner: TypeAlias = ModuleType | type  # that has a symbol as its attribute
Binding: TypeAlias = tuple[Owner, str, object]  # owner, name, what is bound there
Bound: TypeAlias = tuple[Owner, str, object, object]  # owner, name, Megatron's object, ours

FUSED_A2A = "megatron.core.transformer.moe.fused_a2a"
TOKEN_DISPATCHER = "megatron.core.transformer.moe.token_dispatcher"
MOE_UTILS = "megatron.core.transformer.moe.moe_utils"  # which TOKEN_DISPATCHER imports
CHECKPOINT = "megatron.core.tensor_parallel.random"
MOE_LAYER = "megatron.core.transformer.moe.moe_layer"
OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
OPTIMIZERS = "megatron.core.optimizer.optimizer"
DDP = "megatron.core.distributed.distributed_data_parallel"
DIST_CHECKPOINTING = "megatron.core.dist_checkpointing"
TE_CHECKPOINT = "transformer_engine.pytorch.distributed"
SCHEDULE = "megatron.core ... schedule"  # key of the module of SCHEDULES that decides what 1F1B frees
SCHEDULES = ("megatron.core.models.common.utils", "megatron.core.models.gpt.fine_grained_callables")  # 0.19; older
GRAPHED_STEP = "megatron.core.optimizer.optimizer_cuda_graph"  # from 0.19 on
FORWARD_BACKWARD = "megatron.core.pipeline_parallel.schedules"
FULL_GRAPH = "megatron.core.full_cuda_graph"
MANAGER = "_DeepepManager"  # in TOKEN_DISPATCHER: the communication manager of backend "deepep"
_CALL = ("hidden_states", "async_finish", "allocate_on_comm_stream")

# Required symbols by module: name -> parameters in order (without self), or None if only the name is checked.
# fused_dispatch and fused_combine are None if Megatron found no deep_ep, so their autograd classes are checked instead.
_SYMBOLS: dict[str, dict[str, tuple[str, ...] | None]] = {
    FUSED_A2A: {
        "HAVE_DEEP_EP": None,
        "fused_dispatch": None,
        "fused_combine": None,
        "set_deepep_num_sms": None,
        "FusedDispatch.forward": (
            *("ctx", "x", "token_indices", "token_probs", "num_experts", "group"),
            *("async_finish", "allocate_on_comm_stream"),
        ),
        "FusedCombine.forward": ("ctx", "x", "group", "handle", "async_finish", "allocate_on_comm_stream"),
    },
    TOKEN_DISPATCHER: {
        "fused_dispatch": None,
        "fused_combine": None,
        "set_deepep_num_sms": None,
        f"{MANAGER}.__init__": ("group", "num_local_experts", "router_topk", "num_experts", "config"),
        f"{MANAGER}.setup_metadata": ("routing_map", "probs"),
        f"{MANAGER}.dispatch": _CALL,
        f"{MANAGER}.combine": _CALL,
        f"{MANAGER}.get_permuted_hidden_states_by_experts": ("hidden_states",),
        f"{MANAGER}.get_restored_hidden_states_by_experts": ("hidden_states",),
        f"{MANAGER}.get_number_of_tokens_per_expert": (),
        "MoEFlexTokenDispatcher.dispatch_preprocess": ("hidden_states", "routing_map", "probs"),
        "MoEFlexTokenDispatcher.combine_postprocess": ("hidden_states",),
        "MoETokenDispatcher.__init__": None,  # whose arguments are passed on
        "get_align_size_for_quantization": ("config",),
    },
    CHECKPOINT: {"CheckpointFunction.forward": ("ctx", "run_function", "distribute_saved_activations", "args")},
    OPTIMIZERS: {"ChainedOptimizer.step": (), "MixedPrecisionOptimizer.step": (), "FP32Optimizer.step": ()},
}
# Required symbols for experts other than Megatron's; further parameters may follow.
_EXPERT_SYMBOLS: dict[str, dict[str, tuple[str, ...]]] = {
    MOE_LAYER: {"MoELayer.__init__": ("config", "submodules", "layer_number", "pg_collection")},
    OPTIMIZER: {
        "DistributedOptimizer.sharded_param_state_dp_reshardable": (
            *("model_sharded_state_dict", "is_loading", "metadata"),
        ),
        "DistributedOptimizer.sharded_param_state_dp_zero": ("model_sharded_state_dict", "is_loading", "metadata"),
    },
    DIST_CHECKPOINTING: {"load": ("sharded_state_dict", "checkpoint_dir")},
    DDP: {"DistributedDataParallel.zero_grad_buffer": ()},
}
# Required symbols for repeating a step in sync-free mode; further parameters may follow. `get_forward_backward_func`
# looks the schedules up in their module when it is called.
_RUN = ("forward_step_func", "data_iterator", "model", "num_microbatches")
_REPEAT_SYMBOLS: dict[str, dict[str, tuple[str, ...] | None]] = {
    FORWARD_BACKWARD: {
        "forward_backward_no_pipelining": _RUN,
        "forward_backward_pipelining_with_interleaving": _RUN,
        "forward_backward_pipelining_without_interleaving": _RUN,
    },
    FULL_GRAPH: {
        "FullCudaGraphWrapper.curr_iter": ("stage",),  # and its __call__, which every class seems to have
        "FullCudaGraphWrapper.curr_iteration": None,
        "FullCudaGraphWrapper.cuda_graph": None,
        "FullCudaGraphWrapper.result": None,
        "StaticBufferLoader.static_buffers": None,
    },
}


def find_symbols() -> tuple[str, dict[str, ModuleType]]:
    """Find Megatron-Core's version and the modules whose symbols are bound; checks every name and signature.

    Raises:
        SeamError: Megatron-Core cannot be imported, or a name or signature is not the expected one.
    """
    version = "of unknown version"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a source tree has no metadata
        version = importlib.metadata.version("megatron-core")
    # Imported inside a git checkout, Megatron appends that checkout's commit: 0.19.2+1a2b3c4.
    version = str(getattr(_import("megatron.core"), "__version__", version)).partition("+")[0]
    modules: dict[str, ModuleType] = {}
    for name, symbols in _SYMBOLS.items():
        modules[name] = _import(name)
        for dotted, parameters in symbols.items():
            _check_symbol(modules[name], dotted, parameters, version)
    if hasattr(sys.modules.get(MOE_UTILS), "skip_routed_expert_padding"):  # from 0.19 on
        _check_symbol(sys.modules[MOE_UTILS], "skip_routed_expert_padding", ("config",), version)
    with contextlib.suppress(ModuleNotFoundError):  # the package around it, in some version
        if importlib.util.find_spec(GRAPHED_STEP) is not None:
            modules[GRAPHED_STEP] = _import(GRAPHED_STEP)
            _check_symbol(modules[GRAPHED_STEP], "OptimizerCudaGraphWrapper.__call__", None, version)
    modules[SCHEDULE] = _import_schedule()
    # 0.17 has added a parameter, which is passed through.
    _check_symbol(modules[SCHEDULE], "should_free_input", ("name", "is_moe", "config"), version, more=True)
    return version, modules


def find_expert_symbols(version: str) -> dict[str, ModuleType]:
    """Find the modules whose symbols are bound for experts other than Megatron's.

    Raises:
        SeamError: See `find_symbols`.
    """
    return _find(_EXPERT_SYMBOLS, version)


def find_repeat_symbols(version: str) -> dict[str, ModuleType]:
    """Find the modules whose symbols are bound for repeating a step in sync-free mode.

    Raises:
        SeamError: See `find_symbols`.
    """
    return _find(_REPEAT_SYMBOLS, version)


def _find(required: Mapping[str, Mapping[str, tuple[str, ...] | None]], version: str) -> dict[str, ModuleType]:
    """The modules of required symbols, by name. Further parameters may follow."""
    modules = {}
    for name, symbols in required.items():
        modules[name] = _import(name)
        for dotted, parameters in symbols.items():
            _check_symbol(modules[name], dotted, parameters, version, more=True)
    return modules


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    # Megatron imports deep_ep and catches only ImportError; its other errors (see probe.py) come through.
    except (ImportError, AssertionError, OSError) as error:
        raise SeamError(
            f"{name} cannot be imported: {type(error).__name__}: {error}",
            needed=f"megatron-core {versions.MEGATRON_CORE_SERIES} "
            "(or a Megatron-LM source tree of that age on the path)",
            fix="pip install megatron-core, or repair or uninstall the package that the message names",
        ) from error


def _import_schedule() -> ModuleType:
    """The module that has `should_free_input`."""
    found = None
    with contextlib.suppress(ModuleNotFoundError):  # before 0.19 its package does not exist
        found = importlib.util.find_spec(SCHEDULES[0])
    if found and hasattr(module := _import(SCHEDULES[0]), "should_free_input"):
        return module
    return _import(SCHEDULES[-1])


def checkpoints(modules: dict[str, ModuleType]) -> list[type[Function]]:
    """The autograd functions of activation recompute that Megatron uses: its own, and TransformerEngine's (for FP8) if
    Megatron has imported it and its first argument is the function to run twice."""
    theirs = getattr(sys.modules.get(TE_CHECKPOINT), "_CheckpointFunction", None)
    known = theirs is not None and list(inspect.signature(theirs.forward).parameters)[:2] == ["ctx", "run_function"]
    return [modules[CHECKPOINT].CheckpointFunction, *([theirs] if known else [])]


def _check_symbol(
    module: ModuleType, dotted: str, parameters: tuple[str, ...] | None, version: str, more: bool = False
) -> None:
    """Raise SeamError if a symbol is missing or has other parameters. more: Further parameters may follow."""
    symbol: Any = module
    for part in dotted.split("."):
        if not hasattr(symbol, part):
            found = "it does not exist"
            break
        symbol = getattr(symbol, part)
    else:
        if parameters is None:
            return
        try:
            have = tuple(name for name in inspect.signature(symbol).parameters if name != "self")
        except (TypeError, ValueError):
            found = f"it is {symbol!r}, not a function"
        else:
            if (have[: len(parameters)] if more else have) == parameters:
                return
            found = f"its parameters are ({', '.join(have)})"
    raise SeamError(
        f"megatron-core {version}: {module.__name__}.{dotted} is not what this package binds to; nothing was changed",
        found=found,
        needed="a symbol of that name" if parameters is None else f"parameters ({', '.join(parameters)})",
        fix=f"use a tested version of megatron-core ({versions.MEGATRON_CORE}), or a newer megatron_ep_v2",
    )
