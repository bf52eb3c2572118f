"""The commands: their help, what they refuse and how, and that scripts/README.md says what they read."""
import ast
import importlib
import os
import re
import signal
import subprocess
import sys

import pytest
import warm
from toy import ROOT

from fairseq_powernorm import command_line
from fairseq_powernorm.experiments import commands
from fairseq_powernorm.experiments.commands import Parser, number_from, one_of
from fairseq_powernorm.experiments.errors import UserError

FOLDER = ROOT / "fairseq_powernorm" / "experiments"
#: the modules that can be called
NAMES = [
    *sorted(path.stem for path in FOLDER.glob("*.py") if '__name__ == "__main__"' in path.read_text()),
    *sorted(path.parent.name for path in FOLDER.glob("*/__main__.py")),
]
SCRIPTS = sorted((ROOT / "scripts").rglob("*.sh"))
SCRIPTS = [path for path in SCRIPTS if path.read_text().startswith("#!") and path.parent.name != "lib"]
README = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")


def module(name):
    return importlib.import_module(f"fairseq_powernorm.experiments.{name}" + (".__main__" if name == "benchmark" else ""))


def parsers(name):
    """The parsers of a command: one, or one for each of its subcommands."""
    if name == "reproduce":
        from fairseq_powernorm.experiments.reports.matrix import SUBJECTS

        return [module(name).parser(subject) for subject in SUBJECTS]
    return [module(name).parser()]


# ---- help ------------------------------------------------------------------------------------------------------------


def entries(text):
    """What --help explains: [(names, explanation)]."""
    found = []
    for line in text.splitlines():
        start = re.match(r"  (\S.*?)(?:  +(\S.*))?$", line)
        if start and re.match(r"-|[A-Z][A-Z_]*\b", start[1]) and not start[1].startswith("KEY=VALUE"):
            found.append([start[1], start[2] or ""])
        elif found and re.match(r" {6,}\S", line):
            found[-1][1] += line
    return found


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_explained(name):
    """--help says of each option and argument what it is for, and names no option that the command does not take."""
    for parser in parsers(name):
        text = parser.format_help()
        assert len(entries(text)) >= 1 and all(explanation.strip() for _, explanation in entries(text)), text
        taken = {each for names, _ in entries(text) for each in re.findall(r"--[a-z][a-z-]*", names)}
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) <= taken
        assert "%(" not in text and "%%" not in text
        assert not re.search(r"\w-$", text, re.M), "a name is cut in two"


def test_help_needs_the_standard_library_only():
    """The help of every command, from a Python without any packages: neither torch nor anything else that takes time."""
    code = f"""if True:
        import contextlib, importlib, io, runpy, sys
        for name in {NAMES!r}:
            for words in [["table1"], ["table2"], ["figures"]] if name == "reproduce" else [[]]:
                sys.argv, shown = [name, *words, "--help"], io.StringIO()
                with contextlib.redirect_stdout(shown):
                    try:
                        runpy.run_module("fairseq_powernorm.experiments." + name, run_name="__main__", alter_sys=True)
                    except SystemExit as end:
                        assert end.code in (0, None), name
                assert shown.getvalue().startswith("usage: python -m fairseq_powernorm.experiments." + name), name
        assert not set(sys.modules) & {{"torch", "fairseq", "numpy", "omegaconf"}}
    """
    subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=ROOT)


def plain(script, *words, shell="bash", **environment):
    return subprocess.run([shell, str(script), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={"PATH": "/usr/bin:/bin", **environment})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_of_a_script(script):
    """Each script prints its help without an environment and makes none; the help has the name of the script. Called with
    sh, which knows less in many systems, it goes on in bash."""
    done = plain(script, "--help", shell="sh")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script.relative_to(ROOT)}"), done.stdout
    assert not (ROOT / ".venv.unfinished").exists()


def test_scripts_are_found_through_links(tmp_path):
    """A link to a script is the script, and CDPATH, by which cd would go elsewhere, changes nothing."""
    link = tmp_path / "other name"
    link.symlink_to(ROOT / "scripts" / "slurm" / "submit.sh")
    for place, script in ((tmp_path, link.name), (ROOT, "scripts/slurm/submit.sh")):
        done = subprocess.run(["bash", script, "--none"], cwd=place, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHON": warm.program("python"), "CDPATH": f".:{ROOT}"})
        assert done.returncode == 2 and done.stderr.startswith("scripts/slurm/submit.sh: error: unknown option"), done.stderr


def test_two_scripts_make_one_environment(tmp_path):
    """A script waits for another one that is making .venv, and takes what that has made."""
    (tmp_path / "setup.py").touch()
    (tmp_path / "python3.11").write_text(f"""#!/bin/sh
        case "$*" in
            *"-m venv"*) echo made; mkdir -p "$4/bin"; cat "{tmp_path}/go"; cp "$0" "$4/bin/python" ;;
            *"-m pip"* | *ensurepip*) ;;
            -) cat >/dev/null; echo lacks: ;;
            *) exec {sys.executable} "$@" ;;
        esac""")
    (tmp_path / "python3.11").chmod(0o755)
    lib = ROOT / "scripts" / "lib"
    shell = (f"set -euo pipefail; . {lib / 'common.sh'}; . <(sed '/^pn_environment$/,$d' {lib / 'environment.sh'}); "
             f"PN_ROOT={tmp_path}; pn_make_venv; $PYTHON -c 'print(1 + 1)'")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    os.mkfifo(tmp_path / "go")  # the first one is at work until the second says that it waits

    def start():
        return subprocess.Popen(["bash", "-c", shell, "x.sh"], env=environment, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)

    with start() as first:
        assert [first.stdout.readline().split()[0] for _ in range(2)] == ["making", "made"]
        with start() as second:
            line = second.stdout.readline()
            (tmp_path / "go").write_text("")
            assert line == "waiting for another script that is making .venv\n"
            said = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0]
    assert said == ["installing into .venv (some minutes)\n2\n", "2\n"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_python(sent, tmp_path):
    """A script that is still looking after its environment ends with one line, and what it has started does, too."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\ncase "$*" in *build.py*) echo "at work" >&2; exec sleep 600 ;; *) echo lacks: ;; esac\n')
    fake.chmod(0o755)
    start = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
    words = [sys.executable, "-c", start, "bash", str(ROOT / "scripts" / "status.sh")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={"PATH": "/usr/bin:/bin", "PYTHON": str(fake)})
    assert process.stderr.readline() == "at work\n"
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)  # as long as anybody holds the pipe
    assert (process.returncode, errors) == (128 + sent, "scripts/status.sh: error: interrupted\n")


@pytest.mark.parametrize(
    "shell", ['pn_missing "$PYTHON"', "pn_find_python", "pn_python status --help", "pn_python status ."])
def test_modules_of_the_callers_directory(shell, tmp_path):
    """Where a script is called, perhaps in somebody else's run, no file there takes the place of one of Python's modules; of
    a Python before 3.11 neither.
    """
    (tmp_path / "here").mkdir()
    for name in ("importlib", "types", "hashlib", "venv", "runpy", "argparse", "fairseq_powernorm"):
        (tmp_path / "here" / f"{name}.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\ncase "$*" in *"sys.exit("*) exit 1 ;; esac\n'
                   f'unset PYTHONSAFEPATH\nexec {sys.executable} "$@"\n')
    old.chmod(0o755)
    lib = ROOT / "scripts" / "lib"
    functions = f"pn_environment() {{ :; }}; . <(sed '/^pn_environment$/,$d' {lib / 'environment.sh'})"
    for python in (sys.executable, str(old)):
        done = subprocess.run(["bash", "-c", f". {lib / 'common.sh'}; {functions}; {shell}", str(ROOT / "scripts" / "x.sh")],
                              cwd=tmp_path / "here", env={**os.environ, "PYTHON": python}, capture_output=True, text=True)
        assert not (tmp_path / "pwned").exists() and done.returncode == 0, done.stderr


def test_help_of_a_check():
    """Each check prints its help without an environment, and nothing of its code."""
    for script in sorted((ROOT / "tests" / "checks").glob("*.sh")):
        if script.name != "help.sh":
            done = plain(script, "--help")
            assert done.returncode == 0 and str(script.relative_to(ROOT)) in done.stdout, done.stdout
            assert "set -euo" not in done.stdout


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.name != "test.sh"], ids=lambda path: path.name)
def test_scripts_are_wrappers(script):
    """A script holds nothing but which command it is: six lines."""
    assert len(script.read_text().splitlines()) == 6
    command = re.search(r"^pn_python (\S+)", script.read_text(), re.M)[1]
    assert command in NAMES


# ---- what is refused, and how ----------------------------------------------------------------------------------------


def made():
    """A parser with one of everything."""
    parser = Parser("Does this and that.")
    parser.add("places", metavar="PLACE", nargs="+", help="where")
    parser.add("--kind", read=one_of("one", "other"), default="one", help="which kind")
    parser.add("--number", metavar="N", read=number_from(1, 9), help="how many")
    parser.add("--resume", flag=True, help="go on")
    parser.add("--extra", repeat=True, help="more")
    return parser


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "PLACE is missing; usage: .* PLACE... "),
        (["a", "--kind", "none"], "--kind 'none' is unknown; valid: one, other"),
        (["a", "--kind=none"], "--kind 'none' is unknown; valid: one, other"),
        (["a", "--number", "10"], "--number '10': must be a number, 1 to 9"),
        (["a", "--number=-1"], "--number '-1': must be a number, 1 to 9"),
        (["a", "--number"], "--number N needs a value: how many"),
        (["a", "--number", "--resume"], "--number N needs a value: how many"),
        (["a", "--number", "--lr", "3"], "--number N needs a value: how many"),
        (["a", "--number", ""], "--number N needs a value: how many"),
        (["a", "--number="], "--number N needs a value: how many"),
        (["a", "--number", "1", "--number=2"], "--number is given twice, as '1' and '2'; give one of them"),
        (["a", "--res"], "unknown option --res; did you mean --resume?"),
        (["a", "--resume=yes"], "--resume takes no value, got 'yes'"),
        (["a", "--resum"], "unknown option --resum; did you mean --resume?"),
        (["a", "--numbers", "3"], "unknown option --numbers; did you mean --number?"),
        (["a", "-n", "3"], "unknown option -n; valid: --help, --kind, --number, --resume, --extra"),
        (["--nothing-like-it", "a"], "unknown option --nothing-like-it; valid: "),
        (["--resum", "a", "--knd=one"], "unknown option --resum; did you mean --resume.; unknown option --knd; did you "),
    ],
)
def test_wrong_words(words, message):
    """What is wrong is said in one line, with the option, the value and what would have been right."""
    with pytest.raises(UserError, match=message) as caught:
        made().parse(words)
    assert "\n" not in str(caught.value)


def test_words_in_any_order():
    """--option value = --option=value, before, between and behind the arguments; a value may begin with a dash."""
    wanted = vars(made().parse(["a", "b", "--number", "3", "--extra", "x", "--extra=-y"]))
    assert (wanted["places"], wanted["number"], wanted["kind"], wanted["resume"]) == (["a", "b"], 3, "one", False)
    assert wanted["extra"] == ["x", "-y"]
    for words in ("--number=3 a --extra x b --extra=-y", "--extra x --extra=-y --number 3 -- a b",
                  "a --extra=x --number=3 --extra=-y b"):
        assert vars(made().parse(words.split())) == wanted
    assert made().parse(["--", "a", "--resume"]).places == ["a", "--resume"]


def test_overrides_stand_anywhere():
    """KEY=VALUE, +KEY=VALUE and ~KEY are overrides wherever they stand; a norm's options and options' values are not."""
    train = module("train").parser
    words = ["a.b=1", "demo", "--run-dir", "x=y", "~c.d", "batch:variant=reference", "--resume", "+e.f='g:h'"]
    options = train().parse(words)
    assert options.overrides == ["a.b=1", "~c.d", "+e.f='g:h'"]
    assert (options.benchmark, options.norm, options.run_dir) == ("demo", "batch:variant=reference", "x=y")
    with pytest.raises(UserError, match="'fast' is no hydra override; an override reads KEY=VALUE"):
        train().parse(["demo", "power", "fast"])
    with pytest.raises(UserError, match="checkpoint.save_dir is this command's own; use --run-dir DIR"):
        train().parse(["demo", "power", "checkpoint.save_dir=x"])


@pytest.mark.parametrize(
    "function, status, said",
    [
        (lambda words: None, None, ""),
        (lambda words: 3, 3, ""),
        (lambda words: made().parse(words), 2, "scripts/any.sh: error: PLACE is missing"),
        (lambda words: open("/proc/nowhere/file", "w"), 2, "scripts/any.sh: error: /proc/nowhere/file: "),
    ],
)
def test_exit_status(function, status, said, capsys, monkeypatch):
    """A refusal and a disk that refuses are one line with the name of the script that was called, and status 2."""
    monkeypatch.setenv(commands.SCRIPT, "scripts/any.sh")
    monkeypatch.setattr(command_line, "DISK", (*command_line.DISK, 2))  # ENOENT, which any machine has
    with pytest.raises(SystemExit) as end:
        commands.main(function, [])
    assert end.value.code == status
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == bool(said)


@pytest.mark.parametrize("name", ["none/out", "directory", "pipe", "x" * 300, "\udcff/out"])
@pytest.mark.parametrize("command", ["table", "plot_curves"])
def test_where_nothing_can_be_written(command, name, tmp_path, monkeypatch):
    """--output that leads nowhere, or to what is no file: refused in one line, and nothing is there that was not before."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    ending = ".png" if command == "plot_curves" else ""
    (tmp_path / f"directory{ending}").mkdir()
    os.mkfifo(tmp_path / f"pipe{ending}")
    record = ROOT / "results" / "multi30k" / "power-8000-seed1.json"
    with pytest.raises(UserError, match="cannot write ") as caught:
        module(command).command([str(record), "--output", name + ending])
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"directory{ending}", f"pipe{ending}"]


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/y.yaml", "loop", "loop/y.yaml", "a\nb\x1b[2J", "\udcff"])
@pytest.mark.parametrize("words", [
    "status PATH", "table PATH", "schema PATH", "evaluate PATH", "train PATH power", "train demo power --run-dir PATH",
    "train demo power --tensorboard=PATH", "prepare new --lm --text-dir PATH", "prepare ptb --archive PATH",
    "prepare ptb --archive-dir PATH", "submit demo power --site PATH", "score PATH PATH", "launch PATH power",
    "reproduce table1 --benchmark PATH"])
def test_paths_that_lead_nowhere(words, name, tmp_path, monkeypatch, capsys):
    """A name that no file system takes, a link to itself, a name that would move a terminal's cursor: one line, and nothing
    is there that was not before.
    """
    pytest.importorskip("fairseq")
    for variable in ("PN_DATA_ROOT", "PN_RUNS_ROOT"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    command, *arguments = words.replace("PATH", name).split(" ")
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as end:
        commands.main(module(command).command, arguments)
    for number, handler in handlers:
        signal.signal(number, handler)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.endswith("\n") and said[:-1].isprintable(), said
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_a_directory_that_has_been_removed(tmp_path, monkeypatch, capsys):
    """Where the current directory is gone, relative paths lead nowhere: one line, even if none is given."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for words in (["x"], []):
        with pytest.raises(SystemExit) as end:
            commands.main(module("status").command, words)
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.endswith("error: the current directory has been removed; change to one that is "
                                                     "there\n") and said.count("\n") == 1


@pytest.mark.parametrize("program", ["true", "echo"])
def test_a_python_that_is_none(program):
    """PYTHON may not be another program, which would do nothing and end well."""
    done = plain(ROOT / "scripts" / "status.sh", PYTHON=f"/bin/{program}")
    assert (done.returncode, done.stdout) == (2, f"scripts/status.sh: error: PYTHON=/bin/{program} does not run\n")
    done = plain(ROOT / "scripts" / "status.sh", PYTHON="a\nb")
    assert (done.returncode, done.stdout) == (2, "scripts/status.sh: error: PYTHON=a?b is not an executable\n")


@pytest.mark.parametrize("command", ["table", "plot_curves"])
def test_a_record_is_no_output(command, tmp_path):
    """--output does not take the place of a record, by whatever path."""
    record, link = tmp_path / "record.png", tmp_path / "link.png"
    record.write_text("theirs")
    link.symlink_to(record)
    with pytest.raises(UserError, match="is one of the records"):
        module(command).command([str(record), "--output", str(link)])
    assert record.read_text() == "theirs"


def test_who_was_called():
    """A refusal begins with the script, or with the module where Python was asked for that."""
    done = plain(ROOT / "scripts" / "status.sh", "--al", PYTHON=sys.executable)
    assert done.returncode == 2 and done.stdout.startswith("scripts/status.sh: error: unknown option --al"), done.stdout
    done = subprocess.run([sys.executable, "-m", "fairseq_powernorm.experiments.status", "--al"], cwd=ROOT,
                          stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("python -m fairseq_powernorm.experiments.status: error: unknown option --al")


# ---- quickstart ------------------------------------------------------------------------------------------------------


def test_quickstart(monkeypatch, tmp_path, capsys):
    """It prepares, trains and evaluates PN and LN and compares their records; a step that fails ends it with its status."""
    pytest.importorskip("matplotlib")
    quickstart, steps = module("quickstart"), []
    monkeypatch.setenv("PN_RUNS_ROOT", str(tmp_path))

    def call(command):
        steps.append(" ".join(command[1:]).replace(f"{ROOT / 'scripts'}/", "").replace(str(tmp_path), "RUNS"))
        if "evaluate.sh" in steps[-1]:
            record = tmp_path / "quickstart" / steps[-1].rpartition("/")[2] / "evaluation" / "record.json"
            record.parent.mkdir(parents=True)
            record.write_bytes((ROOT / "results" / "multi30k" / f"{record.parts[-3]}-8000-seed1.json").read_bytes())
        return 0

    monkeypatch.setattr(quickstart, "carry_out", call)
    assert quickstart.command([]) == 0
    assert steps == [
        "prepare.sh demo",
        "train.sh demo power --run-dir RUNS/quickstart/power --resume", "evaluate.sh RUNS/quickstart/power",
        "train.sh demo layer --run-dir RUNS/quickstart/layer --resume", "evaluate.sh RUNS/quickstart/layer",
    ]  # fmt: skip
    output = capsys.readouterr().out
    assert "| multi30k | power | " in output and "| multi30k | layer | " in output
    assert (tmp_path / "quickstart" / "valid_loss.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(quickstart, "carry_out", lambda command: 5 if "layer" in command else 0)
    assert quickstart.command([]) == 5
    with pytest.raises(UserError, match="'now' is one argument too many; usage: "):
        quickstart.command(["now"])


# ---- scripts/README.md -----------------------------------------------------------------------------------------------

#: what starters of processes say to those that they start, what the scripts say to each other and the site file says to
#: them (scripts/slurm/site.example.sh explains it), and what belongs to the shell, to Python and to its environments
INTERNAL = re.compile(
    r"(SLURM|BASH)_|(RANK|WORLD_SIZE|LOCAL_RANK|PATH|PYTHONPATH|PYTHONIOENCODING|VIRTUAL_ENV|CONDA_PREFIX)$"
    r"|PN_(ROOT|SCRIPT|SITE|CONTAINER|ACCOUNT|PARTITION|TIME|CPUS_PER_TASK|GRES|WARNING)$"
    r"|TORCH_FORCE_WEIGHTS_ONLY_LOAD$|TQDM_DISABLE$|PERL_UNICODE$"  # which are set or taken away, not read
)
#: words in capitals that are no variables, in modules that read some
WORDS = {"LANG", "BENCH", "DIR", "FILE", "HEAD", "KERNELS", "MB", "NAME", "NORM", "RUN_DIR", "SOABI", "TYPE",
         "PROCID", "STEP_NUM_TASKS", "LOCALID", "STEP_NUM_NODES"}  # the last four of SLURM's, without their beginning


def variables():
    """The environment variables that the package and the scripts read: words in capitals, in a module that reads any."""
    found = set()
    for path in [*(ROOT / "fairseq_powernorm").rglob("*.py"), *(ROOT / "scripts").glob("*.py"), ROOT / "setup.py"]:
        text = path.read_text(encoding="utf-8")
        if "environ" in text or "getenv" in text:
            found |= {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)
                      and isinstance(node.value, str) and re.fullmatch("[A-Z][A-Z0-9_]+", node.value)} - WORDS
    for path in (ROOT / "scripts").rglob("*.s*"):
        if path.suffix in (".sh", ".sbatch"):
            found |= set(re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", path.read_text(encoding="utf-8")))
    return {name for name in found if not INTERNAL.match(name)}


def test_the_environment_is_documented():
    """The table of environment variables names all that the package and the scripts read, each once, and no other."""
    (table,) = re.findall(r"\n\| variable \|.*\n((?:\|.*\n)+)", README)
    named = re.findall(r"`([A-Z0-9_]+)`", "\n".join(line.split("|")[1] for line in table.splitlines()))
    assert len(set(named)) == len(named) and set(named) == variables()


def test_every_script_is_documented():
    """The table of scripts names each of them, and no other."""
    (table,) = re.findall(r"\n\| script \|.*\n((?:\|.*\n)+)", README)
    named = set(re.findall(r"`([\w/]+\.(?:sh|py))`", "\n".join(line.split("|")[1] for line in table.splitlines())))
    assert named == {str(path.relative_to(ROOT / "scripts")) for path in [*SCRIPTS, ROOT / "scripts" / "benchmark.py"]}
