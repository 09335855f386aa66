"""Processes that begin with the libraries imported: that takes every script more CPU time than a small run itself.

One server per test process (multiprocessing's forkserver) imports them, and forks for every run. From its command line
on, a script then does what it does when it is started by hand; its own files are read anew. Runs with torchrun and those
that are started with `cold=True` begin from nothing.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES = (
    "torch._dynamo torch.distributed.fsdp torch.distributed.checkpoint.state_dict torch.utils.checkpoint tensordict peft "
    "wandb rich.live transformers.models.qwen2 transformers.models.qwen3.modeling_qwen3 "
    "transformers.models.siglip.modeling_siglip mujoco.rollout mujoco_warp newton isaaclab.app isaaclab.envs "
    "isaaclab.controllers isaaclab.sensors isaaclab.terrains isaaclab_newton.assets isaaclab_newton.cloner "
    "isaaclab_newton.physics isaaclab_newton.renderers isaaclab_newton.sim isaaclab_tasks isaaclab_tasks.utils "
    "matplotlib.figure matplotlib.backends.backend_agg PIL.GifImagePlugin"
).split()
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(LIBRARIES)


def _main(command: list[str], folder: str, env: dict[str, str], out: str, err: str) -> None:
    os.setsid()  # so that a test can kill it with all its children
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for file, number in ((out, 1), (err, 2)):
        with open(file, "wb") as stream:
            os.dup2(stream.fileno(), number)
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


class Process:
    """A script's run, with what tests use of subprocess.Popen."""

    def __init__(self, command: list[str], folder: Path, env: dict[str, str]):
        self.command, self.printed = command, tempfile.TemporaryDirectory()  # which goes when this object goes
        self.files = [f"{self.printed.name}/{name}" for name in ("out", "err")]
        self.process = CONTEXT.Process(target=_main, args=(command, str(folder), env, *self.files))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        if self.returncode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.command, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed, when it has ended."""
        self.wait(timeout)
        out, err = (Path(file).read_text() for file in self.files)
        return out, err


def start(command: list[str], folder: Path, env: dict[str, str], cold: bool = False) -> Process | subprocess.Popen:
    """Starts a Python file with arguments in a folder, as leader of a session of its own."""
    if not cold:
        return Process(command, folder, env)
    command = [sys.executable, *command]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=pipe, stderr=pipe, start_new_session=True)
