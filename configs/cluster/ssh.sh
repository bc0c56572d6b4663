#!/bin/bash
# Trains pretrain_cluster on 2 machines that are reached by ssh without a password. Made by:
#   trivet launch-script ssh configs/pretrain_tiny.yaml batch.rows=32 run.name=pretrain_cluster --nodes 2 --gpus-per-node 4 --parallel ddp
# Start it on any of them, in a folder that all of them see under the same path (config and run.dir are taken from
# there), with the names by which they know each other: bash FILE HOST ...
# The first one's port 29500 (or PORT=...) must be open to the others. Ctrl-C, SIGTERM or SIGUSR1 to this script:
# the run saves at the end of its step, and the script returns 75; started again, the run goes on.
set -u

hosts=("$@")
if [ "${#hosts[@]}" -ne 2 ]; then
    echo "usage: bash $0 HOST ...: ${#hosts[@]} hosts found; accepted: 2" >&2
    exit 2
fi
port=${PORT:-29500}
# Another shell than yours runs the command there: the same trivet by its whole path, or TRIVET=...
trivet=$(printf %q "${TRIVET:-$(command -v trivet)}")
folder=$(printf %q "$PWD")
# Where each machine keeps the id of its process, so that it can be told to stop.
mark=/tmp/trivet-$(hostname)-$$

on() {
    # A machine that is gone ends its ssh within a minute.
    exec ssh -n -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 "$1" "$2"
}
train() {
    on "${hosts[$1]}" "echo \$\$ > $mark-$1; cd $folder && exec $trivet train configs/pretrain_tiny.yaml batch.rows=32 run.name=pretrain_cluster --nproc 4 --parallel ddp --nodes 2 --machine-rank $1 --main-address ${hosts[0]}:$port"
}
# shellcheck disable=SC2329  # a signal calls it
stop() {
    for rank in "${!hosts[@]}"; do
        # Again where the process is not there yet.
        on "${hosts[$rank]}" "for try in 1 2 3 4 5; do kill -USR1 \$(cat $mark-$rank) && break; sleep 1; done" &
    done
}

runs=()
for rank in "${!hosts[@]}"; do
    train "$rank" &
    runs+=("$!")
done
trap stop INT TERM USR1 HUP

code=0
for run in "${runs[@]}"; do
    wait "$run"
    one=$?
    # A signal ends `wait` early: go on waiting while the run saves.
    while [ "$one" -gt 128 ] && kill -0 "$run" 2> /dev/null; do
        wait "$run"
        one=$?
    done
    # 75, "run me again", only where nothing failed.
    if [ "$one" -ne 0 ] && { [ "$code" -eq 0 ] || [ "$code" -eq 75 ]; }; then
        code=$one
    fi
done
for rank in "${!hosts[@]}"; do
    (on "${hosts[$rank]}" "rm -f $mark-$rank")
done
exit "$code"
