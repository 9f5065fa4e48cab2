"""Hands CMakeLists.txt to setuptools; everything else is said in pyproject.toml."""

import os

from setuptools import setup

# `make build` compiles the engine in place with CMake and only wants the package registered: then
# it sets VKSTEER_BUILD_ENGINE=0.
engine = {} if os.environ.get("VKSTEER_BUILD_ENGINE") == "0" else {"cmake_source_dir": "."}

setup(**engine)
