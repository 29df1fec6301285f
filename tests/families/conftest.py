"""Fixtures of tests on tiny models."""

import pytest
from diffusers.models.attention_dispatch import attention_backend


@pytest.fixture(autouse=True)
def backend_of_the_process():
    """Restore the attention backend of the process, which ``set_attention_backend`` of a model changes."""
    with attention_backend("native"):
        yield
