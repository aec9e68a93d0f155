"""The public internet and nothing else: which addresses a download may connect to.

The check stands where a socket is made, with the address that it is about to connect to. All ways
lead through there: names, which may resolve to something else every time, addresses written in a
URL, and redirects.
"""

import ipaddress
import socket

from aiohttp import AddrInfoType

GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
# Networks of IPv6 whose last 32 bits are an IPv4 address that is really connected to.
MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")
# Tunnels to the IPv4 addresses inside it; nobody needs them any more.
SIX_TO_FOUR = ipaddress.IPv6Network("2002::/16")


class RefusedAddressError(OSError):
    """A connection was about to leave the public internet."""


def public_socket(address_info: AddrInfoType) -> socket.socket:
    """Make a socket for a connection to a public address; for aiohttp's ``socket_factory``.

    Raises:
        RefusedAddressError: The address is not public.
    """
    family, kind, protocol, _, (address, *_) = address_info
    if not is_public(str(address)):
        # Without the address: of errors that read the same, aiohttp passes on one as it is.
        raise RefusedAddressError("not a public address")
    return socket.socket(family, kind, protocol)


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to one host on the public internet.

    Loopback, private, link-local, shared, reserved and multicast addresses do not, nor IPv6
    addresses that stand for such IPv4 ones, nor anything that is no canonical address.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # 127.1 and 2130706433 are loopback to a socket
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed not in MAPPED and parsed not in TRANSLATED:
            public = parsed in GLOBAL_UNICAST and parsed not in SIX_TO_FOUR
            return public and parsed.is_global
        parsed = ipaddress.IPv4Address(int(parsed) & 0xFFFF_FFFF)
    return parsed.is_global and not parsed.is_multicast
