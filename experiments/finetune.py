"""Fine-tune a pretrained video backbone into a policy that is also a world model.

    python experiments/finetune.py                            from the newest Self-Flow pretraining
    python experiments/finetune.py --method flow_matching     from the newest baseline
    python experiments/finetune.py --pretrained none          from scratch
    python experiments/finetune.py --pretrained runs/first --data data/more --name second    a policy, on other data
    python experiments/finetune.py --pretrained runs/first --model small --grow true --name third    made larger
    python experiments/finetune.py --pretrained runs/first --data data/more --keep move pick --name fourth
                                                              of "move ..." and "pick ...", it goes on as it was

Adds proprioception, text and actions; every batch draws one of the role assignments (`modes`), the corners that the
checkpoint will be asked for. `--corners false` is the paper's recipe instead: frames and actions generated together,
at one noise level. Writes runs/<name>: checkpoint/, metrics.jsonl, config.json. Interrupt it at any time: the same
command continues.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

from selfflow_robot.config import FinetuneConfig, run


def finetune(cfg: FinetuneConfig) -> Path:
    """Train to the end, or continue; returns the run folder."""
    import torch

    from selfflow_robot import data, latents, plan, train
    from selfflow_robot.flow import TimestepDistribution
    from selfflow_robot.grow import grow
    from selfflow_robot.model import Model, preset
    from selfflow_robot.processes import part_loss
    from selfflow_robot.selfflow import METHODS
    from selfflow_robot.tokens import MODES, VIDEO_ONLY, Layout, Packer
    from selfflow_robot.validation import action_errors, action_following, held_out, sample_video, video_loss

    if wrong := cfg.modes.keys() - (MODES.keys() - set(VIDEO_ONLY)):
        raise ValueError(
            f"modes: {', '.join(sorted(wrong))} unknown; there are {', '.join(MODES.keys() - set(VIDEO_ONLY))}"
        )
    if cfg.method not in METHODS:
        raise ValueError(f"method {cfg.method!r}: choose one of {', '.join(METHODS)}")
    dataset, device, processes = train.start(cfg, Path(__file__).with_name("collect_demos.py"))
    folder = Path("runs") / cfg.name
    height, width, _ = dataset.image_shape
    layout = Layout(cfg.past, cfg.future, cfg.horizon, height=height, width=width, view=dataset.view, fps=dataset.fps)
    windows = data.windows(dataset, layout.past, layout.future, layout.horizon)

    backbone, backbone_hash = choose_backbone(cfg, folder)
    manifest, known = {}, None
    if backbone is None:
        if cfg.grow:
            raise ValueError("--grow true needs a smaller network that was trained: name it with --pretrained")
        packer = Packer(layout, latents.open_codec("dct", windows))
        model = Model(preset(cfg.model), packer.channels, packer.codec.config.patch)
    else:
        model, pretrained, manifest = backbone
        known = deepcopy(model) if cfg.keep else None
        if cfg.grow:
            model = grow(model, preset(cfg.model), cfg.seed)
        if replace(model.config, feature_width=0) != preset(cfg.model):
            which = cfg.pretrained or "the newest pretraining"
            raise ValueError(f"{which} is not of preset {cfg.model}: give --model, or --grow true")
        model.train().requires_grad_(True)
        packer = Packer(layout, pretrained.codec)
    if manifest.get("kind") == "finetune":
        if pretrained.layout != layout:
            raise ValueError(f"{cfg.pretrained or folder} was trained on windows of {pretrained.layout}, not {layout}")
        packer = pretrained  # its scales: the policy's numbers keep their meaning
    else:
        packer.fit_statistics(dataset.stats)
    model, packer = model.to(device), packer.to(device)
    if cfg.keep:
        require_kept(cfg, dataset.instructions, manifest)
        known = known.to(device)
    chances = cfg.modes if cfg.corners else {"joint_plan": 1.0}
    objective = train.objective(
        cfg,
        cfg.method if cfg.self_flow_terms else "flow_matching",
        action_noise=cfg.action_noise if cfg.corners else "shared",
        action_mask_ratio=cfg.action_mask_ratio,
        action_levels=TimestepDistribution(cfg.action_levels, cfg.action_shift),
        video_weight=cfg.video_weight,
        action_weight=cfg.action_weight,
    )
    if objective.features == "encoder" or (objective.features == "teacher" and model.config.feature_width):
        raise ValueError("fine-tuning has no external encoder: leave self_flow_terms off after repa")
    modes = plan.by_mode(packer, chances, objective, cfg.draws)
    if cfg.plan:
        size, price = (cfg.batch_size, cfg.steps), cfg.gpu_hour_price
        plan.show(cfg.name, model.config, packer.channels, modes, *size, device, price, known and known.config)
        return folder
    state = train.begin(cfg, model, processes)
    names, weights = list(chances), torch.tensor(list(chances.values()))

    def draw_committed(mode, generator) -> int:
        share = cfg.committed if mode in ("policy", "joint_plan") and layout.horizon > 1 else 0.0
        count = torch.randint(1, max(layout.horizon, 2), (), generator=generator).item()
        return count if torch.rand((), generator=generator) < share else 0

    def pack(batch, mode, committed):
        tokens = packer.pack(batch, mode, committed)
        if not cfg.keep:
            return tokens
        kept = [[text.startswith(tuple(cfg.keep))] for text in batch["instruction"]]
        return replace(tokens, kept=torch.tensor(kept, device=device))

    def loss_fn(model, teacher, batch, generator):
        mode = names[torch.multinomial(weights, 1, generator=generator)]
        committed = draw_committed(mode, generator) if cfg.corners else 0
        config = objective.switched_off() if cfg.switch_off and state.step >= cfg.switch_off else objective
        config = replace(config, draws=cfg.draws if mode == "policy" else 1)
        total, terms = part_loss(model, teacher, lambda: pack(batch, mode, committed), config, generator, known=known)
        return total, {name if name == "loss" else f"{name}/{mode}": term for name, term in terms.items()}

    batch = held_out(dataset, layout)
    windows = latents.cached(windows, packer.codec, cfg.cache_latents)

    def validate(model):
        if batch is None:
            return {}
        following = action_following(model, packer, batch)
        return video_loss(model, packer, batch, "world_model") | action_errors(model, packer, batch) | following

    train.fit(
        folder,
        state,
        packer,
        train.schedule(cfg),
        {
            "kind": "finetune",
            "method": cfg.method,
            "identity": train.identity(cfg, dataset) | {"pretrained": backbone_hash},
            "config": asdict(cfg),
        },
        batches=lambda step: data.batches(processes.part(windows), cfg.batch_size, cfg.seed, step),
        loss_fn=loss_fn,
        validate=validate,
        save_every=cfg.save_every,
        validate_every=cfg.validate_every,
        wandb_mode=cfg.wandb,
        sample=lambda model: sample_video(model, packer, batch, "world_model") if batch else None,
        sample_every=cfg.sample_every,
        flops_per_step=plan.mean_step_flops(
            model.config, packer.channels, modes, cfg.batch_size, known and known.config
        ),
        peak_flops=plan.peak_flops(device),
    )
    return folder


def require_kept(cfg: FinetuneConfig, instructions: Sequence[str], manifest: dict) -> None:
    """ValueError where there is nothing to keep."""
    if cfg.pretrained is None or manifest.get("kind") != "finetune":
        raise ValueError("--keep is of what a policy does already: name it with --pretrained")
    if missing := [start for start in cfg.keep if not any(text.startswith(start) for text in instructions)]:
        raise ValueError(
            f"keep {', '.join(missing)}: no instruction of {cfg.data} begins so; it has {', '.join(instructions)}"
        )


def choose_backbone(cfg: FinetuneConfig, folder: Path):
    """(model, packer, manifest) of the pretraining and its hash; None, "none" from scratch.

    A run that has begun keeps its backbone when a newer pretraining appears.
    """
    from selfflow_robot import checkpoint

    found = cfg.pretrained
    if found is None:
        if begun := checkpoint.saved(folder / "checkpoint"):
            manifest = checkpoint.read_manifest(begun[-1])
            return checkpoint.load_model(folder), manifest["identity"]["pretrained"]  # its codec, and the right shapes
        found = checkpoint.newest_run("pretrain", cfg.method)
        if found is None:
            print(f"No pretraining of method {cfg.method} in runs/: starting from scratch.", flush=True)
    if found in (None, "none"):
        return None, "none"
    print(f"Starting from the backbone {found}", flush=True)
    loaded = checkpoint.load_model(found)
    return loaded, loaded[2]["sha256"]


if __name__ == "__main__":
    run(FinetuneConfig, finetune)
