#!/usr/bin/env bash
# sera_jax on GKE: a JobSet on TPU node pools, one pool a slice; several slices are multi-slice. Or the same through XPK.
#
#   launch/gke.sh COMMAND --name NAME --cluster C --location L --type v5litepod-16 --disk gs://BUCKET --image I [options]
#                 [-- flags of sera_jax.train]
#
#   all       stage, create, train, fetch logs, delete: also when something failed
#   image     build launch/Dockerfile and push it as --image
#   create    one node pool a slice, in a cluster that is there
#   stage     copy every --data into data/ of the disk
#   run       apply launch/jobset.yaml and wait: status 0 = done, 1 = failed
#   resume    the same once more, after it failed or was deleted; a preempted slice comes back by itself
#   logs      fetch the logs of every pod into --logs
#   delete    the JobSet, and the node pools that create made
#
#   --cluster C, --location L   a GKE cluster in a region or zone, with JobSet (https://jobset.sigs.k8s.io), the Cloud
#                     Storage FUSE CSI driver and workload identity;   --zone Z: of the TPUs, if the location is a region
#   --config FILE     of the run; it is copied to the disk
#   --data PATH       file or folder here, gs://BUCKET/FILE, or gs://BUCKET/FOLDER/; may come several times
#   --disk PLACE      gs://BUCKET[/FOLDER]; every pod has it at /mnt/sera: data/ is what was staged, runs/NAME the run folder
#   --slices N        of --type each, 1 if not given; several hold copies (mesh.slices and mesh.data N, unless the config or
#                     a flag says otherwise)
#   --spot            preemptible, cheaper;   --reservation R: from it
#   --service-account S   of Kubernetes, that may read and write the bucket; default if not given
#   --tries N         restarts of the JobSet, 20 if not given. A run that fails by itself is restarted as often.
#   --project P       if it is not gcloud's default
#   --logs DIR        runs/launch/NAME if not given
#   --xpk             on a cluster that xpk made: xpk workload instead of kubectl apply; no create (xpk cluster create does it)
#   --dry-run         print every command and run none
#
# The disk is gcsfuse: what launch/tpu.sh says of it (hierarchical namespace, locks within one host) holds here. For
# Filestore put its volume into launch/jobset.yaml. xpk mounts with gcsfuse's own caching of names, which may hide from a
# host for a minute (on large machines for ever) what another one wrote: attach the bucket before with
# xpk storage attach NAME-disk --manifest, and metadata-cache:ttl-secs:0 in it.
#
# Known on paper only, for there is no cluster where this was written. Tests run it against stand-ins for gcloud, kubectl,
# docker and xpk that know the verbs and flags of their references, and read the JobSet as YAML:
# https://cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice, https://github.com/AI-Hypercomputer/xpk
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
MOUNT=/mnt/sera

name="" cluster="" location="" zone="" type="" disk="" image="" config="" project="" reservation="" slices=1 tries=20 logs=""
service_account=default spot="" xpk=""
command=${1:-}
case $command in
    all | image | create | stage | run | resume | logs | delete) shift ;;
    "" | -h | --help)
        usage
        exit 0
        ;;
    *) die "got '$command'; expected all, image, create, stage, run, resume, logs or delete. --help tells what they do." ;;
esac
read_options "name cluster location zone type disk image config data project reservation slices tries service-account logs" \
    "spot xpk dry-run" "$@"

# --- checks: all of them before the first command ----------------------------------------------------------------------

needed --name "$name" "what JobSet, node pools and run are called"
check_name "$name"
# The longest name that is made of it is a pod's, NAME-slice-0-0-xxxxx.
[ "${#name}" -le 30 ] || die "--name '$name': expected at most 30 letters, for the names of pods and node pools are longer."
logs=${logs:-runs/launch/$name}
check_count --slices "$slices"
check_count --tries "$tries"
[ -z "$zone" ] || [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "--zone '$zone': expected a zone such as us-west4-a."
[ -z "$spot" ] || [ -z "$reservation" ] || die "--spot and --reservation: expected one of them."
case $command in
    image | stage) ;;
    *)
        needed --cluster "$cluster" "the GKE cluster"
        [[ $cluster =~ ^[a-z][a-z0-9-]*$ ]] || die "--cluster '$cluster': expected small letters, digits and -."
        needed --location "$location" "the region or zone of the cluster, e.g. us-west4"
        [[ $location =~ ^[a-z]+-[a-z]+[0-9]+(-[a-z])?$ ]] || die "--location '$location': expected a region or zone such as us-west4."
        ;;
esac
case $command in
    all | stage | run | resume)
        check_disk "$disk"
        [ -n "$bucket" ] || die "--disk '$disk': expected gs://BUCKET[/FOLDER] here. For Filestore put its volume into launch/jobset.yaml."
        ;;
esac
case $command in
    all | create | run | resume)
        read_type "$type"
        if [ "$slices" -gt 1 ] && [ "$hosts" = 1 ]; then
            die "--slices $slices of $type: GKE takes several slices only of types with more than one host; expected e.g. v5litepod-16."
        fi
        ;;
esac
case $command in
    all | run | resume)
        check_config "$config"
        check_run_dir "$MOUNT"
        several_processes "$((hosts * slices))" "$slices" "$config"
        ;;
esac
case $command in
    all | image | run | resume)
        needed --image "$image" "where the container is, e.g. us-docker.pkg.dev/PROJECT/REPOSITORY/sera_jax:1 ('image' builds it)"
        [[ $image =~ ^[a-z0-9.:-]+(/[a-z0-9._-]+)+(:[A-Za-z0-9._-]+|@sha256:[0-9a-f]+)?$ ]] ||
            die "--image '$image': expected REGISTRY/PROJECT/REPOSITORY/NAME:TAG."
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
if [ -n "$xpk" ]; then
    [ -z "$spot$reservation" ] || die "--spot and --reservation belong to create; with --xpk they are given to xpk cluster create."
    [ "$command" != create ] || die "create with --xpk: xpk cluster create makes cluster and node pools in one; see https://github.com/AI-Hypercomputer/xpk."
    case $command in
        all | run | resume | delete)
            needed --zone "$zone" "of the TPUs, which xpk wants to know"
            [ -z "$folder" ] || die "--disk '$disk': xpk mounts whole buckets; expected gs://$bucket."
            ;;
    esac
fi
case $command in
    image) check_tools docker ;;
    stage) check_tools gcloud ;;
    *) check_tools gcloud kubectl ${xpk:+xpk} ;;
esac

# --- commands -----------------------------------------------------------------------------------------------------------

of_project=(${project:+"--project=$project"})
in_cluster=("--cluster=$cluster" "--location=$location" ${of_project[@]+"${of_project[@]}"})
of_xpk=("--cluster=$cluster" "--zone=$zone" ${of_project[@]+"${of_project[@]}"})
pods=jobset.sigs.k8s.io/jobset-name=$name

connect() {
    run gcloud container clusters get-credentials "$cluster" "--location=$location" ${of_project[@]+"${of_project[@]}"} ||
        die "cluster $cluster in $location cannot be reached: see above."
    run kubectl get crd jobsets.jobset.x-k8s.io --output=name ||
        die "cluster $cluster has no JobSet. Install it first: https://jobset.sigs.k8s.io/docs/installation/"
}

build() {
    run docker build "--file=$ROOT/launch/Dockerfile" "--tag=$image" "$ROOT" || die "the image could not be built: see above."
    run docker push "$image" || die "the image could not be pushed to $image: see above (gcloud auth configure-docker?)."
}

made=()    # node pools of this command
applied="" # a JobSet of this command

make_pools() {
    local k
    for ((k = 0; k < slices; k++)); do
        set -- gcloud container node-pools create "$name-$k" "${in_cluster[@]}" "--machine-type=$machine" "--num-nodes=$hosts"
        [ -z "$zone" ] || set -- "$@" "--node-locations=$zone"
        [ "$hosts" = 1 ] || set -- "$@" "--tpu-topology=$topology"
        [ -z "$spot" ] || set -- "$@" --spot
        [ -z "$reservation" ] || set -- "$@" --reservation-affinity=specific "--reservation=$reservation"
        made+=("$name-$k")
        run "$@" || {
            unset "made[$k]" # whoever has it, it is not of this command
            die "node pool $name-$k was refused: see above (quota? name in use? 'delete' gives back those that came)."
        }
    done
}

# A word → a string of JSON, which YAML reads.
json() {
    local word=$1
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//$'\n'/\\n}
    word=${word//$'\t'/\\t}
    printf '"%s"' "$word"
}

training=(python -m sera_jax.train "--config=$MOUNT/runs/$name.yaml" "--run.dir=$MOUNT/runs/$name"
    ${joined[@]+"${joined[@]}"} ${TRAIN[@]+"${TRAIN[@]}"})

manifest() {
    local text words="" word options="implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"
    [ -z "$folder" ] || options=$options,only-dir:$folder
    for word in "${training[@]}"; do words="$words${words:+, }$(json "$word")"; done
    text=$(sed '/^#/d' "$ROOT/launch/jobset.yaml")
    text=${text//@NAME@/"$name"}
    text=${text//@TRIES@/"$tries"}
    text=${text//@SLICES@/"$slices"}
    text=${text//@HOSTS@/"$hosts"}
    text=${text//@SERVICE_ACCOUNT@/"$service_account"}
    text=${text//@ACCELERATOR@/"$accelerator"}
    text=${text//@TOPOLOGY@/"$topology"}
    text=${text//@IMAGE@/"$image"}
    text=${text//@CHIPS_A_HOST@/"$chips_a_host"}
    text=${text//@BUCKET@/"$bucket"}
    text=${text//@MOUNT_OPTIONS@/"$options"}
    text=${text//@COMMAND@/"[$words]"}
    printf '%s\n' "$text"
}

begin() {
    applied=1
    run gcloud storage cp "$config" "gs://$bucket/${folder:+$folder/}runs/$name.yaml" || die "--config could not be copied to the disk: see above."
    if [ -z "$xpk" ]; then
        run_on "$(manifest)" kubectl apply --filename=- || die "the JobSet was refused: see above."
        return
    fi
    run xpk storage attach "$name-disk" "${of_xpk[@]}" --type=gcsfuse "--bucket=$bucket" --size=1000 "--mount-point=$MOUNT" \
        --readonly=false --auto-mount=true || die "the disk could not be attached: see above."
    run xpk workload create "--workload=$name" "${of_xpk[@]}" "--tpu-type=$type" "--num-slices=$slices" "--docker-image=$image" \
        "--max-restarts=$tries" --restart-on-user-code-failure "--command=cd /sera && $(quoted "${training[@]}")" ||
        die "the workload was refused: see above."
}

follow() {
    local out before="" silent=0
    while :; do
        if out=$(ask "Completed 0" kubectl get jobset "$name" '--output=jsonpath={.status.terminalState} {.status.restarts}'); then
            silent=0
            [ "$out" = "$before" ] || say "$name: ${out/#[ ]/running, restarts: }"
            before=$out
            case $out in
                Completed*) return 0 ;;
                Failed*) return 1 ;;
            esac
        else
            silent=$((silent + 1))
            if [ "$silent" -ge 10 ]; then
                say "kubectl could not say how $name is, $silent times"
                return 1
            fi
        fi
        pause
    done
}

train() {
    begin
    if follow; then
        say "$name is done: runs/$name/export on $disk"
    else
        say "$name failed: 'logs' fetches what the pods printed (those of earlier restarts are in Cloud Logging); 'resume' goes on"
        return 1
    fi
}

forget_job() {
    if [ -n "$xpk" ]; then
        run xpk workload delete "--workload=$name" "${of_xpk[@]}" --force
        run xpk storage detach "$name-disk" "${of_xpk[@]}"
    else
        run kubectl delete jobset "$name" --ignore-not-found
    fi
}

forget_pools() {
    local pool status=0
    for pool; do
        run gcloud container node-pools delete "$pool" "${in_cluster[@]}" --quiet || status=1
    done
    return "$status"
}

fetch_logs() {
    run mkdir -p "$logs"
    set -- kubectl logs "--selector=$pods" --all-containers --prefix --timestamps --tail=-1 --max-log-requests=1000
    if [ -n "$DRY" ]; then
        printf '%s > %s\n' "$(quoted "$@")" "$(quoted "$logs/pods.log")" >&3
    else
        say "+ $(quoted "$@") > $(quoted "$logs/pods.log")"
        "$@" > "$logs/pods.log"
    fi
}

everything() {
    copy_to_bucket
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap give_back EXIT
    [ -n "$xpk" ] || make_pools
    train
}

# Whatever happened, logs are fetched and the node pools are given back, since they cost money.
give_back() {
    local status=$?
    trap - EXIT INT TERM
    if [ -n "$applied" ]; then
        fetch_logs || say "the logs of $name could not be fetched"
        forget_job || say "the JobSet of $name could not be deleted"
    fi
    forget_pools ${made[@]+"${made[@]}"} ||
        say "WARNING: node pools of $name may still be there and cost money; look with: $(quoted gcloud container node-pools list "${in_cluster[@]}")"
    exit "$status"
}

case $command in
    image | stage) ;;
    *) connect ;;
esac
case $command in
    all) everything ;;
    image) build ;;
    create) make_pools ;;
    stage) copy_to_bucket ;;
    run) train ;;
    resume)
        forget_job || die "the last JobSet of $name could not be deleted: see above."
        train
        ;;
    logs) fetch_logs || die "the logs of $name could not be fetched: see above." ;;
    delete)
        status=0
        forget_job || status=1
        for ((k = 0; k < slices; k++)); do made+=("$name-$k"); done
        [ -n "$xpk" ] || forget_pools "${made[@]}" || status=1
        [ "$status" = 0 ] || die "something of $name may still be there: see above."
        ;;
esac
