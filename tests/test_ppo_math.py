"""PPO's mathematics and bookkeeping, through ppo_isaac.py's own functions: points on a line in the simulator's place.

The comments beside tests number the details after "The 37 Implementation Details of PPO" (Huang et al., 2022).
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import socket
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Categorical, Normal, kl_divergence
from torch.nn.utils import parameters_to_vector

import ppo_isaac
import stock_tasks
from common import Ranks, StageTimer
from policies import Network, RunningNorm, flat_parameter
from ppo_isaac import (
    ActorCritic,
    Args,
    Storage,
    UsageError,
    describe_iteration,
    make_batch,
    plan_minibatches,
    ppo_loss,
    resolve,
    rollout,
    update,
)
from stock_tasks import Spaces, VecEnv

torch.set_num_threads(1)
ALONE = Ranks(0, 1)
BOX, CHOICES = gym.spaces.Box(-1.0, 1.0, (2,)), gym.spaces.MultiDiscrete([3, 2])
N, T = 8, 12


class Points:
    """A task as Isaac Lab would make it, which resets inside `step`: one point per environment, moved by the actions."""

    max_episode_length, device = 7, "cpu"

    def __init__(self, n: int, space: gym.Space, critic: bool):
        self.num_envs, self.single_action_space, self.critic, self.unwrapped = n, space, critic, self
        self.episode_length_buf, self.extras = torch.zeros(n, dtype=torch.long), {}

    def observe(self) -> dict[str, Tensor]:
        return {"policy": self.x.clone()} | ({"critic": torch.cat([self.x, self.x**2], 1)} if self.critic else {})

    def reset(self, seed: int):
        self.received, self.seen, self.ends = [], [], []  # actions, observations, (return, length) of episodes
        self.generator = torch.Generator().manual_seed(seed)
        self.x, self.totals = torch.rand(self.num_envs, 3, generator=self.generator) * 2 - 1, torch.zeros(self.num_envs, 2)
        self.episode_length_buf.zero_()
        self.seen.append(self.observe())
        return self.observe(), {}

    def step(self, action: Tensor):
        self.received.append(action.clone())
        self.x = self.x + 0.2 * action.float().mean(1, keepdim=True) * torch.tensor([1.0, -1.0, 0.5]) + 0.05
        self.episode_length_buf += 1
        reward, terminated = 1 + self.x[:, 0], self.x[:, 0].abs() > 1.1
        truncated = self.episode_length_buf >= self.max_episode_length
        done, self.totals = terminated | truncated, self.totals + torch.stack([reward, torch.ones_like(reward)], 1)
        if done.any():
            self.extras["final_obs"] = self.observe()
            self.ends += self.totals[done].tolist()
            fresh = torch.rand(self.num_envs, 3, generator=self.generator) * 2 - 1
            self.x, self.totals = torch.where(done[:, None], fresh, self.x), self.totals * ~done[:, None]
            self.episode_length_buf[done] = 0
        self.seen.append(self.observe())
        return self.observe(), reward, terminated, truncated, self.extras


@pytest.fixture(autouse=True)
def no_simulator(monkeypatch):
    """`gym.make` gives the task that is handed over as configuration; any name is that of a task."""
    monkeypatch.setattr(gym, "make", lambda task, cfg: cfg.points)
    monkeypatch.setattr(stock_tasks, "known_task", lambda name: name)


def arguments(**overrides) -> Args:
    wanted = {"num_envs": N, "num_steps": T, "hidden": (16, 8), "minibatches": 2, "epochs": 2, "lstm_size": 6}
    return resolve(Args(**{"task": "Points", "device": "cpu", "exp_name": "test", **wanted, **overrides}))


def perturb(policy: ActorCritic, scale: float) -> ActorCritic:
    """Weights as if it had been trained: at first those of the last layer are all but zero."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g))
    return policy


class Run:
    """Arguments, environment, policy and buffers, and the batch of the last of some rollouts."""

    def __init__(self, rollouts: int = 1, space=BOX, critic=False, finite=False, ranks: Ranks = ALONE, **overrides):
        self.args = arguments(**overrides)
        points = Points(self.args.num_envs // ranks.world, space, critic)
        self.env = VecEnv(self.args, SimpleNamespace(is_finite_horizon=finite, points=points), ranks)
        torch.manual_seed(self.args.seed)
        self.policy = perturb(ActorCritic(self.env.spaces, self.args), 0.3)
        self.store, self.iteration, self.points = Storage(self.args, self.env), 0, points
        self.store.begin(self.env, self.args, 0, None)
        for _ in range(rollouts):
            self.collect()

    def collect(self) -> None:
        rollout(self.env, self.policy, self.store, self.args, self.iteration, ALONE, StageTimer("cpu"))
        self.batch = make_batch(self.env, self.policy, self.store, self.args, ALONE)
        self.iteration += 1

    def column(self, i: int) -> Tensor:
        """(T, N): -4 log-probability, -3 advantage, -2 return, -1 value."""
        return self.batch.rest.view(T, N, -1)[..., i]

    def context(self, k: int) -> tuple:
        """What the actor's (0) or critic's (1) LSTM starts from."""
        return (self.batch.states[k], self.batch.starts) if self.args.recurrent else ()

    def loss(self, rest: Tensor | None = None, batch=None, **changes) -> tuple[Tensor, Tensor]:
        """`ppo_loss` of all samples in one minibatch, and its figures with the largest |ratio - 1| behind them."""
        batch = batch or self.batch
        rest, own = batch.rest if rest is None else rest, torch.arange(N) if self.args.recurrent else None
        args = SimpleNamespace(**vars(self.args) | changes)
        found = ppo_loss(self.policy, batch, batch.obs, batch.critic, rest, rest[..., 0].numel(), args, own)
        return found[0], torch.cat([found[1], (found[2].detach() - 1).abs().max()[None]])

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        self.policy.zero_grad()
        loss.backward()
        named = [(name, p) for name, p in self.policy.named_parameters() if p.numel()]
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}

    def update(self, rate: float = 1e-3, sgd: bool = False, epochs: int | None = None, ranks: Ranks = ALONE) -> Tensor:
        """By Adam as in the script, or by SGD, whose steps show the gradient."""
        self.flat, rate = flat_parameter(self.policy), torch.tensor(rate)
        kind = torch.optim.SGD([self.flat], rate, fused=True) if sgd else None
        self.optimizer = kind or torch.optim.Adam([self.flat], rate, eps=1e-5, fused=True)
        plan = plan_minibatches(self.args, 0, ranks)[:epochs]
        return update(self.policy, self.optimizer, self.batch, plan, self.args, ranks)

    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


KINDS = {
    "box": {},
    "critic": {"critic": True},
    "choices": {"space": CHOICES},
    "lstm": {"recurrent": True},
    "all": {"recurrent": True, "critic": True, "space": CHOICES},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())

# ---------------------------------------------------------------- rollouts and advantages


@every_kind
def test_rollouts_go_on_across_episode_ends_and_into_the_next_rollout(kind):  # core 1
    run, finished, ends = Run(0, stagger=False, **kind), torch.zeros(3), 0
    for i in range(3):
        run.collect()
        finished, ends = finished + run.batch.figures["finished"], ends + run.store.starts[1:].sum()
        seen = run.points.seen[i * T : 1 + (i + 1) * T]
        assert torch.equal(run.store.obs, torch.stack([groups["policy"] for groups in seen]))
        assert torch.equal(run.store.critic, torch.stack([groups.get("critic", groups["policy"]) for groups in seen]))
        assert torch.equal(run.store.starts[1:], run.store.terminated | run.store.truncated)
        assert run.store.starts[1:-1].any(0).all() and not run.store.starts[-1].all()
    assert len(run.points.received) == 3 * T and len(run.points.ends) == ends == finished[2]
    assert torch.allclose(finished[:2], torch.tensor(run.points.ends).sum(0))


def true_value(run: Run, state: Tensor | None, t: int, n: int, final: bool) -> float:
    """V of one environment's observation, or of the one that ended step t: alone, and from the rollout's start on."""
    norm = run.policy.critic_norm if run.points.critic else run.policy.obs_norm
    critic, x = run.policy.critic, norm(run.store.final[t, n] if final else run.store.critic[t, n])[None]
    if run.args.recurrent:
        state = [part[None] for part in state[:, n]]
        for s in range(t + final):
            state = [0 * part for part in state] if run.store.starts[s, n] else state
            state = critic.lstm(norm(run.store.critic[s, n])[None], tuple(state))
        fresh = not final and run.store.starts[t, n]
        x = critic.lstm(x, tuple(0 * part if fresh else part for part in state))[0]
    return float(critic.layers(x))


@every_kind
@torch.no_grad()
def test_gae_bootstraps_time_outs_from_the_final_observation_and_terminations_from_nothing(kind):  # core 5
    run = Run(gamma=0.9, gae_lambda=0.8, normalize_obs=True, **kind)
    for norm, rows in ((run.policy.obs_norm, run.store.obs), (run.policy.critic_norm, run.store.critic)):
        if isinstance(norm, RunningNorm):
            norm.update(rows, ALONE)
    state = run.store.states and run.store.states[1].clone()
    run.collect()
    store = run.store
    assert (store.truncated & ~store.terminated)[:-1].any() and store.terminated[:-1].any()
    for n in range(N):
        value = [true_value(run, state, t, n, False) for t in range(T + 1)]
        for t in range(T):
            expected, weight = 0.0, 1.0  # the sum of discounted temporal differences up to the episode's end
            for s in range(t, T):
                after = true_value(run, state, s, n, True) if store.truncated[s, n] else value[s + 1]
                after = 0.0 if store.terminated[s, n] else after
                expected += weight * (float(store.reward[s, n]) + 0.9 * after - value[s])
                weight *= 0.9 * 0.8
                if store.starts[s + 1, n]:
                    break
            assert math.isclose(run.column(-3)[t, n], expected, abs_tol=2e-5)
            assert math.isclose(run.column(-2)[t, n], expected + value[t], abs_tol=2e-5)


def test_the_end_of_a_finite_horizon_is_a_termination():
    run = Run(finite=True)
    assert not run.store.truncated.any() and run.store.terminated.any(0).all()


# ---------------------------------------------------------------- networks and optimizer


@pytest.mark.parametrize("recurrent", [False, True])
def test_weights_are_orthogonal_with_the_usual_gains_and_biases_zero(recurrent):  # core 2, LSTM 1
    policy = ActorCritic(Spaces((5,), (7,), 3, ()), arguments(recurrent=recurrent, hidden=(32, 16)))
    for network, last in ((policy.actor, 0.01), (policy.critic, 1.0)):
        linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
        weights = [(m.weight, gain) for m, gain in zip(linear, (math.sqrt(2), math.sqrt(2), last), strict=True)]
        weights += [(network.lstm.weight_ih, 1.0), (network.lstm.weight_hh, 1.0)] if recurrent else []
        for w, gain in weights:
            w = w.detach().double()
            gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
            assert torch.allclose(gram, gain**2 * torch.eye(len(gram), dtype=torch.double), atol=1e-5 * gain**2)
        assert all(p.abs().max() == 0 for name, p in network.named_parameters() if "bias" in name)


@pytest.mark.parametrize("name", ["elu", "tanh", "relu"])
def test_activations_and_their_gradients_are_those_of_torch(name):
    x = torch.linspace(-30, 5, 80).requires_grad_()
    network = Network((5,), 3, 1.0, arguments(hidden=(4, 4), activation=name))
    assert [type(layer) for layer in network.layers[1::2]] == [type(network.layers[1])] * 2
    found, expected = network.layers[1](x), getattr(nn.functional, name)(x)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    assert torch.allclose(found, expected, atol=1e-6) and torch.allclose(*grads, atol=1e-6)


class Log:
    """A RunLogger that keeps the metrics."""

    def __init__(self):
        self.rows = []

    def log(self, iteration: int, metrics: dict) -> None:
        self.rows.append(metrics)

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def trained(monkeypatch, **overrides) -> tuple[Run, list[dict], list[dict]]:
    """A whole run, its metrics, and at every update the optimizer's group and what was observed."""
    run, log, seen = Run(0, eval_episodes=0, **overrides), Log(), []

    def spy(policy, optimizer, batch, *rest):
        group = optimizer.param_groups[0]
        seen.append({"lr": float(group["lr"]), "eps": group["eps"], "obs": run.points.seen[-T - 1 : -1]})
        return update(policy, optimizer, batch, *rest)

    monkeypatch.setattr(ppo_isaac, "update", spy)
    monkeypatch.setattr(ppo_isaac, "save_checkpoint", lambda *args: None)
    monkeypatch.setattr(stock_tasks, "snapshot", lambda env: {})
    ppo_isaac.train(run.args, run.env, run.policy, log, ALONE, None)
    return run, log.rows, seen


def test_adams_epsilon_and_the_learning_rate_annealed_to_zero(monkeypatch):  # core 3, 4
    for schedule, expected in (("linear", [2e-3, 1.6e-3, 1.2e-3, 0.8e-3, 0.4e-3]), ("constant", [2e-3] * 5)):
        _, _, seen = trained(monkeypatch, schedule=schedule, learning_rate=2e-3, iterations=5)
        assert [group["lr"] for group in seen] == pytest.approx(expected)
        assert all(group["eps"] == 1e-5 for group in seen)


@every_kind
def test_policy_and_value_have_networks_of_their_own(kind):  # core 13, continuous 4
    run = Run(**kind)
    found = run.gradients(run.loss(value_coef=0.0)[0])
    assert all((grad.abs().max() == 0) == name.startswith("critic.") for name, grad in found.items() if "bias" not in name)
    rest = run.batch.rest.clone()
    rest[..., -3] = 0.0  # advantages
    found = run.gradients(run.loss(rest, entropy_coef=0.0)[0])
    assert all((grad.abs().max() > 0) == name.startswith("critic.") for name, grad in found.items() if "bias" not in name)


# ---------------------------------------------------------------- minibatches


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_every_epoch_shuffles_anew_and_takes_every_sample_once(recurrent, world):  # core 6
    args, own = arguments(recurrent=recurrent, minibatches=3, epochs=4), N // world
    count, length = (N, T) if recurrent else (T * N, 1)
    orders = set()
    for i, seed in ((0, 1), (1, 1), (0, 2)):
        args.seed = seed
        for parts in zip(*(plan_minibatches(args, i, Ranks(rank, world)) for rank in range(world))):
            chosen = []
            for mine in zip(*parts):
                whole = [index // own * N + rank * own + index % own for rank, (index, _) in enumerate(mine)]
                chosen.append(torch.cat(whole))
                assert all(size == len(chosen[-1]) * length for _, size in mine)
            assert len(chosen) == 3 and max(map(len, chosen)) - min(map(len, chosen)) <= 1
            assert torch.equal(torch.cat(chosen).sort().values, torch.arange(count))
            orders.add(tuple(torch.cat(chosen).tolist()))
    assert len(orders) == 12


@every_kind
@pytest.mark.parametrize("normalize", [True, False])
def test_minibatches_hold_the_planned_rows_with_advantages_normalised_in_each(kind, normalize, monkeypatch):  # core 7, LSTM 4
    run, seen = Run(minibatches=3, normalize_advantages=normalize, **kind), []

    def spy(policy, batch, obs, critic, rest, *more):
        seen.append((obs, critic, rest.clone(), more[0], more[2]))
        return ppo_loss(policy, batch, obs, critic, rest, *more)

    monkeypatch.setattr(ppo_isaac, "ppo_loss", spy)
    run.update()
    parts = [part for epoch in plan_minibatches(run.args, 0, ALONE) for part in epoch]
    for (obs, critic, rest, size, own), (index, planned) in zip(seen, parts, strict=True):
        rows = (slice(None), index) if run.args.recurrent else index  # whole sequences of some environments
        assert torch.equal(obs, run.batch.obs[rows]) and torch.equal(critic, run.batch.critic[rows])
        assert size == planned == rest[..., 0].numel() and (not run.args.recurrent or torch.equal(own, index))
        wanted = run.batch.rest[rows].double()
        if normalize:
            wanted[..., -3] = (wanted[..., -3] - wanted[..., -3].mean()) / wanted[..., -3].std(unbiased=False)
        assert torch.allclose(rest.double(), wanted, atol=1e-5)


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize(
    "advantage, ratio, passes",
    [(1, 1.5, False), (1, 0.5, True), (1, 1.1, True), (-1, 0.5, False), (-1, 1.5, True), (-1, 0.9, True)],
)
def test_the_surrogate_is_clipped(advantage, ratio, passes):  # core 8
    run = Run(entropy_coef=0.0, value_coef=0.0)
    rest = run.batch.rest.clone()
    rest[:, -3] = advantage
    plain = run.gradients(run.loss(rest)[0])
    rest[:, -4] -= math.log(ratio)
    loss, sums = run.loss(rest)
    expected = -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert math.isclose(loss.detach(), expected, rel_tol=1e-5) and math.isclose(sums[0], expected, rel_tol=1e-5)
    assert sums[3] == (abs(ratio - 1) > 0.2) and math.isclose(sums[5], abs(ratio - 1), rel_tol=1e-4)
    for name, grad in run.gradients(loss).items():
        assert torch.allclose(grad, ratio * plain[name] if passes else 0 * grad, rtol=1e-3, atol=1e-6), name
    assert plain["log_std"].abs().max() > 0.01 and plain["actor.layers.0.weight"].abs().max() > 0.01


def test_the_surrogate_is_a_mean_over_samples_whose_components_share_a_ratio():  # core 8, 12, continuous 3
    run = Run(entropy_coef=0.0, value_coef=0.0)
    old = Normal(run.batch.rest[:, 2:4].double(), run.policy.log_std.detach().exp().double())
    perturb(run.policy, 0.05)
    loss, sums = run.loss()
    with torch.no_grad():
        dist = Normal(run.policy.actor.layers(run.batch.obs).double(), run.policy.log_std.exp().double())
        ratio = torch.exp(dist.log_prob(run.batch.rest[:, :2].double()).sum(1) - run.batch.rest[:, -4].double()).numpy()
    advantage = run.batch.rest[:, -3].double().numpy()
    expected = -np.mean(np.minimum(ratio * advantage, ratio.clip(0.8, 1.2) * advantage))
    assert math.isclose(loss.detach(), expected, rel_tol=1e-4) and math.isclose(sums[5], abs(ratio - 1).max(), rel_tol=1e-4)
    assert math.isclose(sums[4], kl_divergence(old, dist).sum(1).mean(), rel_tol=1e-4)
    assert 0 < sums[3] < 1 and math.isclose(sums[3], np.mean((ratio < 0.8) | (ratio > 1.2)), abs_tol=1e-6)


def test_the_kl_is_that_of_the_new_policy_from_the_old_one():  # core 12
    run = Run(space=CHOICES)
    old = run.batch.rest[:, 2:7].split((3, 2), -1)
    perturb(run.policy, 0.1)
    new = run.policy.actor.layers(run.batch.obs).detach().split((3, 2), -1)
    expected, reverse = (sum(kl_divergence(Categorical(logits=p), Categorical(logits=q)).mean() for p, q in zip(*pair))
                         for pair in ((old, new), (new, old)))  # fmt: skip
    assert math.isclose(run.loss()[1][4], expected, rel_tol=1e-4) and not math.isclose(expected, reverse, rel_tol=1e-2)


@pytest.mark.parametrize("clip_value", [False, True])
def test_the_value_loss_is_clipped(clip_value):  # core 9
    run = Run(entropy_coef=0.0, value_coef=1.0, clip_value=clip_value)
    rest = run.batch.rest.clone()
    rest[:, -3] = 0.0  # no policy loss
    rest[:, -1] += torch.linspace(-1, 1, len(rest))  # values have moved since, by less and by more than the clip
    loss, sums = run.loss(rest)
    value = run.policy.critic.layers(run.batch.critic)[:, 0].detach().double().numpy()
    target, old = rest[:, -2].double().numpy(), rest[:, -1].double().numpy()
    plain, clipped = (value - target) ** 2, (np.clip(value, old - 0.2, old + 0.2) - target) ** 2
    expected = 0.5 * np.mean(np.maximum(plain, clipped) if clip_value else plain)
    assert np.mean(plain < clipped) > 0.1 and np.mean(plain > clipped) > 0.1
    assert math.isclose(loss.detach(), expected, rel_tol=1e-5) and math.isclose(sums[1], expected, rel_tol=1e-5)


@every_kind
def test_entropy_is_rewarded_and_the_value_loss_weighed_by_their_coefficients(kind):  # core 10
    run = Run(**kind)
    (loss, sums), bare = run.loss(entropy_coef=0.25, value_coef=0.5), run.loss(entropy_coef=0.0, value_coef=0.0)[0]
    assert sums[1] > 0.1 and sums[2] > 0.1
    assert math.isclose((loss - bare).detach(), 0.5 * sums[1] - 0.25 * sums[2], rel_tol=1e-4)
    entropy = run.policy.entropy(run.policy(run.batch.obs, *run.context(0))[0]).mean()
    assert math.isclose(entropy.detach(), sums[2], rel_tol=1e-5)
    more, less = (run.gradients(run.loss(entropy_coef=c)[0]) for c in (1.0, 0.0))
    for name, grad in run.gradients(-entropy).items():
        assert torch.allclose(more[name] - less[name], grad, atol=1e-5), name


def test_the_gradient_is_clipped_by_its_global_norm():  # core 11
    steps, figures = [], []
    for limit in (1e9, 0.01):
        run = Run(max_grad_norm=limit, epochs=1, minibatches=1, schedule="constant")
        before = parameters_to_vector(run.policy.parameters()).detach().clone()
        figures.append(run.update(1.0, sgd=True))
        steps.append(parameters_to_vector(run.policy.parameters()).detach() - before)
    assert all(math.isclose(f[5], steps[0].norm(), rel_tol=1e-4) for f in figures) and steps[0].norm() > 1  # unclipped
    assert math.isclose(steps[1].norm(), 0.01, rel_tol=1e-3)
    assert torch.cosine_similarity(*steps, 0) > 1 - 1e-4


@every_kind
def test_the_figures_of_an_iteration(kind):  # core 12
    run = Run(stagger=False, **kind)
    figures = run.update(5e-3)
    metrics = describe_iteration(run.batch, run.policy, torch.tensor(run.rate()), figures, run.args, ALONE)
    returns, values = run.column(-2).double().numpy(), run.column(-1).double().numpy()
    assert math.isclose(metrics["update/explained_variance"], 1 - np.var(returns - values) / np.var(returns), rel_tol=1e-3)
    found = [metrics[f"rollout/{name}"] for name in ("return", "length", "episodes", "reward")]
    ends = run.points.ends
    assert found == pytest.approx([*np.mean(ends, 0), len(ends), float(run.store.reward.mean())], rel=1e-5)
    assert metrics["update/first_ratio_error"] < 1e-5 < metrics["update/kl"]
    assert run.update()[6] > 1e-3  # of the same batch: no longer 1
    loss = metrics["update/policy_loss"] + run.args.value_coef * metrics["update/value_loss"]
    assert math.isclose(metrics["update/loss"], loss - run.args.entropy_coef * metrics["update/entropy"], rel_tol=1e-5)


# ---------------------------------------------------------------- distributions


def policy_of(continuous: int = 0, choices: tuple[int, ...] = (), scale: float = 0.4) -> ActorCritic:
    return perturb(ActorCritic(Spaces((3,), (), continuous, choices), arguments(init_std=0.7)), scale)


def test_gaussian_log_probability_entropy_and_kl_are_those_of_torch():  # continuous 1, 3; core 12
    policy, old_log_std = policy_of(4), torch.linspace(-1, 0.5, 4)
    mean, new, action = torch.randn(3, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    std = policy.log_std.detach().exp()
    assert torch.allclose(policy.log_prob(mean, action), Normal(mean, std).log_prob(action).sum(-1), rtol=1e-5, atol=1e-5)
    assert torch.allclose(policy.entropy(mean), Normal(mean, std).entropy().sum(-1), rtol=1e-5)
    expected = kl_divergence(Normal(mean, old_log_std.exp()), Normal(new, std)).sum(-1)
    assert torch.allclose(policy.kl(mean, old_log_std, new), expected, rtol=1e-4, atol=1e-5) and expected.min() > 0
    assert policy.kl(mean, policy.log_std, mean).abs().max() == 0


def test_the_std_does_not_depend_on_the_state_and_starts_at_init_std():  # continuous 2
    obs, noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4)
    for scale in (0.0, 0.4):
        action, mean, _ = policy_of(4, scale=scale).act(obs, noise)
        assert torch.allclose(*(action - mean), atol=1e-6) and not torch.equal(*mean)
        assert torch.allclose(action - mean, torch.tensor(0.7), atol=1e-6) == (scale == 0.0)


def test_categorical_log_probability_entropy_and_kl_are_those_of_torch_summed_over_components():  # MultiDiscrete
    policy, sizes = policy_of(choices=(3, 2, 4), scale=0.2), (3, 2, 4)
    obs = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        old, new = (policy(x)[0] for x in obs)
        p, q = ([Categorical(logits=part) for part in policy.actor.layers(x).split(sizes, -1)] for x in obs)
    action = torch.stack([dist.sample() for dist in p], -1)
    log_prob = sum(dist.log_prob(a) for dist, a in zip(p, action.T))
    assert torch.allclose(policy.log_prob(old, action.float()), log_prob, atol=1e-5)
    assert torch.allclose(policy.entropy(old), sum(dist.entropy() for dist in p), atol=1e-5)
    kl = sum(kl_divergence(*pair) for pair in zip(p, q))
    assert torch.allclose(policy.kl(old, policy.log_std, new), kl, rtol=1e-4, atol=1e-5) and kl.max() > 0.1


def test_samples_have_the_probabilities_of_the_policy():
    n, obs = 40_000, torch.tensor([[0.5, -1.0, 0.3]])
    policy = policy_of(choices=(3, 2), scale=0.1)
    action, _, _ = policy.act(obs.expand(n, -1), policy.noise(1, n, ALONE, 1, 2)[0])
    joint = torch.zeros(3, 2).index_put_(tuple(action.T), torch.ones(n), accumulate=True) / n
    first, second = (part.softmax(-1)[0].detach() for part in policy.actor.layers(obs).split((3, 2), -1))
    assert (joint - first[:, None] * second).abs().max() < 0.01 < joint.min() and joint.std() > 0.03
    policy = policy_of(4)
    action, mean, _ = policy.act(obs.expand(n, -1), policy.noise(1, n, ALONE, 1, 2)[0])
    assert (action.mean(0) - mean[0]).abs().max() < 0.02
    assert (torch.cov(action.T) - torch.diag(policy.log_std.detach().exp() ** 2)).abs().max() < 0.03


@every_kind
def test_without_noise_the_likeliest_action_is_taken(kind):
    run = Run(**kind)
    state = (torch.randn(2, N, 6), torch.zeros(N, dtype=torch.bool)) if run.args.recurrent else ()
    action, params, _ = run.policy.act(run.store.obs[-1], None, *state)
    grid = [torch.tensor([i, j]).expand(N, 2) for i in range(3) for j in range(2)]
    others = grid if "space" in kind else [action + d for d in (0.01, -0.01, 1.0)]
    best = torch.stack([run.policy.log_prob(params, other) for other in others]).amax(0)
    assert (run.policy.log_prob(params, action) >= best - 1e-6).all()


def test_noise_does_not_depend_on_the_split():
    for policy in (policy_of(5), policy_of(choices=(3, 2))):
        whole = policy.noise(4, 8, ALONE, 1, 1, 3)
        for rank in range(4):
            assert torch.equal(policy.noise(4, 2, Ranks(rank, 4), 1, 1, 3), whole[:, 2 * rank : 2 * rank + 2])
        for seeds in ((1, 1, 4), (2, 1, 3)):
            assert not torch.equal(policy.noise(4, 8, ALONE, *seeds), whole)


# ---------------------------------------------------------------- continuous actions and normalisation


@pytest.mark.parametrize("limit", [None, 0.5])
def test_actions_are_clipped_only_on_their_way_into_the_environment(limit):  # continuous 5
    run, bound = Run(clip_actions=limit), limit or 1.0
    assert (run.store.action.abs() > bound).any()
    assert torch.equal(torch.stack(run.points.received), run.store.action.clamp(-bound, bound))
    expected = Normal(run.store.params, run.policy.log_std.detach().exp()).log_prob(run.store.action).sum(-1)
    assert torch.allclose(run.column(-4), expected, rtol=1e-4, atol=1e-5)


def test_running_statistics_are_those_of_all_rows_and_normalised_rows_are_clipped():  # continuous 6, 7
    rng, norm = np.random.default_rng(0), RunningNorm(3, 2.0)
    batches = [rng.normal((1000.0, 3.0, 0.0), (10.0, 0.2, 1e-4), (n, 5, 3)).astype(np.float32) for n in (3, 40, 7)]
    for x in batches:
        norm.update(torch.as_tensor(x), ALONE)
    rows = np.concatenate(batches).reshape(-1, 3)
    expected = (rows - rows.mean(0, dtype=float)) / (rows.std(0, dtype=float) + 0.01)
    assert np.abs(expected).max() > 2
    assert np.allclose(norm(torch.as_tensor(rows)), expected.clip(-2, 2), atol=2e-3)
    assert np.allclose(norm.moments[2] / norm.moments[0], rows.var(0, dtype=float), rtol=1e-4)


@pytest.mark.parametrize("critic", [False, True])
def test_every_observation_counts_once_in_the_statistics_and_only_after_the_update(critic, monkeypatch):  # continuous 6, 7
    run, metrics, seen = trained(monkeypatch, normalize_obs=True, critic=critic, iterations=3)
    assert all(row["update/first_ratio_error"] < 1e-5 for row in metrics)
    for name, norm in (("policy", run.policy.obs_norm), ("critic", run.policy.critic_norm))[: 1 + critic]:
        rows = torch.cat([groups[name] for row in seen for groups in row["obs"]]).double()
        assert len(rows) == norm.moments[0, 0] == 3 * T * N
        assert torch.allclose(norm.shift.double(), rows.mean(0), atol=1e-5)
        assert torch.allclose(norm.scale.double(), 1 / (rows.std(0, unbiased=False) + 0.01), rtol=1e-4)
    assert run.policy.obs_norm(torch.tensor([[1e6, -1e6, 0.0]]))[0, :2].tolist() == [10.0, -10.0]


def test_rewards_are_scaled_by_the_std_of_discounted_returns_which_start_anew_with_episodes():  # continuous 8, 9
    run = Run(0, finite=True, normalize_returns=True, gamma=0.9, clip_rewards=0.5)
    running, history = np.zeros(N), []
    for _ in range(2):
        run.collect()
        for reward, start in zip(run.store.reward.double().numpy(), run.store.starts.numpy()):
            running = np.where(start, 0.0, running) * 0.9 + reward
            history.append(running)
        scaled = run.store.reward.double().numpy() / (np.std(history) + 0.01)
        assert 0.1 < np.mean(np.abs(scaled) > 0.5) < 0.9
        last = run.store.terminated.numpy()  # such a step's return is its reward
        assert last.sum() > 2 and np.allclose(run.column(-2).numpy()[last], scaled.clip(-0.5, 0.5)[last], atol=1e-5)


# ---------------------------------------------------------------- LSTM


@torch.no_grad()
def test_an_episode_begins_with_a_zero_state_and_other_steps_and_rollouts_with_the_one_before():  # LSTM 2, 3
    run = Run(0, recurrent=True)
    assert run.store.starts[-1].all() and all(state.abs().max() == 0 for state in run.store.states)
    g, net = torch.Generator().manual_seed(0), run.policy.actor
    x, state = torch.randn(T, N, 3, generator=g), torch.randn(2, N, 6, generator=g)
    starts = torch.rand(T, N, generator=g) < 0.2
    out, states = net(x, state, starts)
    for n in range(N):
        cuts = sorted({0, *starts[:, n].nonzero()[:, 0].tolist(), T})
        for a, b in zip(cuts, cuts[1:]):
            h = torch.zeros(2, 1, 6) if starts[a, n] else state[:, n : n + 1]
            for t in range(a, b):
                h = torch.stack(net.lstm(x[t, n : n + 1], tuple(h)))
                assert torch.allclose(net.layers(h[0]), out[t, n], atol=1e-6)
                assert torch.allclose(states[t, :, n], h[:, 0], atol=1e-6)
    assert starts.sum() > 5
    run.collect()
    for own, obs, carried in zip((net, run.policy.critic), (run.store.obs, run.store.critic), run.store.states):
        assert torch.allclose(own(obs[:T], torch.zeros(2, N, 6), run.store.starts[:T])[1][-1], carried, atol=1e-6)


@every_kind
def test_the_ratio_is_one_on_every_sample_before_the_first_step(kind):  # LSTM 5
    """Over episode ends, after updates, with statistics that changed: the update rebuilds what the rollout saw."""
    run = Run(0, normalize_obs=True, normalize_returns=True, **kind)
    for i in range(3):
        run.collect()
        sums = run.loss()[1]
        assert sums[5] < 2e-6 and abs(sums[4]) < 1e-6 and run.store.starts[1:-1].any()
        value = run.policy.value(run.batch.critic, *run.context(1))[0]
        assert torch.allclose(value, run.batch.rest[..., -1], atol=1e-5)
        if i and run.args.recurrent:  # and without its states it does not
            zero = tuple(torch.zeros_like(state) for state in run.batch.states)
            for wrong in ({"states": zero}, {"starts": torch.zeros_like(run.batch.starts)}):
                assert run.loss(batch=run.batch._replace(**wrong))[1][5] > 1e-3
        run.update(1e-2)
        assert run.loss()[1][5] > 1e-3
        run.policy.obs_norm.update(run.store.obs[:-1], ALONE)


# ---------------------------------------------------------------- learning rate and early stop


def parameters_after(epochs: int, stop_kl: float | None = None) -> tuple[Tensor, float]:
    """Parameters and Adam's state after some of four epochs, and the KL summed over epochs."""
    run = Run(schedule="constant", epochs=4, stop_kl=stop_kl)
    figures = run.update(1e-2, epochs=epochs)
    state = run.optimizer.state_dict()["state"][0]
    flat = parameters_to_vector(run.policy.parameters()).detach()
    return torch.cat([flat, state["exp_avg"], state["exp_avg_sq"], state["step"].view(1)]), float(figures[4]) * epochs


def test_after_an_epoch_of_too_much_kl_nothing_changes_any_more():
    (one, first), (two, both), (four, _) = (parameters_after(epochs) for epochs in (1, 2, 4))
    assert both - first > first > 0
    for stop_kl, expected in ((first / 2, one), (both / 2, two), (1e9, four)):
        assert torch.equal(parameters_after(4, stop_kl)[0], expected)
    assert not torch.equal(one, two) and not torch.equal(two, four)


@pytest.mark.parametrize(
    "target_kl, epochs, expected",
    [(1e9, 1, 1.5e-3), (1e9, 2, 1.5**3 * 1e-3), (1e9, 8, 1e-2), (1e-12, 1, 1e-3 / 1.5), (1e-12, 8, 1e-5), (None, 1, 1e-3)],
)
def test_the_adaptive_learning_rate_follows_the_kl_within_bounds(target_kl, epochs, expected):
    """Two steps an epoch; at the first one of all there is no KL to go by."""
    if target_kl is None:  # that of the second step itself
        target_kl = 2 * float(Run(epochs=1).update()[4])
    run = Run(epochs=epochs, target_kl=target_kl)
    run.update()
    assert math.isclose(run.rate(), expected, rel_tol=1e-5)


# ---------------------------------------------------------------- two processes

SPLIT = {
    "critic": {"critic": True},
    "lstm": {"recurrent": True, "minibatches": 3},
    "stop": {"space": CHOICES, "stop_kl": 1e-4},
    "rate": {"epochs": 1},
}


def target_kl(name: str) -> float:
    """"rate": the KL of all ranks together is above twice of it, that of one rank's half is not."""
    if name != "rate":
        return 1e-4
    kl = 2 * float(Run(2, target_kl=1e9, **SPLIT[name]).update(5e-3, sgd=True)[4])  # of the second of two steps
    return kl / 2.2


def updated(run: Run, ranks: Ranks) -> Tensor:
    """Parameters after an update by SGD, figures summed over ranks, learning rate and running statistics."""
    figures, norm = run.update(5e-3, sgd=True, ranks=ranks), RunningNorm(3, 10.0)
    for rows in run.batch.obs.view(T, -1, 3).split(5):
        norm.update(rows, ranks)
    flat = parameters_to_vector(run.policy.parameters()).detach()
    return torch.cat([flat, ranks.reduce(figures[:5].clone()), torch.tensor([run.rate()]), norm.shift, norm.scale])


def one_rank(rank: int, port: int, folder: str) -> None:
    """One of two processes, as torchrun would start it: its own half of the environments."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks, half = Ranks.start("cpu"), slice(rank * N // 2, (rank + 1) * N // 2)
    for name, kind in SPLIT.items():
        whole = torch.load(f"{folder}/{name}.pt")
        run = Run(0, target_kl=whole.pop("target_kl"), **kind)
        dims = 0 if run.args.recurrent else 1
        rows = {key: whole[key].view(T, N, -1)[:, half].flatten(0, dims) for key in ("obs", "critic", "rest")}
        states = whole["states"] and tuple(state[:, half] for state in whole["states"])
        run.batch = ppo_isaac.Batch(**whole | rows | {"starts": whole["starts"][:, half], "states": states})
        torch.save(updated(run, ranks), f"{folder}/{name}_{rank}.pt")
    ranks.stop()


def test_two_processes_make_the_same_update(tmp_path):
    expected = {}
    for name, kind in SPLIT.items():
        run = Run(2, target_kl=target_kl(name), **kind)
        torch.save({**run.batch._asdict(), "figures": {}, "target_kl": run.args.target_kl}, tmp_path / f"{name}.pt")
        before = parameters_to_vector(run.policy.parameters()).detach().clone()
        expected[name] = updated(run, ALONE)
        assert (expected[name][: len(before)] - before).abs().max() > 1e-3
        if name == "rate":
            assert math.isclose(run.rate(), 5e-3 / 1.5, rel_tol=1e-5)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # a forked process need not import torch again; after CUDA has started it may not be forked
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    children = [context.Process(target=one_rank, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        if child.is_alive():
            child.kill()
    assert [child.exitcode for child in children] == [0, 0]
    for name, alone in expected.items():
        found = [torch.load(tmp_path / f"{name}_{rank}.pt") for rank in range(2)]
        assert torch.equal(*found) and torch.allclose(found[0], alone, rtol=1e-5, atol=1e-6), name


# ---------------------------------------------------------------- checkpoints


@every_kind
def test_a_saved_policy_gives_the_same_outputs(kind, tmp_path):
    run = Run(normalize_obs=True, hidden=(8, 4), activation="tanh", hide_obs=(1,), **kind)
    run.update()
    run.policy.obs_norm.update(run.store.obs[:-1], ALONE)
    run.policy.save(tmp_path)
    args = arguments(hidden=None, checkpoint=str(tmp_path))
    assert args.hidden == (8, 4) and args.activation == "tanh" and args.hide_obs == (1,) and args.normalize_obs
    fresh = ActorCritic(run.env.spaces, args)

    def outputs(policy: ActorCritic) -> Tensor:
        with torch.no_grad():
            value = policy.value(run.batch.critic, *run.context(1))[0]
            state = (run.batch.states[0], run.store.starts[-1]) if args.recurrent else ()
            return torch.cat([policy.act(run.store.obs[-1], None, *state)[1].flatten(), value.flatten()])

    assert not torch.equal(outputs(fresh), outputs(run.policy))
    fresh.load_state_dict(load_file(tmp_path / "policy.safetensors"))
    assert torch.equal(outputs(fresh), outputs(run.policy))


@pytest.mark.parametrize("hidden, given, expected", [((64, 8), None, 1), ((65, 8), None, 2), ((64, 8), "2", 2)])
def test_small_networks_use_one_thread_unless_told_otherwise(hidden, given, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(ppo_isaac, "task_config", lambda *args: None)
    monkeypatch.setattr(ppo_isaac, "make_env", lambda *args: contextlib.nullcontext(Run(0).env))
    monkeypatch.setattr(ppo_isaac, "train", lambda *args: None)
    torch.set_num_threads(2)
    try:
        ppo_isaac.main(Args(task="Points", device="cpu", track=False, hidden=hidden))
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("damage", [False, True])
def test_weights_that_do_not_fit_are_refused(damage, tmp_path, monkeypatch):
    """Those of another task's spaces, or cut short."""
    run, folder = Run(space=BOX if damage else CHOICES), tmp_path / "policy"
    folder.mkdir()
    run.policy.save(folder)
    if damage:
        file = folder / "policy.safetensors"
        file.write_bytes(file.read_bytes()[:300])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ppo_isaac, "task_config", lambda *args: None)
    monkeypatch.setattr(ppo_isaac, "make_env", lambda *args: contextlib.nullcontext(Run(0).env))
    with pytest.raises(UsageError, match=f"^--checkpoint {folder}: does not fit"):
        ppo_isaac.main(Args(task="Points", device="cpu", track=False, checkpoint=str(folder), evaluate=True))
