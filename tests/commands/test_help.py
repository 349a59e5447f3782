"""What ``--help`` says, at what cost, and that all commands speak of the same thing in the same words."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from timm_ghn import cli
from timm_ghn.evaluation import adaptation, ranking
from timm_ghn.hypernet.decoders import DECODERS
from timm_ghn.hypernet.message_passing import HYPERNETS
from timm_ghn.predictor import HEADS
from timm_ghn.preparation import PREPARATIONS
from timm_ghn.training.architectures import SPLITS
from timm_ghn.training.config import PRESETS, SCHEDULES
from timm_ghn.training.objectives import OBJECTIVES
from timm_ghn.training.optimizers import OPTIMIZERS

ROOT = Path(__file__).resolve().parents[2]


def commands() -> dict[str, Any]:
    (action,) = (a for a in cli.command_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for parser in action.choices.values():
        parser.learn()
    return dict(action.choices)


COMMANDS = commands()
HELP = """
import contextlib, io, sys
from timm_ghn.cli import main
for command in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    assert "usage: timm-ghn" in printed.getvalue()
    assert "torch" not in sys.modules and "timm" not in sys.modules and "rich" not in sys.modules, command
"""


def test_help_does_not_wait_for_torch() -> None:
    done = subprocess.run([sys.executable, "-c", HELP, "", *COMMANDS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_examples_that_can_be_typed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = COMMANDS[name].format_help()
    examples = [line.strip() for line in shown.partition("\nexamples:\n")[2].splitlines() if line.strip()]
    assert examples
    for example in examples:
        program, command, *arguments = shlex.split(example)
        assert (program, command) == ("timm-ghn", name)
        cli.command_parser().parse_args([command, *arguments])
    assert list(tmp_path.iterdir()) == []


# Of each command's own things, images or files, or (--architectures, --head) of what libraries call by the same word.
OF_ITS_OWN = {"--architectures", "--data", "--families", "--head", "--images", "--output", "--plot", "--workers"}


def test_the_same_option_has_the_same_words() -> None:
    texts = defaultdict(set)
    for name, parser in COMMANDS.items():
        for option, action in parser._option_string_actions.items():
            texts[option].add((action.help or "").partition(" (default")[0])
        assert ("-o" in parser._option_string_actions) == ("--output" in parser._option_string_actions), name
    assert {option for option, found in texts.items() if len(found) > 1} - {"-o"} <= OF_ITS_OWN


def test_what_prints_a_result_prints_it_as_json() -> None:
    without = {name for name, parser in COMMANDS.items() if "--json" not in parser._option_string_actions}
    assert without <= {"demo", "graph", "run"}, "a tour, a picture, and what a script prints"


@pytest.mark.parametrize(
    ("command", "option", "registry"),
    [
        ("predict", "--head", HEADS), ("predict", "--finetune", PREPARATIONS), ("adapt", "--head", adaptation.HEADS),
        ("rank", "--head", ranking.HEADS), ("evaluate", "--source", (*SPLITS, "zoo")), ("train", "--preset", PRESETS),
        ("train", "--optimizer", OPTIMIZERS), ("train", "--schedule", SCHEDULES), ("train", "--hypernet", HYPERNETS),
        ("train", "--decoder", DECODERS), ("train", "--head", OBJECTIVES),
    ],
)  # fmt: skip
def test_choices_are_those_there_are(command: str, option: str, registry: Any) -> None:
    """They are written down a second time, so that help need not import them."""
    assert sorted(COMMANDS[command]._option_string_actions[option].choices) == sorted(registry)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_is_told_of_every_command_and_option(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--print-completion", shell])
    assert stopped.value.code == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS) and "--max-macs" in script and "--cooldown-from" in script


def test_without_the_library_that_makes_completions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--print-completion", "bash"])
    assert stopped.value.code == 2 and 'pip install "timm-ghn[completion]"' in capsys.readouterr().err
