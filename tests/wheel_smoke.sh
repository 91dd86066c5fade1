#!/usr/bin/env bash
# The README's own commands and Python, with the `saekit` on PATH, in a folder of their own that is removed at the end.
# .ci/run calls it with the wheel's environment in front; by hand: PATH=$PWD/.venv/bin:$PATH bash tests/wheel_smoke.sh
set -euo pipefail
readme=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/README.md
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"

run() {
  echo "\$ $*"
  "$@" >log 2>&1 </dev/null || {
    code=$?
    cat log
    echo "smoke: '$*' ended with exit code $code" >&2
    exit 1
  }
}

must_fail() {
  echo "\$ $*"
  code=0
  "$@" >log 2>&1 </dev/null || code=$?
  [[ $code == 1 ]] || {
    cat log
    echo "smoke: '$*' ended with exit code $code, not 1" >&2
    exit 1
  }
}

must_exist() {
  [[ -s $1 ]] || {
    echo "smoke: no $1 was written" >&2
    exit 1
  }
}

run saekit --help
run saekit inspect demo

# The shell block under "By command", but for the installation and the browser, which would not end.
commands=$(sed -n '/^## By command/,/^## In Python/p' "$readme" | sed -n 's/^saekit/saekit/p' | grep -v dashboard)
[[ $(wc -l <<<"$commands") -ge 5 ]] || { echo "smoke: the README's commands were not found" >&2; exit 1; }
while read -r line; do
  # shellcheck disable=SC2086  # the README's commands are plain words
  run $line
done <<<"$commands"
run saekit plan --model demo --dataset demo --n-tokens 200_000 --seconds 1 --out planned
[[ ! -e planned ]] || { echo "smoke: saekit plan wrote something" >&2; exit 1; }
run saekit bench --device cpu --shape 16 64 4 --batch-size 32 --out bench.jsonl
run saekit verify cache
run saekit shuffle cache --out mixed --memory-mib 64
for damaged in cache mixed; do
  printf x >>"$damaged/shard-00000.safetensors"
  must_fail saekit verify "$damaged"
  run saekit verify "$damaged" --repair
  run saekit verify "$damaged"
done
for product in bench.jsonl cache/manifest.json mixed/manifest.json run/sae.safetensors run/config.json run/results/core.json run/report.html run/report.md; do
  must_exist "$product"
done

run saekit features explain run --n-random 64
run saekit features export run --format csv --out features.csv
run saekit dashboard run --export site
for product in run/explanations.json features.csv site/index.html; do
  must_exist "$product"
done

sed -n '/^```toml/,/^```/p' "$readme" | grep -v '^```' >sweep.toml
run saekit train sweep.toml
must_exist sweep/jumprelu/sae.safetensors
run saekit inspect sweep/topk-k8 --dead
run saekit train jumprelu --cache cache --hook resid_post.1 --d-sae 256 --out unused --verify-resume
[[ ! -e unused ]] || { echo "smoke: --verify-resume wrote something" >&2; exit 1; }

sed -n '/^## In Python/,/^## What there is/p' "$readme" | sed -n '/^```python/,/^```/p' | grep -v '^```' >readme.py
run python readme.py
must_exist py-run/sae.safetensors

# The demo at a hundredth of its size, and a second call, which finds everything done.
run saekit demo --out demo_run --harvest-tokens 60_000 --train-tokens 50_000
must_exist demo_run/run/report.html
run saekit demo --out demo_run --harvest-tokens 60_000 --train-tokens 50_000

echo '$ saekit dashboard run --headless'
saekit dashboard run --headless --port 8599 >log 2>&1 &
server=$!
for _ in $(seq 60); do
  if python -c 'import urllib.request as u; u.urlopen("http://localhost:8599/_stcore/health", timeout=1)' 2>/dev/null; then
    answered=yes
    break
  fi
  sleep 1
done
kill "$server"
[[ ${answered:-} == yes ]] || { cat log; echo "smoke: the dashboard did not answer" >&2; exit 1; }

echo "smoke: every command passed"
