#!/usr/bin/env bash
# What docs/benchmarks.md needs a GPU for, in at most 8 minutes on one GPU. Nothing is downloaded: weights are random.
#   bash jobs/benchmarks/gpu_check.sh [OUT]         PYTHON=... chooses the interpreter
#   DEVICE=cpu bash jobs/benchmarks/gpu_check.sh    the same commands with tiny models: do they run?
# OUT (default gpu_check/) gets each part's output and numbers (.log, .json). A part that fails or runs over its time is
# reported at the end and makes the exit status 1. Whole runs need ray and deepspeed; without them they count as missing.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${1:-gpu_check}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
DEVICE=${DEVICE:-cuda}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
bad=()

part() {  # name, seconds, command...
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    echo "== $name: $*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log" | tail -n 14
    local code=${PIPESTATUS[0]}
    echo "== $name: exit $code after $((SECONDS - began)) s"
    [ "$code" = 0 ] || bad+=("$name (exit $code)")
}

script() {  # name, seconds, script, options...
    local name=$1 limit=$2 file=$3
    shift 3
    part "$name" "$limit" "$PYTHON" "jobs/benchmarks/$file" --device "$DEVICE" --json "$OUT/$name.json" "$@"
}

if [ "$DEVICE" = cpu ]; then
    large="--hidden 64 --layers 4 --vocab 300" copilot="--copilot-hidden 32 --copilot-layers 2" dtype=fp32 rounds=2
    shapes="--batch-size 4 --tokens 24 --targets 6" seconds=4 gpus=0
else
    large="--hidden 2048 --layers 16 --vocab 32000" copilot="--copilot-layers 4" dtype=bf16 rounds=20
    shapes="--batch-size 32 --tokens 256 --targets 64" seconds=6 gpus=0.5
    part tests 90 "$PYTHON" -m pytest -q -m gpu tests/unit
fi
part model 40 "$PYTHON" jobs/benchmarks/random_model.py "$OUT/model" $large --dtype $dtype
script logging 50 logging_overhead.py --model "$OUT/model" --dtype $dtype --rounds $rounds $shapes
script copilot_step 50 copilot_training.py $large --dtype $dtype --rounds $((rounds / 4 + 1)) $shapes
script decoding 50 decoding.py $large $copilot --dtype $dtype --batches 1 32 --new-tokens 24
script prefill 40 prefill.py $large $copilot --dtype $dtype --batches 1 8 --prompts 64 256 --rounds 5
script serving 80 serving.py $large $copilot --dtype $dtype --clients 1 32 --against 32 --repeats 1 \
    --seconds $seconds --warm-up 1
if "$PYTHON" -c 'import ray, deepspeed' 2>/dev/null; then
    rm -rf "$OUT/run"
    part run 100 "$PYTHON" -m tc_ray.cli.main train demo "model.pilot=$OUT/model" "run.folder=$OUT/run" \
        data.embedded_rows=200 data.validation_size=20 data.test_size=20 copilot.layers=[0,1] copilot.steps_per_round=2 \
        data.cutoff_tokens=512 fusion.max_new_tokens=8 "pilot.dtype=$dtype" "copilot.dtype=$dtype" \
        "resources.pilot_gpus=$gpus" "resources.copilot_gpus=$gpus" tracking.enabled=false
else
    bad+=("run (no ray or deepspeed for $PYTHON)")
fi
rm -rf "$OUT/model"
echo "total: $SECONDS s"
[ ${#bad[@]} = 0 ] || { printf 'not done: %s\n' "${bad[@]}"; exit 1; }
