"""A policy whose plan depends on every bit it is given, for the tests of server and client."""

import hashlib
import threading

import numpy as np

from policies.flow_policy import FlowPolicy, Plan, Request
from selfflow_robot.tokens import Layout


class Digest:
    """Actions are drawn from a hash of the request. `gate` holds plans back until it is set; `sizes` are the batches'.

    A request whose key is (13, n) fails.
    """

    def __init__(self, past=(-2, -1, 0), horizon=3, video=False):
        self.layout = Layout(past=past, future=(2,), horizon=horizon, text_bytes=16, height=6, width=8)
        self.gate, self.began, self.sizes, self.video = threading.Event(), threading.Event(), [], video
        self.gate.set()

    def check(self, observation):
        FlowPolicy.check(self, observation)

    def plan(self, history, key, committed=None):
        return self._plan(Request(history, key, committed))

    def plans(self, requests):
        self.sizes.append(len(requests))
        self.began.set()
        assert self.gate.wait(20)
        return [self._plan(request) for request in requests]

    def _plan(self, request):
        if request.key[0] == 13:
            raise OSError("unlucky")
        digest = hashlib.sha256(repr((len(request.history), request.key)).encode())
        for item in request.history:
            image, proprio = item["images"][self.layout.view], item["proprio"]
            digest.update(f"{image.dtype}{image.shape}{proprio.dtype}{proprio.shape}{item['instruction']}".encode())
            digest.update(image.tobytes() + proprio.tobytes())
        if request.committed is not None:
            digest.update(request.committed.tobytes())
        rng = np.random.default_rng(list(digest.digest()))
        actions = rng.normal(size=(self.layout.horizon, 7)).astype(np.float32)
        video = rng.integers(0, 256, (1, 6, 8, 3), dtype=np.uint8) if self.video else None
        return Plan(actions, video)


def observation(seed=0, instruction="open", height=6, width=8):
    rng = np.random.default_rng(seed)
    return {
        "images": {"overhead": rng.integers(0, 256, (height, width, 3), dtype=np.uint8)},
        "proprio": rng.normal(size=10).astype(np.float32),
        "instruction": instruction,
    }


def message(seed=0, instruction="open", **changes):
    made = observation(seed, instruction)
    return {"images": made["images"], "proprio": made["proprio"], "prompt": made["instruction"], **changes}
