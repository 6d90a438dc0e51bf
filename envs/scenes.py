"""What stands in a SIMPLER scene besides the robot: stage, lights, cabinet, objects, real background (spec 2, 3.0).

Stages and pictures that the asset tree lacks are replaced by plain stand-ins; `Standins` collects what was replaced so
that every result can say so.
"""

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import sapien
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.transform import Rotation

from envs.assets import asset, has_asset, user_cache
from envs.tasks import Setup, Thing

MODELS = "data/custom/models/"
STATION_POSE = sapien.Pose([-0.295, 0, 0.017])
CABINET_TOP, CABINET_TOP_Z = [0.315, 0.3075, 0.01], 0.855  # m, half size and centre in the cabinet's frame
SINK_POSE = sapien.Pose([-0.16, 0.13, 0.88])
OBJECT_DAMPING = 0.1  # linear and angular; distractors and the sink have none
DROP_HEIGHT = 0.87 + 0.5  # m
SOLVER_ITERATIONS = 25
SETTLE_ITERATIONS = 50  # rests closer to upstream's 25 of PhysX 4: cans 0.4 to 0.7 mm away instead of 2 to 3.6 (LOG.md)

# Directional lights as (direction, brightness), after the ambient brightness (spec 2.3).
_SIDES = ([-1, -0.5, -1], 0.7), ([1, 1, -1], 0.7)
_DRAWER_SIDES = ([-1, 1, -0.05], 0.5), ([-1, -1, -0.05], 0.5)
LIGHTS = {
    "tabletop": (0.3, ([0, 0, -1], 2.2), *_SIDES),
    "slightly_brighter": (0.3, ([0, 0, -1], 3.6), ([-1, -0.5, -1], 1.3), ([1, 1, -1], 1.3)),
    "slightly_darker": (0.3, ([1, 1, -1], 0.8), ([0, 0, -1], 0.8)),
    "drawer_simple": (1.0, ([-np.cos(np.deg2rad(75)), 0, -np.sin(np.deg2rad(75))], 1.0)),
    "drawer": (0.3, ([-0.2, 0, -1], 1.0), *_DRAWER_SIDES),
    "drawer_brighter": (0.3, ([-0.2, 0, -1], 2.0), *_DRAWER_SIDES),
    "drawer_darker": (0.3, ([-0.2, 0, -1], 0.5), *_DRAWER_SIDES),
    "sink": (0.3, ([0, 0, -1], 0.3)),
}
SHADOWED = ("drawer", "drawer_brighter", "drawer_darker")  # their first light casts shadows

STAGES = "data/hab2_bench_assets/stages/{}.glb"
GOOGLE_OFFSET, WIDOWX_OFFSET = (-1.6616, -3.0337, 0), (-2.0634, -2.8313, 0)  # m
UPRIGHT_STAGE = sapien.Pose(q=[0.707, 0.707, 0, 0])  # their y is up
STAGE_POSES = {
    "modern_bedroom": sapien.Pose([0.178, -2.235, 1.669], [0.007, 0, 0, -1]),
    "modern_office": sapien.Pose([-0.192, -1.728, 1.48], [0.709, 0, 0, -0.705]),
}


@dataclass(frozen=True)
class Table:
    """A box in place of a stage's table; the height of its top is exact (spec 2.1)."""

    top: float  # m
    low: tuple[float, float]  # m, x and y
    high: tuple[float, float]
    color: tuple[float, float, float] = (0.43, 0.36, 0.3)


# Outlines: the Google robot's is read off the real pictures, out to where upstream drops distractors (x = 0.05). The
# reference recordings had a wider box, whose edge at x = 0.25 stops the robot's shoulder in two of three reaches.
TABLES = {
    "google": Table(0.887532, (-0.72, -0.15), (0.06, 0.55)),
    "bridge": Table(0.869532, (-0.70, -0.60), (0.10, 0.60), (0.42, 0.2, 0.12)),
}
RECORDED_TABLES = TABLES | {"google": Table(0.887532, (-0.75, -1.0), (0.25, 1.0))}


class Standins(list):
    """What this scene shows or touches instead of files that are absent: short sentences, each warned of once."""

    def note(self, text: str) -> None:
        if text not in self:
            self.append(text)
            warn_once(text)


@cache
def warn_once(text: str) -> None:
    warnings.warn(f"SIMPLER stand-in: {text}", stacklevel=4)


@lru_cache(maxsize=32)
def read_overlay(path: str, width: int, height: int) -> np.ndarray:
    """The real background (H, W, 3) float32 in [0, 1], resized bilinearly without smoothing, as OpenCV does."""
    import cv2

    picture = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
    return cv2.resize(picture, (width, height))


def overlay_path(setup: Setup) -> str:
    return setup.overlay if os.path.isabs(setup.overlay) else str(asset(setup.overlay))


# -- stage and lights ------------------------------------------------------------------------------------------------


def light(scene, mode: str) -> None:
    """Switch on the lights of a mode. ValueError naming the known ones."""
    if mode not in LIGHTS:
        raise ValueError(f"unknown lighting {mode!r}; known: {', '.join(LIGHTS)}")
    ambient, *directional = LIGHTS[mode]
    scene.set_ambient_light([ambient] * 3)
    for index, (direction, brightness) in enumerate(directional):
        shadow = dict(shadow=True, shadow_scale=5) if index == 0 and mode in SHADOWED else {}
        scene.add_directional_light(direction, [brightness] * 3, **shadow)


def stands_on_table(setup: Setup) -> bool:
    """Whether the stage itself carries the objects (the cabinet does in the drawer tasks)."""
    return setup.station is None


def table_of(setup: Setup) -> Table:
    tables = RECORDED_TABLES if setup.recorded_table else TABLES
    return tables["bridge" if "bridge" in setup.stage else "google"]


def add_stage(builder, setup: Setup, standins: Standins, visual: bool) -> bool:
    """Add the stage to an actor builder placed at the world's origin; False if there is nothing to build.

    The stage mesh where the asset tree has it (triangles that objects rest on, on tables), else its table as a box.
    """
    name, path = setup.stage, STAGES.format(setup.stage)
    if name == "dummy_drawer":
        return False  # a floor below the picture, visible nowhere
    offset = np.array(WIDOWX_OFFSET if "bridge" in name else GOOGLE_OFFSET)
    if has_asset(path):
        before = next((pose for key, pose in STAGE_POSES.items() if key in name), sapien.Pose())
        pose = sapien.Pose(-offset) * before * UPRIGHT_STAGE
        if stands_on_table(setup):
            builder.add_nonconvex_collision_from_file(str(asset(path)), pose=pose, material=default_material())
        if visual:
            builder.add_visual_from_file(str(asset(path)), pose=pose)
        return True
    if not stands_on_table(setup):
        standins.note(f"stage {path} is absent: nothing behind the cabinet")
        return False
    standins.note(f"stage {path} is absent: a box is the table")
    table = table_of(setup)
    low, high = np.array([*table.low, 0.0]), np.array([*table.high, table.top])
    middle, half = sapien.Pose((low + high) / 2), (high - low) / 2
    builder.add_box_collision(middle, half, material=default_material())
    if visual:
        builder.add_box_visual(middle, half, material=sapien.render.RenderMaterial(base_color=[*table.color, 1]))
    return True


def default_material():
    return sapien.physx.PhysxMaterial(1.0, 1.0, 0.0)


# -- objects ---------------------------------------------------------------------------------------------------------


@cache
def model_db(name: str) -> dict:
    """{model: {"bbox": {"min", "max"} (m), "density" (kg/m^3)}}"""
    return json.loads(asset("data/custom/" + name).read_text())


def density(thing: Thing, db: str) -> float:
    """kg/m^3"""
    return thing.density or model_db(db).get(thing.model, {}).get("density", 1000.0)


def bbox_size(thing: Thing, db: str) -> np.ndarray:
    """(3,) m, along the model's own axes."""
    box = model_db(db)[thing.model]["bbox"]
    return np.subtract(box["max"], box["min"])


def add_collision(builder, model: str, density: float) -> None:
    """One convex hull per connected piece of the collision mesh, as SAPIEN 2 splits it (spec 7.3)."""
    material = sapien.physx.PhysxMaterial(0.5, 0.5, 0.0)
    for path in convex_pieces(str(asset(f"{MODELS}{model}/collision.obj"))):
        builder.add_convex_collision_from_file(path, material=material, density=density)


@cache
def convex_pieces(path: str) -> tuple[str, ...]:
    """The mesh itself if it is of one piece, else a file in the user's cache for each connected piece.

    Vertices at the same place count as one, within one `o` or `g` group.
    """
    text = Path(path).read_text(errors="replace")
    vertices, groups = [], [[]]
    for line in text.splitlines():
        kind, *rest = line.split() or [""]
        if kind == "v":
            vertices.append([float(value) for value in rest[:3]])
        elif kind in ("o", "g"):
            groups.append([])
        elif kind == "f":
            groups[-1].append([int(corner.split("/")[0]) for corner in rest])
    vertices = np.array(vertices)
    same = np.unique(vertices, axis=0, return_inverse=True)[1].reshape(-1)
    pieces = [piece for faces in groups if faces for piece in _connected(faces, same, len(vertices))]
    if len(pieces) == 1:
        return (path,)
    folder = user_cache() / "convex" / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, used in enumerate(pieces):
        target = folder / f"{index:03d}-of-{len(pieces):03d}.obj"
        if not target.exists():
            lines = [f"v {x!r} {y!r} {z!r}" for x, y, z in vertices[used].tolist()]
            lines += [f"f 1 {k} {k + 1}" for k in range(2, len(used))]  # only the points matter to a hull
            temporary = target.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text("\n".join(lines) + "\n")
            os.replace(temporary, target)
        paths.append(str(target))
    return tuple(paths)


def _connected(faces: list[list[int]], same: np.ndarray, count: int) -> list[np.ndarray]:
    """Indices of the vertices of each connected piece of a group, in order of first use."""
    faces = [[index - 1 if index > 0 else count + index for index in face] for face in faces]
    edges = np.array([(same[face[0]], same[other]) for face in faces for other in face])
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(same), len(same)))
    label = connected_components(graph, directed=False)[1]
    used = np.unique(np.concatenate(faces))
    first = dict.fromkeys(label[same[face[0]]] for face in faces)
    return [used[label[same[used]] == piece] for piece in first]


def add_visual(builder, model: str, standins: Standins) -> bool:
    """The looks of a model: textured.obj, .dae or .glb, the first that exists; else its collision mesh, and False."""
    for suffix in ("obj", "dae", "glb"):
        path = f"{MODELS}{model}/textured.{suffix}"
        if has_asset(path):
            builder.add_visual_from_file(str(asset(path)))
            return True
    standins.note(f"no picture of {model} ({MODELS}{model}/textured.*): shown as its plain collision shape")
    color = STANDIN_COLORS.get(model.removeprefix("baked_").removesuffix("_v2"), (0.6, 0.6, 0.6))
    material = sapien.render.RenderMaterial(base_color=[*color, 1], roughness=0.5)
    builder.add_visual_from_file(str(asset(f"{MODELS}{model}/collision.obj")), material=material)
    return False


STANDIN_COLORS = {
    "eggplant": (0.16, 0.05, 0.2),
    "opened_redbull_can": (0.1, 0.2, 0.5),
    "redbull_can": (0.1, 0.2, 0.5),
    "blue_plastic_bottle": (0.05, 0.25, 0.6),
}


def body_of(entity: sapien.Entity) -> sapien.physx.PhysxRigidDynamicComponent:
    return entity.find_component_by_type(sapien.physx.PhysxRigidDynamicComponent)


def hold_still(entity: sapien.Entity) -> None:
    body = body_of(entity)
    body.linear_velocity = body.angular_velocity = np.zeros(3, dtype=np.float32)


def finish_looks(entity: sapien.Entity, matte: bool) -> None:
    """SAPIEN 3 multiplies a baked texture by an emission colour that these files leave black (spec 7.2)."""
    for component in entity.components:
        if isinstance(component, sapien.render.RenderBodyComponent):
            for shape in component.render_shapes:
                for part in shape.parts:
                    if part.material.emission_texture is not None:
                        part.material.set_emission([1.0, 1.0, 1.0, 1.0])
                    if matte:
                        part.material.set_roughness(1.0)
                        part.material.set_metallic(0.0)
                        part.material.set_specular(0.0)


# -- coming to rest --------------------------------------------------------------------------------------------------


def settle(setup: Setup, sim_freq: int, contact_offset: float) -> list[sapien.Pose]:
    """Where things and distractors come to rest: dropped without tilting, released, waited for (spec 3.0).

    In a scene of its own, with upstream's solver (TGS) and without the robot, which is parked far away there too: the
    solver of the robot's scene would let an apple roll 3 mm further. contact_offset in m.
    """
    sapien.physx.set_shape_config(contact_offset=contact_offset, rest_offset=0.0)
    sapien.physx.set_scene_config(enable_pcm=False, enable_tgs=True)
    sapien.physx.set_body_config(solver_position_iterations=SETTLE_ITERATIONS, solver_velocity_iterations=1)
    scene = sapien.Scene([sapien.physx.PhysxCpuSystem()])
    scene.set_timestep(1 / sim_freq)
    ground = scene.create_actor_builder()
    if setup.station:
        ground.add_box_collision(half_size=CABINET_TOP, material=default_material())
        ground.build_static().set_pose(STATION_POSE * sapien.Pose([0, 0, CABINET_TOP_Z]))
    elif add_stage(ground, setup, Standins(), visual=False):
        ground.build_static()
    if has_sink(setup):
        lock(build_plain(scene, Thing("sink", (0, 0)), setup.model_db, SINK_POSE), "xyzabc")
    things = [_dropped(scene, thing, setup.model_db) for thing in setup.things]
    for thing in things:
        body_of(thing).linear_damping = body_of(thing).angular_damping = OBJECT_DAMPING

    def simulate(seconds: float):
        for _ in range(int(sim_freq * seconds)):
            scene.step()

    for thing in things:
        lock(thing, "ab")
    simulate(0.5)
    for thing in things:
        release(thing)
    simulate(0.5)
    if moving(things):
        simulate(1.5)

    # Distractors fall one after the other, straight down, and are released together.
    distractors = []
    for thing in setup.distractors:
        distractors.append(_dropped(scene, thing, setup.model_db))
        lock(distractors[-1], "xyab")
        simulate(0.5)
    for thing in distractors:
        release(thing)
        simulate(0.5)
    if moving(distractors):
        simulate(1.5)
    return [thing.pose for thing in things + distractors]


def has_sink(setup: Setup) -> bool:
    return setup.lighting == "sink"


def build_plain(scene, thing: Thing, db: str, pose: sapien.Pose) -> sapien.Entity:
    """A body without looks in a bare scene."""
    builder = scene.create_actor_builder()
    add_collision(builder, thing.model, density(thing, db))
    entity = builder.build()
    entity.set_pose(pose)
    return entity


def _dropped(scene, thing: Thing, db: str) -> sapien.Entity:
    return build_plain(scene, thing, db, sapien.Pose([*thing.xy, DROP_HEIGHT], thing.quat))


def lock(entity: sapien.Entity, axes: str) -> None:
    """Lock motion along x, y, z and rotation about them (a, b, c)."""
    body_of(entity).set_locked_motion_axes([axis in axes for axis in "xyzabc"])


def release(entity: sapien.Entity) -> None:
    lock(entity, "")
    entity.set_pose(entity.pose)
    hold_still(entity)


def moving(entities: list[sapien.Entity]) -> bool:
    speed = sum(np.linalg.norm(body_of(entity).linear_velocity) for entity in entities)
    turning = sum(np.linalg.norm(body_of(entity).angular_velocity) for entity in entities)
    return bool(entities) and (speed > 1e-3 or turning > 1e-2)


def com_position(entity: sapien.Entity) -> np.ndarray:
    """(3,) m, world: centre of mass, which upstream's success rules call the object's pose."""
    return (entity.pose * body_of(entity).cmass_local_pose).p


def rotation_matrix(q) -> np.ndarray:
    return Rotation.from_quat(q, scalar_first=True).as_matrix()
