#!/usr/bin/env bash
# Each command of the `saekit` on PATH, at tiny sizes, in a folder of its own that is removed at the end.
# .ci/run calls it with the wheel's environment in front; by hand: PATH=$PWD/.venv/bin:$PATH bash tests/wheel_smoke.sh
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"

run() {
  echo "\$ saekit $*"
  saekit "$@" >log 2>&1 </dev/null || {
    code=$?
    cat log
    echo "wheel smoke: 'saekit $*' ended with exit code $code" >&2
    exit 1
  }
}

must_exist() {
  [[ -s $1 ]] || {
    echo "wheel smoke: no $1 was written" >&2
    exit 1
  }
}

run --help
run inspect demo
run harvest --model demo --dataset demo --hooks resid_post.1 --n-tokens 20000 --out c
must_exist c/manifest.json
run verify c
run train topk --cache c --hook resid_post.1 --d-sae 256 --k 8 --n-tokens 40000 --out r
must_exist r/sae.safetensors
must_exist r/config.json
run eval core --sae r
run eval examples --sae r
run report r
must_exist r/report.html

echo "wheel smoke: every command passed"
