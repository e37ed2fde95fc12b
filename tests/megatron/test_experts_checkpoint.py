"""Distributed checkpoints of whole models with experts of every kind: written by one, continued by another, through
Megatron's own saving and loading, with weights and the optimizer's state, at several expert-parallel sizes."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.transformer.moe import experts as megatron_experts
from torch.distributed.checkpoint import FileSystemReader

import megatron_ep_v2
from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.megatron.experts import Experts
from tests.helpers.compare import worst
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import process_groups
from tests.helpers.megatron_training import Job, Setup, on_cpu
from tests.helpers.shapes import Split

pytestmark = pytest.mark.slow

KINDS = ("megatron", "grouped", "sequential")
SIZES = (1, 2, 4)
# Written at this expert-parallel size by this kind, read at that size by that kind. Grouped and sequential experts have
# the same parameters. By default steps between the sizes and between the kinds; with
# MCORE_DEEPEP_V2_TEST_CHECKPOINTS=all every one of the 81 in each format.
PAIRS = [((2, "megatron"), (4, "grouped")), ((2, "grouped"), (4, "megatron")), ((2, "sequential"), (2, "grouped"))]
PAIRS += [((1, "grouped"), (2, "grouped"))]
MORE = [((2, "grouped"), (4, "sequential")), ((2, "sequential"), (4, "megatron")), ((2, "megatron"), (1, "grouped"))]
MORE += [((1, "megatron"), (1, "grouped")), ((1, "grouped"), (1, "megatron")), ((4, "grouped"), (2, "grouped"))]
MORE += [((4, "megatron"), (2, "grouped"))]
FORMATS = {
    "distributed": (Setup(), PAIRS + MORE),
    "distributed, an expert a key": (Setup(single=True), PAIRS[:2]),
    "not distributed": (Setup(distributed=False), PAIRS),
}
if os.environ.get("MCORE_DEEPEP_V2_TEST_CHECKPOINTS") == "all":
    every = list(itertools.product(SIZES, KINDS))
    FORMATS = {form: (setup, list(itertools.product(every, every))) for form, (setup, _) in FORMATS.items()}


class Folders:
    """One for each checkpoint of a test, the same on every rank; gone at its end."""

    def __enter__(self) -> Folders:
        box = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box)
        assert box[0] is not None
        self.root = Path(box[0])
        return self

    def __exit__(self, *_: Any) -> None:
        dist.barrier()
        shutil.rmtree(self.root, ignore_errors=True)

    def of(self, *name: Any) -> Path:
        return self.root / "-".join(map(str, name))


def by_size(jobs: set[Any]) -> Iterator[list[Any]]:
    """Those (format, (size, kind)) of each expert-parallel size, in Megatron's process groups for it."""
    for size in SIZES:
        if found := sorted(job for job in jobs if job[1][0] == size):
            with process_groups(Split(1, size)):
                yield found


def resumed(group: Any) -> dict[str, dict[Any, tuple[str, float]]]:
    """Format -> pair -> "goes on", or the error of Megatron's optimizer, where weights alone are then loaded; and the
    largest difference of loss and norm (of the loss alone) in the steps after the load to a job that was not stopped.
    """
    found: dict[str, dict[Any, tuple[str, float]]] = {form: {} for form in FORMATS}
    wanted: dict[str, list[tuple[float, float]]] = {}
    with on_cpu(), Folders() as folders:
        for writers in by_size({(form, writer) for form, (_, pairs) in FORMATS.items() for writer, _ in pairs}):
            for form, writer in writers:
                job = Job(replace(FORMATS[form][0], experts=writer[1]))
                job.step()
                job.save(folders.of(form, *writer))
                if form not in wanted:
                    wanted[form] = [job.step() for _ in range(2)]
        for readers in by_size({(form, reader) for form, (_, pairs) in FORMATS.items() for _, reader in pairs}):
            for form, (setup, pairs) in FORMATS.items():
                for writer, reader in [pair for pair in pairs if (form, pair[1]) in readers]:
                    job, folder = Job(replace(setup, experts=reader[1])), folders.of(form, *writer)
                    try:
                        job.load(folder)
                    except (KeyError, RuntimeError, ValueError) as error:
                        job = Job(replace(setup, experts=reader[1]))
                        job.load_weights(folder, steps=1)
                        said, difference = f"{type(error).__name__}: {error}", abs(job.step()[0] - wanted[form][0][0])
                    else:
                        steps = torch.tensor([job.step() for _ in wanted[form]])
                        said, difference = "goes on", (steps - torch.tensor(wanted[form])).abs().max().item()
                    found[form][writer, reader] = said, difference
    return found


@functools.cache
def all_resumed() -> list[dict[str, dict[Any, tuple[str, float]]]]:
    """Of all formats in one run: their process groups take as long as their steps."""
    return run_ranks(4, resumed)


@pytest.mark.parametrize("form", FORMATS)
def test_training_goes_on_with_any_kind_and_size(form: str) -> None:
    """Between expert-parallel size 1 and others, Megatron cannot match an optimizer's state, whatever the experts: it
    raises, and weights alone can be loaded."""
    for by_form in all_resumed():
        assert by_form[form].keys() == set(FORMATS[form][1])
        for (writer, reader), (outcome, difference) in by_form[form].items():
            crosses_one = (writer[0] == 1) != (reader[0] == 1)
            assert (outcome == "goes on") is not crosses_one, f"{writer} to {reader}: {outcome}"
            assert difference < 1e-5, f"{writer} to {reader}: {difference:.1e}"


def contents(group: Any) -> list[str]:
    """What differs between the keys, shapes and dtypes in checkpoints of Megatron's experts and of ours."""
    wrong = []
    with on_cpu(), Folders() as folders, process_groups(Split(1, 2)):
        for form, (setup, _) in FORMATS.items():
            written = []
            for kind in ("megatron", "grouped"):
                job = Job(replace(setup, experts=kind))
                job.step()
                job.save(folders.of(form, kind))
                keys = FileSystemReader(str(folders.of(form, kind))).read_metadata().state_dict_metadata
                written.append(
                    {
                        key: (value.size, value.properties.dtype) if hasattr(value, "size") else type(value)
                        for key, value in keys.items()
                    }
                )
            assert len(written[0]) > 20 and any("_extra_state" in key for key in written[0])
            assert any("exp_avg_sq" in key and "experts" in key for key in written[0])
            differing = {key for key in written[0] | written[1] if written[0].get(key) != written[1].get(key)}
            wrong += [f"{form}: {key}" for key in sorted(differing)]
    return wrong


def test_a_checkpoint_holds_what_one_of_megatrons_experts_holds() -> None:
    assert run_ranks(4, contents) == [[]] * 4


def save_and_train(group: Any) -> float:
    """Largest difference of loss and norm between the step that was taken while a checkpoint was written, and the same
    step of Megatron's experts from that checkpoint."""
    with on_cpu(), Folders() as folders, process_groups(Split(1, 2)):
        job = Job(Setup(experts="grouped"))
        job.step()
        wanted = job.save_during_training(folders.of("during"))
        job = Job(Setup())
        job.load(folders.of("during"))
        return worst(abs(mine - other) for mine, other in zip(job.step(), wanted, strict=True))


def test_a_checkpoint_that_is_written_during_training() -> None:
    assert worst(run_ranks(4, save_and_train)) < 1e-5


def raw(group: Any) -> dict[str, str]:
    """dp_reshardable, Megatron's default, keeps the optimizer's buffers by number: the same kind goes on, another is
    refused, both ways."""
    found = {}
    with on_cpu(), Folders() as folders, process_groups(Split(1, 2)):
        setup = Setup(sharding="dp_reshardable")
        wanted = {}
        for kind in KINDS:
            job = Job(replace(setup, experts=kind))
            job.step()
            job.save(folders.of(kind))
            wanted[kind] = job.step()
        for writer, reader in (*((kind, kind) for kind in KINDS), *itertools.permutations(KINDS, 2)):
            job = Job(replace(setup, experts=reader))
            try:
                job.load(folders.of(writer))
                same = worst(abs(a - b) for a, b in zip(job.step(), wanted[writer], strict=True)) < 1e-5
                found[f"{writer} to {reader}"] = "goes on" if same else "WRONG"
            except SettingsError as error:
                found[f"{writer} to {reader}"] = str(error)
        megatron_ep_v2.uninstall()
        job = Job(replace(setup, experts="grouped"))
        megatron_ep_v2.uninstall()  # a spec with these experts, and no wrapper that distinguishes buffers
        with pytest.raises(SettingsError, match="saved by number"):
            job.model.sharded_state_dict(metadata=job.metadata())
        job.setup = replace(job.setup, sharding="fully_reshardable")
        job.model.sharded_state_dict(metadata=job.metadata())
    return found


def test_buffers_by_number_are_refused_between_kinds() -> None:
    for found in run_ranks(4, raw):
        assert len(found) == 9
        for pair, outcome in found.items():
            writer, _, reader = pair.partition(" to ")
            if (writer == "megatron") == (reader == "megatron"):
                assert outcome == "goes on", pair
            else:
                theirs = "Megatron's own experts" if writer == "megatron" else "stacked experts"
                assert f"saved with {theirs}" in outcome and "--dist-ckpt-optim-fully-reshardable" in outcome, outcome


def unmarked(group: Any) -> list[float]:
    """Largest difference of a weight to an uninterrupted job, two steps after a load of Megatron's buffers: into
    Megatron's experts, and into ours without the mark by which their buffers get other keys."""
    with on_cpu(), Folders() as folders, process_groups(Split(1, 2)):
        setup = Setup(sharding="dp_reshardable")
        job = Job(setup)
        job.step()
        job.save(folders.of("megatron"))
        for _ in range(2):
            job.step()
        wanted, found = job.weights(), []
        for kind in ("megatron", "grouped"):
            job = Job(replace(setup, experts=kind))
            for parameter in job.model.parameters():
                parameter.__dict__.pop("stacked_experts", None)
            job.load(folders.of("megatron"))
            for _ in range(2):
                job.step()
            mine = job.weights()
            found.append(max((mine[name] - weight).abs().max().item() for name, weight in wanted.items()))
        return found


def test_without_the_refusal_experts_would_be_mixed_up() -> None:
    # 0.16.1 puts weights and Adam's moments into the wrong experts, 0.19.2 the moments alone. Each step, those move a
    # weight by about the learning rate, 1e-3; two steps in the wrong direction add up to more than that.
    for same, other in run_ranks(4, unmarked):
        assert same < 1e-5 and other > 1e-3


def whole_buffers(group: Any) -> list[str]:
    """dp_zero_gather_scatter, buffers in one piece: an old format that Megatron still writes and reads."""
    found = []
    with on_cpu(), process_groups(Split(1, 2)):
        setup = Setup(sharding="dp_zero_gather_scatter")
        for kind in ("megatron", "grouped"):
            job = Job(replace(setup, experts=kind))
            job.step()
            try:
                job.state()
                found.append("saved")
            except SettingsError as error:
                found.append(str(error))
        reshardable = job.metadata() | {"distrib_optim_sharding_type": "fully_reshardable"}
        model = job.model.sharded_state_dict(metadata=reshardable)
        with pytest.raises(SettingsError, match="whole buffers"):  # the format by its old argument
            job.optimizer.sharded_state_dict({"model": model}, metadata=job.metadata())
    return found


def test_buffers_in_one_piece_are_refused() -> None:
    for theirs, ours in run_ranks(4, whole_buffers):
        assert theirs == "saved" and "dp_zero_gather_scatter" in ours and "--dist-ckpt-optim-fully-reshardable" in ours


def legacy(group: Any) -> float:
    """Weights of Megatron's GroupedMLP (before 0.17), which keeps them transposed, read by ours."""
    with on_cpu(), Folders() as folders, process_groups(Split(1, 2)):
        job = Job(Setup(experts="grouped"))
        ours = next(module for module in job.model.modules() if isinstance(module, Experts))
        groups = mock.Mock(
            ep=parallel_state.get_expert_model_parallel_group(),
            expt_tp=parallel_state.get_expert_tensor_parallel_group(),
            expt_dp=parallel_state.get_expert_data_parallel_group(),
        )
        with mock.patch.object(megatron_experts.gg, "assert_grouped_gemm_is_available", lambda: None):
            theirs = megatron_experts.GroupedMLP(ours.num_local_experts, ours.config, pg_collection=groups)
        local, hidden, ffn = ours.num_local_experts, ours.config.hidden_size, ours.config.moe_ffn_hidden_size
        fc1, fc2 = torch.randn(local, 2 * ffn, hidden), torch.randn(local, hidden, ffn)
        for tensor in (fc1, fc2):  # replicas hold the same
            dist.broadcast(tensor, dist.get_global_rank(groups.expt_dp, 0), group=groups.expt_dp)
        with torch.no_grad():
            theirs.weight1.view(local, hidden, -1).copy_(fc1.transpose(1, 2))
            theirs.weight2.view(local, -1, hidden).copy_(fc2.transpose(1, 2))
        folder = folders.of("legacy")
        if dist.get_rank() == 0:
            folder.mkdir()
        dist.barrier()
        dist_checkpointing.save(theirs.sharded_state_dict("mlp.experts."), str(folder))
        state = dist_checkpointing.load(ours.sharded_state_dict("mlp.experts."), str(folder))
        ours.load_state_dict({name.removeprefix("mlp.experts."): value for name, value in state.items()})
        return max((ours.linear_fc1.weight - fc1).abs().max().item(), (ours.linear_fc2.weight - fc2).abs().max().item())


@pytest.mark.skipif(not hasattr(megatron_experts, "GroupedMLP"), reason="this megatron-core has no GroupedMLP")
def test_weights_of_megatrons_legacy_grouped_experts() -> None:
    assert run_ranks(4, legacy) == [0.0] * 4
