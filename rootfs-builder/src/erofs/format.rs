//! EROFS on-disk structures, as written and as read back.
//!
//! Only what Hull's images use: 4 KiB blocks, extended inodes, flat and chunk-based data, inline extended attributes.
//! Names and numbers follow `fs/erofs/erofs_fs.h` of Linux 6.12; everything is little-endian.

/// Bytes of one block, and the unit every address counts in.
pub const BLOCK_BYTES: u64 = 4096;
/// The same, for buffer arithmetic.
pub const BLOCK: usize = 4096;
/// `log2(BLOCK_BYTES)`.
pub const BLOCK_BITS: u8 = 12;
/// Where the superblock begins.
pub const SUPER_OFFSET: usize = 1024;
/// Bytes of the superblock.
pub const SUPER_BYTES: usize = 128;
/// First four bytes of the superblock.
pub const MAGIC: u32 = 0xe0f5_e1e2;
/// Bytes of an extended inode.
pub const INODE_BYTES: usize = 64;
/// An inode's number is its position in units of this.
pub const SLOT_BYTES: u64 = 32;
/// Bytes of a directory entry, without its name.
pub const DIRENT_BYTES: usize = 12;
/// Bytes of the header in front of an inode's extended attributes.
pub const XATTR_HEADER_BYTES: usize = 12;
/// Bytes of an extended attribute's own header.
pub const XATTR_ENTRY_BYTES: usize = 4;
/// The longest name of a directory entry.
pub const NAME_MAX: usize = 255;
/// A chunk that reads as zeroes and has no block.
pub const NULL_BLOCK: u32 = u32::MAX;

/// The superblock carries a checksum.
pub const COMPAT_SB_CHECKSUM: u32 = 0x1;
/// Extended inodes carry modification times.
pub const COMPAT_MTIME: u32 = 0x2;
/// Some file is chunk-based.
pub const INCOMPAT_CHUNKED_FILE: u32 = 0x4;

/// The low bit of `i_format`: an extended inode.
const FORMAT_EXTENDED: u16 = 1;

/// How an inode's data is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Consecutive blocks.
    Plain,
    /// Consecutive blocks, the last part behind the inode.
    Inline,
    /// A table of block addresses behind the inode.
    Chunked,
}

impl Layout {
    /// The value of `i_format` for an extended inode of this layout.
    pub const fn to_format(self) -> u16 {
        let layout = match self {
            Self::Plain => 0,
            Self::Inline => 2,
            Self::Chunked => 4,
        };
        layout << 1 | FORMAT_EXTENDED
    }

    /// The layout of an extended inode; nothing for what this crate doesn't write.
    pub const fn from_format(format: u16) -> Option<Self> {
        match format {
            1 => Some(Self::Plain),
            5 => Some(Self::Inline),
            9 => Some(Self::Chunked),
            _ => None,
        }
    }
}

/// The superblock's fields that vary.
#[derive(Debug, Clone, Copy)]
pub struct SuperBlock {
    pub root_nid: u16,
    pub inodes: u64,
    pub blocks: u32,
    pub meta_block: u32,
    pub uuid: [u8; 16],
    pub incompatible: u32,
}

impl SuperBlock {
    /// The image's first block.
    pub fn encode(&self) -> Box<[u8; BLOCK]> {
        let mut block = Box::new([0_u8; BLOCK]);
        let sb = &mut block[SUPER_OFFSET..SUPER_OFFSET + SUPER_BYTES];
        put(sb, 0, &MAGIC.to_le_bytes());
        put(sb, 8, &(COMPAT_SB_CHECKSUM | COMPAT_MTIME).to_le_bytes());
        sb[12] = BLOCK_BITS;
        put(sb, 14, &self.root_nid.to_le_bytes());
        put(sb, 16, &self.inodes.to_le_bytes());
        put(sb, 36, &self.blocks.to_le_bytes());
        put(sb, 40, &self.meta_block.to_le_bytes());
        put(sb, 48, &self.uuid);
        put(sb, 80, &self.incompatible.to_le_bytes());
        // The checksum covers the rest of the block with its own field as zero, and isn't inverted at the end.
        let checksum = crc32c(&block[SUPER_OFFSET..]);
        put(&mut block[SUPER_OFFSET..], 4, &checksum.to_le_bytes());
        block
    }

    /// Read the image's first block; an error names what is wrong with it.
    pub fn decode(block: &[u8; BLOCK]) -> Result<Self, &'static str> {
        let sb = &block[SUPER_OFFSET..];
        if u32_at(sb, 0) != MAGIC {
            return Err("no EROFS superblock");
        }
        let mut copy = sb.to_vec();
        copy[4..8].fill(0);
        if crc32c(&copy) != u32_at(sb, 4) {
            return Err("superblock checksum is wrong");
        }
        if sb[12] != BLOCK_BITS {
            return Err("block size is not 4096");
        }
        let incompatible = u32_at(sb, 80);
        if incompatible & !INCOMPAT_CHUNKED_FILE != 0 {
            return Err("uses features this reader lacks");
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&sb[48..64]);
        Ok(Self {
            root_nid: u16_at(sb, 14),
            inodes: u64_at(sb, 16),
            blocks: u32_at(sb, 36),
            meta_block: u32_at(sb, 40),
            uuid,
            incompatible,
        })
    }
}

/// An extended inode.
#[derive(Debug, Clone, Copy)]
pub struct RawInode {
    pub layout: Layout,
    /// Bytes of extended attributes behind the inode, header included; 0 or a multiple of 4 from 16 on.
    pub xattr_bytes: usize,
    pub mode: u16,
    pub size: u64,
    /// First block, device number or chunk format, by kind of file.
    pub value: u32,
    pub ino: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime_secs: i64,
    pub mtime_nanos: u32,
    pub nlink: u32,
}

impl RawInode {
    pub fn encode(&self) -> [u8; INODE_BYTES] {
        let mut out = [0; INODE_BYTES];
        put(&mut out, 0, &self.layout.to_format().to_le_bytes());
        let units = if self.xattr_bytes == 0 {
            0
        } else {
            (self.xattr_bytes - XATTR_HEADER_BYTES) / 4 + 1
        };
        // The writer bounds an inode's attributes before it comes here.
        let units = u16::try_from(units).unwrap_or(u16::MAX);
        put(&mut out, 2, &units.to_le_bytes());
        put(&mut out, 4, &self.mode.to_le_bytes());
        put(&mut out, 8, &self.size.to_le_bytes());
        put(&mut out, 16, &self.value.to_le_bytes());
        put(&mut out, 20, &self.ino.to_le_bytes());
        put(&mut out, 24, &self.uid.to_le_bytes());
        put(&mut out, 28, &self.gid.to_le_bytes());
        put(&mut out, 32, &self.mtime_secs.to_le_bytes());
        put(&mut out, 40, &self.mtime_nanos.to_le_bytes());
        put(&mut out, 44, &self.nlink.to_le_bytes());
        out
    }

    /// Nothing for an inode this crate wouldn't have written.
    pub fn decode(raw: &[u8; INODE_BYTES]) -> Option<Self> {
        let units = usize::from(u16_at(raw, 2));
        Some(Self {
            layout: Layout::from_format(u16_at(raw, 0))?,
            xattr_bytes: if units == 0 {
                0
            } else {
                XATTR_HEADER_BYTES + (units - 1) * 4
            },
            mode: u16_at(raw, 4),
            size: u64_at(raw, 8),
            value: u32_at(raw, 16),
            ino: u32_at(raw, 20),
            uid: u32_at(raw, 24),
            gid: u32_at(raw, 28),
            mtime_secs: i64::from_le_bytes(u64_at(raw, 32).to_le_bytes()),
            mtime_nanos: u32_at(raw, 40),
            nlink: u32_at(raw, 44),
        })
    }
}

/// The prefixes an extended attribute's name may have, and their numbers.
///
/// The two POSIX ACL names are whole names: nothing may follow them.
pub const XATTR_PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// Split a name into its prefix's number and the rest; nothing for a name EROFS cannot hold.
pub fn split_xattr_name(name: &[u8]) -> Option<(u8, &[u8])> {
    XATTR_PREFIXES.iter().find_map(|(prefix, index)| {
        let rest = name.strip_prefix(*prefix)?;
        let whole_name = !prefix.ends_with(b".");
        (rest.is_empty() == whole_name && rest.len() <= NAME_MAX).then_some((*index, rest))
    })
}

/// The device number as inodes store it (`new_encode_dev`); nothing if Linux has no such number.
pub fn encode_device(major: u32, minor: u32) -> Option<u32> {
    (major < 1 << 12 && minor < 1 << 20).then_some((minor & 0xff) | major << 8 | (minor & !0xff) << 12)
}

/// The reverse of [`encode_device`].
pub const fn decode_device(value: u32) -> (u32, u32) {
    ((value >> 8) & 0xfff, (value & 0xff) | (value >> 12) & 0xf_ff00)
}

/// The table of CRC-32C (Castagnoli), reflected.
const CRC32C: [u32; 256] = {
    let mut table = [0; 256];
    let mut index: u32 = 0;
    while index < 256 {
        let mut crc = index;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ 0x82f6_3b78
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[index as usize] = crc;
        index += 1;
    }
    table
};

/// CRC-32C begun with all ones and not inverted at the end, as the kernel's `crc32c(~0, …)`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, byte| {
        CRC32C[usize::from(crc.to_le_bytes()[0] ^ byte)] ^ crc >> 8
    })
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_gives_the_published_check_value() {
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn device_numbers_survive_encoding() {
        for (major, minor) in [(0, 0), (1, 3), (259, 70_000), (4095, 0xf_ffff)] {
            assert_eq!(
                encode_device(major, minor).map(decode_device),
                Some((major, minor))
            );
        }
        assert_eq!(encode_device(4096, 0), None);
        assert_eq!(encode_device(0, 1 << 20), None);
    }

    #[test]
    fn attribute_names_outside_the_known_prefixes_are_refused() {
        assert_eq!(split_xattr_name(b"user.a"), Some((1, &b"a"[..])));
        assert_eq!(split_xattr_name(b"system.posix_acl_access"), Some((2, &b""[..])));
        assert_eq!(split_xattr_name(b"system.posix_acl_accessx"), None);
        assert_eq!(split_xattr_name(b"user."), None);
        assert_eq!(split_xattr_name(b"btrfs.compression"), None);
    }

    #[test]
    fn a_changed_superblock_is_noticed() {
        let sb = SuperBlock {
            root_nid: 2,
            inodes: 1,
            blocks: 2,
            meta_block: 1,
            uuid: [7; 16],
            incompatible: 0,
        };
        let mut block = sb.encode();
        assert!(SuperBlock::decode(&block).is_ok());
        block[SUPER_OFFSET + 36] ^= 1;
        assert_eq!(
            SuperBlock::decode(&block).err(),
            Some("superblock checksum is wrong")
        );
    }
}
