"""`python -m elastic` and `restage`."""

import os
import sys


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
    if sys.argv[1:] == ["--version"]:  # the command line imports torch
        from elastic.versions import version_line

        print(version_line())
        return
    from elastic.cli import INTERRUPTED
    from elastic.cli import main as run
    from elastic.output import end_output

    code = run()
    ended = end_output(code)
    if code == INTERRUPTED:
        # The course's thread may still wait for Ray, which is gone: it would not survive Python's
        # own end. All that has to be ended or written is.
        sys.stderr.flush()
        os._exit(ended)
    sys.exit(ended)


def _refuse(error: ImportError | str) -> int:
    print(f"restage: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
