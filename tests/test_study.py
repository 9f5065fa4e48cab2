"""`vs.study`: steps and their keys, resuming, plan, folder, results and report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from child import ENV  # noqa: F401
