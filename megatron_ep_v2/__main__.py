"""Command line: `python -m megatron_ep_v2 COMMAND ...`"""

from __future__ import annotations

import sys

from megatron_ep_v2.cli.patch import patch
from megatron_ep_v2.cli.run import UsageError, run
from megatron_ep_v2.errors import EPError

_USAGE = """usage: python -m megatron_ep_v2 COMMAND ...

  run SCRIPT ARGS...   run a training script with Megatron's flex dispatcher on this package
  patch apply|revert|check [PATH]
                       make the Megatron in PATH (default: the installed one) do so by itself"""


def main(arguments: list[str]) -> None:
    """Hand over to a command; usage on anything else."""
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(_USAGE)
    elif command == "run":
        try:
            run(rest)
        except UsageError as error:
            raise SystemExit(f"{error}\n\n{_USAGE}") from error
    elif command == "patch":
        try:
            sys.exit(patch(rest))
        except UsageError as error:
            raise SystemExit(f"{error}\n\n{_USAGE}") from error
        except EPError as error:
            raise SystemExit(f"{type(error).__name__}: {error}") from error
    else:
        raise SystemExit(f"unknown command {command!r}\n\n{_USAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
