"""A policy that runs elsewhere: `ChunkedPolicy(RemotePlanner("gpu-box:8000"))` acts like the checkpoint served there.

Servers of ours (policies/server.py) say what they expect. Those of others that speak openpi's protocol do not:
`Foreign` names their fields and says what their numbers mean.
"""

import contextlib
import math
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from policies import wire
from policies.flow_policy import FlowPolicy, Plan
from policies.server import BUSY, PROTOCOL, VERSION
from selfflow_robot.interfaces import ACTION_DIM, Observation
from selfflow_robot.tokens import ACTION_CONTRACT, Layout

TOKEN_VARIABLE = "SELFFLOW_TOKEN"
MAX_ANSWER = 256 << 20  # bytes; an imagined video is large


class ServerError(RuntimeError):
    """The server cannot be reached, or refuses; says what to do."""


@dataclass(frozen=True)
class Foreign:
    """How a server of others names things. Its actions must be this project's (`selfflow_robot/interfaces.py`): the
    first seven numbers translation (m) and rotation vector (rad) per control step in the robot's base frame, then the
    gripper's opening, 1 open and 0 closed. Where they are not, `convert` makes them so: (H, A) -> (H, 7)."""

    horizon: int = 1  # actions of a chunk that are used; a shorter chunk is an error
    image: str = "observation/image"
    state: str | None = "observation/state"  # None: not sent
    prompt: str = "prompt"
    actions: str = "actions"
    view: str | None = None  # which of the environment's; None: the only one
    convert: Callable[[np.ndarray], np.ndarray] | None = None


class RemotePlanner:
    """`layout`, `check` and `plan` of a policy behind a websocket. One request at a time; not for several threads."""

    def __init__(
        self,
        address: str,
        token: str | None = None,
        timeout: float = 30.0,
        foreign: Foreign | None = None,
        certificate: str | None = None,
    ):
        """address: host:port, ws://... or wss://...; token: default the environment's SELFFLOW_TOKEN; timeout: s, of
        connecting and of a plan; foreign: for servers that are not ours; certificate: file of one the server signed
        itself. Raises ServerError with the remedy."""
        self.address = address if "://" in address else f"ws://{address}"
        self.token, self.timeout, self.certificate = token or os.environ.get(TOKEN_VARIABLE), timeout, certificate
        self.connection: ClientConnection | None = None
        self.opened = contextlib.ExitStack()
        self.metadata = self._connect()
        self.ours = self.metadata.get("protocol") == PROTOCOL
        if not self.ours and foreign is None:
            self.close()
            raise ServerError(f"{self.address} is not a server of this project: say how it names things (Foreign)")
        self.foreign = None if self.ours else foreign
        try:
            self.layout = _layout(self.metadata, self.address) if self.ours else Layout((0,), (), foreign.horizon)
        except ServerError:
            self.close()
            raise

    def close(self) -> None:
        self.connection = None
        with contextlib.suppress(Exception):
            self.opened.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def check(self, observation: Observation) -> None:
        """Raises ValueError naming the field that the server would refuse; the image's name where it is not known."""
        if self.ours:
            FlowPolicy.check(self, observation)
        else:
            self._image(observation)

    def plan(self, history: Sequence[Observation], key: tuple[int, int], committed: np.ndarray | None = None) -> Plan:
        """As `FlowPolicy.plan`. A dropped connection is made again once. Raises ServerError."""
        if self.foreign is not None:
            if committed is not None:
                raise ServerError(f"{self.address} is not ours and takes no committed actions")
            answer = self._ask(self._foreign_request(history[-1]))
            return Plan(self._foreign_actions(answer), None)
        said = [self._said(observation) for observation in history]
        request = {**said[-1], "key": [int(n) for n in key]}
        if len(said) > 1:
            request["past"] = said[:-1]
        if committed is not None and len(committed):
            request["committed"] = np.asarray(committed, np.float32)
        answer = self._ask(request)
        actions, video = answer.get("actions"), answer.get("video")
        size = (self.layout.horizon, ACTION_DIM)
        if not isinstance(actions, np.ndarray) or actions.dtype != np.float32 or actions.shape != size:
            raise ServerError(f"{self.address} promised actions float32 {size}, and sent {_shape(actions)}")
        return Plan(actions, video)

    def _said(self, observation: Observation) -> dict:
        view = self.layout.view
        return {
            "images": {view: observation["images"][view]},
            "proprio": np.asarray(observation["proprio"], np.float32),
            "prompt": observation["instruction"],
        }

    def _foreign_request(self, observation: Observation) -> dict:
        foreign = self.foreign
        request = {foreign.image: self._image(observation), foreign.prompt: observation["instruction"]}
        if foreign.state is not None:
            request[foreign.state] = np.asarray(observation["proprio"], np.float32)
        return request

    def _image(self, observation: Observation) -> np.ndarray:
        images, view = observation["images"], self.foreign.view
        if view is None and len(images) == 1:
            view = next(iter(images))
        if view not in images:
            raise ValueError(f"observation images: view {view!r} wanted, there are {', '.join(images) or 'none'}")
        return images[view]

    def _foreign_actions(self, answer: dict) -> np.ndarray:
        name, horizon = self.foreign.actions, self.foreign.horizon
        if name not in answer:
            raise ServerError(f"{self.address} sent {', '.join(map(str, answer))} and no {name!r}: name it (Foreign)")
        actions = answer[name]
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.dtype.kind != "f":
            raise ServerError(f"{self.address}: {name} should be numbers (H, A), got {_shape(actions)}")
        if self.foreign.convert is not None:
            actions = np.asarray(self.foreign.convert(actions))
        if len(actions) < horizon or actions.shape[1] < ACTION_DIM:
            raise ServerError(f"{self.address}: {name} {actions.shape}, wanted at least ({horizon}, {ACTION_DIM})")
        actions = actions[:horizon, :ACTION_DIM].astype(np.float32)
        if not np.isfinite(actions).all():
            raise ServerError(f"{self.address}: {name} are not finite")
        return actions

    def _ask(self, request: dict) -> dict:
        """One request, sent again over a new connection if the old one broke, and again while the server is busy."""
        data, deadline, reconnected, pause = wire.pack(request), time.monotonic() + self.timeout, False, 0.01
        while True:
            try:
                if self.connection is None:
                    raise ConnectionError("no connection")
                self.connection.send(data)
                answer = self.connection.recv(timeout=max(0.0, deadline - time.monotonic()))
            except TimeoutError as error:
                self.close()  # or its answer would be taken for the next one's
                raise ServerError(
                    f"{self.address} has not answered within {self.timeout:g} s: is it overloaded? See /metrics there"
                ) from error
            except (ConnectionClosed, OSError) as error:
                self.close()
                if reconnected:
                    raise ServerError(f"{self.address} closed the connection twice ({error}): see its log") from error
                reconnected = True
                found = self._connect()
                if self.ours and found != self.metadata:
                    self.close()
                    what = f"{found.get('checkpoint')} {str(found.get('checkpoint_hash'))[:16]}"
                    raise ServerError(f"{self.address} serves something else by now: {what}") from error
                continue
            except BaseException:  # interrupted: as above
                self.close()
                raise
            if isinstance(answer, bytes):
                answer = self._read(answer)
                if not isinstance(answer, dict):
                    raise ServerError(f"{self.address} answered with a {type(answer).__name__}, not a map")
                return answer
            if not answer.startswith(BUSY) or time.monotonic() + pause > deadline:
                raise ServerError(f"{self.address} refused: {answer.strip()[-1000:]}")
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _connect(self) -> dict:
        """Connects, and returns the server's metadata."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else None
        tls = ssl.create_default_context(cafile=self.certificate) if self.address.startswith("wss://") else None
        try:
            connecting = connect(
                self.address,
                ssl=tls,
                additional_headers=headers,
                compression=None,
                max_size=MAX_ANSWER,
                open_timeout=self.timeout,
                close_timeout=1,
            )
            self.connection = self.opened.enter_context(connecting)
            limit = struct.pack("ll", math.ceil(self.timeout), 0)  # a server that does not read must not block us
            self.connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            metadata = self.connection.recv(timeout=self.timeout)
        except InvalidStatus as error:
            status, said = error.response.status_code, (error.response.body or b"").decode(errors="replace").strip()
            if status in (401, 403):
                what = "the token was refused" if self.token else "a token is needed"
                raise ServerError(f"{self.address}: {what}. Set {TOKEN_VARIABLE} to the server's") from error
            raise ServerError(f"{self.address} answered with HTTP status {status} {said[:200]}") from error
        except InvalidURI as error:
            raise ServerError(f"{self.address} is no address: give host:port, ws://... or wss://...") from error
        except ssl.SSLError as error:
            raise ServerError(
                f"{self.address}: {error}. If the server signed its own certificate, name the file (certificate, or "
                "the environment's SSL_CERT_FILE)"
            ) from error
        except ConnectionRefusedError as error:
            raise ServerError(
                f"nothing answers at {self.address}. Start a server there: python experiments/serve.py"
            ) from error
        except (ConnectionClosed, InvalidHandshake, ConnectionError, EOFError) as error:
            self.close()
            raise ServerError(f"{self.address} does not speak the protocol ({error}): ws:// or wss://?") from error
        except TimeoutError as error:
            self.close()
            raise ServerError(f"{self.address} has not answered within {self.timeout:g} s") from error
        except OSError as error:
            raise ServerError(f"{self.address} cannot be reached ({error}): is the address right?") from error
        metadata = self._read(metadata) if isinstance(metadata, bytes) else None
        if not isinstance(metadata, dict):
            self.close()
            raise ServerError(f"{self.address} does not begin with its metadata: not an openpi server")
        return metadata

    def _read(self, data: bytes) -> Any:
        try:
            return wire.unpack(data)
        except wire.WireError as error:
            self.close()
            raise ServerError(f"{self.address} sent what cannot be read: {error}") from error


def _layout(metadata: dict, address: str) -> Layout:
    if metadata.get("version") != VERSION:
        raise ServerError(f"{address} speaks version {metadata.get('version')} of the protocol, this is {VERSION}")
    if metadata.get("action") != ACTION_CONTRACT:
        raise ServerError(f"{address} has another action contract: {metadata.get('action')}, here {ACTION_CONTRACT}")
    try:
        return Layout(**metadata["layout"])
    except (KeyError, TypeError, ValueError) as error:
        raise ServerError(f"{address} describes a layout that is not this version's ({error})") from error


def _shape(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
