"""Makes nvidia_client.msgpack: the bytes that NVIDIA's own N1.5 policy clients send, for serve_gr00t.py to answer.

It needs a clone of Isaac-GR00T (Apache-2.0) at N1.5 with its history, here NVIDIA's commit of 2025-10-30 from a public
fork, and an environment apart from the project's (Python 3.12). From the repository root:

    git clone https://github.com/RLWRLD/Isaac-GR00T && git -C Isaac-GR00T checkout e845e75
    uv venv --python 3.12 nvidia-venv
    uv pip install --python nvidia-venv torch==2.11.0 torchvision==0.26.0 transformers==4.51.3 diffusers==0.30.2 \\
        peft timm einops dm-tree numpydantic albumentations opencv-python-headless av pandas tqdm pyzmq msgpack
    nvidia-venv/bin/python tests/golden/record_nvidia_client.py Isaac-GR00T

The clients are unchanged. The two of e845e75 send the same bytes, which is checked. Those from before 2025-08-25 sent what
torch.save writes, and one commit of that night a pickle: a server has to refuse both unread. The file is one msgpack map:

    {name: {"request": raw bytes, "endpoint": str, "api_token": str or nil, "serializer": "msgpack", "torch" or "pickle",
            "observation": nil or {key: npy bytes for an array, else the string or list of strings}}}

The keys of an observation stand in the order in which they were sent. By hand, the same requests to a live server (those
whose keys it does not have are refused, and the refusal is printed):

    nvidia-venv/bin/python tests/golden/record_nvidia_client.py Isaac-GR00T --connect 127.0.0.1:5555 --out replies.npz
"""

import argparse
import importlib
import io
import subprocess
import sys
import threading
import types
from pathlib import Path

import msgpack
import numpy as np
import zmq

TASK = "annotation.human.task_description"
TOKEN = "open, sesame"
# The last commits that serialised so; the file that defines the client, and what it imports of the same age.
OLD = {
    "torch": ("76a042d~1", ()),
    "pickle": ("6b44c00~1", ("gr00t.utils.serialization",)),
}


def make_observations() -> dict[str, dict]:
    """What robots' scripts would send, under the keys of NVIDIA's data configs but for a few on purpose."""
    rng = np.random.default_rng(0)

    def image(*shape: int) -> np.ndarray:
        return rng.integers(256, size=(*shape, 3), dtype=np.uint8)

    def state(*shape: int) -> np.ndarray:
        return rng.uniform(-1, 1, shape)

    def so100() -> dict:
        return {
            "video.front": image(1, 24, 32), "video.wrist": image(1, 20, 28), "state.single_arm": state(1, 5),
            "state.gripper": state(1, 1), TASK: ["pick up the cube"],
        }  # fmt: skip

    return {
        "gr1": {  # fourier_gr1_arms_waist, in another order
            "state.waist": state(1, 3),
            "annotation.human.action.task_description": ["do your thing!"],
            "state.right_hand": state(1, 6),
            "state.left_arm": state(1, 7),
            "video.ego_view": image(1, 64, 80),
            "state.left_hand": state(1, 6),
            "state.right_arm": state(1, 7),
        },
        "agibot": {  # agibot_genie1: three views, fp32, an apostrophe
            "video.top_head": image(1, 24, 32),
            "video.hand_left": image(1, 24, 32),
            "video.hand_right": image(1, 24, 32),
            "state.left_arm_joint_position": state(1, 7).astype(np.float32),
            "state.right_arm_joint_position": state(1, 7).astype(np.float32),
            "state.left_effector_position": state(1, 1).astype(np.float32),
            "state.right_effector_position": state(1, 1).astype(np.float32),
            "state.head_position": state(1, 2).astype(np.float32),
            "state.waist_position": state(1, 2).astype(np.float32),
            "annotation.language.action_text": ["don't drop it"],
        },
        "so100_batch": {  # so100_dualcam: two observations, in another order and with a key that no config has
            "video.wrist": image(2, 1, 20, 28),
            "video.front": image(2, 1, 24, 32),
            "state.gripper": state(2, 1, 1),
            "state.extra": state(2, 1, 2),
            "state.single_arm": state(2, 1, 5),
            TASK: ["pick up the cube", "open the drawer"],
        },
        "so100": so100(),
        "so100_integers": so100() | {"state.single_arm": rng.integers(-9, 9, (1, 5)), "state.gripper": np.int32([[1]])},
        "so100_bare_string": so100() | {TASK: "pick up the cube"},
        "so100_string_array": so100() | {TASK: np.array(["pick up the cube"])},
    }


def import_nvidia(checkout: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """NVIDIA's gr00t.eval.robot and gr00t.eval.service."""
    sys.path.insert(0, str(checkout))
    for name in ("pytorch3d", "pytorch3d.transforms"):  # the client's imports go as far as this, which is hard to install
        sys.modules[name] = types.ModuleType(name)
    return importlib.import_module("gr00t.eval.robot"), importlib.import_module("gr00t.eval.service")


def import_old(checkout: Path, commit: str, others: tuple[str, ...]) -> types.ModuleType:
    """gr00t.eval.service as it was in an older commit."""
    for name in (*others, "gr00t.eval.service"):
        command = ["git", "-C", str(checkout), "show", f"{commit}:{name.replace('.', '/')}.py"]
        source = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        module = sys.modules[name] = types.ModuleType(name)
        exec(compile(source, f"{commit}:{name}", "exec"), module.__dict__)
        parent, _, leaf = name.rpartition(".")
        setattr(importlib.import_module(parent), leaf, module)
    return module


def call(client, endpoint: str, observation: dict | None):
    return client.get_action(observation) if endpoint == "get_action" else getattr(client, endpoint)()


def record(client_class: type, reply: bytes, endpoint: str, observation: dict | None, token: str | None = None) -> bytes:
    """What the client sends; `reply` is what it is answered."""
    received: list[bytes] = []
    with zmq.Context() as context, context.socket(zmq.REP) as server:
        port = server.bind_to_random_port("tcp://127.0.0.1")

        def answer() -> None:
            received.extend(server.recv_multipart())
            server.send(reply)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        result = call(client_class(host="127.0.0.1", port=port, api_token=token), endpoint, observation)
        thread.join()
    assert result and len(received) == 1
    return received[0]


def pack(observation: dict | None) -> dict | None:
    """Arrays as npy bytes."""
    packed = None if observation is None else dict(observation)
    for key, value in (observation or {}).items():
        if isinstance(value, np.ndarray):
            data = io.BytesIO()
            np.save(data, value, allow_pickle=False)
            packed[key] = data.getvalue()
    return packed


def make_file(checkout: Path, out: Path) -> None:
    robot, service = import_nvidia(checkout)
    observations = make_observations()
    actions = {"action.single_arm": np.zeros((16, 5), np.float32), "action.gripper": np.zeros((16, 1), np.float32)}
    config = {"video": robot.ModalityConfig(delta_indices=[0], modality_keys=["video.front"])}
    replies = {"ping": {"status": "ok"}, "get_modality_config": config, "get_action": actions}
    cases = {  # name: endpoint, observation, token
        "ping": ("ping", None, None),
        "ping_token": ("ping", None, TOKEN),
        "get_modality_config": ("get_modality_config", None, None),
        "get_modality_config_token": ("get_modality_config", None, TOKEN),
        **{name: ("get_action", observation, None) for name, observation in observations.items()},
        "so100_token": ("get_action", observations["so100"], TOKEN),
    }
    recorded = {}

    def add(name: str, serializer: str, request: bytes, endpoint: str, observation: dict | None, token: str | None) -> None:
        entry = {"request": request, "endpoint": endpoint, "api_token": token, "serializer": serializer}
        recorded[name] = entry | {"observation": pack(observation)}
        print(f"{name}: {len(request)} bytes, {request[:24]!r}")

    for name, (endpoint, observation, token) in cases.items():
        reply = service.MsgSerializer.to_bytes(replies[endpoint])
        request = record(robot.RobotInferenceClient, reply, endpoint, observation, token)
        if endpoint != "get_modality_config":  # which the other does not have
            assert record(service.ExternalRobotInferenceClient, reply, endpoint, observation, token) == request
        add(name, "msgpack", request, endpoint, observation, token)
    for serializer, (commit, others) in OLD.items():
        old = import_old(checkout, commit, others)
        for name, endpoint in (("ping", "ping"), ("so100", "get_action")):
            observation = cases[name][1]
            reply = old.TorchSerializer.to_bytes(replies["ping"])  # one of them refuses arrays of numpy 2
            request = record(old.ExternalRobotInferenceClient, reply, endpoint, observation)
            add(f"{serializer}_{name}", serializer, request, endpoint, observation, None)
    out.write_bytes(msgpack.packb(recorded))
    print(f"{out.name}: {out.stat().st_size / 1e3:.0f} kB")


def connect(checkout: Path, address: str, token: str | None, out: Path) -> None:
    host, _, port = address.rpartition(":")

    def start(client_class: type):
        client = client_class(host=host, port=int(port), api_token=token)
        client.socket.setsockopt(zmq.RCVTIMEO, 120_000)  # the client's own timeout_ms is not used
        client.socket.setsockopt(zmq.LINGER, 0)
        return client

    client, arrays = start(import_nvidia(checkout)[0].RobotInferenceClient), {}
    requests = {"ping": None, "get_modality_config": None, **make_observations()}
    for name, observation in requests.items():
        try:
            reply = call(client, name if observation is None else "get_action", observation)
        except RuntimeError as error:  # the server's {"error": ...}
            print(f"{name}: {error}")
            continue
        if observation is None:
            print(f"{name}: {reply}")
            continue
        print(f"{name}: { ({key: (value.shape, str(value.dtype)) for key, value in reply.items()}) }")
        arrays |= {f"{name}/{key}": value for key, value in reply.items()}
    try:
        start(import_old(checkout, *OLD["torch"]).ExternalRobotInferenceClient).ping()
    except RuntimeError as error:
        print(f"a client of torch.save: {error}")
    np.savez(out, **arrays)
    print(f"{out}: {len(arrays)} arrays")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of NVIDIA's Isaac-GR00T at N1.5")
    parser.add_argument("--connect", metavar="HOST:PORT", help="send the requests to this server instead")
    parser.add_argument("--api-token", help="with --connect")
    parser.add_argument("--out", type=Path, help="nvidia_client.msgpack, or with --connect replies.npz")
    args = parser.parse_args()
    if args.connect:
        connect(args.checkout, args.connect, args.api_token, args.out or Path("replies.npz"))
    else:
        make_file(args.checkout, args.out or Path(__file__).with_name("nvidia_client.msgpack"))
