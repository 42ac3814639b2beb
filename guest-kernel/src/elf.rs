//! The few facts the manifest takes from an ELF image: that it is one for x86-64, its build id, what it takes of memory.

use std::path::Path;

use crate::error::{Error, Result};
use crate::inputs::hex;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const NT_GNU_BUILD_ID: u32 = 3;
const EM_X86_64: u16 = 62;

/// Facts about an image.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ImageFacts {
    pub(crate) build_id: String,
    pub(crate) loaded_size_bytes: u64,
}

/// Reads the program headers and the notes of an image in memory.
pub(crate) fn inspect(image: &[u8], path: &Path) -> Result<ImageFacts> {
    let not_a_kernel = |reason| Error::NotAKernel {
        path: path.to_owned(),
        reason,
    };
    if image.get(..6) != Some(b"\x7fELF\x02\x01") {
        return Err(not_a_kernel("no 64-bit little-endian ELF header"));
    }
    if read_u16(image, 18) != Some(EM_X86_64) {
        return Err(not_a_kernel("built for another machine"));
    }
    let truncated = || not_a_kernel("truncated");
    let table = read_u64(image, 32).and_then(to_usize).ok_or_else(truncated)?;
    let entry_size = usize::from(read_u16(image, 54).ok_or_else(truncated)?);
    let count = usize::from(read_u16(image, 56).ok_or_else(truncated)?);
    let mut facts = ImageFacts {
        build_id: String::new(),
        loaded_size_bytes: 0,
    };
    for index in 0..count {
        let at = index
            .checked_mul(entry_size)
            .and_then(|offset| offset.checked_add(table))
            .ok_or_else(truncated)?;
        let kind = read_u32(image, at).ok_or_else(truncated)?;
        let offset = read_u64(image, at + 8).and_then(to_usize).ok_or_else(truncated)?;
        let file_size = read_u64(image, at + 32)
            .and_then(to_usize)
            .ok_or_else(truncated)?;
        let memory_size = read_u64(image, at + 40).ok_or_else(truncated)?;
        let end = offset.checked_add(file_size).ok_or_else(truncated)?;
        let content = image.get(offset..end).ok_or_else(truncated)?;
        match kind {
            PT_LOAD => facts.loaded_size_bytes = facts.loaded_size_bytes.saturating_add(memory_size),
            PT_NOTE => {
                if let Some(id) = build_id(content) {
                    facts.build_id = hex(id);
                }
            }
            _ => {}
        }
    }
    Ok(facts)
}

fn build_id(mut notes: &[u8]) -> Option<&[u8]> {
    loop {
        let name_size = to_usize(u64::from(read_u32(notes, 0)?))?;
        let content_size = to_usize(u64::from(read_u32(notes, 4)?))?;
        let kind = read_u32(notes, 8)?;
        let content_at = 12usize.checked_add(name_size.checked_next_multiple_of(4)?)?;
        let end = content_at.checked_add(content_size)?;
        if kind == NT_GNU_BUILD_ID && notes.get(12..16) == Some(b"GNU\0") {
            return notes.get(content_at..end);
        }
        notes = notes.get(content_at.checked_add(content_size.checked_next_multiple_of(4)?)?..)?;
    }
}

fn to_usize(value: u64) -> Option<usize> {
    usize::try_from(value).ok()
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(
        bytes.get(at..at.checked_add(2)?)?.try_into().ok()?,
    ))
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(
        bytes.get(at..at.checked_add(4)?)?.try_into().ok()?,
    ))
}

fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(
        bytes.get(at..at.checked_add(8)?)?.try_into().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF header with one PT_NOTE holding a build id and one PT_LOAD.
    fn image() -> Vec<u8> {
        let mut image = vec![0; 64 + 2 * 56];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        image[18..20].copy_from_slice(&62u16.to_le_bytes());
        image[32..40].copy_from_slice(&64u64.to_le_bytes());
        image[54..56].copy_from_slice(&56u16.to_le_bytes());
        image[56..58].copy_from_slice(&2u16.to_le_bytes());
        let notes_at = image.len() as u64;
        let notes = [
            &4u32.to_le_bytes()[..],
            &2u32.to_le_bytes(),
            &3u32.to_le_bytes(),
            b"GNU\0",
            &[0xab, 0xcd, 0, 0],
        ]
        .concat();
        image[64..68].copy_from_slice(&PT_NOTE.to_le_bytes());
        image[72..80].copy_from_slice(&notes_at.to_le_bytes());
        image[96..104].copy_from_slice(&(notes.len() as u64).to_le_bytes());
        image[120..124].copy_from_slice(&PT_LOAD.to_le_bytes());
        image[160..168].copy_from_slice(&4096u64.to_le_bytes());
        image.extend_from_slice(&notes);
        image
    }

    #[test]
    fn build_id_and_size_come_from_the_program_headers() {
        let facts = inspect(&image(), Path::new("vmlinux")).unwrap();
        assert_eq!(
            facts,
            ImageFacts {
                build_id: "abcd".into(),
                loaded_size_bytes: 4096
            }
        );
    }

    #[test]
    fn every_truncation_is_an_error_or_lacks_the_build_id_but_never_panics() {
        let whole = image();
        for length in 0..whole.len() {
            if let Ok(facts) = inspect(&whole[..length], Path::new("vmlinux")) {
                assert!(facts.build_id.is_empty());
            }
        }
    }

    #[test]
    fn image_of_another_machine_is_refused() {
        let mut other = image();
        other[18] = 183;
        let error = inspect(&other, Path::new("vmlinux")).unwrap_err();
        assert!(error.to_string().contains("another machine"), "{error}");
    }
}
