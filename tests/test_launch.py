"""launch/: each script against stand-ins for the clouds' tools (tests/standins.py); host.sh and local.sh for real."""

import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
TOOLS = ("gcloud", "kubectl", "docker", "xpk", "sbatch", "squeue", "scancel", "tar", "mkdir")
QR = "gcloud compute tpus queued-resources"


class Cloud:
    """A folder to work in, with stand-ins first on PATH."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.state = folder, folder / "standins"
        self.bin = self.state / "bin"
        self.bin.mkdir(parents=True)
        (self.state / "tmp").mkdir()
        standins = (ROOT / "tests" / "standins.py").read_text()
        for tool in TOOLS:
            (self.bin / tool).write_text(f"#!{sys.executable} {'-E' if tool == 'kubectl' else '-ES'}\n{standins}")
            (self.bin / tool).chmod(0o755)
        (folder / "a run.yaml").write_text("run: {dir: x}\n")
        (folder / "my pairs.jsonl").write_text("{}\n")
        (folder / "model").mkdir()
        self.plays()

    def plays(self, **what: object) -> None:
        (self.state / "plays.json").write_text(json.dumps(what))

    def there(self, hosts: int = 4, name: str = "my-run", state: str = "ACTIVE") -> None:
        """A queued resource that exists already."""
        (self.state / "there.json").write_text(json.dumps({"name": name, "hosts": hosts, "state": state}))

    @property
    def environment(self) -> dict[str, str]:
        own = {"STANDINS": str(self.state), "SERA_JAX_POLL": "0", "TMPDIR": str(self.state / "tmp")}
        return {**os.environ, **own, "PATH": f"{self.bin}:{os.environ['PATH']}"}

    def run(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(LAUNCH / script), *words],
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=900,
        )

    def calls(self) -> list[list[str]]:
        """Since the last look."""
        file = self.state / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        self.inputs = [json.loads(line)["input"] for line in lines]
        return [json.loads(line)["words"] for line in lines]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def verbs(calls: list[list[str]]) -> list[str]:
    """What was called, without flags: "create my-run", "ssh my-run: host.sh start" ..."""
    told = []
    for words in calls:
        line = shlex.join(words)
        short = line.removeprefix(QR + " ") if line.startswith(QR) else line
        step = re.search(r"host\.sh \w+|cat sera/run\.log", short)
        plain = [w for w in shlex.split(short) if not w.startswith("-")]
        told.append(f"{plain[0]}: {step[0]}" if step else " ".join(plain[:2]))
    return told


PLACE = ("--name", "my-run", "--zone", "us-west4-a")
TPU = (*PLACE, "--type", "v5litepod-16", "--disk", "gs://bucket/some", "--config", "a run.yaml")
GKE = ("--name", "my-run", "--cluster", "c", "--location", "us-west4", "--zone", "us-west4-a", "--type", "v6e-16")
GKE += ("--disk", "gs://bucket", "--image", "us-docker.pkg.dev/p/r/sera_jax:1", "--config", "a run.yaml")
FLAGS = ("--", "--model.path", "/mnt/sera/data/m y", "--data.pairs", r"""[/mnt/sera/data/it's "x" & \\d $HOME.jsonl]""")
GIVEN = ("--data", "my pairs.jsonl", "--data", "model", "--data", "gs://other/set/", "--data=gs://other/x.jsonl")
BEGIN = ["scp a run.yaml", "ssh: host.sh start"]
NEW = ["create my-run", "describe my-run", "tar sera_jax", "scp sera_jax", "ssh: host.sh install"]
LOOK = ["describe my-run", "ssh: host.sh status"]
END = ["mkdir runs/launch/my-run", "ssh: cat sera/run.log", "delete my-run"]


def shown(calls: list[list[str]]) -> list[str]:
    """verbs, with the archive's name, which is long, left out."""
    return [re.sub("^(scp|tar) .*/sera_jax-my-run.tar.gz", r"\1 sera_jax", told) for told in verbs(calls)]


# --- what they are ----------------------------------------------------------------------------------------------------


def test_shellcheck_finds_nothing():
    beside = pathlib.Path(sys.executable).parent
    shellcheck = shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if not shellcheck:
        pytest.skip("no shellcheck here (pip install -e '.[dev]', or apt-get install shellcheck)")
    scripts = sorted(map(str, LAUNCH.glob("*.sh")))
    # SC2153 takes LABELS of worlds.sh for a misspelling of the loop's variable.
    found = subprocess.run(
        [shellcheck, "-x", "-e", "SC2153", *scripts], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", ["local", "tpu", "gke", "slurm"])
def test_a_script_tells_what_it_does_and_what_was_never_run(script, cloud):
    told = cloud.run(f"{script}.sh", "--help")
    assert told.returncode == 0 and told.stdout.startswith("sera_jax on ") and "--dry-run" in told.stdout
    assert re.search("[Oo]n paper only", told.stdout)
    wrong = cloud.run(f"{script}.sh", "fly")
    assert wrong.returncode == 2 and "got 'fly'; expected " in wrong.stderr and not cloud.calls()


def test_what_is_printed_is_read_back_as_the_same_words(cloud):
    """By a shell and by shlex: whatever the words hold."""
    words = ["a", "", "a b", "it's", '"', "\\", "$HOME", "`x`", "a\nb", "ü", "*", "~", "&;|", "-x=1,2"]
    script = f'. {shlex.quote(str(LAUNCH / "common.sh"))}; quoted "$@"'
    line = subprocess.run(["bash", "-c", script, "x", *words], capture_output=True, text=True, check=True).stdout
    assert shlex.split(line) == words
    again = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True).stdout
    assert again.split("\0")[:-1] == words


# --- dry runs ---------------------------------------------------------------------------------------------------------

DRY = {
    "tpu all": ("tpu.sh", "all", *TPU, *GIVEN, "--slices", "2", "--spot", "--project", "p-1", *FLAGS),
    "tpu all, Filestore": ("tpu.sh", "all", *TPU, "--disk=10.0.0.2:/share", "--data", "model", *FLAGS),
    "tpu create": ("tpu.sh", "create", *TPU, "--reserved"),
    "tpu install": ("tpu.sh", "install", *TPU),
    "tpu stage": ("tpu.sh", "stage", *TPU, *GIVEN),
    "tpu run": ("tpu.sh", "run", *TPU, *FLAGS),
    "tpu resume": ("tpu.sh", "resume", *TPU, *FLAGS),
    "tpu logs": ("tpu.sh", "logs", *PLACE, "--logs", "my logs"),
    "tpu delete": ("tpu.sh", "delete", *PLACE),
    "gke all": ("gke.sh", "all", *GKE, *GIVEN, "--slices", "2", "--spot", "--project", "p-1", *FLAGS),
    "gke all, xpk": ("gke.sh", "all", "--xpk", *GKE, *GIVEN, "--slices", "2", *FLAGS),
    "gke image": ("gke.sh", "image", *GKE),
    "gke create": ("gke.sh", "create", *GKE, "--reservation", "mine"),
    "gke stage": ("gke.sh", "stage", *GKE, *GIVEN),
    "gke run": ("gke.sh", "run", *GKE, *FLAGS),
    "gke resume": ("gke.sh", "resume", *GKE, *FLAGS),
    "gke logs": ("gke.sh", "logs", *GKE, "--logs", "my logs"),
    "gke delete": ("gke.sh", "delete", *GKE, "--slices", "2"),
    "slurm stage": ("slurm.sh", "stage", "--name", "my-run", *GIVEN),
    "slurm run": ("slurm.sh", "run", "--name", "my-run", "--config", "a run.yaml", "--gpus", "8", *FLAGS),
    "slurm delete": ("slurm.sh", "delete", "--name", "my-run"),
    "local stage": ("local.sh", "stage", *GIVEN),
}


def commands(printed: str) -> tuple[list[list[str]], list[str]]:
    """The commands of a dry run and the texts that go into them."""
    found, texts, lines = [], [], iter(printed.splitlines())
    for line in lines:
        if line.endswith(" <<'END'"):
            line = line.removesuffix(" <<'END'")
            texts.append("\n".join(iter(lines.__next__, "END")) + "\n")
        words = shlex.split(line)
        found.append(words[: words.index(">")] if ">" in words else words)
    return found, texts


@pytest.mark.parametrize("words", DRY.values(), ids=DRY)
def test_a_dry_run_prints_what_a_real_one_calls_and_calls_nothing(words, cloud):
    at = words.index("--") if "--" in words else len(words)
    dry = cloud.run(*words[:at], "--dry-run", *words[at:])
    assert dry.returncode == 0, dry.stderr
    assert not cloud.calls() and not (cloud.folder / "runs").exists() and not (cloud.folder / "my logs").exists()
    printed, texts = commands(dry.stdout)
    assert printed
    there = {"tpu install", "tpu run", "tpu logs", "tpu delete", "tpu resume"}
    if f"{words[0][:-3]} {words[1]}" in there:
        cloud.there()
    if words[1] == "resume":
        cloud.plays(states=["SUSPENDED", "ACTIVE"])
    real = cloud.run(*words, PYTHON=sys.executable)
    assert real.returncode == 0, real.stderr
    # A dry run knows no interpreter to look for.
    same = lambda call: [word.replace(str(ROOT / ".venv/bin/python"), sys.executable) for word in call]
    assert [same(call) for call in printed] == cloud.calls()
    assert texts == [text for text in cloud.inputs if text]


def test_a_dry_run_can_be_pasted(cloud):
    """bash runs what was printed; the stand-ins get the same calls."""
    words = ("gke.sh", "all", *GKE, *GIVEN, "--slices", "2")
    cloud.run(*words, *FLAGS)
    calls = cloud.calls()
    inputs = cloud.inputs
    printed = cloud.run(*words, "--dry-run", *FLAGS).stdout
    subprocess.run(["bash", "-e", "-c", printed], cwd=cloud.folder, env=cloud.environment, check=True)
    assert cloud.calls() == calls and cloud.inputs == inputs
    assert (cloud.folder / "runs/launch/my-run/pods.log").read_text() == "[pod/slice-0-0] epoch\n"


# --- TPU VMs ----------------------------------------------------------------------------------------------------------


def test_tpu_all_does_everything_in_order(cloud):
    cloud.plays(states=["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    done = cloud.run("tpu.sh", "all", *TPU, *GIVEN, "--slices", "2", "--spot", *FLAGS)
    assert done.returncode == 0, done.stderr
    calls = cloud.calls()
    staged = ["gcloud storage"] * 4
    waited = [NEW[0], *["describe my-run"] * 4, *NEW[2:]]
    assert shown(calls) == [*staged, *waited, *BEGIN, *LOOK, *END]
    assert [call[2:] for call in calls[:4]] == [
        ["cp", "my pairs.jsonl", "gs://bucket/some/data/my pairs.jsonl"],
        ["rsync", "--recursive", "model", "gs://bucket/some/data/model"],
        ["rsync", "--recursive", "gs://other/set/", "gs://bucket/some/data/set"],
        ["cp", "gs://other/x.jsonl", "gs://bucket/some/data/x.jsonl"],
    ]
    assert set(calls[4][6:]) == {
        "--node-count=2",
        "--node-prefix=my-run",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
        "--zone=us-west4-a",
    }
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
        assert done.stderr.count(f"my-run: {state}\n") == 1
    assert "my-run is done: runs/my-run/export on gs://bucket/some" in done.stderr
    # What was sent is the source: it can be unpacked and holds what a host needs.
    archive = cloud.state / "tmp" / "sera_jax-my-run.tar.gz"
    names = subprocess.run(["tar", "-tzf", str(archive)], capture_output=True, text=True, check=True).stdout.split()
    assert {"launch/host.sh", "sera_jax/train/__main__.py", "pyproject.toml"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]


def test_a_flag_arrives_on_a_host_as_it_was_given(cloud):
    """Spaces, quotes and all, through the shell here and the one there."""
    cloud.there()
    assert cloud.run("tpu.sh", "run", *TPU, *FLAGS).returncode == 0
    start = next(call for call in cloud.calls() if any("host.sh start" in word for word in call))
    there = shlex.split(next(word for word in start if word.startswith("--command=")).removeprefix("--command="))
    assert there == [
        *("bash", "sera/src/launch/host.sh", "start", "gs://bucket/some"),
        *("--config", "../config.yaml", "--run.dir=/mnt/sera/runs/my-run", "--mesh.distributed=true", *FLAGS[1:]),
    ]


@pytest.mark.parametrize(
    "config, words, mesh",
    [
        ("run: {dir: x}", ("--type=v6e-8",), []),
        ("run: {dir: x}", ("--type=v6e-16",), ["--mesh.distributed=true"]),
        (
            "run: {dir: x}\n# slices: many",
            ("--slices=3", "--", "--mesh.data=6"),
            ["--mesh.distributed=true", "--mesh.slices=3", "--mesh.data=3", "--mesh.data=6"],
        ),
        ("mesh: {data: 4, slices: 2}", ("--slices=2",), ["--mesh.distributed=true"]),
        ("mesh:\n  slices: 2", ("--slices=2",), ["--mesh.distributed=true"]),
    ],
)
def test_several_hosts_are_one_run_and_slices_hold_copies(config, words, mesh, cloud):
    (cloud.folder / "a run.yaml").write_text(config)
    at = words.index("--") if "--" in words else len(words)
    ran = cloud.run("tpu.sh", "run", *TPU, *words[:at], "--dry-run", *words[at:])
    start = next(line for line in ran.stdout.splitlines() if "host.sh start" in line)
    assert re.findall(r"--mesh\.[\w.=]+", start) == mesh


def test_a_preempted_run_says_so_and_resume_goes_on_with_the_same_command(cloud):
    cloud.there()
    running = ["sera_jax running", "sera_jax running", "host-0: iteration 1: 20/60", "sera_jax running"]
    cloud.plays(states=["ACTIVE", "ACTIVE", "SUSPENDING"], hosts=[running])
    run = cloud.run("tpu.sh", "run", *TPU, *FLAGS)
    assert run.returncode == 75 and "my-run was preempted or rebooted; 'resume' goes on" in run.stderr
    assert "host-0: iteration 1: 20/60\n" in run.stderr
    first = cloud.calls()
    assert shown(first) == [*BEGIN, *LOOK, *LOOK, "describe my-run"]
    # Taken away once more while it is being given, and once more while it runs.
    cloud.there(state="SUSPENDED")
    answers = [running, ["sera_jax done"] * 4]
    states = ["SUSPENDED", "PROVISIONING", "SUSPENDED", "SUSPENDED", "ACTIVE", "ACTIVE", "FAILED", "FAILED", "ACTIVE"]
    cloud.plays(states=states, hosts=answers)
    again = cloud.run("tpu.sh", "resume", *TPU, *FLAGS)
    assert again.returncode == 0, again.stderr
    assert "my-run: SUSPENDED; asking again (1 of 20)" in again.stderr and "(3 of 20)" in again.stderr
    calls = cloud.calls()
    given_up = ["describe my-run", "delete my-run", "create my-run", "describe my-run", "describe my-run"]
    whole = ["describe my-run", "delete my-run", *NEW, *BEGIN, *LOOK]
    assert shown(calls) == [*given_up, *whole, "describe my-run", *whole]
    starts = [call for call in (*first, *calls) if any("host.sh start" in word for word in call)]
    assert len(starts) == 3 and starts[0] == starts[1] == starts[2]


def test_all_goes_on_after_a_preemption_and_gives_back_at_the_end(cloud):
    cloud.plays(
        states=["ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"],
        hosts=[["sera_jax running"] * 4, ["sera_jax done"] * 4],
    )
    done = cloud.run("tpu.sh", "all", *TPU)
    assert done.returncode == 0, done.stderr
    again = ["describe my-run", "describe my-run", "delete my-run", *NEW, *BEGIN, *LOOK]
    assert shown(cloud.calls()) == [*NEW, *BEGIN, *LOOK, *again, *END]


def test_tries_end(cloud):
    cloud.there(state="SUSPENDED")
    cloud.plays(states=["SUSPENDED"])
    ended = cloud.run("tpu.sh", "resume", *TPU, "--tries", "3")
    assert ended.returncode == 75 and "my-run was taken away 3 times" in ended.stderr
    assert shown(cloud.calls()).count("create my-run") == 3


def test_a_rebooted_host_ends_the_others_and_resume_starts_all_again_where_they_are(cloud):
    cloud.there()
    lost = ["sera_jax running", "sera_jax lost", "sera_jax running", "sera_jax running"]
    cloud.plays(hosts=[lost, ["sera_jax done"] * 4])
    done = cloud.run("tpu.sh", "resume", *TPU)
    assert done.returncode == 0, done.stderr
    look = ["describe my-run", *BEGIN, *LOOK]
    assert shown(cloud.calls()) == [*look, "ssh: host.sh stop", *look]


def test_a_host_that_fails_because_another_was_preempted_is_no_failure(cloud):
    cloud.there()
    cloud.plays(
        states=["ACTIVE", "SUSPENDED"], hosts=[["sera_jax failed 1", "sera_jax running", *["sera_jax running"] * 2]]
    )
    assert cloud.run("tpu.sh", "run", *TPU).returncode == 75


def test_a_failed_run_is_told_and_given_back(cloud):
    cloud.plays(hosts=[["sera_jax failed 1", "sera_jax running", "sera_jax running", "sera_jax running"]])
    failed = cloud.run("tpu.sh", "all", *TPU)
    assert failed.returncode == 1 and "my-run failed: 'logs' fetches what each host printed" in failed.stderr
    look = [*LOOK, *LOOK, "describe my-run", "ssh: host.sh stop"]
    assert shown(cloud.calls()) == [*NEW, *BEGIN, *look, *END]


def test_hosts_that_do_not_answer_are_asked_again_but_not_for_ever(cloud):
    cloud.there()
    cloud.plays(fails=[["host.sh status", "ssh: timeout", 9]])
    assert cloud.run("tpu.sh", "run", *TPU).returncode == 0
    cloud.plays(fails=[["host.sh status", "ssh: timeout", 10]])
    silent = cloud.run("tpu.sh", "run", *TPU)
    assert silent.returncode == 1 and "no host of my-run has answered 10 times" in silent.stderr


BROKEN = {
    # what fails: (its calls before the end, message, status)
    "gcloud storage cp": ("stage", "'my pairs.jsonl' could not be copied to gs://bucket/some/data/my pairs.jsonl", 2),
    "queued-resources create": ("create my-run", "1 × v5litepod-16 in us-west4-a was refused: see above (quota?", 2),
    "host.sh install": ("ssh: host.sh install", "my-run could not be installed: see above.", 2),
    "host.sh start": ("ssh: host.sh start", "the run could not be started on every host of my-run: see above", 2),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_stage_that_fails_says_so_and_leaves_nothing_that_costs_money(what, cloud):
    last, message, status = BROKEN[what]
    cloud.plays(fails=[[what, "ERROR: the tool's own words", 1]])
    failed = cloud.run("tpu.sh", "all", *TPU, "--data", "my pairs.jsonl")
    assert failed.returncode == status
    assert f"error: {message}" in failed.stderr and "the tool's own words" in failed.stderr
    calls = shown(cloud.calls())
    if what == "gcloud storage cp":
        assert calls == ["gcloud storage"]
    elif what == "queued-resources create":
        assert calls == ["gcloud storage", "create my-run"]  # whoever has the name keeps it
    else:
        assert last in calls and calls[-3:] == END and not (cloud.state / "there.json").exists()


def test_a_cloud_that_cannot_say_how_it_is(cloud):
    """While slices are asked for that ends it; while a run goes on, it is asked again."""
    cloud.plays(states=["remark: upgrade me"])
    lost = cloud.run("tpu.sh", "create", *TPU)
    assert lost.returncode == 2 and "gcloud could not say how 'my-run' is: remark: upgrade me" in lost.stderr
    cloud.there()
    cloud.plays(fails=[["describe", "UNAVAILABLE", 2]], hosts=[["sera_jax running"] * 4, ["sera_jax done"] * 4])
    assert cloud.run("tpu.sh", "run", *TPU).returncode == 0


def test_all_leaves_alone_what_was_there_before(cloud):
    cloud.there()
    taken = cloud.run("tpu.sh", "all", *TPU)
    assert taken.returncode == 2 and "ALREADY_EXISTS" in taken.stderr and "another --name" in taken.stderr
    assert shown(cloud.calls()) == ["create my-run"] and (cloud.state / "there.json").exists()


def test_what_cannot_be_given_back_is_shouted(cloud):
    cloud.plays(fails=[["queued-resources delete", "ERROR: INTERNAL", 1]])
    done = cloud.run("tpu.sh", "all", *TPU)
    assert (
        "WARNING: my-run may still be there and cost money; look with: " + QR + " list --zone=us-west4-a" in done.stderr
    )


@pytest.mark.parametrize(
    "script, words, hangs", [("tpu.sh", TPU, "host.sh status"), ("gke.sh", GKE, "kubectl get jobset")]
)
def test_an_interrupted_all_gives_back(script, words, hangs, cloud):
    cloud.plays(hangs=hangs)
    process = subprocess.Popen(
        [str(LAUNCH / script), "all", *words],
        cwd=cloud.folder,
        env=cloud.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for _ in range(600):
        if (cloud.state / "hanging").exists():
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # as a terminal's Ctrl-C, to all of them
    assert process.wait(60) == 143
    last = cloud.calls()[-1]
    assert "delete" in last and "my-run" in " ".join(last)


# --- bad questions ----------------------------------------------------------------------------------------------------

BAD = [
    ("tpu.sh", ("run", *TPU[2:]), "--name is missing: what slices and run are called."),
    ("tpu.sh", ("run", *TPU, "--name", "My Run"), "--name 'My Run': expected at most 40 small letters, digits and -"),
    ("tpu.sh", ("run", *TPU, "--zone", "us-west4"), "--zone 'us-west4': expected a zone such as us-west4-a."),
    (
        "tpu.sh",
        ("run", *TPU, "--type", "v5e-12"),
        "--type 'v5e-12': expected v5litepod-1, 4, 8, 16, 32, 64, 128 or 256",
    ),
    ("tpu.sh", ("run", *TPU, "--type", "v5p-4"), "--type 'v5p-4': expected v5p-8, 16, 32, 64, 128, 256, 512 or 1024"),
    (
        "tpu.sh",
        ("run", *TPU, "--type", "h100-8"),
        "--type 'h100-8': expected v4-N, v5litepod-N (v5e-N), v5p-N or v6e-N.",
    ),
    ("tpu.sh", ("run", *TPU, "--slices", "0"), "--slices '0': expected a whole number from 1."),
    ("tpu.sh", ("run", *TPU, "--disk", "/my disk"), "--disk '/my disk': expected gs://BUCKET[/FOLDER] or HOST:/PATH"),
    ("tpu.sh", ("run", *PLACE, "--type", "v6e-8"), "--disk is missing: what all hosts share"),
    ("tpu.sh", ("run", *TPU, "--config", "no.yaml"), "--config 'no.yaml' is no file here"),
    ("tpu.sh", ("run", *TPU, "--", "--run.dir=runs/x"), "--run.dir 'runs/x': expected a folder under /mnt/sera"),
    ("tpu.sh", ("run", *TPU, "--", "--run.dir", "runs/x"), "--run.dir 'runs/x': expected a folder under /mnt/sera"),
    ("tpu.sh", ("run", *TPU, "--data", "model"), "--data belongs to the commands all and stage, got it with run."),
    ("tpu.sh", ("run", *TPU, "--spots"), "unknown option --spots; known here: --name --zone --type --disk"),
    ("tpu.sh", ("run", *TPU, "--spot=no"), "--spot takes no value, got '--spot=no'."),
    ("tpu.sh", ("run", *TPU, "--spot", "--reserved"), "--spot and --reserved: expected one of them."),
    ("tpu.sh", ("run", *TPU, "--loss.beta", "0.2"), "unknown option --loss.beta; known here:"),
    ("tpu.sh", ("run", *TPU, "x"), "got 'x'; expected options, and flags of sera_jax.train behind --."),
    ("tpu.sh", ("run", *TPU, "--zone"), "--zone got no value."),
    ("tpu.sh", ("all", *TPU, "--data", "nowhere"), "--data 'nowhere' is neither here"),
    ("tpu.sh", ("all", *TPU, "--data", "gs://x"), "--data 'gs://x': expected gs://BUCKET/OBJECT"),
    ("tpu.sh", ("all", *TPU, "--data", "model", "--data", "gs://b/model/"), "two of them are called 'model'"),
    (
        "tpu.sh",
        ("all", *TPU, "--disk=a:/b", "--data", "my pairs.jsonl"),
        "expected a name of letters, digits and . _ -",
    ),
    ("tpu.sh", ("stage", *TPU), "--data is missing: what to copy."),
    (
        "gke.sh",
        ("run", *GKE, "--slices", "2", "--type", "v6e-8"),
        "GKE takes several slices only of types with more than",
    ),
    ("gke.sh", ("run", *GKE, "--disk", "10.0.0.2:/x"), "put its volume into launch/jobset.yaml."),
    (
        "gke.sh",
        ("run", *GKE, "--image", "sera jax"),
        "--image 'sera jax': expected REGISTRY/PROJECT/REPOSITORY/NAME:TAG.",
    ),
    ("gke.sh", ("run", *GKE, "--name", "a" * 31), "expected at most 30 letters"),
    ("gke.sh", ("run", *GKE, "--location", "Europe"), "--location 'Europe': expected a region or zone"),
    ("gke.sh", ("create", "--xpk", *GKE), "xpk cluster create makes cluster and node pools in one"),
    ("gke.sh", ("run", "--xpk", *GKE, "--disk", "gs://bucket/x"), "xpk mounts whole buckets; expected gs://bucket."),
    ("gke.sh", ("run", *GKE, "--disk", "gs://b/x"), "--disk 'gs://b/x': expected gs://BUCKET[/FOLDER] or HOST:/PATH"),
    ("slurm.sh", ("run", "--name", "x", "--config", "a run.yaml", "--gpus", "all"), "--gpus 'all': expected a whole"),
    ("slurm.sh", ("run", "--name", "x", "--config", "a run.yaml", "--logs", "a%j"), "expected a path without %"),
    ("local.sh", ("run",), "--config is missing: the YAML of the run"),
    ("local.sh", ("run", "--config", "a run.yaml", "--processes", "two"), "--processes 'two': expected a whole number"),
]


@pytest.mark.parametrize("script, words, message", BAD, ids=[f"{b[0][:-3]} {b[2][:40]}" for b in BAD])
def test_what_is_wrong_is_told_before_anything_is_called(script, words, message, cloud):
    cloud.there()
    got = cloud.run(script, *words, PYTHON=sys.executable)
    assert got.returncode == 2 and message in got.stderr and got.stderr.startswith("error: "), got.stderr
    assert not cloud.calls()


def test_a_missing_tool_is_told(cloud, tmp_path):
    poor = tmp_path / "poor"
    poor.mkdir()
    for tool in ("bash", "dirname", "basename", "env"):
        (poor / tool).symlink_to(shutil.which(tool))
    got = cloud.run("tpu.sh", "run", *TPU, PATH=str(poor))
    assert got.returncode == 2 and "gcloud is not on PATH. Install it first" in got.stderr


# --- GKE --------------------------------------------------------------------------------------------------------------

CONNECT = ["gcloud container", "kubectl get"]
JOB = ["gcloud storage", "kubectl apply", "kubectl get"]
AFTER = ["mkdir runs/launch/my-run", "kubectl logs", "kubectl delete"]


def test_gke_all_does_everything_in_order(cloud):
    cloud.plays(terminal=[" 0", " 0", " 1", "Completed 1"])
    done = cloud.run("gke.sh", "all", *GKE, "--data", "model", "--slices", "2", "--spot", *FLAGS)
    assert done.returncode == 0, done.stderr
    calls = cloud.calls()
    pools = ["gcloud container"] * 2
    assert verbs(calls) == [*CONNECT, "gcloud storage", *pools, *JOB, *["kubectl get"] * 3, *AFTER, *pools]
    assert "my-run: running, restarts: 1\n" in done.stderr  # a preemption that GKE mended
    assert calls[3][4:] == [
        *("my-run-0", "--cluster=c", "--location=us-west4", "--machine-type=ct6e-standard-4t", "--num-nodes=4"),
        *("--node-locations=us-west4-a", "--tpu-topology=4x4", "--spot"),
    ]
    assert [call[3:5] for call in calls[-2:]] == [["delete", "my-run-0"], ["delete", "my-run-1"]]


def test_the_jobset_is_what_a_slice_needs(cloud):
    assert cloud.run("gke.sh", "run", *GKE, "--slices", "3", "--disk", "gs://bucket/a/b", *FLAGS).returncode == 0
    made = json.loads((cloud.state / "jobset.json").read_text())
    slices = made["spec"]["replicatedJobs"]
    assert len(slices) == 1 and slices[0]["replicas"] == 3
    job = slices[0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4 and job["backoffLimit"] == 0
    selector = pod["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v6e-slice"
    topology = [int(side) for side in selector["cloud.google.com/gke-tpu-topology"].split("x")]
    (container,) = pod["containers"]
    resources = container["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": math.prod(topology) // 4}
    assert container["command"] == [
        *("python", "-m", "sera_jax.train", "--config=/mnt/sera/runs/my-run.yaml", "--run.dir=/mnt/sera/runs/my-run"),
        *("--mesh.distributed=true", "--mesh.slices=3", "--mesh.data=3", *FLAGS[1:]),
    ]
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"] and mount["mountPath"] == "/mnt/sera"
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "bucket"
    assert volume["csi"]["volumeAttributes"]["mountOptions"].split(",")[-1] == "only-dir:a/b"
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert "@" not in json.dumps(made)
    assert [*cloud.calls()[2][2:]] == ["cp", "a run.yaml", "gs://bucket/a/b/runs/my-run.yaml"]


def test_a_failed_jobset_is_told_given_back_and_can_be_resumed(cloud):
    cloud.plays(terminal=[" 0", "Failed 20"])
    failed = cloud.run("gke.sh", "all", *GKE)
    assert failed.returncode == 1 and "my-run failed: 'logs' fetches what the pods printed" in failed.stderr
    assert verbs(cloud.calls())[-4:] == [*AFTER, "gcloud container"]
    cloud.plays()
    assert cloud.run("gke.sh", "resume", *GKE).returncode == 0
    assert verbs(cloud.calls()) == [*CONNECT, "kubectl delete", *JOB]


def test_node_pools_that_were_refused_are_not_deleted(cloud):
    cloud.plays(fails=[["node-pools create my-run-1", "ERROR: quota", 1]])
    failed = cloud.run("gke.sh", "all", *GKE, "--slices", "3")
    assert failed.returncode == 2 and "error: node pool my-run-1 was refused: see above" in failed.stderr
    calls = cloud.calls()
    assert [call[3:5] for call in calls[2:]] == [
        ["create", "my-run-0"],
        ["create", "my-run-1"],
        ["delete", "my-run-0"],
    ]


@pytest.mark.parametrize(
    "what, message",
    [
        ("get-credentials", "cluster c in us-west4 cannot be reached"),
        ("get crd", "cluster c has no JobSet. Install it first"),
        ("kubectl apply", "the JobSet was refused"),
        ("storage cp", "--config could not be copied to the disk"),
    ],
)
def test_gke_says_what_failed(what, message, cloud):
    cloud.plays(fails=[[what, "ERROR: the tool's own words", 1]])
    failed = cloud.run("gke.sh", "run", *GKE)
    assert failed.returncode == 2 and f"error: {message}" in failed.stderr


def test_xpk_runs_the_same_command(cloud):
    done = cloud.run("gke.sh", "all", "--xpk", *GKE, "--slices", "2", *FLAGS)
    assert done.returncode == 0, done.stderr
    calls = cloud.calls()
    work = ["gcloud storage", "xpk storage", "xpk workload", "kubectl get"]
    assert verbs(calls) == [*CONNECT, *work, *AFTER[:2], "xpk workload", "xpk storage"]
    flags = dict(word[2:].partition("=")[::2] for word in calls[4][3:])
    assert (flags["tpu-type"], flags["num-slices"], flags["workload"]) == ("v6e-16", "2", "my-run")
    assert shlex.split(flags["command"])[3:] == [
        *("python", "-m", "sera_jax.train", "--config=/mnt/sera/runs/my-run.yaml", "--run.dir=/mnt/sera/runs/my-run"),
        *("--mesh.distributed=true", "--mesh.slices=2", "--mesh.data=2", *FLAGS[1:]),
    ]


TYPES = [f"{g}-{n}" for g in ("v5litepod", "v6e") for n in (1, 4, 8, 16, 32, 64, 128, 256)]
TYPES += [f"{g}-{n}" for g in ("v4", "v5p") for n in (8, 16, 32, 64, 128, 256, 512, 1024)]


def test_every_type_is_a_whole_slice():
    """Chips by the name = product of the topology = hosts × chips a host; the machine's name says its chips."""
    script = f"""
        . {shlex.quote(str(LAUNCH / "common.sh"))}
        for one; do
            read_type "$one"
            echo "$chips $hosts $chips_a_host $topology $machine $accelerator $runtime"
        done"""
    out = subprocess.run(["bash", "-c", script, "x", *TYPES], capture_output=True, text=True, check=True).stdout
    for name, line in zip(TYPES, out.splitlines(), strict=True):
        chips, hosts, of_host, topology, machine, accelerator, runtime = line.split()
        generation, size = name.split("-")
        assert int(chips) == int(size) // (2 if generation in ("v4", "v5p") else 1)
        assert int(chips) == int(hosts) * int(of_host) == math.prod(map(int, topology.split("x")))
        assert machine.endswith(f"-{of_host}t")
        letters = {"v4": "ct4p", "v5litepod": "ct5lp", "v5p": "ct5p", "v6e": "ct6e"}[generation]
        assert machine.startswith(letters)
        assert {"v4": "v4", "v5litepod": "v5-lite", "v5p": "v5p", "v6e": "v6e"}[generation] in accelerator
        assert {"v4": "2204", "v5litepod": "v5-lite", "v5p": "tpuv5", "v6e": "v6e"}[generation] in runtime


# --- Slurm ------------------------------------------------------------------------------------------------------------


def test_slurm_submits_one_process_a_gpu_and_not_twice(cloud):
    words = (
        "run",
        "--name",
        "my-run",
        "--config",
        "a run.yaml",
        "--nodes",
        "2",
        "--gpus",
        "8",
        "--time",
        "1-0",
        *FLAGS,
    )
    assert cloud.run("slurm.sh", *words, PYTHON=sys.executable).returncode == 0
    squeue, mkdir, sbatch = cloud.calls()
    flags = dict(word[2:].partition("=")[::2] for word in sbatch[1:])
    assert (flags["nodes"], flags["ntasks-per-node"], flags["gpus-per-node"], flags["time"]) == ("2", "8", "8", "1-0")
    assert "requeue" in flags
    job = shlex.split(flags["wrap"])
    train = ["-m", "sera_jax.train", "--config", "a run.yaml", "--mesh.distributed=true", *FLAGS[1:]]
    assert job[0] == "srun" and job[job.index(sys.executable) + 1 :] == train
    cloud.plays(queue=["4711"])
    twice = cloud.run("slurm.sh", *words, PYTHON=sys.executable)
    assert twice.returncode == 2 and "job my-run is there already (4711)" in twice.stderr
    assert [call[0] for call in cloud.calls()] == ["squeue"]


# --- what a host does, for real ---------------------------------------------------------------------------------------


class Host:
    """launch/host.sh in a folder of its own, with a disk that is mounted and a Python that is a script."""

    def __init__(self, folder: pathlib.Path):
        self.sera = folder / "se ra"
        (self.sera / "src").mkdir(parents=True)
        bin = folder / "bin"
        bin.mkdir()
        self.python = bin / "python"
        self.python.write_text(
            '#!/bin/bash\nprintf "%s\\n" "$PWD" "$@"\ntrap "exit 9" TERM\n'
            'until [ -f "$SERA_JAX_HOME/end" ]; do sleep 0.05; done\nexit "$(cat "$SERA_JAX_HOME/end")"\n'
        )
        (bin / "mountpoint").write_text("#!/bin/sh\nexit 0\n")
        for file in bin.iterdir():
            file.chmod(0o755)
        self.environment = {
            **os.environ,
            "SERA_JAX_HOME": str(self.sera),
            "SERA_JAX_MOUNT": str(folder),
            "PYTHON": str(self.python),
            "PATH": f"{bin}:{os.environ['PATH']}",
        }

    def __call__(self, *words: str) -> str:
        ran = subprocess.run(
            ["bash", str(LAUNCH / "host.sh"), *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return ran.stdout

    def becomes(self, state: str) -> bool:
        for _ in range(100):
            if self("status").splitlines()[0] == f"sera_jax {state}":
                return True
            time.sleep(0.05)
        return False

    def end(self, status: int) -> None:
        (self.sera / "end").write_text(str(status))

    @property
    def pid(self) -> int:
        return int((self.sera / "run.pid").read_text().split()[0])


@pytest.mark.parametrize(
    "disk, fails, calls",
    [
        ("gs://bucket", "", ["gcsfuse --implicit-dirs TTL bucket MOUNT"]),
        ("gs://bucket/a/b/", "", ["gcsfuse --implicit-dirs TTL --only-dir=a/b bucket MOUNT"]),
        ("10.0.0.2:/x", "", ["mount -t nfs -o rw,hard,actimeo=1,vers=4.1 10.0.0.2:/x MOUNT"]),
        (
            "10.0.0.2:/x",
            "vers=4.1",
            [f"mount -t nfs -o rw,hard,actimeo=1,{how} 10.0.0.2:/x MOUNT" for how in ("vers=4.1", "vers=3,nolock")],
        ),
    ],
)
def test_a_host_mounts_the_disk_once(disk, fails, calls, tmp_path):
    """Against stand-ins for the tools of mounting: what they are asked."""
    bin, mount = tmp_path / "bin", tmp_path / "mnt"
    bin.mkdir()
    note = (
        f'echo "$(basename "$0") $*" >> {tmp_path}/calls; '
        + 'case "$*" in *"$FAILS"*) [ -z "$FAILS" ] || exit 32;; esac; '
    )
    scripts = {
        "sudo": 'exec "$@"',
        "mountpoint": f"[ -f {tmp_path}/mounted ]",
        "mount.nfs": "exit 0",
        "gcsfuse": f"{note} touch {tmp_path}/mounted",
        "mount": f"{note} touch {tmp_path}/mounted",
    }
    for name, text in scripts.items():
        (bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin / name).chmod(0o755)
    environment = {**os.environ, "SERA_JAX_MOUNT": str(mount), "PATH": f"{bin}:{os.environ['PATH']}", "FAILS": fails}
    for _ in range(2):
        subprocess.run(["bash", str(LAUNCH / "host.sh"), "mount", disk], env=environment, check=True)
    ttl = "--metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0"
    told = (tmp_path / "calls").read_text().replace(str(mount), "MOUNT").replace(ttl, "TTL").splitlines()
    assert told == calls and (mount / "runs").is_dir() and (mount / "data").is_dir()


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path)
    yield host
    host("stop")


def test_a_host_trains_in_the_background_and_says_how_it_is(host):
    assert host.becomes("idle")
    assert "started on" in host("start", "gs://b", "--config", "a b.yaml", "--x=it's")
    assert host.becomes("running")
    log = (host.sera / "run.log").read_text().splitlines()
    assert log == [str(host.sera / "src"), "-m", "sera_jax.train", "--config", "a b.yaml", "--x=it's"]
    assert host("status").splitlines()[1].endswith(": --x=it's")
    pid = host.pid
    assert "runs already" in host("start", "gs://b", "--config", "other.yaml") and host.pid == pid
    host.end(0)
    assert host.becomes("done")


def test_a_host_tells_failed_from_lost(host):
    host.end(3)
    host("start", "gs://b")
    assert host.becomes("failed 3")
    (host.sera / "end").unlink()
    host("start", "gs://b")
    assert host.becomes("running")
    os.killpg(host.pid, signal.SIGKILL)  # as a reboot does: nobody writes a status
    assert host.becomes("lost")
    host("start", "gs://b")
    assert host.becomes("running")
    pid = host.pid
    host("stop")
    for _ in range(100):
        if not pathlib.Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.05)
    assert not pathlib.Path(f"/proc/{pid}").exists()
    # Another process with the old number is not the run.
    (host.sera / "run.status").unlink(missing_ok=True)
    (host.sera / "run.pid").write_text(f"{os.getpid()} 1\n")
    assert host.becomes("lost")


# --- this machine, for real -------------------------------------------------------------------------------------------


def fake_python(folder: pathlib.Path) -> str:
    """Its processes tell their environment; number 1 fails when told to, and they end when told to."""
    file = folder / "python"
    file.write_text(
        f'#!/bin/bash\nif [ "$1" = -c ]; then exec {shlex.quote(sys.executable)} "$@"; fi\n'
        'k=$JAX_PROCESS_ID\necho "process $k of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: $*"\n'
        'trap "touch stopped-$k; exit 143" TERM\n'
        'touch "started-$k"\n'
        'until [ -f end ] || [ -f "end-$k" ]; do\n'
        '    if [ "$k" = 1 ] && [ -f fail ]; then echo "own words"; exit 7; fi\n'
        "    sleep 0.05\ndone\n"
    )
    file.chmod(0o755)
    return str(file)


def test_local_processes_know_each_other(cloud):
    python = fake_python(cloud.folder)
    (cloud.folder / "end").touch()
    words = ("run", "--config", "a run.yaml", "--processes", "3", "--logs", "my logs", "--", "--x", "a b")
    done = cloud.run("local.sh", *words, PYTHON=python)
    assert done.returncode == 0, done.stderr
    said = [done.stdout, *((cloud.folder / f"my logs/process-{k}.log").read_text() for k in (1, 2))]
    told = [re.fullmatch(r"process (\d) of 3 at 127\.0\.0\.1:(\d+): (.+)\n", text) for text in said]
    assert [match[1] for match in told] == ["0", "1", "2"] and len({match[2] for match in told}) == 1
    assert {match[3] for match in told} == {"-m sera_jax.train --config a run.yaml --mesh.distributed=true --x a b"}


def test_a_local_process_may_end_well_before_the_others(cloud):
    python = fake_python(cloud.folder)
    (cloud.folder / "end-0").touch()
    later = threading.Timer(3, (cloud.folder / "end-1").touch)
    later.start()
    done = cloud.run("local.sh", "run", "--config", "a run.yaml", "--processes", "2", PYTHON=python)
    later.cancel()
    assert done.returncode == 0 and (cloud.folder / "end-1").exists(), done.stderr


def test_a_local_process_that_fails_ends_the_others(cloud):
    python = fake_python(cloud.folder)
    (cloud.folder / "fail").touch()
    failed = cloud.run("local.sh", "run", "--config", "a run.yaml", "--processes", "2", PYTHON=python)
    assert failed.returncode == 7
    assert "error: process 1 of 2 ended with status 7; the others were stopped." in failed.stderr
    assert "own words" in failed.stderr and (cloud.folder / "stopped-0").exists()


def test_an_interrupted_local_run_leaves_no_process(cloud):
    python = fake_python(cloud.folder)
    process = subprocess.Popen(
        [str(LAUNCH / "local.sh"), "run", "--config", "a run.yaml", "--processes", "2"],
        cwd=cloud.folder,
        env={**cloud.environment, "PYTHON": python},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(200):
        if (cloud.folder / "started-0").exists() and (cloud.folder / "started-1").exists():
            break
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 143
    assert (cloud.folder / "stopped-0").exists() and (cloud.folder / "stopped-1").exists()


def test_simulated_devices_are_a_flag_of_every_process(cloud):
    words = ("run", "--config", "a run.yaml", "--processes", "2", "--devices", "4", "--dry-run")
    _, *printed = cloud.run("local.sh", *words, XLA_FLAGS="--xla_x=1").stdout.splitlines()
    assert len(printed) == 2
    for k, line in enumerate(printed):
        words = shlex.split(line)
        assert f"JAX_PROCESS_ID={k}" in words and words[-1] == "&"
        assert "XLA_FLAGS=--xla_x=1 --xla_force_host_platform_device_count=4" in words


@pytest.mark.slow
def test_local_trains_and_the_same_command_has_nothing_left_to_do(tiny, cloud):
    optimizer = {"batch_size": 16, "learning_rate": 3e-3, "row_tokens": 128, "microbatch_rows": 1}
    config = {
        "run": {"dir": "runs/a run", "log_every": 1},
        "model": {"path": str(tiny / "model"), "weights": "random"},
        "data": {"pairs": [str(tiny / "pairs.jsonl")], "max_length": 48, "max_prompt_length": 24},
        "sft": {"epochs": 1, "optimizer": optimizer},
        "loop": {"iterations": 0},
    }
    (cloud.folder / "a run.yaml").write_text(yaml.safe_dump(config))
    words = ("run", "--config", "a run.yaml", "--devices", "1", "--", "--run.seed", "3")
    environment = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    first = cloud.run("local.sh", *words, **environment)
    assert first.returncode == 0, first.stderr
    run = cloud.folder / "runs" / "a run"
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["seed"] == 3
    assert (run / "export" / "model.safetensors").exists() and (run / "report.html").exists()
    lines = (run / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in lines.splitlines()] == [1, 2, 3]
    # On two processes, which have to find each other for it.
    again = cloud.run("local.sh", *words[:3], "--processes=2", *words[3:], **environment)
    assert again.returncode == 0, again.stderr
    assert (run / "metrics.jsonl").read_text() == lines
    assert "mesh data 1×fsdp 2×tensor 1" in again.stdout
    assert "exported" not in (cloud.folder / "runs/launch/local/process-1.log").read_text()
    wrong = cloud.run("local.sh", *words, "--loss.beta", "-1", **environment)
    assert wrong.returncode == 1 and "beta" in wrong.stderr
