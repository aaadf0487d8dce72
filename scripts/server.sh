# Starts the server of shell tasks, waits until it answers, and stops it when the script that sources this ends.
# PORT is its port, SERVER then its URL. PYTHON is a program's name or path.
ROOT=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$ROOT/.venv/bin/python
  [ -x "$PYTHON" ] || PYTHON=python3
fi
PYTHON=$(realpath -ms -- "$(command -v -- "$PYTHON" || echo "$PYTHON")") # an environment's is a link, and stays one
[ -x "$PYTHON" ] || { echo "error: PYTHON=$PYTHON is no program" >&2; exit 2; }
PORT=${PORT:-8000}
SERVER=http://127.0.0.1:$PORT

start_server() { # the config's file, and settings, of which the server takes its own; goes to the repository's folder
  cd "$ROOT"
  ! answers || { echo "error: another server uses port $PORT: set PORT" >&2; exit 2; }
  # In a session of its own, so that Ctrl-C at the terminal leaves it to the program that still needs it.
  setsid "$PYTHON" -m tasks.os_interaction.server --config "$1" "port=$PORT" -- "${@:2}" &
  SERVER_PID=$!
  trap 'kill "$SERVER_PID" 2>/dev/null || true; wait "$SERVER_PID" 2>/dev/null || true' EXIT
  trap 'exit 130' INT TERM HUP
  until answers; do
    kill -0 "$SERVER_PID" 2>/dev/null || { echo "error: the server did not start" >&2; exit 2; }
    sleep 0.5
  done
}

run() { # a program in a session of its own, which is handed the signals that come, and waited for
  setsid env --default-signal=INT "$@" &
  local pid=$! signal status
  trap "signal=INT; kill -INT $pid 2>/dev/null || true" INT
  trap "signal=TERM; kill -TERM $pid 2>/dev/null || true" TERM HUP
  while :; do
    signal='' status=0
    wait "$pid" || status=$?
    { [ -n "$signal" ] && kill -0 "$pid" 2>/dev/null; } || return "$status" # a signal ends `wait`, not the program
  done
}

answers() {
  "$PYTHON" - "$SERVER/api/ping" 2>/dev/null <<'END'
import sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
opener.open(urllib.request.Request(sys.argv[1], b"{}"), timeout=5)
END
}
