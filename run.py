"""``python run.py``: the same as ``port-checker``."""

from port_checker.__main__ import main

if __name__ == "__main__":
    main()
