#!/bin/bash
# Many recordings on a cluster with SLURM: one job of the queue holds a scheduler, the workers, and the command.
#
#   sbatch tools/slurm.sh recon DATA --out OUT --method temporal-tv
#   sbatch --ntasks 65 --time 02:00:00 tools/slurm.sh features DATA --encoder hubert-base
#
# All nodes must see DATA, OUT and this environment under the same paths. What is finished is not done again:
# when the time is over, submit the same line once more.
#SBATCH --job-name=sirem
#SBATCH --ntasks=17
#SBATCH --cpus-per-task=1
#SBATCH --mem-per-cpu=6G
#SBATCH --time=08:00:00
#SBATCH --output=sirem-%j.log
set -eu
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
where="${SIREM_SCHEDULER_FILE:-$PWD/.sirem-scheduler-${SLURM_JOB_ID:-$$}.json}"
trap 'kill $(jobs -p) 2>/dev/null; rm -f "$where"' EXIT

dask scheduler --scheduler-file "$where" --port 0 --no-dashboard --no-show &
until [ -s "$where" ]; do sleep 0.5; done
# One task is left for the scheduler and the command, which do little.
srun --ntasks="$((SLURM_NTASKS - 1))" dask worker --scheduler-file "$where" --nworkers 1 --nthreads 1 --memory-limit 0 --no-dashboard &

address="$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["address"])' "$where")"
sirem "$@" --scheduler "$address"
