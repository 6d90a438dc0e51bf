"""Success rules on either side of every threshold of upstream's, on hand-made states; then on the real scenes."""

from types import SimpleNamespace

import numpy as np
import pytest
import sapien
from scipy.spatial.transform import Rotation

from envs import success
from envs.success import Drawer, MoveNear, Pick, Place, PutOnTop
from envs.tasks import IDENTITY, get_task, quat

# Upstream's bounding boxes (m) of the hand-made objects: diagonals of 0.10, 0.05 and 0.05 m across x and y.
BOXES = {"source": (0.06, 0.08, 0.04), "target": (0.03, 0.04, 0.02), "bystander": (0.03, 0.04, 0.02)}
TABLE = object()
LINK = object()


class Body:
    """An object: `com` m, its centre of mass in its own frame."""

    def __init__(self, p, q=IDENTITY, com=(0, 0, 0)):
        self.pose, self.cmass_local_pose = sapien.Pose(p, q), sapien.Pose(com)

    def find_component_by_type(self, kind):
        return self

    def move(self, *p):
        self.pose = sapien.Pose(p, self.pose.q)


class Scene:
    """What a judge asks of a scene; a test sets it."""

    def __init__(self, task, *things):
        self.task, self.things, self.subtask, self.qpos = get_task(task), list(things), 0, 0.0
        named = [SimpleNamespace(model=model) for model in BOXES]
        self.setup = SimpleNamespace(source=0, target=1, things=named[: len(things)], model_db=None)
        self.held, self.touching, self.robot_entities = False, [], {LINK}
        self.agent = SimpleNamespace(is_grasping=lambda contacts, thing: self.held and thing is self.things[0])
        self.drawer_link = SimpleNamespace(entity=object(), collision_shapes=[object() for _ in range(6)])

    def contacts(self):
        return self.touching

    def drawer_qpos(self):
        return self.qpos


def touch(one, other, *impulses, shapes=()):
    """A contact with the impulses (N s) of its points."""
    bodies = [SimpleNamespace(entity=one), SimpleNamespace(entity=other)]
    points = [SimpleNamespace(impulse=np.array([0.0, 0.0, size])) for size in impulses]
    return SimpleNamespace(bodies=bodies, points=points, shapes=shapes)


@pytest.fixture(autouse=True)
def boxes(request, monkeypatch):
    if "sim" not in request.keywords:
        monkeypatch.setattr(success, "bbox_size", lambda thing, db: np.array(BOXES[thing.model]))


# -- pick --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def can():
    return Body((0, 0, 0.95), com=(0.01, 0, -0.008))


@pytest.fixture
def pick(can):
    return Scene("pick_coke_can", can)


@pytest.mark.parametrize(("raised", "lifted"), [(0.0099, False), (0.0101, True)])
@pytest.mark.parametrize("turned", [IDENTITY, quat(0, np.pi / 2, 0)])
def test_a_lift_is_measured_at_the_origin(pick, can, raised, lifted, turned):
    """The centre of mass, 8 mm below it, does not matter; nor does turning, which moves the centre of mass."""
    judge = Pick(pick)
    assert not judge(pick)["success"]
    can.pose = sapien.Pose((0.5, 0, 0.95 + raised), turned)
    info = judge(pick)
    assert (info["lifted_object"], info["success"]) == (lifted, lifted)
    assert not info["lifted_object_significantly"] and not info["is_grasped"]  # an airborne can counts ungrasped


@pytest.mark.parametrize(
    ("contact", "free"),
    [
        (lambda can: touch(can, TABLE, 1.1e-6), False),
        (lambda can: touch(TABLE, can, 1.1e-6), False),
        (lambda can: touch(can, TABLE, 0.9e-6), True),
        (lambda can: touch(can, TABLE, 0.6e-6, 0.6e-6), False),  # the sum of a contact's points
        (lambda can: touch(can, TABLE, 1e-3, -1e-3), True),
        (lambda can: touch(can, LINK, 1e-3), True),
        (lambda can: touch(TABLE, LINK, 1e-3), True),
    ],
)
def test_a_lift_is_off_everything_but_the_robot(pick, can, contact, free):
    judge = Pick(pick)
    can.move(0, 0, 1.0)
    pick.touching = [contact(can)]
    assert judge(pick)["success"] == free


def test_two_weak_contacts_do_not_add_up(pick, can):
    judge = Pick(pick)
    can.move(0, 0, 1.0)
    pick.touching = [touch(can, TABLE, 0.9e-6), touch(can, TABLE, 0.9e-6)]
    assert judge(pick)["success"]


def test_a_lift_lasts_while_the_can_is_held(pick, can):
    judge = Pick(pick)
    pick.held = True
    can.move(0, 0, 0.9601)
    assert judge(pick)["lifted_object"]
    can.move(0, 0, 0.95)
    pick.touching = [touch(can, TABLE, 1.0)]
    assert judge(pick)["success"]
    pick.held = False
    assert not judge(pick)["success"]
    pick.held = True
    assert not judge(pick)["lifted_object"]  # letting go ended it


def test_five_high_lifts_in_all_are_a_success_for_good(pick, can):
    judge, counts, successes = Pick(pick), [], []
    for raised in (0.0199, 0.0201, 0.03, 0, 0.0201, 0.03, 0, 0.0201, 0):
        can.move(0, 0, 0.95 + raised)
        info = judge(pick)
        counts.append(info["episode_stats"]["n_lift_significant"])
        successes.append(info["success"])
    assert counts == [0, 1, 2, 2, 3, 4, 4, 5, 5]
    assert successes == [True, True, True, False, True, True, False, True, True]
    assert info["subgoals"] == {"object_grasped": False, "object_lifted": True}


def test_five_steps_without_a_break_make_a_grasp(pick):
    judge, consecutive, latched, grasped = Pick(pick), [], [], []
    for held in (0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0):
        pick.held = bool(held)
        info = judge(pick)
        consecutive.append(int(info["consecutive_grasp"]))
        latched.append(int(info["episode_stats"]["consec_grasp"]))
        grasped.append(int(info["subgoals"]["object_grasped"]))
    assert consecutive == [0] * 10 + [1, 1, 0]
    assert latched == [0] * 10 + [1, 1, 1]
    assert grasped == [0] + [1] * 12
    assert not info["success"] and not info["is_grasped"] and info["episode_stats"]["grasped"]


def test_statistics_of_one_step_do_not_change_with_the_next(pick, can):
    judge = Pick(pick)
    first = judge(pick)
    can.move(0, 0, 1.0)
    judge(pick)
    assert first["episode_stats"] == {"n_lift_significant": 0, "consec_grasp": False, "grasped": False}


# -- move near ---------------------------------------------------------------------------------------------------------


def near(source=(-0.2, 0, 0.9), target=(0, 0, 0.9), bystander=(0.0, 0.5, 0.9), turned=IDENTITY, com=(0, 0, 0)):
    things = Body(source, turned, com), Body(target), Body(bystander)
    scene = Scene("move_near", *things)
    return scene, MoveNear(scene), *things


@pytest.mark.parametrize(
    ("turned", "reach"),
    [
        (IDENTITY, 0.05 + 0.025 + 0.1),
        (quat(0, 0, 0.7), 0.05 + 0.025 + 0.1),
        # About x by 90 degrees: the box (6, 8, 4) cm becomes (6, -4, 8).
        (quat(np.pi / 2, 0, 0), np.hypot(0.06, 0.04) / 2 + 0.025 + 0.1),
        # By the angle whose tangent is 2: y and z of the box cancel in y, as those of no box would.
        (quat(np.arctan2(0.08, 0.04), 0, 0), 0.06 / 2 + 0.025 + 0.1),
    ],
)
def test_near_is_a_tenth_of_a_metre_beyond_both_half_boxes(turned, reach):
    scene, judge, source, *_ = near(turned=turned)
    assert not judge(scene)["near_tgt_obj"]
    for beyond, reached in ((1e-4, False), (-1e-4, True)):
        source.move(reach + beyond, 0, 0.9)
        info = judge(scene)
        assert info["near_tgt_obj"] == info["success"] == info["subgoals"]["near"] == reached
        assert info["moved_correct_obj"] and info["is_closest_to_tgt"] and info["all_obj_keep_height"]


def test_near_is_measured_between_centres_of_mass_and_with_the_boxes_at_rest():
    scene, judge, source, *_ = near(com=(0.02, 0, 0))
    source.pose = sapien.Pose((0.1551, 0, 0.9))  # and its centre of mass 2 cm further
    assert not judge(scene)["near_tgt_obj"]
    source.pose = sapien.Pose((0.1549, 0, 0.9))
    assert judge(scene)["near_tgt_obj"]
    source.pose = sapien.Pose((0.1549, 0, 0.9), quat(0, 0, np.pi))  # 2 cm nearer
    assert judge(scene)["near_tgt_obj"]
    source.pose = sapien.Pose((0.1949, 0, 0.9), quat(0, 0, np.pi))
    assert judge(scene)["near_tgt_obj"]
    source.pose = sapien.Pose((0.1749, 0, 0.9 + 0.02), quat(0, np.pi / 2, 0))  # tipped over: still the box at rest
    assert judge(scene)["near_tgt_obj"]


@pytest.mark.parametrize(("shift", "moved"), [(0.0299, False), (0.0301, True)])
def test_the_source_must_move_three_centimetres(shift, moved):
    scene, judge, source, *_ = near(source=(-0.15, 0, 0.9))
    source.move(-0.15 + shift * 0.6, shift * 0.8, 0.9)
    info = judge(scene)
    assert info["near_tgt_obj"] and (info["moved_correct_obj"], info["success"]) == (moved, moved)


@pytest.mark.parametrize("other", [1, 2])
def test_the_source_must_move_further_than_all_others(other):
    """Here 30 cm; the others' heights and turns do not count."""
    for moved, correct, wrong in ((0.2999, True, False), (0.3001, False, True)):
        scene, judge, source, *_ = things = near()
        source.move(0.1, 0, 0.9)
        body = things[2 + other]
        x, y, z = body.pose.p
        body.move(x + moved, y, z)
        info = judge(scene)
        assert (info["moved_correct_obj"], info["moved_wrong_obj"]) == (correct, wrong)


@pytest.mark.parametrize(("moved", "wrong"), [(0.0299, False), (0.0301, True)])
def test_a_wrong_object_moved_more_than_three_centimetres(moved, wrong):
    scene, judge, _, _, bystander = near()
    bystander.move(0, 0.5 + moved, 0.9)
    info = judge(scene)
    assert (info["moved_correct_obj"], info["moved_wrong_obj"]) == (False, wrong)


@pytest.mark.parametrize(("away", "closest"), [(0.0899, False), (0.0901, True)])
def test_the_target_must_be_the_closest_but_for_a_centimetre(away, closest):
    scene, judge, source, *_ = near(bystander=(0.1, away, 0.8))  # heights do not count
    source.move(0.1, 0, 0.9)
    info = judge(scene)
    assert (info["is_closest_to_tgt"], info["success"]) == (closest, closest)


@pytest.mark.parametrize(
    ("thing", "sunk", "kept"),
    [(2, 0.0199, True), (2, 0.0201, False), (1, 0.1499, True), (1, 0.1501, False), (0, 0.0999, True),
     (0, 0.1001, False), (0, -0.5, True)],
)  # fmt: skip
def test_nothing_may_fall(thing, sunk, kept):
    """Bystanders 2 cm; source and target 15 cm: centre of mass now (here 5 cm below) from the origin then."""
    scene, judge, source, *_ = things = near(com=(0, 0, -0.05))
    source.move(0.1, 0, 0.9)
    body = things[2 + thing]
    x, y, z = body.pose.p
    body.move(x, y, z - sunk)
    info = judge(scene)
    assert (info["all_obj_keep_height"], info["success"]) == (kept, kept)


def test_move_near_forgets_all_but_the_grasp():
    scene, judge, source, *_ = near()
    source.move(0.1, 0, 0.9)
    scene.held = True
    assert judge(scene)["success"]
    source.move(-0.2, 0, 0.9)
    scene.held = False
    info = judge(scene)
    assert not info["success"]
    assert info["subgoals"] == {"object_grasped": True, "right_object_moved": False, "near": False}
    names = {"all_obj_keep_height", "moved_correct_obj", "moved_wrong_obj", "near_tgt_obj", "is_closest_to_tgt"}
    assert info["episode_stats"] == {name: info[name] for name in names}


def test_without_distractors_only_the_target_is_judged():
    things = Body((-0.2, 0, 0.9)), Body((0, 0, 0.9))
    scene = Scene("move_near", *things)
    judge = MoveNear(scene)
    things[0].move(0.1, 0, 0.9)
    assert judge(scene)["success"]


# -- drawers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "qpos", "success", "subgoal"),
    [("open_top_drawer", 0.1499, False, "drawer_opened"), ("open_top_drawer", 0.15, True, "drawer_opened"),
     ("close_top_drawer", 0.05, True, "drawer_closed"), ("close_top_drawer", 0.0501, False, "drawer_closed")],
)  # fmt: skip
def test_a_drawer_counts_at_every_step_anew(task, qpos, success, subgoal):
    scene = Scene(task)
    judge = Drawer(scene)
    for scene.qpos, expected in ((qpos, success), (0.1, False), (qpos, success)):
        info = judge(scene)
        assert (info["success"], info["subgoals"]) == (expected, {subgoal: expected})
    assert info["episode_stats"] == {"qpos": f"{qpos:.3f}"} and info["qpos"] == qpos


# -- place -------------------------------------------------------------------------------------------------------------


def place(shape=2, impulse=1.1e-6, thing=None, flip=False):
    scene = Scene("open_and_place", Body((0, 0, 0.9)))
    bodies = (thing or scene.things[0], scene.drawer_link.entity)
    shapes = [object(), scene.drawer_link.collision_shapes[shape]]
    inside = touch(*bodies[:: -1 if flip else 1], impulse, shapes=shapes[:: -1 if flip else 1])
    return scene, Place(scene), inside


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [({}, 1), ({"flip": True}, 1), ({"impulse": 0.9e-6}, 0), ({"shape": 0}, 0), ({"shape": 3}, 0),
     ({"thing": TABLE}, 0)],
)  # fmt: skip
def test_inside_is_a_touch_of_the_bottom_inside_the_drawer(arguments, counts):
    scene, judge, inside = place(**arguments)
    scene.subtask, scene.qpos, scene.touching = 1, 0.2, [inside]
    info = judge(scene)
    assert info["episode_stats"]["has_contact"] == counts
    assert info["success"] == info["subgoals"]["object_placed"] == bool(counts)


@pytest.mark.parametrize(
    ("subtask", "qpos", "success"), [(1, 0.05, True), (1, 0.0499, False), (0, 0.2, False), (1, 0.2, True)]
)
def test_placing_needs_the_second_subtask_and_an_open_drawer(subtask, qpos, success):
    scene, judge, inside = place()
    scene.subtask, scene.qpos, scene.touching = subtask, qpos, [inside]
    assert judge(scene)["success"] == success


def test_one_touch_at_any_time_is_enough():
    """Even before the second subtask, and if the object is taken out again; the touches are counted."""
    scene, judge, inside = place()
    scene.touching = [inside]
    for _ in range(3):
        info = judge(scene)
    assert not info["success"]
    scene.touching, scene.subtask, scene.qpos = [], 1, 0.05
    info = judge(scene)
    assert info["success"] and info["episode_stats"] == {"qpos": 0.05, "is_drawer_open": False, "has_contact": 3}


def test_a_drawer_once_open_stays_so_in_the_statistics():
    scene, judge, _ = place()
    opened = []
    for scene.qpos, scene.held in ((0.1499, False), (0.15, True), (0.0, False)):
        info = judge(scene)
        opened.append(info["episode_stats"]["is_drawer_open"])
    assert opened == [False, True, True]
    assert info["subgoals"] == {"drawer_opened": True, "object_grasped": True, "object_placed": False}


# -- put on ------------------------------------------------------------------------------------------------------------


def put(task="spoon_on_towel", turned=IDENTITY, com=(0, 0, 0)):
    things = Body((-0.3, 0, 0.9), turned, com), Body((0, 0, 0.9))
    scene = Scene(task, *things)
    return scene, PutOnTop(scene), *things


@pytest.mark.parametrize(
    ("offset", "on_target"),
    [((0.0279, 0, 0.03), True), ((0.0281, 0, 0.03), False), ((0, -0.0279, 0.03), True), ((0.02, 0.02, 0.03), False),
     ((0, 0, 1e-4), True), ((0, 0, -1e-4), False), ((0, 0, 0.0499), True), ((0, 0, 0.0501), False)],
)  # fmt: skip
def test_on_the_target(offset, on_target):
    """Across: half the target's diagonal (2.5 cm) and 3 mm; up: both half heights (1 and 2 cm) and 2 cm."""
    scene, judge, source, target = put()
    assert not judge(scene)["success"]
    source.pose = sapien.Pose(target.pose.p + offset)
    info = judge(scene)
    assert info["success"] == info["src_on_target"] == info["subgoals"]["on_target"] == on_target


def test_on_the_target_is_measured_between_centres_of_mass():
    scene, judge, source, _ = put(com=(0.01, 0, 0.02))
    for x, z, on_target in ((0.0179, 0.0299, True), (0.0181, 0.0299, False), (0.0179, 0.0301, False)):
        source.move(x, 0, 0.9 + z)
        assert judge(scene)["success"] == on_target


@pytest.mark.parametrize(
    ("task", "turned", "highest"),
    [
        ("spoon_on_towel", IDENTITY, 0.01 + 0.02 + 0.02),
        ("spoon_on_towel", quat(np.pi, 0, 0), 0.01 - 0.02 + 0.02),  # at rest upside down: its box counts downwards
        ("spoon_on_towel", quat(0, np.pi / 2, 0), 0.0),  # on its side: 0.01 - 0.03 + 0.02, which nothing satisfies
        ("eggplant_in_basket", IDENTITY, 0.01 + 0.02 + 0.06),
    ],
)
def test_how_high_above_the_target(task, turned, highest):
    scene, judge, source, _ = put(task, turned)
    source.move(0, 0, 0.9 + highest - 1e-4)
    on_target = judge(scene)["success"]
    source.move(0, 0, 0.9 + highest + 1e-4)
    assert (on_target, judge(scene)["success"]) == (highest > 0, False)


@pytest.mark.parametrize(
    ("task", "completely"),
    [("spoon_on_towel", False), ("carrot_on_plate", True), ("stack_cube", True), ("eggplant_in_basket", False)],
)
def test_completely_on_the_target(task, completely):
    """Carrot and cube may touch nothing but the target and the robot, which may still hold them."""
    scene, judge, source, target = put(task)
    source.move(0, 0, 0.93)
    for contact, harmless in (
        (touch(source, TABLE, 1.1e-6), False),
        (touch(TABLE, source, 1.1e-6), False),
        (touch(source, TABLE, 0.9e-6), True),
        (touch(source, target, 1.0), True),
        (touch(LINK, source, 1.0), True),
        (touch(target, TABLE, 1.0), True),
    ):
        scene.touching = [contact]
        assert judge(scene)["success"] == (harmless or not completely)


def test_put_on_remembers_the_grasp_but_not_the_success():
    scene, judge, source, _ = put()
    consecutive, latched = [], []
    source.move(0, 0, 0.93)
    for held in (1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0):
        scene.held = bool(held)
        info = judge(scene)
        consecutive.append(int(info["consecutive_grasp"]))
        latched.append(int(info["episode_stats"]["consecutive_grasp"]))
        assert info["is_src_obj_grasped"] == bool(held) and info["episode_stats"]["is_src_obj_grasped"]
        assert info["success"]
    assert consecutive == [0] * 9 + [1, 0] and latched == [0] * 9 + [1, 1]
    source.move(-0.3, 0, 0.9)
    info = judge(scene)
    assert not info["success"] and info["subgoals"] == {"object_grasped": True, "on_target": False}
    assert info["episode_stats"] == {"moved_correct_obj": False, "moved_wrong_obj": False, "is_src_obj_grasped": True,
                                     "consecutive_grasp": True, "src_on_target": False}  # fmt: skip


@pytest.mark.parametrize(("aside", "moved"), [(0.0299, False), (0.0301, True)])
def test_a_centre_of_mass_beside_the_origin_counts_as_motion(aside, moved):
    """Upstream compares the centre of mass now with the origin at rest."""
    scene, judge, *_ = put(com=(0, aside, 0))
    assert judge(scene)["moved_correct_obj"] == moved


def test_moving_the_target_is_moving_the_wrong_object():
    scene, judge, source, target = put()
    target.move(0.0299, 0, 0.9)
    assert not judge(scene)["moved_wrong_obj"]
    target.move(0.0301, 0, 0.9)
    assert judge(scene)["moved_wrong_obj"]
    source.move(-0.2, 0, 0.9)
    info = judge(scene)
    assert info["moved_correct_obj"] and not info["moved_wrong_obj"]


# -- real scenes -------------------------------------------------------------------------------------------------------


def built(task, monkeypatch, **options):
    """Of a real task, at rest, touching nothing, and its judge."""
    from envs.simpler import SimplerEnv

    scene = SimplerEnv(task, obs_mode="none")
    scene.reset(seed=1, options=options)
    monkeypatch.setattr(scene, "contacts", lambda: [])
    return scene, success.JUDGES[scene.task.kind](scene)


def raise_by(thing, height):
    thing.set_pose(sapien.Pose([0, 0, height]) * thing.pose)


@pytest.mark.sim
def test_a_real_can_is_lifted(monkeypatch):
    """It stands with its centre of mass 8 mm below its origin (spec 3.0), which must not matter."""
    scene, judge = built("pick_standing_coke_can", monkeypatch)
    can = scene.object
    assert can.pose.p[2] - success.com_position(can)[2] == pytest.approx(0.0691 - 0.0613, abs=5e-4)
    raise_by(can, 0.0099)
    assert not judge(scene)["success"]
    raise_by(can, 0.0002)
    assert judge(scene)["success"]
    scene.close()


@pytest.mark.sim
def test_a_real_can_is_near(monkeypatch):
    """Episode 13 of move near: the 7up can to the sponge, boxes of the data base turned as they came to rest."""
    scene, judge = built("move_near_v0", monkeypatch, episode_id=13)
    can, sponge = (scene.things[i] for i in (scene.setup.source, scene.setup.target))
    boxes = {"baked_opened_7up_can": (0.066, 0.123, 0.066), "baked_sponge": (0.069, 0.095, 0.034)}  # m
    diagonals = []
    for thing, index in ((can, scene.setup.source), (sponge, scene.setup.target)):
        box = np.array(success.bbox_size(scene.setup.things[index], scene.setup.model_db))
        np.testing.assert_allclose(box, boxes[scene.setup.things[index].model], atol=5e-3)
        diagonals.append(np.hypot(*(Rotation.from_quat(thing.pose.q, scalar_first=True).as_matrix() @ box)[:2]))
    reach = sum(diagonals) / 2 + 0.1
    assert reach == pytest.approx((np.hypot(0.066, 0.066) + np.hypot(0.069, 0.095)) / 2 + 0.1, abs=5e-3)
    beside = success.com_position(can) - can.pose.p
    for beyond, reached in ((1e-4, False), (-1e-4, True)):
        place = success.com_position(sponge) + np.array([-reach - beyond, 0, 0]) - beside
        can.set_pose(sapien.Pose([*place[:2], can.pose.p[2]], can.pose.q))
        assert judge(scene)["near_tgt_obj"] == reached
    scene.close()


@pytest.mark.sim
def test_a_real_cube_is_on_the_other(monkeypatch):
    """Cubes of 3 cm: half a diagonal of 21.2 mm and 3 mm aside, 3 cm up and 2 cm above that."""
    scene, judge = built("stack_cube", monkeypatch, episode_id=0)
    green, yellow = scene.things
    half = np.hypot(0.03, 0.03) / 2 + 0.003
    for offset, on_target in (((half - 5e-4, 0, 0.03), True), ((half + 5e-4, 0, 0.03), False),
                              ((0, 0, 0.0498), True), ((0, 0, 0.0502), False), ((0, 0, -0.001), False)):  # fmt: skip
        green.set_pose(sapien.Pose(yellow.pose.p + np.array(offset), green.pose.q))
        assert judge(scene)["success"] == on_target, offset
    scene.close()


@pytest.mark.sim
def test_the_bottom_inside_a_real_drawer(monkeypatch):
    """Upstream's third collision shape: the box of 55 x 51.5 x 2 cm that lies 6 cm below the drawer's middle."""
    scene, judge = built("open_and_place", monkeypatch)
    shape = scene.drawer_link.collision_shapes[success.INTERIOR_BOTTOM]
    np.testing.assert_allclose(shape.half_size, (0.275, 0.2575, 0.01), atol=1e-6)
    np.testing.assert_allclose(shape.local_pose.p, (0, 0, -0.06), atol=1e-6)
    scene.cabinet.set_qpos(np.array([0.16 if d == "top" else 0 for d in scene.drawers], dtype=np.float32))
    info = judge(scene)
    assert info["subgoals"]["drawer_opened"] and info["qpos"] == pytest.approx(0.16) and not info["success"]
    inside = touch(scene.object, scene.drawer_link.entity, 1e-5, shapes=[object(), shape])
    monkeypatch.setattr(scene, "contacts", lambda: [inside])
    assert not judge(scene)["success"]
    scene.advance_to_next_subtask()
    assert judge(scene)["success"]
    scene.close()
