"""The inputs of a run, resolved to what they are now."""

from __future__ import annotations

from dataclasses import dataclass

from requant.tasks.hub.revision import Revision
from requant.tasks.texts.calibration import Calibration
from requant.tasks.texts.text import Text


@dataclass(frozen=True)
class Inputs:
    """The base at one commit, the texts to calibrate with, and the text to measure on."""

    base: Revision
    calibration: Calibration
    validation: Text
