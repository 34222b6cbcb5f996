"""`python -m elastic` and `restage`."""

import atexit
import os
import sys
from typing import NoReturn


def main() -> None:
    """Check that our packages are ours, then run the command line."""
    try:
        from elastic.own_packages import PackageError, check_packages
    except ModuleNotFoundError as error:
        sys.exit(
            _refuse(
                f"{error}; Restage is not installed for {sys.executable}: run make venv, then use "
                ".venv/bin/python -m elastic"
            )
        )
    try:
        check_packages()
    except PackageError as error:
        sys.exit(_refuse(error))
    from elastic.cli import INTERRUPTED
    from elastic.cli import main as run

    code = run()
    if code == INTERRUPTED:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """End without waiting for threads: one in the middle of a call into Ray would crash the
    interpreter on its way out, and take the exit code with it.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _refuse(error: ImportError | str) -> int:
    print(f"restage: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
