"""The controller of many environments against closed forms, SAPIEN's inverse kinematics and the single controller."""

import json
from pathlib import Path

import numpy as np
import pytest
import sapien
import torch
from scipy.linalg import expm
from scipy.spatial.transform import Rotation

from envs import google_robot
from envs.batched import (
    ARM_LIMITS,
    FINGER_LIMITS,
    BatchedController,
    inverse_kinematics,
    jerk_limited,
    joint_frames,
    log_and_derivative,
    read_chain,
    rotation_matrix,
    skew,
)

VECTORS = json.loads((Path(__file__).parent / "simpler_vectors.json").read_text())["controller"]  # made by upstream
FAR = {"robot_xy": (5.0, 0.0), "robot_yaw": 0.0}  # free space

# Two links of 0.5 m and 0.4 m in a plane, a fixed joint at the end, parts of the origins left to their defaults.
PLANAR = """<robot name="planar">
<link name="base"/> <link name="upper"/> <link name="lower"/> <link name="tip"/>
<joint name="first" type="revolute"> <parent link="base"/> <child link="upper"/> <axis xyz="0 0 1"/> </joint>
<joint name="second" type="revolute"> <parent link="upper"/> <child link="lower"/> <axis xyz="0 0 1"/>
  <origin xyz="0.5 0 0" rpy="0 0 0"/> </joint>
<joint name="end" type="TYPE"> <parent link="lower"/> <child link="tip"/> <origin xyz="0.4 0 0"/> </joint>
</robot>"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scene():
    from envs.simpler import SimplerEnv

    env = SimplerEnv("open_and_place", obs_mode="none")
    env.reset(seed=0, options=FAR)
    yield env
    env.close()


def planar(folder: Path, kind="fixed"):
    (folder / "planar.urdf").write_text(PLANAR.replace("TYPE", kind))
    return read_chain(folder / "planar.urdf", "tip")


def planar_pose(q: torch.Tensor) -> torch.Tensor:
    """Closed form of the planar arm's tip (B, 4, 4) at q (B, 2)."""
    first, second = q[:, 0], q.sum(1)
    pose = torch.eye(4, dtype=torch.float64).repeat(len(q), 1, 1)
    pose[:, :3, :3] = rotation_matrix(second[:, None] * torch.tensor([0.0, 0.0, 1.0]))
    pose[:, 0, 3] = 0.5 * first.cos() + 0.4 * second.cos()
    pose[:, 1, 3] = 0.5 * first.sin() + 0.4 * second.sin()
    return pose


# -- rigid motions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 0.0999, 0.1001, 1.0, 3.0, 3.1415])
def test_the_logarithm_undoes_the_exponential(angle):
    rng = np.random.default_rng(0)
    axis = rng.normal(size=3)
    w, v = angle * axis / np.linalg.norm(axis), rng.normal(size=3)

    def exponential(v, w):
        twist = np.zeros((4, 4))
        twist[:3, :3], twist[:3, 3] = skew(torch.from_numpy(w)).numpy(), v
        return torch.from_numpy(expm(twist))

    pose = exponential(v, w)
    np.testing.assert_allclose(rotation_matrix(torch.from_numpy(w)), Rotation.from_rotvec(w).as_matrix(), atol=1e-14)
    log, derivative = log_and_derivative(pose[None])
    np.testing.assert_allclose(log[0], [*v, *w], atol=1e-9)

    step, columns = 1e-5, []  # the frame moves by a small twist, the target stays
    for twist in step * np.eye(6):
        ahead = log_and_derivative(exponential(-twist[:3], -twist[3:]) @ pose)[0]
        behind = log_and_derivative(exponential(twist[:3], twist[3:]) @ pose)[0]
        columns.append((behind - ahead).numpy() / (2 * step))
    if angle < 3.14:  # the rotation vector jumps at pi
        np.testing.assert_allclose(derivative[0], np.stack(columns, 1), atol=2e-8)


# -- kinematics --------------------------------------------------------------------------------------------------------


def test_a_planar_arm_has_its_closed_form(tmp_path):
    chain, q = planar(tmp_path), torch.tensor([[0.0, 0.0], [0.3, 0.8], [-1.2, 2.5]], dtype=torch.float64)
    assert chain.names == ["first", "second"]
    np.testing.assert_allclose(joint_frames(chain, q)[:, -1] @ chain.tip, planar_pose(q), atol=1e-15)


def test_each_environment_finds_its_own_solution(tmp_path):
    chain = planar(tmp_path)
    start = torch.tensor([[0.3, 0.8], [0.3, 0.8], [-0.5, 1.0], [0.3, 0.8]], dtype=torch.float64)
    wanted = start + torch.tensor([[0.0, 0.0], [0.3, -0.4], [-0.6, 0.5], [0.1, 0.1]], dtype=torch.float64)
    tips = planar_pose(wanted)
    tips[3, 2, 3] = 0.1  # out of the plane
    solution, found = inverse_kinematics(chain, tips, start)
    assert found.tolist() == [True, True, True, False]
    torch.testing.assert_close(solution[0], start[0], rtol=0, atol=0)  # nothing to do
    torch.testing.assert_close(solution[:3], wanted[:3], rtol=0, atol=5e-4)  # the tolerance over the arm's length
    for i in range(3):
        alone, _ = inverse_kinematics(chain, tips[i : i + 1], start[i : i + 1])
        torch.testing.assert_close(alone[0], solution[i], rtol=0, atol=1e-12)


def test_unknown_joints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="joint 'end' is prismatic, neither revolute nor fixed"):
        planar(tmp_path, "prismatic")


def draw_targets(scene, count: int, spread: float, metres: float, radians: float):
    """Sensed qpos (N, 11) about the start posture and TCP targets about where they are, as SAPIEN's float32 poses."""
    rng, agent = np.random.default_rng(0), scene.agent
    qpos = agent.init_qpos().astype(np.float64) + spread * rng.normal(size=(count, 11))
    qpos = torch.from_numpy(qpos.astype(np.float32)).double()
    tcp = BatchedController(agent.urdf_path, agent.controller.names).tcp_pose(qpos).numpy()
    turned = Rotation.from_rotvec(radians * rng.normal(size=(count, 3))) * Rotation.from_matrix(tcp[:, :3, :3])
    positions = tcp[:, :3, 3] + metres * rng.normal(size=(count, 3))
    return qpos, [sapien.Pose(p, q) for p, q in zip(positions, turned.as_quat(scalar_first=True))]


def matrices(poses) -> torch.Tensor:
    """(N, 4, 4) float64 of SAPIEN poses."""
    out = torch.eye(4, dtype=torch.float64).repeat(len(poses), 1, 1)
    for matrix, pose in zip(out, poses):
        matrix[:3, 3] = torch.from_numpy(pose.p)
        matrix[:3, :3] = torch.from_numpy(Rotation.from_quat(pose.q.astype(float), scalar_first=True).as_matrix())
    return out


@pytest.mark.sim
@pytest.mark.parametrize(
    ("spread", "metres", "radians", "solvable", "sapien_rad", "urdf_rad"),
    [
        (0.02, 0.03, 0.1, 1.0, 1e-6, 1e-5),  # actions
        (0.1, 0.1, 0.5, 0.85, 1e-5, 1e-4),
        (0.1, 0.3, 1.0, 0.57, 1e-5, 1e-3),  # ways past singular postures, where rounding grows
    ],
)
def test_inverse_kinematics_is_sapiens(scene, tmp_path, spread, metres, radians, solvable, sapien_rad, urdf_rad):
    """The same targets are found, at the same joints, on the arm as SAPIEN rounds it to float32 and on the URDF's."""
    from sapien.wrapper.urdf_exporter import export_kinematic_chain_urdf

    agent, controller = scene.agent, scene.agent.controller
    rounded = tmp_path / "chain.urdf"
    rounded.write_text(export_kinematic_chain_urdf(agent.body, force_fix_root=True))
    qpos, poses = draw_targets(scene, 300, spread, metres, radians)
    reaching = [controller.names.index(name) for name in list(google_robot.ARM_GAINS)[:7]]
    expected, success = zip(*(controller.inverse_kinematics(pose, q.numpy()) for pose, q in zip(poses, qpos)))
    expected, success = np.array(expected)[:, reaching], np.array(success)
    assert abs(np.mean(success) - solvable) < 0.02  # the targets are as hard as they are meant to be
    chains = (read_chain(rounded, f"link_{controller.tcp.index}"), sapien_rad), (read_chain(agent.urdf_path), urdf_rad)
    for chain, tolerance in chains:
        solution, found = inverse_kinematics(chain, matrices(poses), qpos[:, reaching])
        assert found.tolist() == success.tolist()
        np.testing.assert_allclose(solution[success], expected[success], rtol=0, atol=tolerance)


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limits", "joints"), [(ARM_LIMITS, 9), (FINGER_LIMITS, 2)])
def test_plans_are_those_of_the_single_controller(limits, joints):
    rng, count = np.random.default_rng(0), 100
    start, velocity = rng.normal(size=(count, joints)), limits[0] * rng.uniform(-1, 1, size=(count, joints))
    velocity[:10] *= 2  # brakes first
    velocity[10:20] = 0
    target = start + rng.choice([0, 1e-6, 1e-3, 0.05, 1], size=(count, 1)) * rng.normal(size=(count, joints))
    target[20:30, 0] = start[20:30, 0]
    positions, speeds = jerk_limited(*map(torch.from_numpy, (start, velocity, target)), limits)
    assert positions.shape == speeds.shape == (count, joints, 172)
    for i in range(count):
        expected = google_robot.jerk_limited(start[i], velocity[i], target[i], *limits, 171)
        np.testing.assert_allclose(positions[i].T, expected[0], rtol=0, atol=1e-9)
        np.testing.assert_allclose(speeds[i].T, expected[1], rtol=0, atol=1e-9)


def test_a_short_move_is_four_equal_phases_of_jerk():
    """Rest to rest over a distance d too short to meet a limit: jerk +j, -j, -j, +j for (d / 2j)^(1/3) s each."""
    phase, j = 0.02, 50.0
    d = 2 * j * phase**3
    positions, speeds = jerk_limited(*torch.tensor([[[0.0]], [[0.0]], [[d]]], dtype=torch.float64), ARM_LIMITS)
    t = torch.arange(172) / 513
    rising = t < phase
    torch.testing.assert_close(positions[0, 0, rising], (j * t**3 / 6)[rising].double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(speeds[0, 0, rising], (j * t**2 / 2)[rising].double(), rtol=0, atol=1e-7)
    assert abs(speeds.max().item() - j * phase**2) < 1e-4  # met between two physics steps
    ended = t > 4 * phase
    torch.testing.assert_close(positions[0, 0, ended], torch.full((ended.sum(),), d).double(), rtol=0, atol=1e-9)
    assert speeds[0, 0, ended].abs().max() < 1e-9


# -- the controller ----------------------------------------------------------------------------------------------------


def episode(scene, actions, restart=None):
    """What the single controller senses and commands in a simulation, reset before action `restart` too.

    Returns: qpos, qvel (T, 11), arm (T, 172, 9), fingers, finger speed (T, 172, 2), success (T,).
    """
    c, rows = scene.agent.controller, []
    for step, action in enumerate(actions):
        if step in (0, restart):
            scene.reset(seed=0, options=FAR)
        qpos, qvel = scene.agent.body.qpos.copy(), scene.agent.body.qvel.copy()
        scene.step(action)
        rows.append((qpos, qvel, c.arm_path, c.finger_path, c.finger_speed, c.ik_success))
    return [torch.from_numpy(np.array(column)) for column in zip(*rows)]


@pytest.mark.sim
def test_many_environments_get_the_targets_of_single_ones(scene):
    environments, steps, restart = 8, 20, 11
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(environments, steps, 7)) * [*[0.03] * 3, *[0.1] * 3, 0.0]
    actions[..., 6] = rng.choice([-1, -0.3, -5e-4, 0, 5e-4, 0.4, 1, 2], size=(environments, steps))
    actions[1, :6, 6] = 1  # closes all the way, then keeps its target
    actions[1, 6:12, 6] = 0
    actions[2, 5:9, :3] += [0.3, 0, 0]  # out of reach
    actions[3] = 0
    restarted = torch.tensor([i % 2 == 0 for i in range(environments)])
    episodes = [episode(scene, a, restart if r else None) for a, r in zip(actions, restarted)]
    qpos, qvel, arm, fingers, speed, success = (torch.stack(column, 1) for column in zip(*episodes))  # (T, B, ...)
    assert not success.all() and success.float().mean() > 0.8
    assert fingers.max() == google_robot.FINGER_CLOSED

    batched = BatchedController(scene.agent.urdf_path, scene.agent.controller.names)
    for step in range(steps):
        if step == 0:
            batched.reset(qpos[step])
        if step == restart:
            batched.reset(qpos[step], mask=restarted)
        targets = batched.set_action(qpos[step], qvel[step], torch.from_numpy(actions[:, step]))
        assert targets.ik_success.tolist() == success[step].tolist()
        for ours, theirs in ((targets.arm, arm), (targets.fingers, fingers), (targets.finger_speed, speed)):
            np.testing.assert_allclose(ours, theirs[step], rtol=0, atol=1e-4, err_msg=f"step {step}")


@pytest.mark.sim
def test_its_targets_move_the_joints_as_upstream_does(scene, monkeypatch):
    controller, trajectory = scene.agent.controller, VECTORS["trajectory"]
    scene.reset(seed=0, options=FAR)
    batched = BatchedController(scene.agent.urdf_path, controller.names)
    sensed = torch.from_numpy(scene.agent.body.qpos)[None]
    batched.reset(sensed)
    np.testing.assert_allclose(batched.tcp_pose(sensed)[0, :3, 3], trajectory[0]["tcp_p"], atol=2e-6)

    def set_action(action):
        qpos, qvel = (torch.from_numpy(x)[None] for x in (scene.agent.body.qpos, scene.agent.body.qvel))
        targets = batched.set_action(qpos, qvel, torch.as_tensor(action)[None])
        controller.arm_path, controller.finger_path = targets.arm[0].numpy(), targets.fingers[0].numpy()
        controller.finger_speed, controller.substep = targets.finger_speed[0].numpy(), 0

    monkeypatch.setattr(controller, "set_action", set_action)
    order = [controller.names.index(name) for name in VECTORS["qpos_order"]]
    arm = [i for i, name in enumerate(VECTORS["qpos_order"]) if "finger" not in name]
    for row in trajectory[1:]:
        scene.step(np.array(row["action"]))
        qpos = scene.agent.body.qpos[order]
        np.testing.assert_allclose(qpos[arm], np.array(row["qpos"])[arm], atol=2e-3, err_msg=f"step {row['step']}")
        np.testing.assert_allclose(controller.tcp_pose().p, row["tcp_p"], atol=1e-3, err_msg=f"step {row['step']}")
