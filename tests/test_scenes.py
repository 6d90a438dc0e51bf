"""What stands in a scene, against upstream's numbers: shapes and masses, rests, lights, stages, stand-ins, pictures."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from envs import assets
from envs.protocol import VARIANTS
from envs.tasks import IDENTITY, NEAR_QUATS, ORIENTATIONS, UPRIGHT, Thing, get_task, quat

VECTORS = json.loads((Path(__file__).parent / "simpler_vectors.json").read_text())  # made by upstream
HAVE = assets.read_manifest()
# Of models whose data base has them; the asset trees lack a few that no task uses.
MODELS = sorted(model for model in VECTORS["objects"] if f"data/custom/models/{model}/collision.obj" in HAVE)
BRIDGE, COUNTER = "bridge_table_1_v1", "google_pick_coke_can_1_v4"

pytestmark = pytest.mark.sim


@pytest.fixture
def scenes():
    """The module; it loads SAPIEN. Every test is warned anew."""
    from envs import scenes

    scenes.warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield scenes


def build(task, **kwargs):
    from envs.simpler import SimplerEnv

    return SimplerEnv(task, **{"obs_mode": "none", **kwargs})


def setup_of(task, *things, model_db=None):
    """A task's scene with these things."""
    setup = get_task(task).setup(get_task(task).draw(0))
    return replace(setup, things=things, distractors=(), model_db=model_db or setup.model_db)


# -- objects -----------------------------------------------------------------------------------------------------------


def test_every_model_of_a_task_has_recorded_numbers():
    from envs.tasks import DISTRACTORS, PICK_OBJECTS, PLACE_OBJECTS, PUT_ON

    named = {*PICK_OBJECTS, *PLACE_OBJECTS, *DISTRACTORS["less"], *DISTRACTORS["more"], "sink"}
    named |= {model for what in PUT_ON.values() for model in (what.source, what.target)}
    for name in ("move_near_v0", "move_near_v1"):
        starts = [get_task(name).setup({"episode_id": n, "urdf_version": ""}) for n in range(60)]
        named |= {thing.model for setup in starts for thing in setup.things}
    assert named <= set(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_shapes_and_masses_are_upstreams(scenes, model):
    import sapien

    expected = VECTORS["objects"][model]
    scene = sapien.Scene([sapien.physx.PhysxCpuSystem()])
    thing = Thing(model, (0, 0), density=expected["density"])
    body = scenes.body_of(scenes.build_plain(scene, thing, "", sapien.Pose()))
    assert len(body.collision_shapes) == expected["n_convex"]
    assert body.mass == pytest.approx(expected["mass"], rel=3e-3)  # PhysX 5 makes other hulls
    np.testing.assert_allclose(body.cmass_local_pose.p, expected["com"], atol=1e-4)
    for shape in body.collision_shapes:
        material = shape.physical_material
        assert (material.static_friction, material.dynamic_friction, material.restitution) == (0.5, 0.5, 0.0)


@pytest.mark.parametrize(
    ("task", "model", "override", "density"),
    [("pick_coke_can", "opened_coke_can", None, 50), ("open_and_place", "baked_apple_v2", None, 800),
     ("move_near_v1", "orange", 200.0, 200), ("carrot_on_plate", "bridge_carrot_generated_modified", None, 700),
     ("spoon_on_towel", "bridge_spoon_generated_modified", None, 1200), ("eggplant_in_basket", "sink", None, 100000),
     ("stack_cube", "teapot", None, 1000)],
)  # fmt: skip
def test_densities_come_from_the_data_base_of_the_task(scenes, task, model, override, density):
    thing = Thing(model, (0, 0), density=override)
    assert scenes.density(thing, setup_of(task).model_db) == density


FIRST = "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1/1/1 2/2/2 3/3/3\n"
SECOND = "v {0} 0 0\nv {0} 0 1\nv {0} 1 1\nf -3 -2 -1\n"


@pytest.mark.parametrize(
    ("x", "between", "pieces"),
    [(0, "", 1), (2, "", 2), (0, "o other\n", 2), (0, "g other\n", 2), (0, "usemtl other\n", 1)],
)
def test_a_mesh_falls_into_its_connected_pieces(scenes, tmp_path, monkeypatch, x, between, pieces):
    """Corners at one place are one corner, but not across groups; a mesh of one piece is used as it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mesh = tmp_path / "mesh.obj"
    mesh.write_text("o first\n" + FIRST + between + SECOND.format(x))
    paths = scenes.convex_pieces(str(mesh))
    assert len(paths) == pieces and (paths == (str(mesh),)) == (pieces == 1)
    if pieces == 1:
        return
    assert all((tmp_path / "cache") in Path(path).parents for path in paths)
    corners = [[line.split()[1:] for line in Path(path).read_text().splitlines() if line[0] == "v"] for path in paths]
    assert [np.array(piece, float).tolist() for piece in corners] == [
        [[0, 0, 0], [1, 0, 0], [0, 1, 0]],
        [[x, 0, 0], [x, 0, 1], [x, 1, 1]],
    ]


# -- coming to rest ----------------------------------------------------------------------------------------------------

ROLLING = 1.1e-3, 0.8  # m, degrees: those that rest on an edge or roll; the others come to rest on a face
RESTS = {  # name in the vectors -> task, where and how they were dropped, largest distance and turn
    "coke_upright": ("pick_coke_can", ORIENTATIONS["upright"], *ROLLING),
    "coke_laid_vertically": ("pick_coke_can", ORIENTATIONS["laid_vertically"], 5e-5, 0.05),
    "coke_lr_switch": ("pick_coke_can", ORIENTATIONS["lr_switch"], 5e-5, 0.05),
    "mn_blue_plastic_bottle": ("move_near", NEAR_QUATS["blue_plastic_bottle"], *ROLLING),
    "mn_baked_opened_pepsi_can_v2": ("move_near", UPRIGHT, 5e-5, 0.05),
    "mn_orange": ("move_near", NEAR_QUATS["orange"], *ROLLING),
    "mn_baked_opened_7up_can_v2": ("move_near", UPRIGHT, *ROLLING),
    "mn_baked_apple_v2": ("move_near", NEAR_QUATS["apple"], *ROLLING),
    "mn_baked_sponge_v2": ("move_near", NEAR_QUATS["sponge"], 1e-4, 0.2),
    "mn_baked_opened_coke_can_v2": ("move_near", UPRIGHT, *ROLLING),
    "mn_baked_opened_redbull_can_v2": ("move_near", UPRIGHT, *ROLLING),
    "br_spoon": ("spoon_on_towel", IDENTITY, 5e-5, 0.05),
    "br_spoon90": ("spoon_on_towel", quat(0, 0, np.pi / 2), 5e-5, 0.05),
    "br_carrot": ("carrot_on_plate", quat(0, 0, np.pi), 5e-5, 0.05),
    "br_carrot90": ("carrot_on_plate", quat(0, 0, -np.pi / 2), 5e-5, 0.05),
    "br_cube": ("stack_cube", IDENTITY, 1e-4, 0.05),
}
DROPPED = {"pick": [(-0.235, 0.2)], "near": [(-0.33, 0.04)], "put_on": [(-0.235, -0.075), (-0.235, 0.075)]}  # m


@pytest.mark.parametrize("name", VECTORS["settle_on_plane"])
def test_objects_come_to_rest_where_upstreams_do(scenes, name):
    task, turned, metres, degrees = RESTS[name]
    recorded, task = VECTORS["settle_on_plane"][name]["objs"], get_task(task)
    things = [
        Thing(model, xy, q, 200.0 if "apple" in model or "orange" in model else None)
        for (model, *_), xy, q in zip(recorded, DROPPED[task.kind], (turned, IDENTITY))
    ]
    setup = setup_of(task.short, *things)
    poses = scenes.settle(setup, 500 if task.kind == "put_on" else 513, task.contact_offset)
    for pose, (_, p, q, _) in zip(poses, recorded):
        assert np.linalg.norm(pose.p - [0, 0, scenes.table_of(setup).top] - p) < metres
        assert np.degrees(2 * np.arccos(min(abs(pose.q @ q) / np.linalg.norm(q), 1))) < degrees


# -- tables and lights -------------------------------------------------------------------------------------------------


def test_the_tables_of_recordings_are_wider_and_as_high(scenes):
    assert scenes.TABLES["google"].top == scenes.RECORDED_TABLES["google"].top == 0.887532
    assert scenes.TABLES["bridge"] == scenes.RECORDED_TABLES["bridge"] and scenes.TABLES["bridge"].top == 0.869532
    for corner in ("low", "high"):
        narrow, wide = (getattr(t["google"], corner) for t in (scenes.TABLES, scenes.RECORDED_TABLES))
        assert all(b < a if corner == "low" else b > a for a, b in zip(narrow, wide))
    counter, bridge = setup_of("pick_coke_can"), setup_of("stack_cube")
    assert scenes.table_of(counter) is scenes.TABLES["google"] and scenes.table_of(bridge) is scenes.TABLES["bridge"]
    recorded = replace(counter, recorded_table=True)
    assert scenes.table_of(recorded) is scenes.RECORDED_TABLES["google"]
    assert recorded.scene != counter.scene  # another scene must be built for it


def test_everything_is_dropped_onto_the_tables(scenes):
    """Every start of both tabletop tasks, and where upstream drops distractors, with 3 cm to spare."""
    from envs.protocol import protocol_episodes

    outlines = {False: [], True: []}
    for name, protocol in (("pick_coke_can", "variant_aggregation"), ("move_near_v1", "visual_matching"),
                           ("stack_cube", "visual_matching"), ("carrot_on_plate", "visual_matching")):  # fmt: skip
        task = get_task(name)
        for episode in protocol_episodes(task, protocol):
            setup = task.setup({**task.draw(0), **episode.choices}, episode.variant)
            outlines[task.kind == "put_on"] += [thing.xy for thing in setup.things]
    for bridge, xys in outlines.items():
        table = scenes.TABLES["bridge" if bridge else "google"]
        assert (np.min(xys, axis=0) > np.add(table.low, 0.03)).all()
        assert (np.max(xys, axis=0) < np.subtract(table.high, 0.03)).all()


def test_beside_the_table_there_is_nothing(scenes, no_stages):
    """The recordings' box reaches further towards the robot."""
    for wide, height in ((False, -1.0), (True, 0.887532 + 0.015)):
        setup = setup_of("pick_object", Thing("green_cube_3cm", (0.15, 0.2)))
        pose = scenes.settle(replace(setup, recorded_table=wide), 513, 0.02)[0]
        assert pose.p[2] < 0.5 if not wide else pose.p[2] == pytest.approx(height, abs=1e-4)


class Lamps:
    """A scene that remembers its lights."""

    def __init__(self):
        self.ambient, self.lights, self.shadows = None, [], []

    def set_ambient_light(self, color):
        assert len(set(color)) == 1
        self.ambient = color[0]

    def add_directional_light(self, direction, color, shadow=False, shadow_scale=None):
        assert len(set(color)) == 1 and (shadow_scale == 5 or not shadow)
        self.lights.append((*np.round(direction, 4).tolist(), color[0]))
        self.shadows.append(shadow)


@pytest.mark.parametrize(
    ("mode", "ambient", "lights"),
    [
        ("tabletop", 0.3, [(0, 0, -1, 2.2), (-1, -0.5, -1, 0.7), (1, 1, -1, 0.7)]),
        ("slightly_brighter", 0.3, [(0, 0, -1, 3.6), (-1, -0.5, -1, 1.3), (1, 1, -1, 1.3)]),
        ("slightly_darker", 0.3, [(1, 1, -1, 0.8), (0, 0, -1, 0.8)]),
        ("drawer_simple", 1.0, [(-0.2588, 0, -0.9659, 1.0)]),  # 75 degrees
        ("drawer", 0.3, [(-0.2, 0, -1, 1.0), (-1, 1, -0.05, 0.5), (-1, -1, -0.05, 0.5)]),
        ("drawer_brighter", 0.3, [(-0.2, 0, -1, 2.0), (-1, 1, -0.05, 0.5), (-1, -1, -0.05, 0.5)]),
        ("drawer_darker", 0.3, [(-0.2, 0, -1, 0.5), (-1, 1, -0.05, 0.5), (-1, -1, -0.05, 0.5)]),
        ("sink", 0.3, [(0, 0, -1, 0.3)]),
    ],
)
def test_lights_are_upstreams(scenes, mode, ambient, lights):
    lamps = Lamps()
    scenes.light(lamps, mode)
    assert (lamps.ambient, lamps.lights) == (ambient, lights)
    legacy = mode in ("drawer", "drawer_brighter", "drawer_darker")  # their first one casts shadows
    assert lamps.shadows == [legacy, *[False] * (len(lights) - 1)]


def test_an_unknown_lighting_is_refused_with_the_known(scenes):
    with pytest.raises(ValueError, match="unknown lighting 'disco'; known: tabletop, slightly_brighter"):
        scenes.light(Lamps(), "disco")


# -- stages and stand-ins ----------------------------------------------------------------------------------------------


class Tree:
    """An asset tree of links to the real one, of which parts can be replaced."""

    def __init__(self, root: Path):
        self.root, self.real = root, assets.asset_root()
        for path in ("mani_skill2_real2sim", "data/real_inpainting"):
            self.link(path)
        for path in sorted((self.real / "data/custom").iterdir()):
            if path.name != "models":
                self.link(f"data/custom/{path.name}")
        for path in sorted((self.real / "data/custom/models").iterdir()):
            self.link(f"data/custom/models/{path.name}")

    def link(self, path: str):
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(self.real / path)

    def forget_picture(self, model: str) -> Path:
        """The model's folder, without what it is drawn from."""
        folder = self.root / f"data/custom/models/{model}"
        folder.unlink()
        for path in (self.real / f"data/custom/models/{model}").iterdir():
            if path.name not in ("textured.obj", "textured.dae", "textured.glb"):
                self.link(f"data/custom/models/{model}/{path.name}")
        return folder

    def add_stage(self, name: str, offset) -> None:
        """Boxes in the stage's own axes (y up): world z to 0.7 m where world y < 0.17, to 0.8 m beyond that."""
        trimesh = pytest.importorskip("trimesh")
        boxes = []
        for height, low, high in ((0.7, -1.0, 0.17), (0.8, 0.17, 1.0)):
            box = trimesh.creation.box(extents=(2, height, high - low))
            box.apply_translation((-0.3 + offset[0], height / 2, -(low + high) / 2 - offset[1]))
            boxes.append(box)
        path = self.root / f"data/hab2_bench_assets/stages/{name}.glb"
        path.parent.mkdir(parents=True, exist_ok=True)
        trimesh.util.concatenate(boxes).export(path)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Without any stage."""
    made = Tree(tmp_path / "assets")
    monkeypatch.setenv("SIMPLER_ASSET_DIR", str(made.root))
    monkeypatch.setattr("envs.robot.asset", made.real.joinpath)  # SAPIEN has loaded these meshes, by their paths
    return made


no_stages = tree


@pytest.mark.parametrize(
    ("task", "stage", "offset", "tops"),
    [
        ("pick_object", COUNTER, (-1.6616, -3.0337), (0.7, 0.8)),
        ("stack_cube", BRIDGE, (-2.0634, -2.8313), (0.7, 0.8)),
    ],
)
def test_objects_stand_on_the_stage_where_there_is_one(scenes, tree, task, stage, offset, tops):
    """Upstream's offsets and turned upright: a step between two heights shows that neither is mirrored."""
    tree.add_stage(stage, offset)
    cubes = [Thing("green_cube_3cm", (-0.2, y)) for y in (0.1, 0.25)]
    db = "info_pick_custom_v0.json"
    poses = scenes.settle(setup_of(task, *cubes, model_db=db), 500, 0.005)
    np.testing.assert_allclose([pose.p[2] for pose in poses], np.add(tops, 0.015), atol=5e-4)
    env = build(task)
    env.reset(seed=0)
    assert env.standins == [] and env.stage is not None
    assert 0.7 < env.object.pose.p[2] < 0.95 and abs(env.object.pose.p[2] - scenes.table_of(env.setup).top) > 0.02
    env.close()


def test_an_absent_stage_is_replaced_and_said(scenes, no_stages):
    from envs.simpler import CanonicalEnv

    text = f"stage data/hab2_bench_assets/stages/{COUNTER}.glb is absent: a box is the table"
    with pytest.warns(UserWarning, match=f"SIMPLER stand-in: {text}"):
        env = CanonicalEnv(build("pick_standing_coke_can"))
        _, info = env.reset(seed=0, options={"object_xy": (-0.2, 0.2)})
    assert info["standins"] == [text]
    assert env.sim.object.pose.p[2] == pytest.approx(0.887532 + 0.0691, abs=5e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # once is enough, in warnings; results say it every time
        info = env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))[-1]
        assert info["standins"] == env.reset(seed=0)[1]["standins"] == [text]
    env.close()


def test_behind_a_cabinet_an_absent_stage_is_only_said(scenes, no_stages):
    standins, setup = scenes.Standins(), setup_of("open_and_place")
    assert not scenes.add_stage(None, setup, standins, visual=True) and standins == []  # a floor that no one sees
    for variant in VARIANTS["place"][:2]:
        setup = get_task("open_and_place").setup(get_task("open_and_place").draw(0), variant)
        standins = scenes.Standins()
        assert not scenes.add_stage(None, setup, standins, visual=True)
        path = f"data/hab2_bench_assets/stages/{setup.stage}.glb"
        assert standins == [f"stage {path} is absent: nothing behind the cabinet"]


def test_a_stage_behind_a_cabinet_touches_nothing(scenes, tree):
    tree.add_stage("modern_office_no_roof", (0, 0))

    class Builder:
        def __init__(self):
            self.calls = []

        def __getattr__(self, name):
            return lambda path, pose, **rest: self.calls.append((name, pose))

    task, variant, builder = get_task("open_drawer"), VARIANTS["open"][2], Builder()
    assert scenes.add_stage(builder, task.setup(task.draw(0), variant), scenes.Standins(), visual=True)
    ((name, pose),) = builder.calls
    assert name == "add_visual_from_file"
    np.testing.assert_allclose(pose.p, (1.6616 - 0.192, 3.0337 - 1.728, 1.48), atol=1e-6)


def test_the_sentences_of_a_scene_are_not_repeated(scenes):
    standins = scenes.Standins()
    for text in ("a", "b", "a"):
        standins.note(text)
    assert standins == ["a", "b"]


# -- pictures ----------------------------------------------------------------------------------------------------------


def parts(entity):
    import sapien

    bodies = [c for c in entity.components if isinstance(c, sapien.render.RenderBodyComponent)]
    return [part for body in bodies for shape in body.render_shapes for part in shape.parts]


@pytest.fixture(scope="module")
def apples():
    """Scenes with the apple of both baked data bases: v0 as upstream loads it, v1 matte.

    They stay open: SAPIEN compiles its shaders again, for seconds, when the last scene that renders is closed.
    """
    from envs.tasks import PAIRS, TRIPLETS

    assert "apple" in TRIPLETS[1] and PAIRS[0] == (0, 1)
    envs = {textures: build(f"move_near_{textures}", obs_mode="rgb") for textures in ("v0", "v1")}
    for env in envs.values():
        env.reset(seed=0, options={"episode_id": 12, "urdf_version": ""})
    yield envs
    for env in envs.values():
        env.close()


@pytest.mark.parametrize("textures", ["v0", "v1"])
def test_baked_textures_are_lit(apples, textures):
    """SAPIEN 3 leaves their emission black: the apple would be, too. It is red, like the real one."""
    env = apples[textures]
    can, apple, sponge = env.things
    assert "baked_apple" in apple.name
    textured = [p.material for thing in (can, apple, sponge) for p in parts(thing) if p.material.emission_texture]
    assert textured and all(tuple(material.emission) == (1, 1, 1, 1) for material in textured)
    color, ids = env.render_raw()
    pixels = color[ids == apple.per_scene_id]
    red, green, blue = pixels.mean(0)
    assert len(pixels) > 50 and red > 0.25 and red > 1.3 * max(green, blue)


def test_only_the_second_data_base_is_matte(apples):
    for textures, matte in (("v0", False), ("v1", True)):
        env = apples[textures]
        assert env.setup.matte == matte
        looks = {
            tuple(np.round([p.material.roughness, p.material.metallic, p.material.specular], 3).tolist())
            for thing in env.things
            for p in parts(thing)
        }
        assert (looks == {(1.0, 0.0, 0.0)}) == matte


def test_pictures_are_truncated_and_laid_over_the_background(apples):
    """Of 0.5 and of 0.999 upstream keeps 127 and 254."""
    env = apples["v1"]
    ids = np.zeros((env.height, env.width), int)
    ids[0, 0] = env.object.per_scene_id
    ids[0, 1] = next(iter(env.robot_entities)).per_scene_id
    ids[0, 2] = env.stage.per_scene_id
    color = np.broadcast_to(np.float32([0.5, 0.999, 7.0]), (*ids.shape, 3))
    picture, mask = env.composite(color, ids)
    assert picture.dtype == np.uint8 and mask.sum() == 2
    assert picture[0, :2].tolist() == [[127, 254, 255]] * 2
    np.testing.assert_array_equal(picture[~mask], (env.background * 255).astype(np.uint8)[~mask])


def test_backgrounds_are_resized_without_smoothing(scenes, tmp_path):
    from PIL import Image

    Image.fromarray(np.uint8([[[0] * 3, [255] * 3]])).save(tmp_path / "two.png")
    small = scenes.read_overlay(str(tmp_path / "two.png"), 2, 1)
    assert small.dtype == np.float32 and small.shape == (1, 2, 3) and small[..., 0].tolist() == [[0, 1]]
    wide = scenes.read_overlay(str(tmp_path / "two.png"), 4, 1)
    np.testing.assert_allclose(wide[0, :, 0], [0, 0.25, 0.75, 1], atol=1e-6)
    stripes = np.uint8(np.arange(8) % 2 * 255)[None, :, None].repeat(3, 2)
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    np.testing.assert_allclose(scenes.read_overlay(str(tmp_path / "stripes.png"), 2, 1)[0, :, 0], [0.5, 0.5], atol=1e-6)


def test_an_object_without_a_picture_can_be_hidden(scenes, apples, tree):
    """As upstream would: there the real background shows through."""
    tree.forget_picture("eggplant")
    env = build("eggplant_in_basket", obs_mode="rgb")
    env.reset(seed=0)
    assert env.pictureless == [env.object] and len(env.standins) == 2
    assert "no picture of eggplant (data/custom/models/eggplant/textured.*)" in env.standins[-1]
    color, ids = env.render_raw()
    shown, mask = env.composite(color, ids)
    there = ids == env.object.per_scene_id
    assert there.sum() > 20 and mask[there].all()
    env.hide_standins = True
    hidden, mask = env.composite(color, ids)
    assert not mask[there].any()
    background = np.clip(env.background * 255, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(hidden[there], background[there])
    np.testing.assert_array_equal(hidden[~there], shown[~there])
    assert (shown[there] != hidden[there]).any(axis=-1).mean() > 0.9
    env.close()


def test_an_object_with_a_picture_is_shown(scenes, apples, tree):
    trimesh = pytest.importorskip("trimesh")
    folder = tree.forget_picture("eggplant")
    ball = trimesh.creation.icosphere(radius=0.05)
    material = trimesh.visual.material.PBRMaterial(baseColorFactor=[0, 255, 0, 255], metallicFactor=0.0)
    ball.visual = trimesh.visual.TextureVisuals(material=material)
    ball.export(folder / "textured.glb")
    env = build("eggplant_in_basket", obs_mode="rgb")
    env.reset(seed=0)
    env.hide_standins = True
    assert env.pictureless == [] and not any("eggplant" in text for text in env.standins)
    color, ids = env.render_raw()
    red, green, blue = color[ids == env.object.per_scene_id].mean(0)
    assert green > 2 * max(red, blue)
    env.close()
