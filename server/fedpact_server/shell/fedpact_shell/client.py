"""Client side of the bundle: nothing.

An agent runs installed code alone (`fedpact_client.executor`); it never unpacks or imports this file. Somebody who
connects a stock SuperNode gets this error instead of an answer.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(_message: Message, _context: Context) -> Message:
    """Refuse."""
    raise RuntimeError("This bundle's client code never runs: use `fedpact-agent`.")
