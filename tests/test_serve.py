"""serve_gr00t.py over real sockets: server processes with the shipped tiny checkpoint, and a client of the tests' own."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
import zmq
from tensordict import TensorDict

import grpo_gr00t
import serve_gr00t
from common import Noise, Ranks
from gr00t_n1d5.network import Gr00tConfig, Gr00tN1d5
from gr00t_n1d5.processor import Gr00tProcessor, tiny_tokenizer

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "checkpoints" / "tiny")
LANGUAGE = "annotation.human.action.task_description"
TEXTS = ("lift the red cube", "lift the blue cube")
SEED = 5


def npy(array: np.ndarray, allow_pickle: bool = False) -> dict:
    data = io.BytesIO()
    np.save(data, array, allow_pickle=allow_pickle)
    return {"__ndarray_class__": True, "as_npy": data.getvalue()}


def packed(data: dict) -> dict:
    """What the server makes of a client's data."""
    return {key: npy(value) if isinstance(value, np.ndarray) else value for key, value in data.items()}


class Client:
    """The protocol from the other side. A request that is not answered raises zmq.Again after 20 s."""

    def __init__(self, address: str):
        self.socket = zmq.Context.instance().socket(zmq.REQ)
        self.socket.setsockopt(zmq.RCVTIMEO, 20_000)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)

    def send(self, *parts: bytes) -> dict:
        self.socket.send_multipart(parts)
        return msgpack.unpackb(
            self.socket.recv(),
            object_hook=lambda x: np.load(io.BytesIO(x["as_npy"]), allow_pickle=False) if "__ndarray_class__" in x else x,
        )

    def __call__(self, endpoint: str, data=None, **more) -> dict:
        return self.send(msgpack.packb({"endpoint": endpoint, "data": data, **more}, default=npy))


def observations(n: int, seed: int = 0) -> dict:
    """A batch for the shipped checkpoint; every second instruction is the other one."""
    rng = np.random.default_rng(seed)
    return {
        "video.cam": rng.integers(256, size=(n, 1, 64, 64, 3), dtype=np.uint8),
        "state.gripper_position": rng.uniform(-0.1, 0.1, (n, 1, 3)),
        "state.finger_positions": rng.uniform(0, 0.05, (n, 1, 2)).astype(np.float32),
        LANGUAGE: [TEXTS[i % 2] for i in range(n)],
    }


def first(data: dict) -> dict:
    """The first observation of a batch, unbatched."""
    return {key: value[0] if isinstance(value, np.ndarray) else value[:1] for key, value in data.items()}


def joined(reply: dict, *keys: str) -> np.ndarray:
    assert list(reply) == [f"action.{key}" for key in keys], reply
    assert all(x.dtype == np.float32 for x in reply.values())
    return np.concatenate(list(reply.values()), -1)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server process that has answered one single and one batched request, and its client."""
    log = tmp_path_factory.mktemp("serve") / "stderr"
    flags = ["--checkpoint", TINY, "--seed", str(SEED), "--device", "cpu", "--port", "0"]
    with open(log, "w") as errors:
        command = [sys.executable, str(ROOT / "serve_gr00t.py"), *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        address = process.stdout.readline().rpartition(" at ")[2].strip()
        assert address.startswith("tcp://127.0.0.1:"), log.read_text()
        client = Client(address)
        replies = [client("get_action", first(observations(1))), client("get_action", observations(3, 1))]
        yield types.SimpleNamespace(client=client, replies=replies)
        client("kill")
        assert process.wait(20) == 0 and "Traceback" not in log.read_text()
        *_, last = process.stdout.read().splitlines()
        median, high, count = map(
            float, re.fullmatch(r"latency (.+) ms .median., (.+) ms .95%. of (\d+) requests", last).groups()
        )
        assert 0.5 < median <= high < 20_000 and count >= len(replies)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# ---------------------------------------------------------------- what is served


def trained_with(noise: Noise, *batches: dict, **flags) -> list[np.ndarray]:
    """Actions (N, H, 4) of grpo_gr00t.py's own ODE policy, in this process."""
    actor, actions = grpo_gr00t.Gr00tActor(grpo_gr00t.Args(checkpoint=TINY, device="cpu", **flags)), []
    for data in batches:
        state = np.concatenate([data["state.gripper_position"], data["state.finger_positions"]], -1)[:, 0]
        seen = {
            "images": torch.from_numpy(data["video.cam"]),  # one time step there, one camera here
            "state": torch.from_numpy(state).float(),
            "prompt": torch.tensor([TEXTS.index(text) for text in data[LANGUAGE]]),
        }
        actions.append(actor.act(TensorDict(seen, len(state)), noise)["action"].numpy())
    return actions


def test_actions_are_those_of_training(server):
    single, batch = trained_with(Noise("cpu", Ranks(0, 1), SEED), observations(1), observations(3, 1))
    found = [joined(reply, "gripper_delta", "gripper_open") for reply in server.replies]
    assert found[0].shape == (8, 4) and found[1].shape == (3, 8, 4) and batch.std() > 0.1
    np.testing.assert_allclose(found[0], single[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[1], batch, rtol=0, atol=1e-6)


def test_modality_config(server):
    reply = server.client("get_modality_config")
    assert all(set(x) == {"__ModalityConfig_class__", "as_json"} for x in reply.values())
    assert {kind: json.loads(x["as_json"]) for kind, x in reply.items()} == {
        "video": {"delta_indices": [0], "modality_keys": ["video.cam"]},
        "state": {"delta_indices": [0], "modality_keys": ["state.gripper_position", "state.finger_positions"]},
        "action": {"delta_indices": list(range(8)), "modality_keys": ["action.gripper_delta", "action.gripper_open"]},
        "language": {"delta_indices": [0], "modality_keys": [LANGUAGE]},
    }


def test_what_else_is_accepted(server):
    """get_action is the default endpoint; any annotation key, as a list or an array; big-endian, Fortran order, integers."""
    data = first(observations(1)) | {"video.wrist": np.zeros(3), "state.neck": np.zeros(1)}  # what a robot has besides
    data["annotation.human.task_description"] = np.array(data.pop(LANGUAGE))
    data["state.gripper_position"] = data["state.gripper_position"].astype(">f8")
    data["video.cam"] = np.asfortranarray(data["video.cam"])
    reply = server.client.send(msgpack.packb({"data": data}, default=npy))
    assert joined(reply, "gripper_delta", "gripper_open").shape == (8, 4)
    data["state.finger_positions"] = np.zeros((1, 2), np.int64)
    data["annotation.human.task_description"] = TEXTS[0]
    assert joined(server.client("get_action", data), "gripper_delta", "gripper_open").shape == (8, 4)


def execute(client: Client, steps: int, period: float, threshold: float) -> tuple[int, list[int]]:
    """Acts every `period` seconds; with less than a share of the last chunk left, the next one is asked for meanwhile.

    As lerobot's asynchronous inference does it. A chunk's actions belong to the steps after its observation: those whose step
    is over when it arrives are left out.

    Returns:
        Steps after the first chunk's arrival without an action, and the observations' steps.
    """
    planned, asked, idle, future, start = {}, [], 0, None, time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        for t in range(steps):
            if future and future.done():
                chunk = joined(future.result(), "gripper_delta", "gripper_open")
                planned |= {asked[-1] + i: action for i, action in enumerate(chunk)}
                future = None
            if not future and sum(step >= t for step in planned) <= threshold * 8:
                future = pool.submit(client, "get_action", first(observations(1, t)))
                asked.append(t)
            idle += bool(planned) and t not in planned
            time.sleep(max(0, start + (t + 1) * period - time.perf_counter()))
    return idle, asked


def test_chunks_are_had_in_time_by_clients_of_several_rates(server):
    """One asks ahead and never waits, one asks when all is done and does; a third floods the server, a fourth is gone."""
    address, done = server.client.socket.getsockopt_string(zmq.LAST_ENDPOINT), threading.Event()
    clients, shapes = [Client(address) for _ in range(4)], set()
    clients[3].socket.send(msgpack.packb({"data": first(observations(1))}, default=npy))
    clients[3].socket.close()

    def flood() -> None:
        while not done.is_set():
            shapes.add(joined(clients[2]("get_action", observations(3)), "gripper_delta", "gripper_open").shape)

    with ThreadPoolExecutor(3) as pool:
        flooding = pool.submit(flood)
        ahead, late = (pool.submit(execute, client, 30, 0.1, share) for client, share in zip(clients, (0.5, 0.0)))
        try:
            (idle, asked), (waits, asked_late) = ahead.result(60), late.result(60)
        finally:
            done.set()
        flooding.result(60)
    assert idle == 0 and len(asked) >= 6 and shapes == {(3, 8, 4)}
    assert waits >= len(asked_late) - 2 > 0


@pytest.fixture(scope="module")
def robot(tmp_path_factory) -> Path:
    """Random weights with what the shipped checkpoint lacks: two cameras, rows for 32 embodiments, padding, cropping."""
    config = Gr00tConfig.tiny(action_dim=6, num_embodiments=32, max_text_tokens=32, image_crop=0.95)
    torch.manual_seed(0)
    net = Gr00tN1d5(config)
    video = {key: {"resolution": [64, 64], "channels": 3, "fps": 20} for key in ("front", "wrist")}
    state, action = ({"arm": torch.randn(50, 3), key: torch.randn(50, 1)} for key in ("finger", "gripper"))
    words = tiny_tokenizer(["lift", "the", "red", "cube"], config)
    processor = Gr00tProcessor.from_statistics(config, "new_embodiment", state, action, video, words)
    folder = tmp_path_factory.mktemp("robot") / "checkpoint"
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make(checkpoint, **flags) -> serve_gr00t.ServedPolicy:
    return serve_gr00t.ServedPolicy(serve_gr00t.Args(checkpoint=str(checkpoint), device="cpu", **flags))


def robot_observations() -> dict:
    """Three observations, with cameras of different sizes and instructions of different lengths."""
    rng = np.random.default_rng(0)
    return {
        "video.front": rng.integers(256, size=(3, 1, 64, 64, 3), dtype=np.uint8),
        "video.wrist": rng.integers(256, size=(3, 1, 48, 80, 3), dtype=np.uint8),
        "state.arm": rng.normal(size=(3, 1, 3)),
        "state.finger": rng.normal(size=(3, 1, 1)),
        LANGUAGE: ["lift the red cube", "lift", "lift the red cube"],
    }


@pytest.mark.parametrize("flags", [{}, {"micro_batch_size": 1}, {"denoise_steps": 2}, {"data_config": ("wrist", "front")}])
def test_a_batch_equals_its_rows(robot, flags, tmp_path):
    """Each row by the network's own get_action, with the row of its embodiment among all 32."""
    data = robot_observations()
    net = Gr00tN1d5.from_pretrained(robot)
    processor = Gr00tProcessor.from_pretrained(robot, net.config)
    noise = Noise("cpu", Ranks(0, 1), 1).normal(3, 8, 6)
    cameras = flags.get("data_config", ("front", "wrist"))
    if "data_config" in flags:  # of one's own
        own = tmp_path / "own.json"
        own.write_text(json.dumps(processor.embodiment.data.to_dict() | {"video": cameras}))
        flags = {"data_config": str(own)}
    expected = []
    for i, text in enumerate(data[LANGUAGE]):
        pixels = torch.cat([processor.images(torch.from_numpy(data[f"video.{key}"][i : i + 1])) for key in cameras])
        state = torch.from_numpy(np.concatenate([data["state.arm"][i], data["state.finger"][i]], -1))
        inputs = processor.prompt(text, 2)[None], pixels, processor.normalize_state(state)
        x = net.get_action(*inputs, torch.tensor([31]), noise[i : i + 1], flags.get("denoise_steps", 4))
        expected.append(processor.unnormalize_action(x)[0].numpy())
    found = joined(make(robot, **flags).get_action(packed(data)), "arm", "gripper")
    np.testing.assert_allclose(found, np.stack(expected), rtol=0, atol=1e-5)
    assert np.std(expected, axis=0).mean() > 0.01


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_act_the_same():
    policies, data = (make(TINY, compile=True), make(TINY)), packed(observations(2))
    found, expected = (joined(policy.get_action(data), "gripper_delta", "gripper_open") for policy in policies)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    compiled, plain = (policy.net.action_head.model.transformer_blocks[0]._compiled_call_impl for policy in policies)
    assert compiled and not plain


def test_bfloat16_backbone():
    """As in training, and unlike fp32."""
    expected, plain = (trained_with(Noise("cpu", Ranks(0, 1), 1), observations(3), precision=p)[0] for p in ("bf16", "fp32"))
    found = joined(make(TINY, precision="bf16").get_action(packed(observations(3))), "gripper_delta", "gripper_open")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert np.abs(found - plain).max() > 1e-4


@pytest.mark.parametrize("form, single, batched", [("plain", False, False), ("bracketed", True, True), ("nvidia", True, False)])
def test_form_of_the_instruction(form, single, batched):
    """The tiny tokenizer does not know the word "['lift", so its complaint shows how the instruction was written."""
    policy, nested = make(TINY, prompt=form), observations(1) | {LANGUAGE: [[TEXTS[0]]]}
    # (B, 1) as NVIDIA's docstring has it is bracketed there, too
    for brackets, data in ((single, first(observations(1))), (batched, observations(1)), (single, nested)):
        expected = pytest.raises(serve_gr00t.RequestError, match=r"\['lift") if brackets else contextlib.nullcontext()
        with expected:
            assert policy.get_action(packed(data))


# ---------------------------------------------------------------- what is refused


class Evil:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def archive() -> dict:
    data = io.BytesIO()
    np.savez(data, np.zeros(3))
    return {"__ndarray_class__": True, "as_npy": data.getvalue()}


def promise() -> dict:
    """The header of an array of 256 TiB, without the array."""
    data = io.BytesIO()
    np.lib.format.write_array_header_1_0(data, {"descr": "<f8", "fortran_order": False, "shape": (1, 1 << 45)})
    return {"__ndarray_class__": True, "as_npy": data.getvalue()}


CAM, ARM, FINGERS = "video.cam", "state.gripper_position", "state.finger_positions"
CHANGES = {  # of a good request, and what the reply says
    "absent camera": ({CAM: None}, "absent: 'video.cam'"),
    "two instructions": ({"annotation.other": [TEXTS[0]]}, "more than one instruction: 'annotation.other'"),
    "float image": ({CAM: np.zeros((1, 64, 64, 3), np.float32)}, "video.cam: its type is float32, not uint8"),
    "state of text": ({ARM: np.full((1, 3), "1")}, "state.gripper_position: its type is <U1, not a number"),
    "channels first": ({CAM: np.zeros((1, 3, 64, 64), np.uint8)}, "video.cam: its shape is (1, 3, 64, 64)"),
    "no pixels": ({CAM: np.zeros((1, 0, 0, 3), np.uint8)}, "video.cam: its shape is (1, 0, 0, 3)"),
    "half a batch": ({ARM: np.zeros((2, 1, 3))}, "state.gripper_position: its shape is (2, 1, 3)"),
    "other batch": ({ARM: np.zeros((2, 1, 3)), FINGERS: np.zeros((3, 1, 2))}, "its shape is"),
    "empty batch": (observations(0), "video.cam: its shape is (0, 1, 64, 64, 3)"),
    "nan": ({ARM: np.full((1, 3), np.nan)}, "state: it holds nan"),
    "inf in fp32": ({ARM: np.full((1, 3), 1e300)}, "state: it holds nan, inf"),
    "list": ({ARM: [[0.0, 0.0, 0.0]]}, "state.gripper_position: not an array"),
    "npy as text": ({ARM: {"__ndarray_class__": True, "as_npy": "npy"}}, "state.gripper_position: not an array"),
    "no npy": ({ARM: {"__ndarray_class__": True, "as_npy": b"abc"}}, "state.gripper_position: not an npy array"),
    "archive": ({ARM: archive()}, "state.gripper_position: not an npy array but an archive"),
    "promise": ({ARM: promise()}, "state.gripper_position: not an npy array"),
    "unknown word": ({LANGUAGE: ["lift the green cube"]}, "annotation.human.action.task_description: instruction"),
    "no instruction": ({LANGUAGE: None}, "'Perform'"),  # NVIDIA's default has words that the tiny tokenizer lacks
    "too many": ({LANGUAGE: list(TEXTS)}, "must be strings, one per observation (1)"),
    "no text": ({LANGUAGE: [1]}, "must be strings, one per observation (1)"),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", CHANGES.values(), ids=CHANGES)
def test_bad_observations(server, changes, message):
    data = {key: value for key, value in (first(observations(1)) | changes).items() if value is not None}
    refused(server.client("get_action", data), message)
    assert server.client("ping")["status"] == "ok"


GOOD = msgpack.packb({"endpoint": "ping"})
MESSAGES = {
    "nothing": ([b""], "not a msgpack message"),
    "no msgpack": ([b"\xc1"], "not a msgpack message"),
    "cut short": ([GOOD[:-2]], "not a msgpack message"),
    "two parts": ([GOOD, GOOD], "not a msgpack message of one part"),
    "no text": ([b"\x81\xa1\xff\xc0"], "not a msgpack message"),
    "nested": ([b"\x91" * 5000], "not a msgpack message"),
    "unknown endpoint": ([msgpack.packb({"endpoint": "reset"})], "unknown endpoint 'reset'"),
    "endpoint of another type": ([msgpack.packb({"endpoint": [7]})], "unknown endpoint [7]"),
    "long endpoint": ([msgpack.packb({"endpoint": "x" * 100_000})], "unknown endpoint 'xxx"),
    "no data": ([msgpack.packb({"endpoint": "get_action"})], "data: not a map"),
    "data of another type": ([msgpack.packb({"endpoint": "get_action", "data": [1]})], "data: not a map"),
}


def refused(reply: dict, message: str) -> None:
    assert set(reply) == {"error"} and message in reply["error"], reply
    assert "\n" not in reply["error"] and len(reply["error"]) <= 500


@pytest.mark.parametrize("parts, message", MESSAGES.values(), ids=MESSAGES)
def test_bad_messages(server, parts, message):
    refused(server.client.send(*parts), message)
    assert server.client("ping")["status"] == "ok"


@pytest.mark.parametrize("form", ["pickle", "array of objects"])
def test_nothing_is_unpickled(server, form, tmp_path):
    evil = Evil(tmp_path / "written")
    packed = npy(np.array([evil], dtype=object), allow_pickle=True)
    if form == "pickle":
        packed["as_npy"] = pickle.dumps(evil)
    refused(server.client("get_action", first(observations(1)) | {CAM: packed}), "video.cam: not an npy array")
    assert not evil.path.exists()
    assert joined(server.client("get_action", first(observations(1))), "gripper_delta", "gripper_open").shape == (8, 4)


def test_an_unforeseen_failure_is_answered(monkeypatch, capsys):
    policy = make(TINY)
    monkeypatch.setattr(policy, "modality_config", lambda: 1 / 0)
    reply, goes_on = serve_gr00t.answer(lambda: {"endpoint": "get_modality_config"}, policy, None)
    assert goes_on and reply == {"error": "ZeroDivisionError: division by zero"} and "Traceback" in capsys.readouterr().err


def test_token_and_kill():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = serve_gr00t.Args(checkpoint=TINY, device="cpu", port=port, api_token="secret")
    thread = threading.Thread(target=serve_gr00t.main, args=(args,), daemon=True)
    thread.start()
    client = Client(f"tcp://127.0.0.1:{port}")
    for given in ({}, {"api_token": "Secret"}, {"api_token": "ü"}, {"api_token": 1}, {"api_token": None}):
        for endpoint in ("ping", "get_action", "get_modality_config", "kill"):
            refused(client(endpoint, **given), "Unauthorized")
    assert client("ping", api_token="secret") == {"status": "ok", "message": "Server is running"}
    assert thread.is_alive()
    assert client("kill", api_token="secret")["status"] == "ok"
    thread.join(20)
    assert not thread.is_alive()
    client.socket.close()


# ---------------------------------------------------------------- HTTP


def json_numpy(array: np.ndarray) -> dict:
    """As the package of that name writes it."""
    text = base64.b64encode(array.tobytes()).decode()
    return {"__numpy__": text, "dtype": np.lib.format.dtype_to_descr(array.dtype), "shape": array.shape}


def test_http(capsys):
    """NVIDIA's HTTP mode: the same actions, refusals in words, and the next request is answered."""
    args = serve_gr00t.Args(checkpoint=TINY, device="cpu", port=0, http=True, seed=SEED, api_token="secret")
    server = serve_gr00t.HttpServer((args.host, 0), serve_gr00t.HttpHandler)
    server.policy, server.api_token = make(TINY, seed=SEED), "secret"
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def post(body, path: str = "/act") -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        connection.request(
            "POST", path, body if isinstance(body, bytes) else json.dumps(body), {"Content-Type": "application/json"}
        )
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())

    data = {key: json_numpy(x) if isinstance(x, np.ndarray) else x for key, x in first(observations(1)).items()}
    (expected,) = trained_with(Noise("cpu", Ranks(0, 1), SEED), observations(1))
    status, reply = post({"observation": data, "config": None, "api_token": "secret"})
    found = {key: np.frombuffer(base64.b64decode(x["__numpy__"]), x["dtype"]).reshape(x["shape"]) for key, x in reply.items()}
    assert status == 200
    np.testing.assert_allclose(joined(found, "gripper_delta", "gripper_open"), expected[0], rtol=0, atol=1e-6)
    assert post({"encoded": json.dumps({"observation": data, "api_token": "secret"})})[0] == 200
    objects = dict(data, **{ARM: {"__numpy__": "AAAA", "dtype": "|O", "shape": [1]}})
    for body, why in (
        ({"observation": data}, "Unauthorized"), (b"{", "not JSON"), ({}, "not JSON"), ([], "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ({"observation": {}, "api_token": "secret"}, "absent"), ({"observation": objects, "api_token": "secret"}, "json_numpy"),
    ):  # fmt: skip
        status, reply = post(body)
        assert status == 400 and set(reply) == {"detail"} and why in reply["detail"], reply
    assert post({}, "/kill")[0] == 404
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {"status": "healthy", "model": "GR00T"}
    with pytest.raises(SystemExit, match=f"--port {server.server_port}: "):
        serve_gr00t.serve_http(serve_gr00t.Args(device="cpu", port=server.server_port, http=True))
    server.shutdown()
    server.server_close()


# ---------------------------------------------------------------- the command line


def refusal(**flags) -> str:
    with pytest.raises(SystemExit) as caught:
        serve_gr00t.main(serve_gr00t.check(serve_gr00t.Args(**{"device": "cpu", "port": 0, **flags})))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_checkpoints(tmp_path):
    def error(folder: Path, **flags) -> str:
        text = refusal(checkpoint=str(folder), **flags)
        assert text.startswith(f"--checkpoint {folder}: ")
        return text

    error(tmp_path / "missing")
    assert refusal(embodiment_tag="octopus").startswith("--embodiment-tag octopus: ")
    assert refusal(data_config="octopus").startswith("--data-config octopus: ")
    folder = shutil.copytree(TINY, tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(b"nothing")
    error(folder)


@pytest.mark.parametrize("flags", [{"port": 70_000}, {"host": "no-where"}, {"api_token": ""}])
def test_bad_flags(flags):
    ((name, value),) = flags.items()
    assert refusal(**flags).startswith(f"--{name.replace('_', '-')} {value}".rstrip() + ": ")


def test_addresses(capsys):
    """A port that is taken is refused; an open host without a token is warned of."""
    with zmq.Context() as context, context.socket(zmq.REP) as listening:
        address = serve_gr00t.bind(serve_gr00t.Args(host="localhost", port=0), listening)
        port = int(address.removeprefix("tcp://127.0.0.1:"))
        assert refusal(port=port).startswith(f"--port {port}: ")
    assert capsys.readouterr().err == ""
    for token, lines in ((None, 1), ("secret", 0)):
        with zmq.Context() as context, context.socket(zmq.REP) as listening:
            serve_gr00t.bind(serve_gr00t.Args(host="0.0.0.0", port=0, api_token=token), listening)
        text = capsys.readouterr().err
        assert text.count("\n") == lines and ("--api-token" in text) == bool(lines)


def test_precision_by_size(robot, tmp_path, monkeypatch):
    folder = shutil.copytree(robot, tmp_path / "full")
    (folder / "config.json").write_text(json.dumps(Gr00tConfig(action_horizon=8).to_dict()))
    for flags, precision in ((), "fp32"), (("--checkpoint", str(folder)), "bf16"):
        monkeypatch.setattr("sys.argv", ["serve_gr00t.py", *flags])
        assert serve_gr00t.parse().precision == precision
