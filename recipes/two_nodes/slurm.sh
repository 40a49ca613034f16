#!/usr/bin/env bash
#SBATCH --job-name=flashmoe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# One torchrun a node: sbatch slurm.sh [RECIPE] [key=value ...]. NOT RUN: no cluster was at hand.
# Submit it from this folder with the environment that flashmoe_train is installed in active.
set -euo pipefail

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun --kill-on-bad-exit=1 "$SLURM_SUBMIT_DIR/torchrun.sh" "$host" "$@"
