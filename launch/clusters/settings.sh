# What every scheduler's script shares. A variable that is set already keeps its value: RECIPE=7b_moe sbatch ...

: "${RUN_DIR:=}"              # where the run writes, on a disk all nodes see; the same at every restart, so it must be named
: "${RECIPE:=tiny_moe}"       # recipe=
: "${NODES:=1}"               # how many, or the fewest and the most, as in 2:4; the scheduler's script sets it
: "${HEAD:=}"                 # host name or address of the first node; the scheduler's script sets it
: "${JOB_ID:=moesaic}"        # tells the nodes of this job from another's; the scheduler's script sets it
: "${RANKS_PER_NODE:=gpu}"    # a number, or gpu: as many as there are GPUs
: "${MAX_RESTARTS:=100}"      # after crashes, and as nodes come and go; the run goes on from its newest checkpoint
: "${SHUTDOWN_TIMEOUT:=240}"  # seconds from a signal to SIGKILL: two steps and a save must fit, docs/survival.md
: "${PORT:=29400}"            # on HEAD, where nodes meet
