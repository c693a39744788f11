"""The order of nodes: each after what it takes."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import NodeProto

from cpd_onnx.errors import ModelError
from cpd_onnx.ir.model import bodies_of


def topological(nodes: Sequence[NodeProto], known: set[str], where: str) -> list[int]:
    """Positions of the nodes in an order in which each comes after its inputs; 0, 1, 2 … where the file has one.

    Raises ModelError where there is no such order.
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
            made = {name for index in later for name in nodes[index].output}
            what = "is part of a cycle" if missing in made else "is made by no node"
            raise ModelError(
                f"{where}: input {missing!r} of node {node.name or node.op_type!r} {what}; export it again"
            )
        waiting = later
    return order


def all_inputs(node: NodeProto) -> set[str]:
    """Inputs of a node and what its bodies take from outside."""
    found = set(node.input)
    for body in bodies_of(node).values():
        inner = {v.name for v in body.input} | {t.name for t in body.initializer}
        inner.update(name for n in body.node for name in n.output)
        for n in body.node:
            found |= all_inputs(n) - inner
        found |= {o.name for o in body.output} - inner
    return found
