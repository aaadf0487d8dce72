#!/usr/bin/env bash
# Evaluates or merges an adapter of shell tasks, with the server in a process of its own:
#   scripts/evaluate_os.sh [CONFIG] [ADAPTER] [MODE] [SAMPLES] [name=value ...]
# MODE: evaluate, merge or both; the merged model is written to merged_os.
set -euo pipefail
CONFIG=${1:-configs/os_interaction.yaml} ADAPTER=${2:-lora_checkpoints/epoch_10} MODE=${3:-evaluate} SAMPLES=${4:-24}
shift $(($# < 4 ? $# : 4))
source "$(dirname "$0")/server.sh"
start_server "$CONFIG" "$@"
MERGED=()
[ "$MODE" = evaluate ] || MERGED=(merged_model_path=merged_os)
"$PYTHON" evaluate.py --mode "$MODE" --config "$CONFIG" --adapter "$ADAPTER" --num_samples "$SAMPLES" \
  "server=$SERVER" "${MERGED[@]}" "$@"
