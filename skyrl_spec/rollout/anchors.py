"""Where an engine drafted along a response."""

from __future__ import annotations


def drafted_anchors(prompt_length: int, response: list[int], blocks: list[list[int]]) -> list[int]:
    """Anchors of the blocks that were drafted for a response. Blocks drafted beyond its end have none.

    The first block follows the first sampled token. A drafted token is accepted exactly if it equals the sampled one,
    because a rejected token is never sampled in the same place. The next anchor is the token after the accepted ones.
    """
    anchors, position = [], 0
    for block in blocks:
        # A block after the last token has no sampled tokens to compare with, and vLLM does not always draft it.
        if position + 1 >= len(response):
            break
        anchors.append(prompt_length + position)
        following = response[position + 1 :]
        matches = [drafted == sampled for drafted, sampled in zip(block, following, strict=False)]
        position += 1 + (matches.index(False) if False in matches else len(matches))
    return anchors
