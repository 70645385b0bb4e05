"""What goes wrong in training on purpose: the message says what was seen, what was expected and what to do.

TrainingError           (dfengine.errors.DfengineError, ValueError)
├── RecipeError         a recipe that cannot be understood: names the file, the table and the key
├── CheckpointError     a checkpoint that is damaged, of another model, or could not be written
├── WeightsError        pretrained weights that cannot be had
└── ExportError         a bundle that would not score as the network was trained
"""

from __future__ import annotations

from dfengine.errors import DfengineError


class TrainingError(DfengineError, ValueError):
    """Base of all."""


class RecipeError(TrainingError):
    """A recipe that cannot be understood."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be read or written, or is of another model."""


class WeightsError(TrainingError):
    """Pretrained weights that cannot be had."""


class ExportError(TrainingError):
    """A bundle that would not score as the network was trained."""
