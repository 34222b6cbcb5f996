"""Flags that several verbs take, and what their values must be."""

import argparse
import math
import re

from cluster.constants import RATE_LLAMA3, RATE_RSC


def cluster_flags(parser: argparse.ArgumentParser) -> None:
    """What verbs that run on a cluster take."""
    parser.add_argument("--ray-address", help="Ray cluster (default: one of this machine alone)")
    parser.add_argument("--cpus", type=at_least_one, help="CPUs of that one (default: all)")


def aim_flag(parser: argparse.ArgumentParser) -> None:
    """What verbs that tell a tracker take."""
    parser.add_argument(
        "--no-aim",
        dest="aim",
        action="store_const",
        const=False,
        help="do not fill the Aim repository",
    )


def latents_flag(parser: argparse.ArgumentParser) -> None:
    """What verbs that write latents take."""
    parser.add_argument(
        "--latents", metavar="URL", help="folder or s3:// URL (default: in the run folder)"
    )
    parser.add_argument(
        "--pack-latents",
        action="store_const",
        const=True,
        help="compress them: a quarter less to store, about a ms a megabyte to read",
    )


def training_flags(parser: argparse.ArgumentParser) -> None:
    """What training alone takes: when it moves, what is a hang, where checkpoints are written."""
    parser.add_argument(
        "--grow",
        action="store_true",
        help="take in what was added to the tables of stages that are under way",
    )
    parser.add_argument("--min-stay", help="seconds that a group keeps its size (default: 30)")
    parser.add_argument(
        "--leave-before", help="seconds before a node with notice goes to leave it (default: 60)"
    )
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


def device_flags(parser: argparse.ArgumentParser) -> None:
    """The GPUs that a plan is meant for, and whether the one here is tried."""
    parser.add_argument("--gpus", type=at_least_one, help="for so many GPUs (default: fewest)")
    parser.add_argument(
        "--gpu-memory",
        type=gib,
        metavar="GIB",
        help="refuse what a GPU of this size cannot hold (default: the one here)",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="time micro-batches of growing size on this device, and say which is fastest",
    )


def fault_flags(parser: argparse.ArgumentParser) -> None:
    """What befalls the machines, for the goodput that is expected of a plan."""
    parser.add_argument(
        "--failure-rate",
        type=finite,
        metavar="R",
        help="faults a GPU-day, for the expected goodput "
        f"(Llama 3: {RATE_LLAMA3.value:g}, Meta RSC: {RATE_RSC.value:g})",
    )
    parser.add_argument(
        "--announced",
        type=share,
        metavar="SHARE",
        help="of these faults, which take a machine after a notice that is long enough to save",
    )
    parser.add_argument(
        "--spares", type=at_least_one, metavar="N", help="machines that wait to replace a lost one"
    )


def doctor_flags(parser: argparse.ArgumentParser) -> None:
    """What is looked at beside this machine and its storage."""
    parser.add_argument("--checkpoints", metavar="URL", help="folder or s3:// URL to look at")
    parser.add_argument("--latents", metavar="URL", help="folder or s3:// URL to look at")
    parser.add_argument("--ray-address", help="HOST:PORT of a cluster, whose nodes are looked at")
    parser.add_argument(
        "--port",
        type=port,
        action="append",
        default=[],
        help="that should be free; may be given many times",
    )
    json_flag(parser)


def at_flag(parser: argparse.ArgumentParser) -> None:
    """What verbs that use the weights of one stage take."""
    parser.add_argument(
        "--at",
        type=position,
        metavar="POSITION",
        help="as they are in this checkpoint of the stage, finished or not (default: at its end)",
    )


def json_flag(parser: argparse.ArgumentParser) -> None:
    """What verbs that report take."""
    parser.add_argument(
        "--json", action="store_true", help="one JSON object instead of text (docs/json.md)"
    )


def at_least_one(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 1 or more")
    return int(text)


def position(text: str) -> int:
    """Samples, with or without the commas that they are printed with."""
    is_grouped = re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", text) is not None
    return at_least_one(text.replace(",", "") if is_grouped else text)


def port(text: str) -> int:
    """A TCP port; 0 is any that is free."""
    if not (text.isascii() and text.isdecimal() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a port, 0 to 65535")
    return int(text)


def gib(text: str) -> float:
    """GiB, more than 0."""
    return _positive(text, "must be GiB, a number greater than 0")


def shift(text: str) -> float:
    """A factor of the odds of noise, more than 0."""
    return _positive(text, "must be a number greater than 0; 1 shifts nothing")


def _positive(text: str, rule: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: {rule}")
    return value


def finite(text: str) -> float:
    """A finite number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a finite number, 0 or more")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number from 0 to 1")
    return value
