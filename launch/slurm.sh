#!/usr/bin/env bash
# sera_jax on a Slurm cluster: one process a GPU (or a node, without GPUs) on nodes that share a file system.
#
#   launch/slurm.sh COMMAND --name NAME [options] [-- flags of sera_jax.train]
#
#   stage     copy every --data that is in a bucket into data/
#   run       submit; nothing if the job is queued or runs. A preempted job is queued again and goes on by itself; after
#             anything else the same command goes on. run.dir has to be on the shared file system.
#   logs      the last lines of every process
#   delete    cancel the job
#
#   --config FILE     of the run
#   --nodes N         1 if not given;   --gpus N: of each node, 0 if not given
#   --partition P, --time T   as sbatch has them
#   --data PATH       gs://BUCKET/FILE, or gs://BUCKET/FOLDER/; may come several times. What is local stays where it is.
#   --logs DIR        runs/launch/NAME if not given, on the shared file system
#   --dry-run         print every command and run none
#
# sera_jax is installed once, by launch/local.sh install on a node with the device; PYTHON names another interpreter.
# Known on paper only, for there is no Slurm where this was written: https://slurm.schedmd.com/sbatch.html. Tests run it
# against stand-ins for sbatch, squeue and scancel.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}

name="" config="" nodes=1 gpus=0 partition="" time="" logs=""
command=${1:-}
case $command in
    stage | run | logs | delete) shift ;;
    "" | -h | --help)
        usage
        exit 0
        ;;
    *) die "got '$command'; expected stage, run, logs or delete. --help tells what they do." ;;
esac
read_options "name config nodes gpus partition time data logs" "dry-run" "$@"
needed --name "$name" "what job and logs are called"
check_name "$name"
check_count --nodes "$nodes"
[ "$gpus" = 0 ] || check_count --gpus "$gpus"
logs=${logs:-runs/launch/$name}

submit() {
    local queued words
    check_config "$config"
    [ "${#DATA[@]}" -eq 0 ] || die "--data belongs to the command stage; give paths behind --, as --data.pairs."
    [[ $logs != *%* ]] || die "--logs '$logs': expected a path without %, which Slurm replaces."
    [ -x "$PYTHON" ] || command -v "$PYTHON" > /dev/null || [ -n "$DRY" ] || die "no Python at $PYTHON: launch/local.sh install makes it, or set PYTHON."
    check_tools sbatch squeue
    queued=$(ask "" squeue --me "--name=$name" --noheader --format=%i) || die "squeue could not say what is queued: see above."
    [ -z "$queued" ] || die "job $name is there already ($queued); 'logs' shows it, 'delete' cancels it."
    several_processes "$((nodes * (gpus > 0 ? gpus : 1)))" 1 "$config"
    words=(sbatch "--job-name=$name" "--nodes=$nodes" --requeue --open-mode=append "--output=$logs/job.log")
    if [ "$gpus" = 0 ]; then words+=(--ntasks-per-node=1); else words+=("--ntasks-per-node=$gpus" "--gpus-per-node=$gpus"); fi
    run mkdir -p "$logs"
    run "${words[@]}" ${partition:+"--partition=$partition"} ${time:+"--time=$time"} \
        "--wrap=$(quoted srun --kill-on-bad-exit=1 --open-mode=append "--output=$logs/process-%t.log" \
            "$PYTHON" -m sera_jax.train --config "$config" ${joined[@]+"${joined[@]}"} ${TRAIN[@]+"${TRAIN[@]}"})" || die "the job was refused: see above."
}

case $command in
    stage)
        [ "${#DATA[@]}" -gt 0 ] || die "--data is missing: what to copy."
        check_data
        check_tools gcloud
        copy_from_buckets data
        ;;
    run) submit ;;
    logs)
        for log in "$logs"/*.log; do
            [ -f "$log" ] || die "no logs in $logs yet; squeue --me says whether the job waits."
            run tail -n 20 "$log"
        done
        ;;
    delete)
        check_tools scancel
        run scancel --me "--name=$name" || die "job $name could not be cancelled: see above."
        ;;
esac
