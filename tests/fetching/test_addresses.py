"""Which IP addresses a download may connect to."""

import socket

import pytest

from mllm_msr.fetching.addresses import RefusedAddressError, is_public, public_socket


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.0.0.1",
        "100.64.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "172.16.0.1",
        "192.168.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",
        "2001:db8::1",
        "2002:7f00:1::",
        "fc00::1",
        "fe80::1",
        "fe80::1%1",
        "fec0::1",
        "ff02::1",
    ],
)
def test_private_addresses(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "host"])
def test_noncanonical_addresses_are_not_public(address):
    assert not is_public(address)


def test_a_socket_is_created_for_public_addresses_only():
    kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
    public_socket((*kind, ("8.8.8.8", 80))).close()
    with pytest.raises(RefusedAddressError, match="not a public address"):
        public_socket((*kind, ("127.0.0.1", 80)))
