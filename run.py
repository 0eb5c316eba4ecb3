"""``python run.py``: the same as ``port-checker``."""

from port_checker.cli import main

if __name__ == "__main__":
    main()
