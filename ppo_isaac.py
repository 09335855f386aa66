"""PPO on Isaac Lab's own tasks, from state observations: the baseline that everything else is compared with.

    python ppo_isaac.py                                              # laptop: Isaac-Cartpole-Direct, no GPU needed
    python ppo_isaac.py --task Isaac-Humanoid-Direct --num-envs 4096
    python ppo_isaac.py --evaluate --checkpoint runs/<name>/checkpoints/best
    python ppo_isaac.py --export --checkpoint runs/<name>/checkpoints/best      # ONNX and TorchScript, no simulator
    torchrun --nproc_per_node=8 ppo_isaac.py --task Isaac-Humanoid-Direct --num-envs 32768

PPO is Schulman et al. 2017 (arXiv 1707.06347); "The 37 Implementation Details of PPO" (Huang et al., ICLR blog track
2022) says what else matters, and docs/ppo_isaac.md where each detail stands here. How this differs from CleanRL's
ppo_continuous_action.py, the reference of that article:
- Time-outs are no terminations: the value of the true final observation is bootstrapped (arXiv 1712.00378).
- Values and log-probabilities are computed after the rollout, all steps in one pass; the rollout runs the actor alone.
- The learning rate follows the KL of the policy, as Isaac Lab's recipes do; `--schedule linear` anneals it.
- The critic sees the task's critic observations where it has some.
- At a checkpoint a run itself goes on from what the checkpoint holds: a resumed run equals an uninterrupted one.
- An update does not wait for the device: the learning rate lives there, too. A rollout does where Isaac Lab's environments
  look for episodes that have ended, and once where time-outs are bootstrapped (`make_batch`).

One iteration: `rollout` -> `make_batch` -> `update` (`ppo_loss` per minibatch) -> `run.log`.
"""

# ======== imports =====================================================================================================
from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from common import check_not_negative, check_positive, run_name, saved_args
from tasks import current_name


# ======== Args ========================================================================================================
@dataclass
class Args:
    """Defaults are those for any task; what TASKS says about one goes before them, see `--help --task <name>`."""

    # general
    task: str = "Isaac-Cartpole-Direct"  # registered Isaac Lab task
    checkpoint: str | None = None  # folder of a saved policy: evaluated with --evaluate, trained further without
    seed: int = 1  # seed of the weights, the environments, the actions and the minibatches
    device: str = "auto"  # cpu, cuda, cuda:N, or auto
    physics: str | None = None  # Isaac Lab physics preset (newton_mjwarp, isaacsim_physx, ...), or mujoco_c: a CPU's default
    overrides: tuple[str, ...] = ()  # Isaac Lab overrides of the task, as presets=box_discrete or env.decimation=4
    num_envs: int = 512  # parallel environments over all ranks; a GPU takes 4096
    iterations: int = 1000  # rollout-and-update iterations
    evaluate: bool = False  # evaluate --checkpoint, and nothing else
    export: bool = False  # write --checkpoint to its folder exported/ as ONNX and TorchScript; trains nothing
    eval_every: int = 0  # iterations between evaluations of the deterministic policy; 0: only at the end
    eval_episodes: int = 256  # episodes of an evaluation (at most one per environment); 0: none
    eval_seed: int = 7_000_000  # seed of the evaluation's episodes, the same for every evaluation
    save_every: int = 50  # iterations between checkpoints
    resume: str | None = None  # runs/<name>: goes on from its latest checkpoint, with its arguments
    exp_name: str | None = None  # runs/<exp-name>; made of script, task, seed and time by default
    capture_video: bool = False  # film the deterministic policy after training (adds a camera to the scene)
    compile: bool = False  # torch.compile the networks
    mixed_precision: bool = False  # networks in bfloat16; log-probabilities, losses and optimizer stay in fp32

    # algorithm
    num_steps: int = 24  # T, steps per environment and rollout
    epochs: int = 5  # passes over a rollout
    minibatches: int = 4  # optimizer steps per epoch
    learning_rate: float = 1e-3  # Adam's learning rate, the initial one of the adaptive schedule
    schedule: Literal["adaptive", "linear", "constant"] = "adaptive"  # adaptive: follows --target-kl; linear: down to 0
    target_kl: float = 0.01  # KL(old | new) that the adaptive schedule aims at
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda of GAE
    clip: float = 0.2  # clip range of the ratio, and of the value's change
    clip_value: bool = True  # clip the value loss
    entropy_coef: float = 0.005  # weight of the entropy bonus
    value_coef: float = 2.0  # weight of the value loss, which has the 1/2 (Isaac Lab's recipes are without it)
    max_grad_norm: float = 1.0  # global gradient norm
    normalize_obs: bool = False  # observations to mean 0 and std 1, by running statistics
    normalize_returns: bool = False  # rewards divided by the running std of the discounted return
    clip_actions: float | None = None  # symmetric bound on actions, beside the action space's own
    stagger: bool = True  # first episodes of a rollout end at random ages, so time-outs are spread out
    hidden: tuple[int, ...] = (256, 128, 64)  # sizes of the hidden layers of actor and critic
    activation: Literal["elu", "tanh", "relu"] = "elu"  # of the hidden layers
    init: Literal["orthogonal", "torch"] = "orthogonal"  # weights: orthogonal with gains, or as torch makes layers
    init_std: float = 1.0  # initial std of the Gaussian policy
    recurrent: bool = False  # an LSTM before the layers of actor and critic
    lstm_size: int = 128  # its hidden size
    obs_groups: tuple[str, ...] = ("policy",)  # the task's observation groups that the policy sees, joined
    hide_obs: tuple[int, ...] = ()  # columns of the policy observation to leave out (makes a task one of memory)


LOCOMOTION = dict(num_steps=32, learning_rate=5e-4, hidden=(400, 200, 100), entropy_coef=0.0)
CARTPOLE = dict(num_steps=16, hidden=(32, 32), init="torch", normalize_returns=True, value_coef=1.0, iterations=150)
LIFT = dict(num_steps=32, gamma=0.995, gae_lambda=0.9, hidden=(512, 256, 128), normalize_obs=True, iterations=15_000)
STACK = dict(num_steps=48, gamma=0.995, normalize_obs=True, iterations=3000)
# from Isaac Lab's recipes (init, scaled returns and value_coef of CARTPOLE are ours)
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
# what makes a network; a checkpoint keeps it
NETWORK = ("hidden", "activation", "init_std", "recurrent", "lstm_size", "normalize_obs", "obs_groups", "hide_obs")
CLIP = 10.0  # bound on normalised observations and on scaled rewards


def parse(command: list[str] | None = None) -> Args:
    """The command line, over the run to resume, or over the task's settings and the checkpoint's network."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--task", "--checkpoint", "--resume"):
        early.add_argument(name)
    asked, _ = early.parse_known_args(command)
    default = saved_args(asked.resume, Args) if asked.resume else task_args(asked.task, asked.checkpoint)
    args = tyro.cli(Args, args=command, default=default)
    check(args)
    return args


def task_args(task: str | None = None, checkpoint: str | None = None) -> Args:
    """The settings for a task, and for the network of a checkpoint, whose task is the default."""
    saved = {}
    if checkpoint:
        try:
            found = json.loads((Path(checkpoint) / "policy.json").read_text())
            saved = {name: tuple(x) if isinstance(x := found[name], list) else x for name in ("task", *NETWORK)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"--checkpoint {checkpoint}: no policy of this script there ({error!r})") from error
        if task and current_name(task) != current_name(saved["task"]):
            raise SystemExit(f"--checkpoint {checkpoint}: a policy for {saved['task']}, not for --task {task}")
    task = task or saved.get("task", Args.task)
    return Args(**{**TASKS.get(current_name(task), {}), **saved, "task": task, "checkpoint": checkpoint})


def check(args: Args) -> None:
    """Refuses what cannot work, or would ruin a run in silence."""
    check_positive(
        num_envs=args.num_envs, iterations=args.iterations, save_every=args.save_every, num_steps=args.num_steps,
        epochs=args.epochs, minibatches=args.minibatches, learning_rate=args.learning_rate, target_kl=args.target_kl,
        clip=args.clip, max_grad_norm=args.max_grad_norm, clip_actions=args.clip_actions, init_std=args.init_std,
        lstm_size=args.lstm_size,
    )  # fmt: skip
    check_not_negative(
        seed=args.seed, eval_seed=args.eval_seed, eval_every=args.eval_every, eval_episodes=args.eval_episodes,
        entropy_coef=args.entropy_coef, value_coef=args.value_coef,
    )  # fmt: skip
    for name, value in (("gamma", args.gamma), ("gae-lambda", args.gae_lambda)):
        if not 0 <= value <= 1:
            raise SystemExit(f"--{name} {value}: must be from 0 to 1")
    if min(args.hidden, default=0) < 1:
        raise SystemExit(f"--hidden {' '.join(map(str, args.hidden))}: needs at least one size, each of 1 or more")
    for name in ("evaluate", "export"):
        if getattr(args, name) and not args.checkpoint:
            raise SystemExit(f"--{name}: needs --checkpoint, a folder like runs/<name>/checkpoints/best")
    if args.num_envs % (world := int(os.environ.get("WORLD_SIZE", 1))):
        raise SystemExit(f"--num-envs {args.num_envs}: must be a multiple of the {world} ranks")
    units = args.num_envs * (1 if args.recurrent else args.num_steps)
    if units < 2 * args.minibatches:
        what = "environments" if args.recurrent else "steps (--num-envs times --num-steps)"
        raise SystemExit(f"--minibatches {args.minibatches}: {units} {what} leave fewer than 2 for each; use fewer")
    args.exp_name = run_name(args.exp_name, Path(__file__).stem, args.task, args.seed, resume=args.resume)


ARGS = parse() if __name__ == "__main__" else None  # before the heavy imports, so --help is instant

import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from torch import Tensor, nn

from common import (
    Metrics, Ranks, Run, StageTimer, gae, merge_moments, normalize_advantages, pick_device, replace_folder,
    seeded_generator, write_json,
)  # fmt: skip
from tasks.stock import (
    Spaces, VecEnv, add_camera, deployment, known_task, seeded_generators, start_simulator, task_config, task_metrics, to_cpu,
)  # fmt: skip


# ======== env =========================================================================================================
@contextlib.contextmanager
def make_env(args: Args, cfg: Any, ranks: Ranks, log: Path):
    """Starts the simulator and yields a VecEnv; what the simulator prints goes to a file."""
    cfg.seed = args.seed + ranks.rank
    if args.capture_video:
        add_camera(cfg)
    with start_simulator(cfg, args.device, args.capture_video, log) as ready:
        with seeded_generators(args.seed):
            env = VecEnv(args.task, cfg, ranks, args.seed, args.clip_actions, args.obs_groups, args.hide_obs)
        ready()
        yield env
        env.env.close()


# ======== policy ======================================================================================================
class Policy(nn.Module):
    """Gaussian or categorical actions with independent components; networks and `log_std` (C,) are the subclass's.

    The parameters (..., P) of the distribution are the mean, or the log-probabilities of all components side by side.
    """

    def __init__(self, spaces: Spaces, args: Args):
        super().__init__()
        self.spaces, self.args = spaces, args

    def save(self, folder: Path) -> None:
        """Weights and running statistics, and what they are for: the task and the network's arguments."""
        save_file({name: x.contiguous() for name, x in self.state_dict().items()}, folder / "policy.safetensors")
        about = {name: getattr(self.args, name) for name in ("task", *NETWORK)} | {"spaces": self.spaces._asdict()}
        (folder / "policy.json").write_text(json.dumps(about, indent=2) + "\n")

    def load(self, folder: str | Path) -> None:
        self.load_state_dict(load_file(Path(folder) / "policy.safetensors"))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.log_std.device.type, torch.bfloat16, self.args.mixed_precision)

    def distribution(self, out: Tensor) -> Tensor:
        """Parameters (..., P) from a network's outputs (..., P)."""
        if self.spaces.choices:
            return torch.cat([part.log_softmax(-1) for part in out.split(self.spaces.choices, -1)], -1)
        return out

    def noise(self, steps: int, n: int, ranks: Ranks, *seeds: int) -> Tensor:
        """(T, N, P) standard normal or Gumbel numbers; every rank draws all columns and keeps its own."""
        x = torch.empty(steps, n * ranks.world, self.spaces.outputs, device=self.log_std.device)
        generator = seeded_generator(x.device, *seeds)
        x = -x.exponential_(generator=generator).log() if self.spaces.choices else x.normal_(generator=generator)
        return x[:, ranks.rank * n : (ranks.rank + 1) * n]

    def sample(self, params: Tensor, noise: Tensor | None) -> Tensor:
        """Actions (N, C), drawn with noise (N, P), or the most likely ones for None."""
        if self.spaces.choices:  # the largest of log-probability plus Gumbel noise is a sample
            scores = params if noise is None else params + noise
            return torch.stack([s.argmax(-1) for s in scores.split(self.spaces.choices, -1)], -1)
        return params if noise is None else torch.addcmul(params, noise, self.log_std.exp())

    def log_prob(self, params: Tensor, action: Tensor) -> Tensor:
        """Log-probability of actions (..., C), summed over the independent components: (...,)."""
        if self.spaces.choices:
            parts = zip(params.split(self.spaces.choices, -1), action.long().split(1, -1))
            return sum(p.gather(-1, a).squeeze(-1) for p, a in parts)
        z = (action - params) * torch.exp(-self.log_std)
        return -0.5 * z.square().sum(-1) - (self.log_std.sum() + 0.5 * math.log(2 * math.pi) * len(self.log_std))

    def entropy(self, params: Tensor) -> Tensor:
        """Entropy, summed over components: (...,)."""
        if self.spaces.choices:
            return -(params.exp() * params).sum(-1)
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(params.shape[:-1])

    def kl(self, old: Tensor, old_log_std: Tensor, new: Tensor) -> Tensor:
        """KL(old | new) in closed form: (...,)."""
        if self.spaces.choices:
            return (old.exp() * (old - new)).sum(-1)
        change = self.log_std - old_log_std  # (C,)
        fixed = (change + 0.5 * torch.exp(-2 * change) - 0.5).sum()
        return fixed + 0.5 * ((new - old) * torch.exp(-self.log_std)).square().sum(-1)


class ActorCritic(Policy):
    """Separate networks for policy and value."""

    def __init__(self, spaces: Spaces, args: Args):
        super().__init__(spaces, args)
        self.actor = Network(spaces.obs, spaces.outputs, 0.01, args)
        self.critic = Network(spaces.critic or spaces.obs, 1, 1.0, args)
        self.log_std = nn.Parameter(torch.full((spaces.continuous,), math.log(args.init_std)))
        self.obs_norm = RunningNorm(*spaces.obs) if args.normalize_obs else nn.Identity()
        self.critic_norm = RunningNorm(*spaces.critic) if args.normalize_obs and spaces.critic else nn.Identity()
        self.return_norm = RunningNorm(1)
        if args.compile:
            self.actor.compile()
            self.critic.compile()

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

    def outputs(self, batch: TensorDict, states: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Parameters (B, P) and values (B,) for the samples of a minibatch; (T, n, ...) for an LSTM, see `ppo_loss`."""
        context, critic_context = ((state, batch["start"]) for state in states) if states else ((), ())
        critic = batch["critic" if "critic" in batch else "obs"]
        return self(batch["obs"], *context)[0], self.value(critic, *critic_context)[0]

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


class Network(nn.Module):
    """A multi-layer perceptron, behind an LSTM with --recurrent; with --init orthogonal, biases are zero."""

    def __init__(self, shape: tuple[int, ...], outputs: int, gain: float, args: Args):
        """
        Args:
            shape: of an observation; (d,) for an LSTM.
            gain: of the last layer's orthogonal weights; other layers have sqrt(2), the LSTM 1.
        """
        super().__init__()
        self.lstm = nn.LSTMCell(*shape, args.lstm_size) if args.recurrent else None
        sizes, layers = [args.lstm_size if args.recurrent else math.prod(shape), *args.hidden], []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), {"elu": Elu, "tanh": nn.Tanh, "relu": nn.ReLU}[args.activation]()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))
        for name, p in self.named_parameters() if args.init == "orthogonal" else ():
            last = name.startswith(f"layers.{len(layers)}.")
            std = gain if last else 1.0 if name.startswith("lstm") else math.sqrt(2)
            nn.init.orthogonal_(p, std) if "weight" in name else nn.init.zeros_(p)

    def forward(self, x: Tensor, state: Tensor | None = None, starts: Tensor | None = None):
        """Outputs for each step, and the LSTM's states after it.

        Args:
            x: (T, N, d); any leading dimensions without an LSTM.
            state: (2, N, H) hidden and cell state before the first step.
            starts: (T, N) whether a step is the first of an episode, which sees a zero state.

        Returns:
            (T, N, outputs) in fp32, (T, 2, N, H) or None.
        """
        if self.lstm is None:
            return self.layers(x).float(), None
        states, keep = [], (~starts).to(x.dtype)[:, None, :, None]  # (T, 1, N, 1)
        for t in range(len(x)):
            state = torch.stack(self.lstm(x[t], tuple(state * keep[t])))
            states.append(state)
        states = torch.stack(states)
        return self.layers(states[:, 0]).float(), states


class Elu(nn.Module):
    """ELU. On CPUs torch's own takes expm1, which is slower than this one's exp: by half (AVX2), or many times."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return EluFromExp.apply(x)
        return nn.functional.elu(x)


class EluFromExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.maximum(x, x.clamp(max=0).exp_().sub_(1))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y.clamp(max=0).add_(1).mul_(grad)


class RunningNorm(nn.Module):
    """Normalises by running mean and std; 0.01 is added to the std, so that a constant column is not blown up."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("moments", torch.zeros(3, size, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.shift) * self.scale).clamp(-CLIP, CLIP)

    def update(self, rows: Tensor, ranks: Ranks) -> None:
        """Takes rows (..., size) of all ranks into the statistics."""
        self.moments = merge_moments(self.moments, rows, ranks)
        self.shift.copy_(self.moments[1])
        self.scale.copy_(1 / ((self.moments[2] / self.moments[0]).sqrt() + 0.01))


def load_checkpoint(policy: ActorCritic, folder: str) -> None:
    try:
        policy.load(folder)
    except Exception as error:  # safetensors and torch have many kinds
        why = " ".join(str(error).split())
        raise SystemExit(f"--checkpoint {folder}: does not fit ({why})") from error


def flat_parameter(module: nn.Module) -> nn.Parameter:
    """All parameters of a module side by side: one small optimizer step, norm and sum over ranks instead of many.

    Returns:
        (P,); the module's own parameters and their gradients become views of it and its gradient.
    """
    parameters = sorted(module.parameters(), key=lambda p: -p.numel())  # small ones last, for the others' alignment
    flat = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    flat.grad = torch.zeros_like(flat)
    nn.utils.vector_to_parameters(flat.data, parameters)
    for p, grad in zip(parameters, flat.grad.split([p.numel() for p in parameters])):
        p.grad = grad.view_as(p)
    return flat


# ======== rollout =====================================================================================================
class Storage:
    """A rollout, and what goes over from one to the next.

    Attributes:
        samples: (T + 1, N); the last row holds what is observed after the rollout, and becomes the first of the next one.
        log_std: (C,) of the rollout's policy.
        returns: (N,) discounted returns of the running episodes.
        states, before: the LSTMs' states (2, N, H) of actor and critic, now and before the rollout.
        units: samples, or environments for an LSTM, over all ranks: what minibatches are drawn from.
    """

    def __init__(self, args: Args, env: VecEnv):
        N, spaces = env.num_envs, env.spaces
        zeros = functools.partial(torch.zeros, args.num_steps + 1, N, device=args.device)
        fields = {name: zeros(dtype=torch.bool) for name in ("start", "terminated", "truncated")}  # start: of an episode
        fields |= {"action": zeros(spaces.continuous or len(spaces.choices)), "params": zeros(spaces.outputs)}
        fields |= {"obs": zeros(*spaces.obs), "reward": zeros(), "final": zeros(*(spaces.critic or spaces.obs))}
        fields |= {"critic": zeros(*spaces.critic)} if spaces.critic else {}
        self.samples = TensorDict(fields, [args.num_steps + 1, N], device=args.device)
        self.returns = torch.zeros(N, device=args.device)
        self.states = [torch.zeros(2, N, args.lstm_size, device=args.device) for _ in range(2)] if args.recurrent else []
        self.units = args.num_envs * (1 if args.recurrent else args.num_steps)

    def begin(self, env: VecEnv, args: Args, iteration: int, carried: dict | None) -> None:
        """Starts the environments, or goes on where a checkpoint left them: a run and its continuation do so alike."""
        obs, critic = env.restart(args.seed, iteration * args.num_steps, args.stagger, carried)
        start, self.returns = torch.ones(env.num_envs, dtype=torch.bool, device=obs.device), torch.zeros_like(self.returns)
        if carried:
            start, self.returns = carried["start"].to(obs.device) | env.done, carried["returns"].to(obs.device)
            self.states = [x.to(obs.device) for x in carried["states"].values()]
        self.put(args.num_steps, obs=obs, critic=critic, start=start)

    def put(self, t: int, **fields: Tensor) -> None:
        for name, x in fields.items():
            if name in self.samples:
                self.samples[name][t] = x

    def carry(self, env: VecEnv) -> dict:
        """What `begin` goes on from."""
        own = {"start": self.samples["start"][-1], "returns": self.returns, "states": dict(zip("ac", self.states))}
        return env.state() | to_cpu(own)

    def pick(self, batch: TensorDict, rows: Tensor) -> tuple[TensorDict, list[Tensor]]:
        """Some units of a batch, and the LSTMs' states (2, n, H) before them."""
        return batch[:, rows] if self.before else batch[rows], [state[:, rows] for state in self.before]

    def finish(self, policy: ActorCritic, args: Args, ranks: Ranks) -> None:
        """Takes the observations into the statistics: after the update, which has to see what the rollout saw."""
        if args.normalize_obs:
            policy.obs_norm.update(self.samples["obs"][:-1], ranks)
            if "critic" in self.samples:
                policy.critic_norm.update(self.samples["critic"][:-1], ranks)


@torch.no_grad()
def rollout(env: VecEnv, policy: ActorCritic, store: Storage, args: Args, iteration: int, ranks: Ranks, timer) -> None:
    """T steps everywhere, across episodes, into `store`."""
    with timer("policy"):
        samples = store.samples
        samples[0] = samples[-1]
        store.log_std, store.before = policy.log_std.clone(), list(store.states)
        noise = policy.noise(args.num_steps, env.num_envs, ranks, args.seed, 1, iteration)
        state = store.states[0] if args.recurrent else None
    for t in range(args.num_steps):
        with timer("policy"):
            action, params, state = policy.act(samples["obs"][t], noise[t], state, samples["start"][t])
        with timer("env"):
            obs, critic, reward, terminated, truncated, final = env.step(action)
        with timer("policy"):
            store.put(t, action=action, params=params, reward=reward, terminated=terminated, truncated=truncated)
            store.put(t + 1, obs=obs, critic=critic, start=terminated | truncated)
            if final is not None:
                store.put(t, final=final)
    if args.recurrent:
        store.states[0] = state


@torch.no_grad()
def make_batch(env: VecEnv, policy: ActorCritic, store: Storage, args: Args, ranks: Ranks, log: Metrics) -> TensorDict:
    """Values, log-probabilities and advantages of a rollout, all steps at once.

    Returns:
        (T * N,) normalised samples, or (T, N) for an LSTM: obs, critic, action, params, log_prob, advantage, target,
        value; start for an LSTM.
    """
    samples, T = store.samples, args.num_steps
    obs = critic = policy.obs_norm(samples["obs"])  # (T + 1, N, d)
    critic_norm = policy.critic_norm if env.spaces.critic else policy.obs_norm
    if env.spaces.critic:
        critic = critic_norm(samples["critic"])
    values, states = policy.value(critic, store.before[1] if args.recurrent else None, samples["start"])  # (T + 1, N)
    rollout = samples[:T]
    reward, terminated, truncated = (rollout[name] for name in ("reward", "terminated", "truncated"))
    done = samples["start"][1:]
    timed_out = t, n = (truncated & ~terminated).nonzero(as_tuple=True)  # waits for the device
    final_values, last = torch.zeros_like(reward), critic_norm(rollout["final"][timed_out])  # (T, N), (E, dc)
    if args.recurrent:
        fresh = torch.zeros(1, len(t), dtype=torch.bool, device=last.device)
        final_values[timed_out] = policy.value(last[None], states[t, :, n].transpose(0, 1), fresh)[0][0]
        store.states[1] = states[T - 1]
    else:
        final_values[timed_out] = policy.value(last)[0]
    scaled = scaled_rewards(policy, store, args, ranks) if args.normalize_returns else reward
    value, flags = values[:T], (terminated, truncated)
    advantage, target = gae(scaled, value, *flags, final_values, values[T], args.gamma, args.gae_lambda)
    returns, lengths = env.episodes(reward, done)
    log.mean("rollout/return", returns, where=done)
    log.mean("rollout/length", lengths, where=done)
    log.sum("rollout/episodes", done)
    log.mean("rollout/reward", reward)
    log.mean("rollout/value", values)
    log.mean("update/explained_variance", 1 - (target - value).var() / target.var().clamp(min=1e-12))
    for name, x in task_metrics(env.base).items():
        log.mean(name, x)
    batch = rollout.select("action", "params", *(["start"] if args.recurrent else []))
    batch.update({"log_prob": policy.log_prob(batch["params"], batch["action"]), "obs": obs[:T], "critic": critic[:T]})
    batch.update({"advantage": advantage, "target": target, "value": value})
    if critic is obs:
        del batch["critic"]
    return batch if args.recurrent else batch.flatten(0, 1)


def scaled_rewards(policy: ActorCritic, store: Storage, args: Args, ranks: Ranks) -> Tensor:
    """Rewards (T, N) divided by the running std of the discounted return, and clipped."""
    rewards, history = store.samples["reward"][:-1], []
    for reward, start in zip(rewards, store.samples["start"]):
        store.returns = store.returns * args.gamma * ~start + reward
        history.append(store.returns)
    policy.return_norm.update(torch.stack(history)[..., None], ranks)
    return (rewards * policy.return_norm.scale).clamp(-CLIP, CLIP)


# ======== loss ========================================================================================================
def ppo_loss(policy: ActorCritic, batch: TensorDict, states: list, old_log_std: Tensor, size: int, args: Args, log: Metrics):
    """Clipped surrogate, clipped value loss and entropy bonus of a minibatch.

    Args:
        batch: (B,) samples, or (T, n) for an LSTM, with its states (2, n, H) of actor and critic before the rollout.
        size: samples of the minibatch over all ranks; sums are divided by it.

    Returns:
        loss, KL(old | new), and the ratio.
    """
    params, value = policy.outputs(batch, states)
    ratio = torch.exp(policy.log_prob(params, batch["action"]) - batch["log_prob"])
    clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
    surrogate = torch.minimum(batch["advantage"] * ratio, batch["advantage"] * clipped)
    error = (value - batch["target"]).square()
    if args.clip_value:
        near = batch["value"] + (value - batch["value"]).clamp(-args.clip, args.clip)
        error = torch.maximum(error, (near - batch["target"]).square())
    policy_loss, value_loss, entropy = -surrogate.sum() / size, 0.5 * error.sum() / size, policy.entropy(params)
    with torch.no_grad():
        kl = policy.kl(batch["params"], old_log_std, params)
        log.mean("update/loss", args.value_coef * 0.5 * error - surrogate - args.entropy_coef * entropy)
        log.mean("update/policy_loss", -surrogate)
        log.mean("update/value_loss", 0.5 * error)
        log.mean("update/entropy", entropy)
        log.mean("update/clip_frac", ratio != clipped)
        log.mean("update/kl", kl)
    loss = policy_loss - args.entropy_coef * (entropy.sum() / size) + args.value_coef * value_loss
    return loss, kl.sum() / size, ratio.detach()


# ======== train =======================================================================================================
def plan_minibatches(units: int, iteration: int, args: Args, ranks: Ranks) -> list[tuple[Tensor, int]]:
    """For every epoch, a new permutation of all samples (of the environments for an LSTM), cut into minibatches.

    Every rank draws the same permutation and keeps its own.

    Returns:
        Per minibatch: indices (n,) of this rank's units, and the number of samples over all ranks.
    """
    generator = seeded_generator(args.device, args.seed, 2, iteration)
    total, own, plan = args.num_envs, args.num_envs // ranks.world, []
    for _ in range(args.epochs):
        order = torch.randperm(units, generator=generator, device=args.device)
        for rows in order.tensor_split(args.minibatches):
            size = len(rows) * args.num_envs * args.num_steps // units
            if ranks.world > 1:  # sample t * total + n belongs to the rank of environment n
                rows = rows[rows % total // own == ranks.rank]
                rows = rows // total * own + rows % own
            plan.append((rows, size))
    return plan


def update(
    policy: ActorCritic, optimizer, batch: TensorDict, store: Storage, plan: list, args: Args, ranks: Ranks, log: Metrics
) -> None:  # fmt: skip
    """Epochs over a rollout, one optimizer step per minibatch of the plan."""
    rate, (flat,) = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["params"]
    for i, (rows, size) in enumerate(plan):
        part, states = store.pick(batch, rows)
        normalize_advantages(part["advantage"], size, ranks)
        loss, kl, ratio = ppo_loss(policy, part, states, store.log_std, size, args, log)
        flat.grad.zero_()
        loss.backward()
        ranks.reduce(flat.grad)
        log.max("update/grad_norm", torch.nn.utils.clip_grad_norm_(flat, args.max_grad_norm))
        if i == 0:  # nothing is learned yet: rollout and update must agree
            log.max("update/first_ratio_error", (ratio - 1).abs().max() if ratio.numel() else loss)
        elif args.schedule == "adaptive":
            kl = ranks.reduce(kl)
            factor = torch.where(kl > 2 * args.target_kl, 1 / 1.5, torch.where(kl > args.target_kl / 2, 1.0, 1.5))
            rate.mul_(factor).clamp_(1e-5, 1e-2)
        optimizer.step()
    log.max("update/learning_rate", rate)
    log.max("update/action_std", policy.log_std.exp().sum() / max(len(policy.log_std), 1))


def train(args: Args, env: VecEnv, policy: ActorCritic, run: Run, ranks: Ranks) -> None:
    """The whole run: iterate, evaluate, summarise."""
    rate = torch.tensor(args.learning_rate, device=args.device)  # on the device, where the adaptive schedule changes it
    optimizer = run.restore_optimizer(torch.optim.Adam([flat_parameter(policy)], rate, eps=1e-5, fused=True))
    rate = optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"].to(args.device)
    store, timer, result, latest = Storage(args, env), StageTimer(args.device), {}, None
    begin, everywhere = run.state["iteration"], run.state.pop("carried", [None] * ranks.world)
    if len(everywhere) != ranks.world or (everywhere[0] and everywhere[0]["running"].shape[1] != env.num_envs):
        raise SystemExit(f"--resume {args.resume}: has other --num-envs or ranks; start a run with --checkpoint")
    carried = everywhere[ranks.rank]
    for iteration in range(begin, args.iterations):
        if carried or iteration == 0:
            store.begin(env, args, iteration, carried)
            carried = None
        if args.schedule != "adaptive":
            rate.fill_(args.learning_rate * (1 - iteration / args.iterations if args.schedule == "linear" else 1))
        log = Metrics(args.device, ranks)
        rollout(env, policy, store, args, iteration, ranks, timer)
        with timer("update"):
            batch = make_batch(env, policy, store, args, ranks, log)
            update(policy, optimizer, batch, store, plan_minibatches(store.units, iteration, args, ranks), args, ranks, log)
            store.finish(policy, args, ranks)
            metrics = log.read()  # the one transfer to the host
        if iteration == 0 and metrics["update/first_ratio_error"] > (0.05 if args.mixed_precision else 1e-3):
            raise SystemExit(f"the first ratio is off 1 by {metrics['update/first_ratio_error']:.1e}: a bug in this script")
        last = iteration + 1 == args.iterations
        save, test = (last or (every > 0 and (iteration + 1) % every == 0) for every in (args.save_every, args.eval_every))
        if save or test:
            carried = store.carry(env)
        if test and args.eval_episodes:
            result = evaluate(args, env, policy, ranks)
            metrics |= {"eval/return": result["mean"], "eval/length": result["length"]}
        run.log(iteration, metrics, timer.seconds(), args.num_envs * args.num_steps)
        latest = metrics.get("eval/return", metrics.get("rollout/return", latest))
        by_test = args.eval_every and args.eval_episodes  # else by the latest rollout
        score = metrics.get("eval/return" if by_test else "rollout/return", -math.inf)
        if (test if by_test else save) and run.improved(score):
            run.save("best", policy.save)
        if save:
            run.save(f"step_{iteration + 1:06d}", policy.save, optimizer, carried=ranks.gather(carried))
    if result:
        run.event(f"deterministic policy: {RESULT.format(**result)}")
    if args.capture_video:
        evaluate(args, env, policy, ranks, run)
    run.result(**{"return": latest, "eval": result, "assets": os.environ.get("ISAACSIM_ASSET_ROOT", "NVIDIA's")})


# ======== evaluate ====================================================================================================
RESULT = "return {mean:.2f} +- {std:.2f} over {episodes} episodes of {length:.0f} steps"


@torch.no_grad()
def evaluate(args: Args, env: VecEnv, policy: ActorCritic, ranks: Ranks, film: Run | None = None) -> dict[str, float]:
    """Return of the deterministic policy in the first episode of each environment, from fixed starts.

    Args:
        film: gets a GIF of what up to 16 environments look like after every second step.

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
        film.gif("policy", torch.stack(frames), every=2, fps=0.5 / env.base.step_dt)
    total = ranks.reduce(torch.stack([sums[0].sum(), sums[0].square().sum(), sums[1].sum()]))
    mean, square, length = (total / (count * ranks.world)).tolist()
    return {"mean": mean, "std": max(square - mean**2, 0) ** 0.5, "length": length, "episodes": count * ranks.world}


# ======== export ======================================================================================================
class Deployed(nn.Module):
    """A trained policy by itself, in fp32 and without noise: raw observations to the actions that `env.step` executes."""

    def __init__(self, policy: ActorCritic, bounds: tuple[Tensor, Tensor] | None):
        super().__init__()
        self.norm, self.actor = copy.deepcopy(policy.obs_norm), copy.deepcopy(policy.actor)
        self.choose = lambda out: policy.sample(policy.distribution(out), None)
        for name, bound in zip(("low", "high"), bounds or (None, None)):
            self.register_buffer(name, bound)
        if isinstance(self.norm, RunningNorm):
            del self.norm.moments
        layers = self.actor.layers
        for i, layer in enumerate(layers):
            layers[i] = nn.ELU() if isinstance(layer, Elu) else layer  # neither format has functions of one's own

    def forward(self, obs: Tensor, state: Tensor | None = None):
        """Actions (N, C) for observations (N, d); with an LSTM also its next state (2, N, H), zero before an episode."""
        x = self.norm(obs)
        if state is not None:
            state = torch.stack(self.actor.lstm(x, (state[0], state[1])))
            x = state[0]
        action = self.choose(self.actor.layers(x))
        action = action if self.low is None else action.clamp(self.low, self.high)
        return action if state is None else (action, state)


def export(args: Args, cfg: Any) -> Path:
    """Writes --checkpoint to its folder exported/: policy.onnx, policy.pt (TorchScript) and deployment.json.

    Args:
        cfg: Isaac Lab's configuration of the task; the simulator need not run.
    """
    about = json.loads((Path(args.checkpoint) / "policy.json").read_text())
    policy = ActorCritic(Spaces(**about.pop("spaces")), dataclasses.replace(args, compile=False))
    load_checkpoint(policy, args.checkpoint)
    spaces, dynamic = policy.spaces, torch.export.Dim.DYNAMIC
    told, bounds = deployment(cfg, spaces, args.obs_groups, args.hide_obs, args.clip_actions)
    model = Deployed(policy, bounds).eval().requires_grad_(False)
    inputs, batch = {"obs": torch.zeros(2, *spaces.obs)}, {"obs": {0: dynamic}}  # two rows: a size of 1 would be taken as fixed
    outputs = ["action"]
    if args.recurrent:
        inputs["state"], batch["state"], outputs = torch.zeros(2, 2, args.lstm_size), {1: dynamic}, ["action", "next_state"]
        told |= {"state": {"shape": [2, "batch", args.lstm_size], "before an episode": 0}}

    def write(folder: Path) -> None:
        warnings.simplefilter("ignore")  # torch's, of itself
        torch.jit.trace(model, example_kwarg_inputs=inputs).save(folder / "policy.pt")
        torch.onnx.export(
            model, (), folder / "policy.onnx", kwargs=inputs, input_names=list(inputs), output_names=outputs,
            dynamic_shapes=batch, dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
        write_json(folder / "deployment.json", {"task": args.task, **told, "inputs": list(inputs), "outputs": outputs})

    folder = Path(args.checkpoint) / "exported"
    replace_folder(folder, write)
    return folder


# ======== main ========================================================================================================
def main(args: Args) -> None:
    args.device, asked, args.task = pick_device(args.device), args.task, known_task(args.task)
    if args.device == "cpu" and max(args.hidden) <= 64 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # several wait for each other: slower beside other work, no faster alone
    ranks, groups = Ranks.start(args.device), {"--obs-groups": args.obs_groups}
    asks = {"groups": groups, "assets": args.evaluate or not args.export}
    cfg = task_config(args.task, args.device, args.num_envs // ranks.world, args.physics, args.overrides, **asks)
    if args.export and ranks.rank == 0:
        print(f"exported: {export(args, cfg)}", flush=True)
    if args.export and not args.evaluate:
        return
    with Run(vars(args), __file__, ranks, args.exp_name, args.iterations, args.device, args.resume) as run:
        run.event(f"{run.dir}: {args.task} on {args.device}, {args.num_envs} envs, {args.num_steps} steps a rollout")
        if asked != args.task:
            run.event(f"{asked} is called {args.task} in this Isaac Lab")
        if isinstance(getattr(cfg, "rewards", None), dict):
            run.event(f"{args.task} has no rewards: success earns 1, anything else that ends an episode is a failure")
        run.event(f"starting the simulator (its own output: {run.dir}/simulator.log)")
        with make_env(args, cfg, ranks, run.dir / f"simulator{ranks.rank or ''}.log") as env:
            torch.manual_seed(args.seed)  # of the weights
            policy = ActorCritic(env.spaces, args).to(args.device)
            if args.checkpoint and not args.resume:
                load_checkpoint(policy, args.checkpoint)
            run.restore(policy.load)
            if args.evaluate:
                result = evaluate(args, env, policy, ranks, run if args.capture_video else None)
                run.event(f"deterministic policy of {args.checkpoint}: {RESULT.format(**result)}")
                run.result(eval=result)
            else:
                train(args, env, policy, run, ranks)


if __name__ == "__main__":
    main(ARGS)
