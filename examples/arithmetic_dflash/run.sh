#!/usr/bin/env bash
# GRPO with a co-trained DFlash draft. Arguments are settings.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
exec skyrl-spec train experiment=cpu_dflash_grpo "$@"
