"""Topological order of the nodes of a graph."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import NodeProto

from cpd_onnx.errors import ModelError
from cpd_onnx.ir.model import bodies_of


def topological_order(nodes: Sequence[NodeProto], known: set[str], where: str) -> list[int]:
    """Return the positions of the nodes in topological order: 0, 1, 2 … if the file is already sorted.

    `known` are the names available before the first node, `where` is the graph's name in messages.
    Raises ModelError if the graph has a cycle or an input without a producer.
    """
    needs = [all_inputs(node) for node in nodes]
    waiting, done, order = list(range(len(nodes))), set(known) | {""}, []
    while waiting:
        later = []
        for index in waiting:
            if not needs[index] <= done:
                later.append(index)
                continue
            order.append(index)
            done.update(nodes[index].output)
        if len(later) == len(waiting):
            node, missing = nodes[later[0]], min(needs[later[0]] - done)
            produced = {name for index in later for name in nodes[index].output}
            what = "is part of a cycle" if missing in produced else "is not produced by any node"
            raise ModelError(
                f"{where}: input {missing!r} of node {node.name or node.op_type!r} {what}; export the model again"
            )
        waiting = later
    return order


def all_inputs(node: NodeProto) -> set[str]:
    """Return the inputs of a node and the outer values that its subgraphs capture."""
    found = set(node.input)
    for body in bodies_of(node).values():
        inner = {v.name for v in body.input} | {t.name for t in body.initializer}
        inner.update(name for n in body.node for name in n.output)
        for n in body.node:
            found |= all_inputs(n) - inner
        found |= {o.name for o in body.output} - inner
    return found
