#!/usr/bin/env bash
# A first day with Trivet, as a transcript: clone, quickstart, a config for your own data, train, report, export, serve,
# one request; then wrong turns and what they print.
#   bash benchmarks/first_day.sh DATA [FOLDER] > transcript.txt      # DATA: labelled texts, for `trivet init --from`
# About fifteen minutes on two CPU cores, most of them the installation and the two trainings. FOLDER (default: a new
# one) takes the clone and everything that it makes.
set -u
data=$(realpath "$1")
here=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
folder=$(realpath "${2:-$(mktemp -d)}")
cd "$folder" || exit 1

# Progress bars are for terminals; what is left of the output is shown as it comes, errors too.
run() {
  printf '\n$ %s\n' "$*"
  local started=$SECONDS
  bash -c "$*" 2>&1
  local code=$?
  printf '[exit code %d, %d s]\n' "$code" $((SECONDS - started))
}

run "git clone -q $here trivet"
cd trivet || exit 1
run "make quickstart"
export PATH="$PWD/.venv/bin:$PATH"
run "trivet init tweets --from $data"
run "trivet train configs/tweets.yaml"
run "trivet report runs/tweets"
run "trivet export runs/tweets onnx/tweets"

printf '\n$ trivet serve onnx/tweets --port 8123 &\n'
trivet serve onnx/tweets --port 8123 2>&1 &
server=$!
for _ in $(seq 60); do
  curl -fs http://127.0.0.1:8123/health > /dev/null && break
  sleep 1
done
run "curl -s http://127.0.0.1:8123/v1/classify -H 'Content-Type: application/json' -d '{\"input\": [\"my bag is lost, again\", \"thank you for the upgrade!\"]}'"
printf '\n$ kill %%1\n'
kill "$server"
wait "$server"
printf '[exit code %d]\n' $?

printf '\n# Wrong turns\n'
run "trivet train configs/tweets.yaml optim.learning_rate=1e-3"
run "trivet train configs/tweets.yaml optim.lr=1e-3"
run "trivet generate onnx/tweets --prompt 'Where is my bag?'"
run "printf x >> onnx/tweets/tokenizer.json; trivet serve onnx/tweets"
run "trivet init tweets --from $data --label airline_sentimnt --force"
