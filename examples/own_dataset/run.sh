#!/usr/bin/env bash
# Your own rows and your own reward (own.py has both). Arguments are settings.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD/examples/own_dataset${PYTHONPATH:+:$PYTHONPATH}"
data=runs/own_dataset_data
mkdir -p "$data"
python examples/own_dataset/own.py "$data"
exec skyrl-spec train experiment=cpu_mtp_grpo trainer.run_dir=runs/own_dataset trainer.max_training_steps=12 \
    data.train_data="[$data/train.jsonl]" data.val_data="[$data/validation.jsonl]" \
    environment.env_class=closeness environment.custom.closeness=own:Closeness "$@"
