"""A submission lays claim to the directories of its runs, so that no two jobs train in one.

A claim is worth as much as the job that it names: who finds one asks SLURM.
"""

from pathlib import Path
from typing import Any, Dict, List, Optional

from ..cluster import slurm
from ..errors import UserError
from ..files import read_json, write_json

EVALUATION = "-evaluation"  # the evaluations' job is named as the submission, and so


def claim_path(run: Path) -> Path:
    """The file beside a run's directory that holds its claim."""
    return run.with_name(f".{run.name}.job")


def read_claim(run: Path) -> Optional[Dict[str, Any]]:
    """{"submission": NAME, "task": number in its arrays}; None if nobody has laid claim."""
    path = claim_path(run)
    claim: Optional[Dict[str, Any]] = read_json(path) if path.is_file() else None
    if claim is not None and not (isinstance(claim, dict) and isinstance(claim.get("submission"), str)
                                  and isinstance(claim.get("task"), int)):
        raise UserError(f"{path} does not say which job it belongs to; if none does, remove it")
    return claim


def write_claim(run: Path, submission: str, task: int) -> Path:
    """Lays claim to a run; gives the file."""
    claim_path(run).parent.mkdir(parents=True, exist_ok=True)
    write_json(claim_path(run), {"submission": submission, "task": task})
    return claim_path(run)


def jobs_of(run: Path, queue: slurm.Queue) -> List[slurm.Task]:
    """The jobs of the queue (slurm.tasks()) that train a run and that evaluate it, as far as they have not ended."""
    claim = read_claim(run)
    found = [queue.get((claim["submission"] + kind, claim["task"])) for kind in ("", EVALUATION)] if claim else []
    return [job for job in found if job]
