#!/usr/bin/env bash
# Trains a small mixture-of-experts language model on two expert-parallel ranks, from a fresh checkout.
#
#   bash launch/quickstart.sh [key=value ...] [--ranks N] [--output DIR] [--resume]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""
exec .venv/bin/moe-dist train configs/quickstart.yaml --ranks 2 parallel.expert=2 "$@"
