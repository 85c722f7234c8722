#!/usr/bin/env bash
# Curates on all machines of a SLURM job by Ray, then trains on them by torchrun:
#   sbatch --nodes 16 examples/slurm.sh RECIPE RUN
# RUN lies on a file system that all machines see, or is s3://BUCKET/RUN; the models of the trainings then come into
# runs/, which all machines must see. A job that ends early is submitted again: what is done stays.
#SBATCH --job-name=capfilt
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --requeue
set -euo pipefail
recipe=${1:?usage: sbatch slurm.sh RECIPE RUN} run=${2:?usage: sbatch slurm.sh RECIPE RUN}
export RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n') # the job's own: others on these machines have none
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over by itself

mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address() { srun --nodes=1 --ntasks=1 --nodelist="$1" hostname --ip-address | cut -d ' ' -f 1; }
head=$(address "${machines[0]}")
port=$((20000 + SLURM_JOB_ID % 10000)) # a job's own, below those that systems give out by themselves
gpus=${SLURM_GPUS_ON_NODE:-0}

# --- curation: a raylet on each machine; the command hands the shards out -------------------------------------
ray_options=(--num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "$gpus" --block)
srun --nodes=1 --ntasks=1 --nodelist="${machines[0]}" \
  ray start --head --node-ip-address="$head" --port="$port" --include-dashboard=false "${ray_options[@]}" &
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for try in $(seq 60); do
  ray health-check --address "$head:$port" 2>/dev/null && break
  ((try < 60)) || { echo "slurm.sh: no Ray cluster at $head:$port after two minutes" >&2 && exit 1; }
  sleep 2
done
for machine in "${machines[@]:1}"; do
  srun --nodes=1 --ntasks=1 --nodelist="$machine" ray start --address="$head:$port" "${ray_options[@]}" &
done
capfilt run "$recipe" "$run" --curate-only --engine ray --address "$head:$port"
kill $(jobs -p) 2>/dev/null || true
wait || true # until the machines are free for the training

# --- the recipe's trainings: a process for each GPU (without GPUs: one for a machine, over gloo) ----------------
srun --nodes="${#machines[@]}" --ntasks="${#machines[@]}" \
  torchrun --nnodes="${#machines[@]}" --nproc-per-node=$((gpus > 0 ? gpus : 1)) \
  --rdzv-backend=c10d --rdzv-endpoint="$head:$((port + 1))" --rdzv-id="$SLURM_JOB_ID" -m capfilt run "$recipe" "$run"
