"""A small evaluator of NetworkPolicies: may this pod speak to that one, or to that address?

As Dataplane V2 decides: what no policy selects may do everything; what one selects may do only what one of
them allows; an ipBlock means addresses outside of the cluster, never a pod. Not covered: endPort, host pods.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    namespace: str
    labels: dict[str, str]


Peer = Pod | str
"""A pod, or an address outside of the cluster."""


def allowed(documents: list[Document], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether every policy that has a say lets it through, on both ends."""
    policies = [document for document in documents if document["kind"] == "NetworkPolicy"]
    # Kubernetes gives every namespace its name as a label.
    return _lets(policies, "Egress", source, target, port, protocol) and _lets(
        policies, "Ingress", target, source, port, protocol
    )


def _lets(policies: list[Document], direction: str, subject: Peer, other: Peer, port: int, protocol: str) -> bool:
    if isinstance(subject, str):
        return True
    selecting = [
        policy
        for policy in policies
        if policy["metadata"]["namespace"] == subject.namespace
        and direction in policy["spec"]["policyTypes"]
        and _selects(policy["spec"]["podSelector"], subject.labels)
    ]
    key, peers = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    return not selecting or any(
        _port_fits(rule.get("ports"), port, protocol)
        and any(_peer_fits(peer, other, policy["metadata"]["namespace"]) for peer in rule.get(peers, [{}]))
        for policy in selecting
        for rule in policy["spec"].get(key, [])
    )


def _port_fits(ports: list[dict[str, Any]] | None, port: int, protocol: str) -> bool:
    return ports is None or any(
        entry.get("port", port) == port and entry.get("protocol", "TCP") == protocol for entry in ports
    )


def _peer_fits(peer: dict[str, Any], other: Peer, namespace: str) -> bool:
    if not peer:
        return True
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        return (
            isinstance(other, str)
            and _within(other, block["cidr"])
            and not any(_within(other, hole) for hole in block.get("except", []))
        )
    if isinstance(other, str):
        return False
    if "namespaceSelector" in peer:
        if not _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace}):
            return False
    elif other.namespace != namespace:
        return False
    return _selects(peer.get("podSelector", {}), other.labels)


def _within(address: str, cidr: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(cidr)


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        _expression(expression, labels) for expression in selector.get("matchExpressions", [])
    )


def _expression(expression: dict[str, Any], labels: dict[str, str]) -> bool:
    key, operator = expression["key"], expression["operator"]
    if operator == "Exists":
        return key in labels
    if operator == "DoesNotExist":
        return key not in labels
    inside = labels.get(key) in expression["values"]
    return inside if operator == "In" else not inside
