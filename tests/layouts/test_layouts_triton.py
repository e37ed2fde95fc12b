"""The layout kernels as far as a CPU goes: equal to their references in Triton's interpreter, and compiled for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.interpreter import child, needs_triton

INTERPRET = """
import json, torch
from tests.helpers.layout_kernels import SHAPES, column_cases, differences, move_cases, slot_cases, swiglu_cases
from tests.helpers.layout_kernels import tally_cases
from megatron_ep_v2.kernels import move_triton, places_triton, swiglu_triton

# Triton's interpreter does not round to bf16 as a GPU does.
dtypes = (torch.float32, torch.float64), (torch.bfloat16, torch.float8_e4m3fn)
print(json.dumps({
    "slots": differences(slot_cases(places_triton, "cpu", many=100)),  # 6 blocks: it takes 10 ms a block
    "tally": differences(tally_cases(places_triton, "cpu")),
    "moves": differences(move_cases(move_triton, "cpu", SHAPES, *dtypes)),
    "columns": differences(column_cases(move_triton, "cpu")),
    "swiglu": differences(swiglu_cases(swiglu_triton, "cpu", (torch.float32, torch.float64), (8, 33, 2000))),
    "empty": [list(move_triton.gather(torch.empty(0, 8), torch.full((3,), -1, dtype=torch.int32)).shape),
              list(move_triton.reduce(torch.empty(0, 8), torch.full((3, 2), -1, dtype=torch.int32), None).shape)],
}))
"""


@pytest.mark.slow
@needs_triton
def test_the_kernels_equal_the_references_in_tritons_interpreter() -> None:
    found = child(INTERPRET, TRITON_INTERPRET="1")
    assert found == {"slots": [], "tally": [], "moves": [], "columns": [], "swiglu": [], "empty": [[3, 8], [3, 8]]}


OLD = """
import json
from types import SimpleNamespace
import triton.language as tl
from megatron_ep_v2.errors import UnavailableError
from megatron_ep_v2.kernels import move
from megatron_ep_v2.kernels.select import kernels_for

del tl.gather
try:
    kernels_for(SimpleNamespace(is_cuda=True), move, "layouts")
except UnavailableError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.slow
@needs_triton
def test_an_old_triton_is_refused_with_the_version_needed() -> None:
    said = child(OLD)
    assert "which has no tl.gather" in said and "triton>=3.3" in said


COMPILE = """
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton.language as tl
from megatron_ep_v2.kernels import move_triton, places_triton, swiglu_triton

def tile(columns, element_size):
    return dict(zip(("BLOCK", "num_warps"), move_triton.tile(columns, element_size), strict=True))

ROW = {"COLUMNS": 2048, **tile(2048, 2)}
GLU = {"COLUMNS": 768, "BOUNDED": True, "KIND": tl.float32, **tile(768, 2)}
KERNELS = {  # pointers, numbers, constants
    ("gather", move_triton._gather): ("*i32 *i32 *i32", 0, {"COLUMNS": 1024, **tile(1024, 4)}),
    ("reduce", move_triton._reduce): ("*bf16 *i32 *fp32 *bf16", 0,
                                      {"WEIGHTED": True, "TOPK": 8, "KIND": tl.float32, **ROW}),
    ("spread", move_triton._spread): ("*bf16 *bf16 *i32 *i32 *fp32 *bf16 *fp32", 0, {"KIND": tl.float32, **ROW}),
    ("swiglu", swiglu_triton._forward): ("*bf16 *fp32 *i32 *bf16", 0, GLU),
    ("swiglu back", swiglu_triton._backward): ("*bf16 *bf16 *fp32 *i32 *bf16 *fp32", 0, GLU),
    ("zero", swiglu_triton._zero_tail): ("*bf16 *i32", 1, {"ROWS": 8, **ROW}),
    ("gather both", move_triton._gather_with_weights): ("*i32 *i32 *i32 *fp32 *fp32 *i32", 0,
                                                        {"COLUMNS": 1024, **tile(1024, 4)}),
    ("reduce both", move_triton._reduce_with_weights): ("*bf16 *i32 *bf16 *fp32 *fp32", 0,
                                                        {"TOPK": 8, "KIND": tl.float32, **ROW}),
    ("take", move_triton._take): ("*fp32 *i32 *fp32", 1, {"BLOCK": 1024}),
    ("columns", move_triton._gather_columns): ("*i32 *i32 *i32", 2, {"SCALES": 16, "COLUMNS": 4, "PACK": True,
                                                                     "WIDTH": 4, "SLOTS": 64}),
    ("count", places_triton._count): ("*i64 *i32 *i32", 4, {"HAS_NUM_RECV": True, "EXPERTS": 256, "BLOCK": 128}),
    ("add up", places_triton._add_up): ("*i32", 1, {"CHUNK": 1024}),
    ("tally", places_triton._tally): ("*i32 *i32 *i32 *i32 *i64", 3,
                                      {"HAS_MOST": True, "HAS_LOAD": True, "EXPERTS": 256}),
    ("lay out", places_triton._lay_out): ("*i64 " + "*i32 " * 10, 6,
                                          {"HAS_NUM_RECV": True, "MASKED": False, "EXPERTS": 256, "BLOCK": 128}),
}
OTHERS = {  # the other sides of their switches
    ("reduce, plain", move_triton._reduce): ("*bf16 *i32 *i32 *bf16", 0,
                                             {"WEIGHTED": False, "TOPK": 8, "KIND": tl.float32, **ROW}),
    ("swiglu, all", swiglu_triton._forward): ("*bf16 *fp32 *bf16 *bf16", 0, {**GLU, "BOUNDED": False}),
    ("swiglu back, all", swiglu_triton._backward): ("*bf16 *bf16 *fp32 *bf16 *bf16 *fp32", 0,
                                                    {**GLU, "BOUNDED": False}),
    ("columns, plain", move_triton._gather_columns): ("*i32 *i32 *i32", 2, {"SCALES": 16, "COLUMNS": 16, "PACK": False,
                                                                       "WIDTH": 16, "SLOTS": 64}),
    ("count, all", places_triton._count): ("*i64 *i64 *i32", 4,
                                           {"HAS_NUM_RECV": False, "EXPERTS": 32, "BLOCK": 128}),
    ("lay out, masked", places_triton._lay_out): ("*i64 *i64 " + "*i32 " * 9, 6,
                                                  {"HAS_NUM_RECV": False, "MASKED": True, "EXPERTS": 32, "BLOCK": 128}),
}
found = {}
for (name, kernel), (pointers, numbers, constants) in [*KERNELS.items(), *OTHERS.items()]:
    options = {"num_warps": constants.get("num_warps", 4)}
    constants = {key: value for key, value in constants.items() if key != "num_warps"}
    kinds = [*pointers.split(), *["i32"] * numbers, *["constexpr"] * len(constants)]
    signature = dict(zip(kernel.arg_names, kinds, strict=True))
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers.split()))}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "atom" not in compiled.asm["ptx"] and ".red." not in compiled.asm["ptx"], name
    found[name] = sorted(set(re.findall(r"(?:ld|st)\\.global\\S*", compiled.asm["ptx"])))
print(json.dumps(found))
"""


@pytest.mark.slow
@needs_triton
def test_the_kernels_compile_for_gpus_and_move_rows_16_bytes_at_a_time(tmp_path: Path) -> None:
    """And no kernel has an atomic in it: what is added up, is added up in a fixed order."""
    found = child(COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 20 and "st.global.v4.b32" in found["zero"]
    for name in (
        "gather",
        "reduce",
        "reduce, plain",
        "gather both",
        "reduce both",
        "spread",
        "swiglu",
        "swiglu back",
        "swiglu, all",
        "swiglu back, all",
    ):
        assert "ld.global.v4.b32" in found[name] and "st.global.v4.b32" in found[name], found[name]
