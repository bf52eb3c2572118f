"""What an evaluation is given, and what it gives back."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, TextIO

from ..progress import Progress
from ..recipes import check_outputs
from ..tools import call

Command = List[str]


def words_of(options: Mapping[str, object]) -> List[str]:
    """Options of a command line: True stands for an option without a value, None for one that is left out."""
    given = [(name, value) for name, value in options.items() if value is not None]
    return [word for name, value in given for word in ([name] if value is True else [name, str(value)])]


@dataclass(frozen=True)
class Job:
    """A run to be evaluated on a subset of its benchmark."""

    config: Any  # the run's resolved configuration
    checkpoints: Sequence[Path]  # those to be averaged, oldest first
    subset: str
    data: Path  # the prepared data
    stamp: Dict[str, Any]  # prepared.json
    lock: TextIO  # of the run, which the programs that are started hold, too

    def check_data(self, *texts: str) -> None:
        """Refuses if a file that the evaluation reads is missing or not what was prepared.

        Args:
            texts: beginnings of the names of those that it reads beside the binarized ones
        """
        check_outputs(self.data, self.stamp, "data-bin/dict.", f"data-bin/{self.subset}.", *texts)

    def averaged(self, directory: Path) -> "Averaged":
        """Averages the checkpoints into averaged.pt in a directory."""
        names = [path.name for path in self.checkpoints]
        path = directory / "averaged.pt"
        command = [sys.executable, "-m", "fairseq_powernorm.checkpoint", "average", "--inputs"]
        command += [*map(str, self.checkpoints), "--output", str(path)]
        print(f"averaging {len(names)} checkpoints: {names[0]} ... {names[-1]}", flush=True)
        call(command, self.lock)
        return Averaged(path, command)


class Matches:
    """Counts what a program's lines show of its work.

    pattern: of what is counted, as often as a line has it; progress: is told how often that has been
    """

    def __init__(self, pattern: str, progress: Progress):
        self.pattern, self.progress, self.found = re.compile(pattern), progress, 0

    def count(self, line: str) -> None:
        """The next line."""
        self.found += len(self.pattern.findall(line))
        self.progress.reach(self.found)


class Averaged(NamedTuple):
    """An averaged model, and the command that made it."""

    path: Path
    command: Command


class Scores(NamedTuple):
    """What an evaluation adds to the record of a run, and the commands that it ran."""

    facts: Dict[str, Any]
    commands: List[Command]
