"""slime's process groups: Megatron's groups forward to groups that are destroyed with the whole world while the rollout
runs, and made again afterwards (`--offload-train`). Its start-up path, then a MoE layer before and after a rollout.

After slime 0.3.1 (624b824): slime/utils/reloadable_process_group.py (the class, the functions of torch.distributed that
are replaced, the order in which groups go and come), slime/backends/megatron_utils/actor.py (init, sleep, wake_up).
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.commands import python

JOB = '''
import importlib, json, os
import torch
import torch.distributed as dist

groups = []

class Reloadable(dist.ProcessGroup):
    def __init__(self, group, ranks):
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self.group, self.ranks = group, ranks
        groups.append(self)

    def __getattr__(self, name):
        return getattr(self.group, name)

    def rank(self):
        return self.group.rank()

    def size(self):
        return self.group.size()

    def name(self):
        return self.group.name()

def inner(value):
    return value.group if isinstance(value, Reloadable) else value

def unwrapping(function):
    return lambda *args, **named: function(*map(inner, args), **{name: inner(value) for name, value in named.items()})

new_group = dist.new_group

def make(ranks=None, **more):
    group = new_group(ranks, **more)
    ranks = list(range(dist.get_world_size())) if ranks is None else ranks
    return Reloadable(group, ranks)

dist.new_group = make
NAMES = """get_rank get_world_size get_backend get_process_group_ranks get_global_rank get_group_rank
all_reduce all_gather all_gather_object all_gather_into_tensor all_to_all all_to_all_single barrier broadcast
reduce_scatter_tensor"""
for name in NAMES.split():
    setattr(dist, name, unwrapping(getattr(dist, name)))

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)

def world(generation):
    dist.init_process_group("gloo", store=dist.PrefixStore(str(generation), store), rank=rank, world_size=size)

def sleep():
    dist.barrier()
    dist.destroy_process_group()
    for group in groups:
        group.group = None
    world("asleep")

def wake_up():
    dist.barrier()
    dist.destroy_process_group()
    world("awake")
    for group in groups:
        group.group = new_group(group.ranks)

def load_function(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)

world("first")
from megatron.core import parallel_state

parallel_state.initialize_model_parallel(expert_model_parallel_size=size, expert_tensor_parallel_size=1)
load_function("megatron_ep_v2.auto.init")(None)

import megatron_ep_v2
from tests.helpers.megatron_layer import build_layer, hidden_states, step
from tests.helpers.shapes import CPU

def state(tokens):
    gradients = {name: value.clone() for name, value in step(layer, tokens).items()}
    status = megatron_ep_v2.status()
    facts = [status["installed_by"], status["moe_layers"], [buffer["class"] for buffer in status["buffers"]]]
    return gradients, facts

with torch.compiler.set_stance("force_eager"):  # Megatron compiles small functions
    layer = build_layer(CPU, "flex")
    tokens = hidden_states(CPU, CPU.tokens, 1)
    before, facts = state(tokens)
    kind = type(layer.token_dispatcher.tp_ep_group).__name__
    sleep()
    asleep = len(megatron_ep_v2.status()["buffers"])
    wake_up()
    after, again = state(tokens)
equal = before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
dist.barrier()
dist.destroy_process_group()
print(json.dumps([kind, facts, asleep, again, equal, len(megatron_ep_v2.status()["buffers"])]))
'''


def test_a_layer_goes_on_after_a_rollout(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    done = python("job.py", ranks=2, cwd=tmp_path, MCORE_DEEPEP_V2_REFERENCE_STRICT="off")
    assert done.returncode == 0, done.stderr[-4000:]
    facts = ["import megatron_ep_v2.auto", "1 dispatch through it", ["ReferenceBuffer"]]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["Reloadable"')]
    assert reports == [["Reloadable", facts, 0, facts, True, 0]] * 2
