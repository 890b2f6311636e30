#!/usr/bin/env bash
# What only a GPU can show, in at most 12 minutes on one card: the gpu tests, speed on random weights, one iteration of
# every algorithm, and the memory that was computed beside the memory that was used. No weights and no network needed.
#
#   scripts/gpu_check.sh [MODEL...]      default: sd3-medium sd3.5-medium; the algorithms run on the first
#
# FLOWBENCH_CHECK_TINY=1 runs the same commands on a CPU in seconds, with the model given.
# JSON goes to leaderboard/bench/DEVICE-MODEL.json and DEVICE-memory.json, or to FLOWBENCH_CHECK_OUT.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
models=("$@")
[ ${#models[@]} -gt 0 ] || models=(sd3-medium sd3.5-medium)
out=${FLOWBENCH_CHECK_OUT:-leaderboard/bench}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
end=$((SECONDS + 690))
failed=0
export HF_HUB_OFFLINE=1

if [ -n "${FLOWBENCH_CHECK_TINY:-}" ]; then
    device=cpu images=4 repeats=1 algorithms=${FLOWBENCH_CHECK_ALGORITHMS:-raft} limit=120
    cut=(--set training.num_steps=1 --set evaluation.num_steps=1)
else
    device=cuda images=32 repeats=3 limit=150
    algorithms="acflow adrpo awm ddpo dpok draft flow-grpo nft online-dpo orw-cfm-w2 raft refl"
    cut=(--set training.num_steps=4 --set evaluation.num_steps=4)
fi
# One iteration of 16 images, on a GPU the first eight scored beside the rollout of the others; evaluated on two prompts
# by no further judge.
cut+=(--images 16 --set training.prompts_per_iteration=4 --set training.images_per_prompt=4
    --set training.minibatch=16 --set training.rollout_batch=8 --set training.decode_batch=4
    --set 'evaluation.judges=[]' --set 'evaluation.splits=[test]' --set evaluation.prompts=2 --set evaluation.images_per_prompt=2)

# A command within what is left of the time; says how it ended, and goes on.
try() {
    local name=$1 left=$((end - SECONDS)); shift
    [ "$left" -gt 0 ] || { echo "gpu_check: no time left for $name"; failed=1; return 1; }
    [ "$left" -lt "$limit" ] || left=$limit
    if timeout "$left" "$@" >"$work/$name.log" 2>&1; then
        echo "gpu_check: $name passed (at $SECONDS s)"
    else
        echo "gpu_check: $name failed with status $?:"; tail -5 "$work/$name.log"; failed=1; return 1
    fi
}
flowbench() { echo "$python" -P -m flowbench; }

mkdir -p "$out"
first=${models[0]}
for a in $algorithms; do  # computed on the host while the card is busy, two at a time
    warmup=(); [ "$a" != acflow ] || warmup=(--set algorithm.warmup=0)
    echo "$(flowbench) run $a --model '$first' --random-init --reward clip --device $device $(printf "'%s' " "${cut[@]}" "${warmup[@]}")" >"$work/$a.sh"
    echo "$a"
done >"$work/algorithms"
xargs -P 2 -I{} sh -c "sh -c \"\$(cat $work/{}.sh) --dry-run --memory --json $work/{}.plan.json\" >$work/{}.plan.log 2>&1" <"$work/algorithms" &
planning=$!

[ "$device" = cpu ] || try gpu-tests "$python" -m pytest -q -m gpu -n0
for model in "${models[@]}"; do
    try "bench-${model//\//+}" $(flowbench) bench --model "$model" --random-init --compare plain-diffusers --device $device \
        --images $images --repeats $repeats --set training.decode_batch=8 --json "$work/bench-${model//\//+}.json" && cat "$work/bench-${model//\//+}.log"
done
for a in $algorithms; do
    try "$a" sh -c "$(cat "$work/$a.sh") --output $work/runs/$a"
done
wait $planning || { echo "gpu_check: a plan failed:"; tail -n 3 "$work"/*.plan.log; failed=1; }

"$python" -P - "$work" "$out" $algorithms <<'PY' || failed=1
import json, sys
from pathlib import Path

work, out, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
device, table = "unknown", {}
for name in names:
    plan = work / f"{name}.plan.json"
    row = {}
    if plan.is_file():
        content = json.loads(plan.read_text())
        row |= {"computed_gib": content["peak"] / 2**30, "computed_phase": content["peak_phase"]}
    for file in (work / "runs" / name).rglob("record.json"):
        record = json.loads(file.read_text())
        device = record["device"]
        budget = record["budget"]
        row |= {"measured_gib": budget["peak_memory_mb"] / 1024, "seconds": budget["seconds"], "command": record["command"]}
    table[name] = row
    print(f"{name:12}", *(f"{key} {value:.2f}" for key, value in row.items() if isinstance(value, float)))
short = "".join(c if c.isalnum() else "-" for c in device).strip("-").lower()
for file in work.glob("bench-*.json"):
    (out / f"{short}-{file.stem.removeprefix('bench-')}.json").write_text(file.read_text())
(out / f"{short}-memory.json").write_text(json.dumps({"device": device, "algorithms": table}, indent=1) + "\n")
PY
echo "gpu_check: done in $SECONDS s, $([ $failed = 0 ] && echo "all passed" || echo "with failures"); JSON in $out"
exit $failed
