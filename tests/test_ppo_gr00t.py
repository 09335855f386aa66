"""PPO's mathematics and bookkeeping, through ppo_gr00t_frozen.py's own functions: a tiny random GR00T, no simulator."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import multiprocessing
import os
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import ppo_gr00t_frozen as ppo
from common import Noise, Ranks, RunLogger, StageTimer
from ppo_gr00t_frozen import (
    TASKS,
    Args,
    Batch,
    ChunkEnv,
    Critic,
    Gr00tActorCritic,
    Observation,
    UsageError,
    describe_iteration,
    episode_seed,
    learning_rate,
    plan_minibatches,
    ppo_loss,
    resolve,
    rollout,
    train,
    update,
    value_loss,
)
from tests import test_grpo_math as grpo
from tests.test_grpo_math import ALONE, NOISES, close, gradient, perturb

torch.set_num_threads(1)
TASK = "Tabletop-Lift-Cube-v0"
HORIZON, CHUNK, CHUNKS = 32, 8, 4  # steps of an episode and of a chunk (the fixture network's horizon); chunks
PRIVILEGED = TASKS[TASK].privileged  # numbers of the simulator's state
VALID = 4  # action dimensions that are not padding
MIXED = (0, 99, 2, 99, 1, 99, 99, 3)  # the chunk in which an environment succeeds; 99: never


def make(checkpoint, **overrides) -> tuple[Args, Gr00tActorCritic]:
    """Arguments and policy; one minibatch, one epoch, no warm-up of the critic."""
    wanted = {"num_envs": 8, "minibatches": 1, "epochs": 1, "critic_epochs": 1, "critic_warmup": 0, "max_grad_norm": 1e9}
    args = resolve(Args(checkpoint=str(checkpoint), device="cpu", **{**wanted, **overrides}))
    return args, Gr00tActorCritic(args)


def observation(args: Args, n: int, seed: int, steps: int = 0) -> Observation:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 1, 64, 64, 3), generator=g, dtype=torch.uint8)
    state, hidden = torch.randn(n, 5, generator=g), torch.randn(n, PRIVILEGED, generator=g)
    own = hidden if args.critic_obs == "privileged" else state
    return Observation(images, state, torch.arange(n) % 2, torch.cat([own, torch.full((n, 1), steps / HORIZON)], 1))


class FakeEnv:
    """What `rollout` and `train` need of a ChunkEnv. `script` names the chunk of an environment's first success.

    It keeps a record of what happened: one (reward, success before, success after, observation) per chunk.
    """

    ended = ChunkEnv.ended

    def __init__(self, args: Args, script=(MIXED,), ranks: Ranks = ALONE, chunk: int = CHUNK):
        self.args, self.script, self.ranks, self.chunk = args, torch.tensor(script), ranks, chunk
        self.task, self.dense, self.instructions = SimpleNamespace(horizon=HORIZON), args.reward == "dense", ("lift",)
        self.n = self.script.shape[1] // ranks.world
        self.steps, self.latest, self.success = HORIZON, None, torch.zeros(self.n, dtype=torch.bool)
        self.failure = torch.zeros_like(self.success)
        self.seeds, self.record = [], []

    def own(self, x: Tensor) -> Tensor:
        return x[self.ranks.rank * self.n : (self.ranks.rank + 1) * self.n]

    def observe(self) -> Observation:
        whole = observation(self.args, self.n * self.ranks.world, 100 * len(self.seeds) + self.steps, self.steps)
        self.latest = Observation(*(x if x is None else self.own(x) for x in whole))
        return self.latest

    def reset(self, seed: int) -> Observation:
        self.seeds.append(seed)
        self.steps, self.success = 0, torch.zeros_like(self.success)
        return self.observe()

    def step_chunk(self, actions: Tensor, last: bool = False, frames=None) -> Observation | None:
        assert actions.shape == (self.n, self.chunk, VALID) and self.steps < HORIZON, "an episode is over"
        ends = self.own(self.script[(len(self.seeds) - 1) % len(self.script)])
        before, self.success = self.success, self.success | (ends <= self.steps // self.chunk)
        self.reward = self.args.gamma**3 * (self.success & ~before)
        if self.dense:
            g = torch.Generator().manual_seed(7 * len(self.seeds) + self.steps)
            self.reward = self.own(torch.randn(self.n * self.ranks.world, generator=g))
        self.record.append((self.reward, before, self.success, self.latest))
        self.steps += actions.shape[1]
        assert last == (self.steps == HORIZON)
        return None if last else self.observe()


def collect(args: Args, policy: Gr00tActorCritic, script=(MIXED,), iteration: int = 0, ranks: Ranks = ALONE) -> Batch:
    env = FakeEnv(args, script, ranks, policy.chunk)
    return rollout(env, policy, args, iteration, ranks, StageTimer("cpu"))


def perturb_critic(policy: Gr00tActorCritic, scale: float = 0.05, seed: int = 6) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.critic.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g))


def optimizer_of(policy: Gr00tActorCritic, kind=torch.optim.SGD, lr: float = 0.0, critic_lr: float = 0.0):
    groups = [{"params": policy.trainable()}, {"params": list(policy.critic.parameters()), "lr": critic_lr}]
    return kind(groups, lr)


def critic_gradient(policy: Gr00tActorCritic) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in policy.critic.parameters()])


def weights(parameters) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in parameters])


def plan_of(args: Args, batch: Batch, iteration: int = 0, ranks: Ranks = ALONE) -> list:
    """The plan that `train` makes."""
    return plan_minibatches(batch, args, iteration, ranks, iteration >= args.critic_warmup)


def update_gradients(args: Args, policy: Gr00tActorCritic, batch: Batch) -> tuple[Tensor, Tensor]:
    """The gradients of policy and critic that `update` accumulates, without a step."""
    update(policy, optimizer_of(policy), batch, plan_of(args, batch), args, ALONE)
    return gradient(policy), critic_gradient(policy)


# ---------------------------------------------------------------- who gets a gradient


@pytest.mark.parametrize("critic_obs, columns", [("features", 96 + 5 + 1), ("privileged", PRIVILEGED + 1)])
def test_critic_and_policy_do_not_share_a_gradient(tiny_checkpoint, critic_obs, columns):
    args, policy = make(tiny_checkpoint, critic_obs=critic_obs, kl_coef=0.1)
    perturb_critic(policy)
    batch, rows = collect(args, policy), torch.arange(16)
    assert batch.flat["critic"].shape == (32, columns)
    perturb(policy)
    frozen = [*policy.net.backbone.parameters(), *policy.base_head.parameters()]
    policy.zero_grad()
    value_loss(policy, batch, rows, args).backward()
    assert all(p.grad is None for p in policy.net.parameters())
    assert all(p.grad.norm() > 0 for p in policy.critic.parameters())
    policy.zero_grad()
    ppo_loss(policy, batch, rows, args, True)[0].backward()
    assert all(p.grad is None for p in policy.critic.parameters())
    assert gradient(policy).norm() > 0
    update(policy, optimizer_of(policy), batch, plan_of(args, batch), args, ALONE)
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    # not even features that ask for it get a gradient from a value
    obs, out = observation(args, 8, 1), policy.act(observation(args, 8, 1))
    features = out.features.clone().requires_grad_()
    policy.value(obs._replace(features=features)).sum().backward()
    assert features.grad is None


def test_features_and_privileged_state_reach_the_critic(tiny_checkpoint):
    args, policy = make(tiny_checkpoint)
    obs = observation(args, 8, 1, steps=16)
    features = policy.act(obs).features
    found = policy.critic_input(obs)
    assert torch.allclose(found, torch.cat([features.mean(1), obs.state, torch.full((8, 1), 0.5)], 1), atol=1e-6)
    assert torch.equal(policy.critic_input(obs._replace(features=features)), found)
    args, policy = make(tiny_checkpoint, critic_obs="privileged")
    obs = observation(args, 8, 1)
    assert torch.equal(policy.critic_input(obs), obs.critic) and obs.critic.shape == (8, PRIVILEGED + 1)


# ---------------------------------------------------------------- the gradient of a minibatch, in float64


class Reference:
    """PPO's losses in float64. The networks' layers and the kept features are given; everything else is written anew."""

    def __init__(self, args: Args, policy: Gr00tActorCritic):
        self.args, self.policy = args, policy
        self.head, self.critic = copy.deepcopy(policy.net.action_head).double(), copy.deepcopy(policy.critic).double()

    def steps(self, head, flat: dict, row: int) -> list[tuple[Tensor, float, Tensor]]:
        """Mean, std and outcome of a row's stochastic steps, over executed actions: drift form of Flow-SDE, or Flow-CPS."""
        policy, args = self.policy, self.args
        state = policy.processor.normalize_state(flat["state"][row : row + 1])
        context = head.encode(flat["features"][row : row + 1], state, torch.zeros(1, dtype=torch.long))
        found, K = [], args.denoise_steps
        for j, k in enumerate(flat["k"][row].tolist()):
            x, t = flat["x"][row, j].double()[None], k / K
            v = head.velocity(x, torch.tensor([k * 1000 // K]), torch.zeros(1, dtype=torch.long), context)
            noise, action = x - t * v, x + (1 - t) * v
            if args.noise.startswith("flow-cps"):
                left, angle = 1 - t - 1 / K, math.pi * args.noise_level / 2
                mean, std = left * math.cos(angle) * noise + (t + 1 / K) * action, left * math.sin(angle)
            else:
                sigma = args.noise_level * math.sqrt((1 - t) / max(t, 1 / K))
                score = -noise / (1 - t)  # of the marginal at t
                mean, std = x + (v + sigma**2 / 2 * score) / K, sigma / math.sqrt(K)
            found.append((mean[0, :CHUNK, :VALID], std, flat["y"][row, j].double()[:CHUNK, :VALID]))
        return found

    def log_prob(self, head, flat: dict, row: int) -> Tensor:
        return sum(
            (-((y - mean) ** 2) / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))).sum()
            for mean, std, y in self.steps(head, flat, row)
        )

    def kl(self, head, base, flat: dict, row: int) -> Tensor:
        pairs = zip(self.steps(head, flat, row), self.steps(base, flat, row))
        return sum(((mean - other.detach()) ** 2).sum() / (2 * std**2) for (mean, std, _), (other, _, _) in pairs)

    def value(self, features: Tensor, critic: Tensor) -> Tensor:
        x = torch.cat([features.double().mean(-2), critic.double()], -1)
        count, mean, square = self.critic.moments
        x = ((x - mean) / ((square / count).sqrt() + 0.01)).clamp(-10, 10)
        return self.critic.value(self.critic.layers(x))[..., 0]


@pytest.mark.parametrize(
    "noise, value_clip, normalize",
    [("flow-sde", None, True), ("flow-cps", 0.03, True), ("flow-sde-all", 0.03, False)],
)
def test_a_minibatch_has_the_gradient_of_the_definition(tiny_checkpoint, noise, value_clip, normalize):
    """Two chunks in two environments: one succeeds in the second, the other is cut off there and bootstraps.

    The reference evaluates the networks in float64; their float32 inputs (chain, features, state) are taken as given.
    """
    args, policy = make(
        tiny_checkpoint, num_envs=2, rollout_chunks=2, noise=noise, clip=0.1, value_clip=value_clip, kl_coef=0.3,
        normalize_advantages=normalize, gamma=0.97, gae_lambda=0.8,
    )  # fmt: skip
    perturb(policy, 0.01)  # the rollout's policy is not the base
    perturb_critic(policy)
    g = torch.Generator().manual_seed(2)
    policy.critic.moments.copy_(torch.rand(policy.critic.moments.shape, generator=g) + torch.tensor([[50.0], [0], [20]]))
    old, base = Reference(args, policy), copy.deepcopy(policy.base_head).double()
    env = FakeEnv(args, [(1, 99)])
    batch = rollout(env, policy, args, 0, ALONE, StageTimer("cpu"))
    perturb(policy, 0.004)
    perturb_critic(policy, 0.02, seed=11)
    new, flat = Reference(args, policy), {**batch.flat}
    found = update_gradients(args, policy, batch)

    # GAE: rows are (0, env 0), (0, env 1), (1, env 0), (1, env 1)
    discount, lam = 0.97**CHUNK, 0.8
    with torch.no_grad():
        v = [old.value(flat["features"][row], env.record[row // 2][3].critic[row % 2]).item() for row in range(4)]
        last = old.value(policy.features(env.latest), env.latest.critic)[1].item()
    reward = 0.97**3  # in the fourth step of its chunk
    delta = [discount * v[2] - v[0], discount * v[3] - v[1], reward - v[2], discount * last - v[3]]
    advantage = np.array([delta[0] + discount * lam * delta[2], delta[1] + discount * lam * delta[3], *delta[2:]])
    target = advantage + np.array(v)
    if normalize:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-3)

    loss, clipped = 0.0, []
    for row in range(4):
        ratio = (new.log_prob(new.head, flat, row) - old.log_prob(old.head, flat, row).detach()).exp()
        pair = ratio * advantage[row], ratio.clamp(0.9, 1.1) * advantage[row]
        clipped.append(bool(pair[1] < pair[0]))
        loss = loss - torch.minimum(*pair) + 0.3 * new.kl(new.head, base, flat, row)
        assert abs(ratio - 1) > 1e-3
    assert 0 < sum(clipped) < 4
    parameters = [p for p in new.head.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss / 4, parameters, allow_unused=True)
    expected = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads)])
    assert close(found[0].double(), expected, 1e-4)

    loss, changed = 0.0, []
    for row in range(4):
        value = new.value(flat["features"][row], env.record[row // 2][3].critic[row % 2])
        error = (value - target[row]) ** 2
        if value_clip:
            near = v[row] + min(max(value.item() - v[row], -value_clip), value_clip)
            changed.append((near - target[row]) ** 2 > error.item() and near != value.item())
            error = error * (not changed[-1])  # at the bound the clipped error does not depend on the value
        loss = loss + error / 2
    assert not value_clip or 0 < sum(changed) < 4
    grads = torch.autograd.grad(loss / 4, list(new.critic.parameters()))
    assert close(found[1].double(), torch.cat([g.flatten() for g in grads]), 1e-4)


def test_policy_and_critic_are_clipped_apart(tiny_checkpoint):
    args, policy = make(tiny_checkpoint)
    perturb_critic(policy)
    batch = collect(args, policy)
    plan = plan_of(args, batch)
    _, extremes = update(policy, optimizer_of(policy), batch, plan, args, ALONE)
    whole = gradient(policy), critic_gradient(policy)
    assert math.isclose(extremes["grad_norm"], whole[0].norm(), rel_tol=1e-4)
    assert math.isclose(extremes["critic_grad_norm"], whole[1].norm(), rel_tol=1e-4)
    args.max_grad_norm = float(min(x.norm() for x in whole)) / 2
    update(policy, optimizer_of(policy), batch, plan, args, ALONE)
    for clipped, g in zip((gradient(policy), critic_gradient(policy)), whole):
        assert close(clipped, g * args.max_grad_norm / g.norm(), 1e-4)


def test_log_ratio_is_clamped(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, log_ratio_clamp=2.0)
    batch, row = collect(args, policy), torch.tensor([3])
    batch.flat["advantage"][row] = -1.0  # not bounded by the clip
    batch.flat["log_prob"][row] -= 1000.0
    loss, _, error = ppo_loss(policy, batch, row, args, False)
    assert math.isclose(loss.item(), math.exp(2.0), rel_tol=1e-5) and math.isclose(error, math.exp(2.0) - 1, rel_tol=1e-5)
    loss.backward()
    assert gradient(policy).abs().max() == 0


def test_the_critic_sees_no_padding(tiny_checkpoint, monkeypatch):
    """Instructions of several lengths: the mean is over an observation's own features."""
    short = dataclasses.replace(TASKS[TASK], instructions=("lift the red cube", "lift cube"))
    monkeypatch.setitem(TASKS, TASK, short)
    args, policy = make(tiny_checkpoint)
    obs = observation(args, 4, 0)._replace(prompt=torch.tensor([0, 1, 1, 0]))
    features, lengths = policy.features(obs), policy.lengths[obs.prompt].tolist()
    assert len(set(lengths)) == 2 and features.shape[1] == max(lengths)
    expected = torch.stack([f[:n].mean(0) for f, n in zip(features, lengths)])
    found = policy.critic_input(obs)
    assert torch.allclose(found[:, : expected.shape[1]], expected, atol=1e-6)
    assert torch.equal(found[:, expected.shape[1] :], obs.critic)


# ---------------------------------------------------------------- rewards, advantages, episodes


@pytest.mark.parametrize("dense", [False, True])
def test_reward_of_a_chunk(dense):
    """Discounted within the chunk; sparse: 1 at the first success, which stays one when the term falls back.

    A failure ends an attempt: what comes after it, success included, earns nothing. After success there is no failure.
    """
    success = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0]]).bool()  # (steps, environments)
    failure = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).bool()
    given, at = torch.arange(1.0, 17.0).view(4, 4), iter(range(4))
    env = object.__new__(ChunkEnv)
    env.num_envs, env.device, env.gamma, env.dense, env.steps = 4, "cpu", 0.9, dense, 8
    env.success, env.failure = torch.tensor([False, False, True, False]), torch.tensor([False, False, False, True])
    env.env = SimpleNamespace(step=lambda action: (None, given[next(at)], None, None, {}))
    done = []
    env.terminations = SimpleNamespace(
        compute=lambda: done.append(0) or success[len(done) - 1] | failure[len(done) - 1],
        get_term=lambda name: {"success": success}[name][len(done) - 1],
    )
    before = env.success
    assert env.step_chunk(torch.zeros(4, 4, 4), last=True) is None
    earned = torch.ones(4, 4)
    earned[2:, 1] = earned[:, 3] = 0  # after a failure in the second step, and before the chunk
    expected = sum(0.9**i * given[i] * earned[i] for i in range(4)) if dense else torch.tensor([0.9, 0.0, 0.0, 0.0])
    assert torch.allclose(env.reward, expected)
    assert env.success.tolist() == [True, False, True, False] and env.steps == 12
    assert env.failure.tolist() == [False, True, False, True]
    assert env.ended.tolist() == ([False, True, False, True] if dense else [True] * 4)
    assert before.tolist() == [False, False, True, False]  # a rollout keeps it


def segments_by_hand(rewards, values, ends, after, discount: float, lam: float) -> np.ndarray:
    """Advantages (T,) of one environment, as the sum over its attempt: A_t = sum_l (discount lam)^l delta_{t+l}."""
    T = len(rewards)
    following = [0.0 if ends[t] else values[t + 1] if t + 1 < T else after for t in range(T)]
    delta = [rewards[t] + discount * following[t] - values[t] for t in range(T)]
    found = np.zeros(T)
    for t in range(T):
        stop = next((u for u in range(t, T) if ends[u]), T - 1)
        found[t] = sum((discount * lam) ** (u - t) * delta[u] for u in range(t, stop + 1))
    return found


@pytest.mark.parametrize("reward", ["sparse", "dense"])
@pytest.mark.parametrize("chunks, resets", [(None, [1, 1, 1]), (3, [1, 1, 1]), (2, [1, 0, 1]), (8, [2, 2, 2])])
def test_advantages_and_returns_of_rollouts(tiny_checkpoint, chunks, resets, reward):
    """Three rollouts: whole episodes, parts of one that go on where the last rollout stopped, two episodes in one."""
    args, policy = make(tiny_checkpoint, num_envs=4, rollout_chunks=chunks, reward=reward, gamma=0.98, gae_lambda=0.9)
    perturb_critic(policy)
    env, discount = FakeEnv(args, [(0, 99, 2, 3), (1, 0, 99, 99)]), 0.98**CHUNK
    T, played = policy.rollout_chunks, 0
    assert T == (chunks or CHUNKS)
    for iteration, number in enumerate(resets):
        first, started = len(env.record), len(env.seeds)
        batch = rollout(env, policy, args, iteration, ALONE, StageTimer("cpu"))
        starts = [t for t in range(T) if (played + t) % CHUNKS == 0]
        assert len(starts) == number
        assert env.seeds[started:] == [episode_seed(args.seed, iteration * T + t, ALONE) for t in starts]
        rows = env.record[first:]
        assert len(rows) == T
        before, after = (torch.stack([row[i] for row in rows]) for i in (1, 2))  # (T, N)
        over = torch.tensor([(played + t + 1) % CHUNKS == 0 for t in range(T)])[:, None].expand(T, 4)
        played += T
        ends, keep = (over, torch.ones_like(before)) if reward == "dense" else (over | after, ~before)
        with torch.no_grad():
            values = torch.stack([policy.value(obs) for *_, obs in rows])
            last = policy.value(env.latest)
        flat = {name: batch.flat[name].view(T, 4) for name in ("keep", "old_value", "advantage", "target")}
        assert torch.equal(flat["keep"], keep)
        assert torch.allclose(flat["old_value"], values, atol=1e-5)
        for i in range(4):
            given = ([float(row[0][i]) for row in rows], values[:, i].tolist(), ends[:, i].tolist(), float(last[i]))
            expected = segments_by_hand(*given, discount, 0.9)
            kept = keep[:, i].numpy()
            assert np.allclose(flat["advantage"][:, i].numpy()[kept], expected[kept], atol=1e-5)
            assert np.allclose(flat["target"][:, i].numpy()[kept], (expected + values[:, i].numpy())[kept], atol=1e-5)
        assert torch.equal(batch.flat["state"], torch.cat([row[3].state for row in rows]))
        assert batch.figures["samples"] == keep.sum()
        given = torch.stack([row[0] for row in rows])
        assert math.isclose(batch.figures["reward"], (given * keep).sum(), rel_tol=1e-5, abs_tol=1e-6)
        assert math.isclose(batch.figures["value"], (values * keep).sum(), rel_tol=1e-4)
        finished = [after[t] for t in range(T) if over[t, 0]]
        assert len(batch.successes) == len(finished) and all(map(torch.equal, batch.successes, finished))


def test_a_success_is_worth_what_is_left_of_it(tiny_checkpoint):
    """With a critic that knows nothing and lambda 1: gamma per environment step, so gamma**chunk per chunk."""
    args, policy = make(tiny_checkpoint, gae_lambda=1.0, gamma=0.9)
    batch = collect(args, policy)
    target = batch.flat["target"].view(CHUNKS, 8)
    assert torch.allclose(target[:, 7], torch.tensor([0.9 ** (3 + 8 * k) for k in (3, 2, 1, 0)]))
    assert torch.allclose(target[:3, 2], torch.tensor([0.9 ** (3 + 8 * k) for k in (2, 1, 0)]))
    assert target[:, 1].abs().max() == 0


# ---------------------------------------------------------------- samples and minibatches


def test_masked_samples_count_nowhere(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, kl_coef=0.1)
    perturb_critic(policy)
    batch = collect(args, policy)
    keep, raw = batch.flat["keep"], batch.flat["advantage"].clone()
    assert keep.view(CHUNKS, 8).sum(0).tolist() == [1, 4, 3, 4, 2, 4, 4, 4]
    expected = update_gradients(args, policy, batch)
    own = raw[keep].double()
    normalised = batch.flat["advantage"][keep].double()
    assert abs(normalised.mean()) < 1e-6
    spread = own.std(correction=0)
    assert math.isclose(normalised.std(correction=0), spread / (spread + 1e-3), rel_tol=1e-5) and spread > 0.05
    assert torch.allclose(normalised, (own - own.mean()) / (spread + 1e-3), atol=1e-5)

    for name in ("target", "old_value", "critic", "log_prob", "features"):
        batch.flat[name] = torch.where(keep.view(-1, *[1] * (batch.flat[name].ndim - 1)), batch.flat[name], 1e6)
    batch.flat["advantage"] = torch.where(keep, raw, 1e6)
    found = update_gradients(args, policy, batch)
    assert torch.equal(batch.flat["advantage"][keep].double(), normalised)
    assert all(map(torch.equal, found, expected))

    args.normalize_advantages, batch.flat["advantage"] = False, raw.clone()
    plan_of(args, batch)
    assert torch.equal(batch.flat["advantage"], raw)


def test_every_kept_sample_once_per_epoch(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, minibatches=4, epochs=2, critic_epochs=3, critic_warmup=2)
    batch = collect(args, policy)
    kept = torch.nonzero(batch.flat["keep"])[:, 0]
    plans = {iteration: plan_of(args, batch, iteration) for iteration in (0, 1, 2, 3)}
    for iteration, plan in plans.items():
        assert [len(rows) for rows, *_ in plan] == [int(size) for _, size, _ in plan] == [7, 7, 6, 6] * 3
        assert [moving for *_, moving in plan] == ([False] * 12 if iteration < 2 else [True] * 8 + [False] * 4)
        for e in range(3):
            assert torch.equal(torch.cat([rows for rows, *_ in plan[4 * e : 4 * e + 4]]).sort().values, kept)
        assert not torch.equal(plan[0][0], plan[4][0])
    assert not torch.equal(plans[2][0][0], plans[3][0][0])
    again = plan_of(args, batch, 2)
    assert all(torch.equal(a, b) for (a, *_), (b, *_) in zip(plans[2], again))
    args.epochs, args.critic_epochs = 3, 1  # the critic learns in the policy's epochs, too
    plan = plan_of(args, batch, 2)
    assert [moving for *_, moving in plan] == [True] * 12


def test_further_epochs_are_the_critics_alone(tiny_checkpoint):
    found = {}
    for name in ("all", "of the policy"):
        args, policy = make(tiny_checkpoint, minibatches=2, epochs=1, critic_epochs=3)
        batch = collect(args, policy)
        plan = plan_of(args, batch)
        optimizer = optimizer_of(policy, torch.optim.AdamW, 1e-3, 1e-3)
        sums, extremes = update(policy, optimizer, batch, plan if name == "all" else plan[:2], args, ALONE)
        assert extremes["first_ratio_error"] < 1e-5  # of the first minibatch alone
        found[name] = weights(policy.trainable()), weights(policy.critic.parameters()), sums["policy_samples"]
    assert torch.equal(found["all"][0], found["of the policy"][0]) and found["all"][2] == found["of the policy"][2] == 26
    assert not torch.equal(found["all"][1], found["of the policy"][1])


def test_the_critic_learns_alone_at_first(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, critic_warmup=2, critic_epochs=2, kl_coef=0.1)
    optimizer = optimizer_of(policy, torch.optim.AdamW, 1e-3, 1e-3)
    batch = collect(args, policy)
    everything = {name: p.detach().clone() for name, p in policy.named_parameters()}
    for iteration in range(3):
        critic = weights(policy.critic.parameters())
        plan = plan_of(args, batch, iteration)
        metrics = describe_iteration(batch, *update(policy, optimizer, batch, plan, args, ALONE), args, ALONE)
        assert not torch.equal(weights(policy.critic.parameters()), critic)
        changed = {name for name, p in policy.named_parameters() if not torch.equal(p, everything[name])}
        heads = {name.split(".")[1] for name in changed if not name.startswith("critic.")}
        assert heads == (set() if iteration < 2 else {"action_head"})
        assert ("update/loss" in metrics) == ("update/grad_norm" in metrics) == (iteration == 2)
        assert metrics["update/value_loss"] > 0 and metrics["update/critic_grad_norm"] > 0


def test_learning_rate_starts_after_the_warm_up_of_the_critic(tiny_checkpoint):
    args, _ = make(tiny_checkpoint, learning_rate=1e-3, iterations=100, lr_hold=0.5, lr_warmup=9, critic_warmup=5)
    rates = [learning_rate(args, i) for i in range(101)]
    assert all(rate == 0 for rate in rates[:5])
    assert all(math.isclose(rates[5 + i], (i + 1) * 1e-4) for i in range(10))
    assert rates[14:51] == [1e-3] * 37 and math.isclose(rates[75], 0.55e-3) and math.isclose(rates[100], 1e-4)


# ---------------------------------------------------------------- the value network


@pytest.mark.parametrize("critic_obs", ["features", "privileged"])
def test_values_are_zero_at_first(tiny_checkpoint, critic_obs):
    args, policy = make(tiny_checkpoint, critic_obs=critic_obs)
    assert policy.value(observation(args, 8, 1)).abs().max() == 0
    for seed in (1, 2):  # --seed alone decides the weights, and nothing drawn later changes
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        again = make(tiny_checkpoint, critic_obs=critic_obs)[1]
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(weights(again.critic.parameters()), weights(policy.critic.parameters()))
    other = make(tiny_checkpoint, critic_obs=critic_obs, seed=2)[1]
    assert not torch.equal(weights(other.critic.parameters()), weights(policy.critic.parameters()))


def test_size_of_the_value_network():
    with torch.device("meta"):
        critic = Critic(2048 + 64 + 1, 2048)
    assert 9e6 < sum(p.numel() for p in critic.parameters()) < 12e6


def test_privileged_critic_needs_privileged_state(tiny_checkpoint, monkeypatch):
    monkeypatch.setitem(TASKS, TASK, dataclasses.replace(TASKS[TASK], privileged=0))
    make(tiny_checkpoint)
    with pytest.raises(UsageError, match="--critic-obs privileged"):
        make(tiny_checkpoint, critic_obs="privileged")


@pytest.fixture
def logger(tmp_path):
    logger = RunLogger(tmp_path / "run", {}, script=ppo.__file__, total_iterations=1, track=False)
    yield logger
    logger.close()


def training(args: Args, policy: Gr00tActorCritic, logger: RunLogger, monkeypatch, script=(MIXED,)) -> list[dict]:
    """What `train` logs, without a simulator."""
    rows = []
    monkeypatch.setattr(logger, "log", lambda iteration, metrics: rows.append(metrics))
    train(args, FakeEnv(args, script), policy, logger, ALONE, None)
    return rows


SHORT = {"iterations": 3, "critic_warmup": 1, "eval_episodes": 0, "capture_video": False, "save_every": 99}


def test_inputs_are_standardised_by_what_came_before(tiny_checkpoint, logger, monkeypatch):
    """The moments are those of earlier iterations' inputs, in rollout and update alike: the value stays what it was."""
    args, policy = make(tiny_checkpoint, **SHORT)
    seen, moments = [], []

    def rollout_and_look(*given):
        moments.append(policy.critic.moments.clone())
        seen.append(rollout(*given))
        return seen[-1]

    def update_and_look(policy, optimizer, batch, *given):
        moments.append(policy.critic.moments.clone())
        with torch.no_grad():
            assert torch.allclose(policy.critic(batch.flat["critic"]), batch.flat["old_value"], atol=1e-6)
        return update(policy, optimizer, batch, *given)

    monkeypatch.setattr(ppo, "rollout", rollout_and_look)
    monkeypatch.setattr(ppo, "update", update_and_look)
    training(args, policy, logger, monkeypatch)
    moments.append(policy.critic.moments)
    assert moments[0].abs().max() == moments[1].abs().max() == 0
    for i in (1, 2, 3):
        x = np.concatenate([batch.flat["critic"].double().numpy() for batch in seen[:i]])
        expected = np.stack([np.full(102, float(len(x))), x.mean(0), ((x - x.mean(0)) ** 2).sum(0)])
        for found in moments[2 * i : 2 * i + 2]:
            assert np.allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    x = torch.from_numpy(x).float()
    expected = (x - x.mean(0)) / (x.std(0, correction=0) + 0.01)
    given = []
    policy.critic.layers.register_forward_hook(lambda module, inputs, out: given.append(inputs[0]))
    policy.critic(x)
    assert torch.allclose(given[0], expected, atol=1e-3)


def test_features_are_held_once(tiny_checkpoint, logger, monkeypatch):
    """One copy of a rollout's features at the end of each rollout; those of the one before are gone."""
    args, policy = make(tiny_checkpoint, **SHORT | {"critic_warmup": 0})
    seen, n = [], len(MIXED)
    per_row = policy.features(observation(args, 1, 0)).nbytes

    def held() -> float:
        """Rows of features that live, in whole rollouts; a chunk's own may be among them."""
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) is Tensor and x.shape[-2:] == wide and not x.requires_grad]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        return sum(storages.values()) / (per_row * CHUNKS * n)

    wide = policy.features(observation(args, 1, 0)).shape[-2:]
    finish = Batch.finish
    monkeypatch.setattr(Batch, "finish", lambda *args: (finish(*args), seen.append(held()))[0])
    training(args, policy, logger, monkeypatch)
    assert len(seen) == 3 and all(1 <= x <= 1 + 2 / CHUNKS for x in seen), seen


def test_learning_rates_of_a_run(tiny_checkpoint, logger, monkeypatch):
    args, policy = make(tiny_checkpoint, **SHORT, learning_rate=1e-4, critic_lr=3e-3, lr_warmup=1)
    rates = []

    def update_and_look(policy, optimizer, *given):
        groups = optimizer.param_groups
        rates.append([group["lr"] for group in groups])
        assert list(map(id, groups[0]["params"])) == list(map(id, policy.trainable()))
        assert list(map(id, groups[1]["params"])) == list(map(id, policy.critic.parameters()))
        return update(policy, optimizer, *given)

    monkeypatch.setattr(ppo, "update", update_and_look)
    rows = training(args, policy, logger, monkeypatch)
    assert rates == [[learning_rate(args, i), 3e-3] for i in range(3)] and rates[1][0] == 0.5e-4
    assert [row["update/learning_rate"] for row in rows] == [rate for rate, _ in rates]


def test_kl_coefficient_follows_its_target(tiny_checkpoint, logger, monkeypatch):
    args, policy = make(tiny_checkpoint, **SHORT | {"iterations": 6}, kl_coef=0.1, kl_target=2e-3, learning_rate=2e-3)
    rows = training(args, policy, logger, monkeypatch)
    expected, ways = 0.1, set()
    for i, row in enumerate(rows):
        assert math.isclose(row["update/kl_coef"], expected)
        if i:
            share = row["update/kl_base"] / 2e-3
            ways.add(1 if share > 2 else -1 if share < 0.5 else 0)
            expected *= 1.5 if share > 2 else 1 / 1.5 if share < 0.5 else 1
        assert ("update/loss" in row) == (i >= 1)  # the first iteration is the critic's
    assert {1, -1} <= ways


def test_an_iteration_without_samples_passes(tiny_checkpoint, logger, monkeypatch):
    """Every environment succeeds early: the second half of an episode has nothing to learn from."""
    overrides = SHORT | {"rollout_chunks": 2, "iterations": 4, "critic_warmup": 0}
    args, policy = make(tiny_checkpoint, **overrides, kl_coef=0.1, kl_target=0.01)
    rows = training(args, policy, logger, monkeypatch, [(0, 1, 0, 1, 0, 1, 1, 1)])
    assert [row["rollout/samples"] for row in rows] == [13, 0, 13, 0]
    assert all(math.isfinite(value) for row in rows for value in row.values())


# ---------------------------------------------------------------- ratio and metrics


@pytest.mark.parametrize("noise", NOISES)
def test_ratio_is_one_before_the_first_update(tiny_checkpoint, noise):
    args, policy = make(tiny_checkpoint, noise=noise, chunk=4, kl_coef=0.01, micro_batch_size=7)
    batch = collect(args, policy)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for rows in order.split(11):
        assert ppo_loss(policy, batch, rows, args, False)[2] < 1e-5
    plan = plan_of(args, batch)
    sums, extremes = update(policy, optimizer_of(policy), batch, plan, args, ALONE)
    assert extremes["first_ratio_error"] < 1e-5
    metrics = describe_iteration(batch, sums, extremes, args, ALONE)
    K = policy.stochastic_steps
    assert K == 4 - noise.startswith("flow-cps")
    for k in range(K):
        assert metrics[f"update/clip_frac_k{k}"] == metrics[f"update/kl_base_k{k}"] == 0
        assert abs(metrics[f"update/ratio_k{k}"] - 1) < 1e-5 and abs(metrics[f"update/approx_kl_k{k}"]) < 1e-5
    perturb(policy)
    assert ppo_loss(policy, batch, order, args, False)[2] > 1e-3  # and the figure says so when it is not


@pytest.mark.parametrize("noise", ["flow-sde", "flow-cps-all"])
def test_metrics_are_means_over_the_samples(tiny_checkpoint, noise):
    args, policy = make(tiny_checkpoint, noise=noise, kl_coef=0.1, clip=0.3, micro_batch_size=5, critic_epochs=3, epochs=2)
    perturb_critic(policy)
    batch = collect(args, policy)
    perturb(policy, 0.005)
    plan = plan_of(args, batch)
    metrics = describe_iteration(batch, *update(policy, optimizer_of(policy), batch, plan, args, ALONE), args, ALONE)
    keep, flat = batch.flat["keep"], batch.flat
    rows = torch.nonzero(keep)[:, 0]
    obs, chain = batch.samples(rows)
    with torch.no_grad():
        new, mean, std = policy.evaluate(obs, chain)
        kl = ((mean - policy.base_mean(obs, chain)) ** 2 / (2 * std**2)).sum((2, 3))
        values = policy.critic(flat["critic"][rows])
    old, k = flat["log_prob"][rows], flat["k"][rows]
    log_ratios = {"": (new - old).sum(1)} | {f"_k{step}": (new - old)[k == step] for step in range(4)}
    for name, log_ratio in log_ratios.items():
        if not len(log_ratio):  # Flow-CPS has no noise in the last step
            assert metrics[f"update/ratio{name}"] == metrics[f"update/kl_base{name}"] == 0
            continue
        ratio = log_ratio.exp()
        assert math.isclose(metrics[f"update/clip_frac{name}"], ((ratio - 1).abs() > 0.3).float().mean(), rel_tol=1e-4)
        assert math.isclose(metrics[f"update/approx_kl{name}"], (ratio - 1 - log_ratio).mean(), rel_tol=1e-3)
        if name:
            assert math.isclose(metrics[f"update/ratio{name}"], ratio.mean(), rel_tol=1e-4)
            assert math.isclose(metrics[f"update/kl_base{name}"], kl[k == int(name[-1])].mean(), rel_tol=1e-4)
    assert 0 < metrics["update/clip_frac"] < 1
    ratio, advantage = (new - old).sum(1).exp(), flat["advantage"][rows]
    loss = 0.1 * kl.sum(1) - torch.minimum(ratio * advantage, ratio.clamp(0.7, 1.3) * advantage)
    assert math.isclose(metrics["update/loss"], loss.mean(), rel_tol=1e-4)
    assert math.isclose(metrics["update/kl_base"], kl.sum(1).mean(), rel_tol=1e-4)
    assert math.isclose(metrics["update/value_loss"], 0.5 * (values - flat["target"][rows]).square().mean(), rel_tol=1e-4)
    target, value = (flat[name][rows].double().numpy() for name in ("target", "old_value"))
    assert math.isclose(metrics["update/explained_variance"], 1 - np.var(target - value) / np.var(target), rel_tol=1e-3)
    assert metrics["rollout/samples"] == 26 and metrics["rollout/success"] == 4 / 8
    assert math.isclose(metrics["rollout/reward"], 4 * args.gamma**3 / 26, rel_tol=1e-5)
    assert math.isclose(metrics["rollout/value"], value.mean(), rel_tol=1e-4)
    assert math.isclose(metrics["rollout/log_prob"], flat["log_prob"].sum(1).mean(), rel_tol=1e-4)


@pytest.mark.parametrize("chunks, expected", [(3, [None, 0.5, 0.75]), (8, [0.625])])
def test_success_is_told_of_episodes_that_ended(tiny_checkpoint, chunks, expected):
    args, policy = make(tiny_checkpoint, rollout_chunks=chunks)
    env = FakeEnv(args, [MIXED, (0, 0, 0, 0, 0, 0, 99, 99)])
    successes = []
    for iteration in range(len(expected)):
        batch = rollout(env, policy, args, iteration, ALONE, StageTimer("cpu"))
        update_figures = update(policy, optimizer_of(policy), batch, [], args, ALONE)
        successes.append(describe_iteration(batch, *update_figures, args, ALONE).get("rollout/success"))
    assert successes == expected


# ---------------------------------------------------------------- memory options, for this script and its sibling


class Counter:
    """How often modules ran."""

    def __init__(self, *modules):
        self.calls = 0
        for module in modules:
            module.register_forward_pre_hook(self)  # checkpointing leaves a module as soon as it has what it needs

    def __call__(self, module, inputs) -> None:
        self.calls += 1


def gradient_with(script, checkpoint, **overrides) -> dict:
    """A rollout and the first update's gradient, by one of the two scripts, with a policy that moved in between."""
    tools = ppo_tools if script == "ppo" else grpo_tools
    args, policy = tools["make"](checkpoint, kl_coef=0.01, chunk=8, epochs=1, **overrides)
    batch, start = tools["collect"](args, policy), tools["gradient"]
    backbone, inside = Counter(policy.net.backbone), set()
    policy.net.backbone.mlp1.register_forward_hook(lambda module, inputs, out: inside.add(out.dtype))
    first = start(args, policy, batch)[1]
    perturb(policy)
    blocks = Counter(*(block.ff for block in policy.blocks()))
    found = start(args, policy, batch)[0]
    counted = {"backbone": backbone.calls, "blocks": blocks.calls, "inside": inside}
    return {"batch": batch, "gradient": found, "error": float(first)} | counted


def of_ppo(args, policy, batch) -> tuple[Tensor, Tensor]:
    raw = batch.flat["advantage"].clone()
    plan = plan_of(args, batch)
    _, extremes = update(policy, optimizer_of(policy), batch, plan, args, ALONE)
    batch.flat["advantage"] = raw
    return torch.cat([gradient(policy), critic_gradient(policy)]), extremes["first_ratio_error"]


def of_grpo(args, policy, batch) -> tuple[Tensor, Tensor]:
    plan = grpo.plan_minibatches(batch, args, 0, ALONE)
    _, extremes = grpo.update(policy, torch.optim.SGD(policy.trainable(), 0.0), batch, plan, args, ALONE)
    return gradient(policy), extremes["first_ratio_error"]


ppo_tools = {"make": make, "collect": collect, "gradient": of_ppo}
grpo_tools = {"make": grpo.make, "collect": grpo.collect, "gradient": of_grpo}


@pytest.mark.parametrize("script", ["ppo", "grpo"])
def test_memory_options_do_not_change_the_gradient(tiny_checkpoint, script):
    plain = gradient_with(script, tiny_checkpoint, noise="flow-sde-all")
    assert plain["backbone"] == 0 and plain["batch"].flat["features"].dtype == torch.float32
    for option, value in (("feature_cache", "off"), ("micro_batch_size", 7), ("activation_checkpointing", True)):
        found = gradient_with(script, tiny_checkpoint, noise="flow-sde-all", **{option: value})
        assert close(found["gradient"], plain["gradient"], 1e-5), option
        assert found["error"] < 1e-5
        assert ("features" in found["batch"].flat) == (option != "feature_cache") == (found["backbone"] == 0)
        if option == "activation_checkpointing":  # run again in the backward pass; the base model's are not
            assert found["blocks"] == 2 * plain["blocks"]


@pytest.mark.parametrize("script", ["ppo", "grpo"])
def test_a_backbone_in_bfloat16_changes_little(tiny_checkpoint, script):
    plain = gradient_with(script, tiny_checkpoint)
    for cache in ("gpu", "off"):
        found = gradient_with(script, tiny_checkpoint, backbone_bf16=True, feature_cache=cache)
        if cache == "gpu":
            assert found["batch"].flat["features"].dtype == torch.bfloat16
        assert found["inside"] == (set() if cache == "gpu" else {torch.bfloat16})  # not merely rounded afterwards
        assert torch.cosine_similarity(found["gradient"], plain["gradient"], 0) > 0.99
        assert not close(found["gradient"], plain["gradient"], 1e-5)
        assert found["error"] < 1e-5, cache


def test_the_critic_reads_bfloat16_features_in_float32(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, backbone_bf16=True)
    batch = collect(args, policy)
    assert batch.flat["critic"].dtype == torch.float32
    mean = batch.flat["features"].double().mean(1)
    assert torch.allclose(batch.flat["critic"][:, :96].double(), mean, atol=1e-6)
    assert {p.dtype for p in policy.trainable()} == {p.dtype for p in policy.critic.parameters()} == {torch.float32}


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("critic_obs", ["features", "privileged"])
def test_saved_and_loaded_bit_for_bit(tiny_checkpoint, tmp_path, critic_obs):
    args, policy = make(tiny_checkpoint, critic_obs=critic_obs)
    obs = observation(args, 8, 3)
    perturb(policy)
    perturb_critic(policy)
    batch = collect(args, policy)
    policy.critic.moments.copy_(ppo.merge_moments(policy.critic.moments, batch.flat["critic"], ALONE))
    folder = tmp_path / "saved"
    policy.save(folder)
    fresh = make(tiny_checkpoint, critic_obs=critic_obs)[1]

    def figures(policy) -> tuple[Tensor, ...]:
        out = policy.act(obs, Noise("cpu", ALONE, 1), explore=True)
        return policy.act(obs, Noise("cpu", ALONE, 1)).action, out.action, out.chain.log_prob, policy.value(obs)

    expected = figures(policy)
    assert not any(map(torch.equal, figures(fresh), expected))
    fresh.load(folder)
    assert all(map(torch.equal, figures(fresh), expected))
    for name, value in policy.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name  # the base model's among them


# ---------------------------------------------------------------- two processes


SPLIT = {"kl_coef": 0.01, "max_grad_norm": 1.0, "rollout_chunks": 3, "critic_epochs": 2}
SCRIPTS = {"halves": [MIXED], "one_empty": [(0, 1, 0, 2, 99, 1, 2, 99)]}


def first_update(checkpoint: str, name: str, ranks: Ranks) -> dict:
    """A rollout over this rank's environments, and one step on it of the script's AdamW, and of SGD at rate 1.

    With "one_empty" every environment of the first half has succeeded when the second rollout begins.
    """
    args, policy = make(checkpoint, **SPLIT)
    perturb_critic(policy)
    env, timer, found = FakeEnv(args, SCRIPTS[name], ranks), StageTimer("cpu"), {}
    batch = rollout(env, policy, args, 0, ranks, timer)
    if name == "one_empty":
        args.rollout_chunks = policy.rollout_chunks = 1
        batch = rollout(env, policy, args, 1, ranks, timer)
    raw = batch.flat["advantage"].clone()
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    for kind, critic_lr in ((torch.optim.AdamW, args.critic_lr), (torch.optim.SGD, 1.0)):
        batch.flat["advantage"] = raw.clone()
        lr = 1.0 if kind is torch.optim.SGD else args.learning_rate
        optimizer = optimizer_of(policy, kind, lr, critic_lr)
        plan = plan_of(args, batch, 0, ranks)[:1]
        sums, extremes = update(policy, optimizer, batch, plan, args, ranks)
        found[kind.__name__] = weights([*policy.trainable(), *policy.critic.parameters()])
        found["gradient"] = torch.cat([gradient(policy), critic_gradient(policy)])
        policy.load_state_dict(before)
    found["moments"] = ppo.merge_moments(policy.critic.moments, batch.flat["critic"], ranks)
    found["advantage"] = batch.flat["advantage"].view(policy.rollout_chunks, -1)
    found["keep"] = batch.flat["keep"].view(policy.rollout_chunks, -1)
    found["metrics"] = {k: float(x) for k, x in describe_iteration(batch, sums, extremes, args, ranks).items()}
    return found


def one_rank(rank: int, port: int, checkpoint: str, folder: str) -> None:
    """One of two processes, as torchrun would start it, with its own half of the environments."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    ranks = Ranks.start("cpu")
    for name in SCRIPTS:
        torch.save(first_update(checkpoint, name, ranks), f"{folder}/{name}_{rank}.pt")
    ranks.stop()


def test_two_processes_make_the_same_first_update(tiny_checkpoint, tmp_path):
    expected = {name: first_update(str(tiny_checkpoint), name, ALONE) for name in SCRIPTS}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # a forked process need not import torch again; after CUDA has started it may not be forked
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    children = [context.Process(target=one_rank, args=(r, port, str(tiny_checkpoint), str(tmp_path))) for r in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        if child.is_alive():
            child.kill()
    assert [child.exitcode for child in children] == [0, 0]
    for name, whole in expected.items():
        found = [torch.load(tmp_path / f"{name}_{rank}.pt") for rank in range(2)]
        assert [part["keep"].any().item() for part in found] == [name == "halves", True]
        for key in ("AdamW", "SGD", "gradient", "moments"):
            assert torch.equal(found[0][key], found[1][key]), key
        keep = whole["keep"]
        assert torch.equal(torch.cat([part["keep"] for part in found], 1), keep)
        assert torch.allclose(torch.cat([part["advantage"] for part in found], 1)[keep], whole["advantage"][keep], atol=1e-5)
        assert torch.allclose(found[0]["moments"], whole["moments"], rtol=1e-5, atol=1e-5)
        assert math.isclose(whole["moments"][0, 0], 24 if name == "halves" else 8)
        for key in ("SGD", "gradient"):
            assert (found[0][key] - whole[key]).abs().max() < 1e-5, key
        # Adam divides by |gradient| + 1e-8: where a gradient is mere rounding, the step is, too
        difference = (found[0]["AdamW"] - whole["AdamW"]).abs()
        assert difference[whole["gradient"].abs() > 1e-6].max() < 2e-5 and difference.max() < 2.1e-3
        assert found[0]["metrics"] == found[1]["metrics"] and found[0]["metrics"].keys() == whole["metrics"].keys()
        for key, value in whole["metrics"].items():
            assert math.isclose(found[0]["metrics"][key], value, rel_tol=1e-3, abs_tol=2e-5), key
