"""The Copilot's losses between predicted errors f and logged errors l, as strategy objects (equation 7, table 20).

f [N, V] is W_out h on the output tokens and 0 on every other token; l [N, V] is sparse. Every loss is a function of these two
vectors over the whole V, so its value does not depend on whether f is computed on A tokens or on all of them. A true token
outside the output counts: it is an error that f cannot reduce (rmse), or a logit that stays 0 (kl, cross_entropy).

| `copilot.loss` | sum over tokens S | the step's loss |
| --- | --- | --- |
| rmse | sum_j (f_j - l_j)^2 | sqrt(S / N) |
| kl | KL(softmax(l) || softmax(f)) | S / N |
| cross_entropy | -log softmax(f)[true token] | S / N |

The paper names the losses of table 20 without their form; kl and cross_entropy are our reading of it. May import nothing of the
package outside this folder. Read `base` first (f in blocks, both gradients), then `rmse`, the default.
"""

from __future__ import annotations

from tc_ray.models.losses.base import TokenLoss
from tc_ray.models.losses.rmse import RootMeanSquare
from tc_ray.models.losses.softmax import CrossEntropy, Divergence

__all__ = ["CrossEntropy", "Divergence", "RootMeanSquare", "TokenLoss", "make_loss"]


def make_loss(name: str, vocab_size: int) -> TokenLoss:
    """The loss that `copilot.loss` names, for a Copilot of `vocab_size` tokens."""
    if name == "rmse":
        return RootMeanSquare()
    return {"kl": Divergence, "cross_entropy": CrossEntropy}[name](vocab_size)
