"""Runtime settings: where runs lie and where they run. Never in a stage file."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from elastic.checkpoint_store import KEEP_LAST
from elastic.errors import InputError


class Settings(BaseSettings):
    """From flags, then `RESTAGE_*` variables, then a `.env` file, then these defaults."""

    model_config = SettingsConfigDict(
        env_prefix="RESTAGE_", env_file=".env", extra="ignore", frozen=True
    )

    storage: str = "runs"
    """Folder that holds one folder for each plan."""
    ray_address: str | None = None
    """Ray cluster to use; none means one of this machine alone, for the time of the command."""
    cpus: int | None = Field(default=None, ge=1)
    """CPUs, and so workers, of the cluster that is started; none means all."""
    checkpoints: str | None = None
    """Folder or URL (s3://...) below which the checkpoints of all plans lie; none: in the runs."""
    latents: str | None = None
    """Folder or URL (s3://...) below which the latents of all plans lie; none: in the runs."""
    pack_latents: bool = False
    """Whether stores of latents that are begun are compressed."""
    keep_last: int = Field(default=KEEP_LAST, ge=1)
    """Checkpoints that are kept of each stage."""
    keep_every: int | None = Field(default=None, ge=1)
    """Keep one in so many samples for good, besides the last ones."""
    aim: bool = True
    """Whether to fill the Aim repository in the run folder."""
    min_stay: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """Seconds that a group of workers keeps its size before it grows."""
    leave_before: float = Field(default=60.0, ge=0, allow_inf_nan=False)
    """Seconds before a node with notice goes, in which the group saves and leaves it."""
    hang_after: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Seconds without a sign of life after which a training process counts as hung."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"

    @property
    def storage_path(self) -> Path:
        """The storage as an absolute local path; InputError for a URL."""
        if not self.storage:
            raise InputError("storage '': empty; give a folder, such as --storage runs")
        if "://" in self.storage:
            raise InputError(
                f"storage {self.storage!r}: runs are kept on a local path (or a mounted one); "
                "URLs are not supported yet; give a folder, such as --storage runs"
            )
        return Path(self.storage).expanduser().absolute()


def read_settings(**flags: object) -> Settings:
    """Settings with the flags that were given; InputError names a bad value and its source."""
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)  # type: ignore[arg-type]  # validated by pydantic just here
    except UnicodeDecodeError as error:
        raise InputError(f".env is not UTF-8 ({error}); write it again as UTF-8") from None
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0])
        raise InputError(
            f"setting {name} (flag --{name.replace('_', '-')} or RESTAGE_{name.upper()}): "
            f"{fault['msg']}, got {fault['input']!r}"
        ) from None
