"""The views of a run that Aim's explorers are opened with: its pages are empty without a query."""

from typing import Any, Literal, NamedTuple

from elastic.aim_view import MARKS

Kind = Literal["metrics", "images"]


class View(NamedTuple):
    """One saved page of an Aim explorer."""

    name: str
    description: str
    kind: Kind
    state: dict[str, Any]  # Any: Aim's own schema


def standard_views(plan: str) -> list[View]:
    """Training, held-out clips, noise, speed, machines, time, and what was made, of the plan."""
    overall = "'bucket' not in metric.context and 'subset' not in metric.context"
    return [
        _metrics(plan, "Training", "loss, gradient norm and learning rate by stage, and events",
                 ("loss", "grad_norm", "lr", MARKS), overall),
        _metrics(plan, "Held-out clips", "loss, PSNR and SSIM on clips that are not trained on",
                 ("loss", "psnr", "ssim"), "'subset' in metric.context"),
        _metrics(plan, "Loss by noise", "held-out clips at fixed times, from 0 (data) to 1 (noise)",
                 ("loss_by_t",), "'subset' in metric.context", colour="t"),
        _metrics(plan, "Speed", "samples and tokens a second, share of the peak, waits, memory",
                 ("samples_per_s", "tokens_per_s", "mfu", "useful_tokens", "data_wait",
                  "memory_peak"), overall),
        _metrics(plan, "Machines", "events, world size and attempts, and the loss of each attempt",
                 (MARKS, "world_size", "attempt", "loss_by_attempt"), overall),
        _metrics(plan, "Goodput", "share of the time that was training that was kept",
                 ("goodput",), overall),
        _metrics(plan, "Where the time went", "seconds of each activity since the beginning",
                 ("seconds",), "metric.context.stage == 'plan'", colour="activity"),
        _images(plan, "Samples", "each caption over the positions of a stage", "samples",
                ("stage", "caption")),
        _images(plan, "Reconstructions", "clips beside what the codec gives back of them",
                "reconstructions", ("stage",)),
    ]  # fmt: skip


def _metrics(
    plan: str,
    name: str,
    description: str,
    names: tuple[str, ...],
    which: str,
    colour: str = "stage",
) -> View:
    query = f"{_of(plan)} and metric.name in {list(names)!r} and {which}"
    grouping = {
        "color": [f"context.{colour}"],
        "stroke": [],
        "chart": ["name"],
        "isApplied": {"color": True, "stroke": True, "chart": True},
        "paletteIndex": int(colour == "activity"),  # of 16 colours: Aim's first has 8
    }
    return View(name, description, "metrics", {"select": _select(query), "grouping": grouping})


def _images(plan: str, name: str, description: str, what: str, rows: tuple[str, ...]) -> View:
    query = f"{_of(plan)} and images.name == {what!r}"
    grouping = {"row": [f"context.{key}" for key in rows], "isApplied": {"row": True}}
    return View(name, description, "images", {"select": _select(query), "grouping": grouping})


def _of(plan: str) -> str:
    return f"run.experiment == {plan!r} and run.hparams.stage == 'all'"


def _select(query: str) -> dict[str, Any]:
    return {"options": [], "query": "", "advancedMode": True, "advancedQuery": query}
