"""What the tests of scripts/report.py share."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_json(name, content):
        Path(name).write_text(content if isinstance(content, str) else json.dumps(content))
        return name

    return write_json
