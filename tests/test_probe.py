"""Probes: the regression against closed forms, planted and random targets, intervals, splits, features, the script."""

import json

import numpy as np
import pytest
import torch

from experiments.collect_demos import record
from experiments.pretrain import pretrain
from experiments.probe import (
    best_layer,
    choose_frames,
    differences,
    mean_interval,
    probe_runs,
    require_distinct,
    settings,
    summarise,
    variants,
)
from selfflow_robot import model as models
from selfflow_robot import probe
from selfflow_robot.config import CollectConfig, PretrainConfig, ProbeConfig, overrides
from selfflow_robot.data import finalize, open_dataset, write_episode
from selfflow_robot.interfaces import ENVIRONMENT_NAMES
from selfflow_robot.probe import Score, Target, bootstrap, layer_tokens, per_episode, ridge
from tests.fakes import LineEnv, LineExpert
from tests.synthetic import SMALL, make_batch, make_model, make_packer, write_dataset

EPISODES, LENGTH = 40, 12


def write_probed(root, episodes=8, length=12, environment=True, first=0):
    """A square (the object) and a bar (the tool) moving on their own; the drawer opens while the second task lasts."""
    for seed in range(first, first + episodes):
        rng = np.random.default_rng(seed)
        start, end = rng.uniform(0, 1, (2, 2, 2))  # of object and tool
        way = np.linspace(0, 1, length)[:, None, None]
        place = start * (1 - way) + end * way  # (T, 2, 2) in [0, 1]
        frames = np.full((length, 32, 48, 3), 60, np.uint8)
        for t, ((y, x), (row, col)) in enumerate((place * [24, 40]).astype(int)):
            frames[t, y : y + 8, x : x + 8] = (220, 60, 40)
            frames[t, row : row + 8, col : col + 3] = (40, 90, 230)
        proprio = np.zeros((length, 10), np.float32)
        proprio[:, :2], proprio[:, 9] = place[:, 1], place[:, 1, 1] > 0.5
        second = np.arange(length) >= length // 2
        state = np.zeros((length, len(ENVIRONMENT_NAMES)), np.float32)
        state[:, :2], state[:, 3], state[:, 4:] = place[:, 0], 0.2 * place[:, 0, 0], 1
        action = np.zeros((length, 7), np.float32)
        action[:, :3] = rng.normal(size=3)
        instructions = [("open", "place")[i] for i in second.astype(int)]
        extra = {"environment": state} if environment else {}
        write_episode(root, seed, frames, proprio, action, action, instructions, True, **extra)
    finalize(root)
    return root


# --------------------------------------------------------------------------------------------------------- regression


def test_ridge_is_the_augmented_least_squares():
    """(x; sqrt(F penalty) 1) w = (y; 0), solved by LAPACK: also with fewer frames than features."""
    from scipy.linalg import lstsq

    rng = np.random.default_rng(0)
    for frames, width in ((50, 7), (6, 9)):
        x, y = rng.normal(size=(frames, width)), rng.normal(size=(frames, 3))
        penalties = np.array([1e-3, 0.1, 10.0])
        for penalty, w in zip(penalties, ridge(x, y, penalties)):
            rows = np.concatenate([x, np.sqrt(frames * penalty) * np.eye(width)])
            expected = lstsq(rows, np.concatenate([y, np.zeros((width, 3))]))[0]
            np.testing.assert_allclose(w, expected, rtol=1e-8, atol=1e-10)


def test_without_penalty_it_is_least_squares_and_features_may_have_any_scale():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 4)) * [1e-3, 1, 50, 0] + [0, 7, -3, 2]  # one that never varies
    y = x @ rng.normal(size=(4, 2)) + 5
    np.testing.assert_allclose(probe.predictions(x, y, x, np.array([1e-12]))[0], y, atol=1e-6)
    np.testing.assert_allclose(probe.predictions(x, y, x, np.array([1e12]))[0], np.tile(y.mean(0), (60, 1)), atol=1e-6)


@pytest.fixture
def planted():
    """Features that hold a position and a class, beside noise; and targets they know nothing of."""
    rng = np.random.default_rng(2)
    episode = np.repeat(np.arange(EPISODES), LENGTH)
    frames = len(episode)
    x = rng.normal(size=(frames, 30)) + rng.normal(size=(EPISODES, 30))[episode]  # neighbours are alike
    here = np.ones(frames, bool)
    side = x[:, 0] + x[:, 1] > 0
    targets = [
        Target("known", 0.1 * x @ rng.normal(size=(30, 3)), here),
        Target("unknown", rng.normal(size=(frames, 3)), here),
        Target("side", np.eye(2)[side.astype(int)], here, ("left", "right")),
        Target("coin", np.eye(2)[rng.integers(0, 2, frames)], here, ("heads", "tails")),
    ]
    return x, targets, episode, episode % 4 == 0


def test_what_is_there_is_found_and_what_is_not_is_not(planted):
    scores = probe.probe(*planted)
    assert scores["known"].value > 0.999 and scores["known"].error_mm < 5 and scores["known"].interval[0] > 0.999
    assert scores["unknown"].interval[0] <= 0 <= scores["unknown"].interval[1]
    assert scores["side"].value > 0.9
    assert scores["coin"].interval[0] < scores["coin"].chance == 0.5 < scores["coin"].interval[1]
    assert scores["known"].penalty < scores["unknown"].penalty
    assert scores["known"].validated > 0.99 > 0.05 > scores["unknown"].validated


def test_chance_is_seldom_taken_for_knowledge(planted):
    x, _, episode, test = planted
    covered = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=(len(x), 3)) + rng.normal(size=(EPISODES, 3))[episode]
        unknown = probe.probe(x, [Target("unknown", values, np.ones(len(x), bool))], episode, test)["unknown"]
        covered += unknown.interval[0] <= 1e-9 and unknown.interval[1] >= -1e-9
        assert abs(unknown.value) < 0.05
    assert covered >= 16


def test_the_mean_scores_exactly_zero_and_errors_are_distances():
    values = np.random.default_rng(0).normal(size=(20, 3))
    fit = np.arange(20) < 10
    mean = Target("mean", values, np.ones(20, bool))
    result = probe.score(mean, np.tile(values[fit].mean(0), (10, 1)), fit, ~fit, np.arange(10) // 2)
    assert result.value == 0 and result.interval == (0, 0)
    off = probe.score(mean, values[~fit] + [0.003, 0.004, 0], fit, ~fit, np.arange(10) // 2)
    assert off.error_mm == pytest.approx(5) and off.error_interval == pytest.approx((5, 5))


def test_balanced_accuracy_by_hand():
    true = np.eye(3)[[0, 0, 0, 0, 1, 1]]  # the third class does not occur
    predicted = np.eye(3)[[0, 0, 0, 1, 1, 2]]
    target = Target("x", np.concatenate([true, true]), np.ones(12, bool), ("a", "b", "c"))
    held = np.arange(12) < 6
    result = probe.score(target, predicted, ~held, held, np.zeros(6, int))
    assert result.value == pytest.approx((3 / 4 + 1 / 2) / 2) and result.chance == 0.5
    assert np.isnan(result.interval).all()  # one episode says nothing about others


def test_a_target_absent_from_some_frames_is_fitted_on_the_others(planted):
    x, targets, episode, test = planted
    present = episode % 3 > 0
    spoiled = np.where(present[:, None], targets[0].values, 1e6)
    scores = probe.probe(x, [Target("object", spoiled, present), targets[0]], episode, test)
    assert scores["object"].value > 0.999 and scores["known"].value > 0.999


def test_episodes_are_never_on_both_sides(planted):
    x, targets, episode, test = planted
    test = test.copy()
    test[1] = False
    with pytest.raises(ValueError, match=r"episodes \[0\] are both fitted and tested on"):
        probe.probe(x, targets, episode, test)


def test_cross_validation_leaves_out_whole_episodes():
    """Features that name the episode predict its constant on its own frames only: no use, so the penalty is largest."""
    episode = np.repeat(np.arange(8), 10)
    constant = np.random.default_rng(0).normal(size=(8, 1))[episode]
    errors, spread = probe.cross_validate(np.eye(8)[episode], constant, episode, probe.PENALTIES)
    assert errors[0] >= 0.999 * errors[-1] and errors.min() > 0.9 * spread


def test_intervals_cover():
    """R^2 = 1 - 0.5 by construction; effects shared within episodes, as in videos: 95 % intervals hold it about as
    often."""
    covered, repeats, episode = 0, 200, np.repeat(np.arange(30), 8)
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        signal, noise = (
            np.sqrt(0.5) * (rng.normal(size=(30, 1))[episode] + rng.normal(size=(240, 1))) for _ in range(2)
        )
        sums = per_episode(np.concatenate([noise**2, (signal + noise) ** 2], 1), episode)
        low, high = bootstrap(sums, lambda s: 1 - s[..., 0] / s[..., 1])[1]
        covered += low <= 0.5 <= high
    assert 0.88 < covered / repeats < 0.99


# ----------------------------------------------------------------------------------------------------------- features


@pytest.fixture(scope="module")
def network():
    packer = make_packer()
    packer.codec.fit([make_batch(8)["video"]])
    return make_model(packer), packer


def test_generated_features_are_the_models_own_to_the_bit(network):
    model, packer = network
    video = make_batch(3)["video"][:, :2]
    kept = layer_tokens(model, packer, video, given=False, level=0.4, keys=[5, 6, 7])
    assert list(kept) == [0, 1, 2, 3, 4]
    frames = 2 * 2 * 3  # past frames of 2 x 3 patches
    tokens = packer.pack({"video": video}, "pretrain_all")  # with future frames, which are cut off here
    tokens = tokens.__class__(
        tokens.x[:, :frames], tokens.ids[:frames], tokens.weight[:, :frames],
        (tokens.spans[0].__class__("video", "generated", 0, frames),), None, None,
    )  # fmt: skip
    z, t = probe.noised(tokens.x, 0.4, [5, 6, 7])
    assert (t == 0.4).all()
    with torch.no_grad():
        own = {layer: model.features(z, t, tokens, layer) for layer in (1, 2, 3, 4)}
    for layer, expected in own.items():
        assert torch.equal(kept[layer], expected[:, -6:].unflatten(1, (2, 3)))


def test_given_features_are_what_the_next_block_reads(network):
    """Keys and values of block k + 1 come from the features after block k."""
    model, packer = network
    video = make_batch(3)["video"][:, :2]
    kept = layer_tokens(model, packer, video)
    assert list(kept) == [0, 1, 2, 3] and kept[2].shape == (3, 2, 3, SMALL.width)
    inputs = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, args, i=i: inputs.update({i: args[0]}))
        for i, block in enumerate(model.blocks)
    ]
    tokens = packer.pack(make_batch(3), "pretrain")
    with torch.no_grad():
        model.prefix_cache(tokens.x, torch.zeros_like(tokens.x[..., 0]), tokens)
    for hook in hooks:
        hook.remove()
    for layer in (0, 1, 2):
        assert torch.equal(kept[layer], inputs[layer][:, -6:].unflatten(1, (2, 3)))
    assert not model.blocks[0]._forward_hooks and not model.blocks[0]._forward_pre_hooks  # left as it was


def test_noise_depends_on_the_frame_alone_and_level_zero_is_clean():
    x = torch.randn(3, 4, 5)
    z, _ = probe.noised(x, 0.7, [1, 2, 1])
    again, _ = probe.noised(x[1:2], 0.7, [2])
    assert torch.equal(z[1:2], again)
    assert torch.allclose(z[0] - 0.3 * x[0], z[2] - 0.3 * x[2], atol=1e-6)
    assert not torch.allclose(z[0] - 0.3 * x[0], z[1] - 0.3 * x[1])
    assert torch.equal(probe.noised(x, 0.0, [1, 2, 3])[0], x)


def test_an_untrained_networks_blocks_are_the_identity():
    packer = make_packer()
    kept = layer_tokens(make_model(packer, zero=True), packer, make_batch(2)["video"][:, :2])
    assert all(torch.equal(kept[0], x) for x in kept.values())


def test_pooling():
    x = torch.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    torch.testing.assert_close(probe.pool(x, (1, 1)), x.mean((1, 2)))
    torch.testing.assert_close(probe.pool(x, (4, 6)).reshape(2, 3, 4, 6), x.permute(0, 3, 1, 2))


# ------------------------------------------------------------------------------------------------------------ targets


def test_targets_of_a_data_set(tmp_path):
    dataset = open_dataset(write_probed(tmp_path / "set"))
    frames = np.arange(0, dataset.num_frames, 3)
    targets, absent = probe.make_targets(dataset, frames)
    by_name = {target.name: target for target in targets}
    assert list(by_name) == ["tcp_position", "gripper", "object_position", "drawer", "subtask"] and not absent
    np.testing.assert_array_equal(by_name["object_position"].values, dataset.environment[frames, :3])
    np.testing.assert_array_equal(by_name["subtask"].values.argmax(1), (frames % 12) >= 6)
    np.testing.assert_array_equal(by_name["gripper"].values[:, 1], dataset.proprio[frames, 9])
    _, same = probe.varying([Target("still", np.ones((9, 1)), np.ones(9, bool))], np.arange(9) < 3)
    assert same == ["still: the same in all frames fitted or tested on"]


def test_old_data_sets_are_probed_without_what_they_lack(tmp_path):
    dataset = open_dataset(write_probed(tmp_path / "old", environment=False))
    targets, absent = probe.make_targets(dataset, np.arange(9))
    assert [t.name for t in targets] == ["tcp_position", "gripper", "subtask"]
    assert len(absent) == 1 and "object_position, drawer" in absent[0] and "collect it again" in absent[0]


def test_the_environment_state_is_kept_when_all_episodes_have_it(tmp_path):
    root = write_probed(tmp_path / "set", episodes=3)
    info = json.loads((root / "meta/info.json").read_text())
    assert info["features"]["environment_state"]["names"] == list(ENVIRONMENT_NAMES)
    whole = open_dataset(root)
    assert whole.environment.shape == (36, 6)
    write_probed(root, episodes=1, environment=False, first=3)  # as collection by an older version would
    mixed = open_dataset(root)
    assert mixed.environment is None and mixed.num_frames == 48
    np.testing.assert_array_equal(mixed.proprio[:36], whole.proprio)
    assert "environment_state" not in json.loads((root / "meta/info.json").read_text())["features"]
    with pytest.raises(ValueError, match=r"environment_state: expected \(2, 6\), got \(2, 5\)"):
        frames = np.zeros((2, 32, 48, 3), np.uint8)
        vectors = np.zeros((2, 10)), np.zeros((2, 7)), np.zeros((2, 7))
        write_episode(root, 9, frames, *vectors, ["a", "b"], True, environment=np.zeros((2, 5)))


class KnowingEnv(LineEnv):
    def environment_state(self):
        return np.array([self.x, 0, 0, 0.1 * self.steps, 1, 1], np.float32)


def test_collection_records_what_was_before_each_action(tmp_path):
    cfg = CollectConfig(disturbance=0.0)
    for seed, env in ((1, KnowingEnv(width=32, height=16)), (2, KnowingEnv(width=32, height=16))):
        record(env, LineExpert, None, cfg, str(tmp_path / "set"), False, seed)
    finalize(tmp_path / "set")
    dataset = open_dataset(tmp_path / "set")
    np.testing.assert_array_equal(dataset.environment[:, 0], dataset.proprio[:, 0])
    first = dataset.episodes[0].length
    np.testing.assert_allclose(dataset.environment[:first, 3], 0.1 * np.arange(first), rtol=1e-6)


@pytest.mark.sim
def test_the_state_of_the_real_scene():
    from envs import make_env

    env = make_env("open_and_place", obs_mode="none")
    observation, _ = env.reset(seed=3)
    state = env.unwrapped.environment_state()
    assert state.dtype == np.float32 and state[4:].tolist() == [1, 1] and state[3] == pytest.approx(0, abs=1e-3)
    base = env.unwrapped.agent.body.root_pose.to_transformation_matrix()
    np.testing.assert_allclose(base[:3, :3] @ state[:3] + base[:3, 3], env.unwrapped.object.pose.p, atol=1e-5)
    assert np.linalg.norm(state[:3] - observation["proprio"][:3]) < 1.0  # the same frame, within reach
    assert len(state) == len(ENVIRONMENT_NAMES)
    env.close()


# ------------------------------------------------------------------------------------------------------------- script


def test_split_by_episodes(tmp_path):
    dataset = open_dataset(write_probed(tmp_path / "set", episodes=9))
    for share, count in ((0.0, 1), (1 / 3, 3)):
        frames, episode, test = choose_frames(dataset, ProbeConfig(frames=4, test_share=share, data="x"))
        assert len(np.unique(frames)) == len(frames) == 9 * 4
        assert not set(episode[test]) & set(episode[~test]) and len(set(episode[test])) == count
        assert (episode <= frames).all() and (frames < episode + 12).all()
    held = {e.start for e in dataset.split("validation")}
    frames, episode, test = choose_frames(dataset, ProbeConfig(frames=4, data="x"))
    assert set(episode[test]) == held
    frames, episode, test = choose_frames(dataset, ProbeConfig(frames=99, episodes=2, data="x"))
    assert len(set(episode[~test])) == 2 and (~test).sum() == 24
    with pytest.raises(ValueError, match="frames >= 1"):
        choose_frames(dataset, ProbeConfig(frames=0))


def test_several_values_on_the_command_line():
    assert overrides(ProbeConfig, ["--runs", "runs/a", "b c", "--grid", "4", "5", "name=x"]) == [
        "runs=['runs/a','b c']",
        "grid=[4,5]",
        "name=x",
    ]
    assert overrides(ProbeConfig, ["--runs", "[a,b]", "--level", "0.5"]) == ["runs=[a,b]", "level=0.5"]


def result(method, step, seed, values, variant=""):
    """A run with one target; values {layer: (test score, validated)}."""
    layers = {layer: {"x": Score(v, (v - 0.1, v + 0.1), val, 1.0)} for layer, (v, val) in values.items()}
    about = {"run": f"{method}{variant}{step}{seed}", "method": method, "variant": variant, "step": step, "seed": seed}
    return about | {"settings": {}, "layers": layers}


def test_summary_over_seeds_and_paired_differences():
    results = []
    for seed in range(3):
        for step in (100, 300):
            gain = 0.05 + 0.01 * seed
            results.append(result("self_flow", step, seed, {0: (0.99, 0.1), 1: (0.5 + gain, 0.6)}))
            results.append(result("flow_matching", step * 5 // 4, seed, {0: (0.1, 0.1), 1: (0.5, 0.6)}))
    assert best_layer(results[0], "x") == 1  # by validation: the test score of layer 0 is higher
    groups = summarise(results, ["x"])
    assert [(g["method"], g["step"]) for g in groups] == [
        ("flow_matching", 125), ("flow_matching", 375), ("self_flow", 100), ("self_flow", 300),
    ]  # fmt: skip
    ours = groups[2]["targets"]["x"]
    assert ours["value"] == pytest.approx(0.56) and ours["layers"] == [1, 1, 1]
    half = 4.302653 * 0.01 / np.sqrt(3)  # t of 2 degrees of freedom
    assert ours["interval"] == pytest.approx((0.56 - half, 0.56 + half))
    found = differences(results, ["x"])
    assert [(d["method"], d["steps"], d["seeds"]) for d in found] == [
        ("self_flow", [100, 125], [0, 1, 2]), ("self_flow", [300, 375], [0, 1, 2]),
    ]  # fmt: skip
    assert found[0]["difference"] == pytest.approx(0.06)
    assert found[0]["interval"] == pytest.approx((0.06 - half, 0.06 + half))
    assert np.isnan(mean_interval([1.0])).all()


def test_runs_of_other_settings_are_no_seeds_of_each_other():
    def manifest(method, seed, **identity):
        shared = {"model": "tiny", "lr": 1e-3, "codec": "dct", "data_hash": "abcdef99" + 56 * "0"} | identity
        own = {"method": method, "seed": seed, "switch_off": 5 if method == "self_flow" else 0}  # the method's own
        return {"kind": "pretrain", "method": method, "identity": shared | own}

    made = [
        {"method": m["method"], "settings": settings(m)}
        for method in ("self_flow", "flow_matching")
        for seed in range(2)
        for m in (manifest(method, seed), manifest(method, seed, codec="pixels", data_hash="123456aa" + 56 * "0"))
    ]
    names = variants(made)
    assert names == 4 * ["codec dct, data_hash abcdef99", "codec pixels, data_hash 123456aa"]
    assert variants(made[::2]) == 4 * [""]  # alike but for seed and method

    results = [
        result(method, 100, seed, {0: (0.5 + gain * (method == "self_flow"), 0.5)}, variant)
        for method in ("self_flow", "flow_matching")
        for variant, gain in (("codec dct", 0.1), ("codec pixels", 0.3))
        for seed in range(2)
    ]
    require_distinct(results)
    assert [(g["method"], g["variant"], g["seeds"]) for g in summarise(results, ["x"])] == [
        ("flow_matching", "codec dct", [0, 1]), ("flow_matching", "codec pixels", [0, 1]),
        ("self_flow", "codec dct", [0, 1]), ("self_flow", "codec pixels", [0, 1]),
    ]  # fmt: skip
    found = differences(results, ["x"])
    assert [(d["variant"], d["difference"]) for d in found] == [
        ("codec dct", pytest.approx(0.1)), ("codec pixels", pytest.approx(0.3)),
    ]  # fmt: skip
    assert not differences(results[:2] + results[6:], ["x"])  # dct of one, pixels of the other
    with pytest.raises(ValueError, match="are both self_flow, codec dct, 100 steps, seed 0: leave one"):
        require_distinct([*results, result("self_flow", 100, 0, {}, "codec dct")])


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.PRESETS, "tiny", SMALL)
    return write_probed(tmp_path / "data" / "moving", episodes=60)


def test_from_runs_to_a_table_and_a_plot(workplace, capsys):
    common = {"data": str(workplace), "batch_size": 2, "future": [1, 2], "luma": 4, "chroma": 2, "device": "cpu"}
    for method in ("self_flow", "flow_matching"):
        pretrain(PretrainConfig(name=method, method=method, steps=2, **common))
    runs = ["self_flow", "flow_matching"]
    how = {"data": str(workplace), "frames": 6, "test_share": 0.3, "device": "cpu", "grid": [2, 3]}
    path = probe_runs(ProbeConfig(runs=runs, **how))
    report = json.loads(path.read_text())  # strict JSON: no NaN
    assert "NaN" not in path.read_text()
    assert (report["fitted_episodes"], report["test_episodes"]) == (42, 18)
    assert [run["run"] for run in report["runs"]] == runs
    assert report["runs"][0]["train_s"] > 0 and report["runs"][0]["step"] == 2
    assert list(report["runs"][0]["layers"]) == ["0", "1", "2", "3"]
    assert report["baselines"]["nothing"]["object_position"]["value"] == 0
    assert report["baselines"]["nothing"]["gripper"]["value"] == 0.5
    # Where square and bar are is nearly linear in a small picture.
    assert report["baselines"]["pixels"]["object_position"]["value"] > 0.5
    assert {d["target"] for d in report["differences"]} == {
        "tcp_position", "gripper", "object_position", "drawer", "subtask",
    }  # fmt: skip
    assert (path.parent / "probe.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "object_position" in out and "self_flow - flow_matching" in out and "untrained" in out
    again = probe_runs(ProbeConfig(runs=runs[:1], name="again", **how))
    assert json.loads(again.read_text())["runs"] == report["runs"][:1]

    # the newest of both arms, noised frames, the validation split
    path = probe_runs(ProbeConfig(tokens="generated", level=0.5, frames=3, data=str(workplace), device="cpu"))
    assert [run["run"] for run in json.loads(path.read_text())["runs"]] == ["self_flow", "flow_matching"]
    assert list(json.loads(path.read_text())["runs"][0]["layers"]) == ["0", "1", "2", "3", "4"]
    with pytest.raises(ValueError, match="choose given"):
        probe_runs(ProbeConfig(tokens="given", level=0.5, data=str(workplace)))

    # other settings beside them, or instead
    pretrain(PretrainConfig(name="other", method="flow_matching", steps=2, **common | {"luma": 6}))
    path = probe_runs(ProbeConfig(runs=[*runs, "other"], name="three", **how))
    assert [g["variant"] for g in json.loads(path.read_text())["groups"]] == ["luma 4", "luma 6", "luma 4"]
    with pytest.raises(ValueError, match="leave one of them out"):
        probe_runs(ProbeConfig(runs=[*runs, "runs/self_flow"], **how))
    capsys.readouterr()
    probe_runs(ProbeConfig(runs=["self_flow", "other"], **how))
    assert "differ in more than the method: luma (4, 6)" in capsys.readouterr().out


def test_mistakes_name_the_remedy(workplace):
    with pytest.raises(ValueError, match=r"no pretraining in runs/.*pretrain\.py"):
        probe_runs(ProbeConfig(data=str(workplace)))
    small = open_dataset(write_dataset(workplace.parent / "two", episodes=2))
    with pytest.raises(ValueError, match="1 episodes to fit on and 1 to test on"):
        choose_frames(small, ProbeConfig())
