"""GRPO's mathematics and bookkeeping, through grpo_gr00t.py's own functions: a tiny random GR00T, no simulator."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributions import Normal

import grpo_gr00t
from common import Metrics, Noise, Ranks, StageTimer
from grpo_gr00t import (
    TASKS,
    Args,
    Gr00tActor,
    advantages,
    check_ratio,
    gaussian_log_prob,
    grpo_loss,
    learning_rate,
    plan_minibatches,
    rollout,
    stochastic_step,
    update,
)
from tests.test_common import on_two_ranks

torch.set_num_threads(1)
ALONE, TASK = Ranks(0, 1), "Tabletop-Lift-Cube-v0"
HORIZON, ACTION_DIM, VALID = 8, 6, 4  # of the fixture's network
MIXED = (1, 99, 3, 99, 2, 99, 99, 5)  # two groups of four, both with failures and successes


def make(checkpoint, **overrides) -> tuple[Args, Gr00tActor]:
    """Arguments and policy; a chunk is half of the model's horizon, so T = 8 chunks an episode."""
    wanted = {"num_envs": 8, "group_size": 4, "chunk": 4, "minibatches": 1, **overrides}
    args = Args(checkpoint=str(checkpoint), device="cpu", **wanted)
    return args, Gr00tActor(args)


def observation(n: int, seed: int = 0) -> TensorDict:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 1, 64, 64, 3), generator=g, dtype=torch.uint8)
    return TensorDict({"images": images, "state": torch.randn(n, 5, generator=g), "prompt": torch.arange(n) % 2}, n)


class Episodes:
    """In the place of ChunkEnv: generated observations, and success of episode i with its first_success[i]-th chunk."""

    def __init__(self, first_success):
        self.task, self.ends = TASKS[TASK], torch.tensor(first_success)

    def reset(self, seed: int, group_size: int = 1, bank=None) -> TensorDict:
        self.chunks = 0
        return self.observe()

    def step_chunk(self, actions: Tensor, last: bool = False) -> TensorDict | None:
        self.chunks += 1
        return None if last else self.observe()

    def observe(self) -> TensorDict:
        return observation(len(self.ends), seed=self.chunks)

    @property
    def ended(self) -> Tensor:
        return self.ends <= self.chunks

    success = ended


def collect(args: Args, policy: Gr00tActor, first_success=MIXED, ranks: Ranks = ALONE, log: Metrics | None = None):
    """A rollout's samples (T, N) with advantages and weights, and which carry a gradient (T, N); a rank's share of them."""
    env, n = Episodes(first_success), len(first_success) // ranks.world
    own = slice(ranks.rank * n, (ranks.rank + 1) * n)
    samples = rollout(env, policy, args, 0, ALONE, StageTimer("cpu"))[:, own]
    return samples, advantages(samples, env.success[own], args, ranks, log or Metrics("cpu", ranks))


def flat(samples: TensorDict, rows: Tensor) -> TensorDict:
    return samples.flatten(0, 1)[rows].clone()


def loss_of(policy, batch, args, first=False) -> tuple[Tensor, dict]:
    log = Metrics("cpu", ALONE)
    loss = grpo_loss(policy, batch, args, log, first)
    return loss, log.read()


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


def updated(args, policy, samples, keep, ranks=ALONE, optimizer=None, clip=True) -> tuple[Tensor, dict]:
    """The gradient that `update` accumulates, and its figures; without an optimizer no step is made."""
    optimizer, log = optimizer or torch.optim.SGD(policy.trainable(), lr=0.0), Metrics("cpu", ranks)
    update(policy, optimizer, samples, plan_minibatches(keep, args, 0, ranks), args, ranks, log)
    return gradient(policy), log.read()


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether the difference is small against the norm."""
    assert b.norm() > 0
    return float((a - b).norm() / b.norm()) < tolerance


# ---------------------------------------------------------------- prompts


def change_row(monkeypatch, **changes) -> None:
    monkeypatch.setitem(TASKS, TASK, dataclasses.replace(TASKS[TASK], **changes))


def means(policy, obs: TensorDict) -> Tensor:
    """What the policy makes of observations: means (B, chunk, valid) of stochastic steps from fixed noise."""
    n, g = len(obs), torch.Generator().manual_seed(1)
    x, y = torch.randn(4, 2, HORIZON, ACTION_DIM, generator=g)[:n].unbind(1)
    return policy.evaluate(TensorDict({**obs, "x": x, "y": y, "k": torch.ones(n, dtype=torch.long)}, n))[1].detach()


def test_instructions_of_several_lengths_do_not_disturb_each_other(tiny_checkpoint, monkeypatch):
    """Each does in a mixed batch what it does alone; features that were kept give the same."""
    obs, texts = observation(4), ("lift the red cube", "lift cube")
    change_row(monkeypatch, instructions=texts)
    _, policy = make(tiny_checkpoint)
    assert policy.mixed
    mixed = means(policy, obs)
    assert torch.equal(mixed, means(policy, obs.exclude("images").set("features", policy.features(obs).detach())))
    for i, text in enumerate(texts):
        change_row(monkeypatch, instructions=(text,))
        _, single = make(tiny_checkpoint)
        own = obs.clone().set("prompt", torch.zeros(4, dtype=torch.long))
        assert torch.allclose(means(single, own)[i::2], mixed[i::2], atol=2e-6)
        assert not torch.allclose(means(single, own)[1 - i :: 2], mixed[1 - i :: 2], atol=1e-4)  # it matters


def test_form_of_the_prompts(tiny_checkpoint, monkeypatch):
    """The head sees a row's padding, as RLinf's does; brackets change the words."""
    obs, plain = observation(4), make(tiny_checkpoint)[1]
    change_row(monkeypatch, pad_prompt=24)
    padded, real = make(tiny_checkpoint)[1], plain.prompts.shape[1]
    features = padded.features(obs)
    assert padded.prompts.shape[1] == features.shape[1] == 24
    assert torch.allclose(features[:, :real], plain.features(obs), atol=1e-6)
    assert torch.equal(features[:, real:], padded.net.backbone.padding_feature().expand_as(features[:, real:]))
    assert not torch.allclose(means(padded, obs), means(plain, obs), atol=1e-4)
    change_row(monkeypatch, pad_prompt=7)
    with pytest.raises(SystemExit, match="^--instruction: .*cannot be padded to 7"):
        make(tiny_checkpoint)
    change_row(monkeypatch, pad_prompt=None, bracketed=True)
    with pytest.raises(SystemExit, match=r"^--instruction: .*\['lift"):  # no such word in the tiny vocabulary
        make(tiny_checkpoint)


# ---------------------------------------------------------------- the sampler keeps the distribution

GAUSSIAN = ((1.0, 0.5, 0.3),)  # (weight, mean, std) of the data's components
MIXTURE = ((0.3, -0.8, 0.1), (0.7, 0.8, 0.1))


def exact_velocity(components):
    """E[action - noise | x_t] for data from a mixture of Gaussians, in the place of Gr00tPolicy.velocity."""

    def velocity(x: Tensor, k: Tensor, steps: int, context, head=None) -> Tensor:
        t = float(k[0]) / steps
        log_weight, v = [], []
        for w, mu, s in components:
            variance = (1 - t) ** 2 + t**2 * s**2  # of x_t
            d = x - t * mu
            log_weight.append(math.log(w) - 0.5 * d**2 / variance - 0.5 * math.log(variance))
            v.append(mu + (t * s**2 - (1 - t)) / variance * d)
        return (torch.softmax(torch.stack(log_weight), 0) * torch.stack(v)).sum(0)

    return velocity


def generate(checkpoint, components, level: float | None, steps: int, n: int = 4096) -> Tensor:
    """48 n samples by Gr00tActor.denoise with the exact velocity; without a level no step is stochastic."""
    _, policy = make(checkpoint, noise_level=level or 1.0, denoise_steps=steps)
    policy.velocity, policy.encode, policy.unnormalize = exact_velocity(components), lambda obs: None, lambda x: x
    policy.chunk, g = HORIZON, torch.Generator().manual_seed(3)
    obs = {"features": torch.zeros(n, 1, 1), "start": torch.randn(n, HORIZON, ACTION_DIM, generator=g)}
    if level:
        obs |= {"k": torch.randint(steps, (n,), generator=g), "eps": torch.randn(n, HORIZON, ACTION_DIM, generator=g)}
    return policy.denoise(TensorDict(obs, n))["action"].flatten()


def closed_form(level: float | None, steps: int) -> tuple[float, float]:
    """Exact mean and std of the sampler's output for GAUSSIAN data, where every step is linear in x.

    The drift of Flow-SDE is written with the marginal's score: v + sigma^2 / 2 * score.
    """
    (_, mu, s), dt, moments = GAUSSIAN[0], 1 / steps, []
    for chosen in range(steps):
        mean, variance = 0.0, 1.0
        for k in range(steps):
            t = k * dt
            marginal = (1 - t) ** 2 + t**2 * s**2
            slope = (t * s**2 - (1 - t)) / marginal  # v = slope x + offset
            a, b, added = 1 + slope * dt, (mu - slope * t * mu) * dt, 0.0
            if level and k == chosen:
                sigma2 = level**2 * (1 - t) / max(t, dt)
                a, b, added = a - sigma2 / 2 * dt / marginal, b + sigma2 / 2 * dt * t * mu / marginal, sigma2 * dt
            mean, variance = a * mean + b, a * a * variance + added
        moments.append((mean, variance))
    mean = statistics.fmean(m for m, _ in moments)
    return mean, (statistics.fmean(v + m * m for m, v in moments) - mean**2) ** 0.5


@pytest.mark.parametrize("level", [None, 0.7])
def test_many_steps_keep_the_distribution(tiny_checkpoint, level):
    """K = 64: means within 0.01 (a std is 0.3 or 0.1), stds within 6%, mode weights within 0.01."""
    x = generate(tiny_checkpoint, GAUSSIAN, level, 64)
    assert abs(x.mean() - 0.5) < 0.01 and abs(x.std() / 0.3 - 1) < 0.06
    x = generate(tiny_checkpoint, MIXTURE, level, 64)
    assert abs((x > 0).float().mean() - 0.7) < 0.01
    for mode, centre in ((x[x > 0], 0.8), (x[x < 0], -0.8)):
        assert abs(mode.mean() - centre) < 0.01 and abs(mode.std() / 0.1 - 1) < 0.06


# std of 4 steps for a true 0.3, measured with 400k float64 samples of a separate program: every sampler is biased
@pytest.mark.parametrize("level, measured", [(None, 0.177), (0.3, 0.185), (0.5, 0.201), (0.7, 0.227)])
def test_four_steps_have_the_known_bias(tiny_checkpoint, level, measured):
    mean, std = closed_form(level, 4)
    assert abs(std - measured) < 0.002
    x = generate(tiny_checkpoint, GAUSSIAN, level, 4)
    assert abs(x.mean() - mean) < 0.003 and abs(x.std() - std) < 0.003


# ---------------------------------------------------------------- log-probability, KL, ratio


def test_gaussian_log_prob_is_that_of_torch():
    g = torch.Generator().manual_seed(0)
    y, mean = torch.randn(2, 5, 4, 2, generator=g)
    std = torch.rand(5, 1, 1, generator=g) + 0.1
    expected = Normal(mean.double(), std.double()).log_prob(y.double()).sum((-2, -1))
    assert torch.allclose(gaussian_log_prob(y, mean, std).double(), expected, rtol=1e-5, atol=1e-4)


def test_log_prob_covers_executed_steps_and_real_dimensions(tiny_checkpoint):
    _, policy = make(tiny_checkpoint)
    y = torch.zeros(HORIZON * ACTION_DIM + 1, HORIZON, ACTION_DIM)
    y.flatten(1)[1:] = torch.eye(HORIZON * ACTION_DIM)  # one number changes at a time
    log_prob = policy.log_prob(y, torch.zeros_like(y), torch.ones(len(y), 1, 1))
    counted = (log_prob[1:] != log_prob[0]).view(HORIZON, ACTION_DIM)
    assert counted[: policy.chunk, :VALID].all() and counted.sum() == policy.chunk * VALID == 16


def numerical_kl(mean: Tensor, base: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std) || N(base, std)) per sample (B,): quadrature of p log(p / q) in float64, dimension by dimension."""
    mean, base, std = mean.double(), base.double(), std.double().expand_as(mean)
    z = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    p, q = Normal(mean[..., None], std[..., None]), Normal(base[..., None], std[..., None])
    y = mean[..., None] + std[..., None] * z
    integral = (p.log_prob(y).exp() * (p.log_prob(y) - q.log_prob(y))).sum(-1) * (z[1] - z[0]) * std
    return integral.sum((1, 2))


def test_kl_is_the_numerical_kl(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, kl_coef=0.1)
    batch = flat(collect(args, policy)[0], torch.arange(0, 64, 5))
    assert loss_of(policy, batch, args)[1]["update/kl_base"] == 0
    perturb(policy)
    found = loss_of(policy, batch, args)[1]
    with torch.no_grad():
        _, mean, std = policy.evaluate(batch)
        expected = numerical_kl(mean, policy.base_mean(batch), std)
    assert expected.mean() > 0.01 and math.isclose(found["update/kl_base"], expected.mean(), rel_tol=1e-4)
    for k in range(policy.steps):
        assert math.isclose(found[f"update/kl_base_k{k}"], expected[batch["k"] == k].mean(), rel_tol=1e-4)


def test_kl_is_always_logged_and_enters_the_loss_by_its_coefficient(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, kl_coef=0.0, minibatches=2, epochs=2)
    samples, keep = collect(args, policy)
    perturb(policy)
    assert updated(args, policy, samples, keep)[1]["update/kl_base"] > 0
    batch = flat(samples, torch.arange(16))
    batch["advantage"].zero_()  # what is left is the KL
    assert backward(policy, loss_of(policy, batch, args, first=True)[0]).abs().max() == 0
    args.kl_coef = 0.1
    found = backward(policy, loss_of(policy, batch, args)[0])
    _, mean, std = policy.evaluate(batch)
    base = policy.evaluate(batch, policy.base_head)[1].detach()
    kl = torch.distributions.kl_divergence(Normal(mean, std.expand_as(mean)), Normal(base, std.expand_as(mean))).sum((1, 2))
    expected = backward(policy, 0.1 * (batch["weight"] * kl).sum())
    assert close(found, expected, 1e-5)
    args.kl_coef = 0.2
    assert close(backward(policy, loss_of(policy, batch, args)[0]), 2 * expected, 1e-5)
    assert all(p.grad is None for p in policy.base_head.parameters())


def test_ratio_is_one_before_the_first_update(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, micro_batch_size=7)
    samples, keep = collect(args, policy)
    assert samples.shape == (8, 8) and policy.chunk < HORIZON
    for rows in torch.randperm(64, generator=torch.Generator().manual_seed(0)).split(11):
        batch = flat(samples, rows)
        assert ((policy.evaluate(batch)[0] - batch["log_prob"]).exp() - 1).abs().max() < 1e-5
    _, figures = updated(args, policy, samples, keep)
    assert figures["update/first_ratio_error"] < 1e-5
    check_ratio(figures, args)
    check_ratio({}, args)  # no group carried a gradient
    perturb(policy)  # and the figure says so when it is not
    with pytest.raises(SystemExit, match="ratio on the first minibatch is off by"):
        check_ratio(updated(args, policy, samples, keep)[1], args)
    off, gpu = {"update/first_ratio_error": 2e-5}, dataclasses.replace(args, device="cuda:0")  # a tail's other kernel there
    check_ratio(off, gpu)
    check_ratio({"update/first_ratio_error": 0.05}, dataclasses.replace(gpu, precision="bf16"))
    for given in (args, dataclasses.replace(gpu, precision="fp32")):
        with pytest.raises(SystemExit, match="a bug"):
            check_ratio({"update/first_ratio_error": 2e-3}, given)


# ---------------------------------------------------------------- loss


def test_gradient_at_ratio_one_is_the_policy_gradient(tiny_checkpoint):
    args, policy = make(tiny_checkpoint)
    samples, keep = collect(args, policy)
    batch = flat(samples, plan_minibatches(keep, args, 0, ALONE)[0][0])
    found = backward(policy, loss_of(policy, batch, args)[0])
    log_prob, _, _ = policy.evaluate(batch)
    assert close(found, backward(policy, -(batch["weight"] * batch["advantage"] * log_prob).sum()), 1e-5)


@pytest.mark.parametrize(
    "advantage, ratio, passes",
    [(1, 1.5, False), (1, 0.5, True), (1, 1.1, True), (-1, 0.5, False), (-1, 1.5, True), (-1, 0.9, True)],
)
def test_clipping(tiny_checkpoint, advantage, ratio, passes):
    args, policy = make(tiny_checkpoint, clip=0.2)
    batch = flat(collect(args, policy)[0], torch.tensor([3]))
    batch["advantage"][:], batch["weight"][:] = float(advantage), 2.0
    plain = backward(policy, loss_of(policy, batch, args)[0])
    batch["log_prob"] -= math.log(ratio)
    loss, figures = loss_of(policy, batch, args)
    found = backward(policy, loss)
    assert close(found, ratio * plain, 1e-4) if passes else found.abs().max() == 0
    clipped = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert math.isclose(float(loss.detach()), -2 * clipped, rel_tol=1e-4)
    k = int(batch["k"])
    assert figures["update/clip_frac"] == figures[f"update/clip_frac_k{k}"] == (abs(ratio - 1) > 0.2)
    assert math.isclose(figures[f"update/approx_kl_k{k}"], ratio - 1 - math.log(ratio), rel_tol=1e-2, abs_tol=1e-5)


def test_a_ratio_beyond_all_bounds_gives_no_gradient(tiny_checkpoint):
    args, policy = make(tiny_checkpoint)
    batch = flat(collect(args, policy)[0], torch.tensor([3]))
    batch["advantage"][:], batch["weight"][:] = -1.0, 1.0  # the clip bounds the other side
    batch["log_prob"] -= 1000.0
    loss, _ = loss_of(policy, batch, args)
    assert math.isclose(float(loss.detach()), math.exp(20), rel_tol=1e-4) and backward(policy, loss).abs().max() == 0


# ---------------------------------------------------------------- samples, weights, minibatches


def test_episodes_weigh_the_same_and_masked_samples_stay_out(tiny_checkpoint):
    """Eight episodes of four chunks: the first group has 1, 4, 3 and 4 valid chunks; the second one never succeeds."""
    args, policy = make(tiny_checkpoint, chunk=8, minibatches=3, epochs=2)
    log = Metrics("cpu", ALONE)
    samples, keep = collect(args, policy, (1, 99, 3, 99, 99, 99, 99, 99), log=log)
    figures = log.read()
    assert figures["rollout/success"] == 2 / 8 and figures["rollout/samples"] == 12
    assert figures["rollout/zero_variance_share"] == 0.5
    assert torch.equal(keep.sum(0), torch.tensor([1, 4, 3, 4, 0, 0, 0, 0]))
    assert torch.equal(samples["advantage"][0], torch.tensor([0.5, -0.5, 0.5, -0.5, 0, 0, 0, 0]))
    plan = plan_minibatches(keep, args, 0, ALONE)
    assert [len(rows) for rows, _ in plan] == [int(size) for _, size in plan] == [4] * 6
    kept = torch.nonzero(keep.flatten())[:, 0]
    for epoch in (plan[:3], plan[3:]):
        assert torch.equal(torch.cat([rows for rows, _ in epoch]).sort().values, kept)
    assert not torch.equal(plan[0][0], plan[3][0])
    weight = samples["weight"].sum(0)
    assert torch.allclose(weight[:4], weight[0].expand(4)) and weight[4:].sum() == 0
    assert math.isclose(samples["weight"][keep].mean(), 1.0, rel_tol=1e-6)
    again, other = plan_minibatches(keep, args, 0, ALONE), plan_minibatches(keep, args, 1, ALONE)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(plan, again)) and not torch.equal(plan[0][0], other[0][0])


def test_without_a_gradient_nothing_is_updated(tiny_checkpoint):
    args, policy = make(tiny_checkpoint)
    samples, keep = collect(args, policy, [99] * 8)
    before = [p.clone() for p in policy.trainable()]
    optimizer = torch.optim.AdamW(policy.trainable(), 1e-2, weight_decay=0.1)
    assert plan_minibatches(keep, args, 0, ALONE) == [] and updated(args, policy, samples, keep, optimizer=optimizer)[1] == {}
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable()))


def test_micro_batches_and_the_place_of_features_do_not_change_the_gradient(tiny_checkpoint):
    found = []
    for cache, micro in (("gpu", 128), ("gpu", 7), ("cpu", 128), ("off", 128)):
        args, policy = make(tiny_checkpoint, feature_cache=cache, kl_coef=0.01)
        samples, keep = collect(args, policy)
        assert ("features" in samples.keys()) == (cache != "off") == ("images" not in samples.keys())
        perturb(policy)
        args.micro_batch_size = micro
        found.append(updated(args, policy, samples, keep)[0])
    assert all(close(other, found[0], 1e-5) for other in found[1:])


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


def first_update(checkpoint: str, first_success, ranks: Ranks) -> tuple[Tensor, dict]:
    """The parameters after one step of the script's AdamW, and of SGD at rate 1; the (clipped) gradient: (3, P)."""
    args, policy = make(checkpoint, kl_coef=0.01)
    samples, keep = collect(args, policy, first_success, ranks)
    before, rows = [p.detach().clone() for p in policy.trainable()], []
    for optimizer in (
        torch.optim.AdamW(policy.trainable(), args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
        torch.optim.SGD(policy.trainable(), 1.0),
    ):
        found, figures = updated(args, policy, samples, keep, ranks, optimizer)
        rows.append(torch.cat([p.detach().flatten() for p in policy.trainable()]))
        with torch.no_grad():
            for p, value in zip(policy.trainable(), before):
                p.copy_(value)
    return torch.stack([*rows, found]), figures


CASES = {"halves": MIXED, "one_empty": (*MIXED[:4], 99, 99, 99, 99)}  # the second rank has no gradient of its own


def updates_of_a_rank(ranks: Ranks, checkpoint: str, folder) -> None:
    for name, first_success in CASES.items():
        torch.save(first_update(checkpoint, first_success, ranks), folder / f"{name}_{ranks.rank}.pt")


def test_two_processes_make_the_same_first_update(tiny_checkpoint, tmp_path):
    on_two_ranks(updates_of_a_rank, str(tiny_checkpoint), tmp_path)
    for name, first_success in CASES.items():
        expected, figures = first_update(str(tiny_checkpoint), first_success, ALONE)
        (found, one), (other, two) = (torch.load(tmp_path / f"{name}_{rank}.pt") for rank in range(2))
        assert torch.equal(found, other) and one == two == pytest.approx(figures, rel=1e-4, abs=1e-5)
        adam, sgd, grad = (found - expected).abs()
        assert 0.9 < expected[2].norm() < 1.1  # of the clipped gradient
        assert sgd.max() < 1e-6 and grad.max() < 1e-6
        # Adam divides by |gradient| + 1e-8: where a gradient is mere rounding, the step is, too
        assert adam[expected[2].abs() > 1e-8].max() < 1e-6 and adam.max() < 2 * 1e-4


# ---------------------------------------------------------------- training


def test_gradients_that_are_nan_show(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, minibatches=4)
    samples, keep = collect(args, policy)
    row = plan_minibatches(keep, args, 0, ALONE)[2][0][0]
    samples["advantage"] = samples["advantage"].clone()
    samples["advantage"].view(-1)[row] = math.nan  # one sample of the third of four minibatches
    with pytest.raises(SystemExit, match="became nan or inf") as stopped:
        updated(args, policy, samples, keep)
    assert {"update/loss", "update/grad_norm"} <= set(str(stopped.value).replace(" became", ",").split(", "))


def test_learning_rate():
    args = Args(learning_rate=1e-3, iterations=100, lr_hold=0.5, lr_warmup=0)
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


def test_a_saved_policy_acts_the_same(tiny_checkpoint, tmp_path):
    _, policy = make(tiny_checkpoint)
    perturb(policy)
    obs, expected = observation(5), policy.act(observation(5), Noise("cpu", ALONE, 1))["action"]
    policy.save(tmp_path / "saved")
    _, loaded = make(tmp_path / "saved")
    _, resumed = make(tiny_checkpoint)
    assert not torch.equal(resumed.act(obs, Noise("cpu", ALONE, 1))["action"], expected)
    resumed.load(tmp_path / "saved")
    for other in (loaded, resumed):
        assert torch.equal(other.act(obs, Noise("cpu", ALONE, 1))["action"], expected)
    base = dict(grpo_gr00t.Gr00tActor.named_parameters(make(tiny_checkpoint)[1].base_head))
    assert all(torch.equal(p, base[name]) for name, p in resumed.base_head.named_parameters())  # of the first checkpoint


def test_stochastic_step_at_the_first_and_the_last_step():
    """By hand, at K = 4 and a = 0.8: t = 0 takes sigma's floor t = dt, and the last mean does not reach the action."""
    x, v, level = torch.tensor([[[0.3]], [[0.3]]]), torch.tensor([[[2.0]], [[2.0]]]), 0.8
    mean, std = stochastic_step(x, v, torch.tensor([0, 3]), 4, level)
    for i, t in enumerate((0.0, 0.75)):
        sigma2 = level**2 * (1 - t) / max(t, 0.25)
        score = -(0.3 - t * 2.0) / (1 - t)  # of x_t = (1 - t) noise + t action: -noise / (1 - t)
        assert math.isclose(mean[i], 0.3 + 0.25 * (2.0 + sigma2 / 2 * score), rel_tol=1e-5)
        assert math.isclose(std[i], (sigma2 * 0.25) ** 0.5, rel_tol=1e-6)
