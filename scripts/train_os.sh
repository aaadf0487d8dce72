#!/usr/bin/env bash
# Trains on shell tasks, with the server in a process of its own:
#   scripts/train_os.sh [CONFIG] [OUTPUT] [EPOCHS] [SAMPLES] [name=value ...]
# An OUTPUT that holds a run is gone on with. EPOCHS and SAMPLES are else the CONFIG's.
set -euo pipefail
CONFIG=${1:-configs/os_interaction.yaml} OUTPUT=${2:-lora_checkpoints} GIVEN=()
[ -z "${3:-}" ] || GIVEN+=("num_epochs=$3")
[ -z "${4:-}" ] || GIVEN+=("samples_per_epoch=$4")
shift $(($# < 4 ? $# : 4))
source "$(dirname "$0")/server.sh"
start_server "$CONFIG" "$@"
RESUME=()
[ ! -e "$OUTPUT/train.log" ] || RESUME=(resume_from=latest)
"$PYTHON" train.py --config "$CONFIG" "server=$SERVER" "output_dir=$OUTPUT" "${GIVEN[@]}" "${RESUME[@]}" "$@"
