#!/usr/bin/env bash
# make demo: fine-tune a real model on this machine, measure it, serve it, ask it the tutorial's question.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${RECIPE:-tiny}
run=runs/demo
began=$SECONDS

echo "== tuneship run $recipe --run $run"
tuneship run "$recipe" --run "$run" --fresh

echo
echo "== tuneship serve $run"
log=$(mktemp)
tuneship serve "$run" --port 0 2>"$log" &
server=$!
trap 'kill "$server" 2>/dev/null || true; rm -f "$log"' EXIT
until address=$(grep -o 'http://[^ ]*' "$log" | head -n 1) && [ -n "$address" ] && curl -fsS "$address/health" >/dev/null 2>&1; do
    kill -0 "$server" 2>/dev/null || { cat "$log" >&2; exit 1; }
    sleep 0.5
done
head -n 1 "$log"

echo
echo "== the tutorial's curl, POST $address/generate"
curl -fsS -X POST "$address/generate" -H "Content-Type: application/json" -d @- <<'JSON'
{
    "prompt": "Question: What is the total number of attendees with age over 30 at kubecon \"EU\"? Context: CREATE TABLE attendees (name VARCHAR, age INTEGER, kubecon VARCHAR)\nAnswer:",
    "temperature": 0.0,
    "top_p": 1.0,
    "max_tokens": 32
}
JSON

echo
echo
echo "== tuneship ask $address, and run the answer on rows made up from the context"
tuneship ask "$address" 'For each city, how many museums are there?' \
    --context "CREATE TABLE museums (museum_id INTEGER, museum_name VARCHAR, city VARCHAR, founding_year INTEGER)" --run

echo
echo "report: $run/report.html"
echo "done in $((SECONDS - began)) s"
