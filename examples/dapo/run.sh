#!/usr/bin/env bash
# DAPO: clip-higher, token-mean loss, dynamic sampling, soft overlong punishment. Arguments are settings.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
exec skyrl-spec train experiment=cpu_mtp_dapo "$@"
