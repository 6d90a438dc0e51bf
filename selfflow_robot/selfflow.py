"""The objective: Self-Flow (arXiv 2603.06507 section 3). Its baselines, plain flow matching among them, are settings.

Dual timesteps: t, s ~ p(t) per sample, unordered; a Bernoulli share of the generated tokens takes s, the rest t
(section 3.3). The teacher, an exponential moving average of the student, sees every generated token at min(t, s) with
the same noise and stops at its feature layer; the student predicts those features from its own, earlier ones (section
3.4). Given tokens keep a level of their own, the same for both, and are in neither loss.

B batch (windows times draws), N tokens, M of them not given, K distinct levels, C channels, D width, E width of the
features to predict.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfflow_robot.flow import TimestepDistribution, interpolate
from selfflow_robot.model import Levels, Model
from selfflow_robot.tokens import GENERATED, HIDDEN, Tokens

# What each method changes. All draw the same random numbers, so that arms differ in nothing else.
METHODS: dict[str, dict] = {
    "self_flow": {},
    "flow_matching": dict(scheduling="single", features="none"),
    "dual_timesteps": dict(features="none"),
    "sra": dict(scheduling="single", teacher_offset=0.2),  # arXiv 2505.02831: the teacher a little cleaner
    "repa": dict(scheduling="single", features="encoder", feature_weight=0.5),  # a frozen image encoder
    "layer_sync": dict(scheduling="single", features="own", feature_weight=0.5),  # arXiv 2510.12581: no teacher
    "diffusion_forcing": dict(scheduling="per_token", features="none"),
    "full_masking": dict(scheduling="full", features="none"),
    "attention_separation": dict(apart=1.0),  # arXiv 2607.02508: the two groups do not see each other
}
SCHEDULING = ("dual", "single", "per_token", "full")
FEATURES = ("teacher", "none", "encoder", "own")
ACTION_LEVELS = ("shared", "masked", "own")


@dataclass(frozen=True)
class SelfFlowConfig:
    scheduling: str = "dual"  # "single": one t per sample; "per_token": a t each; "full": masked tokens are pure noise
    features: str = "teacher"  # what the student predicts: the EMA's, none, a frozen encoder's or its "own" later ones
    teacher_offset: float = 0.0  # the teacher's level is max(t - U(0, this), 0) instead of min(t, s); 0: min
    levels: TimestepDistribution = field(default_factory=TimestepDistribution)
    mask_ratio: float = 0.1  # share of tokens at s; 0.1 for video, 0.25 for images (appendix A)
    # Actions: "shared" have the video's t (appendix E), "masked" also its mask, "own" draw a t, s of their own.
    action_noise: str = "shared"
    action_levels: TimestepDistribution | None = None  # with "own"; None: as the video's
    action_mask_ratio: float = 0.0  # with "masked" and "own"
    feature_weight: float = 0.8
    student_layer: float = 0.3  # of the depth, rounded
    teacher_layer: float = 0.7
    apart: float = 0.0  # share of samples in which tokens at t and tokens at s do not attend to each other
    given_noise: float = 0.0  # what is given is noised to t ~ U(0, this): 0.2 in pretraining, where it is a frame
    condition_dropout: float = 0.0  # share of samples without text and proprioception, for student and teacher alike
    draws: int = 1  # of noise and levels per window; they share the given tokens, which are computed once
    video_weight: float = 1.0  # of the mean over video tokens
    action_weight: float = 1.0

    def __post_init__(self):
        for name, known in (("scheduling", SCHEDULING), ("features", FEATURES), ("action_noise", ACTION_LEVELS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        if not 0 <= max(self.mask_ratio, self.action_mask_ratio) <= 0.5:
            raise ValueError(f"mask_ratio and action_mask_ratio must be in [0, 0.5], got {self}")
        if not 0 < self.student_layer <= self.teacher_layer <= 1:
            raise ValueError(f"need 0 < student_layer <= teacher_layer <= 1, got {self}")

    @property
    def needs_teacher(self) -> bool:
        return self.features == "teacher"

    def layers(self, depth: int) -> tuple[int, int]:
        """Blocks (1 is the first) after which the student's and the teacher's features are taken."""
        return max(1, round(self.student_layer * depth)), max(1, round(self.teacher_layer * depth))

    def switched_off(self) -> "SelfFlowConfig":
        """Plain flow matching with the same noise: for the last part of a training, or for fine-tuning."""
        return replace(self, **METHODS["flow_matching"], apart=0.0)


def objective(method: str, **settings) -> SelfFlowConfig:
    """The settings of a method, with changes; None leaves a setting to the method. ValueError naming the known ones."""
    if method not in METHODS:
        raise ValueError(f"method {method!r}: choose one of {', '.join(METHODS)}")
    return SelfFlowConfig(**METHODS[method] | {name: value for name, value in settings.items() if value is not None})


@dataclass(frozen=True)
class Draw:
    """The random part of one loss; t, s, masked and noise are the same for every method."""

    t: Tensor  # (B, 1)
    s: Tensor  # (B, 1)
    masked: Tensor  # bool (B, N), where s is used
    given: Tensor  # (B, 1), level of the given tokens
    noise: Tensor  # (B, N, C)
    pixel_noise: Tensor | None  # as tokens.frames
    action: Tensor  # (2, B, 1), the actions' own t and s
    each: Tensor | None  # (B, N), a level for every token
    offset: Tensor  # (B, 1), how much cleaner an SRA teacher sees
    apart: Tensor  # bool (B, 1)
    dropped: Tensor  # bool (B, 1), samples without conditions


def draw(tokens: Tokens, config: SelfFlowConfig, generator: torch.Generator, part: tuple[int, int] = (0, 1)) -> Draw:
    """For windows (B, ...): `config.draws` rows each, one after another; what happens to given tokens is shared.

    part (k, n): the windows are the k-th of n equal parts of a batch; what is drawn is that part of the whole batch's.
    """
    k, n = part
    windows, rows = len(tokens.x) * n, len(tokens.x) * n * config.draws
    width, N = config.draws, tokens.x.shape[1]
    t, s = config.levels.draw((2, rows, 1), generator)
    uniform = torch.rand(rows, N, generator=generator)
    given = config.given_noise * torch.rand(windows, 1, generator=generator).repeat_interleave(width, 0)
    noise = torch.randn((rows, *tokens.x.shape[1:]), generator=generator)
    noise[:, : tokens.prefix] = noise[::width, : tokens.prefix].repeat_interleave(width, 0)
    seen = tokens.frames is not None and config.given_noise > 0
    pixel_noise = torch.randn((windows, *tokens.frames.shape[1:]), generator=generator) if seen else None
    # From here on: what only some methods need, so that those before are the same in all.
    action = (config.action_levels or config.levels).draw((2, rows, 1), generator)
    offset = config.teacher_offset * torch.rand(rows, 1, generator=generator)
    apart = torch.rand(rows, 1, generator=generator) < config.apart
    dropped = torch.rand(windows, 1, generator=generator).repeat_interleave(width, 0) < config.condition_dropout
    each = config.levels.draw((rows, N), generator) if config.scheduling == "per_token" else None

    def mine(a, dim=0):
        return None if a is None else a.chunk(n, dim)[k].to(tokens.x.device)

    # A Bernoulli per token, not a fixed count.
    masked = (mine(uniform) < config.mask_ratio) & tokens.where(GENERATED, "video")
    if config.action_noise != "shared":
        masked = masked | (mine(uniform) < config.action_mask_ratio) & tokens.where(GENERATED, "action")
    return Draw(
        mine(t), mine(s), masked, mine(given), mine(noise), mine(pixel_noise),
        mine(action, 1), mine(each), mine(offset), mine(apart), mine(dropped),
    )  # fmt: skip


def student_levels(d: Draw, tokens: Tokens, config: SelfFlowConfig) -> Levels | Tensor:
    """What the student sees every token at: Levels, or (B, N) where each has its own."""
    hidden, action = tokens.where(HIDDEN), tokens.where(GENERATED, "action")
    if d.each is not None:
        tau = torch.where(tokens.where(GENERATED), d.each, torch.where(hidden, 1.0, d.given))
        return tau if config.action_noise == "own" else torch.where(action, d.t, tau)
    s = torch.ones_like(d.s) if config.scheduling == "full" else d.s
    own_s = torch.ones_like(d.s) if config.scheduling == "full" else d.action[1]
    masked = d.masked & (config.scheduling != "single")
    return _levels((d.t, s), (d.action[0], own_s), masked, d, tokens, config)


def teacher_levels(d: Draw, tokens: Tokens, config: SelfFlowConfig) -> Levels:
    """Every generated token at the cleaner of its two levels."""
    if config.teacher_offset:
        video, own = (d.t - d.offset).clamp_min(0), (d.action[0] - d.offset).clamp_min(0)
    else:
        video, own = torch.minimum(d.t, d.s), torch.minimum(*d.action)
    return _levels((video, video), (own, own), torch.zeros_like(d.masked), d, tokens, config)


def _levels(video: tuple, own: tuple, masked: Tensor, d: Draw, tokens: Tokens, config: SelfFlowConfig) -> Levels:
    """Columns: t, s of video, those of actions where they have their own, hidden, given."""
    columns = [*video, *(own if config.action_noise == "own" else ()), torch.ones_like(d.t), d.given]
    index = masked.long()
    if config.action_noise == "own":
        index = torch.where(tokens.where(GENERATED, "action"), index + 2, index)
    index = torch.where(tokens.where(HIDDEN), len(columns) - 2, index)
    generated = tokens.where(GENERATED)
    index = torch.where(generated | tokens.where(HIDDEN), index, len(columns) - 1)
    return Levels(torch.cat(columns, 1), index)


def loss(
    student: Model,
    teacher: Model | None,
    tokens: Tokens,
    config: SelfFlowConfig,
    generator: torch.Generator,
    target: Tensor | None = None,
    part: tuple[int, int] = (0, 1),
    known: Model | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scalar loss and its terms. The student has the gradient; the teacher may be None where no method needs one.

    target (windows, n, E): with features "encoder", what the encoder says of the n generated video tokens. part: see
    `draw`. known: a network without a gradient, whose velocity is the target in windows that `tokens.kept`, in place of
    noise - x: learning without forgetting (arXiv:1606.09282).
    """
    d = draw(tokens, config, generator, part)
    if d.pixel_noise is not None:
        level = d.given[:: config.draws, :, None, None]  # (B, 1, 1, 1); interpolate adds the channel axis
        tokens = replace(tokens, frames=interpolate(tokens.frames, d.pixel_noise, level)[0])
    if config.condition_dropout:
        tokens = without_conditions(tokens, d.dropped[:: config.draws])
    rows = tokens.repeat(config.draws)

    def shared(model, z, tau, layers=None):  # the prefix once per window, for all its draws
        return model.prefix_cache(z[:: config.draws], tau[:: config.draws], tokens, layers)

    student_layer, teacher_layer = config.layers(student.config.depth)
    tau = student_levels(d, tokens, config)
    z, velocity = interpolate(rows.x, d.noise, per_token(tau))
    wanted = {"none": 0, "own": (student_layer, teacher_layer)}.get(config.features, student_layer)
    apart = d.masked & d.apart if config.apart else None
    predicted, features = student(z, tau, rows, wanted, shared(student, z, tau), apart)
    if known is not None:
        with torch.no_grad(), cast_once(known):
            before = known(z, tau, rows, cache=shared(known, z, tau))[0]
        velocity = torch.where(rows.kept[..., None], before, velocity)

    terms = {}
    total = torch.zeros((), device=tokens.x.device)
    for kind, weight in (("video", config.video_weight), ("action", config.action_weight)):
        span, channels = tokens.rows(kind, GENERATED), student.channels[kind]
        if span.stop > span.start:
            error = (predicted - velocity)[:, span, :channels].square().mean(-1)  # (B, n)
            counted = rows.weight[:, span]
            terms[f"loss_{kind}"] = (error * counted).sum() / counted.sum().clamp_min(1)
            total = total + weight * terms[f"loss_{kind}"]
    if config.features != "none":
        if config.features == "teacher":
            level = teacher_levels(d, tokens, config)
            same = (per_token(tau) <= per_token(level))[:, tokens.prefix :]  # (B, M): where both see the same noise
            with torch.no_grad(), cast_once(teacher):
                z = interpolate(rows.x, d.noise, per_token(level))[0]
                target = teacher.features(z, level, rows, teacher_layer, shared(teacher, z, level, teacher_layer))
            projected = student.projector(features)
        elif config.features == "own":
            projected, target = features[0], features[1].detach()
        else:
            span = tokens.rows("video", GENERATED)
            projected = student.projector(features[:, span.start - tokens.prefix : span.stop - tokens.prefix])
            target = target.repeat_interleave(config.draws, 0)
        cosine = F.cosine_similarity(projected.float(), target.float(), dim=-1)  # (B, M)
        total = total + config.feature_weight * (1 - cosine.mean())
        if config.features == "teacher":
            terms |= {"cosine_cleaner": masked_mean(cosine, same), "cosine_noisier": masked_mean(cosine, ~same)}
        terms |= {
            "cosine": cosine.mean(),
            "feature_norm": projected.detach().float().norm(dim=-1).mean(),
            "target_norm": target.float().norm(dim=-1).mean(),
        }
    return total, {name: term.detach() for name, term in terms.items()} | {"loss": total.detach()}


@contextmanager
def cast_once(module: nn.Module) -> Iterator[None]:
    """Within autocast: weights are cast to bf16 once, not at every use. It keeps casts of weights with a gradient only,
    so they have one here, for the time of a computation that records none."""
    module.requires_grad_(True)
    try:
        yield
    finally:
        module.requires_grad_(False)


def per_token(tau: Levels | Tensor) -> Tensor:  # (B, N)
    return tau.per_token() if isinstance(tau, Levels) else tau


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Over the entries where `mask`; NaN where there are none. No look at the data, which would stall a GPU."""
    return torch.where(mask, x, 0).sum() / mask.sum()


def without_conditions(tokens: Tokens, dropped: Tensor) -> Tokens:
    """Text and proprioception of the samples `dropped` (B, 1) become zero: no bytes, the mean pose."""
    x, span = tokens.x.clone(), tokens.rows("proprio", "given")
    x[:, span] = torch.where(dropped[..., None], 0.0, x[:, span])
    text = None if tokens.text is None else torch.where(dropped, 0, tokens.text).to(tokens.text.dtype)
    return replace(tokens, x=x, text=text)


def ema_decay(step: int, decay: float) -> float:
    """Decay after `step` updates: ramps up as (1 + step) / (10 + step), so that short runs have a teacher too."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher <- decay teacher + (1 - decay) student."""
    torch._foreach_lerp_(_tensors(teacher), _tensors(student), 1 - decay)


def _tensors(module: nn.Module) -> list[Tensor]:
    parameters: Iterable[Tensor] = module.parameters()
    return [p.data for p in parameters]
