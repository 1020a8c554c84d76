"""Which picture takes whose place in the `shuffled` condition."""

from collections.abc import Hashable, Sequence

import numpy as np


def exchange_groups(owners: Sequence[int], digests: Sequence[Hashable]) -> list[int]:
    """A group number per picture: pictures of one sample, and identical pictures, share a group.

    Groups are joined through either tie: two samples that show one picture are one group.
    """
    parents: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        parents.setdefault(node, node)
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    for owner, digest in zip(owners, digests, strict=True):
        parents[root(("sample", owner))] = root(("picture", digest))
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(root(("sample", owner)), len(numbers)) for owner in owners]


def derangement(groups: Sequence[int], seed: int) -> list[int]:
    """A seeded random permutation that gives as few positions as possible a source of their own group.

    Positions are laid out group by group, in random order, and moved on by the size of the largest
    group m: nothing stays in its group unless m is more than half of all, and then 2m − n must.
    With all groups of one, that is a random cycle through the whole set.
    """
    rng = np.random.default_rng(seed)
    members: dict[int, list[int]] = {}
    for position in rng.permutation(len(groups)):
        members.setdefault(groups[position], []).append(int(position))
    layout = [position for group in members.values() for position in group]
    shift = min(max(map(len, members.values()), default=0), len(layout) - 1)
    sources = [0] * len(layout)
    for place, position in enumerate(layout):
        sources[position] = layout[(place + shift) % len(layout)]
    return sources
