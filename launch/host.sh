#!/usr/bin/env bash
# What launch/tpu.sh does on each host of a slice, through ssh. Everything is under ~/sera; the disk is at /mnt/sera.
#
#   host.sh install DISK           Python 3.12, sera_jax with libtpu in ~/sera/venv, the disk
#   host.sh mount DISK             the disk alone: gs://BUCKET[/FOLDER] by gcsfuse, HOST:/PATH by NFS
#   host.sh start DISK FLAGS...    python -m sera_jax.train FLAGS in the background, ~/sera/run.log; nothing if it runs
#   host.sh status                 one line "sera_jax STATE": idle, running, done, failed STATUS, lost (its process is gone
#                                  without a word: the host was rebooted); while it runs also the last line of the log
#   host.sh stop                   ends the run, which then can go on
#
# Tested here: start, status, stop, and what mount asks for. On paper only, as there is no TPU VM here: the rest.
set -euo pipefail
SERA=${SERA_JAX_HOME:-$HOME/sera}
MOUNT=${SERA_JAX_MOUNT:-/mnt/sera}
PYTHON=${PYTHON:-$SERA/venv/bin/python}

install_python() {
    # The TPU images come with Python 3.10, and sera_jax needs 3.11.
    python3 -m pip install --quiet --user uv
    [ -x "$SERA/venv/bin/python" ] || python3 -m uv venv --quiet --python 3.12 "$SERA/venv"
    python3 -m uv pip install --quiet --python "$SERA/venv/bin/python" "$SERA/src[tpu,judge]"
}

# A fresh VM may still be upgrading itself.
packages() {
    sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
    sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y "$@"
}

install_gcsfuse() {
    local list=/etc/apt/sources.list.d/gcsfuse.list key=/usr/share/keyrings/cloud.google.asc
    command -v gcsfuse > /dev/null && return
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" > /dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" | sudo tee "$list" > /dev/null
    packages fuse gcsfuse
}

# No caching of names: what process 0 writes, the others have to see. (On large machines gcsfuse keeps names for ever.)
mount_disk() {
    local disk=$1 bucket folder
    mountpoint -q "$MOUNT" && return
    sudo mkdir -p "$MOUNT"
    sudo chown "$(id -u):$(id -g)" "$MOUNT"
    case $disk in
        gs://*)
            bucket=${disk#gs://} folder=""
            case $bucket in */*) folder=${bucket#*/} bucket=${bucket%%/*} ;; esac
            install_gcsfuse
            gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 ${folder:+"--only-dir=${folder%/}"} "$bucket" "$MOUNT"
            ;;
        *)
            command -v mount.nfs > /dev/null || packages nfs-common
            # NFS 4.1 forgets the locks of a host that is gone, NFS 3 keeps them: there, none go to the server.
            sudo mount -t nfs -o rw,hard,actimeo=1,vers=4.1 "$disk" "$MOUNT" ||
                sudo mount -t nfs -o rw,hard,actimeo=1,vers=3,nolock "$disk" "$MOUNT"
            ;;
    esac
    mkdir -p "$MOUNT/runs" "$MOUNT/data"
}

# The process by its number and its start, so that another one with the same number is not taken for it.
born() { cut -d ' ' -f 22 "/proc/$1/stat" 2> /dev/null; }

running() {
    local pid start
    [ -f "$SERA/run.pid" ] || return 1
    read -r pid start < "$SERA/run.pid"
    [ "$(born "$pid")" = "$start" ]
}

state() {
    if running; then
        echo running
    elif [ -f "$SERA/run.status" ]; then
        local status
        status=$(cat "$SERA/run.status")
        if [ "$status" = 0 ]; then echo "done"; else echo "failed $status"; fi
    elif [ -f "$SERA/run.pid" ]; then
        echo lost
    else
        echo idle
    fi
}

start() {
    if running; then
        echo "sera_jax runs already on $(hostname)"
        return
    fi
    [ -x "$PYTHON" ] || { echo "error: no Python at $PYTHON on $(hostname): launch/tpu.sh install comes first" >&2; exit 2; }
    rm -f "$SERA/run.status" "$SERA/run.pid"
    cd "$SERA/src"
    # shellcheck disable=SC2016  # the inner shell expands them
    setsid bash -c 'echo "$$ $(cut -d " " -f 22 /proc/$$/stat)" > "$0/run.pid"
        status=0
        "$@" >> "$0/run.log" 2>&1 || status=$?
        echo "$status" > "$0/run.status"' "$SERA" "$PYTHON" -m sera_jax.train "$@" < /dev/null > /dev/null 2>&1 &
    until [ -s "$SERA/run.pid" ]; do sleep 0.1; done
    echo "sera_jax started on $(hostname)"
}

case ${1:-} in
    install)
        install_python
        mount_disk "$2"
        ;;
    mount) mount_disk "$2" ;;
    start)
        mount_disk "$2"
        shift 2
        start "$@"
        ;;
    status)
        echo "sera_jax $(state)"
        # Process 0 alone prints.
        if running && [ -s "$SERA/run.log" ]; then echo "$(hostname): $(tail -n 1 "$SERA/run.log" | tr '\r' '\n' | tail -n 1)"; fi
        ;;
    stop)
        if running; then
            read -r pid _ < "$SERA/run.pid"
            kill -TERM -- "-$pid"
            rm -f "$SERA/run.pid"
        fi
        ;;
    *)
        echo "error: got '${1:-}', expected install, mount, start, status or stop" >&2
        exit 2
        ;;
esac
