#!/usr/bin/env bash
# Trains on shell tasks, with the server in a process of its own:
#   scripts/train_os.sh [CONFIG] [OUTPUT] [EPOCHS] [SAMPLES] [name=value ...]
# An OUTPUT that holds a run is gone on with. EPOCHS and SAMPLES are else the CONFIG's. Paths in name=value, unlike
# CONFIG and OUTPUT, are seen from the repository's folder.
set -euo pipefail
source "$(dirname "$0")/server.sh"
CONFIG=$(realpath -m -- "${1:-$ROOT/configs/os_interaction.yaml}") OUTPUT=$(realpath -m -- "${2:-$ROOT/lora_checkpoints}")
GIVEN=() RESUME=()
[ -z "${3:-}" ] || GIVEN+=("num_epochs=$3")
[ -z "${4:-}" ] || GIVEN+=("samples_per_epoch=$4")
shift $(($# < 4 ? $# : 4))
start_server "$CONFIG" "$@"
! compgen -G "$OUTPUT/*_*/state.json" >/dev/null || RESUME=(resume_from=latest)
run "$PYTHON" train.py --config "$CONFIG" "server=$SERVER" "output_dir=$OUTPUT" "${GIVEN[@]}" "$@" "${RESUME[@]}"
