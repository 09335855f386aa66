"""Scripted experts for Isaac Lab's own tasks."""
import math
import torch
from torch import Tensor
from isaaclab.utils.math import (
    axis_angle_from_quat, quat_apply, quat_from_matrix, quat_mul, quat_conjugate, matrix_from_quat, quat_unique)

FINGERTIP = 0.1034


def TRACE(env):
    r = env.scene["robot"]; ob = env.scene["object"].data.root_pos_w.torch[0]
    return [round(x, 3) for x in r.data.joint_pos.torch[0].tolist()], [round(x, 3) for x in hand_pose(env)[0][0].tolist()], [round(x, 3) for x in ob.tolist()]


def hand_pose(env):
    """Grasp point (N, 3) [m] and rotation (N, 4) of the hand, x, y, z, w; both in the world."""
    robot = env.scene["robot"]
    body = robot.find_bodies("panda_hand")[0][0]
    position, rotation = robot.data.body_pos_w.torch[:, body], robot.data.body_quat_w.torch[:, body]
    tip = quat_apply(rotation, position.new_tensor([0, 0, FINGERTIP]).expand_as(position))
    return position + tip, rotation


def joint_step(env, motion):
    """Change of the arm's joints (N, 7) [rad] that moves the grasp point by `motion` (N, 6) [m, rad]: damped least squares."""
    robot = env.scene["robot"]
    body = robot.find_bodies("panda_hand")[0][0]
    jacobian = robot.data.body_link_jacobian_w.torch[:, body - 1, :, :7].clone()  # the base is fixed and has no row
    tip = hand_pose(env)[0] - robot.data.body_pos_w.torch[:, body]
    jacobian[:, :3] += torch.linalg.cross(jacobian[:, 3:], tip[:, :, None].expand(-1, -1, 7), dim=1)
    square = jacobian @ jacobian.mT + 0.05**2 * torch.eye(6, device=jacobian.device)
    return (jacobian.mT @ torch.linalg.solve(square, motion[:, :, None])).squeeze(-1)


def gravity_torque(env):
    """(N, 7) [N m] that the arm's joints need to hold the robot's own weight."""
    robot = env.scene["robot"]
    jacobian = robot.data.body_com_jacobian_w.torch[:, :, 2, :7]  # (N, bodies, 7) upward
    mass = robot.data.body_mass.torch[:, 1:, None]
    return 9.81 * (jacobian * mass).sum(1)


def turn_to(rotation, x, z):
    """Rotation vector (N, 3) [rad] that turns `rotation` (N, 4) to the axes x, z (N, 3)."""
    target = quat_from_matrix(torch.stack([x, torch.linalg.cross(z, x), z], -1))
    return axis_angle_from_quat(quat_unique(quat_mul(target, quat_conjugate(rotation))))


def limited(vector, length):
    return vector * (length / vector.norm(dim=1, keepdim=True).clamp(min=1e-6)).clamp(max=1.0)


def down(rotation, cube):
    """Rotation vector that lets the hand point down and its fingers be parallel to faces of a cube (N, 4), the nearest ones."""
    hand, cube = matrix_from_quat(rotation), matrix_from_quat(cube)
    side = cube[:, :, 0]
    # a cube that lies on another face: any horizontal edge
    side = torch.where(side[:, 2:].abs() > 0.7, cube[:, :, 1], side)
    angle = torch.atan2(side[:, 1], side[:, 0]) - torch.atan2(hand[:, 1, 0], hand[:, 0, 0])
    angle = (angle + math.pi / 4) % (math.pi / 2) - math.pi / 4
    yaw = torch.atan2(hand[:, 1, 0], hand[:, 0, 0]) + angle
    x = torch.stack([yaw.cos(), yaw.sin(), torch.zeros_like(yaw)], 1)
    z = torch.tensor([0.0, 0, -1]).to(x).expand_as(x)
    return turn_to(rotation, x, z)


def lift_object(env):
    robot, thing = env.scene["robot"], env.scene["object"].data
    tip, rotation = hand_pose(env)
    goal = thing.root_pos_w.torch
    delta = goal - tip
    lateral = delta[:, :2].norm(dim=1)
    fingers = robot.data.joint_pos.torch[:, 7:]
    width = fingers.sum(1)
    turn = down(rotation, thing.root_quat_w.torch)
    ready = (lateral < 0.01) & (delta[:, 2].abs() < 0.012) & (turn.norm(dim=1) < 0.2)
    near = (lateral < 0.02) & (delta[:, 2].abs() < 0.025)
    closing = near & (ready | (width < 0.07))
    grasped = near & (width < 0.056)
    height = goal[:, 2] + (3 * (lateral - 0.01)).clamp(0, 0.1)
    height = torch.where(grasped, torch.full_like(height, 0.45), height)
    motion = torch.cat([delta[:, :2], (height - tip[:, 2])[:, None]], 1)
    motion = torch.where((closing & ~grasped)[:, None], 0.0, limited(motion, 0.06))
    motion = torch.cat([motion, limited(turn, 0.15)], 1)
    stiffness = robot.data.joint_stiffness.torch[:, :7]
    damping = robot.data.joint_damping.torch[:, :7]
    # (K a - D v = 0): velocity wanted = step / time
    speed = joint_step(env, motion) / 0.15
    action = torch.zeros(env.num_envs, 9, device=env.device)
    action[:, :7] = (gravity_torque(env) + damping * speed) / stiffness / 0.1
    action[:, 7:] = torch.where(closing, -1.0, 1.0)[:, None]
    return action
