"""The settings of every script, one dataclass each, and `run`, which turns a command line into one of them.

Defaults live here; `configs/<script>.yaml` lists only what differs. `--key value`, `--key=value` and `key=value` mean
the same, and `--key a b c` is a list; hydra's own flags (`--cfg job`, `--multirun`) pass through. No import of torch:
`--help` answers at once.
"""

# ruff: noqa: RUF009  (`key` is dataclasses.field with a line of help)
import difflib
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
OURS = ("selfflow_robot", "envs", "policies", "experiments", "__main__")  # whose errors speak for themselves

HYDRA_FLAGS_WITH_VALUE = {"--cfg", "--info", "--package", "--config-path", "--config-name", "--config-dir"}
HYDRA_FLAGS_WITH_VALUE |= {"-c", "-i", "-p", "-cp", "-cn", "-cd"}
HYDRA_FLAGS = {"--help", "--hydra-help", "--version", "--resolve", "--run", "--multirun", "--shell-completion"}
HYDRA_FLAGS |= {"--experimental-rerun"} | HYDRA_FLAGS_WITH_VALUE


def key(default, help: str):
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingConfig:
    """What pretraining and fine-tuning share."""

    data: str = key("data/open_and_place", "LeRobot data set; collected first if it is the default and absent")
    model: str = key("tiny", "preset: tiny (4.6 M parameters), small (21 M), base, large, 625m, 1b or 4b")
    batch_size: int = key(32, "windows per step")
    seed: int = key(0, "of everything random")
    optimizer: str = key("adamw", "adamw, or muon for the blocks' matrices: fewer steps to the same loss")
    weight_decay: float = key(0.01, "of matrices")
    warmup: int = key(100, "steps of linear warm-up")
    cooldown: float = key(0.3, "last share of the steps, learning rate linearly to zero")
    ema: float = key(0.9999, "decay of the averaged weights (teacher, evaluation); ramped up in short runs")
    mask_ratio: float = key(0.1, "share of video tokens at the second noise level")
    feature_weight: float | None = key(None, "weight of the feature loss; default the method's (Self-Flow: 0.8)")
    student_layer: float = key(0.3, "depth of the student's features, as a share")
    teacher_layer: float = key(0.7, "depth of the teacher's features, as a share")
    teacher_offset: float | None = key(None, "teacher at t - U(0, this) instead of min(t, s); default the method's")
    apart: float | None = key(None, "share of samples whose two noise groups do not attend to each other")
    condition_dropout: float = key(0.0, "share of samples without text and proprioception, student and teacher alike")
    switch_off: int = key(0, "step from which the method is plain flow matching; 0: never")
    cache_latents: str = key("auto", "encode the data set once and keep the latents: auto (learned codecs), on, off")
    save_every: int = key(200, "steps between checkpoints; 0: one, at the end")
    validate_every: int = key(200, "steps between measurements on held-out episodes; 0: once, at the end")
    sample_every: int = key(0, "steps between videos of what the model expects of held-out windows; 0: never")
    plan: bool = key(False, "print parameters, FLOPs, memory, time and cost of the run, and stop")
    gpu_hour_price: float = key(0.0, "plan: of one GPU, for the cost")
    compile: bool = key(False, "compile the blocks: a minute or more at the start, then faster steps")
    activation_checkpointing: bool = key(False, "compute activations again in the backward pass: less memory, 4/3 time")
    micro_batch: int = key(0, "windows per forward pass, gradients add up; 0: the whole batch (of a process)")
    nonfinite: str = key("stop", "at a loss that is not finite: stop, or skip the step; its batch is kept")
    sharding: str = key("ddp", "of several processes: ddp (each has all weights) or fsdp (weights are spread)")
    threads: int = key(0, "of torch; 0: torch's choice")
    device: str = key("auto", "auto, cpu or cuda")
    wandb: str = key("disabled", "disabled, offline or online")


@dataclass
class PretrainConfig(TrainingConfig):
    name: str = key("pretrain_${method}", "run folder runs/<name>; the same name again continues it")
    method: str = key(
        "self_flow",
        "self_flow, flow_matching, dual_timesteps, sra, repa, layer_sync, diffusion_forcing, full_masking or "
        "attention_separation: settings of the same code",
    )
    encoder: str = key("facebook/dinov2-base", "repa: image encoder of transformers, name or folder")
    steps: int = key(1500, "updates")
    lr: float = key(1e-3, "peak learning rate")
    future: list[int] = key([4, 8], "frames predicted, in control steps after the given one")
    codec: str = key(
        "dct",
        "latents: dct (low frequencies of each patch), pixels, a run of train_codec, through diffusers sd, flux2, "
        "wan2.1 or wan2.2, or a folder of such weights",
    )
    luma: int = key(12, "dct: coefficients kept per side of a 16x16 patch, brightness")
    chroma: int = key(6, "dct: the same, of each colour difference")
    levels: str = key("logit_normal", "distribution of noise levels: logit_normal or uniform")
    shift: float = key(1.78, "of the noise levels towards noise")
    low_snr: float = key(0.05, "share of noise levels drawn from U[0.95, 1]")
    given_noise: float = key(0.2, "noise on the given frame: t ~ U(0, this)")
    given_share: float = key(0.9, "share of batches in which the first frame is given")


@dataclass
class FinetuneConfig(TrainingConfig):
    name: str = key("finetune_${method}", "run folder runs/<name>; the same name again continues it")
    method: str = key("self_flow", "which backbone to start from, by the method of its pretraining")
    pretrained: str | None = key(None, "run or folder; default the newest pretraining by `method`; none: from scratch")
    grow: bool = key(False, "a smaller network that was pretrained begins as one of preset `model`, with its outputs")
    keep: list[str] = key(
        [], "where an instruction begins so, learn what the policy it goes on from does, not the labels: not to forget"
    )
    self_flow_terms: bool = key(False, "keep Self-Flow's terms in fine-tuning (off: both arms learn the same loss)")
    action_noise: str = key("own", "noise level of actions: shared (the video's t), masked (its mask too) or own")
    action_mask_ratio: float = key(0.0, "masked, own: share of action tokens at the second level")
    action_levels: str = key("uniform", "own: distribution of the actions' noise levels")
    action_shift: float = key(1.0, "own: of the actions' noise levels towards noise")
    steps: int = key(4000, "updates")
    lr: float = key(1e-3, "peak learning rate")
    past: list[int] = key([0], "frames given, in control steps (0: now)")
    future: list[int] = key([4, 8], "frames predicted")
    horizon: int = key(8, "actions predicted from now on")
    modes: dict[str, float] = key(
        {"policy": 0.5, "joint_plan": 0.12, "world_model": 0.22, "inverse_dynamics": 0.1, "video_prediction": 0.06},
        "probability of each role assignment, drawn per batch; those not named keep theirs, 0 leaves one out",
    )
    committed: float = key(0.3, "share of policy and joint_plan batches that are given some of the first actions")
    corners: bool = key(True, "false: frames and actions always generated together at one level, as in the paper")
    video_weight: float = key(1.0, "of the video loss (mean over tokens and channels)")
    action_weight: float = key(1.0, "of the action loss")
    draws: int = key(4, "noise draws per window in mode policy; the observation is computed once for all of them")
    levels: str = key("uniform", "distribution of noise levels: logit_normal or uniform")
    shift: float = key(1.0, "of the noise levels towards noise")
    low_snr: float = key(0.0, "share of noise levels drawn from U[0.95, 1]")


@dataclass
class TrainCodecConfig:
    data: str = key("data/open_and_place", "LeRobot data set; collected first if it is the default and absent")
    name: str = key("codec", "run folder runs/<name>; the same name again continues it")
    channels: int = key(64, "of a latent, one per 16x16 pixels")
    width: int = key(48, "of the network at a quarter of the resolution; 4 times as wide at a sixteenth")
    steps: int = key(2000, "updates")
    batch_size: int = key(8, "clips per step")
    frames: int = key(3, "of a clip")
    stride: int = key(8, "frames of a clip are up to this many control steps apart, drawn per step")
    crop: int = key(64, "side of the training crops, pixels; 0: whole frames")
    noise: float = key(0.1, "on the latents in training, in their units")
    latent_weight: float = key(1e-5, "of the latents' mean square in the loss")
    lr: float = key(1e-3, "peak learning rate")
    weight_decay: float = key(0.01, "of weights")
    warmup: int = key(100, "steps of linear warm-up")
    cooldown: float = key(0.3, "last share of the steps, learning rate linearly to zero")
    ema: float = key(0.999, "decay of the averaged weights, which are the codec; ramped up in short runs")
    seed: int = key(0, "of everything random")
    save_every: int = key(200, "steps between checkpoints, with PSNR and pictures of held-out episodes; 0: at the end")
    sharding = "ddp"  # no key, so no annotation: too small to be spread over processes
    threads: int = key(0, "of torch; 0: torch's choice")
    device: str = key("auto", "auto, cpu or cuda")
    wandb: str = key("disabled", "disabled, offline or online")


@dataclass
class CollectConfig:
    task: str = key("open_and_place", "see README for the list; several with commas: seeds take turns")
    episodes: int = key(300, "in the finished data set")
    first_seed: int = key(0, "episodes use seeds from here on")
    workers: int = key(2, "scenes in parallel, one process each")
    name: str | None = key(None, "data/<name>; default the task's")
    policy: str | None = key(None, "run whose policy drives while the expert labels (DAgger)")
    policy_fraction: float = key(0.5, "share of stretches it drives")
    variation: float = key(1.0, "of the expert's ways from episode to episode; 0: always alike, its labels then agree")
    disturbance: float = key(0.3, "share of episodes the expert is disturbed in and recovers")
    linger: int = key(8, "control steps recorded after success; judge.py expects 8. More: what comes after is learned")
    margin: float = key(0.0, "m that objects lie beyond upstream's draws, and robots beside places at a cabinet")
    keep_failures: bool = key(False, "keep episodes without success")
    width: int | None = key(None, "of the pictures, pixels; default a quarter of upstream's")
    height: int | None = key(None, "of the pictures, pixels; default a quarter of upstream's")


@dataclass
class EvalConfig:
    task: str = key("open_and_place", "see README for the list")
    checkpoint: str | None = key(None, "run or folder; default the newest fine-tuned run, or the one shipped")
    policy: str = key("checkpoint", "checkpoint, expert, hold, or remote: whatever --server serves")
    server: str | None = key(None, "remote: address of a policy server, host:port, ws://... or wss://...")
    protocol: str = key("random", "random (seeds), visual_matching or variant_aggregation (the published episodes)")
    episodes: int = key(50, "random: one per seed; the published protocols have their own")
    first_seed: int = key(10000, "random: seeds from here on; demonstrations use small ones")
    margin: float = key(0.0, "random: as in collect_demos.py, m; before a cabinet every episode then begins elsewhere")
    simulator: str = key("ours", "ours, or upstream: the original SIMPLER, where it is installed")
    shader: str = key("default", "default (rasteriser) or rt (ray tracing, as upstream's drawers; needs a GPU)")
    physics: str = key("default", "default, pgs, tgs, iterations_50, velocity_1, velocity_4, pcm or contact_5mm")
    workers: int = key(2, "scenes in parallel, one process each")
    name: str | None = key(None, "run folder runs/<name>; default from policy and task")
    execute: int = key(2, "actions carried out before predicting again")
    sample_steps: int = key(4, "of the flow sampler")
    imagination: float = key(0.0, "from 0, actions alone, to 1: the future frames in full along with them")
    temperature: float = key(0.0, "of the noise that plans begin with, to 1; 0: none, they follow from what is seen")
    samples: int = key(
        1, "chunks drawn per plan; of several the one whose imagined future is best (experiments/judge.py)"
    )
    delay: int | None = key(None, "real-time chunking: control steps that planning takes, while the robot goes on")
    committed: bool = key(True, "delay: plans know the actions on their way; false: naive switching between chunks")
    cached: bool = key(True, "false: compute the whole sequence in every sampling step, to compare with")
    alarm_every: int = key(0, "control steps between readings of the failure alarm (self-consistency); 0: off")
    width: int | None = key(None, "of the pictures, pixels; default a quarter of upstream's")
    height: int | None = key(None, "of the pictures, pixels; default a quarter of upstream's")
    video: bool = key(True, "write a video per episode")
    resume: bool = key(True, "keep finished episodes of the same run")


@dataclass
class ProbeConfig:
    runs: list[str] = key([], "runs or folders: --runs a b c; default the newest pretraining of each of the two arms")
    data: str = key("data/open_and_place", "LeRobot data set")
    name: str = key("probe", "results go to runs/<name>")
    tokens: str = key("given", "whose features: given (the frame as a condition) or generated (at --level)")
    level: float = key(0.0, "generated: noise level of the frame, in [0, 1]")
    grid: list[int] = key([2, 2], "rows and columns that features are averaged to; 1 1: one mean")
    frames: int = key(16, "per episode, evenly spread")
    episodes: int = key(200, "fitted on, at most")
    test_share: float = key(0.0, "share of episodes tested on; 0: the validation split, which no run was trained on")
    weights: str = key("ema", "ema (evaluation) or model (as in training)")
    threads: int = key(0, "of torch; 0: torch's choice")
    device: str = key("auto", "auto, cpu or cuda")


@dataclass
class ExportConfig:
    checkpoint: str | None = key(None, "run or folder; default the newest fine-tuned run, or the one shipped")
    out: str | None = key(None, "folder to write; default exported/<run>")
    weights: str = key("ema", "ema (averaged, for evaluation) or model (the ones in training)")
    dtype: str | None = key(None, "of matrices: float32, or bfloat16 for half the size; default as they are")
    pretrained: str | None = key(None, "with --share: run or folder that its fine-tuning began from")
    share: float = key(1.0, "of the way from the weights that its fine-tuning began with to its own")
    results: list[str] = key([], "evaluations of it (folders of eval_simpler.py), to join those in its card")


@dataclass
class ServeConfig:
    checkpoint: str | None = key(None, "run or folder; default the newest fine-tuned run, or the one shipped")
    host: str = key("127.0.0.1", "address to listen on; 0.0.0.0: every network of this machine")
    port: int = key(8000, "to listen on; 0: a free one")
    token_file: str | None = key(None, "file with the token clients must show; default the variable SELFFLOW_TOKEN")
    max_batch: int = key(8, "requests planned together")
    wait_ms: float = key(3.0, "a request waits so long for others to be planned with; alone it does not wait")
    queue: int = key(32, "requests that may wait; more are told that the server is busy")
    clients: int = key(64, "that may be connected")
    message_mb: int = key(16, "largest request, MiB")
    plan_timeout: float = key(30.0, "seconds from a request to its plan, then an error")
    idle_timeout: float = key(1800.0, "seconds without a request, then goodbye")
    sample_steps: int = key(4, "of the flow sampler")
    temperature: float = key(0.0, "of the noise that plans begin with, to 1; 0: none, they follow from what is seen")
    imagination: float = key(0.0, "from 0, actions alone, to 1: the future frames too, and in every answer")
    compile: bool = key(False, "through torch.compile: a minute at the start, then faster")
    threads: int = key(1, "of torch: on a CPU more are slower for a single robot")
    cert: str | None = key(None, "TLS certificate (PEM): serve wss:// instead of ws://")
    key: str | None = key(None, "its private key, where the certificate's file has none")  # last: it hides `key`


SCRIPTS = {
    PretrainConfig: "pretrain",
    FinetuneConfig: "finetune",
    TrainCodecConfig: "train_codec",
    CollectConfig: "collect_demos",
    EvalConfig: "eval_simpler",
    ProbeConfig: "probe",
    ExportConfig: "export",
    ServeConfig: "serve",
}


@contextmanager
def in_one_line() -> Iterator[None]:
    """Around what a script does: errors that say what to do end it with their message alone, a failure of ours with its
    traceback (HYDRA_FULL_ERROR=1: all of them)."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        speaks = isinstance(error, ValueError | OSError | FloatingPointError)
        speaks = speaks or type(error).__module__.split(".")[0] in OURS
        if not speaks or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def run(config_class: type, function: Callable) -> None:
    """Entry point of a script: parses the command line and calls function(config); errors as in `in_one_line`."""
    # Before torch is imported: two computing threads that wait by spinning are slower than one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import hydra
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    arguments = overrides(config_class, sys.argv[1:])
    if "--help" in arguments or "-h" in arguments:
        print(usage(config_class))
        return
    script = SCRIPTS[config_class]
    ConfigStore.instance().store(name=f"{script}_schema", node=config_class)
    quiet = ["hydra.run.dir=.", "hydra.sweep.dir=runs/.multirun", "hydra.sweep.subdir=.", "hydra.output_subdir=null"]
    quiet += ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]
    sys.argv[1:] = arguments + quiet

    def job(cfg):
        with in_one_line():
            function(OmegaConf.to_object(cfg))

    hydra.main(version_base=None, config_path=str(CONFIGS), config_name=script)(job)()


def overrides(config_class: type, arguments: list[str]) -> list[str]:
    """`--key value` and `--key=value` -> hydra's `key=value`, after hydra's own flags. Exits with the closest keys when
    one does not exist."""
    known = {f.name: typing.get_type_hints(config_class)[f.name] for f in fields(config_class)}
    flags, converted, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument.split("=")[0] in HYDRA_FLAGS or (argument.startswith("-") and not argument.startswith("--")):
            flags.append(argument)
            if argument in HYDRA_FLAGS_WITH_VALUE and rest:
                flags.append(rest.pop(0))
            continue
        name, given, value = argument.removeprefix("--").partition("=")
        dashed = argument.startswith("--")
        name = name.replace("-", "_") if dashed else name
        top = name.lstrip("+~").split(".")[0].split("/")[0]
        if top == "hydra":
            converted.append(argument)
            continue
        if top not in known:
            close = difflib.get_close_matches(top, known, n=3, cutoff=0.5) or sorted(known)
            sys.exit(f"error: unknown key {top!r}. Closest: {', '.join(close)} (--help lists all)")
        if not given:
            if not dashed:
                sys.exit(f"error: {argument!r} is not of the form key=value or --key value")
            if known[top] is bool and (not rest or rest[0].lower() not in ("true", "false")):
                value = "true"
            elif rest and not rest[0].startswith("--"):
                value = rest.pop(0)
                if typing.get_origin(known[top]) is list and not value.startswith("["):
                    value = _list([value, *_values(rest)], known[top])
            else:
                sys.exit(f"error: {argument} needs a value")
        converted.append(f"{name}={_quote(value, known[top]) if dashed else value}")
    return flags + converted


def _values(rest: list[str]) -> list[str]:
    """Takes the further values of a list from the front of `rest`."""
    values = []
    while rest and not rest[0].startswith("--") and rest[0] not in HYDRA_FLAGS and "=" not in rest[0]:
        values.append(rest.pop(0))
    return values


def _list(values: list[str], kind: type) -> str:
    return f"[{','.join(_quote(value, typing.get_args(kind)[0]) for value in values)}]"


def _quote(value: str, kind: type) -> str:
    """Text as hydra reads it: paths may hold anything; null means None where None is allowed."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if str not in kinds or (type(None) in kinds and value == "null"):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def usage(config_class: type) -> str:
    """All keys with defaults and one line each."""
    script = SCRIPTS[config_class]
    lines = [f"python experiments/{script}.py [--key value | --key=value | key=value] ...", ""]
    for f in fields(config_class):
        default = f.default if f.default is not MISSING else f.default_factory()
        shown = ",".join(f"{k}={v}" for k, v in default.items()) if isinstance(default, dict) else str(default)
        gap = f"\n{'':40}" if len(shown) > 20 else ""
        lines.append(f"  --{f.name:<15} {shown:<20}{gap} {f.metadata['help']}")
    return "\n".join([*lines, "", "Also: hydra's --cfg job (print the configuration), --multirun key=a,b,c."])
