"""PPO's mathematics and bookkeeping, through ppo_isaac.py's own functions: points on a line in the simulator's place.

The comments beside tests number the details after "The 37 Implementation Details of PPO" (Huang et al., 2022).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import socket
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributions import Categorical, Normal, kl_divergence
from torch.nn.utils import parameters_to_vector

import ppo_isaac
from common import Metrics, Ranks, StageTimer
from ppo_isaac import (
    ActorCritic,
    Args,
    Network,
    RunningNorm,
    Storage,
    flat_parameter,
    make_batch,
    parse,
    plan_minibatches,
    ppo_loss,
    rollout,
    update,
)
from tasks import stock
from tasks.stock import Spaces, VecEnv

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
    """`gym.make` gives the task that is handed over as configuration."""
    monkeypatch.setattr(gym, "make", lambda task, cfg: cfg.points)


def arguments(**overrides) -> Args:
    wanted = {"num_envs": N, "num_steps": T, "hidden": (16, 8), "minibatches": 2, "epochs": 2, "lstm_size": 6}
    return Args(**{"task": "Points", "device": "cpu", "exp_name": "test", **wanted, **overrides})


def perturb(policy: ActorCritic, scale: float) -> ActorCritic:
    """Weights as if it had been trained: at first those of the last layer are all but zero."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g))
    return policy


class Case:
    """Arguments, environment, policy and buffers, and the batch of the last of some rollouts."""

    def __init__(self, rollouts: int = 1, space=BOX, critic=False, finite=False, **overrides):
        self.args, self.iteration = arguments(**overrides), 0
        self.points = Points(N, space, critic)
        cfg, args = SimpleNamespace(is_finite_horizon=finite, points=self.points), self.args
        self.env = VecEnv(args.task, cfg, ALONE, args.seed, args.clip_actions, args.obs_groups, args.hide_obs)
        torch.manual_seed(args.seed)
        self.policy = perturb(ActorCritic(self.env.spaces, args), 0.3)
        self.store = Storage(args, self.env)
        self.store.begin(self.env, args, 0, None)
        self.samples = self.store.samples
        for _ in range(rollouts):
            self.collect()

    def collect(self) -> None:
        self.log = Metrics("cpu", ALONE)
        rollout(self.env, self.policy, self.store, self.args, self.iteration, ALONE, StageTimer("cpu"))
        self.batch = make_batch(self.env, self.policy, self.store, self.args, ALONE, self.log)
        self.iteration += 1

    def column(self, name: str) -> Tensor:
        """(T, N)"""
        return self.batch[name].view(T, N)

    def context(self, k: int) -> tuple:
        """What the actor's (0) or critic's (1) LSTM starts from."""
        return (self.store.before[k], self.batch["start"]) if self.args.recurrent else ()

    @property
    def critic_obs(self) -> Tensor:
        return self.batch["critic" if "critic" in self.batch else "obs"]

    def loss(self, batch: TensorDict | None = None, states: list | None = None, **changes) -> tuple[Tensor, dict[str, float]]:
        """`ppo_loss` of all samples in one minibatch; its figures and the largest |ratio - 1|."""
        batch, log = self.batch if batch is None else batch, Metrics("cpu", ALONE)
        args, states = dataclasses.replace(self.args, **changes), self.store.before if states is None else states
        loss, kl, ratio = ppo_loss(self.policy, batch, states, self.store.log_std, batch["value"].numel(), args, log)
        figures = {name.removeprefix("update/"): value for name, value in log.read().items()}
        assert math.isclose(kl, figures["kl"], rel_tol=1e-4, abs_tol=1e-7)
        return loss, figures | {"ratio_error": float((ratio - 1).abs().max())}

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        self.policy.zero_grad()
        loss.backward()
        named = [(name, p) for name, p in self.policy.named_parameters() if p.numel()]
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}

    def update(self, rate: float = 1e-3, sgd: bool = False, ranks: Ranks = ALONE) -> dict[str, float]:
        """By Adam as in the script, or by SGD, whose steps show the gradient. Returns the figures."""
        self.flat, rate, log = flat_parameter(self.policy), torch.tensor(rate), Metrics("cpu", ranks)
        kind = torch.optim.SGD([self.flat], rate, fused=True) if sgd else None
        self.optimizer = kind or torch.optim.Adam([self.flat], rate, eps=1e-5, fused=True)
        plan = plan_minibatches(self.store.units, 0, self.args, ranks)
        update(self.policy, self.optimizer, self.batch, self.store, plan, self.args, ranks, log)
        return {name.removeprefix("update/"): value for name, value in log.read().items()}

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
    case, ends = Case(0, stagger=False, **kind), 0
    x = case.samples
    for i in range(3):
        case.collect()
        ends += x["start"][1:].sum()
        seen = case.points.seen[i * T : 1 + (i + 1) * T]
        assert torch.equal(x["obs"], torch.stack([groups["policy"] for groups in seen]))
        assert "critic" not in x or torch.equal(x["critic"], torch.stack([groups["critic"] for groups in seen]))
        assert torch.equal(x["start"][1:], (x["terminated"] | x["truncated"])[:T])
        assert x["start"][1:-1].any(0).all() and not x["start"][-1].all()
    assert len(case.points.received) == 3 * T and len(case.points.ends) == ends


def true_value(case: Case, state: Tensor | None, t: int, n: int, final: bool) -> float:
    """V of one environment's observation, or of the one that ended step t: alone, and from the rollout's start on."""
    norm, x = case.policy.critic_norm if case.points.critic else case.policy.obs_norm, case.samples
    critic, seen = case.policy.critic, x["critic"] if case.points.critic else x["obs"]
    obs = norm(x["final"][t, n] if final else seen[t, n])[None]
    if case.args.recurrent:
        state = [part[None] for part in state[:, n]]
        for s in range(t + final):
            state = [0 * part for part in state] if x["start"][s, n] else state
            state = critic.lstm(norm(seen[s, n])[None], tuple(state))
        fresh = not final and x["start"][t, n]
        obs = critic.lstm(obs, tuple(0 * part if fresh else part for part in state))[0]
    return float(critic.layers(obs))


@every_kind
@torch.no_grad()
def test_gae_bootstraps_time_outs_from_the_final_observation_and_terminations_from_nothing(kind):  # core 5
    case = Case(gamma=0.9, gae_lambda=0.8, normalize_obs=True, **kind)
    case.store.finish(case.policy, case.args, ALONE)
    state = case.args.recurrent and case.store.states[1].clone()
    case.collect()
    x = case.samples
    assert (x["truncated"] & ~x["terminated"])[:-2].any() and x["terminated"][:-2].any()
    for n in range(N):
        value = [true_value(case, state, t, n, False) for t in range(T + 1)]
        for t in range(T):
            expected, weight = 0.0, 1.0  # the sum of discounted temporal differences up to the episode's end
            for s in range(t, T):
                after = true_value(case, state, s, n, True) if x["truncated"][s, n] else value[s + 1]
                after = 0.0 if x["terminated"][s, n] else after
                expected += weight * (float(x["reward"][s, n]) + 0.9 * after - value[s])
                weight *= 0.9 * 0.8
                if x["start"][s + 1, n]:
                    break
            assert math.isclose(case.column("advantage")[t, n], expected, abs_tol=2e-5)
            assert math.isclose(case.column("target")[t, n], expected + value[t], abs_tol=2e-5)


def test_the_end_of_a_finite_horizon_is_a_termination():
    case = Case(finite=True)
    assert not case.samples["truncated"].any() and case.samples["terminated"].any(0).all()


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


class Quiet:
    """A Run that keeps the metrics, and nothing else."""

    def __init__(self):
        self.rows, self.state = [], {"iteration": 0}

    def restore_optimizer(self, optimizer):
        return optimizer

    def log(self, iteration: int, metrics: dict, *more) -> None:
        self.rows.append(metrics)

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def trained(monkeypatch, **overrides) -> tuple[Case, list[dict], list[dict]]:
    """A whole run, its metrics, and at every update the optimizer's group and what was observed."""
    case, quiet, seen = Case(0, eval_episodes=0, **overrides), Quiet(), []

    def spy(policy, optimizer, *rest):
        group = optimizer.param_groups[0]
        seen.append({"lr": float(group["lr"]), "eps": group["eps"], "obs": case.points.seen[-T - 1 : -1]})
        return update(policy, optimizer, *rest)

    monkeypatch.setattr(ppo_isaac, "update", spy)
    monkeypatch.setattr(stock, "snapshot", lambda env: {})
    ppo_isaac.train(case.args, case.env, case.policy, quiet, ALONE)
    return case, quiet.rows, seen


def test_adams_epsilon_and_the_learning_rate_annealed_to_zero(monkeypatch):  # core 3, 4
    for schedule, expected in (("linear", [2e-3, 1.6e-3, 1.2e-3, 0.8e-3, 0.4e-3]), ("constant", [2e-3] * 5)):
        _, _, seen = trained(monkeypatch, schedule=schedule, learning_rate=2e-3, iterations=5)
        assert [group["lr"] for group in seen] == pytest.approx(expected)
        assert all(group["eps"] == 1e-5 for group in seen)


@every_kind
def test_policy_and_value_have_networks_of_their_own(kind):  # core 13, continuous 4
    case = Case(**kind)
    found = case.gradients(case.loss(value_coef=0.0)[0])
    assert all((grad.abs().max() == 0) == name.startswith("critic.") for name, grad in found.items() if "bias" not in name)
    found = case.gradients(case.loss(case.batch.clone().set("advantage", 0 * case.batch["advantage"]), entropy_coef=0.0)[0])
    assert all((grad.abs().max() > 0) == name.startswith("critic.") for name, grad in found.items() if "bias" not in name)


# ---------------------------------------------------------------- minibatches


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_every_epoch_shuffles_anew_and_takes_every_sample_once(recurrent, world):  # core 6
    count, length = (N, T) if recurrent else (T * N, 1)
    orders, own = set(), N // world
    for i, seed in ((0, 1), (1, 1), (0, 2)):
        args = arguments(minibatches=3, epochs=4, seed=seed)
        plans = [plan_minibatches(count, i, args, Ranks(rank, world)) for rank in range(world)]
        for epoch in range(4):
            chosen = []
            for mine in zip(*(plan[3 * epoch : 3 * epoch + 3] for plan in plans)):
                whole = [rows // own * N + rank * own + rows % own for rank, (rows, _) in enumerate(mine)]
                chosen.append(torch.cat(whole))
                assert all(size == len(chosen[-1]) * length for _, size in mine)
            assert max(map(len, chosen)) - min(map(len, chosen)) <= 1
            assert torch.equal(torch.cat(chosen).sort().values, torch.arange(count))
            orders.add(tuple(torch.cat(chosen).tolist()))
    assert len(orders) == 12


@every_kind
def test_minibatches_hold_the_planned_rows_with_advantages_normalised_in_each(kind, monkeypatch):  # core 7, LSTM 4
    case, seen = Case(minibatches=3, **kind), []

    def spy(policy, batch, states, old_log_std, size, *more):
        seen.append((batch.clone(), states, size))
        return ppo_loss(policy, batch, states, old_log_std, size, *more)

    monkeypatch.setattr(ppo_isaac, "ppo_loss", spy)
    case.update()
    plan = plan_minibatches(case.store.units, 0, case.args, ALONE)
    for (batch, states, size), (rows, planned) in zip(seen, plan, strict=True):
        wanted = case.batch[:, rows] if case.args.recurrent else case.batch[rows]  # whole sequences of some environments
        assert size == planned == batch["value"].numel()
        assert all(torch.equal(*pair) for pair in zip(states, (state[:, rows] for state in case.store.before), strict=True))
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted.keys() if name != "advantage")
        plain = wanted["advantage"].double()
        normal = (plain - plain.mean()) / plain.std(unbiased=False)
        assert torch.allclose(batch["advantage"].double(), normal, atol=1e-5)


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize(
    "advantage, ratio, passes",
    [(1, 1.5, False), (1, 0.5, True), (1, 1.1, True), (-1, 0.5, False), (-1, 1.5, True), (-1, 0.9, True)],
)
def test_the_surrogate_is_clipped(advantage, ratio, passes):  # core 8
    case = Case(entropy_coef=0.0, value_coef=0.0)
    batch = case.batch.clone()
    batch["advantage"].fill_(advantage)
    plain = case.gradients(case.loss(batch)[0])
    batch["log_prob"] -= math.log(ratio)
    loss, figures = case.loss(batch)
    expected = -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert [float(loss.detach()), figures["policy_loss"]] == pytest.approx([expected] * 2, rel=1e-5)
    assert figures["clip_frac"] == (abs(ratio - 1) > 0.2) and math.isclose(figures["ratio_error"], abs(ratio - 1), rel_tol=1e-4)
    for name, grad in case.gradients(loss).items():
        assert torch.allclose(grad, ratio * plain[name] if passes else 0 * grad, rtol=1e-3, atol=1e-6), name
    assert plain["log_std"].abs().max() > 0.01 and plain["actor.layers.0.weight"].abs().max() > 0.01


def test_the_surrogate_is_a_mean_over_samples_whose_components_share_a_ratio():  # core 8, 12, continuous 3
    case = Case(entropy_coef=0.0, value_coef=0.0)
    old = Normal(case.batch["params"].double(), case.policy.log_std.detach().exp().double())
    perturb(case.policy, 0.05)
    loss, figures = case.loss()
    with torch.no_grad():
        dist = Normal(case.policy.actor.layers(case.batch["obs"]).double(), case.policy.log_std.exp().double())
        ratio = torch.exp(dist.log_prob(case.batch["action"].double()).sum(1) - case.batch["log_prob"].double()).numpy()
    advantage = case.batch["advantage"].double().numpy()
    expected = -np.mean(np.minimum(ratio * advantage, ratio.clip(0.8, 1.2) * advantage))
    assert math.isclose(loss.detach(), expected, rel_tol=1e-4)
    assert math.isclose(figures["ratio_error"], abs(ratio - 1).max(), rel_tol=1e-4)
    assert math.isclose(figures["kl"], kl_divergence(old, dist).sum(1).mean(), rel_tol=1e-4)
    assert 0 < figures["clip_frac"] < 1
    assert math.isclose(figures["clip_frac"], np.mean((ratio < 0.8) | (ratio > 1.2)), abs_tol=1e-6)


@pytest.mark.parametrize("clip_value", [False, True])
def test_the_value_loss_is_clipped(clip_value):  # core 9
    case = Case(entropy_coef=0.0, value_coef=1.0, clip_value=clip_value)
    batch = case.batch.clone()
    batch["advantage"].zero_()  # no policy loss
    batch["value"] += torch.linspace(-1, 1, len(batch))  # values have moved since, by less and by more than the clip
    loss, figures = case.loss(batch)
    value = case.policy.critic.layers(batch["obs"])[:, 0].detach().double().numpy()
    target, old = batch["target"].double().numpy(), batch["value"].double().numpy()
    plain, clipped = (value - target) ** 2, (np.clip(value, old - 0.2, old + 0.2) - target) ** 2
    expected = 0.5 * np.mean(np.maximum(plain, clipped) if clip_value else plain)
    assert np.mean(plain < clipped) > 0.1 and np.mean(plain > clipped) > 0.1
    assert [float(loss.detach()), figures["value_loss"]] == pytest.approx([expected] * 2, rel=1e-5)


@every_kind
def test_entropy_is_rewarded_and_the_value_loss_weighed_by_their_coefficients(kind):  # core 10
    case = Case(**kind)
    (loss, figures), bare = case.loss(entropy_coef=0.25, value_coef=0.5), case.loss(entropy_coef=0.0, value_coef=0.0)[0]
    assert figures["value_loss"] > 0.1 and figures["entropy"] > 0.1
    assert math.isclose((loss - bare).detach(), 0.5 * figures["value_loss"] - 0.25 * figures["entropy"], rel_tol=1e-4)
    entropy = case.policy.entropy(case.policy(case.batch["obs"], *case.context(0))[0]).mean()
    assert math.isclose(entropy.detach(), figures["entropy"], rel_tol=1e-5)
    more, less = (case.gradients(case.loss(entropy_coef=c)[0]) for c in (1.0, 0.0))
    for name, grad in case.gradients(-entropy).items():
        assert torch.allclose(more[name] - less[name], grad, atol=1e-5), name


def test_the_gradient_is_clipped_by_its_global_norm():  # core 11
    steps, norms = [], []
    for limit in (1e9, 0.01):
        case = Case(max_grad_norm=limit, epochs=1, minibatches=1, schedule="constant")
        before = parameters_to_vector(case.policy.parameters()).detach().clone()
        norms.append(case.update(1.0, sgd=True)["grad_norm"])
        steps.append(parameters_to_vector(case.policy.parameters()).detach() - before)
    assert norms == pytest.approx([float(steps[0].norm())] * 2, rel=1e-4) and steps[0].norm() > 1  # unclipped
    assert math.isclose(steps[1].norm(), 0.01, rel_tol=1e-3)
    assert torch.cosine_similarity(*steps, 0) > 1 - 1e-4


@every_kind
def test_the_figures_of_an_iteration(kind):  # core 12
    case = Case(stagger=False, **kind)
    case.points.extras["log"] = {"share": torch.tensor(0.25), "many": torch.zeros(3)}
    case.collect()
    plan = plan_minibatches(case.store.units, 0, case.args, ALONE)
    optimizer = torch.optim.Adam([flat_parameter(case.policy)], torch.tensor(5e-3), eps=1e-5, fused=True)
    update(case.policy, optimizer, case.batch, case.store, plan, case.args, ALONE, case.log)
    found = case.log.read()
    returns, values = (case.column(name).double().numpy() for name in ("target", "value"))
    assert math.isclose(found["update/explained_variance"], 1 - np.var(returns - values) / np.var(returns), rel_tol=1e-3)
    ends = case.points.ends[-int(found["rollout/episodes"]) :]
    assert [found[f"rollout/{name}"] for name in ("return", "length")] == pytest.approx(np.mean(ends, 0), rel=1e-5)
    assert found["rollout/episodes"] == case.samples["start"][1:].sum() and found["task/share"] == 0.25
    assert math.isclose(found["rollout/reward"], case.samples["reward"][:T].mean(), rel_tol=1e-5)
    assert found["update/first_ratio_error"] < 1e-5 < found["update/kl"] and "task/many" not in found
    assert case.update()["first_ratio_error"] > 1e-3  # of the same batch: no longer 1
    loss = found["update/policy_loss"] + case.args.value_coef * found["update/value_loss"]
    assert math.isclose(found["update/loss"], loss - case.args.entropy_coef * found["update/entropy"], rel_tol=1e-5)


def test_a_first_ratio_that_is_not_one_stops_the_run(monkeypatch):
    act = ActorCritic.act
    monkeypatch.setattr(ActorCritic, "act", lambda self, obs, *more: act(self, obs + 0.1, *more))
    with pytest.raises(SystemExit, match="ratio"):
        trained(monkeypatch, iterations=2)


# ---------------------------------------------------------------- distributions


def policy_of(continuous: int = 0, choices: tuple[int, ...] = (), scale: float = 0.4) -> ActorCritic:
    torch.manual_seed(0)
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
    assert (joint - first[:, None] * second).abs().max() < 0.01 < joint.min() and joint.std() > 0.02
    policy = policy_of(4)
    action, mean, _ = policy.act(obs.expand(n, -1), policy.noise(1, n, ALONE, 1, 2)[0])
    assert (action.mean(0) - mean[0]).abs().max() < 0.02
    assert (torch.cov(action.T) - torch.diag(policy.log_std.detach().exp() ** 2)).abs().max() < 0.03


@every_kind
def test_without_noise_the_likeliest_action_is_taken(kind):
    case = Case(**kind)
    state = (torch.randn(2, N, 6), torch.zeros(N, dtype=torch.bool)) if case.args.recurrent else ()
    action, params, _ = case.policy.act(case.samples["obs"][-1], None, *state)
    grid = [torch.tensor([i, j]).expand(N, 2) for i in range(3) for j in range(2)]
    others = grid if "space" in kind else [action + d for d in (0.01, -0.01, 1.0)]
    best = torch.stack([case.policy.log_prob(params, other) for other in others]).amax(0)
    assert (case.policy.log_prob(params, action) >= best - 1e-6).all()


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
    case, bound = Case(clip_actions=limit), limit or 1.0
    action, params = case.samples["action"][:T], case.samples["params"][:T]
    assert (action.abs() > bound).any()
    assert torch.equal(torch.stack(case.points.received), action.clamp(-bound, bound))
    expected = Normal(params, case.policy.log_std.detach().exp()).log_prob(action).sum(-1)
    assert torch.allclose(case.column("log_prob"), expected, rtol=1e-4, atol=1e-5)


def test_running_statistics_are_those_of_all_rows_and_normalised_rows_are_clipped(monkeypatch):  # continuous 6, 7
    monkeypatch.setattr(ppo_isaac, "CLIP", 2.0)
    rng, norm = np.random.default_rng(0), RunningNorm(3)
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
    case, metrics, seen = trained(monkeypatch, normalize_obs=True, critic=critic, iterations=3)
    assert all(row["update/first_ratio_error"] < 1e-5 for row in metrics)
    for name, norm in (("policy", case.policy.obs_norm), ("critic", case.policy.critic_norm))[: 1 + critic]:
        rows = torch.cat([groups[name] for row in seen for groups in row["obs"]]).double()
        assert len(rows) == norm.moments[0, 0] == 3 * T * N
        assert torch.allclose(norm.shift.double(), rows.mean(0), atol=1e-5)
        assert torch.allclose(norm.scale.double(), 1 / (rows.std(0, unbiased=False) + 0.01), rtol=1e-4)
    assert case.policy.obs_norm(torch.tensor([[1e6, -1e6, 0.0]]))[0, :2].tolist() == [10.0, -10.0]


def test_rewards_are_scaled_by_the_std_of_discounted_returns_which_start_anew_with_episodes(monkeypatch):  # continuous 8, 9
    monkeypatch.setattr(ppo_isaac, "CLIP", 0.5)
    case = Case(0, finite=True, normalize_returns=True, gamma=0.9)
    running, history = np.zeros(N), []
    for _ in range(2):
        case.collect()
        rewards = case.samples["reward"][:T].double().numpy()
        for reward, start in zip(rewards, case.samples["start"].numpy()):
            running = np.where(start, 0.0, running) * 0.9 + reward
            history.append(running)
        scaled = rewards / (np.std(history) + 0.01)
        assert 0.1 < np.mean(np.abs(scaled) > 0.5) < 0.9
        last = case.samples["terminated"][:T].numpy()  # such a step's return is its reward
        assert last.sum() > 2 and np.allclose(case.column("target").numpy()[last], scaled.clip(-0.5, 0.5)[last], atol=1e-5)


# ---------------------------------------------------------------- LSTM


@torch.no_grad()
def test_an_episode_begins_with_a_zero_state_and_other_steps_and_rollouts_with_the_one_before():  # LSTM 2, 3
    case = Case(0, recurrent=True)
    assert case.samples["start"][-1].all() and all(state.abs().max() == 0 for state in case.store.states)
    g, net = torch.Generator().manual_seed(0), case.policy.actor
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
    case.collect()
    for own, carried in zip((net, case.policy.critic), case.store.states):
        found = own(case.samples["obs"][:T], torch.zeros(2, N, 6), case.samples["start"][:T])[1][-1]
        assert torch.allclose(found, carried, atol=1e-6)


@every_kind
def test_the_ratio_is_one_on_every_sample_before_the_first_step(kind):  # LSTM 5
    """Over episode ends, after updates, with statistics that changed: the update rebuilds what the rollout saw."""
    case = Case(0, normalize_obs=True, normalize_returns=True, **kind)
    for i in range(3):
        case.collect()
        figures = case.loss()[1]
        assert figures["ratio_error"] < 2e-6 and abs(figures["kl"]) < 1e-6 and case.samples["start"][1:-1].any()
        value = case.policy.value(case.critic_obs, *case.context(1))[0]
        assert torch.allclose(value, case.batch["value"], atol=1e-5)
        if i and case.args.recurrent:  # and without its states it does not
            assert case.loss(states=[torch.zeros_like(state) for state in case.store.before])[1]["ratio_error"] > 1e-3
            wrong = case.batch.clone().set("start", torch.zeros_like(case.batch["start"]))
            assert case.loss(wrong)[1]["ratio_error"] > 1e-3
        case.update(1e-2)
        assert case.loss()[1]["ratio_error"] > 1e-3
        case.store.finish(case.policy, case.args, ALONE)


# ---------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    "target_kl, epochs, expected",
    [(1e9, 1, 1.5e-3), (1e9, 2, 1.5**3 * 1e-3), (1e9, 8, 1e-2), (1e-12, 1, 1e-3 / 1.5), (1e-12, 8, 1e-5), (None, 1, 1e-3)],
)
def test_the_adaptive_learning_rate_follows_the_kl_within_bounds(target_kl, epochs, expected):
    """Two steps an epoch; at the first one of all there is no KL to go by."""
    if target_kl is None:  # that of the second step itself
        target_kl = 2 * Case(epochs=1).update()["kl"]
    case = Case(epochs=epochs, target_kl=target_kl)
    case.update()
    assert math.isclose(case.rate(), expected, rel_tol=1e-5)


# ---------------------------------------------------------------- two processes

SPLIT = {
    "critic": {"critic": True},
    "lstm": {"recurrent": True, "minibatches": 3},
    "choices": {"space": CHOICES},
    "rate": {"epochs": 1},
}


def target_kl(name: str) -> float:
    """ "rate": the KL of all ranks together is above twice of it, that of one rank's half is not."""
    if name != "rate":
        return 1e-4
    return 2 * Case(2, target_kl=1e9, **SPLIT[name]).update(5e-3, sgd=True)["kl"] / 2.2  # of the second of two steps


def updated(case: Case, ranks: Ranks) -> Tensor:
    """Parameters after an update by SGD, its figures, learning rate and running statistics."""
    figures, norm = case.update(5e-3, sgd=True, ranks=ranks), RunningNorm(3)
    for rows in case.batch["obs"].view(T, -1, 3).split(5):
        norm.update(rows, ranks)
    figures.pop("first_ratio_error")
    flat = parameters_to_vector(case.policy.parameters()).detach()
    return torch.cat([flat, torch.tensor([*figures.values(), case.rate()]), norm.shift, norm.scale])


def one_rank(rank: int, port: int, folder: str) -> None:
    """One of two processes, as torchrun would start it: its own half of the environments."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks, half = Ranks.start("cpu"), slice(rank * N // 2, (rank + 1) * N // 2)
    for name, kind in SPLIT.items():
        whole = torch.load(f"{folder}/{name}.pt", weights_only=False)
        case = Case(0, target_kl=whole["target_kl"], **kind)
        batch = whole["batch"].reshape(T, N)[:, half]
        case.batch = batch.contiguous() if case.args.recurrent else batch.flatten(0, 1)
        case.store.before, case.store.log_std = [state[:, half] for state in whole["before"]], whole["log_std"]
        torch.save(updated(case, ranks), f"{folder}/{name}_{rank}.pt")


def test_two_processes_make_the_same_update(tmp_path):
    expected = {}
    for name, kind in SPLIT.items():
        case = Case(2, target_kl=target_kl(name), **kind)
        about = {"batch": case.batch, "before": case.store.before, "log_std": case.store.log_std}
        torch.save(about | {"target_kl": case.args.target_kl}, tmp_path / f"{name}.pt")
        before = parameters_to_vector(case.policy.parameters()).detach().clone()
        expected[name] = updated(case, ALONE)
        assert (expected[name][: len(before)] - before).abs().max() > 1e-3
        if name == "rate":
            assert math.isclose(case.rate(), 5e-3 / 1.5, rel_tol=1e-5)
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


# ---------------------------------------------------------------- checkpoints and command line


@every_kind
def test_a_saved_policy_gives_the_same_outputs(kind, tmp_path):
    case = Case(normalize_obs=True, hidden=(8, 4), activation="tanh", hide_obs=(1,), **kind)
    case.update()
    case.store.finish(case.policy, case.args, ALONE)
    case.policy.save(tmp_path)
    args = ppo_isaac.task_args(checkpoint=str(tmp_path))
    assert args.hidden == (8, 4) and args.activation == "tanh" and args.hide_obs == (1,) and args.normalize_obs
    assert args.task == "Points"
    fresh = ActorCritic(case.env.spaces, args)

    def outputs(policy: ActorCritic) -> Tensor:
        with torch.no_grad():
            value = policy.value(case.critic_obs, *case.context(1))[0]
            state = (case.store.before[0], case.samples["start"][-1]) if args.recurrent else ()
            return torch.cat([policy.act(case.samples["obs"][-1], None, *state)[1].flatten(), value.flatten()])

    assert not torch.equal(outputs(fresh), outputs(case.policy))
    fresh.load(tmp_path)
    assert torch.equal(outputs(fresh), outputs(case.policy))


def test_explicit_flags_go_before_those_of_the_task_the_checkpoint_and_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default = parse([])
    assert default == dataclasses.replace(Args(**ppo_isaac.CARTPOLE), exp_name=default.exp_name)
    ant = parse("--task Isaac-Ant-Direct-v0 --num-steps 24".split())  # the default for any task, but asked for
    assert ant.num_steps == 24 and ant.hidden == (400, 200, 100)
    assert ant.exp_name.startswith("ppo_isaac__Isaac-Ant-Direct-v0__1__")
    case = Case(hidden=(8, 4), init_std=0.5)
    case.policy.save(tmp_path)
    found = parse(f"--checkpoint {tmp_path} --init-std 1".split())
    assert found.task == "Points" and found.hidden == (8, 4) and found.init_std == 1.0
    (tmp_path / "runs/old/checkpoints/step_000001").mkdir(parents=True)
    (tmp_path / "runs/old/checkpoints/step_000001/trainer_state.pt").touch()
    (tmp_path / "runs/old/args.json").write_text(json.dumps({"args": vars(ant)}))
    again = parse("--resume runs/old --iterations 1000 --num-steps 32".split())
    assert again == dataclasses.replace(ant, resume="runs/old", exp_name="old", num_steps=32)


@pytest.mark.parametrize("damage", [False, True])
def test_weights_that_do_not_fit_are_refused(damage, tmp_path, monkeypatch):
    """Those of another task's spaces, or cut short."""
    case, folder = Case(space=BOX if damage else CHOICES), tmp_path / "policy"
    folder.mkdir()
    case.policy.save(folder)
    if damage:
        file = folder / "policy.safetensors"
        file.write_bytes(file.read_bytes()[:300])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(ppo_isaac, "known_task", lambda name: name)
    monkeypatch.setattr(ppo_isaac, "task_config", lambda *args, **flags: None)
    monkeypatch.setattr(ppo_isaac, "make_env", lambda *args: contextlib.nullcontext(Case(0).env))
    args = ppo_isaac.task_args(checkpoint=str(folder))
    with pytest.raises(SystemExit, match=f"^--checkpoint {folder}: does not fit"):
        ppo_isaac.main(dataclasses.replace(args, device="cpu", evaluate=True, exp_name="x"))
