"""An option of one name is one option, whichever command has it."""
import argparse
import importlib
import itertools

import pytest
from experiments.test_commands import NAMES, parsers

from fairseq_powernorm.command_options import OPTIONS
from fairseq_powernorm.experiments.commands import Parser
from fairseq_powernorm.experiments.errors import UserError

#: commands of the package that have a plain parser
PLAIN = ("checkpoint", "export", "recalibrate", "recorder")


def every_parser():
    """(command, parser), those of subcommands, too"""
    for name in NAMES:
        for number, parser in enumerate(parsers(name)):
            yield f"{name} {number}", parser
    for name in PLAIN:
        waiting = [importlib.import_module(f"fairseq_powernorm.{name}").parser()]
        while waiting:
            parser = waiting.pop()
            yield parser.prog, parser
            for action in parser._subparsers._group_actions if parser._subparsers else ():
                waiting += action.choices.values()


def actions():
    """option -> [(command, its action)]"""
    found = {}
    for command, parser in every_parser():
        for action in parser._actions:
            for name in action.option_strings:
                found.setdefault(name, []).append((command, action))
    return found


FOUND = actions()


def stem(command):
    return command.split(" ")[0]


@pytest.mark.parametrize("name", sorted(name for name in FOUND if name not in ("-h", "--help")))
def test_one_name_one_option(name):
    """What several commands have is one of OPTIONS: its meaning begins the help of each, and its value is of one kind.

    The tables and the figures are subcommands of one command, which defines its options once.
    """
    having = FOUND[name]
    option = next((each for key, each in OPTIONS.items() if name in (key, *each.names)), None)
    if option is None:
        assert len({stem(command) for command, _ in having}) == 1, [command for command, _ in having]
        return
    for command, action in having:
        assert action.help.replace("%%", "%").startswith(option.help), command
        assert action.metavar == option.metavar and (action.nargs == 0) == (option.kind == "flag"), command
        assert (action.nargs == "?") == (option.kind == "optional"), command
        assert set(option.names) < set(action.option_strings), command


def test_every_shared_option_is_shared():
    """OPTIONS holds what at least two commands have, and --check, --wandb ... mean what they say there and nowhere else."""
    for name in OPTIONS:
        assert len({stem(command) for command, _ in FOUND[name]}) > 1, name


@pytest.mark.parametrize("name", sorted(name for name, option in OPTIONS.items() if option.kind in ("number", "seeds")))
def test_one_name_one_value(name):
    """The same text is the same value, or refused with the same words, by every command that has the option."""
    for text in ("1", "2", "0", "-1", "1,2", "x", "65536", "99999999999999999999", "4294967296", "1.5", "\u00b2"):
        told = set()
        for _, action in FOUND[name]:
            try:
                told.add(repr(action.type(text)))
            except UserError as error:
                told.add(f"refused: {error}")
        assert len(told) == 1, told


def test_former_names_work():
    """Options that had another name are found by it."""
    for name, option in OPTIONS.items():
        for former in option.names:
            assert all(action in [each for _, each in FOUND[name]] for _, action in FOUND[former])


@pytest.mark.parametrize(
    "words, value",
    [([], None), (["--curves"], ""), (["--curves=a b"], "a b"), (["--curves", "x"], ""), (["--curves="], UserError)],
)
def test_an_optional_value_stands_behind_the_equals_sign(words, value):
    """--option alone takes no word away from the arguments; --option=VALUE has one."""
    for place, order in itertools.product((["a"], []), (0, 1)):
        parser = Parser("Does this.")
        parser.add("places", metavar="PLACE", nargs="*", help="where")
        parser.add("--curves", read=lambda _, text: text, optional=True, help="more")
        line = [*place, *words] if order else [*words, *place]
        if value is UserError:
            with pytest.raises(UserError, match="--curves CURVES needs a value"):
                parser.parse(line)
            continue
        options = parser.parse(line)
        assert options.curves == value and sorted(options.places) == sorted([*place, *words[1:]])


def test_arguments_of_plain_parsers_are_explained():
    """Each argument and option of the package's own commands says what it is for."""
    for command, parser in every_parser():
        if isinstance(parser, argparse.ArgumentParser) and not isinstance(parser, Parser):
            for action in parser._actions:
                assert action.help or isinstance(action, argparse._SubParsersAction), (command, action.dest)
