"""Where the latent stores of a run lie: in its folder, or below a folder or URL of the settings."""

import json
import uuid
from pathlib import Path

from elastic.checkpoint_place import marked_by_another, open_storage
from elastic.checkpoint_store import OWNER
from elastic.data.places import is_url, join
from elastic.errors import InputError
from elastic.files import write_atomic
from elastic.folders import LATENT_PINS, LATENTS_AT, RunFolder


def settle_latents(folder: RunFolder, setting: str | None) -> None:
    """Let the latents of a run lie where the setting asks; without one, where they are.

    `<setting>/<plan>/latents`, noted in the run folder, and marked there as this run's. InputError
    if stages have latents elsewhere already, or if the place is another run's.
    """
    if setting is None:
        return
    wanted = _place_for(setting, folder)
    if folder.latents != wanted:
        _require_none(folder, wanted)
    note = folder.root / LATENTS_AT
    run = json.loads(note.read_text())["run"] if note.exists() else uuid.uuid4().hex
    # First who asks, where it was: a place that is refused is not noted.
    write_atomic(note, json.dumps({"place": folder.latents, "run": run}).encode())
    whose = marked_by_another(open_storage(wanted), run, "folder", folder.root)
    if whose is not None:
        raise InputError(
            f"latents {setting!r}: {wanted} holds the latents of {whose}; give another "
            "--latents, or go on in the run folder that they belong to; if they are this run's, "
            f"remove its {OWNER}"
        )
    write_atomic(note, json.dumps({"place": wanted, "run": run}).encode())


def _place_for(setting: str, folder: RunFolder) -> str:
    setting = setting.removeprefix("file://")
    place = setting if is_url(setting) else str(Path(setting).expanduser().absolute())
    return join(join(place, folder.root.name), "latents")


def _require_none(folder: RunFolder, wanted: str) -> None:
    pinned = sorted(folder.root.glob(f"stages/*/{LATENT_PINS}"))
    if pinned:
        raise InputError(
            f"stage {pinned[0].parent.name!r} has its latents in {folder.latents}, and --latents "
            f"asks for {wanted}; go on without --latents, or copy them there and write "
            f"{json.dumps({'place': wanted, 'run': uuid.uuid4().hex})} into "
            f"{folder.root / LATENTS_AT}"
        )
