#!/usr/bin/env bash
# Does a run that is killed (-9) and started again give the losses of one that was not? For the README's configs of the small model.
#   bash benchmarks/kill_and_resume.sh FOLDER_WITH_A_FINISHED_pretrain_tiny_RUN      (runs/ by default)
set -eu
runs=${1:-runs}
configs=$(cd "$(dirname "$0")/../configs" && pwd)
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
[ -f "$runs/pretrain_tiny/result.json" ] || {
  echo "error: no finished $runs/pretrain_tiny; run: trivet train configs/pretrain_tiny.yaml" >&2
  exit 2
}
mkdir "$room/runs"
cp -r "$runs/pretrain_tiny" "$room/runs/"
cd "$room"
short="run.steps=24 checkpoint.every=6 evaluation.max_rows=16 optim.warmup_steps=5"
for config in pretrain_tiny sft_lora classify; do
  trivet train "$configs/$config.yaml" "run.name=whole_$config" $short 2> whole.log
  trivet train "$configs/$config.yaml" "run.name=killed_$config" $short > killed.log 2>&1 & run=$!
  until [ "$(grep -cs '"train"' "runs/killed_$config/metrics.jsonl")" -ge 15 ] 2> /dev/null; do sleep 0.05; done
  kill -9 $run; wait $run 2> /dev/null || true
  trivet train "$configs/$config.yaml" "run.name=killed_$config" $short 2>&1 | grep "going on from"
  python - "$config" << 'COMPARE'
import json, sys
def losses(run):
    return [(e["step"], e.get("loss"), e.get("eval_loss")) for e in map(json.loads, open(f"runs/{run}/metrics.jsonl"))]
same = losses(f"whole_{sys.argv[1]}") == losses(f"killed_{sys.argv[1]}")
print(f"{sys.argv[1]}: {'equal bit for bit' if same else 'DIFFERENT'}")
sys.exit(not same)
COMPARE
done
