"""A process with open ports, so that accepting does not cost the measured process CPU time.

``python open_ports.py 100 127.0.0.1`` prints the ports on one line, then accepts and closes.
"""

import select
import socket
import sys

_BACKLOG = 4096  # the kernel caps it at net.core.somaxconn; a full backlog would cost a second


def main() -> None:
    """Listen on as many ports as the first argument says, at the address in the second."""
    epoll = select.epoll()
    listeners: dict[int, socket.socket] = {}
    for _ in range(int(sys.argv[1])):
        listener = socket.create_server((sys.argv[2], 0), backlog=_BACKLOG)
        listeners[listener.fileno()] = listener
        epoll.register(listener, select.EPOLLIN)
    print(*(listener.getsockname()[1] for listener in listeners.values()), flush=True)
    while True:
        for descriptor, _ in epoll.poll():
            connection, _ = listeners[descriptor].accept()
            connection.close()


if __name__ == "__main__":
    main()
