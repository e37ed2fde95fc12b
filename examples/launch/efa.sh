# AWS EFA: sourced by environment.sh when FABRIC=efa; what is set already is kept. From public reports, not run by this
# project: docs/efa.md has the source of each line. For DeepEP 2.1; needs libfabric with EFA, aws-ofi-nccl 1.21 or newer
# and GDRCopy 2.5 or newer.
# shellcheck shell=bash

export FI_PROVIDER="${FI_PROVIDER:-efa}"
export FI_EFA_USE_DEVICE_RDMA="${FI_EFA_USE_DEVICE_RDMA:-1}" FI_EFA_FORK_SAFE="${FI_EFA_FORK_SAFE:-1}"
export NCCL_NET_PLUGIN="${NCCL_NET_PLUGIN:-/opt/amazon/ofi-nccl/lib/libnccl-net-ofi.so}"
export OFI_NCCL_PROTOCOL="${OFI_NCCL_PROTOCOL:-RDMA}"

# GIN by its proxy, a host thread, is what DeepEP's wheels can use. 5 is EFA-GDA, which needs Amazon's fork of DeepEP.
export NCCL_GIN_ENABLE="${NCCL_GIN_ENABLE:-1}" NCCL_GIN_TYPE="${NCCL_GIN_TYPE:-2}"

# NCCL's own collectives over GIN need signals that EFA-GDA has not: with them no buffer can be built.
export NCCL_SYM_GIN_KERNELS_ENABLE="${NCCL_SYM_GIN_KERNELS_ENABLE:-0}"

# DeepEP would take 129 queue pairs: plugins before 1.20 fail with them (there: 2), and Amazon's fork refuses more than 17.
export MCORE_DEEPEP_V2_NUM_QPS="${MCORE_DEEPEP_V2_NUM_QPS:-12}"

# DeepEP asks ibstat for the speed of the network, and divides by 0 without an answer. Wins over Megatron's own flag.
export MCORE_DEEPEP_V2_NUM_SMS="${MCORE_DEEPEP_V2_NUM_SMS:-24}"
