"""The table of carriers. A new carrier is its own file and one row of `CARRIERS`; everything that depends on the list
of carriers (settings, probe, pool, binding, doctor, bench, examples) iterates this table.

Imports no torch, because settings and the command line must work where it cannot be imported.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """One kind of buffer.

    Attributes:
        name: Value of the setting `buffer`.
        path: Module and class that implement `contract.Buffer`, built as `class(group, spec, settings, hosts)`.
        deep_ep_class: The class of DeepEP that it wraps, by which the probe finds it; None = needs neither DeepEP nor a
            GPU.
        generation: The generation of DeepEP that has this class, a name of `generations.GENERATIONS`; None as above.
        is_v2: Whether that is DeepEP V2.
        label: Name in reports.
        requirement: What has to be installed, for errors.
        advantage: Why `buffer=auto` takes it, for the log.
        moves_experts: It carries weights and gradients of redundant experts.
        starts_calls: It can start a dispatch or a combine and finish it later.
        fixed_sms: It is built for its SM count; else each call takes one.
        layouts: Layouts that it delivers; `layout=auto` takes the first. "sync-free": dispatches without a host wait.
        row_prefix: Goes before the layout in the names of the bench's rows; different for each carrier.
    """

    name: str
    path: tuple[str, str]
    deep_ep_class: str | None
    generation: str | None = None
    is_v2: bool = False
    label: str
    requirement: str
    advantage: str
    moves_experts: bool = False
    starts_calls: bool = False
    fixed_sms: bool = False
    layouts: tuple[str, ...]
    row_prefix: str

    @property
    def needs_cuda(self) -> bool:
        return self.deep_ep_class is not None


# In the order in which `buffer=auto` takes them on GPUs. Without a GPU it takes the reference.
CARRIERS: dict[str, Carrier] = {
    carrier.name: carrier
    for carrier in (
        Carrier(
            name="ep",
            path=("megatron_ep_v2.buffers.ep", "EPBuffer"),
            deep_ep_class="EPBuffer",
            generation="2.5",
            is_v2=True,
            label="EPBuffer",
            requirement="DeepEP 2.5 with EPBuffer",
            advantage="the newest generation is preferred",
            moves_experts=True,
            starts_calls=True,
            layouts=("expanded", "compact", "sync-free"),
            row_prefix="ep-",
        ),
        Carrier(
            name="elastic",
            path=("megatron_ep_v2.buffers.elastic", "ElasticBuffer"),
            deep_ep_class="ElasticBuffer",
            generation="2.1",
            is_v2=True,
            label="ElasticBuffer",
            requirement="DeepEP 2.1 with ElasticBuffer",
            advantage="V2 is preferred",
            layouts=("expanded", "compact", "sync-free"),
            row_prefix="",
        ),
        Carrier(
            name="legacy",
            path=("megatron_ep_v2.buffers.legacy", "LegacyBuffer"),
            deep_ep_class="Buffer",
            generation="legacy",
            label="legacy Buffer",
            requirement="deep_ep with Buffer",
            advantage="called directly, without Megatron",
            fixed_sms=True,
            layouts=("compact",),
            row_prefix="legacy-",
        ),
        Carrier(
            name="reference",
            path=("megatron_ep_v2.buffers.reference", "ReferenceBuffer"),
            deep_ep_class=None,
            label="reference buffer",
            requirement="torch.distributed",
            advantage="needs no GPU",
            moves_experts=True,
            starts_calls=True,
            layouts=("expanded", "compact", "sync-free"),
            row_prefix="reference-",
        ),
    )
}

REFERENCE = "reference"
MEGATRONS_OWN = "legacy"  # the carrier that Megatron's own dispatcher calls by itself
DEFAULT_V2 = "elastic"  # the carrier to install where there is none: its wheels need no other NCCL than torch's
