"""Alarms: what the operator should look into. Rows are only added; they hold names and codes, never secrets."""

import datetime

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Connection

from fedpact_contract.request import instant
from fedpact_server import db

log = structlog.get_logger()

_DETAIL = 400


def raise_alarm(connection: Connection, code: str, detail: str, *, now: datetime.datetime) -> None:
    """Keep an alarm, durable with the caller's transaction, and log it."""
    connection.execute(db.alarms.insert().values(at=instant(now), code=code, detail=detail[:_DETAIL]))
    log.warning("alarm", code=code, detail=detail)


def latest(connection: Connection, limit: int = 100) -> list[dict[str, str]]:
    """The newest alarms first: at (UTC instant), code, detail."""
    query = sa.select(db.alarms).order_by(db.alarms.c.id.desc()).limit(limit)
    return [{"at": row.at, "code": row.code, "detail": row.detail} for row in connection.execute(query)]
