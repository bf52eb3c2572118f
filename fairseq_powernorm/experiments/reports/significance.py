"""Paired bootstrap tests of runs against LN of the same seed."""

from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from ..errors import UserError
from ..evaluation import score
from .matrix import BASELINE, Run
from .table import Record, is_lm_record

#: {"against", "baseline", "score", "p_value", "signature"}
Test = Dict[str, Any]


def significance(
    runs: Sequence[Run], records: Mapping[str, Record], known: Optional[Mapping[str, Test]] = None
) -> Dict[str, Test]:
    """The test of each run, by its key.

    Args:
        records: by the key of their runs
        known: tests of an earlier report; they are kept as long as their scores are those of the records, the others are
            computed from the translations, where these are there
    """
    known = known or {}
    tests: Dict[str, Test] = {}
    for baseline in runs:
        if baseline.row.norm != BASELINE or is_lm_record(records[baseline.key]):
            continue
        others = {
            run.key: run
            for run in runs
            if (run.benchmark, run.arch, run.seed) == (baseline.benchmark, baseline.arch, baseline.seed)
            and run.row.norm != BASELINE
        }

        def belongs(test: Test, key: str, against: str = baseline.key) -> bool:
            """Is the test one of these two records?"""
            return test["against"] == against and all(
                abs(test[which] - records[name]["sacrebleu"]["score"]) < 1e-9
                for which, name in (("score", key), ("baseline", against))
            )

        tests.update({key: known[key] for key in others if key in known and belongs(known[key], key)})
        texts = {key: lines(run, "hyp.detok") for key, run in others.items() if key not in tests}
        systems = {key: text for key, text in texts.items() if text}
        ours, reference = lines(baseline, "hyp.detok"), lines(baseline, "ref.detok")
        if not systems or not ours or not reference:
            continue
        for run in (baseline, *(others[key] for key in systems)):
            found_lines = len(systems.get(run.key, ours))
            if found_lines != len(reference):
                raise UserError(f"{translations(run)} has {found_lines:,} lines, but the reference {len(reference):,}; "
                                f"without it the run is not tested")
        print(f"testing {len(systems)} runs against {baseline.key} (paired bootstrap)", flush=True)
        lowercase = "case:lc" in records[baseline.key]["sacrebleu"]["signature"]
        for key, found in score.paired_bootstrap(ours, systems, reference, lowercase=lowercase).items():
            test = {"against": baseline.key, **found}
            if belongs(test, key):  # else the translations are not those of the record
                tests[key] = test
    return tests


def lines(run: Run, name: str) -> Optional[List[str]]:
    """A text that the evaluation of a run left; None if it is not there."""
    path = translations(run, name)
    return score.lines_of(path) if path.is_file() else None


def translations(run: Run, name: str = "hyp.detok") -> Path:
    """Where the evaluation of a run leaves a text."""
    return run.directory / "evaluation" / name
