"""SIMPLER's 25 tasks as data: names, instructions, limits, where things start (spec section 3; draws: spec 0).

`Task.draw(seed)` gives the choices upstream's reset makes from a seed, `Task.setup(choices)` the scene they describe.
"""

import difflib
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from scipy.spatial.transform import Rotation

# The four visual-matching arms: same geometry, recoloured (spec 1.1).
URDF_VERSIONS = (
    "",
    "recolor_tabletop_visual_matching_1",
    "recolor_tabletop_visual_matching_2",
    "recolor_cabinet_visual_matching_1",
)
DRAWERS = ("top", "middle", "bottom")
INPAINTING = "data/real_inpainting/"
DRAWER_OVERLAY = INPAINTING + "open_drawer_{}.png"
# Robot poses of the drawer tasks, each with its real background picture: id -> (x m, y m, yaw rad).
POSES = {
    "a0": (0.644, -0.179, -0.03),
    "a1": (0.765, -0.182, -0.02),
    "a2": (0.889, -0.203, -0.06),
    "b0": (0.652, 0.009, 0.0),
    "b1": (0.752, 0.009, 0.0),
    "b2": (0.851, 0.035, 0.0),
    "c0": (0.665, 0.224, 0.0),
    "c1": (0.765, 0.222, -0.025),
    "c2": (0.865, 0.222, -0.025),
}
PICK_XY = (-0.35, -0.02), (-0.12, 0.42)  # m, low and high of the random draw
PLACE_XY = (-0.10, 0.0), (-0.05, 0.10)  # m, on the cabinet's top
CLOSE_START = 0.2  # m, how far the drawer is open before it is closed


def quat(*euler) -> tuple[float, ...]:
    """wxyz of fixed-axis roll, pitch, yaw (rad)."""
    return tuple(Rotation.from_euler("xyz", euler).as_quat(scalar_first=True).tolist())


UPRIGHT, IDENTITY = quat(np.pi / 2, 0, 0), (1.0, 0.0, 0.0, 0.0)
ORIENTATIONS = {"upright": UPRIGHT, "laid_vertically": quat(0, 0, np.pi / 2), "lr_switch": (0.0, 0.0, 0.0, 1.0)}
PICK_OBJECTS = (
    "opened_pepsi_can", "opened_coke_can", "opened_sprite_can", "opened_fanta_can", "opened_redbull_can",
    "blue_plastic_bottle", "apple", "orange", "sponge", "bridge_spoon_generated_modified",
    "bridge_carrot_generated_modified", "green_cube_3cm", "yellow_cube_3cm", "eggplant",
)  # fmt: skip
PLACE_OBJECTS = (
    "7up_can", "apple", "baked_apple_v2", "baked_blue_plastic_bottle_v2", "baked_opened_7up_can_v2",
    "baked_opened_coke_can_v2", "baked_opened_pepsi_can_v2", "baked_opened_redbull_can_v2", "baked_orange_v2",
    "baked_sponge_v2", "blue_plastic_bottle", "coke_can", "fanta_can", "opened_coke_can", "opened_fanta_can",
    "opened_sprite_can", "orange", "pepsi_can", "redbull_can", "sponge", "sprite_can",
)  # fmt: skip
DISTRACTORS = {
    "less": ("opened_pepsi_can", "apple", "sponge", "orange"),
    "more": ("opened_7up_can", "opened_sprite_can", "sponge", "orange", "opened_fanta_can",
             "bridge_spoon_generated_modified"),
}  # fmt: skip

# Move near (spec 3.3): three objects an episode, their names in the plain models.
TRIPLETS = (
    ("blue_plastic_bottle", "opened_pepsi_can", "orange"),
    ("opened_7up_can", "apple", "sponge"),
    ("opened_coke_can", "opened_redbull_can", "apple"),
    ("sponge", "blue_plastic_bottle", "opened_7up_can"),
    ("orange", "opened_pepsi_can", "opened_redbull_can"),
)
PAIRS = ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1))  # source, target
NEAR_XY = (((-0.33, 0.04), (-0.33, 0.34), (-0.13, 0.19)), ((-0.13, 0.04), (-0.33, 0.19), (-0.13, 0.34)))  # m
NEAR_BAKED = {"": "{}", "v0": "baked_{}", "v1": "baked_{}_v2"}  # bottle and orange are never baked
FRUIT_DENSITY = 200.0  # kg/m^3, of apple and orange in these scenes


@dataclass(frozen=True)
class Thing:
    """A loose object: model, where it is dropped (m) and how turned (wxyz). density None: as in its data base."""

    model: str
    xy: tuple[float, float]
    quat: tuple[float, ...] = IDENTITY
    density: float | None = None  # kg/m^3


@dataclass(frozen=True)
class Variant:
    """What the protocols change about a scene; None: as in visual matching."""

    name: str = "visual_matching"
    overlay: bool = True  # the real picture behind the scene
    stage: str | None = None
    lighting: str | None = None
    station: str | None = None
    distractors: str | None = None  # "less" | "more"
    no_distractor: bool = False
    head_tilt: float | None = None  # rad
    baked: bool = True  # textures matched to the real objects, where there is a choice


VISUAL_MATCHING = Variant()


@dataclass(frozen=True)
class Setup:
    """One episode's start, complete: what is in the scene and where."""

    robot_xy: tuple[float, float]
    robot_yaw: float  # rad, from the pose that faces the scene
    urdf_version: str
    overlay: str | None  # path of the background picture, below the asset root or absolute
    stage: str
    lighting: str
    station: str | None = None
    drawer: str | None = None
    things: tuple[Thing, ...] = ()
    distractors: tuple[Thing, ...] = ()
    source: int = 0  # of things: the one to act on
    target: int | None = None  # of things: where it should go
    instructions: tuple[str, ...] = ()  # one per subtask
    model_db: str | None = None  # data base of densities and bounding boxes
    matte: bool = False  # objects neither shine nor reflect
    shiny_robot: bool = True  # upstream overrides the robot's materials, but not in the drawers' visual matching
    head_tilt: float | None = None  # rad
    episode_id: int | None = None
    recorded_table: bool = False  # an absent stage's stand-in is the recordings' box (`scenes.RECORDED_TABLES`)
    choices: dict = field(default_factory=dict, compare=False)  # what was drawn or asked for

    @property
    def scene(self) -> tuple:
        """What another scene must be built for; the rest can be moved into place."""
        models = tuple((thing.model, thing.density) for thing in self.things + self.distractors)
        looks = self.urdf_version, self.stage, self.lighting, self.station, self.matte, self.shiny_robot
        looks += (self.recorded_table,)
        return *looks, self.model_db, models


@dataclass(frozen=True)
class Task:
    """One SIMPLER task. `name` is upstream's, `short` is what people type, `env_id` upstream's environment."""

    name: str
    short: str
    kind: str  # "pick" | "near" | "open" | "close" | "place" | "put_on"
    env_id: str
    max_steps: int
    contact_offset: float = 0.02  # m
    drawers: tuple[str, ...] = ()
    poses: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    orientations: tuple[str, ...] = ()
    textures: str = ""  # move near: which baked models
    put_on: str | None = None  # key of PUT_ON

    @property
    def robot(self) -> str:
        return "widowx" if self.kind == "put_on" else "google_robot"

    @property
    def drawer(self) -> str | None:
        """The drawer, where the task has just one."""
        return self.drawers[0] if len(self.drawers) == 1 else None

    @cached_property
    def options(self) -> tuple[str, ...]:
        """Reset options of this task beyond those of every task."""
        named = {"pose": self.poses, "drawer": self.drawers, "model": self.models}
        named |= {"orientation": self.kind == "pick", "object_xy": self.kind in ("pick", "place")}
        named |= {"episode_id": self.kind in ("near", "put_on")}
        return tuple(name for name, there in named.items() if there)

    @property
    def episodes(self) -> int:
        """How many numbered episodes there are; 0 where they are not numbered."""
        return {"near": 60, "put_on": 24}.get(self.kind, 0)

    def draw(self, seed: int, margin: float = 0.0) -> dict:
        """What upstream's reset draws from `seed`: the choices of this task's `options`, and urdf_version.

        Upstream restarts its stream before every group of draws; keep that to get its episodes. margin (m), which
        upstream has not: `object_xy` is drawn from an area that reaches so much further on every side; before a
        cabinet, where the robot has three or nine places, `robot_xy` up to so far from them along both axes.
        """
        stream = np.random.RandomState(seed)

        def choice(values):
            return values[stream.randint(len(values))] if len(values) > 1 else values[0]

        drawn = {}
        if self.episodes:
            drawn["episode_id"] = int(stream.randint(self.episodes))
        if self.kind == "pick":
            drawn["orientation"] = choice(self.orientations)
        if self.kind in ("pick", "near"):
            stream = np.random.RandomState(seed)
        if self.models:
            drawn["model"] = choice(self.models)
        if self.drawers:
            stream = np.random.RandomState(seed)
            drawn["drawer"] = choice(self.drawers)
            drawn["pose"] = choice(self.poses)
        if self.robot == "google_robot":
            drawn["urdf_version"] = choice(URDF_VERSIONS)
        if self.kind in ("pick", "place"):
            low, high = PICK_XY if self.kind == "pick" else PLACE_XY
            low, high = np.subtract(low, margin), np.add(high, margin)
            drawn["object_xy"] = tuple(np.random.RandomState(seed).uniform(low, high).tolist())
        if self.poses and margin:
            beside = np.random.default_rng([seed, 0]).uniform(-margin, margin, 2)
            drawn["robot_xy"] = tuple(np.add(POSES[drawn["pose"]][:2], beside).tolist())
        return drawn

    @property
    def widened(self) -> tuple[str, ...]:
        """The choices that a margin decides; none where everything has its numbered place."""
        places = {"object_xy": self.kind in ("pick", "place"), "pose": self.poses, "robot_xy": self.poses}
        return tuple(name for name, there in places.items() if there)

    def beyond(self, seed: int, margin: float) -> dict:
        """Reset options that widen the draw of `seed`; none without a margin."""
        if not margin:
            return {}
        drawn = self.draw(seed, margin)
        return {name: drawn[name] for name in self.widened}

    def start(self, seed: int, choices: dict) -> dict:
        """Where everything is when the episode of `seed` with these choices begins, as JSON has it: what is drawn but
        for colours. Episodes that share it repeat each other but for what a policy makes of colours."""
        drawn = {name: value for name, value in (self.draw(seed) | choices).items() if name != "urdf_version"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in drawn.items()}

    def setup(self, choices: dict, variant: Variant = VISUAL_MATCHING) -> Setup:
        """The scene of these choices (`draw`, changed at will). ValueError naming a choice that does not exist."""
        self._check(choices)
        parts = {"pick": self._pick, "near": self._near, "put_on": self._put_on}.get(self.kind, self._drawer)
        setup = parts(choices, variant)
        return replace(
            setup,
            robot_xy=tuple(map(float, choices.get("robot_xy", setup.robot_xy))),
            robot_yaw=float(choices.get("robot_yaw", setup.robot_yaw)),
            overlay=choices.get("overlay", setup.overlay) if variant.overlay else None,
            stage=variant.stage or setup.stage,
            lighting=variant.lighting or setup.lighting,
            station=variant.station or setup.station if setup.station else None,
            head_tilt=variant.head_tilt,
            shiny_robot=not (setup.station and variant.overlay),
            choices=dict(choices),
        )

    def _check(self, choices: dict) -> None:
        known = {"pose": tuple(POSES), "drawer": self.drawers, "orientation": tuple(ORIENTATIONS)}
        known |= {"urdf_version": URDF_VERSIONS, "model": PICK_OBJECTS if self.kind == "pick" else PLACE_OBJECTS}
        for name, values in known.items():
            if name in choices and choices[name] not in values:
                raise ValueError(f"unknown {name} {choices[name]!r}; known: {', '.join(map(repr, values))}")
        number = choices.get("episode_id", 0)
        if self.episodes and not (isinstance(number, int | np.integer) and 0 <= number < self.episodes):
            raise ValueError(
                f"episode_id {number!r} of {self.short} must be a whole number from 0 to {self.episodes - 1}"
            )
        for name in ("object_xy", "robot_xy"):
            if name in choices and (np.shape(choices[name]) != (2,) or not np.isfinite(choices[name]).all()):
                raise ValueError(f"{name} must be 2 finite numbers (m), got {choices[name]!r}")

    def _pick(self, choices: dict, variant: Variant) -> Setup:
        turned, model = ORIENTATIONS[choices["orientation"]], choices["model"]
        around = DISTRACTORS[variant.distractors] if variant.distractors else ()
        places = distractor_places(choices["object_xy"], len(around))
        return Setup(
            robot_xy=(0.35, 0.20),
            robot_yaw=0.0,
            urdf_version=choices["urdf_version"],
            overlay=INPAINTING + "google_coke_can_real_eval_1.png",
            stage="google_pick_coke_can_1_v4",
            lighting="tabletop",
            things=(Thing(model, tuple(choices["object_xy"]), turned),),
            distractors=tuple(Thing(other, xy, turned) for other, xy in zip(around, places)),
            instructions=(f"pick {plain_name(model)}",),
            model_db="info_pick_custom_v0.json",
        )

    def _near(self, choices: dict, variant: Variant) -> Setup:
        number, textures = choices["episode_id"], self.textures if variant.baked else ""
        plain, xys = TRIPLETS[number // 12], NEAR_XY[number % 12 // 6]
        things = tuple(
            Thing(
                model if model in ("blue_plastic_bottle", "orange") else NEAR_BAKED[textures].format(model),
                xy,
                NEAR_QUATS.get(model, UPRIGHT),
                FRUIT_DENSITY if model in ("apple", "orange") else None,
            )
            for model, xy in zip(plain, xys)
        )
        source, target = PAIRS[number % 6]
        instruction = f"move {plain_name(things[source].model)} near {plain_name(things[target].model)}"
        if variant.no_distractor:
            things, source, target = (things[source], things[target]), 0, 1
        dbs = {"": "info_pick_custom_v0.json", "v0": "info_pick_custom_baked_tex_v0.json"}
        return Setup(
            robot_xy=(0.35, 0.21),
            robot_yaw=-0.09,
            urdf_version=choices["urdf_version"],
            overlay=INPAINTING + "google_move_near_real_eval_1.png",
            stage="google_pick_coke_can_1_v4",
            lighting="tabletop",
            things=things,
            source=source,
            target=target,
            instructions=(instruction,),
            model_db=dbs.get(textures, "info_pick_custom_baked_tex_v1.json"),
            matte=textures == "v1",
            episode_id=int(number),
        )

    def _drawer(self, choices: dict, variant: Variant) -> Setup:
        drawer, model = choices["drawer"], choices.get("model")
        x, y, yaw = POSES[choices["pose"]]
        instructions = (f"{'open' if model else self.kind} {drawer} drawer",)
        if model:
            instructions += (f"place {plain_name(model)} into {drawer} drawer",)
        return Setup(
            robot_xy=(x, y),
            robot_yaw=yaw,
            urdf_version=choices["urdf_version"],
            overlay=DRAWER_OVERLAY.format(choices["pose"]),
            stage="dummy_drawer",
            lighting="drawer_simple",
            station="mk_station_recolor",
            drawer=drawer,
            things=(Thing(model, tuple(choices["object_xy"])),) if model else (),
            instructions=instructions,
            model_db="info_pick_custom_baked_tex_v1.json",
        )

    def _put_on(self, choices: dict, variant: Variant) -> Setup:
        number, what = choices["episode_id"], PUT_ON[self.put_on]
        turned = what.quats[number % len(what.quats)]
        source_xy, target_xy = what.xys[number // len(what.quats)]
        things = (Thing(what.source, source_xy, turned), Thing(what.target, target_xy))
        return Setup(
            robot_xy=what.robot_xy,
            robot_yaw=0.0,
            urdf_version="",
            overlay=INPAINTING + what.overlay,
            stage=what.stage,
            lighting=what.lighting,
            things=things,
            target=1,
            instructions=(what.instruction,),
            model_db=what.model_db,
            episode_id=int(number),
        )


NEAR_QUATS = {
    "blue_plastic_bottle": quat(np.pi / 2, 0, np.pi / 2),
    "orange": quat(0, 0, np.pi / 2),
    "sponge": quat(0, 0, np.pi / 2),
    "apple": IDENTITY,
}


def distractor_places(object_xy, count: int) -> list[tuple[float, float]]:
    """Where upstream's evaluation drops the distractors: its stream always starts from the first episode seed."""
    stream, places = np.random.RandomState(next_episode_seed(2022)), []
    for _ in range(count):
        while True:
            xy = np.clip(np.add(object_xy, stream.uniform(-0.3, 0.3, 2)), (-0.50, 0.05), (-0.1, 0.35))
            if np.linalg.norm(xy - object_xy) > 0.25:
                break
        places.append(tuple(xy.tolist()))
    return places


def plain_name(model: str) -> str:
    """What an instruction calls a model: "opened_7up_can" -> "7up can" (spec 3.0)."""
    silent = {"opened", "light", "generated", "modified", "objaverse", "bridge", "baked", "v2"}
    return " ".join(word for word in model.split("_") if word not in silent and not word.endswith("cm"))


@dataclass(frozen=True)
class PutOn:
    """A WidowX task (spec 3.6): episode -> xys[episode // len(quats)], quats[episode % len(quats)]."""

    source: str
    target: str
    instruction: str
    xys: tuple  # of (source xy, target xy), m
    quats: tuple  # of the source; the target is never turned
    completely: bool  # the source must touch nothing but the target
    height_margin: float = 0.02  # m, that the source may float above the target
    robot_xy: tuple[float, float] = (0.147, 0.028)  # m
    stage: str = "bridge_table_1_v1"
    lighting: str = "tabletop"
    overlay: str = "bridge_real_eval_1.png"
    model_db: str = "info_bridge_custom_v0.json"


def corner_pairs(*half_edges: float) -> tuple:
    """All ordered pairs of different corners of squares about (-0.16, 0), m."""
    pairs = ()
    for half in half_edges:
        corners = [(-0.16 + half * x, half * y) for x in (-1, 1) for y in (-1, 1)]
        pairs += tuple((a, b) for i, a in enumerate(corners) for j, b in enumerate(corners) if i != j)
    return pairs


PUT_ON = {
    "spoon": PutOn(
        "bridge_spoon_generated_modified",
        "table_cloth_generated_shorter",
        "put the spoon on the towel",
        corner_pairs(0.075),
        (IDENTITY, quat(0, 0, np.pi / 2)),
        completely=False,
    ),
    "carrot": PutOn(
        "bridge_carrot_generated_modified",
        "bridge_plate_objaverse_larger",
        "put carrot on plate",
        corner_pairs(0.075),
        (quat(0, 0, np.pi), quat(0, 0, -np.pi / 2)),
        completely=True,
    ),
    "cube": PutOn(
        "baked_green_cube_3cm",
        "baked_yellow_cube_3cm",
        "stack the green block on the yellow block",
        corner_pairs(0.05, 0.10),
        (IDENTITY,),
        completely=True,
        model_db="info_bridge_custom_baked_tex_v0.json",
    ),
    "eggplant": PutOn(
        "eggplant",
        "dummy_sink_target_plane",
        "put eggplant into yellow basket",
        tuple(
            ((-0.105 + x, 0.206 + y), (-0.125, 0.025)) for x in (-0.01, 0.01) for y in (-0.015, -0.005, 0.005, 0.015)
        ),
        (IDENTITY, quat(0, 0, np.pi / 4), quat(0, 0, -np.pi / 4)),
        completely=False,
        height_margin=0.06,
        robot_xy=(0.127, 0.06),
        stage="bridge_table_1_v2",
        lighting="sink",
        overlay="bridge_sink.png",
    ),
}


def _tasks():
    def pick(name, short, orientations=tuple(ORIENTATIONS), models=("opened_coke_can",)):
        env_id = "GraspSingleOpenedCokeCanInScene-v0" if len(models) == 1 else "GraspSingleRandomObjectInScene-v0"
        return Task(f"google_robot_{name}", short, "pick", env_id, 80, models=models, orientations=orientations)

    def near(name, textures):
        env_id = f"MoveNearGoogleBakedTexInScene-{textures}"
        return Task(f"google_robot_{name}", name, "near", env_id, 80, 0.005, textures=textures)

    def drawer(kind, which):
        drawers, name = (which,) if which else DRAWERS, f"{kind}_{which}_drawer" if which else f"{kind}_drawer"
        env_id = f"{kind.title()}{which.title()}DrawerCustomInScene-v0"
        return Task(f"google_robot_{name}", name, kind, env_id, 113, drawers=drawers, poses=tuple(POSES))

    def place(name, short, which, models=PLACE_OBJECTS):
        drawers, env_id = (which,) if which else DRAWERS, f"PlaceIntoClosed{which.title()}DrawerCustomInScene-v0"
        return Task(
            f"google_robot_{name}", short, "place", env_id, 200, 0.005, drawers, ("a0", "b0", "c0"), models=models
        )

    def put_on(name, short, key, env_id, max_steps=60):
        return Task(f"widowx_{name}", short, "put_on", env_id, max_steps, 0.005, put_on=key)

    yield place("place_apple_in_closed_top_drawer", "open_and_place", "top", ("baked_apple_v2",))
    yield from (drawer(kind, which) for kind in ("open", "close") for which in (*DRAWERS, ""))
    for which in (*DRAWERS, ""):
        name = f"place_in_closed_{which}_drawer" if which else "place_in_closed_drawer"
        yield place(name, name, which)
    yield pick("pick_coke_can", "pick_coke_can")
    yield pick("pick_horizontal_coke_can", "pick_horizontal_coke_can", ("lr_switch",))
    yield pick("pick_vertical_coke_can", "pick_vertical_coke_can", ("laid_vertically",))
    yield pick("pick_standing_coke_can", "pick_standing_coke_can", ("upright",))
    yield pick("pick_object", "pick_object", models=PICK_OBJECTS)
    yield near("move_near", "v1")
    yield near("move_near_v0", "v0")
    yield near("move_near_v1", "v1")
    yield put_on("spoon_on_towel", "spoon_on_towel", "spoon", "PutSpoonOnTableClothInScene-v0")
    yield put_on("carrot_on_plate", "carrot_on_plate", "carrot", "PutCarrotOnPlateInScene-v0")
    yield put_on("stack_cube", "stack_cube", "cube", "StackGreenCubeOnYellowCubeBakedTexInScene-v0")
    yield put_on("put_eggplant_in_basket", "eggplant_in_basket", "eggplant", "PutEggplantInBasketScene-v0", 120)


TASKS = list(_tasks())
BY_NAME = {key: task for task in TASKS for key in (task.name, task.short)}


def get_task(name: str) -> Task:
    """The task of this (upstream or short) name; ValueError with the nearest names otherwise."""
    if name not in BY_NAME:
        near = difflib.get_close_matches(name, BY_NAME, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(task.short for task in TASKS)}"
        raise ValueError(f"unknown task {name!r}; {hint}")
    return BY_NAME[name]


def get_tasks(names: str) -> list[Task]:
    """Tasks by names with commas between. ValueError for unknown ones and where they need different robots."""
    tasks = [get_task(name.strip()) for name in names.split(",")]
    if len({task.robot for task in tasks}) > 1:
        robots = ", ".join(f"{task.short}: {task.robot}" for task in tasks)
        raise ValueError(f"one data set holds one robot ({robots}); collect them apart")
    return tasks


def next_episode_seed(seed: int) -> int:
    """The seed of upstream's unseeded reset after an episode seeded with `seed`; the chain starts at 2022 (spec 0)."""
    return int(np.random.RandomState(seed).randint(2**32, dtype=np.int64))
