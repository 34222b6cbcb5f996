"""`python -m elastic` and `restage`."""

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
    from elastic.cli import main as run

    sys.exit(run())


def _refuse(error: ImportError | str) -> int:
    print(f"restage: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
