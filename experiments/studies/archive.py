"""What a study has measured, in one small file: enough for its page and to go on with it elsewhere. Weights, videos and
training curves stay behind, so a training is made again only where something that needs it was not measured."""

import io
import json
import zipfile
import zlib
from pathlib import Path

from . import plan
from .plan import Job, Study

BEGAN = (1980, 1, 1, 0, 0, 0)  # of every member: the same content gives the same file


def measured(study: Study) -> dict[str, Job]:
    """{output: job} of all that the study may come to measure."""
    jobs = plan.jobs(study, plan.points(study, study.looks[-1]))
    return {job.output: job for job in jobs if job.kind in plan.MEASURED}


def record(study: Study, job: Job) -> str:
    """Where the runner notes what a job was and took."""
    return f"{study.root}/jobs/{job.name}.json"


def keep(study: Study, path: str | Path) -> int:
    """Write the archive; returns how many measurements are in it. Raises ValueError where there is none yet."""
    from selfflow_robot.checkpoint import write_atomic  # brings torch along, which the rest of a study does without

    files, jobs = {}, measured(study)
    for output, job in jobs.items():
        if plan.done(job):
            files[output] = Path(output).read_bytes()
            if (noted := Path(record(study, job))).exists():
                content = json.loads(noted.read_text())
                content.pop("host", None)  # nobody else's business
                files[str(noted)] = json.dumps(content).encode()
    count = len(files.keys() & jobs.keys())
    if not count:
        raise ValueError(f"study {study.name}: nothing was measured yet, so there is nothing to keep")
    if (plans := study.own / "plans.json").exists():
        files[str(plans)] = plans.read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, BEGAN), content, zipfile.ZIP_DEFLATED)
    write_atomic(Path(path), buffer.getvalue())
    return count


def take(study: Study, path: str | Path) -> int:
    """Put the measurements of an archive where the study looks for them; returns how many were new.

    Raises ValueError before anything is written: for a damaged archive, one of another study, and where something else
    was measured here under the same name.
    """
    from selfflow_robot.checkpoint import write_atomic

    outputs = measured(study)
    expected = {*outputs, *(record(study, job) for job in outputs.values()), str(study.own / "plans.json")}
    try:
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        for content in files.values():
            json.loads(content)
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error!r}): get it again, or make it with --keep") from error
    if foreign := sorted(files.keys() - expected):
        raise ValueError(f"{path} holds {foreign[0]}, which is no measurement of the study {study.name}")
    new = {name: content for name, content in files.items() if not Path(name).exists()}
    for name in files.keys() & outputs.keys() - new.keys():
        if Path(name).read_bytes() != files[name]:
            raise ValueError(f"{name} was measured here too, and is another one in {path}: remove one of the two")
    for name, content in new.items():
        write_atomic(Path(name), content)
    return len(new.keys() & outputs.keys())
