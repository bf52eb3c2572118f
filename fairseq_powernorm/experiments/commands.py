"""What the commands of the experiments have in common: their parser, its help, the advice it gives, how they end.

A command is a function of the words of its command line, which gives its exit status. It reads them with a :class:`Parser`,
made of its own options and of those that several commands share, such as :func:`add_benchmark`. ``--help`` loads nothing but
the standard library.
"""

import argparse
import difflib
import inspect
import os
import re
import shutil
import sys
import textwrap
from typing import Any, Callable, Dict, List, Mapping, NoReturn, Optional, Sequence, Tuple

from .. import command_line, command_options
from ..command_line import SCRIPT, called_as
from . import overrides
from .errors import UserError, choose, listed, number, seeds
from .own import subject
from .recipes import CONFIGS
from .settings import NORMS, configuration, norm_name

#: makes a value of an option's text, given (option, text); what is not valid is a UserError that names the option
Reader = Callable[[str, str], Any]


def main(command: Callable[[List[str]], Optional[int]], arguments: Optional[Sequence[str]] = None) -> NoReturn:
    """Carries out a command, by default with the words of the command line, and ends with its exit status.

    A refusal is one line on stderr and exit status 2; else see :func:`.command_line.run`.
    """
    command_line.run(command, arguments, refusals=(UserError,))


# ---- values ----------------------------------------------------------------------------------------------------------


def one_of(*valid: str) -> Reader:
    """One of some words."""
    return lambda option, text: choose(option, text, valid)


def words_of(*valid: str) -> Reader:
    """A list of words with commas between them, none twice; any words if none are given."""
    return lambda option, text: listed(option, text, valid or None, ())


def number_from(smallest: int, largest: Optional[int] = None) -> Reader:
    """A whole number within limits."""
    return lambda option, text: number(option, text, smallest, largest)


def reader_of(option: command_options.Option) -> Optional[Reader]:
    """What makes the value of an option of OPTIONS of its text; None where it stays one."""
    if option.kind == "number":

        def read(name: str, text: str) -> int:
            try:
                return number(name, text, *option.limits)
            except UserError as error:
                raise UserError("; ".join(filter(None, [str(error), option.instead]))) from None

        return read
    return {"seeds": seeds, "optional": lambda _, text: text}.get(option.kind)


# ---- the parser ------------------------------------------------------------------------------------------------------


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps words whole, those with hyphens too: a list of norms or an option's name can be copied."""

    def _split_lines(self, text: str, width: int) -> List[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


class Parser(argparse.ArgumentParser):
    """Reads the words of a command line.

    Options and overrides may stand anywhere; ``--option value`` and ``--option=value`` are the same. What is wrong is a
    :class:`UserError` of one line, which says what would have been right: for an option that is fairseq's, the override.

    Args:
        description: what the command does, in paragraphs; one with indented lines is shown as it is
        epilog: what it leaves behind, and how it goes on
        subcommand: a first word of the command line that belongs to the command's name, where no script stands for it
    """

    def __init__(self, description: str, *epilog: str, subcommand: str = ""):
        prog = called_as()
        super().__init__(
            prog=prog if os.environ.get(SCRIPT) else f"{prog} {subcommand}".rstrip(),
            description=_paragraphs(description), epilog="\n\n".join(map(_paragraphs, epilog)),
            formatter_class=lambda prog: _Formatter(prog, max_help_position=24),
            allow_abbrev=False, add_help=False,
        )  # fmt: skip
        self._titles: Dict[str, Any] = {}
        self._options: Dict[str, argparse.Action] = {}
        self._former: Dict[str, str] = {}
        self._places: List[argparse.Action] = []
        self._own: Optional[Mapping[str, Optional[str]]] = None
        self._about_overrides = ""
        self._titles["arguments"] = self.add_argument_group("arguments")  # before the options
        self.add("-h", "--help", help="show this text and exit", flag=True)

    def add(
        self,
        *names: str,
        help: str = "",
        read: Optional[Reader] = None,
        default: Any = None,
        metavar: Optional[str] = None,
        nargs: Optional[str] = None,
        flag: bool = False,
        repeat: bool = False,
        group: str = "",
        former: str = "",
        optional: bool = False,
    ) -> None:
        """Adds an option, or an argument that has its place.

        Args:
            names: as of ``add_argument``; of an option of :data:`.command_options.OPTIONS` only the one
            help: what it is for, or what an option of OPTIONS comes to here; what it is by default is added where that is
                neither None nor named
            read: makes its value of its text, unless the option is one of OPTIONS that says so itself
            default: its value where it is not given; a text is read like one that is given
            metavar: what stands for its value
            nargs: of an argument: "?", "*" or "+"
            flag: it takes no value, and is True where it is given
            repeat: it may be given several times, and its value is a list
            group: the heading of the help under which it stands
            optional: its value may be missing; it is empty then, and otherwise stands behind "="
            former: an earlier name, which a refusal of it answers with this one
        """
        shared = command_options.OPTIONS.get(names[-1])
        if shared is not None:
            names, metavar, flag = (names[-1], *shared.names), shared.metavar, shared.kind == "flag"
            help, read = command_options.meaning(names[0], help), reader_of(shared) or read
            optional = shared.kind == "optional"
        name = names[0] if shared else names[-1]
        if former:
            self._former[former] = name
        group = group or ("options" if names[0].startswith("-") else "arguments")
        if default is not None and default != [] and "default" not in help:
            help += f" (default: {default})"
        keywords: Dict[str, Any] = {"help": help.replace("%", "%%"), "default": default}
        if flag:
            keywords.update(action="store_true", default=False)
        else:
            keywords["metavar"] = metavar or name.lstrip("-").replace("-", "_").upper()
            if repeat:
                keywords.update(action="append", default=default or [])
        if read is not None:
            reader = read
            keywords["type"] = lambda text: reader(name, text)
        if optional:
            keywords["nargs"] = "?"
        elif nargs is not None:
            keywords["nargs"] = nargs
        if group not in self._titles:
            self._titles[group] = self.add_argument_group(group)
        action = self._titles[group].add_argument(*names, **keywords)
        if action.option_strings:
            self._options.update(dict.fromkeys(action.option_strings, action))
        else:
            self._places.append(action)

    def add_overrides(self, help: str, own: Optional[Mapping[str, Optional[str]]] = None) -> None:
        """Lets KEY=VALUE stand anywhere; they become the option ``overrides``.

        Args:
            help: what they change
            own: keys that the command sets itself -> what to use instead, if anything
        """
        self._own, self._about_overrides = own or {}, help

    def format_usage(self) -> str:
        """The arguments that have a place; ``--help`` lists the options."""
        shown = {None: "{}", "?": "[{}]", "*": "[{}...]", "+": "{}..."}
        words = [(action, shown[action.nargs].format(action.metavar)) for action in self._places]  # type: ignore[index]
        needed = [word for action, word in words if action.nargs in (None, "+")]
        others = [word for action, word in words if action.nargs not in (None, "+")]
        return " ".join(["usage:", self.prog, *needed, "[options]", *others,
                         *(["[overrides]"] if self._own is not None else [])]) + "\n"

    def format_help(self) -> str:
        """All that the command takes."""
        if self._own is not None and "overrides" not in self._titles:
            about = _paragraphs(f"KEY=VALUE: {self._about_overrides}").replace("%", "%%")
            self._titles["overrides"] = self.add_argument_group("overrides", about)
        self.usage = self.format_usage()[len("usage: ") :].strip().replace("%", "%%")
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """What argparse finds wrong, as a refusal."""
        raise UserError(re.sub(r"^argument (\S+): ", r"\1: ", message))

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options of a command line; raises UserError for a wrong one."""
        options, places, found, unknown = self._sorted(arguments)
        if "-h" in options or "--help" in options:
            self.print_help()
            sys.stdout.flush()  # whoever reads it may have seen enough
            sys.exit(0)
        if unknown:
            raise UserError("; ".join(self._advice(*each, arguments) for each in unknown))
        needed = [action for action in self._places if action.nargs in (None, "+")]
        usage = self.format_usage().strip()
        if len(places) < len(needed):
            raise UserError(f"{needed[len(places)].metavar} is missing; {usage}; --help says what they are")
        if len(places) > len(self._places) and not any(action.nargs in ("*", "+") for action in self._places):
            word = places[len(self._places)]
            if self._own is not None:
                raise UserError(f"{word!r} is no hydra override; an override reads KEY=VALUE, such as common.seed=2")
            raise UserError(f"{word!r} is one argument too many; {usage}")
        border = ["--"] if any(place.startswith("-") for place in places) else []
        parsed = self.parse_args([*options, *border, *places])
        if self._own is not None:
            for key, instead in self._own.items():
                if key in overrides.by_key(found):
                    raise UserError(f"override {key} is this command's own" + (f"; use {instead}" if instead else ""))
            parsed.overrides = found
        return parsed

    def _sorted(
        self, arguments: Sequence[str]
    ) -> Tuple[List[str], List[str], List[str], List[Tuple[str, Optional[str]]]]:
        """(options with their values, arguments that have a place, overrides, (unknown option, the word behind it))"""
        options: List[str] = []
        places: List[str] = []
        found: List[str] = []
        unknown: List[Tuple[str, Optional[str]]] = []
        given: Dict[str, str] = {}
        words = list(arguments)
        while words:
            word = words.pop(0)
            name, equals, value = word.partition("=")
            if word == "--":
                places, words = places + words, []
            elif name in self._options:
                action = self._options[name]
                if action.nargs == 0:
                    if equals:
                        raise UserError(f"{name} takes no value, got {value!r}")
                    options.append(word)
                    continue
                optional = action.nargs == "?" and not equals  # empty then; argparse would take the next word
                if not equals and not optional and words and not _is_option(words[0]):
                    value = words.pop(0)
                if not isinstance(action.default, list) and given.setdefault(action.dest, value) != value:
                    raise UserError(f"{name} is given twice, as {given[action.dest]!r} and {value!r}; give one of them")
                if not value and not optional:
                    raise UserError(f"{name} {action.metavar} needs a value: {(action.help or '').replace('%%', '%')}")
                options.append(f"{name}={value}")
            elif _is_option(word):
                following = words[0] if words and not _is_option(words[0]) and not _is_override(words[0]) else None
                unknown.append((name, value if equals else following))
            elif self._own is not None and _is_override(word):
                found.append(word)
            else:
                places.append(word)
        return options, places, found, unknown

    def _advice(self, option: str, value: Optional[str], arguments: Sequence[str]) -> str:
        """What to use instead of an option that there is not."""
        if option in self._former:
            return f"{option} is now {self._former[option]}"
        names = [name for name in self._options if name.startswith("--")]
        near = [name for name in names if name.startswith(option)] or difflib.get_close_matches(option, names, 1, 0.85)
        if not near and self._own is not None:
            found = overrides.of_flag(option, value, *configuration(arguments), self._own)
            if found:
                return f"unknown option {option}; {found}"
        near = near or difflib.get_close_matches(option, names, 1, 0.6)
        if near:
            return f"unknown option {option}; did you mean {near[0]}?"
        return f"unknown option {option}; valid: {', '.join(names)}"


def _paragraphs(text: str) -> str:
    """Text whose paragraphs are filled, but for those with indented lines."""
    width = max(40, shutil.get_terminal_size().columns - 4)
    blocks = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(
        block if re.search("^ ", block, re.M) else textwrap.fill(block, width, break_on_hyphens=False) for block in blocks
    )


def _is_option(word: str) -> bool:
    return bool(re.match(r"--?[A-Za-z]", word))


def _is_override(word: str) -> bool:
    """Is it KEY=VALUE or ~KEY? A norm's options have their "=" behind a colon."""
    return "=" in word.partition(":")[0] or word.startswith("~")


# ---- options that several commands have ------------------------------------------------------------------------------


def add_benchmark(parser: Parser, help: str = "what is trained") -> None:
    """BENCH: a benchmark, prepared text of the user's own, or a YAML file of theirs; see :func:`.settings.recipe`."""
    names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    parser.add("benchmark", metavar="BENCH", read=subject,
               help=f"{help}: a benchmark ({names}), the name of your own text, or a YAML file with your own settings "
                    "(configs/README.md)")


def add_norm(parser: Parser, nargs: Optional[str] = None) -> None:
    """NORM, with options of its own."""

    def read(option: str, text: str) -> str:
        choose("norm", norm_name(text), NORMS)
        if not text.isprintable() or " " in text:
            raise UserError(f"norm {text!r}: has blanks; valid: NAME, or NAME:OPTION=VALUE,...")
        return text

    parser.add("norms" if nargs else "norm", metavar="NORM", nargs=nargs, read=read,
               help=f"one of {', '.join(NORMS)}; options may follow, as in batch:variant=reference, the authors' BN")


def add_slurm(parser: Parser) -> None:
    """The options of what is queued on a cluster: see :func:`.cluster.submission.check_options`."""
    for name in ("--nodes", "--gpus", "--time", "--partition", "--site", "--log-dir"):
        parser.add(name, group="on a cluster with SLURM")


def refuse_own_input(output: Optional[str], inputs: Sequence[str]) -> None:
    """Refuses an --output that would take the place of a file that it is made from."""
    for path in inputs:
        if output and os.path.realpath(output) == os.path.realpath(path):
            raise UserError(f"--output {output!r} is one of the records; choose another name")
