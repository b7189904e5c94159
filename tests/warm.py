"""Starts modules of the package in processes of their own that have loaded the libraries before they begin: in 20 ms instead of two seconds.

Such a process is forked from one that waits for that. It differs from one that starts cold in nothing but what is loaded: all of the libraries,
and of the package what any command loads first. Its folder, environment, streams, exit code and end are its own. Tests that look at how Python
starts, or at what is loaded when, start it cold.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

LOADED = ("blake3", "httpx", "networkx", "rich.progress", "safetensors.torch", "tomli_w", "torch", "sdmerge_build.cli")
LATE = ("SDBUILD_", "HF_", "CIVITAI_", "NETRC", "SSL_CERT_FILE", "HTTP_PROXY", "HTTPS_PROXY", "PYTEST_CURRENT_TEST")
"""What is read from the environment after a command has started, or never; anything else may be meant for Python, its libraries or the system."""
POSSIBLE = hasattr(os, "fork") and hasattr(socket, "send_fds")
BEFORE = dict(os.environ)


def suits(env: Mapping[str, str]) -> bool:
    """Say whether a command in this environment may start warm."""
    changed = {name for name in env.keys() | BEFORE.keys() if env.get(name) != BEFORE.get(name)}
    return POSSIBLE and all(name.startswith(LATE) for name in changed)


def run(arguments: list[str], folder: Path, env: Mapping[str, str], patience: float) -> subprocess.CompletedProcess[str]:
    """Run the command, as `subprocess.run` does."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        process = Process("sdmerge_build", arguments, env, (out.fileno(), err.fileno()), folder)
        try:
            code = process.wait(patience)
        except BaseException:
            process.kill()
            raise
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(arguments, code, out.read(), err.read())


class Process:
    """A module that runs; what `subprocess.Popen` has to wait for it and to end it."""

    def __init__(self, module: str, arguments: list[str], env: Mapping[str, str], streams: tuple[int, int], folder: Path | None = None) -> None:
        """Start it: in a folder, where Python looks first, as with `python -m`; or without one here, as with `python -P -W ignore -m`."""
        self.args, self.returncode = [module, *arguments], -1
        self._line, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(_starter(), [b"!"], [theirs.fileno(), *streams])
        self._line.sendall(json.dumps([module, arguments, dict(env), str(folder or Path.cwd()), folder is not None]).encode() + b"\n")
        self._pid = self._number()

    def _number(self) -> int:
        data = self._line.recv(4)
        assert data, "nothing can be started: `python -c 'import sdmerge_build.cli'` may say why"
        return int.from_bytes(data, "little", signed=True)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it is over, and return its exit code."""
        if self._pid:
            self._line.settimeout(timeout)
            try:
                self.returncode = os.waitstatus_to_exitcode(self._number())
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._pid = 0
            self._line.close()
        return self.returncode

    def kill(self) -> None:
        """End it, if it is not over."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)


@functools.cache
def _starter() -> socket.socket:
    """Start the process that others are forked from, and say how to reach it."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, __file__, str(theirs.fileno())]
    # Its streams are no terminals, as a command's are not; nothing is written to them before others take their place.
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=nothing, stdout=nothing, stderr=nothing, env=BEFORE)
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))  # it ends when nobody can ask
    return ours


def _serve(control: socket.socket) -> None:
    """Start a process for each message, until there is nobody who could ask."""
    while True:
        message, handles, *_ = socket.recv_fds(control, 1, 3)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            _attend(*handles)
        for handle in handles:
            os.close(handle)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _attend(line: int, out: int, err: int) -> None:
    """Start one process, and say which it is and how it ends."""
    with socket.socket(fileno=line) as asker, asker.makefile("r", encoding="utf-8") as lines:
        module, arguments, env, folder, looked_at = json.loads(lines.readline())
        process = os.fork()
        if process:
            asker.sendall(process.to_bytes(4, "little"))
            asker.sendall(os.waitpid(process, 0)[1].to_bytes(4, "little", signed=True))
            os._exit(0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.closerange(3, 64)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[1:] = arguments
    if looked_at:
        sys.path.insert(0, folder)
    else:
        warnings.simplefilter("ignore")
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    os._exit(99)  # a module that starts thus ends its process itself


if __name__ == "__main__":
    del sys.path[0]  # the tests, where no command looks
    for name in LOADED:
        importlib.import_module(name)
    _serve(socket.socket(fileno=int(sys.argv[1])))
