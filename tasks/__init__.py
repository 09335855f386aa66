"""Isaac Lab tasks: gr00t.py (one row per task), stock.py (Isaac Lab's own as plain tensors), tabletop.py (embedded).

mujoco_c.py steps them on a CPU.
"""

# names of older Isaac Lab releases
ALIASES = {
    "Isaac-Stack-Cube-Franka": "IsaacContrib-Stack-Cube-Franka",
    "Isaac-Stack-Cube-Franka-IK-Rel": "IsaacContrib-Stack-Cube-Franka-IK-Rel",
    "Isaac-Lift-Cube-Franka": "Isaac-Lift-Franka",
}


def current_name(task: str) -> str:
    """A task's name in this Isaac Lab, which has no versions; needs no Isaac Lab."""
    name = task.removesuffix("-v0")
    return ALIASES.get(name, name)
