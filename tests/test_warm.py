"""The server behind the commands of the tests."""
import json
import os
import pathlib
import select
import signal
import socket

import pytest
import toy
import warm


def test_the_server_outlives_those_who_ask(tmp_path):
    """A command and whoever asked for it are gone before the server looks again: it still serves the next one."""
    program, text = pathlib.Path(warm.program("sacrebleu")), tmp_path / "text"
    if not hasattr(warm.start, "server"):
        pytest.skip("commands are not warm here")
    text.write_text("a\n")
    request = warm.request_for(program.parent, [str(program), str(text)], closed=[])
    reading, writing = os.pipe()  # the command waits for its input
    with socket.socket(socket.AF_UNIX) as asking, open(os.devnull, "w") as null:
        asking.settimeout(60)
        asking.connect(str(program.parent / ".socket"))
        socket.send_fds(asking, [b"."], [reading, null.fileno(), null.fileno()])
        asking.sendall(json.dumps(request).encode() + b"\n")
        pid = int(asking.makefile("r").readline())
        assert pid, "an earlier test has left another environment behind: its commands all begin cold"
        os.kill(warm.start.server.pid, signal.SIGSTOP)
        process = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        assert select.select([process], [], [], 60)[0]  # its end comes first, then that of the connection
        os.close(process)
    os.kill(warm.start.server.pid, signal.SIGCONT)
    os.close(reading)
    os.close(writing)
    assert toy.command("sacrebleu", text, "-i", text, "-b", "-w", 1, "--force").stdout
    assert warm.start.server.poll() is None
