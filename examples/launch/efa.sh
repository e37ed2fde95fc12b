# AWS EFA: sourced by environment.sh when FABRIC=efa. Collected from public reports (deepseek-ai/DeepEP#612,
# vllm-project/vllm#41183), not tried by us. Needs libfabric with EFA, aws-ofi-nccl with its GIN plugin, and gdrcopy.
# shellcheck shell=bash

export FI_PROVIDER=efa FI_EFA_USE_DEVICE_RDMA=1 FI_EFA_FORK_SAFE=1
export NCCL_NET_PLUGIN="${NCCL_NET_PLUGIN:-/opt/amazon/ofi-nccl/lib/libnccl-net-ofi.so}"
export OFI_NCCL_PROTOCOL=RDMA

# GIN by its proxy: a host thread does the network's part.
export NCCL_GIN_ENABLE=1 NCCL_GIN_TYPE=2

# DeepEP's own choice of queue pairs (129) overflowed a ring of the plugin. Later plugins take more than 2.
export MCORE_DEEPEP_V2_NUM_QPS="${MCORE_DEEPEP_V2_NUM_QPS:-2}"
