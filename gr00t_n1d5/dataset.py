"""LeRobot data sets in NVIDIA's layout, read and written.

Read: v2.0 and v2.1 (a parquet file per episode, a video per episode and camera) and v3.0 (several episodes in each file), with
NVIDIA's meta/modality.json, which slices the columns of state and action under key names. Written: v2.1.

Sources: Isaac-GR00T at N1.5 (getting_started/LeRobot_compatible_data_schema.md, gr00t/data/dataset.py), lerobot 0.3 and 0.6.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gr00t_n1d5.embodiment import DATA_CONFIGS, KINDS, Embodiment
from gr00t_n1d5.files import local_folder

if TYPE_CHECKING:
    import numpy as np
    from tensordict import TensorDict
    from torch import Tensor

VERSIONS = ("v2.0", "v2.1", "v3.0")
COLUMN = {"state": "observation.state", "action": "action"}  # where modality.json has no original_key
LANGUAGES = {config.language.removeprefix("annotation.") for config in DATA_CONFIGS.values()}
DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
CHUNK = 1000  # episodes in a folder
# lossless: at 4:2:0 a cube of four pixels loses its colour, and a policy would not be trained on what it sees
CODEC = ("libx264rgb", {"crf": "0", "preset": "veryfast", "g": "8", "bf": "0"})


class Episode(NamedTuple):
    """Where an episode lies."""

    index: int
    length: int  # steps
    data: Path
    videos: tuple[Path, ...]  # of each camera
    starts: tuple[float, ...]  # when it begins in each of them [s]


class Steps(NamedTuple):
    """An episode's numbers, columns in the task's order."""

    state: np.ndarray  # (L, d) float32
    action: np.ndarray  # (L, a) float32
    prompt: np.ndarray  # (L,) int64, index into the data's texts
    success: bool | None  # None: the data do not say


@contextlib.contextmanager
def refuse_dataset(name: str) -> Iterator[None]:
    """Around what reads a data set: SystemExit, in one line, where that fails."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise SystemExit(f"--dataset {name}: {'; '.join(str(error).splitlines()).removeprefix(f'{name}: ')}") from error


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: no such file; fetch or record the data set again") from error
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:  # pyarrow's and PyAV's are kinds of these
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file}: cannot be read ({reason}); fetch or record the data set again") from error


def fetch_folder(name: str, whole: bool) -> Path:
    """A local folder as it is; any other owner/name is taken for a data set of the hub, and fetched, or its meta/ alone."""
    folder = local_folder(name)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download  # slow to import

    try:
        parts = ["meta/*.json", "meta/*.jsonl", "meta/*.parquet", *(["data/*.parquet", "videos/*.mp4"] if whole else [])]
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=parts))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{name}: no such folder, and nothing from the Hugging Face hub ({reason}); where there is a network: "
            f"hf download --repo-type dataset {name} --local-dir <folder>, then name that folder here"
        ) from error


class LeRobotData:
    """A data set's episodes for a task, matched by key names; `load` reads their numbers, `samples` their images as well.

    Args:
        name: a folder, or a data set of the hub.
        modalities: of the task: video keys, and {key: columns} of state and action, in its order.
        whole: False looks at meta/ alone where the data set is the hub's.

    Raises FileNotFoundError, ValueError where something is missing or does not fit; `refuse_dataset` makes a line of it.
    """

    def __init__(self, name: str, modalities: Mapping[str, Any], whole: bool = True):
        self.folder, self.modalities = fetch_folder(name, whole), modalities
        info = self._json("info.json", "is this a LeRobot data set?")
        self.version = info.get("codebase_version")
        if self.version not in VERSIONS:
            way = "lerobot converts older ones to v2.1 and v3.0"
            raise ValueError(f"{name}: codebase_version {self.version} is not one of {', '.join(VERSIONS)}; {way}")
        modality = self._json("modality.json", "it names the columns and cameras; write one (docs/sft_gr00t.md)")
        with _reading(self.folder / "meta" / "info.json"):
            self.fps, features = float(info["fps"]), dict(info["features"])
        self.columns = {kind: self._columns(kind, modality, features) for kind in KINDS}
        cameras = dict(modality.get("video") or {})
        if absent := [key for key in modalities["video"] if key not in cameras]:
            known = ", ".join(cameras) or "none"
            raise ValueError(f"{name}: no video.{absent[0]} in meta/modality.json, which has {known}; name it so there")
        cameras = [(cameras[key] or {}).get("original_key") or key for key in modalities["video"]]
        for camera in cameras:
            if features.get(camera, {}).get("dtype") != "video":
                raise ValueError(f"{name}: {camera} is no video by meta/info.json; only videos are read, not single images")
        annotations = dict(modality.get("annotation") or {})
        spoken = [key for key in annotations if key in LANGUAGES]
        self.language = "task_index"
        if spoken:
            self.language = (annotations[spoken[0]] or {}).get("original_key") or f"annotation.{spoken[0]}"
        self.judged = next((column for column in ("next.success", "next.reward") if column in features), None)
        self.episodes = self._episodes_v3(info, cameras) if self.version == "v3.0" else self._episodes_v2(info, cameras)
        if not self.episodes:
            raise ValueError(f"{name}: has no episodes; record or fetch some")
        if whole or local_folder(name) is not None:
            self._check_files(name)
        self.texts: list[str] = []
        self.steps: dict[int, Steps] = {}

    def _json(self, file: str, remedy: str) -> dict:
        path = self.folder / "meta" / file
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; {remedy}")
        with _reading(path):
            return dict(json.loads(path.read_text()))

    def _columns(self, kind: str, modality: dict, features: dict) -> list[tuple[str, int, int, bool]]:
        """The column, first and last + 1 of its dimensions, and whether it is absolute, of each of the task's keys."""
        found, where = [], f"{self.folder / 'meta' / 'modality.json'}"
        for key, size in self.modalities[kind].items():
            keys = modality.get(kind) or {}
            if key not in keys:
                raise ValueError(
                    f"{where}: no {kind}.{key}, it has {', '.join(keys) or 'none'}; name it as the task's row does"
                )
            with _reading(self.folder / "meta" / "modality.json"):
                entry = keys[key]
                column, start, end = entry.get("original_key") or COLUMN[kind], int(entry["start"]), int(entry["end"])
            if end - start != size:
                raise ValueError(f"{where}: {kind}.{key} has {end - start} columns, the task's has {size}; use a row that fits")
            shape = (features.get(column) or {}).get("shape") or [0]
            if not 0 <= start < end <= shape[0]:
                raise ValueError(
                    f"{where}: {kind}.{key} is {column}[{start}:{end}], of which info.json has {shape[0]} dimensions"
                )
            found.append((column, start, end, bool(entry.get("absolute", True))))
        return found

    def _episodes_v2(self, info: dict, cameras: list[str]) -> list[Episode]:
        file, found = self.folder / "meta" / "episodes.jsonl", []
        with _reading(file):
            self.tasks = {row["task_index"]: row["task"] for row in _lines(file.with_name("tasks.jsonl"))}
            for row in _lines(file):
                index, names = row["episode_index"], {}
                names = {"episode_index": index, "episode_chunk": index // info.get("chunks_size", CHUNK)}
                videos = [self.folder / info["video_path"].format(video_key=camera, **names) for camera in cameras]
                data = self.folder / info["data_path"].format(**names)
                found.append(Episode(index, row["length"], data, tuple(videos), (0.0,) * len(videos)))
        return found

    def _episodes_v3(self, info: dict, cameras: list[str]) -> list[Episode]:
        import pyarrow.parquet as pq

        file, found = self.folder / "meta" / "tasks.parquet", []
        with _reading(file):  # pandas' index, with or without a name
            rows = pq.ParquetFile(file).read().to_pylist()
            self.tasks = {row["task_index"]: row["task"] if "task" in row else row["__index_level_0__"] for row in rows}
        for file in sorted((self.folder / "meta" / "episodes").glob("*/*.parquet")):
            with _reading(file):
                table = pq.ParquetFile(file)
                columns = [name for name in table.schema_arrow.names if not name.startswith("stats/")]
                for row in table.read(columns).to_pylist():
                    places = [f"videos/{camera}" for camera in cameras]
                    names = [{f"{part}_index": row[f"{place}/{part}_index"] for part in ("chunk", "file")}
                             for place in ("data", *places)]  # fmt: skip
                    data = self.folder / info["data_path"].format(**names[0])
                    videos = tuple(
                        self.folder / info["video_path"].format(video_key=camera, **name)
                        for camera, name in zip(cameras, names[1:])
                    )
                    starts = tuple(row[f"{place}/from_timestamp"] for place in places)
                    found.append(Episode(row["episode_index"], row["length"], data, videos, starts))
        return found

    def _check_files(self, name: str) -> None:
        for kind, files in (
            ("data files", (e.data for e in self.episodes)),
            ("videos", (video for e in self.episodes for video in e.videos)),
        ):
            absent = [file for file in dict.fromkeys(files) if not file.is_file()]
            if absent:
                raise FileNotFoundError(f"{name}: {len(absent)} {kind} are missing, {absent[0]} is the first; fetch them")

    def load(self, successes: bool = False) -> LeRobotData:
        """Reads the numbers of all episodes; with `successes`, leaves out those in which nothing succeeds or is rewarded."""
        if successes and not self.judged:
            raise ValueError("it has neither next.success nor next.reward; leave out --successes")
        import numpy as np
        import pyarrow.parquet as pq

        language, numbers = [], {kind: [name for name, *_ in self.columns[kind]] for kind in KINDS}
        wanted = {"episode_index", self.language, *numbers["state"], *numbers["action"], *filter(None, [self.judged])}
        for file, episodes in itertools.groupby(self.episodes, lambda e: e.data):
            with _reading(file):
                table = pq.ParquetFile(file).read(list(wanted))
                values = {name: _matrix(table[name]) for name in wanted}
                parts = [
                    np.concatenate([values[name][:, start:end] for name, start, end, _ in self.columns[kind]], 1)
                    for kind in KINDS
                ]
                for episode in episodes:
                    rows = np.flatnonzero(values["episode_index"][:, 0] == episode.index)
                    if len(rows) != episode.length or not len(rows):
                        raise ValueError(f"{len(rows)} rows of episode {episode.index}, which has {episode.length} by meta/")
                    good = bool((values[self.judged][rows] > 0).any()) if self.judged else None
                    if good or not successes:
                        state, action = (x[rows].astype(np.float32) for x in parts)
                        language.append((episode.index, values[self.language][rows, 0].astype(np.int64)))
                        self.steps[episode.index] = Steps(state, action, language[-1][1], good)
        self.episodes = [episode for episode in self.episodes if episode.index in self.steps]
        if not self.episodes:
            raise ValueError("no episode succeeded; leave out --successes, or record more")
        spoken = sorted({int(i) for _, rows in language for i in np.unique(rows)})
        if absent := [i for i in spoken if i not in self.tasks]:
            raise ValueError(f"{self.folder}: {self.language} has {absent[0]}, which meta/tasks does not; fetch it again")
        self.texts = list(dict.fromkeys(self.tasks[i] for i in spoken))
        number = np.array([self.texts.index(self.tasks[i]) if i in spoken else 0 for i in range(max(spoken) + 1)])
        self.steps = {index: x._replace(prompt=number[x.prompt]) for index, x in self.steps.items()}
        return self

    def numbers(self, kind: str) -> np.ndarray:
        """(S, d) of "state" or "action", of all episodes."""
        import numpy as np

        return np.concatenate([getattr(x, kind) for x in self.steps.values()])

    def samples(self, episodes: Sequence[Episode], horizon: int, size: int, spare: Path) -> TensorDict:
        """A sample (S,) for every step of these episodes, on the host.

        images (S, V, size, size, 3) uint8, state (S, d), prompt (S,) index into `texts`, action (S, horizon, a) with those that
        followed, real (S, horizon), false past the episode's end, where an absolute action is the last one, any other is 0.

        Args:
            size: height and width of the images [px], which are scaled to it.
            spare: folder on a disk for the images, if they take more than half of the memory that is free.
        """
        import numpy as np
        import torch
        from tensordict import TensorDict

        total = sum(e.length for e in episodes)
        images = _image_buffer((total, len(self.modalities["video"]), size, size, 3), spare)
        holds = np.concatenate([[absolute] * (end - start) for _, start, end, absolute in self.columns["action"]])
        found: dict[str, list] = {"state": [], "action": [], "prompt": [], "real": []}
        for episode in episodes:
            steps = self.steps[episode.index]
            then = np.arange(episode.length)[:, None] + np.arange(horizon)  # (L, H)
            real = then < episode.length
            action = steps.action[np.minimum(then, episode.length - 1)] * (real[..., None] | holds)
            for name, x in (("state", steps.state), ("action", action), ("prompt", steps.prompt), ("real", real)):
                found[name].append(x.astype(np.float32) if name == "action" else x)
        begins = dict(zip((e.index for e in episodes), itertools.accumulate((e.length for e in episodes), initial=0)))
        for view in range(len(self.modalities["video"])):
            inside: dict[Path, list[tuple[int, int, int]]] = {}  # of each file, in the order of its frames
            for e in sorted(episodes, key=lambda e: e.starts[view]):  # noqa: B023
                inside.setdefault(e.videos[view], []).append((round(e.starts[view] * self.fps), e.length, begins[e.index]))
            for file, places in inside.items():
                with _reading(file):
                    _decode(file, places, images[:, view])
        tensors = {name: torch.from_numpy(np.concatenate(x)) for name, x in found.items()}
        return TensorDict({"images": images, **tensors}, total)


def far_off(embodiment: Embodiment, data: LeRobotData) -> str | None:
    """Names the keys of loaded data that lie far outside of what a checkpoint was trained on, or fill next to nothing of it.

    Outside: the 1% or the 99% quantile is beyond the trained range by more than its width. None where no key is far off.
    """
    import numpy as np

    found = []
    for kind in KINDS:
        at, x = 0, data.numbers(kind)
        for key, size in data.modalities[kind].items():
            low, high = np.quantile(x[:, at : at + size], [0.01, 0.99], axis=0)
            stat = {name: np.atleast_1d(embodiment.statistics(kind)[key][name]) for name in ("min", "max")}
            width, at = np.maximum(stat["max"] - stat["min"], 1e-3), at + size
            outside = (low < stat["min"] - width) | (high > stat["max"] + width)
            if outside.any() or (high - low < 0.01 * width).all():
                shown = [np.round(v, 3).tolist() for v in (low, high, stat["min"], stat["max"])]
                found.append(f"{kind}.{key} is {shown[0]} to {shown[1]}, trained on {shown[2]} to {shown[3]}")
    return "; ".join(found) or None


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def _matrix(column: Any) -> np.ndarray:
    """A parquet column of numbers, or of lists of equal length: (rows, n)."""
    x = column.combine_chunks()
    return (x.flatten() if hasattr(x.type, "value_type") else x).to_numpy(zero_copy_only=False).reshape(len(x), -1)


def _image_buffer(shape: tuple[int, ...], spare: Path) -> Tensor:
    """Room for images, in memory or in a file that goes with the process."""
    import tempfile

    import psutil
    import torch

    size = math.prod(shape)
    if size <= psutil.virtual_memory().available // 2:
        return torch.empty(shape, dtype=torch.uint8)
    with tempfile.NamedTemporaryFile(dir=spare) as file:  # mapped, it outlives its name
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise ValueError(f"its images take {size / 1e9:.0f} GB, more than memory and {spare} have; use fewer") from error
        return torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8).view(shape)


def _decode(file: Path, places: list[tuple[int, int, int]], images: Tensor) -> None:
    """Frames of a video into rows of images (S, H, W, 3): places are (first frame, how many, first row), in order."""
    import av
    import torch
    import torch.nn.functional as F

    size = tuple(images.shape[1:3])
    with av.open(str(file)) as container:
        container.streams.video[0].thread_type = "AUTO"
        frames, at = container.decode(video=0), 0
        for first, count, row in places:
            for i in range(count):
                frame = next(itertools.islice(frames, first + i - at, None), None)
                if frame is None:
                    raise ValueError(f"it ends before frame {first + i}")
                at = first + i + 1
                x = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                if tuple(x.shape[:2]) != size:
                    x = x.permute(2, 0, 1)[None].float()
                    x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)[0].permute(1, 2, 0)
                    x = x.round().clamp(0, 255).to(torch.uint8)
                images[row + i] = x


# ------------------------------------------------------------------------------------------------------------------
def check_record(folder: str) -> None:
    """Refuses, in one line, what no data set can be written to."""
    if Path(folder).exists():
        raise SystemExit(f"--record {folder}: is there already; name another folder, or delete it")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit(f"--record {folder}: one process writes a data set; start without torchrun")


class LeRobotWriter:
    """Writes episodes as a LeRobot data set, v2.1, with NVIDIA's modality.json; the folder appears when all is well.

        with LeRobotWriter(folder, task.modalities, fps) as writer:
            writer.begin(seed, texts)  # so many episodes at once
            writer.step(images, state, action, running, success)

    State and action are exact, videos lossless. Besides LeRobot's columns there are next.reward, 1 with the success,
    next.success and next.done; meta/episodes.jsonl tells each episode's success, and the seed of the batch that it began in.
    """

    def __init__(self, folder: str | Path, modalities: Mapping[str, Any], fps: float):
        """modalities: as in `LeRobotData`; fps: control steps per second, rounded."""
        import resource

        self.target, self.modalities, self.fps = Path(folder), modalities, round(fps)
        self.folder = self.target.with_name(f".{self.target.name}.partial")
        self.cameras = [f"observation.images.{key}" for key in modalities["video"]]
        self.episodes: list[dict] = []
        self.stats: list[dict] = []  # of each episode
        self.tasks: dict[str, int] = {}
        self.total, self.size, self.running = 0, (0, 0), []
        # a video is open for each environment and camera
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def __enter__(self) -> LeRobotWriter:
        from shutil import rmtree

        rmtree(self.folder, ignore_errors=True)
        (self.folder / "meta").mkdir(parents=True)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        from shutil import rmtree

        if kind:
            rmtree(self.folder, ignore_errors=True)
            return
        self._finish()
        self._describe()
        os.rename(self.folder, self.target)

    def begin(self, seed: int, texts: Sequence[str]) -> None:
        """Starts an episode in every environment, with these instructions; those before are over."""
        self._finish()
        for text in texts:
            self.tasks.setdefault(text, len(self.tasks))
        self.running = [_Writing(self, len(self.episodes) + i, seed, text) for i, text in enumerate(texts)]

    def step(self, images: Tensor, state: Tensor, action: Tensor, running: Tensor, success: Tensor) -> None:
        """What was seen and done in a step; only where an episode was still running (N,) before it.

        Args:
            images: (N, V, H, W, 3) uint8; state (N, d) and action (N, a) in the simulator's units.
            success: (N,) whether it has succeeded, after the step.
        """
        self.size = tuple(images.shape[2:4])
        columns = [x.cpu().numpy() for x in (running, images, state, action, success)]
        for episode, (runs, *step) in zip(self.running, zip(*columns)):
            if runs:
                episode.add(*step)

    def _finish(self) -> None:
        for episode in self.running:
            if episode.rows:
                about, stats = episode.close(self.total)
                self.total += about["length"]
                self.episodes.append(about)
                self.stats.append(stats)
        self.running = []

    def _describe(self) -> None:
        import numpy as np

        def slices(kind: str) -> dict[str, dict]:
            ends = itertools.accumulate(self.modalities[kind].values())
            return {key: {"start": end - n, "end": end} for (key, n), end in zip(self.modalities[kind].items(), ends)}

        def numbered(kind: str) -> list[str]:
            return [f"{key}_{i}" if n > 1 else key for key, n in self.modalities[kind].items() for i in range(n)]

        height, width = self.size
        video = {"video.fps": self.fps, "video.height": height, "video.width": width, "video.channels": 3}
        video |= {"video.codec": "h264", "video.pix_fmt": "gbrp", "video.is_depth_map": False, "has_audio": False}
        features = {
            COLUMN[kind]: {"dtype": "float32", "shape": [len(numbered(kind))], "names": numbered(kind)} for kind in KINDS
        } | {
            camera: {"dtype": "video", "shape": [height, width, 3], "names": ["height", "width", "channels"], "info": video}
            for camera in self.cameras
        }
        for name, kind in (("timestamp", "float32"), *((name, "int64") for name in _INDICES), *_OUTCOMES.items()):
            features[name] = {"dtype": kind, "shape": [1], "names": None}
        chunks = math.ceil(len(self.episodes) / CHUNK)
        info = {
            "codebase_version": "v2.1", "robot_type": None, "total_episodes": len(self.episodes), "total_frames": self.total,
            "total_tasks": len(self.tasks), "total_videos": len(self.episodes) * len(self.cameras), "total_chunks": chunks,
            "chunks_size": CHUNK, "fps": self.fps, "splits": {"train": f"0:{len(self.episodes)}"}, "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.cameras else None, "features": features,
        }  # fmt: skip
        modality = {kind: slices(kind) for kind in KINDS}
        modality["video"] = {key: {"original_key": name} for key, name in zip(self.modalities["video"], self.cameras)}
        modality["annotation"] = {"human.action.task_description": {"original_key": "task_index"}}
        whole = {}
        for kind in KINDS:  # NVIDIA's loader wants all six
            x = np.concatenate([stats[f"all.{kind}"] for stats in self.stats]) if self.stats else np.zeros((1, 1))
            q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
            found = {"mean": x.mean(0), "std": x.std(0), "min": x.min(0), "max": x.max(0), "q01": q01, "q99": q99}
            whole[COLUMN[kind]] = {name: value.tolist() for name, value in found.items()}
        stats = [
            {"episode_index": i, "stats": {name: x for name, x in row.items() if not name.startswith("all.")}}
            for i, row in enumerate(self.stats)
        ]
        tasks = [{"task_index": i, "task": text} for text, i in self.tasks.items()]
        meta = self.folder / "meta"
        for name, content in (("info", info), ("modality", modality), ("stats", whole)):
            (meta / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
        for name, rows in (("episodes", self.episodes), ("episodes_stats", stats), ("tasks", tasks)):
            (meta / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


_INDICES = ("frame_index", "episode_index", "index", "task_index")
_OUTCOMES = {"next.reward": "float32", "next.done": "bool", "next.success": "bool"}


class _Writing:
    """An episode on its way to disk: its videos are encoded as they come, its numbers wait."""

    def __init__(self, writer: LeRobotWriter, index: int, seed: int, text: str):
        self.writer, self.index, self.seed, self.text = writer, index, seed, text
        self.rows: list[tuple] = []
        self.videos: list[tuple] = []
        self.moments: list[np.ndarray] = []  # (V, 4, 3) of each frame: min, max, mean and mean square of its colours

    def path(self, pattern: str, camera: str = "") -> Path:
        file = pattern.format(episode_chunk=self.index // CHUNK, episode_index=self.index, video_key=camera)
        file = self.writer.folder / file
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def add(self, images: np.ndarray, state: np.ndarray, action: np.ndarray, success: np.bool_) -> None:
        import av
        import numpy as np

        if not self.rows:
            codec, options = CODEC
            for camera, (height, width, _) in zip(self.writer.cameras, (image.shape for image in images)):
                container = av.open(str(self.path(VIDEO_PATH, camera)), "w")
                stream = container.add_stream(codec, rate=self.writer.fps, options=options)
                stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
                stream.codec_context.thread_count = 1  # there are as many encoders as episodes
                self.videos.append((container, stream))
        for (container, stream), image in zip(self.videos, images):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        if self.videos:
            x = images.reshape(len(images), -1, 3) / 255.0
            self.moments.append(np.stack([x.min(1), x.max(1), x.mean(1), (x**2).mean(1)], 1))
        self.rows.append((state, action, success))

    def close(self, begin: int) -> tuple[dict, dict]:
        """Writes the episode as the one whose first row is number `begin`; what meta/ says of it, and its statistics."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        for container, stream in self.videos:
            container.mux(stream.encode())
            container.close()
        state, action, success = (np.stack(x) for x in zip(*self.rows))
        n = len(state)
        numbers = {
            COLUMN["state"]: state.astype(np.float32),
            COLUMN["action"]: action.astype(np.float32),
            "timestamp": (np.arange(n) / self.writer.fps).astype(np.float32),
            "frame_index": np.arange(n),
            "episode_index": np.full(n, self.index),
            "index": begin + np.arange(n),
            "task_index": np.full(n, self.writer.tasks[self.text]),
            "next.reward": success.astype(np.float32),
            "next.done": np.arange(n) == n - 1,
            "next.success": success,
        }
        columns = {
            name: pa.array(x) if x.ndim == 1 else pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
            for name, x in numbers.items()
        }
        pq.write_table(pa.table(columns), self.path(DATA_PATH))
        stats: dict[str, Any] = {}
        for name, x in numbers.items():
            x = x.reshape(n, -1).astype(np.float64)
            found = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
            stats[name] = {key: value.tolist() for key, value in found.items()} | {"count": [n]}
        for view, camera in enumerate(self.writer.cameras):
            low, high, mean, square = np.stack([m[view] for m in self.moments], 1)  # (n, 3) each
            mean, square = mean.mean(0), square.mean(0)
            found = {"min": low.min(0), "max": high.max(0), "mean": mean, "std": np.sqrt(np.maximum(square - mean**2, 0))}
            stats[camera] = {key: value.reshape(3, 1, 1).tolist() for key, value in found.items()} | {"count": [n]}
        stats |= {"all.state": numbers[COLUMN["state"]], "all.action": numbers[COLUMN["action"]]}
        about = {"episode_index": self.index, "tasks": [self.text], "length": n}
        return about | {"success": bool(success.any()), "seed": self.seed}, stats
