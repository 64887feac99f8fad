#!/usr/bin/env bash
# A command of llm2vec under torchrun; the same line for one card, eight, and two machines with eight each:
#
#     bash train_configs/launch/torchrun.sh stage-1 CONFIG
#     CARDS=8 bash train_configs/launch/torchrun.sh stage-1 CONFIG
#     CARDS=8 MACHINES=2 FIRST=HOST bash train_configs/launch/torchrun.sh stage-1 CONFIG     # on both machines
#
# FIRST is the name or address of one of the machines, as the others reach it, and PORT must be free there. With
# NODE_RANK (0 on FIRST, 1 on the next, ...) the process that writes is on FIRST; without it, wherever it falls.
set -euo pipefail
CARDS=${CARDS:-1} MACHINES=${MACHINES:-1} PORT=${PORT:-29500}
if [ "$MACHINES" -eq 1 ]; then
    where=(--standalone)
elif [ -n "${NODE_RANK:-}" ]; then
    where=(--nnodes="$MACHINES" --node_rank="$NODE_RANK" --master_addr="${FIRST:?is not set}" --master_port="$PORT")
else
    where=(--nnodes="$MACHINES" --rdzv_id="${RUN_ID:-llm2vec}" --rdzv_backend=c10d --rdzv_endpoint="${FIRST:?is not set}:$PORT")
fi
# After SIGTERM the step is finished and saved, which takes longer than torchrun's 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
run=(torchrun "${where[@]}" --nproc_per_node="$CARDS" -m llm2vec "$@")
[ -n "${SLURM_JOB_ID:-}" ] || exec "${run[@]}"

# Slurm signals every process of a step, and torchrun passes SIGTERM on to its own: each would get two, and the second
# ends it unsaved. So Slurm sends SIGUSR1, which all but this shell ignore, and this shell one SIGTERM to torchrun.
(trap '' USR1 && exec "${run[@]}") &
started=$!
trap 'kill -TERM "$started"' USR1
code=0
wait "$started" || code=$?
while kill -0 "$started" 2>/dev/null; do
    code=0
    wait "$started" || code=$?
done
exit "$code"
