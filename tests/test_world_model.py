"""The judge, the environment inside the model, and choosing among its futures."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from experiments import rank_policies
from policies import judge as judging
from policies.chunking import ChunkedPolicy
from policies.flow_policy import FlowPolicy
from policies.judge import Judge, Seen, best_threshold, orthonormal
from policies.planning import BestOfN
from policies.world_model import WorldModelEnv
from selfflow_robot.config import CollectConfig
from selfflow_robot.data import open_dataset
from selfflow_robot.probe import regress
from selfflow_robot.tokens import Layout
from tests.synthetic import make_batch, make_model, make_packer, save_run, write_dataset

LAYOUT = Layout(past=(0,), future=(2, 3), horizon=3, text_bytes=16, height=32, width=48)


def make_policy(layout=LAYOUT, steps=2):
    packer = make_packer(layout)
    packer.codec.fit([make_batch(layout=layout)["video"]])
    return FlowPolicy(make_model(packer), packer, steps=steps, temperature=1.0)


@pytest.fixture(scope="module")
def policy():
    return make_policy()


def constant(value, width=1):
    """A regression that always says `value`, and knows no width of its input."""
    return lambda x: np.full((len(x), width), float(value))


def make_judge(**changes):
    body = lambda x: np.tile(np.arange(10.0), (len(x), 1))  # noqa: E731
    parts = dict(body=body, remaining=constant(7), done=constant(0), threshold=0.5, drawer=constant(0.1))
    return Judge(**parts | changes)


def observation(seed=0, instruction="open"):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    return {"images": {"overhead": image}, "proprio": np.zeros(10, np.float32), "instruction": instruction}


# --------------------------------------------------------------------------------------------------------- the judge


def test_the_linger_of_demonstrations_is_known_here():
    assert CollectConfig.linger == judging.LINGER == 8  # as its help and docs/training.md say


def test_a_regression_finds_a_linear_map_and_repeats_it():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(200, 5)), rng.normal(size=(5, 2))
    found = regress(x, x @ weights + 3, np.arange(200) // 10)
    other = rng.normal(size=(20, 5))
    np.testing.assert_allclose(found(other), other @ weights + 3, atol=1e-3)


def test_threshold_separates_the_classes():
    scores, labels = np.array([0.0, 0.1, 0.2, 0.3, 0.8]), np.array([False, False, False, True, True])
    assert best_threshold(scores, labels) == pytest.approx(0.25)
    assert best_threshold(scores, np.zeros(5, bool)) == 0.5
    scores, labels = np.array([0.0, 1.0, 0.4, 0.6]), np.array([False, True, True, False])
    assert ((scores > best_threshold(scores, labels)) == labels).mean() == 0.75


def test_rotations_are_made_orthonormal():
    rng = np.random.default_rng(0)
    columns = orthonormal(rng.normal(size=(6, 6)))
    a, b = columns[:, :3], columns[:, 3:]
    np.testing.assert_allclose((a * b).sum(1), 0, atol=1e-12)
    np.testing.assert_allclose([(a * a).sum(1), (b * b).sum(1)], 1, atol=1e-12)
    np.testing.assert_allclose(orthonormal(columns), columns, atol=1e-12)


def seen(count=60, rng=None):
    """Frames whose features say everything: feature 0 the drawer, 1 the steps left, 2..11 the proprioception."""
    rng = rng or np.random.default_rng(0)
    x = rng.normal(size=(count, 12))
    x[:, 1] = rng.integers(0, 4, count)
    felt = x[:, 2:]
    done = x[:, 1:2] == 0
    executed = rng.normal(size=(count, 3, 7))
    return Seen(x, felt, executed, felt, x[:, 1:2], done.astype(float), x[:, :1], np.arange(count) // 6)


def test_judges_what_it_was_fitted_to_see():
    judge = judging.fit([seen(), seen()])
    errors = judging.errors(judge, seen(30, np.random.default_rng(1)))
    assert errors["drawer_mm"] < 1 and errors["remaining_steps"] < 1e-3
    assert errors["done_balanced_accuracy"] > 0.9


def test_the_past_is_believed_less_than_the_picture():
    """Proprioception that has drifted a little is corrected by the frame."""
    parts = seen(400)
    judge = judging.fit([parts])
    drifted = parts.proprio + 0.05
    felt = judge.body(judging.body_inputs(parts.features, drifted, parts.executed))
    assert np.abs(felt - parts.felt).mean() < 0.01


def test_watches_the_frame_its_actions_lead_to(policy, tmp_path):
    dataset = open_dataset(write_dataset(tmp_path / "data"))
    real = judging.watch(policy, dataset, "train", 1000, imagined=False)
    jump = LAYOUT.future[-1]
    starts = [e.start for e in dataset.split("train")]
    assert len(real.features) == len(starts) * (12 - jump) and set(real.episode) == set(starts)
    first = np.flatnonzero(real.episode == starts[0])
    assert np.array_equal(real.felt[first], dataset.proprio[starts[0] + jump : starts[0] + 12])
    assert np.array_equal(real.executed[first[0]], dataset.executed[starts[0] : starts[0] + 3])
    frame = dataset.frames[starts[0] + jump][None]
    np.testing.assert_allclose(real.features[first[0]], judging.picture_features(policy, frame)[0], atol=1e-5)
    assert real.remaining[first, 0].tolist() == [max(11 - judging.LINGER - t, 0) for t in range(jump, 12)]
    assert real.drawer is None
    imagined = judging.watch(policy, dataset, "train", 1000, imagined=True)
    assert not np.allclose(imagined.features, real.features) and np.array_equal(imagined.felt, real.felt)


def test_a_judge_is_kept_beside_its_run(tmp_path):
    save_run(tmp_path / "run", LAYOUT)
    loaded = FlowPolicy.load(tmp_path / "run")
    with pytest.raises(ValueError, match=r"no judge. Make it: python experiments/judge.py --checkpoint"):
        judging.load(tmp_path / "run", loaded)
    judge = judging.fit([seen()])
    judging.save(judge, tmp_path / "run", {"checkpoint_hash": loaded.manifest["sha256"]})
    again = judging.load(tmp_path / "run", loaded)
    x = seen(5).features
    assert again.threshold == judge.threshold
    assert all(np.array_equal(again.look(x)[name], value) for name, value in judge.look(x).items())
    tensors_file = tmp_path / "run" / "judge.safetensors"
    whole = tensors_file.read_bytes()
    tensors_file.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="truncated or altered"):
        judging.load(tmp_path / "run", loaded)
    judging.save(judge, tmp_path / "run", {"checkpoint_hash": "another"})
    with pytest.raises(ValueError, match="another state of this run"):
        judging.load(tmp_path / "run", loaded)
    (tmp_path / "run" / "judge.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        judging.load(tmp_path / "run", loaded)


# --------------------------------------------------------------------------------------------------- the environment


def roll(env, policy, seed=0):
    observation_, _ = env.reset(seed=seed)
    policy.reset(observation_["instruction"])
    frames, truncated = [observation_["images"]["overhead"]], False
    while not truncated:
        observation_, _, _, truncated, info = env.step(policy.act(observation_))
        frames.append(observation_["images"]["overhead"])
    return np.array(frames), observation_, info


def test_frames_are_those_the_world_model_predicts(policy):
    env = WorldModelEnv(policy, make_judge(), [observation(1)], max_steps=6)
    start, info = env.reset(seed=0)
    assert np.array_equal(start["images"]["overhead"], observation(1)["images"]["overhead"]) and info["fresh"]
    actions = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    results = [env.step(action) for action in actions]
    fresh = [result[4]["fresh"] for result in results]
    assert fresh == [False, False, True]
    for held, *_ in results[:2]:  # between, the picture stands still
        assert np.array_equal(held["images"]["overhead"], start["images"]["overhead"])
    from selfflow_robot.flow import generator

    batch = {
        "video": torch.from_numpy(start["images"]["overhead"])[None, None],
        "proprio": torch.zeros(1, 10),
        "instruction": ["open"],
        "executed": torch.from_numpy(actions)[None],
    }
    expected = policy.predict_video(batch, generator(0, 3))[0]
    observed, reward, terminated, truncated, info = results[2]
    assert np.array_equal(observed["images"]["overhead"], expected[-1])
    assert np.array_equal(info["frames"], expected)
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert observed["proprio"][:3].tolist() == [0, 1, 2] and observed["proprio"][9] == 1  # the judge's, made valid
    assert env.observation_space.contains(observed)


def test_episodes_repeat_and_start_where_they_are_told(policy):
    env = WorldModelEnv(policy, make_judge(), [observation(1), observation(2)], max_steps=7)
    actor = ChunkedPolicy(policy, execute=3)
    first, _, _ = roll(env, actor)
    again, _, _ = roll(env, actor)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, roll(env, actor, seed=1)[0])
    told, _ = env.reset(seed=0, options={"start": observation(5)})
    assert np.array_equal(told["images"]["overhead"], observation(5)["images"]["overhead"])


def test_the_judge_decides_and_instructions_change(policy):
    env = WorldModelEnv(policy, make_judge(done=constant(1), drawer=constant(0.2)), [observation(1)], 6, {4: "place"})
    observation_, info = env.reset(seed=0)
    assert info["success"] and info["drawer_opened"] and info["remaining"] == 7
    said = [observation_["instruction"]]
    for _ in range(6):
        observation_, reward, _, truncated, _ = env.step(np.zeros(7, np.float32))
        said.append(observation_["instruction"])
    assert said == ["open"] * 4 + ["place"] * 3 and truncated and reward == 1


def test_it_is_a_gymnasium_environment(policy):
    env = WorldModelEnv(policy, make_judge(), [observation(1)], max_steps=4)
    assert isinstance(env, gym.Env) and isinstance(env.action_space, gym.spaces.Box)
    env.reset(seed=0)
    assert env.render().shape == (32, 48, 3)
    with pytest.raises(ValueError, match="finite"):
        env.step(np.full(7, np.nan))
    with pytest.raises(ValueError, match="a start is needed"):
        WorldModelEnv(policy, make_judge()).reset(seed=0)
    with pytest.raises(ValueError, match=r"expects uint8 \(32, 48, 3\)"):
        wrong = observation(1) | {"images": {"overhead": np.zeros((8, 8, 3), np.uint8)}}
        env.reset(options={"start": wrong})
    with pytest.raises(ValueError, match=r"this checkpoint has past \[-1, 0\]"):
        WorldModelEnv(
            make_policy(Layout(past=(-1, 0), future=(3,), horizon=3, text_bytes=16, height=32, width=48)), None
        )


# --------------------------------------------------------------------------------------------------------- planning


def test_one_sample_is_the_plain_policy(policy):
    history = [observation(3)]
    plain, best = policy.plan(history, (0, 4)), BestOfN(policy, make_judge(), samples=1).plan(history, (0, 4))
    assert np.array_equal(plain.actions, best.actions)
    with pytest.raises(ValueError, match="samples"):
        BestOfN(policy, make_judge(), samples=0)
    with pytest.raises(ValueError, match="4 samples without noise are all the same"):
        BestOfN(FlowPolicy(policy.model, policy.packer), make_judge(), samples=4)


def test_the_chunk_with_the_best_future_is_taken(policy, monkeypatch):
    planner, history = BestOfN(policy, make_judge(), samples=4), [observation(3)]
    chunks = []

    def remaining(history, plans, key):
        chunks[:] = plans
        return np.array([5.0, 3.0, 1.0, 2.0])

    monkeypatch.setattr(planner, "remaining", remaining)
    best = planner.plan(history, (0, 4))
    assert np.array_equal(best.actions, chunks[2])
    assert np.array_equal(chunks[0], policy.plan(history, (0, 4)).actions)
    assert len({chunk.tobytes() for chunk in chunks}) == 4  # four draws


def test_futures_differ_by_their_actions_alone(policy):
    judge = make_judge(remaining=lambda x: x.sum(1, keepdims=True))
    planner, history = BestOfN(policy, judge, samples=4), [observation(3)]
    chunk = policy.plan(history, (0, 4)).actions
    same = planner.remaining(history, [chunk, chunk], (0, 4))
    different = planner.remaining(history, [chunk, chunk + 1], (0, 4))
    assert same[0] == pytest.approx(same[1]) and different[0] != pytest.approx(different[1])


# ------------------------------------------------------------------------------------------------------------ ranking


def test_rank_agreement():
    real = np.array([[1] * 8 + [0] * 2, [1] * 5 + [0] * 5, [0] * 10], bool)
    same = rank_policies.agreement(real, real)
    assert same["mmrv"]["value"] == 0 and same["pearson"]["value"] == pytest.approx(1)
    assert same["simulator"] == [8, 5, 0] and same["mmrv"]["high"] == 0
    turned = rank_policies.agreement(real, real[::-1])
    assert turned["mmrv"]["value"] > 0.5 and turned["pearson"]["value"] < 0
    png = rank_policies.picture({"success": same}, ["runs/a", "runs/b", "runs/c"])
    assert png.startswith(b"\x89PNG")


def test_an_imagined_episode_is_recorded(policy):
    env = WorldModelEnv(policy, make_judge(drawer=constant(0.3)), max_steps=6)
    outcome, frames = rank_policies.imagine_episode(env, ChunkedPolicy(policy, execute=3), 0, observation(1))
    assert outcome == {"success": False, "drawer_opened": True}
    assert frames.shape == (1 + 2 * 2, 32, 48, 3)


def test_one_policy_is_no_ranking(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rank_policies.py", "--world", "w", "--policies", "one"])
    with pytest.raises(SystemExit):
        rank_policies.main()
    assert "at least two" in capsys.readouterr().err
