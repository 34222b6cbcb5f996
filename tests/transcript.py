"""A session on a cluster, from an empty directory to a finished run: `python tests/transcript.py`.

Every command is run as it stands there; what it printed follows it, with the paths shortened.
The whole is written to docs/transcript.md. Takes some minutes.
"""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import ray

from cluster import faults
from cluster.token import takes_jobs_from_anyone
from elastic.journal import read_events

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "transcript.md"
_OF_OTHERS = re.compile(r"RAY_|RESTAGE_|PYTHON")
_WAIT_S = 240.0
_INTRO = """# A session on a cluster

Written by `python tests/transcript.py`: every command was run, and what it printed follows it.
The head and three workers are raylets of one machine, so the seconds mean nothing. Paths are
shortened, and lines of Ray's own are left out where three dots stand.
"""
PARTS = '''"""The parts of my models, beside the stage file that trains them."""

from models import DiT, HunyuanVAE

codec = HunyuanVAE(widths=(4, 4, 8, 8), layers=1, norm_groups=2, channels=4)
transformer = DiT(depth=1, depth_single=1, width=24, heads=2, patch=2)
'''
PLAN = '''"""My plan: a small autoencoder, then a DiT on its latents."""

from my_parts import codec, transformer

from models import WordHash
from stages import (AdamW, AutoencoderStage, Bucket, DiffusionStage, Ema, Fresh, Phase, Plan,
                    Videos)

videos = Videos("{home}/clips/captions.csv", folder="{home}/clips")
clip = Bucket("32px", frames=5, batch=6, micro=2)
vae = AutoencoderStage(
    name="vae", data=videos, vae=codec, init=Fresh(seed=0), rate=8.0,
    schedule=[Phase(until=48, buckets=[clip])],
    optimizer=AdamW(lr=1e-3), ema=Ema(halflife=16), workers=(1, 3),
    save_every=24, log_every=12, evaluate_every=48,
)
dit = DiffusionStage(
    name="dit", data=videos, vae=vae, model=transformer, text=WordHash(width=16),
    init=Fresh(seed=1), rate=8.0,
    schedule=[Phase(until=6_000, buckets=[clip])],
    optimizer=AdamW(lr=1e-3), ema=Ema(halflife=50), workers=(1, 3),
    save_every=300, log_every=60, evaluate_every=6_000,
)
plan = Plan("mine", [vae, dit])
'''
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NOISE = re.compile(
    r"INFO (?!cli)|WARNING services|SUCC .*---|DeprecationWarning|warnings\.warn|^\s*$"
)


class Session:
    """What is typed, what comes back, and the lines of the page."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.lines = [_INTRO]
        kept = {name: value for name, value in os.environ.items() if not _OF_OTHERS.match(name)}
        self.environment = {
            **kept,
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(home / "ray"),
            "PYTHONWARNINGS": "ignore",
        }
        self._hidden: dict[str, str] = {}
        self._behind: list[subprocess.Popen[bytes]] = []

    def say(self, text: str) -> None:
        """A sentence between commands."""
        self.lines.append(f"\n{text}\n")
        print(f"\n{text}", flush=True)

    def run(self, command: str, code: int = 0) -> str:
        """Run a command that has to end with this code, and show what it prints."""
        done = subprocess.run(
            ["bash", "-c", f"[ ! -f ray.env ] || . ./ray.env; {command}"],
            cwd=self.home, env=self.environment, capture_output=True, text=True,
            timeout=_WAIT_S * 2, check=False,
        )  # fmt: skip
        self._show(f"$ {command}", done.stdout + done.stderr)
        if done.returncode != code:
            raise SystemExit(f"{command}: ended with {done.returncode}, not with {code}")
        return done.stdout

    def start(self, command: str) -> psutil.Process:
        """Run a command behind the session."""
        log = (self.home / "behind.log").open("ab")
        process = subprocess.Popen(
            ["bash", "-c", f". ./ray.env; exec {command}"],
            cwd=self.home, env=self.environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        log.close()
        self._behind.append(process)
        self._show(f"$ {command} &", "")
        return psutil.Process(process.pid)

    def wait(self, true: Any, what: str) -> None:
        """Wait for a condition, and say nothing about it."""
        end = time.monotonic() + _WAIT_S
        while not true():
            if time.monotonic() > end:
                raise SystemExit(f"waited {_WAIT_S:.0f} s for {what}")
            time.sleep(0.2)

    def _show(self, command: str, output: str) -> None:
        lines, is_left_out = [], False
        for line in _COLOUR.sub("", output).splitlines():
            if _NOISE.search(line):
                is_left_out = True
                continue
            lines += (["..."] if is_left_out else []) + [line.rstrip()]
            is_left_out = False
        text = self._shortened("\n".join([command, *lines]))
        self.lines.append(f"```\n{text}\n```")
        print(text, flush=True)

    def hide(self, word: str, name: str) -> None:
        """Show a name in place of something that is this machine's own."""
        self._hidden[word] = name

    def _shortened(self, text: str) -> str:
        for word, name in self._hidden.items():
            text = text.replace(word, name)
        text = text.replace(str(self.home), "~").replace(f"@{socket.gethostname()}", "@head")
        return text.replace(str(ROOT), "~/restage")

    def close(self) -> None:
        """End what was started behind the session."""
        for process in self._behind:
            if process.poll() is None:
                faults.kill_tree(process.pid)
                process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _num(session: Session, kind: str, stage: str = "dit") -> int:
    events = read_events(session.home / "runs/mine")
    return sum(event["kind"] == kind and event["stage"] == stage for event in events)


def _answers(url: str) -> bool:
    try:
        return not takes_jobs_from_anyone(url)
    except OSError:
        return False


def play(session: Session) -> None:
    """The whole session."""
    home = session.home
    (home / "my_parts.py").write_text(PARTS)
    (home / "my_plan.py").write_text(PLAN.format(home=home))
    address, gcs, jobs = ray.util.get_node_ip_address(), _free_port(), _free_port()
    session.hide(address, "HEAD")
    node = "ray start --block --disable-usage-stats --object-store-memory=100000000"
    at = f"--address http://127.0.0.1:{jobs}"

    session.say("My own stage file, and a module beside it; clips to train on.")
    session.run("cat my_parts.py my_plan.py")
    session.run(
        "python -c 'from pathlib import Path; from elastic.data.moving_shapes import "
        'write_demo_videos; write_demo_videos(Path("clips"), clips=24)\''
    )
    session.say("A token, and the settings that recovery depends on, on every node.")
    session.run("ray get-auth-token --generate > /dev/null; stat -c '%a %n' .ray/auth_token")
    session.run("chmod 600 .ray/auth_token")
    session.run(
        "python -c 'from cluster.local import ENVIRONMENT; "
        '[print(f"export {n}={v}") for n, v in {**ENVIRONMENT, "RAY_AUTH_MODE": "token"}.items()]\''
        " > ray.env; cat ray.env"
    )
    session.say("A head and two workers.")
    session.start(
        f"{node} --head --num-cpus=0 --port={gcs} --temp-dir=$HOME/ray "
        f"--dashboard-port={jobs} --dashboard-agent-listen-port=0"
    )
    session.wait(lambda: _answers(f"http://127.0.0.1:{jobs}"), "the job API")
    # On one machine each node needs a folder of its own for what jobs carry.
    worker = f"{node} --address={address}:{gcs} --num-cpus=1 --dashboard-agent-listen-port=0"
    session.start(f"{worker} --temp-dir=$HOME/ray-1")
    lost = session.start(f"{worker} --temp-dir=$HOME/ray-2")
    session.say("Who has not the token is sent away.")
    session.run(f"curl -s -o /dev/null -w '%{{http_code}}\\n' http://127.0.0.1:{jobs}/api/jobs/")
    session.run(
        f"python -m elastic doctor --ray-address {address}:{gcs} | grep -E '^[a-z]+ +(Ray|node)'"
    )
    session.say("The plan as a job.")
    session.run(
        f"ray job submit {at} --no-wait --submission-id first --working-dir . "
        '--runtime-env-json \'{"excludes": ["ray*", "runs", "clips", "*.log"]}\' '
        "-- python -m elastic train my_plan.py --storage $HOME/runs --min-stay 2 --no-aim"
    )
    session.wait(lambda: _num(session, "publish") > 0, "a checkpoint")
    session.say("From a second shell:")
    session.run("python -m elastic status runs/mine")
    session.say(
        "The machine of a worker is lost: its processes are killed. Then another one comes."
    )
    starts = _num(session, "start")
    faults.kill_tree(lost.pid)
    session.wait(lambda: _num(session, "start") > starts, "a group without it")
    starts = _num(session, "start")
    session.start(f"{worker} --temp-dir=$HOME/ray-3")
    session.wait(lambda: _num(session, "start") > starts, "a group with another one")
    session.run(
        "python -c 'from elastic.journal import read_events; "
        '[print(e["kind"], e["position"], e["world"], e["reason"]) for e in '
        'read_events("runs/mine") if e["stage"] == "dit" and '
        'e["kind"] in ("start", "crash", "resize_requested")]\''
    )
    session.run("python -m elastic status runs/mine")
    session.say("Stop it, and lose nothing.")
    session.run("python -m elastic stop runs/mine --save")
    session.wait(
        lambda: "PENDING" not in _status(session, at) and "RUNNING" not in _status(session, at),
        "the end of the job",
    )
    session.run(f"ray job status {at} first 2>&1 | grep Status")
    session.say("Submit it again, with our own verb this time: it goes on, and ends.")
    session.run(
        f"python -m elastic submit my_plan.py {at} --storage $HOME/runs --min-stay 2 --no-aim "
        "--exclude 'ray*' --exclude clips --exclude '*.log'"
    )
    session.run("python -m elastic status runs/mine")


def _status(session: Session, at: str) -> str:
    done = subprocess.run(
        ["bash", "-c", f". ./ray.env; ray job status {at} first"],
        cwd=session.home, env=session.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def main() -> None:
    """Play the session in a folder of its own, and write the page."""
    # A short path: the sockets below it may be at most 107 bytes long.
    with tempfile.TemporaryDirectory(prefix="rst-", dir="/tmp") as scratch:
        session = Session(Path(scratch))
        try:
            play(session)
        finally:
            session.close()
        TARGET.write_text("\n".join(session.lines) + "\n")


if __name__ == "__main__":
    main()
