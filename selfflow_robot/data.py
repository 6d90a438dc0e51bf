"""Demonstrations on disk (LeRobot v3.0) and the windows training draws from them.

Writing: `write_episode` from any number of processes, then `finalize`. An episode is one parquet and one mp4 named by
its seed. The mp4 is put in place first and both by atomic renames, so an episode is committed exactly when both exist;
a killed writer leaves at most a temporary file. The parquet carries all that `finalize` needs to (re)build `meta/`.

Reading: `open_dataset` checks every byte it will use, `windows` slices episodes, `batches` shuffles. Any v3.0 data set
reads, several episodes per file included.
"""

import fcntl
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from rich.progress import track

from selfflow_robot.interfaces import ACTION_NAMES, ENVIRONMENT_NAMES, PROPRIO_NAMES

CODEBASE_VERSION = "v3.0"
CHUNK_SIZE = 1000  # files per chunk folder
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
IMAGE_PREFIX = "observation.images."
VIEW = "overhead"
VECTORS = {"observation.state": PROPRIO_NAMES, "action": ACTION_NAMES, "action.executed": ACTION_NAMES}
# What only a simulator knows; optional. Not `observation.*`: LeRobot would give that to its policies as an input.
ENVIRONMENT = "environment_state"
COUNTERS = ("frame_index", "episode_index", "index", "task_index")
RECORD_KEY = b"selfflow_robot"  # parquet schema metadata: what `finalize` knows about an episode
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
VALIDATION_PERCENT = 5
# Colour conversion: half-resolution chroma is interpolated, worth 4 dB before compression on the drawer scene.
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
COLLECT = "python experiments/collect_demos.py"
RECOLLECT = f"Delete it and run the same {COLLECT} command again: it collects only what is missing."
REBUILD = f"Run the same {COLLECT} command again: it rebuilds meta/ from the episodes."


class DatasetError(RuntimeError):
    """A data set that cannot be written or read; the message names the file and the remedy."""


# ---------------------------------------------------------------------------------------------------------- writing


def write_episode(
    root: str | Path,
    seed: int,
    frames: np.ndarray,
    proprio: np.ndarray,
    action: np.ndarray,
    executed: np.ndarray,
    instructions: Sequence[str],
    success: bool,
    fps: int = 3,
    robot_type: str = "google_robot",
    environment: np.ndarray | None = None,
) -> None:
    """Commit one episode; safe from several processes at once. Writing a seed again replaces it.

    frames uint8 (T, H, W, 3), proprio (T, 10), action and executed (T, 7), instructions: T strings, environment (T, 6)
    as in `interfaces.ENVIRONMENT_NAMES`, where it is known.
    Raises ValueError for wrong input, DatasetError when the disk refuses; nothing is committed then.
    """
    vectors = dict(zip(VECTORS, (proprio, action, executed)))
    if environment is not None:
        vectors[ENVIRONMENT] = environment
    _check_episode(seed, frames, vectors, instructions)
    video = encode_video(frames, fps)
    record = {
        "seed": int(seed),
        "success": bool(success),
        "fps": int(fps),
        "robot_type": robot_type,
        "image_shape": list(frames.shape[1:]),
        "instructions": [[text, len(list(run))] for text, run in itertools.groupby(instructions)],  # run lengths
        "image_stats": _image_statistics(frames),
        "video_sha256": hashlib.sha256(video).hexdigest(),
    }
    length = len(frames)
    columns = {name: _vector_column(np.asarray(value, np.float32)) for name, value in vectors.items()}
    columns["timestamp"] = pa.array(np.arange(length, dtype=np.float32) / np.float32(fps))
    counter = np.arange(length)
    # `finalize` fills in the three columns that depend on the other episodes.
    columns |= dict(zip(COUNTERS, map(pa.array, (counter, 0 * counter, counter, 0 * counter))))
    data_file, video_file = _episode_files(root, seed)
    data_file.unlink(missing_ok=True)  # a replaced episode must not be seen with the new video and the old numbers
    _write_atomic(video_file, video)
    _write_parquet(data_file, pa.table(columns, metadata=_data_metadata(record, list(vectors))))


def committed_seeds(root: str | Path) -> set[int]:
    """Seeds of the episodes that are completely on disk; empty for a new data set."""
    seeds = set()
    for path in Path(root).glob("data/chunk-*/file-*.parquet"):
        seed = int(path.parent.name[len("chunk-") :]) * CHUNK_SIZE + int(path.stem[len("file-") :])
        if _episode_files(root, seed)[1].exists():
            seeds.add(seed)
    return seeds


def succeeded(root: str | Path, seed: int) -> bool:
    """Whether a committed episode ended in success. Raises DatasetError when its file is damaged or not ours."""
    path = _episode_files(Path(root), seed)[0]
    return _own_record(path, _read_parquet(path))["success"]


def merge(roots: Sequence[str | Path], root: str | Path) -> dict:
    """The episodes of several data sets in one new one, `root`; returns its info. Merging again adds what is new.

    Episodes keep their seeds, on which the split depends. Raises DatasetError where two have the same.
    """
    owner: dict[int, Path] = {}
    for source in map(Path, roots):
        if not (seeds := committed_seeds(source)):
            raise DatasetError(f"{source}: no committed episode. Collect some: {COLLECT}")
        if twice := sorted(seed for seed in seeds if seed in owner):
            raise DatasetError(
                f"{source} and {owner[twice[0]]} both have an episode of seed {twice[0]}. Collect one of them with "
                "another --first_seed."
            )
        owner |= dict.fromkeys(seeds, source)
    if strangers := sorted(committed_seeds(root) - owner.keys()):
        raise DatasetError(f"{root} holds other episodes already (seed {strangers[0]}). Choose another --name.")
    for seed, source in owner.items():
        data_file, video_file = _episode_files(source, seed)
        new_data, new_video = _episode_files(root, seed)
        if not (new_data.exists() and new_video.exists()):  # the video first, as in `write_episode`
            _write_atomic(new_video, video_file.read_bytes())
            _write_atomic(new_data, data_file.read_bytes())
    return finalize(root)


def finalize(root: str | Path) -> dict:
    """(Re)write `meta/` and the global columns from the committed episodes, in the order of their seeds; returns info.

    Killed at any point, it is repaired by the next call: info.json goes first and comes back last.
    """
    root = Path(root)
    seeds = sorted(committed_seeds(root))
    if not seeds:
        raise DatasetError(f"{root}: no committed episode. Collect some: {COLLECT}")
    _sweep(root, {path for seed in seeds for path in _episode_files(root, seed)})
    tables, records = [], []
    for seed in seeds:
        path = _episode_files(root, seed)[0]
        tables.append(_read_parquet(path))
        records.append(_own_record(path, tables[-1]))
    for seed, record in zip(seeds, records):
        for field in ("fps", "image_shape", "robot_type"):
            if record[field] != records[0][field]:
                raise DatasetError(
                    f"{_episode_files(root, seed)[0]}: {field} is {record[field]}, in the first episode "
                    f"{records[0][field]}. Delete it, or collect the new kind into a data set of its own."
                )
    (root / "meta/info.json").unlink(missing_ok=True)
    # Episodes collected before there was an environment state do not have it: then none keeps it, for one schema.
    names = [*VECTORS, *([ENVIRONMENT] if all(ENVIRONMENT in table.column_names for table in tables) else [])]

    tasks: dict[str, int] = {}  # instruction -> task_index, by first appearance
    rows, start = [], 0
    for number, (seed, table, record) in enumerate(zip(seeds, tables, records)):
        path, length = _episode_files(root, seed)[0], len(table)
        counters = {
            "episode_index": np.full(length, number),
            "index": np.arange(start, start + length),
            "task_index": np.repeat(
                [tasks.setdefault(text, len(tasks)) for text, _ in record["instructions"]],
                [count for _, count in record["instructions"]],
            ),
        }
        changed = [k for k, v in counters.items() if not np.array_equal(table[k].to_numpy(), v)]
        dropped = ENVIRONMENT in table.column_names and ENVIRONMENT not in names
        if dropped:
            table = table.drop_columns(ENVIRONMENT).replace_schema_metadata(_data_metadata(record, names))
        for name in changed:
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(counters[name], pa.int64()))
        if changed or dropped:
            _write_parquet(path, table)
        tables[number] = table
        rows.append(_episode_row(number, table, record, start))
        start += length

    info = _info(records[0], names, len(seeds), start, len(tasks))
    _write_parquet(root / "meta/tasks.parquet", _tasks_table(list(tasks)))
    _write_parquet(root / "meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(rows))
    _write_atomic(root / "meta/stats.json", _json(_total_statistics(pa.concat_tables(tables), records)))
    _write_atomic(root / "meta/info.json", _json(info))
    return info


def _sweep(root: Path, committed: set[Path]) -> None:
    """Remove what killed writers left of episodes committed since, and numbers whose video was deleted."""
    for temporary in root.rglob(".*.tmp"):
        if temporary.with_name(temporary.name[1:].rsplit(".", 2)[0]) in committed:
            temporary.unlink(missing_ok=True)
    for path in root.glob("data/chunk-*/file-*.parquet"):
        if path not in committed:
            path.unlink()


def encode_video(frames: np.ndarray, fps: int, crf: int = 18, gop: int = 2) -> bytes:
    """frames uint8 (T, H, W, 3), H and W even -> H.264 mp4, a key frame every `gop` frames (2: fast random access)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # Equal frames give equal bytes: one thread (collection runs a process per core anyway), and no macroblock tree,
        # which looks ahead only to the next key frame here, gains nothing and was seen to vary from run to run.
        options = {"crf": str(crf), "g": str(gop), "bf": "0", "threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        converter = VideoReformatter()
        for picture in frames:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(converter.reformat(rgb, format="yuv420p", interpolation=EXACT, threads=1)))
        container.mux(stream.encode())
    return buffer.getvalue()


def _check_episode(seed: int, frames: np.ndarray, vectors: dict[str, np.ndarray], instructions: Sequence[str]) -> None:
    if not 0 <= seed < CHUNK_SIZE * 1000:  # beyond it file names no longer sort like the seeds
        raise ValueError(f"seed {seed}: must be in [0, {CHUNK_SIZE * 1000})")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) == 0:
        raise ValueError(f"frames: expected uint8 (T, H, W, 3) with T > 0, got {frames.dtype} {frames.shape}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"frames: H.264 needs even height and width, got {frames.shape[1:3]}")
    for name, value in vectors.items():
        if np.shape(value) != (len(frames), len(_names(name))):
            raise ValueError(f"{name}: expected {(len(frames), len(_names(name)))}, got {np.shape(value)}")
        if not np.isfinite(value).all():
            raise ValueError(f"{name}: not finite in seed {seed}")
    if len(instructions) != len(frames):
        raise ValueError(f"instructions: expected {len(frames)}, got {len(instructions)}")


def _names(feature: str) -> tuple[str, ...]:
    return ENVIRONMENT_NAMES if feature == ENVIRONMENT else VECTORS[feature]


def _episode_files(root: str | Path, seed: int) -> tuple[Path, Path]:
    root, chunk = Path(root), {"chunk_index": seed // CHUNK_SIZE, "file_index": seed % CHUNK_SIZE}
    return root / DATA_PATH.format(**chunk), root / VIDEO_PATH.format(video_key=IMAGE_PREFIX + VIEW, **chunk)


def _write_atomic(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)  # not synced: what a power cut tears, the reader's checksums find
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> DatasetError:
    return DatasetError(
        f"cannot write {path}: {error.strerror}. What was committed before is intact: make room and run the same "
        "command again."
    )


def _write_parquet(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="snappy", write_page_checksum=True)
    _write_atomic(path, sink.getvalue().to_pybytes())


def _json(value: dict) -> bytes:
    return json.dumps(value, indent=4, ensure_ascii=False).encode()


def _vector_column(value: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(value.reshape(-1)), value.shape[1])


def _data_metadata(record: dict, vectors: list[str]) -> dict[bytes, bytes]:
    """The column types in the words of Hugging Face `datasets`, and our record of the episode."""
    features: dict = {
        name: {"feature": {"dtype": "float32", "_type": "Value"}, "length": len(_names(name)), "_type": "List"}
        for name in vectors
    }
    features["timestamp"] = {"dtype": "float32", "_type": "Value"}
    features |= {name: {"dtype": "int64", "_type": "Value"} for name in COUNTERS}
    return {
        b"huggingface": json.dumps({"info": {"features": features}}).encode(),
        RECORD_KEY: json.dumps(record).encode(),
    }


def _record(table: pa.Table) -> dict | None:
    content = (table.schema.metadata or {}).get(RECORD_KEY)
    return None if content is None else json.loads(content)


def _own_record(path: Path, table: pa.Table) -> dict:
    if (record := _record(table)) is None:
        raise DatasetError(f"{path} was not written by write_episode. Collect into another folder.")
    return record


def _tasks_table(tasks: list[str]) -> pa.Table:
    """LeRobot reads this with pandas and expects the instruction as the index."""
    index = "__index_level_0__"
    column = {"field_name": index, "name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    number = {"field_name": "task_index", "name": "task_index", "pandas_type": "int64", "numpy_type": "int64"}
    pandas = {"index_columns": [index], "column_indexes": [], "columns": [{**number, "metadata": None}, column]}
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), index: pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({b"pandas": json.dumps(pandas).encode()})


def _info(record: dict, vectors: list[str], episodes: int, frames: int, tasks: int) -> dict:
    height, width, channels = record["image_shape"]
    video = {
        "video.height": height,
        "video.width": width,
        "video.codec": "h264",
        "video.pix_fmt": "yuv420p",
        "video.is_depth_map": False,
        "video.fps": record["fps"],
        "video.channels": channels,
        "has_audio": False,
    }
    image = {"dtype": "video", "shape": record["image_shape"], "names": ["height", "width", "channels"], "info": video}
    features: dict = {IMAGE_PREFIX + VIEW: image}
    features |= {k: {"dtype": "float32", "shape": [len(_names(k))], "names": list(_names(k))} for k in vectors}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    features |= {name: {"dtype": "int64", "shape": [1], "names": None} for name in COUNTERS}
    return {
        "codebase_version": CODEBASE_VERSION,
        "robot_type": record["robot_type"],
        "total_episodes": episodes,
        "total_frames": frames,
        "total_tasks": tasks,
        "chunks_size": CHUNK_SIZE,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": record["fps"],
        "splits": {"train": f"0:{episodes}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": features,
    }


def _episode_row(number: int, table: pa.Table, record: dict, start: int) -> dict:
    length, key = len(table), IMAGE_PREFIX + VIEW
    chunk, file = divmod(record["seed"], CHUNK_SIZE)
    stats = {key: record["image_stats"]} | {name: _listed(_column(table, name)) for name in table.column_names}
    return {
        "episode_index": number,
        "tasks": list(dict.fromkeys(text for text, _ in record["instructions"])),
        "length": length,
        "seed": record["seed"],
        "success": record["success"],
        "data/chunk_index": chunk,
        "data/file_index": file,
        "dataset_from_index": start,
        "dataset_to_index": start + length,
        f"videos/{key}/chunk_index": chunk,
        f"videos/{key}/file_index": file,
        f"videos/{key}/from_timestamp": 0.0,
        f"videos/{key}/to_timestamp": length / record["fps"],
        **{f"stats/{name}/{k}": v for name, values in stats.items() for k, v in values.items()},
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }


def statistics(values: np.ndarray) -> dict[str, np.ndarray]:
    """values (N, D) -> {mean, std, min, max, q01, q10, q50, q90, q99}, each float64 (D,)."""
    values = np.asarray(values, np.float64)
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    moments = {"mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0)}
    return moments | dict(zip(QUANTILES, quantiles))


def _listed(values: np.ndarray) -> dict[str, list]:
    return {k: v.tolist() for k, v in statistics(values).items()} | {"count": [len(values)]}


def _image_statistics(frames: np.ndarray) -> dict[str, list]:
    """Per channel in [0, 1], shaped (3, 1, 1); from every 8th frame and 4th pixel: neighbours say the same."""
    sample = frames[::8, ::4, ::4].reshape(-1, 3) / 255
    return {k: v.reshape(3, 1, 1).tolist() for k, v in statistics(sample).items()} | {"count": [len(frames)]}


def _total_statistics(table: pa.Table, records: list[dict]) -> dict[str, dict[str, list]]:
    """Exact for numbers; images from the episodes' statistics, weighted by their lengths."""
    images = [record["image_stats"] for record in records]
    weights = np.array([image["count"][0] for image in images], np.float64)
    stacked = {k: np.array([image[k] for image in images]) for k in images[0] if k != "count"}  # (E, 3, 1, 1)
    total = {k: np.average(v, axis=0, weights=weights) for k, v in stacked.items()}
    second = np.average(stacked["std"] ** 2 + stacked["mean"] ** 2, axis=0, weights=weights)
    total["std"] = np.sqrt(np.maximum(second - total["mean"] ** 2, 0))
    total["min"], total["max"] = stacked["min"].min(0), stacked["max"].max(0)
    image = {k: v.tolist() for k, v in total.items()} | {"count": [int(weights.sum())]}
    return {IMAGE_PREFIX + VIEW: image} | {name: _listed(_column(table, name)) for name in table.column_names}


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Episode:
    start: int  # first frame in the data set's flat arrays
    length: int
    seed: int
    success: bool


@dataclass(frozen=True)
class Dataset:
    """A whole data set as flat arrays over N frames; `frames` is a read-only memory map shared between processes."""

    root: Path
    frames: np.ndarray  # uint8 (N, H, W, 3)
    proprio: np.ndarray  # float32 (N, P)
    action: np.ndarray  # float32 (N, A), what the expert would do
    executed: np.ndarray  # float32 (N, A), what was done
    task: np.ndarray  # int64 (N,), into `instructions`
    instructions: tuple[str, ...]
    episodes: tuple[Episode, ...]
    stats: dict[str, dict[str, np.ndarray]]  # {proprio, action, executed} -> see `statistics`
    view: str
    fps: int
    hash: str  # of everything above
    environment: np.ndarray | None = None  # float32 (N, 6), see `interfaces.ENVIRONMENT_NAMES`; None: not recorded

    @property
    def num_frames(self) -> int:
        return len(self.proprio)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.frames.shape[1:]

    def split(self, name: str) -> tuple[Episode, ...]:
        """Episodes of "train", "validation" or "all". An episode's side depends on its seed alone, so it keeps it when
        the data set grows; only where chance leaves a side empty, one episode moves there."""
        if name == "all":
            return self.episodes
        if name not in ("train", "validation"):
            raise ValueError(f'split "{name}": must be train, validation or all')
        ranked = sorted(self.episodes, key=lambda episode: (_seed_rank(episode.seed), episode.start))
        held_out = sum(_seed_rank(episode.seed) < VALIDATION_PERCENT / 100 for episode in ranked)
        held_out = min(max(held_out, 1), len(ranked) - 1)  # a single episode is for training
        chosen = ranked[held_out:] if name == "train" else ranked[:held_out]
        return tuple(sorted(chosen, key=lambda episode: episode.start))


def open_dataset(root: str | Path, view: str | None = None) -> Dataset:
    """Read and check a LeRobot v3.0 data set; decodes its videos once into `<root>/.cache`.

    view: which camera; default "overhead", or the only one. Raises DatasetError naming the file and the remedy.
    """
    root = Path(root)
    info = _read_info(root)
    view, image_shape = _choose_view(root, info, view)
    names = [name for name in VECTORS if name in info["features"]]
    if info["features"].get(ENVIRONMENT, {}).get("names") == list(ENVIRONMENT_NAMES):  # others record other things
        names.append(ENVIRONMENT)
    rows = _read_episodes(root)
    fps, key = info["fps"], IMAGE_PREFIX + view
    videos: dict[Path, list[tuple[int, int, int]]] = {}  # file -> (first frame in the file, length, start)
    for row in rows:
        path = _file(root, info["video_path"], row, f"videos/{key}", video_key=key)
        first = round(row[f"videos/{key}/from_timestamp"] * fps)
        videos.setdefault(path, []).append((first, row["length"], row["dataset_from_index"]))
    digests = {path: _sha256(path) for path in videos}

    columns: dict[str, list[np.ndarray]] = {name: [] for name in [*names, "index", "task_index"]}
    for path in dict.fromkeys(_file(root, info["data_path"], row, "data") for row in rows):
        digests[path] = _sha256(path)
        table = _read_parquet(path)
        for name, parts in columns.items():
            parts.append(_checked_column(path, table, name, info["features"][name]["shape"][0]))
        if (record := _record(table)) is not None:
            video = _episode_files(root, record["seed"])[1]
            if digests.get(video, record["video_sha256"]) != record["video_sha256"]:
                raise DatasetError(f"{video} is not the video that was recorded. {RECOLLECT}")
    flat = {name: np.concatenate(parts) for name, parts in columns.items()}

    order = np.argsort(flat.pop("index")[:, 0], kind="stable")
    ends = np.cumsum([row["length"] for row in rows])
    if [row["dataset_to_index"] for row in rows] != ends.tolist() or len(order) != ends[-1]:
        raise DatasetError(f"{root}: meta/ and data/ disagree. {REBUILD}")
    flat = {name: value[order] for name, value in flat.items()}
    task = flat["task_index"][:, 0]
    instructions = _read_tasks(root)
    if task.min() < 0 or task.max() >= len(instructions):
        raise DatasetError(f"{root}/meta/tasks.parquet lacks instructions that data/ refers to. {REBUILD}")

    content = [info["features"], fps, view, instructions, list(digests.values())]
    content_hash = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    arrays = {
        "proprio": flat["observation.state"],
        "action": flat["action"],
        "executed": flat.get("action.executed", flat["action"]),
    }
    return Dataset(
        root=root,
        frames=_cached_frames(root, content_hash, videos, (len(order), *image_shape)),
        **arrays,
        task=task,
        instructions=instructions,
        episodes=tuple(
            Episode(row["dataset_from_index"], row["length"], row.get("seed", number), row.get("success", True))
            for number, row in enumerate(rows)
        ),
        stats={name: statistics(value) for name, value in arrays.items()},
        view=view,
        fps=fps,
        hash=content_hash,
        environment=flat.get(ENVIRONMENT),
    )


def decode_video(path: str | Path) -> Iterator[np.ndarray]:
    """The frames of an mp4 in order, each uint8 (H, W, 3). Raises DatasetError when it does not decode."""
    try:
        with av.open(str(path)) as container:
            converter = VideoReformatter()  # `picture.to_ndarray("rgb24")` sets one up per picture, at half the speed
            for picture in container.decode(video=0):
                yield converter.reformat(picture, format="rgb24", interpolation=EXACT, threads=1).to_ndarray()
    except (av.FFmpegError, IndexError) as error:  # IndexError: no video stream
        raise DatasetError(f"{path} does not decode ({error}). {RECOLLECT}") from error


def _cached_frames(root: Path, content_hash: str, videos: dict, shape: tuple[int, ...]) -> np.ndarray:
    """All frames as one memory map. The first process decodes, others starting meanwhile wait for it at the lock."""
    path = root / ".cache" / f"frames-{content_hash[:16]}.npy"
    try:
        path.parent.mkdir(exist_ok=True)
        with open(path.with_name("lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_cache(path, shape):
                for stale in path.parent.glob("*frames-*"):  # of an earlier state; a process that maps one keeps it
                    stale.unlink()
                _decode_all(path, videos, shape)
    except OSError as error:
        raise _refused(path, error) from error
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _is_cache(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        frames = np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError):  # ValueError: truncated
        return False
    return frames.shape == shape and frames.dtype == np.uint8


def _decode_all(path: Path, videos: dict[Path, list[tuple[int, int, int]]], shape: tuple[int, ...]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        # Plain writes: a full disk is an error here, but kills the process (SIGBUS) when written through a memory map.
        with open(temporary, "wb", buffering=0) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            offset, size = file.tell(), int(np.prod(shape[1:]))
            for video, spans in track(videos.items(), f"decoding {len(videos)} videos (once)", transient=True):
                target = np.full(max(first + length for first, length, _ in spans), -1)  # frame in file -> in data set
                for first, length, start in spans:
                    target[first : first + length] = np.arange(start, start + length)
                count = 0
                for frame, picture in zip(target, decode_video(video)):
                    if picture.shape != shape[1:]:
                        raise DatasetError(
                            f"{video}: frames are {picture.shape}, info.json says {shape[1:]}. {RECOLLECT}"
                        )
                    if frame >= 0:
                        file.seek(offset + int(frame) * size)
                        file.write(picture.tobytes())
                    count += 1
                if count < len(target):
                    raise DatasetError(f"{video} has {count} frames where {len(target)} are needed. {RECOLLECT}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_info(root: Path) -> dict:
    path = root / "meta/info.json"
    if not path.exists():
        reason = "collected but not finalized" if committed_seeds(root) else "not there"
        raise DatasetError(f"data set {root} is {reason} (no {path}). Run: {COLLECT}")
    try:
        info = json.loads(path.read_bytes())
        version = info["codebase_version"]
        _ = info["features"], info["fps"], info["data_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path} is damaged ({error!r}). {REBUILD}") from error
    if version != CODEBASE_VERSION:
        raise DatasetError(
            f"{path}: codebase_version {version}; convert the data set to {CODEBASE_VERSION} with LeRobot"
        )
    for name, feature in info["features"].items():
        if name in VECTORS and len(feature["shape"]) != 1:
            raise DatasetError(f"{path}: feature {name} has shape {feature['shape']}, expected one dimension")
    if missing := {"observation.state", "action"} - set(info["features"]):
        raise DatasetError(f"{path}: no feature {sorted(missing)}; training needs it")
    if (
        info["features"].get("action.executed", info["features"]["action"])["shape"]
        != info["features"]["action"]["shape"]
    ):
        raise DatasetError(f"{path}: action.executed and action differ in shape")
    return info


def _choose_view(root: Path, info: dict, view: str | None) -> tuple[str, tuple[int, int, int]]:
    features = info["features"]
    views = [k[len(IMAGE_PREFIX) :] for k in features if k.startswith(IMAGE_PREFIX) and features[k]["dtype"] == "video"]
    if view is None:
        view = views[0] if len(views) == 1 else VIEW
    if view not in views:
        raise DatasetError(f'{root}/meta/info.json: no video of view "{view}"; there is {views}. Name one of them.')
    return view, tuple(features[IMAGE_PREFIX + view]["shape"])


def _read_episodes(root: Path) -> list[dict]:
    rows = []
    for path in sorted(root.glob("meta/episodes/chunk-*/file-*.parquet")):
        table = _read_parquet(path, REBUILD)
        rows += table.select([name for name in table.column_names if not name.startswith("stats/")]).to_pylist()
    if not rows:
        raise DatasetError(f"{root}/meta/episodes has no episode. {REBUILD}")
    return sorted(rows, key=lambda row: row["episode_index"])


def _read_tasks(root: Path) -> tuple[str, ...]:
    table = _read_parquet(root / "meta/tasks.parquet", REBUILD)
    (text,) = (name for name in table.column_names if name != "task_index")
    order = np.argsort(table["task_index"].to_numpy())
    return tuple(np.array(table[text].to_pylist(), dtype=object)[order])


def _file(root: Path, template: str, row: dict, kind: str, **names: str) -> Path:
    numbers = {name: row[f"{kind}/{name}"] for name in ("chunk_index", "file_index")}
    return root / template.format(**numbers, **names)


def _read_parquet(path: Path, remedy: str = "") -> pa.Table:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True).read()
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} does not read ({error}). {remedy or RECOLLECT}") from error


def _checked_column(path: Path, table: pa.Table, name: str, width: int) -> np.ndarray:
    if name not in table.column_names:
        raise DatasetError(f"{path}: no column {name}. {RECOLLECT}")
    values = _column(table, name)
    if values.shape != (len(table), width):
        raise DatasetError(f"{path}: {name} has shape {values.shape}, expected {(len(table), width)}. {RECOLLECT}")
    if not np.isfinite(values).all():
        raise DatasetError(f"{path}: {name} is not finite. {RECOLLECT}")
    return values


def _column(table: pa.Table, name: str) -> np.ndarray:
    """float32 (N, D), or int64 for counters; scalars have D = 1."""
    column = table[name].combine_chunks()
    if not pa.types.is_primitive(column.type):
        column = column.flatten()
    values = column.to_numpy(zero_copy_only=False)
    values = values.astype(np.float32 if values.dtype.kind == "f" else np.int64, copy=False)
    return values.reshape(len(table), -1) if len(values) % len(table) == 0 else values  # ragged: the caller complains


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DatasetError(f"{path} does not read ({error.strerror}). {RECOLLECT}") from error


def _seed_rank(seed: int) -> float:
    """A fixed number in [0, 1) per seed."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "big") / 2**64


# ---------------------------------------------------------------------------------------------------------- windows


@dataclass(frozen=True)
class Windows:
    """Training slices, one per frame of a split ("now"). Offsets count control steps from now."""

    dataset: Dataset
    past: tuple[int, ...]
    future: tuple[int, ...]
    horizon: int
    now: np.ndarray  # int64 (W,), flat frame numbers
    first: np.ndarray  # int64 (W,), first frame of the window's episode
    last: np.ndarray  # int64 (W,), last frame
    latents: np.ndarray | None = None  # float16, see `latents.cached`: (N, h, w, C), or (N, T, h, w, C) of whole clips

    def __len__(self) -> int:
        return len(self.now)

    def __getitem__(self, index: int) -> dict:
        return {name: value[0] for name, value in self.gather([index]).items()}

    def gather(self, indices: Sequence[int] | np.ndarray) -> dict:
        """indices (B,) -> a batch; T = len(past) + len(future), H = horizon.

        video uint8 (B, T, H, W, 3), video_mask bool (B, T), proprio (B, P), action and executed (B, H, A),
        action_mask bool (B, H), instruction: B strings, index int64 (B,); where cached, latents (B, T, h, w, C).
        Frames before the episode repeat its first one, as in the control loop; what lies beyond its end repeats the
        last and is masked out. So are the actions after a change of instruction: nobody can foresee it, and a policy
        that waits for it must not learn to guess.
        """
        indices = np.asarray(indices, np.int64)
        now, first, last = (array[indices, None] for array in (self.now, self.first, self.last))  # (B, 1)
        frame = now + np.array(self.past + self.future, np.int64)  # (B, T)
        step = now + np.arange(self.horizon)  # (B, H)
        clamped = np.minimum(step, last)
        data = self.dataset
        arrays = {
            "video": data.frames[np.clip(frame, first, last)],
            "video_mask": frame <= last,
            "proprio": data.proprio[now[:, 0]],
            "action": data.action[clamped],
            "executed": data.executed[clamped],
            "action_mask": (step <= last) & (data.task[clamped] == data.task[now]),
            "index": indices,
        }
        if self.latents is not None:  # (B, T, h, w, C)
            whole_clips = self.latents.ndim == 5
            arrays["latents"] = self.latents[now[:, 0] if whole_clips else np.clip(frame, first, last)]
        batch: dict = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
        return batch | {"instruction": [data.instructions[task] for task in data.task[now[:, 0]]]}


def windows(
    dataset: Dataset,
    past: Sequence[int] = (0,),
    future: Sequence[int] = (4, 8),
    horizon: int = 8,
    split: str = "train",
) -> Windows:
    """One window per frame of the split. past: offsets <= 0, future: offsets > 0, both increasing."""
    offsets = [*past, *future]
    if offsets != sorted(set(offsets)) or any(o > 0 for o in past) or any(o <= 0 for o in future) or horizon < 1:
        raise ValueError(f"past {past} (<= 0) and future {future} (> 0) must increase, horizon {horizon} be positive")
    episodes = dataset.split(split)
    if not episodes:
        raise DatasetError(f"{dataset.root}: no episode in split {split}. Collect more: {COLLECT}")
    starts = np.array([episode.start for episode in episodes], np.int64)
    lengths = np.array([episode.length for episode in episodes], np.int64)
    return Windows(
        dataset=dataset,
        past=tuple(past),
        future=tuple(future),
        horizon=horizon,
        now=np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths)]),
        first=np.repeat(starts, lengths),
        last=np.repeat(starts + lengths - 1, lengths),
    )


def batch_indices(num_windows: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The windows of batch `step`, int64 (batch_size,): a slice of one endless row of shuffled epochs."""
    begin, end = step * batch_size, (step + 1) * batch_size
    epochs = range(begin // num_windows, (end - 1) // num_windows + 1)
    row = np.concatenate([_permutation(num_windows, seed, epoch) for epoch in epochs])
    return row[begin - epochs[0] * num_windows :][:batch_size]


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def batches(windows: Windows, batch_size: int, seed: int, start_step: int = 0) -> Iterator[dict]:
    """Endless batches (see `Windows.gather`). Batch k depends on (seed, k) alone: resuming is `start_step=k`."""
    for step in itertools.count(start_step):
        yield windows.gather(batch_indices(len(windows), batch_size, seed, step))
