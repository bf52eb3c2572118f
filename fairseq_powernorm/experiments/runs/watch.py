"""Where else a run's curves go: to TensorBoard's files, to Weights & Biases.

Nothing of this is a setting of the run: neither its overrides nor its record have it, and sessions may differ in it.
"""

import importlib.util
import os
import re
import secrets
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, Tuple

from ..directories import check_writable
from ..errors import UserError
from ..overrides import quote
from ..paths import for_fairseq
from ..settings import recipe

#: option -> (packages, one of which it needs; what to install)
NEEDED: Dict[str, Tuple[Tuple[str, ...], str]] = {
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "wandb": (("wandb",), "wandb"),
}
#: what wandb takes as a project
PROJECT = re.compile(r"[^/\\#?%:]{1,128}")
#: in run.json: by what wandb knows the run
ID = re.compile(r"[0-9a-f]{16}")


def check(options: Namespace) -> None:
    """Refuses --tensorboard and --wandb where they cannot do what they say; makes a directory's path absolute."""
    for name, (packages, install) in NEEDED.items():
        if getattr(options, name) is not None and not any(map(_is_installed, packages)):
            raise UserError(f"--{name}: {sys.executable} has no {' or '.join(packages)}; install it with: "
                            f"pip install {install}")
    if options.tensorboard:
        options.tensorboard = os.path.abspath(options.tensorboard)
        check_writable("--tensorboard", for_fairseq("--tensorboard", Path(options.tensorboard)))
    project = options.wandb
    if project is not None and not (PROJECT.fullmatch(project) and project.isprintable() and project.strip() == project):
        raise UserError(f"--wandb {project!r}: must be a project's name, without / \\ # ? % : and at most 128 characters")


def _is_installed(package: str) -> bool:
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None  # a folder of that name is no package


def words(options: Namespace) -> List[str]:
    """The same options, checked, as words of a command line."""
    found = []
    if options.tensorboard is not None:
        found.append(f"--tensorboard={options.tensorboard}".rstrip("="))
    if options.wandb is not None:
        found.append(f"--wandb={options.wandb}")
    return found


def overrides(options: Namespace, run: Path) -> List[str]:
    """What fairseq is told of it."""
    found = []
    if options.tensorboard is not None:  # a relative path is one in the run's directory, where hydra goes
        place = Path(options.tensorboard, recipe(options.benchmark).name, run.name) if options.tensorboard else "tensorboard"
        found.append(f"common.tensorboard_logdir={quote(place)}")
    if options.wandb is not None:
        found.append(f"common.wandb_project={quote(options.wandb)}")
    return found


def environment(options: Namespace, run: Path, facts: Dict[str, Any]) -> Dict[str, str]:
    """What wandb is told of the run, as far as the user's environment does not say it.

    Args:
        facts: run.json, which remembers by what wandb knows the run: a session that goes on with it finds it again
    """
    if options.wandb is None:
        return {}
    if not ID.fullmatch(facts.get("wandb", "")):
        facts["wandb"] = secrets.token_hex(8)
    group = f"{recipe(options.benchmark).name}/{re.sub('-seed[0-9]+$', '', run.name)}"
    own = {"WANDB_NAME": run.name, "WANDB_RUN_GROUP": group, "WANDB_RUN_ID": facts["wandb"], "WANDB_RESUME": "allow",
           "WANDB_DIR": str(run)}
    return {name: os.environ.get(name) or value for name, value in own.items()}
