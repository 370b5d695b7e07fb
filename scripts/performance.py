"""Writes the figures that scripts/performance has found into the document, between the marks of their deployment.

    performance.py embedded|distributed FOLDER DOCUMENT
"""

import datetime
import json
import pathlib
import sys

MODES = ["send", "relay", "light", "open", "drain", "idle", "attachments", "mixed", "register", "start", "growth"]
# What stands first in a table; the rest follows by name.
FIRST = [
    "signups_per_s", "sends_per_s", "messages_per_s", "drained_per_s", "drained_ms", "opened_per_s", "socket_kib",
    "socket_anonymous_kib", "upload_mib_per_s", "download_mib_per_s", "copy_mib_per_s", "upload_ratio", "download_ratio",
    "waiting", "ready_ms", "answering_ms", "p50_ms", "p99_ms", "max_ms", "delivered", "lost", "repeated", "reordered",
    "redelivered", "left", "all_cpu_us_each", "server_cpu_us_each", "other_cpu_us_each", "tool_cpu_us_each", "server_cores",
]
# What the tables leave out; the plots and the JSON have it.
LEFT_OUT = {"p90_ms", "p999_ms", "sent", "refused", "disk_ms", "queued_per_s", "filled_s"}
# Taken over the time in which late acks may still come, so a share of it says nothing.
LEFT_OUT_OF = {"drain": {"server_cores"}}


def shown(value):
    if value is None:
        return ""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3g}"


def table(mode, figures):
    lines = ["| What | Median | Lowest to highest |", "|---|---|---|"]
    place = {key: n for n, key in enumerate(FIRST)}
    for key, cases in sorted(figures.items(), key=lambda figure: (place.get(figure[0], len(place)), figure[0])):
        for case in cases:
            if key not in LEFT_OUT | LEFT_OUT_OF.get(mode, set()):
                spread = f"{shown(case['min'])} to {shown(case['max'])}"
                lines.append(f"| {case['label']} | {shown(case['median'])} | {spread if len(case['runs']) > 1 else ''} |")
    return lines


def growth_table(figures):
    """A row for each step: how fast it still is, and what each send and message costs then."""
    cost = "all_cpu_us_each" if "all_cpu_us_each" in figures else "server_cpu_us_each"
    columns = [("sends_per_s", "send, "), (cost, "send, "), ("messages_per_s", "relay, "), (cost, "relay, "), ("p99_ms", "relay, ")]
    lines = [
        "| With | sends/s | CPU of a send, us | relayed messages/s | CPU of a message, us | p99 to the delivery, ms | resident MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for step in figures["resident_mib"]:
        def median(key, before):
            return next(case["median"] for case in figures[key] if case["of"] == before + step["of"])
        cells = [shown(median(key, before)) for key, before in columns]
        lines.append(f"| {spaced(step['of'])} | {' | '.join(cells)} | {shown(step['median'])} |")
    return lines


def spaced(step):
    count, what = step.split(" ", 1)
    return f"{int(count):,} {what}".replace(",", " ")


def section(mode, folder, deployment):
    found = json.loads((folder / f"{mode}.json").read_text().splitlines()[-1])
    arguments, commit = (folder / f"{mode}.command").read_text().splitlines()
    plot = f"{mode}-{deployment}.svg"
    lines = [f"### {mode}", "", f"`obscura-load {arguments}`, commit {commit}", ""]
    figures = found["subjects"][0]["figures"]
    lines += growth_table(figures) if mode == "growth" else table(mode, figures)
    return found["machine"], lines + ["", f"![{mode}: what it looked like](performance/{plot})", ""]


def former_sections(text):
    """The sections that are between the marks now, each with a line that tells when and where it was measured."""
    head, *sections = text.split("\n### ")
    former = {}
    for lines in (section.rstrip().split("\n") for section in sections):
        if not lines[2].startswith("Earlier: "):
            lines[2:2] = ["Earlier: " + head.splitlines()[0].partition(" Made by")[0], ""]
        former[lines[0]] = ["### " + lines[0], *lines[1:], ""]
    return former


def figures(deployment, folder, former):
    """The text between the marks. What has not been measured now stays as it is."""
    machine, sections = None, []
    for mode in MODES:
        if (folder / f"{mode}.json").exists():
            machine, lines = section(mode, folder, deployment)
            sections += lines
        else:
            sections += former.get(mode, [])
    if (folder / "mailroom.txt").exists():
        sections += ["### mailroom", "", "Durable sends in process beside a bare loop of gathered inserts, messages a second:", ""]
        sections += ["```text", (folder / "mailroom.txt").read_text().rstrip(), "```", ""]
    else:
        sections += former.get("mailroom", [])
    if machine is None:
        sys.exit("nothing was measured")
    today = datetime.datetime.now(datetime.timezone.utc).date()
    head = (
        f"{today}; {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_mib'] / 1024:.0f} GiB, Linux {machine['kernel']}, {machine['file_system']}. Made by "
        f"`scripts/performance{' --distributed' if deployment == 'distributed' else ''}`."
    )
    return "\n".join([head, "", *sections])


def main(deployment, folder, document):
    document = pathlib.Path(document)
    text = document.read_text(encoding="utf-8")
    begin, end = f"<!-- figures, {deployment}: begin -->\n", f"<!-- figures, {deployment}: end -->\n"
    before, found_begin, rest = text.partition(begin)
    former, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        sys.exit(f"{document} has no marks {begin.strip()} and {end.strip()}")
    document.write_text(before + begin + figures(deployment, pathlib.Path(folder), former_sections(former)) + end + after, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
