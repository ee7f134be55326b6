#!/usr/bin/env bash
# On a machine of a running Ray cluster (or alone: Ray then starts one of this machine), from the repository's folder:
#   RUN_DIR=/shared/runs/long RECIPE=7b_moe NODES=2 RANKS_PER_NODE=8 launch/clusters/ray/train.sh data.files=data/corpus data.tokenizer=data/corpus
# Ray takes the place of torchrun and of launch/clusters/launch.sh: a rank that dies ends its attempt, and Ray starts all anew.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
. "$root/launch/clusters/settings.sh"
export RUN_DIR RECIPE NODES RANKS_PER_NODE MAX_RESTARTS
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
exec "${PYTHON:-$python}" "$root/launch/ray_train.py" "$@"
