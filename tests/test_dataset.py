"""LeRobot data sets: made by hand as NVIDIA and lerobot describe them, written by the scripts, and trained on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tensordict import TensorDict

import grpo_gr00t
import sft_gr00t
from common import Ranks
from gr00t_n1d5 import dataset
from gr00t_n1d5.dataset import LeRobotData, LeRobotWriter, far_off, refuse_dataset
from gr00t_n1d5.embodiment import read_embodiment
from sft_gr00t import TASKS, Args, check
from tests.sim import chunk_env

torch.set_num_threads(1)
TASK = TASKS["Tabletop-Lift-Cube-v0"]
TINY = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny"
LENGTHS, FPS, HEIGHT, WIDTH = (5, 9, 4), 20, 48, 80
TEXTS = ("lift the red cube", "valid", "lift the blue cube")
MODALITY = {  # other orders than the task's, and keys that it does not have
    "state": {
        "arm": {"start": 0, "end": 2},
        "finger_positions": {"start": 2, "end": 4},
        "gripper_position": {"start": 4, "end": 7},
    },
    "action": {"gripper_open": {"start": 0, "end": 1}, "gripper_delta": {"start": 1, "end": 4, "absolute": False}},
    "video": {"cam": {"original_key": "observation.images.ego_view"}},
    "annotation": {"human.validity": {}, "human.action.task_description": {}},
}


def numbers() -> list[dict[str, np.ndarray]]:
    """The columns of each episode."""
    rng = np.random.default_rng(0)
    return [
        {"observation.state": rng.normal(size=(n, 7)).astype(np.float32), "action": rng.normal(size=(n, 4)).astype(np.float32),
         "timestamp": np.arange(n) / FPS, "task_index": np.ones(n, int), "annotation.human.validity": np.ones(n, int),
         "annotation.human.action.task_description": np.full(n, 2 * (i == 1)), "episode_index": np.full(n, i),
         "next.reward": np.float32(i != 1) * (np.arange(n) == n - 1)}
        for i, n in enumerate(LENGTHS)
    ]  # fmt: skip


def colour(episode: int, step: int) -> tuple[int, int, int]:
    return 40 + 60 * episode, 60 + 15 * step, 120


def write_video(file: Path, frames: list[tuple[int, int]]) -> None:
    """One colour per frame, as lerobot encodes: 4:2:0."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in frames:
            image = np.full((HEIGHT, WIDTH, 3), colour(*frame), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def table(columns: dict[str, np.ndarray]) -> pa.Table:
    return pa.table({name: pa.array(x.tolist() if x.ndim > 1 else x) for name, x in columns.items()})


def write_meta(folder: Path, **info) -> None:
    (folder / "meta").mkdir(parents=True)
    video = {"dtype": "video", "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channels"]}
    features = {"observation.state": {"dtype": "float32", "shape": [7]}, "action": {"dtype": "float32", "shape": [4]}}
    features |= {"observation.images.ego_view": video, "next.reward": {"dtype": "float32", "shape": [1]}}
    (folder / "meta" / "info.json").write_text(json.dumps({"fps": FPS, "chunks_size": 2, "features": features} | info))
    (folder / "meta" / "modality.json").write_text(json.dumps(MODALITY))


def write_v2(folder: Path) -> Path:
    """As NVIDIA's getting_started/LeRobot_compatible_data_schema.md says; two episodes to a chunk."""
    paths = {"data_path": dataset.DATA_PATH, "video_path": dataset.VIDEO_PATH}
    write_meta(folder, codebase_version="v2.1", **paths)
    episodes = [{"episode_index": i, "tasks": [], "length": n} for i, n in enumerate(LENGTHS)]
    tasks = [{"task_index": i, "task": text} for i, text in enumerate(TEXTS)]
    for name, rows in (("episodes", episodes), ("tasks", tasks)):
        (folder / "meta" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i, columns in enumerate(numbers()):
        file = folder / f"data/chunk-00{i // 2}/episode_00000{i}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(columns), file)
        write_video(folder / f"videos/chunk-00{i // 2}/observation.images.ego_view/episode_00000{i}.mp4",
                    [(i, t) for t in range(LENGTHS[i])])  # fmt: skip
    return folder


def write_v3(folder: Path) -> Path:
    """As lerobot 0.6 has it: all episodes in one data file, the last two in one video."""
    file = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    paths = {"data_path": f"data/{file}.parquet", "video_path": f"videos/{{video_key}}/{file}.mp4"}
    write_meta(folder, codebase_version="v3.0", **paths)
    for name in ("meta/episodes/chunk-000", "data/chunk-000"):
        (folder / name).mkdir(parents=True)
    pq.write_table(pa.table({"task_index": [0, 1, 2], "__index_level_0__": TEXTS}), folder / "meta/tasks.parquet")
    pq.write_table(pa.concat_tables(map(table, numbers())), folder / "data/chunk-000/file-000.parquet")
    for i, episodes in enumerate(((0,), (1, 2))):
        video = folder / f"videos/observation.images.ego_view/chunk-000/file-00{i}.mp4"
        write_video(video, [(e, t) for e in episodes for t in range(LENGTHS[e])])
    key = "videos/observation.images.ego_view"
    columns = {
        "episode_index": [0, 1, 2], "length": LENGTHS, "data/chunk_index": [0] * 3, "data/file_index": [0] * 3,
        f"{key}/chunk_index": [0] * 3, f"{key}/file_index": [0, 1, 1], f"{key}/from_timestamp": [0.0, 0.0, LENGTHS[1] / FPS],
        "stats/action/min": [[0.0]] * 3,
    }  # fmt: skip
    pq.write_table(pa.table(columns), folder / "meta/episodes/chunk-000/file-000.parquet")
    return folder


def opened(folder: Path, **flags) -> LeRobotData:
    return LeRobotData(str(folder), TASK.modalities).load(**flags)


def samples_of(data: LeRobotData, horizon: int = 3, size: int = 48) -> TensorDict:
    return data.samples(data.episodes, horizon, size, data.folder)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_data_sets_made_by_hand(write, tmp_path):
    data, at = opened(write(tmp_path / "data")), 0
    found = samples_of(data)
    assert data.texts == [TEXTS[0], TEXTS[2]] and data.fps == FPS and len(found) == sum(LENGTHS)
    for i, columns in enumerate(numbers()):
        state, action = (torch.from_numpy(columns[name]) for name in ("observation.state", "action"))
        state, action = state[:, [4, 5, 6, 2, 3]], action[:, [1, 2, 3, 0]]  # the task's order
        for t in range(LENGTHS[i]):
            sample, then = found[at], action[t : t + 3]
            assert torch.equal(sample["state"], state[t]) and sample["prompt"] == (i == 1)
            assert torch.equal(sample["action"][: len(then)], then)
            assert sample["real"].tolist() == [t + k < LENGTHS[i] for k in range(3)]
            # past the end a delta is 0, and what is absolute stays
            assert torch.equal(
                sample["action"][len(then) :], torch.tensor([[0, 0, 0, action[-1, 3]]] * (3 - len(then))).view(-1, 4)
            )
            assert sample["images"].shape == (1, 48, 48, 3)  # scaled to the policy's size
            assert (sample["images"].float() - torch.tensor(colour(i, t))).abs().max() < 6, (i, t)
            at += 1


def test_the_successes_alone(tmp_path):
    for write in (write_v2, write_v3):
        data = opened(write(tmp_path / write.__name__), successes=True)
        assert [e.index for e in data.episodes] == [0, 2] and data.texts == [TEXTS[0]]
        found = samples_of(data)
        assert len(found) == 9 and abs(int(found["images"][-1, 0, 0, 0, 1]) - colour(2, 3)[1]) < 6


def test_images_beyond_memory_lie_in_a_file(tmp_path, monkeypatch):
    data = opened(write_v2(tmp_path / "data"))
    whole = samples_of(data)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    before = sorted(data.folder.iterdir())
    assert torch.equal(samples_of(data)["images"], whole["images"]) and sorted(data.folder.iterdir()) == before

    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ValueError, match="use fewer"):
        samples_of(data)


def change(file: str, **changes):
    def act(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        for path, value in changes.items():
            *parents, last = path.split("__")
            entry = content
            for name in parents:
                entry = entry[name]
            entry[last] = value
        (folder / file).write_text(json.dumps(content))

    return act


def cut(file: str, size: int = 300):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


VIDEO = "videos/chunk-000/observation.images.ego_view/episode_000001.mp4"
ROWS = "data/chunk-000/episode_000001.parquet"
BAD = {
    "no modality.json": (lambda folder: (folder / "meta/modality.json").unlink(), "names the columns and cameras; write one"),
    "no info.json": (lambda folder: (folder / "meta/info.json").unlink(), "is this a LeRobot data set"),
    "no video": (lambda folder: (folder / VIDEO).unlink(), "1 videos are missing"),
    "no rows": (lambda folder: (folder / ROWS).unlink(), "1 data files are missing"),
    "another version": (change("meta/info.json", codebase_version="v1.6"), "v1.6 is not one of v2.0, v2.1, v3.0"),
    "another size": (change("meta/modality.json", action__gripper_delta__end=3), "has 2 columns, the task's has 3"),
    "beyond the column": (change("meta/info.json", features__action__shape=[3]), "of which info.json has 3 dimensions"),
    "another camera": (change("meta/modality.json", video={"ego": {}}), "no video.cam in meta/modality.json, which has ego"),
    "single images": (change("meta/info.json", **{"features__observation.images.ego_view__dtype": "image"}), "only videos"),
    "another key": (change("meta/modality.json", state={"arm": {}}), "no state.gripper_position, it has arm"),
}  # fmt: skip
BAD_WITHIN = {
    "truncated rows": (cut(ROWS), "episode_000001.parquet: cannot be read"),
    "truncated video": (cut(VIDEO), "episode_000001.mp4: cannot be read"),
    "a short video": (lambda folder: write_video(folder / VIDEO, [(1, 0)] * 3), "ends before frame 3"),
    "fewer rows": (lambda folder: pq.write_table(table(numbers()[1]).slice(2), folder / ROWS), "7 rows of episode 1"),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_WITHIN])
def test_bad_data_sets_are_refused_in_one_line(name, tmp_path):
    """What JSON files tell is found on the command line; the rest before the simulator starts, or with the images."""
    act, words = (BAD | BAD_WITHIN)[name]
    folder = write_v2(tmp_path / "data")
    act(folder)
    with pytest.raises(SystemExit) as refusal:
        check(Args(dataset=str(folder)))
        assert name in BAD_WITHIN
        with refuse_dataset(str(folder)):
            samples_of(opened(folder))
    text = str(refusal.value)
    assert text.startswith(f"--dataset {folder}: ") and "\n" not in text and words in text
    assert name in BAD or "fetch or record the data set again" in text


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"dataset": "nowhere"}, "--dataset nowhere: no such folder"),
        ({"successes": True}, "--successes: are those of a data set"),
        ({"dataset": "x", "record": "y"}, "leave out --record"),
        ({"dataset": "x", "evaluate": True}, "leave out --evaluate"),
        ({"record": "."}, "--record .: is there already"),
    ],
)
def test_flags_that_do_not_go_together(flags, words):
    with pytest.raises(SystemExit, match=words):
        check(Args(**flags))


def test_without_outcomes_there_are_no_successes(tmp_path):
    folder = write_v2(tmp_path / "data")
    change("meta/info.json", features__action={"shape": [4]})(folder)
    info = json.loads((folder / "meta/info.json").read_text())
    del info["features"]["next.reward"]
    (folder / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="neither next.success nor next.reward; leave out"):
        opened(folder, successes=True)


def test_data_far_from_the_checkpoint_are_named(tmp_path):
    embodiment = read_embodiment(TINY)
    low, high = (
        {kind: [v for x in embodiment.statistics(kind).values() for v in x[name]] for kind in ("state", "action")}
        for name in ("min", "max")
    )
    rng = np.random.default_rng(0)
    steps = {kind: rng.uniform(low[kind], high[kind], (200, len(low[kind]))) for kind in ("state", "action")}

    def told(offset: float = 0.0, **scaled: float) -> str | None:
        data = SimpleNamespace(modalities=TASK.modalities)
        data.numbers = lambda kind: offset + steps[kind] * ([scaled.get(kind, 1.0)] * 3 + [1.0] * (steps[kind].shape[1] - 3))
        return far_off(embodiment, data)

    assert told() is None
    assert told(5.0).count(" is [") == told(-5.0).count(" is [") == 4
    for kind, key in (("state", "gripper_position"), ("action", "gripper_delta")):
        for scale in (100.0, 0.005):  # centimetres, or what once were
            assert told(**{kind: scale}).startswith(f"{kind}.{key} is [") and ";" not in told(**{kind: scale})


# ---------------------------------------------------------------- writing


def write_random(folder: Path, lengths=(4, 2, 6), wins=(False, True, True)) -> tuple[list, LeRobotWriter]:
    """Episodes of random numbers, which run until they win, or for six steps."""
    g, seen = torch.Generator().manual_seed(0), []
    with LeRobotWriter(folder, TASK.modalities, 1 / 0.04) as writer:
        for seed in (7, 8):
            writer.begin(seed, [TEXTS[0], TEXTS[2], TEXTS[0]])
            for t in range(6):
                images = torch.randint(256, (3, 1, 64, 64, 3), generator=g, dtype=torch.uint8)
                state, action = torch.randn(3, 5, generator=g), torch.randn(3, 4, generator=g)
                running = torch.tensor([t < n for n in lengths])
                won = torch.tensor([win and t + 1 >= n for n, win in zip(lengths, wins)])
                writer.step(images, state, action, running, won)
                seen.append((images, state, action))
    return seen, writer


def test_what_is_written_is_read_to_the_bit(tmp_path):
    seen, _ = write_random(tmp_path / "data")
    data, at = opened(tmp_path / "data"), 0
    found = samples_of(data, size=64)
    assert [e.length for e in data.episodes] == [4, 2, 6] * 2 and data.fps == 25  # nothing after an episode's end
    for e in data.episodes:
        for t in range(e.length):
            images, state, action = (x[e.index % 3] for x in seen[6 * (e.index // 3) + t])
            assert torch.equal(found["images"][at], images) and torch.equal(found["state"][at], state)
            assert torch.equal(found["action"][at, 0], action) and found["prompt"][at] == (e.index % 3 == 1)
            at += 1
    assert [e.index for e in opened(tmp_path / "data", successes=True).episodes] == [1, 2, 4, 5]
    rows = [json.loads(line) for line in (tmp_path / "data/meta/episodes.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [7] * 3 + [8] * 3 and [row["success"] for row in rows] == [False, True, True] * 2
    table = pq.read_table(tmp_path / "data" / dataset.DATA_PATH.format(episode_chunk=0, episode_index=4))
    assert table["next.reward"].to_pylist() == [0.0, 1.0] and table["next.done"].to_pylist() == [False, True]
    assert table["index"].to_pylist() == [16, 17] and table["timestamp"].to_pylist() == pytest.approx([0.0, 0.04])


def test_a_data_set_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), LeRobotWriter(tmp_path / "data", TASK.modalities, 25) as writer:
        writer.begin(0, ["x"])
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- with the scripts


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    with chunk_env(tmp_path_factory.mktemp("sim"), 16) as env:
        yield env


def test_an_evaluation_is_recorded_and_stays_the_same(env, tmp_path):
    """Every step, rendered; and what the policy sees at chunk boundaries is what it acts on."""
    args = grpo_gr00t.Args(num_envs=16, eval_episodes=32, device="cpu")
    policy, ranks, seen = grpo_gr00t.Gr00tActor(args), Ranks(0, 1), []
    plain = grpo_gr00t.evaluate(args, env, policy, ranks)
    act = policy.act

    def watched(obs, *rest):
        out = act(obs, *rest)
        seen.append((obs["images"].clone(), obs["state"].clone(), out["action"].clone()))
        return out

    policy.act = watched
    with LeRobotWriter(tmp_path / "data", env.task.modalities, 1 / env.env.step_dt) as writer:
        assert grpo_gr00t.evaluate(args, grpo_gr00t.RecordedEnv(args, env, writer), policy, ranks) == plain
    data = opened(tmp_path / "data")
    good = sum(bool(x.success) for x in data.steps.values())
    assert len(data.episodes) == 32 and 0 < good < 32 and good == round(plain["mean"] * 32)
    found, at, chunk = samples_of(data, size=64), 0, policy.chunk
    for e in data.episodes:
        assert e.length == 32 or data.steps[e.index].success
        for t in range(0, e.length, chunk):
            images, state, action = (x[e.index % 16] for x in seen[4 * (e.index // 16) + t // chunk])
            assert torch.equal(found["images"][at + t], images) and torch.equal(found["state"][at + t], state)
            end = min(chunk, e.length - t)
            assert torch.equal(torch.from_numpy(data.steps[e.index].action[t : t + end]), action[:end])
        at += e.length


def test_recorded_demonstrations_are_the_samples_of_a_run_without_them(env, tmp_path):
    args = Args(num_envs=16, demos=16, frames=4, device="cpu")
    run, ranks = SimpleNamespace(event=lambda text: None), Ranks(0, 1)
    plain = sft_gr00t.collect(args, env, 8, run, ranks)
    with LeRobotWriter(tmp_path / "data", env.task.modalities, 25) as writer:
        demos = sft_gr00t.collect(args, env, 8, run, ranks, writer)
    for one, other in zip(plain, demos):
        assert all(torch.equal(one[name], other[name]) for name in ("images", "state", "prompt", "action"))
    data = opened(tmp_path / "data", successes=True)
    assert all(len(np.unique(x.state, axis=0)) == len(x.state) for x in data.steps.values())  # each step's own observation
    found = samples_of(data, horizon=8, size=64)
    order = torch.tensor([data.texts.index(text) for text in TASK.instructions])
    for sample in torch.cat(demos):
        same = (found["state"] == sample["state"]).all(1) & (found["prompt"] == order[sample["prompt"]])
        same &= (found["images"] == sample["images"]).flatten(1).all(1)
        same &= ((found["action"] == sample["action"]).all(2) | ~found["real"]).all(1)
        assert same.any()


def test_training_on_a_data_set_starts_no_simulator_and_keeps_the_statistics(tmp_path, monkeypatch):
    write_random(tmp_path / "data", lengths=(6, 3, 6))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(sft_gr00t, "make_env", lambda *_: pytest.fail("the simulator starts"))
    common = {"dataset": "data", "steps": 2, "batch_size": 4, "eval_episodes": 0, "device": "cpu", "num_envs": 16}
    for name, checkpoint in (("scratch", None), ("tuned", str(TINY))):
        sft_gr00t.main(check(Args(checkpoint=checkpoint, exp_name=name, **common)))
    found = {name: read_embodiment(tmp_path / "runs" / name / "checkpoints" / "last") for name in ("scratch", "tuned")}
    assert found["tuned"].statistics("action") == read_embodiment(TINY).statistics("action")
    x = opened(tmp_path / "data").numbers("action")
    assert found["scratch"].statistics("action")["gripper_delta"]["max"] == pytest.approx(x[:, :3].max(0).tolist())
    warned = {name: (tmp_path / "runs" / name / "log.txt").read_text() for name in found}
    assert "warning: the data are far from" in warned["tuned"] and "far from" not in warned["scratch"]
    sft_gr00t.Gr00tActor(check(Args(checkpoint="runs/tuned/checkpoints/last", evaluate=True, device="cpu")))


@torch.no_grad()
def test_what_lies_past_the_end_does_not_count(tmp_path):
    write_random(tmp_path / "data")
    data = opened(tmp_path / "data")
    policy = sft_gr00t.Gr00tActor(Args(checkpoint=str(TINY), dataset="x", device="cpu", tune="head"), data)
    batch, g = samples_of(data, horizon=8, size=64), torch.Generator().manual_seed(0)
    drawn = sft_gr00t.draw(Args(), policy, len(batch), len(batch), g)
    real = batch["real"]
    assert 0 < real.float().mean() < 1

    def loss(mask: torch.Tensor) -> float:
        return float(sft_gr00t.imitation_loss(policy, TensorDict({**batch, "real": mask}, len(batch)), drawn))

    shares = real.sum() / real.numel()
    mixed = float(shares) * loss(real) + float(1 - shares) * loss(~real)
    assert loss(real | True) == pytest.approx(mixed, rel=1e-4) and loss(real) != pytest.approx(loss(real | True), rel=1e-3)
    whole = sft_gr00t.imitation_loss(policy, batch.exclude("real"), drawn)
    assert float(whole) == pytest.approx(loss(real | True), rel=1e-5)
