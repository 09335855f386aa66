"""The simulator of the tests: one per process, shared by all of a file's tests."""

import contextlib
from pathlib import Path

import grpo_gr00t
from common import Ranks


@contextlib.contextmanager
def chunk_env(folder: Path, num_envs: int, physics: str | None = None, **flags):
    """The embedded task behind grpo_gr00t.py's own `make_env`."""
    args = grpo_gr00t.Args(num_envs=num_envs, device="cpu", physics=physics, **flags)
    with grpo_gr00t.make_env(args, 64, folder, Ranks(0, 1)) as env:
        yield env
