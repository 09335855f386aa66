"""A look before a long run: whether a task starts, ends and looks as it should, and whether a policy acts on what it sees.

What a script's `--check` prints is made of these findings. Nothing here knows a network: a policy is a function

    act(obs, draw, explore=False) -> actions (N, chunk, d)        # the same draw: the same random numbers

and an environment is a script's `ChunkEnv`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from common import hms, peak_memory_gb, wilson_interval

if TYPE_CHECKING:
    from common import Ranks, Run

MANY = 0.2  # share of numbers beyond the checkpoint's data from which on something is odd
FEW = 0.05  # share of starts that may be over at once before a run is refused
SIGMAS = 3.0  # standard errors by which another order of cameras has to be better
DEAF, FAINT = 0.02, 0.2  # how far a swapped instruction moves actions, in what the sampler moves them by itself


class Finding(NamedTuple):
    """What one check has found."""

    verdict: str  # PASS, WARN or FAIL; skip: nothing to check; note: a figure
    name: str
    text: str  # what was measured, and what to do about it

    def __str__(self) -> str:
        return f"{self.verdict:4} {self.name}: {self.text}"


def judge(name: str, measured: str, fail: str | bool = False, warn: str | bool = False) -> Finding:
    """A finding; `fail` and `warn` say what is wrong and what to do, where there is something."""
    verdict, why = ("FAIL", fail) if fail else ("WARN", warn) if warn else ("PASS", "")
    return Finding(verdict, name, f"{measured}: {why}" if why else measured)


def report(found: list[Finding], run: Run, ranks: Ranks) -> None:
    """A line per finding, and summary.json; SystemExit where one has failed. Of other ranks, what is not as it should be."""
    every = ranks.gather(found)
    lines = [(finding, "") for finding in every[0]]
    lines += [(x, f" (rank {i})") for i, part in enumerate(every[1:], 1) for x in part if x.verdict in ("WARN", "FAIL")]
    for finding, whose in lines:
        run.event(f"{finding}{whose}")
    run.result(checks=[finding._asdict() for finding, _ in lines])
    failed = sum(finding.verdict == "FAIL" for finding, _ in lines)
    if failed:
        raise SystemExit(f"--check: {failed} of {sum(x.verdict in ('PASS', 'WARN', 'FAIL') for x, _ in lines)} checks failed")


# ------------------------------------------------------------------------------------------------------------------
# the task
# ------------------------------------------------------------------------------------------------------------------
class Episode(NamedTuple):
    """One episode in every environment, by the expert, or by the policy where there is none."""

    seen: TensorDict  # (2, N) observations: of the start, and of a chunk's boundary halfway
    actions: Tensor  # (2, N, chunk, d) that followed
    success: Tensor  # (N,)
    at_start: Tensor  # (2, N) success, failure: before anything was done
    at_once: Tensor  # (2, N) the same after the first step
    both: Tensor  # (N,) success and a failure were true of the same moment


def ends(env: Any) -> Tensor:
    """(2, N) success, failure: the terms as they were computed last."""
    terms = env.terminations
    failures = [terms.get_term(name) for name in terms.active_terms if name != "success"]
    return torch.stack([terms.get_term("success"), torch.stack(failures).any(0)])


@contextlib.contextmanager
def watched(env: Any) -> Iterator[list[Tensor]]:
    """Meanwhile, `ends` of every step."""
    seen, compute = [], env.terminations.compute

    def noted() -> Tensor:
        ended = compute()
        seen.append(ends(env))
        return ended

    env.terminations.compute = noted
    try:
        yield seen
    finally:
        del env.terminations.compute  # the class has its own


def play(env: Any, expert: Callable | None, act: Callable | None, chunk: int, seed: int) -> Episode:
    """An episode by the expert, or, where there is none, by the policy."""
    task = env.task
    env.reset(seed)
    env.terminations.compute()
    at_start = ends(env)
    obs, done = env.reset(seed), min(task.demo_steps or task.horizon, task.horizon)  # some terms count how often they are asked
    halfway, seen, actions = done // 2 // chunk * chunk, [], []
    with watched(env) as steps:
        for t in range(0, task.horizon // chunk * chunk, chunk):
            if t == halfway and t:
                obs = env.observe()
            if expert is None:
                chosen = act(obs, t)
                later = env.step_chunk(chosen)
            else:
                chosen = []
                for _ in range(chunk):
                    action = expert(env.env)
                    action = action.clamp(-task.action_limit, task.action_limit) if task.action_limit else action
                    env.step_chunk(action[:, None], last=True)
                    chosen.append(action)
                chosen, later = torch.stack(chosen, 1), obs
            if t in (0, halfway):
                seen.append(obs)
                actions.append(chosen)
            obs = later
    both = torch.stack(steps).all(1).any(0)
    return Episode(
        torch.stack([seen[0], seen[-1]]), torch.stack([actions[0], actions[-1]]), env.success, at_start, steps[0], both
    )


def check_ends(episode: Episode) -> list[Finding]:
    """Nothing is over before it has begun; what succeeds does not fail in the same moment."""
    (won, lost), (won_next, lost_next) = (x.float().mean(1).tolist() for x in (episode.at_start, episode.at_once))
    measured = f"success {won:.3f}, failure {lost:.3f} at reset, {won_next:.3f} and {lost_next:.3f} after a step"
    shares = {"success": max(won, won_next), "failures": max(lost, lost_next)}
    worst, why = max(shares.values()), " and ".join(kind for kind, share in shares.items() if share)
    why = f"some episodes are over at once; look at the row's {why}"
    start = judge("start", measured, worst > FEW and why, worst > 0 and why)
    both = episode.both.float().mean().item()
    why = "in the same step, where success counts; let the row's failures leave out what has succeeded"
    return [start, judge("ends", f"success and a failure together in {both:.3f} of the episodes", warn=both > 0 and why)]


def check_images(env: Any, episode: Episode) -> list[Finding]:
    """Cameras see something, each something else, and something that moves."""
    names = list(env.task.cameras)
    if not names:
        return [Finding("skip", "images", "the row has no camera")]
    images = episode.seen["images"].float()  # (2, N, V, H, W, 3)
    views = images[0].transpose(0, 1)  # (V, N, H, W, 3)
    found = []
    for i, (name, view) in enumerate(zip(names, views)):
        level, contrast = view.mean().item(), view.flatten(1).std(1).mean().item()
        moved = (images[1, :, i] - images[0, :, i]).abs().mean().item()
        same = next((other for other, x in zip(names[:i], views) if torch.equal(x, view)), None)
        measured = f"level {level:.0f} of 255, contrast {contrast:.1f}, changes by {moved:.2f} till halfway"
        fail = (
            (level < 4 and "is black; light the scene, or turn the camera")
            or (contrast < 1 and "sees one colour; turn the camera: is it inside something?")
            or (same and f"shows what {same} shows; name another camera in the row")
            or (moved == 0 and "does not see the scene move; turn the camera, or is it stale?")
        )
        found.append(judge(f"images {name}", measured, fail))
    return found


def check_task(
    env: Any, expert: Callable | None, act: Callable | None, chunk: int, seed: int
) -> tuple[Episode, list[Finding]]:  # fmt: skip
    """How the task starts, ends and looks."""
    episode = play(env, expert, act, chunk, seed)
    return episode, check_ends(episode) + check_images(env, episode)


def check_groups(env: Any, reset: Callable[[], TensorDict], act: Callable, group_size: int, chunk: int) -> list[Finding]:
    """Members of a group are alike when they start, and when equal actions have ended their episodes."""
    found, exact = [], torch.device(env.device).type == "cpu" and env.env.scene.cfg.env_spacing == 0

    def compare(obs: TensorDict) -> tuple[float, float, bool]:
        """Largest difference to the first of a group, share of pixels that differ; whether all groups are alike."""
        parts = env.states().set("seen", obs["state"]).flatten_keys().values()
        state = torch.cat([x.reshape(len(x), -1).double() for x in parts], 1)
        state = state.unflatten(0, (-1, group_size))  # (groups, G, d)
        images = obs["images"].flatten(1).unflatten(0, (-1, group_size))
        pixels = (images != images[:, :1]).float().mean().item() if images.numel() else 0.0
        return (state - state[:, :1]).abs().max().item(), pixels, len(state) > 1 and torch.equal(state[0], state[-1])

    obs = reset()
    begun, pixels, one = compare(obs)
    why = "is not in what `scene_states` copies: something that the task remembers, or draws when it resets"
    limits = (0.0, 0.0) if exact else (1e-5, 1e-3)
    measured = f"members differ by {begun:.1e} in state and in {pixels:.2%} of pixels at the start"
    fail = (begun > limits[0] or pixels > limits[1]) and f"a part of the start {why}"
    found.append(judge("groups", measured, fail, one and "all groups start alike; does the task draw its starts by the seed?"))
    for _ in range(env.task.horizon // chunk):
        obs = env.step_chunk(act(obs, 0)[::group_size].repeat_interleave(group_size, 0))
    ended, pixels, _ = compare(obs)
    measured = f"they differ by {ended:.1e} in state and in {pixels:.2%} of pixels after equal actions, at the end"
    why = "steps are random, or environments differ for good (masses, frictions); switch that off in the row's `prepare`"
    far = ended > 0 or pixels > 0
    found.append(
        judge(
            "groups' episodes",
            measured,
            exact and far and why,
            ended > 0.01 and f"they drift; if it is more than contacts, {why}",
        )
    )
    return found


# ------------------------------------------------------------------------------------------------------------------
# the policy in it
# ------------------------------------------------------------------------------------------------------------------
def check_policy(
    env: Any, episode: Episode, act: Callable, processor: Any, texts: tuple[str, ...], demonstrated: bool
) -> list[Finding]:
    """Whether the checkpoint knows such numbers, such images in this order, and heeds the instruction.

    Args:
        processor: between raw numbers and the network's; it is asked for `unusual`, `outside` and `normalize_action`.
        texts: the instructions.
        demonstrated: the episode is an expert's.
    """
    found = []
    for kind, values in (("state", episode.seen["state"].flatten(0, 1)), ("action", episode.actions.flatten(0, 2))):
        if kind == "action" and not demonstrated:
            found.append(Finding("skip", "actions", "the row has no scripted expert to compare with"))
            continue
        odd, share = processor.unusual(values, kind), processor.outside(values, kind)
        measured = f"{share:.1%} of the {'' if kind == 'state' else "expert's "}numbers are beyond the checkpoint's data"
        other = "is that of another robot or unit? look at --embodiment-tag, and at the columns and their order in the row"
        found.append(judge(f"{kind}s", measured, odd and f"{odd}; {other}", share > MANY and other))
    normalize = processor.normalize_action
    found.append(check_cameras(list(env.task.cameras), episode, act, normalize, demonstrated))
    found.append(check_instruction(episode.seen[0], act, texts, normalize))
    return found


def check_cameras(names: list[str], episode: Episode, act: Callable, normalize: Callable, demonstrated: bool) -> Finding:
    """With images in the order that the checkpoint was trained with, it acts more like the expert than with any other."""
    if len(names) < 2 or not demonstrated:
        why = "fewer than two: nothing to swap" if len(names) < 2 else "without an expert their order cannot be told"
        return Finding("skip", "cameras", why)
    orders, errors = list(itertools.permutations(range(len(names)))), []
    for order in orders:
        error = []
        for obs, actions in zip(episode.seen, episode.actions):
            seen = obs.copy().set("images", obs["images"][:, list(order)])
            draws = [(normalize(act(seen, draw)) - normalize(actions)).abs().mean((1, 2)) for draw in range(2)]
            error.append(sum(draws) / 2)  # (N,)
        errors.append(torch.cat(error))  # (2N,)
    given, others = errors[0], errors[1:]
    gains = [given - error for error in others]
    scores = [(x.mean() / (x.std() / len(x) ** 0.5).clamp(min=1e-12)).item() for x in gains]
    best = max(range(len(others)), key=lambda i: scores[i])
    shown = ", ".join(names[i] for i in orders[1 + best])
    measured = f"error to the expert {given.mean():.3f} in the row's order, {others[best].mean():.3f} as {shown}"
    measured += f" ({abs(scores[best]):.1f} standard errors {'better' if scores[best] > 0 else 'worse'})"
    swapped = scores[best] > SIGMAS and "cameras swapped? look which camera the row names for which of the checkpoint's keys"
    return judge("cameras", measured, swapped, max(map(abs, scores)) < SIGMAS and "their order makes no difference that shows")


def check_instruction(obs: TensorDict, act: Callable, texts: tuple[str, ...], normalize: Callable) -> Finding:
    """Other words, other actions: beyond noise, and beside what the exploring sampler does by itself."""
    if len(texts) < 2:
        return Finding("skip", "instruction", "there is one alone")

    def distance(x: Tensor, y: Tensor) -> float:
        return (normalize(x) - normalize(y)).square().mean().sqrt().item()

    swapped = obs.copy().set("prompt", (obs["prompt"] + 1) % len(texts))
    moved, spread = distance(act(swapped, 0), act(obs, 0)), distance(act(obs, 1, True), act(obs, 2, True))
    ratio = moved / max(spread, 1e-12)
    measured = f"swapped, it moves actions by {moved:.3f}, the sampler by {spread:.3f}"
    return judge(
        "instruction", measured,
        ratio < DEAF and "it is ignored; train on several, look at `target` of the row and at the prompts",
        ratio < FAINT and "it hardly matters",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------
# what a run will live on, and what it takes
# ------------------------------------------------------------------------------------------------------------------
def check_success(
    expert: Tensor | None, success: Tensor, prompt: Tensor, texts: tuple[str, ...], group_size: int = 1, dense: bool = False
) -> Finding:
    """A success can be reached, and a rollout has something to compare.

    Args:
        expert: (N,) the expert's success, where there is one.
        success, prompt: (N,) of a rollout.
        group_size: more than 1: groups in which all fare alike carry no gradient.
        dense: rewards are not success alone.
    """
    n, rate = len(success), success.float().mean().item()
    able = None if expert is None else expert.float().mean().item()
    most = wilson_interval(success.sum().item(), n)[1]
    won = success.view(-1, group_size).float().mean(1)
    mixed = ((won > 0) & (won < 1)).float().mean().item()
    measured = f"expert {'has none' if able is None else f'{able:.3f}'}, exploring policy {rate:.3f} of {n} episodes"
    measured += f", mixed groups {mixed:.3f}" if group_size > 1 else ""
    never = [text for i, text in enumerate(texts) if (prompt == i).any() and not success[prompt == i].any()]
    none = not rate and not dense and "RL would have no gradient"
    fail = (
        (none and not able and f"no success was ever reached: {none}; can it be within the horizon?")
        or (none and f"the policy never succeeds (below {most:.3f}): {none}; imitate first, or explore less (--noise-level)")
        or (group_size > 1 and not mixed and "all groups fare alike: no gradient; give more --num-envs, or a harder task")
    )
    warn = (
        (able == 0 and "the expert never succeeds")
        or (rate == 1 and "nothing is left to learn")
        or (len(texts) > 1 and never and f"never: {'; '.join(never)}")
    )
    return judge("success", measured, fail, warn)


def check_expert(episode: Episode, texts: tuple[str, ...], batches: int, seconds: float) -> list[Finding]:
    """There is something to imitate; `seconds` of one batch of episodes, of which there will be so many."""
    success, prompt = episode.success, episode.seen["prompt"][0]
    rate = success.float().mean().item()
    never = [text for i, text in enumerate(texts) if (prompt == i).any() and not success[prompt == i].any()]
    fail = not rate and "nothing to imitate; can it be done within the horizon?"
    warn = (len(texts) > 1 and never and f"never: {'; '.join(never)}") or (rate < 0.5 and "failures are thrown away")
    time = f"{seconds:.1f} s a batch of {len(success)} demonstrations, {hms(seconds * batches)} for all; training not counted"
    return [judge("success", f"expert {rate:.3f} of {len(success)} episodes", fail, warn), Finding("note", "time", time)]


def check_first_ratio(error: float | None, tolerance: float) -> Finding:
    """Rollout and update see the same policy; `error`: largest |ratio - 1| before anything was learned."""
    if error is None:
        return Finding("FAIL", "ratio", "there was no sample to compare: every episode was over before it began")
    why = "rollout and update disagree: other features, noise, masks or precision; a bug"
    return judge("ratio", f"off 1 by {error:.1e} at most, {tolerance:.0e} allowed", error > tolerance and why)


def costs(plan: str, device: str, seconds: dict[str, float], iterations: int) -> list[Finding]:
    """What a run takes: memory as planned, and `seconds` by stage of an iteration [s] as measured."""
    each = sum(seconds.values())
    parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    time = f"{each:.2f} s an iteration ({parts}), {hms(each * iterations)} for {iterations}, evaluations not counted"
    return [Finding("note", "memory", f"{plan}; peak so far {peak_memory_gb(device):.2f} GB"), Finding("note", "time", time)]
