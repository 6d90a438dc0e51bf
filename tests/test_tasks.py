"""The 25 tasks as data against upstream's own numbers: names, limits, draws, what every episode consists of."""

import json
from collections import Counter
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from envs import make_env
from envs.protocol import PICK_GRID
from envs.tasks import (
    DISTRACTORS,
    PICK_XY,
    PLACE_XY,
    POSES,
    TASKS,
    Variant,
    get_task,
    get_tasks,
    next_episode_seed,
    plain_name,
)

HERE = Path(__file__).parent
VECTORS = json.loads((HERE / "simpler_vectors.json").read_text())  # made by upstream, as are the resets
RESETS = json.loads((HERE / "simpler_resets.json").read_text())["resets"]
LIMITS = {"pick": 80, "move": 80, "open": 113, "close": 113, "place": 200}  # control steps of the Google robot's tasks
# Upstream's names of what we name differently.
RENAMED = {"overlay": "pose", "obj_init_xy": "object_xy", "model_id": "model"}


def upstream_limit(name: str) -> int:
    if name.startswith("widowx"):
        return 120 if "eggplant" in name else 60
    return LIMITS[name.removeprefix("google_robot_").split("_")[0]]


def test_every_task_of_upstream_is_registered_with_its_step_limit():
    names = {reset["task"] for reset in RESETS}
    assert len(names) == 25 and {task.name for task in TASKS} == names
    for task in TASKS:
        for name in (task.short, task.name):
            assert gym.spec(f"simpler/{name}-v0").max_episode_steps == upstream_limit(task.name)
        assert task.name.startswith(task.robot)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("open_fridge", "did you mean open_.*drawer"), ("pick_coke", "pick_coke_can"), ("stack_cubes", "stack_cube"),
     ("eggplant", "eggplant_in_basket"), ("xyz", "known: open_and_place, open_top_drawer")],
)  # fmt: skip
def test_an_unknown_task_is_refused_with_the_nearest_names(name, hint):
    with pytest.raises(ValueError, match=f"unknown task '{name}'; .*{hint}"):
        make_env(name)


def test_one_data_set_is_of_one_robot():
    assert [task.short for task in get_tasks("pick_coke_can, google_robot_move_near")] == ["pick_coke_can", "move_near"]
    with pytest.raises(ValueError, match=r"one robot \(pick_coke_can: google_robot, stack_cube: widowx\)"):
        get_tasks("pick_coke_can,stack_cube")


# -- draws -------------------------------------------------------------------------------------------------------------


def test_unseeded_episodes_follow_upstreams_chain():
    seed, chain = 2022, []
    for _ in VECTORS["seed_chain"]:
        chain.append(seed := next_episode_seed(seed))
    assert chain == VECTORS["seed_chain"]


@pytest.mark.parametrize("name", VECTORS["reset_draws"])
def test_a_seed_draws_upstreams_choices(name):
    task = get_task(name)
    for recorded in VECTORS["reset_draws"][name]:
        drawn = task.draw(recorded["episode_seed"])
        for key in recorded.keys() - {"episode_seed"}:
            np.testing.assert_array_equal(drawn.pop(RENAMED.get(key, key)), recorded[key], err_msg=key)
        assert all(len(getattr(task, f"{left}s")) == 1 for left in drawn)  # what is left is no choice


@pytest.mark.parametrize("name", sorted({reset["task"] for reset in RESETS}))
def test_a_seed_gives_upstreams_episode(name):
    """Everything a reset decides but for where the objects come to rest, which needs a simulator."""
    task = get_task(name)
    base_height = {"google_robot": 0.07905, "widowx": 0.85 if "eggplant" in name else 0.87}[task.robot]  # m
    recorded = [reset for reset in RESETS if reset["task"] == name]
    assert len(recorded) == 4
    for reset in recorded:
        setup = task.setup(task.draw(reset["seed"]))
        assert setup.instructions[0] == reset["instruction"]
        assert (setup.urdf_version, setup.drawer) == (reset["urdf_version"], reset["drawer"])
        assert [thing.model for thing in setup.things] == [model for model, _ in reset["objects"]]
        facing = Rotation.from_euler("z", setup.robot_yaw + np.pi)
        turned = Rotation.from_quat(reset["robot_base"][3:], scalar_first=True)
        np.testing.assert_allclose([*setup.robot_xy, base_height], reset["robot_base"][:3], atol=1e-6)
        assert (facing.inv() * turned).magnitude() < 1e-5


def test_the_second_instruction_names_the_object():
    setup = get_task("place_in_closed_drawer").setup(
        {"drawer": "bottom", "pose": "c0", "model": "baked_opened_7up_can_v2", "urdf_version": "", "object_xy": (0, 0)}
    )
    assert setup.instructions == ("open bottom drawer", "place 7up can into bottom drawer")


@pytest.mark.parametrize(
    ("model", "said"),
    [("opened_7up_can", "7up can"), ("blue_plastic_bottle", "blue plastic bottle"), ("green_cube_3cm", "green cube"),
     ("bridge_spoon_generated_modified", "spoon"), ("baked_apple_v2", "apple")],
)  # fmt: skip
def test_what_instructions_call_objects(model, said):
    assert plain_name(model) == said


# -- numbered episodes -------------------------------------------------------------------------------------------------


def test_the_sixty_episodes_of_move_near():
    task = get_task("move_near")
    setups = [task.setup({"episode_id": n, "urdf_version": ""}) for n in range(60)]
    assert len({(s.things, s.source, s.target) for s in setups}) == 60
    # By hand: 37 = triplet 3, layout 0, second pair: sponge to 7up can.
    assert setups[37].instructions == ("move sponge near 7up can",)
    assert [thing.xy for thing in setups[37].things] == [(-0.33, 0.04), (-0.33, 0.34), (-0.13, 0.19)]
    assert [thing.xy for thing in setups[42].things] == [(-0.13, 0.04), (-0.33, 0.19), (-0.13, 0.34)]
    assert setups[42].instructions == ("move sponge near blue plastic bottle",)
    models = {}
    for name in ("move_near_v0", "move_near_v1"):
        starts = [get_task(name).setup({"episode_id": n, "urdf_version": ""}) for n in range(60)]
        models[name] = {thing.model for setup in starts for thing in setup.things}
    assert "baked_sponge" in models["move_near_v0"] and "baked_sponge_v2" in models["move_near_v1"]
    assert all({"orange", "blue_plastic_bottle"} <= names for names in models.values())


@pytest.mark.parametrize(
    ("task", "first", "last"),
    [
        ("spoon_on_towel", ((-0.235, -0.075), (-0.235, 0.075), 0), ((-0.085, 0.075), (-0.085, -0.075), 90)),
        ("carrot_on_plate", ((-0.235, -0.075), (-0.235, 0.075), 180), ((-0.085, 0.075), (-0.085, -0.075), -90)),
        ("stack_cube", ((-0.21, -0.05), (-0.21, 0.05), 0), ((-0.06, 0.1), (-0.06, -0.1), 0)),
        ("eggplant_in_basket", ((-0.115, 0.191), (-0.125, 0.025), 0), ((-0.095, 0.221), (-0.125, 0.025), -45)),
    ],
)
def test_the_twenty_four_episodes_of_a_widowx_task(task, first, last):
    setups = [get_task(task).setup({"episode_id": n}) for n in range(24)]
    assert len({setup.things for setup in setups}) == 24
    for setup, (source, target, degrees) in ((setups[0], first), (setups[-1], last)):
        np.testing.assert_allclose([thing.xy for thing in setup.things], [source, target], atol=1e-12)
        turn = Rotation.from_quat(setup.things[0].quat, scalar_first=True).as_euler("xyz", degrees=True)
        np.testing.assert_allclose(np.abs(turn) if degrees == 180 else turn, [0, 0, degrees], atol=1e-9)


@pytest.mark.parametrize("kind", ["less", "more"])
def test_distractors_are_dropped_where_upstream_drops_them(kind):
    recorded = VECTORS["va_distractor_positions"][kind]
    assert [tuple(case["obj_xy"]) for case in recorded] == [pytest.approx(xy) for xy in PICK_GRID]
    for case in recorded:
        choices = {
            "orientation": "upright",
            "model": "opened_coke_can",
            "urdf_version": "",
            "object_xy": case["obj_xy"],
        }
        setup = get_task("pick_coke_can").setup(choices, Variant(distractors=kind))
        assert tuple(thing.model for thing in setup.distractors) == DISTRACTORS[kind] == tuple(case["distractors"])
        np.testing.assert_allclose([t.xy for t in setup.distractors], list(case["distractors"].values()), atol=1e-6)
        assert {thing.quat for thing in setup.distractors} == {setup.things[0].quat}


def test_without_distractors_source_and_target_remain():
    task = get_task("move_near")
    for n in range(60):
        full = task.setup({"episode_id": n, "urdf_version": ""})
        pair = task.setup({"episode_id": n, "urdf_version": ""}, Variant(no_distractor=True))
        assert pair.things == (full.things[full.source], full.things[full.target])
        assert (pair.source, pair.target, pair.instructions) == (0, 1, full.instructions)


def test_the_draws_are_even():
    """Every value of every choice, each about as often: a draw that forgets one would go unnoticed elsewhere."""
    for name, option, count in (("open_drawer", "drawer", 3), ("open_drawer", "pose", 9), ("pick_object", "model", 14),
                                ("place_in_closed_drawer", "model", 21), ("pick_coke_can", "orientation", 3),
                                ("move_near", "episode_id", 60), ("stack_cube", "episode_id", 24)):  # fmt: skip
        drawn = Counter(get_task(name).draw(seed)[option] for seed in range(20 * count))
        assert len(drawn) == count and min(drawn.values()) > 5 and max(drawn.values()) < 45


@pytest.mark.parametrize("name", ["open_and_place", "pick_coke_can"])
def test_a_margin_widens_the_draw_of_places_and_nothing_else(name):
    task, margin = get_task(name), 0.04
    plain, wide = ([task.draw(seed, m) for seed in range(200)] for m in (0.0, margin))
    a, b = (np.array([drawn.pop("object_xy") for drawn in draws]) for draws in (plain, wide))
    robots = [drawn.pop("robot_xy", None) for drawn in wide]
    assert plain == wide and (len(set(robots)) == 200 if task.poses else set(robots) == {None})
    low, high = {"open_and_place": PLACE_XY, "pick_coke_can": PICK_XY}[name]
    shares = (a - low) / np.subtract(high, low)  # of the area, the same in the wider one
    np.testing.assert_allclose(b, np.subtract(low, margin) + shares * (np.subtract(high, low) + 2 * margin), atol=1e-12)
    assert ((b < low) | (b > high)).any(1).mean() > 0.3


@pytest.mark.parametrize("name", ["open_drawer", "close_top_drawer", "open_and_place"])
def test_a_margin_stands_the_robot_beside_its_places(name):
    """Drawer tasks draw nothing but numbers: with a margin no two episodes begin alike, all else as before."""
    task, margin = get_task(name), 0.05
    plain, wide = ([task.draw(seed, m) for seed in range(200)] for m in (0.0, margin))
    if task.kind == "place":  # the object moves too, as tested above
        plain, wide = ([drawn | {"object_xy": None} for drawn in draws] for draws in (plain, wide))
    places = [drawn.pop("robot_xy") for drawn in wide]
    assert plain == wide and len(set(places)) == 200
    beside = np.subtract(places, [POSES[drawn["pose"]][:2] for drawn in wide]) / margin
    assert np.abs(beside).max() <= 1 and np.abs(beside.mean(0)).max() < 0.12  # evenly, to both sides
    np.testing.assert_allclose(beside.std(0), 3**-0.5, atol=0.06)
    options = task.beyond(7, margin)
    assert task.setup(task.draw(7) | options).robot_xy == places[7] and task.beyond(7, 0.0) == {}
    assert task.setup(task.draw(7) | options).overlay == task.setup(task.draw(7)).overlay


def test_starts_that_differ_in_colours_alone_are_the_same():
    """Forty seeds of opening the top drawer: nine poses of the robot. Those of the apple differ in every episode."""
    drawer, apple, near = map(get_task, ("open_top_drawer", "open_and_place", "move_near"))
    starts = {name: [task.start(seed, {}) for seed in range(10000, 10040)]
              for name, task in (("drawer", drawer), ("apple", apple), ("near", near))}  # fmt: skip
    starts["wide"] = [drawer.start(seed, drawer.beyond(seed, 0.05)) for seed in range(10000, 10040)]
    counts = {name: len(set(map(json.dumps, found))) for name, found in starts.items()}
    assert counts == {"drawer": 9, "apple": 40, "near": 31, "wide": 40}
    assert len({near.draw(seed)["episode_id"] for seed in range(10000, 10040)}) == 31
    assert starts["drawer"][0] == {"drawer": "top", "pose": drawer.draw(10000)["pose"]}


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "choice", "message"),
    [
        ("move_near", {"episode_id": 60}, "episode_id 60 of move_near must be a whole number from 0 to 59"),
        ("move_near", {"episode_id": -1}, "episode_id -1 .* from 0 to 59"),
        ("stack_cube", {"episode_id": 24}, "episode_id 24 of stack_cube .* from 0 to 23"),
        ("stack_cube", {"episode_id": 1.5}, "episode_id 1.5 of stack_cube"),
        ("open_drawer", {"drawer": "left"}, "unknown drawer 'left'; known: 'top', 'middle', 'bottom'"),
        ("open_top_drawer", {"drawer": "middle"}, "unknown drawer 'middle'; known: 'top'"),
        ("open_drawer", {"pose": "z9"}, "unknown pose 'z9'; known: 'a0'"),
        ("pick_coke_can", {"orientation": "sideways"}, "unknown orientation 'sideways'; known: 'upright'"),
        ("pick_object", {"model": "teapot"}, "unknown model 'teapot'; known: 'opened_pepsi_can'"),
        ("open_and_place", {"model": "teapot"}, "unknown model 'teapot'; known: '7up_can'"),
        ("pick_object", {"urdf_version": "blue"}, "unknown urdf_version 'blue'"),
        ("pick_object", {"object_xy": (0.1, np.nan)}, "object_xy must be 2 finite numbers"),
        ("pick_object", {"robot_xy": (0.1,)}, "robot_xy must be 2 finite numbers"),
    ],
)
def test_choices_that_do_not_exist_are_refused(task, choice, message):
    task = get_task(task)
    with pytest.raises(ValueError, match=message):
        task.setup({**task.draw(0), **choice})
