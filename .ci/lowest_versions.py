"""Print pip constraints that hold each direct dependency at its lower bound in pyproject.toml.

Everything else stays as pinned in constraints.txt, so that the run is repeatable.
"""

import re
import sys
import tomllib
from pathlib import Path

# pydantic requires one exact version of it.
UNPINNED = {"pydantic-core"}

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
requirements = [*project["dependencies"], *extras["metrics"], *extras["redis"]]
lowest = {}
for requirement in requirements:
    # "uvicorn>=0.51,<0.55" is uvicorn and 0.51.
    if match := re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement):
        lowest[match[1]] = match[2]
for line in Path("constraints.txt").read_text().splitlines():
    name, version = line.lower().replace("_", "-").split("==")
    if name not in UNPINNED:
        sys.stdout.write(f"{name}=={lowest.get(name, version)}\n")
