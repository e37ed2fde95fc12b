#!/usr/bin/env bash
# Pretrain on the GPUs of one host:
#   MEGATRON_LM=~/Megatron-LM examples/launch/torchrun_one_node.sh qwen3_30b_a3b --mock-data
set -euo pipefail
# shellcheck source=examples/launch/prepare.sh
. "$(dirname "$0")/prepare.sh"
exec torchrun --standalone --nproc-per-node "${GPUS_PER_NODE:-8}" "${TRAINING[@]}"
