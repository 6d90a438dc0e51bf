"""The objective: Self-Flow (arXiv 2603.06507 section 3). Plain flow matching is a setting of it.

Dual timesteps: t, s ~ p(t) per sample, unordered; a Bernoulli share of the generated video tokens takes s, the rest
and the actions t (section 3.3; actions share the video's t, appendix E). The teacher, an exponential moving average of
the student, sees every generated token at min(t, s) with the same noise and stops at its feature layer; the student
predicts those features from its own, earlier ones (section 3.4). Given tokens keep a level of their own, the same for
both, and are in neither loss.

B batch (windows times draws), N tokens, M of them not given, C channels, D width.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfflow_robot.flow import TimestepDistribution, interpolate
from selfflow_robot.model import Model
from selfflow_robot.tokens import GENERATED, HIDDEN, Tokens

METHODS = ("self_flow", "flow_matching")


@dataclass(frozen=True)
class SelfFlowConfig:
    method: str = "self_flow"  # or "flow_matching": the same random numbers, one t per sample, no teacher
    levels: TimestepDistribution = field(default_factory=TimestepDistribution)
    mask_ratio: float = 0.1  # share of tokens at s; 0.1 for video, 0.25 for images (appendix A)
    feature_weight: float = 0.8
    student_layer: float = 0.3  # of the depth, rounded
    teacher_layer: float = 0.7
    given_noise: float = 0.0  # what is given is noised to t ~ U(0, this): 0.2 in pretraining, where it is a frame
    draws: int = 1  # of noise and levels per window; they share the given tokens, which are computed once
    video_weight: float = 1.0  # of the mean over video tokens
    action_weight: float = 1.0

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r}: choose one of {', '.join(METHODS)}")
        if not 0 <= self.mask_ratio <= 0.5 or not 0 < self.student_layer <= self.teacher_layer <= 1:
            raise ValueError(f"need 0 <= mask_ratio <= 0.5 and 0 < student_layer <= teacher_layer <= 1, got {self}")

    def layers(self, depth: int) -> tuple[int, int]:
        """Blocks (1 is the first) after which the student's and the teacher's features are taken."""
        return max(1, round(self.student_layer * depth)), max(1, round(self.teacher_layer * depth))


@dataclass(frozen=True)
class Draw:
    """The random part of one loss; the same for every method."""

    t: Tensor  # (B, 1)
    s: Tensor  # (B, 1)
    masked: Tensor  # bool (B, N), where s is used
    given: Tensor  # (B, 1), level of the given tokens
    noise: Tensor  # (B, N, C)
    pixel_noise: Tensor | None  # as tokens.frames


def draw(tokens: Tokens, config: SelfFlowConfig, generator: torch.Generator) -> Draw:
    """For windows (B, ...): `config.draws` rows each, one after another; the level of the given frames is shared."""
    B, N = tokens.x.shape[0] * config.draws, tokens.x.shape[1]
    t, s = config.levels.draw((2, B, 1), generator)
    masked = torch.rand(B, N, generator=generator) < config.mask_ratio  # a Bernoulli, not a fixed count
    given = config.given_noise * torch.rand(len(tokens.x), 1, generator=generator).repeat_interleave(config.draws, 0)
    noise = torch.randn((B, *tokens.x.shape[1:]), generator=generator)
    seen = tokens.frames is not None and config.given_noise > 0
    pixel_noise = torch.randn(tokens.frames.shape, generator=generator) if seen else None
    drawn = (a if a is None else a.to(tokens.x.device) for a in (t, s, masked, given, noise, pixel_noise))
    t, s, masked, given, noise, pixel_noise = drawn
    return Draw(t, s, masked & tokens.where(GENERATED, "video"), given, noise, pixel_noise)


def loss(
    student: Model, teacher: Model | None, tokens: Tokens, config: SelfFlowConfig, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scalar loss and its terms. The student has the gradient; the teacher may be None with method flow_matching."""
    d = draw(tokens, config, generator)
    generated, hidden = tokens.where(GENERATED), tokens.where(HIDDEN)
    if d.pixel_noise is not None:
        level = d.given[:: config.draws, :, None, None]  # (B, 1, 1, 1); interpolate adds the channel axis
        tokens = replace(tokens, frames=interpolate(tokens.frames, d.pixel_noise, level)[0])

    rows = tokens.repeat(config.draws)

    def shared(model, z, tau, layers=None):  # the prefix once per window, for all its draws
        cache = model.prefix_cache(z[:: config.draws], tau[:: config.draws], tokens, layers)
        return [kv and tuple(a.repeat_interleave(config.draws, 0) for a in kv) for kv in cache]

    def levels(tau):  # (B, 1) or (B, N) for generated tokens -> (B, N) for all
        return torch.where(generated, tau, torch.where(hidden, 1.0, d.given))

    self_flow = config.method == "self_flow"
    student_layer, teacher_layer = config.layers(student.config.depth)
    tau = levels(torch.where(d.masked, d.s, d.t) if self_flow else d.t)
    z, velocity = interpolate(rows.x, d.noise, tau)
    feature_layer = student_layer if self_flow else 0
    predicted, features = student(z, tau, rows, feature_layer, shared(student, z, tau))

    terms = {}
    total = torch.zeros((), device=tokens.x.device)
    for kind, weight in (("video", config.video_weight), ("action", config.action_weight)):
        span, channels = tokens.rows(kind, GENERATED), student.channels[kind]
        if span.stop > span.start:
            error = (predicted - velocity)[:, span, :channels].square().mean(-1)  # (B, n)
            counted = rows.weight[:, span]
            terms[f"loss_{kind}"] = (error * counted).sum() / counted.sum().clamp_min(1)
            total = total + weight * terms[f"loss_{kind}"]
    if self_flow:
        cleaner = levels(torch.minimum(d.t, d.s))
        with torch.no_grad():
            z = interpolate(rows.x, d.noise, cleaner)[0]
            cache = shared(teacher, z, cleaner, teacher_layer)
            target = teacher.features(z, cleaner, rows, teacher_layer, cache)
        projected = student.projector(features)
        cosine = F.cosine_similarity(projected.float(), target.float(), dim=-1).mean()  # over (B, M)
        terms["cosine"] = cosine
        total = total + config.feature_weight * (1 - cosine)
    return total, {name: term.detach() for name, term in terms.items()} | {"loss": total.detach()}


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
