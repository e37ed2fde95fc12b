"""What the rows of whole steps say: a table, the curve over SM counts, and the settings to copy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from megatron_ep_v2.bench.report import aligned, or_dash, problems
from megatron_ep_v2.bench.rows import Row
from megatron_ep_v2.settings import variable

_BAR = 40  # characters of the longest bar
_EQUAL = 0.01  # steps that differ by less are called equal


def step_table(rows: Sequence[Row]) -> str:
    """Common facts, a line for each measured variant, and what could not be measured, with why."""
    first = rows[0]
    busiest = ""
    if first["busiest_expert_load"] is not None:
        busiest = f", {first['routing']} routing: busiest expert {first['busiest_expert_load']:.2f} x the mean, "
        busiest += f"busiest rank {first['busiest_rank_load']:.2f} x"
    text = [
        f"{first['shape']}: whole training step, {first['layers']} layers, hidden {first['hidden']}, "
        f"top-{first['topk']} of {first['experts']} experts of width {first['expert_ffn']}, "
        + (f"shared experts of width {first['shared_expert_ffn']}, " if first["shared_expert_ffn"] else "")
        + f"{first['dtype']}",
        f"{first['ranks']} ranks, {first['micro_batches']} micro-batch(es) of {first['tokens_per_rank']} tokens a rank"
        f"{busiest}" + ("" if first["optimizer"] else ", without the optimizer's update"),
        f"floating-point operations: {first['flops']}",
    ]
    columns = {
        "variant": lambda row: row["variant"],
        "experts": lambda row: row["expert_backend"],
        "SMs": lambda row: or_dash(row["num_sms"] or None, "d"),
        "step ms": lambda row: f"{row['step_ms']:.1f}",
        "p20": lambda row: f"{row['step_p20_ms']:.1f}",
        "p80": lambda row: f"{row['step_p80_ms']:.1f}",
        "/alltoall": lambda row: or_dash(row["ratio_to_alltoall"], ".3f"),
        "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
        "TFLOP/s a rank": lambda row: f"{row['tflops_per_rank']:.4g}",
        "dispatch %": lambda row: or_dash(row["dispatch_percent"], ".1f"),
        "combine %": lambda row: or_dash(row["combine_percent"], ".1f"),
        "GPU busy %": lambda row: or_dash(row["gpu_busy_percent"], ".0f"),
        "idle %": lambda row: or_dash(row["gpu_idle_percent"], ".0f"),
        "exposed %": lambda row: or_dash(row["exposed_percent"], ".1f"),
        "peak MiB": lambda row: or_dash(row["peak_memory_mib"], ".0f"),
        "": lambda row: "noisy" if row["noise"] else "",
    }
    text += aligned(columns, [row for row in rows if "step_ms" in row])
    return "\n".join(text + problems(_without_time(rows)) + what_experts_give(rows) + what_bounds(rows))


def what_bounds(rows: Sequence[Row]) -> list[str]:
    """What the GPU does in the shortest step, and the kernels that take most of it; nothing on a CPU."""
    traced = [row for row in rows if row.get("longest_kernels_ms")]
    if not traced:
        return []
    best = min(traced, key=lambda row: row["step_ms"])
    longest = ", ".join(f"{time:.1f} ms {_short(name)}" for name, time in best["longest_kernels_ms"].items())
    return [
        f"{_with_experts(best)}: the GPU computes for {best['gpu_busy_percent']:.0f} % of the step; in a traced one it "
        f"has {best['launches']} launches and is idle for {best['gpu_idle_percent']:.0f} %",
        f"  longest: {longest}",
    ]


def _short(kernel: str) -> str:
    """A kernel's name without its return type, namespaces and template arguments. One that the profiler has left
    mangled, as CUTLASS' long ones, keeps its namespaces."""
    if kernel.startswith("_ZN"):
        return "::".join(_parts(kernel.removeprefix("_ZN")))
    name = kernel.replace("(anonymous namespace)::", "").split("<")[0].split("(")[0]
    return name.split()[-1].split("::")[-1]


def _parts(mangled: str) -> Iterator[str]:
    """The parts of a nested name in the Itanium C++ ABI, each of which follows its length; those before templates."""
    while length := re.match(r"\d+", mangled):
        end = length.end() + int(length[0])
        yield mangled[length.end() : end]
        mangled = mangled[end:]


def what_experts_give(rows: Sequence[Row]) -> list[str]:
    """A line for each of this package's kinds of experts: its best row next to the best with Megatron's own."""
    timed = sorted((row for row in rows if "step_ms" in row and not row["waits"]), key=lambda row: row["step_ms"])
    megatron = [row for row in timed if row["expert_backend"].startswith("megatron")]
    ours = dict.fromkeys(row["expert_backend"] for row in rows if not row["expert_backend"].startswith("megatron"))
    lines = []
    for kind in ours:
        best = next((row for row in timed if row["expert_backend"] == kind), None)
        if not best or not megatron:
            continue
        theirs, gain = megatron[0], megatron[0]["step_ms"] / best["step_ms"]
        if gain < 1 - _EQUAL:
            line = f"{kind} experts: Megatron's own are faster here and should be kept, {1 / gain:.2f} x the tokens/s "
            line += f"({_with_experts(theirs)}; {_name(best)})"
        else:
            line = (
                f"{kind} experts, {_name(best)}: {gain:.2f} x the tokens/s of Megatron's best ({_with_experts(theirs)})"
            )
            stock = next((row for row in megatron if not row["layout"]), theirs)
            if stock is not theirs:
                gain = stock["step_ms"] / best["step_ms"]
                line += f", {gain:.2f} x with Megatron's dispatchers ({_with_experts(stock)})"
        lines.append(line + ("; noisy rows" if best["noise"] or theirs["noise"] else ""))
    return lines


def advice(rows: Sequence[Row]) -> str:
    """The curve of this package's rows, a bar each, and the settings of the best: of the shortest median step. Rows
    with calls that wait where training starts them are for comparison: no setting gives them.

    Args:
        rows: Those with a `layout` are this package's.
    """
    timed = sorted(
        (row for row in rows if "step_ms" in row and row["layout"]),
        key=lambda row: (row["variant"], row["expert_backend"], row["num_sms"] or 0),
    )
    to_have = [row for row in timed if not row["waits"]]
    if not to_have:
        return "nothing could be measured, so there is nothing to advise"
    longest = max(row["step_ms"] for row in timed)
    one_kind = len({row["expert_backend"] for row in timed}) == 1
    names = {id(row): row["variant"] if one_kind else _with_experts(row, sms=False) for row in timed}
    width = max(map(len, names.values()))
    text = ["step by SM count, ms:"]
    for row in timed:
        bar = "#" * max(1, round(_BAR * row["step_ms"] / longest))
        text.append(
            f"  {names[id(row)]:<{width}}  {or_dash(row['num_sms'] or None, 'd'):>4}  {row['step_ms']:9.2f}  {bar}"
        )
    best = min(to_have, key=lambda row: row["step_ms"])
    equal = [row for row in to_have if row is not best and row["step_ms"] <= best["step_ms"] * (1 + _EQUAL)]
    name = _name if one_kind else _with_experts
    text.append(f"best: {name(best)}, {best['step_ms']:.2f} ms a step" + (" (a noisy row)" if best["noise"] else ""))
    if equal:
        text.append(f"within {_EQUAL:.0%} of it: " + "; ".join(name(row) for row in equal))
    if best["num_sms"]:
        text.append(f"export {variable('num_sms')}={best['num_sms']}")
    text.append(f"export {variable('layout')}={best['layout']}")
    if not best["expert_backend"].startswith("megatron"):
        text.append(f"export {variable('experts')}={best['expert_backend']}")
    if "+fused-permute" in best["variant"]:
        text.append("and Megatron's --moe-permute-fusion")
    if best["overlap"]:
        text.append(
            "and Megatron's --moe-shared-expert-overlap (measured with "
            f"CUDA_DEVICE_MAX_CONNECTIONS={best['max_connections']})"
        )
    return "\n".join(text)


def _name(row: Row) -> str:
    return row["variant"] + (f", {row['num_sms']} SMs" if row["num_sms"] else "")


def _with_experts(row: Row, sms: bool = True) -> str:
    return (_name(row) if sms else row["variant"]) + f", {row['expert_backend']} experts"


def _without_time(rows: Sequence[Row]) -> list[Row]:
    """Rows without a time, named for `problems`: once what is so with all dispatchers, or with all experts."""

    def same(rows: Sequence[Row]) -> bool:
        return {row["status"] for row in rows} == {"unavailable"} and len({row["reason"] for row in rows}) == 1

    def each(field: str, rows: Sequence[Row]) -> list[list[Row]]:
        return [[row for row in rows if row[field] == value] for value in dict.fromkeys(row[field] for row in rows)]

    kinds = each("expert_backend", rows)
    missing = [of_kind for of_kind in kinds if same(of_kind)] if len(kinds) > 1 else []
    if len(missing) == len(kinds):
        missing = []  # it is not the experts
    found = [of_kind[0] | {"variant": f"{of_kind[0]['expert_backend']} experts"} for of_kind in missing]
    rest = [row for of_kind in kinds if of_kind not in missing for row in of_kind]
    for of_variant in each("variant", rest):
        if same(of_variant):
            found.append(of_variant[0])
        else:
            found += [row | {"variant": _with_experts(row)} for row in of_variant if row["status"] != "ok"]
    return found
