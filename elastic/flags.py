"""Flags that several verbs take, and what their values must be."""

import argparse
import math


def cluster_flags(parser: argparse.ArgumentParser) -> None:
    """What verbs that run on a cluster take."""
    parser.add_argument("--ray-address", help="Ray cluster (default: one of this machine alone)")
    parser.add_argument("--cpus", type=at_least_one, help="CPUs of that one (default: all)")
    parser.add_argument(
        "--no-aim",
        dest="aim",
        action="store_const",
        const=False,
        help="do not fill the Aim repository",
    )


def training_flags(parser: argparse.ArgumentParser) -> None:
    """What training alone takes: when it moves, what is a hang, where checkpoints are written."""
    parser.add_argument("--min-stay", help="seconds that a group keeps its size (default: 30)")
    parser.add_argument("--hang-after", help="seconds of silence that are a hang (default: 60)")
    parser.add_argument(
        "--checkpoints", metavar="URL", help="folder or s3:// URL (default: in the run folder)"
    )


def keep_flags(parser: argparse.ArgumentParser) -> None:
    """Which checkpoints stay."""
    parser.add_argument("--keep-last", type=at_least_one, help="kept a stage (default 2)")
    parser.add_argument(
        "--keep-every", type=at_least_one, metavar="SAMPLES", help="and one in so many for good"
    )


def at_least_one(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 1 or more")
    return int(text)


def gib(text: str) -> float:
    """GiB, more than 0."""
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: must be GiB, a number greater than 0")
    return size


def finite(text: str) -> float:
    """A finite number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a finite number, 0 or more")
    return value
