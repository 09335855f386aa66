"""The suite of instructions in the embedded scene: experts, successes that exclude each other, the privileged state."""

from types import SimpleNamespace

import pytest
import torch

N = 160
SUITE = "Tabletop-Suite-v0"


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    from tests.sim import chunk_env

    with chunk_env(tmp_path_factory.mktemp("simulator"), N, task=SUITE) as env:
        yield env


def test_the_row_has_the_suites_instructions(env):
    from tasks import tabletop

    assert env.task.instructions == tuple(tabletop.SUITE) and env.task.horizon == tabletop.SUITE_HORIZON
    env.reset(seed=1)
    assert set(env.env.target.tolist()) == set(range(10))
    assert env.env.instructions == [env.task.instructions[i] for i in env.env.target.tolist()]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_experts_do_what_is_asked_and_nothing_else(env, share):
    """At least 95% of fresh episodes of each instruction, 90% where a cube is stacked; of demonstrations' starts, too."""
    from tasks import tabletop

    start, done, also = env.env.event_manager.get_term_cfg("reset"), torch.zeros(10), torch.zeros(10)
    try:
        start.params["gantry_share"] = share
        for seed in (21, 22, 23, 24):
            env.reset(seed=seed)
            asked = torch.arange(N) % 10
            env.env.target[:] = asked
            assert not tabletop.fulfilled(env.env).any()
            for _ in range(tabletop.SUITE_HORIZON):
                env.step_chunk(tabletop.suite_expert(env.env)[:, None], last=True)
            done += env.success.view(-1, 10).float().mean(0) / 4
            for other in range(1, 10):  # what the scene would be worth under another instruction
                env.env.target[:] = (asked + other) % 10
                also += (tabletop.fulfilled(env.env) & env.success).view(-1, 10).float().mean(0) / 4
    finally:
        start.params["gantry_share"] = 0.0
    stack = torch.tensor([kind == tabletop.KINDS.index("stack") for kind, _, _ in tabletop.SUITE.values()])
    assert (done >= torch.where(stack, 0.9, 0.95)).all(), dict(zip(tabletop.SUITE, done.tolist()))
    assert also.max() < 0.05, dict(zip(tabletop.SUITE, also.tolist()))  # a cube that was knocked aside


def test_an_evaluation_tells_each_instruction_and_counts_what_is_trained(env):
    """The scripts' own `evaluate`, the expert in the network's place."""
    import grpo_gr00t
    from common import Ranks
    from tasks import tabletop

    acts = SimpleNamespace(chunk=1, texts=env.task.instructions)
    acts.act = lambda obs, noise, explore: {"action": tabletop.suite_expert(env.env)[:, None]}
    args = grpo_gr00t.Args(SUITE, num_envs=N, eval_episodes=2 * N, device="cpu")
    found = grpo_gr00t.evaluate(args, env, acts, Ranks(0, 1))
    each = found["instructions"]
    notes = {name: rate["note"] for name, rate in each.items() if "note" in rate}
    assert tuple(each) == env.task.instructions and sum(rate["episodes"] for rate in each.values()) == 2 * N
    assert notes == {"put the blue cube in the middle": "imitation alone", "push the blue cube to the right": "never seen"}
    assert found["episodes"] == 2 * N - sum(each[name]["episodes"] for name in notes)
    assert found["mean"] > 0.95 and min(rate["mean"] for rate in each.values()) > 0.85


def test_what_is_put_somewhere_has_to_be_let_go(env):
    """A cube on the other counts once the fingers are open, for some steps in a row, and only if it is the named one."""
    from tasks import tabletop

    env.reset(seed=2)
    scene, robot = env.env.scene, env.env.scene["robot"]
    env.env.target[:] = torch.where(torch.arange(N) % 2 == 0, 6, 7)  # red on blue, blue on red
    for name, z in (("red", 1.5 * tabletop.CUBE), ("blue", 0.5 * tabletop.CUBE)):
        pose = torch.zeros(N, 7)
        pose[:, 2], pose[:, 6] = z, 1.0
        scene[name].write_root_pose_to_sim_index(root_pose=pose, env_ids=torch.arange(N).int())
    for width, expected in ((0.02, False), (0.05, True)):
        joints = torch.tensor([[0.0, 0.0, 0.2, width, width]]).repeat(N, 1)
        robot.write_joint_state_to_sim_index(position=joints, velocity=torch.zeros_like(joints), env_ids=torch.arange(N).int())
        assert torch.equal(tabletop.fulfilled(env.env), (env.env.target == 6) & expected)


def test_the_privileged_state_names_what_is_asked(env):
    from tasks import tabletop

    env.reset(seed=3)
    obs, cubes = env.env.observation_manager.compute()["critic"], tabletop.cube_positions(env.env)
    assert obs.shape == (N, 31)
    for row, cube, instruction in zip(obs, cubes, env.env.instructions):
        kind, named, side = tabletop.SUITE[instruction]
        assert torch.allclose(row[:6], torch.cat([cube[named], cube[1 - named]]))
        assert row[26:30].tolist() == [float(k == kind) for k in range(4)] and row[30] == side
        if kind == tabletop.KINDS.index("stack"):
            assert torch.allclose(row[23:26], cube[1 - named] + torch.tensor([0, 0, tabletop.CUBE]) - cube[named])


def test_what_is_kept_out_is_asked_for_in_evaluations_alone(env):
    from tasks.gr00t import asking

    def asked(without: tuple[str, ...]) -> set[str]:
        with asking(env, without):
            assert "weights" not in start.params
            env.reset(seed=4)
        return set(env.env.instructions)

    everything, start = set(env.task.instructions), env.env.event_manager.get_term_cfg("reset")
    start.params.pop("weights")  # an event of one's own need not take them
    usual = dict(start.params)
    assert asked(()) == everything and asked(env.task.unseen) == everything - set(env.task.unseen)
    assert asked(tuple(env.task.kept_out)) == everything - {*env.task.untrained, *env.task.unseen}
    with pytest.raises(RuntimeError), asking(env, env.task.unseen):
        raise RuntimeError
    env.reset(seed=4)
    assert set(env.env.instructions) == everything
    weights = torch.tensor([0.0, 0, 1, 0, 0, 5, 3, 0, 0, 0])  # the sixth is kept out
    with asking(env, tuple(env.task.kept_out), weights):
        env.reset(seed=4)
    asked = env.env.target.bincount(minlength=10)
    assert start.params == usual
    assert asked[2] + asked[6] == N and 20 < asked[2] < 60  # 40 in the mean, standard deviation 5.5


def test_a_run_asks_for_several_instructions_of_the_task(env):
    """In the order that is given, whatever a wording; RL leaves out what is kept out, unless there is nothing else."""
    from tasks import gr00t

    chosen = ("stack the red cube on the blue cube", "push the blue cube to the right", "lift the red cube")
    before, start = (env.prompts, env.asked), env.env.event_manager.get_term_cfg("reset")
    usual, kept_out = dict(start.params), tuple(env.task.kept_out)

    def asked(without: tuple[str, ...], *weights: float) -> set[int]:
        with gr00t.asking(env, without, torch.tensor(weights) if weights else None):
            prompt = env.reset(seed=4)["prompt"]
        assert torch.equal(env.env.target, torch.tensor([env.task.instructions.index(chosen[i]) for i in prompt]))
        return set(prompt.tolist())

    try:
        env.prompts, env.asked = gr00t.Prompts(env.env, env.task, chosen), gr00t.all_instructions(SUITE, chosen)
        assert env.asked.names == chosen and env.asked.notes == {chosen[1]: "never seen"}
        assert asked(()) == {0, 1, 2} and asked(kept_out) == {0, 2} and asked(kept_out, 1.0, 1, 0) == {0}
        start.params.update(asked=(0, 0, 3, *8 * (6,)))  # as demonstrations have them
        assert asked(env.task.unseen) == {0, 2}
        start.params.update(usual)
        chosen = chosen[1:2] + ("put the blue cube in the middle",)
        env.prompts, env.asked = gr00t.Prompts(env.env, env.task, chosen), gr00t.all_instructions(SUITE, chosen)
        assert asked(kept_out) == {0, 1} and not env.asked.notes  # these count, then
    finally:
        env.prompts, env.asked = before
        start.params.clear()
        start.params.update(usual)


def test_groups_from_the_bank_are_alike_to_the_bit_from_mid_episode_too(env):
    """Expert actions with noise, which half of the members lack, make mixed groups; their states come back as they were."""
    from common import Metrics, Ranks, StartBank
    from tasks import tabletop
    from tests.test_tabletop import physics_state

    size, bank = 8, StartBank(10, N // 8, 0.5, "cpu", Ranks(0, 1))
    heads = torch.arange(N) // size * size
    seen = []  # states at the chunk boundary, all iterations
    for seed in (31, 32, 33):
        obs, g = env.reset(seed, size, bank), torch.Generator().manual_seed(seed)
        assert torch.equal(physics_state(env), physics_state(env)[heads])
        assert torch.equal(obs["images"], obs["images"][heads]) and torch.equal(obs["prompt"], obs["prompt"][heads])
        for t in range(tabletop.SUITE_HORIZON):
            if t == 8:
                seen.append(physics_state(env))
                bank.note(env.states(), ~env.ended)
            good = (torch.arange(N) % 2 == 0)[:, None] | (torch.arange(N) < N // 2)[:, None]
            action = tabletop.suite_expert(env.env)
            env.step_chunk(torch.where(good, action, torch.randn(N, 4, generator=g))[:, None], last=True)
        bank.record(env.success, size, log := Metrics("cpu", Ranks(0, 1)))
    assert log.read()["curriculum/midway"] > 0  # some of the third iteration's groups began so
    middle = torch.cat(seen)
    env.reset(34, size, bank)
    begun = physics_state(env)[::size]
    found = torch.tensor([bool((row == middle).all(1).any()) for row in begun])
    assert found.sum() == bank.begun["midway"].sum() > 0 and torch.equal(found, bank.begun["midway"] == 1)
    for _ in range(16):
        env.step_chunk(torch.randn(N // size, 4, generator=g).repeat_interleave(size, 0)[:, None], last=True)
        assert torch.equal(physics_state(env), physics_state(env)[heads])


def test_nothing_of_a_start_in_mid_episode_is_left_after_a_reset(env):
    """Not in what is seen at once, and not in what would move later."""
    from tasks import tabletop
    from tasks.gr00t import start_from
    from tests.test_tabletop import physics_state

    def play() -> torch.Tensor:
        env.reset(seed=41)
        for _ in range(12):
            env.step_chunk(tabletop.suite_expert(env.env)[:, None], last=True)
        return physics_state(env)

    before, middle = play(), env.states()
    env.env.reset(seed=42)
    start_from(env.env, env.task, middle)
    assert torch.equal(physics_state(env), before) and env.env.scene["robot"].data.joint_vel.torch.abs().max() > 0.01
    assert torch.equal(play(), before)
