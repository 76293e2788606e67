"""Several processes of one run, each with devices of its own, joined over loopback."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parents[2]
# The compiler's effort, which is most of the time of these runs; fused loops as MLIR alone are half of it.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)


class Joined:
    """Processes of one run: alike but for their number, and for the arguments that are theirs alone."""

    PATIENCE = 900.0  # seconds; an idle machine of two cores takes half a minute

    def __init__(self, commands: list[list[str]], *, devices: int, folder: pathlib.Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # without torch every process would say so; what we print counts
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(len(commands)),
            "PYTHONPATH": os.pathsep.join([str(HERE), str(folder)]),
        }
        self._logs = [open(folder / f"process-{port}-{i}.log", "w+") for i in range(len(commands))]
        self.processes = [
            subprocess.Popen(
                [sys.executable, *command],
                env=common | {"JAX_PROCESS_ID": str(i)},
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
            )
            for i, (command, log) in enumerate(zip(commands, self._logs))
        ]

    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def ended(self) -> list[int]:
        """Exit codes, once all have ended."""
        return [process.wait(timeout=self.PATIENCE) for process in self.processes]

    def said(self) -> list[str]:
        """What each printed."""
        for log in self._logs:
            log.flush()
        return [pathlib.Path(log.name).read_text() for log in self._logs]


@pytest.fixture(scope="module")
def joined(world):
    """joined(arguments of process 0, those of process 1, devices=2): started in the folder `world` of the file; killed
    with its tests at the latest."""
    started: list[Joined] = []

    def start(*commands: list[str], devices: int) -> Joined:
        started.append(Joined(list(commands), devices=devices, folder=world))
        return started[-1]

    yield start
    for group in started:
        group.kill()
