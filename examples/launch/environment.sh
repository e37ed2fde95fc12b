# The environment of a training process. Sourced by prepare.sh; what is set already is kept.
# shellcheck shell=bash

# Megatron asks for it where tensor or context parallelism runs on Hopper or older. Without those, 32 is better for
# --overlap-moe-expert-parallel-comm (docs/modes.md#overlap).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# DeepEP V2 compiles its kernels when they are first used, about 2.5 s each, and keeps them here. Its default is
# ~/.deep_ep, which may be a network drive that all hosts write to at once.
export EP_JIT_CACHE_DIR="${EP_JIT_CACHE_DIR:-/tmp/deep_ep-$(id -u)}"

# NCCL's device-side RDMA (GIN) is needed between hosts. megatron_ep_v2 turns it off by itself on one host without RDMA
# devices; MCORE_DEEPEP_V2_GIN=on or =off decides by hand, the same on every rank.

# An agent that joins a restarted job waits in vain for the first round's address where torchrun shares its store
# (pytorch/pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

# Several networks in a host: name the one for NCCL's and gloo's own connections, for example
#   export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

if [ "${FABRIC:-}" = efa ]; then
    # shellcheck source=examples/launch/efa.sh
    . "$(dirname "${BASH_SOURCE[0]}")/efa.sh"
fi
