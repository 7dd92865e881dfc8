"""The tree that a beam search grows: nodes that never change, each holding its parent.

A branch that nothing holds is freed by itself. Where two branches part is found in O(log length):
a node also holds one farther ancestor, chosen as in Myers' skew-binary lists (two equal hops in a
row become one), so that nodes of one length hop in step.
"""

from typing import cast

import msgspec


class Node(msgspec.Struct, frozen=True, eq=False):
    """A token of the tree."""

    number: int
    parent: "Node"  # the root's is None, and is never asked for
    jump: "Node"  # the farther ancestor
    token: int
    logprob: float
    sum: float
    length: int
    rank: int  # of the token in its row: 1 is the likeliest
    rivals: tuple[tuple[int, float], ...] = ()  # the row's likeliest, when asked for

    def __repr__(self) -> str:
        """Without its ancestors, each of which would show two more."""
        return f"Node({self.number}, token={self.token}, sum={self.sum}, length={self.length})"


def root() -> Node:
    """The prompt."""
    nothing = cast(Node, None)
    return Node(0, nothing, nothing, -1, 0.0, 0.0, 0, 0)


def child(
    parent: Node,
    number: int,
    token: int,
    logprob: float,
    total: float,
    rank: int,
    rivals: tuple[tuple[int, float], ...],
) -> Node:
    length = parent.length + 1
    return Node(number, parent, _jump(parent), token, logprob, total, length, rank, rivals)


def _jump(parent: Node) -> Node:
    near = parent.jump
    if parent.length == 0 or near.length == 0:
        return parent
    even = parent.length - near.length == near.length - near.jump.length
    return near.jump if even else parent


def meet(one: Node, other: Node) -> Node:
    """Their deepest common ancestor, in O(log length)."""
    if one.length < other.length:
        one, other = other, one
    one = ancestor(one, other.length)
    while one is not other:
        far = one.jump is not other.jump
        one, other = (one.jump, other.jump) if far else (one.parent, other.parent)
    return one


def agree(one: Node, other: Node, after: int) -> Node:
    """The same for nodes of two trees, by their tokens, of which the first `after` are equal."""
    length = min(one.length, other.length)
    one, other = ancestor(one, length), ancestor(other, length)
    agreed = one
    while one is not other and one.length > after:
        if one.token != other.token:
            agreed = one.parent
        one, other = one.parent, other.parent
    return agreed


def ancestor(node: Node, length: int) -> Node:
    """The first `length` tokens of a node's path, as their last node."""
    while node.length > length:
        node = node.jump if node.jump.length >= length else node.parent
    return node


def path(node: Node, after: int = 0) -> list[Node]:
    """The nodes that lead to this one, itself included, without the first `after`."""
    nodes = []
    while node.length > after:
        nodes.append(node)
        node = node.parent
    return nodes[::-1]
