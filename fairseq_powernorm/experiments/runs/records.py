"""What a run's directory says of itself: run.json, finished.json. It may be somebody else's, and is checked."""

from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from .. import trust
from ..errors import UserError
from ..files import read_json
from ..own import is_language, is_name
from ..recipes import LM_TASK, benchmarks
from ..reports.schema import NUMBER, RECIPE, ObjectOf, OrNull, problems
from ..settings import BPE_TYPES
from ..trust import WRITTEN as WRITTEN

SCHEMA = 1
SESSION = {
    "command": [str], "threads": int, "ranks?": int, "job?": str, "restart?": int, "wall_s": OrNull(NUMBER),
    "cpu_s": OrNull(NUMBER), "exit_status": OrNull(int), "diverged?": str,
}
RUN = {
    "schema": {SCHEMA}, "benchmark": str, "arch?": str, "norm": str, "placement": str, "prepared_sha256": str,
    "overrides": [str], "recipe?": RECIPE, "sessions": [SESSION], "parameters?": int, "wandb?": str,
}
FINISHED = {"updates": int, "overrides": [str]}

#: what an evaluation reads of config.yaml, beside texts and numbers that fairseq's commands check themselves
SETTINGS: Dict[str, Dict[str, Any]] = {
    "common": {"seed": int}, "model": {"_name": str, "decoder_norm_self": str}, "task": {"_name": str},
    "checkpoint": {"keep_last_epochs": int, "keep_interval_updates": int, "no_epoch_checkpoints": bool,
                   "best_checkpoint_metric": str},
}
#: the same of translation, and of language models
OF_TRANSLATION: Dict[str, Dict[str, Any]] = {
    "task": {"source_lang": str, "target_lang": str}, "dataset": {"max_tokens": OrNull(int)},
    "generation": {"beam": int, "lenpen": NUMBER, "max_len_a": NUMBER, "max_len_b": int},
}
OF_LM: Dict[str, Dict[str, Any]] = {
    "task": {"tokens_per_sample": int, "add_bos_token": bool},
    "eval_lm": {"context_window": int, "softmax_batch": int},
    "dataset": {"batch_size_valid": OrNull(int), "max_tokens_valid": OrNull(int)},
}

#: what it reads of prepared.json
STAMP_OF_TRANSLATION: Dict[str, Any] = {
    "settings": {"languages": [str], "bpe": set(BPE_TYPES), "lowercase": bool}, "sentences": ObjectOf(int),
    "outputs": ObjectOf(str),
}
STAMP_OF_LM: Dict[str, Any] = {"types": int, "published": bool, "outputs": ObjectOf(str)}

Facts = Dict[str, Any]


def read_run(run: Path, own: Optional[Mapping[str, Optional[str]]] = None) -> Facts:
    """run.json of a run.

    Args:
        own: keys that overrides cannot have, see :func:`.trust.check_overrides`

    Raises:
        UserError: there is none, it is not what train.sh writes, or its overrides are more than settings' values
    """
    path = run / "run.json"
    if not path.is_file():
        raise UserError(f"run directory {str(run)!r} was not made by scripts/train.sh: it has no run.json")
    facts: Facts = _checked(path, RUN)
    own = trust.OURS if own is None else own
    if "recipe" not in facts and facts["benchmark"] not in benchmarks():
        raise UserError(f"{path}: benchmark {facts['benchmark']!r} is unknown; valid: {', '.join(benchmarks())}")
    for name in (facts["benchmark"], data_of(facts)):
        if not is_name(name):
            raise UserError(f"{path}: {name!r} is no name of data or of a run")
    trust.check_overrides(facts.get("recipe", {}).get("overrides", []), own, str(path))
    facts["overrides"] = trust.check_stored(facts["overrides"], own, str(path))
    return facts


def data_of(facts: Facts) -> str:
    """The name of the data that a run is trained on."""
    return str(facts["recipe"]["data"] if "recipe" in facts else facts["benchmark"])


def read_finished(run: Path) -> Optional[Facts]:
    """finished.json of a run; None if its training is not complete."""
    path = run / "finished.json"
    if not path.is_file():
        return None
    finished = _checked(path, FINISHED)
    return {**finished, "overrides": trust.of_training(finished["overrides"])}


def check_stamp(stamp: Mapping[str, Any], path: Path, *, lm: bool) -> None:
    """Refuses a prepared.json that lacks what an evaluation reads, or has something else there."""
    kinds = STAMP_OF_LM if lm else STAMP_OF_TRANSLATION
    part = {key: stamp[key] for key in kinds if key in stamp}
    if not lm:
        part["settings"] = {key: value for key, value in stamp["settings"].items() if key in kinds["settings"]}
    found = problems(part, kinds)
    languages = part["settings"]["languages"] if not found and not lm else ["de", "en"]
    if len(languages) != 2 or not all(map(is_language, languages)):
        found = [f"settings.languages is {languages!r}, not two languages"]
    if found:
        raise UserError(f"{path} was not written by scripts/prepare.sh: {found[0]}; prepare the data again")


def check_settings(content: Any, path: Path) -> None:
    """Refuses the content of a config.yaml that lacks what an evaluation reads, or has something else there."""
    found = _problems_of_part(content, SETTINGS)
    if not found:
        found = _problems_of_part(content, OF_LM if content["task"]["_name"] == LM_TASK else OF_TRANSLATION)
    if found:
        raise UserError(f"{path} was not written by scripts/train.sh: {found[0]}")


def _problems_of_part(content: Any, kinds: Dict[str, Dict[str, Any]]) -> List[str]:
    """What is wrong with those settings of a configuration that are named."""
    if not isinstance(content, dict):
        return problems(content, kinds)
    part = {group: {key: value for key, value in content[group].items() if key in kinds[group]}
            if isinstance(content[group], dict) else content[group] for group in kinds if group in content}
    return problems(part, kinds)


def diverged(facts: Facts) -> Optional[str]:
    """Why the last session of a run ended as diverged, None if it did not."""
    reason: Optional[str] = facts["sessions"][-1].get("diverged") if facts["sessions"] else None
    return reason


def _checked(path: Path, kind: Any) -> Facts:
    content: Facts = read_json(path)
    found = problems(content, kind)
    if found:
        raise UserError(f"{path} was not written by scripts/train.sh: {found[0]}")
    return content
