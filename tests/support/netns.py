"""Hosts of one test: network namespaces joined by a bridge, each allowed to reach one port of one address only."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


def sh(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, check=check)


@dataclass(frozen=True)
class Hosts:
    """`operator` is this machine's address on the bridge; `names` are the namespaces, `control` one without a rule."""

    operator: str
    names: tuple[str, ...]
    control: str

    def within(self, index: int, *arguments: str) -> list[str]:
        """The command line that runs something on host `index`."""
        return self.at(self.names[index], *arguments)

    @staticmethod
    def at(name: str, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", name, *arguments]


@contextmanager
def hosts(count: int, port: int, *, kept: bool = True) -> Iterator[Hosts]:
    """`count` hosts that reach `operator`:`port` and nothing else, and one more that reaches everything there.

    Several tests may have hosts at one time. Without `kept` nothing holds the hosts back, and they have a route to
    everywhere (where nobody answers): whatever they try is then on their wire, to be seen.
    """
    tag = os.getpid() % 25_000
    subnet = f"10.{100 + tag // 250}.{tag % 250}"
    bridge, names = f"fp{tag}", tuple(f"fp{tag}{i}" for i in range(count + 1))
    operator = f"{subnet}.1"
    try:
        sh("ip", "link", "add", bridge, "type", "bridge")
        sh("ip", "addr", "add", f"{operator}/24", "dev", bridge)
        sh("ip", "link", "set", bridge, "up")
        for i, name in enumerate(names):
            sh("ip", "netns", "add", name)
            sh("ip", "link", "add", f"{bridge}v{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            sh("ip", "link", "set", f"{bridge}v{i}", "master", bridge, "up")
            sh("ip", "-n", name, "addr", "add", f"{subnet}.{10 + i}/24", "dev", "eth0")
            sh("ip", "-n", name, "link", "set", "eth0", "up")
            sh("ip", "-n", name, "link", "set", "lo", "up")
            if not kept:
                sh("ip", "-n", name, "route", "add", "default", "via", operator)
                off = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"
                sh("ip", "netns", "exec", name, "sh", "-c", off)
            elif i < count:
                _allow_only(name, operator, port)
        yield Hosts(operator, names[:count], names[count])
    finally:
        for name in names:
            sh("ip", "netns", "del", name, check=False)
        sh("ip", "link", "del", bridge, check=False)


def _allow_only(name: str, operator: str, port: int) -> None:
    rules = f"""
table inet only {{
  chain out {{
    type filter hook output priority 0; policy drop;
    oif "lo" accept
    ip daddr {operator} tcp dport {port} accept
  }}
  chain in {{
    type filter hook input priority 0; policy drop;
    iif "lo" accept
    ct state established accept
  }}
}}
"""
    subprocess.run(["ip", "netns", "exec", name, "nft", "-f", "-"], input=rules, text=True, check=True)
