"""Loss of whole chains of drafted tokens: ``loss_type=accept``.

Exact rejection sampling accepts token i of a sampled draft with probability ``a_i``, one minus the total variation
distance of draft and policy, and only if it accepted all tokens before. So ``sum_d a_1 ... a_d`` tokens of a chain are
accepted in the mean. The loss of its token d is ``1 - a_1 ... a_d``. A token early in a chain thus gets the gradient of
all tokens behind it, and a token that is hardly ever reached gets almost none.
"""

from __future__ import annotations

from torch import Tensor

ACCEPT = "accept"


def term_type(loss_type: str) -> str:
    """The terms that a loss is made of (``losses.soft_ce``)."""
    return "tv" if loss_type == ACCEPT else loss_type


def sum_over_chains(
    loss_type: str, terms_E: Tensor, weights_E: Tensor, place_E: Tensor, num_depths: int, num_chains: int
) -> Tensor:
    """The weighted sum of the losses of E drafted tokens.

    Args:
        terms_E: ``term_type`` of each token, differentiable.
        weights_E: weight of each; 0 for an entry that is no token. A token with a weight has all tokens before it in
            its chain among the entries.
        place_E: depth (from 0) times ``num_chains``, plus the number of the chain. Any place where the weight is 0.
    """
    if loss_type != ACCEPT:
        return (weights_E * terms_E).sum()
    size = num_depths * num_chains
    # Entries that are no tokens go behind the end.
    place_E = place_E.masked_fill(weights_E == 0, size)
    terms_KC, weights_KC = (
        values_E.new_zeros(size + 1).scatter(0, place_E, values_E)[:size].view(num_depths, num_chains)
        for values_E in (terms_E, weights_E.to(terms_E.dtype))
    )
    loss, accepted_C = terms_E.new_zeros(()), terms_E.new_ones(num_chains)
    # Not cumprod: its backward pass makes the host wait for a GPU.
    for terms_C, weights_C in zip(terms_KC, weights_KC, strict=True):
        accepted_C = accepted_C * (1 - terms_C)
        loss = loss + (weights_C * (1 - accepted_C)).sum()
    return loss
