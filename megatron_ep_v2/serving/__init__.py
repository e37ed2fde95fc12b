"""Expert parallelism for serving engines: one call before and one after the experts, without Megatron or gradients.

    pair = PrepareFinalize(group, hidden=2048, num_experts=128, num_topk=8, max_prefill_tokens=4096)

    rows = pair.prepare_prefill(x, topk_idx, topk_weights)           # exact rows, sorted by expert; waits for counts
    y = pair.finalize(experts(rows))

    rows = pair.prepare_decode(x, topk_idx, topk_weights, bucket=8)  # the most rows for 8 tokens per rank; no wait
    y = pair.finalize(experts(rows))                                 # both calls can be captured: see `DecodeGraphs`

deep_ep compiles its kernels for each capacity, and every rank must pass the same one. So decode batches use buckets,
powers of two: a few kernels, and one CUDA graph per bucket. docs/sync_free.md has more.
"""

from megatron_ep_v2.serving.graphs import DecodeGraphs
from megatron_ep_v2.serving.pair import Decode, Prefill, PrepareFinalize, bucket_of, buckets_up_to

__all__ = ["Decode", "DecodeGraphs", "Prefill", "PrepareFinalize", "bucket_of", "buckets_up_to"]
