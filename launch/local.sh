#!/usr/bin/env bash
# sera_jax on this machine: CPU, GPU or TPU, as one process or as several on loopback.
#
#   launch/local.sh COMMAND [options] [-- flags of sera_jax.train]
#
#   install   sera_jax in .venv, with what the machine's device needs (tpu, cuda, or neither)
#   stage     copy every --data that is in a bucket into data/
#   run       train; the same command goes on after whatever stopped it (run.dir keeps everything)
#   logs      where the run folder and the logs are, and their last lines
#
#   --config FILE     of the run
#   --data PATH       gs://BUCKET/FILE, or gs://BUCKET/FOLDER/; may come several times. What is local stays where it is.
#   --processes N     1 if not given; process 0 prints here, the others into --logs. On GPUs each process takes one.
#   --devices N       simulated devices of each process, on CPU only
#   --logs DIR        runs/launch/local if not given
#   --dry-run         print every command and run none
#
# A machine with several devices needs one process: --mesh.fsdp and its siblings spread over all it has. Several are there
# to try on one machine what a pod does. PYTHON names another interpreter than .venv/bin/python.
#
# Tested here on CPU. On paper only: install on TPU and GPU, several processes on GPUs, stage from a real bucket.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}

config="" processes=1 devices="" logs=runs/launch/local
command=${1:-}
case $command in
    install | stage | run | logs) shift ;;
    "" | -h | --help)
        usage
        exit 0
        ;;
    *) die "got '$command'; expected install, stage, run or logs. --help tells what they do." ;;
esac
read_options "config data processes devices logs" "dry-run" "$@"
check_count --processes "$processes"
[ -z "$devices" ] || check_count --devices "$devices"

# cuda, tpu or cpu: what the machine has.
device() {
    if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then
        echo cuda
    elif [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; then
        echo tpu
    else
        echo cpu
    fi
}

install() {
    local extra
    extra=$(device)
    [ -x "$ROOT/.venv/bin/python" ] || run "${BASE_PYTHON:-python3}" -m venv "$ROOT/.venv"
    case $extra in cpu) extra="" ;; *) extra="[$extra]" ;; esac
    run "$ROOT/.venv/bin/python" -m pip install --quiet -e "$ROOT$extra"
}

# Ends what was started: asks, waits ten seconds, insists. Nothing has to be saved, the last checkpoint is whole.
pids=()
stop() {
    local pid
    for pid in ${pids[@]+"${pids[@]}"}; do [ -z "$pid" ] || kill -TERM "$pid" 2> /dev/null || true; done
    for pid in ${pids[@]+"${pids[@]}"}; do
        [ -n "$pid" ] || continue
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            kill -0 "$pid" 2> /dev/null || break
            sleep 1
        done
        kill -KILL "$pid" 2> /dev/null || true
    done
}

several() {
    local k pid left status kind port words
    kind=$(device)
    [ "$kind" != tpu ] || die "--processes $processes: the TPUs of one machine belong to one process; expected 1."
    port=12345
    [ -n "$DRY" ] || port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    run mkdir -p "$logs"
    trap 'stop' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    for ((k = 0; k < processes; k++)); do
        words=(env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$k")
        [ "$kind" != cuda ] || words+=("CUDA_VISIBLE_DEVICES=$k")
        words+=("${train[@]}")
        if [ -n "$DRY" ]; then
            printf '%s &\n' "$(quoted "${words[@]}")" >&3
            continue
        fi
        say "+ $(quoted "${words[@]}") &"
        if [ "$k" = 0 ]; then
            "${words[@]}" &
        else
            "${words[@]}" > "$logs/process-$k.log" 2>&1 &
        fi
        pids+=($!)
    done
    # The first one that fails ends the others, which would wait for it.
    left=${#pids[@]}
    while [ "$left" -gt 0 ]; do
        sleep 0.2
        left=0
        for ((k = 0; k < ${#pids[@]}; k++)); do
            pid=${pids[$k]}
            [ -n "$pid" ] || continue
            if kill -0 "$pid" 2> /dev/null; then
                left=$((left + 1))
                continue
            fi
            status=0
            wait "$pid" || status=$?
            pids[k]="" # its number may go to another process
            if [ "$status" != 0 ]; then
                [ "$k" = 0 ] || tail -n 20 "$logs/process-$k.log" >&2
                say "error: process $k of $processes ended with status $status; the others were stopped. Once it can work, the same command goes on."
                return "$status"
            fi
        done
    done
}

case $command in
    install) install ;;
    stage)
        [ "${#DATA[@]}" -gt 0 ] || die "--data is missing: what to copy."
        check_data
        check_tools gcloud
        copy_from_buckets data
        ;;
    run)
        check_config "$config"
        [ "${#DATA[@]}" -eq 0 ] || die "--data belongs to the command stage; give paths behind --, as --data.pairs."
        [ -x "$PYTHON" ] || command -v "$PYTHON" > /dev/null || [ -n "$DRY" ] ||
            die "no Python at $PYTHON: 'install' makes it, or set PYTHON."
        simulated=()
        if [ -n "$devices" ]; then
            [ "$(device)" = cpu ] || die "--devices $devices: only CPU devices can be simulated, this machine has $(device)."
            simulated=(env "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
        fi
        several_processes "$processes" 1 "$config"
        train=(${simulated[@]+"${simulated[@]}"} "$PYTHON" -m sera_jax.train --config "$config"
            ${joined[@]+"${joined[@]}"} ${TRAIN[@]+"${TRAIN[@]}"})
        if [ "$processes" = 1 ]; then run "${train[@]}"; else several; fi
        ;;
    logs)
        for log in "$logs"/*.log; do
            [ -f "$log" ] || die "no logs in $logs; process 0 prints where it was started, and the run folder has metrics.jsonl and report.html."
            run tail -n 20 "$log"
        done
        ;;
esac
