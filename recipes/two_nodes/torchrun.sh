#!/usr/bin/env bash
# Starts a recipe on this node of two; run it on both, with the first node's address. NOT RUN: no two nodes were at hand.
#
#   ./torchrun.sh HOST [RECIPE] [key=value ...]
set -euo pipefail

host=${1:?the address of the first node}
shift
recipe=${1:-$(dirname "$0")/deepseek_v3_16b_16gpu.toml}
shift || true

exec torchrun --nnodes 2 --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$host:29500" --rdzv-id flashmoe \
    -m flashmoe_train.train "$recipe" "$@"
