#!/usr/bin/env bash
# Sends generated requests to a fresh server and holds every answer against openapi.yaml.
#
#   OBSCURA_SERVER_BIN        the server to test (default: target/debug/obscura-server)
#   OBSCURA_TEST_DEPLOYMENT   `embedded` (default), or `distributed`: on the servers that scripts/services starts
#
# Arguments are handed on, for instance `--seed 7 --max-examples 500` to look further.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
# shellcheck source=scripts/tools.sh
source scripts/tools.sh

server=$(realpath "${OBSCURA_SERVER_BIN:-target/debug/obscura-server}")

if [[ ! -x $server ]]; then
  echo "There is no server at $server. Build it (cargo build), or name one in OBSCURA_SERVER_BIN." >&2
  exit 1
fi

mapfile -t wanted <"$here/requirements.txt"
tool schemathesis "${wanted[@]}"
schemathesis=$tools/schemathesis/bin/schemathesis

case ${OBSCURA_TEST_DEPLOYMENT:-embedded} in
  embedded | distributed) ;;
  *)
    echo "OBSCURA_TEST_DEPLOYMENT: \"$OBSCURA_TEST_DEPLOYMENT\" is not allowed; it takes embedded or distributed." >&2
    exit 1
    ;;
esac
sql() { "$OBSCURA_TEST_POSTGRES_BIN/psql" -qX -v ON_ERROR_STOP=1 -d "$OBSCURA_TEST_POSTGRES_URL" -c "$1"; }

scratch=$(mktemp -d)
pid=
database=
clean_up() {
  if [[ -n $pid ]]; then
    kill "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  fi
  if [[ -n $database ]]; then sql "DROP DATABASE \"$database\" WITH (FORCE)" || true; fi
  rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

variables=(OBSCURA_DATA_DIR="$scratch/data")
if [[ ${OBSCURA_TEST_DEPLOYMENT:-embedded} == distributed ]]; then
  : "${OBSCURA_TEST_POSTGRES_URL:?is set by scripts/services}"
  database=schemathesis-$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')
  sql "CREATE DATABASE \"$database\""
  variables=(
    OBSCURA_DATABASE_URL="${OBSCURA_TEST_POSTGRES_URL%/*}/$database"
    OBSCURA_PUBSUB_URL="$OBSCURA_TEST_VALKEY_URL"
    OBSCURA_NOTIFICATIONS_CHANNEL_PREFIX="$database:user:"
    OBSCURA_NOTIFICATIONS_PUSH_QUEUE_KEY="$database:jobs"
    OBSCURA_STORAGE_ENDPOINT="$OBSCURA_TEST_S3_ENDPOINT"
    OBSCURA_STORAGE_ACCESS_KEY="$OBSCURA_TEST_S3_ACCESS_KEY"
    OBSCURA_STORAGE_SECRET_KEY="$OBSCURA_TEST_S3_SECRET_KEY"
    OBSCURA_STORAGE_FORCE_PATH_STYLE=true
    OBSCURA_STORAGE_BUCKET="$database"
    OBSCURA_STORAGE_CREATE_BUCKET=true
    OBSCURA_AUTH_JWT_SECRET="$database-only-for-this-run"
  )
fi
# The server itself in the background, not a shell around it, so that its process can be ended.
env "${variables[@]}" "$server" --server-host 127.0.0.1 --server-port 0 --mgmt-port 0 \
  --rate-limit-per-second 100000 --rate-limit-burst 100000 \
  --auth-rate-limit-per-second 100000 --auth-rate-limit-burst 100000 \
  --account-rate-limit-per-second 0 --target-rate-limit-per-second 0 --prekey-fetches-per-hour 0 \
  --one-time-prekeys-per-hour 0 --sign-ups-per-hour 0 --sign-ups-per-day-per-address 0 \
  --sign-ups-per-day-per-network 0 --wrong-passwords-per-hour 0 --upload-rate-limit-per-second 0 \
  >"$scratch/stdout" 2>"$scratch/stderr" &
pid=$!

api=
for _ in $(seq 200); do
  api=$(sed -nE 's/^[[:space:]]*API[[:space:]]+(http:\/\/[^[:space:]]+).*/\1/p' "$scratch/stdout" | head -n 1)
  [[ -n $api ]] && break
  kill -0 "$pid" 2>/dev/null || break
  sleep 0.1
done
if [[ -z $api ]]; then
  echo "The server did not say where it listens. It said:" >&2
  cat "$scratch/stdout" "$scratch/stderr" >&2
  exit 1
fi

verdict=0
# From the scratch folder, because schemathesis and Hypothesis keep notes where they are started.
(cd "$scratch" && PYTHONDONTWRITEBYTECODE=1 SCHEMATHESIS_HOOKS="$here/hooks.py" \
  OBSCURA_API=${api%/} OBSCURA_STATUSES="$scratch/statuses" \
  timeout 300 "$schemathesis" --config-file "$here/schemathesis.toml" \
  run "$here/../../openapi.yaml" --url "${api%/}" "$@" | cut -c -2000) || verdict=$?

if [[ -s $scratch/statuses ]]; then
  printf '\nStatuses seen:\n'
  cat "$scratch/statuses"
  if grep -q ' - never ' "$scratch/statuses"; then
    echo "Some operations never succeeded as documented, so the run has not looked at those answers." >&2
    verdict=1
  fi
fi
if ! kill -0 "$pid" 2>/dev/null; then
  echo "The server did not survive the run." >&2
  verdict=1
fi
if ((verdict != 0)); then
  echo "The last words of the server:" >&2
  tail -n 40 "$scratch/stdout" "$scratch/stderr" >&2
fi
exit "$verdict"
