"""PPO on Isaac Lab's own tasks, from state observations: the baseline that everything else is compared with.

    python ppo_isaac.py                                              # laptop: Isaac-Cartpole-Direct, no GPU needed
    python ppo_isaac.py --task Isaac-Humanoid-Direct --num-envs 4096
    python ppo_isaac.py --evaluate --checkpoint runs/<name>/checkpoints/best
    torchrun --nproc_per_node=8 ppo_isaac.py --task Isaac-Humanoid-Direct --num-envs 32768

PPO is Schulman et al. 2017 (arXiv 1707.06347); "The 37 Implementation Details of PPO" (Huang et al., ICLR blog track
2022) says what else matters, and docs/ppo_isaac.md where each detail stands here. How this differs from CleanRL's
ppo_continuous_action.py, the reference of that article:
- Time-outs are no terminations: the value of the true final observation is bootstrapped (arXiv 1712.00378).
- Values and log-probabilities are computed after the rollout, all steps in one pass; the rollout runs the actor alone.
- The learning rate follows the KL of the policy, as Isaac Lab's recipes do; `--schedule linear` anneals it.
- The critic sees the task's critic observations where it has some.
- At a checkpoint a run itself goes on from what the checkpoint holds: a resumed run equals an uninterrupted one.
- Neither rollout nor update waits for the device: the learning rate and the target-KL stop live there, too.
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
    task: str | None = None  # registered Isaac Lab task (default: the checkpoint's, or Isaac-Cartpole-Direct)
    checkpoint: str | None = None  # folder of a saved policy: evaluated with --evaluate, trained further without
    seed: int = 1  # seed of the weights, the environments, the actions and the minibatches
    device: str = "auto"  # cpu, cuda, cuda:N, or auto
    physics: str | None = None  # Isaac Lab physics preset (newton_mjwarp, isaacsim_physx, ...)
    overrides: tuple[str, ...] = ()  # Isaac Lab overrides of the task, as presets=box_discrete or env.decimation=4
    num_envs: int | None = None  # parallel environments over all ranks (default: 512 on a CPU, 4096 on a GPU)
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
    capture_video: bool = False  # film the deterministic policy after training (adds a camera to the scene)
    compile: bool = False  # torch.compile the networks
    mixed_precision: bool = False  # networks in bfloat16; log-probabilities, losses and optimizer stay in fp32

    # algorithm
    num_steps: int | None = None  # T, steps per environment and rollout
    epochs: int | None = None  # passes over a rollout
    minibatches: int = 4  # optimizer steps per epoch
    learning_rate: float | None = None  # Adam's learning rate, the initial one of the adaptive schedule
    schedule: Literal["adaptive", "linear", "constant"] = "adaptive"  # adaptive: follows --target-kl; linear: down to 0
    target_kl: float | None = None  # KL(old | new) that the adaptive schedule aims at
    stop_kl: float | None = None  # no further updates of a rollout after an epoch with more KL than this
    gamma: float | None = None  # discount
    gae_lambda: float | None = None  # lambda of GAE
    clip: float = 0.2  # clip range of the ratio, and of the value's change
    clip_value: bool = True  # clip the value loss
    normalize_advantages: bool = True  # to mean 0 and std 1 in every minibatch
    entropy_coef: float | None = None  # weight of the entropy bonus
    value_coef: float | None = None  # weight of the value loss, which has the 1/2 (Isaac Lab's recipes are without it)
    max_grad_norm: float = 1.0  # global gradient norm
    normalize_obs: bool | None = None  # observations to mean 0 and std 1, by running statistics
    clip_obs: float = 10.0  # bound on normalised observations
    normalize_returns: bool | None = None  # rewards divided by the running std of the discounted return
    clip_rewards: float = 10.0  # bound on such rewards
    clip_actions: float | None = None  # symmetric bound on actions, beside the action space's own
    stagger: bool = True  # first episodes of a rollout end at random ages, so time-outs are spread out
    hidden: tuple[int, ...] | None = None  # sizes of the hidden layers of actor and critic
    activation: Literal["elu", "tanh", "relu"] = "elu"  # of the hidden layers
    init: Literal["orthogonal", "torch"] | None = None  # weights: orthogonal with gains, or as torch makes layers
    init_std: float = 1.0  # initial std of the Gaussian policy
    recurrent: bool = False  # an LSTM before the layers of actor and critic
    lstm_size: int = 128  # its hidden size
    obs_groups: tuple[str, ...] | None = None  # the task's observation groups that the policy sees, joined
    critic_groups: tuple[str, ...] | None = None  # those that the critic sees (default: critic, or as the policy)
    hide_obs: tuple[int, ...] = ()  # columns of the policy observation to leave out (makes a task one of memory)


LOCOMOTION = dict(num_steps=32, learning_rate=5e-4, hidden=(400, 200, 100), entropy_coef=0.0)
CARTPOLE = dict(num_steps=16, hidden=(32, 32), init="torch", normalize_returns=True, value_coef=1.0, iterations=150)
LIFT = dict(num_steps=32, gamma=0.995, gae_lambda=0.9, hidden=(512, 256, 128), normalize_obs=True, iterations=15_000)
STACK = dict(num_steps=48, gamma=0.995, normalize_obs=True, iterations=3000)
# hyperparameters per task, from Isaac Lab's recipes (init, scaled returns and value_coef of CARTPOLE are ours); flags override
TASKS: dict[str, dict] = {
    "Isaac-Cartpole-Direct": CARTPOLE,
    "Isaac-Cartpole": CARTPOLE,
    "IsaacContrib-Cartpole-Showcase-Direct": CARTPOLE,
    "Isaac-Ant-Direct": LOCOMOTION,
    "Isaac-Ant": LOCOMOTION,
    "Isaac-Humanoid-Direct": dict(LOCOMOTION, normalize_obs=True, value_coef=4.0),
    "Isaac-Humanoid": dict(LOCOMOTION, normalize_obs=True, value_coef=4.0),
    "Isaac-Reach-Franka": dict(CARTPOLE, num_steps=24, epochs=8, hidden=(64, 64), entropy_coef=0.01, iterations=1000),
    "Isaac-Lift-Franka": dict(LIFT, obs_groups=("policy", "proprio", "perception")),
    "Isaac-Open-Drawer-Franka": dict(num_steps=96, learning_rate=5e-4, target_kl=0.02, entropy_coef=1e-3, iterations=400),
    "IsaacContrib-Stack-Cube-Franka": STACK,  # no recipe to start from: a guess
    "IsaacContrib-Stack-Cube-Franka-IK-Rel": STACK,
}
# for what a task leaves open
DEFAULTS = dict(
    num_steps=24, epochs=5, learning_rate=1e-3, target_kl=0.01, gamma=0.99, gae_lambda=0.95, entropy_coef=0.005,
    value_coef=2.0, hidden=(256, 128, 64), iterations=1000, normalize_obs=False, normalize_returns=False,
    obs_groups=("policy",), init="orthogonal",
)  # fmt: skip
# what makes a network; a checkpoint keeps it
NETWORK = ("hidden", "activation", "init_std", "recurrent", "lstm_size", "normalize_obs", "clip_obs")
NETWORK += ("obs_groups", "critic_groups", "hide_obs")
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
from policies import Network, Policy, RunningNorm, flat_parameter
from stock_tasks import (
    Spaces, VecEnv, add_camera, load_policy, seeded_generators, settle_task, task_config, task_metrics, to_cpu,
)  # fmt: skip


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
    network = settle_task(args, "Isaac-Cartpole-Direct", NETWORK)
    own = {"num_envs": 4096 if args.device.startswith("cuda") else 512, **DEFAULTS, **TASKS.get(args.task, {}), **network}
    for name, value in own.items():
        if getattr(args, name) is None or name in network:
            setattr(args, name, value)
    positive = "num_envs iterations save_every keep_checkpoints num_steps epochs minibatches learning_rate target_kl stop_kl"
    positive += " clip max_grad_norm clip_obs clip_rewards clip_actions init_std lstm_size"
    check_numbers(args, positive, "entropy_coef value_coef eval_every eval_episodes seed eval_seed", "gamma gae_lambda")
    if min(args.hidden, default=0) < 1:
        raise UsageError(f"--hidden {' '.join(map(str, args.hidden))}: needs at least one size, each of 1 or more")
    check_ranks(args, "num_envs")
    samples = args.num_envs * (1 if args.recurrent else args.num_steps)
    if samples < 2 * args.minibatches:
        what = "environments" if args.recurrent else "steps (--num-envs times --num-steps)"
        raise UsageError(f"--minibatches {args.minibatches}: {samples} {what} leave fewer than 2 for each; use fewer")
    args.exp_name = run_name(args, "ppo_isaac")
    return args


# ======== env =========================================================================================================
@contextlib.contextmanager
def make_env(args: Args, cfg, run_dir: Path, ranks: Ranks):
    """Starts the simulator and yields a VecEnv; what the simulator prints goes to a file."""
    run_dir.mkdir(parents=True, exist_ok=True)  # ranks other than 0 may be here first
    log = open(run_dir / f"simulator{ranks.rank or ''}.log", "a")
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        from isaaclab.app import launch_simulation

        cfg.seed = args.seed + ranks.rank
        if args.capture_video:
            add_camera(cfg)
        launcher = argparse.Namespace(device=args.device, headless=True, enable_cameras=args.capture_video)
        simulation = contextlib.ExitStack()
        simulation.enter_context(launch_simulation(cfg, launcher))
        with seeded_generators(args.seed):
            env = VecEnv(args, cfg, ranks)
    with simulation:
        yield env
        env.env.close()


# ======== rollout =====================================================================================================
class ActorCritic(Policy):
    """Separate networks for policy and value; `Policy` has the distribution: Gaussian or categorical."""

    def __init__(self, spaces: Spaces, args: Args):
        super().__init__(spaces, args, NETWORK)
        self.actor = Network(spaces.obs, spaces.outputs, 0.01, args)
        self.critic = Network(spaces.critic or spaces.obs, 1, 1.0, args)
        self.log_std = nn.Parameter(torch.full((spaces.continuous,), math.log(args.init_std)))
        self.obs_norm = RunningNorm(*spaces.obs, args.clip_obs) if args.normalize_obs else nn.Identity()
        own = args.normalize_obs and spaces.critic
        self.critic_norm = RunningNorm(*spaces.critic, args.clip_obs) if own else nn.Identity()
        self.return_norm = RunningNorm(1, math.inf)

    def forward(self, obs: Tensor, state: Tensor | None = None, starts: Tensor | None = None):
        """Parameters of the distribution for normalised observations, and the LSTM's states."""
        with self.autocast():
            out, states = self.actor(obs, state, starts)
        return self.distribution(out), states

    def value(self, obs: Tensor, state: Tensor | None = None, starts: Tensor | None = None):
        """Values (...,) of normalised critic observations, and the LSTM's states."""
        with self.autocast():
            out, states = self.critic(obs, state, starts)
        return out.squeeze(-1), states

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor | None, state: Tensor | None = None, starts: Tensor | None = None):
        """Actions (N, C) for raw observations (N, d): drawn with `noise` (N, P), or the most likely ones for None.

        Returns:
            action, parameters (N, P), the LSTM's state (2, N, H).
        """
        obs = self.obs_norm(obs)
        if self.args.recurrent:
            params, states = self(obs[None], state, starts[None])
            params, state = params[0], states[0]
        else:
            params, _ = self(obs)
        return self.sample(params, noise), params, state


class Batch(NamedTuple):
    """A rollout, ready for the update; samples lie in the first dimension, or in the second for an LSTM."""

    obs: Tensor  # (T * N, d) normalised; (T, N, d) for an LSTM
    critic: Tensor  # (T * N, dc), the same tensor where the critic sees the policy's
    rest: Tensor  # (T * N, D) action, parameters, then log-probability, advantage, return and value: one gather
    log_std: Tensor  # (C,)
    starts: Tensor  # (T, N) bool
    states: tuple[Tensor, Tensor] | None  # (2, N, H) of actor and critic before the rollout
    figures: dict[str, Tensor]  # for the log, on the device


ADVANTAGE = -3  # its column in Batch.rest


class Storage:
    """Buffers of a rollout, and what goes over from one rollout to the next."""

    def __init__(self, args: Args, env: VecEnv):
        T, N, spaces = args.num_steps, env.num_envs, env.spaces
        zeros = functools.partial(torch.zeros, device=args.device)
        self.obs = zeros(T + 1, N, *spaces.obs)
        self.critic = zeros(T + 1, N, *spaces.critic) if spaces.critic else self.obs
        self.final = zeros(T, *self.critic.shape[1:])
        self.action = zeros(T, N, spaces.continuous or len(spaces.choices))
        self.params = zeros(T, N, spaces.outputs)
        self.reward, self.returns = zeros(T, N), zeros(N)
        self.terminated, self.truncated = zeros(T, N, dtype=torch.bool), zeros(T, N, dtype=torch.bool)
        self.starts = zeros(T + 1, N, dtype=torch.bool)  # whether a step is the first of an episode
        self.states = [zeros(2, N, args.lstm_size) for _ in range(2)] if args.recurrent else None  # actor, critic
        self.after = None  # the actor's state after the rollout

    def begin(self, env: VecEnv, args: Args, iteration: int, carried: dict | None) -> None:
        """Starts the environments, or goes on where a checkpoint left them: a run and its continuation do so alike."""
        steps = iteration * args.num_steps
        obs, critic = env.restart(args.seed, steps, args.stagger, carried)
        starts, self.returns = torch.ones_like(self.starts[-1]), torch.zeros_like(self.returns)
        if carried:
            starts = carried["starts"].to(starts.device)
            self.returns, self.states = carried["returns"].to(starts.device), carried["states"]
            self.states = self.states and [x.to(starts.device) for x in self.states.values()]
            starts = starts | env.done
        self.obs[-1], self.critic[-1], self.starts[-1] = obs, critic, starts

    def carry(self, env: VecEnv) -> dict:
        """What `begin` goes on from."""
        states = dict(zip("ac", self.states)) if self.states else {}
        return env.state() | to_cpu({"starts": self.starts[-1], "returns": self.returns, "states": states})


@torch.no_grad()
def rollout(env: VecEnv, policy: ActorCritic, store: Storage, args: Args, iteration: int, ranks: Ranks, timer) -> None:
    """T steps everywhere, across episodes, into `store`."""
    with timer("policy"):
        for x in (store.obs, store.critic, store.starts):
            x[0] = x[-1]
        noise = policy.noise(args.num_steps, env.num_envs, ranks, args.seed, 1, iteration)
        state = store.states and store.states[0]
    for t in range(args.num_steps):
        with timer("policy"):
            action, params, state = policy.act(store.obs[t], noise[t], state, store.starts[t])
        with timer("env"):
            obs, critic, reward, terminated, truncated, final = env.step(action)
        with timer("policy"):
            store.action[t], store.params[t], store.reward[t] = action, params, reward
            store.terminated[t], store.truncated[t], store.obs[t + 1] = terminated, truncated, obs
            torch.logical_or(terminated, truncated, out=store.starts[t + 1])
            if env.spaces.critic:
                store.critic[t + 1] = critic
            if final is not None:
                store.final[t] = final
    store.after = state


@torch.no_grad()
def make_batch(env: VecEnv, policy: ActorCritic, store: Storage, args: Args, ranks: Ranks) -> Batch:
    """Values, log-probabilities and advantages of a rollout, all steps at once."""
    T, critic_norm = args.num_steps, policy.critic_norm if env.spaces.critic else policy.obs_norm
    obs = critic = policy.obs_norm(store.obs)  # (T + 1, N, d)
    if env.spaces.critic:
        critic = critic_norm(store.critic)
    values, states = policy.value(critic, store.states and store.states[1], store.starts)  # (T + 1, N)
    timed_out = (store.truncated & ~store.terminated).nonzero(as_tuple=True)  # waits for the device
    final_values, last = torch.zeros_like(store.reward), critic_norm(store.final[timed_out])  # (T, N), (E, dc)
    if args.recurrent:
        t, n = timed_out
        fresh = torch.zeros(1, len(t), dtype=torch.bool, device=last.device)
        final_values[timed_out] = policy.value(last[None], states[t, :, n].transpose(0, 1), fresh)[0][0]
    else:
        final_values[timed_out] = policy.value(last)[0]
    rewards = scaled_rewards(policy, store, args, ranks) if args.normalize_returns else store.reward
    flags = (store.terminated, store.truncated)
    advantages, returns = gae(rewards, values[:T], *flags, final_values, values[T], args.gamma, args.gae_lambda)
    log_prob, done = policy.log_prob(store.params, store.action), store.starts[1:]
    rest = torch.cat([store.action, store.params, torch.stack([log_prob, advantages, returns, values[:T]], -1)], -1)
    figures = {"finished": env.finished(store.reward, done), "reward": store.reward.mean(), "value": values.mean()}
    figures |= {"residual": (returns - values[:T]).var(), "variance": returns.var()}
    dims = 0 if args.recurrent else 1
    obs, rest = obs[:T].flatten(0, dims), rest.flatten(0, dims)
    critic = critic[:T].flatten(0, dims) if env.spaces.critic else obs
    batch = Batch(obs, critic, rest, policy.log_std.detach().clone(), store.starts[:T].clone(), store.states, figures)
    if args.recurrent:
        store.states = [store.after, states[T - 1]]
    return batch


def scaled_rewards(policy: ActorCritic, store: Storage, args: Args, ranks: Ranks) -> Tensor:
    """Rewards (T, N) divided by the running std of the discounted return, and clipped."""
    history = []
    for reward, start in zip(store.reward, store.starts):
        store.returns = store.returns * args.gamma * ~start + reward
        history.append(store.returns)
    policy.return_norm.update(torch.stack(history)[..., None], ranks)
    return (store.reward * policy.return_norm.scale).clamp(-args.clip_rewards, args.clip_rewards)


# ======== loss ========================================================================================================
def ppo_loss(policy: ActorCritic, batch: Batch, obs: Tensor, critic: Tensor, rest: Tensor, size: int, args: Args, own=None):
    """Clipped surrogate, clipped value loss and entropy bonus of a minibatch.

    Args:
        obs, critic, rest: (B, ...) rows of the batch, or (T, n, ...) for the environments `own` (n,) of an LSTM.
        size: samples of the minibatch over all ranks; sums are divided by it.

    Returns:
        loss, (5,) policy loss, value loss, entropy, clip fraction and KL(old | new), and the ratio.
    """
    action, old = rest[..., : ADVANTAGE - 1].tensor_split([-policy.spaces.outputs], -1)
    old_log_prob, advantage, target, old_value = rest[..., ADVANTAGE - 1 :].unbind(-1)
    context, critic_context = (None, None), (None, None)
    if own is not None:
        context, critic_context = ((state[:, own], batch.starts[:, own]) for state in batch.states)
    params, _ = policy(obs, *context)
    ratio = torch.exp(policy.log_prob(params, action) - old_log_prob)
    clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
    policy_loss = -torch.minimum(advantage * ratio, advantage * clipped).sum() / size
    value, _ = policy.value(critic, *critic_context)
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
    """For every epoch, a new permutation of all samples (of the environments for an LSTM), cut into minibatches.

    Every rank draws the same permutation and keeps its own samples.

    Returns:
        Per epoch and minibatch: indices (n,) of this rank's samples, and the number of samples over all ranks.
    """
    generator, each = seeded_generator(args.device, args.seed, 2, iteration), args.num_steps if args.recurrent else 1
    total, own, plan = args.num_envs, args.num_envs // ranks.world, []
    for _ in range(args.epochs):
        order = torch.randperm(total * args.num_steps // each, generator=generator, device=args.device)
        parts = [(part, len(part) * each) for part in order.tensor_split(args.minibatches)]
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
        order, lengths = torch.cat([index for index, _ in parts]), [len(index) for index, _ in parts]
        dim = 1 if args.recurrent else 0
        all_obs, all_rest = (x.index_select(dim, order).split(lengths, dim) for x in (batch.obs, batch.rest))
        shared = batch.critic is batch.obs
        all_critic = all_obs if shared else batch.critic.index_select(dim, order).split(lengths, dim)
        for (index, size), obs, critic, rest in zip(parts, all_obs, all_critic, all_rest):
            if args.normalize_advantages:
                normalize_advantages(rest[..., ADVANTAGE], size, ranks)
            loss, sums, ratio = ppo_loss(policy, batch, obs, critic, rest, size, args, index if args.recurrent else None)
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


def train(args: Args, env: VecEnv, policy: ActorCritic, logger: RunLogger, ranks: Ranks, state: dict | None) -> None:
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
        policy.actor.compile()
        policy.critic.compile()
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
            if args.normalize_obs:  # only now: the update saw what the rollout saw
                policy.obs_norm.update(store.obs[:-1], ranks)
                if env.spaces.critic:
                    policy.critic_norm.update(store.critic[:-1], ranks)
            metrics = describe_iteration(batch, policy, rate, figures, args, ranks) | task_metrics(env.base)
        check_finite(metrics, iteration, logger, math.inf if iteration else 0.05 if args.mixed_precision else 1e-3)
        metrics |= close_iteration(run, timer, iteration, steps)
        last = iteration + 1 == args.iterations
        save, test = (last or (every > 0 and (iteration + 1) % every == 0) for every in (args.save_every, args.eval_every))
        if save or test:
            carried = store.carry(env)
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
    logger.summary(run_summary(args, "ppo", run, steps, ranks) | own)


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
def evaluate(args: Args, env: VecEnv, policy: ActorCritic, ranks: Ranks, film: RunLogger | None = None) -> dict[str, float]:
    """Return of the deterministic policy in the first episode of each environment, from fixed starts.

    Args:
        film: saves what up to 16 environments look like after every second step.

    Returns:
        mean, std (over episodes), length, episodes.
    """
    obs, _ = env.restart(args.eval_seed, stagger=False)
    count = max(1, min(args.eval_episodes, args.num_envs) // ranks.world)
    alive = torch.arange(env.num_envs, device=obs.device) < count  # (N,)
    starts, sums = torch.ones_like(alive), torch.zeros(2, env.num_envs, device=obs.device)  # (2, N) return, length
    state, frames = torch.zeros(2, env.num_envs, args.lstm_size, device=obs.device) if args.recurrent else None, []
    for t in range(env.horizon):
        action, _, state = policy.act(obs, None, state, starts)
        obs, _, reward, terminated, truncated, _ = env.step(action)
        sums += alive * torch.stack([reward, torch.ones_like(reward)])
        starts = terminated | truncated
        alive &= ~starts
        if film and t % 2 == 0 and len(frames) < 200:
            frames.append(env.base.scene["video_camera"].data.output["rgb"].torch[:16, ..., :3].clone())
        if t % 50 == 49 and not alive.any():  # no message between ranks is left out by this
            break
    if film:
        images = torch.stack(frames).cpu().numpy()  # (F, n, H, W, 3)
        film.save_gif("policy", images, np.zeros(images.shape[1], dtype=bool), fps=0.5 / env.base.step_dt)
    total = ranks.reduce(torch.stack([sums[0].sum(), sums[0].square().sum(), sums[1].sum()]))
    mean, square, length = (total / (count * ranks.world)).tolist()
    return {"mean": mean, "std": max(square - mean**2, 0) ** 0.5, "length": length, "episodes": count * ranks.world}


# ======== main ========================================================================================================
def main(args: Args) -> None:
    asked, args = args.task, resolve(args)
    if args.device == "cpu" and max(args.hidden) <= 64 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # several wait for each other: slower beside other work, no faster alone
    ranks = Ranks.start(args.device)
    args.exp_name = ranks.broadcast(args.exp_name)
    run_dir = Path(args.resume or Path("runs") / args.exp_name)
    groups = {"--obs-groups": args.obs_groups, "--critic-groups": args.critic_groups}
    cfg = task_config(args.task, args.device, args.num_envs // ranks.world, args.physics, args.overrides, groups)
    state = load_run(args, run_dir, lambda folder: None)  # the policy is loaded where it is made
    folder = latest_checkpoint(run_dir) if state else args.checkpoint
    logger = start_logger(args, run_dir, __file__, [HERE / "policies.py", HERE / "stock_tasks.py"], state, ranks)
    logger.event(f"{run_dir}: {args.task} on {args.device}, {args.num_envs} envs, {args.num_steps} steps a rollout")
    if asked not in (None, args.task):
        logger.event(f"{asked} is called {args.task} in this Isaac Lab")
    if isinstance(getattr(cfg, "rewards", None), dict):
        logger.event(f"{args.task} has no rewards: success earns 1, anything else that ends an episode is a failure")
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
