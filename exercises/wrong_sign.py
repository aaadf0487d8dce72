"""The solutions with one mistake, the sign of the policy loss: a run that unlearns, to be looked at.

python train.py --config configs/debug.yaml functions=exercises.wrong_sign
"""

from torch import Tensor

from exercises.solutions import *  # noqa: F403
from exercises.solutions import policy_loss as _right


def policy_loss(*given: Tensor | float) -> tuple[Tensor, Tensor]:
    loss, clip_fraction = _right(*given)
    return -loss, clip_fraction
