"""A quote as text for people."""

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from fedpact_contract import output
from fedpact_contract.output import line


def show_quote(values: dict[str, Any]) -> None:
    """What joining would cost and might bring."""
    line(f"Quote for contract {values['contract']}")
    line(f"{values['title']}; our data set {values['data_set']}")
    line()
    line(values["no_promise"])
    for title, words in (
        ("PRIVACY", _privacy(values)),
        ("BYTES", _bytes(values["bytes"])),
        ("TIME", _time(values["time"])),
    ):
        line()
        line(title)
        for text in words:
            line(f"  {text}")
    line()
    _show_share(values["share"])


def show_dry_run(values: dict[str, Any]) -> None:
    """What a contract would do here."""
    data, leaving = values["data"], values["leaves"]
    line(f"Dry run of contract {values['contract']}")
    line(f"{values['title']}. {values['nothing']}")
    line()
    line("CHECKS")
    for check in values["checks"]:
        line(f"  {'ok' if check['ok'] else 'REFUSED'}  {check['name']}")
        if error := check.get("error"):
            line(f"      {error['code']}: {error['message']}")
    line()
    line("DATA")
    fit = "the rows cannot be used" if data["rows_that_fit"] is None else f"{data['rows_that_fit']} rows fit"
    line(f"  data set {data['data_set']}: {fit}, {data['rows_used']} are trained on")
    line(f"  columns {', '.join(data['columns'])}; predicted {', '.join(data['label'])}")
    for title, words in (("PRIVACY", _privacy({**values, **data})), ("TIME", _time(values["time"]))):
        line()
        line(title)
        for text in words:
            line(f"  {text}")
    line()
    line("WHAT WOULD LEAVE")
    rows = [[k["kind"], str(k["times"]), _size(k["bytes"]), _size(k["total"]), k["what"]] for k in leaving["kinds"]]
    output.table(output.console(), ["kind", "times", "each", "in all", "what"], rows, right=(1, 2, 3))
    line(f"  {_size(leaving['per_round'])} a round, {_size(leaving['total'])} in all")
    line(f"  not counted: {leaving['not_counted']}")


def _privacy(values: dict[str, Any]) -> Iterator[str]:
    cost = values["privacy"]
    if cost["trust_model"] == "record-level-at-each-participant":
        yield f"epsilon_pld {cost['epsilon_pld']} at delta {cost['delta']}: this contract alone, its whole plan"
    else:
        yield f"epsilon {cost['epsilon']} at delta {cost['delta']}, of all our updates, in what is released"
        yield "The operator sees our updates without noise: nothing bounds what they tell it."
    if (entity := cost["entity"]) is not None:
        yield (
            f"all rows of one entity, at most {entity['max_rows']}: epsilon {entity['epsilon']} at delta "
            f"{entity['delta']}"
        )
    yield (
        f"data set {values['data_set']} over all contracts: Rényi sum at alpha {cost['alpha']} "
        f"{_short(cost['before'])} of other contracts, {_short(cost['after'])} with this one ({cost['attempts']} "
        f"attempts), limit {_short(cost['limit'])}, {_short(cost['left'])} left"
    )
    yield (
        f"epsilon_gate {cost['epsilon_gate']} at the data set's delta {cost['data_set_delta']}: "
        "a coarse bound for all contracts together"
    )
    yield "The budget pays for it." if cost["fits"] else "The budget does not pay for it: `sign` would refuse."


def _bytes(moved: dict[str, Any]) -> Iterator[str]:
    into, out = moved["in"], moved["out"]
    yield (
        f"out {_size(out['total'])} in all: updates {_size(out['updates'])}, {_size(moved['per_round']['out'])} a round"
        f"{''.join(f', {kind} {_size(size)}' for kind, size in out['measurements'].items())}"
        f", signatures {_size(out['signature'] + out['countersignature'])}"
    )
    yield (
        f"in about {_size(into['total'])} in all: models {_size(into['models'])}, orders around them about "
        f"{_size(into['orders_about'])} ({_size(moved['per_round']['in'])} a round with the model), evidence at the "
        f"close about {_size(into['evidence_about'])}"
    )
    yield f"not counted: {moved['not_counted']}"


def _time(spent: dict[str, Any]) -> Iterator[str]:
    yield (
        f"our training {_duration(spent['training_seconds'])}: {spent['steps']} steps of {spent['step_seconds']} s; "
        f"spare attempts {_duration(spent['spare_attempts_seconds'])} more if they are needed"
    )
    yield (
        f"transfer {_duration(spent['transfer_seconds'])}; the whole run about {_duration(spent['run_seconds'])}, at "
        f"most {_duration(spent['longest_rounds_seconds'])} by its deadlines; then up to {spent['close_days']} days to "
        "close"
    )
    for text in spent["assumptions"]:
        yield f"- {text}"


def _show_share(share: dict[str, Any]) -> None:
    line("SHARE OF THE POOL")
    weights, exact = share["weights"], share["exact_parts"]
    line(
        f"  exact: for data {output.format_share(exact['data'])} (weight {weights['data']}), for equality "
        f"{output.format_share(exact['equal'])} (weight {weights['equal']})"
    )
    if Decimal(weights["contribution"]) > 0:
        line(
            f"  for contribution (weight {weights['contribution']}): "
            f"{output.format_share(share['contribution_by_rows'])} if it went by rows; the whole share then "
            f"{_paid(share['share_by_rows'])}"
        )
        bounds = share["bounds"]
        line(
            f"  whatever happens, while every round admits everybody and no fallback or floor pays: "
            f"{output.format_interval(bounds['low'], bounds['high'])}"
        )
    else:
        line(f"  the whole share: {_paid(share['share_by_rows'])}")
    if share["simulated"] is not None:
        _show_simulated(share["simulated"])
    elif Decimal(weights["contribution"]) > 0:
        line(f"  no range was simulated: {share['not_simulated']}")
    fallback = share["fallback"]
    line(f'  the fallback "{fallback["rule"]}" would pay {output.format_share(fallback["share"])}')
    if share["floor_fen"]:
        line(f"  our floor: {_yuan(share['floor_fen'])} where every round admits us and the pool is large enough")
    for text in share["reasons"]:
        line(f"  - {text}")


def _show_simulated(found: dict[str, Any]) -> None:
    line(f"  plausible range: {found['model']}; {found['range']} of {found['draws']}")
    rows = [
        [
            f"{100 * Decimal(part['label_noise']):.0f} %",
            _paid(part["low"]),
            output.format_share(part["mean"]),
            _paid(part["high"]),
            str(part["fallback_draws"]),
        ]
        for part in found["by_own_label_noise"]
    ]
    columns = ["our labels wrong", "lowest", "mean", "highest", "no reliable share"]
    output.table(output.console(), columns, rows, right=(1, 2, 3, 4))


def _paid(part: dict[str, Any]) -> str:
    return output.format_share(part["share"]) + (f", {_yuan(part['fen'])}" if "fen" in part else "")


def _yuan(fen: int) -> str:
    from fedpact_contract.settlement import format_fen

    return format_fen(fen, "en")


def _size(count: int) -> str:
    """Bytes for people: decimal units, as networks have them."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _duration(seconds: str | int) -> str:
    value = float(seconds)
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if value >= 2 * length:
            return f"{value / length:.1f} {unit}"
    return f"{value:.1f} s"


def _short(value: str) -> str:
    return f"{Decimal(value):.4f}"
