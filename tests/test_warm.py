"""The server behind the commands of the tests."""
import os
import pathlib
import signal
import subprocess

import pytest
import toy
import warm


def test_the_server_outlives_those_who_ask(tmp_path):
    """A command and whoever asked for it are killed before the server looks again: it still serves the next one."""
    program, text = warm.program("sacrebleu"), tmp_path / "text"
    if not hasattr(warm.start, "server"):
        pytest.skip("commands are not warm here")
    text.write_text("a\n")
    server = warm.start.server.pid
    children = pathlib.Path(f"/proc/{server}/task/{server}/children")
    if not children.exists():
        pytest.skip("this system does not list children")
    before = children.read_text().split()
    asking = subprocess.Popen([program, text], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    while not (new := set(children.read_text().split()) - set(before)):
        assert asking.poll() is None  # it waits for its input
    os.kill(server, signal.SIGSTOP)
    os.kill(int(new.pop()), signal.SIGKILL)
    asking.kill()
    asking.wait()
    os.kill(server, signal.SIGCONT)
    assert toy.command("sacrebleu", text, "-i", text, "-b", "-w", 1, "--force").stdout
    assert warm.start.server.poll() is None
