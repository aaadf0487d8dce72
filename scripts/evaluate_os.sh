#!/usr/bin/env bash
# Evaluates or merges an adapter of shell tasks, with the server in a process of its own:
#   scripts/evaluate_os.sh [CONFIG] [ADAPTER] [MODE] [SAMPLES] [name=value ...]
# MODE: evaluate, merge or both, which evaluates base, adapter and merged model; that is written to merged_os. Paths in name=value, unlike CONFIG and
# ADAPTER, are seen from the repository's folder.
set -euo pipefail
source "$(dirname "$0")/server.sh"
CONFIG=$(realpath -m -- "${1:-$ROOT/configs/os_interaction.yaml}")
ADAPTER=${2:-$ROOT/lora_checkpoints/epoch_10} MODE=${3:-evaluate} SAMPLES=${4:-50} MERGED=()
[ "$ADAPTER" = none ] || ADAPTER=$(realpath -m -- "$ADAPTER")
shift $(($# < 4 ? $# : 4))
start_server "$CONFIG" "$@"
[ "$MODE" = evaluate ] || MERGED=(merged_model_path=merged_os)
[ "$MODE" != both ] || MERGED+=(use_merged_model=true)
run "$PYTHON" evaluate.py --mode "$MODE" --config "$CONFIG" --adapter "$ADAPTER" --num_samples "$SAMPLES" \
  "server=$SERVER" "${MERGED[@]}" "$@"
