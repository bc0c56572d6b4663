#!/bin/bash
# Trains @NAME@ on @NODES@ nodes. Made by:
#   @MADE_BY@
# Submit it with `sbatch` from a folder that every node sees; config and run.dir are taken from there. Adapt the time,
# and add --partition and --account. Five minutes before the time is up, and when it is preempted, the run saves at the
# end of its step, and the job goes back into the queue, from where it goes on.
#SBATCH --job-name=@NAME@
#SBATCH --nodes=@NODES@
#SBATCH --ntasks-per-node=1
@GPUS@#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# A port of the job's own, so that two jobs may share a node.
main_address="${nodes%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))"
export main_address

# One task on each node; it starts the processes of that node itself.
# shellcheck disable=SC2329  # srun calls it
train() {
    exec trivet @COMMAND@
}
export -f train

# A node that ends first must not have the others killed while they save.
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none --kill-on-bad-exit=0 --wait=0 \
    bash -c train &
run=$!
trap 'kill -USR1 "$run"' USR1 TERM
wait "$run"
code=$?
# A signal ends `wait` early: go on waiting while the run saves.
while [ "$code" -gt 128 ] && kill -0 "$run" 2> /dev/null; do
    wait "$run"
    code=$?
done
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
