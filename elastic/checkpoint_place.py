"""Which place holds the checkpoints of a stage, whose it is, and what has to be there."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from elastic.checkpoint_store import OWNER, LocalStorage, Storage
from elastic.data.places import check_url, is_url
from elastic.errors import InputError, StageBlocked
from elastic.files import write_atomic

HOME = "checkpoints.url"  # in a stage's folder, if its checkpoints lie elsewhere: where


class Register:
    """The positions that a stage has published and not deleted, kept in the stage's own folder.

    It says what has to be there when the place itself cannot: a disk that is not mounted, a
    checkpoint that lost its manifest. Written under the fence. Stages of versions that kept none
    have an empty one.
    """

    def __init__(self, stage: Path) -> None:
        self.path = stage / "published.json"

    def positions(self) -> set[int]:
        """Damaged ones too."""
        try:
            return set(json.loads(self.path.read_text()))
        except FileNotFoundError:
            return set()
        except (ValueError, TypeError) as error:
            raise OSError(f"{self.path} is no list of positions: {error}") from None

    def add(self, position: int) -> None:
        """It is published."""
        self._write(self.positions() | {position})

    def remove(self, positions: Collection[int]) -> None:
        """They will be deleted."""
        self._write(self.positions() - set(positions))

    def _write(self, positions: set[int]) -> None:
        write_atomic(self.path, json.dumps(sorted(positions)).encode())


class Wanted:
    """The checkpoints of a stage that branches start from, by the branch's name; none is deleted.

    Kept in the stage's own folder. Written while no attempt at the stage publishes or deletes
    (`elastic.checkpoint_fence.quiet`), so that what is written here is either kept or known gone.
    """

    def __init__(self, stage: Path) -> None:
        self.path = stage / "branches.json"

    def positions(self) -> set[int]:
        """Whichever branch wants them."""
        try:
            return {int(at) for at in json.loads(self.path.read_text()).values()}
        except FileNotFoundError:
            return set()
        except (ValueError, TypeError, AttributeError) as error:
            raise OSError(f"{self.path} has no positions by branch: {error}") from None

    def write(self, branches: Mapping[str, int]) -> None:
        """These are the branches, and no others."""
        write_atomic(self.path, json.dumps(dict(branches)).encode())


def open_storage(place: str) -> Storage:
    """The storage at a folder or URL; InputError where no program for the URL is installed."""
    scheme, found, rest = place.partition("://")
    if not found or scheme == "file":
        return LocalStorage(Path(rest if found else place).expanduser().absolute())
    from elastic.checkpoint_url import UrlStorage  # fsspec's back ends take long to import

    return UrlStorage(place)


def place_for(setting: str | None, stage: Path) -> str:
    """Where the setting `checkpoints` puts those of the stage that lives in this folder.

    `<setting>/<plan>/stages/<stage>/checkpoints`; in the stage's own folder without the setting.
    """
    if setting is None:
        return str(stage / "checkpoints")
    setting = setting.removeprefix("file://")
    if "://" not in setting:
        return str(Path(setting).expanduser().absolute().joinpath(*stage.parts[-3:], "checkpoints"))
    return "/".join((setting.rstrip("/"), *stage.parts[-3:], "checkpoints"))


def storage_of(stage: Path) -> Storage:
    """Where the checkpoints of the stage that lives in this folder lie."""
    return open_storage(_home(stage))


def settle(stage: Path, setting: str | None, run: str) -> str:
    """The place that the setting asks for, noted in the stage's folder and marked as this run's.

    `run` is the stage's own word for itself (Fence). StageBlocked if the stage has checkpoints
    elsewhere, since it would silently start over, or if the place is another run's. OSError where
    the place cannot be read.
    """
    home, wanted = _home(stage), place_for(setting, stage)
    if home != wanted:
        _require_none(stage, home, wanted)
    if wanted != place_for(None, stage):
        _claim(stage, wanted, run, is_new=home != wanted)
    if home != wanted:
        write_atomic(stage / HOME, wanted.encode())
    return wanted


def _require_none(stage: Path, home: str, wanted: str) -> None:
    there = {*open_storage(home).positions(), *Register(stage).positions()}
    if there:
        raise StageBlocked(
            f"stage {stage.name!r} has its checkpoints (newest: {max(there)}) in {home}, the "
            f"setting `checkpoints` asks for {wanted}; go on with the earlier setting, or move the "
            f"checkpoints there and write that place into {stage / HOME}"
        )


def _claim(stage: Path, place: str, run: str, is_new: bool) -> None:
    """Mark a place outside of the run folder; two runs of one plan may ask for the same one.

    One that is not new was this stage's before marks were made, or is said to be by a person.
    """
    storage = open_storage(place)
    if not storage.owner() and is_new and (there := storage.positions()):
        _refuse(stage, place, f"checkpoints (newest: {there[0]}) of a run that left no mark")
    whose = marked_by_another(storage, run, "stage", stage)
    if whose is not None:
        _refuse(stage, place, f"the checkpoints of {whose}")


def marked_by_another(storage: Storage, run: str, word: str, home: Path) -> str | None:
    """Mark a place as a run's, whose home is told under `word`; the other's if it has a mark."""
    storage.claim(json.dumps({"run": run, word: str(home)}).encode())
    try:
        owner = json.loads(storage.owner())
        return None if owner["run"] == run else str(owner[word])
    except (ValueError, LookupError, TypeError) as error:
        return f"somebody whose {OWNER} cannot be read ({error!r})"


def _refuse(stage: Path, place: str, whose: str) -> None:
    raise StageBlocked(
        f"stage {stage.name!r} would keep its checkpoints in {place}, which holds {whose}; give "
        "another --checkpoints, or go on in the run folder that they belong to, or move them away "
        f"to begin anew; if they are this run's, write that place into {stage / HOME} and remove "
        f"its {OWNER}"
    )


def _home(stage: Path) -> str:
    note = stage / HOME
    return note.read_text().strip() if note.exists() else place_for(None, stage)


def check_place(setting: str | None, name: str = "checkpoints") -> None:
    """InputError, ahead of any work, where a setting for a place cannot be used."""
    if setting is None:
        return
    if not setting:
        raise InputError(f"{name} '': empty; give a folder or a URL such as s3://bucket/runs")
    if is_url(setting):
        check_url(setting, name)
