"""Isaac Lab tasks: gr00t.py (one row per task), stock.py (Isaac Lab's own as plain tensors), tabletop.py (embedded).

mujoco_c.py steps them on a CPU.
"""

import re

# what older Isaac Lab releases called them, without versions
ALIASES = {
    "Isaac-Cartpole-RGB": "Isaac-Cartpole-Camera",
    "Isaac-Cartpole-RGB-Camera-Direct": "Isaac-Cartpole-Camera-Direct",
    "Isaac-Franka-Cabinet-Direct": "Isaac-Open-Drawer-Franka-Direct",
    "Isaac-Lift-Cube-Franka": "Isaac-Lift-Franka",
    "Isaac-Shadow-Hand-Over-Direct": "Isaac-Shadow-Handover-Direct",
}
WORDS = {r"-Repose-": "-Reorient-", r"-(Anymal|Unitree)-": r"-\1", r"^Isaac-Stack-Cube-": "IsaacContrib-Stack-Cube-"}


def current_name(task: str) -> str:
    """A task's name in this Isaac Lab, which has no versions and no -Play; needs no Isaac Lab."""
    name = re.sub(r"(-Play)?-v\d+$", "", task)
    for old, new in WORDS.items():
        name = re.sub(old, new, name)
    return ALIASES.get(name, name)
