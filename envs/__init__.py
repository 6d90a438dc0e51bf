"""The worlds: SIMPLER's Google-robot tasks on ManiSkill 3. Registers `simpler/<task>-v0` with gymnasium."""

import logging

import gymnasium as gym

from envs.tasks import TASKS, get_task


def build(task: str, **kwargs):
    """Entry point of the registered environments: canonical observation and action around one SIMPLER scene."""
    from envs.simpler import CanonicalEnv, SimplerEnv  # SAPIEN is only loaded when a scene is built

    logging.getLogger("mani_skill ").setLevel(logging.ERROR)  # (sic) it warns in every process that there is no GPU
    return CanonicalEnv(SimplerEnv(task, **kwargs))


def make_env(task: str = "open_and_place", **kwargs) -> gym.Env:
    """The environment of a SIMPLER task (upstream or short name), with its step limit.

    Keyword arguments: width, height (camera, default 160 x 128), overlay (bool), shader, obs_mode ("rgb" | "none").
    """
    return gym.make(f"simpler/{get_task(task).short}-v0", **kwargs)


for _task in TASKS:
    for _name in (_task.short, _task.name):
        gym.register(
            id=f"simpler/{_name}-v0",
            entry_point="envs:build",
            max_episode_steps=_task.max_steps,
            kwargs={"task": _task.short},
            disable_env_checker=True,
        )
