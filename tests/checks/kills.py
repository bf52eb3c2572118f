"""See kills.sh: kills the scripts at random moments, and goes on with them until they end.

Each time the process that a user would kill gets SIGKILL, SIGTERM or SIGINT; afterwards nothing of it may be at work, what
scripts/status.sh says must be what the checkpoints hold, and in the end every record must be that of a run that nothing
disturbed: parameters, statistics, curve and scores, to the last bit.
"""

import argparse
import datetime
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, List, Sequence

import torch

from fairseq_powernorm.checkpoint import load
from fairseq_powernorm.experiments.evaluation.evaluate import commit
from fairseq_powernorm.experiments.tools import TOOLS, cpus, versions
from fairseq_powernorm.resume import num_updates

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
SETTINGS = ["optimization.max_update=60", "checkpoint.save_interval_updates=5", "dataset.validate_interval_updates=5",
            "checkpoint.keep_interval_updates=3", "common.log_interval=5", "lr_scheduler.warmup_updates=20",
            "generation.max_len_b=20", "generation.beam=2", "+model.encoder_layers=1", "+model.decoder_layers=1",
            "common.cpu=true"]
#: what differs from one run to the next: times, commands with the sessions' paths, checksums of files that hold times; and
#: the training loss of an epoch, of which a session that is killed leaves a part only
DIFFERING = ("tokens_per_s", "training", "commands", "checkpoints")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and the signals")
    parser.add_argument("--record", metavar="FILE", help="write what was done and seen to FILE")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, by what is started as well
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        check = Check(Path(home), random.Random(options.seed))
        check.all(options.kills)
    check.say(f"{options.kills} kills, and the same results to the last bit")
    if options.record:
        head = (f"# tests/checks/kills.sh --kills {options.kills} --seed {options.seed}\n\n{datetime.date.today()}, Python "
                f"{platform.python_version()}, {', '.join(f'{name} {number}' for name, number in versions(TOOLS).items())}, "
                f"{cpus()} processors; commit {commit()}; {time.monotonic() - begin:.0f} s\n\n")
        Path(options.record).parent.mkdir(parents=True, exist_ok=True)
        Path(options.record).write_text(head + "".join(f"- {line}\n" for line in check.said), encoding="utf-8")
    return 0


class Check:
    """Scripts with directories of their own."""

    def __init__(self, home: Path, draw: random.Random):
        self.home, self.draw = home, draw
        self.said: List[str] = []
        self.environment = {**os.environ, "PN_DATA_ROOT": str(home / "data"), "PN_RUNS_ROOT": str(home / "runs"),
                            "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.said.append(line)

    def all(self, kills: int) -> None:
        """Kills training, evaluation and a reproduction so often, in all."""
        third = kills // 3
        self.script("prepare.sh", "demo")
        whole, disturbed = self.home / "whole", self.home / "runs" / "disturbed"
        begin = time.monotonic()
        self.script("train.sh", "demo", "power", "--run-dir", whole, *SETTINGS)
        training = time.monotonic() - begin
        self.script("evaluate.sh", "demo", whole)
        evaluation = time.monotonic() - begin - training
        train = ["train.sh", "demo", "power", "--run-dir", disturbed, "--resume", *SETTINGS]
        self.disturb(train, training, kills - 2 * third, lambda: compare_weights(whole, disturbed), [disturbed])

        def scored() -> None:
            compare_records(*(run / "evaluation" / "record.json" for run in (whole, disturbed)))

        self.disturb(["evaluate.sh", "demo", disturbed], evaluation, third, scored, [disturbed / "evaluation"])
        table = ["reproduce_table1.sh", "--benchmark", "demo", "--rows", "layer,power", "--seeds", "1", "--updates", "40",
                 *SETTINGS[1:]]
        results, of_whole = self.home / "results", self.home / "results-whole"
        begin = time.monotonic()
        self.script(*table, "--results", of_whole, PN_RUNS_ROOT=str(self.home / "runs-whole"))
        reproduction = time.monotonic() - begin

        def reproduced() -> None:
            records = sorted((of_whole / "demo").glob("*.json"))
            assert len(records) == 2, records
            for record in records:
                compare_records(record, results / "demo" / record.name)
                compare_weights(*(self.home / runs / "demo" / record.stem for runs in ("runs-whole", "runs")))

        self.disturb([*table, "--results", results], reproduction, third, reproduced, [results, self.home / "runs" / "demo"])

    def start(self, script: str, *words: object, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(["bash", str(ROOT / "scripts" / script), *map(str, words)], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                env={**self.environment, **environment})

    def script(self, *words: object, **environment: str) -> str:
        process = self.start(*map(str, words), **environment)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        return output

    def disturb(self, words, seconds: float, kills: int, check: Callable[[], None], made: Sequence[Path]) -> None:
        """Kills a script so many times while it is at work, starting it again each time, and lets it end.

        Args:
            seconds: what it takes undisturbed
            check: holds its result to that of what nothing disturbed
            made: what it leaves; where it has ended before it was killed, its result is checked, and it begins anew
        """
        signals = [each for _ in range(kills) for each in SIGNALS][:kills]
        self.draw.shuffle(signals)
        sessions = 1
        while signals:
            moment = self.draw.uniform(0.5, seconds)
            process = self.start(*words)
            try:
                output, _ = process.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                sent = signals.pop()
                process.send_signal(sent)
                output, _ = process.communicate(timeout=120)  # that is, until nothing of it holds the pipe
                last = (output.strip().splitlines() or ["nothing yet"])[-1].replace(str(self.home), "")
                self.say(f"{words[0]}: {sent.name} after {moment:.1f} s, exit status {process.returncode}; the last line: "
                         f"{last}")
                assert process.returncode in (SIGNALS[sent], -sent, 0), output
                assert "Traceback" not in output, output
                self.check_status()
                sessions += 1
            else:
                assert process.returncode == 0, output
                check()
                self.say(f"{words[0]}: ended well, in {sessions} sessions; the same result; once more from the beginning")
                sessions = 1
                for path in made:
                    shutil.rmtree(path)
        self.script(*words)
        check()
        self.say(f"{words[0]}: ended well, in {sessions} sessions; the same result")

    def check_status(self) -> None:
        """status.sh says no less than the checkpoints hold, and calls finished only what has the last one."""
        if not any((self.home / "runs").rglob("run.json")):
            return
        rows = self.script("status.sh").splitlines()
        for run in (path.parent for path in (self.home / "runs").rglob("run.json")):
            (row,) = [row for row in rows[2:] if row.split()[0].endswith(run.name)]
            said = int(re.search(r"(\d+) of \d+", row)[1]) if " of " in row else 0
            held = max((num_updates(str(path)) or 0 for path in (run / "checkpoints").glob("checkpoint*.pt")), default=0)
            assert said >= held and " running " not in row, (row, held)
            if (run / "finished.json").exists():
                assert json.loads((run / "finished.json").read_text())["updates"] == held, row


def compare_records(one: Path, two: Path) -> None:
    """The records say the same."""
    first, second = (json.loads(path.read_text()) for path in (one, two))
    first["curve"], second["curve"] = first["curve"]["valid"], second["curve"]["valid"]
    differing = {key: (first.get(key), second.get(key)) for key in {**first, **second}
                 if key not in DIFFERING and first.get(key) != second.get(key)}
    assert not differing, (one.name, differing)


def compare_weights(one: Path, two: Path) -> None:
    """The last checkpoints of two runs have the same bits in parameters and statistics."""
    first, second = (load(str(run / "checkpoints" / "checkpoint_last.pt"))["model"] for run in (one, two))
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert first.keys() == second.keys() and not differing, differing


if __name__ == "__main__":
    sys.exit(main())
