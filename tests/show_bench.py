"""The tables and the picture of the benchmarks in README.md and docs/, from their kept results.

`.venv/bin/python tests/show_bench.py` writes them where they stand.
"""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "bench" / "results"
PICTURE = ROOT / "docs" / "init-policies.svg"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 56, 130, 20, 44
# Of the palette of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = {"fresh": "#000000", "keep": "#0072B2", "keep-frozen": "#56B4E9", "align": "#D55E00",
           "align-token": "#E69F00", "align-half": "#CC79A7"}  # fmt: skip

_READERS = {"memcpy": "a copy in memory", "ours": "**ours**", "ours, first time":
            "ours, with the checksum of a first read", "streaming": "MosaicML Streaming",
            "webdataset": "WebDataset"}  # fmt: skip


def policy_table(policies: dict[str, Any]) -> str:
    """One row a policy: final loss, samples to the final loss of `fresh`, what is seen."""
    lines = [
        "| policy | final held-out loss, median (range) | samples to the end of `fresh` "
        "| colour named | shape named |",
        "|---|---|---|---|---|",
    ]
    for name, row in policies.items():
        ends = row["final_loss"]["all"]
        shares = [share for share in row["share_of_samples_to_fresh"] if share is not None]
        reached = f"{statistics.median(shares):.2f}" if len(shares) == len(ends) else "not by all"
        named = row["named"]
        lines.append(
            f"| `{name}` | {row['final_loss']['median']:.3f} ({min(ends):.3f} to {max(ends):.3f}) "
            f"| {reached} | {named['colour']:.0%} | {named['shape']:.0%} |"
        )
    return "\n".join(lines)


def policy_picture(policies: dict[str, Any]) -> str:
    """Mean held-out loss over samples as an SVG, every curve named at its end."""
    points = [point for row in policies.values() for point in row["curve"]]
    most = max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)

    def at(x: float, y: float) -> tuple[float, float]:
        along = LEFT + x / most * (WIDTH - LEFT - RIGHT)
        return along, TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for step in range(5):
        loss, samples = low + step / 4 * (high - low), most * step / 4
        (_, y), (x, bottom) = at(0, loss), at(samples, low)
        parts += [
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:.2f}</text>',
            f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{samples:,.0f}</text>',
        ]
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        "samples after the switch; held-out flow loss, mean of three seeds</text>"
    )
    taken: list[float] = []
    for name, row in sorted(policies.items(), key=lambda item: item[1]["curve"][-1][1]):
        colour = COLOURS[name]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in row["curve"]))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        x, y = at(*row["curve"][-1])
        while any(abs(y - other) < 13 for other in taken) and row["curve"][-1][0] == most:
            y -= 1  # names of curves that end together stand above one another
        if row["curve"][-1][0] == most:
            taken.append(y)
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 4:.1f}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


NAMED = {
    "killed": "a training process is killed",
    "node": "a node is lost without notice",
    "drained": "a node has notice",
    "added": "a node joins",
}


def resize_table(faults: dict[str, Any]) -> str:
    """One row a fault: medians of the seconds without an update and of updates done again."""
    lines = [
        "| what happens | seconds without an update | plain Ray Train | ratio | updates lost "
        "| plain Ray Train |",
        "|---|---|---|---|---|---|",
    ]
    for name, words in NAMED.items():
        ours, vanilla = (faults[name][system] for system in ("ours", "vanilla"))
        stopped, other = ours["stopped_s"]["median"], vanilla["stopped_s"]["median"]
        lines.append(
            f"| {words} | {stopped:.1f} | {other:.1f} | {stopped / other:.2f} "
            f"| {ours['lost_updates']['median']:.0f} | {vanilla['lost_updates']['median']:.0f} |"
        )
    return "\n".join(lines)


def mfu_table(cells: list[dict[str, Any]]) -> str:
    """One row a cell: whose step, on what, how it ran, its utilisation and tokens a second."""
    lines = [
        "| whose step | video tokens x clips | how | attention ran on | of the peak | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for cell in sorted(cells, key=lambda cell: (cell["tokens"], -cell["mfu"])):
        how = "compiled" if cell["compiled"] else "eager"
        if cell["masked"]:
            how += ", texts of many lengths"
        if cell["recompute"] != "none":
            how += f", recompute {cell['recompute']}"
        whose = "**Restage**" if cell["whose"] == "ours" else cell["whose"]
        lines.append(
            f"| {whose} | {cell['tokens']:,} x {cell['batch']} | {how} | {cell['attention']} "
            f"| {cell['mfu']:.1%} | {cell['tokens_per_s']:,} |"
        )
    return "\n".join(lines)


def reader_table(figures: dict[str, Any]) -> str:
    """One row a reader: samples a second of each size, in random order and in windows."""
    columns = [(size, order) for size in ("1.1 MB", "9.7 MB") for order in ("random", "windows")]
    lines = [
        "| reader | " + " | ".join(f"{size}, {order}" for size, order in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in figures["1.1 MB"]["orders"]["windows"]:
        found = [figures[size]["orders"][order].get(name) for size, order in columns]
        cells = [f"{row['samples_per_s']:,.0f}" if row else "no" for row in found]
        lines.append(f"| {_READERS.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def batch_table(figures: dict[str, Any]) -> str:
    """One row a loader: samples a second and processor time of one, in batches of 8."""
    lines = [
        "| loader | 1.1 MB, samples/s | processor a sample | 9.7 MB, samples/s "
        "| processor a sample |",
        "|---|---|---|---|---|",
    ]
    for name in figures["1.1 MB"]["batches"]:
        rows = [figures[size]["batches"][name] for size in ("1.1 MB", "9.7 MB")]
        cells = [f"{r['samples_per_s']:,.0f} | {r['cpu_us'] / 1000:.1f} ms" for r in rows]
        kind, _, workers = name.partition(", ")
        shown = _READERS.get(kind, kind) + (f", `DataLoader` with {workers}" if workers else "")
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def headline_table(of: dict[str, dict[str, Any]]) -> str:
    """One row a claim: what was measured, what stands beside it, whether its goal is met."""
    lines = [
        "| what | Restage | beside it | goal of the script | script |",
        "|---|---|---|---|---|",
    ]
    for name, what, ours, beside in _headlines({n: row["figures"] for n, row in of.items()}):
        met = "met" if of[name]["holds"] else "missed"
        lines.append(f"| {what} | **{ours}** | {beside} | {met} | `{name}.py` |")
    return "\n".join(lines)


def _headlines(of: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Script, claim, figure, peers."""
    cells = {
        (c["whose"], c["tokens"], c["compiled"], c["masked"], c["attention"]): c["mfu"]
        for c in of["mfu"]["cells"]
    }
    ours = cells["ours", 4096, True, False, "cudnn"]
    peers = ", ".join(
        f"{name} {mfu:.1%}"
        for (name, tokens, compiled, *_), mfu in cells.items()
        if name != "ours" and tokens == 4096 and compiled
    )
    yield "mfu", "a train step of 4k tokens on one H200: share of its peak", f"{ours:.1%}", peers
    loops = of["overhead"]["loops"]
    yield (
        "overhead",
        "an update on two CPU ranks, of a bare FSDP2 loop's",
        f"{loops['ours']['of_bare']['median']:.2f}",
        f"Lightning Fabric {loops['fabric']['of_bare']['median']:.2f}",
    )
    yield (
        "loader",
        "share of a 50 ms step that waits for data",
        f"{of['loader']['sleeping']['median']:.1%}",
        "",
    )
    yield from _reading(of["reader"], of["order"])
    yield from _failing(of)
    share = max(of["init_policies"]["policies"]["align"]["share_of_samples_to_fresh"])
    yield (
        "init_policies",
        "samples that `Align` needs after a switch to come where `Fresh` ends",
        f"{share:.0%}",
        "of `Fresh`'s",
    )
    low, high = of["memory"]["said_of_peak"]
    yield "memory", "memory that `plan` predicts, of what is taken", f"{low:.2f} to {high:.2f}", ""
    yield (
        "parallel",
        "losses of FSDP, HSDP and context parallel ranks on gloo, apart from one rank's",
        f"{of['parallel']['largest_loss_difference']:.0e}",
        "",
    )
    yield (
        "encode",
        "encoding, of the slower of decoding and codec",
        f"{of['encode']['of_slower_part']['median']:.2f}",
        "",
    )


def _reading(reader: dict[str, Any], order: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    batches = reader["9.7 MB"]["batches"]
    peer = max((r["samples_per_s"], n) for n, r in batches.items() if n.startswith("streaming"))
    yield (
        "reader",
        "batches of 9.7 MB latents, samples/s",
        f"{batches['ours']['samples_per_s']:,.0f}",
        f"MosaicML Streaming {peer[0]:,.0f}",
    )
    most = order["1e+09"]
    yield (
        "order",
        "to open a run at 10^9 samples",
        f"{most['ours']['open_s'] * 1e3:.0f} ms",
        f"a shuffled index {most['shuffled']['open_s']:.0f} s",
    )


def _failing(of: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for fault in ("killed", "node"):
        took = of["resize"]["faults"][fault]
        yield (
            "resize",
            f"seconds without an update when {NAMED[fault]}",
            f"{took['ours']['stopped_s']['median']:.1f}",
            f"plain Ray Train {took['vanilla']['stopped_s']['median']:.1f}",
        )
    trace = of["trace"]
    yield (
        "trace",
        "node time of a recorded spot market that goes into updates which count",
        f"{trace['ours']['of_ideal']:.0%}",
        f"plain Ray Train {trace['vanilla']['of_ideal']:.0%}",
    )
    met = of["recovery"]
    outcomes = met["outcomes"]
    yield (
        "recovery",
        f"of {met['faults']} real faults, recovered from",
        f"{outcomes['recovered'] + outcomes['restarted']}",
        f"the other {outcomes['refused']} refused with a message",
    )
    save = of["checkpoint"]
    yield (
        "checkpoint",
        "seconds that a save costs the training",
        f"{save['lost_s']['median']:.2f}",
        f"`dcp.save` {save['dcp_save']['lost_s']['median']:.2f}, "
        f"`torch.save` {save['torch_save']['lost_s']['median']:.2f}",
    )
    differing = sum(
        world["differing_lines"]
        for kind in ("diffusion", "autoencoder")
        for name, world in of["exact"][kind].items()
        if name.startswith("world")
    )
    yield (
        "exact",
        "logged values that differ with `exact=True` on 1 to 4 ranks, through resizes and a kill",
        str(differing),
        f"at {of['exact']['cost']['world 1']['ratio']['median']:.1f} x the time",
    )


def results() -> dict[str, dict[str, Any]]:
    """What is kept of each script."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def tables(of: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Each table by its name."""
    reader = of["reader"]["figures"]
    return {
        "headlines": headline_table(of),
        "policies": policy_table(of["init_policies"]["figures"]["policies"]),
        "resize": resize_table(of["resize"]["figures"]["faults"]),
        "mfu": mfu_table(of["mfu"]["figures"]["cells"]),
        "reader": reader_table(reader),
        "batches": batch_table(reader),
    }


def filled(page: str, of: dict[str, str]) -> str:
    """The page with each table between its marks as it is now."""
    for name, table in of.items():
        begin, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        if begin in page:
            before, _, rest = page.partition(begin)
            page = f"{before}{begin}{table}\n{end}{rest.partition(end)[2]}"
    return page


def main() -> None:
    """Write the tables and the picture where they stand; say which goals are met."""
    of = results()
    PICTURE.write_text(policy_picture(of["init_policies"]["figures"]["policies"]))
    for page in PAGES:
        page.write_text(filled(page.read_text(), tables(of)))
    for written in (PICTURE, *PAGES):
        print(written.relative_to(ROOT))
    for result in of.values():
        print(f"{result['name']}: {result['goal']}: {'holds' if result['holds'] else 'fails'}")


if __name__ == "__main__":
    main()
