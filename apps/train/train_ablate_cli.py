"""The command line of ablations. Imports no torch.

train ablate --list            what there is
train ablate tiling            train its arms and write the page; the same line goes on with what is missing
"""

import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn

import tyro

from train_ablate_config import AblateRun
from train_ablate_table import ABLATIONS
from train_config import Command

LIST = "--list"


def _refuse(reason: str) -> NoReturn:
    print(f"train ablate: {reason}", file=sys.stderr)
    sys.exit(2)


def _list() -> NoReturn:
    for name, make in ABLATIONS.items():
        ablation = make()
        print(f"{name:<14} {ablation.title} ({', '.join(ablation.arms)})\n{'':<14} {ablation.claim}")
    sys.exit(0)


def parse_ablation(arguments: Sequence[str]) -> Command:
    """Return the ablation's name and settings; or list the ablations, or exit with status 2 and a reason."""
    if LIST in arguments:
        _list()
    name, rest = None, list(arguments)
    if rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name not in ABLATIONS:
            nearest = difflib.get_close_matches(name, ABLATIONS, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see --list"
            _refuse(f"name: expected one of {', '.join(ABLATIONS)}, got {name}; {hint}")
    description = f"{AblateRun.__doc__}\n\nAblations: {', '.join(ABLATIONS)}; {LIST} says what they are."
    try:
        config = tyro.cli(AblateRun, prog=f"train ablate {name or 'NAME'}", description=description, args=rest)
    except ValueError as error:
        _refuse(str(error))
    if name is None:
        _refuse(f"name: expected one of {', '.join(ABLATIONS)}, got none; see {LIST}")
    return Command(recipe=name, config=config)
