"""A process of a job that ends without the others is noticed by all of them at once, also where it was process 0."""

import signal
import socket
import subprocess
import sys

import pytest

# In place of JAX, a client that speaks with process 0's service through the relay, which answers in capitals.
PROCESS = """
import os, socket, sys, threading
from deeplab_jax.runs.peers import Watch

rank, address = int(sys.argv[1]), sys.argv[2]

def lost(other):
    print("lost", other, flush=True)
    os._exit(1)

watch = Watch(address, rank, lost)
where = watch.start()

def place(name):
    host, port = where[name].split(":")
    return host, int(port)

def serve(server):
    while True:
        connection = server.accept()[0]
        threading.Thread(target=answer, args=(connection,), daemon=True).start()

def answer(connection):
    while data := connection.recv(100):
        connection.sendall(data.upper())

if rank == 0:
    server = socket.create_server(place("coordinator_bind_address"))
    threading.Thread(target=serve, args=(server,), daemon=True).start()
connection = socket.create_connection(place("coordinator_address"), timeout=30)
connection.sendall(b"pri\\nx")
found = b""
while len(found) < 5:
    found += connection.recv(100)
assert found == b"PRI\\nX"
connection.settimeout(None)

def watched():
    if not connection.recv(1):
        print("closed", flush=True)

threading.Thread(target=watched, daemon=True).start()
print("joined", flush=True)
if sys.stdin.readline() == "leave\\n":
    watch.leave()
    sys.stdin.readline()
"""


@pytest.fixture
def job():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ranks = (2, 1, 0)  # process 0 comes last
    processes = {r: subprocess.Popen([sys.executable, "-c", PROCESS, str(r), address], **pipes) for r in ranks}
    try:
        assert [processes[rank].stdout.readline() for rank in range(3)] == ["joined\n"] * 3
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


@pytest.mark.parametrize("dead", [0, 2])
def test_a_kill_is_noticed_by_the_others(job, dead):
    job[dead].send_signal(signal.SIGKILL)
    for rank in {0, 1, 2} - {dead}:
        job[rank].wait(timeout=30)
        out = job[rank].stdout.read()
        assert out == f"lost {dead}\n"  # and until then JAX's connection has not closed


def test_an_end_that_all_come_to_is_no_loss(job):
    for process in job.values():
        process.stdin.write("leave\n")
        process.stdin.flush()
    for rank in (2, 1, 0):
        out, _ = job[rank].communicate(timeout=30)
        assert out in ("", "closed\n")
        assert job[rank].returncode == 0
