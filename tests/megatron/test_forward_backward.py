"""A step that overflows in sync-free mode runs again inside Megatron's own schedules: bit for bit as with unlimited
room, on all ranks of the model, whatever Megatron accumulates in a step."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ep_v2 import sync_free
from megatron_ep_v2.errors import EPError
from megatron_ep_v2.megatron import expert_load, forward_backward, step_state
from megatron_ep_v2.megatron.step_state import MicroBatches
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import process_groups
from tests.helpers.megatron_training import Job, Setup, on_cpu
from tests.helpers.reports import log_records
from tests.helpers.shapes import Split

SYNC_FREE = {"MCORE_DEEPEP_V2_SYNC_FREE": "1"}
BIAS = (
    ("moe_router_score_function", "sigmoid"),
    ("moe_router_enable_expert_bias", True),
    ("moe_router_bias_update_rate", 0.1),
)
# Everything that a router accumulates in its forwards, and random numbers.
ROUTER = (
    *BIAS,
    ("moe_router_load_balancing_type", ["aux_loss", "global_aux_loss"]),
    ("moe_aux_loss_coeff", [0.01, 0.01]),
    ("moe_z_loss_coeff", 0.001),
    ("moe_input_jitter_eps", 0.1),
)


@contextlib.contextmanager
def room_for(percent: int) -> Iterator[None]:
    with mock.patch.dict("os.environ", MCORE_DEEPEP_V2_SYNC_FREE_ROWS_PERCENT=str(percent)):
        yield


class Batches:
    """An endless iterator of micro-batches, different on every rank."""

    def __init__(self) -> None:
        self.taken = 0

    def __next__(self) -> dict[str, torch.Tensor]:
        self.taken += 1
        generator = torch.Generator().manual_seed(100 * self.taken + dist.get_rank())
        return {"tokens": torch.randint(256, (2, 13), generator=generator)}


class Skewed:
    """Routers whose tokens all go to three experts, on ranks 2 and 3, while `on`. Counts the forwards of one router."""

    def __init__(self, job: Job, world: Any):
        self.on, self.forwards = False, 0
        self._far = world.rank() > 1
        routers = [module for name, module in job.model.named_modules() if name.endswith(".router")]
        assert len(routers) == 2
        for router in routers:  # after DDP's hooks, which may gather the weight
            router.register_forward_pre_hook(self._skew)
        routers[0].register_forward_pre_hook(self._count)

    def _skew(self, router: torch.nn.Module, *_: Any) -> None:
        if self._far:
            router.expert_bias.copy_(torch.tensor([float(self.on)] * 3 + [0.0] * 5))

    def _count(self, *_: Any) -> None:
        self.forwards += 1


def logged() -> dict[str, torch.Tensor]:
    """What Megatron has summed up for its log."""
    found: dict[str, torch.Tensor] = {}
    for module, name in step_state._LOGS:
        found |= step_state._tensors(getattr(sys.modules.get(module), name, None), name)
    return found


def forget_logged() -> None:
    """As in a new process."""
    for module, name in step_state._LOGS[:2]:
        tracker = getattr(sys.modules.get(module), name, None)
        getattr(tracker, "_metrics", tracker or {}).clear()


def repeats(records: list[logging.LogRecord]) -> list[str]:
    """The warnings that a step is repeated."""
    lines = [record.getMessage() for record in records if record.levelno == logging.WARNING]
    return [line for line in lines if "runs again" in line]


def train(world: Any, percent: int, micro_batches: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Three steps. On ranks 2 and 3, which alone have a limit, the first and the last have more rows than room."""
    limited = bool(percent) and world.rank() > 1
    with room_for(percent if limited else 0), on_cpu(), process_groups(Split(1, 2)), log_records() as records:
        torch.manual_seed(world.rank())
        job = Job(Setup(experts="grouped", **fields))
        batches, skewed, losses, norms = Batches(), Skewed(job, world), [], []
        expert_load.local_expert_load()
        forget_logged()
        for n in range(3):
            skewed.on = n != 1
            loss, norm = job.scheduled_step(iter_of(batches), micro_batches)
            losses, norms = losses + loss, [*norms, norm]
            if limited:
                sync_free.fit(0)
        return {
            "losses": losses,
            "norms": norms,
            "weights": job.weights(),
            "buffers": dict(job.model.named_buffers()),
            "logged": logged(),
            "loads": expert_load.local_expert_load()[-2:],
            "random": torch.rand(3),
            "taken": batches.taken,
            "runs": skewed.forwards // micro_batches,
            "said": repeats(records),
        }


def iter_of(batches: Batches) -> Iterator[Any]:
    while True:
        yield next(batches)


def assert_equal(found: Any, wanted: Any, where: str = "") -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_equal(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_equal(one, other, f"{where}[{i}]")
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), where
    else:
        assert found == wanted, where


@pytest.mark.slow
@pytest.mark.parametrize(
    ("micro_batches", "distributed", "overlap"),
    [(1, False, False), (2, False, True), (2, True, False), (4, True, True)],
)
def test_a_repeated_step_equals_one_with_unlimited_room(micro_batches: int, distributed: bool, overlap: bool) -> None:
    fields = {"distributed": distributed, "overlap": overlap, "more": ROUTER}
    wanted = run_ranks(4, train, 0, micro_batches, fields, env=SYNC_FREE)
    for rank, (found, unlimited) in enumerate(
        zip(run_ranks(4, train, 190, micro_batches, fields, env=SYNC_FREE), wanted, strict=True)
    ):
        said = found.pop("said")
        assert unlimited.pop("said") == []
        assert (found.pop("runs"), unlimited.pop("runs")) == (5, 3), "the first and the last step ran twice"
        assert found["taken"] == 3 * micro_batches
        assert len(said) == (2 if rank == 2 else 0), said
        assert all("a step runs again, because" in line and "percent now" in line for line in said)
        assert len(found["logged"]) >= 3 and all(value.any() for value in found["logged"].values())
        assert any("expert_bias" in name for name in found["buffers"])
        assert_equal(found, unlimited, f"rank {rank}")


class Position:
    """As slime's DataIterator: no iterator, but with its position in an attribute."""

    def __init__(self, batches: Batches):
        self.items, self.offset = [next(batches) for _ in range(2)], 0

    def get_next(self) -> dict[str, torch.Tensor]:
        self.offset += 1
        return self.items[self.offset - 1]


class Inside(Position):
    """One whose position is in an iterator of its own."""

    def __init__(self, batches: Batches):
        super().__init__(batches)
        self.source = iter(self.items)


def get_next(data_iterator: Any, model: Any) -> Any:
    return Job.forward_step(iter([data_iterator.get_next()]), model)


def attempts(world: Any) -> dict[str, Any]:
    """What steps of other kinds do where they overflow on ranks 2 and 3: losses, or the error's class and last line;
    how often they ran, and whether a weight has changed."""
    found: dict[str, Any] = {}

    def attempt(name: str, limit: int, source: Any, forward_step: Any = None) -> None:
        with room_for(limit if world.rank() > 1 else 0), process_groups(Split(1, 2)), log_records() as records:
            job = Job(Setup(experts="grouped", more=BIAS))
            skewed, before = Skewed(job, world), job.weights()
            skewed.on, said = True, ""
            if name == "not finalized":
                job.scheduled_step = functools.partial(unfinalized_step, job)  # type: ignore[method-assign]
            try:
                said = job.scheduled_step(source(Batches()), 2, forward_step=forward_step)[0]
            except EPError as error:
                said = " ".join([type(error).__name__, *getattr(error, "__notes__", [])])
            changed = any(not torch.equal(value, before[name]) for name, value in job.weights().items())
            found[name] = (said, skewed.forwards // 2, changed, len(repeats(records)))

    with on_cpu():
        attempt("unlimited", 0, iter_of)
        attempt("iterator", 100, iter_of)
        attempt("list", 100, lambda batches: [iter_of(batches)])
        attempt("entries taken out", 100, iter_of, take_out)
        attempt("position", 100, Position, get_next)
        attempt("inside", 100, Inside if world.rank() == 3 else Position, get_next)
        attempt("not finalized", 100, iter_of)
    return found


def take_out(data_iterator: Any, model: Any) -> Any:
    """A forward step that takes its tensors out of the dict."""
    return Job.forward_step(iter([{"tokens": next(data_iterator).pop("tokens")}]), model)


def unfinalized_step(job: Job, data_iterator: Any, micro_batches: int, forward_step: Any = None) -> Any:
    """A step of a loop that finalizes the gradients itself."""
    config = job.model.config
    job.ddp.zero_grad_buffer()
    losses = get_forward_backward_func()(
        forward_step_func=job.forward_step,
        data_iterator=data_iterator,
        model=job.ddp,
        num_microbatches=micro_batches,
        seq_length=12,
        micro_batch_size=2,
        forward_only=False,
    )
    assert config.finalize_model_grads_func is None
    job.optimizer.step()
    return losses


@pytest.mark.slow
def test_which_steps_are_repeated() -> None:
    for rank, found in enumerate(run_ranks(4, attempts, env=SYNC_FREE)):
        losses, runs, changed, warnings = found.pop("unlimited")
        assert (runs, changed, warnings) == (1, True, 0)
        for name in ("iterator", "list", "entries taken out", "position"):
            assert found[name] == (losses, 2, True, int(rank == 2)), (name, found[name])
        note = " not repeated: a Inside as data_iterator cannot be set back" if rank == 3 else ""
        assert found["inside"] == ("LayoutOverflowError" + note, 1, False, 0)
        assert found["not finalized"] == ("LayoutOverflowError", 1, False, 0)


def evaluate(world: Any) -> tuple[list[int], int, str, int]:
    """Micro-batches taken and forwards of an evaluation with more rows than room; what training says when a captured
    evaluation has overflowed, and how often it ran."""
    with room_for(50), on_cpu(), process_groups(Split(1, 2)):
        job = Job(Setup(experts="grouped", more=BIAS))
        batches, skewed = Batches(), Skewed(job, world)
        skewed.on = True
        source = iter_of(batches)

        def forward_step(data_iterator: Any, model: Any) -> Any:
            assert data_iterator is source
            return job.forward_step(data_iterator, model)

        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=source,
                model=[job.ddp],
                num_microbatches=2,
                seq_length=12,
                micro_batch_size=2,
                forward_only=True,
            )
        taken, forwards = [batches.taken], skewed.forwards
        room = next(iter(sync_free._rooms.values()))
        if world.rank() > 1:
            room.checks[False].add(torch.tensor([world.rank() == 3]))
        try:
            job.scheduled_step(source, 1)
            said = ""
        except EPError as error:
            said = type(error).__name__
        return [*taken, batches.taken], forwards, said, skewed.forwards - forwards


@pytest.mark.slow
def test_an_evaluation_is_not_repeated_nor_is_training_for_its_sake() -> None:
    assert run_ranks(4, evaluate, env=SYNC_FREE) == [([2, 3], 2, "EvaluationOverflowError", 1)] * 4


def test_the_first_chunks_configuration_decides() -> None:
    """As in the schedules: the others need not say how gradients are finalized."""
    finalized, not_finalized = (SimpleNamespace(finalize_model_grads_func=each) for each in (print, None))

    def chunk(config: Any, reuse: bool = False) -> Any:
        wrapped = torch.nn.Module.__new__(DistributedDataParallel)
        torch.nn.Module.__init__(wrapped)
        wrapped.config, wrapped.ddp_config = config, SimpleNamespace(reuse_grad_buf_for_mxfp8_param_ag=reuse)
        return wrapped

    with mock.patch.object(forward_backward.parallel_state, "model_parallel_is_initialized", lambda: True):
        assert forward_backward.can_repeat({"model": [chunk(finalized), chunk(not_finalized)]})
        for refused in (
            [chunk(not_finalized), chunk(finalized)],
            [chunk(finalized), SimpleNamespace(config=finalized)],
            [chunk(finalized), chunk(finalized, reuse=True)],
        ):
            assert not forward_backward.can_repeat({"model": refused})


def test_the_micro_batches_of_chunks_come_again_one_by_one() -> None:
    first, second = iter(range(10)), iter("abcdef")
    batches = MicroBatches([first, None, second, first])
    one, nothing, other, same = batches.data_iterator
    assert nothing is None and one is same and batches.unknown is None
    assert [next(one), next(other), next(one)] == [0, "a", 1]
    batches.rewind()
    assert [next(one), next(one), next(one), next(other)] == [0, 1, 2, "a"]
    assert (next(first), next(second)) == (3, "b"), "no item was taken before it was asked for"
    assert MicroBatches(None).data_iterator is None


def test_the_items_come_again_as_they_were() -> None:
    tensor = torch.ones(2)
    source = MicroBatches(iter([{"x": tensor, "more": [{"y": 1}]}, (1, [2])]))
    item = next(source.data_iterator)
    item.pop("x")
    item["more"][0]["y"] = 2
    next(source.data_iterator)[1].append(3)
    source.rewind()
    again = next(source.data_iterator)
    assert again["x"] is tensor and again["more"] == [{"y": 1}]
    assert next(source.data_iterator) == (1, [2])


class Tracker:
    """As Megatron's with CUDA graphs: generators by name, which a draw changes."""

    def __init__(self) -> None:
        self.states = {"model": torch.Generator().manual_seed(1), "fixed": torch.Generator().manual_seed(2).get_state()}

    def get_states(self) -> dict[str, Any]:
        return dict(self.states)

    def set_states(self, states: dict[str, Any]) -> None:
        self.states = states


def test_random_numbers_and_maximal_logits_come_again() -> None:
    attention = torch.nn.Identity()
    attention.current_max_attn_logits = None
    tracker = Tracker()
    with mock.patch.object(step_state.megatron_random, "_CUDA_RNG_STATE_TRACKER", tracker):
        state = step_state.StepState([torch.nn.Sequential(attention)])
        drawn = torch.rand(2), torch.rand(2, generator=tracker.states["model"])
        fixed, tracker.states["fixed"] = tracker.states["fixed"], torch.zeros(1)
        attention.current_max_attn_logits = torch.ones(1)
        state.restore()
        assert torch.equal(torch.rand(2), drawn[0])
        assert torch.equal(torch.rand(2, generator=tracker.states["model"]), drawn[1])
        assert tracker.states["fixed"] is fixed and attention.current_max_attn_logits is None


def test_a_repeated_steps_dispatches_are_kept_apart() -> None:
    """Also where their rows come round again: each has the row that it would have had without the first run."""
    repeated, once = (expert_load.ExpertLoad(mock.Mock(), 1) for _ in range(2))
    for layer in (repeated, once):
        for n in range(expert_load.DISPATCHES - 2):
            layer.add(torch.tensor([n]))
    state = step_state.StepState([])
    later = [expert_load.ExpertLoad(mock.Mock(), 1) for _ in range(2)]
    for layer in (repeated, later[0]):
        for _ in range(4):
            layer.add(torch.tensor([1000]))
    state.restore()
    for layer in (repeated, once, *later):
        for n in range(4):
            layer.add(torch.tensor([2000 + n]))
    assert repeated.rows_by_dispatch().tolist() == once.rows_by_dispatch().tolist()
    assert repeated.counts().equal(once.counts())
    assert later[0].rows_by_dispatch().tolist() == later[1].rows_by_dispatch().tolist()


def one_rank_cannot(group: Any) -> list[str]:
    """Steps of a model whose part on rank 1 is not in Megatron's DDP, and of one that is everywhere, with one step each
    that does not finalize the gradients: what each rank reads, in order."""
    read: list[str] = []

    def chunk(wrapped: bool) -> torch.nn.Module:
        made = torch.nn.Module.__new__(DistributedDataParallel) if wrapped else torch.nn.Linear(1, 1)
        if wrapped:
            torch.nn.Module.__init__(made)
        made.config = SimpleNamespace(finalize_model_grads_func=print)  # type: ignore[assignment]
        made.ddp_config = SimpleNamespace()  # type: ignore[assignment]
        return made

    schedule = forward_backward.repeating(lambda **_: None)
    with process_groups(), mock.patch.object(forward_backward, "read_together", lambda: read.append("read")):
        for model in (chunk(group.rank() == 0), chunk(True)):
            for finalizes in (print, print, None, print):
                model.config.finalize_model_grads_func = finalizes  # type: ignore[union-attr]
                schedule(model=model, data_iterator=None, forward_only=False)
            read.append("next")
    return read


def test_ranks_read_after_a_schedule_together_or_not_at_all() -> None:
    """Else the one that reads would wait in a collective for the one that does not."""
    assert run_ranks(2, one_rank_cannot) == [["next", "read", "read", "read", "next"]] * 2
