# Starts the server of shell tasks, waits until it answers, and stops it when the script that sources this ends.
# PORT is its port, SERVER then its URL.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
[ -x "$PYTHON" ] || PYTHON=python3
PORT=${PORT:-8000}
SERVER=http://127.0.0.1:$PORT

start_server() { # the config's file, and settings, of which the server takes its own
  ! answers || { echo "error: another server uses port $PORT: set PORT" >&2; exit 2; }
  "$PYTHON" -m tasks.os_interaction.server --config "$1" "port=$PORT" -- "${@:2}" &
  SERVER_PID=$!
  trap 'kill "$SERVER_PID" 2>/dev/null || true; wait "$SERVER_PID" 2>/dev/null || true' EXIT
  trap 'exit 130' INT TERM
  until answers; do
    kill -0 "$SERVER_PID" 2>/dev/null || { echo "error: the server did not start" >&2; exit 2; }
    sleep 0.5
  done
}

answers() {
  "$PYTHON" - "$SERVER/api/ping" 2>/dev/null <<'END'
import sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
opener.open(urllib.request.Request(sys.argv[1], b"{}"), timeout=5)
END
}
