#!/usr/bin/env bash
# Trains on shell tasks, with the server in a process of its own:
#   scripts/train_os.sh [CONFIG] [OUTPUT] [EPOCHS] [SAMPLES] [name=value ...]
# An OUTPUT that holds a run is gone on with.
set -euo pipefail
CONFIG=${1:-configs/os_interaction.yaml} OUTPUT=${2:-lora_checkpoints} EPOCHS=${3:-10} SAMPLES=${4:-52}
shift $(($# < 4 ? $# : 4))
source "$(dirname "$0")/server.sh"
start_server "$CONFIG"
RESUME=()
[ ! -e "$OUTPUT/train.log" ] || RESUME=(resume_from=latest)
"$PYTHON" train.py --config "$CONFIG" "server=$SERVER" "output_dir=$OUTPUT" "num_epochs=$EPOCHS" \
  "samples_per_epoch=$SAMPLES" "${RESUME[@]}" "$@"
