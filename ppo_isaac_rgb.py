"""PPO on Isaac Lab's own tasks, from camera images: ppo_isaac.py with what images need, and nothing else changed.

    python ppo_isaac_rgb.py                                          # laptop: Isaac-Cartpole-Camera-Direct, no GPU needed
    python ppo_isaac_rgb.py --evaluate --checkpoint runs/<name>/checkpoints/best
    torchrun --nproc_per_node=8 ppo_isaac_rgb.py --num-envs 4096

The nine Atari details of "The 37 Implementation Details of PPO" (Huang et al., ICLR blog track 2022), for a robot's camera:
1. No-op starts: --noop-max. Off by default: episodes that start at random ages already come apart.
2. Frame skip: --frame-skip. 1 by default: a robot's task has chosen its control rate (decimation) already. No maximum
   over two frames: nothing flickers.
3. End of an episode at the loss of a life: robots have one.
4. FIRE to start: robots start by themselves.
5. Grey images of 84x84, kept as bytes.
6. Reward clipping to the sign: --sign-rewards. Off by default: rewards of robot tasks are scaled by their authors.
7. The last 4 frames stacked, which makes velocities visible.
8. The Nature-CNN, shared by policy and value: one network, where ppo_isaac.py has two. The critic sees what the policy
   sees, even if the task has critic observations.
9. Bytes become [0, 1] inside the network.
The learning rate does not follow the KL by default: early on the KL is small whatever the rate is, which ruins a CNN.
Left out of ppo_isaac.py: LSTM, observation normalisation, return scaling, observation groups and the choice of layers.
"""

# ======== imports =====================================================================================================
from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

HERE = Path(__file__).resolve().parent


# ======== Args ========================================================================================================
@dataclass
class Args:
    """Fields left at None get the task's own value (`TASKS`), or one for any task (`DEFAULTS`)."""

    # general
    task: str | None = None  # registered Isaac Lab task (default: the checkpoint's, or Isaac-Cartpole-Camera-Direct)
    checkpoint: str | None = None  # folder of a saved policy: evaluated with --evaluate, trained further without
    seed: int = 1  # seed of the weights, the environments, the actions and the minibatches
    device: str = "auto"  # cpu, cuda, cuda:N, or auto
    physics: str | None = None  # Isaac Lab physics preset (newton_mjwarp, isaacsim_physx, ...)
    overrides: tuple[str, ...] = ()  # Isaac Lab overrides of the task, as presets=albedo or env.decimation=4
    num_envs: int | None = None  # parallel environments over all ranks (default: 64 on a CPU, 512 on a GPU)
    iterations: int | None = None  # rollout-and-update iterations
    evaluate: bool = False  # evaluate --checkpoint, and nothing else
    eval_every: int = 0  # iterations between evaluations of the deterministic policy; 0: only at the end
    eval_episodes: int = 256  # episodes of an evaluation (at most one per environment); 0: none
    eval_seed: int = 7_000_000  # seed of the evaluation's episodes, the same for every evaluation
    save_every: int = 50  # iterations between checkpoints
    keep_checkpoints: int = 2  # how many of the latest checkpoints stay on disk, beside the best one
    resume: str | None = None  # runs/<name> of an interrupted run: goes on from its latest checkpoint, with its arguments
    track: bool = True  # log to Weights & Biases (offline when nobody is logged in)
    wandb_project: str = "gr00t-rl"  # Weights & Biases project
    exp_name: str | None = None  # the run's folder is runs/<exp-name>; made from task, seed and time by default
    capture_video: bool = False  # film the deterministic policy after training, with the task's own camera
    compile: bool = False  # torch.compile the network
    mixed_precision: bool = False  # network in bfloat16; log-probabilities, losses and optimizer stay in fp32

    # images
    frame_skip: int | None = None  # environment steps that repeat each action; their rewards are summed
    noop_max: int = 0  # up to so many steps at the start of an episode execute a zero action instead of the policy's
    sign_rewards: bool = False  # learn from the signs of the rewards; logged returns are those of the task

    # algorithm
    num_steps: int | None = None  # T, steps per environment and rollout
    epochs: int | None = None  # passes over a rollout
    minibatches: int = 4  # optimizer steps per epoch
    learning_rate: float | None = None  # Adam's learning rate, the initial one of the adaptive schedule
    schedule: Literal["adaptive", "linear", "constant"] | None = None  # adaptive: follows --target-kl; linear: down to 0
    target_kl: float | None = None  # KL(old | new) that the adaptive schedule aims at
    stop_kl: float | None = None  # no further updates of a rollout after an epoch with more KL than this
    gamma: float | None = None  # discount
    gae_lambda: float | None = None  # lambda of GAE
    clip: float = 0.2  # clip range of the ratio, and of the value's change
    clip_value: bool | None = None  # clip the value loss
    normalize_advantages: bool = True  # to mean 0 and std 1 in every minibatch
    entropy_coef: float | None = None  # weight of the entropy bonus
    value_coef: float | None = None  # weight of the value loss (which has the 1/2)
    max_grad_norm: float = 1.0  # global gradient norm
    clip_actions: float | None = None  # symmetric bound on actions, beside the action space's own
    stagger: bool = True  # first episodes of a rollout end at random ages, so time-outs are spread out
    init_std: float | None = None  # initial std of the Gaussian policy


# hyperparameters per task; any flag overrides them
TASKS: dict[str, dict] = {
    "Isaac-Cartpole-Camera-Direct": dict(
        iterations=300, frame_skip=2, epochs=4, schedule="constant", clip_value=False, init_std=0.5, entropy_coef=0.0
    ),  # fmt: skip
}
# for what a task leaves open
DEFAULTS = dict(
    num_steps=32, epochs=3, learning_rate=5e-4, target_kl=0.01, gamma=0.99, gae_lambda=0.95, entropy_coef=0.005,
    value_coef=1.0, iterations=1000, frame_skip=1, schedule="linear", clip_value=True, init_std=1.0,
)  # fmt: skip
# what makes a policy; a checkpoint keeps it
NETWORK = ("init_std", "frame_skip")
STACK, SIZE = 4, 84  # frames that the network sees, and their height and width
# Copied from ppo_isaac.py:RESULT
RESULT = "return {mean:.2f} +- {std:.2f} over {episodes} episodes of {length:.0f} steps"
# heavy imports come after the command line, so --help is instant
ARGS = tyro.cli(Args) if __name__ == "__main__" else None

import numpy as np
import torch
from torch import Tensor, nn

from common import (
    Ranks, RunLogger, StageTimer, UsageError, check_finite, check_numbers, check_ranks, close_iteration, gae,
    latest_checkpoint, load_run, normalize_advantages, pick_device, resumed_args, run_name, run_summary, save_checkpoint,
    seeded_generator, start_logger, to_host,
)  # fmt: skip
from policies import Policy, flat_parameter
from stock_tasks import Spaces, VecEnv, load_policy, restore, seeded_generators, settle_task, task_config, task_metrics, to_cpu


def resolve(args: Args) -> Args:
    """Fills in what was left open and refuses what cannot work, before anything expensive starts.

    Raises:
        UsageError: names the flag and the remedy.
    """
    if args.resume:
        args = resumed_args(args)
    args.device = pick_device(args.device)
    if args.evaluate and not args.checkpoint:
        raise UsageError("--evaluate: needs --checkpoint, a folder like runs/<name>/checkpoints/best")
    network = settle_task(args, "Isaac-Cartpole-Camera-Direct", NETWORK)
    own = {"num_envs": 512 if args.device.startswith("cuda") else 64, **DEFAULTS, **TASKS.get(args.task, {}), **network}
    for name, value in own.items():
        if getattr(args, name) is None or name in network:
            setattr(args, name, value)
    positive = "num_envs iterations save_every keep_checkpoints num_steps epochs minibatches learning_rate target_kl stop_kl"
    positive += " clip max_grad_norm clip_actions init_std frame_skip"
    others = "entropy_coef value_coef eval_every eval_episodes seed eval_seed noop_max"
    check_numbers(args, positive, others, "gamma gae_lambda")
    check_ranks(args, "num_envs")
    samples = args.num_envs * args.num_steps
    if samples < 2 * args.minibatches:
        what = "steps (--num-envs times --num-steps)"
        raise UsageError(f"--minibatches {args.minibatches}: {samples} {what} leave fewer than 2 for each; use fewer")
    args.exp_name = run_name(args, "ppo_isaac_rgb")
    return args


# ======== env =========================================================================================================
class CameraEnv(VecEnv):
    """An Isaac Lab task as plain tensors, observed through its camera.

    The camera's bytes take the place of the task's own observation, which has each image's mean subtracted (so grey levels
    depend on what else is in view), stacks a frame twice where another environment's episode ends, and costs more
    than rendering does. A direct task's `_get_observations` changes nothing, so it can be left out.
    """

    def prepare(self, cfg) -> None:
        name, self.kind = colour_camera(self.args.task, cfg)
        self.camera, self.hidden, self.base._get_observations = self.base.scene.sensors[name], False, self.look
        self.noops = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)  # zero actions still to come

    def image(self) -> Tensor:
        """What the camera sees, (N, H, W, 3) uint8."""
        return self.camera.data.output[self.kind].torch[..., :3]

    def look(self) -> dict[str, Tensor]:
        """What the task returns as its observations: (N, 84, 84) uint8. Nothing is rendered that nobody will see."""
        if self.hidden and not self.base.reset_buf.any():
            return {}
        return {"policy": grey(self.image())}

    def restart(self, seed: int, steps: int = 0, stagger: bool = True, saved: dict | None = None) -> tuple[Tensor, Tensor]:
        """As in `VecEnv`; policy and critic observation are the same stacked frames."""
        self.base.common_step_counter = steps
        groups, _ = self.env.reset(seed=int(np.random.SeedSequence((seed, steps, self.ranks.rank)).generate_state(1)[0]))
        self.running.zero_()
        self.stack = groups["policy"][:, None].repeat(1, STACK, 1, 1)  # (N, 4, 84, 84)
        self.noops = self.draw_noops()
        if saved:
            restore(self.base, saved["task"])
            self.running.copy_(saved["running"])
            self.stack, self.noops = saved["stack"].to(self.device), saved["noops"].to(self.device)
            _, _, terminated, truncated, _ = self.step(self.idle)
            self.running *= ~(terminated | truncated)
        elif stagger:
            self.base.episode_length_buf.random_(0, self.horizon)
        self.base.extras["log"] = {}  # of the episodes before
        return self.stack, self.stack

    def state(self) -> dict:
        """What `restart` goes on from."""
        return super().state() | to_cpu({"stack": self.stack, "noops": self.noops})

    def draw_noops(self) -> Tensor:
        """(N,) how many steps a new episode ignores the policy: part of the task, so all samples are on-policy."""
        return torch.randint_like(self.noops, self.args.noop_max + 1) if self.args.noop_max else self.noops

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Executes (N, C) actions --frame-skip times: numbers, which are clipped here and nowhere else, or indices.

        The task itself is stepped again, rather than with a larger decimation: its rewards, its time limit and its
        checks for an end stay as they are. After an end the sum is complete; the new episode gets the rest of the repeats.

        Returns:
            stacked frames of the next step (N, 4, 84, 84), reward, terminated, truncated (N,), and the frame (N, 84, 84)
            from before the resets, valid where an episode ended (None: nowhere).
        """
        action = action.clamp(*self.bounds) if self.bounds else action
        if self.args.noop_max:
            action = action * (self.noops == 0)[:, None]
            self.noops = (self.noops - 1).clamp(min=0)
        final, total = None, torch.zeros_like(self.running[0])
        terminated, truncated = torch.zeros_like(total, dtype=torch.bool), torch.zeros_like(total, dtype=torch.bool)
        for repeat in range(self.args.frame_skip):
            self.hidden = repeat + 1 < self.args.frame_skip
            groups, reward, end, late, extras = self.env.step(action)
            if self.finite:
                end, late = end | late, torch.zeros_like(late)
            going, new = ~(terminated | truncated), extras.get("final_obs")
            total = total + reward * going
            terminated, truncated = terminated | (end & going), truncated | (late & going)
            if new is not self.final:  # it stays in extras; a new object means that an episode has just ended
                self.final, frame = new, new["policy"]
                final = frame if final is None else torch.where(going[:, None, None], frame, final)
        self.hidden = False
        starts, frame = terminated | truncated, groups["policy"][:, None]
        self.stack = torch.where(starts[:, None, None, None], frame, torch.cat([self.stack[:, 1:], frame], 1))
        if self.args.noop_max:
            self.noops = torch.where(starts, self.draw_noops(), self.noops)
        return self.stack, total, terminated, truncated, final


def colour_camera(task: str, cfg) -> tuple[str, str]:
    """Name and data type of the first camera in colour of a task.

    Raises:
        UsageError: it has none.
    """
    found = [(name, kind) for name, x in vars(cfg.scene).items() for kind in getattr(x, "data_types", None) or ()]
    for name, kind in found:
        if kind.startswith(("rgb", "albedo", "simple_shading")):
            return name, kind
    kinds = ", ".join(kind for _, kind in found) or "no camera"
    raise UsageError(f"--task {task}: needs a camera in colour (rgb, albedo, ...), its scene has {kinds}; see --overrides")


def grey(images: Tensor) -> Tensor:
    """(N, H, W, 3) bytes as grey bytes (N, 84, 84): ITU-R 601 luma, each pixel the mean over the area that it covers."""
    luma = images.float() @ torch.tensor([0.299, 0.587, 0.114], device=images.device)  # (N, H, W)
    rows, columns = (covered(size).to(images.device) for size in luma.shape[1:])
    return (rows @ luma @ columns.T).round().to(torch.uint8)


@functools.cache
def covered(size: int) -> Tensor:
    """(84, size): share of each of `size` pixels in each of 84 new ones."""
    edges, pixels = torch.arange(SIZE + 1.0)[:, None] * size / SIZE, torch.arange(float(size))
    share = torch.minimum(edges[1:], pixels + 1) - torch.maximum(edges[:-1], pixels)
    return share.clamp(min=0) * SIZE / size


@contextlib.contextmanager
def make_env(args: Args, cfg, run_dir: Path, ranks: Ranks):
    """Starts the simulator and yields a CameraEnv; what the simulator prints goes to a file."""
    run_dir.mkdir(parents=True, exist_ok=True)  # ranks other than 0 may be here first
    log = open(run_dir / f"simulator{ranks.rank or ''}.log", "a")
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        from isaaclab.app import launch_simulation

        cfg.seed = args.seed + ranks.rank
        launcher = argparse.Namespace(device=args.device, headless=True, enable_cameras=True)
        simulation = contextlib.ExitStack()
        simulation.enter_context(launch_simulation(cfg, launcher))
        with seeded_generators(args.seed):
            env = CameraEnv(args, cfg, ranks)
    with simulation:
        yield env
        env.env.close()


# ======== rollout =====================================================================================================
class Network(nn.Sequential):
    """The CNN of Mnih et al. 2015 (Nature 518), from bytes to 512 features; orthogonal weights, zero biases."""

    def __init__(self):
        sizes, layers = ((STACK, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)), []  # channels in and out, kernel, stride
        for size in sizes:
            layers += [orthogonal(nn.Conv2d(*size), math.sqrt(2)), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), orthogonal(nn.Linear(64 * 7 * 7, 512), math.sqrt(2)), nn.ReLU())

    def forward(self, frames: Tensor) -> Tensor:
        return super().forward(frames.to(torch.float32, memory_format=torch.channels_last) / 255)  # a faster layout


def orthogonal(layer: nn.Module, gain: float) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class ActorCritic(Policy):
    """One network for policy and value; `Policy` has the distribution: Gaussian or categorical."""

    def __init__(self, spaces: Spaces, args: Args):
        super().__init__(spaces, args, NETWORK)
        self.network = Network()
        self.actor, self.critic = orthogonal(nn.Linear(512, spaces.outputs), 0.01), orthogonal(nn.Linear(512, 1), 1.0)
        self.log_std = nn.Parameter(torch.full((spaces.continuous,), math.log(args.init_std)))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters of the distribution (B, P) and values (B,) for stacked frames (B, 4, 84, 84)."""
        with self.autocast():
            features = self.network(obs)
            out, value = self.actor(features).float(), self.critic(features).float()
        return self.distribution(out), value.squeeze(-1)

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Actions (N, C) for stacked frames: drawn with `noise` (N, P), or the most likely ones for None.

        Returns:
            action, parameters (N, P), value (N,).
        """
        params, value = self(obs)
        return self.sample(params, noise), params, value


# Copied from ppo_isaac.py:ADVANTAGE
ADVANTAGE = -3  # its column in Batch.rest


class Batch(NamedTuple):
    """A rollout, ready for the update; sample t * N + n is step t of environment n."""

    frames: Tensor  # (T + 3, N, 84, 84) each frame once, with the 3 before the rollout
    first: Tensor  # (T, N) row of `frames` that is the first one to be seen at step t
    rest: Tensor  # (T * N, D) action, parameters, then log-probability, advantage, return and value: one gather
    log_std: Tensor  # (C,)
    figures: dict[str, Tensor]  # for the log, on the device

    def obs(self, index: Tensor) -> Tensor:
        """Stacked frames (B, 4, 84, 84) of samples (B,), as the rollout saw them."""
        t, n = index // self.first.shape[1], index % self.first.shape[1]
        rows = torch.maximum(t[:, None] + torch.arange(STACK, device=t.device), self.first[t, n][:, None])
        return self.frames[rows, n[:, None]]


class Storage:
    """Buffers of a rollout, and what goes over from one rollout to the next."""

    def __init__(self, args: Args, env: CameraEnv):
        T, N, spaces = args.num_steps, env.num_envs, env.spaces
        zeros = functools.partial(torch.zeros, device=args.device)
        self.frames = zeros(T + STACK, N, SIZE, SIZE, dtype=torch.uint8)
        self.final = zeros(T, N, SIZE, SIZE, dtype=torch.uint8)
        self.action = zeros(T, N, spaces.continuous or len(spaces.choices))
        self.params = zeros(T, N, spaces.outputs)
        self.reward, self.value = zeros(T, N), zeros(T, N)
        self.terminated, self.truncated = zeros(T, N, dtype=torch.bool), zeros(T, N, dtype=torch.bool)

    def begin(self, env: CameraEnv, args: Args, iteration: int, carried: dict | None) -> None:
        """Starts the environments, or goes on where a checkpoint left them: a run and its continuation do so alike."""
        env.restart(args.seed, iteration * args.num_steps, args.stagger, carried)


@torch.no_grad()
def rollout(env: CameraEnv, policy: ActorCritic, store: Storage, args: Args, iteration: int, ranks: Ranks, timer) -> None:
    """T steps everywhere, across episodes, into `store`."""
    with timer("policy"):
        obs = env.stack
        store.frames[:STACK] = obs.transpose(0, 1)
        noise = policy.noise(args.num_steps, env.num_envs, ranks, args.seed, 1, iteration)
    for t in range(args.num_steps):
        with timer("policy"):
            action, params, value = policy.act(obs, noise[t])
        with timer("env"):
            obs, reward, terminated, truncated, final = env.step(action)
        with timer("policy"):
            store.action[t], store.params[t], store.reward[t], store.value[t] = action, params, reward, value
            store.terminated[t], store.truncated[t], store.frames[t + STACK] = terminated, truncated, obs[:, -1]
            if final is not None:
                store.final[t] = final


@torch.no_grad()
def make_batch(env: CameraEnv, policy: ActorCritic, store: Storage, args: Args, ranks: Ranks) -> Batch:
    """Log-probabilities and advantages of a rollout, all steps at once."""
    T, N = store.reward.shape
    done = store.terminated | store.truncated
    starts = torch.arange(STACK, T + STACK - 1, device=done.device)[:, None] * done[:-1]  # (T - 1, N) rows of `frames`
    first = torch.cat([torch.zeros_like(starts[:1]), starts]).cummax(0).values if T > 1 else torch.zeros_like(done, dtype=int)
    batch = Batch(store.frames, first, store.value, policy.log_std.detach().clone(), {})
    t, n = timed_out = (store.truncated & ~store.terminated).nonzero(as_tuple=True)
    last = torch.cat([batch.obs(t * N + n)[:, 1:], store.final[timed_out][:, None]], 1)  # (E, 4, 84, 84)
    final_values = torch.zeros_like(store.reward)
    final_values[timed_out] = policy(last)[1]
    rewards, flags = store.reward.sign() if args.sign_rewards else store.reward, (store.terminated, store.truncated)
    after = policy(env.stack)[1]
    advantages, returns = gae(rewards, store.value, *flags, final_values, after, args.gamma, args.gae_lambda)
    log_prob = policy.log_prob(store.params, store.action)
    rest = torch.cat([store.action, store.params, torch.stack([log_prob, advantages, returns, store.value], -1)], -1)
    figures = {"finished": env.finished(store.reward, done), "reward": store.reward.mean(), "value": store.value.mean()}
    figures |= {"residual": (returns - store.value).var(), "variance": returns.var()}
    return batch._replace(rest=rest.flatten(0, 1), figures=figures)


# ======== loss ========================================================================================================
def ppo_loss(policy: ActorCritic, batch: Batch, obs: Tensor, rest: Tensor, size: int, args: Args):
    """Clipped surrogate, clipped value loss and entropy bonus of a minibatch.

    Args:
        obs: (B, 4, 84, 84) stacked frames.
        rest: (B, D) rows of the batch.
        size: samples of the minibatch over all ranks; sums are divided by it.

    Returns:
        loss, (5,) policy loss, value loss, entropy, clip fraction and KL(old | new), and the ratio.
    """
    action, old = rest[..., : ADVANTAGE - 1].tensor_split([-policy.spaces.outputs], -1)
    old_log_prob, advantage, target, old_value = rest[..., ADVANTAGE - 1 :].unbind(-1)
    params, value = policy(obs)
    ratio = torch.exp(policy.log_prob(params, action) - old_log_prob)
    clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
    policy_loss = -torch.minimum(advantage * ratio, advantage * clipped).sum() / size
    error = (value - target).square()
    if args.clip_value:
        near = old_value + (value - old_value).clamp(-args.clip, args.clip)
        error = torch.maximum(error, (near - target).square())
    value_loss = 0.5 * error.sum() / size
    entropy = policy.entropy(params).sum() / size
    with torch.no_grad():
        kl = policy.kl(old, batch.log_std, params).sum() / size
        sums = torch.stack([policy_loss, value_loss, entropy, (ratio != clipped).sum() / size, kl])
    return policy_loss - args.entropy_coef * entropy + args.value_coef * value_loss, sums, ratio


# ======== train =======================================================================================================
def plan_minibatches(args: Args, iteration: int, ranks: Ranks) -> list[list[tuple[Tensor, int]]]:
    """For every epoch, a new permutation of all samples, cut into minibatches.

    Every rank draws the same permutation and keeps its own samples.

    Returns:
        Per epoch and minibatch: indices (n,) of this rank's samples, and the number of samples over all ranks.
    """
    generator = seeded_generator(args.device, args.seed, 2, iteration)
    total, own, plan = args.num_envs, args.num_envs // ranks.world, []
    for _ in range(args.epochs):
        order = torch.randperm(total * args.num_steps, generator=generator, device=args.device)
        parts = [(part, len(part)) for part in order.tensor_split(args.minibatches)]
        if ranks.world > 1:  # sample t * total + n belongs to the rank of environment n
            mine = [part[part % total // own == ranks.rank] for part, _ in parts]
            parts = [(part // total * own + part % own, size) for part, (_, size) in zip(mine, parts)]
        plan.append(parts)
    return plan


def update(policy: ActorCritic, optimizer, batch: Batch, plan: list, args: Args, ranks: Ranks) -> Tensor:
    """Epochs over a rollout. Returns (7,): means of what `ppo_loss` reports, largest gradient norm, first |ratio - 1|."""
    rate, (flat,) = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["params"]
    stopped = torch.zeros((), device=args.device)
    edges = torch.tensor([args.target_kl / 2, args.target_kl * 2], device=args.device)
    factors = torch.tensor([1.5, 1.0, 1 / 1.5], device=args.device)
    figures, norms, first = [], [], None
    for parts in plan:
        for index, size in parts:
            rest = batch.rest[index]
            if args.normalize_advantages:
                normalize_advantages(rest[..., ADVANTAGE], size, ranks)
            loss, sums, ratio = ppo_loss(policy, batch, batch.obs(index), rest, size, args)
            flat.grad.zero_()
            loss.backward()
            ranks.reduce(flat.grad)
            norms.append(torch.nn.utils.clip_grad_norm_(flat, args.max_grad_norm))
            if first is None:
                first = (ratio.detach() - 1).abs().max() if ratio.numel() else stopped
            elif args.schedule == "adaptive":
                kl = ranks.reduce(sums[4].clone())
                rate.mul_(factors.take(torch.bucketize(kl, edges)) ** (1 - stopped)).clamp_(1e-5, 1e-2)
            if args.stop_kl:
                optimizer.found_inf = stopped  # a step that Adam leaves out, without asking the device
            optimizer.step()
            figures.append(sums)
        if args.stop_kl:
            epoch_kl = ranks.reduce(torch.stack(figures[-len(parts) :])[:, 4].mean())
            stopped = torch.maximum(stopped, (epoch_kl > args.stop_kl).float())
    return torch.cat([torch.stack(figures).mean(0), torch.stack([torch.stack(norms).max(), first])])


def train(args: Args, env: CameraEnv, policy: ActorCritic, logger: RunLogger, ranks: Ranks, state: dict | None) -> None:
    """The whole run: iterate, evaluate, summarise."""
    rate = torch.tensor(args.learning_rate, device=args.device)  # on the device, where the adaptive schedule changes it
    optimizer, store = torch.optim.Adam([flat_parameter(policy)], rate, eps=1e-5, fused=True), Storage(args, env)
    run = state or {"iteration": 0, "elapsed": 0.0, "stages": {}, "best": -math.inf}
    carried = run.pop("carried")[ranks.rank] if state else None
    if state:
        optimizer.load_state_dict(run.pop("optimizer"))
        rate = optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"].to(args.device)
    timer, begin = StageTimer(args.device), time.time() - run["elapsed"]
    steps, result, latest = args.num_envs * args.num_steps, {}, None
    if args.compile:
        policy.network.compile()
    for iteration in range(run["iteration"], args.iterations):
        if carried or iteration == 0:
            store.begin(env, args, iteration, carried)
            carried = None
        if args.schedule != "adaptive":
            rate.fill_(args.learning_rate * (1 - iteration / args.iterations if args.schedule == "linear" else 1))
        rollout(env, policy, store, args, iteration, ranks, timer)
        with timer("update"):
            batch = make_batch(env, policy, store, args, ranks)
            figures = update(policy, optimizer, batch, plan_minibatches(args, iteration, ranks), args, ranks)
            metrics = describe_iteration(batch, policy, rate, figures, args, ranks) | task_metrics(env.base)
        check_finite(metrics, iteration, logger, math.inf if iteration else 0.05 if args.mixed_precision else 1e-3)
        metrics |= close_iteration(run, timer, iteration, steps)
        last = iteration + 1 == args.iterations
        save, test = (last or (every > 0 and (iteration + 1) % every == 0) for every in (args.save_every, args.eval_every))
        if save or test:
            carried = env.state()
        if test and args.eval_episodes:
            result = evaluate(args, env, policy, ranks)
            metrics |= {"eval/return": result["mean"], "eval/length": result["length"]}
        run["elapsed"] = time.time() - begin
        logger.log(iteration, metrics | {"time/elapsed": run["elapsed"]})
        latest = metrics.get("eval/return", metrics.get("rollout/return", latest))
        by_test = args.eval_every and args.eval_episodes  # else by the latest rollout
        score = metrics.get("eval/return" if by_test else "rollout/return", -math.inf)
        if (test if by_test else save) and score > run["best"]:
            run["best"] = score
            save_checkpoint(args, policy, None, run, "best", logger)
        if save:
            everywhere = run | {"carried": ranks.gather(carried)}
            save_checkpoint(args, policy, optimizer, everywhere, f"step_{iteration + 1:06d}", logger)
            logger.curve_png()
    if result:
        logger.event(f"deterministic policy: {RESULT.format(**result)}")
    if args.capture_video:
        evaluate(args, env, policy, ranks, logger)
    own = {"return": latest, "eval": result, "assets": os.environ.get("ISAACSIM_ASSET_ROOT", "NVIDIA's")}
    logger.summary(run_summary(args, "ppo_rgb", run, steps, ranks) | own)


# Copied from ppo_isaac.py:describe_iteration
def describe_iteration(batch: Batch, policy: ActorCritic, rate: Tensor, figures: Tensor, args: Args, ranks: Ranks) -> dict:
    """The metrics of one iteration."""
    names = ("policy_loss", "value_loss", "entropy", "clip_frac", "kl")
    sums = {"finished": batch.figures["finished"], **dict(zip(names, figures))}
    shares = {name: x / ranks.world for name, x in batch.figures.items() if name != "finished"}
    std = policy.log_std.detach().exp().sum() / max(len(policy.log_std), 1)
    extremes = {"grad_norm": figures[5], "first_ratio_error": figures[6], "learning_rate": rate, "action_std": std}
    host = to_host(sums | shares, extremes, ranks)
    total, length, episodes = host.pop("finished")
    host = {name: value[0] for name, value in host.items()}
    metrics = {f"update/{name}": host[name] for name in (*names, *extremes)}
    metrics["update/loss"] = host["policy_loss"] - args.entropy_coef * host["entropy"] + args.value_coef * host["value_loss"]
    metrics["update/explained_variance"] = 1 - host["residual"] / max(host["variance"], 1e-12)
    metrics |= {"rollout/reward": host["reward"], "rollout/value": host["value"], "rollout/episodes": episodes}
    return metrics | ({"rollout/return": total / episodes, "rollout/length": length / episodes} if episodes else {})


# ======== evaluate ====================================================================================================
@torch.no_grad()
def evaluate(args: Args, env: CameraEnv, policy: ActorCritic, ranks: Ranks, film: RunLogger | None = None) -> dict[str, float]:
    """Return of the deterministic policy in the first episode of each environment, from fixed starts.

    Args:
        film: saves what up to 16 environments look like after every second step.

    Returns:
        mean, std (over episodes), length, episodes.
    """
    obs, _ = env.restart(args.eval_seed, stagger=False)
    count = max(1, min(args.eval_episodes, args.num_envs) // ranks.world)
    alive = torch.arange(env.num_envs, device=obs.device) < count  # (N,)
    sums, frames = torch.zeros(2, env.num_envs, device=obs.device), []  # (2, N) return, length
    for t in range(env.horizon):
        action, _, _ = policy.act(obs, None)
        obs, reward, terminated, truncated, _ = env.step(action)
        sums += alive * torch.stack([reward, torch.ones_like(reward)])
        alive &= ~(terminated | truncated)
        if film and t % 2 == 0 and len(frames) < 200:
            frames.append(env.image()[:16].clone())
        if t % 50 == 49 and not alive.any():  # no message between ranks is left out by this
            break
    if film:
        images = torch.stack(frames).cpu().numpy()  # (F, n, H, W, 3)
        film.save_gif("policy", images, np.zeros(images.shape[1], dtype=bool), fps=0.5 / (args.frame_skip * env.base.step_dt))
    total = ranks.reduce(torch.stack([sums[0].sum(), sums[0].square().sum(), sums[1].sum()]))
    mean, square, length = (total / (count * ranks.world)).tolist()
    return {"mean": mean, "std": max(square - mean**2, 0) ** 0.5, "length": length, "episodes": count * ranks.world}


# ======== main ========================================================================================================
def main(args: Args) -> None:
    asked, args = args.task, resolve(args)
    ranks = Ranks.start(args.device)
    args.exp_name = ranks.broadcast(args.exp_name)
    run_dir = Path(args.resume or Path("runs") / args.exp_name)
    cfg = task_config(args.task, args.device, args.num_envs // ranks.world, args.physics, args.overrides, {}, True)
    colour_camera(args.task, cfg)  # refuses a task that has none
    state = load_run(args, run_dir, lambda folder: None)  # the policy is loaded where it is made
    folder = latest_checkpoint(run_dir) if state else args.checkpoint
    logger = start_logger(args, run_dir, __file__, [HERE / "policies.py", HERE / "stock_tasks.py"], state, ranks)
    logger.event(f"{run_dir}: {args.task} on {args.device}, {args.num_envs} envs, {args.num_steps} steps a rollout")
    if asked not in (None, args.task):
        logger.event(f"{asked} is called {args.task} in this Isaac Lab")
    logger.event(f"starting the simulator (its own output: {run_dir}/simulator.log)")
    failure = None
    with make_env(args, cfg, run_dir, ranks) as env:
        try:
            torch.manual_seed(args.seed)  # of the weights
            policy = ActorCritic(env.spaces, args).to(args.device)
            if folder:
                load_policy(policy, folder)
            if args.evaluate:
                result = evaluate(args, env, policy, ranks, logger if args.capture_video else None)
                logger.event(f"deterministic policy of {args.checkpoint}: {RESULT.format(**result)}")
                logger.summary({"task": args.task, "checkpoint": args.checkpoint, "eval": result})
            else:
                train(args, env, policy, logger, ranks, state)
        except UsageError as error:  # the simulator would print a traceback
            failure = error
    logger.close()
    ranks.stop()
    if failure:
        raise failure


if __name__ == "__main__":
    try:
        main(ARGS)
    except UsageError as error:
        sys.exit(f"error: {error}")
