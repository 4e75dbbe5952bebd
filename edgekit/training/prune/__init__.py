"""Pruning of eager modules: which channels can go together, what they are worth, and cutting them.

::

    prunable = find_groups(network, [images])
    prunable.score(IMPORTANCE["l1"])
    smaller = prunable.cut({group.name: np.sort(np.argsort(group.scores)[group.units // 2 :]) for group in prunable.groups})
"""

from edgekit.training.prune.groups import Importance, Part, Prunable, TensorGroup, find_groups
from edgekit.training.prune.importance import GRADIENTS, IMPORTANCE, gather_gradients
from edgekit.training.prune.padding import is_selection

__all__ = [
    "GRADIENTS",
    "IMPORTANCE",
    "Importance",
    "Part",
    "Prunable",
    "TensorGroup",
    "find_groups",
    "gather_gradients",
    "is_selection",
]
