"""The demo's course at twice the height and width: four times the pixels, four times as long."""

from stages import Videos
from stages.recipes.demo import course

plan = course("demo-long", Videos("runs/demo-videos/captions.csv"), size="64px")
