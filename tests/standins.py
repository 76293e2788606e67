"""Stand-ins for gcloud, kubectl, docker, xpk and Slurm, for tests/test_launch.py: called by one of these names.

Each knows the verbs and flags that the launch scripts may use, as their references have them, and refuses everything
else with status 2. $STANDINS is a folder: calls.jsonl gets a line a call; plays.json says what happens:

    states     what `describe` of a queued resource says, one after the other, the last one for ever
    hosts      what hosts answer to `host.sh status`, likewise; default: all are done
    terminal   what `kubectl get jobset` says, likewise
    fails      [regular expression of a command line, its message, how often]: status 1
    hangs      regular expression of a command line that never ends
"""

import json
import os
import pathlib
import re
import shlex
import sys
import time

FOLDER = pathlib.Path(os.environ.get("STANDINS", "."))
NAME, ZONE, REGION = r"[a-z][a-z0-9-]{0,62}", r"[a-z]+-[a-z]+\d-[a-z]", r"[a-z]+-[a-z]+\d(-[a-z])?"
PLACE = {"zone": ZONE, "project": r"[a-z][a-z0-9-]+"}
CLUSTER = {"cluster": NAME, "location": REGION, "project": r"[a-z][a-z0-9-]+"}
XPK = {"cluster": NAME, "zone": ZONE, "project": r"[a-z][a-z0-9-]+"}
ANY, NUMBER = r"(?s).+", r"[1-9]\d*"

# Verb → (positional arguments, flags with a value and what it may be, flags without one, flags that must be there).
VERBS = {
    "gcloud compute tpus queued-resources create": (
        [NAME],
        PLACE
        | {
            "node-id": NAME,
            "node-count": r"[2-9]|\d\d+",
            "node-prefix": NAME,
            "accelerator-type": r"(v4|v5p|v5litepod|v6e)-\d+",
            "runtime-version": r"tpu-ubuntu2204-base|v2-alpha-tpuv5-lite|v2-alpha-tpuv5|v2-alpha-tpuv6e",
        },
        {"spot", "reserved"},
        {"zone", "accelerator-type", "runtime-version"},
    ),
    "gcloud compute tpus queued-resources describe": ([NAME], PLACE | {"format": r"value\(.+\)"}, set(), {"zone"}),
    "gcloud compute tpus queued-resources delete": ([NAME], PLACE, {"force", "quiet"}, {"zone", "quiet"}),
    "gcloud compute tpus queued-resources ssh": (
        [NAME],
        PLACE | {"node": r"all|\d+", "worker": r"all|\d+", "command": ANY, "output-directory": ANY},
        {"quiet"},
        {"zone", "node", "worker", "command", "quiet"},
    ),
    "gcloud compute tpus queued-resources scp": (
        [r"(?!.*:).+", NAME + r":[\w./-]+"],
        PLACE | {"node": r"all|\d+", "worker": r"all|\d+"},
        {"recurse", "quiet"},
        {"zone", "node", "worker", "quiet"},
    ),
    "gcloud storage cp": ([ANY, ANY], {}, {"recursive"}, set()),
    "gcloud storage rsync": ([ANY, ANY], {}, {"recursive"}, {"recursive"}),
    "gcloud container clusters get-credentials": ([NAME], {"location": REGION, "project": ANY}, set(), {"location"}),
    "gcloud container node-pools create": (
        [r"[a-z][a-z0-9-]{0,38}[a-z0-9]"],
        CLUSTER
        | {
            "machine-type": r"ct4p-hightpu-4t|ct5lp-hightpu-[148]t|ct5p-hightpu-4t|ct6e-standard-[148]t",
            "num-nodes": NUMBER,
            "node-locations": ZONE,
            "tpu-topology": r"\d+x\d+(x\d+)?",
            "reservation-affinity": "specific",
            "reservation": NAME,
        },
        {"spot"},
        {"cluster", "location", "machine-type", "num-nodes"},
    ),
    "gcloud container node-pools delete": ([NAME], CLUSTER, {"quiet"}, {"cluster", "location", "quiet"}),
    "kubectl get crd": ([r"jobsets\.jobset\.x-k8s\.io"], {"output": "name"}, set(), set()),
    "kubectl get jobset": ([NAME], {"output": r"jsonpath=.+"}, set(), {"output"}),
    "kubectl apply": ([], {"filename": "-"}, set(), {"filename"}),
    "kubectl delete jobset": ([NAME], {}, {"ignore-not-found"}, set()),
    "kubectl logs": (
        [],
        {"selector": rf"jobset\.sigs\.k8s\.io/jobset-name={NAME}", "tail": "-1", "max-log-requests": NUMBER},
        {"all-containers", "prefix", "timestamps"},
        {"selector"},
    ),
    "docker build": ([ANY], {"file": ANY, "tag": r"[a-z0-9./_:-]+"}, set(), {"tag"}),
    "docker push": ([r"[a-z0-9./_:-]+"], {}, set(), set()),
    "xpk storage attach": (
        [NAME],
        XPK
        | {
            "type": "gcsfuse",
            "bucket": r"[a-z0-9._-]+",
            "size": NUMBER,
            "mount-point": "/.+",
            "readonly": "true|false",
            "auto-mount": "true|false",
        },
        set(),
        {"cluster", "type", "mount-point", "readonly", "auto-mount"},
    ),
    "xpk storage detach": ([NAME], XPK, set(), {"cluster"}),
    "xpk workload create": (
        [],
        XPK
        | {
            "workload": r"[a-z][a-z0-9-]{0,38}[a-z0-9]",
            "tpu-type": r"(v4|v5p|v5litepod|v6e)-\d+",
            "num-slices": NUMBER,
            "docker-image": ANY,
            "max-restarts": NUMBER,
            "command": ANY,
        },
        {"restart-on-user-code-failure"},
        {"workload", "cluster", "tpu-type", "command"},
    ),
    "xpk workload delete": ([], XPK | {"workload": NAME}, {"force"}, {"cluster", "workload", "force"}),
    "sbatch": (
        [],
        {
            "job-name": NAME,
            "nodes": NUMBER,
            "open-mode": "append",
            "output": ANY,
            "ntasks-per-node": NUMBER,
            "gpus-per-node": NUMBER,
            "partition": r"\w+",
            "time": r"[\d:-]+",
            "wrap": ANY,
        },
        {"requeue"},
        {"job-name", "wrap"},
    ),
    "squeue": ([], {"name": NAME, "format": r"%\w"}, {"me", "noheader"}, set()),
    "scancel": ([], {"name": NAME}, {"me"}, {"name"}),
}
CHIPS_A_HOST = {"v5litepod-1": 1, "v6e-1": 1, "v5litepod-8": 8, "v6e-8": 8}  # of the others 4


def refuse(message: str, status: int = 2) -> None:
    print(f"stand-in: {message}", file=sys.stderr)
    sys.exit(status)


def parsed(words: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """Verb, positional arguments, flags (value "" for those that take none)."""
    verb = next((v for v in VERBS if words[: len(v.split())] == v.split()), None)
    if verb is None:
        refuse(f"no such verb: {shlex.join(words)}")
    positional, valued, bare, needed = VERBS[verb]
    rest, found, flags = words[len(verb.split()) :], [], {}
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            found.append(word)
            continue
        key, _, value = word[2:].partition("=")
        if key in flags:
            refuse(f"--{key} twice: {shlex.join(words)}")
        if key in bare and "=" not in word:
            flags[key] = ""
        elif key in valued and "=" in word and re.fullmatch(valued[key], value):
            flags[key] = value
        else:
            refuse(f"{verb} takes no {word!r}")
    if len(found) != len(positional) or not all(map(re.fullmatch, positional, found)):
        refuse(f"{verb} takes {positional}, got {found}")
    if missing := needed - set(flags):
        refuse(f"{verb} needs {sorted(missing)}")
    return verb, found, flags


def play(name: str, default: list) -> object:
    """The next of plays.json's `name`; the last one stays."""
    plays = json.loads((FOLDER / "plays.json").read_text())
    left = plays.get(name, default)
    if len(left) > 1:
        (FOLDER / "plays.json").write_text(json.dumps({**plays, name: left[1:]}))
    return left[0]


def misfortunes(line: str) -> None:
    plays = json.loads((FOLDER / "plays.json").read_text())
    if "hangs" in plays and re.search(plays["hangs"], line):
        (FOLDER / "hanging").touch()
        time.sleep(600)
    for fail in plays.get("fails", []):
        if fail[2] > 0 and re.search(fail[0], line):
            fail[2] -= 1
            (FOLDER / "plays.json").write_text(json.dumps(plays))
            refuse(fail[1], 1)


def queued_resource(verb: str, found: list[str], flags: dict[str, str]) -> None:
    """create, describe, delete, ssh, scp of one queued resource; $STANDINS/there.json is the one that exists."""
    there = FOLDER / "there.json"
    if verb == "create":
        if ("node-id" in flags) == ("node-count" in flags) or ("node-count" in flags) != ("node-prefix" in flags):
            refuse("expected --node-id, or --node-count with --node-prefix")
        if there.exists():
            refuse("ERROR: ALREADY_EXISTS: Resource already exists", 1)
        of_type = flags["accelerator-type"]
        chips = int(of_type.split("-")[1]) // (2 if of_type[:3] in ("v4-", "v5p") else 1)
        hosts = max(1, chips // CHIPS_A_HOST.get(of_type, 4)) * int(flags.get("node-count", 1))
        there.write_text(json.dumps({"name": found[0], "hosts": hosts, "state": "CREATING"}))
        return
    name = found[-1].split(":")[0] if verb == "scp" else found[0]
    if not there.exists() or json.loads(there.read_text())["name"] != name:
        refuse(f"ERROR: (gcloud.compute.tpus.queued-resources.{verb}) NOT_FOUND: Resource {name} was not found", 1)
    resource = json.loads(there.read_text())
    if verb == "describe":
        resource["state"] = play("states", ["ACTIVE"])
        there.write_text(json.dumps(resource))
        print(resource["state"])
    elif verb == "delete":
        if resource["state"] == "ACTIVE" and "force" not in flags:
            refuse("ERROR: FAILED_PRECONDITION: it has nodes", 1)
        there.unlink()
    elif resource["state"] != "ACTIVE":
        refuse(f"ERROR: {name} is {resource['state']}: no node to connect to", 1)
    elif verb == "scp":
        if not os.path.exists(found[0]):
            refuse(f"{found[0]}: No such file or directory", 1)
        if os.path.isdir(found[0]) and "recurse" not in flags:
            refuse(f"{found[0]} is a folder", 1)
    elif flags["command"].endswith("host.sh status"):
        answers = play("hosts", [["sera_jax done"] * resource["hosts"]])
        print("\n".join(answers))


def jobset(text: str) -> None:
    """Reads the JobSet as a cluster would, as far as the launch scripts are concerned."""
    import yaml

    made = yaml.safe_load(text)
    if (made["apiVersion"], made["kind"]) != ("jobset.x-k8s.io/v1alpha2", "JobSet"):
        refuse(f"no matches for kind {made['kind']} in {made['apiVersion']}", 1)
    (FOLDER / "jobset.json").write_text(json.dumps(made))


def main() -> None:
    tool = pathlib.Path(sys.argv[0]).name
    words = [tool, *sys.argv[1:]]
    text = sys.stdin.read() if words[:2] == ["kubectl", "apply"] else ""
    with open(FOLDER / "calls.jsonl", "a") as calls:
        calls.write(json.dumps({"words": words, "input": text}) + "\n")
    if tool in ("tar", "mkdir"):  # they are what they are
        os.execv(f"/bin/{tool}", words)
    verb, found, flags = parsed(words)
    misfortunes(shlex.join(words))
    if "command" in flags:
        shlex.split(flags["command"])
    if verb.startswith("gcloud compute tpus queued-resources "):
        queued_resource(verb.split()[-1], found, flags)
    elif verb in ("gcloud storage cp", "gcloud storage rsync"):
        if not any(place.startswith("gs://") for place in found):
            refuse(f"expected a bucket among {found}", 1)
        if not found[0].startswith("gs://") and not os.path.exists(found[0]):
            refuse(f"{found[0]}: no such file", 1)
    elif verb == "kubectl apply":
        jobset(text)
    elif verb == "kubectl get jobset":
        print(play("terminal", ["Completed 0"]))
    elif verb == "kubectl logs":
        print("[pod/slice-0-0] epoch")
    elif verb == "squeue":
        print(play("queue", [""]))


if __name__ == "__main__":
    main()
