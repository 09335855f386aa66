"""GRPO's mathematics and bookkeeping, through grpo_gr00t.py's own functions: a tiny random GR00T, no simulator."""

from __future__ import annotations

import dataclasses
import errno
import math
import multiprocessing
import os
import socket
import statistics
import time

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import grpo_gr00t
from common import Noise, Ranks, RunLogger, latest_checkpoint
from gr00t_n1d5 import Gr00tN1d5
from grpo_gr00t import (
    Args,
    Batch,
    Chain,
    Gr00tActor,
    Observation,
    UsageError,
    check_finite,
    describe_iteration,
    gaussian_log_prob,
    grpo_loss,
    learning_rate,
    plan_minibatches,
    resolve,
    save_checkpoint,
    stochastic_step,
    update,
)

torch.set_num_threads(1)
ALONE = Ranks(0, 1)
NOISES = ("flow-sde", "flow-sde-all", "flow-cps", "flow-cps-all")
HORIZON, ACTION_DIM, VALID = 8, 6, 4  # of the fixture's network


def make(checkpoint, **overrides) -> tuple[Args, Gr00tActor]:
    """Arguments and policy; a chunk is half of the model's horizon, so T = 8 chunks an episode."""
    wanted = {"num_envs": 8, "group_size": 4, "chunk": 4, "minibatches": 1, "max_grad_norm": 1e9, **overrides}
    args = resolve(Args(checkpoint=str(checkpoint), device="cpu", **wanted))
    return args, Gr00tActor(args)


def observation(n: int, seed: int = 0) -> Observation:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 1, 64, 64, 3), generator=g, dtype=torch.uint8)
    return Observation(images, torch.randn(n, 5, generator=g), torch.arange(n) % 2)


MIXED = [1, 99, 3, 99, 2, 99, 99, 5]  # two groups of four, both with failures and successes


def collect(args: Args, policy: Gr00tActor, first_success=MIXED, horizon: int = 32) -> Batch:
    """A batch from generated observations, as if episode i succeeded in chunk first_success[i]."""
    chunks, noise, ends = horizon // policy.chunk, Noise(args.device, ALONE, args.seed, 0), torch.tensor(first_success)
    batch = Batch(args, chunks)
    for chunk in range(chunks):
        obs = observation(len(ends), seed=chunk)
        batch.add(obs, policy.act(obs, noise, explore=True))
    valid = torch.stack([ends > chunk for chunk in range(chunks)])  # (T, N)
    return batch.finish(valid, ends <= chunks, args)


def perturb(policy: Gr00tActor, scale: float = 0.02) -> None:
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(scale * torch.randn(p.shape, generator=g))


def gradient(policy: Gr00tActor) -> Tensor:
    zeros = (torch.zeros_like(p) if p.grad is None else p.grad for p in policy.trainable())
    return torch.cat([g.flatten() for g in zeros])


def backward(policy: Gr00tActor, loss: Tensor) -> Tensor:
    policy.zero_grad()
    loss.backward()
    return gradient(policy)


def update_gradient(args: Args, policy: Gr00tActor, batch: Batch) -> Tensor:
    """The gradient that `update` accumulates, without a step."""
    optimizer = torch.optim.SGD(policy.trainable(), lr=0.0)
    update(policy, optimizer, batch, plan_minibatches(batch, args, 0, ALONE), args, ALONE)
    return gradient(policy)


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether the difference is small against the norm."""
    assert b.norm() > 0
    return float((a - b).norm() / b.norm()) < tolerance


# ---------------------------------------------------------------- prompts

TASK = "Tabletop-Lift-Cube-v0"


def instructed(monkeypatch, *texts: str) -> None:
    monkeypatch.setitem(grpo_gr00t.TASKS, TASK, dataclasses.replace(grpo_gr00t.TASKS[TASK], instructions=texts))


def means(policy, obs: Observation) -> Tensor:
    """What the policy makes of observations: means of stochastic steps from fixed noise, (B, 1, chunk, valid)."""
    n, g = len(obs.state), torch.Generator().manual_seed(1)
    noise = torch.randn(4, 2, 1, HORIZON, ACTION_DIM, generator=g)[:n]
    k = torch.ones(n, 1, dtype=torch.long)
    return policy.evaluate(obs, Chain(noise[:, 0], noise[:, 1], k, torch.zeros(n, 1)))[1].detach()


def test_instructions_of_several_lengths_do_not_disturb_each_other(tiny_checkpoint, monkeypatch):
    """Each does in a mixed batch what it does alone; features that were kept give the same."""
    obs, texts = observation(4), ("lift the red cube", "lift cube")
    instructed(monkeypatch, *texts)
    _, policy = make(tiny_checkpoint)
    assert len(set(policy.lengths.tolist())) == 2
    mixed = means(policy, obs)
    kept = means(policy, obs._replace(features=policy.features(obs).detach()))
    assert torch.equal(mixed, kept)
    for i, text in enumerate(texts):
        instructed(monkeypatch, text)
        _, single = make(tiny_checkpoint)
        own = obs._replace(prompt=torch.zeros(4, dtype=torch.long))
        assert torch.allclose(means(single, own)[i::2], mixed[i::2], atol=2e-6)
        assert not torch.allclose(means(single, own)[1 - i :: 2], mixed[1 - i :: 2], atol=1e-4)  # it matters


def test_prompt_flags(tiny_checkpoint, monkeypatch):
    """--pad-prompt is seen by the head, as RLinf's padding is; --bracketed changes the words."""
    obs = observation(4)
    plain, padded = (make(tiny_checkpoint, pad_prompt=n)[1] for n in (None, 24))
    assert padded.prompts.shape[1] == 24 and padded.features(obs).shape[1] == 24
    real = plain.prompts.shape[1]
    assert torch.allclose(padded.features(obs)[:, :real], plain.features(obs), atol=1e-6)
    behind = padded.features(obs)[:, real:]
    assert torch.equal(behind, padded.net.backbone.padding_feature().expand_as(behind))
    assert not torch.allclose(means(padded, obs), means(plain, obs), atol=1e-4)
    with pytest.raises(UsageError, match="^--instruction: .*cannot be padded to 7"):
        make(tiny_checkpoint, pad_prompt=7)
    with pytest.raises(UsageError, match=r"^--instruction: .*\['lift"):
        make(tiny_checkpoint, bracketed=True)  # no such word in the tiny vocabulary


# ---------------------------------------------------------------- the sampler keeps the distribution

GAUSSIAN = ((1.0, 0.5, 0.3),)  # (weight, mean, std) of the data's components
MIXTURE = ((0.3, -0.8, 0.1), (0.7, 0.8, 0.1))


def exact_velocity(components, steps: int):
    """E[action - noise | x_t] for data from a mixture of Gaussians, in the place of Gr00tActor.velocity."""

    def velocity(head, x: Tensor, k: Tensor, context) -> Tensor:
        t = float(k[0]) / steps
        log_weight, v = [], []
        for w, mu, s in components:
            variance = (1 - t) ** 2 + t**2 * s**2  # of x_t
            d = x - t * mu
            log_weight.append(math.log(w) - 0.5 * d**2 / variance - 0.5 * math.log(variance))
            v.append(mu + (t * s**2 - (1 - t)) / variance * d)
        return (torch.softmax(torch.stack(log_weight), 0) * torch.stack(v)).sum(0)

    return velocity


def generate(checkpoint, components, noise: str, level: float, steps: int, n: int = 4096) -> Tensor:
    """48 n samples by Gr00tActor.denoise with the exact velocity; noise "ode": no stochastic step."""
    kind = "flow-sde" if noise == "ode" else noise
    _, policy = make(checkpoint, noise=kind, noise_level=level, denoise_steps=steps)
    policy.velocity = exact_velocity(components, steps)
    g = torch.Generator().manual_seed(3)
    count = policy.stochastic_steps
    drawn = torch.arange(count).expand(n, count) if policy.all_steps else torch.randint(count, (n, 1), generator=g)
    if noise == "ode":
        drawn = torch.full((n, 1), -1)
    eps = torch.randn(n, drawn.shape[1], HORIZON, ACTION_DIM, generator=g)
    return policy.denoise(None, torch.randn(n, HORIZON, ACTION_DIM, generator=g), drawn, eps)[0].flatten()


def closed_form(noise: str, level: float, steps: int) -> tuple[float, float]:
    """Exact mean and std of the sampler's output for GAUSSIAN data, where every step is linear in x.

    The drift of Flow-SDE is written with the marginal's score: v + sigma^2 / 2 * score.
    """
    (_, mu, s), dt, cps = GAUSSIAN[0], 1 / steps, noise.startswith("flow-cps")
    count = steps - cps
    moments = []
    for pick in [range(count)] if noise.endswith("-all") else [[k] for k in range(count)]:
        mean, variance = 0.0, 1.0
        for k in range(steps):
            t, after = k * dt, (k + 1) * dt
            marginal = (1 - t) ** 2 + t**2 * s**2
            slope = (t * s**2 - (1 - t)) / marginal  # v = slope x + offset
            offset, added = mu - slope * t * mu, 0.0
            a, b = 1 + slope * dt, offset * dt
            if noise != "ode" and k in pick:
                if cps:
                    keep, added = (1 - after) * math.cos(math.pi * level / 2), (1 - after) * math.sin(math.pi * level / 2)
                    a = keep * (1 - t * slope) + after * (1 + (1 - t) * slope)
                    b = (after * (1 - t) - keep * t) * offset
                else:
                    sigma2 = level**2 * (1 - t) / max(t, dt)
                    a, b, added = a - sigma2 / 2 * dt / marginal, b + sigma2 / 2 * dt * t * mu / marginal, (sigma2 * dt) ** 0.5
            mean, variance = a * mean + b, a * a * variance + added**2
        moments.append((mean, variance))
    mean = statistics.fmean(m for m, _ in moments)
    return mean, (statistics.fmean(v + m * m for m, v in moments) - mean**2) ** 0.5


@pytest.mark.parametrize("noise", ["ode", "flow-sde", "flow-sde-all", "flow-cps"])
def test_many_steps_keep_the_distribution(tiny_checkpoint, noise):
    """K = 64, a = 0.7: means within 0.01 (a std is 0.3 or 0.1), stds within 6%, mode weights within 0.01."""
    n = 512 if noise.endswith("all") else 4096  # 24k or 197k samples
    x = generate(tiny_checkpoint, GAUSSIAN, noise, 0.7, 64, n)
    assert abs(x.mean() - 0.5) < 0.01 and abs(x.std() / 0.3 - 1) < 0.06
    x = generate(tiny_checkpoint, MIXTURE, noise, 0.7, 64, n)
    assert abs((x > 0).float().mean() - 0.7) < 0.01
    for mode, centre in ((x[x > 0], 0.8), (x[x < 0], -0.8)):
        assert abs(mode.mean() - centre) < 0.01 and abs(mode.std() / 0.1 - 1) < 0.06


# std of 4 steps for a true 0.3, measured with 400k float64 samples of a separate program: every sampler is biased
MEASURED = {
    ("ode", 0.5): 0.177,
    ("flow-sde", 0.3): 0.185,
    ("flow-sde", 0.5): 0.201,
    ("flow-sde", 0.7): 0.227,
    ("flow-sde-all", 0.3): 0.205,
    ("flow-sde-all", 0.5): 0.238,
    ("flow-sde-all", 0.7): 0.269,
}


@pytest.mark.parametrize("noise, level", [*MEASURED, ("flow-cps", 0.5), ("flow-cps-all", 0.5), ("flow-cps", 0.8)])
def test_four_steps_have_the_known_bias(tiny_checkpoint, noise, level):
    mean, std = closed_form(noise, level, 4)
    assert (noise, level) not in MEASURED or abs(std - MEASURED[noise, level]) < 0.002
    x = generate(tiny_checkpoint, GAUSSIAN, noise, level, 4)
    assert abs(x.mean() - mean) < 0.003 and abs(x.std() - std) < 0.003


def wrong_step(term: str):
    def step(x, v, k, steps, cps, level):
        mean, std = stochastic_step(x, v, k, steps, cps, level)
        t = (k.float() / steps)[:, None, None]
        if term == "no drift":
            mean = x + v / steps
        elif term == "twice the drift":
            mean = 2 * mean - (x + v / steps)
        elif term == "t without a floor of dt":
            std = torch.where(t == 0, std * 2, std)
        elif term == "sigma 10% off":
            std = std * 1.1
        elif term == "sigma of the next t":
            std = std * ((1 - t - 1 / steps).clamp(min=0.01) / (1 - t)).sqrt()
        return mean, std

    return step


@pytest.mark.parametrize(
    "term", ["no drift", "twice the drift", "t without a floor of dt", "sigma 10% off", "sigma of the next t"]
)
def test_a_wrong_term_shows_in_the_distribution(tiny_checkpoint, term, monkeypatch):
    """What the test above asserts does not hold for a sampler with a mistake."""
    monkeypatch.setattr(grpo_gr00t, "stochastic_step", wrong_step(term))
    for noise in ("flow-sde", "flow-sde-all"):
        x = generate(tiny_checkpoint, GAUSSIAN, noise, 0.7, 4)
        assert abs(x.std() - closed_form(noise, 0.7, 4)[1]) > 0.004


# ---------------------------------------------------------------- log-probability, KL, ratio


def test_gaussian_log_prob_is_that_of_torch():
    g = torch.Generator().manual_seed(0)
    y, mean = torch.randn(2, 5, 3, 4, 2, generator=g)
    std = torch.rand(5, 3, 1, 1, generator=g) + 0.1
    expected = Normal(mean.double(), std.double()).log_prob(y.double()).sum((-2, -1))
    assert torch.allclose(gaussian_log_prob(y, mean, std).double(), expected, rtol=1e-5, atol=1e-4)


def test_log_prob_covers_executed_steps_and_real_dimensions(tiny_checkpoint):
    _, policy = make(tiny_checkpoint)
    y, mean, std = torch.zeros(1, 1, HORIZON, ACTION_DIM), torch.zeros(1, 1, HORIZON, ACTION_DIM), torch.ones(1, 1, 1, 1)
    counted = torch.zeros(HORIZON, ACTION_DIM, dtype=torch.bool)
    for h in range(HORIZON):
        for a in range(ACTION_DIM):
            other = y.clone()
            other[..., h, a] = 1.0
            counted[h, a] = bool(policy.log_prob(other, mean, std) != policy.log_prob(y, mean, std))
    assert counted[: policy.chunk, :VALID].all()
    assert int(counted.sum()) == policy.chunk * VALID == 16


def numerical_kl(mean: Tensor, base: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std) || N(base, std)) per sample (B,): quadrature of p log(p / q) in float64, dimension by dimension."""
    mean, base, std = mean.double(), base.double(), std.double().expand_as(mean)
    z = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    p, q = Normal(mean[..., None], std[..., None]), Normal(base[..., None], std[..., None])
    y = mean[..., None] + std[..., None] * z
    integral = (p.log_prob(y).exp() * (p.log_prob(y) - q.log_prob(y))).sum(-1) * (z[1] - z[0]) * std
    return integral.sum((1, 2, 3))


@pytest.mark.parametrize("noise", NOISES)
def test_kl_is_the_numerical_kl(tiny_checkpoint, noise):
    args, policy = make(tiny_checkpoint, noise=noise, kl_coef=0.1)
    batch, rows = collect(args, policy), torch.arange(0, 64, 5)
    assert grpo_loss(policy, batch, rows, args, True)[1]["base_per_step"][:, 0].sum() == 0
    perturb(policy)
    sums = grpo_loss(policy, batch, rows, args, True)[1]
    obs, chain = batch.samples(rows)
    with torch.no_grad():
        _, mean, std = policy.evaluate(obs, chain)
        base = policy.base_mean(obs, chain)
    expected = float(numerical_kl(mean, base, std).sum())
    assert expected > 0.1 and math.isclose(float(sums["base_per_step"][:, 0].sum()), expected, rel_tol=1e-4)


def test_kl_is_always_logged_and_enters_the_loss_by_its_coefficient(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, kl_coef=0.0, minibatches=2, epochs=2)
    batch, rows = collect(args, policy), torch.arange(16)
    perturb(policy)
    plan = plan_minibatches(batch, args, 0, ALONE)
    still = torch.optim.SGD(policy.trainable(), lr=0.0)
    sums, extremes = update(policy, still, batch, plan, args, ALONE)
    assert sums["kl_samples"] == len(plan[0][0])  # the first minibatch
    assert describe_iteration(batch, sums, extremes, args, ALONE)["update/kl_base"] > 0
    args.kl_coef = 0.1
    assert update(policy, still, batch, plan, args, ALONE)[0]["kl_samples"] == sum(len(rows) for rows, _ in plan)

    batch.flat["advantage"].zero_()  # what is left is the KL
    args.kl_coef = 0.0
    assert backward(policy, grpo_loss(policy, batch, rows, args, True)[0]).abs().max() == 0
    args.kl_coef = 0.1
    found = backward(policy, grpo_loss(policy, batch, rows, args, True)[0])
    obs, chain = batch.samples(rows)
    _, mean, std = policy.evaluate(obs, chain)
    base = policy.evaluate(obs, chain, policy.base_head)[1].detach()
    kl = torch.distributions.kl_divergence(Normal(mean, std.expand_as(mean)), Normal(base, std.expand_as(mean))).sum((1, 2, 3))
    expected = backward(policy, 0.1 * (batch.select("weight", rows) * kl).sum())
    assert close(found, expected, 1e-5)
    args.kl_coef = 0.2
    assert close(backward(policy, grpo_loss(policy, batch, rows, args, True)[0]), 2 * expected, 1e-5)
    assert all(p.grad is None for p in policy.base_head.parameters())


@pytest.mark.parametrize("noise", NOISES)
def test_ratio_is_one_before_the_first_update(tiny_checkpoint, noise):
    args, policy = make(tiny_checkpoint, noise=noise, micro_batch_size=7)
    obs = observation(30)
    out = policy.act(obs, Noise("cpu", ALONE, 1, 2), explore=True)
    assert out.action.shape == (30, 4, VALID) and policy.chunk < HORIZON
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    for rows in order.split(11):
        chain = Chain(*(x[rows] for x in out.chain))
        kept = Observation(obs.images[rows], obs.state[rows], obs.prompt[rows], out.features[rows])
        log_prob, _, _ = policy.evaluate(kept, chain)
        assert ((log_prob - chain.log_prob).sum(1).exp() - 1).abs().max() < 1e-5
    batch = collect(args, policy)
    plan = plan_minibatches(batch, args, 0, ALONE)
    _, extremes = update(policy, torch.optim.SGD(policy.trainable(), 0.0), batch, plan, args, ALONE)
    assert extremes["first_ratio_error"] < 1e-5
    perturb(policy)
    assert grpo_loss(policy, batch, order, args, False)[2] > 1e-3  # and the figure says so when it is not


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("noise", NOISES)
def test_gradient_at_ratio_one_is_the_policy_gradient(tiny_checkpoint, noise):
    args, policy = make(tiny_checkpoint, noise=noise)
    batch = collect(args, policy)
    rows = plan_minibatches(batch, args, 0, ALONE)[0][0]
    found = backward(policy, grpo_loss(policy, batch, rows, args, False)[0])
    log_prob, _, _ = policy.evaluate(*batch.samples(rows))
    weight = batch.select("weight", rows) * batch.select("advantage", rows)
    assert close(found, backward(policy, -(weight * log_prob.sum(1)).sum()), 1e-5)


@pytest.mark.parametrize(
    "advantage, ratio, passes",
    [(1, 1.5, False), (1, 0.5, True), (1, 1.1, True), (-1, 0.5, False), (-1, 1.5, True), (-1, 0.9, True)],
)
def test_clipping(tiny_checkpoint, advantage, ratio, passes):
    args, policy = make(tiny_checkpoint, clip=0.2)
    batch, row = collect(args, policy), torch.tensor([3])
    batch.flat["advantage"][row] = float(advantage)
    plain = backward(policy, grpo_loss(policy, batch, row, args, False)[0])
    batch.flat["log_prob"][row] -= math.log(ratio)
    loss, sums, _ = grpo_loss(policy, batch, row, args, False)
    expected = torch.zeros_like(plain) + ratio * plain if passes else torch.zeros_like(plain)
    found = backward(policy, loss)
    assert found.abs().max() == 0 if not passes else close(found, expected, 1e-4)
    clipped = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert math.isclose(float(loss.detach()), -float(batch.flat["weight"][row]) * clipped, rel_tol=1e-4)
    assert sums["clip_frac"] == (abs(ratio - 1) > 0.2) == sums["per_step"][:, 0].sum()
    own = sums["per_step"][batch.flat["k"][3, 0]]  # clip fraction, ratio, approximate KL, number
    assert own[0] == sums["clip_frac"] and math.isclose(own[1], ratio, rel_tol=1e-4) and own[3] == 1
    assert math.isclose(own[2], ratio - 1 - math.log(ratio), rel_tol=1e-2, abs_tol=1e-5)


def test_log_ratio_is_clamped(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, log_ratio_clamp=2.0)
    batch, row = collect(args, policy), torch.tensor([3])
    batch.flat["advantage"][row] = -1.0  # not bounded by the clip
    batch.flat["log_prob"][row] -= 1000.0
    loss, _, error = grpo_loss(policy, batch, row, args, False)
    assert math.isclose(float(loss.detach()), float(batch.flat["weight"][row]) * math.exp(2.0), rel_tol=1e-5)
    assert math.isclose(float(error), math.exp(2.0) - 1, rel_tol=1e-5)
    assert backward(policy, loss).abs().max() == 0
    batch.flat["log_prob"][row] += 2000.0
    assert math.isclose(float(grpo_loss(policy, batch, row, args, False)[2]), 1 - math.exp(-2.0), rel_tol=1e-5)


# ---------------------------------------------------------------- samples, weights, minibatches


def test_episodes_weigh_the_same_and_masked_samples_stay_out(tiny_checkpoint):
    """Eight episodes of four chunks: the first group has 1, 4, 3 and 4 valid chunks; the second one never succeeds."""
    args, policy = make(tiny_checkpoint, chunk=8, minibatches=3, epochs=2)
    batch = collect(args, policy, [1, 99, 3, 99, 99, 99, 99, 99])
    assert torch.equal(batch.flat["keep"].view(4, 8).sum(0), torch.tensor([1, 4, 3, 4, 0, 0, 0, 0]))
    assert torch.equal(batch.flat["advantage"].view(4, 8)[0], torch.tensor([0.5, -0.5, 0.5, -0.5, 0, 0, 0, 0]))
    plan = plan_minibatches(batch, args, 0, ALONE)
    assert [len(rows) for rows, _ in plan] == [int(size) for _, size in plan] == [4] * 6
    kept = torch.nonzero(batch.flat["keep"])[:, 0]
    for epoch in (plan[:3], plan[3:]):
        assert torch.equal(torch.cat([rows for rows, _ in epoch]).sort().values, kept)
    assert not torch.equal(plan[0][0], plan[3][0])
    weight = torch.where(batch.flat["keep"], batch.flat["weight"], 0.0).view(4, 8).sum(0)
    assert torch.allclose(weight[:4], weight[0].expand(4)) and weight[4:].sum() == 0
    assert math.isclose(float(batch.flat["weight"][kept].mean()), 1.0, rel_tol=1e-6)
    again = plan_minibatches(batch, args, 0, ALONE)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(plan, again))
    assert not torch.equal(plan[0][0], plan_minibatches(batch, args, 1, ALONE)[0][0])


def test_without_a_gradient_nothing_is_updated(tiny_checkpoint):
    args, policy = make(tiny_checkpoint)
    batch = collect(args, policy, [99] * 8)
    before = [p.clone() for p in policy.trainable()]
    optimizer = torch.optim.AdamW(policy.trainable(), 1e-2, weight_decay=0.1)
    sums, extremes = update(policy, optimizer, batch, plan_minibatches(batch, args, 0, ALONE), args, ALONE)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable()))
    metrics = describe_iteration(batch, sums, extremes, args, ALONE)
    assert metrics["rollout/zero_variance_share"] == 1 and metrics["rollout/samples"] == 0


def test_micro_batches_add_up(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, kl_coef=0.01)
    batch = collect(args, policy)
    perturb(policy)
    whole = update_gradient(args, policy, batch)
    args.micro_batch_size = 7
    assert close(update_gradient(args, policy, batch), whole, 1e-5)


def test_kept_features_give_the_same_gradient_faster(tiny_checkpoint):
    runs = {}
    for cache in ("gpu", "cpu", "off"):
        args, policy = make(tiny_checkpoint, feature_cache=cache, kl_coef=0.01)
        batch = collect(args, policy)
        assert ("features" in batch.flat) == (cache != "off")
        perturb(policy)
        runs[cache] = args, policy, batch, update_gradient(args, policy, batch)
    for cache in ("cpu", "off"):
        assert close(runs[cache][3], runs["gpu"][3], 1e-5)
    seconds = {"gpu": [], "off": []}
    for _ in range(9):
        for cache, found in seconds.items():
            args, policy, batch, _ = runs[cache]
            plan = plan_minibatches(batch, args, 0, ALONE)
            optimizer = torch.optim.SGD(policy.trainable(), 0.0)
            start = time.process_time()  # one thread: what other processes do does not matter
            update(policy, optimizer, batch, plan, args, ALONE)
            found.append(time.process_time() - start)
    kept, recomputed = (statistics.median(seconds[cache]) for cache in ("gpu", "off"))
    print(f"update: {kept * 1e3:.1f} ms with kept features, {recomputed * 1e3:.1f} ms without")
    assert kept < recomputed


def test_noise_does_not_depend_on_the_split():
    whole = Noise("cpu", ALONE, 3, 4)
    expected = [whole.normal(8, 2, 3), whole.integers(8, 5), whole.normal(8, 2)]
    for world in (2, 4):
        for rank in range(world):
            part, n = Noise("cpu", Ranks(rank, world), 3, 4), 8 // world
            for found, x in zip([part.normal(n, 2, 3), part.integers(n, 5), part.normal(n, 2)], expected):
                assert torch.equal(found, x[rank * n : (rank + 1) * n])
    assert torch.equal(Noise("cpu", ALONE, 3, 4).normal(8, 2, 3), expected[0])
    for other in ((3, 5), (4, 4), (3,)):
        assert not torch.equal(Noise("cpu", ALONE, *other).normal(8, 2, 3), expected[0])


# ---------------------------------------------------------------- two processes


def first_update(args: Args, policy: Gr00tActor, batch: Batch, ranks: Ranks) -> Tensor:
    """The parameters after one step of the script's AdamW, and of SGD at rate 1; the (clipped) gradient: (3, P)."""
    plan, before = plan_minibatches(batch, args, 0, ranks), [p.detach().clone() for p in policy.trainable()]
    rows = []
    for optimizer in (
        torch.optim.AdamW(policy.trainable(), args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
        torch.optim.SGD(policy.trainable(), 1.0),
    ):
        update(policy, optimizer, batch, plan, args, ranks)
        rows.append(torch.cat([p.detach().flatten() for p in policy.trainable()]))
        with torch.no_grad():
            for p, value in zip(policy.trainable(), before):
                p.copy_(value)
    return torch.stack([*rows, gradient(policy)])


def one_rank(rank: int, port: int, checkpoint: str, folder: str) -> None:
    """One of two processes, as torchrun would start it: every stored batch, its own half of the environments."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    ranks = Ranks.start("cpu")
    for name in ("halves", "one_empty"):
        args, policy = make(checkpoint, kl_coef=0.01, max_grad_norm=1.0)
        batch, flat = Batch(args, 8), torch.load(f"{folder}/{name}.pt")
        rows = torch.arange(64).view(8, 8)[:, rank * 4 : rank * 4 + 4].flatten()
        batch.flat = {key: value[rows] for key, value in flat.items()}
        if rank == 0 or name == "halves":
            assert batch.flat["keep"].any()
        torch.save(first_update(args, policy, batch, ranks), f"{folder}/{name}_{rank}.pt")
    ranks.stop()


def test_two_processes_make_the_same_first_update(tiny_checkpoint, tmp_path):
    expected = {}
    for name, first_success in (("halves", MIXED), ("one_empty", MIXED[:4] + [99] * 4)):
        args, policy = make(tiny_checkpoint, kl_coef=0.01, max_grad_norm=1.0)
        batch = collect(args, policy, first_success)
        torch.save(batch.flat, tmp_path / f"{name}.pt")
        expected[name] = first_update(args, policy, batch, ALONE)
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
    for name, parameters in expected.items():
        found = [torch.load(tmp_path / f"{name}_{rank}.pt") for rank in range(2)]
        assert torch.equal(*found)
        adam, sgd, grad = (found[0] - parameters).abs()
        assert 0.9 < parameters[2].norm() < 1.1  # of the clipped gradient
        assert sgd.max() < 1e-6 and grad.max() < 1e-6
        # Adam divides by |gradient| + 1e-8: where a gradient is mere rounding, the step is, too
        assert adam[parameters[2].abs() > 1e-8].max() < 1e-6 and adam.max() < 2 * args.learning_rate


# ---------------------------------------------------------------- training


@pytest.fixture
def logger(tmp_path):
    logger = RunLogger(tmp_path / "run", {}, script=grpo_gr00t.__file__, total_iterations=1, track=False)
    yield logger
    logger.close()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_stops_the_run(logger, value):
    check_finite({"update/loss": 1.0, "update/first_ratio_error": 1e-6}, 0, logger, tolerance=1e-5)
    with pytest.raises(UsageError, match="update/loss.*--learning-rate"):
        check_finite({"update/loss": value, "update/grad_norm": 1.0}, 3, logger)
    with pytest.raises(UsageError, match="ratio"):
        check_finite({"update/first_ratio_error": 1e-3}, 0, logger, tolerance=1e-5)


def test_gradients_that_are_nan_show(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, minibatches=4)
    batch = collect(args, policy)
    plan = plan_minibatches(batch, args, 0, ALONE)
    batch.flat["advantage"][plan[2][0][0]] = math.nan  # one sample of the third of four minibatches
    optimizer = torch.optim.SGD(policy.trainable(), 0.0)
    metrics = describe_iteration(batch, *update(policy, optimizer, batch, plan, args, ALONE), args, ALONE)
    assert math.isnan(metrics["update/grad_norm"]) and math.isnan(metrics["update/loss"])


def test_learning_rate(tiny_checkpoint):
    args, _ = make(tiny_checkpoint, learning_rate=1e-3, iterations=100, lr_hold=0.5, lr_warmup=0)
    rates = [learning_rate(args, i) for i in range(101)]
    assert rates[:51] == [1e-3] * 51
    assert math.isclose(rates[75], 0.55e-3) and math.isclose(rates[100], 1e-4)
    assert rates == sorted(rates, reverse=True)
    args.lr_warmup = 9
    assert all(math.isclose(learning_rate(args, i), (i + 1) * 1e-4) for i in range(10))
    assert [learning_rate(args, i) for i in range(9, 101)] == rates[9:]
    args.lr_hold, args.lr_warmup = 1.0, 0
    assert learning_rate(args, 99) == 1e-3
    args.lr_hold = 0.0
    assert learning_rate(args, 0) == 1e-3 and math.isclose(learning_rate(args, 50), 0.55e-3)


# ---------------------------------------------------------------- checkpoints


def test_checkpoints(tiny_checkpoint, logger, monkeypatch):
    args, policy = make(tiny_checkpoint, keep_checkpoints=2)
    optimizer = torch.optim.AdamW(policy.trainable(), 1e-3)
    batch = collect(args, policy)
    update(policy, optimizer, batch, plan_minibatches(batch, args, 0, ALONE), args, ALONE)
    folder = logger.run_dir / "checkpoints"
    assert latest_checkpoint(logger.run_dir) is None
    run = {"iteration": 0, "elapsed": 1.5, "before": {"mean": 0.5, "low": 0.4, "high": 0.6, "episodes": 8}, "best": -1.0}
    for i in (1, 2, 3):
        save_checkpoint(args, policy, optimizer, run | {"iteration": i}, f"step_{i:06d}", logger)
    save_checkpoint(args, policy, None, run, "best", logger)
    assert sorted(p.name for p in folder.iterdir()) == ["best", "step_000002", "step_000003"]
    newest = latest_checkpoint(logger.run_dir)
    assert newest == folder / "step_000003"

    state = torch.load(newest / "trainer_state.pt", weights_only=True)
    saved = state.pop("optimizer")
    assert state == run | {"iteration": 3}
    fresh = torch.optim.AdamW(policy.trainable(), 1e-3)
    fresh.load_state_dict(saved)
    for p in policy.trainable():
        assert torch.equal(fresh.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])

    obs, expected = observation(5), policy.act(observation(5), Noise("cpu", ALONE, 1)).action
    for name in ("best", "step_000003"):
        Gr00tN1d5.from_pretrained(folder / name)
        _, loaded = make(folder / name)
        assert torch.equal(loaded.act(obs, Noise("cpu", ALONE, 1)).action, expected)
    _, untrained = make(tiny_checkpoint)
    assert not torch.equal(untrained.act(obs, Noise("cpu", ALONE, 1)).action, expected)

    def bytes_of(path):
        return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}

    before = bytes_of(folder)
    whole = policy.save

    def full_disk(partial):
        whole(partial)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    perturb(policy)
    monkeypatch.setattr(policy, "save", full_disk)
    for name in ("step_000004", "step_000003", "best"):
        save_checkpoint(args, policy, optimizer, run, name, logger)  # the run goes on
        assert bytes_of(folder) == before
        said = (logger.run_dir / "log.txt").read_text().splitlines()[-1]
        assert name in said and "No space left" in said
    monkeypatch.undo()

    (folder / "step_000009").mkdir()  # partial ones: without the trainer's state, or not yet renamed
    (folder / ".step_000010.partial").mkdir()
    (folder / ".step_000010.partial" / "trainer_state.pt").touch()
    assert latest_checkpoint(logger.run_dir) == newest
