"""By hand: the state of RLinf-Stack-Cube against RLinf's own function, over resets and steps, with stand-in assets.

    git clone https://github.com/RLinf/RLinf
    PYTHONPATH=. python tests/golden/compare_rlinf_rotation.py RLinf/rlinf/envs/isaaclab/utils.py

RLinf's `quat2axisangle_torch` is run from its file, on the quaternion whose x is made positive; the row's numbers are
compared before they are rounded to bfloat16. 64 environments, three resets, 100 steps of actions uniform in +-0.2; it takes
seven minutes on one CPU core, since MuJoCo-Warp steps there.
"""

import ast
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

from tests import assets

os.environ.setdefault("ISAACSIM_ASSET_ROOT", str(assets.mirror()))

import ppo_gr00t_frozen
from common import Ranks
from tasks.gr00t import gripper_frame

N, STEPS = 64, int(sys.argv[2]) if len(sys.argv) > 2 else 100
source = ast.parse(Path(sys.argv[1]).read_text())
wanted = [node for node in source.body if getattr(node, "name", "") == "quat2axisangle_torch"]
theirs: dict = {"torch": torch}
exec(compile(ast.Module(wanted, []), sys.argv[1], "exec"), theirs)


def both(env) -> tuple[torch.Tensor, float]:
    """The row's rotation vector (N, 3), and its largest difference to RLinf's."""
    quat = env.env.scene["ee_frame"].data.target_quat_w.torch[:, 0].clone()  # x, y, z, w
    with mock.patch.object(torch.Tensor, "bfloat16", lambda x: x):
        found = gripper_frame(env.env)[:, 3:6]
    expected = theirs["quat2axisangle_torch"](torch.where(quat[:, :1] < 0, -quat, quat))
    return found, (found - expected).abs().max().item()


args, generator = ppo_gr00t_frozen.Args(task="RLinf-Stack-Cube", device="cpu", num_envs=N), torch.Generator().manual_seed(0)
with (
    tempfile.TemporaryDirectory() as folder,
    ppo_gr00t_frozen.make_env(args, 64, Path(folder), Ranks(0, 1)) as env,
):
    for seed in (1, 2, 3):
        env.reset(seed)
        rotation, error = both(env)
        print(f"seed {seed}: roll {rotation[:, 0].min():.2f} to {rotation[:, 0].max():.2f}, difference {error}", flush=True)
    worst = jump = 0.0
    for _ in range(STEPS):
        env.env.step((torch.rand(N, 7, generator=generator) * 2 - 1) * 0.2)
        last, (rotation, error) = rotation, both(env)
        worst, jump = max(worst, error), max(jump, (rotation - last).abs().max().item())
    print(f"{STEPS} steps: difference {worst}, largest change in a step {jump:.2f} rad", flush=True)
