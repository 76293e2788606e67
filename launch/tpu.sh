#!/usr/bin/env bash
# sera_jax on Cloud TPU VMs by queued resources: one VM, a pod slice, or several slices (multi-slice).
#
#   launch/tpu.sh COMMAND --name NAME --zone ZONE --type v5litepod-16 --disk gs://BUCKET [options] [-- flags of sera_jax.train]
#
#   all       stage, create, install, train, again after each preemption, fetch logs, delete: also when something failed
#   create    ask for the slices and wait until they are there
#   install   source, Python, sera_jax and the disk on every host
#   stage     copy every --data into data/ of the disk
#   run       train on every host and wait: status 0 = done, 1 = failed, 75 = preempted
#   resume    what it takes to go on: ask again if the slices are gone, install, the same run
#   logs      fetch the log of every host into --logs
#   delete    give the slices back
#
#   --config FILE     of the run; it is sent to every host
#   --data PATH       file or folder here, gs://BUCKET/FILE, or gs://BUCKET/FOLDER/; may come several times
#   --disk PLACE      gs://BUCKET[/FOLDER] (by gcsfuse) or HOST:/PATH of an NFS share (Filestore); every host has it at
#                     /mnt/sera: data/ is what was staged, runs/NAME is the run folder
#   --slices N        of --type each, 1 if not given; several hold copies (mesh.slices and mesh.data N, unless the config or
#                     a flag says otherwise)
#   --spot            preemptible, cheaper;   --reserved: from a reservation
#   --project P       if it is not gcloud's default
#   --tries N         of all and resume: how often to ask again after a preemption, 20 if not given
#   --logs DIR        runs/launch/NAME if not given
#   --dry-run         print every command and run none
#
# The disk. run.dir has to be a file system that all processes see. On gcsfuse: (1) use a bucket with a hierarchical
# namespace (gcloud storage buckets create gs://B --uniform-bucket-level-access --enable-hierarchical-namespace): a
# checkpoint becomes whole by renaming its folder, which other buckets refuse for folders in folders; (2) file locks hold
# within one host only, so that run.lock refuses no second run from elsewhere: start a --name once. Filestore renames; its
# locks hold for all hosts with NFS 4.1 (zonal, regional) and within one with NFS 3 (basic), where the locks of a host that
# was preempted would stay for ever and are left out.
#
# Known on paper only, for there is no cloud where this was written: all of it but host.sh's start, status and stop. Tests
# run it against a stand-in for gcloud whose verbs and flags are those of Google's reference:
# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
MOUNT=/mnt/sera

name="" zone="" type="" disk="" config="" project="" slices=1 tries=20 logs="" spot="" reserved=""
command=${1:-}
case $command in
    all | create | install | stage | run | resume | logs | delete) shift ;;
    "" | -h | --help)
        usage
        exit 0
        ;;
    *) die "got '$command'; expected all, create, install, stage, run, resume, logs or delete. --help tells what they do." ;;
esac
read_options "name zone type disk config data project slices tries logs" "spot reserved dry-run" "$@"

# --- checks: all of them before the first command ----------------------------------------------------------------------

needed --name "$name" "what slices and run are called"
check_name "$name"
needed --zone "$zone" "where, e.g. us-west4-a"
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "--zone '$zone': expected a zone such as us-west4-a."
[ -z "$project" ] || [[ $project =~ ^([a-z0-9.-]+:)?[a-z][a-z0-9-]*$ ]] || die "--project '$project': expected a project id."
[ -z "$spot" ] || [ -z "$reserved" ] || die "--spot and --reserved: expected one of them."
check_count --slices "$slices"
check_count --tries "$tries"
logs=${logs:-runs/launch/$name}
case $command in logs | delete) ;; *) check_disk "$disk" ;; esac
case $command in
    all | create | run | resume) read_type "$type" ;;
esac
case $command in
    all | run | resume)
        check_config "$config"
        check_run_dir "$MOUNT"
        several_processes "$((hosts * slices))" "$slices" "$config"
        ;;
esac
case $command in
    stage)
        [ "${#DATA[@]}" -gt 0 ] || die "--data is missing: what to copy."
        check_data
        ;;
    all) check_data ;;
    *) [ "${#DATA[@]}" -eq 0 ] || die "--data belongs to the commands all and stage, got it with $command." ;;
esac
check_tools gcloud

# --- gcloud -------------------------------------------------------------------------------------------------------------

where=("--zone=$zone" ${project:+"--project=$project"})
qr=(gcloud compute tpus queued-resources)
package=${TMPDIR:-/tmp}/sera_jax-$name.tar.gz

on_every_host() { run "${qr[@]}" ssh "$name" --node=all --worker=all "--command=$1" --quiet "${where[@]}"; }

# state ANSWER-OF-A-DRY-RUN → WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, FAILED ..., or NONE.
state() {
    local out told=""
    if out=$(ask "$1" "${qr[@]}" describe "$name" "--format=value(state.state)" "${where[@]}" 2>&1); then
        told=$(grep -E '^[A-Z_]+$' <<< "$out" | tail -n 1) || true # beside what gcloud may have to remark
    elif [[ $out = *NOT_FOUND* ]]; then
        told=NONE
    fi
    [ -n "$told" ] || die "gcloud could not say how '$name' is: $out"
    echo "$told"
}

ordered="" # by this command

order() {
    local node=("--node-id=$name")
    [ "$slices" = 1 ] || node=("--node-count=$slices" "--node-prefix=$name")
    ordered=1
    run "${qr[@]}" create "$name" "${node[@]}" "--accelerator-type=$type" "--runtime-version=$runtime" \
        ${spot:+--spot} ${reserved:+--reserved} "${where[@]}" || {
        ordered="" # whoever has the name, it is not of this command
        die "$slices × $type in $zone was refused: see above (quota? name in use? then 'delete' or another --name)."
    }
}

# Status 0: the slices are there. 75: they were given and taken away again.
arrive() {
    local now before=""
    while :; do
        now=$(state ACTIVE) || exit 2
        [ "$now" = "$before" ] || say "$name: $now"
        before=$now
        case $now in
            ACTIVE) return 0 ;;
            FAILED | NONE) die "$name is $now and will not come: $(quoted "${qr[@]}" describe "$name" "${where[@]}") says why. 'delete' it, then ask for another type or zone." ;;
            SUSPENDING | SUSPENDED | DELETING) return "$GONE" ;;
        esac
        pause
    done
}

install() {
    run tar -czf "$package" --exclude=__pycache__ -C "$ROOT" sera_jax configs launch pyproject.toml README.md LICENSE
    run "${qr[@]}" scp "$package" "$name:sera_jax.tar.gz" --node=all --worker=all --quiet "${where[@]}" || return
    on_every_host "mkdir -p sera/src && tar -xzf sera_jax.tar.gz -C sera/src && bash sera/src/launch/host.sh install $(quoted "$disk")"
}

stage() {
    local source to
    if [ -n "$bucket" ]; then
        copy_to_bucket
        return
    fi
    for source in ${DATA[@]+"${DATA[@]}"}; do # an NFS share is reached through a host
        to=$MOUNT/data/$(basename "$source")
        case $source in
            gs://*/) set -- ssh "$name" "--command=$(quoted gcloud storage rsync --recursive "$source" "$to")" ;;
            gs://*) set -- ssh "$name" "--command=$(quoted gcloud storage cp "$source" "$to")" ;;
            *) set -- scp "$source" "$name:$to" --recurse ;;
        esac
        run "${qr[@]}" "$@" --node=0 --worker=0 --quiet "${where[@]}" || die "'$source' could not be copied to $to: see above."
    done
}

begin() {
    run "${qr[@]}" scp "$config" "$name:sera/config.yaml" --node=all --worker=all --quiet "${where[@]}" &&
        on_every_host "$(quoted bash sera/src/launch/host.sh start "$disk" --config ../config.yaml "--run.dir=$MOUNT/runs/$name" ${joined[@]+"${joined[@]}"} ${TRAIN[@]+"${TRAIN[@]}"})"
}

# Until every host is done. Status 1: one failed; 75: the slices are gone or a host was rebooted.
follow() {
    local all=$((hosts * slices)) silent=0 failed=0 now answer
    while :; do
        now=$(state ACTIVE) || now=UNKNOWN
        case $now in
            ACTIVE | UNKNOWN) ;;
            *) return "$GONE" ;;
        esac
        # A preemption fails the other hosts before it is known: look twice.
        if [ "$failed" -ge 2 ]; then
            halt
            return 1
        fi
        answer=$(ask "$(yes "sera_jax done" | head -n "$all")" "${qr[@]}" ssh "$name" --node=all --worker=all \
            "--command=bash sera/src/launch/host.sh status" --quiet "${where[@]}") || answer=""
        printf '%s\n' "$answer" | grep -v '^sera_jax ' >&2 || true
        if [ "$(grep -c 'sera_jax done' <<< "$answer" || true)" -ge "$all" ]; then return 0; fi
        case $answer in
            *"sera_jax failed"*) failed=$((failed + 1)) ;;
            *"sera_jax lost"* | *"sera_jax idle"*)
                halt
                return "$GONE"
                ;;
            "") silent=$((silent + 1)) ;;
            *) silent=0 failed=0 ;;
        esac
        if [ "$silent" -ge 10 ]; then
            say "no host of $name has answered $silent times"
            return 1
        fi
        pause
    done
}

# What still runs is waiting for hosts that have stopped, and a new start would leave it out.
halt() { on_every_host "bash sera/src/launch/host.sh stop" || true; }

train() {
    local status=0 now
    if begin; then
        follow || status=$?
    else
        now=$(state ACTIVE) || exit 2
        [ "$now" != ACTIVE ] || die "the run could not be started on every host of $name: see above ('install' first?)."
        status=$GONE
    fi
    case $status in
        0) say "$name is done: runs/$name/export on $disk" ;;
        "$GONE") say "$name was preempted or rebooted; 'resume' goes on" ;;
        *) say "$name failed: 'logs' fetches what each host printed" ;;
    esac
    return "$status"
}

forget() { run "${qr[@]}" delete "$name" --force --quiet "${where[@]}"; }

# resume STATE-OF-A-DRY-RUN: until the run is done or failed, or the slices were taken away --tries times.
resume() {
    local try status now=$1
    for ((try = 1; try <= tries; try++)); do
        now=$(state "$now") || exit 2
        status=0
        case $now in
            ACTIVE) ;;
            NONE) again ;;
            *)
                say "$name: $now; asking again ($try of $tries)"
                forget || die "$name could not be deleted: see above."
                again
                ;;
        esac
        if [ "$status" = 0 ]; then (train) || status=$?; fi
        [ "$status" = "$GONE" ] || return "$status"
        pause
    done
    say "$name was taken away $tries times; the run folder is whole, 'resume' goes on"
    return "$GONE"
}

# New slices, installed; sets status.
again() {
    order
    arrive || status=$?
    [ "$status" = 0 ] || return 0
    install && return 0
    now=$(state ACTIVE) || exit 2
    [ "$now" != ACTIVE ] || die "$name could not be installed: see above."
    status=$GONE
}

fetch_logs() {
    run mkdir -p "$logs"
    run "${qr[@]}" ssh "$name" --node=all --worker=all "--command=cat sera/run.log" "--output-directory=$logs" --quiet "${where[@]}"
}

everything() {
    local status=0
    [ -z "$bucket" ] || stage
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap give_back EXIT
    order
    arrive || status=$?
    if [ "$status" = 0 ]; then
        install || die "$name could not be installed: see above."
        [ -n "$bucket" ] || stage
        (train) || status=$?
    fi
    [ "$status" = "$GONE" ] || return "$status"
    resume SUSPENDED
}

# Whatever happened, logs are fetched and the slices are given back, since they cost money.
give_back() {
    local status=$?
    trap - EXIT INT TERM
    [ -n "$ordered" ] || exit "$status"
    fetch_logs || say "the logs of $name could not be fetched"
    forget || say "WARNING: $name may still be there and cost money; look with: $(quoted "${qr[@]}" list "${where[@]}")"
    exit "$status"
}

case $command in
    all) everything ;;
    create)
        order
        arrive || die "$name was taken away as soon as it was there; 'resume' asks again."
        ;;
    install) install || die "$name could not be installed: see above." ;;
    stage) stage ;;
    run) train ;;
    resume) resume SUSPENDED ;;
    logs) fetch_logs || die "the logs of $name could not be fetched: see above." ;;
    delete) forget ;;
esac
