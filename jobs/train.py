"""Entry script of `ray job submit`: the same as `tc-ray train`, from an unpacked working directory without installation.

ray job submit --working-dir . -- python jobs/train.py --config demo [key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tc_ray.cli.command import run_command
from tc_ray.cli.train import start
from tc_ray.config.redact import redact


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


class Once(argparse.Action):
    """An option of one value: the second is refused, not taken in silence."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, *_: object
    ) -> None:
        """Keep the value."""
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{self.option_strings[0]} is given twice and takes one value: give it once")
        setattr(namespace, self.dest, values)


def main() -> None:
    """Parse the arguments and run the job; errors become one message and exit code 2."""
    parser = _Parser(description="Train Pilot and Copilot, evaluate, export.")
    parser.add_argument(
        "--config",
        type=Path,
        action=Once,
        required=True,
        help="recipe: a YAML file, or the name of one of tc-ray, such as demo",
    )
    parser.add_argument("--plan", action="store_true", help="print the resolved plan and start nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change fields, e.g. pilot.epochs=2")
    arguments = parser.parse_intermixed_args()
    run_command(lambda: start(arguments.config, arguments.overrides, only_plan=arguments.plan))


if __name__ == "__main__":
    main()
