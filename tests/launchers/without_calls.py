"""Run a command in which some system calls are not to be had: `without_calls.py ERRNO NUMBERS... -- COMMAND...`.

ERRNO 0 lets a call seem to succeed that did nothing. As a container's or a unit's own filter would do it, for good.
"""

import ctypes
import os
import platform
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fedpact_client import sandbox

if __name__ == "__main__":
    place = sys.argv.index("--")
    error, *numbers = map(int, sys.argv[1:place])
    architecture = sandbox.DENIED[platform.machine()][0]
    program = sandbox._filter_program(architecture, numbers)[:-8] + struct.pack("<HBBI", 0x06, 0, 0, 0x00050000 | error)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    sandbox._no_new_privs()
    sandbox._call("prctl", 22, 2, ctypes.c_char_p(header), 0, 0)
    os.execv(sys.argv[place + 1], sys.argv[place + 1 :])
