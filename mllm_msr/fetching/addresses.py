"""Restriction of downloads to public IP addresses (protection against SSRF).

The address is checked when a socket is created for it. This covers host names, which may resolve
differently each time, literal addresses in URLs, and redirects.
"""

import ipaddress
import socket

from aiohttp import AddrInfoType

GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
# IPv6 networks whose last 32 bits are the IPv4 address that is actually connected to.
MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")
# 6to4 tunnels to an embedded IPv4 address; obsolete, so all are refused.
SIX_TO_FOUR = ipaddress.IPv6Network("2002::/16")


class RefusedAddressError(OSError):
    """A connection to an address that is not public was refused."""


def public_socket(address_info: AddrInfoType) -> socket.socket:
    """Create a socket for a public address; aiohttp's ``socket_factory``.

    Raises:
        RefusedAddressError: The address is not public.
    """
    family, kind, protocol, _, (address, *_) = address_info
    if not is_public(str(address)):
        # Without the address: aiohttp combines errors with equal messages into one.
        raise RefusedAddressError("not a public address")
    return socket.socket(family, kind, protocol)


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to a single host on the public internet.

    False for loopback, private, link-local, shared, reserved and multicast addresses, for IPv6
    addresses that embed such an IPv4 address, and for anything but a canonical address.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a socket takes 127.1 and 2130706433 for loopback
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed not in MAPPED and parsed not in TRANSLATED:
            public = parsed in GLOBAL_UNICAST and parsed not in SIX_TO_FOUR
            return public and parsed.is_global
        parsed = ipaddress.IPv4Address(int(parsed) & 0xFFFF_FFFF)
    return parsed.is_global and not parsed.is_multicast
