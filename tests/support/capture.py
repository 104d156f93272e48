"""Every packet on every device of a host, counted: `capture.py FILE`, in the host's network namespace, until SIGTERM.

FILE then holds JSON: {"lost": packets that were not seen, "flows": [[device, out, protocol, source, destination, port,
packets, payload, opened], ...]}. `port` is the other side's: where it went to, or came from. `payload` is the bytes
above TCP or UDP; `opened` counts attempts to open a connection.
"""

import json
import signal
import socket
import struct
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ALL, OUTGOING, SOL_PACKET, PACKET_STATISTICS, SO_RCVBUFFORCE = 3, 4, 263, 6, 33
NAMES = {0x0806: "arp", 0x86DD: "ipv6"}
OVER_IP = {1: "icmp", 6: "tcp", 17: "udp"}
Flow = tuple[str, bool, str, str, str, int]


def flow_of(frame: bytes, device: str, *, out: bool) -> tuple[Flow, int, bool]:
    """Which flow an Ethernet frame belongs to, its payload in bytes, and whether it opens a connection."""
    (kind,) = struct.unpack_from("!H", frame, 12)
    if kind != 0x0800:
        return (device, out, NAMES.get(kind, hex(kind)), "", "", 0), 0, False
    head, total, protocol = 14 + (frame[14] & 15) * 4, struct.unpack_from("!H", frame, 16)[0], frame[23]
    source, target = socket.inet_ntoa(frame[26:30]), socket.inet_ntoa(frame[30:34])
    name = OVER_IP.get(protocol, str(protocol))
    if name not in ("tcp", "udp"):
        return (device, out, name, source, target, 0), 0, False
    ports = struct.unpack_from("!HH", frame, head)
    inner = (frame[head + 12] >> 4) * 4 if name == "tcp" else 8
    opens = name == "tcp" and frame[head + 13] & 0x12 == 0x02
    return (device, out, name, source, target, ports[1] if out else ports[0]), total - (head - 14) - inner, opens


def capture(note: Callable[[dict[str, Any]], None]) -> None:
    """Count until SIGTERM, then tell."""
    listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL))
    listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
    flows: defaultdict[Flow, list[int]] = defaultdict(lambda: [0, 0, 0])
    ending: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: ending.append(number))
    listener.settimeout(0.2)
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    while True:
        try:
            frame, address = listener.recvfrom(256)
        except TimeoutError:
            if ending:
                break
            continue
        flow, payload, opens = flow_of(frame, address[0], out=address[2] == OUTGOING)
        for index, value in enumerate((1, payload, int(opens))):
            flows[flow][index] += value
    _, lost = struct.unpack("II", listener.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    note({"lost": lost, "flows": [[*flow, *counts] for flow, counts in sorted(flows.items())]})


if __name__ == "__main__":
    capture(lambda found: Path(sys.argv[1]).write_text(json.dumps(found)) and None)
