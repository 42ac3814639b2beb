//! The header in front of each frame (virtio 1.2, §5.1.6): `struct virtio_net_hdr_v1`, which is the tap's header too.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP,
};

use super::config::Offloads;

/// Length of the header, in bytes.
pub const HEADER_LEN: u32 = 12;
/// Where the number of merged buffers is.
pub const NUM_BUFFERS_AT: u32 = 10;
/// An Ethernet header.
pub const MIN_FRAME_LEN: u32 = 14;
/// Room for the largest frame: a header, an Ethernet header with a VLAN tag, and the largest IP packet.
pub const MAX_FRAME_LEN: u32 = HEADER_LEN + 18 + 65535;

/// A header as it came from the driver.
pub type Header = [u8; HEADER_LEN as usize];

/// Checks what the driver says of a frame of `frame_len` bytes and leaves in the header only what means something.
/// False if it can't be: the host's kernel shall not have to find out.
pub fn check(header: &mut Header, frame_len: u32, offloads: Offloads) -> bool {
    let field = |header: &Header, at: usize| u32::from(u16::from_le_bytes([header[at], header[at + 1]]));
    if !(MIN_FRAME_LEN..=MAX_FRAME_LEN - HEADER_LEN).contains(&frame_len) {
        return false;
    }
    let (hdr_len, gso_size) = (field(header, 2), field(header, 4));
    let (csum_start, csum_offset) = (field(header, 6), field(header, 8));
    // Flags other than this one are for the other direction.
    header[0] &= flag(VIRTIO_NET_HDR_F_NEEDS_CSUM);
    header[10..].fill(0);
    let needs_csum = header[0] != 0;
    if needs_csum {
        // The sum's two bytes, which everything before them precedes.
        let fits = csum_start >= MIN_FRAME_LEN && csum_start + csum_offset + 2 <= frame_len;
        if !offloads.csum || !fits {
            return false;
        }
    } else {
        header[6..10].fill(0);
    }
    let ecn = header[1] & flag(VIRTIO_NET_HDR_GSO_ECN) != 0;
    let kind = u32::from(header[1] & !flag(VIRTIO_NET_HDR_GSO_ECN));
    match kind {
        VIRTIO_NET_HDR_GSO_NONE => {
            header[1] = 0;
            header[2..6].fill(0);
            return true;
        }
        VIRTIO_NET_HDR_GSO_TCPV4 if offloads.tso4 => {}
        VIRTIO_NET_HDR_GSO_TCPV6 if offloads.tso6 => {}
        VIRTIO_NET_HDR_GSO_UDP if offloads.ufo => {}
        _ => return false,
    }
    let has_ecn_right = !ecn || (offloads.ecn && kind != VIRTIO_NET_HDR_GSO_UDP);
    // A frame is only cut up if its sums are still to be made (§5.1.6.2). The length of the headers is a hint.
    needs_csum && has_ecn_right && gso_size > 0 && hdr_len <= frame_len
}

fn flag(value: u32) -> u8 {
    // The constants are those of a byte.
    value.to_le_bytes()[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Offloads = Offloads {
        csum: true,
        tso4: true,
        tso6: true,
        ecn: true,
        ufo: true,
    };

    fn header(flags: u8, gso: u8, hdr_len: u16, gso_size: u16, start: u16, offset: u16) -> Header {
        let mut header = [0xee; 12];
        (header[0], header[1]) = (flags, gso);
        for (at, value) in [(2, hdr_len), (4, gso_size), (6, start), (8, offset)] {
            header[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        header
    }

    #[test]
    fn good_headers_pass_and_keep_only_what_means_something() {
        let mut plain = header(0xfe, 0, 99, 98, 97, 96);
        assert!(check(&mut plain, 14, Offloads::default()));
        assert_eq!(plain, [0; 12]);
        let mut tcp = header(1, 0x81, 54, 1448, 34, 16);
        assert!(check(&mut tcp, 60_000, ALL));
        assert_eq!((tcp[0], tcp[1], &tcp[10..]), (1, 0x81, &[0; 2][..]));
    }

    #[test]
    fn lengths_and_offsets_outside_the_frame_are_refused() {
        for frame_len in [0, 13, 65_554] {
            assert!(!check(&mut header(0, 0, 0, 0, 0, 0), frame_len, ALL));
        }
        for (start, offset) in [(13, 0), (34, 25), (59, 0), (u16::MAX, u16::MAX)] {
            assert!(!check(&mut header(1, 0, 0, 0, start, offset), 60, ALL), "{start}");
        }
        assert!(check(&mut header(1, 0, 0, 0, 34, 24), 60, ALL));
        assert!(!check(&mut header(1, 1, 61, 1, 34, 16), 60, ALL));
        assert!(!check(&mut header(1, 1, 54, 0, 34, 16), 60, ALL));
    }

    #[test]
    fn what_was_not_agreed_to_is_refused() {
        let mut offloads = ALL;
        offloads.tso4 = false;
        offloads.ecn = false;
        assert!(!check(&mut header(1, 1, 54, 1448, 34, 16), 3000, offloads));
        assert!(check(&mut header(1, 4, 54, 1448, 34, 16), 3000, offloads));
        assert!(!check(&mut header(1, 0x84, 54, 1448, 34, 16), 3000, offloads));
        assert!(!check(&mut header(1, 0x83, 54, 1448, 34, 16), 3000, ALL));
        // Segmentation without a sum to make, and kinds that don't exist.
        assert!(!check(&mut header(0, 1, 54, 1448, 34, 16), 3000, ALL));
        for gso in [2, 5, 0x7f] {
            assert!(!check(&mut header(1, gso, 54, 1448, 34, 16), 3000, ALL));
        }
        assert!(!check(&mut header(1, 0, 0, 0, 34, 16), 60, Offloads::default()));
    }
}
