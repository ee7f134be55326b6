#!/usr/bin/env bash
# Starts this node's ranks: what every scheduler's script ends in. Arguments are knobs of launch/train.py.
#   RUN_DIR=/shared/runs/long RECIPE=7b_moe NODES=2 HEAD=node0 launch/clusters/launch.sh data.files=data/corpus data.tokenizer=data/corpus
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
. "$root/launch/clusters/settings.sh"

fail() { echo "error: $1" >&2; exit 2; }

[[ $RUN_DIR ]] || fail "RUN_DIR=: must name the run's folder, the same at every restart"
[[ $NODES =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "NODES=$NODES: must be a number of nodes, or two as in 2:4"
[[ $NODES == 1 || $HEAD ]] || fail "HEAD=: must name the first node where NODES=$NODES"
[[ $RANKS_PER_NODE =~ ^(gpu|[1-9][0-9]*)$ ]] || fail "RANKS_PER_NODE=$RANKS_PER_NODE: must be gpu or a number above 0"
for name in MAX_RESTARTS SHUTDOWN_TIMEOUT PORT; do
  [[ ${!name} =~ ^[0-9]+$ ]] || fail "$name=${!name}: must be a whole number"
done

# A node that joins a running job needs it: docs/survival.md.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Experts have other numbers of rows at each step: without it, a GPU's memory may fall into pieces.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}}

meeting=(--standalone)
[[ $NODES == 1 ]] || meeting=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$JOB_ID")
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
python=${PYTHON:-$python}
[[ $RANKS_PER_NODE != gpu || -e /dev/nvidia0 || -e /dev/kfd ]] ||
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null ||
  fail "RANKS_PER_NODE=gpu: there is no GPU here; give a number of ranks"

# exec: a scheduler's signals reach torchrun itself.
exec "$python" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$RANKS_PER_NODE" \
  --max-restarts "$MAX_RESTARTS" --shutdown-timeout "$SHUTDOWN_TIMEOUT" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  "$root/launch/train.py" recipe="$RECIPE" run_dir="$RUN_DIR" "$@"
