"""Entry script of `ray job submit`: the same as `tc-ray train`, from an unpacked working directory without installation.

ray job submit --working-dir . -- python jobs/train.py --config jobs/recipes/demo.yaml [key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tc_ray.cli.errors import run_command
from tc_ray.cli.train import start
from tc_ray.config.redact import redact


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


def main() -> None:
    """Parse the arguments and run the job; errors become one message and exit code 2."""
    parser = _Parser(description="Train Pilot and Copilot, evaluate, export.")
    parser.add_argument("--config", type=Path, required=True, help="recipe (YAML); relative to the working directory")
    parser.add_argument("--plan", action="store_true", help="print the resolved plan and start nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change fields, e.g. pilot.epochs=2")
    arguments = parser.parse_intermixed_args()
    run_command(lambda: start(arguments.config, arguments.overrides, only_plan=arguments.plan))


if __name__ == "__main__":
    main()
