# Qwen3-235B-A22B for Megatron-LM's pretrain_gpt.py (megatron-core 0.16.1 to 0.19.2): flags in the array FLAGS.
# One replica is 128 GPUs (TP4 x PP16 x CP2; EP8 inside the TP x CP x DP ranks of a stage). 94 layers on 16 stages: the
# embedding and the loss count as one layer each. Data and checkpoints are not in here: give them as further flags of
# the launcher, which also override these.
# Megatron's fused weight gradients need APEX; where it is not installed, add --no-gradient-accumulation-fusion.
# MCORE_DEEPEP_V2_EXPERTS=grouped is no faster at this size on 8 expert-parallel ranks of H200 (docs/experts.md).
# shellcheck shell=bash disable=SC2034

FLAGS=(
    # model: 235 billion parameters, 22 billion of them active per token
    --num-layers 94
    --hidden-size 4096
    --ffn-hidden-size 12288
    --num-attention-heads 64
    --group-query-attention --num-query-groups 4
    --kv-channels 128
    --qk-layernorm
    --swiglu
    --disable-bias-linear
    --normalization RMSNorm --norm-epsilon 1e-6
    --position-embedding-type rope --rotary-base 1000000
    --seq-length 4096 --max-position-embeddings 40960
    --untie-embeddings-and-output-weights
    --attention-dropout 0.0 --hidden-dropout 0.0
    --init-method-std 0.02
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model Qwen/Qwen3-235B-A22B

    # experts
    --num-experts 128
    --moe-ffn-hidden-size 1536
    --moe-router-topk 8
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-3
    --moe-grouped-gemm --moe-permute-fusion

    # the flex dispatcher, which megatron_ep_v2 runs on DeepEP V2; probabilities travel in fp32
    --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep
    --moe-router-dtype fp32

    # parallelism
    --tensor-model-parallel-size 4 --sequence-parallel
    --pipeline-model-parallel-size 16
    --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split
    --context-parallel-size 2
    --expert-model-parallel-size 8 --expert-tensor-parallel-size 1
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather

    # recipe
    --bf16
    --micro-batch-size 1 --global-batch-size 32
    --train-iters 300000
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 500
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --log-interval 10 --eval-interval 1000 --eval-iters 10

    # checkpoints: written and read without a common parent process, resumed on other layouts too
    --ckpt-format torch_dist --save-interval 500
)
