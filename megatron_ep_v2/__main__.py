"""Command line: `python -m megatron_ep_v2 run SCRIPT ARGS...`"""

from __future__ import annotations

import sys

from megatron_ep_v2.cli.run import UsageError, run

_USAGE = """usage: python -m megatron_ep_v2 COMMAND ...

  run SCRIPT ARGS...   run a training script with Megatron's flex dispatcher on this package"""


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
    else:
        raise SystemExit(f"unknown command {command!r}\n\n{_USAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
