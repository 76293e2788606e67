# shellcheck shell=bash
# shellcheck disable=SC2034  # what is set here is read by the scripts that source this file
# What the launch scripts share; they source it. Written for bash 3.2 (macOS) and later.
#
#   run WORDS...        runs a command and shows it; with --dry-run prints it, quoted so that it can be pasted
#   ask ANSWER WORDS... the same for a command whose output decides what comes next; ANSWER is what --dry-run goes on with
#   die TEXT            got, expected, what to do; status 2

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DRY=
DATA=()  # of --data, which may come several times
joined=() # see several_processes
TRAIN=() # what stands behind --: flags of sera_jax.train
POLL=${SERA_JAX_POLL:-30} # seconds between two looks at a machine
GONE=75                   # status of a run that was preempted and can go on
server=""                 # of an NFS share, see check_disk
exec 3>&1                 # commands of a dry run go here, also from within $(...)

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $*"
    exit 2
}

# Words → one line that a shell reads back as the same words.
quoted() {
    local word line="" quote="'" inside="'\\''"
    for word; do
        case $word in
            "" | *[!A-Za-z0-9_@%+=:,./-]*) word=$quote${word//$quote/$inside}$quote ;;
        esac
        line="$line${line:+ }$word"
    done
    printf '%s\n' "$line"
}

run() {
    if [ -n "$DRY" ]; then
        quoted "$@" >&3
    else
        say "+ $(quoted "$@")"
        "$@"
    fi
}

ask() {
    local answer=$1
    shift
    if [ -n "$DRY" ]; then
        quoted "$@" >&3
        printf '%s\n' "$answer"
    else
        "$@"
    fi
}

# run with a text on its standard input.
run_on() {
    local text=$1
    shift
    if [ -n "$DRY" ]; then
        printf "%s <<'END'\n%s\nEND\n" "$(quoted "$@")" "$text" >&3
    else
        say "+ $(quoted "$@") <<..."
        printf '%s\n' "$text" | "$@"
    fi
}

pause() { [ -n "$DRY" ] || sleep "$POLL"; }

# The comment that a script begins with.
usage() {
    awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
}

# read_options "names that take a value" "names that take none" ARGUMENTS...: sets the variable of each name (- becomes _),
# DATA and TRAIN.
read_options() {
    local valued=" $1 " bare=" $2 " key value
    shift 2
    while [ $# -gt 0 ]; do
        key=${1%%=*}
        case $1 in
            --)
                shift
                TRAIN=(${@+"$@"})
                return
                ;;
            --?*) key=${key#--} ;;
            *) die "got '$1'; expected options, and flags of sera_jax.train behind --. $(basename "$0") --help shows them." ;;
        esac
        # shellcheck disable=SC2086  # one word an option
        case $valued$bare in
            *" $key "*) ;;
            *) die "unknown option --$key; known here:$(printf ' --%s' $valued $bare). Flags of sera_jax.train go behind --." ;;
        esac
        if [ "${bare#* "$key" }" != "$bare" ]; then
            [ "$1" = "--$key" ] || die "--$key takes no value, got '$1'."
            value=1
        elif [ "$1" != "--$key" ]; then
            value=${1#*=}
        else
            [ $# -ge 2 ] || die "--$key got no value."
            value=$2
            shift
        fi
        shift
        if [ "$key" = data ]; then DATA+=("$value"); else printf -v "${key//-/_}" %s "$value"; fi
        [ "$key" != dry-run ] || DRY=1
    done
}

# --- checks, before anything is made ----------------------------------------------------------------------------------

needed() { # needed OPTION VALUE WHAT
    [ -n "$2" ] || die "$1 is missing: $3."
}

check_name() {
    [[ $1 =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
        die "--name '$1': expected at most 40 small letters, digits and -, a letter first, no - last (Google's names)."
}

check_count() { # check_count OPTION VALUE
    [[ $2 =~ ^[1-9][0-9]{0,3}$ ]] || die "$1 '$2': expected a whole number from 1."
}

check_config() {
    needed --config "$1" "the YAML of the run, e.g. configs/sera.yaml"
    [ -f "$1" ] || die "--config '$1' is no file here ($PWD)."
}

# A bucket gs://NAME[/FOLDER], or an NFS share HOST:/PATH (Filestore). Sets bucket and folder, or server and share.
check_disk() {
    bucket="" folder="" server="" share=""
    needed --disk "$1" "what all hosts share: gs://BUCKET[/FOLDER], or HOST:/PATH of an NFS share (Filestore)"
    if [[ $1 =~ ^gs://([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])(/([A-Za-z0-9._/-]*))?$ ]]; then
        bucket=${BASH_REMATCH[1]} folder=${BASH_REMATCH[3]%/}
    elif [[ $1 != gs:* && $1 =~ ^([A-Za-z0-9._-]+):(/[A-Za-z0-9._/-]+)$ ]]; then
        server=${BASH_REMATCH[1]} share=${BASH_REMATCH[2]}
    else
        die "--disk '$1': expected gs://BUCKET[/FOLDER] or HOST:/PATH, of letters, digits and . _ - / (no spaces: mount tables know none)."
    fi
}

check_data() {
    local source other name names=()
    for source in ${DATA[@]+"${DATA[@]}"}; do
        case $source in
            gs://?*/?*) ;;
            gs://*) die "--data '$source': expected gs://BUCKET/OBJECT, or gs://BUCKET/FOLDER/ with / last." ;;
            *) [ -e "$source" ] || die "--data '$source' is neither here ($PWD) nor gs://...; nothing was copied." ;;
        esac
        name=$(basename "$source")
        if [ -n "$server" ] && [[ $name = *[!A-Za-z0-9._-]* ]]; then
            die "--data '$source': expected a name of letters, digits and . _ - (scp to an NFS share splits others); rename it."
        fi
        for other in ${names[@]+"${names[@]}"}; do
            [ "$other" != "$name" ] || die "--data: two of them are called '$name' and would overwrite each other; rename one."
        done
        names+=("$name")
    done
}

# run.dir has to be on the disk: process 0 writes, all read, and a preempted machine loses what is its own.
check_run_dir() { # check_run_dir MOUNT
    local word before=""
    for word in ${TRAIN[@]+"${TRAIN[@]}"}; do
        [ "$before" != --run.dir ] || word="--run.dir=$word"
        case $word in
            --run.dir="$1"/*) ;;
            --run.dir=*) die "${word%%=*} '${word#*=}': expected a folder under $1, the disk that all hosts see and that outlives them." ;;
        esac
        before=$word
    done
}

check_tools() {
    local tool
    [ -z "$DRY" ] || return 0
    for tool; do
        command -v "$tool" > /dev/null || die "$tool is not on PATH. Install it first (or look with --dry-run, which needs none)."
    done
}

# Copies each --data, from here or from another bucket, into data/ of the bucket; needs no machine.
copy_to_bucket() {
    local source to
    for source in ${DATA[@]+"${DATA[@]}"}; do
        to=gs://$bucket/${folder:+$folder/}data/$(basename "$source")
        if [ -d "$source" ] || [ "${source%/}" != "$source" ]; then
            run gcloud storage rsync --recursive "$source" "$to" || die "'$source' could not be copied to $to: see above. Nothing was started."
        else
            run gcloud storage cp "$source" "$to" || die "'$source' could not be copied to $to: see above. Nothing was started."
        fi
    done
}

# Copies each --data that is in a bucket into a folder here.
copy_from_buckets() { # copy_from_buckets FOLDER
    local source
    run mkdir -p "$1"
    for source in ${DATA[@]+"${DATA[@]}"}; do
        case $source in
            gs://*/) run gcloud storage rsync --recursive "$source" "$1/$(basename "$source")" ;;
            gs://*) run gcloud storage cp "$source" "$1/$(basename "$source")" ;;
            *) say "$source is here already and is used where it is" ;;
        esac || die "'$source' could not be copied to $1: see above."
    done
}

# Flags for a run of several processes: each joins the others, and slices hold copies of the weights. What TRAIN says comes
# later and wins; a config that says slices has said its mesh.
several_processes() { # several_processes PROCESSES SLICES CONFIG
    joined=()
    if [ "$1" -gt 1 ]; then joined+=(--mesh.distributed=true); fi
    if [ "$2" -gt 1 ] && ! grep -Eq '^([^#]*[ {,])?slices *:' "$3"; then joined+=("--mesh.slices=$2" "--mesh.data=$2"); fi
}

# --- slices -----------------------------------------------------------------------------------------------------------

# A slice by its name → generation, chips, hosts, topology, and what Cloud TPU and GKE call them.
# v5litepod-N (or v5e-N) and v6e-N count chips; v4-N and v5p-N count TensorCores, two a chip.
# https://cloud.google.com/tpu/docs/supported-tpu-configurations, https://cloud.google.com/tpu/docs/runtimes,
# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
read_type() {
    local size
    needed --type "$1" "the slice, e.g. v5litepod-16, v6e-8, v4-32, v5p-16"
    type=${1/#v5e-/v5litepod-}
    generation=${type%-*} size=${type##*-}
    case $generation in
        v5litepod | v6e)
            case $size in
                1) topology=1x1 ;; 4) topology=2x2 ;; 8) topology=2x4 ;; 16) topology=4x4 ;; 32) topology=4x8 ;;
                64) topology=8x8 ;; 128) topology=8x16 ;; 256) topology=16x16 ;;
                *) die "--type '$1': expected $generation-1, 4, 8, 16, 32, 64, 128 or 256 (chips)." ;;
            esac
            chips=$size
            ;;
        v4 | v5p)
            case $size in
                8) topology=2x2x1 ;; 16) topology=2x2x2 ;; 32) topology=2x2x4 ;; 64) topology=2x4x4 ;; 128) topology=4x4x4 ;;
                256) topology=4x4x8 ;; 512) topology=4x8x8 ;; 1024) topology=8x8x8 ;;
                *) die "--type '$1': expected $generation-8, 16, 32, 64, 128, 256, 512 or 1024 (TensorCores, two a chip)." ;;
            esac
            chips=$((size / 2))
            ;;
        *) die "--type '$1': expected v4-N, v5litepod-N (v5e-N), v5p-N or v6e-N." ;;
    esac
    chips_a_host=4
    if [ "$chips" -lt 4 ]; then chips_a_host=$chips; fi
    if [ "$generation-$chips" = v5litepod-8 ] || [ "$generation-$chips" = v6e-8 ]; then chips_a_host=8; fi
    hosts=$((chips / chips_a_host))
    case $generation in
        v4) runtime=tpu-ubuntu2204-base accelerator=tpu-v4-podslice machine=ct4p-hightpu-4t ;;
        v5litepod) runtime=v2-alpha-tpuv5-lite accelerator=tpu-v5-lite-podslice machine=ct5lp-hightpu-${chips_a_host}t ;;
        v5p) runtime=v2-alpha-tpuv5 accelerator=tpu-v5p-slice machine=ct5p-hightpu-4t ;;
        v6e) runtime=v2-alpha-tpuv6e accelerator=tpu-v6e-slice machine=ct6e-standard-${chips_a_host}t ;;
    esac
}
