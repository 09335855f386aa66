"""Scripted experts for Isaac Lab's Franka tasks: closed loops on the simulator's state, without memory between calls.

Each takes a running environment of its row of TASKS (tasks/gr00t.py) and returns actions (N, d) in that task's own units.
What an expert does next depends on where things are alone, so it recovers from noise and from what went wrong: it lets go
and tries again. Positions are in the world [m], quaternions are x, y, z, w.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from isaaclab.utils.math import (
    axis_angle_from_quat,
    matrix_from_quat,
    quat_apply,
    quat_conjugate,
    quat_from_matrix,
    quat_mul,
    quat_unique,
)
from torch import Tensor

GRASP = 0.1034  # from the hand's frame to between the fingertips [m], as in Isaac Lab's frames
BLOCK = 0.0468  # edge of the stack task's cubes [m]
CUBE = 0.05  # edge of the lift task's cube [m]
OPEN = 0.07  # the fingers are apart, of 0.08 at most [m]
PITCH = math.radians(50)  # the hand comes down on the drawer's handle: level, the arm cannot follow it out to the end


# ------------------------------------------------------------------------------------------------------------------
# The arm
# ------------------------------------------------------------------------------------------------------------------
def grasp_pose(env: Any) -> tuple[Tensor, Tensor]:
    """Position (N, 3) of the point between the fingertips, rotation (N, 4) of the hand: fingers along z, which move along y."""
    robot = env.scene["robot"]
    hand = robot.find_bodies("panda_hand")[0][0]
    position, rotation = robot.data.body_pos_w.torch[:, hand], robot.data.body_quat_w.torch[:, hand]
    return position + quat_apply(rotation, position.new_tensor([0.0, 0.0, GRASP]).expand_as(position)), rotation


def finger_gap(env: Any) -> Tensor:
    """(N,) between the fingers [m]."""
    return env.scene["robot"].data.joint_pos.torch[:, 7:].sum(1)


def joint_motion(env: Any, motion: Tensor) -> Tensor:
    """Motion of the arm's joints (N, 7) that moves the grasp point by (N, 6) [m, rad]: damped least squares."""
    robot = env.scene["robot"]
    hand = robot.find_bodies("panda_hand")[0][0]
    jacobian = robot.data.body_link_jacobian_w.torch[:, hand - 1, :, :7].clone()  # (N, 6, 7); the fixed base has no row
    arm = (grasp_pose(env)[0] - robot.data.body_pos_w.torch[:, hand])[:, :, None]
    jacobian[:, :3] += torch.linalg.cross(jacobian[:, 3:], arm.expand(-1, -1, 7), dim=1)
    damped = jacobian @ jacobian.mT + 0.05**2 * torch.eye(6, device=jacobian.device)
    return (jacobian.mT @ torch.linalg.solve(damped, motion[:, :, None])).squeeze(-1)


def weight(env: Any) -> Tensor:
    """(N, 7) torque [N m] with which the arm's joints hold the arm up."""
    robot = env.scene["robot"].data
    upward = robot.body_com_jacobian_w.torch[:, :, 2, :7]  # (N, bodies without the base, 7)
    return 9.81 * (upward * robot.body_mass.torch[:, 1:, None]).sum(1)


def turn_to(rotation: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """Rotation vector (N, 3) [rad] from `rotation` (N, 4) to the axes x, z (N, 3)."""
    target = quat_from_matrix(torch.stack([x, torch.linalg.cross(z, x), z], -1))
    return axis_angle_from_quat(quat_unique(quat_mul(target, quat_conjugate(rotation))))


def turn_down(env: Any, rotation: Tensor, cube: Tensor, away: Tensor | None = None) -> Tensor:
    """Rotation vector (N, 3) to a hand that points down, its fingers along faces of a cube, turned as little as can be.

    Args:
        rotation: (N, 4) of the hand.
        cube: (N, 4).
        away: (N, 2) from the cube to something that the hand, 0.2 m wide, must not touch.
    """
    axes = matrix_from_quat(cube)
    side = torch.where(axes[:, 2:, 0].abs() > 0.7, axes[:, :, 1], axes[:, :, 0])  # a level edge, whichever face is up
    base = matrix_from_quat(env.scene["robot"].data.root_quat_w.torch)[:, :, 0]
    front = torch.atan2(base[:, 1], base[:, 0])  # with the hand's x to there, the wrist is near the middle of its range
    turn = torch.atan2(side[:, 1], side[:, 0]) - front
    turn = (turn + math.pi / 4) % (math.pi / 2) - math.pi / 4
    yaw = front + turn
    if away is not None:
        along_x = (away[:, 0] * yaw.cos() + away[:, 1] * yaw.sin()).abs()
        along_y = (away[:, 1] * yaw.cos() - away[:, 0] * yaw.sin()).abs()
        blocked = (along_x < 0.06) & (along_y < 0.15)
        yaw = torch.where(blocked, yaw - math.pi / 2 * torch.where(turn < 0, -1.0, 1.0), yaw)
    x = torch.stack([yaw.cos(), yaw.sin(), torch.zeros_like(yaw)], 1)
    return turn_to(rotation, x, x.new_tensor([0.0, 0.0, -1.0]).expand_as(x))


def limited(vector: Tensor, length: float) -> Tensor:
    """(N, 3) shortened to a length."""
    return vector * (length / vector.norm(dim=1, keepdim=True).clamp(min=1e-6)).clamp(max=1.0)


def where(condition: Tensor, x: Tensor | float, y: Tensor | float) -> Tensor:
    """torch.where for rows: condition (N,), x and y (N, d)."""
    return torch.where(condition[:, None], x, y)


# ------------------------------------------------------------------------------------------------------------------
# One expert per task
# ------------------------------------------------------------------------------------------------------------------
def stack_cubes(env: Any) -> Tensor:
    """Stacks red on blue and green on red, then goes up with open fingers.

    Returns:
        (N, 7): change of the hand's position [0.5 m] and rotation [0.5 rad] in the robot's frame, which is the world's;
        gripper 1 open, -1 closed.
    """
    robot = env.scene["robot"].data
    cubes = [env.scene[f"cube_{i}"].data for i in (1, 2, 3)]
    blue, red, green = (cube.root_pos_w.torch for cube in cubes)
    (tip, rotation), gap = grasp_pose(env), finger_gap(env)
    tower = lies_on(red, blue)  # the first cube is where it should be
    done = tower & lies_on(green, red)
    cube, base = where(tower, green, red), where(tower, red, blue)
    turn = turn_down(
        env, rotation, where(tower, cubes[2].root_quat_w.torch, cubes[1].root_quat_w.torch),
        where(tower, red[:, :2] - green[:, :2], 1.0),
    )  # fmt: skip
    delta, angle = cube - tip, turn.norm(dim=1)
    aside = delta[:, :2].norm(dim=1)
    near = (aside < 0.02) & (delta[:, 2].abs() < 0.025) & ~done
    closing = near & ((aside < 0.012) & (delta[:, 2].abs() < 0.012) & (angle < 0.25) | (gap < OPEN))
    still = robot.joint_vel.torch[:, 7:].abs().amax(1) < 0.05  # the fingers have stopped bouncing off the cube
    held = closing & (gap < BLOCK + 0.006) & still

    # to the cube: above it until over it; whatever is low goes up first
    height = cube[:, 2] + (3 * (aside - 0.01) + 0.3 * (angle - 0.15).clamp(min=0)).clamp(0, 0.14)
    low = (tip[:, 2] < height - 0.03) & (aside > 0.03)
    reach = torch.cat([where(low, 0.0, delta[:, :2]), (height - tip[:, 2])[:, None]], 1)
    # with the cube: to its place, by the cube's own position
    way = base - cube + base.new_tensor([0.0, 0.0, BLOCK + 0.001])
    far = way[:, :2].norm(dim=1)
    rise = way[:, 2] + (3 * (far - 0.008)).clamp(0, 0.07)
    carry = torch.cat([where(rise > 0.03, 0.0, way[:, :2]), rise[:, None]], 1)
    up = torch.cat([torch.zeros_like(delta[:, :2]), (0.25 - tip[:, 2])[:, None]], 1)
    near_any = torch.stack([(c - tip).norm(dim=1) for c in (blue, red, green)]).amin(0) < 0.04
    waits = closing & ~held | ~closing & (gap < OPEN) & near_any  # fingers close, or let go
    motion = where(done, limited(up, 0.1), where(held, limited(carry, 0.06), limited(reach, 0.1)))
    turn = where(done | closing, 0.0, limited(turn, 0.5))
    gripper = torch.where(closing, -1.0, 1.0)[:, None]
    return torch.cat([2 * where(waits, 0.0, motion), 2 * turn, gripper], 1)


def lies_on(upper: Tensor, lower: Tensor) -> Tensor:
    """(N,) whether a cube (N, 3) lies on another, rather than near."""
    delta = upper - lower
    return (delta[:, :2].norm(dim=1) < 0.025) & ((delta[:, 2] - BLOCK).abs() < 0.006)


def open_drawer(env: Any) -> Tensor:
    """Grips the top drawer's handle and pulls.

    Returns:
        (N, 8): targets of the arm's joints, -1 and 1 at the soft limits, which the task smooths; gripper 1 open, -1 closed.
    """
    robot, frame = env.scene["robot"].data, env.scene["cabinet_frame"].data
    handle = frame.target_pos_w.torch[:, 0]
    bar, upward, inward = matrix_from_quat(frame.target_quat_w.torch[:, 0]).unbind(-1)  # (N, 3) each
    ahead = math.cos(PITCH) * inward - math.sin(PITCH) * upward
    across = math.sin(PITCH) * inward + math.cos(PITCH) * upward
    (tip, rotation), gap = grasp_pose(env), finger_gap(env)
    turn = turn_to(rotation, bar, ahead)
    delta = handle + 0.018 * ahead - tip  # the bar goes deep between the fingers, which it would slip out of
    depth, slide, side = ((delta * axis).sum(1).abs() for axis in (ahead, bar, across))
    angle, aside = turn.norm(dim=1), (slide**2 + side**2).sqrt()
    near = (side < 0.025) & (depth < 0.025) & (slide < 0.05)
    aligned = (side < 0.012) & (depth < 0.012) & (angle < 0.3)
    exact = (side < 0.005) & (depth < 0.005) & (angle < 0.1)
    closing = near & (aligned | (gap < OPEN)) & ((gap > 0.012) | exact)  # closed without the bar: open, again
    held = closing & (gap < 0.035)

    back = (3 * (aside - 0.015) + 0.3 * (angle - 0.2)).clamp(0, 0.1)  # in front of the handle until aligned
    grip = (1 - delta.norm(dim=1) / 0.02).clamp(0.1, 1)  # slower while the bar slips
    motion = where(held, delta - 0.15 * grip[:, None] * inward, limited(delta - back[:, None] * ahead, 0.1))
    speed = joint_motion(env, torch.cat([motion, limited(turn, 0.5)], 1)) / 0.3  # [rad/s]
    stiffness, damping = robot.joint_stiffness.torch[:, :7], robot.joint_damping.torch[:, :7]
    lag = damping / stiffness + env.step_dt / 0.01  # [s] of the joints and of the smoothing, whose weight is 0.01
    low, high = robot.soft_joint_pos_limits.torch[:, :7].unbind(-1)
    rest = robot.joint_pos.torch[:, :7] + weight(env) / stiffness
    step = lag * speed
    room = torch.where(step > 0, high - rest, rest - low).clamp(min=0)
    step = step * (room / step.abs().clamp(min=1e-6)).amin(1, keepdim=True).clamp(0.3, 1)  # all joints slow down for one
    arm = (2 * (rest + step - low) / (high - low) - 1).clamp(-1, 1)
    return torch.cat([arm, torch.where(closing, -1.0, 1.0)[:, None]], 1)


def lift_object(env: Any) -> Tensor:
    """Grips the cube from above and lifts it.

    Returns:
        (N, 9): what the targets of arm [0.1 rad] and fingers [0.1 m] are ahead of the joints. Gravity pulls at the arm, and
        a target's lead is what holds it.
    """
    robot, cube = env.scene["robot"].data, env.scene["object"].data
    position = cube.root_pos_w.torch
    (tip, rotation), gap = grasp_pose(env), finger_gap(env)
    turn = turn_down(env, rotation, cube.root_quat_w.torch)
    delta = position - tip
    aside = delta[:, :2].norm(dim=1)
    near = (aside < 0.02) & (delta[:, 2].abs() < 0.025)
    aligned = (aside < 0.01) & (delta[:, 2].abs() < 0.012) & (turn.norm(dim=1) < 0.2)
    closing = near & (aligned | (gap < OPEN))
    held = closing & (gap < CUBE + 0.006)
    height = position[:, 2] + (3 * (aside - 0.01)).clamp(0, 0.1)  # above the cube until over it
    height = torch.where(held, env.scene.env_origins[:, 2] + 0.45, height)
    motion = limited(torch.cat([delta[:, :2], (height - tip[:, 2])[:, None]], 1), 0.06)
    motion = torch.cat([where(closing & ~held, 0.0, motion), limited(turn, 0.15)], 1)
    stiffness, damping = robot.joint_stiffness.torch[:, :7], robot.joint_damping.torch[:, :7]
    lead = (weight(env) + damping * joint_motion(env, motion) / 0.15) / stiffness  # [rad]
    return torch.cat([lead / 0.1, torch.where(closing, -1.0, 1.0)[:, None].expand(-1, 2)], 1)
