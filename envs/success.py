"""Upstream's success rules and statistics, one class per kind of task (spec section 3).

A judge is made when an episode starts, with everything at rest, and called exactly once per control step, because its
statistics add up over steps. It returns upstream's `info` and, under "subgoals", what people want to know of a failure.
Upstream's quirks are kept where the spec describes them; `contacts` are those of the last physics step.
"""

import numpy as np
import sapien

from envs.robot import contact_impulse
from envs.scenes import bbox_size, com_position, rotation_matrix
from envs.tasks import PUT_ON

IMPULSE = 1e-6  # N s, below which bodies do not touch
LIFTED, LIFTED_HIGH = 0.01, 0.02  # m
STEPS = 5  # control steps that make a grasp or a lift count
OPEN_QPOS, CLOSED_QPOS, PLACED_QPOS = 0.15, 0.05, 0.05  # m, drawer
INTERIOR_BOTTOM = 2  # index of the drawer's collision shape that counts as "inside"
MOVED = 0.03  # m
NEAR, CLOSEST_MARGIN = 0.10, 0.01  # m
FALLEN, FALLEN_ACTED = 0.02, 0.15  # m, that an object may sink: bystanders; source and target
ON_TARGET_MARGIN = 0.003  # m


def horizontal(vector) -> float:
    return float(np.linalg.norm(np.asarray(vector)[:2]))


def touches_other(contacts, thing: sapien.Entity, allowed: set) -> bool:
    """Whether `thing` presses on anything but `allowed` entities, in any one pair of shapes."""
    for contact in contacts:
        pair = {body.entity for body in contact.bodies}
        if thing in pair and not pair <= allowed | {thing} and impulse_size(contact) > IMPULSE:
            return True
    return False


def impulse_size(contact) -> float:
    """N s, of one pair of shapes."""
    return float(np.linalg.norm(np.sum([point.impulse for point in contact.points], axis=0)))


class Consecutive:
    """Counts control steps in which something held without a break."""

    def __init__(self):
        self.count = 0

    def __call__(self, holds: bool) -> int:
        self.count = self.count + 1 if holds else 0
        return self.count


class Pick:
    """Spec 3.1: lifted off everything but the robot, or five steps of that in all."""

    def __init__(self, sim):
        self.start = sim.things[0].pose.p[2]
        self.lifted, self.held = False, Consecutive()
        self.stats = {"n_lift_significant": 0, "consec_grasp": False, "grasped": False}

    def __call__(self, sim) -> dict:
        thing, contacts, stats = sim.things[0], sim.contacts(), self.stats
        grasped = sim.agent.is_grasping(contacts, thing)
        steps = self.held(grasped)
        self.lifted &= grasped
        free = not touches_other(contacts, thing, sim.robot_entities)
        height = thing.pose.p[2] - self.start
        self.lifted |= free and height > LIFTED
        high = self.lifted and height > LIFTED_HIGH
        stats["n_lift_significant"] += int(high)
        stats["consec_grasp"] |= steps >= STEPS
        stats["grasped"] |= grasped
        return {
            "is_grasped": grasped,
            "consecutive_grasp": steps >= STEPS,
            "lifted_object": bool(self.lifted),
            "lifted_object_significantly": bool(high),
            "success": bool(self.lifted or stats["n_lift_significant"] >= STEPS),
            "episode_stats": dict(stats),
            "subgoals": {"object_grasped": stats["grasped"], "object_lifted": stats["n_lift_significant"] > 0},
        }


class _Moved:
    """Which object was moved since everything was at rest (spec 3.3, 3.6)."""

    def __init__(self, sim):
        setup = sim.setup
        self.source, self.target = setup.source, setup.target
        self.start = [np.array(thing.pose.p) for thing in sim.things]
        # A bounding box "turned" as a vector, signs and all (spec 3.3).
        self.boxes = [
            rotation_matrix(entity.pose.q) @ bbox_size(thing, setup.model_db)
            for entity, thing in zip(sim.things, setup.things)
        ]

    def moves(self, sim, source_position) -> dict:
        """moved_correct_obj, moved_wrong_obj; source_position (3,) m is what upstream takes for the source."""
        source = horizontal(source_position - self.start[self.source])
        others = [horizontal(thing.pose.p - at) for thing, at in zip(sim.things, self.start)]
        del others[self.source]
        correct = source > MOVED and all(other < source for other in others)
        wrong = any(other > MOVED for other in others) and any(other > source for other in others)
        return {"moved_correct_obj": bool(correct), "moved_wrong_obj": bool(wrong)}


class MoveNear(_Moved):
    """Spec 3.3: judged anew in every step."""

    def __init__(self, sim):
        super().__init__(sim)
        self.grasped = False

    def __call__(self, sim) -> dict:
        things, s, t = sim.things, self.source, self.target
        source, target = com_position(things[s]), com_position(things[t])
        sunk = {i: start[2] - thing.pose.p[2] for i, (thing, start) in enumerate(zip(things, self.start))}
        sunk[s], sunk[t] = self.start[s][2] - source[2], self.start[t][2] - target[2]
        keep = all(depth < (FALLEN_ACTED if i in (s, t) else FALLEN) for i, depth in sunk.items())
        reach = (horizontal(self.boxes[s]) + horizontal(self.boxes[t])) / 2 + NEAR
        distance = horizontal(source - target)
        others = [horizontal(source - thing.pose.p) for i, thing in enumerate(things) if i != s]
        stats = {
            "all_obj_keep_height": bool(keep),
            **self.moves(sim, things[s].pose.p),
            "near_tgt_obj": bool(distance < reach),
            "is_closest_to_tgt": all(distance < other + CLOSEST_MARGIN for other in others),
        }
        success = keep and stats["moved_correct_obj"] and stats["near_tgt_obj"] and stats["is_closest_to_tgt"]
        self.grasped |= sim.agent.is_grasping(sim.contacts(), things[s])
        moved = stats["moved_correct_obj"]
        subgoals = {"object_grasped": bool(self.grasped), "right_object_moved": moved, "near": stats["near_tgt_obj"]}
        return {**stats, "success": bool(success), "episode_stats": dict(stats), "subgoals": subgoals}


class Drawer:
    """Spec 3.4: how far the drawer is open now."""

    def __init__(self, sim):
        self.opening = sim.task.kind == "open"

    def __call__(self, sim) -> dict:
        qpos = sim.drawer_qpos()
        success = qpos >= OPEN_QPOS if self.opening else qpos <= CLOSED_QPOS
        return {
            "success": bool(success),
            "qpos": qpos,
            "episode_stats": {"qpos": f"{qpos:.3f}"},
            "subgoals": {"drawer_opened" if self.opening else "drawer_closed": bool(success)},
        }


class Place:
    """Spec 3.5: second subtask, drawer open, and the object has touched the bottom inside it at some time."""

    def __init__(self, sim):
        self.was_open, self.contact_steps, self.grasped = False, 0, False

    def __call__(self, sim) -> dict:
        qpos, contacts, thing = sim.drawer_qpos(), sim.contacts(), sim.things[0]
        self.was_open |= qpos >= OPEN_QPOS
        bottom = sim.drawer_link.collision_shapes[INTERIOR_BOTTOM]
        inside = [c for c in contacts if bottom in c.shapes]
        self.contact_steps += np.linalg.norm(contact_impulse(inside, thing, sim.drawer_link.entity)) > IMPULSE
        self.grasped |= sim.agent.is_grasping(contacts, thing)
        stats = {"qpos": qpos, "is_drawer_open": bool(self.was_open), "has_contact": int(self.contact_steps)}
        return {
            "success": bool(sim.subtask == 1 and qpos >= PLACED_QPOS and self.contact_steps >= 1),
            "qpos": qpos,
            "episode_stats": stats,
            "subgoals": {
                "drawer_opened": bool(self.was_open),
                "object_grasped": bool(self.grasped),
                "object_placed": bool(self.contact_steps >= 1),
            },
        }


class PutOnTop(_Moved):
    """Spec 3.6: the source's centre of mass over the target and little above it, judged anew in every step."""

    def __init__(self, sim):
        super().__init__(sim)
        self.held, self.rule = Consecutive(), PUT_ON[sim.task.put_on]
        self.latched = {"is_src_obj_grasped": False, "consecutive_grasp": False}

    def __call__(self, sim) -> dict:
        contacts, source, target = sim.contacts(), sim.things[self.source], sim.things[self.target]
        offset = com_position(source) - com_position(target)
        source_box, target_box = self.boxes[self.source], self.boxes[self.target]
        over = horizontal(offset) <= horizontal(target_box) / 2 + ON_TARGET_MARGIN
        above = offset[2] > 0 and offset[2] - target_box[2] / 2 - source_box[2] / 2 <= self.rule.height_margin
        on_target = over and above
        if on_target and self.rule.completely:
            on_target = not touches_other(contacts, source, {target, *sim.robot_entities})
        grasped = sim.agent.is_grasping(contacts, source)
        consecutive = self.held(grasped) >= STEPS
        self.latched["is_src_obj_grasped"] |= grasped
        self.latched["consecutive_grasp"] |= consecutive
        moved = self.moves(sim, com_position(source))
        now = {"is_src_obj_grasped": grasped, "consecutive_grasp": consecutive, "src_on_target": bool(on_target)}
        return {
            **moved,
            **now,
            "episode_stats": {**moved, **self.latched, "src_on_target": bool(on_target)},
            "success": bool(on_target),
            "subgoals": {"object_grasped": self.latched["is_src_obj_grasped"], "on_target": bool(on_target)},
        }


JUDGES = {"pick": Pick, "near": MoveNear, "open": Drawer, "close": Drawer, "place": Place, "put_on": PutOnTop}
