"""Commands whose options are given once.

Invariant: an option of one value that is given twice is refused by name; the parser alone would silently take the last one.
Every command of `tc_ray.cli.main` and `tc_ray.cli.log` is of this class.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperOption


class OnceCommand(TyperCommand):
    """A command that refuses a second value for an option of one value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does, after the check. Raises UsageError."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option in given:
            if isinstance(option, TyperOption) and not (option.multiple or option.is_flag or option.count):
                times = sum(other is option for other in given)
                if times > 1:
                    ctx.fail(f"{option.opts[0]} is given {times} times and takes one value: give it once")
        return super().parse_args(ctx, args)
