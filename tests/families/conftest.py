"""Fixtures of tests on tiny models."""

import pytest
from diffusers.models.attention_dispatch import attention_backend
from torch.nn.attention import flex_attention


@pytest.fixture(autouse=True)
def eager_flex_attention(monkeypatch):
    """Compute FlexAttention without the compiler, which takes seconds for each shape."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.fixture(autouse=True)
def backend_of_the_process():
    """Restore the attention backend of the process, which ``set_attention_backend`` of a model changes."""
    with attention_backend("native"):
        yield
