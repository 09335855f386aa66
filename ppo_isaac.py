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
- Neither rollout nor update waits for the device: the learning rate lives there, too.

One iteration: `rollout` -> `make_batch` -> `update` (`ppo_loss` per minibatch) -> `run.log`.
"""

# ======== imports =====================================================================================================
from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from common import check_positive, run_name, saved_args
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
    physics: str | None = None  # Isaac Lab physics preset (newton_mjwarp, isaacsim_physx, ...)
    overrides: tuple[str, ...] = ()  # Isaac Lab overrides of the task, as presets=box_discrete or env.decimation=4
    num_envs: int = 512  # parallel environments over all ranks; a GPU takes 4096
    iterations: int = 1000  # rollout-and-update iterations
    evaluate: bool = False  # evaluate --checkpoint, and nothing else
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
    args = tyro.cli(Args, args=command, default=default, description=__doc__)
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
        if task and current_name(task) != saved["task"]:
            raise SystemExit(f"--checkpoint {checkpoint}: a policy for {saved['task']}, not for --task {task}")
    task = task or saved.get("task", Args.task)
    return Args(**{**TASKS.get(current_name(task), {}), **saved, "task": task, "checkpoint": checkpoint})


def check(args: Args) -> None:
    """Refuses what cannot work, or would ruin a run in silence."""
    positive = "num_envs iterations save_every num_steps epochs minibatches learning_rate target_kl clip max_grad_norm"
    check_positive(**{name: getattr(args, name) for name in (*positive.split(), "clip_actions", "init_std", "lstm_size")})
    if min(args.hidden, default=0) < 1:
        raise SystemExit(f"--hidden {' '.join(map(str, args.hidden))}: needs at least one size, each of 1 or more")
    if args.evaluate and not args.checkpoint:
        raise SystemExit("--evaluate: needs --checkpoint, a folder like runs/<name>/checkpoints/best")
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

from common import Metrics, Ranks, Run, StageTimer, gae, merge_moments, normalize_advantages, pick_device, seeded_generator
from tasks.stock import (
    Spaces, VecEnv, add_camera, known_task, seeded_generators, start_simulator, task_config, task_metrics, to_cpu,
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
class ActorCritic(nn.Module):
    """Separate networks for policy and value; Gaussian or categorical actions with independent components.

    The parameters (..., P) of the distribution are the mean, or the log-probabilities of all components side by side.
    """

    def __init__(self, spaces: Spaces, args: Args):
        super().__init__()
        self.spaces, self.args = spaces, args
        self.actor = Network(spaces.obs, spaces.outputs, 0.01, args)
        self.critic = Network(spaces.critic or spaces.obs, 1, 1.0, args)
        self.log_std = nn.Parameter(torch.full((spaces.continuous,), math.log(args.init_std)))
        self.obs_norm = RunningNorm(*spaces.obs) if args.normalize_obs else nn.Identity()
        self.critic_norm = RunningNorm(*spaces.critic) if args.normalize_obs and spaces.critic else nn.Identity()
        self.return_norm = RunningNorm(1)

    def save(self, folder: Path) -> None:
        """Weights and running statistics, and what they are for: the task and the network's arguments."""
        save_file({name: x.contiguous() for name, x in self.state_dict().items()}, folder / "policy.safetensors")
        about = {name: getattr(self.args, name) for name in ("task", *NETWORK)} | {"spaces": self.spaces._asdict()}
        (folder / "policy.json").write_text(json.dumps(about, indent=2) + "\n")

    def load(self, folder: str | Path) -> None:
        self.load_state_dict(load_file(Path(folder) / "policy.safetensors"))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.log_std.device.type, torch.bfloat16, self.args.mixed_precision)

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
        returns: (N,) discounted returns of the running episodes.
        states: the LSTMs' states (2, N, H) of actor and critic.
    """

    def __init__(self, args: Args, env: VecEnv):
        N, spaces = env.num_envs, env.spaces
        zeros = functools.partial(torch.zeros, args.num_steps + 1, N, device=args.device)
        flags = {name: zeros(dtype=torch.bool) for name in ("start", "terminated", "truncated")}  # start: of an episode
        own = {"critic": zeros(*spaces.critic)} if spaces.critic else {}
        acted = {"action": zeros(spaces.continuous or len(spaces.choices)), "params": zeros(spaces.outputs), "reward": zeros()}
        seen = {"obs": zeros(*spaces.obs), "final": zeros(*(spaces.critic or spaces.obs))}
        self.samples = TensorDict(seen | own | acted | flags, [args.num_steps + 1, N], device=args.device)
        self.returns = torch.zeros(N, device=args.device)
        self.states = [torch.zeros(2, N, args.lstm_size, device=args.device) for _ in range(2)] if args.recurrent else []

    def begin(self, env: VecEnv, args: Args, iteration: int, carried: dict | None) -> None:
        """Starts the environments, or goes on where a checkpoint left them: a run and its continuation do so alike."""
        obs, critic = env.restart(args.seed, iteration * args.num_steps, args.stagger, carried)
        start, self.returns = torch.ones(env.num_envs, dtype=torch.bool, device=obs.device), torch.zeros_like(self.returns)
        if carried:
            start = carried["start"].to(obs.device) | env.done
            self.returns = carried["returns"].to(obs.device)
            self.states = [x.to(obs.device) for x in carried["states"].values()]
        self.observe(args.num_steps, obs, critic, start)

    def observe(self, t: int, obs: Tensor, critic: Tensor, start: Tensor) -> None:
        self.samples["obs"][t], self.samples["start"][t] = obs, start
        if "critic" in self.samples:
            self.samples["critic"][t] = critic

    def carry(self, env: VecEnv) -> dict:
        """What `begin` goes on from."""
        own = {"start": self.samples["start"][-1], "returns": self.returns, "states": dict(zip("ac", self.states))}
        return env.state() | to_cpu(own)


@torch.no_grad()
def rollout(env: VecEnv, policy: ActorCritic, store: Storage, args: Args, iteration: int, ranks: Ranks, timer) -> Tensor | None:
    """T steps everywhere, across episodes, into `store`. Returns the actor's state after them."""
    samples, state = store.samples, store.states[0] if args.recurrent else None
    with timer("policy"):
        samples[0] = samples[-1]
        noise = policy.noise(args.num_steps, env.num_envs, ranks, args.seed, 1, iteration)
    for t in range(args.num_steps):
        with timer("policy"):
            action, params, state = policy.act(samples["obs"][t], noise[t], state, samples["start"][t])
        with timer("env"):
            obs, critic, reward, terminated, truncated, final = env.step(action)
        with timer("policy"):
            for name, x in zip(("action", "params", "reward", "terminated", "truncated"), (action, params, reward, terminated, truncated)):
                samples[name][t] = x
            store.observe(t + 1, obs, critic, terminated | truncated)
            if final is not None:
                samples["final"][t] = final
    return state
