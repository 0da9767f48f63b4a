#!/usr/bin/env bash
# Exports a run, serves policy and draft with vLLM, and asks it two sums: examples/serve_bundle/run.sh [RUN] [PORT]
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
run=${1:-runs/cpu_mtp_grpo} port=${2:-8000}
bundle=$(mktemp -d)/bundle
server=
trap '[ -z "$server" ] || { kill "$server" && wait "$server" || true; } 2>/dev/null; rm -rf "$(dirname "$bundle")"' EXIT

python examples/serve_bundle/ask.py --free "http://127.0.0.1:$port"
skyrl-spec export checkpoint="$run" out="$bundle"
cat "$bundle/README.md"
# The bundle's README has a command for each vLLM package. This is the one for the installed package.
command=$(python -c 'import sys; from skyrl_spec.checkpoint.serving import command_here as here
print(next(l for l in open(sys.argv[1]) if l.startswith(here().split(" --")[0])))' "$bundle/README.md")
(cd "$bundle" && eval "exec $command --port $port" >"$bundle/server.log" 2>&1) &
server=$!
python examples/serve_bundle/ask.py --pid "$server" "http://127.0.0.1:$port" "7-2+9=" "3+8-4+6=" || { tail -n 20 "$bundle/server.log" >&2; exit 1; }
