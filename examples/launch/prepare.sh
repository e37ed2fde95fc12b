# Sourced by the launchers: prepare.sh CONFIG FLAGS... sets the environment, runs the doctor on this host, and puts the
# command after torchrun's own arguments into TRAINING. A doctor that finds a fault ends the launcher.
#
#   CONFIG         a file of examples/configs without .sh
#   FLAGS          of pretrain_gpt.py; they come last and override the config
#   MEGATRON_LM    the folder of pretrain_gpt.py
#   CHECKPOINTS    a folder that every host sees: saved to, and resumed from when the job is started again
# shellcheck shell=bash disable=SC2034

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
config="$launch/../configs/${1:-}.sh"
if [ ! -f "$config" ] || [ ! -f "${MEGATRON_LM:-}/pretrain_gpt.py" ]; then
    echo "usage: MEGATRON_LM=folder-of-pretrain_gpt.py $0 CONFIG [FLAGS...]" >&2
    echo "  CONFIG is one of: $(cd "$launch/../configs" && echo ./*.sh | sed 's#\./##g; s#\.sh##g')" >&2
    exit 2
fi
shift

# shellcheck source=examples/launch/environment.sh
. "$launch/environment.sh"
# shellcheck source=examples/configs/qwen3_30b_a3b.sh
. "$config"
if [ -n "${CHECKPOINTS:-}" ]; then FLAGS+=(--save "$CHECKPOINTS" --load "$CHECKPOINTS"); fi

python -m megatron_ep_v2 doctor
TRAINING=(-m megatron_ep_v2 run "$MEGATRON_LM/pretrain_gpt.py" "${FLAGS[@]}" "$@")
