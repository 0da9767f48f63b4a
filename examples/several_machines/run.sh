#!/usr/bin/env bash
# MiMo-7B on two machines of 8 GPUs: 8 GPUs train (TP 4 x DP 2), 8 generate. RAY_ADDRESS names the cluster.
# With --cpu as first argument: a tiny model on two Ray nodes of this machine, which the script starts and ends.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"

if [ "${1:-}" != --cpu ]; then
    : "${RAY_ADDRESS:?start a cluster (see README.md) and set RAY_ADDRESS=FIRST:6379, or give --cpu}"
    exec skyrl-spec train experiment=mimo_7b_dapo_8gpu \
        trainer.placement.policy_num_nodes=2 trainer.placement.policy_num_gpus_per_node=4 \
        generator.inference_engine.num_engines=8 trainer.run_dir="${RUN_DIR:-runs/mimo_7b_two_nodes}" "$@"
fi
shift

wait_for() {
    until grep -q "Ray runtime started" "$folder/$1"; do
        kill -0 "$2" 2>/dev/null || { cat "$folder/$1"; exit 1; }
        sleep 0.5
    done
}

# Ray's sockets need a short path.
folder=$(mktemp -d /tmp/skyrl-XXXX)
port=${PORT:-6399}
# Nobody else joins it, so it needs no token.
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=disabled
ray start --head --port="$port" --num-cpus=1 --include-dashboard=false --temp-dir="$folder" --block >"$folder/first" 2>&1 &
first=$!
second=
trap 'kill $second $first 2>/dev/null || true; wait; rm -rf "$folder"' EXIT
wait_for first $first
ray start --address="127.0.0.1:$port" --num-cpus=1 --block >"$folder/second" 2>&1 &
second=$!
wait_for second $second

# A stage of the model and an engine on each node.
RAY_ADDRESS="127.0.0.1:$port" skyrl-spec train experiment=cpu_dflash_grpo \
    trainer.placement.policy_num_nodes=2 trainer.placement.policy_num_gpus_per_node=1 \
    trainer.policy.megatron_config.pipeline_model_parallel_size=2 \
    generator.inference_engine.num_engines=2 trainer.run_dir="${RUN_DIR:-runs/two_nodes}" "$@"
