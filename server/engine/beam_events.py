"""What a step changed in the beam tree, as JSON for whoever watches it grow.

A node is told once, when it is made; `live`, `dead`, `finished` and `evicted` speak of nodes by
their id, and node 0 is the prompt. A reader that fell behind gets a snapshot: it needs nothing that
was told before.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from server.engine.beam import Ending, Rules, Search, attainable
from server.engine.tree import Node, path

Name = Callable[[int], str]  # a token's text
Json = dict[str, Any]


def change(
    rules: Rules, before: Sequence[Search], after: Sequence[Search], committed: int, name: Name
) -> bytes:
    """One step: `before` and `after` hold one search, or one for each diverse group."""
    old, new = living(before), living(after)
    stood, stands = _pooled(before), _pooled(after)
    admitted = [ending for ending in stands if ending not in stood]
    made = new + [ending.node for ending in admitted]
    bred = {node.parent for node in made}
    return _event(
        rules,
        after,
        step=next(node.length for node in old) + 1,
        committed=committed,
        nodes=_nodes(made, new, name),
        live=[node.number for node in new],
        dead=[node.number for node in old if node not in bred and node.length],
        finished=_finished(admitted),
        evicted=[ending.node.number for ending in stood if ending not in stands],
    )


def snapshot(rules: Rules, searches: Sequence[Search], committed: int, name: Name) -> bytes:
    """All that stands, parents before children."""
    live, pooled = living(searches), _pooled(searches)
    ends = [*live, *(ending.node for ending in pooled)]
    nodes = {node.number: node for end in ends for node in path(end)}
    return _event(
        rules,
        searches,
        snapshot=True,
        step=max((node.length for node in ends), default=0),
        committed=committed,
        nodes=_nodes([nodes[number] for number in sorted(nodes)], live, name),
        live=[node.number for node in live],
        finished=_finished(pooled),
    )


def living(searches: Iterable[Search]) -> list[Node]:
    """The beams that the next step has rows for. Groups that have not begun share one."""
    return list(dict.fromkeys(n for search in searches if not search.stop for n in search.live))


def _pooled(searches: Sequence[Search]) -> list[Ending]:
    return [ending for search in searches for ending in search.pool]


def _nodes(nodes: list[Node], live: list[Node], name: Name) -> list[Json]:
    rows = {node: row for row, node in enumerate(live)}
    return [
        {
            "id": node.number,
            "parent": node.parent.number,
            "token_id": node.token,
            "text": name(node.token),
            "logprob": round(node.logprob, 4),
            "cum": round(node.sum, 4),
            "row": rows.get(node),
        }
        for node in nodes
    ]


def _finished(endings: list[Ending]) -> list[Json]:
    return [
        {"node": e.node.number, "score": round(e.score, 4), "length": e.node.length}
        for e in endings
    ]


def _event(rules: Rules, searches: Sequence[Search], **told: Any) -> bytes:
    """With how near the search is to its stop: it goes on while attainable > worst_finished."""
    running = [search for search in searches if not search.stop]
    full = running and all(len(search.pool) == rules.width for search in running)
    told["stop"] = {
        "improvable": bool(running),
        "best_live": _highest(search.live[0].sum for search in running),
        "attainable": _highest(attainable(rules, search.live[0]) for search in running),
        "worst_finished": _lowest(search.pool[-1].score for search in running) if full else None,
        "reason": None if running else searches[-1].stop,
    }
    return msgspec.json.encode(told)


def _highest(values: Iterable[float]) -> float | None:
    return max((round(value, 4) for value in values), default=None)


def _lowest(values: Iterable[float]) -> float | None:
    return min((round(value, 4) for value in values), default=None)
