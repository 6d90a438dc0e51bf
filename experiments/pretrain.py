"""Pretrain the video backbone, with Self-Flow or with plain flow matching, on the frames of a data set alone.

    python experiments/pretrain.py
    python experiments/pretrain.py --method flow_matching --data data/my_videos --steps 3000

Writes runs/<name>: checkpoint/, metrics.jsonl, config.json. Interrupt it at any time: the same command continues.
"""

from dataclasses import asdict
from pathlib import Path

from selfflow_robot.config import PretrainConfig, run


def pretrain(cfg: PretrainConfig) -> Path:
    """Train to the end, or continue; returns the run folder."""
    import torch

    from selfflow_robot import data, train
    from selfflow_robot.codec import CodecConfig
    from selfflow_robot.model import Model, preset
    from selfflow_robot.selfflow import SelfFlowConfig, loss
    from selfflow_robot.tokens import Layout, Packer
    from selfflow_robot.validation import held_out, video_loss

    dataset, device = train.start(cfg, Path(__file__).with_name("collect_demos.py"))
    height, width, _ = dataset.image_shape
    layout = Layout(future=cfg.future, height=height, width=width, view=dataset.view, fps=dataset.fps)
    packer = Packer(layout, CodecConfig(cfg.codec, luma=cfg.luma, chroma=cfg.chroma))
    packer.fit_statistics(dataset.stats)
    windows = data.windows(dataset, layout.past, layout.future, horizon=1)
    sample = range(0, len(windows), max(1, len(windows) // 1024))
    packer.codec.fit(windows.gather([index])["video"][:, :1] for index in sample)
    model = Model(preset(cfg.model), packer.channels, packer.codec.config.patch)
    model, packer = model.to(device), packer.to(device)
    objective = SelfFlowConfig(
        method=cfg.method,
        levels=train.levels(cfg),
        mask_ratio=cfg.mask_ratio,
        feature_weight=cfg.feature_weight,
        student_layer=cfg.student_layer,
        teacher_layer=cfg.teacher_layer,
        given_noise=cfg.given_noise,
    )

    def loss_fn(model, teacher, batch, generator):
        given = torch.rand((), generator=generator) < cfg.given_share
        return loss(model, teacher, packer.pack(batch, "pretrain" if given else "pretrain_all"), objective, generator)

    batch = held_out(dataset, layout)
    folder = Path("runs") / cfg.name
    train.fit(
        folder,
        train.new_state(model, train.schedule(cfg)),
        packer,
        train.schedule(cfg),
        {"kind": "pretrain", "method": cfg.method, "identity": train.identity(cfg, dataset), "config": asdict(cfg)},
        batches=lambda step: data.batches(windows, cfg.batch_size, cfg.seed, step),
        loss_fn=loss_fn,
        validate=lambda model: video_loss(model, packer, batch, "pretrain") if batch else {},
        save_every=cfg.save_every,
        validate_every=cfg.validate_every,
        wandb_mode=cfg.wandb,
    )
    return folder


if __name__ == "__main__":
    run(PretrainConfig, pretrain)
