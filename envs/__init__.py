"""The worlds: SIMPLER's 25 tasks on ManiSkill 3. Registers `simpler/<task>-v0` with gymnasium."""

import logging
from functools import partial

import gymnasium as gym

from envs.tasks import TASKS, get_task


def build(task: str, **kwargs):
    """Entry point of the registered environments: canonical observation and action around one SIMPLER scene."""
    from envs.simpler import CanonicalEnv, SimplerEnv  # SAPIEN is only loaded when a scene is built

    logging.getLogger("mani_skill ").setLevel(logging.ERROR)  # (sic) it warns in every process that there is no GPU
    return CanonicalEnv(SimplerEnv(task, **kwargs))


def make_env(task: str = "open_and_place", **kwargs) -> gym.Env:
    """The environment of a SIMPLER task (upstream or short name), with its step limit.

    Keyword arguments: width, height (camera, default a quarter of upstream's), overlay (bool), shader,
    obs_mode ("rgb" | "none"), physics (`protocol.PHYSICS`).
    """
    return gym.make(f"simpler/{get_task(task).short}-v0", **kwargs)


def make_vector_env(task: str = "open_and_place", num_envs: int = 2, **kwargs) -> gym.vector.AsyncVectorEnv:
    """`num_envs` environments of a task, each in a process of its own that keeps to one core.

    Observations are stacked (instructions a tuple of strings). Nothing resets by itself, for success does not end an
    episode of SIMPLER: call `reset(options={"reset_mask": ...})` when `truncated` says so. Keywords as of `make_env`.
    """
    from envs.workers import single_threaded

    get_task(task)  # a wrong name fails here, not in a process
    with single_threaded():
        return gym.vector.AsyncVectorEnv(
            [partial(make_env, task, **kwargs)] * num_envs,
            shared_memory=False,  # instructions are text
            context="spawn",
            autoreset_mode=gym.vector.AutoresetMode.DISABLED,
        )


for _task in TASKS:
    for _name in {_task.short, _task.name}:
        gym.register(
            id=f"simpler/{_name}-v0",
            entry_point="envs:build",
            max_episode_steps=_task.max_steps,
            kwargs={"task": _task.short},
            disable_env_checker=True,
        )
