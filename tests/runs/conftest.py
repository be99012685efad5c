import pytest

from gpt2.common import provenance


@pytest.fixture(autouse=True)
def repository(monkeypatch):
    """What the fake script's records say of the commit that made them."""
    monkeypatch.setenv("COMMIT", provenance.git_commit() or "")
