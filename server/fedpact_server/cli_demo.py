"""The command `fedpact demo`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpact_contract import output

if TYPE_CHECKING:
    from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo_command)


def demo_command(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="A new folder (default: ./fedpact-demo-TIME).")
    ] = None,
    participants: Annotated[
        int | None, typer.Option(help="How many enterprises: 3 to 12 (default: 4). With --data its file says it.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of training, at most 100.")] = None,
    revenue: Annotated[str, typer.Option(help="Revenue to share, in yuan.")] = "1000000.00",
    data: Annotated[Path | None, typer.Option(help="Your own data: a folder with a federation.toml.")] = None,
    lift: Annotated[
        bool | None,
        typer.Option("--lift/--no-lift", help="Compare with each enterprise alone (off with --data)."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the processes running.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, no progress.")] = False,
) -> None:
    """Run a real federation on this machine: operator, enterprises, private training, shares, a verified statement."""
    from fedpact_contract.settlement import parse_yuan
    from fedpact_server.demo.run import Demo, Options

    parse_yuan(revenue, field="--revenue")
    folder = (directory or Path(f"fedpact-demo-{time.strftime('%Y%m%d-%H%M%S')}")).absolute()
    options = Options(
        folder=folder,
        participants=participants,
        rounds=rounds,
        revenue=revenue,
        data=data,
        lift=lift,
        keep=keep,
    )
    if as_json:
        output.emit_json(Demo(options=options, tell=lambda _text: None).run())
        return
    progress = _Progress(output.console())
    demo = Demo(options=options, tell=progress.tell, hand_over=progress.hand_over)
    try:
        result = demo.run()
    finally:
        progress.stop()
    _show(output.console(), result, demo.removal)


class _Progress:
    """What is going on now, with the time since the beginning; finished things stay above."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._begun = time.monotonic()
        self._status: Any = None

    def tell(self, text: str) -> None:
        seconds = time.monotonic() - self._begun
        if not self._console.is_terminal:
            self._console.print(f"{seconds:5.1f} s  {output.visible(text)}")
            return
        if self._status is None:
            self._status = self._console.status("")
            self._status.start()
        self._console.print(f"{seconds:5.1f} s  {output.visible(text)}")
        self._status.update(output.visible(text))

    def hand_over(self) -> bool:
        """Leave the terminal to a command that shows its own progress; says whether there is a terminal."""
        self.stop()
        return self._console.is_terminal

    def stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


def _show(console: "Console", result: dict[str, Any], removal: str) -> None:
    from fedpact_contract.settlement import format_fen
    from fedpact_server.demo import times

    metric = result["metric"]
    console.print()
    console.print(
        f"{output.counted(result['rounds'], 'round')}: {metric['name']} "
        f"{float(metric['initial']):.3f} -> {float(metric['final']):.3f}; "
        f"pool {format_fen(result['pool_fen'], 'en')}, split by {result['basis']}"
    )
    lift = result["lift"]
    alone = {line["id"]: [f"{line['mean']:.3f}"] for line in lift["participants"]} if lift else {}
    rows = [
        [
            line["name"],
            str(line["num_examples"]),
            output.format_share(line["share"]),
            output.format_interval(line["share_low"], line["share_high"]),
            format_fen(line["fen"], "en"),
            f"{float(line['epsilon_spent']):.2f} / {line['epsilon_budget']}",
            *alone.get(line["id"], []),
        ]
        for line in result["participants"]
    ]
    columns = ["participant", "examples", "share", "95 % interval", "paid", "epsilon", *(["alone"] if lift else [])]
    output.table(console, columns, rows, right=tuple(range(1, len(columns))))
    console.print(defence_line(result["defences"]), soft_wrap=True)
    console.print(f"Where the time goes: {result['seconds']:.1f} seconds")
    output.table(console, ["step", "s"], [[n, f"{v:.1f}"] for n, v in result["step_seconds"].items()], right=(1,))
    console.print("Of each round the part that is ours (policy: at the slowest agent)")
    heads = times.columns(result["round_milliseconds"])
    output.table(console, heads, times.rows(result["round_milliseconds"]), right=tuple(range(1, len(heads))))
    console.print(f"verify: {result['verdict']}", soft_wrap=True)
    console.print(
        "The demo's own trust file shows the mechanism and proves nothing: all keys were made on this machine.",
        soft_wrap=True,
    )
    for name in ("report", "evidence", "trust", "model"):
        console.print(f"{name + ':':10}{result[name]}", soft_wrap=True)
    if "stop" in result:
        console.print(f"Still running (--keep). Stop them with: {result['stop']}", soft_wrap=True)
    console.print(f"Remove everything with: {removal}", soft_wrap=True)


def defence_line(found: dict[str, int]) -> str:
    """What the defences against gaming found, in one line."""
    alarms = output.counted(found["alarms"], "alarm") if found["alarms"] else "no alarm"
    blind = f" ({output.counted(found['without_power'], 'detector')} without power)" if found["without_power"] else ""
    one = found["clipped"] == 1
    clipped = f"{found['clipped']} of {found['updates']} updates {'was' if one else 'were'} scaled down"
    return f"Defences: {alarms}{blind}; {clipped if found['clipped'] else 'no update was scaled down'}"
