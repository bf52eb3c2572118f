"""Commands in processes that begin with torch and fairseq loaded.

Loading them takes a command longer than what a test asks of it. A server loads them once, and everything else that is not
this package, and forks for each command. The command still has a process of its own, with its own arguments, directory,
environment, streams, signals, limits of files and processors, and exit status, and imports this package anew; nothing of it
is left for the next one.

``program("fairseq-train")`` is the path of an executable that asks the server; a process that it starts by
``sys.executable``, or as a program beside that, is warm as well. What a library reads from the environment as it is loaded
(``OMP_NUM_THREADS``) is that of the tests. A command is cold, which is to say started as always, where its environment
changes how Python starts, where a GPU would be used (CUDA does not survive a fork), and outside of Linux.
"""

import contextlib
import importlib
import json
import os
import resource
import runpy
import shutil
import signal
import socket
import sys

#: without a module that this Python lacks, its users load it as they always would
LOADED = """torch torch._dynamo torch.distributed.run torch.utils.tensorboard fairseq fairseq.trainer hydra._internal.hydra
    sacrebleu.metrics sacremoses sentencepiece subword_nmt.apply_bpe subword_nmt.learn_bpe jinja2 matplotlib.figure
    matplotlib.backends.backend_agg""".split()
#: programs that are warm, and modules that are under ``python -m``; all others beside Python are what they are
WARM, MODULES = ("python", "torchrun", "sacrebleu", "fairseq-"), ("fairseq_powernorm", "torch.", "submitit.", "pytest")
#: variables beginning with these are read when Python or a library starts ...
STARTING = ("PYTHON", "OMP_", "GOMP_", "TRITON_", "LD_")
#: ... but for these, of which the server's children take account
HEEDED = ("PYTHON", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONIOENCODING")
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_folder = None


def program(name):
    """The path of a program beside this Python: warm where that is possible."""
    global _folder
    import torch

    if sys.platform != "linux" or not hasattr(os, "pidfd_open") or torch.cuda.is_available():
        return os.path.join(os.path.dirname(sys.executable), name)
    if _folder is None:
        _folder = start()
    return os.path.join(_folder, name)


def start():
    """Start the server, which ends with this process; gives the folder of the programs."""
    import subprocess
    import tempfile

    folder = tempfile.mkdtemp(prefix="warm-")
    real = os.path.dirname(sys.executable)
    for name in os.listdir(real):
        path = os.path.join(folder, name)
        if name == WARM[0] or name.startswith(WARM[1:]):
            with open(path, "w") as stream:
                stream.write(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" {real} "$0" "$@"\n')
            os.chmod(path, 0o755)
        else:
            os.symlink(os.path.join(real, name), path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.join(folder, ".socket"))
        listener.listen(64)
        server = subprocess.Popen(  # pipes, like most of the streams that take their places
            [sys.executable, __file__, "--serve", str(listener.fileno()), folder], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[listener.fileno()],
        )
    start.server = server  # its standard input is open as long as this process lives
    return folder


# ---- a command -------------------------------------------------------------------------------------------------------


def ask(real, asked, *arguments):
    """Have a command carried out by the server, and end as it ends."""
    folder, name = os.path.split(asked)
    command = [os.path.join(real, name), *arguments]
    if name == "python" and not (arguments[:1] == ("-m",) and arguments[1].startswith(MODULES)):
        os.execv(command[0], command)
    closed = closed_streams()
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)  # takes its number, which nothing else has then
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.path.join(folder, ".socket"))
        socket.send_fds(connection, [b"."], [0, 1, 2])
        with connection.makefile("rw") as stream:
            stream.write(json.dumps(request_for(folder, command, closed)) + "\n")
            stream.flush()
            pid = int(stream.readline())
            if not pid:
                os.execv(command[0], command)
            for number in FORWARDED:
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, lambda number, _: os.kill(pid, number))
            status = int(stream.readline())
    if status < 0:
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def request_for(folder, command, closed):
    """What the server is told of a command of this process."""
    return dict(command=command, folder=str(folder), cwd=os.getcwd(), environment=dict(os.environ), closed=closed,
                cpus=list(os.sched_getaffinity(0)), file_size=resource.getrlimit(resource.RLIMIT_FSIZE))


def closed_streams():
    """The numbers of those standard streams that whoever started this process has closed."""
    closed = []
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            closed.append(number)
    return closed


# ---- the server ------------------------------------------------------------------------------------------------------


def serve(listener, folder):
    """Load everything, then fork for each request until standard input ends; returns the request in the new process."""
    import gc
    import selectors

    for name in LOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # a collection in a command would copy all of its memory
    environment, running = starting(os.environ), set()
    with selectors.DefaultSelector() as waiting:
        waiting.register(listener, selectors.EVENT_READ)
        waiting.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fileobj == 0:
                    shutil.rmtree(folder, ignore_errors=True)
                    os._exit(0)
                elif key.fileobj is listener:
                    connection, _ = listener.accept()
                    streams, request = received(connection)
                    if request is None:
                        connection.close()
                    elif starting(request["environment"]) != environment:
                        tell(connection, 0)
                        connection.close()
                    else:
                        pid = os.fork()
                        if not pid:
                            connection.close()
                            return streams, request
                        tell(connection, pid)
                        running.add(pid)
                        process = os.pidfd_open(pid)
                        waiting.register(process, selectors.EVENT_READ, (pid, process, connection))
                        waiting.register(connection, selectors.EVENT_READ, (pid, process, connection))
                    for stream in streams:
                        os.close(stream)
                elif key.data[0] in running:  # not if its end came up in this round, too
                    pid, process, connection = key.data
                    if key.fileobj is connection:  # whoever asked is gone
                        os.kill(pid, signal.SIGKILL)
                        waiting.unregister(connection)
                        continue
                    tell(connection, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                    running.remove(pid)
                    waiting.unregister(process)
                    with contextlib.suppress(KeyError):
                        waiting.unregister(connection)
                    os.close(process)
                    connection.close()


def tell(connection, number):
    """Send a number to whoever asked, if that is still there."""
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % number)


def received(connection):
    """The three streams and the request of a command; None if it was killed while it asked."""
    streams, text = [], b""
    with contextlib.suppress(ConnectionError):
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        while part := connection.recv(1 << 16):
            text += part
            if text.endswith(b"\n"):
                return streams, json.loads(text)
    return streams, None


def starting(environment):
    """Those variables of an environment that change how a command starts."""
    return {name: value for name, value in environment.items() if name.startswith(STARTING) and name not in HEEDED}


def become(streams, request):
    """Make this process that of the command; gives its program and arguments."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for number in request["closed"]:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    os.chdir(request["cwd"])
    os.sched_setaffinity(0, request["cpus"])
    resource.setrlimit(resource.RLIMIT_FSIZE, request["file_size"])
    os.environ.clear()
    os.environ.update(request["environment"])
    with contextlib.suppress(ImportError):
        import numpy

        numpy.random.seed()  # Python's own generator is seeded at a fork
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr) if encoding or errors else ()):
        stream.reconfigure(encoding=encoding or None, errors=errors or None)
    path, *arguments = request["command"]
    sys.executable = os.path.join(request["folder"], "python")
    is_module = os.path.basename(path) == "python"
    if os.path.basename(path) == "fairseq-train":
        import logging

        logging.root.handlers.clear()  # it alone sets up its log before fairseq, as it is loaded, does
    if is_module:
        path, *arguments = arguments[1:]
    here = [] if os.environ.get("PYTHONSAFEPATH") else [os.getcwd() if is_module else os.path.dirname(path)]
    sys.path[:] = [*here, *python_path(), *PATH]
    with contextlib.suppress(ImportError):  # fairseq looked for it when it was loaded
        sys.modules["fairseq.logging.progress_bar"].wandb = importlib.import_module("wandb")
    sys.argv = [path, *arguments]
    return is_module, path


def python_path():
    value = os.environ.get("PYTHONPATH")
    return value.split(os.pathsep) if value else []


def run(is_module, path):
    """Run a program; gives its exit status."""
    try:
        if is_module:
            runpy.run_module(path, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(path, run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, int) or error.code is None:
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except Exception:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def end(status):
    """End as Python does, but for taking apart all that was loaded."""
    import atexit
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(status & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] != "--serve":
        ask(*sys.argv[1:])
    with socket.socket(fileno=int(sys.argv[2])) as listener:
        PATH = sys.path[len(python_path()) + (not getattr(sys.flags, "safe_path", False)) :]
        found = serve(listener, sys.argv[3])
    end(run(*become(*found)))
