"""PPO's mathematics and bookkeeping, through ppo_gr00t_frozen.py's own functions: a tiny random GR00T, no simulator."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

import ppo_gr00t_frozen as ppo
from common import Metrics, Noise, Ranks, StageTimer, merge_moments
from ppo_gr00t_frozen import (
    TASKS,
    Args,
    ChunkEnv,
    Critic,
    Gr00tActor,
    advantages,
    episode_seed,
    learning_rate,
    plan_minibatches,
    ppo_loss,
    rollout,
    train,
    update,
    value_loss,
)
from tests import test_grpo_math as grpo
from tests.test_common import on_two_ranks
from tests.test_grpo_math import ALONE, TASK, close, flat, gradient, perturb

torch.set_num_threads(1)
HORIZON, CHUNK, CHUNKS = 32, 8, 4  # steps of an episode and of a chunk (the fixture network's horizon); chunks
PRIVILEGED = TASKS[TASK].privileged  # numbers of the simulator's state
VALID = 4  # action dimensions that are not padding
MIXED = (0, 99, 2, 99, 1, 99, 99, 3)  # the chunk in which an environment succeeds; 99: never


def make(checkpoint, **overrides) -> tuple[Args, Gr00tActor]:
    """Arguments and policy; one minibatch, one epoch, no warm-up of the critic."""
    wanted = {"num_envs": 8, "minibatches": 1, "epochs": 1, "critic_epochs": 1, "critic_warmup": 0}
    args = Args(checkpoint=str(checkpoint), device="cpu", **{**wanted, **overrides})
    return args, Gr00tActor(args)


def observation(args: Args, n: int, seed: int, steps: int = 0) -> TensorDict:
    obs, g = grpo.observation(n, seed), torch.Generator().manual_seed(seed)
    own = torch.randn(n, PRIVILEGED, generator=g) if args.critic_obs == "privileged" else obs["state"]
    return obs.set("critic", torch.cat([own, torch.full((n, 1), steps / HORIZON)], 1))


class Episodes:
    """In the place of ChunkEnv: generated observations, success as `script` says, rewards with it or at random."""

    ended = ChunkEnv.ended

    def __init__(self, args: Args, script=MIXED):
        self.args, self.task, self.dense, self.ends = args, TASKS[TASK], args.reward == "dense", torch.tensor(script)
        self.num_envs, self.seeds, self.record = len(script), [], []
        self.terminations = SimpleNamespace(get_term=lambda name: self.failure)

    def observe(self) -> TensorDict:
        return observation(self.args, self.num_envs, 100 * len(self.seeds) + self.steps, self.steps)

    def reset(self, seed: int, bank=None) -> TensorDict:
        self.seeds.append(seed)
        self.steps, self.success = 0, torch.zeros(self.num_envs, dtype=torch.bool)
        self.failure = torch.zeros_like(self.success)
        return self.observe()

    def step_chunk(self, actions: Tensor, last: bool = False) -> TensorDict | None:
        assert actions.shape[::2] == (self.num_envs, VALID) and self.steps < HORIZON, "an episode is over"
        before, self.success = self.success, self.ends <= self.steps // actions.shape[1]
        g = torch.Generator().manual_seed(7 * len(self.seeds) + self.steps)
        given = torch.randn(self.num_envs, generator=g) if self.dense else self.args.gamma**3 * (self.success & ~before)
        self.reward = given
        self.steps += actions.shape[1]
        assert last == (self.steps == HORIZON)
        return None if last else self.observe()


def collect(args: Args, policy: Gr00tActor, script=MIXED, ranks: Ranks = ALONE, log: Metrics | None = None):
    """A rollout's samples (T, N) with advantages and targets, and which belong to an attempt; a rank's share of them."""
    env, n = Episodes(args, script), len(script) // ranks.world
    own = slice(ranks.rank * n, (ranks.rank + 1) * n)
    samples = rollout(env, policy, args, 0, ALONE, StageTimer("cpu"))[:, own].clone()
    return samples, advantages(samples, env.success[own], args, ranks, log or Metrics("cpu", ranks))


def perturb_critic(policy: Gr00tActor, scale: float = 0.05, seed: int = 6) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.critic.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g))


def optimizer_of(policy: Gr00tActor, kind=torch.optim.SGD, lr: float = 0.0, critic_lr: float = 0.0):
    groups = [{"params": policy.trainable()}, {"params": list(policy.critic.parameters()), "lr": critic_lr}]
    return kind(groups, lr)


def critic_gradient(policy: Gr00tActor) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in policy.critic.parameters()])


def weights(parameters) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in parameters])


def updated(args, policy, samples, keep, ranks: Ranks = ALONE, optimizer=None, moving: bool = True, steps: int = 99):
    """The gradients of policy and critic before they were clipped, and an update's figures; by default no step is made."""
    log, plan = Metrics("cpu", ranks), plan_minibatches(keep, args, 0, ranks, moving)[:steps]
    update(policy, optimizer or optimizer_of(policy), samples, plan, args, ranks, log)
    figures = log.read()
    norms = (figures.get("update/grad_norm", 0.0), figures["update/critic_grad_norm"])
    found = [g * max(1.0, norm) for g, norm in zip((gradient(policy), critic_gradient(policy)), norms)]
    return found, figures


# ---------------------------------------------------------------- who gets a gradient, and what the critic sees


@pytest.mark.parametrize("critic_obs, columns", [("features", 96 + 5 + 1), ("privileged", PRIVILEGED + 1)])
def test_critic_and_policy_do_not_share_a_gradient(tiny_checkpoint, critic_obs, columns):
    args, policy = make(tiny_checkpoint, critic_obs=critic_obs, kl_coef=0.1)
    perturb_critic(policy)
    samples, keep = collect(args, policy)
    assert samples["critic"].shape == (CHUNKS, 8, columns)
    perturb(policy)
    log, batch = Metrics("cpu", ALONE), flat(samples, torch.arange(16))
    policy.zero_grad()
    value_loss(policy, batch, log).backward()
    assert all(p.grad is None for p in policy.net.parameters())
    assert all(p.grad.norm() > 0 for p in policy.critic.parameters())
    policy.zero_grad()
    ppo_loss(policy, batch, args, log, True).backward()
    assert all(p.grad is None for p in policy.critic.parameters()) and gradient(policy).norm() > 0
    updated(args, policy, samples, keep)
    frozen = [*policy.net.backbone.parameters(), *policy.base_head.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_the_critic_sees_features_without_padding_or_the_simulators_state(tiny_checkpoint, monkeypatch):
    """Instructions of several lengths: the mean is over an observation's own features."""
    monkeypatch.setitem(TASKS, TASK, dataclasses.replace(TASKS[TASK], instructions=("lift the red cube", "lift cube")))
    args, policy = make(tiny_checkpoint, micro_batch_size=3)
    obs = observation(args, 4, 0, steps=16)
    features, lengths = policy.features(obs), policy.lengths[obs["prompt"]].tolist()
    assert len(set(lengths)) == 2 and features.shape[1] == max(lengths)
    expected = torch.stack([f[:n].mean(0) for f, n in zip(features, lengths)])
    found = policy.critic_input(obs.clone().set("features", features))
    assert torch.allclose(found, torch.cat([expected, obs["state"], torch.full((4, 1), 0.5)], 1), atol=1e-6)
    args, policy = make(tiny_checkpoint, critic_obs="privileged")
    obs = observation(args, 8, 1)
    assert torch.equal(policy.critic_input(obs), obs["critic"]) and obs["critic"].shape == (8, PRIVILEGED + 1)


# ---------------------------------------------------------------- the gradient of a minibatch, in float64


class Reference:
    """PPO's losses in float64. The networks' layers and the kept features are given; everything else is written anew."""

    def __init__(self, args: Args, policy: Gr00tActor):
        self.args, self.policy = args, policy
        self.head, self.critic = copy.deepcopy(policy.net.action_head).double(), copy.deepcopy(policy.critic).double()

    def step(self, head, row: TensorDict) -> tuple[Tensor, float, Tensor]:
        """Mean, std and outcome of a row's stochastic step, over executed actions: drift form of Flow-SDE."""
        args, K, k = self.args, self.args.denoise_steps, int(row["k"])
        state = self.policy.processor.normalize_state(row["state"])
        context = head.encode(row["features"], state, torch.zeros(1, dtype=torch.long))
        x, t = row["x"].double(), k / K
        v = head.velocity(x, torch.tensor([k * 1000 // K]), torch.zeros(1, dtype=torch.long), context)
        sigma = args.noise_level * math.sqrt((1 - t) / max(t, 1 / K))
        score = -(x - t * v) / (1 - t)  # of the marginal at t
        mean = x + (v + sigma**2 / 2 * score) / K
        return mean[0, :CHUNK, :VALID], sigma / math.sqrt(K), row["y"].double()[0, :CHUNK, :VALID]

    def log_prob(self, head, row: TensorDict) -> Tensor:
        mean, std, y = self.step(head, row)
        return (-((y - mean) ** 2) / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))).sum()

    def kl(self, head, base, row: TensorDict) -> Tensor:
        (mean, std, _), (other, _, _) = self.step(head, row), self.step(base, row)
        return ((mean - other.detach()) ** 2).sum() / (2 * std**2)

    def value(self, row: TensorDict) -> Tensor:
        x = torch.cat([row["features"].double().mean(-2), row["state"].double(), row["critic"][:, -1:].double()], -1)
        count, mean, square = self.critic.moments
        x = ((x - mean) / ((square / count).sqrt() + 0.01)).clamp(-10, 10)
        return self.critic.value(self.critic.layers(x))[0, 0]


def by_hand(rewards, values, ends, discount: float, lam: float) -> np.ndarray:
    """Advantages (T,) of one environment, as the sum over its attempt: A_t = sum_l (discount lam)^l delta_{t+l}."""
    T = len(rewards)
    following = [0.0 if ends[t] or t + 1 == T else values[t + 1] for t in range(T)]
    delta = [rewards[t] + discount * following[t] - values[t] for t in range(T)]
    stop = [next((u for u in range(t, T) if ends[u]), T - 1) for t in range(T)]
    return np.array([sum((discount * lam) ** (u - t) * delta[u] for u in range(t, stop[t] + 1)) for t in range(T)])


def test_a_minibatch_has_the_gradient_of_the_definition(tiny_checkpoint):
    """Two environments: one never succeeds, the other in its second chunk: 4 + 2 samples.

    The reference evaluates the networks in float64; their float32 inputs (chain, features, state) are taken as given.
    """
    args, policy = make(tiny_checkpoint, num_envs=2, clip=0.1, kl_coef=0.3, gamma=0.97, gae_lambda=0.8)
    perturb(policy, 0.01)  # the rollout's policy is not the base
    perturb_critic(policy)
    g = torch.Generator().manual_seed(2)
    policy.critic.moments.copy_(torch.rand(policy.critic.moments.shape, generator=g) + torch.tensor([[50.0], [0], [20]]))
    old, base = Reference(args, policy), copy.deepcopy(policy.base_head).double()
    samples, keep = collect(args, policy, (99, 1))
    perturb(policy, 0.004)
    perturb_critic(policy, 0.02, seed=11)
    new = Reference(args, policy)
    found, _ = updated(args, policy, samples, keep)

    rows = [(t, n) for n, length in ((0, 4), (1, 2)) for t in range(length)]
    assert keep.nonzero().tolist() == sorted(map(list, rows))
    row = {at: samples[at[0], at[1]][None] for at in rows}
    with torch.no_grad():
        values = [[old.value(row[t, n]).item() for t in range(length)] for n, length in ((0, 4), (1, 2))]
    rewards = [[0.0] * 4, [0.0, 0.97**3]]  # in the fourth step of its chunk
    advantage = [by_hand(r, v, [False] * len(v), 0.97**CHUNK, 0.8) for r, v in zip(rewards, values)]
    target = np.concatenate(advantage) + np.concatenate(values)
    advantage = np.concatenate([(a - a.mean()) / (a.std() + 1e-3) for a in advantage])  # each has its own instruction

    loss, value_error, clipped = 0.0, 0.0, []
    for at, a, y in zip(rows, advantage, target):
        ratio = (new.log_prob(new.head, row[at]) - old.log_prob(old.head, row[at]).detach()).exp()
        pair = ratio * a, ratio.clamp(0.9, 1.1) * a
        clipped.append(bool(pair[1] < pair[0]))
        loss = loss - torch.minimum(*pair) + 0.3 * new.kl(new.head, base, row[at])
        value_error = value_error + (new.value(row[at]) - y) ** 2 / 2
        assert abs(ratio - 1) > 1e-3
    assert 0 < sum(clipped) < 6
    parameters = [p for p in new.head.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss / 6, parameters, allow_unused=True)
    expected = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads)])
    assert close(found[0].double(), expected, 1e-4)
    grads = torch.autograd.grad(value_error / 6, list(new.critic.parameters()))
    assert close(found[1].double(), torch.cat([g.flatten() for g in grads]), 1e-4)


def test_policy_and_critic_are_clipped_apart(tiny_checkpoint):
    args, policy = make(tiny_checkpoint)
    perturb_critic(policy)
    samples, keep = collect(args, policy)
    advantage, error = samples["advantage"].clone(), samples["target"] - samples["value"]
    for scale in (1e-3, 1e3):  # below and above the bound of 1
        samples["advantage"], samples["target"] = advantage * scale, samples["value"] + error * scale
        _, figures = updated(args, policy, samples, keep)
        for name, kept in (("", gradient(policy)), ("critic_", critic_gradient(policy))):
            norm = figures[f"update/{name}grad_norm"]
            assert math.isclose(kept.norm(), min(norm, 1.0), rel_tol=1e-4) and (norm > 1) == (scale > 1)


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
    blown = given.clone()
    blown[2:, 1] = float("nan")  # the physics of a world that failed
    env.env = SimpleNamespace(step=lambda action: (None, blown[next(at)], None, None, {}))
    env.varied = SimpleNamespace(delay=lambda actions: actions)
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


@pytest.mark.parametrize("reward", ["sparse", "dense"])
def test_advantages_and_returns_of_a_rollout(tiny_checkpoint, reward):
    args, policy = make(tiny_checkpoint, num_envs=4, reward=reward, gamma=0.98, gae_lambda=0.9)
    perturb_critic(policy)
    env, log = Episodes(args, (0, 99, 2, 3)), Metrics("cpu", ALONE)
    samples = rollout(env, policy, args, 5, ALONE, StageTimer("cpu"))
    keep = advantages(samples, env.success, args, ALONE, log)
    assert env.seeds == [episode_seed(args.seed, 5 * CHUNKS, ALONE)]
    figures, dense = log.read(), reward == "dense"
    t = torch.arange(CHUNKS)[:, None]
    assert torch.equal(keep, torch.ones(CHUNKS, 4, dtype=torch.bool) if dense else t <= env.ends)
    ends = ((t >= env.ends) & (not dense)) | (t == CHUNKS - 1)  # (T, N)
    rewards, values = samples["reward"].numpy(), samples["value"].numpy()
    expected = np.stack([by_hand(rewards[:, i], values[:, i], ends[:, i], 0.98**CHUNK, 0.9) for i in range(4)], 1)
    kept = keep.numpy()
    assert np.allclose(samples["target"].numpy()[kept], (expected + values)[kept], atol=1e-5)
    for k in range(2):  # the instructions
        own = kept & (np.arange(4) % 2 == k)
        error, target = expected[own], (expected + values)[own]
        assert np.allclose(samples["advantage"].numpy()[own], (error - error.mean()) / (error.std() + 1e-3), atol=1e-4)
        assert math.isclose(figures[f"update/explained_variance_k{k}"], 1 - error.var() / target.var(), rel_tol=1e-3)
    assert figures["rollout/samples"] == kept.sum() and figures["rollout/success"] == 3 / 4
    assert math.isclose(figures["rollout/reward"], rewards[kept].mean(), rel_tol=1e-4)
    assert math.isclose(figures["rollout/value"], values[kept].mean(), rel_tol=1e-4)
    assert math.isclose(figures["rollout/log_prob"], samples["log_prob"].mean(), rel_tol=1e-4)
    own, target = expected[kept], (expected + values)[kept]
    assert math.isclose(figures["update/explained_variance"], 1 - own.var() / target.var(), rel_tol=1e-3)
    samples["prompt"].fill_(1)  # nobody was asked for the first
    log = Metrics("cpu", ALONE)
    advantages(samples, env.success, args, ALONE, log)
    assert np.allclose(samples["advantage"].numpy()[kept], (own - own.mean()) / (own.std() + 1e-3), atol=1e-4)
    again = log.read()
    assert "update/explained_variance_k0" not in again
    assert math.isclose(again["update/explained_variance_k1"], figures["update/explained_variance"], rel_tol=1e-5)


def test_a_success_is_worth_what_is_left_of_it(tiny_checkpoint):
    """With a critic that knows nothing and lambda 1: gamma per environment step, so gamma**chunk per chunk."""
    args, policy = make(tiny_checkpoint, gae_lambda=1.0, gamma=0.9)
    target = collect(args, policy)[0]["target"]
    assert torch.allclose(target[:, 7], torch.tensor([0.9 ** (3 + 8 * k) for k in (3, 2, 1, 0)]))
    assert torch.allclose(target[:3, 2], torch.tensor([0.9 ** (3 + 8 * k) for k in (2, 1, 0)]))
    assert target[:, 1].abs().max() == 0


# ---------------------------------------------------------------- samples and minibatches


def test_masked_samples_count_nowhere(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, kl_coef=0.1)
    perturb_critic(policy)
    samples, keep = collect(args, policy)
    assert keep.sum(0).tolist() == [1, 4, 3, 4, 2, 4, 4, 4]
    expected, _ = updated(args, policy, samples, keep)
    for name in ("target", "critic", "log_prob", "features", "advantage"):
        samples[name] = torch.where(keep.view(CHUNKS, 8, *[1] * (samples[name].ndim - 2)), samples[name], 1e6)
    assert all(map(torch.equal, updated(args, policy, samples, keep)[0], expected))


def test_every_kept_sample_once_per_epoch(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, minibatches=4, epochs=2, critic_epochs=3)
    _, keep = collect(args, policy)
    kept, plans = torch.nonzero(keep.flatten())[:, 0], {}
    for iteration, moving in ((0, False), (2, True), (3, True)):
        plan = plans[iteration] = plan_minibatches(keep, args, iteration, ALONE, moving)
        assert [len(rows) for rows, *_ in plan] == [int(size) for _, size, _ in plan] == [7, 7, 6, 6] * 3
        assert [moves for *_, moves in plan] == ([True] * 8 + [False] * 4 if moving else [False] * 12)
        for e in range(3):
            assert torch.equal(torch.cat([rows for rows, *_ in plan[4 * e : 4 * e + 4]]).sort().values, kept)
        assert not torch.equal(plan[0][0], plan[4][0])
    assert not torch.equal(plans[2][0][0], plans[3][0][0])
    again = plan_minibatches(keep, args, 2, ALONE, True)
    assert all(torch.equal(a, b) for (a, *_), (b, *_) in zip(plans[2], again))
    args.epochs, args.critic_epochs = 3, 1  # the critic learns in the policy's epochs, too
    assert [moves for *_, moves in plan_minibatches(keep, args, 2, ALONE, True)] == [True] * 12
    assert plan_minibatches(torch.zeros_like(keep), args, 2, ALONE, True) == []


def test_the_critic_learns_alone_at_first_and_in_further_epochs(tiny_checkpoint):
    found = {}
    for name, moving, steps in (("alone", False, 99), ("all", True, 99), ("of the policy", True, 2)):
        args, policy = make(tiny_checkpoint, minibatches=2, critic_epochs=3, kl_coef=0.1)
        before = {key: p.detach().clone() for key, p in policy.named_parameters()}
        samples, keep = collect(args, policy)
        optimizer = optimizer_of(policy, torch.optim.AdamW, 1e-3, 1e-3)
        _, figures = updated(args, policy, samples, keep, ALONE, optimizer, moving, steps)
        changed = {key.split(".")[0] for key, p in policy.named_parameters() if not torch.equal(p, before[key])}
        assert changed == ({"critics", "net"} if moving else {"critics"}) and figures["update/value_loss"] > 0
        assert ("update/loss" in figures) == ("update/grad_norm" in figures) == moving
        assert figures.get("update/first_ratio_error", 0.0) < 1e-5  # of the first minibatch alone
        found[name] = weights(policy.trainable()), weights(policy.critic.parameters())
    assert torch.equal(found["all"][0], found["of the policy"][0])
    assert not torch.equal(found["all"][1], found["of the policy"][1])


def test_learning_rate_starts_after_the_warm_up_of_the_critic():
    args = Args(learning_rate=1e-3, iterations=100, lr_hold=0.5, lr_warmup=9, critic_warmup=5)
    rates = [learning_rate(args, i) for i in range(101)]
    assert all(rate == 0 for rate in rates[:5])
    assert all(math.isclose(rates[5 + i], (i + 1) * 1e-4) for i in range(10))
    assert rates[14:51] == [1e-3] * 37 and math.isclose(rates[75], 0.55e-3) and math.isclose(rates[100], 1e-4)


# ---------------------------------------------------------------- the value network, and whole runs without a simulator


@pytest.mark.parametrize("critic_obs", ["features", "privileged"])
def test_values_are_zero_at_first(tiny_checkpoint, critic_obs):
    args, policy = make(tiny_checkpoint, critic_obs=critic_obs)
    assert collect(args, policy)[0]["value"].abs().max() == 0
    torch.manual_seed(3)  # --seed alone decides the weights, and nothing drawn later changes
    state = torch.get_rng_state()
    again, other = make(tiny_checkpoint, critic_obs=critic_obs)[1], make(tiny_checkpoint, critic_obs=critic_obs, seed=2)[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights(again.critic.parameters()), weights(policy.critic.parameters()))
    assert not torch.equal(weights(other.critic.parameters()), weights(policy.critic.parameters()))


def test_size_of_the_value_network():
    with torch.device("meta"):
        critic = Critic(2048 + 64 + 1, 2048)
    assert 9e6 < sum(p.numel() for p in critic.parameters()) < 12e6


def training(args: Args, policy: Gr00tActor, script=MIXED) -> list[dict]:
    """What `train` logs, without a simulator and without a folder."""
    rows, nothing = [], lambda *_, **__: None
    run = SimpleNamespace(state={"iteration": 0}, restore_optimizer=nothing, result=nothing, save=nothing)
    run.log = lambda iteration, metrics, stages, steps: rows.append(metrics)
    train(args, Episodes(args, script), policy, run, ALONE)
    return rows


SHORT = {"iterations": 3, "critic_warmup": 1, "eval_episodes": 0}


def test_inputs_are_standardised_by_what_came_before(tiny_checkpoint, monkeypatch):
    """The moments are those of earlier iterations' inputs, in rollout and update alike: the value stays what it was."""
    args, policy = make(tiny_checkpoint, **SHORT, learning_rate=1e-4, critic_lr=3e-3, lr_warmup=1)
    seen, moments, rates = [], [], []

    def update_and_look(policy, optimizer, samples, *given):
        seen.append(samples["critic"].clone())
        moments.append(policy.critic.moments.clone())
        rates.append([group["lr"] for group in optimizer.param_groups])
        with torch.no_grad():
            assert torch.allclose(policy.critic(samples["critic"]), samples["value"], atol=1e-6)
        return update(policy, optimizer, samples, *given)

    monkeypatch.setattr(ppo, "update", update_and_look)
    rows = training(args, policy)
    moments.append(policy.critic.moments)
    assert moments[0].abs().max() == 0
    for i in (1, 2, 3):
        x = np.concatenate([critic.flatten(0, 1).double().numpy() for critic in seen[:i]])
        expected = np.stack([np.full(102, float(len(x))), x.mean(0), ((x - x.mean(0)) ** 2).sum(0)])
        assert np.allclose(moments[i].numpy(), expected, rtol=1e-4, atol=1e-4)
    given, x = [], torch.from_numpy(x).float()
    policy.critic.layers.register_forward_hook(lambda module, inputs, out: given.append(inputs[0]))
    policy.critic(x)
    assert torch.allclose(given[0], (x - x.mean(0)) / (x.std(0, correction=0) + 0.01), atol=1e-3)

    assert rates == [[learning_rate(args, i), 3e-3] for i in range(3)] and rates[1][0] == 0.5e-4
    assert [row["update/learning_rate"] for row in rows] == [rate for rate, _ in rates]
    assert [("update/loss" in row) for row in rows] == [False, True, True]  # the first iteration is the critic's


def test_features_are_held_once(tiny_checkpoint, monkeypatch):
    """One copy of a rollout's features when it ends; those of the one before are gone."""
    args, policy = make(tiny_checkpoint, **SHORT)
    features, seen, n = policy.features(observation(args, 1, 0)), [], len(MIXED)

    def held() -> float:
        """Rows of features that live, in whole rollouts; a chunk's own may be among them."""
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) is Tensor and x.shape[-2:] == features.shape[-2:]]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if not x.requires_grad}
        return sum(storages.values()) / (features.nbytes * CHUNKS * n)

    idle = held()  # what other tests have left
    monkeypatch.setattr(ppo, "advantages", lambda *args: (seen.append(held() - idle), advantages(*args))[1])
    training(args, policy)
    assert len(seen) == 3 and all(1 <= x <= 1 + 2 / CHUNKS for x in seen), seen


# ---------------------------------------------------------------- ratio and metrics


def test_ratio_is_one_before_the_first_update(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, chunk=4, kl_coef=0.01, micro_batch_size=7)
    samples, keep = collect(args, policy)
    _, figures = updated(args, policy, samples, keep)
    assert figures["update/first_ratio_error"] < 1e-5
    for k in range(4):
        assert figures[f"update/clip_frac_k{k}"] == figures[f"update/kl_base_k{k}"] == 0
        assert abs(figures[f"update/approx_kl_k{k}"]) < 1e-5
    perturb(policy)  # and the figure says so when it is not
    assert updated(args, policy, samples, keep)[1]["update/first_ratio_error"] > 1e-3


def test_metrics_are_means_over_the_samples(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, kl_coef=0.1, clip=0.3, micro_batch_size=5, critic_epochs=3, epochs=2)
    perturb_critic(policy)
    samples, keep = collect(args, policy)
    perturb(policy, 0.005)
    _, figures = updated(args, policy, samples, keep)
    batch = flat(samples, torch.nonzero(keep.flatten())[:, 0])
    with torch.no_grad():
        new, mean, std = policy.evaluate(batch)
        kl = ((mean - policy.base_mean(batch)) ** 2 / (2 * std**2)).sum((1, 2))
        values = policy.critic(batch["critic"])
    log_ratio, advantage = new - batch["log_prob"], batch["advantage"]
    ratio = log_ratio.exp()
    loss = 0.1 * kl - torch.minimum(ratio * advantage, ratio.clamp(0.7, 1.3) * advantage)
    expected = {"clip_frac": (ratio - 1).abs() > 0.3, "approx_kl": ratio - 1 - log_ratio, "kl_base": kl}
    for name, x in expected.items():
        for k in range(4):
            assert math.isclose(figures[f"update/{name}_k{k}"], x[batch["k"] == k].float().mean(), rel_tol=1e-3)
    expected |= {"loss": loss, "value_loss": 0.5 * (values - batch["target"]).square()}
    for name, x in expected.items():
        assert math.isclose(figures[f"update/{name}"], x.float().mean(), rel_tol=1e-3), name
    assert 0 < figures["update/clip_frac"] < 1


# ---------------------------------------------------------------- memory options


def counter(*modules) -> list:
    """Grows by one whenever one of the modules runs."""
    calls: list[int] = []
    for module in modules:  # checkpointing leaves a module as soon as it has what it needs
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def gradient_with(checkpoint, **overrides) -> SimpleNamespace:
    """A rollout and the first update's gradient, with a policy that moved in between."""
    args, policy = make(checkpoint, kl_coef=0.01, **overrides)
    samples, keep = collect(args, policy)
    backbone, inside = counter(policy.net.backbone), set()
    policy.net.backbone.mlp1.register_forward_hook(lambda module, inputs, out: inside.add(out.dtype))
    error = updated(args, policy, samples, keep)[1]["update/first_ratio_error"]
    perturb(policy)
    blocks = counter(*(block.ff for block in policy.blocks()))
    found, _ = updated(args, policy, samples, keep)
    return SimpleNamespace(
        samples=samples, gradient=torch.cat(found), error=error, backbone=len(backbone), blocks=len(blocks), inside=inside
    )


def test_memory_options_do_not_change_the_gradient(tiny_checkpoint):
    plain = gradient_with(tiny_checkpoint)
    assert plain.backbone == 0 and plain.samples["features"].dtype == torch.float32
    for option, value in (("feature_cache", "off"), ("micro_batch_size", 7), ("activation_checkpointing", True)):
        found = gradient_with(tiny_checkpoint, **{option: value})
        assert close(found.gradient, plain.gradient, 1e-5) and found.error < 1e-5, option
        assert ("features" in found.samples.keys()) == (option != "feature_cache") == (found.backbone == 0)
        if option == "activation_checkpointing":  # run again in the backward pass; the base model's are not
            assert found.blocks == 2 * plain.blocks


def test_a_backbone_in_bfloat16_changes_little(tiny_checkpoint):
    plain = gradient_with(tiny_checkpoint)
    for cache in ("gpu", "off"):
        found = gradient_with(tiny_checkpoint, precision="bf16", feature_cache=cache)
        assert found.inside == (set() if cache == "gpu" else {torch.bfloat16})  # not merely rounded afterwards
        assert torch.cosine_similarity(found.gradient, plain.gradient, 0) > 0.99
        assert not close(found.gradient, plain.gradient, 1e-5) and found.error < 1e-5, cache
        assert found.samples["critic"].dtype == torch.float32
        if cache == "gpu":
            assert found.samples["features"].dtype == torch.bfloat16
            mean = found.samples["features"].double().mean(2)
            assert torch.allclose(found.samples["critic"][..., :96].double(), mean, atol=1e-6)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("critic_obs", ["features", "privileged"])
def test_saved_and_loaded_bit_for_bit(tiny_checkpoint, tmp_path, critic_obs):
    args, policy = make(tiny_checkpoint, critic_obs=critic_obs)
    perturb(policy)
    perturb_critic(policy)
    samples, _ = collect(args, policy)
    policy.critic.moments.copy_(merge_moments(policy.critic.moments, samples["critic"], ALONE))
    policy.save(tmp_path / "saved")
    fresh = make(tiny_checkpoint, critic_obs=critic_obs)[1]

    def figures(policy) -> tuple[Tensor, ...]:
        out, critic = policy.act(observation(args, 8, 3), Noise("cpu", ALONE, 1), explore=True), samples["critic"]
        return out["action"], out["log_prob"], policy.critic(critic)

    expected = figures(policy)
    assert not any(map(torch.equal, figures(fresh), expected))
    fresh.load(tmp_path / "saved")
    assert all(map(torch.equal, figures(fresh), expected))
    for name, value in policy.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name  # the base model's among them


# ---------------------------------------------------------------- two processes

CASES = {"halves": MIXED, "one_early": (0, 0, 0, 0, 99, 1, 2, 99)}  # the second rank has most samples


def first_update(checkpoint: str, script, ranks: Ranks) -> tuple[dict[str, Tensor], dict]:
    """One step of the script's AdamW, and of SGD at rate 1, on a rank's share of a rollout; and the figures."""
    args, policy = make(checkpoint, kl_coef=0.01)
    perturb_critic(policy)
    log = Metrics("cpu", ranks)
    samples, keep = collect(args, policy, script, ranks, log)
    found, before = {}, {key: value.clone() for key, value in policy.state_dict().items()}
    for kind, lr, critic_lr in ((torch.optim.AdamW, args.learning_rate, args.critic_lr), (torch.optim.SGD, 1.0, 1.0)):
        _, figures = updated(args, policy, samples, keep, ranks, optimizer_of(policy, kind, lr, critic_lr))
        found[kind.__name__] = weights([*policy.trainable(), *policy.critic.parameters()])
        found["gradient"] = torch.cat([gradient(policy), critic_gradient(policy)])
        policy.load_state_dict(before)
    found["moments"] = merge_moments(policy.critic.moments, samples["critic"], ranks)
    return found, log.read() | figures


def updates_of_a_rank(ranks: Ranks, checkpoint: str, folder) -> None:
    for name, script in CASES.items():
        torch.save(first_update(checkpoint, script, ranks), folder / f"{name}_{ranks.rank}.pt")


def test_two_processes_make_the_same_first_update(tiny_checkpoint, tmp_path):
    on_two_ranks(updates_of_a_rank, str(tiny_checkpoint), tmp_path)
    for name, script in CASES.items():
        expected, figures = first_update(str(tiny_checkpoint), script, ALONE)
        (found, one), (other, two) = (torch.load(tmp_path / f"{name}_{rank}.pt") for rank in range(2))
        assert all(torch.equal(found[key], other[key]) for key in found)
        assert one == two == pytest.approx(figures, rel=1e-3, abs=1e-5)
        for key in ("SGD", "gradient", "moments"):
            assert torch.allclose(found[key].double(), expected[key].double(), rtol=1e-5, atol=3e-6), key
        # Adam divides by |gradient| + 1e-8: where a gradient is mere rounding, the step is, too
        large = expected["gradient"].abs() > 1e-6
        assert (found["AdamW"] - expected["AdamW"])[large].abs().max() < 1e-4
