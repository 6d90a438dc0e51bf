"""What was measured, as data: two results compare when the hashes of their protocols are equal."""

import hashlib
import json

from envs.tasks import get_task

# In numbers of its own, so that reading a protocol needs no simulator; a test compares them with the scene's.
CONTROL_FREQ, SIM_FREQ, FORCED_ADVANCE = 3, 513, 100
OPEN_QPOS, CLOSED_QPOS, PLACED_QPOS = 0.15, 0.05, 0.05
SUCCESS = {
    "open": f"drawer open by at least {OPEN_QPOS} m",
    "close": f"drawer open by at most {CLOSED_QPOS} m",
    "place": f"second subtask, drawer open by at least {PLACED_QPOS} m, object has touched the bottom inside it",
}
RULE = "SIMPLER: an episode runs to the step limit, success does not end it; success_final counts the last step"


def make_protocol(task: str, first_seed: int, episodes: int, width: int = 160, height: int = 128) -> dict:
    """Everything about a measurement that does not belong to the policy. ValueError for an unknown task."""
    task = get_task(task)
    return {
        "benchmark": "SIMPLER, visual matching",
        "task": task.name,
        "env_id": f"simpler/{task.short}-v0",
        "seeds": {"first": first_seed, "count": episodes},
        "reset": "upstream's random draws from the seed, in a scene built anew",
        "step_limit": task.max_steps,
        "control_hz": CONTROL_FREQ,
        "simulation_hz": SIM_FREQ,
        "success": SUCCESS[task.kind],
        "success_rule": RULE,
        "second_subtask": f"forced at step {FORCED_ADVANCE}; learned policies never end a subtask"
        if task.kind == "place"
        else None,
        "camera": {"view": "overhead", "width": width, "height": height, "shader": "rasteriser"},
        "overlay": "visual_matching",
    }


def protocol_hash(protocol: dict) -> str:
    """12 hexadecimal digits, equal for equal content whatever the order of the keys."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]
