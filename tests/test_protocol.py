"""The published protocols: every episode of them, how they are averaged and hashed, and the published numbers."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from envs import protocol as protocols
from envs.protocol import ProtocolEpisode, average, make_protocol, protocol_episodes, protocol_hash
from envs.tasks import TASKS, URDF_VERSIONS, get_task
from experiments import reference

ROOT = Path(__file__).resolve().parent.parent
ARMS = {urdf or "original" for urdf in URDF_VERSIONS}
NOT_PUBLISHED = ("pick_object", "place_in_closed_top_drawer", "place_in_closed_drawer")
WIDOWX = ("spoon_on_towel", "carrot_on_plate", "stack_cube", "eggplant_in_basket")


def published(protocol: str) -> list[str]:
    """Tasks that have it."""
    found = []
    for task in TASKS:
        try:
            protocol_episodes(task, protocol)
        except ValueError:
            continue
        found.append(task.short)
    return found


# -- the episodes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "protocol", "run", "averaged"),
    [
        ("pick_coke_can", "visual_matching", 4 * 3 * 25, 300),
        ("pick_standing_coke_can", "visual_matching", 4 * 25, 100),
        ("move_near_v0", "visual_matching", 4 * 60, 240),
        ("open_drawer", "visual_matching", 4 * 3 * 9, 108),
        ("close_drawer", "visual_matching", 4 * 3 * 9, 108),
        ("open_top_drawer", "visual_matching", 4 * 9, 36),
        ("open_and_place", "visual_matching", 4 * 3 * 9, 108),
        *((task, "visual_matching", 24, 24) for task in WIDOWX),
        ("pick_coke_can", "variant_aggregation", (9 + 2) * 3 * 25, 675),  # cameras are run but not averaged
        ("move_near_v0", "variant_aggregation", (8 + 2) * 60, 480),
        ("open_drawer", "variant_aggregation", 7 * 3 * 9, 189),
        ("close_drawer", "variant_aggregation", 7 * 3 * 9, 189),
        ("open_and_place", "variant_aggregation", 7 * 3 * 9, 189),
    ],
)
def test_the_number_of_episodes(task, protocol, run, averaged):
    episodes = protocol_episodes(task, protocol)
    assert len(episodes) == run and [episode.number for episode in episodes] == list(range(run))
    assert sum(episode.averaged for episode in episodes) == averaged
    assert {episode.variant.name for episode in episodes if not episode.averaged} <= {"camera1", "camera2"}
    starts = Counter(json.dumps([e.choices, e.variant.name], sort_keys=True) for e in episodes)
    assert max(starts.values()) == 1  # no start twice


@pytest.mark.parametrize("protocol", ["visual_matching", "variant_aggregation"])
def test_every_episode_is_a_scene(protocol):
    """With the choices that `reset` takes, in a scene that is known."""
    lights = {"tabletop", "slightly_brighter", "slightly_darker", "drawer_simple", "drawer", "drawer_brighter",
              "drawer_darker", "sink"}  # fmt: skip
    matching = protocol == "visual_matching"
    assert "open_and_place" in published(protocol) and not set(NOT_PUBLISHED) & set(published(protocol))
    for short in published(protocol):
        task = get_task(short)
        for episode in protocol_episodes(task, protocol):
            assert set(episode.choices) <= {*task.options, "urdf_version", "robot_xy", "robot_yaw"}
            setup = task.setup({**task.draw(episode.seed), **episode.choices}, episode.variant)
            assert setup.instructions and setup.lighting in lights and (setup.overlay is not None) == matching
            assert task.drawer is None or setup.drawer == task.drawer
            assert matching or setup.urdf_version == ""
            assert set(episode.options) - set(episode.choices) == (set() if matching else {"variant"})
            assert episode.seed == 40194941  # upstream's first reset, every time


def test_visual_matching_takes_every_start_with_every_arm():
    def starts(task, *names):
        episodes = protocol_episodes(task, "visual_matching")
        keys = {tuple(np.ravel([e.choices[name] for name in names]).tolist()) for e in episodes}
        pairs = {(tuple(np.ravel([e.choices[name] for name in names]).tolist()), e.group[-1]) for e in episodes}
        assert len(pairs) == len(episodes) == 4 * len(keys) and {arm for _, arm in pairs} == ARMS
        return keys

    xs, ys = (-0.35, -0.2925, -0.235, -0.1775, -0.12), (-0.02, 0.09, 0.20, 0.31, 0.42)
    picks = sorted(starts("pick_standing_coke_can", "object_xy"))
    np.testing.assert_allclose(picks, [(x, y) for x in xs for y in ys], atol=1e-12)
    assert starts("move_near_v0", "episode_id") == {(n,) for n in range(60)}
    poses = {row + column for row in "abc" for column in "012"}
    drawers = {(drawer, pose) for drawer in ("top", "middle", "bottom") for pose in poses}
    assert starts("open_drawer", "drawer", "pose") == starts("close_drawer", "drawer", "pose") == drawers
    placed = protocol_episodes("open_and_place", "visual_matching")
    places = {(x, y) for x in (-0.08, -0.05, -0.02) for y in (-0.02, 0.03, 0.08)}
    assert {e.choices["object_xy"] for e in placed} == places
    assert {e.choices["pose"] for e in placed} == {"a0", "b0", "c0"}
    assert {e.choices["model"] for e in placed} == {"baked_apple_v2"}


def test_variant_aggregation_of_the_tabletop():
    """Stage, lights, distractors of every variant, as in upstream's scripts."""
    counter, cabinet = "google_pick_coke_can_1_v4", "Baked_sc1_staging_objaverse_cabinet{}_h870"
    shared = {
        "base": (counter, "tabletop", 0),
        "background1": (f"{counter}_alt_background", "tabletop", 0),
        "background2": (f"{counter}_alt_background_2", "tabletop", 0),
        "brighter": (counter, "slightly_brighter", 0),
        "darker": (counter, "slightly_darker", 0),
        "table1": (cabinet.format(1), "tabletop", 0),
        "table2": (cabinet.format(2), "tabletop", 0),
        "camera1": (counter, "tabletop", 0),
        "camera2": (counter, "tabletop", 0),
    }
    own = {
        "pick_coke_can": {"distractor_less": (counter, "tabletop", 4), "distractor_more": (counter, "tabletop", 6)},
        "move_near_v0": {"no_distractor": (counter, "tabletop", 0)},
    }
    for name, extra in own.items():
        task, found = get_task(name), {}
        for episode in protocol_episodes(task, "variant_aggregation"):
            setup = task.setup({**task.draw(0), **episode.choices}, episode.variant)
            found[episode.group[-1]] = setup.stage, setup.lighting, len(setup.distractors)
            tilt = {"camera1": 0.9351361, "camera2": 0.6651361}.get(episode.group[-1])
            assert setup.head_tilt == tilt and not any("baked" in thing.model for thing in setup.things)
            assert len(setup.things) == {"pick_coke_can": 1, "no_distractor": 2}.get(
                name if name == "pick_coke_can" else episode.group[-1], 3
            )
        assert found == shared | extra


@pytest.mark.parametrize(("name", "ys"), [("open_drawer", 9), ("close_drawer", 9), ("open_and_place", 3)])
def test_variant_aggregation_of_the_cabinet(name, ys):
    flat = "frl_apartment_stage_simple"
    expected = {
        "base": (flat, "drawer", "mk_station"),
        "background1": ("modern_bedroom_no_roof", "drawer", "mk_station"),
        "background2": ("modern_office_no_roof", "drawer", "mk_station"),
        "brighter": (flat, "drawer_brighter", "mk_station"),
        "darker": (flat, "drawer_darker", "mk_station"),
        "cabinet2": (flat, "drawer", "mk_station2"),
        "cabinet3": (flat, "drawer", "mk_station3"),
    }
    task, found, places = get_task(name), {}, set()
    for episode in protocol_episodes(task, "variant_aggregation"):
        setup = task.setup({**task.draw(0), **episode.choices}, episode.variant)
        found[episode.group[-1]] = setup.stage, setup.lighting, setup.station
        places.add((*setup.robot_xy, setup.robot_yaw))
        assert setup.shiny_robot and [thing.model for thing in setup.things] == ["apple"] * (name == "open_and_place")
    assert found == expected
    grid = {(x, y, 0.0) for x in (0.65, 0.75, 0.85) for y in (-0.2, 0.0, 0.2)}
    assert places <= grid and len(places) == ys and (ys == 9 or {x for x, *_ in places} == {0.65})


def test_the_random_protocol_is_a_range_of_seeds():
    episodes = protocol_episodes("pick_object", "random", 10, 3)
    assert [(e.number, e.seed, e.options) for e in episodes] == [(10, 10, {}), (11, 11, {}), (12, 12, {})]


def test_a_margin_makes_another_measurement_of_the_random_protocol():
    plain, wide = (
        protocol_episodes("open_drawer", "random", 10, 3),
        protocol_episodes("open_drawer", "random", 10, 3, 0.05),
    )
    assert [(e.number, e.seed) for e in wide] == [(e.number, e.seed) for e in plain]
    assert [set(e.options) for e in wide] == [{"pose", "robot_xy"}] * 3
    resets = [make_protocol(name, "random", margin=0.05)["reset"].partition(", ")[2]
              for name in ("open_drawer", "pick_coke_can", "open_and_place")]  # fmt: skip
    assert resets == [f"{moved} up to 0.05 m beyond" for moved in ("robot_xy", "object_xy", "object_xy and robot_xy")]
    hashes = [protocol_hash(make_protocol("open_drawer", "random", 10, 3, margin=margin)) for margin in (0, 0.04, 0.05)]
    assert len(set(hashes)) == 3 and hashes[0] == protocol_hash(make_protocol("open_drawer", "random", 10, 3))


@pytest.mark.parametrize(
    ("task", "protocol", "margin", "said"),
    [
        ("open_drawer", "visual_matching", 0.05, "the episodes of visual_matching are fixed"),
        ("move_near", "random", 0.05, "margin 0.05 .* tasks that draw a place .*; got move_near"),
        ("open_drawer", "random", -0.05, "margin -0.05"),
        ("open_drawer", "random", float("nan"), "margin nan"),
    ],
)
def test_a_margin_where_there_is_none_is_refused(task, protocol, margin, said):
    with pytest.raises(ValueError, match=said):
        make_protocol(task, protocol, margin=margin)


@pytest.mark.parametrize(
    ("task", "protocol"),
    [*((task, protocol) for task in NOT_PUBLISHED for protocol in ("visual_matching", "variant_aggregation")),
     *((task, "variant_aggregation") for task in WIDOWX)],
)  # fmt: skip
def test_what_was_not_published_is_refused_with_the_remedy(task, protocol):
    with pytest.raises(ValueError, match=f"no {protocol} protocol was published for {task}; use --protocol random"):
        make_protocol(task, protocol)


def test_an_unknown_protocol_is_refused_with_the_known():
    with pytest.raises(ValueError, match="unknown protocol 'visual'; known: random, visual_matching, variant_aggr"):
        make_protocol("open_drawer", "visual")


# -- averages ----------------------------------------------------------------------------------------------------------


def graded(*groups) -> tuple[list, dict]:
    """Episodes and outcomes of (group, outcomes) pairs."""
    episodes, outcomes = [], {}
    for group, values in groups:
        for value in values:
            outcomes[len(episodes)] = bool(value)
            episodes.append(ProtocolEpisode(len(episodes), 0, group))
    return episodes, outcomes


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([((), (1, 0, 0, 1, 1))], 0.6),
        ([(("a",), (1, 1)), (("b",), (1, 0, 0, 0))], (1 + 1 / 4) / 2),  # 3/6 flat
        # Orientations (or drawers) first: b weighs as much as a, though a has two arms. 4/7 flat, 0.5 over the cells.
        ([(("a", "x"), (1, 1, 1)), (("a", "y"), (0,)), (("b", "x"), (1, 0, 0))], ((1 + 0) / 2 + 1 / 3) / 2),
        ([(("a", "x"), (0, 0))], 0.0),
    ],
)
def test_the_average_is_the_mean_of_each_level_from_the_inside(groups, expected):
    assert average(*graded(*groups)) == pytest.approx(expected)


def test_episodes_that_are_missing_or_not_averaged_are_left_out():
    episodes, outcomes = graded((("a",), (1, 0)), (("b",), (1, 1)))
    outcomes.pop(1)
    assert average(episodes, outcomes) == 1
    assert average(episodes, {}) is None
    cameras = [ProtocolEpisode(9, 0, ("c",), averaged=False)]
    assert average(episodes + cameras, {0: True, 1: True, 9: False}) == 1
    assert average(cameras, {9: True}) is None


@pytest.mark.parametrize("protocol", ["visual_matching", "variant_aggregation"])
@pytest.mark.parametrize("name", ["pick_coke_can", "move_near_v0", "open_drawer", "open_and_place"])
def test_a_complete_average_is_the_flat_mean(name, protocol):
    """Upstream takes orientations apart and drawers together: the same, for all groups are of one size."""
    episodes = protocol_episodes(name, protocol)
    outcomes = dict(enumerate((np.random.default_rng(0).random(len(episodes)) < 0.4).tolist()))
    flat = np.mean([outcomes[e.number] for e in episodes if e.averaged])
    assert average(episodes, outcomes) == pytest.approx(flat)


def test_the_average_of_an_arm_or_an_orientation_alone():
    """Success with one of four arms, or standing one of three ways, counts a quarter, or a third."""
    episodes = protocol_episodes("pick_coke_can", "visual_matching")
    arm = {e.number: e.choices["urdf_version"] == "" for e in episodes}
    standing = {e.number: e.choices["orientation"] == "upright" for e in episodes}
    assert average(episodes, arm) == pytest.approx(1 / 4)
    assert average(episodes, standing) == pytest.approx(1 / 3)
    started = {number: done for number, done in standing.items() if not done or number % 2}
    assert average(episodes, started) == pytest.approx(1 / 3)  # half of the standing ones: still a third


# -- hashes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ingredient", sorted(make_protocol("open_and_place", "visual_matching")))
def test_every_ingredient_changes_the_hash(ingredient):
    protocol = make_protocol("open_and_place", "visual_matching")
    assert protocol_hash({**protocol, ingredient: "other"}) != protocol_hash(protocol)
    assert protocol_hash({**protocol}) == protocol_hash(make_protocol("open_and_place", "visual_matching"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PICK_GRID", protocols.PICK_GRID[::-1]),  # the same starts by other numbers are another measurement
        ("PICK_GRID", [(x + 1e-6, y) for x, y in protocols.PICK_GRID]),
        ("URDF_VERSIONS", URDF_VERSIONS[:3]),
        ("next_episode_seed", lambda seed: 1),
    ],
)
def test_every_part_of_an_episode_changes_the_hash(monkeypatch, name, value):
    before = make_protocol("pick_coke_can", "visual_matching")["episodes_hash"]
    monkeypatch.setattr(protocols, name, value)
    assert make_protocol("pick_coke_can", "visual_matching")["episodes_hash"] != before


def test_hashes_of_published_protocols_are_all_different():
    hashes = [
        protocol_hash(make_protocol(task, protocol))
        for protocol in ("visual_matching", "variant_aggregation")
        for task in published(protocol)
    ]
    assert len(hashes) == len(set(hashes)) > 30
    episodes = make_protocol("open_drawer", "visual_matching", first_seed=3, count=5)
    assert episodes == make_protocol("open_drawer", "visual_matching")  # seeds belong to "random" alone


def test_the_success_rule_says_what_differs_between_tasks():
    rules = {task: make_protocol(task)["success"] for task in (*WIDOWX, "open_drawer", "close_drawer")}
    assert "0.15 m" in rules["open_drawer"] and "0.05 m" in rules["close_drawer"]
    assert "0.06 m" in rules["eggplant_in_basket"] and "nothing else" not in rules["eggplant_in_basket"]
    assert "0.02 m" in rules["stack_cube"] and "nothing else but the robot" in rules["stack_cube"]


# -- published numbers -------------------------------------------------------------------------------------------------


def test_published_numbers_rank_policies_as_upstream_says():
    expected = {
        "google_robot_pick_coke_can": (0.031, 0.975),
        "google_robot_move_near": (0.111, 0.856),
        "google_robot_open_drawer": (0.0, 0.983),
        "google_robot_close_drawer": (0.123, 0.771),
        "google_robot_place_apple_in_closed_top_drawer": (0.0, 0.969),
        "widowx_spoon_on_towel": (0.0, 0.827),
        "widowx_carrot_on_plate": (0.111, 0.571),
        "widowx_stack_cube": (0.0, 1.0),
        "widowx_put_eggplant_in_basket": (0.0, 0.989),
    }
    rows = reference.published()
    assert {name: (round(row["mmrv"], 3), round(row["pearson"], 3)) for name, row in rows.items()} == expected
    for name, row in rows.items():
        assert set(row["real"]) == set(row["visual_matching"]) and len(row["real"]) == (3 if "widowx" in name else 6)
        assert all(0 <= rate <= 1 for side in ("real", "visual_matching") for rate in row[side].values())
    assert rows["google_robot_close_drawer"]["visual_matching"]["rt-1-x"] == 0.891  # better than in reality: 0.741
    assert set(reference.PUBLISHED.values()) == set(expected)
    assert all("visual_matching" in make_protocol(task, "visual_matching")["protocol"] for task in reference.PUBLISHED)


def write_result(folder: Path, **changes) -> Path:
    protocol = make_protocol(changes.pop("task", "move_near_v0"), changes.pop("protocol", "visual_matching"))
    results = {
        "protocol": protocol, "protocol_hash": protocol_hash(protocol),
        "score": {"success_final": 0.4375, "success_any": 0.5},
        "summary": {"success_final": {"n": 239}}, "checkpoint": "runs/finetune_a", "policy": "checkpoint",
    }  # fmt: skip
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results | changes))
    return folder


def run_reference(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "experiments/reference.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_reference_prints_the_published_table_and_ours(tmp_path):
    done = run_reference(write_result(tmp_path / "a"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    cube = next(line for line in lines if "widowx_stack_cube" in line)
    assert "0.125 | 0.042" in cube and "1.000" in cube
    ours = next(line for line in lines if "finetune_a" in line)
    digest = protocol_hash(make_protocol("move_near_v0", "visual_matching"))
    assert all(text in ours for text in ("google_robot_move_near", "0.438", "0.500", "239/240", digest))


def test_reference_as_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reference.py", "--json", str(write_result(tmp_path / "a"))])
    reference.main()
    answer = json.loads(capsys.readouterr().out)
    assert answer["published"].keys() == reference.published().keys()
    assert answer["ours"][0]["row"] == "google_robot_move_near" and answer["ours"][0]["score"] == 0.4375
    assert answer["ours"][0]["score_any"] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "random"}, "was measured by the protocol 'random'; .*--task move_near_v0 --protocol visual_"),
        ({"task": "move_near_v1"}, "nothing was published for move_near_v1; published tasks: pick_coke_can"),
        ({"score": None}, "is not a complete evaluation"),
    ],
)
def test_results_that_do_not_compare_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        reference.read_result(write_result(tmp_path / "a", **changes))
    with pytest.raises(ValueError, match="is not a complete evaluation"):
        reference.read_result(tmp_path / "b")


def test_a_record_names_a_renderer_that_was_used():
    shaders = [make_protocol("open_drawer", **how)["camera"]["shader"]
               for how in ({}, {"shader": "rt"}, {"simulator": "upstream"})]  # fmt: skip
    assert shaders == ["rasteriser", "rt", "upstream's own"]
