#!/usr/bin/env bash
# Pretrain on several hosts; run this on each of them, with the same arguments and variables:
#   NNODES=2 FIRST_HOST=node1 MEGATRON_LM=~/Megatron-LM CHECKPOINTS=/shared/qwen3 \
#       examples/launch/torchrun_nodes.sh qwen3_30b_a3b --mock-data
# FIRST_HOST is the name of one of them (its address only where its own name leads there). When another one dies, run
# this script again in its place: then all start again from the last checkpoint. When FIRST_HOST dies, run it on all.
set -euo pipefail
# shellcheck source=examples/launch/prepare.sh
. "$(dirname "$0")/prepare.sh"
: "${NNODES:?how many hosts}" "${FIRST_HOST:?a host that all of them can reach}"
exec torchrun --nnodes "$NNODES" --nproc-per-node "${GPUS_PER_NODE:-8}" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$FIRST_HOST:${PORT:-29400}" --rdzv-id "${JOB_ID:-pretrain}" "${TRAINING[@]}"
