"""Nothing of the user's own settings reaches a test; the Hub client must know this before it is imported."""

from __future__ import annotations

import os

from tasks.environment import bypass_proxy_on_loopback

for name in list(os.environ):
    ours = name == "REQUANT_VLLM_PYTHON"
    if name.startswith(("HF_", "HUGGING_FACE", "AWS_", "REQUANT_", "PREFECT_")) and not ours:
        del os.environ[name]
bypass_proxy_on_loopback(os.environ)
os.environ.update(HF_HUB_DISABLE_XET="1", DO_NOT_TRACK="1")
