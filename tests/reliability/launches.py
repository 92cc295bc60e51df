"""Commands in several processes through torchrun."""

import os
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import psutil

DEATH = 60.0  # seconds within which a launch must end after a process died; torchrun waits up to 30 for the others
LAUNCH = 120.0  # seconds after which a launch hangs


class Launch:
    """A command in several processes through torchrun, on the CPU.

    Args:
        processes: how many.
        command: script and arguments.
    """

    def __init__(self, processes: int, command: list[str]) -> None:
        self.mark = uuid.uuid4().hex  # in the environment of all its processes
        self.started = time.monotonic()
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "UNET_DIFFUSION_LAUNCH": self.mark}
        self.process = subprocess.Popen(
            [sys.executable, *torchrun, *command],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, within: float = LAUNCH) -> tuple[int | None, str]:
        """Returns its status, None if it had to be killed, and its standard error."""
        try:
            _, said = self.process.communicate(timeout=within)
            return self.process.returncode, said
        except subprocess.TimeoutExpired:
            for process in self.alive():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            return None, self.process.communicate()[1]

    def wait_for_checkpoint(self, output: Path) -> bool:
        """Waits for the first checkpoint; returns False if the launch ended before it."""
        while not list((output / "checkpoints").glob("step-*")):
            if self.process.poll() is not None:
                return False
            time.sleep(0.005)
        return True

    def alive(self) -> list[psutil.Process]:
        """Returns the processes of the launch that are alive, data workers included."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("UNET_DIFFUSION_LAUNCH") == self.mark:
                    found.append(process)
        return found

    def rank(self, rank: int) -> psutil.Process:
        """Returns one of the processes that train."""
        ranked = [process for process in self.alive() if process.environ().get("RANK") == str(rank)]
        return min(ranked, key=lambda process: process.create_time())  # its data workers came later

    def left_after(self, within: float) -> int:
        """Waits until all processes are gone, at most `within` seconds; returns how many are left."""
        ends = time.monotonic() + within
        while self.alive() and time.monotonic() < ends:
            time.sleep(0.1)
        return len(self.alive())
