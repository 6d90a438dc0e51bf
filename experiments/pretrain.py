"""Pretrain the video backbone, with Self-Flow or with plain flow matching, on the frames of a data set alone.

    python experiments/pretrain.py
    python experiments/pretrain.py --model 625m --plan       memory, time and cost, and no training
    python experiments/pretrain.py --method flow_matching --data data/my_videos --steps 3000

Writes runs/<name>: checkpoint/, metrics.jsonl, config.json. Interrupt it at any time: the same command continues.
"""

from dataclasses import asdict, replace
from pathlib import Path

from selfflow_robot.config import PretrainConfig, run


def pretrain(cfg: PretrainConfig) -> Path:
    """Train to the end, or continue; returns the run folder."""
    import torch

    from selfflow_robot import data, latents, plan, train
    from selfflow_robot.encoder import Encoder
    from selfflow_robot.model import Model, preset
    from selfflow_robot.processes import part_loss
    from selfflow_robot.tokens import Layout, Packer
    from selfflow_robot.validation import held_out, sample_video, video_loss

    dataset, device, processes = train.start(cfg, Path(__file__).with_name("collect_demos.py"))
    height, width, _ = dataset.image_shape
    layout = Layout(future=cfg.future, height=height, width=width, view=dataset.view, fps=dataset.fps)
    windows = data.windows(dataset, layout.past, layout.future, horizon=1)
    codec = latents.open_codec(cfg.codec, windows, cfg.luma, cfg.chroma, device)
    packer = Packer(layout, codec).fit_statistics(dataset.stats)
    packer = packer.to(device)
    objective = train.objective(cfg, cfg.method, given_noise=cfg.given_noise)
    encoder = Encoder(cfg.encoder).to(device) if objective.features == "encoder" else None
    config = replace(preset(cfg.model), feature_width=encoder.width if encoder else 0)
    modes = plan.by_mode(packer, {"pretrain": cfg.given_share, "pretrain_all": 1 - cfg.given_share}, objective)
    if cfg.plan:
        plan.show(cfg.name, config, packer.channels, modes, cfg.batch_size, cfg.steps, device, cfg.gpu_hour_price)
        return Path("runs") / cfg.name
    model = Model(config, packer.channels, packer.codec.config.patch).to(device)
    state = train.begin(cfg, model, processes)

    def loss_fn(model, teacher, batch, generator):
        off = cfg.switch_off and state.step >= cfg.switch_off
        given = torch.rand((), generator=generator) < cfg.given_share
        config, first = objective.switched_off() if off else objective, len(layout.past) if given else 0

        def pack():
            return packer.pack(batch, "pretrain" if given else "pretrain_all")

        def target():
            return encoder(batch["video"][:, first:], packer.grid) if encoder and not off else None

        return part_loss(model, teacher, pack, config, generator, target)

    batch = held_out(dataset, layout)
    folder = Path("runs") / cfg.name
    identity = train.identity(cfg, dataset) | latents.identity(codec)
    windows = latents.cached(windows, codec, cfg.cache_latents)
    train.fit(
        folder,
        state,
        packer,
        train.schedule(cfg),
        {"kind": "pretrain", "method": cfg.method, "identity": identity, "config": asdict(cfg)},
        batches=lambda step: data.batches(processes.part(windows), cfg.batch_size, cfg.seed, step),
        loss_fn=loss_fn,
        validate=lambda model: video_loss(model, packer, batch, "pretrain") if batch else {},
        save_every=cfg.save_every,
        validate_every=cfg.validate_every,
        wandb_mode=cfg.wandb,
        sample=lambda model: sample_video(model, packer, batch, "pretrain") if batch else None,
        sample_every=cfg.sample_every,
        flops_per_step=plan.mean_step_flops(config, packer.channels, modes, cfg.batch_size),
        peak_flops=plan.peak_flops(device),
    )
    return folder


if __name__ == "__main__":
    run(PretrainConfig, pretrain)
