#!/usr/bin/env bash
# Run this on the first of two machines of 8 GPUs: 8 GPUs train (TP 4 x DP 2), 8 generate. RAY_ADDRESS names the cluster.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
: "${RAY_ADDRESS:?start a cluster (see README.md) and set RAY_ADDRESS=FIRST:6379}"
exec skyrl-spec train experiment=mimo_7b_dapo_8gpu \
    trainer.placement.policy_num_nodes=2 trainer.placement.policy_num_gpus_per_node=4 \
    generator.inference_engine.num_engines=8 trainer.run_dir="${RUN_DIR:-runs/mimo_7b_two_nodes}" "$@"
