"""Whether more workers shorten an update: asked before a group is stopped in order to grow."""

import logging
from collections.abc import Callable, Iterable

from ray.exceptions import RayError

from elastic.data.deal import round_sizes
from elastic.ray_tracker import TrackerHandle

log = logging.getLogger(__name__)

Batches = list[tuple[int, int]]  # batch and micro of each bucket


class Gain:
    """Compares what each worker computes on two worlds, in the phase in which the stage is.

    Plain numbers, as the controller's process imports no torch.
    """

    def __init__(
        self,
        phases: Iterable[tuple[int, Batches]],
        context: int,
        exact: bool,
        position: Callable[[], int | None],
    ) -> None:
        """`phases` by where they end; `position` is None where nobody knows it."""
        self._phases = list(phases)
        self._context = context
        self._exact = exact
        self._position = position

    def __call__(self, now: int, more: int) -> bool:
        """Whether a worker of the larger world computes less of any bucket."""
        position = self._position()
        if position is None:
            return True
        batches = next((each for until, each in self._phases if position < until), [])
        return any(self._rows(*one, more) < self._rows(*one, now) for one in batches)

    def _rows(self, batch: int, micro: int, workers: int) -> int:
        return sum(round_sizes(batch, micro, workers // self._context, self._exact))


class Position:
    """Where a stage is, as the tracker was told last; None where nothing has been told yet."""

    def __init__(self, stage: str, tracker: str) -> None:
        self._stage = stage
        self._tracker = tracker
        self._known: int | None = None

    def __call__(self) -> int | None:
        """Its position in samples."""
        try:
            latest = TrackerHandle(self._tracker).latest()
        except (RayError, ValueError) as error:  # no tracker, or no head: what is known must do
            log.info("where the stage is could not be asked: %s", error)
            return self._known
        if latest.get("stage") == self._stage and "position" in latest:
            self._known = latest["position"]
        return self._known
