#!/bin/bash
# Pretrain on nodes of 8 GPUs under SLURM; a job that runs out of time saves, requeues itself and goes on.
#
#   sbatch scripts/slurm_pretrain.sh --method dino --config configs/dino/vanilla.yaml \
#       --data_path /imagenet/train --output_dir out
#   sbatch --nodes 2 --time 12:00:00 scripts/slurm_pretrain.sh ...      (options before the script are sbatch's)
#
# Submit from the repository's root. Everything after the script's name goes to main_pretrain.py as it stands.
# PYTHON names another interpreter than .venv/bin/python.

#SBATCH --job-name=tutelage
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
# GPUs per node, not per task: every task sees all eight and takes the one of its SLURM_LOCALID
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
# back into the queue after a preemption or a failing node, too
#SBATCH --requeue
# A warning 180 s before the end. Without "B:" it goes to the tasks that srun started, which save, and not to this shell
#SBATCH --signal=USR1@180

set -u
SAVED=75 # exit code of main_pretrain.py: "saved, please start again"

cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
if [ ! -f main_pretrain.py ]; then
    echo "error: no main_pretrain.py in $PWD; submit from the repository's root" >&2
    exit 2
fi
python=${PYTHON:-.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "error: no interpreter $python; run make quickstart once, or set PYTHON" >&2
    exit 2
fi

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || exit 1
export MASTER_ADDR=${nodes%%$'\n'*}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node must not share a port
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # since SLURM 22.05 srun does not inherit it

# A preemption's SIGTERM may reach this shell as well: it has to outlive the tasks to see their exit code. A handler,
# not trap '': an ignored signal would stay ignored in the tasks.
trap : TERM USR1

# When one task dies the others hang in their next collective: end them, but leave time to those that still save.
srun --kill-on-bad-exit=0 --wait=120 "$python" main_pretrain.py "$@"
code=$?

if [ "$code" -eq "$SAVED" ]; then
    echo "saved after ${SLURM_RESTART_COUNT:-0} restarts; back into the queue"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "error: SLURM refused to requeue job $SLURM_JOB_ID; submit the same command again to continue" >&2
fi
exit "$code"
