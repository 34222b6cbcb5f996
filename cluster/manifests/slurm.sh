#!/bin/bash
# A plan on the nodes of a Slurm allocation: head and driver on the first, a raylet on each.
#   sbatch slurm.sh my_plan.py /shared/runs PLAN_NAME
# The folder must be seen by all nodes. Shortly before the time is over the run is saved and the job
# queued again, and then goes on.
#SBATCH --job-name=restage
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail

plan=$1 storage=$2 name=$3

# Recovery depends on these (reasons: cluster/local.py, ENVIRONMENT). Read when Ray starts.
# The controller looks four times a second; a wrong guess of the size costs 20 s, not 60.
export RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.25
export RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=20
export RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S=60
# Drain notices are read by Restage's own policy.
export RAY_TRAIN_ENABLE_PREEMPTION_WATCHER=0
# A silent node is declared dead after about 2 s instead of 20 to 55.
export RAY_health_check_initial_delay_ms=2000
export RAY_health_check_period_ms=500
export RAY_health_check_timeout_ms=1000
export RAY_health_check_failure_threshold=4
export RAY_USAGE_STATS_ENABLED=0
export RAY_TRAIN_V2_ENABLED=1
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0

# Other users of these nodes can reach its ports: whoever has no token is sent away. The file is on
# the shared folder, for all nodes of this job and for nobody else.
export RAY_AUTH_MODE=token
mkdir -p "$storage"
export RAY_AUTH_TOKEN_PATH=$storage/.token-$SLURM_JOB_ID
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")

# A short folder of this job's own on each node: two jobs on a node must not meet.
export RAY_TMPDIR=/tmp/ray-$SLURM_JOB_ID
srun --ntasks-per-node=1 mkdir -p "$RAY_TMPDIR"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
port=$((20000 + SLURM_JOB_ID % 20000))
gpus=${SLURM_GPUS_ON_NODE:-0}
raylet=(ray start --block --num-cpus="${SLURM_CPUS_ON_NODE:-1}" --num-gpus="$gpus"
        --dashboard-agent-listen-port=0)

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    "${raylet[@]}" --head --node-ip-address="$head" --port="$port" --include-dashboard=false &
raylets=($!)
until python -c 'import sys; from cluster.token import asks_for_token
sys.exit(asks_for_token(sys.argv[1]) is not True)' "$head:$port"; do sleep 1; done
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap \
        "${raylet[@]}" --address="$head:$port" &
    raylets+=($!)
done

over() {
    kill "${raylets[@]}" 2> /dev/null || true
    wait "${raylets[@]}" 2> /dev/null || true
    rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap over EXIT

again=0
save() {
    again=1
    python -m elastic stop "$storage/$name" --save || true
}
trap save USR1

python -m elastic train "$plan" --storage "$storage" --ray-address "$head:$port" &
driver=$!
code=0
wait "$driver" || code=$?
# The signal has ended that `wait`, not the driver.
if [ "$again" = 1 ]; then
    code=0
    wait "$driver" || code=$?
fi
if [ "$again" = 1 ] && [ "$code" = 130 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
