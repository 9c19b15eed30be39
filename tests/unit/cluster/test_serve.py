"""Ports and addresses of a job's servers."""

from __future__ import annotations

import itertools
import socket

import pytest

from recipes.cluster.serve import BLOCK, Port, port_candidates, private_address

LINUX = (32768, 60999)


def first(job: int, offset: int, ephemeral: tuple[int, int] = LINUX) -> int:
    return next(port_candidates(job, offset, ephemeral))


def test_ports_of_jobs_and_servers_do_not_meet() -> None:
    ports = [first(job, offset) for job in range(5000, 5200) for offset in range(BLOCK)]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 12000 and max(ports) < LINUX[0]
    assert first(77, 3) == first(77, 3), "a requeued job finds its ports again"


def test_ephemeral_ports_are_avoided_wherever_they_are() -> None:
    found = list(port_candidates(5, 1, (15000, 65535)))
    assert found and all(12000 <= port < 15000 for port in found)
    assert len(set(found)) == len(found)


def test_a_port_in_use_is_passed_over() -> None:
    candidates = list(itertools.islice(port_candidates(4242, 5, LINUX), 4))
    with socket.create_server(("127.0.0.1", candidates[0])):
        one = Port("127.0.0.1", candidates)
        other = Port("127.0.0.1", candidates)
        assert [one.number, other.number] == candidates[1:3], "taken ones, by a server or by another supervisor"
        one.release()
        again = Port("127.0.0.1", candidates)
        assert again.number == candidates[1]
        with pytest.raises(ValueError, match="no free port"):
            Port("127.0.0.1", candidates[:2])
    with socket.create_server(("127.0.0.1", again.number)) as server:
        assert server, "vLLM can listen on the port that is held"
    for port in (other, again):
        port.release()


def test_the_private_address_is_the_one_toward_the_learner() -> None:
    assert private_address("127.0.0.1") == "127.0.0.1"
    assert private_address("ignored", "lo") == "127.0.0.1"
    with pytest.raises(ValueError, match="SERVER_INTERFACE=nonesuch0: no such interface"):
        private_address("127.0.0.1", "nonesuch0")
    with pytest.raises(ValueError, match="no route to no.such.host.invalid"):
        private_address("no.such.host.invalid")
