"""A loop that only connects to ports: socket, connect, wait, read the result, close.

``python bare_loop.py HOST SECONDS BATCH PORT...`` prints the number of batches, the seconds that
they took, and the seconds of CPU.
"""

import select
import socket
import sys
import time


def main() -> None:
    """Connect to the ports in turn, a batch at once."""
    host, seconds, batch = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    ports = [int(port) for port in sys.argv[4:]]
    started, used, batches = time.perf_counter(), time.process_time(), 0
    epoll = select.epoll()
    while (elapsed := time.perf_counter() - started) < seconds:
        waiting: dict[int, socket.socket] = {}
        first = batches * batch % len(ports)
        for port in ports[first : first + batch]:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            sock.connect_ex((host, port))
            epoll.register(sock.fileno(), select.EPOLLOUT)
            waiting[sock.fileno()] = sock
        while waiting:
            events = epoll.poll(5.0)
            assert events
            for descriptor, _ in events:
                sock = waiting.pop(descriptor)
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
                sock.close()
        batches += 1
    print(batches, elapsed, time.process_time() - used)


if __name__ == "__main__":
    main()
