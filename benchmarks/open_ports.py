"""A process of its own with open ports, so that accepting is not charged to what is measured.

``python open_ports.py 100`` prints the ports on one line, then accepts and closes until ended.
"""

import select
import socket
import sys

_BACKLOG = 4096  # the kernel lowers it to net.core.somaxconn; a full one would cost a second


def main() -> None:
    """Listen on as many ports as the argument says."""
    epoll = select.epoll()
    listeners: dict[int, socket.socket] = {}
    for _ in range(int(sys.argv[1])):
        listener = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
        listeners[listener.fileno()] = listener
        epoll.register(listener, select.EPOLLIN)
    print(*(listener.getsockname()[1] for listener in listeners.values()), flush=True)
    while True:
        for descriptor, _ in epoll.poll():
            connection, _ = listeners[descriptor].accept()
            connection.close()


if __name__ == "__main__":
    main()
