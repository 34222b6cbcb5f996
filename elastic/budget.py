"""How many crashes in a row are worth another try."""

from dataclasses import dataclass

MAX_CRASHES = 8


@dataclass
class Budget:
    """Counts crashes since the last progress; a new checkpoint heals it."""

    max_crashes: int = MAX_CRASHES
    num_crashes: int = 0
    position: int = -1  # of the newest checkpoint at the last crash

    def crashed(self, position: int, num: int = 1) -> bool:
        """Count crashes at a time when the newest checkpoint is at `position`; whether to go on."""
        if position > self.position:
            self.num_crashes = 0
        self.position = max(self.position, position)
        self.num_crashes += num
        return self.num_crashes <= self.max_crashes
