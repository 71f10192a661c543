//! What counts as one source among network addresses.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

/// Bits of an IPv6 address that name a network; the rest is a host's to choose, as often as it likes.
const NETWORK_BITS: u32 = 64;

/// An address as it is counted: an IPv4 address by itself, an IPv6 address by its /64, for one host has
/// 2^64 addresses of that and a count of each bounds nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressBlock(IpAddr);

impl AddressBlock {
    /// The block of this address, whatever family the socket is of.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            // This machine has one.
            IpAddr::V6(own) if own.is_loopback() => IpAddr::V6(own),
            IpAddr::V6(own) => {
                let network = own.to_bits() & (u128::MAX << (128 - NETWORK_BITS));
                IpAddr::V6(Ipv6Addr::from_bits(network))
            }
            v4 @ IpAddr::V4(_) => v4,
        })
    }
}

impl fmt::Display for AddressBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V6(network) if !network.is_loopback() => write!(f, "{network}/{NETWORK_BITS}"),
            address => write!(f, "{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(text: &str) -> AddressBlock {
        AddressBlock::of(text.parse().unwrap())
    }

    #[test]
    fn inv_13_all_addresses_of_one_ipv6_network_are_one_source_and_ipv4_addresses_are_not() {
        let one = block("2001:db8:1:2::1");
        for same in ["2001:db8:1:2::2", "2001:db8:1:2:ffff:ffff:ffff:ffff"] {
            assert_eq!(block(same), one, "{same}");
        }
        for other in ["2001:db8:1:3::1", "2001:db8:1::1", "fe80::1"] {
            assert_ne!(block(other), one, "{other}");
        }
        assert_eq!(one.to_string(), "2001:db8:1:2::/64");
        assert_ne!(block("192.0.2.1"), block("192.0.2.2"));
        assert_eq!(block("::ffff:192.0.2.1"), block("192.0.2.1"));
        assert_eq!(block("::ffff:192.0.2.1").to_string(), "192.0.2.1");
        assert_eq!(block("::1").to_string(), "::1");
        assert_ne!(block("::2"), block("::1"));
    }
}
